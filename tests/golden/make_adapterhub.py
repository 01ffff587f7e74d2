"""Make `adapterhub_<family>.safetensors`: what AdapterHub itself computed, for environments that cannot hold it.

Run in an environment with AdapterHub: ``python tests/golden/make_adapterhub.py``. One file per family (gpt2, llama,
bert, t5), in the safetensors format, everything in float64 unless said otherwise:

- metadata ``config``: the base model's configuration, JSON; ``family``; ``toolkit``: what AdapterHub's file says;
- ``weights.<name>``: the base model's state dict;
- ``file.adapter_config.json``, ``file.pytorch_adapter.bin``: the bytes (uint8) of the directory that AdapterHub's
  `save_adapter` wrote after a few steps of training: reparameterised for gpt2 and t5, flat for llama and bert;
  t5 has all three sites;
- ``input_ids`` [B, T] (int64), and for t5 ``decoder_input_ids`` [B, T'];
- ``attention_mask`` [B, T] (int64): the last row ends in padding;
- ``logits``: AdapterHub's with the prompt, no mask; ``logits.masked``: with the mask; ``logits.base``: no prompt, no
  mask. All under eager attention.

Numbers differ between machines in the last bits: compare with a tolerance (float32 islands: 1e-5, else 1e-10).
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch

from softbridge.tensors import from_torch
from softbridge.testing import tiny_model
from softbridge.untrusted import Files, safetensors_bytes
from softbridge_adapterhub.engine import ENGINE

METHODS = {
    "gpt2": "prefix-tuning",
    "llama": "prefix-tuning-flat",
    "bert": "prefix-tuning-flat",
    "t5": "prefix-tuning",
}
LENGTH = 5


def make(family: str, method: str) -> bytes:
    # transformers 5 builds T5 with tied embeddings whatever its configuration says; tied, both compute the same.
    model = tiny_model(family, **({"tie_word_embeddings": True} if family == "t5" else {}))
    generator = torch.Generator().manual_seed(7)
    inputs = {"input_ids": torch.randint(3, model.config.vocab_size, (2, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, model.config.vocab_size, (2, 6), generator=generator)
    mask = torch.ones_like(inputs["input_ids"])
    mask[-1, -2:] = 0

    with tempfile.TemporaryDirectory() as scratch:
        ENGINE.train_example(copy.deepcopy(model), method, Path(scratch), length=LENGTH, steps=5, seed=11)
        written = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
        toolkit = Files(scratch).json("adapter_config.json")["version"]
        running = copy.deepcopy(model)
        adapters.init(running)
        running.load_adapter(scratch, set_active=True)
        running.eval()

    tensors = {f"weights.{name}": from_torch(tensor) for name, tensor in model.state_dict().items()}
    tensors |= {f"file.{name}": np.frombuffer(content, np.uint8) for name, content in written.items()}
    tensors |= {name: from_torch(tensor) for name, tensor in inputs.items()}
    tensors["attention_mask"] = from_torch(mask)
    tensors["logits"] = logits(running, inputs)
    tensors["logits.masked"] = logits(running, {**inputs, "attention_mask": mask})
    tensors["logits.base"] = logits(model, inputs)
    return safetensors_bytes(
        tensors, {"config": model.config.to_json_string(), "family": family, "toolkit": str(toolkit)}
    )


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return from_torch(model(**inputs).logits)


if __name__ == "__main__":
    for family, method in METHODS.items():
        content = make(family, method)
        target = Path(__file__).parent / f"adapterhub_{family}.safetensors"
        target.write_bytes(content)
        print(f"{target.name}: {len(content)} bytes")
