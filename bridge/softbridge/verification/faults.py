"""Faults that a sensitive comparison must notice: each makes a similar, wrong prompt of the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np

from softbridge.base.positions import PositionScheme
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import MOST, SoftPrompt


def faulty_prompts(prompt: SoftPrompt, scheme: PositionScheme) -> Iterator[tuple[str, SoftPrompt | None]]:
    """Name -> the faulty prompt (None: no prompt at all).

    Args:
        prompt: the right one.
        scheme: how the base model knows where its tokens stand. Where its caller can say so, the shift moves the real
            tokens of a prefix by one position; under a relative bias, and for input prompts, the virtual tokens change
            places by one; where neither would make a difference, there is no shift.
    """
    yield "dropped", None
    if prompt.prefixes:
        yield "keys and values swapped", _each(prompt, _swap_keys_and_values)
    if any(len(part.layers) > 1 for part in prompt.layered):
        yield "two layers swapped", _each(prompt, _swap_layers)
    if any((one.gate != 1).any() for part in prompt.adaptions for one in part.layers.values()):
        yield "gates left out", _each(prompt, _ungate)
    if prompt.prefixes and prompt.positions.start and scheme.tellable and scheme.kind != "none":
        start = {stack: (position + 1) % MOST for stack, position in prompt.positions.start.items()}
        yield "shifted by one position", replace(prompt, positions=replace(prompt.positions, start=start))
    elif prompt.parts[0].length > 1 and (prompt.inputs or (prompt.prefixes and scheme.kind == "relative")):
        yield "shifted by one position", _each(prompt, _roll)


def _each(prompt: SoftPrompt, change: Callable[[Part], Part]) -> SoftPrompt:
    return replace(prompt, parts=tuple(change(part) for part in prompt.parts), training=None)


def _swap_keys_and_values(part: Part) -> Part:
    if not isinstance(part, KeyValuePrefix):
        return part
    return replace(
        part, layers={n: replace(pair, keys=pair.values, values=pair.keys) for n, pair in part.layers.items()}
    )


def _swap_layers(part: Part) -> Part:
    if isinstance(part, InputPrompt) or len(part.layers) < 2:
        return part
    layers: dict[int, Any] = dict(part.layers)
    first, last = min(layers), max(layers)
    layers[first], layers[last] = layers[last], layers[first]
    return replace(part, layers=cast("Any", layers))


def _ungate(part: Part) -> Part:
    if not isinstance(part, AdaptionPrompt):
        return part
    return replace(part, layers={n: replace(one, gate=np.ones_like(one.gate)) for n, one in part.layers.items()})


def _roll(part: Part) -> Part:
    if isinstance(part, InputPrompt):
        return replace(part, vectors=np.roll(part.vectors, 1, axis=0))
    if isinstance(part, AdaptionPrompt):  # its vectors have no order
        return part
    layers = {
        layer: replace(pair, keys=np.roll(pair.keys, 1, axis=1), values=np.roll(pair.values, 1, axis=1))
        for layer, pair in part.layers.items()
    }
    return KeyValuePrefix(part.site, layers)
