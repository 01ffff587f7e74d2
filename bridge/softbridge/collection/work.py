"""One checkpoint of a collection: converted, taken over from an earlier run, or not, with the reason.

A `Worker` lives as long as its process, so that what all checkpoints have in common is done once: imports, the base
model's configuration, what is measured on it, and its weights, where a conversion asks for them.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softbridge import conversion, untrusted
from softbridge.base.model import BaseModel
from softbridge.checkpoint.manifest import CARD, CERTIFICATE, MANIFEST, Loaded
from softbridge.checkpoint.read import read
from softbridge.collection.record import Reason, Record
from softbridge.errors import CheckpointError, DifferentError, NotAPromptError, OutputError, SoftbridgeError
from softbridge_compat import versions


@dataclass(frozen=True)
class Task:
    """A checkpoint to convert.

    Attributes:
        path: from the source folder; the record is of that name.
        source: where it is.
        target: where its target goes.
        place: the target from the output folder.
        earlier: what earlier runs say of it.
        begun: whether an earlier run with the same options began to convert it, and was killed before it said how that
            ended. The place of the target was vacant then.
    """

    path: str
    source: Path
    target: Path
    place: str
    earlier: Sequence[Record] = ()
    begun: bool = False


@dataclass(frozen=True)
class Result:
    """What a worker made of a task; `taken_over`: an earlier run did the work."""

    record: Record
    taken_over: bool = False


class Worker:
    """Converts one checkpoint after another.

    Args:
        base: as of `softbridge.convert`.
        asked: its other arguments.
        options: what of them the records have, by which an earlier run is compared.

    Raises:
        SoftbridgeError: the base model cannot be read.
    """

    def __init__(self, base: Any, asked: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._base = None if base is None else BaseModel.resolve(base).keeping()
        self._asked, self._options = asked, options
        self._version = versions()["softbridge"]

    def __call__(self, task: Task) -> Result:
        """Convert it. Whatever goes wrong is in the record."""
        try:
            earlier = self._earlier(task)
            return Result(self._convert(task)) if earlier is None else Result(earlier, taken_over=True)
        except NotAPromptError as error:
            return Result(self._record(task, "not a prompt", reason=Reason.of(error)))
        except DifferentError as error:
            return Result(self._record(task, "differs", reason=Reason.of(error)))
        except SoftbridgeError as error:
            return Result(self._record(task, "refused", reason=Reason.of(error)))
        except Exception as error:
            reason = Reason(
                type(error).__name__, traceback.format_exc(), "a refusal", "report this as a defect of softbridge"
            )
            return Result(self._record(task, "defect", reason=reason))

    def _record(self, task: Task, verdict: Any, **told: Any) -> Record:
        return Record(task.path, verdict, options=self._options, version=self._version, **told)

    def _convert(self, task: Task) -> Record:
        report = conversion.convert(task.source, task.target, base=self._base, **self._asked)
        if self._asked.get("dry_run"):
            steps = [vars(step) for step in report.steps]
            return self._record(task, "planned", source=_of(report.source), steps=steps)
        return self._done(task, report.source)

    def _done(self, task: Task, source: Loaded) -> Record:
        """The record of a whole target, by what stands in it; the same whoever converted it, and when."""
        files = untrusted.Files(task.target)
        steps = files.json(MANIFEST).get("steps", ())
        verdict = files.json(CERTIFICATE).get("verdict") if CERTIFICATE in files else None
        # A card is there to be edited.
        target = {"path": task.place, "files": {name: files.digest(name) for name in files.names if name != CARD}}
        return self._record(task, "converted", source=_of(source), target=target, steps=steps, certificate=verdict)

    def _earlier(self, task: Task) -> Record | None:
        """The record of an earlier run, if its source, its target and what was asked for are what they were.

        Raises:
            OutputError: there is a target, of another source or of other options, and it is not to be replaced.
        """
        done = [record for record in task.earlier if record.verdict == "converted"]
        same = [record for record in done if record.options == self._options and _is_whole(task.target, record)]
        if not (same or task.begun) or not task.target.is_dir():
            self._check_replaced(task, done)
            return None
        source = read(
            task.source,
            base=self._base,
            format=self._asked.get("format"),
            drop=self._asked.get("drop", ()),
            trained_on=self._asked.get("trained_on"),
        )
        for record in same:
            if record.source == _of(source):
                return record
        if task.begun and not done and _is_made_of(task.target, source, self._base):
            return self._done(task, source)
        self._check_replaced(task, done)
        return None

    def _check_replaced(self, task: Task, done: Sequence[Record]) -> None:
        if not done or not task.target.exists() or self._asked.get("overwrite"):
            return
        if all(record.options != self._options for record in done):
            found = f"'{task.target}', which was converted with other options"
        elif not any(_is_whole(task.target, record) for record in done):
            found = f"'{task.target}', which is no longer what was written there"
        else:
            found = f"'{task.target}', which was converted from other files than '{task.source}' has now"
        raise OutputError(found, "a target that does not exist yet", "say --overwrite, or choose another output folder")


def _of(source: Loaded) -> dict[str, Any]:
    return {"format": source.format.name, "files": dict(source.digests)}


def _is_whole(target: Path, record: Record) -> bool:
    """Whether the target has the files that the record says, and each is what it was."""
    wanted = record.target.get("files", {})
    try:
        files = untrusted.Files(target)
        return bool(wanted) and all(name in files and files.digest(name) == wanted[name] for name in wanted)
    except CheckpointError:  # it is gone
        return False


def _is_made_of(target: Path, source: Loaded, base: BaseModel | None) -> bool:
    """Whether the target is whole, and made of this source, as its own manifest says."""
    try:
        made = read(target, base=base)
    except SoftbridgeError:
        return False
    return bool(made.made_of) and dict(made.made_of) == dict(source.digests)
