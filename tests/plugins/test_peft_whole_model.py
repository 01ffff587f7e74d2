"""The state of a whole PeftModel, as accelerate and FSDP save it, is read as what PEFT itself would have saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import CheckpointError, UnknownFormatError
from softbridge.testing import tiny_config, tiny_model

peft = pytest.importorskip("peft")

P = 4
METHODS: dict[str, Any] = {
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P),
    "mlp": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=P, encoder_hidden_size=12),
    "lstm": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=P, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P),
    "projected": lambda task: peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=12
    ),
    "multitask": lambda task: peft.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=P, num_tasks=2),
}


def made(method: str, family: str = "llama") -> Any:
    task = "CAUSAL_LM" if family == "llama" else "SEQ_CLS"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(family, torch.float32), METHODS[method](task))
        for parameter in model.prompt_encoder.parameters():
            parameter.data.normal_(0, 0.5)
    return model.eval()


def state(model: Any, file: Path) -> None:
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model_fsdp.bin"])
@pytest.mark.parametrize("method", METHODS)
def test_it_is_what_peft_would_have_saved(method: str, file: str, tmp_path: Path) -> None:
    model, config = made(method), tiny_config("llama")
    model.save_pretrained(tmp_path / "own")
    state(model, tmp_path / "whole" / file)
    settings = copy.deepcopy(model.peft_config["default"])
    settings.save_pretrained(tmp_path / "whole")
    found, own = sb.load(tmp_path / "whole", base=config), sb.load(tmp_path / "own", base=config)
    assert found.parts == own.parts
    assert found.positions == own.positions
    assert (found.training is not None) == (method not in ("prompt", "prefix"))
    other = made(method)
    next(iter(other.prompt_encoder.parameters())).data.add_(0.1)
    state(other, tmp_path / "whole" / file)
    assert sb.load(tmp_path / "whole", base=config).parts != own.parts


@pytest.mark.filterwarnings("ignore")
def test_the_head_comes_along(tmp_path: Path) -> None:
    model, config = made("prompt", "bert"), tiny_config("bert")
    model.save_pretrained(tmp_path / "own")
    state(model, tmp_path / "whole" / "model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path / "whole")
    found, own = sb.load(tmp_path / "whole", base=config), sb.load(tmp_path / "own", base=config)
    assert own.head
    assert found == own or (found.parts, found.head.keys()) == (own.parts, own.head.keys())
    assert all((found.head[name] == own.head[name]).all() for name in own.head)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    model = made("prompt")
    state(model, tmp_path / "alone" / "model.safetensors")
    for path in (tmp_path / "alone", tmp_path / "alone" / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"whole PeftModel(.|\n)*adapter_config.json beside it"):
            sb.load(path, base=tiny_config("llama"))
    base = tiny_model("llama", torch.float32)
    save_file({n: t.clone().contiguous() for n, t in base.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownFormatError):
        sb.load(tmp_path / "model.safetensors", base=BaseModel(tiny_config("llama")))
