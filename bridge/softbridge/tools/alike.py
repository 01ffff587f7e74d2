"""Whether prompts are alike enough to be combined, and their parts in common order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from softbridge.arrays import Array, same_array
from softbridge.errors import BaseModelError, few, refusal
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, SoftPrompt


def unit(rows: Array) -> Array:
    """Rows of length 1, float64; a row of zeros stays."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norms > 0, norms, 1.0)


# What fits together


def _key(part: Part) -> tuple[str, str]:
    if isinstance(part, InputPrompt):
        return "input", part.stack
    return "prefix" if isinstance(part, KeyValuePrefix) else "adaption", part.site


def name_in(part: Part) -> str:
    """A part's name among the parts of its prompt."""
    if isinstance(part, InputPrompt):
        place = part.template or part.placement
        scale = "" if part.told_scale is None else f", multiplied by {part.told_scale:g}"
        return f"{part.stack} input vectors ({part.entry} the embedding block, {place}{scale})"
    if isinstance(part, AdaptionPrompt):
        return f"an adaption prompt ('{part.site}', added to: {part.joins})"
    return f"a prefix ('{part.site}')"


def _layout(prompt: SoftPrompt, lengths: bool, dtypes: bool) -> dict[str, str]:
    """Each array's name -> its shape and dtype in words, as far as they matter."""
    layout = {}
    for part in prompt.parts:
        for name, array in part.arrays():
            shape = list(array.shape)
            if not lengths and "gate" not in name.split("."):
                shape[-2] = 0
            words = "x".join("P" if size == 0 else str(size) for size in shape)
            layout[f"{name_in(part)} {name}"] = f"{words} {array.dtype}" if dtypes else words
    return layout


def check_alike(prompts: Sequence[SoftPrompt], *, lengths: bool = True, dtypes: bool = True) -> None:
    """Refuse prompts that differ in parts, shapes or dtypes, or that are for different base models."""
    if not prompts:
        raise refusal("no prompts", "at least one", "pass some")
    first = _layout(prompts[0], lengths, dtypes)
    for number, prompt in enumerate(prompts):
        other = _layout(prompt, lengths, dtypes)
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        parts, others = ([name_in(part) for part in each.parts] for each in (prompts[0], prompt))
        if names:
            differences = (
                [f"their parts: {few(parts)}; {few(others)}"]
                if sorted(parts) != sorted(others)
                else [f"{name}: {first.get(name, 'none')} and {other.get(name, 'none')}" for name in names]
            )
            raise refusal(
                f"prompts 0 and {number} differ in {few(differences)}",
                "the same parts, layers, shapes and dtypes" if lengths else "the same parts, layers and widths",
                "use prompts that were trained alike, or cut them with slice",
            )
    _common_base(prompts)


def check_positions(prompts: Sequence[SoftPrompt]) -> None:
    """Refuse prompts behind which real tokens stand in different places."""
    first = prompts[0].positions
    for number, prompt in enumerate(prompts):
        if prompt.positions != first:
            raise refusal(
                f"prompts 0 and {number} differ in positions: {first} and {prompt.positions}",
                "the same positions: in other frames equal numbers mean other functions",
                "lower the prompts to one target first",
            )


def _common_base(prompts: Sequence[SoftPrompt]) -> BaseId:
    geometries = {prompt.base.geometry for prompt in prompts} - {None}
    if len(geometries) > 1:
        raise BaseModelError(
            "prompts for different base models: " + "; ".join(sorted(map(str, geometries))),
            "prompts for one base model",
            "choose prompts that were trained on the same model",
        )
    names = {prompt.base.name for prompt in prompts}
    return BaseId(names.pop() if len(names) == 1 else None, next(iter(geometries), None))


def match(prompts: Sequence[SoftPrompt]) -> list[tuple[Part, ...]]:
    """The parts that belong together, in the first prompt's order."""
    tables = [{_key(part): part for part in prompt.parts} for prompt in prompts]
    return [tuple(table[key] for table in tables) for key in tables[0]]


def combined_parts(parts: Sequence[Part], combine: Any) -> Part:
    """One part, whose arrays are `combine` of the parts' arrays."""
    first = parts[0]
    if isinstance(first, InputPrompt):
        inputs = [part for part in parts if isinstance(part, InputPrompt)]
        return replace(first, vectors=combine([part.vectors for part in inputs]))
    if isinstance(first, AdaptionPrompt):
        ours = [part for part in parts if isinstance(part, AdaptionPrompt)]
        each = {layer: [part.layers[layer] for part in ours] for layer in first.layers}
        made = {
            n: Adaption(combine([o.vectors for o in all_]), combine([o.gate for o in all_])) for n, all_ in each.items()
        }
        return replace(first, layers=made)
    prefixes = [part for part in parts if isinstance(part, KeyValuePrefix)]
    layers = {}
    for layer in first.layers:
        pairs = [part.layers[layer] for part in prefixes]
        gates = [pair.gate for pair in pairs if pair.gate is not None]
        gate = Gate(combine([g.weight for g in gates]), combine([g.bias for g in gates])) if gates else None
        layers[layer] = KeyValue(combine([pair.keys for pair in pairs]), combine([pair.values for pair in pairs]), gate)
    return KeyValuePrefix(first.site, layers)


def made_of(prompts: Sequence[SoftPrompt], parts: Sequence[Part]) -> SoftPrompt:
    """A prompt that is made of others: their base, and their head if they share one."""
    head = prompts[0].head
    for number, prompt in enumerate(prompts):
        if prompt.head.keys() != head.keys() or not all(same_array(head[name], prompt.head[name]) for name in head):
            raise refusal(
                f"prompts 0 and {number} have different heads ({few(sorted(head))}; {few(sorted(prompt.head))})",
                "the same head, bit for bit, or none",
                "leave the heads out: dataclasses.replace(prompt, head={})",
            )
    untold = {part.stack for prompt in prompts for part in prompt.inputs if part.scale == "untold"}
    asked = (replace(p, scale="untold") if isinstance(p, InputPrompt) and p.stack in untold else p for p in parts)
    return SoftPrompt(tuple(asked), prompts[0].positions, _common_base(prompts), head)


def one_length(prompt: SoftPrompt) -> int:
    """P, where all parts have the same."""
    lengths = sorted({part.length for part in prompt.parts})
    if len(lengths) > 1:
        raise refusal(f"parts of lengths {few(lengths)} in one prompt", "one length", "take the parts one by one")
    return lengths[0]
