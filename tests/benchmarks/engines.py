"""What running and training a prompt costs, side by side: the native engine, its peers, and the model without a prompt.

    python tests/benchmarks/engines.py [--rounds N] [training | generating | long | bank] ...

The limit of a row is the bare model: with the same prefix in its cache, or the vectors in its input, where that is the
same function; frozen and without a prompt, forwards and back to its input, where a prompt is trained. A peer that
cannot run a row here is left out of it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from side_by_side import Ways, check, heading, measure
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
BARE = "bare model"
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


def engines_for(
    model: Any, prompt: SoftPrompt, does: Callable[[Any], Any], without: Sequence[str] = ()
) -> dict[str, Any]:
    """The model in each engine that does this here, the native one first."""
    found = {}
    for name in ("native", *sorted(set(sb.engines()) - {"native", *without})):
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
    """A cache that begins with the prefix of each row, shorter ones behind zeros."""
    cache = DynamicCache()
    longest = max(prompt.prefixes[0].length for prompt in prompts)

    def padded(half: Any) -> Tensor:
        return torch.nn.functional.pad(torch.tensor(half), (0, 0, longest - half.shape[1], 0))

    for layer in prompts[0].prefixes[0].layers:
        pairs = [prompt.prefixes[0].layers[layer] for prompt in prompts]
        keys, values = (torch.stack([padded(getattr(pair, half)) for pair in pairs]) for half in ("keys", "values"))
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
            training_row(model, prompt, f"training step, {family}, {kind}, 4 x 128", rounds)


def training_row(model: Any, prompt: SoftPrompt, title: str, rounds: int) -> None:
    measure(title, training_ways(model, prompt, 4, 128), rounds, limit=BARE, memory=True)


def training_ways(model: Any, prompt: SoftPrompt, rows: int, tokens: int) -> Ways:
    """A training step in each engine that trains as many numbers; of the bare model, forwards and back to its input."""
    ids = torch.randint(3, 90, (rows, tokens))
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

    engines = engines_for(model, prompt, step)
    trained = {
        name: sum(one.numel() for one in running.parameters() if one.requires_grad) for name, running in engines.items()
    }
    for name in [name for name in engines if trained[name] != trained["native"]]:
        # AdapterHub makes a prefix of vectors in the input: the same function, with other parameters.
        print(f"<!-- {name}: trains {trained[name]} numbers instead of {trained['native']} -->")
        del engines[name]
    ways: dict[str, Callable[[], Any]] = {
        name: (lambda running=running: step(running)) for name, running in engines.items()
    }
    if prompt.prefixes:  # what the same function costs without an engine
        leaves = [(layer.keys.requires_grad_(), layer.values.requires_grad_()) for layer in stacked([prompt]).layers]

        def cached() -> Tensor:
            cache = DynamicCache()
            for number, halves in enumerate(leaves):
                for half in halves:
                    half.grad = None
                cache.update(*(half.expand(rows, -1, -1, -1) for half in halves), number)
            loss: Tensor = model(input_ids=ids, labels=labels, past_key_values=cache).loss
            loss.backward()
            return loss.detach()

        ways[f"{BARE}, prefix in its cache"] = cached
    check(ways)
    return {**ways, BARE: bare}


def generating(rounds: int) -> None:
    for family, sizes in DEEP.items():
        model = make(family, **sizes)
        geometry = read_geometry(model.config)
        for prompt in (random_prefix(geometry, 20), random_input_prompt(geometry, 20)):
            for batch in (1, 8):
                kind = "prefix" if prompt.prefixes else "prompt"
                title = f"24 tokens, {family} of 32 tiny layers, {kind} of 20, {batch} rows"
                generating_row(model, prompt, title, batch, 24, rounds)


def long(rounds: int) -> None:
    rounds = max(2, rounds // 2)  # a way takes up to 20 seconds
    model = make("llama", **LLAMA)
    geometry = read_geometry(model.config)
    for length in (2048, 8192):
        for batch in (1, 8, 32):
            title = f"16 tokens, llama, prefix of {length}, {batch} rows"
            # AdapterHub has no cache here: each token would cost a pass over the whole prefix of each row, and 16 GB.
            generating_row(
                model, random_prefix(geometry, length), title, batch, 16, rounds, memory=True, without=["adapterhub"]
            )
    for length, batch, count in ((512, 8, 8), (2048, 8, 8), (2048, 32, 32), (2048, 32, 4), (8192, 8, 8)):
        prompts = {f"p{n}": random_prefix(geometry, length, seed=n) for n in range(count)}
        names = [f"p{n % count}" for n in range(batch)]
        title = f"{batch} rows of 8 with {count} prefixes of {length}"
        _bank(model, prompts, names, title, rounds, steps=4, text=8)


def generating_row(
    model: Any,
    prompt: SoftPrompt,
    title: str,
    rows: int,
    tokens: int,
    rounds: int,
    memory: bool = False,
    without: Sequence[str] = (),
) -> None:
    measure(title, generating_ways(model, prompt, rows, tokens, without), rounds, limit=BARE, memory=memory)


def generating_ways(model: Any, prompt: SoftPrompt, rows: int, tokens: int, without: Sequence[str] = ()) -> Ways:
    """Greedy tokens of each engine; of the bare model, with the prefix in its cache or the vectors in its input."""
    ids = torch.randint(3, 90, (rows, 8))

    def generate(running: Any, virtual: int = 0, **given: Any) -> Tensor:
        given.setdefault("input_ids", ids)
        mask = torch.ones(rows, virtual + 8, dtype=torch.long)
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        made: Tensor = running.generate(attention_mask=mask, **given, **settings)
        return made[:, -tokens:]

    cache = stacked([prompt] * rows) if prompt.prefixes else None

    def bare() -> Tensor:
        if cache is not None:  # `generate` wants the ids of all that the cache holds
            behind = torch.cat([ids.new_zeros(rows, prompt.prefixes[0].length), ids], dim=1)
            return generate(model, prompt.prefixes[0].length, input_ids=behind, past_key_values=again(cache))
        vectors = torch.tensor(prompt.inputs[0].vectors).expand(rows, -1, -1)
        embedded = torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1)
        return generate(model, vectors.shape[1], input_ids=None, inputs_embeds=embedded)

    engines = engines_for(model, prompt, generate, without)
    ways: dict[str, Callable[[], Any]] = {
        name: (lambda running=running: generate(running)) for name, running in engines.items()
    }
    ways[BARE] = bare
    check(ways)
    return ways


def bank(rounds: int, count: int = 500, rows: int = 32) -> None:
    """Rows with prompts of their own in a call; the limit is the bare model with all of them in its cache or input."""
    model = make("llama", **LLAMA)
    geometry = read_geometry(model.config)
    drawn = random.Random(0)
    lengths = [drawn.randint(4, 36) for _ in range(count)]
    same = {f"p{n}": random_prefix(geometry, 20, seed=n) for n in range(count)}
    names = list(same)[:rows]
    peer = {"peft, set_adapter": _one_by_one(model, {name: same[name] for name in names})}
    together = _bank(model, same, names, f"{rows} rows of 32 with {rows} prefixes of 20", rounds, peers=peer)
    others = {name: random_prefix(geometry, lengths[n], seed=n) for n, name in enumerate(names)}
    _bank(model, others, names, f"{rows} rows of 32 with {rows} prefixes of 4 to 36", rounds)
    inputs = {name: random_input_prompt(geometry, 20, seed=n) for n, name in enumerate(names)}
    _bank(model, inputs, names, f"{rows} rows of 32 with {rows} prompts of 20", rounds)

    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        numbers, times = fresh.apply(_memory, (count,))
    print(
        f"<!-- {count} prompts from files: the process grows by {times:.2f} times their {numbers / 2**20:.1f} MiB -->"
    )
    held, ids = together.softbridge.bank, torch.randint(3, 90, (rows, 32))

    @torch.no_grad()
    def first(chosen: Sequence[str] = names) -> Any:
        with held.rows(chosen):
            return together(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True)

    for name in same:  # all are ready then
        with held.rows(name), torch.no_grad():
            together(input_ids=ids[:1, :1])
    other = lambda: first([f"p{n}" for n in drawn.sample(range(count), rows)])  # noqa: E731
    title = f"first call, other rows of {count} at each, to the same rows"
    measure(title, {"other rows": other, "same rows": first}, rounds, limit="same rows")


def _memory(count: int) -> tuple[int, float]:
    """Bytes of the numbers of a bank of files, and by how many times that a fresh process grows (Linux only)."""
    model = make("llama", **LLAMA)
    geometry = read_geometry(model.config)
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"p{n}": Path(folder, f"p{n}") for n in range(count + 1)}
        for n, path in enumerate(paths.values()):
            sb.save(random_prefix(geometry, 20, seed=n), path, format="peft", base=model)
        held = sb.PromptBank(paths)
        running = sb.attach(model, held)
        before: tuple[int, int] | None = None
        for name in paths:
            with held.rows(name), torch.no_grad():
                running(input_ids=torch.tensor([[5]]))
            before = before or (resident(), running.softbridge.ready.nbytes)
        assert before is not None
        numbers = running.softbridge.ready.nbytes - before[1]
        return numbers, (resident() - before[0]) / numbers


def resident() -> int:
    """Bytes of this process in memory, now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _bank(
    model: Any,
    prompts: dict[str, SoftPrompt],
    names: Sequence[str],
    title: str,
    rounds: int,
    steps: int = 16,
    text: int = 32,
    peers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Any:
    """The first call and the steps behind it; the model with the bank."""
    held = sb.PromptBank(prompts)
    together = sb.attach(copy.deepcopy(model), held)
    ids = torch.randint(3, 90, (len(names), text))
    chosen = [prompts[name] for name in names]
    prefixed = bool(chosen[0].prefixes)
    sizes = torch.tensor([(prompt.prefixes or prompt.inputs)[0].length for prompt in chosen])[:, None]
    longest = int(sizes.max())
    cache = stacked(chosen) if prefixed else None
    # Rows with fewer virtual tokens have pads in front of all.
    pads = torch.arange(longest + text + steps)[None] < longest - sizes
    ragged = bool(pads.any())
    place = sizes + torch.arange(text)
    vectors = None if prefixed else torch.stack([torch.tensor(prompt.inputs[0].vectors) for prompt in chosen])

    @torch.no_grad()
    def first() -> Any:
        with held.rows(names):
            return together(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True)

    def masked(length: int) -> dict[str, Tensor]:
        return {"attention_mask": (~pads[:, :length]).long()} if ragged else {}

    @torch.no_grad()
    def limit() -> Any:
        if cache is not None:
            given = {"input_ids": ids, "past_key_values": again(cache), "position_ids": place}
        else:
            embedded = torch.cat([vectors, model.get_input_embeddings()(ids)], dim=1)
            given = {"inputs_embeds": embedded, "past_key_values": DynamicCache(config=model.config)}
        return model(**given, **masked(longest + text), use_cache=True)

    @torch.no_grad()
    def step(begin: Callable[[], Any], running: Any) -> float:
        """Seconds of one of the steps behind the first call."""
        found, bare, length = begin(), running is model, longest + text
        start = time.process_time()
        for n in range(steps):
            more = {"position_ids": place[:, -1:] + 1 + n, **masked(length + 1 + n)} if bare else {}
            with held.rows(names):
                found = running(
                    input_ids=found.logits[:, -1:].argmax(-1),
                    past_key_values=found.past_key_values,
                    use_cache=True,
                    **more,
                )
        return (time.process_time() - start) / steps

    bare = "stacked cache" if prefixed else "stacked input"
    ways: dict[str, Callable[[], Any]] = {"bank": first}
    ways |= {name: (lambda peer=peer: peer(ids)) for name, peer in (peers or {}).items()}
    check({**ways, bare: limit}, lambda found: (found if isinstance(found, Tensor) else found.logits)[:, -text:])
    measure(f"first call, {title}", {**ways, bare: limit}, rounds, limit=bare)
    measure(
        f"decoding step, {title}",
        {"bank": lambda: step(first, together), bare: lambda: step(limit, model)},
        rounds,
        limit=bare,
    )
    return together


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


def setup() -> None:
    """One thread, the same numbers, and no words of transformers."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    torch.set_num_threads(1)


def main(benches: Mapping[str, Callable[[int], None]] = BENCHES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=f"of {', '.join(benches)}; all if left out")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    setup()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, one thread, processor time\n")
    print(heading())
    for name in given.what or benches:
        benches[name](given.rounds)


if __name__ == "__main__":
    main()
