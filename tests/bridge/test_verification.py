"""Verification tells the same from different, notices deliberate faults, and says what it cannot judge."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, EngineError
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.testing import TINY, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import Certificate, Claim, Fault, Figure, Subject, verify_prompts
from softbridge.verification.probes import make_probes
from softbridge.verification.run import choose_engine, find_float32_regions


def compare(a: SoftPrompt, b: SoftPrompt, family: str = "gpt2") -> Certificate:
    return verify_prompts(Subject("a", a, "native"), Subject("b", b, "native"), BaseModel(tiny_config(family)))


def touched(prompt: SoftPrompt, amount: float) -> SoftPrompt:
    """One number of one key changed."""
    part = prompt.prefix("self")
    assert part is not None
    keys = part.layers[1].keys.astype(np.float64)
    keys[0, 2, 3] += amount
    layers = {**part.layers, 1: KeyValue(keys, part.layers[1].values.astype(np.float64))}
    return replace(prompt, parts=(KeyValuePrefix("self", layers),))


@pytest.fixture(scope="module")
def prefix() -> SoftPrompt:
    return random_prefix(BaseModel(tiny_config("gpt2")).geometry)


def test_a_prompt_is_itself(prefix: SoftPrompt) -> None:
    certificate = compare(prefix, prefix)
    assert certificate.verdict == "bitwise"
    assert certificate.exit_status == 0
    assert certificate.islands == ()
    assert certificate.bound == 1e-12
    probes = {"alone", "batch", "right-padded", "left-padded", "greedy", "loss", "gradient"}
    assert {figure.probe for figure in certificate.figures} == probes
    assert all(fault.noticed for fault in certificate.faults)
    assert len(certificate.faults) == 4
    assert certificate.untried == {}
    assert certificate.parted is None
    assert [layer.apart for layer in certificate.layers] == [0.0] * 6


@pytest.mark.parametrize(("amount", "verdict"), [(1e-3, "different"), (1e-8, "rounding")])
def test_one_number_changed_is_another_prompt(prefix: SoftPrompt, amount: float, verdict: str) -> None:
    """The bound is as tight as it says: a key that is 1e-8 off is found, though not in float32."""
    certificate = compare(prefix, touched(prefix, amount))
    assert certificate.verdict == verdict
    assert certificate.exit_status == 1
    assert certificate.bound < certificate.worst < 1


def test_another_dtype_with_the_same_values_is_the_same(prefix: SoftPrompt) -> None:
    assert compare(prefix, touched(prefix, 0.0)).verdict == "bitwise"


def test_values_that_are_not_finite_are_different_and_make_valid_json(prefix: SoftPrompt) -> None:
    certificate = compare(prefix, touched(prefix, np.inf))
    assert certificate.verdict == "different"
    json.dumps(certificate.to_json(), allow_nan=False)


def test_a_comparison_that_notices_nothing_proves_nothing(prefix: SoftPrompt) -> None:
    blind = replace(compare(prefix, prefix), faults=(Fault("dropped", 1e-15, False),))
    assert blind.verdict == "insensitive"
    assert blind.exit_status == 2
    assert not blind.same


def test_what_is_not_judged_does_not_count(prefix: SoftPrompt) -> None:
    certificate = compare(prefix, prefix)
    apart = Figure("left-padded", 0.5, 0.5, judged=False, note="why")
    assert replace(certificate, figures=(*certificate.figures, apart)).verdict == "bitwise"
    assert replace(certificate, figures=(*certificate.figures, replace(apart, judged=True))).verdict == "different"


@pytest.mark.parametrize(
    ("family", "regions"),
    [
        ("gpt2", set()),
        ("bert", set()),
        ("llama", {"LlamaRMSNorm", "LlamaRotaryEmbedding", "LlamaAttention"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3RotaryEmbedding", "Qwen3Attention"}),
        ("gpt_neox", {"GPTNeoXRotaryEmbedding", "GPTNeoXAttention"}),
        ("t5", {"T5LayerNorm", "T5Attention", "T5Stack"}),  # whose softmax is one on transformers 4 only
    ],
)
def test_float32_regions_are_found_by_looking(family: str, regions: set[str]) -> None:
    model = tiny_model(family)
    base = BaseModel.resolve(model)
    found = find_float32_regions(model, make_probes(base.geometry, model.config, 0, base.task)[0])
    assert set(found) <= regions
    assert bool(found) == bool(regions)


def test_a_prompt_that_no_engine_can_run_is_refused_with_every_reason() -> None:
    prompt = random_input_prompt(BaseModel(tiny_config("gpt2")).geometry)
    after = replace(prompt, parts=(replace(prompt.inputs[0], entry="after"),))
    with pytest.raises(EngineError) as refused:
        choose_engine(after, "peft", tiny_model("gpt2"))
    assert all(f"{name}: " in str(refused.value) for name in ("native", "peft", "adapterhub"))


def test_a_toolkit_that_is_not_there_is_replaced_and_that_is_said(prefix: SoftPrompt) -> None:
    engine, why = choose_engine(prefix, "openprompt", tiny_model("gpt2"))
    assert engine.name == "native"
    assert why == "openprompt: no engine of this name is installed"


def test_files_are_compared_and_the_certificate_is_complete(prefix: SoftPrompt, tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    sb.save(prefix, tmp_path / "a", format="softbridge", base=config)
    sb.save(prefix, tmp_path / "b", format="peft", base=config)
    certificate = sb.verify(tmp_path / "a", tmp_path / "b", base=config)
    assert certificate.same
    form = certificate.to_json()
    assert form["schema"] == "softbridge/certificate/2"
    beside = {"schema", "verdict", "parted", "level", "conditions", "rounded"}
    assert beside <= form.keys()
    assert form.keys() - beside == {field.name for field in fields(Certificate)}
    assert form["claim"].keys() == {field.name for field in fields(Claim)}
    assert {name: form["claim"][name] for name in ("level", "conditions", "rounded")} == {
        name: form[name] for name in ("level", "conditions", "rounded")
    }
    assert form["source"]["engine"] == "native"
    assert form["target"]["engine"] == "peft"
    assert set(form["target"]["files"]) == {"adapter_config.json", "adapter_model.safetensors", "softbridge.json"}
    assert {"python", "torch", "transformers", "peft", "softbridge"} <= set(form["versions"])
    assert form["geometry"]["model_type"] == "gpt2"
    json.dumps(form, allow_nan=False)


def test_real_weights_are_used_on_request(prefix: SoftPrompt, tmp_path: Path) -> None:
    model = tiny_model("gpt2", torch.float32, seed=3)
    model.save_pretrained(tmp_path / "base")
    sb.save(prefix, tmp_path / "a", format="softbridge", base=model)
    certificate = sb.verify(tmp_path / "a", tmp_path / "a", base=tmp_path / "base", weights=True)
    assert certificate.same
    assert certificate.weights == "the model's own"
    assert certificate.scale != compare(prefix, prefix).scale
    sb.save(touched(prefix, 0.1), tmp_path / "b", format="softbridge", base=model)
    other = sb.verify(tmp_path / "a", tmp_path / "b", base=tmp_path / "base", weights=True)
    assert other.verdict == "different"
    assert other.parted is not None
    assert (other.parted.layer, other.parted.part) == (1, "attn"), "where two sides part is found with weights, too"
    with pytest.raises(BaseModelError, match="configuration only"):
        sb.verify(tmp_path / "a", tmp_path / "a", base=tiny_config("gpt2"), weights=True)


def test_the_structure_shrinks_what_attention_does_not_see() -> None:
    config = tiny_config("llama", vocab_size=50000, intermediate_size=4096, bos_token_id=49999)
    base = BaseModel(config)
    model = base.structure(torch.float32)
    assert model.config.vocab_size == 512
    assert model.config.intermediate_size == 64
    assert model.config.bos_token_id == 0
    assert replace(BaseModel.resolve(model).geometry, vocabulary=0) == replace(base.geometry, vocabulary=0)
    assert config.vocab_size == 50000


def test_what_a_sliding_window_does_to_a_prefix_is_seen_unless_it_is_a_condition() -> None:
    """The window is far longer than any probe; the structure shortens it."""
    from transformers import AutoConfig

    sizes = {**TINY["llama"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = BaseModel(AutoConfig.for_model("mistral", **sizes, sliding_window=64))
    slides = random_prefix(base.geometry)
    pinned = replace(slides, positions=replace(slides.positions, window="pinned"))
    subjects = Subject("a", slides, "native"), Subject("b", pinned, "native")
    assert verify_prompts(*subjects, base).verdict == "different"
    assert verify_prompts(*subjects, base, claim=Claim(conditions=("window",))).same
    assert verify_prompts(subjects[0], subjects[0], base).same


def test_a_head_on_either_side_decides_the_number_of_labels() -> None:
    base = BaseModel(tiny_config("bert", num_labels=2))
    prompt = random_input_prompt(base.geometry)
    with_head = replace(prompt, head={"classifier.weight": np.ones((7, 32)), "classifier.bias": np.arange(7.0)})
    a, b = Subject("a", prompt, "native"), Subject("b", with_head, "native")
    assert verify_prompts(b, b, base).same
    for pair in ((a, b), (b, a)):
        assert verify_prompts(*pair, base).verdict == "different"
