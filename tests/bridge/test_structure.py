"""A model too large for any test is checked by its structure: what is run of it, and that nothing is left out.

`tests/benchmarks/structure_check.py` says what the whole check costs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from softbridge.base import BaseModel
from softbridge.progress import watching
from softbridge.prompt import KeyValue, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix
from softbridge.verification import Subject, verify_prompts
from softbridge.verification.run import threads
from softbridge.verification.small_models import Structure, structures

#: Llama-3-70B, as its config.json has it.
LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def large(**changes: int) -> BaseModel:
    from transformers import AutoConfig

    return BaseModel(AutoConfig.for_model("llama", **{**LLAMA_70B, **changes}))


def planned(base: BaseModel, prompt: SoftPrompt, budget: int) -> list[Structure]:
    return list(structures(base, base.bare(), [prompt], lambda model: True, budget))


def size_of(piece: Structure) -> int:
    model: Any = piece.base.bare()
    return sum(parameter.numel() for parameter in model.parameters()) * 8


def test_a_70b_model_is_run_whole_with_its_own_attention() -> None:
    base = large()
    prompt = random_prefix(base.geometry, length=2)
    (piece,) = planned(base, prompt, 1 << 30)
    assert piece.layers is None
    assert piece.fit(prompt) is prompt
    stack, whole = piece.base.geometry.decoder, base.geometry.decoder
    assert stack is not None
    assert whole is not None
    assert (stack.layers, stack.kv_heads, stack.head_dim) == (whole.layers, whole.kv_heads, whole.head_dim)
    assert (stack.layers, stack.kv_heads, stack.head_dim, stack.heads) == (80, 8, 128, 16)
    assert piece.base.geometry.hidden == 64
    assert piece.note == "vocabulary and feed-forward shrunk, hidden size 8192 to 64, query heads 64 to 16"


def test_heads_whose_width_is_the_models_are_run_some_at_a_time() -> None:
    """GPT-J: 16 heads of 256, and a hidden size that is theirs."""
    from transformers import AutoConfig

    base = BaseModel(AutoConfig.for_model("gptj", n_layer=4, vocab_size=1000, bos_token_id=1, eos_token_id=2))
    prompt = random_prefix(base.geometry, length=2)
    pieces = planned(base, prompt, 1 << 30)
    assert len(pieces) == 8
    seen: dict[int, list[KeyValue]] = {}
    for piece in pieces:
        stack, whole, fitted = piece.base.geometry.decoder, base.geometry.decoder, piece.fit(prompt)
        assert stack is not None
        assert whole is not None
        assert fitted is not None
        assert (stack.layers, stack.kv_heads, stack.head_dim) == (whole.layers, 2, whole.head_dim)
        assert size_of(piece) < 1 << 26
        for layer, pair in fitted.prefixes[0].layers.items():
            seen.setdefault(layer, []).append(pair)
    for layer, pair in prompt.prefixes[0].layers.items():
        assert np.array_equal(np.concatenate([part.keys for part in seen[layer]]), pair.keys)
        assert np.array_equal(np.concatenate([part.values for part in seen[layer]]), pair.values)
    assert pieces[0].note.endswith("2 of 16 heads at a time, hidden size 4096 to theirs")
    vectors = random_input_prompt(base.geometry, length=2)
    assert all(piece.heads is None for piece in planned(base, vectors, 1 << 30)), "they are as wide as the model"


def test_a_head_that_is_off_is_noticed_among_those_run_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    monkeypatch.setattr("softbridge.verification.small_models.SMALL", 1 << 20)
    sizes = {"n_layer": 2, "n_embd": 320, "n_head": 10, "rotary_dim": 16, "vocab_size": 600}
    base = BaseModel(AutoConfig.for_model("gptj", **sizes, bos_token_id=1, eos_token_id=2))
    prefix = random_prefix(base.geometry, length=10)
    layers = dict(prefix.prefixes[0].layers)
    values = layers[0].values.copy()
    values[7] *= 1.01
    layers[0] = KeyValue(layers[0].keys, values)
    off = replace(prefix, parts=(replace(prefix.prefixes[0], layers=layers),))
    said: list[str] = []
    with watching(said.append):
        same, other = (
            verify_prompts(Subject("a", prefix, "native"), Subject("b", prompt, "native"), base)
            for prompt in (prefix, off)
        )
    assert (same.verdict, other.verdict) == ("bitwise", "different")
    assert "2 of 10 heads at a time" in same.weights
    assert same.effect > 0.05
    begun = [what for what, then in pairwise(said) if what.startswith("verifying") and then == "running a in native"]
    assert len(begun) == 10
    assert begun[0].startswith("verifying: model 1 of 5 (vocabulary")
    assert begun[4].startswith("verifying: model 5 of 5")
    assert begun[4].endswith("s left")


def test_what_has_no_room_is_run_in_pieces_that_hold_each_layer_once() -> None:
    base = large()
    prompt = random_prefix(base.geometry, length=2)
    pieces = planned(base, prompt, 1 << 26)
    assert len(pieces) == 4
    assert size_of(pieces[0]) < 1 << 26
    seen: list[KeyValue] = []
    for piece in pieces:
        fitted = piece.fit(prompt)
        assert fitted is not None
        assert piece.layers is not None
        assert list(fitted.prefixes[0].layers) == list(range(piece.layers))
        seen += fitted.prefixes[0].layers.values()
    assert seen == list(prompt.prefixes[0].layers.values())
    assert pieces[1].note.endswith(f"{pieces[1].layers} layers at a time")


def test_vectors_are_as_wide_as_the_model_and_nothing_but_its_layers_is_shared_out() -> None:
    base = large(num_hidden_layers=4, hidden_size=2048, num_attention_heads=16)
    prompt = random_input_prompt(base.geometry, length=2)
    pieces = planned(base, prompt, 1 << 27)
    assert {piece.base.geometry.hidden for piece in pieces} == {2048}
    assert [piece.fit(prompt) is None for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert len(pieces) > 1


def test_a_prefix_of_a_hundred_tokens_is_the_same_in_two_toolkits_and_not_with_one_layer_off() -> None:
    """Four of the layers, with everything that attention sees as it is in all eighty."""
    base = large(num_hidden_layers=4)
    prefix = random_prefix(base.geometry, length=100)
    layers = dict(prefix.prefixes[0].layers)
    layers[3] = KeyValue(layers[3].keys, (layers[3].values * 1.01).astype(np.float32))
    off = replace(prefix, parts=(replace(prefix.prefixes[0], layers=layers),))
    source = Subject("a", prefix, "native")
    before = torch.get_num_threads()
    same, other = (verify_prompts(source, Subject("b", prompt, "peft"), base) for prompt in (prefix, off))
    assert torch.get_num_threads() == before
    assert (same.verdict, other.verdict) == ("bitwise", "different")
    assert same.independent
    assert same.longest == 11
    assert "hidden size 8192 to 64" in same.weights
    assert {place.layer for place in same.layers} == {0, 1, 2, 3}
    assert len(same.layers) == 8
    assert all(fault.noticed for fault in same.faults)
    assert same.effect > 0.1
    assert other.parted is not None
    assert (other.parted.layer, other.parted.part) == (3, "self_attn")


def test_threads_are_given_back_even_after_a_failure() -> None:
    before = torch.get_num_threads()
    seen = []

    def fail() -> None:
        with threads(1):
            seen.append(torch.get_num_threads())
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
