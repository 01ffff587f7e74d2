"""The bytes of a sequence's state, as `llama_state_seq_save_file` writes them: what a cache holds of one sequence.

After src/llama-context.cpp (`state_seq_save_file`) and src/llama-kv-cache.cpp (`state_write`, `state_write_meta`,
`state_write_data`) of llama.cpp. All numbers are little-endian:

    uint32  magic 0x67677371 ("qsgg" in the file), uint32 version, uint32 N, int32 tokens [N]
    uint32  streams (1 for a unified cache), then for each of them:
      uint32  cells P; a stream of none ends here
      P times int32 position, uint32 1, int32 sequence (which is ignored when it is read)
      uint32  whether values are transposed, uint32 layers L
      uint32  rotation of keys, uint32 of values (0: none): in version 4 alone
      L times int32 type, uint64 bytes of a row, keys [P, K·D]
      then, of values that are not transposed, L times the same
      else L times int32 type, uint32 bytes of a number, uint32 K·D, values [K·D, P]

Version 3 has other cells than version 2 for models that are not among `families`, so that the two differ in their
number only. A library reads its own version and no other. Nothing in a file says for which model it is: what is
compared at loading are layers, types and sizes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from softbridge.arrays import BFLOAT16, Array
from softbridge.errors import CheckpointError
from softbridge.untrusted.claims import checked_values

MAGIC = 0x67677371
#: The newest first.
VERSIONS = (4, 3, 2)
BEGINNING = struct.pack("<I", MAGIC)
#: ggml's number of a type -> dtype.
TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: BFLOAT16}
NUMBERS = {dtype: number for number, dtype in TYPES.items()}
#: The version from which on a file says whether keys and values were rotated, as quantised ones may be.
_ROTATIONS = 4
#: llama.cpp's LLAMA_MAX_SEQ: a cache that is not unified has a stream for each sequence.
MOST_STREAMS = 256
_TO_DO = "save the state again with a cache of f32, f16 or bf16, or get the file again from where it came from"


@dataclass(frozen=True, eq=False)
class State:
    """What a cache holds of one sequence.

    Attributes:
        tokens: that left it there, [N], int32; nothing but whoever loads it reads them.
        keys: of every layer [P, K·D], from position 0 on, in llama.cpp's order of channels.
        values: the same, [P, K·D].
        transposed: whether the cache holds values as [K·D, P], which it does without flash attention.
        version: of the form.
    """

    tokens: Array
    keys: Sequence[Array]
    values: Sequence[Array]
    transposed: bool
    version: int = VERSIONS[0]


def to_bytes(state: State) -> bytes:
    """The file of a state. Keys have one dtype of `TYPES`, and so have values."""
    cells, layers = len(state.keys[0]), len(state.keys)
    tokens = state.tokens.astype("<i4")
    meta = np.stack([np.arange(cells), np.ones(cells), np.zeros(cells)], axis=1).astype("<i4")
    made = [struct.pack("<III", MAGIC, state.version, len(tokens)), tokens.tobytes(), struct.pack("<II", 1, cells)]
    made += [meta.tobytes(), struct.pack("<II", state.transposed, layers)]
    made += [struct.pack("<II", 0, 0)] if state.version >= _ROTATIONS else []
    made += [part for rows in state.keys for part in _rows(rows)]
    for rows in state.values:
        if state.transposed:
            made += [struct.pack("<iII", _number(rows), rows.dtype.itemsize, rows.shape[1]), _packed(rows.T)]
        else:
            made += _rows(rows)
    return b"".join(made)


def _rows(rows: Array) -> list[bytes]:
    return [struct.pack("<iQ", _number(rows), rows.shape[1] * rows.dtype.itemsize), _packed(rows)]


def _number(rows: Array) -> int:
    return NUMBERS[rows.dtype if rows.dtype == BFLOAT16 else rows.dtype.newbyteorder("<")]


def _packed(rows: Array) -> bytes:
    return np.ascontiguousarray(rows, TYPES[_number(rows)]).tobytes()


def read_state(stream: BinaryIO, size: int, what: str) -> State:
    """The state in a file.

    Args:
        stream: the file, open at its beginning.
        size: its length in bytes.
        what: what to call the file in an error.

    Raises:
        CheckpointError: it is malformed, of another version, quantised, or holds other positions than 0, 1, ... P - 1.
    """
    return _Reader(stream, size, what).state()


class _Reader:
    """Takes a file apart from its beginning to its end; nothing is believed that its bytes do not hold."""

    def __init__(self, stream: BinaryIO, size: int, what: str) -> None:
        self.file, self.left, self.what = stream, size, what

    def state(self) -> State:
        magic, version = self.numbers("<II", "its beginning")
        if magic != MAGIC or version not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise self.wrong(
                f"begins with {magic:#010x}, version {version}", f"{MAGIC:#010x}, one of the versions {known}"
            )
        (count,) = self.numbers("<I", "the number of tokens")
        tokens = self.array(np.dtype("<i4"), (count,), "tokens")
        (streams,) = self.numbers("<I", "the number of streams")
        if not 1 <= streams <= MOST_STREAMS:
            raise self.wrong(f"{streams} streams", f"1 to {MOST_STREAMS}")
        found = [
            self.stream(cells, version)
            for _ in range(streams)
            if (cells := self.numbers("<I", "the number of cells")[0])
        ]
        if self.left:
            raise self.wrong(f"{self.left} bytes behind its end", "none")
        if len(found) != 1:
            raise self.wrong(f"cells in {len(found)} streams", "those of one sequence")
        return State(tokens, *found[0], version)

    def stream(self, cells: int, version: int) -> tuple[list[Array], list[Array], bool]:
        meta = self.array(np.dtype("<i4"), (cells, 3), "cells")
        order = np.argsort(meta[:, 0], kind="stable")
        if (meta[order, 0] != np.arange(cells)).any():
            raise self.wrong(
                f"positions from {meta[:, 0].min()} to {meta[:, 0].max()} in {cells} cells",
                "0, 1, ... in each cell one",
            )
        if (meta[:, 1] != 1).any():
            raise self.wrong("cells of several sequences or of none", "those of one sequence")
        form = "<IIII" if version >= _ROTATIONS else "<II"
        transposed, layers, *rotations = self.numbers(form, "what its numbers are")
        if transposed > 1 or not layers or any(rotations):
            raise self.wrong(
                f"transposed: {transposed}, {layers} layers, rotated by {rotations}", "0 or 1, some layers, no rotation"
            )
        keys = [self.rows(cells, f"keys of layer {n}")[order] for n in range(layers)]
        read = self.columns if transposed else self.rows
        values = [read(cells, f"values of layer {n}")[order] for n in range(layers)]
        return keys, values, bool(transposed)

    def rows(self, cells: int, name: str) -> Array:
        """Numbers [P, K·D]."""
        number, size = self.numbers("<iQ", name)
        dtype = self.dtype(number, name)
        if not size or size % dtype.itemsize:
            raise self.wrong(f"{name}: rows of {size} bytes", f"whole numbers of {dtype.itemsize} bytes")
        return self.array(dtype, (cells, size // dtype.itemsize), name)

    def columns(self, cells: int, name: str) -> Array:
        """Numbers [P, K·D], which are stored as [K·D, P]."""
        number, size, width = self.numbers("<iII", name)
        dtype = self.dtype(number, name)
        if size != dtype.itemsize or not width:
            raise self.wrong(f"{name}: {width} numbers of {size} bytes", f"numbers of {dtype.itemsize} bytes")
        return self.array(dtype, (width, cells), name).T

    def numbers(self, form: str, name: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form), name))

    def dtype(self, number: int, name: str) -> np.dtype[Any]:
        if number not in TYPES:
            raise self.wrong(f"{name}: of ggml's type {number}", f"one of {', '.join(map(str, TYPES))}: f32, f16, bf16")
        found: np.dtype[Any] = TYPES[number]
        return found

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> Array:
        size = dtype.itemsize
        for length in shape:  # whole numbers of Python's, which do not overflow
            size *= length
        return checked_values(f"{self.what}: {name}", np.frombuffer(self.take(size, name), dtype).reshape(shape))

    def take(self, size: int, name: str) -> bytes:
        if size > self.left:
            raise self.wrong(f"ends in {name}: {self.left} bytes are left", f"{size} bytes")
        self.left -= size
        return self.file.read(size)

    def wrong(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.what}: {found}", expected, _TO_DO)
