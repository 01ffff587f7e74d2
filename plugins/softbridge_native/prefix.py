"""A prefix as the attention of one layer meets it: keys, values, a gate, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from softbridge.arrays import from_torch, to_torch
from softbridge.geometry import Site, stack_of
from softbridge.prompt import Gate, KeyValue, SoftPrompt
from softbridge_native.call import Own
from softbridge_native.layout import origin_of
from softbridge_native.shared_prefix import Group


def stand_of(prompt: SoftPrompt, site: Site) -> Stand:
    """How the prompt's prefix of a site stands to the sequence."""
    positions = prompt.positions
    return Stand(origin_of(prompt, stack_of(site)), positions.relative_bias == "skewed", positions.window == "slides")


class LayerGate(nn.Module):
    """The gate of one layer: weight [G, H] and bias [G]; see `softbridge.prompt.part.Gate`."""

    def __init__(self, gate: Gate, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(to_torch(gate.weight).to(device))
        self.bias = nn.Parameter(to_torch(gate.bias).to(device))

    def forward(self, entered: Tensor) -> Tensor:
        """g [B, G] from what enters the attention module [B, Q, H]."""
        return (
            nn.functional.linear(entered, self.weight.to(entered.dtype), self.bias.to(entered.dtype)).sigmoid().mean(1)
        )

    def extract(self) -> Gate:
        return Gate(from_torch(self.weight), from_torch(self.bias))


class Used:
    """The keys and values that a parameterisation made for the running call, or None."""

    def __init__(self) -> None:
        self.pair: tuple[Tensor, Tensor] | None = None


class Nothing:
    """The source of a layer without a prefix; see `Source`."""

    gated = False

    def join(self, entered: Tensor | None, like: Tensor) -> None:
        return None


class LayerPrefix(nn.Module):
    """The prefix of one layer: keys [K, P, D], values [K, P, D] and what gates them, or None.

    The keys and values are parameters, or what a parameterisation made: see `softbridge_native.parameterisation.Made`.
    """

    def __init__(self, pair: KeyValue, stand: Stand, device: torch.device, made: bool) -> None:
        super().__init__()
        self.stand = stand
        for name, array in (("keys", pair.keys), ("values", pair.values)):
            tensor = to_torch(array).to(device)
            if made:
                self.register_buffer(name, tensor, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self.gate = None if pair.gate is None else LayerGate(pair.gate, device)
        self.gated = self.gate is not None
        self.used = Own(Used)
        self.leaves: tuple[Tensor, Tensor] | None = None

    keys: Tensor
    values: Tensor

    def join(self, entered: Tensor | None, like: Tensor) -> Joined:
        groups = (Group(*self(like)),)
        if self.gate is None:
            return Joined(self.stand, groups)
        gates = self.gate(entered)
        return Joined(self.stand, groups, gates=(gates[:, 0], gates[:, -1]))

    def forward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [K, P, D], without the gate."""
        now = self.used.now.pair or self.leaves or (self.keys, self.values)
        keys, values = (part.to(like.device, like.dtype) for part in now)
        return keys, values

    def extract(self, pair: KeyValue) -> KeyValue:
        """The pair as it is now; what a parameterisation makes, as it was given."""
        gate = None if self.gate is None else self.gate.extract()
        if isinstance(self.keys, nn.Parameter):
            pair = KeyValue(from_torch(self.keys), from_torch(self.values))
        return replace(pair, gate=gate)


@dataclass(frozen=True)
class Stand:
    """How a prefix stands to the sequence that it joins, the same for all rows or for each: int and bool, or [B, 1].

    Attributes:
        origin: where the first token of the sequence stands, counted from the first virtual token.
        skewed: AdapterHub's T5 bias: between real tokens, too, keys count the prefix and queries do not.
        slides: whether a sliding window drops virtual tokens.
    """

    origin: int | Tensor
    skewed: bool
    slides: bool | Tensor


class Joined:
    """What joins the keys and values of one call of an attention module.

    Attributes:
        stand: how it stands to the sequence.
        groups: the rows that share a prefix, each row in one of them or in none.
        gates: what multiplies each row's keys and values, [B] each, or None.
        lengths: how many of the P virtual tokens each row has, [B, 1]; None: all.
        index: where rows differ, which of the groups' tokens, one group after the other, a row has: [B, P].
    """

    def __init__(
        self,
        stand: Stand,
        groups: tuple[Group, ...],
        gates: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        self.stand = stand
        self.groups = groups
        self.gates = gates
        self.lengths = lengths
        self.index = index
        keys, values = groups[0].keys, groups[0].values
        #: P.
        self.length = max(group.keys.shape[1] for group in groups)
        #: Heads of the keys and of the values, and their widths.
        self.sizes = (keys.shape[0], values.shape[0], keys.shape[2], values.shape[2])
        #: How many virtual tokens the groups have in sum.
        self.virtual = sum([group.keys.shape[1] for group in groups])
        #: Whether the last query of a text sees all P virtual tokens, whatever window there is.
        self.seen = lengths is None and stand.slides is False

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """`whole` for a batch of so many rows, each [B, K, P, D]."""
        keys, values = self.whole
        return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each [K, P, D], or [B, K, P, D] where rows differ; anything behind what is shorter."""
        if self.index is None:
            keys, values = self.groups[0].keys, self.groups[0].values
        else:
            keys, values = (
                self._gathered(parts) for parts in zip(*((g.keys, g.values) for g in self.groups), strict=True)
            )
        if self.gates is None:
            return keys, values
        of_keys, of_values = (gate[:, None, None, None] for gate in self.gates)
        return keys * of_keys, values * of_values

    def _gathered(self, parts: Sequence[Tensor]) -> Tensor:
        assert self.index is not None
        gathered = torch.cat([*parts], 1).index_select(1, self.index.flatten())
        return gathered.view(len(parts[0]), *self.index.shape, -1).transpose(0, 1)


class Source(Protocol):
    """Where an attention module finds what joins its keys and values."""

    @property
    def gated(self) -> bool:
        """Whether that depends on what enters the module in the running call."""

    def join(self, entered: Tensor | None, like: Tensor) -> Joined | None:
        """What joins in this call; None: nothing.

        Args:
            entered: what entered the module [B, Q, H], where it is kept for a gate.
            like: the call's own keys [B, K, N, D].
        """
