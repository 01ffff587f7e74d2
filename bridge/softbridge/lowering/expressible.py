"""Passes that ask what the target can express at all: parts, layers, gates, heads, parameterisations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from softbridge.base.model import BaseModel
from softbridge.errors import BaseModelError, Obstacle
from softbridge.geometry import Geometry
from softbridge.lowering.scale import in_scale
from softbridge.lowering.steps import ELSEWHERE, Option, Target, blocked
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt.part import Adaption, AdaptionPrompt, InputPrompt, Joins, KeyValuePrefix
from softbridge.prompt.soft_prompt import SoftPrompt


def check_fits(prompt: SoftPrompt, geometry: Geometry) -> None:
    """Refuse a prompt whose shapes are not those of the base model.

    Raises:
        BaseModelError: with every mismatch.
    """
    problems: list[str] = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            if geometry.stack(part.stack) is None:
                problems.append(f"vectors for the {part.stack}, which {geometry.model_type} lacks")
            elif part.vectors.shape[1] != geometry.input_width:
                problems.append(f"vectors of width {part.vectors.shape[1]}, the model's is {geometry.input_width}")
            continue
        shape = geometry.site(part.site)
        what = "a prefix" if isinstance(part, KeyValuePrefix) else "an adaption prompt"
        if shape is None:
            problems.append(f"{what} at the site '{part.site}', which {geometry.model_type} lacks")
            continue
        for layer, pair in part.layers.items():
            if layer >= shape.layers:
                problems.append(f"{what} for layer {layer}, the model has {shape.layers} layers")
                continue
            if layer not in shape.attending:
                problems.append(f"{what} for {shape.named(layer)}, which has no keys and values that it could join")
                continue
            if isinstance(pair, Adaption):
                width, gates = pair.vectors.shape[1], len(pair.gate)
                if width != geometry.hidden:
                    problems.append(f"vectors of width {width} in layer {layer}, the model's is {geometry.hidden}")
                if gates not in (1, shape.heads):
                    problems.append(f"{gates} gates in layer {layer}, the model has {shape.heads} heads")
                continue
            heads, _, width = pair.keys.shape
            theirs = shape.shape(layer)
            if (heads, width) != theirs:
                problems.append(
                    f"{heads} key/value heads of size {width} in layer {layer}, "
                    f"the model has {theirs[0]} of size {theirs[1]}"
                )
            if pair.gate is not None and pair.gate.weight.shape[1] != geometry.hidden:
                problems.append(f"a gate for inputs of width {pair.gate.weight.shape[1]} in layer {layer}")
    if problems:
        raise BaseModelError(
            f"the prompt does not fit the base model ({geometry.model_type}): " + "; ".join(problems),
            "the base model that the prompt was trained for",
            "check --base" + (f"; the file names '{prompt.base.name}'" if prompt.base.name else ""),
        )


def check_family(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A target that runs some families only has to have the base model's."""
    families = target.capabilities.model_types
    if families is None:
        return [Option(prompt)]
    geometry = target.geometry(prompt) or target.need_base(f"{target.name} runs some families only").geometry
    if geometry.model_type in families:
        return [Option(prompt)]
    reason = f"{target.name} has no {geometry.model_type}; it has {', '.join(sorted(families))}"
    return blocked(prompt, Obstacle("family", reason, "choose another target, such as --to softbridge"))


def left_behind(prompt: SoftPrompt) -> str | None:
    """What of the prompt's source is no soft prompt, and was not read; None: nothing."""
    return None if prompt.origin is None else prompt.origin.partial or None


def check_whole(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Only a part of the source is a soft prompt: the source computes another function than the prompt alone."""
    partial = left_behind(prompt)
    if not partial:
        return [Option(prompt)]
    return blocked(prompt, Obstacle("partial", partial, "accept that only the prompt is converted", True))


def check_parts(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A target has to know each kind of part at its site, and as many of them."""
    able = target.capabilities
    obstacles = []
    for part in prompt.parts:
        if isinstance(part, KeyValuePrefix):
            if part.site not in able.prefix_sites:
                reason = f"{target.name} cannot express a key/value prefix at the site '{part.site}'"
                obstacles.append(Obstacle("part", reason, "choose another target"))
            continue
        if isinstance(part, AdaptionPrompt):
            obstacles += _no_adaption(part, target)
            continue
        entries = {
            entry for stack, entry, placement in able.inputs if (stack, placement) == (part.stack, part.placement)
        }
        if part.entry in entries:
            continue
        what = f"vectors in the {part.stack}'s input, {part.entry} the embedding block, {part.placement}"
        reason = f"{target.name} cannot express {what}"
        if part.entry == "after" and "before" in entries:
            reason += ": it has vectors before the block, whose norm and positions cannot be undone"
        obstacles.append(Obstacle("part", reason, "choose another target"))
    if able.parts is not None and len(prompt.parts) > able.parts:
        reason = f"{target.name} holds {able.parts} part{'s' * (able.parts > 1)}, this prompt has {len(prompt.parts)}"
        obstacles.append(Obstacle("parts", reason, f"{ELSEWHERE}; or choose one of its parts with --part"))
    return [Option(prompt, (), tuple(obstacles))]


def _no_adaption(part: AdaptionPrompt, target: Target) -> Iterator[Obstacle]:
    able = target.capabilities.adaption
    if not able:
        reason = f"{target.name} has no vectors in a softmax of their own, behind a gate (LLaMA-Adapter's)"
        yield Obstacle("adaption", reason, ELSEWHERE)
    elif part.joins not in able:
        where = " or ".join(_JOINS[joins] for joins in sorted(able))
        reason = f"what this prompt gives is added {_JOINS[part.joins]}, and {target.name} adds it {where}"
        yield Obstacle("projection", reason, ELSEWHERE)


#: Where the sum of an adaption prompt's values is added, in words.
_JOINS: Mapping[Joins, str] = {
    "heads": "before the output projection",
    "module": "behind the output projection, through which it went by itself",
    "output": "behind the output projection, past it",
}


def check_gates(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A gate weighs a prefix anew for every input: no fixed keys and values do that."""
    if target.capabilities.gates or not any(part.gated for part in prompt.prefixes):
        return [Option(prompt)]
    reason = f"{target.name} has no gates: they weigh the prefix anew for every input, and no fixed numbers do that"
    return blocked(prompt, Obstacle("gates", reason, ELSEWHERE))


def check_layers(prompt: SoftPrompt, target: Target) -> list[Option]:
    """No layer can be filled: whatever finite keys are put in take part in the softmax."""
    geometry = target.geometry(prompt)
    able = target.capabilities
    obstacles = []
    for part in prompt.prefixes:
        shape = None if geometry is None else geometry.site(part.site)
        every = range(max(part.layers) + 1) if shape is None else shape.attending
        absent = sorted(set(every) - set(part.layers))
        if able.every_layer and absent:
            reason = (
                f"{target.name} prefixes every layer and this prompt leaves out {absent} at the site '{part.site}': no "
                "finite keys and values are neutral, since each virtual token takes its share of the softmax (zeros "
                "take exp(0))"
            )
            obstacles.append(Obstacle("layers", reason, ELSEWHERE))
        shapes = {pair.keys.shape for pair in part.layers.values()}
        if not able.ragged and len(shapes) > 1:
            reason = f"{target.name} has one number and size of heads for all layers, this prompt {sorted(shapes)}"
            obstacles.append(Obstacle("ragged", reason, ELSEWHERE))
    return [Option(prompt, (), tuple(obstacles))]


def check_head(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A head that the target has no place for is left to the caller."""
    if target.capabilities.head or not prompt.head:
        return [Option(prompt)]
    names = ", ".join(prompt.head)
    reason = f"{target.name} has no place for the head ({names}); you load it yourself"
    return blocked(replace(prompt, head={}), Obstacle("head", reason, "accept that the head is left out", True))


def inexpressible(prompt: SoftPrompt, able: Capabilities, base: BaseModel) -> list[Obstacle]:
    """What of a prompt, as it is, a toolkit with these capabilities cannot hold at all."""
    target = Target("it", able, base)
    found = [
        o
        for check in (check_parts, check_gates, check_layers)
        for option in check(prompt, target)
        for o in option.obstacles
    ]
    for part in prompt.inputs:
        if part.told_scale is not None and base.scale is not None and not in_scale(part, base.scale):
            reason = f"its vectors are for a model that multiplies them by {part.told_scale:g}, and here {base.scale:g}"
            found.append(Obstacle("scale", reason, "lower it for this base model: softbridge.attach does"))
    return found
