"""An input prompt in front of a causal model is a prefix: what it leaves in the cache. On these weights alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.base import BaseModel, build
from softbridge.errors import BaseModelError, LoweringError
from softbridge.lowering.planner import lower, plan
from softbridge.lowering.prefill import digest_of
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import Capabilities
from softbridge.prompt import InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.template import Field, Template, Virtual, Words
from softbridge.testing import FLOAT32_BOUND, agreement, apart, random_input_prompt, tiny_config, tiny_model

P = 6
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
SMALL_HEAD = {**GROUPED, "head_dim": 8}
OLD = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "absolute": ("gpt2", OLD),
    "absolute, from 2": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "rotary": ("llama", GROUPED),
    "rotary in part": ("gpt_neox", {"rotary_pct": 0.5}),
    "norms of heads": ("qwen3", SMALL_HEAD),
    "window": ("mistral", {**GROUPED, "sliding_window": 8}),
    "window shorter than the prompt": ("mistral", {**GROUPED, "sliding_window": 4}),
    "windows in every second layer, scaled embeddings": (
        "gemma2",
        {**SMALL_HEAD, "query_pre_attn_scalar": 8, "sliding_window": 8},
    ),
    "ALiBi": ("bloom", {"n_layer": 3, "n_head": 4}),
    "ALiBi of Falcon's": ("falcon", {"alibi": True}),
    "no positions in a layer": ("smollm3", {**GROUPED, "no_rope_layers": [1, 0, 1]}),
    "experts": ("mixtral", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
#: A target that knows prefixes as a cache has them, and no input prompt.
CACHE = Capabilities(prefix_sites=frozenset({"self"}), prefix_start="counted", dtypes=None)


def model_of(family: str, seed: int = 0) -> Any:
    name, more = FAMILIES[family]
    return build(AutoConfig.for_model(name, **{**SIZES, **more}), "causal-lm", torch.float64, seed)


def prompt_of(model: Any) -> SoftPrompt:
    vectors = np.random.default_rng(0).normal(0, 0.7, (P, model.config.hidden_size))
    return SoftPrompt((InputPrompt(vectors, "decoder"),), Positions({"decoder": P}), BaseModel.resolve(model).id)


def prefilled(prompt: SoftPrompt, model: Any) -> SoftPrompt:
    lowering = lower(prompt, Target("cache", CACHE, BaseModel.resolve(model)))
    assert [(step.name, step.exactness) for step in lowering.steps] == [("prefill", "rounding")]
    assert digest_of(model)[:16] in lowering.steps[0].note
    return lowering.prompt


def rows(model: Any, prompt: SoftPrompt, ids: Tensor) -> Tensor:
    """Logits of the texts with the vectors in front of their embedded words."""
    front = to_torch(prompt.inputs[0].vectors, torch.float64).expand(len(ids), -1, -1)
    with torch.no_grad():
        found: Tensor = model(inputs_embeds=torch.cat([front, model.get_input_embeddings()(ids)], 1)).logits[:, P:]
    return found


def greedy(model: Any, prompt: SoftPrompt, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, rows(model, prompt, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_what_a_sliding_cache_drops_is_kept() -> None:
    """Of P vectors a model with a window of 4 keeps 3 for itself; a prefix has all of them."""
    model = model_of("window shorter than the prompt")
    assert prefilled(prompt_of(model), model).prefixes[0].length == P


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_computes_what_rows_in_front_compute(family: str) -> None:
    model = model_of(family)
    prompt, bound = prompt_of(model), agreement(model)
    prefix = prefilled(prompt, model)
    assert all(pair.keys.dtype == np.float64 for pair in prefix.prefixes[0].layers.values())
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(0))
    wanted, bare = rows(model, prompt, ids), model(input_ids=ids).logits.detach()
    loss = cross_entropy(wanted[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    tokens = greedy(model, prompt, ids, 5)

    def run(other: SoftPrompt) -> Any:
        return sb.attach(model_of(family), other, self_check=False)

    running = run(prefix)
    with torch.no_grad():
        found = running(input_ids=ids, labels=ids)
    assert apart(found.logits, wanted) <= bound
    assert abs(found.loss - loss) <= FLOAT32_BOUND * loss  # transformers computes a loss in float32
    made = running.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made, tokens)

    part = prefix.prefixes[0]
    layers = dict(part.layers)
    wrong = {
        "dropped": bare,
        "swapped": changed(run, prefix, {n: replace(p, keys=p.values, values=p.keys) for n, p in layers.items()}, ids),
        "reversed layers": changed(run, prefix, {n: layers[len(layers) - 1 - n] for n in layers}, ids),
        "one layer of zeros": changed(run, prefix, {**layers, 0: zeros(layers[0])}, ids),
        "rolled vectors": rows(model, replace(prompt, parts=(rolled(prompt.inputs[0]),)), ids),
        "other weights": changed(run, prefix, prefilled(prompt, model_of(family, 1)).prefixes[0].layers, ids),
    }
    for name, other in wrong.items():
        assert apart(other, wanted) > 1e-3, name


def zeros(pair: KeyValue) -> KeyValue:
    return KeyValue(np.zeros_like(pair.keys), np.zeros_like(pair.values))


def rolled(part: InputPrompt) -> InputPrompt:
    return replace(part, vectors=np.roll(part.vectors, 1, axis=0))


def changed(run: Any, prefix: SoftPrompt, layers: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = run(replace(prefix, parts=(KeyValuePrefix("self", layers),)))(input_ids=ids).logits
    return found


def test_real_tokens_may_stand_elsewhere() -> None:
    """Vectors that begin at 2 leave other keys than those that begin at 0, where positions are absolute."""
    model = model_of("absolute")
    prompt = prompt_of(model)
    moved = replace(prompt, positions=Positions({"decoder": P + 2}))
    able = replace(CACHE, prefix_start=None)
    prefix = lower(moved, Target("cache", able, BaseModel.resolve(model))).prompt
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(0))
    front = to_torch(prompt.inputs[0].vectors, torch.float64)[None]
    places = torch.arange(2, 2 + P + 9)[None]
    with torch.no_grad():
        embedded = torch.cat([front, model.get_input_embeddings()(ids)], 1)
        wanted = model(inputs_embeds=embedded, position_ids=places).logits[:, P:]
        found = sb.attach(model_of("absolute"), prefix, self_check=False)(input_ids=ids).logits
    assert apart(found, wanted) <= agreement(model)
    assert apart(rows(model, prompt, ids), wanted) > 1e-3


def test_a_configuration_has_no_weights() -> None:
    config = tiny_config("llama")
    prompt = random_input_prompt(BaseModel(config).geometry)
    with pytest.raises(BaseModelError, match="a configuration only"):
        lower(prompt, Target("cache", CACHE, BaseModel(config)))
    with pytest.raises(BaseModelError, match="needs to know the base model"):
        lower(prompt, Target("cache", CACHE))
    assert plan(prompt, Target("cache", CACHE, BaseModel(config).imagine())).outcome == "rounding"


def test_bidirectional_attention_leaves_no_such_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose tokens see what follows them, in the disguise of a causal one."""
    model = model_of("rotary")
    forward = model.forward

    def both_ways(inputs_embeds: Tensor, **more: Any) -> Any:
        length = inputs_embeds.shape[1]
        return forward(inputs_embeds=inputs_embeds, attention_mask=torch.zeros(1, 1, length, length).double(), **more)

    monkeypatch.setattr(model, "forward", both_ways)
    base = BaseModel.resolve(model)
    monkeypatch.setattr(base, "weights", lambda dtype, lent: model)
    found = plan(prompt_of(model), Target("cache", CACHE, base))
    assert found.outcome == "impossible"
    assert "lets a token see what follows it" in found.obstacles[0].reason


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("bert", {}),
        ("t5", {}),
        ("gpt2", {"template": Template((Words((5,)), Field("text"), Virtual(4))), "placement": "template"}),
        ("gpt2", {"placement": "after-first-token"}),
    ],
    ids=["an encoder", "an encoder-decoder", "a template", "behind the first token"],
)
def test_what_stands_elsewhere_is_refused(family: str, change: dict[str, Any]) -> None:
    model = tiny_model(family, torch.float32)
    prompt = random_input_prompt(BaseModel.resolve(model).geometry, 4)
    prompt = replace(prompt, parts=(replace(prompt.inputs[0], **change),))
    with pytest.raises(LoweringError, match="cannot express vectors") as refused:
        lower(prompt, Target("cache", CACHE, BaseModel.resolve(model)))
    assert not any(obstacle.acceptable for obstacle in refused.value.obstacles)


def test_layers_that_keep_a_state_are_refused() -> None:
    config = AutoConfig.for_model(
        "lfm2", **{**SIZES, **GROUPED}, layer_types=["conv", "full_attention", "conv"], block_dim=32
    )
    model = build(config, "causal-lm", torch.float32, 0)
    with pytest.raises(LoweringError, match="keep a state"):
        lower(prompt_of(model), Target("cache", CACHE, BaseModel.resolve(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompt_tuning_of_a_decoder_goes_to_adapterhub(family: str, tmp_path: Path) -> None:
    """Whether AdapterHub itself computes it is in its certificate, where it is installed."""
    model = tiny_model(family, torch.float32)
    model.save_pretrained(tmp_path / "base")
    prompt = random_input_prompt(BaseModel.resolve(model).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=model)
    accept = ["positions"] if family == "gpt2" else []
    arguments = {"base": str(tmp_path / "base"), "accept": accept, "verify": True}
    report = sb.convert(tmp_path / "peft", tmp_path / "out", "adapterhub", **arguments)
    assert "prefill" in [step.name for step in report.steps]
    assert report.certificate is not None
    assert report.certificate.same, report.certificate.summary()
    assert report.certificate.weights == "the model's own"
    assert all(fault.noticed for fault in report.certificate.faults)
    again = sb.verify(tmp_path / "peft", tmp_path / "out", base=str(tmp_path / "base"))
    assert again.same, again.summary()
    other = tiny_model(family, torch.float32, seed=1)
    assert not sb.verify(tmp_path / "peft", tmp_path / "out", base=other).same
