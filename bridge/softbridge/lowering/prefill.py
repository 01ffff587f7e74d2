"""The pass that makes a key/value prefix of an input prompt, for targets that know prefixes only.

In a causal model no token changes what stands before it. So vectors in front of every text leave the same keys and
values in each layer, whatever the text is, and these are all that the text ever sees of them: run the model once over
the vectors, keep its cache, and that is a prefix (what serving engines call prefill). It is the same function on these
weights only. The way back does not exist: hardly any prefix is what some vectors leave.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.base import cache
from softbridge.base.positions import PositionScheme
from softbridge.errors import BaseModelError, Obstacle
from softbridge.geometry import StackGeometry
from softbridge.lowering.steps import Option, Step, Target, blocked
from softbridge.lowering.training import without_training
from softbridge.prompt.part import InputPrompt, KeyValue, KeyValuePrefix
from softbridge.prompt.soft_prompt import SoftPrompt

#: How far the keys of a virtual token may move, relative to the largest, when a token follows: float32 sums products of
#: other shapes in another order, and through many layers.
CAUSAL = 1e-3


def prefill(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Vectors in front of a causal model's texts become what they leave in its cache, where a target has prefixes only.

    The prompt's `Step` names the digest of the weights. Memory: the base model in float32 (float64 for vectors in that)
    and its cache of P tokens.
    """
    able, geometry = target.capabilities, target.geometry(prompt)
    part = prompt.parts[0]
    if (
        not isinstance(part, InputPrompt)
        or len(prompt.parts) > 1
        or (part.stack, part.entry, part.placement) != ("decoder", "before", "before-sequence")
        or ("decoder", "before", "before-sequence") in able.inputs
        or "self" not in able.prefix_sites
        or geometry is None
        or geometry.decoder is None
        or geometry.is_encoder_decoder
        or prompt.positions.start["decoder"] < part.length
    ):
        return [Option(prompt)]  # `check_parts` names what is not known
    shape = geometry.decoder
    if shape.stateful or shape.sources is not None:
        what = "keep a state beside keys and values" if shape.stateful else "share another layer's keys"
        reason = f"the vectors could be run into keys and values, and layers of {geometry.model_type} {what}"
        return blocked(
            prompt, Obstacle("part", reason, "choose a target with vectors in the input, such as softbridge")
        )
    why = "vectors in front of the text become keys and values by running it, with its weights, once"
    missing, digest, made = None, "", _zeros(part, shape)
    try:
        base = target.need_base(f"{target.name} has prefixes only, and {why}")
        if not base.imagined:
            model = base.weights(_wider(part.vectors), lent=True)
            made, causal = run_into_cache(model, part, base.positions, prompt.positions.start["decoder"], shape)
            if not causal:
                reason = (
                    f"{type(model).__name__} lets a token see what follows it, so no cache holds what a prompt does"
                )
                return blocked(prompt, Obstacle("part", reason, "choose a target with vectors in the input"))
            digest = _digest_once(model)
    except BaseModelError as error:
        missing = error
    note = "vectors run through the base model into keys and values; float32 rounding, and for these weights alone"
    note += f" (sha256 {digest[:16]})" if digest else ""
    prefix = replace(prompt, parts=(made,))
    ejected = without_training(prefix, target, "belongs to the vectors in the input and is left out")
    step = Step("prefill", "rounding", note)
    return [Option(ejected.prompt, (step, *ejected.steps), ejected.obstacles, missing)]


def run_into_cache(
    model: Any, part: InputPrompt, scheme: PositionScheme, start: int, shape: StackGeometry
) -> tuple[KeyValuePrefix, bool]:
    """What vectors leave in the cache of a model, and whether a token that follows them leaves that as it is.

    Args:
        model: a causal model in inference mode.
        part: vectors [P, H] in front of the text.
        scheme: how the model knows where its tokens stand.
        start: where the first real token stands, behind the vectors.
        shape: of the model's attention.

    Raises:
        BaseModelError: the model's cache does not hold keys and values of this shape for every layer, or its tokens
            cannot be told where they stand.
    """
    dtype = next(model.parameters()).dtype
    vectors = to_torch(part.vectors, dtype)[None].to(next(model.parameters()).device)
    if start != part.length and scheme.kind == "absolute" and not scheme.tellable:
        raise BaseModelError(
            f"vectors that begin at {start - part.length} in {type(model).__name__}, which takes no position_ids",
            "vectors that begin at 0",
            "choose a target with vectors in the input",
        )
    first = scheme.first + start - part.length if scheme.tellable else None
    held = _cached(model, vectors, first)
    layers = {}
    for layer in range(shape.layers):
        heads, width = shape.shape(layer)
        pair = held.get(layer, ())
        if any(tuple(array.shape) != (heads, part.length, width) for array in pair) or len(pair) != 2:
            raise BaseModelError(
                f"the cache of {type(model).__name__} holds {[list(array.shape) for array in pair]} in layer {layer}",
                f"keys and values {[heads, part.length, width]} of every layer",
                "choose a target with vectors in the input",
            )
        kind = np.promote_types(part.vectors.dtype, np.float32)
        layers[layer] = KeyValue(pair[0].astype(kind), pair[1].astype(kind))
    import torch

    further = _cached(model, torch.cat([vectors, vectors[:, :1].flip(-1)], 1), first)
    causal = all(_alike(held[n][side], further[n][side][:, : part.length]) for n in layers for side in (0, 1))
    return KeyValuePrefix("self", layers), causal


def digest_of(model: Any) -> str:
    """sha256 of a model's parameters, hexadecimal: by their names, in float32."""
    state = sha256()
    for name, parameter in sorted(model.named_parameters()):
        state.update(f"{name} {tuple(parameter.shape)}".encode())
        state.update(parameter.detach().cpu().float().numpy().tobytes())
    return state.hexdigest()


_DIGESTS: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _digest_once(model: Any) -> str:
    """`digest_of` a model that nobody changes."""
    if model not in _DIGESTS:
        _DIGESTS[model] = digest_of(model)
    return _DIGESTS[model]


def _cached(model: Any, vectors: Any, first: int | None) -> dict[int, tuple[Array, Array]]:
    """Layer -> keys and values [K, P, D] that vectors [1, P, H] leave, those beyond a sliding window among them.

    Args:
        first: the first one's `position_ids`, or None to pass none.
    """
    import torch
    from transformers import DynamicCache

    whole = DynamicCache()  # made without a configuration, it drops nothing that has left a window
    arguments = cache.handed(model.forward, whole) | {"inputs_embeds": vectors, "use_cache": True}
    if first is not None:
        arguments["position_ids"] = torch.arange(first, first + vectors.shape[1], device=vectors.device)[None]
    with torch.no_grad():
        output = model(**arguments)
    return {
        n: (from_torch(keys[0]), from_torch(values[0])) for n, (keys, values) in cache.pairs(cache.of(output)).items()
    }


def _alike(one: Array, other: Array) -> bool:
    return bool(np.abs(one - other).max() <= CAUSAL * (np.abs(one).max() or 1.0))


def _wider(vectors: Array) -> Any:
    import torch

    return torch.float64 if vectors.dtype == np.float64 else torch.float32


def _zeros(part: InputPrompt, shape: StackGeometry) -> KeyValuePrefix:
    """In the place of numbers that nobody asks for."""
    dtype = np.promote_types(part.vectors.dtype, np.float32)
    shapes = {n: (shape.shape(n)[0], part.length, shape.shape(n)[1]) for n in range(shape.layers)}
    return KeyValuePrefix("self", {n: KeyValue(np.zeros(s, dtype), np.zeros(s, dtype)) for n, s in shapes.items()})
