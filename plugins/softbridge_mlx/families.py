"""Which families of transformers mlx-lm runs as the same function, and in which of them it has a sliding window.

A model that transformers runs with a window and mlx-lm without is the same only for shorter texts (Mistral, Gemma 2).
Each row was measured; `tests/serving/test_mlx.py` measures it again.
"""

from __future__ import annotations

from softbridge.geometry import Geometry

#: transformers' name of the family -> whether mlx-lm's model keeps to the window of its layers "sliding_attention".
FAMILIES: dict[str, bool] = {
    "afmoe": True,
    "cohere": False,
    "cohere2": True,
    "ernie4_5": False,
    "gemma": False,
    "gemma3_text": True,
    "glm4": False,
    "gpt2": False,
    "gpt_neox": False,
    "granite": False,
    "granitemoe": False,
    "helium": False,
    "hunyuan_v1_dense": False,
    "llama": False,
    "mistral": False,
    "mixtral": False,
    "nemotron": False,
    "olmo2": False,
    "olmo3": True,
    "olmoe": False,
    "phi": False,
    "phi3": False,
    "qwen2": False,
    "qwen2_moe": False,
    "qwen3": False,
    "seed_oss": False,
    "smollm3": False,
    "stablelm": False,
    "starcoder2": False,
}
#: What layers with a window are called in configurations.
SLIDING = "sliding_attention"


def windows(geometry: Geometry) -> tuple[int | None, ...] | None:
    """The window of each layer in mlx-lm's model, None where it has none; None: the geometry does not say which have.

    A geometry that a prompt's file records does not know the kinds of layers; that of a base model does.
    """
    shape = geometry.decoder
    assert shape is not None  # all of these families are decoders
    if shape.window is None or not FAMILIES.get(geometry.model_type, False):
        return (None,) * shape.layers
    if shape.kinds is None:
        return None
    return tuple(shape.window if kind == SLIDING else None for kind in shape.kinds)


def missed(geometry: Geometry) -> int | None:
    """The window that transformers has in some layers and mlx-lm has not, or None."""
    shape = geometry.decoder
    return None if shape is None or FAMILIES.get(geometry.model_type, False) else shape.window
