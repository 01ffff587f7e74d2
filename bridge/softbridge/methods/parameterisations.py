"""What a training state stands for, evaluated into the part that a model sees, and dropped ("ejected").

A `Training` keeps a parameterisation's own tensors, so that training can go on. `evaluate` computes what they stand for
in the dtype in which they are stored, so that the result is the toolkit's bit for bit. `softbridge.methods.kinds` says
how, and names the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.geometry import Site
from softbridge.prompt.part import AdaptionPrompt, InputPrompt, KeyValuePrefix, Part
from softbridge.prompt.soft_prompt import SoftPrompt, Training

if TYPE_CHECKING:
    import torch

from softbridge.methods.kinds import Settings, Tensor, dimensions, kind_of, lengths_of, measure


def trained(training: Training) -> frozenset[str]:
    """The names of the tensors that training changes; the others are frozen.

    Raises:
        ValueError: the kind is unknown, or its settings are not what it documents.
    """
    specs = kind_of(training.kind).tensors(training.settings)
    return frozenset(name for name in training.tensors if (spec := specs.get(_local(name))) and spec.trained)


def _local(name: str) -> str:
    """The name without its site."""
    site, _, rest = name.partition(".")
    return rest if site in get_args(Site) else name


def evaluate(
    kind: str,
    settings: Settings,
    tensors: Mapping[str, torch.Tensor],
    site: Site | None = None,
    *,
    train: bool = False,
) -> torch.Tensor:
    """What a parameterisation stands for: [P, H], or [P, W] of one site. Differentiable.

    Args:
        kind: a name in `KINDS`.
        settings: as the kind documents them.
        tensors: all of the `Training`, also those of other sites.
        site: for kinds that make prefixes.
        train: whether dropout is on.

    Raises:
        ValueError: the kind is unknown, or settings, names, shapes or dtypes are not what it documents.
    """
    entry = kind_of(kind)
    if (site is not None) != entry.per_site:
        wanted = "prefixes, one for each site" if entry.per_site else "vectors in the input, which have no site"
        raise ValueError(f"{kind}: it makes {wanted}; site: {site!r}")
    specs = entry.tensors(settings)
    prefix = f"{site}." if entry.per_site else ""
    known = {f"{place}.{name}" for place in get_args(Site) for name in specs} if entry.per_site else set(specs)
    problems = [f"missing {prefix}{name}" for name in specs if prefix + name not in tensors]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - known)]
    if problems:
        raise ValueError(f"{kind}: {', '.join(problems)}")
    own = {name: tensors[prefix + name] for name in specs}
    _check_shapes(kind, prefix, specs, own)
    return entry.function(settings, own, train)


def _check_shapes(kind: str, prefix: str, specs: Mapping[str, Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    sizes: dict[str, int] = {}
    for name, tensor in tensors.items():
        shape, sides = tuple(tensor.shape), dimensions(specs[name].shape)
        for size, (factor, symbol) in zip(shape, sides, strict=False):
            if symbol and size % factor == 0:
                sizes.setdefault(symbol, size // factor)
        if shape != measure(specs[name].shape, sizes) or 0 in shape:
            expected = ", ".join(f"{s} = {sizes[s]}" for _, s in sides if s in sizes)
            raise ValueError(
                f"{kind}: {prefix}{name} has the shape {list(shape)}, expected [{specs[name].shape.replace(' ', ', ')}]"
                + (f" with {expected}" if expected else "")
            )
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"{kind}: tensors of {found}, expected one floating-point type for all")


#: A parameterisation may make at most so many times as many numbers as it consists of: a stranger's few rows and
#: columns could stand for gigabytes. Trained ones stay below 20.
GROWTH = 64
#: So many numbers it may make in any case.
SMALL = 2**22


def eject(training: Training, site: Site | None = None) -> Array:
    """`evaluate` on the arrays of a training state: [P, H], or [P, W] of one site.

    Raises:
        ValueError: as `evaluate`; or it stands for more numbers than `GROWTH` allows.
    """
    import torch

    _check_growth(training)
    tensors = {name: to_torch(array) for name, array in training.tensors.items()}
    # With gradients on, though none is asked for: so the toolkits evaluate when they save, and without gradients torch
    # computes a float32 LSTM on the CPU by other kernels, which round otherwise.
    with torch.enable_grad():
        return from_torch(evaluate(training.kind, training.settings, tensors, site))


def _check_growth(training: Training) -> None:
    """Look at the shapes alone: nothing on the way is wider than the widest tensor, in each of P rows."""
    specs = kind_of(training.kind).tensors(training.settings)
    sizes: dict[bool, int] = {}
    for name, array in training.tensors.items():
        sides = dimensions(specs[local].shape) if (local := _local(name)) in specs else []
        for size, (_, symbol) in zip(array.shape, sides, strict=False):
            sizes[symbol == "P"] = max(size, sizes.get(symbol == "P", 0))
    rows, widest = sizes.get(True, 0), sizes.get(False, 0)
    own = sum(array.size for array in training.tensors.values())
    if rows * widest > max(SMALL, GROWTH * own):
        raise ValueError(
            f"{training.kind}: {own} numbers stand for {rows} rows of up to {widest}, which is more than {GROWTH} times"
        )


def materialise(training: Training, site: Site, layers: Sequence[int], kv_heads: int, head_dim: int) -> KeyValuePrefix:
    """The prefix of one site: [K, P, D] keys and values of each of the L layers.

    Raises:
        ValueError: the kind is unknown or makes no prefixes; its settings or tensors are not what it documents, or are
            for other layers or heads.
    """
    return _materialise(training, site, dict.fromkeys(layers, (kv_heads, head_dim)))


def _materialise(training: Training, site: Site, shapes: Mapping[int, tuple[int, int]]) -> KeyValuePrefix:
    flat = eject(training, site)
    width = sum(2 * kv_heads * head_dim for kv_heads, head_dim in shapes.values())
    if flat.shape[1] != width:
        sizes = " + ".join(
            f"2 · {list(shapes.values()).count(shape)} layers · {shape[0]} heads · {shape[1]}"
            for shape in dict.fromkeys(shapes.values())
        )
        raise ValueError(f"{training.kind}: rows of {flat.shape[1]} numbers at site {site}, expected {width} ({sizes})")
    return KeyValuePrefix.from_rows(site, flat, shapes)


def materialise_vectors(training: Training, task: int | None = None) -> Array:
    """The vectors [P, H] of an input prompt.

    Args:
        training: of a kind that makes them.
        task: of multitask prompt tuning; None is the one that its settings name.

    Raises:
        ValueError: the kind is unknown or makes prefixes; its settings or tensors are not what it documents; the
            parameterisation does not have this task.
    """
    return eject(training if task is None else _for_task(training, task))


def tasks_of(training: Training) -> int:
    """For how many tasks a parameterisation has a prompt each; 0: it knows no tasks.

    Raises:
        ValueError: the settings of a table are not what it documents.
    """
    match training.kind:
        case "multitask":
            return len(training.tensors["columns"])
        case "table":
            return len(lengths_of(training.settings))
    return 0


def materialise_tasks(training: Training) -> dict[int, Array]:
    """The vectors [P, H] of every task of multitask prompt tuning, or of a table.

    Raises:
        ValueError: the kind is another, or its tensors are not what it documents.
    """
    first = materialise_vectors(training, 0)  # complains of what is wrong
    return {0: first, **{task: materialise_vectors(training, task) for task in range(1, tasks_of(training))}}


def float32_parameterisation(prompt: SoftPrompt) -> tuple[str, ...]:
    """The name of the prompt's parameterisation, if evaluating it computes in less than float64; else nothing."""
    training = prompt.training
    if training is None or not kind_of(training.kind).computed:
        return ()
    narrow = any(array.dtype.itemsize < 8 for array in training.tensors.values())
    return (f"the prompt's {training.kind} parameterisation",) if narrow else ()


def rematerialise(prompt: SoftPrompt, task: int | None = None) -> SoftPrompt:
    """The prompt with its parts evaluated anew from its training state: after training, or for another task.

    Raises:
        ValueError: the prompt has no parameterisation, one that does not fit its parts, or not this task.
    """
    training = prompt.training
    if training is None:
        raise ValueError("the prompt has no training state: its parts are all there is")
    if task is not None:
        training = _for_task(training, task)
    parts: list[Part] = []
    start = dict(prompt.positions.start)
    for part in prompt.parts:
        if isinstance(part, AdaptionPrompt) or not kind_of(training.kind).makes(part):
            parts.append(part)
        elif isinstance(part, InputPrompt):
            made = replace(part, vectors=materialise_vectors(training))
            start[part.stack] += made.length - part.length  # tasks of a table may have other lengths
            parts.append(made)
        else:
            shapes = {layer: (pair.keys.shape[0], pair.keys.shape[2]) for layer, pair in part.layers.items()}
            anew = _materialise(training, part.site, shapes)
            layers = {layer: replace(pair, gate=part.layers[layer].gate) for layer, pair in anew.layers.items()}
            parts.append(replace(part, layers=layers))
    positions = replace(prompt.positions, start=start)
    return replace(prompt, parts=tuple(parts), positions=positions, training=training)


def _for_task(training: Training, task: int) -> Training:
    if tasks_of(training) == 0:
        raise ValueError(
            f"task {task}: only the parameterisations 'multitask' and 'table' have tasks, this is {training.kind!r}"
        )
    return replace(training, settings={**training.settings, "task": task})
