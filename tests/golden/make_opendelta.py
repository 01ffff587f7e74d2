"""Make `opendelta.safetensors`: files that OpenDelta wrote, and what it computed with them itself.

OpenDelta 0.3.2, unmodified, on transformers 4.26.1 and today's torch:

    pip install --no-deps opendelta==0.3.2 delta-center-client==0.0.4
    pip install transformers==4.26.1 tokenizers==0.13.3 "numpy<2" decorator rich web.py gitpython
    PYTHONPATH=tests/golden python tests/golden/make_opendelta.py

Its client of a model hub and its drawing of models want `oss2` and `turtle`, which nothing here uses. Base models are
those of `peft_bases.safetensors`, in float64; BART, which is not there, is ``bart.weights.*``, its configuration the
metadata ``bart``, its inputs ``bart.input_ids`` and ``bart.labels``.

Each case is ``<family>.<method>``: ``<case>/<file>``, the bytes (uint8, packed by zlib) of what `save_finetuned`
wrote, and ``<case>.logits`` [B, T, V] or [B, C], in float64; vectors in front of a decoder have positions there.
"""

from __future__ import annotations

import json
import sys
import tempfile
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_peft import BASES, COMMON, base
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LENGTH = 3
MLP = {"embed_dim": 5, "mid_dim": 6}
BART = {
    **COMMON,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
#: Case -> settings of the prefix, None: a soft prompt; what else is trained.
CASES: dict[str, tuple[dict[str, Any] | None, list[str]]] = {
    **{f"{family}.soft": (None, []) for family in ("gpt2", "bert", "t5")},
    **{f"{family}.prefix": ({"reparameterize": False}, []) for family in ("gpt2", "t5")},
    **{f"{family}.mlp": (MLP, []) for family in ("gpt2", "t5")},
    "bert.mlp": (MLP, ["classifier"]),
    "bart.prefix": ({"reparameterize": False, "modified_modules": ["self_attn"]}, []),
    "bart.mlp": ({**MLP, "modified_modules": ["self_attn"]}, []),
    "t5.some": ({"reparameterize": False, "modified_modules": ["2.layer.0"]}, []),
    "t5.some-mlp": ({**MLP, "modified_modules": ["decoder.block.1.layer.0", "encoder.block.0.layer.0"]}, []),
    "gpt2.some-mlp": ({**MLP, "modified_modules": ["1.attn"]}, []),
}


def model_of(family: str, weights: dict[str, torch.Tensor]) -> Any:
    if family != "bart":
        return base(family, torch.float64)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).eval()
    if not weights:
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)
        weights |= {f"bart.weights.{name}": p.detach().clone() for name, p in model.named_parameters()}
        weights["bart.input_ids"] = torch.randint(3, 24, (2, 5), generator=generator)
        weights["bart.labels"] = torch.randint(3, 24, (2, 4), generator=generator)
    model.load_state_dict({n.removeprefix("bart.weights."): p for n, p in weights.items()}, strict=False)
    return model.double()


def make() -> None:
    for name in ("oss2", "turtle"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["turtle"].back = None  # type: ignore[attr-defined]
    from opendelta import PrefixModel, SoftPromptModel

    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for case, (settings, others) in CASES.items():
        family = case.split(".")[0]
        torch.manual_seed(len(tensors))
        model = model_of(family, weights)
        inputs = {**load_file(BASES), **weights}
        with torch.random.fork_rng():
            if settings is None:
                delta = SoftPromptModel(model, soft_token_num=LENGTH, token_init=False)
            else:
                delta = PrefixModel(model, prefix_token_num=LENGTH, **settings)
        delta.freeze_module(exclude=["deltas", *others])
        model.double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0, 0.7)
        ids = inputs[f"{family}.input_ids"]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if f"{family}.labels" in inputs:
            batch["decoder_input_ids"] = inputs[f"{family}.labels"]
        with torch.no_grad():
            tensors[f"{case}.logits"] = model(**batch).logits
        with tempfile.TemporaryDirectory() as folder:
            delta.save_finetuned(folder)
            for path in Path(folder).iterdir():
                packed = np.frombuffer(zlib.compress(path.read_bytes(), 9), np.uint8)
                tensors[f"{case}/{path.name}"] = torch.from_numpy(packed.copy())
    versions = {"opendelta": "0.3.2", "transformers": transformers.__version__, "torch": torch.__version__}
    metadata = {"versions": json.dumps(versions), "bart": json.dumps(BART)}
    save_file({**weights, **tensors}, HERE / "opendelta.safetensors", metadata=metadata)


if __name__ == "__main__":
    make()
