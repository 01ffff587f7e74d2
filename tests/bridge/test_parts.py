"""Prompts taken apart and put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from softbridge.base import BaseModel
from softbridge.errors import SoftbridgeError
from softbridge.methods import MLP, PrefixTuning, rematerialise
from softbridge.parts import choose, join, split
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config

T5 = BaseModel(tiny_config("t5")).geometry


def every_site() -> SoftPrompt:
    """A prefix with a parameterisation at all three sites, and a head."""
    prompt = PrefixTuning(4, MLP(6)).initialise(T5, seed=3)
    return replace(prompt, head={"classifier.weight": np.ones((2, T5.hidden), np.float32)})


def test_there_and_back_is_the_same() -> None:
    prompt = every_site()
    parts = split(prompt)
    assert set(parts) == {"self", "encoder", "cross"}
    assert join(list(parts.values())) == prompt
    assert join([prompt]) == prompt


def test_each_part_keeps_its_own_training_state_and_positions() -> None:
    prompt = every_site()
    parts = split(prompt)
    for name, alone in parts.items():
        assert alone.parts == (prompt.prefix(name),)
        assert alone.training is not None
        assert {tensor.split(".")[0] for tensor in alone.training.tensors} == {name}
        assert rematerialise(alone).parts == alone.parts
    assert parts["cross"].positions.start == {}
    assert parts["encoder"].positions.start == {"encoder": 4}
    assert choose(prompt, "self") == parts["self"]


def test_a_relative_bias_that_is_lost_goes_with_its_stack() -> None:
    prompt = every_site()
    lost = replace(prompt, positions=replace(prompt.positions, unbiased_from={"encoder": 1}))
    parts = split(lost)
    assert {name: dict(part.positions.unbiased_from) for name, part in parts.items()} == {
        "self": {},
        "encoder": {"encoder": 1},
        "cross": {},
    }
    assert join(list(parts.values())) == lost


def test_an_input_prompt_and_a_prefix_in_one_stack_stay_where_they_are() -> None:
    vectors, prefix = random_input_prompt(T5, 3), random_prefix(T5, 4, sites=("encoder",))
    both = SoftPrompt((*vectors.parts, *prefix.parts), Positions({"encoder": 7}), vectors.base)
    parts = split(both)
    assert list(parts) == ["encoder-input", "encoder"]
    assert all(part.positions.start == {"encoder": 7} for part in parts.values())
    assert join(list(parts.values())) == both


def test_what_does_not_belong_together_is_refused() -> None:
    vectors, prefix = random_input_prompt(T5, 3), random_prefix(T5, 4, sites=("encoder",))
    with pytest.raises(ValueError, match="lower them to one target first"):
        join([vectors, prefix])  # one counts from 3, the other from 4
    with pytest.raises(ValueError, match="one prefix per site"):
        join([prefix, prefix])
    with pytest.raises(ValueError, match="one base model"):
        join([prefix, replace(random_prefix(T5, 4, sites=("cross",)), base=replace(prefix.base, name="other"))])
    with pytest.raises(ValueError, match="one base model"):
        join([prefix, replace(random_prefix(T5, 4, sites=("cross",)), head={"x": np.ones(2)})])
    parts = split(every_site())
    with pytest.raises(ValueError, match="training states"):
        join([parts["self"], replace(parts["encoder"], training=None)])
    with pytest.raises(ValueError, match="at least one"):
        join([])
    with pytest.raises(SoftbridgeError, match="no part is called 'decoder'"):
        choose(prefix, "decoder")
