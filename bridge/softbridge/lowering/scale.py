"""The pass that multiplies vectors by the scale of the embedding that the target's base applies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softbridge.base.model import BaseModel
from softbridge.errors import Obstacle
from softbridge.lowering.steps import Option, Step, Target, with_part
from softbridge.lowering.training import without_training
from softbridge.prompt.part import InputPrompt
from softbridge.prompt.soft_prompt import SoftPrompt

#: Two numbers by which vectors are multiplied are the same if they differ by less than this, relatively.
SAME_SCALE = 1e-9


def rescale(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Vectors that the installed transformers multiplies by another number than that of their training make up for it.

    This does not depend on the target: with a base model given, the numbers are for the model that is run here.
    """
    here = None if target.base is None or not prompt.inputs else target.base.scale
    if here is None:
        return [Option(prompt)]
    obstacles: list[Obstacle] = []
    steps: list[Step] = []
    for part in prompt.inputs:
        if part.entry != "before" or in_scale(part, here):
            continue
        ours = replace(part, scale=here)
        if part.scale == "untold":
            reason = (
                f"nothing says which transformers the vectors were trained on: this one multiplies them by {here:g}, "
                "and others by another number (Gemma's scale moved into the embedding)"
            )
            remedy = (
                "say which it was: --trained-on 4.57 (softbridge.load(..., trained_on='4.57') in Python); or accept "
                "that it multiplied as this one does"
            )
            obstacles.append(Obstacle("scale", reason, remedy, True))
        elif part.told_scale is not None:
            factor = part.told_scale / here
            dtype = np.promote_types(part.vectors.dtype, np.float32)
            ours = replace(ours, vectors=(part.vectors.astype(np.float64) * factor).astype(dtype))
            note = (
                f"vectors multiplied by {factor:.6g}: the transformers they were trained on multiplied them by "
                f"{part.told_scale:g}, and this one by {here:g}; float32 rounding"
            )
            steps.append(Step("scale", "rounding", note))
        prompt = with_part(prompt, part, ours)
    if not steps:
        return [Option(prompt, (), tuple(obstacles))]
    ejected = without_training(prompt, target, "belongs to the vectors before that and is left out")
    return [Option(ejected.prompt, (*steps, *ejected.steps), (*obstacles, *ejected.obstacles))]


def in_scale(part: InputPrompt, here: float) -> bool:
    """Whether vectors are known to be for a model that multiplies them by this number."""
    told = part.told_scale
    return told is not None and abs(told - here) <= SAME_SCALE * here


def recorded(prompt: SoftPrompt, base: BaseModel) -> SoftPrompt:
    """The prompt, whose vectors were made on this model here, with what that multiplies them by."""
    here = base.scale if prompt.inputs else None
    for part in prompt.inputs if here is not None else ():
        if part.entry == "before" and part.scale is None:
            prompt = with_part(prompt, part, replace(part, scale=here))
    return prompt
