"""The pass that rounds numbers to a narrower type, and how far it moves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from softbridge import choices
from softbridge.arrays import BFLOAT16, Array
from softbridge.errors import Obstacle
from softbridge.lowering.steps import Exactness, Option, Step, Target
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, KeyValue, Part
from softbridge.prompt.soft_prompt import SoftPrompt

#: Dtypes that numbers can be stored in on request.
DTYPES: Mapping[str, np.dtype[Any]] = {
    name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in choices.DTYPES
}


def round_numbers(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Store numbers in the dtype that was asked for, and in one that the target keeps.

    Wider is exact. Narrower is what the caller asked for, or else a condition; either way its error is said.
    """
    kept = target.capabilities.dtypes
    arrays = _numbers(prompt)
    steps: list[Step] = []
    if target.dtype is not None:
        wanted = DTYPES[target.dtype]
        error = max(_relative_error(array, wanted) for array in arrays)
        if any(array.dtype != wanted for array in arrays):
            prompt = as_dtype(prompt, wanted)
            exactness: Exactness = "rounding" if error else "exact"
            note = f"stored in {target.dtype} as asked; numbers change by {error:.1e} of themselves at worst"
            steps.append(Step("narrow" if error else "dtype", exactness, note))
        if not np.isfinite(error):
            reason = f"some numbers are too large for {target.dtype}"
            return [Option(prompt, tuple(steps), (Obstacle("dtype", reason, "ask for another dtype"),))]
        arrays = _numbers(prompt)
    lost = [array for array in arrays if kept is not None and array.dtype.name not in kept]
    if not lost:
        return [Option(prompt, tuple(steps))]
    narrow = as_dtype(prompt, np.dtype(np.float32))
    error = max(_relative_error(array, np.dtype(np.float32)) for array in lost)
    if error == 0:
        steps.append(Step("dtype", "exact", "stored in float32, which holds every number"))
        return [Option(narrow, tuple(steps))]
    reason = (
        f"{target.name} keeps float32, and the prompt's {lost[0].dtype.name} numbers would be rounded, "
        f"by {error:.1e} of themselves at worst"
    )
    return [Option(narrow, tuple(steps), (Obstacle("dtype", reason, "accept the rounding", True),))]


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


def _relative_error(array: Array, dtype: np.dtype[Any]) -> float:
    """The largest relative change of a number that is stored in `dtype`; infinite if one no longer fits."""
    exact = array.astype(np.float64)
    with np.errstate(over="ignore"):
        change = np.abs(array.astype(dtype).astype(np.float64) - exact)
    size = np.abs(exact)
    return float(np.max(np.divide(change, size, out=np.zeros_like(change), where=size > 0), initial=0.0))
