"""softbridge.json beside written files: where they are from, what was done, what the caller must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from softbridge import untrusted
from softbridge.base.model import BaseModel
from softbridge.checkpoint.choice import ALL, Choice
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError
from softbridge.geometry import Geometry
from softbridge.lowering.precision import DTYPES
from softbridge.lowering.scale import in_scale
from softbridge.lowering.steps import Exactness, Step
from softbridge.plugin.hookspecs import Format
from softbridge.prompt.part import InputPrompt, Part
from softbridge.prompt.soft_prompt import Positions, SoftPrompt

MANIFEST = "softbridge.json"
MANIFEST_VERSION = 1
CERTIFICATE = "certificate.json"
CARD = "README.md"
#: What may stand beside a toolkit's files, and says nothing of their format.
BESIDE = frozenset((MANIFEST, CERTIFICATE, CARD))


@dataclass(frozen=True)
class Loaded:
    """A prompt with the format and the files that it was read from.

    Attributes:
        steps: that led to it, as its manifest says.
        dtype: what its numbers were to be stored in on request, as its manifest says.
        choice: what of its source was converted, as its manifest says.
        made_of: digests of the files that it was converted from, as its manifest says.
        alone: where the files put real tokens by themselves, without the manifest; None: they were not read.
    """

    prompt: SoftPrompt
    format: Format
    path: Path
    steps: tuple[Step, ...] = ()
    dtype: str | None = None
    choice: Choice = ALL
    made_of: Mapping[str, str] = field(default_factory=dict)
    alone: Positions | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """Of its own files: name -> sha256."""
        return {} if self.prompt.origin is None else self.prompt.origin.digests

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions under which it was written."""
        return names_of(self.steps, "conditional")


def trained_with(prompt: SoftPrompt, base: BaseModel | None, release: str) -> SoftPrompt:
    """The prompt with what a release of transformers multiplies its vectors by.

    Raises:
        SoftbridgeError: no base model is given, `trained_on` is not a release of transformers, or the prompt's files
            say something else.
    """
    if base is None:
        raise BaseModelError(
            f"an input prompt that was trained on transformers {release}, without a base model",
            "the base model, whose family says what that means",
            "give it with --base (base=... in Python)",
        )
    told = base.scale_on(release)
    if told is None:
        return prompt
    for part in prompt.inputs:
        if part.told_scale is not None and not in_scale(part, told):
            raise SoftbridgeError(
                f"files that say that their vectors are multiplied by {part.told_scale:g}; on transformers {release} "
                f"it was {told:g}",
                "what the files say",
                "leave --trained-on out",
            )
    stated: dict[str, float] = dict.fromkeys(prompt.positions.start, told)
    return replace(prompt, parts=tuple(with_scale(part, stated) for part in prompt.parts))


def with_scale(part: Part, scale: Mapping[str, float]) -> Part:
    """A part as it was read, with what multiplies its vectors, or that nothing says so."""
    if not isinstance(part, InputPrompt) or part.entry != "before" or part.told_scale is not None:
        return part
    return replace(part, scale=scale.get(part.stack, "untold"))


def names_of(steps: Sequence[Step], exactness: Exactness) -> tuple[str, ...]:
    """Names of the steps of this exactness, in order."""
    return tuple(step.name for step in steps if step.exactness == exactness)


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself, by which damage is noticed. (It keeps nobody from making another.)"""
    said = {name: value for name, value in manifest.items() if name != "digest"}
    return {**said, "digest": untrusted.sha256_of(untrusted.json_bytes(said))}


def same_attention(a: Geometry, b: Geometry) -> bool:
    """Whether a prompt for one fits the other; a vocabulary may have been resized."""
    return replace(a, vocabulary=0) == replace(b, vocabulary=0)


def with_manifest(loaded: Loaded, files: untrusted.Files) -> tuple[Loaded, Mapping[str, float]]:
    """What was read, with what the manifest says, and the scales in it, after checking that it belongs to these files.

    Raises:
        CheckpointError: the manifest belongs to other files, or is damaged.
    """
    form, prompt = loaded.format, loaded.prompt
    manifest = files.json(MANIFEST)
    remedy = f"remove {MANIFEST} if it does not belong here, or convert again"
    # Weights that the manifest does not name could be read instead of those that it does.
    here = [name for name in files.names if "/" not in name]
    weights = [name for name in here if files.kind(name) in ("safetensors", "pickle")]
    if manifest.get("softbridge") != MANIFEST_VERSION or manifest.get("format") != form.name:
        raise CheckpointError(
            f"{MANIFEST} is of version {manifest.get('softbridge')!r} and for format {manifest.get('format')!r}",
            f"version {MANIFEST_VERSION} and format '{form.name}'",
            remedy,
        )
    if "digest" in manifest and manifest != signed(manifest):  # before 0.2 it had none
        raise CheckpointError(
            f"{MANIFEST} has been changed since it was written", "what its digest was made of", remedy
        )
    recorded = manifest.get("files")
    named: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    stale = [name for name in weights if name not in named]
    stale += [
        name
        for name, digest in named.items()
        if (name in files and files.digest(name) != digest) or (name not in files and name != CERTIFICATE)
    ]
    if not named or stale:
        raise CheckpointError(
            f"{MANIFEST} describes other files than those beside it: {', '.join(stale) or 'none are named'}",
            "files with the digests that it records",
            remedy,
        )
    try:
        positions = Positions(**manifest["positions"])
        told = replace(prompt, positions=positions)  # checks that they speak of the prompt's own stacks
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{MANIFEST} has no valid 'positions': {error!r}", "start, relative_bias and window", remedy
        ) from error
    steps, dtype = manifest.get("steps"), manifest.get("dtype")
    kinds = get_args(Exactness)
    if not isinstance(steps, list) or not all(
        isinstance(step, dict)
        and step.keys() == {"name", "exactness", "note"}
        and all(isinstance(text, str) for text in step.values())
        and step["exactness"] in kinds
        for step in steps
    ):
        raise CheckpointError(f"{MANIFEST} has steps {steps!r:.80}", "a list of steps as softbridge wrote it", remedy)
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise CheckpointError(f"{MANIFEST} has the dtype {dtype!r:.40}", f"null or one of {', '.join(DTYPES)}", remedy)
    done = tuple(Step(**step) for step in steps)
    if told.positions != prompt.positions and "positions" not in names_of(done, "conditional"):
        raise CheckpointError(
            f"{MANIFEST} has tokens stand elsewhere than the files do, and no condition says so",
            "the positions that the files have, or the condition 'positions'",
            remedy,
        )
    prompt = told
    scale = manifest.get("scale", {})
    try:
        for stack, number in scale.items():
            replace(next(part for part in prompt.inputs if part.stack == stack), scale=float(number))
    except (AttributeError, StopIteration, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{MANIFEST} has the scale {scale!r:.80}", "stack: positive number", remedy) from error
    try:
        choice = Choice.from_json(manifest.get("choice", {}))
    except ValueError as error:
        raise CheckpointError(
            f"{MANIFEST} has no valid 'choice': {error}", "one that softbridge wrote", remedy
        ) from error
    source = manifest.get("source", {})
    made_of = source.get("digests", {}) if isinstance(source, dict) else None
    if not isinstance(made_of, dict):
        raise CheckpointError(f"{MANIFEST} has the source {source!r:.80}", "an object with 'digests'", remedy)
    return replace(loaded, prompt=prompt, steps=done, dtype=dtype, choice=choice, made_of=made_of), scale
