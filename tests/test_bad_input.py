"""Whatever is wrong with a checkpoint, a conversion gives a typed error with a way out, and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, CheckpointError, SoftbridgeError, UnknownFormatError
from softbridge.testing import random_prefix, tiny_config
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
