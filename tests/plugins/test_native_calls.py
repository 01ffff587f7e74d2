"""What belongs to a call stays with it: in threads, past `__call__`, and with a cache that was begun elsewhere."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

import softbridge as sb
from softbridge.bank import PromptBank
from softbridge.examples import METHODS
from softbridge.geometry import read_geometry
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model

THREADS, CALLS = 3, 60
NEVER = {"eos_token_id": 10**6, "pad_token_id": 0}


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def text(length: int, seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def greedy(model: Any, ids: Tensor) -> Tensor:
    made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False, **NEVER)
    return made


def in_threads(work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """What each thread found, all started at once."""
    barrier = threading.Barrier(THREADS)

    def run(thread: int) -> list[Tensor]:
        barrier.wait()
        return work(thread)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def prompts(model: Any) -> dict[str, Any]:
    geometry = read_geometry(model.config)
    return {
        "input": random_input_prompt(geometry, 5),
        "prefix": random_prefix(geometry, 5),
        "network": METHODS["p-tuning"](geometry),
        "network prefix": METHODS["prefix-tuning-mlp"](geometry),
    }


@pytest.mark.parametrize("kind", ["input", "prefix", "network", "network prefix"])
def test_threads_share_a_model(kind: str) -> None:
    """Each call of each thread is what it is alone, forward and in generation, for texts of different lengths."""
    model = tiny_model("llama")
    running = sb.attach(copy.deepcopy(model), prompts(model)[kind])
    texts = [
        [text(4 + (7 * thread + call) % 5, 100 * thread + call) for call in range(CALLS)] for thread in range(THREADS)
    ]
    alone = [[logits(running, ids) for ids in own] for own in texts]
    made = [[greedy(running, ids) for ids in own[: CALLS // 6]] for own in texts]
    # The texts are different ones, and the prompt is felt.
    assert apart(alone[0][0], logits(running, texts[1][1])[:, :4]) > 0.1
    assert apart(logits(model, texts[0][0]), alone[0][0]) > 0.1

    def work(thread: int) -> list[Tensor]:
        found = [logits(running, ids) for ids in texts[thread]]
        return [*found, *(greedy(running, ids) for ids in texts[thread][: CALLS // 6])]

    for found, forward, tokens in zip(in_threads(work), alone, made, strict=True):
        assert all(apart(a, b) == 0 for a, b in zip(found[:CALLS], forward, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found[CALLS:], tokens, strict=True))


def test_threads_train_each_with_its_own_numbers() -> None:
    """What a network makes in a call is that call's: the gradients of three threads are three times one's."""
    model = tiny_model("llama")
    running = sb.attach(model, prompts(model)["network prefix"])
    ids = [text(5 + thread, thread) for thread in range(THREADS)]
    parameters = [p for p in running.parameters() if p.requires_grad]

    def gradient(thread: int) -> list[Tensor]:
        loss = running(input_ids=ids[thread]).logits.square().mean()
        return [g.clone() for g in torch.autograd.grad(loss, parameters)]

    alone = [gradient(thread) for thread in range(THREADS)]
    assert apart(alone[0][0], alone[1][0]) > 0.1
    for found, expected in zip(in_threads(gradient), alone, strict=True):
        assert all(apart(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def test_threads_name_their_own_rows() -> None:
    """`bank.rows` holds for the thread that said so, and is seen by what that thread starts in its context."""
    model = tiny_model("llama")
    geometry = read_geometry(model.config)
    bank = PromptBank(
        {
            "a": random_input_prompt(geometry, 5, seed=1),
            "b": random_input_prompt(geometry, 3, seed=2),
            "c": random_prefix(geometry, 4, seed=3),
        }
    )
    running = sb.attach(model, bank)
    names: list[list[str | None]] = [["a", "b"], ["c", None], [None, "a"]]
    ids = [text(4 + thread, thread, rows=2) for thread in range(THREADS)]

    def run(thread: int) -> Tensor:
        with bank.rows(names[thread]):
            return logits(running, ids[thread])

    alone = [run(thread) for thread in range(THREADS)]
    with bank.rows(names[0][::-1]):
        assert apart(logits(running, ids[0]), alone[0]) > 0.1
    for thread, found in enumerate(in_threads(lambda thread: [run(thread) for _ in range(CALLS)])):
        assert all(apart(each, alone[thread]) == 0 for each in found)

    import asyncio

    async def serve(thread: int) -> Tensor:
        with bank.rows(names[thread]):
            await asyncio.sleep(0)  # another task names its own meanwhile
            here = logits(running, ids[thread])
            assert apart(await asyncio.to_thread(logits, running, ids[thread]), here) == 0
            return here

    async def all_of_them() -> list[Tensor]:
        return await asyncio.gather(*(serve(thread) for thread in range(THREADS)))

    for found, expected in zip(asyncio.run(all_of_them()), alone, strict=True):
        assert apart(found, expected) == 0


HEADLESS = ("llama", "gpt2", "bert")


def headless(family: str) -> Any:
    torch.manual_seed(0)
    return (
        AutoModel.from_config(tiny_config(family, initializer_range=0.4), attn_implementation="eager").double().eval()
    )


@pytest.mark.parametrize("family", HEADLESS)
@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_forward_runs_what_a_call_runs(family: str, kind: str) -> None:
    """Of a model that is the stack itself; also of copies, unpickled ones, and ones whose forward was wrapped."""
    model, ids = headless(family), text(6)
    if kind == "prefix" and not model._can_set_attn_implementation():
        pytest.skip(f"{family} does not dispatch here")
    with torch.no_grad():
        bare = model.forward(input_ids=ids).last_hidden_state
        running = sb.attach(model, prompts(model)[kind])
        expected = running(input_ids=ids).last_hidden_state
        assert apart(bare, expected) > 0.1
        stream = io.BytesIO()
        torch.save(running, stream)
        stream.seek(0)
        for each in (running, copy.deepcopy(running), torch.load(stream, weights_only=False)):
            assert type(each).__name__ == type(model).__name__
            for call in (each, each.forward, each.base_model.forward):
                found = call(input_ids=ids).last_hidden_state
                assert found.shape == expected.shape
                assert apart(found, expected) == 0
                assert apart(call(ids, attention_mask=torch.ones_like(ids)).last_hidden_state, expected) < 1e-12
        assert apart(sb.detach(running).forward(input_ids=ids).last_hidden_state, bare) == 0
    assert type(running) is type(headless(family))


@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_forward_of_the_stack_under_a_head(kind: str) -> None:
    model, ids = tiny_model("llama"), text(6)
    running = sb.attach(model, prompts(model)[kind])
    with torch.no_grad():
        expected = running(input_ids=ids).logits
        assert apart(running.forward(input_ids=ids).logits, expected) == 0
        for call in (running.model.forward, running.base_model.forward, running.model):
            assert apart(running.lm_head(call(input_ids=ids).last_hidden_state), expected) == 0


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model, ids = headless("llama"), text(6)
    running = sb.attach(model, prompts(model)["input"])
    with torch.no_grad():
        expected = running(input_ids=ids).last_hidden_state
        with pytest.raises(IndexError):
            running(input_ids=torch.full((1, 3), 10**6))

        def fail(*_: Any) -> None:
            raise RuntimeError("before the forward")

        handle = running.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            running(input_ids=ids)
        handle.remove()
        assert apart(running.forward(input_ids=ids).last_hidden_state, expected) == 0


def test_compiles_in_one_graph_past_the_call() -> None:
    """And threads share what was compiled, each with a call of its own."""
    model = AutoModel.from_config(tiny_config("llama", num_hidden_layers=1, initializer_range=0.4)).eval()
    running = sb.attach(model, prompts(model)["input"])
    torch.compiler.reset()

    @torch.no_grad()
    def run(ids: Tensor) -> Tensor:
        states: Tensor = running.forward(input_ids=ids).last_hidden_state
        return states

    ids, other = text(6), text(6, 1)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    expected = [run(ids), run(other), run(ids)]
    assert apart(compiled(ids), expected[0]) == 0
    found = in_threads(lambda thread: [compiled((ids, other, ids)[thread])])
    assert all(apart(each, alone) == 0 for (each,), alone in zip(found, expected, strict=True))
    assert apart(expected[1], expected[0]) > 0.1
