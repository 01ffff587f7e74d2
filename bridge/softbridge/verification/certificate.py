"""What a comparison found, as a value that can be printed, stored and read by a program.

The JSON form, ``softbridge/certificate/2``, has one key for each attribute of `Certificate`, and for each attribute of
the objects in it. It also has ``schema``, ``verdict`` and ``parted``, and the claim's ``level``, ``conditions`` and
``rounded`` at the top level. Earlier certificates have no ``claim``: it is then what the files say. A number that is
not finite is null. Version 1 has no ``level``, ``unit``, ``layers``, ``parted`` and ``untried``. It repeats the figure
of a loss and of a gradient as that of the working precision, and calls what is ``rounding`` here ``different``.
`softbridge.verification.recheck` runs both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from softbridge.geometry import Geometry
from softbridge.verification.claim import LEVELS, Claim, Level

#: The name and version of the JSON form. A change of meaning changes the number.
SCHEMA = "softbridge/certificate/2"
#: Earlier ones that can still be run again.
OLDER = ("softbridge/certificate/1",)

#: What was found, in the words of `softbridge.verification.claim.Level`, and two more.
#: different: further apart. insensitive: the comparison would not have noticed a missing prompt, and proves nothing.
Verdict = Literal["bitwise", "exact", "rounding", "different", "insensitive"]


@dataclass(frozen=True)
class Side:
    """One of the two things compared.

    Attributes:
        path: what it was read from, or is to be written to.
        engine: what ran it.
        instead_of: why not its own toolkit, if something else ran it.
        loaded: whether the toolkit's own loader read the files; else softbridge read them and handed the prompt over.
        digest: of the prompt (see `digest_of`).
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
        float64: largest difference of logits relative to the certificate's scale (for greedy: 1 if a token differs; for
            the loss and the gradient relative to themselves).
        working: the same in the working precision; None for what is computed in float64 alone.
        judged: whether it counts for the verdict.
        note: why not, otherwise; or how it was run, where that is not how a user of the toolkit would.
    """

    probe: str
    float64: float
    working: float | None
    judged: bool = True
    note: str = ""


@dataclass(frozen=True)
class Fault:
    """A deliberate fault in the target, and whether the comparison would have noticed it.

    Attributes:
        name: ``dropped`` (the prompt's effect), ``shifted by one position``, ``two layers swapped`` or ``keys and
            values swapped``.
        moved: how far it moves the outputs of the first text, relative to the scale.
        noticed: whether that is far beyond the bound.
    """

    name: str
    moved: float
    noticed: bool


@dataclass(frozen=True)
class Layer:
    """How far apart two sides are at one place of the model, on the first text in float64.

    Attributes:
        stack: ``encoder`` or ``decoder``.
        layer: its number in the stack.
        part: the path, in the layer, of a module that attends; or ``output``, for what the layer puts out.
        apart: the largest difference of what comes out there, relative to the largest number there.
    """

    stack: str
    layer: int
    part: str
    apart: float

    def __str__(self) -> str:
        part = "what follows attention" if self.part == "output" else f"attention ('{self.part}')"
        return f"{self.stack} layer {self.layer}, {part}"


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
        claim: in which sense the two are said to be the same.
        longest: tokens of the longest text that was run; nothing is shown beyond (a window or a table of frequencies
            that begins to matter later).
        scale: the largest logit of the source, in absolute value.
        islands: modules of the model that compute in less than float64.
        bound: what counts as exact.
        yardstick: the noise floor, what the working precision does by itself: how far the source alone is from
            itself when a padded batch is run in another order and, where float64 says that padding changes nothing,
            when each text is run alone.
        unit: a unit of least precision of the largest logit in the working precision, relative to `scale`.
        figures: the differences.
        layers: the differences inside the model, in the order in which it runs.
        faults: the sensitivity.
        untried: fault -> why the target's engine cannot run it.
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
    claim: Claim
    longest: int
    scale: float
    islands: tuple[str, ...]
    bound: float
    yardstick: float
    unit: float
    figures: tuple[Figure, ...]
    layers: tuple[Layer, ...]
    faults: tuple[Fault, ...]
    untried: Mapping[str, str]
    naive: float | None
    versions: Mapping[str, str]

    @property
    def level(self) -> Level:
        """What its caller counts as the same."""
        return self.claim.level

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions under which the two are the same, as the caller accepted them."""
        return self.claim.conditions

    @property
    def rounded(self) -> tuple[str, ...]:
        """Names of the conversion's steps that stored what they computed in float32."""
        return self.claim.rounded

    @property
    def verdict(self) -> Verdict:
        if not all(fault.noticed for fault in self.faults if fault.name == "dropped"):
            return "insensitive"
        judged = [figure for figure in self.figures if figure.judged]
        working = [figure.working for figure in judged if figure.working is not None]
        if all(figure.float64 == 0 for figure in judged) and not any(working):
            return "bitwise"
        if all(figure.float64 <= self.bound for figure in judged):
            return "exact"
        # A noise floor that a missing prompt stays below, too, measures nothing.
        if all(far <= self.yardstick for far in working) and self.yardstick < self.effect:
            return "rounding"
        return "different"

    @property
    def independent(self) -> bool:
        """Whether two engines were compared. One engine on both sides shows that the files hold the same prompt."""
        return self.source.engine != self.target.engine

    @property
    def same(self) -> bool:
        """Whether they are at least as alike as `level` asks."""
        return self.verdict in LEVELS[: LEVELS.index(self.level) + 1]

    @property
    def exit_status(self) -> int:
        """0 the same, 1 different, 2 could not be judged."""
        return 2 if self.verdict == "insensitive" else 0 if self.same else 1

    @property
    def parted(self) -> Layer | None:
        """Where in the model two different sides part: the first place at which they are further apart than the bound.

        None, too, where the first text does not show it: what is wrong is then in padding or in decoding.
        """
        if self.verdict in ("bitwise", "exact"):
            return None
        return next((place for place in self.layers if not place.apart <= self.bound), None)

    @property
    def worst(self) -> float:
        """The largest judged difference in float64."""
        return max((figure.float64 for figure in self.figures if figure.judged), key=lambda far: (far != far, far))

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
            + (f", parted at {self.parted}" if self.verdict == "different" and self.parted else "")
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON value; see the module and the README."""
        parted = None if self.parted is None else asdict(self.parted)
        claimed = {"level": self.level, "conditions": self.conditions, "rounded": self.rounded}
        found = {"parted": parted, **claimed, **asdict(self)}
        return {"schema": SCHEMA, "verdict": self.verdict, **_plain(found)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
