"""A recording that was edited: refused by its digest; and one whose digest was made anew is judged, or refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import CheckpointError, OutputError, SoftbridgeError
from softbridge.testing import random_prefix, tiny_config
from softbridge.untrusted import Files, safetensors_bytes
from softbridge.verification import compare, probe
from softbridge.verification.recorded import Recording
from softbridge.verification.recording import KEY, pack, unpack

LONG = os.environ.get("SOFTBRIDGE_PROFILE") == "long"
Place = tuple[Any, ...]


class Recorded:
    """A recording in a file, and another one."""

    def __init__(self, path: Path, other: Recording) -> None:
        self.path, self.other = path, other


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A recording in a file; and one of another prompt on the same model."""
    folder, config = tmp_path_factory.mktemp("recorded"), tiny_config("gpt2")
    geometry = BaseModel(config).geometry
    for name, seed in (("a", 0), ("b", 1)):
        sb.save(random_prefix(geometry, seed=seed), folder / name, format="peft", base=config)
    (folder / "a.safetensors").write_bytes(pack(probe(folder / "a", base=config)))
    return Recorded(folder / "a.safetensors", probe(folder / "b", base=config))


def content_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    files = Files(path)
    return json.loads(files.metadata(path.name)[KEY]), dict(files.tensors(path.name))


def written(folder: Path, content: Any, tensors: dict[str, Any], *, sign: bool) -> Path:
    if sign:
        content = {name: value for name, value in content.items() if name != "digest"}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["digest"] = hashlib.sha256(safetensors_bytes(tensors, {KEY: text})).hexdigest()
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    (folder / "edited.safetensors").write_bytes(safetensors_bytes(tensors, {KEY: text}))
    return folder / "edited.safetensors"


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    if here:
        yield here
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for name, one in pairs:
            yield from places(one, (*here, name))


def put(value: Any, place: Place, other: Any) -> Any:
    """A copy with another value at one place; without it, if that is `...`."""
    name, *rest = place
    copied = dict(value) if isinstance(value, dict) else list(value)
    new = put(copied[name], tuple(rest), other) if rest else other
    if new is ...:
        del copied[name]
    else:
        copied[name] = new
    return copied


VALUES = (..., None, True, 0, -1, 10**400, 1e308, "", "x", [], {}, [[]], {"x": 1}, ["alone-0"])


def test_it_is_signed(recorded: Recorded, tmp_path: Path) -> None:
    path = recorded.path
    content, tensors = content_of(path)
    assert unpack(written(tmp_path, content, tensors, sign=False)).side == unpack(path).side
    for place, value in {
        ("side", "engine"): "peft-2",
        ("claim", "level"): "rounding",
        ("captures", 0, "loss"): 1.5,
    }.items():
        edited = put(content, place, value)
        with pytest.raises(CheckpointError, match="has been changed since it was recorded"):
            unpack(written(tmp_path, edited, tensors, sign=False))
    for name in ("0.exact.batch", next(name for name in tensors if ".gradient." in name)):
        assert name in tensors
        with pytest.raises(CheckpointError, match="has been changed since it was recorded"):
            unpack(written(tmp_path, content, {**tensors, name: tensors[name] * 1.5}, sign=False))
    for version in (2, 3, True, None, "4"):
        with pytest.raises(CheckpointError, match="a recording of version"):
            unpack(written(tmp_path, {**content, "version": version}, tensors, sign=True))


def judged(path: Path, other: Recording) -> bool:
    """Whether it can be judged, and then is not the other; else it is refused with an error of softbridge's."""
    try:
        found = unpack(path)
        verdicts = {compare(*pair).verdict for pair in ((found, other), (other, found))}
    except SoftbridgeError as error:
        return not all((error.found, error.expected, error.remedy))
    assert "bitwise" not in verdicts
    return True


def test_every_field_is_of_its_kind(recorded: Recorded, tmp_path: Path) -> None:
    path, other = recorded.path, recorded.other
    content, tensors = content_of(path)
    found = []
    for number, place in enumerate(places(content)):
        if place[0] in ("version", "digest"):
            continue
        for value in VALUES if LONG else (VALUES[number % len(VALUES)], VALUES[(number + 5) % len(VALUES)]):
            edited = written(tmp_path, put(content, place, value), tensors, sign=True)
            found.append(judged(edited, other))
    print(f"{found.count(False)} of {len(found)} edits were refused")
    assert len(found) > 200
    assert found.count(False) > len(found) / 2


EDITS = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(VALUES)), min_size=1, max_size=3)
ARRAYS = st.sampled_from(
    [
        lambda array: array * 0,
        lambda array: array[:1],
        lambda array: array.reshape(-1),
        lambda array: array[:0],
        lambda array: array.astype(np.int8),
        lambda array: array > 0,
        lambda array: np.full(array.shape, 1e300),
        lambda array: array[..., None],
        lambda array: None,
    ]
)


@given(edits=EDITS, arrays=st.lists(st.tuples(st.integers(0, 10**6), ARRAYS), max_size=2))
def test_edits_of_all_kinds(edits: Any, arrays: Any, recorded: Recorded) -> None:
    path, other = recorded.path, recorded.other
    content, tensors = content_of(path)
    for number, value in edits:
        found = list(places(content))
        content = put(content, found[number % len(found)], value)
    for number, change in arrays:
        name = sorted(tensors)[number % len(tensors)]
        try:
            array = change(tensors[name])
        except ValueError:
            continue
        tensors = {key: one for key, one in tensors.items() if key != name} | ({} if array is None else {name: array})
    try:
        edited = written(path.parent, content, tensors, sign=True)
    except (ValueError, AttributeError):  # no object, or a number that no JSON has
        return
    judged(edited, other)


def test_outputs_that_are_no_numbers_are_not_recorded(recorded: Recorded) -> None:
    other = recorded.other
    for change in ({"loss": float("nan")}, {"faults": {"dropped": float("inf")}}):
        with pytest.raises(OutputError, match="NaN or infinite"):
            pack(replace(other, captures=(replace(other.captures[0], **change),)))


def test_prompts_of_two_lengths_are_different(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    for name, length in (("a", 4), ("b", 5)):
        sb.save(random_prefix(BaseModel(config).geometry, length), tmp_path / name, format="peft", base=config)
    assert sb.verify(tmp_path / "a", tmp_path / "b", base=config).verdict == "different"
