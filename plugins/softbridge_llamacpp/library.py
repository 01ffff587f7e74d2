"""What serving needs of llama.cpp: a model, a cache for several sequences, saved states, and a decoded batch."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.errors import EngineError
from softbridge_llamacpp.functions import functions

#: Words of llama.cpp that are kept for an error, in lines.
_KEPT = 20
#: ggml's levels of what is logged, from warnings on: `enum ggml_log_level`.
_LOUD = (3, 4)
_CONTINUED = 5


@dataclass(frozen=True)
class Row:
    """A token of a batch.

    Attributes:
        sequence: which it belongs to.
        position: where it stands there.
        token: its id.
        wanted: whether logits are wanted behind it.
    """

    sequence: int
    position: int
    token: int
    wanted: bool


@dataclass(frozen=True)
class Cache:
    """How a context holds keys and values.

    Attributes:
        keys: ggml's number of the type of keys.
        values: of values.
        transposed: whether values are transposed, which is to run without flash attention.
        unified: whether all sequences share one stream of cells.
    """

    keys: int = 0
    values: int = 0
    transposed: bool = False
    unified: bool = True


class Context:
    """A cache, and what runs on it. Sequences are numbered from 0."""

    def __init__(self, lib: Any, model: Any, pointer: Any, log: deque[str]) -> None:
        self._lib, self._pointer, self._log = lib, pointer, log
        self._memory = lib.llama_get_memory(pointer)
        self._vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def restore(self, path: Path, sequence: int, most: int) -> int:
        """Load a saved state, and return how many tokens it holds.

        Args:
            most: how many tokens the file may have.

        Raises:
            EngineError: llama.cpp refuses the file.
        """
        self._log.clear()
        tokens, count = (ctypes.c_int32 * max(most, 1))(), ctypes.c_size_t(0)
        read = self._lib.llama_state_seq_load_file(
            self._pointer, str(path).encode(), sequence, tokens, most, ctypes.byref(count)
        )
        if read == 0:
            raise EngineError(
                f"llama.cpp refuses {path.name}: {self._said()}",
                "the state of a sequence of this model, for a cache like this one",
                "write it again for this base model; --dtype and --encoding say for which cache, and which release",
            )
        return self.length(sequence)

    def save(self, path: Path, sequence: int, tokens: Sequence[int]) -> None:
        """Save the state of a sequence, with the tokens that left it.

        Raises:
            EngineError: llama.cpp does not write the file.
        """
        given = (ctypes.c_int32 * max(len(tokens), 1))(*tokens)
        if not self._lib.llama_state_seq_save_file(self._pointer, str(path).encode(), sequence, given, len(tokens)):
            raise EngineError(f"llama.cpp writes no {path.name}: {self._said()}", "a file", "check the folder")

    def length(self, sequence: int) -> int:
        """How many tokens of a sequence the cache holds, if they stand at 0, 1, ...; else -1."""
        first = self._lib.llama_memory_seq_pos_min(self._memory, sequence)
        last = self._lib.llama_memory_seq_pos_max(self._memory, sequence)
        return int(last) + 1 if first in (0, -1) else -1

    def decode(self, rows: Sequence[Row]) -> Array:
        """Logits [W, V] behind the W rows that want them, float32.

        Raises:
            EngineError: llama.cpp cannot run the batch.
        """
        self._log.clear()
        batch = self._lib.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for n, row in enumerate(rows):
                batch.token[n], batch.pos[n] = row.token, row.position
                batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, row.sequence, row.wanted
            code = self._lib.llama_decode(self._pointer, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise EngineError(
                f"llama.cpp cannot run a batch of {len(rows)} tokens ({code}): {self._said()}",
                "a batch that its cache has room for",
                "ask for shorter texts, or fewer at once",
            )
        found = [self._logits(n) for n, row in enumerate(rows) if row.wanted]
        return np.stack(found) if found else np.empty((0, self._vocabulary), np.float32)

    def _logits(self, row: int) -> Array:
        numbers = self._lib.llama_get_logits_ith(self._pointer, row)
        return np.array(np.ctypeslib.as_array(numbers, (self._vocabulary,)))

    def _said(self) -> str:
        return "; ".join(line.strip() for line in self._log if line.strip()) or "it does not say why"


class Model:
    """A base model that llama.cpp has loaded."""

    def __init__(self, lib: Any, pointer: Any, log: deque[str]) -> None:
        self._lib, self._pointer, self._log = lib, pointer, log

    @contextmanager
    def context(self, sequences: int, cells: int, step: int, cache: Cache, threads: int) -> Iterator[Context]:
        """A cache for so many sequences, of so many tokens together.

        Args:
            step: how many tokens a batch has at the most.

        Raises:
            EngineError: llama.cpp has no such cache for this model.
        """
        self._log.clear()
        settings = self._lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = cells, sequences
        settings.n_batch, settings.n_ubatch = step, min(step, 512)
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k, settings.type_v = cache.keys, cache.values
        settings.flash_attn_type = 0 if cache.transposed else 1
        settings.kv_unified, settings.no_perf = cache.unified, True
        pointer = self._lib.llama_init_from_model(self._pointer, settings)
        if not pointer:
            raise EngineError(
                f"llama.cpp makes no context of {cells} tokens: {'; '.join(self._log)}"[:400],
                "a cache that it can hold",
                "ask for shorter texts, or fewer at once",
            )
        try:
            yield Context(self._lib, self._pointer, pointer, self._log)
        finally:
            self._lib.llama_free(pointer)


@contextmanager
def loaded(path: Path) -> Iterator[Model]:
    """Load a model's file for the length of a block. Its warnings go into errors, and nothing is printed.

    Raises:
        EngineError: the library or the file cannot be loaded.
    """
    lib = functions()
    log: deque[str] = deque(maxlen=_KEPT)
    loud = False

    def note(level: int, text: Any, _: Any) -> None:
        nonlocal loud
        loud = loud if level == _CONTINUED else level in _LOUD
        if loud:
            log.append((text or b"").decode("utf-8", "replace"))

    callback = lib.llama_log_callback(note)  # must live as long as it is set
    lib.llama_log_set(callback, None)
    try:
        lib.llama_backend_init()
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0  # kernels of other devices do not compute in float32
        pointer = lib.llama_model_load_from_file(str(path).encode(), settings)
        if not pointer:
            raise EngineError(
                f"llama.cpp does not load {path.name}: {'; '.join(log)}"[:400],
                "a file of a model that it knows",
                "see above",
            )
        try:
            yield Model(lib, pointer, log)
        finally:
            lib.llama_model_free(pointer)
    finally:
        lib.llama_log_set(_silent(lib), None)


def _silent(lib: Any) -> Any:
    """A callback that outlives the block: a library that logs to an object that is gone would crash."""
    if id(lib) not in _CALLBACKS:
        _CALLBACKS[id(lib)] = lib.llama_log_callback(lambda level, text, _: None)
    return _CALLBACKS[id(lib)]


_CALLBACKS: dict[int, Any] = {}
