"""Templates as data: what rows they make, what they refuse, and that they come back from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.prompt import BaseId, InputPrompt, Positions, SoftPrompt
from softbridge.template import PLACEHOLDER, Field, Slot, Template, Verbaliser, Virtual, Words


def encode(text: str) -> list[int]:
    """A toy tokenizer: one token for each letter."""
    return [ord(letter) for letter in text.strip()]


CLOZE = Template.parse(
    "{3}{text}{2}It is{mask}.", encode, before=[1], after=[2], verbaliser={"bad": ["b", "x"], "good": ["g"]}
)


def prompt(template: Template = CLOZE, **changes: object) -> SoftPrompt:
    vectors = np.random.default_rng(0).normal(size=(template.length, 8)).astype(np.float32)
    part = InputPrompt(vectors, "encoder", placement="template", template=template)
    return SoftPrompt((part,), Positions({"encoder": 0}), BaseId("toy"))


def test_a_row_has_every_piece_in_its_place() -> None:
    row = CLOZE.fill({"text": [50, 51]}, answer=99)
    assert row == [1, -1, -1, -1, 50, 51, -1, -1, *encode("It is"), 99, ord("."), 2]
    assert row[CLOZE.slot({"text": [50, 51]})] == 99
    assert row.count(PLACEHOLDER) == CLOZE.length == 5
    assert CLOZE.fields == ("text",)


def test_two_fields_and_a_template_without_a_slot() -> None:
    pair = Template((Field("premise"), Virtual(2), Field("hypothesis")))
    assert pair.fill({"premise": [7], "hypothesis": [8, 9]}) == [7, -1, -1, 8, 9]
    with pytest.raises(ValueError, match="no slot"):
        pair.slot({"premise": [7], "hypothesis": [8, 9]})
    with pytest.raises(ValueError, match="premise, hypothesis"):
        pair.fill({"premise": [7]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Template((Field("text"),)), "at least one virtual token"),
        (lambda: Template((Virtual(0), Field("text"))), "from 1"),
        (lambda: Template((Virtual(1), Field("a"), Field("a"))), "each field once"),
        (lambda: Template((Virtual(1), Slot(), Slot())), "one slot"),
        (lambda: Template((Virtual(1),), CLOZE.verbaliser), "one slot"),
        (lambda: Template((Virtual(1), Words(()))), "at least one token id"),
        (lambda: Template((Virtual(1), Words((-1,)))), "from 0"),
        (lambda: Field("label"), "neither"),
        (lambda: Verbaliser((("only", (1,)),)), "two classes"),
        (lambda: Verbaliser((("a", (1,)), ("b", (1,)))), "one class only"),
        (lambda: Verbaliser((("a", (1,)), ("a", (2,)))), "two classes of one name"),
        (lambda: Template.parse("{1}{text:>3}", encode), "template"),
        (lambda: Template.parse("{1}{mask}", encode, verbaliser={"a": ["no"], "b": ["b"]}), "not one token each: 'no'"),
        (lambda: CLOZE.fill({"text": [1]}), "nothing to fill the slot"),
    ],
)
def test_what_is_no_template_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_it_comes_back_from_json_and_from_a_file(tmp_path: Path) -> None:
    assert Template.from_json(json.loads(json.dumps(CLOZE.to_json()))) == CLOZE
    sb.save(prompt(), tmp_path / "prompt", format="softbridge")
    assert sb.load(tmp_path / "prompt") == prompt()
    other = replace(CLOZE, verbaliser=None)
    assert prompt(other) != prompt()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"pieces": []},
        {"pieces": [], "verbaliser": None},
        {"pieces": [{"virtual": 1, "slot": True}], "verbaliser": None},
        {"pieces": [{"virtual": "1"}], "verbaliser": None},
        {"pieces": [{"virtual": True}], "verbaliser": None},
        {"pieces": [{"nothing": 1}], "verbaliser": None},
        {"pieces": [{"virtual": 1}, {"slot": False}], "verbaliser": None},
        {"pieces": [{"virtual": 1}, {"slot": True}], "verbaliser": [["a", [1]], ["b", ["2"]]]},
        {"pieces": [{"virtual": 1}, {"slot": True}], "verbaliser": [["a", [1]], "b"]},
        {"pieces": [{"virtual": 1}, {"slot": True}], "verbaliser": [[None, [1]], ["b", [2]]]},
    ],
)
def test_foreign_json_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        Template.from_json(value)


def test_a_prompt_and_its_template_fit() -> None:
    vectors = np.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="of 4 virtual tokens"):
        InputPrompt(vectors, "encoder", placement="template", template=CLOZE)
    with pytest.raises(ValueError, match="where it is the placement"):
        InputPrompt(vectors, "encoder", placement="template")
    with pytest.raises(ValueError, match="where it is the placement"):
        InputPrompt(np.zeros((5, 8), np.float32), "encoder", template=CLOZE)
    with pytest.raises(ValueError, match="before the embedding block"):
        InputPrompt(np.zeros((5, 8), np.float32), "encoder", "after", "template", CLOZE)
