"""What a base model makes of vectors before its first layer: how a prompt moves behind it, and what multiplies it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from softbridge.errors import BaseModelError
from softbridge.geometry import text_part
from softbridge.prompt import Array
from softbridge.tensors import from_torch, to_torch

if TYPE_CHECKING:
    from softbridge.base import BaseModel


def leave_block(base: BaseModel, vectors: Array, first: int) -> Array:
    """What leaves the embedding block when vectors enter it, alone: [P, H], float64.

    The block adds positions and token types and applies a norm; it looks at each token by itself.

    Args:
        base: an encoder with weights.
        vectors: [P, H].
        first: where the first of them stands.

    Raises:
        BaseModelError: there are no weights, or the embedding block is no module of its own.
    """
    import torch

    model = base.weights(torch.float64).base_model
    block = getattr(model, "embeddings", None)
    if block is None:
        raise BaseModelError(
            f"the embedding block of {type(model).__name__} is no module of its own",
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


def measure_scale(config: Any) -> float | None:
    """By what a model multiplies vectors that are given in the place of words, before its first layer.

    Read off a model of one small layer: whatever it adds to them (positions, token types) drops out of the difference
    of two inputs. None: not by one number, as where a norm or a projection lies between.

    Args:
        config: of a model with a decoder and no encoder, or of an encoder.

    Raises:
        BaseModelError: no such model can be built.
    """
    import torch

    from softbridge.base import build, shrink, usual_task

    config = copy.deepcopy(text_part(config))
    task = usual_task(config)
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:1]
    shrink(config, vocab_size=64, intermediate_size=32, n_inner=32, d_ff=32, num_hidden_layers=1)
    model = build(config, task, torch.float64, seed=0)
    width = model.get_input_embeddings().embedding_dim
    rows = torch.randn((1, 3, width), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def entering(vectors: Any) -> Any:
        return model(inputs_embeds=vectors, output_hidden_states=True).hidden_states[0]

    with torch.no_grad():
        one, none, other = (entering(vectors) for vectors in (torch.ones_like(rows), torch.zeros_like(rows), rows))
    if one.shape != rows.shape:
        return None
    scale = float((one - none)[0, 0, 0])
    return scale if torch.allclose(other - none, scale * rows, rtol=1e-9, atol=1e-9) else None


class _Enough(Exception):  # noqa: N818 - no error
    """What is asked for is known, and the layers need not run."""
