"""A checkpoint on the disk, and what kind each of its files is: the door that every reader of a format goes through."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from softbridge.arrays import Array
from softbridge.mapped import Mapped
from softbridge.untrusted.archives import GZIP, LOCAL, USTAR, members_of, opened_zip
from softbridge.untrusted.claims import LIMIT, checked_values, parse_json, parse_yaml, refusal, short
from softbridge.untrusted.flax_state import begins_msgpack, flax_state
from softbridge.untrusted.headers import NPY, Range, npy_header, safetensors_header
from softbridge.untrusted.pickles import Pickle, Stored, main_member
from softbridge.untrusted.streamed import Digest, Stamp, Written, stamp_of
from softbridge.untrusted.zarr_array import DESCRIPTION, zarr_array

#: Bytes of JSON in all files of one checkpoint that are looked at.
DESCRIBED = 2 * LIMIT
Kind = Literal["safetensors", "pickle", "npy", "json", "zip", "tar", "gzip", "msgpack", "unknown"]


class Files:
    """A checkpoint as it lies on the disk: one file, or a folder with its files and those one folder below.

    Hidden folders are not looked into: what a killed process was writing, a repository's own, a downloader's.
    A link is followed only within the folder, or from a snapshot in the hub's cache to the cache's own store.

    Args:
        below: whether the files one folder below are listed, too.
        written: what is known of these files, which this process has just written, and nobody else knows of. Their
            tensors are windows on them: see `Mapped`.

    Attributes:
        path: as given.
        is_file: whether the path is one file; `names` is then its own name alone.
        names: the files, sorted; those in a sub-folder as ``sub/name``.

    Raises:
        CheckpointError: the path does not exist. All methods raise it, too, where a file is malformed.
    """

    path: Path
    is_file: bool
    names: tuple[str, ...]

    def __init__(self, path: str | Path, *, below: bool = True, written: Mapping[str, Written] | None = None) -> None:
        self.path = Path(path)
        try:
            root = Path(os.path.realpath(self.path))
            self.is_file = root.is_file()
            if self.is_file:
                self._files: dict[str, Path | Callable[[], bytes]] = {self.path.name: root}
            elif root.is_dir():
                self._files = dict(_listed(root, below))
            else:
                raise refusal(
                    f"'{self.path}' is neither a file nor a folder", "a checkpoint", "check the spelling of the path"
                )
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise refusal(
                f"'{self.path}' cannot be opened: {error}", "a checkpoint", "check the path and its permissions"
            ) from error
        self.names = tuple(sorted(self._files))
        self._trees: dict[str, Any] = {}
        self._kinds: dict[str, Kind] = {}
        self._read: set[str] = set()
        self._own = written is not None
        known = {} if written is None else written
        self._digests: dict[str, tuple[Stamp | None, Callable[[], str]]] = {
            name: (one.stamp, partial(str, one.sha256)) for name, one in known.items()
        }
        self._described: Counter[str] = Counter()  # name -> bytes of JSON

    @contextmanager
    def reading(self) -> Iterator[set[str]]:
        """The names of the files that are read while the block runs; to look at what kind one is, is not to read it."""
        self._read.clear()
        yield self._read

    def without(self, names: Collection[str]) -> Files:
        """The same without the files of these names, in whatever folder."""
        others = object.__new__(Files)
        others.path, others.is_file, others._trees = self.path, self.is_file, self._trees
        others._kinds, others._read, others._own = self._kinds, self._read, self._own
        others._digests, others._described = self._digests, self._described
        others._files = {name: real for name, real in self._files.items() if name.rpartition("/")[2] not in names}
        others.names = tuple(name for name in self.names if name in others._files)
        return others

    def inside(self, name: str) -> Files:
        """The files in an archive: a zip file, a tar file, or one in gzip. What is used is read into memory."""
        kind = self.kind(name)
        with self._open(name) as (_, _, what):
            place = self._files[name]
            if kind not in ("zip", "tar", "gzip") or not isinstance(place, Path):
                raise refusal(f"{what}: its content is {_describe(kind)}", "an archive of files: zip or tar")
            members = members_of(place, kind, what)
        within = object.__new__(Files)
        within.path, within.is_file, within._trees = self.path / name if not self.is_file else self.path, False, {}
        within._kinds, within._read, within._own = {}, set(), False
        within._digests, within._described = {}, self._described
        within._files = dict(members)
        within.names = tuple(sorted(members))
        return within

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, int, str]]:
        """A file's stream, its size, and what to call it in an error, to read what it holds."""
        with self._stream(name) as opened:
            self._read.add(name)
            yield opened

    @contextmanager
    def _stream(self, name: str) -> Iterator[tuple[BinaryIO, int, str]]:
        if name not in self._files:
            raise refusal(
                f"'{self.path}' has no file {short(name)}; it has {short(list(self.names))}",
                f"a file {short(name)}",
                "check that the checkpoint is complete and of the format that was asked for",
            )
        what = str(self.path) if self.is_file else str(self.path / name)
        try:
            with self._reopen(name)() as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(0)
                yield stream, size, what
        except OSError as error:
            raise refusal(f"{what}: cannot be read: {error}", "a readable file", "check its permissions") from error
        except MemoryError as error:  # it may be all there, and still be too much
            raise refusal(
                f"{what}: more than there is room for in memory", "a file of the size of a prompt", "check what it is"
            ) from error

    def kind(self, name: str) -> Kind:
        """What the file is, by its first bytes."""
        if name not in self._kinds:
            self._kinds[name] = self._look(name)
        return self._kinds[name]

    def _look(self, name: str) -> Kind:
        with self._stream(name) as (stream, size, what):
            start = stream.read(512)
            # First, because the length of a header can begin like a pickle: 640 is 80 02.
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
                return "safetensors"
            if start.startswith(NPY):
                return "npy"
            if start.startswith(LOCAL):
                try:
                    with opened_zip(stream, what) as archive:
                        return "pickle" if main_member(archive) else "zip"
                except Exception:  # zipfile raises seven kinds of exception on malformed archives
                    return "unknown"
            if start.startswith(b"\x80"):
                return "pickle"
            if start[USTAR] == b"ustar":
                return "tar"
            if start.startswith(GZIP):
                return "gzip"
            if len(start) > 3 and begins_msgpack(start):
                return "msgpack"
            return "json" if start.lstrip()[:1] == b"{" else "unknown"

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; see `parse_json`. In all files together it is bounded, too: see `DESCRIBED`."""
        with self._open(name) as (stream, size, what):
            if what not in self._described:
                cost = min(max(size, 1024), LIMIT)  # to open one costs something, too
                if self._described.total() + cost > DESCRIBED:
                    raise refusal(
                        f"{self.path}: more than {DESCRIBED} bytes of JSON, in over {len(self._described)} files",
                        "descriptions of one checkpoint",
                        "give the folder of one adapter",
                    )
                self._described[what] = cost
            return parse_json(stream.read(LIMIT + 1), what)

    def yaml(self, name: str) -> dict[str, Any]:
        """The YAML mapping in a file; see `parse_yaml`."""
        with self._open(name) as (stream, _, what):
            return parse_yaml(stream.read(LIMIT + 1), what)

    def text(self, name: str) -> str:
        """The beginning of a text file, up to `LIMIT` bytes; what is no UTF-8 in it is replaced.

        A longer one is looked at only, and not among the files that were read: these are digested whole.
        """
        with self._stream(name) as (stream, size, _what):
            if size <= LIMIT:
                self._read.add(name)
            return stream.read(LIMIT).decode("utf-8", "replace")

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A file and its size, to read what has a form of its toolkit's own. Its size is a claim like any other."""
        with self._open(name) as (stream, size, _what):
            yield stream, size

    def begins(self, name: str, start: bytes) -> bool:
        """Whether a file begins with these bytes. Like `kind`, this looks at a file and does not read it."""
        with self._stream(name) as (stream, _, _what):
            return stream.read(len(start)) == start

    def tensors(self, name: str) -> dict[str, Array]:
        """Every tensor of a safetensors file or one that torch.save wrote, checked; a bare tensor is named ''."""
        kind = self.kind(name)
        with self._open(name) as (stream, size, what):
            if kind == "safetensors":
                data, ranges, _ = safetensors_header(stream, size, what)
                content = self._rest(name, stream, data, size, what)
                return {
                    key: checked_values(f"{what}: tensor {short(key)}", r.array(content)) for key, r in ranges.items()
                }
            if kind == "pickle":
                plain = self._pickle(name, stream, size, what, plain=True).plain()
                return {key: tensor.array() for key, tensor in plain.items()}
        raise refusal(f"{what}: its content is {_describe(kind)}", "a safetensors file, or one that torch.save wrote")

    def tree(self, name: str) -> Any:
        """Everything in a file of tensors, with `Stored` in the place of each: nothing is read but what is used.

        A safetensors file is a dictionary, a state of flax (msgpack) one of dictionaries, an .npy file one tensor. What
        torch.save wrote may be dictionaries and lists, nested (a tuple is a list here), texts and numbers; objects of
        all other kinds are `Foreign`: their names, and the data that would have made them. Nothing is executed,
        whatever the file holds.
        """
        if name not in self._trees:
            kind = self.kind(name)
            with self._open(name) as (stream, size, what):
                if kind == "pickle":
                    self._trees[name] = self._pickle(name, stream, size, what, plain=False).tree()
                elif kind == "safetensors":
                    begin, ranges, _ = safetensors_header(stream, size, what)
                    self._trees[name] = {key: self._part(name, begin, key, r) for key, r in ranges.items()}
                elif kind == "npy":
                    dtype, shape, _ = npy_header(stream, size, what)
                    self._trees[name] = Stored(dtype.newbyteorder("="), shape, "the array", lambda: self.array(name))
                elif kind == "msgpack":
                    self._trees[name] = flax_state(stream, size, what)
                else:
                    raise refusal(f"{what}: its content is {_describe(kind)}", "a file of tensors")
        self._read.add(name)  # now, or when somebody asked for it before
        return self._trees[name]

    def zarr(self, description: str) -> Stored:
        """The array of a folder of zarr's, of which this file is the ``.zarray``; its chunks are read when it is."""
        folder = description.removesuffix(DESCRIPTION)

        chunks = {
            name.removeprefix(folder): partial(self._open, name) for name in self.names if name.startswith(folder)
        }
        chunks.pop(DESCRIPTION, None)
        return zarr_array(self.json(description), chunks, f"{self.path}: {folder or 'the array'}")

    def _part(self, name: str, begin: int, key: str, place: Range) -> Stored:
        """A tensor of a safetensors file."""

        def read() -> Array:
            with self._open(name) as (stream, _, what):
                content = self._bytes(stream, begin + place.begin, place.end - place.begin, what)
            alone = Range(place.dtype, place.shape, 0, len(content))
            return checked_values(f"{what}: tensor {short(key)}", alone.array(content))

        return Stored(place.dtype, place.shape, f"tensor {short(key)}", read)

    def _pickle(self, name: str, stream: BinaryIO, size: int, what: str, *, plain: bool) -> Pickle:
        def read(begin: int, length: int) -> Array:
            with self._stream(name) as (again, _, _):
                return self._bytes(again, begin, length, what)

        return Pickle(stream, size, what, read, plain=plain)

    def _bytes(self, stream: BinaryIO, begin: int, length: int, what: str) -> Array:
        """So many bytes of a file, from `begin` on: [N], read-only. There is one copy of them, or none of our own."""
        end = begin + length
        # Elsewhere a file that is mapped cannot be moved to its place.
        if self._own and os.name == "posix" and length and os.fstat(stream.fileno()).st_size >= end:
            return np.frombuffer(Mapped.of(stream.fileno(), end), np.uint8)[begin:]
        stream.seek(begin)
        content = stream.read(length)
        if len(content) != length:
            raise refusal(
                f"{what}: the file shrank while it was read", "a file that no other program is writing", "try again"
            )
        return np.frombuffer(content, np.uint8)

    def _rest(self, name: str, stream: BinaryIO, begin: int, size: int, what: str) -> Array:
        """All bytes of a file from `begin` on. While they are looked at they are digested, for `digest` to know."""
        if self._own or not isinstance(self._files[name], Path):
            return self._bytes(stream, begin, size - begin, what)
        before = stamp_of(stream.fileno())
        stream.seek(0)
        start = stream.read(begin)
        content = self._bytes(stream, begin, size - begin, what)
        if stamp_of(stream.fileno()) == before:
            digest = Digest()
            digest.update(start)
            digest.update(content)
            self._digests[name] = before, digest.hexdigest
        return content

    def _reopen(self, name: str) -> Callable[[], BinaryIO]:
        place = self._files[name]
        return (lambda: place.open("rb")) if isinstance(place, Path) else (lambda: io.BytesIO(place()))

    def array(self, name: str) -> Array:
        """The array of an .npy file, in native byte order. Never a pickle."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "npy", what)
            dtype, shape, fortran = npy_header(stream, size, what)
            begin = stream.tell()
            content = self._rest(name, stream, begin, size, what)
            array = Range(dtype, shape[::-1] if fortran else shape, 0, len(content)).array(content)
            array = array.T if fortran else array
            return checked_values(what, array.astype(array.dtype.newbyteorder("="), copy=False))

    def header(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (NumPy's name of the dtype, shape), without reading values. Needs no torch."""
        kind = self.kind(name)
        with self._open(name) as (stream, size, what):
            if kind == "safetensors":
                ranges = safetensors_header(stream, size, what)[1]
                return {key: (r.dtype.name, r.shape) for key, r in ranges.items()}
            if kind == "npy":
                dtype, shape, _ = npy_header(stream, size, what)
                return {"": (dtype.name, shape)}
            if kind == "pickle":
                plain = self._pickle(name, stream, size, what, plain=True).plain()
                return {key: (tensor.dtype.name, tensor.shape) for key, tensor in plain.items()}
        raise refusal(f"{what}: its content is {_describe(kind)}", "a file of tensors")

    def metadata(self, name: str) -> dict[str, str]:
        """What a safetensors file says of itself."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "safetensors", what)
            return safetensors_header(stream, size, what)[2]

    def digest(self, name: str) -> str:
        """sha256 of the file, hexadecimal. A file that is still the same is read for it once."""
        place = self._files.get(name)
        with self._stream(name) as (stream, _, _what):
            stamp = stamp_of(stream.fileno()) if isinstance(place, Path) else None
            if stamp is None or name not in self._digests or self._digests[name][0] != stamp:
                state = hashlib.sha256()
                while block := stream.read(2**20):
                    state.update(block)
                self._digests[name] = stamp, state.hexdigest
        return self._digests[name][1]()

    def _expect(self, name: str, kind: Kind, what: str) -> None:
        found = self.kind(name)
        if found != kind:
            raise refusal(f"{what}: its content is {_describe(found)}", f"content of the kind {kind}")


def _describe(kind: Kind) -> str:
    return "of no known kind, or cut off at its beginning or end" if kind == "unknown" else f"of the kind {kind}"


def _listed(root: Path, deep: bool) -> Iterator[tuple[str, Path]]:
    """Name -> real path of the regular files in a folder and, if `deep`, one level below."""
    # A snapshot, or a folder in one.
    snapshot = next((path for path in (root, root.parent) if path.parent.name == "snapshots"), None)
    stores = (root,) if snapshot is None else (root, snapshot.parent.parent / "blobs")

    def inside(path: Path) -> Path | None:
        real = Path(os.path.realpath(path))  # unlike Path.resolve, lets a loop of links be
        return real if any(real.is_relative_to(store) for store in stores) else None

    for path in root.iterdir():
        real = inside(path)
        if real is not None and real.is_file():
            yield path.name, real
        elif deep and real is not None and not path.name.startswith(".") and _listable(real):
            for below in path.iterdir():
                deeper = inside(below)
                if deeper is not None and deeper.is_file():
                    yield f"{path.name}/{below.name}", deeper


def _listable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
