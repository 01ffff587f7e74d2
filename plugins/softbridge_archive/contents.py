"""What the files of a toolkit hold: tensors by their names, whatever file or dictionary they are in."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from softbridge import untrusted
from softbridge.arrays import BFLOAT16, Array
from softbridge.checkpoint.manifest import BESIDE
from softbridge.errors import CheckpointError, few
from softbridge.prompt.values import Json, json_object

#: What transformers' trainer saves beside a model's weights.
_TRAINER = re.compile(r"(.*/)?(optimizer|scheduler|scaler|training_args|rng_state(_\d+)?)\.(pt|pth|bin)")
#: torch's own containers of parameters, which a pickle has as objects: torch/nn/modules/container.py.
_CONTAINERS = frozenset(f"torch.nn.modules.container Parameter{kind}" for kind in ("List", "Dict"))


def weights(files: untrusted.Files) -> Mapping[str, untrusted.Stored]:
    """Every tensor of a checkpoint, of one file or of several, by its name; none is read yet.

    Dictionaries in dictionaries are one name: ``state_dict.encoder.weight``. What a trainer saves beside them (the
    state of its optimiser ...) is passed over.

    Raises:
        CheckpointError: a file is malformed, or two of them hold tensors of the same name.
    """
    found: dict[str, untrusted.Stored] = {}
    for file in files.names:
        if files.kind(file) in ("safetensors", "pickle") and not _TRAINER.fullmatch(file):
            for name, tensor in named(files.tree(file)).items():
                if name in found:
                    raise CheckpointError(
                        f"{files.path} holds several tensors {name!r:.80}, one of them in {file}",
                        "one checkpoint",
                        "give the path of the one to read",
                    )
                found[name] = tensor
    return found


def names(files: untrusted.Files) -> Collection[str]:
    """The names of every tensor. Of a file that is malformed there is none, which is for the reader to say."""
    found: set[str] = set()
    for file in files.names:
        with suppress(CheckpointError):
            if files.kind(file) in ("safetensors", "pickle"):
                found |= named(files.tree(file)).keys()
    return found


def saved(files: untrusted.Files, is_it: Callable[[Mapping[Any, Any]], bool]) -> dict[str, Mapping[Any, Any]]:
    """The dictionaries that torch.save wrote and that pass the test, by the names of their files. Never raises."""
    found: dict[str, Mapping[Any, Any]] = {}
    for name in files.names:
        with suppress(CheckpointError):  # of a file that is none of ours
            tree = files.tree(name) if files.kind(name) == "pickle" else None
            if isinstance(tree, dict) and is_it(tree):
                found[name] = tree
    return found


def the_one(found: Mapping[str, Any], files: untrusted.Files, what: str) -> Any:
    """The one thing that was found.

    Raises:
        CheckpointError: nothing was found, or several things.
    """
    if len(found) != 1:
        raise CheckpointError(
            f"{files.path} holds {len(found)} times {what}", "one prompt", "give the path of one file"
        )
    return next(iter(found.values()))


def named(tree: Any) -> dict[str, untrusted.Stored]:
    """Every tensor of what `Files.tree` gave, by its name.

    Raises:
        CheckpointError: the names would be longer than a file's description may be: lists that hold one another.
    """
    found: dict[str, untrusted.Stored] = {}
    todo, room = [("", tree)], untrusted.LIMIT
    while todo:
        path, node = todo.pop()
        if isinstance(node, untrusted.Stored):
            found[path] = node
        elif isinstance(node, (dict, list)):
            for name, child in node.items() if isinstance(node, dict) else enumerate(node):
                todo.append((f"{path}.{name}" if path else str(name), child))
                room -= len(todo[-1][0]) + 1
                if room < 0:
                    raise CheckpointError("names without end", "a checkpoint of tensors", "save the prompt's alone")
    return found


def below(found: Mapping[str, untrusted.Stored], stem: str) -> dict[str, untrusted.Stored]:
    """Those tensors whose names have ``stem`` before their last words, by these words: stem ``prefix_encoder`` finds
    ``embedding.weight`` in ``module.prefix_encoder.embedding.weight``. Empty if there is none.

    Args:
        stem: a regular expression.

    Raises:
        CheckpointError: the stem stands in several places.
    """
    matches = {name: re.fullmatch(rf"((?:.*\.)?(?:{stem}))\.(.+?)", name) for name in found}
    places = {match[1] for match in matches.values() if match is not None}
    if len(places) > 1:
        raise CheckpointError(
            f"tensors below {', '.join(sorted(places)[:4])}", "those of one prompt", "save that prompt's alone"
        )
    return {match[2]: found[name] for name, match in matches.items() if match is not None}


def unread(names: Collection[str]) -> tuple[str, ...]:
    """For `Origin.notes`: the names of tensors that are not the prompt's, and change nothing of what it computes."""
    return (f"not read: {len(names)} tensors that are not the prompt's ({few(sorted(names))})",) if names else ()


def plain(facts: Any, names: Iterable[str]) -> dict[str, Json]:
    """Those facts of a file that JSON can say, for `Origin.details`: of these names, where they are there."""
    found: dict[str, Json] = {}
    for name in names:
        if isinstance(facts, Mapping) and name in facts:
            with suppress(ValueError):
                found |= json_object({name: facts[name]}, name)
    return found


def matrix(tensor: untrusted.Stored, first: int = 0) -> Array:
    """The rows of a tensor that must have two axes, both of some length, and floating-point numbers.

    Args:
        first: row that is read; those before it are none of the prompt's.

    Raises:
        CheckpointError: it is another.
    """
    if len(tensor.shape) != 2 or tensor.shape[0] <= first or not tensor.shape[1] or not is_floating(tensor.dtype):
        raise CheckpointError(
            f"{tensor.name}: {list(tensor.shape)} of {tensor.dtype.name}",
            f"a floating-point matrix of at least {first + 1} rows",
            "check that the file is complete and what its toolkit wrote",
        )
    return tensor.array()[first:]


def renamed(tensors: Mapping[str, untrusted.Stored], beginnings: Mapping[str, str]) -> dict[str, Array]:
    """Tensors by our names, read. One whose name has none of the beginnings keeps it; evaluating then complains.

    Args:
        beginnings: of their names -> of ours.
    """
    found = {}
    for name, tensor in tensors.items():
        theirs = next((known for known in beginnings if name.startswith(known)), "")
        found[beginnings.get(theirs, "") + name.removeprefix(theirs)] = tensor.array()
    return found


def alone(files: untrusted.Files) -> str | None:
    """The name of the one file that is there beside softbridge's own, or None."""
    others = set(files.names) - BESIDE
    return others.pop() if len(others) == 1 else None


def only(files: untrusted.Files) -> str:
    """As `alone`.

    Raises:
        CheckpointError: there are others, or none.
    """
    name = alone(files)
    if name is None:
        held = ", ".join(files.names[:6]) or "nothing"
        raise CheckpointError(f"{files.path} holds {held}", "one file", "give the path of the file itself")
    return name


def dictionary(files: untrusted.Files, name: str | None) -> Mapping[str, Any]:
    """What a file of tensors holds (see `Files.tree`), if that is a dictionary; else an empty one.

    Raises:
        CheckpointError: the file is malformed.
    """
    tree = files.tree(name) if name is not None and files.kind(name) in ("safetensors", "pickle") else None
    return tree if isinstance(tree, dict) else {}


def contained(node: Any) -> dict[str, untrusted.Stored] | None:
    """The tensors of a dictionary, a list, or a ParameterDict or ParameterList of torch's; None if it is none of these.

    A list's are called 0, 1, ...
    """
    if isinstance(node, untrusted.Foreign) and node.name in _CONTAINERS and isinstance(node.state, dict):
        node = node.state.get("_parameters")
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = {str(name): one for name, one in pairs if isinstance(one, untrusted.Stored)}
    return found if isinstance(node, (dict, list)) and len(found) == len(node) else None


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this dtype are a prompt's."""
    return dtype.kind == "f" or dtype == BFLOAT16


def vectors_of(tensor: untrusted.Stored) -> Array:
    """The vectors [P, H] in a tensor [P, H], [1, P, H] or [H].

    Raises:
        CheckpointError: it has another shape, or no floating-point numbers.
    """
    shape = tensor.shape[1:] if len(tensor.shape) == 3 and tensor.shape[0] == 1 else tensor.shape
    if len(shape) not in (1, 2) or 0 in shape or not is_floating(tensor.dtype):
        raise CheckpointError(
            f"{tensor.name}: {list(tensor.shape)} of {tensor.dtype.name}",
            "floating-point vectors [P, H]",
            "check that this is a prompt's file",
        )
    return tensor.array().reshape(-1, shape[-1])


def holds(files: untrusted.Files, name: str) -> bool:
    """Whether one of the files is a dictionary with a tensor of that very name. What is malformed is none."""
    for file in files.names:
        with suppress(CheckpointError):
            tree = files.tree(file) if files.kind(file) in ("safetensors", "pickle") else None
            if isinstance(tree, dict) and isinstance(tree.get(name), untrusted.Stored):
                return True
    return False


def only_array(files: untrusted.Files) -> int | None:
    """How many axes the array has that is all there is; None: there is more, or something else.

    0 where its header is none that is believed, too: that is for the reader to say.
    """
    others = [name for name in files.names if name not in BESIDE]
    if len(others) != 1 or files.kind(others[0]) != "npy":
        return None
    with suppress(CheckpointError):
        return len(files.header(others[0])[""][1])
    return 0
