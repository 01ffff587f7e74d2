"""Bases of several parts: what is built of one to compare prompts on, and what is said where nothing can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.base.build import SMALL_FEED_FORWARD, SMALL_VOCABULARY
from softbridge.errors import BaseModelError
from softbridge.testing import random_input_prompt, random_prefix, tiny_config

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "vocab_size": 1030,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
PARTS = {
    "llava": ("llama", "clip_vision_model"),
    "gemma3": ("gemma3_text", "siglip_vision_model"),
    "idefics3": ("llama", "idefics3_vision"),
}


def composite(family: str) -> Any:
    text, vision = PARTS[family]
    return AutoConfig.for_model(
        family,
        text_config={**TEXT, "model_type": text},
        vision_config={**VISION, "model_type": vision},
    )


@pytest.mark.parametrize("family", PARTS)
def test_a_composite_is_run_small_in_all_its_parts(family: str) -> None:
    base = BaseModel(composite(family))
    assert base.geometry.decoder is not None
    model = base.structure(torch.float64)
    assert type(model).__name__.startswith(("Llava", "Gemma3", "Idefics3"))
    text = model.config.get_text_config()
    assert (text.vocab_size, text.intermediate_size) == (SMALL_VOCABULARY, SMALL_FEED_FORWARD)
    assert text.num_hidden_layers == 3, "what a prompt meets stays"
    assert model.config.vision_config.num_hidden_layers == 1
    assert base.config.get_text_config().vocab_size == 1030
    ids = torch.tensor([[5, 9, 17]])
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 3, SMALL_VOCABULARY)
    assert base.positions.kind == "rotary", "of the text model"


@pytest.mark.parametrize("kind", ["prefix", "input"])
def test_a_conversion_for_llava_is_verified(kind: str, tmp_path: Path) -> None:
    base = BaseModel(composite("llava"))
    make = {"prefix": random_prefix, "input": random_input_prompt}[kind]
    sb.save(make(base.geometry), tmp_path / "a", format="peft")
    certificate = sb.convert(tmp_path / "a", tmp_path / "b", "softbridge", base=base, verify=True).certificate
    assert certificate is not None
    assert certificate.verdict == "bitwise"
    assert certificate.effect > 0.1
    other = make(base.geometry, seed=1)
    sb.save(other, tmp_path / "c", format="softbridge", base=base)
    assert sb.verify(tmp_path / "a", tmp_path / "c", base=base).verdict == "different"


def test_what_cannot_be_built_is_refused_in_a_line() -> None:
    config = AutoConfig.for_model("wav2vec2", hidden_size=32, num_attention_heads=4, intermediate_size=40)
    with pytest.raises(BaseModelError) as refused:
        BaseModel(config).structure(torch.float64)
    assert "wav2vec2" in refused.value.found
    assert len(refused.value.found) < 300, "transformers lists all its classes"


def test_a_file_for_causal_models_is_refused_for_what_is_none(tmp_path: Path) -> None:
    sb.save(
        random_prefix(BaseModel(tiny_config("llama")).geometry),
        tmp_path / "a",
        format="peft",
        base=tiny_config("llama"),
    )
    config = AutoConfig.for_model("wav2vec2", hidden_size=32, num_attention_heads=4, intermediate_size=40)
    with pytest.raises(BaseModelError, match="has none of the base model's type 'wav2vec2'"):
        sb.load(tmp_path / "a", base=config)
    with pytest.raises(BaseModelError, match="a 'bert', is one only if its configuration says is_decoder"):
        sb.load(tmp_path / "a", base=tiny_config("bert"))
