"""A soft prompt in a transformers model: where its parameters live, and what is changed in the model to run it.

The model keeps its class. Its stacks (the module under the heads, or the encoder and the decoder) get the hooks of
`softbridge_native.placement`, and its attention modules the prefixes of `softbridge_native.attention`.
"""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import flash_attn_supports_top_left_mask

from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry, Site, Stack, read_geometry, stack_of
from softbridge.lower import check_fits
from softbridge.methods import KINDS, rematerialise
from softbridge.prompt import KeyValuePrefix, Part, SoftPrompt
from softbridge_native import seed, wiring
from softbridge_native.attention import (
    FLASH,
    FLEX,
    UNDERLYING,
    Binding,
    LayerPrefix,
    Nothing,
    Source,
    Stand,
    bind,
    dispatches,
    enter,
    register,
    registered,
    unbind,
    underlying,
)
from softbridge_native.call import Own, Switch, hook, past_hooks, unhook
from softbridge_native.parameterisation import Making, Parameterisation, trainable
from softbridge_native.placement import (
    Circumstances,
    Shift,
    StackHooks,
    Vectors,
    counted,
    embedding_block,
    home,
    position_table,
    word,
)
from softbridge_native.selfcheck import SelfCheck

#: The submodule of the model that holds the prompt.
NAME = "softbridge"


class Prefix(nn.Module):
    """A prefix: one `LayerPrefix` for each of its layers, on the device of the attention module that it joins.

    Where a network makes it (see `parameterisation.Made`), its rows [P, W] hold layer after layer, as in
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
        bound: the attention modules that hold a prefix.
        hooked: the stacks.
        implementations: each configuration in the model, with the attention implementation that it named.
        trainable: the model's parameters that were trainable.
        check: how the engine checks itself before the first call, or None.
        unbiased_from: as in `softbridge.prompt.Positions`.
        virtual_logits: whether states and logits of virtual tokens are to be returned, too, in their places: P + T of
            them. Off unless set; there is no loss then, as labels are of real tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []
        self.reached = Own(Reached)
        self.switch = Switch()
        self.owner = uuid4().hex
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
                "labels, which are of real tokens, and logits of virtual tokens",
                "a call without labels while model.softbridge.virtual_logits is on",
                "set it to False to train or to compute a loss",
            )

    def off(self) -> AbstractContextManager[None]:
        """Let the calls of this thread run without the prompt inside the ``with``: the base model, with its head."""
        return self.switch.off()

    def shows(self) -> bool:
        """Whether what is of virtual tokens is to be returned."""
        return self.virtual_logits

    def reach(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stack runs."""
        if self.check is not None and not self.switch.is_off(stack):
            self.check.call(stack, args, kwargs)
        self.reached.now.stack = True

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A model that calls its layers past the stack would drop the prompt without a word."""
        if not self.reached.now.stack:
            raise EngineError(
                f"{type(model).__name__} ran without calling the stack that carries the prompt",
                "a model that calls the stack under its head",
                "attach to another class of the same family, or use a toolkit's engine",
            )

    @abstractmethod
    def sources(self) -> Iterator[tuple[Site, int, Source, bool]]:
        """Which attention modules are to be bound: their site and layer, to what, and whether a gate is on it."""

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
        parts = [
            Prefix(part, _devices(modules[part.site], device), stand_of(prompt, part.site), network)
            if isinstance(part, KeyValuePrefix)
            else Vectors(part, device, network)
            for part, network in zip(prompt.parts, made, strict=True)
        ]
        networks = [part for part, network in zip(parts, made, strict=True) if network]
        state = prompt.training if networks else None
        self.parts = nn.ModuleList(parts)
        self.parameterisation = None if state is None else Parameterisation(state, networks, device)

    def sources(self) -> Iterator[tuple[Site, int, Source, bool]]:
        for module in self.parts:
            if isinstance(module, Prefix) and module.site is not None and not self.seeded:
                for layer, source in module.layers.items():
                    if isinstance(source, LayerPrefix):
                        yield module.site, int(layer), source, source.gate is not None

    def hooks(self, name: Stack, stack: nn.Module, around: Circumstances) -> StackHooks:
        own = next((part for part in self.parts if isinstance(part, Vectors) and part.stack == name), None)
        network = self.parameterisation
        made = () if network is None else [part for part in network.parts if part.stack == name]
        making = Making(network, made) if network is not None and made else None
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


def check(prompt: SoftPrompt, model: Any) -> None:
    """Raise an `EngineError` with all obstacles to this prompt on this model."""
    found = obstacles(prompt, model)
    if found:
        raise EngineError(
            f"engine 'native' cannot run this prompt on this {type(model).__name__}: "
            + "; ".join(f"[{obstacle.name}] {obstacle.reason}" for obstacle in found),
            "a prompt and a model that the engine can run",
            "; ".join(dict.fromkeys(obstacle.remedy for obstacle in found)),
        )


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
    try:
        # An input prompt needs of ours, in eager attention, what bounds the mask: see `attention._above_float32`.
        if prefixed or (any(modules.values()) and model.config._attn_implementation == "eager"):
            _switch_attention(model, injected)
        if prefixed:
            _bind(injected, modules, _wiring(model, geometry))
        _hook(model, injected, geometry, pads, prefixed)
    except BaseException:
        detach(model)
        raise
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
    for stack in injected.hooked:
        unhook(stack)
    _restore_names(injected.implementations)
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


def obstacles(prompt: SoftPrompt, model: Any) -> list[Obstacle]:
    """What stands against running this prompt on this model. See `Engine.obstacles`."""
    try:
        geometry = read_geometry(model.config)
        check_fits(prompt, geometry)
    except BaseModelError as error:
        return [Obstacle("base-model", error.found, error.remedy)]
    found = []
    stacks = stacks_of(model, geometry)
    for name, stack in stacks.items():
        if not _has_tokens(stack):
            reason = f"{type(stack).__name__} has no token embeddings, or does not say which they are"
            others = [other for other in stacks if other != name and _has_tokens(stacks[other])]
            remedy = f"use a prompt of the {others[0]}" if others else "use another engine"
            if any(part.stack == name for part in prompt.inputs) or not hasattr(stack, "config"):
                found.append(Obstacle("entry", reason, remedy))
    if found:
        return found
    for part in prompt.inputs:
        stack = stacks[part.stack]
        if part.entry == "after" and embedding_block(stack) is None:
            reason = f"{type(stack).__name__} has no module that is its embedding block and keeps its width"
            found.append(Obstacle("entry", reason, "use a prompt whose vectors enter before the embedding block"))
        if part.template is not None and outer_of(model, geometry) is not None:
            reason = "a template's places are token ids, and this model makes embeddings of them before its stack runs"
            found.append(Obstacle("entry", reason, "use a prompt in front of the sequence"))
        width = stack.get_input_embeddings().weight.shape[1]
        if part.entry == "before" and part.vectors.shape[1] != width:
            given = part.vectors.shape[1]
            reason = f"tokens of {type(stack).__name__} have embeddings of {width} numbers, and a vector {given}"
            found.append(Obstacle("entry", reason, "use a prompt of that width, or a prefix"))
        why = wiring.embeds(stack)
        if why is not None and (part.stack == "decoder" or "something else" not in why):
            reason = f"{type(stack).__name__} {why}, and a vector is of no token"
            found.append(Obstacle("entry", reason, "use a prefix"))
        elif _looks_back(stack):
            reason = f"{type(stack).__name__} looks up which token each embedding is of, and a vector is of none"
            found.append(Obstacle("entry", reason, "use a prefix"))
    if prompt.prefixes:
        found += _attention_obstacles(prompt, model, geometry)
    for name, stack in stacks.items():
        origin = origin_of(prompt, name)
        if name == "decoder" and seeded(prompt, model, geometry) is not None:
            continue  # see `_seed_obstacles`
        if origin < 0 or (origin > 0 and not tellable(stack) and position_table(stack) is None):
            reason = f"the {name}'s first token would stand at {origin}, and this model cannot be told so"
            found.append(Obstacle("positions", reason, "use a prompt whose positions the model counts by itself"))
    return found


def _has_tokens(stack: Any) -> bool:
    """Whether a stack reads tokens, and says by which embedding."""
    try:
        weight = getattr(stack.get_input_embeddings(), "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 2  # a convolution has 3
    except (AttributeError, NotImplementedError):
        return False


def _looks_back(stack: Any) -> bool:
    """Whether the stack has further embeddings, of each layer, and finds token ids for them in the embeddings given."""
    look = getattr(stack, "get_per_layer_inputs", None) if getattr(stack, "hidden_size_per_layer_input", 0) else None
    return look is not None and "inputs_embeds" in inspect.signature(look).parameters


def tellable(stack: Any) -> bool:
    """Whether a stack can be told where its tokens stand, or asks for nothing but how far they are apart."""
    if getattr(stack.config, "alibi", False):  # Falcon takes positions then, too, and looks at none
        return False
    return "position_ids" in inspect.signature(stack.forward).parameters or _bias_table(stack) is not None


def origin_of(prompt: SoftPrompt, stack: Stack) -> int:
    """Where the first token of the stack's sequence stands, be it virtual or real."""
    return prompt.positions.start.get(stack, 0) - sum(counted(part) for part in prompt.inputs if part.stack == stack)


def stand_of(prompt: SoftPrompt, site: Site) -> Stand:
    """How the prompt's prefix of a site stands to the sequence."""
    told = prompt.positions
    return Stand(origin_of(prompt, stack_of(site)), told.relative_bias == "skewed", told.window == "slides")


def _attention_obstacles(prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    implementation = underlying(model.config._attn_implementation)
    found = []
    if implementation not in UNDERLYING:
        *most, last = UNDERLYING
        reason = f"a prefix runs in {', '.join(most)} or {last} attention, the model has '{implementation}'"
        found.append(Obstacle("attention", reason, f"model.set_attn_implementation('{UNDERLYING[0]}')"))
    if (part := seeded(prompt, model, geometry)) is not None:
        return _seed_obstacles(part, prompt, model, geometry)
    modules, text = attention_modules(model, geometry), model.config.get_text_config()
    if implementation == FLASH:
        found += _flash_obstacles(prompt, model, geometry)
    for part in prompt.prefixes:
        shape, numbered = geometry.site(part.site), modules[part.site]
        heard, layers = list(numbered.values()), 0 if shape is None else len(shape.attending)
        if (turns := _in_turn(model, geometry, part.site)) is not None:
            found.append(Obstacle("attention", turns, "use an input prompt"))
        elif len(heard) != layers or any(getattr(m, "layer_idx", -1) not in (None, -1, i) for i, m in numbered.items()):
            reason = (
                f"{len(heard)} of the {layers} attention layers at the site '{part.site}' of {type(model).__name__} "
                "dispatch through transformers' attention interface"
            )
            found.append(
                Obstacle("attention", reason, "use an input prompt, a toolkit's engine, or other transformers")
            )
        table = _bias_table(nn.ModuleList(heard))
        biased = range(prompt.positions.unbiased_from.get(stack_of(part.site), layers))
        some = 0 < len(part.layers.keys() & biased) < len(biased)
        if table is not None and prompt.positions.relative_bias == "skewed" and some:
            reason = "a skewed relative bias is known only where every layer that has it has a prefix"
            found.append(Obstacle("relative-bias", reason, "use the engine of the prompt's own toolkit"))
        if table is not None and implementation == FLEX:
            reason = "a relative bias of virtual tokens is not known to flex attention"
            found.append(Obstacle("relative-bias", reason, "model.set_attn_implementation('sdpa')"))
        if table is not None and "bidirectional" not in inspect.signature(table._relative_position_bucket).parameters:
            reason = f"{type(table).__name__} computes its relative bias in a way of its own"
            found.append(Obstacle("relative-bias", reason, "use an input prompt"))
        if prompt.positions.window == "slides" and part.site == "encoder" and shape is not None and shape.window:
            reason = "what a window that looks both ways drops is not known"
            found.append(Obstacle("window", reason, "use a prompt whose window is 'pinned'"))
        slides = prompt.positions.window == "slides" and part.site == "self" and shape is not None and shape.window
        if slides and getattr(text, "attention_chunk_size", None):
            reason = f"attention in chunks of {text.attention_chunk_size} tokens drops virtual tokens otherwise"
            found.append(Obstacle("window", reason, "use the engine of the prompt's own toolkit"))
        elif slides and (wired := _wiring(model, geometry)) is not None and not wired.placed:
            reason = "its attention layers do not learn where their queries stand, so a prefix cannot slide"
            found.append(Obstacle("window", reason, "use a prompt whose window is 'pinned'"))
        latent = [name for name in ("kv_lora_rank", "qk_nope_head_dim") if getattr(text, name, None)]
        if latent or (shape is not None and getattr(text, "v_head_dim", None) not in (None, shape.head_dim)):
            reason = f"keys and values of this attention are no pair of one width ({', '.join(latent) or 'v_head_dim'})"
            found.append(Obstacle("attention", reason, "use an input prompt"))
        elif part.site == "self" and turns is None:
            for reason in _wired_otherwise(model, geometry, numbered):
                found.append(Obstacle("attention", reason, "use an input prompt, or a toolkit's engine"))
    if any(getattr(module, "reorder_and_upcast_attn", False) for module in model.modules()):
        reason = "this model's attention upcasts only under the name 'eager'"
        found.append(Obstacle("attention", reason, "set reorder_and_upcast_attn to false in its configuration"))
    if (getattr(model, "_tp_size", None) or 1) > 1:
        reason = f"a tensor parallel plan gives each of {model._tp_size} processes its own heads, and a prefix has all"
        found.append(Obstacle("tensor-parallel", reason, "use an input prompt, or FSDP2, which shards and gathers it"))
    return found


def _flash_obstacles(prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    """What flash attention does otherwise: it knows which keys are padding, and their order, and nothing else."""
    found, remedy = [], "model.set_attn_implementation('sdpa')"
    if flash_attn_supports_top_left_mask():
        reason = "this build of flash attention aligns the past to the first key, which is virtual"
        found.append(Obstacle("attention", reason, remedy))
    modules, stacks = attention_modules(model, geometry), stacks_of(model, geometry)
    for part in prompt.prefixes:
        shape, heard = geometry.site(part.site), list(modules[part.site].values())
        if heard and _hears_scores(model, stacks[stack_of(part.site)], heard[0]):
            reason = f"{type(model).__name__} makes the mask of flash attention under that very name only"
            found.append(Obstacle("attention", reason, remedy))
        if part.site == "cross":
            reason = "flash attention takes the padding of the encoder's states for that of the queries"
            found.append(Obstacle("attention", reason, remedy))
        elif shape is not None and shape.window:
            # The window counts keys as they lie. That is their distance, if positions count the prefix.
            pinned, start = prompt.positions.window == "pinned", origin_of(prompt, stack_of(part.site))
            if pinned or start != part.length:
                why = "is pinned" if pinned else f"moves the tokens by {start} instead of {part.length} places"
                reason = f"flash attention counts the virtual tokens into its window, and the prefix {why}"
                found.append(Obstacle("window", reason, remedy))
    return found


def seeded(prompt: SoftPrompt, model: Any, geometry: Geometry) -> KeyValuePrefix | None:
    """The prefix that has no way into the model but its cache, or None."""
    part = prompt.prefix("self")
    alone = part is not None and geometry.decoder is not None and not geometry.is_encoder_decoder and not prompt.inputs
    return part if alone and not attention_modules(model, geometry)["self"] else None


def _seed_obstacles(part: KeyValuePrefix, prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    stack, shape = stacks_of(model, geometry)["decoder"], geometry.site("self")
    if shape is None:
        return []
    if outer_of(model, geometry) is not None:
        reason = f"{type(stack).__name__} has no way to a prefix but its cache, and the model around it makes the mask"
        return [Obstacle("attention", reason, "use an input prompt")]
    start = prompt.positions.start.get("decoder", 0)
    return [
        Obstacle(
            "attention",
            f"{type(model).__name__} does not dispatch through transformers' attention interface, and {reason}",
            "use an input prompt, a toolkit's engine, or other transformers",
        )
        for reason in seed.reasons(stack, shape, part, start, tellable(stack) or position_table(stack) is not None)
    ]


class _Reached(Exception):  # noqa: N818
    """An attention module was reached; with the names of what it was told, and all of that."""


def _reached(model: Any, stack: Any, attention: nn.Module, implementation: str) -> _Reached | None:
    """What attention of that name is told, watched with a pad and a token that go no further.

    None where the stack cannot be run so; then what is not told raises when it is needed.
    """

    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # a bank that is running loads further prompts
            raise _Reached(set(kwargs), (*args, *kwargs.values()))

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    before = [] if NAME in model._modules else _name_attention(model, implementation)
    tokens = torch.tensor([[0, 1]], device=stack.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            past_hooks(stack)(tokens, attention_mask=tokens)  # of a bank
    except _Reached as reached:
        return reached
    except Exception:  # foreign code; nothing is known
        return None
    finally:
        handle.remove()
        _restore_names(before)
    return None


def _counts_pads(outer: Any, stack: Any) -> bool:
    """Whether a model that is told no positions makes some for its stack, from the first column on, be it a pad.

    It is watched with a pad and two tokens that go no further than the stack.
    """
    thread = threading.get_ident()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            raise _Reached(set(kwargs), (kwargs.get("position_ids"),))

    handle, state = stack.register_forward_pre_hook(look, with_kwargs=True, prepend=True), dict(vars(outer))
    token = word(outer.config)
    tokens = torch.tensor([[0, token, token]], device=stack.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outer.forward(input_ids=tokens, attention_mask=(torch.arange(3, device=tokens.device) > 0).long()[None])
    except _Reached as reached:
        (made,) = reached.args[1]
        return made is not None and bool((made[..., 1] - made[..., 0] == 1).all())
    except Exception:  # foreign code; nothing is known
        return False
    finally:
        handle.remove()
        vars(outer).update(state)  # Qwen2-VL keeps what it found of the last sequence
    return False


def _hears_scores(model: Any, stack: Any, attention: nn.Module) -> bool:
    """Whether flash attention, called by our name, is told of padding by scores.

    So it is in models that know it by its own name only.
    """
    reached = _reached(model, stack, attention, registered(FLASH))
    return reached is not None and any(isinstance(told, Tensor) and told.ndim == 4 for told in reached.args[1])


def _wiring(model: Any, geometry: Geometry) -> wiring.Wiring | None:
    """What the decoder's attention is called with, if there is a decoder, and it is known."""
    if geometry.decoder is None:
        return None
    stack = stacks_of(model, geometry)["decoder"]
    return wiring.wiring(stack, partial(_named, model), geometry.is_encoder_decoder, geometry.decoder.attending)


def _in_turn(model: Any, geometry: Geometry, site: Site) -> str | None:
    """Why a prefix of each layer would not find it: that the layers call the same modules in turn (Zamba's on 4.57)."""
    shape, wired = geometry.site(site), _wiring(model, geometry) if site == "self" else None
    if shape is None or wired is None or not len(set(wired.called)) < len(wired.called) == len(shape.attending):
        return None
    return f"{len(wired.called)} layers attend, in turn through {len(set(wired.called))} modules that they share"


def _wired_otherwise(model: Any, geometry: Geometry, numbered: Mapping[int, nn.Module]) -> Iterator[str]:
    """Why a prefix in attention would not be the one that a cache starts with."""
    wired, heard, layers = _wiring(model, geometry), list(numbered.values()), len(numbered)
    if wired is None:
        return
    if not set(heard) <= set(wired.called):
        yield f"its layers do not dispatch through transformers' attention interface, {type(heard[0]).__name__} does"
    elif len(wired.layers) > layers:
        yield f"its {layers} layers call their attention {len(wired.layers)} times, each with other keys and values"
    elif None in wired.layers:
        number = wired.layers.index(None)
        yield f"layer {number} attends to other keys and values than its cache holds: it makes them of these"
    elif not set(wired.layers) <= set(numbered):
        yield f"by its configuration layers {list(numbered)} attend, and by its cache layers {list(wired.layers)}"
    elif (size := _of_another_size(geometry, wired)) is not None:
        yield size
    elif wired.single:
        yield "its attention layers take one tensor for keys and for values, and a prefix has two"
    elif wired.remade:
        yield "its attention layers make their own mask, of keys and values that would lack the prefix"


def _of_another_size(geometry: Geometry, wired: wiring.Wiring) -> str | None:
    """Where attention is of other shapes than its configuration says, under the names that all have (MiMo's)."""
    shape = geometry.site("self")
    for layer, (keys, values) in zip(wired.layers, wired.shapes, strict=True):
        if shape is not None and layer is not None and {keys, values} != {shape.shape(layer)}:
            here = f"layer {layer} attends to keys {list(keys)} and values {list(values)} [heads, width]"
            return f"{here}, and by its configuration to {list(shape.shape(layer))}"
    return None


def stacks_of(model: Any, geometry: Geometry) -> dict[Stack, Any]:
    """The module that runs each stack: embeddings, layers, last norm; no head."""
    if geometry.is_encoder_decoder:
        both = model if hasattr(model, "get_encoder") else model.base_model  # a classifier of BART's has none itself
        return {"encoder": both.get_encoder(), "decoder": both.get_decoder()}
    if geometry.decoder is None:
        return {"encoder": model.base_model}
    return {"decoder": _text_decoder(model)}


def _text_decoder(model: Any) -> Any:
    """The decoder of a model, which among several parts is the one of the text; not all say which that is."""
    base, text = model.base_model, model.config.get_text_config()
    found = base.get_decoder()
    if found is model:  # whose class names no base, though it has a head
        return next((child for child in model.children() if isinstance(child, PreTrainedModel)), found)
    if type(getattr(found, "config", None)) is type(text):
        return found
    parts = (module for module in base.modules() if isinstance(module, PreTrainedModel))
    part = next((module for module in parts if type(module.config) is type(text)), None)
    return found if part is None else part.base_model.get_decoder()


def outer_of(model: Any, geometry: Geometry) -> Any:
    """The module that makes a decoder's embeddings of several modalities, positions and masks, or None."""
    if geometry.encoder is not None or model.config.get_text_config() is model.config:
        return None
    return None if model.base_model is _text_decoder(model) else model.base_model


def attention_modules(model: Any, geometry: Geometry) -> dict[Site, dict[int, nn.Module]]:
    """The attention modules that dispatch, by site and the number of their layer (self before cross, as they run).

    Where they are not as many as the layers that attend, they are numbered as they come.
    """
    stacks = stacks_of(model, geometry)
    found = {name: [m for m in stack.modules() if dispatches(m)] for name, stack in stacks.items()}
    decoder, crossed = found.get("decoder", []), geometry.is_encoder_decoder
    alone = None if crossed else geometry.decoder
    if alone is not None and len(decoder) > len(alone.attending):  # some attend to an encoder, should there be one
        wired = wiring.wiring(stacks["decoder"], partial(_named, model), crossed=False, numbers=alone.attending)
        decoder = decoder if wired is None else list(wired.called)
    sites: dict[Site, list[nn.Module]] = {
        "encoder": found.get("encoder", []),
        "self": decoder[::2] if crossed else decoder,
        "cross": decoder[1::2] if crossed else [],
    }
    return {site: dict(zip(_numbers(geometry, site, len(heard)), heard, strict=True)) for site, heard in sites.items()}


def _numbers(geometry: Geometry, site: Site, count: int) -> Sequence[int]:
    shape = geometry.site(site)
    return range(count) if shape is None or len(shape.attending) != count else shape.attending


def _pools_first_token(model: Any, geometry: Geometry) -> bool:
    """Whether the head of an encoder takes the first state for the whole sequence: with a prompt, a virtual token's.

    So do PEFT and the published classes, and BERT's own pooler, which is part of the stack.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return geometry.decoder is None and type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def _switch_attention(model: Any, injected: Injection) -> None:
    """Let every configuration in the model name our function over the attention that it named."""
    injected.implementations = _name_attention(model, registered(model.config._attn_implementation))


def _name_attention(model: Any, name: str) -> list[tuple[Any, str]]:
    """Let every configuration in the model name this attention; each of them, with the name that it had."""
    register()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation_internal = name
    return before


@contextmanager
def _named(model: Any, name: str) -> Iterator[None]:
    """Every configuration in the model names this attention."""
    before = _name_attention(model, name)
    try:
        yield
    finally:
        _restore_names(before)


def _restore_names(before: Iterable[tuple[Any, str]]) -> None:
    """Undo `_name_attention`."""
    for config, name in before:
        config._attn_implementation_internal = name


def _hook(model: Any, injected: Injection, geometry: Geometry, pads: Iterable[Stack], prefixed: bool) -> None:
    """Hook the stacks, and the model around them. Those of `pads` find pads by their token ids."""
    handles, off = injected.handles, injected.switch.is_off
    handles.append(model.register_forward_pre_hook(injected.enter, with_kwargs=True))
    handles.append(model.register_forward_hook(injected.leave))
    pools = _pools_first_token(model, geometry)
    implementation = model.config._attn_implementation if injected.implementations else None
    for name, stack in stacks_of(model, geometry).items():
        crossed = geometry.is_encoder_decoder and name == "encoder"
        table, places = position_table(stack), injected.places(name)
        if table is not None and places and not tellable(stack):
            handles.append(table.register_forward_pre_hook(Shift(table, places, off).before, with_kwargs=True))
        around = Circumstances(implementation, crossed, pools, injected.shows, off, injected.owner)
        around = replace(around, knows_pads=name in pads, prefixed=prefixed)
        outer = outer_of(model, geometry)
        if outer is not None:
            around = replace(around, word=word(model.config), counts_pads=_counts_pads(outer, stack))
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
        table = None if site == "cross" else _bias_table(nn.ModuleList(modules[site].values()))
        biased = table is None or layer < injected.unbiased_from.get(stack_of(site), layer + 1)
        # A layer that attends to another's keys and values attends to that one's prefix.
        layers = wired.layers if wired is not None and site == "self" else tuple(modules[site])
        for number, module in zip(layers, modules[site].values(), strict=True):
            if layer != number:
                continue
            causal = site != "cross" and getattr(module, "is_causal", site == "self")
            bias = None if table is None or not biased else _bias_table(module) or table
            bind(module, Binding(source, causal, bias, off, biased))
            injected.bound.append(module)
            if gated:
                injected.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))


def _bias_table(module: nn.Module) -> Any:
    """The first module that holds the table of a T5-like relative bias, or None."""
    return next((found for found in module.modules() if hasattr(found, "relative_attention_bias")), None)
