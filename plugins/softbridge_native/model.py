"""A soft prompt in a transformers model: where its parameters live, and what happens before and after a stack runs.

The model keeps its class. A stack (the module under the heads, or the encoder and the decoder) gets forward hooks,
which put the virtual tokens into the sequence, tell the real ones where they stand, and take the virtual ones out of
the last hidden state. What is built on the stack - heads, losses, `generate`, trainers - therefore never meets a
virtual token: logits and labels keep their length, and the loss is the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.errors import BaseModelError, EngineError, Obstacle
from softbridge.geometry import Geometry, Site, Stack, read_geometry, stack_of
from softbridge.lower import check_fits
from softbridge.prompt import InputPrompt, KeyValue, KeyValuePrefix, Part, SoftPrompt
from softbridge.tensors import from_torch, to_torch
from softbridge_native.attention import UNDERLYING, Binding, LayerPrefix, bind, dispatches, register, registered, unbind

#: The submodule of the model that holds the prompt.
NAME = "softbridge"


class Vectors(nn.Module):
    """An input prompt: vectors [P, H]."""

    def __init__(self, part: InputPrompt, device: torch.device) -> None:
        super().__init__()
        self.vectors = nn.Parameter(to_torch(part.vectors).to(device))

    def extract(self, part: InputPrompt) -> InputPrompt:
        return replace(part, vectors=from_torch(self.vectors))


class Prefix(nn.Module):
    """A prefix: one `LayerPrefix` for each of its layers, on the device of the attention module that it joins."""

    def __init__(self, part: KeyValuePrefix, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer, pair in part.layers.items():
            device = next(modules[layer].parameters()).device
            self.layers[str(layer)] = LayerPrefix(to_torch(pair.keys).to(device), to_torch(pair.values).to(device))

    def extract(self, part: KeyValuePrefix) -> KeyValuePrefix:
        layers: dict[int, Any] = {layer: self.layers[str(layer)] for layer in part.layers}
        return replace(part, layers={n: KeyValue(from_torch(p.keys), from_torch(p.values)) for n, p in layers.items()})


class StackHooks:
    """What happens before and after one stack of the model runs.

    Args:
        stack: the module.
        vectors: its input prompt, or None.
        start: where its first real token stands.
        implementation: ours, which the stack's configuration names, or None where the model keeps its own.
        strip: whether to take the virtual tokens out of the last hidden state again.
    """

    def __init__(
        self, stack: nn.Module, vectors: Vectors | None, start: int, implementation: str | None, strip: bool
    ) -> None:
        self.vectors = vectors
        self.start = start
        self.length = 0 if vectors is None else vectors.vectors.shape[0]
        self.implementation = implementation
        self.strip = strip
        self.names = tuple(inspect.signature(stack.forward).parameters)
        self.offset = _position_offset(stack)
        self.inserted = False
        self.pads: Tensor | None = None

    def before(self, stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Put the virtual tokens into the sequence, and tell the real ones where they stand."""
        if self.implementation not in (None, stack.config._attn_implementation):
            raise EngineError(
                f"the attention implementation became '{stack.config._attn_implementation}' with a prompt attached",
                f"'{self.implementation}', in which the prompt lives",
                "detach the prompt, set the implementation, and attach again",
            )
        kwargs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        positions = self._positions(kwargs, plain, past)
        self.inserted = self.vectors is not None and past == 0
        if self.vectors is not None:
            if mask is not plain:
                raise EngineError(
                    "the attention mask came ready-made, with an input prompt attached",
                    "a mask of shape [B, T], or none",
                    "pass the tokens' own mask, and use a cache that grows",
                )
            kwargs.pop("cache_position", None)  # counted without the prompt; the model counts its cache
            self.pads = None if plain is None else (plain.cumsum(-1) == 0).sum(-1)
            if plain is not None:
                kwargs["attention_mask"] = self._insert(plain, plain.new_ones(1, self.length))
        if self.inserted:
            positions = self._insert_tokens(stack, kwargs, positions)
        if positions is not None:
            kwargs["position_ids"] = positions
        return (), kwargs

    def after(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the virtual tokens out of the last hidden state."""
        if not (self.inserted and self.strip):
            return output
        hidden = output[0][:, self.length :]  # a real token stands P further on, whatever pads are on its left
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Let cross-attention see the virtual tokens, which are in the encoder's output."""
        mask = kwargs.get("encoder_attention_mask")
        if mask is not None and mask.shape[1] + self.length == kwargs["encoder_hidden_states"].shape[1]:
            self.pads = (mask.cumsum(-1) == 0).sum(-1)
            kwargs["encoder_attention_mask"] = self._insert(mask, mask.new_ones(1, self.length))
        return args, kwargs

    def _positions(self, kwargs: Mapping[str, Any], mask: Tensor | None, past: int) -> Tensor | None:
        """Where the real tokens stand, [B or 1, T]; None if the model would say the same, or cannot be told."""
        given = kwargs.get("position_ids")
        if given is not None:
            return given + self.start  # type: ignore[no-any-return]
        if "position_ids" not in self.names or (mask is None and self.start == self.length):
            return None
        tokens = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if mask is None:
            seen = past - self.length if past else 0
            running = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        else:
            running = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        return running + self.start + self.offset

    def _insert_tokens(self, stack: Any, kwargs: dict[str, Any], positions: Tensor | None) -> Tensor | None:
        """The virtual tokens' vectors, types and positions; the positions are returned."""
        assert self.vectors is not None
        embedded = kwargs.get("inputs_embeds")
        if embedded is None:
            embedded = stack.get_input_embeddings()(kwargs["input_ids"])
        kwargs["input_ids"] = None
        kwargs["inputs_embeds"] = self._insert(embedded, self.vectors.vectors.to(embedded.dtype)[None])
        types = kwargs.get("token_type_ids")
        if types is not None:
            kwargs["token_type_ids"] = self._insert(types, types.new_zeros(1, self.length))
        if positions is None:
            return None
        first = self.start - self.length + self.offset
        virtual = torch.arange(first, first + self.length, device=positions.device)[None]
        return self._insert(positions.expand(embedded.shape[0], -1), virtual)

    def _insert(self, real: Tensor, virtual: Tensor) -> Tensor:
        """[B, P + T, ...]: each row's pads on the left, the virtual tokens [1, P, ...], the rest of the row."""
        both = torch.cat([virtual.expand(real.shape[0], *virtual.shape[1:]), real], dim=1)
        if self.pads is None:
            return both
        columns = torch.arange(both.shape[1], device=real.device)
        pads = self.pads[:, None]
        order = torch.where(columns < pads, columns + self.length, columns - pads * (columns < pads + self.length))
        return torch.take_along_dim(both, order.view(*order.shape, *[1] * (both.ndim - 2)), dim=1)


class Injection(nn.Module):
    """The prompt's parameters, and what is needed to extract it and to restore the model.

    Attributes:
        prompt: as it was attached.
        parts: one module for each of the prompt's parts.
        handles: of all hooks.
        reached: whether a stack has run since the model was called.
        bound: the attention modules that hold a prefix.
        implementations: each configuration in the model, with the attention implementation that it named.
        trainable: the model's parameters that were trainable.
    """

    def __init__(self, prompt: SoftPrompt, parts: Sequence[Vectors | Prefix]) -> None:
        super().__init__()
        self.prompt = prompt
        self.parts = nn.ModuleList(parts)
        self.handles: list[Any] = []
        self.reached = False
        self.bound: list[nn.Module] = []
        self.implementations: list[tuple[Any, str]] = []
        self.trainable: list[nn.Parameter] = []

    def enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model runs; no stack has been reached yet."""
        self.reached = False

    def reach(self, stack: nn.Module, args: tuple[Any, ...]) -> None:
        """A stack runs."""
        self.reached = True

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A model that calls its layers past the stack would drop the prompt without a word."""
        if not self.reached:
            raise EngineError(
                f"{type(model).__name__} ran without calling the stack that carries the prompt",
                "a model that calls the stack under its head",
                "attach to another class of the same family, or use a toolkit's engine",
            )

    def extract(self) -> SoftPrompt:
        """The prompt as it is now. What a changed prompt no longer has (its parameterisation, its origin) goes."""
        modules: Iterable[Any] = self.parts
        parts: tuple[Part, ...] = tuple(
            module.extract(part) for module, part in zip(modules, self.prompt.parts, strict=True)
        )
        if parts == self.prompt.parts:
            return self.prompt
        return replace(self.prompt, parts=parts, training=None, origin=None)


def attach(model: Any, prompt: SoftPrompt) -> Any:
    """Attach in place. See `Engine.attach`."""
    if NAME in model._modules:
        raise EngineError(
            f"this {type(model).__name__} has a prompt attached already", "a model without one", "detach that one first"
        )
    found = obstacles(prompt, model)
    if found:
        raise EngineError(
            f"engine 'native' cannot run this prompt on this {type(model).__name__}: "
            + "; ".join(f"[{obstacle.name}] {obstacle.reason}" for obstacle in found),
            "a prompt and a model that the engine can run",
            "; ".join(dict.fromkeys(obstacle.remedy for obstacle in found)),
        )
    geometry = read_geometry(model.config)
    modules = _attention_modules(model, geometry)
    parts = [
        Prefix(part, modules[part.site]) if isinstance(part, KeyValuePrefix) else Vectors(part, model.device)
        for part in prompt.parts
    ]
    injected = Injection(prompt, parts)
    injected.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in injected.trainable:
        parameter.requires_grad_(False)
    model.add_module(NAME, injected)
    try:
        # An input prompt needs no attention function of ours, but in eager attention our mask: see `attention._mask`.
        if prompt.prefixes or (any(modules.values()) and model.config._attn_implementation == "eager"):
            _switch_attention(model, injected)
        _bind_prefixes(injected, modules)
        _hook(model, injected, geometry)
    except BaseException:
        detach(model)
        raise
    return model


def detach(model: Any) -> Any:
    """Restore the model bit for bit. See `Engine.detach`."""
    injected = injection(model)
    for handle in injected.handles:
        handle.remove()
    for module in injected.bound:
        unbind(module)
    for config, implementation in injected.implementations:
        config._attn_implementation_internal = implementation
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
    for part in prompt.inputs:
        if (part.entry, part.placement) != ("before", "before-sequence"):
            reason = f"its vectors enter {part.entry} the embedding block, {part.placement}"
            found.append(Obstacle("entry", reason, "lower the prompt to vectors that enter before the embedding block"))
        if geometry.is_encoder_decoder and part.stack == "decoder":
            reason = "an input prompt in the decoder of an encoder-decoder model is not supported"
            found.append(Obstacle("stack", reason, "use the prompt in the encoder"))
    if prompt.prefixes:
        found += _attention_obstacles(prompt, model, geometry)
    for name, stack in _stacks(model, geometry).items():
        virtual = sum(part.length for part in prompt.inputs if part.stack == name)
        origin = prompt.positions.start.get(name, 0) - virtual
        tellable = "position_ids" in inspect.signature(stack.forward).parameters or _bias_table(stack) is not None
        if origin < 0 or (origin > 0 and not tellable):
            reason = f"the {name}'s first virtual token would stand at {origin}, and this model cannot be told so"
            found.append(Obstacle("positions", reason, "use a prompt whose positions the model counts by itself"))
    return found


def _attention_obstacles(prompt: SoftPrompt, model: Any, geometry: Geometry) -> list[Obstacle]:
    implementation = model.config._attn_implementation
    found = []
    if implementation not in UNDERLYING:
        reason = f"a prefix runs in {' or '.join(UNDERLYING)} attention, the model has '{implementation}'"
        found.append(Obstacle("attention", reason, f"model.set_attn_implementation('{UNDERLYING[0]}')"))
    modules, text = _attention_modules(model, geometry), model.config.get_text_config()
    for part in prompt.prefixes:
        shape, heard = geometry.site(part.site), modules[part.site]
        layers = 0 if shape is None else shape.layers
        if len(heard) != layers or any(getattr(m, "layer_idx", None) not in (None, i) for i, m in enumerate(heard)):
            reason = (
                f"{len(heard)} of the {layers} attention layers at the site '{part.site}' of {type(model).__name__} "
                "dispatch through transformers' attention interface"
            )
            found.append(
                Obstacle("attention", reason, "use an input prompt, a toolkit's engine, or other transformers")
            )
        if prompt.positions.relative_bias == "skewed" and len(part.layers) != layers:
            reason = "a skewed relative bias is known only where every layer has a prefix"
            found.append(Obstacle("relative-bias", reason, "use the engine of the prompt's own toolkit"))
        table = _bias_table(nn.ModuleList(heard))
        if table is not None and "bidirectional" not in inspect.signature(table._relative_position_bucket).parameters:
            reason = f"{type(table).__name__} computes its relative bias in a way of its own"
            found.append(Obstacle("relative-bias", reason, "use an input prompt"))
        if prompt.positions.window == "slides" and part.site == "encoder" and shape is not None and shape.window:
            reason = "what a window that looks both ways drops is not known"
            found.append(Obstacle("window", reason, "use a prompt whose window is 'pinned'"))
        if prompt.positions.window == "slides" and part.site == "self" and getattr(text, "attention_chunk_size", None):
            reason = f"attention in chunks of {text.attention_chunk_size} tokens drops virtual tokens otherwise"
            found.append(Obstacle("window", reason, "use the engine of the prompt's own toolkit"))
        latent = [name for name in ("kv_lora_rank", "qk_nope_head_dim") if getattr(text, name, None)]
        if latent or (shape is not None and getattr(text, "v_head_dim", None) not in (None, shape.head_dim)):
            reason = f"keys and values of this attention are no pair of one width ({', '.join(latent) or 'v_head_dim'})"
            found.append(Obstacle("attention", reason, "use an input prompt"))
    if any(getattr(module, "reorder_and_upcast_attn", False) for module in model.modules()):
        reason = "this model's attention upcasts only under the name 'eager'"
        found.append(Obstacle("attention", reason, "set reorder_and_upcast_attn to false in its configuration"))
    return found


def _stacks(model: Any, geometry: Geometry) -> dict[Stack, Any]:
    """The module that runs each stack: embeddings, layers, last norm; no head."""
    if geometry.is_encoder_decoder:
        return {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
    if geometry.decoder is None:
        return {"encoder": model.base_model}
    return {"decoder": model.base_model.get_decoder()}


def _attention_modules(model: Any, geometry: Geometry) -> dict[Site, list[nn.Module]]:
    """The attention modules that dispatch, by site and in the order of the layers (self before cross, as they run)."""
    found = {name: [m for m in stack.modules() if dispatches(m)] for name, stack in _stacks(model, geometry).items()}
    decoder, crossed = found.get("decoder", []), geometry.is_encoder_decoder
    return {
        "encoder": found.get("encoder", []),
        "self": decoder[::2] if crossed else decoder,
        "cross": decoder[1::2] if crossed else [],
    }


def _pools_first_token(model: Any, geometry: Geometry) -> bool:
    """Whether the head of an encoder takes the first state for the whole sequence: with a prompt, a virtual token's.

    So do PEFT and the published classes, and BERT's own pooler, which is part of the stack.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return geometry.decoder is None and type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def _switch_attention(model: Any, injected: Injection) -> None:
    """Let every configuration in the model name our function over the attention that it named."""
    register()
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    injected.implementations = [(config, config._attn_implementation) for config in configs.values()]
    name = registered(model.config._attn_implementation)
    for config in configs.values():
        config._attn_implementation_internal = name


def _hook(model: Any, injected: Injection, geometry: Geometry) -> None:
    """Hook the stacks, and the model around them."""
    prompt, handles = injected.prompt, injected.handles
    handles += [model.register_forward_pre_hook(injected.enter), model.register_forward_hook(injected.leave)]
    vectors = (module for module in injected.parts if isinstance(module, Vectors))
    inputs = dict(zip((part.stack for part in prompt.inputs), vectors, strict=True))
    strip = not geometry.is_encoder_decoder and not _pools_first_token(model, geometry)
    implementation = model.config._attn_implementation if injected.implementations else None
    for name, stack in _stacks(model, geometry).items():
        hooks = StackHooks(stack, inputs.get(name), prompt.positions.start.get(name, 0), implementation, strip)
        handles += [
            stack.register_forward_pre_hook(injected.reach),
            stack.register_forward_pre_hook(hooks.before, with_kwargs=True),
            stack.register_forward_hook(hooks.after),
            stack.get_input_embeddings().register_forward_hook(_require_grad),
        ]
        if geometry.is_encoder_decoder and name in inputs:
            handles.append(model.get_decoder().register_forward_pre_hook(hooks.before_decoder, with_kwargs=True))


def _bind_prefixes(injected: Injection, modules: Mapping[Site, Sequence[nn.Module]]) -> None:
    positions = injected.prompt.positions
    prefixes: Iterable[Any] = (module for module in injected.parts if isinstance(module, Prefix))
    for part, prefix in zip(injected.prompt.prefixes, prefixes, strict=True):
        stack = stack_of(part.site)
        virtual = sum(other.length for other in injected.prompt.inputs if other.stack == stack)
        site = modules[part.site]
        for layer in part.layers:
            own_table = _bias_table(site[layer])
            binding = Binding(
                prefix=prefix.layers[str(layer)],
                causal=part.site != "cross" and getattr(site[layer], "is_causal", part.site == "self"),
                origin=positions.start.get(stack, 0) - virtual,
                skewed=positions.relative_bias == "skewed",
                slides=positions.window == "slides",
                bias=None if part.site == "cross" else own_table or _bias_table(nn.ModuleList(site)),
            )
            bind(site[layer], binding)
            injected.bound.append(site[layer])


def _bias_table(module: nn.Module) -> Any:
    """The first module that holds the table of a T5-like relative bias, or None."""
    return next((found for found in module.modules() if hasattr(found, "relative_attention_bias")), None)


def _position_offset(stack: nn.Module) -> int:
    """The row of the position embedding for position 0: RoBERTa's rows up to the padding token's are reserved."""
    tables = (module for name, module in stack.named_modules() if name.endswith("position_embeddings"))
    reserved = (getattr(table, "padding_idx", None) for table in tables)
    return max((row + 1 for row in reserved if row is not None), default=0)


def _require_grad(embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Reentrant gradient checkpointing drops a layer's gradients if no input of the layer requires one."""
    if embedding.training and torch.is_grad_enabled():
        output.requires_grad_(True)
