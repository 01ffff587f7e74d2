"""What is known of each checkpoint of a collection, and the file that says it: the manifest.

It is JSON, an object a line, so that a run can add to it and a large one is read in small pieces: first the collection,
then its checkpoints in the order of their paths. It holds no time and nothing of the machine: a run that was killed and
resumed writes the manifest of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from softbridge import untrusted
from softbridge.errors import ArgumentError, CheckpointError, SoftbridgeError

Verdict = Literal["converted", "planned", "refused", "differs", "defect", "not a prompt", "left out", "pending"]
SCHEMA = "softbridge/collection/1"
#: The manifest's name in the output folder; that of a shard has its number behind the stem.
STEM, SUFFIX = "softbridge-collection", ".jsonl"


@dataclass(frozen=True)
class Reason:
    """Why a checkpoint was not converted: as an error has it, with the name of its class, or of a kind of our own."""

    kind: str
    found: str
    expected: str
    remedy: str = ""

    @classmethod
    def of(cls, error: SoftbridgeError) -> Reason:
        return cls(type(error).__name__, error.found, error.expected, error.remedy)


@dataclass(frozen=True)
class Record:
    """What became of one checkpoint.

    Attributes:
        path: from the source folder, with ``/``.
        verdict: "converted"; "planned" (in a dry run); "refused"; "differs" (verification found another function);
            "defect" (of softbridge, or what ended its process); "not a prompt"; "left out"; "pending" (not reached).
        reason: why it was not converted.
        source: format, and the files that were read with their sha256.
        target: the files that were written, with their sha256; their folder from the output folder.
        steps: of the conversion, as softbridge.json beside the target has them.
        certificate: the verdict of the certificate beside the target, if there is one.
        options: what was asked for; see `softbridge.collection.run.convert_all`. In the file only where they are not
            those of the manifest.
        version: of softbridge.
        before: if it was not converted, what earlier runs say of the target that is there.
    """

    path: str
    verdict: Verdict
    reason: Reason | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Mapping[str, str]] = ()
    certificate: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    before: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "before", tuple(self.before))

    def to_json(self) -> dict[str, Any]:
        """The object of its line: what there is to say."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), {}, "")}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Raises `ValueError`: `value` is not what `to_json` makes."""
        try:
            reason = value.get("reason")
            told = {**value, "reason": None if reason is None else Reason(**reason)}
            record = cls(**told)
        except TypeError as error:
            raise ValueError(str(error)) from error
        kinds: dict[str, Any] = {
            "path": str,
            "verdict": str,
            "source": dict,
            "target": dict,
            "options": dict,
            "version": str,
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(record, name), kind)]
        wrong += [name for name in ("source", "target") if not isinstance(getattr(record, name).get("files", {}), dict)]
        if wrong or record.verdict not in get_args(Verdict):
            raise ValueError(f"a record with another {', '.join(wrong) or 'verdict'}")
        return record


@dataclass(frozen=True)
class Shard:
    """A part of a list that stays the same when others are added to the list: by the digest of each path.

    Attributes:
        number: from 1.
        of: how many there are.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ArgumentError(
                f"the shard {self.number}/{self.of}", "I/N with I from 1 to N", "number the shards from 1"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of ``I/N``. Raises `ArgumentError` for all else."""
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal()):
            raise ArgumentError(f"the shard {text!r}", "I/N, as in 2/8", "correct --shard")
        return cls(int(number), int(of))

    def holds(self, path: str) -> bool:
        """Whether a path is in this part."""
        digest = sha256(path.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.of == self.number - 1

    @property
    def file(self) -> str:
        """The name of its manifest."""
        return f"{STEM}{SUFFIX}" if self.of == 1 else f"{STEM}.{self.number}-of-{self.of}{SUFFIX}"


@dataclass(frozen=True)
class Manifest:
    """What a run, or several, made of a folder of checkpoints.

    Attributes:
        source: the folder, as it was given.
        options: what was asked for of all of them.
        shard: which part of the list this is.
        paths: how many there are in the whole list, and the digest of their paths.
        records: one for each path of the part, sorted.
    """

    source: str
    options: Mapping[str, Any]
    shard: Shard
    paths: Mapping[str, Any]
    records: Sequence[Record]

    def pack(self) -> bytes:
        """The file."""
        head = {
            "schema": SCHEMA,
            "source": self.source,
            "options": self.options,
            "shard": [self.shard.number, self.shard.of],
            "paths": self.paths,
        }
        told = (record.to_json() for record in self.records)
        own = ({n: v for n, v in one.items() if (n, v) != ("options", self.options)} for one in told)
        return b"".join(map(line, (head, *own)))


def line(value: Mapping[str, Any]) -> bytes:
    """One line of a manifest."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a manifest, or of the journal of a run; what a killed process left of a last line is none.

    Raises:
        CheckpointError: a line is not a JSON object.
    """
    with untrusted.Files(path).stream(path.name) as (stream, _):
        return [
            untrusted.parse_json(text, f"{path}, line {number}")
            for number, text in enumerate(iter(partial(stream.readline, untrusted.LIMIT + 1), b""), start=1)
            if text.endswith(b"\n") or len(text) > untrusted.LIMIT
        ]


def unpack(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        CheckpointError: it is not a manifest.
    """
    found = lines(path)
    try:
        head = found[0] if found else {}
        if head.get("schema") != SCHEMA:
            raise ValueError(f"the schema {head.get('schema')!r:.40}")
        options, paths, shard = head["options"], head["paths"], Shard(*head["shard"])
        if not isinstance(options, dict) or not isinstance(paths, dict) or not isinstance(head["source"], str):
            raise ValueError("a first line of other types")
        return Manifest(
            head["source"], options, shard, paths, [Record.from_json({"options": options, **one}) for one in found[1:]]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not the manifest of a collection: {error}",
            f"what 'softbridge convert --recursive' wrote, of the schema {SCHEMA}",
            "check the path",
        ) from error


def listing(paths: Collection[str]) -> dict[str, Any]:
    """How many there are, and their digest: by which two shards show that they saw the same list."""
    names = "\n".join(sorted(paths)).encode("utf-8", "surrogateescape")
    return {"count": len(paths), "sha256": sha256(names).hexdigest()}


def exit_status(verdicts: Iterable[Verdict]) -> int:
    """3: a defect; else 1: one differs; else 2: one was refused, or not reached; else 0."""
    seen = set(verdicts)
    return 3 if "defect" in seen else 1 if "differs" in seen else 2 if seen & {"refused", "pending"} else 0
