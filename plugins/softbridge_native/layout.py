"""Where the virtual tokens of a call go: the order of a row's real and virtual tokens and of its pads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from softbridge.errors import EngineError
from softbridge.geometry import Stack
from softbridge.prompt import Entry, InputPrompt, Placement, SoftPrompt
from softbridge.template import PLACEHOLDER


def counted(part: InputPrompt) -> int:
    """By how many places the virtual tokens move the tokens behind them, as far as positions are concerned.

    By none where they enter after the positions, or where the caller's rows have places for them.
    """
    return part.length if part.entry == "before" and part.template is None else 0


class Inserted(Protocol):
    """The virtual tokens of one call of a stack.

    Attributes:
        length: P.
        lengths: how many of them each row has, [B, 1], or P where all have the same.
        entry: as in `InputPrompt`.
        placement: as in `InputPrompt`.
        counted: by how many places they move the tokens behind them, [B, 1] or one number; see `counted`.
        behind: whether rows with fewer virtual tokens have their pads behind all; see `Layout`.
        device: where they are.
    """

    length: int
    lengths: int | Tensor
    entry: Entry
    placement: Placement
    counted: int | Tensor
    behind: bool

    @property
    def device(self) -> torch.device: ...

    def __call__(self, like: Tensor) -> Tensor:
        """[1 or B, P, H], as they enter a sequence of such embeddings."""


def layout(inserted: Inserted, mask: Tensor | None) -> Layout:
    """Where the virtual tokens stand in rows with this mask [B, T]; without one no row has pads."""
    first = int(inserted.placement == "after-first-token")
    if mask is None:
        front = torch.full((1, 1), first, device=inserted.device)
    else:
        front = (left_pads(mask) + first).clamp(max=mask.shape[1])
    return Layout(front, inserted.length, inserted.lengths, inserted.behind)


def extended(inserted: Inserted, mask: Tensor) -> Tensor:
    """The mask [B, P + T] of a call from that of its real tokens [B, T], as `Layout.mask` has it.

    It is made at every step of decoding. Where all rows have as many virtual tokens, three shifted copies are enough.
    """
    if isinstance(inserted.lengths, Tensor):
        return layout(inserted, mask).mask(mask)
    pad, length, ahead = nn.functional.pad, inserted.length, int(inserted.placement == "after-first-token")
    begun = pad(mask, (0, length), value=1).cumsum(-1) > 0
    real = pad(begun[:, : mask.shape[1] - ahead], (length + ahead, 0))
    return torch.where(real, pad(mask, (length, 0)), begun.to(mask.dtype))


@dataclass(eq=False)
class Layout:
    """The order of virtual and real tokens in each row.

    Of a row's own columns the first `front` stand in front, then come its virtual tokens, then the others. Rows with
    fewer virtual tokens than P have pads in their stead: in front of all, where a cache grows at the other end, or
    behind all.

    Attributes:
        front: [B or 1, 1]: a row's pads on the left, and its first real token where that comes first.
        length: P.
        lengths: how many virtual tokens each row has, [B, 1], or P.
        behind: whether the pads are behind.
    """

    front: Tensor
    length: int
    lengths: Tensor | int
    behind: bool = False

    @property
    def shift(self) -> Tensor | int:
        """How many pads come before all."""
        return 0 if self.behind else self.length - self.lengths

    def insert(self, real: Tensor, virtual: Tensor) -> Tensor:
        """[B, P + T, ...] from what belongs to real tokens [B or 1, T, ...] and to virtual ones [B or 1, P, ...].

        In pads there is anything valid.
        """
        rows = max(real.shape[0], virtual.shape[0])
        both = torch.cat([part.expand(rows, *part.shape[1:]) for part in (virtual, real)], dim=1)
        column = torch.arange(both.shape[1], device=both.device) - self.shift
        ahead, behind = column < self.front, column >= self.front + self.lengths
        order = column + self.length * ahead - self.front * ~(ahead | behind) + (self.length - self.lengths) * behind
        if isinstance(self.lengths, Tensor):
            order = order.clamp(0, both.shape[1] - 1)
        return take(both, order)

    def mask(self, mask: Tensor) -> Tensor:
        """The mask [B, P + T] from that of the real tokens [B, T]."""
        both = self.insert(mask, mask.new_ones(1, self.length))
        if not isinstance(self.lengths, Tensor):
            return both
        column = torch.arange(both.shape[1], device=both.device) - self.shift
        return both * ((column >= 0) & (column < self.lengths + mask.shape[1]))

    def reserve(self, real: Tensor) -> Tensor:
        """[B, P + T, ...] with anything valid in the places of the virtual tokens: the row's first."""
        return self.insert(real, real[:, :1].expand(-1, self.length, *real.shape[2:]))

    def real(self, both: Tensor) -> Tensor:
        """[B, T, ...] of [B, P + T, ...]: without what belongs to virtual tokens."""
        column = torch.arange(both.shape[1] - self.length, device=both.device)
        return take(both, column + self.lengths * (column >= self.front) + self.shift)


def home(device: torch.device) -> torch.device:
    """Where a tensor is to be that belongs to one on this device: weights that are loaded when needed have none."""
    return torch.device("cpu") if device.type == "meta" else device


def left_pads(mask: Tensor) -> Tensor:
    """How many columns each row has in front of its first real token, [B, 1], from a mask [B, T]."""
    return (mask.cumsum(-1) == 0).sum(-1, keepdim=True)


def take(both: Tensor, order: Tensor) -> Tensor:
    """The columns of [B or 1, N, ...] in the order [B or 1, n]."""
    rows, rest = max(both.shape[0], order.shape[0]), both.shape[2:]
    index = order.view(*order.shape, *[1] * len(rest)).expand(rows, -1, *rest)
    return both.expand(rows, *both.shape[1:]).gather(1, index)  # `take_along_dim` fixes the shapes of an exported graph


def given_tokens(kwargs: Mapping[str, Any]) -> Tensor:
    """The token ids [B, T], or their embeddings [B, T, H], whichever are given."""
    given: Tensor = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return given


def places_of(vectors: Inserted, kwargs: Mapping[str, Any], past: int) -> Tensor:
    """The places [B, T] of a template's virtual tokens, all of which are in the first call of a text."""
    ids = kwargs.get("input_ids")
    if ids is None:
        raise EngineError(
            "'inputs_embeds' were given, and the prompt is a template, whose virtual tokens have no embedding",
            f"'input_ids' with {PLACEHOLDER} in the places of the virtual tokens",
            "fill the template (softbridge.template.Template.fill) and pass the token ids",
        )
    virtual: Tensor = ids == PLACEHOLDER
    expected = 0 if past else vectors.lengths
    wrong = virtual.sum(-1, keepdim=True) != expected
    if torch.compiler.is_compiling():  # a graph has no words for it
        torch._assert_async(~wrong.any(), "the rows do not have the virtual tokens of the template")
    elif bool(wrong.any()):
        numbers = expected.flatten().tolist() if isinstance(expected, Tensor) else [expected]
        raise EngineError(
            f"rows with {', '.join(map(str, virtual.sum(-1).tolist()))} virtual tokens (token id {PLACEHOLDER})",
            f"{', '.join(map(str, numbers))} in each row" + (", as the cache holds the template" if past else ""),
            "fill the template (softbridge.template.Template.fill) for each row",
        )
    return virtual


def filled(vectors: Inserted, places: Tensor, embedded: Tensor) -> Tensor:
    """The embeddings [B, T, H] of words, with the vectors in these places [B, T]."""
    every = vectors(embedded).expand(len(places), -1, -1)
    own = take(every, (places.cumsum(-1) - 1).clamp(0, vectors.length - 1))
    return torch.where(places[..., None], own, embedded)


def origin_of(prompt: SoftPrompt, stack: Stack) -> int:
    """Where the first token of the stack's sequence stands, be it virtual or real."""
    return prompt.positions.start.get(stack, 0) - sum(counted(part) for part in prompt.inputs if part.stack == stack)
