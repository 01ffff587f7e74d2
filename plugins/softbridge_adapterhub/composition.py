"""What AdapterHub's compositions make of soft prompts: `Stack`, `BatchSplit` and `Parallel`.

A prefix is put in front of the keys and values that there are, so a `Stack` of prefixes is one prefix, the last one
first. `BatchSplit` gives each run of rows of a batch a prompt of its own, and `Parallel` the whole batch once for each,
one after the other. Input prompts do not compose: AdapterHub uses the first adapter's vectors for every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from softbridge.arrays import same_array
from softbridge.prompt import Origin, Positions, SoftPrompt
from softbridge.tools import concatenate
from softbridge_adapterhub.adapter import starts

#: Families whose mask hides what AdapterHub fills shorter prefixes up with, so that lengths, and which layers have a
#: prefix, may differ among rows.
UNEQUAL_LENGTHS = frozenset(("distilbert",))


#: So many adapters a composition may name, and so often each of them.
MOST = 64
MOST_AGAIN = 8


class Block(NamedTuple):
    """Adapters that some rows of a batch run with.

    Attributes:
        names: of the adapters, in their order in the stack.
        rows: how many rows of the batch, one block's behind the other's; None: all rows of the batch.
    """

    names: tuple[str, ...]
    rows: int | None


class Prompted(NamedTuple):
    """A `Block` with the one prompt that its adapters are."""

    prompt: SoftPrompt
    rows: int | None


def describe(setup: object) -> str:
    """A composition as AdapterHub prints it: ``Stack[a, b]``; the beginning of a long one."""
    match setup:
        case {"type": "single", "children": [str(name)]}:
            return f"{name:.200}"
        case {"type": str(kind), "children": [*children]}:
            return f"{kind}[{', '.join(map(describe, children[:8]))}]"[:200]
    return f"{setup!r:.40}"


def blocks(setup: object) -> tuple[Block, ...]:
    """The blocks of a composition, as `to_dict` of the package's blocks and `adapter_setup.json` say it.

    Several blocks with as many rows as `BatchSplit` says, or several with all rows each: `Parallel`.

    Raises:
        ValueError: a composition that AdapterHub has for no prompts.
    """
    match setup:
        case {"type": "single", "children": [str(name)]}:
            return (Block((name,), None),)
        case {"type": "Stack", "children": [_, *_] as children}:
            found: tuple[Block, ...] = (Block((), None),)
            for child in children:
                inner = blocks(child)
                if min(len(found), len(inner)) > 1:
                    raise ValueError(f"{describe(setup)} stacks what differs from row to row")
                found = tuple(
                    Block(a.names + b.names, b.rows if a.rows is None else a.rows) for a in found for b in inner
                )
            return found
        case {"type": "Parallel", "children": [_, _, *_] as children}:
            return tuple(Block(_alone(child), None) for child in children)
        case {"type": "BatchSplit", "children": [_, *_] as children, "kwargs": {"batch_sizes": [*sizes]}} if len(
            sizes
        ) == len(children) and all(type(size) is int and size >= 0 for size in sizes):
            return tuple(Block(_alone(child), size) for child, size in zip(children, sizes, strict=True))
    raise ValueError(f"AdapterHub has no prompts composed as {describe(setup)}")


def _check_size(setup: object) -> None:
    """Refuse a composition of more than `MOST` parts, of whatever kind and depth, before it is looked at further.

    Raises:
        ValueError: it has more, or names one adapter more than `MOST_AGAIN` times.
    """
    names: Counter[str] = Counter()
    level, count = [setup], 0
    while level:
        count += len(level)
        names.update(one for one in level if isinstance(one, str))
        if count > 4 * MOST or names.total() > MOST or any(number > MOST_AGAIN for number in names.values()):
            what = f"more than {MOST} adapters, or one of them more than {MOST_AGAIN} times"
            raise ValueError(f"a composition of {what}: {describe(setup):.80}")
        children = [one.get("children") for one in level if isinstance(one, dict)]
        level = [child for some in children if isinstance(some, list) for child in some[: 4 * MOST + 1]]


def _alone(setup: object) -> tuple[str, ...]:
    found = blocks(setup)
    if len(found) > 1 or found[0].rows is not None:
        raise ValueError(f"{describe(setup)} splits a batch within a part of a batch")
    return found[0].names


def prompted(setup: object, prompt_of: Callable[[str], SoftPrompt]) -> tuple[Prompted, ...]:
    """The blocks of a composition, each as one prompt.

    Args:
        prompt_of: the prompt of an adapter, by its name.

    Raises:
        ValueError: of what AdapterHub computes there is no prompt; with the reason.
    """
    _check_size(setup)
    found = blocks(setup)
    prompts = {name: prompt_of(name) for name in dict.fromkeys(name for block in found for name in block.names)}
    first = found[0].names[0]
    if len(found) > 1 and found[0].rows is None and any(prompt.inputs for prompt in prompts.values()):
        raise ValueError(f"{describe(setup)}: AdapterHub's prompt tuning does not repeat the batch for {first}")
    made = [
        Prompted(stacked([prompts[name] for name in block.names], prompts[first], describe(setup)), block.rows)
        for block in found
    ]
    sizes = [{part.site: (part.length, tuple(part.layers)) for part in one.prompt.prefixes} for one in made]
    geometry = prompts[first].base.geometry
    if any(size != sizes[0] for size in sizes) and (geometry is None or geometry.model_type not in UNEQUAL_LENGTHS):
        raise ValueError(
            f"{describe(setup)}: AdapterHub fills the shorter of its prefixes up with keys that real tokens see "
            "(see `softbridge_compat.adapterhub_defects`)"
        )
    return tuple(made)


def stacked(prompts: Sequence[SoftPrompt], first: SoftPrompt, what: str) -> SoftPrompt:
    """The one prompt that a stack of prompts is.

    Args:
        prompts: in the order of the stack.
        first: of the first adapter in the whole composition, whose vectors enter the input.
        what: the composition, for messages.

    Raises:
        ValueError: two gates in one layer, prefixes of other layers, two heads, or nothing that has an effect.
    """
    if len(prompts) == 1 and (prompts[0] is first or not (first.inputs or prompts[0].inputs)):
        return prompts[0]
    heads = [prompt.head for prompt in prompts if prompt.head]
    if any(
        head.keys() != heads[0].keys() or not all(same_array(head[name], heads[0][name]) for name in head)
        for head in heads
    ):
        raise ValueError(f"{what}: adapters with heads of their own")
    # Joined under a plain bias, and skewed again: what the joined length skews is what AdapterHub skews.
    prefixes = [
        SoftPrompt(prompt.prefixes, Positions(starts(prompt.prefixes), "plain", "pinned"), prompt.base)
        for prompt in reversed(prompts)
        if prompt.prefixes
    ]
    parts = first.inputs + (concatenate(prefixes).parts if prefixes else ())
    if not parts:
        raise ValueError(f"{what}: AdapterHub puts only the first adapter's vectors into the input")
    positions = replace(first.positions, start=starts(parts), unbiased_from=prompts[0].positions.unbiased_from)
    return SoftPrompt(parts, positions, first.base, heads[0] if heads else {}, origin=_origin(prompts, what))


def _origin(prompts: Sequence[SoftPrompt], what: str) -> Origin | None:
    """Provenance of all, with what was lost of any."""
    origins = [prompt.origin for prompt in prompts if prompt.origin is not None]
    if not origins:
        return None
    lost = [origin.partial for origin in origins if origin.partial]
    notes = [note for origin in origins for note in origin.notes or ()]
    notes.append(f"{what} is one prefix, with keys and values, and without its parameterisation")
    if any(prompt.inputs for prompt in prompts[1:]):
        notes.append("AdapterHub puts only the first adapter's vectors into the input")
    digests = {name: digest for origin in origins for name, digest in origin.digests.items()}
    return Origin(origins[0].format, {}, digests, tuple(notes), "; ".join(lost))
