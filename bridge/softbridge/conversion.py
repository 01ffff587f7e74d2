"""Read, lower, write: the main job, and the manifest that travels beside written files.

What a file form has no place for (where real tokens stand, which conditions were accepted) goes into the manifest
``softbridge.json`` beside the files. Toolkits ignore it; softbridge reads it back and its engines act on it. It holds a
digest of every file, so that a manifest left beside other files is noticed and not believed.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from softbridge import parts, untrusted
from softbridge.base import BaseModel
from softbridge.choice import ALL, DROPPED, Choice, of_task
from softbridge.errors import BaseModelError, CheckpointError, OutputError, SoftbridgeError, UnknownFormatError
from softbridge.geometry import Geometry
from softbridge.hookspecs import Format
from softbridge.lower import Lowering, Step, Target, check_fits, copied, lower
from softbridge.passes import DTYPES, Exactness, in_scale
from softbridge.prompt import BaseId, InputPrompt, Origin, Part, Positions, SoftPrompt, same_array
from softbridge.registry import format_named, formats
from softbridge.untested import warn_of_untested

if TYPE_CHECKING:
    from softbridge.verification import Certificate

MANIFEST = "softbridge.json"
MANIFEST_VERSION = 1
CERTIFICATE = "certificate.json"

#: Suffixes that name a file rather than a directory, whatever the format.
FILE_SUFFIXES = frozenset((".npy", ".safetensors", ".bin", ".pt", ".pth", ".ckpt"))


@dataclass(frozen=True)
class Loaded:
    """A prompt with the format and the files that it was read from.

    Attributes:
        steps: that led to it, as its manifest says.
        dtype: what its numbers were to be stored in on request, as its manifest says.
        choice: what of its source was converted, as its manifest says.
        made_of: digests of the files that it was converted from, as its manifest says.
    """

    prompt: SoftPrompt
    format: Format
    path: Path
    steps: tuple[Step, ...] = ()
    dtype: str | None = None
    choice: Choice = ALL
    made_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def digests(self) -> Mapping[str, str]:
        """Of its own files: name -> sha256."""
        return {} if self.prompt.origin is None else self.prompt.origin.digests

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions under which it was written."""
        return _named(self.steps, "conditional")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        source: what was read.
        target: name of the format that was written.
        path: the directory or file that was written.
        lowering: the prompt as it was written, and the steps that led to it.
        advice: what whoever runs the files in the toolkit itself must do.
        certificate: what verification found, if it was asked for.
    """

    source: Loaded
    target: str
    path: Path
    lowering: Lowering
    advice: tuple[str, ...] = ()
    certificate: Certificate | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.lowering.steps


def recognise(files: untrusted.Files) -> Format:
    """The one format that the files are of, judged by their content.

    Raises:
        UnknownFormatError: none recognises them, or more than one does.
    """
    matches = [form for form in formats().values() if form.sniff(files)]
    if len(matches) == 1:
        return matches[0]
    listing = ", ".join(files.names[:8]) + (", ..." if len(files.names) > 8 else "")
    if matches:
        raise UnknownFormatError(
            f"{files.path} ({listing}) is recognised by several formats: {', '.join(form.name for form in matches)}",
            "files of one format",
            "name the format: --from FORMAT (format=... in Python)",
        )
    raise UnknownFormatError(
        f"{files.path} ({listing or 'empty'}) is in no known format",
        f"files of one of these formats: {', '.join(formats())}",
        "check the path; 'softbridge formats' lists what is installed",
    )


def read(
    path: str | Path,
    base: Any = None,
    format: str | None = None,
    *,
    revision: str | None = None,
    drop: Collection[str] = (),
    trained_on: str | None = None,
) -> Loaded:
    """Read a soft prompt of any known format, recognised by content unless named.

    Args:
        path: a file or a directory; or its id on the hub, ``owner/name``, with ``/name`` of an adapter's sub-folder
            where there are several, and perhaps ``@revision``. Only the prompt's files are fetched.
        base: whatever `BaseModel.resolve` takes. Needed where the files alone do not say for which stack or which
            attention their numbers are; if given, the prompt is checked against it.
        format: the name of the format.
        revision: of an id on the hub: a branch, a tag or a commit.
        drop: what is not to be read, though it is there (see `DROPPED`): softbridge's own files beside a toolkit's,
            which no longer belong to them when the toolkit has written its own anew.
        trained_on: the release of transformers (as in ``4.57``) on which an input prompt was trained, if the files do
            not say by what the model multiplied its vectors, and releases differ in that (Gemma). It needs the base.

    Raises:
        CheckpointError: the files are malformed, incomplete or hostile, or not to be had.
        UnknownFormatError: no format recognises them.
        BaseModelError: the base model is needed and missing, or the prompt does not fit it.
        SoftbridgeError: `trained_on` is no release, or the files say something else.
    """
    named = None if format is None else format_named(format)
    files = files_at(path, revision, named)
    form = named or recognise(files)
    unknown = sorted(set(drop) - DROPPED.keys())
    if unknown:
        raise SoftbridgeError(f"nothing that can be dropped: {', '.join(unknown)}", ", ".join(DROPPED), "correct it")
    resolved = None if base is None else BaseModel.resolve(base)
    loaded = _read(files, form, None if resolved is None else resolved.geometry, drop)
    return loaded if trained_on is None else replace(loaded, prompt=_trained_on(loaded.prompt, resolved, trained_on))


def _trained_on(prompt: SoftPrompt, base: BaseModel | None, release: str) -> SoftPrompt:
    """The prompt with what a release of transformers multiplies its vectors by.

    Raises:
        SoftbridgeError: no base model is given, the release is none, or the prompt's files say something else.
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
    return replace(prompt, parts=tuple(_told(part, stated) for part in prompt.parts))


def files_at(path: str | Path, revision: str | None = None, form: Format | None = None) -> untrusted.Files:
    """The files of a prompt: at the path, or in the hub's cache (see `load`).

    Raises:
        CheckpointError: there are none, or they are not to be had.
    """
    return untrusted.Files(untrusted.located(path, revision, lambda folder: _files_of(folder, form)))


def _read(files: untrusted.Files, form: Format, geometry: Geometry | None, drop: Collection[str] = ()) -> Loaded:
    try:
        prompt = form.read(files, geometry)
    except CheckpointError:
        kept = getattr(form, "training_files", ())
        if "training" not in drop or not kept:
            raise
        prompt = form.read(files.without(kept), geometry)
    if geometry is not None:
        recorded = prompt.base.geometry
        if recorded is not None and not _same_attention(recorded, geometry):
            raise BaseModelError(
                f"the file records another base model: {recorded}",
                f"the base model that was given: {geometry}",
                "check --base",
            )
        check_fits(prompt, geometry)
        prompt = replace(prompt, base=replace(prompt.base, geometry=geometry))
    scale: Mapping[str, float] = {}
    loaded = Loaded(prompt, form, files.path)
    if MANIFEST in files and "manifest" not in drop:
        loaded, scale = _with_manifest(loaded, files)
        prompt = loaded.prompt
    digests = {name: files.digest(name) for name in files.names}
    origin = replace(prompt.origin if prompt.origin is not None else Origin(form.name), digests=digests)
    told = tuple(_told(part, scale) for part in prompt.parts)
    return replace(loaded, prompt=replace(prompt, parts=told, origin=origin))


def _told(part: Part, scale: Mapping[str, float]) -> Part:
    """A part as it was read, with what multiplies its vectors, or that nothing says so."""
    if not isinstance(part, InputPrompt) or part.entry != "before" or part.told_scale is not None:
        return part
    return replace(part, scale=scale.get(part.stack, "untold"))


def _files_of(folder: Path, form: Format | None) -> Sequence[str] | None:
    """The files that a format reads, if it says so; the format is known by descriptions alone if it is not named."""
    if form is None:
        files = untrusted.Files(folder)
        matches = [known for known in formats().values() if known.sniff(files)]
        form = matches[0] if len(matches) == 1 else None
    return getattr(form, "files", None)


def load(
    path: str | Path,
    base: Any = None,
    format: str | None = None,
    *,
    revision: str | None = None,
    task: int | None = None,
    trained_on: str | None = None,
) -> SoftPrompt:
    """The soft prompt in a file or directory, or on the hub; see `read` for the other arguments and errors.

    Args:
        task: which task of a multitask prompt, alone; None: as the file says, with the matrices of all tasks.

    Raises:
        SoftbridgeError: it has no such task.
    """
    prompt = read(path, base, format, revision=revision, trained_on=trained_on).prompt
    return prompt if task is None else of_task(prompt, task)


def save(
    prompt: SoftPrompt,
    path: str | Path,
    format: str,
    base: Any = None,
    *,
    accept: Collection[str] = (),
    encoding: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Lowering:
    """Lower a prompt to a format and write it: a directory, or one file if the path has that file's suffix.

    The output appears whole or not at all; it is read back and compared before it does.

    Args:
        accept: names of the conditions that the caller accepts (see `LoweringError`).
        encoding: one of the format's `encodings`, or None for the toolkit's own default.
        dtype: name of the dtype to store the numbers in, None: as they are. What that rounds is in the lowering.

    Raises:
        LoweringError: the format cannot express the prompt as the same function; nothing is written.
        OutputError: the path is taken, or cannot be written.
    """
    resolved = None if base is None else BaseModel.resolve(base)
    form = format_named(format)
    lowering, content = _prepare(prompt, form, Target(form.name, form.capabilities, resolved, dtype), accept, encoding)
    _write(Path(path), content, lowering, form, resolved, overwrite, dtype=dtype)
    return lowering


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    base: Any = None,
    *,
    format: str | None = None,
    accept: Collection[str] = (),
    encoding: str | None = None,
    dtype: str | None = None,
    task: int | None = None,
    part: str | None = None,
    drop: Collection[str] = (),
    trained_on: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
) -> Report:
    """Convert a checkpoint to another format, and prove on request that it computes the same function.

    Args:
        source: what to read: a file, a directory or an id on the hub; see `read`.
        target: where to write: a directory, or a file for formats of one file.
        to: name of the format to write.
        base: the base model; see `read`. Needed for `verify`.
        format: name of the source's format, recognised by content if None.
        accept: names of accepted conditions.
        encoding: one of the target format's `encodings`, or None for the toolkit's own default.
        dtype: name of the dtype to store the numbers in, None: as they are. The report says what that rounds.
        task: which task of a multitask prompt to convert, alone; the matrices of all tasks stay behind.
        part: which part of a prompt to convert, by its name (`softbridge.parts.name_of`); the others stay behind.
        drop: what of the source is left out; see `read`.
        trained_on: the release of transformers that trained the source, where that matters; see `read`.
        verify: run both through their own toolkits where installed, write the certificate beside the files, and write
            nothing if they differ.
        overwrite: replace an existing target.

    Raises:
        SoftbridgeError: see `read`, `save` and `softbridge.verify`. Nothing is written.
    """
    warn_of_untested()
    resolved = None if base is None else BaseModel.resolve(base)
    if untrusted.hub_id(source) is None:
        _apart(Path(source), Path(target))
    _check_target(Path(target), overwrite)  # before the work, and again when it is written
    loaded = read(source, resolved, format, drop=drop, trained_on=trained_on)
    choice = Choice(format, tuple(drop), trained_on, task, part)
    chosen = choice.of(loaded.prompt)
    form = format_named(to)
    lowering, content = _prepare(chosen, form, Target(form.name, form.capabilities, resolved, dtype), accept, encoding)
    lowering = replace(lowering, steps=(*_notes(loaded.prompt), *_said(choice), *lowering.steps))
    single = _is_file(Path(target), content)
    certificate = None
    if verify:
        if resolved is None:
            raise BaseModelError(
                "verification was asked for without a base model",
                "the base model's configuration, directory or hub id",
                "give it with --base (base=... in Python)",
            )
        made = Loaded(lowering.prompt, form, Path(target), lowering.steps, dtype, choice, loaded.digests)
        naive = copied(chosen, Target(form.name, form.capabilities, resolved))
        certificate = _certify(loaded, made, content, resolved, naive)
        if not single:
            content = {**content, CERTIFICATE: untrusted.json_bytes(certificate.to_json())}
    _write(Path(target), content, lowering, form, resolved, overwrite, loaded, dtype, choice)
    return Report(loaded, to, Path(target), lowering, _advice(lowering, form, resolved), certificate)


def _said(choice: Choice) -> list[Step]:
    chosen = {"task": choice.task, "part": choice.part}
    return [
        *(
            Step(name, "exact", f"{name} {value}, as asked; others are left out")
            for name, value in chosen.items()
            if value is not None
        ),
        *(Step("drop", "exact", f"left out, as asked: {DROPPED[name]}") for name in choice.drop),
    ]


def _certify(
    source: Loaded, made: Loaded, content: Mapping[str, bytes], base: BaseModel, naive: SoftPrompt | None
) -> Certificate:
    """Compare a source with what is about to be written.

    Args:
        source: as it was read.
        made: what was made of it, as it will be read.
        content: its files.
        base: both are run on it.
        naive: the source's numbers, copied.

    Raises:
        OutputError: they are not the same.
    """
    from softbridge.verification import verify_prompts
    from softbridge.verification.sides import Pair, claim_of, subjects

    origin = Origin(made.format.name, digests={name: _sha256(data) for name, data in content.items()})
    with tempfile.TemporaryDirectory() as scratch:
        staged = Path(scratch) / "staged"
        untrusted.write(staged, content)
        sides: Pair = {
            "source": source,
            "target": replace(made, prompt=replace(made.prompt, origin=origin), path=staged),
        }
        claim, first, second = subjects(claim_of(sides), sides, base)
        certificate = verify_prompts(
            first,
            replace(second, path=str(made.path)),
            base,
            naive=None if naive is None or _same_function(naive, made.prompt) else naive,
            claim=claim,
        )
    if not certificate.same:
        raise OutputError(
            f"verification found the converted prompt {certificate.verdict}: {certificate.summary()}",
            "the same outputs from source and target",
            "report this as a defect of softbridge, with the two files; nothing was written",
        )
    return certificate


def _same_function(naive: SoftPrompt, right: SoftPrompt) -> bool:
    """Whether copying the numbers would have done."""
    ours, theirs = (parts.named_arrays(replace(prompt, head={}, training=None)) for prompt in (naive, right))
    same = ours.keys() == theirs.keys() and all(same_array(ours[n].astype(theirs[n].dtype), theirs[n]) for n in ours)
    return same and naive.positions == right.positions


def _apart(source: Path, target: Path) -> None:
    """Refuse a target that would replace its own source, or stand inside it."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{target} is, holds or lies in the source {source}", "a target beside it", "choose another")


def _notes(prompt: SoftPrompt) -> list[Step]:
    """What the reader of the source had to say: parts of the files that no model ever sees, or that were not read."""
    notes = () if prompt.origin is None else prompt.origin.notes or ()
    return [Step("read", "exact", note) for note in notes]


def _advice(lowering: Lowering, form: Format, base: BaseModel | None) -> tuple[str, ...]:
    told = base is not None and "positions" in _named(lowering.steps, "conditional")
    first = base.positions.first if base is not None and told else 0
    return tuple(form.advice(lowering.prompt, lowering.prompt.base.geometry, first))


def _named(steps: Sequence[Step], exactness: Exactness) -> tuple[str, ...]:
    return tuple(step.name for step in steps if step.exactness == exactness)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _same_attention(a: Geometry, b: Geometry) -> bool:
    """Whether a prompt for one fits the other; a vocabulary may have been resized."""
    return replace(a, vocabulary=0) == replace(b, vocabulary=0)


def _prepare(
    prompt: SoftPrompt, form: Format, target: Target, accept: Collection[str], encoding: str | None
) -> tuple[Lowering, Mapping[str, bytes]]:
    if encoding is not None and encoding not in form.encodings:
        raise OutputError(
            f"'{form.name}' does not store tensors as '{encoding}'",
            f"one of {', '.join(form.encodings)}",
            "leave --encoding out for the toolkit's own default",
        )
    lowering = lower(prompt, target, accept, form.obstacles)
    if target.base is not None:
        lowering = replace(lowering, prompt=replace(lowering.prompt, base=_known(lowering.prompt, target.base)))
    return lowering, form.write(lowering.prompt, lowering.prompt.base.geometry, encoding)


def _known(prompt: SoftPrompt, base: BaseModel) -> BaseId:
    """What the file says of its base model, completed by what the caller gave.

    The path of a mere configuration is no name: nobody could load a model from it.
    """
    name = base.name if base.name is not None and not base.name.endswith(".json") else None
    task = base.with_head(prompt.head).task if prompt.head else None
    return BaseId(prompt.base.name or name, base.geometry, task)


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that is there already; when told to overwrite, one that is no prompt: a model, a folder."""
    if not overwrite:
        untrusted.check_vacant(target)
        return
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    files = untrusted.Files(target)
    written = MANIFEST in files and files.names == tuple(name for name in files.names if "/" not in name)
    if not written and not (files.is_file and any(form.sniff(files) for form in formats().values())):
        raise OutputError(
            f"{target} was not written by softbridge, and replacing it would delete {', '.join(files.names[:6])}",
            f"a folder with {MANIFEST} and no sub-folders, or one file that is a prompt",
            "choose another target, or remove it yourself",
        )


def _is_file(target: Path, content: Mapping[str, bytes]) -> bool:
    """Whether the target names the format's one file rather than a directory.

    Raises:
        OutputError: it names a file of another kind.
    """
    suffixes = sorted({Path(name).suffix for name in content})
    if target.suffix not in FILE_SUFFIXES:
        return False
    if suffixes != [target.suffix]:
        raise OutputError(
            f"the target {target} names a file, and the format writes {', '.join(sorted(content))}",
            "a directory" + (f", or a file with the suffix {suffixes[0]}" if len(content) == 1 else ""),
            f"write to {target.with_suffix('')}",
        )
    return True


def _write(
    target: Path,
    content: Mapping[str, bytes],
    lowering: Lowering,
    form: Format,
    base: BaseModel | None,
    overwrite: bool,
    source: Loaded | None = None,
    dtype: str | None = None,
    choice: Choice = ALL,
) -> None:
    def check(written: Path) -> None:
        geometry = lowering.prompt.base.geometry
        again = _read(untrusted.Files(written), form, geometry).prompt
        ours, theirs = parts.named_arrays(lowering.prompt), parts.named_arrays(again)
        wrong = [name for name, array in ours.items() if name not in theirs or not same_array(array, theirs[name])]
        # What the files alone say, without the manifest, is what the toolkit does with them.
        said = again if "positions" in conditions else form.read(untrusted.Files(written), geometry)
        wrong += ["positions"] * (not again.positions == said.positions == lowering.prompt.positions)
        wrong += ["places"] * (parts.places(again) != parts.places(lowering.prompt))
        if wrong:
            raise OutputError(
                f"what was written for '{form.name}' reads back differently: {', '.join(wrong)}",
                "the tensors that were written",
                "report this as a defect of softbridge; nothing was written",
            )

    conditions = _named(lowering.steps, "conditional")
    _check_target(target, overwrite)
    if _is_file(target, content):
        if conditions:
            raise OutputError(
                f"{target} is one file, and the conditions ({', '.join(conditions)}) must travel beside it",
                "a directory as the target",
                f"write to {target.with_suffix('')}",
            )
        untrusted.write_file(target, next(iter(content.values())), overwrite=overwrite, check=check)
        return
    manifest: dict[str, Any] = {
        "softbridge": MANIFEST_VERSION,
        "format": form.name,
        "positions": lowering.prompt.positions.to_json(),
        "conditions": list(conditions),
        "advice": list(_advice(lowering, form, base)),
        "steps": [asdict(step) for step in lowering.steps],
        "dtype": dtype,
        "files": {name: _sha256(data) for name, data in content.items()},
    }
    scale = {part.stack: part.told_scale for part in lowering.prompt.inputs if part.told_scale is not None}
    if scale:
        manifest["scale"] = scale
    if source is not None:
        manifest["source"] = {"format": source.format.name, "digests": dict(source.digests)}
    if choice != ALL:
        manifest["choice"] = asdict(choice)
    untrusted.write(target, {**content, MANIFEST: untrusted.json_bytes(manifest)}, overwrite=overwrite, check=check)


def _with_manifest(loaded: Loaded, files: untrusted.Files) -> tuple[Loaded, Mapping[str, float]]:
    """What was read, with what the manifest tells, and the scales in it, after checking that it belongs to these files.

    Raises:
        CheckpointError: it does not, or is damaged.
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
        prompt = replace(prompt, positions=positions)  # checks that they speak of the prompt's own stacks
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
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"{MANIFEST} has the dtype {dtype!r:.40}", f"null or one of {', '.join(DTYPES)}", remedy)
    scale = manifest.get("scale", {})
    try:
        for stack, number in scale.items():
            replace(next(part for part in prompt.inputs if part.stack == stack), scale=float(number))
    except (AttributeError, StopIteration, TypeError, ValueError) as error:
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
    told = replace(loaded, prompt=prompt, dtype=dtype, choice=choice, made_of=made_of)
    return replace(told, steps=tuple(Step(**step) for step in steps)), scale
