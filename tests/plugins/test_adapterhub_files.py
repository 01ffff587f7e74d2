"""AdapterHub's files without AdapterHub: made by hand, read, written, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softbridge import untrusted
from softbridge.arrays import Array, same_array
from softbridge.errors import BaseModelError, CheckpointError, EngineError, SoftbridgeError
from softbridge.geometry import Geometry, Site, Stack, StackGeometry
from softbridge.methods import MLP_TENSORS, rematerialise
from softbridge.prompt import BaseId, Gate, InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import as_bytes, random_prefix
from softbridge.untrusted import Files
from softbridge_adapterhub import facts
from softbridge_adapterhub.adapter import REPARAMETERISED
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

P = 5
SAFE_WEIGHTS_FILE = "adapter.safetensors"
STACK = StackGeometry(3, 4, 4, 8)
GEOMETRIES = {
    "gpt2": Geometry("gpt2", 32, 96, None, STACK),
    "llama": Geometry("llama", 32, 96, None, StackGeometry(3, 4, 2, 8)),
    "bert": Geometry("bert", 32, 96, STACK, None),
    "distilbert": Geometry("distilbert", 32, 96, STACK, None),
    "bart": Geometry("bart", 32, 96, StackGeometry(2, 4, 4, 8), STACK),
    "t5": Geometry("t5", 24, 96, StackGeometry(2, 4, 4, 8), StackGeometry(3, 4, 4, 8)),
    "albert": Geometry("albert", 32, 96, STACK, None, 16),
}
#: Family -> where the attention of a layer is, by site.
ATTENTIONS = {
    "gpt2": {"self": "h.{}.attn"},
    "llama": {"self": "layers.{}.self_attn"},
    "bert": {"encoder": "encoder.layer.{}.attention.self"},
    "distilbert": {"encoder": "transformer.layer.{}.attention"},
    "bart": {
        "encoder": "encoder.layers.{}.self_attn",
        "self": "decoder.layers.{}.self_attn",
        "cross": "decoder.layers.{}.encoder_attn",
    },
    "t5": {
        "encoder": "encoder.block.{}.layer.0.SelfAttention",
        "self": "decoder.block.{}.layer.0.SelfAttention",
        "cross": "decoder.block.{}.layer.1.EncDecAttention",
    },
    "albert": {"encoder": "encoder.albert_layer_groups.0.albert_layers.0.attention"},
}
PREFIX = facts.DEFAULTS[facts.PREFIX]


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


def described(geometry: Geometry, *configs: Mapping[str, Any]) -> dict[str, Any]:
    """What AdapterHub writes of an adapter."""
    return {
        "config": dict(configs[0]) if len(configs) == 1 else {"architecture": "union", "configs": list(configs)},
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
    family, hidden = geometry.model_type, geometry.hidden
    config = {**PREFIX, "prefix_length": P, "bottleneck_size": 7, "flat": flat, **config}
    generator = np.random.default_rng(5)
    kv_heads, head_dim = facts.toolkit_shape(geometry)
    tensors: dict[str, Array] = {}

    def put_in(key: str, *shape: int) -> None:
        tensors[f"base.{key}"] = generator.normal(0, 0.7, shape).astype(dtype)

    for site, layers in facts.sites_of(config, geometry).items():
        stored = layers[:1] if family == "albert" else layers
        width = len(stored) * 2 * kv_heads * head_dim
        sizes: dict[str, tuple[int, ...]] = {"control_trans": (P * width,)}
        if not flat:
            shapes = ((P, hidden), (7, hidden), (7,), (width, 7), (width,))
            sizes = dict(zip(REPARAMETERISED, shapes, strict=True))
        for name, size in sizes.items():
            key = f"prefix_tuning.prefix_tunings.mine.{facts.location(family, site)}.{name}"
            put_in(key, *size)
            copied = f"base.layers.0.self_attn.{key.replace('prefix_tuning.', 'prefix_tuning.pool.', 1)}"
            tensors[copied] = tensors[f"base.{key}"]
        for layer in stored if config["use_gating"] else ():
            gate = f"{ATTENTIONS[family][site].format(layer)}.prefix_tuning.prefix_gates.mine"
            outputs = 1 if config["shared_gating"] else 2
            put_in(f"{gate}.weight", outputs, hidden)
            put_in(f"{gate}.bias", outputs)
    return described(geometry, config), tensors


def vectors_for(geometry: Geometry, **config: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """A file of prompt tuning."""
    config = {**facts.DEFAULTS[facts.PROMPT], "prompt_length": 4, **config}
    vectors = np.random.default_rng(6).normal(0, 0.7, (4, geometry.input_width)).astype(np.float32)
    return described(geometry, config), {"base.prompt_tuning.prompt_tunings.mine.prompt_embedding.weight": vectors}


def both(geometry: Geometry, flat: bool, prompt_first: bool = False, **config: Any) -> tuple[Any, dict[str, Array]]:
    """A file of both."""
    (prefix, tensors), (prompt, vectors) = handmade(geometry, flat, **config), vectors_for(geometry)
    configs = [prefix["config"], prompt["config"]]
    return described(geometry, *(configs[::-1] if prompt_first else configs)), {**tensors, **vectors}


def written(document: dict[str, Any], tensors: Mapping[str, Array]) -> dict[str, bytes]:
    return {
        facts.CONFIG_FILE: untrusted.json_bytes(document),
        facts.WEIGHTS_FILE: untrusted.pickle_bytes(tensors),
    }


def own(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Without the copies, and without the base model's name."""
    return {key.removeprefix("base."): array for key, array in tensors.items() if ".pool." not in key}


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GEOMETRIES)
def test_config_of_is_the_inverse_of_sites_of(family: str) -> None:
    geometry = GEOMETRIES[family]
    total = sum(stack.layers for stack in (geometry.encoder, geometry.decoder) if stack is not None)
    seen = 0
    for left_out in range(2**total):
        config = {**PREFIX, "leave_out": [layer for layer in range(total) if left_out >> layer & 1]}
        for flags in ({}, {"encoder_prefix": False}, {"cross_prefix": False}):
            layers = facts.sites_of({**config, **flags}, geometry)
            if layers:
                assert facts.sites_of({**PREFIX, **facts.config_of(layers, geometry)}, geometry) == layers
                seen += 1
    assert seen >= 3 * (2**total - 4)


def test_left_out_layers_of_two_stacks_are_counted_in_one_index() -> None:
    layers = facts.sites_of({**PREFIX, "leave_out": [1, 2]}, GEOMETRIES["bart"])
    assert layers == {"encoder": (0,), "self": (1, 2), "cross": (1, 2)}


@pytest.mark.parametrize(
    ("leave_out", "expected"),
    [
        ([], {}),
        ([0, 1], {}),  # no prefix in the encoder, which keeps its bias
        ([0], {"encoder": 1}),
        ([1], {"encoder": 1}),
        ([2], {"decoder": 1}),
        ([3], {"decoder": 1}),
        ([4], {"decoder": 2}),
        ([2, 3], {"decoder": 2}),
        ([1, 2, 4], {"encoder": 1, "decoder": 1}),
    ],
)
def test_from_which_layer_on_the_relative_bias_is_lost(leave_out: list[int], expected: dict[str, int]) -> None:
    config = {**PREFIX, "leave_out": leave_out}
    assert facts.unbiased_from(facts.sites_of(config, GEOMETRIES["t5"]), GEOMETRIES["t5"]) == expected
    assert facts.unbiased_from(facts.sites_of(config, GEOMETRIES["bart"]), GEOMETRIES["bart"]) == {}


# --- the format, without the toolkit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["pickle", "safetensors"])
@pytest.mark.parametrize("family", GEOMETRIES)
def test_reads_a_flat_prefix(family: str, container: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    document, tensors = handmade(geometry, flat=True)
    files = written(document, tensors)
    if container == "safetensors":
        del files[facts.WEIGHTS_FILE]
        files[SAFE_WEIGHTS_FILE] = untrusted.safetensors_bytes(tensors)
    opened = put(tmp_path / "x", files)
    assert FORMAT.sniff(opened)
    prompt = FORMAT.read(opened, geometry)

    assert tuple(part.site for part in prompt.prefixes) == facts.model_sites(geometry)
    for part in prompt.prefixes:
        key = f"base.prefix_tuning.prefix_tunings.mine.{facts.location(family, part.site)}.control_trans"
        kv_heads, head_dim = facts.toolkit_shape(geometry)
        by_hand = tensors[key].reshape(P, -1, 2, kv_heads, head_dim)
        stored = 0 if family == "albert" else 1
        np.testing.assert_array_equal(part.layers[1].values[1, 3], by_hand[3, stored, 1, 1])
        np.testing.assert_array_equal(part.layers[1].keys[1, 3], by_hand[3, stored, 0, 1])
        assert not part.gated
    stacks = {"encoder"} if geometry.decoder is None else {"decoder"}
    stacks |= {"encoder"} if geometry.encoder is not None else set()
    assert prompt.positions == Positions(dict.fromkeys(stacks, 0), "skewed", "pinned")  # type: ignore[arg-type]
    assert prompt.base == BaseId("org/model", geometry)
    assert prompt.origin is not None
    assert set(prompt.origin.digests) == set(files)
    assert prompt.origin.notes == ()


@pytest.mark.parametrize("gating", [{}, {"use_gating": True}, {"use_gating": True, "shared_gating": False}])
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", GEOMETRIES)
def test_what_was_read_is_written_and_read_again(
    family: str, flat: bool, gating: dict[str, bool], tmp_path: Path
) -> None:
    geometry = GEOMETRIES[family]
    settings = {} if family == "albert" else {"leave_out": [1]}
    document, tensors = handmade(geometry, flat, dropout=0.1, init_weights_seed=4, **settings, **gating)
    prompt = FORMAT.read(put(tmp_path / "x", written(document, tensors)), geometry)
    assert (prompt.training is None) == flat
    assert all(part.gated == bool(gating) for part in prompt.prefixes)
    assert not FORMAT.obstacles(prompt, None)
    files = as_bytes(FORMAT.write(prompt, None))
    again = put(tmp_path / "y", files)
    assert FORMAT.read(again, geometry) == prompt
    assert json.loads(files[facts.CONFIG_FILE]) == document
    found, wanted = again.tensors(facts.WEIGHTS_FILE), own(tensors)
    assert found.keys() == wanted.keys()
    assert all(same_array(found[key], wanted[key]) for key in wanted)
    assert as_bytes(FORMAT.write(FORMAT.read(again, geometry), geometry)) == files


@pytest.mark.parametrize("family", GEOMETRIES)
def test_a_gate_belongs_to_its_layer_and_site(family: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    document, tensors = handmade(geometry, flat=True, use_gating=True, shared_gating=False)
    prompt = FORMAT.read(put(tmp_path / "x", written(document, tensors)), geometry)
    for part in prompt.prefixes:
        for layer, pair in part.layers.items():
            key = f"base.{ATTENTIONS[family][part.site].format(layer)}.prefix_tuning.prefix_gates.mine"
            assert pair.gate == Gate(tensors[f"{key}.weight"], tensors[f"{key}.bias"])
    gates = {pair.gate for part in prompt.prefixes for pair in part.layers.values()}
    assert len(gates) == (1 if family == "albert" else sum(len(part.layers) for part in prompt.prefixes))


def test_layers_that_are_one_share_their_prefix_and_its_parameterisation(tmp_path: Path) -> None:
    geometry = GEOMETRIES["albert"]
    prompt = FORMAT.read(put(tmp_path / "x", written(*handmade(geometry, flat=False))), geometry)
    assert len(prompt.prefixes[0].layers) == 3
    assert len(set(prompt.prefixes[0].layers.values())) == 1
    # As a parameterisation of all layers, which others understand.
    np.testing.assert_allclose(rematerialise(prompt).prefixes[0].flat(), prompt.prefixes[0].flat(), rtol=1e-5)


@pytest.mark.parametrize("combine", facts.PLACEMENTS)
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_prompt_tuning(family: str, combine: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    document, tensors = vectors_for(geometry, combine=combine, init_weights_seed=4, prompt_init_text="a text")
    files = put(tmp_path / "x", written(document, tensors))
    assert FORMAT.sniff(files)
    prompt = FORMAT.read(files, geometry)
    placement = "before-sequence" if combine == "prefix" else "after-first-token"
    (vectors,) = tensors.values()
    assert prompt.parts == (InputPrompt(vectors, "encoder", "after", placement),)
    assert prompt.positions.start == {"encoder": 0}
    assert not FORMAT.obstacles(prompt, geometry)
    written_again = as_bytes(FORMAT.write(prompt, None))
    assert json.loads(written_again[facts.CONFIG_FILE]) == document
    assert FORMAT.read(put(tmp_path / "y", written_again), geometry) == prompt
    assert same_array(Files(tmp_path / "y").tensors(facts.WEIGHTS_FILE)[next(iter(own(tensors)))], vectors)


@pytest.mark.parametrize("prompt_first", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_a_union_of_two_soft_prompts_is_one(flat: bool, prompt_first: bool, tmp_path: Path) -> None:
    geometry = GEOMETRIES["bert"]
    document, tensors = both(geometry, flat, prompt_first, use_gating=True)
    prompt = FORMAT.read(put(tmp_path / "x", written(document, tensors)), geometry)
    assert [isinstance(part, InputPrompt) for part in prompt.parts] == [prompt_first, not prompt_first]
    assert prompt.positions.start == {"encoder": 0}
    assert prompt.origin is not None
    assert prompt.origin.partial == ""
    files = as_bytes(FORMAT.write(prompt, None))
    assert json.loads(files[facts.CONFIG_FILE]) == document
    again = put(tmp_path / "y", files)
    assert FORMAT.read(again, geometry) == prompt
    assert again.tensors(facts.WEIGHTS_FILE).keys() == own(tensors).keys()


@pytest.mark.parametrize("family", GEOMETRIES)
def test_what_is_written_is_read(family: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[family]
    prompt = prefix_for(geometry)
    if family == "bart":
        prompt = without(without(without(prompt, "encoder", 1), "self", 0, 2), "cross", 0, 2)
    if family == "albert":
        pair = prompt.prefixes[0].layers[0]
        prompt = replace(prompt, parts=(KeyValuePrefix("encoder", dict.fromkeys(range(3), pair)),))
    assert not FORMAT.obstacles(prompt, geometry)
    assert FORMAT.read(put(tmp_path / "x", as_bytes(FORMAT.write(prompt, geometry))), geometry) == prompt


def test_a_prefix_on_the_decoder_alone(tmp_path: Path) -> None:
    geometry = GEOMETRIES["t5"]
    prompt = prefix_for(geometry, ("self",))
    files = as_bytes(FORMAT.write(prompt, geometry))
    config = json.loads(files[facts.CONFIG_FILE])["config"]
    assert (config["encoder_prefix"], config["cross_prefix"], config["leave_out"]) == (False, False, [])
    assert FORMAT.read(put(tmp_path / "x", files), geometry) == prompt


def test_an_ejected_file_is_recognised_by_its_tensors(tmp_path: Path) -> None:
    geometry = GEOMETRIES["gpt2"]
    document, tensors = handmade(geometry, flat=True)
    prompt = FORMAT.read(put(tmp_path / "flat", written(document, tensors)), geometry)
    document["config"]["flat"] = False
    ejected = FORMAT.read(put(tmp_path / "ejected", written(document, tensors)), geometry)
    assert ejected == prompt
    assert ejected.origin is not None
    assert "flat: false" in ejected.origin.notes[0]
    assert json.loads(FORMAT.write(ejected, None)[facts.CONFIG_FILE])["config"]["flat"] is True


def test_old_files_have_old_names_of_activations(tmp_path: Path) -> None:
    document, tensors = handmade(GEOMETRIES["gpt2"], flat=False, non_linearity="gelu")
    now = FORMAT.read(put(tmp_path / "x", written(document, tensors)), GEOMETRIES["gpt2"])
    del document["version"]
    old = FORMAT.read(put(tmp_path / "y", written(document, tensors)), GEOMETRIES["gpt2"])
    assert now.training is not None
    assert old.training is not None
    assert (now.training.settings["non_linearity"], old.training.settings["non_linearity"]) == ("gelu", "gelu_new")
    assert np.abs(now.prefixes[0].flat() - old.prefixes[0].flat()).max() > 1e-4
    # Written again it has a version, and so the new name.
    assert FORMAT.read(put(tmp_path / "z", as_bytes(FORMAT.write(old, None))), GEOMETRIES["gpt2"]) == old


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
        (True, lambda d, t: d["config"].update(architecture="prompt_tuning"), CheckpointError, "unknown fields"),
        (True, lambda d, t: d.update(config={"architecture": "prompt_tuning"}), CheckpointError, "of a decoder of"),
        (True, lambda d, t: d.update(config={"architecture": "union"}), CheckpointError, "union, of nothing"),
        (True, lambda d, t: d.update(config={"architecture": "union", "configs": [4]}), CheckpointError, "4 among the"),
        (
            True,
            lambda d, t: d.update(config={"architecture": "union", "configs": ["prefix_tuning"]}),
            CheckpointError,
            "'prefix_tuning' among the",
        ),
        (True, lambda d, t: d.update(config={"architecture": "union", "configs": 4}), CheckpointError, "of nothing"),
        (
            True,
            lambda d, t: d.update(config={"architecture": "union", "configs": [{"architecture": None}]}),
            CheckpointError,
            "architecture 'bottleneck'",
        ),
        (
            True,
            lambda d, t: d.update(config={"architecture": "union", "configs": [d["config"], d["config"]]}),
            CheckpointError,
            "two configurations of 'prefix_tuning'",
        ),
        (True, lambda d, t: d["config"].update(use_gating=1), CheckpointError, "'use_gating' is 1"),
        (
            True,
            lambda d, t: d["config"].update(use_gating=True),
            CheckpointError,
            r"missing h\.0\.attn.*gates.mine.bias",
        ),
        (True, lambda d, t: d["config"].update(architecture=["lora"]), CheckpointError, r"architecture '\['lora'"),
        (True, lambda d, t: d["config"].update(surprise=1), CheckpointError, "unknown fields surprise"),
        (True, lambda d, t: d["config"].update(prefix_length=0), CheckpointError, "'prefix_length' is 0"),
        (True, lambda d, t: d["config"].update(prefix_length=True), CheckpointError, "'prefix_length' is True"),
        (True, lambda d, t: d["config"].update(flat="no"), CheckpointError, "'flat' is 'no'"),
        (True, lambda d, t: d["config"].update(dropout=1.0), CheckpointError, "'dropout' is 1.0"),
        (True, lambda d, t: d["config"].update(leave_out=[-1]), CheckpointError, r"'leave_out' is \[-1\]"),
        (True, lambda d, t: d["config"].update(leave_out=[0, 1, 2]), CheckpointError, "unexpected base.*self_prefix"),
        (False, lambda d, t: d["config"].update(non_linearity="system"), CheckpointError, "'system'"),
        (True, lambda d, t: d["config"].update(prefix_length=6), CheckpointError, r"shape \[960\]\n.*\[1152\]"),
        (False, lambda d, t: d["config"].update(bottleneck_size=8), CheckpointError, r"shape \[7.*\]\n.*\[8"),
        (True, lambda d, t: t.pop(KEY) is t.pop(COPY), CheckpointError, "missing .*self_prefix.wte"),
        (
            True,
            lambda d, t: t.update({KEY.replace("self_p", "cross_p"): t[KEY]}),
            CheckpointError,
            "unexpected .*cross_prefix.control_trans",
        ),
        (True, lambda d, t: t.update({KEY.replace("mine", "yours"): t[KEY]}), CheckpointError, "unexpected .*yours"),
        (True, lambda d, t: t.update({"head.weight": t[KEY]}), CheckpointError, "unexpected head.weight"),
        (True, lambda d, t: t.update({COPY: t[KEY][::-1]}), CheckpointError, "differ from the first: base"),
        (True, lambda d, t: t.update({k: t[k].astype(np.int64) for k in t}), CheckpointError, "int64"),
        (True, lambda d, t: d.update(hidden_size=64), BaseModelError, "hidden size 32"),
        (True, lambda d, t: d.update(model_type="llama"), BaseModelError, "type 'gpt2'"),
    ],
)
def test_refuses_a_file_that_is_not_whole(
    flat: bool, change: Change, error: type[SoftbridgeError], message: str, tmp_path: Path
) -> None:
    document, tensors = handmade(GEOMETRIES["gpt2"], flat)
    change(document, tensors)
    files = put(tmp_path / "x", written(document, tensors))
    with pytest.raises(error, match=rf"(?s){message}"):
        FORMAT.read(files, GEOMETRIES["gpt2"])


def changes(value: Any, strange: Any) -> Iterator[Any]:
    """Every copy of a JSON value in which one thing is replaced by a strange one."""
    yield strange
    if isinstance(value, dict):
        yield from ({**value, key: other} for key, inner in value.items() for other in changes(inner, strange))
        yield from ({key: inner for key, inner in value.items() if key != gone} for gone in value)
    elif isinstance(value, list):
        yield from ([*value[:n], o, *value[n + 1 :]] for n, inner in enumerate(value) for o in changes(inner, strange))


@pytest.mark.parametrize("strange", [None, True, -1, 2.5, "", "union", [], ["a"], {}, {"a": 1}], ids=repr)
def test_whatever_a_configuration_says_is_read_or_refused(strange: Any, tmp_path: Path) -> None:
    geometry = GEOMETRIES["bert"]
    document, tensors = both(geometry, flat=False, use_gating=True)
    (tmp_path / "x").mkdir()
    put(tmp_path / "x", written(document, tensors))
    seen = {"read": 0, "refused": 0}
    for wrong in changes(document, strange):
        if not isinstance(wrong, dict):
            continue
        files = put(tmp_path / "x", {facts.CONFIG_FILE: untrusted.json_bytes(wrong)})
        try:
            prompt = FORMAT.read(files, geometry)
        except SoftbridgeError:
            seen["refused"] += 1
        else:
            seen["read"] += 1
            assert not FORMAT.obstacles(prompt, None)
            assert as_bytes(FORMAT.write(prompt, None))
    assert min(seen.values()) > 5


def test_refuses_what_cannot_be_read_for_this_base(tmp_path: Path) -> None:
    files = put(tmp_path / "x", written(*handmade(GEOMETRIES["t5"], flat=True, leave_out=[0])))
    with pytest.raises(BaseModelError, match="--base"):
        FORMAT.read(files, None)
    vit = replace(GEOMETRIES["bert"], model_type="vit")
    with pytest.raises(CheckpointError, match="a model of images"):
        FORMAT.read(put(tmp_path / "y", written(*handmade(vit, flat=True))), vit)
    with pytest.raises(CheckpointError, match=r"leaves out layers \[1\]: .*share"):
        FORMAT.read(
            put(tmp_path / "z", written(*handmade(GEOMETRIES["albert"], True, leave_out=[1]))), GEOMETRIES["albert"]
        )
    decoder = replace(GEOMETRIES["bert"], encoder=None, decoder=STACK)
    with pytest.raises(CheckpointError, match="prompt tuning of a decoder of type 'bert'"):
        FORMAT.read(put(tmp_path / "v", written(*vectors_for(GEOMETRIES["bert"]))), decoder)
    with pytest.raises(CheckpointError, match="prompt tuning of a model of type 'bart'"):
        FORMAT.read(put(tmp_path / "u", written(*vectors_for(GEOMETRIES["bart"]))), GEOMETRIES["bart"])
    (tmp_path / "v" / facts.WEIGHTS_FILE).unlink()
    assert not FORMAT.sniff(Files(tmp_path / "v"))
    with pytest.raises(CheckpointError, match="neither"):
        FORMAT.read(Files(tmp_path / "v"), GEOMETRIES["bert"])


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


AFTER = InputPrompt(np.ones((2, 32)), "encoder", "after")


def gated(
    prompt: SoftPrompt,
    layers: tuple[int, ...] = (0, 1, 2),
    sites: tuple[Site, ...] = ("encoder", "self", "cross"),
    width: int = 32,
) -> SoftPrompt:
    """Gates for some of the layers."""
    gate = Gate(np.ones((1, width)), np.ones(1))
    parts = tuple(
        KeyValuePrefix(
            part.site,
            {
                layer: replace(pair, gate=gate if layer in layers and part.site in sites else None)
                for layer, pair in part.layers.items()
            },
        )
        for part in prompt.prefixes
    )
    return replace(prompt, parts=parts)


@pytest.mark.parametrize(
    ("geometry", "change", "name"),
    [
        (replace(GEOMETRIES["llama"], model_type="qwen2"), lambda p: p, "model"),
        (replace(GEOMETRIES["bert"], model_type="xmod"), lambda p: p, "model"),
        (GEOMETRIES["albert"], lambda p: p, "layers"),
        (GEOMETRIES["albert"], lambda p: without(p, "encoder", 1, 2), "layers"),
        (GEOMETRIES["bert"], lambda p: gated(p, layers=(0, 2)), "gates"),
        (GEOMETRIES["bert"], lambda p: gated(p, width=16), "gates"),
        (GEOMETRIES["bart"], lambda p: gated(p, sites=("self",)), "gates"),
        (GEOMETRIES["bert"], lambda p: at_encoder(p, InputPrompt(np.ones((2, 32)), "encoder")), "input-prompt"),
        (
            GEOMETRIES["bart"],
            lambda p: at_encoder(p, AFTER),
            "input-prompt",
        ),
        (GEOMETRIES["t5"], lambda p: gated(p, sites=("encoder", "self")), "gates"),
        (GEOMETRIES["bert"], lambda p: replace(p, head={"score.weight": np.ones((2, 32))}), "head"),
        (GEOMETRIES["bart"], lambda p: replace(p, head={"classifier.weight": np.ones((2, 32))}), "head"),
        (replace(GEOMETRIES["llama"], decoder=StackGeometry(3, 4, 2, 12)), lambda p: p, "shape"),
        (GEOMETRIES["gpt2"], _ragged, "shape"),
        (GEOMETRIES["bart"], _longer, "length"),
        (GEOMETRIES["bart"], lambda p: without(p, "cross", 1), "layers"),
        (GEOMETRIES["bart"], lambda p: replace(p, parts=p.parts[2:], positions=Positions({})), "layers"),
        (GEOMETRIES["albert"], lambda p: without(p, "encoder", 1), "layers"),
        (GEOMETRIES["t5"], lambda p: without(p, "encoder", 1), "relative-bias"),
        (GEOMETRIES["t5"], lambda p: unbiased(p, {"encoder": 1}), "relative-bias"),
        (GEOMETRIES["t5"], lambda p: unbiased(without(p, "encoder", 1), {"encoder": 0}), "relative-bias"),
        (GEOMETRIES["gpt2"], lambda p: unbiased(p, {"decoder": 1}), "relative-bias"),
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


def unbiased(prompt: SoftPrompt, layers: dict[Stack, int]) -> SoftPrompt:
    return replace(prompt, positions=replace(prompt.positions, unbiased_from=layers))


def test_a_relative_bias_that_is_lost_is_no_obstacle_if_the_prompt_says_so() -> None:
    without_one = without(prefix_for(GEOMETRIES["t5"]), "encoder", 1)
    assert FORMAT.obstacles(unbiased(without_one, {"encoder": 1}), GEOMETRIES["t5"]) == []


def test_obstacles_of_a_prompt_without_a_base_or_with_another_parameterisation(tmp_path: Path) -> None:
    prompt = prefix_for(GEOMETRIES["gpt2"])
    assert [o.name for o in FORMAT.obstacles(replace(prompt, base=BaseId()), None)] == ["base"]
    with pytest.raises(BaseModelError):
        as_bytes(FORMAT.write(replace(prompt, base=BaseId()), None))
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
