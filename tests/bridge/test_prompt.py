"""The canonical form: value semantics, and the layout that toolkits share."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from softbridge.arrays import frozen, same_array
from softbridge.prompt import (
    Adaption,
    AdaptionPrompt,
    BaseId,
    FrozenMap,
    InputPrompt,
    KeyValue,
    KeyValuePrefix,
    Origin,
    Positions,
    SoftPrompt,
    Training,
    digest_of,
)

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(0, 1, (5, 4)).astype(np.float32)


def pair(length: int = 5, heads: int = 2, size: int = 3) -> KeyValue:
    return KeyValue(*RANDOM.normal(0, 1, (2, heads, length, size)).astype(np.float32))


PAIR = pair()
FULL = SoftPrompt(
    (InputPrompt(VECTORS, "encoder"), KeyValuePrefix("self", {2: pair(), 0: PAIR})),
    Positions({"encoder": 5, "decoder": 0}),
    BaseId("a/base"),
    head={"weight": VECTORS, "bias": VECTORS[0]},
    training=Training("mlp", {"width": 8}, {"w": VECTORS}),
    origin=Origin("peft", {"unknown": 1}, {"file": "0" * 64}),
)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InputPrompt(VECTORS[0], "decoder"),
        lambda: InputPrompt(VECTORS[:0], "decoder"),
        lambda: InputPrompt(VECTORS[:, :0], "decoder"),
        lambda: InputPrompt(VECTORS, "middle"),  # type: ignore[arg-type]
        lambda: InputPrompt(VECTORS, "decoder", "around"),  # type: ignore[arg-type]
        lambda: InputPrompt(VECTORS, "decoder", "before", "at-the-end"),  # type: ignore[arg-type]
        lambda: KeyValue(VECTORS, VECTORS),
        lambda: KeyValue(PAIR.keys, PAIR.values[:, :4]),
        lambda: KeyValue(PAIR.keys[:0], PAIR.values[:0]),
        lambda: KeyValuePrefix("self", {}),
        lambda: KeyValuePrefix("self", {-1: PAIR}),
        lambda: KeyValuePrefix("self", {0: PAIR, 1: pair(length=4)}),
        lambda: KeyValuePrefix("other", {0: PAIR}),  # type: ignore[arg-type]
        lambda: Positions({"middle": 0}),  # type: ignore[dict-item]
        lambda: Positions({"decoder": -1}),
        lambda: Positions({"decoder": True}),
        lambda: Positions({"encoder": 0, "decoder": 1.0}),  # type: ignore[dict-item]
        lambda: Positions({"decoder": np.int64(1)}),  # type: ignore[dict-item]
        lambda: Positions(relative_bias="bent"),  # type: ignore[arg-type]
        lambda: Positions(window="shut"),  # type: ignore[arg-type]
        lambda: Positions({"decoder": 0}, unbiased_from={"decoder": -1}),
        lambda: SoftPrompt(FULL.parts, replace(FULL.positions, unbiased_from={"encoder": 1})),
        lambda: SoftPrompt((), Positions()),
        lambda: SoftPrompt(FULL.parts, Positions({"encoder": 5})),
        lambda: SoftPrompt(FULL.parts[:1], Positions({"encoder": 5, "decoder": 0})),
        lambda: SoftPrompt((FULL.parts[0], FULL.parts[0]), Positions()),
        lambda: SoftPrompt((FULL.parts[1], FULL.parts[1]), Positions()),
    ],
)
def test_what_is_no_prompt(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=": "):
        make()


ITSELF: list[Any] = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        -float("inf"),
        pytest.param(object(), id="object"),
        {1, 2},
        b"bytes",
        1j,
        np.float32(1),
        np.ones(2),
        "\ud800",
        {None: 1},
        {True: 1},
        {(1, 2): 1},
        {1: "a", "1": "b"},
        {"\ud800": 1},
        ["fine", ({"deep": [object()]},)],
        ITSELF,
    ],
    ids=lambda value: f"{value!r:.30}".encode("ascii", "backslashreplace").decode(),
)
def test_what_is_no_json(value: Any) -> None:
    with pytest.raises(ValueError, match=": "):
        Training("mlp", {"x": value}, {})
    with pytest.raises(ValueError, match=": "):
        Origin("peft", {"x": value})


def test_notes_and_what_was_left_are_typed() -> None:
    assert Origin("x").notes is Origin("x").partial is None
    given = Origin("x", {"notes": ["a"], "partial": None, "more": 1})
    assert given == Origin("x", {"more": 1}, notes=("a",), partial="")
    told = Origin("x", {"notes": 5, "partial": 5}, notes=("a",), partial="b")
    assert told == Origin("x", notes=("a",), partial="b"), "what a stranger's file calls so is not that"
    assert replace(told, digests={"f": "0"}).notes == ("a",)
    for wrong in ({"notes": 5}, {"notes": "abc"}, {"notes": [5]}, {"partial": 5}, {"partial": ["a"]}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: "):
            Origin("x", wrong)
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: "):
            Origin("x", **wrong)  # type: ignore[arg-type]


class Word(str, Enum):
    A = "a"


def test_settings_and_details_are_plain_json() -> None:
    given = {
        "z": (1, (2.5, None)),
        "a": {1: True, "nested": FrozenMap({"b": ()})},
        "kind": Word.A,
        "rate": np.float64(0.5),
        Word.A.upper(): [Word.A],
    }
    plain = {"z": [1, [2.5, None]], "a": {"1": True, "nested": {"b": []}}, "kind": "a", "rate": 0.5, "A": ["a"]}
    for found in (Training("mlp", given, {}).settings, Origin("peft", given).details):
        assert found == plain
        assert json.loads(json.dumps(dict(found))) == plain
        assert type(found["kind"]) is type(found["A"][0]) is str
        assert type(found["rate"]) is float
        assert type(found["a"]["nested"]) is dict
    assert list(Training("mlp", given, {}).settings) == sorted(plain)
    assert list(Origin("peft", given).details) == list(plain)
    assert type(given["z"]) is tuple, "the caller's value was touched"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_copies_are_equal(copied: Callable[[SoftPrompt], SoftPrompt]) -> None:
    prompt = copied(FULL)
    assert prompt == FULL
    assert hash(prompt) == hash(FULL)
    assert digest_of(prompt) == digest_of(FULL)
    assert prompt.origin == FULL.origin


DIFFERENT: dict[str, Callable[[SoftPrompt], SoftPrompt]] = {
    "one bit": lambda p: replace(
        p, parts=(InputPrompt(np.where(VECTORS[0, 0] == VECTORS, 0, VECTORS), "encoder"), p.parts[1])
    ),
    "part dropped": lambda p: replace(p, parts=p.parts[:1], positions=Positions({"encoder": 5})),
    "parts in another order": lambda p: replace(p, parts=p.parts[::-1]),
    "stack": lambda p: replace(
        p, parts=(InputPrompt(VECTORS, "decoder"), p.parts[1]), positions=Positions({"decoder": 0})
    ),
    "entry": lambda p: replace(p, parts=(InputPrompt(VECTORS, "encoder", "after"), p.parts[1])),
    "placement": lambda p: replace(
        p, parts=(InputPrompt(VECTORS, "encoder", placement="after-first-token"), p.parts[1])
    ),
    "dtype": lambda p: replace(p, parts=(InputPrompt(VECTORS.astype(np.float64), "encoder"), p.parts[1])),
    "site": lambda p: replace(
        p,
        parts=(p.parts[0], KeyValuePrefix("cross", p.prefixes[0].layers)),
        positions=Positions({"encoder": 5}),
    ),
    "layer numbers": lambda p: replace(
        p, parts=(p.parts[0], KeyValuePrefix("self", {1: p.prefixes[0].layers[2], 0: PAIR}))
    ),
    "keys for values": lambda p: replace(
        p, parts=(p.parts[0], KeyValuePrefix("self", {**p.prefixes[0].layers, 0: KeyValue(PAIR.values, PAIR.keys)}))
    ),
    "start": lambda p: replace(p, positions=Positions({"encoder": 5, "decoder": 5})),
    "relative bias": lambda p: replace(p, positions=replace(p.positions, relative_bias="skewed")),
    "window": lambda p: replace(p, positions=replace(p.positions, window="pinned")),
    "unbiased from": lambda p: replace(p, positions=replace(p.positions, unbiased_from={"decoder": 1})),
    "base": lambda p: replace(p, base=BaseId("another")),
    "head dropped": lambda p: replace(p, head={}),
    "head": lambda p: replace(p, head={**p.head, "bias": VECTORS[1]}),
    "training dropped": lambda p: replace(p, training=None),
    "training's settings": lambda p: replace(p, training=Training("mlp", {"width": 9}, {"w": VECTORS})),
    "training's tensors": lambda p: replace(p, training=Training("mlp", {"width": 8}, {"w": -VECTORS})),
}


ADAPTION = AdaptionPrompt("self", {1: Adaption(VECTORS, VECTORS[0, :1])}, "module")
ONE = ADAPTION.layers[1]


@pytest.mark.parametrize(
    "other",
    [
        replace(ADAPTION, site="encoder"),
        replace(ADAPTION, joins="heads"),
        replace(ADAPTION, layers={2: ONE}),
        replace(ADAPTION, layers={1: replace(ONE, gate=-ONE.gate)}),
        replace(ADAPTION, layers={1: replace(ONE, gate=np.repeat(ONE.gate, 2))}),
        replace(ADAPTION, layers={1: replace(ONE, vectors=-VECTORS)}),
        replace(ADAPTION, layers={1: replace(ONE, vectors=VECTORS.astype(np.float64))}),
    ],
)
def test_what_makes_two_adaption_prompts_different(other: AdaptionPrompt) -> None:
    one, two = SoftPrompt((ADAPTION,), Positions()), SoftPrompt((other,), Positions())
    assert other != ADAPTION
    assert digest_of(one) != digest_of(two)
    assert replace(other) == other
    assert hash(replace(other)) == hash(other)
    assert "gate" in repr(other)


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_makes_two_prompts_different(change: Callable[[SoftPrompt], SoftPrompt]) -> None:
    changed = change(FULL)
    assert changed != FULL
    seen = (changed.parts, changed.positions) != (FULL.parts, FULL.positions)
    assert (digest_of(changed) != digest_of(FULL)) == seen, "the digest is of what a model sees"


def test_most_differences_are_seen_by_a_model() -> None:
    changed = [change(FULL) for change in DIFFERENT.values()]
    assert sum(digest_of(p) != digest_of(FULL) for p in changed) >= 10


def test_provenance_is_no_part_of_equality() -> None:
    assert replace(FULL, origin=None) == FULL
    assert digest_of(replace(FULL, origin=None)) == digest_of(FULL)


def test_equal_prompts_are_equal_however_they_were_made() -> None:
    other = SoftPrompt(
        [InputPrompt(np.asfortranarray(VECTORS), "encoder"), KeyValuePrefix("self", dict(FULL.prefixes[0].layers))],  # type: ignore[arg-type]
        Positions({"decoder": 0, "encoder": 5}),
        BaseId("a/base"),
        head={"bias": VECTORS[0], "weight": VECTORS},
        training=Training("mlp", {"width": 8}, {"w": VECTORS}),
    )
    assert other == FULL
    assert hash(other) == hash(FULL)
    assert digest_of(other) == digest_of(FULL)


def test_a_prompt_cannot_be_changed() -> None:
    writable = VECTORS.copy()
    part = InputPrompt(writable, "encoder")
    with pytest.raises(ValueError, match="read-only"):
        part.vectors[0, 0] = 0
    with pytest.raises(FrozenInstanceError):
        part.stack = "decoder"  # type: ignore[misc]
    with pytest.raises(TypeError):
        FULL.head["bias"] = VECTORS  # type: ignore[index]
    with pytest.raises(TypeError):
        FULL.prefixes[0].layers[0] = PAIR  # type: ignore[index]
    assert writable.flags.writeable, "the caller's array was touched"


def test_arrays_have_stable_names() -> None:
    assert [name for name, _ in FULL.arrays()] == [
        "parts.0.vectors",
        "parts.1.layers.0.keys",
        "parts.1.layers.0.values",
        "parts.1.layers.2.keys",
        "parts.1.layers.2.values",
        "head.bias",
        "head.weight",
        "training.w",
    ]


def test_the_flat_layout() -> None:
    """The innermost order is layer, key before value, head, channel; all sizes differ, so that no axis can swap."""
    length, layers, heads, size = 5, (1, 4, 7), 2, 6
    flat = np.arange(length * len(layers) * 2 * heads * size, dtype=np.float32).reshape(length, -1)
    prefix = KeyValuePrefix.from_flat("self", flat, layers, heads, size)
    assert tuple(prefix.layers) == layers
    assert prefix.length == length
    for index, layer in enumerate(layers):
        for which, array in enumerate((prefix.layers[layer].keys, prefix.layers[layer].values)):
            assert array.shape == (heads, length, size)
            for head, token, channel in np.ndindex(array.shape):
                column = ((index * 2 + which) * heads + head) * size + channel
                assert array[head, token, channel] == flat[token, column]
    np.testing.assert_array_equal(prefix.flat(), flat)
    assert prefix == KeyValuePrefix.from_flat("self", flat.reshape(length, -1, size), layers, heads, size)


def test_lengths_and_lookups() -> None:
    assert FULL.counted() == {"encoder": 5, "decoder": 5}
    both = SoftPrompt(
        (InputPrompt(VECTORS, "decoder"), KeyValuePrefix("self", {0: pair(length=3)})), Positions({"decoder": 8})
    )
    assert both.counted() == {"decoder": 8}
    assert SoftPrompt((KeyValuePrefix("cross", {0: PAIR}),), Positions()).counted() == {}
    assert FULL.prefix("self") is FULL.parts[1]
    assert FULL.prefix("cross") is None
    assert FULL.inputs == FULL.parts[:1]


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (np.array([np.nan]), np.array([np.nan]), True),
        (np.array([0.0]), np.array([-0.0]), False),
        (np.array([1.0]), np.array([1]), False),
        (np.array([[1.0]]), np.array([1.0]), False),
        (np.array([1], np.float16), np.array([1], ml_dtypes.bfloat16), False),
        (frozen([1.0, 2.0]), np.array([1.0, 2.0]), True),
    ],
)
def test_same_array_means_every_bit(a: Any, b: Any, same: bool) -> None:
    assert same_array(a, b) is same
