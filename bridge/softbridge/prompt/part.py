"""What a model meets of a soft prompt: vectors in its input, keys and values in its attention, vectors beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from softbridge.arrays import Array, frozen, same_array
from softbridge.geometry import Site, Stack, stack_of
from softbridge.prompt.values import FrozenMap, require
from softbridge.template import Template

Entry = Literal["before", "after"]
Placement = Literal["before-sequence", "after-first-token", "template"]
Untold = Literal["untold"]
Joins = Literal["heads", "module", "output"]


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
            transformers differ in that (`softbridge.BaseModel.scale`). None: the installed one's number, or of no
            matter. ``untold``: the files that they were read from do not say it, which counts as None in a comparison.
    """

    vectors: Array
    stack: Stack
    entry: Entry = "before"
    placement: Placement = "before-sequence"
    template: Template | None = None
    scale: float | Untold | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", frozen(self.vectors))
        require(self.vectors.ndim == 2 and min(self.vectors.shape) > 0, f"vectors: [P, H], not {self.vectors.shape}")
        require(self.stack in get_args(Stack), f"stack: {self.stack!r}")
        require(self.entry in get_args(Entry), f"entry: {self.entry!r}")
        require(self.placement in get_args(Placement), f"placement: {self.placement!r}")
        require((self.placement == "template") == (self.template is not None), "template: where it is the placement")
        if self.template is not None:
            require(self.entry == "before", "entry: the virtual tokens of a template enter before the embedding block")
            same = self.template.length == self.length
            require(same, f"template: of {self.length} virtual tokens, like the vectors, not {self.template.length}")
        if self.scale is not None and self.scale != "untold":
            number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
            require(number and 0 < self.scale < math.inf, f"scale: {self.scale!r:.40}, not a positive number")
            require(self.entry == "before", "scale: of vectors that enter before the embedding block")
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
        require(self.weight.ndim == 2 and shape[0] in (1, 2) and shape[1] > 0, f"gate: weight [1 or 2, H], not {shape}")
        require(self.bias.shape == shape[:1], f"gate: bias {list(shape[:1])}, not {list(self.bias.shape)}")

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
        require(self.keys.ndim == 3 and min(shape) > 0, f"keys: [K, P, D], not {shape}")
        require(self.values.shape == shape, f"values: {shape} like the keys, not {self.values.shape}")

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
        require(self.site in get_args(Site), f"site: {self.site!r}")
        require(len(self.layers) > 0, "layers: at least one")
        require(all(layer >= 0 for layer in self.layers), f"layers: numbered from 0, not {sorted(self.layers)}")
        lengths = {pair.keys.shape[1] for pair in self.layers.values()}
        require(len(lengths) == 1, f"layers: one prefix length for all, not {sorted(lengths)}")

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
        """[P, 2·L·K·D], the inverse of `from_flat` for the layers that are there, in rising order; without gates.

        Of windows on one such array it is that array, read-only, and no copy.
        """
        halves = self._halves()
        if (whole := _side_by_side(halves)) is not None:
            return whole
        widths = [half.shape[0] * half.shape[2] for half in halves]
        flat = np.empty((self.length, sum(widths)), np.result_type(*halves))
        at = 0
        for half, width in zip(halves, widths, strict=True):  # each number is copied once
            place = flat[:, at : at + width].reshape(self.length, half.shape[0], half.shape[2])
            np.copyto(place, half.transpose(1, 0, 2))
            at += width
        return flat

    def _halves(self) -> list[Array]:
        """Keys and values of each layer, in rising order."""
        return [half for pair in self.layers.values() for half in (pair.keys, pair.values)]

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(map(repr, self.layers.values())))
        return f"KeyValuePrefix({self.site}, layers {list(self.layers)}, {kinds})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeyValuePrefix):
            return NotImplemented
        if self.site != other.site or self.layers.keys() != other.layers.keys():
            return False
        ours, theirs = self._halves(), other._halves()
        if not (self.gated or other.gated) and [a.shape for a in ours] == [a.shape for a in theirs]:
            one, two = _side_by_side(ours), _side_by_side(theirs)
            if one is not None and two is not None:  # from front to back
                return same_array(one, two)
        return self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.site, tuple(self.layers)))


def _side_by_side(halves: Sequence[Array]) -> Array | None:
    """[P, W], if these [K, P, D] are windows that cover one such array from its first column to its last."""
    first = halves[0]
    width = sum(half.shape[0] * half.shape[2] for half in halves)
    at, row, size = first.__array_interface__["data"][0], width * first.itemsize, first.itemsize
    for half in halves:
        heads, _, head_dim = half.shape
        here = half.__array_interface__["data"][0]
        if half.base is None or half.base is not first.base or half.dtype != first.dtype:
            return None
        if here != at or half.strides != (head_dim * size, row, size):
            return None
        at += heads * head_dim * size
    return np.lib.stride_tricks.as_strided(first, (first.shape[1], width), (row, size), writeable=False)


@dataclass(frozen=True, eq=False, repr=False)
class Adaption:
    """What one attention layer has of an `AdaptionPrompt`.

    Attributes:
        vectors: [P, H], as they enter the layer's projections of keys and of values.
        gate: [1], or [heads] with a number for each head of the queries. It multiplies as it is: what a toolkit makes
            of a stored number first (the tanh of the paper's own code), its reader has done.
    """

    vectors: Array
    gate: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", frozen(self.vectors))
        object.__setattr__(self, "gate", frozen(self.gate))
        shape, gate = self.vectors.shape, self.gate.shape
        require(len(shape) == 2 and min(shape) > 0, f"vectors: [P, H], not {list(shape)}")
        require(len(gate) == 1 and gate[0] > 0, f"gate: [1 or heads], not {list(gate)}")

    def __repr__(self) -> str:
        gates = len(self.gate)
        return f"Adaption({list(self.vectors.shape)} {self.vectors.dtype}, {gates} gate{'s' * (gates > 1)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adaption):
            return NotImplemented
        return same_array(self.vectors, other.vectors) and same_array(self.gate, other.gate)

    def __hash__(self) -> int:
        return hash((self.vectors.shape, self.vectors.dtype, self.gate.shape))


@dataclass(frozen=True, eq=False, repr=False)
class AdaptionPrompt:
    """Vectors that attention sees beside the text, behind a gate (LLaMA-Adapter, Zhang et al. 2023).

    A layer's own frozen projections make keys and values of the vectors, with no position. Its queries, as they are
    for the text, attend to them in a softmax of their own, with scores divided by the root of the head size. The gate
    multiplies the weights, and the values' sum is added to what the layer attends to. So every token, be it a pad,
    sees all P vectors, nothing enters a cache, and no token is moved.

    Why vectors, and not the keys and values that they become (a prefix with a softmax of its own): the vectors are
    what every toolkit's file holds and what is trained. They are read without the base model's weights and written
    back bit for bit, where projections are not invertible (key/value heads are narrower than the hidden state). The
    price is that an engine needs the layer's projections when it runs.

    Attributes:
        site: ``self`` or ``encoder``, as in `KeyValuePrefix`.
        layers: layer number (from 0, within its stack) -> `Adaption`. P is the same in all.
        joins: where the sum is added. ``heads``: to what the heads give, so that the output projection takes both
            (the paper, litgpt). ``module``: it goes through the output projection by itself, and what that gives is
            added to the module's output (PEFT's Llama and Mistral): the same function where that projection has no
            bias, which else is added twice. ``output``: to the module's output, unprojected (PEFT's GPT-2).
    """

    site: Site
    layers: Mapping[int, Adaption]
    joins: Joins = "heads"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", FrozenMap(dict(sorted(self.layers.items()))))
        require(self.site in ("self", "encoder"), f"site: {self.site!r}, not a self-attention")
        require(self.joins in get_args(Joins), f"joins: {self.joins!r}")
        require(len(self.layers) > 0, "layers: at least one")
        require(all(layer >= 0 for layer in self.layers), f"layers: numbered from 0, not {sorted(self.layers)}")
        shapes = {one.vectors.shape for one in self.layers.values()}
        require(len(shapes) == 1, f"layers: one shape [P, H] for all, not {sorted(shapes)}")

    @property
    def length(self) -> int:
        """P, the number of vectors."""
        return int(next(iter(self.layers.values())).vectors.shape[0])

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """All arrays with a name that is unique within the part."""
        for layer, one in self.layers.items():
            yield f"layers.{layer}.vectors", one.vectors
            yield f"layers.{layer}.gate", one.gate

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(map(repr, self.layers.values())))
        return f"AdaptionPrompt({self.site}, layers {list(self.layers)}, {kinds}, {self.joins})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdaptionPrompt):
            return NotImplemented
        return (self.site, self.joins) == (other.site, other.joins) and self.layers == other.layers

    def __hash__(self) -> int:
        return hash((self.site, self.joins, tuple(self.layers)))


Part: TypeAlias = InputPrompt | KeyValuePrefix | AdaptionPrompt


def prefixed_stacks(parts: Iterable[Part]) -> set[Stack]:
    """The stacks whose self-attention has a prefix."""
    return {stack_of(p.site) for p in parts if isinstance(p, KeyValuePrefix) and p.site != "cross"}
