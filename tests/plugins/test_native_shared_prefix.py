"""A long prefix is attended to once for all rows, and its result is merged with that of the rows' own keys."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import softbridge as sb
from softbridge.geometry import read_geometry
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.prompt import Gate, SoftPrompt
from softbridge.testing import agreement, random_prefix, tiny_model
from softbridge_native import attention, joined_cache
from softbridge_native import shared_prefix as apart
from softbridge_native.shared_prefix import Group

P, NEW = 40, 5


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many virtual tokens each attention in two parts had."""
    calls: list[int] = []

    def attend(*args: Any) -> Tensor:
        calls.append(sum(group.keys.shape[1] for group in args[6]))
        return apart.attend(*args)

    monkeypatch.setattr(attention, "attend", attend)
    return calls


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def joined(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, groups: Any) -> Tensor:
    """By definition: one softmax over a row's prefix and its own keys."""
    rows = []
    for row in range(len(query)):
        keys, values, hidden = key[row], value[row], query.new_zeros(query.shape[2], key.shape[2])
        if mask is not None:
            hidden = mask.expand(len(query), 1, query.shape[2], -1)[row, 0]
        elif causal:
            hidden = hidden.masked_fill(torch.ones_like(hidden, dtype=torch.bool).triu(1), -torch.inf)
        for group in groups:
            if group.rows is None or row in group.rows.tolist():
                keys, values = torch.cat([group.keys, keys], 1), torch.cat([group.values, values], 1)
                hidden = torch.cat([hidden.new_zeros(len(hidden), group.keys.shape[1]), hidden], 1)
        times = query.shape[1] // key.shape[1]
        scores = query[row] @ keys.repeat_interleave(times, 0).transpose(-1, -2) * 0.3 + hidden
        rows.append(scores.softmax(-1) @ values.repeat_interleave(times, 0))
    return torch.stack(rows)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


MASKS = {"none": None, "some": torch.tensor([[1.0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0] * 6])}


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [1, 6])
def test_it_is_one_softmax_over_both_parts(
    length: int, mask: str, heads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and all gradients; a row that sees nothing of its own sees the prefix alone."""
    query, key, value = random(3, 4, length, 8, seed=0), random(3, heads, 6, 8, seed=1), random(3, heads, 6, 8, seed=2)
    keys, values = random(heads, P, 8, seed=3), random(heads, P, 8, seed=4)
    table = MASKS[mask]
    hidden = None
    if table is not None:
        hidden = torch.zeros(3, 1, 1, 6, dtype=torch.float64)
        hidden = hidden.masked_fill(table[:, None, None] == 0, torch.finfo(torch.float64).min)
    causal = length > 1 and hidden is None
    leaves = (query, key, value, keys, values)

    # What runs on a GPU is the same on a CPU.
    def elsewhere(q: Tensor, k: Tensor, v: Tensor, m: Any, _: bool, s: float, g: Any, gates: Any = None) -> Tensor:
        return apart._in_one_softmax(q, k, v, m, s, g, gates)

    function = apart.attend if device == "cpu" else elsewhere
    if device != "cpu" and length > 1:
        pytest.skip("more than one query a row are joined there")
    found = function(query, key, value, hidden, causal, 0.3, [Group(keys, values)])
    expected = joined(query, key, value, hidden, causal, [Group(keys, values)])
    assert relative(found, expected) < 1e-12
    other = joined(query, key, value, hidden, causal, [Group(keys[:, 1:], values[:, 1:])])
    assert relative(other, expected) > 1e-3
    weights = random(*expected.shape, seed=5).detach()
    ours, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-12
    with torch.no_grad():
        still = function(query, key, value, hidden, causal, 0.3, [Group(keys, values)])
        assert relative(still, expected) < 1e-12
        # Two rows have one prefix, one has another, or none.
        pair, single = torch.tensor([0, 2]), torch.tensor([1])
        for groups in (
            [Group(keys, values, pair), Group(values[:, :7], keys[:, :7], single)],
            [Group(keys, values, pair)],
        ):
            several = function(query, key, value, hidden, causal, 0.3, groups)
            wanted = joined(query, key, value, hidden, causal, groups)
            assert relative(several, wanted) < 1e-12
            assert relative(several, expected) > 1e-2
            # A gate on the keys, and one on the values, of each row.
            gates = torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0.7, 0.1, 0.4]).double()
            each = [
                Group(g.keys * of_keys, g.values * of_values, torch.tensor([row]))
                for g in groups
                for row, (of_keys, of_values) in enumerate(zip(*gates, strict=True))
                if g.rows is None or row in g.rows.tolist()
            ]
            gated = function(query, key, value, hidden, causal, 0.3, groups, gates)
            wanted = joined(query, key, value, hidden, causal, each)
            assert relative(gated, wanted) < 1e-12
            assert relative(gated, several) > 1e-2
            assert relative(function(query, key, value, hidden, causal, 0.3, groups, gates[::-1]), wanted) > 1e-3


def make(family: str) -> tuple[Any, SoftPrompt]:
    model = tiny_model(family)
    if not model._can_set_attn_implementation():
        pytest.skip(f"{family} does not dispatch here")
    model.set_attn_implementation("sdpa")
    if model.can_generate():
        model.generation_config.eos_token_id = None
    geometry = read_geometry(model.config)
    prompt = random_prefix(geometry, P, std=1.0)
    wide = {
        part.site: replace(
            part, layers={n: type(p)(p.keys.astype("f8"), p.values.astype("f8")) for n, p in part.layers.items()}
        )
        for part in prompt.prefixes
    }
    return model, replace(prompt, parts=tuple(wide.values()))


def batch(family: str) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "bert"])
def test_a_model_computes_the_same_in_two_parts(
    family: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, gradients in the prompt, and what is generated, padded and not."""
    model, prompt = make(family)
    close = agreement(model)
    running = sb.attach(model, prompt)
    ids, mask = batch(family)

    def everything() -> dict[str, Tensor]:
        found = {}
        for name, given in (("padded", mask), ("whole", None), ("ones", torch.ones_like(mask))):
            with torch.no_grad():
                found[f"{name} logits"] = running(input_ids=ids, attention_mask=given).logits
            running.zero_grad()
            logits = running(input_ids=ids, attention_mask=given).logits
            torch.log_softmax(logits, -1)[..., 3].sum().backward()
            gradients = [p.grad.flatten() for p in running.parameters() if p.grad is not None]
            found[f"{name} gradient"] = torch.cat(gradients)
        if running.can_generate():
            made = running.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found["tokens"], found["steps"] = made.sequences, torch.stack(made.logits)
        return found

    for name in ("SHARED", "ALONE", "ONCE", "TRAINED"):
        monkeypatch.setattr(apart, name, 1)
    apartly = everything()
    layers = 3
    assert counted
    assert set(counted) == {P}
    assert len(counted) == layers * (6 + (NEW if running.can_generate() else 0))
    for name in ("SHARED", "ALONE", "ONCE", "TRAINED"):
        monkeypatch.setattr(apart, name, 10**9)
    counted.clear()
    together = everything()
    assert not counted
    for name, expected in together.items():
        found = apartly[name]
        if name == "tokens":
            assert torch.equal(found, expected)
        else:
            rounding = max(close, 1e-6) if name == "steps" else close  # `generate` keeps logits in float32
            assert float((found - expected).abs().max()) <= rounding * float(expected.abs().max()), name
    with torch.no_grad():
        bare = sb.detach(running)(input_ids=ids, attention_mask=mask).logits
    assert float((bare - together["padded logits"]).abs().max()) > 0.1


def test_rows_of_a_bank_that_share_a_prefix_share_its_attention(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = make("gpt2")
    short = random_prefix(read_geometry(model.config), 7, seed=3)
    running = sb.attach(copy.deepcopy(model), bank := PromptBank({"long": prompt, "short": short}))
    ids = torch.randint(3, 96, (6, 5), generator=torch.Generator().manual_seed(1))
    names = ["long", "short", None, "long", "long", "long"]
    found = []
    for least in (1, 10**9):
        monkeypatch.setattr(apart, "SHARED", least)
        with torch.no_grad(), bank.rows(names):
            found.append(running(input_ids=ids).logits)
    assert counted == [P + 7] * 3
    assert float((found[0] - found[1]).abs().max()) < 1e-12 * float(found[1].abs().max())
    with torch.no_grad(), bank.rows("long"):
        assert float((running(input_ids=ids).logits - found[0]).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_long_text_needs_no_mask_for_a_short_prefix(
    family: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and where a cache begins; not where the rows' own part has a mask of its own."""
    model, prompt = make(family)
    short = random_prefix(read_geometry(model.config), 7, seed=3)
    running, close = sb.attach(copy.deepcopy(model), short), agreement(model)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def everything() -> dict[str, Tensor]:
        running.zero_grad()
        logits = running(input_ids=ids).logits
        torch.log_softmax(logits, -1)[..., 3].sum().backward()
        gradients = [p.grad.flatten() for p in running.parameters() if p.grad is not None]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            steps = [
                running(input_ids=part, past_key_values=cache).logits for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])
            ]
            masked = running(input_ids=ids, attention_mask=mask).logits
        return {"logits": logits, "gradients": torch.cat(gradients), "steps": torch.cat(steps, 1), "masked": masked}

    together = everything()
    assert not counted
    for module in (apart, attention, joined_cache):
        monkeypatch.setattr(module, "TEXT", 6)
    apartly = everything()
    assert counted == [7] * (2 * model.config.num_hidden_layers)  # the first calls, none with a mask, and no step
    for name, expected in together.items():
        assert relative(apartly[name], expected) <= close, name
    assert relative(together["steps"], together["logits"]) <= close
    assert relative(together["masked"][:1], together["logits"][:1]) > 1e-2
    with torch.no_grad():
        assert relative(sb.attach(model, prompt)(input_ids=ids).logits, together["logits"]) > 0.1


def mistral(window: int) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"num_hidden_layers": 3, "vocab_size": 96, "initializer_range": 0.4, "sliding_window": window}
    return AutoConfig.for_model("mistral", **sizes, **more)


@pytest.mark.parametrize("kind", ["gates", "window"])
def test_gates_and_windows_in_two_parts(kind: str, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that slides leaves ever fewer tokens of the prefix, and none in the end."""
    window = 44
    model = (
        tiny_model("llama") if kind == "gates" else AutoModelForCausalLM.from_config(mistral(window)).double().eval()
    )
    model.set_attn_implementation("sdpa")
    close, layers = agreement(model), model.config.num_hidden_layers
    prompt = random_prefix(read_geometry(model.config), P)
    assert prompt.positions.window == "slides"
    if kind == "gates":
        generator = np.random.default_rng(0)
        (part,) = prompt.prefixes
        gates = [Gate(generator.normal(size=(2, model.config.hidden_size)), np.ones(2)) for _ in range(layers)]
        pairs = {n: replace(pair, gate=gates[n]) for n, pair in part.layers.items()}
        prompt = replace(prompt, parts=(replace(part, layers=pairs),))
    running = sb.attach(copy.deepcopy(model), prompt)
    ids = torch.randint(3, 96, (2, 3), generator=torch.Generator().manual_seed(0))
    found = []
    for least in (1, 10**9):
        for name in ("SHARED", "ALONE", "ONCE", "TRAINED"):
            monkeypatch.setattr(apart, name, least)
        made = running.generate(
            ids, max_new_tokens=60, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            eos_token_id=None,
        )  # fmt: skip
        found.append((made.sequences, torch.stack(made.logits)))
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[0][1], found[1][1]) <= max(close, 1e-6)  # `generate` keeps logits in float32
    if kind == "gates":
        assert set(counted) == {P}
        assert len(counted) == 60 * layers
    else:  # a token at P + n sees those from P + n - window + 1 on; the first three are joined
        assert counted == [seen for n in range(3, 43) for seen in [min(P, window - 1 - n)] * layers]
    with torch.no_grad():
        logits = running(ids).logits
        assert relative(model(ids).logits, logits) > 0.1
        if kind == "gates":
            ungated = sb.attach(model, random_prefix(read_geometry(model.config), P))
            assert relative(ungated(ids).logits, logits) > 0.01


def test_where_two_parts_are_not_the_same_they_stay_together(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHARED", "ALONE", "ONCE", "TRAINED"):
        monkeypatch.setattr(apart, name, 1)
    ids = torch.randint(3, 96, (2, 5))
    for family, changes in (("gpt2", {"attn_pdrop": 0.1}), ("t5", {})):
        model = tiny_model(family, **changes)
        if not model._can_set_attn_implementation():
            continue
        model.set_attn_implementation("sdpa")
        running = sb.attach(model, random_prefix(read_geometry(model.config), P)).train()
        given = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
        running(**given)  # dropout of scores; a relative bias
    assert not counted
    model, prompt = make("gpt2")
    model.set_attn_implementation("eager")
    sb.attach(model, prompt)(input_ids=ids)
    assert not counted
    group, query, key = (
        Group(torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)),
        torch.zeros(2, 4, 1, 8),
        torch.zeros(2, 2, 3, 8),
    )
    assert apart.pays([group], query, key)
    assert not apart.pays([group], torch.zeros(2, 4, 3, 8, device="meta"), key)
    # Several prefixes have no gradient together, whichever part asks for one.
    pair = [Group(group.keys, group.values, torch.tensor([row])) for row in range(2)]
    assert apart.pays(pair, query, key)
    assert not apart.pays(pair, query.clone().requires_grad_(), key)
    assert not apart.pays(pair, query, key.clone().requires_grad_())
