"""Run a prompt on a model, in place, through any engine."""

from __future__ import annotations

import copy
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from softbridge.attachment import trainer_model as drop_in
from softbridge.attachment.attached import ATTACHED, Attached, attached_to
from softbridge.base.head import load_head, restore_head
from softbridge.base.model import BaseModel
from softbridge.base.snapshot import Snapshot
from softbridge.checkpoint.choice import of_task
from softbridge.checkpoint.read import load
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.lowering.expressible import check_fits, inexpressible, left_behind
from softbridge.lowering.planner import for_model, lower
from softbridge.lowering.steps import Target
from softbridge.methods import Method
from softbridge.plugin.hookspecs import Banker, Engine, Insertable, SelfChecking
from softbridge.plugin.optional import able, self_checks_wanted
from softbridge.plugin.prompt_bank import Entry, PromptBank
from softbridge.plugin.registry import engine_named, engines
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.untested import warn_of_untested
from softbridge.verification.run import obstacles_of


def attach(
    model: Any,
    prompt: SoftPrompt | Method | PromptBank | str | Path,
    engine: str = "native",
    *,
    seed: int | None = None,
    accept: Collection[str] = (),
    self_check: bool | None = None,
    task: int | None = None,
) -> Any:
    """Make a transformers model run with a soft prompt, to use it or to train it.

    A prompt that was trained through a parameterisation, and knows it, is trained through it again; to train its own
    numbers instead, attach ``dataclasses.replace(prompt, training=None)``. All other parameters than the
    prompt's and its head's are frozen until `detach`.

    The prompt is lowered to what the engine can run on this model: where the engine's toolkit puts the real tokens at
    other positions, rotary keys are rotated, or else the engine passes ``position_ids``.

    Args:
        model: a `PreTrainedModel`.
        prompt: for a base model of this geometry; or the path of its file or directory; or a method, for a new one;
            or a `PromptBank`, which gives each row of a batch its own prompt.
        engine: the name of an engine.
        seed: of a new prompt's random start, which is the same for the same seed; drawn from torch's own random
            numbers if it is None, which `transformers.set_seed` governs.
        accept: names of the conditions that the caller accepts, in addition to ``positions``, which the engine passes:
            ``partial``, where the source is an adapter of several methods and only its prompt is attached.
        self_check: whether the engine, if it can, proves itself before the first call, on a small copy of the model:
            see `softbridge.selfcheck`. None: unless the environment variable SOFTBRIDGE_SELF_CHECK is 0.
        task: which task of a multitask prompt, alone; None: that of the prompt, with the matrices of all tasks.

    Returns:
        The model to call: the same object for engines that work in place, the toolkit's wrapper otherwise. Where this
        raises, whatever it is, the model is bit for bit as it was.

    Raises:
        EngineError: the engine is missing or cannot run this prompt on this model; it says which engine does here.
        LoweringError: the engine's toolkit cannot express the prompt, or only under conditions that are not accepted.
        BaseModelError: the prompt does not fit the model.
        ValueError: the method does not fit the model.
    """
    warn_of_untested()
    chosen = engine_named(engine)
    _check_base(model)
    snapshot = Snapshot(model)
    try:
        if isinstance(prompt, PromptBank):
            running = _attach_bank(engine, model, prompt, accept)
        else:
            running = _attach_prompt(engine, model, prompt, snapshot, seed, accept, task)
        _check_itself(chosen, running, self_check)
        if running is model and not isinstance(prompt, PromptBank) and able(chosen, Insertable) is not None:
            drop_in.become(running)
    except BaseException:
        snapshot.restore()
        raise
    return running


def _attach_bank(engine: str, model: Any, bank: PromptBank, accept: Collection[str]) -> Any:
    banker = able(engine_named(engine), Banker)
    if banker is None:
        those = [name for name, other in engines().items() if able(other, Banker) is not None]
        raise EngineError(
            f"engine '{engine}' runs one prompt for all rows of a batch",
            f"an engine that takes a bank: {', '.join(those)}",
            "choose one of them, or attach one prompt",
        )
    running = banker.attach_bank(model, bank, partial(_fetch, engine, model, accept))
    setattr(running, ATTACHED, Attached(engine, {}, {}))
    return running


def _attach_prompt(
    engine: str,
    model: Any,
    prompt: SoftPrompt | Method | str | Path,
    snapshot: Snapshot,
    seed: int | None,
    accept: Collection[str],
    task: int | None,
) -> Any:
    chosen, base = engine_named(engine), BaseModel.resolve(model)
    method = prompt if isinstance(prompt, Method) else None
    if isinstance(prompt, Method):
        prompt = prompt.initialise(base.geometry, _drawn() if seed is None else seed)
        _check_trains(engine, prompt, type(method).__name__, model)
    given = _read(prompt, base, task)
    prompt = _expressed(given, engine, model, accept)
    if method is not None:
        _check_kept(engine, given, prompt, type(method).__name__)
    snapshot.keep(parameter for name, parameter in model.named_parameters() if name in prompt.head)
    displaced = load_head(model, prompt.head)
    try:
        running = chosen.attach(model, prompt)
    except EngineError as error:
        snapshot.restore()
        if chosen.obstacles(prompt, model):
            raise _with_a_way_out(error, given, engine, model, accept) from error
        raise
    setattr(running, ATTACHED, Attached(engine, prompt.head, displaced))
    return running


def _check_itself(engine: Engine, running: Any, asked: bool | None) -> None:
    """Let an engine that can check itself do so, if the caller, or else the environment, wants it."""
    checking = able(engine, SelfChecking)
    if checking is not None and (self_checks_wanted() if asked is None else asked):
        checking.check_itself(running)


def _with_a_way_out(
    error: EngineError, prompt: SoftPrompt, engine: str, model: Any, accept: Collection[str]
) -> EngineError:
    """The refusal of an engine, with the names of those that run the prompt on this model here."""

    def runs(other: str) -> bool:
        try:
            expressed = _expressed(prompt, other, model, accept)
            return not obstacles_of(engines()[other], expressed, model)
        except SoftbridgeError:
            return False

    those = [name for name, other in engines().items() if name != engine and other.unavailable() is None and runs(name)]
    if not those:
        return error
    ways = " or ".join(f"engine='{name}'" for name in those)
    return EngineError(error.found, error.expected, f"{ways}, which runs it here; or {error.remedy}")


def _drawn() -> int:
    import torch

    return int(torch.randint(2**31, ()))


def _check_base(model: Any) -> None:
    """Refuse what is no transformers model, a toolkit's wrapper of one above all."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    kind = type(model)
    raise EngineError(
        f"a {kind.__name__} of {kind.__module__.partition('.')[0]}, which is not a PreTrainedModel of transformers",
        "the transformers model itself, which the engine wraps or hooks",
        "pass the model inside, or load the base again (softbridge.detach undoes softbridge.attach); the prompt "
        "that is in a toolkit's model is softbridge.extract(model), and that can be attached",
    )


def _check_trains(engine: str, prompt: SoftPrompt, method: str, model: Any) -> None:
    """Refuse to start a training that would lose its parameterisation, or that transformers' trainer will not begin."""

    def trains(name: str) -> bool:
        through = engines()[name].capabilities.trains_through
        return prompt.training is None or through is None or prompt.training.kind in through

    if prompt.training is not None and not trains(engine):
        raise EngineError(
            f"{method} trains the prompt through '{prompt.training.kind}', and the engine '{engine}' "
            "trains a prompt's own numbers only: its checkpoints hold nothing else",
            f"an engine that keeps it: {', '.join(name for name in engines() if trains(name))}",
            "choose that engine and convert what it trained, or take a method without parameterisation (PromptTuning, "
            "PTuningV2, PrefixTuning(reparameterisation=None))",
        )
    if getattr(model, "is_quantized", False) and not engines()[engine].capabilities.quantised:
        those = [name for name, other in engines().items() if other.capabilities.quantised]
        raise EngineError(
            f"a quantised base model: transformers' trainer refuses to train it with the engine '{engine}'",
            f"an engine whose models it takes: {', '.join(those)}",
            "choose that engine; to run a trained prompt, attach the prompt itself",
        )


def _check_kept(engine: str, prompt: SoftPrompt, expressed: SoftPrompt, method: str) -> None:
    """Refuse to start the training of one method where an engine would train another: keys and values, for vectors."""
    if [type(part) for part in prompt.parts] != [type(part) for part in expressed.parts]:
        raise EngineError(
            f"{method} trains vectors in the input, and the engine '{engine}' runs the keys and values that they leave",
            "an engine that trains the method's own numbers, such as native",
            "choose that engine and convert what it trained, or take PTuningV2",
        )


def _fetch(engine: str, model: Any, accept: Collection[str], entry: Entry) -> SoftPrompt:
    return _expressed(_read(entry.source, BaseModel.resolve(model)), engine, model, accept)


def _read(prompt: SoftPrompt | str | Path, base: BaseModel, task: int | None = None) -> SoftPrompt:
    """The prompt, read if need be, or of it the prompt of one task."""
    if isinstance(prompt, (str, Path)):
        return load(prompt, base=base, task=task)
    return prompt if task is None else of_task(prompt, task)


def _expressed(prompt: SoftPrompt, engine: str, model: Any, accept: Collection[str]) -> SoftPrompt:
    """The prompt in a form that the engine can run on this model if there is one."""
    chosen, base = engine_named(engine), BaseModel.resolve(model)
    check_fits(prompt, base.geometry)
    prompt = for_model(prompt, base, accept)
    if left_behind(prompt) or inexpressible(prompt, chosen.capabilities, base) or chosen.obstacles(prompt, model):
        return lower(prompt, Target(engine, chosen.capabilities, base), accept=("positions", *accept)).prompt
    return prompt


def detach(model: Any) -> Any:
    """Undo `attach`, and return the model as it was given.

    Raises:
        EngineError: nothing is attached.
    """
    attached = attached_to(model)
    delattr(model, ATTACHED)
    drop_in.unbecome(model)
    detached = engine_named(attached.engine).detach(model)
    restore_head(detached, attached.displaced)
    return detached


def reference(model: Any) -> Any:
    """A frozen model with the prompt as it is now, for a trainer that compares with the start (TRL's ``ref_model``).

    It shares the base model's weights, and has its own copy of what is trained. To compare with the base model
    instead, switch the prompt off: ``with model.softbridge.off():`` (engine ``native``).

    Raises:
        EngineError: nothing is attached, or an engine that wraps the model did: its toolkit knows its own reference.
    """
    from transformers import PreTrainedModel

    attached = attached_to(model)
    if not isinstance(model, PreTrainedModel):
        raise EngineError(
            f"a {type(model).__name__} of the engine '{attached.engine}', which wraps the model",
            "an engine that attaches in place",
            "pass it to the trainer as it is: the toolkit's models bring their own reference",
        )
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    frozen = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    return frozen.eval().requires_grad_(False)


def check_bare(model: Any) -> None:
    """Refuse a model that runs with a prompt, where its own function is asked for.

    Raises:
        EngineError: a prompt is attached.
    """
    if hasattr(model, ATTACHED):
        raise EngineError(
            f"a prompt is attached to this {type(model).__name__}",
            "a model without one",
            "call softbridge.detach(model) first",
        )
