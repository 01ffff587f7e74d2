"""What a user does next with a converted prompt in the toolkit itself, and the mistakes that are easy to make."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel, build
from softbridge.base import cache as caches
from softbridge.cli.console import app
from softbridge.errors import BaseModelError, CheckpointError, OutputError
from softbridge.plugin.registry import engines
from softbridge.testing import random_prefix, tiny_config, tiny_model
from softbridge_compat import peft_defects

IDS = torch.tensor([[5, 9, 17, 33, 21]])


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, **more).logits
    return out


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_advice_is_what_it_takes_in_adapterhub(family: str, tmp_path: Path) -> None:
    adapters = pytest.importorskip("adapters")
    config = tiny_config(family)
    prompt = random_prefix(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=config)
    report = sb.convert(tmp_path / "peft", tmp_path / "out", "adapterhub", base=config, accept=["positions"])
    advice = " ".join(report.advice)
    assert "attn_implementation='eager'" in advice
    assert ("use_cache=False" in advice) == (family == "llama")
    assert ("torch.arange(T) + 5" in advice) == (family == "gpt2")
    manifest = json.loads((tmp_path / "out" / "softbridge.json").read_text())
    assert manifest["advice"] == list(report.advice)

    expected = logits(sb.attach(tiny_model(family), prompt))

    def by_hand(attention: str, **more: Any) -> float:
        model = tiny_model(family)
        model.config._attn_implementation = attention
        adapters.init(model)
        model.load_adapter(str(tmp_path / "out"), set_active=True)
        return float((logits(model, **more) - expected).abs().max())

    right = {"position_ids": torch.arange(5)[None] + 5} if family == "gpt2" else {"use_cache": False}
    assert by_hand("eager", **right) < (1e-5 if family == "llama" else 1e-6)
    assert by_hand("sdpa", **right) > 0.1, "the first piece of advice matters"
    if family == "gpt2":
        assert by_hand("eager") > 0.1, "and so does the last"


def test_the_advice_is_what_it_takes_in_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = tiny_config("gpt2")
    prompt = random_prefix(BaseModel(config).geometry)
    prompt = replace(prompt, positions=replace(prompt.positions, start={"decoder": 0}))
    sb.save(prompt, tmp_path / "ours", format="softbridge", base=config)
    report = sb.convert(tmp_path / "ours", tmp_path / "out", "peft", base=config, accept=["positions"])
    assert "torch.arange(T) - 5" in report.advice[0]
    expected = logits(sb.attach(tiny_model("gpt2"), tmp_path / "ours"))
    model = peft.PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path / "out").eval()
    assert (logits(model, position_ids=torch.arange(5)[None] - 5) - expected).abs().max() < 1e-12
    assert (logits(model) - expected).abs().max() > 0.1


#: Family -> a base of its kind of positions, and how many rows of its table are reserved.
_ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 5,
}
POSITIONS: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": ({"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}, 0),
    "bert": (_ENCODER, 0),
    "electra": (_ENCODER, 0),
    "roberta": ({**_ENCODER, "pad_token_id": 1}, 2),
    "xlm-roberta": ({**_ENCODER, "pad_token_id": 3}, 4),
    "camembert": ({**_ENCODER, "pad_token_id": 1}, 2),
    "bert-generation": ({**_ENCODER, "is_decoder": True}, 0),
}


@pytest.mark.parametrize("toolkit", ["peft", "adapterhub"])
@pytest.mark.parametrize("family", POSITIONS)
def test_positions_are_told_as_the_advice_says(family: str, toolkit: str, tmp_path: Path) -> None:
    """Followed by hand in the toolkit, to the letter; without it, and in another family's words, it is wrong."""
    library = pytest.importorskip({"peft": "peft", "adapterhub": "adapters"}[toolkit])
    settings, reserved = POSITIONS[family]
    base = BaseModel(AutoConfig.for_model(family, **settings))
    if toolkit == "adapterhub" and family == "camembert":
        pytest.skip("AdapterHub has none")
    assert base.positions.first == reserved
    prompt = random_prefix(base.geometry)
    ((stack, _),) = prompt.positions.start.items()
    prompt = replace(prompt, positions=replace(prompt.positions, start={stack: 0 if toolkit == "peft" else 5}))
    sb.save(prompt, tmp_path / "ours", format="softbridge", base=base)
    report = sb.convert(tmp_path / "ours", tmp_path / "out", toolkit, base=base, accept=["positions"])
    advice = " ".join(report.advice)

    def model() -> Any:
        return build(base.config, base.task, torch.float64, 0)

    told = re.search(r"position_ids = torch\.arange\(T\) ([+-]) (\d+) for", advice)
    assert told is not None
    shift = int(told[1] + told[2])
    assert shift == (-5 if toolkit == "peft" else 5) + reserved
    more = {"use_cache": False} if "use_cache=False" in advice else {}
    if toolkit == "peft":
        if engines()["peft"].obstacles(prompt, model()):
            pytest.skip("PEFT cannot run it under this transformers")
        by_hand = model()
        if base.geometry.decoder is None:  # a file without a head is for the model under it
            adapted = library.PeftModel.from_pretrained(by_hand.base_model, tmp_path / "out")
            setattr(by_hand, by_hand.base_model_prefix, adapted)
        else:
            by_hand = library.PeftModel.from_pretrained(by_hand, tmp_path / "out")
        by_hand.eval()
    else:
        by_hand = model()
        library.init(by_hand)
        by_hand.load_adapter(str(tmp_path / "out"), set_active=True)
    runner = "native" if not engines()["native"].obstacles(prompt, model()) else toolkit
    expected = logits(sb.attach(model(), prompt, engine=runner), **more)

    def apart(shift: int) -> float:
        positions = torch.arange(IDS.shape[1])[None] + shift
        return float((logits(by_hand, position_ids=positions, **more) - expected).abs().max())

    assert apart(shift) < 1e-12
    assert apart(shift + 1) > 0.05
    assert float((logits(by_hand, **more) - expected).abs().max()) > 0.05, "untold"


def test_the_caches_that_stay_empty_are_the_ones_of_the_advice() -> None:
    adapters = pytest.importorskip("adapters")
    from softbridge_adapterhub import facts

    for family in ("gpt2", "llama"):
        model = tiny_model(family)
        adapters.init(model)
        with torch.no_grad():
            cache = caches.of(model(input_ids=IDS, use_cache=True))
        assert (cache.get_seq_length() == 0) == (family in facts.CACHE_STAYS_EMPTY)


def test_verify_repeats_what_convert_certified_with_its_conditions(tmp_path: Path) -> None:
    engine = engines()["peft"]
    if engine.unavailable() is not None:
        pytest.skip("PEFT is not installed")
    config = tiny_config("bert")
    model = tiny_model("bert", torch.float32)
    # Where PEFT cannot run it, it saves what it starts with.
    steps = 0 if peft_defects.RENAMED_CACHE_CLASSIFIER.applies() else 2
    engine.train_example(model, "prefix-tuning", tmp_path / "a", length=5, steps=steps, seed=0)
    accept = ["positions"]
    report = sb.convert(tmp_path / "a", tmp_path / "b", "adapterhub", base=config, accept=accept, verify=True)
    assert report.certificate is not None
    assert set(report.certificate.conditions) == set(accept)
    again = sb.verify(tmp_path / "a", tmp_path / "b", base=config)
    assert again.same
    assert set(again.conditions) == set(accept)
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "b"), "--json"]).output)
    assert "needs_base" in found


def test_overwriting_replaces_prompts_only(tmp_path: Path) -> None:
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry)
    base = tmp_path / "base"
    tiny_model("llama", torch.float32).save_pretrained(base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for target in (base, base / "model.safetensors"):
        with pytest.raises(OutputError, match=r"was not written by softbridge(.|\n)*remove it yourself"):
            sb.save(prompt, target, format="softbridge", base=config, overwrite=True)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    sb.save(prompt, tmp_path / "out", format="peft", base=config)
    sb.save(prompt, tmp_path / "out", format="softbridge", base=config, overwrite=True)
    assert sb.load(tmp_path / "out") == sb.load(tmp_path / "out", base=config)
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"notes/thesis\.txt"):
        sb.save(prompt, tmp_path / "out", format="softbridge", base=config, overwrite=True)
    sb.save(prompt, tmp_path / "one.safetensors", format="softbridge", base=config)
    sb.save(prompt, tmp_path / "one.safetensors", format="softbridge", base=config, overwrite=True)


def test_paths_are_taken_where_prompts_are(tmp_path: Path) -> None:
    prompt = random_prefix(BaseModel(tiny_config("gpt2")).geometry)
    sb.save(prompt, tmp_path / "p", format="peft", base=tiny_config("gpt2"))
    assert torch.equal(
        logits(sb.attach(tiny_model("gpt2"), tmp_path / "p")), logits(sb.attach(tiny_model("gpt2"), prompt))
    )


@pytest.mark.parametrize("base", ["./nope", "/nope/there", "nope/", "nope/config.json", "~/nope/x"])
def test_a_path_that_is_not_there_is_not_looked_up_on_a_hub(base: str) -> None:
    with pytest.raises(BaseModelError, match="there is no"):
        BaseModel.resolve(base)


def test_weights_are_not_looked_for_in_a_configuration(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    config.save_pretrained(tmp_path / "base")
    prompt = random_prefix(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "p", format="softbridge", base=config)
    with pytest.raises(BaseModelError, match="configuration only"):
        sb.verify(tmp_path / "p", tmp_path / "p", base=tmp_path / "base" / "config.json", weights=True)


def test_programs_are_refused_in_json(tmp_path: Path) -> None:
    prompt = random_prefix(BaseModel(tiny_config("gpt2")).geometry)
    sb.save(prompt, tmp_path / "p", format="peft", base=tiny_config("gpt2"))
    tiny_config("gpt2").save_pretrained(tmp_path / "base")
    arguments = ["convert", str(tmp_path / "p"), str(tmp_path / "out"), "--to", "adapterhub", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--base", str(tmp_path / "base")])
    assert result.exit_code == 2
    refused = json.loads(result.stdout)["refused"]
    assert refused["kind"] == "LoweringError"
    assert [(o["name"], o["acceptable"]) for o in refused["obstacles"]] == [("positions", True)]
    assert all(refused[name] for name in ("found", "expected", "remedy"))


def test_a_prompt_prints_in_a_line() -> None:
    prompt = random_prefix(BaseModel(tiny_config("llama")).geometry)
    assert len(repr(prompt)) < 700
    assert "KeyValuePrefix(self, layers [0, 1, 2], KeyValue([2, 5, 8] float32))" in repr(prompt)


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert "softbridge " in result.output
    assert "torch " in result.output


def test_a_folder_inside_an_earlier_output_is_left_alone(tmp_path: Path) -> None:
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "out", format="peft", base=config)
    sb.save(prompt, tmp_path / "out" / "more", format="peft", base=config)
    assert sb.load(tmp_path / "out", base=config).parts == prompt.parts
    (tmp_path / "out" / "adapter_model.bin").write_bytes((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"describes other files than those beside it: adapter_model\.bin"):
        sb.load(tmp_path / "out", base=config)


def test_a_target_that_is_taken_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "a", format="peft", base=config)
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "out", format="peft", base=config)
    monkeypatch.setattr("softbridge.verification.proof.verify_prompts", lambda *a, **k: pytest.fail("verified in vain"))
    with pytest.raises(OutputError, match="is there already"):
        sb.convert(tmp_path / "a", tmp_path / "out", "softbridge", base=config, verify=True)


def test_the_engine_proves_itself_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the check on, as it is for a user: convert, attach, generate, and ask the doctor what was found."""
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK", "1")
    monkeypatch.setenv("SOFTBRIDGE_SELF_CHECK_FOLDER", str(tmp_path / "verdicts"))
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "ours", format="softbridge", base=config)
    sb.convert(tmp_path / "ours", tmp_path / "peft", "peft", base=config)
    running = sb.attach(tiny_model("llama"), tmp_path / "peft")
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = running.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    off = sb.attach(tiny_model("llama"), tmp_path / "peft", self_check=False)
    assert torch.equal(made, off.generate(IDS, attention_mask=torch.ones_like(IDS), **settings))
    assert not torch.equal(made, tiny_model("llama").generate(IDS, attention_mask=torch.ones_like(IDS), **settings))
    assert running.softbridge.check.verdicts[0].status == "kept"
    assert off.softbridge.check is None
    table = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    assert "1 kept, 0 broken, 0 unproven" in " ".join(table.output.split())
    assert "LlamaForCausalLM" in table.output
    (found,) = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)["self_checks"]
    assert found["status"] == "kept"
    assert {one["promise"] for one in found["findings"]} == {
        "effect",
        "reference",
        "generation",
        "cache",
        "right",
        "left",
    }
