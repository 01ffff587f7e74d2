"""Make `peft_<release>.safetensors`: files that releases of PEFT wrote, and what the release itself computed with them.

Every release runs with the transformers of its time, unmodified, on today's torch, in a folder of its own:

    pip install --no-deps --target OLD/0.3.0 peft==0.3.0 transformers==4.28.1 tokenizers==0.13.3
    PYTHONPATH=OLD/0.3.0 python tests/golden/make_peft.py

in an environment with softbridge, torch and transformers 4.57 with its dependencies (accelerate, huggingface_hub 0.36,
...), which the folder shadows. So were made, peft with transformers and tokenizers:

    0.3.0 with 4.28.1 and 0.13.3     0.5.0 with 4.31.0 and 0.13.3     0.7.1 with 4.36.2 and 0.15.2
    0.10.0 with 4.40.2 and 0.19.1    0.12.0 with 4.43.4 and 0.19.1    0.14.0 with 4.47.1 and 0.21.4
    0.16.0 with 4.53.3 and 0.21.4    0.18.0 with 4.57.6, the environment's own

The base models are in `peft_bases.safetensors`, float32 weights to be used in float64, written by
``python tests/golden/make_peft.py bases`` in the environment alone; metadata ``<family>``: the configuration, JSON;
``<family>.<name>``: the state dict; ``<family>.input_ids`` [B, T] and, for the encoder-decoder family, ``t5.labels``.

A release's file, for each case ``<family>.<method>``: ``<case>/<file>``, the bytes (uint8) of what `save_pretrained`
wrote (the model card for Bloom alone), and ``<case>.logits`` of the release itself: in float64, or in float32 where its
masks know no float64. Metadata
``versions``; ``failed``: JSON, case -> what the release raised where it could not run what it had saved. Bloom's and
GPT-BigCode's prefixes, which releases lay out by the model's own cache, have besides ``<case>.past.<layer>``, or
``<case>.past.<layer>.keys`` and ``.values``: what the release handed to the model for a batch of one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
BASES = HERE / "peft_bases.safetensors"
LENGTH = 3

COMMON = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    **COMMON,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
GPT = {**COMMON, "n_embd": 8, "n_layer": 2, "n_head": 4, "n_positions": 16, "n_inner": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {**SIZES, "num_key_value_heads": 2},
    "bert": {**SIZES, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {
        **COMMON,
        "d_model": 8,
        "d_kv": 2,
        "d_ff": 12,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "dropout_rate": 0.0,
    },
    "bloom": {**COMMON, "hidden_size": 8, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_bigcode": {**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
CLASSES = {"bert": ("AutoModelForSequenceClassification", "SEQ_CLS"), "t5": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM")}

#: Method -> PEFT's class of configuration, and settings.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-tuning": ("PromptTuningConfig", {}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 6}),
    "p-tuning-lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 2, "num_ranks": 2}),
    "context-aware": ("CPTConfig", {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 3]}),
    "prefix-tuning": ("PrefixTuningConfig", {}),
    "prefix-tuning-projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 6}),
}
CASES = [
    *(("gpt2", method) for method in METHODS),
    *(("llama", method) for method in ("prompt-tuning", "prefix-tuning")),
    *(("bert", method) for method in ("prompt-tuning", "p-tuning", "prefix-tuning")),
    *(("t5", method) for method in ("prompt-tuning", "p-tuning", "prefix-tuning")),
    *((family, "prefix-tuning") for family in ("bloom", "gpt_bigcode")),
]


def base(family: str, dtype: torch.dtype, weights: bool = True) -> Any:
    """The base model of a family in the transformers at hand, with eager attention."""
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    config._attn_implementation = "eager"
    name, _ = CLASSES.get(family, ("AutoModelForCausalLM", ""))
    model = getattr(transformers, name).from_config(config)
    if weights:
        stored = {
            key.split(".", 2)[2]: tensor
            for key, tensor in load_file(BASES).items()
            if key.startswith(f"{family}.weights.")
        }
        missing, unexpected = model.load_state_dict(stored, strict=False)
        parameters = {key for key, _ in model.named_parameters()}
        if unexpected or parameters & set(missing) - {"lm_head.weight"}:
            raise ValueError(f"{family}: missing {missing}, unexpected {unexpected}")
        model.tie_weights()
    return model.to(dtype).eval()


def make_bases() -> None:
    """Write the base models and the inputs; today's transformers names their tensors."""
    from softbridge.base import draw_weights

    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for family in FAMILIES:
        model = base(family, torch.float32, weights=False)
        draw_weights(model, 0)
        own = dict(model.named_parameters())
        tensors |= {f"{family}.weights.{key}": tensor.detach().float() for key, tensor in own.items()}
        tensors[f"{family}.input_ids"] = torch.randint(3, 24, (2, 5), generator=generator)
    tensors["t5.labels"] = torch.randint(3, 24, (2, 4), generator=generator)
    save_file(tensors, BASES, metadata={family: json.dumps(settings) for family, settings in FAMILIES.items()})


def run(family: str, method: str, directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Start a prompt with large numbers, compute, and save it as the release saves."""
    import peft

    name, settings = METHODS[method]
    task = CLASSES.get(family, ("", "CAUSAL_LM"))[1]
    if method != "context-aware":
        settings = {**settings, "num_virtual_tokens": LENGTH}
    torch.manual_seed(11)
    model = peft.get_peft_model(base(family, dtype), getattr(peft, name)(task_type=task, **settings)).eval()
    with torch.no_grad():
        for key, parameter in sorted(model.prompt_encoder.named_parameters()):
            if "embedding.weight" in key and method != "context-aware":
                parameter.normal_(std=0.7)
            elif method != "context-aware" or "delta" in key:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key:
                parameter.normal_(std=0.5)
    inputs = load_file(BASES)
    rows = inputs[f"{family}.input_ids"]
    told = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    if family == "t5":
        told["labels"] = inputs["t5.labels"]
    if method == "multitask":
        told["task_ids"] = torch.zeros(len(rows), dtype=torch.long)
    model.save_pretrained(directory)
    found: dict[str, torch.Tensor] = {}
    if family in ("bloom", "gpt_bigcode"):
        past = model.get_prompt(batch_size=1)
        for number, layer in enumerate(past if isinstance(past, tuple) else past.to_legacy_cache()):
            pair = (layer,) if isinstance(layer, torch.Tensor) else layer
            names = ("",) if len(pair) == 1 else (".keys", ".values")
            found |= {f"past.{number}{half}": tensor.detach().clone() for half, tensor in zip(names, pair, strict=True)}
    with torch.no_grad():
        found["logits"] = model(**told).logits
    return found


def main() -> None:
    """Write the file of the release that is imported."""
    import peft

    tensors: dict[str, torch.Tensor] = {}
    failed: dict[str, str] = {}
    for family, method in CASES:
        case = f"{family}.{method}"
        if not hasattr(peft, METHODS[method][0]):
            continue
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: dict[str, torch.Tensor] = {}
            for dtype in (torch.float64, torch.float32):  # some masks overflow in float64
                try:
                    found = run(family, method, Path(scratch), dtype)
                    break
                except Exception as error:
                    failed[case] = f"{type(error).__name__}: {error}"[:200]
            if found:
                failed.pop(case, None)
            for path in sorted(Path(scratch).iterdir()):
                if path.suffix != ".md" or family == "bloom":  # whose order of numbers depends on the release
                    tensors[f"{case}/{path.name}"] = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
        tensors |= {f"{case}.{name}": tensor.contiguous() for name, tensor in found.items()}
    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    metadata = {"versions": json.dumps(versions), "failed": json.dumps(failed)}
    save_file(tensors, HERE / f"peft_{peft.__version__}.safetensors", metadata=metadata)
    print(versions, json.dumps(failed, indent=1), sorted({key.split("/")[0] for key in tensors if "/" in key}))


if __name__ == "__main__":
    make_bases() if sys.argv[1:] == ["bases"] else main()
