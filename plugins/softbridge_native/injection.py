"""A soft prompt in a transformers model: where its parameters live, and what is changed in the model to run it.

The model keeps its class. Its stacks (the module under the heads, or the encoder and the decoder) get the hooks of
`softbridge_native.input_prompt`, and its attention modules the prefixes of `softbridge_native.attention`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from softbridge.errors import EngineError
from softbridge.geometry import Geometry, Site, Stack, read_geometry, stack_of
from softbridge.methods import KINDS, rematerialise
from softbridge.prompt import AdaptionPrompt, InputPrompt, Joins, KeyValuePrefix, Part, SoftPrompt
from softbridge_native import adaption, wiring
from softbridge_native import cache_prefix as seed
from softbridge_native.anatomy import (
    NAME,
    bias_table,
    counts_pads,
    embedding_block,
    name_attention,
    outer_of,
    pools_first_token,
    position_table,
    restore_names,
    stacks_of,
    tellable,
    word,
)
from softbridge_native.attention import Binding, bind, entering, registered, unbind, underlying
from softbridge_native.attention_wiring import attention_modules, wiring_of
from softbridge_native.call import Own, Switch, hook, unhook
from softbridge_native.input_prompt import Circumstances, Shift, StackHooks, Vectors
from softbridge_native.joined_cache import Running, keep
from softbridge_native.layout import home, origin_of
from softbridge_native.obstacles import check
from softbridge_native.parameterisation import Making, Parameterisation, trainable
from softbridge_native.prefix import LayerPrefix, Nothing, Source, Stand, stand_of
from softbridge_native.selfcheck import SelfCheck


class Prefix(nn.Module):
    """A prefix: one `LayerPrefix` for each of its layers, on the device of the attention module that it joins.

    Where a parameterisation makes it (see `parameterisation.Made`), its rows [P, W] hold layer after layer, as in
    `KeyValuePrefix.from_rows`.
    """

    def __init__(self, part: KeyValuePrefix, devices: Mapping[int, torch.device], stand: Stand, made: bool) -> None:
        super().__init__()
        self.stack: Stack = stack_of(part.site)
        self.site: Site | None = part.site
        self.layers = nn.ModuleDict()
        for layer, pair in part.layers.items():
            self.layers[str(layer)] = LayerPrefix(pair, stand, devices[layer], made)

    @property
    def _each(self) -> Iterable[Any]:
        return self.layers.values()

    def _pairs(self, flat: Tensor) -> Iterator[tuple[LayerPrefix, Tensor, Tensor]]:
        at = 0
        for layer in self._each:
            heads, length, width = layer.keys.shape
            rows = flat[:, at : at + 2 * heads * width].reshape(length, 2, heads, width).transpose(0, 2)
            at += 2 * heads * width
            yield layer, rows[:, 0], rows[:, 1]

    def hold(self, flat: Tensor) -> None:
        for layer, keys, values in self._pairs(flat):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            layer.leaves = None

    def use(self, flat: Tensor | None) -> Sequence[Tensor]:
        if flat is None:
            for layer in self._each:
                layer.used.now.pair = None
            return ()
        for layer, keys, values in self._pairs(flat):
            layer.used.now.pair, layer.leaves = (keys, values), None
        return [tensor for layer in self._each for tensor in layer.used.now.pair]

    def branch(self) -> Sequence[Tensor]:
        for layer in self._each:
            layer.leaves = tuple(tensor.detach().requires_grad_() for tensor in layer.used.now.pair)
        return [leaf for layer in self._each for leaf in layer.leaves]

    def extract(self, part: KeyValuePrefix) -> KeyValuePrefix:
        pairs = zip(part.layers.items(), self._each, strict=True)
        return replace(part, layers={number: layer.extract(pair) for (number, pair), layer in pairs})


def _devices(modules: Mapping[int, nn.Module], device: torch.device) -> Mapping[int, torch.device]:
    """Where each layer's prefix is to be: with its attention module, if that is known."""
    found = {layer: home(next(module.parameters()).device) for layer, module in modules.items()}
    return defaultdict(lambda: device, found)


class Reached:
    """Whether a stack was."""

    def __init__(self) -> None:
        self.stack = False


class Injection(nn.Module, ABC):
    """What is put into a model: where the prompt lives, and what is needed to restore the model.

    Attributes:
        handles: of all hooks.
        reached: whether a stack has run since the model was called, in the running thread.
        switch: switches the prompt off.
        owner: a name that no other attachment has, nor does it change in a copy.
        cached: the layers whose prefix a cache may keep; see `joined_cache`.
        running: what the layers of the running call know of each other.
        apart: whether attention can run in two parts; see `shared_prefix`.
        bound: the attention modules that hold a prefix, or have an adaption prompt beside them.
        hooked: the stacks.
        implementations: each configuration in the model, with the attention implementation that it named.
        trainable: the model's parameters that were trainable.
        check: how the engine checks itself before the first call, or None.
        unbiased_from: as in `softbridge.prompt.soft_prompt.Positions`.
        virtual_logits: whether states and logits of virtual tokens are to be returned, too, in their places: P + T of
            them. Off unless set; there is no loss then, as labels are of real tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []
        self.reached = Own(Reached)
        self.switch = Switch()
        self.owner = uuid4().hex
        self.cached: dict[int, Source] = {}
        self.running: Own[Running] = Own(Running)
        self.apart = False
        self.bound: list[nn.Module] = []
        self.hooked: list[nn.Module] = []
        self.implementations: list[tuple[Any, str]] = []
        self.trainable: list[nn.Parameter] = []
        self.check: SelfCheck | None = None
        self.unbiased_from: Mapping[Stack, int] = {}
        self.virtual_logits = False

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model runs; no stack has been reached yet."""
        self.reached.now.stack = False
        if self.virtual_logits and kwargs.get("labels") is not None:
            raise EngineError(
                "labels, which are for real tokens only, and logits that include virtual tokens",
                "a call without labels while model.softbridge.virtual_logits is on",
                "set it to False to train or to compute a loss",
            )

    def off(self) -> AbstractContextManager[None]:
        """Let the calls of this thread run without the prompt inside the ``with``: the base model, with its head."""
        return self.switch.off()

    def shows(self) -> bool:
        """Whether states and logits of virtual tokens are returned."""
        return self.virtual_logits

    def reach(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stack runs."""
        if self.check is not None and not self.switch.is_off(stack):
            self.check.call(stack, args, kwargs)
        self.reached.now.stack = True
        self.running.now.forget()

    def quit(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A stack has run, or failed."""
        self.running.now.forget()

    def keep(self, cache: Any) -> None:
        """A stack runs with a cache, which may keep the prefix for it where no gradient is wanted."""
        mark = self.mark() if self.cached and not torch.is_grad_enabled() else None
        if mark is not None:
            keep(cache, self.cached, self.running, mark, self.apart)

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A model that calls its layers past the stack would drop the prompt silently."""
        if not self.reached.now.stack:
            raise EngineError(
                f"{type(model).__name__} ran without calling the stack that carries the prompt",
                "a model that calls the stack under its head",
                "attach to another class of the same family, or use a toolkit's engine",
            )

    @abstractmethod
    def sources(self) -> Iterator[tuple[Site, int, Source, bool]]:
        """Which attention modules to bind: their site and layer, to what, and whether a gate is on it."""

    @abstractmethod
    def mark(self) -> object:
        """One and the same object as long as one prefix joins, in each layer, whatever enters; None: it may be another.

        It is asked for at every step of decoding.
        """

    def besides(self) -> Iterator[tuple[Site, int, adaption.LayerAdaption, Joins]]:
        """Which attention modules have an adaption prompt beside them: site, layer, numbers, and what they join."""
        yield from ()

    @abstractmethod
    def hooks(self, name: Stack, stack: nn.Module, around: Circumstances) -> StackHooks:
        """The hooks of a stack."""

    def places(self, name: Stack) -> int:
        """By how many places all tokens of a stack are moved that counts them by itself."""
        return 0


class Single(Injection):
    """One prompt, for all rows.

    Attributes:
        prompt: as it was attached.
        gated: whether a gate is on any prefix.
        parts: one module for each of the prompt's parts.
        parameterisation: what makes some of them, or None.
    """

    def __init__(
        self, prompt: SoftPrompt, modules: Mapping[Site, Mapping[int, nn.Module]], device: torch.device
    ) -> None:
        super().__init__()
        self.prompt = prompt
        self.unbiased_from = prompt.positions.unbiased_from
        self.seeded = bool(prompt.prefixes) and not modules[prompt.prefixes[0].site]
        kind = KINDS[prompt.training.kind] if prompt.training is not None and trainable(prompt) else None
        made = [kind is not None and kind.makes(part) for part in prompt.parts]

        def module_of(part: Part, pieces: bool) -> Prefix | Vectors | adaption.Adaptions:
            match part:
                case InputPrompt():
                    return Vectors(part, device, pieces)
                case AdaptionPrompt():
                    return adaption.Adaptions(part, _devices(modules[part.site], device))
            return Prefix(part, _devices(modules[part.site], device), stand_of(prompt, part.site), pieces)

        parts = [module_of(part, pieces) for part, pieces in zip(prompt.parts, made, strict=True)]
        produced: list[Any] = [part for part, pieces in zip(parts, made, strict=True) if pieces]
        state = prompt.training if produced else None
        self.gated = any(part.gated for part in prompt.prefixes)
        self.parts = nn.ModuleList(parts)
        self.parameterisation = None if state is None else Parameterisation(state, produced, device)

    def sources(self) -> Iterator[tuple[Site, int, Source, bool]]:
        for module in self.parts:
            if isinstance(module, Prefix) and module.site is not None and not self.seeded:
                for layer, source in module.layers.items():
                    if isinstance(source, LayerPrefix):
                        yield module.site, int(layer), source, source.gate is not None

    def mark(self) -> object:
        # A gate makes another prefix of it in each call. A parameterisation does so where a gradient is wanted.
        return None if self.gated else self

    def besides(self) -> Iterator[tuple[Site, int, adaption.LayerAdaption, Joins]]:
        for module in self.parts:
            if isinstance(module, adaption.Adaptions):
                for layer, source in module.sources():
                    yield module.site, layer, source, module.joins

    def hooks(self, name: Stack, stack: nn.Module, around: Circumstances) -> StackHooks:
        own = next((part for part in self.parts if isinstance(part, Vectors) and part.stack == name), None)
        source = self.parameterisation
        made = () if source is None else [part for part in source.parts if part.stack == name]
        making = Making(source, made) if source is not None and made else None
        start = self.prompt.positions.start.get(name, 0)
        prefix: Any = self.parts[0] if self.seeded else None
        planted = None if prefix is None else seed.Seed(list(prefix.layers.values()), seed.padded(stack))
        return StackHooks(stack, around, own, start, making, planted)

    def places(self, name: Stack) -> int:
        counted = self.prompt.prefixes[0].length if self.seeded else 0  # a cache that starts with it counts it
        return origin_of(self.prompt, name) - counted

    def extract(self) -> SoftPrompt:
        """The prompt as it is now. A changed one has no origin, and no parameterisation but one that was trained."""
        modules: Iterable[Any] = self.parts
        parts: tuple[Part, ...] = tuple(
            module.extract(part) for module, part in zip(modules, self.prompt.parts, strict=True)
        )
        training = None if self.parameterisation is None else self.parameterisation.extract()
        if parts == self.prompt.parts and (training is None or training is self.prompt.training):
            return self.prompt
        changed = replace(self.prompt, parts=parts, training=training, origin=None)
        return changed if training is None else rematerialise(changed)


def attach(model: Any, prompt: SoftPrompt) -> Any:
    """Attach in place. See `Engine.attach`."""
    check(prompt, model)
    geometry = read_geometry(model.config)
    single = Single(prompt, attention_modules(model, geometry), home(model.device))
    return install(model, single, geometry, bool(prompt.prefixes) and not single.seeded, prompt.head)


def install(model: Any, injected: Injection, geometry: Geometry, prefixed: bool, head: Iterable[str]) -> Any:
    """Put an injection into the model, and freeze all of the model but the head's parameters of these names."""
    if NAME in model._modules:
        raise EngineError(
            f"this {type(model).__name__} has a prompt attached already", "a model without one", "detach that one first"
        )
    modules, head = attention_modules(model, geometry), set(head)
    stacks = stacks_of(model, geometry).items()
    pads = {name for name, stack in stacks if not tellable(stack) and wiring.knows_pads(stack)}
    injected.trainable = [p for name, p in model.named_parameters() if p.requires_grad and name not in head]
    for parameter in injected.trainable:
        parameter.requires_grad_(False)
    model.add_module(NAME, injected.train(model.training))
    # An input prompt needs of ours, in eager attention, what bounds the mask: see `attention._above_float32`.
    besides = list(injected.besides())
    if prefixed or besides or (any(modules.values()) and model.config._attn_implementation == "eager"):
        _switch_attention(model, injected)
    if prefixed:
        _bind(injected, modules, wiring_of(model, geometry))
    for site, layer, source, joins in besides:
        injected.bound.append(modules[site][layer])
        injected.handles += adaption.bind(modules[site][layer], source, joins, injected.switch.is_off)
    _hook(model, injected, geometry, pads, prefixed)
    return model


def extract(model: Any) -> SoftPrompt:
    """The prompt as it is now. See `Engine.extract`."""
    found = injection(model)
    if not isinstance(found, Single):
        raise EngineError(
            "this model has a bank of prompts, none of which is trained",
            "a model with one prompt",
            "take it from the bank: model.softbridge.bank[name]",
        )
    return found.extract()


def detach(model: Any) -> Any:
    """Restore the model bit for bit. See `Engine.detach`."""
    injected = injection(model)
    for handle in injected.handles:
        handle.remove()
    for module in injected.bound:
        unbind(module)
        adaption.unbind(module)
    for stack in injected.hooked:
        unhook(stack)
    restore_names(injected.implementations)
    for parameter in injected.trainable:
        parameter.requires_grad_(True)
    del model._modules[NAME]
    return model


def injection(model: Any) -> Injection:
    """What `attach` put into the model.

    Raises:
        EngineError: nothing.
    """
    found = model._modules.get(NAME)
    if not isinstance(found, Injection):
        raise EngineError(
            f"this {type(model).__name__} has no prompt of the native engine",
            "a model with one",
            "attach a prompt first",
        )
    return found


def _switch_attention(model: Any, injected: Injection) -> None:
    """Let every configuration in the model name our function over the attention that it named."""
    named = model.config._attn_implementation
    injected.implementations, injected.apart = name_attention(model, registered(named)), underlying(named) == "sdpa"


def _hook(model: Any, injected: Injection, geometry: Geometry, pads: Iterable[Stack], prefixed: bool) -> None:
    """Hook the stacks, and the model around them. Those of `pads` find pads by their token ids."""
    handles, off = injected.handles, injected.switch.is_off
    handles.append(model.register_forward_pre_hook(injected.enter, with_kwargs=True))
    handles.append(model.register_forward_hook(injected.leave))
    pools = pools_first_token(model, geometry)
    implementation = model.config._attn_implementation if injected.implementations else None
    for name, stack in stacks_of(model, geometry).items():
        crossed = geometry.is_encoder_decoder and name == "encoder"
        table, places = position_table(stack), injected.places(name)
        if table is not None and places and not tellable(stack):
            handles.append(table.register_forward_pre_hook(Shift(table, places, off).before, with_kwargs=True))
        around = Circumstances(implementation, crossed, pools, injected.shows, off, injected.owner, word(model.config))
        around = replace(around, knows_pads=name in pads, prefixed=prefixed, keep=injected.keep)
        outer = outer_of(model, geometry)
        if outer is not None:
            around = replace(around, counts_pads=counts_pads(outer, stack))
        hooks = injected.hooks(name, stack, around)
        if outer is not None:
            hooks.surround(outer, hook(outer))
            injected.hooked.append(outer)
            handles += [
                outer.register_forward_pre_hook(hooks.before_outer, with_kwargs=True),
                outer.register_forward_hook(hooks.after_outer, always_call=True),
            ]
        hooks.entry = hook(stack)
        injected.hooked.append(stack)
        handles += [
            stack.register_forward_pre_hook(injected.reach, with_kwargs=True),
            stack.register_forward_pre_hook(hooks.before, with_kwargs=True),
            stack.register_forward_hook(hooks.after, always_call=True),
            stack.register_forward_hook(injected.quit, always_call=True),
            stack.get_input_embeddings().register_forward_hook(hooks.embedded),
        ]
        block = embedding_block(stack)
        if block is not None:
            handles.append(block.register_forward_pre_hook(hooks.before_block, with_kwargs=True))
            handles.append(block.register_forward_hook(hooks.after_block))
        if crossed:
            decoder = stacks_of(model, geometry)["decoder"]
            handles.append(decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True))


def _bind(injected: Injection, modules: Mapping[Site, Mapping[int, nn.Module]], wired: wiring.Wiring | None) -> None:
    off = injected.switch.is_off
    sources = list(injected.sources())
    prefixed = {(site, layer) for site, layer, *_ in sources}
    for stack, first in injected.unbiased_from.items():
        here: Site = "encoder" if stack == "encoder" else "self"
        rest = (layer for layer in modules[here] if layer >= first and (here, layer) not in prefixed)
        sources += [(here, layer, Nothing(), False) for layer in rest]
    for site, layer, source, gated in sources:
        table = None if site == "cross" else bias_table(nn.ModuleList(modules[site].values()))
        biased = table is None or layer < injected.unbiased_from.get(stack_of(site), layer + 1)
        # A layer that attends to another's keys and values attends to that one's prefix.
        layers = wired.layers if wired is not None and site == "self" else tuple(modules[site])
        for number, module in zip(layers, modules[site].values(), strict=True):
            if layer != number:
                continue
            causal = site != "cross" and getattr(module, "is_causal", site == "self")
            bias = None if table is None or not biased else bias_table(module) or table
            bind(module, Binding(source, causal, bias, off, biased, layer=layer, running=injected.running))
            injected.bound.append(module)
            # A module that makes a bias asks the keys that its cache hands over how many they are.
            if wired is not None and not wired.biased and site == "self" and layers.count(layer) == 1:
                injected.cached[layer] = source
            if gated:
                injected.handles.append(module.register_forward_pre_hook(entering(module), with_kwargs=True))
