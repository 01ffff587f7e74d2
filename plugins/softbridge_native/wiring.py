"""What a stack's attention is called with, watched while it runs on one token.

A prefix joins keys and values where they enter the attention function. That is the same as a cache which starts with
it only if they come from the cache as they are, and if nothing else there was made of them. It is measured here, on
the model itself: no list of architectures could be complete.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from softbridge.base import cache as caches
from softbridge_native.anatomy import word
from softbridge_native.call import past_hooks

#: The name under which attention is watched.
WATCHED = "softbridge_watched"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention function.

    Attributes:
        module: the attention module.
        key: as the function has it.
        value: as the function has it.
        remade: whether the module made the mask itself.
        placed: whether it says where its queries stand.
        biased: whether it adds a bias to its scores.
    """

    module: nn.Module
    key: Tensor
    value: Tensor
    remade: bool
    placed: bool
    biased: bool


@dataclass(frozen=True, eq=False)
class Wiring:
    """What one token showed.

    Attributes:
        called: the attention modules that ran, in their order.
        layers: for each, the number of the layer whose keys and values in the cache it attends to; None: no layer's.
        shapes: for each, heads and width of its keys, and of its values.
        single: whether any of them takes one tensor for keys and for values.
        remade: whether any of them makes its mask itself.
        placed: whether all of them pass their attention function the positions of their queries.
        biased: whether any of them adds a bias to its scores.
    """

    called: tuple[nn.Module, ...]
    layers: tuple[int | None, ...]
    shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    single: bool
    remade: bool
    placed: bool
    biased: bool


_calls: ContextVar[list[Call] | None] = ContextVar("softbridge_calls", default=None)
_passed: ContextVar[dict[nn.Module, list[Any]] | None] = ContextVar("softbridge_passed", default=None)
_known: WeakKeyDictionary[nn.Module, Wiring | None] = WeakKeyDictionary()
_plain: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_filled: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_pads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def wiring(
    stack: Any, named: Callable[[str], AbstractContextManager[None]], crossed: bool, numbers: Sequence[int]
) -> Wiring | None:
    """What the attention of a stack is called with. It is found out once.

    None where the stack cannot be run so: nothing is known then.

    Args:
        stack: of a model.
        named: gives a context in which the model's configurations name this attention.
        crossed: whether each layer attends to another stack's states, too, after its own.
        numbers: of the layers that attend.
    """
    if stack not in _known:
        try:
            _known[stack] = _watch(stack, named, crossed, numbers)
        except Exception:  # foreign code; nothing is known
            _known[stack] = None
    return _known[stack]


def _watch(
    stack: Any, named: Callable[[str], AbstractContextManager[None]], crossed: bool, numbers: Sequence[int]
) -> Wiring:
    AttentionInterface.register(WATCHED, _look)
    AttentionMaskInterface.register(WATCHED, AttentionMaskInterface()["eager"])
    more: dict[str, Any] = {}
    if crossed:
        weight = stack.get_input_embeddings().weight
        more["encoder_hidden_states"] = weight.new_zeros(1, 1, stack.config.hidden_size)
    calls, passed = _calls.set([]), _passed.set({})
    handles = [module.register_forward_pre_hook(_tell, with_kwargs=True) for module in stack.modules()]
    try:
        with named(WATCHED):
            output = one_token(stack, use_cache=True, **more)
        found = _calls.get() or []
    finally:
        for handle in handles:
            handle.remove()
        _calls.reset(calls)
        _passed.reset(passed)
    cache = caches.of(output)
    held = caches.pairs(getattr(cache, "self_attention_cache", cache))
    own = found[::2] if crossed else found
    if not held:  # an encoder, or a stack that returns no cache: then each has its own
        firsts = [next(at for at, other in enumerate(own) if other.key is call.key) for call in own]
        layers: list[int | None] = [numbers[first] if len(own) == len(numbers) else first for first in firsts]
    else:
        layers = [_layer(call, held) for call in own]
    return Wiring(
        tuple(call.module for call in found),
        tuple(layers),
        tuple((_size(call.key), _size(call.value)) for call in own),
        any(call.key is call.value for call in own),
        any(call.remade for call in own),
        all(call.placed for call in own),
        any(call.biased for call in own),
    )


def _size(half: Tensor) -> tuple[int, int]:
    return half.shape[1], half.shape[3]


def _layer(call: Call, held: Mapping[int, tuple[Any, Any]]) -> int | None:
    """The number of the layer whose keys and values a call has."""
    pairs = held.items()
    return next((n for n, (key, value) in pairs if _same(key, call.key) and _same(value, call.value)), None)


def _same(held: Any, called: Tensor) -> bool:
    if held is called:
        return True
    like = isinstance(held, Tensor) and held.shape == called.shape and held.device == called.device
    return like and not called.is_meta and bool(torch.equal(held, called))


def _tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    passed = _passed.get()
    if passed is not None:
        passed[module] = [given for given in (*args, *kwargs.values()) if isinstance(given, Tensor)]


def _look(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    calls, passed = _calls.get(), _passed.get()
    if calls is not None and passed is not None:
        given = passed.get(module, [])
        # A slice of what was given has its memory.
        remade = isinstance(attention_mask, Tensor) and not any(
            one is attention_mask or one.untyped_storage()._cdata == attention_mask.untyped_storage()._cdata
            for one in given
        )
        placed, biased = (settings.get(name) is not None for name in ("position_ids", "position_bias"))
        calls.append(Call(module, key, value, remade, placed, biased))
    own: Any = sys.modules[type(module).__module__]
    return own.eager_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]


def one_token(stack: Any, ids: Tensor | None = None, **given: Any) -> Any:
    """The output of a stack for one token, or for those given, past the hooks of what is attached."""
    if ids is None and given.get("inputs_embeds") is None:
        ids = some_token(stack)
    takes = inspect.signature(stack.forward).parameters
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
        given = {name: value for name, value in given.items() if name in takes}
    with undisturbed(stack):
        return past_hooks(stack.eval())(**({} if ids is None else {"input_ids": ids}), **given)


@contextmanager
def undisturbed(stack: Any) -> Iterator[None]:
    """A model of the user's runs here, and is then as it was: its modes, what it keeps of a call, the random numbers.

    Weights that are elsewhere (offloaded, or in shards) are not brought here for it: that moves memory, and in shards
    every process would have to take part.

    Raises:
        NotHere: some are.
    """
    if not all(_is_here(parameter) for parameter in stack.parameters()):
        raise NotHere
    kept = [(m, m.training, dict(vars(m)), dict(m._buffers)) for m in stack.modules()]
    devices = {parameter.device.index for parameter in stack.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, training, state, buffers in kept:
            module.training = training
            for name in set(vars(module)) - set(state):
                del vars(module)[name]
            vars(module).update(state)
            module._buffers.clear()
            module._buffers.update(buffers)


class NotHere(Exception):  # noqa: N818
    """Some weights are elsewhere."""


def _is_here(parameter: Tensor) -> bool:
    """Whether a parameter is whole, and has its numbers: FSDP, DeepSpeed and DTensor keep parts, accelerate none."""
    sharded = any(hasattr(parameter, name) for name in ("placements", "ds_id", "_is_flat_param"))
    return not sharded and not parameter.is_meta and parameter.numel() > 0


def some_token(stack: Any) -> Tensor:
    """A token [1, 1] that means nothing particular: it is no pad, which may stand elsewhere."""
    words = stack.get_input_embeddings()
    return torch.full((1, 1), word(stack.config), dtype=torch.long, device=words.weight.device)


def embeds(stack: Any) -> str | None:
    """Why a token's embedding is not all that a stack knows of it, or None if it is. It is found out once.

    Only of a decoder is that asked to the last digit: in the middle of a text it meets tokens again by their numbers.
    """
    if stack not in _plain:
        _plain[stack] = _asked(stack)
    return _plain[stack]


def _asked(stack: Any) -> str | None:
    words = stack.get_input_embeddings()
    ids = some_token(stack)
    try:
        output = one_token(stack, ids)
    except Exception:  # foreign code, and no fault of embeddings
        return None
    expected = output[0]
    more = [name for name, value in _fields(output) if value.ndim == 3 and value is not expected]
    if more:
        return f"returns more states of each token than the last hidden ones ({', '.join(more)})"
    try:
        with torch.no_grad():
            embedded = words(ids)
        found = one_token(stack, inputs_embeds=embedded)[0]
    except Exception as error:  # foreign code
        return f"cannot be run on embeddings ({type(error).__name__})"
    if expected.is_meta or found.shape != expected.shape:
        return None
    apart, size = float((found - expected).abs().max()), float(expected.abs().max())
    return "makes something else of tokens that are given as embeddings" if apart > 1e-2 * size else None


def looks_up(stack: Any) -> str | None:
    """Why the output of its word embedding is not all that a stack knows of a token, or None if it is.

    Asked of a stack that takes token ids alone, with two words: one's embedding is given in the place of the other's.
    It is found out once.
    """
    if stack not in _filled:
        _filled[stack] = _filled_in(stack)
    return _filled[stack]


def _filled_in(stack: Any) -> str | None:
    words = stack.get_input_embeddings()
    own = some_token(stack)
    other = torch.full_like(own, words.num_embeddings - 1)
    try:
        expected = one_token(stack, other)[0]
    except Exception:  # foreign code, and no fault of embeddings
        return None
    with torch.no_grad():
        row = words(other)
    handle = words.register_forward_hook(lambda module, args, output: row)
    try:
        found = one_token(stack, own)[0]
    finally:
        handle.remove()
    return None if expected.is_meta or torch.equal(found, expected) else "knows a word by more than its embedding"


def knows_pads(stack: Any) -> bool:
    """Whether a stack finds by their token ids which tokens are pads, and counts others without them (M2M-100's).

    Among embeddings it finds none, and counts them. It is found out once.
    """
    if stack not in _pads:
        try:
            _pads[stack] = _counts_otherwise(stack)
        except Exception:  # foreign code; nothing is known
            _pads[stack] = False
    return _pads[stack]


def _counts_otherwise(stack: Any) -> bool:
    ids = some_token(stack).expand(1, 4).clone()
    ids[:, :2] = stack.config.pad_token_id
    mask = torch.tensor([[0, 0, 1, 1]], device=ids.device)
    with torch.no_grad():
        both: list[dict[str, Tensor]] = [{"ids": ids}, {"inputs_embeds": stack.get_input_embeddings()(ids)}]
    expected, found = (one_token(stack, attention_mask=mask, **given)[0][:, -1] for given in both)
    return float((found - expected).abs().max()) > 1e-2 * float(expected.abs().max())


def _fields(output: Any) -> list[tuple[str, Tensor]]:
    named = output.items() if hasattr(output, "items") else ()
    return [(name, value) for name, value in named if isinstance(value, Tensor)]
