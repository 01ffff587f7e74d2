"""The passes of lowering: what each does to the numbers, what it says of itself, and that every obstacle is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, LoweringError, SoftbridgeError
from softbridge.lowering.planner import lower
from softbridge.lowering.precision import as_dtype
from softbridge.lowering.steps import Target
from softbridge.lowering.token_positions import native_positions
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.prompt import KeyValue, KeyValuePrefix, Positions, Training, digest_of
from softbridge.testing import TINY, random_input_prompt, random_prefix, tiny_config

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


def test_everything_is_expressible_in_the_canonical_form() -> None:
    for family in ("llama", "t5"):
        prompt = random_prefix(base(family).geometry)
        lowering = lower(prompt, Target("softbridge", EVERYTHING))
        assert lowering.prompt == prompt
        assert lowering.steps == ()


def test_rotary_keys_are_turned_values_are_not_and_there_and_back_is_the_same() -> None:
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


def test_every_obstacle_is_named_at_once() -> None:
    model = base("t5")
    prompt = random_prefix(model.geometry, sites=("cross", "self"))
    prompt = replace(
        prompt,
        parts=(*prompt.parts, *random_input_prompt(model.geometry).parts),
        positions=Positions({"encoder": 5, "decoder": 5}),
        head={"a": np.ones(2)},
    )
    with pytest.raises(LoweringError) as refused:
        lower(prompt, Target("x", replace(COUNTED, relative_bias="skewed", model_types=frozenset({"bert"})), model))
    assert set(obstacles(refused)) == {"family", "part", "head", "relative-bias"}
    assert len(refused.value.obstacles) == 5
    assert all(obstacle.reason in str(refused.value) for obstacle in refused.value.obstacles)


def test_what_cannot_be_kept_is_said() -> None:
    model = base("gpt2")
    training = Training("mlp", {}, {"w": np.ones(3)})
    prompt = replace(random_prefix(model.geometry), training=training)
    ejected = lower(prompt, Target("x", COUNTED, model))
    assert [(step.name, step.exactness) for step in ejected.steps] == [("eject", "exact")]
    assert ejected.prompt.training is None
    kept = lower(prompt, Target("x", UNCOUNTED, model), accept=["positions"])
    assert kept.prompt.training == training


def test_turned_keys_leave_their_reparameterisation_behind() -> None:
    model = base("llama")
    prompt = replace(random_prefix(model.geometry), training=Training("mlp", {}, {"w": np.ones(3)}))
    lowering = lower(prompt, Target("x", UNCOUNTED, model))
    assert [step.name for step in lowering.steps] == ["rotate", "eject"]
    assert lowering.prompt.training is None


def test_the_base_model_is_asked_for_only_where_it_is_needed() -> None:
    prompt = random_prefix(base("llama").geometry)
    assert lower(prompt, Target("x", COUNTED)).prompt == prompt
    with pytest.raises(BaseModelError, match="--base"):
        lower(prompt, Target("x", UNCOUNTED))


def test_a_prompt_for_another_base_is_refused_with_every_mismatch() -> None:
    prompt = random_prefix(base("llama").geometry)
    with pytest.raises(BaseModelError) as refused:
        lower(prompt, Target("x", COUNTED, base("qwen3", num_hidden_layers=2)))
    assert "2 key/value heads of size 8 in layer 0, the model has 2 of size 12" in refused.value.found
    assert "layer 2, the model has 2 layers" in refused.value.found
    with pytest.raises(BaseModelError, match="'self', which bert lacks"):
        lower(prompt, Target("x", COUNTED, base("bert")))


def test_native_positions_are_the_toolkits_own() -> None:
    prompt = random_prefix(base("t5").geometry, length=4, sites=("encoder", "self"))
    assert native_positions(prompt, COUNTED) == Positions({"encoder": 4, "decoder": 4}, "plain", "slides")
    assert native_positions(prompt, UNCOUNTED) == Positions({"encoder": 0, "decoder": 0}, "skewed", "pinned")
    assert native_positions(prompt, EVERYTHING) == prompt.positions


def test_nothing_is_changed_in_place() -> None:
    model = base("llama")
    prompt = random_prefix(model.geometry)
    before = digest_of(prompt)
    lower(prompt, Target("x", UNCOUNTED, model))
    assert digest_of(prompt) == before
    part = prompt.prefix("self")
    assert isinstance(part, KeyValuePrefix)
    with pytest.raises(ValueError, match="read-only"):
        part.layers[0].keys[0, 0, 0] = 1


def test_input_prompts_are_counted_in_the_sequence_and_nobody_can_tell_otherwise() -> None:
    able = Capabilities(inputs=frozenset({("decoder", "before", "before-sequence")}), input_start="counted")
    for family, kind in (("gpt2", "absolute"), ("llama", "rotary")):
        model = base(family)
        prompt = replace(random_input_prompt(model.geometry), positions=Positions({"decoder": 0}))
        if kind == "absolute":
            with pytest.raises(LoweringError) as refused:
                lower(prompt, Target("x", able, model), accept=["positions"])
            assert obstacles(refused) == {"positions": False}
        else:  # the whole sequence moves: nothing turns, nothing changes
            lowering = lower(prompt, Target("x", able, model))
            assert [(step.name, step.exactness) for step in lowering.steps] == [("positions", "exact")]
            assert lowering.prompt.parts == prompt.parts
            assert lowering.prompt.positions.start == {"decoder": 5}


def test_narrow_keys_are_widened_before_they_are_rotated() -> None:
    import ml_dtypes

    model = base("llama")
    prompt = random_prefix(model.geometry)
    part = prompt.prefixes[0]
    narrow = {
        layer: KeyValue(pair.keys.astype(ml_dtypes.bfloat16), pair.values.astype(ml_dtypes.bfloat16))
        for layer, pair in part.layers.items()
    }
    prompt = replace(prompt, parts=(KeyValuePrefix("self", narrow),))
    rotated = lower(prompt, Target("x", UNCOUNTED, model)).prompt.prefixes[0]
    back = lower(lower(prompt, Target("x", UNCOUNTED, model)).prompt, Target("y", COUNTED, model)).prompt.prefixes[0]
    for layer, pair in rotated.layers.items():
        assert pair.keys.dtype == pair.values.dtype == np.float32
        assert np.abs(back.layers[layer].keys - narrow[layer].keys.astype(np.float32)).max() < 1e-6


def test_a_window_shorter_than_the_prefix_is_no_condition() -> None:
    from transformers import AutoConfig

    sizes = {**TINY["llama"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = BaseModel(AutoConfig.for_model("mistral", **sizes, sliding_window=4))
    with pytest.raises(LoweringError) as refused:
        lower(random_prefix(model.geometry, length=6), Target("x", UNCOUNTED, model), accept=["window"])
    assert obstacles(refused) == {"window": False}


def test_unknown_conditions_are_refused() -> None:
    with pytest.raises(SoftbridgeError, match="no condition is called 'nonsense'"):
        lower(random_prefix(base("llama").geometry), Target("x", COUNTED), accept=["nonsense"])


def test_what_a_target_would_round_is_a_condition_with_its_error() -> None:
    model = base("gpt2")
    prompt = as_dtype(random_prefix(model.geometry), np.dtype(np.float64))
    short = replace(COUNTED, dtypes=frozenset({"float32"}))
    fits = lower(prompt, Target("x", short, model))
    assert [(step.name, step.exactness) for step in fits.steps] == [("dtype", "exact")]
    assert {array.dtype for _, array in fits.prompt.arrays()} == {np.dtype(np.float32)}
    thirds = replace(
        prompt,
        parts=(
            KeyValuePrefix("self", {n: KeyValue(p.keys / 3, p.values) for n, p in prompt.prefixes[0].layers.items()}),
        ),
    )
    with pytest.raises(LoweringError, match=r"by \d\.\de-08 of themselves") as refused:
        lower(thirds, Target("x", short, model))
    assert obstacles(refused) == {"dtype": True}
    rounded = lower(thirds, Target("x", short, model), accept=["dtype"])
    assert [(step.name, step.exactness) for step in rounded.steps] == [("dtype", "conditional")]


def test_a_rounding_that_was_accepted_is_the_only_difference(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = as_dtype(random_prefix(BaseModel(config).geometry), np.dtype(np.float64))
    layers = {n: KeyValue(p.keys / 3, p.values) for n, p in prompt.prefixes[0].layers.items()}
    sb.save(replace(prompt, parts=(KeyValuePrefix("self", layers),)), tmp_path / "a", format="softbridge", base=config)
    with pytest.raises(LoweringError, match="--accept dtype"):
        sb.convert(tmp_path / "a", tmp_path / "b", "peft", base=config)
    report = sb.convert(tmp_path / "a", tmp_path / "b", "peft", base=config, accept=["dtype"], verify=True)
    assert report.certificate is not None
    assert report.certificate.verdict == "bitwise"
    assert report.certificate.conditions == ("dtype",)
    assert report.certificate.claim.dtype == "float32"
    assert report.certificate.source.path == str(tmp_path / "a")
    assert sb.verify(tmp_path / "a", tmp_path / "b", base=config).conditions == ("dtype",)
    (tmp_path / "b" / "softbridge.json").unlink()
    assert not sb.verify(tmp_path / "a", tmp_path / "b", base=config).same, "the rounding is seen if nobody accepted it"
