"""What can be done with prompts once they are values: look at them, compare, mix, join, cut and ensemble them.

All functions are pure: prompts go in, new prompts or numbers come out. A prompt that results from others keeps their
positions, their base and a head that they share; parameterisation and provenance are the sources' and are dropped.
Prompts that do not fit together are refused with everything in which they differ, never broadcast or truncated.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from softbridge.base.model import BaseModel
from softbridge.errors import BaseModelError, LoweringError, Obstacle, refusal
from softbridge.geometry import Stack, stack_of
from softbridge.lowering.expressible import check_fits
from softbridge.lowering.token_positions import rotate
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.tools.alike import check_alike, check_positions, combined_parts, made_of, match, one_length

# Joining and cutting


def concatenate(prompts: Sequence[SoftPrompt], base: Any = None, accept: Collection[str] = ()) -> SoftPrompt:
    """Prompts one behind the other, the first one furthest from the text; their lengths add up.

    Vectors in the input sequence are put side by side. So are the keys and values of prefixes, once they are in one
    frame, and that takes thought (A before B, of lengths P_A and P_B, with real tokens at start_A and start_B):

    - *Uncounted* prompts (both starts 0): virtual tokens take no positions. The numbers are joined, the start stays.
    - *Counted* prompts (start >= length): real tokens move behind both. B keeps its distance from them, A's grows by
      P_B. The new start is S = start_A + P_B; or S = start_A, where A leaves a gap before its real tokens into which B
      fits (a slice does). A's keys are right as they are, B's were stored for real tokens at start_B. If that is S
      (the cache of a text that was read after A's), nothing is to do. Otherwise the base model decides: rotary keys
      are rotated by S - start_B with the model's own rotation; a relative bias counts from the tokens by itself; of
      *absolute* positions the keys and values were computed from hidden states, and nothing can move them: they stay,
      and the joined prompt is a start for training, with no claim about what B did alone.

    Args:
        prompts: of the same parts; of prefixes, the same layers, heads and head sizes. The widest dtype holds all;
            rotated keys take at least float32.
        base: a model, configuration, directory or hub id; needed where keys may have to be rotated.
        accept: ``length`` accepts frequencies that change with the length of the text.

    Raises:
        ValueError: prompts of different parts, widths or heads; counted and uncounted ones; a skewed relative
            bias, which depends on the length itself; input vectors and a prefix in one stack.
        BaseModelError: the base model is needed and was not given, its positions are unknown, or it does not fit.
        LoweringError: the frequencies change with the length of the text, and that was not accepted.
    """
    check_alike(prompts, lengths=False, dtypes=False)
    resolved = None if base is None else BaseModel.resolve(base)
    if resolved is not None:
        for prompt in prompts:
            check_fits(prompt, resolved.geometry)
    joined = prompts[0]
    for prompt in prompts[1:]:
        joined = _join(joined, prompt, resolved, accept)
    return replace(made_of(prompts, joined.parts), positions=joined.positions)


def _join(a: SoftPrompt, b: SoftPrompt, base: BaseModel | None, accept: Collection[str]) -> SoftPrompt:
    for prompt in (a, b):
        _one_kind(prompt)
        _no_template(prompt)
        if any(part.gated for part in prompt.prefixes):
            raise refusal("gates, which weigh all virtual tokens of a layer alike", "no gates", "join ungated prompts")
        if prompt.adaptions:
            raise refusal(
                "an adaption prompt, whose gate weighs a softmax over its own vectors",
                "vectors in the sequence or a prefix, whose virtual tokens share one softmax with the text",
                "use it as it is",
            )
        if prompt.positions.relative_bias == "skewed" and prompt.prefixes:
            raise refusal(
                "a skewed relative bias, under which the bias between real tokens depends on the prefix length",
                "a plain one",
                "join prompts that were trained with a plain one",
            )
    starts = dict(a.positions.start)
    told = dict(b.positions.start)
    counted = b.counted()
    alike = (a.positions.window, a.positions.unbiased_from) == (b.positions.window, b.positions.unbiased_from)
    if not alike or any(starts.get(stack) != told.get(stack) for stack in {*starts, *told} - {*counted}):
        check_positions([a, b])
    for stack in counted:
        starts[stack] = _joined_start(a, b, stack)
        shift = starts[stack] - told[stack]
        if shift and any(part.site != "cross" and stack_of(part.site) == stack for part in b.prefixes):
            b = _moved(b, stack, shift, starts[stack] - a.counted()[stack], base, accept)
    parts = [
        combined_parts(pair, lambda arrays: np.concatenate(arrays, axis=arrays[0].ndim - 2)) for pair in match([a, b])
    ]
    return SoftPrompt(tuple(parts), replace(a.positions, start=starts), a.base)


def _joined_start(a: SoftPrompt, b: SoftPrompt, stack: Stack) -> int:
    """Where the real tokens of a stack stand behind a and b."""
    lengths = a.counted()[stack], b.counted()[stack]
    starts = a.positions.start.get(stack), b.positions.start.get(stack)
    match starts:
        case (0, 0):
            return 0
        case (int(first), int(second)) if first >= lengths[0] and second >= lengths[1]:
            return first if first >= sum(lengths) else first + lengths[1]
        case _:
            raise refusal(
                f"{stack} prompts of lengths {lengths[0]} and {lengths[1]}, with real tokens at {starts[0]} and "
                f"{starts[1]}",
                "all counted (real tokens at the prompt's length, or behind), or all uncounted (at 0)",
                "lower one to the frame of the other first",
            )


def _moved(
    b: SoftPrompt, stack: Stack, shift: int, needed: int, base: BaseModel | None, accept: Collection[str]
) -> SoftPrompt:
    """b with the keys of a stack for real tokens that stand `shift` positions later.

    `needed` is where b must have had them for a relative bias to stay what it was.
    """
    scheme = _need(base, f"the second prompt's keys were stored for real tokens {shift:+d} positions away").positions
    match scheme.kind:
        case "rotary":
            if scheme.depends_on_length and "length" not in accept:
                reason = "the model's rotary frequencies change with the length of the text: exact within one regime"
                remedy = "accept the bound on the text's length"
                raise LoweringError("concatenate", [Obstacle("length", reason, remedy, acceptable=True)])
            return rotate(b, stack, scheme.rotation(shift))
        case "relative" if b.positions.start[stack] != needed:
            raise refusal(
                f"real tokens at {b.positions.start[stack]} in the second prompt",
                f"at {needed}, so that its virtual tokens keep their distance from them under a relative bias",
                "join whole prompts, or slices that follow each other",
            )
        case "unknown":
            raise _unknown(scheme.reason)
    return b


def slice(
    prompt: SoftPrompt,
    start: int = 0,
    stop: int | None = None,
    *,
    layers: Collection[int] | None = None,
    base: Any = None,
) -> SoftPrompt:
    """The virtual tokens start to stop (exclusive) of every part, in some layers of its prefixes.

    Of an *input prompt*, what is left out is not in the sequence: counted real tokens move up.

    Of a *prefix*, the slice is the same function as the prompt with the other virtual tokens hidden: numbers and real
    tokens stay where they are, so that real tokens may stand further back than the slice is long. What is cut off in
    front has to be known of, in two cases, and therefore takes the base model: with a relative bias the real tokens
    move up by `start`, and with rotary positions and a sliding window they do, too, and the keys are rotated back.
    Joined again by `concatenate`, slices that follow each other are the prompt that they were cut from.

    Args:
        prompt: with parts of one length, if tokens are cut off.
        start: the first virtual token.
        stop: behind the last one; None: P.
        layers: which layers of the prefixes to keep; None: all.
        base: a model, configuration, directory or hub id; needed if `start` is not 0 and there is a prefix.

    Raises:
        ValueError: the prompt does not have these virtual tokens or layers; its parts differ in length; input vectors
            and a prefix are in one stack.
        BaseModelError: the base model is needed and was not given, or its positions are unknown.
    """
    length = one_length(prompt) if (start, stop) != (0, None) else max(part.length for part in prompt.parts)
    stop = length if stop is None else stop
    if not 0 <= start < stop <= length:
        raise refusal(
            f"virtual tokens {start} to {stop} of {length}", "0 <= start < stop <= P", "choose others; ends are counted"
        )
    here = {layer for part in prompt.layered for layer in part.layers}
    if layers is not None and (not layers or not set(layers) <= here):
        raise refusal(
            f"layers {sorted(layers)}", f"some of {sorted(here) or 'none: this has no prefix'}", "choose them"
        )
    places = dict(prompt.positions.start)
    rotations: dict[Stack, int] = {}
    if (start, stop) != (0, length):
        _one_kind(prompt)
        _no_template(prompt)
        for part in prompt.inputs:
            if places.get(part.stack, 0) >= length:
                places[part.stack] -= length - (stop - start)
        for prefix in prompt.prefixes:
            if start and prefix.site != "cross" and _front_matters(prompt, prefix, base):
                stack = stack_of(prefix.site)
                places[stack] = places.get(stack, 0) - start
                rotations[stack] = -start
                if places[stack] < stop - start:
                    raise refusal(
                        f"real tokens at {places[stack] + start}, less than the prefix length",
                        "a counted prefix",
                        "slice from 0",
                    )
    for stack, shift in rotations.items():
        scheme = _need(base, "keys are rotated").positions
        if scheme.kind == "rotary":
            prompt = rotate(prompt, stack, scheme.rotation(shift))

    def cut(part: Part) -> Part | None:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=part.vectors[start:stop])
        if isinstance(part, AdaptionPrompt):
            some = {n: one for n, one in part.layers.items() if layers is None or n in layers}
            shorter = {n: replace(one, vectors=one.vectors[start:stop]) for n, one in some.items()}
            return replace(part, layers=shorter) if shorter else None
        kept = {
            layer: replace(pair, keys=pair.keys[:, start:stop], values=pair.values[:, start:stop])
            for layer, pair in part.layers.items()
            if layers is None or layer in layers
        }
        return replace(part, layers=kept) if kept else None

    if (start, stop) == (0, length):
        start, stop = 0, None
    parts = tuple(part for part in map(cut, prompt.parts) if part is not None)
    stacks = {part.stack if isinstance(part, InputPrompt) else stack_of(part.site) for part in parts}
    positions = prompt.positions.of(parts, {stack: place for stack, place in places.items() if stack in stacks})
    return replace(prompt, parts=parts, positions=positions, training=None, origin=None)


def _front_matters(prompt: SoftPrompt, prefix: KeyValuePrefix, base: Any) -> bool:
    """Whether the virtual tokens of a prefix must be known to stand behind others that are cut off."""
    resolved = _need(base, "virtual tokens are cut off in front of others")
    check_fits(prompt, resolved.geometry)
    shape = resolved.geometry.site(prefix.site)
    slides = prompt.positions.window == "slides" and shape is not None and shape.window is not None
    match resolved.positions.kind:
        case "unknown":
            raise _unknown(resolved.positions.reason)
        case "relative":
            return True
        case "rotary":
            return slides and prompt.positions.start.get(stack_of(prefix.site), 0) > 0
        case kind if slides:
            raise BaseModelError(
                f"a sliding window in a model whose positions are {kind}",
                "a window that is 'pinned', or rotary positions, whose keys can be rotated",
                "slice from 0",
            )
    return False


def _one_kind(prompt: SoftPrompt) -> None:
    both = {part.stack for part in prompt.inputs} & {stack_of(p.site) for p in prompt.prefixes if p.site != "cross"}
    if both:
        raise refusal(
            f"input vectors and a prefix, both in the {' and the '.join(sorted(both))}",
            "one of them, so that it is clear which virtual token stands behind which",
            "take the parts one by one",
        )


def _no_template(prompt: SoftPrompt) -> None:
    if any(part.template is not None for part in prompt.inputs):
        raise refusal("a template, which has a place for every vector", "none", "make a template of another length")


def _need(base: Any, why: str) -> BaseModel:
    if base is None:
        raise BaseModelError(
            f"the base model must be known: {why}, and what that means depends on its positions",
            "the base model, its configuration, a directory or a hub id",
            "give base=...",
        )
    return BaseModel.resolve(base)


def _unknown(reason: str) -> BaseModelError:
    return BaseModelError(
        f"how the base model knows where tokens stand could not be measured: {reason}",
        "absolute, rotary or relative positions, or none",
        "use the prompts as they are",
    )
