"""Masks other than a tensor of scores: how a prefix is made visible to flex attention, and to flash attention.

Flex attention gets a function that says which keys a query sees. Flash attention gets the mask of padding, and sees
the past of the last keys; so virtual tokens in front of a row's keys are seen by all of its queries. No kernel of flash
attention was run with this so far: its tests compute what its documentation says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from softbridge.errors import EngineError

if TYPE_CHECKING:
    from softbridge_native.prefix import Joined

_LENGTHENED = "_softbridge"

#: Where several sequences in one row begin and end; transformers takes these instead of a mask.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")


def lengthened(
    mask: BlockMask, joined: Joined, query: Tensor, real: int, window: int | None, positions: Tensor | None
) -> BlockMask:
    """The mask with P columns in front: visible, unless a window slid past them.

    All layers that are given one mask get the same in return: it is kept with the one that arrived, and goes with it.

    Args:
        mask: of N real keys.
        joined: what is put in front of them.
        query: [B, heads, Q, D].
        real: N.
        window: what slides, in tokens, or None.
        positions: where the queries stand, at the end of [B or 1, >= Q], if there is a window.

    Raises:
        EngineError: the mask is of other queries; a slice of a mask forgets what it is a slice of.
    """
    rows, length = len(query), query.shape[2]
    if mask.seq_lengths[0] != length:
        raise EngineError(
            f"flex attention got a mask for {mask.seq_lengths[0]} queries, and this layer has {length}",
            "a mask for the queries of the layer",
            "use model.set_attn_implementation('sdpa')",
        )
    lengths, slides = joined.lengths, joined.stand.slides
    kept = vars(mask).setdefault(_LENGTHENED, {})
    # The layers of a bank have tensors of their own for what is the same in all.
    values = tuple(tuple(each.flatten().tolist()) if isinstance(each, Tensor) else each for each in (lengths, slides))
    key = (joined.length, real, window, values, None if positions is None else id(positions))
    if key not in kept:
        prefix, sees = joined.length, mask.mask_mod
        own = None if lengths is None else lengths[:, 0]
        stands = None if positions is None else positions[:, -length:].expand(rows, -1).contiguous()
        slid = slides[:, 0] if isinstance(slides, Tensor) else None

        def both(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            virtual = key < prefix
            if own is not None:
                virtual = virtual & (key < own[row])
            if stands is not None and window is not None:
                near = stands[row, query] - key < window
                virtual = virtual & (near if slid is None else near | ~slid[row])
            # What asks for the padding of a key that is not there would read past its tensor.
            return virtual | ((key >= prefix) & sees(row, head, query, (key - prefix).clamp(min=0)))

        each = mask.shape[0] if own is None and stands is None else rows
        # Compiled, it never holds whether each query sees each key, only what that comes to in blocks.
        make = torch.compile(create_block_mask)
        made = make(both, each, mask.shape[1], length, prefix + real, query.device, mask.BLOCK_SIZE)
        kept[key] = made, positions  # held, so that no other tensor gets its id
    found: BlockMask = kept[key][0]
    return found


def packing(joined: Joined, mask: Tensor | None, settings: Mapping[str, Any], rows: int, real: int) -> Tensor | None:
    """The padding mask [B, P + N], built from that of the real keys [B, <= N]. None if no mask is needed.

    Raises:
        EngineError: the rows hold several sequences each, or the mask is of another form.
    """
    if mask is None:
        if any(settings.get(name) is not None for name in PACKED) or _restarts(settings.get("position_ids"), rows):
            raise EngineError(
                "several sequences packed into one row, in flash attention",
                "one sequence in each row: only the first of them would see the prefix",
                "pass them as rows of a padded batch, or use model.set_attn_implementation('sdpa')",
            )
        if joined.lengths is None:
            return None
        mask = torch.ones(rows, real, dtype=torch.bool, device=joined.lengths.device)
    if mask.ndim != 2:
        raise EngineError(
            f"a mask of {mask.ndim} dimensions for flash attention, as this model makes it",
            "one of shape [B, N], which says what is padding",
            "use model.set_attn_implementation('sdpa')",
        )
    prefix = torch.arange(joined.length, device=mask.device)[None]
    virtual = prefix >= 0 if joined.lengths is None else prefix < joined.lengths
    return torch.cat([virtual.expand(rows, -1).to(mask.dtype), mask], dim=1)


def _restarts(positions: Tensor | None, rows: int) -> bool:
    """Whether transformers would take these positions [1, Q] for those of several sequences, and cut them there."""
    if positions is None or rows > 1 or positions.shape[-1] == 1:
        return False
    return bool((positions.diff(dim=-1) != 1).any())


class _Otherwise:
    """An object, but with other attributes in the place of some of its own."""

    def __init__(self, base: Any, **instead: Any) -> None:
        self.__dict__.update(instead, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def by_name(module: nn.Module, implementation: str) -> Any:
    """The attention module as transformers' flash attention is to see it: it loads the kernel that its config names."""
    return _Otherwise(module, config=_Otherwise(module.config, _attn_implementation=implementation))
