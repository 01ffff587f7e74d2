"""What named prefixes cost in vLLM: a batch of requests with a prefix each, against the base model's own.

    python tests/benchmarks/vllm_throughput.py [ROUNDS]

It needs vLLM, and runs it in this process, in float32, without its prefix cache (which would answer every round but the
first). All ways alternate, and medians and their ratio to the first are printed. Only the ratios mean something, and on
a busy machine they too move. That the prompts are served is what `tests/serving/test_vllm.py` shows.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from softbridge.base import BaseModel
from softbridge.testing import random_prefix, tiny_model
from softbridge_vllm.client import Prompts
from softbridge_vllm.format import FORMAT
from softbridge_vllm.server import started
from softbridge_vllm.settings import Settings

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
#: Requests in a batch, each with another prefix; virtual tokens; tokens of a text; tokens of an answer.
BATCH, LENGTH, TEXT, ANSWER = 32, 64, 32, 16


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        base, folder = Path(scratch, "base"), Path(scratch, "prompts")
        model = tiny_model("llama", torch.float32, **SIZES)
        model.save_pretrained(base)
        for number in range(BATCH):
            prompt = random_prefix(BaseModel(model.config).geometry, LENGTH, seed=number)
            (folder / f"{number}").mkdir(parents=True)
            for name, content in FORMAT.write(prompt, None).items():
                (folder / f"{number}" / name).write_bytes(content)
        client, generator = Prompts(folder, marker=0), np.random.default_rng(0)
        texts = generator.integers(3, 96, (BATCH, TEXT)).tolist()
        longer = generator.integers(3, 96, (BATCH, LENGTH + TEXT)).tolist()
        ways: Mapping[str, list[dict[str, Any]]] = {
            f"bare, {TEXT} tokens": [client.request(None, text) for text in texts],
            f"bare, {LENGTH + TEXT} tokens": [client.request(None, text) for text in longer],
            f"a prefix of {LENGTH} each, {TEXT} tokens": [
                client.request(str(number), text) for number, text in enumerate(texts)
            ],
            f"one prefix of {LENGTH}, {TEXT} tokens": [client.request("0", text) for text in texts],
        }
        with started(
            base, Settings(str(folder), 0), enable_prefix_caching=False, max_num_batched_tokens=8192
        ) as engine:
            spent = timed(engine, ways, rounds)
    first = statistics.median(next(iter(spent.values())))
    print(f"{BATCH} requests in a batch, {ANSWER} tokens each, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        print(f"{name}: {median * 1e3:.0f} ms ({median / first:.2f}); {spread}")


def timed(engine: Any, ways: Mapping[str, list[dict[str, Any]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns; the first turn does not count."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, detokenize=False, ignore_eos=True)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, requests in ways.items():
            start = time.perf_counter()
            found = engine.generate(requests, sampling, use_tqdm=False)
            if turn:
                spent[name].append(time.perf_counter() - start)
            assert all(len(one.outputs[0].token_ids) == ANSWER for one in found)
    return spent


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
