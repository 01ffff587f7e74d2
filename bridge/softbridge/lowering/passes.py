"""The passes of lowering: each makes a prompt expressible by a target, or says why that is impossible.

A pass is a pure function from a prompt and a target to the ways in which one can go on (`Option`), at least one. A way
is exact, rounds, holds under a condition, or meets an obstacle, and says so. Which ways are taken is not decided here,
see `softbridge.lowering.planner`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softbridge.errors import BaseModelError, Obstacle
from softbridge.lowering.embedding_block import enter_block, leave_block
from softbridge.lowering.expressible import (
    check_family,
    check_gates,
    check_head,
    check_layers,
    check_parts,
    check_whole,
)
from softbridge.lowering.precision import round_numbers
from softbridge.lowering.prefill import prefill
from softbridge.lowering.projection import project_apart
from softbridge.lowering.scale import rescale
from softbridge.lowering.steps import Option, Pass, Step, Target, with_part
from softbridge.lowering.token_positions import check_relative_bias, check_window, move_start
from softbridge.lowering.training import eject_training, without_training
from softbridge.prompt.part import Entry
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.template import Field, Virtual, Words


def _placement(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A template whose virtual tokens stand together in front, or behind one token, is a placement of its own."""
    able = target.capabilities.inputs
    steps: list[Step] = []
    obstacles: list[Obstacle] = []
    for part in prompt.inputs:
        if part.template is None or (part.stack, part.entry, part.placement) in able:
            continue
        match part.template.pieces:
            case (Virtual(), *rest) if not any(isinstance(piece, Virtual) for piece in rest):
                moved, others = replace(part, placement="before-sequence", template=None), rest
            case (Words((_,)), Virtual(), *rest) if not any(isinstance(piece, Virtual) for piece in rest):
                moved, others = replace(part, placement="after-first-token", template=None), rest
            case _:
                continue  # `check_parts` names it
        if (moved.stack, moved.entry, moved.placement) not in able:
            continue
        start = prompt.positions.start[part.stack] + part.length
        positions = replace(prompt.positions, start={**prompt.positions.start, part.stack: start})
        prompt = replace(with_part(prompt, part, moved), positions=positions)
        if part.template.verbaliser is None and len(others) == 1 and isinstance(others[0], Field):
            steps.append(Step("placement", "exact", f"a template with all virtual tokens in front: {moved.placement}"))
        else:
            reason = f"{target.name} has no templates: the caller must write this one's words and slot into each text"
            obstacles.append(Obstacle("template", reason, "accept that the caller writes the template's words", True))
    return [Option(prompt, tuple(steps), tuple(obstacles))]


def _entry(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Move vectors behind the embedding block, by sending them through it, or in front of it, where it only adds."""
    able = target.capabilities.inputs
    steps: list[Step] = []
    missing = None
    for part in prompt.inputs:
        first = prompt.positions.start[part.stack] - part.length
        other: Entry = "after" if part.entry == "before" else "before"
        if (
            (part.stack, part.entry, part.placement) in able
            or part.placement != "before-sequence"
            or (part.stack, other, part.placement) not in able
            or (part.entry == "after" and part.stack == "encoder")  # behind a norm, which `check_parts` names
            or first < 0
        ):
            continue
        vectors = part.vectors
        try:
            base = target.need_base(f"{target.name} has vectors {other} the embedding block, whose weights move them")
            if base.has_embedding_block != (other == "after"):
                continue  # `check_parts` names it
            moved = (leave_block if other == "after" else enter_block)(base, vectors, first)
            vectors = moved.astype(np.promote_types(vectors.dtype, np.float32))
        except BaseModelError as error:
            missing = error
        prompt = with_part(prompt, part, replace(part, vectors=vectors, entry=other))
        note = "vectors sent through the base model's embedding block (positions, token types, norm); float32 rounding"
        if other == "before":
            note = "what the base model adds to each token (positions) is taken away from the vectors; float32 rounding"
        steps.append(Step("entry", "rounding", note))
    if not steps:
        return [Option(prompt)]
    ejected = without_training(prompt, target, "belongs to the vectors as they were and is left out")
    return [Option(ejected.prompt, (*steps, *ejected.steps), ejected.obstacles, missing)]


#: In this order: each relies on what those before it did.
PASSES: tuple[Pass, ...] = (
    check_family,
    check_whole,
    rescale,
    _placement,
    _entry,
    prefill,
    project_apart,
    check_parts,
    check_gates,
    check_layers,
    check_head,
    eject_training,
    check_relative_bias,
    check_window,
    move_start,
    round_numbers,
)
