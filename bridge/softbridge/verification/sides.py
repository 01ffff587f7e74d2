"""From two files to what is run: what their conversions claim, and the two prompts that the claim is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.base.model import BaseModel
from softbridge.checkpoint.choice import ALL, Choice
from softbridge.checkpoint.manifest import Loaded
from softbridge.checkpoint.read import files_at, read
from softbridge.errors import LoweringError, SoftbridgeError
from softbridge.lowering.planner import for_model, lower
from softbridge.lowering.precision import DTYPES, as_dtype
from softbridge.lowering.steps import Target
from softbridge.parts import named_arrays
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.bench import Subject
from softbridge.verification.claim import Claim, Level, Which, rounded_to

#: How far another processor may compute the same numbers otherwise before they are rounded, relative to the largest of
#: an array. Every rounding that can be asked for changes numbers by less in float32 alone.
COMPUTED_AGAIN = 1e-6

Pair = Mapping[Which, Loaded]


def read_sides(a: str | Path, b: str | Path, base: BaseModel, claim: Claim | None = None) -> Pair:
    """The two prompts; the one that the other was made of is as its conversion read it.

    Args:
        a: path of the source.
        b: path of the target.
        base: the base model.
        claim: what is claimed, where that is known; else the files' manifests say how they were made.

    Raises:
        CheckpointError: see `softbridge.checkpoint.read.read`.
    """
    if claim is not None:
        how: dict[Which | None, Mapping[str, Any]] = {claim.origin: claim.choice.reading}
        return {
            "source": read(a, base=base, **how.get("source", {})),
            "target": read(b, base=base, **how.get("target", {})),
        }
    target = read(b, base=base)
    source = read(a, base=base, **_reading(target, a))
    if reading := _reading(source, b):
        target = read(b, base=base, **reading)
    return {"source": source, "target": target}


def claim_of(sides: Pair, *, weights: bool = False, level: Level = "exact") -> Claim:
    """What is claimed of two prompts, by what their files say of how they were made.

    A conversion speaks of its own source, and how that was made in turn says nothing of the two. Of files that are no
    conversion of each other both speak: they may have one origin.

    Args:
        sides: the two.
        weights: whether the base model's own weights are wanted.
        level: what counts as the same.
    """
    source, target = sides["source"], sides["target"]
    direct: list[Which] = ["target"] if _is_made_of(target, source.digests) else []
    direct += ["source"] if _is_made_of(source, target.digests) else []
    speaking = direct or list(sides)
    dtypes = {which: rounded_to(sides[which].steps, sides[which].dtype) for which in speaking}
    # A dtype and a choice are about the other side. Where both sides have one, neither is the other's origin.
    acting = [which for which in speaking if dtypes[which] is not None or sides[which].choice != ALL]
    made = acting[0] if len(acting) == 1 else None
    chosen = ALL if made is None else sides[made].choice
    narrow = [kind for kind in dtypes.values() if kind is not None]
    claim = Claim(
        dtype=min(narrow, key=lambda kind: DTYPES[kind].itemsize, default=None),
        choice=chosen if direct else Choice(task=chosen.task, part=chosen.part),
        made=made,
    )
    return claim.about(
        [_chosen(claim, which, sides[which].prompt) for which in sides],
        [step for which in speaking for step in sides[which].steps],
        weights=weights,
        level=level,
    )


def subjects(claim: Claim, sides: Pair, base: BaseModel) -> tuple[Claim, Subject, Subject]:
    """What is run of the two under a claim; and the claim, which by now knows what this model asks of the numbers."""
    run: dict[Which, Subject] = {}
    for which, loaded in sides.items():
        claim, run[which] = _here(claim, loaded, _chosen(claim, which, loaded.prompt), base)
    if claim.headless:  # the comparison is the caller to whom one side left it
        head = next((one.prompt.head for one in run.values() if one.prompt.head), {})
        for which, one in run.items():
            if not one.prompt.head:
                run[which] = replace(one, prompt=replace(one.prompt, head=head), directory=None)
    if claim.dtype is not None:
        _round(claim, sides, run, base)
    return claim, run["source"], run["target"]


def alone(path: str | Path, base: BaseModel, *, weights: bool = False) -> tuple[Claim, Subject]:
    """One side by itself, as it is, and what its own files say of it.

    Raises:
        CheckpointError: see `softbridge.checkpoint.read.read`.
    """
    loaded = read(path, base=base)
    return _here(Claim().about([loaded.prompt], loaded.steps, weights=weights), loaded, loaded.prompt, base)


def _here(claim: Claim, loaded: Loaded, prompt: SoftPrompt, base: BaseModel) -> tuple[Claim, Subject]:
    """What is chosen of a file, as it is run here. Files for another transformers do not stand for that."""
    here = for_model(prompt, base)
    scaled = any(one.scale != "untold" and one != other for one, other in zip(prompt.inputs, here.inputs, strict=True))
    directory = None if scaled or prompt is not loaded.prompt else loaded.path
    return claim.scaled if scaled else claim, Subject(str(loaded.path), here, loaded.format.engine, directory)


def _round(claim: Claim, sides: Pair, run: dict[Which, Subject], base: BaseModel) -> None:
    """Put in place of one side what the other's rounding is not held against.

    Of numbers that are the origin's own, that is the origin's, rounded alike. Numbers that were computed and then
    rounded are computed again: what is the same function is what was rounded, and the file is held to being that,
    rounded. Where it is not, the file's own numbers are run, and will be found different.
    """
    kind = DTYPES[claim.dtype or "float32"]
    if claim.made is None or claim.origin is None:
        for which, one in run.items():
            if any(array.dtype.itemsize > kind.itemsize for part in one.prompt.parts for _, array in part.arrays()):
                run[which] = replace(one, prompt=as_dtype(one.prompt, kind), directory=None)
        return
    origin, made, form = run[claim.origin], run[claim.made], sides[claim.made].format
    wide = origin.prompt
    if claim.computed:
        try:  # what the rounding replaced may be more than the format keeps
            accepted = {*claim.conditions, "dtype"}
            wide = lower(wide, Target(form.name, form.capabilities, base), accepted).prompt
        except LoweringError:
            return
    if not _is_rounded(wide, made.prompt, kind, COMPUTED_AGAIN if claim.computed else 0.0):
        return
    if claim.computed:
        prompt = replace(made.prompt, parts=wide.parts)
        run[claim.made] = replace(made, prompt=prompt, directory=None, stands_for=made.prompt)
    else:
        run[claim.origin] = replace(origin, prompt=as_dtype(origin.prompt, kind), directory=None)


def _is_rounded(wide: SoftPrompt, narrow: SoftPrompt, kind: np.dtype[Any], slack: float) -> bool:
    """Whether numbers are others, rounded to the nearest by NumPy: by another way than the conversion took."""
    ours, theirs = (named_arrays(replace(prompt, head={}, training=None)) for prompt in (wide, narrow))
    if {name: array.shape for name, array in ours.items()} != {name: array.shape for name, array in theirs.items()}:
        return False
    for name, array in ours.items():
        exact = array.astype(np.float64)
        room = slack * np.abs(exact).max()
        with np.errstate(over="ignore"):
            least, most = ((exact + sign * room).astype(kind).astype(np.float64) for sign in (-1, 1))
        found = theirs[name].astype(np.float64)
        if not ((least <= found) & (found <= most)).all():
            return False
    return True


def _chosen(claim: Claim, which: Which, prompt: SoftPrompt) -> SoftPrompt:
    """What the claim is about of a side's prompt. Where there is nothing to choose from, that is all of it."""
    if which != claim.origin:
        return prompt
    try:
        return claim.choice.of(prompt)
    except SoftbridgeError:
        return prompt


def _is_made_of(loaded: Loaded, digests: Mapping[str, str]) -> bool:
    """Whether a prompt was converted from files with these digests, and perhaps others that came later."""
    return bool(loaded.made_of) and loaded.made_of.items() <= digests.items()


def _reading(loaded: Loaded, path: str | Path) -> Mapping[str, Any]:
    """How to read the files at a path: as the conversion did that made the other prompt of them, if there was one."""
    if loaded.choice == ALL:
        return {}
    files = files_at(path)
    digests = {name: files.digest(name) for name in loaded.made_of if name in files}
    return loaded.choice.reading if _is_made_of(loaded, digests) else {}
