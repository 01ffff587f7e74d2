"""What named prefixes cost in vLLM: a batch of requests with a prefix each, against the base model's own.

    python tests/benchmarks/vllm_throughput.py [ROUNDS]

It needs vLLM, and runs it in this process, in float32, without its prefix cache (which would answer every round but the
first). If PEFT is installed, its calls are timed, too: one for each prompt, since a batch has one adapter. All ways
alternate, and medians and their ratio to the first are printed. Only the ratios mean something, and on
a busy machine they too move. That the prompts are served is what `tests/serving/test_vllm.py` shows.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.testing import as_bytes, random_prefix, tiny_model
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
            for name, content in as_bytes(FORMAT.write(prompt, None)).items():
                (folder / f"{number}" / name).write_bytes(content)
        client, generator = Prompts(folder, marker=0), np.random.default_rng(0)
        texts = generator.integers(3, 96, (BATCH, TEXT)).tolist()
        longer = generator.integers(3, 96, (BATCH, LENGTH + TEXT)).tolist()
        requests: Mapping[str, list[dict[str, Any]]] = {
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
            ways: dict[str, Callable[[], None]] = {
                name: partial(answered, engine, batch) for name, batch in requests.items()
            }
            if importlib.util.find_spec("peft") is not None:
                ways[f"PEFT: {BATCH} calls, a prefix of {LENGTH} each, {TEXT} tokens"] = in_peft(
                    model, texts, Path(scratch, "peft")
                )
            spent = timed(ways, rounds)
    first = statistics.median(next(iter(spent.values())))
    print(f"{BATCH} requests in a batch, {ANSWER} tokens each, {torch.get_num_threads()} threads, {rounds} rounds")
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        print(f"{name}: {median * 1e3:.0f} ms ({median / first:.2f}); {spread}")


def answered(engine: Any, requests: list[dict[str, Any]]) -> None:
    """One batch in vLLM."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, detokenize=False, ignore_eos=True)
    found = engine.generate(requests, sampling, use_tqdm=False)
    assert all(len(one.outputs[0].token_ids) == ANSWER for one in found)


def in_peft(model: Any, texts: list[list[int]], folder: Path) -> Callable[[], None]:
    """The same prompts and texts, each in a call of PEFT's own `generate`."""
    import peft

    running: Any = None
    for number in range(BATCH):
        prompt = random_prefix(BaseModel(model.config).geometry, LENGTH, seed=number)
        sb.save(prompt, folder / str(number), format="peft", base=model)
        if running is None:
            running = peft.PeftModel.from_pretrained(model, folder / "0", adapter_name="0").eval()
        else:
            running.load_adapter(folder / str(number), adapter_name=str(number))

    def run() -> None:
        for number, text in enumerate(texts):
            running.set_adapter(str(number))
            ids = torch.tensor([text])
            found = running.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=ANSWER,
                max_new_tokens=ANSWER,
            )
            assert found.shape[1] == TEXT + ANSWER

    return run


def timed(ways: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, in turns; the first turn does not count."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                spent[name].append(time.perf_counter() - start)
    return spent


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
