"""PEFT's prefixes for models whose layers differ, or attend to each other's keys: read as PEFT itself runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.errors import LoweringError
from softbridge.plugin.registry import engines
from softbridge.prompt import KeyValuePrefix, SoftPrompt

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Prefix tuning injected")
if "gemma4_text" not in CONFIG_MAPPING_NAMES:
    pytest.skip("transformers here has no Gemma 4", allow_module_level=True)

P = 5
IDS = torch.tensor([[5, 9, 17, 33, 21]])
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "num_global_key_value_heads": 1,
    "sliding_window": 6,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Changes of the model. PEFT provisions for its widest heads, of which "fewer" has one where other layers have two.
CASES: dict[str, dict[str, Any]] = {
    "wider": {},
    "fewer": {"attention_k_eq_v": True},
    "shared": {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
}


def trained(case: str, folder: Path) -> tuple[Any, torch.Tensor]:
    """A file that PEFT wrote, with the base it is for, and what PEFT computes with it."""
    config = AutoConfig.for_model("gemma4_text", **{**SIZES, **CASES[case]})
    settings = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    made = peft.get_peft_model(build(config, "causal-lm", torch.float64, 0), settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.prompt_encoder["default"].embedding.weight.data.normal_(0, 0.8)
    made.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(build(config, "causal-lm", torch.float64, 0), folder).eval()
    with torch.no_grad():
        return config, loaded(input_ids=IDS).logits


def logits(config: Any, prompt: SoftPrompt, engine: str = "native") -> torch.Tensor:
    model = sb.attach(build(config, "causal-lm", torch.float64, 0), prompt, engine=engine)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_it_is_read_as_peft_runs_it(case: str, tmp_path: Path) -> None:
    config, expected = trained(case, tmp_path / "a")
    prompt = sb.load(tmp_path / "a", base=config)
    (part,) = prompt.prefixes
    assert prompt.origin is not None
    notes = " ".join(prompt.origin.notes)
    assert ("uses the first" in notes, "no prefix: so PEFT" in notes, "of earlier ones" in notes) == (
        True,
        case == "fewer",
        case == "shared",
    )
    assert prompt.positions.start == {"decoder": 0 if case == "fewer" else P}
    assert list(part.layers) == ([1, 3] if case == "fewer" else [0, 1, 2, 3])
    assert apart(logits(config, prompt), expected) < 1e-6  # Gemma's norms and rotary tables are float32
    # The same numbers otherwise dealt out, and a layer less, are noticed.
    layers = {n: replace(pair, keys=pair.keys[::-1, :, ::-1]) for n, pair in part.layers.items()}
    assert apart(logits(config, replace(prompt, parts=(KeyValuePrefix("self", layers),))), expected) > 0.05
    fewer = {n: pair for n, pair in part.layers.items() if n != 1}
    assert apart(logits(config, replace(prompt, parts=(KeyValuePrefix("self", fewer),))), expected) > 0.05


@pytest.mark.parametrize("case", ["wider", "shared"])
def test_it_is_written_for_peft_again(case: str, tmp_path: Path) -> None:
    config, expected = trained(case, tmp_path / "a")
    report = sb.convert(tmp_path / "a", tmp_path / "b", "softbridge", base=config)
    prompt = report.lowering.prompt
    assert engines()["peft"].obstacles(prompt, build(config, "causal-lm", torch.float64, 0)) == []
    assert apart(logits(config, prompt, "peft"), expected) < 1e-12
    sb.convert(tmp_path / "b", tmp_path / "c", "peft", base=config)
    assert sb.load(tmp_path / "c", base=config).parts == prompt.parts
    loaded = peft.PeftModel.from_pretrained(build(config, "causal-lm", torch.float64, 0), tmp_path / "c").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    if case == "shared":
        other = {**prompt.prefixes[0].layers}
        other[3] = replace(other[3], values=-other[3].values)
        changed = replace(prompt, parts=(KeyValuePrefix("self", other),))
        with pytest.raises(LoweringError, match=r"\[shared-layers\] layers \[3\]"):
            sb.save(changed, tmp_path / "d", format="peft", base=config)


def test_sources_are_read_of_the_configuration() -> None:
    config = AutoConfig.for_model("gemma4_text", **{**SIZES, **CASES["shared"]})
    stack = BaseModel(config).geometry.decoder
    assert stack is not None
    assert stack.sources == (0, 1, 0, 1)
