"""Lowering: make a prompt expressible by a target without changing the function that it computes.

A small compiler. The passes (`softbridge.lowering.passes`) say in which ways one can go on; the planner here searches
for the best way through all of them: no obstacle, few conditions, few steps. Where every way meets obstacles it goes
the way that meets the fewest, so that a refusal names all of them at once. Nothing is lost silently: what a target
cannot hold is an obstacle, and an obstacle whose consequence a caller can bear is a condition, to be accepted by name.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal

from softbridge.base.model import BaseModel
from softbridge.choices import CONDITIONS as CONDITIONS
from softbridge.errors import BaseModelError, LoweringError, Obstacle, SoftbridgeError
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.lowering.passes import PASSES
from softbridge.lowering.precision import DTYPES
from softbridge.lowering.steps import Option, Step, Target
from softbridge.plugin.capabilities import EVERYTHING
from softbridge.prompt.soft_prompt import SoftPrompt

Outcome = Literal["exact", "rounding", "conditional", "impossible"]
Further = Callable[[SoftPrompt, Geometry | None], Sequence[Obstacle]]


@dataclass(frozen=True)
class Lowering:
    """A lowered prompt and the steps that led to it."""

    prompt: SoftPrompt
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What all passes together did and met.

    Attributes:
        prompt: lowered as far as it goes, every condition taken as met.
        steps: what was done; conditions among them.
        obstacles: what was met, conditions (the acceptable ones) among them.
        missing: what a pass asked for and was not given, if one did.
    """

    prompt: SoftPrompt
    steps: tuple[Step, ...]
    obstacles: tuple[Obstacle, ...]
    missing: BaseModelError | None

    @property
    def outcome(self) -> Outcome:
        """The outcome of the plan. It must have been made with the base model."""
        if any(not obstacle.acceptable for obstacle in self.obstacles):
            return "impossible"
        kinds = {step.exactness for step in self.steps}
        return "conditional" if "conditional" in kinds else "rounding" if "rounding" in kinds else "exact"


def lower(
    prompt: SoftPrompt,
    target: Target,
    accept: Collection[str] = (),
    further: Further | None = None,
) -> Lowering:
    """Lower a prompt to what a target can express.

    Args:
        prompt: as read.
        target: what it is lowered to.
        accept: names of the conditions that the caller accepts.
        further: obstacles that the target finds by itself in the lowered prompt, beyond its declared capabilities.

    Raises:
        LoweringError: obstacles are left, all of which it carries.
        BaseModelError: a pass needs the base model and it was not given, or the prompt does not fit it.
    """
    _check_names(accept, CONDITIONS, "condition", "accept a condition by the name that a refusal gives it")
    found = plan(prompt, target, further, accept)
    refused = [obstacle for obstacle in found.obstacles if not (obstacle.acceptable and obstacle.name in accept)]
    if refused:
        raise LoweringError(target.name, refused)
    if found.missing is not None:
        raise found.missing
    return Lowering(found.prompt, found.steps)


def plan(prompt: SoftPrompt, target: Target, further: Further | None = None, accept: Collection[str] = ()) -> Plan:
    """The best way through all passes, and what it does and meets; see `lower` for the arguments.

    Raises:
        BaseModelError: the prompt does not fit the base model.
        SoftbridgeError: `target.dtype` is not one of `DTYPES`.
    """
    _check_names(() if target.dtype is None else (target.dtype,), DTYPES, "dtype", "ask for one of these")
    geometry = target.geometry(prompt)
    if geometry is not None:
        check_fits(prompt, geometry)
    # Uniform-cost search: a way costs no less further on, so the first that arrives is the best.
    number = count()
    ways = [(_cost((), (), None, accept), next(number), 0, Plan(prompt, (), (), None))]
    while True:
        _, _, done, way = heapq.heappop(ways)
        if done > len(PASSES):
            return way
        for option in _options(way, done, target, further, geometry):
            conditions = tuple(Step(o.name, "conditional", o.reason) for o in option.obstacles if o.acceptable)
            further_on = Plan(
                option.prompt,
                (*way.steps, *option.steps, *conditions),
                (*way.obstacles, *option.obstacles),
                way.missing or option.missing,
            )
            cost = _cost(further_on.obstacles, further_on.steps, further_on.missing, accept)
            heapq.heappush(ways, (cost, next(number), done + 1, further_on))


def _options(
    way: Plan, done: int, target: Target, further: Further | None, geometry: Geometry | None
) -> Sequence[Option]:
    """How one can go on after so many passes; what the target finds by itself comes last."""
    if done == len(PASSES):
        blocked = way.missing is not None or not all(obstacle.acceptable for obstacle in way.obstacles)
        found = () if further is None or blocked else tuple(further(way.prompt, geometry))
        return [Option(way.prompt, (), found)]
    try:
        return PASSES[done](way.prompt, target)
    except BaseModelError as error:
        return [Option(way.prompt, missing=error)]


def _cost(
    obstacles: Sequence[Obstacle], steps: Sequence[Step], missing: BaseModelError | None, accept: Collection[str]
) -> tuple[int, int, bool, int, int]:
    """What to have least of, the worst first."""
    hard = sum(not obstacle.acceptable for obstacle in obstacles)
    burdens = [(obstacle.name in accept, CONDITIONS[obstacle.name]) for obstacle in obstacles if obstacle.acceptable]
    refused, accepted = (sum(burden for taken, burden in burdens if taken is which) for which in (False, True))
    return hard, refused, missing is not None, accepted, len(steps)


def _check_names(given: Collection[str], known: Collection[str], what: str, remedy: str) -> None:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise SoftbridgeError(
            f"no {what} is called {', '.join(repr(name) for name in unknown)}",
            f"one of {', '.join(sorted(known))}",
            remedy,
        )


def for_model(prompt: SoftPrompt, base: BaseModel, accept: Collection[str] = CONDITIONS) -> SoftPrompt:
    """The prompt with the vectors that make it the same function on the base model as it is run here.

    Raises:
        LoweringError: the files do not say what multiplied the vectors, and `scale` is not accepted.
    """
    if not prompt.inputs or base.scale is None:
        return prompt
    return lower(prompt, Target(base.geometry.model_type, EVERYTHING, base), accept).prompt
