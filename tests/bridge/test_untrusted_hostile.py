"""Hostile bytes: every line of the package's promises is a case here, made by a function."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.untrusted import (
    Files,
    npy_bytes,
    pickle_bytes,
    safetensors_bytes,
)

TERA = 2**42
ARRAY = np.random.default_rng(0).normal(0, 1, (3, 4)).astype(np.float32)
Opened, Refused = Callable[..., Files], Callable[..., CheckpointError]  # the fixtures in conftest.py


# --- safetensors ------------------------------------------------------------------------------------------------------


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
def test_hostile_safetensors(content: bytes, words: str, opened: Opened, refused: Refused) -> None:
    refused(lambda: opened(content).tensors("file"), words)


# --- pickles ----------------------------------------------------------------------------------------------------------


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
    ("another archive", lambda: other_zip(), "kind zip"),
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
def test_hostile_pickles(
    make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    content = make()
    refused(lambda: opened(content).tensors("file"), words)
    if "values" not in words:  # values are not looked at for a header
        refused(lambda: opened(content).header("file"), words)
    assert os.listdir() == ["file"], "code was executed"


# --- .npy -------------------------------------------------------------------------------------------------------------


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
def test_hostile_npy(
    make: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opened, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    content = make()
    refused(lambda: opened(content).array("file"), words)
    assert os.listdir() == ["file"], "code was executed"


# --- JSON -------------------------------------------------------------------------------------------------------------


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
def test_hostile_json(content: bytes, words: str, opened: Opened, refused: Refused) -> None:
    refused(lambda: opened(content).json("file"), words)


# --- memory -----------------------------------------------------------------------------------------------------------


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
def test_memory_is_a_small_multiple_of_the_file(make: Any, opened: Opened) -> None:
    content = make({"a": np.zeros((1000, 1000), np.float32)})
    read = opened(content)
    tracemalloc.start()
    try:
        read.array("file") if read.kind("file") == "npy" else read.tensors("file")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7 * len(content)  # torch's own storage, which tracemalloc does not see, is the eighth
