"""What answers mean in OpenPrompt: label words, or a linear layer on the hidden state in the place of the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softbridge import untrusted
from softbridge.errors import few
from softbridge.prompt import Array
from softbridge.template import Slot, Template, Verbaliser
from softbridge_archive import contents

#: What `ManualVerbalizer` has: token ids [C, words, tokens], and which of them count.
WORDS, COUNTED, KNOWN = "label_words_ids", "words_ids_mask", {"label_words_ids", "words_ids_mask", "label_words_mask"}
#: What `SoftVerbalizer` has on a model whose head is one linear layer, beside the words that it began with.
LAYER = "head.weight"
#: Ids beyond so many are not looked at.
MOST = 4096


def classes_of(tensors: Mapping[str, untrusted.Stored]) -> Verbaliser | None:
    """The label words of a `ManualVerbalizer`, where each is one token and stands for one class only.

    OpenPrompt's score of a class is the mean of its words' log-probabilities among all label words: the mean of their
    logits, but for a number that all classes share.
    """
    if not {WORDS, COUNTED} <= tensors.keys() <= KNOWN:
        return None
    ids, counted = tensors[WORDS], tensors[COUNTED]
    if len(ids.shape) != 3 or ids.shape != counted.shape or ids.shape[2] != 1 or not 0 < math.prod(ids.shape) <= MOST:
        return None
    if not ids.dtype.kind == counted.dtype.kind == "i":
        return None
    rows = zip(ids.array()[..., 0].tolist(), counted.array()[..., 0].tolist(), strict=True)
    words = [tuple(word for word, one in zip(*row, strict=True) if one) for row in rows]
    try:
        return Verbaliser(tuple((str(number), own) for number, own in enumerate(words)))
    except ValueError:
        return None


def explained(template: Template, classes: Verbaliser | None) -> Template:
    """The template with these label words, if it has a slot and no words of its own."""
    slot = any(isinstance(piece, Slot) for piece in template.pieces)
    return replace(template, verbaliser=classes) if slot and template.verbaliser is None else template


def head_of(tensors: Mapping[str, untrusted.Stored], causal: bool) -> tuple[dict[str, Array], str]:
    """A `SoftVerbalizer` as the head of a sequence classifier, and what of a verbaliser is left, in words.

    Args:
        causal: whether the hidden state in the place of the answer is that of the last token, and the model a decoder:
            then a classifier's ``score`` sees the same.
    """
    others = sorted(tensors.keys() - KNOWN)
    if causal and others == [LAYER]:
        return {"score.weight": contents.matrix(tensors[LAYER])}, ""
    return (
        {},
        f"a verbaliser of its own weights, which no classifier of transformers is: {few(others)}" if others else "",
    )


def told(run: Any, *path: str) -> Any:
    """What a run's configuration says under these names, or None."""
    for name in path:
        run = run.get(name) if isinstance(run, dict) else None
    return run
