"""A row of the corpus of hostile files, and what its makers share."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from specimens import Specimen

Make = Callable[[Path], Path]
#: What a file that was executed leaves in the current folder.
MARKER = "executed"


class Evil:
    """Leaves the marker when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"echo executed > {MARKER}",)


@dataclass(frozen=True)
class Row:
    """A hostile file, or one that only looks so.

    Attributes:
        kind: of file, or the format.
        name: what is wrong with it.
        make: makes it in a folder, and returns the path to read.
        reader: which reader gets it: a name in `corpus.READERS`, or the specimen whose format and base model it has.
        expected: the error's class, or 'accepted'.
    """

    kind: str
    name: str
    make: Callable[[Path], Path]
    reader: str | Specimen
    expected: str = "CheckpointError"


def json_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def saved(obj: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(obj, stream, **options)
    return stream.getvalue()


def zipped_again(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """A zip archive with its members changed, and checksums that fit."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for member in old.infolist():
            new.writestr(zipfile.ZipInfo(member.filename), change(member.filename, old.read(member)))
    return stream.getvalue()


def sparse(path: Path, start: bytes, size: int = 2**40) -> Path:
    """A file of which the disk holds the start alone."""
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)
    return path


MANY = 2000
#: As many bytes of a description as are read at all.
MOST = 8 * 2**20
#: Multiples of it have one hash.
PRIME = 2**61 - 1
HUGE = 10**12


def at(name: str, make: Callable[[], bytes]) -> Make:
    """One file of that name."""

    def made(folder: Path) -> Path:
        (folder / name).write_bytes(make())
        return folder / name

    return made


def folder_of(files: Mapping[str, bytes | None]) -> Make:
    """A folder of these files; None: a terabyte, of which the disk holds nothing."""

    def made(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            sparse(folder / name, b"") if content is None else (folder / name).write_bytes(content)
        return folder

    return made


def folder_of_later(files: Mapping[str, bytes], name: str, make: Callable[[], bytes]) -> Make:
    return lambda folder: folder_of({**files, name: make()})(folder)
