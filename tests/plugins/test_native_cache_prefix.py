"""Where attention does not dispatch, a prefix starts the cache: PEFT's function, with the engine's promises kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

import softbridge as sb
from softbridge import contract
from softbridge.base import build, draw_weights
from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.examples import METHODS
from softbridge.methods import MLP, PrefixTuning
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.prompt import KeyValuePrefix, SoftPrompt
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix
from softbridge.verification.probes import make_probes
from softbridge.verification.run import gradient
from softbridge_native.engine import ENGINE
from softbridge_native.obstacles import seeded
from softbridge_peft.engine import ENGINE as PEFT

P = 3
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {}),
    "falcon with ALiBi": ("falcon", {"alibi": True}),
    "gptj": ("gptj", OLD),
    "codegen": ("codegen", OLD),
}


def make(family: str) -> Any:
    name, more = FAMILIES[family]
    return build(AutoConfig.for_model(name, **{**SIZES, **more}), "causal-lm", torch.float64, 0)


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def tokens() -> Tensor:
    return torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_peft_and_keeps_the_contract(family: str) -> None:
    model = make(family)
    prompt = random_prefix(read_geometry(model.config), P, std=0.7)
    ids = tokens()
    ours = sb.attach(copy.deepcopy(model), prompt)
    theirs = sb.attach(copy.deepcopy(model), prompt, engine="peft")
    assert torch.equal(logits(ours, ids), logits(theirs, ids))
    probe = make_probes(read_geometry(model.config), model.config, 0, "causal-lm")[0]
    (our_loss, our_gradient), (their_loss, their_gradient) = (
        gradient(engine, copy.deepcopy(model), prompt, probe) for engine in (ENGINE, PEFT)
    )
    assert our_loss == their_loss
    pairs = zip(our_gradient.arrays(), their_gradient.arrays(), strict=True)
    assert all(np.array_equal(a, b) and np.abs(a).max() > 0 for (_, a), (_, b) in pairs)
    swapped = {n: type(pair)(pair.values, pair.keys) for n, pair in prompt.prefixes[0].layers.items()}
    wrong = replace(prompt, parts=(KeyValuePrefix("self", swapped),))
    for other in (model, sb.attach(copy.deepcopy(model), wrong)):
        assert float((logits(ours, ids) - logits(other, ids)).abs().max()) > 0.1

    # Where its attention dispatches by now, no promise is left out.
    in_cache = seeded(prompt, model, read_geometry(model.config)) is not None
    promises = [promise for promise in contract.PROMISES if not in_cache or promise is not contract.attention]
    for outcome in contract.check(ENGINE, partial(make, family), prompt, promises):
        assert outcome.figures, outcome.promise
        assert not outcome.unkept, str(outcome)
    if not in_cache:
        return
    running = sb.attach(make(family), prompt).train()
    running.gradient_checkpointing_enable()
    with pytest.raises(EngineError, match="gradient checkpointing"):
        running(input_ids=ids, labels=ids)


@pytest.mark.filterwarnings("ignore")
def test_the_model_keeps_its_own_attention() -> None:
    """Falcon has SDPA in modules of its own, and asks for it by its own name."""
    name, more = FAMILIES["falcon"]
    config = AutoConfig.for_model(name, **{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    draw_weights(model, 0)
    prompt = random_prefix(read_geometry(config), P, std=0.7)
    ours, theirs = (sb.attach(copy.deepcopy(model), prompt, engine=engine) for engine in ("native", "peft"))
    assert ours.config._attn_implementation == "sdpa"
    assert torch.equal(logits(ours, tokens()), logits(theirs, tokens()))
    assert float((logits(ours, tokens()) - logits(model, tokens())).abs().max()) > 0.1


def test_it_is_used_as_any_other_prefix() -> None:
    """Through a parameterisation, in a copy, with a cache that the caller brings or crops."""
    model = make("bloom")
    ids = tokens()
    running = sb.attach(copy.deepcopy(model), PrefixTuning(P, MLP(8)), seed=0)
    expected = logits(running, ids)
    assert apart(logits(copy.deepcopy(running), ids), expected) <= agreement(model)
    running(input_ids=ids, labels=ids).loss.backward()
    assert float(running.softbridge.parameterisation.self_embedding.grad.abs().max()) > 0
    with torch.no_grad():
        first = running(input_ids=ids[:, :4], use_cache=True)
        held = caches.of(first)
        rest = running(input_ids=ids[:, 4:], **caches.handed(running.forward, held), use_cache=True).logits
    assert apart(torch.cat([first.logits, rest], 1), expected) <= agreement(model)
    held.crop(-3)
    with torch.no_grad():
        again = running(input_ids=ids[:, 3:], **caches.handed(running.forward, held)).logits
    assert apart(again, expected[:, 3:]) <= agreement(model)
    assert torch.equal(logits(sb.detach(running), ids), logits(model, ids))


def reasons(model: Any, prompt: SoftPrompt) -> str:
    return "; ".join(obstacle.reason for obstacle in ENGINE.obstacles(prompt, model))


def test_where_it_would_be_another_function_it_is_refused() -> None:
    model = make("bloom")
    geometry = read_geometry(model.config)
    prompt = random_prefix(geometry, P)
    assert not reasons(model, prompt)
    assert "in every layer" in reasons(model, METHODS["prefix-tuning-layers"](geometry))
    assert "a gate cannot" in reasons(model, METHODS["prefix-tuning-gated"](geometry))
    uncounted = replace(prompt, positions=replace(prompt.positions, start={"decoder": 0}))
    assert "first token stands at 3, not at 0" in reasons(model, uncounted)
    gptj = make("gptj")  # which can be told
    told = random_prefix(read_geometry(gptj.config), P)
    told = replace(told, positions=replace(told.positions, start={"decoder": 0}))
    assert not reasons(gptj, told)
    counted = replace(told, positions=replace(told.positions, start={"decoder": P}))
    found = [logits(sb.attach(copy.deepcopy(gptj), p), tokens()) for p in (told, counted)]
    assert float((found[0] - found[1]).abs().max()) > 0.1
    neo = AutoConfig.for_model("gpt_neo", **SIZES, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    neo_model = build(neo, "causal-lm", torch.float64, 0)
    assert "its window counts pads" in reasons(neo_model, random_prefix(read_geometry(neo), P))
    both = replace(
        random_input_prompt(geometry, 2),
        parts=(*random_input_prompt(geometry, 2).parts, *prompt.parts),
        positions=replace(prompt.positions, start={"decoder": P + 2}),
    )
    assert ", 0 dispatch" in reasons(model, both)

    running = sb.attach(copy.deepcopy(model), prompt)
    with pytest.raises(EngineError, match="a StaticCache"):
        running(
            input_ids=tokens(), **caches.handed(running.forward, StaticCache(config=model.config, max_cache_len=16))
        )
    bank = PromptBank({"a": prompt})
    running = sb.attach(copy.deepcopy(model), bank)
    with bank.rows("a"), pytest.raises(EngineError, match="does not dispatch"):
        running(input_ids=tokens())
    bank["b"] = random_input_prompt(geometry, 2)
    with bank.rows(["b", "b"]):
        running(input_ids=tokens())


def test_pads_that_would_count_are_refused() -> None:
    """MPT's bias is of places in the cache, where pads stand between the prefix and the text."""
    config = AutoConfig.for_model("mpt", **SIZES, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    model = build(config, "causal-lm", torch.float32, 0)
    prompt = random_prefix(read_geometry(config), P)
    running = sb.attach(model, prompt)
    ids, mask = tokens(), torch.ones(2, 6, dtype=torch.long)
    mask[0, -2:] = 0
    assert torch.equal(logits(running, ids, attention_mask=mask)[0, :4], logits(running, ids)[0, :4])
    with pytest.raises(EngineError, match="counts pads between the prefix and the text"):
        logits(running, ids, attention_mask=mask.flip(1))
