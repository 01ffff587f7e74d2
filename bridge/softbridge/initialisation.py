"""Where training starts: the published ways to initialise a soft prompt, each a function that returns one.

The choice decides whether a prompt learns at all (Lester et al. 2021, figure 3b, of vectors in the input; Li & Liang
2021, on initialisation, of prefixes): random numbers are the worst start nearly everywhere, words of the vocabulary a
good one for vectors in the input sequence, and the key/value cache of a real text the best one for a prefix.

Token ids go in. A `tokenizer` is a convenience: where one is given, a text may stand for its ids, without special
tokens. Everything is seeded, and no weight of the model is changed. Words and caches keep the model's own dtype, bit
for bit; what is drawn is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from softbridge.arrays import Array, from_torch
from softbridge.attachment.attach import check_bare
from softbridge.base import cache as caches
from softbridge.base import words
from softbridge.base.model import BaseModel
from softbridge.base.words import evaluating, vocabulary
from softbridge.errors import BaseModelError, refusal
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.lowering.expressible import check_fits
from softbridge.prompt.part import InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, Positions, SoftPrompt
from softbridge.tools import mix

#: Token ids, or a text where a tokenizer is given.
Tokens: TypeAlias = Sequence[int] | str

#: How many of the most frequent words are sampled from, and how far random numbers reach (Lester et al. 2021).
FREQUENT = 5000
BOUND = 0.5


def random_uniform(
    base: Any,
    length: int,
    *,
    stack: Stack | None = None,
    sites: Sequence[Site] = (),
    bound: float = BOUND,
    seed: int = 0,
) -> SoftPrompt:
    """Numbers drawn evenly from [-bound, bound): an input prompt, or a prefix if sites are named.

    Lester et al. 2021 (https://arxiv.org/abs/2104.08691) take [-0.5, 0.5].

    Args:
        base: a `Geometry`, or what `BaseModel.resolve` takes; no weights are needed.
        length: P.
        stack: which stack's input; None: the encoder's if there is one.
        sites: where a prefix goes, in all layers; none: an input prompt.
        bound: half the width of the interval.
        seed: of the numbers.

    Raises:
        ValueError: the length is not positive.
        BaseModelError: the model does not have this stack or site.
    """
    generator = np.random.default_rng(seed)
    return _filled(base, length, stack, sites, lambda shape: generator.uniform(-bound, bound, shape).astype(np.float32))


def zero(base: Any, length: int, *, stack: Stack | None = None, sites: Sequence[Site] = ()) -> SoftPrompt:
    """Nothing but zeros; arguments and errors as for `random_uniform`.

    It is not the same as no prompt: real tokens attend to the virtual ones, and stand P positions later.
    """
    return _filled(base, length, stack, sites, lambda shape: np.zeros(shape, np.float32))


def sampled_vocabulary(
    model: Any,
    length: int,
    *,
    candidates: int = FREQUENT,
    ranking: Sequence[int] | None = None,
    exclude: Collection[int] = (),
    stack: Stack | None = None,
    seed: int = 0,
) -> SoftPrompt:
    """The vectors of P words, drawn without replacement from the most frequent ones (Lester et al. 2021).

    Args:
        model: a transformers model. Its embedding module is asked, so that the vectors are what ``inputs_embeds``
            means in this environment, embedding scale included.
        length: P.
        candidates: how many of the most frequent words to draw from (all, if the vocabulary has fewer).
        ranking: token ids, the most frequent first. None: the ids themselves are the ranks, as in vocabularies that
            were built by frequency (SentencePiece, BPE).
        exclude: ids that are not drawn (special tokens, say); they do not count among the candidates.
        stack: which stack's input; None: the encoder's if there is one.
        seed: of the draw.

    Raises:
        ValueError: fewer candidates than virtual tokens, or a ranking with an id that is not in the vocabulary.
        BaseModelError: `model` has no weights, or does not have this stack.
    """
    ids = _sample(model, length, candidates, ranking, exclude, _input_stack(BaseModel.resolve(model), stack), seed)
    return _input(model, lambda embed: embed(ids), stack)


def class_labels(
    model: Any,
    labels: Sequence[Tokens],
    length: int,
    *,
    tokenizer: Any = None,
    candidates: int = FREQUENT,
    ranking: Sequence[int] | None = None,
    exclude: Collection[int] = (),
    stack: Stack | None = None,
    seed: int = 0,
) -> SoftPrompt:
    """One vector for each class label, then words from the sampled vocabulary up to P (Lester et al. 2021).

    A label of several tokens is the mean of their vectors. Words that are labels by themselves are not drawn again.

    Args:
        model: a transformers model.
        labels: the token ids of each label.
        length: P, at least the number of labels.
        tokenizer: so that labels may be texts.
        candidates: as in `sampled_vocabulary`.
        ranking: as in `sampled_vocabulary`.
        exclude: as in `sampled_vocabulary`.
        stack: which stack's input; None: the encoder's if there is one.
        seed: of the draw.

    Raises:
        ValueError: more labels than virtual tokens, no labels, an empty one, or as `sampled_vocabulary`.
        BaseModelError: `model` has no weights, or does not have this stack.
    """
    words = [_ids(label, tokenizer) for label in labels]
    if not 0 < len(words) <= length:
        raise refusal(
            f"{len(words)} labels for {length} virtual tokens",
            "at least one label, and a virtual token for each",
            "make the prompt longer",
        )
    alone = {ids[0] for ids in words if len(ids) == 1}
    there = _input_stack(BaseModel.resolve(model), stack)
    rest = length - len(words)
    drawn = _sample(model, rest, candidates, ranking, {*exclude, *alone}, there, seed) if rest else []

    def vectors(embed: Callable[[Sequence[int]], Array]) -> Array:
        rows = [embed(ids) for ids in words]
        means = [row.astype(np.float64).mean(axis=0, keepdims=True).astype(row.dtype) for row in rows]
        return np.concatenate([*means, embed(drawn)] if drawn else means)

    return _input(model, vectors, stack)


def text(
    model: Any, ids: Tokens, length: int | None = None, *, tokenizer: Any = None, stack: Stack | None = None
) -> SoftPrompt:
    """The vectors of a text's tokens: before training, the prompt is that text, put in front.

    Args:
        model: a transformers model.
        ids: the text's token ids.
        length: P; the text is cut off, or repeated, to that. None: as long as the text.
        tokenizer: so that the text may be given as such.
        stack: which stack's input; None: the encoder's if there is one.

    Raises:
        ValueError: there are no ids, or one is not in the vocabulary.
        BaseModelError: `model` has no weights, or does not have this stack.
    """
    tokens = _to_length(_ids(ids, tokenizer), length)
    return _input(model, lambda embed: embed(tokens), stack)


def text_cache(model: Any, ids: Tokens, length: int | None = None, *, tokenizer: Any = None) -> SoftPrompt:
    """The key/value cache of a text as a prefix: before training, the prefix is that text, put in front.

    The model runs on the text, at positions 0 to P - 1, and keys and values are taken as its cache holds them: counted,
    real tokens stand at P, and a sliding window slides. A text that models see at the start of everything (a
    beginning-of-sequence token with it) is the better start: pass its ids. In a hybrid model the text leaves states
    behind, too, which no prefix holds: there it is a start, and not that text.

    Args:
        model: a transformers model with a decoder and no encoder: in an encoder no token is computed without the ones
            behind it, and beneath an encoder every cache is the cache of one input.
        ids: the text's token ids.
        length: P; the text is cut off, or repeated, to that. None: as long as the text.
        tokenizer: so that the text may be given as such.

    Raises:
        ValueError: there are no ids, or one is not in the vocabulary.
        BaseModelError: `model` has no weights or has an encoder, or its cache does not hold keys and values [K, P, D]
            for every layer that attends.
        EngineError: a prompt is attached.
    """
    import torch
    from transformers import DynamicCache

    tokens = _to_length(_ids(ids, tokenizer), length)
    base = BaseModel.resolve(model)
    words.embed(model, tokens)  # refuses a configuration, and ids beyond the vocabulary
    if base.geometry.encoder is not None or base.geometry.decoder is None:
        raise BaseModelError(
            f"the cache of a text was asked of {base.geometry.model_type}, which has an encoder",
            "a decoder-only model, in which a text's keys and values do not depend on what follows",
            "start the prefix from another prompt or from random numbers",
        )
    check_bare(model)
    given = torch.tensor([tokens], device=next(model.get_input_embeddings().parameters()).device)
    decoder, stack = base.geometry.decoder, model.base_model
    with evaluating(model):
        # A cache of its own: the model's may keep no more than a sliding window. The stack: it computes no logits.
        cache = caches.empty(model, 1) if decoder.stateful else DynamicCache()
        told = {**caches.handed(stack.forward, cache), "use_cache": True}
        stack(given, attention_mask=torch.ones_like(given), **told)
    expected = {n: (heads, len(tokens), width) for n in decoder.attending for heads, width in [decoder.shape(n)]}
    held = caches.pairs(cache)
    shapes = {n: tuple(tuple(half.shape[1:]) for half in pair) for n, pair in held.items()}
    if shapes != {n: (each, each) for n, each in expected.items()}:
        raise BaseModelError(
            f"the cache of {base.geometry.model_type} holds {shapes}",
            f"keys and values {expected}, layer by layer",
            "start the prefix from another prompt or from random numbers",
        )
    layers = {n: KeyValue(from_torch(keys[0]), from_torch(values[0])) for n, (keys, values) in held.items()}
    return SoftPrompt((KeyValuePrefix("self", layers),), Positions({"decoder": len(tokens)}), base.id)


def another(source: SoftPrompt, base: Any, length: int | None = None) -> SoftPrompt:
    """A copy of a prompt that was trained on another task (SPoT, Vu et al. 2022, https://arxiv.org/abs/2110.07904).

    `softbridge.tools.similarity` helps to choose the source. What belongs to its task or its training is left behind:
    head, parameterisation, provenance.

    Args:
        source: the trained prompt.
        base: the base model to train on: a `Geometry`, or what `BaseModel.resolve` takes.
        length: P, if a certain one is expected.

    Raises:
        ValueError: the source has another length.
        BaseModelError: the source's shapes are not the model's, or it is known to be for another family.
    """
    lengths = sorted({part.length for part in source.parts})
    if length is not None and lengths != [length]:
        raise refusal(
            f"a source prompt of length {', '.join(map(str, lengths))}",
            f"{length} virtual tokens",
            "train with the source's length, or cut it with softbridge.tools.slice",
        )
    here = _identity(base)
    assert here.geometry is not None
    check_fits(source, here.geometry)
    if source.base.geometry is not None and source.base.geometry.model_type != here.geometry.model_type:
        raise BaseModelError(
            f"a source prompt for {source.base.geometry.model_type}",
            f"one for {here.geometry.model_type}: equal shapes alone are not enough",
            "choose a source that was trained on this base model",
        )
    return replace(source, base=here, head={}, training=None, origin=None)


def average(sources: Sequence[SoftPrompt], base: Any, length: int | None = None) -> SoftPrompt:
    """The mean of several trained prompts; arguments and errors as for `another` and `softbridge.tools.average`."""
    return another(mix.average([replace(source, head={}) for source in sources]), base, length)


def _identity(base: Any) -> BaseId:
    return BaseId(None, base) if isinstance(base, Geometry) else BaseModel.resolve(base).id


def _filled(
    base: Any, length: int, stack: Stack | None, sites: Sequence[Site], numbers: Callable[[tuple[int, ...]], Array]
) -> SoftPrompt:
    here = _identity(base)
    geometry = here.geometry
    assert geometry is not None
    if length < 1 or (stack is not None and sites):
        raise refusal(
            f"length {length}, stack {stack!r}, sites {tuple(sites)!r}",
            "at least one virtual token, and a stack (input prompt) or sites (prefix)",
            "leave one of them out",
        )
    if not sites:
        stack = stack or _default_stack(geometry)
        prompt = SoftPrompt(
            (InputPrompt(numbers((length, geometry.input_width)), stack),), Positions({stack: length}), here
        )
        check_fits(prompt, geometry)
        return prompt
    parts: list[Part] = []
    for site in sites:
        shape = geometry.site(site)
        if shape is None:
            raise BaseModelError(f"{geometry.model_type} has no site '{site}'", "a site of the model", "choose another")
        sizes = {n: (heads, length, width) for n in geometry.attending(site) for heads, width in [shape.shape(n)]}
        layers = {layer: KeyValue(numbers(size), numbers(size)) for layer, size in sizes.items()}
        parts.append(KeyValuePrefix(site, layers))
    return SoftPrompt(tuple(parts), Positions({stack_of(site): length for site in sites if site != "cross"}), here)


def _default_stack(geometry: Geometry) -> Stack:
    return "decoder" if geometry.encoder is None else "encoder"


def _input_stack(base: BaseModel, stack: Stack | None) -> Stack:
    return stack or _default_stack(base.geometry)


def _input(model: Any, vectors: Callable[[Callable[[Sequence[int]], Array]], Array], stack: Stack | None) -> SoftPrompt:
    """An input prompt from what `vectors` makes of the model's word vectors."""
    base = BaseModel.resolve(model)
    there = _input_stack(base, stack)
    rows = vectors(lambda ids: words.embed(model, ids, there))
    part = InputPrompt(rows, there, scale=base.scale)
    prompt = SoftPrompt((part,), Positions({there: len(rows)}), base.id)
    check_fits(prompt, base.geometry)
    return prompt


def _sample(
    model: Any,
    length: int,
    candidates: int,
    ranking: Sequence[int] | None,
    exclude: Collection[int],
    stack: Stack,
    seed: int,
) -> list[int]:
    """Token ids [P], all different."""
    ranked = range(vocabulary(model, stack)) if ranking is None else dict.fromkeys(int(i) for i in ranking)
    pool = [token for token in ranked if token not in exclude][:candidates]
    if not 1 <= length <= len(pool):
        raise refusal(
            f"{length} words to be drawn without replacement from {len(pool)}",
            "at least one, and as many candidates as virtual tokens",
            "shorten the prompt, or allow more candidates",
        )
    return [int(token) for token in np.random.default_rng(seed).choice(pool, length, replace=False)]


def _ids(tokens: Tokens, tokenizer: Any) -> list[int]:
    if isinstance(tokens, str):
        if tokenizer is None:
            raise refusal(f"the text {tokens!r:.40}", "token ids, or a tokenizer", "give tokenizer=...")
        tokens = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    given: Any = tokens
    if getattr(given, "ndim", 1) == 2 and len(given) == 1:  # what a tokenizer returns for one text
        given = given[0]
    ids = [int(token) for token in given]
    if not ids:
        raise refusal("no tokens", "at least one", "give a text that is not empty")
    return ids


def _to_length(ids: list[int], length: int | None) -> list[int]:
    """Cut off, or repeated from the start."""
    if length is None:
        return ids
    if length < 1:
        raise refusal(f"length {length}", "at least one virtual token", "make the prompt longer")
    return [ids[place % len(ids)] for place in range(length)]
