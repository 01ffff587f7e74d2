"""Say beforehand what a conversion will be: exact, rounding, conditional or impossible, and why.

Nothing is decided here: a prompt of the source's kind is made up for the base model (`softbridge.lowering.examples`),
and the planner is asked, so that what is explained is what will be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from softbridge.base.model import BaseModel
from softbridge.errors import Obstacle, SoftbridgeError, one_of
from softbridge.lowering.examples import METHODS, example
from softbridge.lowering.planner import Outcome, plan
from softbridge.lowering.steps import Step, Target
from softbridge.plugin.registry import format_named


@dataclass(frozen=True)
class Explanation:
    """The outcome of a conversion of one method between two formats, for one base model.

    Attributes:
        source: the format that is read.
        target: the format that is written.
        method: a name in `softbridge.lowering.examples.METHODS`.
        outcome: see `softbridge.lowering.planner.Outcome`.
        steps: what would be done; conditions among them.
        obstacles: what stands against it; empty unless the outcome is impossible.
        held: whether the source's format can hold a prompt of the method at all; if not, the obstacles are its own.
    """

    source: str
    target: str
    method: str
    outcome: Outcome
    steps: tuple[Step, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    held: bool = True

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {**vars(self), "steps": [vars(s) for s in self.steps], "obstacles": [vars(o) for o in self.obstacles]}


def explain(source: str, target: str, method: str, *, base: Any) -> Explanation:
    """The outcome of converting a prompt of this method between two formats.

    Args:
        source: name of the format that is read.
        target: name of the format that is written.
        method: a name in `softbridge.lowering.examples.METHODS`.
        base: whatever `BaseModel.resolve` takes. Its weights are not looked at.

    Raises:
        UnknownFormatError: no installed format has this name.
        BaseModelError: the base model cannot be read.
        SoftbridgeError: `method` is not one of `softbridge.methods.METHODS`, or a format is read only.
    """
    if method not in METHODS:
        raise SoftbridgeError(f"no method is called '{method}'", one_of(METHODS, method), "check the spelling")
    read, written = format_named(source), format_named(target)
    for form in (read, written):
        if not form.encodings:
            raise SoftbridgeError(
                f"'{form.name}' is read, and not written, and what a file of it holds depends on the file",
                "formats that are written",
                "say --from softbridge: what was read is a prompt like any other",
            )
    resolved = BaseModel.resolve(base).imagine()
    prompt = example(method, resolved.geometry, read.capabilities)
    held = plan(prompt, Target(source, read.capabilities, resolved), read.obstacles)
    lacking = tuple(obstacle for obstacle in _refusing(held.obstacles) if not obstacle.accidental)
    if lacking:
        return Explanation(source, target, method, "impossible", (), lacking, held=False)
    if source == target:
        return Explanation(source, target, method, "exact")
    found = plan(held.prompt, Target(target, written.capabilities, resolved), written.obstacles)
    if found.missing is not None:
        raise found.missing
    obstacles = _refusing(found.obstacles)
    return Explanation(source, target, method, found.outcome, () if obstacles else found.steps, obstacles)


#: One small model of each kind of positions: family -> what to call it.
KINDS = {
    "gpt2": "absolute positions (gpt2)",
    "bert": "absolute positions, an encoder (bert)",
    "llama": "rotary positions (llama)",
    "t5": "relative bias, encoder and decoder (t5)",
}


def explanations(source: str, target: str, method: str | None, base: Any) -> list[tuple[str, Explanation]]:
    """(name of the base model, explanation) for one method or, for None, all; one base or, for None, all of `KINDS`.

    Raises:
        SoftbridgeError: `method` is not one of `softbridge.methods.METHODS`; see also `explain`.
    """
    names = list(METHODS) if method is None else [method]
    return [
        (name, explain(source, target, known, base=model)) for known in names for name, model in _bases(base).items()
    ]


def _bases(base: Any) -> dict[str, BaseModel]:
    """What to call it -> base model; one of each of `KINDS` if none is given."""
    from softbridge.base.tiny import tiny_config

    if base is None:
        return {name: BaseModel(tiny_config(family)).imagine() for family, name in KINDS.items()}
    resolved = BaseModel.resolve(base)
    return {resolved.name or resolved.geometry.model_type: resolved}


def _refusing(obstacles: Sequence[Obstacle]) -> tuple[Obstacle, ...]:
    return tuple(obstacle for obstacle in obstacles if not obstacle.acceptable)
