"""Say beforehand what a conversion comes to: exact, rounding, conditional or impossible, and why.

Nothing is decided here: a prompt of the source's kind is made up for the base model, and the passes of
`softbridge.lower` are asked, so that what is explained is what will be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from softbridge.base import BaseModel
from softbridge.errors import Obstacle, SoftbridgeError
from softbridge.hookspecs import Format
from softbridge.lower import Outcome, Step, Target, native_positions, plan
from softbridge.prompt import SoftPrompt
from softbridge.registry import format_named

Method = Literal["prompt-tuning", "prefix-tuning"]
METHODS: tuple[Method, ...] = get_args(Method)

#: The length of the prompt that is made up. Reasons that name a length name this one.
LENGTH = 5


@dataclass(frozen=True)
class Explanation:
    """What a conversion of one method between two formats comes to, for one base model.

    Attributes:
        source: the format that is read.
        target: the format that is written.
        method: ``prompt-tuning`` or ``prefix-tuning``.
        outcome: see `softbridge.lower.Outcome`.
        steps: what would be done; conditions among them.
        obstacles: what stands against it; empty unless the outcome is impossible.
    """

    source: str
    target: str
    method: Method
    outcome: Outcome
    steps: tuple[Step, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {**vars(self), "steps": [vars(s) for s in self.steps], "obstacles": [vars(o) for o in self.obstacles]}


def explain(source: str, target: str, method: Method, base: Any) -> Explanation:
    """What converting a prompt of this method between two formats comes to.

    A made-up prompt has no accidental structure: what depends on a prompt's own numbers (layers that happen to repeat)
    is explained for the general case.

    Args:
        source: name of the format that is read.
        target: name of the format that is written.
        method: ``prompt-tuning`` or ``prefix-tuning``.
        base: whatever `BaseModel.resolve` takes.

    Raises:
        UnknownFormatError: there is no such format.
        BaseModelError: the base model cannot be read.
    """
    resolved = BaseModel.resolve(base)
    read, written = format_named(source), format_named(target)
    prompt = _example(read, method, resolved)
    held = plan(prompt, Target(source, read.capabilities, resolved))
    if held.outcome == "impossible":  # there is no such file to convert
        return Explanation(source, target, method, "impossible", (), _refusing(held.obstacles))
    if source == target:
        return Explanation(source, target, method, "exact")
    found = plan(prompt, Target(target, written.capabilities, resolved), written.obstacles)
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
        SoftbridgeError: there is no such method; see also `explain`.
    """
    from softbridge.testing import tiny_config

    if method is not None and method not in METHODS:
        raise SoftbridgeError(f"no method is called '{method}'", f"one of {', '.join(METHODS)}", "check the spelling")
    if base is None:
        bases = {name: BaseModel(tiny_config(family)) for family, name in KINDS.items()}
    else:
        resolved = BaseModel.resolve(base)
        bases = {resolved.name or resolved.geometry.model_type: resolved}
    methods = [known for known in METHODS if method in (None, known)]
    return [(name, explain(source, target, known, model)) for known in methods for name, model in bases.items()]


def _refusing(obstacles: Sequence[Obstacle]) -> tuple[Obstacle, ...]:
    return tuple(obstacle for obstacle in obstacles if not obstacle.acceptable)


def _example(form: Format, method: Method, base: BaseModel) -> SoftPrompt:
    from softbridge.testing import random_input_prompt, random_prefix

    if method == "prompt-tuning":
        return random_input_prompt(base.geometry, LENGTH)
    prompt = random_prefix(base.geometry, LENGTH)
    return replace(prompt, positions=native_positions(prompt, form.capabilities))
