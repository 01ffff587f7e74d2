"""States that flax serialises: msgpack with one extension of its own, an array.

The structure is read by the library ``msgpack``, an extra of ours, which runs nothing; what an array claims is checked
here. Followed: flax/serialization.py (``msgpack_serialize``): extension 1 is an array and 3 a scalar, each the msgpack
of (shape, name of the dtype, bytes).
"""

from __future__ import annotations

import math
from typing import Any, BinaryIO

import numpy as np

from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge.untrusted.claims import DTYPES, checked_bytes, checked_values, is_size, refusal, short
from softbridge.untrusted.pickles import Stored

_BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}
_ARRAY, _SCALAR = 1, 3
#: States have dictionaries only; what is listed in them is a shape. A list is allocated as it is announced.
_LONGEST_LIST = 64
_PIECE = 2**20


def begins_msgpack(start: bytes) -> bool:
    """Whether a file that begins so is a msgpack dictionary with at least one entry, the first under a text.

    No text in UTF-8 begins so: it has no first byte of 80 to BF, and none of 00 to 7F behind one of C0 or more.
    """
    if 0x81 <= start[0] <= 0x8F:
        key = start[1]
    elif start[0] == 0xDE and start[1] < 0x80:
        key = start[3]
    else:
        return False
    return 0xA0 < key < 0xC0 or key in (0xD9, 0xDA)


def flax_state(stream: BinaryIO, size: int, what: str) -> Any:
    """Dictionaries, nested, with `Stored` for arrays; complex numbers and other extensions are None.

    Raises:
        CheckpointError: the content is no such state, or ``msgpack`` is not installed.
    """
    try:
        import msgpack
    except ImportError as error:
        raise refusal(
            f"{what}: a msgpack file, and the library that reads these is not installed",
            "the library msgpack",
            "pip install 'softbridge[msgpack]'",
        ) from error

    def extension(code: int, data: bytes) -> Stored | None:
        if code not in (_ARRAY, _SCALAR):
            return None
        shape, name, numbers = msgpack.unpackb(data, raw=True, use_list=True, max_array_len=_LONGEST_LIST)
        if not all(map(is_size, shape)) or not isinstance(numbers, bytes):
            raise ValueError(f"an array described as {short((shape, name))}")
        return _stored(tuple(shape), _BY_NAME[name.decode("ascii")], numbers, what)

    try:
        # Piece by piece: where the state ends, only reading it tells.
        reader = msgpack.Unpacker(
            stream, read_size=min(size, _PIECE), max_buffer_size=size, ext_hook=extension, max_array_len=_LONGEST_LIST
        )
        state = reader.unpack()
        if reader.tell() != size:
            raise ValueError(f"{size - reader.tell()} bytes behind its end")
        return state
    except CheckpointError:
        raise
    except Exception as error:  # hostile bytes end in ValueError, KeyError, TypeError, RecursionError, ...
        raise refusal(f"{what}: not readable as a state of flax: {repr(error)[:200]}", "a whole state") from error


def _stored(shape: tuple[int, ...], dtype: np.dtype[Any], numbers: bytes, what: str) -> Stored:
    here = f"{what}: array {short(shape)} of {dtype.name}"
    if checked_bytes(here, dtype, shape, len(numbers)) != len(numbers):
        raise refusal(f"{here} in {len(numbers)} bytes", "as many bytes as the shape needs")

    def read() -> Array:
        return checked_values(here, np.frombuffer(numbers, dtype, math.prod(shape)).reshape(shape))

    return Stored(dtype, shape, "an array", read)
