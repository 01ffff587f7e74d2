"""Which self-attention a module of a base model is, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry, Site, Stack

#: The ends of the names of self-attention modules; ``layer.0`` is T5's layer around one.
ENDS = ("attn", "attention", "self_attn", "SelfAttention", "layer.0")


def place_of(name: str, geometry: Geometry) -> tuple[Site, int]:
    """Site and layer of a self-attention module, such as ``decoder.block.2.layer.0.SelfAttention``.

    Raises:
        CheckpointError: the name is that of another module, or of one that the base model does not have.
    """
    before, number, after = _split(name)
    told = [stack for stack in _stacks(geometry) if stack in before or not geometry.is_encoder_decoder]
    shape = geometry.stack(told[0]) if len(told) == 1 else None
    attends = f".{'.'.join(after)}".endswith(tuple(f".{end}" for end in ENDS))
    if not attends or shape is None or number >= shape.layers:
        raise CheckpointError(
            f"a prefix at {name!r:.80}, which is no self-attention of this {geometry.model_type}",
            "a module of the base model",
            "check --base",
        )
    return "encoder" if told == ["encoder"] else "self", number


def shape_of(site: Site, layer: int, geometry: Geometry) -> tuple[int, int]:
    """(K, D) at a place that the base model has."""
    shape = geometry.site(site)
    assert shape is not None
    return shape.shape(layer)


def alike(name: str, geometry: Geometry) -> Sequence[str]:
    """The names of the modules that are in their layers what this one is in its own, in the order of models: encoder
    first."""
    before, _, after = _split(name)
    variable = get_args(Stack) if geometry.is_encoder_decoder else ()
    return [
        ".".join([*(stack if word in variable else word for word in before), str(number), *after])
        for stack in _stacks(geometry)
        if (shape := geometry.stack(stack)) is not None
        for number in range(shape.layers)
    ]


def _stacks(geometry: Geometry) -> list[Stack]:
    return [stack for stack in get_args(Stack) if geometry.stack(stack) is not None]


def _split(name: str) -> tuple[list[str], int, list[str]]:
    """The words before the number of the layer, the number, the words behind it."""
    words = name.split(".")
    at = next((index for index, word in enumerate(words) if word.isdecimal() and len(word) < 6), len(words))
    return words[:at], int(words[at]) if at < len(words) else 0, words[at + 1 :]
