"""Take the parts of a prompt apart, and put them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softbridge.arrays import Array
from softbridge.errors import SoftbridgeError, one_of
from softbridge.geometry import Stack, stack_of
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt, Training


def name_of(part: Part) -> str:
    """``encoder-input`` or ``decoder-input``; of a prefix its site: ``encoder``, ``self`` or ``cross``.

    Of an adaption prompt: ``self-adaption`` or ``encoder-adaption``.
    """
    if isinstance(part, InputPrompt):
        return f"{part.stack}-input"
    return f"{part.site}-adaption" if isinstance(part, AdaptionPrompt) else part.site


def named_arrays(prompt: SoftPrompt) -> dict[str, Array]:
    """Every array of parts, head and training, under names that do not depend on the order of the parts."""
    arrays = {f"{name_of(part)}.{name}": array for part in prompt.parts for name, array in part.arrays()}
    return arrays | {name: array for name, array in prompt.arrays() if not name.startswith("parts.")}


def places(prompt: SoftPrompt) -> dict[str, Any]:
    """Name of each part with vectors -> where they stand in the input, and what multiplies them there."""
    return {name_of(part): (part.entry, part.placement, part.template, part.told_scale) for part in prompt.inputs}


def split(prompt: SoftPrompt) -> dict[str, SoftPrompt]:
    """Each part as a prompt of its own: name of the part -> prompt.

    Numbers and real tokens stay where they are, so that each is the prompt with its other parts hidden. The base and
    the head go along with each; of the training state, what belongs to the part.
    """
    return {name_of(part): _alone(prompt, part) for part in prompt.parts}


def choose(prompt: SoftPrompt, name: str) -> SoftPrompt:
    """The part of that name, as a prompt of its own.

    Raises:
        SoftbridgeError: the prompt does not have this part.
    """
    parts = split(prompt)
    if name not in parts:
        raise SoftbridgeError(f"no part is called '{name}'", one_of(parts, name), "name one of these")
    return parts[name]


def join(prompts: Sequence[SoftPrompt]) -> SoftPrompt:
    """The prompts as the parts of one: the inverse of `split`.

    Raises:
        ValueError: no prompts; two parts of one name; they disagree on where real tokens stand, on the base, on the
            head or on the training state's kind.
    """
    if not prompts:
        raise ValueError("join: at least one prompt")
    first = prompts[0]
    start: dict[Stack, int] = {}
    unbiased: dict[Stack, int] = {}
    for prompt in prompts:
        told = prompt.positions
        clash = any(start.setdefault(stack, place) != place for stack, place in told.start.items())
        clash |= any(unbiased.setdefault(stack, layer) != layer for stack, layer in told.unbiased_from.items())
        if clash or told.of((), {}) != first.positions.of((), {}):
            raise ValueError(
                f"join: positions that differ, {first.positions} and {told}: lower them to one target first"
            )
        if prompt.base != first.base or _other_head(prompt, first):
            raise ValueError("join: prompts for one base model, with one head")
    return SoftPrompt(
        tuple(part for prompt in prompts for part in prompt.parts),
        replace(first.positions, start=start, unbiased_from=unbiased),
        first.base,
        first.head,
        _joined([prompt.training for prompt in prompts]),
    )


def _alone(prompt: SoftPrompt, part: Part) -> SoftPrompt:
    stack = part.stack if isinstance(part, InputPrompt) else stack_of(part.site)
    counts = isinstance(part, InputPrompt) or (isinstance(part, KeyValuePrefix) and part.site != "cross")
    start = {stack: prompt.positions.start[stack]} if counts else {}
    positions = prompt.positions.of((part,), start)
    training = prompt.training
    if training is not None and len(prompt.parts) > 1:
        # Only parameterisations of prefixes can have several parts: their tensors have the site in front.
        own = {name: array for name, array in training.tensors.items() if name.startswith(f"{name_of(part)}.")}
        training = replace(training, tensors=own) if own else None
    return replace(prompt, parts=(part,), positions=positions, training=training)


def _other_head(a: SoftPrompt, b: SoftPrompt) -> bool:
    return replace(a, parts=b.parts, positions=b.positions, training=None, base=b.base) != replace(b, training=None)


def _joined(states: Sequence[Training | None]) -> Training | None:
    known = [state for state in states if state is not None]
    if not known:
        return None
    if len(known) < len(states) or any((s.kind, s.settings) != (known[0].kind, known[0].settings) for s in known):
        raise ValueError("join: training states of one kind and with one setting, or none")
    return replace(known[0], tensors={name: array for state in known for name, array in state.tensors.items()})
