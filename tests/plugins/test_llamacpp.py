"""Saved states of llama.cpp, without llama.cpp: read from files of its own, written, and refused where malformed.

What llama.cpp itself makes of written files, `tests/serving/test_llamacpp.py` shows.
"""

from __future__ import annotations

import io
import json
import random
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, CheckpointError, LoweringError
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.prompt import KeyValue, KeyValuePrefix, Origin
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.untrusted import Files
from softbridge_llamacpp.families import FAMILIES, paired, unpaired
from softbridge_llamacpp.format import ENCODINGS, FORMAT
from softbridge_llamacpp.state import State, read_state

GOLDEN = Path(__file__).parents[1] / "golden" / "llamacpp.safetensors"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def from_bytes(content: bytes, what: str) -> State:
    return read_state(io.BytesIO(content), len(content), what)


def config_of(family: str, **changes: Any) -> Any:
    if family in ("llama", "qwen3", "gpt2"):
        return tiny_config(family, **changes)
    known = {"mistral": {"sliding_window": None}, "gemma": {"head_dim": 12}}
    return AutoConfig.for_model(family, **{**SIZES, **known.get(family, {}), **changes})


def geometry_of(family: str, **changes: Any) -> Any:
    return BaseModel(config_of(family, **changes)).geometry


def as_dtype(prompt: sb.SoftPrompt, dtype: Any) -> sb.SoftPrompt:
    (part,) = prompt.prefixes
    layers = {n: KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype)) for n, pair in part.layers.items()}
    return replace(prompt, parts=(KeyValuePrefix("self", layers),))


def written(folder: Path, content: bytes, name: str = "prompt.bin") -> Files:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return Files(folder)


def bytes_of(prompt: sb.SoftPrompt, encoding: str | None = None) -> bytes:
    return FORMAT.write(prompt, prompt.base.geometry, encoding)["prompt.bin"]


# --- what llama.cpp itself wrote --------------------------------------------------------------------------------------


def golden() -> list[str]:
    with safe_open(GOLDEN, "np") as file:
        return [name for name in file.keys() if "flash" in name]  # noqa: SIM118


@pytest.mark.parametrize("name", golden())
def test_a_state_that_llama_cpp_saved_holds_the_keys_and_values_of_transformers(name: str, tmp_path: Path) -> None:
    family, encoding, dtype = name.split(".")
    with safe_open(GOLDEN, "np") as file:
        content = file.get_tensor(name).tobytes()
        expected = {half: file.get_tensor(f"{family}.{half}") for half in ("keys", "values")}
        tokens = json.loads(file.metadata()["tokens"])
    geometry = geometry_of(family)
    files = written(tmp_path, content)
    assert FORMAT.sniff(files)
    prompt = FORMAT.read(files, geometry)
    (part,) = prompt.prefixes
    # With flash attention llama.cpp rounds keys and values to f16, which what later layers keep shows.
    bound = 1e-5 if dtype == "float32" and "off" in encoding else 4e-3
    for half, theirs in expected.items():
        ours = np.stack([getattr(pair, half) for pair in part.layers.values()])
        assert ours.dtype == dtype
        assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()
        # The order of channels shows: with the other one, keys are far off.
        turned = (unpaired if family == "qwen3" else paired)(ours)
        assert np.abs(turned - theirs).max() > 0.1 * np.abs(theirs).max()
    assert prompt.positions.start == {"decoder": len(tokens)}
    assert prompt.origin is not None
    assert list(prompt.origin.details["tokens"]) == tokens
    # And it is written as llama.cpp wrote it, but for the number of the sequence, which no reader looks at.
    ours, theirs = (bytearray(one) for one in (bytes_of(prompt, encoding), content))
    for cell in range(len(tokens)):
        at = 12 + 4 * len(tokens) + 8 + 12 * cell + 8
        assert struct.unpack_from("<i", theirs, at) == (1,)
        theirs[at : at + 4] = bytes(4)
    assert ours == theirs


def test_the_golden_states_are_of_every_way_to_hold_values() -> None:
    assert {name.split(".")[1] for name in golden()} >= {"flash-off", "flash-on"}
    assert {name.split(".")[0] for name in golden()} == {"llama", "qwen3"}


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("encoding", FORMAT.encodings)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_comes_back_bit_for_bit(family: str, encoding: str, dtype: Any, tmp_path: Path) -> None:
    geometry = geometry_of(family)
    prompt = as_dtype(random_prefix(geometry, 7), dtype)
    files = written(tmp_path, bytes_of(prompt, encoding))
    assert FORMAT.sniff(files)
    again = FORMAT.read(files, geometry)
    assert again == prompt
    assert FORMAT.write(again, geometry, encoding)["prompt.bin"] == (tmp_path / "prompt.bin").read_bytes()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_field_of_a_file(family: str, encoding: str) -> None:
    transposed, version = ENCODINGS[encoding]
    geometry = geometry_of(family)
    prompt = random_prefix(geometry, 4)
    content = bytes_of(prompt, encoding)
    shape, (part,) = geometry.decoder, prompt.prefixes
    heads, width = shape.kv_heads, shape.head_dim
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(form)
        return struct.unpack_from(form, content, at - struct.calcsize(form))

    def numbers(*axes: int) -> np.ndarray:
        return np.array(take(f"<{int(np.prod(axes))}f"), np.float32).reshape(axes)

    assert content[:4] == b"qsgg"
    assert take("<III") == (0x67677371, version, 4)
    assert take("<4i") == (0, 0, 0, 0)  # a token for each virtual one
    assert take("<II") == (1, 4)  # one stream, its cells
    assert [take("<iIi") for _ in range(4)] == [(position, 1, 0) for position in range(4)]
    assert take("<II") == (int(transposed), 3)
    if version == 4:
        assert take("<II") == (0, 0)
    for pair in part.layers.values():
        assert take("<iQ") == (0, 4 * heads * width)
        keys = numbers(4, heads, width)
        for channel in range(width):
            half, pairs = divmod(channel, width // 2)
            place = 2 * pairs + half if family == "llama" else channel
            assert (keys[:, :, place] == pair.keys[:, :, channel].T).all()
    for pair in part.layers.values():
        if transposed:
            assert take("<iII") == (0, 4, heads * width)
            assert (numbers(heads, width, 4) == pair.values.transpose(0, 2, 1)).all()
        else:
            assert take("<iQ") == (0, 4 * heads * width)
            assert (numbers(4, heads, width) == pair.values.transpose(1, 0, 2)).all()
    assert at == len(content)


def test_tokens_of_a_state_that_was_read_are_written_again(tmp_path: Path) -> None:
    geometry = geometry_of("llama")
    prompt = replace(random_prefix(geometry, 3), origin=Origin("llamacpp", {"tokens": [9, 8, 7]}))
    assert from_bytes(bytes_of(prompt), "it").tokens.tolist() == [9, 8, 7]
    assert FORMAT.read(written(tmp_path, bytes_of(prompt)), geometry).origin == prompt.origin
    elsewhere = replace(prompt, origin=Origin("peft", {"tokens": [9, 8, 7]}))
    assert from_bytes(bytes_of(elsewhere), "it").tokens.tolist() == [0, 0, 0]
    longer = replace(random_prefix(geometry, 4), origin=prompt.origin)
    assert from_bytes(bytes_of(longer), "it").tokens.tolist() == [0, 0, 0, 0]


def test_cells_in_any_order_and_in_any_stream_are_read(tmp_path: Path) -> None:
    """A cache that is in use has a sequence's cells wherever there was room, and may have a stream for each."""
    geometry = geometry_of("qwen3")
    prompt = random_prefix(geometry, 3)
    content = bytes_of(prompt, "flash-on")
    begin = 12 + 4 * 3
    cells = [content[begin + 8 + 12 * n :][:12] for n in (2, 0, 1)]
    row, at, rest = 4 * 2 * 12, begin + 8 + 36 + 16, b""
    for _ in range(6):
        rows = [content[at + 12 + row * n :][:row] for n in (2, 0, 1)]
        rest += content[at : at + 12] + b"".join(rows)
        at += 12 + 3 * row
    assert at == len(content)
    head = content[:begin] + struct.pack("<IIII", 4, 0, 0, 3)
    turned = head + b"".join(cells) + content[begin + 8 + 36 :][:16] + rest + bytes(4)
    assert FORMAT.read(written(tmp_path, turned), geometry) == prompt


def test_an_input_prompt_is_what_it_leaves_in_the_cache() -> None:
    model = tiny_model("llama", torch.float32)
    base = BaseModel.resolve(model)
    prompt = random_input_prompt(base.geometry)
    made = lower(prompt, Target(FORMAT.name, FORMAT.capabilities, base), (), FORMAT.obstacles)
    assert [step.name for step in made.steps] == ["prefill"]
    with torch.no_grad():
        cache = model(inputs_embeds=torch.tensor(prompt.inputs[0].vectors)[None], use_cache=True).past_key_values
    (part,) = made.prompt.prefixes
    assert np.allclose(part.layers[2].values, cache.layers[2].values[0].numpy(), atol=1e-5)
    assert FORMAT.write(made.prompt, base.geometry)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(prompt: sb.SoftPrompt, config: Any) -> dict[str, str]:
    with pytest.raises(LoweringError) as error:
        lower(prompt, Target(FORMAT.name, FORMAT.capabilities, BaseModel(config)), (), FORMAT.obstacles)
    return {obstacle.name: obstacle.reason for obstacle in error.value.obstacles}


def test_a_family_that_is_not_proven_is_refused() -> None:
    config = tiny_config("gpt_neox")
    found = refused(random_prefix(BaseModel(config).geometry), config)
    assert "llamacpp has no gpt_neox" in found["family"]


def test_a_sliding_window_is_a_condition() -> None:
    config = config_of("mistral", sliding_window=16)
    base = BaseModel(config)
    prompt = random_prefix(base.geometry)
    assert "no longer than 16 tokens" in refused(prompt, config)["window"]
    target = Target(FORMAT.name, FORMAT.capabilities, base)
    assert lower(prompt, target, ["window"], FORMAT.obstacles).prompt.parts == prompt.parts


def test_layers_of_several_dtypes_are_refused() -> None:
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry)

    def with_keys(layers: set[int]) -> sb.SoftPrompt:
        """With keys in float16 in these layers."""
        pairs = prompt.prefixes[0].layers.items()
        made = {n: replace(pair, keys=pair.keys.astype(np.float16)) if n in layers else pair for n, pair in pairs}
        return replace(prompt, parts=(KeyValuePrefix("self", made),))

    assert "one type for the keys of all layers" in refused(with_keys({1}), config)["precision"]
    assert not FORMAT.obstacles(with_keys({0, 1, 2}), None)  # a cache may have another type for values


def test_a_layer_that_is_left_out_is_refused() -> None:
    config = tiny_config("llama")
    prompt = random_prefix(BaseModel(config).geometry)
    some = KeyValuePrefix("self", {n: prompt.prefixes[0].layers[n] for n in (0, 2)})
    assert "leaves out [1]" in refused(replace(prompt, parts=(some,)), config)["layers"]


def test_a_file_does_not_say_for_which_model_it_is(tmp_path: Path) -> None:
    prompt = random_prefix(geometry_of("llama"))
    files = written(tmp_path, bytes_of(prompt))
    with pytest.raises(BaseModelError, match="does not say for which model"):
        FORMAT.read(files, None)
    with pytest.raises(BaseModelError, match="for gpt_neox"):
        FORMAT.read(files, BaseModel(tiny_config("gpt_neox")).geometry)
    for wrong in ({"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}):
        with pytest.raises(BaseModelError, match=r"3 layers with \[16\] numbers for a token"):
            FORMAT.read(files, geometry_of("llama", **wrong))


def test_one_state_is_read_and_not_the_first_of_several(tmp_path: Path) -> None:
    geometry = geometry_of("llama")
    content = bytes_of(random_prefix(geometry))
    written(tmp_path, content, "one.bin")
    (tmp_path / "notes.txt").write_text("qsg")
    assert FORMAT.read(Files(tmp_path), geometry).prefixes
    files = written(tmp_path, content, "other.bin")
    with pytest.raises(CheckpointError, match="2 states"):
        FORMAT.read(files, geometry)
    assert FORMAT.read(Files(tmp_path / "one.bin"), geometry).prefixes
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.bin").write_bytes(b"")
    assert not FORMAT.sniff(Files(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="0 states"):
        FORMAT.read(Files(tmp_path / "empty"), geometry)


@pytest.mark.parametrize("encoding", FORMAT.encodings[:4])
def test_a_file_that_is_cut_off_anywhere_is_refused(encoding: str) -> None:
    content = bytes_of(random_prefix(geometry_of("llama"), 2), encoding)
    from_bytes(content, "it")
    for length in range(len(content)):
        with pytest.raises(CheckpointError):
            from_bytes(content[:length], "it")
    with pytest.raises(CheckpointError, match="1 bytes behind its end"):
        from_bytes(content + b"\0", "it")


#: Where a field is in a file of 2 cells in ``flash-off`` -> (its number, what is said of that).
FIELDS = {
    0: (0x67677372, "begins with"),
    4: (1, "version 1"),
    8: (2**32 - 1, "ends in tokens"),
    20: (0, "0 streams"),
    24: (2**32 - 1, "ends in cells"),
    28: (7, "positions from 1 to 7 in 2 cells"),
    32: (2, "cells of several sequences"),
    40: (0, "positions from 0 to 0 in 2 cells"),
    52: (2, "transposed: 2"),
    56: (2**32 - 1, "."),
    60: (64, r"rotated by \[64, 0\]"),
    64: (64, r"rotated by \[0, 64\]"),
    68: (8, "keys of layer 0: of ggml's type 8"),
    72: (2**32 - 1, "keys of layer 0: rows of|ends in keys"),
    76: (2**31, "ends in keys of layer 0"),
    80: (0x7F800000, "not finite"),
}


@pytest.mark.parametrize("at", FIELDS)
def test_a_field_that_is_wrong_is_refused_at_once(at: int) -> None:
    content = bytearray(bytes_of(random_prefix(geometry_of("llama"), 2), "flash-off"))
    number, said = FIELDS[at]
    content[at : at + 4] = struct.pack("<I", number)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=said):
        from_bytes(bytes(content), "it")
    assert time.perf_counter() - begin < 1


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_whatever_is_changed_in_a_file_is_read_or_refused(seed: int, count: int) -> None:
    generator = random.Random(seed)
    content = bytearray(bytes_of(random_prefix(geometry_of("llama"), 2), generator.choice(FORMAT.encodings)))
    for _ in range(count):
        content[generator.randrange(160)] = generator.randrange(256)
    try:
        state = from_bytes(bytes(content), "it")
    except CheckpointError as error:
        assert all((error.found, error.expected, error.remedy))  # noqa: PT017
    else:
        held = sum(rows.nbytes for rows in (*state.keys, *state.values))
        assert held <= len(content)


def test_what_to_set_in_llama_cpp_is_said() -> None:
    geometry = geometry_of("llama")
    prompt = as_dtype(random_prefix(geometry, 6), "float16")
    setting, loading, _ = FORMAT.advice(prompt, geometry)
    assert "--cache-type-k f16 --cache-type-v f16" in setting
    assert "--flash-attn off" in setting
    assert "the token 0, 6 times" in loading
