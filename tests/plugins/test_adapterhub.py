"""AdapterHub's files with and without AdapterHub, and AdapterHub itself as an engine.

The first half needs no toolkit: files are made by hand. The second half compares with the package `adapters` and is
skipped where it is not installed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softbridge import untrusted
from softbridge.errors import BaseModelError, CheckpointError, EngineError, SoftbridgeError
from softbridge.geometry import Geometry, Site, StackGeometry
from softbridge.methods import MLP_TENSORS
from softbridge.prompt import Array, BaseId, InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import random_prefix, tiny_model
from softbridge.untrusted import Files
from softbridge_adapterhub import facts
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT, REPARAMETERISED

pytestmark = [
    # AdapterHub's T5 passes transformers an argument under its old name.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
    # transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

P = 5
STACK = StackGeometry(3, 4, 4, 8)
GEOMETRIES = {
    "gpt2": Geometry("gpt2", 32, 96, None, STACK),
    "llama": Geometry("llama", 32, 96, None, StackGeometry(3, 4, 2, 8)),
    "bert": Geometry("bert", 32, 96, STACK, None),
    "distilbert": Geometry("distilbert", 32, 96, STACK, None),
    "bart": Geometry("bart", 32, 96, StackGeometry(2, 4, 4, 8), STACK),
    "t5": Geometry("t5", 24, 96, StackGeometry(2, 4, 4, 8), StackGeometry(3, 4, 4, 8)),
}
ZERO = Positions({}, "skewed", "pinned")


def zero(prompt: SoftPrompt) -> SoftPrompt:
    """The prompt under AdapterHub's own policies."""
    return replace(prompt, positions=Positions(dict.fromkeys(prompt.positions.start, 0), "skewed", "pinned"))


def prefix_for(geometry: Geometry, sites: tuple[Site, ...] | None = None, **settings: Any) -> SoftPrompt:
    return zero(random_prefix(geometry, P, sites=sites or facts.model_sites(geometry), **settings))


def without(prompt: SoftPrompt, site: Site, *layers: int) -> SoftPrompt:
    return replace(
        prompt,
        parts=tuple(
            KeyValuePrefix(site, {n: pair for n, pair in part.layers.items() if n not in layers})
            if part.site == site
            else part
            for part in prompt.prefixes
        ),
    )


def put(folder: Path, files: Mapping[str, bytes]) -> Files:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Files(folder)


def document(geometry: Geometry, **config: Any) -> dict[str, Any]:
    return {
        "config": {**facts.DEFAULTS, "prefix_length": P, "bottleneck_size": 7, **config},
        "hidden_size": geometry.hidden,
        "model_class": "Model",
        "model_name": "org/model",
        "model_type": geometry.model_type,
        "name": "mine",
        "version": "adapters.x",
    }


def handmade(
    geometry: Geometry, flat: bool, dtype: type = np.float32, **config: Any
) -> tuple[dict[str, Any], dict[str, Array]]:
    """A file as AdapterHub writes it: the pool under the base model's name, and again under an attention module."""
    described = document(geometry, flat=flat, **config)
    generator = np.random.default_rng(5)
    kv_heads, head_dim = facts.toolkit_shape(geometry)
    tensors: dict[str, Array] = {}
    for site, layers in facts.sites_of(described["config"], geometry).items():
        width = len(layers) * 2 * kv_heads * head_dim
        sizes: dict[str, tuple[int, ...]] = {"control_trans": (P * width,)}
        if not flat:
            sizes = dict(
                zip(
                    REPARAMETERISED,
                    ((P, geometry.hidden), (7, geometry.hidden), (7,), (width, 7), (width,)),
                    strict=True,
                )
            )
        for name, size in sizes.items():
            key = f"prefix_tuning.prefix_tunings.mine.{facts.location(geometry.model_type, site)}.{name}"
            array = generator.normal(0, 0.7, size).astype(dtype)
            tensors[f"base.{key}"] = array
            tensors[f"base.layers.0.self_attn.{key.replace('prefix_tuning.', 'prefix_tuning.pool.', 1)}"] = array
    return described, tensors


def written(described: dict[str, Any], tensors: Mapping[str, Array]) -> dict[str, bytes]:
    return {
        facts.CONFIG_FILE: untrusted.json_bytes(described),
        facts.WEIGHTS_FILE: untrusted.pickle_bytes(tensors),
    }


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GEOMETRIES)
def test_config_of_is_the_inverse_of_sites_of(family: str) -> None:
    geometry = GEOMETRIES[family]
    total = sum(stack.layers for stack in (geometry.encoder, geometry.decoder) if stack is not None)
    seen = 0
    for left_out in range(2**total):
        config = {**facts.DEFAULTS, "leave_out": [layer for layer in range(total) if left_out >> layer & 1]}
        for flags in ({}, {"encoder_prefix": False}, {"cross_prefix": False}):
            layers = facts.sites_of({**config, **flags}, geometry)
            if layers:
                assert facts.sites_of({**facts.DEFAULTS, **facts.config_of(layers, geometry)}, geometry) == layers
                seen += 1
    assert seen >= 3 * (2**total - 4)


def test_left_out_layers_of_two_stacks_are_counted_in_one_index() -> None:
    layers = facts.sites_of({**facts.DEFAULTS, "leave_out": [1, 2]}, GEOMETRIES["bart"])
    assert layers == {"encoder": (0,), "self": (1, 2), "cross": (1, 2)}


# --- the format, without the toolkit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["pickle", "safetensors"])
@pytest.mark.parametrize("family", GEOMETRIES)
def test_reads_a_flat_prefix(family: str, container: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    described, tensors = handmade(geometry, flat=True)
    files = written(described, tensors)
    if container == "safetensors":
        del files[facts.WEIGHTS_FILE]
        files[facts.SAFE_WEIGHTS_FILE] = untrusted.safetensors_bytes(tensors)
    opened = put(tmp_path / "x", files)
    assert FORMAT.sniff(opened)
    prompt = FORMAT.read(opened, geometry)

    assert tuple(part.site for part in prompt.prefixes) == facts.model_sites(geometry)
    for part in prompt.prefixes:
        key = f"base.prefix_tuning.prefix_tunings.mine.{facts.location(family, part.site)}.control_trans"
        kv_heads, head_dim = facts.toolkit_shape(geometry)
        by_hand = tensors[key].reshape(P, len(part.layers), 2, kv_heads, head_dim)
        np.testing.assert_array_equal(part.layers[1].values[1, 3], by_hand[3, 1, 1, 1])
        np.testing.assert_array_equal(part.layers[1].keys[1, 3], by_hand[3, 1, 0, 1])
    stacks = {"encoder"} if geometry.decoder is None else {"decoder"}
    stacks |= {"encoder"} if geometry.encoder is not None else set()
    assert prompt.positions == Positions(dict.fromkeys(stacks, 0), "skewed", "pinned")  # type: ignore[arg-type]
    assert prompt.base == BaseId("org/model", geometry)
    assert prompt.origin is not None
    assert set(prompt.origin.digests) == set(files)
    assert prompt.origin.details["notes"] == []


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", GEOMETRIES)
def test_what_was_read_is_written_and_read_again(family: str, flat: bool, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    settings = {} if family == "t5" else {"leave_out": [1]}
    described, tensors = handmade(geometry, flat, dropout=0.1, init_weights_seed=4, **settings)
    prompt = FORMAT.read(put(tmp_path / "x", written(described, tensors)), geometry)
    assert (prompt.training is None) == flat
    assert not FORMAT.obstacles(prompt, None)
    files = FORMAT.write(prompt, None)
    again = FORMAT.read(put(tmp_path / "y", files), geometry)
    assert again == prompt
    assert json.loads(files[facts.CONFIG_FILE]) == described
    assert FORMAT.write(again, geometry) == files


@pytest.mark.parametrize("family", GEOMETRIES)
def test_what_is_written_is_read(family: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    prompt = prefix_for(geometry)
    if family == "bart":
        prompt = without(without(without(prompt, "encoder", 1), "self", 0, 2), "cross", 0, 2)
    assert not FORMAT.obstacles(prompt, geometry)
    assert FORMAT.read(put(tmp_path / "x", FORMAT.write(prompt, geometry)), geometry) == prompt


def test_a_prefix_on_the_decoder_alone(tmp_path: Path) -> None:
    geometry = GEOMETRIES["t5"]
    prompt = prefix_for(geometry, ("self",))
    files = FORMAT.write(prompt, geometry)
    config = json.loads(files[facts.CONFIG_FILE])["config"]
    assert (config["encoder_prefix"], config["cross_prefix"], config["leave_out"]) == (False, False, [])
    assert FORMAT.read(put(tmp_path / "x", files), geometry) == prompt


def test_an_ejected_file_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    geometry = GEOMETRIES["gpt2"]
    described, tensors = handmade(geometry, flat=True)
    prompt = FORMAT.read(put(tmp_path / "flat", written(described, tensors)), geometry)
    described["config"]["flat"] = False
    ejected = FORMAT.read(put(tmp_path / "ejected", written(described, tensors)), geometry)
    assert ejected == prompt
    assert ejected.origin is not None
    assert "flat: false" in ejected.origin.details["notes"][0]
    assert json.loads(FORMAT.write(ejected, None)[facts.CONFIG_FILE])["config"]["flat"] is True


def test_a_head_that_is_not_read_is_named(tmp_path: Path) -> None:
    files = written(*handmade(GEOMETRIES["bert"], flat=True))
    prompt = FORMAT.read(put(tmp_path / "x", {**files, "pytorch_model_head.bin": b"?"}), GEOMETRIES["bert"])
    assert prompt.origin is not None
    assert "pytorch_model_head.bin" in prompt.origin.details["notes"][0]


def test_old_files_have_old_names_of_activations(tmp_path: Path) -> None:
    described, tensors = handmade(GEOMETRIES["gpt2"], flat=False, non_linearity="gelu")
    now = FORMAT.read(put(tmp_path / "x", written(described, tensors)), GEOMETRIES["gpt2"])
    del described["version"]
    old = FORMAT.read(put(tmp_path / "y", written(described, tensors)), GEOMETRIES["gpt2"])
    assert now.training is not None
    assert old.training is not None
    assert (now.training.settings["non_linearity"], old.training.settings["non_linearity"]) == ("gelu", "gelu_new")
    assert np.abs(now.prefixes[0].flat() - old.prefixes[0].flat()).max() > 1e-4
    # Written again it has a version, and so the new name.
    assert FORMAT.read(put(tmp_path / "z", FORMAT.write(old, None)), GEOMETRIES["gpt2"]) == old


Change = Callable[[dict[str, Any], dict[str, Array]], Any]
KEY = "base.prefix_tuning.prefix_tunings.mine.self_prefix.control_trans"
COPY = "base.layers.0.self_attn.prefix_tuning.pool.prefix_tunings.mine.self_prefix.control_trans"


@pytest.mark.parametrize(
    ("flat", "change", "error", "message"),
    [
        (True, lambda d, t: d.pop("config"), CheckpointError, "no object 'config'"),
        (True, lambda d, t: d.update(name=3), CheckpointError, "'name' is 3"),
        (True, lambda d, t: d.pop("model_type"), CheckpointError, "'model_type' is None"),
        (True, lambda d, t: d["config"].update(architecture="lora"), CheckpointError, "architecture 'lora'"),
        (True, lambda d, t: d["config"].update(architecture="prompt_tuning"), CheckpointError, "'prompt_tuning'"),
        (
            True,
            lambda d, t: d.update(config={"architecture": "union", "configs": [{"architecture": "parallel"}]}),
            CheckpointError,
            "'union' of 'parallel'",
        ),
        (True, lambda d, t: d["config"].update(use_gating=True), CheckpointError, "not read yet"),
        (True, lambda d, t: d["config"].update(surprise=1), CheckpointError, "unknown fields surprise"),
        (True, lambda d, t: d["config"].update(prefix_length=0), CheckpointError, "'prefix_length' is 0"),
        (True, lambda d, t: d["config"].update(prefix_length=True), CheckpointError, "'prefix_length' is True"),
        (True, lambda d, t: d["config"].update(flat="no"), CheckpointError, "'flat' is 'no'"),
        (True, lambda d, t: d["config"].update(dropout=1.0), CheckpointError, "'dropout' is 1.0"),
        (True, lambda d, t: d["config"].update(leave_out=[-1]), CheckpointError, r"'leave_out' is \[-1\]"),
        (True, lambda d, t: d["config"].update(leave_out=[0, 1, 2]), CheckpointError, "unexpected self_prefix"),
        (False, lambda d, t: d["config"].update(non_linearity="system"), CheckpointError, "'system'"),
        (True, lambda d, t: d["config"].update(prefix_length=6), CheckpointError, r"shape \[960\]\n.*\[1152\]"),
        (False, lambda d, t: d["config"].update(bottleneck_size=8), CheckpointError, r"shape \[7.*\]\n.*\[8"),
        (True, lambda d, t: t.pop(KEY) is t.pop(COPY), CheckpointError, "missing self_prefix.control_trans.0.bias"),
        (
            True,
            lambda d, t: t.update({KEY.replace("self_p", "cross_p"): t[KEY]}),
            CheckpointError,
            "unexpected cross_prefix.control_trans",
        ),
        (True, lambda d, t: t.update({KEY.replace("mine", "yours"): t[KEY]}), CheckpointError, "no part of .*yours"),
        (True, lambda d, t: t.update({"head.weight": t[KEY]}), CheckpointError, "no part of .*head.weight"),
        (True, lambda d, t: t.update({COPY: t[KEY][::-1]}), CheckpointError, "differ from the first: base"),
        (True, lambda d, t: t.update({k: t[k].astype(np.int64) for k in t}), CheckpointError, "int64"),
        (True, lambda d, t: d.update(hidden_size=64), BaseModelError, "hidden size 32"),
        (True, lambda d, t: d.update(model_type="llama"), BaseModelError, "type 'gpt2'"),
    ],
)
def test_refuses_a_file_that_is_not_whole(
    flat: bool, change: Change, error: type[SoftbridgeError], message: str, tmp_path: Path
) -> None:
    described, tensors = handmade(GEOMETRIES["gpt2"], flat)
    change(described, tensors)
    files = put(tmp_path / "x", written(described, tensors))
    with pytest.raises(error, match=rf"(?s){message}"):
        FORMAT.read(files, GEOMETRIES["gpt2"])


def test_refuses_what_cannot_be_read_for_this_base(tmp_path: Path) -> None:
    files = put(tmp_path / "x", written(*handmade(GEOMETRIES["t5"], flat=True, leave_out=[0])))
    with pytest.raises(CheckpointError, match=r"leaves out layers \[0\]"):
        FORMAT.read(files, GEOMETRIES["t5"])
    with pytest.raises(BaseModelError, match="--base"):
        FORMAT.read(files, None)
    vit = replace(GEOMETRIES["bert"], model_type="vit")
    with pytest.raises(CheckpointError, match="a vision model"):
        FORMAT.read(put(tmp_path / "y", written(*handmade(vit, flat=True))), vit)
    (tmp_path / "x" / facts.WEIGHTS_FILE).unlink()
    assert not FORMAT.sniff(Files(tmp_path / "x"))
    with pytest.raises(CheckpointError, match="neither"):
        FORMAT.read(Files(tmp_path / "x"), GEOMETRIES["t5"])


def _longer(prompt: SoftPrompt) -> SoftPrompt:
    first, *others = prompt.prefixes
    pairs = {n: KeyValue(pair.keys[:, :-1], pair.values[:, :-1]) for n, pair in first.layers.items()}
    return replace(prompt, parts=(KeyValuePrefix(first.site, pairs), *others))


def moved(prompt: SoftPrompt, start: int, bias: str) -> SoftPrompt:
    """The tokens of every stack at `start`, under a policy for the bias."""
    starts = dict.fromkeys(prompt.positions.start, start)
    return replace(prompt, positions=Positions(starts, bias, "pinned"))  # type: ignore[arg-type]


def at_encoder(prompt: SoftPrompt, part: KeyValuePrefix | InputPrompt) -> SoftPrompt:
    """One part in the encoder instead of all."""
    return replace(prompt, parts=(part,), positions=Positions({"encoder": 0}, "skewed", "pinned"))


def _ragged(prompt: SoftPrompt) -> SoftPrompt:
    part = prompt.prefixes[0]
    pair = KeyValue(part.layers[1].keys[..., :4], part.layers[1].values[..., :4])
    return replace(prompt, parts=(KeyValuePrefix(part.site, {**part.layers, 1: pair}),))


@pytest.mark.parametrize(
    ("geometry", "change", "name"),
    [
        (replace(GEOMETRIES["llama"], model_type="qwen2"), lambda p: p, "model"),
        (replace(GEOMETRIES["bert"], model_type="albert"), lambda p: p, "model"),
        (replace(GEOMETRIES["llama"], decoder=StackGeometry(3, 4, 2, 12)), lambda p: p, "shape"),
        (GEOMETRIES["gpt2"], _ragged, "shape"),
        (GEOMETRIES["bart"], _longer, "length"),
        (GEOMETRIES["bart"], lambda p: without(p, "cross", 1), "layers"),
        (GEOMETRIES["bart"], lambda p: replace(p, parts=p.parts[2:], positions=Positions({})), "layers"),
        (GEOMETRIES["t5"], lambda p: without(p, "encoder", 1), "layers"),
        (GEOMETRIES["gpt2"], lambda p: at_encoder(p, KeyValuePrefix("encoder", p.parts[0].layers)), "sites"),
        (GEOMETRIES["gpt2"], lambda p: replace(p, parts=(InputPrompt(np.ones((2, 32)), "decoder"),)), "input-prompt"),
        (GEOMETRIES["t5"], lambda p: moved(p, P, "skewed"), "relative-bias"),
        (GEOMETRIES["t5"], lambda p: moved(p, 0, "plain"), "relative-bias"),
        (GEOMETRIES["bart"], lambda p: moved(p, P, "skewed"), "positions"),
    ],
)
def test_obstacles(geometry: Geometry, change: Callable[[SoftPrompt], SoftPrompt], name: str) -> None:
    prompt = change(prefix_for(geometry))
    assert name in {obstacle.name for obstacle in FORMAT.obstacles(prompt, geometry)}


def test_obstacles_of_a_prompt_without_a_base_or_with_another_perceptron(tmp_path: Path) -> None:
    prompt = prefix_for(GEOMETRIES["gpt2"])
    assert [o.name for o in FORMAT.obstacles(replace(prompt, base=BaseId()), None)] == ["base"]
    with pytest.raises(BaseModelError):
        FORMAT.write(replace(prompt, base=BaseId()), None)
    read = FORMAT.read(put(tmp_path / "x", written(*handmade(GEOMETRIES["gpt2"], flat=False))), GEOMETRIES["gpt2"])
    assert read.training is not None
    for wrong in (
        {name: array for name, array in read.training.tensors.items() if name != f"self.{MLP_TENSORS[0]}"},
        {**read.training.tensors, "self.embedding": np.ones((P, 16), np.float32)},
    ):
        changed = replace(read, training=replace(read.training, tensors=wrong))
        assert [o.name for o in FORMAT.obstacles(changed, None)] == ["training"]


def test_the_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, softbridge_adapterhub as plugin;"
        "plugin.softbridge_formats(); plugin.softbridge_engines()[0].unavailable();"
        "print([name for name in ('torch', 'transformers', 'adapters') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_an_engine_without_its_toolkit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "adapters", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"the extra 'adapterhub'"):
        ENGINE.attach(object(), prefix_for(GEOMETRIES["gpt2"]))


# --- with the toolkit ------------------------------------------------------------------------------------------------

FAMILIES = ("gpt2", "llama", "bert", "t5")
_FLAT_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
_ENCODER = {**_FLAT_SIZES, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 5}
_SEQ2SEQ = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
#: Every family that the plugin supports and `softbridge.testing` has no configuration of.
OTHERS: dict[str, dict[str, Any]] = {
    "bart": _SEQ2SEQ,
    "mbart": _SEQ2SEQ,
    "plbart": _SEQ2SEQ,
    "mt5": {
        "vocab_size": 96,
        "d_model": 24,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
        "num_decoder_layers": 3,
    }
    | {"decoder_start_token_id": 0, "pad_token_id": 0},
    "bert-generation": {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2},
    "deberta-v2": _ENCODER,
    "distilbert": {"vocab_size": 96, "dim": 32, "hidden_dim": 40, "n_layers": 3, "n_heads": 4, "pad_token_id": 0}
    | {"max_position_embeddings": 64, "num_labels": 5},
    "electra": {**_ENCODER, "embedding_size": 16},
    "gptj": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**_ENCODER, "num_key_value_heads": 2, "sliding_window": 3},
    "roberta": {**_ENCODER, "pad_token_id": 1},
    "xlm-roberta": {**_ENCODER, "pad_token_id": 1},
    "xmod": {**_ENCODER, "pad_token_id": 1, "languages": ["en_XX"], "default_language": "en_XX"},
}


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def model_of(family: str, dtype: Any = None) -> Any:
    import torch
    from transformers import AutoConfig

    from softbridge.base import BaseModel, build

    if family in FAMILIES:
        return tiny_model(family, dtype)
    config = AutoConfig.for_model(family, **OTHERS[family])
    return build(config, BaseModel(config).task, dtype or torch.float64, 0)


def inputs_of(model: Any, rows: int = 1) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 90, (rows, 7), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (rows, 6), generator=generator)
    return inputs


def logits(model: Any, **further: Any) -> Array:
    import torch

    with torch.no_grad():
        return np.asarray(model(**inputs_of(model), **further).logits.double().numpy())


def difference(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max())


def trained(model: Any, method: str, folder: Path) -> Files:
    """A file that the toolkit trained and wrote."""
    ENGINE.train_example(copy.deepcopy(model), method, folder, length=P, steps=3, seed=1)
    return Files(folder)


def loaded(adapters: Any, model: Any, folder: Path) -> Any:
    """A fresh model that the toolkit itself loaded a file into."""
    model = copy.deepcopy(model)
    adapters.init(model)
    found: dict[str, list[str]] = {}
    model.load_adapter(str(folder), set_active=True, loading_info=found)
    assert not found["unexpected_keys"]
    # Only the copies under the attention modules, which are the same objects.
    assert all(".pool." in key for key in found["missing_keys"])
    return model.eval()


def geometry_of(model: Any) -> Geometry:
    from softbridge.geometry import read_geometry

    return read_geometry(model.config)


def changed(prompt: SoftPrompt, change: Callable[[KeyValue], KeyValue]) -> SoftPrompt:
    parts = tuple(
        KeyValuePrefix(part.site, {n: change(pair) for n, pair in part.layers.items()}) for part in prompt.prefixes
    )
    return replace(prompt, parts=parts, training=None)


def test_the_tables_are_those_of_the_installed_package(adapters: Any) -> None:
    from adapters.configuration import PrefixTuningConfig
    from adapters.loading import ACTIVATION_RENAME

    assert PrefixTuningConfig().to_dict() == facts.DEFAULTS
    assert ACTIVATION_RENAME == facts.UNVERSIONED_ACTIVATIONS
    folders = {path.name for path in (Path(adapters.__file__).parent / "models").iterdir() if path.is_dir()}
    supported = {name.replace("_", "-") for name in folders - {"auto", "__pycache__"}}
    assert supported == facts.MODEL_TYPES | facts.OTHER_MODEL_TYPES.keys()
    assert set(FAMILIES) | OTHERS.keys() == facts.MODEL_TYPES


@pytest.mark.parametrize("method", ["prefix-tuning", "prefix-tuning-flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_the_toolkit_there_and_back(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    files = trained(model, method, tmp_path / "theirs")
    reference = logits(loaded(adapters, model, tmp_path / "theirs"))
    assert difference(reference, logits(model)) > 0.5

    prompt = FORMAT.read(files, geometry)
    assert (prompt.training is None) == (method == "prefix-tuning-flat")
    assert set(prompt.positions.start.values()) == {0}
    written_again = put(tmp_path / "ours", FORMAT.write(prompt, geometry))
    assert difference(logits(loaded(adapters, model, tmp_path / "ours")), reference) == 0
    assert FORMAT.read(written_again, geometry) == prompt

    assert difference(logits(ENGINE.attach(copy.deepcopy(model), prompt)), reference) == 0
    ejected = put(tmp_path / "ejected", FORMAT.write(replace(prompt, training=None), geometry))
    assert difference(logits(loaded(adapters, model, tmp_path / "ejected")), reference) == 0
    assert FORMAT.read(ejected, geometry).parts == prompt.parts


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_twins(family: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    prompt = FORMAT.read(trained(model, "prefix-tuning", tmp_path / "x"), geometry_of(model))
    reference = logits(ENGINE.attach(copy.deepcopy(model), prompt))
    swapped = changed(prompt, lambda pair: KeyValue(pair.values, pair.keys))
    reordered = changed(prompt, lambda pair: KeyValue(pair.keys, pair.values[:, ::-1]))
    for wrong in (swapped, reordered):
        assert difference(logits(ENGINE.attach(copy.deepcopy(model), wrong)), reference) > 0.1
    if family != "t5":
        stack = next(iter(prompt.positions.start))
        moved = replace(prompt, positions=replace(prompt.positions, start={stack: 1}))
        assert difference(logits(ENGINE.attach(copy.deepcopy(model), moved)), reference) > 0.1


@pytest.mark.parametrize("family", sorted(facts.MODEL_TYPES))
def test_every_family(family: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    before = logits(model)
    prompt = prefix_for(geometry)
    put(tmp_path / "x", FORMAT.write(prompt, geometry))
    reference = logits(loaded(adapters, model, tmp_path / "x"))
    assert difference(reference, before) > 0.1
    running = ENGINE.attach(model, prompt)
    assert difference(logits(running), reference) == 0
    extracted = ENGINE.extract(running)
    assert changed(extracted, _single).parts == prompt.parts
    assert (extracted.positions, extracted.base) == (prompt.positions, prompt.base)
    assert difference(logits(ENGINE.detach(running)), before) == 0


def _single(pair: KeyValue) -> KeyValue:
    return KeyValue(pair.keys.astype(np.float32), pair.values.astype(np.float32))


@pytest.mark.parametrize("family", sorted(facts.POSITION_INPUTS))
def test_tokens_are_moved_to_where_the_prompt_counts_them(family: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    model = model_of(family)
    prompt = prefix_for(geometry_of(model))
    put(tmp_path / "x", FORMAT.write(prompt, None))
    stack = next(iter(prompt.positions.start))
    counted = replace(prompt, positions=replace(prompt.positions, start={stack: P}))
    unmoved = logits(loaded(adapters, model, tmp_path / "x"))
    moved = logits(ENGINE.attach(copy.deepcopy(model), counted))
    assert difference(moved, unmoved) > 0.1
    if family == "distilbert":
        return  # its forward takes no positions to compare with
    first = model.config.pad_token_id + 1 if family in ("roberta", "xlm-roberta", "xmod") else 0
    by_hand = logits(loaded(adapters, model, tmp_path / "x"), position_ids=torch.arange(7)[None] + first + P)
    assert difference(moved, by_hand) == 0


@pytest.mark.parametrize(
    ("family", "start"), [("gpt2", 0), ("gpt2", P), ("gptj", P), ("llama", P), ("mistral", 0), ("t5", 0)]
)
def test_greedy_decoding_is_that_of_whole_forward_passes(family: str, start: int, adapters: Any) -> None:
    import torch

    model = model_of(family)
    prompt = prefix_for(geometry_of(model))
    if start:
        prompt = replace(prompt, positions=replace(prompt.positions, start={"decoder": start}))
    running = ENGINE.attach(model, prompt)
    inputs = inputs_of(model)
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    tokens = inputs[name]
    if family == "t5":
        tokens[:, 0] = running.config.decoder_start_token_id
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        generated = running.generate(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), **settings)
        for _ in range(6):
            best = running(**{**inputs, name: tokens}).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
    assert generated.tolist() == tokens.tolist()
    assert running.config.use_cache == (family in ("gpt2", "gptj", "t5"))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_layers_may_be_left_out(family: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    whole = prefix_for(geometry)
    prompt = without(whole, whole.prefixes[0].site, 1)
    put(tmp_path / "x", FORMAT.write(prompt, geometry))
    reference = logits(loaded(adapters, model, tmp_path / "x"))
    assert difference(logits(ENGINE.attach(copy.deepcopy(model), prompt)), reference) == 0
    assert difference(logits(ENGINE.attach(copy.deepcopy(model), whole)), reference) > 0.1
    first = without(whole, whole.prefixes[0].site, 2)
    assert difference(logits(ENGINE.attach(copy.deepcopy(model), first)), reference) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "distilbert", "roberta", "bart"])
def test_a_model_under_another_attention_runs_eager(family: str, adapters: Any) -> None:
    import torch

    eager = model_of(family)
    prompt = prefix_for(geometry_of(eager))
    config = copy.deepcopy(eager.config)
    config._attn_implementation = "sdpa"
    model = type(eager)(config).to(torch.float64).eval()
    model.load_state_dict(eager.state_dict())
    before = logits(model)
    inside = [type(module) for module in model.modules()]
    ENGINE.attach(model, prompt)
    assert difference(logits(model), logits(ENGINE.attach(eager, prompt))) == 0
    ENGINE.detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert [type(module) for module in model.modules()] == inside
    assert difference(logits(model), before) == 0


def test_detach_gives_everything_back(adapters: Any) -> None:
    model = model_of("llama")
    model.generation_config.use_cache = True
    model.lm_head.weight.requires_grad_(False)
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))

    def state() -> list[Any]:
        return [
            [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
            [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
            model.config.to_dict(),
            model.generation_config.to_dict(),
            sorted(vars(model)),
        ]

    before, outputs = state(), logits(model)
    running = ENGINE.attach(model, prefix_for(geometry_of(model)))
    assert running is model
    running.train_adapter("softbridge")
    assert not running.config.use_cache
    assert state() != before
    assert ENGINE.detach(running) is model
    assert state() == before
    assert difference(logits(model), outputs) == 0
    handle.remove()
    calls.clear()
    logits(model)
    assert not calls
    with pytest.raises(EngineError, match="no prompt is attached"):
        ENGINE.detach(model)


def test_training_is_extracted_and_touches_the_prefix_only(adapters: Any) -> None:
    import torch

    model = model_of("bert", torch.float32)
    prompt = prefix_for(geometry_of(model))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    running = ENGINE.attach(model, prompt)
    assert ENGINE.extract(running) == prompt
    running.train_adapter("softbridge")
    parameters = [parameter for parameter in running.bert.parameters() if parameter.requires_grad]
    assert [parameter.shape for parameter in parameters] == [(prompt.prefixes[0].flat().size,)]
    running(**inputs_of(model), labels=torch.tensor([1])).loss.backward()
    torch.optim.SGD(parameters, lr=1.0).step()
    extracted = ENGINE.extract(running)
    assert difference(extracted.prefixes[0].flat(), prompt.prefixes[0].flat()) > 1e-4
    ENGINE.detach(running)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["prefix-tuning", "prefix-tuning-flat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_by_the_toolkit_is_attached_by_us(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    prompt = FORMAT.read(trained(model, method, tmp_path / "theirs"), geometry)
    expected = logits(ENGINE.attach(copy.deepcopy(model), prompt))
    running = ENGINE.load(copy.deepcopy(model).train(), prompt, tmp_path / "theirs")
    assert not any(module.training for module in running.modules())
    assert difference(logits(running), expected) == 0
    assert difference(logits(loaded(adapters, model, tmp_path / "theirs")), expected) == 0
    if geometry.decoder is not None:
        assert running.config.use_cache == (family in ("gpt2", "t5"))

    # The file counts, not the prompt; flat for the swap, since a perceptron says nothing of keys and values.
    swapped = changed(prompt, lambda pair: KeyValue(pair.values, pair.keys))
    for encoding in FORMAT.encodings:
        put(tmp_path / encoding, FORMAT.write(swapped, geometry, encoding))
        found = logits(ENGINE.load(copy.deepcopy(model), prompt, tmp_path / encoding))
        assert difference(found, logits(ENGINE.attach(copy.deepcopy(model), swapped))) == 0
        assert difference(found, expected) > 0.1
    assert (tmp_path / "safetensors" / facts.SAFE_WEIGHTS_FILE).is_file()
    assert not (tmp_path / "safetensors" / facts.WEIGHTS_FILE).exists()


@pytest.mark.parametrize("family", sorted(facts.MODEL_TYPES))
def test_loaded_tokens_stand_where_they_are_told(family: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    prompt = prefix_for(geometry)
    put(tmp_path / "x", FORMAT.write(prompt, geometry))
    plain = logits(ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "x"))
    assert difference(plain, logits(ENGINE.attach(copy.deepcopy(model), prompt))) == 0
    if family in facts.POSITION_INPUTS:
        told = replace(prompt, positions=replace(prompt.positions, start=dict.fromkeys(prompt.positions.start, P)))
        moved = logits(ENGINE.load(copy.deepcopy(model), told, tmp_path / "x"))
        assert difference(moved, logits(ENGINE.attach(copy.deepcopy(model), told))) == 0
        assert difference(moved, plain) > 0.1


@pytest.mark.parametrize("method", ["prefix-tuning", "prefix-tuning-flat"])
def test_loaded_runs_eager_and_in_the_models_precision(method: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("llama", dtype)
        prompt = FORMAT.read(trained(model_of("llama"), method, tmp_path / str(dtype)), geometry_of(model))
        expected = logits(ENGINE.attach(copy.deepcopy(model), prompt))
        model.set_attn_implementation("sdpa")
        running = ENGINE.load(model, prompt, tmp_path / str(dtype))
        assert running.config._attn_implementation == "eager"
        assert running(**inputs_of(model)).logits.dtype == dtype
        assert difference(logits(running), expected) == 0


def test_loading_on_a_model_without_a_head_or_with_a_head_in_the_file(adapters: Any, tmp_path: Path) -> None:
    import torch

    model = model_of("bert")
    prompt = prefix_for(geometry_of(model))
    other = ENGINE.attach(model_of("bert"), prompt)
    with torch.no_grad():
        other.classifier.bias += 1
        expected = other.bert(**inputs_of(model)).last_hidden_state
    other.save_adapter(str(tmp_path / "x"), "softbridge", with_head=True)
    assert (
        "the prediction head is not read"
        in FORMAT.read(Files(tmp_path / "x"), geometry_of(model)).origin.details["notes"][0]
    )
    running = ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "x")
    assert torch.equal(running.classifier.bias, model.classifier.bias)
    with torch.no_grad():
        assert torch.equal(
            ENGINE.load(model.bert, prompt, tmp_path / "x")(**inputs_of(model)).last_hidden_state, expected
        )


def test_loading_is_refused_by_name(adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    geometry = geometry_of(model)
    prompt = prefix_for(geometry)
    with pytest.raises(EngineError, match="no weights"):
        ENGINE.load(copy.deepcopy(model), prompt, tmp_path)
    described, tensors = handmade(geometry, flat=True)
    described["version"] = "adapters.1.3.1"
    renamed = {name.replace("self_prefix", "other_prefix"): array for name, array in tensors.items()}
    put(tmp_path / "x", written(described, renamed))
    with pytest.raises(EngineError, match=r"does not find .*self_prefix"):
        ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "x")
    with pytest.raises(EngineError, match=r"\[sites\]"):
        ENGINE.load(model_of("bert"), prompt, tmp_path / "x")
    monkeypatch.setattr(type(ENGINE), "unavailable", lambda self: "AdapterHub is not installed")
    with pytest.raises(EngineError, match="not installed"):
        ENGINE.load(model, prompt, tmp_path / "x")


def test_a_model_of_another_precision(adapters: Any) -> None:
    import torch

    model = model_of("llama", torch.bfloat16)
    running = ENGINE.attach(model, prefix_for(geometry_of(model)))
    assert np.isfinite(logits(running)).all()
    assert str(ENGINE.extract(running).prefixes[0].layers[0].keys.dtype) == "bfloat16"


def test_refusals(adapters: Any, tmp_path: Path) -> None:
    model = model_of("t5")
    geometry = geometry_of(model)
    prompt = prefix_for(geometry)
    classes = [type(module) for module in model.modules()]
    for wrong, message in [
        (replace(prompt, positions=Positions({"encoder": P, "decoder": P})), "relative-bias"),
        (without(prompt, "encoder", 0), "layers"),
        (at_encoder(prompt, InputPrompt(np.ones((2, 24)), "encoder")), "input-prompt"),
        (changed(prompt, lambda pair: KeyValue(pair.keys[..., :4], pair.values[..., :4])), "shape"),
    ]:
        with pytest.raises(EngineError, match=rf"\[{message}\]"):
            ENGINE.attach(model, wrong)
    assert [type(module) for module in model.modules()] == classes
    ENGINE.attach(model, prompt)
    with pytest.raises(EngineError, match="attached"):
        ENGINE.attach(model, prompt)

    mistral = model_of("mistral")
    sliding = replace(prefix_for(geometry_of(mistral)), positions=Positions({"decoder": 0}, "plain", "slides"))
    assert [obstacle.name for obstacle in ENGINE.obstacles(sliding, mistral)] == ["window"]

    with pytest.raises(EngineError, match="'prompt-tuning'"):
        ENGINE.train_example(model_of("gpt2"), "prompt-tuning", tmp_path, length=P, steps=1, seed=0)
    with pytest.raises(EngineError, match="type 'qwen3'"):
        ENGINE.train_example(tiny_model("qwen3"), "prefix-tuning", tmp_path, length=P, steps=1, seed=0)
    qwen = tiny_model("qwen3")
    assert [o.name for o in ENGINE.obstacles(prefix_for(geometry_of(qwen)), qwen)] == ["model"]
