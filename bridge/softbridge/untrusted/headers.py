"""The headers of safetensors and .npy files: where their tensors lie, read without believing a word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np

from softbridge.arrays import BFLOAT16, Array
from softbridge.untrusted.claims import (
    DTYPES,
    LIMIT,
    checked_bytes,
    is_safe_name,
    is_size,
    parse_json,
    refusal,
    short,
)

NPY = b"\x93NUMPY"


@dataclass(frozen=True)
class Range:
    """A tensor in a safetensors file: where its bytes stand, after the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int

    def array(self, data: Array) -> Array:
        """A window on the bytes of a file, [N]."""
        if self.begin == self.end:
            return np.zeros(self.shape, self.dtype)
        return data[self.begin : self.end].view(self.dtype).reshape(self.shape)


def safetensors_header(stream: BinaryIO, size: int, what: str) -> tuple[int, dict[str, Range], dict[str, str]]:
    """Where the data begins, the tensors, and the metadata of a safetensors file of `size` bytes.

    Read here and not by the library because the library passes what we refuse (duplicate keys, names that are paths,
    empty tensors of 2**62 rows), and hands out bfloat16 arrays in its latest versions only. A test holds that we
    accept nothing that the library refuses.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > min(size - 8, LIMIT):
        raise refusal(
            f"{what}: a header of {length} bytes in a file of {size}",
            f"a header within the file, and of at most {LIMIT} bytes",
        )
    header = parse_json(stream.read(length), f"{what}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise refusal(f"{what}: metadata {short(metadata)}", "names and texts")
    data = size - 8 - length
    tensors: dict[str, Range] = {}
    for name, entry in header.items():
        here = f"{what}: tensor {short(name)}"
        if not is_safe_name(name):
            raise refusal(here, "a printable name that does not lead out of a folder")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise refusal(f"{here} is described by {short(entry)}", "dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise refusal(f"{here} has the dtype {short(code)}", f"one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(map(is_size, shape)):
            raise refusal(f"{here} has the shape {short(shape)}", "a list of sizes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
            raise refusal(f"{here} stands at {short(offsets)}", "two offsets")
        begin, end = offsets
        if end - begin != checked_bytes(here, DTYPES[code], shape, data):
            raise refusal(
                f"{here}: shape {short(tuple(shape))} of {code} in {end - begin} bytes",
                "as many bytes as the shape needs",
            )
        tensors[name] = Range(DTYPES[code], tuple(shape), begin, end)
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise refusal(
                f"{what}: tensor {short(name)} begins at {tensor.begin}", f"{position}: no overlap and no hole"
            )
        position = tensor.end
    if position != data:
        raise refusal(f"{what}: {data} bytes of data", f"the {position} bytes that its header describes")
    return 8 + length, tensors, cast("dict[str, str]", metadata)


_NPY_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?)([a-zA-Z]\d{1,2})',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(((?:\s*\d{1,19}\s*,)*\s*(?:\d{1,19}\s*)?)\)\s*,?\s*\}\s*"
)


def npy_header(stream: BinaryIO, size: int, what: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """The dtype as stored, the shape and the order of an .npy file; the stream is left where the data begins.

    The header is a Python literal. It is matched, not evaluated: evaluating a stranger's 65,000 characters can fail in
    more ways than are worth listing.
    """
    start = stream.read(8)
    width = {1: 2, 2: 4}.get(start[6], 0) if len(start) == 8 else 0
    length = int.from_bytes(stream.read(width), "little")
    text = stream.read(length).decode("latin-1") if width and length <= 10_000 else ""  # NumPy's own limit
    match = _NPY_HEADER.fullmatch(text)
    if match is None:
        raise refusal(
            f"{what}: the header {short(text)}", "an .npy header of format 1 or 2 that describes plain numbers"
        )
    order, code, fortran, sizes = match.groups()
    if code == "V2" and order != ">":
        dtype = BFLOAT16  # JAX and NumPy write bfloat16 as 'two bytes of I know not what'; so does KoboldAI
    elif code in {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}:
        dtype = np.dtype((order or "=") + code)
    else:
        raise refusal(f"{what}: the dtype {order + code!r}", "floats, whole numbers, truth values, or bfloat16 as V2")
    shape = tuple(int(text) for text in sizes.split(",") if text.strip())
    data = size - stream.tell()
    if checked_bytes(what, dtype, shape, data) != data:
        raise refusal(
            f"{what}: shape {short(shape)} of {dtype.name} in {data} bytes", "as many bytes as the shape needs"
        )
    return dtype, shape, fortran == "True"
