"""From a prompt to files of a format: lowered, written, read back, and only then put in place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from softbridge import parts, untrusted
from softbridge.arrays import same_array, same_arrays
from softbridge.base.model import BaseModel
from softbridge.checkpoint.card import model_card
from softbridge.checkpoint.choice import ALL, Choice
from softbridge.checkpoint.manifest import CARD, MANIFEST, MANIFEST_VERSION, Loaded, names_of, signed
from softbridge.checkpoint.read import matching, read_files
from softbridge.errors import OutputError
from softbridge.lowering.planner import Lowering, lower
from softbridge.lowering.steps import Target
from softbridge.plugin.hookspecs import Format
from softbridge.plugin.registry import format_named, formats
from softbridge.prompt.soft_prompt import BaseId, SoftPrompt
from softbridge.untrusted import Content, Written

#: Suffixes that name a file rather than a directory, whatever the format.
FILE_SUFFIXES = frozenset((".npy", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".zip", ".prompt"))


def save(
    prompt: SoftPrompt,
    path: str | Path,
    *,
    format: str,
    base: Any = None,
    accept: Collection[str] = (),
    encoding: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Lowering:
    """Lower a prompt to a format and write it: a directory, or one file if the path has that file's suffix.

    The output appears whole or not at all; it is read back and compared before it does. In a directory a model card
    and a manifest are beside it.

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
    lowering, content = prepare(prompt, form, Target(form.name, form.capabilities, resolved, dtype), accept, encoding)
    card = None
    if not is_file_of(Path(path), content):
        advice = advice_for(lowering, form, resolved)
        card = model_card(
            lowering.prompt, form, steps=lowering.steps, advice=advice, encoding=encoding, origin=prompt.origin
        )
    write_files(Path(path), content, lowering, form, resolved, overwrite, dtype=dtype, card=card)
    return lowering


def advice_for(lowering: Lowering, form: Format, base: BaseModel | None) -> tuple[str, ...]:
    """What a caller of the toolkit has to do with files that hold this prompt, a sentence each."""
    told = base is not None and "positions" in names_of(lowering.steps, "conditional")
    first = base.positions.first if base is not None and told else 0
    return tuple(form.advice(lowering.prompt, lowering.prompt.base.geometry, first))


def check_encoding(form: Format, encoding: str | None) -> None:
    """Refuse a format that is not written, or not with tensors stored so."""
    if not form.encodings:
        written = ", ".join(name for name, other in formats().items() if other.encodings)
        raise OutputError(
            f"'{form.name}' is read, and not written: {form.summary}",
            f"one of {written}",
            "choose another target format",
        )
    if encoding is not None and encoding not in form.encodings:
        raise OutputError(
            f"'{form.name}' does not store tensors as '{encoding}'",
            f"one of {', '.join(form.encodings)}",
            "leave --encoding out for the toolkit's own default",
        )


def prepare(
    prompt: SoftPrompt, form: Format, target: Target, accept: Collection[str], encoding: str | None
) -> tuple[Lowering, Mapping[str, Content]]:
    """The prompt as the format can hold it, and its files.

    Raises:
        OutputError: the format does not have this encoding.
        LoweringError: the format cannot hold the prompt.
    """
    check_encoding(form, encoding)
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


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that is there already; with `overwrite`, refuse what is not a prompt: a model, a folder."""
    untrusted.check_name(target)
    if not overwrite:
        untrusted.check_vacant(target)
        return
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    files = untrusted.Files(target)
    written = MANIFEST in files and files.names == tuple(name for name in files.names if "/" not in name)
    if not written and not (files.is_file and matching(files)):
        raise OutputError(
            f"{target} was not written by softbridge, and replacing it would delete {', '.join(files.names[:6])}",
            f"a folder with {MANIFEST} and no sub-folders, or one file that is a prompt",
            "choose another target, or remove it yourself",
        )


def is_file_of(target: Path, content: Mapping[str, Content]) -> bool:
    """Whether the target names the format's one file rather than a directory.

    Raises:
        OutputError: the target has the suffix of a file that this format does not write.
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


def _same_numbers(a: SoftPrompt, b: SoftPrompt) -> bool:
    """Whether two prompts have the same arrays, in the same places: found in one pass where they lie alike."""
    return a.parts == b.parts and same_arrays(a.head, b.head) and a.training == b.training


def _other_numbers(found: SoftPrompt, wanted: SoftPrompt) -> list[str]:
    """Names of the wanted arrays that were not found so."""
    there = parts.named_arrays(found)
    ours = parts.named_arrays(wanted)
    return [name for name, array in ours.items() if name not in there or not same_array(array, there[name])]


def write_files(
    target: Path,
    content: Mapping[str, Content],
    lowering: Lowering,
    form: Format,
    base: BaseModel | None,
    overwrite: bool,
    source: Loaded | None = None,
    dtype: str | None = None,
    choice: Choice = ALL,
    card: bytes | None = None,
) -> Mapping[str, Written]:
    """Put the files in place with their manifest and their card, once they were read back and hold what they should.

    Returns: what was written.
    """

    def check(files: untrusted.Files) -> None:
        loaded = read_files(files, form, lowering.prompt.base.geometry)
        again = loaded.prompt
        wrong = [] if _same_numbers(again, lowering.prompt) else _other_numbers(again, lowering.prompt)
        # What the files alone say, without the manifest, is what the toolkit does with them.
        said = again.positions if "positions" in conditions else loaded.alone
        wrong += ["positions"] * (not again.positions == said == lowering.prompt.positions)
        wrong += ["places"] * (parts.places(again) != parts.places(lowering.prompt))
        if wrong:
            raise OutputError(
                f"what was written for '{form.name}' reads back differently: {', '.join(wrong)}",
                "the tensors that were to be written",
                "report this as a defect of softbridge; nothing was written",
            )

    conditions = names_of(lowering.steps, "conditional")
    check_target(target, overwrite)
    if is_file_of(target, content):
        if conditions:
            raise OutputError(
                f"{target} is one file, and the conditions ({', '.join(conditions)}) must travel beside it",
                "a directory as the target",
                f"write to {target.with_suffix('')}",
            )
        name, one = next(iter(content.items()))
        return {name: untrusted.write_file(target, one, overwrite=overwrite, check=check)}
    manifest: dict[str, Any] = {
        "softbridge": MANIFEST_VERSION,
        "format": form.name,
        "positions": lowering.prompt.positions.to_json(),
        "conditions": list(conditions),
        "advice": list(advice_for(lowering, form, base)),
        "steps": [asdict(step) for step in lowering.steps],
        "dtype": dtype,
    }
    scale = {part.stack: part.told_scale for part in lowering.prompt.inputs if part.told_scale is not None}
    if scale:
        manifest["scale"] = scale
    if source is not None:
        manifest["source"] = {"format": source.format.name, "digests": dict(source.digests)}
    if choice != ALL:
        manifest["choice"] = asdict(choice)

    def last(written: Mapping[str, Written]) -> bytes:
        digests = {name: written[name].sha256 for name in content}
        return untrusted.json_bytes(signed({**manifest, "files": digests}))

    beside = {} if card is None else {CARD: card}
    return untrusted.write(target, {**content, **beside, MANIFEST: last}, overwrite=overwrite, check=check)
