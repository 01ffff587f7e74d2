"""Plain values that are frozen: mappings, JSON, and the checks that a class of the prompt makes of its fields."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

Json: TypeAlias = Any
Name = TypeVar("Name")
Value = TypeVar("Value")


class FrozenMap(Mapping[Name, Value]):
    """A read-only mapping that pickles and deep-copies (a mapping proxy does neither)."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[Name, Value]) -> None:
        self._items = dict(items)

    def __getitem__(self, name: Name) -> Value:
        return self._items[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this text unless it holds."""
    if not condition:
        raise ValueError(message)


def json_object(value: Mapping[Any, Any], what: str) -> dict[str, Json]:
    """A copy of the value in plain JSON types, as it would come back from a file.

    Normalised here and not where it is written, so that a prompt equals the one that is read from its own file.
    Tuples become lists, whole numbers as keys become text (as `json.dumps` writes them), and subclasses (enums, NumPy's
    float64) become the type that they are derived from.
    """
    try:
        return _json_mapping(value, what)
    except RecursionError as error:
        raise ValueError(f"{what}: nested too deeply, or in itself") from error


def _json_mapping(value: Mapping[Any, Any], here: str) -> dict[str, Json]:
    result: dict[str, Json] = {}
    for key, item in value.items():
        require(isinstance(key, str | int) and not isinstance(key, bool), f"{here}: a key of {type(key).__name__}")
        name = _json(key if isinstance(key, str) else str(int(key)), here)
        require(name not in result, f"{here}: two keys {name!r:.40}")
        result[name] = _json(item, f"{here}.{name:.40}")
    return result


def _json(value: object, here: str) -> Json:
    match value:
        case None | bool():
            return value
        case str():
            text = str.__str__(value)
            text.encode("utf-8")  # half a surrogate pair is a UnicodeEncodeError, which is a ValueError
            return text
        case int():
            return int(value)
        case float():
            require(math.isfinite(value), f"{here}: {value}, which JSON does not have")
            return float(value)
        case list() | tuple():
            return [_json(item, f"{here}.{number}") for number, item in enumerate(value)]
        case Mapping():
            return _json_mapping(value, here)
        case _:
            raise ValueError(f"{here}: {type(value).__name__}, which is not a JSON value")
