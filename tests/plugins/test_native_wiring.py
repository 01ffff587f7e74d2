"""What is found out by running the user's model leaves it as it was; what cannot be found out so stays unknown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import softbridge as sb
from softbridge.geometry import read_geometry
from softbridge.testing import random_input_prompt, random_prefix, tiny_model
from softbridge_native import wiring
from softbridge_native.anatomy import word


def remembering(model: Any) -> Any:
    """A model whose layers keep something of each call, as rotary embeddings and Qwen2-VL do, and draw numbers."""
    block = model.model.layers[0].mlp
    block.register_buffer("seen", torch.zeros(1), persistent=False)
    plain = type(block).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen, self.calls, self.last = self.seen + torch.rand(1), self.calls + 1, args
        return plain(self, *args, **kwargs)

    block.calls = 0
    block.__class__ = type("Remembering", (type(block),), {"forward": forward, "__module__": plain.__module__})
    return model


def state(model: Any) -> Any:
    modes = {name: module.training for name, module in model.named_modules()}
    kept = {name: sorted(vars(module)) for name, module in model.named_modules()}
    block = model.model.layers[0].mlp
    return modes, kept, block.calls, float(block.seen), torch.random.get_rng_state().tolist()


@pytest.mark.parametrize("make", [random_prefix, random_input_prompt])
def test_attaching_leaves_the_model_as_it_was(make: Any) -> None:
    model = remembering(tiny_model("llama")).train()
    model.model.layers[1].mlp.eval()  # frozen by the user
    before = state(model)
    running = sb.attach(model, make(read_geometry(model.config), 3))
    sb.detach(running)
    assert state(model) == before
    model(input_ids=torch.tensor([[5]]))
    assert state(model) != before  # it does remember


@pytest.mark.parametrize("kind", ["meta", "shard", "empty"])
def test_weights_that_are_elsewhere_are_not_called_for(kind: str) -> None:
    model = remembering(tiny_model("llama"))
    layer = model.model.layers[1].self_attn.q_proj
    if kind == "meta":
        layer.weight = nn.Parameter(layer.weight.to("meta"))
    elif kind == "shard":
        layer.weight.placements = ()  # as a DTensor has
    else:
        layer.weight = nn.Parameter(layer.weight[:0])
    sb.attach(model, random_prefix(read_geometry(model.config), 3))
    assert wiring._known[model.model] is None
    assert model.model.layers[0].mlp.calls == 0


def test_a_word_where_several_tokens_end_a_text() -> None:
    model = tiny_model("llama")
    model.config.eos_token_id = [0, 1, 3]
    model.config.pad_token_id = 2
    assert word(model.config) == 4
    assert wiring.some_token(model.model).tolist() == [[4]]
    assert sb.attach(model, random_input_prompt(read_geometry(model.config), 3)) is not None
