"""LLaMA-Adapter (PEFT's ADAPTION_PROMPT): the native engine is PEFT itself, and the definition by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import softbridge as sb
from softbridge import contract
from softbridge.base import BaseModel, build
from softbridge.errors import BaseModelError, CheckpointError, EngineError, LoweringError
from softbridge.geometry import read_geometry
from softbridge.prompt import Adaption, AdaptionPrompt, Joins, SoftPrompt
from softbridge.testing import apart, random_adaption, random_input_prompt, random_prefix
from softbridge.verification.judge import BOUND, FLOAT32_BOUND
from softbridge.verification.probes import make_probes
from softbridge.verification.run import find_float32_regions, gradient
from softbridge_native import adaption as native_adaption
from softbridge_native.engine import ENGINE as NATIVE
from softbridge_peft import adaption
from softbridge_peft.engine import ENGINE as PEFT

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

P, NEW = 4, 5
FAMILIES = ("llama", "mistral", "gpt2")
ROWS = torch.tensor([[5, 17, 40, 8, 21], [33, 6, 71, 50, 9]])


SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Family -> what its configuration needs beside SIZES.
MORE: Mapping[str, Mapping[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    # Beyond a shorter window, eager attention in float64 has no number for a pad that sees nothing.
    "mistral": {"num_key_value_heads": 2, "sliding_window": 64},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "tie_word_embeddings": False},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.5},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
    },
    "t5": {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt_oss": {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **{**SIZES, **MORE.get(family, {})})


def fresh(family: str) -> Any:
    config = config_of(family)
    return build(config, BaseModel(config).task, torch.float64, 0)


def trained(family: str, directory: Path, layers: int = 2, seed: int = 0) -> Path:
    """What PEFT saves after three steps, from gates that are not its own start: a gate of nothing proves nothing."""
    peft = pytest.importorskip("peft")
    config = peft.AdaptionPromptConfig(adapter_layers=layers, adapter_len=P, task_type="CAUSAL_LM")
    model = peft.get_peft_model(fresh(family).float(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.normal_(generator=generator)
            elif name.endswith("adaption_prompt"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, trained(request.param, tmp_path_factory.mktemp(request.param) / "trained")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
    return found


def generated(model: Any, **settings: Any) -> list[list[int]]:
    settings |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), **settings)
    return [row[-NEW:] for row in made.tolist()]


def part_of(prompt: SoftPrompt) -> AdaptionPrompt:
    (part,) = prompt.adaptions
    return part


def changed(prompt: SoftPrompt, change: Callable[[Adaption], Adaption]) -> SoftPrompt:
    part = part_of(prompt)
    return replace(prompt, parts=(replace(part, layers={n: change(one) for n, one in part.layers.items()}),))


# --- the same function as PEFT ----------------------------------------------------------------------------------------


def test_native_is_peft(saved: tuple[str, Path]) -> None:
    family, directory = saved
    from peft import PeftModel

    prompt = sb.load(directory)
    theirs = PeftModel.from_pretrained(fresh(family), str(directory)).eval()
    plain, expected = logits(fresh(family)), logits(theirs)
    for implementation in ("eager", "sdpa"):
        model = fresh(family)
        model.set_attn_implementation(implementation)
        ours = NATIVE.attach(model, prompt)
        # PEFT's softmax is in float32, whatever the model's precision.
        assert apart(logits(ours), expected) < FLOAT32_BOUND
        assert generated(ours) == generated(ours, use_cache=False) == generated(theirs) != generated(fresh(family))
    assert apart(plain, expected) > 0.05


def test_its_gradient_is_pefts(saved: tuple[str, Path]) -> None:
    family, directory = saved
    prompt = sb.load(directory)
    model = fresh(family)
    probe = make_probes(read_geometry(model.config), model.config, 0, "causal-lm")[0]
    (loss, ours), (reference, theirs) = (gradient(engine, fresh(family), prompt, probe) for engine in (NATIVE, PEFT))
    assert loss == pytest.approx(reference, rel=1e-6)
    for (name, found), (_, expected) in zip(ours.arrays(), theirs.arrays(), strict=True):
        assert np.abs(expected).max() > 1e-4, name
        assert apart(found, expected) < FLOAT32_BOUND, name


def test_a_small_fault_is_noticed(saved: tuple[str, Path]) -> None:
    family, directory = saved
    prompt = sb.load(directory)
    part = part_of(prompt)
    one_up = replace(part, layers={n - 1: one for n, one in part.layers.items()})
    faults = {
        "gate dropped": changed(prompt, lambda one: replace(one, gate=np.ones_like(one.gate))),
        "layers shifted by one": replace(prompt, parts=(one_up,)),
        "vectors shifted by one place": changed(prompt, lambda one: replace(one, vectors=np.roll(one.vectors, 1, 1))),
        "one vector dropped": changed(prompt, lambda one: replace(one, vectors=one.vectors[1:])),
    }
    expected = logits(NATIVE.attach(fresh(family), prompt))
    for name, fault in faults.items():
        assert apart(logits(NATIVE.attach(fresh(family), fault)), expected) > 0.005, name
    swapped = fresh(family)
    _swap_projections(swapped)
    near = logits(fresh(family))
    assert apart(logits(swapped), near) < BOUND  # of the text alone nothing is swapped
    assert apart(logits(NATIVE.attach(swapped, prompt)), expected) > 0.005


def _swap_projections(model: Any) -> None:
    """Of vectors alone, make keys by the projection of values and the other way around."""

    def swap(module: nn.Module, key: str, value: str) -> None:
        one, other = getattr(module, key), getattr(module, value)
        first = lambda self, args, output: other.forward(*args) if args[0].shape[1] == P else output  # noqa: E731
        second = lambda self, args, output: one.forward(*args) if args[0].shape[1] == P else output  # noqa: E731
        one.register_forward_hook(first)
        other.register_forward_hook(second)

    def swap_fused(module: Any, args: Any, output: Tensor) -> Tensor:
        if args[0].shape[1] != P:
            return output
        query, key, value = output.chunk(3, dim=-1)
        return torch.cat([query, value, key], dim=-1)

    for module in model.modules():
        if hasattr(module, "k_proj"):
            swap(module, "k_proj", "v_proj")
        elif hasattr(module, "c_attn"):
            module.c_attn.register_forward_hook(swap_fused)


# --- the definition by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joins", ["heads", "output"])
@pytest.mark.parametrize("gates", [1, 4])
def test_the_definition_in_float64(joins: Joins, gates: int) -> None:
    """GPT-2 computes in float64 throughout, and so does the reference: the layer's own tensors, in plain products."""
    geometry = read_geometry(config_of("gpt2"))
    assert geometry.decoder is not None
    heads = geometry.decoder.heads
    prompt = random_adaption(geometry, P, layers=(0, 2), gates=min(gates, heads), joins=joins)
    model = fresh("gpt2")
    for layer, one in part_of(prompt).layers.items():
        model.transformer.h[layer].attn.register_forward_hook(_by_hand(one, heads, joins), with_kwargs=True)
    expected, found = logits(model), logits(NATIVE.attach(fresh("gpt2"), prompt))
    assert apart(found, expected) < BOUND
    assert apart(logits(fresh("gpt2")), expected) > 0.05
    other: Joins = "output" if joins == "heads" else "heads"
    wrong = replace(prompt, parts=(replace(part_of(prompt), joins=other),))
    assert apart(logits(NATIVE.attach(fresh("gpt2"), wrong)), expected) > 0.05


def _by_hand(one: Adaption, heads: int, joins: Joins) -> Callable[..., Any]:
    vectors, gate = torch.tensor(one.vectors).double(), torch.tensor(one.gate).double()

    def add(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        weight, bias = module.c_attn.weight, module.c_attn.bias
        query, _, _ = (states @ weight + bias).chunk(3, dim=-1)
        _, key, value = (vectors @ weight + bias).chunk(3, dim=-1)
        size = key.shape[-1] // heads
        total = torch.zeros_like(query)
        for head in range(heads):
            at = slice(head * size, (head + 1) * size)
            scores = torch.softmax(query[..., at] @ key[:, at].T / size**0.5, dim=-1)
            total[..., at] = gate[head if len(gate) > 1 else 0] * scores @ value[:, at]
        return (output[0] + (total @ module.c_proj.weight if joins == "heads" else total), *output[1:])

    return add


# --- the contract -----------------------------------------------------------------------------------------------------

#: Grouped heads; projections that are fused, in three ways; partial rotary positions; an encoder; cross-attention.
KEPT = ("llama", "gpt2", "phi3", "gpt_neox", "bert", "bart")


@pytest.mark.filterwarnings("ignore")  # of transformers' models, about themselves
@pytest.mark.parametrize("family", KEPT)
def test_native_keeps_the_contract(family: str) -> None:
    make = partial(fresh, family)
    prompt = random_adaption(read_geometry(make().config), P)
    if found := NATIVE.obstacles(prompt, make()):  # BERT's kin on transformers 4.57
        assert all("dispatch" in obstacle.reason for obstacle in found)
        return
    for outcome in contract.check(NATIVE, make, prompt):
        assert outcome.figures or outcome.promise == "cache", outcome.promise
        assert not outcome.broken, str(outcome)


#: Family -> why its attention has no such prompt.
REFUSED = {
    "qwen3": "Qwen3Attention does more to its keys than project them",
    "gemma2": "Gemma2Attention changes its softmax \\('softcap'\\)",
    "gpt_oss": "GptOssAttention changes its softmax \\('s_aux'\\)",
    "opt": "OPTAttention multiplies its scores by 1",
    "t5": "T5Attention multiplies its scores by 1|2 by its configuration, and 0 dispatch",
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_refused(family: str) -> None:
    model = fresh(family)
    before = set(vars(model))
    with pytest.raises(EngineError, match=REFUSED[family]):
        NATIVE.attach(model, random_adaption(read_geometry(model.config), P))
    assert set(vars(model)) == before


def test_a_bias_that_would_be_added_twice() -> None:
    """PEFT's Llama sends the sum through the output projection by itself: with a bias, that is another function."""
    config = config_of("llama")
    config.attention_bias = True
    model = build(config, "causal-lm", torch.float64, 0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.normal_()
    prompt = random_adaption(read_geometry(config), P, layers=(1, 2), joins="module")
    with pytest.raises(EngineError, match="has a bias, which is added a second time"):
        NATIVE.attach(model, prompt)
    heads = replace(prompt, parts=(replace(part_of(prompt), joins="heads"),))
    with pytest.raises(EngineError, match="added before the output projection, and it adds it behind"):
        PEFT.attach(model, heads)
    ours = logits(NATIVE.attach(model, heads))
    NATIVE.detach(model)
    running = PEFT.attach(model, prompt)
    theirs = logits(running)
    assert apart(ours, theirs) > 0.01
    PEFT.detach(running)
    for layer in model.model.layers[1:]:  # one bias less
        layer.self_attn.register_forward_hook(
            lambda module, args, output: (
                (output[0] - module.o_proj.bias, *output[1:]) if not hasattr(module, "adaption_gate") else output
            )
        )
    assert apart(logits(PEFT.attach(model, prompt)), ours) < FLOAT32_BOUND


# --- with other things ------------------------------------------------------------------------------------------------


def test_beside_a_prefix_and_vectors() -> None:
    """Three parts in one model: each is felt, cached decoding is uncached, and all come back."""
    geometry = read_geometry(config_of("llama"))
    parts = [random_adaption(geometry, P), random_prefix(geometry, 3), random_input_prompt(geometry, 2)]
    counted = replace(parts[1].positions, start={"decoder": 5})
    prompt = SoftPrompt(tuple(one.parts[0] for one in parts), counted, parts[0].base)
    model = NATIVE.attach(fresh("llama"), prompt)
    whole = logits(model)
    assert generated(model) == generated(model, use_cache=False)
    assert NATIVE.extract(model) is prompt
    for number in range(3):
        rest = tuple(part for at, part in enumerate(prompt.parts) if at != number)
        start = {"decoder": sum(part.length for part in rest if not isinstance(part, AdaptionPrompt))}
        fewer = replace(prompt, parts=rest, positions=replace(counted, start=start))
        assert apart(logits(NATIVE.attach(fresh("llama"), fewer)), whole) > 0.01
    split = sb.parts.split(prompt)
    assert list(split) == ["self-adaption", "self", "decoder-input"]
    assert dict(split["self-adaption"].positions.start) == {}
    assert sb.parts.choose(prompt, "self-adaption").parts == prompt.parts[:1]


def test_off_and_other_numbers() -> None:
    geometry = read_geometry(config_of("gpt2"))
    first, second = (random_adaption(geometry, P, joins="output", seed=seed) for seed in (0, 1))
    model, plain = NATIVE.attach(fresh("gpt2"), first), logits(fresh("gpt2"))
    with model.softbridge.off():
        assert torch.equal(logits(model), plain)
    NATIVE.insert(model, second)
    assert NATIVE.extract(model) == second
    assert torch.equal(logits(model), logits(NATIVE.attach(fresh("gpt2"), second)))
    assert torch.equal(logits(NATIVE.detach(model)), plain)


def test_a_bank_has_none() -> None:
    model = fresh("llama")
    bank = sb.PromptBank({"a": random_adaption(read_geometry(model.config), P)})
    model = sb.attach(model, bank)
    with bank.rows(["a", None]), pytest.raises(EngineError, match=r"adaption prompt.*\n.*bank"):
        logits(model)


def test_the_engine_checks_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK", "1")
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK_FOLDER", str(tmp_path))
    prompt = random_adaption(read_geometry(config_of("llama")), P, layers=(2,))
    model = sb.attach(fresh("llama"), prompt)
    logits(model)
    (verdict,) = model.softbridge.check.verdicts
    assert verdict.status != "unproven"
    assert {finding.promise for finding in verdict.findings if finding.figures} >= {"effect", "cache", "left", "right"}
    right = native_adaption.attend

    def ungated(query: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
        return right(query, keys, values, torch.ones_like(gate))

    monkeypatch.setattr(native_adaption, "attend", ungated)
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK_FOLDER", str(tmp_path / "other"))
    faulty = sb.attach(fresh("llama"), replace(prompt, parts=(replace(part_of(prompt), joins="module"),)))
    with pytest.raises(EngineError, match="arrays not felt"):
        logits(faulty)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_come_back_as_peft_wrote_them(saved: tuple[str, Path], tmp_path: Path) -> None:
    """Through softbridge's own file and back; each conversion is proven by both toolkits."""
    family, directory = saved
    base = config_of(family)
    first = sb.convert(directory, tmp_path / "own", to="softbridge", base=base, verify=True)
    second = sb.convert(tmp_path / "own", tmp_path / "peft", to="peft", base=base, verify=True)
    for report, engines in ((first, ("peft", "native")), (second, ("native", "peft"))):
        certificate = report.certificate
        assert certificate is not None
        assert certificate.same, certificate.summary()
        assert (certificate.source.engine, certificate.target.engine) == engines
        assert certificate.source.loaded or certificate.target.loaded
        assert {fault.name for fault in certificate.faults} == {"dropped", "two layers swapped", "gates left out"}
        assert all(fault.noticed for fault in certificate.faults)
        assert adaption.FAMILIES[family].wraps in certificate.islands
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "peft" / name).read_bytes() == (directory / name).read_bytes()
    assert sb.verify(directory, tmp_path / "peft", base=base).verdict == "bitwise"
    again = trained(family, tmp_path / "another", seed=1)
    assert sb.verify(directory, again, base=base).verdict == "different"


def test_what_inspect_says(saved: tuple[str, Path]) -> None:
    family, directory = saved
    found = sb.inspect(directory)
    (part,) = found["parts"]
    joins = adaption.FAMILIES[family].joins
    assert {name: part[name] for name in ("kind", "site", "layers", "joins", "length")} == {
        "kind": "adaption",
        "site": "self",
        "layers": [1, 2],
        "joins": joins,
        "length": P,
    }
    assert found["positions"]["start"] == {}


def test_peft_runs_the_canonical_prompt_and_gives_it_back(saved: tuple[str, Path]) -> None:
    family, directory = saved
    prompt, model = sb.load(directory), fresh(family)
    plain, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    running = sb.attach(model, prompt, engine="peft")
    assert apart(logits(running), plain) > 0.05
    assert sb.extract(running) == prompt
    trainable = {name.split(".")[-1] for name, p in running.named_parameters() if p.requires_grad}
    assert trainable == {"adaption_prompt", "adaption_gate"}
    restored = sb.detach(running)
    assert restored is model
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(logits(model), plain)


def test_the_facts_about_peft() -> None:
    pytest.importorskip("peft")
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    assert {name: known.target_modules for name, known in TRANSFORMERS_MODEL_CONFIG.items()} == {
        name: family.module for name, family in adaption.FAMILIES.items()
    }
    # Whether the output projection has a part in it is read off what is added to a GPT-2: see test_native_is_peft.
    model = fresh("gpt2")
    assert not find_float32_regions(model, {"input_ids": ROWS})
    running = PEFT.attach(model, random_adaption(read_geometry(model.config), P, joins="output"))
    assert find_float32_regions(running, {"input_ids": ROWS}) == (adaption.FAMILIES["gpt2"].wraps,)


def made(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    from softbridge.untrusted import safetensors_bytes

    directory.mkdir()
    given = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"}
    (directory / "adapter_config.json").write_text(json.dumps({**given, **config}))
    stem = "base_model.model.model.layers.2.self_attn.adaption_"
    whole = {f"{stem}prompt": np.ones((1, 2, 6), np.float32), f"{stem}gate": np.ones(1, np.float32)}
    kept = {**whole, **{f"{stem}{name}" if "." not in name else name: array for name, array in tensors.items()}}
    arrays = {name: array for name, array in kept.items() if array is not None}
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(arrays, {"format": "pt"}))
    return directory


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"adapter_len": "2"}, {}, "adapter_len '2'"),
    ({"adapter_layers": True}, {}, "adapter_layers True"),
    ({"adapter_layers": None}, {}, "adapter_layers None"),
    ({"target_modules": None}, {}, "target_modules None"),
    ({"target_modules": ["self_attn"]}, {}, "target_modules"),
    ({"target_modules": "attn"}, {}, "unexpected tensors: .*self_attn"),
    ({"base_model_name_or_path": 3}, {}, "base_model_name_or_path 3"),
    ({"adapter_len": 3}, {}, r"\(1, 2, 6\).*\n.*\[1, 3, H\]"),
    ({"adapter_layers": 2}, {}, r"layers \[2\].*\n.*2 layers that follow"),
    ({}, {"gate": None}, "tensors of the layers"),
    ({}, {"gate": np.ones(2, np.float32)}, r"\(2,\)"),
    ({}, {"prompt": np.ones((2, 6), np.float32)}, r"\(2, 6\)"),
    ({}, {"prompt": np.ones((1, 2, 6), np.int32)}, "int32"),
    ({}, {"prompt": None, "gate": None}, "no tensors"),
    ({}, {"base_model.model.model.layers.1.self_attn.lora_A.weight": np.ones((2, 6), np.float32)}, "unexpected.*lora"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), BAD)
def test_what_is_no_such_file(config: dict[str, Any], tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        sb.load(made(tmp_path / "bad", config, tensors))


def test_a_file_for_another_base(tmp_path: Path) -> None:
    directory = made(tmp_path / "small", {}, {})
    assert part_of(sb.load(directory)).joins == "module"
    with pytest.raises(BaseModelError, match="vectors of width 6 in layer 2"):
        sb.load(directory, base=config_of("llama"))
    wide = trained("llama", tmp_path / "trained", layers=1)
    other = config_of("llama")
    other.num_hidden_layers = 4
    with pytest.raises(BaseModelError, match=r"PEFT wraps the last layers, \[3\], and this prompt is in \[2\]"):
        sb.load(wide, base=other)
    with pytest.raises(BaseModelError, match="is for llama, mistral, gpt2, not for"):
        sb.load(wide, base=config_of("phi3"))


def test_what_peft_cannot_hold(tmp_path: Path) -> None:
    base = config_of("llama")
    geometry = read_geometry(base)
    cases: list[tuple[SoftPrompt, str]] = [
        (random_adaption(geometry, P, layers=(0, 1)), r"\[layers\].*wraps the last layers, \[1, 2\]"),
        (random_adaption(geometry, P, gates=geometry.decoder.heads if geometry.decoder else 0), r"\[gates\]"),
        (random_adaption(geometry, P, joins="output"), r"\[projection\].*output"),
        (replace(random_adaption(geometry, P), head={"score.weight": np.ones((2, 3), np.float32)}), r"\[head\]"),
    ]
    for prompt, reason in cases:
        with pytest.raises(LoweringError, match=reason):
            sb.save(prompt, tmp_path / "out", format="peft", base=base)
    for target in ("adapterhub", "google"):
        with pytest.raises(LoweringError, match=r"\[adaption\]|\[family\]"):
            sb.save(random_adaption(geometry, P), tmp_path / "out", format=target, base=base)
    report = sb.save(random_adaption(geometry, P), tmp_path / "out", format="peft", base=base)
    assert [step.name for step in report.steps] == ["projection"]
    assert part_of(sb.load(tmp_path / "out")).joins == "module"


# --- tools ------------------------------------------------------------------------------------------------------------


def prompts_of() -> Iterator[SoftPrompt]:
    geometry = read_geometry(config_of("llama"))
    yield random_adaption(geometry, P, seed=0)
    yield random_adaption(geometry, P, seed=1)


def test_tools() -> None:
    a, b = prompts_of()
    mixed = part_of(sb.tools.interpolate([a, b], [0.25, 0.75]))
    for layer, one in mixed.layers.items():
        first, second = part_of(a).layers[layer], part_of(b).layers[layer]
        assert np.allclose(one.vectors, 0.25 * first.vectors + 0.75 * second.vectors, atol=1e-6)
        assert np.allclose(one.gate, 0.25 * first.gate + 0.75 * second.gate, atol=1e-6)
    with pytest.raises(ValueError, match="softmax over its own vectors"):
        sb.tools.concatenate([a, b])
    short = sb.tools.slice(a, 1, 3, layers=[2])
    assert list(part_of(short).layers) == [2]
    assert np.array_equal(part_of(short).layers[2].vectors, part_of(a).layers[2].vectors[1:3])
    assert sb.tools.similarity(a, a) == pytest.approx(1)
    assert abs(sb.tools.similarity(a, b)) < 0.5
    assert sb.parts.join(list(sb.parts.split(a).values())) == a
