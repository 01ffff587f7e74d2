"""The only code that opens foreign bytes, and the only code that writes output.

Prompt checkpoints come from strangers, so one module answers for all of them. What it promises:

- no code from a checkpoint is ever executed: pickles are read by torch's restricted unpickler only, and only after
  their program was walked here as data;
- nothing is allocated that the file does not really contain: every claim about a size is compared with the bytes that
  are there *before* it is believed (peak memory is at most 8 times a file of tensors; see `LIMIT` for its description);
- what is malformed is a `CheckpointError`, never another exception, never a guess;
- no input is modified, and an output appears whole or not at all.

Arrays are NumPy's. torch is imported only where the data of a pickle is read or written, so that looking at files
stays quick.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import json
import math
import os
import pickletools
import re
import reprlib
import secrets
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NoReturn, cast

import numpy as np

from softbridge.errors import CheckpointError, OutputError
from softbridge.prompt import Array, frozen
from softbridge.tensors import BFLOAT16, to_torch

Kind = Literal["safetensors", "pickle", "npy", "json", "unknown"]

#: Bytes of JSON, of a safetensors header or of a pickle's program (not of data): what is parsed costs up to a hundred
#: times its size. The largest that was seen in a real prompt checkpoint is 200 KB.
LIMIT = 8 * 2**20
#: Nesting of JSON.
DEPTH = 64
#: Members of a zip archive.
MEMBERS = 65_535

#: Code in safetensors -> dtype, in the order in which the library lays tensors out.
_DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": BFLOAT16,
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_STORAGES = {
    "torch DoubleStorage": _DTYPES["F64"],
    "torch FloatStorage": _DTYPES["F32"],
    "torch HalfStorage": _DTYPES["F16"],
    "torch BFloat16Storage": _DTYPES["BF16"],
    "torch LongStorage": _DTYPES["I64"],
    "torch IntStorage": _DTYPES["I32"],
    "torch ShortStorage": _DTYPES["I16"],
    "torch CharStorage": _DTYPES["I8"],
    "torch ByteStorage": _DTYPES["U8"],
    "torch BoolStorage": _DTYPES["BOOL"],
}
_ZIP = b"PK\x03\x04"
_NPY = b"\x93NUMPY"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_AGAIN = "get the file again from where it came from; if it is meant to be so, save it anew with its own toolkit"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 80, 80


def _refuse(found: str, expected: str, remedy: str = _AGAIN) -> NoReturn:
    raise CheckpointError(found, expected, remedy)


def _short(value: object) -> str:
    """A foreign value for a message: escaped, short, and cheap (nested tuples of 1 KB can print as gigabytes)."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- names and JSON ---------------------------------------------------------------------------------------------------


def is_safe_name(name: str) -> bool:
    """Whether a name from a file may be shown on a terminal and used as a relative path."""
    return name.isprintable() and not name.startswith("/") and ".." not in re.split(r"[/\\]", name)


def parse_json(content: bytes, what: str) -> dict[str, Any]:
    """The object in `content`, read strictly: no duplicate key, no NaN or infinity, nothing too large or too deep.

    Args:
        what: what to call it in an error.

    Raises:
        CheckpointError: it is no such object.
    """
    if len(content) > LIMIT:
        _refuse(f"{what}: {len(content)} bytes of JSON", f"at most {LIMIT}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
            _refuse(f"{what}: the key {_short(name)} stands there {count} times", "every key once")
        return result

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            _refuse(f"{what}: the number {_short(text)}", "JSON, which has no NaN and no infinity")
        return number

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except RecursionError:
        _refuse(f"{what}: JSON nested too deeply to read", f"at most {DEPTH} levels")
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of more than 4,300 digits
        _refuse(f"{what}: not readable as JSON: {error}", "a JSON object in UTF-8")
    if not isinstance(value, dict):
        _refuse(f"{what}: JSON of type {type(value).__name__}", "a JSON object")
    level: list[Any] = [value]
    for _ in range(DEPTH):
        level = [child for node in level for child in _children(node, what)]
    if level:
        _refuse(f"{what}: JSON nested too deeply", f"at most {DEPTH} levels")
    return value


def _children(node: Any, what: str) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
    elif isinstance(node, list):
        yield from node
    elif isinstance(node, str):
        try:
            node.encode("utf-8")
        except UnicodeEncodeError:
            _refuse(f"{what}: half a surrogate pair in {_short(node)}", "text that can be written as UTF-8")


# --- tensors ----------------------------------------------------------------------------------------------------------


def _checked_bytes(what: str, dtype: np.dtype[Any], shape: Sequence[int], available: int) -> int:
    """The size in bytes of such a tensor, if the file can hold it.

    A dimension of 0 makes a tensor of any other dimensions empty; it is counted as 1, so that (0, 2**62) is refused.
    """
    if len(shape) > 32:
        _refuse(f"{what}: {len(shape)} dimensions", "at most 32")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > available:
        _refuse(
            f"{what}: shape {_short(tuple(shape))} of {dtype.name}, where there are {available} bytes",
            "a file that holds what it describes",
        )
    return math.prod(shape) * dtype.itemsize


def _checked_values(what: str, array: Array) -> Array:
    """The array, read-only (it may be a window on a file's bytes), if its values are numbers that one can use."""
    if array.dtype == np.bool_:
        wrong = int(np.count_nonzero(array.view(np.uint8) > 1))
        if wrong:
            _refuse(f"{what}: {wrong} of {array.size} truth values are neither 0 nor 1", "a byte of 0 or 1 each")
    elif array.dtype == BFLOAT16 or array.dtype.kind == "f":
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            _refuse(
                f"{what}: {wrong} of {array.size} values are not finite",
                "finite numbers",
                "the training that made this file has diverged: take an earlier checkpoint",
            )
    return frozen(array)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class _Range:
    """A tensor in a safetensors file: where its bytes stand, after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    def array(self, data: bytes) -> Array:
        """A window on the bytes of a file."""
        if self.begin == self.end:
            return np.zeros(self.shape, self.dtype)
        return np.frombuffer(data, self.dtype, math.prod(self.shape), self.begin).reshape(self.shape)


def _safetensors_header(stream: BinaryIO, size: int, what: str) -> tuple[int, dict[str, _Range], dict[str, str]]:
    """Where the data begins, the tensors, and the metadata of a safetensors file of `size` bytes.

    Read here and not by the library because the library passes what we refuse (duplicate keys, names that are paths,
    empty tensors of 2**62 rows), and hands out bfloat16 arrays in its latest versions only. A test holds that we
    accept nothing that the library refuses.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size - 8, LIMIT):
        _refuse(
            f"{what}: a header of {length} bytes in a file of {size}",
            f"a header within the file, and of at most {LIMIT} bytes",
        )
    header = parse_json(stream.read(length), f"{what}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(f"{what}: metadata {_short(metadata)}", "names and texts")
    data = size - 8 - length
    tensors: dict[str, _Range] = {}
    for name, entry in header.items():
        here = f"{what}: tensor {_short(name)}"
        if not is_safe_name(name):
            _refuse(here, "a printable name that does not lead out of a folder")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            _refuse(f"{here} is described by {_short(entry)}", "dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            _refuse(f"{here} has the dtype {_short(code)}", f"one of {', '.join(_DTYPES)}")
        if not isinstance(shape, list) or not all(map(_is_size, shape)):
            _refuse(f"{here} has the shape {_short(shape)}", "a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            _refuse(f"{here} stands at {_short(offsets)}", "two offsets")
        begin, end = offsets
        if end - begin != _checked_bytes(here, _DTYPES[code], shape, data):
            _refuse(f"{here}: shape {_short(tuple(shape))} of {code} in {end - begin} bytes", "bytes as the shape says")
        tensors[name] = _Range(_DTYPES[code], tuple(shape), begin, end)
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            _refuse(f"{what}: tensor {_short(name)} begins at {tensor.begin}", f"{position}: no overlap and no hole")
        position = tensor.end
    if position != data:
        _refuse(f"{what}: {data} bytes of data", f"the {position} bytes that its header describes")
    return 8 + length, tensors, cast("dict[str, str]", metadata)


_NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?)([a-zA-Z]\d{1,2})',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(((?:\s*\d{1,19}\s*,)*\s*(?:\d{1,19}\s*)?)\)\s*,?\s*\}\s*"
)


def _npy_header(stream: BinaryIO, size: int, what: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The dtype as stored, the shape and the order of an .npy file; the stream is left where the data begins.

    The header is a Python literal. It is matched, not evaluated: evaluating a stranger's 65,000 characters can fail in
    more ways than are worth listing.
    """
    start = stream.read(8)
    width = {1: 2, 2: 4}.get(start[6], 0) if len(start) == 8 else 0
    length = int.from_bytes(stream.read(width), "little")
    text = stream.read(length).decode("latin-1") if width and length <= 10_000 else ""  # NumPy's own limit
    match = _NPY_HEADER.fullmatch(text)
    if match is None:
        _refuse(f"{what}: the header {_short(text)}", "an .npy header of format 1 or 2 that describes plain numbers")
    order, code, fortran, sizes = match.groups()
    if code == "V2" and order != ">":
        dtype = BFLOAT16  # JAX and NumPy write bfloat16 as 'two bytes of I know not what'; so does KoboldAI
    elif code in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}:
        dtype = np.dtype((order or "=") + code)
    else:
        _refuse(f"{what}: the dtype {order + code!r}", "floats, whole numbers, truth values, or bfloat16 as V2")
    shape = tuple(int(text) for text in sizes.split(",") if text.strip())
    data = size - stream.tell()
    if _checked_bytes(what, dtype, shape, data) != data:
        _refuse(f"{what}: shape {_short(shape)} of {dtype.name} in {data} bytes", "bytes as the shape says")
    return dtype, shape, fortran == "True"


# --- pickles ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name that a pickle refers to. Nothing is looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class _View:
    """A tensor as a pickle claims it: a window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Program:
    """What a pickle's program would make, and everything that it makes on the way, whether it is kept or dropped."""

    result: Any
    storages: Mapping[str, _Storage]
    views: Set[_View]


_MARK = _Global("mark")
_REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"


def _walk_pickle(stream: BinaryIO, what: str) -> _Program:
    """A walk over a pickle's opcodes that calls nothing; tensors come out as `_View`.

    torch's restricted unpickler runs no foreign code, but it believes sizes: bytearray(2**36), a storage of the old
    format with a made-up length, a view of zero strides. So torch gets to see a program only after this walk, which
    knows the few words that torch.save needs for plain tensors, and refuses all others.
    """
    start = stream.tell()
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages: dict[str, _Storage] = {}
    views: set[_View] = set()

    def pop_to_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def set_items(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(k, (str, int)) for k in items[::2]):
            raise ValueError("items set on something that is no dictionary of names")
        target.update(zip(items[::2], items[1::2], strict=True))

    for opcode, argument, position in pickletools.genops(stream):
        if (position or 0) - start > LIMIT:
            raise ValueError(f"a program of more than {LIMIT} bytes")
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                (result,) = stack
                return _Program(result, storages, views)
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_Global(str(argument)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                if len(stack) < count:
                    raise ValueError("the stack is empty")
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[cast("int", argument)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[cast("int", argument)])
            case "APPEND" | "APPENDS":
                items = pop_to_mark() if opcode.name == "APPENDS" else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise ValueError("items appended to something that is no list")
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_to_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                set_items(stack[-1], items)
            case "BUILD":  # torch's state dictionaries carry attributes, such as _metadata; they say nothing to us
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError(f"attributes set on a {type(stack[-1]).__name__}")
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError(f"two descriptions of storage {storage.key}")
                stack.append(storage)
            case "REDUCE":
                arguments = stack.pop()
                made = _reduce(stack.pop(), arguments, what)
                if isinstance(made, _View):
                    views.add(made)
                stack.append(made)
            case _:
                raise ValueError(f"the opcode {opcode.name}, which torch.save does not need for plain tensors")
    raise ValueError("no end")


def _storage(identity: Any) -> _Storage:
    tag, kind, key, _, count, *view = identity
    if tag != "storage" or kind.name not in _STORAGES or not isinstance(key, str) or not key.isdecimal():
        raise ValueError(f"a storage described as {_short(identity)}")
    if not _is_size(count) or any(view):
        raise ValueError(f"a storage of {_short(count)} elements, or one that is part of another")
    return _Storage(key, _STORAGES[kind.name], count)


def _reduce(function: Any, arguments: Any, what: str) -> Any:
    name = function.name
    if name in _REBUILD:
        storage, offset, shape, stride, *rest = arguments
        sizes = all(map(_is_size, (offset, *shape, *stride))) and len(shape) == len(stride)
        if not isinstance(storage, _Storage) or not sizes or any(rest[2:]):  # rest: gradient, hooks, a conjugate's bits
            raise ValueError(f"a tensor described as {_short(arguments)}")
        return _View(storage, offset, tuple(shape), tuple(stride))
    if name == _PARAMETER and isinstance(arguments[0], _View):
        return arguments[0]
    if name == _ORDERED and arguments == ():
        return {}
    _refuse(
        f"{what}: the pickle calls {_short(name.replace(' ', '.'))}",
        "a pickle of plain, dense tensors",
        "load it with its own toolkit, if you trust its author, and save the prompt's tensors alone, as .safetensors",
    )


def _checked_views(program: _Program, size: int, what: str) -> dict[str, _View]:
    """The tensors that a program makes, if it makes nothing else and every one lies within its storage."""
    claimed = program.result
    if isinstance(claimed, _View):
        claimed = {"": claimed}
    if not isinstance(claimed, dict):
        _refuse(f"{what}: a pickled {type(claimed).__name__}", "one dictionary of tensors, or one tensor")
    others = [f"{_short(name)}: {type(v).__name__}" for name, v in claimed.items() if not isinstance(v, _View)]
    others += [_short(name) for name in claimed if not isinstance(name, str) or not is_safe_name(name)]
    if others:
        _refuse(
            f"{what}: the pickled dictionary holds more than named tensors: {', '.join(sorted(others)[:5])}"
            + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
            "one dictionary of tensors, or one tensor",
            "save the dictionary that holds the prompt's tensors alone",
        )
    if program.views != set(claimed.values()):
        _refuse(f"{what}: the pickle makes tensors that it does not keep", "the tensors of its dictionary, no others")
    for name, view in claimed.items():
        here = f"{what}: tensor {_short(name)}"
        storage = view.storage
        available = size if 0 in view.shape else storage.count * storage.dtype.itemsize
        _checked_bytes(here, storage.dtype, view.shape, available)
        reach = 1
        for stride, size in sorted(zip(view.stride, view.shape, strict=True)):
            if 0 not in view.shape and size > 1:
                if stride < reach:
                    _refuse(
                        f"{here}: strides {_short(view.stride)} for shape {_short(view.shape)}",
                        "every element in its own place",
                    )
                reach += stride * (size - 1)
        if view.offset + reach > storage.count and 0 not in view.shape:
            _refuse(
                f"{here} reaches to element {view.offset + reach}", f"the {storage.count} elements that its storage has"
            )
    return cast("dict[str, _View]", claimed)


def _main_member(archive: zipfile.ZipFile) -> str | None:
    """The member of a zip archive that holds the program, or None if torch.save did not write it."""
    found = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    return found[0] if len(found) == 1 else None


def _open_zip(content: bytes, what: str) -> tuple[bytes, dict[str, _View]]:
    """A torch.save archive, written anew with what was checked in it, and its tensors.

    Written anew, so that torch sees exactly the members that we saw: two readers of one zip file can disagree (on
    which directory counts, for one).
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if len(members) > MEMBERS or len({member.filename for member in members}) != len(members):
            _refuse(f"{what}: an archive of {len(members)} members", f"at most {MEMBERS}, each with its own name")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                _refuse(
                    f"{what}: {_short(member.filename)} is {member.file_size} bytes out of {member.compress_size}",
                    "members that are stored, as torch.save does",
                )
        if sum(member.file_size for member in members) > len(content):
            _refuse(f"{what}: members that lie over each other", "every member in its own place")
        main = _main_member(archive)
        if main is None:
            _refuse(f"{what}: a zip archive of other things", "a file that torch.save wrote")
        root = main.removesuffix("data.pkl")
        if archive.getinfo(main).file_size > LIMIT:
            raise ValueError(f"a program of more than {LIMIT} bytes")
        code = archive.read(main)
        program = _walk_pickle(io.BytesIO(code), what)
        views = _checked_views(program, len(content), what)
        again = io.BytesIO()
        with zipfile.ZipFile(again, "w") as copy:
            copy.writestr("archive/data.pkl", code)
            copy.writestr("archive/version", "3\n")
            if f"{root}byteorder" in archive.namelist():
                copy.writestr("archive/byteorder", archive.read(f"{root}byteorder"))
            for storage in program.storages.values():
                member = archive.getinfo(f"{root}data/{storage.key}")
                if member.file_size != storage.count * storage.dtype.itemsize:
                    _refuse(
                        f"{what}: storage {storage.key} has {member.file_size} bytes",
                        f"{storage.count} elements of {storage.dtype.name}, as the program says",
                    )
                copy.writestr(f"archive/data/{storage.key}", archive.read(member))
    return again.getvalue(), views


def _open_legacy(content: bytes, what: str) -> tuple[bytes, dict[str, _View]]:
    """A file of torch < 1.6: five pickles (magic, protocol, system, object, keys of storages), then the storages."""
    stream = io.BytesIO(content)
    _, protocol, system, program, keys = (_walk_pickle(stream, what) for _ in range(5))
    if protocol.result != 1001 or system.result.get("little_endian") is not True:
        _refuse(f"{what}: protocol {_short(protocol.result)}", "protocol 1001, little-endian")
    views = _checked_views(program, len(content), what)
    storages = program.storages
    if not all(isinstance(key, str) for key in keys.result) or sorted(keys.result) != sorted(storages):
        _refuse(f"{what}: data of the storages {_short(keys.result)}", f"data of {_short(sorted(storages))}")
    for key in keys.result:
        count = int.from_bytes(stream.read(8), "little")
        stored = count * storages[key].dtype.itemsize
        if count != storages[key].count or stored > len(content) - stream.tell():
            _refuse(
                f"{what}: storage {key} has {count} elements, and {len(content) - stream.tell()} bytes follow",
                f"{storages[key].count} elements of {storages[key].dtype.name}, all of them there",
            )
        stream.seek(stored, io.SEEK_CUR)
    return content, views


def _open_pickle(content: bytes, what: str) -> tuple[bytes, dict[str, _View]]:
    if not content.startswith((_ZIP, _LEGACY)):
        _refuse(f"{what}: a pickle that torch.save did not write", "a file that torch.save wrote")
    try:
        return (_open_zip if content.startswith(_ZIP) else _open_legacy)(content, what)
    except CheckpointError:
        raise
    except Exception as error:  # a walk over hostile bytes ends in KeyError, IndexError, BadZipFile, ...
        _refuse(f"{what}: not readable as a torch file: {repr(error)[:200]}", "a whole file that torch.save wrote")


def _load_pickle(content: bytes, what: str) -> dict[str, Array]:
    import torch

    checked, views = _open_pickle(content, what)
    seen: dict[_View, Array] = {}
    try:
        loaded = torch.load(io.BytesIO(checked), map_location="cpu", weights_only=True)
        for name, view in views.items():
            if view in seen:
                continue
            # No copy: the arrays are windows on torch's storages, which are as large as the file's.
            tensor = (loaded if isinstance(loaded, torch.Tensor) else loaded[name]).detach()
            bfloat16 = tensor.dtype == torch.bfloat16
            array = tensor.view(torch.uint16).numpy().view(BFLOAT16) if bfloat16 else tensor.numpy()
            if (array.dtype, array.shape) != (view.storage.dtype, view.shape):
                _refuse(f"{what}: torch and softbridge read tensor {_short(name)} differently", "one meaning")
            seen[view] = _checked_values(f"{what}: tensor {_short(name)}", array)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises what it likes
        _refuse(f"{what}: torch cannot load it: {repr(error)[:200]}", "a whole file that torch.save wrote")
    return {name: seen[view] for name, view in views.items()}  # names that share a tensor share an array


# --- files ------------------------------------------------------------------------------------------------------------


class Files:
    """A checkpoint as it lies on the disk: one file, or a folder with its files and those one folder below.

    A link is followed only within the folder, or from a snapshot in the hub's cache to the cache's own store.

    Attributes:
        path: as given.
        is_file: whether the path is one file; `names` is then its own name alone.
        names: the files, sorted; those in a sub-folder as ``sub/name``.

    Raises:
        CheckpointError: there is no such file or folder. So do all methods, on whatever is not as it should be.
    """

    path: Path
    is_file: bool
    names: tuple[str, ...]

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            root = Path(os.path.realpath(self.path))
            self.is_file = root.is_file()
            if self.is_file:
                self._files = {self.path.name: root}
            elif root.is_dir():
                self._files = dict(_listed(root))
            else:
                _refuse(f"'{self.path}' is no file and no folder", "a checkpoint", "check the spelling of the path")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            _refuse(f"'{self.path}' cannot be opened: {error}", "a checkpoint", "check the path and its permissions")
        self.names = tuple(sorted(self._files))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, int, str]]:
        """A file's stream, its size, and what to call it in an error."""
        if name not in self._files:
            _refuse(
                f"'{self.path}' has no file {_short(name)}; it has {_short(list(self.names))}",
                f"a file {_short(name)}",
                "check that the checkpoint is complete and of the format that was asked for",
            )
        what = str(self._files[name]) if self.is_file else str(self.path / name)
        try:
            with open(self._files[name], "rb") as stream:
                yield stream, os.fstat(stream.fileno()).st_size, what
        except OSError as error:
            _refuse(f"{what}: cannot be read: {error}", "a readable file", "check its permissions")

    def kind(self, name: str) -> Kind:
        """What the file is, by its first bytes."""
        with self._open(name) as (stream, size, _):
            start = stream.read(64)
            if start.startswith(_NPY):
                return "npy"
            if start.startswith(_ZIP):
                stream.seek(0)
                try:
                    with zipfile.ZipFile(stream) as archive:
                        return "pickle" if _main_member(archive) else "unknown"
                except Exception:  # zipfile raises seven kinds of exception on malformed archives
                    return "unknown"
            if start.startswith(b"\x80"):
                return "pickle"
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
                return "safetensors"
            return "json" if start.lstrip()[:1] == b"{" else "unknown"

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; see `parse_json`."""
        with self._open(name) as (stream, _, what):
            return parse_json(stream.read(LIMIT + 1), what)

    def tensors(self, name: str) -> dict[str, Array]:
        """Every tensor of a safetensors file or one that torch.save wrote, checked; a bare tensor is named ''."""
        kind = self.kind(name)
        with self._open(name) as (stream, size, what):
            if kind == "safetensors":
                data, ranges, _ = _safetensors_header(stream, size, what)
                content = _whole(stream, size - data, what)
                return {
                    key: _checked_values(f"{what}: tensor {_short(key)}", r.array(content)) for key, r in ranges.items()
                }
            if kind == "pickle":
                return _load_pickle(stream.read(size), what)
        _refuse(f"{what}: its content is {_describe(kind)}", "a safetensors file, or one that torch.save wrote")

    def array(self, name: str) -> Array:
        """The array of an .npy file, in native byte order. Never a pickle."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "npy", what)
            dtype, shape, fortran = _npy_header(stream, size, what)
            length = size - stream.tell()
            content = _whole(stream, length, what)
            array = _Range(dtype, shape[::-1] if fortran else shape, 0, length).array(content)
            array = array.T if fortran else array
            return _checked_values(what, array.astype(array.dtype.newbyteorder("="), copy=False))

    def header(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (NumPy's name of the dtype, shape), without reading values. Needs no torch."""
        kind = self.kind(name)
        with self._open(name) as (stream, size, what):
            if kind == "safetensors":
                ranges = _safetensors_header(stream, size, what)[1]
                return {key: (r.dtype.name, r.shape) for key, r in ranges.items()}
            if kind == "npy":
                dtype, shape, _ = _npy_header(stream, size, what)
                return {"": (dtype.name, shape)}
            if kind == "pickle":
                views = _open_pickle(stream.read(size), what)[1]
                return {key: (view.storage.dtype.name, view.shape) for key, view in views.items()}
        _refuse(f"{what}: its content is {_describe(kind)}", "a file of tensors")

    def metadata(self, name: str) -> dict[str, str]:
        """What a safetensors file says of itself."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "safetensors", what)
            return _safetensors_header(stream, size, what)[2]

    def digest(self, name: str) -> str:
        """sha256 of the file, hexadecimal."""
        state = hashlib.sha256()
        with self._open(name) as (stream, _, _what):
            while block := stream.read(2**20):
                state.update(block)
        return state.hexdigest()

    def _expect(self, name: str, kind: Kind, what: str) -> None:
        found = self.kind(name)
        if found != kind:
            _refuse(f"{what}: its content is {_describe(found)}", f"content of the kind {kind}")


def _whole(stream: BinaryIO, length: int, what: str) -> bytes:
    content = stream.read(length)
    if len(content) != length:
        _refuse(f"{what}: the file shrank while it was read", "a file that nobody else writes", "try again")
    return content


def _describe(kind: Kind) -> str:
    return "of no known kind, or cut off at its beginning or end" if kind == "unknown" else f"of the kind {kind}"


def _listed(root: Path) -> Iterator[tuple[str, Path]]:
    """Name -> real path of the regular files in a folder and one level below."""
    stores = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)

    def inside(path: Path) -> Path | None:
        real = Path(os.path.realpath(path))  # unlike Path.resolve, lets a loop of links be
        return real if any(real.is_relative_to(store) for store in stores) else None

    for path in root.iterdir():
        real = inside(path)
        if real is not None and real.is_file():
            yield path.name, real
        elif real is not None and real.is_dir() and os.access(real, os.R_OK | os.X_OK):
            for below in path.iterdir():
                deeper = inside(below)
                if deeper is not None and deeper.is_file():
                    yield f"{path.name}/{below.name}", deeper


# --- bytes ------------------------------------------------------------------------------------------------------------


def little_endian(name: str, array: Array, dtypes: Collection[np.dtype[Any]] = DTYPE_CODES) -> Array:
    """The array, little-endian and C-contiguous.

    Raises:
        OutputError: its dtype is none of `dtypes` (safetensors', unless told), or no reader would take the name.
    """
    array = np.asarray(array)
    little = array.dtype if array.dtype == BFLOAT16 else array.dtype.newbyteorder("<")
    if little not in dtypes or not is_safe_name(name):
        raise OutputError(
            f"an array of dtype {array.dtype} under the name {_short(name)}",
            f"one of {', '.join(dtype.name for dtype in dtypes)}, under a printable, relative name",
            "convert or rename it before saving",
        )
    return np.asarray(array, dtype=little, order="C")


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, the same bytes for the same tensors and metadata.

    Laid out as the library does (widest dtype first, then by name; header padded to 8 bytes). Not made by the library,
    because that writes the metadata in an order that changes from call to call.
    """
    plain = {name: little_endian(name, array) for name, array in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}
    order = sorted(plain, key=lambda name: (ranks[plain[name].dtype], name))
    position = 0
    for name in order:
        array = plain[name]
        header[name] = {
            "dtype": DTYPE_CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(plain[name].tobytes() for name in order)])


def pickle_bytes(tensors: Mapping[str, Array]) -> bytes:
    """What torch.save makes of a dictionary of tensors. Names that hold one array object share one storage."""
    import torch

    made: dict[int, torch.Tensor] = {}
    for name, array in tensors.items():
        if id(array) not in made:
            made[id(array)] = to_torch(little_endian(name, array, _STORAGES.values()))
    stream = io.BytesIO()
    torch.save({name: made[id(array)] for name, array in tensors.items()}, stream)
    return stream.getvalue()


def npy_bytes(array: Array) -> bytes:
    """An .npy file; bfloat16 is stored as V2, as JAX and KoboldAI do."""
    stream = io.BytesIO()
    plain = little_endian("array", array)
    np.save(stream, plain.view("V2") if plain.dtype == BFLOAT16 else plain, allow_pickle=False)
    return stream.getvalue()


def json_bytes(obj: Any) -> bytes:
    """JSON for people: sorted keys, indented, UTF-8, with a newline at its end."""
    return (json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


# --- output -----------------------------------------------------------------------------------------------------------


def write(
    target: Path,
    files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder, whole or not at all.

    The files are written beside the target, brought to the disk, and checked there; then the folder takes the target's
    place in one step. With `overwrite` the target is exchanged as a whole: no file of the old one stays, because an
    old and a new file of weights side by side is what readers get wrong. (On systems that cannot exchange two folders
    in one step there is an instant without a target, and the old one is put back if the second step fails.)

    Args:
        target: the folder; made if it is missing, as are its parents.
        files: name -> content; a name may have one sub-folder.
        check: called with the folder before it takes the target's place; what it raises, `write` raises.

    Raises:
        OutputError: the target holds something and `overwrite` is off, or it cannot be written.
    """
    target = Path(os.path.realpath(target))
    if target.is_dir():
        _keep_away_from(target)
    if not overwrite and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        _occupied(target)
    if target.exists() and not target.is_dir():
        raise OutputError(f"'{target}' is a file", "a folder, or nothing yet", "name another target, or move the file")
    with _staged(target, files, check) as staged:
        if not target.exists() or not any(target.iterdir()):
            _rename_to_empty(staged, target)
        elif not overwrite:
            _occupied(target)
        elif not _exchange(staged, target):
            _replace_in_two_steps(staged, target)


def write_file(
    target: Path, content: bytes, *, overwrite: bool = False, check: Callable[[Path], None] | None = None
) -> None:
    """Write one file, whole or not at all; see `write`. `check` is called with a file of the same name elsewhere."""
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise OutputError(f"'{target}' is a folder", "a file, or nothing yet", "name a file in it")
    if target.exists() and not overwrite:
        _occupied(target)
    inner = None if check is None else (lambda folder: check(folder / target.name))
    with _staged(target, {target.name: content}, inner) as staged:
        if overwrite:
            os.replace(staged / target.name, target)
            return
        try:
            os.link(staged / target.name, target)  # unlike a rename, a link never replaces what came in between
        except FileExistsError:
            _occupied(target)
        except OSError:  # no hard links on this file system
            os.replace(staged / target.name, target)


def _occupied(target: Path) -> NoReturn:
    raise OutputError(
        f"'{target}' is there already", "a target that does not exist yet", "name another, or say --overwrite"
    )


def _keep_away_from(target: Path) -> None:
    """Refuse to exchange a folder that the user lives in: all that it holds would be gone."""
    for place in (Path.cwd(), Path(os.path.expanduser("~"))):
        if place.resolve().is_relative_to(target):
            raise OutputError(f"'{target}' holds '{place}'", "a folder of its own", f"write to '{target / 'prompt'}'")


@contextmanager
def _staged(target: Path, files: Mapping[str, bytes], check: Callable[[Path], None] | None) -> Iterator[Path]:
    """A folder beside the target with the files in it, on the disk and checked; what is left of it is removed."""
    for name in files:
        parts = PurePosixPath(name).parts
        plain = is_safe_name(name) and "\\" not in name and ":" not in name and name == "/".join(parts) != ""
        if not plain or len(parts) > 2:
            raise OutputError(f"a file named {_short(name)}", "a plain name, in at most one sub-folder", "rename it")
    staged = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()  # with the permissions that the user's umask gives, unlike tempfile's
        for name, content in files.items():
            path = staged / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for folder in {(staged / name).parent for name in files} | {staged}:
            _sync_folder(folder)
        if check is not None:
            check(staged)
        yield staged
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"'{target}' cannot be written: {error}", "a place to write", "check free space and permissions"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename_to_empty(staged: Path, target: Path) -> None:
    try:
        if os.name != "posix" and target.exists():
            target.rmdir()
        os.rename(staged, target)  # takes the place of an empty folder, and fails on any other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            _occupied(target)
        raise


def _exchange(staged: Path, target: Path) -> bool:
    """Exchange two folders in one step, where the system can: whether it did."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(staged), here, os.fsencode(target), exchange) == 0)


def _replace_in_two_steps(staged: Path, target: Path) -> None:
    old = staged.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(staged, target)
    except OSError:
        os.rename(old, target)
        raise
    with suppress(OSError):
        shutil.rmtree(old)
