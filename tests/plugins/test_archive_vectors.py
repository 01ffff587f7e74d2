"""Vectors in the input, as other toolkits keep them: Google in T5X, TensorRT-LLM, TGIS, NeMo, bare tensors.

References are written from each toolkit's definition, with torch and a bare transformers model alone. Real files lie
beside the checkout, or where SOFTBRIDGE_SHARED says.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import struct
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from torch import Tensor, nn

import softbridge as sb
from softbridge.arrays import BFLOAT16, to_torch
from softbridge.base import BaseModel, build
from softbridge.checkpoint.inspect import inspect
from softbridge.checkpoint.read import read, recognise
from softbridge.errors import (
    BaseModelError,
    CheckpointError,
    EngineError,
    LoweringError,
    SoftbridgeError,
    UnknownFormatError,
)
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.registry import formats
from softbridge.prompt import Positions, SoftPrompt
from softbridge.template import Field, Virtual
from softbridge.testing import agreement, apart, tiny_config, tiny_model
from softbridge.untrusted import Files
from softbridge.verification.judge import FLOAT32_BOUND
from softbridge_archive.tensor import CHOICES

SHARED = Path(os.environ.get("SOFTBRIDGE_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
REAL = pytest.mark.skipif(not SHARED.is_dir(), reason="the real prompts are not beside this checkout")


def rows(length: int, seed: int = 0, width: int | None = None) -> np.ndarray:
    width = width or int(BaseModel(tiny_config("gpt2")).geometry.hidden)
    return np.random.default_rng(seed).normal(size=(length, width)).astype(np.float32)


def npy(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        np.save(stream, array)
    return path


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def text(seed: int, length: int, batch: int = 2) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def native(model: Any, prompt: SoftPrompt, **inputs: Tensor) -> Tensor:
    attached = sb.attach(model, prompt)
    try:
        with torch.no_grad():
            logits: Tensor = attached(**inputs).logits
        return logits
    finally:
        sb.detach(attached)


def embedded(model: Any, ids: Tensor, array: np.ndarray) -> tuple[Tensor, Tensor]:
    """The vectors, once for each row, and the embedded words."""
    return to_torch(array, torch.float64).expand(len(ids), -1, -1), model.get_input_embeddings()(ids)


def check(model: Any, prompt: SoftPrompt, expected: Tensor, wrong: Mapping[str, SoftPrompt], **inputs: Tensor) -> None:
    """The native engine computes what was expected, and something far from it with every wrong prompt."""
    bound = agreement(model)
    with torch.no_grad():
        assert apart(model(**inputs).logits, expected) > 0.01, "the prompt does not matter"
    assert apart(native(model, prompt, **inputs), expected) <= bound
    for name, other in wrong.items():
        assert apart(native(model, other, **inputs), expected) > 1000 * bound, name


def twins(prompt: SoftPrompt) -> dict[str, SoftPrompt]:
    """The prompt with its vectors in another order, without one, and with real tokens elsewhere."""
    (part,) = prompt.inputs
    rolled = replace(part, vectors=np.roll(part.vectors, 1, axis=0))
    found = {"rolled": replace(prompt, parts=(rolled,), training=None)}
    if part.template is None:
        start = {part.stack: prompt.positions.start[part.stack] - 1}
        fewer = replace(part, vectors=part.vectors[1:])
        found["dropped"] = replace(
            prompt, parts=(fewer,), positions=replace(prompt.positions, start=start), training=None
        )
    return found


# --- real files -------------------------------------------------------------------------------------------------------


def t5_base(**changes: Any) -> Any:
    """The width of t5-base, on few layers."""
    from transformers import T5Config

    sizes = {"d_model": 768, "d_kv": 64, "num_heads": 12, "num_layers": 1, "num_decoder_layers": 1, "d_ff": 64}
    return T5Config(**{**sizes, "vocab_size": 128, "decoder_start_token_id": 0, **changes})


def roberta_base(**changes: Any) -> Any:
    from transformers import RobertaConfig

    sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1, "intermediate_size": 64}
    return RobertaConfig(
        **{**sizes, "vocab_size": 128, "max_position_embeddings": 514, "type_vocab_size": 1, **changes}
    )


def tiny_roberta(longest: int = 64) -> Any:
    return roberta_base(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=longest)


def bloom_560m(layers: int = 1) -> Any:
    from transformers import BloomConfig

    return BloomConfig(hidden_size=1024, n_head=16, n_layer=layers, vocab_size=128)


def tiny_llama() -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    return LlamaConfig(**sizes, vocab_size=128)


#: Path, the format that recognises it, the one that reads it, its base.
FOUND: list[tuple[str, str, str, Callable[[], Any]]] = [
    ("attempt/record_prefix_embeddings.pt", "bare-tensor", "attempt", t5_base),
    ("tgis/bloom_sentiment_1", "tgis", "tgis", bloom_560m),
    ("tgis/bloom_sentiment_1/decoder.pt", "tgis", "tgis", bloom_560m),
    ("tgis/tinyllama", "tgis", "tgis", tiny_llama),
    ("tgis/tinyllama_peft_adapter_raw", "tgis", "tgis", tiny_llama),
    ("google_prompt_tuning/t5_1_1_lm100k_base/sst2.npy", "google", "google", t5_base),
    ("google_prompt_tuning/t5_1_1_lm100k_base/mrpc.npy", "google", "google", t5_base),
]


@cache
def base_model(make: Callable[[], Any]) -> Any:
    config = make()
    task = {"t5": "seq2seq-lm", "roberta": "masked-lm"}.get(config.model_type, "causal-lm")
    return build(config, task, torch.float64, 0)


def in_peft(model: Any, folder: Path, vectors: np.ndarray) -> None:
    """PEFT, from the written files, is the vectors put in front of the embedded text by hand."""
    import copy

    peft = pytest.importorskip("peft")
    ids = text(0, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": text(1, 3)} if model.config.is_encoder_decoder else {}

    def by_hand(array: np.ndarray) -> Tensor:
        front, words = embedded(model, ids, array)
        whole = torch.cat([torch.ones(2, len(array), dtype=mask.dtype), mask], 1)
        with torch.no_grad():
            logits: Tensor = model(inputs_embeds=torch.cat([front, words], 1), attention_mask=whole, **more).logits
        return logits[:, -(3 if more else 6) :]

    expected = by_hand(vectors)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    with torch.no_grad():
        logits = loaded(input_ids=ids, attention_mask=mask, **more).logits[:, -expected.shape[1] :]
    assert torch.equal(logits, expected)
    for wrong in (np.roll(vectors, 1, axis=0), vectors[1:]):
        assert apart(by_hand(wrong), expected) > 1e-6
    assert apart(by_hand(vectors[:1] * 0), expected) > 1e-3


@REAL
@pytest.mark.parametrize(("path", "recognised", "name", "make"), FOUND, ids=[row[0] for row in FOUND])
def test_a_released_prompt_runs_in_peft_as_if_prepended_by_hand(
    path: str, recognised: str, name: str, make: Callable[[], Any], tmp_path: Path
) -> None:
    model = base_model(make)
    source = SHARED / path
    told = inspect(source)
    assert told["format"] == recognised
    assert (told["needs_base"] is None) == (recognised != "bare-tensor")
    shown = inspect(source, base=model.config, format=name)
    assert shown["parts"][0]["shape"][1] == model.get_input_embeddings().weight.shape[1]
    report = sb.convert(source, tmp_path / "out", "peft", base=model.config, format=name)
    assert all(step.exactness == "exact" for step in report.steps)
    in_peft(model, tmp_path / "out", report.source.prompt.inputs[0].vectors)


@REAL
def test_a_released_prompt_of_peft_goes_to_tgis_and_back(tmp_path: Path) -> None:
    """Its file is for 24 layers, of which a prompt in the input knows nothing: it runs on one."""
    source = SHARED / "peft_bloomz_560m_prompt"
    assert inspect(source)["format"] == "peft"
    sb.convert(source, tmp_path / "decoder.pt", "tgis", base=bloom_560m(24))
    vectors = torch.load(tmp_path / "decoder.pt")
    assert torch.equal(vectors, torch.load(source / "adapter_model.bin")["prompt_embeddings"])
    model = base_model(bloom_560m)
    sb.convert(tmp_path / "decoder.pt", tmp_path / "peft", "peft", base=model.config)
    in_peft(model, tmp_path / "peft", vectors.numpy())


@REAL
def test_all_prompts_of_a_collection_convert_in_one_run(tmp_path: Path) -> None:
    """Eighteen: nine for T5, in front; nine for RoBERTa, behind the mask as 2.0 has them, and in front."""
    collection = sorted((SHARED / "prompt_transferability").glob("*/task_prompt"))
    assert len(collection) == 18
    first, second = "prompt-transferability", "prompt-transferability:2.0"
    for path in collection:
        assert inspect(path)["format"] == "bare-tensor"
        if path.parent.name.endswith("T5"):
            report = sb.convert(path, tmp_path / path.parent.name, "peft", base=t5_base(), format=first)
            assert report.lowering.prompt.inputs[0].vectors.shape == (100, 768)
            with pytest.raises(BaseModelError, match="for t5"):
                sb.load(path, base=t5_base(), format=second)
            continue
        sb.convert(path, tmp_path / path.parent.name, "peft", base=roberta_base(), format="tensor")
        with pytest.raises(LoweringError, match=r"\[partial\] release 1.0 gives the first 100 places no position"):
            sb.convert(path, tmp_path / "no", "softbridge", base=roberta_base(), format=first)
        sb.convert(path, tmp_path / second / path.parent.name, "softbridge", base=roberta_base(), format=second)
        again = sb.load(tmp_path / second / path.parent.name)
        assert again.inputs[0].placement == "after-first-token"
        assert again.positions.start["encoder"] == 98
        with pytest.raises(LoweringError, match="after-first-token"):
            sb.convert(path, tmp_path / "no", "peft", base=roberta_base(), format=second)
    for kind, make in (("T5", t5_base), ("Roberta", roberta_base)):
        folder = tmp_path / f"SST2Prompt{kind}"
        in_peft(base_model(make), folder, sb.load(folder, base=make()).inputs[0].vectors)


# --- bare tensors -----------------------------------------------------------------------------------------------------


def test_a_bare_tensor_is_recognised_and_refused_until_it_is_said_where_it_stands(tmp_path: Path) -> None:
    path = save(tmp_path / "prompt.bin", torch.from_numpy(rows(5)))
    with pytest.raises(BaseModelError, match="where it stands: give --base and one of --from tensor, tensor:after"):
        sb.load(path, base=tiny_config("gpt2"))
    assert set(CHOICES) < formats().keys()
    for name in CHOICES:
        family = "roberta" if name.endswith("2.0") else "t5" if name in ("attempt", CHOICES[3]) else "gpt2"
        config = tiny_roberta() if family == "roberta" else tiny_config(family)
        width = BaseModel(config).geometry.input_width
        save(path, torch.from_numpy(rows(5, width=width)))
        prompt = sb.load(path, base=config, format=name)
        assert np.array_equal(prompt.inputs[0].vectors, rows(5, width=width))
        assert prompt.origin is not None
        assert prompt.origin.format == name
        if name != "attempt":
            with pytest.raises(BaseModelError):
                sb.load(path, format=name)


@pytest.mark.parametrize("name", ["tensor", "tensor:after-first-token"])
def test_a_stated_tensor_runs_where_it_was_said_to_stand(name: str, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = sb.load(save(tmp_path / "p.pt", torch.from_numpy(rows(5))), base=model.config, format=name)
    ids, first = text(2, 7), int(name.endswith("token"))
    front, words = embedded(model, ids, rows(5))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat([words[:, :first], front, words[:, first:]], 1)).logits
    expected = torch.cat([logits[:, :first], logits[:, first + 5 :]], 1)
    check(model, prompt, expected, twins(prompt), input_ids=ids)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_the_second_release_of_prompt_transferability_numbers_roberta_from_0(padded: bool, tmp_path: Path) -> None:
    model = build(tiny_roberta(), "masked-lm", torch.float64, 0)
    array = rows(5, width=BaseModel(model.config).geometry.input_width)
    path = save(tmp_path / "task_prompt", torch.from_numpy(array))
    prompt = sb.load(path, base=model.config, format="prompt-transferability:2.0")
    ids = text(3, 7)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 5:] = 0
        ids[1, 5:] = model.config.pad_token_id
    front, words = embedded(model, ids, array)
    whole = torch.cat([mask[:, :1], torch.ones(2, 5, dtype=mask.dtype), mask[:, 1:]], 1)
    with torch.no_grad():
        logits = model(
            inputs_embeds=torch.cat([words[:, :1], front, words[:, 1:]], 1),
            attention_mask=whole,
            position_ids=torch.arange(12).expand(2, -1),
        ).logits
    expected = torch.cat([logits[:, :1], logits[:, 6:]], 1)
    bound = agreement(model)
    real = mask.bool()
    others = {**twins(prompt), "RoBERTa's own positions": replace(prompt, positions=Positions({"encoder": 5}))}
    assert apart(native(model, prompt, input_ids=ids, attention_mask=mask)[real], expected[real]) <= bound
    for key, one in others.items():
        wrong = native(model, one, input_ids=ids, attention_mask=mask)[real]
        assert apart(wrong, expected[real]) > 1000 * bound, key


def test_the_first_release_of_prompt_transferability_is_another_function_than_the_one_that_is_read(
    tmp_path: Path,
) -> None:
    """Of RoBERTa: the mask replaces the first vector, and what stands in the first 100 places has no positions."""
    model = build(tiny_roberta(120), "masked-lm", torch.float64, 0)
    array = rows(100, width=BaseModel(model.config).geometry.input_width)
    path = save(tmp_path / "task_prompt", torch.from_numpy(array))
    prompt = sb.load(path, base=model.config, format="prompt-transferability")
    assert np.array_equal(prompt.inputs[0].vectors, array[1:])
    ids = text(3, 7)
    front, words = embedded(model, ids, array[1:])
    row = torch.cat([words[:, :1], front, words[:, 1:]], 1)
    told = torch.arange(2, 108).expand(2, -1)

    def without(module: Any, args: Any, output: Any) -> Any:
        return torch.cat([torch.zeros_like(output[:, :100]), output[:, 100:]], 1)

    with torch.no_grad():
        read = model(inputs_embeds=row, position_ids=told).logits
        model.roberta.embeddings.position_embeddings.register_forward_hook(without)
        trained = model(inputs_embeds=row, position_ids=told).logits
    model.roberta.embeddings.position_embeddings._forward_hooks.clear()
    found = native(model, replace(prompt, origin=None), input_ids=ids)  # as if it had been accepted
    assert apart(found, torch.cat([read[:, :1], read[:, 100:]], 1)) <= agreement(model)
    assert apart(found, torch.cat([trained[:, :1], trained[:, 100:]], 1)) > 0.01
    with pytest.raises(LoweringError, match=r"\[partial\]"):
        sb.convert(path, tmp_path / "out", "softbridge", base=model.config, format="prompt-transferability")


def test_prompt_transferability_stands_in_front_of_t5s_text(tmp_path: Path) -> None:
    config = tiny_config("t5")
    array = rows(5, width=BaseModel(config).geometry.input_width)
    path = save(tmp_path / "task_prompt", torch.from_numpy(array))
    prompt, plain = (sb.load(path, base=config, format=name) for name in ("prompt-transferability", "tensor"))
    assert (prompt.parts, prompt.positions) == (plain.parts, plain.positions)
    with pytest.raises(BaseModelError, match="one of bert, roberta, t5"):
        sb.load(path, base=tiny_config("gpt2"), format="prompt-transferability")


# --- google-research/prompt-tuning ------------------------------------------------------------------------------------


def packed(value: Any) -> bytes:
    """msgpack, of what a state of flax has."""
    match value:
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int():
            return b"\xd2" + struct.pack(">i", value)
        case str():
            return b"\xd9" + bytes([len(value.encode())]) + value.encode()
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case tuple():
            return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(packed, value))
        case dict():
            items = b"".join(packed(key) + packed(child) for key, child in value.items())
            return (bytes([0x80 + len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))) + items
        case np.ndarray():
            content = packed((value.shape, value.dtype.name, value.tobytes()))
            return b"\xc9" + struct.pack(">I", len(content)) + b"\x01" + content
    raise TypeError(value)


def zarr(folder: Path, array: np.ndarray, chunks: tuple[int, ...], compressor: str | None) -> Path:
    folder.mkdir(parents=True)
    dtype = "bfloat16" if array.dtype == BFLOAT16 else array.dtype.str
    described = {"chunks": chunks, "dtype": dtype, "fill_value": None, "filters": None, "order": "C", "zarr_format": 2}
    described |= {"shape": array.shape, "compressor": None if compressor is None else {"id": compressor, "level": 1}}
    (folder / ".zarray").write_text(json.dumps(described))
    for at in np.ndindex(*(math.ceil(n / size) for n, size in zip(array.shape, chunks, strict=True))):
        whole = np.zeros(chunks, array.dtype)
        part = array[tuple(slice(n * size, (n + 1) * size) for n, size in zip(at, chunks, strict=True))]
        whole[tuple(slice(n) for n in part.shape)] = part
        content = gzip.compress(whole.tobytes()) if compressor else whole.tobytes()
        (folder / ".".join(map(str, at))).write_bytes(content)
    return folder


T5X = rows(5, width=24)
VARIABLE = "target.encoder.prompt.prompt.prompt"


def t5x_folder(path: Path, **how: Any) -> Path:
    """A checkpoint of T5X: the prompt among the frozen model's and the optimiser's variables."""
    arguments = {"chunks": T5X.shape, "compressor": "gzip", **how}
    zarr(path / VARIABLE, arguments.pop("array", T5X), **arguments)
    zarr(path / "target.encoder.layers_0.attention.query.kernel", rows(24, 1, 24), (24, 24), "gzip")
    zarr(path / "state.param_states.encoder.prompt.prompt.prompt.v", rows(5, 2, 24), (5, 24), "gzip")
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compressor": None},
        {"chunks": (5, 10)},
        {"chunks": (2, 24), "compressor": None},
        {"array": T5X.astype(BFLOAT16)},
    ],
    ids=["gzip", "plain", "several chunks", "a chunk cut off", "bfloat16"],
)
def test_the_variable_of_t5x_is_found_among_the_others(how: dict[str, Any], tmp_path: Path) -> None:
    folder = t5x_folder(tmp_path / "checkpoint_1000", **how)
    found = read(folder)
    assert found.format.name == "google"
    assert np.array_equal(found.prompt.inputs[0].vectors, how.get("array", T5X))
    assert found.prompt.positions.start == {"encoder": 5}
    assert found.prompt.origin is not None
    assert found.prompt.origin.notes == (
        "not read: 2 tensors that are not the prompt's (state.param_states.encoder.prompt.prompt.prompt.v, "
        "target.encoder.layers_0.attention.query.kernel)",
    )
    assert sb.load(folder / VARIABLE).parts == found.prompt.parts, "the variable's own folder"


def flax_file(path: Path) -> Path:
    state = {"target": {"encoder": {"prompt": {"prompt": {"prompt": T5X}}, "embed": rows(4, 1, 24)}}, "step": 7}
    path.write_bytes(packed({"version": 1, "optimizer": state}))
    return path


def test_a_state_of_flax_is_read(tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    found = read(flax_file(tmp_path / "checkpoint"))
    assert found.format.name == "google"
    assert np.array_equal(found.prompt.inputs[0].vectors, T5X)
    assert found.prompt.origin is not None
    assert found.prompt.origin.notes == (
        "not read: 1 tensors that are not the prompt's (optimizer.target.encoder.embed)",
    )


@pytest.mark.parametrize("case", ["gzip", "plain", "bfloat16", "msgpack"])
def test_what_flax_and_tensorstore_wrote_is_read(case: str, tmp_path: Path) -> None:
    """Golden files: see `tests/golden/make_t5x.py`."""
    if case == "msgpack":
        pytest.importorskip("msgpack")
    tensors = load_file(GOLDEN / "t5x.safetensors")
    for name, content in tensors.items():
        if name.startswith(f"{case}/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content.tobytes())
    found = read(tmp_path / case)
    assert found.format.name == "google"
    expected = tensors["prompt"].astype(BFLOAT16) if case == "bfloat16" else tensors["prompt"]
    assert np.array_equal(found.prompt.inputs[0].vectors, expected)
    assert found.prompt.origin is not None
    assert "not read" in (found.prompt.origin.notes or ())[0]


def test_a_state_of_flax_is_recognised_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    with pytest.raises(CheckpointError, match=r"not installed(.|\n)*pip install 'softbridge\[msgpack\]'"):
        sb.load(flax_file(tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-3],
        lambda content: content.replace(b"float32", b"float99"),
        lambda content: content.replace(packed(24), packed(2**30)),
        lambda content: content.replace(packed((5, 24)), packed((24, 6))),
        lambda content: content[:1] + packed("prompt") + b"\xdd\xff\xff\xff\xff" + content[1:],
        lambda content: content[:1] + packed("prompt") + b"\x81\xa1a" * 5000 + content[1:],
    ],
    ids=["cut off", "dtype", "size", "shape", "a long list", "deep"],
)
def test_a_hostile_state_of_flax_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    pytest.importorskip("msgpack")
    path = flax_file(tmp_path / "checkpoint")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError) as refused:
        sb.load(path)
    assert refused.value.expected
    assert refused.value.remedy


@pytest.mark.parametrize(
    "damage",
    [
        {"shape": [2**40, 24]},
        {"chunks": [2**40, 24]},
        {"dtype": "|O"},
        {"filters": [{"id": "pickle"}]},
        {"order": "F"},
        {"compressor": {"id": "blosc"}},
        {"shape": [5]},
        {"shape": "5"},
        {"zarr_format": 3},
        "cut off",
        "bomb",
        "no chunk",
    ],
    ids=str,
)
def test_a_hostile_array_of_zarr_is_refused(damage: Any, tmp_path: Path) -> None:
    folder = t5x_folder(tmp_path / "checkpoint_1000")
    chunk = folder / VARIABLE / "0.0"
    match damage:
        case "cut off":
            chunk.write_bytes(chunk.read_bytes()[:-20])
        case "bomb":
            chunk.write_bytes(gzip.compress(bytes(2**20)))
        case "no chunk":
            chunk.rename(chunk.with_name("0.1"))
        case _:
            described = json.loads((folder / VARIABLE / ".zarray").read_text())
            (folder / VARIABLE / ".zarray").write_text(json.dumps(described | damage))
    with pytest.raises(CheckpointError) as refused:
        sb.load(folder)
    assert refused.value.expected
    assert refused.value.remedy


def test_the_file_without_suffix_is_an_encoding_of_its_own(tmp_path: Path) -> None:
    config = tiny_config("t5")
    source = npy(tmp_path / "prompt.npy", T5X)
    sb.convert(source, tmp_path / "out", "google", base=config, encoding="plain")
    assert (tmp_path / "out" / "encoder.prompt.prompt.prompt").read_bytes() == source.read_bytes()
    alone = tmp_path / "encoder.prompt.prompt.prompt"
    sb.convert(source, alone, "google", base=config, encoding="plain")
    assert alone.read_bytes() == source.read_bytes()
    assert sb.load(alone).parts == sb.load(source).parts


def test_a_prompt_of_the_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="PromptDecoder"):
        sb.load(npy(tmp_path / "decoder.prompt.prompt.prompt", T5X))


@pytest.mark.parametrize("name", ["google", "google:after-first-token"])
def test_google_s_placements_on_t5(name: str, tmp_path: Path) -> None:
    model = tiny_model("t5")
    prompt = sb.load(npy(tmp_path / "p.npy", T5X), base=model.config, format=name)
    ids, answers, first = text(2, 7), text(3, 4), int(name.endswith("token"))
    front, words = embedded(model, ids, T5X)
    with torch.no_grad():
        expected = model(
            inputs_embeds=torch.cat([words[:, :first], front, words[:, first:]], 1), decoder_input_ids=answers
        ).logits
    other = sb.load(tmp_path / "p.npy", base=model.config, format="google" if first else "google:after-first-token")
    check(model, prompt, expected, {**twins(prompt), "place": other}, input_ids=ids, decoder_input_ids=answers)
    sb.save(prompt, tmp_path / "again", format=name, base=model.config)
    assert sb.load(tmp_path / "again", format=name, base=model.config).parts == prompt.parts


# --- TensorRT-LLM -----------------------------------------------------------------------------------------------------


def table(path: Path) -> Path:
    """Three tasks of 4, 6 and 2 virtual tokens."""
    whole = np.zeros((3, 6, rows(1).shape[1]), np.float32)
    for task, length in enumerate((4, 6, 2)):
        whole[task, :length] = rows(length, task)
    return npy(path / "prompt_table.npy", whole)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_of_tensorrt_llm_s_table(task: int, tmp_path: Path) -> None:
    """Ids from the vocabulary's size on are rows of the task, in front of the text."""
    model = tiny_model("gpt2")
    prompt = sb.load(table(tmp_path), base=model.config, task=task)
    whole = to_torch(np.load(tmp_path / "prompt_table.npy"), torch.float64)
    vocabulary, length = model.config.vocab_size, (4, 6, 2)[task]
    ids = text(2, 7)
    row = torch.cat([torch.arange(vocabulary, vocabulary + length).expand(2, -1), ids], 1)
    words = model.get_input_embeddings()(row.clamp(max=vocabulary - 1))
    task_rows = whole.flatten(0, 1)[(task * whole.shape[1] + row - vocabulary).clamp(min=0)]
    with torch.no_grad():
        expected = model(inputs_embeds=torch.where((row >= vocabulary)[..., None], task_rows, words)).logits[:, length:]
    others = {f"task {n}": sb.load(table(tmp_path), base=model.config, task=n) for n in range(3) if n != task}
    check(model, prompt, expected, {**twins(prompt), **others}, input_ids=ids)


def test_a_table_says_what_it_took_for_filling_and_asks_for_a_task(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    found = read(table(tmp_path), base=config)
    assert found.format.name == "tensorrt-llm"
    assert found.prompt.origin is not None
    assert found.prompt.origin.notes == (
        "task 0: rows of zeros at its end, 2, are taken for filling up",
        "task 2: rows of zeros at its end, 4, are taken for filling up",
    )
    assert inspect(tmp_path / "prompt_table.npy")["task"] == {"number": 0, "of": 3}
    with pytest.raises(LoweringError, match=r"holds one task, and this prompt 3(.|\n)*choose one with --task"):
        sb.convert(tmp_path / "prompt_table.npy", tmp_path / "no", "peft", base=config)
    report = sb.convert(tmp_path / "prompt_table.npy", tmp_path / "peft", "peft", base=config, task=2, verify=True)
    assert report.certificate is not None
    assert sb.load(tmp_path / "peft").inputs[0].length == 2
    with pytest.raises(SoftbridgeError, match="there are 3 tasks"):
        sb.load(tmp_path / "prompt_table.npy", base=config, task=3)


def test_tables_are_written_with_one_task_and_with_several(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    source = table(tmp_path / "a")
    sb.convert(source, tmp_path / "all.npy", "tensorrt-llm", base=config)
    assert (tmp_path / "all.npy").read_bytes() == source.read_bytes()
    sb.convert(source, tmp_path / "native", "softbridge", base=config)
    assert sb.load(tmp_path / "native") == sb.load(source, base=config)
    assert sb.load(tmp_path / "native", task=1) == sb.load(source, base=config, task=1)
    sb.convert(source, tmp_path / "one.npy", "tensorrt-llm", base=config, task=2)
    assert np.array_equal(np.load(tmp_path / "one.npy"), rows(2, 2)[None])
    sb.convert(tmp_path / "one.npy", tmp_path / "peft", "peft", base=config)
    sb.convert(tmp_path / "peft", tmp_path / "back.npy", "tensorrt-llm", base=config)
    assert (tmp_path / "back.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()
    flat = npy(tmp_path / "flat.npy", rows(4))
    assert sb.load(flat, base=config, format="tensorrt-llm").inputs[0].stack == "decoder"
    ended = sb.load(npy(tmp_path / "b.npy", rows(4)[None]), base=config)
    zero = np.concatenate([ended.inputs[0].vectors, np.zeros((1, rows(1).shape[1]), np.float32)])
    prompt = replace(ended, parts=(replace(ended.inputs[0], vectors=zero),), positions=sb_counted(5))
    with pytest.raises(LoweringError, match="cannot tell from filling"):
        sb.save(prompt, tmp_path / "zero.npy", format="tensorrt-llm", base=config)


def sb_counted(length: int) -> Any:
    from softbridge.prompt import Positions

    return Positions({"decoder": length})


@pytest.mark.parametrize(
    ("array", "found"),
    [(np.zeros((2, 3, 4), np.float32), "zero throughout"), (np.ones((2, 3, 4), np.int64), "int64")],
    ids=["zeros", "integers"],
)
def test_a_table_of_something_else_is_refused(array: np.ndarray, found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=found):
        sb.load(npy(tmp_path / "prompt_table.npy", array))


# --- TGIS and caikit --------------------------------------------------------------------------------------------------


def tgis_folder(path: Path, width: int = 24, config: Mapping[str, Any] | None = None) -> Path:
    """Two halves of one tensor, as mt0's released ones are."""
    both = torch.from_numpy(rows(8, width=width)).requires_grad_()
    save(path / "encoder.pt", both[:4].detach())
    save(path / "decoder.pt", both[4:].detach())
    if config is not None:
        (path / "config.yml").write_text(yaml.safe_dump(dict(config)))
    return path


CAIKIT = {
    "base_model_name": "google/mt0-small",
    "verbalizer": "{{input}}",
    "ENCODER": "encoder.pt",
    "has_base_model": False,
}


def test_the_decoder_s_prompt_of_tgis_stands_in_front_of_its_start_token(tmp_path: Path) -> None:
    model = tiny_model("t5")
    prompt = sb.load(tgis_folder(tmp_path / "p", config=CAIKIT), base=model.config)
    assert prompt.base.name == "google/mt0-small"
    assert prompt.origin is not None
    assert prompt.origin.details["verbalizer"] == "{{input}}"
    assert any("--part encoder-input" in note for note in prompt.origin.notes or ())
    ids, answers = text(2, 7), torch.cat([torch.zeros(2, 1, dtype=torch.long), text(3, 4)], 1)
    array = rows(8, width=24)
    front, words = embedded(model, ids, array[:4])
    ahead, starts = embedded(model, answers, array[4:])
    with torch.no_grad():
        expected = model(
            inputs_embeds=torch.cat([front, words], 1), decoder_inputs_embeds=torch.cat([ahead, starts], 1)
        ).logits[:, 4:]
    encoder, decoder = prompt.inputs
    swapped = (replace(encoder, vectors=decoder.vectors), replace(decoder, vectors=encoder.vectors))
    wrong = {
        "swapped": replace(prompt, parts=swapped),
        "encoder alone": sb.parts.choose(prompt, "encoder-input"),
        "decoder alone": sb.parts.choose(prompt, "decoder-input"),
    }
    check(model, prompt, expected, wrong, input_ids=ids, decoder_input_ids=answers)
    sb.save(prompt, tmp_path / "again", format="tgis", base=model.config)
    again = sb.load(tmp_path / "again", base=model.config)
    assert again.parts == prompt.parts
    for name in ("encoder.pt", "decoder.pt"):
        assert torch.equal(torch.load(tmp_path / "again" / name), torch.load(tmp_path / "p" / name))
    sb.convert(tmp_path / "p", tmp_path / "peft", "peft", base=model.config, part="encoder-input", verify=True)


def test_tgis_puts_a_decoder_s_prompt_between_the_pads_and_the_text(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    prompt = sb.load(save(tmp_path / "decoder.pt", torch.from_numpy(rows(4))), base=model.config)
    ids = text(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    front, words = embedded(model, ids, rows(4))
    with torch.no_grad():
        alone = [
            model(inputs_embeds=torch.cat([front[n], words[n, pads:]])[None]).logits[0, 4:]
            for n, pads in enumerate((0, 3))
        ]
    found = native(model, prompt, input_ids=ids, attention_mask=mask)
    assert max(apart(found[n, pads:], alone[n]) for n, pads in enumerate((0, 3))) <= agreement(model)
    for name, wrong in twins(prompt).items():
        assert apart(native(model, wrong, input_ids=ids)[0], alone[0]) > 0.01, name


def raw_weights(path: Path) -> Path:
    save(path / "adapter_model.bin", {"prompt_embeddings": torch.from_numpy(rows(4))})
    return path


def test_peft_s_weights_alone_are_what_tgis_reads(tmp_path: Path) -> None:
    found = read(raw_weights(tmp_path / "raw"), base=tiny_config("gpt2"))
    assert found.format.name == "tgis"
    assert np.array_equal(found.prompt.inputs[0].vectors, rows(4))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (torch.ones(2, 3, 4), CheckpointError),
        (torch.ones(2, 24, dtype=torch.long), CheckpointError),
        (torch.full((2, 24), float("nan")), CheckpointError),
        (torch.ones(2, 7), BaseModelError),
        ({"a": torch.ones(2, 24)}, UnknownFormatError),
        (nn.Linear(2, 2), UnknownFormatError),
    ],
    ids=["axes", "integers", "nan", "width", "a dictionary", "an object"],
)
def test_files_of_tgis_that_are_none_are_refused(content: Any, error: type[Exception], tmp_path: Path) -> None:
    save(tmp_path / "decoder.pt", content)
    with pytest.raises(error):
        sb.load(tmp_path / "decoder.pt", base=tiny_config("gpt2"))


# --- NeMo -------------------------------------------------------------------------------------------------------------

TASK = {"taskname": "sentiment", "total_virtual_tokens": 5, "virtual_token_splits": [5]}
FRONT = {**TASK, "prompt_template": "<|VIRTUAL_PROMPT_0|> {sentence} sentiment: {label}"}
AMONG = {
    **TASK,
    "virtual_token_splits": [3, 2],
    "prompt_template": "<|VIRTUAL_PROMPT_0|> {sentence} Question:<|VIRTUAL_PROMPT_1|>{question}",
}


class Encoder(nn.Module):
    """NeMo's prompt encoders, as `prompt_encoder.py` computes them."""

    def __init__(self, kind: str, length: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.embeddings = nn.Embedding(length, width)
        if kind == "lstm":
            self.lstm_head = nn.LSTM(width, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.mlp_head: Any = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, width))
        elif kind == "mlp":
            self.mlp_head = nn.Sequential(
                nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, width)
            )
        elif kind == "tpmlp":
            self.tpmlp = nn.ModuleDict({"first": nn.Linear(width, 7), "second": nn.Linear(7, width)})

    def forward(self) -> Tensor:
        hidden = self.embeddings.weight[None]
        if self.kind == "lstm":
            return self.mlp_head(self.lstm_head(hidden)[0])[0]
        if self.kind == "mlp":
            return self.mlp_head(hidden)[0]
        if self.kind == "tpmlp":
            x = self.tpmlp["first"](hidden)
            x = x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
            return self.tpmlp["second"](x)[0]
        return hidden[0]

    def state(self) -> dict[str, Any]:
        return {name: module.state_dict() for name, module in self.named_children()}


def nemo(
    path: Path,
    tables: Mapping[str, np.ndarray],
    templates: Sequence[Mapping[str, Any]] = (FRONT,),
    packed_as: str | None = "w",
    state: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A .nemo archive, or with `packed_as` None its folder."""
    names = {f"prompt_table.{task}.prompt_embeddings.weight": torch.from_numpy(t) for task, t in tables.items()}
    content = {**({"prompt_table": names} if tables else {}), **(state or {})}
    path.mkdir(parents=True, exist_ok=True)
    inside = path / "inside"
    inside.mkdir()
    (inside / "model_config.yaml").write_text(
        yaml.safe_dump(
            json.loads(json.dumps({"task_templates": [*templates], "virtual_prompt_style": "p-tuning", **config}))
        )
    )
    torch.save(content, inside / "model_weights.ckpt")
    if packed_as is None:
        return inside
    with tarfile.open(path / "prompt.nemo", packed_as) as archive:
        for file in sorted(inside.iterdir()):
            archive.add(file, f"./{file.name}")
    return path / "prompt.nemo"


@pytest.mark.parametrize("packed_as", ["w", "w:gz", None], ids=["tar", "tar in gzip", "folder"])
@pytest.mark.parametrize("begun", [False, True], ids=["", "after the first token"])
def test_nemo_s_prompts_in_front_have_positions(packed_as: str | None, begun: bool, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    path = nemo(tmp_path, {"sentiment": rows(5)}, packed_as=packed_as, data={"add_bos": begun})
    found = read(path, base=model.config)
    assert found.format.name == "nemo"
    ids, first = text(2, 7), int(begun)
    front, words = embedded(model, ids, rows(5))
    with torch.no_grad():
        logits = model(inputs_embeds=torch.cat([words[:, :first], front, words[:, first:]], 1)).logits
    expected = torch.cat([logits[:, :first], logits[:, first + 5 :]], 1)
    check(model, found.prompt, expected, twins(found.prompt), input_ids=ids)
    assert found.prompt.origin is not None
    assert "sentiment: {label}" in (found.prompt.origin.notes or ())[0]
    if not begun:
        sb.convert(path, tmp_path / "peft", "peft", base=model.config, verify=True)


def test_nemo_fills_the_places_of_a_template(tmp_path: Path) -> None:
    """Pseudo tokens among words; learned positions are added to all of them."""
    model = tiny_model("gpt2")
    prompt = sb.load(nemo(tmp_path, {"sentiment": rows(5)}, [AMONG]), base=model.config)
    (part,) = prompt.inputs
    assert part.template is not None
    assert part.template.pieces == (
        Virtual(3),
        Field("sentence"),
        Field("words_0"),
        Virtual(2),
        Field("question"),
    )
    texts = {"sentence": [4, 5, 6], "words_0": [7], "question": [8, 9]}
    row = torch.tensor([part.template.fill(texts)])
    words = model.get_input_embeddings()(row.clamp(min=0))[0]
    vectors = to_torch(rows(5), torch.float64)
    whole = torch.cat([vectors[:3], words[3:7], vectors[3:], words[9:]])[None]
    with torch.no_grad():
        expected = model(inputs_embeds=whole).logits
    assert apart(native(model, prompt, input_ids=row), expected) <= agreement(model)
    for name, wrong in twins(prompt).items():
        assert apart(native(model, wrong, input_ids=row), expected) > 0.01, name


def adapter(path: Path, *, config: str = "learned_absolute", old: bool = False) -> Path:
    stem = "model.language_model." if old else "model.embedding."
    stem += "adapter_layer.ptuning_adapter.inference_table"
    name = f"{stem}.prompt_table.taskname.prompt_embeddings.weight" if old else stem
    return nemo(path, {}, (), state={name: torch.from_numpy(rows(5))}, position_embedding_type=config)


@pytest.mark.parametrize("old", [False, True], ids=["", "old names"])
def test_nemo_s_adapter_has_no_positions_for_virtual_tokens(old: bool, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    found = read(adapter(tmp_path, old=old), base=model.config)
    assert found.format.name == "nemo"
    prompt = found.prompt
    ids = text(2, 7)
    front, words = embedded(model, ids, rows(5))

    def swap(layer: Any, args: Any, kwargs: Any) -> Any:
        """Over the first of what reaches the layers, as NeMo puts them over pads; positions were added before."""
        hidden = torch.cat([front, args[0][:, 5:]], 1)
        return (hidden, *args[1:]), kwargs

    handle = model.transformer.h[0].register_forward_pre_hook(swap, with_kwargs=True)
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([torch.zeros_like(front), words], 1)).logits[:, 5:]
    handle.remove()
    (part,) = prompt.inputs
    assert (part.entry, prompt.positions.start) == ("after", {"decoder": 5})
    with pytest.raises(EngineError, match=r"no module that is its embedding block"):
        sb.attach(model, prompt)
    target = Target("peft", formats()["peft"].capabilities, BaseModel.resolve(model))
    exact = replace(target, capabilities=replace(target.capabilities, dtypes=None))
    moved = lower(replace(prompt, parts=(replace(part, vectors=part.vectors.astype(np.float64)),)), exact).prompt
    wrong = {**twins(moved), "with positions": replace(prompt, parts=(replace(part, entry="before"),))}
    check(model, moved, expected, wrong, input_ids=ids)
    report = sb.convert(tmp_path / "prompt.nemo", tmp_path / "peft", "peft", base=model)
    assert [(step.name, step.exactness) for step in report.steps] == [("entry", "rounding")]
    rounded = sb.load(tmp_path / "peft", base=model)
    assert apart(native(model, rounded, input_ids=ids), expected) <= FLOAT32_BOUND


def test_vectors_behind_more_than_a_sum_are_not_moved_in_front(tmp_path: Path) -> None:
    """BERT has a norm there, and nothing undoes it."""
    path = adapter(tmp_path)
    with pytest.raises(LoweringError, match="norm and positions cannot be undone"):
        sb.convert(path, tmp_path / "peft", "peft", base=build(tiny_config("bert"), "masked-lm", torch.float64, 0))


def test_nemo_s_adapter_on_rotary_positions_is_vectors_in_front(tmp_path: Path) -> None:
    model = tiny_model("llama")
    prompt = sb.load(adapter(tmp_path, config="rope"), base=model.config)
    ids = text(2, 7)
    front, words = embedded(model, ids, rows(5))
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([front, words], 1)).logits[:, 5:]
    check(model, prompt, expected, twins(prompt), input_ids=ids)


@pytest.mark.parametrize("kind", ["tpmlp", "mlp", "lstm", "embedding"])
@pytest.mark.parametrize("made", [False, True], ids=["table of zeros", "table made"])
def test_nemo_s_encoders_make_what_the_table_does_not_hold(kind: str, made: bool, tmp_path: Path) -> None:
    encoder = Encoder(kind, 5, rows(1).shape[1])
    with torch.no_grad():
        expected = encoder().numpy()
    table = {"sentiment": expected if made else np.zeros_like(expected)}
    prompt = sb.load(nemo(tmp_path, table, state=encoder.state()), base=tiny_config("gpt2"))
    (part,) = prompt.inputs
    # GELU's constant is cut off after eight digits in NeMo, and these are float32.
    assert apart(part.vectors, expected) <= 1e-6
    assert (prompt.training is None) == (kind == "embedding")
    if prompt.training is not None:
        assert prompt.training.kind == ("p-tuning-lstm" if kind == "lstm" else "p-tuning-mlp")
        assert apart(sb.methods.materialise_vectors(prompt.training), expected) <= 1e-6
        relu = {**prompt.training.settings, "non_linearity": "tanh"}
        assert apart(sb.methods.materialise_vectors(replace(prompt.training, settings=relu)), expected) > 1e-3


def test_an_encoder_that_makes_other_vectors_than_the_table_is_left(tmp_path: Path) -> None:
    encoder = Encoder("mlp", 5, rows(1).shape[1])
    prompt = sb.load(nemo(tmp_path, {"sentiment": rows(5)}, state=encoder.state()), base=tiny_config("gpt2"))
    assert np.array_equal(prompt.inputs[0].vectors, rows(5))
    assert prompt.training is None


def test_nemo_s_tables_of_several_tasks_become_tensorrt_llm_s(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    tables = {"a": rows(5), "b": rows(3, 1), "c": np.zeros((4, rows(1).shape[1]), np.float32)}
    templates = [{**FRONT, "taskname": name, "virtual_token_splits": [len(table)]} for name, table in tables.items()]
    path = nemo(tmp_path / "n", tables, templates)
    found = read(path, base=config).prompt
    assert found.training is not None
    assert found.training.settings["names"] == ["a", "b"]
    assert found.origin is not None
    assert any("task c: its table is zero" in note for note in found.origin.notes or ())
    second = sb.load(path, base=config, task=1)
    assert np.array_equal(second.inputs[0].vectors, rows(3, 1))
    assert second.positions.start == {"decoder": 3}
    sb.convert(path, tmp_path / "prompt_table.npy", "tensorrt-llm", base=config)
    written = np.load(tmp_path / "prompt_table.npy")
    assert np.array_equal(written[1, :3], rows(3, 1))
    assert not written[1, 3:].any()


def test_nemo_on_t5_is_the_encoder_s(tmp_path: Path) -> None:
    model = tiny_model("t5")
    path = nemo(tmp_path, {"sentiment": rows(5, width=24)}, target="nemo.MegatronT5PromptLearningModel")
    assert sb.load(path).inputs[0].stack == "encoder"
    prompt = sb.load(path, base=model.config)
    ids, answers = text(2, 7), text(3, 4)
    front, words = embedded(model, ids, rows(5, width=24))
    with torch.no_grad():
        expected = model(inputs_embeds=torch.cat([front, words], 1), decoder_input_ids=answers).logits
    check(model, prompt, expected, twins(prompt), input_ids=ids, decoder_input_ids=answers)


@pytest.mark.parametrize(
    ("templates", "found"),
    [
        ([{**AMONG, "virtual_token_splits": [3]}], "list index"),
        ([{**AMONG, "virtual_token_splits": [3, 3]}], "of 6 virtual"),
        ([{**FRONT, "virtual_token_splits": [4]}], "of 4 virtual"),
        ([{**FRONT, "virtual_token_splits": None}], "subscriptable"),
        ([{**FRONT, "taskname": ["x"]}], "KeyError"),
        ([{**AMONG, "virtual_token_splits": ["3", 2]}], "whole number"),
        ([{**FRONT, "prompt_template": "{sentence}"}], "at least one virtual"),
        ([{**AMONG}, {**AMONG, "taskname": "b", "virtual_token_splits": [2, 3]}], "differ"),
    ],
    ids=["splits missing", "too long", "too short", "none", "task", "text", "nothing virtual", "differ"],
)
def test_templates_of_nemo_that_are_none_are_refused(templates: list[Any], found: str, tmp_path: Path) -> None:
    tables = {("sentiment", "b")[n]: rows(5, n) for n, _ in enumerate(templates)}
    with pytest.raises(CheckpointError, match=found) as refused:
        sb.load(nemo(tmp_path, tables, templates), base=tiny_config("gpt2"))
    assert refused.value.remedy


@pytest.mark.parametrize("damage", ["no tensors", "shape", "nan", "encoder"])
def test_damaged_files_of_nemo_are_refused(damage: str, tmp_path: Path) -> None:
    width = rows(1).shape[1]
    encoder = Encoder("lstm", 5, width).state()
    zeros = np.zeros((5, width), np.float32)
    match damage:
        case "no tensors":
            path = nemo(tmp_path, {"sentiment": zeros})
        case "shape":
            path = nemo(tmp_path, {"sentiment": zeros[None]})
        case "nan":
            path = nemo(tmp_path, {"sentiment": np.full_like(zeros, np.nan)})
        case _:
            del encoder["lstm_head"]["weight_hh_l1"]
            path = nemo(tmp_path, {"sentiment": zeros}, state=encoder)
    with pytest.raises(CheckpointError) as refused:
        sb.load(path, base=tiny_config("gpt2"))
    assert refused.value.expected
    assert refused.value.remedy


# --- recognition ------------------------------------------------------------------------------------------------------


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


#: For the table of all formats: what it is -> makes such a file or folder, and returns what to open.
FILES: dict[str, Callable[[Path], Path]] = {
    "google npy": lambda path: npy(path / "prompt.npy", T5X),
    "google plain": lambda path: npy(path / "encoder.prompt.prompt.prompt", T5X),
    "google zarr": lambda path: t5x_folder(path / "checkpoint_1"),
    "google flax": lambda path: flax_file(make(path) / "checkpoint"),
    "tensorrt-llm": table,
    "tgis": lambda path: tgis_folder(path / "tgis"),
    "tgis caikit": lambda path: tgis_folder(path / "tgis", config=CAIKIT),
    "tgis raw weights": lambda path: raw_weights(path / "raw"),
    "nemo prompt learning": lambda path: nemo(path, {"sentiment": rows(5)}),
    "nemo template": lambda path: nemo(path, {"sentiment": rows(5)}, [AMONG]),
    "nemo adapter": adapter,
    "bare-tensor": lambda path: save(path / "task_prompt", torch.from_numpy(rows(5))),
}


@pytest.mark.parametrize("what", FILES)
def test_files_are_recognised_by_content(what: str, tmp_path: Path) -> None:
    assert recognise(Files(FILES[what](tmp_path / "made"))).name == what.split()[0]


def model_of(path: Path) -> Path:
    tiny_model("gpt2", torch.float32).save_pretrained(path)
    return path


def tarred(path: Path) -> Path:
    path.mkdir()
    with tarfile.open(path / "m.nemo", "w") as archive:
        content = io.BytesIO()
        torch.save({"model.decoder.weight": torch.ones(2, 2)}, content)
        for name, data in {"model_config.yaml": b"a: 1", "model_weights.ckpt": content.getvalue()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path / "m.nemo"


OTHERS: dict[str, Callable[[Path], Path]] = {
    "a whole model": model_of,
    "a model in a pickle": lambda path: save(
        path / "pytorch_model.bin", tiny_model("gpt2", torch.float32).state_dict()
    ),
    "an optimiser": lambda path: save(path / "optimizer.pt", {"state": {0: {"step": 1, "exp_avg": torch.ones(2, 3)}}}),
    "LoRA": lambda path: save(path / "adapter_model.bin", {"base_model.model.q.lora_A.weight": torch.ones(2, 3)}),
    "a tensor of three axes": lambda path: save(path / "x.pt", torch.ones(2, 3, 4)),
    "scores beside a model": lambda path: npy(model_of(path) / "scores.npy", rows(3)).parent,
    "a model of NeMo": tarred,
    "a model of T5X": lambda path: zarr(path / "target.encoder.layers_0.kernel", rows(4), (4, 24), "gzip").parent,
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_files_are_taken_for_none(what: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError):
        sb.load(OTHERS[what](tmp_path / "made"))
