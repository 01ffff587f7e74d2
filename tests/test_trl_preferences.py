"""TRL's trainers that compare with a reference, unmodified: the reference is the prompt at its start, or none."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.methods import MLP, PrefixTuning
from softbridge.plugin.registry import engines
from softbridge.testing import random_input_prompt, tiny_model

pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = [
    # TRL's own defaults, under transformers 5.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning"),
]
QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
PEFT = pytest.mark.skipif(engines()["peft"].unavailable() is not None, reason="PEFT is not installed")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, **{f"w{n}": n for n in range(2, 96)}}, "[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[PAD]", pad_token="[PAD]", eos_token="[EOS]")


def preferences() -> Any:
    from datasets import Dataset

    tokens = torch.randint(2, 96, (4, 3, 3), generator=torch.Generator().manual_seed(1)).tolist()
    names = ("prompt", "chosen", "rejected")
    texts = [[" ".join(f"w{number}" for number in each) for each in row] for row in tokens]
    return Dataset.from_list([dict(zip(names, row, strict=True)) for row in texts])


def losses(model: Any, reference: Any, folder: Path) -> list[float]:
    """DPO's loss at each of three steps, on the same four pairs."""
    told = trl.DPOConfig(
        str(folder), max_steps=3, learning_rate=0.05, per_device_train_batch_size=4, logging_steps=1, **QUIET
    )
    trainer = trl.DPOTrainer(
        model=model, ref_model=reference, args=told, train_dataset=preferences(), processing_class=tokenizer()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["input", "parameterisation"])
def test_dpo_starts_where_its_reference_is(kind: str, tmp_path: Path) -> None:
    """At ln 2, and falls; the reference stays the start, and the base is shared. Against the base it is not."""
    base = tiny_model("llama", torch.float32)
    prompt: Any = (
        PrefixTuning(4, MLP(8)) if kind == "parameterisation" else random_input_prompt(read_geometry(base.config), 4)
    )
    model = sb.attach(copy.deepcopy(base), prompt, seed=0)
    reference, start = sb.reference(model), sb.extract(model)
    own = {id(tensor) for tensor in model.parameters() if not tensor.requires_grad}
    assert {id(p) for name, p in reference.named_parameters() if not name.startswith("softbridge")} <= own
    assert not any(p.requires_grad for p in reference.parameters())
    found = losses(model, reference, tmp_path)
    assert abs(found[0] - math.log(2)) < 1e-4  # logs have four digits on transformers 4
    assert found[-1] < found[0] - 0.01
    assert sb.extract(model) != start
    assert sb.extract(reference).parts == start.parts
    if kind == "input":  # a parameterisation's first keys are as small as its weights
        elsewhere = losses(sb.attach(copy.deepcopy(base), prompt, seed=0), copy.deepcopy(base), tmp_path)
        assert abs(elsewhere[0] - math.log(2)) > 0.05


@PEFT
def test_a_toolkit_brings_its_own_reference() -> None:
    base = tiny_model("llama", torch.float32)
    model = sb.attach(base, random_input_prompt(read_geometry(base.config), 4), engine="peft")
    with pytest.raises(EngineError, match="bring their own reference"):
        sb.reference(model)


def test_grpo_measures_from_its_reference(tmp_path: Path) -> None:
    """Its trainer takes no reference and loads the base anew; given ours, the divergence starts at 0."""
    base = tiny_model("llama", torch.float32)
    base.config.eos_token_id = base.generation_config.eos_token_id = 1
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    prompt = random_input_prompt(read_geometry(base.config), 4)

    def divergence(ours: bool) -> float:
        model = sb.attach(copy.deepcopy(base), prompt)
        reference = sb.reference(model)
        told = trl.GRPOConfig(
            str(tmp_path), max_steps=1, beta=0.1, num_generations=2, max_completion_length=4,
            per_device_train_batch_size=4, logging_steps=1, **QUIET,
        )  # fmt: skip

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(set(text.split()))) for text in completions]

        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=told,
            train_dataset=preferences().remove_columns(["chosen", "rejected"]),
            processing_class=tokenizer(),
        )
        if ours:
            trl.trainer.utils.add_fused_lm_head(reference, temperature=told.temperature)
            trainer.ref_model = reference
        trainer.train()
        return next(float(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry)

    assert divergence(ours=True) == 0
    assert divergence(ours=False) > 0.05


def test_switched_off_it_is_the_reference_that_a_new_adapter_has() -> None:
    """TRL's reference for an adapter that it makes itself is the base model: so is ours with the prompt off."""
    base = tiny_model("llama", torch.float32)
    model, ids = sb.attach(copy.deepcopy(base), random_input_prompt(read_geometry(base.config), 4)), torch.arange(3, 9)

    def logits(of: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(input_ids=ids[None]).logits
            return found

    with model.softbridge.off():
        assert torch.equal(logits(model), logits(base))
    assert not torch.allclose(logits(model), logits(base), atol=0.1)
