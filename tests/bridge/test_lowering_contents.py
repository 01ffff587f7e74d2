"""Lowering of templates, the embedding block, gates, layers, heads, tasks and parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, LoweringError, SoftbridgeError
from softbridge.lowering.examples import METHODS
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.template import Field, Slot, Template, Verbaliser, Virtual, Words
from softbridge.testing import random_input_prompt, tiny_config, tiny_model
from softbridge.verification.naive_copy import copied

IN_FRONT = Capabilities(inputs=frozenset({("encoder", "before", "before-sequence")}), input_start="counted")
BEHIND_ONE = Capabilities(inputs=frozenset({("encoder", "before", "after-first-token")}), input_start="counted")
BEHIND_BLOCK = Capabilities(
    inputs=frozenset({("encoder", "after", "before-sequence"), ("encoder", "after", "after-first-token")}),
    input_start="zero",
)
PREFIX = Capabilities(prefix_sites=frozenset({"self", "encoder", "cross"}))


def base(family: str, **changes: object) -> BaseModel:
    return BaseModel(tiny_config(family, **changes))


def obstacles(error: pytest.ExceptionInfo[LoweringError]) -> dict[str, bool]:
    return {obstacle.name: obstacle.acceptable for obstacle in error.value.obstacles}


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
    assert obstacles(refused) == {"template": True}
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
        assert obstacles(refused)["part"] is False


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
    assert obstacles(refused) == {"part": False}


def test_nothing_comes_back_from_behind_the_block() -> None:
    """A norm has no inverse: its outputs have mean 0 and variance 1 (before its own scale), and vectors need not."""
    prompt = random_input_prompt(base("bert").geometry, 5)
    behind = replace(prompt, parts=(replace(prompt.inputs[0], entry="after"),))
    with pytest.raises(LoweringError, match="cannot be undone") as refused:
        lower(behind, Target("t", IN_FRONT, BaseModel.resolve(tiny_model("bert"))))
    assert obstacles(refused) == {"part": False}


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
    assert obstacles(refused) == {"gates": False, "layers": False, "ragged": False}
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


def test_other_tasks_are_not_left_behind_silently(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = METHODS["multitask-prompt-tuning"](base("gpt2").geometry)
    sb.save(prompt, tmp_path / "all", format="softbridge", base=config)
    able = replace(EVERYTHING, training=frozenset())
    with pytest.raises(LoweringError, match="--task") as refused:
        lower(prompt, Target("t", able))
    assert obstacles(refused) == {"task": True}
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
