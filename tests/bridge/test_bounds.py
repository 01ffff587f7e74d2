"""What is claimed or named and cannot be: typed errors, in bounded time and memory, whoever would have failed of it.

Each of these ended otherwise once: in an exception of a library, after minutes, or in gigabytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.checkpoint.manifest import MANIFEST, signed
from softbridge.errors import SoftbridgeError
from softbridge.prompt.soft_prompt import MOST
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import Files
from softbridge.verification.recheck import verify_again
from softbridge.verification.recording import unpack
from softbridge.verification.texts import read_texts

#: Of processor time for a refusal, and megabytes that it may add to the most that the process ever held.
SECONDS, MEGABYTES = 4.0, 400
#: An integer that json reads, and whose text nobody wants to see.
LONG = int("9" * 4200)


@contextmanager
def refused(longest: int = 0) -> Iterator[None]:
    """An error of softbridge's whose message can be printed and read, in bounded time and memory."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SoftbridgeError) as error:
        yield
    assert time.process_time() - begin < SECONDS
    if sys.platform == "linux":  # elsewhere it is counted in bytes
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES
    message = str(error.value).encode("utf-8")
    assert len(message) < 2500 + 2 * longest, message[:200]
    assert all((error.value.found, error.value.expected, error.value.remedy))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("llama"), tiny_config("llama")
    config.save_pretrained(folder / "base")
    geometry = BaseModel(config).geometry
    for name, form in (("peft", "peft"), ("own", "softbridge")):
        sb.save(random_prefix(geometry), folder / name, format=form, base=config)
    sb.save(random_input_prompt(geometry), folder / "input", format="peft", base=config)
    return folder


def changed(path: Path, **facts: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
    return path


# --- base models' configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        ("llama", {"num_hidden_layers": 100_000}),
        ("llama", {"num_hidden_layers": 10**12}),
        ("gpt2", {"n_layer": 100_000}),
        ("bert", {"num_labels": 10**6}),
        ("bert", {"num_labels": 10**12}),
        ("bert", {"id2label": {str(number): "x" for number in range(70_000)}}),
        ("bert", {"num_labels": -1}),
        ("bert", {"num_labels": 0}),
        ("bert", {"problem_type": "nosuch"}),
        ("bert", {"problem_type": ["x"]}),
        ("t5", {"d_kv": 10**6}),
        ("t5", {"d_kv": 10**12}),
        ("t5", {"relative_attention_num_buckets": 0}),
        ("llama", {"hidden_act": "nosuch"}),
        ("gpt2", {"activation_function": "nosuch"}),
        ("llama", {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 10000.0}}),
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"head_dim": 10**12}),
        ("llama", {"hidden_size": 10**9}),
        ("llama", {"text_config": {"model_type": "llama"}}),
        ("llama", {"num_hidden_layers": LONG}),
        ("llama", {"hidden_size": LONG}),
        ("llama", {"num_labels": LONG}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_configuration_that_no_model_has(family: str, facts: Mapping[str, Any], tmp_path: Path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path / "base")
    changed(tmp_path / "base" / "config.json", **facts)
    for name, form in (("a", "softbridge"), ("b", "peft")):
        sb.save(random_prefix(BaseModel(config).geometry), tmp_path / name, format=form, base=config)
    with refused():
        sb.verify(tmp_path / "a", tmp_path / "b", base=str(tmp_path / "base"))


# --- manifests and our own files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": ["float32"]},
        {"dtype": {}},
        {"dtype": LONG},
        {"softbridge": LONG},
        {"softbridge": [1]},
        {"format": ["peft"]},
        {"steps": [[]]},
        {"scale": {"decoder": 10**400}},
        {"scale": {"decoder": []}},
        {"source": {"digests": []}},
        {"files": {"../x": "a"}},
        *({"positions": {"start": {"decoder": n}}} for n in (10**300, 10**18, MOST, -1, True, 1.5, None, [])),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_manifest_that_says_what_cannot_be(facts: Mapping[str, Any], llama: Path, tmp_path: Path) -> None:
    files = Files(llama / "input")
    (tmp_path / "a").mkdir()
    for name in files.names:
        (tmp_path / "a" / name).write_bytes((llama / "input" / name).read_bytes())
    path = tmp_path / "a" / MANIFEST
    told = json.loads(path.read_text())
    told["steps"] = [{"name": "positions", "exactness": "conditional", "note": ""}]
    path.write_text(json.dumps(signed({**told, **facts})))
    with refused():
        sb.load(tmp_path / "a", base=tiny_config("llama"))


def test_tokens_beyond_the_models_positions(tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "a", format="peft", base=config)
    told = json.loads((tmp_path / "a" / MANIFEST).read_text())
    told |= {"steps": [{"name": "positions", "exactness": "conditional", "note": ""}]}
    told["positions"]["start"] = {"decoder": 128}
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(signed(told)))
    with refused():
        sb.verify(tmp_path / "a", tmp_path / "a", base=config)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"a":' + "[" * 50 + ",".join(["[]"] * 2_000_000) + "]" * 50 + "}",
        "{" + ",".join(f'"{number}":0' for number in range(600_000)) + "}",
        '{"a":[' + ",".join(['{"a":0}'] * 600_000) + "]}",
        '{"a":' + "[" * 3_000_000 + "]" * 3_000_000 + "}",
    ],
    ids=["lists", "keys", "objects", "deep"],
)
def test_millions_of_values(text: str, tmp_path: Path) -> None:
    assert len(text) < 2**23
    (tmp_path / "a.json").write_text(text)
    with refused():
        Files(tmp_path / "a.json").json("a.json")


def test_thousands_of_folders(llama: Path, tmp_path: Path) -> None:
    content = (llama / "peft" / "adapter_config.json").read_text()[:-2] + ', "x": "' + "x" * 100_000 + '"}'
    for number in range(300):
        (tmp_path / f"s{number}").mkdir()
        (tmp_path / f"s{number}" / "adapter_config.json").write_text(content)
    with refused():
        sb.load(tmp_path, base=tiny_config("llama"))


@pytest.mark.parametrize("name", ["README.md", "other.bin", "model.safetensors", "tokenizer.json"])
def test_a_terabyte_beside_a_prompt_is_not_read(name: str, llama: Path, tmp_path: Path) -> None:
    for own in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / own).write_bytes((llama / "peft" / own).read_bytes())
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(10**12)  # sparse
    begin = time.process_time()
    found = sb.load(tmp_path, base=tiny_config("llama"), format="peft")
    assert time.process_time() - begin < SECONDS
    assert found.origin is not None
    assert name not in found.origin.digests


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", MANIFEST])
def test_a_terabyte_in_the_place_of_a_file(name: str, llama: Path, tmp_path: Path) -> None:
    for own in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / own).write_bytes((llama / "peft" / own).read_bytes())
    with (tmp_path / name).open("r+b" if (tmp_path / name).exists() else "wb") as stream:
        stream.truncate(10**12)
    with refused():
        sb.load(tmp_path, base=tiny_config("llama"))


# --- names and paths --------------------------------------------------------------------------------------------------

DOORS: Mapping[str, Callable[[str, Path], Any]] = {
    "load": lambda path, llama: sb.load(path, base=tiny_config("llama")),
    "inspect": lambda path, llama: sb.inspect(path),
    "base": lambda path, llama: BaseModel.resolve(path).geometry,
    "target": lambda path, llama: sb.convert(llama / "peft", path, "softbridge", base=tiny_config("llama")),
    "certificate": lambda path, llama: verify_again(path),
    "recording": lambda path, llama: unpack(path),
    "texts": lambda path, llama: read_texts(Path(path), str(llama / "base")),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "~nosuchuser/x", "a/" * 3000 + "b", "\udcff/x", "/dev/zero"])
def test_a_path_that_is_none(door: str, path: str, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if door == "target" and path in ("~nosuchuser/x", "\udcff/x"):
        pytest.skip("that is a path like any other")
    with refused(len(path)):
        DOORS[door](path, llama)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf8(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.bin")).write_bytes(b"{}")
    with refused():
        sb.load(folder)
    for own in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / own).write_bytes((llama / "peft" / own).read_bytes())
    assert sb.load(folder, base=tiny_config("llama")).prefixes, "a neighbour's name is no matter"
    moved = folder.rename(tmp_path / os.fsdecode(b"\xff"))
    assert sb.load(moved, base=tiny_config("llama")).prefixes
    with refused():  # safetensors opens no such path, which PEFT's own loader would have it do
        sb.verify(moved, llama / "own", base=tiny_config("llama"))


@pytest.mark.parametrize("hidden", ["", "adapter_config.json", "adapter_model.safetensors"])
def test_what_may_not_be_opened(hidden: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root, to whom nothing is forbidden."""
    for own in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / own).write_bytes((llama / "peft" / own).read_bytes())
    opened, listed = Path.open, Path.iterdir

    def no(path: Path) -> None:
        if path == (tmp_path / hidden if hidden else tmp_path):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", lambda self, *args, **more: (no(self), opened(self, *args, **more))[1])
    monkeypatch.setattr(Path, "iterdir", lambda self: (no(self), listed(self))[1])
    with refused():
        sb.load(tmp_path, base=tiny_config("llama"))
