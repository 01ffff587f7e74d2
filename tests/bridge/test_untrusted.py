"""Foreign bytes: every line of the module's promises is a case here, made by a function."""

from __future__ import annotations

import collections
import hashlib
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softbridge import untrusted
from softbridge.errors import CheckpointError, OutputError
from softbridge.untrusted import (
    Files,
    json_bytes,
    npy_bytes,
    pickle_bytes,
    safetensors_bytes,
    write,
    write_file,
)

TERA = 2**42
RANDOM = np.random.default_rng(0)
DTYPES = [*"?bBhHiIqQefd", ml_dtypes.bfloat16]
ARRAY = RANDOM.normal(0, 1, (3, 4)).astype(np.float32)


def files(tmp_path: Path, content: bytes, name: str = "file") -> Files:
    (tmp_path / name).write_bytes(content)
    return Files(tmp_path / name)


def refused(call: Callable[[], Any], words: str = "") -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        call()
    error = caught.value
    assert all(isinstance(part, str) and part for part in (error.found, error.expected, error.remedy))
    assert words in error.found, error.found
    assert len(str(error)) < 2000
    return error


# --- valid files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [safetensors_bytes, pickle_bytes])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (1,), (), (0, 4)])
def test_tensors_come_back(make: Any, dtype: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    if make is pickle_bytes and np.dtype(dtype).kind == "u" and np.dtype(dtype).itemsize > 1:
        with pytest.raises(OutputError):  # torch.save writes its younger dtypes in a way that we do not read
            make({"x": np.zeros(shape, dtype)})
        return
    array = np.asarray(RANDOM.normal(0, 50, shape)).astype(dtype)
    other = np.arange(4, dtype=np.float64)  # a file of one empty tensor would hold no bytes at all
    content = make({"x": array, "other": other})
    read = files(tmp_path, content)
    found = read.tensors("file")
    assert found.keys() == {"x", "other"}
    assert (found["x"].dtype, found["x"].shape, found["x"].tobytes()) == (array.dtype, shape, array.tobytes())
    assert read.header("file")["x"] == (np.dtype(dtype).name, shape)
    assert (tmp_path / "file").read_bytes() == content
    assert read.digest("file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (1,), ()])
@pytest.mark.parametrize("order", "CF")
def test_npy_comes_back(dtype: Any, shape: tuple[int, ...], order: Any, tmp_path: Path) -> None:
    array = np.asarray(RANDOM.normal(0, 50, shape).astype(dtype), order=order)
    read = files(tmp_path, npy_bytes(array))
    assert read.kind("file") == "npy"
    assert read.header("file") == {"": (array.dtype.name, shape)}
    found = read.array("file")
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, shape, array.tobytes())


def test_npy_in_all_orders_that_numpy_writes(tmp_path: Path) -> None:
    for array in (ARRAY.astype(">f4"), np.asfortranarray(ARRAY), ARRAY[:, ::2], ARRAY.T):
        stream = io.BytesIO()
        np.save(stream, array)
        found = files(tmp_path, stream.getvalue()).array("file")
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, array)


def test_pickles_of_other_shapes(tmp_path: Path) -> None:
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
            read = files(tmp_path, stream.getvalue())
            assert read.kind("file") == "pickle"
            found = read.tensors("file")
            assert found.keys() == expected.keys() == read.header("file").keys()
            for name, array in found.items():
                as_float = torch.from_numpy(array.astype(np.float32))
                assert torch.equal(as_float, expected[name].float())


def test_a_shared_tensor_stays_shared(tmp_path: Path) -> None:
    big = RANDOM.normal(0, 1, (1000,))
    content = pickle_bytes({"a": big, "b": big, "c": big.copy()})
    assert len(content) < 2.5 * big.nbytes
    found = files(tmp_path, content).tensors("file")
    assert found["a"] is found["b"]
    assert found["a"] is not found["c"]


def test_made_bytes_are_the_same_in_every_process() -> None:
    program = """
        import hashlib, numpy as np
        from softbridge.untrusted import *
        x = {"b": np.arange(6.0).reshape(2, 3), "a": np.arange(3, dtype=np.float32)}
        for content in (
            safetensors_bytes(x, {n: n for n in "qwertyuiop"}), pickle_bytes(x), npy_bytes(x["a"]),
            json_bytes({n: {1.5, 2.5}.pop() for n in "qwertyuiop"}),
        ):
            print(hashlib.sha256(content).hexdigest())
    """
    outputs = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_safetensors_are_laid_out_as_the_library_does() -> None:
    tensors = {f"{i}{d}": np.ones(i + 1, d) for i, d in enumerate(DTYPES)} | {"ä": ARRAY, "b": ARRAY.astype(">f8")}
    native = {
        name: array.astype(array.dtype.newbyteorder("=")) if name == "b" else array for name, array in tensors.items()
    }
    for metadata in (None, {"only": 'one "key"'}):
        try:
            expected = safetensors.numpy.save(native, metadata)
        except (KeyError, safetensors.SafetensorError):  # releases that do not know bfloat16 in NumPy
            pytest.skip("this release of the library writes no bfloat16")
        assert safetensors_bytes(tensors, metadata) == expected


def test_metadata(tmp_path: Path) -> None:
    said = {"b": "1", "a": "ä\n"}
    assert files(tmp_path, safetensors_bytes({"x": ARRAY}, said)).metadata("file") == said
    assert files(tmp_path, safetensors_bytes({"x": ARRAY})).metadata("file") == {}
    refused(lambda: files(tmp_path, b"{}").metadata("file"), "kind json")


def test_json_bytes() -> None:
    assert json_bytes({"b": "ä", "a": [1]}) == '{\n  "a": [\n    1\n  ],\n  "b": "ä"\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        json_bytes({"a": float("nan")})


@pytest.mark.parametrize("make", [safetensors_bytes, pickle_bytes])
@pytest.mark.parametrize("tensors", [{"a": ARRAY.astype(complex)}, {"../a": ARRAY}, {"/a": ARRAY}, {"a\0": ARRAY}])
def test_what_cannot_be_read_is_not_written(make: Any, tensors: Any) -> None:
    with pytest.raises(OutputError):
        make(tensors)


# --- hostile safetensors ----------------------------------------------------------------------------------------------


def st_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, *offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


SAFETENSORS: list[tuple[str, bytes, str]] = [
    ("empty file", b"", "no known kind"),
    ("cut in the length", b"\x08\0\0", "no known kind"),
    ("cut in the header", safetensors_bytes({"x": ARRAY})[:20], "no known kind"),
    ("cut in the data", safetensors_bytes({"x": ARRAY})[:-1], "47"),
    ("trailing bytes", safetensors_bytes({"x": ARRAY}) + b"\0", "49 bytes of data"),
    ("header that is no JSON", st_file(b"{nonsense}"), "JSON"),
    ("header that is too large", st_file(b"{" + b" " * untrusted.LIMIT + b"}"), "header of"),
    (
        "duplicate key, one range",
        st_file(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), b"0" * 4),
        "'a'",
    ),
    ("empty tensor of 2**62 rows", st_file({"a": entry([0, 2**62], 0, 0)}), "4611686018427387904"),
    ("4 TiB claimed", st_file({"a": entry([TERA], 0, 4)}, b"0" * 4), str(TERA)),
    ("sizes that overflow 64 bits", st_file({"a": entry([2**40, 2**40], 0, 4)}, b"0" * 4), "shape"),
    ("negative sizes", st_file({"a": entry([-1, -1], 0, 4)}, b"0" * 4), "shape"),
    ("a truth value as a size", st_file({"a": entry([True], 0, 4)}, b"0" * 4), "shape"),
    ("hundred dimensions", st_file({"a": entry([1] * 100, 0, 4)}, b"0" * 4), "100 dimensions"),
    ("overlap", st_file({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"0" * 6), "begins at 2"),
    ("hole", st_file({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12), "begins at 8"),
    ("range that runs backwards", st_file({"a": entry([1], 4, 0)}, b"0" * 4), "-4 bytes"),
    ("three offsets", st_file({"a": entry([1], 0, 4, 8)}, b"0" * 4), "stands at"),
    ("unknown dtype", st_file({"a": entry([4], 0, 4, dtype="F8_E4M3")}, b"0" * 4), "F8_E4M3"),
    ("dtype that is a list", st_file({"a": entry([4], 0, 4, dtype=["F32"])}, b"0" * 4), "dtype"),
    ("description that is a number", st_file({"a": 1}), "described by 1"),
    ("more than is described", st_file({"a": {**entry([1], 0, 4), "code": "x"}}, b"0" * 4), "described by"),
    ("metadata that is no text", st_file({"__metadata__": {"a": 1}}), "metadata"),
    ("name that climbs", st_file({"a/../../b": entry([1], 0, 4)}, b"0" * 4), "a/../../b"),
    ("name from the root", st_file({"/etc/x": entry([1], 0, 4)}, b"0" * 4), "/etc/x"),
    ("name with NUL", st_file({"a\0": entry([1], 0, 4)}, b"0" * 4), r"a\x00"),
    ("name that drives a terminal", st_file({"\x1b[2J": entry([1], 0, 4)}, b"0" * 4), r"\x1b"),
    ("half a surrogate pair", st_file({"\ud800": entry([1], 0, 4)}, b"0" * 4), "surrogate"),
    ("NaN", safetensors_bytes({"x": np.array([1, np.nan, np.inf])}), "'x': 2 of 3 values are not finite"),
    ("NaN in bfloat16", safetensors_bytes({"x": np.array([1, np.nan], ml_dtypes.bfloat16)}), "1 of 2 values"),
    ("truth value of 2", st_file({"a": entry([2], 0, 2, dtype="BOOL")}, b"\1\2"), "1 of 2 truth values"),
    ("not a file of tensors", npy_bytes(ARRAY), "kind npy"),
]


@pytest.mark.parametrize(
    ("content", "words"), [case[1:] for case in SAFETENSORS], ids=[case[0] for case in SAFETENSORS]
)
def test_hostile_safetensors(content: bytes, words: str, tmp_path: Path) -> None:
    refused(lambda: files(tmp_path, content).tensors("file"), words)


# --- hostile pickles --------------------------------------------------------------------------------------------------


def saved(obj: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream, **options)
    return stream.getvalue()


def rewritten(content: bytes, change: Callable[[str, bytes], bytes], **options: Any) -> bytes:
    """A torch archive with its members changed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", **options) as new:
        for member in old.infolist():
            new.writestr(member.filename, change(member.filename, old.read(member)))
    return stream.getvalue()


def with_program(program: bytes) -> bytes:
    return rewritten(saved({"a": torch.ones(2, 3)}), lambda n, b: program if n.endswith("data.pkl") else b)


def replaced(content: bytes, old: bytes, new: bytes) -> bytes:
    def change(name: str, member: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return member
        assert old in member
        return member.replace(old, new)

    return rewritten(content, change)


def call(function: bytes, argument: bytes) -> bytes:
    """A program that calls module\nname with one argument."""
    return b"\x80\x02c" + function + b"\n" + argument + b"\x85R."


def long(number: int) -> bytes:
    return b"\x8a\x09" + number.to_bytes(9, "little")


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo executed > executed",)


ONE = saved({"a": torch.arange(6.0).reshape(2, 3)})
OLD = saved({"a": torch.arange(6.0).reshape(2, 3)}, _use_new_zipfile_serialization=False)
SHAPE, STRIDE, COUNT = b"K\x02K\x03\x86", b"K\x03K\x01\x86", b"K\x06t"
NESTED = b"\x80\x02)" + b"".join(b"q\0h\0\x86" for _ in range(200)) + b"."

PICKLES: list[tuple[str, Callable[[], bytes], str]] = [
    ("code", lambda: pickle.dumps(Evil(), 2), "torch.save did not write"),
    ("code in an archive", lambda: with_program(pickle.dumps(Evil(), 2)), "system"),
    ("code in an old file", lambda: OLD[:137] + pickle.dumps({"a": Evil()}, 2) + OLD[137:], "system"),
    (
        "64 GiB of bytes by a call that torch allows",
        lambda: with_program(call(b"builtins\nbytearray", long(2**36))),
        "bytearray",
    ),
    ("protocol 4", lambda: with_program(pickle.dumps({"a": 1}, 4)), "opcode"),
    (
        "dense 4 TiB out of zero strides",
        lambda: replaced(replaced(ONE, SHAPE, long(2**20) * 2 + b"\x86"), STRIDE, b"K\0K\0\x86"),
        "'a': shape",
    ),
    ("zero strides", lambda: saved({"a": torch.ones(1).expand(6)}), "'a': shape"),
    ("overlapping strides", lambda: replaced(ONE, STRIDE, b"K\x01K\x01\x86"), "strides (1, 1)"),
    ("view beyond its storage", lambda: replaced(ONE, b"QK\0", b"QK\x02"), "reaches to element 8"),
    ("negative offset", lambda: replaced(ONE, b"QK\0", b"QJ\xff\xff\xff\xff"), "a tensor described as"),
    ("storage larger than its member", lambda: replaced(ONE, COUNT, b"K\xf0t"), "storage 0 has 24 bytes"),
    ("old file: storage larger than the file", lambda: OLD.replace(b"K\x06N", long(2**40) + b"N"), "storage"),
    ("old file: view larger than its storage", lambda: OLD.replace(SHAPE, long(2**20) * 2 + b"\x86"), "'a': shape"),
    ("old file: cut off", lambda: OLD[:-1], "23 bytes follow"),
    ("old file: storage that is dropped", lambda: dropped_storage(), "data of the storages"),
    ("tensor that is dropped", lambda: dropped_tensor(), "does not keep"),
    ("sparse", lambda: saved({"a": torch.ones(2, 3).to_sparse()}), "_get_layout"),
    (
        "sparse, 4 TiB",
        lambda: saved(
            {"a": torch.sparse_coo_tensor(torch.zeros(1, 1).long(), torch.ones(1), (2**40,), check_invariants=False)}
        ),
        "_get_layout",
    ),
    ("meta", lambda: saved({"a": torch.empty(2**40, device="meta")}), "_rebuild_meta_tensor"),
    (
        "quantised",
        lambda: saved({"a": torch.ops.aten.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)}),
        "QUInt8Storage",
    ),
    ("negated bits", lambda: saved({"a": torch._neg_view(torch.ones(3))}), "a tensor described as"),
    ("complex", lambda: saved({"a": torch.ones(3, dtype=torch.complex64)}), "ComplexFloatStorage"),
    (
        "deflated",
        lambda: rewritten(saved({"a": torch.zeros(10**6)}), lambda _, b: b, compression=zipfile.ZIP_DEFLATED),
        "bytes out of",
    ),
    ("another archive", lambda: other_zip(), "no known kind"),
    ("cut archive", lambda: ONE[:-1], "no known kind"),
    ("half an archive", lambda: ONE[: len(ONE) // 2], "no known kind"),
    ("storage left out", lambda: replaced(ONE, b"X\x01\0\0\x000", b"X\x01\0\0\x007"), "archive/data/7"),
    ("key that is a path", lambda: replaced(ONE, b"X\x01\0\0\x000", b"X\x04\0\0\0../0"), "a storage described as"),
    ("nested dictionary", lambda: saved({"state": {"a": torch.ones(2)}, "lr": 0.1}), "'lr': float, 'state': dict"),
    ("number", lambda: saved(3), "a pickled int"),
    ("list", lambda: saved([torch.ones(2)]), "a pickled list"),
    ("object", lambda: saved({"a": Path("x")}), "pathlib"),
    ("whole number as a name", lambda: saved({0: torch.ones(2)}), "more than named tensors"),
    ("name that climbs", lambda: saved({"../a": torch.ones(2)}), "../a"),
    ("NaN", lambda: saved({"a": torch.tensor([1, torch.nan])}), "'a': 1 of 2 values are not finite"),
    ("tuples that print as 2**200", lambda: with_program(NESTED), "a pickled tuple"),
    ("empty program", lambda: with_program(b""), "torch file"),
    ("stack that runs empty", lambda: with_program(b"\x80\x02\x86."), "torch file"),
    ("tuple without a mark", lambda: with_program(b"\x80\x02t."), "torch file"),
    ("memo that is not there", lambda: with_program(b"\x80\x02h\x05."), "torch file"),
    ("call of no function", lambda: with_program(b"\x80\x02K\1)R."), "torch file"),
]


def other_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("tensor.npy", npy_bytes(ARRAY))
    return stream.getvalue()


def dropped_tensor() -> bytes:
    """The dictionary's tensor is replaced by itself with another shape, so that the first one is never seen again."""
    with zipfile.ZipFile(io.BytesIO(ONE)) as archive:
        program = archive.read("archive/data.pkl")
    setting = program[program.index(b"}") + 3 : -1]
    return with_program(program[:-1] + setting.replace(SHAPE, b"K\x01K\x03\x86") + b".")


def dropped_storage() -> bytes:
    start, end = OLD.index(b"(X\x07\0\0\0storage"), OLD.index(b"Q", 140) + 1
    identity = (
        OLD[start:end].replace(b"q\x03", b"").replace(b"q\x04", b"").replace(b"q\x06", b"").replace(b"q\x07", b"")
    )
    key = identity.index(b"X", 30)
    hidden = identity[:key] + b"X\x01\0\0\x009" + identity[identity.index(b"q\x05") + 2 :]
    assert hidden.count(b"K\x06N") == 1
    hidden = hidden.replace(b"K\x06N", long(2**36) + b"N")
    stop = OLD.index(b"s.", end) + 1
    return OLD[:stop] + hidden + b"b" + OLD[stop:]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in PICKLES], ids=[case[0] for case in PICKLES])
def test_hostile_pickles(make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = make()
    refused(lambda: files(tmp_path, content).tensors("file"), words)
    if "values" not in words:  # values are not looked at for a header
        refused(lambda: files(tmp_path, content).header("file"), words)
    assert os.listdir() == ["file"], "code was executed"


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    for name, content in (("a", ONE), ("b", safetensors_bytes({"a": ARRAY})), ("c", npy_bytes(ARRAY))):
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys; from softbridge.untrusted import Files; files = Files(sys.argv[1]);"
        "print([files.header(name) for name in files.names]);"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)


MEMORY = """
    import resource, sys
    from softbridge.errors import CheckpointError
    from softbridge.untrusted import Files
    import torch
    files = Files(sys.argv[1])
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, now + 2**28))  # mapped is enough to count, touched or not
    try:
        bytearray(2**29)
    except MemoryError:
        pass
    else:
        raise SystemExit("the limit does not hold, so this test shows nothing")
    for name in files.names:
        try:
            files.tensors(name)
        except CheckpointError as error:
            assert "allocate memory" not in str(error) and "MemoryError" not in str(error), (name, str(error))
        else:
            raise SystemExit(f"{name} was read")
    print(len(files.names))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs an address space limit")
def test_nothing_is_allocated_that_is_not_there(tmp_path: Path) -> None:
    cases = [content for _, content, _ in SAFETENSORS] + [make() for _, make, _ in PICKLES]
    for number, content in enumerate(cases):
        if len(content) < 2**20:
            (tmp_path / str(number)).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 60


@pytest.mark.parametrize("make", [safetensors_bytes, pickle_bytes, lambda tensors: npy_bytes(tensors["a"])])
def test_memory_is_a_small_multiple_of_the_file(make: Any, tmp_path: Path) -> None:
    content = make({"a": np.zeros((1000, 1000), np.float32)})
    read = files(tmp_path, content)
    tracemalloc.start()
    try:
        read.array("file") if read.kind("file") == "npy" else read.tensors("file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7 * len(content)  # torch's own storage, which tracemalloc does not see, is the eighth


# --- hostile .npy and JSON --------------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 if version == 1 else 4, "little") + text + data


def described(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def object_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    return stream.getvalue()


NPY: list[tuple[str, Callable[[], bytes], str]] = [
    ("pickled objects", object_array, "the header"),
    ("4 TiB claimed", lambda: npy(described("'<f4'", f"({TERA},)"), b"0000"), str(TERA)),
    ("sizes that overflow", lambda: npy(described("'<f4'", f"({2**40}, {2**40})"), b"0000"), "shape"),
    ("empty, 2**62 rows", lambda: npy(described("'<f4'", f"(0, {2**62})")), "shape"),
    ("negative size", lambda: npy(described("'<f4'", "(-1,)"), b"0000"), "the header"),
    ("cut off", lambda: npy_bytes(ARRAY)[:-1], "47 bytes"),
    ("cut in the header", lambda: npy_bytes(ARRAY)[:20], "the header"),
    ("cut in the version", lambda: npy_bytes(ARRAY)[:7], "the header"),
    ("trailing bytes", lambda: npy_bytes(ARRAY) + b"\0", "49 bytes"),
    ("code in the header", lambda: npy(described("__import__('os').system('echo > executed')", "(1,)")), "the header"),
    ("structure", lambda: npy(described("[('a', '<f4')]", "(1,)"), b"0000"), "the header"),
    ("text", lambda: npy(described("'<U1'", "(1,)"), b"0000"), "dtype"),
    ("complex", lambda: npy(described("'<c8'", "(1,)"), b"0" * 8), "dtype"),
    ("void of 4 bytes", lambda: npy(described("'|V4'", "(1,)"), b"0000"), "dtype"),
    ("version 9", lambda: npy(described("'<f4'", "(1,)"), b"0000", version=9), "the header"),
    ("long header", lambda: npy(described("'<f4'", "(1,)") + " " * 20_000, b"0000"), "the header"),
    ("deep header", lambda: npy("(" * 9_000), "the header"),
    ("NaN", lambda: npy_bytes(np.array([1, np.nan, 2])), "1 of 3 values are not finite"),
    ("NaN in bfloat16", lambda: npy_bytes(np.array([np.inf], ml_dtypes.bfloat16)), "1 of 1 values are not finite"),
    ("no .npy", lambda: b"{}", "kind json"),
]


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in NPY], ids=[case[0] for case in NPY])
def test_hostile_npy(make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = make()
    refused(lambda: files(tmp_path, content).array("file"), words)
    assert os.listdir() == ["file"], "code was executed"


JSON: list[tuple[str, bytes, str]] = [
    ("empty", b"", "JSON"),
    ("cut off", b'{"a": 1', "JSON"),
    ("a list", b"[1]", "type list"),
    ("duplicate key", b'{"a": {"b": 1, "b": 1}}', "'b' stands there 2 times"),
    ("NaN", b'{"a": NaN}', "'NaN'"),
    ("infinity", b'{"a": [-Infinity]}', "'-Infinity'"),
    ("infinity in figures", b'{"a": 1e999}', "'1e999'"),
    ("number of 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "JSON" if sys.version_info >= (3, 11) else ""),
    ("deep", b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "deeply"),
    ("very deep", b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "deeply"),
    ("large", b'{"a": "' + b"a" * untrusted.LIMIT + b'"}', "bytes of JSON"),
    ("no UTF-8", b'{"a": "\xff"}', "JSON"),
    ("half a surrogate pair", b'{"a": ["\\ud800"]}', "surrogate"),
]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in JSON], ids=[case[0] for case in JSON])
def test_hostile_json(content: bytes, words: str, tmp_path: Path) -> None:
    refused(lambda: files(tmp_path, content).json("file"), words)


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "ä\n"], "b": {"c": {}}}
    assert files(tmp_path, json_bytes(value)).json("file") == value


# --- mutated files ----------------------------------------------------------------------------------------------------

VALID = {
    "safetensors": safetensors_bytes({"a": ARRAY, "b": np.arange(3)}, {"k": "v"}),
    "pickle": pickle_bytes({"a": ARRAY, "b": np.arange(3)}),
    "old pickle": OLD,
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
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_files(kind: str, data: st.DataObject) -> None:
    content = mutated(data, VALID[kind])
    with tempfile.TemporaryDirectory() as folder:
        read = files(Path(folder), content)
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


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for start in (b"", b"\x93NUMPY", b"PK\x03\x04", b"\x80\x02", untrusted._LEGACY, b"{"):
            read = files(Path(folder), start + content)
            for call in (read.tensors, read.array, read.header, read.json):
                with suppress(CheckpointError):
                    call("file")


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_a_folder_holds(tmp_path: Path) -> None:
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
def test_no_such_checkpoint(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: Files(tmp_path / path))


# --- output -----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_write(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep"
    seen: list[Path] = []

    def check(folder: Path) -> None:
        assert tree(folder) == {"a": b"1", "sub/b": b"2"}
        assert folder.parent == target.parent
        seen.append(folder)

    write(target, {"a": b"1", "sub/b": b"2"}, check=check)
    assert tree(tmp_path) == {"new/deep/a": b"1", "new/deep/sub/b": b"2"}
    assert len(seen) == 1
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"a": b"1"})
    assert tree(tmp_path / "empty") == {"a": b"1"}


def test_write_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_bytes(b"0")
    with pytest.raises(OutputError, match="is there already"):
        write(target, {"a": b"1"})
    assert tree(tmp_path) == {"target/mine": b"0"}
    write(target, {"a": b"1"}, overwrite=True)
    assert tree(tmp_path) == {"target/a": b"1"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_check_leaves_nothing(overwrite: bool, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        raise CheckpointError("a", "b", "c")

    with pytest.raises(CheckpointError):
        write(tmp_path / "a", {"a": b"1"}, overwrite=overwrite, check=check)
    with pytest.raises(CheckpointError):
        write_file(tmp_path / "a", b"1", overwrite=overwrite, check=check)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/b/c", "a//b", "a/", "a\0", "a\\b", "c:a", "a\n", "./a"]
)
def test_names_that_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a file named"):
        write(tmp_path / "out", {"fine": b"", name: b"1"})
    assert os.listdir(tmp_path) == []


def test_write_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0")
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            write(tmp_path / "file", {"a": b"1"}, overwrite=overwrite)
        with pytest.raises(OutputError, match="is a folder"):
            write_file(tmp_path / "folder", b"1", overwrite=overwrite)
        with pytest.raises(OutputError):  # a name both file and folder
            write(tmp_path / "out", {"a": b"1", "a/b": b"2"}, overwrite=overwrite)
        with pytest.raises(OutputError):  # below a file
            write(tmp_path / "file" / "out", {"a": b"1"}, overwrite=overwrite)
        monkeypatch.chdir(tmp_path / "folder")
        for target in (Path(), Path(".."), tmp_path):
            with pytest.raises(OutputError, match="folder of its own"):
                write(target, {"a": b"1"}, overwrite=overwrite)
    assert tree(tmp_path) == {"file": b"0"}


def test_write_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"

    def check(path: Path) -> None:
        assert (path.name, path.read_bytes()) == ("a.json", b"1")
        assert path != target

    write_file(target, b"1", check=check)
    with pytest.raises(OutputError, match="is there already"):
        write_file(target, b"2")
    assert tree(tmp_path) == {"a.json": b"1"}
    write_file(target, b"2", overwrite=True)
    assert tree(tmp_path) == {"a.json": b"2"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames, and the old one is put back if the second fails."""
    monkeypatch.setattr(untrusted, "_exchange", lambda staged, target: False)
    target = tmp_path / "target"
    write(target, {"a": b"1"})
    write(target, {"b": b"2"}, overwrite=True)
    assert tree(tmp_path) == {"target/b": b"2"}
    rename, calls = os.rename, []

    def failing(old: Any, new: Any) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise OSError("no")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError):
        write(target, {"c": b"3"}, overwrite=True)
    assert len(calls) == 3
    assert tree(tmp_path) == {"target/b": b"2"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from softbridge.untrusted import write, write_file

    point, what, overwrite = int(sys.argv[2]), sys.argv[3], sys.argv[4] == "True"
    target, met = Path(sys.argv[1]), 0

    def audit(event, arguments):
        global met
        if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.scandir", "ctypes.call_function",
                     "ctypes.dlopen", "ctypes.dlsym") or event == "open" and str(target.parent) in str(arguments[0]):
            met += 1
            if met == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if what == "folder":
        write(target, {"a": b"new" * 1000, "sub/b": b"new"}, overwrite=overwrite)
    else:
        write_file(target, b"new" * 1000, overwrite=overwrite)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders in one step is Linux's")
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_instant(what: str, overwrite: bool, tmp_path: Path) -> None:
    """Killed before every system call in turn, the target is the old one or the new one, whole."""
    old, new = {"old": b"old"}, {"a": b"new" * 1000, "sub/b": b"new"}
    outcomes: list[str] = []
    for point in range(1, 100):
        target = tmp_path / str(point) / "target"
        target.parent.mkdir()
        if overwrite and what == "folder":
            target.mkdir()
            (target / "old").write_bytes(b"old")
        elif overwrite:
            target.write_bytes(b"old")
        program = [sys.executable, "-c", textwrap.dedent(KILLED), str(target), str(point), what, str(overwrite)]
        code = subprocess.run(program, check=False).returncode
        if what == "folder":
            found = tree(target) if target.is_dir() else None
            state = "new" if found == new else "old" if found == (old if overwrite else None) else f"broken: {found}"
        else:
            content = target.read_bytes() if target.exists() else None
            state = (
                "new" if content == b"new" * 1000 else "old" if content == (b"old" if overwrite else None) else "broken"
            )
        outcomes.append(state)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes == sorted(outcomes, reverse=True), outcomes  # old, then new; nothing else and never back
    assert outcomes.count("old") >= 3
    assert outcomes.count("new") >= 2
