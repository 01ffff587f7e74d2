"""What a soft prompt is, independent of every toolkit.

Notation, here and in every docstring of the project: B batch, T real tokens, P prompt length (virtual tokens),
H hidden size, L layers, K key/value heads, D head size. Shapes come first.

A model ever sees three kinds of part: vectors in its input sequence (`InputPrompt`), keys and values in its attention
(`KeyValuePrefix`), and vectors beside its attention, behind a gate (`AdaptionPrompt`). How training produced them (an
MLP, an LSTM, a low-rank product) is kept beside them in `SoftPrompt.training`, if it is known, and no engine needs it
to run the prompt.

Arrays are read-only NumPy arrays (bfloat16 through ml_dtypes), so that listing, inspecting and converting need no
deep-learning framework. All classes are immutable and compared by value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from softbridge.arrays import Array, frozen, same_arrays, shapes_of
from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part, prefixed_stacks
from softbridge.prompt.values import FrozenMap, Json, json_object, require

RelativeBias = Literal["plain", "skewed"]
Window = Literal["slides", "pinned"]


@dataclass(frozen=True)
class Positions:
    """What toolkits leave unsaid, and what makes copied numbers compute another function.

    Attributes:
        start: stack -> where its first real token stands. A toolkit that seeds the cache, or puts vectors into the
            sequence, *counts* the virtual tokens: the first real token stands at P. One that concatenates inside
            attention does not: 0. Prefix keys carry no position of their own; with rotary positions the start is
            therefore also the frame in which the keys are stored. A stack that is absent has no real tokens'
            positions to speak of (only cross-attention is prefixed). Virtual tokens behind the first real one count
            as if they stood before it, if they enter before the embedding block: that one is at start - P, the second
            at start + 1. With a template, it is where the row starts that holds virtual and real tokens.
        relative_bias: how a T5-like bias sees the prefix: ``plain`` (a real token i stands at start + i, virtual token
            j at j) or ``skewed`` (AdapterHub's T5: queries count from 0, keys count the prefix, so that the bias
            between real tokens, too, is shifted by P).
        window: whether a sliding window drops virtual tokens that fell out of it (``slides``, as cache content does)
            or they stay visible (``pinned``, as concatenation inside attention does).
        unbiased_from: stack -> the layer from which on its self-attention has no T5-like bias, neither for virtual nor
            for real tokens, be the layer prefixed or not (AdapterHub's T5: the bias is lost where a prefixed layer and
            one that is left out meet). A stack that is absent has the bias in every layer.
    """

    start: Mapping[Stack, int] = field(default_factory=dict)
    relative_bias: RelativeBias = "plain"
    window: Window = "slides"
    unbiased_from: Mapping[Stack, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("start", "unbiased_from"):
            told: Mapping[Stack, int] = FrozenMap(dict(sorted(getattr(self, name).items())))
            object.__setattr__(self, name, told)
            require(all(stack in get_args(Stack) for stack in told), f"{name}: {dict(told)}")
            counts = all(type(place) is int and place >= 0 for place in told.values())
            require(counts, f"{name}: numbers from 0, not {dict(told)}")
        require(self.relative_bias in get_args(RelativeBias), f"relative_bias: {self.relative_bias!r}")
        require(self.window in get_args(Window), f"window: {self.window!r}")

    def __hash__(self) -> int:
        return hash((tuple(self.start.items()), self.relative_bias, self.window, tuple(self.unbiased_from.items())))

    def to_json(self) -> dict[str, Json]:
        """The arguments of this class in JSON's types; ``unbiased_from`` only where it says something."""
        said = {"start": dict(self.start), "relative_bias": self.relative_bias, "window": self.window}
        return said | ({"unbiased_from": dict(self.unbiased_from)} if self.unbiased_from else {})

    def of(self, parts: Collection[Part], start: Mapping[Stack, int]) -> Positions:
        """The same for these parts alone, with the stacks' starts."""
        stacks = prefixed_stacks(parts)
        unbiased = {stack: layer for stack, layer in self.unbiased_from.items() if stack in stacks}
        return replace(self, start=start, unbiased_from=unbiased)


@dataclass(frozen=True)
class BaseId:
    """For which base model a prompt was trained, as far as it is known.

    Attributes:
        name: as the file gives it.
        geometry: of its attention.
        task: of the prompt's head, in the words of `softbridge.base.Task`, while a prompt with a head is written for a
            base model at hand: heads of several tasks have the same names. Not stored, and not part of equality.
    """

    name: str | None = None
    geometry: Geometry | None = None
    task: str | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """The parameterisation's own tensors, so that training can go on. Running a prompt needs none of it.

    Attributes:
        kind: a name from `softbridge.methods`.
        settings: JSON values (activation, dropout, ...); normalised, so that tuples become lists.
        tensors: name -> array, as the kind documents it.
    """

    kind: str
    settings: Mapping[str, Json]
    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        settings = json_object(self.settings, "settings")
        object.__setattr__(self, "settings", FrozenMap(dict(sorted(settings.items()))))
        object.__setattr__(
            self, "tensors", FrozenMap({name: frozen(self.tensors[name]) for name in sorted(self.tensors)})
        )

    def __repr__(self) -> str:
        return f"Training({self.kind}, {self.settings}, {shapes_of(self.tensors)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Training):
            return NotImplemented
        same_settings = self.kind == other.kind and self.settings == other.settings
        return same_settings and same_arrays(self.tensors, other.tensors)

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.tensors)))


@dataclass(frozen=True)
class Origin:
    """Provenance: which toolkit wrote the file that a prompt was read from, and the digests of its files.

    Attributes:
        format: the name of the format.
        details: what the file says of itself and softbridge has no other place for (toolkit version, unknown keys);
            a writer of the same format gives it back. JSON values, normalised.
        digests: file name -> sha256, hexadecimal.
        notes: what a conversion reports of the files that were read, a sentence each, such as of numbers that no model
            ever sees; None: this format's reader never reports anything.
        partial: what of the source is no soft prompt and was not read, in words. The prompt alone is then another
            function, and lowering refuses it unless that is accepted. Empty: nothing was left; None: the format's
            reader reads all of every file.

    Two details that are called ``notes`` and ``partial`` (null: empty) are these, if they are not given by themselves:
    that is where softbridge's own files have them.

    Raises:
        ValueError: notes or partial of another kind.
    """

    format: str
    details: Mapping[str, Json] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] | None = None
    partial: str | None = None

    def __post_init__(self) -> None:
        details = json_object(self.details, "details")
        told = {name: details.pop(name) for name in ("notes", "partial") if name in details}
        notes = told.get("notes") if self.notes is None else self.notes
        partial = self.partial
        if partial is None and "partial" in told:
            partial = "" if told["partial"] is None else told["partial"]
        texts = notes is None or (isinstance(notes, (list, tuple)) and all(isinstance(note, str) for note in notes))
        require(texts, f"notes: {notes!r:.80}, not a list of texts")
        require(partial is None or isinstance(partial, str), f"partial: {partial!r:.80}, not a text")
        object.__setattr__(self, "details", FrozenMap(details))
        object.__setattr__(self, "digests", FrozenMap(self.digests))
        object.__setattr__(self, "notes", None if notes is None else tuple(notes))
        object.__setattr__(self, "partial", partial)

    def described(self) -> dict[str, Json]:
        """The details, and those two among them where the reader set them: what softbridge's own files have."""
        told: dict[str, Json] = {} if self.notes is None else {"notes": list(self.notes)}
        return {**self.details, **told, **({} if self.partial is None else {"partial": self.partial or None})}


@dataclass(frozen=True, eq=False, repr=False)
class SoftPrompt:
    """A trained soft prompt: everything that a model ever sees of it, and what else is known of it.

    Attributes:
        parts: at least one.
        positions: where real tokens stand; see `Positions`.
        base: the base model that it was trained for.
        head: tensors which ride along (a classifier), by name.
        training: the parameterisation, when known.
        origin: provenance. Not part of equality.
    """

    parts: tuple[Part, ...]
    positions: Positions
    base: BaseId = field(default_factory=BaseId)
    head: Mapping[str, Array] = field(default_factory=dict)
    training: Training | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "head", FrozenMap({name: frozen(a) for name, a in sorted(self.head.items())}))
        require(len(self.parts) > 0, "parts: at least one")
        require(len(self.prefixes) == len({p.site for p in self.prefixes}), "parts: one prefix per site")
        require(len(self.inputs) == len({p.stack for p in self.inputs}), "parts: one input prompt per stack")
        require(len(self.adaptions) == len({p.site for p in self.adaptions}), "parts: one adaption prompt per site")
        stacks, told = sorted(self.counted()), sorted(self.positions.start)
        require(stacks == told, f"positions: a start for {stacks}, the stacks with virtual tokens, not for {told}")
        others = sorted(self.positions.unbiased_from.keys() - prefixed_stacks(self.parts))
        require(not others, f"positions: unbiased_from for {others}, whose self-attention has no prefix")

    @property
    def prefixes(self) -> tuple[KeyValuePrefix, ...]:
        return tuple(part for part in self.parts if isinstance(part, KeyValuePrefix))

    @property
    def inputs(self) -> tuple[InputPrompt, ...]:
        return tuple(part for part in self.parts if isinstance(part, InputPrompt))

    @property
    def adaptions(self) -> tuple[AdaptionPrompt, ...]:
        return tuple(part for part in self.parts if isinstance(part, AdaptionPrompt))

    @property
    def layered(self) -> tuple[KeyValuePrefix | AdaptionPrompt, ...]:
        """The parts that have numbers for each of some layers."""
        return tuple(part for part in self.parts if not isinstance(part, InputPrompt))

    def prefix(self, site: Site) -> KeyValuePrefix | None:
        return next((part for part in self.prefixes if part.site == site), None)

    def counted(self) -> dict[Stack, int]:
        """Where each stack's first real token stands if the virtual tokens are counted: stack -> P.

        The virtual tokens of a template stand among the real ones, and the row that holds both starts at 0.
        """
        lengths: dict[Stack, int] = {p.stack: 0 if p.template is not None else p.length for p in self.inputs}
        for part in self.prefixes:
            if part.site != "cross":
                stack = stack_of(part.site)
                lengths[stack] = lengths.get(stack, 0) + part.length
        return lengths

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Every array of parts, head and training, under a name that is unique and stable."""
        for number, part in enumerate(self.parts):
            for name, array in part.arrays():
                yield f"parts.{number}.{name}", array
        for name, array in self.head.items():
            yield f"head.{name}", array
        if self.training is not None:
            for name, array in self.training.tensors.items():
                yield f"training.{name}", array

    def __repr__(self) -> str:
        more = f", head {shapes_of(self.head)}" if self.head else ""
        more += f", {self.training}" if self.training is not None else ""
        more += f", from {self.origin.format}" if self.origin is not None else ""
        return f"SoftPrompt({list(self.parts)}, {self.positions}, {self.base}{more})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SoftPrompt):
            return NotImplemented
        return (
            self.parts == other.parts
            and self.positions == other.positions
            and self.base == other.base
            and same_arrays(self.head, other.head)
            and self.training == other.training
        )

    def __hash__(self) -> int:
        return hash((self.parts, self.positions, self.base))
