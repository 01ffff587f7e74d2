"""Facts of the families that llama.cpp runs, and that are proven here: how their keys lie in its cache.

llama.cpp rotates either neighbouring channels (its ``norm`` layout) or channel i with channel i + D/2 (its ``neox``
layout), as transformers does (`llama_model_rope_type` in src/llama-model.cpp). For the first kind its conversion
reorders the rows of ``attn_q`` and ``attn_k`` (`LlamaModel.permute` in conversion/llama.py), so that the keys in the
cache are in that order, too. Values are in transformers' order everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from softbridge.arrays import Array


@dataclass(frozen=True)
class Family:
    """What llama.cpp makes of a family of transformers'.

    Attributes:
        architecture: llama.cpp's name.
        activation: the only one that its graph has, under transformers' names.
        paired: whether it rotates neighbouring channels.
        rotary: whether positions are rotations.
        unit_norms: whether transformers adds 1 to the weights of norms, which llama.cpp's files have added.
        columns: whether transformers stores matrices with a row for each input.
        rescaled: whether it divides each frequency by a factor of its own, where the file has such factors.
        square: whether its heads must fill the hidden size.
        without: settings of transformers' that it does not know.
    """

    architecture: str
    activation: tuple[str, ...] = ("silu", "swish")
    paired: bool = False
    rotary: bool = True
    unit_norms: bool = False
    columns: bool = False
    rescaled: bool = False
    square: bool = False
    without: tuple[str, ...] = ()


#: transformers' `model_type` -> facts.
FAMILIES = {
    "llama": Family("llama", paired=True, rescaled=True),
    "mistral": Family("llama", paired=True, rescaled=True),
    "qwen2": Family("qwen2", square=True),
    "qwen3": Family("qwen3", without=("attention_bias",)),
    "gemma": Family("gemma", ("gelu_pytorch_tanh", "gelu_new"), unit_norms=True, without=("attention_bias",)),
    "gpt2": Family(
        "gpt2",
        ("gelu_new", "gelu_pytorch_tanh"),
        rotary=False,
        columns=True,
        square=True,
        without=("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
}


def paired(keys: Array) -> Array:
    """Keys [..., D] with channel i beside channel i + D/2, as llama.cpp has them where it rotates neighbours."""
    *rest, width = keys.shape
    return keys.reshape(*rest, 2, width // 2).swapaxes(-1, -2).reshape(keys.shape)


def unpaired(keys: Array) -> Array:
    """The inverse of `paired`."""
    *rest, width = keys.shape
    return keys.reshape(*rest, width // 2, 2).swapaxes(-1, -2).reshape(keys.shape)
