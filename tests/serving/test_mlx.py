"""mlx-lm answers with our files as transformers does with the prompt, and reads what we write and writes what we read.

Every claim is held by `softbridge.verification.serving`: within 4 times mlx-lm's own distance from transformers, and
with similar wrong prompts noticed.
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
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import softbridge as sb
from softbridge.arrays import BFLOAT16, same_array
from softbridge.base import BaseModel, build
from softbridge.cli import app
from softbridge.errors import EngineError, OutputError
from softbridge.geometry import read_geometry
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.serving import Request
from softbridge.prompt import KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.testing import as_bytes, random_input_prompt, random_prefix
from softbridge.untrusted import Files, Streamed
from softbridge.verification.serving import Serving, judge
from softbridge_mlx.families import FAMILIES
from softbridge_mlx.format import FILE, FORMAT, LAYOUTS
from softbridge_mlx.server import SERVER

pytestmark = pytest.mark.skipif(SERVER.unavailable() is not None, reason=str(SERVER.unavailable()))

WINDOW = 8
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: No default of mlx-lm: a base angle that is lost on the way shows.
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LAYERWISE = {"sliding_attention": {"rope_type": "default", "rope_theta": 3000.0}, "full_attention": ROPE}
#: Family -> settings that are not `SIZES` or `ROPE`.
PARTICULAR: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gemma3_text": {"rope_parameters": LAYERWISE, "sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "afmoe": {"sliding_window": WINDOW, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_neox": {"intermediate_size": 256},  # mlx-lm has no other than 4 times the hidden size
    "olmo3": {"rope_parameters": dict.fromkeys(LAYERWISE, ROPE), "sliding_window": WINDOW},
    "granitemoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 48,
    },
}
#: How far mlx-lm itself may be from transformers, where that is more than rounding: it approximates GELU otherwise.
NOISE = {"gemma": 0.1, "starcoder2": 0.01, "gpt_neox": 0.01}
MAKERS = {"prefix": random_prefix, "prompt": random_input_prompt}


def config_of(family: str, **changes: Any) -> Any:
    known = vars(AutoConfig.for_model(family))
    settings = {name: value for name, value in {**SIZES, "rope_parameters": ROPE}.items() if name in known}
    if "sliding_window" in known:
        settings["sliding_window"] = 64  # longer than what is judged, for mlx-lm's models without one
    # A copy: some classes write into what they are given.
    return AutoConfig.for_model(family, **copy.deepcopy({**settings, **PARTICULAR.get(family, {}), **changes}))


def base_of(family: str, **changes: Any) -> BaseModel:
    return BaseModel.resolve(build(config_of(family, **changes), "causal-lm", torch.float32, 0))


def lowered(prompt: SoftPrompt, base: BaseModel) -> SoftPrompt:
    return lower(prompt, Target("mlx", FORMAT.capabilities, base), ("window",), FORMAT.obstacles).prompt


def narrowed(prompt: SoftPrompt, dtype: Any) -> SoftPrompt:
    (part,) = prompt.prefixes
    layers = {n: KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype)) for n, pair in part.layers.items()}
    return replace(prompt, parts=(KeyValuePrefix("self", layers),))


def check(found: Serving) -> None:
    assert found.verdict == "served", found.summary()
    assert found.effect > 100 * found.bound, found.summary()
    names = {fault.name for fault in found.faults}
    assert {"keys and values swapped", "two layers swapped"} <= names
    assert ("shifted by one position" in names) != ("shifted by one position" in found.untried)
    print(found.summary())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served(family: str, kind: str) -> None:
    base = base_of(family)
    found = judge(FORMAT, lowered(MAKERS[kind](base.geometry), base), base, weights=True)
    check(found)
    assert found.noise < NOISE.get(family, 5e-4), "a base model that mlx-lm itself computes otherwise shows little"


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_a_window_drops_a_prefix_that_it_has_passed(length: int) -> None:
    base = base_of("gemma3_text")
    check(judge(FORMAT, lowered(random_prefix(base.geometry, length), base), base, weights=True))


def test_settings_that_mlx_lm_does_not_find_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 has the base angle of the rotation under a name that mlx-lm does not read."""
    base = base_of("llama")
    prompt = lowered(random_prefix(base.geometry), base)
    monkeypatch.setattr("softbridge_mlx.server.settings", lambda facts: {})
    found = judge(FORMAT, prompt, base, weights=True)
    assert found.verdict == "insensitive"
    assert found.noise > 0.01


@pytest.mark.parametrize(
    "scaled",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaled: str(scaled["rope_type"]),
)
def test_a_scaled_rotation_is_served(scaled: Mapping[str, Any]) -> None:
    base = base_of("llama", rope_parameters={**ROPE, **scaled})
    check(judge(FORMAT, lowered(random_prefix(base.geometry), base), base, weights=True))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prefix_in_half_precision_is_served(family: str, dtype: Any) -> None:
    base = base_of(family)
    check(judge(FORMAT, lowered(narrowed(random_prefix(base.geometry), dtype), base), base, weights=True))


def test_random_weights_of_the_structure_do_for_a_prefix() -> None:
    base = BaseModel.resolve(config_of("llama"))
    check(judge(FORMAT, lowered(random_prefix(base.geometry), base), base))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_long_prefix_is_served(family: str) -> None:
    """Longer than the 256 tokens for which mlx-lm makes room at a time."""
    base = base_of(family, max_position_embeddings=512)
    check(judge(FORMAT, lowered(random_prefix(base.geometry, 300), base), base, weights=True))


# --- the files of each other ------------------------------------------------------------------------------------------


def mixed(cache: Any) -> tuple[Any, ...]:
    return type(cache).__name__, cache.offset, getattr(cache, "max_size", None), getattr(cache, "_idx", None)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("length", [5, 13])
def test_mlx_lm_loads_our_file_as_its_own_bit_for_bit(length: int, dtype: Any, tmp_path: Path) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, RotatingKVCache, load_prompt_cache, save_prompt_cache

    base = BaseModel.resolve(config_of("gemma3_text"))
    prompt = narrowed(random_prefix(base.geometry, length), dtype)
    layers = prompt.prefixes[0].layers
    ours = tmp_path / "ours.safetensors"
    ours.write_bytes(bytes(FORMAT.write(prompt, base.geometry)[FILE]))
    names = {np.float32: mx.float32, np.float16: mx.float16, BFLOAT16: mx.bfloat16}
    made = [RotatingKVCache(max_size=WINDOW) if n < 5 else KVCache() for n in range(6)]
    for cache, pair in zip(made, layers.values(), strict=True):
        halves = (mx.array(half[None]).astype(names[dtype]) for half in (pair.keys, pair.values))
        cache.update_and_fetch(*halves)
    theirs = tmp_path / "theirs.safetensors"
    save_prompt_cache(str(theirs), made, {"model": "a/base", "tokenizer_config": "{}"})
    one, other = load_prompt_cache(str(ours)), load_prompt_cache(str(theirs))
    for left, right in zip(one, other, strict=True):
        assert mixed(left) == mixed(right)
        for name in ("keys", "values"):
            seen = (getattr(cache, name)[..., :length, :] for cache in (left, right))
            assert mx.array_equal(*(half.view(mx.uint8) for half in seen))
    again = FORMAT.read(Files(theirs), base.geometry)
    assert again.base.name == "a/base"
    for n, pair in layers.items():
        assert same_array(again.prefixes[0].layers[n].keys, pair.keys)
        assert same_array(again.prefixes[0].layers[n].values, pair.values)


def test_a_text_that_mlx_lm_cached_is_a_prefix(tmp_path: Path) -> None:
    """As `mlx_lm.cache_prompt` does it: the prefix computes what the model computes with the text in front."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
    from mlx_lm.utils import load_model

    base = base_of("llama", rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    model = base.weights(torch.float32)
    model.save_pretrained(tmp_path / "base")
    theirs, _ = load_model(tmp_path / "base")
    cache = make_prompt_cache(theirs)
    text, more = [5, 17, 33, 8, 61], [44, 9, 70]
    for _ in generate_step(mx.array(text), theirs, max_tokens=0, prompt_cache=cache):
        pass
    save_prompt_cache(str(tmp_path / FILE), cache, {"model": "base", "tokenizer_config": "{}"})
    prompt = FORMAT.read(Files(tmp_path / FILE), base.geometry)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([text + more])).logits[0, len(text) :]
        bare = model(input_ids=torch.tensor([more])).logits[0]
        found = sb.attach(model, prompt)(input_ids=torch.tensor([more])).logits[0]
    assert (found - expected).abs().max() < 1e-4
    assert (bare - expected).abs().max() > 0.1


# --- the server -------------------------------------------------------------------------------------------------------


class Opened:
    """A Llama in a directory, and two prompts for it."""

    def __init__(self, folder: Path) -> None:
        self.base = base_of("llama")
        self.folder, self.scratch = folder / "base", folder / "scratch"
        self.scratch.mkdir()
        self.base.weights(torch.float32).save_pretrained(self.folder)
        self.prompts = {}
        for name, length in (("five", 5), ("nine", 9)):
            path = folder / f"{name}.safetensors"
            path.write_bytes(bytes(FORMAT.write(random_prefix(self.base.geometry, length), self.base.geometry)[FILE]))
            self.prompts[name] = path

    def open(self, **more: Path) -> Any:
        return SERVER.open(self.folder, {**self.prompts, **more}, self.scratch)


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    return Opened(tmp_path)


def test_a_prompt_is_not_used_up_and_rows_keep_their_order(opened: Opened) -> None:
    requests = [Request((5, 6, 7), "nine"), Request((8,)), Request((9, 10, 11, 12), "five"), Request((5, 6, 7), "nine")]
    with opened.open() as ask:
        alone = [ask([one], 5)[0] for one in requests]
        for _ in range(2):
            for one, other in zip(ask(requests, 5), alone, strict=True):
                assert one.tokens.tolist() == other.tokens.tolist()
                assert one.log_probabilities.shape == (5, 96)
                assert one.log_probabilities.dtype == np.float64
                assert np.abs(one.log_probabilities - other.log_probabilities).max() < 1e-4
                assert np.allclose(np.exp(one.log_probabilities).sum(1), 1, atol=1e-4)
                assert one.tokens.tolist() == one.log_probabilities.argmax(1).tolist()
    assert alone[0].tokens.tolist() == alone[3].tokens.tolist()
    assert np.abs(alone[0].log_probabilities - alone[1].log_probabilities).max() > 0.1


def test_a_prompt_that_is_not_known_is_never_served_bare(opened: Opened) -> None:
    with opened.open() as ask:
        for requests in ([Request((5, 6), "ten")], [Request((5, 6)), Request((5, 6), "ten")]):
            with pytest.raises(EngineError, match=r"no prompt is called 'ten'\n  expected: one of five, nine"):
                ask(requests, 2)


def test_a_prompt_for_another_model_does_not_open(opened: Opened, tmp_path: Path) -> None:
    other = BaseModel.resolve(config_of("llama", num_key_value_heads=4)).geometry
    (tmp_path / "other.safetensors").write_bytes(bytes(FORMAT.write(random_prefix(other), other)[FILE]))
    with (
        pytest.raises(EngineError, match=r"the prompt 'other': .*does not fit"),
        opened.open(other=tmp_path / "other.safetensors"),
    ):
        pass
    gemma = BaseModel.resolve(config_of("gemma3_text")).geometry
    windowed = replace(gemma, model_type="gemma3_text")
    (tmp_path / "w.safetensors").write_bytes(bytes(FORMAT.write(random_prefix(windowed), windowed)[FILE]))
    with (
        pytest.raises(EngineError, match=r"the prompt 'w': caches with windows of 8"),
        opened.open(w=tmp_path / "w.safetensors"),
    ):
        pass
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    with pytest.raises(EngineError, match="the prompt 'none'"), opened.open(none=tmp_path / "none.safetensors"):
        pass


def test_the_older_layout_is_not_loaded_by_this_release(opened: Opened, tmp_path: Path) -> None:
    content = as_bytes(FORMAT.write(random_prefix(opened.base.geometry), opened.base.geometry, "safetensors-0.31"))
    (tmp_path / "older.safetensors").write_bytes(content[FILE])
    with (
        pytest.raises(EngineError, match="does not load the prompt 'older'"),
        opened.open(older=tmp_path / "older.safetensors"),
    ):
        pass


def test_a_folder_is_a_prompt_as_its_one_file(opened: Opened, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / FILE).write_bytes(opened.prompts["five"].read_bytes())
    (folder / "softbridge.json").write_text("{}")
    with opened.open(folder=folder) as ask:
        one, other = (ask([Request((5, 6, 7), name)], 3)[0] for name in ("folder", "five"))
        assert np.array_equal(one.log_probabilities, other.log_probabilities)


def test_a_text_beyond_a_window_that_mlx_lm_has_not_is_refused(tmp_path: Path) -> None:
    base = base_of("mistral", sliding_window=16)
    base.weights(torch.float32).save_pretrained(tmp_path / "base")
    prompt = lowered(random_prefix(base.geometry, 5), base)
    (tmp_path / FILE).write_bytes(bytes(FORMAT.write(prompt, base.geometry)[FILE]))
    with SERVER.open(tmp_path / "base", {"it": tmp_path / FILE}, tmp_path) as ask:
        ask([Request((5,) * 8, "it")], 3)
        with pytest.raises(EngineError, match=r"17 tokens, .* and mlx-lm has no sliding window"):
            ask([Request((5,) * 9, "it")], 3)


def test_a_text_beyond_a_table_of_positions_is_refused(tmp_path: Path) -> None:
    base = base_of("gpt2", n_positions=16)
    base.weights(torch.float32).save_pretrained(tmp_path / "base")
    (tmp_path / FILE).write_bytes(bytes(FORMAT.write(random_prefix(base.geometry, 5), base.geometry)[FILE]))
    with SERVER.open(tmp_path / "base", {"it": tmp_path / FILE}, tmp_path) as ask:
        ask([Request((5,) * 8, "it")], 3)
        with pytest.raises(EngineError, match=r"17 tokens, .* and a table of 16 positions"):
            ask([Request((5,) * 9, "it")], 3)


def test_rows_keep_their_precision_beside_a_prompt_in_less(opened: Opened, tmp_path: Path) -> None:
    short = narrowed(random_prefix(opened.base.geometry, 5, seed=1), BFLOAT16)
    (tmp_path / "short.safetensors").write_bytes(bytes(FORMAT.write(short, opened.base.geometry)[FILE]))
    with opened.open(short=tmp_path / "short.safetensors") as ask:
        (alone,) = ask([Request((5, 6, 7), "nine")], 4)
        together = ask([Request((5, 6, 7), "short"), Request((5, 6, 7), "nine")], 4)
    assert np.abs(together[1].log_probabilities - alone.log_probabilities).max() < 1e-4


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("bloom", {}, "mlx-lm has no model of bloom"),
        ("jamba", {}, "keeps more of a text than keys and values"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3}, "windows of"),
    ],
)
def test_what_mlx_lm_does_not_serve_is_an_obstacle(family: str, changes: Mapping[str, Any], reason: str) -> None:
    config = config_of(family, **changes)
    (found,) = SERVER.obstacles(config)
    assert reason in found.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_served_meets_no_obstacle_and_the_table_of_windows_is_mlx_lms(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family)
    assert not SERVER.obstacles(config)
    shape = read_geometry(config).decoder
    assert shape is not None
    if shape.window is not None:
        monkeypatch.setitem(FAMILIES, family, not FAMILIES[family])
        (found,) = SERVER.obstacles(config)
        assert found.name == "window"


# --- conversions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With the base angle that mlx-lm takes if it finds none: what it loads by itself is the same model."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    base_of("llama", rope_parameters=rope).weights(torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_conversion_is_proven_by_mlx_lm(kind: str, directory: Path, tmp_path: Path) -> None:
    prompt = MAKERS[kind](BaseModel.resolve(directory).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=directory)
    report = sb.convert(tmp_path / "peft", tmp_path / "out", "mlx", base=directory, verify=True)
    assert report.served is not None
    check(report.served)
    assert report.certificate is not None
    assert report.certificate.same
    assert report.served.weights == ("the model's own" if kind == "prompt" else "random, seed 0")
    back = sb.load(tmp_path / "out", base=directory)
    assert back.origin is not None
    assert back.origin.format == "mlx"


def test_files_that_mlx_lm_answers_otherwise_are_not_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prefix(BaseModel.resolve(directory).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=directory)

    def wrong(caches: Any, given: Any, layout: Any, write: Callable[..., Streamed]) -> Streamed:
        return write([replace(one, keys=one.keys[:, ::-1]) for one in caches], given, layout)

    from softbridge_mlx import prompt_cache

    write = prompt_cache.write
    monkeypatch.setattr(prompt_cache, "write", lambda c, g, layout: wrong(c, g, layout, write))
    with pytest.raises(OutputError, match="different"):
        sb.convert(tmp_path / "peft", tmp_path / "out", "mlx", base=directory, verify=True)
    assert not (tmp_path / "out").exists()


def continuation(model: Any) -> str:
    ids = torch.tensor([[5, 17, 33]])
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return " ".join(f"w{n}" for n in ids[0, 3:].tolist())


def test_mlx_lms_own_command_goes_on_from_our_file(directory: Path, tmp_path: Path) -> None:
    """`mlx_lm.generate`, as a user calls it: the greedy tokens are those of transformers with the prompt."""
    words = {f"w{n}": n for n in range(96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(directory)
    base = BaseModel.resolve(directory)
    sb.save(random_prefix(base.geometry), tmp_path / "out", format="mlx", base=base)
    model = base.weights(torch.float32)
    without = continuation(model)
    expected = continuation(sb.attach(model, sb.load(tmp_path / "out", base=base)))
    command = [sys.executable, "-m", "mlx_lm", "generate", "--prompt-cache-file", str(tmp_path / "out" / FILE)]
    command += ["--ignore-chat-template", "--prompt", "w5 w17 w33", "--max-tokens", "6", "--verbose", "False"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
    assert expected != without


def test_the_command_line_names_the_server(directory: Path, tmp_path: Path) -> None:
    prompt = random_input_prompt(BaseModel.resolve(directory).geometry)
    sb.save(prompt, tmp_path / "peft", format="peft", base=directory)
    command = ["convert", str(tmp_path / "peft"), str(tmp_path / "out"), "--to", "mlx", "--base", str(directory)]
    done = CliRunner().invoke(app, [*command, "--verify", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["served"]["server"] == "mlx"
    assert sorted(LAYOUTS) == sorted(FORMAT.encodings)
