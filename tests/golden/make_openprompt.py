"""Make `openprompt.safetensors`: files that OpenPrompt wrote, and what it computed with them itself.

OpenPrompt 1.0.1, unmodified, on transformers 4.26.1 and today's torch:

    pip install --no-deps openprompt==1.0.1
    pip install transformers==4.26.1 tokenizers==0.13.3 "numpy<2" yacs dill tensorboardX nltk rouge==1.0.0 \\
        datasets==2.14.7 "pyarrow<15" "pandas<2.3" sentencepiece "scipy<1.14" "scikit-learn<1.6"
    PYTHONPATH=tests/golden python tests/golden/make_openprompt.py

Base models are those of `peft_bases.safetensors`, in float64. Each case is ``<family>.<template>``: ``<case>/<file>``,
the bytes (uint8, packed by zlib), of `BaseRunner.save_checkpoint` (best.ckpt), of a whole model's state (model.pt) or
of the template's (template.pt); ``<case>.ids`` [B, T], -1 for a soft token; ``<case>.logits`` [B, T, V] or [B, C], in
float64; where there is a verbaliser, ``<case>.scores`` [B, C] at the last position.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from make_peft import BASES, base
from openprompt.data_utils import InputFeatures
from openprompt.pipeline_base import PromptForClassification, PromptModel
from openprompt.prompts import ManualVerbalizer, MixedTemplate, PtuningTemplate, SoftTemplate, SoftVerbalizer
from openprompt.prompts.prefix_tuning_template import PrefixTuningTemplate
from openprompt.trainer import BaseRunner
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LENGTH = 3
TEXT = '{"soft"} {"soft"} {"placeholder": "text_a"} {"soft"} {"mask"}'
#: Case -> class of the template, settings, and of what the file is.
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gpt2.soft": (SoftTemplate, {"num_tokens": LENGTH}, "template.pt"),
    "t5.soft": (SoftTemplate, {"num_tokens": LENGTH}, "template.pt"),
    "gpt2.prefix": (PrefixTuningTemplate, {"num_token": LENGTH, "mid_dim": 6}, "best.ckpt"),
    "t5.prefix": (PrefixTuningTemplate, {"num_token": LENGTH, "mid_dim": 6}, "template.pt"),
    "t5.encoder": (
        PrefixTuningTemplate,
        {"num_token": LENGTH, "mid_dim": 6, "using_decoder_past_key_values": False},
        "template.pt",
    ),
    "gpt2.mixed": (MixedTemplate, {"text": TEXT}, "model.pt"),
    "bert.mixed": (MixedTemplate, {"text": TEXT}, "template.pt"),
    "gpt2.lstm": (PtuningTemplate, {"text": TEXT, "prompt_encoder_type": "lstm"}, "template.pt"),
    "t5.mlp": (PtuningTemplate, {"text": TEXT, "prompt_encoder_type": "mlp"}, "template.pt"),
}


class Words:
    """A tokenizer of three words."""

    def encode(self, word: str, add_special_tokens: bool = False) -> list[int]:
        return [{" bad": 4, " poor": 7, " good": 9}[word]]


def make() -> None:
    inputs = load_file(BASES)
    tensors: dict[str, torch.Tensor] = {}
    for case, (kind, settings, file) in CASES.items():
        family = case.split(".")[0]
        torch.manual_seed(len(tensors))
        plm = base(family, torch.float64)
        template = kind(model=plm, tokenizer=None, **settings).double()
        plain = {name for name, _ in template.named_parameters() if not name.startswith("raw_embedding")}
        for name, parameter in template.named_parameters():
            if name in plain and parameter.is_floating_point():
                parameter.data.normal_(0, 0.7)
        ids = inputs[f"{family}.input_ids"]
        row = ids
        if "text" in settings:
            soft = torch.full((len(ids), 1), -1)
            row = torch.cat([ids[:, :1], soft, soft, ids[:, 1:4], soft, ids[:, 4:]], 1)
        tensors[f"{case}.ids"] = row.clone()
        loss = torch.zeros_like(row)
        loss[:, -1] = 1
        batch = {"input_ids": row.clamp(min=0), "attention_mask": torch.ones_like(row), "loss_ids": loss}
        if "text" in settings:
            batch["soft_token_ids"] = (row < 0).long().cumsum(1) * (row < 0)
        if family == "t5":
            batch["decoder_input_ids"] = inputs["t5.labels"]
        model: Any = PromptModel(plm, template, freeze_plm=True)
        optimiser = torch.optim.AdamW([p for p in template.parameters() if p.requires_grad], lr=0.01)
        model(InputFeatures(**batch)).logits.square().mean().backward()
        optimiser.step()
        with torch.no_grad():
            tensors[f"{case}.logits"] = model(InputFeatures(**batch)).logits.contiguous()
        if file != "template.pt":
            if file == "best.ckpt":
                verbaliser = SoftVerbalizer(tokenizer=None, model=plm, num_classes=3).double()
                verbaliser.head.weight.data.normal_()
            else:
                words = [["bad", "poor"], ["good"]]
                verbaliser = ManualVerbalizer(tokenizer=Words(), num_classes=2, label_words=words)
            model = PromptForClassification(plm, template, verbaliser, freeze_plm=True)
            with torch.no_grad():
                tensors[f"{case}.scores"] = model(InputFeatures(**batch))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, file)
            if file == "best.ckpt":
                runner = SimpleNamespace(
                    clean=False, inner_model=model, optimizers=[optimiser], schedulers=[None], cur_epoch=1,
                    best_score=0.5, global_step=10, checkpoint_path=lambda name, path=path: str(path),
                )  # fmt: skip
                BaseRunner.save_checkpoint(runner, "best", extra={"validation_metric": 0.5})
            else:
                torch.save((model if file == "model.pt" else template).state_dict(), path)
            packed = np.frombuffer(zlib.compress(path.read_bytes(), 9), np.uint8)
            tensors[f"{case}/{file}"] = torch.from_numpy(packed.copy())
    versions = {"openprompt": "1.0.1", "transformers": transformers.__version__, "torch": torch.__version__}
    save_file(tensors, HERE / "openprompt.safetensors", metadata={"versions": json.dumps(versions)})


if __name__ == "__main__":
    make()
