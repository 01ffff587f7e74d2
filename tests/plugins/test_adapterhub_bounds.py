"""AdapterHub's files that stand for more than they hold: each is refused, by a bound that has a name."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import CheckpointError
from softbridge.lowering.examples import example
from softbridge.methods import materialise
from softbridge.plugin.registry import format_named
from softbridge.prompt import Training
from softbridge.testing import tiny_config
from softbridge.untrusted import Files, safetensors_bytes
from softbridge_adapterhub.composition import MOST, MOST_AGAIN, blocks

#: Of processor time, for a refusal. Each of these took more than ten times as long, or never came back.
SECONDS = 1.0


def single(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}


def nested(kind: str, depth: int, name: str = "a") -> dict[str, Any]:
    if depth == 0:
        return single(name)
    return {"type": kind, "children": [nested(kind, depth - 1, name) for _ in range(2)]}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A folder with a setup of the adapter 'a'."""
    base = tiny_config("llama")
    prompt = example("prefix-tuning", BaseModel(base).geometry, format_named("adapterhub").capabilities)
    sb.save(prompt, tmp_path / "setup" / "a", format="adapterhub", base=base)
    (tmp_path / "setup" / "a" / "softbridge.json").unlink()
    return tmp_path / "setup"


def read(folder: Path, setup: Any) -> sb.SoftPrompt:
    (folder / "adapter_setup.json").write_text(json.dumps({"adapter_setup": setup, "head_setup": None}))
    return sb.load(folder, base=tiny_config("llama"), format="adapterhub")


@pytest.mark.parametrize(
    "setup",
    [
        nested("Stack", 12),
        nested("Parallel", 12),
        {"type": "Parallel", "children": [nested("Stack", 8), single("a")]},
        {"type": "Stack", "children": [single("a")] * 800},
        {"type": "Stack", "children": [single("a")] * (MOST_AGAIN + 1)},
        {"type": "Stack", "children": [single(f"a{number}") for number in range(MOST + 1)]},
        {"type": "Stack", "children": [{}] * 100_000},
        {"type": "Stack", "children": [[]] * 100_000},
    ],
    ids=["stack", "parallel", "both", "800", "9", "65", "empty", "lists"],
)
def test_compositions_that_nest_or_repeat_are_refused(setup: Any, adapter: Path) -> None:
    begin = time.process_time()
    with pytest.raises(
        CheckpointError, match=f"more than {MOST} adapters, or one of them more than {MOST_AGAIN} times"
    ):
        read(adapter, setup)
    assert time.process_time() - begin < SECONDS


def test_an_adapter_is_read_once_however_often_it_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once, seen = Files.tensors, []
    monkeypatch.setattr(Files, "tensors", lambda self, name: (seen.append(name), once(self, name))[1])
    one = read(adapter, single("a")).prefixes[0]
    seen.clear()
    stacked = read(adapter, {"type": "Stack", "children": [single("a")] * MOST_AGAIN}).prefixes[0]
    assert len(seen) == 1
    assert stacked.length == MOST_AGAIN * one.length
    shutil.rmtree(adapter / "a")


def test_a_few_rows_and_columns_do_not_stand_for_gigabytes(adapter: Path) -> None:
    """An embedding of one column and a bottleneck of 1: 1 MB for 256 MB, and again as much on the way."""
    tensors = {
        "self.embedding": np.zeros((10_000, 32), np.float32),
        "self.hidden.weight": np.zeros((1, 32), np.float32),
        "self.hidden.bias": np.zeros(1, np.float32),
        "self.output.weight": np.zeros((96, 1), np.float32),
        "self.output.bias": np.zeros(96, np.float32),
    }
    assert materialise(Training("mlp", {}, tensors), "self", range(3), 2, 8).length == 10_000
    wide = {"self.output.weight": np.zeros((96_000, 1), np.float32), "self.output.bias": np.zeros(96_000, np.float32)}
    with pytest.raises(ValueError, match="stand for 10000 rows of up to 96000, which is more than 64 times"):
        materialise(Training("mlp", {}, {**tensors, **wide}), "self", range(3), 2, 8000)
    hidden = {
        "self.hidden.weight": np.zeros((90_000, 1), np.float32),
        "self.hidden.bias": np.zeros(90_000, np.float32),
        "self.output.weight": np.zeros((1, 90_000), np.float32),
        "self.output.bias": np.zeros(1, np.float32),
        "self.embedding": np.zeros((90_000, 1), np.float32),
    }
    with pytest.raises(ValueError, match="stand for 90000 rows of up to 90000"):
        materialise(Training("mlp", {}, hidden), "self", range(3), 2, 8)


def test_a_reader_says_so(tmp_path: Path) -> None:
    base = tiny_config("llama")
    prompt = example("prefix-tuning-mlp", BaseModel(base).geometry, format_named("adapterhub").capabilities)
    sb.save(prompt, tmp_path / "a", format="adapterhub", base=base, encoding="safetensors")
    (tmp_path / "a" / "softbridge.json").unlink()
    large = tiny_config("llama", num_hidden_layers=200)
    files = Files(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["config"] |= {"prefix_length": 2000, "bottleneck_size": 1}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    sizes = {
        "wte.weight": (2000, 32),
        "control_trans.0.weight": (1, 32),
        "control_trans.0.bias": (1,),
        "control_trans.2.weight": (200 * 2 * 16, 1),
        "control_trans.2.bias": (200 * 2 * 16,),
    }
    name = next(name for name in files.names if name.endswith(".safetensors"))
    begin = next(key for key in files.tensors(name)).partition("self_prefix.")[0] + "self_prefix."
    made = {begin + key: np.zeros(shape, np.float32) for key, shape in sizes.items()}
    (tmp_path / "a" / name).write_bytes(safetensors_bytes(made))
    with pytest.raises(CheckpointError, match="which is more than 64 times"):
        sb.load(tmp_path / "a", base=large)


def test_a_long_name_is_looked_at_once(adapter: Path) -> None:
    name = next(iter((adapter / "a").glob("pytorch_adapter.bin")))
    tensors = Files(adapter / "a").tensors(name.name)
    name.unlink()
    made = {**tensors, "a." * 20_000 + "b": np.zeros(1, np.float32), "a" * 40_000: np.zeros(1, np.float32)}
    (adapter / "a" / "adapter.safetensors").write_bytes(safetensors_bytes(made))
    begin = time.process_time()
    with pytest.raises(CheckpointError, match="unexpected"):
        sb.load(adapter / "a", base=tiny_config("llama"))
    assert time.process_time() - begin < SECONDS


def test_the_compositions_that_there_are_stay_readable(adapter: Path) -> None:
    assert len(blocks({"type": "Stack", "children": [single("a"), single("b")]})[0].names) == 2
    assert read(adapter, {"type": "Stack", "children": [single("a"), single("a")]}).prefixes[0].length > 0
