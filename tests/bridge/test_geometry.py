"""The geometry read from a configuration is that of the model which transformers builds from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from softbridge.base import BaseModel, build
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError
from softbridge.geometry import Geometry, StackGeometry, read_geometry
from softbridge.testing import tiny_config

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 2}

#: Decoder-only families, and what distinguishes their attention: (changes, kv heads, head size).
DECODERS: dict[str, tuple[dict[str, Any], int, int]] = {
    "gpt2": ({}, 4, 12),
    "opt": ({"ffn_dim": 40, "word_embed_proj_dim": 48}, 4, 12),
    "gpt_bigcode": ({"multi_query": True}, 1, 12),
    "gpt_neo": ({"num_layers": 3, "attention_types": [[["global"], 3]], "num_heads": 4}, 4, 12),
    "bloom": ({"n_head": 4, "n_layer": 3}, 4, 12),
    "falcon": ({"multi_query": True, "new_decoder_architecture": False}, 1, 12),
    "llama": (GQA, 2, 12),
    "mistral": ({**GQA, "head_dim": 8}, 2, 8),
    "qwen2": (GQA, 2, 12),
    "qwen3": ({**GQA, "head_dim": 8}, 2, 8),
    "gemma": ({**GQA, "head_dim": 16}, 2, 16),
    "gemma3_text": ({**GQA, "head_dim": 16}, 2, 16),
    "phi": ({}, 4, 12),
    "phi3": (GQA, 2, 12),
    "gpt_neox": ({}, 4, 12),
    "cohere": (GQA, 2, 12),
    "olmo2": (GQA, 2, 12),
}

ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "xlm-roberta")


def config_of(family: str, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**SIZES, **changes})


# transformers 4 compiles parts of GPT-BigCode with a compiler that torch is about to drop.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", DECODERS)
def test_decoders_have_the_cache_that_the_geometry_says(family: str) -> None:
    changes, kv_heads, head_dim = DECODERS[family]
    config = config_of(family, changes)
    geometry = read_geometry(config)
    assert geometry.encoder is None
    assert geometry.decoder is not None
    model = build(config, "causal-lm", torch.float32, 0)
    with torch.no_grad():
        cache = caches.of(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True))
    cache = getattr(cache, "self_attention_cache", cache)
    shapes = {tuple(layer.keys.shape[1:]) for layer in cache.layers}
    assert shapes == {(kv_heads, 3, head_dim)}
    assert (geometry.decoder.kv_heads, geometry.decoder.head_dim) == (kv_heads, head_dim)
    assert len(cache.layers) == geometry.decoder.layers == 3
    assert model.get_input_embeddings().weight.shape == (geometry.vocabulary, geometry.hidden)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_are_told_from_decoders(family: str) -> None:
    geometry = read_geometry(config_of(family, {}))
    assert geometry.decoder is None
    assert geometry.encoder == StackGeometry(3, 4, 4, 12)
    assert BaseModel(config_of(family, {})).task == "sequence-classification"


def test_a_bert_that_decodes_is_a_decoder() -> None:
    geometry = read_geometry(config_of("bert", {"is_decoder": True}))
    assert geometry.encoder is None
    assert geometry.decoder == StackGeometry(3, 4, 4, 12)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_t5_has_a_head_size_of_its_own_and_two_depths(family: str) -> None:
    changes = {"d_model": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 5, "d_ff": 40}
    from transformers import AutoConfig

    geometry = read_geometry(AutoConfig.for_model(family, vocab_size=96, **changes))
    assert geometry == Geometry(family, 24, 96, StackGeometry(2, 4, 4, 8), StackGeometry(5, 4, 4, 8))
    assert geometry.site("cross") == geometry.decoder
    assert geometry.is_encoder_decoder


def test_bart_has_its_numbers_by_stack() -> None:
    from transformers import AutoConfig

    changes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 6}
    geometry = read_geometry(AutoConfig.for_model("bart", vocab_size=96, d_model=48, **changes))
    assert geometry.encoder == StackGeometry(2, 4, 4, 12)
    assert geometry.decoder == StackGeometry(3, 6, 6, 8)


def test_windows_are_read_where_they_are_in_use() -> None:
    assert read_geometry(config_of("mistral", {"sliding_window": 16})).decoder.window == 16  # type: ignore[union-attr]
    off = {"sliding_window": 16, "use_sliding_window": False}
    assert read_geometry(config_of("qwen2", off)).decoder.window is None  # type: ignore[union-attr]


def test_a_configuration_without_the_numbers_is_refused_by_name() -> None:
    class Odd:
        model_type = "odd"
        hidden_size = 48

    with pytest.raises(BaseModelError, match="configuration of odd has none of vocab_size"):
        read_geometry(Odd())
    with pytest.raises(BaseModelError, match="no multiple of 5 heads"):
        read_geometry(config_of("gpt2", {"num_attention_heads": 5}))


def test_what_is_no_base_model_is_refused() -> None:
    with pytest.raises(BaseModelError, match="given as int"):
        BaseModel.resolve(3)
    base = BaseModel(tiny_config("gpt2"))
    assert BaseModel.resolve(base) is base


def test_the_width_of_the_input_is_the_embeddings_own() -> None:
    for family in ("electra", "albert"):
        geometry = read_geometry(config_of(family, {"embedding_size": 16}))
        assert (geometry.hidden, geometry.input_width) == (48, 16)
        model = build(config_of(family, {"embedding_size": 16}), "sequence-classification", torch.float32, 0)
        assert model.get_input_embeddings().weight.shape == (96, geometry.input_width)
    assert read_geometry(config_of("bert", {})).input_width == 48


def test_mobilebert_attends_in_a_bottleneck() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("mobilebert", hidden_size=64, intra_bottleneck_size=32, vocab_size=96)
    assert read_geometry(config).encoder.head_dim == 8  # type: ignore[union-attr]


def test_falcons_new_architecture_has_several_key_value_heads() -> None:
    changes = {"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}
    assert read_geometry(config_of("falcon", changes)).decoder.kv_heads == 2  # type: ignore[union-attr]


def test_an_encoder_with_a_causal_class_is_an_encoder() -> None:
    assert read_geometry(config_of("bert-generation", {})).decoder is None
    assert read_geometry(config_of("bert-generation", {"is_decoder": True})).encoder is None
