"""The pass that leaves a training state out, and what of the prompt goes with it."""

from __future__ import annotations

from dataclasses import replace

from softbridge.errors import Obstacle
from softbridge.lowering.steps import Option, Step, Target
from softbridge.methods import tasks_of
from softbridge.prompt.soft_prompt import SoftPrompt


def eject_training(prompt: SoftPrompt, target: Target) -> list[Option]:
    """The training state stays where the target can hold it."""
    kept, training = target.capabilities.training, prompt.training
    if training is None or kept is None or training.kind in kept:
        return [Option(prompt)]
    return [without_training(prompt, target, "is left out: the prompt runs, its training cannot be resumed")]


def without_training(prompt: SoftPrompt, target: Target, note: str) -> Option:
    """The prompt without its training state, with which the tasks go that it does not run."""
    training = prompt.training
    if training is None:
        return Option(prompt)
    ejected = replace(prompt, training=None)
    tasks = tasks_of(training)
    if tasks > 1:
        task = training.settings.get("task", 0)
        reason = f"{target.name} holds one task, and this prompt {tasks}: task {task} alone is kept"
        return Option(ejected, (), (Obstacle("task", reason, "choose one with --task, or accept that one", True),))
    return Option(ejected, (Step("eject", "exact", f"the {training.kind} parameterisation {note}"),))
