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

import hostile_bytes
import hostile_checkpoints
import numpy as np
import torch
from hostile_rows import Evil, Row, at, json_of, saved, sparse, zipped_again
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
                expected = ANSWERS.get((one.format, attack), "CheckpointError")
                yield Row(one.format, f"{attack} in {target}", spoilt(one, target, made), one, expected)
        for file in one.files:
            if file.endswith(".json") and file != "softbridge.json" and file != main_file(one):
                for attack in DEEP:
                    name, others = f"{attack} in {file}", "nested" if attack == "nested lists" else "other"
                    keys = [(one.format, name), (one.format, file), (one.format, others)]
                    expected = next((ANSWERS[key] for key in keys if key in ANSWERS), "CheckpointError")
                    yield Row(one.format, name, spoilt(one, file, DEEP[attack]), one, expected)


def main_file(one: Specimen) -> str:
    """The largest that a reader reads: not what lies beside it for people, nor the manifest."""
    beside = ("softbridge.json", "README.md")
    return max(one.files, key=lambda name: (name not in beside, len(one.files[name]), name))


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
        changed = zipped_again(content, lambda name, inner: b"\xff" * 8 + inner[8:] if "/data/" in name else inner)
        return changed if b"/data/" in content else None
    if content.startswith(b"\x93NUMPY") or content[8:9] == b"{":
        return content[:-8] + b"\xff" * 8
    return None


def without_end() -> bytes:
    return b""


#: Of a description, in every format. As large as may be, in one reader: `hostile_checkpoints`.
DEEP_SIZE = 2**18
DEEP: dict[str, Callable[[], bytes]] = {
    "nested lists": lambda: b'{"a": ' + b"[" * (DEEP_SIZE // 2) + b"]" * (DEEP_SIZE // 2) + b"}",
    "many lists": lambda: b'{"a": [' + b"[]," * (DEEP_SIZE // 3) + b"0]}",
    "many keys": lambda: json_of({f"{n:06x}": 0 for n in range(DEEP_SIZE // 13)}),
}
#: Where another answer is right. A description that says nothing leaves the base model unknown, which is no defect of
#: the file; what a format does not read, it does not judge; and padding at the end of a tar file is nobody's.
ANSWERS = {
    **{(form, "other"): "BaseModelError" for form in ("chatglm", "ptuning-v2", "prefixtuning", "ptuning-fewshot")},
    ("chatglm", "pytorch_model.bin.index.json"): "accepted",
    ("ptuning-fewshot", "many lists in wrapper_config.json"): "accepted",
    ("ptuning-fewshot", "many keys in wrapper_config.json"): "accepted",
    ("ptuning-fewshot", "template.json"): "CheckpointError",
    ("opendelta", "other"): "accepted",
    **{(f"openprompt:{where}", "template.json"): "accepted" for where in ("after-first-token", "before-sequence")},
    ("nemo", "all but the last byte"): "accepted",
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
    "nested lists": lambda content: DEEP["nested lists"],
}


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def rows() -> Iterator[Row]:
    """The corpus."""
    yield from of_a_kind()
    yield from of_a_format()
    for group in (*hostile_bytes.ALL, *hostile_checkpoints.ALL):
        yield from group()


#: Words in the names of rows that take long to make or to read.
SLOW = (
    "8 MB",
    "40 MB",
    "256 MB",
    "000 ",
    "one storage",
    "one long",
    "one hash",
    "many",
    "without end",
    "million",
    "deep",
)


def is_quick(row: Row) -> bool:
    """Whether `make test` reads it. What is a test of its own in ``bridge/test_untrusted_*.py`` it has read there."""
    once = (f"{row.kind}: as it is", "an archive of torch that calls", "a terabyte")
    if isinstance(row.reader, Specimen) and row.make.__qualname__.startswith(("Specimen", "spoilt")):
        return any(word in row.name for word in once)
    tested = row.reader in ("tensors", "array", "json", "yaml", "inside") or row.reader == "load"
    if row.reader == "base" and not row.name.startswith("gpt2"):  # transformers reads each, slowly
        return False
    return not tested and not any(word in row.name for word in SLOW)


Index = list[tuple[str, str, str, Any, str]]


def make(folder: Path, wanted: Callable[[Row], bool]) -> Index:
    """Make the files of the rows that are wanted: kind, name, path, reader (a format with its geometry), answer."""
    index: Index = []
    for row in filter(wanted, rows()):
        place = folder / str(len(index))
        place.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two members of one name
            path = row.make(place)
        reader = row.reader if isinstance(row.reader, str) else (row.reader.format, row.reader.geometry)
        index.append((row.kind, row.name, str(path), reader, row.expected))
    return index


def main() -> None:
    """Make the files of all rows, or of those with one of the words in their kind or name."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    index = make(folder, lambda row: not words or any(word in f"{row.kind}: {row.name}" for word in words))
    (folder / "index.pickle").write_bytes(pickle.dumps(index))


if __name__ == "__main__":
    main()
