"""A checkpoint on the disk, and what kind each of its files is: the door that every reader of a format goes through."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from softbridge.arrays import Array
from softbridge.untrusted.claims import LIMIT, checked_values, parse_json, refusal, short
from softbridge.untrusted.headers import NPY, Range, npy_header, safetensors_header
from softbridge.untrusted.pickles import ZIP, load_pickle, main_member, open_pickle

Kind = Literal["safetensors", "pickle", "npy", "json", "unknown"]


class Files:
    """A checkpoint as it lies on the disk: one file, or a folder with its files and those one folder below.

    A link is followed only within the folder, or from a snapshot in the hub's cache to the cache's own store.

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
                raise refusal(
                    f"'{self.path}' is neither a file nor a folder", "a checkpoint", "check the spelling of the path"
                )
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise refusal(
                f"'{self.path}' cannot be opened: {error}", "a checkpoint", "check the path and its permissions"
            ) from error
        self.names = tuple(sorted(self._files))

    def without(self, names: Collection[str]) -> Files:
        """The same without the files of these names, in whatever folder."""
        others = object.__new__(Files)
        others.path, others.is_file = self.path, self.is_file
        others._files = {name: real for name, real in self._files.items() if name.rpartition("/")[2] not in names}
        others.names = tuple(name for name in self.names if name in others._files)
        return others

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[BinaryIO, int, str]]:
        """A file's stream, its size, and what to call it in an error."""
        if name not in self._files:
            raise refusal(
                f"'{self.path}' has no file {short(name)}; it has {short(list(self.names))}",
                f"a file {short(name)}",
                "check that the checkpoint is complete and of the format that was asked for",
            )
        what = str(self._files[name]) if self.is_file else str(self.path / name)
        try:
            with open(self._files[name], "rb") as stream:
                yield stream, os.fstat(stream.fileno()).st_size, what
        except OSError as error:
            raise refusal(f"{what}: cannot be read: {error}", "a readable file", "check its permissions") from error

    def kind(self, name: str) -> Kind:
        """What the file is, by its first bytes."""
        with self._open(name) as (stream, size, _):
            start = stream.read(64)
            # First, because the length of a header can begin like a pickle: 640 is 80 02.
            if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
                return "safetensors"
            if start.startswith(NPY):
                return "npy"
            if start.startswith(ZIP):
                stream.seek(0)
                try:
                    with zipfile.ZipFile(stream) as archive:
                        return "pickle" if main_member(archive) else "unknown"
                except Exception:  # zipfile raises seven kinds of exception on malformed archives
                    return "unknown"
            if start.startswith(b"\x80"):
                return "pickle"
            return "json" if start.lstrip()[:1] == b"{" else "unknown"

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; see `parse_json`."""
        with self._open(name) as (stream, _, what):
            return parse_json(stream.read(LIMIT + 1), what)

    def text(self, name: str) -> str:
        """The beginning of a text file, up to `LIMIT` bytes; what is no UTF-8 in it is replaced."""
        with self._open(name) as (stream, _, _what):
            return stream.read(LIMIT).decode("utf-8", "replace")

    def tensors(self, name: str) -> dict[str, Array]:
        """Every tensor of a safetensors file or one that torch.save wrote, checked; a bare tensor is named ''."""
        kind = self.kind(name)
        with self._open(name) as (stream, size, what):
            if kind == "safetensors":
                data, ranges, _ = safetensors_header(stream, size, what)
                content = _whole(stream, size - data, what)
                return {
                    key: checked_values(f"{what}: tensor {short(key)}", r.array(content)) for key, r in ranges.items()
                }
            if kind == "pickle":
                return load_pickle(stream.read(size), what)
        raise refusal(f"{what}: its content is {_describe(kind)}", "a safetensors file, or one that torch.save wrote")

    def array(self, name: str) -> Array:
        """The array of an .npy file, in native byte order. Never a pickle."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "npy", what)
            dtype, shape, fortran = npy_header(stream, size, what)
            length = size - stream.tell()
            content = _whole(stream, length, what)
            array = Range(dtype, shape[::-1] if fortran else shape, 0, length).array(content)
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
                views = open_pickle(stream.read(size), what)[1]
                return {key: (view.storage.dtype.name, view.shape) for key, view in views.items()}
        raise refusal(f"{what}: its content is {_describe(kind)}", "a file of tensors")

    def metadata(self, name: str) -> dict[str, str]:
        """What a safetensors file says of itself."""
        with self._open(name) as (stream, size, what):
            self._expect(name, "safetensors", what)
            return safetensors_header(stream, size, what)[2]

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
            raise refusal(f"{what}: its content is {_describe(found)}", f"content of the kind {kind}")


def _whole(stream: BinaryIO, length: int, what: str) -> bytes:
    content = stream.read(length)
    if len(content) != length:
        raise refusal(
            f"{what}: the file shrank while it was read", "a file that no other program is writing", "try again"
        )
    return content


def _describe(kind: Kind) -> str:
    return "of no known kind, or cut off at its beginning or end" if kind == "unknown" else f"of the kind {kind}"


def _listed(root: Path) -> Iterator[tuple[str, Path]]:
    """Name -> real path of the regular files in a folder and one level below."""
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
        elif real is not None and real.is_dir() and os.access(real, os.R_OK | os.X_OK):
            for below in path.iterdir():
                deeper = inside(below)
                if deeper is not None and deeper.is_file():
                    yield f"{path.name}/{below.name}", deeper
