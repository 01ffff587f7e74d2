"""Files are written, and read back, piece by piece: the same bytes, known by the same digests."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softbridge import arrays
from softbridge.arrays import Array, blocks, pieces, same_array
from softbridge.errors import OutputError
from softbridge.mapped import Mapped, let_go
from softbridge.prompt import Gate, KeyValue, KeyValuePrefix
from softbridge.untrusted import (
    Files,
    Streamed,
    pickle_file,
    safetensors_file,
    sha256_of,
    write,
    write_file,
)

RANDOM = np.random.default_rng(0)
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8, np.bool_]


def tensors() -> dict[str, Array]:
    """Two megabytes: in row order, in another, a window, one number, none."""
    rows = RANDOM.standard_normal((64, 4096), dtype=np.float32)
    return {
        "rows": rows,
        "turned": rows.T,
        "window": rows[3:9, 1:-1:3],
        "number": rows[0, :1].reshape(()),
        "none": rows[:0],
    }


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [safetensors_file, pickle_file])
def test_a_stream_is_the_same_bytes_as_often_as_it_is_asked_for(make: Callable[..., Streamed]) -> None:
    file = make(tensors())
    whole = bytes(file)
    assert len(whole) > 2**21
    assert bytes(file) == whole
    assert len(file) == len(whole)
    assert sha256_of(file) == sha256_of(whole) == hashlib.sha256(whole).hexdigest()
    rows = tensors()["rows"]
    other = rows.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    assert sha256_of(make({"rows": other})) != sha256_of(make({"rows": rows})) == sha256_of(make({"rows": rows.copy()}))


@given(st.data())
def test_pieces_and_blocks_are_all_of_an_array(data: st.DataObject) -> None:
    """Whatever its order and however small the pieces are, and two arrays are the same exactly if their bytes are."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    whole = np.arange(int(np.prod([2 * size for size in shape]))).reshape([2 * size for size in shape]).astype(dtype)
    array = whole.transpose(data.draw(st.permutations(range(whole.ndim))))
    array = array[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in shape)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "PIECE", data.draw(st.sampled_from([1, 8, 64, 2**20])))
        patch.setattr(arrays, "_BLOCK", data.draw(st.sampled_from([1, 8, 64, 2**20])))
        assert b"".join(pieces(array)) == array.tobytes()
        assert sorted(x for (b,) in blocks(array) for x in b.ravel().tolist()) == sorted(array.ravel().tolist())
        other = np.array(array, order=data.draw(st.sampled_from("CF")))
        assert same_array(array, other)
        if other.size and dtype != np.bool_:
            place = tuple(data.draw(st.integers(0, size - 1)) for size in other.shape)
            other[place] = 1 if other[place] != 1 else 2
            assert not same_array(array, other)


def test_every_bit_counts() -> None:
    zero, nan = np.zeros(3, np.float32), np.full(3, np.nan, np.float32)
    assert same_array(nan, nan.copy())
    assert not same_array(zero, -zero)
    assert not same_array(zero, zero.astype(np.float64))
    assert not same_array(zero, zero[:2])
    assert same_array(np.zeros(2, complex), np.zeros(2, complex))
    assert not same_array(np.zeros(2, complex), np.ones(2, complex))


def test_what_is_known_of_a_file_is_true_of_it(tmp_path: Path) -> None:
    """Also of one that is made of what is known of those before it."""

    def last(known: Mapping[str, Any]) -> bytes:
        return json.dumps({name: [one.size, one.sha256] for name, one in known.items()}).encode()

    contents = {"a": b"1", "sub/b": safetensors_file(tensors()), "c": pickle_file(tensors())}
    known = write(tmp_path / "out", {**contents, "last": last})
    assert list(known) == [*contents, "last"]
    for name, one in known.items():
        there = (tmp_path / "out" / name).read_bytes()
        assert (one.size, one.sha256) == (len(there), hashlib.sha256(there).hexdigest())
    said = json.loads((tmp_path / "out" / "last").read_bytes())
    assert said == {name: [known[name].size, known[name].sha256] for name in contents}
    alone = write_file(tmp_path / "file", contents["c"])
    assert alone.sha256 == known["c"].sha256


def test_a_digest_needs_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(thread: threading.Thread) -> None:
        started.append(thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    content = RANDOM.bytes(2**23 + 1)
    assert sha256_of(content) == hashlib.sha256(content).hexdigest()
    assert len(started) == 2**23 // arrays.PIECE


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def broken(sink: Any) -> None:
        sink.write(bytes(2**21))
        raise OSError("no space left")

    with pytest.raises(OutputError, match="no space left"):
        write(tmp_path / "out", {"a": b"1", "b": Streamed(broken)})
    with pytest.raises(OutputError, match="no space left"):
        write_file(tmp_path / "file", Streamed(broken))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [safetensors_file, pickle_file])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_stops_a_sink_is_what_is_raised(make: Callable[..., Streamed], error: BaseException) -> None:
    """torch.save would raise an error of its own, on whatever byte it is."""
    file = make({"a": RANDOM.standard_normal((100, 100))})

    class Full:
        def __init__(self, room: int) -> None:
            self.room = room

        def write(self, data: Any, /) -> None:
            self.room -= memoryview(data).nbytes
            if self.room < 0:
                raise error

    for room in (0, 100, 700, 50_000, len(file) - 1):
        with pytest.raises(type(error)) as caught:
            file.write_to(Full(room))
        assert caught.value is error
    file.write_to(Full(len(file)))


# --- what is read -----------------------------------------------------------------------------------------------------


def test_a_file_of_our_own_is_looked_at_where_it_lies(tmp_path: Path) -> None:
    given_to_write, seen = tensors(), []

    def check(files: Files) -> None:
        for name in ("a.safetensors", "a.bin"):
            found = files.tensors(name)
            assert found.keys() == given_to_write.keys()
            assert all(same_array(found[n], given_to_write[n]) for n in found)
            assert not found["rows"].flags.writeable
            seen.append(isinstance(_owner(found["rows"]), Mapped))

    made = {"a.safetensors": safetensors_file(given_to_write), "a.bin": pickle_file(given_to_write)}
    write(tmp_path / "out", made, check=check)
    assert seen == [True, True]
    others = Files(tmp_path / "out")
    assert not isinstance(_owner(others.tensors("a.safetensors")["rows"]), Mapped), "somebody else's could change"
    assert not isinstance(_owner(others.tensors("a.bin")["rows"]), Mapped)


def _owner(array: Any) -> Any:
    while (below := array.obj if isinstance(array, memoryview) else getattr(array, "base", None)) is not None:
        array = below
    return array


def test_nothing_is_let_go_but_of_such_a_file(tmp_path: Path) -> None:
    """Of other memory the system would give back zeros."""
    for private in (mmap.mmap(-1, 2**16, flags=mmap.MAP_PRIVATE), bytearray(2**16)):
        array = np.frombuffer(private, np.uint8)
        array[:] = 7
        let_go(array)
        assert (array == 7).all()
    (tmp_path / "file").write_bytes(bytes([7]) * 2**16)
    with (tmp_path / "file").open("rb") as stream:
        array = np.frombuffer(Mapped.of(stream.fileno(), 2**16), np.uint8)
    let_go(array[::-3])
    let_go(array[:0])
    assert (array == 7).all()


def test_what_was_written_is_not_digested_again_while_it_is_the_same(tmp_path: Path) -> None:
    def check(files: Files) -> None:
        path = files.path / "a"
        assert files.digest("a") == hashlib.sha256(b"1").hexdigest()
        kept = os.stat(path)
        path.write_bytes(b"2")
        os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        assert files.digest("a") == hashlib.sha256(b"1").hexdigest(), "nothing says that it is another"
        path.write_bytes(b"22")
        assert files.digest("a") == hashlib.sha256(b"22").hexdigest()

    write(tmp_path / "out", {"a": b"1"}, check=check)


@pytest.mark.parametrize("npy", [False, True])
def test_what_was_read_is_not_read_again_for_its_digest(
    npy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if npy:
        with path.open("wb") as stream:
            np.save(stream, tensors()["rows"])
    else:
        write_file(path, safetensors_file(tensors()))
    files, amounts = Files(path), []
    (files.array if npy else files.tensors)("file")
    real = hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self.state = real()

        def update(self, data: bytes) -> None:
            amounts.append(len(data))
            self.state.update(data)

        def hexdigest(self) -> str:
            return self.state.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counted)
    assert files.digest("file") == real(path.read_bytes()).hexdigest()
    assert amounts == []
    path.write_bytes(path.read_bytes() + b"\0")
    assert files.digest("file") == real(path.read_bytes()).hexdigest()
    assert sum(amounts) == path.stat().st_size


def test_a_file_that_changes_while_it_is_read_is_digested_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_file(path, safetensors_file({"a": np.ones(4, np.float32)}))
    files = Files(path)
    from softbridge.untrusted import files as module

    checked = module.checked_values

    def changing(what: str, array: Array) -> Array:
        path.write_bytes(bytes(safetensors_file({"a": np.full(4, 2, np.float32)})))
        os.utime(path, ns=(1, 1))
        return checked(what, array)

    monkeypatch.setattr(module, "checked_values", changing)
    files.tensors("file")
    assert files.digest("file") == hashlib.sha256(path.read_bytes()).hexdigest()


# --- the flat layout --------------------------------------------------------------------------------------------------


def test_windows_on_one_array_are_that_array() -> None:
    flat = RANDOM.standard_normal((5, 3 * 2 * 4 * 6), dtype=np.float32)
    prefix = KeyValuePrefix.from_flat("self", flat, (0, 1, 2), 4, 6)
    assert np.shares_memory(prefix.flat(), flat)
    assert not prefix.flat().flags.writeable
    assert same_array(prefix.flat(), flat)


@pytest.mark.parametrize("change", ["other layer", "swapped", "layer left out", "other dtype", "copied", "fewer rows"])
def test_anything_else_is_copied(change: str) -> None:
    flat = RANDOM.standard_normal((5, 3 * 2 * 4 * 6), dtype=np.float32)
    layers = dict(KeyValuePrefix.from_flat("self", flat, (0, 1, 2), 4, 6).layers)
    first = layers[0]
    if change == "other layer":
        layers[0] = layers[1]
    elif change == "swapped":
        layers[0] = KeyValue(first.values, first.keys)
    elif change == "layer left out":
        del layers[1]
    elif change == "other dtype":
        layers[0] = KeyValue(first.keys.view(np.int32), first.values.view(np.int32))
    elif change == "copied":
        layers[0] = KeyValue(first.keys.copy(), first.values)
    else:
        layers = {n: KeyValue(pair.keys[:, :3], pair.values[:, :3]) for n, pair in layers.items()}
    prefix = KeyValuePrefix("self", layers)
    made = prefix.flat()
    assert same_array(made, np.concatenate([_columns(pair) for pair in layers.values()], axis=1))
    assert not np.shares_memory(made, flat) or change == "fewer rows"


def test_prefixes_that_lie_alike_are_compared_from_front_to_back() -> None:
    """And found equal, or not, as those that lie otherwise are."""
    flat = RANDOM.standard_normal((5, 3 * 2 * 4 * 6), dtype=np.float32)

    def prefix(numbers: Array, gate: float | None = None) -> KeyValuePrefix:
        made = KeyValuePrefix.from_flat("self", numbers, (0, 1, 2), 4, 6)
        if gate is None:
            return made
        some = Gate(np.full((1, 24), gate, np.float32), np.zeros(1, np.float32))
        return replace(made, layers={**made.layers, 1: replace(made.layers[1], gate=some)})

    def elsewhere(one: KeyValuePrefix) -> KeyValuePrefix:
        layers = {n: replace(pair, keys=pair.keys.copy(), values=pair.values.copy()) for n, pair in one.layers.items()}
        return replace(one, layers=layers)

    other = flat.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    for one, two, same in (
        (prefix(flat), prefix(flat.copy()), True),
        (prefix(flat), prefix(other), False),
        (prefix(flat), prefix(flat.view(np.int32)), False),
        (prefix(flat), KeyValuePrefix.from_flat("self", flat, (0, 1, 2), 6, 4), False),
        (prefix(flat), KeyValuePrefix.from_flat("self", flat, (0, 1, 3), 4, 6), False),
        (prefix(flat), KeyValuePrefix.from_flat("cross", flat, (0, 1, 2), 4, 6), False),
        (prefix(flat), prefix(flat, 1), False),
        (prefix(flat, 1), prefix(flat, 1), True),
        (prefix(flat, 1), prefix(flat, 2), False),
    ):
        assert (one == two) == (elsewhere(one) == two) == (one == elsewhere(two)) == same


def _columns(pair: KeyValue) -> Array:
    both = np.stack([pair.keys, pair.values])  # [2, K, P, D]
    return both.transpose(2, 0, 1, 3).reshape(both.shape[2], -1)
