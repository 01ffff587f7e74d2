"""What a soft prompt is, independent of every toolkit.

Notation, here and in every docstring of the project: B batch, T real tokens, P prompt length (virtual tokens),
H hidden size, L layers, K key/value heads, D head size. Shapes come first.

A model ever sees only two kinds of part: vectors in its input sequence (`InputPrompt`) and keys and values in its
attention (`KeyValuePrefix`). How training produced them (an MLP, an LSTM, a low-rank product) is kept beside them in
`SoftPrompt.training`, if it is known, and no engine needs it to run the prompt.

Arrays are read-only NumPy arrays (bfloat16 through ml_dtypes), so that listing, inspecting and converting need no
deep-learning framework. All classes are immutable and compared by value.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from softbridge.geometry import Geometry, Site, Stack, stack_of
from softbridge.template import Template

Array: TypeAlias = npt.NDArray[Any]
Json: TypeAlias = Any

Name = TypeVar("Name")
Value = TypeVar("Value")

Entry = Literal["before", "after"]
Placement = Literal["before-sequence", "after-first-token", "template"]
RelativeBias = Literal["plain", "skewed"]
Window = Literal["slides", "pinned"]
Untold = Literal["untold"]


class FrozenMap(Mapping[Name, Value]):
    """A read-only mapping that pickles and deep-copies (a mapping proxy does neither)."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[Name, Value]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: Name) -> Value:
        return self._items[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def frozen(array: npt.ArrayLike) -> Array:
    """A read-only view of `array` (which itself is not touched)."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def same_array(a: Array, b: Array) -> bool:
    """Equality of dtype, shape and every bit (so NaN equals NaN, and 0.0 differs from -0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _same_arrays(a: Mapping[Any, Array], b: Mapping[Any, Array]) -> bool:
    return a.keys() == b.keys() and all(same_array(a[name], b[name]) for name in a)


def _shapes(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _json_object(value: Mapping[Any, Any], what: str) -> dict[str, Json]:
    """A copy of the value in plain JSON types, as it would come back from a file.

    Normalised here and not where it is written, so that a prompt equals the one that is read from its own file.
    Tuples become lists, whole numbers as keys become text (as `json.dumps` writes them), and subclasses (enums, NumPy's
    float64) become the type that they are derived from.
    """
    try:
        return _json_mapping(value, what)
    except RecursionError as error:
        raise ValueError(f"{what}: nested too deeply, or in itself") from error


def _json_mapping(value: Mapping[Any, Any], here: str) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for key, item in value.items():
        _require(isinstance(key, str | int) and not isinstance(key, bool), f"{here}: a key of {type(key).__name__}")
        name = _json(key if isinstance(key, str) else str(int(key)), here)
        _require(name not in result, f"{here}: two keys {name!r:.40}")
        result[name] = _json(item, f"{here}.{name:.40}")
    return result


def _json(value: object, here: str) -> Json:
    match value:
        case None | bool():
            return value
        case str():
            text = str.__str__(value)
            text.encode("utf-8")  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
            return text
        case int():
            return int(value)
        case float():
            _require(math.isfinite(value), f"{here}: {value}, which JSON does not have")
            return float(value)
        case list() | tuple():
            return [_json(item, f"{here}.{number}") for number, item in enumerate(value)]
        case Mapping():
            return _json_mapping(value, here)
        case _:
            raise ValueError(f"{here}: {type(value).__name__}, which is no JSON value")


@dataclass(frozen=True, eq=False, repr=False)
class InputPrompt:
    """Vectors that stand in the input sequence of one stack.

    Attributes:
        vectors: [P, H], in the space that the entry names.
        stack: ``encoder`` or ``decoder`` (a decoder-only model has a decoder).
        entry: ``before`` the embedding block's own position, token-type and LayerNorm step (what
            ``inputs_embeds`` means in transformers), or ``after`` it.
        placement: ``before-sequence``, ``after-first-token`` (after a [CLS] or <s>), or where a ``template`` has them.
        template: the template, if that is the placement, else None. The n-th vector stands in the place of the n-th
            `softbridge.template.PLACEHOLDER` of a row.
        scale: by what the model that they are for multiplies them before its first layer, where releases of
            transformers differ in that (`softbridge.base.BaseModel.scale`). None: the installed one's number, or of no
            matter. ``untold``: they were read from files that do not say it, which counts as None in a comparison.
    """

    vectors: Array
    stack: Stack
    entry: Entry = "before"
    placement: Placement = "before-sequence"
    template: Template | None = None
    scale: float | Untold | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", frozen(self.vectors))
        _require(self.vectors.ndim == 2 and min(self.vectors.shape) > 0, f"vectors: [P, H], not {self.vectors.shape}")
        _require(self.stack in get_args(Stack), f"stack: {self.stack!r}")
        _require(self.entry in get_args(Entry), f"entry: {self.entry!r}")
        _require(self.placement in get_args(Placement), f"placement: {self.placement!r}")
        _require((self.placement == "template") == (self.template is not None), "template: where it is the placement")
        if self.template is not None:
            _require(self.entry == "before", "entry: the virtual tokens of a template enter before the embedding block")
            same = self.template.length == self.length
            _require(same, f"template: of {self.length} virtual tokens, like the vectors, not {self.template.length}")
        if self.scale is not None and self.scale != "untold":
            number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
            _require(number and 0 < self.scale < math.inf, f"scale: {self.scale!r:.40}, not a positive number")
            _require(self.entry == "before", "scale: of vectors that enter before the embedding block")
            object.__setattr__(self, "scale", float(self.scale))

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return int(self.vectors.shape[0])

    @property
    def told_scale(self) -> float | None:
        """`scale`, if it is a number."""
        return None if self.scale == "untold" else self.scale

    @property
    def _kind(self) -> tuple[Any, ...]:
        return (self.stack, self.entry, self.placement, self.template, self.told_scale)

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays with a name that is unique within the part."""
        yield "vectors", self.vectors

    def __repr__(self) -> str:
        shape = list(self.vectors.shape)
        scale = "" if self.told_scale is None else f", scale {self.told_scale:g}"
        return f"InputPrompt({shape} {self.vectors.dtype}, {self.stack}, {self.entry}, {self.placement}{scale})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InputPrompt):
            return NotImplemented
        return self._kind == other._kind and same_array(self.vectors, other.vectors)

    def __hash__(self) -> int:
        return hash((self._kind, self.vectors.shape))


@dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """A gate on the prefix of one attention layer, which depends on the input (UniPELT, Mao et al. 2022).

    In every call the layer's keys are multiplied by g[0] and its values by g[-1], where g [G] is the mean, over all
    positions of the call, of sigmoid(weight · x + bias), and x [H] is what enters the attention module. The mean goes
    over pads, too, and in cached decoding over the one new token: so the toolkit that has it (AdapterHub) computes it.

    Attributes:
        weight: [G, H]; G is 1, or 2 for a gate of the values of their own.
        bias: [G].
    """

    weight: Array
    bias: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", frozen(self.weight))
        object.__setattr__(self, "bias", frozen(self.bias))
        shape = self.weight.shape
        _require(
            self.weight.ndim == 2 and shape[0] in (1, 2) and shape[1] > 0, f"gate: weight [1 or 2, H], not {shape}"
        )
        _require(self.bias.shape == shape[:1], f"gate: bias {list(shape[:1])}, not {list(self.bias.shape)}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        return same_array(self.weight, other.weight) and same_array(self.bias, other.bias)

    def __hash__(self) -> int:
        return hash((self.weight.shape, self.weight.dtype))


@dataclass(frozen=True, eq=False, repr=False)
class KeyValue:
    """The prefix of one attention layer: keys [K, P, D] and values [K, P, D], as they enter the dot product.

    Attributes:
        keys: [K, P, D].
        values: [K, P, D].
        gate: what multiplies them, or None.
    """

    keys: Array
    values: Array
    gate: Gate | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozen(self.keys))
        object.__setattr__(self, "values", frozen(self.values))
        shape = self.keys.shape
        _require(self.keys.ndim == 3 and min(shape) > 0, f"keys: [K, P, D], not {shape}")
        _require(self.values.shape == shape, f"values: {shape} like the keys, not {self.values.shape}")

    def __repr__(self) -> str:
        return f"KeyValue({list(self.keys.shape)} {self.keys.dtype}{', gated' if self.gate is not None else ''})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyValue):
            return NotImplemented
        same = same_array(self.keys, other.keys) and same_array(self.values, other.values)
        return same and self.gate == other.gate

    def __hash__(self) -> int:
        return hash((self.keys.shape, self.keys.dtype))


@dataclass(frozen=True, eq=False, repr=False)
class KeyValuePrefix:
    """Keys and values that stand before the real ones in the attention of named layers.

    Attributes:
        site: ``self`` (self-attention of the decoder, or of a decoder-only model), ``encoder`` (self-attention of the
            encoder, or of an encoder-only model) or ``cross`` (the decoder's attention to the encoder).
        layers: layer number (from 0, within its stack) -> `KeyValue`. Layers may be left out, and may differ in K
            and D; P is the same in all. Of a hybrid model it joins layers that attend: what others keep of a text, a
            state, a prefix neither holds nor touches, and its first real token is the first that a state reads.
    """

    site: Site
    layers: Mapping[int, KeyValue]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", FrozenMap(dict(sorted(self.layers.items()))))
        _require(self.site in get_args(Site), f"site: {self.site!r}")
        _require(len(self.layers) > 0, "layers: at least one")
        _require(all(layer >= 0 for layer in self.layers), f"layers: numbered from 0, not {sorted(self.layers)}")
        lengths = {pair.keys.shape[1] for pair in self.layers.values()}
        _require(len(lengths) == 1, f"layers: one prefix length for all, not {sorted(lengths)}")

    @property
    def length(self) -> int:
        """P, the number of virtual tokens."""
        return int(next(iter(self.layers.values())).keys.shape[1])

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays with a name that is unique within the part."""
        for layer, pair in self.layers.items():
            yield f"layers.{layer}.keys", pair.keys
            yield f"layers.{layer}.values", pair.values
            if pair.gate is not None:
                yield f"layers.{layer}.gate.weight", pair.gate.weight
                yield f"layers.{layer}.gate.bias", pair.gate.bias

    @property
    def gated(self) -> bool:
        """Whether any layer has a gate."""
        return any(pair.gate is not None for pair in self.layers.values())

    @classmethod
    def from_flat(
        cls, site: Site, flat: Array, layers: tuple[int, ...], kv_heads: int, head_dim: int
    ) -> KeyValuePrefix:
        """Read the layout that nearly every toolkit shares.

        Args:
            flat: [P, 2·L·K·D] or anything that reshapes to it; the innermost order is layer, key before value, head,
                channel (Li & Liang 2021, and after them PEFT, AdapterHub, P-tuning v2, ChatGLM).
            layers: the L layer numbers, in the file's order.
        """
        return cls.from_rows(site, flat, dict.fromkeys(layers, (kv_heads, head_dim)))

    @classmethod
    def from_rows(cls, site: Site, flat: Array, shapes: Mapping[int, tuple[int, int]]) -> KeyValuePrefix:
        """`from_flat` where layers differ: layer -> (K, D), in the file's order; flat is [P, Σ 2·K·D]."""
        rows = np.asarray(flat).reshape(-1, sum(2 * heads * width for heads, width in shapes.values()))
        layers, at = {}, 0
        for layer, (heads, width) in shapes.items():
            pair = rows[:, at : at + 2 * heads * width].reshape(-1, 2, heads, width).transpose(1, 2, 0, 3)
            layers[layer] = KeyValue(pair[0], pair[1])
            at += 2 * heads * width
        return cls(site, layers)

    def flat(self) -> Array:
        """[P, 2·L·K·D], the inverse of `from_flat` for the layers that are there, in rising order; without gates."""
        halves = [half for pair in self.layers.values() for half in (pair.keys, pair.values)]
        return np.concatenate([half.transpose(1, 0, 2).reshape(self.length, -1) for half in halves], axis=1)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(map(repr, self.layers.values())))
        return f"KeyValuePrefix({self.site}, layers {list(self.layers)}, {kinds})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyValuePrefix):
            return NotImplemented
        return self.site == other.site and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.site, tuple(self.layers)))


Part: TypeAlias = InputPrompt | KeyValuePrefix


def prefixed_stacks(parts: Iterable[Part]) -> set[Stack]:
    """The stacks whose self-attention has a prefix."""
    return {stack_of(p.site) for p in parts if isinstance(p, KeyValuePrefix) and p.site != "cross"}


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
            _require(all(stack in get_args(Stack) for stack in told), f"{name}: {dict(told)}")
            counts = all(type(place) is int and place >= 0 for place in told.values())
            _require(counts, f"{name}: numbers from 0, not {dict(told)}")
        _require(self.relative_bias in get_args(RelativeBias), f"relative_bias: {self.relative_bias!r}")
        _require(self.window in get_args(Window), f"window: {self.window!r}")

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
        settings = _json_object(self.settings, "settings")
        object.__setattr__(self, "settings", FrozenMap(dict(sorted(settings.items()))))
        object.__setattr__(
            self, "tensors", FrozenMap({name: frozen(self.tensors[name]) for name in sorted(self.tensors)})
        )

    def __repr__(self) -> str:
        return f"Training({self.kind}, {self.settings}, {_shapes(self.tensors)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Training):
            return NotImplemented
        same_settings = self.kind == other.kind and self.settings == other.settings
        return same_settings and _same_arrays(self.tensors, other.tensors)

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
        notes: what whoever converts the files is told of what was read, a sentence each, such as of numbers that no
            model ever sees; None: the format's reader has nothing to tell of any file.
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
        details = _json_object(self.details, "details")
        told = {name: details.pop(name) for name in ("notes", "partial") if name in details}
        notes = told.get("notes") if self.notes is None else self.notes
        partial = self.partial
        if partial is None and "partial" in told:
            partial = "" if told["partial"] is None else told["partial"]
        texts = notes is None or (isinstance(notes, (list, tuple)) and all(isinstance(note, str) for note in notes))
        _require(texts, f"notes: {notes!r:.80}, not a list of texts")
        _require(partial is None or isinstance(partial, str), f"partial: {partial!r:.80}, not a text")
        object.__setattr__(self, "details", FrozenMap(details))
        object.__setattr__(self, "digests", FrozenMap(self.digests))
        object.__setattr__(self, "notes", None if notes is None else tuple(notes))
        object.__setattr__(self, "partial", partial)

    def described(self) -> dict[str, Json]:
        """The details, and those two among them where the reader tells of them: what softbridge's own files have."""
        told: dict[str, Json] = {} if self.notes is None else {"notes": list(self.notes)}
        return {**self.details, **told, **({} if self.partial is None else {"partial": self.partial or None})}


@dataclass(frozen=True, eq=False, repr=False)
class SoftPrompt:
    """A trained soft prompt: everything that a model ever sees of it, and what is known beside.

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
        _require(len(self.parts) > 0, "parts: at least one")
        _require(len(self.prefixes) == len({p.site for p in self.prefixes}), "parts: one prefix per site")
        _require(len(self.inputs) == len({p.stack for p in self.inputs}), "parts: one input prompt per stack")
        stacks, told = sorted(self.counted()), sorted(self.positions.start)
        _require(stacks == told, f"positions: a start for {stacks}, the stacks with virtual tokens, not for {told}")
        others = sorted(self.positions.unbiased_from.keys() - prefixed_stacks(self.parts))
        _require(not others, f"positions: unbiased_from for {others}, whose self-attention has no prefix")

    @property
    def prefixes(self) -> tuple[KeyValuePrefix, ...]:
        return tuple(part for part in self.parts if isinstance(part, KeyValuePrefix))

    @property
    def inputs(self) -> tuple[InputPrompt, ...]:
        return tuple(part for part in self.parts if isinstance(part, InputPrompt))

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
        more = f", head {_shapes(self.head)}" if self.head else ""
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
            and _same_arrays(self.head, other.head)
            and self.training == other.training
        )

    def __hash__(self) -> int:
        return hash((self.parts, self.positions, self.base))
