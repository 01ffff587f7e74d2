"""llama.cpp itself answers with states that were written for it, and is held to transformers within its own noise."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, logging

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import EngineError, OutputError
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.serving import Request
from softbridge.prompt import KeyValuePrefix
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification.serving import Serving, judge
from softbridge_llamacpp import base_file, families, format, functions, state
from softbridge_llamacpp.format import ENCODINGS, FORMAT
from softbridge_llamacpp.functions import PACKAGES
from softbridge_llamacpp.library import Cache, Context, Row, loaded
from softbridge_llamacpp.server import SERVER

pytestmark = pytest.mark.skipif(SERVER.unavailable() is not None, reason=str(SERVER.unavailable()))

MAKERS: dict[str, Callable[..., sb.SoftPrompt]] = {"prefix": random_prefix, "prompt": random_input_prompt}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
#: Family -> (its configuration, the most that llama.cpp may be off by itself). It has gelu from a table in f16.
FAMILIES = {
    "llama": (lambda: tiny_config("llama"), 2e-5),
    "llama of 3.1": (lambda: tiny_config("llama", **LLAMA3), 2e-5),
    "mistral": (lambda: AutoConfig.for_model("mistral", **{**SIZES, "sliding_window": None}), 2e-5),
    "qwen2": (lambda: AutoConfig.for_model("qwen2", **SIZES), 2e-5),
    "qwen3": (lambda: tiny_config("qwen3"), 2e-5),
    "gemma": (lambda: AutoConfig.for_model("gemma", **{**SIZES, "head_dim": 12}), 5e-2),
    "gpt2": (lambda: tiny_config("gpt2"), 2e-2),
}
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
}
TEXT = (5, 17, 40, 3, 88)


@pytest.fixture(autouse=True)
def no_progress() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def judged(config: Any, make: Callable[..., sb.SoftPrompt], dtype: str | None = None, **options: Any) -> Serving:
    base = BaseModel(tiny_weights(config).config, model=tiny_weights(config))
    target = Target(FORMAT.name, FORMAT.capabilities, base, dtype)
    prompt = lower(make(base.geometry, 7, std=1.0), target, (), FORMAT.obstacles).prompt
    return judge(FORMAT, prompt, base, weights=True, **options)


def tiny_weights(config: Any) -> Any:
    return BaseModel(config).structure(torch.float32, 0)


# --- what is served ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_as_transformers_does(family: str, kind: str) -> None:
    """Alone, and in one batch with bare texts and with other prompts."""
    make, most = FAMILIES[family]
    found = judged(make(), MAKERS[kind])
    print(found.summary(), f"strain {found.strain:.1f}", {fault.name: f"{fault.moved:.1e}" for fault in found.faults})
    assert found.verdict == "served", found.summary()
    assert found.noise < most
    assert {"keys and values swapped", "two layers swapped"} <= {fault.name for fault in found.faults}
    assert ("shifted by one position" in found.untried) == (family == "gpt2")


def test_rotary_factors_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of the family above would show, if they were left out."""
    monkeypatch.setattr(base_file, "_FACTORS", ())
    assert SERVER.obstacles(tiny_config("llama", **LLAMA3))
    monkeypatch.undo()
    tensors = base_file._tensors
    monkeypatch.setattr(
        base_file, "_tensors", lambda *given: (pair for pair in tensors(*given) if pair[0] != base_file._RESCALED)
    )
    assert judged(tiny_config("llama", **LLAMA3), random_prefix).noise > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("encoding", [name for name in FORMAT.encodings if "-v" not in name])
def test_every_cache_that_a_file_can_be_for(encoding: str, dtype: str) -> None:
    found = judged(tiny_config("qwen3"), random_prefix, dtype, encoding=encoding)
    print(encoding, dtype, found.summary())
    assert max(found.alone, found.batch, found.bare) <= found.bound
    assert found.effect > 10 * found.bound
    exact = (encoding, dtype) == ("flash-off", "float32")
    assert (found.noise < 1e-4) == exact


def test_a_conversion_is_proven_by_llama_cpp(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    geometry = BaseModel.resolve(base).geometry
    for kind, make in MAKERS.items():
        sb.save(make(geometry), tmp_path / kind, format="softbridge", base=base)
        report = sb.convert(tmp_path / kind, tmp_path / f"{kind}-out", "llamacpp", base=base, verify=True)
        assert report.served is not None
        assert report.served.verdict == "served"
        assert report.certificate is not None
        assert (tmp_path / f"{kind}-out" / "prompt.bin").exists()
        assert sb.load(tmp_path / f"{kind}-out", base=base).prefixes[0].length == 5


# --- what is wrong is noticed -----------------------------------------------------------------------------------------


def unpermuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "paired", lambda keys: keys)


def permuted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "paired", lambda keys: families.paired(families.paired(keys)))


def transposed_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """[P, K·D] where a cache has [K·D, P]."""
    packed = state._packed
    monkeypatch.setattr(
        state, "_packed", lambda rows: packed(rows.T.reshape(rows.shape) if rows.flags.f_contiguous else rows)
    )


def heads_behind_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "_rows", lambda heads: heads.transpose(1, 2, 0).reshape(heads.shape[1], -1))


def layers_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    write = FORMAT.write

    def other(prompt: sb.SoftPrompt, *rest: Any) -> Any:
        layers = dict(prompt.prefixes[0].layers)
        layers[0], layers[2] = layers[2], layers[0]
        return write(replace(prompt, parts=(KeyValuePrefix("self", layers),)), *rest)

    monkeypatch.setattr(type(FORMAT), "write", lambda self, *given: other(*given))


def keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of two layers, without their values."""
    made = format.to_bytes

    def other(told: state.State) -> bytes:
        return made(replace(told, keys=[told.keys[1], told.keys[0], *told.keys[2:]]))

    monkeypatch.setattr(format, "to_bytes", other)


@pytest.mark.parametrize(
    "fault",
    [unpermuted, permuted_twice, transposed_wrongly, heads_behind_channels, layers_swapped, keys_alone],
    ids=lambda fault: fault.__name__,
)
def test_a_layout_that_is_wrong_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    found = judged(tiny_config("llama"), random_prefix)
    print(fault.__name__, found.summary())
    assert found.verdict != "served"  # where the writer swaps layers, the fault that swaps them is the right prompt
    assert found.alone > 1000 * found.bound
    assert found.bare <= found.bound


def test_a_conversion_with_a_wrong_layout_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float32)
    sb.save(random_prefix(BaseModel.resolve(model).geometry), tmp_path / "source", format="softbridge", base=model)
    unpermuted(monkeypatch)
    with pytest.raises(OutputError, match="different by llamacpp"):
        sb.convert(tmp_path / "source", tmp_path / "out", "llamacpp", base=model, verify=True)
    assert not (tmp_path / "out").exists()


# --- what does not fit is refused by llama.cpp ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a Llama's, with its file for llama.cpp beside it."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", torch.float32).save_pretrained(folder / "base")
    base_file.write(folder / "base", folder / "base.gguf")
    return folder


def file_of(folder: Path, config: Any, encoding: str | None = None, dtype: Any = np.float32) -> Path:
    geometry = BaseModel(config).geometry
    prompt = random_prefix(geometry)
    (part,) = prompt.prefixes
    layers = {n: replace(p, keys=p.keys.astype(dtype), values=p.values.astype(dtype)) for n, p in part.layers.items()}
    content = FORMAT.write(replace(prompt, parts=(KeyValuePrefix("self", layers),)), geometry, encoding)
    path = folder / "prompt.bin"
    path.write_bytes(content["prompt.bin"])
    return path


#: What is wrong -> (the file, the cache, llama.cpp's words).
MISFITS: dict[str, tuple[Callable[[Path], Path], Cache, str]] = {
    "with flash attention": (
        lambda folder: file_of(folder, tiny_config("llama"), "flash-off"),
        Cache(),
        "incompatible V transposition",
    ),
    "without flash attention": (
        lambda folder: file_of(folder, tiny_config("llama"), "flash-on"),
        Cache(transposed=True),
        "incompatible V transposition",
    ),
    "a cache of f16": (
        lambda folder: file_of(folder, tiny_config("llama")),
        Cache(1, 1, transposed=True),
        r"mismatched key type \(1 != 0, layer 0\)",
    ),
    "values of f16": (
        lambda folder: file_of(folder, tiny_config("llama")),
        Cache(0, 1, transposed=True),
        r"mismatched value type \(1 != 0, layer 0\)",
    ),
    "a file of f16": (
        lambda folder: file_of(folder, tiny_config("llama"), None, np.float16),
        Cache(transposed=True),
        r"mismatched key type \(0 != 1, layer 0\)",
    ),
    "a stream for each sequence": (
        lambda folder: file_of(folder, tiny_config("llama")),
        Cache(transposed=True, unified=False),
        "n_stream mismatch",
    ),
    "a layer less": (
        lambda folder: file_of(folder, tiny_config("llama", num_hidden_layers=2)),
        Cache(transposed=True),
        r"mismatched layer count \(2 instead of 3\)",
    ),
    "twice as many heads": (
        lambda folder: file_of(folder, tiny_config("llama", num_key_value_heads=4)),
        Cache(transposed=True),
        r"mismatched key row size \(64 != 128, layer 0\)",
    ),
    "an older version": (
        lambda folder: file_of(folder, tiny_config("llama"), "flash-off-v2"),
        Cache(transposed=True),
        r"unknown \(magic, version\) for sequence state file: 67677371, 00000002",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_match_is_refused_at_loading(what: str, base: Path, tmp_path: Path) -> None:
    make, cache, words = MISFITS[what]
    path = make(tmp_path)
    with loaded(base / "base.gguf") as model, model.context(2, 256, 16, cache, 1) as context:
        with pytest.raises(EngineError, match=words):
            context.restore(path, 0, 64)
        assert context.length(0) == 0  # nothing of it is left in the cache
        bare = decoded(context, 1)
    with loaded(base / "base.gguf") as model, model.context(2, 256, 16, cache, 1) as context:
        assert (decoded(context, 1) == bare).all()


def decoded(context: Context, sequence: int) -> Any:
    return context.decode([Row(sequence, at, token, at == 4) for at, token in enumerate(TEXT)])


def test_the_same_file_is_taken_by_the_cache_that_it_is_for(base: Path, tmp_path: Path) -> None:
    for encoding, (transposed, version) in ENCODINGS.items():
        path = file_of(tmp_path, tiny_config("llama"), encoding)
        cache = Cache(transposed=transposed)
        with loaded(base / "base.gguf") as model, model.context(2, 256, 16, cache, 1) as context:
            if version == version_of(context, tmp_path):
                assert context.restore(path, 0, 64) == 5
                assert context.length(0) == 5
            else:
                with pytest.raises(EngineError, match=r"unknown \(magic, version\)"):
                    context.restore(path, 0, 64)


def version_of(context: Context, folder: Path) -> int:
    """Of the form that the library writes."""
    context.save(folder / "empty", 1, [])
    return int.from_bytes((folder / "empty").read_bytes()[4:8], "little")


def test_what_llama_cpp_cannot_know_is_not_refused(base: Path, tmp_path: Path) -> None:
    """Whose heads they are, and of which order: no file says it. The advice does."""
    path = file_of(tmp_path, tiny_config("qwen3", head_dim=8))
    with loaded(base / "base.gguf") as model, model.context(1, 256, 16, Cache(transposed=True), 1) as context:
        assert context.restore(path, 0, 64) == 5
    config = tiny_config("qwen3")
    assert any(
        "does not say for which model" in line
        for line in FORMAT.advice(random_prefix(BaseModel(config).geometry), None)
    )


# --- the server's own errors ------------------------------------------------------------------------------------------


def opened(base: Path, prompts: dict[str, Path], folder: Path) -> Any:
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return SERVER.open(base / "base", prompts, scratch)


def test_an_unknown_prompt_is_never_served_bare(base: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, tiny_config("llama"))
    with opened(base, {"mood": path}, tmp_path) as ask:
        bare, right = ask([Request(TEXT), Request(TEXT, "mood")], 3)
        assert np.abs(bare.log_probabilities - right.log_probabilities).max() > 0.1
        with pytest.raises(EngineError, match="no prompt is called 'other'"):
            ask([Request(TEXT), Request(TEXT, "other")], 3)
        again = ask([Request(TEXT, "mood")], 3)[0]
        assert np.abs(again.log_probabilities - right.log_probabilities).max() < 1e-4
        assert right.log_probabilities.shape == (3, 96)
        assert np.allclose(np.exp(right.log_probabilities).sum(-1), 1)


def test_what_is_not_for_the_base_is_refused_when_the_server_starts(base: Path, tmp_path: Path) -> None:
    wrong = file_of(tmp_path, tiny_config("llama", num_hidden_layers=2))
    with pytest.raises(EngineError, match="mismatched layer count"), opened(base, {"mood": wrong}, tmp_path):
        pass
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(wrong.read_bytes()[:100])
    with pytest.raises(EngineError, match="ends in"), opened(base, {"mood": damaged}, tmp_path):
        pass
    damaged.write_bytes(b"no state at all")
    with pytest.raises(EngineError, match="0 states"), opened(base, {"mood": damaged}, tmp_path):
        pass
    with (
        pytest.raises(EngineError, match="neither a file nor a folder"),
        opened(base, {"mood": tmp_path / "no"}, tmp_path),
    ):
        pass


def test_prompts_for_two_kinds_of_cache_are_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    paths = {
        "one": file_of(tmp_path, tiny_config("llama")),
        "half": file_of(tmp_path / "half", tiny_config("llama"), None, np.float16),
    }
    with pytest.raises(EngineError, match="2 kinds of cache"), opened(base, paths, tmp_path):
        pass


def test_more_texts_than_llama_cpp_has_sequences_are_answered(base: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path, tiny_config("llama"))
    with opened(base, {"mood": path}, tmp_path) as ask:
        answers = ask([Request(TEXT, "mood" if n % 2 else None) for n in range(258)], 2)
        alone = [ask([Request(TEXT, name)], 2)[0] for name in (None, "mood")]
    assert len(answers) == 258
    for n, answer in enumerate(answers):
        assert np.abs(answer.log_probabilities - alone[n % 2].log_probabilities).max() < 1e-4


def test_positions_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    """GPT-2's are embedded: llama.cpp would end the process. A window is one that llama.cpp does not have."""
    for name, config in {
        "gpt2": tiny_config("gpt2", n_positions=16),
        "mistral": AutoConfig.for_model("mistral", **{**SIZES, "sliding_window": 16}),
    }.items():
        folder = tmp_path / name
        tiny_weights(config).save_pretrained(folder / "base")
        with opened(folder, {}, tmp_path) as ask:
            assert len(ask([Request(TEXT * 3)], 2)[0].tokens) == 2
            with pytest.raises(EngineError, match="at most 16 positions"):
                ask([Request(TEXT * 3)], 3)


def test_a_file_of_llama_cpps_in_the_directory_is_taken(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "base", tmp_path / "mine" / "base")
    with opened(base, {}, tmp_path) as ask:
        expected = ask([Request(TEXT)], 1)[0]
    shutil.copy(base / "base.gguf", tmp_path / "mine" / "base" / "mine.gguf")
    (tmp_path / "mine" / "base" / "model.safetensors").unlink()
    with opened(tmp_path / "mine", {}, tmp_path) as ask:
        assert (ask([Request(TEXT)], 1)[0].log_probabilities == expected.log_probabilities).all()
    (tmp_path / "mine" / "base" / "mine.gguf").write_bytes(b"GGUF of no kind")
    with pytest.raises(EngineError, match=r"does not load mine\.gguf"), opened(tmp_path / "mine", {}, tmp_path):
        pass


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt_neox", {}, "no conversion of gpt_neox"),
        ("llama", {"hidden_act": "gelu"}, "no gelu in its feed-forward"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "kind 'dynamic'"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "kind 'linear'"),
        ("qwen3", {"attention_bias": True}, "no attention_bias"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "no scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "not divided by the root"),
        ("gpt2", {"activation_function": "relu"}, "no relu"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_an_obstacle(family: str, changes: dict[str, Any], words: str) -> None:
    found = SERVER.obstacles(tiny_config(family, **changes))
    assert any(words in obstacle.reason for obstacle in found)
    assert not SERVER.obstacles(tiny_config("llama"))


# --- llama-server -----------------------------------------------------------------------------------------------------


def with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the base model's file words, without which llama-server says nothing."""
    import gguf

    plain = gguf.GGUFWriter.add_tokenizer_model

    def add(writer: Any, _: str) -> None:
        plain(writer, "llama")
        writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"w{n}".encode() for n in range(3, 96))])
        writer.add_token_scores([0.0] * 96)
        writer.add_token_types([2, 3, 3] + [1] * 93)
        writer.add_add_bos_token(False)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_model", add)


def test_llama_server_restores_a_file_into_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, by its own interface: a prompt in a slot, a text behind a placeholder for each virtual token."""
    xllamacpp = pytest.importorskip("xllamacpp")
    model = tiny_model("llama", torch.float32)
    prompt = random_prefix(BaseModel.resolve(model).geometry, 6)
    model.save_pretrained(tmp_path / "base")
    with_words(monkeypatch)
    base_file.write(tmp_path / "base", tmp_path / "base.gguf")
    sb.save(prompt, tmp_path / "slots", format="llamacpp", base=model)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(tmp_path / "base.gguf")
    settings.slot_save_path = f"{tmp_path / 'slots'}/"
    settings.n_ctx, settings.n_parallel, settings.kv_unified, settings.warmup = 256, 1, True, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings.port = free.getsockname()[1]
    server = xllamacpp.Server(settings)

    def post(path: str, **body: Any) -> Any:
        content = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def complete(ids: list[int]) -> Any:
        options = {"n_predict": 4, "temperature": 0, "n_probs": 96, "samplers": ["temperature"], "return_tokens": True}
        return post("/completion", prompt=ids, id_slot=0, cache_prompt=True, **options)

    assert post("/slots/0?action=restore", filename="prompt.bin")["n_restored"] == 6
    found = complete([format.PLACEHOLDER] * 6 + list(TEXT))
    assert found["timings"]["prompt_n"] == len(TEXT)  # the prompt was not run: it was there
    running, ids = sb.attach(model, prompt, self_check=False), list(TEXT)
    for token, step in zip(found["tokens"], found["completion_probabilities"], strict=True):
        with torch.no_grad():
            expected = running(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        ids.append(int(expected.argmax()))
        assert token == ids[-1]
        told = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
        assert sorted(told) == list(range(96))
        assert max(abs(told[n] - float(expected[n])) for n in told) < 1e-4
    # What the advice warns of: without the placeholders the prompt is dropped.
    assert complete(list(TEXT))["tokens"] != found["tokens"]


# --- the other library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_each_library_serves_the_version_that_it_reads(
    package: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{PACKAGES[package]} is not installed")
    monkeypatch.setattr(functions, "module", lambda: package)
    with loaded(base / "base.gguf") as model, model.context(2, 256, 16, Cache(), 1) as context:
        version = version_of(context, tmp_path)
    encoding = next(name for name, told in ENCODINGS.items() if told == (True, version))
    for make in MAKERS.values():
        found = judged(tiny_config("llama"), make, encoding=encoding)
        print(PACKAGES[package], encoding, found.summary())
        assert found.verdict == "served"
    other = next(name for name, told in ENCODINGS.items() if told[1] != version)
    with pytest.raises(EngineError, match=r"unknown \(magic, version\)"):
        judged(tiny_config("llama"), random_prefix, encoding=other)
