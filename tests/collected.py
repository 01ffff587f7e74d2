"""A folder of checkpoints, and of what is none, for the tests of collections."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.collection.record import Record
from softbridge.collection.run import Outcome
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model

#: What the folder of these tests holds, and no links.
CHECKPOINTS = ("own.safetensors", "peft/prefix", "peft/prompt", "run", "sst2.npy")
LEFT = {
    ".hidden": "left out",
    "adapter": "not a prompt",  # LoRA
    "broken": "refused",
    "model": "not a prompt",
    "optimiser": "not a prompt",
    "run/checkpoint-5": "left out",
}
MANIFEST = "softbridge-collection.jsonl"


def make_collection(folder: Path) -> Path:
    """Fill a folder, and return it."""
    folder.mkdir()
    config = tiny_config("llama")
    geometry = BaseModel(config).geometry

    def save(prompt: sb.SoftPrompt, place: str, form: str = "peft", **how: Any) -> None:
        sb.save(prompt, folder / place, format=form, base=config, **how)

    save(random_prefix(geometry), "peft/prefix")
    save(random_input_prompt(geometry), "peft/prompt", encoding="bin")
    save(random_prefix(geometry), "own.safetensors", "softbridge")
    save(random_prefix(geometry), "run")
    save(random_input_prompt(geometry), "run/checkpoint-5")
    save(random_prefix(geometry), ".hidden/prompt")
    save(random_prefix(geometry), "broken")
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    np.save(folder / "sst2.npy", np.random.default_rng(0).normal(0, 1, (4, 16)).astype(np.float32))
    tiny_model("llama").save_pretrained(folder / "model")
    shutil.copytree(folder / "peft" / "prefix", folder / "adapter")
    (folder / "adapter" / "softbridge.json").unlink()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    (folder / "optimiser").mkdir()
    torch.save({"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}, folder / "optimiser" / "optimizer.pt")
    (folder / "notes").mkdir()
    (folder / "notes" / "README.md").write_text("no tensors")
    return folder


def convert(source: Path, target: Path, **asked: Any) -> Outcome:
    return sb.convert_all(source, target, "softbridge", **asked)


def verdicts(outcome: Outcome) -> dict[str, str]:
    return {record.path: record.verdict for record in outcome.records}


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def record_of(outcome: Outcome, path: str) -> Record:
    return next(record for record in outcome.records if record.path == path)
