"""What an encoder makes of vectors before its first layer, where a prompt moves behind that."""

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

    model = base.weights(torch.float64).base_model
    block = getattr(model, "embeddings", None)
    if block is None:
        raise BaseModelError(
            f"the embedding block of {type(model).__name__} is not a module of its own",
            "a model that has one, as encoders do",
            "convert to a target with vectors before the embedding block",
        )
    ahead = np.zeros((first, vectors.shape[1]))
    tokens = to_torch(np.concatenate([ahead, vectors.astype(np.float64)]))[None].to(next(block.parameters()).device)
    left: list[Any] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        left.append(output)
        raise _Enough

    handle = block.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(inputs_embeds=tokens, attention_mask=torch.ones(tokens.shape[:2], device=tokens.device))
    except _Enough:
        pass
    finally:
        handle.remove()
    return from_torch(left[0][0, first:])


class _Enough(Exception):  # noqa: N818 - no error
    """What is asked for is known, and the layers need not run."""
