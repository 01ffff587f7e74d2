"""The words of a base model: its embedding of tokens, run without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from softbridge.arrays import Array, from_torch
from softbridge.base.model import BaseModel
from softbridge.errors import BaseModelError, few, refusal
from softbridge.geometry import Stack

# Base models


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and without gradients; afterwards every module is in the mode in which it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embed(model: Any, ids: Sequence[int], stack: Stack | None = None) -> Array:
    """Word vectors [N, H] of token ids [N], in the embedding's dtype, as the model's own ``inputs_embeds`` means them.

    That is what the stack's embedding module returns, and not the rows of its table: whether an embedding scale is
    applied inside that module or after it depends on the model and on the release of transformers.

    Raises:
        BaseModelError: this is no model with weights.
        ValueError: an id is not in the vocabulary.
    """
    import torch

    module = _embedding(model, stack)
    size = vocabulary(model, stack)
    wrong = sorted({int(token) for token in ids if not 0 <= token < size})
    if wrong:
        raise refusal(f"token ids {few(wrong)}", f"0 to {size - 1}", "use the tokenizer that belongs to the model")
    with evaluating(module):
        tensor = torch.tensor([int(token) for token in ids], device=next(module.parameters()).device)
        return from_torch(module(tensor[None])[0])


def vocabulary(model: Any, stack: Stack | None = None) -> int:
    """V, the number of words that a stack's embedding knows."""
    return int(getattr(_embedding(model, stack), "num_embeddings", 0) or BaseModel.resolve(model).geometry.vocabulary)


def _embedding(model: Any, stack: Stack | None) -> Any:
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        raise BaseModelError(
            f"word vectors were asked for, of a {type(model).__name__}",
            "a transformers model: they are weights, which no configuration has",
            "load the base model, and pass it",
        )
    geometry = BaseModel.resolve(model).geometry
    if stack is not None and geometry.stack(stack) is None:
        raise BaseModelError(f"{geometry.model_type} has no {stack}", "a stack of the model", "leave 'stack' out")
    if geometry.is_encoder_decoder:
        model = model.get_decoder() if stack == "decoder" else model.get_encoder()
    return model.get_input_embeddings()
