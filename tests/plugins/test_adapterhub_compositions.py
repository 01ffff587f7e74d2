"""`Stack`, `BatchSplit` and `Parallel` of prompts: in files, and in models that AdapterHub itself set up."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge import untrusted
from softbridge.arrays import Array, same_array
from softbridge.errors import CheckpointError, EngineError
from softbridge.geometry import Geometry, StackGeometry, read_geometry
from softbridge.plugin.prompt_bank import PromptBank
from softbridge.plugin.registry import engines
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import agreement, as_bytes, random_prefix, tiny_config
from softbridge.untrusted import Files
from softbridge_adapterhub import composition, facts
from softbridge_adapterhub.composition import Block, blocks
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

pytestmark = [
    # AdapterHub's T5 passes transformers an argument under its old name.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
]

NATIVE = engines()["native"]


def single(name: str) -> dict[str, Any]:
    return {"type": "single", "children": [name]}


def composed(kind: str, *children: Any, **kwargs: Any) -> dict[str, Any]:
    named = [single(child) if isinstance(child, str) else child for child in children]
    return {"type": kind, "children": named, **({"kwargs": kwargs} if kwargs else {})}


@pytest.mark.parametrize(
    ("setup", "found"),
    [
        (single("a"), [(("a",), None)]),
        (composed("Stack", "a", "b"), [(("a", "b"), None)]),
        (composed("Stack", composed("Parallel", "a", "b")), [(("a",), None), (("b",), None)]),
        (composed("BatchSplit", "a", "b", batch_sizes=[1, 3]), [(("a",), 1), (("b",), 3)]),
        (
            composed("Stack", "c", composed("BatchSplit", composed("Stack", "a", "d"), "b", batch_sizes=[1, 3])),
            [(("c", "a", "d"), 1), (("c", "b"), 3)],
        ),
    ],
)
def test_blocks(setup: Any, found: list[Any]) -> None:
    assert list(blocks(setup)) == [Block(*block) for block in found]


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (composed("Parallel", "a"), r"no prompts composed as Parallel\[a\]"),
        (composed("Stack", composed("Fuse", "a", "b")), r"no prompts composed as Fuse\[a, b\]"),
        (composed("Split", "a", "b", splits=[1, 2]), r"no prompts composed as Split\[a, b\]"),
        (composed("Stack"), r"no prompts composed as Stack\[\]"),
        (composed("BatchSplit", "a", "b", batch_sizes=[1]), r"composed as BatchSplit\[a, b\]"),
        (composed("BatchSplit", "a", "b", batch_sizes=[1, "x"]), r"composed as BatchSplit\[a, b\]"),
        (composed("BatchSplit", "a", "b"), r"composed as BatchSplit\[a, b\]"),
        ({"type": "Stack", "children": "ab"}, r"composed as \{'type': 'Stack', 'children': 'ab'\}"),
        (composed("Stack", single(4)), r"composed as single\[4\]"),  # type: ignore[arg-type]
        (
            composed("Stack", composed("Parallel", "a", "b"), composed("Parallel", "a", "b")),
            "stacks what differs from row to row",
        ),
        (composed("Parallel", composed("BatchSplit", "a", "b", batch_sizes=[1, 1]), "c"), "splits a batch within"),
        (None, "composed as None"),
    ],
)
def test_what_has_no_blocks_is_named(setup: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(setup)


# --- files -----------------------------------------------------------------------------------------------------------


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def prefix_for(geometry: Geometry, length: int, seed: int) -> SoftPrompt:
    prompt = random_prefix(geometry, length, seed=seed)
    return replace(prompt, positions=Positions(dict.fromkeys(prompt.positions.start, 0), "skewed", "pinned"))


def setup_in(folder: Path, setup: Any, **prompts: SoftPrompt) -> Files:
    document = {"adapter_setup": setup, "head_setup": None, "version": "adapters.x"}
    put(folder, {facts.SETUP_FILE: untrusted.json_bytes(document)})
    for name, prompt in prompts.items():
        put(folder / name, as_bytes(FORMAT.write(prompt, None)))
    return Files(folder)


def test_a_stack_in_files_is_one_prefix(tmp_path: Path) -> None:
    geometry = read_geometry(tiny_config("bert"))
    a, b = prefix_for(geometry, 3, 0), prefix_for(geometry, 5, 1)
    prompt = FORMAT.read(setup_in(tmp_path / "x", composed("Stack", "a", "b"), a=a, b=b), geometry)
    (part,), (first,), (second,) = prompt.prefixes, a.prefixes, b.prefixes
    assert part.length == 8
    for layer, pair in part.layers.items():
        assert same_array(pair.keys, np.concatenate([second.layers[layer].keys, first.layers[layer].keys], 1))
        assert same_array(pair.values, np.concatenate([second.layers[layer].values, first.layers[layer].values], 1))
    assert prompt.positions == a.positions
    assert prompt.origin is not None
    assert len(prompt.origin.digests) == 4
    assert "Stack[a, b] is one prefix" in prompt.origin.notes[0]
    assert FORMAT.read(Files(put(tmp_path / "y", as_bytes(FORMAT.write(prompt, None)))), geometry) == prompt


def test_several_prompts_are_no_prompt(tmp_path: Path) -> None:
    geometry = read_geometry(tiny_config("bert"))
    prompts = {name: prefix_for(geometry, 4, number) for number, name in enumerate("ab")}
    setup = composed("Stack", composed("BatchSplit", "a", "b", batch_sizes=[1, 1]))
    with pytest.raises(CheckpointError, match=r"(?s)BatchSplit\[a, b\].*several prompts, for different rows"):
        FORMAT.read(setup_in(tmp_path / "x", setup, **prompts), geometry)
    with pytest.raises(CheckpointError, match=r"no prompts composed as Fuse\[a, b\]"):
        FORMAT.read(setup_in(tmp_path / "y", composed("Stack", composed("Fuse", "a", "b")), **prompts), geometry)
    with pytest.raises(CheckpointError, match=r"b/adapter_config\.json"):
        FORMAT.read(setup_in(tmp_path / "z", composed("Stack", "a", "b"), a=prompts["a"]), geometry)
    other = prefix_for(Geometry("bert", 32, 96, StackGeometry(3, 4, 4, 8), None), 4, 2)
    heads = {name: replace(other, head=head(number)) for number, name in enumerate("ab")}
    with pytest.raises(CheckpointError, match="heads of their own"):
        FORMAT.read(setup_in(tmp_path / "w", composed("Stack", "a", "b"), **heads), geometry)
    alike = {name: replace(other, head=head(0)) for name in "ab"}
    assert FORMAT.read(setup_in(tmp_path / "v", composed("Stack", "a", "b"), **alike), geometry).head.keys() == {
        "classifier.weight",
        "classifier.bias",
    }


def head(seed: int) -> dict[str, Array]:
    numbers = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    return {name: numbers.normal(size=size).astype(np.float32) for name, size in shapes.items()}


# --- models ----------------------------------------------------------------------------------------------------------

_SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "pad_token_id": 0}
_BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "llama": {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2},
    "bert": {**_SIZES, "num_attention_heads": 2},
    "distilbert": {"vocab_size": 40, "dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2},
    "bart": {**_BART, "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20},
    "t5": {"vocab_size": 40, "d_model": 16, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2},
}


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def model_of(family: str) -> Any:
    import torch
    from transformers import AutoConfig

    from softbridge.base import BaseModel, build

    config = AutoConfig.for_model(family, **{"bos_token_id": 1, "eos_token_id": 2, **CONFIGS[family]})
    if family == "t5":
        config.decoder_start_token_id = 0
    return build(config, BaseModel(config).task, torch.float64, 0)


def logits(model: Any, rows: Any = slice(None)) -> Array:
    """Of three texts, the last of them padded; or of some of these."""
    import torch

    tokens = torch.tensor([[5, 9, 17, 33, 21, 8], [4, 12, 25, 6, 38, 19], [7, 11, 3, 30, 0, 0]])[rows]
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(0)[:, :4]
    with torch.no_grad():
        return np.asarray(model(**inputs).logits)


def toolkit(adapters: Any, model: Any, *configs: Any) -> Any:
    """The model with adapters a, b, ... of large random numbers."""
    import torch

    running = copy.deepcopy(model)
    adapters.init(running)
    generator = torch.Generator().manual_seed(5)
    for name, config in zip("abc", configs, strict=False):
        running.add_adapter(name, config)
        running.adapter_to(name, dtype=torch.float64)
        with torch.no_grad():
            for path, parameter in running.named_parameters():
                if f".{name}." in path:
                    parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return running.eval()


def active(running: Any, setup: Any) -> Array:
    running.set_active_adapters(setup)
    return logits(running)


def apart(a: Array, b: Array) -> float:
    """Relative to the largest logit."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_composition_is_taken_out_of_a_model(family: str, adapters: Any, tmp_path: Path) -> None:
    from adapters.composition import BatchSplit, Parallel, Stack

    model = model_of(family)
    close = agreement(model)
    flat = {"flat": True}
    lengths = (4, 4, 3)
    running = toolkit(adapters, model, *(adapters.PrefixTuningConfig(prefix_length=n, **flat) for n in lengths))
    runs = not NATIVE.obstacles(sb.extract(set_active(running, "a")), model)

    def with_prompt(prompt: SoftPrompt) -> Array:
        found = logits(ENGINE.attach(copy.deepcopy(model), prompt))
        if runs:
            assert apart(logits(NATIVE.attach(copy.deepcopy(model), prompt)), found) <= close
        return found

    alone = {name: active(running, name) for name in "abc"}
    for name in "abc":
        assert apart(with_prompt(ENGINE.extract(running, adapter=name)), alone[name]) <= close
    assert apart(alone["a"], alone["b"]) > 0.05

    expected = active(running, Stack("a", "c"))
    stacked = ENGINE.extract(running)
    assert stacked.prefixes[0].length == 7
    assert apart(with_prompt(stacked), expected) <= close
    assert min(apart(expected, alone["a"]), apart(expected, alone["c"])) > 0.05
    running.save_adapter_setup(str(tmp_path), Stack("a", "c"))
    read = FORMAT.read(Files(tmp_path), read_geometry(model.config))
    assert read == stacked
    assert apart(logits(ENGINE.load(copy.deepcopy(model), read, tmp_path)), expected) <= close

    expected = active(running, BatchSplit("a", Stack("b"), batch_sizes=[1, 2]))
    found = ENGINE.blocks(running)
    assert [one.rows for one in found] == [1, 2]
    assert apart(with_prompt(found[0].prompt)[:1], expected[:1]) <= close
    assert apart(with_prompt(found[1].prompt)[1:], expected[1:]) <= close
    assert apart(expected, alone["a"]) > 0.05
    if runs:  # and as one batch
        bank = PromptBank({str(number): one.prompt for number, one in enumerate(found)})
        together = sb.attach(copy.deepcopy(model), bank)
        with bank.rows(["0", "1", "1"]):
            assert apart(logits(together), expected) <= close
        with bank.rows(["0", "0", "1"]):
            assert apart(logits(together), expected) > 0.01
    with pytest.raises(EngineError, match=r"(?s)BatchSplit\[a, .*several prompts.*extract\(model, adapter="):
        ENGINE.extract(running)

    expected = active(running, Parallel("b", "a"))
    found = ENGINE.blocks(running)
    assert [one.rows for one in found] == [None, None]
    assert apart(np.concatenate([with_prompt(one.prompt) for one in found]), expected) <= close

    expected = active(running, BatchSplit("a", "c", batch_sizes=[2, 1]))
    if family in composition.UNEQUAL_LENGTHS:
        second = with_prompt(ENGINE.blocks(running)[1].prompt)[2:]
        assert apart(second, expected[2:]) <= close
    else:
        assert apart(alone["c"][2:], expected[2:]) > 0.01
        with pytest.raises(EngineError, match="fills the shorter of its prefixes up"):
            ENGINE.blocks(running)


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_that_are_left_out_of_a_composition(family: str, adapters: Any) -> None:
    """AdapterHub fills what has no prefix in a layer up, where other rows have one."""
    from adapters.composition import BatchSplit, Stack

    model = model_of(family)
    close = agreement(model)
    configs = [adapters.PrefixTuningConfig(prefix_length=4, flat=True, leave_out=[out]) for out in (0, 0, 1)]
    running = toolkit(adapters, model, *configs)
    for setup in (Stack("a", "b"), BatchSplit("a", "b", batch_sizes=[1, 2])):
        expected = active(running, setup)
        rows = (slice(None),) if isinstance(setup, Stack) else (slice(1), slice(1, None))
        for one, here in zip(ENGINE.blocks(running), rows, strict=True):
            assert one.prompt.positions.unbiased_from == ({"encoder": 1} if family == "t5" else {})
            assert apart(logits(ENGINE.attach(copy.deepcopy(model), one.prompt))[here], expected[here]) <= close
    expected = active(running, BatchSplit("a", "c", batch_sizes=[1, 2]))
    if family in composition.UNEQUAL_LENGTHS:
        first, second = (logits(ENGINE.attach(copy.deepcopy(model), one.prompt)) for one in ENGINE.blocks(running))
        assert apart(np.concatenate([first[:1], second[1:]]), expected) <= close
    else:
        assert apart(active(running, "c")[1:], expected[1:]) > 0.01
        with pytest.raises(EngineError, match="fills the shorter of its prefixes up"):
            ENGINE.blocks(set_active(running, BatchSplit("a", "c", batch_sizes=[1, 2])))


def set_active(model: Any, setup: Any) -> Any:
    model.set_active_adapters(setup)
    return model


def test_parameterisation_gates_and_vectors_in_compositions(adapters: Any) -> None:
    from adapters.composition import BatchSplit, Parallel, Stack

    model = model_of("bert")
    close = agreement(model)
    gated = adapters.PrefixTuningConfig(prefix_length=4, bottleneck_size=6, use_gating=True)
    vectors = adapters.PromptTuningConfig(prompt_length=3)
    running = toolkit(adapters, model, gated, gated, vectors)

    alone = set_active(running, "a")
    assert (kept := ENGINE.extract(alone)).training is not None
    assert kept.prefixes[0].gated
    expected = active(running, BatchSplit("a", "b", batch_sizes=[1, 2]))
    first, second = (logits(ENGINE.attach(copy.deepcopy(model), one.prompt)) for one in ENGINE.blocks(running))
    assert apart(np.concatenate([first[:1], second[1:]]), expected) <= close
    with pytest.raises(EngineError, match="gates"):
        ENGINE.extract(set_active(running, Stack("a", "b")))

    # Vectors of the first adapter, with everybody's prefixes.
    expected = active(running, Stack("c", "a"))
    both = ENGINE.extract(running)
    assert (len(both.inputs), len(both.prefixes)) == (1, 1)
    assert apart(logits(ENGINE.attach(copy.deepcopy(model), both)), expected) <= close
    expected = active(running, Stack("a", "c"))
    only = ENGINE.extract(running)
    assert not only.inputs
    assert apart(logits(ENGINE.attach(copy.deepcopy(model), only)), expected) <= close
    with pytest.raises(EngineError, match="does not repeat the batch"):
        ENGINE.blocks(set_active(running, Parallel("c", "a")))
    with pytest.raises(EngineError, match="only the first adapter's vectors"):
        ENGINE.blocks(set_active(running, BatchSplit("a", "c", batch_sizes=[1, 2])))


def test_what_is_not_there_is_not_taken_out(adapters: Any) -> None:
    model = model_of("gpt2")
    with pytest.raises(EngineError, match="no adapter of AdapterHub's is active"):
        ENGINE.extract(model)
    running = toolkit(adapters, model, adapters.PrefixTuningConfig(prefix_length=4), adapters.LoRAConfig(r=2))
    with pytest.raises(EngineError, match="no adapter of AdapterHub's is active"):
        ENGINE.extract(running)
    with pytest.raises(EngineError, match="no adapter 'z'"):
        ENGINE.extract(running, adapter="z")
    with pytest.raises(EngineError, match="adapter 'b': an AdapterHub adapter of architecture 'lora'"):
        ENGINE.extract(running, adapter="b")
