"""How far a stack's table of positions reaches: tokens beyond it are refused before the stack runs.

Transformers itself raises an IndexError from within an embedding, in the middle of a batch or of a generation, and a
GPU loses its whole process with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.errors import EngineError

#: Where configurations say how many positions there are.
_NUMBERS = (
    "max_position_embeddings",
    "n_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
    "max_source_positions",
    "max_target_positions",
)


def reach(stack: Any, offset: int) -> int | None:
    """How many positions a stack has a row for, or None if it computes them, or makes rows as they are needed.

    A table is known by having as many rows as the configuration names positions, or those and the reserved ones.

    Args:
        stack: the module.
        offset: the row of position 0, where the stack is passed rows; see `placement`.
    """
    numbers = {getattr(stack.config, name, None) for name in _NUMBERS}
    words = stack.get_input_embeddings()
    modules = (module for module in stack.modules() if module is not words)
    return min((found for module in modules for found in _reaches(module, numbers, offset)), default=None)


def counts_pads(stack: Any) -> bool:
    """Whether pads take room, too: each layer has a mask of as many queries and keys as there are positions."""
    numbers = {getattr(stack.config, name, None) for name in _NUMBERS}
    return any(buffer.ndim == 4 and set(buffer.shape[2:]) <= numbers for buffer in stack.buffers())


def _reaches(module: nn.Module, numbers: set[Any], offset: int) -> Iterator[int]:
    if hasattr(module, "make_weights") or hasattr(module, "make_weight"):  # it grows
        return
    if isinstance(module, nn.Embedding):
        reserved = int(getattr(module, "offset", offset))
        if module.num_embeddings in numbers or module.num_embeddings - reserved in numbers:
            yield module.num_embeddings - reserved
    factors: Any = getattr(module, "axial_pos_shape", None)
    if factors is not None:  # a table in factors
        yield prod(factors)
    attributes = {**dict(module.named_buffers(recurse=False)), **vars(module)}
    for name, buffer in attributes.items():
        rows = int(name.endswith("_ids"))  # of positions, or of the types of as many tokens
        if isinstance(buffer, Tensor) and buffer.ndim in (2, 3) and buffer.shape[rows] in numbers:
            yield buffer.shape[rows]


def check(stack: Any, reach: int, count: int, ahead: int | Tensor, mask: Tensor | None) -> None:
    """Raise if tokens would stand beyond the table.

    Args:
        stack: the module.
        reach: see `reach`.
        count: columns of real tokens, those in a cache included.
        ahead: where the first of them stands, in all rows or in each [B, 1].
        mask: of these columns [B, count], where the stack is passed position_ids; else None.
    """
    if (isinstance(ahead, int) and count + ahead <= reach) or torch.compiler.is_compiling():
        return
    # Pads on the left stand nowhere, and those on the right behind the text.
    rows: Any = count if mask is None else count - (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    last = torch.as_tensor(rows + ahead).max()
    if int(last) > reach:
        first = int(torch.as_tensor(ahead).max())
        raise EngineError(
            f"{int(last) - first} tokens, the first of which stands at {first}",
            f"no more than the {reach} positions that {type(stack).__name__} has a table for",
            f"shorten the text to {reach - first} tokens, those to be generated included, or use a shorter prompt",
        )
