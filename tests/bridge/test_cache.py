"""A model is given its cache under the name that it has for it, and asked for it under the name that it returns."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5ForSequenceClassification, T5Model

import softbridge as sb
from softbridge.arrays import to_torch
from softbridge.base import cache as caches
from softbridge.geometry import read_geometry
from softbridge.prompt import SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model

# What the engine itself hands over has no older name; the rest of the suite does not see that, for PEFT has.
pytestmark = pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")

IDS = torch.tensor([[5, 17, 40, 23, 61, 8]])


def test_the_name_is_the_signature_s_own() -> None:
    assert caches.argument(lambda ids, past_key_values=None: None) == "past_key_values"
    assert caches.argument(lambda ids, cache=None: None) == "cache"
    assert caches.argument(lambda ids, cache_params=None: None) == "cache_params"
    assert caches.argument(lambda ids, **kwargs: None) is None
    assert caches.length_argument(lambda ids, past_key_values_length=0: None) == "past_key_values_length"
    assert caches.length_argument(lambda ids, cache_length=0: None) == "cache_length"
    assert caches.length_argument(lambda ids: None) is None


def test_a_model_that_hands_a_cache_on_is_asked_within() -> None:
    """A classifier of an encoder-decoder names no cache, and gives whatever it is called with to its stacks."""
    config = tiny_config("t5")
    (name, cache), *more = caches.handed(T5ForSequenceClassification(config).forward, "held").items()
    assert (name, cache, more) == (caches.argument(T5Model.forward), "held", [])
    assert caches.argument(T5ForSequenceClassification.forward) in (None, name)
    for name in caches.NAMES:  # also one that is not the newest

        class Inner(torch.nn.Module):
            forward = {
                "cache": lambda self, ids, cache=None: None,
                "past_key_values": lambda self, ids, past_key_values=None: None,
                "cache_params": lambda self, ids, cache_params=None: None,
            }[name]

        class Outer(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = Inner()

            def forward(self, ids: Any, **more: Any) -> Any:
                return self.inner(ids, **more)

        assert caches.handed(Outer().forward, "held") == {name: "held"}
    assert caches.handed(lambda ids, **kwargs: None, "held") == {caches.NAMES[0]: "held"}
    assert caches.handed(lambda ids: None, None) == {}


def test_a_call_s_cache_is_renamed_and_nothing_else() -> None:
    arguments: dict[str, Any] = {"ids": 1, "past_key_values": "held", "cache": None}
    assert caches.name_given(arguments) == "past_key_values"
    assert caches.given(arguments) == "held"
    caches.rename(arguments, "cache")
    assert arguments == {"ids": 1, "cache": "held"}
    caches.rename(arguments, None)  # a callee that takes none
    assert arguments == {"ids": 1, "cache": "held"}
    assert caches.given({"ids": 1}) is None


def test_an_output_s_cache_is_found_and_dropped() -> None:
    model = tiny_model("llama")
    output = model(IDS, use_cache=True)
    assert int(caches.of(output).get_seq_length()) == IDS.shape[1]
    before = len(output.to_tuple())
    caches.drop(output)
    assert caches.of(output) is None
    assert len(output.to_tuple()) == before - 1
    caches.drop(output)  # there is none
    assert caches.of((1, 2)) is None
    assert caches.of(OrderedDict(logits=1)) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("make", [random_input_prompt, random_prefix])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_caller_s_loop_is_right_under_the_model_s_name(make: Any, family: str, name: str) -> None:
    """Token by token with a cache that the caller hands on, by the stack's own name or the one that a shim renames."""
    model = tiny_model(family)
    if name == "cache" != caches.argument(model.forward):
        pytest.skip("this transformers knows the older name only")
    prompt: SoftPrompt = make(read_geometry(model.config))
    running = sb.attach(copy.deepcopy(model), prompt)
    with torch.no_grad(), warnings.catch_warnings():
        if name == "past_key_values":  # that it is the older one
            warnings.simplefilter("ignore", FutureWarning)
        expected: Tensor = running(IDS, use_cache=False).logits
        found, state = [], None
        for n in range(IDS.shape[1]):
            output = running(IDS[:, n : n + 1], use_cache=True, **({name: state} if n else {}))
            state = caches.of(output)
            found.append(output.logits)
        forgotten = running(IDS[:, -1:], use_cache=True).logits
    largest = float(expected.abs().max())
    assert float((torch.cat(found, dim=1) - expected).abs().max()) < (1e-12 if family == "gpt2" else 1e-5) * largest
    assert float((forgotten - expected[:, -1:]).abs().max()) > 0.01 * largest


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_greedy_by_hand(family: str, use_cache: bool) -> None:
    """Rows embedded by hand, without a cache and without the engine; a shift of the prompt gives other tokens."""
    model = tiny_model(family)
    prompt = random_input_prompt(read_geometry(model.config))
    vectors = to_torch(prompt.inputs[0].vectors).double()[None]

    def by_hand(vectors: Tensor, new: int = 6) -> list[int]:
        grown = IDS
        with torch.no_grad():
            for _ in range(new):
                rows = torch.cat([vectors, model.get_input_embeddings()(grown)], dim=1)
                grown = torch.cat([grown, model(inputs_embeds=rows, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        return [int(token) for token in grown[0, -new:]]

    expected = by_hand(vectors)
    assert by_hand(vectors[:, 1:]) != expected
    assert by_hand(vectors[:, :0]) != expected
    running = sb.attach(copy.deepcopy(model), prompt)
    found = running.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
        use_cache=use_cache,
    )
    assert found[0, -6:].tolist() == expected
