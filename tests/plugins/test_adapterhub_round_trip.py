"""PEFT -> AdapterHub -> PEFT: what comes back, and under which conditions, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import LoweringError
from softbridge.geometry import Site
from softbridge.prompt import KeyValuePrefix
from softbridge.testing import random_prefix

P = 5
_SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
_ROWS = {**_SIZES, "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}
_BART = {"vocab_size": 48, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_ROWS, "num_key_value_heads": 2},
    "mistral": {**_ROWS, "num_key_value_heads": 2, "sliding_window": None},
    "gpt2": {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1},
    "bert": _ROWS,
    "roberta": _ROWS,
    "distilbert": {"vocab_size": 48, "dim": 32, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
    "bart": {**_BART, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    "t5": {"vocab_size": 48, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4},
}


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **CONFIGS[family])


def prefix_in(folder: Path, config: Any) -> KeyValuePrefix:
    (part,) = sb.load(folder, base=config).prefixes
    return part


def apart(a: KeyValuePrefix, b: KeyValuePrefix, what: str) -> float:
    return max(float(np.abs(getattr(a.layers[n], what) - getattr(b.layers[n], what)).max()) for n in a.layers)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_rotary_models_prefix_comes_back(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    sb.save(random_prefix(BaseModel(config).geometry, P), tmp_path / "a", format="peft", base=config)
    for source, target, name in (("a", "b", "adapterhub"), ("b", "c", "peft")):
        report = sb.convert(tmp_path / source, tmp_path / target, name, base=config)
        assert "position_ids" not in " ".join(report.advice)
    first, there, back = (prefix_in(tmp_path / name, config) for name in "abc")
    assert apart(first, there, "keys") > 0.1, "AdapterHub's tokens start elsewhere, so its keys are others"
    assert apart(first, there, "values") == 0
    assert apart(first, back, "keys") < 1e-6
    assert apart(first, back, "values") == 0


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_where_positions_are_learned_it_goes_with_consent(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    sb.save(random_prefix(BaseModel(config).geometry, P), tmp_path / "a", format="peft", base=config)
    with pytest.raises(LoweringError) as refused:
        sb.convert(tmp_path / "a", tmp_path / "b", "adapterhub", base=config)
    assert [(obstacle.name, obstacle.acceptable) for obstacle in refused.value.obstacles] == [("positions", True)]
    report = sb.convert(tmp_path / "a", tmp_path / "b", "adapterhub", base=config, accept=["positions"])
    reserved = config.pad_token_id + 1 if family == "roberta" else 0  # rows of its table
    assert any(f"torch.arange(T) + {P + reserved} " in advice for advice in report.advice)
    # The condition travels beside the files, so that the way back needs no consent.
    back_again = sb.convert(tmp_path / "b", tmp_path / "c", "peft", base=config)
    assert "position_ids" not in " ".join(back_again.advice)
    first, there, back = (prefix_in(tmp_path / name, config) for name in "abc")
    for part in (there, back):
        assert apart(first, part, "keys") == apart(first, part, "values") == 0


@pytest.mark.parametrize(
    ("family", "obstacle"), [("distilbert", "positions"), ("bart", "positions"), ("t5", "relative-bias")]
)
def test_where_no_caller_says_positions_it_does_not_go(family: str, obstacle: str, tmp_path: Path) -> None:
    config = config_of(family)
    geometry = BaseModel(config).geometry
    sites: tuple[Site, ...] = ("encoder",) if geometry.decoder is None else ("self",)
    sb.save(random_prefix(geometry, P, sites=sites), tmp_path / "a", format="softbridge", base=config)
    with pytest.raises(LoweringError) as refused:
        sb.convert(tmp_path / "a", tmp_path / "b", "adapterhub", base=config, accept=["positions"])
    assert obstacle in {found.name for found in refused.value.obstacles if not found.acceptable}
