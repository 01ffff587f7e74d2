"""Key/value prefixes inside attention, through transformers' own attention interface.

A model whose attention dispatches through the interface calls the function that its configuration names. We register
one such function for each underlying implementation. It appends the layer's prefix in front of the keys and values
*after* the cache was updated, and calls the underlying function. So the cache never holds the prefix, lengths are what
`generate` expects, and no modelling code is copied.

Everything here is a function of the tensors that arrive (positions are read off the mask), never of an earlier call:
gradient checkpointing runs the layers again, when the forward pass is long over.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface

from softbridge.errors import EngineError
from softbridge_native.adaption import beside
from softbridge_native.call import Own
from softbridge_native.flex_and_flash import by_name, lengthened, packing
from softbridge_native.joined_cache import MASKS, Running
from softbridge_native.prefix import Joined, Source
from softbridge_native.shared_prefix import SHORTEST, TEXT, Group, attend, pays

FLEX, FLASH = "flex_attention", "flash_attention_2"

#: Underlying implementations. Others skip the mask, or take it in a form of their own.
UNDERLYING = ("eager", "sdpa", FLEX, FLASH)

#: Additive masks are far below this where they hide a key, in every dtype.
HIDDEN = -1e4
_BINDING = "_softbridge"
#: transformers' attention functions by name, as they are when they are asked for.
_FUNCTIONS = AttentionInterface()


class Entered:
    """What entered an attention module and is for its attention function, or None."""

    def __init__(self) -> None:
        self.states: Tensor | None = None


@dataclass(frozen=True)
class Binding:
    """What an attention module must know of its prefix.

    Attributes:
        source: where it comes from.
        causal: whether the module's queries see the past only.
        bias: the module that holds the table of a T5-like relative bias, or None: virtual tokens have none.
        off: says whether a module is to run without it.
        biased: whether real tokens have the model's relative bias.
        entered: what entered the module, in the running thread, where a gate asks for it.
        layer: the number of the layer whose prefix it is.
        running: what the layers of a running call know of each other.
    """

    source: Source
    causal: bool
    bias: Any
    off: Callable[[nn.Module], bool]
    biased: bool = True
    entered: Own[Entered] = field(default_factory=lambda: Own(Entered))
    layer: int = 0
    running: Own[Running] = field(default_factory=lambda: Own(Running))


def registered(implementation: str) -> str:
    """The name under which our function over an underlying implementation is registered."""
    return f"softbridge_{implementation}"


def underlying(implementation: str) -> str:
    """The implementation under a name of ours; any other name is its own."""
    return next((name for name in UNDERLYING if registered(name) == implementation), implementation)


def register() -> None:
    """Register our functions with transformers. Twice is as good as once."""
    masks = AttentionMaskInterface()
    for implementation in UNDERLYING:
        AttentionInterface.register(registered(implementation), partial(_attend, implementation))
        mask = masks[implementation]
        AttentionMaskInterface.register(
            registered(implementation), partial(_mask, mask) if implementation == "sdpa" else mask
        )


def _mask(make: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """SDPA's mask, also where transformers makes none for a fixed-size cache that is empty.

    There its SDPA cuts the keys to as many as there are queries. Without a mask, fewer queries than keys are the last
    ones to us, and virtual keys stand in front.
    """
    made, queries, keys = make(*args, **settings), settings.get("q_length"), settings.get("kv_length")
    if made is None and queries is not None and keys is not None and 1 < queries < keys:
        return make(*args, **{**settings, "allow_is_causal_skip": False})
    return made


def dispatches(module: nn.Module) -> bool:
    """Whether a module is an attention module that looks its function up in transformers' interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    own = sys.modules.get(type(module).__module__)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(own, "eager_attention_forward")


def bind(module: nn.Module, binding: Binding) -> None:
    """Give an attention module its prefix. Past `nn.Module`, so that the state dict names each parameter once."""
    module.__dict__[_BINDING] = binding


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    module.__dict__.pop(_BINDING, None)


def entering(module: nn.Module) -> Callable[..., None]:
    """A hook that keeps what enters a module, its first argument, until its attention function asks for it.

    It asks where the module's prefix has a gate.
    """
    return partial(_enter, next(iter(inspect.signature(module.forward).parameters)))


def _enter(first: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    binding: Binding = module.__dict__[_BINDING]
    if binding.source.gated:
        binding.entered.now.states = args[0] if args else kwargs[first]


def _above_float32(mask: Any) -> Any:
    """The mask, above the lowest float32.

    Some models compute the softmax in float32. There the lowest float64 is minus infinity, and a query that sees
    nothing (a pad on the left) becomes NaN, and with it all that follows.
    """
    if isinstance(mask, Tensor) and mask.dtype == torch.float64:
        return mask.clamp(min=torch.finfo(torch.float32).min)
    return mask


def _attend(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **settings: Any,
) -> Any:
    """Attention with what the layer has of a prompt: its prefix, and the adaption prompt beside it.

    Args: as `_attend_joined`.
    """
    near, binding = beside(module), module.__dict__.get(_BINDING)
    if near is not None and (nothing := near.watches(query, key, value, settings)) is not None:
        return nothing, None
    cached = None if binding is None else _cached(binding, key)
    if (
        cached is not None
        and attention_mask is None
        and implementation == "sdpa"
        and _sees_all(cached, query, settings)
    ):
        found = _FUNCTIONS[implementation](module, query, key, value, None, **settings)  # a step of decoding
    else:
        found = _attend_joined(implementation, binding, cached, module, query, key, value, attention_mask, settings)
    if near is None:
        return found
    output, *more = found
    return near.add(output, query), *more


def _attend_joined(
    implementation: str,
    binding: Binding | None,
    cached: Joined | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    settings: dict[str, Any],
) -> Any:
    """Attention with the layer's prefix.

    Args:
        implementation: a name from `UNDERLYING`.
        binding: of the module, or None.
        cached: what the cache has joined to the keys and values already.
        module: the attention module.
        query: [B, heads, Q, D].
        key: [B, K, N, D], N real tokens, those in the cache included; behind the virtual ones, if they are joined.
        value: [B, K, N, D].
        attention_mask: [B or 1, 1, Q or 1, >= N], bool or additive, or None; in flex attention a `BlockMask`, too; in
            flash attention [B, <= N].
        settings: as the underlying function takes them.
    """
    if implementation == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = _FUNCTIONS[implementation]
    rows, length, real = query.shape[0], query.shape[2], key.shape[2]
    attention_mask = _above_float32(attention_mask)
    joined = cached if binding is None or cached is not None else _joined(binding, module, key)
    if cached is not None:
        real -= cached.length
    if binding is not None and not binding.biased and not binding.off(module):
        settings["position_bias"] = torch.zeros_like(settings["position_bias"])
    seen = by_name(module, implementation) if implementation == FLASH else module
    if binding is None or joined is None:
        # The last queries alone: a model asks SDPA for them with a mask, but knows it by its own name only.
        alone = attention_mask is None and 1 < length < real and getattr(module, "is_causal", False)
        if alone and implementation in ("eager", "sdpa"):
            attention_mask = _past(query, real)
        return function(seen, query, key, value, attention_mask, **settings)

    if joined.sizes != (key.shape[1], value.shape[1], key.shape[3], value.shape[3]):
        raise _misfit(joined, module, key, value)
    unmasked = attention_mask is None and binding.causal and length == real
    long = joined.virtual >= SHORTEST or (unmasked and length >= TEXT)
    groups = _groups(joined, query, settings) if long and implementation == "sdpa" and cached is None else ()
    if groups and pays(groups, query, key, unmasked):
        found = _in_two_parts(module, binding, joined, groups, query, key, value, attention_mask, settings)
        return found, None
    if implementation == FLASH:
        attention_mask = packing(joined, attention_mask, settings, rows, real)
    else:
        attention_mask = _with_columns(binding, joined, query, real, attention_mask, settings)
    # Elsewhere the mask says what is past. In flash attention it does not; yet transformers 4 tells a padded GPT-2 that
    # it does, as in sdpa, and then it would look ahead.
    settings["is_causal"] = binding.causal and implementation == FLASH
    if implementation == FLEX and isinstance(attention_mask, Tensor):  # it asks for the score of each row and query
        attention_mask = _additive(attention_mask, query).expand(rows, -1, length, -1)
    if cached is None:
        keys, values = joined.rows(rows)
        key, value = torch.cat((keys, key), 2), torch.cat((values, value), 2)
    return function(seen, query, key, value, attention_mask, **settings)


def _cached(binding: Binding, key: Tensor) -> Joined | None:
    """What the cache has joined to these keys already; it is taken once.

    Raises:
        EngineError: the model made other keys of those that its cache handed over.
    """
    layer = binding.running.now.layers.pop(binding.layer, None)
    if layer is None or layer.whole is None:
        return None
    length = layer.whole[0].shape[2]
    if key.shape[2] != length:
        raise EngineError(
            f"attention to {key.shape[2]} keys where the cache holds {length}",
            "attention to what the cache holds",
            "call the model with use_cache=False, and report this",
        )
    return layer.prefix


def _sees_all(joined: Joined, query: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether a call without a mask is of one query a row, which sees all real and virtual tokens alike."""
    if query.shape[2] != 1 or settings.get("position_bias") is not None:
        return False
    return joined.seen or (joined.lengths is None and settings.get("sliding_window") is None)


def _joined(binding: Binding, module: nn.Module, key: Tensor) -> Joined | None:
    kept, entered = binding.entered.now, None
    if kept.states is not None:
        entered, kept.states = kept.states, None
    return None if binding.off(module) else binding.source.join(entered, key)


def _with_columns(
    binding: Binding, joined: Joined, query: Tensor, real: int, mask: Any, settings: dict[str, Any]
) -> Tensor | BlockMask | None:
    """The mask with columns for the virtual tokens in front; and so the bias in the settings, if there is one.

    All layers of a call that are given one mask, or none, get the same in return.
    """
    if mask is None and _sees_all(joined, query, settings):
        return None
    window = settings.get("sliding_window") if joined.stand.slides is not False else None
    positions = settings.get("position_ids")
    if isinstance(mask, BlockMask):
        return lengthened(mask, joined, query, real, window, None if window is None else _stands(positions))
    biased = settings.get("position_bias") is not None
    if biased or torch.compiler.is_compiling() or (mask is not None and mask.requires_grad):
        own = _own_mask(binding, joined, query, real, mask, window)
        if biased:
            bias = _bias(binding, joined, query.shape[2], real, own, settings["position_bias"])
            settings["position_bias"] = bias
        return None if own is None else _lengthened(joined, own, query.shape[2], window, positions)
    # What the mask is made of. While it is kept all of these are, so that no other tensor gets the id of one.
    of = (mask, joined.lengths, joined.stand.slides, None if window is None else positions)
    version = None if mask is None or mask.is_inference() else mask._version
    key = (*map(id, of), version, joined.length, real, window, binding.causal)
    key = (*key, query.shape[2], query.dtype, query.device)
    masks = binding.running.now.masks
    if key not in masks:
        own = _own_mask(binding, joined, query, real, mask, window)
        if len(masks) >= MASKS:
            masks.clear()
        masks[key] = of, None if own is None else _lengthened(joined, own, query.shape[2], window, positions)
    found: Tensor | None = masks[key][1]
    return found


def _own_mask(
    binding: Binding, joined: Joined, query: Tensor, real: int, mask: Tensor | None, window: int | None
) -> Tensor | None:
    """The mask of the real keys, or None where none is needed."""
    # No mask means causal, which SDPA's own flag would align to the first key; that one is virtual here.
    if mask is None and (window is not None or (binding.causal and query.shape[2] > 1)):
        mask = _past(query, real)
    if mask is None and joined.lengths is not None:
        mask = query.new_zeros(1, 1, 1, real)
    return None if mask is None else mask[..., :real]


def _lengthened(joined: Joined, mask: Tensor, length: int, window: int | None, positions: Tensor | None) -> Tensor:
    virtual = _columns(joined, mask, length, window, positions)
    return torch.cat([virtual, mask.expand(*virtual.shape[:-1], -1)], dim=-1)


def _groups(joined: Joined, query: Tensor, settings: Mapping[str, Any]) -> tuple[Group, ...]:
    """The groups of which all queries see all tokens, so that nothing but keys and queries decides how much of them.

    There are none where more decides that. A window leaves the last tokens of a prefix, the same for rows that stand
    alike.
    """
    more = (settings.get(name) for name in ("position_bias", "softcap", "s_aux", "head_mask"))
    gated = joined.gates is not None and torch.is_grad_enabled()
    if gated or settings.get("dropout") or any(setting is not None for setting in more):
        return ()
    window, slides = settings.get("sliding_window"), joined.stand.slides
    if window is None or slides is False:
        return joined.groups
    if query.shape[2] > 1 or query.device.type != "cpu" or isinstance(slides, Tensor) or torch.compiler.is_compiling():
        return ()
    last = _stands(settings.get("position_ids"))[:, -1]
    if bool((last != last[0]).any()):
        return ()
    gone = max(int(last[0]) - window + 1, 0)
    cut = ((g, g.keys[:, gone:], g.values[:, gone:]) for g in joined.groups)
    return tuple(replace(g, keys=keys, values=values) for g, keys, values in cut if keys.shape[1])


def _in_two_parts(
    module: nn.Module,
    binding: Binding,
    joined: Joined,
    groups: Sequence[Group],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    settings: Mapping[str, Any],
) -> Tensor:
    """What transformers' SDPA attention returns for the joined keys: [B, Q, heads, D]. See `_groups`."""
    length, real = query.shape[2], key.shape[2]
    causal = mask is None and binding.causal and length > 1
    if causal and length < real:
        mask, causal = _past(query, real), False
    if mask is not None:
        mask = _additive(mask[..., :real], query)
    scale = settings.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(query, key, value, mask, causal, scale, groups, joined.gates).transpose(1, 2).contiguous()


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """The mask, as what is added to the scores of these queries."""
    if mask.dtype == torch.bool:
        return query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
    return mask


def _past(query: Tensor, real: int) -> Tensor:
    """The additive mask [1, 1, Q, N] of queries that see no key after their own; the last query's is the last."""
    length = query.shape[2]
    hidden = torch.ones(length, real, dtype=torch.bool, device=query.device).triu(real - length + 1)
    return query.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(query.dtype).min)[None, None]


def _misfit(joined: Joined, module: nn.Module, key: Tensor, value: Tensor) -> EngineError:
    """The refusal of attention whose keys or values are of other shapes than the model's configuration let expect."""
    keys, values, key_width, value_width = joined.sizes
    return EngineError(
        f"{type(module).__name__} attends to keys {[key.shape[1], key.shape[3]]} and values "
        f"{[value.shape[1], value.shape[3]]} [heads, width]",
        f"keys {[keys, key_width]} and values {[values, value_width]}, as in the prefix",
        "use an input prompt on this model",
    )


def _columns(joined: Joined, mask: Tensor, length: int, window: int | None, positions: Tensor | None) -> Tensor:
    """The mask's columns for the virtual tokens, [B or 1, 1, Q or 1, P]: visible, unless a window slid past them."""
    prefix, lengths = torch.arange(joined.length, device=mask.device), joined.lengths
    gone: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    columns = mask.new_full((*mask.shape[:-1], joined.length), mask.dtype == torch.bool)
    if lengths is not None:  # [B, 1, 1, P]
        columns = torch.where(prefix < lengths[:, None, None], columns, gone)
    if window is None:
        return columns
    # A model that needs its last states only may ask for the last queries only.
    near, slides = _stands(positions)[:, None, -length:, None] - prefix < window, joined.stand.slides
    if isinstance(slides, Tensor):
        near = near | ~slides[:, None, None]
    return torch.where(near, columns, gone)


def _stands(positions: Tensor | None) -> Tensor:
    """Where the queries stand [B or 1, >= Q], which a window must know."""
    if positions is None:
        raise EngineError(
            "this model's attention layers do not learn where their queries stand, so a prefix cannot slide",
            "'position_ids' among the arguments of the attention function",
            "use a prompt whose window is 'pinned'",
        )
    return positions


def _bias(binding: Binding, joined: Joined, length: int, real: int, mask: Tensor | None, bias: Tensor) -> Tensor:
    """A T5-like bias [1, heads, Q, N] with columns for the virtual tokens in front: [B or 1, heads, Q, P + N].

    The model goes on sharing the bias without them among its layers.
    """
    prefix, table = joined.length, binding.bias
    if table is None:  # cross-attention has none, nor have layers that lost theirs
        return torch.cat([bias.new_zeros(*bias.shape[:-1], prefix), bias], dim=-1)
    slots, positions = _queries(binding.causal, length, real, mask, bias.device)
    virtual = torch.arange(prefix, device=bias.device) - (joined.stand.origin + positions)[..., None]
    if joined.stand.skewed:
        own = prefix if joined.lengths is None else joined.lengths[..., None]
        bias = _relative(table, own + torch.arange(real, device=bias.device) - slots[..., None])
    virtual_bias = _relative(table, virtual)
    batch = max(virtual_bias.shape[0], bias.shape[0])
    return torch.cat([part.expand(batch, -1, -1, -1).to(bias.dtype) for part in (virtual_bias, bias)], dim=-1)


def _queries(causal: bool, length: int, real: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The column in which each query's own key stands, and how far that is behind the row's pads: [B or 1, Q] each."""
    slots = torch.arange(length, device=device)[None]
    if mask is None:
        slots = slots + real - length
        return slots, slots
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > HIDDEN
    if causal:  # the last key that a query sees is its own, unless it is a pad; keys behind may be room in a cache
        last = (visible * torch.arange(real, device=device)).amax(-1)
        slots = slots + (last - slots).amax(-1, keepdim=True)
    pads = (visible.any(1).cumsum(-1) == 0).sum(-1, keepdim=True)
    return slots, (slots - pads).clamp(min=0)


def _relative(table: Any, distance: Tensor) -> Tensor:
    """The bias [B or 1, heads, Q, n] for key position minus query position [B or 1, Q, n], from a layer's own table."""
    bucket = table._relative_position_bucket(
        distance,
        bidirectional=not table.is_decoder,
        num_buckets=table.relative_attention_num_buckets,
        max_distance=table.relative_attention_max_distance,
    )
    bias: Tensor = table.relative_attention_bias(bucket)
    return bias.movedim(-1, 1)
