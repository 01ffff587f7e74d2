"""The planner, and the passes that came with templates, gates, entries, layers, tasks and stored precisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import BFLOAT16
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, LoweringError, Obstacle, SoftbridgeError
from softbridge.lowering.examples import METHODS
from softbridge.lowering.planner import lower, plan
from softbridge.lowering.steps import Option, Pass, Step, Target
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.template import Field, Slot, Template, Verbaliser, Virtual, Words
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification.naive_copy import copied

IN_FRONT = Capabilities(inputs=frozenset({("encoder", "before", "before-sequence")}), input_start="counted")
BEHIND_ONE = Capabilities(inputs=frozenset({("encoder", "before", "after-first-token")}), input_start="counted")
BEHIND_BLOCK = Capabilities(
    inputs=frozenset({("encoder", "after", "before-sequence"), ("encoder", "after", "after-first-token")}),
    input_start="zero",
)
PREFIX = Capabilities(prefix_sites=frozenset({"self", "encoder", "cross"}))


def base(family: str) -> BaseModel:
    return BaseModel(tiny_config(family))


def names(error: pytest.ExceptionInfo[LoweringError]) -> dict[str, bool]:
    return {obstacle.name: obstacle.acceptable for obstacle in error.value.obstacles}


# The search


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
    assert names(refused) == {"window": True}, "no wall stands in the way of whoever accepts the window"


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


def test_rotary_keys_are_turned_rather_than_told() -> None:
    """Both ways are right; the one that burdens nobody is taken."""
    model = base("llama")
    able = replace(PREFIX, prefix_start="zero")
    found = plan(random_prefix(model.geometry), Target("t", able, model))
    assert [step.name for step in found.steps] == ["rotate"]
    untellable = replace(able, positions_told=False)
    assert [step.name for step in plan(random_prefix(model.geometry), Target("t", untellable, model)).steps] == [
        "rotate"
    ]


# Templates


def templated(*pieces: object, verbaliser: Verbaliser | None = None) -> SoftPrompt:
    prompt = random_input_prompt(base("bert").geometry, 5)
    template = Template(pieces, verbaliser)  # type: ignore[arg-type]
    part = replace(prompt.inputs[0], placement="template", template=template)
    return replace(prompt, parts=(part,), positions=replace(prompt.positions, start={"encoder": 0}))


def test_a_template_with_all_virtual_tokens_in_front_is_no_template() -> None:
    lowering = lower(templated(Virtual(5), Field("text")), Target("t", IN_FRONT, base("bert")))
    assert lowering.prompt == random_input_prompt(base("bert").geometry, 5)
    assert [(step.name, step.exactness) for step in lowering.steps] == [("placement", "exact")]


def test_the_words_of_a_template_are_a_condition() -> None:
    cloze = templated(Virtual(5), Field("text"), Words((4,)), Slot(), verbaliser=Verbaliser((("a", (1,)), ("b", (2,)))))
    with pytest.raises(LoweringError) as refused:
        lower(cloze, Target("t", IN_FRONT, base("bert")))
    assert names(refused) == {"template": True}
    assert lower(cloze, Target("t", IN_FRONT, base("bert")), accept=["template"]).prompt.inputs[0].template is None
    behind = templated(Words((1,)), Virtual(5), Field("text"))
    lowering = lower(behind, Target("t", BEHIND_ONE, base("bert")), accept=["template"])
    assert lowering.prompt.inputs[0].placement == "after-first-token"
    assert lowering.prompt.positions.start == {"encoder": 5}


@pytest.mark.parametrize(
    "pieces",
    [(Virtual(2), Field("text"), Virtual(3)), (Field("text"), Virtual(5)), (Words((1, 2)), Virtual(5), Field("text"))],
)
def test_virtual_tokens_at_free_positions_need_a_template(pieces: tuple[object, ...]) -> None:
    for able in (IN_FRONT, BEHIND_ONE, BEHIND_BLOCK):
        with pytest.raises(LoweringError) as refused:
            lower(templated(*pieces), Target("t", able, base("bert")))
        assert names(refused)["part"] is False


# Across the embedding block


def test_vectors_go_through_the_embedding_block() -> None:
    """What leaves the block: with the positions, the token type and the norm of the base model's own weights."""
    import torch

    model = tiny_model("bert")
    prompt = random_input_prompt(BaseModel.resolve(model).geometry, 5)
    lowering = lower(prompt, Target("t", BEHIND_BLOCK, BaseModel.resolve(model)), accept=["positions"])
    (part,) = lowering.prompt.inputs
    assert (part.entry, part.placement) == ("after", "before-sequence")
    assert [(step.name, step.exactness) for step in lowering.steps] == [
        ("entry", "rounding"),
        ("positions", "conditional"),
    ]
    embeddings = model.bert.embeddings
    with torch.no_grad():
        added = (
            torch.from_numpy(np.array(prompt.inputs[0].vectors)).double()
            + embeddings.position_embeddings.weight[:5]
            + embeddings.token_type_embeddings.weight[0]
        )
        expected = embeddings.LayerNorm(added).numpy()
    assert np.abs(part.vectors - expected).max() < 1e-6
    assert np.abs(part.vectors - prompt.inputs[0].vectors).max() > 0.5, "copying them would be wrong"
    assert lowering.prompt.positions.start == {"encoder": 5}, "real tokens stay where they were"


def test_moving_vectors_takes_weights_and_a_block_of_its_own() -> None:
    prompt = random_input_prompt(base("bert").geometry, 5)
    with pytest.raises(BaseModelError, match="configuration only"):
        lower(prompt, Target("t", BEHIND_BLOCK, base("bert")), accept=["positions"])
    with pytest.raises(BaseModelError, match="needs to know the base model"):
        lower(prompt, Target("t", BEHIND_BLOCK), accept=["positions"])
    t5 = random_input_prompt(base("t5").geometry, 5)
    able = replace(BEHIND_BLOCK, input_start=None)
    with pytest.raises(LoweringError) as refused:
        lower(t5, Target("t", able, BaseModel.resolve(tiny_model("t5"))))
    assert names(refused) == {"part": False}


def test_nothing_comes_back_from_behind_the_block() -> None:
    """A norm has no inverse: its outputs have mean 0 and variance 1 (before its own scale), and vectors need not."""
    prompt = random_input_prompt(base("bert").geometry, 5)
    behind = replace(prompt, parts=(replace(prompt.inputs[0], entry="after"),))
    with pytest.raises(LoweringError, match="cannot be undone") as refused:
        lower(behind, Target("t", IN_FRONT, BaseModel.resolve(tiny_model("bert"))))
    assert names(refused) == {"part": False}


# Gates, layers, heads


def test_gates_layers_and_heads_that_a_target_lacks_are_each_named() -> None:
    geometry = base("gpt2").geometry
    gated = METHODS["prefix-tuning-gated"](geometry)
    (part,) = gated.prefixes
    wide = KeyValue(np.zeros((2, 5, 16), np.float32), np.zeros((2, 5, 16), np.float32))
    ragged = KeyValuePrefix("self", {0: part.layers[0], 1: wide})
    prompt = replace(gated, parts=(ragged,), base=replace(gated.base, geometry=None))
    able = replace(PREFIX, every_layer=True)
    with pytest.raises(LoweringError) as refused:
        lower(replace(prompt, parts=(KeyValuePrefix("self", {0: part.layers[0], 2: wide}),)), Target("t", able))
    assert names(refused) == {"gates": False, "layers": False, "ragged": False}
    assert lower(prompt, Target("t", EVERYTHING)).prompt == prompt


def test_no_filling_of_a_layer_is_neutral() -> None:
    """Zeros take their share of the softmax, as the reason says; so do keys however long, for some query."""
    import torch

    model = base("gpt2")
    prompt = METHODS["prefix-tuning-layers"](model.geometry)
    tokens = torch.arange(3, 9)[None]

    def logits(one: SoftPrompt) -> torch.Tensor:
        running = sb.attach(tiny_model("gpt2"), one)
        with torch.no_grad():
            return running(input_ids=tokens).logits  # type: ignore[no-any-return]

    right = logits(prompt)
    (part,) = prompt.prefixes
    some = part.layers[0]
    for scale in (0.0, 1.0, 100.0):
        filling = replace(some, keys=some.keys * scale, values=np.zeros_like(some.values))
        filled = replace(prompt, parts=(replace(part, layers={**part.layers, 2: filling}),))
        assert float((logits(filled) - right).abs().max()) > 0.1, scale


# One of many


def test_other_tasks_are_not_left_behind_in_silence(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = METHODS["multitask-prompt-tuning"](base("gpt2").geometry)
    sb.save(prompt, tmp_path / "all", format="softbridge", base=config)
    able = replace(EVERYTHING, training=frozenset())
    with pytest.raises(LoweringError, match="--task") as refused:
        lower(prompt, Target("t", able))
    assert names(refused) == {"task": True}
    vectors = []
    for task in (0, 1):
        report = sb.convert(tmp_path / "all", tmp_path / str(task), "peft", base=config, task=task, verify=True)
        assert report.certificate is not None
        assert report.certificate.same
        assert [step.name for step in report.steps] == ["task"]
        vectors.append(next(sb.load(tmp_path / str(task), base=config).arrays())[1])
    assert np.array_equal(vectors[0], prompt.inputs[0].vectors)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1
    with pytest.raises(SoftbridgeError, match="there are 2 tasks"):
        sb.convert(tmp_path / "all", tmp_path / "2", "peft", base=config, task=2)


def test_one_part_of_many(tmp_path: Path) -> None:
    config = tiny_config("t5")
    prompt = METHODS["p-tuning-v2"](base("t5").geometry)
    sb.save(prompt, tmp_path / "all", format="softbridge", base=config)
    with pytest.raises(LoweringError, match="--part"):
        sb.convert(tmp_path / "all", tmp_path / "peft", "peft", base=config)
    report = sb.convert(tmp_path / "all", tmp_path / "peft", "peft", base=config, part="self")
    assert [step.name for step in report.steps] == ["part"]
    assert sb.load(tmp_path / "peft", base=config).parts == (prompt.prefix("self"),)
    with pytest.raises(SoftbridgeError, match="no part is called 'encoder-input'"):
        sb.convert(tmp_path / "all", tmp_path / "other", "peft", base=config, part="encoder-input")


# Stored precision


def test_narrowing_is_done_on_request_and_says_its_error(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(base("gpt2").geometry)
    sb.save(prompt, tmp_path / "wide", format="softbridge", base=config)
    for dtype, bound in (("bfloat16", 2**-8), ("float16", 2**-10)):
        report = sb.convert(tmp_path / "wide", tmp_path / dtype, "peft", base=config, dtype=dtype, verify=True)
        (step,) = report.steps
        assert (step.name, step.exactness) == ("narrow", "rounding")
        worst = float(step.note.rpartition("by ")[2].split()[0])
        keys = sb.load(tmp_path / dtype, base=config).prefixes[0].layers[0].keys
        assert keys.dtype == (BFLOAT16 if dtype == "bfloat16" else np.float16)
        assert bound / 8 < worst <= bound
        assert report.certificate is not None
        assert report.certificate.verdict == "bitwise", "rounded alike, the two are the same"
        assert sb.verify(tmp_path / "wide", tmp_path / dtype, base=config).same
    big = replace(prompt.prefixes[0].layers[0], keys=np.full_like(prompt.prefixes[0].layers[0].keys, 1e6))
    huge = replace(prompt, parts=(replace(prompt.prefixes[0], layers={**prompt.prefixes[0].layers, 0: big}),))
    with pytest.raises(LoweringError, match="too large for float16"):
        sb.save(huge, tmp_path / "huge", format="peft", base=config, dtype="float16")
    with pytest.raises(SoftbridgeError, match="no dtype is called 'int8'"):
        sb.save(prompt, tmp_path / "int8", format="peft", base=config, dtype="int8")


def test_widening_is_exact(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    lowering = sb.save(
        random_prefix(base("gpt2").geometry), tmp_path / "x", format="softbridge", base=config, dtype="float64"
    )
    assert [(step.name, step.exactness) for step in lowering.steps] == [("dtype", "exact")]


def test_what_was_turned_and_rounded_is_certified_before_the_rounding(tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(base("llama").geometry), tmp_path / "wide", format="softbridge", base=config)
    report = sb.convert(tmp_path / "wide", tmp_path / "out", "adapterhub", base=config, dtype="bfloat16", verify=True)
    assert [step.name for step in report.steps] == ["rotate", "narrow"]
    assert report.certificate is not None
    assert report.certificate.same
    assert report.certificate.rounded == ("rotate",)


# What copying would have done


def test_the_plain_copy_is_what_fits() -> None:
    geometry = base("t5").geometry
    every = METHODS["p-tuning-v2"](geometry)
    only_self = replace(PREFIX, prefix_sites=frozenset({"self"}), prefix_start="zero", parts=1, every_layer=True)
    naive = copied(every, Target("t", only_self, base("t5")))
    assert naive is not None
    assert naive.parts == (every.prefix("self"),)
    assert naive.positions.start == {"decoder": 0}
    assert copied(every, Target("t", IN_FRONT, base("t5"))) is None
    filled = copied(METHODS["prefix-tuning-layers"](geometry), Target("t", only_self, base("t5")))
    assert filled is not None
    assert not filled.prefixes[0].layers[2].keys.any()
    bare = copied(METHODS["prefix-tuning-gated"](geometry), Target("t", only_self, base("t5")))
    assert bare is not None
    assert not bare.prefixes[0].gated
    template = copied(METHODS["p-tuning-template"](base("bert").geometry), Target("t", IN_FRONT, base("bert")))
    assert template is not None
    assert template.inputs[0].placement == "before-sequence"
