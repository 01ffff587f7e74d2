"""The files that torch.save writes, and other pickles: walked as data (see `pickle_walk`), and never given to an
unpickler. Their numbers are read here, from where they lie in the file.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np

from softbridge.arrays import BFLOAT16, Array, pieces
from softbridge.errors import CheckpointError
from softbridge.untrusted.archives import ALLOWANCE, EXPANSION, LOCAL, data_of, opened_zip
from softbridge.untrusted.claims import (
    DEPTH,
    LIMIT,
    checked_bytes,
    checked_values,
    is_safe_name,
    refusal,
    short,
)
from softbridge.untrusted.pickle_walk import Foreign, Global, Program, Storage, View, walk

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."

#: So many bytes of the file, [N], of those from the first on: begin, length.
Read = Callable[[int, int], Array]


@dataclass(frozen=True)
class _Place:
    """Where a storage's bytes lie in a file: at which byte, how many, and their checksum if there is one."""

    offset: int
    size: int
    checksum: int | None
    big_endian: bool = False


class Stored:
    """A tensor in a file, checked and not read yet.

    Attributes:
        dtype, shape: of the array.
        name: what to call it in an error.
    """

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, ...], name: str, read: Callable[[], Array]) -> None:
        self.dtype, self.shape, self.name, self._read = dtype, shape, name, read

    def array(self) -> Array:
        """The numbers, read-only: a window on its storage, which is read once for all tensors that share it.

        Raises:
            CheckpointError: they are not finite, or the file was changed meanwhile.
        """
        return self._read()

    def __repr__(self) -> str:
        return f"<{self.name}: {list(self.shape)} {self.dtype.name}>"


class Pickle:
    """What a file of torch.save holds, by its description; numbers are read when they are asked for.

    Args:
        stream: the file, open.
        size: its length in bytes.
        what: what to call it in an error.
        read: reads a stretch of it, also when the stream is closed.

    Raises:
        CheckpointError: it was not written by torch.save, or is malformed.
    """

    def __init__(self, stream: BinaryIO, size: int, what: str, read: Read, *, plain: bool) -> None:
        self.what, self.size, self._read = what, size, read
        self._arrays: dict[View, Array] = {}
        self._numbers: dict[Storage, Array] = {}
        self._given, self._plain = 0, plain
        start = stream.read(len(LEGACY))
        stream.seek(0)
        if not start.startswith((LOCAL, LEGACY)):
            raise refusal(f"{what}: a pickle that torch.save did not write", "a file that torch.save wrote")
        try:
            opened = _open_zip if start.startswith(LOCAL) else _open_legacy
            self.program, self._places = opened(stream, size, what, plain)
        except CheckpointError:
            raise
        except Exception as error:  # a walk over hostile bytes ends in KeyError, IndexError, BadZipFile, ...
            raise refusal(
                f"{what}: not readable as a torch file: {repr(error)[:200]}", "a whole file that torch.save wrote"
            ) from error

    def plain(self) -> dict[str, Stored]:
        """The tensors of a file that holds nothing but named tensors; a bare tensor is named ''.

        Raises:
            CheckpointError: the file holds anything else.
        """
        views = _named(self.program, self.what)
        return {name: self._stored(view, f"tensor {short(name)}") for name, view in views.items()}

    def tree(self) -> Any:
        """Everything that the file holds, with `Stored` in the place of tensors; see `Files.tree`."""
        return _unfolded(self.program.result, self._stored, self.what)

    def _stored(self, view: View, name: str) -> Stored:
        here = f"{self.what}: {name}"
        _check(view, here, self.size)
        return Stored(view.storage.dtype, view.shape, name, lambda: self._array(view, here))

    def _array(self, view: View, here: str) -> Array:
        # Windows cost nothing by themselves. What is made of them does. Of one tensor under many names no more is made
        # where files hold nothing but tensors: AdapterHub has its pool of prefixes under each attention module.
        if view not in self._arrays or not self._plain:
            self._given += math.prod(view.shape) * view.storage.dtype.itemsize
        if self._given > EXPANSION * self.size + ALLOWANCE:
            raise refusal(
                f"{self.what}: tensors that share storages, of more than {self._given} bytes out of {self.size}",
                f"at most {EXPANSION} times the size of the file",
                "save the prompt's tensors alone, each with a storage of its own",
            )
        if view not in self._arrays:  # names that share a tensor share an array
            numbers = self._of(view.storage)
            steps = tuple(stride * numbers.itemsize for stride in view.stride)
            window = np.lib.stride_tricks.as_strided(numbers[view.offset :], view.shape, steps, writeable=False)
            self._arrays[view] = checked_values(here, window)
        return self._arrays[view]

    def _of(self, storage: Storage) -> Array:
        if storage not in self._numbers:
            if storage.home is None:
                place = self._places[storage.key]
                content = self._read(place.offset, place.size)
            else:
                content, place = np.frombuffer(storage.home, np.uint8), _Place(0, len(storage.home), None)
            found = 0
            for piece in pieces(content) if place.checksum is not None else ():
                found = zlib.crc32(piece, found)
            if found != (place.checksum or 0):
                raise refusal(f"{self.what}: storage {storage.key} is damaged", "the bytes that were written")
            numbers = content.view(storage.dtype)
            self._numbers[storage] = _swapped(numbers) if place.big_endian else numbers
        return self._numbers[storage]


def pickled(content: bytes, what: str) -> Any:
    """What bytes of ``pickle.dumps`` hold, as `Files.tree` has it; what a call would have made is a `Foreign`.

    Raises:
        CheckpointError: the bytes are no such pickle.
    """
    reader: Pickle = object.__new__(Pickle)
    reader.what, reader.size, reader._places = what, len(content), {}
    reader._arrays, reader._numbers, reader._given = {}, {}, 0
    reader._plain = False
    try:
        reader.program = walk(io.BytesIO(content), what, lambda inner: _nested(inner, what))
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise refusal(f"{what}: not readable as a pickle: {repr(error)[:200]}", "a pickle of tensors") from error
    return reader.tree()


def _nested(content: bytes, what: str) -> Storage:
    """The storage that these bytes of torch.save hold, with its numbers."""
    if not content.startswith(LEGACY):
        raise refusal(f"{what}: a storage that is no file of torch.save's old format", "one of those")
    program, places = _open_legacy(io.BytesIO(content), len(content), what, plain=True)
    storage = program.result
    if not isinstance(storage, Storage):
        raise refusal(f"{what}: a {type(storage).__name__} where a storage should be", "a storage")
    place = places[storage.key]
    return replace(storage, home=content[place.offset : place.offset + place.size])


def main_member(archive: zipfile.ZipFile) -> str | None:
    """The member of a zip archive that holds the program, or None if torch.save did not write it."""
    found = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    return found[0] if len(found) == 1 else None


def _open_zip(stream: BinaryIO, size: int, what: str, plain: bool) -> tuple[Program, Mapping[str, _Place]]:
    """The program of a torch.save archive, and where its storages lie."""
    with opened_zip(stream, what) as archive:
        members = archive.infolist()
        if len({member.filename for member in members}) != len(members):
            raise refusal(f"{what}: an archive of {len(members)} members", "every member with its own name")
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise refusal(
                    f"{what}: {short(member.filename)} is {member.file_size} bytes out of {member.compress_size}",
                    "members that are stored, as torch.save does",
                )
        if sum(member.file_size for member in members) > size:
            raise refusal(f"{what}: members that overlap", "every member in its own place")
        main = main_member(archive)
        if main is None:
            raise refusal(f"{what}: a zip archive of other things", "a file that torch.save wrote")
        root = main.removesuffix("data.pkl")
        if archive.getinfo(main).file_size > LIMIT:
            raise ValueError(f"a program of more than {LIMIT} bytes")
        program = walk(io.BytesIO(archive.read(main)), what, plain=plain)
        names = set(archive.namelist())
        big = f"{root}byteorder" in names and archive.read(f"{root}byteorder").strip() == b"big"
        places = {}
        for storage in program.storages.values():
            member = archive.getinfo(f"{root}data/{storage.key}")
            if member.file_size != storage.count * storage.dtype.itemsize:
                raise refusal(
                    f"{what}: storage {storage.key} has {member.file_size} bytes",
                    f"{storage.count} elements of {storage.dtype.name}, as the program says",
                )
            places[storage.key] = _Place(data_of(stream, member), member.file_size, member.CRC, big)
    return program, places


def _open_legacy(stream: BinaryIO, size: int, what: str, plain: bool) -> tuple[Program, Mapping[str, _Place]]:
    """A file of torch < 1.6: five pickles (magic, protocol, system, object, keys of storages), then the storages."""
    _, protocol, system = (walk(stream, what, plain=True) for _ in range(3))
    program = walk(stream, what, plain=plain)
    keys = walk(stream, what, plain=True)
    if protocol.result != 1001 or system.result.get("little_endian") is not True:
        raise refusal(f"{what}: protocol {short(protocol.result)}", "protocol 1001, little-endian")
    storages = program.storages
    if not all(isinstance(key, str) for key in keys.result) or sorted(keys.result) != sorted(storages):
        raise refusal(f"{what}: data of the storages {short(keys.result)}", f"data of {short(sorted(storages))}")
    places = {}
    for key in keys.result:
        count = int.from_bytes(stream.read(8), "little")
        stored, left = count * storages[key].dtype.itemsize, size - stream.tell()
        if count != storages[key].count or stored > left:
            raise refusal(
                f"{what}: storage {key} has {count} elements, and {left} bytes follow",
                f"{storages[key].count} elements of {storages[key].dtype.name}, all of them there",
            )
        places[key] = _Place(stream.tell(), stored, None)
        stream.seek(stored, io.SEEK_CUR)
    if stream.tell() != size:
        raise refusal(f"{what}: {size - stream.tell()} bytes behind its last storage", "none")
    return program, places


def _named(program: Program, what: str) -> dict[str, View]:
    """The tensors that a program makes, if it makes nothing else."""
    claimed = program.result
    if isinstance(claimed, View):
        claimed = {"": claimed}
    if not isinstance(claimed, dict):
        raise refusal(f"{what}: a pickled {type(claimed).__name__}", "one dictionary of tensors, or one tensor")
    others = [f"{short(name)}: {type(v).__name__}" for name, v in claimed.items() if not isinstance(v, View)]
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
    return cast("dict[str, View]", claimed)


def _check(view: View, here: str, size: int) -> None:
    """Refuse a tensor that does not lie within its storage, every element in a place of its own."""
    storage = view.storage
    available = size if 0 in view.shape else storage.count * storage.dtype.itemsize
    checked_bytes(here, storage.dtype, view.shape, available)
    reach = 1
    for stride, length in sorted(zip(view.stride, view.shape, strict=True)):
        if 0 not in view.shape and length > 1:
            if stride < reach:
                raise refusal(
                    f"{here}: strides {short(view.stride)} for shape {short(view.shape)}",
                    "every element in its own place",
                )
            reach += stride * (length - 1)
    if view.offset + reach > storage.count and 0 not in view.shape:
        raise refusal(
            f"{here} reaches to element {view.offset + reach}", f"the {storage.count} elements that its storage has"
        )


def _unfolded(value: Any, stored: Callable[[View, str], Stored], what: str) -> Any:
    """The value with `Stored` in the place of views. What stands in several places is unfolded once."""
    done: dict[int, Any] = {}

    def below(path: str, name: str | int) -> str:
        """A path for messages: one name may be as long as the file, and stand at the front of all others."""
        name = name[:80] if isinstance(name, str) else str(name)
        return f"{path}.{name}" if path else name

    def of(node: Any, path: str, depth: int) -> Any:
        if isinstance(node, (dict, list, tuple, Foreign, View)) and id(node) in done:
            return done[id(node)]
        if depth > DEPTH:
            raise refusal(f"{what}: a pickle nested too deeply", f"at most {DEPTH} levels")
        made: Any
        if isinstance(node, View):
            made = stored(node, f"tensor {short(path)}")
        elif isinstance(node, dict):
            made = {name: of(child, below(path, name), depth + 1) for name, child in node.items()}
        elif isinstance(node, (list, tuple)):
            made = [of(child, below(path, number), depth + 1) for number, child in enumerate(node)]
        elif isinstance(node, Foreign):
            made = Foreign(node.name, of(node.arguments, path, depth + 1), of(node.state, path, depth + 1))
        elif isinstance(node, Global):
            made = Foreign(node.name)
        elif isinstance(node, Storage):
            made = Foreign("torch storage")
        else:
            made = node
        done[id(node)] = made
        return made

    return of(value, "", 0)


def _swapped(numbers: Array) -> Array:
    if numbers.dtype == BFLOAT16:
        return numbers.view(np.uint16).byteswap().view(BFLOAT16)
    return numbers.byteswap()
