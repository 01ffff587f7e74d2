"""What is attached to a model, and what of it can be had back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from softbridge.arrays import Array, from_torch, same_array
from softbridge.base.model import BaseModel
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.lowering.scale import recorded
from softbridge.plugin.registry import engine_named, engines
from softbridge.prompt.soft_prompt import SoftPrompt

#: The attribute of an attached model that says so.
ATTACHED = "_softbridge_attached"


@dataclass(frozen=True)
class Attached:
    """What `detach` must know: who attached, and what the head of the prompt displaced."""

    engine: str
    head: Mapping[str, Array]
    displaced: Mapping[str, Any]


def attached_by(model: Any) -> str:
    """The name of the engine that attached to a model.

    Raises:
        EngineError: nothing is attached.
    """
    return attached_to(model).engine


def extract(model: Any) -> SoftPrompt:
    """The prompt of an attached model, as it is now (after training, say); also of one that a toolkit itself made.

    Raises:
        EngineError: nothing is attached.
    """
    if not isinstance(getattr(model, ATTACHED, None), Attached):
        for engine in engines().values():
            if engine.unavailable() is None:
                try:
                    found = engine.extract(model)
                    return recorded(found, BaseModel.resolve(model))
                except SoftbridgeError:
                    continue  # it is not this engine's
    attached = attached_to(model)
    prompt = engine_named(attached.engine).extract(model)
    # An engine that works in place leaves the head where it is; a wrapper that copied it returns its own.
    parameters = dict(model.named_parameters())
    head = {
        name: _as_given(from_torch(parameters[name]), array) if name in parameters else array
        for name, array in {**attached.head, **prompt.head}.items()
    }
    return replace(prompt, head=head)


def _as_given(now: Array, given: Array) -> Array:
    """In the precision in which it was given, if that holds it: a wider model may have trained it since."""
    narrow = now.astype(given.dtype)
    return narrow if same_array(narrow.astype(now.dtype), now) else now


def attached_to(model: Any) -> Attached:
    """What was attached to a model.

    Raises:
        EngineError: nothing is attached.
    """
    found = getattr(model, ATTACHED, None)
    if not isinstance(found, Attached):
        raise EngineError(
            f"no prompt is attached to this {type(model).__name__}",
            f"a model that softbridge.attach returned (engines: {', '.join(engines())})",
            "call softbridge.attach(model, prompt) first",
        )
    return found
