"""Passes that move keys to where the target has its real tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from softbridge.arrays import Array
from softbridge.errors import Obstacle
from softbridge.geometry import Stack, stack_of
from softbridge.lowering.steps import Option, Step, Target, blocked
from softbridge.lowering.training import without_training
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt.part import InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import Positions, SoftPrompt


def native_positions(prompt: SoftPrompt, capabilities: Capabilities) -> Positions:
    """Where real tokens stand if a toolkit with these capabilities runs the numbers and is passed no position_ids."""
    counted = prompt.counted()
    start = dict(prompt.positions.start)
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            stack, own = part.stack, capabilities.input_start
        elif not isinstance(part, KeyValuePrefix) or part.site == "cross":
            continue
        else:
            stack, own = stack_of(part.site), capabilities.prefix_start
        if own is not None:
            start[stack] = counted[stack] if own == "counted" else 0
    return Positions(
        start,
        capabilities.relative_bias or prompt.positions.relative_bias,
        capabilities.window or prompt.positions.window,
        {} if capabilities.relative_bias == "plain" else prompt.positions.unbiased_from,
    )


def check_relative_bias(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A relative position bias of virtual tokens is what the target's own model makes of it."""
    wanted = native_positions(prompt, target.capabilities)
    expected = replace(prompt.positions, relative_bias=wanted.relative_bias, unbiased_from=wanted.unbiased_from)
    if expected == prompt.positions:
        return [Option(prompt)]
    if any(part.site != "cross" for part in prompt.prefixes):
        base = target.need_base("whether it has a relative position bias decides whether the prefix can be moved")
        if base.positions.kind == "relative":
            reason = (
                f"the prompt was trained with a {prompt.positions.relative_bias} relative position bias and "
                f"{target.name} computes a {wanted.relative_bias} one: the bias between real tokens differs by the "
                "prefix length, and no change of keys or values makes up for it"
            )
            if prompt.positions.unbiased_from != wanted.unbiased_from:
                lost = " and ".join(f"the {s} from layer {n} on" for s, n in prompt.positions.unbiased_from.items())
                reason = (
                    f"the prompt was trained without a relative position bias in {lost}, which {target.name} computes"
                )
            remedy = "run it with an engine that computes the same bias (native), through --to softbridge"
            return blocked(prompt, Obstacle("relative-bias", reason, remedy))
    return [Option(replace(prompt, positions=expected))]


def check_window(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A sliding window has to treat the prefix as the target's own model does, or be longer than every text."""
    wanted = native_positions(prompt, target.capabilities).window
    if wanted == prompt.positions.window:
        return [Option(prompt)]
    moved = replace(prompt, positions=replace(prompt.positions, window=wanted))
    sites = [part for part in prompt.prefixes if part.site != "cross"]
    if not sites:
        return [Option(moved)]
    base = target.need_base("a sliding window treats a prefix differently in the two toolkits")
    shapes = [(part, base.geometry.site(part.site)) for part in sites]
    bounds = [shape.window - part.length for part, shape in shapes if shape is not None and shape.window is not None]
    if not bounds:
        return [Option(moved)]
    if min(bounds) < 1:
        reason = f"{target.name} treats the sliding window otherwise, which is shorter than the prefix"
        return blocked(moved, Obstacle("window", reason, "choose another target, such as --to softbridge"))
    reason = (
        f"the sliding window {'drops virtual tokens that fell out of it' if wanted == 'slides' else 'never drops'} "
        f"in {target.name}, unlike in the source: the same only while a text has at most {min(bounds)} tokens"
    )
    return blocked(moved, Obstacle("window", reason, "accept the bound on the text's length", True))


def move_start(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Move the real tokens of each stack to where the target has them: rotate keys, or have position_ids passed."""
    wanted = native_positions(prompt, target.capabilities).start
    options = [Option(prompt)]
    for stack, want in wanted.items():
        if want != prompt.positions.start[stack]:
            options = [
                Option(further.prompt, (*before.steps, *further.steps), (*before.obstacles, *further.obstacles))
                for before in options
                for further in _move(before.prompt, stack, want, target)
            ]
    return options


def _move(prompt: SoftPrompt, stack: Stack, want: int, target: Target) -> list[Option]:
    base = target.need_base("real tokens stand at other positions in the target, and what that means depends on it")
    scheme, have = base.positions, prompt.positions.start[stack]
    moved = replace(prompt, positions=replace(prompt.positions, start={**prompt.positions.start, stack: want}))
    in_sequence = any(part.stack == stack and part.entry == "before" for part in prompt.inputs)
    prefixed = any(part.site != "cross" and stack_of(part.site) == stack for part in prompt.prefixes)
    options = []
    if scheme.kind in ("rotary", "relative") and not prefixed and in_sequence:
        note = "virtual and real tokens move together, and the model sees their distances only"
        options.append(Option(moved, (Step("positions", "exact", note),)))
    elif scheme.kind == "rotary":
        note = f"keys rotated by {want - have:+d} positions with the model's own rotation; orthogonal, float32 rounding"
        ejected = without_training(moved, target, "belongs to the keys before the rotation and is left out")
        reason = "the model's rotary frequencies change with the length of the text: the same within one regime"
        bound = Obstacle("length", reason, "accept the bound on the text's length", True)
        rotated = rotate(ejected.prompt, stack, scheme.rotation(want - have))
        bounds = (bound,) if scheme.depends_on_length else ()
        options.append(Option(rotated, (Step("rotate", "rounding", note), *ejected.steps), bounds))
    if scheme.kind == "none":
        note = "the model's outputs do not depend on where the tokens stand"
        options.append(Option(moved, (Step("positions", "exact", note),)))
    if (
        scheme.kind in ("absolute", "rotary")
        and scheme.tellable
        and target.capabilities.positions_told
        and not in_sequence
    ):
        reason = (
            f"the model's {stack} has {scheme.kind} positions: real tokens must stand at {have}, "
            f"{have + 1}, ..., and {target.name} by itself puts them at {want}, {want + 1}, ...; the caller "
            "must pass position_ids. softbridge's engines do: they read softbridge.json beside the files"
        )
        obstacle = Obstacle("positions", reason, "accept that the caller passes position_ids", True)
        options.append(Option(prompt, (), (obstacle,)))
    if not options:
        why = scheme.reason or f"its positions are {scheme.kind}: its caller cannot say where tokens stand"
        reason = f"real tokens stand at {have} in the source and at {want} in {target.name}, and of the model: {why}"
        remedy = "run it with the native engine, through --to softbridge"
        return blocked(prompt, Obstacle("positions", reason, remedy))
    return options


def rotate(prompt: SoftPrompt, stack: Stack, maps: dict[int, Array]) -> SoftPrompt:
    """Apply layer -> M [D, D] to every key row of the stack's own prefix, in float64.

    The result is stored in the keys' dtype, in float32 if that is narrower: rounding a rotated key to bfloat16 would
    cost 4e-3, and the bound of a rotation is float32's. It lies in one array, as files have it: see
    `KeyValuePrefix.flat`.
    """

    def rotated(part: Part) -> Part:
        if not isinstance(part, KeyValuePrefix) or part.site == "cross" or stack_of(part.site) != stack:
            return part
        dtype = np.result_type(np.float32, *(pair.keys for pair in part.layers.values()))
        shapes = {layer: (pair.keys.shape[0], pair.keys.shape[2]) for layer, pair in part.layers.items()}
        columns = sum(2 * heads * width for heads, width in shapes.values())
        flat = np.empty((part.length, columns), dtype)
        at = 0
        for layer, (heads, width) in shapes.items():
            pair = part.layers[layer]
            both = flat[:, at : at + 2 * heads * width].reshape(-1, 2, heads, width).transpose(1, 2, 0, 3)
            for head, keys in enumerate(pair.keys):
                both[0, head] = keys.astype(np.float64) @ maps[layer]
            both[1] = pair.values
            at += 2 * heads * width
        moved = KeyValuePrefix.from_rows(part.site, flat, shapes)
        return replace(part, layers={n: replace(pair, gate=part.layers[n].gate) for n, pair in moved.layers.items()})

    return replace(prompt, parts=tuple(rotated(part) for part in prompt.parts))
