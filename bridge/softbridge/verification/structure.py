"""A model of a base's architecture that fits on a laptop, so that no weights are needed to compare two prompts.

Equality of two ways to run a prompt is a property of the architecture: it shows on random weights, as the equality of
two polynomials shows at a random point. What the prompt does not touch may then be small, too. The vocabulary and the
feed-forward width always are; if the model is still large, so are the number of query heads (two to a key/value head)
and the hidden size, as far as the attention's other sizes do not hang on it; and if that does not suffice, the layers
are run some at a time. Layers, key/value heads, head size, rotary tables and windows stay
as they are: they are what a prefix meets.

What it does not show: how the base's own weights amplify a difference that is within the bound, and what the layers
that are not run together do to each other's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from softbridge.base import BaseModel
from softbridge.geometry import Geometry, StackGeometry
from softbridge.prompt import InputPrompt, KeyValuePrefix, Part, SoftPrompt

#: A model in float64 up to this many bytes is left as it is but for vocabulary and feed-forward.
SMALL = 256 << 20
#: Layers are run some at a time above this. Two such models are in memory at once.
BUDGET = 1 << 30
#: What the hidden size is shrunk to.
HIDDEN = 64


@dataclass(frozen=True)
class Structure:
    """What is run of a base model, and with which layers of a prompt.

    Attributes:
        base: with a configuration that has shrunk.
        first: number of the first layer that is run.
        layers: how many are, or None: all of them.
        note: in words.
    """

    base: BaseModel
    first: int = 0
    layers: int | None = None
    note: str = ""

    def fit(self, prompt: SoftPrompt) -> SoftPrompt | None:
        """The prompt as far as these layers see it, or None if they see nothing of it."""
        if self.layers is None:
            return prompt
        last = self.first + self.layers
        parts: list[Part] = []
        for part in prompt.parts:
            if isinstance(part, InputPrompt):
                parts += [part] if self.first == 0 else []
            elif layers := {n - self.first: pair for n, pair in part.layers.items() if self.first <= n < last}:
                parts.append(KeyValuePrefix(part.site, layers))
        if len(parts) < len(prompt.parts):  # a stack with vectors and a prefix would lose one of them
            return None if not parts or prompt.inputs else replace(prompt, parts=tuple(parts), training=None)
        return replace(prompt, parts=tuple(parts), training=None)


def structures(
    base: BaseModel, bare: Any, prompts: Sequence[SoftPrompt], runs: Callable[[Any], bool], budget: int = BUDGET
) -> Iterator[Structure]:
    """What to run, one after the other, so that all layers of the prompts are run.

    Args:
        base: the base model.
        bare: what `BaseModel.bare` gives of it.
        prompts: what is to be compared.
        runs: whether the engines that were chosen run the prompts on a model (which has no weights).
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
        if model is not None and _same_attention(smaller.geometry, geometry) and runs(model):
            whole, size = Structure(smaller, note=f"{whole.note}, {note}"), _size(model)
            break
    layers = None if geometry.is_encoder_decoder else (geometry.decoder or geometry.encoder)
    if size <= budget or layers is None:
        yield whole
        return
    yield from _chunks(whole, layers, max(1, layers.layers * budget // size))


def _smaller(base: BaseModel, prompts: Sequence[SoftPrompt]) -> Iterator[tuple[BaseModel, str]]:
    """Smaller models with the same attention, the smallest first."""
    if any(prompt.inputs or prompt.head or any(part.gated for part in prompt.prefixes) for prompt in prompts):
        return  # they have the width of the hidden states
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
