"""Changes of a valid file: bytes, and what a file of its kind says, which checksums would otherwise hide.

`mutated` is driven by numbers that somebody else picks: hypothesis does in ``bridge/test_untrusted_mutations.py``, and
libFuzzer in ``fuzz.py``.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from specimens import Specimen

from softbridge.checkpoint.manifest import MANIFEST
from softbridge.checkpoint.read import recognise
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError
from softbridge.untrusted import Files

#: A whole number from 0 to below the argument.
Pick = Callable[[int], int]

#: What stands in JSON where something else was expected.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**62, 2**64, 10**12, 10**400, -(10**30), 0.5, -0.0, 1e308, 1e-320),
    *("", "a", "0", "../a", "a\0b", "a" * 300, "\x1b[2J", "ä\U0001f600", "None", "float32", "BF16"),
    *([], {}, [1], ["a"], [[]], {"a": 1}, [{}], [None], {"0": 0}, [1, 2, 3, 4], [0, 2**62]),
)
#: What a byte, or a few, become.
RUNS = (
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"}",
    b"{",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0\0\0\0\x80",
    b"R.",
    b"\x86",
    b"q\0h\0\x86",
)


def mutated(content: bytes, pick: Pick, other: bytes = b"") -> bytes:
    """The content with one change; often one that leaves the kind of file and its checksums whole.

    Args:
        other: another file, of which a piece may be put in.
    """
    kinds = [lambda: _bytes(content, pick, other)]
    for change in (_json, _safetensors, _zip, _tar, _gzip):
        if (made := change(content, pick, other)) is not None:
            kinds += [made] * 3
    return kinds[pick(len(kinds))]()


def _bytes(content: bytes, pick: Pick, other: bytes) -> bytes:
    """Bytes changed, cut off, left out, put in, or taken from another file."""
    # Mostly near the front, where what is claimed stands.
    here = pick(min(len(content), 512) + 1) if pick(2) else pick(len(content) + 1)
    match pick(6):
        case 0:
            return content[:here]
        case 1:
            return content[:here] + bytes([pick(256)]) + content[here + 1 :]
        case 2:
            run = RUNS[pick(len(RUNS))]
            return content[:here] + run + content[here + len(run) :]
        case 3:
            return content[:here] + RUNS[pick(len(RUNS))] + content[here:]
        case 4:
            return content[:here] + content[here + 1 + pick(32) :]
    there = pick(len(other) + 1)
    return content[:here] + other[there : there + 1 + pick(64)] + content[here:]


def _json(content: bytes, pick: Pick, other: bytes) -> Callable[[], bytes] | None:
    if content.lstrip()[:1] != b"{":
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return lambda: json.dumps(_edited(value, pick)).encode()


def _edited(value: Any, pick: Pick) -> Any:
    """JSON with one thing in it another, gone, or added. What is JSON in a text is edited, too."""
    if isinstance(value, (dict, list)) and value and pick(8):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[pick(len(keys))]
        made = dict(value) if isinstance(value, dict) else list(value)
        match pick(8):
            case 0:
                del made[key]
            case 1 if isinstance(made, dict):
                made[str(VALUES[pick(len(VALUES))])[:400]] = made.pop(key)
            case 1:
                made.append(VALUES[pick(len(VALUES))])
            case 2:
                made[key] = made[keys[pick(len(keys))]]
            case _:
                made[key] = _edited(made[key], pick)
        return made
    if isinstance(value, str) and value[:1] == "{" and pick(8):
        try:
            return json.dumps(_edited(json.loads(value), pick))
        except ValueError:
            pass
    if type(value) is int and pick(2):
        return value + (-1, 1, 2**32, -value * 2 - 1)[pick(4)]
    return VALUES[pick(len(VALUES))]


def _safetensors(content: bytes, pick: Pick, other: bytes) -> Callable[[], bytes] | None:
    length = int.from_bytes(content[:8], "little")
    if content[8:9] != b"{" or length > len(content) - 8:
        return None
    header, data = content[8 : 8 + length], content[8 + length :]

    def changed() -> bytes:
        if not pick(4):
            return content[: 8 + length] + _bytes(data, pick, other)
        made = (_json(header, pick, other) or (lambda: _bytes(header, pick, other)))()
        return len(made).to_bytes(8, "little") + made + data

    return changed


def _zip(content: bytes, pick: Pick, other: bytes) -> Callable[[], bytes] | None:
    if not content.startswith(b"PK\3\4"):
        return None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(member.filename, archive.read(member), member.compress_type) for member in archive.infolist()]
    except Exception:  # it is damaged, and for `_bytes`
        return None

    def changed() -> bytes:
        number, stream = pick(len(members)), io.BytesIO()
        if pick(4):  # the program of a pickle, or a description
            number = next((n for n, (name, _, _) in enumerate(members) if name.endswith(("data.pkl", ".json"))), number)
        made = list(members)
        name, inner, kind = made[number]
        made[number] = (name, mutated(inner, pick, other), kind)
        if not pick(16):
            made[number] = (str(VALUES[pick(len(VALUES))])[:400] or "a", inner, kind)
        with zipfile.ZipFile(stream, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two members of one name
            for name, inner, kind in made:
                archive.writestr(zipfile.ZipInfo(name), inner, kind)
        return stream.getvalue()

    return changed if members else None


def _tar(content: bytes, pick: Pick, other: bytes) -> Callable[[], bytes] | None:
    if content[257:262] != b"ustar":
        return None
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [(entry, stream.read()) for entry in archive if (stream := archive.extractfile(entry))]
    except Exception:  # as above
        return None

    def changed() -> bytes:
        number, stream = pick(len(members)), io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for place, (entry, inner) in enumerate(members):
                made = mutated(inner, pick, other) if place == number else inner
                entry.size = len(made)
                archive.addfile(entry, io.BytesIO(made))
        return stream.getvalue()

    return changed if members else None


def _gzip(content: bytes, pick: Pick, other: bytes) -> Callable[[], bytes] | None:
    if not content.startswith(b"\x1f\x8b\x08"):
        return None
    try:
        inner = gzip.decompress(content)
    except Exception:  # as above
        return None
    return lambda: gzip.compress(mutated(inner, pick, other), mtime=0)


# --- what must hold of any change -------------------------------------------------------------------------------------


def altered(specimen: Specimen, pick: Pick, others: Mapping[str, Specimen]) -> dict[str, bytes]:
    """The files of a checkpoint with up to three changes."""
    files = dict(specimen.files)
    other = list(others.values())[pick(len(others))]
    for _ in range(1 + pick(3)):
        name = list(files)[pick(len(files))]
        if len(files) > 1 and not pick(16):
            del files[name]
        else:
            content = list(other.files.values())[pick(len(other.files))]
            files[name] = mutated(files[name], pick, content)
    return files


def hold(specimen: Specimen, files: Mapping[str, bytes]) -> str:
    """Read these files in the place of a specimen's: 'read', or the class of the typed error that refused them.

    Raises:
        AssertionError: what was read is not what it may be, or the error does not say all that it should.
        Exception: any that no reader may raise.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = specimen.laid(Path(folder), files)
        if not path.exists():  # the one file is gone
            return "CheckpointError"
        try:
            recognise(Files(path))
        except SoftbridgeError as error:
            complete(error)
        try:
            prompt = specimen.read(path)
        except (CheckpointError, BaseModelError) as error:
            complete(error)
            return type(error).__name__
    size = sum(map(len, files.values()))
    numbers = [array for _, array in prompt.arrays()]
    made = sum(array.nbytes for array in numbers)
    assert made <= GROWTH * size + 2**20, f"{made} bytes of numbers out of {size}"
    assert all(array.dtype.kind in "iub" or np.isfinite(array).all() for array in numbers)
    # Our own form has a digest of all that it says, and a manifest has those of the files beside it.
    manifest = files.get(MANIFEST)
    if manifest == specimen.files.get(MANIFEST) if manifest is not None else specimen.format == "softbridge":
        assert prompt == specimen.prompt, "another prompt, where a digest should have shown it"
    return "read"


#: By how much a file may grow: a perceptron of P-tuning's and its like is evaluated.
GROWTH = 64


def complete(error: SoftbridgeError) -> None:
    """An error says what was found, what was expected and what to do, in a few lines that any terminal shows."""
    assert all(isinstance(part, str) and part for part in (error.found, error.expected, error.remedy)), repr(error)
    assert len(str(error)) < 4000, f"a message of {len(str(error))} characters"
    str(error).encode("utf-8")
