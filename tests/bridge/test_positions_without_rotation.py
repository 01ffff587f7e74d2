"""Positions that are neither rotated into keys nor added: none at all, and ALiBi. What moving a prefix comes to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.base import cache as caches
from softbridge.errors import LoweringError
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import random_prefix

SMALL = {"vocab_size": 96, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNCOUNTED = Capabilities(prefix_sites=frozenset({"self"}), prefix_start="zero")


def without_positions() -> Any:
    """SmolLM3 with the rotation left out of every layer."""
    sizes = {"intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("smollm3", **SMALL, **sizes, no_rope_layers=[0] * 3, max_position_embeddings=128)


def logits(config: Any, prompt: SoftPrompt | None) -> torch.Tensor:
    """Of one text, in float64."""
    model = build(config, "causal-lm", torch.float64, 0)
    tokens = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(0))
    running = model if prompt is None else sb.attach(model, prompt)
    with torch.no_grad():
        return running(input_ids=tokens).logits  # type: ignore[no-any-return]


def test_without_positions_every_frame_is_the_same() -> None:
    base = BaseModel(without_positions())
    assert base.positions.kind == "none"
    prompt = random_prefix(base.geometry)
    lowering = lower(prompt, Target("t", UNCOUNTED, base))
    assert [(step.name, step.exactness) for step in lowering.steps] == [("positions", "exact")]
    assert lowering.prompt.parts == prompt.parts
    counted, uncounted = (logits(without_positions(), one) for one in (prompt, lowering.prompt))
    assert torch.equal(counted, uncounted)
    assert float((logits(without_positions(), None) - counted).abs().max()) > 0.1, "the prompt has an effect"


def test_under_alibi_nothing_is_moved() -> None:
    """The bias is the model's own affair: BLOOM takes no position_ids, and its scheme is not guessed."""
    config = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=96)
    base = BaseModel(config)
    assert base.positions.kind == "unknown"
    assert base.positions.reason
    prompt = random_prefix(base.geometry)
    with pytest.raises(LoweringError) as refused:
        lower(prompt, Target("t", UNCOUNTED, base), accept=["positions"])
    assert {obstacle.name: obstacle.acceptable for obstacle in refused.value.obstacles} == {"positions": False}
    assert lower(prompt, Target("t", replace(UNCOUNTED, prefix_start="counted"), base)).prompt == prompt
    elsewhere = replace(prompt, positions=Positions({"decoder": 0}))
    assert lower(elsewhere, Target("t", UNCOUNTED, base)).prompt == elsewhere


def test_no_caller_moves_tokens_under_alibi() -> None:
    """So that the refusal is right: BLOOM counts the slots that it sees, and hidden ones do not move the text."""
    from transformers import DynamicCache

    config = AutoConfig.for_model("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=96)
    model = build(config, "causal-lm", torch.float64, 0)
    tokens = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = caches.of(model(input_ids=tokens[:, :2], use_cache=True))
        pairs = [(layer.keys, layer.values) for layer in seen.layers]

        def behind(gap: int) -> torch.Tensor:
            """Outputs of the rest of the text, with so many hidden slots between it and the first two tokens."""
            cache = DynamicCache()
            for number, (keys, values) in enumerate(pairs):
                hidden = [part.new_zeros(*part.shape[:2], gap, part.shape[3]) for part in (keys, values)]
                cache.update(torch.cat([keys, hidden[0]], 2), torch.cat([values, hidden[1]], 2), number)
            mask = torch.cat([torch.ones(1, 2), torch.zeros(1, gap), torch.ones(1, 4)], 1).long()
            return model(input_ids=tokens[:, 2:], attention_mask=mask, **caches.handed(model.forward, cache)).logits  # type: ignore[no-any-return]

        whole = model(input_ids=tokens).logits[:, 2:]
        assert torch.allclose(behind(0), whole, rtol=0, atol=1e-5)  # BLOOM's softmax is float32
        moved = behind(0) - behind(3)
    assert float(moved.abs().max()) < 1e-5
