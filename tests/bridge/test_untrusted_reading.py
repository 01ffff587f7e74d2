"""Valid files come back bit for bit; folders show what is theirs; changed bytes are read as others do, or refused."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from softbridge.errors import CheckpointError, OutputError
from softbridge.untrusted import (
    Files,
    json_bytes,
    npy_bytes,
    pickle_bytes,
    safetensors_bytes,
)
from softbridge.untrusted.pickles import LEGACY

RANDOM = np.random.default_rng(0)
DTYPES = [*"?bBhHiIqQefd", ml_dtypes.bfloat16]
ARRAY = RANDOM.normal(0, 1, (3, 4)).astype(np.float32)
Opened, Refused = Callable[..., Files], Callable[..., CheckpointError]  # the fixtures in conftest.py


# --- valid files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [safetensors_bytes, pickle_bytes])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (1,), (), (0, 4)])
def test_tensors_come_back(make: Any, dtype: Any, shape: tuple[int, ...], tmp_path: Path, opened: Opened) -> None:
    if make is pickle_bytes and np.dtype(dtype).kind == "u" and np.dtype(dtype).itemsize > 1:
        with pytest.raises(OutputError):  # torch.save writes its younger dtypes in a way that we do not read
            make({"x": np.zeros(shape, dtype)})
        return
    array = np.asarray(RANDOM.normal(0, 50, shape)).astype(dtype)
    other = np.arange(4, dtype=np.float64)  # a file of one empty tensor would hold no bytes at all
    content = make({"x": array, "other": other})
    read = opened(content)
    found = read.tensors("file")
    assert found.keys() == {"x", "other"}
    assert (found["x"].dtype, found["x"].shape, found["x"].tobytes()) == (array.dtype, shape, array.tobytes())
    assert read.header("file")["x"] == (np.dtype(dtype).name, shape)
    assert (tmp_path / "file").read_bytes() == content
    assert read.digest("file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (1,), ()])
@pytest.mark.parametrize("order", "CF")
def test_npy_comes_back(dtype: Any, shape: tuple[int, ...], order: Any, opened: Opened) -> None:
    array = np.asarray(RANDOM.normal(0, 50, shape).astype(dtype), order=order)
    read = opened(npy_bytes(array))
    assert read.kind("file") == "npy"
    assert read.header("file") == {"": (array.dtype.name, shape)}
    found = read.array("file")
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, shape, array.tobytes())


def test_npy_in_all_orders_that_numpy_writes(opened: Opened) -> None:
    for array in (ARRAY.astype(">f4"), np.asfortranarray(ARRAY), ARRAY[:, ::2], ARRAY.T):
        stream = io.BytesIO()
        np.save(stream, array)
        found = opened(stream.getvalue()).array("file")
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, array)


def test_pickles_of_other_shapes(opened: Opened) -> None:
    tensor = torch.from_numpy(ARRAY.copy())
    state = torch.nn.Linear(4, 3).state_dict()
    cases: list[tuple[Any, dict[str, Any]]] = [
        (tensor, {"": tensor}),
        (torch.nn.Parameter(tensor), {"": tensor}),
        ({"a": tensor, "t": tensor.T, "part": tensor[1:, 1:3]}, {"a": tensor, "t": tensor.T, "part": tensor[1:, 1:3]}),
        (collections.OrderedDict(a=tensor.bfloat16()), {"a": tensor.bfloat16()}),
        (state, dict(state)),
        ({}, {}),
    ]
    for new in (True, False):
        for saved, expected in cases:
            stream = io.BytesIO()
            torch.save(saved, stream, _use_new_zipfile_serialization=new)
            read = opened(stream.getvalue())
            assert read.kind("file") == "pickle"
            found = read.tensors("file")
            assert found.keys() == expected.keys() == read.header("file").keys()
            for name, array in found.items():
                as_float = torch.from_numpy(array.astype(np.float32))
                assert torch.equal(as_float, expected[name].float())


def test_a_shared_tensor_stays_shared(opened: Opened) -> None:
    big = RANDOM.normal(0, 1, (1000,))
    content = pickle_bytes({"a": big, "b": big, "c": big.copy()})
    assert len(content) < 2.5 * big.nbytes
    found = opened(content).tensors("file")
    assert found["a"] is found["b"]
    assert found["a"] is not found["c"]


def test_metadata(opened: Opened, refused: Refused) -> None:
    said = {"b": "1", "a": "ä\n"}
    assert opened(safetensors_bytes({"x": ARRAY}, said)).metadata("file") == said
    assert opened(safetensors_bytes({"x": ARRAY})).metadata("file") == {}
    refused(lambda: opened(b"{}").metadata("file"), "kind json")


def test_json_comes_back(opened: Opened) -> None:
    value = {"a": [1, 2.5, None, True, "ä\n"], "b": {"c": {}}}
    assert opened(json_bytes(value)).json("file") == value


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    for name, content in (
        ("a", pickle_bytes({"a": ARRAY})),
        ("b", safetensors_bytes({"a": ARRAY})),
        ("c", npy_bytes(ARRAY)),
    ):
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys; from softbridge.untrusted import Files; files = Files(sys.argv[1]);"
        "print([files.header(name) for name in files.names]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)


# --- mutated files ----------------------------------------------------------------------------------------------------


def legacy(obj: Any) -> bytes:
    """What torch < 1.6 saved."""
    stream = io.BytesIO()
    torch.save(obj, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def stored(folder: Path, content: bytes) -> Files:
    (folder / "file").write_bytes(content)
    return Files(folder / "file")


VALID = {
    "safetensors": safetensors_bytes({"a": ARRAY, "b": np.arange(3)}, {"k": "v"}),
    "pickle": pickle_bytes({"a": ARRAY, "b": np.arange(3)}),
    "old pickle": legacy({"a": torch.arange(6.0).reshape(2, 3)}),
    "npy": npy_bytes(ARRAY),
    "json": json_bytes({"a": [1, 2.5, "text"], "b": {"c": None}}),
}


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """Cut off, or with some bytes changed, mostly near the front, where what is claimed stands."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.one_of(st.integers(0, len(content) - 1), st.integers(0, min(len(content), 500) - 1)))
        changed[where] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])


@pytest.mark.parametrize("kind", VALID)
@given(data=st.data())
def test_mutated_files(kind: str, data: st.DataObject) -> None:
    content = mutated(data, VALID[kind])
    with tempfile.TemporaryDirectory() as folder:
        read = stored(Path(folder), content)
        for call in (read.tensors, read.array, read.header, read.metadata, read.json):
            try:
                found = call("file")
            except CheckpointError:
                continue
            if call is read.tensors and read.kind("file") == "safetensors":
                # The library, an independent reader, agrees with what we accept.
                theirs = safetensors.deserialize(content)
                assert {name: bytes(entry["data"]) for name, entry in theirs} == {
                    n: a.tobytes() for n, a in found.items()
                }


@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for start in (b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x02", LEGACY, b"{"):
            read = stored(Path(folder), start + content)
            for call in (read.tensors, read.array, read.header, read.json):
                with suppress(CheckpointError):
                    call("file")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds(tmp_path: Path, refused: Refused) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    for path in (folder / "sub" / "deep", outside):
        path.mkdir(parents=True)
    for path in (folder / "a", folder / "sub" / "b", folder / "sub" / "deep" / "c", outside / "secret"):
        path.write_text("{}")
    (folder / "link").symlink_to("a")
    (folder / "leaves").symlink_to(outside / "secret")
    (folder / "leaves too").symlink_to(outside)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    read = Files(folder)
    assert read.names == ("a", "link", "sub/b")
    assert not read.is_file
    assert "a" in read
    assert "sub/deep/c" not in read
    assert Files(str(folder / "a")).names == ("a",)
    assert Files(folder / "a").is_file
    for name in ("leaves", "../outside/secret", "/etc/passwd", "sub", "", "pipe", "a\0"):
        assert name not in read
        refused(lambda name=name: read.json(name), "no file")


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "other.json").symlink_to("../../../secret")
    assert Files(snapshot).names == ("config.json",)


@pytest.mark.parametrize("path", ["missing", "loop", "pipe", "a\0"])
def test_no_such_checkpoint(path: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: Files(tmp_path / path))


def test_a_header_whose_length_begins_like_a_pickle_is_a_safetensors_header(tmp_path: Path) -> None:
    """640 is 80 02 in little-endian order, and a pickle of protocol 2 begins with these bytes."""
    for length in (640, 896, 1152, 1408):
        path = tmp_path / f"{length}.safetensors"
        for padding in range(1400):
            content = safetensors_bytes({"a": np.ones(3, np.float32)}, {"x": "y" * padding})
            if int.from_bytes(content[:8], "little") == length:
                break
        assert content[0] == 0x80
        path.write_bytes(content)
        assert Files(path).kind(path.name) == "safetensors"
        assert np.array_equal(Files(path).tensors(path.name)["a"], np.ones(3, np.float32))
