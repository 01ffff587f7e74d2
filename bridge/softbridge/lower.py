"""Lowering: make a prompt expressible by a target without changing the function that it computes.

A pass is a pure function from a prompt to a prompt that says of itself how exact it is, or which obstacles it met. All
passes run, so that a refusal names every obstacle at once. Nothing is lost silently: what a target cannot hold is an
obstacle, and an obstacle whose consequence a caller can bear is a condition, to be accepted by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from softbridge.base import BaseModel
from softbridge.capabilities import Capabilities
from softbridge.errors import BaseModelError, LoweringError, Obstacle, SoftbridgeError
from softbridge.geometry import Geometry, Stack, stack_of
from softbridge.prompt import Array, Gate, InputPrompt, KeyValue, KeyValuePrefix, Part, Positions, SoftPrompt

#: Names of the conditions that a caller can accept.
CONDITIONS = frozenset({"positions", "window", "length", "head", "dtype"})

Exactness = Literal["exact", "rounding", "conditional"]
Outcome = Literal["exact", "rounding", "conditional", "impossible"]


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
class Lowering:
    """A lowered prompt and the steps that led to it."""

    prompt: SoftPrompt
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Target:
    """What a prompt is lowered to: a format's or an engine's declarations, and for which base model.

    `base` may be None as long as no pass needs it.
    """

    name: str
    capabilities: Capabilities
    base: BaseModel | None = None

    def need_base(self, why: str) -> BaseModel:
        if self.base is None:
            raise BaseModelError(
                f"this conversion to '{self.name}' needs to know the base model: {why}",
                "the base model's configuration, directory or hub id",
                "give it with --base (base=... in Python)",
            )
        return self.base


@dataclass(frozen=True)
class Plan:
    """What all passes together did and met.

    Attributes:
        prompt: lowered as far as it goes, every condition taken as met.
        steps: what was done; conditions among them.
        obstacles: what was met, conditions (the acceptable ones) among them.
        missing: what a pass asked for and was not given, if one did.
    """

    prompt: SoftPrompt
    steps: tuple[Step, ...]
    obstacles: tuple[Obstacle, ...]
    missing: BaseModelError | None

    @property
    def outcome(self) -> Outcome:
        """What the plan comes to. Whoever asks has given the base model."""
        if any(not obstacle.acceptable for obstacle in self.obstacles):
            return "impossible"
        kinds = {step.exactness for step in self.steps}
        return "conditional" if "conditional" in kinds else "rounding" if "rounding" in kinds else "exact"


Further = Callable[[SoftPrompt, Geometry | None], Sequence[Obstacle]]
Result = tuple[SoftPrompt, list[Step], list[Obstacle]]
Pass = Callable[[SoftPrompt, Target], Result]


def lower(
    prompt: SoftPrompt,
    target: Target,
    accept: Collection[str] = (),
    further: Further | None = None,
) -> Lowering:
    """Lower a prompt to what a target can express.

    Args:
        prompt: as read.
        target: what it is lowered to.
        accept: names of the conditions that the caller accepts.
        further: obstacles that the target finds by itself in the lowered prompt, beyond its declared capabilities.

    Raises:
        LoweringError: obstacles are left, all of which it carries.
        BaseModelError: a pass needs the base model and it was not given, or the prompt does not fit it.
    """
    unknown = sorted(set(accept) - CONDITIONS)
    if unknown:
        raise SoftbridgeError(
            f"no condition is called {', '.join(repr(name) for name in unknown)}",
            f"one of {', '.join(sorted(CONDITIONS))}",
            "accept a condition by the name that a refusal gives it",
        )
    found = plan(prompt, target, further)
    refused = [obstacle for obstacle in found.obstacles if not (obstacle.acceptable and obstacle.name in accept)]
    if refused:
        raise LoweringError(target.name, refused)
    if found.missing is not None:
        raise found.missing
    return Lowering(found.prompt, found.steps)


def plan(prompt: SoftPrompt, target: Target, further: Further | None = None) -> Plan:
    """Run every pass, and say what each did or met; see `lower` for the arguments.

    Raises:
        BaseModelError: the prompt does not fit the base model.
    """
    geometry = target.base.geometry if target.base is not None else prompt.base.geometry
    if geometry is not None:
        check_fits(prompt, geometry)
    steps: list[Step] = []
    obstacles: list[Obstacle] = []
    missing: BaseModelError | None = None
    for run in PASSES:
        try:
            prompt, done, met = run(prompt, target)
        except BaseModelError as error:
            missing = missing or error
            continue
        obstacles += met
        steps += [*done, *(Step(each.name, "conditional", each.reason) for each in met if each.acceptable)]
    if further is not None and missing is None and all(obstacle.acceptable for obstacle in obstacles):
        obstacles += further(prompt, geometry)
    return Plan(prompt, tuple(steps), tuple(obstacles), missing)


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


def _fit_family(prompt: SoftPrompt, target: Target) -> Result:
    families = target.capabilities.model_types
    geometry = target.base.geometry if target.base is not None else prompt.base.geometry
    if families is None:
        return prompt, [], []
    if geometry is None:
        geometry = target.need_base(f"{target.name} runs some families only").geometry
    if geometry.model_type in families:
        return prompt, [], []
    reason = f"{target.name} has no {geometry.model_type}; it has {', '.join(sorted(families))}"
    return prompt, [], [Obstacle("family", reason, "choose another target, such as --to softbridge")]


def _fit_parts(prompt: SoftPrompt, target: Target) -> Result:
    able = target.capabilities
    obstacles = []
    for part in prompt.parts:
        if isinstance(part, InputPrompt):
            if (part.stack, part.entry, part.placement) in able.inputs:
                continue
            what = f"vectors in the {part.stack}'s input, {part.entry} the embedding block, {part.placement}"
        elif part.site in able.prefix_sites:
            continue
        else:
            what = f"a key/value prefix at the site '{part.site}'"
        obstacles.append(Obstacle("part", f"{target.name} cannot express {what}", "choose another target"))
    return prompt, [], obstacles


def _keep_head(prompt: SoftPrompt, target: Target) -> Result:
    if target.capabilities.head or not prompt.head:
        return prompt, [], []
    names = ", ".join(prompt.head)
    reason = f"{target.name} has no place for the head ({names}); you load it yourself"
    return replace(prompt, head={}), [], [Obstacle("head", reason, "accept that the head is left out", True)]


def _eject(prompt: SoftPrompt, target: Target) -> Result:
    kept = target.capabilities.training
    if prompt.training is None or kept is None or prompt.training.kind in kept:
        return prompt, [], []
    note = f"the {prompt.training.kind} reparameterisation is left out: the prompt runs, its training cannot be resumed"
    return replace(prompt, training=None), [Step("eject", "exact", note)], []


def _relative_bias(prompt: SoftPrompt, target: Target) -> Result:
    wanted = native_positions(prompt, target.capabilities)
    if wanted.relative_bias == prompt.positions.relative_bias:
        return prompt, [], []
    if any(part.site != "cross" for part in prompt.prefixes):
        base = target.need_base("whether it has a relative position bias decides whether the prefix can be moved")
        if base.positions.kind == "relative":
            reason = (
                f"the prompt was trained with a {prompt.positions.relative_bias} relative position bias and "
                f"{target.name} computes a {wanted.relative_bias} one: the bias between real tokens differs by the "
                "prefix length, and no change of keys or values makes up for it"
            )
            remedy = "run it with an engine that computes the same bias (native), through --to softbridge"
            return prompt, [], [Obstacle("relative-bias", reason, remedy)]
    positions = replace(prompt.positions, relative_bias=wanted.relative_bias)
    return replace(prompt, positions=positions), [], []


def _window(prompt: SoftPrompt, target: Target) -> Result:
    wanted = native_positions(prompt, target.capabilities).window
    if wanted == prompt.positions.window:
        return prompt, [], []
    moved = replace(prompt, positions=replace(prompt.positions, window=wanted))
    sites = [part for part in prompt.prefixes if part.site != "cross"]
    if not sites:
        return moved, [], []
    base = target.need_base("a sliding window treats a prefix differently in the two toolkits")
    shapes = [(part, base.geometry.site(part.site)) for part in sites]
    bounds = [shape.window - part.length for part, shape in shapes if shape is not None and shape.window is not None]
    if not bounds:
        return moved, [], []
    if min(bounds) < 1:
        reason = f"{target.name} treats the sliding window otherwise, which is shorter than the prefix"
        return moved, [], [Obstacle("window", reason, "choose another target, such as --to softbridge")]
    reason = (
        f"the sliding window {'drops virtual tokens that fell out of it' if wanted == 'slides' else 'never drops'} "
        f"in {target.name}, unlike in the source: the same only while a text has at most {min(bounds)} tokens"
    )
    return moved, [], [Obstacle("window", reason, "accept the bound on the text's length", True)]


def _start(prompt: SoftPrompt, target: Target) -> Result:
    """Move the real tokens to where the target has them: turn rotary keys, or leave it to be told."""
    wanted = native_positions(prompt, target.capabilities).start
    shifts: dict[Stack, int] = {
        stack: wanted[stack] - prompt.positions.start[stack]
        for stack in wanted
        if wanted[stack] != prompt.positions.start[stack]
    }
    if not shifts:
        return prompt, [], []
    base = target.need_base("real tokens stand at other positions in the target, and what that means depends on it")
    scheme = base.positions
    steps: list[Step] = []
    obstacles: list[Obstacle] = []
    for stack, shift in shifts.items():
        have, want = prompt.positions.start[stack], wanted[stack]
        if scheme.kind == "rotary":
            prompt = turn(prompt, stack, scheme.rotation(shift))
            note = f"keys turned by {shift:+d} positions with the model's own rotation; orthogonal, float32 rounding"
            if any(part.site != "cross" for part in prompt.prefixes):
                steps.append(Step("rotate", "rounding", note))
            if prompt.training is not None:
                prompt = replace(prompt, training=None)
                note = "the reparameterisation belongs to the keys before the rotation and is left out"
                steps.append(Step("eject", "exact", note))
            if scheme.depends_on_length:
                reason = "the model's rotary frequencies change with the length of the text: the same within one regime"
                obstacles.append(Obstacle("length", reason, "accept the bound on the text's length", True))
        elif scheme.kind == "none":
            steps.append(Step("positions", "exact", "the model's outputs do not depend on where the tokens stand"))
        elif scheme.kind == "absolute" and _can_be_told(prompt, stack, target) and scheme.tellable:
            reason = (
                f"the model adds {stack} positions to its hidden states: real tokens must stand at {have}, "
                f"{have + 1}, ..., and {target.name} by itself puts them at {want}, {want + 1}, ...; whoever runs the "
                "files must tell it (position_ids). softbridge's engines do, reading the manifest beside the files"
            )
            obstacles.append(Obstacle("positions", reason, "accept that the caller tells the positions", True))
            continue
        else:
            why = scheme.reason or f"its positions are {scheme.kind}: its caller cannot say where tokens stand"
            reason = (
                f"real tokens stand at {have} in the source and at {want} in {target.name}, and of the model: {why}"
            )
            obstacles.append(Obstacle("positions", reason, "run it with the native engine, through --to softbridge"))
            continue
        start = {**prompt.positions.start, stack: want}
        prompt = replace(prompt, positions=replace(prompt.positions, start=start))
    return prompt, steps, obstacles


def _can_be_told(prompt: SoftPrompt, stack: Stack, target: Target) -> bool:
    """Whether a caller can move the real tokens: not past virtual tokens that stand in the sequence with them."""
    return target.capabilities.positions_told and all(part.stack != stack for part in prompt.inputs)


def _dtype(prompt: SoftPrompt, target: Target) -> Result:
    """Store numbers in a dtype that the target keeps: wider is exact, narrower is a condition with its error."""
    kept = target.capabilities.dtypes
    arrays = [array for part in prompt.parts for _, array in part.arrays()]
    lost = [array for array in arrays if kept is not None and array.dtype.name not in kept]
    if not lost:
        return prompt, [], []
    narrow = as_dtype(prompt, np.dtype(np.float32))
    error = max(_relative_error(array) for array in lost)
    if error == 0:
        return narrow, [Step("dtype", "exact", "stored in float32, which holds every number")], []
    reason = (
        f"{target.name} keeps float32, and the prompt's {lost[0].dtype.name} numbers would be rounded, "
        f"by {error:.1e} of themselves at worst"
    )
    return narrow, [], [Obstacle("dtype", reason, "accept the rounding", True)]


def as_dtype(prompt: SoftPrompt, dtype: np.dtype[Any]) -> SoftPrompt:
    """The prompt with the numbers of its parts converted to `dtype`. What trained them is left out: it has its own."""

    def converted(part: Part) -> Part:
        if isinstance(part, InputPrompt):
            return replace(part, vectors=part.vectors.astype(dtype))
        return replace(part, layers={layer: _pair_as_dtype(pair, dtype) for layer, pair in part.layers.items()})

    return replace(prompt, parts=tuple(converted(part) for part in prompt.parts), training=None)


def _pair_as_dtype(pair: KeyValue, dtype: np.dtype[Any]) -> KeyValue:
    gate = None if pair.gate is None else Gate(pair.gate.weight.astype(dtype), pair.gate.bias.astype(dtype))
    return KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype), gate)


def _relative_error(array: Array) -> float:
    """The largest relative change of a number that is stored in float32; infinite if one no longer fits."""
    exact = array.astype(np.float64)
    with np.errstate(over="ignore"):
        change = np.abs(exact.astype(np.float32).astype(np.float64) - exact)
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


PASSES: tuple[Pass, ...] = (_fit_family, _fit_parts, _keep_head, _eject, _relative_bias, _window, _start, _dtype)
