"""Each row of a batch runs with a prompt of its own, as it would alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForTokenClassification

import softbridge as sb
from softbridge.base import build
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.examples import METHODS
from softbridge.plugin.prompt_bank import PromptBank, Recent
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import TINY, agreement, random_input_prompt, random_prefix, tiny_config, tiny_model

NEW = 4
LENGTHS = (7, 4, 6, 5, 7, 3)


def make_model(family: str, implementation: str = "eager") -> Any:
    """With a head for every token; a window smaller than the longest text with its prompt."""
    if family == "bert":
        config = tiny_config("bert")
        model = AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
        model.load_state_dict(build(config, "sequence-classification", torch.float32, 0).state_dict(), strict=False)
        model = model.double().eval()
    else:
        model = tiny_model(family)
        model.generation_config.eos_token_id = None
    if implementation != "eager":
        if not model._can_set_attn_implementation():
            pytest.skip(f"{family} does not dispatch here")
        model.set_attn_implementation(implementation)
    return model


def prompts_of(model: Any) -> dict[str, SoftPrompt]:
    """Of many methods and lengths."""
    geometry = read_geometry(model.config)
    inputs = {"long": random_input_prompt(geometry, 5, seed=1), "short": random_input_prompt(geometry, 2, seed=2)}
    if not model._can_set_attn_implementation():
        return inputs
    sites = ("encoder", "self", "cross") if geometry.is_encoder_decoder else None
    some = random_prefix(geometry, 4, sites=sites, seed=5)
    some = replace(
        some,
        parts=tuple(replace(part, layers={n: p for n, p in part.layers.items() if n != 1}) for part in some.parts),
    )
    uncounted = random_prefix(geometry, 3, sites=sites, seed=4)
    uncounted = replace(
        uncounted, positions=replace(uncounted.positions, start=dict.fromkeys(uncounted.positions.start, 0))
    )
    return {
        **inputs,
        "prefix": random_prefix(geometry, 6, sites=sites, seed=3),
        "uncounted": uncounted,
        "some layers": some,
        "mlp": METHODS["prefix-tuning-mlp"](geometry),
    }


def rows_of(model: Any) -> tuple[list[str | None], Tensor, Tensor]:
    """A name for each row, with a prompt twice and a row without one, and the rows' texts, padded."""
    names: list[str | None] = [*prompts_of(model), None][: len(LENGTHS)]
    names[-1] = None
    names[0] = names[1]
    ids = torch.randint(3, 96, (len(names), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    return names, ids, torch.tensor(LENGTHS[: len(names)])


def padded(ids: Tensor, lengths: Tensor, side: str) -> tuple[Tensor, Tensor]:
    column = torch.arange(ids.shape[1])
    mask = column < lengths[:, None] if side == "right" else column >= ids.shape[1] - lengths[:, None]
    out = torch.zeros_like(ids)
    for row, length in enumerate(lengths.tolist()):
        out[row, mask[row]] = ids[row, :length]
    return out, mask.long()


def run(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.tensor([[0, 5, 6]]).expand(len(ids), -1)
    with torch.no_grad():
        found: Tensor = model(**{name: value for name, value in given.items() if value is not None}).logits
    return found


def alone(model: Any, prompt: SoftPrompt | None) -> Any:
    twin = copy.deepcopy(model)
    return twin if prompt is None else sb.attach(twin, replace(prompt, training=None))


FAMILIES = ["gpt2", "llama", "bert", "t5"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_what_it_is_alone(family: str, implementation: str) -> None:
    model = make_model(family, implementation)
    prompts = prompts_of(model)
    names, ids, lengths = rows_of(model)
    whole = model.config.is_encoder_decoder
    expected = []
    for row, name in enumerate(names):
        single = alone(model, None if name is None else prompts[name])
        expected.append(run(single, ids[row : row + 1, : lengths[row]])[0])
    close = agreement(model)
    scale = float(torch.cat(expected).abs().max())
    running = sb.attach(copy.deepcopy(model), bank := PromptBank(prompts))

    def furthest(chosen: Sequence[str | None], side: str) -> float:
        given, mask = padded(ids, lengths, side)
        with bank.rows(chosen):
            found = run(running, given, mask)
        worst = []
        for row, logits in enumerate(expected):
            own = slice(None) if whole else slice(0, lengths[row]) if side == "right" else slice(-lengths[row], None)
            worst.append(float((found[row, own] - logits).abs().max()) / scale)
        return max(worst)

    for side in ("right",) if whole or family == "bert" else ("right", "left"):
        assert furthest(names, side) <= close
    # Every row feels its own prompt: with any other row's, or none, it is elsewhere.
    for row, name in enumerate(names):
        for other in {None, *prompts} - {name}:
            wrong = [other if number == row else own for number, own in enumerate(names)]
            assert furthest(wrong, "right") > 1e-3, (row, name, other)

    same = ids[:, :3]
    with bank.rows(names):
        without = run(running, same)
        assert float((run(running, same, torch.ones_like(same)) - without).abs().max()) <= close * scale
    for row, name in enumerate(names):
        single = run(alone(model, None if name is None else prompts[name]), same[row : row + 1])[0]
        assert float((without[row] - single).abs().max()) <= close * scale
    with bank.rows("long"):
        assert torch.equal(run(running, same), run(alone(model, prompts["long"]), same))
    with bank.rows(None):
        assert float((run(running, same) - run(model, same)).abs().max()) <= close * scale
    detached = sb.detach(running)
    assert torch.equal(run(detached, same), run(model, same))


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_each_row_generates_what_it_does_alone(family: str) -> None:
    model = make_model(family)
    prompts = prompts_of(model)
    names, ids, lengths = rows_of(model)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given, mask = padded(ids, lengths, "right" if model.config.is_encoder_decoder else "left")
    running = sb.attach(copy.deepcopy(model), bank := PromptBank(prompts))
    for beams in (1, 2):
        expected = []
        for row, name in enumerate(names):
            single = alone(model, None if name is None else prompts[name])
            own = ids[row : row + 1, : lengths[row]]
            made = single.generate(own, attention_mask=torch.ones_like(own), num_beams=beams, **settings)
            expected.append(made[0, -NEW:])
        with bank.rows(names, copies=beams):
            found = running.generate(given, attention_mask=mask, num_beams=beams, **settings)[:, -NEW:]
        assert torch.equal(found, torch.stack(expected)), beams
        with bank.rows(names[1:] + names[:1], copies=beams):
            other = running.generate(given, attention_mask=mask, num_beams=beams, **settings)[:, -NEW:]
        assert not torch.equal(other, found)


@pytest.mark.parametrize("kind", ["gated", "after", "template", "first", "window"])
def test_other_ways_to_join(kind: str) -> None:
    """Gates, entries and placements of their own; a window that drops the virtual tokens of some rows."""
    if kind == "window":
        config = AutoConfig.for_model("mistral", **{**TINY["llama"], "sliding_window": 4})
        model = build(config, "causal-lm", torch.float64, 0)
    else:
        model = make_model("bert" if kind in ("after", "first") else "gpt2")
    geometry = read_geometry(model.config)
    if kind == "gated":
        made = METHODS["prefix-tuning-gated"](geometry)
        prompts = {"a": made, "b": random_prefix(geometry, 3)}
    elif kind == "window":
        pinned = random_prefix(geometry, 5, seed=1)
        pinned = replace(pinned, positions=replace(pinned.positions, window="pinned"))
        prompts = {"a": pinned, "b": random_prefix(geometry, 3)}
    elif kind == "template":
        prompts = {"a": METHODS["p-tuning-template"](geometry)}
        prompts["b"] = replace(
            prompts["a"], parts=(replace(prompts["a"].inputs[0], vectors=-prompts["a"].inputs[0].vectors),)
        )
    else:
        prompts = {}
        for name, length in (("a", 5), ("b", 2)):
            prompt = random_input_prompt(geometry, length, seed=length)
            part = replace(
                prompt.inputs[0], **({"entry": "after"} if kind == "after" else {"placement": "after-first-token"})
            )
            start = {part.stack: 0} if kind == "after" else prompt.positions.start
            prompts[name] = SoftPrompt((part,), Positions(start), prompt.base)
    if any(p.prefixes for p in prompts.values()) and not model._can_set_attn_implementation():
        pytest.skip("it does not dispatch here")
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    if kind == "template":
        ids[:2, [0, 1, 4, 5, 6]] = -1
    running = sb.attach(copy.deepcopy(model), bank := PromptBank(prompts))
    with bank.rows(["a", "b", None]):
        found = run(running, ids)
    close = agreement(model) * float(found.abs().max())
    for row, name in enumerate(("a", "b", None)):
        single = run(alone(model, None if name is None else prompts[name]), ids[row : row + 1])[0]
        assert float((found[row] - single).abs().max()) <= close, name
        if kind != "template" or name is not None:
            other = run(alone(model, prompts["b" if name == "a" else "a"]), ids[row : row + 1])[0] if name else None
            assert other is None or float((found[row] - other).abs().max()) > 1e-2


def test_prompts_are_read_when_asked_for_and_make_room(tmp_path: Path) -> None:
    model = make_model("gpt2")
    prompts = {name: random_input_prompt(read_geometry(model.config), 4, seed=n) for n, name in enumerate("abcde")}
    for name, prompt in prompts.items():
        sb.save(prompt, tmp_path / name, format="softbridge" if name < "c" else "peft")
    size = prompts["a"].inputs[0].vectors.nbytes
    bank = PromptBank({name: tmp_path / name for name in prompts}, limit=2 * size)
    running = sb.attach(copy.deepcopy(model), bank)
    ready, ids = running.softbridge.ready, torch.randint(3, 96, (1, 4))
    assert len(ready) == 0
    expected = {name: run(alone(model, prompt), ids) for name, prompt in prompts.items()}
    for name in "abcabcde":
        with bank.rows([name]):
            assert torch.equal(run(running, ids), expected[name])
        assert ready.nbytes <= 2 * size
    with bank.rows(list("abcd")):  # of one call all are held
        found = run(running, ids.expand(4, -1))
        assert all(torch.allclose(found[n], expected[name][0], atol=1e-12) for n, name in enumerate("abcd"))
    assert len(ready) == 4
    with bank.rows("e"):
        run(running, ids)
    assert len(ready) == 2
    file = io.BytesIO()
    torch.save(copy.deepcopy(running), file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    with twin.softbridge.bank.rows("c"):
        assert torch.equal(run(twin, ids), expected["c"])
    # A name may come to stand for another prompt, and what it stood for goes.
    bank["e"] = prompts["a"]
    with bank.rows("e"):
        assert torch.equal(run(running, ids), expected["a"])
    del bank["e"]
    assert "e" not in bank
    with pytest.raises(EngineError, match="no prompt is called 'e'"), bank.rows("e"):
        pass


def tiny_bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96}
    return build(AutoConfig.for_model("bart", **sizes, **heads), "seq2seq-lm", torch.float64, 0)


def test_what_a_bank_does_not_take(tmp_path: Path) -> None:
    model = make_model("bert")
    geometry = read_geometry(model.config)
    prompt = random_input_prompt(geometry, 4)
    bank = PromptBank(
        {"a": prompt, "b": replace(prompt, parts=(replace(prompt.inputs[0], placement="after-first-token"),))}
    )
    bank["head"] = replace(prompt, head={"classifier.bias": np.zeros(5, np.float32)})
    bank["gpt2"] = random_input_prompt(read_geometry(tiny_config("gpt2", n_embd=16)), 4)
    running = sb.attach(copy.deepcopy(model), bank)
    ids = torch.randint(3, 96, (2, 4))
    with pytest.raises(EngineError, match="no prompt was chosen for its rows"):
        run(running, ids)
    for names, reason in (
        (["a"], "a batch of 2 rows, and 1 names"),
        (["a", "b"], "vectors enter in different ways"),
        (["head", None], "a head of its own"),
    ):
        with bank.rows(names), pytest.raises(EngineError, match=reason):
            run(running, ids)
    with bank.rows(["a"]), pytest.raises(EngineError, match="copies=2"):
        run(running, ids)
    with bank.rows(["gpt2", None]), pytest.raises(sb.SoftbridgeError, match="does not fit the base model"):
        run(running, ids)
    with bank.rows(["a", None]):  # and after all that it runs
        run(running, ids)
    with pytest.raises(EngineError, match="none of which is trained"):
        sb.extract(running)
    with pytest.raises(EngineError, match=r"(?s)runs one prompt for all rows.*native"):
        sb.attach(copy.deepcopy(model), bank, engine="peft")
    bart = tiny_bart()
    counted = random_prefix(read_geometry(bart.config), 3)
    shared = sb.attach(bart, several := PromptBank({"a": counted}))
    with several.rows("a"), pytest.raises(EngineError, match="moves the tokens of the decoder"):
        shared(input_ids=ids, decoder_input_ids=ids)
    assert not any(p.requires_grad for p in running.parameters())
    sb.detach(running)


class Block:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_the_least_recent_goes_first() -> None:
    recent: Recent[Block] = Recent(10)
    for key in "abc":
        recent.put(key, Block(4))
    assert recent.get("a") is not None
    recent.shrink(keep=(), known="abc")
    assert recent.get("b") is None
    assert recent.get("a") is not None
    assert recent.nbytes == 8
    recent.put("big", Block(20))
    recent.shrink(keep=("big",), known=("a", "big"))
    assert len(recent) == 1
    assert recent.nbytes == 20
