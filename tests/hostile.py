"""The corpus of hostile files: what each is, how it is made, and the error that its reader owes.

Three kinds of rows. The tables of ``bridge/test_untrusted_*.py``: one file of a kind, which a reader of bytes gets.
Attacks on every format: the files of a valid checkpoint, one of them spoilt. And single files that reach further in.
``python tests/hostile.py FOLDER`` makes the files, with what to do with each in ``index.pickle``; `corpus.py` reads
them, in processes that have never seen what made them.
"""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_more import MORE
from hostile_rows import Evil, Row, json_of, saved, sparse, zipped_again
from specimens import HERE, Specimen, loaded, specimens

#: The file that a format's attacks spoil is the one with its numbers: the largest of these kinds.
NUMBERS = ("pickle", "safetensors", "npy", "zip", "tar", "gzip", "msgpack", "json", "unknown")


# --- the tables of files of one kind ----------------------------------------------------------------------------------


def of_a_kind() -> Iterator[Row]:
    """The rows of the tests of `softbridge.untrusted`."""
    hostile, archives = (loaded(HERE / "bridge" / f"test_untrusted_{name}.py") for name in ("hostile", "archives"))
    for kind, reader, table in (
        ("safetensors", "tensors", hostile.SAFETENSORS),
        ("pickle", "tensors", hostile.PICKLES),
        ("npy", "array", hostile.NPY),
        ("JSON", "json", hostile.JSON),
        ("YAML", "yaml", archives.YAML),
        ("archive", "inside", [(name, make, words) for name, (make, words) in archives.HOSTILE.items()]),
    ):
        for name, content, _ in table:
            yield Row(kind, name, at("file", content if callable(content) else lambda content=content: content), reader)


def at(name: str, make: Callable[[], bytes]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        (folder / name).write_bytes(make())
        return folder / name

    return made


# --- every format -----------------------------------------------------------------------------------------------------


def of_a_format() -> Iterator[Row]:
    """For each format a valid file, which it reads, and attacks on it, which it refuses."""
    done = set()
    for name, one in specimens().items():
        yield Row(one.format, f"{name}: as it is", one.laid, one, "accepted" if one.prompt else "BaseModelError")
        if one.format in done or one.prompt is None:
            continue
        done.add(one.format)
        for attack, change in ATTACKS.items():
            target = main_file(one)
            if (made := change(one.files[target])) is not None:
                yield Row(one.format, f"{attack} in {target}", spoilt(one, target, made), one)
        for file in one.files:
            if file.endswith(".json") and file != "softbridge.json" and file != main_file(one):
                for attack in DEEP:
                    yield Row(one.format, f"{attack} in {file}", spoilt(one, file, DEEP[attack]), one)


def main_file(one: Specimen) -> str:
    return max(one.files, key=lambda name: (name != "softbridge.json", len(one.files[name])))


def spoilt(one: Specimen, name: str, content: Callable[[], bytes] | bytes) -> Callable[[Path], Path]:
    """The files of a checkpoint, without the manifest, which would notice any change, one of them another."""

    def made(folder: Path) -> Path:
        files = {file: old for file, old in one.files.items() if file != "softbridge.json"}
        path = one.laid(folder, files | {name: content() if callable(content) else content})
        if content is without_end:
            sparse(folder / name, one.files[name])
        return path

    return made


def with_nan(content: bytes) -> bytes | None:
    """The file with the first of its numbers none, where its kind is plain enough to say where that is."""
    if content.startswith(b"PK\3\4"):
        return zipped_again(content, lambda name, inner: b"\xff" * 8 + inner[8:] if "/data/" in name else inner)
    if content.startswith(b"\x93NUMPY") or content[8:9] == b"{":
        return content[:-8] + b"\xff" * 8
    return None


def without_end() -> bytes:
    return b""


DEEP: dict[str, Callable[[], bytes]] = {
    "8 MB of nested lists": lambda: b'{"a": ' + b"[" * (4 * 2**20 - 8) + b"]" * (4 * 2**20 - 8) + b"}",
    "8 MB of lists": lambda: b'{"a": [' + b"[]," * (8 * 2**20 // 3 - 8) + b"0]}",
    "8 MB of keys": lambda: json_of({f"{n:06x}": 0 for n in range(8 * 2**20 // 13)}),
}
ATTACKS: dict[str, Callable[[bytes], Any]] = {
    "the first half": lambda content: content[: len(content) // 2],
    "all but the last byte": lambda content: content[:-1],
    "nothing": lambda content: b"",
    "a pickle that calls": lambda content: pickle.dumps(Evil(), 2),
    "an archive of torch that calls": lambda content: saved({"a": Evil(), "b": torch.ones(2)}),
    "an old file of torch that calls": lambda content: saved([Evil()], _use_new_zipfile_serialization=False),
    "an array of objects": lambda content: objects(),
    "no number": with_nan,
    "a terabyte, sparse": lambda content: without_end,
    "8 MB of nested lists": lambda content: DEEP["8 MB of nested lists"],
}


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def rows() -> Iterator[Row]:
    """The corpus."""
    yield from of_a_kind()
    yield from of_a_format()
    yield from MORE


def main() -> None:
    """Make all files."""
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    index = []
    for number, row in enumerate(rows()):
        if only and not any(word in f"{row.kind}: {row.name}" for word in only):
            continue
        place = folder / str(number)
        place.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two members of one name
            path = row.make(place)
        one = row.reader if isinstance(row.reader, str) else (row.reader.format, row.reader.geometry)
        index.append((row.kind, row.name, str(path), one, row.expected))
    (folder / "index.pickle").write_bytes(pickle.dumps(index))


if __name__ == "__main__":
    main()
