"""Run a prompt on a model, in place, through any engine."""

from __future__ import annotations

from typing import Any

from softbridge.base import BaseModel
from softbridge.errors import EngineError
from softbridge.lower import Target, check_fits, lower
from softbridge.prompt import SoftPrompt
from softbridge.registry import engine_named, engines

_ENGINE = "_softbridge_engine"


def attach(model: Any, prompt: SoftPrompt, engine: str = "native") -> Any:
    """Make a transformers model run with a soft prompt.

    The prompt is lowered to what the engine can run on this model (with rotary positions: its keys are turned where
    the engine's toolkit has the real tokens elsewhere); positions are told where they must be.

    Args:
        model: a `PreTrainedModel`.
        prompt: for a base model of this geometry.
        engine: the name of an engine.

    Returns:
        The model to call: the same object for engines that work in place, the toolkit's wrapper otherwise.

    Raises:
        EngineError: the engine is missing or cannot run this prompt on this model.
        LoweringError: the engine's toolkit cannot express the prompt.
        BaseModelError: the prompt does not fit the model.
    """
    chosen = engine_named(engine)
    base = BaseModel.resolve(model)
    check_fits(prompt, base.geometry)
    if chosen.obstacles(prompt, model):
        lowered = lower(prompt, Target(engine, chosen.capabilities, base), accept=("positions",))
        prompt = lowered.prompt
    running = chosen.attach(model, prompt)
    setattr(running, _ENGINE, engine)
    return running


def extract(model: Any) -> SoftPrompt:
    """The prompt of an attached model, as it is now (after training, say).

    Raises:
        EngineError: nothing is attached.
    """
    return engine_named(_engine_of(model)).extract(model)


def detach(model: Any) -> Any:
    """Undo `attach`, and return the model as it was given.

    Raises:
        EngineError: nothing is attached.
    """
    engine = engine_named(_engine_of(model))
    delattr(model, _ENGINE)
    return engine.detach(model)


def _engine_of(model: Any) -> str:
    name = getattr(model, _ENGINE, None)
    if not isinstance(name, str):
        raise EngineError(
            f"no prompt is attached to this {type(model).__name__}",
            f"a model that softbridge.attach returned (engines: {', '.join(engines())})",
            "call softbridge.attach(model, prompt) first",
        )
    return name
