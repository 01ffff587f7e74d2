"""The bytes that softbridge writes: the same for the same content, in every process and on every machine."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Collection, Mapping
from typing import IO, Any, cast

import numpy as np

from softbridge.arrays import BFLOAT16, Array, pieces, torch_window
from softbridge.errors import OutputError
from softbridge.untrusted.claims import DTYPE_CODES, STORAGES, is_safe_name, short
from softbridge.untrusted.streamed import Sink, Streamed


def little_endian(name: str, array: Array, dtypes: Collection[np.dtype[Any]] = DTYPE_CODES) -> Array:
    """The array, little-endian, in whatever order: a copy only where the processor or the array is another.

    Raises:
        OutputError: its dtype is not one of `dtypes` (by default safetensors'), or no reader would take the name.
    """
    array = np.asarray(array)
    little = array.dtype if array.dtype == BFLOAT16 else array.dtype.newbyteorder("<")
    if little not in dtypes or not is_safe_name(name):
        raise OutputError(
            f"an array of dtype {array.dtype} under the name {short(name)}",
            f"one of {', '.join(dtype.name for dtype in dtypes)}, under a printable, relative name",
            "convert or rename it before saving",
        )
    return array.astype(little, copy=False)


def safetensors_file(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> Streamed:
    """A safetensors file, the same bytes for the same tensors and metadata.

    Laid out as the library does (widest dtype first, then by name; header padded to 8 bytes). Not made by the library,
    because that writes the metadata in an order that changes from call to call.

    Raises:
        OutputError: a tensor that a safetensors file cannot hold.
    """
    plain = {name: little_endian(name, array) for name, array in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}
    order = sorted(plain, key=lambda name: (ranks[plain[name].dtype], name))
    position = 0
    for name in order:
        array = plain[name]
        header[name] = {
            "dtype": DTYPE_CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def put(sink: Sink) -> None:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for piece in pieces(plain[name]):
                sink.write(piece)

    return Streamed(put)


def safetensors_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of `safetensors_file`."""
    return bytes(safetensors_file(tensors, metadata))


def pickle_file(content: Mapping[str, Any]) -> Streamed:
    """What torch.save makes of a dictionary: of tensors, given as arrays, and of plain values, dictionaries and lists.

    Names that hold one array object share one storage.

    Raises:
        OutputError: a tensor that a file of torch.save cannot hold, as it is read here.
    """
    import torch

    made: dict[int, torch.Tensor] = {}

    def of(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: of(one, key) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [of(one, name) for one in value]
        if not isinstance(value, np.ndarray):
            return value
        if id(value) not in made:
            made[id(value)] = torch_window(little_endian(name, value, STORAGES.values()))
        return made[id(value)]

    whole = of(content, "")

    def put(sink: Sink) -> None:
        kept = _Guarded(sink)
        torch.save(whole, cast("IO[bytes]", kept))
        if kept.error is not None:
            raise kept.error

    return Streamed(put)


class _Guarded:
    """A sink whose error is kept: torch.save ends a file that failed, too, and then raises one of its own instead."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.error = sink, cast("BaseException | None", None)

    def write(self, data: Any, /) -> None:
        if self.error is None:
            try:
                self.sink.write(data)
            except BaseException as error:  # an interruption, too
                self.error = error

    def flush(self) -> None:
        """Nothing: whoever made the sink does it."""


def pickle_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of `pickle_file`."""
    return bytes(pickle_file(content))


def zip_bytes(members: Mapping[str, bytes], compressed: Collection[str] = ()) -> bytes:
    """A zip archive without a clock: every member is of 1980. Those named are compressed (LZMA), the others stored."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            kind = zipfile.ZIP_LZMA if name in compressed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return stream.getvalue()


def tensor_bytes(array: Array) -> bytes:
    """What torch.save makes of one tensor."""
    import torch

    stream = io.BytesIO()
    torch.save(torch_window(little_endian("tensor", array, STORAGES.values())), stream)
    return stream.getvalue()


def npy_bytes(array: Array) -> bytes:
    """An .npy file; bfloat16 is stored as V2, as JAX and KoboldAI do."""
    stream = io.BytesIO()
    plain = np.asarray(little_endian("array", array), order="C")
    np.save(stream, plain.view("V2") if plain.dtype == BFLOAT16 else plain, allow_pickle=False)
    return stream.getvalue()


def json_bytes(obj: Any) -> bytes:
    """JSON for people: sorted keys, indented, UTF-8, with a newline at its end."""
    return (json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
