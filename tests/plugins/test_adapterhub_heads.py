"""Classifiers beside AdapterHub's adapters: of transformers classes, and "flex" ones that compute the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge import untrusted
from softbridge.errors import CheckpointError
from softbridge.geometry import Geometry, StackGeometry, read_geometry
from softbridge.prompt import Array, KeyValuePrefix, Positions, SoftPrompt, same_array
from softbridge.testing import random_prefix
from softbridge.untrusted import Files
from softbridge_adapterhub import facts, heads
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

# transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

LABELS = 3
H = 16


def geometry_of(family: str) -> Geometry:
    stack = StackGeometry(2, 2, 2, 8)
    encoder = family in facts.PROMPT_MODEL_TYPES
    return Geometry(family, H, 40, stack if encoder else None, None if encoder else stack)


def prompt_for(geometry: Geometry) -> SoftPrompt:
    prompt = random_prefix(geometry, 4)
    (part,) = prompt.prefixes
    if geometry.model_type in facts.SHARED_LAYERS:
        part = KeyValuePrefix(part.site, dict.fromkeys(part.layers, part.layers[0]))
    start = dict.fromkeys(prompt.positions.start, 0)
    return replace(prompt, parts=(part,), positions=Positions(start, "skewed", "pinned"))


def head_for(family: str, flex: str | None = None) -> dict[str, Array]:
    """A head's tensors, by their names in a file."""
    classifier = heads.CLASSIFIERS[family]
    last = list(classifier.layers.values())[-1]
    generator = np.random.default_rng(4)
    shapes = {
        theirs: (LABELS if ours.startswith(f"{last}.") else H, *([H] if ours.endswith("weight") else []))
        for theirs, ours in classifier.tensors(flex).items()
    }
    return {name: generator.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}


def document(family: str, flex: str | None = None, **changes: Any) -> dict[str, Any]:
    """What AdapterHub writes of a head."""
    classifier = heads.CLASSIFIERS[family]
    config = {"head_type": "classification", "num_labels": LABELS, "dropout_prob": None, **classifier.settings}
    return {
        "config": None if flex is None else config,
        "hidden_size": H,
        "model_class": classifier.model_class if flex is None else "Some" + "AdapterModel",
        "model_name": "org/model",
        "model_type": family,
        "name": flex,
        "version": "adapters.x",
        **({"num_labels": LABELS} if flex is None else {}),
        **changes,
    }


def written(family: str, head: Mapping[str, Array], described: dict[str, Any] | None) -> dict[str, bytes]:
    """A prefix with a head beside it."""
    content = dict(FORMAT.write(prompt_for(geometry_of(family)), None))
    content[facts.HEAD_WEIGHTS_FILE] = untrusted.pickle_bytes(head)
    if described is not None:
        content[facts.HEAD_CONFIG_FILE] = untrusted.json_bytes(described)
    return content


def put(folder: Path, files: Mapping[str, bytes]) -> Files:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Files(folder)


@pytest.mark.parametrize("encoding", FORMAT.encodings)
@pytest.mark.parametrize("flex", [None, "mine"])
@pytest.mark.parametrize("family", heads.CLASSIFIERS)
def test_there_and_back(family: str, flex: str | None, encoding: str, tmp_path: Path) -> None:
    head, described = head_for(family, flex), document(family, flex)
    prompt = FORMAT.read(put(tmp_path / "x", written(family, head, described)), geometry_of(family))
    names = heads.CLASSIFIERS[family].tensors(flex)
    assert prompt.head.keys() == set(names.values())
    assert all(same_array(prompt.head[ours], head[theirs]) for theirs, ours in names.items())
    assert not FORMAT.obstacles(prompt, None)
    files = FORMAT.write(prompt, None, encoding)
    assert json.loads(files[facts.HEAD_CONFIG_FILE]) == described
    again = put(tmp_path / "y", files)
    assert FORMAT.read(again, geometry_of(family)) == prompt
    weights = facts.HEAD_WEIGHTS_FILE if encoding == "bin" else "model_head.safetensors"
    assert all(same_array(array, head[name]) for name, array in again.tensors(weights).items())


def test_a_head_from_elsewhere_is_written_for_the_transformers_class(tmp_path: Path) -> None:
    geometry = geometry_of("bert")
    prompt = replace(prompt_for(geometry), head=head_for("bert"))
    files = FORMAT.write(prompt, None)
    described = json.loads(files[facts.HEAD_CONFIG_FILE])
    assert (described["model_class"], described["num_labels"]) == ("BertForSequenceClassification", LABELS)
    assert "BertForSequenceClassification" in " ".join(FORMAT.advice(prompt, geometry))
    read = FORMAT.read(put(tmp_path / "x", files), geometry)
    assert read == prompt
    # What was read of the head is not said of another one.
    smaller = {name: array[:2] for name, array in read.head.items()}
    assert json.loads(FORMAT.write(replace(read, head=smaller), None)[facts.HEAD_CONFIG_FILE])["num_labels"] == 2


@pytest.mark.parametrize(
    ("family", "described", "message"),
    [
        ("bert", None, "None, is not read: of a BertForSequenceClassification is"),
        ("bert", document("bert", model_class="BertForTokenClassification"), "'BertForTokenClassification'"),
        ("gpt2", document("gpt2", model_class="GPT2LMHeadModel"), "'GPT2LMHeadModel'"),
        ("bert", document("bert", "mine", config={"head_type": "tagging"}), "'tagging'"),
        ("bert", document("bert", "mine", config={"head_type": "classification", "layers": 2}), "'classification'"),
        ("bert", document("bert", "mine", name=None), "'classification'"),
        ("bert", document("bert", "mine", name=4), "'classification'"),
        ("bert", document("bert", config=[]), "'BertForSequenceClassification'"),
        (
            "bert-generation",
            document("bert"),
            "'BertForSequenceClassification', is not read: of 'bert-generation' none",
        ),
    ],
)
def test_a_head_that_is_not_read_is_named(
    family: str, described: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    files = put(tmp_path / "x", written(family, {"weight": np.ones(2, np.float32)}, described))
    prompt = FORMAT.read(files, geometry_of(family))
    assert not prompt.head
    assert prompt.origin is not None
    (note,) = prompt.origin.details["notes"]
    assert note.startswith("the prediction head in pytorch_model_head.bin, ")
    assert message in note
    assert FORMAT.write(prompt, None).keys() == {facts.CONFIG_FILE, facts.WEIGHTS_FILE}


def test_a_head_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    head = head_for("roberta")
    del head["classifier.dense.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)the head in .*classifier\.dense\.bias"):
        FORMAT.read(put(tmp_path / "x", written("roberta", head, document("roberta"))), geometry_of("roberta"))


# --- with the toolkit ------------------------------------------------------------------------------------------------

_SIZES = {"vocab_size": 40, "hidden_size": H, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": LABELS}
_GPT = {"vocab_size": 40, "n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    **{family: {**_SIZES, "max_position_embeddings": 32} for family in heads.CLASSIFIERS},
    "distilbert": {"vocab_size": 40, "dim": H, "hidden_dim": 20, "n_layers": 2, "n_heads": 2},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "mistral": {**_SIZES, "num_key_value_heads": 1},
}


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def classifier_of(family: str) -> Any:
    import torch
    from transformers import AutoConfig

    from softbridge.base import build

    config = AutoConfig.for_model(family, **CONFIGS[family], **_SPECIAL)
    return build(config, "sequence-classification", torch.float32, 0)


def logits(model: Any) -> Array:
    """Of two texts, one of them padded."""
    import torch

    tokens = torch.tensor([[5, 9, 17, 33, 21, 8, 4], [7, 11, 3, 30, 6, 0, 0]])
    with torch.no_grad():
        return np.asarray(model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits)


def prefixed(adapters: Any, model: Any) -> Any:
    """A model with a prefix of large random numbers."""
    import torch

    adapters.init(model)
    model.add_adapter("mine", adapters.PrefixTuningConfig(flat=True, prefix_length=4), set_active=True)
    with torch.no_grad():
        for prefix in model.base_model.prefix_tuning.prefix_tunings["mine"].values():
            generator = torch.Generator().manual_seed(2)
            prefix.control_trans.copy_(torch.randn(prefix.control_trans.shape, generator=generator))
    return model.eval()


def test_the_table_is_that_of_the_installed_package(adapters: Any) -> None:
    from adapters.head_utils import STATIC_TO_FLEX_HEAD_MAP

    for classifier in heads.CLASSIFIERS.values():
        theirs = STATIC_TO_FLEX_HEAD_MAP[classifier.model_class]
        assert {number: name for number, name in enumerate(theirs["layers"]) if name} == classifier.layers
        assert theirs["config"]["head_type"] == "classification"
        said = {name: theirs["config"].get(name, default) for name, default in heads.FLEX_DEFAULTS.items()}
        assert said == classifier.settings


@pytest.mark.parametrize("family", heads.CLASSIFIERS)
def test_the_transformers_classifier(family: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    fresh = classifier_of(family)
    model = copy.deepcopy(fresh)
    with torch.no_grad():
        for name in heads.CLASSIFIERS[family].tensors().values():
            model.get_parameter(name).add_(0.5)
    running = prefixed(adapters, model)
    reference = logits(running)
    running.save_adapter(str(tmp_path / "theirs"), "mine", with_head=True)

    prompt = FORMAT.read(Files(tmp_path / "theirs"), read_geometry(fresh.config))
    assert prompt.origin is not None
    assert prompt.origin.details["notes"] == []
    assert set(prompt.head) == {name for name, _ in fresh.named_parameters() if name.split(".")[0] not in BASES}
    put(tmp_path / "ours", FORMAT.write(prompt, None))
    for folder in ("theirs", "ours"):
        again = copy.deepcopy(fresh)
        adapters.init(again)
        again.load_adapter(str(tmp_path / folder), set_active=True)
        np.testing.assert_array_equal(logits(again.eval()), reference)
        loaded = ENGINE.load(copy.deepcopy(fresh), prompt, tmp_path / folder)
        np.testing.assert_array_equal(logits(loaded), reference)
    attached = sb.attach(copy.deepcopy(fresh), prompt, engine="adapterhub")
    np.testing.assert_array_equal(logits(attached), reference)
    extracted = sb.extract(attached).head
    assert extracted.keys() == prompt.head.keys()
    assert all(same_array(array, prompt.head[name]) for name, array in extracted.items())
    headless = sb.attach(copy.deepcopy(fresh), replace(prompt, head={}), engine="adapterhub")
    assert np.abs(logits(headless) - reference).max() > 0.1


#: Names of base models in transformers classes.
BASES = ("albert", "bert", "deberta", "distilbert", "electra", "roberta", "transformer", "model")


@pytest.mark.parametrize("family", heads.CLASSIFIERS)
def test_a_flex_head_that_computes_the_same(family: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    fresh, classifier = classifier_of(family), heads.CLASSIFIERS[family]
    with torch.random.fork_rng():
        flex = adapters.AutoAdapterModel.from_config(copy.deepcopy(fresh.config)).eval()
        flex.base_model.load_state_dict(fresh.base_model.state_dict(), strict=False)
        prefixed(adapters, flex)
        settings = {"head_type": "classification", "num_labels": LABELS, "label2id": None, **classifier.settings}
        flex.add_prediction_head_from_config("mine", settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in flex.heads["mine"].parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    flex.active_head = "mine"
    reference = logits(flex.eval())
    flex.save_adapter(str(tmp_path / "theirs"), "mine", with_head=True)

    prompt = FORMAT.read(Files(tmp_path / "theirs"), read_geometry(fresh.config))
    assert prompt.head.keys() == set(classifier.tensors().values())
    for running in (
        sb.attach(copy.deepcopy(fresh), prompt, engine="adapterhub"),
        ENGINE.load(copy.deepcopy(fresh), prompt, tmp_path / "theirs"),
    ):
        np.testing.assert_allclose(logits(running), reference, atol=1e-6)

    # And back into a class of the package's own.
    put(tmp_path / "ours", FORMAT.write(prompt, None))
    flex.delete_adapter("mine")
    flex.delete_head("mine")
    flex.load_adapter(str(tmp_path / "ours"), set_active=True)
    np.testing.assert_array_equal(logits(flex.eval()), reference)
