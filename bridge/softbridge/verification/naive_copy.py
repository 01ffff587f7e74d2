"""The plain copy of the numbers, which a conversion has to differ from wherever it does more than copy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softbridge.geometry import stack_of
from softbridge.lowering.steps import Target
from softbridge.lowering.token_positions import native_positions
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt


def copied(prompt: SoftPrompt, target: Target) -> SoftPrompt | None:
    """A plain copy of the numbers, run by the target: what fits into its own form, without position_ids.

    Other positions, entries and placements are taken for the target's own, gates and what it has no place for are left
    out, and layers that it wants are filled with zeros. None if nothing fits. It is what lowering is there to avoid;
    verification measures how wrong it is.
    """
    able, geometry = target.capabilities, target.geometry(prompt)
    if able.model_types is not None and (geometry is None or geometry.model_type not in able.model_types):
        return None
    parts: list[Part] = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            part = replace(part, scale=None)
            words = sorted((e, p) for stack, e, p in able.inputs if stack == part.stack and p != "template")
            if (part.stack, part.entry, part.placement) in able.inputs:
                parts.append(part)
            elif words:
                # The same entry if there is one, and next the same placement.
                entry, placement = min(words, key=lambda word: (word[0] != part.entry, word[1] != part.placement))
                parts.append(replace(part, entry=entry, placement=placement, template=None))
        elif isinstance(part, AdaptionPrompt):
            joins = part.joins if part.joins in able.adaption else min(able.adaption, default=None)
            parts += [] if joins is None else [replace(part, joins=joins)]
        elif part.site in able.prefix_sites:
            layers = {n: pair if able.gates else replace(pair, gate=None) for n, pair in part.layers.items()}
            shape = None if geometry is None else geometry.site(part.site)
            if able.every_layer and shape is not None:
                zeros = np.zeros_like(next(iter(layers.values())).keys)
                layers = {n: layers.get(n, KeyValue(zeros, zeros)) for n in shape.attending}
            parts.append(replace(part, layers=layers))
    if not parts:
        return None
    parts = parts[: able.parts]
    stacks = {
        part.stack if isinstance(part, InputPrompt) else stack_of(part.site) for part in parts if not _crosses(part)
    }
    start = {stack: place for stack, place in prompt.positions.start.items() if stack in stacks}
    positions = prompt.positions.of(parts, start)
    kept = replace(prompt, parts=tuple(parts), positions=positions, training=None, origin=None)
    return replace(kept, positions=native_positions(kept, able))


def _crosses(part: Part) -> bool:
    return isinstance(part, KeyValuePrefix) and part.site == "cross"
