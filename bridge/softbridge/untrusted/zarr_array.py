"""Arrays that zarr (version 2) keeps in a folder: ``.zarray`` describes one, and each chunk is a file (``0.0``).

Followed: the zarr storage specification, version 2. Read are chunks in C order, plain or in gzip, without filters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import product
from typing import Any, BinaryIO

import numpy as np

from softbridge.arrays import BFLOAT16, Array
from softbridge.untrusted.archives import ALLOWANCE, EXPANSION, inflated
from softbridge.untrusted.claims import DTYPES, checked_values, is_size, refusal, short
from softbridge.untrusted.pickles import Stored

DESCRIPTION = ".zarray"
_BY_CODE = {dtype.str: dtype for dtype in DTYPES.values() if dtype != BFLOAT16} | {"bfloat16": BFLOAT16}


#: Opens a chunk: its stream, its size, and what to call it in an error.
Opened = Callable[[], AbstractContextManager[tuple[BinaryIO, int, str]]]


def zarr_array(described: Mapping[str, Any], chunks: Mapping[str, Opened], what: str) -> Stored:
    """The array of a folder.

    Args:
        described: what its ``.zarray`` says.
        chunks: name -> opens the file, of the others in the folder.
        what: what to call it in an error.

    Raises:
        CheckpointError: it is described otherwise than is read here.
    """
    shape, sizes = described.get("shape"), described.get("chunks")
    dtype = _BY_CODE.get(str(described.get("dtype")))
    packed = described.get("compressor")
    plain = described.get("zarr_format") == 2 and described.get("order") == "C" and not described.get("filters")
    plain &= described.get("dimension_separator", ".") == "."
    known = packed is None or (isinstance(packed, dict) and packed.get("id") == "gzip")
    if (
        dtype is None
        or not (plain and known and isinstance(shape, list) and isinstance(sizes, list))
        or not len(shape) == len(sizes) <= 32
        or not all(is_size(n) and n > 0 for n in (*shape, *sizes))
    ):
        raise refusal(
            f"{what}: described as {short(dict(described))}",
            "zarr 2 of plain numbers, in C order, its chunks plain or in gzip, named 0.0, 0.1, ...",
        )
    counts = [-(-length // size) for length, size in zip(shape, sizes, strict=True)]
    if math.prod(counts) > len(chunks):
        raise refusal(f"{what}: {len(chunks)} chunks", f"the {math.prod(counts)} that it describes")
    length = math.prod(sizes) * dtype.itemsize

    def read() -> Array:
        parts = {}
        for at in product(*map(range, counts)):
            name = ".".join(map(str, at)) or "0"
            if name not in chunks:
                raise refusal(f"{what}: no chunk {name}", "every chunk that it describes")
            with chunks[name]() as (stream, size, _):
                if packed is not None:
                    limit = min(length, EXPANSION * size + ALLOWANCE)
                    content = inflated(stream, limit, f"{what}: chunk {name}")
                else:
                    content = stream.read(length) if size == length else b""
            if len(content) != length:
                raise refusal(f"{what}: chunk {name} of {size} bytes", f"{length}, as described")
            parts[at] = np.frombuffer(content, dtype).reshape(sizes)
        array = np.empty(shape, dtype)  # no more than the chunks that are there
        for at, part in parts.items():
            place = tuple(slice(n * size, (n + 1) * size) for n, size in zip(at, sizes, strict=True))
            array[place] = part[tuple(slice(n) for n in array[place].shape)]
        return checked_values(what, array)

    return Stored(dtype, tuple(shape), what, read)
