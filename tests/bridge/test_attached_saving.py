"""What `save_pretrained` of an attached model writes: a checkpoint that is sound, whole, and never lost for a worse."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import softbridge as sb
from softbridge.errors import OutputError
from softbridge.methods import MLP, PrefixTuning, PTuningV2
from softbridge.prompt.container import WEIGHTS_FILE
from softbridge.testing import tiny_model


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sb.attach(tiny_model("gpt2"), PTuningV2(4), seed=0)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    (folder / "trainer_state.json").write_bytes(b"{}")
    before = tree(tmp_path)
    with torch.no_grad():
        trained(model)[0].add_(1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OutputError, match="No space left"):
            model.save_pretrained(folder)
        with pytest.raises(OutputError, match="No space left"):
            model.save_pretrained(tmp_path / "fresh")
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["checkpoint"], "an empty checkpoint passes for the last one"
    model.save_pretrained(folder)
    after = tree(tmp_path)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [f"checkpoint/{WEIGHTS_FILE}"]
    assert sb.load(folder) == sb.extract(model)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [PTuningV2(4), PrefixTuning(4, MLP(8))], ids=["plain", "mlp"])
def test_numbers_that_are_none_are_refused_by_name(method: Any, number: float, tmp_path: Path) -> None:
    model = sb.attach(tiny_model("gpt2"), method, seed=0)
    model.save_pretrained(tmp_path)
    before = tree(tmp_path)
    with torch.no_grad():
        trained(model)[-1][..., 0] = number
    with pytest.raises(OutputError, match=r"numbers of '(parts|training)\.(.|\n)*not finite(.|\n)*has diverged"):
        model.save_pretrained(tmp_path)
    assert tree(tmp_path) == before


class Diverging(TrainerCallback):  # type: ignore[misc]
    """From the third step on, every number is NaN."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step >= 3:
            with torch.no_grad():
                for parameter in trained(model):
                    parameter.fill_(float("nan"))


def test_training_that_diverged_ends_and_goes_on_from_the_last_sound_checkpoint(tmp_path: Path) -> None:
    rows = [{"input_ids": [5 + n, 9, 17], "labels": [5 + n, 9, 17]} for n in range(8)]

    def trainer(*callbacks: Any) -> Any:
        model = sb.attach(tiny_model("gpt2"), PTuningV2(4), seed=0)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=1, save_total_limit=1, report_to=[], use_cpu=True, disable_tqdm=True
        )
        return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))

    with pytest.raises(OutputError, match="has diverged"):
        trainer(Diverging()).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert sb.load(tmp_path / "checkpoint-4") == sb.extract(resumed.model)
