"""PEFT's files against PEFT itself: what PEFT wrote is read, written and run as the same function."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoConfig, BertForMaskedLM

import softbridge
from softbridge import testing
from softbridge.base import BaseModel, Task, build
from softbridge.errors import BaseModelError, CheckpointError, EngineError, SoftbridgeError
from softbridge.geometry import Stack, read_geometry
from softbridge.lowering.planner import plan
from softbridge.lowering.steps import Target
from softbridge.prompt import Gate, InputPrompt, KeyValue, KeyValuePrefix, Origin, Positions, SoftPrompt
from softbridge.testing import TINY, as_bytes, random_input_prompt, random_prefix
from softbridge.untrusted import Files, safetensors_bytes
from softbridge_compat import peft_defects
from softbridge_peft import facts, origin
from softbridge_peft.engine import ENGINE
from softbridge_peft.format import FORMAT

peft = pytest.importorskip("peft")

pytestmark = [
    # Defects of PEFT, held by tests/compat: peft-deprecated and peft-position-warning.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

#: An even number of layers, as all published T5 have: PEFT then repeats blocks of a prefix.
EVEN = {"t5": {"num_layers": 4, "num_decoder_layers": 4}}
FAMILIES = ("gpt2", "llama", "qwen3", "gpt_neox", "bert", "t5")
METHODS = ("prompt-tuning", "prefix-tuning")
#: What PEFT trains through something that it does not save, or saves more than one prompt of.
FURTHER = ("p-tuning", "p-tuning-lstm", "multitask", "context-aware", "prefix-tuning-projected", "cartridge")
#: What PEFT itself fails to train here: see peft-renamed-cache-classifier.
CLASSIFIES = not peft_defects.RENAMED_CACHE_CLASSIFIER.applies()
UNTRAINED = [("bert", method) for method in ("prefix-tuning", "prefix-tuning-projected", "cartridge") if not CLASSIFIES]
PREFIXED = ["gpt2", "llama", "qwen3", "gpt_neox", *(["bert"] if CLASSIFIES else [])]
#: Everything that PEFT offers: context-aware prompts are for causal language models alone.
CASES = [
    (family, method)
    for family in ("llama", "bert", "t5")  # all others: test_peft_architectures.py
    for method in METHODS + FURTHER
    if method != "context-aware" or family not in ("bert", "t5")
    if (family, method) not in UNTRAINED
]
LENGTH = 5
REAL = Path(__file__).parents[3] / "shared" / "data" / "peft_bloomz_560m_prompt"


def tiny_config(family: str, **changes: Any) -> Any:
    return testing.tiny_config(family, **{**EVEN.get(family, {}), **changes})


def tiny_model(family: str, **changes: Any) -> Any:
    return testing.tiny_model(family, **{**EVEN.get(family, {}), **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directories that PEFT trained and saved, each made once."""
    made: dict[Any, Path] = {}

    def make(family: str, method: str, **changes: Any) -> Path:
        key = (family, method, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{method}")
            ENGINE.train_example(tiny_model(family, **changes), method, made[key], length=LENGTH, steps=3, seed=1)
        return made[key]

    return make


def put(directory: Path, content: Mapping[str, bytes]) -> Path:
    directory.mkdir(parents=True)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


def read(path: Path, model: Any = None) -> SoftPrompt:
    return FORMAT.read(Files(path), None if model is None else read_geometry(model.config))


def config_in(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / facts.CONFIG_FILE).read_text()))


def tensors_in(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return Files(path).tensors(facts.WEIGHTS_FILES[0])


def logits(model: Any, **more: Any) -> torch.Tensor:
    """Logits of two unpadded rows and of a right-padded batch with its pads cut off."""
    rows = torch.tensor([[5, 17, 40, 8], [33, 6, 71, 50]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.tensor([[0, 9, 30], [0, 44, 12]])
    with torch.no_grad():
        plain = model(input_ids=rows, attention_mask=torch.ones_like(rows), **more)[0]
        padded = model(input_ids=rows, attention_mask=mask, **more)[0]
    if not model.config.is_encoder_decoder and plain.ndim == 3:
        padded[1, -2:] = 0
    return torch.cat([plain, padded])


def generate(model: Any, **more: Any) -> Any:
    row = torch.tensor([[5, 17, 40, 8]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reported = {"output_logits": True, "return_dict_in_generate": True}
    return model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings, **reported, **more)


def generates_alike(a: Any, b: Any, prompt: SoftPrompt, **more: Any) -> bool:
    """Whether two PeftModels generate the same, as far as PEFT can be asked: see peft-renamed-cache-generate."""
    if ENGINE.generate_fault(prompt, read_geometry(a.config)) is not None:
        if prompt.prefixes:
            return True
        return torch.equal(generate(a, use_cache=False).sequences, generate(b, use_cache=False, **more).sequences)
    return torch.equal(generate(a).sequences, generate(b, **more).sequences)


def asked(method: str) -> dict[str, Any]:
    """What a caller of PEFT must say in every call."""
    return {"task_ids": torch.tensor([0])} if method == "multitask" else {}


def outputs(model: Any, family: str, method: str, **more: Any) -> torch.Tensor:
    """Logits. Of a multitask prompt of T5, those of generated tokens: see peft-multitask-decoder."""
    if (family, method) == ("t5", "multitask"):
        return torch.stack(generate(model, **more).logits)
    return logits(model, **more)


def same(a: torch.Tensor, b: torch.Tensor, family: str, method: str) -> bool:
    """Bit for bit. Of a multitask prompt of T5, PEFT multiplies twice as many rows, which rounds otherwise."""
    if family == "t5" and method == "multitask":
        return a.shape == b.shape and float((a - b).abs().max()) < 1e-5
    return torch.equal(a, b)


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape != b.shape or float((a - b).abs().max()) > 0.1


@pytest.mark.parametrize(("family", "method"), CASES)
def test_toolkit_file_is_read_and_written_as_the_same_function(
    family: str, method: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    source = trained(family, method)
    model = tiny_model(family)
    geometry = read_geometry(model.config)
    assert FORMAT.sniff(Files(source))
    prompt = read(source, model)
    assert prompt.positions == Positions(prompt.counted())
    assert not FORMAT.obstacles(prompt, geometry)
    kinds = {"multitask": "multitask", "cartridge": "cartridge"}
    assert (prompt.training and prompt.training.kind) == kinds.get(method)

    content = as_bytes(FORMAT.write(prompt, geometry))
    assert set(content) == {facts.CONFIG_FILE, facts.WEIGHTS_FILES[0]}
    written = put(tmp_path / "written", content)
    again = read(written, model)
    assert again == prompt
    assert as_bytes(FORMAT.write(again, geometry)) == content

    assert same_tensors(written, source)
    assert config_in(written) == config_in(source)
    if family == "t5":  # of an encoder-decoder model PEFT saves numbers that it never uses
        assert prompt.origin is not None
        assert "kept for a file of PEFT's own" in prompt.origin.notes[0]

    toolkit = peft.PeftModel.from_pretrained(tiny_model(family), source).eval()
    expected = outputs(toolkit, family, method, **asked(method))
    loaded = peft.PeftModel.from_pretrained(tiny_model(family), written).eval()
    assert same(outputs(loaded, family, method, **asked(method)), expected, family, method)
    assert far(outputs(model, family, method), expected)
    loaded.save_pretrained(tmp_path / "resaved")
    assert same_tensors(tmp_path / "resaved", written)


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = tensors_in(a), tensors_in(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", ["prompt-tuning", "multitask", "prefix-tuning"])
def test_numbers_that_peft_never_uses_are_kept_where_they_belong_to_the_prompt(
    method: str, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained("t5", method)
    prompt = read(source)
    kept = tensors_in(source)[facts.PROMPT]

    def written(prompt: SoftPrompt, geometry: Any = None) -> tuple[int, Any]:
        content = as_bytes(FORMAT.write(prompt, geometry))
        tensors = safetensors.numpy.load(content[facts.WEIGHTS_FILES[0]])
        return json.loads(content[facts.CONFIG_FILE])["num_transformer_submodules"], tensors[facts.PROMPT]

    submodules, tensor = written(prompt)
    assert submodules == 2
    assert np.array_equal(tensor, kept)
    without = 2 if method == "prefix-tuning" else 1

    def forgotten(prompt: SoftPrompt) -> bool:
        submodules, tensor = written(prompt)
        return submodules == without and not (tensor.shape == kept.shape and np.array_equal(tensor, kept))

    assert prompt.origin is not None
    record = prompt.origin.details["unused"]
    assert record.keys() == ({facts.PROMPT, facts.COLUMNS} if method == "multitask" else {facts.PROMPT})
    for strange in (3, {}, {facts.PROMPT: {}}, {name: {"dtype": "float32", "data": "?"} for name in record}):
        details = {**prompt.origin.details, "unused": strange}
        assert forgotten(replace(prompt, origin=Origin("peft", details)))
    assert forgotten(replace(prompt, origin=Origin("peft", {"config": {"task_type": "SEQ_2_SEQ_LM"}})))
    monkeypatch.setattr(origin, "MOST", 8)
    other = read(source)
    assert other == prompt
    assert other.origin is not None
    assert any("are left out" in note for note in other.origin.notes)
    assert forgotten(other)


def test_odd_number_of_decoder_layers_is_a_permutation(trained: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"num_layers": 3, "num_decoder_layers": 3}
    source = trained("t5", "prefix-tuning", **sizes)
    prompt = read(source)
    written = put(tmp_path / "written", as_bytes(FORMAT.write(prompt, None)))
    assert same_tensors(written, source)
    assert config_in(written) == config_in(source)
    blocks = KeyValuePrefix.from_flat("self", tensors_in(source)[facts.PROMPT], (0, 1, 2), 4, 8).layers
    assert [prompt.prefixes[0].layers[i] == blocks[b] for i, b in enumerate((0, 2, 1))] == [True] * 3


@pytest.mark.parametrize(("family", "method"), CASES)
def test_engine_is_the_toolkit_and_leaves_no_trace(family: str, method: str, trained: Callable[..., Path]) -> None:
    source = trained(family, method)
    toolkit = peft.PeftModel.from_pretrained(tiny_model(family), source).eval()
    expected = outputs(toolkit, family, method, **asked(method))

    model = tiny_model(family).train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    prompt = read(source, model)
    attached = softbridge.attach(model, prompt, "peft")
    assert isinstance(attached, peft.PeftModel)
    assert same(outputs(attached, family, method), expected, family, method)
    assert ENGINE.extract(attached) == prompt
    assert ENGINE.extract(toolkit) == prompt
    if family != "bert":
        assert generates_alike(attached, toolkit, prompt, **asked(method))
    assert "attached" in [obstacle.name for obstacle in ENGINE.obstacles(prompt, attached)]

    assert softbridge.detach(attached) is model
    assert state(model) == before
    assert torch.equal(logits(model.eval()), logits(tiny_model(family)))
    with pytest.raises(EngineError, match="attach"):
        ENGINE.detach(attached)


def state(model: Any) -> Any:
    """Everything that attaching could change: structure, flags, instance attributes, hooks, every bit."""
    return (
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().numpy().tobytes()) for name, p in model.named_parameters()],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        model.config.to_dict(),
    )


def dropped(part: Any) -> Any:
    if isinstance(part, InputPrompt):
        return replace(part, vectors=part.vectors * np.float32(0))
    return KeyValuePrefix(
        part.site,
        {i: KeyValue(pair.keys - np.float32(50), pair.values * np.float32(0)) for i, pair in part.layers.items()},
    )


def swapped(part: Any) -> Any:
    if isinstance(part, InputPrompt):
        return replace(part, vectors=part.vectors[::-1])
    return KeyValuePrefix(part.site, {layer: KeyValue(pair.values, pair.keys) for layer, pair in part.layers.items()})


def shifted(part: Any) -> Any:
    if isinstance(part, InputPrompt):
        return replace(part, vectors=np.roll(part.vectors, 1, axis=0))
    return KeyValuePrefix(part.site, {i: KeyValue(pair.keys[::-1], pair.values) for i, pair in part.layers.items()})


@pytest.mark.parametrize(("family", "method"), CASES)
def test_another_prompt_shows(family: str, method: str, trained: Callable[..., Path]) -> None:
    model = tiny_model(family)
    prompt = read(trained(family, method), model)
    attached = softbridge.attach(model, prompt, "peft")
    expected = logits(attached)
    for change in (dropped, swapped, shifted):
        model = softbridge.detach(attached)
        attached = softbridge.attach(model, replace(prompt, parts=(change(prompt.parts[0]),)), "peft")
        assert far(logits(attached), expected), change.__name__


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [random_input_prompt, random_prefix])
def test_prompt_from_elsewhere_becomes_the_file_that_peft_would_write(
    family: str, make: Callable[..., SoftPrompt], tmp_path: Path
) -> None:
    model = tiny_model(family)
    geometry = read_geometry(model.config)
    prompt = make(geometry, LENGTH)
    if family == "t5" and make is random_prefix:
        assert [o.name for o in FORMAT.obstacles(prompt, geometry)] == ["repeated-layers"]
        layers = prompt.prefixes[0].layers
        prompt = replace(prompt, parts=(KeyValuePrefix("self", {i: layers[i % 2] for i in layers}),))
    assert not FORMAT.obstacles(prompt, geometry)
    written = put(tmp_path / "written", as_bytes(FORMAT.write(prompt, None)))
    assert read(written, model) == prompt
    if family == "bert":  # no classifier came along, so that PEFT would refuse a task with one
        model = model.base_model
    loaded = peft.PeftModel.from_pretrained(model, written).eval()
    out = logits(loaded)
    loaded.save_pretrained(tmp_path / "resaved")
    assert same_tensors(tmp_path / "resaved", written)
    theirs, ours = config_in(tmp_path / "resaved"), config_in(written)
    del theirs["peft_version"]
    assert ours == theirs
    if family != "bert":
        assert torch.equal(logits(ENGINE.attach(tiny_model(family), prompt)), out)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gpt_neox", "bert"])
def test_sizes_are_those_that_peft_computes(family: str) -> None:
    model = tiny_model(family)
    geometry = read_geometry(model.config)
    for make, kind in ((random_input_prompt, peft.PromptTuningConfig), (random_prefix, peft.PrefixTuningConfig)):
        task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
        adapted = peft.get_peft_model(tiny_model(family), kind(task_type=task, num_virtual_tokens=LENGTH))
        theirs = adapted.peft_config["default"].to_dict()
        ours = json.loads(FORMAT.write(make(geometry, LENGTH), None)[facts.CONFIG_FILE])
        assert ours.keys() == theirs.keys() - {"peft_version"}
        differing = {name for name in ours if ours[name] != theirs[name]}
        assert differing <= {"inference_mode", "task_type", "modules_to_save"}


@pytest.mark.parametrize("family", PREFIXED)
def test_engine_tells_positions(family: str) -> None:
    """A prefix whose tokens start at 0 runs as PEFT does when its caller moves the tokens by hand."""
    model = tiny_model(family)
    counted = random_prefix(read_geometry(model.config), LENGTH)
    stack: Stack = "encoder" if family == "bert" else "decoder"
    told = ENGINE.attach(tiny_model(family), replace(counted, positions=Positions({stack: 0})))
    plain = ENGINE.attach(model, counted)
    by_hand = logits(plain, position_ids=torch.arange(4)[None] - LENGTH)
    assert torch.equal(logits(told), by_hand)
    assert torch.equal(logits(told, position_ids=torch.arange(4)[None]), by_hand)
    assert far(logits(plain), by_hand)
    one_off = ENGINE.attach(tiny_model(family), replace(counted, positions=Positions({stack: 1})))
    if family == "gpt2" or family == "bert":
        assert far(logits(one_off), by_hand)
    else:  # rotary positions: a step of one moves the outputs less
        assert float((logits(one_off) - by_hand).abs().max()) > 0.01
    if family == "bert" or ENGINE.generate_fault(counted, read_geometry(model.config)) is not None:
        return
    out = generate(told)
    with torch.no_grad():
        uncached = told(input_ids=out.sequences[:, :-1]).logits[:, -6:]
    torch.testing.assert_close(torch.stack(out.logits, 1).to(uncached.dtype), uncached, atol=1e-4, rtol=0)


def other_model(family: str, task: Task) -> Any:
    settings = {**TINY["bert"], "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}
    return build(AutoConfig.for_model(family, **settings), task, torch.float64, 0)


def test_engine_tells_positions_to_models_of_other_build() -> None:
    """OPT's head calls below its base model; RoBERTa counts from behind the padding token's index."""
    for family, first in (("opt", 0), ("roberta", 2)):
        model, twin = (other_model(family, "causal-lm" if family == "opt" else "sequence-classification") for _ in "ab")
        if family == "roberta":
            model, twin = model.base_model, twin.base_model
        prompt = random_prefix(read_geometry(model.config), LENGTH)
        plain = ENGINE.attach(model, prompt)
        told = ENGINE.attach(twin, replace(prompt, positions=Positions(dict.fromkeys(prompt.counted(), 0))))
        by_hand = logits(plain, position_ids=torch.arange(4)[None] + first - LENGTH)
        assert torch.equal(logits(told)[:2], by_hand[:2])
        assert far(logits(plain)[:2], by_hand[:2])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_keep_their_precision(dtype: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    prompt = random_input_prompt(read_geometry(model.config), LENGTH)
    prompt = replace(prompt, parts=(replace(prompt.inputs[0], vectors=prompt.inputs[0].vectors.astype(dtype)),))
    written = put(tmp_path / "written", as_bytes(FORMAT.write(prompt, None)))
    assert read(written, model) == prompt
    expected = logits(peft.PeftModel.from_pretrained(tiny_model("llama"), written).eval())
    attached = ENGINE.attach(model, prompt)
    assert torch.equal(logits(attached), expected)
    assert ENGINE.extract(attached) == prompt


def test_classifier_rides_along(trained: Callable[..., Path], tmp_path: Path) -> None:
    source = trained("bert", "prompt-tuning")
    prompt = read(source, tiny_model("bert"))
    assert list(prompt.head) == ["classifier.bias", "classifier.weight"]
    fresh = put(tmp_path / "fresh", as_bytes(FORMAT.write(replace(prompt, origin=None), None)))
    assert config_in(fresh)["task_type"] == "SEQ_CLS"
    assert config_in(fresh)["modules_to_save"] == ["classifier"]
    expected = logits(peft.PeftModel.from_pretrained(tiny_model("bert"), source).eval())
    assert torch.equal(logits(peft.PeftModel.from_pretrained(tiny_model("bert"), fresh).eval()), expected)
    without = logits(softbridge.attach(tiny_model("bert"), replace(prompt, head={}), "peft"))
    assert not torch.equal(without, expected)
    other = {name: array + 1 for name, array in prompt.head.items()}
    assert far(logits(softbridge.attach(tiny_model("bert"), replace(prompt, head=other), "peft")), expected)


def test_a_trained_head_is_extracted(trained: Callable[..., Path]) -> None:
    """PEFT trains a copy of the head; under the model's own names it comes back, in the precision that it had."""
    prompt = read(trained("bert", "prompt-tuning"), tiny_model("bert"))
    for attached in (prompt, replace(prompt, head={})):
        model = tiny_model("bert")
        before = {
            name: array.copy() for name, array in model.classifier.state_dict().items() for array in [array.numpy()]
        }
        running = softbridge.attach(model, attached, "peft")
        assert ENGINE.extract(running).head.keys() == attached.head.keys()
        bias = running.get_base_model().classifier.modules_to_save["default"].bias
        with torch.no_grad():
            bias += 1
        head = ENGINE.extract(running).head
        assert set(head) == {"classifier.bias", *attached.head}
        old = attached.head.get("classifier.bias", before["bias"])
        assert head["classifier.bias"].dtype == old.dtype
        np.testing.assert_allclose(head["classifier.bias"], old + 1, rtol=1e-6)
        for name, array in attached.head.items():
            assert np.array_equal(head[name], array) == (name != "classifier.bias")
        softbridge.detach(running)
        assert all(
            np.array_equal(tensor.numpy(), before[name]) for name, tensor in model.classifier.state_dict().items()
        )


# --- PEFT's own loader ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), CASES)
def test_loaded_by_peft_is_attached_by_us(
    family: str, method: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    source = trained(family, method)
    prompt = read(source, tiny_model(family))
    expected = logits(softbridge.attach(tiny_model(family), prompt, "peft"))
    loaded = ENGINE.load(tiny_model(family).train(), prompt, source)
    assert not any(module.training for module in loaded.modules())
    found = logits(loaded)
    assert found.dtype == torch.float64
    assert same(found, expected, family, method)
    if family != "bert":
        attached = softbridge.attach(tiny_model(family), prompt, "peft")
        assert generates_alike(attached, loaded, prompt)

    # The file counts, not the prompt.
    for change in (dropped, swapped, shifted):
        other = replace(prompt, parts=(change(prompt.parts[0]),))
        assert torch.equal(logits(ENGINE.load(tiny_model(family), other, source)), found)
        other = replace(other, training=None)
        directory = put(tmp_path / change.__name__, as_bytes(FORMAT.write(other, read_geometry(tiny_config(family)))))
        assert far(logits(ENGINE.load(tiny_model(family), prompt, directory)), expected), change.__name__


def test_loaded_head_is_that_of_the_file(trained: Callable[..., Path], tmp_path: Path) -> None:
    source = trained("bert", "prefix-tuning" if CLASSIFIES else "prompt-tuning")
    prompt = read(source, tiny_model("bert"))
    expected = logits(ENGINE.load(tiny_model("bert"), replace(prompt, head={}), source))
    other = {name: array + 1 for name, array in prompt.head.items()}
    directory = put(tmp_path / "other", as_bytes(FORMAT.write(replace(prompt, head=other), None)))
    found = logits(ENGINE.load(tiny_model("bert"), prompt, directory))
    assert far(found, expected)
    assert torch.equal(found, logits(softbridge.attach(tiny_model("bert"), replace(prompt, head=other), "peft")))


@pytest.mark.parametrize("make", [random_input_prompt, *([random_prefix] if CLASSIFIES else [])])
def test_loaded_without_a_head_runs_under_the_models_own(make: Callable[..., SoftPrompt], tmp_path: Path) -> None:
    """Without a classifier the file is for feature extraction, as PEFT would refuse it otherwise."""
    prompt = make(read_geometry(tiny_config("bert")), LENGTH)
    directory = put(tmp_path / "written", as_bytes(FORMAT.write(prompt, None)))
    assert config_in(directory)["task_type"] == "FEATURE_EXTRACTION"
    starts = (LENGTH,) if make is random_input_prompt else (LENGTH, 0)
    for start in starts:
        told = replace(prompt, positions=Positions({"encoder": start}))
        expected = logits(softbridge.attach(tiny_model("bert"), told, "peft"))
        assert torch.equal(logits(ENGINE.load(tiny_model("bert"), told, directory)), expected)
        assert far(logits(tiny_model("bert")), expected)


@pytest.mark.parametrize("family", PREFIXED)
def test_loaded_tokens_stand_where_they_are_told(family: str, trained: Callable[..., Path]) -> None:
    source = trained(family, "prefix-tuning")
    counted = read(source, tiny_model(family))
    told = replace(counted, positions=Positions(dict.fromkeys(counted.counted(), 0)))
    expected = logits(softbridge.attach(tiny_model(family), told, "peft"))
    assert torch.equal(logits(ENGINE.load(tiny_model(family), told, source)), expected)
    assert float((logits(ENGINE.load(tiny_model(family), counted, source)) - expected).abs().max()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_runs_in_the_models_precision(dtype: Any, trained: Callable[..., Path]) -> None:
    for method in METHODS:
        source = trained("llama", method)
        prompt = read(source)
        found = logits(ENGINE.load(tiny_model("llama", dtype=dtype), prompt, source))
        assert found.dtype == dtype
        assert torch.equal(found, logits(ENGINE.attach(tiny_model("llama", dtype=dtype), prompt)))


def test_loading_is_refused_by_name(
    trained: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = trained("gpt2", "prefix-tuning"), tiny_model("gpt2")
    prompt = read(source, model)
    for task in (None, "SEQ_CLS", "FEATURE_EXTRACTION"):
        content = {name: (source / name).read_bytes() for name in facts.WEIGHTS_FILES[:1]}
        content[facts.CONFIG_FILE] = json.dumps({**config_in(source), "task_type": task}).encode()
        with pytest.raises(EngineError, match=f"for the task {task}"):
            ENGINE.load(model, prompt, put(tmp_path / str(task), content))
    with pytest.raises(EngineError, match="no weights"):
        ENGINE.load(model, prompt, put(tmp_path / "empty", {}))
    with pytest.raises(EngineError, match=r"\[base-model\]"):
        ENGINE.load(tiny_model("llama"), prompt, source)
    monkeypatch.setattr(type(ENGINE), "unavailable", lambda self: "PEFT is not installed")
    with pytest.raises(EngineError, match="not installed"):
        ENGINE.load(model, prompt, source)


# --- what is refused --------------------------------------------------------------------------------------------------

GOOD = {
    "peft_type": "PREFIX_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 2,
    "token_dim": 6,
    "num_attention_heads": 3,
    "num_layers": 2,
    "num_transformer_submodules": 1,
}
FLAT = np.ones((2, 24), np.float32)
BAD: list[tuple[dict[str, Any], dict[str, Any], type[SoftbridgeError], str]] = [
    ({"peft_type": "LORA"}, {}, CheckpointError, "'LORA'.*\n.*PREFIX_TUNING"),
    ({"peft_type": "ADAPTION_PROMPT"}, {}, CheckpointError, "adapter_len None, adapter_layers None"),
    ({"peft_type": 3}, {}, CheckpointError, "peft_type 3"),
    ({"peft_type": ["PREFIX_TUNING"]}, {}, CheckpointError, "peft_type"),
    ({"num_virtual_tokens": "2", "num_layers": 2.0}, {}, CheckpointError, "tokens is '2'; num_layers is 2.0"),
    ({"num_virtual_tokens": True}, {}, CheckpointError, "num_virtual_tokens is True"),
    ({"num_virtual_tokens": 0}, {}, CheckpointError, "num_virtual_tokens is 0"),
    ({"num_virtual_tokens": None}, {}, CheckpointError, "num_virtual_tokens is None"),
    ({"token_dim": None}, {}, CheckpointError, "token_dim is None"),
    ({"token_dim": 7}, {}, CheckpointError, "no multiple"),
    ({"task_type": "POETRY"}, {}, CheckpointError, "'POETRY'"),
    ({"task_type": {}}, {}, CheckpointError, "task_type is {}"),
    ({"base_model_name_or_path": 1}, {}, CheckpointError, "base_model_name_or_path is 1"),
    ({"num_transformer_submodules": 2}, {}, CheckpointError, "submodules is 2"),
    ({"task_type": "SEQ_2_SEQ_LM"}, {}, CheckpointError, "submodules 1"),
    ({"task_type": "SEQ_CLS"}, {}, BaseModelError, "'SEQ_CLS'.*does not say"),
    ({"task_type": None}, {}, BaseModelError, "None.*does not say"),
    ({}, {"prompt_embeddings": None, "b": FLAT, "a": FLAT}, CheckpointError, r"\(prompt_emb.*\(a, b\)"),
    ({}, {"prompt_embeddings": FLAT[:1]}, CheckpointError, r"shape \[1, 24\]\n.*\[2, 24\]"),
    ({}, {"prompt_embeddings": FLAT[:, :20]}, CheckpointError, r"shape \[2, 20\]\n.*\[2, 24\]"),
    ({}, {"prompt_embeddings": FLAT[0]}, CheckpointError, r"shape \[24\]"),
    ({}, {"prompt_embeddings": FLAT.astype(np.int32)}, CheckpointError, "int32"),
    ({"peft_type": "PROMPT_TUNING", "token_dim": None}, {"prompt_embeddings": FLAT[:, :0]}, CheckpointError, "prompt_"),
    ({"peft_type": "PROMPT_TUNING", "token_dim": 25}, {}, CheckpointError, r"shape \[2, 24\]\n.*\[2, 25\]"),
]


@pytest.mark.parametrize(("config", "tensors", "error", "message"), BAD)
def test_broken_files_are_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Any], error: type[SoftbridgeError], message: str, tmp_path: Path
) -> None:
    content = {name: array for name, array in {"prompt_embeddings": FLAT, **tensors}.items() if array is not None}
    path = put(
        tmp_path / "bad",
        {
            facts.CONFIG_FILE: json.dumps({**GOOD, **config}).encode(),
            facts.WEIGHTS_FILES[0]: safetensors_bytes(content),
        },
    )
    assert FORMAT.sniff(Files(path))
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert caught.value.expected
    assert caught.value.remedy


def test_good_file_of_the_table_is_read(tmp_path: Path) -> None:
    content = {facts.CONFIG_FILE: json.dumps(GOOD).encode()}
    path = put(tmp_path / "good", {**content, facts.WEIGHTS_FILES[0]: safetensors_bytes({facts.PROMPT: FLAT})})
    assert read(path).prefixes[0].layers[1].keys.shape == (3, 2, 2)
    assert not FORMAT.sniff(Files(path / facts.CONFIG_FILE))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read(put(tmp_path / "no-weights", content))


@pytest.mark.parametrize(
    ("method", "family", "changes"),
    [
        *((method, "llama", {"num_hidden_layers": 4}) for method in METHODS),
        *((method, "llama", {"hidden_size": 40}) for method in METHODS),
        *((method, family, {}) for method in METHODS for family in ("bert", "t5")),
        ("prefix-tuning", "llama", {"num_key_value_heads": 4}),
        ("prefix-tuning", "llama", {"head_dim": 16}),
    ],
)
def test_other_base_model_is_refused(
    method: str, family: str, changes: dict[str, int], trained: Callable[..., Path]
) -> None:
    files = Files(trained("llama", method))
    with pytest.raises(BaseModelError, match="base model") as caught:
        FORMAT.read(files, read_geometry(tiny_config(family, **changes)))
    assert "--base" in caught.value.remedy


def test_what_peft_cannot_hold_is_an_obstacle() -> None:
    llama, t5 = (read_geometry(tiny_config(family)) for family in ("llama", "t5"))
    prefix, vectors = random_prefix(llama), random_input_prompt(llama)
    layers = prefix.prefixes[0].layers
    wide = KeyValue(layers[0].keys.astype(np.float64) + 1e-12, layers[0].values.astype(np.float64))
    exact = {i: KeyValue(pair.keys.astype(np.float64), pair.values.astype(np.float64)) for i, pair in layers.items()}

    def names(prompt: SoftPrompt, family: str = "llama") -> list[str]:
        target = Target("peft", FORMAT.capabilities, BaseModel(tiny_config(family)))
        return [obstacle.name for obstacle in plan(prompt, target, FORMAT.obstacles).obstacles]

    assert names(prefix) == names(vectors) == []
    both = replace(prefix, parts=prefix.parts + vectors.parts, positions=Positions({"decoder": 10}))
    assert names(both) == ["parts"]
    assert names(replace(prefix, parts=(KeyValuePrefix("self", {0: layers[0], 2: layers[2]}),))) == ["layers"]
    assert names(replace(prefix, parts=(KeyValuePrefix("self", {0: layers[0], 1: layers[1]}),))) == ["layers"]
    gate = Gate(np.ones((1, 32), np.float32), np.ones(1, np.float32))
    gated = {number: replace(pair, gate=gate) for number, pair in layers.items()}
    assert names(replace(prefix, parts=(KeyValuePrefix("self", gated),))) == ["gates"]
    half = KeyValue(layers[0].keys.astype(np.float16), layers[0].values.astype(np.float16))
    assert names(replace(prefix, parts=(KeyValuePrefix("self", {**layers, 0: half}),))) == ["precision"]
    assert names(replace(prefix, parts=(KeyValuePrefix("self", exact),))) == []
    rounded = replace(prefix, parts=(KeyValuePrefix("self", {**exact, 0: wide}),))
    assert names(rounded) == ["dtype"]
    assert [obstacle.name for obstacle in FORMAT.obstacles(rounded, llama)] == ["precision"]
    assert names(replace(prefix, head={"bert.pooler.weight": FLAT})) == ["head"]
    assert names(random_prefix(t5, sites=("encoder",)), "t5") == ["stack"]
    assert names(random_input_prompt(t5, stack="decoder"), "t5") == ["stack"]
    with pytest.raises(BaseModelError, match="task"):
        as_bytes(FORMAT.write(SoftPrompt(vectors.parts, vectors.positions), None))


def test_what_the_engine_cannot_run_is_an_obstacle() -> None:
    def names(prompt: SoftPrompt, model: Any) -> list[str]:
        found = [obstacle.name for obstacle in ENGINE.obstacles(prompt, model)]
        if found:
            with pytest.raises(EngineError, match=rf"\[{found[0]}\]"):
                ENGINE.attach(model, prompt)
        return found

    llama, t5, gpt2 = tiny_model("llama"), tiny_model("t5"), tiny_model("gpt2")
    geometry = read_geometry(t5.config)
    layers = random_prefix(geometry).prefixes[0].layers
    prefix = replace(random_prefix(geometry), parts=(KeyValuePrefix("self", {i: layers[i % 2] for i in layers}),))
    assert names(prefix, t5) == []
    assert names(replace(prefix, positions=Positions({"decoder": 0})), t5) == ["relative-bias"]
    assert names(replace(prefix, positions=Positions({"decoder": 5}, relative_bias="skewed")), t5) == ["relative-bias"]
    lost = Positions({"decoder": 5}, unbiased_from={"decoder": 1})
    assert names(replace(prefix, positions=lost), t5) == ["relative-bias"]
    geometry = read_geometry(llama.config)
    vectors, prefix = random_input_prompt(geometry), random_prefix(geometry)
    part = vectors.inputs[0]
    elsewhere = Positions({"decoder": 5}, "skewed", "pinned")
    assert names(replace(prefix, positions=elsewhere), llama) == []
    assert names(replace(vectors, parts=(replace(part, entry="after"),)), llama) == ["entry"]
    assert names(replace(vectors, parts=(replace(part, placement="after-first-token"),)), llama) == ["placement"]
    assert names(replace(vectors, positions=Positions({"decoder": 0})), llama) == ["positions"]
    assert names(replace(vectors, head={"score.weight": FLAT}), llama) == ["head"]
    with pytest.raises(EngineError, match=r"\[parts\]"):
        ENGINE.attach(llama, replace(prefix, parts=prefix.parts + vectors.parts))
    assert "base-model" in names(vectors, tiny_model("gpt2", n_embd=64))
    assert names(prefix, tiny_model("gpt2")) == ["base-model"]
    windowed = tiny_model("qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=0)
    prefix = random_prefix(read_geometry(windowed.config))
    assert names(prefix, windowed) == []
    assert names(replace(prefix, positions=elsewhere), windowed) == ["window"]
    enable = getattr(gpt2, "activation_checkpointing_enable", None) or gpt2.gradient_checkpointing_enable
    enable()
    assert names(random_prefix(read_geometry(gpt2.config)), gpt2) == ["gradient-checkpointing"]
    bert = random_prefix(read_geometry(tiny_config("bert")))
    assert names(bert, BertForMaskedLM(tiny_config("bert"))) == ["task"]
    assert "past-key-values" in names(bert, other_model("distilbert", "sequence-classification"))
    unpooled = ["pooler"] if peft_defects.UNPOOLED_PREFIX.applies() else []
    refused = unpooled if CLASSIFIES else ["past-key-values"]
    assert names(bert, other_model("roberta", "sequence-classification")) == refused
    with pytest.raises(EngineError, match="attach"):
        ENGINE.extract(llama)


def test_training_an_example_needs_a_task(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="FEATURE_EXTRACTION"):
        ENGINE.train_example(tiny_model("bert").base_model, "prompt-tuning", tmp_path, length=2, steps=1, seed=0)


def test_unknown_keys_are_given_back(trained: Callable[..., Path]) -> None:
    prompt = read(trained("gpt2", "prompt-tuning"))
    assert prompt.origin is not None
    config = {**prompt.origin.details["config"], "new_setting": [1], "prompt_tuning_init": "TEXT"}
    changed = replace(prompt, origin=Origin("peft", {"config": config}))
    written = json.loads(FORMAT.write(changed, None)[facts.CONFIG_FILE])
    assert written["new_setting"] == [1]
    assert written["prompt_tuning_init"] == "TEXT"


def test_real_file() -> None:
    if not REAL.is_dir():
        pytest.skip("the real files are not beside this checkout")
    prompt = read(REAL)
    part = prompt.inputs[0]
    assert (part.vectors.shape, part.stack) == ((8, 1024), "decoder")
    assert prompt.base.name == "bigscience/bloomz-560m"
    content = as_bytes(FORMAT.write(prompt, None))
    theirs = config_in(REAL)
    assert json.loads(content[facts.CONFIG_FILE]) == theirs


def test_plugin_imports_no_toolkit() -> None:
    code = "import sys, softbridge_peft; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
