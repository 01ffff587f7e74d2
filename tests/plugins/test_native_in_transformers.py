"""An attached model is used as any other of transformers: every kind of decoding, pipeline, autocast, device map."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.examples import METHODS
from softbridge.prompt import SoftPrompt
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix, tiny_model

NEW = 8
KINDS = ("prefix", "input")
#: No text ends, and stopping is looked for nevertheless.
NEVER = {"eos_token_id": 10**6, "pad_token_id": 0}


def make(family: str = "gpt2", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    return tiny_model(family, dtype, **changes)


def make_prompt(model: Any, kind: str) -> SoftPrompt:
    geometry = read_geometry(model.config)
    return random_prefix(geometry, 5) if kind == "prefix" else random_input_prompt(geometry, 5)


def text(rows: int = 1) -> Tensor:
    half = torch.randint(3, 90, (rows, 5), generator=torch.Generator().manual_seed(0))
    return torch.cat([half, half], dim=1)  # so that there is something to look up


def decode(model: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "do_sample": False, **NEVER, **settings}
    made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return made[:, ids.shape[1] :]


def by_hand(model: Any, ids: Tensor, seed: int | None = None) -> Tensor:
    """Token by token without a cache: the likeliest, or one drawn."""
    grown = ids
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for _ in range(NEW):
            scores = model(input_ids=grown).logits[:, -1].float()
            drawn = scores.argmax(-1, keepdim=True) if seed is None else torch.multinomial(scores.softmax(-1), 1)
            grown = torch.cat([grown, drawn], dim=1)
    return grown[:, ids.shape[1] :]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_of_every_kind(family: str, kind: str) -> None:
    """Greedy, drawn, and with an assistant that is wrong, right, or a look-up in the text: what it is by hand."""
    model = make(family)
    running, ids = sb.attach(copy.deepcopy(model), make_prompt(model, kind)), text()
    expected = by_hand(running, ids)
    assert not torch.equal(by_hand(model, ids), expected)
    assert torch.equal(decode(running, ids), expected)
    twin = copy.deepcopy(running)
    for assistant in (model, twin):
        assistant.generation_config.num_assistant_tokens = 4
        assert torch.equal(decode(running, ids, assistant_model=assistant), expected)
    assert torch.equal(decode(running, ids, prompt_lookup_num_tokens=3), expected)
    if kind == "prefix":
        assert torch.equal(decode(running, ids, cache_implementation="static"), expected)
    else:
        with pytest.raises(EngineError, match="a cache that grows"):
            decode(running, ids, cache_implementation="static")

    torch.manual_seed(7)
    found = decode(running, ids, do_sample=True, top_k=0, top_p=1.0)
    assert torch.equal(found, by_hand(running, ids, seed=7))
    assert not torch.equal(found, expected)
    torch.manual_seed(7)
    several = decode(running, ids, do_sample=True, num_return_sequences=3)
    assert several.shape == (3, NEW)
    assert len({tuple(row) for row in several.tolist()}) > 1
    wide = decode(running, ids, num_beams=3)
    assert torch.equal(wide, decode(running, ids, num_beams=3, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_pipeline(kind: str) -> None:
    words = {f"w{n}": n for n in range(96)}
    core = Tokenizer(WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w95", padding_side="left")
    model = make("llama")
    running = sb.attach(copy.deepcopy(model), make_prompt(model, kind))
    texts = ["w7 w8 w9", "w11 w12 w13 w14 w15"]
    made = []
    for used in (running, model):
        write = pipeline("text-generation", model=used, tokenizer=tokenizer, batch_size=2)
        texts_made = write(texts, max_new_tokens=NEW, do_sample=False, return_full_text=False, **NEVER)
        made.append([one[0]["generated_text"] for one in texts_made])
    for line, asked in zip(made[0], texts, strict=True):
        ids = torch.tensor([[words[word] for word in asked.split()]])
        assert [words[word] for word in line.split()] == by_hand(running, ids)[0].tolist()
    assert made[0] != made[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_of_low_precision_and_a_prompt_of_float32(kind: str, dtype: torch.dtype) -> None:
    """Under autocast, too. The prompt trains in float32: a step too small for the base's precision is kept."""
    model = make("llama", torch.float32)
    prompt = make_prompt(model, kind)
    wide = sb.attach(copy.deepcopy(model), prompt)
    low = sb.attach(copy.deepcopy(model).to(dtype), prompt)
    ids = text(2)
    with torch.no_grad():
        expected = wide(input_ids=ids).logits
        found = low(input_ids=ids).logits
        with torch.autocast("cpu", dtype=dtype):
            cast = wide(input_ids=ids).logits
    bare = float((expected - model(input_ids=ids).logits.detach()).abs().max())
    rounding = 64 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert found.dtype == dtype
    for logits in (found, cast):
        assert float((logits.float() - expected).abs().max()) < rounding < bare
    parameters = [p for p in low.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    low(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            assert parameter.grad is not None
            parameter -= 1e-6 * parameter.grad.sign()
    changed = [p.detach() - was for p, was in zip(parameters, before, strict=True)]
    assert all(float(part.abs().max()) > 5e-7 for part in changed)
    # The base's own precision would have kept none of it where the number is near one.
    one = torch.ones((), dtype=dtype)
    assert one - 1e-6 == one


@pytest.mark.parametrize("kind", KINDS)
def test_with_weights_that_are_on_disk_until_they_are_needed(kind: str, tmp_path: Path) -> None:
    """accelerate's device map, whose hooks are around the modules when the prompt is attached."""
    model = make("llama", torch.float32)
    prompt, ids = make_prompt(model, kind), text(2)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded", attn_implementation="eager"
    )
    assert any(p.device.type == "meta" for p in spread.parameters())
    running = sb.attach(spread, prompt)
    expected = sb.attach(copy.deepcopy(model), prompt)
    with torch.no_grad():
        # In float32; what lies on disk is aligned otherwise in memory.
        assert apart(running(input_ids=ids).logits, expected(input_ids=ids).logits) <= 1e-5
    assert torch.equal(decode(running, ids), decode(expected, ids))
    running(input_ids=ids, labels=ids).loss.backward()
    expected(input_ids=ids, labels=ids).loss.backward()
    pairs = zip(running.softbridge.parameters(), expected.softbridge.parameters(), strict=True)
    assert all(apart(a.grad, b.grad) <= 1e-5 for a, b in pairs)
    assert sb.extract(running) == prompt
    with torch.no_grad():
        assert apart(sb.detach(running)(input_ids=ids).logits, model(input_ids=ids).logits) <= 1e-5


def test_logits_of_virtual_tokens_on_request() -> None:
    model = make("gpt2")
    prompt, ids = make_prompt(model, "input"), text(2)
    running = sb.attach(copy.deepcopy(model), prompt)
    with torch.no_grad():
        real = running(input_ids=ids).logits
        running.softbridge.virtual_logits = True
        both = running(input_ids=ids).logits
        rows = torch.tensor(prompt.inputs[0].vectors, dtype=torch.float64).expand(2, -1, -1)
        embedded = torch.cat([rows, model.get_input_embeddings()(ids)], dim=1)
        assert torch.equal(both, model(inputs_embeds=embedded).logits)
    assert apart(both[:, 5:], real) <= agreement(model)
    with pytest.raises(EngineError, match="labels, which are for real tokens only"):
        running(input_ids=ids, labels=ids)
    running.softbridge.virtual_logits = False
    assert running(input_ids=ids, labels=ids).logits.shape == real.shape


def test_a_template_compiles_in_one_graph() -> None:
    model = make("gpt2")
    prompt = METHODS["p-tuning-template"](read_geometry(model.config))
    running = sb.attach(model, prompt)
    ids = torch.randint(3, 90, (2, 9))
    ids[:, [0, 1, 4, 5, 6]] = -1
    compiled = torch.compile(running, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = running(input_ids=ids).logits
        assert torch.equal(compiled(input_ids=ids).logits, expected)
        ids[0, 0] = 3
        with pytest.raises(EngineError, match="rows with 4, 5 virtual tokens"):
            running(input_ids=ids)
        with pytest.raises(RuntimeError, match="do not have the virtual tokens"):
            compiled(input_ids=ids)
