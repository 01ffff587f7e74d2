"""Run a prompt on a model, in place, through any engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softbridge import drop_in
from softbridge.base import BaseModel
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.head import load_head, restore_head
from softbridge.hookspecs import Insertable
from softbridge.lower import Target, check_fits, lower
from softbridge.methods import Method
from softbridge.passes import inexpressible
from softbridge.prompt import Array, SoftPrompt
from softbridge.registry import engine_named, engines
from softbridge.tensors import from_torch

#: The attribute of an attached model that says so.
ATTACHED = "_softbridge_attached"


@dataclass(frozen=True)
class _Attached:
    """What `detach` must know: who attached, and what the head of the prompt displaced."""

    engine: str
    head: Mapping[str, Array]
    displaced: Mapping[str, Any]


def attach(
    model: Any, prompt: SoftPrompt | Method | str | Path, engine: str = "native", *, seed: int | None = None
) -> Any:
    """Make a transformers model run with a soft prompt, to use it or to train it.

    A prompt that was trained through a parameterisation, and knows it, is trained through it again; to train its own
    numbers instead, attach ``dataclasses.replace(prompt, training=None)``. Whatever is no part of the prompt or of its
    head is frozen until `detach`.

    The prompt is lowered to what the engine can run on this model (with rotary positions: its keys are turned where
    the engine's toolkit has the real tokens elsewhere); positions are told where they must be.

    Args:
        model: a `PreTrainedModel`.
        prompt: for a base model of this geometry; or the path of its file or directory; or a method, for a new one.
        engine: the name of an engine.
        seed: of a new prompt's random start, which is the same for the same seed; drawn from torch's own random
            numbers if it is None, which `transformers.set_seed` governs.

    Returns:
        The model to call: the same object for engines that work in place, the toolkit's wrapper otherwise.

    Raises:
        EngineError: the engine is missing or cannot run this prompt on this model.
        LoweringError: the engine's toolkit cannot express the prompt.
        BaseModelError: the prompt does not fit the model.
        ValueError: the method does not fit the model.
    """
    chosen = engine_named(engine)
    base = BaseModel.resolve(model)
    if isinstance(prompt, (str, Path)):
        from softbridge.conversion import load

        prompt = load(prompt, base)
    elif isinstance(prompt, Method):
        import torch

        prompt = prompt.initialise(base.geometry, int(torch.randint(2**31, ())) if seed is None else seed)
    check_fits(prompt, base.geometry)
    if inexpressible(prompt, chosen.capabilities, base) or chosen.obstacles(prompt, model):
        lowered = lower(prompt, Target(engine, chosen.capabilities, base), accept=("positions",))
        prompt = lowered.prompt
    displaced = load_head(model, prompt.head)
    try:
        running = chosen.attach(model, prompt)
    except BaseException:
        restore_head(model, displaced)
        raise
    setattr(running, ATTACHED, _Attached(engine, prompt.head, displaced))
    if running is model and isinstance(chosen, Insertable):
        drop_in.become(running)
    return running


def attached_by(model: Any) -> str:
    """The name of the engine that attached to a model.

    Raises:
        EngineError: nothing is attached.
    """
    return _attached(model).engine


def extract(model: Any) -> SoftPrompt:
    """The prompt of an attached model, as it is now (after training, say); also of one that a toolkit itself made.

    Raises:
        EngineError: nothing is attached.
    """
    if not isinstance(getattr(model, ATTACHED, None), _Attached):
        for engine in engines().values():
            if engine.unavailable() is None:
                try:
                    return engine.extract(model)
                except SoftbridgeError:
                    continue  # it is not this engine's
    attached = _attached(model)
    prompt = engine_named(attached.engine).extract(model)
    # An engine that works in place leaves the head where it is; a wrapper that copied it returns its own.
    parameters = dict(model.named_parameters())
    head = {
        name: from_torch(parameters[name]).astype(array.dtype) if name in parameters else array
        for name, array in {**attached.head, **prompt.head}.items()
    }
    return replace(prompt, head=head)


def detach(model: Any) -> Any:
    """Undo `attach`, and return the model as it was given.

    Raises:
        EngineError: nothing is attached.
    """
    attached = _attached(model)
    delattr(model, ATTACHED)
    drop_in.unbecome(model)
    detached = engine_named(attached.engine).detach(model)
    restore_head(detached, attached.displaced)
    return detached


def _attached(model: Any) -> _Attached:
    found = getattr(model, ATTACHED, None)
    if not isinstance(found, _Attached):
        raise EngineError(
            f"no prompt is attached to this {type(model).__name__}",
            f"a model that softbridge.attach returned (engines: {', '.join(engines())})",
            "call softbridge.attach(model, prompt) first",
        )
    return found
