"""The key/value cache as a model takes it and returns it, whatever this transformers calls it.

transformers renamed the argument and the field of its outputs. Every place that hands a cache over, or asks for one,
does it through here: a model is asked for the name that its own signature has.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

#: What models call their cache, the newest name first.
NAMES = ("cache", "past_key_values", "cache_params")

#: What a table of positions calls the number of tokens in it.
LENGTHS = ("cache_length", "past_key_values_length")


def argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a callable takes its cache, or None if it takes none."""
    return _first(NAMES, inspect.signature(forward).parameters)


def length_argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a callable is passed the number of tokens in the cache, or None if it is not passed."""
    return _first(LENGTHS, inspect.signature(forward).parameters)


def handed(forward: Callable[..., Any], cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to a callable: nothing if the cache is None.

    A model's `forward` that names none may hand its keyword arguments on (those of classifiers do): then the first of
    its modules that takes a cache says the name.
    """
    if cache is None:
        return {}
    modules = getattr(getattr(forward, "__self__", None), "modules", tuple)
    names = (argument(callee) for callee in (forward, *(module.forward for module in modules())))
    return {next(filter(None, names), NAMES[0]): cache}


def name_given(arguments: Mapping[str, Any]) -> str | None:
    """The name under which a call was given a cache, or None if it was given none."""
    return next((name for name in NAMES if arguments.get(name) is not None), None)


def given(arguments: Mapping[str, Any]) -> Any:
    """The cache that a call was given, under whichever name, or None."""
    name = name_given(arguments)
    return None if name is None else arguments[name]


def rename(arguments: dict[str, Any], name: str | None) -> None:
    """Give a call's cache, in place, the name that the callee takes it by; see `argument`."""
    if name is not None:
        before = name_given(arguments)
        if before not in (None, name):
            arguments[name] = arguments.pop(before)


def of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    if isinstance(output, Mapping):
        name = _first(NAMES, set(output))
        return None if name is None else output[name]
    return next((found for name in NAMES if (found := getattr(output, name, None)) is not None), None)


def pairs(cache: Any) -> dict[int, tuple[Any, Any]]:
    """The keys and values [B, K, N, D] that a cache holds, by the number of their layer; layers without are left out.

    Caches of a model's own kind, older than transformers' caches of layers, have lists of them.
    """
    held: list[tuple[Any, Any]] = [
        (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", None) or ()
    ]
    if not held:
        keys, values = (getattr(cache, name, None) or () for name in ("key_cache", "value_cache"))
        held = list(zip(keys, values, strict=True))
    return {number: pair for number, pair in enumerate(held) if all(half is not None and half.numel() for half in pair)}


def empty(model: Any, rows: int) -> Any:
    """A cache of the kind that a model makes for itself, which holds nothing yet. Hybrid models keep states in theirs.

    Args:
        model: runs on one token to show it.
        rows: B.

    Returns:
        The cache, or None if the model makes none.
    """
    import torch

    ids = torch.zeros(rows, 1, dtype=torch.long, device=model.device)
    if hasattr(model, "prepare_inputs_for_generation"):
        column = torch.arange(1, device=model.device)
        made = given(model.prepare_inputs_for_generation(ids, use_cache=True, cache_position=column))
        if made is not None:  # for all kinds whose signature does not say how to make them
            return made
    with torch.no_grad():
        kind = type(of(model(ids, use_cache=True)))
    known = {
        "config": model.config.get_text_config(),
        "max_batch_size": rows,
        "dtype": model.dtype,
        "device": model.device,
    }
    names = inspect.signature(kind).parameters
    return None if kind is type(None) else kind(**{name: value for name, value in known.items() if name in names})


def drop(output: Any) -> None:
    """Take the cache out of a model's output, in place, as if it had been asked for none."""
    if isinstance(output, OrderedDict) and (name := _first(NAMES, set(output))):
        setattr(output, name, None)
        OrderedDict.__delitem__(output, name)  # `ModelOutput` lets nobody take anything out


def _first(names: tuple[str, ...], known: Any) -> str | None:
    return next((name for name in names if name in known), None)
