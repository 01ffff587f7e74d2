"""Base models of a few thousand weights, for tests and demonstrations."""

from __future__ import annotations

from typing import Any

from softbridge.base.build import build
from softbridge.base.model import BaseModel

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
