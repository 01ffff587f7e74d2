"""HazyResearch/cartridges (Eyuboglu et al. 2025, arXiv 2506.06266): keys and values of a cache, trained as they are.

`cartridges/cache.py`, `TrainableCache.save`: torch.save of four lists with a tensor [1, K, P, D] for each layer,
``fixed_keys`` and ``fixed_values`` of the first tokens, which stay as they were, and ``trainable_keys`` and
``trainable_values`` of those behind. They are ParameterLists, read as data; written are plain lists. They
stand in the cache as they are, behind any rotation, and real tokens count from P. No file of the toolkit's was at hand:
``frozen_...`` is taken for ``fixed_...``, and where nothing is fixed these may be empty, of no tokens, None, or absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, Origin, Positions, SoftPrompt, Training
from softbridge_archive.contents import alone, contained, dictionary, is_floating, only
from softbridge_archive.frame import ArchiveFormat

FILE, HALVES, FIXED = "cache.pt", ("keys", "values"), ("fixed", "frozen")


def sniff(files: untrusted.Files) -> bool:
    """Whether a file of torch.save with trainable keys and values is all there is."""
    return {f"trainable_{half}" for half in HALVES} <= dictionary(files, alone(files)).keys()


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    try:
        (keys, ahead), (values, beside) = (_half(files, dictionary(files, only(files)), half) for half in HALVES)
        (frozen,) = ahead | beside
        part = KeyValuePrefix("self", {n: KeyValue(*pair) for n, pair in enumerate(zip(keys, values, strict=True))})
    except ValueError as error:
        raise CheckpointError(
            f"{files.path}: keys and values that do not belong together: {error}",
            "tensors [1, K, P, D] of keys and values for each layer, all with as many fixed tokens",
            "check that the file is complete",
        ) from error
    flat, start = part.flat(), Positions({"decoder": part.length})
    rows = {"self.frozen": flat[:frozen], "self.trained": flat[frozen:]}
    state = Training("cartridge", {"frozen": frozen}, {name: array for name, array in rows.items() if len(array)})
    training = state if "self.trained" in state.tensors else None
    return SoftPrompt((part,), start, BaseId(None, geometry), training=training, origin=Origin("cartridges"))


def write(prompt: SoftPrompt, geometry: Geometry | None) -> Mapping[str, untrusted.Content]:
    """See `Format.write`."""
    frozen = 0 if prompt.training is None else prompt.training.settings["frozen"]
    content = {
        f"{name}_{half}": [getattr(pair, half)[None, :, rows] for pair in prompt.prefixes[0].layers.values()]
        for name, rows in (("fixed", slice(frozen)), ("trainable", slice(frozen, None)))
        for half in HALVES
    }
    return {FILE: untrusted.pickle_file(content)}


def _half(files: untrusted.Files, tree: Mapping[str, Any], half: str) -> tuple[list[Array], set[int]]:
    """[K, P, D] of each layer, and how many of their tokens are fixed."""
    trained = _layers(files, tree.get(f"trainable_{half}"))
    known = (_layers(files, tree.get(f"{name}_{half}")) for name in FIXED)
    fixed = next(filter(None, known), [one[:, :0] for one in trained])
    return [np.concatenate(both, 1) for both in zip(fixed, trained, strict=True)], {one.shape[1] for one in fixed}


def _layers(files: untrusted.Files, listed: Any) -> list[Array]:
    """[K, P, D] of each layer in a list; none if it is no list."""
    stored = (contained(listed) or {}).values()
    for one in stored:
        if len(one.shape) != 4 or one.shape[0] != 1 or not is_floating(one.dtype):
            raise CheckpointError(f"{files.path}: {one!r:.200}", "numbers [1, K, P, D]", "check that it is a cartridge")
    return [one.array()[0] for one in stored]


FORMAT = ArchiveFormat(
    name="cartridges",
    summary="HazyResearch/cartridges: torch.save of lists of keys and values [1, K, P, D], fixed and trainable",
    files=("*.pt",),
    recognise=sniff,
    reader=read,
    reads="the file of `TrainableCache.save`, with what is frozen",
    writes="the same, as plain lists",
    proven="made as the toolkit's source says: a cache that starts with them, Llama; PEFT's CARTRIDGE and back",
    encodings=("pt",),
    capabilities=Capabilities(
        prefix_sites=frozenset({"self"}),
        prefix_start="counted",
        every_layer=True,
        positions_told=False,
        window="slides",
        training=frozenset({"cartridge"}),
    ),
    writer=write,
)
