"""Which checkpoints a folder holds: recognised by content, each with the place that its target gets.

A folder that is a checkpoint is one checkpoint, whatever lies in it. Where a folder is none, its sub-folders may be,
and each of its files. What is left is listed with the reason, so that nobody looks for it in vain.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from softbridge import untrusted
from softbridge.checkpoint.manifest import BESIDE
from softbridge.checkpoint.read import matching, recognise
from softbridge.checkpoint.write import FILE_SUFFIXES
from softbridge.collection.record import Reason, Verdict
from softbridge.errors import CheckpointError, OutputError, SoftbridgeError, UnknownFormatError, few
from softbridge.plugin.hookspecs import Format
from softbridge.plugin.registry import format_named

#: What `Files.kind` calls a file that holds no tensors.
_TEXTS = ("json", "unknown")


@dataclass(frozen=True)
class Found:
    """Something in the folder.

    Attributes:
        path: of it, from the folder, with ``/``.
        target: where its target goes, from the output folder.
        verdict: "pending" if it is a checkpoint; else what it is.
        reason: why it is not converted, unless it is pending.
    """

    path: str
    target: str = ""
    verdict: Verdict = "pending"
    reason: Reason | None = None


def find(source: Path, output: Path, format: str | None = None) -> list[Found]:
    """All checkpoints in a folder and below, and what else holds tensors, sorted by path.

    Links to folders and hidden folders are not entered, nor is the output folder.

    Args:
        source: the folder.
        output: where the targets go.
        format: the name of the sources' format. If None, each is recognised by content.

    Raises:
        CheckpointError: the source is not a folder, is a checkpoint itself, or holds none.
        OutputError: the output folder is the source, or holds it.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"'{source}', which is not a folder of this machine",
            "a folder of checkpoints",
            "check the spelling; without --recursive (softbridge.convert) it may be a file, or an id on the hub",
        )
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(output))
    if here.is_relative_to(there):
        raise OutputError(
            f"the output folder '{output}' is or holds the source '{source}'",
            "a folder beside the source, or in it",
            "choose another",
        )
    found = list(_Walk(source, there, None if format is None else format_named(format)).below(here, ""))
    checkpoints = [one for one in found if one.verdict == "pending"]
    if any(not one.path for one in checkpoints):
        raise CheckpointError(
            f"'{source}', which is a checkpoint itself",
            "a folder of checkpoints",
            "leave --recursive out, or give the folder that it lies in",
        )
    if not checkpoints:
        seen = [f"{one.path or '.'} ({one.reason.found})" for one in found if one.reason is not None]
        raise CheckpointError(
            f"no checkpoint in '{source}' or below; what is there: {few(seen)}",
            "at least one soft prompt",
            "check the path; 'softbridge formats' lists what is recognised, and --from names a format",
        )
    named = [replace(one, path=one.path or ".") for one in found]
    return sorted(_with_targets(named), key=lambda one: one.path)


@dataclass(frozen=True)
class _Walk:
    source: Path
    output: Path
    format: Format | None

    def below(self, folder: Path, path: str) -> Iterator[Found]:
        """What a folder holds, itself included: `folder` is its real path, and `path` that from the source."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = Reason("CheckpointError", f"a folder that cannot be read: {error.strerror}", "a readable folder")
            yield Found(path, verdict="refused", reason=replace(reason, remedy="check its permissions"))
            return
        folders, files, inner = [], [], list[Found]()
        for entry in entries:
            place = f"{path}/{entry.name}".lstrip("/")
            if left := self._left(entry):
                inner.append(Found(place, verdict="left out", reason=left))
            elif _is_folder(entry, follow=False):
                folders.append(place)
            elif not entry.name.startswith(".") and _is_file(entry):
                files.append(place)
        whole = bool(files) and self._is_checkpoint(self._files(path, below=False))
        for place in folders:
            inner += self.below(folder / place.rpartition("/")[2], place)
        checkpoints = [one for one in inner if one.verdict == "pending"]
        if checkpoints and sum(place.rpartition("/")[2] not in BESIDE for place in files) == 1:
            whole = False  # one file beside checkpoints is one among them
        # By files one folder further down, which are nothing by themselves.
        whole = whole or (bool(folders) and not checkpoints and self._is_checkpoint(self._files(path)))
        if whole:
            yield Found(path)
            for one in checkpoints:
                yield replace(one, verdict="left out", reason=_within(path))
            return
        yield from inner
        yield from self._among(path, files)

    def _left(self, entry: os.DirEntry[str]) -> Reason | None:
        """Why a folder is not entered."""
        if not _is_folder(entry, follow=True):
            return None
        if entry.is_symlink():
            return Reason("link", "a link to a folder", "a folder", "give the folder that it leads to by itself")
        if Path(entry.path) == self.output:
            return Reason("output", "the output folder", "a source", "nothing")
        if entry.name.startswith("."):
            return Reason("hidden", "a hidden folder", "one that is not", "give it by itself, if it holds checkpoints")
        return None

    def _among(self, path: str, files: Sequence[str]) -> Iterator[Found]:
        """Those of a folder's files that are a checkpoint each, and the others that hold tensors."""
        looked = {place: self._files(place) for place in files}
        holding = [place for place, one in looked.items() if one.kind(one.names[0]) not in _TEXTS]
        # A format that was named may be one that nothing in a file tells from others.
        single = [place for place in holding if self.format is not None or self._is_checkpoint(looked[place])]
        yield from map(Found, single)
        if single:
            others = [(place, looked[place]) for place in holding if place not in single]
        else:
            others = [(path, self._files(path, below=False))] if holding else []
        for place, one in others:
            try:
                recognise(one)
            except UnknownFormatError as error:
                yield Found(place, verdict="not a prompt", reason=Reason.of(error))

    def _files(self, path: str, *, below: bool = True) -> untrusted.Files:
        return untrusted.Files(self.source / path, below=below)

    def _is_checkpoint(self, files: untrusted.Files) -> bool:
        """Whether a format takes these files for its own. If one cannot say, reading them says why."""
        try:
            return bool(matching(files)) if self.format is None else self.format.sniff(files)
        except SoftbridgeError:
            return True


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:  # a loop of links
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _within(path: str) -> Reason:
    return Reason(
        "nested",
        f"a checkpoint within '{path or '.'}', which is converted as a whole",
        "a checkpoint in a folder of its own",
        "convert it by itself",
    )


def _with_targets(found: Sequence[Found]) -> Iterator[Found]:
    """Each with its target. Those whose targets would be the same, or one in the other, are refused by name."""
    wanted: dict[str, list[str]] = defaultdict(list)
    for one in found:
        if one.verdict == "pending":
            wanted[_target_of(one.path)].append(one.path)
    meeting: dict[str, set[str]] = defaultdict(set)
    for target, paths in wanted.items():
        above = [path for parent in PurePosixPath(target).parents for path in wanted.get(str(parent), ())]
        for one_path in paths:
            meeting[one_path].update({*paths, *above} - {one_path})
            for path in above:
                meeting[path].add(one_path)
    for one in found:
        if one.verdict != "pending":
            yield one
        elif others := sorted(meeting[one.path]):
            reason = Reason(
                "OutputError",
                f"its target would be, hold or lie in that of {few(others)}",
                "a target of its own for each checkpoint",
                "rename one of them, or convert it by itself",
            )
            yield replace(one, verdict="refused", reason=reason)
        else:
            yield replace(one, target=_target_of(one.path))


def _target_of(path: str) -> str:
    """The folder for what is written: named like the source, without the suffix of a file of tensors."""
    place = PurePosixPath(path)
    return str(place.with_suffix("") if place.suffix in FILE_SUFFIXES else place)
