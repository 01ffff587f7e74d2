"""PEFT's further methods: what trained a prompt is kept beside PEFT's files, and their functions are PEFT's own."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import softbridge as sb
from softbridge.arrays import Array, to_torch
from softbridge.base import cache as caches
from softbridge.cli.console import app
from softbridge.errors import BaseModelError, CheckpointError, EngineError, LoweringError, SoftbridgeError
from softbridge.geometry import read_geometry
from softbridge.methods import (
    KINDS,
    MLP,
    Cartridge,
    ContextAwarePromptTuning,
    MultitaskPromptTuning,
    PrefixTuning,
    PTuning,
    rematerialise,
)
from softbridge.prompt import SoftPrompt, Training
from softbridge.testing import as_bytes, random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.untrusted import Files, safetensors_bytes
from softbridge_compat import peft_defects
from softbridge_peft import adaption, example, facts
from softbridge_peft.engine import ENGINE
from softbridge_peft.format import FORMAT

peft = pytest.importorskip("peft")

pytestmark = [
    # Defects of PEFT, held by tests/compat: peft-deprecated and peft-position-warning.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

FAMILIES = ("gpt2", "llama", "bert", "t5")  # all others: test_peft_architectures.py
#: Method -> the parameterisation that PEFT throws away, or keeps in its own file.
THROWN = {
    "p-tuning": "p-tuning-mlp",
    "p-tuning-lstm": "p-tuning-lstm",
    "prefix-tuning-projected": "mlp",
    "context-aware": "context-aware",
}
STORED = {"multitask": "multitask", "cartridge": "cartridge"}
#: What PEFT itself fails to train here: see peft-renamed-cache-classifier.
UNTRAINED = (
    [("bert", "prefix-tuning-projected"), ("bert", "cartridge")]
    if peft_defects.RENAMED_CACHE_CLASSIFIER.applies()
    else []
)
CASES = [
    (family, method)
    for family in FAMILIES
    for method in {**THROWN, **STORED}
    if method != "context-aware" or family not in ("bert", "t5")
    if (family, method) not in UNTRAINED
]
LENGTH = 5
ROWS = torch.tensor([[5, 17, 40, 8], [33, 6, 71, 50]])
TYPES = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}

Make = Callable[..., Path]


def live(family: str, method: str, **changes: Any) -> Any:
    """A model that PEFT has just trained, in training mode."""
    task = TYPES.get(family, "CAUSAL_LM")
    return example.train(tiny_model(family), task, method, length=LENGTH, steps=2, seed=1, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Directories that PEFT trained and saved, each made once."""
    made: dict[Any, Path] = {}

    def make(family: str, method: str, **changes: Any) -> Path:
        key = (family, method, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{method}")
            live(family, method, **changes).save_pretrained(made[key])
        return made[key]

    return make


def put(directory: Path, content: Mapping[str, bytes]) -> Path:
    directory.mkdir(parents=True)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


def read(path: Path, family: str) -> SoftPrompt:
    return sb.load(path, base=tiny_config(family))


def config_in(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / facts.CONFIG_FILE).read_text()))


def tensors_in(path: Path) -> dict[str, Array]:
    return Files(path).tensors(facts.WEIGHTS_FILES[0])


def loaded(family: str, path: Path) -> Any:
    """By PEFT's own loader, which must have nothing to complain about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.PeftModel.from_pretrained(tiny_model(family), path).eval()


def logits(model: Any, **more: Any) -> torch.Tensor:
    """With gradients on, as PEFT saves: without, torch has other kernels for an LSTM, which round otherwise."""
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = torch.tensor([[0, 9, 30], [0, 44, 12]])
    return torch.as_tensor(model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), **more)[0]).detach()


def generate(model: Any, **more: Any) -> list[list[int]]:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), **settings, **more)
    return [row[-6:] for row in out.tolist()]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def test_every_prompt_learning_method_of_the_installed_peft_is_known() -> None:
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    learning = {
        str(name.value) for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(kind, PromptLearningConfig)
    }
    assert learning == facts.KINDS.keys() == {peft_type for peft_type, _ in example.methods(1).values()}
    asking = {name.value for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if "PROMPT" in name.value}
    assert asking - learning == {adaption.TYPE}


# --- the same function ------------------------------------------------------------------------------------------------


CERTIFIED = [
    *(("gpt2", method) for method in {**THROWN, **STORED}),
    *(("t5", method) for method in ("multitask", "cartridge", "prefix-tuning-projected")),
    ("llama", "cartridge"),
    ("bert", "p-tuning"),
]


@pytest.mark.parametrize(("family", "method"), CERTIFIED)
def test_the_file_in_peft_and_the_canonical_prompt_compute_the_same(
    family: str, method: str, trained: Make, tmp_path: Path
) -> None:
    source, config = trained(family, method), tiny_config(family)
    sb.save(read(source, family), tmp_path / "prompt.safetensors", format="softbridge", base=config)
    certificate = sb.verify(source, tmp_path / "prompt.safetensors", base=config)
    assert certificate.source.engine == "peft"
    assert certificate.source.loaded
    # On transformers 4 the native engine cannot run every model.
    assert certificate.target.engine == "native" or "native: " in certificate.target.instead_of
    assert certificate.same, certificate.summary()
    # The product of a multitask prompt, which the native engine makes in the float32 that is stored, is one.
    assert bool(certificate.islands) == (family not in ("gpt2", "bert") or method == "multitask")
    assert all(fault.noticed for fault in certificate.faults)
    assert len(certificate.faults) >= 2


def test_a_model_with_an_even_number_of_layers_runs_the_cartridge_that_peft_runs(tmp_path: Path) -> None:
    """T5's upper half repeats the lower, so that the frozen rows, too, are those of other blocks."""
    sizes = {"num_layers": 4, "num_decoder_layers": 4}
    model = example.train(
        tiny_model("t5", **sizes), "SEQ_2_SEQ_LM", "cartridge", length=LENGTH, steps=2, seed=1, num_frozen_tokens=2
    )
    model.save_pretrained(tmp_path / "source")
    config = tiny_config("t5", **sizes)
    prompt = sb.load(tmp_path / "source", base=config)
    assert prompt.training is not None
    assert prompt.training.tensors["self.frozen"].shape == (2, 2 * 4 * 4 * 8)
    assert rematerialise(prompt) == prompt
    sb.save(prompt, tmp_path / "written", format="peft", base=config)
    assert sb.load(tmp_path / "written", base=config) == prompt
    found = logits(peft.PeftModel.from_pretrained(tiny_model("t5", **sizes), tmp_path / "written").eval())
    assert torch.equal(found, logits(model.eval()))


def test_a_cartridge_that_starts_as_a_text_is_that_text() -> None:
    """Its keys are rotated for the places that they stand at, so that real tokens follow: they are counted."""
    from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

    text = torch.tensor([[11, 23, 5, 60, 42]])
    model = tiny_model("llama")
    with torch.no_grad():
        cache = caches.of(model(input_ids=text, use_cache=True))
        expected = model(input_ids=torch.cat([text.expand(2, -1), ROWS], dim=1)).logits[:, LENGTH:]
    adapted = peft.get_peft_model(model, peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    initialize_kv_prefix_from_past_key_values(adapted, past_key_values=cache)
    prompt = ENGINE.extract(adapted.eval())
    assert prompt.positions.start == {"decoder": LENGTH}
    assert apart(logits(sb.attach(tiny_model("llama"), prompt)), expected) < 1e-5
    other = replace(prompt, positions=replace(prompt.positions, start={"decoder": LENGTH + 1}))
    assert apart(logits(sb.attach(tiny_model("llama"), other)), expected) > 1e-3


# --- what trained it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_training_state_of_a_live_model_is_kept_beside_what_peft_saves(
    family: str, method: str, tmp_path: Path
) -> None:
    model, config = live(family, method), tiny_config(family)
    prompt = ENGINE.extract(model)
    model.save_pretrained(tmp_path / "theirs")
    lost = family == "t5" and method == "p-tuning-lstm"  # the LSTM of two submodules runs over rows that are not used
    assert (prompt.training and prompt.training.kind) == (None if lost else {**THROWN, **STORED}[method])

    sb.save(prompt, tmp_path / "ours", format="peft", base=config)
    again = read(tmp_path / "ours", family)
    assert again == prompt
    kept = method in THROWN and not lost
    names = {facts.CONFIG_FILE, facts.WEIGHTS_FILES[0], *([facts.TRAINING_FILE] if kept else [])}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names | {"softbridge.json", "README.md"}
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    # For an encoder-decoder PEFT's parameterisation makes the rows of both stacks in one float32 product.
    rounding = 1e-6 if family == "t5" and method in THROWN else 0.0
    assert all(np.abs(array - theirs[name]).max() <= rounding * np.abs(array).max() for name, array in ours.items())

    asked = {"task_ids": torch.tensor([0, 0])} if method == "multitask" else {}
    if family == "t5" and method == "multitask":
        assert generate(loaded(family, tmp_path / "ours"), **asked) == generate(model.eval(), **asked)
    else:
        # The live parameterisation makes its rows in float32, for every text of the batch anew: other shapes.
        far = apart(logits(loaded(family, tmp_path / "ours"), **asked), logits(model.eval(), **asked))
        assert far <= (1e-5 if method in THROWN else 0.0)


@pytest.mark.parametrize("method", [*THROWN, *STORED])
def test_extracting_leaves_a_live_model_as_peft_would_save_it(method: str) -> None:
    model, twin = live("llama", method), live("llama", method)
    saved = peft.get_peft_model_state_dict(twin)
    prompt = ENGINE.extract(model)
    assert model.training
    for name, tensor in twin.prompt_encoder["default"].state_dict().items():
        assert torch.equal(model.prompt_encoder["default"].state_dict()[name], tensor), name
    if method not in STORED:
        flat = prompt.inputs[0].vectors if prompt.inputs else prompt.prefixes[0].flat()
        assert np.array_equal(flat, saved[facts.PROMPT].numpy())
    # Training goes on, and so does what is extracted.
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter += 0.25 * parameter.requires_grad
    other = ENGINE.extract(model)
    assert other.training != prompt.training
    assert other.parts != prompt.parts
    assert rematerialise(other) == other


def test_dropout_is_left_out_of_what_is_extracted() -> None:
    """See peft-saved-dropout: PEFT saves another prompt each time."""
    model = live("gpt2", "p-tuning-lstm", encoder_dropout=0.5)
    prompt = ENGINE.extract(model)
    assert ENGINE.extract(model) == prompt
    assert prompt.training is not None
    assert prompt.training.settings["dropout"] == 0.5
    saved = peft.get_peft_model_state_dict(model.eval())[facts.PROMPT].numpy()
    assert np.array_equal(prompt.inputs[0].vectors, saved)


def test_one_submodule_of_an_encoder_decoder_model_has_the_whole_state(tmp_path: Path) -> None:
    config = tiny_config("t5")
    for method in ("p-tuning", "p-tuning-lstm", "multitask"):
        model = live("t5", method, num_transformer_submodules=1)
        prompt = ENGINE.extract(model)
        assert (prompt.training and prompt.training.kind) == {**THROWN, **STORED}[method]
        model.save_pretrained(tmp_path / method)
        sb.save(prompt, tmp_path / f"{method}-ours", format="peft", base=config)
        assert config_in(tmp_path / f"{method}-ours") == config_in(tmp_path / method)
        ours, theirs = (tensors_in(tmp_path / name) for name in (f"{method}-ours", method))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(array, theirs[name]) for name, array in ours.items())


def test_what_is_attached_and_not_trained_keeps_its_training_state(trained: Make) -> None:
    prompt = read(trained("llama", "multitask"), "llama")
    attached = sb.attach(tiny_model("llama"), prompt, "peft")
    assert sb.extract(attached) == prompt
    with torch.no_grad():
        attached.prompt_encoder["default"].embedding.weight += 1
    changed = sb.extract(attached)
    assert changed.training is None
    assert changed.parts != prompt.parts


#: What other toolkits and the native engine train -> the peft_type, which names the parameterisation if it is PEFT's,
#: and whether softbridge's file is needed beside PEFT's.
ELSEWHERE = [
    (PTuning(LENGTH, "mlp", hidden_size=20), "P_TUNING", True),
    (PTuning(LENGTH, "lstm", hidden_size=12, layers=3, dropout=0.1), "P_TUNING", True),
    (PTuning(LENGTH, "lstm-paper"), "P_TUNING", True),
    (PTuning(LENGTH, "mlp-fewshot"), "PROMPT_TUNING", True),
    (PTuning(LENGTH, "lstm-fewshot"), "PROMPT_TUNING", True),
    (MultitaskPromptTuning(tasks=3, ranks=2, length=LENGTH), "MULTITASK_PROMPT_TUNING", False),
    (ContextAwarePromptTuning([1, 2, 2, 3, 4], epsilon=9.0), "PROMPT_TUNING", True),
    (PrefixTuning(LENGTH, MLP(20, embedding_size=16)), "PREFIX_TUNING", True),
    (PrefixTuning(LENGTH, MLP(20)), "PREFIX_TUNING", True),
    (PrefixTuning(LENGTH, MLP(20, embedding_size=16, non_linearity="relu")), "PREFIX_TUNING", True),
    (PrefixTuning(LENGTH, MLP(20, embedding_size=16, dropout=0.1)), "PREFIX_TUNING", True),
    (Cartridge(LENGTH, frozen=2), "CARTRIDGE", False),
    (Cartridge(LENGTH, frozen=0), "CARTRIDGE", False),
]


@pytest.mark.parametrize(("method", "peft_type", "kept"), ELSEWHERE, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("encoding", ["safetensors", "bin"])
def test_training_states_from_elsewhere_become_peft_files(
    method: Any, peft_type: str, kept: bool, encoding: str, tmp_path: Path
) -> None:
    config = tiny_config("llama")
    prompt = enlarged(method.initialise(read_geometry(config), seed=3))
    sb.save(prompt, tmp_path / "written", format="peft", base=config, encoding=encoding)
    assert read(tmp_path / "written", "llama") == prompt
    written = config_in(tmp_path / "written")
    assert written["peft_type"] == peft_type
    assert (tmp_path / "written" / facts.TRAINING_FILE).exists() == kept
    asked = {"task_ids": torch.tensor([0, 0])} if peft_type == "MULTITASK_PROMPT_TUNING" else {}
    found = logits(loaded("llama", tmp_path / "written"), **asked)
    assert apart(found[:, -4:], logits(sb.attach(tiny_model("llama"), prompt))[:, -4:]) < 1e-5
    assert apart(found[:, -4:], logits(tiny_model("llama"))) > 0.1

    # What the configuration says of a parameterisation is true: PEFT builds one that takes the tensors.
    projected = written.get("prefix_projection", False)
    assert projected == (peft_type == "PREFIX_TUNING" and method.reparameterisation == MLP(20, 16))
    if peft_type == "P_TUNING" or projected:
        assert prompt.training is not None
        trainable = peft.PeftConfig.from_peft_type(**{**written, "inference_mode": False})
        module = (peft.PrefixEncoder if projected else peft.PromptEncoder)(trainable)
        words = facts.ENCODERS[prompt.training.kind].items()
        state = {
            theirs + name.removeprefix("self.").removeprefix(ours): to_torch(array)
            for name, array in prompt.training.tensors.items()
            for theirs, ours in words
            if name.removeprefix("self.").startswith(ours)
        }
        module.load_state_dict(state)
        rows = module.eval()(torch.arange(LENGTH)[None])[0].detach().numpy()
        expected = prompt.inputs[0].vectors if prompt.inputs else prompt.prefixes[0].flat()
        assert np.array_equal(rows, expected)


def enlarged(prompt: SoftPrompt) -> SoftPrompt:
    """With large random numbers in the training state."""
    assert prompt.training is not None
    generator = np.random.default_rng(5)
    numbers = {
        name: generator.normal(0, 0.5, array.shape).astype(np.float32)
        for name, array in prompt.training.tensors.items()
    }
    return rematerialise(replace(prompt, training=replace(prompt.training, tensors=numbers)))


def test_training_states_go_around_the_world(tmp_path: Path) -> None:
    """PEFT's live model -> softbridge's own file -> PEFT's files -> again: nothing is lost on the way."""
    config = tiny_config("gpt2")
    for method, kind in {**THROWN, **STORED}.items():
        prompt = ENGINE.extract(live("gpt2", method))
        sb.save(prompt, tmp_path / f"{method}.safetensors", format="softbridge", base=config)
        verify = method in ("context-aware", "cartridge")  # each of the two kinds of part
        report = sb.convert(tmp_path / f"{method}.safetensors", tmp_path / method, "peft", base=config, verify=verify)
        assert report.certificate is None or report.certificate.same
        assert (report.certificate is None) != verify
        again = read(tmp_path / method, "gpt2")
        assert again == prompt
        assert again.training is not None
        assert again.training.kind == kind


def test_what_does_not_belong_to_the_prompt_is_not_written(tmp_path: Path) -> None:
    config = tiny_config("llama")
    geometry = read_geometry(config)
    prompt = enlarged(PTuning(LENGTH).initialise(geometry))
    other = enlarged(MultitaskPromptTuning(2, 1, LENGTH).initialise(geometry))
    assert prompt.training is not None
    nonsense = {"w": np.ones(3, np.float32)}
    near = replace(prompt.inputs[0], vectors=prompt.inputs[0].vectors * np.float32(1 + 2e-6))
    assert not FORMAT.obstacles(replace(prompt, parts=(near,)), geometry)
    barely = replace(other.inputs[0], vectors=np.nextafter(other.inputs[0].vectors, np.float32(9)))
    for wrong, reason in (
        (replace(prompt, training=replace(prompt.training, tensors=nonsense)), "missing embedding"),
        (replace(prompt, training=replace(prompt.training, kind="alchemy")), "'alchemy'"),
        (replace(prompt, training=other.training), "other vectors"),
        (replace(prompt, parts=random_input_prompt(geometry).parts), "other vectors"),
        (replace(other, parts=(barely,)), "other vectors"),
        (replace(random_prefix(geometry), training=prompt.training), "vectors in the input, it has none"),
        (replace(prompt, parts=random_input_prompt(geometry, LENGTH + 1).parts), r"vectors \[5, 32\]"),
    ):
        wrong = replace(wrong, positions=replace(wrong.positions, start=wrong.counted()))
        assert [obstacle.name for obstacle in FORMAT.obstacles(wrong, geometry)] == ["training"]
        if reason == "'alchemy'":  # what nobody knows is left out, and said to be
            assert sb.save(wrong, tmp_path / "alchemy", format="peft", base=config).steps[0].name == "eject"
            continue
        with pytest.raises(LoweringError, match=reason):
            sb.save(wrong, tmp_path / "out", format="peft", base=config)
        assert not (tmp_path / "out").exists()


def rewritten(directory: Path, tensors: Mapping[str, Array], **metadata: str) -> Path:
    (directory / facts.TRAINING_FILE).write_bytes(safetensors_bytes(tensors, metadata))
    return directory


def test_a_training_file_of_another_prompt_is_refused(tmp_path: Path) -> None:
    model = live("llama", "p-tuning")
    geometry = read_geometry(tiny_config("llama"))
    folder = put(tmp_path / "ours", as_bytes(FORMAT.write(ENGINE.extract(model), geometry)))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight += 1
    model.save_pretrained(folder)  # PEFT writes over its own files, and lets ours lie
    with pytest.raises(CheckpointError, match="other vectors") as caught:
        read(folder, "llama")
    assert "remove" in caught.value.remedy
    (folder / facts.TRAINING_FILE).unlink()
    assert read(folder, "llama").training is None


def test_stale_files_of_softbridge_are_dropped_on_request(tmp_path: Path) -> None:
    def convert(to: str, *more: str) -> Any:
        arguments = ["convert", str(tmp_path / "ours"), str(tmp_path / to), "--to", "peft", "--json", *more]
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, json.loads(result.stdout)

    model = live("llama", "p-tuning")
    sb.save(ENGINE.extract(model), tmp_path / "ours", format="peft", base=tiny_config("llama"))
    status, found = convert("fresh", "--drop", "training")
    assert status == 0
    assert any(step["name"] == "drop" and "cannot be resumed" in step["note"] for step in found["steps"])
    assert {path.name for path in (tmp_path / "fresh").iterdir()} == {
        facts.CONFIG_FILE,
        facts.WEIGHTS_FILES[0],
        "softbridge.json",
        "README.md",
    }
    assert sb.load(tmp_path / "fresh") == replace(sb.load(tmp_path / "ours"), training=None)

    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight += 1
    model.save_pretrained(tmp_path / "ours")
    for dropped, message in (((), "training"), (("training",), "softbridge.json"), (("manifest",), "training")):
        status, found = convert("out", *(word for name in dropped for word in ("--drop", name)))
        assert status == 2
        assert message in found["refused"]["found"]
        assert not (tmp_path / "out").exists()
    status, _ = convert("out", "--drop", "training", "--drop", "manifest")
    assert status == 0
    saved = peft.get_peft_model_state_dict(model.eval())[facts.PROMPT].numpy()
    assert np.array_equal(sb.load(tmp_path / "out").inputs[0].vectors, saved)
    with pytest.raises(SoftbridgeError, match="nothing that can be dropped: head"):
        sb.read(tmp_path / "ours", drop=["head"])


def test_the_task_that_is_meant_is_not_dropped_with_the_matrices(trained: Make, tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    second = rematerialise(read(trained("gpt2", "multitask"), "gpt2"), 1)
    sb.save(second, tmp_path / "second", format="peft", base=config)
    sb.convert(tmp_path / "second", tmp_path / "out", "peft", base=config, drop=["training"])
    assert sb.load(tmp_path / "out", base=config) == replace(second, training=None)
    assert config_in(tmp_path / "out")["peft_type"] == "PROMPT_TUNING"


def test_a_broken_training_file_is_refused_by_name(tmp_path: Path) -> None:
    prompt = ENGINE.extract(live("llama", "p-tuning"))
    assert prompt.training is not None
    content = as_bytes(FORMAT.write(prompt, read_geometry(tiny_config("llama"))))
    good = {"kind": prompt.training.kind, "settings": json.dumps(dict(prompt.training.settings))}
    tensors = dict(prompt.training.tensors)
    assert read(rewritten(put(tmp_path / "good", content), tensors, **good), "llama") == prompt
    wide = {**tensors, "linear.0.bias": np.zeros(10**5, np.float32)}
    long = {
        **tensors,
        "embedding": np.zeros((10**4, 32), np.float32),
        "linear.0.weight": np.zeros((10**5, 1), np.float32),
    }
    cases: list[tuple[Mapping[str, Array], dict[str, str], str]] = [
        (tensors, {}, "no kind and settings"),
        (tensors, {**good, "settings": "[1]"}, "list"),
        (tensors, {**good, "settings": "{"}, "JSON"),
        (tensors, {**good, "settings": '{"layers": 2}'}, "unexpected linear.2"),
        (tensors, {**good, "kind": "multitask"}, "missing columns"),
        ({**tensors, "linear.0.bias": tensors["linear.0.bias"].astype(np.float64)}, good, "float64"),
        ({name: array.astype(np.float64) for name, array in tensors.items()}, good, "float64"),
        (wide, good, r"linear.0.bias has the shape \[100000\]"),
        (long, good, "room"),
        ({**tensors, "embedding": tensors["embedding"][:3]}, good, r"vectors \[3, 32\]"),
    ]
    for number, (arrays, metadata, message) in enumerate(cases):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(rewritten(put(tmp_path / str(number), content), arrays, **metadata), "llama")
        assert caught.value.remedy
    folder = put(tmp_path / "pickle", {**content, facts.TRAINING_FILE: b"\x80\x04."})
    with pytest.raises(CheckpointError, match="training"):
        read(folder, "llama")


# --- the tasks of a multitask prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_is_run_as_peft_runs_it(family: str, trained: Make, tmp_path: Path) -> None:
    changes = {"num_transformer_submodules": 1} if family == "t5" else {}
    source, config = trained(family, "multitask", **changes), tiny_config(family)
    first = read(source, family)
    assert first.training is not None
    assert first.training.settings == {"task": 0}
    toolkit = loaded(family, source)
    outputs = []
    for task in range(example.TASKS):
        prompt = rematerialise(first, task)
        sb.save(prompt, tmp_path / str(task), format="peft", base=config)
        assert (tmp_path / str(task) / facts.TRAINING_FILE).exists() == (task > 0)
        again = read(tmp_path / str(task), family)
        assert again == prompt
        assert config_in(tmp_path / str(task)) == config_in(source)
        advice = FORMAT.advice(prompt, read_geometry(config))
        assert any(f"torch.full((B,), {task})" in line for line in advice)
        assert any("labels" in line for line in advice) == (family == "t5")

        running = ENGINE.load(tiny_model(family), again, tmp_path / str(task))
        asked = {"task_ids": torch.tensor([task, task])}
        if family == "t5":  # whose forward takes labels only; see peft-multitask-decoder
            labels = torch.tensor([[9, 30, 7], [44, 12, 3]])
            with torch.no_grad():
                theirs = toolkit(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), labels=labels, **asked).logits
            decoder = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], dim=1)
            with torch.no_grad():
                ours = running(input_ids=ROWS, attention_mask=torch.ones_like(ROWS), decoder_input_ids=decoder).logits
        else:
            theirs, ours = logits(toolkit, **asked), logits(running)
            assert torch.equal(
                logits(running, task_ids=torch.tensor([0, 1]))[0],
                logits(toolkit, task_ids=torch.tensor([0, 1]))[0],
            )
        assert torch.equal(ours, theirs)
        if family != "bert":
            assert generate(running) == generate(toolkit, **asked)
            assert generate(running, num_beams=3) == generate(toolkit, num_beams=3, **asked)
        outputs.append(theirs)
    assert min(apart(a, b) for n, a in enumerate(outputs) for b in outputs[:n]) > 0.1


def test_a_mixed_batch_has_the_tasks_that_its_caller_names(trained: Make) -> None:
    source = trained("gpt2", "multitask")
    running = ENGINE.load(tiny_model("gpt2"), read(source, "gpt2"), source)
    asked = {"task_ids": torch.tensor([2, 1])}
    assert torch.equal(logits(running, **asked), logits(loaded("gpt2", source), **asked))
    assert apart(logits(running, **asked), logits(running)) > 0.1


def test_one_task_alone_is_a_prompt_of_prompt_tuning(trained: Make, tmp_path: Path) -> None:
    prompt = rematerialise(read(trained("llama", "multitask"), "llama"), 2)
    sb.save(replace(prompt, training=None), tmp_path / "one", format="peft", base=tiny_config("llama"))
    written = config_in(tmp_path / "one")
    assert written["peft_type"] == "PROMPT_TUNING"
    assert not any("task" in name for name in written.keys() - {"task_type"})
    expected = logits(loaded("llama", trained("llama", "multitask")), task_ids=torch.tensor([2, 2]))
    assert torch.equal(logits(loaded("llama", tmp_path / "one")), expected)


def test_a_conversion_says_which_task_it_takes(trained: Make, tmp_path: Path) -> None:
    report = sb.convert(trained("gpt2", "multitask"), tmp_path / "out", "softbridge", base=tiny_config("gpt2"))
    assert any("one task of 3" in step.note for step in report.steps)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_tasks_that_do_not_exist_are_refused(family: str, trained: Make, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in trained(family, "multitask").iterdir() if path.is_file()}
    for number, (settings, arrays, message) in enumerate(
        [
            ('{"task": 3}', {}, "there are 3 tasks"),
            ('{"task": -1}', {}, "task -1"),
            ('{"task": true}', {}, "task True"),
            ('{"task": 1}', {"rows": np.ones((3, 2, 32), np.float32)}, "says"),
        ]
    ):
        folder = rewritten(put(tmp_path / str(number), content), arrays, kind="multitask", settings=settings)
        with pytest.raises(CheckpointError, match=message):
            read(folder, family)


def test_where_peft_is_not_told_the_task_it_gets_the_prompt_of_that_task(tmp_path: Path) -> None:
    """See peft-multitask-task: without a classifier a prompt for BERT is for feature extraction."""
    config = tiny_config("bert")
    prompt = rematerialise(enlarged(MultitaskPromptTuning(2, 1, LENGTH).initialise(read_geometry(config))), 1)
    sb.save(prompt, tmp_path / "out", format="peft", base=config)
    assert config_in(tmp_path / "out")["peft_type"] == "PROMPT_TUNING"
    assert not any("task_ids" in line for line in FORMAT.advice(prompt, None))
    assert read(tmp_path / "out", "bert") == prompt
    running = ENGINE.load(tiny_model("bert"), prompt, tmp_path / "out")
    expected = logits(sb.attach(tiny_model("bert"), prompt, "peft"))
    assert torch.equal(logits(running), expected)
    assert apart(logits(sb.attach(tiny_model("bert"), rematerialise(prompt, 0), "peft")), expected) > 0.1


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_tasks_are_evaluated_in_the_precision_that_peft_holds_them_in(
    dtype: Any, trained: Make, tmp_path: Path
) -> None:
    source = trained("gpt2", "multitask")
    tensors = {name: array.astype(dtype) for name, array in tensors_in(source).items()}
    content = {facts.CONFIG_FILE: (source / facts.CONFIG_FILE).read_bytes()}
    folder = put(tmp_path / "source", {**content, facts.WEIGHTS_FILES[0]: safetensors_bytes(tensors)})
    expected = logits(loaded("gpt2", folder), task_ids=torch.tensor([0, 0]))
    assert torch.equal(logits(sb.attach(tiny_model("gpt2"), read(folder, "gpt2"), "peft")), expected)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*THROWN, *STORED])
def test_unknown_fields_are_given_back(method: str, trained: Make, tmp_path: Path) -> None:
    content = {path.name: path.read_bytes() for path in trained("llama", method).iterdir() if path.is_file()}
    config = {**json.loads(content[facts.CONFIG_FILE]), "new_setting": [1], "revision": "main"}
    folder = put(tmp_path / "source", {**content, facts.CONFIG_FILE: json.dumps(config).encode()})
    sb.save(read(folder, "llama"), tmp_path / "written", format="peft", base=tiny_config("llama"))
    assert config_in(tmp_path / "written") == config


def test_a_cartridge_that_is_frozen_whole_has_nothing_to_train(trained: Make, tmp_path: Path) -> None:
    source = trained("llama", "cartridge")
    content = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    config = {**config_in(source), "num_frozen_tokens": LENGTH}
    folder = put(tmp_path / "source", {**content, facts.CONFIG_FILE: json.dumps(config).encode()})
    prompt = read(folder, "llama")
    assert prompt.training is None
    sb.save(prompt, tmp_path / "written", format="peft", base=tiny_config("llama"))
    assert config_in(tmp_path / "written") == config
    assert torch.equal(logits(loaded("llama", tmp_path / "written")), logits(loaded("llama", source)))


BROKEN = [
    ("multitask", {"num_tasks": None}, {}, "num_tasks is None"),
    ("multitask", {"num_ranks": "2"}, {}, "num_ranks is '2'"),
    ("multitask", {"num_tasks": 4}, {}, r"'prefix_task_cols' has shape \[3, 5, 2\]"),
    ("multitask", {"num_ranks": 1}, {}, r"'prefix_task_rows' has shape \[3, 2, 32\]"),
    ("multitask", {}, {facts.COLUMNS: None}, r"missing \(prefix_task_cols\)"),
    ("multitask", {}, {facts.ROWS: np.ones((3, 2, 31), np.float32)}, "prefix_task_rows"),
    ("multitask", {}, {facts.ROWS: np.ones((3, 2, 32), np.int32)}, "int32"),
    ("multitask", {"token_dim": None}, {facts.PROMPT: np.ones((), np.float32)}, "'prompt_embeddings' has shape"),
    ("p-tuning", {}, {facts.COLUMNS: np.ones((3, 5, 2), np.float32)}, r"unexpected \(prefix_task_cols\)"),
    ("cartridge", {"num_frozen_tokens": 6}, {}, "num_frozen_tokens is 6 of 5"),
    ("cartridge", {"num_frozen_tokens": -1}, {}, "num_frozen_tokens is -1"),
    ("cartridge", {"num_frozen_tokens": None}, {}, "num_frozen_tokens is None"),
    ("context-aware", {"cpt_token_ids": [1, 2]}, {}, r"cpt_token_ids is \[1, 2\]"),
    ("context-aware", {"cpt_mask": None}, {}, "cpt_mask is None"),
    ("context-aware", {"cpt_tokens_type_mask": [1, 2, 3, 4, "5"]}, {}, "cpt_tokens_type_mask is"),
    ("context-aware", {"task_type": "TOKEN_CLS"}, {}, "task_type is 'TOKEN_CLS'"),
]


@pytest.mark.parametrize(("method", "fields", "arrays", "message"), BROKEN)
def test_broken_files_are_refused_by_name(
    method: str, fields: dict[str, Any], arrays: dict[str, Any], message: str, trained: Make, tmp_path: Path
) -> None:
    source = trained("llama", method)
    tensors = {name: array for name, array in {**tensors_in(source), **arrays}.items() if array is not None}
    content = {
        facts.CONFIG_FILE: json.dumps({**config_in(source), **fields}).encode(),
        facts.WEIGHTS_FILES[0]: safetensors_bytes(tensors),
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        read(put(tmp_path / "broken", content), "llama")
    assert caught.value.remedy


@pytest.fixture(scope="module")
def valid() -> list[dict[str, bytes]]:
    """The files of a prompt with a training file of its own, and of one with a task alone in it."""
    geometry = read_geometry(tiny_config("llama"))
    prompts = [ENGINE.extract(live("llama", method)) for method in ("p-tuning", "prefix-tuning-projected", "multitask")]
    prompts[-1] = rematerialise(prompts[-1], 1)
    return [as_bytes(FORMAT.write(prompt, geometry)) for prompt in prompts]


JSON = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
)


def read_bytes(content: Mapping[str, bytes]) -> SoftPrompt:
    with tempfile.TemporaryDirectory() as scratch:
        return FORMAT.read(Files(put(Path(scratch) / "files", content)), None)


@given(data=st.data())
def test_damaged_files_are_read_as_they_were_or_refused(data: st.DataObject, valid: list[dict[str, bytes]]) -> None:
    content = dict(data.draw(st.sampled_from(valid)))
    before = read_bytes(content)
    name = data.draw(st.sampled_from(sorted(content)))
    damaged = bytearray(content[name])
    start = data.draw(st.integers(0, min(len(damaged), 1200) - 1))
    damaged[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    with suppress(CheckpointError, BaseModelError):
        # Numbers may be others within the rounding that is allowed, and names that nothing hangs on.
        found = read_bytes({**content, name: bytes(damaged)})
        assert [part.length for part in found.parts] == [part.length for part in before.parts]


@given(data=st.data())
def test_settings_of_any_kind_are_read_or_refused(data: st.DataObject, valid: list[dict[str, bytes]]) -> None:
    content = dict(data.draw(st.sampled_from(valid)))
    kept = read_bytes(content).training
    assert kept is not None
    settings = dict(kept.settings)
    settings[data.draw(st.sampled_from(sorted(settings)))] = data.draw(JSON | st.lists(JSON, max_size=2))
    kind = data.draw(st.sampled_from([*KINDS, kept.kind]))
    tensors = {} if kept.kind == "multitask" else kept.tensors
    content[facts.TRAINING_FILE] = safetensors_bytes(tensors, {"kind": kind, "settings": json.dumps(settings)})
    with suppress(CheckpointError):
        found = read_bytes(content).training
        assert found is not None
        assert (found.kind, found.settings) == (kind, settings)


def peft_config(task_type: str = "CAUSAL_LM", num_virtual_tokens: int = LENGTH) -> Any:
    return peft.PromptTuningConfig(task_type=task_type, num_virtual_tokens=num_virtual_tokens)


def named(directory: Path, *lengths: tuple[str, int]) -> Path:
    """Adapters as PEFT saves those with a name, each in its own folder."""
    (first, length), *others = lengths
    model = peft.get_peft_model(tiny_model("gpt2"), peft_config(num_virtual_tokens=length), first)
    for name, length in others:
        model.add_adapter(name, peft_config(num_virtual_tokens=length))
    model.save_pretrained(directory)
    return directory


def test_the_only_adapter_in_a_subfolder_is_read_from_above(tmp_path: Path) -> None:
    folder = named(tmp_path / "above", ("english", 4))
    assert not (folder / facts.CONFIG_FILE).exists()
    prompt = sb.load(folder)
    assert prompt == sb.load(folder / "english")
    config = tiny_config("gpt2")
    report = sb.convert(folder, tmp_path / "out", "softbridge", base=config, verify=True)
    assert report.certificate is not None
    assert report.certificate.source.loaded
    assert report.certificate.same


def test_several_adapters_are_named(tmp_path: Path) -> None:
    folder = named(tmp_path / "above", ("english", 4), ("german", 3))
    with pytest.raises(CheckpointError, match="english, german") as caught:
        sb.load(folder)
    assert str(folder / "german") in caught.value.remedy
    assert [sb.load(folder / name).parts[0].length for name in ("english", "german")] == [4, 3]


def test_an_adapter_beside_subfolders_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    folder = named(tmp_path / "above", ("default", 4), ("german", 3))
    report = sb.convert(folder, tmp_path / "out", "softbridge")
    assert report.source.prompt.parts[0].length == 4
    assert any("german" in step.note and "not read" in step.note for step in report.steps)


def test_a_subfolder_with_a_manifest_is_not_read_without_it(tmp_path: Path) -> None:
    """Its positions would be lost."""
    config = tiny_config("gpt2")
    sb.save(random_prefix(read_geometry(config)), tmp_path / "above" / "ours", format="peft", base=config)
    with pytest.raises(CheckpointError, match="ours"):
        sb.load(tmp_path / "above")
    assert sb.load(tmp_path / "above" / "ours").prefixes


def test_a_subfolder_beside_another_format_is_a_neighbour(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    prompt = random_prefix(read_geometry(config))
    sb.save(prompt, tmp_path / "above", format="softbridge", base=config)
    named(tmp_path / "above", ("english", 4))
    assert sb.load(tmp_path / "above").prefixes
    (tmp_path / "above" / "english" / facts.CONFIG_FILE).write_text("{")
    assert sb.load(tmp_path / "above").prefixes


# --- the engine -------------------------------------------------------------------------------------------------------


def test_the_active_adapter_is_extracted_whatever_its_name() -> None:
    model = peft.get_peft_model(tiny_model("bert"), peft_config(task_type="SEQ_CLS"), "english")
    model.add_adapter("german", peft_config(task_type="SEQ_CLS", num_virtual_tokens=3))
    found = {}
    for name in ("english", "german"):
        model.set_adapter(name)
        with torch.no_grad():
            model.get_base_model().classifier.modules_to_save[name].bias += len(name)
        found[name] = ENGINE.extract(model)
        assert np.array_equal(found[name].parts[0].vectors, model.prompt_encoder[name].embedding.weight.detach())
        bias = model.get_base_model().classifier.modules_to_save[name].bias
        assert np.array_equal(found[name].head["classifier.bias"], bias.detach())
    assert found["english"] != found["german"]


def test_a_model_without_a_soft_prompt_has_none_to_extract() -> None:
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(EngineError, match="LORA"):
        ENGINE.extract(model)


def test_methods_that_peft_does_not_have_are_refused(tmp_path: Path) -> None:
    for family, method in (("gpt2", "lora"), ("bert", "context-aware"), ("t5", "context-aware")):
        with pytest.raises(EngineError, match=method):
            ENGINE.train_example(tiny_model(family), method, tmp_path, length=2, steps=1, seed=0)


def test_a_multitask_prompt_of_another_model_is_refused(trained: Make) -> None:
    with pytest.raises(BaseModelError, match="width"):
        sb.load(trained("llama", "multitask"), base=tiny_config("llama", hidden_size=40))


def test_training_state_without_a_task_is_of_the_first() -> None:
    config = tiny_config("gpt2")
    prompt = enlarged(MultitaskPromptTuning(2, 1, LENGTH).initialise(read_geometry(config)))
    assert prompt.training is not None
    silent = replace(prompt, training=Training("multitask", {}, prompt.training.tensors))
    assert rematerialise(silent) == silent
    content = as_bytes(FORMAT.write(silent, None))
    assert facts.TRAINING_FILE in content
    assert "torch.full((B,), 0)" in FORMAT.advice(silent, None)[0]
