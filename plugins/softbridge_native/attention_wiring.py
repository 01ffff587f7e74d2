"""Which modules of a model attend, what they are called with, and why a prefix would not find them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from softbridge.geometry import Geometry, Site
from softbridge_native import wiring
from softbridge_native.anatomy import attention_named, bias_table, layer_numbers, stacks_of
from softbridge_native.attention import dispatches


def wiring_of(model: Any, geometry: Geometry) -> wiring.Wiring | None:
    """What the decoder's attention is called with, if there is a decoder, and it is known."""
    if geometry.decoder is None:
        return None
    stack = stacks_of(model, geometry)["decoder"]
    return wiring.wiring(
        stack, partial(attention_named, model), geometry.is_encoder_decoder, geometry.decoder.attending
    )


def taken_in_turn(model: Any, geometry: Geometry, site: Site) -> str | None:
    """Why a prefix of each layer would not find it: that the layers call the same modules in turn (Zamba's on 4.57)."""
    shape, wired = geometry.site(site), wiring_of(model, geometry) if site == "self" else None
    if shape is None or wired is None or not len(set(wired.called)) < len(wired.called) == len(shape.attending):
        return None
    return f"{len(wired.called)} layers attend, in turn through {len(set(wired.called))} modules that they share"


def wired_otherwise(model: Any, geometry: Geometry, numbered: Mapping[int, nn.Module]) -> Iterator[str]:
    """Why a prefix in attention would not be the one that a cache starts with."""
    wired, heard, layers = wiring_of(model, geometry), list(numbered.values()), len(numbered)
    if wired is None:
        return
    if not set(heard) <= set(wired.called):
        yield f"its layers do not dispatch through transformers' attention interface, {type(heard[0]).__name__} does"
    elif len(wired.layers) > layers:
        yield f"its {layers} layers call their attention {len(wired.layers)} times, each with other keys and values"
    elif None in wired.layers:
        number = wired.layers.index(None)
        yield f"layer {number} attends to other keys and values than its cache holds: it makes them of these"
    elif not set(wired.layers) <= set(numbered):
        yield f"by its configuration layers {list(numbered)} attend, and by its cache layers {list(wired.layers)}"
    elif (size := _of_another_size(geometry, wired)) is not None:
        yield size
    elif wired.single:
        yield "its attention layers take one tensor for keys and for values, and a prefix has two"
    elif wired.biased and bias_table(nn.ModuleList(heard)) is None:
        yield "its attention layers add a bias of their own to the scores of the text's keys, and a prefix has none"
    elif wired.remade:
        yield "its attention layers make their own mask, of keys and values that would lack the prefix"


def _of_another_size(geometry: Geometry, wired: wiring.Wiring) -> str | None:
    """Where attention is of other shapes than its configuration says, under the names that all have (MiMo's)."""
    shape = geometry.site("self")
    for layer, (keys, values) in zip(wired.layers, wired.shapes, strict=True):
        if shape is not None and layer is not None and {keys, values} != {shape.shape(layer)}:
            here = f"layer {layer} attends to keys {list(keys)} and values {list(values)} [heads, width]"
            return f"{here}, and by its configuration to {list(shape.shape(layer))}"
    return None


def attention_modules(model: Any, geometry: Geometry) -> dict[Site, dict[int, nn.Module]]:
    """The attention modules that dispatch, by site and the number of their layer (self before cross, as they run).

    Where they are not as many as the layers that attend, they are numbered as they come.
    """
    stacks = stacks_of(model, geometry)
    found = {name: [m for m in stack.modules() if dispatches(m)] for name, stack in stacks.items()}
    decoder, crossed = found.get("decoder", []), geometry.is_encoder_decoder
    alone = None if crossed else geometry.decoder
    if alone is not None and len(decoder) > len(alone.attending):  # some attend to an encoder, should there be one
        wired = wiring.wiring(
            stacks["decoder"], partial(attention_named, model), crossed=False, numbers=alone.attending
        )
        decoder = decoder if wired is None else list(wired.called)
    sites: dict[Site, list[nn.Module]] = {
        "encoder": found.get("encoder", []),
        "self": decoder[::2] if crossed else decoder,
        "cross": decoder[1::2] if crossed else [],
    }
    return {
        site: dict(zip(layer_numbers(geometry, site, len(heard)), heard, strict=True)) for site, heard in sites.items()
    }
