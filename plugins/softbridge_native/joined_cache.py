"""Layers of a cache that keep a prefix in front of their keys and values, and show the real ones alone.

A step of decoding would put a short prefix in front of the layer's keys anew, at every layer. Here the cache grows what
is joined already: from the first call on, where the caller gives a cache that has its layers. All that asks a layer for
its keys, or sets them (lengths, crops, beams that change places), has to do with real tokens; only `update`, whose
answer goes into attention, hands the whole over, and tells the attention function so. What is kept is the prefix as it
was when the text began, like the keys behind it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from softbridge_native.call import Own
from softbridge_native.prefix import Joined, Source
from softbridge_native.shared_prefix import SHORTEST, TEXT, pays

#: So many masks are kept of one call: models have one for each kind of layer.
MASKS = 4

#: Of a cache: for the calls of which model its layers keep a prefix.
_KEPT = "_softbridge_kept"


class Running:
    """What the layers of the running call, in this thread, need to know of each other; forgotten where one begins.

    Attributes:
        mark: what the prefixes are known by that the layers of a cache keep in the call, or None: they keep none.
        layers: number of a layer that handed over joined keys, until attention takes them -> the layer.
        masks: those that were made, by all that they were made of.
    """

    def __init__(self) -> None:
        self.mark: object = None
        self.layers: dict[int, JoinedLayer] = {}
        self.masks: dict[Hashable, tuple[Any, Tensor | None]] = {}

    def forget(self) -> None:
        """A call begins, or is over."""
        self.mark = None
        self.layers.clear()
        self.masks.clear()


class JoinedLayer(DynamicLayer):  # type: ignore[misc]
    """A `DynamicLayer` that became one which keeps a prefix. A copy is a `DynamicLayer` again.

    Attributes:
        source: of the prefix.
        number: of the layer.
        running: where attention is told what it is given.
        apart: whether attention can run in two parts.
        mark: what the prefixes were known by when the source was last asked for one.
        prefix: what the source gave then; None: the layer keeps none, and attention joins it.
        whole: keys and values [B, K, P + N, D], or None: nothing is joined yet.
        plain: keys and values [B, K, N, D], where nothing is joined.
    """

    source: Source
    number: int
    running: Own[Running]
    apart: bool
    mark: object
    prefix: Joined | None
    whole: tuple[Tensor, Tensor] | None
    plain: list[Any]

    @property
    def keys(self) -> Any:
        return self._real(0)

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._set(0, keys)

    @property
    def values(self) -> Any:
        return self._real(1)

    @values.setter
    def values(self, values: Any) -> None:
        self._set(1, values)

    def _real(self, half: int) -> Any:
        if self.whole is None or self.prefix is None:
            return self.plain[half]
        return self.whole[half][:, :, self.prefix.length :]

    def _set(self, half: int, numbers: Any) -> None:
        self._part()
        self.plain[half] = numbers

    def _part(self) -> None:
        if self.whole is not None:
            self.plain, self.whole = [self._real(0), self._real(1)], None

    def get_seq_length(self) -> int:
        """How many real tokens the layer holds."""
        if self.whole is None or self.prefix is None:
            return int(super().get_seq_length())
        return self.whole[0].shape[2] - self.prefix.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values [B, K, T, D], and return all for attention, [B, K, N, D] or [B, K, P + N, D]."""
        running, whole = self.running.now, self.whole
        if running.mark is not self.mark:
            self._begin(running.mark, key_states)
            whole = None
        prefix = self.prefix
        if whole is None or prefix is None:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            if prefix is None or (self.apart and key_states.shape[2] >= TEXT):  # attention may do better itself
                return found
            keys, values = prefix.rows(len(key_states))
            self.whole = whole = torch.cat((keys, found[0]), 2), torch.cat((values, found[1]), 2)
            self.plain = []
        else:
            self.whole = whole = torch.cat((whole[0], key_states), 2), torch.cat((whole[1], value_states), 2)
        running.layers[self.number] = self
        return whole

    def _begin(self, mark: object, like: Tensor) -> None:
        self._part()
        self.mark, self.prefix = mark, None if mark is None else self.source.join(None, like)
        last = like[:, :, -1:]  # a cache is kept for the steps to come, of one token each
        if self.apart and self.prefix is not None and self.prefix.virtual >= SHORTEST:
            self.prefix = None if pays(self.prefix.groups, last, last) else self.prefix

    def __reduce__(self) -> tuple[Any, ...]:
        own = (*JoinedLayer.__annotations__,)
        state = {name: value for name, value in vars(self).items() if name not in own}
        return _plain, ({**state, "keys": self.keys, "values": self.values},)


def _plain(state: Mapping[str, Any]) -> Any:
    layer = DynamicLayer.__new__(DynamicLayer)
    vars(layer).update(state)
    return layer


def keep(cache: Any, sources: Mapping[int, Source], running: Own[Running], mark: object, apart: bool) -> None:
    """Let the layers of a cache keep their prefix in the running call, if they grow by nothing but concatenation.

    Args:
        cache: any; what it was kept for before, by the same model or another, is forgotten.
        sources: by the number of the layer.
        running: where the model's attention is told what it is given.
        mark: one and the same object as long as the sources give the same prefixes.
        apart: whether the model's attention can run in two parts.
    """
    cache = getattr(cache, "self_attention_cache", cache)
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    running.now.mark = mark
    if vars(cache).get(_KEPT) is running or len(cache.layers) <= max(sources):  # it adds layers as it meets them
        return
    for number, source in sources.items():
        layer = cache.layers[number]
        if type(layer) not in (DynamicLayer, JoinedLayer):
            continue
        state = {"plain": [layer.keys, layer.values], "source": source, "number": number, "running": running}
        state["apart"] = apart
        for name in ("keys", "values"):
            vars(layer).pop(name, None)
        vars(layer).update(state, mark=None, prefix=None, whole=None)
        layer.__class__ = JoinedLayer
    vars(cache)[_KEPT] = running
