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
from softbridge.arrays import Array, same_array
from softbridge.errors import CheckpointError, EngineError
from softbridge.geometry import Geometry, StackGeometry, read_geometry
from softbridge.prompt import KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import as_bytes, random_prefix
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


#: (family, type of the flex head) of every head that is read.
READ = [(family, kind) for family, known in heads.HEADS.items() for kind, one in known.items() if one.layers]


def head_for(family: str, flex: str | None = None, kind: str = "classification") -> dict[str, Array]:
    """A head's tensors, by their names in a file."""
    counterpart = heads.HEADS[family][kind]
    last = list(counterpart.layers.values())[-1]
    rows = {"classification": LABELS, "tagging": LABELS, "question_answering": 2, "multiple_choice": 1}.get(kind, H)
    generator = np.random.default_rng(4)
    shapes = {
        theirs: (rows if ours.startswith(f"{last}.") else H, *([H] if ours.endswith("weight") else []))
        for theirs, ours in counterpart.tensors(flex).items()
    }
    return {name: generator.normal(0, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}


def document(family: str, flex: str | None = None, kind: str = "classification", **changes: Any) -> dict[str, Any]:
    """What AdapterHub writes of a head."""
    counterpart = heads.HEADS[family][kind]
    labels = {"num_labels": LABELS} if kind in ("classification", "tagging") else {}
    config = {"head_type": kind, "dropout_prob": None, **labels, **counterpart.settings}
    return {
        "config": None if flex is None else config,
        "hidden_size": H,
        "model_class": counterpart.model_class if flex is None else "Some" + "AdapterModel",
        "model_name": "org/model",
        "model_type": family,
        "name": flex,
        "version": "adapters.x",
        **(labels if flex is None else {}),
        **changes,
    }


def written(family: str, head: Mapping[str, Array], described: dict[str, Any] | None) -> dict[str, bytes]:
    """A prefix with a head beside it."""
    content = as_bytes(FORMAT.write(prompt_for(geometry_of(family)), None))
    content[facts.HEAD_WEIGHTS_FILE] = untrusted.pickle_bytes(head)
    if described is not None:
        content[facts.HEAD_CONFIG_FILE] = untrusted.json_bytes(described)
    return content


def put(folder: Path, files: Mapping[str, bytes]) -> Files:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Files(folder)


@pytest.mark.parametrize("flex", [None, "mine"])
def test_there_and_back(flex: str | None, tmp_path: Path) -> None:
    assert len(READ) == 59
    for number, (family, kind) in enumerate(READ):
        encoding = FORMAT.encodings[number % 2]
        if flex is not None and kind == "question_answering" and family in facts.RELATIVE_BIAS:
            continue  # not read
        head, described = head_for(family, flex, kind), document(family, flex, kind)
        prompt = FORMAT.read(put(tmp_path / "x", written(family, head, described)), geometry_of(family))
        names = heads.HEADS[family][kind].tensors(flex)
        assert prompt.head.keys() == set(names.values())
        assert all(same_array(prompt.head[ours], head[theirs]) for theirs, ours in names.items())
        assert not FORMAT.obstacles(prompt, None)
        files = as_bytes(FORMAT.write(prompt, None, encoding))
        again = json.loads(files[facts.HEAD_CONFIG_FILE])
        back = put(tmp_path / f"{family} {kind}", files)
        weights = back.tensors(facts.HEAD_WEIGHTS_FILE if encoding == "bin" else "model_head.safetensors")
        if flex is not None and kind in heads.LANGUAGE_MODELS:  # for the class that has the output embeddings
            assert again["model_class"] == heads.HEADS[family][kind if kind == "masked_lm" else "causal_lm"].model_class
            assert weights.keys() == prompt.head.keys()
        else:
            assert again == described
            assert all(same_array(array, head[name]) for name, array in weights.items())
        assert FORMAT.read(back, geometry_of(family)) == prompt


def test_a_head_from_elsewhere_is_written_for_the_transformers_class(tmp_path: Path) -> None:
    geometry = geometry_of("bert")
    prompt = replace(prompt_for(geometry), head=head_for("bert"))
    files = as_bytes(FORMAT.write(prompt, None))
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
        ("bert", None, "None, computes what none of BertForSequenceClassification, BertForTokenClassification, "),
        ("bert", document("bert", model_class="BertForNextSentencePrediction"), "'BertForNextSentencePrediction'"),
        ("bert", document("bert", "mine", config={"head_type": "dependency_parsing"}), "'dependency_parsing'"),
        ("bert", document("bert", "mine", config={"head_type": "tagging", "layers": 2}), "'tagging'"),
        ("gpt2", document("gpt2", "mine", config={"head_type": "causal_lm", "layers": 2}), "'causal_lm'"),
        ("bert", document("bert", "mine", config={"head_type": "classification", "layers": 2}), "'classification'"),
        ("t5", document("t5", "mine", "question_answering"), "'question_answering'"),
        ("bert", document("bert", "mine", name=None), "'classification'"),
        ("bert", document("bert", "mine", name=4), "'classification'"),
        ("bert", document("bert", config=[]), "'BertForSequenceClassification'"),
        (
            "bert-generation",
            document("bert"),
            "'BertForSequenceClassification', computes what none of BertGenerationDecoder does",
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
    lost = prompt.origin.partial
    assert lost.startswith("the prediction head in pytorch_model_head.bin, ")
    assert message in lost
    assert prompt.origin.notes == (f"the prompt alone is read: {lost}",)
    assert FORMAT.write(prompt, None).keys() == {facts.CONFIG_FILE, facts.WEIGHTS_FILE}


@pytest.mark.parametrize(
    ("family", "described"),
    [
        ("gpt2", document("gpt2", model_class="GPT2LMHeadModel")),
        ("t5", {**document("t5"), "model_class": "T5ForConditionalGeneration"}),
        ("llama", document("llama", "mine", config={"head_type": "causal_lm", "layers": 1})),
    ],
)
def test_output_embeddings_are_the_base_models(family: str, described: dict[str, Any], tmp_path: Path) -> None:
    files = put(tmp_path / "x", written(family, {"lm_head.weight": np.ones((40, H), np.float32)}, described))
    prompt = FORMAT.read(files, geometry_of(family))
    assert not prompt.head
    assert prompt.origin is not None
    assert prompt.origin.partial == ""
    assert "which AdapterHub freezes" in " ".join(prompt.origin.notes)


def test_a_head_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    head = head_for("roberta")
    del head["classifier.dense.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)the head in .*classifier\.dense\.bias"):
        FORMAT.read(put(tmp_path / "x", written("roberta", head, document("roberta"))), geometry_of("roberta"))


# --- with the toolkit ------------------------------------------------------------------------------------------------

_SIZES = {"vocab_size": 40, "hidden_size": H, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": LABELS}
_GPT = {"vocab_size": 40, "n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 32}
_BART = {"vocab_size": 40, "d_model": H, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "max_position_embeddings": 32}
_T5 = {
    "vocab_size": 40,
    "d_model": H,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    **{family: {**_SIZES, "max_position_embeddings": 32} for family in heads.HEADS},
    "albert": {**_SIZES, "max_position_embeddings": 32, "embedding_size": 12},
    **dict.fromkeys(("bart", "mbart", "plbart"), _BART),
    "distilbert": {"vocab_size": 40, "dim": H, "hidden_dim": 20, "n_layers": 2, "n_heads": 2},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
    "mistral": {**_SIZES, "num_key_value_heads": 1},
    "mt5": _T5,
    "t5": _T5,
}
#: What is run: each type of head on families whose classes build it differently. (The names of all are compared with
#: the package's own.)
RUN = [
    *((family, "classification") for family in ("albert", "bert", "deberta-v2", "distilbert", "electra", "roberta")),
    *((family, "classification") for family in ("gpt2", "llama", "bart", "t5")),
    *((family, "tagging") for family in ("bert", "gpt2", "llama")),
    *((family, "question_answering") for family in ("distilbert", "gpt2", "llama", "bart", "t5")),
    *((family, "multiple_choice") for family in ("roberta", "electra")),
    *((family, "masked_lm") for family in ("albert", "bert", "distilbert", "electra")),
    ("roberta", "causal_lm"),
]


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def model_of(family: str, kind: str) -> Any:
    import torch
    import transformers

    from softbridge.base import draw_weights

    settings = {**CONFIGS[family], **_SPECIAL, "is_decoder": kind == "causal_lm" and family == "roberta"}
    if kind == "question_answering":
        settings["num_labels"] = 2
    config = transformers.AutoConfig.for_model(family, **settings)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        model = getattr(transformers, heads.HEADS[family][kind].model_class)(config)
    draw_weights(model, 0)
    return model.eval()


def logits(model: Any, kind: str = "classification") -> Array:
    """Of two texts with an end token each, one of them padded; or of two choices."""
    import torch

    tokens = torch.tensor([[5, 9, 17, 33, 21, 8, 2], [7, 11, 3, 30, 2, 0, 0]])
    tokens = tokens[None] if kind == "multiple_choice" else tokens
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=(tokens != 0).long())
    if kind == "question_answering":
        return np.stack([found.start_logits, found.end_logits])
    return np.asarray(found.logits)


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

    ours = {one.model_class: one for known in heads.HEADS.values() for one in known.values()}
    others = {name for name in STATIC_TO_FLEX_HEAD_MAP if name.startswith(("Beit", "Deberta", "ViT", "Xmod"))}
    assert ours.keys() == STATIC_TO_FLEX_HEAD_MAP.keys() - {name for name in others if "V2" not in name}
    for name, one in ours.items():
        theirs = STATIC_TO_FLEX_HEAD_MAP[name]
        numbered = {number: layer for number, layer in enumerate(theirs["layers"]) if layer not in (None, "dropout")}
        if one.head_type in heads.LANGUAGE_MODELS:
            numbered.popitem()  # output embeddings
        assert numbered == one.layers
        said = {**heads.FLEX_DEFAULTS[one.head_type], **theirs["config"]}
        assert said["head_type"] == one.head_type
        assert {key: said[key] for key in one.settings} == one.settings
        assert one.settings.keys() <= heads.FLEX_DEFAULTS[one.head_type].keys()


def test_what_is_trained_of_a_head(adapters: Any) -> None:
    """Not the output embeddings, tied or not: so they are the base model's, and no file need bring them."""
    kinds = {kind: (family, kind) for family, kind in reversed(RUN)}
    for family, kind in [*kinds.values(), ("gpt2", "causal_lm"), ("llama", "causal_lm"), ("bart", "seq2seq_lm")]:
        model = model_of(family, kind)
        adapters.init(model)
        model.add_adapter("mine", adapters.PrefixTuningConfig(flat=True, prefix_length=4))
        model.train_adapter("mine")
        trained = {name for name, p in model.named_parameters() if p.requires_grad and ".mine." not in name}
        assert trained == set(heads.HEADS[family][kind].tensors().values()), (family, kind)


@pytest.mark.parametrize(("family", "kind"), RUN)
def test_the_head_of_a_transformers_class(family: str, kind: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    fresh = model_of(family, kind)
    model, generator = copy.deepcopy(fresh), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name in heads.HEADS[family][kind].tensors().values():
            parameter = model.get_parameter(name)
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    running = prefixed(adapters, model)
    reference = logits(running, kind)
    running.save_adapter(str(tmp_path / "theirs"), "mine", with_head=True)

    prompt = FORMAT.read(Files(tmp_path / "theirs"), read_geometry(fresh.config))
    assert prompt.origin is not None
    assert prompt.origin.notes == ()
    assert prompt.head.keys() == set(heads.HEADS[family][kind].tensors().values())
    put(tmp_path / "ours", as_bytes(FORMAT.write(prompt, None)))
    for folder in ("theirs", "ours"):
        again = copy.deepcopy(fresh)
        adapters.init(again)
        again.load_adapter(str(tmp_path / folder), set_active=True)
        np.testing.assert_array_equal(logits(again.eval(), kind), reference)
        loaded = ENGINE.load(copy.deepcopy(fresh), prompt, tmp_path / folder)
        np.testing.assert_array_equal(logits(loaded, kind), reference)
    attached = sb.attach(copy.deepcopy(fresh), prompt, engine="adapterhub")
    np.testing.assert_array_equal(logits(attached, kind), reference)
    extracted = sb.extract(attached).head
    assert extracted.keys() == prompt.head.keys()
    assert all(same_array(array, prompt.head[name]) for name, array in extracted.items())
    headless = sb.attach(copy.deepcopy(fresh), replace(prompt, head={}), engine="adapterhub")
    assert np.abs(logits(headless, kind) - reference).max() > 0.01


@pytest.mark.parametrize(("family", "kind"), [one for one in RUN if one != ("t5", "question_answering")])
def test_a_flex_head_that_computes_the_same(family: str, kind: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    fresh, counterpart = model_of(family, kind), heads.HEADS[family][kind]
    with torch.random.fork_rng():
        flex = adapters.AutoAdapterModel.from_config(copy.deepcopy(fresh.config)).eval()
        flex.base_model.load_state_dict(fresh.base_model.state_dict(), strict=False)
        prefixed(adapters, flex)
        labels = {"label2id": None} if kind not in ("classification", "tagging") else {"num_labels": LABELS}
        labels = {"num_choices": 2} if kind == "multiple_choice" else labels
        flex.add_prediction_head_from_config("mine", {"head_type": kind, **labels, **counterpart.settings})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in counterpart.tensors("mine"):
            parameter = flex.get_parameter(name)
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        if kind in heads.LANGUAGE_MODELS:
            ours, theirs = fresh.get_output_embeddings(), flex.get_output_embeddings()
            theirs.weight.copy_(ours.weight)
            theirs.bias.copy_(ours.bias)
    flex.active_head = "mine"
    reference = logits(flex.eval(), kind)
    flex.save_adapter(str(tmp_path / "theirs"), "mine", with_head=True)

    prompt = FORMAT.read(Files(tmp_path / "theirs"), read_geometry(fresh.config))
    assert prompt.head.keys() == set(counterpart.tensors().values())
    attached = sb.attach(copy.deepcopy(fresh), prompt, engine="adapterhub")
    np.testing.assert_allclose(logits(attached, kind), reference, atol=1e-5)
    if (family, kind) == ("llama", "question_answering"):
        # The base model has another name in that class, under which AdapterHub does not find its own tensors.
        with pytest.raises(EngineError, match="does not find"):
            ENGINE.load(copy.deepcopy(fresh), prompt, tmp_path / "theirs")
    else:
        loaded = ENGINE.load(copy.deepcopy(fresh), prompt, tmp_path / "theirs")
        np.testing.assert_array_equal(logits(loaded, kind), logits(attached, kind))

    put(tmp_path / "ours", as_bytes(FORMAT.write(prompt, None)))
    if kind in heads.LANGUAGE_MODELS:
        return  # written for the transformers class
    # And back into a class of the package's own.
    flex.delete_adapter("mine")
    flex.delete_head("mine")
    flex.load_adapter(str(tmp_path / "ours"), set_active=True)
    np.testing.assert_array_equal(logits(flex.eval(), kind), reference)


def test_a_head_of_several_labels_for_a_text_is_a_classifier(tmp_path: Path) -> None:
    config = {
        "head_type": "multilabel_classification",
        "num_labels": LABELS,
        **heads.HEADS["bert"]["classification"].settings,
    }
    described = document("bert", "mine", config=config)
    prompt = FORMAT.read(put(tmp_path / "x", written("bert", head_for("bert", "mine"), described)), geometry_of("bert"))
    assert prompt.head.keys() == {"classifier.weight", "classifier.bias"}
    assert json.loads(FORMAT.write(prompt, None)[facts.HEAD_CONFIG_FILE]) == described
