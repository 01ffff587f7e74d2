"""Layers with key/value heads of different number and size (Gemma 4) in the native engine, against a seeded cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from softbridge.base import build
from softbridge.base import cache as caches
from softbridge.geometry import read_geometry
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix
from softbridge_native.engine import ENGINE

P, T = 5, 9
FAR = 0.1

if "gemma4_text" not in CONFIG_MAPPING_NAMES:
    pytest.skip("transformers here has no Gemma 4", allow_module_level=True)


def gemma(**changes: Any) -> Any:
    """Two layers with a window of 6 and two without, of other heads."""
    settings = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 12}
    settings |= {"num_global_key_value_heads": 1, "sliding_window": 6, "max_position_embeddings": 128}
    settings |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0}
    settings |= {"vocab_size_per_layer_input": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("gemma4_text", **{**settings, **changes})
    return build(config, "causal-lm", torch.float64, 0)


def attached(model: Any, prompt: SoftPrompt) -> Any:
    return ENGINE.attach(copy.deepcopy(model), prompt)


def tokens() -> Tensor:
    return torch.randint(3, 96, (2, T), generator=torch.Generator().manual_seed(0))


def seeded(model: Any, prompt: SoftPrompt, layers: int) -> Tensor:
    """Logits with the prefix in the model's own cache, of the layers that have one."""
    cache = DynamicCache(config=model.config)
    for layer, pair in prompt.prefixes[0].layers.items():
        if layer < layers:
            keys, values = (torch.tensor(half).double().expand(2, -1, -1, -1) for half in (pair.keys, pair.values))
            cache.update(keys, values, layer)
    mask = torch.ones(2, P + T, dtype=torch.long)
    found: Tensor = model(tokens(), attention_mask=mask, **caches.handed(model.forward, cache)).logits
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("one_head", [False, True])
def test_is_a_seeded_cache(one_head: bool, implementation: str) -> None:
    """Heads of two sizes, and of two numbers where full layers take their values from their keys.

    The same calls on the same shapes.
    """
    model = gemma(attention_k_eq_v=one_head)
    model.set_attn_implementation(implementation)
    prompt = random_prefix(read_geometry(model.config), P)
    shapes = {layer: pair.keys.shape for layer, pair in prompt.prefixes[0].layers.items()}
    assert shapes[1] == ((1 if one_head else 2), P, 12)
    assert shapes[0] == shapes[2] == (2, P, 8)
    ours = attached(model, prompt)
    assert ENGINE.extract(ours) is prompt
    layers = dict(prompt.prefixes[0].layers)
    some = SoftPrompt((KeyValuePrefix("self", {n: layers[n] for n in (0, 2, 3)}),), prompt.positions)
    with torch.no_grad():
        expected = seeded(model, prompt, 4)
        assert torch.equal(ours(tokens()).logits, expected)
        assert difference(model(tokens()).logits, expected) > FAR
        assert difference(attached(model, some)(tokens()).logits, expected) > FAR
        mask = torch.ones(2, T, dtype=torch.long)
        mask[1, 6:] = 0
        alone = ours(tokens()[1:, :6]).logits[0]
        assert apart(ours(tokens(), attention_mask=mask).logits[1, :6], alone) <= agreement(model)


def test_cached_is_uncached() -> None:
    model = gemma()
    model.generation_config.eos_token_id = None
    ours = attached(model, random_prefix(read_geometry(model.config), P))
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings["attention_mask"] = torch.ones_like(tokens())
    cached, uncached = (ours.generate(tokens(), use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(uncached.logits)) <= agreement(model)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layers_that_share_keys_share_their_prefix(implementation: str) -> None:
    """The last two layers attend to keys that earlier ones computed, and so to the prefix that joined them there, as a
    seeded cache hands it on. Numbers of their own are in nobody's way."""
    model = gemma(num_kv_shared_layers=2, hidden_size_per_layer_input=8)
    model.set_attn_implementation(implementation)
    own = random_prefix(read_geometry(model.config), P)
    layers = own.prefixes[0].layers
    repeated = SoftPrompt((KeyValuePrefix("self", {**layers, 2: layers[0], 3: layers[1]}),), own.positions)
    with torch.no_grad():
        expected = seeded(model, own, 2)
        assert torch.equal(attached(model, repeated)(tokens()).logits, expected)
        assert torch.equal(attached(model, own)(tokens()).logits, expected)
        swapped = KeyValue(layers[0].values, layers[0].keys)
        wrong = SoftPrompt((KeyValuePrefix("self", {**layers, 0: swapped}),), own.positions)
        assert difference(attached(model, wrong)(tokens()).logits, expected) > FAR
        # The last states alone: those layers are then asked for the last queries alone.
        for some in ((0, 1, 2, 3), (0,)):
            prompt = SoftPrompt((KeyValuePrefix("self", {n: layers[n] for n in some}),), own.positions)
            ours = attached(model, prompt)
            last, whole = ours(tokens(), logits_to_keep=3).logits, ours(tokens()).logits[:, -3:]
            assert apart(last, whole) <= agreement(model), some


def test_no_input_prompt_where_embeddings_are_looked_up() -> None:
    """Without token ids transformers finds them in the embeddings, or fails."""
    model = gemma(hidden_size_per_layer_input=8)
    prompt = random_input_prompt(read_geometry(model.config), P)
    (obstacle,) = ENGINE.obstacles(prompt, model)
    assert obstacle.name == "entry"
    assert "a vector is of no" in obstacle.reason
    assert ENGINE.obstacles(prompt, gemma()) == []
    with pytest.raises(RuntimeError, match="exact"):
        model(inputs_embeds=torch.randn(1, 3, 32, dtype=torch.float64))
