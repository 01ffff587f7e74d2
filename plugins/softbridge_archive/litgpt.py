"""litgpt's LLaMA-Adapter (Zhang et al. 2023; `litgpt/adapter.py`): vectors and a gate for each head, layer by layer.

``lit_model.pth.adapter`` is a dictionary, below ``model`` since it is saved by Lightning's Fabric, of
``transformer.h.N.attn.adapter_wte.weight`` [P, H] and ``...gating_factor`` [1, 1, heads, 1] ([1, heads, 1, 1] in the
first releases) for every layer from `adapter_start_layer` on. The gate multiplies as it is, and the sum is added
before the output projection. What else `litgpt finetune_adapter_v2` trains (a scale and a bias of every linear layer,
norms) is no part of it.

The keys and values are what the layer's fused projection gives, taken apart. Later releases take it apart in an order
that their fused projection no longer has, so that keys are made by rows of the queries' projection: another function of
the same numbers (`softbridge_compat.litgpt_releases`). A file does not say which release trained it, unless its gates
have the first shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress

from softbridge import untrusted
from softbridge.arrays import Array
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.prompt import Adaption, AdaptionPrompt, BaseId, Origin, Positions, SoftPrompt
from softbridge_archive.contents import unread, weights
from softbridge_archive.frame import ArchiveFormat
from softbridge_compat.litgpt_releases import OTHER_ROWS

_KEY = re.compile(r"(?:.*\.)?transformer\.h\.(\d+)\.attn\.(adapter_wte\.weight|gating_factor)")
_VECTORS, _GATE = "adapter_wte.weight", "gating_factor"
#: What the second version trains besides, and the norms with it.
_SECOND = ("adapter_scale", "adapter_bias")


def sniff(files: untrusted.Files) -> bool:
    """Whether any layer has both."""
    with suppress(CheckpointError):  # another format's to say
        return {match[2] for name in weights(files) if (match := _KEY.fullmatch(name))} == {_VECTORS, _GATE}
    return False


def read(files: untrusted.Files, geometry: Geometry | None) -> SoftPrompt:
    """See `Format.read`."""
    found: dict[int, dict[str, Array]] = {}
    others = []
    for name, tensor in weights(files).items():
        if (match := _KEY.fullmatch(name)) is None:
            others.append(name)
        elif match[2] in found.setdefault(int(match[1]), {}):
            raise CheckpointError(f"two tensors {match[2]} of layer {match[1]}", "one adapter", "save it alone")
        else:
            found[int(match[1])][match[2]] = tensor.array()
    if not found:
        raise CheckpointError(f"{files.path} holds none of litgpt's names", "an adapter of litgpt", "check the path")
    layers = {layer: _layer(layer, found[layer]) for layer in sorted(found)}
    wrong = [layer for layer, one in found.items() if one[_GATE].shape not in _shapes(layers[layer])]
    lengths = {one.vectors.shape for one in layers.values()}
    if wrong or len(lengths) > 1 or list(layers) != list(range(min(layers), max(layers) + 1)):
        raise CheckpointError(
            f"layers {list(layers)} with vectors {sorted(lengths)}; gates of another shape in {wrong}",
            "layers that follow one another, vectors of one shape, gates [1, 1, heads, 1]",
            "save the adapter again",
        )
    first = all(one[_GATE].shape[1] > 1 for one in found.values())  # of one head the two shapes are one
    second = [name for name in others if name.rpartition(".")[2] in _SECOND]
    told = [] if first else [OTHER_ROWS]
    if second:
        told.append(f"LLaMA-Adapter v2 trains {len(second)} scales and biases of linear layers, and norms, besides")
    part = AdaptionPrompt("encoder" if geometry is not None and geometry.decoder is None else "self", layers)
    origin = Origin("litgpt", notes=unread({*others} - {*second}), partial="; ".join(told))
    prompt = SoftPrompt((part,), Positions(), BaseId(None, geometry), origin=origin)
    if geometry is not None:
        check_fits(prompt, geometry)
    return prompt


def _layer(layer: int, one: Mapping[str, Array]) -> Adaption:
    kinds = {array.dtype.name for array in one.values()} - {"bfloat16", "float16", "float32", "float64"}
    if one.keys() != {_VECTORS, _GATE} or one[_VECTORS].ndim != 2 or 0 in one[_VECTORS].shape or kinds:
        shapes = {name: list(array.shape) for name, array in one.items()}
        raise CheckpointError(f"layer {layer} has {shapes}", f"{_VECTORS} [P, H] and {_GATE}, numbers", "save it again")
    return Adaption(one[_VECTORS], one[_GATE].reshape(-1))


def _shapes(one: Adaption) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heads = len(one.gate)
    return (1, 1, heads, 1), (1, heads, 1, 1)


FORMAT = ArchiveFormat(
    name="litgpt",
    summary="litgpt's LLaMA-Adapter: lit_model.pth.adapter",
    files=("*.pth.adapter", "*.pth"),
    recognise=sniff,
    reader=read,
    reads="`lit_model.pth.adapter`, or the adapter in a whole checkpoint; of version 2 what is version 1's",
    proven="litgpt's own logits, in the native engine; what later releases compute is refused, and shown to be other",
)
