"""Hostile pickles, archives and arrays, one by one: each found something once, or might."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_rows import (
    HUGE,
    MANY,
    MOST,
    PRIME,
    Evil,
    Make,
    Row,
    at,
    folder_of,
    folder_of_later,
    json_of,
    saved,
    sparse,
    zipped_again,
)
from specimens import specimens

from softbridge.checkpoint.manifest import MANIFEST
from softbridge.untrusted import npy_bytes

# --- pickles ----------------------------------------------------------------------------------------------------------


def program(body: bytes, protocol: int = 2) -> bytes:
    """An archive of torch.save with this program."""
    head = b"\x80" + bytes([protocol])
    return zipped_again(
        saved({"a": torch.ones(2)}), lambda name, inner: head + body if name.endswith("data.pkl") else inner
    )


def text(content: str) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return (b"\x8a" + bytes([len(raw)]) if len(raw) < 256 else b"\x8b" + struct.pack("<I", len(raw))) + raw


def sharing(views: bool = False, count: int = MANY) -> list[torch.Tensor]:
    """Tensors that share one storage of 4 MB."""
    whole = torch.arange(2.0**20).reshape(1024, 1024) / 2**20
    return [whole[n % 8 :] if views else whole for n in range(count)]


def old_program(body: bytes) -> bytes:
    """A file of torch < 1.6 with this program."""
    old = saved({}, _use_new_zipfile_serialization=False)
    place = old.index(b"\x80\x02}q\x00.", 60)
    return old[:place] + b"\x80\x02" + body + old[place + 6 :]


PICKLES: dict[str, Callable[[], bytes]] = {
    "8 MB of dictionaries": lambda: program(b"](" + b"}" * (MOST - 10) + b"e."),
    "8 MB of nested lists": lambda: program(b"]" * (MOST // 2 - 4) + b"a" * (MOST // 2 - 5) + b"."),
    "8 MB of numbers": lambda: program(b"](" + b"K\1" * (MOST // 2 - 5) + b"e."),
    "40 MB of program": lambda: program(b"}0" * (20 * 2**20) + b"}."),
    "old file: 8 MB of dictionaries": lambda: old_program(b"](" + b"}" * (MOST - 10) + b"e."),
    "old file: a name without end": lambda: old_program(b"c" + b"a" * (2 * MOST)),
    "a text that claims 4 GB": lambda: program(b"X\xff\xff\xff\xffabc."),
    "old file: a text that claims 4 GB": lambda: old_program(b"X\xff\xff\xff\xffabc."),
    "bytes that claim 2**62": lambda: program(b"\x8e" + struct.pack("<Q", 2**62) + b"abc.", 4),
    "a number of 20,000,000 digits": lambda: program(b"]" + number(1 << (8 * 2**20 - 200)) + b"a."),
    "a call of many arguments": lambda: program(
        b"](" + b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"K\1" * 70_000 + b"tR" + b"e."
    ),
    "calls of one long list of arguments": lambda: program(
        b"]("
        + b"("
        + b"K\1" * 70_000
        + b"tq\0"
        + b"ctorch._utils\n_rebuild_tensor_v2\nq\1"
        + b"h\1h\0R" * 3_000
        + b"e."
    ),
    "a name that is a nest of tuples": lambda: program(b")q\0" + b"h\0h\0\x86q\0" * 60 + b"\x8c\1a\x93.", 4),
    "names made of one long text": lambda: program(
        text("a" * 4 * 2**20) + b"q\0" + b"h\0\x8c\1a\x930" * 400_000 + b".", 4
    ),
    "bytes made of one long text": lambda: program(
        b"c_codecs\nencode\nq\0" + text("a" * 4 * 2**20) + text("latin1") + b"\x86q\1](" + b"h\0h\1R" * 400_000 + b"e."
    ),
    "names of one hash": lambda: program(b"}(" + b"".join(number(n * PRIME) + b"N" for n in range(1, 200_000)) + b"u."),
    "windows of one hash": lambda: windows(),
    "a long name in front of many": lambda: program(b"}" + text("a" * 4 * 2**20) + b"](" + b"]" * 400_000 + b"es."),
    "a storage of a long number": lambda: program(
        b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("1" * 2**20) + text("cpu") + b"K\1tQ."
    ),
    "a list that holds itself": lambda: program(b"]q\0h\0a."),
    "nested 70 deep": lambda: program(b"]" * 70 + b"a" * 69 + b"."),
}


#: What a walk that makes nothing can take as it is: it ends soon, and holds nothing.
HARMLESS = (
    "a call of many arguments",
    "calls of one long list of arguments",
    "names of one hash",
    "a long name in front of many",
)


def windows() -> bytes:
    """Windows on a storage at places that are all different, and all have one hash."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\2tQq\0"
    one = b"h\1(h\0%bK\1\x85K\1\x85\x89N" + b"tR"
    all_of_them = b"".join(one % number(n * PRIME) for n in range(1, 50_000))
    return program(b"ctorch._utils\n_rebuild_tensor_v2\nq\1" + storage + b"](" + all_of_them + b"e.")


def of_pickles() -> Iterator[Row]:
    for name, make in PICKLES.items():
        yield Row("pickle", name, at("file", make), "tensors")
        expected = "accepted" if name in HARMLESS else "CheckpointError"
        yield Row("pickle", f"{name}, as a tree", at("file", make), "tree", expected)
    yield Row(
        "pickle", "2,000 names of one storage, described", at("file", lambda: saved(sharing())), "tree", "accepted"
    )
    for views in (False, True):
        what = f"{MANY} {'windows on' if views else 'names of'} one storage"
        for name, (file, shared) in SHARED.items():
            one = specimens()[name]
            described = {
                other: inner for other, inner in one.files.items() if other.endswith(".json") and other != MANIFEST
            }
            made = folder_of_later(described, file, lambda shared=shared, views=views: saved(shared(sharing(views))))
            yield Row(one.format, what, made, one)


def litgpt(tensors: list[torch.Tensor]) -> dict[str, Any]:
    stem = "transformer.h.{}.attn."
    made = {stem.format(n) + "adapter_wte.weight": one for n, one in enumerate(tensors)}
    return {"model": made | {stem.format(n) + "gating_factor": torch.ones(1, 4, 1, 1) for n in range(len(tensors))}}


def cartridges(tensors: list[torch.Tensor]) -> dict[str, Any]:
    """A cache of as many layers."""
    cut = [one[: len(one) // 128 * 128].reshape(1, 8, -1, 128) for one in tensors]
    return {"trainable_keys": cut, "trainable_values": cut}


#: Specimen -> its file, and what tensors that share a storage are in it.
SHARED: dict[str, tuple[str, Callable[[list[torch.Tensor]], Any]]] = {
    "peft prefix": ("adapter_model.bin", lambda tensors: {str(n): one for n, one in enumerate(tensors)}),
    "adapterhub prefix": ("pytorch_adapter.bin", lambda tensors: {f"a.{n}": one for n, one in enumerate(tensors)}),
    "textual-inversion bin": ("learned_embeds.bin", lambda tensors: {f"<{n}>": one for n, one in enumerate(tensors)}),
    "cartridges": ("cache_last.pt", cartridges),
    "litgpt in a checkpoint": ("lit_model.pth", litgpt),
}


# --- archives ---------------------------------------------------------------------------------------------------------


def zipped(members: Mapping[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return stream.getvalue()


def kobold(tensor: bytes, kind: int = zipfile.ZIP_LZMA) -> bytes:
    """A soft prompt of KoboldAI's with this array."""
    return zipped({"tensor.npy": tensor, "meta.json": b'{"name": "a"}'}, kind)


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


def reaching_far() -> bytes:
    """LZMA that wants to look back 4 GB."""
    content = kobold(npy_bytes(np.ones((5, 32), np.float32)))
    place = content.index(b"tensor.npy") + len("tensor.npy") + 4
    return content[: place + 1] + b"\xff\xff\xff\xff" + content[place + 5 :]


def growing(kind: int) -> bytes:
    """A member of 256 MB that says that it has as many bytes as may be."""
    packed: bytes
    if kind == zipfile.ZIP_LZMA:
        filters = [{"id": lzma.FILTER_LZMA1, "preset": 0}]
        machine = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
        packed = b"\x09\x04\x05\x00\x5d\x00\x00\x04\x00" + b"".join(machine.compress(bytes(2**24)) for _ in range(16))
        packed += machine.flush()
    else:
        import bz2

        squeezer = bz2.BZ2Compressor()
        packed = b"".join(squeezer.compress(bytes(2**24)) for _ in range(16)) + squeezer.flush()
    content = zipped({"tensor.npy": packed, "meta.json": b'{"name": "a"}'})
    size, claimed = struct.pack("<II", len(packed), len(packed)), struct.pack("<II", len(packed), 2**24)
    content = patched(content, size, claimed)  # in both headers
    method = struct.pack("<H", kind)
    begun = content.index(b"PK\1\2")
    content = content[:8] + method + content[10:]
    return content[: begun + 10] + method + content[begun + 12 :]


def directory(members: int) -> bytes:
    """A zip archive of so many names of one empty member."""
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    names = b"".join(entry + b"%06x" % n for n in range(members))
    return (
        local
        + names
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, members & 0xFFFF, members & 0xFFFF, len(names), len(local), 0)
    )


def with_hole(folder: Path) -> Path:
    """A zip archive with a terabyte between its members."""
    content = kobold(npy_bytes(np.ones((5, 32), np.float32)))
    path, place = folder / "tale.zip", content.index(b"PK\1\2")
    with path.open("wb") as stream:
        stream.write(content[:place])
        stream.seek(2**40)
        end = content.rindex(b"PK\5\6")
        where = struct.pack("<I", 0xFFFFFFFF)
        stream.write(content[place : end + 16] + where + content[end + 20 :])
    return path


def overlapping() -> bytes:
    """Two names of one member."""
    content = zipped({"aa": bytes(2**20), "bb": bytes(2**20)})
    second = content.index(b"PK\1\2", content.index(b"PK\1\2") + 4)
    first_size = content.index(b"PK\3\4", 10)
    cut = content[:first_size] + content[content.index(b"PK\1\2") :]
    second -= len(content) - len(cut)
    end = cut.rindex(b"PK\5\6")
    cut = cut[: second + 42] + struct.pack("<I", 0) + cut[second + 46 :]
    return cut[: end + 16] + struct.pack("<I", first_size) + cut[end + 20 :]


ARCHIVES: dict[str, tuple[str, Make]] = {
    "a directory of a million members": ("tale.zip", at("tale.zip", lambda: directory(10**6))),
    "a directory of 60,000 members": ("tale.zip", at("tale.zip", lambda: directory(60_000))),
    "LZMA that reaches 4 GB back": ("tale.zip", at("tale.zip", reaching_far)),
    "LZMA that grows to 256 MB": ("tale.zip", at("tale.zip", lambda: growing(zipfile.ZIP_LZMA))),
    "bzip2 that grows to 256 MB": ("tale.zip", at("tale.zip", lambda: growing(zipfile.ZIP_BZIP2))),
    "a terabyte between its members": ("tale.zip", with_hole),
    "two names of one member": ("tale.zip", at("tale.zip", overlapping)),
    "an array of objects": ("tale.zip", at("tale.zip", lambda: kobold(np_objects()))),
    "an array that claims 4 TB": (
        "tale.zip",
        at("tale.zip", lambda: kobold(patched(npy_bytes(np.ones((5, 32), np.float32)), b"(5, 32)", b"(2**40)"[:7]))),
    ),
}


def np_objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    return stream.getvalue()


def of_archives() -> Iterator[Row]:
    kobolds = specimens()["koboldai"]
    for name, (_, make) in ARCHIVES.items():
        harmless = name in ("LZMA that reaches 4 GB back",)
        yield Row("koboldai", name, make, kobolds, "accepted" if harmless else "CheckpointError")
    torn = saved({"a": torch.ones(2)})
    yield Row("pickle", "a torch archive with a terabyte behind it", lambda f: sparse(f / "file", torn), "tensors")
    old = saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    yield Row("pickle", "an old file with a terabyte behind it", lambda f: sparse(f / "file", old), "tensors")


# --- arrays and states of JAX -----------------------------------------------------------------------------------------


def msgpack_head(kind: bytes) -> bytes:
    return b"\x81\xa6target" + kind


MSGPACK: dict[str, Callable[[], bytes]] = {
    "nested a million deep": lambda: b"\x81\xa1a" * 10**6 + b"\xc0",
    "a dictionary that claims 2**32 entries": lambda: msgpack_head(b"\xdf\xff\xff\xff\xff"),
    "a list that claims 2**32": lambda: msgpack_head(b"\xdd\xff\xff\xff\xff"),
    "bytes that claim 4 GB": lambda: msgpack_head(b"\xc6\xff\xff\xff\xff"),
    "an array that claims 4 GB": lambda: msgpack_head(b"\xc9\xff\xff\xff\xff\x01"),
    "8 MB of dictionaries": lambda: msgpack_head(
        b"\xdf"
        + struct.pack(">I", 2**20)
        + b"".join(b"\xa4" + struct.pack(">I", n).hex().encode()[-4:] + b"\x80" for n in range(2**20))
    ),
    "an array with a shape of texts": lambda: msgpack_head(ext(b"\x93\x91\xa1a\xa7float32\xc4\x04abcd")),
    "an array of 2**62": lambda: msgpack_head(
        ext(b"\x93\x91\xcf" + struct.pack(">Q", 2**62) + b"\xa7float32\xc4\x04abcd")
    ),
    "an array of complex numbers": lambda: msgpack_head(ext(b"\x93\x91\x01\xa9complex64\xc4\x08abcdefgh")),
    "cut off": lambda: msgpack_head(b"\x82\xa1a"),
}


def ext(content: bytes) -> bytes:
    return b"\xc7" + bytes([len(content), 1]) + content


def zarr(**changes: Any) -> dict[str, Any]:
    described = {"zarr_format": 2, "shape": [5, 32], "chunks": [5, 32], "dtype": "<f4", "order": "C", "filters": None}
    return {**described, "compressor": None, "fill_value": None, "dimension_separator": ".", **changes}


def of_jax() -> Iterator[Row]:
    google = specimens()["google flax"]
    for name, make in MSGPACK.items():
        yield Row("google", f"msgpack: {name}", at("checkpoint", make), google)
    state = google.files["checkpoint"]
    yield Row("google", "msgpack: a terabyte behind it", lambda f: sparse(f / "checkpoint", state), google)
    numbers = np.ones((5, 32), np.float32).tobytes()
    inside = f"{'target.encoder.prompt.prompt.prompt'}/"

    def folder(described: dict[str, Any], chunk: bytes | None = numbers) -> Make:
        return folder_of({inside + ".zarray": json_of(described), inside + "0.0": chunk})

    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packed.compress(bytes(2**27)) + packed.flush()
    gzip = {"compressor": {"id": "gzip", "level": 1}}
    yield Row("google", "zarr: as it is", folder(zarr()), google, "accepted")
    for name, make in {
        "a chunk of a terabyte": folder(zarr(), None),
        "a chunk of a terabyte in gzip": folder(zarr(**gzip), None),
        "a chunk that grows": folder(zarr(**gzip), bomb),
        "a shape of 2**40": folder(zarr(shape=[2**40, 32], chunks=[2**40, 32])),
        "chunks of 2**40": folder(zarr(chunks=[2**40, 32])),
        "a trillion chunks": folder(zarr(shape=[HUGE, 32], chunks=[1, 32])),
        "a shape of 0": folder(zarr(shape=[0, 32])),
        "an object's dtype": folder(zarr(dtype="|O")),
        "a list as dtype": folder(zarr(dtype=[["a", "<f4"]])),
        "Fortran's order": folder(zarr(order="F")),
        "a filter": folder(zarr(filters=[{"id": "pickle"}])),
        "a number of 4,000 digits as shape": folder(zarr(shape=[10**4000, 32])),
        "no number": folder(zarr(), b"\xff" * 640),
    }.items():
        yield Row("google", f"zarr: {name}", make, google)
    npy = npy_bytes(np.ones((5, 32), np.float32))
    yield Row(
        "google",
        "an array with a terabyte behind it",
        lambda f: sparse(f / "prompt.npy", npy),
        specimens()["google npy"],
    )


ALL = (of_pickles, of_archives, of_jax)
