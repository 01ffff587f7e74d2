"""Files of a sequence's state, without llama.cpp: a prefix, as a cache of llama.cpp holds it; see `state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.checkpoint.manifest import BESIDE
from softbridge.errors import BaseModelError, CheckpointError, Obstacle, few
from softbridge.geometry import Geometry, StackGeometry
from softbridge.plugin.capabilities import UP_TO_FLOAT32, Capabilities
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, Origin, Positions, SoftPrompt
from softbridge_llamacpp.families import FAMILIES, Family, paired, unpaired
from softbridge_llamacpp.state import BEGINNING, NUMBERS, VERSIONS, State, read_state, to_bytes

FILE = "prompt.bin"
#: Stands in the file in the place of each virtual token: an id that every vocabulary has.
PLACEHOLDER = 0
#: Name of an encoding -> whether the cache holds values transposed, which it does without flash attention, and the
#: version of the form. Without it comes first: with flash attention llama.cpp rounds keys and values of f32 to f16.
ENCODINGS = {
    f"flash-{flash}" + ("" if version == VERSIONS[0] else f"-v{version}"): (flash == "off", version)
    for version in VERSIONS
    for flash in ("off", "on")
}
#: By their number in ggml: what `--cache-type-k` and `--cache-type-v` call them.
_CACHE_TYPES = {0: "f32", 1: "f16", 30: "bf16"}


class LlamaCppFormat:
    """A key/value prefix as the state of a sequence. Real tokens follow at P, as after any text in the cache.

    The type of the cache (f32, f16, bf16) is the dtype of the prompt, which ``--dtype`` changes. The encoding says
    whether it is one with flash attention, and which version of llama.cpp's form is written.
    """

    name = "llamacpp"
    summary = "llama.cpp: the saved state of a sequence, which holds a key/value prefix"
    encodings = tuple(ENCODINGS)
    engine = "native"
    server = "llamacpp"
    files = (FILE,)
    reads = "what `llama_state_seq_save_file` wrote, in versions 2 to 4"
    writes = "the same"
    proven = "in llama.cpp itself, against transformers; states that it saved, against transformers' cache"
    capabilities = Capabilities(
        prefix_sites=frozenset({"self"}),
        prefix_start="counted",
        every_layer=True,
        parts=1,
        positions_told=False,
        window="slides",
        dtypes=UP_TO_FLOAT32,
        model_types=frozenset(FAMILIES),
    )

    def sniff(self, files: untrusted.Files) -> bool:
        return bool(states_in(files))

    def read(self, files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
        names = states_in(files)
        if len(names) != 1:
            others = [name for name in files.names if name not in BESIDE]
            raise CheckpointError(
                f"{files.path} holds {len(names)} states of sequences, among {few(others)}",
                "one file that llama_state_seq_save_file wrote",
                "give the path of the file itself",
            )
        with files.stream(names[0]) as (stream, size):
            state = read_state(stream, size, str(files.path))
        family, shape = _known(geometry)
        width = shape.kv_heads * shape.head_dim
        sizes = [array.shape[1] for array in (*state.keys, *state.values)]
        if len(sizes) != 2 * shape.layers or set(sizes) != {width}:
            raise BaseModelError(
                f"{files.path} holds {len(state.keys)} layers with {sorted(set(sizes))} numbers for a token",
                f"{shape.layers} layers with {shape.kv_heads} heads of size {shape.head_dim}: {width} numbers",
                "check --base: the file does not say for which model it is",
            )
        layers = {}
        for layer, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
            keys, values = (_heads(rows, shape) for rows in (keys, values))
            layers[layer] = KeyValue(unpaired(keys) if family.paired else keys, values)
        part = KeyValuePrefix("self", layers)
        tokens = state.tokens.tolist()
        ours = tokens == [PLACEHOLDER] * part.length
        origin = Origin(self.name, {} if ours else {"tokens": tokens})
        return SoftPrompt((part,), Positions({"decoder": part.length}), BaseId(None, geometry), origin=origin)

    def obstacles(self, prompt: SoftPrompt, geometry: Geometry | None) -> Sequence[Obstacle]:
        found = []
        for half in ("keys", "values"):
            dtypes = {getattr(pair, half).dtype.name for part in prompt.prefixes for pair in part.layers.values()}
            if len(dtypes) > 1:
                reason = f"a cache has one type for the {half} of all layers, and here are {', '.join(sorted(dtypes))}"
                found.append(Obstacle("precision", reason, "write it in one, with --dtype", accidental=True))
        window = None if geometry is None or geometry.decoder is None else geometry.decoder.window
        if window is not None and geometry is not None:
            reason = (
                f"llama.cpp has no sliding window for {geometry.model_type}: a text is the same function while prompt "
                f"and text are no longer than {window} tokens"
            )
            found.append(Obstacle("window", reason, "accept the bound on the text's length", True))
        return found

    def write(self, prompt: SoftPrompt, geometry: Geometry | None, encoding: str | None = None) -> Mapping[str, bytes]:
        family, _ = _known(geometry or prompt.base.geometry)
        (part,) = prompt.prefixes
        pairs = part.layers.values()
        keys = [_rows(paired(pair.keys) if family.paired else pair.keys) for pair in pairs]
        values = [_rows(pair.values) for pair in pairs]
        tokens = np.array(_tokens(prompt), np.int32)
        return {FILE: to_bytes(State(tokens, keys, values, *ENCODINGS[encoding or self.encodings[0]]))}

    def advice(self, prompt: SoftPrompt, geometry: Geometry | None, first: int = 0) -> Sequence[str]:
        (part,) = prompt.prefixes
        pair = part.layers[0]
        types = [_CACHE_TYPES[NUMBERS[array.dtype.newbyteorder("<")]] for array in (pair.keys, pair.values)]
        return (
            f"start llama.cpp with --cache-type-k {types[0]} --cache-type-v {types[1]} --kv-unified, and --flash-attn "
            f"off (on, if the file was written with --encoding {self.encodings[1]}): it refuses the file otherwise",
            f"load {FILE} into a sequence (llama_state_seq_load_file, or /slots/0?action=restore of llama-server), and "
            f"begin what follows with the token {PLACEHOLDER}, {part.length} times: they stand for the prompt, and a "
            "request without them is answered without it",
            "the file does not say for which model it is, and llama.cpp compares its sizes only",
        )


def states_in(files: untrusted.Files) -> list[str]:
    """The names of the files that begin as a saved state does."""
    return [name for name in files.names if files.begins(name, BEGINNING)]


def _known(geometry: Geometry | None) -> tuple[Family, StackGeometry]:
    """The facts of a family, and its attention.

    Raises:
        BaseModelError: no base model is known, or none of these families.
    """
    if geometry is None:
        raise BaseModelError(
            "a state of llama.cpp, which does not say for which model it is", "the base model", "give --base"
        )
    if geometry.model_type not in FAMILIES or geometry.decoder is None:
        raise BaseModelError(
            f"a state of llama.cpp for {geometry.model_type}", f"one of {', '.join(FAMILIES)}", "check --base"
        )
    return FAMILIES[geometry.model_type], geometry.decoder


def _heads(rows: Array, shape: StackGeometry) -> Array:
    """Numbers [K, P, D] of rows [P, K·D], in native byte order."""
    heads = rows.reshape(len(rows), shape.kv_heads, shape.head_dim).transpose(1, 0, 2)
    return heads.astype(heads.dtype.newbyteorder("="), copy=False)


def _rows(heads: Array) -> Array:
    """The inverse of `_heads`."""
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


def _tokens(prompt: SoftPrompt) -> list[int]:
    """Those of the file that the prompt was read from, if they are as many as its virtual tokens."""
    (part,) = prompt.prefixes
    told = prompt.origin.details.get("tokens") if prompt.origin and prompt.origin.format == FORMAT.name else None
    kept = [token for token in told if isinstance(token, int)] if isinstance(told, (list, tuple)) else []
    return kept if len(kept) == part.length else [PLACEHOLDER] * part.length


FORMAT = LlamaCppFormat()
