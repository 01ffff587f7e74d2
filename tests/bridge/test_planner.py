"""The planner takes the cheapest way, names every obstacle at once, and changes nothing in place."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, LoweringError, Obstacle, SoftbridgeError
from softbridge.lowering.planner import lower, plan
from softbridge.lowering.steps import Option, Pass, Step, Target
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.prompt import KeyValuePrefix, Positions, SoftPrompt, Training, digest_of
from softbridge.testing import random_input_prompt, random_prefix, tiny_config

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


def ways(*outcomes: tuple[str, str, bool | None]) -> Pass:
    """A pass with a way for each (needed mark, mark that it leaves, None | hard | acceptable obstacle)."""

    def run(prompt: SoftPrompt, target: Target) -> list[Option]:
        made = []
        for needed, mark, obstacle in outcomes:
            if needed in (prompt.base.name or ""):
                marked = replace(prompt, base=replace(prompt.base, name=(prompt.base.name or "") + mark))
                met = () if obstacle is None else (Obstacle("window" if obstacle else "wall", mark, "", obstacle),)
                made.append(Option(marked, (Step(mark, "exact", mark),), met))
        return made

    return run


def test_a_way_that_is_dearer_now_is_taken_where_it_is_cheaper_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prefix(base("gpt2").geometry)
    monkeypatch.setattr(
        "softbridge.lowering.planner.PASSES",
        (ways(("", "a", None), ("", "b", True)), ways(("a", "x", False), ("b", "y", None))),
    )
    assert plan(prompt, Target("t", EVERYTHING)).prompt.base.name == "by"
    assert lower(prompt, Target("t", EVERYTHING), accept=["window"]).prompt.base.name == "by"
    with pytest.raises(LoweringError) as refused:
        lower(prompt, Target("t", EVERYTHING))
    assert obstacles(refused) == {"window": True}, "no wall stands in the way of whoever accepts the window"


def test_the_shortest_of_equal_ways_and_every_obstacle_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prefix(base("gpt2").geometry)
    short = ways(("", "a", None), ("", "b", None))
    monkeypatch.setattr("softbridge.lowering.planner.PASSES", (short, ways(("a", "x", None)), ways(("x", "z", None))))
    assert plan(prompt, Target("t", EVERYTHING)).prompt.base.name == "axz"
    walls = (ways(("", "p", False)), ways(("", "q", False)), ways(("", "r", True)))
    monkeypatch.setattr("softbridge.lowering.planner.PASSES", walls)
    with pytest.raises(LoweringError) as refused:
        lower(prompt, Target("t", EVERYTHING))
    assert [obstacle.reason for obstacle in refused.value.obstacles] == ["p", "q", "r"]


def test_everything_is_expressible_in_the_canonical_form() -> None:
    for family in ("llama", "t5"):
        prompt = random_prefix(base(family).geometry)
        lowering = lower(prompt, Target("softbridge", EVERYTHING))
        assert lowering.prompt == prompt
        assert lowering.steps == ()


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


def test_unknown_conditions_are_refused() -> None:
    with pytest.raises(SoftbridgeError, match="no condition is called 'nonsense'"):
        lower(random_prefix(base("llama").geometry), Target("x", COUNTED), accept=["nonsense"])


def test_what_cannot_be_kept_is_said() -> None:
    model = base("gpt2")
    training = Training("mlp", {}, {"w": np.ones(3)})
    prompt = replace(random_prefix(model.geometry), training=training)
    ejected = lower(prompt, Target("x", COUNTED, model))
    assert [(step.name, step.exactness) for step in ejected.steps] == [("eject", "exact")]
    assert ejected.prompt.training is None
    kept = lower(prompt, Target("x", UNCOUNTED, model), accept=["positions"])
    assert kept.prompt.training == training
