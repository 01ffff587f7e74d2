"""The pass that rounds numbers to a narrower type, and how far it moves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from softbridge import choices
from softbridge.arrays import BFLOAT16, Array, blocks
from softbridge.errors import Obstacle
from softbridge.lowering.steps import ELSEWHERE, Exactness, Option, Step, Target
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, KeyValue, Part
from softbridge.prompt.soft_prompt import SoftPrompt

#: Dtypes that numbers can be stored in on request.
DTYPES: Mapping[str, np.dtype[Any]] = {
    name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in choices.DTYPES
}


#: So large a share of numbers may become 0 in a narrower dtype before that is a condition, and no mere rounding.
FLUSHED = 1e-3


def round_numbers(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Store numbers in the dtype that was asked for, and in one that the target keeps.

    Wider is exact. Narrower is what the caller asked for, or else a condition; either way its error is said. Numbers
    that are too large for it are an obstacle. Where many become 0, that is a condition of its own.
    """
    kept = target.capabilities.dtypes
    arrays = _numbers(prompt)
    steps: list[Step] = []
    found: list[Obstacle] = []
    if target.dtype is not None:
        wanted = DTYPES[target.dtype]
        loss = _loss(arrays, wanted)
        if loss.large:
            return [Option(prompt, (), (Obstacle("dtype", loss.large, "ask for another dtype"),))]
        if any(array.dtype != wanted for array in arrays):
            prompt = as_dtype(prompt, wanted)
            exactness: Exactness = "rounding" if loss.error else "exact"
            note = f"stored in {target.dtype} as asked; numbers change by {loss.error:.1e} of themselves at worst"
            note = f"{note}; {loss.flushed}" if loss.flushed else note
            steps.append(Step("narrow" if loss.error else "dtype", exactness, note))
        if loss.share > FLUSHED:
            found.append(Obstacle("underflow", loss.flushed, "ask for another dtype, or accept it", acceptable=True))
        arrays = _numbers(prompt)
    lost = [array for array in arrays if kept is not None and array.dtype.name not in kept]
    if not lost:
        return [Option(prompt, tuple(steps), tuple(found))]
    loss = _loss(lost, np.dtype(np.float32))
    if loss.large:
        return [Option(prompt, (), (Obstacle("dtype", f"{target.name} keeps float32: {loss.large}", ELSEWHERE),))]
    narrow = as_dtype(prompt, np.dtype(np.float32))
    if loss.error == 0:
        steps.append(Step("dtype", "exact", "stored in float32, which holds every number"))
        return [Option(narrow, tuple(steps), tuple(found))]
    reason = (
        f"{target.name} keeps float32, and the prompt's {lost[0].dtype.name} numbers would be rounded, "
        f"by {loss.error:.1e} of themselves at worst"
    )
    reason = f"{reason}; {loss.flushed}" if loss.flushed else reason
    found.append(Obstacle("dtype", reason, "accept the rounding", acceptable=True))
    return [Option(narrow, tuple(steps), tuple(found))]


def _numbers(prompt: SoftPrompt) -> list[Array]:
    return [array for part in prompt.parts for _, array in part.arrays()]


def as_dtype(prompt: SoftPrompt, dtype: np.dtype[Any]) -> SoftPrompt:
    """The prompt with the numbers of its parts converted to `dtype`. What trained them is left out: it has its own."""

    def converted(part: Part) -> Part:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=part.vectors.astype(dtype))
        if isinstance(part, AdaptionPrompt):
            layers = {n: Adaption(one.vectors.astype(dtype), one.gate.astype(dtype)) for n, one in part.layers.items()}
            return replace(part, layers=layers)
        return replace(part, layers={layer: _pair_as_dtype(pair, dtype) for layer, pair in part.layers.items()})

    with np.errstate(over="ignore"):  # the caller looks at the error first
        return replace(prompt, parts=tuple(converted(part) for part in prompt.parts), training=None)


def _pair_as_dtype(pair: KeyValue, dtype: np.dtype[Any]) -> KeyValue:
    gate = None if pair.gate is None else Gate(pair.gate.weight.astype(dtype), pair.gate.bias.astype(dtype))
    return KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype), gate)


@dataclass(frozen=True)
class _Loss:
    """What storing numbers in a dtype does to them.

    Attributes:
        error: the largest relative change.
        large: what does not fit, in words, or empty.
        flushed: how many numbers become 0, in words, or empty.
        share: how many of the numbers that are not 0 that is.
    """

    error: float
    large: str
    flushed: str
    share: float


def _loss(arrays: Sequence[Array], dtype: np.dtype[Any]) -> _Loss:
    error, numbers, filled = 0.0, 0, 0
    over, gone = _Count(), _Count()
    for (block,) in (one for array in arrays for one in blocks(array)):
        with np.errstate(over="ignore", under="ignore"):
            exact, stored = block.astype(np.float64), block.astype(dtype).astype(np.float64)
            size = np.abs(exact)
            change = np.divide(np.abs(stored - exact), size, out=np.zeros_like(exact), where=size > 0)
        error = max(error, float(change.max(initial=0.0)))
        numbers, filled = numbers + size.size, filled + int(np.count_nonzero(size))
        over.add(~np.isfinite(stored), size)
        gone.add((stored == 0) & (size > 0), size)

    def said(which: _Count, what: str) -> str:
        return f"{which.count} of {numbers} numbers, up to {which.most:.1e}, {what} {dtype.name}" if which.count else ""

    return _Loss(error, said(over, "are too large for"), said(gone, "become 0 in"), gone.count / max(1, filled))


@dataclass
class _Count:
    """How many numbers something is the matter with, and the largest of them."""

    count: int = 0
    most: float = 0.0

    def add(self, which: Array, size: Array) -> None:
        self.count += int(np.count_nonzero(which))
        self.most = max(self.most, float(size.max(initial=0.0, where=which)))
