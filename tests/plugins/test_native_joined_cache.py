"""A cache that keeps a prefix for decoding: it shows real tokens alone, whatever is done with it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import softbridge as sb
from softbridge.base import cache as caches
from softbridge.geometry import read_geometry
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.testing import agreement, apart, random_prefix, tiny_model
from softbridge_native.joined_cache import JoinedLayer

LENGTH = 5


def text(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def step(model: Any, ids: Tensor, cache: Any = None, **more: Any) -> tuple[Tensor, Any]:
    """Logits, and the cache."""
    handed = {} if cache is None else caches.handed(model.forward, cache)
    with torch.inference_mode():  # whose tensors count no versions
        found = model(input_ids=ids, use_cache=True, **handed, **more)
    return found.logits, caches.of(found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_cache_keeps_the_prefix_and_shows_real_tokens(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    geometry, close = read_geometry(model.config), agreement(model)
    running, other = (sb.attach(copy.deepcopy(model), random_prefix(geometry, LENGTH, seed=n)) for n in (1, 2))
    ids, mask = text(8, 2), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0  # decoding with pads makes a mask at each step
    for masked in (False, True):
        given: list[dict[str, Tensor]] = [{"attention_mask": mask[:, :n]} if masked else {} for n in range(9)]
        expected, _ = step(running, ids, **given[8])
        _, cache = step(running, ids[:, :6], **given[6])
        assert all(type(layer) is DynamicLayer for layer in cache.layers)
        for at in (6, 7):
            found, cache = step(running, ids[:, at : at + 1], cache, **given[at + 1])
            assert apart(found, expected[:, at : at + 1]) <= close
            for layer in cache.layers:
                assert isinstance(layer, JoinedLayer)
                assert layer.whole is not None
                assert layer.whole[0].shape[2] == LENGTH + at + 1
                assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length() == at + 1
        assert cache.get_seq_length() == 8
        assert apart(step(other, ids, **given[8])[0][:, 7:], expected[:, 7:]) > 1e-3  # the prefix is seen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_given_cache_keeps_the_prefix_from_the_first_call_on(family: str, implementation: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    running, close = sb.attach(model, random_prefix(read_geometry(model.config), LENGTH)), agreement(model)
    ids, mask = text(8, 2), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    for masked in (False, True):
        given: list[dict[str, Tensor]] = [{"attention_mask": mask[:, :n]} if masked else {} for n in range(9)]
        expected, _ = step(running, ids, **given[8])
        cache = DynamicCache(config=model.config)
        first, _ = step(running, ids[:, :6], cache, **given[6])
        assert apart(first[mask[:, :6] == 1], expected[:, :6][mask[:, :6] == 1]) <= close
        for layer in cache.layers:
            assert isinstance(layer, JoinedLayer)
            assert layer.whole is not None
            assert layer.whole[0].shape[2] == LENGTH + 6
        assert cache.get_seq_length() == 6
        cache.crop(-2)
        last, _ = step(running, ids[:, 4:], cache, **given[8])
        assert apart(last, expected[:, 4:]) <= close
    begun = DynamicCache(config=model.config)
    bare, _ = step(sb.detach(running), ids[:, :6], begun)
    assert apart(bare[1], expected[1, :6]) > 1e-3  # the prefix is seen
    assert all(type(layer) is DynamicLayer for layer in begun.layers)


def test_a_long_prefix_is_not_kept() -> None:
    """Attention in two parts reads it once for all rows."""
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    running = sb.attach(model, random_prefix(read_geometry(model.config), 40))
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")  # which knows no two parts
    eager = sb.attach(eager, random_prefix(read_geometry(model.config), 40))
    for running_here, rows, kept in ((running, 4, False), (running, 1, True), (eager, 4, True)):
        cache = DynamicCache(config=model.config)
        step(running_here, text(6, rows), cache)
        assert [layer.whole is not None for layer in cache.layers] == [kept] * len(cache.layers)


def test_others_find_real_tokens_in_it() -> None:
    """A copy, a pickled one, and the same model without its prompt."""
    model = tiny_model("llama")
    close = agreement(model)
    prompt = random_prefix(read_geometry(model.config), LENGTH)
    running, ids = sb.attach(copy.deepcopy(model), prompt), text(8)
    _, cache = step(running, ids[:, :6])
    _, cache = step(running, ids[:, 6:7], cache)
    expected, _ = step(running, ids)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache.layers[0]))):
        layer = getattr(twin, "layers", [twin])[0]
        assert type(layer) is DynamicLayer
        assert torch.equal(layer.keys, cache.layers[0].keys)
    twin = copy.deepcopy(cache)
    assert apart(step(running, ids[:, 7:], twin)[0], expected[:, 7:]) <= close

    bare, plain = sb.detach(running), copy.deepcopy(cache)
    without, _ = step(bare, ids[:, 7:], plain)
    found, cache = step(bare, ids[:, 7:], cache)  # its layers are those that keep the prefix
    assert apart(found, without) <= close
    assert apart(found, expected[:, 7:]) > 1e-3
    assert cache.get_seq_length() == 8


def test_rows_that_change_their_prompts_in_the_middle() -> None:
    model = tiny_model("llama")
    geometry, close = read_geometry(model.config), agreement(model)
    bank = PromptBank({name: random_prefix(geometry, n, seed=n) for n, name in ((3, "a"), (5, "b"))})
    running, ids = sb.attach(copy.deepcopy(model), bank), text(8, 2)
    with bank.rows(["a", "b"]):
        _, cache = step(running, ids[:, :6])
        _, cache = step(running, ids[:, 6:7], cache)
        kept = copy.deepcopy(cache)
    for names in (["b", "a"], ["b", "b"], ["a", "b"]):
        with bank.rows(names):
            found, _ = step(running, ids[:, 7:], copy.deepcopy(kept))
            again, cache = step(running, ids[:, 7:], cache)
        assert apart(again, found) <= close
        cache.crop(-1)
    with bank.rows(["a", "b"]):
        whole, _ = step(running, ids)
    assert apart(again, whole[:, 7:]) <= close
