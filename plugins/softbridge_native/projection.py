"""Why an adaption prompt cannot run in a model: its attention is watched while it projects a few vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.errors import Obstacle
from softbridge.geometry import Geometry, stack_of
from softbridge.prompt import AdaptionPrompt
from softbridge_native.adaption import Call, watch
from softbridge_native.anatomy import arguments_of, attention_named, stacks_of
from softbridge_native.attention import UNDERLYING, registered, underlying
from softbridge_native.attention_wiring import attention_modules, taken_in_turn

#: By what a vector is multiplied to see whether its keys and values are: a power of two, which rounds nothing.
TIMES = 16.0
#: What rounding may make of that in half precision, relative to the largest number.
ROUNDING = 0.02
#: Settings of an attention function that change its softmax, and have no counterpart beside it.
_CHANGING = ("softcap", "s_aux", "position_bias")
_ELSEWHERE = "use an input prompt or a prefix on this model"


def adaption_obstacles(part: AdaptionPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    """What stands against this part on this model."""
    implementation = underlying(model.config._attn_implementation)
    if implementation not in UNDERLYING:
        *most, last = UNDERLYING
        reason = f"an adaption prompt runs in {', '.join(most)} or {last} attention, the model has '{implementation}'"
        return [Obstacle("attention", reason, f"model.set_attn_implementation('{UNDERLYING[0]}')")]
    modules, shape = attention_modules(model, geometry)[part.site], geometry.site(part.site)
    layers = () if shape is None else shape.attending
    if tuple(modules) != tuple(layers) or taken_in_turn(model, geometry, part.site) is not None:
        reason = (
            f"attention layers of {type(model).__name__}: {len(layers)} by its configuration, and {len(modules)} "
            "dispatch through transformers' attention interface, each by a module of its own"
        )
        return [Obstacle("attention", reason, _ELSEWHERE)]
    found: dict[str, int] = {}
    for layer in part.layers:
        for reason in _reasons(part, model, geometry, modules[layer]):
            found.setdefault(reason, layer)
    return [Obstacle("projection", f"layer {layer}: {reason}", _ELSEWHERE) for reason, layer in found.items()]


def _reasons(part: AdaptionPrompt, model: Any, geometry: Geometry, module: nn.Module) -> Iterator[str]:
    """Why a layer's keys and values are not its projections of vectors, or are no match for its queries.

    It is run on a vector, on `TIMES` the vector, on nothing, and on the vector once more.
    """
    kind = type(module).__name__
    given = arguments_of(model, stacks_of(model, geometry)[stack_of(part.site)], module)
    device = next(module.parameters()).device
    if given is None and device.type == "meta":  # which a model may need numbers for that a model of weights has
        return
    if given is None:
        yield f"{type(model).__name__} does not run on two tokens alone, so nothing is known of {kind}"
        return
    vector = torch.linspace(-1, 1, geometry.hidden, device=device)[None]
    try:
        with attention_named(model, registered("eager")):
            call, output = watch(module, given, torch.cat([vector, TIMES * vector, 0 * vector, vector]))
    except Exception as error:  # foreign code
        yield f"{kind} does not run on vectors alone: {error!r:.120}"
        return
    if call.pair is None:
        yield f"{kind} does not call its attention function when it runs on vectors alone"
        return
    yield from _of_scores(kind, call, call.pair[0])
    after = output[0] if isinstance(output, tuple) else output
    shape = geometry.site(part.site)
    if part.joins == "output" and shape is not None and after.shape[-1] != shape.heads * call.pair[1].shape[-1]:
        yield f"the heads of {kind} are not as wide together as its output, to which the prompt's sum is added"
    if not after.is_meta:  # no numbers, nothing to see
        yield from _of_numbers(kind, *call.pair)
        if part.joins == "module" and bool((after[:, -1] == 1).all()):
            yield f"{kind} has no output projection of its own, through which the prompt's sum would go by itself"
        elif part.joins == "module" and bool(after[:, :-1].abs().max() > 0):
            yield f"the output projection of {kind} has a bias, which is added a second time, to the prompt's sum"


def _of_scores(kind: str, call: Call, keys: Tensor) -> Iterator[str]:
    scale, root = call.settings.get("scaling"), keys.shape[-1] ** -0.5
    if scale is not None and abs(scale - root) > 1e-6 * root:
        yield (
            f"{kind} multiplies its scores by {scale:.4g}, where an adaption prompt's are divided by the root of the "
            f"head size, {1 / root:.4g}"
        )
    for name in _CHANGING:
        if call.settings.get(name) is not None:
            yield f"{kind} changes its softmax ('{name}'), and what that is to the prompt's own no toolkit says"


def _of_numbers(kind: str, keys: Tensor, values: Tensor) -> Iterator[str]:
    for name, rows in (("keys", keys), ("values", values)):
        one, many, nothing, again = rows.double()[0].unbind(1)
        bound = ROUNDING * rows.double().abs().max()
        if (many - nothing - TIMES * (one - nothing)).abs().max() > bound:
            yield f"{kind} does more to its {name} than project them (a norm, or a bound)"
        elif (one - again).abs().max() > bound:
            yield f"{kind} makes its {name} of where a vector stands"
