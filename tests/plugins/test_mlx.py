"""mlx-lm's prompt caches, without mlx: written and read bit for bit in both layouts, and refused if they are no prompt.

What mlx-lm answers with them is in `tests/serving/test_mlx.py`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoConfig

from softbridge import untrusted
from softbridge.arrays import BFLOAT16, Array, same_array
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, CheckpointError, LoweringError
from softbridge.geometry import Geometry
from softbridge.lowering.planner import Lowering, lower
from softbridge.lowering.steps import Target
from softbridge.prompt import BaseId, KeyValue, KeyValuePrefix, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.untrusted import Files
from softbridge_mlx.format import FILE, FORMAT, LAYOUTS

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
WINDOW = 8


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
}


def gemma(**changes: Any) -> Any:
    """Five layers with a window, and one without."""
    return AutoConfig.for_model("gemma3_text", **{**SIZES, "sliding_window": WINDOW, **changes})


def mistral() -> Any:
    return AutoConfig.for_model("mistral", **SIZES, sliding_window=64)


CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama": lambda: tiny_config("llama"),
    "qwen3": lambda: tiny_config("qwen3"),
    "gpt2": lambda: tiny_config("gpt2"),
    "gemma3_text": gemma,
}


def base_of(family: str) -> BaseModel:
    return BaseModel.resolve(CONFIGS[family]())


def converted(prompt: SoftPrompt, dtype: Any) -> SoftPrompt:
    (part,) = prompt.prefixes
    layers = {
        n: KeyValue(pair.keys.astype(dtype), pair.values.astype(dtype)) for n, pair in sorted(part.layers.items())
    }
    return replace(prompt, parts=(KeyValuePrefix("self", layers),))


def lowered(prompt: SoftPrompt, base: BaseModel | None, *accept: str) -> Lowering:
    return lower(prompt, Target("mlx", FORMAT.capabilities, base), accept, FORMAT.obstacles)


def put(folder: Path, content: bytes) -> Files:
    path = folder / FILE
    path.write_bytes(content)
    return Files(path)


def written(folder: Path, prompt: SoftPrompt, geometry: Geometry | None, encoding: str = "safetensors") -> Files:
    return put(folder, bytes(FORMAT.write(prompt, geometry, encoding)[FILE]))


def same(one: SoftPrompt, other: SoftPrompt) -> bool:
    ours, theirs = dict(one.arrays()), dict(other.arrays())
    return ours.keys() == theirs.keys() and all(same_array(ours[name], theirs[name]) for name in ours)


# --- written and read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_written_is_read_bit_for_bit(family: str, dtype: Any, encoding: str, tmp_path: Path) -> None:
    base = base_of(family)
    prompt = converted(random_prefix(base.geometry, 5), dtype)
    prompt = replace(prompt, base=BaseId("a/base", base.geometry))
    files = written(tmp_path, lowered(prompt, base).prompt, base.geometry, encoding)
    assert FORMAT.sniff(files)
    for geometry in (base.geometry, None):
        again = FORMAT.read(files, geometry)
        assert same(again, prompt)
        assert again.positions == prompt.positions
        assert again.base == BaseId("a/base", geometry)
    assert bytes(FORMAT.write(again, base.geometry, encoding)[FILE]) == files.path.read_bytes()


@pytest.mark.parametrize("encoding", LAYOUTS)
def test_layers_with_a_window_have_the_cache_of_one(encoding: str, tmp_path: Path) -> None:
    base = base_of("gemma3_text")
    for length in (5, 11):  # shorter and longer than the window
        written(tmp_path, random_prefix(base.geometry, length), base.geometry, encoding)
        with safe_open(tmp_path / FILE, "np") as file:
            metadata = file.metadata()
            place = 1 if encoding == "safetensors" else 2
            kinds = [metadata[f"{place}.{n}"] for n in range(6)]
            assert kinds == ["RotatingKVCache"] * 5 + ["KVCache"]
            if encoding == "safetensors":
                assert [int(file.get_tensor(f"0.{n}")) for n in range(2, 6)] == [length, 0, WINDOW, length]
                assert int(file.get_tensor("5.2")) == length
            else:
                assert [metadata[f"0.0.{n}"] for n in range(4)] == ["0", str(WINDOW), str(length), str(length)]


@pytest.mark.parametrize("release", ["0.31.3", "0.32.2"])
def test_files_of_mlx_lm_itself_are_read(release: str) -> None:
    spec = importlib.util.spec_from_file_location("make_mlx", GOLDEN / "make_mlx.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    prompt = FORMAT.read(Files(GOLDEN / f"mlx_{release}.safetensors"), None)
    (part,) = prompt.prefixes
    for layer, (keys, values) in enumerate(make.numbers()):
        assert same_array(part.layers[layer].keys, keys)
        assert same_array(part.layers[layer].values, values)
    assert len(part.layers) == make.LAYERS
    assert prompt.positions.start == {"decoder": 6}
    assert prompt.base.name == "a/base"
    assert prompt.origin is not None
    assert prompt.origin.details["windows"] == [None, WINDOW, None]


def test_what_a_caller_wrote_beside_a_cache_is_given_back() -> None:
    path = GOLDEN / "mlx_0.32.2.safetensors"
    tensors, metadata = opened(path)
    kept = {"0.tokenizer_config": '{"eos_token": "x"}', "0.mine": "a text"}
    prompt = FORMAT.read(Files(path), None)
    assert prompt.origin is not None
    details = {**prompt.origin.details, "metadata": {name[2:]: text for name, text in kept.items()}}
    prompt = replace(prompt, origin=replace(prompt.origin, details=details))
    geometry = base_of("gemma3_text").geometry
    assert geometry.decoder is not None
    shape = replace(geometry.decoder, layers=3, head_dim=4, kinds=None)  # which layers have a window, the file says
    content = bytes(FORMAT.write(prompt, replace(geometry, decoder=shape))[FILE])
    assert tensors.keys() == opened_bytes(content)[0].keys()
    assert opened_bytes(content)[1] == {**metadata, **kept}


def test_a_file_without_a_name_of_its_base_says_none(tmp_path: Path) -> None:
    base = base_of("llama")
    files = written(tmp_path, random_prefix(base.geometry), base.geometry)
    assert FORMAT.read(files, None).base.name is None
    assert "0.model" not in files.metadata(FILE)


def test_an_input_prompt_becomes_a_prefix_by_the_weights(tmp_path: Path) -> None:
    base = BaseModel.resolve(tiny_model("llama"))
    prompt = random_input_prompt(base.geometry)
    done = lowered(prompt, base)
    assert [step.name for step in done.steps] == ["prefill"]
    again = FORMAT.read(written(tmp_path, done.prompt, base.geometry), base.geometry)
    assert same(again, done.prompt)
    with pytest.raises(BaseModelError, match="weights"):
        lowered(prompt, base_of("llama"))


# --- refused ----------------------------------------------------------------------------------------------------------


def refusal(prompt: SoftPrompt, base: BaseModel) -> str:
    with pytest.raises(LoweringError) as caught:
        lowered(prompt, base)
    return str(caught.value)


def test_what_mlx_lm_has_no_place_for_is_refused() -> None:
    base = base_of("llama")
    prompt = random_prefix(base.geometry)
    (part,) = prompt.prefixes
    some = replace(prompt, parts=(KeyValuePrefix("self", {n: part.layers[n] for n in (0, 2)}),))
    assert "[layers]" in refusal(some, base)
    mixed = {n: KeyValue(pair.keys, pair.values.astype(np.float16)) for n, pair in part.layers.items()}
    assert "[precision]" in refusal(replace(prompt, parts=(KeyValuePrefix("self", mixed),)), base)
    wide = {n: KeyValue(pair.keys / np.float64(3), pair.values / np.float64(3)) for n, pair in part.layers.items()}
    assert "[dtype]" in refusal(replace(prompt, parts=(KeyValuePrefix("self", wide),)), base)
    t5 = BaseModel.resolve(tiny_config("t5"))
    assert "[family] mlx has no t5" in refusal(random_prefix(t5.geometry), t5)
    gpt2 = base_of("gpt2")
    prompt = random_prefix(gpt2.geometry)
    moved = replace(prompt, positions=replace(prompt.positions, start={"decoder": 0}))
    assert "[positions]" in refusal(moved, gpt2)


def test_keys_of_rotary_models_are_moved_to_where_mlx_lm_has_its_tokens() -> None:
    base = base_of("llama")
    prompt = random_prefix(base.geometry)
    moved = replace(prompt, positions=replace(prompt.positions, start={"decoder": 0}))
    done = lowered(moved, base)
    assert [step.name for step in done.steps] == ["rotate"]
    assert done.prompt.positions.start == {"decoder": 5}


def test_a_window_that_mlx_lm_does_not_have_is_a_condition() -> None:
    config = mistral()
    base = BaseModel.resolve(config)
    prompt = random_prefix(base.geometry)
    assert "has no sliding window, and transformers' one of 64: the same only while" in refusal(prompt, base)
    assert "at most 59 tokens" in refusal(prompt, base)
    done = lowered(prompt, base, "window")
    assert [(step.name, step.exactness) for step in done.steps] == [("window", "conditional")]
    assert "shorter than the prefix" in refusal(random_prefix(base.geometry, 64), base)
    config.sliding_window = None
    assert not lowered(prompt, BaseModel.resolve(config)).steps


def test_which_layers_have_a_window_must_be_known(tmp_path: Path) -> None:
    base = base_of("gemma3_text")
    geometry = base.geometry
    assert geometry.decoder is not None
    recorded = replace(geometry, decoder=replace(geometry.decoder, kinds=None))  # as a prompt's file has it
    prompt = random_prefix(recorded)
    with pytest.raises(LoweringError, match="which is not known"):
        lowered(prompt, None)
    # A cache that was read knows it by itself.
    read = FORMAT.read(written(tmp_path, prompt, geometry), recorded)
    assert bytes(FORMAT.write(lowered(read, None).prompt, recorded)[FILE]) == (tmp_path / FILE).read_bytes()


def test_a_cache_for_another_model_is_refused(tmp_path: Path) -> None:
    base, other = base_of("gemma3_text"), BaseModel.resolve(gemma(sliding_window=9))
    files = written(tmp_path, random_prefix(base.geometry), base.geometry)
    with pytest.raises(BaseModelError, match=r"windows of 8, 8, 8, 8, 8, none\n  expected: 9, 9"):
        FORMAT.read(files, other.geometry)
    with pytest.raises(BaseModelError, match="does not fit"):
        FORMAT.read(files, base_of("qwen3").geometry)
    llama = base_of("llama")
    files = written(tmp_path, random_prefix(llama.geometry), llama.geometry)
    with pytest.raises(BaseModelError, match="lacks"):
        FORMAT.read(files, BaseModel.resolve(tiny_config("bert")).geometry)


Tensors, Metadata = dict[str, Array], dict[str, str]
Spoil = Callable[[Tensors, Metadata], Any]


def opened(path: Path) -> tuple[Tensors, Metadata]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def opened_bytes(content: bytes) -> tuple[Tensors, Metadata]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).write_bytes(content)
        return opened(Path(folder) / FILE)


#: What is done to a file of gemma3_text (layer 0 with a window, layer 5 without) -> what is said of it.
MALFORMED: dict[str, tuple[Spoil, str]] = {
    "a tensor is missing": (lambda t, m: t.pop("3.1"), "RotatingKVCache of layer 3: tensors"),
    "a tensor too many": (lambda t, m: t.update({"6.0": t["0.0"]}), "tensors of 6, and 6 layers"),
    "a piece too many": (lambda t, m: t.update({"5.3": t["5.2"]}), "KVCache of layer 5: tensors"),
    "quantised": (lambda t, m: m.update({"1.5": "QuantizedKVCache"}), "kinds 'QuantizedKVCache'"),
    "a state": (lambda t, m: m.update({"1.0": "ArraysCache"}), "kinds 'ArraysCache'"),
    "two rows": (
        lambda t, m: t.update({"0.0": np.repeat(t["0.0"], 2, 0), "0.1": np.repeat(t["0.1"], 2, 0)}),
        "one row",
    ),
    "other values": (lambda t, m: t.update({"5.1": t["5.1"][..., :3]}), r"values \[1, 2, 5, 3\]"),
    "no numbers": (lambda t, m: t.update({"5.0": t["5.0"].astype(np.int32)}), "keys .* of int32"),
    "an offset of 0": (lambda t, m: t.update({"5.2": np.array(0, np.int32)}), "seen 0 tokens"),
    "an offset beyond": (lambda t, m: t.update({"5.2": np.array(6, np.int32)}), "seen 6 tokens, and holds 5"),
    "an offset of a half": (lambda t, m: t.update({"5.2": np.array(0.5, np.float32)}), "a whole number"),
    "offsets": (lambda t, m: t.update({"5.2": np.array([5], np.int32)}), "a whole number"),
    "a layer with fewer": (lambda t, m: t.update({"5.2": np.array(4, np.int32)}), "layers with 4, 5 tokens"),
    "some dropped": (lambda t, m: t.update({"0.2": np.array(9, np.int32)}), "has dropped some"),
    "written over": (lambda t, m: t.update({"0.5": np.array(2, np.int32)}), "the next at 2"),
    "the first kept": (lambda t, m: t.update({"0.3": np.array(4, np.int32)}), "keeps its first 4 tokens"),
    "a window of nothing": (lambda t, m: t.update({"0.4": np.array(0, np.int32)}), "at most 0 tokens"),
    "arrays for numbers": (lambda t, m: m.update({"2.1.1": "none"}), "would take for arrays"),
    "an empty cache": (lambda t, m: t.update({"5.0": np.zeros(0, np.float32)}), r"keys \[0\]"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_cache_is_refused(name: str, tmp_path: Path) -> None:
    spoil, said = MALFORMED[name]
    base = base_of("gemma3_text")
    written(tmp_path, random_prefix(base.geometry), base.geometry)
    tensors, metadata = opened(tmp_path / FILE)
    files = put(tmp_path, untrusted.safetensors_bytes(tensors, metadata))
    assert same(FORMAT.read(files, None), random_prefix(base.geometry))
    spoil(tensors, metadata)
    files = put(tmp_path, untrusted.safetensors_bytes(tensors, metadata))
    assert FORMAT.sniff(files)
    with pytest.raises(CheckpointError, match=said):
        FORMAT.read(files, None)


@pytest.mark.parametrize("value", ["", "-1", "1e3", "²", "9" * 40])
def test_a_number_of_the_older_layout_is_one(value: str, tmp_path: Path) -> None:
    base = base_of("gemma3_text")
    written(tmp_path, random_prefix(base.geometry), base.geometry, "safetensors-0.31")
    tensors, metadata = opened(tmp_path / FILE)
    files = put(tmp_path, untrusted.safetensors_bytes(tensors, {**metadata, "0.2.1": value}))
    with pytest.raises(CheckpointError, match="a whole number"):
        FORMAT.read(files, None)


def test_other_tensors_are_not_recognised(tmp_path: Path) -> None:
    from safetensors.numpy import save

    tensors = {"0.0": np.zeros((1, 2, 5, 4), np.float32), "0.1": np.zeros((1, 2, 5, 4), np.float32)}
    others = [None, {"format": "pt"}, {"2.0": "x"}, {"2.0": "", "1.0": "x"}, {"1.0": "KVCache"}]
    for metadata in others:
        files = put(tmp_path, save(tensors, metadata))
        assert not FORMAT.sniff(files)
        with pytest.raises(CheckpointError):
            FORMAT.read(files, None)
    assert not FORMAT.sniff(put(tmp_path, b"\xff" * 100))
    assert not FORMAT.sniff(put(tmp_path, b"\x40\0\0\0\0\0\0\0{" + b" " * 100))
    assert not FORMAT.sniff(Files(GOLDEN / "peft_0.18.0.safetensors"))
    (tmp_path / "more.safetensors").write_bytes(save(tensors))
    assert not FORMAT.sniff(Files(tmp_path))
    with pytest.raises(CheckpointError, match="one file of tensors"):
        FORMAT.read(Files(tmp_path), None)


def test_a_folder_with_the_one_file_is_read(tmp_path: Path) -> None:
    base = base_of("llama")
    written(tmp_path, random_prefix(base.geometry), base.geometry)
    (tmp_path / "softbridge.json").write_text("{}")
    assert FORMAT.sniff(Files(tmp_path))
    assert same(FORMAT.read(Files(tmp_path), None), random_prefix(base.geometry))
