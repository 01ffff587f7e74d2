"""Make `diffusers_textual_inversion.safetensors`: what diffusers' own loader makes of embeddings, on small text models.

Run in an environment with diffusers: ``python tests/golden/make_diffusers.py``. In the file:

- metadata ``config``: of the text models, JSON; ``versions``; ``<case>``: the name of the case's file;
- ``weights.<name>``: the state dict of the `CLIPTextModelWithProjection`, float32, to be used in float64; the
  `CLIPTextModel` has the same but for the projection;
- ``<case>.file``: the bytes (uint8) of the file that `load_textual_inversion` was given;
- ``<case>.input_ids`` [B, T]: what the tokenizer makes of texts with the token, after that. Ids from the vocabulary's
  size on are those that diffusers added;
- ``<case>.CLIPTextModel.last_hidden_state`` and ``.pooler_output``, ``<case>.CLIPTextModelWithProjection...`` and
  ``.text_embeds``: float64, with no mask, as Stable Diffusion runs them.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from softbridge.arrays import from_torch
from softbridge.base import draw_weights
from softbridge.untrusted import safetensors_bytes

FILE = Path(__file__).with_name("diffusers_textual_inversion.safetensors")
TEXTS = ("a cat <tale> sat", "<tale> on it", "see it <tale>")
LENGTH, H = 16, 16
VECTORS = torch.from_numpy(np.random.default_rng(0).normal(0, 0.8, (3, H)).astype(np.float32))


def a1111(path: Path, vectors: torch.Tensor) -> None:
    """As `Embedding.save` has it. diffusers reads no ParameterDict, which old files have."""
    facts = {"name": "<tale>", "step": 500, "sd_checkpoint": "c0ffee", "sd_checkpoint_name": "whales"}
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(vectors)}, **facts}, path)


#: Case -> the name of its file, and what writes it.
CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a1111": ("tale.pt", lambda path: a1111(path, VECTORS)),
    "diffusers one": ("learned_embeds.bin", lambda path: torch.save({"<tale>": VECTORS[0]}, path)),
    "diffusers several": (
        "learned_embeds.safetensors",
        lambda path: save_file({"<tale>": VECTORS}, path),
    ),
}


def tokenizer(folder: Path) -> Any:
    """Of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def models(words: int) -> list[Any]:
    sizes = {"hidden_size": H, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    facts = {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1, "projection_dim": 12}
    config = CLIPTextConfig(vocab_size=words, max_position_embeddings=LENGTH, **sizes, **facts)
    config._attn_implementation = "sdpa"
    both = [CLIPTextModelWithProjection(config).double().eval(), CLIPTextModel(config).double().eval()]
    draw_weights(both[0], seed=0)
    both[1].load_state_dict(
        {name.removeprefix("text_model."): t for name, t in both[0].state_dict().items()}, strict=False
    )
    return both


def make() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None

        def __init__(self, words: Any, text_encoder: Any) -> None:
            self.tokenizer, self.text_encoder, self.components = words, text_encoder, {}

    tensors: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as scratch:
        words = tokenizer(Path(scratch))
        both = models(len(words))
        tensors |= {f"weights.{name}": from_torch(t.float()) for name, t in both[0].state_dict().items()}
        for case, (file, write) in CASES.items():
            write(Path(scratch) / file)
            tensors[f"{case}.file"] = np.frombuffer((Path(scratch) / file).read_bytes(), np.uint8)
            for model in both:
                pipeline = Pipeline(copy.deepcopy(words), copy.deepcopy(model))
                pipeline.load_textual_inversion(scratch, weight_name=file)
                texts = pipeline.maybe_convert_prompt(list(TEXTS), pipeline.tokenizer)
                ids = pipeline.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
                with torch.no_grad():
                    output = pipeline.text_encoder(ids)
                tensors[f"{case}.input_ids"] = from_torch(ids)
                for name, states in output.items():
                    tensors[f"{case}.{type(model).__name__}.{name}"] = from_torch(states)
        versions = {name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "torch")}
        told = {"config": both[0].config.to_json_string(), "versions": json.dumps(versions)}
    return tensors, told | {case: file for case, (file, _) in CASES.items()}


if __name__ == "__main__":
    FILE.write_bytes(safetensors_bytes(*make()))
