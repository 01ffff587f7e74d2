"""Templates: virtual tokens at free positions among real ones, a slot for an answer, and what answers mean.

P-tuning (Liu et al. 2021, arXiv 2103.10385) turns a classification into a cloze task: in "[v v v] x [v v v] [MASK]" the
virtual tokens v are trained and x is the text, and the word in the slot says the class (the verbaliser, after Schick
and Schütze 2021, arXiv 2001.07676). A template is plain data. It makes rows of token ids in which every virtual token
is the id `PLACEHOLDER`; an engine puts the n-th vector of the prompt in the place of a row's n-th placeholder. So
everything that knows rows of token ids (masks, padding, labels, positions) treats virtual tokens like any other.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

#: The token id that stands for a virtual token. No vocabulary has it, so that a row which meets a model without the
#: prompt fails instead of meaning something else.
PLACEHOLDER = -1


@dataclass(frozen=True)
class Virtual:
    """So many virtual tokens."""

    count: int

    def __post_init__(self) -> None:
        if type(self.count) is not int or self.count < 1:
            raise ValueError(f"virtual tokens: a whole number from 1, not {self.count!r:.40}")


@dataclass(frozen=True)
class Field:
    """The place of a text, by name."""

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or self.name in ("mask", "label"):
            raise ValueError(f"field: a name, and neither 'mask' nor 'label', not {self.name!r:.40}")


@dataclass(frozen=True)
class Words:
    """Fixed tokens of the vocabulary."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _token_ids(self.ids, "words"))


@dataclass(frozen=True)
class Slot:
    """The one place of the answer: a mask token, or what a causal model goes on with."""


Piece: TypeAlias = Virtual | Field | Words | Slot


@dataclass(frozen=True)
class Verbaliser:
    """What answers mean.

    Attributes:
        classes: (name of a class, the token ids of its label words), in the order of the class numbers. The score of a
            class is the mean of its words' logits. No word belongs to two classes.
    """

    classes: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        classes = tuple((name, _token_ids(words, f"words of {name!r:.40}")) for name, words in self.classes)
        object.__setattr__(self, "classes", classes)
        if len(classes) < 2 or not all(isinstance(name, str) for name, _ in classes):
            raise ValueError("verbaliser: at least two classes, each with a name")
        if len({name for name, _ in classes}) < len(classes):
            raise ValueError("verbaliser: two classes of one name")
        words = [word for _, own in classes for word in own]
        if len(set(words)) < len(words):
            raise ValueError("verbaliser: a label word stands for one class only, and once")


@dataclass(frozen=True)
class Template:
    """Pieces in the order in which they stand in the input.

    Attributes:
        pieces: at least one `Virtual`, every `Field` once, at most one `Slot`.
        verbaliser: what answers in the slot mean, or None.
    """

    pieces: tuple[Piece, ...]
    verbaliser: Verbaliser | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple(self.pieces))
        if self.length < 1:
            raise ValueError("template: at least one virtual token")
        if len(set(self.fields)) < len(self.fields):
            raise ValueError(f"template: each field once, not {', '.join(self.fields)}")
        slots = sum(isinstance(piece, Slot) for piece in self.pieces)
        if slots > 1 or (self.verbaliser is not None and slots == 0):
            raise ValueError("template: one slot for the answer, where there is a verbaliser")

    @classmethod
    def parse(
        cls,
        text: str,
        encode: Callable[[str], Sequence[int]],
        *,
        before: Sequence[int] = (),
        after: Sequence[int] = (),
        verbaliser: Mapping[str, Sequence[str]] | None = None,
    ) -> Template:
        """From a text such as ``"{3}{text}{3} Overall it is{mask}."``.

        Args:
            text: ``{n}`` for n virtual tokens, ``{name}`` for a field, ``{mask}`` for the slot; the rest is encoded.
            encode: text -> token ids, without special tokens.
            before: token ids in front of everything, such as that of [CLS].
            after: token ids behind everything, such as that of [SEP].
            verbaliser: class -> label words, each of which must be one token.

        Raises:
            ValueError: the text is no template, or a label word is not one token.
        """
        pieces: list[Piece] = [Words(tuple(before))] if before else []
        for words, name, spec, conversion in string.Formatter().parse(text):
            if words and (ids := tuple(encode(words))):
                pieces.append(Words(ids))
            if name is None:
                continue
            if spec or conversion:
                raise ValueError(f"template: {{n}}, {{name}} or {{mask}}, not {{{name}!{conversion}:{spec}}}")
            pieces.append(Slot() if name == "mask" else Virtual(int(name)) if name.isdecimal() else Field(name))
        pieces += [Words(tuple(after))] if after else []
        if verbaliser is None:
            return cls(tuple(pieces))
        classes = []
        for label, label_words in verbaliser.items():
            encoded = [tuple(encode(word)) for word in label_words]
            split = [word for word, ids in zip(label_words, encoded, strict=True) if len(ids) != 1]
            if split:
                raise ValueError(f"label words that are not one token each: {', '.join(map(repr, split))}")
            classes.append((label, tuple(ids[0] for ids in encoded)))
        return cls(tuple(pieces), Verbaliser(tuple(classes)))

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return sum(piece.count for piece in self.pieces if isinstance(piece, Virtual))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the texts."""
        return tuple(piece.name for piece in self.pieces if isinstance(piece, Field))

    def fill(self, texts: Mapping[str, Sequence[int]], answer: int | None = None) -> list[int]:
        """A row of token ids, with `PLACEHOLDER` for the virtual tokens.

        Args:
            texts: field -> token ids, one for each field.
            answer: what stands in the slot: the mask token, or the answer.

        Raises:
            ValueError: the fields are others, or there is a slot and nothing to fill it.
        """
        if texts.keys() != set(self.fields):
            raise ValueError(f"template: the fields {', '.join(self.fields) or '(none)'}, not {', '.join(texts)}")
        row: list[int] = []
        for piece in self.pieces:
            match piece:
                case Virtual(count):
                    row += [PLACEHOLDER] * count
                case Field(name):
                    row += [int(token) for token in texts[name]]
                case Words(ids):
                    row += ids
                case Slot():
                    if answer is None:
                        raise ValueError("template: nothing to fill the slot with")
                    row.append(int(answer))
        return row

    def slot(self, texts: Mapping[str, Sequence[int]]) -> int:
        """Where in the row the answer stands.

        Raises:
            ValueError: the fields are not the template's, or the template has no slot.
        """
        ahead: list[Piece] = []
        for piece in self.pieces:
            if isinstance(piece, Slot):
                sizes = [1, *(piece.count if isinstance(piece, Virtual) else 0 for piece in ahead)]
                sizes += [len(piece.ids) for piece in ahead if isinstance(piece, Words)]
                sizes += [len(texts[piece.name]) for piece in ahead if isinstance(piece, Field)]
                return sum(sizes) - 1
            ahead.append(piece)
        raise ValueError("template: it has no slot")

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        pieces: list[dict[str, Any]] = []
        for piece in self.pieces:
            match piece:
                case Virtual(count):
                    pieces.append({"virtual": count})
                case Field(name):
                    pieces.append({"field": name})
                case Words(ids):
                    pieces.append({"words": list(ids)})
                case Slot():
                    pieces.append({"slot": True})
        classes = self.verbaliser
        return {
            "pieces": pieces,
            "verbaliser": None if classes is None else [[name, list(words)] for name, words in classes.classes],
        }

    @classmethod
    def from_json(cls, value: Any) -> Template:
        """The inverse of `to_json`.

        Raises:
            ValueError: `value` is not a template.
        """
        if not isinstance(value, dict) or value.keys() != {"pieces", "verbaliser"}:
            raise ValueError(f"template: an object with 'pieces' and 'verbaliser', not {value!r:.80}")
        kinds: Mapping[str, Callable[[Any], Piece]] = {
            "virtual": Virtual,
            "field": Field,
            "words": Words,
            "slot": _slot_from_json,
        }
        pieces, classes = value["pieces"], value["verbaliser"]
        for piece in pieces if isinstance(pieces, list) else [pieces]:
            if not isinstance(piece, dict) or len(piece) != 1 or not piece.keys() <= kinds.keys():
                raise ValueError(f"template: pieces of one key of {', '.join(kinds)}, not {piece!r:.80}")
        made = tuple(kinds[name](content) for piece in pieces for name, content in piece.items())
        if classes is None:
            return cls(made)
        if not isinstance(classes, list) or not all(isinstance(one, list) and len(one) == 2 for one in classes):
            raise ValueError(f"template: a verbaliser of pairs, a name and token ids, not {classes!r:.80}")
        return cls(made, Verbaliser(tuple((name, words) for name, words in classes)))


def _slot_from_json(value: Any) -> Slot:
    if value is not True:
        raise ValueError(f"template: a slot is true, not {value!r:.40}")
    return Slot()


def _token_ids(value: Any, what: str) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{what}: at least one token id from 0, not {value!r:.80}")
    return ids
