"""From files to a prompt: which format they are in, what they hold, and what their manifest adds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softbridge import untrusted
from softbridge.base.model import BaseModel
from softbridge.checkpoint import no_prompt
from softbridge.checkpoint.choice import DROPPED, of_task
from softbridge.checkpoint.manifest import MANIFEST, Loaded, same_attention, trained_with, with_manifest, with_scale
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError, UnknownFormatError
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.plugin.hookspecs import Format, Listing, Resumable
from softbridge.plugin.optional import able
from softbridge.plugin.registry import format_named, formats
from softbridge.progress import stage
from softbridge.prompt.soft_prompt import Origin, SoftPrompt


def matching(files: untrusted.Files) -> list[Format]:
    """The formats that take the files for their own, by content."""
    return [form for form in formats().values() if form.sniff(files)]


def recognise(files: untrusted.Files) -> Format:
    """The one format that the files are of, judged by their content.

    Raises:
        UnknownFormatError: no format recognises the files, or more than one does.
    """
    matches = matching(files)
    if len(matches) == 1:
        return matches[0]
    listing = ", ".join(files.names[:8]) + (", ..." if len(files.names) > 8 else "")
    if matches:
        raise UnknownFormatError(
            f"{files.path} ({listing}) is recognised by several formats: {', '.join(form.name for form in matches)}",
            "files of one format",
            "name the format: --from FORMAT (format=... in Python)",
        )
    known = no_prompt.recognised(files, formats())
    if known is not None:
        what, instead = known
        raise UnknownFormatError(f"{files.path} is no soft prompt, but {what}", "a soft prompt", instead)
    raise UnknownFormatError(
        f"{files.path} ({listing}) is in no known format",
        f"files of one of these formats: {', '.join(formats())}",
        "check the path; 'softbridge formats' lists what is installed",
    )


def read(
    path: str | Path,
    *,
    base: Any = None,
    format: str | None = None,
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
        CheckpointError: the files are malformed, incomplete or hostile, or the download failed.
        UnknownFormatError: no format recognises the files.
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
    with stage(f"reading {path}"):
        loaded = read_files(files, form, None if resolved is None else resolved.geometry, drop)
    return loaded if trained_on is None else replace(loaded, prompt=trained_with(loaded.prompt, resolved, trained_on))


def files_at(path: str | Path, revision: str | None = None, form: Format | None = None) -> untrusted.Files:
    """The files of a prompt: at the path, or in the hub's cache (see `load`).

    Raises:
        CheckpointError: the path holds no files, or the download failed.
    """
    return untrusted.Files(untrusted.located(path, revision, lambda folder: _files_of(folder, form)))


def read_files(files: untrusted.Files, form: Format, geometry: Geometry | None, drop: Collection[str] = ()) -> Loaded:
    """What these files hold in this format, with what their manifest adds.

    Args:
        drop: names in `softbridge.checkpoint.choice.DROPPED`: left out, also where it is broken.

    Raises:
        CheckpointError: the files, or the manifest beside them, are malformed.
    """
    with files.reading() as names:
        loaded, scale = _read_files(files, form, geometry, drop)
    # Of others nobody knows how large they are, or whose.
    digests = {name: files.digest(name) for name in sorted(names)}
    prompt = loaded.prompt
    origin = replace(prompt.origin if prompt.origin is not None else Origin(form.name), digests=digests)
    told = tuple(with_scale(part, scale) for part in prompt.parts)
    return replace(loaded, prompt=replace(prompt, parts=told, origin=origin))


def _read_files(
    files: untrusted.Files, form: Format, geometry: Geometry | None, drop: Collection[str]
) -> tuple[Loaded, Mapping[str, float]]:
    try:
        prompt = form.read(files, geometry)
    except CheckpointError:
        resumable = able(form, Resumable)
        if "training" not in drop or resumable is None:
            raise
        prompt = form.read(files.without(resumable.training_files), geometry)
    if geometry is not None:
        recorded = prompt.base.geometry
        if recorded is not None and not same_attention(recorded, geometry):
            raise BaseModelError(
                f"the file records another base model: {recorded}",
                f"the base model that was given: {geometry}",
                "check --base",
            )
        check_fits(prompt, geometry)
        prompt = replace(prompt, base=replace(prompt.base, geometry=geometry))
    loaded = Loaded(prompt, form, files.path, alone=prompt.positions)
    return with_manifest(loaded, files) if MANIFEST in files and "manifest" not in drop else (loaded, {})


def _files_of(folder: Path, form: Format | None) -> Sequence[str] | None:
    """The files that a format reads, if it says so; the format is known by descriptions alone if it is not named."""
    if form is None:
        matches = matching(untrusted.Files(folder))
        form = matches[0] if len(matches) == 1 else None
    listing = None if form is None else able(form, Listing)
    return None if listing is None else listing.files


def load(
    path: str | Path,
    *,
    base: Any = None,
    format: str | None = None,
    revision: str | None = None,
    task: int | None = None,
    trained_on: str | None = None,
) -> SoftPrompt:
    """The soft prompt in a file or directory, or on the hub; see `read` for the other arguments and errors.

    Args:
        task: which task of a multitask prompt, alone; None: as the file says, with the matrices of all tasks.

    Raises:
        SoftbridgeError: the prompt does not have this task.
    """
    prompt = read(path, base=base, format=format, revision=revision, trained_on=trained_on).prompt
    return prompt if task is None else of_task(prompt, task)
