"""`softbridge doctor`: the environment, and the defects that concern a prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge.cli.console import app
from softbridge.doctor import Diagnosis, defects, diagnose
from softbridge.geometry import read_geometry
from softbridge.methods import ContextAwarePromptTuning, MultitaskPromptTuning, PTuning
from softbridge.plugin import registry
from softbridge.plugin.registry import engines
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge_compat import adapterhub_defects, peft_defects, versions

pytest.importorskip("peft")


def names(prompt: SoftPrompt | None = None, family: str | None = None) -> set[str]:
    geometry = None if family is None else read_geometry(tiny_config(family))
    return {defect.id.removeprefix("peft-") for defect in defects(prompt, geometry, ["peft"])}


def test_defects_are_those_of_the_prompt_the_base_and_the_engines() -> None:
    everything = defects()
    assert everything == tuple(defect for defect in registry.defects().values() if defect.applies())
    assert set(registry.defects().values()) == {*peft_defects.DEFECTS, *adapterhub_defects.DEFECTS}
    assert {defect.engine for defect in everything} <= set(engines())
    assert defects(engines=["native"]) == ()
    assert names() == {defect.id.removeprefix("peft-") for defect in peft_defects.DEFECTS if defect.applies()}

    llama, bert = (read_geometry(tiny_config(family)) for family in ("llama", "bert"))
    vectors, prefix = random_input_prompt(llama), random_prefix(llama)
    always = {"adapter-names"} | {
        defect.id.removeprefix("peft-") for defect in (peft_defects.DEPRECATED,) if defect.applies()
    }
    renamed = {"renamed-cache-generate"} if peft_defects.RENAMED_CACHE_GENERATE.applies() else set()
    cached = {*always, *renamed, "static-cache"}
    assert names(vectors, "llama") == {*cached, "left-padded-prompt", "position-warning"}
    assert names(prefix, "llama") == {*cached, "left-padded-prefix-forward", "prefix-checkpointing"}
    seq2seq = {"one-submodule", *(["t5-cached-prefix"] if peft_defects.CACHED_T5_PREFIX.applies() else [])}
    t5 = random_prefix(read_geometry(tiny_config("t5")))
    assert names(t5, "t5") - names(prefix, "llama") == seq2seq
    assert "one-submodule" in names(prefix), "without a geometry any base may be meant"
    assert {"missing-head", "growing-config"} <= names(random_input_prompt(bert), "bert")
    classifies = not peft_defects.RENAMED_CACHE_CLASSIFIER.applies()
    assert ("renamed-cache-classifier" in names(random_prefix(bert), "bert")) != classifies
    assert "renamed-cache-generate" not in names(random_prefix(bert), "bert")
    assert ("unpooled-prefix" in names(random_prefix(bert), "bert")) == peft_defects.UNPOOLED_PREFIX.applies()


def test_defects_of_training_are_those_of_what_trained_it() -> None:
    llama, t5 = (read_geometry(tiny_config(family)) for family in ("llama", "t5"))
    plain = names(random_input_prompt(llama), "llama")
    lost = {"lost-training", "lost-encoder"}
    for method, more in (
        (PTuning(4), lost),
        (PTuning(4, "lstm", dropout=0.2), {*lost, "saved-dropout"}),
        (ContextAwarePromptTuning([1, 2, 3, 4]), {*lost, "cpt-default"}),
        (MultitaskPromptTuning(2, 1, 4), set()),
    ):
        prompt = method.initialise(llama)
        assert names(prompt, "llama") == plain | more
        assert names(replace(prompt, training=None), "llama") == plain
    multitask = names(MultitaskPromptTuning(2, 1, 4).initialise(t5), "t5")
    assert {"multitask-decoder", "multitask-half"} <= multitask
    assert "multitask-task" not in multitask


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, ["doctor", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(run("--json"))
    assert found == diagnose().to_json()
    assert found["versions"] == versions()
    assert found["engines"] == {name: engine.unavailable() for name, engine in engines().items()}
    usable = [name for name, reason in found["engines"].items() if reason is None]
    assert [defect["id"] for defect in found["defects"]] == [defect.id for defect in defects(engines=usable)]
    table = run()
    assert "peft-adapter-names" in table
    assert "torch" in table

    config = tiny_config("gpt2")
    sb.save(random_prefix(read_geometry(config)), tmp_path / "prefix", format="peft", base=config)
    config.save_pretrained(tmp_path / "base")
    told = json.loads(run(str(tmp_path / "prefix"), "--base", str(tmp_path / "base"), "--json"))
    assert "virtual tokens (self)" in told["prompt"]
    here = {defect["id"] for defect in told["defects"]}
    assert "peft-prefix-checkpointing" in here
    assert "peft-left-padded-prompt" not in here
    assert "that concern this prompt (5 virtual tokens (self))" in run(str(tmp_path / "prefix"))
    refused = CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing"), "--json"])
    assert refused.exit_code == 2
    assert json.loads(refused.stdout)["refused"]["kind"] == "CheckpointError"

    peft = engines()["peft"]
    monkeypatch.setattr(type(peft), "unavailable", lambda self: "PEFT is not installed")
    without: Diagnosis = diagnose()
    assert without.engines["peft"] == "PEFT is not installed"
    assert not any(defect.engine == "peft" for defect in without.defects)
