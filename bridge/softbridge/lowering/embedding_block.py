"""What a model makes of vectors before its first layer, where a prompt moves behind that, or in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.errors import BaseModelError

if TYPE_CHECKING:
    from softbridge.base.model import BaseModel


def leave_block(base: BaseModel, vectors: Array, first: int) -> Array:
    """What leaves the embedding block when vectors enter it, alone: [P, H], float64.

    The block adds positions and token types and applies a norm; it looks at each token by itself.

    Args:
        base: an encoder with weights.
        vectors: [P, H].
        first: where the first of them stands.

    Raises:
        BaseModelError: the base model has no weights, or its embedding block is not a module of its own.
    """
    import torch

    model = base.weights(torch.float64, lent=True).base_model
    block = getattr(model, "embeddings", None)
    if block is None:
        raise BaseModelError(
            f"the embedding block of {type(model).__name__} is not a module of its own",
            "a model that has one, as encoders do",
            "convert to a target with vectors before the embedding block",
        )
    return _watched(model, vectors, first, lambda keep: block.register_forward_hook(lambda _, a, output: keep(output)))


def enter_block(base: BaseModel, vectors: Array, first: int) -> Array:
    """What has to enter a decoder alone for these vectors to reach its first layer: [P, H], float64.

    Measured, not known: a model that only adds something to each token (GPT-2 its positions, Llama nothing) is undone
    by taking that away.

    Args:
        base: a model of a decoder alone, with weights.
        vectors: [P, H], as they reach the first layer.
        first: where the first of them stands.

    Raises:
        BaseModelError: the base model has no weights, or does more to a token than to add something.
    """
    import torch

    model = base.weights(torch.float64, lent=True).base_model
    count = None if base.geometry.decoder is None or base.geometry.encoder is not None else base.geometry.decoder.layers
    stacks = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count)
    layers = next(stacks, None)

    def look(keep: Any) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> None:
            keep(args[0] if args else kwargs["hidden_states"])

        assert layers is not None
        return layers[0].register_forward_pre_hook(before, with_kwargs=True)

    added = None if layers is None else _watched(model, np.zeros_like(vectors), first, look)
    reached = None if layers is None else _watched(model, vectors, first, look)
    if added is None or reached is None or np.abs(reached - added - vectors).max() > _ROUNDING * np.abs(vectors).max():
        raise BaseModelError(
            f"{type(model).__name__} does more to a token than to add something, before its first layer",
            "a model of a decoder alone that adds positions, or nothing",
            "convert to a target with vectors behind the embedding block",
        )
    return vectors - added


#: Of a sum and a difference in float64, relative to the largest number.
_ROUNDING = 1e-12


def _watched(model: Any, vectors: Array, first: int, watch: Any) -> Array:
    """What a hook is shown [P, H], float64, when the vectors enter behind so many others; no more of the model runs."""
    import torch

    device = next(model.parameters()).device
    ahead = np.zeros((first, vectors.shape[1]))
    tokens = to_torch(np.concatenate([ahead, vectors.astype(np.float64)]))[None].to(device)
    left: list[Any] = []

    def keep(value: Any) -> None:
        left.append(value)
        raise _Enough

    handle = watch(keep)
    try:
        with torch.no_grad():
            model(inputs_embeds=tokens, attention_mask=torch.ones(tokens.shape[:2], device=device))
    except _Enough:
        pass
    finally:
        handle.remove()
    return from_torch(left[0][0, first:])


class _Enough(Exception):  # noqa: N818 - no error
    """What is asked for is known, and the layers need not run."""
