"""One made-up prompt of each method, with numbers large enough to show: what is explained, and what proofs are run on.

A made-up prompt has no accidental structure, so that what depends on a prompt's own numbers (layers that happen to
repeat) shows as the general case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import get_args

import numpy as np

from softbridge.arrays import Array
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.lowering.token_positions import native_positions
from softbridge.methods import (
    MLP,
    Cartridge,
    ContextAwarePromptTuning,
    Method,
    MultitaskPromptTuning,
    PrefixTuning,
    PTuning,
    TaskHead,
    rematerialise,
)
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt.part import Adaption, AdaptionPrompt, Gate, InputPrompt, Joins, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, Positions, SoftPrompt
from softbridge.template import Field, Slot, Template, Verbaliser, Virtual, Words


def random_input_prompt(
    geometry: Geometry, length: int = 5, *, stack: Stack | None = None, seed: int = 0, std: float = 0.8
) -> SoftPrompt:
    """An input prompt with random vectors [P, H] of float32, counted."""
    stack = stack or ("decoder" if geometry.encoder is None else "encoder")
    vectors = np.random.default_rng(seed).normal(0, std, (length, geometry.input_width)).astype(np.float32)
    return SoftPrompt((InputPrompt(vectors, stack),), Positions({stack: length}), BaseId(None, geometry))


def random_prefix(
    geometry: Geometry,
    length: int = 5,
    *,
    sites: tuple[Site, ...] | None = None,
    positions: Positions | None = None,
    seed: int = 0,
    std: float = 0.8,
) -> SoftPrompt:
    """A prefix with random keys and values of float32 in all layers that attend at some sites, counted by default."""
    generator = np.random.default_rng(seed)
    sites = sites or (("encoder",) if geometry.decoder is None else ("self",))
    parts: list[Part] = []
    for site in sites:
        shape = geometry.site(site)
        if shape is None:
            raise ValueError(f"{geometry.model_type} has no site {site!r}")
        layers = {}
        for layer in geometry.attending(site):
            kv_heads, head_dim = shape.shape(layer)
            size = (kv_heads, length, head_dim)
            keys, values = (generator.normal(0, std, size).astype(np.float32) for _ in range(2))
            layers[layer] = KeyValue(keys, values)
        parts.append(KeyValuePrefix(site, layers))
    start = {stack_of(site): length for site in sites if site != "cross"}
    return SoftPrompt(tuple(parts), positions or Positions(start), BaseId(None, geometry))


def random_adaption(
    geometry: Geometry,
    length: int = 5,
    *,
    layers: Collection[int] | None = None,
    gates: int = 1,
    joins: Joins = "heads",
    seed: int = 0,
    std: float = 0.8,
) -> SoftPrompt:
    """An adaption prompt with random vectors and gates of float32, in some layers (None: all that attend)."""
    generator = np.random.default_rng(seed)
    site: Site = "encoder" if geometry.decoder is None else "self"

    def numbers(*shape: int) -> Array:
        return generator.normal(0, std, shape).astype(np.float32)

    chosen = geometry.attending(site) if layers is None else layers
    ones = {layer: Adaption(numbers(length, geometry.hidden), numbers(gates)) for layer in chosen}
    return SoftPrompt((AdaptionPrompt(site, ones, joins),), Positions(), BaseId(None, geometry))


#: The length of the prompts. Reasons that name a length name this one.
LENGTH = 5

#: The standard deviation of what a model sees of them.
STD = 0.8

#: Kind of parameterisation -> the ends of the names of those tensors in which its result is linear, all together.
_LINEAR = {
    "mlp": ("output.weight", "output.bias"),
    "p-tuning-mlp": ("linear.2.weight", "linear.2.bias"),
    "p-tuning-lstm": ("linear.1.weight", "linear.1.bias"),
    "multitask": ("embedding",),
    "context-aware": ("embedding",),
    "cartridge": ("frozen", "trained"),
}


def as_if_trained(method: Method, geometry: Geometry) -> SoftPrompt:
    """As if trained: the method's random start, with the last step of its parameterisation scaled up."""
    prompt = method.initialise(geometry, seed=1)
    training = prompt.training
    if training is None:
        return prompt
    spread = float(np.std(np.concatenate([array.ravel() for part in prompt.parts for _, array in part.arrays()])))
    tensors = {
        name: (array * (STD / spread)).astype(array.dtype) if name.endswith(_LINEAR[training.kind]) else array
        for name, array in training.tensors.items()
    }
    return rematerialise(replace(prompt, training=replace(training, tensors=tensors)))


def _template(geometry: Geometry) -> SoftPrompt:
    """``[v v] text [v v v] words [slot]``, with a verbaliser of two classes."""
    classes = Verbaliser((("no", (3, 7)), ("yes", (5,))))
    template = Template((Virtual(2), Field("text"), Virtual(3), Words((11, 12)), Slot()), classes)
    prompt = random_input_prompt(geometry, LENGTH, std=STD)
    part = replace(prompt.inputs[0], placement="template", template=template)
    start: dict[Stack, int] = {part.stack: 0}
    return replace(prompt, parts=(part,), positions=replace(prompt.positions, start=start))


def _gated(geometry: Geometry) -> SoftPrompt:
    generator = np.random.default_rng(2)

    def numbers(*shape: int) -> Array:
        return generator.normal(0, 0.5, shape).astype(np.float32)

    prompt = random_prefix(geometry, LENGTH, std=STD)
    parts = [
        replace(
            part,
            layers={
                layer: replace(pair, gate=Gate(numbers(1, geometry.hidden), numbers(1)))
                for layer, pair in part.layers.items()
            },
        )
        for part in prompt.prefixes
    ]
    return replace(prompt, parts=tuple(parts))


def _adaption(geometry: Geometry) -> SoftPrompt:
    """In all layers that attend but the first."""
    site: Site = "encoder" if geometry.decoder is None else "self"
    return random_adaption(geometry, LENGTH, layers=geometry.attending(site)[1:], std=STD)


def _some_layers(geometry: Geometry) -> SoftPrompt:
    """A prefix that leaves out the last layer."""
    prompt = random_prefix(geometry, LENGTH, std=STD)
    parts = [KeyValuePrefix(p.site, {n: p.layers[n] for n in list(p.layers)[:-1]}) for p in prompt.prefixes]
    return replace(prompt, parts=tuple(parts))


def _every_site(geometry: Geometry) -> SoftPrompt:
    sites = tuple(site for site in get_args(Site) if geometry.site(site) is not None)
    prompt = random_prefix(geometry, LENGTH, sites=sites, std=STD)
    head = TaskHead(labels=2).shapes(geometry) if geometry.decoder is None else {}
    generator = np.random.default_rng(3)
    return replace(prompt, head={n: generator.normal(0, STD, shape).astype(np.float32) for n, shape in head.items()})


#: Method -> what makes a prompt of it for a base model.
METHODS: Mapping[str, Callable[[Geometry], SoftPrompt]] = {
    "prompt-tuning": lambda geometry: random_input_prompt(geometry, LENGTH, std=STD),
    "p-tuning": lambda geometry: as_if_trained(PTuning(LENGTH), geometry),
    "p-tuning-template": _template,
    "multitask-prompt-tuning": lambda geometry: as_if_trained(MultitaskPromptTuning(2, length=LENGTH), geometry),
    "context-aware-prompt-tuning": lambda geometry: as_if_trained(ContextAwarePromptTuning([1, 2, 2, 3, 4]), geometry),
    "prefix-tuning": lambda geometry: random_prefix(geometry, LENGTH, std=STD),
    "prefix-tuning-mlp": lambda geometry: as_if_trained(_single_site(geometry, MLP(16)), geometry),
    "prefix-tuning-gated": _gated,
    "prefix-tuning-layers": _some_layers,
    "p-tuning-v2": _every_site,
    "llama-adapter": _adaption,
    "cartridge": lambda geometry: as_if_trained(Cartridge(LENGTH, sites=_single_site(geometry).sites), geometry),
}


def _single_site(geometry: Geometry, mlp: MLP | None = None) -> PrefixTuning:
    return PrefixTuning(LENGTH, mlp, ("encoder",) if geometry.decoder is None else ("self",))


def example(method: str, geometry: Geometry, capabilities: Capabilities) -> SoftPrompt:
    """A prompt of the method, with vectors and real tokens where a toolkit with these capabilities has them.

    Args:
        method: a name in `METHODS`.
        geometry: of the base model.
        capabilities: of the format that it is to come from.
    """
    prompt = METHODS[method](geometry)
    parts = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt) and (part.stack, part.entry, part.placement) not in capabilities.inputs:
            behind = (part.stack, "after", part.placement) in capabilities.inputs
            part = replace(part, entry="after") if behind else part
        parts.append(part)
    prompt = replace(prompt, parts=tuple(parts))
    return replace(prompt, positions=native_positions(prompt, capabilities))
