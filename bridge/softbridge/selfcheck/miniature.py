"""A small copy of a model's architecture, on which an engine can be tried in milliseconds.

It is made from the model's own class and configuration, so that an architecture which nobody has met, remote code
included, is copied as well as any other. What a prompt meets stays: every kind of layer, the size of a head and how
many heads share keys, rotary settings, windows (shortened, so that short texts reach beyond them). What it does not
meet shrinks: the number of layers and of heads, hidden size, vocabulary, feed-forward, experts. How far a
configuration can shrink shows when it is built; if it cannot, less is shrunk.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from softbridge.arrays import Array
from softbridge.attachment.trainer_model import Derived
from softbridge.base.build import draw_weights, shrink
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry, Stack, StackGeometry, read_geometry, stack_of
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, SoftPrompt
from softbridge.template import Field, Template, Virtual
from softbridge.verification.small_models import layers_of

#: Of the copy: rows of the vocabulary, widths, experts, layers of a stack at most where kinds can be chosen.
VOCABULARY, FEED_FORWARD, HIDDEN, EXPERTS, LAYERS = 64, 32, 64, 4, 6
#: Query heads to a key/value head at most.
SHARING = 8
#: Length of a window, in tokens; P virtual tokens fit into it, and the longest text does not.
WINDOW, P = 6, 3
#: What is larger is not built: 256 MB in float64.
PARAMETERS = 32_000_000
STD = 0.7

_FEED_FORWARD = (
    "intermediate_size",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "dense_intermediate_size",
    "ffn_hidden_size",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "n_group", "topk_group")
_HEADS = ("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_LAYERS: Mapping[str, tuple[str, ...]] = {
    "": ("num_hidden_layers", "num_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
_WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size")
#: Of a configuration: what says where a model came from, or what its classes are called, and not what it computes.
_NAMES = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "task_specific_params",
    "_attn_implementation_autoset",
)


@dataclass(frozen=True)
class Architecture:
    """What is remembered of a model, to make small copies of it.

    Attributes:
        kind: its class.
        config: its configuration, a copy.
        implementation: of its attention, to run the copy with.
        named: the one that it stands for: that of the model.
        geometry: of its attention.
        layers: stack -> the kind of each layer, a number; None where they could not be told apart.
    """

    kind: type
    config: Any
    implementation: str
    named: str
    geometry: Geometry
    layers: Mapping[Stack, tuple[int, ...] | None]

    @classmethod
    def of(cls, model: Any, implementation: str, named: str | None = None) -> Architecture:
        """Of a model. What its configuration names as its attention may be an engine's own function over `named`."""
        geometry, kind = read_geometry(model.config), type(model)
        while issubclass(kind, Derived):
            kind = kind.plain
        config = copy.deepcopy(model.config)
        for part in _parts(config):
            for name in ("quantization_config", "compression_config"):
                vars(part).pop(name, None)
        return cls(
            kind,
            config,
            implementation,
            named or implementation,
            geometry,
            {name: kinds_of(model, geometry, name) for name in stacks(geometry)},
        )


@dataclass(frozen=True)
class Miniature:
    """A small copy.

    Attributes:
        config: shrunk.
        geometry: of it.
        chosen: stack -> the numbers that its layers have in the model.
        note: what was done, in words.
    """

    config: Any
    geometry: Geometry
    chosen: Mapping[Stack, tuple[int, ...]]
    note: str

    def told(self) -> dict[str, Any]:
        """JSON values: what decides what the copy computes."""
        told = self.config.to_dict()
        return {name: value for name, value in sorted(told.items()) if name not in _NAMES}


def stacks(geometry: Geometry) -> Sequence[Stack]:
    """The stacks that there are."""
    known: tuple[Stack, ...] = get_args(Stack)
    return [name for name in known if geometry.stack(name) is not None]


def kinds_of(model: Any, geometry: Geometry, stack: Stack) -> tuple[int, ...] | None:
    """The kind of each layer of a stack: a number for each set of modules and settings, in order of appearance.

    None if the layers are not found.
    """
    shape = geometry.stack(stack)
    if shape is None:
        return None
    if geometry.is_encoder_decoder:
        both = model if hasattr(model, "get_encoder") else model.base_model
        module = both.get_encoder() if stack == "encoder" else both.get_decoder()
    else:
        module = model.base_model if stack == "encoder" else model.base_model.get_decoder()
    found = layers_of(module, shape.layers)
    if found is None:
        return None
    numbers: tuple[int, ...] = ()
    for ignored in ((), (float,), (float, int)):  # what rises from layer to layer makes no kind of each
        plain = [
            [(name, kind, {k: v for k, v in told.items() if type(v) not in ignored}) for name, kind, told in layer]
            for layer in found
        ]
        numbers = _numbered(plain)
        if max(numbers) < LAYERS:
            break
    return numbers


def miniatures(of: Architecture, prompt: SoftPrompt) -> Iterator[Miniature]:
    """Small copies for a prompt of this kind, the smallest first. Whether one can be built is not known."""
    known: list[Any] = []
    for chosen, which in _choices(of, prompt):
        for size in ("", "heads", "all heads"):
            try:
                config = _shrunk(of, chosen, size)
                geometry = read_geometry(config)
            except Exception:  # foreign code: a configuration may refuse what it is given, in its own words
                continue
            made = Miniature(
                config, geometry, chosen, f"{which}; hidden size {of.geometry.hidden} to {geometry.hidden}"
            )
            if _same(of.geometry, geometry, chosen) and made.told() not in known:
                known.append(made.told())
                yield made


def _choices(of: Architecture, prompt: SoftPrompt) -> Iterator[tuple[Mapping[Stack, tuple[int, ...]], str]]:
    """Which layers to keep: one of each kind; else so many from the start that each kind is among them; else all."""
    kinds = {name: _marked(of, prompt, name) for name in stacks(of.geometry)}
    each = {name: _each(found) for name, found in kinds.items()}
    first = {name: tuple(range(max(numbers) + 1)) for name, numbers in each.items()}
    whole = {name: tuple(range(len(found))) for name, found in kinds.items()}
    known: list[Any] = []
    for chosen in (each, first, whole):
        if chosen not in known:
            known.append(chosen)
            yield chosen, ", ".join(f"{len(n)} of {len(kinds[s])} {s} layers" for s, n in chosen.items())


def _marked(of: Architecture, prompt: SoftPrompt, stack: Stack) -> list[Any]:
    """The kind of each layer, and what the prompt has in it."""
    shape = of.geometry.stack(stack)
    layers = 0 if shape is None else shape.layers
    kinds = of.layers[stack] or (0,) * layers
    mine = [part for part in prompt.prefixes if stack_of(part.site) == stack]
    unbiased_from = prompt.positions.unbiased_from.get(stack, layers)

    beside = [part for part in prompt.adaptions if stack_of(part.site) == stack]

    def held(layer: int) -> list[int | None]:
        pairs, ones = [part.layers.get(layer) for part in mine], [part.layers.get(layer) for part in beside]
        gates = [None if pair is None else 0 if pair.gate is None else len(pair.gate.weight) for pair in pairs]
        return [*gates, *(None if one is None else len(one.gate) for one in ones)]

    return [(kinds[layer], held(layer), layer >= unbiased_from) for layer in range(layers)]


def _each(kinds: Sequence[Any]) -> tuple[int, ...]:
    """The first layer of each kind, and two layers at least."""
    found = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]]
    more = [layer for layer in range(len(kinds)) if layer not in found]
    return tuple(sorted(found + more[: max(0, 2 - len(found))]))


def _shrunk(of: Architecture, chosen: Mapping[Stack, tuple[int, ...]], size: str) -> Any:
    config = copy.deepcopy(of.config)
    text = config if of.geometry.is_encoder_decoder else config.get_text_config()
    for part in _parts(config):
        if part is not config and part is not text:  # of what is no text, little is needed
            shrink_sizes(part, num_hidden_layers=2, num_layers=2, depth=2, intermediate_size=FEED_FORWARD)
    shrink_sizes(text, **dict.fromkeys(_FEED_FORWARD, FEED_FORWARD), **dict.fromkeys(_WINDOWS, WINDOW))
    shrink_sizes(text, **dict.fromkeys(_EXPERTS, EXPERTS), **{name: 2 if "num" in name else 1 for name in _CHOSEN})
    _cut(text, of.geometry, chosen)
    if size != "all heads":
        _fewer_heads(text, of.geometry, hidden=None if size == "heads" else HIDDEN)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(ids := getattr(text, name, None), (list, tuple)):
            setattr(text, name, ids[0] if ids else None)
    shrink(text, vocab_size=VOCABULARY)
    shrink_sizes(text, vocab_size_per_layer_input=VOCABULARY)
    return config


def _told(config: Any, name: str) -> Any:
    """What a configuration says, or None; where layers differ, some refuse to name one number for all."""
    try:
        return getattr(config, name, None)
    except Exception:  # foreign code
        return None


def shrink_sizes(config: Any, **sizes: int) -> None:
    """Lower every named size that the configuration has and that is larger, in place."""
    for name, size in sizes.items():
        value = _told(config, name)
        if type(value) is int and value > size:
            setattr(config, name, size)


def _cut(text: Any, geometry: Geometry, chosen: Mapping[Stack, tuple[int, ...]]) -> None:
    """Keep the chosen layers: their number, and of whatever has an entry for each layer their entries."""
    for stack, numbers in chosen.items():
        shape = geometry.stack(stack)
        if shape is None or len(numbers) == shape.layers:
            continue
        for name, value in vars(text).copy().items():
            if isinstance(value, (list, tuple)) and len(value) == shape.layers and not geometry.is_encoder_decoder:
                setattr(text, name, type(value)(value[number] for number in numbers))
        for name in _LAYERS[stack if geometry.is_encoder_decoder else ""]:
            if _told(text, name) == shape.layers:
                setattr(text, name, len(numbers))


def _fewer_heads(text: Any, geometry: Geometry, hidden: int | None) -> None:
    """Two key/value heads at most, as many query heads to each (up to SHARING), and the hidden size that goes with it.

    Args:
        hidden: what it is, where heads have a size of their own; None: what the heads make.
    """
    shape = geometry.decoder or geometry.encoder
    if shape is None:
        return
    kv_heads = min(shape.kv_heads, 2)
    heads = kv_heads * min(shape.heads // shape.kv_heads, SHARING)
    own = [name for name in ("head_dim", "d_kv") if name in dir(text)]
    width = hidden if own and hidden is not None else heads * shape.head_dim
    if hidden is not None:
        for width_name in own:
            if _told(text, width_name) is None:  # a size that follows from the others, unless it is said
                setattr(text, width_name, shape.head_dim)
    for name in _HEADS:
        if type(_told(text, name)) is int:
            setattr(text, name, heads)
    for name in _KV_HEADS:
        if type(_told(text, name)) is int:
            setattr(text, name, kv_heads)
    before = geometry.hidden
    if width >= before:
        return
    for name in ("hidden_size", "d_model"):
        if getattr(text, name, None) == before:
            setattr(text, name, width)
    for name in ("embedding_size", "word_embed_proj_dim"):
        if (value := getattr(text, name, None)) is not None:
            setattr(text, name, width if value == before else min(value, width // 2))


def _same(full: Geometry, small: Geometry, chosen: Mapping[Stack, tuple[int, ...]]) -> bool:
    """Whether a prompt meets the same attention in the copy: heads of the same sizes, shared by as many queries."""

    def seen(shape: StackGeometry | None, layers: Sequence[int]) -> Any:
        if shape is None:
            return None
        grouped, single = shape.heads > shape.kv_heads, shape.kv_heads == 1
        return len(layers), [shape.shape(layer)[1] for layer in layers], grouped, single, shape.window is None

    for name in ("encoder", "decoder"):
        numbers = chosen.get(name, ())
        if seen(full.stack(name), numbers) != seen(small.stack(name), range(len(numbers))):
            return False
        shape = small.stack(name)
        if shape is not None and shape.layers != len(numbers):
            return False
    return (full.embedding is None) == (small.embedding is None)


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def build(of: Architecture, small: Miniature) -> Any:
    """The copy, in float64, with large seeded weights.

    Raises:
        BaseModelError: the copy is larger than the limit, or its layers are not of the kinds that were chosen.
        Exception: whatever the class raises that is not built from such a configuration.
    """
    import torch

    config = copy.deepcopy(small.config)
    config._attn_implementation = of.implementation
    for part in _parts(config):
        if hasattr(part, "_experts_implementation"):
            part._experts_implementation = "eager"  # grouped matrix products know no float64
    with torch.device("meta"):
        bare: Any = of.kind(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in bare.parameters())
    if size > PARAMETERS:
        raise BaseModelError(f"{size} parameters", f"at most {PARAMETERS}", "shrink it otherwise")
    for name, numbers in small.chosen.items():
        kinds = of.layers[name]
        found = kinds_of(bare, small.geometry, name)
        if kinds is not None and found is not None and found != _numbered([kinds[number] for number in numbers]):
            # It says by its layers' numbers what each is.
            raise BaseModelError(f"{name} layers of kinds {found}", f"{numbers} of the model's", "keep more layers")
    model: Any = of.kind(config)
    draw_weights(model, 0)
    return model.to(torch.float64).eval()


def _numbered(kinds: Sequence[Any]) -> tuple[int, ...]:
    """Each as the number of the first that equals it, in order of appearance."""
    order: list[Any] = []
    for kind in kinds:
        if kind not in order:
            order.append(kind)
    return tuple(order.index(kind) for kind in kinds)


# ------------------------------------------------------------------------------------------------------ the prompt


def like(prompt: SoftPrompt, small: Miniature, seed: int = 0) -> SoftPrompt:
    """A prompt of the same kind for the copy: P virtual tokens in each part, random with standard deviation STD."""
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> Array:
        return generator.normal(0, STD, shape)

    parts: list[Part] = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            template = None if part.template is None else TEMPLATE
            vectors = drawn(P, small.geometry.input_width)
            parts.append(InputPrompt(vectors, part.stack, part.entry, part.placement, template))
            continue
        shape = small.geometry.site(part.site)
        if isinstance(part, AdaptionPrompt):
            ours = {}
            for layer, number in enumerate(small.chosen[stack_of(part.site)]):
                one = part.layers.get(number)
                if one is not None and shape is not None:
                    gates = 1 if len(one.gate) == 1 else shape.heads
                    ours[layer] = Adaption(drawn(P, small.geometry.hidden), drawn(gates))
            parts.append(AdaptionPrompt(part.site, ours, part.joins))
            continue
        layers = {}
        for layer, number in enumerate(small.chosen[stack_of(part.site)]):
            pair = part.layers.get(number)
            if pair is None or shape is None:
                continue
            heads, width = shape.shape(layer)
            gates = 0 if pair.gate is None else len(pair.gate.weight)
            gate = Gate(drawn(gates, small.geometry.hidden), drawn(gates)) if gates else None
            layers[layer] = KeyValue(drawn(heads, P, width), drawn(heads, P, width), gate)
        parts.append(KeyValuePrefix(part.site, layers))
    base, full = BaseId(None, small.geometry), prompt.counted()
    counted = _counted(parts)
    start = {stack: _start(place, full[stack], counted[stack]) for stack, place in prompt.positions.start.items()}
    biased = {s: [n for n in small.chosen[s] if n < layer] for s, layer in prompt.positions.unbiased_from.items()}
    unbiased = {stack: len(kept) for stack, kept in biased.items() if len(kept) < len(small.chosen[stack])}
    told = replace(prompt.positions, start=start, unbiased_from=unbiased)
    return SoftPrompt(tuple(parts), told, base)


#: What stands for every template: virtual tokens before, between and after real ones.
TEMPLATE = Template((Virtual(2), Field("text"), Virtual(1), Field("more")))


def _counted(parts: Sequence[Part]) -> dict[Stack, int]:
    found: dict[Stack, int] = {}
    for part in parts:
        if isinstance(part, InputPrompt):
            found[part.stack] = found.get(part.stack, 0) + (0 if part.template is not None else P)
        elif isinstance(part, KeyValuePrefix) and part.site != "cross":
            found[stack_of(part.site)] = found.get(stack_of(part.site), 0) + P
    return found


def _start(place: int, full: int, small: int) -> int:
    """Where the first real token stands: all virtual tokens are counted, or none, or the number is another one."""
    if place == full:
        return small
    return 0 if place == 0 else small + 2 if place > full else small - 1
