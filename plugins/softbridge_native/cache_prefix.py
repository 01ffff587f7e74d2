"""A prefix in the key/value cache, for decoders whose attention does not dispatch through transformers' interface.

There the cache is the only way in. It is the same function where every layer has a prefix of its own in the cache's
shape, no gate and no window is on it, and the virtual tokens are counted as the cache counts them. So PEFT runs every
prefix; it is done here only where nothing better can be.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import StackGeometry
from softbridge.prompt import KeyValuePrefix
from softbridge_native.cache_view import hide
from softbridge_native.call import Own, past_hooks
from softbridge_native.call_checks import check_unpacked
from softbridge_native.layout import Layout, given_tokens, left_pads
from softbridge_native.prefix import LayerPrefix


class Call:
    """Whether the running call has a cache that its caller wants none of."""

    def __init__(self) -> None:
        self.unasked = False


class Seed:
    """The prefix of a decoder, which the cache starts with.

    Args:
        layers: of all layers, in order.
        padded: whether the model takes from the mask how far tokens are apart, so that pads may come between.
    """

    def __init__(self, layers: Sequence[LayerPrefix], padded: bool) -> None:
        self.layers = tuple(layers)
        self.padded = padded
        self.length = int(self.layers[0].keys.shape[1])
        self.call: Own[Call] = Own(Call)

    def plant(self, stack: Any, kwargs: dict[str, Any], mask: Tensor | None, past: int, owner: str) -> None:
        """Start the cache of a call with the prefix, and let the mask cover it."""
        if stack.training and any(getattr(module, "gradient_checkpointing", False) for module in stack.modules()):
            raise EngineError(
                f"gradient checkpointing, and a prefix that {type(stack).__name__} can find in its cache only",
                "training without gradient checkpointing, which runs layers again with a cache that has grown",
                "model.gradient_checkpointing_disable(), or an input prompt",
            )
        tokens = given_tokens(kwargs)
        check_unpacked(kwargs, mask)
        kwargs.pop("cache_position", None)  # counted without the prefix; the model counts its cache
        if mask is not None:
            if not self.padded and bool(left_pads(mask).any()):
                raise EngineError(
                    f"rows padded on the left, and {type(stack).__name__} counts pads between the prefix and the text",
                    "rows padded on the right, or not at all",
                    "pad on the right, run the rows one by one, or use an input prompt",
                )
            nowhere = torch.zeros(1, 1, dtype=torch.long, device=mask.device)
            kwargs["attention_mask"] = Layout(nowhere, self.length, self.length).mask(mask)
        call = self.call.now
        call.unasked = False
        if past:
            return
        cache = caches.given(kwargs)
        if cache is None:
            cache = DynamicCache()
            kwargs |= caches.handed(stack.forward, cache)
            call.unasked = kwargs.get("use_cache") is False
        if not isinstance(cache, DynamicCache):
            raise EngineError(
                f"a {type(cache).__name__}, and a prefix that {type(stack).__name__} can find in its cache only",
                "a cache that grows, or none",
                f"leave 'cache_implementation' and '{caches.name_given(kwargs)}' out",
            )
        like = torch.empty(0, dtype=stack.dtype)
        for number, layer in enumerate(self.layers):
            numbers = (part.expand(tokens.shape[0], -1, -1, -1) for part in layer(like.to(layer.keys.device)))
            cache.update(*numbers, number)
        hide(cache, self.length, owner)

    def take_back(self, output: Any) -> None:
        """Keep a cache from a caller who wants none: `generate` would go on with it."""
        call = self.call.now
        if call.unasked:
            call.unasked = False
            caches.drop(output)


def reasons(stack: Any, shape: StackGeometry, part: KeyValuePrefix, start: int, tellable: bool) -> Iterator[str]:
    """Why a prefix in the cache of this decoder would not be the same function."""
    if shape.stateful:
        yield "some of its layers keep a state of the text, which a cache that is started cannot hold"
        return
    if set(part.layers) != set(range(shape.layers)):
        yield "a prefix in the cache is in every layer"
    if part.gated:
        yield "a gate cannot reach a prefix in the cache"
    if shape.window is not None:
        yield "its window counts pads"
    if start != part.length and not tellable:
        yield f"its cache counts the virtual tokens, so that the first token stands at {part.length}, not at {start}"
    held = _held(stack)
    if held is None:
        yield "it keeps no key/value cache that can be started"
    for layer, pair in part.layers.items():
        expected = [pair.keys.shape[0], pair.keys.shape[2]]
        if held is not None and held[min(layer, len(held) - 1)] != [expected, expected]:
            yield f"layer {layer} keeps {held[min(layer, len(held) - 1)]} [heads, width] in its cache, not {expected}"
            return


def padded(stack: Any) -> bool:
    """Whether the stack takes position_ids, or takes distances from the mask (BLOOM's and Falcon's ALiBi)."""
    return "position_ids" in inspect.signature(stack.forward).parameters or hasattr(stack, "build_alibi_tensor")


def _held(stack: Any) -> list[list[list[int]]] | None:
    """What each layer keeps of one token: heads and width of keys and of values.

    None if it keeps nothing, or cannot go on from there with more than one token.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=stack.get_input_embeddings().weight.device)
    cache, training = DynamicCache(), stack.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            given = {"use_cache": True, **caches.handed(stack.forward, cache)}
            past_hooks(stack.eval())(token, **given)  # of a bank
            layers = getattr(cache, "layers", [])
            held = [[getattr(layer, name, None) for name in ("keys", "values")] for layer in layers]
            past_hooks(stack)(token.expand(1, 2), **given)
            if cache.get_seq_length() != 3:  # XLM takes what it is given for the whole text, and cuts it
                return None
    except Exception:  # foreign code; nothing is known
        return None
    finally:
        stack.train(training)
    if not held or not all(isinstance(t, Tensor) and t.ndim == 4 and t.shape[2] == 1 for pair in held for t in pair):
        return None
    return [[[t.shape[1], t.shape[3]] for t in pair if t is not None] for pair in held]
