"""The passes of lowering: each makes a prompt expressible by a target, or says why that is impossible.

A pass is a pure function from a prompt and a target to the ways in which one can go on (`Option`), at least one. A way
is exact, rounds, holds under a condition, or meets an obstacle, and says so. Which ways are taken is not decided here,
see `softbridge.lower`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from softbridge.base import BaseModel
from softbridge.capabilities import Capabilities
from softbridge.embedding import leave_block
from softbridge.errors import BaseModelError, Obstacle
from softbridge.geometry import Geometry, Stack, stack_of
from softbridge.prompt import Array, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part, Positions, SoftPrompt
from softbridge.template import Field, Virtual, Words
from softbridge.tensors import BFLOAT16

#: Two numbers by which vectors are multiplied are the same if they differ by less than this, relatively.
SAME_SCALE = 1e-9

Exactness = Literal["exact", "rounding", "conditional"]

#: Dtypes that numbers can be stored in on request.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


@dataclass(frozen=True)
class Step:
    """One thing that lowering did, and what it means for the result.

    Attributes:
        name: of the pass, or of the condition that was accepted.
        exactness: ``exact``; ``rounding`` (the same function up to the rounding that the note bounds);
            ``conditional`` (the same function while the note's condition holds).
        note: a sentence for a person.
    """

    name: str
    exactness: Exactness
    note: str


@dataclass(frozen=True)
class Target:
    """What a prompt is lowered to: a format's or an engine's declarations, and for which base model.

    Attributes:
        base: may be None as long as no pass needs it.
        dtype: name of the dtype in which the numbers are to be stored, on request; None: as they are.
    """

    name: str
    capabilities: Capabilities
    base: BaseModel | None = None
    dtype: str | None = None

    def geometry(self, prompt: SoftPrompt) -> Geometry | None:
        """Of the base model: the given one's, else what the prompt records."""
        return self.base.geometry if self.base is not None else prompt.base.geometry

    def need_base(self, why: str) -> BaseModel:
        if self.base is None:
            raise BaseModelError(
                f"this conversion to '{self.name}' needs to know the base model: {why}",
                "the base model's configuration, directory or hub id",
                "give it with --base (base=... in Python)",
            )
        return self.base


@dataclass(frozen=True)
class Option:
    """One way to go on.

    Attributes:
        prompt: what becomes of it; where an obstacle is a condition, as if that were met.
        steps: what was done.
        obstacles: what was met, conditions (the acceptable ones) among them.
        missing: what is needed to go this way, and was not given.
    """

    prompt: SoftPrompt
    steps: tuple[Step, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    missing: BaseModelError | None = None


Pass = Callable[[SoftPrompt, Target], Sequence[Option]]

_ELSEWHERE = "choose a target that can hold it, such as --to softbridge"


def _blocked(prompt: SoftPrompt, *obstacles: Obstacle) -> list[Option]:
    return [Option(prompt, (), obstacles)]


def native_positions(prompt: SoftPrompt, capabilities: Capabilities) -> Positions:
    """Where real tokens stand if a toolkit with these capabilities runs the numbers as they are, untold."""
    counted = prompt.counted()
    start = dict(prompt.positions.start)
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            stack, own = part.stack, capabilities.input_start
        elif part.site == "cross":
            continue
        else:
            stack, own = stack_of(part.site), capabilities.prefix_start
        if own is not None:
            start[stack] = counted[stack] if own == "counted" else 0
    return Positions(
        start,
        capabilities.relative_bias or prompt.positions.relative_bias,
        capabilities.window or prompt.positions.window,
        {} if capabilities.relative_bias == "plain" else prompt.positions.unbiased_from,
    )


def check_fits(prompt: SoftPrompt, geometry: Geometry) -> None:
    """Refuse a prompt whose shapes are not those of the base model.

    Raises:
        BaseModelError: with every mismatch.
    """
    problems: list[str] = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            if geometry.stack(part.stack) is None:
                problems.append(f"vectors for the {part.stack}, which {geometry.model_type} lacks")
            elif part.vectors.shape[1] != geometry.input_width:
                problems.append(f"vectors of width {part.vectors.shape[1]}, the model's is {geometry.input_width}")
            continue
        shape = geometry.site(part.site)
        if shape is None:
            problems.append(f"a prefix at the site '{part.site}', which {geometry.model_type} lacks")
            continue
        for layer, pair in part.layers.items():
            heads, _, width = pair.keys.shape
            if layer >= shape.layers:
                problems.append(f"a prefix for layer {layer}, the model has {shape.layers} layers")
                continue
            if layer not in shape.attending:
                problems.append(f"a prefix for {shape.named(layer)}, which has no keys and values that it could join")
                continue
            theirs = shape.shape(layer)
            if (heads, width) != theirs:
                problems.append(
                    f"{heads} key/value heads of size {width} in layer {layer}, "
                    f"the model has {theirs[0]} of size {theirs[1]}"
                )
            if pair.gate is not None and pair.gate.weight.shape[1] != geometry.hidden:
                problems.append(f"a gate for inputs of width {pair.gate.weight.shape[1]} in layer {layer}")
    if problems:
        raise BaseModelError(
            f"the prompt does not fit the base model ({geometry.model_type}): " + "; ".join(problems),
            "the base model that the prompt was trained for",
            "check --base" + (f"; the file names '{prompt.base.name}'" if prompt.base.name else ""),
        )


def _family(prompt: SoftPrompt, target: Target) -> list[Option]:
    families = target.capabilities.model_types
    if families is None:
        return [Option(prompt)]
    geometry = target.geometry(prompt) or target.need_base(f"{target.name} runs some families only").geometry
    if geometry.model_type in families:
        return [Option(prompt)]
    reason = f"{target.name} has no {geometry.model_type}; it has {', '.join(sorted(families))}"
    return _blocked(prompt, Obstacle("family", reason, "choose another target, such as --to softbridge"))


def left_behind(prompt: SoftPrompt) -> str | None:
    """What of the prompt's source is no soft prompt, and was not read; None: nothing."""
    return None if prompt.origin is None else prompt.origin.partial or None


def _whole(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A source of which only a part is a soft prompt computes something else than the prompt alone."""
    partial = left_behind(prompt)
    if not partial:
        return [Option(prompt)]
    return _blocked(prompt, Obstacle("partial", partial, "accept that the prompt alone goes on", True))


def _scale(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Vectors that the installed transformers multiplies by another number than that of their training make up for it.

    A target has no say in this: whoever names the base model gets numbers for the model that is run here.
    """
    here = None if target.base is None or not prompt.inputs else target.base.scale
    if here is None:
        return [Option(prompt)]
    obstacles: list[Obstacle] = []
    steps: list[Step] = []
    for part in prompt.inputs:
        if part.entry != "before" or in_scale(part, here):
            continue
        ours = replace(part, scale=here)
        if part.scale == "untold":
            reason = (
                f"nothing says which transformers the vectors were trained on: this one multiplies them by {here:g}, "
                "and others by another number (Gemma's scale moved into the embedding)"
            )
            remedy = (
                "say which it was: --trained-on 4.57 (softbridge.load(..., trained_on='4.57') in Python); or accept "
                "that it multiplied as this one does"
            )
            obstacles.append(Obstacle("scale", reason, remedy, True))
        elif part.told_scale is not None:
            factor = part.told_scale / here
            dtype = np.promote_types(part.vectors.dtype, np.float32)
            ours = replace(ours, vectors=(part.vectors.astype(np.float64) * factor).astype(dtype))
            note = (
                f"vectors multiplied by {factor:.6g}: the transformers they were trained on multiplied them by "
                f"{part.told_scale:g}, and this one by {here:g}; float32 rounding"
            )
            steps.append(Step("scale", "rounding", note))
        prompt = _with_part(prompt, part, ours)
    if not steps:
        return [Option(prompt, (), tuple(obstacles))]
    ejected = _ejected(prompt, target, "belongs to the vectors before that and is left out")
    return [Option(ejected.prompt, (*steps, *ejected.steps), (*obstacles, *ejected.obstacles))]


def in_scale(part: InputPrompt, here: float) -> bool:
    """Whether vectors are known to be for a model that multiplies them by this number."""
    told = part.told_scale
    return told is not None and abs(told - here) <= SAME_SCALE * here


def recorded(prompt: SoftPrompt, base: BaseModel) -> SoftPrompt:
    """The prompt, whose vectors were made on this model here, with what that multiplies them by."""
    here = base.scale if prompt.inputs else None
    for part in prompt.inputs if here is not None else ():
        if part.entry == "before" and part.scale is None:
            prompt = _with_part(prompt, part, replace(part, scale=here))
    return prompt


def _placement(prompt: SoftPrompt, target: Target) -> list[Option]:
    """A template whose virtual tokens stand together in front, or behind one token, is a placement of its own."""
    able = target.capabilities.inputs
    steps: list[Step] = []
    obstacles: list[Obstacle] = []
    for part in prompt.inputs:
        if part.template is None or (part.stack, part.entry, part.placement) in able:
            continue
        match part.template.pieces:
            case (Virtual(), *rest) if not any(isinstance(piece, Virtual) for piece in rest):
                moved, others = replace(part, placement="before-sequence", template=None), rest
            case (Words((_,)), Virtual(), *rest) if not any(isinstance(piece, Virtual) for piece in rest):
                moved, others = replace(part, placement="after-first-token", template=None), rest
            case _:
                continue  # `_parts` names it
        if (moved.stack, moved.entry, moved.placement) not in able:
            continue
        start = prompt.positions.start[part.stack] + part.length
        positions = replace(prompt.positions, start={**prompt.positions.start, part.stack: start})
        prompt = replace(_with_part(prompt, part, moved), positions=positions)
        if part.template.verbaliser is None and len(others) == 1 and isinstance(others[0], Field):
            steps.append(Step("placement", "exact", f"a template with all virtual tokens in front: {moved.placement}"))
        else:
            reason = f"{target.name} has no templates: whoever runs the files writes the words and the slot of this one"
            obstacles.append(Obstacle("template", reason, "accept that the caller writes the template's words", True))
    return [Option(prompt, tuple(steps), tuple(obstacles))]


def _entry(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Move vectors that enter before the embedding block behind it, by sending them through it."""
    able = target.capabilities.inputs
    steps: list[Step] = []
    missing = None
    for part in prompt.inputs:
        first = prompt.positions.start[part.stack] - part.length
        if (
            (part.stack, part.entry, part.placement) in able
            or (part.entry, part.placement) != ("before", "before-sequence")
            or (part.stack, "after", part.placement) not in able
            or first < 0
        ):
            continue
        vectors = part.vectors
        try:
            base = target.need_base(f"{target.name} has vectors behind the embedding block, whose weights move them")
            if not base.has_embedding_block:
                continue  # `_parts` names it
            vectors = leave_block(base, vectors, first).astype(np.promote_types(vectors.dtype, np.float32))
        except BaseModelError as error:
            missing = error
        prompt = _with_part(prompt, part, replace(part, vectors=vectors, entry="after"))
        note = "vectors sent through the base model's embedding block (positions, token types, norm); float32 rounding"
        steps.append(Step("entry", "rounding", note))
    if not steps:
        return [Option(prompt)]
    ejected = _ejected(prompt, target, "belongs to the vectors before the embedding block and is left out")
    return [Option(ejected.prompt, (*steps, *ejected.steps), ejected.obstacles, missing)]


def _parts(prompt: SoftPrompt, target: Target) -> list[Option]:
    able = target.capabilities
    obstacles = []
    for part in prompt.parts:
        if isinstance(part, KeyValuePrefix):
            if part.site not in able.prefix_sites:
                reason = f"{target.name} cannot express a key/value prefix at the site '{part.site}'"
                obstacles.append(Obstacle("part", reason, "choose another target"))
            continue
        entries = {
            entry for stack, entry, placement in able.inputs if (stack, placement) == (part.stack, part.placement)
        }
        if part.entry in entries:
            continue
        what = f"vectors in the {part.stack}'s input, {part.entry} the embedding block, {part.placement}"
        reason = f"{target.name} cannot express {what}"
        if part.entry == "after" and "before" in entries:
            reason += ": it has vectors before the block, whose norm and positions cannot be undone"
        obstacles.append(Obstacle("part", reason, "choose another target"))
    if able.parts is not None and len(prompt.parts) > able.parts:
        reason = f"{target.name} holds {able.parts} part{'s' * (able.parts > 1)}, this prompt has {len(prompt.parts)}"
        obstacles.append(Obstacle("parts", reason, f"{_ELSEWHERE}; or choose one of its parts with --part"))
    return [Option(prompt, (), tuple(obstacles))]


def _gates(prompt: SoftPrompt, target: Target) -> list[Option]:
    if target.capabilities.gates or not any(part.gated for part in prompt.prefixes):
        return [Option(prompt)]
    reason = f"{target.name} has no gates: they weigh the prefix anew for every input, and no fixed numbers do that"
    return _blocked(prompt, Obstacle("gates", reason, _ELSEWHERE))


def _layers(prompt: SoftPrompt, target: Target) -> list[Option]:
    """No layer can be filled: whatever finite keys are put in take part in the softmax."""
    geometry = target.geometry(prompt)
    able = target.capabilities
    obstacles = []
    for part in prompt.prefixes:
        shape = None if geometry is None else geometry.site(part.site)
        every = range(max(part.layers) + 1) if shape is None else shape.attending
        absent = sorted(set(every) - set(part.layers))
        if able.every_layer and absent:
            reason = (
                f"{target.name} prefixes every layer and this prompt leaves out {absent} at the site '{part.site}': no "
                "finite keys and values are neutral, since each virtual token takes its share of the softmax (zeros "
                "take exp(0))"
            )
            obstacles.append(Obstacle("layers", reason, _ELSEWHERE))
        shapes = {pair.keys.shape for pair in part.layers.values()}
        if not able.ragged and len(shapes) > 1:
            reason = f"{target.name} has one number and size of heads for all layers, this prompt {sorted(shapes)}"
            obstacles.append(Obstacle("ragged", reason, _ELSEWHERE))
    return [Option(prompt, (), tuple(obstacles))]


def _head(prompt: SoftPrompt, target: Target) -> list[Option]:
    if target.capabilities.head or not prompt.head:
        return [Option(prompt)]
    names = ", ".join(prompt.head)
    reason = f"{target.name} has no place for the head ({names}); you load it yourself"
    return _blocked(replace(prompt, head={}), Obstacle("head", reason, "accept that the head is left out", True))


def _eject(prompt: SoftPrompt, target: Target) -> list[Option]:
    kept, training = target.capabilities.training, prompt.training
    if training is None or kept is None or training.kind in kept:
        return [Option(prompt)]
    return [_ejected(prompt, target, "is left out: the prompt runs, its training cannot be resumed")]


def _ejected(prompt: SoftPrompt, target: Target, note: str) -> Option:
    """The prompt without its training state, with which the tasks go that it does not run."""
    training = prompt.training
    if training is None:
        return Option(prompt)
    ejected = replace(prompt, training=None)
    tasks = len(training.tensors["columns"]) if training.kind == "multitask" else 1
    if tasks > 1:
        task = training.settings.get("task", 0)
        reason = f"{target.name} holds one task, and this prompt {tasks}: task {task} alone is kept"
        return Option(ejected, (), (Obstacle("task", reason, "choose one with --task, or accept that one", True),))
    return Option(ejected, (Step("eject", "exact", f"the {training.kind} reparameterisation {note}"),))


def _relative_bias(prompt: SoftPrompt, target: Target) -> list[Option]:
    wanted = native_positions(prompt, target.capabilities)
    told = replace(prompt.positions, relative_bias=wanted.relative_bias, unbiased_from=wanted.unbiased_from)
    if told == prompt.positions:
        return [Option(prompt)]
    if any(part.site != "cross" for part in prompt.prefixes):
        base = target.need_base("whether it has a relative position bias decides whether the prefix can be moved")
        if base.positions.kind == "relative":
            reason = (
                f"the prompt was trained with a {prompt.positions.relative_bias} relative position bias and "
                f"{target.name} computes a {wanted.relative_bias} one: the bias between real tokens differs by the "
                "prefix length, and no change of keys or values makes up for it"
            )
            if prompt.positions.unbiased_from != wanted.unbiased_from:
                lost = " and ".join(f"the {s} from layer {n} on" for s, n in prompt.positions.unbiased_from.items())
                reason = (
                    f"the prompt was trained without a relative position bias in {lost}, which {target.name} computes"
                )
            remedy = "run it with an engine that computes the same bias (native), through --to softbridge"
            return _blocked(prompt, Obstacle("relative-bias", reason, remedy))
    return [Option(replace(prompt, positions=told))]


def _window(prompt: SoftPrompt, target: Target) -> list[Option]:
    wanted = native_positions(prompt, target.capabilities).window
    if wanted == prompt.positions.window:
        return [Option(prompt)]
    moved = replace(prompt, positions=replace(prompt.positions, window=wanted))
    sites = [part for part in prompt.prefixes if part.site != "cross"]
    if not sites:
        return [Option(moved)]
    base = target.need_base("a sliding window treats a prefix differently in the two toolkits")
    shapes = [(part, base.geometry.site(part.site)) for part in sites]
    bounds = [shape.window - part.length for part, shape in shapes if shape is not None and shape.window is not None]
    if not bounds:
        return [Option(moved)]
    if min(bounds) < 1:
        reason = f"{target.name} treats the sliding window otherwise, which is shorter than the prefix"
        return _blocked(moved, Obstacle("window", reason, "choose another target, such as --to softbridge"))
    reason = (
        f"the sliding window {'drops virtual tokens that fell out of it' if wanted == 'slides' else 'never drops'} "
        f"in {target.name}, unlike in the source: the same only while a text has at most {min(bounds)} tokens"
    )
    return _blocked(moved, Obstacle("window", reason, "accept the bound on the text's length", True))


def _start(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Move the real tokens of each stack to where the target has them: turn rotary keys, or leave it to be told."""
    wanted = native_positions(prompt, target.capabilities).start
    options = [Option(prompt)]
    for stack, want in wanted.items():
        if want != prompt.positions.start[stack]:
            options = [
                Option(further.prompt, (*before.steps, *further.steps), (*before.obstacles, *further.obstacles))
                for before in options
                for further in _move(before.prompt, stack, want, target)
            ]
    return options


def _move(prompt: SoftPrompt, stack: Stack, want: int, target: Target) -> list[Option]:
    base = target.need_base("real tokens stand at other positions in the target, and what that means depends on it")
    scheme, have = base.positions, prompt.positions.start[stack]
    moved = replace(prompt, positions=replace(prompt.positions, start={**prompt.positions.start, stack: want}))
    in_sequence = any(part.stack == stack and part.entry == "before" for part in prompt.inputs)
    prefixed = any(part.site != "cross" and stack_of(part.site) == stack for part in prompt.prefixes)
    options = []
    if scheme.kind in ("rotary", "relative") and not prefixed and in_sequence:
        note = "virtual and real tokens move together, and the model sees their distances only"
        options.append(Option(moved, (Step("positions", "exact", note),)))
    elif scheme.kind == "rotary":
        note = f"keys turned by {want - have:+d} positions with the model's own rotation; orthogonal, float32 rounding"
        ejected = _ejected(moved, target, "belongs to the keys before the rotation and is left out")
        reason = "the model's rotary frequencies change with the length of the text: the same within one regime"
        bound = Obstacle("length", reason, "accept the bound on the text's length", True)
        turned = turn(ejected.prompt, stack, scheme.rotation(want - have))
        bounds = (bound,) if scheme.depends_on_length else ()
        options.append(Option(turned, (Step("rotate", "rounding", note), *ejected.steps), bounds))
    if scheme.kind == "none":
        note = "the model's outputs do not depend on where the tokens stand"
        options.append(Option(moved, (Step("positions", "exact", note),)))
    if (
        scheme.kind in ("absolute", "rotary")
        and scheme.tellable
        and target.capabilities.positions_told
        and not in_sequence
    ):
        reason = (
            f"the model's {stack} has {scheme.kind} positions: real tokens must stand at {have}, "
            f"{have + 1}, ..., and {target.name} by itself puts them at {want}, {want + 1}, ...; whoever runs the "
            "files must tell it (position_ids). softbridge's engines do, reading the manifest beside the files"
        )
        obstacle = Obstacle("positions", reason, "accept that the caller tells the positions", True)
        options.append(Option(prompt, (), (obstacle,)))
    if not options:
        why = scheme.reason or f"its positions are {scheme.kind}: its caller cannot say where tokens stand"
        reason = f"real tokens stand at {have} in the source and at {want} in {target.name}, and of the model: {why}"
        remedy = "run it with the native engine, through --to softbridge"
        return _blocked(prompt, Obstacle("positions", reason, remedy))
    return options


def _dtype(prompt: SoftPrompt, target: Target) -> list[Option]:
    """Store numbers in the dtype that was asked for, and in one that the target keeps.

    Wider is exact. Narrower is what the caller asked for, or else a condition; either way its error is said.
    """
    kept = target.capabilities.dtypes
    arrays = _numbers(prompt)
    steps: list[Step] = []
    if target.dtype is not None:
        wanted = DTYPES[target.dtype]
        error = max(_relative_error(array, wanted) for array in arrays)
        if any(array.dtype != wanted for array in arrays):
            prompt = as_dtype(prompt, wanted)
            exactness: Exactness = "rounding" if error else "exact"
            note = f"stored in {target.dtype} as asked; numbers change by {error:.1e} of themselves at worst"
            steps.append(Step("narrow" if error else "dtype", exactness, note))
        if not np.isfinite(error):
            reason = f"some numbers are too large for {target.dtype}"
            return [Option(prompt, tuple(steps), (Obstacle("dtype", reason, "ask for another dtype"),))]
        arrays = _numbers(prompt)
    lost = [array for array in arrays if kept is not None and array.dtype.name not in kept]
    if not lost:
        return [Option(prompt, tuple(steps))]
    narrow = as_dtype(prompt, np.dtype(np.float32))
    error = max(_relative_error(array, np.dtype(np.float32)) for array in lost)
    if error == 0:
        steps.append(Step("dtype", "exact", "stored in float32, which holds every number"))
        return [Option(narrow, tuple(steps))]
    reason = (
        f"{target.name} keeps float32, and the prompt's {lost[0].dtype.name} numbers would be rounded, "
        f"by {error:.1e} of themselves at worst"
    )
    return [Option(narrow, tuple(steps), (Obstacle("dtype", reason, "accept the rounding", True),))]


def _numbers(prompt: SoftPrompt) -> list[Array]:
    return [array for part in prompt.parts for _, array in part.arrays()]


def _with_part(prompt: SoftPrompt, old: Part, new: Part) -> SoftPrompt:
    return replace(prompt, parts=tuple(new if part is old else part for part in prompt.parts))


def as_dtype(prompt: SoftPrompt, dtype: np.dtype[Any]) -> SoftPrompt:
    """The prompt with the numbers of its parts converted to `dtype`. What trained them is left out: it has its own."""

    def converted(part: Part) -> Part:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=part.vectors.astype(dtype))
        return replace(part, layers={layer: _pair_as_dtype(pair, dtype) for layer, pair in part.layers.items()})

    with np.errstate(over="ignore"):  # whoever asks looks at the error first
        return replace(prompt, parts=tuple(converted(part) for part in prompt.parts), training=None)


def _pair_as_dtype(pair: KeyValue, dtype: np.dtype[Any]) -> KeyValue:
    gate = None if pair.gate is None else Gate(pair.gate.weight.astype(dtype), pair.gate.bias.astype(dtype))
    return KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype), gate)


def _relative_error(array: Array, dtype: np.dtype[Any]) -> float:
    """The largest relative change of a number that is stored in `dtype`; infinite if one no longer fits."""
    exact = array.astype(np.float64)
    with np.errstate(over="ignore"):
        change = np.abs(array.astype(dtype).astype(np.float64) - exact)
    size = np.abs(exact)
    return float(np.max(np.divide(change, size, out=np.zeros_like(change), where=size > 0), initial=0.0))


def turn(prompt: SoftPrompt, stack: Stack, maps: dict[int, Array]) -> SoftPrompt:
    """Apply layer -> M [D, D] to every key row of the stack's own prefix, in float64.

    The result is stored in the keys' dtype, in float32 if that is narrower: rounding a turned key to bfloat16 would
    cost 4e-3, and the bound of a rotation is float32's.
    """

    def turned(part: Part) -> Part:
        if not isinstance(part, KeyValuePrefix) or part.site == "cross" or stack_of(part.site) != stack:
            return part
        layers = {}
        for layer, pair in part.layers.items():
            dtype = np.promote_types(pair.keys.dtype, np.float32)
            keys = (pair.keys.astype(np.float64) @ maps[layer]).astype(dtype)
            layers[layer] = replace(pair, keys=keys, values=pair.values.astype(dtype))
        return replace(part, layers=layers)

    return replace(prompt, parts=tuple(turned(part) for part in prompt.parts))


def inexpressible(prompt: SoftPrompt, able: Capabilities, base: BaseModel) -> list[Obstacle]:
    """What of a prompt, as it is, a toolkit with these capabilities cannot hold at all."""
    target = Target("it", able, base)
    found = [o for check in (_parts, _gates, _layers) for option in check(prompt, target) for o in option.obstacles]
    for part in prompt.inputs:
        if part.told_scale is not None and base.scale is not None and not in_scale(part, base.scale):
            reason = f"its vectors are for a model that multiplies them by {part.told_scale:g}, and here {base.scale:g}"
            found.append(Obstacle("scale", reason, "lower it for this base model: softbridge.attach does"))
    return found


#: In this order: each relies on what those before it did.
PASSES: tuple[Pass, ...] = (
    _family,
    _whole,
    _scale,
    _placement,
    _entry,
    _parts,
    _gates,
    _layers,
    _head,
    _eject,
    _relative_bias,
    _window,
    _start,
    _dtype,
)
