"""The bytes of mlx-lm's prompt caches: what `save_prompt_cache` writes and `load_prompt_cache` reads, without mlx.

A file is safetensors. Its tensors are a list (a cache for each layer) of lists (the state of a cache), flattened:
``3.1`` is the second piece of layer 3's state. Its metadata is a list of three things, flattened likewise. There are
two layouts, and neither release reads the other's (`mlx_lm/models/cache.py`):

- since 0.32.0: metadata is [the caller's, the classes, which pieces are plain numbers]. The state of a `KVCache` is
  keys, values, offset; of a `RotatingKVCache` keys, values, offset, keep, max_size, index.
- until 0.31.3: metadata is [plain numbers, the caller's, the classes]. The state of both is keys and values; the
  numbers of a `RotatingKVCache` are keep, max_size, offset, index, as texts.

Keys and values are [1, K, N, D], of which the first `offset` tokens count: mlx-lm allocates 256 at a time. A
`RotatingKVCache` is that of a layer with a sliding window of max_size tokens. Once full, it overwrites its oldest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Literal

import numpy as np

from softbridge import untrusted
from softbridge.arrays import BFLOAT16, Array
from softbridge.errors import CheckpointError, few

Layout = Literal["0.32", "0.31"]
PLAIN, ROTATING = "KVCache", "RotatingKVCache"
#: Layout -> at which places of the metadata the caller's and the classes stand.
_PLACES: Mapping[Layout, tuple[str, str]] = {"0.32": ("0", "1"), "0.31": ("1", "2")}
#: Layout -> the numbers of a `RotatingKVCache`, in their order.
_NUMBERS: Mapping[Layout, tuple[str, ...]] = {
    "0.32": ("offset", "keep", "max_size", "index"),
    "0.31": ("keep", "max_size", "offset", "index"),
}
_AGAIN = "make the cache again, with mlx_lm.cache_prompt or softbridge"


@dataclass(frozen=True, eq=False)
class LayerCache:
    """What one layer has of a prompt.

    Attributes:
        keys: [K, P, D], as they enter the dot product.
        values: [K, P, D].
        window: the size of the layer's sliding window, or None.
    """

    keys: Array
    values: Array
    window: int | None = None


def layout_of(metadata: Mapping[str, str]) -> Layout | None:
    """In which layout a file with this metadata is; None: it is no prompt cache."""
    last = metadata.get("2.0", "none")
    if last.endswith("Cache"):
        return "0.31"
    return "0.32" if last == "" and metadata.get("1.0", "").endswith("Cache") else None


def read(files: untrusted.Files, name: str) -> tuple[list[LayerCache], dict[str, str]]:
    """The caches of all layers, and the metadata of whoever made them.

    Raises:
        CheckpointError: the file is malformed, or what it holds is no prompt of P tokens in every layer.
    """
    metadata, tree = files.metadata(name), files.tree(name)
    layout = layout_of(metadata)
    if layout is None:
        raise _refused(
            f"{files.path}: metadata without the classes of a cache", "what mlx-lm's save_prompt_cache writes"
        )
    own, classes = _PLACES[layout]
    numbered = (metadata.get(f"{classes}.{n}") for n in count())
    kinds = [kind for kind in takewhile(lambda kind: kind is not None, numbered) if kind is not None]
    others = sorted(set(kinds) - {PLAIN, ROTATING})
    if others:
        named = few([f"{kind!r:.40}" for kind in others])
        raise _refused(
            f"{files.path} holds caches of the kinds {named}, which are more, or less, than keys and values",
            f"{PLAIN} or {ROTATING} of every layer",
        )
    states: dict[str, dict[str, untrusted.Stored]] = {}
    for key, stored in tree.items():
        layer, _, piece = key.partition(".")
        states.setdefault(layer, {})[piece] = stored
    stray = sorted(states.keys() - {str(n) for n in range(len(kinds))})
    if stray:
        raise _refused(f"{files.path}: tensors of {few(stray)}, and {len(kinds)} layers", "the tensors of these layers")
    scalars = {metadata.get(f"2.{n}.0"): metadata.get(f"2.{n}.1") for n in range(1, len(tree) + 1)}
    caches = []
    for n, kind in enumerate(kinds):
        what, state = f"the {kind} of layer {n}", states.get(str(n), {})
        names = () if layout == "0.31" else _NUMBERS[layout] if kind == ROTATING else ("offset",)
        keys, values = _keys_and_values(state, 2 + len(names), what)
        if layout == "0.32":
            numbers = {name: _scalar(state[str(i)], what) for i, name in enumerate(names, 2)}
            if any(scalars.get(f"{n}.{i}") != "scalar" for i in range(2, 2 + len(names))):
                raise _refused(f"{what}: numbers that mlx-lm would take for arrays", "each in the list of scalars")
        elif kind == ROTATING:
            numbers = {name: _number(metadata.get(f"0.{n}.{i}"), what) for i, name in enumerate(_NUMBERS[layout])}
        else:
            numbers = {"offset": keys.shape[2]}
        _check(numbers, keys.shape[2], what)
        offset = numbers["offset"]
        first, second = (one.array()[0, :, :offset] for one in (keys, values))
        caches.append(LayerCache(first, second, numbers.get("max_size")))
    lengths = sorted({cache.keys.shape[1] for cache in caches})
    if len(lengths) > 1:
        raise _refused(f"{files.path}: layers with {few(lengths)} tokens", "as many tokens in every layer")
    given = {key.removeprefix(f"{own}."): value for key, value in metadata.items() if key.startswith(f"{own}.")}
    return caches, given


def _keys_and_values(
    state: Mapping[str, untrusted.Stored], pieces: int, what: str
) -> tuple[untrusted.Stored, untrusted.Stored]:
    wanted = [str(n) for n in range(pieces)]
    if state.keys() != set(wanted):
        raise _refused(f"{what}: tensors {few(sorted(state))}", few(wanted))
    keys, values = state["0"], state["1"]
    floats = all(one.dtype == BFLOAT16 or one.dtype.kind == "f" for one in (keys, values))
    if len(keys.shape) != 4 or keys.shape != values.shape or keys.shape[0] != 1 or 0 in keys.shape or not floats:
        raise _refused(
            f"{what}: keys {list(keys.shape)} of {keys.dtype.name}, values {list(values.shape)} of {values.dtype.name}",
            "floating-point numbers [1, K, N, D] of one row, alike in both",
        )
    return keys, values


def _check(numbers: Mapping[str, int], held: int, what: str) -> None:
    """Refuse a cache that does not hold each token that it has seen, in order."""
    offset, keep, window = numbers["offset"], numbers.get("keep", 0), numbers.get("max_size")
    if keep != 0:
        raise _refused(
            f"{what} keeps its first {keep} tokens and drops those behind (--max-kv-size)",
            "the cache of a layer that drops its oldest tokens, or none",
        )
    index = numbers.get("index", offset)
    if not 0 < offset <= held or index != offset:
        raise _refused(
            f"{what} has seen {offset} tokens, and holds {held}, the next at {index}",
            "every token that it has seen, in order: a window that has dropped some holds no prompt",
        )
    if window is not None and window < 1:
        raise _refused(f"{what} of at most {window} tokens", "a window of at least one")


def _scalar(stored: untrusted.Stored, what: str) -> int:
    if stored.shape or stored.dtype.kind not in "iu":
        raise _refused(f"{what}: {stored.name}, {list(stored.shape)} of {stored.dtype.name}", "a whole number")
    return int(stored.array())


def _number(text: str | None, what: str) -> int:
    if text is None or not text.isdecimal() or not text.isascii() or len(text) > 18:
        raise _refused(f"{what}: {text!r:.40} among its numbers", "a whole number")
    return int(text)


def _refused(found: str, expected: str) -> CheckpointError:
    return CheckpointError(found, expected, _AGAIN)


def write(caches: Sequence[LayerCache], given: Mapping[str, str], layout: Layout) -> untrusted.Streamed:
    """A file of these caches, and of a caller's metadata, of which there must be some: mlx-lm drops an empty list."""
    own, classes = _PLACES[layout]
    metadata = {f"{own}.{name}": value for name, value in given.items()}
    tensors: dict[str, Array] = {}
    scalars = [""]
    for layer, cache in enumerate(caches):
        length = cache.keys.shape[1]
        numbers = {"offset": length, "keep": 0, "max_size": cache.window, "index": length}
        names = ("offset",) if cache.window is None else _NUMBERS[layout]
        tensors |= {f"{layer}.0": cache.keys[None], f"{layer}.1": cache.values[None]}
        metadata[f"{classes}.{layer}"] = PLAIN if cache.window is None else ROTATING
        if layout == "0.32":
            tensors |= {f"{layer}.{n}": np.array(numbers[name], np.int32) for n, name in enumerate(names, 2)}
            scalars += [f"{layer}.{n}" for n in range(2, 2 + len(names))]
        elif cache.window is None:
            metadata[f"0.{layer}"] = ""
        else:
            metadata |= {f"0.{layer}.{n}": str(numbers[name]) for n, name in enumerate(names)}
    if layout == "0.32":
        metadata["2.0"] = ""
        for n, place in enumerate(scalars[1:], 1):
            metadata |= {f"2.{n}.0": place, f"2.{n}.1": "scalar"}
    return untrusted.safetensors_file(tensors, metadata)
