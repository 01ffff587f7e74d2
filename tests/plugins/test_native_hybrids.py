"""Hybrid models, some of whose layers keep a state of a text: a prefix joins those that attend, and no other.

What it must come to is done by hand on the bare model: a cache of its own kind that starts with the keys and values,
and states that have read nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strangers
import torch
from strangers import NEW, P, Seeded, generated, greedy, padded, tokens
from torch import Tensor
from transformers.models.auto import modeling_auto

import softbridge as sb
from softbridge import initialisation
from softbridge.base import BaseModel
from softbridge.base import cache as caches
from softbridge.errors import BaseModelError, LoweringError, SoftbridgeError
from softbridge.geometry import Geometry, read_geometry
from softbridge.methods import MLP, PrefixTuning
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.plugin.registry import engine_named
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.selfcheck import SWITCH
from softbridge.testing import agreement, apart, random_prefix

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves

FAMILIES = ["bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "nemotron_h", "qwen3_next", "zamba2"]
#: Has a layer with a state before and between those that attend.
PLAIN = "lfm2"


@cache
def _made(family: str) -> Any:
    classes = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if family not in classes:
        pytest.skip(f"this transformers has no {family}")
    model = strangers.build("causal", family, classes[family])
    obstacles = engine_named("native").obstacles(random_prefix(read_geometry(model.config), P), model)
    if obstacles:
        pytest.skip(f"refused: {obstacles[0].reason}")
    return model


def make(family: str) -> tuple[Any, Geometry, SoftPrompt]:
    model = copy.deepcopy(_made(family))
    geometry = read_geometry(model.config)
    return model, geometry, random_prefix(geometry, P)


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


def changed(prompt: SoftPrompt, change: Callable[[dict[int, KeyValue]], dict[int, KeyValue]]) -> SoftPrompt:
    (part,) = prompt.prefixes
    return replace(prompt, parts=(replace(part, layers=change(dict(part.layers))),))


def swapped(layers: dict[int, KeyValue]) -> dict[int, KeyValue]:
    return {layer: KeyValue(pair.values, pair.keys) for layer, pair in layers.items()}


def without_the_last(layers: dict[int, KeyValue]) -> dict[int, KeyValue]:
    return dict(list(layers.items())[:-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_cache_seeded_by_hand(family: str) -> None:
    model, geometry, prompt = make(family)
    assert geometry.decoder is not None
    ids, hand = tokens(), Seeded(model, prompt).scores(tokens(), True)
    bound, bare = agreement(model, input_ids=ids), logits(model, ids)
    assert apart(logits(sb.attach(copy.deepcopy(model), prompt), ids), hand) < bound
    assert apart(bare, hand) > 0.1
    twins = [changed(prompt, swapped)]
    if len(geometry.decoder.attending) > 1:
        twins.append(changed(prompt, without_the_last))
    moved = logits(model, ids, position_ids=torch.arange(2 * ids.shape[1])[None, ::2])
    if apart(moved, bare) > 1e-3:  # NoPE knows no places
        twins.append(replace(prompt, positions=replace(prompt.positions, start={"decoder": P + 1})))
    for twin in twins:
        assert apart(logits(sb.attach(copy.deepcopy(model), twin), ids), hand) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_it_generates_what_is_greedy_by_hand(family: str) -> None:
    model, _, prompt = make(family)
    ids, hand = tokens(), Seeded(model, prompt)
    running = sb.attach(copy.deepcopy(model), prompt)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = greedy(lambda written: hand.scores(written, True), ids)
    for cached in (True, False):
        assert torch.equal(generated(running, given, cached), expected)
    by, bare = (generated(one, given, True, logits=True) for one in (running, model))
    assert apart(bare, by) > 0.1


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_where_it_changes_nothing_in_the_bare_model(family: str, left: bool) -> None:
    model, _, prompt = make(family)
    ids, (rows, mask) = tokens(), padded(model, tokens(), 2, left)

    def both(of: Any) -> tuple[Tensor, Tensor]:
        return strangers.real(logits(of, rows, attention_mask=mask), 2, left, ids.shape[1]), logits(of, ids)

    bound, own = strangers.FLOAT32, apart(*both(model))
    if own != own:  # what sees nothing has a softmax of the lowest float64, in float32: no number
        bound, own = strangers.SINGLE, apart(*both(model.float()))
    if own > bound:
        pytest.skip("the bare model itself takes pads for tokens")
    assert apart(*both(sb.attach(model, prompt))) < bound


def test_loss_and_gradient_are_those_by_hand() -> None:
    model, _, prompt = make("granitemoehybrid")  # goes on from its cache with a whole text on every stack
    ids, held = tokens(), caches.empty(copy.deepcopy(model), 2)
    leaves = {}
    for layer, pair in prompt.prefixes[0].layers.items():
        leaves[layer] = [torch.from_numpy(part).double().requires_grad_() for part in (pair.keys, pair.values)]
        held.update(*(leaf.expand(2, -1, -1, -1) for leaf in leaves[layer]), layer)
    given = {"attention_mask": torch.ones(2, P + ids.shape[1], dtype=torch.long), "use_cache": True}
    hand = model(input_ids=ids, **given, **caches.handed(model.forward, held)).logits
    running = sb.attach(copy.deepcopy(model), prompt)
    ours = running(input_ids=ids).logits
    for scores in (hand, ours):
        torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert apart(ours, hand) < strangers.FLOAT32
    layers = running.softbridge.parts[0].layers
    found = {n: (layers[str(n)].keys.grad, layers[str(n)].values.grad) for n in leaves}
    for n, (keys, values) in leaves.items():
        assert apart(found[n][0], keys.grad) < strangers.FLOAT32
        assert apart(found[n][1], values.grad) < strangers.FLOAT32
        assert apart(found[n][0], values.grad) > 0.1
    assert apart(found[1][0], leaves[3][0].grad) > 0.1
    assert all(parameter.grad is None for name, parameter in running.named_parameters() if "softbridge" not in name)
    loss = float(running(input_ids=ids, labels=ids).loss)
    assert abs(loss - float(torch.nn.functional.cross_entropy(hand[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))) < 1e-5


def test_what_a_state_has_read_is_the_text_alone() -> None:
    """A layer before the first that attends puts out what it does without a prefix, bit for bit."""
    model, geometry, prompt = make(PLAIN)
    assert geometry.decoder is not None
    first = geometry.decoder.attending[0]
    assert first > 0
    bare = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    found = sb.attach(model, prompt)(input_ids=tokens(), output_hidden_states=True).hidden_states
    for layer in range(len(bare)):
        assert torch.equal(bare[layer], found[layer]) == (layer <= first)


def test_a_layer_that_does_not_attend_has_no_prefix() -> None:
    model, geometry, prompt = make(PLAIN)
    one = next(iter(prompt.prefixes[0].layers.values()))
    wrong = changed(prompt, lambda layers: {**layers, 2: one})
    (obstacle,) = engine_named("native").obstacles(wrong, model)
    assert "a prefix for layer 2 (conv), which has no keys and values" in obstacle.reason
    with pytest.raises(SoftbridgeError, match=r"layer 2 \(conv\)"):
        sb.attach(model, wrong)
    with pytest.raises(ValueError, match=r"layer 2 \(conv\) at site 'self', which have no keys and values"):
        PrefixTuning(P, sites={"self": (1, 2)}).initialise(geometry)


def test_methods_and_starts_have_the_layers_that_attend(tmp_path: Path) -> None:
    model, geometry, _ = make(PLAIN)
    assert geometry.decoder is not None
    attending = geometry.decoder.attending
    assert attending == (1, 3)
    assert geometry.decoder.kinds == ("conv", "full_attention") * 2
    starts = [
        PrefixTuning(P, MLP(8)).initialise(geometry),
        initialisation.random_uniform(geometry, P, sites=("self",)),
        initialisation.text_cache(model, [5, 6, 7]),
    ]
    for start in starts:
        assert tuple(start.prefixes[0].layers) == attending
        assert not engine_named("native").obstacles(start, model)
    sb.save(starts[0], tmp_path / "a", format="softbridge")
    assert sb.load(tmp_path / "a") == starts[0]
    running = sb.attach(model, PrefixTuning(P, MLP(8)), seed=0)
    before = running.softbridge.extract()
    running.train()
    optimiser = torch.optim.SGD([p for p in running.parameters() if p.requires_grad], 0.5)
    running(input_ids=tokens(), labels=tokens()).loss.backward()
    optimiser.step()
    after = sb.extract(running)
    assert after != before
    assert tuple(after.prefixes[0].layers) == attending


def test_rows_of_a_bank() -> None:
    model, _, prompt = make(PLAIN)
    other = random_prefix(read_geometry(model.config), P + 1, seed=4)
    ids, close = tokens(3), agreement(model)
    expected = [
        logits(sb.attach(copy.deepcopy(model), one), ids[row : row + 1]) for row, one in enumerate((prompt, other))
    ]
    expected.append(logits(model, ids[2:]))
    bank = PromptBank({"a": prompt, "b": other})
    running = sb.attach(model, bank)
    with bank.rows(["a", "b", None]):
        assert apart(logits(running, ids), torch.cat(expected)) <= close


@pytest.mark.parametrize("family", ["granitemoehybrid", PLAIN])
def test_the_self_check_compares_with_the_cache_seeded_by_hand(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "1")
    model, _, prompt = make(family)
    running = sb.attach(model, prompt)
    logits(running, tokens())
    (verdict,) = running.softbridge.check.verdicts
    assert verdict.status == "kept", verdict.reason
    kept = {finding.promise: finding for finding in verdict.findings}
    assert kept["reference"].figures or "token by token" in kept["reference"].reason
    assert kept["effect"].figures


@pytest.mark.parametrize("family", ["bamba", "recurrent_gemma"])
def test_no_file_of_peft_is_for_a_hybrid_model(family: str, tmp_path: Path) -> None:
    classes = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    model = strangers.build("causal", family, classes[family])
    prompt = random_prefix(read_geometry(model.config), P)
    assert "states" in {obstacle.name for obstacle in engine_named("peft").obstacles(prompt, model)}
    with pytest.raises(LoweringError, match="keep a state of the text"):
        sb.save(prompt, tmp_path / "a", format="peft", base=model)
    base = BaseModel.resolve(strangers.build("causal", "llama", "LlamaForCausalLM"))
    every = random_prefix(base.geometry, P)
    sb.save(every, tmp_path / "b", format="peft", base=base)
    with pytest.raises(BaseModelError, match="keep a state of the text"):
        sb.load(tmp_path / "b", base=model)


def test_keys_turn_where_a_model_has_them() -> None:
    """The rotation that a conversion needs is measured in the layers that attend."""
    model, _, prompt = make(PLAIN)
    scheme = BaseModel.resolve(model).positions
    assert (scheme.kind, tuple(scheme.rotation(2))) == ("rotary", (1, 3))
    rotated = {
        n: np.einsum("kpd,de->kpe", p.keys, scheme.rotation(-P)[n]) for n, p in prompt.prefixes[0].layers.items()
    }
    part = KeyValuePrefix(
        "self", {n: KeyValue(rotated[n], p.values.astype(float)) for n, p in prompt.prefixes[0].layers.items()}
    )
    uncounted = replace(prompt, parts=(part,), positions=replace(prompt.positions, start={"decoder": 0}))
    counted, found = (logits(sb.attach(copy.deepcopy(model), one), tokens()) for one in (prompt, uncounted))
    assert apart(found, counted) < strangers.FLOAT32
    plain = replace(prompt, positions=replace(prompt.positions, start={"decoder": 0}))
    assert apart(logits(sb.attach(model, plain), tokens()), counted) > 1e-3


def test_a_cache_of_its_own_that_cannot_begin_with_keys() -> None:
    """MiniMax looks its states up in a list that knows no beginning: by hand it is told that there is nothing in it."""
    model, geometry, prompt = make("minimax")
    assert geometry.decoder is not None
    ids = tokens()
    held = caches.empty(copy.deepcopy(model), len(ids))
    for layer, pair in prompt.prefixes[0].layers.items():
        held.update(
            *(torch.from_numpy(part).double()[None].expand(2, -1, -1, -1) for part in (pair.keys, pair.values)), layer
        )
    held.linear_cache = [None] * geometry.decoder.layers
    expected = logits(model, ids, use_cache=True, **caches.handed(model.forward, held))
    running = sb.attach(copy.deepcopy(model), prompt)
    assert apart(logits(running, ids), expected) < strangers.FLOAT32
    assert apart(logits(model, ids), expected) > 0.1
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    written = generated(running, given, True)
    assert written.shape[1] == NEW
    assert torch.equal(written, generated(running, given, False))
