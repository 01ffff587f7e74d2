"""What the layers of a model put out, so that a comparison can say where two sides part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from softbridge.arrays import Array
from softbridge.base.model import BaseModel
from softbridge.verification.certificate import Layer

#: Of wider states the first channels are kept: what attends and what feeds forward both end in a product that mixes
#: all channels, so that a difference shows in these, too.
WIDTH = 64
#: The part of a layer that is the layer itself.
OUTPUT = "output"


def places(model: Any) -> dict[str, Any]:
    """Name -> module: what attends in each layer, and the layer, as ``decoder.3.self_attn`` and ``decoder.3.output``.

    Layers are the outermost lists of modules that are as long as the geometry has layers, and what attends in one is
    what its class says (transformers' modeling files all do). Where neither is found, nothing is watched.
    """
    import torch

    geometry = BaseModel.resolve(model).geometry
    if geometry.is_encoder_decoder:
        stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    else:
        stacks = {"encoder" if geometry.decoder is None else "decoder": model.base_model}
    found: dict[str, Any] = {}
    for stack, module in stacks.items():
        count = (geometry.encoder if stack == "encoder" else geometry.decoder).layers  # type: ignore[union-attr]
        lists = (m for m in module.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
        for number, layer in enumerate(next(lists, ())):
            found |= {f"{stack}.{number}.{name}": inner for name, inner in _attending(layer)}
            found[f"{stack}.{number}.{OUTPUT}"] = layer
    return found


def _attending(layer: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_children():
        if "Attention" in type(module).__name__:
            yield path + name, module
        else:
            yield from _attending(module, f"{path}{name}.")


def watch(modules: Mapping[str, Any], first: int = 0) -> dict[str, Array]:
    """What comes out of each module when it is first called, [B·T, C], filled in as the model runs.

    Args:
        modules: see `places`; of a model that nothing else needs, for it stays watched.
        first: what the model calls layer 0 is this layer.
    """
    import torch

    states: dict[str, Array] = {}

    def watcher(name: str) -> Any:
        stack, layer, part = name.split(".", 2)
        name = f"{stack}.{int(layer) + first}.{part}"

        def keep(module: Any, args: Any, output: Any) -> None:
            given = output if isinstance(output, (tuple, list)) else (output,)
            state = next((one for one in given if isinstance(one, torch.Tensor) and one.ndim > 1), None)
            if state is not None and name not in states:
                rows = state.detach().reshape(-1, state.shape[-1])[:, :WIDTH]
                states[name] = np.asarray(rows.double().cpu().numpy())

        return keep

    for name, module in modules.items():
        module.register_forward_hook(watcher(name))
    return states


def differences(a: Mapping[str, Array], b: Mapping[str, Array]) -> tuple[Layer, ...]:
    """How far apart the states of two sides are, in the order in which the first ran.

    Virtual tokens in the sequence stand before the real ones, and a side without them has fewer rows: the last rows
    are compared.
    """
    found = []
    for name in a:
        if name not in b or a[name].shape[1] != b[name].shape[1]:
            continue
        rows = min(len(a[name]), len(b[name]))
        ours, theirs = a[name][-rows:], b[name][-rows:]
        stack, layer, part = name.split(".", 2)
        with np.errstate(invalid="ignore"):  # infinite on both sides
            apart = float(np.abs(ours - theirs).max()) / (float(np.abs(ours).max()) or 1.0)
        found.append(Layer(stack, int(layer), part, apart))
    return tuple(found)
