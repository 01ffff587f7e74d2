"""Other numbers for a prompt that is attached and may be in training: what resuming from a checkpoint takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.arrays import Array, to_torch
from softbridge.errors import EngineError
from softbridge.prompt import AdaptionPrompt, InputPrompt, Part, SoftPrompt


def insert(injected: Any, prompt: SoftPrompt) -> None:
    """Copy the prompt's numbers into an `Injection`. What a parameterisation makes follows from its own tensors.

    Raises:
        EngineError: a parameterisation is trained, and the prompt has none.
    """
    trained = injected.parameterisation
    if trained is not None and prompt.training is None:
        raise EngineError(
            f"a prompt without the parameterisation '{trained.state.kind}', which is being trained",
            "a checkpoint that holds it",
            "to train the prompt's own numbers, attach replace(prompt, training=None)",
        )
    pairs = [pair for module, part in zip(injected.parts, prompt.parts, strict=True) for pair in _pairs(module, part)]
    if trained is not None and prompt.training is not None:
        pairs += [(getattr(trained, local), prompt.training.tensors[name]) for name, local in trained.local.items()]
    with torch.no_grad():
        for tensor, array in pairs:
            tensor.copy_(to_torch(array))


def _pairs(module: Any, part: Part) -> Iterator[tuple[Tensor, Array]]:
    """Each parameter of a part's module, with its numbers."""
    if isinstance(part, InputPrompt):
        found = [(module.vectors, part.vectors)]
    elif isinstance(part, AdaptionPrompt):
        ones = list(zip(module.layers.values(), part.layers.values(), strict=True))
        found = [(layer.vectors, one.vectors) for layer, one in ones] + [(layer.gate, one.gate) for layer, one in ones]
    else:
        found = []
        for layer, pair in zip(module.layers.values(), part.layers.values(), strict=True):
            found += [(layer.keys, pair.keys), (layer.values, pair.values)]
            if pair.gate is not None:
                found += [(layer.gate.weight, pair.gate.weight), (layer.gate.bias, pair.gate.bias)]
    return ((tensor, array) for tensor, array in found if isinstance(tensor, nn.Parameter))
