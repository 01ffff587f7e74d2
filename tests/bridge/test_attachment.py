"""attach, extract, detach: one word switches the engine, and the model comes back as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, EngineError, SoftbridgeError
from softbridge.plugin.registry import engines
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import agreement, random_input_prompt, random_prefix, tiny_config, tiny_model

USABLE = [name for name, engine in engines().items() if engine.unavailable() is None]
IDS = torch.tensor([[5, 9, 17, 33, 21]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


def prefix(family: str, start: int | None = None) -> SoftPrompt:
    prompt = random_prefix(BaseModel(tiny_config(family)).geometry)
    if start is None:
        return prompt
    return replace(prompt, positions=Positions(dict.fromkeys(prompt.positions.start, start)))


@pytest.mark.parametrize("name", USABLE)
@pytest.mark.parametrize("start", [5, 0])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_engines_agree_and_leave_nothing_behind(family: str, start: int, name: str) -> None:
    prompt = prefix(family, start)
    model = tiny_model(family)
    bare, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    kind, attention = type(model), model.config._attn_implementation
    reference = logits(sb.attach(tiny_model(family), prompt))
    running = sb.attach(model, prompt, engine=name)
    bound = agreement(tiny_model(family))
    assert (logits(running) - reference).abs().max() <= bound * reference.abs().max()
    assert (reference - bare).abs().max() > 0.1
    other = logits(sb.attach(tiny_model(family), prefix(family, 5 - start)))
    assert (other - reference).abs().max() > 0.1, "where the tokens stand matters"

    assert sb.extract(running).parts[0].length == 5
    again = sb.detach(running)
    assert again is model
    assert type(again) is kind
    assert again.config._attn_implementation == attention
    assert torch.equal(logits(again), bare)
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in again.state_dict().items())


def test_what_is_attached_can_be_extracted() -> None:
    prompt = prefix("gpt2")
    assert sb.extract(sb.attach(tiny_model("gpt2"), prompt)) == prompt


@pytest.mark.parametrize("name", [name for name in USABLE if name != "adapterhub"])
def test_a_head_rides_along_and_is_taken_back(name: str) -> None:
    model = tiny_model("bert")
    bare = logits(model)
    weight = np.random.default_rng(0).normal(0, 1, (5, 32))
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    with_head = replace(prompt, head={"classifier.weight": weight})
    headless = logits(sb.attach(copy.deepcopy(model), prompt, engine=name))
    running = sb.attach(model, with_head, engine=name)
    found = logits(running)
    assert (found - headless).abs().max() > 0.1
    expected = logits(sb.attach(tiny_model("bert"), with_head))
    assert torch.equal(found, expected)
    assert np.array_equal(sb.extract(running).head["classifier.weight"], weight)
    assert torch.equal(logits(sb.detach(running)), bare)


def test_a_head_that_does_not_fit_changes_nothing() -> None:
    model = tiny_model("bert")
    bare = logits(model)
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    wrong = replace(prompt, head={"classifier.weight": np.ones((3, 32)), "score.weight": np.ones(2)})
    with pytest.raises(BaseModelError, match=r"classifier\.weight \[3, 32\] \(the model's is \[5, 32\]\)(.|\n)*score"):
        sb.attach(model, wrong)
    assert torch.equal(logits(model), bare)
    assert sb.attach(model, prompt) is model


def test_mistakes_have_answers() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(EngineError, match=r"no prompt is attached(.|\n)*call softbridge.attach"):
        sb.detach(model)
    with pytest.raises(EngineError, match="no engine is called 'vllm'"):
        sb.attach(model, prefix("gpt2"), engine="vllm")
    with pytest.raises(BaseModelError, match="does not fit"):
        sb.attach(model, prefix("llama"))
    sb.attach(model, prefix("gpt2"))
    with pytest.raises(EngineError, match="attached already"):
        sb.attach(model, prefix("gpt2"))


@pytest.mark.parametrize("name", [name for name in USABLE if name != "adapterhub"])
def test_a_trained_head_is_extracted_as_it_is_now(name: str) -> None:
    model = tiny_model("bert")
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    weight = np.random.default_rng(0).normal(0, 1, (5, 32))
    running = sb.attach(model, replace(prompt, head={"classifier.weight": weight}), engine=name)
    with torch.no_grad():
        for key, parameter in running.named_parameters():
            if "classifier" in key and key.endswith("weight"):
                parameter.fill_(9.0)
    assert np.array_equal(sb.extract(running).head["classifier.weight"], np.full((5, 32), 9.0))


def test_a_refused_attachment_leaves_the_model_alone() -> None:
    model = tiny_model("gpt2")
    bare = logits(model)
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    impossible = replace(
        prompt, parts=(replace(prompt.inputs[0], entry="after"),), head={"transformer.ln_f.bias": np.ones(32)}
    )
    with pytest.raises(SoftbridgeError):
        sb.attach(model, impossible)
    assert torch.equal(logits(model), bare)
