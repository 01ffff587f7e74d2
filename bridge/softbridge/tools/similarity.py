"""How alike prompts are (SPoT, Vu et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from softbridge.arrays import Array
from softbridge.choices import Measure as Measure
from softbridge.errors import refusal
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.tools.alike import check_alike, check_positions, match, one_length, unit

# Comparing


def similarity(a: SoftPrompt, b: SoftPrompt, measure: Measure = "average") -> float:
    """How near two prompts are, from -1 to 1. See `similarity_matrix`."""
    return float(similarity_matrix([a, b], measure)[0, 1])


def similarity_matrix(prompts: Sequence[SoftPrompt], measure: Measure = "average") -> Array:
    """How near N prompts are to each other, [N, N], float64, symmetric: for choosing a source task (Vu et al. 2022).

    Each virtual token is one vector e_i. Of an input prompt that is the vector itself. Of a prefix it is all that the
    token brings into attention: its keys, then its values, of all heads, of all layers in rising order, of all sites
    in the first prompt's order, flattened into one vector [sum of 2·K·D] without any weighting, so that sites and
    layers with large numbers decide. Keys are compared in the frame in which they are stored.

    - ``average``: the cosine of the averaged vectors, cos(mean_i a_i, mean_j b_j). A prompt has 1 with itself.
    - ``pairwise``: the average of the pairwise cosines, mean_ij cos(a_i, b_j). A prompt has 1 with itself only if all
      of its vectors point the same way; the measure counts how concentrated prompts are, too.

    Lengths may differ, save for prefixes where that puts the keys into different frames. A vector of zeros has
    cosine 0 with everything.

    Raises:
        ValueError: the prompts are of different parts, widths or frames, or a prompt's parts differ in length.
    """
    if measure not in get_args(Measure):
        raise refusal(f"measure {measure!r}", " or ".join(get_args(Measure)), "choose one")
    check_alike(prompts, lengths=False, dtypes=False)
    if prompts[0].prefixes:
        check_positions(prompts)
    summaries = []
    for prompt, parts in zip(prompts, zip(*match(prompts), strict=True), strict=True):
        one_length(prompt)
        rows = np.concatenate([rows_of(part) for part in parts], axis=1)
        summary = unit(rows).mean(axis=0) if measure == "pairwise" else unit(rows.mean(axis=0, keepdims=True))[0]
        summaries.append(summary)
    stacked = np.stack(summaries)
    cosines: Array = stacked @ stacked.T
    return (cosines + cosines.T) / 2


def rows_of(part: Part) -> Array:
    """What each virtual token is to `similarity_matrix`: [P, width], float64."""
    match part:
        case InputPrompt():
            rows = part.vectors
        case AdaptionPrompt():  # without the gates, which are no virtual token's
            rows = np.concatenate([one.vectors for one in part.layers.values()], axis=1)
        case _:
            rows = _prefix_rows(part)
    return rows.astype(np.float64)


def _prefix_rows(part: KeyValuePrefix) -> Array:
    """[P, sum of 2·K·D]: what each virtual token brings, for layers that may be ragged (unlike `flat`)."""
    arrays = [array for _, array in part.arrays()]
    return np.concatenate([array.transpose(1, 0, 2).reshape(part.length, -1) for array in arrays], axis=1)
