"""Small models and prompts for tests, of this project and of third parties' plugins.

Models are built in process from a configuration and a seed: no hub is ever asked. Weights and prompts are large, so
that attention is far from uniform and a prompt that is dropped or shifted shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from softbridge.base.model import BaseModel
from softbridge.base.tiny import TINY, tiny_config, tiny_model
from softbridge.lowering.examples import random_adaption, random_input_prompt, random_prefix
from softbridge.untrusted import Content
from softbridge.verification.judge import BOUND, FLOAT32_BOUND
from softbridge.verification.probes import make_probes
from softbridge.verification.run import find_float32_regions

__all__ = [
    "TINY",
    "agreement",
    "apart",
    "as_bytes",
    "random_adaption",
    "random_input_prompt",
    "random_prefix",
    "tiny_config",
    "tiny_model",
]


def as_bytes(files: Mapping[str, Content]) -> dict[str, bytes]:
    """What a format's `write` gives, in memory."""
    return {name: bytes(content) for name, content in files.items()}


def agreement(model: Any, **inputs: Any) -> float:
    """How closely two ways to run a prompt on a model agree, relative to the largest number.

    In which order a matrix product is summed depends on its shape, on where its numbers lie in memory and on the
    processor. So nothing but the same calls on the same shapes is equal bit for bit everywhere: all else agrees within
    `BOUND` in float64, and within `FLOAT32_BOUND` where the model itself computes in float32, which is found by running
    it. See `apart`.

    Args:
        model: in float64, without a prompt.
        inputs: what to run it on, if it takes no text.
    """
    if inputs:
        return FLOAT32_BOUND if find_float32_regions(model, inputs) else BOUND
    base = BaseModel.resolve(model)
    regions = find_float32_regions(model, make_probes(base.geometry, model.config, 0, base.task)[0])
    return FLOAT32_BOUND if regions else BOUND


def apart(found: Any, expected: Any) -> float:
    """The largest difference of two tensors of one shape, relative to the largest number expected.

    Raises:
        ValueError: the shapes differ.
    """
    found, expected = (
        np.asarray(one.detach() if hasattr(one, "detach") else one, np.float64) for one in (found, expected)
    )
    if found.shape != expected.shape:
        raise ValueError(f"outputs of shapes {found.shape} and {expected.shape}")
    return float(np.abs(found - expected).max() / np.abs(expected).max())
