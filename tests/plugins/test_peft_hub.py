"""Prompts by their id on the hub: from its cache without a network, and with one no more than the prompt's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

import softbridge as sb
from softbridge.cli.console import app
from softbridge.errors import CheckpointError, SoftbridgeError
from softbridge.geometry import read_geometry
from softbridge.prompt import Positions, SoftPrompt
from softbridge.testing import random_input_prompt, random_prefix, tiny_config
from softbridge.untrusted import hub_id

OTHER_FILES = ("model.safetensors", "optimizer.pt", "tokenizer.model", "logs/run.bin", "pytorch_model-00001-of-2.bin")


def prompt(seed: int) -> SoftPrompt:
    return random_input_prompt(read_geometry(tiny_config("gpt2")), 3 + seed, seed=seed)


def written(directory: Path, seed: int, format: str = "peft") -> Path:
    sb.save(prompt(seed), directory, format=format, base=tiny_config("gpt2"))
    return directory


def same(found: SoftPrompt, seed: int) -> bool:
    return found.parts == prompt(seed).parts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def store(cache: Path, repository: str, commit: str, source: Path, *references: str) -> None:
    """A commit as the hub's own client lays it out: a snapshot of links into the store."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    for file in source.rglob("*"):
        if file.is_file():
            blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link = folder / "snapshots" / commit / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    for reference in references:
        (folder / "refs" / reference).write_text(commit)


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/name") == ("org/name", None, None)
    assert hub_id("org/name@v1.0") == ("org/name", None, "v1.0")
    assert hub_id("org/name/german@refs/pr/1") == ("org/name", "german", "refs/pr/1")
    (tmp_path / "out").mkdir()
    for path in (
        "name",
        "./org/name",
        "../org",
        "/org/name",
        "~/name",
        "out/name",
        "a/b/c/d",
        "org/name@",
        "a b/c",
        "",
    ):
        assert hub_id(path) is None, path
    for misspelt in ("out/name", "./org/name", "name"):
        with pytest.raises(CheckpointError, match="neither a file nor a folder"):
            sb.load(misspelt)


def test_the_cache_is_enough(cache: Path, tmp_path: Path) -> None:
    old, new = "0" * 40, "1" * 40
    store(cache, "org/name", old, written(tmp_path / "old", 1), "v1")
    store(cache, "org/name", new, written(tmp_path / "new", 2), "main")
    assert same(sb.load("org/name"), 2)
    assert same(sb.load("org/name", base=tiny_config("gpt2")), 2)
    for named in (sb.load("org/name@v1"), sb.load("org/name", revision="v1"), sb.load("org/name", revision=old)):
        assert same(named, 1)
    assert same(sb.load("org/name@v1", format="peft", revision="v1"), 1)
    report = sb.convert("org/name@v1", tmp_path / "converted", "softbridge", base=tiny_config("gpt2"))
    assert same(sb.load(tmp_path / "converted"), 1)
    assert (report.source.prompt.origin and report.source.prompt.origin.digests.keys()) >= {"adapter_config.json"}
    shown = CliRunner().invoke(app, ["inspect", "org/name@v1", "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["format"] == "peft"

    store(cache, "org/canonical", new, written(tmp_path / "canonical", 3, "softbridge"), "main")
    assert same(sb.load("org/canonical"), 3)


def test_another_toolkits_files_are_had_by_their_id(cache: Path, tmp_path: Path) -> None:
    config = tiny_config("gpt2")
    given = random_prefix(read_geometry(config), positions=Positions({"decoder": 0}, "skewed", "pinned"))
    sb.save(given, tmp_path / "adapter", format="adapterhub", base=config)
    for name in ("softbridge.json", *(file.name for file in (tmp_path / "adapter").glob("*.md"))):
        (tmp_path / "adapter" / name).unlink(missing_ok=True)  # as AdapterHub itself leaves them
    store(cache, "org/adapter", "4" * 40, tmp_path / "adapter", "main")
    shutil.copytree(tmp_path / "adapter", tmp_path / "two" / "english")
    store(cache, "org/two", "5" * 40, tmp_path / "two", "main")
    for named in ("org/adapter", "org/two/english", "org/two/english@main"):
        found = sb.read(named, base=config)
        assert (found.format.name, found.prompt.parts) == ("adapterhub", given.parts)


def test_adapters_in_folders_are_named(cache: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("english", "german")):
        written(tmp_path / "both" / name, number)
    store(cache, "org/both", "2" * 40, tmp_path / "both", "main")
    assert [same(sb.load(f"org/both/{name}@main"), n) for n, name in enumerate(("english", "german"))] == [True] * 2
    with pytest.raises(CheckpointError, match="english, german"):
        sb.load("org/both")
    with pytest.raises(CheckpointError, match="no folder 'french'"):
        sb.load("org/both/french")


def test_a_link_out_of_the_cache_is_no_file_of_the_prompt(cache: Path, tmp_path: Path) -> None:
    store(cache, "org/name", "3" * 40, written(tmp_path / "prompt" / "inner", 1).parent, "main")
    weights = next(cache.glob("**/snapshots/*/inner/adapter_model.safetensors"))
    assert same(sb.load("org/name/inner"), 1)
    weights.unlink()
    weights.symlink_to(tmp_path / "prompt" / "inner" / "adapter_model.safetensors")
    with pytest.raises(SoftbridgeError):
        sb.load("org/name/inner")


def test_what_is_not_to_be_had_is_said(cache: Path, tmp_path: Path) -> None:
    store(cache, "org/name", "4" * 40, written(tmp_path / "prompt", 1), "main")
    for path, revision, message in (
        ("org/missing", None, "could not be downloaded from the hub"),
        ("org/name", "v9", "at the revision 'v9'"),
        ("org/name@v1", "v2", "one of the two"),
        (str(tmp_path / "prompt"), "v1", "with a revision"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            sb.load(path, revision=revision)
        assert caught.value.remedy


def test_no_more_than_the_prompt_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub's download replaced by one from a folder, which takes the same patterns."""
    monkeypatch.chdir(tmp_path)
    remote = tmp_path / "remote"
    for place in ("", "german"):
        written(remote / place if place else tmp_path / "top", 1)
    shutil.copytree(tmp_path / "top", remote, dirs_exist_ok=True)
    for name in OTHER_FILES:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"large")
    local, fetched = tmp_path / "hub" / "models--org--name" / "snapshots" / "main", set()

    def download(
        repository: str, *, revision: str | None, allow_patterns: Sequence[str], ignore_patterns: Sequence[str]
    ) -> str:
        assert (repository, revision) == ("org/name", "v1")
        names = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
        patterns: Any = {"allow_patterns": list(allow_patterns), "ignore_patterns": list(ignore_patterns)}
        for name in filter_repo_objects(names, **patterns):
            fetched.add(name)
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(sb.load("org/name/german@v1"), 1)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "softbridge.json"}
    assert fetched == {f"german/{name}" for name in files}
    shutil.rmtree(local)
    fetched.clear()
    assert same(sb.load("org/name", revision="v1"), 1)
    assert fetched == {*files, *(f"german/{name}" for name in files)}
    # A format that does not say which files are its own gets what may hold tensors, and no model and no optimiser.
    shutil.rmtree(local)
    fetched.clear()
    shutil.rmtree(remote / "german")
    (remote / "adapter_config.json").unlink()
    (remote / "softbridge.json").unlink()
    with pytest.raises(CheckpointError):
        sb.load("org/name@v1")
    assert fetched == {"README.md", "adapter_model.safetensors", "logs/run.bin"}
