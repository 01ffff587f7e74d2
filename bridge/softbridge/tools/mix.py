"""Prompts between prompts: averages and interpolations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from softbridge.arrays import Array
from softbridge.errors import refusal
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.tools.alike import check_alike, check_positions, combined_parts, made_of, match

# Mixing


def average(prompts: Sequence[SoftPrompt]) -> SoftPrompt:
    """The mean of prompts, number by number; of copies of one prompt it is that prompt. See `interpolate`."""
    return interpolate(prompts, [1 / max(len(prompts), 1)] * len(prompts))


def interpolate(prompts: Sequence[SoftPrompt], weights: Sequence[float]) -> SoftPrompt:
    """The weighted sum of prompts, number by number, in float64, rounded to their dtype once.

    A prompt of weight 1 among prompts of weight 0 comes back bit for bit, and so does every number in which all
    prompts agree. Negative weights extrapolate.

    Args:
        prompts: of one shape, dtype and position frame.
        weights: one for each, which add up to 1. For two prompts a and b on the way from a to b: ``[1 - t, t]``.

    Raises:
        ValueError: prompts of different parts, shapes, dtypes, positions or heads; weights that are not theirs.
        BaseModelError: prompts for different base models.
    """
    check_alike(prompts)
    check_positions(prompts)
    total = math.fsum(weights)
    if len(weights) != len(prompts) or not abs(total - 1) <= 1e-6:  # not <=, so that NaN is refused
        raise refusal(
            f"{len(weights)} weights, which add up to {total:g}, for {len(prompts)} prompts",
            "one weight for each prompt, adding up to 1",
            "divide the weights by their sum",
        )
    used = [number for number, weight in enumerate(weights) if weight != 0]

    def blend(arrays: Sequence[Array]) -> Array:
        first = arrays[used[0]]
        wide = np.zeros(first.shape)
        for number in used:
            wide += weights[number] * arrays[number].astype(np.float64)
        agreed = np.all([arrays[number] == first for number in used], axis=0)
        return np.where(agreed, first, wide.astype(first.dtype))

    return made_of(prompts, [combined_parts(parts, blend) for parts in match(prompts)])
