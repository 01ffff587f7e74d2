"""What can be done with prompts once they are values: look at them, compare, mix, join, cut and ensemble them.

All functions are pure: prompts go in, new prompts or numbers come out. A prompt that results from others keeps their
positions, their base and a head that they share; parameterisation and provenance are the sources' and are dropped.
Prompts that do not fit together are refused with everything in which they differ, never broadcast or truncated.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from softbridge.attachment import ATTACHED, attach, detach
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, EngineError, LoweringError, Obstacle, SoftbridgeError
from softbridge.geometry import Stack, stack_of
from softbridge.lower import check_fits, turn
from softbridge.prompt import Array, BaseId, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part, SoftPrompt, same_array
from softbridge.tensors import from_torch

Measure = Literal["average", "pairwise"]
How = Literal["majority", "mean"]

#: Rows of the vocabulary that are looked at in one piece.
_CHUNK = 8192


def refusal(found: str, expected: str, remedy: str) -> ValueError:
    """A `ValueError` for arguments that do not fit, which answers the three questions of `softbridge.errors`."""
    return ValueError(str(SoftbridgeError(found, expected, remedy)))


# Base models


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model without dropout and without gradients; afterwards every module is in the mode in which it was."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embed(model: Any, ids: Sequence[int], stack: Stack | None = None) -> Array:
    """Word vectors [N, H] of token ids [N], in the embedding's dtype, as the model's own ``inputs_embeds`` means them.

    That is what the stack's embedding module returns, and not the rows of its table: whether an embedding scale is
    applied inside that module or after it depends on the model and on the release of transformers.

    Raises:
        BaseModelError: this is no model with weights.
        ValueError: an id is not in the vocabulary.
    """
    import torch

    module = _embedding(model, stack)
    size = vocabulary(model, stack)
    wrong = sorted({int(token) for token in ids if not 0 <= token < size})
    if wrong:
        raise refusal(f"token ids {_few(wrong)}", f"0 to {size - 1}", "use the tokenizer that belongs to the model")
    with evaluating(module):
        tensor = torch.tensor([int(token) for token in ids], device=next(module.parameters()).device)
        return from_torch(module(tensor[None])[0])


def vocabulary(model: Any, stack: Stack | None = None) -> int:
    """V, the number of words that a stack's embedding knows."""
    return int(getattr(_embedding(model, stack), "num_embeddings", 0) or BaseModel.resolve(model).geometry.vocabulary)


def _embedding(model: Any, stack: Stack | None) -> Any:
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "config")):
        raise BaseModelError(
            f"word vectors were asked of a {type(model).__name__}",
            "a transformers model: they are weights, which no configuration has",
            "load the base model, and pass it",
        )
    geometry = BaseModel.resolve(model).geometry
    if stack is not None and geometry.stack(stack) is None:
        raise BaseModelError(f"{geometry.model_type} has no {stack}", "a stack of the model", "leave 'stack' out")
    if geometry.is_encoder_decoder:
        model = model.get_decoder() if stack == "decoder" else model.get_encoder()
    return model.get_input_embeddings()


def check_bare(model: Any) -> None:
    """Refuse a model that runs with a prompt, where its own function is asked for.

    Raises:
        EngineError: a prompt is attached.
    """
    if hasattr(model, ATTACHED):
        raise EngineError(
            f"a prompt is attached to this {type(model).__name__}",
            "a model without one",
            "call softbridge.detach(model) first",
        )


# Looking


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The words next to each virtual token, the nearest first.

    Attributes:
        ids: [P, k], token ids.
        similarities: [P, k], cosines, float64.
        words: P tuples of k words, where a tokenizer was given.
    """

    ids: Array
    similarities: Array
    words: tuple[tuple[str, ...], ...] | None = None


def nearest_words(
    prompt: SoftPrompt, words: Any, k: int = 1, *, stack: Stack | None = None, tokenizer: Any = None
) -> Neighbours:
    """The k words whose vectors have the largest cosine with each virtual token (Lester et al. 2021, section 7).

    Args:
        prompt: with an input prompt that enters before the embedding block.
        words: the base model, or word vectors [V, H].
        k: neighbours for each virtual token. Of equal ones the lower id comes first; a vector of zeros has cosine 0.
        stack: which of two input prompts to look at; may be left out if there is one.
        tokenizer: to have the words beside the ids.

    Raises:
        ValueError: the prompt has no such vectors, they are of another width, or the vocabulary has fewer than k words.
    """
    inputs = [part for part in prompt.inputs if stack in (None, part.stack)]
    if len(inputs) != 1 or inputs[0].entry != "before":
        there = ", ".join(_name(part) for part in prompt.parts)
        raise refusal(
            f"a prompt of {there}" + (f", and stack '{stack}'" if stack else ""),
            "one input prompt whose vectors enter before the embedding block, where words do",
            "choose a stack; keys and values, or vectors behind the embedding block, have no neighbours among words",
        )
    (part,) = inputs
    table = np.asarray(words) if isinstance(words, np.ndarray | list) else None
    size = len(table) if table is not None else vocabulary(words, part.stack)
    if not 1 <= k <= size:
        raise refusal(f"k = {k}", f"1 to {size}, the size of the vocabulary", "ask for fewer neighbours")
    rows = _unit(part.vectors)
    best = np.full((part.length, k), -np.inf)
    ids = np.zeros((part.length, k), np.int64)
    for first in range(0, size, _CHUNK):
        chunk = range(first, min(first + _CHUNK, size))
        vectors = table[chunk.start : chunk.stop] if table is not None else embed(words, chunk, part.stack)
        if vectors.ndim != 2 or vectors.shape[1] != rows.shape[1]:
            raise refusal(
                f"word vectors of shape {vectors.shape}", f"[V, {rows.shape[1]}]", "pass the prompt's own base model"
            )
        cosines = np.concatenate([best, rows @ _unit(vectors).T], axis=1)
        candidates = np.concatenate([ids, np.broadcast_to(np.array(chunk), (part.length, len(chunk)))], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        best, ids = (np.take_along_axis(array, order, axis=1) for array in (cosines, candidates))
    found = None
    if tokenizer is not None:
        found = tuple(tuple(tokenizer.convert_ids_to_tokens(row)) for row in ids.tolist())
    return Neighbours(ids, best, found)


# Comparing


def similarity(a: SoftPrompt, b: SoftPrompt, measure: Measure = "average") -> float:
    """How near two prompts are, from -1 to 1. See `similarity_matrix`."""
    return float(similarity_matrix([a, b], measure)[0, 1])


def similarity_matrix(prompts: Sequence[SoftPrompt], measure: Measure = "average") -> Array:
    """How near N prompts are to each other, [N, N], float64, symmetric: for choosing a source task (Vu et al. 2022).

    Each virtual token is one vector e_i. Of an input prompt that is the vector itself. Of a prefix it is all that the
    token brings into attention: its keys, then its values, of all heads, of all layers in rising order, of all sites
    in the first prompt's order, flattened into one vector [sum of 2·K·D] without any weighting, so that sites and
    layers with large numbers decide. Keys are compared in the frame in which they are stored.

    - ``average``: the cosine of the averaged vectors, cos(mean_i a_i, mean_j b_j). A prompt has 1 with itself.
    - ``pairwise``: the average of the pairwise cosines, mean_ij cos(a_i, b_j). A prompt has 1 with itself only if all
      of its vectors point the same way; the measure counts how concentrated prompts are, too.

    Lengths may differ, save for prefixes where that puts the keys into different frames. A vector of zeros has
    cosine 0 with everything.

    Raises:
        ValueError: the prompts are of different parts, widths or frames, or a prompt's parts differ in length.
    """
    if measure not in get_args(Measure):
        raise refusal(f"measure {measure!r}", " or ".join(get_args(Measure)), "choose one")
    _check_alike(prompts, lengths=False, dtypes=False)
    if prompts[0].prefixes:
        _check_positions(prompts)
    summaries = []
    for prompt, parts in zip(prompts, zip(*_matched(prompts), strict=True), strict=True):
        _one_length(prompt)
        rows = np.concatenate([_rows(part) for part in parts], axis=1)
        summary = _unit(rows).mean(axis=0) if measure == "pairwise" else _unit(rows.mean(axis=0, keepdims=True))[0]
        summaries.append(summary)
    stacked = np.stack(summaries)
    cosines: Array = stacked @ stacked.T
    return (cosines + cosines.T) / 2


def _rows(part: Part) -> Array:
    """[P, width], float64."""
    return (part.vectors if isinstance(part, InputPrompt) else _prefix_rows(part)).astype(np.float64)


def _prefix_rows(part: KeyValuePrefix) -> Array:
    """[P, sum of 2·K·D]: what each virtual token brings, for layers that may be ragged (unlike `flat`)."""
    arrays = [array for _, array in part.arrays()]
    return np.concatenate([array.transpose(1, 0, 2).reshape(part.length, -1) for array in arrays], axis=1)


def _unit(rows: Array) -> Array:
    """Rows of length 1, float64; a row of zeros stays."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norms > 0, norms, 1.0)


# Mixing


def average(prompts: Sequence[SoftPrompt]) -> SoftPrompt:
    """The mean of prompts, number by number; of copies of one prompt it is that prompt. See `interpolate`."""
    return interpolate(prompts, [1 / max(len(prompts), 1)] * len(prompts))


def interpolate(prompts: Sequence[SoftPrompt], weights: Sequence[float]) -> SoftPrompt:
    """The weighted sum of prompts, number by number, in float64, rounded to their dtype once.

    A prompt of weight 1 among prompts of weight 0 comes back bit for bit, and so does every number in which all
    prompts agree. Negative weights extrapolate.

    Args:
        prompts: of one shape, dtype and position frame.
        weights: one for each, which add up to 1. For two prompts a and b on the way from a to b: ``[1 - t, t]``.

    Raises:
        ValueError: prompts of different parts, shapes, dtypes, positions or heads; weights that are not theirs.
        BaseModelError: prompts for different base models.
    """
    _check_alike(prompts)
    _check_positions(prompts)
    total = math.fsum(weights)
    if len(weights) != len(prompts) or not abs(total - 1) <= 1e-6:  # not <=, so that NaN is refused
        raise refusal(
            f"{len(weights)} weights, which add up to {total:g}, for {len(prompts)} prompts",
            "one weight for each prompt, adding up to 1",
            "divide the weights by their sum",
        )
    used = [number for number, weight in enumerate(weights) if weight != 0]

    def blend(arrays: Sequence[Array]) -> Array:
        first = arrays[used[0]]
        wide = np.zeros(first.shape)
        for number in used:
            wide += weights[number] * arrays[number].astype(np.float64)
        agreed = np.all([arrays[number] == first for number in used], axis=0)
        return np.where(agreed, first, wide.astype(first.dtype))

    return _made_of(prompts, [_combined(parts, blend) for parts in _matched(prompts)])


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
      are turned by S - start_B with the model's own rotation; a relative bias counts from the tokens by itself; of
      *absolute* positions the keys and values were computed from hidden states, and nothing can move them: they stay,
      and the joined prompt is a start for training, with no claim about what B did alone.

    Args:
        prompts: of the same parts; of prefixes, the same layers, heads and head sizes. The widest dtype holds all;
            turned keys take at least float32.
        base: a model, configuration, directory or hub id; needed where keys may have to be turned.
        accept: ``length`` accepts frequencies that change with the length of the text.

    Raises:
        ValueError: prompts of different parts, widths or heads; counted and uncounted ones; a skewed relative
            bias, which depends on the length itself; input vectors and a prefix in one stack.
        BaseModelError: the base model is needed and was not given, its positions are unknown, or it does not fit.
        LoweringError: the frequencies change with the length of the text, and that was not accepted.
    """
    _check_alike(prompts, lengths=False, dtypes=False)
    resolved = None if base is None else BaseModel.resolve(base)
    if resolved is not None:
        for prompt in prompts:
            check_fits(prompt, resolved.geometry)
    joined = prompts[0]
    for prompt in prompts[1:]:
        joined = _join(joined, prompt, resolved, accept)
    return replace(_made_of(prompts, joined.parts), positions=joined.positions)


def _join(a: SoftPrompt, b: SoftPrompt, base: BaseModel | None, accept: Collection[str]) -> SoftPrompt:
    for prompt in (a, b):
        _one_kind(prompt)
        _no_template(prompt)
        if any(part.gated for part in prompt.prefixes):
            raise refusal("gates, which weigh all virtual tokens of a layer alike", "no gates", "join ungated prompts")
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
        _check_positions([a, b])
    for stack in counted:
        starts[stack] = _joined_start(a, b, stack)
        shift = starts[stack] - told[stack]
        if shift and any(part.site != "cross" and stack_of(part.site) == stack for part in b.prefixes):
            b = _moved(b, stack, shift, starts[stack] - a.counted()[stack], base, accept)
    parts = [
        _combined(pair, lambda arrays: np.concatenate(arrays, axis=arrays[0].ndim - 2)) for pair in _matched([a, b])
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
            return turn(b, stack, scheme.rotation(shift))
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
    move up by `start`, and with rotary positions and a sliding window they do, too, and the keys are turned back.
    Joined again by `concatenate`, slices that follow each other are the prompt that they were cut from.

    Args:
        prompt: with parts of one length, if tokens are cut off.
        start: the first virtual token.
        stop: behind the last one; None: P.
        layers: which layers of the prefixes to keep; None: all.
        base: a model, configuration, directory or hub id; needed if `start` is not 0 and there is a prefix.

    Raises:
        ValueError: there are no such virtual tokens or layers; parts of different lengths; input vectors and a prefix
            in one stack.
        BaseModelError: the base model is needed and was not given, or its positions are unknown.
    """
    length = _one_length(prompt) if (start, stop) != (0, None) else max(part.length for part in prompt.parts)
    stop = length if stop is None else stop
    if not 0 <= start < stop <= length:
        raise refusal(
            f"virtual tokens {start} to {stop} of {length}", "0 <= start < stop <= P", "choose others; ends are counted"
        )
    here = {layer for part in prompt.prefixes for layer in part.layers}
    if layers is not None and (not layers or not set(layers) <= here):
        raise refusal(
            f"layers {sorted(layers)}", f"some of {sorted(here) or 'none: this has no prefix'}", "choose them"
        )
    places = dict(prompt.positions.start)
    turns: dict[Stack, int] = {}
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
                turns[stack] = -start
                if places[stack] < stop - start:
                    raise refusal(
                        f"real tokens at {places[stack] + start}, less than the prefix length",
                        "a counted prefix",
                        "slice from 0",
                    )
    for stack, shift in turns.items():
        scheme = _need(base, "keys are turned").positions
        if scheme.kind == "rotary":
            prompt = turn(prompt, stack, scheme.rotation(shift))

    def cut(part: Part) -> Part | None:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=part.vectors[start:stop])
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
                "a window that is 'pinned', or rotary positions, whose keys can be turned",
                "slice from 0",
            )
    return False


# Ensembling


def ensemble(model: Any, prompts: Sequence[SoftPrompt], batch: Mapping[str, Any], *, engine: str = "native") -> Array:
    """The logits [N, B, ..., C] that one model gives for one batch under each of N prompts. `vote` combines them.

    The prompts are attached one after another: N forward passes, and one copy of the model. Heads that ride along are
    loaded and put back. The model is left as it was.

    Args:
        model: a `PreTrainedModel` without a prompt.
        prompts: for this model, of any kinds and lengths.
        batch: what the model is called with.
        engine: the name of an engine.

    Raises:
        EngineError, LoweringError, BaseModelError: as `softbridge.attach`.
        ValueError: no prompts, or the logits are not of one shape.
    """
    if not prompts:
        raise refusal("no prompts", "at least one", "pass some")
    check_bare(model)
    logits = []
    with evaluating(model):
        for prompt in prompts:
            running = attach(model, prompt, engine)
            try:
                running.eval()
                logits.append(from_torch(running(**batch).logits))
            finally:
                detach(running)
    shapes = sorted({array.shape for array in logits})
    if len(shapes) > 1:
        raise refusal(
            f"logits of shapes {_few(shapes)}",
            "one shape under all prompts",
            "use an engine that strips virtual tokens",
        )
    return np.stack(logits)


def vote(logits: npt.ArrayLike, how: How = "majority") -> Array:
    """The classes [...] that N prompts agree on, from their logits [N, ..., C] (Lester et al. 2021, section 6).

    - ``majority``: the class that is the largest one for most prompts. Between equally many votes the larger mean
      probability decides, and then the lower number.
    - ``mean``: the class with the largest probability, averaged over the prompts.

    Raises:
        ValueError: the logits are not [N, ..., C].
    """
    scores = np.asarray(logits).astype(np.float64)
    if scores.ndim < 2 or not scores.size or how not in get_args(How):
        raise refusal(
            f"logits of shape {scores.shape}, how={how!r}",
            f"[N, ..., C], for N prompts and C classes; {' or '.join(get_args(How))}",
            "stack the prompts' logits (ensemble does)",
        )
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mean = (exponents / exponents.sum(axis=-1, keepdims=True)).mean(axis=0)
    if how == "mean":
        return np.asarray(mean.argmax(axis=-1))
    votes = (np.arange(scores.shape[-1]) == scores.argmax(axis=-1)[..., None]).sum(axis=0)
    leading = votes == votes.max(axis=-1, keepdims=True)
    return np.asarray(np.where(leading, mean, -1.0).argmax(axis=-1))


# What fits together


def _key(part: Part) -> tuple[str, str]:
    return ("input", part.stack) if isinstance(part, InputPrompt) else ("prefix", part.site)


def _name(part: Part) -> str:
    if isinstance(part, InputPrompt):
        place = part.template or part.placement
        scale = "" if part.told_scale is None else f", multiplied by {part.told_scale:g}"
        return f"{part.stack} input vectors ({part.entry} the embedding block, {place}{scale})"
    return f"a prefix ('{part.site}')"


def _layout(prompt: SoftPrompt, lengths: bool, dtypes: bool) -> dict[str, str]:
    """Each array's name -> its shape and dtype in words, as far as they matter."""
    layout = {}
    for part in prompt.parts:
        for name, array in part.arrays():
            shape = list(array.shape)
            if not lengths and ".gate." not in name:
                shape[-2] = 0
            words = "x".join("P" if size == 0 else str(size) for size in shape)
            layout[f"{_name(part)} {name}"] = f"{words} {array.dtype}" if dtypes else words
    return layout


def _check_alike(prompts: Sequence[SoftPrompt], *, lengths: bool = True, dtypes: bool = True) -> None:
    """Refuse prompts that differ in parts, shapes or dtypes, or that are for different base models."""
    if not prompts:
        raise refusal("no prompts", "at least one", "pass some")
    first = _layout(prompts[0], lengths, dtypes)
    for number, prompt in enumerate(prompts):
        other = _layout(prompt, lengths, dtypes)
        names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        parts, others = ([_name(part) for part in each.parts] for each in (prompts[0], prompt))
        if names:
            differences = (
                [f"their parts: {_few(parts)}; {_few(others)}"]
                if sorted(parts) != sorted(others)
                else [f"{name}: {first.get(name, 'none')} and {other.get(name, 'none')}" for name in names]
            )
            raise refusal(
                f"prompts 0 and {number} differ in {_few(differences)}",
                "the same parts, layers, shapes and dtypes" if lengths else "the same parts, layers and widths",
                "use prompts that were trained alike, or cut them with slice",
            )
    _common_base(prompts)


def _check_positions(prompts: Sequence[SoftPrompt]) -> None:
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
            "numbers of one model mean nothing to another",
        )
    names = {prompt.base.name for prompt in prompts}
    return BaseId(names.pop() if len(names) == 1 else None, next(iter(geometries), None))


def _matched(prompts: Sequence[SoftPrompt]) -> list[tuple[Part, ...]]:
    """The parts that belong together, in the first prompt's order."""
    tables = [{_key(part): part for part in prompt.parts} for prompt in prompts]
    return [tuple(table[key] for table in tables) for key in tables[0]]


def _combined(parts: Sequence[Part], combine: Any) -> Part:
    """One part, whose arrays are `combine` of the parts' arrays."""
    first = parts[0]
    if isinstance(first, InputPrompt):
        inputs = [part for part in parts if isinstance(part, InputPrompt)]
        return replace(first, vectors=combine([part.vectors for part in inputs]))
    prefixes = [part for part in parts if isinstance(part, KeyValuePrefix)]
    layers = {}
    for layer in first.layers:
        pairs = [part.layers[layer] for part in prefixes]
        gates = [pair.gate for pair in pairs if pair.gate is not None]
        gate = Gate(combine([g.weight for g in gates]), combine([g.bias for g in gates])) if gates else None
        layers[layer] = KeyValue(combine([pair.keys for pair in pairs]), combine([pair.values for pair in pairs]), gate)
    return KeyValuePrefix(first.site, layers)


def _made_of(prompts: Sequence[SoftPrompt], parts: Sequence[Part]) -> SoftPrompt:
    """A prompt that is made of others: their base, and their head if they share one."""
    head = prompts[0].head
    for number, prompt in enumerate(prompts):
        if prompt.head.keys() != head.keys() or not all(same_array(head[name], prompt.head[name]) for name in head):
            raise refusal(
                f"prompts 0 and {number} have different heads ({_few(sorted(head))}; {_few(sorted(prompt.head))})",
                "the same head, bit for bit, or none",
                "leave the heads out: dataclasses.replace(prompt, head={})",
            )
    untold = {part.stack for prompt in prompts for part in prompt.inputs if part.scale == "untold"}
    asked = (replace(p, scale="untold") if isinstance(p, InputPrompt) and p.stack in untold else p for p in parts)
    return SoftPrompt(tuple(asked), prompts[0].positions, _common_base(prompts), head)


def _one_length(prompt: SoftPrompt) -> int:
    lengths = sorted({part.length for part in prompt.parts})
    if len(lengths) > 1:
        raise refusal(f"parts of lengths {_few(lengths)} in one prompt", "one length", "take the parts one by one")
    return lengths[0]


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


def _few(items: Collection[Any]) -> str:
    """The first few of a list, in words."""
    shown = ", ".join(str(item) for item in list(items)[:4]) or "none"
    return shown + (f" and {len(items) - 4} more" if len(items) > 4 else "")
