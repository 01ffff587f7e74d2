"""The pickles that torch.save writes: walked as data first, and only then shown to torch."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from softbridge.arrays import BFLOAT16, Array
from softbridge.errors import CheckpointError
from softbridge.untrusted.claims import (
    LIMIT,
    MEMBERS,
    STORAGES,
    checked_bytes,
    checked_values,
    is_safe_name,
    is_size,
    refusal,
    short,
)

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."


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
    if tag != "storage" or kind.name not in STORAGES or not isinstance(key, str) or not key.isdecimal():
        raise ValueError(f"a storage described as {short(identity)}")
    if not is_size(count) or any(view):
        raise ValueError(f"a storage of {short(count)} elements, or one that is part of another")
    return _Storage(key, STORAGES[kind.name], count)


def _reduce(function: Any, arguments: Any, what: str) -> Any:
    name = function.name
    if name in _REBUILD:
        storage, offset, shape, stride, *rest = arguments
        sizes = all(map(is_size, (offset, *shape, *stride))) and len(shape) == len(stride)
        if not isinstance(storage, _Storage) or not sizes or any(rest[2:]):  # rest: gradient, hooks, a conjugate's bits
            raise ValueError(f"a tensor described as {short(arguments)}")
        return _View(storage, offset, tuple(shape), tuple(stride))
    if name == _PARAMETER and isinstance(arguments[0], _View):
        return arguments[0]
    if name == _ORDERED and arguments == ():
        return {}
    raise refusal(
        f"{what}: the pickle calls {short(name.replace(' ', '.'))}",
        "a pickle of plain, dense tensors",
        "load it with its own toolkit, if you trust its author, and save the prompt's tensors alone, as .safetensors",
    )


def _checked_views(program: _Program, size: int, what: str) -> dict[str, _View]:
    """The tensors that a program makes, if it makes nothing else and every one lies within its storage."""
    claimed = program.result
    if isinstance(claimed, _View):
        claimed = {"": claimed}
    if not isinstance(claimed, dict):
        raise refusal(f"{what}: a pickled {type(claimed).__name__}", "one dictionary of tensors, or one tensor")
    others = [f"{short(name)}: {type(v).__name__}" for name, v in claimed.items() if not isinstance(v, _View)]
    others += [short(name) for name in claimed if not isinstance(name, str) or not is_safe_name(name)]
    if others:
        raise refusal(
            f"{what}: the pickled dictionary holds more than named tensors: {', '.join(sorted(others)[:5])}"
            + (f" and {len(others) - 5} more" if len(others) > 5 else ""),
            "one dictionary of tensors, or one tensor",
            "save the dictionary that holds the prompt's tensors alone",
        )
    if program.views != set(claimed.values()):
        raise refusal(
            f"{what}: the pickle makes tensors that it does not keep", "the tensors of its dictionary, no others"
        )
    for name, view in claimed.items():
        here = f"{what}: tensor {short(name)}"
        storage = view.storage
        available = size if 0 in view.shape else storage.count * storage.dtype.itemsize
        checked_bytes(here, storage.dtype, view.shape, available)
        reach = 1
        for stride, size in sorted(zip(view.stride, view.shape, strict=True)):
            if 0 not in view.shape and size > 1:
                if stride < reach:
                    raise refusal(
                        f"{here}: strides {short(view.stride)} for shape {short(view.shape)}",
                        "every element in its own place",
                    )
                reach += stride * (size - 1)
        if view.offset + reach > storage.count and 0 not in view.shape:
            raise refusal(
                f"{here} reaches to element {view.offset + reach}", f"the {storage.count} elements that its storage has"
            )
    return cast("dict[str, _View]", claimed)


def main_member(archive: zipfile.ZipFile) -> str | None:
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
            raise refusal(f"{what}: an archive of {len(members)} members", f"at most {MEMBERS}, each with its own name")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise refusal(
                    f"{what}: {short(member.filename)} is {member.file_size} bytes out of {member.compress_size}",
                    "members that are stored, as torch.save does",
                )
        if sum(member.file_size for member in members) > len(content):
            raise refusal(f"{what}: members that overlap", "every member in its own place")
        main = main_member(archive)
        if main is None:
            raise refusal(f"{what}: a zip archive of other things", "a file that torch.save wrote")
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
                    raise refusal(
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
        raise refusal(f"{what}: protocol {short(protocol.result)}", "protocol 1001, little-endian")
    views = _checked_views(program, len(content), what)
    storages = program.storages
    if not all(isinstance(key, str) for key in keys.result) or sorted(keys.result) != sorted(storages):
        raise refusal(f"{what}: data of the storages {short(keys.result)}", f"data of {short(sorted(storages))}")
    for key in keys.result:
        count = int.from_bytes(stream.read(8), "little")
        stored = count * storages[key].dtype.itemsize
        if count != storages[key].count or stored > len(content) - stream.tell():
            raise refusal(
                f"{what}: storage {key} has {count} elements, and {len(content) - stream.tell()} bytes follow",
                f"{storages[key].count} elements of {storages[key].dtype.name}, all of them there",
            )
        stream.seek(stored, io.SEEK_CUR)
    return content, views


def open_pickle(content: bytes, what: str) -> tuple[bytes, dict[str, _View]]:
    """The content as torch may see it, and its tensors as claimed, checked; see `_open_zip` and `_open_legacy`."""
    if not content.startswith((ZIP, LEGACY)):
        raise refusal(f"{what}: a pickle that torch.save did not write", "a file that torch.save wrote")
    try:
        return (_open_zip if content.startswith(ZIP) else _open_legacy)(content, what)
    except CheckpointError:
        raise
    except Exception as error:  # a walk over hostile bytes ends in KeyError, IndexError, BadZipFile, ...
        raise refusal(
            f"{what}: not readable as a torch file: {repr(error)[:200]}", "a whole file that torch.save wrote"
        ) from error


def load_pickle(content: bytes, what: str) -> dict[str, Array]:
    """Every tensor of a file that torch.save wrote, checked; a bare tensor is named ''."""
    import torch

    checked, views = open_pickle(content, what)
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
                raise refusal(
                    f"{what}: torch and softbridge read tensor {short(name)} differently", "a file that both read alike"
                )
            seen[view] = checked_values(f"{what}: tensor {short(name)}", array)
    except CheckpointError:
        raise
    except Exception as error:  # torch raises what it likes
        raise refusal(
            f"{what}: torch cannot load it: {repr(error)[:200]}", "a whole file that torch.save wrote"
        ) from error
    return {name: seen[view] for name, view in views.items()}  # names that share a tensor share an array
