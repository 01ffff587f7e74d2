"""A model of a base's architecture that fits on a laptop, so that no weights are needed to compare two prompts.

Equality of two ways to run a prompt is a property of the architecture: it shows on random weights, as the equality of
two polynomials shows at a random point. What the prompt does not touch may then be small, too. The vocabulary and the
feed-forward width always are; if the model is still large, so are the number of query heads (two to a key/value head)
and the hidden size, unless another size of the attention depends on it. Where they do, as every head has its share
of the hidden size, some heads are run at a time; and if that does not suffice, some layers. Layers, key/value heads,
head size, rotary tables and windows stay as they are: they are what a prefix meets.

What it does not show: how the base's own weights amplify a difference that is within the bound, and what the layers
that are not run together do to each other's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from softbridge.base.model import BaseModel
from softbridge.geometry import Geometry, StackGeometry
from softbridge.prompt.part import InputPrompt, KeyValue, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt

#: A model in float64 up to this many bytes is left as it is but for vocabulary and feed-forward.
SMALL = 256 << 20

#: Layers are run some at a time above this. Two such models are in memory at once.
BUDGET = 1 << 30

#: What the hidden size is shrunk to.
HIDDEN = 64

#: How many heads are run at a time where the hidden size is theirs.
HEADS = 2


@dataclass(frozen=True)
class Structure:
    """What is run of a base model, and with which layers of a prompt.

    Attributes:
        base: with a configuration that has shrunk.
        first: number of the first layer that is run.
        layers: how many are, or None: all of them.
        note: in words.
        heads: the numbers of the first key/value head that is run, and of the one behind the last; None: all are.
    """

    base: BaseModel
    first: int = 0
    layers: int | None = None
    note: str = ""
    heads: tuple[int, int] | None = None

    def fit(self, prompt: SoftPrompt) -> SoftPrompt | None:
        """The part of the prompt that these layers see, or None if they see nothing of it."""
        if self.heads is not None:
            return replace(prompt, parts=tuple(_of_heads(part, *self.heads) for part in prompt.parts), training=None)
        if self.layers is None:
            return prompt
        last = self.first + self.layers
        parts: list[Part] = []
        for part in prompt.parts:
            if isinstance(part, InputPrompt):
                parts += [part] if self.first == 0 else []
            elif layers := {n - self.first: pair for n, pair in part.layers.items() if self.first <= n < last}:
                parts.append(replace(part, layers=cast("Any", layers)))
        if not parts or (len(parts) < len(prompt.parts) and prompt.inputs):
            return None  # a stack with vectors and a prefix would lose one of them
        unbiased = {stack: max(n - self.first, 0) for stack, n in prompt.positions.unbiased_from.items()}
        positions = replace(prompt.positions, unbiased_from=unbiased)
        return replace(prompt, parts=tuple(parts), positions=positions, training=None)


def _of_heads(part: Part, first: int, last: int) -> Part:
    if not isinstance(part, KeyValuePrefix):
        return part
    layers = {n: KeyValue(pair.keys[first:last], pair.values[first:last]) for n, pair in part.layers.items()}
    return KeyValuePrefix(part.site, layers)


def structures(
    base: BaseModel, bare: Any, prompts: Sequence[SoftPrompt], runs: Callable[[Structure], bool], budget: int = BUDGET
) -> Iterator[Structure]:
    """What to run, one after the other, so that all layers of the prompts are run.

    Args:
        base: the base model.
        bare: what `BaseModel.bare` gives of it.
        prompts: what is to be compared.
        runs: whether the engines that were chosen run what is fit of the prompts on a structure's model.
        budget: bytes.
    """
    whole = Structure(base, note="vocabulary and feed-forward shrunk")
    size = None if bare is None else _size(bare)
    if size is None or size <= SMALL:
        yield whole
        return
    geometry = base.geometry
    for smaller, note in _smaller(base, prompts):
        model = smaller.bare()
        piece = Structure(smaller, note=f"{whole.note}, {note}")
        if model is not None and _same_attention(smaller.geometry, geometry) and runs(piece):
            whole, size = piece, _size(model)
            break
    else:
        pieces = _by_heads(whole, prompts)
        if pieces and _size(pieces[0].base.bare()) <= budget and all(map(runs, pieces[:1])):
            yield from pieces
            return
    layers = None if geometry.is_encoder_decoder else (geometry.decoder or geometry.encoder)
    if size <= budget or layers is None:
        yield whole
        return
    yield from _chunks(whole, layers, max(1, layers.layers * budget // size))


def _by_heads(whole: Structure, prompts: Sequence[SoftPrompt]) -> list[Structure]:
    """Models of some heads each, where the width of the hidden states is that of all heads; none where it is not.

    Heads meet in the sum behind them only, and a prefix has numbers for each of its own.
    """
    geometry = whole.base.geometry
    stack = geometry.decoder or geometry.encoder
    if _has_hidden_width(prompts) or geometry.is_encoder_decoder or stack is None or stack.shapes is not None:
        return []
    at_once = next((n for n in (HEADS, 1) if stack.heads % n == 0 and stack.heads > n), None)
    if at_once is None or stack.kv_heads != stack.heads or stack.heads * stack.head_dim != geometry.hidden:
        return []
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), at_once)
    base = _changed(whole.base, hidden_size=at_once * stack.head_dim, **sizes)
    small = base.geometry.decoder or base.geometry.encoder
    if base.bare() is None or small is None or (small.layers, small.kv_heads) != (stack.layers, at_once):
        return []
    if (small.head_dim, small.window) != (stack.head_dim, stack.window):
        return []
    note = f"{whole.note}, {at_once} of {stack.heads} heads at a time, hidden size {geometry.hidden} to theirs"
    firsts = range(0, stack.heads, at_once)
    return [Structure(base, note=note, heads=(first, first + at_once)) for first in firsts]


def _has_hidden_width(prompts: Sequence[SoftPrompt]) -> bool:
    """Whether a prompt has the width of the hidden states."""
    return any(
        prompt.inputs or prompt.adaptions or prompt.head or any(part.gated for part in prompt.prefixes)
        for prompt in prompts
    )


def _smaller(base: BaseModel, prompts: Sequence[SoftPrompt]) -> Iterator[tuple[BaseModel, str]]:
    """Smaller models with the same attention, the smallest first."""
    if _has_hidden_width(prompts):
        return
    geometry = base.geometry
    stack = geometry.decoder or geometry.encoder
    heads, fewer = {}, ""
    if stack is not None and not geometry.is_encoder_decoder and stack.heads > 2 * stack.kv_heads:
        heads = {"num_attention_heads": 2 * stack.kv_heads}
        fewer = f", query heads {stack.heads} to {2 * stack.kv_heads}"
    yield _changed(base, hidden_size=HIDDEN, **heads), f"hidden size {geometry.hidden} to {HIDDEN}{fewer}"
    if stack is not None and heads:
        hidden = 2 * stack.kv_heads * stack.head_dim
        yield _changed(base, hidden_size=hidden, **heads), f"hidden size {geometry.hidden} to {hidden}{fewer}"


def _changed(base: BaseModel, **sizes: int) -> BaseModel:
    config = copy.deepcopy(base.config)
    text = config.get_text_config()
    for name, size in sizes.items():
        if hasattr(text, name):
            setattr(text, name, size)
    return base.with_config(config)


def _same_attention(a: Geometry, b: Geometry) -> bool:
    def seen(stack: StackGeometry | None) -> Any:
        return None if stack is None else (stack.layers, stack.kv_heads, stack.head_dim, stack.window, stack.shapes)

    return (seen(a.encoder), seen(a.decoder)) == (seen(b.encoder), seen(b.decoder))


def _chunks(whole: Structure, stack: StackGeometry, most: int) -> Iterator[Structure]:
    """Models of `most` layers each, if a model of some layers has just these layers of the whole one."""
    full = layers_of(whole.base.bare(), stack.layers)
    firsts = range(0, stack.layers, most)
    made = []
    for first in firsts:
        count = min(most, stack.layers - first)
        base = whole.base.with_config(_cut(whole.base.config, stack.layers, first, count))
        if full is None or layers_of(base.bare(), count) != full[first : first + count]:
            yield whole  # it says by its layers' numbers what each is, and cannot be cut
            return
        made.append(Structure(base, first, count, f"{whole.note}, {most} layer{'s' * (most > 1)} at a time"))
    yield from made


def _cut(config: Any, layers: int, first: int, count: int) -> Any:
    """The configuration of some layers: whatever has an entry for each layer is cut to theirs."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).copy().items():
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[first : first + count])
    text.num_hidden_layers = count
    return config


def layers_of(model: Any, count: int) -> list[Any] | None:
    """What each layer is, but for its number; None if the layers are not found."""
    import torch

    if model is None:
        return None
    stacks = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    if not stacks:
        return None
    plain = (bool, int, float, str, type(None))
    return [
        [
            (
                name,
                type(module).__name__,
                {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"},
            )
            for name, module in layer.named_modules()
        ]
        for layer in stacks[0]
    ]


def _size(bare: Any) -> int:
    """Bytes of a model's weights in float64."""
    return int(sum(parameter.numel() for parameter in bare.parameters())) * 8
