"""Whatever goes wrong while a prompt is attached, at whichever step: the model is then bit for bit as it was.

A fault is put into one call after the other that attaching makes, in Python code of softbridge and of the toolkits, and
of what they call in transformers and torch. After each the model is looked at: classes, attributes, submodules, hooks,
configurations, what is frozen, and every number. In the long profile that is every call; by default a few, spread
evenly.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.errors import EngineError
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.plugin.registry import engines
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_adaption, random_input_prompt, random_prefix, tiny_config

ENGINES = [name for name, engine in engines().items() if engine.unavailable() is None]
LONG = os.environ.get("SOFTBRIDGE_PROFILE") == "long"
#: So many steps of each case by default.
FEW = 20
OURS = ("softbridge", "softbridge_native", "softbridge_peft", "softbridge_adapterhub", "peft", "adapters")
THEIRS = ("transformers", "torch")


#: A call: the package and the code of a function that is called, and the how manieth call of it this is.
Step = tuple[tuple[str, CodeType], int]


class Fault(BaseException):
    """What is put in. Like an interrupt from the keyboard, no code catches it on purpose."""


def model_of(task: str) -> Any:
    """Half of it frozen and in the middle of training, so that there is something to be put back."""
    config = tiny_config("gpt2" if task != "adaption" else "llama", num_labels=3)
    model = build(config, "sequence-classification" if task == "headed" else "causal-lm", torch.float32, 0)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    model.get_input_embeddings().config = None  # as a layer of Seamless M4T has
    next(model.modules()).register_forward_pre_hook(lambda module, args: None)
    return model


def prompt_of(kind: str, task: str, model: Any) -> SoftPrompt | PromptBank:
    geometry = BaseModel.resolve(model).geometry
    if kind == "bank":
        return PromptBank({"a": random_prefix(geometry)})
    made: dict[str, Callable[..., SoftPrompt]] = {
        "prompt": random_input_prompt,
        "prefix": random_prefix,
        "adaption": random_adaption,
    }
    prompt = made[kind](geometry)
    if task != "headed":
        return prompt
    weight = np.random.default_rng(0).normal(0, 1, (3, geometry.hidden)).astype(np.float32)
    return replace(prompt, head={"score.weight": weight})


def state(model: Any) -> list[Any]:
    """All that can be seen of a model, down to which objects it is made of."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None), getattr(module, "generation_config", None)):
            if holder is not None:
                seen[id(holder)] = holder
    found = [(id(holder), type(holder), _shown(vars(holder))) for holder in seen.values()]
    parameters = [(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return [found, parameters]


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return [(name, _shown(one)) for name, one in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [_shown(one) for one in value]
    return value if isinstance(value, (str, int, float, type(None))) else id(value)


def steps(attach: Callable[[], Any]) -> Iterator[Step]:
    """The calls that attaching makes: what is called from where, and the how manieth of these it is."""
    calls: dict[tuple[str, CodeType], int] = {}

    def look(frame: FrameType, event: str, argument: Any) -> None:
        key = key_of(frame)
        if key is not None:
            calls[key] = calls.get(key, 0) + 1

    sys.settrace(look)
    try:
        running = attach()
    finally:
        sys.settrace(None)
    sb.detach(running)
    for key, count in calls.items():
        yield from ((key, number) for number in range(1, (count if LONG and key[0] in OURS else 1) + 1))


def key_of(frame: FrameType) -> tuple[str, CodeType] | None:
    package, code = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code
    # What the interpreter calls when it throws something away may not raise: a generator is closed then.
    thrown = code.co_name == "__del__" or bool(code.co_flags & inspect.CO_GENERATOR)
    if package not in (*OURS, *THEIRS) or thrown or frame.f_back is None:
        return None
    # A mode of torch would stay what it was within, for ever, and AdapterHub in the call that it was in.
    if package in (*THEIRS, "adapters") and "__exit__" in (code.co_name, frame.f_back.f_code.co_name):
        return None
    # Of torch and transformers, only what softbridge and the toolkits call themselves.
    caller = frame.f_back.f_globals.get("__name__", "").partition(".")[0]
    if package in THEIRS and caller not in OURS:
        return None
    return (package, code)


def raising(step: Step) -> Callable[[FrameType, str, Any], None]:
    wanted, number = step
    met = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal met
        if frame.f_code is wanted[1] and key_of(frame) == wanted:
            met += 1
            if met == number:
                raise Fault

    return look


def left_open() -> list[Any]:
    """What AdapterHub takes for the calls that run, of which there are none."""
    if "adapters" not in sys.modules:
        return []
    from adapters.context import AdapterSetup, ForwardContext

    return [*AdapterSetup.get_contexts(), *ForwardContext.get_contexts()]


CASES = [
    (engine, kind, task)
    for engine in ENGINES
    for kind, task, always in (
        ("prompt", "causal-lm", True),
        ("prefix", "headed", True),
        ("prefix", "causal-lm", False),
        ("prompt", "headed", False),
        ("adaption", "adaption", engine == "native"),
        ("bank", "causal-lm", engine == "native"),
    )
    if always or (LONG and (engine == "peft" or kind not in ("adaption", "bank")) and kind != "bank")
]


@pytest.mark.parametrize(("engine", "kind", "task"), CASES)
def test_a_model_is_as_it_was(engine: str, kind: str, task: str) -> None:
    model = model_of(task)
    prompt = prompt_of(kind, task, model)

    def attach() -> Any:
        return sb.attach(model, prompt, engine=engine, self_check=True)

    try:
        sb.detach(attach())  # what is found out once is known, and what is imported is there
    except EngineError as error:
        if "adapterhub" in ENGINES:  # where every toolkit is, each runs what it is asked to here
            raise
        pytest.skip(f"refused on this stack: {error.found}")
    before, numbers = state(model), {name: array.clone() for name, array in model.state_dict().items()}
    taken = list(steps(attach))
    assert len(taken) > 100
    taken = taken if LONG else taken[:: len(taken) // FEW]
    raised = 0
    for step in taken:
        sys.settrace(raising(step))
        try:
            running = attach()
        except Fault:
            raised += 1
        else:  # not met again, since something is known by now
            sys.settrace(None)
            sb.detach(running)
        finally:
            sys.settrace(None)
        assert torch.is_grad_enabled(), step
        assert state(model) == before, step
        for name, array in model.state_dict().items():
            assert torch.equal(array, numbers[name]), (name, step)
    assert raised > 0.9 * len(taken)
    assert not left_open()
    print(f"{engine} {kind} {task}: {raised} of {len(taken)} faults were raised")
