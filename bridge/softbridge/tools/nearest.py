"""Which words the vectors of an input prompt are nearest to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.words import embed, vocabulary
from softbridge.errors import refusal
from softbridge.geometry import Stack
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.tools.alike import name_in, unit

#: Rows of the vocabulary that are looked at in one piece.
_CHUNK = 8192


# Looking


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The words next to each virtual token, the nearest first.

    Attributes:
        ids: [P, k], token ids.
        similarities: [P, k], cosines, float64.
        words: P tuples of k words, where a tokenizer was given; of a padded vocabulary some have none, and are empty.
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
        tokenizer: to name the words as well as the ids.

    Raises:
        ValueError: the prompt has no vectors in this stack's input, their width is not the embedding's, or the
            vocabulary has fewer than k words.
    """
    inputs = [part for part in prompt.inputs if stack in (None, part.stack)]
    if len(inputs) != 1 or inputs[0].entry != "before":
        there = ", ".join(name_in(part) for part in prompt.parts)
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
    rows = unit(part.vectors)
    best = np.full((part.length, k), -np.inf)
    ids = np.zeros((part.length, k), np.int64)
    for first in range(0, size, _CHUNK):
        chunk = range(first, min(first + _CHUNK, size))
        vectors = table[chunk.start : chunk.stop] if table is not None else embed(words, chunk, part.stack)
        if vectors.ndim != 2 or vectors.shape[1] != rows.shape[1]:
            raise refusal(
                f"word vectors of shape {vectors.shape}", f"[V, {rows.shape[1]}]", "pass the prompt's own base model"
            )
        cosines = np.concatenate([best, rows @ unit(vectors).T], axis=1)
        candidates = np.concatenate([ids, np.broadcast_to(np.array(chunk), (part.length, len(chunk)))], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        best, ids = (np.take_along_axis(array, order, axis=1) for array in (cosines, candidates))
    found = None
    if tokenizer is not None:
        found = tuple(tuple(word or "" for word in tokenizer.convert_ids_to_tokens(row)) for row in ids.tolist())
    return Neighbours(ids, best, found)
