"""The command line: every command, its exit status, and refusals that write nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app
from softbridge.testing import random_input_prompt, random_prefix, tiny_config


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "peft", "peft", config)
    return tmp_path / "peft"


def test_formats_engines_and_plugins_are_listed() -> None:
    assert [row["name"] for row in json.loads(call("formats", "--json").output)] == [
        "adapterhub",
        "google",
        "peft",
        "softbridge",
    ]
    engines = {row["name"]: row["unavailable"] for row in json.loads(call("engines", "--json").output)}
    assert set(engines) == {"adapterhub", "native", "peft"}
    assert engines["native"] is None
    for command in ("formats", "engines", "plugins"):
        result = call(command)
        assert result.exit_code == 0
        assert "peft" in result.output


def test_inspect_says_what_a_file_is(peft: Path, base: Path) -> None:
    found = json.loads(call("inspect", peft, "--base", base, "--json").output)
    assert found["format"] == "peft"
    assert found["parts"][0]["site"] == "self"
    assert found["parts"][0]["length"] == 5
    assert found["parts"][0]["shape"] == [2, 5, 8]
    assert found["positions"]["start"] == {"decoder": 5}
    assert 0.7 < found["parts"][0]["std"] < 0.9
    assert "key/value prefix" in call("inspect", peft).output


def test_inspect_says_when_it_needs_the_base_model(tmp_path: Path) -> None:
    config = tiny_config("bert")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "peft", "peft", config)
    (tmp_path / "peft" / "softbridge.json").unlink()
    result = call("inspect", tmp_path / "peft")
    assert result.exit_code == 0
    assert "give --base" in result.output


def test_convert_verifies_and_says_what_it_did(peft: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("convert", peft, out, "--to", "adapterhub", "--base", base / "config.json", "--verify")
    assert result.exit_code == 0, result.output
    assert "rotate" in result.output
    assert "copied as it is" in result.output
    assert "verdict: the same function" in result.output
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["verdict"] == "exact"
    manifest = json.loads((out / "softbridge.json").read_text())
    assert manifest["positions"]["start"] == {"decoder": 0}
    assert set(manifest["files"]) >= {"adapter_config.json", "pytorch_adapter.bin", "certificate.json"}


def test_verify_has_three_exit_statuses(peft: Path, base: Path, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry, seed=1), tmp_path / "other", "peft", config)
    assert call("verify", peft, peft, "--base", base).exit_code == 0
    result = call("verify", peft, tmp_path / "other", "--base", base)
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output
    sb.save(random_input_prompt(BaseModel(tiny_config("gpt2", n_embd=64)).geometry), tmp_path / "wide", "peft")
    result = call("verify", peft, tmp_path / "wide", "--base", base)
    assert result.exit_code == 2
    assert "width 64, the model's is 32" in result.stderr


def test_a_target_is_not_overwritten_unless_told(peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("convert", peft, out, "--to", "softbridge").exit_code == 0
    before = (out / "prompt.safetensors").read_bytes()
    result = call("convert", peft, out, "--to", "softbridge")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert (out / "prompt.safetensors").read_bytes() == before
    assert call("convert", peft, out, "--to", "softbridge", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onnx"], "no format is called 'onnx'"),
        (["--to", "adapterhub"], "give it with --base"),
        (["--to", "google"], "google cannot express a key/value prefix at the site 'self'"),
        (["--to", "softbridge", "--verify"], "verification was asked for without a base model"),
        (["--to", "softbridge", "--base", "no/such"], "'no/such' cannot be read as a base model"),
        (["--to", "softbridge", "--from", "google"], "one NumPy file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_say_what_to_do_and_write_nothing(arguments: list[str], said: str, peft: Path, tmp_path: Path) -> None:
    result = call("convert", peft, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "expected:" in result.stderr
    assert "to do:" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_other_files_is_not_believed(peft: Path, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry, seed=1), tmp_path / "other", "peft", config)
    (peft / "softbridge.json").write_bytes((tmp_path / "other" / "softbridge.json").read_bytes())
    result = call("inspect", peft)
    assert result.exit_code == 2
    assert "describes other files than those beside it: adapter_model.safetensors" in result.stderr


def test_one_file_targets(tmp_path: Path) -> None:
    config = tiny_config("t5")
    prompt = random_input_prompt(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "prompt.npy", "google", config)
    assert call("convert", tmp_path / "prompt.npy", tmp_path / "p.safetensors", "--to", "softbridge").exit_code == 0
    again = sb.load(tmp_path / "p.safetensors")
    assert again.inputs == prompt.inputs


def test_the_demo_runs_with_the_engines_at_hand() -> None:
    result = call("demo", "--from", "peft", "--to", "softbridge")
    assert result.exit_code == 0, result.output
    assert "verdict: the same" in result.output


def test_the_demo_shows_the_trap_and_the_way_out() -> None:
    engines = {row["name"]: row["unavailable"] for row in json.loads(call("engines", "--json").output)}
    result = call("demo", "--from", "peft", "--to", "adapterhub")
    assert result.exit_code == 0, result.output
    assert "the prompt's effect" in result.output
    assert "another function" in result.output
    assert "verdict: the same function" in result.output
    ran = "adapterhub" if engines["adapterhub"] is None else "native (adapterhub: "
    assert ran in result.output
