"""What a comparison found, as a value that can be printed, stored and read by a program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softbridge.geometry import Geometry

#: The name and version of the JSON form. A change of meaning changes the number.
SCHEMA = "softbridge/certificate/1"

#: bitwise: not one bit differs, in float64 and in the working precision. exact: within the stated bound in float64.
#: different: further apart. insensitive: the comparison would not have noticed a missing prompt, and proves nothing.
Verdict = Literal["bitwise", "exact", "different", "insensitive"]


@dataclass(frozen=True)
class Side:
    """One of the two things compared.

    Attributes:
        path: what it was read from, or is to be written to.
        engine: what ran it.
        instead_of: why not its own toolkit, if something else ran it.
        loaded: whether the toolkit's own loader read the files; else softbridge read them and handed the prompt over.
        digest: of the prompt (see `SoftPrompt.digest`).
        files: file name -> sha256.
    """

    path: str
    engine: str
    instead_of: str
    loaded: bool
    digest: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Figure:
    """The difference of the two sides on one probe.

    Attributes:
        probe: its name.
        float64: largest difference of logits relative to the certificate's scale (for greedy: 1 if a token differs).
        working: the same in the working precision.
        judged: whether it counts for the verdict.
        note: why not, otherwise.
    """

    probe: str
    float64: float
    working: float
    judged: bool = True
    note: str = ""


@dataclass(frozen=True)
class Fault:
    """How far a deliberate fault moves the outputs, relative to the scale, and whether that was noticed."""

    name: str
    moved: float
    noticed: bool


@dataclass(frozen=True)
class Certificate:
    """The outcome of a comparison. All differences are relative to `scale`, the largest logit.

    Attributes:
        source: the reference.
        target: what was compared with it.
        base: name of the base model, or None.
        geometry: its attention.
        weights: with which weights it was run.
        seed: of texts and random weights.
        dtype: the working precision.
        conditions: names of the conditions under which the two are the same, as the caller accepted them.
        rounded: names of the conversion's steps that stored what they computed in float32.
        longest: tokens of the longest text that was run; nothing is shown beyond (a window or a table of frequencies
            that begins to matter later).
        scale: the largest logit of the source, in absolute value.
        islands: modules of the model that compute in less than float64.
        bound: what counts as exact.
        yardstick: what the working precision does by itself: the largest difference between the source's texts alone
            and in one padded batch, both in that precision.
        figures: the differences.
        faults: the sensitivity.
        naive: the difference if the source's numbers are copied as they are, where that is another function.
        versions: of everything that can change a result.
    """

    source: Side
    target: Side
    base: str | None
    geometry: Geometry
    weights: str
    seed: int
    dtype: str
    conditions: tuple[str, ...]
    rounded: tuple[str, ...]
    longest: int
    scale: float
    islands: tuple[str, ...]
    bound: float
    yardstick: float
    figures: tuple[Figure, ...]
    faults: tuple[Fault, ...]
    naive: float | None
    versions: Mapping[str, str]

    @property
    def verdict(self) -> Verdict:
        if not all(fault.noticed for fault in self.faults if fault.name == "dropped"):
            return "insensitive"
        judged = [figure for figure in self.figures if figure.judged]
        if all(figure.float64 == 0 and figure.working == 0 for figure in judged):
            return "bitwise"
        return "exact" if all(figure.float64 <= self.bound for figure in judged) else "different"

    @property
    def independent(self) -> bool:
        """Whether two engines were compared. One engine on both sides shows that the files hold the same prompt."""
        return self.source.engine != self.target.engine

    @property
    def same(self) -> bool:
        return self.verdict in ("bitwise", "exact")

    @property
    def exit_status(self) -> int:
        """0 the same, 1 different, 2 could not be judged."""
        return {"bitwise": 0, "exact": 0, "different": 1, "insensitive": 2}[self.verdict]

    @property
    def worst(self) -> float:
        """The largest judged difference in float64."""
        return max(figure.float64 for figure in self.figures if figure.judged)

    @property
    def effect(self) -> float:
        """How far the outputs move without the prompt."""
        return next(fault.moved for fault in self.faults if fault.name == "dropped")

    def summary(self) -> str:
        """One line."""
        copied = "" if self.naive is None else f", copied as it is {self.naive:.1e}"
        return (
            f"{self.verdict}: prompt's effect {self.effect:.1e}{copied}, difference {self.worst:.1e} "
            f"(float64, bound {self.bound:.0e}, relative to the largest logit {self.scale:.3g})"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value; the README documents its fields. A number that is not finite becomes null."""
        return {"schema": SCHEMA, "verdict": self.verdict, **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
