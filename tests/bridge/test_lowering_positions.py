"""Lowering of positions: keys are rotated, callers are told, or it is refused: with every condition and its bound."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from softbridge.base import BaseModel
from softbridge.errors import LoweringError
from softbridge.lowering.planner import lower, plan
from softbridge.lowering.steps import Target
from softbridge.lowering.token_positions import native_positions
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.prompt import Positions, Training
from softbridge.testing import TINY, random_input_prompt, random_prefix, tiny_config

PREFIX = Capabilities(prefix_sites=frozenset({"self", "encoder", "cross"}))
COUNTED = Capabilities(
    prefix_sites=frozenset({"self", "encoder"}), prefix_start="counted", relative_bias="plain", window="slides"
)
UNCOUNTED = Capabilities(
    prefix_sites=frozenset({"self", "encoder", "cross"}),
    prefix_start="zero",
    relative_bias="skewed",
    window="pinned",
    training=frozenset({"mlp"}),
)


def base(family: str, **changes: object) -> BaseModel:
    return BaseModel(tiny_config(family, **changes))


def obstacles(error: pytest.ExceptionInfo[LoweringError]) -> dict[str, bool]:
    return {obstacle.name: obstacle.acceptable for obstacle in error.value.obstacles}


def test_rotary_keys_are_rotated_values_are_not_and_there_and_back_is_the_same() -> None:
    model = base("llama")
    prompt = random_prefix(model.geometry, length=6)
    lowering = lower(prompt, Target("x", UNCOUNTED, model))
    assert [(step.name, step.exactness) for step in lowering.steps] == [("rotate", "rounding")]
    assert lowering.prompt.positions == Positions({"decoder": 0}, "skewed", "pinned")
    before, after = prompt.prefix("self"), lowering.prompt.prefix("self")
    assert before is not None
    assert after is not None
    for layer in before.layers:
        assert np.array_equal(before.layers[layer].values, after.layers[layer].values)
        assert np.abs(before.layers[layer].keys - after.layers[layer].keys).max() > 0.1
        norms = [np.linalg.norm(pair.layers[layer].keys, axis=-1) for pair in (before, after)]
        assert np.allclose(*norms, rtol=1e-6), "the map is orthogonal"
    back = lower(lowering.prompt, Target("y", COUNTED, model)).prompt.prefix("self")
    assert back is not None
    for layer in before.layers:
        assert np.abs(before.layers[layer].keys - back.layers[layer].keys).max() < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_absolute_positions_are_a_condition_and_the_numbers_stay(family: str) -> None:
    model = base(family)
    prompt = random_prefix(model.geometry)
    with pytest.raises(LoweringError, match="position_ids") as refused:
        lower(prompt, Target("x", UNCOUNTED, model))
    assert obstacles(refused) == {"positions": True}
    assert "--accept positions" in str(refused.value)
    lowering = lower(prompt, Target("x", UNCOUNTED, model), accept=["positions"])
    assert [(step.name, step.exactness) for step in lowering.steps] == [("positions", "conditional")]
    assert lowering.prompt.parts == prompt.parts
    assert lowering.prompt.positions.start == prompt.positions.start, "the target is told, the frame is not changed"


def test_a_condition_is_none_where_nobody_can_be_told() -> None:
    model = base("gpt2")
    deaf = replace(UNCOUNTED, positions_told=False)
    with pytest.raises(LoweringError) as refused:
        lower(random_prefix(model.geometry), Target("x", deaf, model), accept=["positions"])
    assert obstacles(refused) == {"positions": False}


def test_a_relative_bias_cannot_be_moved() -> None:
    model = base("t5")
    prompt = random_prefix(model.geometry)
    skewed = replace(prompt, positions=Positions({"decoder": 0}, "skewed", "pinned"))
    for source, target in ((prompt, UNCOUNTED), (skewed, COUNTED)):
        with pytest.raises(LoweringError, match="relative position bias") as refused:
            lower(source, Target("x", target, model), accept=["positions"])
        assert obstacles(refused) == {"relative-bias": False, "positions": False}


def test_a_relative_bias_that_is_lost_does_not_come_back() -> None:
    model = base("t5")
    prompt = random_prefix(model.geometry)
    lost = replace(prompt, positions=replace(prompt.positions, unbiased_from={"decoder": 1}))
    assert lower(lost, Target("softbridge", EVERYTHING)).prompt == lost
    with pytest.raises(LoweringError, match="without a relative position bias in the decoder from layer 1") as refused:
        lower(lost, Target("x", COUNTED, model))
    assert obstacles(refused) == {"relative-bias": False}
    llama = base("llama")
    nothing = random_prefix(llama.geometry)
    nothing = replace(nothing, positions=replace(nothing.positions, unbiased_from={"decoder": 1}))
    assert lower(nothing, Target("x", COUNTED, llama)).prompt.positions == Positions(nothing.positions.start)


def test_cross_attention_has_no_positions() -> None:
    model = base("t5")
    prompt = random_prefix(model.geometry, sites=("cross",))
    assert lower(prompt, Target("x", UNCOUNTED, model)).prompt.parts == prompt.parts


def test_a_sliding_window_is_a_condition_with_its_bound() -> None:
    from transformers import AutoConfig

    sizes = {**TINY["llama"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = BaseModel(AutoConfig.for_model("mistral", **sizes, sliding_window=32))
    prompt = random_prefix(model.geometry, length=6)
    with pytest.raises(LoweringError, match="at most 26 tokens") as refused:
        lower(prompt, Target("x", UNCOUNTED, model))
    assert obstacles(refused) == {"window": True}
    steps = lower(prompt, Target("x", UNCOUNTED, model), accept=["window"]).steps
    assert [step.name for step in steps] == ["window", "rotate"]


def test_frequencies_that_depend_on_the_length_are_a_condition() -> None:
    model = base("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(LoweringError, match="one regime") as refused:
        lower(random_prefix(model.geometry), Target("x", UNCOUNTED, model))
    assert obstacles(refused) == {"length": True}


def test_rotated_keys_leave_their_parameterisation_behind() -> None:
    model = base("llama")
    prompt = replace(random_prefix(model.geometry), training=Training("mlp", {}, {"w": np.ones(3)}))
    lowering = lower(prompt, Target("x", UNCOUNTED, model))
    assert [step.name for step in lowering.steps] == ["rotate", "eject"]
    assert lowering.prompt.training is None


def test_native_positions_are_the_toolkits_own() -> None:
    prompt = random_prefix(base("t5").geometry, length=4, sites=("encoder", "self"))
    assert native_positions(prompt, COUNTED) == Positions({"encoder": 4, "decoder": 4}, "plain", "slides")
    assert native_positions(prompt, UNCOUNTED) == Positions({"encoder": 0, "decoder": 0}, "skewed", "pinned")
    assert native_positions(prompt, EVERYTHING) == prompt.positions


def test_input_prompts_are_counted_in_the_sequence_and_nobody_can_tell_otherwise() -> None:
    able = Capabilities(inputs=frozenset({("decoder", "before", "before-sequence")}), input_start="counted")
    for family, kind in (("gpt2", "absolute"), ("llama", "rotary")):
        model = base(family)
        prompt = replace(random_input_prompt(model.geometry), positions=Positions({"decoder": 0}))
        if kind == "absolute":
            with pytest.raises(LoweringError) as refused:
                lower(prompt, Target("x", able, model), accept=["positions"])
            assert obstacles(refused) == {"positions": False}
        else:  # the whole sequence moves: nothing is rotated, nothing changes
            lowering = lower(prompt, Target("x", able, model))
            assert [(step.name, step.exactness) for step in lowering.steps] == [("positions", "exact")]
            assert lowering.prompt.parts == prompt.parts
            assert lowering.prompt.positions.start == {"decoder": 5}


def test_a_window_shorter_than_the_prefix_is_no_condition() -> None:
    from transformers import AutoConfig

    sizes = {**TINY["llama"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = BaseModel(AutoConfig.for_model("mistral", **sizes, sliding_window=4))
    with pytest.raises(LoweringError) as refused:
        lower(random_prefix(model.geometry, length=6), Target("x", UNCOUNTED, model), accept=["window"])
    assert obstacles(refused) == {"window": False}


def test_rotary_keys_are_rotated_rather_than_told() -> None:
    """Both ways are right; the one that burdens nobody is taken."""
    model = base("llama")
    able = replace(PREFIX, prefix_start="zero")
    found = plan(random_prefix(model.geometry), Target("t", able, model))
    assert [step.name for step in found.steps] == ["rotate"]
    untellable = replace(able, positions_told=False)
    assert [step.name for step in plan(random_prefix(model.geometry), Target("t", untellable, model)).steps] == [
        "rotate"
    ]
