"""A model as it was before somebody attached to it: whatever an engine, or its toolkit, does in place is undone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any


def holders(model: Any) -> Iterator[Any]:
    """Whatever of a model may name its attention: modules, and their configurations."""
    for module in model.modules():
        yield module
        for name in ("config", "generation_config"):
            held = getattr(module, name, None)
            if hasattr(held, "__dict__"):  # some modules are given None
                yield held


class Snapshot:
    """The classes, attributes, submodules, hooks and configurations of a model, and what of it is frozen.

    It holds references, and copies of the weights that are given to `keep` alone. Dictionaries, lists and sets
    keep their identity, so that a hook's handle still removes the hook after `restore`.
    """

    def __init__(self, model: Any) -> None:
        held = {id(holder): holder for holder in holders(model)}.values()
        self._states = [
            (holder, type(holder), {name: (value, _items(value)) for name, value in vars(holder).items()})
            for holder in held
        ]
        self._frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._values: list[tuple[Any, Any]] = []

    def keep(self, parameters: Iterable[Any]) -> None:
        """Keep the values of parameters, too."""
        self._values += [(parameter, parameter.detach().clone()) for parameter in parameters]

    def restore(self) -> None:
        """Put everything back."""
        for holder, kind, state in self._states:
            if type(holder) is not kind:
                holder.__class__ = kind
            attributes = vars(holder)
            attributes.clear()
            for name, (value, items) in state.items():
                if isinstance(value, list):
                    value[:] = items
                elif items is not None:
                    value.clear()
                    value.update(items)
                attributes[name] = value
        for parameter, requires_grad in self._frozen:
            parameter.requires_grad_(requires_grad)
        for parameter, value in self._values:
            parameter.data.copy_(value)


def _items(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, (dict, list, set)) else None
