"""Small models and prompts for tests, of this project and of third parties' plugins.

Models are built in process from a configuration and a seed: no hub is ever asked. Weights and prompts are large, so
that attention is far from uniform and a prompt that is dropped or shifted shows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softbridge.base.build import build
from softbridge.base.model import BaseModel
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.prompt.part import InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, Positions, SoftPrompt
from softbridge.verification.judge import BOUND, FLOAT32_BOUND
from softbridge.verification.probes import make_probes
from softbridge.verification.run import find_float32_regions

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

#: Family -> settings of its smallest useful configuration. Sizes are all different, so that swapped axes show.
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "llama": {**_DECODER, "num_key_value_heads": 2},
    "qwen3": {**_DECODER, "num_key_value_heads": 2, "head_dim": 12},
    "gpt_neox": {**_DECODER, "rotary_pct": 0.5},
    "bert": {**_DECODER, "num_labels": 5},
    "t5": {
        "vocab_size": 96,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of the smallest useful model of a family (see `TINY`), with changes."""
    from transformers import AutoConfig

    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **TINY[family], **changes}
    if family == "t5":
        settings.setdefault("decoder_start_token_id", 0)
    return AutoConfig.for_model(family, **settings)


def tiny_model(family: str, dtype: Any = None, seed: int = 0, **changes: Any) -> Any:
    """A model of that configuration with large random weights, eager attention, in `dtype` (float64 if None)."""
    import torch

    config = tiny_config(family, **changes)
    return build(config, BaseModel(config).task, dtype or torch.float64, seed)


def random_input_prompt(
    geometry: Geometry, length: int = 5, *, stack: Stack | None = None, seed: int = 0, std: float = 0.8
) -> SoftPrompt:
    """An input prompt with random vectors [P, H] of float32, counted."""
    stack = stack or ("decoder" if geometry.encoder is None else "encoder")
    vectors = np.random.default_rng(seed).normal(0, std, (length, geometry.input_width)).astype(np.float32)
    return SoftPrompt((InputPrompt(vectors, stack),), Positions({stack: length}), BaseId(None, geometry))


def random_prefix(
    geometry: Geometry,
    length: int = 5,
    *,
    sites: tuple[Site, ...] | None = None,
    positions: Positions | None = None,
    seed: int = 0,
    std: float = 0.8,
) -> SoftPrompt:
    """A prefix with random keys and values of float32 in all layers that attend at some sites, counted by default."""
    generator = np.random.default_rng(seed)
    sites = sites or (("encoder",) if geometry.decoder is None else ("self",))
    parts: list[Part] = []
    for site in sites:
        shape = geometry.site(site)
        if shape is None:
            raise ValueError(f"{geometry.model_type} has no site {site!r}")
        layers = {}
        for layer in geometry.attending(site):
            kv_heads, head_dim = shape.shape(layer)
            size = (kv_heads, length, head_dim)
            keys, values = (generator.normal(0, std, size).astype(np.float32) for _ in range(2))
            layers[layer] = KeyValue(keys, values)
        parts.append(KeyValuePrefix(site, layers))
    start = {stack_of(site): length for site in sites if site != "cross"}
    return SoftPrompt(tuple(parts), positions or Positions(start), BaseId(None, geometry))


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
