"""What running and training a prompt costs, side by side: the native engine, PEFT, and the model without a prompt.

    python tests/benchmarks/engines.py [ROUNDS]

Every line alternates its ways A B C A B C on one small Llama in float32 and prints medians and their ratio to the
first. Only the ratios mean something, and on a busy machine they too move. That the ways compute the same is checked
before they are timed.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import softbridge as sb
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
#: Float32 in another order of summation.
CLOSE = 1e-3

Ways = Mapping[str, Callable[[], Any]]


def medians(ways: Ways, rounds: int) -> dict[str, float]:
    """Seconds of each, in turns; the first turn does not count."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def table(title: str, ways: Ways, rounds: int) -> None:
    found = medians(ways, rounds)
    first = next(iter(found.values()))
    figures = ", ".join(f"{name} {seconds * 1e3:.1f} ms ({seconds / first:.2f})" for name, seconds in found.items())
    print(f"{title}: {figures}", flush=True)


def check(ways: Ways, what: Callable[[Any], Tensor]) -> None:
    found = [what(way()) for way in ways.values()]
    for other in found[1:]:
        assert float((other - found[0]).abs().max()) <= CLOSE * float(found[0].abs().max())


def make() -> Any:
    model = tiny_model("llama", torch.float32, **SIZES)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    return model


def attached(model: Any, prompt: SoftPrompt, engine: str) -> Any:
    running = sb.attach(copy.deepcopy(model), prompt, engine=engine)
    for name, parameter in running.named_parameters():  # PEFT attaches a prompt to run it, not to train it
        parameter.requires_grad_("prompt_encoder" in name or name.startswith("softbridge."))
    return running


def training(model: Any, prompt: SoftPrompt, title: str, batch: int, length: int, rounds: int) -> None:
    ids = torch.randint(3, 90, (batch, length))
    labels = ids.clone()
    labels[:, 0] = -100  # with vectors in the input PEFT asks for it, too
    engines = {engine: attached(model, prompt, engine) for engine in ("native", "peft")}

    def step(running: Any) -> Tensor:
        running.zero_grad()
        loss = running(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach()

    def bare() -> Tensor:
        """The frozen model, forward and back to its embeddings."""
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embedded, labels=labels).loss
        loss.backward()
        return loss.detach()

    ways: dict[str, Callable[[], Tensor]] = {
        name: (lambda running=running: step(running)) for name, running in engines.items()
    }
    check(ways, lambda loss: loss)
    table(title, {**ways, "no prompt": bare}, rounds)


def decoding(model: Any, prompt: SoftPrompt, title: str, batch: int, tokens: int, rounds: int) -> None:
    ids = torch.randint(3, 90, (batch, 8))

    def generate(running: Any) -> Tensor:
        made: Tensor = running.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return made[:, -tokens:]

    engines = {engine: attached(model, prompt, engine) for engine in ("native", "peft")}
    ways: dict[str, Callable[[], Tensor]] = {
        name: (lambda running=running: generate(running)) for name, running in engines.items()
    }
    table(title, {**ways, "no prompt": lambda: generate(model)}, rounds)


def many(model: Any, count: int, rounds: int) -> None:
    """Rows with prompts of their own in one call, and a call for each."""
    geometry = read_geometry(model.config)
    prompts = {f"p{n}": random_prefix(geometry, 20, seed=n) for n in range(count)}
    ids = torch.randint(3, 90, (count, 32))
    bank = sb.PromptBank(prompts)
    together = sb.attach(copy.deepcopy(model), bank)
    import peft

    first = sb.attach(copy.deepcopy(model), prompts["p0"], engine="peft")
    config = first.peft_config[first.active_adapter]
    assert isinstance(first, peft.PeftModel)
    for name, prompt in prompts.items():
        first.add_adapter(name, config)
        flat = torch.from_numpy(prompt.prefixes[0].flat().copy())
        first.prompt_encoder[name].embedding.weight.data.copy_(flat)

    def at_once() -> Tensor:
        with torch.no_grad(), bank.rows(list(prompts)):
            return together(input_ids=ids).logits

    def one_by_one() -> Tensor:
        rows = []
        with torch.no_grad():
            for row, name in enumerate(prompts):
                first.set_adapter(name)
                rows.append(first(input_ids=ids[row : row + 1]).logits)
        return torch.cat(rows)

    ways = {"bank": at_once, "peft, set_adapter": one_by_one}
    check(ways, lambda logits: logits)
    table(f"{count} rows with {count} prefixes of 20", ways, rounds)


def main(rounds: int) -> None:
    torch.manual_seed(0)
    model = make()
    geometry = read_geometry(model.config)
    for length, batch, tokens in ((20, 4, 128), (512, 4, 128), (2048, 4, 128)):
        title = f"training step, prefix of {length}, {batch} x {tokens}"
        training(model, random_prefix(geometry, length), title, batch, tokens, rounds)
    training(model, random_input_prompt(geometry, 20), "training step, prompt of 20, 4 x 128", 4, 128, rounds)
    for length, batch in ((20, 8), (2048, 8), (2048, 32)):
        decoding(
            model, random_prefix(geometry, length), f"16 tokens, prefix of {length}, {batch} rows", batch, 16, rounds
        )
    many(model, 32, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
