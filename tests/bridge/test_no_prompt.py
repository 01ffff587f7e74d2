"""A path that holds no soft prompt is told what it is, and what to give instead, by every command that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app
from softbridge.testing import random_prefix, tiny_config, tiny_model

Make = Callable[[Path], Path]


def model(folder: Path) -> Path:
    tiny_model("llama", torch.float32).save_pretrained(folder / "model")
    return folder / "model"


def trainers(folder: Path) -> Path:
    """What the Trainer writes beside a model."""
    path = model(folder)
    weight = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimiser.step()
    torch.save(optimiser.state_dict(), path / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimiser).state_dict(), path / "scheduler.pt")
    (path / "trainer_state.json").write_text("{}")
    return path


def one_of(name: str) -> Make:
    return lambda folder: trainers(folder) / name


def renamed(folder: Path) -> Path:
    return (trainers(folder) / "optimizer.pt").rename(folder / "state.bin")


def state_alone(folder: Path) -> Path:
    path = trainers(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (path / name).unlink()
    return path


def described(config: dict[str, object]) -> Make:
    def made(folder: Path) -> Path:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        weights = {"layers.0.q_proj.lora_A.weight": torch.ones(8, 32)}
        safetensors.torch.save_file(weights, folder / "adapter" / "adapter_model.safetensors")
        torch.save(weights, folder / "adapter" / "pytorch_adapter.bin")
        return folder / "adapter"

    return made


def several(form: str) -> Make:
    def made(folder: Path) -> Path:
        config = tiny_config("llama")
        for name in "abcdef":
            path = folder / "adapters" / name
            sb.save(random_prefix(BaseModel(config).geometry), path, format=form, base=config)
            (path / "softbridge.json").unlink()
        return folder / "adapters"

    return made


def deeper(folder: Path) -> Path:
    (folder / "runs" / "first" / "checkpoint-1").mkdir(parents=True)
    return folder / "runs"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


BASE = "a base model is given with --base"
LORA = {"architecture": "lora", "r": 8}
#: What it is -> (how it is made, what is said of it, what is to be done).
CASES: dict[str, tuple[Make, str, str]] = {
    "a model": (model, "no soft prompt, but a whole model (llama), by the names of its files", BASE),
    "a model and its training": (
        trainers,
        "no soft prompt, but a whole model (llama), by the names of its files",
        BASE,
    ),
    "weights": (one_of("model.safetensors"), "but the weights of a whole model", BASE),
    "a configuration": (one_of("config.json"), "but the configuration of a model", BASE),
    "an optimiser": (one_of("optimizer.pt"), "but the state of an optimiser", BASE),
    "an optimiser of another name": (renamed, "but the state of an optimiser", BASE),
    "a scheduler": (one_of("scheduler.pt"), "but the state of a scheduler", BASE),
    "a log": (one_of("trainer_state.json"), "but the log of a Trainer", BASE),
    "training alone": (state_alone, "but the state of a trainer, without what it trained", BASE),
    "LoRA of PEFT": (described({"peft_type": "LORA"}), "peft_type 'LORA'", "LoRA and its kin change weights"),
    "LoRA of AdapterHub": (
        described({"model_type": "llama", "name": "a", "hidden_size": 32, "config": LORA}),
        "of architecture 'lora'",
        "choose an adapter that is a soft prompt",
    ),
    "several of PEFT": (several("peft"), "sub-folders: a, b, c, d and 2 more", "pass {path}/a or {path}/b"),
    "several of AdapterHub": (
        several("adapterhub"),
        "a directory of prompts: a (adapterhub), b (adapterhub), c (adapterhub), d (adapterhub) and 2 more",
        "give one of them: {path}/a",
    ),
    "an empty directory": (empty, "no soft prompt, but an empty directory", "check the path"),
    "directories": (deeper, "no soft prompt, but a directory of directories: first", "give the one that holds"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_prompt_is_told_what_it_is(name: str, tmp_path: Path) -> None:
    make, found, remedy = CASES[name]
    path = make(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path / "base")
    base = ["--base", str(tmp_path / "base")]
    commands = [
        ["inspect", str(path)],
        ["convert", str(path), str(tmp_path / "out"), "--to", "softbridge", *base],
        ["verify", str(path), str(path), *base],
    ]
    for words in commands:
        done = CliRunner().invoke(app, words)
        assert (done.exit_code, done.stdout) == (2, ""), done.output
        assert found in done.stderr
        assert remedy.format(path=path) in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "a", "out", "--to", "pefft"],
        ["convert", "a", "out", "--to", "softbridge", "--from", "pefft"],
        ["inspect", "a", "--from", "pefft"],
        ["explain", "--from", "pefft", "--to", "softbridge"],
        ["demo", "--to", "pefft"],
    ],
    ids=" ".join,
)
def test_a_typo_in_the_name_of_a_format_is_told_what_was_meant(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several("peft")(tmp_path)
    monkeypatch.chdir(tmp_path / "adapters")
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "did you mean 'peft'?" in done.stderr) == (2, True), done.output
    assert not Path("out").exists()
