"""How training produced a prompt: the parameterisations, each evaluated here and dropped ("ejected").

A model never sees any of this. A `Training` keeps a parameterisation's own tensors, so that training can go on;
`materialise` computes the prefix that they stand for, with the operations that the toolkits themselves use, in the
dtype in which they are stored, so that the result is theirs bit for bit.

Kinds:

``mlp`` (Li & Liang 2021, https://arxiv.org/abs/2101.00190): keys and values are a two-layer perceptron over a small
embedding. Settings: ``non_linearity`` (transformers' name of an activation, or ``leakyrelu``), ``dropout`` (rate, on
the keys and values, in training only), ``bottleneck_size`` M. Tensors, for each site: ``{site}.embedding`` [P, E],
``{site}.hidden.weight`` [M, E], ``{site}.hidden.bias`` [M], ``{site}.output.weight`` [2·L·K·D, M] and
``{site}.output.bias`` [2·L·K·D], where L counts the prefixed layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from softbridge.geometry import Site
from softbridge.prompt import Array, KeyValuePrefix, Training
from softbridge.tensors import from_torch, to_torch

if TYPE_CHECKING:
    import torch

#: The tensors that the kind ``mlp`` has for each site.
MLP_TENSORS = ("embedding", "hidden.weight", "hidden.bias", "output.weight", "output.bias")


def materialise(training: Training, site: Site, layers: Sequence[int], kv_heads: int, head_dim: int) -> KeyValuePrefix:
    """The prefix of one site: [K, P, D] keys and values of each of the L layers.

    Raises:
        ValueError: the kind is unknown, or its settings or shapes are not what it documents.
    """
    if training.kind != "mlp":
        raise ValueError(f"no parameterisation is called {training.kind!r}")
    tensors = [training.tensors[f"{site}.{name}"] for name in MLP_TENSORS]
    flat = _mlp(training.settings["non_linearity"], *tensors)
    return KeyValuePrefix.from_flat(site, flat, tuple(layers), kv_heads, head_dim)


def activation(name: str) -> Any:
    """The function of that name.

    Raises:
        ValueError: there is none.
    """
    import torch
    from transformers.activations import ACT2FN

    if name == "leakyrelu":
        return torch.nn.functional.leaky_relu
    if name not in ACT2FN:
        raise ValueError(f"no activation is called {name!r}; known are leakyrelu, {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


def _mlp(
    non_linearity: str, embedding: Array, weight: Array, bias: Array, output_weight: Array, output_bias: Array
) -> Array:
    """[P, 2·L·K·D]."""
    import torch
    from torch.nn.functional import linear

    function = activation(non_linearity)
    with torch.no_grad():
        hidden: torch.Tensor = function(linear(to_torch(embedding)[None], to_torch(weight), to_torch(bias)))
        return from_torch(linear(hidden, to_torch(output_weight), to_torch(output_bias))[0])
