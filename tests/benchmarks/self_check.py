"""What the engine's check of itself costs: processor time the first time, from the folder, from memory, and per call.

    python tests/benchmarks/self_check.py

Models have the sizes of published ones and no weights (they are on torch's meta device): the check makes its own small
copy. Nothing is asserted: the machine may be busy. Importing transformers and its modelling files is not counted.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.prompt import SoftPrompt
from softbridge.selfcheck.verdict import FOLDER, Verdict, forget
from softbridge.testing import random_input_prompt, random_prefix, tiny_model
from softbridge_native.engine import ENGINE
from softbridge_native.selfcheck import SelfCheck

#: A published model -> its class and configuration, as its config.json has it.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "gpt2", {}),
    "Llama 3 70B": (
        "LlamaForCausalLM",
        "llama",
        {
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "intermediate_size": 28672,
            "max_position_embeddings": 8192,
        },
    ),
    "Gemma 2 9B": (
        "Gemma2ForCausalLM",
        "gemma2",
        {
            "num_hidden_layers": 42,
            "hidden_size": 3584,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "intermediate_size": 14336,
        },
    ),
    "BERT large": (
        "BertForSequenceClassification",
        "bert",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "T5 large": (
        "T5ForConditionalGeneration",
        "t5",
        {"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_ff": 4096, "decoder_start_token_id": 0},
    ),
    "BART large": ("BartForConditionalGeneration", "bart", {}),
    "Mixtral 8x7B": ("MixtralForCausalLM", "mixtral", {}),
}
CALLS = 300


def made(name: str) -> Any:
    """A model without weights."""
    kind, family, settings = MODELS[name]
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


def prompts(model: Any) -> dict[str, SoftPrompt]:
    """A prompt of each kind that the engine runs on the model."""
    geometry = BaseModel(model.config).geometry
    found = {"prefix": random_prefix(geometry, 20), "input": random_input_prompt(geometry, 20)}
    return {kind: prompt for kind, prompt in found.items() if not ENGINE.obstacles(prompt, model)}


def spent(call: Callable[[], object]) -> float:
    """Milliseconds of processor."""
    before = time.process_time()
    call()
    return (time.process_time() - before) * 1e3


def checked(model: Any, prompt: SoftPrompt) -> Verdict:
    """What the first call of a model does."""
    check = SelfCheck(ENGINE, model, prompt)
    check.learn(prompt)
    return check.verdicts[0]


def first_times() -> None:
    print(f"{'milliseconds of processor':26} {'prompt':8} {'first':>8} {'folder':>8} {'memory':>8}  verdict, copy")
    for name in MODELS:
        model = made(name)
        for kind, prompt in prompts(model).items():
            first = spent(lambda: checked(model, prompt))  # noqa: B023
            forget()
            folder = spent(lambda: checked(model, prompt))  # noqa: B023
            memory = spent(lambda: checked(model, prompt))  # noqa: B023
            found = checked(model, prompt)
            print(f"{name:26} {kind:8} {first:8.0f} {folder:8.1f} {memory:8.1f}  {found.status}, {found.note}")


def per_call() -> None:
    """Alternating, so that a busy machine is as busy for both."""
    plain = tiny_model("llama", torch.float32)
    prompt = random_prefix(BaseModel(plain.config).geometry)
    off, on = (sb.attach(tiny_model("llama", torch.float32), prompt, self_check=check) for check in (False, True))
    ids = torch.randint(3, 90, (1, 9))
    times: dict[str, list[float]] = {"off": [], "on": []}
    with torch.no_grad():
        for number in range(CALLS):
            for name, model in (("off", off), ("on", on)):
                took = spent(lambda: model(input_ids=ids))  # noqa: B023
                if number >= 20:
                    times[name].append(took)
    each = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    print(
        f"a call of a tiny Llama with a prefix, the median of {CALLS}: {each['off']:.3f} ms off, {each['on']:.3f} ms on"
    )


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    checked(tiny_model("gpt2"), random_input_prompt(BaseModel(tiny_model("gpt2").config).geometry))  # imports
    forget()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        first_times()
        per_call()


if __name__ == "__main__":
    main()
