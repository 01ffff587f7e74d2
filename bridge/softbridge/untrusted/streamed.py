"""What a file is to hold, made piece by piece while it is written, and what is known of it once it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any, Protocol, TypeAlias

from softbridge.arrays import PIECE

#: What is shorter is digested sooner than a thread is started.
_ALONE = 2**20

#: Which file it is, and whether it is still the same: device, number, size, time of change.
Stamp: TypeAlias = tuple[int, int, int, int]


class Sink(Protocol):
    """Where bytes go. Whoever writes may use what holds them anew as soon as `write` has returned."""

    def write(self, data: Any, /) -> object: ...


class Streamed:
    """The content of a file that is made while it is written: always the same bytes, as often as it is asked for.

    Args:
        write: writes all of it.
    """

    def __init__(self, write: Callable[[Sink], object]) -> None:
        self._write = write

    def write_to(self, sink: Sink) -> None:
        """Write all of it, piece by piece."""
        self._write(sink)

    def __len__(self) -> int:
        """How many bytes that comes to."""
        counted = _Count()
        self._write(counted)
        return counted.size

    def __bytes__(self) -> bytes:
        """All of it at once."""
        kept = _Kept()
        self._write(kept)
        return b"".join(kept.pieces)


Content: TypeAlias = bytes | Streamed


@dataclass(frozen=True)
class Written:
    """What is known of a file that was written.

    Attributes:
        size: in bytes.
        sha256: hexadecimal.
        stamp: what the file was known by then.
    """

    size: int
    sha256: str
    stamp: Stamp


class Digest:
    """sha256 of what is handed to it, made by a second thread (hashlib lets go of the interpreter)."""

    def __init__(self) -> None:
        self._state = hashlib.sha256()
        self._thread: Thread | None = None

    def update(self, data: Any) -> None:
        """Take these bytes, too. They must stay as they are until `wait`, or the next call."""
        self.wait()
        view = memoryview(data).cast("B")
        if len(view) >= _ALONE:
            thread = Thread(target=self._state.update, args=(view,))
            with suppress(RuntimeError):  # no room for one more, or the interpreter is ending
                thread.start()
                self._thread = thread
                return
        self._state.update(view)

    def wait(self) -> None:
        """Go on when all that was handed over has been looked at."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def hexdigest(self) -> str:
        """Of all that was handed over."""
        self.wait()
        return self._state.hexdigest()


class _Count:
    size = 0

    def write(self, data: Any, /) -> None:
        self.size += memoryview(data).nbytes


class _Kept:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, data: Any, /) -> None:
        self.pieces.append(bytes(data))


class _Digested:
    """A file that is digested while it is written, in pieces that both find in the processor's cache."""

    def __init__(self, file: Sink) -> None:
        self.digest, self._file = Digest(), file

    def write(self, data: Any, /) -> None:
        view = memoryview(data).cast("B")
        for at in range(0, len(view), PIECE):
            piece = view[at : at + PIECE]
            self.digest.update(piece)
            try:
                self._file.write(piece)
            finally:
                self.digest.wait()


def sha256_of(content: Content) -> str:
    """The digest of a file's content, hexadecimal."""
    made = _Digested(_Count())
    _put(content, made)
    return made.digest.hexdigest()


def written(content: Content, path: Any) -> Written:
    """Write a new file, and bring it to the disk.

    Raises:
        OSError: it is there already, or cannot be written.
    """
    with open(path, "xb") as file:
        made = _Digested(file)
        _put(content, made)
        file.flush()
        os.fsync(file.fileno())
        stamp = stamp_of(file.fileno())
    return Written(stamp[2], made.digest.hexdigest(), stamp)


def stamp_of(descriptor: int) -> Stamp:
    """By what an open file is known."""
    about = os.fstat(descriptor)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _put(content: Content, sink: Sink) -> None:
    if isinstance(content, Streamed):
        content.write_to(sink)
    else:
        sink.write(content)
