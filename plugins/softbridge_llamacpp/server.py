"""llama.cpp as a server: texts continued by its own library, each in a sequence that may begin with a saved state."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.errors import CheckpointError, EngineError, Obstacle, few
from softbridge.geometry import read_geometry
from softbridge.plugin.serving import Answer, Ask, Request
from softbridge_llamacpp import base_file, functions
from softbridge_llamacpp.format import states_in
from softbridge_llamacpp.library import Cache, Context, Model, Row, loaded
from softbridge_llamacpp.state import MOST_STREAMS, NUMBERS, State, read_state

#: llama.cpp rounds a cache up to so many cells.
_CELLS = 256
#: Where no prompt says how keys and values are held. With flash attention llama.cpp rounds those of f32 to f16
#: (`build_attn_mha` in src/llama-graph.cpp).
_PLAIN = Cache(transposed=True)


class LlamaCppServer:
    """The base model in float32, on processors alone; sequences of a batch share one cache."""

    name = "llamacpp"
    summary = "llama.cpp through its C functions: saved states of sequences, several texts in one batch"

    def unavailable(self) -> str | None:
        missing = [] if functions.module() else [" or ".join(functions.PACKAGES.values())]
        missing += [] if importlib.util.find_spec("gguf") else ["gguf"]
        return f"it needs {' and '.join(missing)}: pip install 'softbridge[llamacpp]'" if missing else None

    def version(self) -> str:
        package = functions.PACKAGES[functions.module() or "xllamacpp"]
        return f"{package} {importlib.metadata.version(package)}, float32"

    def obstacles(self, config: Any) -> Sequence[Obstacle]:
        return base_file.obstacles(config)

    @contextmanager
    def open(self, base: Path, prompts: Mapping[str, Path], scratch: Path) -> Iterator[Ask]:
        path = base_file.located(base)
        if path is None:
            path = scratch / "base.gguf"
            base_file.write(base, path)
        states = {name: _read(given) for name, given in prompts.items()}
        kinds = list(dict.fromkeys(_cache_of(state) for _, state in states.values()))
        if len(kinds) > 1:
            raise EngineError(
                f"prompts for {len(kinds)} kinds of cache: {few(kinds)}",
                "prompts of one dtype and one encoding: llama.cpp has one cache for all",
                "write them again alike",
            )
        with loaded(path) as model:
            served = _Served(model, states, kinds[0] if kinds else _PLAIN, _reach(base))
            for name in prompts:
                served.check(name)
            yield served.ask


class _Served:
    """A loaded model with prompts."""

    def __init__(self, model: Model, states: Mapping[str, tuple[Path, State]], cache: Cache, reach: int | None) -> None:
        import torch

        self._model, self._states, self._cache, self._reach = model, states, cache, reach
        self._threads = torch.get_num_threads()  # as many as whoever compares lets torch have

    def check(self, name: str) -> None:
        """Load a prompt once, so that what does not fit is refused before anything is asked."""
        with self._context([Request((0,), name)], 1) as context:
            self._begin(context, name, 0)

    def ask(self, requests: Sequence[Request], length: int) -> Sequence[Answer]:
        """See `softbridge.plugin.serving.Ask`. More requests than llama.cpp has sequences go in several batches."""
        for request in requests:
            if request.prompt is not None and request.prompt not in self._states:
                raise EngineError(
                    f"no prompt is called '{request.prompt}'", f"one of {few(list(self._states))}", "name one of these"
                )
            total = self._length(request.prompt) + len(request.tokens) + length
            if not request.tokens or length < 1 or (self._reach is not None and total > self._reach + 1):
                raise EngineError(
                    f"a text of {len(request.tokens)} tokens to be continued with {length}, {total} with its prompt",
                    f"a text, and at most {self._reach} positions" if self._reach else "a text that is continued",
                    "ask for less",
                )
        answers: list[Answer] = []
        for begin in range(0, len(requests), MOST_STREAMS):
            answers += self._together(requests[begin : begin + MOST_STREAMS], length)
        return answers

    def _together(self, requests: Sequence[Request], length: int) -> list[Answer]:
        picked: list[list[int]] = [[] for _ in requests]
        steps: list[list[Any]] = [[] for _ in requests]
        with self._context(requests, length) as context:
            starts = [self._begin(context, request.prompt, n) for n, request in enumerate(requests)]
            rows = [
                Row(n, starts[n] + at, token, at == len(request.tokens) - 1)
                for n, request in enumerate(requests)
                for at, token in enumerate(request.tokens)
            ]
            for step in range(length):
                logits = context.decode(rows).astype(np.float64)
                shifted = logits - logits.max(axis=-1, keepdims=True)
                scores = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
                rows = []
                for n, request in enumerate(requests):
                    picked[n].append(int(scores[n].argmax()))
                    steps[n].append(scores[n])
                    rows.append(Row(n, starts[n] + len(request.tokens) + step, picked[n][-1], True))
        return [Answer(np.array(tokens), np.stack(rows)) for tokens, rows in zip(picked, steps, strict=True)]

    def _context(self, requests: Sequence[Request], length: int) -> Any:
        total = sum(self._length(one.prompt) + len(one.tokens) + length for one in requests)
        cells = -(-total // _CELLS) * _CELLS
        step = max(sum(len(one.tokens) for one in requests), len(requests))
        return self._model.context(len(requests), cells, step, self._cache, self._threads)

    def _length(self, name: str | None) -> int:
        return 0 if name is None else len(self._states[name][1].keys[0])

    def _begin(self, context: Context, name: str | None, sequence: int) -> int:
        """Where the first real token of a sequence stands, whose prompt is restored."""
        if name is None:
            return 0
        path, state = self._states[name]
        found = context.restore(path, sequence, len(state.tokens))
        if found != len(state.keys[0]):
            raise EngineError(
                f"llama.cpp restored {found} tokens of {name}", f"{len(state.keys[0])}", "report this as a defect"
            )
        return found


def _read(path: Path) -> tuple[Path, State]:
    """A prompt's file, and what is in it: llama.cpp itself ends the process at some malformed files."""
    try:
        files = untrusted.Files(path)
        found = states_in(files)
        if len(found) != 1:
            raise CheckpointError(f"{path} holds {len(found)} states of sequences", "one", "give the file itself")
        with files.stream(found[0]) as (stream, size):
            state = read_state(stream, size, str(path))
        return (path if files.is_file else path / found[0]), state
    except CheckpointError as error:
        raise EngineError(error.found, error.expected, error.remedy) from error


def _cache_of(state: State) -> Cache:
    """The cache that a state is for."""
    keys, values = ({NUMBERS[rows.dtype] for rows in half} for half in (state.keys, state.values))
    if len(keys) != 1 or len(values) != 1:
        raise EngineError("a state whose layers differ in type", "one type for all", "write it again")
    return Cache(keys.pop(), values.pop(), state.transposed)


def _reach(base: Path) -> int | None:
    """How many positions answers are those of transformers: llama.cpp has no sliding window for these families.

    Positions that are embedded are as many as the model has.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    shape = read_geometry(config).decoder
    bounds = [shape.window if shape is not None else None]
    if config.model_type == "gpt2":
        bounds.append(config.max_position_embeddings)
    return min((bound for bound in bounds if bound is not None), default=None)


SERVER = LlamaCppServer()
