"""What a comparison claims: one value, on which everything that compares agrees.

A conversion says in its steps what it did, and under which conditions. Two files that it left are the same function in
a sense that these say: of the source one task, rounded to bfloat16, on texts within the window. That sense is computed
once (`softbridge.verification.sides.claim_of`). It stands in the certificate, and whatever runs the comparison, at
once, from the files or from the certificate, reads it and asks no step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from softbridge.checkpoint.choice import ALL, Choice
from softbridge.choices import DTYPES
from softbridge.choices import LEVELS as LEVELS
from softbridge.choices import WORKING as WORKING
from softbridge.choices import Level as Level
from softbridge.lowering.steps import Step
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.verification.probes import LENGTHS

#: One of the two things that are compared.
Which = Literal["source", "target"]


def rounded_to(steps: Sequence[Step], asked: str | None) -> str | None:
    """The dtype that a conversion rounded its source's numbers to, on request or as accepted; None: it rounded none.

    Args:
        steps: of the conversion.
        asked: the dtype that was asked for, if one was.
    """
    if any((step.name, step.exactness) == ("dtype", "conditional") for step in steps):
        return "float32"  # whatever was asked for, the format keeps that
    return asked if any(step.name == "narrow" for step in steps) else None


#: Steps that run numbers through the base model, or a piece of it: what comes out depends on its weights.
RUN = frozenset({"entry", "prefill"})


@dataclass(frozen=True)
class Claim:
    """In which sense two prompts are the same function.

    Attributes:
        conditions: names of the conditions under which they are, as they were accepted.
        rounded: names of the conversion's steps that stored what they computed in float32, which bounds how closely
            the two can agree.
        dtype: name of the dtype that the numbers of one side were rounded to, which is not held against it: the other
            side's are rounded alike. None: none were.
        choice: what of the other side one was made of.
        made: which of the two that is, of which the other side is the origin. None: nothing was chosen, and a dtype is
            that of both.
        weights: whether the base model's own weights are needed, or wanted.
        window: what a sliding window is shortened to, so that texts reach beyond it; None: it is left as it is.
        level: what counts as the same.

    Raises:
        ValueError: a value of another kind.
    """

    conditions: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    dtype: str | None = None
    choice: Choice = ALL
    made: Which | None = None
    weights: bool = False
    window: int | None = None
    level: Level = "exact"

    def __post_init__(self) -> None:
        for name in ("conditions", "rounded"):
            words = tuple(dict.fromkeys(getattr(self, name)))
            object.__setattr__(self, name, words)
            if not all(isinstance(word, str) for word in words):
                raise ValueError(f"{name}: {words!r:.80}, not names")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r:.40}, not one of {', '.join(DTYPES)}")
        if self.made is not None and self.made not in get_args(Which):
            raise ValueError(f"made: {self.made!r:.40}, not one of {', '.join(get_args(Which))}")
        if self.level not in LEVELS:
            raise ValueError(f"level: {self.level!r:.40}, not one of {', '.join(LEVELS)}")
        if not isinstance(self.weights, bool) or not isinstance(self.choice, Choice):
            raise ValueError(f"weights: {self.weights!r:.40}, choice: {self.choice!r:.40}")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"window: {self.window!r:.40}, not a number from 1")

    def about(
        self,
        prompts: Sequence[SoftPrompt],
        steps: Sequence[Step] = (),
        *,
        weights: bool = False,
        level: Level = "exact",
    ) -> Claim:
        """The claim with what these steps mean for a comparison of these prompts.

        Args:
            prompts: what is compared, to shorten a window by.
            steps: that led from one to the other.
            weights: whether the base model's own weights are wanted.
            level: what counts as the same.
        """
        conditions = tuple(step.name for step in steps if step.exactness == "conditional")
        rounded = tuple(step.name for step in steps if step.exactness == "rounding" and step.name != "narrow")
        counted = [length for prompt in prompts for length in prompt.counted().values()]
        return replace(
            self,
            conditions=conditions,
            rounded=rounded,
            weights=weights or bool(RUN.intersection(rounded)),
            window=None if "window" in conditions or not counted else max(counted) + LENGTHS[0] // 2,
            level=level,
        )

    @property
    def origin(self) -> Which | None:
        """Of which side the other was made."""
        others: dict[Which | None, Which | None] = {"source": "target", "target": "source"}
        return others.get(self.made)

    @property
    def headless(self) -> bool:
        """Whether one side left the head to its caller, who takes the other's."""
        return "head" in self.conditions

    @property
    def moved(self) -> bool:
        """Whether a piece of the model lies between the numbers of the two: its embedding block, or all of it."""
        return bool(RUN.intersection(self.rounded))

    @property
    def computed(self) -> bool:
        """Whether one side's numbers are computed from the other's, beyond what every side does for this model."""
        return bool({*self.rounded} - {"scale"})

    @property
    def scaled(self) -> Claim:
        """The same where vectors were multiplied for the model that is run here."""
        return self if "scale" in self.rounded else replace(self, rounded=(*self.rounded, "scale"))

    def joined(self, other: Claim) -> Claim:
        """What both claim, each of one of the same two prompts."""
        conditions, rounded = (*self.conditions, *other.conditions), (*self.rounded, *other.rounded)
        return replace(self, conditions=conditions, rounded=rounded)

    @property
    def reversed(self) -> Claim:
        """The same with the two sides the other way around."""
        return replace(self, made=self.origin)

    @classmethod
    def from_json(cls, value: Any) -> Claim:
        """The claim of which this is what `dataclasses.asdict` makes.

        Raises:
            ValueError: `value` is not a claim as JSON.
        """
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{value!r:.80}, not a claim")
        if not all(isinstance(value[name], (list, tuple)) for name in ("conditions", "rounded")):
            raise ValueError("conditions and rounded: lists of names")
        try:
            return cls(**{**value, "choice": Choice.from_json(value["choice"])})
        except TypeError as error:  # something that cannot be a name
            raise ValueError(f"{value!r:.80}: {error}") from error
