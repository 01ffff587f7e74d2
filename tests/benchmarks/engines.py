"""What running and training a prompt costs, side by side: the native engine, its peers, and the model without a prompt.

    python tests/benchmarks/engines.py [--rounds N] [training | generating | long | bank] ...

The limit of a row is the bare model: with the same prefix in its cache, or the vectors in its input, where that is the
same function; frozen and without a prompt, forwards and back to its input, where a prompt is trained. A peer that
cannot run a row here is left out of it.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from side_by_side import check, heading, measure
from torch import Tensor
from transformers import DynamicCache

import softbridge as sb
from softbridge.errors import SoftbridgeError
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_model

LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16384,
}
GPT2 = {"n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 4096}
#: Hardly anything is computed in so many layers: what is left is what each call of each costs.
DEEP = {"llama": {"num_hidden_layers": 32}, "gpt2": {"n_layer": 32}}


def make(family: str, **sizes: int) -> Any:
    model = tiny_model(family, torch.float32, **sizes)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None
    return model


def attached(model: Any, prompt: SoftPrompt, engine: str) -> Any:
    running = sb.attach(copy.deepcopy(model), prompt, engine=engine)
    if engine == "peft":  # which attaches a prompt to run it, not to train it
        for name, parameter in running.named_parameters():
            parameter.requires_grad_("prompt_encoder" in name)
    return running


def engines_for(model: Any, prompt: SoftPrompt, does: Callable[[Any], Any]) -> dict[str, Any]:
    """The model in each engine that does this here, the native one first."""
    found = {}
    for name in ("native", *sorted(set(sb.engines()) - {"native"})):
        try:
            running = attached(model, prompt, name)
            does(running)
        except SoftbridgeError as error:
            if name == "native":
                raise
            print(f"<!-- {name}: {error.found} -->")
        else:
            found[name] = running
    return found


def stacked(prompts: Sequence[SoftPrompt]) -> DynamicCache:
    """A cache that begins with the prefix of each row."""
    cache = DynamicCache()
    for layer in prompts[0].prefixes[0].layers:
        pairs = [prompt.prefixes[0].layers[layer] for prompt in prompts]
        keys, values = (
            torch.stack([torch.tensor(getattr(pair, half)) for pair in pairs]) for half in ("keys", "values")
        )
        cache.update(keys, values, layer)
    return cache


def again(cache: DynamicCache) -> DynamicCache:
    """One of its own that begins with the same tensors."""
    fresh = DynamicCache()
    for number, layer in enumerate(cache.layers):
        fresh.update(layer.keys, layer.values, number)
    return fresh


def training(rounds: int) -> None:
    for family, sizes in (("gpt2", GPT2), ("llama", LLAMA)):
        model = make(family, **sizes).requires_grad_(False)  # the limit is that of a frozen model
        geometry = read_geometry(model.config)
        prompts = {f"prefix of {n}": random_prefix(geometry, n) for n in (20, 128, 512, 2048)}
        prompts |= {f"prompt of {n}": random_input_prompt(geometry, n) for n in (20, 100)}
        for kind, prompt in prompts.items():
            _training(model, prompt, f"training step, {family}, {kind}, 4 x 128", rounds)


def _training(model: Any, prompt: SoftPrompt, title: str, rounds: int) -> None:
    length = 128
    ids = torch.randint(3, 90, (4, length))
    labels = ids.clone()
    labels[:, 0] = -100  # with vectors in the input PEFT asks for it, too

    def step(running: Any) -> Tensor:
        running.zero_grad()
        loss: Tensor = running(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss.detach()

    more = sum(part.length for part in prompt.inputs)

    def bare() -> None:
        embedded = model.get_input_embeddings()(ids).detach()
        embedded = torch.cat([embedded[:, :1].expand(-1, more, -1), embedded], dim=1).requires_grad_()
        labelled = torch.nn.functional.pad(labels, (more, 0), value=-100)
        model(inputs_embeds=embedded, labels=labelled).loss.backward()

    ways: dict[str, Callable[[], Any]] = {
        name: (lambda running=running: step(running)) for name, running in engines_for(model, prompt, step).items()
    }
    check(ways)
    measure(title, {**ways, "bare model": bare}, rounds, limit="bare model")


def generating(rounds: int) -> None:
    for family, sizes in DEEP.items():
        model = make(family, **sizes)
        geometry = read_geometry(model.config)
        for prompt in (random_prefix(geometry, 20), random_input_prompt(geometry, 20)):
            for batch in (1, 8):
                kind = "prefix" if prompt.prefixes else "prompt"
                title = f"24 tokens, {family} of 32 tiny layers, {kind} of 20, {batch} rows"
                _generating(model, prompt, title, batch, 24, rounds)


def long(rounds: int) -> None:
    model = make("llama", **LLAMA)
    geometry = read_geometry(model.config)
    for length in (2048, 8192):
        for batch in (1, 8, 32):
            title = f"16 tokens, llama, prefix of {length}, {batch} rows"
            _generating(model, random_prefix(geometry, length), title, batch, 16, rounds)


def _generating(model: Any, prompt: SoftPrompt, title: str, batch: int, tokens: int, rounds: int) -> None:
    ids = torch.randint(3, 90, (batch, 8))

    def generate(running: Any, virtual: int = 0, **given: Any) -> Tensor:
        given.setdefault("input_ids", ids)
        mask = torch.ones(batch, virtual + 8, dtype=torch.long)
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        made: Tensor = running.generate(attention_mask=mask, **given, **settings)
        return made[:, -tokens:]

    cache = stacked([prompt] * batch) if prompt.prefixes else None

    def bare() -> Tensor:
        if cache is not None:  # `generate` wants the ids of all that the cache holds
            behind = torch.cat([ids.new_zeros(batch, prompt.prefixes[0].length), ids], dim=1)
            return generate(model, prompt.prefixes[0].length, input_ids=behind, past_key_values=again(cache))
        vectors = torch.tensor(prompt.inputs[0].vectors).expand(batch, -1, -1)
        embedded = torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1)
        return generate(model, vectors.shape[1], input_ids=None, inputs_embeds=embedded)

    engines = engines_for(model, prompt, generate)
    ways: dict[str, Callable[[], Any]] = {
        name: (lambda running=running: generate(running)) for name, running in engines.items()
    }
    check({**ways, "bare model": bare})
    measure(title, {**ways, "bare model": bare}, rounds, limit="bare model")


def bank(rounds: int, count: int = 500, rows: int = 32) -> None:
    """Rows with prompts of their own in one call; the limit is the bare model with all of them stacked in its cache."""
    model = make("llama", **LLAMA)
    geometry = read_geometry(model.config)
    prompts = {f"p{n}": random_prefix(geometry, 20, seed=n) for n in range(count)}
    ids = torch.randint(3, 90, (rows, 32))
    held = sb.PromptBank(prompts)
    together = sb.attach(copy.deepcopy(model), held)
    names = list(prompts)[:rows]
    one_by_one = _one_by_one(model, {name: prompts[name] for name in names})
    cache = stacked([prompts[name] for name in names])

    @torch.no_grad()
    def first(chosen: Sequence[str] = names) -> Any:
        with held.rows(chosen):
            return together(input_ids=ids, use_cache=True)

    @torch.no_grad()
    def limit() -> Any:
        return model(input_ids=ids, past_key_values=again(cache), use_cache=True)

    ways: dict[str, Callable[[], Any]] = {"bank": first, "peft, set_adapter": lambda: one_by_one(ids)}
    check({**ways, "stacked": limit}, lambda found: found if isinstance(found, Tensor) else found.logits)
    measure(
        f"first call, {rows} rows of 32 with {rows} prefixes of 20",
        {**ways, "stacked cache": limit},
        rounds,
        limit="stacked cache",
    )

    @torch.no_grad()
    def steps(begin: Callable[[], Any], running: Any) -> float:
        """Seconds of one of 16 steps behind the first call."""
        found = begin()
        start = time.process_time()
        for _ in range(16):
            with held.rows(names):
                found = running(
                    input_ids=found.logits[:, -1:].argmax(-1), past_key_values=found.past_key_values, use_cache=True
                )
        return (time.process_time() - start) / 16

    step = {"bank": lambda: steps(first, together), "stacked cache": lambda: steps(limit, model)}
    measure("the same, one decoding step", step, rounds, limit="stacked cache")
    drawn = random.Random(0)
    for name in prompts:  # all are ready then
        with held.rows(name), torch.no_grad():
            together(input_ids=ids[:1, :1])
    other = lambda: first([f"p{n}" for n in drawn.sample(range(count), rows)])  # noqa: E731
    title = f"first call, other rows of {count} at each, to the same rows"
    measure(title, {"other rows": other, "same rows": first}, rounds, limit="same rows")
    ready = together.softbridge.ready
    print(f"<!-- {len(ready)} prompts are ready in {ready.nbytes / 2**20:.1f} MiB -->")


def _one_by_one(model: Any, prompts: dict[str, SoftPrompt]) -> Callable[[Tensor], Tensor]:
    """PEFT, a call for each row."""
    first = sb.attach(copy.deepcopy(model), next(iter(prompts.values())), engine="peft")
    config = first.peft_config[first.active_adapter]
    for name, prompt in prompts.items():
        first.add_adapter(name, config)
        first.prompt_encoder[name].embedding.weight.data.copy_(torch.tensor(prompt.prefixes[0].flat()))

    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        rows = []
        for row, name in enumerate(prompts):
            first.set_adapter(name)
            rows.append(first(input_ids=ids[row : row + 1]).logits)
        return torch.cat(rows)

    return run


BENCHES: dict[str, Callable[[int], None]] = {"generating": generating, "training": training, "bank": bank, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(BENCHES)}; all if left out")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, one thread, processor time\n")
    print(heading())
    for name in given.what or BENCHES:
        BENCHES[name](given.rounds)


if __name__ == "__main__":
    main()
