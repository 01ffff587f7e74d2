"""litgpt's LLaMA-Adapter: what the releases themselves computed, in `tests/golden/litgpt_*.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import softbridge as sb
from softbridge.errors import CheckpointError, LoweringError
from softbridge.prompt import AdaptionPrompt, SoftPrompt
from softbridge.testing import apart
from softbridge.verification.judge import FLOAT32_BOUND
from softbridge_native.engine import ENGINE as NATIVE

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = "lit_model.pth.adapter"
STEM = "transformer.h.{}.attn."


def golden(release: str) -> tuple[LlamaConfig, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"litgpt_{release}.safetensors", "pt") as stored:
        said = json.loads(stored.metadata()["config"])
        return LlamaConfig(**said), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def base(config: LlamaConfig, tensors: Mapping[str, Tensor]) -> Any:
    model = LlamaForCausalLM(config).double().eval()
    model.load_state_dict({name[5:]: t.double() for name, t in tensors.items() if name.startswith("base.")})
    return model


def written(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.write_bytes(tensors[FILE].numpy().tobytes())
    return path


def logits(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tensors["input_ids"]).logits
    return found


def part_of(prompt: SoftPrompt) -> AdaptionPrompt:
    (part,) = prompt.adaptions
    return part


def test_native_computes_what_litgpt_did(tmp_path: Path) -> None:
    config, tensors = golden("0.5.4")
    prompt = sb.load(written(tmp_path / FILE, tensors), base=config)
    part = part_of(prompt)
    assert (part.joins, list(part.layers), part.length) == ("heads", [1, 2], 3)
    assert {one.gate.shape for one in part.layers.values()} == {(4,)}
    model = base(config, tensors)
    plain = logits(model, tensors)
    assert apart(plain, tensors["plain"]) < FLOAT32_BOUND
    assert apart(logits(NATIVE.attach(model, prompt), tensors), tensors["logits"]) < FLOAT32_BOUND
    NATIVE.detach(model)
    one = part.layers[1]
    faults = {
        "dropped": plain,
        "layers swapped": replace(part, layers={1: part.layers[2], 2: one}),
        "layers shifted by one": replace(part, layers={n - 1: one for n, one in part.layers.items()}),
        "gates in another order": replace(part, layers={**part.layers, 1: replace(one, gate=one.gate[::-1])}),
        "vectors shifted by one place": replace(
            part, layers={**part.layers, 1: replace(one, vectors=np.roll(one.vectors, 1, axis=1))}
        ),
    }
    for name, fault in faults.items():
        wrong = fault
        if isinstance(fault, AdaptionPrompt):
            wrong = logits(NATIVE.attach(model, replace(prompt, parts=(fault,))), tensors)
            NATIVE.detach(model)
        assert apart(wrong, tensors["logits"]) > 0.01, name


def test_later_releases_compute_another_function(tmp_path: Path) -> None:
    """Of the same file and the same base: so a file without a release is refused unless that is accepted."""
    (config, first), (_, later) = golden("0.5.4"), golden("0.5.13")
    assert torch.equal(first[FILE], later[FILE])
    assert apart(later["plain"], first["plain"]) < FLOAT32_BOUND
    assert apart(later["logits"], first["logits"]) > 0.05
    path = written(tmp_path / FILE, later)
    with pytest.raises(LoweringError, match=r"\[partial\] nothing says which release of litgpt trained it"):
        sb.convert(path, tmp_path / "out", to="softbridge", base=config)
    report = sb.convert(path, tmp_path / "out", to="softbridge", base=config, accept=["partial"])
    assert [step.name for step in report.steps] == ["partial"]


def saved(path: Path, state: Mapping[str, Any]) -> Path:
    torch.save(state, path)
    return path


def adapter(first: bool = True, layers: tuple[int, ...] = (1, 2), **changes: Any) -> dict[str, Tensor]:
    shape = (1, 4, 1, 1) if first else (1, 1, 4, 1)
    state = {}
    for layer in layers:
        state[STEM.format(layer) + "adapter_wte.weight"] = torch.arange(48.0).reshape(3, 16) / 7 - layer
        state[STEM.format(layer) + "gating_factor"] = torch.arange(1.0, 5.0).reshape(shape)
    return {**state, **changes}


def test_the_first_releases_gates_say_so(tmp_path: Path) -> None:
    """They are of no later release: nothing is left to accept. To PEFT they cannot go, with a gate for each head."""
    config, _ = golden("0.5.4")
    path = saved(tmp_path / FILE, adapter())
    sb.convert(path, tmp_path / "own", to="softbridge", base=config, verify=True)
    gates = [one.gate.tolist() for one in part_of(sb.load(tmp_path / "own")).layers.values()]
    assert gates == [[1, 2, 3, 4], [1, 2, 3, 4]]
    with pytest.raises(LoweringError, match=r"\[gates\] PEFT has one gate for all heads of a layer, this prompt 4"):
        sb.convert(path, tmp_path / "peft", to="peft", base=config)


def test_in_a_whole_checkpoint(tmp_path: Path) -> None:
    """What is the base model's is named; what the second version trains besides is another function."""
    state = adapter() | {"lm_head.weight": torch.ones(2, 3), STEM.format(1) + "attn.weight": torch.ones(2, 3)}
    prompt = sb.load(saved(tmp_path / "lit_model.pth", {"model": state}))
    assert prompt.origin is not None
    assert "not read: 2 tensors that are not the prompt's (model.lm_head.weight" in prompt.origin.notes[0]
    assert not prompt.origin.partial
    second = state | {STEM.format(1) + "attn.adapter_scale": torch.ones(3)}
    both = sb.load(saved(tmp_path / "second.pth", {"model": second}))
    assert both.parts == prompt.parts
    assert both.origin is not None
    assert both.origin.partial is not None
    assert "v2 trains 1 scales" in both.origin.partial


FILES: dict[str, Callable[[Path], Path]] = {
    "litgpt of a first release": lambda folder: saved(folder / FILE, adapter()),
    "litgpt of a later one": lambda folder: saved(folder / FILE, {"model": adapter(first=False)}),
    "litgpt in a checkpoint": lambda folder: saved(
        folder / "lit_model.pth", {"model": adapter() | {"lm_head.weight": torch.ones(2, 3)}}
    ),
}


BAD: list[tuple[dict[str, Any], str]] = [
    (adapter(layers=(1, 3)), "layers \\[1, 3\\]"),
    (adapter() | {STEM.format(2) + "gating_factor": torch.ones(1, 4)}, "another shape in \\[2\\]"),
    (adapter() | {STEM.format(2) + "adapter_wte.weight": torch.ones(2, 16)}, "\\(2, 16\\), \\(3, 16\\)"),
    (adapter() | {STEM.format(2) + "adapter_wte.weight": torch.ones(3, 16).long()}, "layer 2 has"),
    (adapter() | {STEM.format(3) + "gating_factor": torch.ones(1, 4, 1, 1)}, "layer 3 has {'gating_factor'"),
    ({**adapter(), **{f"again.{name}": tensor for name, tensor in adapter().items()}}, "two tensors"),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_what_is_no_such_adapter(state: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        sb.load(saved(tmp_path / FILE, state))


@pytest.mark.parametrize(
    "state",
    [
        {"transformer.h.1.attn.qkv.weight": torch.ones(2, 3)},
        {STEM.format(1) + "gating_factor": torch.ones(1, 1, 4, 1)},
        {"transformer.h.1.attn.c_attn.lora_A.weight": torch.ones(2, 3)},
    ],
)
def test_what_is_nothing_of_litgpts(state: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(sb.errors.UnknownFormatError):
        sb.load(saved(tmp_path / "other.pth", state))
