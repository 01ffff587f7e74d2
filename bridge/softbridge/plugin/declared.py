"""Whether what a plugin brings is what its protocol says, before anything is asked of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, get_origin, get_type_hints

from softbridge.plugin.hookspecs import ENGINE_EXTRAS, FORMAT_EXTRAS, Engine, Format
from softbridge.plugin.serving import Server
from softbridge_compat.defects import Defect

#: Hook -> the protocol of its values, and those that they may follow besides.
_PROTOCOLS: dict[str, tuple[type, tuple[type, ...]]] = {
    "softbridge_formats": (Format, FORMAT_EXTRAS),
    "softbridge_engines": (Engine, ENGINE_EXTRAS),
    "softbridge_servers": (Server, ()),
}
#: Functions of a defect -> how many arguments they take.
_QUESTIONS = {"applies": 0, "concerns": 2}


def faults(hook: str, value: Any) -> list[str]:
    """What is wrong with a value that a hook returned, in words; empty if nothing is.

    Attributes must have the declared type, and methods must take the declared arguments. Optional ones may be missing.
    No method is called.
    """
    if hook not in _PROTOCOLS:
        return list(_faults_of_defect(value))
    must, extras = _PROTOCOLS[hook]
    found = [fault for name, declared in _members(must) for fault in _faults_of(value, name, declared)]
    for extra in extras:
        for name, declared in _members(extra):
            found += _faults_of(value, name, declared) if hasattr(value, name) else ()
    return found


def _members(protocol: Any) -> Iterator[tuple[str, Any]]:
    """Name -> the function that declares a method, or the type of an attribute."""
    yield from get_type_hints(protocol).items()
    for name, declared in vars(protocol).items():
        if isinstance(declared, property):
            yield name, get_type_hints(declared.fget)["return"]
        elif inspect.isfunction(declared) and not name.startswith("_"):
            yield name, declared


def _faults_of(value: Any, name: str, declared: Any) -> Iterator[str]:
    if not hasattr(value, name):
        yield f"it has no `{name}`"
    elif inspect.isfunction(declared):
        arguments = [one for one in inspect.signature(declared).parameters.values() if one.name != "self"]
        by_name = [one.name for one in arguments if one.kind is one.KEYWORD_ONLY]
        if not _takes(getattr(value, name), len(arguments) - len(by_name), by_name):
            yield f"`{name}` cannot be called with ({', '.join(one.name for one in arguments)})"
    elif not _is(found := getattr(value, name), declared):
        yield f"`{name}` is {found!r:.40}, not {'a sequence of texts' if get_origin(declared) else declared.__name__}"


def _is(found: object, declared: Any) -> bool:
    if get_origin(declared) is None:
        return isinstance(found, declared)
    return isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(one, str) for one in found)


def _takes(method: Any, by_place: int, by_name: Iterable[str] = ()) -> bool:
    """Whether a function takes so many arguments by their place, and these by name."""
    try:
        inspect.signature(method).bind(*[None] * by_place, **dict.fromkeys(by_name))
    except TypeError:  # of `signature`, too: it is nothing that can be called
        return False
    except ValueError:  # written in another language, it does not say
        return callable(method)
    return True


def _faults_of_defect(value: Any) -> Iterator[str]:
    if not isinstance(value, Defect):
        yield f"it is {value!r:.60}, no `softbridge.plugin.Defect`"
        return
    for field in fields(value):
        found = getattr(value, field.name)
        if field.name in _QUESTIONS:
            if not _takes(found, _QUESTIONS[field.name]):
                yield f"`{field.name}` cannot be called with {_QUESTIONS[field.name]} arguments"
        elif not (isinstance(found, str) and found):
            yield f"`{field.name}` is {found!r:.40}, not a text"
