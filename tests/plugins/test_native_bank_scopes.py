"""How long a choice of rows holds: nested, in threads, past an exception, and when its prompt is taken away."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import EngineError, LoweringError
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.plugin.registry import engines
from softbridge.testing import agreement, apart, random_input_prompt, random_prefix, tiny_model

IDS = torch.tensor([[5, 9, 17, 30], [44, 12, 3, 7]])
THREADS, CALLS = 6, 12
#: A token that no model stops at.
NEVER = {"eos_token_id": -1, "pad_token_id": 0}


@pytest.fixture
def banked() -> tuple[Any, PromptBank]:
    model = tiny_model("gpt2")
    geometry = BaseModel.resolve(model).geometry
    prompts: dict[str, Any] = {str(seed): random_prefix(geometry, 4, seed=seed) for seed in range(3)}
    prompts["vectors"] = random_input_prompt(geometry, 4)
    bank = PromptBank(prompts)
    return sb.attach(model, bank), bank


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.as_tensor(model(input_ids=IDS).logits)


@torch.no_grad()
def greedy(model: Any) -> Tensor:
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, **NEVER)
    return torch.as_tensor(made)


def of(model: Any, bank: PromptBank, names: Any) -> Tensor:
    with bank.rows(names):
        return logits(model)


def test_rows_within_rows(banked: tuple[Any, PromptBank]) -> None:
    model, bank = banked
    first, second, none = (of(model, bank, names) for names in (["0", "1"], "2", None))
    assert not any(torch.equal(*pair) for pair in ((first, second), (second, none), (first, none)))
    other = PromptBank({"0": bank["2"]})
    with bank.rows(["0", "1"]):
        with bank.rows("2"):
            with bank.rows(None):
                assert torch.equal(logits(model), none)
            assert torch.equal(logits(model), second)
            with other.rows("0"):  # another bank's rows are another matter
                assert torch.equal(logits(model), second)
        assert torch.equal(logits(model), first)
    with pytest.raises(EngineError, match="outside"):
        logits(model)


def test_an_exception_ends_the_choice(banked: tuple[Any, PromptBank]) -> None:
    model, bank = banked
    first, second = of(model, bank, "0"), of(model, bank, "1")

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError("in the middle of a call")

    with bank.rows("0"):
        for number in (0, 1, 2):  # in every layer of the model
            handle = model.transformer.h[number].register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="middle"), bank.rows("1"):
                logits(model)
            handle.remove()
            assert torch.equal(logits(model), first)
    with pytest.raises(EngineError, match="outside"):
        logits(model)
    assert torch.equal(of(model, bank, "1"), second)


def test_a_prompt_that_is_taken_away_inside(banked: tuple[Any, PromptBank]) -> None:
    model, bank = banked
    first, zero = of(model, bank, ["0", "1"]), bank["0"]
    with bank.rows(["0", "1"]):
        del bank["0"]
        with pytest.raises(EngineError, match=r"'0' was removed from the bank(.|\n)*add it again"):
            logits(model)
        bank["0"] = zero
        assert torch.equal(logits(model), first)
        bank["0"] = bank["2"]  # a name stands for what it is given last
        assert torch.equal(logits(model)[0], of(model, bank, "2")[0])
    with pytest.raises(EngineError, match="no prompt is called 'gone'"), bank.rows("gone"):
        pass


@pytest.mark.parametrize("limit", [None, 0])
def test_threads_never_see_each_others_prompts(limit: int | None, banked: tuple[Any, PromptBank]) -> None:
    """Forward and in generation, while one thread adds, replaces and removes prompts that nobody else names."""
    model, bank = banked
    bank.limit = limit
    choices: list[Any] = [["0", "1"], ["1", "0"], "2", ["2", None], None, ["vectors", "vectors"]]
    alone = []
    for names in choices:
        with bank.rows(names):
            alone.append((logits(model), greedy(model)))
    assert len({tuple(tokens.flatten().tolist()) for _, tokens in alone}) == len(choices), "two would pass for one"
    barrier, done = threading.Barrier(THREADS + 1), threading.Event()

    def serve(thread: int) -> list[bool]:
        barrier.wait()
        with bank.rows(choices[thread]):
            found = [torch.equal(logits(model), alone[thread][0]) for _ in range(CALLS)]
            return [*found, *(torch.equal(greedy(model), alone[thread][1]) for _ in range(CALLS // 4))]

    def churn() -> None:
        barrier.wait()
        for number in itertools.count():
            bank[f"x{number % 3}"] = bank["0"]
            if f"x{(number + 1) % 3}" in bank:
                del bank[f"x{(number + 1) % 3}"]
            if done.wait(0.001):  # so that it takes turns with the others
                return

    with ThreadPoolExecutor(THREADS + 1) as pool:
        other = pool.submit(churn)
        try:
            found = list(pool.map(serve, range(THREADS)))
        finally:  # also where one of them fails
            done.set()
        other.result()
    assert all(all(each) for each in found)


@pytest.mark.parametrize("kind", ["prefix", "vectors"])
@pytest.mark.parametrize("engine", [name for name, one in engines().items() if one.unavailable() is None])
def test_copies_and_pickles_of_an_attached_model(engine: str, kind: str, tmp_path: Path) -> None:
    """They run alike, have numbers of their own, and are detached by themselves."""
    base = tiny_model("gpt2").eval()
    geometry, bare = BaseModel.resolve(base).geometry, logits(base)
    prompt = (random_prefix if kind == "prefix" else random_input_prompt)(geometry, 4)
    try:
        sb.detach(sb.attach(base, prompt, engine=engine))
    except LoweringError:
        pytest.skip(f"{engine} has no {kind} on this model")
    running = sb.attach(base, prompt, engine=engine).eval()
    expected = logits(running)
    assert not torch.equal(expected, bare)
    copies = {"deepcopy": copy.deepcopy(running)}
    stream = io.BytesIO()
    if engine == "adapterhub":
        with pytest.raises(pickle.PicklingError, match="Can't pickle"):  # AdapterHub makes its classes as it goes
            torch.save(running, stream)
    else:
        torch.save(running, stream)
        stream.seek(0)
        copies["torch.save"] = torch.load(stream, weights_only=False)
        copies["pickle"] = pickle.loads(pickle.dumps(running))
    for how, twin in copies.items():
        assert torch.equal(logits(twin), expected), how
        assert sb.extract(twin) == sb.extract(running), how
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        assert not torch.equal(logits(twin), expected), how
        assert torch.equal(logits(running), expected), how
        detached = sb.detach(twin).eval()
        assert torch.equal(logits(detached), bare), how
        assert torch.equal(logits(running), expected), how
    if engine == "native":
        running.save_pretrained(tmp_path)
        again = sb.load(tmp_path)
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(again.arrays(), prompt.arrays(), strict=True))
    assert torch.equal(logits(sb.detach(running).eval()), bare)


def test_copies_of_a_model_with_a_bank(banked: tuple[Any, PromptBank], tmp_path: Path) -> None:
    model, bank = banked
    expected = of(model, bank, ["0", "1"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = twin.softbridge.bank
        assert own is not bank
        assert torch.equal(of(twin, own, ["0", "1"]), expected)
        del own["0"]
        assert torch.equal(of(model, bank, ["0", "1"]), expected)
        with pytest.raises(EngineError, match="no prompt is called '0'"), own.rows("0"):
            pass
    model.save_pretrained(tmp_path / "whole")  # no prompt is trained: it is the base model that is saved
    again = type(model).from_pretrained(tmp_path / "whole", dtype=torch.float64, attn_implementation="eager")
    # Weights that were loaded lie elsewhere in memory, and another processor sums them in another order.
    bare = logits(again.eval())
    assert apart(of(model, bank, None), bare) <= agreement(again)
    assert apart(expected, bare) > 1e-3
