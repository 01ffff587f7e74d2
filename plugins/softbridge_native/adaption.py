"""An adaption prompt beside the attention of its layers; what it is: see `softbridge.prompt.AdaptionPrompt`.

A layer's own module projects the vectors. Before it runs on the text it is called with the vectors in the place of its
states, without a cache or a mask, and with rotations that turn by nothing; our attention function, which it ends in,
keeps the keys and values that arrive. So no projection is looked for by a name: fused and quantised ones, and those
with an adapter of their own, run as they are, and gradients reach the vectors through them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.arrays import from_torch, to_torch
from softbridge.base import cache as caches
from softbridge.geometry import Site, Stack, stack_of
from softbridge.prompt import Adaption, AdaptionPrompt, Joins
from softbridge_native.call import Own

_BESIDE = "_softbridge_beside"
#: What modules call their cache beside `softbridge.base.cache.NAMES`: in releases before it had one name.
_CACHES = (*caches.NAMES, "past_key_value", "layer_past")


class LayerAdaption(nn.Module):
    """What one layer has: vectors [P, H] and gate [1 or heads], both trained."""

    def __init__(self, one: Adaption, device: torch.device) -> None:
        super().__init__()
        self.vectors = nn.Parameter(to_torch(one.vectors).to(device))
        self.gate = nn.Parameter(to_torch(one.gate).to(device))

    def extract(self) -> Adaption:
        """The numbers as they are now."""
        return Adaption(from_torch(self.vectors), from_torch(self.gate))


class Adaptions(nn.Module):
    """An adaption prompt: one `LayerAdaption` for each of its layers, on the device of the module that it joins."""

    def __init__(self, part: AdaptionPrompt, devices: Mapping[int, torch.device]) -> None:
        super().__init__()
        self.stack: Stack = stack_of(part.site)
        self.site: Site = part.site
        self.joins: Joins = part.joins
        self.layers = nn.ModuleDict({str(n): LayerAdaption(one, devices[n]) for n, one in part.layers.items()})

    def sources(self) -> Iterator[tuple[int, LayerAdaption]]:
        """Layer number, and what it has."""
        for layer, source in self.layers.items():
            if isinstance(source, LayerAdaption):
                yield int(layer), source

    def extract(self, part: AdaptionPrompt) -> AdaptionPrompt:
        """The part with the numbers as they are now."""
        return replace(part, layers={layer: source.extract() for layer, source in self.sources()})


class Call:
    """What one call of an attention module keeps for its end.

    Attributes:
        watched: whether the module runs on the vectors, and its attention function is to keep what arrives.
        pair: the keys and values [1, K, P, D] that arrived.
        settings: that arrived with them.
        last: what the heads seem to attend to then in the last place; in all others it is nothing.
        sum: what is to be added to the module's output [B, Q, heads · D].
    """

    def __init__(self) -> None:
        self.watched = False
        self.pair: tuple[Tensor, Tensor] | None = None
        self.settings: Mapping[str, Any] = {}
        self.last = 0.0
        self.sum: Tensor | None = None


@dataclass(frozen=True)
class Watch:
    """An attention module that is watched while it projects vectors.

    Attributes:
        names: of the arguments of the module's forward, in their order; its states are the first.
        calls: what the running thread's call keeps.
    """

    names: tuple[str, ...]
    calls: Own[Call] = field(default_factory=lambda: Own(Call), kw_only=True)

    def watches(self, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]) -> Tensor | None:
        """Keep the keys and values of the vectors, and return anything of the right shape; None: this is the text."""
        call = self.calls.now
        if not call.watched:
            return None
        call.pair, call.settings = (key, value), settings
        answer = query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1])
        if call.last:
            answer[:, -1] = call.last
        return answer

    def add(self, output: Tensor, query: Tensor) -> Tensor:
        """What the heads attend to, with what is beside it: nothing."""
        return output


@dataclass(frozen=True)
class Beside(Watch):
    """What an attention module must know of its adaption prompt.

    Attributes:
        source: vectors and gate.
        joins: as in `AdaptionPrompt`. ``module`` is run as ``heads``, which is the same wherever it is run at all: see
            `softbridge_native.projection`.
        off: says whether a module is to run without it.
    """

    source: LayerAdaption
    joins: Joins
    off: Callable[[nn.Module], bool]

    def add(self, output: Tensor, query: Tensor) -> Tensor:
        """What the heads attend to [B, Q, heads, D], with the prompt's sum for queries [B, heads, Q, D]."""
        call = self.calls.now
        pair, call.pair = call.pair, None
        if pair is None:
            return output
        found = attend(query, *pair, self.source.gate).transpose(1, 2)
        if self.joins != "output":
            return output + found
        call.sum = found.flatten(2)
        return output


def attend(query: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """The gated sum [B, heads, Q, D] of values [1, K, P, D] for queries [B, heads, Q, D]; the softmax in float32 at
    least."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (part.to(query.dtype).repeat_interleave(groups, dim=1) for part in (keys, values))
    scores = query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    found: Tensor = (gate.to(query.device, query.dtype)[:, None, None] * weights) @ values
    return found


def beside(module: nn.Module) -> Watch | None:
    """What a module was given by `bind`, or by `watch`."""
    found: Watch | None = module.__dict__.get(_BESIDE)
    return found


def bind(module: nn.Module, source: LayerAdaption, joins: Joins, off: Callable[[nn.Module], bool]) -> list[Any]:
    """Put the prompt beside an attention module; the handles of its hooks. `unbind` undoes the rest."""
    module.__dict__[_BESIDE] = Beside(_names(module), source, joins, off)  # past `nn.Module`: see `attention.bind`
    handles: list[Any] = [module.register_forward_pre_hook(_before, with_kwargs=True)]
    if joins == "output":
        handles.append(module.register_forward_hook(_after))
    return handles


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    module.__dict__.pop(_BESIDE, None)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    here = module.__dict__[_BESIDE]
    if not here.off(module):
        _project(module, here, {**dict(zip(here.names, args, strict=False)), **kwargs}, here.source.vectors)


def _after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    call = module.__dict__[_BESIDE].calls.now
    found, call.sum = call.sum, None
    if found is None:
        return output
    return (output[0] + found, *output[1:]) if isinstance(output, tuple) else output + found


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def watch(module: nn.Module, given: Mapping[str, Any], vectors: Tensor) -> tuple[Call, Any]:
    """What a module makes of vectors [P, H], and its output where its heads attend to zeros, in the last place ones."""
    before, here = beside(module), Watch(_names(module))
    here.calls.now.last = 1.0
    module.__dict__[_BESIDE] = here
    try:
        with torch.no_grad():
            return here.calls.now, _project(module, here, given, vectors)
    finally:
        if before is None:
            unbind(module)
        else:
            module.__dict__[_BESIDE] = before


def _project(module: nn.Module, here: Watch, given: Mapping[str, Any], vectors: Tensor) -> Any:
    """Keep the keys and values that a module makes of vectors [P, H], called as for the text with these arguments."""
    call, states = here.calls.now, given[here.names[0]]
    call.watched = True
    try:
        return module.forward(
            **{**given, **_apart(here.names[0], given, vectors.to(states.device, states.dtype)[None])}
        )
    finally:
        call.watched = False


def _apart(first: str, given: Mapping[str, Any], vectors: Tensor) -> dict[str, Any]:
    """What is other in a call with vectors [1, P, H] than in one with a text."""
    changed: dict[str, Any] = {first: vectors}
    length = vectors.shape[1]
    for name, value in given.items():
        if name in _CACHES or name == "attention_mask":
            changed[name] = None
        elif name == "position_embeddings" and value is not None:
            cos, sin = value
            shape = (*cos.shape[:-3], 1, length, cos.shape[-1])
            changed[name] = (cos.new_ones(shape), sin.new_zeros(shape))
        elif name in ("position_ids", "cache_position") and isinstance(value, Tensor):
            places = torch.arange(length, device=value.device)
            changed[name] = places.expand(*value.shape[:-2], *[1] * (value.ndim > 1), length)
    return changed
