"""What a prompt looks like: the numbers of the pictures that `softbridge inspect --html` draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softbridge.arrays import Array, from_torch
from softbridge.base import cache
from softbridge.base.model import BaseModel
from softbridge.base.words import embed, evaluating, vocabulary
from softbridge.geometry import Stack
from softbridge.parts import name_of
from softbridge.prompt.part import InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.tools.alike import unit
from softbridge.tools.nearest import Neighbours, nearest_words
from softbridge.tools.similarity import rows_of

#: Words of the vocabulary, drawn at random, that the model's own numbers are of.
WORDS = 64
#: What is told of the norms of these: hardly any is below, half are, hardly any is above.
SHARES = (5, 50, 95)


@dataclass(frozen=True, eq=False)
class Picture:
    """One part of a prompt.

    Attributes:
        name: see `softbridge.parts.name_of`.
        layers: numbers of those that it has numbers for; empty: it stands in the input.
        norms: what -> [L or 1, P] float64, the lengths of its vectors. Of keys and values [K, P, D] of a layer it is
            the root of the mean square over the heads, so that models of many heads compare with those of few.
        own: what -> [L or 1, 3], the same of the base model's own on random words: the `SHARES` of them, in percent.
        unknown: why `own` is empty; else nothing.
        spectrum: what -> singular values, the largest first, of the virtual tokens as rows: [P, width].
        cosines: [P, P], between virtual tokens.
        words: the words next to each, where the base model and its tokenizer are there.
    """

    name: str
    layers: tuple[int, ...]
    norms: Mapping[str, Array]
    spectrum: Mapping[str, Array]
    cosines: Array
    own: Mapping[str, Array] = field(default_factory=dict)
    unknown: str = ""
    words: Neighbours | None = None

    @property
    def louder(self) -> float | None:
        """In the layer where that is most: how many times as long a median key (or vector) is as a median own one."""
        what = next(iter(self.own), None)
        if what is None:
            return None
        return float((np.median(self.norms[what], axis=1) / np.maximum(self.own[what][:, 1], 1e-300)).max())


def portrait(prompt: SoftPrompt, model: Any = None, tokenizer: Any = None, *, top: int = 3) -> list[Picture]:
    """A picture of each part.

    Args:
        prompt: any.
        model: the base model with its weights, or None.
        tokenizer: the base model's, to name words; or None.
        top: how many words for each virtual token.

    Raises:
        SoftbridgeError: the prompt does not fit the model.
    """
    return [_picture(prompt, part, model, tokenizer, top) for part in prompt.parts]


def _picture(prompt: SoftPrompt, part: Part, model: Any, tokenizer: Any, top: int) -> Picture:
    if isinstance(part, InputPrompt):
        layers: tuple[int, ...] = ()
        named = {"vectors": [part.vectors[None]]}
    elif isinstance(part, KeyValuePrefix):
        layers = tuple(part.layers)
        pairs = part.layers.values()
        named = {"keys": [pair.keys for pair in pairs], "values": [pair.values for pair in pairs]}
    else:
        layers = tuple(part.layers)
        named = {"vectors": [one.vectors[None] for one in part.layers.values()]}
    rows = rows_of(part)
    own = _own(part, model, layers)
    words = None
    if model is not None and isinstance(part, InputPrompt) and part.entry == "before":
        words = nearest_words(prompt, model, top, stack=part.stack, tokenizer=tokenizer)
    return Picture(
        name_of(part),
        layers,
        {what: np.stack([norms(array) for array in arrays]) for what, arrays in named.items()},
        {what: _spectrum(arrays) for what, arrays in named.items()},
        unit(rows) @ unit(rows).T,
        {} if isinstance(own, str) else own,
        own if isinstance(own, str) else "",
        words,
    )


def norms(array: Array) -> Array:
    """[P] of [K, P, D]: the root of the mean, over the heads, of the squared lengths."""
    wide: Array = array.astype(np.float64)
    found: Array = np.sqrt((wide**2).sum(-1).mean(0))
    return found


def _spectrum(arrays: list[Array]) -> Array:
    flat = np.concatenate(
        [array.astype(np.float64).transpose(1, 0, 2).reshape(array.shape[1], -1) for array in arrays], 1
    )
    found: Array = np.linalg.svd(flat, compute_uv=False)
    return found


def _own(part: Part, model: Any, layers: tuple[int, ...]) -> dict[str, Array] | str:
    """What the base model has in the place of a part's numbers, for random words; or why that is not known."""
    if model is None:
        return "no base model with weights was given"
    if isinstance(part, InputPrompt) and part.entry == "before":
        return {"vectors": _shares(embed(model, _words(model, part.stack), part.stack)[None])[None]}
    if not isinstance(part, KeyValuePrefix):
        return "the model has no numbers of its own in that place"
    if part.site == "encoder":
        return "an encoder keeps its keys in no cache, where they could be seen"
    held = _cached(model, part.site)
    missing = [layer for layer in layers if layer not in held]
    if missing:
        return f"the model's cache has no keys of layers {', '.join(map(str, missing))}"
    return {
        what: np.stack([_shares(held[layer][side]) for layer in layers]) for side, what in enumerate(("keys", "values"))
    }


def _cached(model: Any, site: str) -> dict[int, tuple[Array, Array]]:
    """Layer -> keys and values [K, N, D] that random words leave in the model's own cache."""
    import torch

    geometry = BaseModel.resolve(model).geometry
    device = next(model.parameters()).device
    ids = torch.tensor([_words(model, "decoder")], device=device)
    given = {"decoder_input_ids": ids} if geometry.is_encoder_decoder else {}
    with evaluating(model):
        whole = cache.of(model(input_ids=ids, use_cache=True, **given))
    whole = getattr(whole, f"{'cross' if site == 'cross' else 'self'}_attention_cache", whole)
    return {n: (from_torch(keys[0]), from_torch(values[0])) for n, (keys, values) in cache.pairs(whole).items()}


def _words(model: Any, stack: Stack) -> list[int]:
    size = vocabulary(model, stack)
    return [int(word) for word in np.random.default_rng(0).integers(0, size, WORDS)]


def _shares(array: Array) -> Array:
    found: Array = np.percentile(norms(array), SHARES)
    return found
