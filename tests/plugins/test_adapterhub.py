"""AdapterHub itself as an engine, and its files as it writes and loads them: every family, every kind of prompt.

Models are float64 under eager attention. What the package computes is compared with what it computes of our files, and
with the native engine where that runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.arrays import Array, same_array
from softbridge.errors import EngineError
from softbridge.geometry import Geometry, Site
from softbridge.lowering.precision import as_dtype
from softbridge.plugin.registry import engines
from softbridge.prompt import Gate, InputPrompt, KeyValue, KeyValuePrefix, Positions, SoftPrompt
from softbridge.testing import agreement, apart, as_bytes, random_prefix, tiny_model
from softbridge.untrusted import Files, pickle_bytes
from softbridge.verification.judge import FLOAT32_BOUND
from softbridge_adapterhub import facts
from softbridge_adapterhub.adapter import Adapter
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT

pytestmark = [
    # AdapterHub's T5 passes transformers an argument under its old name.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
    # transformers compiles parts of DeBERTa with a compiler that torch is about to drop.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
]

P = 5
WEIGHTS = facts.WEIGHTS_FILE
NATIVE = engines()["native"]
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
    "albert": {**_ENCODER, "embedding_size": 16},
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
    "whisper": {**_SEQ2SEQ, "num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 64},
    "xlm-roberta": {**_ENCODER, "pad_token_id": 1},
}


PREFIX_METHODS = ("prefix-tuning", "prefix-tuning-flat", "prefix-tuning-gated")
#: What the engine can train as an example.
TRAINED = [(family, method) for family in FAMILIES for method in PREFIX_METHODS]
TRAINED += [(family, "prompt-tuning") for family in ("bert", "albert", "electra")]


@pytest.fixture
def adapters() -> Any:
    return pytest.importorskip("adapters")


def zero(prompt: SoftPrompt) -> SoftPrompt:
    """The prompt under AdapterHub's own policies."""
    return replace(prompt, positions=Positions(dict.fromkeys(prompt.positions.start, 0), "skewed", "pinned"))


def prefix_for(geometry: Geometry) -> SoftPrompt:
    """A prefix at every site; layers that are one have one."""
    prompt = zero(random_prefix(geometry, P, sites=facts.model_sites(geometry)))
    if geometry.model_type not in facts.SHARED_LAYERS:
        return prompt
    (part,) = prompt.prefixes
    return replace(prompt, parts=(KeyValuePrefix(part.site, dict.fromkeys(part.layers, part.layers[0])),))


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


def model_of(family: str, dtype: Any = None) -> Any:
    return copy.deepcopy(_built(family, dtype))


@cache
def _built(family: str, dtype: Any) -> Any:
    import torch
    from transformers import AutoConfig

    from softbridge.base import BaseModel, build, draw_weights

    if family in FAMILIES:
        return tiny_model(family, dtype)
    config = AutoConfig.for_model(family, **OTHERS[family])
    if family == "whisper":  # its input is no tokens, and `build` is for text
        from transformers import WhisperForConditionalGeneration

        config._attn_implementation = "eager"
        with torch.random.fork_rng():
            model = WhisperForConditionalGeneration(config)
        draw_weights(model, 0)
        return model.to(dtype or torch.float64).eval()
    return build(config, BaseModel(config).task, dtype or torch.float64, 0)


def inputs_of(model: Any, rows: int = 1) -> dict[str, Any]:
    """Texts; where there are several, the last ends in padding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 90, (rows, 7), generator=generator)}
    if rows > 1:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][-1, -2:] = 0
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 90, (rows, 6), generator=generator)
    if model.main_input_name != "input_ids":
        del inputs["input_ids"]
        sound = (rows, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        inputs[model.main_input_name] = torch.randn(sound, generator=generator, dtype=torch.float64)
        if rows > 1:
            inputs["decoder_attention_mask"] = inputs.pop("attention_mask")[:, :6]
    return inputs


def logits(model: Any, rows: int = 1, **further: Any) -> Array:
    import torch

    with torch.no_grad():
        return np.asarray(model(**inputs_of(model, rows), **further).logits.double().numpy())


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
    for name, module in list(model.named_modules()):
        if ".prefix_gates." in name or ".prompt_tunings." in name:
            module.to(model.dtype)  # the package leaves them in float32, in which they fail
    return model.eval()


def geometry_of(model: Any) -> Geometry:
    from softbridge.geometry import read_geometry

    return read_geometry(model.config)


def changed(prompt: SoftPrompt, change: Callable[[KeyValue], KeyValue]) -> SoftPrompt:
    """The prompt with another prefix, its own gates, and no parameterisation."""
    parts = tuple(
        KeyValuePrefix(part.site, {n: replace(change(pair), gate=pair.gate) for n, pair in part.layers.items()})
        for part in prompt.prefixes
    )
    return replace(prompt, parts=parts, training=None)


def backwards(prompt: SoftPrompt) -> SoftPrompt:
    """Another prompt, in place of which the right one must be noticed."""
    if prompt.prefixes:
        return changed(prompt, lambda pair: KeyValue(pair.values, pair.keys))
    return replace(prompt, parts=tuple(replace(part, vectors=part.vectors[::-1]) for part in prompt.inputs))


def test_the_tables_are_those_of_the_installed_package(adapters: Any) -> None:
    from adapters import utils
    from adapters.loading import ACTIVATION_RENAME

    assert adapters.PrefixTuningConfig().to_dict() == facts.DEFAULTS[facts.PREFIX]
    assert adapters.PromptTuningConfig().to_dict() == facts.DEFAULTS[facts.PROMPT]
    assert ACTIVATION_RENAME == facts.UNVERSIONED_ACTIVATIONS
    folders = {path.name for path in (Path(adapters.__file__).parent / "models").iterdir() if path.is_dir()}
    supported = {name.replace("_", "-") for name in folders - {"auto", "__pycache__"}}
    assert supported == facts.MODEL_TYPES | facts.OTHER_MODEL_TYPES.keys()
    assert set(FAMILIES) | OTHERS.keys() == facts.MODEL_TYPES == facts.ATTENTIONS.keys()
    names = {name: value for name, value in vars(utils).items() if name.endswith("_NAME")}
    ours = {facts.CONFIG_FILE, facts.HEAD_CONFIG_FILE, facts.SETUP_FILE, *facts.SAFE, *facts.SAFE.values()}
    assert ours <= set(names.values())


@pytest.mark.parametrize("family", sorted(facts.MODEL_TYPES))
def test_what_the_package_holds_of_a_family_is_what_we_say(family: str, adapters: Any) -> None:
    model = model_of(family)
    plain, close = logits(model), agreement(model, **inputs_of(model))
    adapters.init(model)  # whose linear layers are of its own
    assert apart(logits(model), plain) <= close
    assert model.base_model.support_prompt_tuning == (family in facts.PROMPT_MODEL_TYPES)

    config = {**facts.DEFAULTS[facts.PREFIX], "use_gating": True, "prefix_length": P, "bottleneck_size": 6}
    model.add_adapter("mine", config)
    configs = {facts.PREFIX: config}
    if family in facts.PROMPT_MODEL_TYPES:
        model.delete_adapter("mine")
        configs[facts.PROMPT] = facts.DEFAULTS[facts.PROMPT]
        model.add_adapter("mine", {"architecture": "union", "configs": list(configs.values())})
    shapes = Adapter("mine", configs, geometry_of(model)).shapes()
    state = model.base_model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert {key for key in state if ".mine." in key and ".pool." not in key} == shapes.keys()


@pytest.mark.parametrize(("family", "method"), TRAINED)
def test_a_file_of_the_toolkit_there_and_back(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    files = trained(model, method, tmp_path / "theirs")
    reference = logits(loaded(adapters, model, tmp_path / "theirs"))
    assert difference(reference, logits(model)[:, -reference.shape[1] :]) > 0.5

    prompt = FORMAT.read(files, geometry)
    assert (prompt.training is None) == (method in ("prefix-tuning-flat", "prompt-tuning"))
    assert all(part.gated == (method == "prefix-tuning-gated") for part in prompt.prefixes)
    assert set(prompt.positions.start.values()) == {0}
    written_again = put(tmp_path / "ours", as_bytes(FORMAT.write(prompt, geometry)))
    assert difference(logits(loaded(adapters, model, tmp_path / "ours")), reference) == 0
    assert FORMAT.read(written_again, geometry) == prompt

    assert difference(logits(ENGINE.attach(copy.deepcopy(model), prompt)), reference) == 0
    if prompt.training is not None and family in ("llama", "t5"):  # grouped heads, and heads of another size
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            loaded(adapters, model, tmp_path / "theirs").eject_prefix_tuning("example")
    ejected = put(tmp_path / "ejected", as_bytes(FORMAT.write(replace(prompt, training=None), geometry)))
    assert difference(logits(loaded(adapters, model, tmp_path / "ejected")), reference) == 0
    assert FORMAT.read(ejected, geometry).parts == prompt.parts


@pytest.mark.parametrize("method", ["prefix-tuning", "prefix-tuning-gated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_negative_twins(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    prompt = FORMAT.read(trained(model, method, tmp_path / "x"), geometry_of(model))
    reference = logits(ENGINE.attach(copy.deepcopy(model), prompt))
    reordered = changed(prompt, lambda pair: KeyValue(pair.keys, pair.values[:, ::-1]))
    wrongs = [backwards(prompt), reordered]
    if method == "prefix-tuning-gated":
        wrongs += [regated(prompt, lambda gate: None)]
        wrongs += [regated(prompt, lambda gate: Gate(gate.weight[::-1], gate.bias[::-1]))]
        wrongs += [regated(prompt, lambda gate: replace(gate, bias=gate.bias + 2))]
    if family != "t5":
        stack = next(iter(prompt.positions.start))
        wrongs.append(replace(prompt, positions=replace(prompt.positions, start={stack: 1})))
    for wrong in wrongs:
        assert difference(logits(ENGINE.attach(copy.deepcopy(model), wrong)), reference) > 0.05


def regated(prompt: SoftPrompt, change: Callable[[Gate], Gate | None]) -> SoftPrompt:
    """The prompt with other gates, and no parameterisation."""
    parts = tuple(
        KeyValuePrefix(
            part.site,
            {n: replace(pair, gate=change(pair.gate)) for n, pair in part.layers.items() if pair.gate is not None},
        )
        for part in prompt.prefixes
    )
    return replace(prompt, parts=parts, training=None)


#: Kinds of prompt, as AdapterHub configures them: "unbiased" for families with a relative bias, which is lost behind a
#: layer that is left out. The last two are of families with prompt tuning.
KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "flat": ({"architecture": "prefix_tuning", "flat": True, "prefix_length": P},),
    "gated": (
        {"architecture": "prefix_tuning", "prefix_length": P, "bottleneck_size": 6, "use_gating": True}
        | {"shared_gating": False},
    ),
    "some": ({"architecture": "prefix_tuning", "prefix_length": P, "bottleneck_size": 6},),
    "unbiased": ({"architecture": "prefix_tuning", "flat": True, "prefix_length": P, "leave_out": [0, 3]},),
    "prompt": ({"architecture": "prompt_tuning", "prompt_length": 4},),
    "union": (
        {"architecture": "prompt_tuning", "prompt_length": 4, "combine": "prefix_after_bos"},
        {"architecture": "prefix_tuning", "flat": True, "prefix_length": P, "use_gating": True},
    ),
}
#: What the kind "some" leaves out: of an encoder and a decoder one layer each, of a relative bias a whole stack.
SOME: dict[str, dict[str, Any]] = {
    **{family: {"leave_out": [1]} for family in ("gpt2", "llama", "mistral", "bert", "roberta", "distilbert")},
    "bart": {"leave_out": [0, 3]},
    "t5": {"encoder_prefix": False},
}
#: What the native engine is known to run as well, here and on transformers 4.
NATIVE_PREFIXES = frozenset(("bart", "gpt2", "llama", "mbart", "mistral", "plbart", "whisper"))


def saved(adapters: Any, model: Any, kind: str, folder: Path) -> Files:
    """A file that the toolkit wrote, of large random numbers."""
    import torch

    model = copy.deepcopy(model)
    adapters.init(model)
    model.add_adapter("mine", adapters.AdapterConfig.load(config_of(kind, model.config.model_type)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mine." in name:
                scale = 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                scale = 1.0 if name.endswith(("wte.weight", "prompt_embedding.weight")) else scale
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    model.save_adapter(str(folder), "mine", with_head=False)
    return Files(folder)


def config_of(kind: str, family: str) -> dict[str, Any]:
    configs = KINDS[kind]
    if kind == "some":
        return {**configs[0], **SOME[family]}
    return configs[0] if len(configs) == 1 else {"architecture": "union", "configs": list(configs)}


@pytest.mark.parametrize("kind", ["prompt", "union"])
@pytest.mark.parametrize("family", facts.PROMPT_UNSOUND)
def test_prompts_that_only_others_run_right(family: str, kind: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    files = saved(adapters, model, kind, tmp_path / "x")
    prompt = FORMAT.read(files, geometry_of(model))
    if kind == "union":
        prompt = replace(prompt, parts=prompt.inputs)
        put(tmp_path / "x", as_bytes(FORMAT.write(prompt, None)))
    if family == "distilbert":
        config = copy.deepcopy(model.config)
        config._attn_implementation = "sdpa"
        sdpa = type(model)(config).to(model.dtype).eval()
        sdpa.load_state_dict(model.state_dict())
        model, eager = sdpa, model
    else:
        eager = model
    reference = logits(loaded(adapters, model, tmp_path / "x"))
    assert difference(reference, logits(model)) > 0.1
    close = agreement(eager)
    assert apart(logits(NATIVE.attach(eager, prompt)), reference) <= close


def of_tokens(found: Array, prompt: SoftPrompt) -> Array:
    """Logits without those of virtual tokens, which AdapterHub returns, too."""
    if found.ndim == 2:
        return found
    for part in prompt.inputs:
        first = 0 if part.placement == "before-sequence" else 1
        found = np.delete(found, slice(first, first + part.length), axis=1)
    return found


EVERY = [
    (family, kind)
    for family in sorted(facts.MODEL_TYPES)
    for kind in KINDS
    if kind in ("flat", "gated")
    or (kind == "some" and family in SOME)
    or (kind == "unbiased" and family in facts.RELATIVE_BIAS)
    or (kind in ("prompt", "union") and family in facts.PROMPT_MODEL_TYPES - facts.PROMPT_UNSOUND.keys())
]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_every_family(family: str, kind: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    geometry = geometry_of(model)
    theirs = saved(adapters, model, kind, tmp_path / "theirs")
    prompt = FORMAT.read(theirs, geometry)

    # Written again it is the same, bit for bit, in fewer copies.
    ours = put(tmp_path / "ours", as_bytes(FORMAT.write(prompt, geometry)))
    first = {key.removeprefix(f"{model.base_model_prefix}."): array for key, array in theirs.tensors(WEIGHTS).items()}
    written = ours.tensors(WEIGHTS)
    assert written.keys() == {key for key in first if ".pool." not in key}
    assert all(same_array(array, first[key]) for key, array in written.items())
    assert ours.json(facts.CONFIG_FILE)["config"] == theirs.json(facts.CONFIG_FILE)["config"]

    running = ENGINE.attach(copy.deepcopy(model), prompt)
    runs = NATIVE.unavailable() is None and not NATIVE.obstacles(prompt, model)
    assert runs or family not in (NATIVE_PREFIXES if prompt.prefixes else facts.PROMPT_MODEL_TYPES)
    toolkit, again = (loaded(adapters, model, tmp_path / name) for name in ("theirs", "ours"))
    through = ENGINE.load(copy.deepcopy(model), prompt, tmp_path / "theirs")
    native = NATIVE.attach(copy.deepcopy(model), prompt) if runs else None
    # The toolkit makes a prefix anew for every row, in one product of float32.
    made = 0.0 if prompt.training is None else FLOAT32_BOUND
    for rows in (1, 2):
        reference = logits(toolkit, rows)
        assert difference(logits(again, rows), reference) == 0
        real = of_tokens(reference, prompt)
        assert difference(real, logits(model, rows)) > 0.1
        assert apart(logits(running, rows), real) <= made
        assert apart(logits(through, rows), real) <= made
        if native is not None:
            found = logits(native, rows)
            if rows == 2 and found.ndim == 3 and not geometry.is_encoder_decoder:
                found[1, -2:] = real[1, -2:]  # after the padding
            assert apart(found, real) <= max(made, agreement(model, **inputs_of(model)))

    if geometry.encoder is not None and reference.ndim == 3 and not geometry.is_encoder_decoder:
        assert running(**inputs_of(model), labels=inputs_of(model)["input_ids"]).loss > 0
    if kind == "unbiased":
        assert prompt.positions.unbiased_from == {"encoder": 1, "decoder": 1}
    if kind == "some" and family != "t5":
        # In other layers it is another prompt.
        moved = [replace(p, layers=dict(zip(range(2), p.layers.values(), strict=False))) for p in prompt.prefixes]
        elsewhere = ENGINE.attach(copy.deepcopy(model), replace(prompt, parts=tuple(moved), training=None))
        assert difference(logits(elsewhere, 2), real) > 0.1
    extracted = ENGINE.extract(running)
    assert extracted.positions == prompt.positions
    assert as_dtype(extracted, np.dtype(np.float32)).parts == prompt.parts
    assert difference(logits(ENGINE.detach(running)), logits(model)) == 0


@pytest.mark.parametrize("family", sorted(facts.POSITION_INPUTS))
def test_tokens_are_moved_to_where_the_prompt_counts_them(family: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    model = model_of(family)
    prompt = prefix_for(geometry_of(model))
    put(tmp_path / "x", as_bytes(FORMAT.write(prompt, None)))
    stack = next(iter(prompt.positions.start))
    counted = replace(prompt, positions=replace(prompt.positions, start={stack: P}))
    unmoved = logits(loaded(adapters, model, tmp_path / "x"))
    moved = logits(ENGINE.attach(copy.deepcopy(model), counted))
    assert difference(moved, unmoved) > 0.1
    assert difference(logits(ENGINE.load(copy.deepcopy(model), counted, tmp_path / "x")), moved) == 0
    if family == "distilbert":
        return  # its forward takes no positions to compare with
    first = model.config.pad_token_id + 1 if family in ("roberta", "xlm-roberta") else 0
    by_hand = logits(loaded(adapters, model, tmp_path / "x"), position_ids=torch.arange(7)[None] + first + P)
    assert difference(moved, by_hand) == 0


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_tokens_after_vectors_are_moved_as_others_move_them(family: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    prompt = FORMAT.read(saved(adapters, model, "prompt", tmp_path / "x"), geometry_of(model))
    moved = replace(prompt, positions=replace(prompt.positions, start={"encoder": 4}))
    found = logits(ENGINE.attach(copy.deepcopy(model), moved), 2)
    assert apart(found, logits(NATIVE.attach(copy.deepcopy(model), moved), 2)) <= agreement(model)
    assert difference(found, logits(ENGINE.attach(copy.deepcopy(model), prompt), 2)) > 0.05


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", "prompt-tuning"), ("bert-generation", "prompt-tuning"), ("gpt2", "prefix-tuning-gated")],
)
def test_a_conversion_is_certified(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    model = model_of(family)
    trained(model, method, tmp_path / "x")
    report = sb.convert(tmp_path / "x", tmp_path / "y", "softbridge", base=model.config, verify=True)
    assert report.certificate is not None
    assert report.certificate.verdict in ("bitwise", "exact")


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


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt2", "prefix-tuning"), ("llama", "prefix-tuning-gated"), ("t5", "prefix-tuning"), ("bert", "prompt-tuning")],
)
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

    # The file counts, not the prompt.
    wrong = backwards(prompt)
    for encoding in FORMAT.encodings:
        put(tmp_path / encoding, as_bytes(FORMAT.write(wrong, geometry, encoding)))
        found = logits(ENGINE.load(copy.deepcopy(model), prompt, tmp_path / encoding))
        assert difference(found, logits(ENGINE.attach(copy.deepcopy(model), wrong))) == 0
        assert difference(found, expected) > 0.1
    assert (tmp_path / "safetensors" / "adapter.safetensors").is_file()
    assert not (tmp_path / "safetensors" / WEIGHTS).exists()


@pytest.mark.parametrize(
    ("family", "method"), [*(("llama", method) for method in PREFIX_METHODS), ("bert", "prompt-tuning")]
)
def test_loaded_runs_eager_and_in_the_models_precision(family: str, method: str, adapters: Any, tmp_path: Path) -> None:
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(family, dtype)
        prompt = FORMAT.read(trained(model_of(family), method, tmp_path / str(dtype)), geometry_of(model))
        expected = logits(ENGINE.attach(copy.deepcopy(model), prompt))
        model.set_attn_implementation("sdpa")
        running = ENGINE.load(model, prompt, tmp_path / str(dtype))
        assert running.config._attn_implementation == "eager"
        assert running(**inputs_of(model)).logits.dtype == dtype
        assert difference(logits(running), expected) == 0


def test_loading_is_refused_by_name(adapters: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    geometry = geometry_of(model)
    prompt = prefix_for(geometry)
    with pytest.raises(EngineError, match="no weights"):
        ENGINE.load(copy.deepcopy(model), prompt, tmp_path)
    written = as_bytes(FORMAT.write(prompt, geometry))
    renamed = {
        key.replace("self_prefix", "other_prefix"): array
        for key, array in put(tmp_path / "x", written).tensors(WEIGHTS).items()
    }
    put(tmp_path / "x", {**written, WEIGHTS: pickle_bytes(renamed)})
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
    vectors = InputPrompt(np.ones((2, 24)), "encoder", "after")
    for wrong, message in [
        (replace(prompt, positions=Positions({"encoder": P, "decoder": P})), "relative-bias"),
        (without(prompt, "encoder", 0), "relative-bias"),
        (replace(prompt, parts=(vectors,), positions=Positions({"encoder": 0}, "skewed", "pinned")), "input-prompt"),
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

    vectors = InputPrompt(np.ones((2, 32)), "encoder", "after")
    prompt = SoftPrompt((vectors,), Positions({"encoder": 0}, "skewed", "pinned"))
    for family in facts.PROMPT_UNSOUND:
        assert [obstacle.name for obstacle in ENGINE.obstacles(prompt, model_of(family))] == ["attention"]
    albert = model_of("albert")
    albert.config.num_hidden_groups = 2
    assert [obstacle.name for obstacle in ENGINE.obstacles(prefix_for(geometry_of(albert)), albert)] == ["layers"]

    with pytest.raises(EngineError, match="'p-tuning'"):
        ENGINE.train_example(model_of("gpt2"), "p-tuning", tmp_path, length=P, steps=1, seed=0)
    for family in ("gpt2", "distilbert", "deberta-v2"):
        with pytest.raises(EngineError, match=f"type '{family}'"):
            ENGINE.train_example(model_of(family), "prompt-tuning", tmp_path, length=P, steps=1, seed=0)
    with pytest.raises(EngineError, match="type 'qwen3'"):
        ENGINE.train_example(tiny_model("qwen3"), "prefix-tuning", tmp_path, length=P, steps=1, seed=0)
    qwen = tiny_model("qwen3")
    assert [o.name for o in ENGINE.obstacles(prefix_for(geometry_of(qwen)), qwen)] == ["model"]
