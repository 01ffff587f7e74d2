"""What a self-check found, and where it is kept for the next time.

A verdict is a function of its key: the class of the model with the source that it stands in, the shrunk configuration,
the kind of prompt, the attention implementation, and the versions and sources of what ran. It is kept for the process,
and in the user's cache folder for other processes. What is read back from there is foreign: it is believed only if it
is well formed and says itself that it belongs to this key.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from softbridge.errors import SoftbridgeError
from softbridge.untrusted import Files, json_bytes, write_file
from softbridge_compat import versions

log = logging.getLogger(__name__)

Promise = Literal["effect", "reference", "generation", "cache", "right", "left", "bank"]
#: Promise -> what it says.
PROMISES: Mapping[Promise, str] = {
    "effect": "the outputs depend on the prompt",
    "reference": "the outputs are those computed by hand",
    "generation": "what `generate` makes without a cache is greedy decoding by hand",
    "cache": "decoding with a cache is decoding without one",
    "right": "a row padded on the right is the row alone",
    "left": "a row padded on the left is the row alone",
    "bank": "rows of a bank are what each is alone",
}
Status = Literal["kept", "broken", "unproven"]
Json: TypeAlias = Any

SCHEMA = "softbridge/self-check/1"
#: Where verdicts are kept, if set.
FOLDER = "SOFTBRIDGE_SELF_CHECK_FOLDER"
#: What decides what a model computes here.
DECISIVE = ("torch", "transformers", "softbridge")


@dataclass(frozen=True)
class Measured:
    """One comparison.

    Attributes:
        name: what was compared.
        value: how far apart the two sides are, relative to the largest number; infinite if one of them failed.
        bound: how far apart they may be.
        bare: the same of the model without a prompt, where the value is beyond the bound.
        excused: whether the model alone is to blame.
    """

    name: str
    value: float
    bound: float
    bare: float | None = None
    excused: bool = False

    @property
    def kept(self) -> bool:
        return self.value <= self.bound or self.excused


@dataclass(frozen=True)
class Finding:
    """What came of one promise.

    Attributes:
        promise: its name.
        figures: what was compared; nothing, if it was not tried.
        reason: why it was not tried, or not to the end.
    """

    promise: Promise
    figures: tuple[Measured, ...] = ()
    reason: str = ""

    @property
    def broken(self) -> tuple[Measured, ...]:
        return tuple(figure for figure in self.figures if not figure.kept)


@dataclass(frozen=True)
class Verdict:
    """What came of a self-check.

    Attributes:
        model: name of the class.
        findings: one for each promise; none, if nothing could be tried.
        note: on what copy of the model.
        reason: why nothing could be tried, or nothing.
        versions: of what decides what a model computes.
    """

    model: str
    findings: tuple[Finding, ...]
    note: str
    reason: str
    versions: Mapping[str, str]

    @property
    def status(self) -> Status:
        if any(finding.broken for finding in self.findings):
            return "broken"
        return "unproven" if self.reason else "kept"

    def broken(self, *promises: Promise) -> Finding | None:
        """The first of these promises that is broken."""
        return next((found for found in self.findings if found.promise in promises and found.broken), None)

    def to_json(self) -> dict[str, Json]:
        """JSON values; a number that is not finite is null."""
        return {
            "model": self.model,
            "status": self.status,
            "note": self.note,
            "reason": self.reason,
            "versions": dict(self.versions),
            "findings": [
                {
                    "promise": finding.promise,
                    "kept": None if not finding.figures else not finding.broken,
                    "reason": finding.reason,
                    "figures": [
                        {
                            "name": figure.name,
                            "value": _finite(figure.value),
                            "bound": figure.bound,
                            "bare": None if figure.bare is None else _finite(figure.bare),
                            "excused": figure.excused,
                        }
                        for figure in finding.figures
                    ],
                }
                for finding in self.findings
            ],
        }

    @classmethod
    def from_json(cls, value: Json) -> Verdict:
        """The inverse of `to_json`.

        Raises:
            ValueError: `value` is not a verdict, or contradicts itself.
        """
        told = _of(dict, value, "verdict")
        verdict = cls(
            _of(str, told.get("model"), "model"),
            tuple(_finding(finding) for finding in _of(list, told.get("findings"), "findings")),
            _of(str, told.get("note"), "note"),
            _of(str, told.get("reason"), "reason"),
            {name: _of(str, text, name) for name, text in _of(dict, told.get("versions"), "versions").items()},
        )
        if verdict.status != told.get("status") or not (verdict.findings or verdict.reason):
            raise ValueError("status: not what the figures say")
        return verdict


def _finding(value: Json) -> Finding:
    told = _of(dict, value, "finding")
    promise = _of(str, told.get("promise"), "promise")
    if promise not in PROMISES:
        raise ValueError(f"promise: unknown: {promise!r:.40}")
    figures = tuple(_measured(figure) for figure in _of(list, told.get("figures"), "figures"))
    return Finding(promise, figures, _of(str, told.get("reason"), "reason"))


def _measured(value: Json) -> Measured:
    told = _of(dict, value, "figure")
    numbers = {name: told.get(name) for name in ("value", "bound", "bare")}
    found = {
        name: None if number is None else float(_of((int, float), number, name)) for name, number in numbers.items()
    }
    if found["bound"] is None or isinstance(told.get("bound"), bool):
        raise ValueError("bound: not a number")
    far = math.inf if found["value"] is None else found["value"]
    name, excused = _of(str, told.get("name"), "name"), _of(bool, told.get("excused"), "excused")
    return Measured(name, far, found["bound"], found["bare"], excused)


def _of(kind: Any, value: Json, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what}: {type(value).__name__}")
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------------- the cache


@dataclass(frozen=True)
class Key:
    """What a verdict is a function of.

    Attributes:
        kind: the class of the model itself: two classes of one name are two.
        told: everything else, in JSON values.
        lasting: whether another process would make the same of `told`. A class that a function made is known to this
            process only.
    """

    kind: type
    told: Mapping[str, Json]
    lasting: bool

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.told, sort_keys=True).encode()).hexdigest()

    def __hash__(self) -> int:
        return hash((self.kind, self.digest))


#: Class of the model and digest of the key -> verdict.
_KNOWN: dict[tuple[type, str], Verdict] = {}


def recall(key: Key) -> Verdict | None:
    """The verdict of this key, if this process or another came to one."""
    digest = key.digest
    if (key.kind, digest) not in _KNOWN and key.lasting:
        found = _read(folder() / f"{digest}.json")
        if found is not None and found[0] == key.told:
            _KNOWN[key.kind, digest] = found[1]
    return _KNOWN.get((key.kind, digest))


def keep(key: Key, verdict: Verdict) -> None:
    """Remember a verdict. A folder that cannot be written is no fault: the next process checks again."""
    digest = key.digest
    _KNOWN[key.kind, digest] = verdict
    if not key.lasting:
        return
    content = json_bytes({"schema": SCHEMA, "key": dict(key.told), "verdict": verdict.to_json()})
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_file(folder() / f"{digest}.json", content, overwrite=True)
    except (OSError, SoftbridgeError) as error:
        log.info("a self-check's verdict was not kept: %s", error)


def forget() -> None:
    """Forget what this process knows; what lies in the folder stays."""
    _KNOWN.clear()


def folder() -> Path:
    """Where verdicts are kept for other processes."""
    if told := os.environ.get(FOLDER):
        return Path(told)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (
        (Path(caches) if os.path.isabs(caches) else Path(os.path.expanduser("~/.cache"))) / "softbridge" / "self-check"
    )


def verdicts() -> Iterator[Verdict]:
    """The verdicts in the folder that are of the installed versions, in the order of the models' names."""
    try:
        paths = sorted(folder().glob("*.json"))
    except OSError:
        return
    found = [read[1] for path in paths if (read := _read(path)) is not None]
    yield from sorted((one for one in found if one.versions == decisive()), key=lambda one: one.model)


@cache
def decisive() -> Mapping[str, str]:
    """The installed versions of what decides what a model computes."""
    return {name: version for name, version in versions().items() if name in DECISIVE}


def _read(path: Path) -> tuple[Mapping[str, Json], Verdict] | None:
    """Key and verdict of a file; None if the file is missing or malformed."""
    try:
        told = Files(path).json(path.name)
        if told.get("schema") != SCHEMA:
            return None
        return _of(dict, told.get("key"), "key"), Verdict.from_json(told.get("verdict"))
    except (SoftbridgeError, ValueError, OSError) as error:
        if path.exists():
            log.info("the verdict in '%s' is passed over: %s", path, error)
        return None
