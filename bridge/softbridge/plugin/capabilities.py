"""What a format or an engine can express, declared as data, so that lowering can plan instead of trying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from softbridge.geometry import Site, Stack
from softbridge.prompt.part import Entry, Joins, Placement
from softbridge.prompt.soft_prompt import RelativeBias, Window

Start = Literal["counted", "zero"]


@dataclass(frozen=True)
class Capabilities:
    """What can be expressed. `None` where the choice is free; an empty set where nothing of the kind can.

    Attributes:
        inputs: (stack, entry, placement) of the input prompts that can be expressed.
        input_start: where the first real token stands when the toolkit runs an input prompt: at P (``counted``), at 0
            (``zero``), or wherever the prompt says (None).
        prefix_sites: sites of the key/value prefixes that can be expressed.
        prefix_start: where the first real token stands when the toolkit runs a prefix: at P (``counted``), at 0
            (``zero``), or wherever the prompt says (None).
        gates: whether a prefix may have gates.
        adaption: where the sum of an adaption prompt's values may be added; see `softbridge.prompt.AdaptionPrompt`.
        every_layer: whether a prefix must have every layer of its site.
        ragged: whether layers may differ in the number and the size of their heads.
        parts: how many parts there may be at once, or None for any number.
        positions_told: whether the toolkit lets its caller move the tokens (``position_ids``), so that another start
            is a condition on the caller and not an impossibility.
        relative_bias: how a T5-like bias sees the prefix, or None for any. Where it is ``plain``, every layer has it.
        window: whether a sliding window drops virtual tokens, or None for any.
        training: kinds of parameterisation that are kept, or None for any.
        dtypes: names of the dtypes that the toolkit keeps when it loads a prompt, or None for any.
        head: whether tensors that ride along are kept.
        left_pads: whether pads on the left of a row leave its results as they are.
        trains_through: kinds of parameterisation that an engine trains a prompt through, or None for any. It trains the
            prompt's own numbers in any case.
        quantised: whether transformers' trainer takes what an engine makes of a quantised base model.
        model_types: families that the toolkit can run at all, or None if it names none.
    """

    inputs: frozenset[tuple[Stack, Entry, Placement]] = frozenset()
    input_start: Start | None = None
    prefix_sites: frozenset[Site] = frozenset()
    prefix_start: Start | None = None
    gates: bool = False
    adaption: frozenset[Joins] = frozenset()
    every_layer: bool = False
    ragged: bool = False
    parts: int | None = None
    positions_told: bool = True
    relative_bias: RelativeBias | None = None
    window: Window | None = None
    training: frozenset[str] | None = frozenset()
    dtypes: frozenset[str] | None = None
    head: bool = False
    left_pads: bool = True
    trains_through: frozenset[str] | None = frozenset()
    quantised: bool = False
    model_types: frozenset[str] | None = None


#: What a toolkit keeps that loads every prompt into float32 parameters.
UP_TO_FLOAT32 = frozenset({"bfloat16", "float16", "float32"})

#: Everything that the canonical form can say.
EVERYTHING = Capabilities(
    inputs=frozenset(
        (stack, entry, placement)
        for stack in ("encoder", "decoder")
        for entry in ("before", "after")
        for placement in ("before-sequence", "after-first-token", "template")
        if (entry, placement) != ("after", "template")
    ),
    prefix_sites=frozenset(("encoder", "self", "cross")),
    gates=True,
    adaption=frozenset(("heads", "module", "output")),
    ragged=True,
    training=None,
    head=True,
    trains_through=None,
)
