"""Rotating keys between position frames is exact on every rotary family, none of which the code knows by name.

PEFT itself runs the counted prefix (real tokens at P, P + 1, ...), the native engine the rotated one (real tokens at 0,
1, ...): the same function. The same numbers without the rotation are another one. Where a family does not dispatch its
attention (stablelm and nemotron on transformers 4), PEFT runs the rotated one, too, given position_ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from softbridge.base import BaseModel
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.lowering.token_positions import native_positions
from softbridge.plugin.capabilities import Capabilities
from softbridge.testing import random_prefix
from softbridge.verification import Claim, Subject, verify_prompts

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_HEAD = {"head_dim": 8}
#: Of four layers one has no rotary positions or no window.
EVERY_FOURTH = {"num_hidden_layers": 4}

#: Family -> what its configuration needs beside SIZES. Head sizes are set where the family's default is large.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": SMALL_HEAD,
    "mistral": {"sliding_window": 64},
    "gemma": SMALL_HEAD,
    "gemma2": {**SMALL_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "gemma3_text": {**SMALL_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
    "glm": {**SMALL_HEAD, "partial_rotary_factor": 0.5},
    "glm4": {**SMALL_HEAD, "partial_rotary_factor": 0.5},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {**EVERY_FOURTH, "sliding_window": 64, "logit_scale": 1.0},
    "stablelm": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "smollm3": EVERY_FOURTH,
    "granite": {},
    "starcoder2": {"sliding_window": 64},
    "nemotron": {},
    "exaone4": {**EVERY_FOURTH, "sliding_window": 64},
}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 64,
    },
}

CASES = [pytest.param(family, changes, id=family) for family, changes in FAMILIES.items()]
CASES += [
    pytest.param("llama", {"rope_scaling": {"rope_type": kind, **settings}}, id=f"llama-{kind}")
    for kind, settings in SCALINGS.items()
]

#: What AdapterHub does, declared without it.
UNCOUNTED = Capabilities(prefix_sites=frozenset({"self"}), prefix_start="zero", relative_bias="skewed", window="pinned")


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_rotated_keys_are_the_same_function(family: str, changes: dict[str, Any]) -> None:
    from transformers import AutoConfig

    base = BaseModel(AutoConfig.for_model(family, **{**SIZES, **changes}))
    counted = random_prefix(base.geometry, length=6)
    target = Target("uncounted", UNCOUNTED, base)
    lowering = lower(counted, target, accept=["window", "length"])
    assert "rotate" in {step.name for step in lowering.steps}
    naive = replace(counted, positions=native_positions(counted, UNCOUNTED))
    certificate = verify_prompts(
        Subject("counted", counted, "peft"),
        Subject("rotated", lowering.prompt, "native"),
        base,
        naive=naive,
        dtype="float64",  # which alone decides
        claim=Claim(conditions=("window", "length")),
    )
    print(certificate.summary())
    assert certificate.source.engine == "peft"
    assert certificate.target.engine == "native" or "dispatch" in certificate.target.instead_of
    assert certificate.verdict == "exact", certificate.summary()
    assert certificate.islands, "rotary tables are float32"
    assert certificate.naive is not None
    assert certificate.naive * certificate.scale > 0.1
    assert all(fault.noticed and fault.moved * certificate.scale > 0.1 for fault in certificate.faults)


def test_enough_families_are_covered() -> None:
    required = (
        "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi phi3 gpt_neox glm glm4 cohere cohere2 stablelm olmo2 "
        "smollm3 granite starcoder2"
    )
    assert set(required.split()) <= set(FAMILIES)
    assert set(SCALINGS) == {"linear", "llama3", "yarn", "dynamic", "longrope"}
