"""softbridge's own file form: nothing is lost, nothing else is read, and the bytes never change."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from softbridge.arrays import Array
from softbridge.errors import CheckpointError, OutputError
from softbridge.geometry import Geometry, StackGeometry
from softbridge.prompt import (
    Adaption,
    AdaptionPrompt,
    BaseId,
    InputPrompt,
    KeyValue,
    KeyValuePrefix,
    Origin,
    Positions,
    SoftPrompt,
    Training,
    digest_of,
    pack,
    unpack,
)
from softbridge.untrusted import Files, safetensors_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "container_v1.safetensors"


def ramp(dtype: Any, *shape: int) -> Array:
    """Quarters, exact in every dtype of 8 or more bits of precision; no generator, whose numbers might change."""
    return (np.arange(np.prod(shape), dtype=np.float64).reshape(shape) / 4 - 3).astype(dtype)


def pair(dtype: Any, heads: int, length: int, size: int) -> KeyValue:
    return KeyValue(ramp(dtype, heads, length, size), -ramp(dtype, heads, length, size))


STACK = StackGeometry(layers=3, heads=4, kv_heads=2, head_dim=6, window=16)
INPUT = SoftPrompt((InputPrompt(ramp(np.float32, 5, 4), "decoder"),), Positions({"decoder": 5}))
FULL = SoftPrompt(
    (
        InputPrompt(ramp(np.float32, 3, 4), "encoder", "after", "after-first-token"),
        KeyValuePrefix("self", {10: pair(ml_dtypes.bfloat16, 2, 3, 6), 2: pair(np.float64, 1, 3, 8)}),
        KeyValuePrefix("cross", {0: pair(np.float16, 2, 3, 6)}),
    ),
    Positions({"encoder": 3, "decoder": 0}, "skewed", "pinned"),
    BaseId("someone/base-ä", Geometry("t5", 4, 96, STACK, replace(STACK, window=None))),
    head={"weight": ramp(np.float32, 5, 4), "bias": ramp(np.int64, 5), "score.mask": np.array([True, False])},
    training=Training(
        "mlp",
        {"width": 8, "dropout": 0.1, "layers": [1, 2.5, None, "ä\n\U0001f600"], "nested": {"b": True, "a": {}}},
        {"w/1": ramp(ml_dtypes.bfloat16, 2, 2), "scale": ramp(np.float64)},
    ),
    origin=Origin("peft", {"unknown": {"z": 1, "a": 1e-9}}, {"adapter_model.safetensors": "0" * 64}),
)
ADAPTION = SoftPrompt(
    (
        AdaptionPrompt("encoder", {1: Adaption(ramp(np.float32, 3, 4), ramp(np.float16, 1))}, "module"),
        AdaptionPrompt("self", {n: Adaption(ramp(np.float64, 2, 4), ramp(np.float64, 4)) for n in (10, 2)}),
    ),
    Positions(),
)
PROMPTS = {
    "input": INPUT,
    "adaption": ADAPTION,
    "encoder prefix": SoftPrompt(
        (KeyValuePrefix("encoder", {0: pair(np.float32, 2, 3, 6)}),), Positions({"encoder": 0})
    ),
    "cross alone": SoftPrompt((KeyValuePrefix("cross", {1: pair(np.float32, 2, 3, 6)}),), Positions()),
    "bfloat16": SoftPrompt((InputPrompt(ramp(ml_dtypes.bfloat16, 5, 4), "decoder"),), Positions({"decoder": 0})),
    "training without tensors": replace(INPUT, training=Training("direct", {}, {})),
    "decoder only": replace(INPUT, base=BaseId(None, Geometry("llama", 4, 96, None, STACK))),
    "full": FULL,
    "unbiased": replace(FULL, positions=replace(FULL.positions, unbiased_from={"decoder": 2})),
}


def stored(tmp_path: Path, content: bytes) -> Files:
    (tmp_path / "p.safetensors").write_bytes(content)
    return Files(tmp_path / "p.safetensors")


def read(tmp_path: Path, content: bytes) -> SoftPrompt:
    return unpack(stored(tmp_path, content), "p.safetensors")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_a_prompt_comes_back(prompt: SoftPrompt, tmp_path: Path) -> None:
    content = pack(prompt)
    found = read(tmp_path, content)
    assert found == prompt
    assert found.origin == prompt.origin
    assert pack(found) == content
    assert digest_of(found) == digest_of(prompt)


def test_the_bytes_of_version_1(tmp_path: Path) -> None:
    """Files of version 1 are out there. If this fails, the version must change, and the reader must keep this one."""
    content = GOLDEN.read_bytes()
    assert unpack(Files(GOLDEN), GOLDEN.name) == FULL
    assert unpack(Files(GOLDEN), GOLDEN.name).origin == FULL.origin
    assert pack(FULL) == content
    assert hashlib.sha256(content).hexdigest() == "6ed203cfb93b560b04fa6955b74a0375a8106294f69c1ab9a0df094ef4ec8252"
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"].keys() == {"softbridge"}
    assert header.keys() - {"__metadata__"} == {name for name, _ in FULL.arrays()}
    safetensors.deserialize(content)  # any reader of safetensors reads it


def test_the_bytes_are_the_same_in_every_process() -> None:
    program = f"""
import hashlib, sys
from pathlib import Path
from softbridge.prompt.container import pack, unpack
from softbridge.untrusted import Files
print(hashlib.sha256(pack(unpack(Files(Path({str(GOLDEN)!r})), {GOLDEN.name!r}))).hexdigest())
assert "torch" not in sys.modules
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {(hashlib.sha256(GOLDEN.read_bytes()).hexdigest() + "\n").encode()}


def test_memory_order_and_byte_order_do_not_matter() -> None:
    vectors = ramp(np.float32, 5, 4)
    for same in (np.asfortranarray(vectors), vectors.astype(">f4"), np.repeat(vectors, 2, axis=0)[::2]):
        assert pack(SoftPrompt((InputPrompt(same, "decoder"),), Positions({"decoder": 5}))) == pack(INPUT)


@pytest.mark.parametrize(
    "prompt",
    [
        replace(INPUT, head={"w": ramp(complex, 3)}),
        replace(INPUT, head={"../../w": ramp(np.float32, 3)}),
    ],
)
def test_what_cannot_be_packed(prompt: SoftPrompt) -> None:
    with pytest.raises(OutputError):
        pack(prompt)


# --- files that are not sound -----------------------------------------------------------------------------------------


def taken_apart(content: bytes) -> tuple[Any, dict[str, Array]]:
    length = struct.unpack("<Q", content[:8])[0]
    description = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["softbridge"])
    with tempfile.TemporaryDirectory() as folder:
        return description, stored(Path(folder), content).tensors("p.safetensors")


def put_together(description: Any, arrays: dict[str, Array]) -> bytes:
    """A file as the specification says, by this test's own reading of it, its digest included."""
    codes = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}

    def canonical(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    if isinstance(description, dict):
        plain = {name: value for name, value in description.items() if name != "digest"}
        tensors = [[name, codes[a.dtype.name], list(a.shape)] for name, a in sorted(arrays.items())]
        data = b"".join(a.tobytes() for _, a in sorted(arrays.items()))
        digest = hashlib.sha256(canonical([plain, tensors]).encode() + data).hexdigest()
        description = {**plain, "digest": digest}
    return safetensors_bytes(arrays, {"softbridge": canonical(description)})


def test_the_specification_is_enough_to_write_a_file() -> None:
    for prompt in PROMPTS.values():
        assert put_together(*taken_apart(pack(prompt))) == pack(prompt)


def edit(path: str, value: Any) -> Callable[[Any, dict[str, Array]], None]:
    """Set the place that `path` names in the description; drop it if the value is `...`."""

    def change(description: Any, arrays: dict[str, Array]) -> None:
        *way, last = path.split("/")
        for step in way:
            description = description[int(step) if isinstance(description, list) else step]
        last = int(last) if isinstance(description, list) else last
        if value is ...:
            del description[last]
        else:
            description[last] = value

    return change


def tensor(name: str, array: Array | None) -> Callable[[Any, dict[str, Array]], None]:
    def change(description: Any, arrays: dict[str, Array]) -> None:
        if array is None:
            del arrays[name]
        else:
            arrays[name] = array

    return change


UNSOUND: list[tuple[list[Callable[[Any, dict[str, Array]], None]], list[str]]] = [
    ([edit("version", 2)], ["version 2"]),
    ([edit("version", True)], ["version True"]),
    ([edit("version", ...)], ["version None"]),
    ([edit("parts", ...)], ["description: no 'parts'"]),
    ([edit("parts", [])], ["unexpected tensor 'parts.0.vectors'"]),
    ([edit("parts", {})], ["parts: dict, not a list"]),
    ([edit("parts/0", 3)], ["parts.0: neither an input prompt, a prefix nor an adaption prompt: 3"]),
    ([edit("parts/0/kind", "prefix")], ["parts.0: no 'layers'", "parts.0: no 'site'", "parts.0: unexpected 'entry'"]),
    ([edit("parts/0/stack", "middle")], ["parts.0: stack: 'middle'"]),
    ([edit("parts/0/stack", ["encoder"])], ["parts.0: stack: ['encoder']"]),
    ([edit("parts/0/more", 1)], ["parts.0: unexpected 'more'"]),
    ([edit("parts/1/site", "cross")], ["parts: one prefix per site"]),
    ([edit("parts/1/layers", [10, 2])], ["parts.1.layers: [10, 2], not rising numbers from 0"]),
    ([edit("parts/1/layers", [2, True])], ["parts.1.layers"]),
    ([edit("parts/1/layers", [{}, 2])], ["parts.1.layers"]),
    ([edit("parts/1/layers", [2])], ["unexpected tensor 'parts.1.layers.10.keys'"]),
    ([edit("parts/1/layers", [])], ["parts.1: layers: at least one"]),
    ([edit("parts/1/layers", [2, 10, 11])], ["missing tensor 'parts.1.layers.11.keys'"]),
    ([edit("positions", None)], ["positions: NoneType, not an object"]),
    ([edit("positions/start", {"encoder": -1})], ["positions.start.encoder: -1, not a number from 0"]),
    ([edit("positions/start", {"encoder": 1.0})], ["positions.start.encoder: 1.0, not a number from 0"]),
    ([edit("positions/start", {"middle": 1})], ["positions: start: {'middle': 1}"]),
    ([edit("positions/window", "shut")], ["positions: window: 'shut'"]),
    ([edit("positions/relative_bias", {})], ["positions: relative_bias: {}"]),
    ([edit("positions/unbiased_from", {})], ["positions.unbiased_from: no stack"]),
    ([edit("positions/unbiased_from", {"decoder": -1})], ["positions.unbiased_from.decoder: -1, not a number from 0"]),
    ([edit("positions/unbiased_from", {"middle": 1})], ["positions: unbiased_from: {'middle': 1}"]),
    ([edit("positions/unbiased_from", {"encoder": 1})], ["unbiased_from for ['encoder'], whose self-attention"]),
    ([edit("base/name", 3)], ["base.name: int, not a text"]),
    ([edit("base/geometry", "t5")], ["base.geometry: str, not an object"]),
    ([edit("base/geometry/hidden", 0)], ["base.geometry.hidden: 0, not a positive number"]),
    ([edit("base/geometry/encoder/window", "x")], ["base.geometry.encoder.window: 'x', not a positive number"]),
    ([edit("head", ["weight", "bias"])], ["head: ['weight', 'bias'], not names, sorted, each once"]),
    ([edit("head", ["bias", "bias"])], ["head: "]),
    ([edit("head", [3])], ["head: [3]"]),
    ([edit("training", [])], ["training: list, not an object"]),
    ([edit("training/kind", None)], ["training.kind: NoneType, not a text"]),
    ([edit("training/settings", [])], ["training.settings: list, not an object"]),
    ([edit("training/tensors", None)], ["training.tensors: NoneType, not a list"]),
    ([edit("origin/format", 1)], ["origin.format: int, not a text"]),
    ([edit("origin/details/notes", 5)], ["origin.details: notes: 5, not a list of texts"]),
    ([edit("origin/details/notes", "abc")], ["origin.details: notes: 'abc', not a list of texts"]),
    ([edit("origin/details/notes", ["abc", 5])], ["origin.details: notes: ['abc', 5], not a list of texts"]),
    ([edit("origin/details/partial", ["a"])], ["origin.details: partial: ['a'], not a text"]),
    ([edit("origin/details/partial", True)], ["origin.details: partial: True, not a text"]),
    ([edit("origin/digests", {"a": 1})], ["origin.digests.a: int, not a text"]),
    ([edit("more", 1)], ["description: unexpected 'more'"]),
    ([tensor("parts.0.vectors", None)], ["missing tensor 'parts.0.vectors'"]),
    ([tensor("parts.0.vectors", ramp(np.float32, 4))], ["parts.0: vectors: [P, H], not (4,)"]),
    (
        [tensor("parts.1.layers.2.keys", ramp(np.float32, 1, 3, 7))],
        ["parts.1.layers.2: values: (1, 3, 7) like the keys"],
    ),
    ([tensor("parts.3.vectors", ramp(np.float32, 4))], ["unexpected tensor 'parts.3.vectors'"]),
    (
        [
            tensor("head.bias", None),
            tensor("other", ramp(np.float32, 4)),
            edit("positions/window", "shut"),
            edit("base/name", 3),
            tensor("parts.0.vectors", ramp(np.float32, 4)),
        ],
        [
            "base.name: int, not a text; missing tensor 'head.bias'; parts.0: vectors: [P, H], not (4,); "
            "positions: window: 'shut'; unexpected tensor 'other'"
        ],
    ),
]


@pytest.mark.parametrize(
    ("details", "notes", "partial"),
    [
        ({}, None, None),
        ({"notes": []}, (), None),
        ({"notes": ["one", "two"], "partial": None}, ("one", "two"), ""),
        ({"partial": "an adapter"}, None, "an adapter"),
    ],
)
def test_notes_and_what_was_left_are_fields_and_stay_where_files_have_them(
    details: dict[str, Any], notes: tuple[str, ...] | None, partial: str | None, tmp_path: Path
) -> None:
    description, arrays = taken_apart(pack(FULL))
    description["origin"]["details"] |= details
    content = put_together(description, arrays)
    prompt = read(tmp_path, content)
    assert FULL.origin is not None
    assert prompt.origin == replace(FULL.origin, notes=notes, partial=partial)
    assert prompt.origin.details == FULL.origin.details
    assert pack(prompt) == content


@pytest.mark.parametrize(("changes", "words"), UNSOUND, ids=[words[-1][:50] for _, words in UNSOUND])
def test_every_fault_is_named(changes: Any, words: list[str], tmp_path: Path) -> None:
    description, arrays = taken_apart(pack(FULL))
    for change in changes:
        change(description, arrays)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, put_together(description, arrays))
    error = caught.value
    assert error.expected
    assert error.remedy
    for word in words:
        assert word in error.found
    assert "digest: " not in error.found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (safetensors_bytes({"x": ramp(np.float32, 3)}), "metadata with the keys []"),
        (safetensors_bytes({}, {"softbridge": "{}", "format": "pt"}), "['format', 'softbridge']"),
        (safetensors_bytes({}, {"softbridge": "[]"}), "JSON of type list"),
        (safetensors_bytes({}, {"softbridge": '{"version":1,"version":1}'}), "'version' stands there 2 times"),
        (b"{}", "kind json"),
    ],
)
def test_other_files(content: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, content)
    assert words in caught.value.found


ADAPTION_UNSOUND: list[tuple[Callable[[Any, dict[str, Array]], None], str]] = [
    (edit("parts/0/joins", "elsewhere"), "parts.0: joins: 'elsewhere'"),
    (edit("parts/0/joins", ...), "parts.0: no 'joins'"),
    (edit("parts/0/site", "cross"), "parts.0: site: 'cross', not a self-attention"),
    (edit("parts/0/site", "self"), "parts: one adaption prompt per site"),
    (edit("parts/0/gates", [1]), "parts.0: unexpected 'gates'"),
    (edit("parts/1/layers", [10, 2]), "parts.1.layers: [10, 2], not rising"),
    (edit("parts/1/layers", []), "parts.1: layers: at least one"),
    (tensor("parts.1.layers.2.gate", None), "missing tensor 'parts.1.layers.2.gate'"),
    (tensor("parts.1.layers.2.gate", ramp(np.float32, 1, 4)), "parts.1.layers.2: gate: [1 or heads], not [1, 4]"),
    (tensor("parts.1.layers.2.vectors", ramp(np.float32, 4)), "parts.1.layers.2: vectors: [P, H], not [4]"),
    (tensor("parts.1.layers.2.vectors", ramp(np.float32, 3, 4)), "parts.1: layers: one shape [P, H] for all"),
    (edit("positions/start", {"decoder": 2}), "positions: a start for [], the stacks with virtual tokens"),
]


@pytest.mark.parametrize(("change", "words"), ADAPTION_UNSOUND)
def test_every_fault_of_an_adaption_prompt_is_named(
    change: Callable[[Any, dict[str, Array]], None], words: str, tmp_path: Path
) -> None:
    description, arrays = taken_apart(pack(ADAPTION))
    change(description, arrays)
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, put_together(description, arrays))
    assert words in caught.value.found


def test_one_bit_of_the_numbers(tmp_path: Path) -> None:
    content = bytearray(pack(INPUT))
    content[-3] ^= 1
    with pytest.raises(CheckpointError, match="digest"):
        read(tmp_path, bytes(content))


@given(data=st.data())
def test_mutated_files_are_the_same_prompt_or_refused(data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from([INPUT, FULL, ADAPTION]))
    content = bytearray(pack(prompt))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    with tempfile.TemporaryDirectory() as folder, suppress(CheckpointError):
        found = read(Path(folder), bytes(content))
        assert found == prompt
        assert found.origin == prompt.origin
