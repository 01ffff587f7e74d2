"""An engine that cannot run a prompt here names those that do, and those it names do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.errors import EngineError, SoftbridgeError
from softbridge.methods import MultitaskPromptTuning, rematerialise
from softbridge.plugin.registry import engines
from softbridge.prompt import Positions, Training
from softbridge.testing import TINY, random_input_prompt, random_prefix, tiny_config, tiny_model

IDS = torch.tensor([[5, 9, 17, 33, 21]])
SIZES: dict[str, dict[str, Any]] = {
    "bert": TINY["bert"],
    "roberta": {**TINY["bert"], "pad_token_id": 1},
    "distilbert": {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "t5": {**TINY["t5"], "decoder_start_token_id": 0},
    "gpt2": TINY["gpt2"],
}


def base_of(family: str) -> BaseModel:
    return BaseModel(AutoConfig.for_model(family, **SIZES[family]))


def model_of(base: BaseModel) -> Any:
    return build(base.config, base.task, torch.float64, 0)


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **more).logits
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", [name for name, one in engines().items() if one.unavailable() is None])
@pytest.mark.parametrize("family", SIZES)
def test_a_refusal_names_the_engines_that_run_it(family: str, engine: str) -> None:
    """BERT, RoBERTa, DistilBERT and T5 do not dispatch on transformers 4; each toolkit has its own refusals."""
    base = base_of(family)
    counted = random_prefix(base.geometry)
    stack = next(iter(counted.positions.start))
    for start in (5, 0):
        for bias in ("plain", "skewed"):
            prompt = sb.SoftPrompt(counted.parts, Positions({stack: start}, bias), counted.base)
            try:
                sb.attach(model_of(base), prompt, engine=engine)
            except EngineError as error:
                named = set(re.findall(r"engine='(\w+)'", error.remedy.partition(", which runs it here")[0]))
                named = named if ", which runs it here" in error.remedy else set()
            except SoftbridgeError:
                continue  # it cannot be expressed there at all
            else:
                continue
            able = set()
            for other in engines().keys() - {engine}:
                if engines()[other].unavailable() is None:
                    try:
                        running = sb.attach(model_of(base), prompt, engine=other)
                    except SoftbridgeError:
                        continue
                    assert float((logits(running) - logits(model_of(base))).abs().max()) > 0.01
                    able.add(other)
            assert named == able


def test_a_model_that_is_taken_has_no_way_out_in_another_engine() -> None:
    model, prompt = tiny_model("gpt2"), random_input_prompt(BaseModel(tiny_config("gpt2")).geometry)
    sb.attach(model, prompt)
    with pytest.raises(EngineError) as refused:
        sb.attach(model, prompt)
    assert "which runs it here" not in str(refused.value)


def test_a_task_is_taken_alone(tmp_path: Path) -> None:
    base = BaseModel(tiny_config("gpt2"))
    method = MultitaskPromptTuning(3, length=4)
    prompt = method.initialise(base.geometry, 0)
    tensors = dict(prompt.training.tensors) if prompt.training is not None else {}
    assert tensors
    for name in ("columns", "rows"):
        tensors[name] = tensors[name] * 40  # far from each other
    prompt = sb.SoftPrompt(
        prompt.parts, prompt.positions, prompt.base, training=Training("multitask", {"task": 0}, tensors)
    )
    prompt = rematerialise(prompt, 0)
    sb.save(prompt, tmp_path / "p", format="softbridge", base=base)
    found = []
    for task in range(3):
        alone = sb.load(tmp_path / "p", task=task)
        assert alone.training is None
        assert alone.parts == rematerialise(prompt, task).parts
        outputs = [logits(sb.attach(tiny_model("gpt2"), given, task=task)) for given in (prompt, tmp_path / "p")]
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], logits(sb.attach(tiny_model("gpt2"), alone)))
        found.append(outputs[0])
    assert all(float((found[a] - found[b]).abs().max()) > 0.1 for a, b in ((0, 1), (1, 2), (0, 2)))
    for call in (lambda: sb.load(tmp_path / "p", task=3), lambda: sb.attach(tiny_model("gpt2"), prompt, task=-1)):
        with pytest.raises(SoftbridgeError, match="task"):
            call()
    single = random_input_prompt(base.geometry)
    with pytest.raises(SoftbridgeError, match="task"):
        sb.attach(tiny_model("gpt2"), single, task=0)
