"""Calls that an input prompt cannot take part in, refused before anything is run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from softbridge.errors import EngineError
from softbridge_native.flex_and_flash import PACKED
from softbridge_native.layout import Inserted, given_tokens, left_pads


def check_unpacked(kwargs: Mapping[str, Any], mask: Tensor | None) -> None:
    """Refuse several texts in one row, where only the first of them would have the prompt, or all would be one.

    Raises:
        EngineError: positions [B, T] start again among a row's real tokens, or the texts' lengths are given.
    """
    positions = kwargs.get("position_ids")
    packed = [name for name in (*PACKED, "seq_idx") if kwargs.get(name) is not None]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[-1] > 1:
        again = (positions.diff(dim=-1) <= 0) & _pairs(positions, mask)
        if torch.compiler.is_compiling():  # a graph has no words for it
            torch._assert_async(~again.any(), "several texts in one row, with a prompt")
        elif bool(again.any()):
            packed.append("position_ids that start again")
    if packed:
        raise EngineError(
            f"several texts in one row ({', '.join(packed)}), and a prompt that only the first of them would have",
            "one text in each row",
            "leave the texts unpacked (packing=False, padding_free=False), or use a prefix on a model that dispatches "
            "through transformers' attention interface: there each text has it",
        )


#: What is given for each token, and can be for virtual ones.
_INSERTED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def check_others(kwargs: Mapping[str, Any]) -> None:
    """Refuse what is given for each token, and virtual ones have none of.

    Raises:
        EngineError: so much is given (Longformer's classifiers say which tokens attend to all).
    """
    size = given_tokens(kwargs).shape[:2]
    others = [
        name
        for name, value in kwargs.items()
        if isinstance(value, Tensor)
        and value.shape[:2] == size
        and name not in _INSERTED
        # Of another stack, of layers and heads, or for a loss.
        and not name.startswith("encoder_")
        and name != "labels"
        and not name.endswith("head_mask")
    ]
    if others:
        raise EngineError(
            f"{', '.join(others)} for each token, and an input prompt, whose virtual tokens have none",
            f"nothing for each token but {', '.join(_INSERTED)}",
            "use a prefix, or another model",
        )


def check_onward(positions: Tensor, mask: Tensor | None) -> None:
    """Refuse positions of several dimensions that a prompt in front would not move all alike.

    Raises:
        EngineError: in the first of them some token stands before the one in front of it (HunYuan-VL's images do, and
            texts in a row that is packed).
    """
    if positions.ndim < 3:
        return
    back = (positions[0].diff(dim=-1) < 0) & _pairs(positions, mask)
    if torch.compiler.is_compiling():  # a graph has no words for it
        torch._assert_async(~back.any(), "positions that go back")
    elif bool(back.any()):
        raise EngineError(
            f"positions of {len(positions)} dimensions that go back within a row: of an image that is placed by "
            "itself, or of several texts",
            "positions that go on from token to token, all of which a prompt in front moves alike",
            "an input prompt, and no position_ids, so that the model makes its own; generate passes some",
        )


def _pairs(positions: Tensor, mask: Tensor | None) -> Tensor:
    """Of which tokens [B or 1, T - 1] both they and the one in front are real."""
    length = positions.shape[-1]
    if mask is None:
        return torch.ones(1, length - 1, dtype=torch.bool, device=positions.device)
    real = mask[:, -length:] != 0
    return real[:, 1:] & real[:, :-1]


def ready_made() -> EngineError:
    """The refusal of a mask that came ready-made."""
    return EngineError(
        "a ready-made attention mask (not of shape [B, T]), with an input prompt attached",
        "a mask of shape [B, T], or none",
        "pass the tokens' own mask, and use a cache that grows",
    )


def check_no_pads_ahead(stack: Any, mask: Tensor) -> None:
    """Refuse rows with pads on the left, in a stack that would count them."""
    if not torch.compiler.is_compiling() and bool(left_pads(mask).any()):
        raise EngineError(
            f"rows padded on the left, with an input prompt, and {type(stack).__name__} finds pads by their token ids, "
            "which embeddings do not have",
            "rows padded on the right, or not at all",
            "pad on the right, or run the rows one by one",
        )


def kept_within(stack: Any) -> EngineError:
    """The refusal of a cache that a stack keeps to itself."""
    return EngineError(
        f"use_cache=True, and {type(stack).__name__} takes no cache that a call could hand on (it keeps its own), and "
        "does not say which calls go on with a text that has the prompt",
        "calls that read the whole text",
        "use_cache=False",
    )


def all_real(tokens: Tensor, past: int, vectors: Inserted) -> Tensor:
    """The mask [B, N] of these tokens, and of the real ones in a cache of this length, without pads."""
    real = tokens.shape[1] + max(past - vectors.length, 0)
    return torch.ones(tokens.shape[0], real, dtype=torch.long, device=tokens.device)
