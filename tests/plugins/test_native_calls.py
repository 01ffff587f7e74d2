"""What belongs to a call stays with it: in threads, past `__call__`, and with a cache that was begun elsewhere."""

from __future__ import annotations

import copy
import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import softbridge as sb
from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.geometry import read_geometry
from softbridge.lowering.examples import METHODS
from softbridge.lowering.precision import as_dtype
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.testing import agreement, random_input_prompt, random_prefix, tiny_config, tiny_model

THREADS, CALLS = 3, 60 if os.environ.get("SOFTBRIDGE_PROFILE") == "long" else 30
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
        "parameterisation": METHODS["p-tuning"](geometry),
        "parameterisation prefix": METHODS["prefix-tuning-mlp"](geometry),
    }


@pytest.mark.parametrize("kind", ["input", "prefix", "parameterisation", "parameterisation prefix"])
def test_threads_share_a_model(kind: str) -> None:
    """Each call of each thread is what it is alone, forward and in generation, for texts of different lengths."""
    model = tiny_model("llama", num_hidden_layers=2)
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
    """What a parameterisation makes in a call is that call's: the gradients of three threads are three times one's."""
    model = tiny_model("llama")
    running = sb.attach(model, prompts(model)["parameterisation prefix"])
    ids = [text(5 + thread, thread) for thread in range(THREADS)]
    parameters = [p for p in running.parameters() if p.requires_grad]

    def gradient(thread: int) -> list[Tensor]:
        loss = running(input_ids=ids[thread]).logits.square().mean()
        return [g.clone() for g in torch.autograd.grad(loss, parameters)]

    alone = [gradient(thread) for thread in range(THREADS)]
    assert apart(alone[0][0], alone[1][0]) > 0.1
    for found, expected in zip(in_threads(gradient), alone, strict=True):
        assert all(apart(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def replica(parameterisation: Any) -> Any:
    """What `nn.DataParallel` runs in a thread of its own, on the one device that is here."""
    modules = list(parameterisation.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copied = copies[id(module)]
        for name, child in module._modules.items():
            copied._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.view_as(parameter))
    return copies[id(parameterisation)]


@pytest.mark.parametrize("kind", ["input", "prefix", "parameterisation", "parameterisation prefix"])
@pytest.mark.parametrize("head", [False, True])
def test_replicas_run_in_threads(kind: str, head: bool) -> None:
    """As the model does, with the prompt and without; their gradients are the prompt's own."""
    model = tiny_model("llama") if head else headless("llama")
    running = sb.attach(copy.deepcopy(model), as_dtype(prompts(model)[kind], np.dtype(np.float64)))
    parameters = [p for p in running.parameters() if p.requires_grad]
    replicas = [replica(running) for _ in range(THREADS)]
    assert not list(replicas[0].parameters())
    ids = [text(5 + thread, thread) for thread in range(THREADS)]
    bare = [model(input_ids=each)[0].detach() for each in ids]
    alone = [running(input_ids=each)[0].detach() for each in ids]
    assert min(apart(a, b) for a, b in zip(alone, bare, strict=True)) > 0.1

    def run(thread: int) -> list[Tensor]:
        return [replicas[thread](input_ids=ids[thread])[0] for _ in range(5)]

    found = in_threads(run)
    assert all(apart(each.detach(), alone[thread]) == 0 for thread in range(THREADS) for each in found[thread])
    together = torch.autograd.grad(sum(each[0].pow(3).mean() for each in found), parameters)
    each_alone = [torch.autograd.grad(running(input_ids=one)[0].pow(3).mean(), parameters) for one in ids]
    for gathered, single in zip(together, zip(*each_alone, strict=True), strict=True):
        assert apart(gathered, sum(single, torch.zeros_like(gathered))) < 1e-12
    with running.softbridge.off():
        off = in_threads(run)
    assert all(apart(each.detach(), bare[thread]) == 0 for thread in range(THREADS) for each in off[thread])


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


@pytest.mark.parametrize("kind", ["input", "prefix", "parameterisation", "seeded"])
def test_a_prompt_that_is_switched_off(kind: str) -> None:
    """The base model, bit for bit, in one thread and no other; a cache is of one of the two."""
    model = tiny_model("llama") if kind != "seeded" else bloom()
    prompt = random_prefix(read_geometry(model.config), 5) if kind == "seeded" else prompts(model)[kind]
    ids = text(6)
    bare, told = logits(model, ids), greedy(model, ids)
    running = sb.attach(copy.deepcopy(model), prompt)
    with_it = logits(running, ids)
    assert apart(with_it, bare) > 0.1
    with running.softbridge.off():
        with running.softbridge.off():
            assert apart(logits(running, ids), bare) == 0
        assert apart(logits(running, ids), bare) == 0
        assert torch.equal(greedy(running, ids), told)
        with ThreadPoolExecutor(1) as pool:
            assert apart(pool.submit(logits, running, ids).result(), with_it) == 0
        with torch.no_grad():
            cache = caches.of(running(input_ids=ids, use_cache=True))
    assert apart(logits(running, ids), with_it) == 0
    handed = caches.argument(type(model).forward)
    with pytest.raises(EngineError, match="no call with this prompt began"):
        running(input_ids=ids[:, :1], **{handed: cache})
    with torch.no_grad():
        cache = caches.of(running(input_ids=ids, use_cache=True))
    with running.softbridge.off(), pytest.raises(EngineError, match="the prompt is switched off"):
        running(input_ids=ids[:, :1], **{handed: cache})


def test_a_bank_that_is_switched_off_needs_no_names() -> None:
    model = tiny_model("llama")
    ids = text(6)
    bare = logits(model, ids)
    running = sb.attach(model, PromptBank({"a": prompts(model)["prefix"]}))
    with running.softbridge.off():
        assert apart(logits(running, ids), bare) == 0
    with running.softbridge.bank.rows("a"):
        assert apart(logits(running, ids), bare) > 0.1


def bloom() -> Any:
    """A decoder that does not dispatch: its prefix is in its cache."""
    config = AutoConfig.for_model("bloom", vocab_size=96, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()


@pytest.mark.parametrize("kind", ["input", "prefix", "seeded"])
def test_a_cache_that_was_begun_elsewhere(kind: str) -> None:
    """Refused, and what this model began goes on: copied, cropped, reordered, or made by the stack itself."""
    model = bloom() if kind == "seeded" else tiny_model("llama")
    geometry = read_geometry(model.config)
    close = agreement(model)
    make = random_input_prompt if kind == "input" else random_prefix
    ids, more = text(6), text(3, 1)
    running, other = (sb.attach(copy.deepcopy(model), make(geometry, 5, seed=seed)) for seed in (1, 2))
    handed: Any = caches.argument(type(model).forward)
    expected = logits(running, torch.cat([ids, more], dim=1))[:, -3:]
    with torch.no_grad():
        for stranger in (model, other):
            begun = caches.of(stranger(input_ids=ids, use_cache=True))
            with pytest.raises(EngineError, match="no call with this prompt began"):
                running(input_ids=more, **{handed: begun})
        for given in ({}, {handed: DynamicCache()}):
            begun = caches.of(running(input_ids=ids, use_cache=True, **given))
            assert begun.get_seq_length() == 6
            for mine in (copy.deepcopy(begun), begun):
                assert apart(running(input_ids=more, **{handed: mine}).logits, expected) <= close
            begun.crop(-3)
            assert apart(running(input_ids=more, **{handed: begun}).logits, expected) <= close
            begun.crop(-3)
            begun.reorder_cache(torch.tensor([0, 0]))
            twice = running(input_ids=more.expand(2, -1), **{handed: begun}).logits
            assert apart(twice, expected.expand(2, -1, -1)) <= close
        begun = caches.of(running(input_ids=ids, use_cache=True))
        again = copy.deepcopy(running)  # the same prompt
        assert apart(again(input_ids=more, **{handed: begun}).logits, expected) <= close


def packed(first: Tensor, second: Tensor) -> dict[str, Any]:
    positions = torch.cat([torch.arange(each.shape[1]) for each in (first, second)])[None]
    return {"input_ids": torch.cat([first, second], dim=1), "position_ids": positions}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prefix_is_each_packed_text_s(family: str, implementation: str) -> None:
    """Wherever the model itself keeps them apart: without a cache, or by the mask. Elsewhere it never does."""
    model, first, second = tiny_model(family), text(5), text(4, 1)
    model.set_attn_implementation(implementation)
    close = agreement(model)
    running = sb.attach(copy.deepcopy(model), prompts(model)["prefix"])
    both = packed(first, second)
    own = torch.tensor([0] * 5 + [1] * 4)
    seen = (own[:, None] == own) & torch.ones(9, 9, dtype=torch.bool).tril()
    block = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    for each in (model, running):
        expected = torch.cat([logits(each, first), logits(each, second)], dim=1)
        with torch.no_grad():
            assert apart(each(**both, use_cache=False).logits, expected) <= close
            assert apart(each(**both, attention_mask=block).logits, expected) <= close
            assert apart(each(**both, use_cache=True).logits, expected) > 0.1
    assert apart(logits(running, second), logits(model, second)) > 0.1


@pytest.mark.parametrize("kind", ["input", "parameterisation", "seeded"])
def test_packed_texts_that_would_not_each_have_the_prompt(kind: str) -> None:
    """Refused, whether positions say so or lengths do. Positions of pads, and those that go on, are no reason."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="eager").eval()
    if kind == "seeded":
        size = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **size), attn_implementation="eager")
    prompt = random_prefix(read_geometry(model.config), 5) if kind == "seeded" else prompts(model)[kind]
    running, both = sb.attach(model.eval(), prompt), packed(text(5), text(4, 1))
    if kind != "seeded":  # the model hands no lengths on
        lengths = {name: torch.tensor([0, 5, 9], dtype=torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        with pytest.raises(EngineError, match=r"several texts in one row \(cu_seq_lens_q"):
            running(input_ids=both["input_ids"], **lengths)
    for mask in (None, torch.ones_like(both["input_ids"])):
        with pytest.raises(EngineError, match="position_ids that start again"):
            running(**both, attention_mask=mask)
    if kind == "seeded":  # refuses pads on the left
        return
    row, ones = text(4), torch.ones(1, 4, dtype=torch.long)
    alone = running(input_ids=row, position_ids=torch.arange(4)[None]).logits.detach()
    for pad in (0, 1):
        positions = torch.cat([torch.full((1, 2), pad), torch.arange(4)[None]], dim=1)
        mask = torch.cat([torch.zeros_like(ones)[:, :2], ones], dim=1)
        left = running(input_ids=torch.cat([row[:, :2], row], dim=1), attention_mask=mask, position_ids=positions)
        assert apart(left.logits[:, 2:].detach(), alone) < 1e-5


# transformers 4 says so of every name but its own, and returns them.
@pytest.mark.filterwarnings("ignore:.output_attentions=True. is not supported:UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("head", [False, True])
def test_hidden_states_are_of_real_tokens(family: str, head: bool) -> None:
    """As many as logits; attention shows the virtual ones, which it looked at."""
    model, ids = (tiny_model(family) if head else headless(family)), text(6)
    running = sb.attach(copy.deepcopy(model), prompts(model)["input"])
    with torch.no_grad():
        for return_dict in (True, False):
            told = {"input_ids": ids, "output_hidden_states": True, "output_attentions": True}
            found = running(**told, return_dict=return_dict)
            states = found.hidden_states if return_dict else next(each for each in found if isinstance(each, tuple))
            bare = model(**told).hidden_states
            assert [state.shape for state in states] == [state.shape for state in bare]
            assert apart(states[0], bare[0]) < (1e-12 if family == "llama" else 2.0)  # others add positions there
            assert apart(states[-1], bare[-1]) > 0.05
        if not head:
            assert apart(states[-1], running(input_ids=ids).last_hidden_state) == 0
        assert {attention.shape[-1] for attention in running(**told).attentions} == {11}
        running.softbridge.virtual_logits = True
        assert {state.shape[1] for state in running(**told).hidden_states} == {11}


def test_continuous_batching_is_refused_at_the_call() -> None:
    running = sb.attach(tiny_model("llama", torch.float32), prompts(tiny_model("llama"))["input"])
    for call in (running.generate_batch, running.init_continuous_batching):
        with pytest.raises(EngineError, match="continuous batching"):
            call([[5, 6, 7]])


@pytest.mark.parametrize("kind", ["input", "prefix"])
def test_it_is_exported(kind: str) -> None:
    """By torch.export, for rows and lengths that it was not shown, with and without pads."""
    model = tiny_model("llama", torch.float32, num_hidden_layers=1)
    running = sb.attach(copy.deepcopy(model), prompts(model)[kind])
    ids, mask = text(6, rows=2), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    told: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(
            running, (), told, dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None}
        )
        exported = program.module()
        more = {**told, "input_ids": text(9, 1, rows=3), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
        for given in (told, more):
            expected = running(**given).logits
            assert apart(exported(**given).logits, expected) == 0
            assert apart(model(**given).logits, expected) > 0.1


@pytest.mark.filterwarnings("ignore:.use_mamba_kernels:FutureWarning")
@pytest.mark.parametrize("attends", [0, 1])
def test_a_cache_whose_first_layer_may_keep_no_keys(attends: int) -> None:
    """Jamba's: what it generates with an input prompt is what it does by hand, whichever layer attends first."""
    size = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2}
    state = {"mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 1, "num_experts_per_tok": 1}
    settings = {**size, **attention, **state, "attn_layer_offset": attends, "initializer_range": 0.4}
    config = AutoConfig.for_model("jamba", **settings, use_mamba_kernels=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    prompt, ids = prompts(model)["input"], text(6)
    running = sb.attach(copy.deepcopy(model), prompt)
    vectors, grown = torch.tensor(prompt.inputs[0].vectors).double()[None], ids
    with torch.no_grad():
        for _ in range(3):
            embedded = torch.cat([vectors, model.get_input_embeddings()(grown)], dim=1)
            grown = torch.cat([grown, model(inputs_embeds=embedded, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(running, ids), grown)
    assert not torch.equal(greedy(model, ids), grown)
