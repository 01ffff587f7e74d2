"""What a published method is made of: slots, a plan of tensors, a task head, where it was published."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from softbridge.arrays import Array
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.methods.kinds import Sizes, Start, Tensor, kind_of, measure, normal
from softbridge.methods.parameterisations import eject
from softbridge.prompt.part import InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import BaseId, Positions, SoftPrompt, Training
from softbridge.prompt.values import FrozenMap, Json

#: None: every layer of every site that the model has; names: every layer of these sites; a mapping: these layers.
Sites: TypeAlias = Sequence[Site] | Mapping[Site, Sequence[int]] | None


@dataclass(frozen=True)
class Paper:
    """Where a method was published."""

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


class Slot(NamedTuple):
    """One part that a method makes.

    Attributes:
        stack: whose real tokens' positions it moves, or None (cross-attention).
        site: of a prefix, or None for vectors in the input.
        width: numbers per virtual token: H, or W = 2·L·K·D.
        fill: [P, width] -> the part.
    """

    stack: Stack | None
    site: Site | None
    width: int
    fill: Callable[[Array], Part]


@dataclass(frozen=True)
class Plan:
    """What a method comes to on one base model.

    Attributes:
        slots: the parts that it makes.
        sizes: of its tensors; W comes from the slots.
        kind: the parameterisation, or None if the numbers of the parts are themselves what is trained.
        settings: of the parameterisation.
        start: without a parameterisation, how the numbers are drawn.
        head: tensors that are trained together with the prompt: name -> shape.
    """

    slots: tuple[Slot, ...]
    sizes: Sizes
    kind: str | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    start: Start = field(default=normal(1.0))
    head: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, Tensor, Sizes]]:
        """Every tensor of the prompt: its name, what it is, and the names of the sizes in its shape."""
        tensors = (
            {"prompt": Tensor("P W", self.start)} if self.kind is None else kind_of(self.kind).tensors(self.settings)
        )
        for slot in self.slots:
            for name, tensor in tensors.items():
                yield f"{slot.site}.{name}" if slot.site else name, tensor, {**self.sizes, "W": slot.width}


class Method(ABC):
    """What all methods have in common. Each says in `plan` what it is.

    Attributes:
        paper: where it was published.
        learning_rate: one with which AdamW learns, to start from: tests/golden/make_messages.py uses it on a small
            BERT. None where none was tried. Rates for the tensors of a parameterisation are far below those for the
            prompt's own numbers.
    """

    paper: ClassVar[Paper]
    learning_rate: ClassVar[float | None] = None

    @abstractmethod
    def plan(self, geometry: Geometry) -> Plan:
        """What the method comes to on a base model.

        Raises:
            ValueError: the method does not fit the base model, which lacks its stack, site or layer.
        """

    def parameters(self, geometry: Geometry) -> int:
        """How many numbers are trained.

        Raises:
            ValueError: the method does not fit the base model.
        """
        plan = self.plan(geometry)
        numbers = sum(math.prod(measure(tensor.shape, sizes)) for _, tensor, sizes in plan.tensors() if tensor.trained)
        return numbers + sum(math.prod(shape) for shape in plan.head.values())

    def initialise(self, geometry: Geometry, seed: int = 0) -> SoftPrompt:
        """A prompt with a random start in float32, the same for the same seed; its virtual tokens are counted.

        Raises:
            ValueError: the method does not fit the base model.
        """
        return draw(self.plan(geometry), geometry, seed, {})


def draw(plan: Plan, geometry: Geometry, seed: int, given: Mapping[str, Array]) -> SoftPrompt:
    """A random start, but for the tensors that are given."""
    generator = np.random.default_rng(seed)
    drawn: dict[str, Array] = {}
    for name, tensor, sizes in plan.tensors():
        shape = measure(tensor.shape, sizes)
        drawn[name] = given[name] if name in given else tensor.start(generator, shape, sizes).astype(np.float32)
        if drawn[name].shape != shape:
            raise ValueError(f"a start of the shape {list(drawn[name].shape)} for {name}, expected {list(shape)}")
    head = {name: head_start(generator, shape) for name, shape in plan.head.items()}
    if plan.kind is None:
        training = None
        parts = tuple(slot.fill(drawn[f"{slot.site}.prompt" if slot.site else "prompt"]) for slot in plan.slots)
    else:
        training = Training(plan.kind, plan.settings, drawn)
        parts = tuple(slot.fill(eject(training, slot.site)) for slot in plan.slots)
    start = {slot.stack: part.length for slot, part in zip(plan.slots, parts, strict=True) if slot.stack is not None}
    return SoftPrompt(parts, Positions(start), BaseId(None, geometry), head, training)


def head_start(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """As BERT's heads start: matrices with standard deviation 0.02, biases 0."""
    return generator.normal(0, 0.02 if len(shape) > 1 else 0.0, shape).astype(np.float32)


def input_slot(geometry: Geometry, stack: Stack | None) -> tuple[Slot, ...]:
    """Vectors in the input of one stack; None: of the encoder, where there is one."""
    place: Stack = stack or ("decoder" if geometry.encoder is None else "encoder")
    if place not in get_args(Stack) or geometry.stack(place) is None:
        raise ValueError(f"stack: {geometry.model_type} has no {place!r}")
    return (Slot(place, None, geometry.input_width, lambda vectors: InputPrompt(vectors, place)),)


def prefix_slots(geometry: Geometry, sites: Sites) -> tuple[Slot, ...]:
    """Prefixes of some layers of some sites."""
    if sites is None:
        sites = [site for site in get_args(Site) if geometry.site(site) is not None]
    slots = []
    for site in sites:
        shape = geometry.site(site) if site in get_args(Site) else None
        if shape is None:
            raise ValueError(f"sites: {geometry.model_type} has no site {site!r}")
        layers = tuple(sorted(sites[site])) if isinstance(sites, Mapping) else geometry.attending(site)
        if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(shape.layers)):
            raise ValueError(f"sites: layers {list(layers)} at site {site!r}, which has layers 0 to {shape.layers - 1}")
        if not set(layers) <= set(shape.attending):
            others = ", ".join(shape.named(layer) for layer in layers if layer not in shape.attending)
            raise ValueError(f"sites: {others} at site {site!r}, which have no keys and values; {shape.attending} have")
        slots.append(prefix_slot(site, {layer: shape.shape(layer) for layer in layers}))
    if not slots or len({slot.site for slot in slots}) < len(slots):
        raise ValueError(f"sites: at least one, and each of them once, not {list(sites)}")
    return tuple(slots)


def prefix_slot(site: Site, shapes: Mapping[int, tuple[int, int]]) -> Slot:
    """The slot of a prefix at one site, of K and D of each layer."""
    width = sum(2 * kv_heads * head_dim for kv_heads, head_dim in shapes.values())
    stack = None if site == "cross" else stack_of(site)
    return Slot(stack, site, width, lambda flat: KeyValuePrefix.from_rows(site, flat, shapes))


def freeze(method: object, name: str = "sites") -> None:
    """Make the field immutable: a list a tuple, a mapping a `FrozenMap`."""
    value = getattr(method, name)
    if isinstance(value, Mapping):
        object.__setattr__(method, name, FrozenMap({site: tuple(layers) for site, layers in value.items()}))
    elif value is not None:
        object.__setattr__(method, name, tuple(value))


def need_counts(method: object, *names: str, least: int = 1) -> None:
    """Refuse a size that is no positive count."""
    for name in names:
        value = getattr(method, name)
        if type(value) is not int or value < least:
            raise ValueError(f"{type(method).__name__}: {name} is {value!r}, expected a whole number from {least}")


Task: TypeAlias = Literal["sequence-classification", "token-classification", "question-answering"]
HEAD_MODULES: Mapping[Task, str] = {
    "sequence-classification": "classifier",
    "token-classification": "classifier",
    "question-answering": "qa_outputs",
}


@dataclass(frozen=True)
class TaskHead:
    """The linear layer that P-tuning v2 trains with the prefix, and others if they are given one.

    ``{module}.weight`` [C, H] and ``{module}.bias`` [C].

    Attributes:
        task: what it is for.
        labels: C; 2 in question answering (start and end).
        module: its name in the model; None: that of the published code, which BERT has too: ``classifier``, or
            ``qa_outputs``.
        bias: whether it has one (decoders' ``score`` has none).
    """

    task: Task = "sequence-classification"
    labels: int = 2
    module: str | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        need_counts(self, "labels")
        if self.task not in HEAD_MODULES:
            raise ValueError(f"task: one of {', '.join(HEAD_MODULES)}, not {self.task!r}")
        if self.task == "question-answering" and self.labels != 2:
            raise ValueError(f"labels: question answering has 2, the start and the end, not {self.labels}")

    def shapes(self, geometry: Geometry) -> dict[str, tuple[int, ...]]:
        """Its tensors: name -> shape."""
        module = self.module or HEAD_MODULES[self.task]
        bias = {f"{module}.bias": (self.labels,)} if self.bias else {}
        return {f"{module}.weight": (self.labels, geometry.hidden), **bias}


def head_shapes(head: TaskHead | None, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Name of a head's parameter -> its shape."""
    return {} if head is None else head.shapes(geometry)
