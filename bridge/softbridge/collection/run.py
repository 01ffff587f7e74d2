"""All checkpoints of a folder: found, converted by several processes, recorded, and taken over by the next run.

Before a worker is given a checkpoint, a line in the journal says so, and when it is done its record is the next line.
So a run that is killed loses nothing. At the end the manifest is written whole, and the journal removed.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softbridge import conversion, untrusted
from softbridge.checkpoint.write import check_encoding
from softbridge.collection.find import find
from softbridge.collection.pool import Death, Pool
from softbridge.collection.record import (
    STEM,
    SUFFIX,
    Manifest,
    Reason,
    Record,
    Shard,
    exit_status,
    line,
    lines,
    listing,
    unpack,
)
from softbridge.collection.work import Result, Task, Worker
from softbridge.errors import ArgumentError, CheckpointError
from softbridge.plugin.registry import format_named
from softbridge.untested import warn_of_untested

JOURNAL = ".journal"
#: Arguments of `softbridge.convert` that do not change what is written.
_MANNERS = ("overwrite", "dry_run")


@dataclass(frozen=True)
class Outcome:
    """What became of a folder of checkpoints.

    Attributes:
        manifest: a record for each that was found.
        path: where the manifest was written; None after a dry run.
        taken_over: how many an earlier run had converted.
    """

    manifest: Manifest
    path: Path | None
    taken_over: int

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(self.manifest.records)

    @property
    def exit_status(self) -> int:
        """That of the command; see `softbridge.collection.record.exit_status`."""
        return exit_status(record.verdict for record in self.records)


@dataclass
class _Before:
    """What earlier runs left: records by path, and what they had begun, with which options."""

    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    begun: dict[str, Any] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        self.records[record.path] += [*map(Record.from_json, record.before), record]


def convert_all(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    jobs: int = 0,
    shard: str | None = None,
    base: Any = None,
    watch: Callable[[int, int], None] | None = None,
    **asked: Any,
) -> Outcome:
    """Convert all checkpoints in a folder and below, each to the same place in another folder.

    A failure is recorded, and the others go on. What an earlier run converted is taken over if its source, its target
    and the options are what they were; what it refused is tried again. (Of the base model its config.json counts, and
    not its weights.) The manifest is `softbridge-collection.jsonl` in the target, or with `shard`
    `softbridge-collection.I-of-N.jsonl`; see `softbridge.collection.record`.

    Args:
        source: the folder; see `softbridge.collection.find.find`.
        target: the folder to write to. It is made if it is missing.
        to: name of the format to write.
        jobs: how many processes convert. 0: this one does, and ends with whatever ends it. A script that starts
            processes keeps its work below ``if __name__ == "__main__":``, since each of them imports it.
        shard: ``I/N`` for one of N parts of the list, I from 1. Which part a checkpoint is in does not depend on the
            others.
        base: the base model of all of them; each process reads it once. Given to other processes, it is pickled.
        watch: called with how many are done, and of how many.
        asked: the other arguments of `softbridge.convert`, for each of them.

    Raises:
        SoftbridgeError: nothing could be begun: no checkpoint is there, the base model cannot be read, `to` is not
            written, or another process writes the same manifest.
        KeyboardInterrupt: after the workers have ended, and the manifest says what was done.
    """
    inspect.signature(conversion.convert).bind(source, target, to, base=base, **asked)
    if jobs < 0:
        raise ArgumentError(f"{jobs} jobs", "0 or more", "correct jobs")
    warn_of_untested()
    source, target = Path(source), Path(target)
    check_encoding(format_named(to), asked.get("encoding"))
    part = Shard() if shard is None else Shard.parse(shard)
    found = find(source, target, asked.get("format"))
    mine = [one for one in found if part.holds(one.path)]
    options = _options(to, base, asked)
    before, dry = _before(target), bool(asked.get("dry_run"))
    tasks = [
        Task(
            one.path,
            source / one.path,
            target / one.target,
            one.target,
            before.records[one.path],
            before.begun.get(one.path) == options,
        )
        for one in mine
        if one.verdict == "pending"
    ]
    journal = None if dry else untrusted.Log(target / (part.file + JOURNAL))
    results: dict[str, Result] = {}

    def begin(task: Task) -> None:
        if journal is not None and not task.target.exists():
            journal.add(line({"begun": task.path, "options": options}))

    def keep(done: Iterable[tuple[Task, Result | Death]]) -> None:
        for task, result in done:
            made = _of_dead(task, result, options) if isinstance(result, Death) else result
            results[task.path] = made
            if journal is not None:
                journal.add(line(made.record.to_json()))
            if watch is not None:
                watch(len(results), len(tasks))

    def outcome() -> Outcome:
        left = {one.path: Record(one.path, one.verdict, one.reason, options=options) for one in mine}
        known = {**left, **{path: result.record for path, result in results.items()}}
        records = [_with_before(record, before.records[path]) for path, record in known.items()]
        manifest = Manifest(str(source), options, part, listing([one.path for one in found]), records)
        if not dry:
            untrusted.write_file(target / part.file, manifest.pack(), overwrite=True)
        taken = sum(result.taken_over for result in results.values())
        return Outcome(manifest, None if dry else target / part.file, taken)

    worker = (base, {**asked, "to": to}, options)
    preload = "softbridge.collection.work" if base is None else "softbridge.collection.preloaded"
    pool = Pool(Worker, worker, jobs, (preload,))
    try:
        with closing(_here(worker, tasks, begin) if jobs == 0 else pool.results(tasks, begin)) as done:
            keep(done)
    except KeyboardInterrupt:
        keep(pool.rest())
        outcome()
        raise
    else:
        ended = outcome()
        if journal is not None:
            journal.remove()
        return ended
    finally:
        if journal is not None:
            journal.close()


def _here(
    worker: tuple[Any, Any, Any], tasks: Iterable[Task], begin: Callable[[Task], None]
) -> Generator[tuple[Task, Result | Death], None, None]:
    """As `Pool.results`, in this process."""
    convert = Worker(*worker)
    for task in tasks:
        begin(task)
        yield task, convert(task)


def _of_dead(task: Task, death: Death, options: Mapping[str, Any]) -> Result:
    reason = Reason(
        "Death",
        str(death),
        "a process that answers",
        "if the machine ran out of memory, use fewer --jobs; else report this as a defect of softbridge",
    )
    return Result(Record(task.path, "defect", reason, options=options))


def _with_before(record: Record, earlier: Iterable[Record]) -> Record:
    """What was not converted, with what earlier runs say of it, so that a later one still knows."""
    if record.verdict == "converted":
        return record
    known: dict[str, Mapping[str, Any]] = {}
    for one in earlier:
        if one.verdict == "converted":
            known[str(one.to_json())] = one.to_json()
    return replace(record, before=tuple(known.values()))


def _options(to: str, base: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments changes what is written, as a manifest has it: nothing that was left out."""
    said = {
        name: sorted(set(value)) if isinstance(value, Collection) and not isinstance(value, str) else value
        for name, value in asked.items()
        if name not in _MANNERS and value is not None and value is not False and value not in ((), [])
    }
    if base is not None:
        said["base"] = _base(base)
    options: dict[str, Any] = json.loads(json.dumps({"to": to, **said}, default=str))
    return options


def _base(base: Any) -> dict[str, Any]:
    """A base model by its name and, where that is a path, the digest of its configuration."""
    if not isinstance(base, (str, Path)):
        return {"name": getattr(base, "name", None) or getattr(base, "name_or_path", None) or type(base).__name__}
    config = Path(base).expanduser()
    config = config / "config.json" if config.is_dir() else config
    digest = {"config": untrusted.Files(config).digest(config.name)} if config.is_file() else {}
    return {"name": str(base), **digest}


def _before(target: Path) -> _Before:
    """What the manifests and journals in the output folder say, of whichever shards.

    Raises:
        CheckpointError: one of them is malformed.
    """
    found = _Before()
    for path in sorted(target.glob(f"{STEM}*{SUFFIX}")):
        for record in unpack(path).records:
            found.add(record)
    for path in sorted(target.glob(f"{STEM}*{SUFFIX}{JOURNAL}")):
        for told in lines(path):
            try:
                if "begun" in told:
                    found.begun[told["begun"]] = told["options"]
                    continue
                record = Record.from_json(told)
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is not the journal of a run: {error}", "what softbridge wrote", "remove it"
                ) from error
            found.add(record)
            found.begun.pop(record.path, None)
    return found
