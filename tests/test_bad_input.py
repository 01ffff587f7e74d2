"""Whatever is wrong with a checkpoint, a conversion gives a typed error with a way out, and writes nothing."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.checkpoint.manifest import MANIFEST, signed
from softbridge.errors import BaseModelError, CheckpointError, OutputError, SoftbridgeError, UnknownFormatError
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import Files, json_bytes, pickle_bytes, safetensors_bytes

WEIGHTS = {"peft": "adapter_model.safetensors", "adapterhub": "pytorch_adapter.bin", "softbridge": "prompt.safetensors"}


def rewrite(directory: Path, name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    files = Files(directory)
    tensors = change({key: np.array(value) for key, value in files.tensors(name).items()})
    made = pickle_bytes(tensors) if name.endswith(".bin") else safetensors_bytes(tensors, files.metadata(name))
    (directory / name).write_bytes(made)


def missing(directory: Path, name: str) -> None:
    rewrite(directory, name, lambda tensors: {"other": np.ones(3, np.float32), **dict(list(tensors.items())[1:])})


def misshapen(directory: Path, name: str) -> None:
    rewrite(directory, name, lambda tensors: {key: value.reshape(-1)[:-1] for key, value in tensors.items()})


def not_a_number(directory: Path, name: str) -> None:
    rewrite(directory, name, lambda tensors: {key: np.full_like(value, np.nan) for key, value in tensors.items()})


def truncated(directory: Path, name: str) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:-9])


def without_weights(directory: Path, name: str) -> None:
    (directory / name).unlink()


def broken_json(directory: Path, name: str) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING", "config": ')


def unknown_type(directory: Path, name: str) -> None:
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"peft_type": "LORA"} if "peft_type" in config else {"config": {"architecture": "lora"}}
    (directory / "adapter_config.json").write_bytes(json_bytes(config))


def unknown_format(directory: Path, name: str) -> None:
    for path in directory.iterdir():
        path.rename(path.with_suffix(".txt"))


CASES = [
    (missing, CheckpointError),
    (misshapen, CheckpointError),
    (not_a_number, CheckpointError),
    (truncated, CheckpointError),
    (without_weights, CheckpointError),
    (broken_json, CheckpointError),
    (unknown_type, CheckpointError),
    (unknown_format, UnknownFormatError),
]


@pytest.mark.parametrize("source", WEIGHTS)
@pytest.mark.parametrize(("spoil", "error"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_spoilt_checkpoint_is_refused(
    source: str, spoil: Callable[[Path, str], None], error: type[SoftbridgeError], tmp_path: Path
) -> None:
    if source == "softbridge" and spoil in (broken_json, unknown_type):
        spoil = not_a_number  # it has no such file
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "source", format=source, base=config)
    (tmp_path / "source" / "softbridge.json").unlink()  # it would notice any change by its digests
    sb.load(tmp_path / "source", base=config)
    spoil(tmp_path / "source", WEIGHTS[source])
    with pytest.raises(error) as refused:
        sb.convert(tmp_path / "source", tmp_path / "out", "softbridge", base=config)
    assert refused.value.found
    assert refused.value.expected
    assert refused.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is written"


@pytest.mark.parametrize("source", WEIGHTS)
def test_another_base_model_is_refused(source: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "source", format=source, base=config)
    for other in (tiny_config("llama", num_hidden_layers=4), tiny_config("llama", num_key_value_heads=4)):
        with pytest.raises((BaseModelError, CheckpointError)) as refused:
            sb.convert(tmp_path / "source", tmp_path / "out", "softbridge", base=other)
        assert refused.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- the manifest beside the files ------------------------------------------------------------------------------------


def changes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Where -> the value with one thing in it changed: a number by one, a letter, a key that is missing."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        whole = dict(value) if isinstance(value, dict) else list(value)
        for place, other in changes(child, f"{path}.{key}"):
            whole[key] = other
            yield place, copy.deepcopy(whole)
        if isinstance(value, dict):
            yield f"{path}.{key} missing", {name: one for name, one in value.items() if name != key}
    if isinstance(value, bool) or value is None:
        yield path, 1
    elif isinstance(value, int):
        yield path, value - 1
    elif isinstance(value, str):
        yield path, "x" + value[1:]


def test_any_change_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "prompt", format="peft", base=config)
    path = tmp_path / "prompt" / MANIFEST
    whole = json.loads(path.read_text())
    assert whole == signed(whole)
    tried = list(changes(whole))
    assert len(tried) > 20
    for place, changed in tried:
        path.write_text(json.dumps(changed))
        if place == ".digest missing":  # as it was written before there was one
            assert sb.load(tmp_path / "prompt", base=config) is not None
            continue
        with pytest.raises(CheckpointError, match=MANIFEST):
            sb.load(tmp_path / "prompt", base=config)


def test_without_a_condition_a_manifest_moves_no_token(tmp_path: Path) -> None:
    """Nor with a digest of its own: what the files say, the toolkit does with them."""
    config = tiny_config("gpt2")
    prompt = random_prefix(BaseModel(config).geometry)
    moved = replace(prompt, positions=replace(prompt.positions, start={"decoder": 9}))
    sb.save(prompt, tmp_path / "plain", format="peft", base=config)
    sb.save(moved, tmp_path / "moved", format="peft", base=config, accept=["positions"])
    assert sb.load(tmp_path / "moved", base=config).positions.start == {"decoder": 9}
    path = tmp_path / "plain" / MANIFEST
    whole = json.loads(path.read_text())
    whole["positions"]["start"]["decoder"] += 1
    path.write_text(json.dumps(signed(whole)))
    with pytest.raises(CheckpointError, match="no condition says so"):
        sb.load(tmp_path / "plain", base=config)


# --- what is beside the prompt, and how much --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "files"),
    [("peft", {"adapter_config.json", "adapter_model.safetensors"}), ("llamacpp", {"prompt.bin"})],
)
def test_what_is_not_the_prompts_is_neither_read_nor_digested(form: str, files: set[str], tmp_path: Path) -> None:
    """A file without end beside it costs nothing; one in the place of its weights is refused by its first bytes."""
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "prompt", format=form, base=config)
    other = tmp_path / "prompt" / "notes"
    with other.open("wb") as stream:
        stream.truncate(2**40)
    prompt = sb.load(tmp_path / "prompt", base=config)
    assert prompt.origin is not None
    read = {*files, MANIFEST}
    assert set(prompt.origin.digests) == read
    found = sb.inspect(tmp_path / "prompt", base=config)
    assert (set(found["files"]), found["others"]) == (read, ["README.md", "notes"])
    other.rename(tmp_path / "prompt" / max(files))
    with pytest.raises(CheckpointError):
        sb.load(tmp_path / "prompt", base=config)


def test_the_members_of_a_zip_archive_are_counted_before_they_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "prompt.zip", "w") as archive:
        for number in range(70_000):
            archive.writestr(zipfile.ZipInfo(str(number)), b"")
    with pytest.raises(UnknownFormatError):
        sb.load(tmp_path / "prompt.zip")
    with pytest.raises(CheckpointError, match="of no known kind"):
        Files(tmp_path / "prompt.zip").tree("prompt.zip")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "a NUL"])
def test_a_path_that_cannot_be(name: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "prompt", format="peft", base=config)
    with pytest.raises(OutputError, match="cannot be written"):
        sb.convert(tmp_path / "prompt", tmp_path / name, "softbridge", base=config)
    with pytest.raises(OutputError, match="cannot be written"):
        sb.save(sb.load(tmp_path / "prompt", base=config), tmp_path / name, format="softbridge", base=config)
    with pytest.raises(CheckpointError):
        sb.load(tmp_path / name, base=config)


#: Family, what its configuration says instead, and what is wrong with it.
BASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "nosuch"}, "builds no model"),
    ("gpt2", {"activation_function": "nosuch"}, "builds no model"),
    ("gpt2", {"n_positions": 0}, "does not run by itself"),
    ("t5", {"relative_attention_num_buckets": 0}, "does not run by itself"),
    ("llama", {"num_hidden_layers": 10**9}, "at most"),
    ("gpt2", {"n_layer": 10**5}, "at most"),
    ("gpt2", {"num_labels": 10**8}, "at most"),
    ("gpt2", {"num_labels": 10**400}, "num_labels = a number of 401 digits"),
]


@pytest.mark.parametrize(("family", "changes", "message"), BASES, ids=[str(case[1])[:40] for case in BASES])
def test_a_base_model_that_cannot_be(family: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    for form in ("peft", "softbridge"):
        sb.save(random_input_prompt(BaseModel(config).geometry), tmp_path / form, format=form, base=config)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), **changes}))
    with pytest.raises(BaseModelError, match=message):
        sb.verify(tmp_path / "peft", tmp_path / "softbridge", base=tmp_path / "config.json")


@pytest.mark.parametrize(
    "wrong", [{"dtype": [1]}, {"files": [1]}, {"positions": [1]}, {"scale": [[1]]}, {"steps": [{"name": []}]}]
)
def test_a_manifest_of_other_types(wrong: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "prompt", format="peft", base=config)
    path = tmp_path / "prompt" / MANIFEST
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), **wrong})))
    with pytest.raises(CheckpointError, match=MANIFEST):
        sb.load(tmp_path / "prompt", base=config)
