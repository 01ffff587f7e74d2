"""TRL's supervised fine-tuning trainer, unmodified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import softbridge as sb
from softbridge.errors import EngineError
from softbridge.methods import MLP, Method, PrefixTuning, PromptTuning, PTuningV2
from softbridge.plugin.registry import engines
from softbridge.testing import tiny_model

pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings(
    # TRL's own defaults, under transformers 5.
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)
PEFT = pytest.mark.skipif(engines()["peft"].unavailable() is not None, reason="PEFT is not installed")


def trainer(model: Any, folder: Path, **settings: Any) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, **{f"w{n}": n for n in range(2, 96)}}, "[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[PAD]", pad_token="[PAD]", eos_token="[EOS]")
    tokens = torch.randint(2, 96, (12, 7), generator=torch.Generator().manual_seed(1))
    texts = [{"text": " ".join(f"w{number}" for number in row)} for row in tokens.tolist()]
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "bf16": False}
    steps = {"max_steps": 4, "save_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    told = trl.SFTConfig(str(folder), **{**quiet, **steps, **settings})
    return trl.SFTTrainer(model=model, args=told, train_dataset=Dataset.from_list(texts), processing_class=tokenizer)


@pytest.mark.parametrize(
    ("engine", "method", "settings"),
    [
        ("native", PrefixTuning(4, MLP(8)), {}),  # its default is gradient checkpointing
        ("native", PromptTuning(4), {}),
        pytest.param("peft", PTuningV2(4), {"gradient_checkpointing": False}, marks=PEFT),
    ],
    ids=["native-made-prefix", "native-vectors", "peft-prefix"],
)
def test_it_trains_and_resumes(engine: str, method: Method, settings: dict[str, Any], tmp_path: Path) -> None:
    def attached(seed: int) -> Any:
        return sb.attach(tiny_model("llama", torch.float32), method, engine=engine, seed=seed)

    model = attached(0)
    start = sb.extract(model)
    trainer(model, tmp_path, **settings).train()
    done = sb.extract(model)
    assert done != start
    assert sb.load(tmp_path / "checkpoint-4", base=tiny_model("llama")).parts == done.parts
    again = attached(1)
    trainer(again, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert sb.extract(again) == done


@PEFT
def test_its_default_is_nothing_for_pefts_prefixes(tmp_path: Path) -> None:
    run = trainer(sb.attach(tiny_model("llama", torch.float32), PTuningV2(4), engine="peft", seed=0), tmp_path)
    with pytest.raises(EngineError, match="gradient checkpointing"):
        run.train()
