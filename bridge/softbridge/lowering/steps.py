"""What a pass is handed and what it returns: a target, a step, ways to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from softbridge.base.model import BaseModel
from softbridge.errors import BaseModelError, Obstacle
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt.part import Part
from softbridge.prompt.soft_prompt import SoftPrompt

Exactness = Literal["exact", "rounding", "conditional"]


@dataclass(frozen=True)
class Step:
    """One thing that lowering did, and what it means for the result.

    Attributes:
        name: of the pass, or of the condition that was accepted.
        exactness: ``exact``; ``rounding`` (the same function up to the rounding that the note bounds);
            ``conditional`` (the same function while the note's condition holds).
        note: a sentence for a person.
    """

    name: str
    exactness: Exactness
    note: str


@dataclass(frozen=True)
class Target:
    """What a prompt is lowered to: a format's or an engine's declarations, and for which base model.

    Attributes:
        base: may be None as long as no pass needs it.
        dtype: name of the dtype in which the numbers are to be stored, on request; None: as they are.
    """

    name: str
    capabilities: Capabilities
    base: BaseModel | None = None
    dtype: str | None = None

    def geometry(self, prompt: SoftPrompt) -> Geometry | None:
        """Of the base model: the given one's, else what the prompt records."""
        return self.base.geometry if self.base is not None else prompt.base.geometry

    def need_base(self, why: str) -> BaseModel:
        if self.base is None:
            raise BaseModelError(
                f"this conversion to '{self.name}' needs to know the base model: {why}",
                "the base model's configuration, directory or hub id",
                "give it with --base (base=... in Python)",
            )
        return self.base


@dataclass(frozen=True)
class Option:
    """One way to go on.

    Attributes:
        prompt: what becomes of it; where an obstacle is a condition, as if that were met.
        steps: what was done.
        obstacles: what was met, conditions (the acceptable ones) among them.
        missing: what is needed to go this way, and was not given.
    """

    prompt: SoftPrompt
    steps: tuple[Step, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    missing: BaseModelError | None = None


Pass = Callable[[SoftPrompt, Target], Sequence[Option]]
ELSEWHERE = "choose a target that can hold it, such as --to softbridge"


def blocked(prompt: SoftPrompt, *obstacles: Obstacle) -> list[Option]:
    """The one way on that these obstacles leave: none of them is overcome."""
    return [Option(prompt, (), obstacles)]


def with_part(prompt: SoftPrompt, old: Part, new: Part) -> SoftPrompt:
    """The prompt with one part replaced."""
    return replace(prompt, parts=tuple(new if part is old else part for part in prompt.parts))
