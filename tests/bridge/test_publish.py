"""`convert --push-to-hub`: a pull request with what was written, and nothing of the main branch is touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, Hub, running
from huggingface_hub import constants

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.testing import random_prefix, tiny_config

WRITTEN = {"README.md", "prompt.safetensors", "softbridge.json"}

#: All in one process, which takes seconds to start: each case, and what it returned or raised.
CASES = """
import json, os, sys
import softbridge as sb

found = []
for number, case in enumerate(json.load(sys.stdin)):
    os.environ["HF_TOKEN"] = case.pop("token", os.environ["HF_TOKEN"])
    try:
        report = sb.convert("source", f"out{number}", "softbridge", **case)
        request = report.pull_request
        found.append({"url": request.url, "replaces": list(request.replaces)} if request else None)
    except sb.SoftbridgeError as error:
        found.append({"kind": type(error).__name__, "said": [error.found, error.expected, error.remedy]})
print(json.dumps(found))
"""
#: In this order, and each into a folder of its own.
ASKED: dict[str, dict[str, Any]] = {
    "again": {"push_to_hub": "owner/prompts"},
    "missing": {"push_to_hub": "owner/missing"},
    "made": {"push_to_hub": "owner/missing", "create_repo": True},
    "forbidden": {"push_to_hub": "owner/forbidden"},
    "no id": {"push_to_hub": "owner/prompts/folder"},
    "planned": {"push_to_hub": "owner/prompts", "dry_run": True},
    "stranger": {"push_to_hub": "owner/prompts", "token": "hf_" + "b" * 34},
}


@dataclass
class Run:
    """What a process that asks our hub printed and left behind, on the command line, and then for each case."""

    folder: Path
    hub: Hub
    before: dict[str, dict[str, bytes]]
    printed: str
    found: dict[str, Any]

    def written(self, case: str) -> set[str] | None:
        folder = self.folder / f"out{list(ASKED).index(case)}"
        return {path.name for path in folder.iterdir()} if folder.exists() else None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder, config = tmp_path_factory.mktemp("pushed"), tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), folder / "source", format="softbridge", base=config)
    (folder / "source" / "secret.txt").write_text("not for anybody")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with running() as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

        def python(program: str, *arguments: str, given: str = "") -> str:
            command = [sys.executable, "-c", program, *arguments]
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, cwd=folder, env=environment, check=False
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        before = {name: dict(files) for name, files in hub.repositories.items()}
        line = ("convert", "source", "out", "--to", "softbridge", "--push-to-hub", "owner/prompts")
        printed = python("from softbridge.cli import main; main()", *line)
        merged = dict(hub.repositories)
        hub.repositories["owner/prompts"] = merged["owner/prompts"] | hub.pull_requests[0][2]
        found = json.loads(python(CASES, given=json.dumps(list(ASKED.values()))))
        hub.repositories["owner/prompts"] = merged["owner/prompts"]
        yield Run(folder, hub, before, printed, dict(zip(ASKED, found, strict=True)))


def test_a_pull_request_holds_what_was_written(run: Run) -> None:
    name, head, files = run.hub.pull_requests[0]
    assert f"pull request: {run.hub.endpoint}/owner/prompts/discussions/1" in run.printed
    assert "it replaces README.md" in run.printed
    assert name == "owner/prompts"
    assert "README.md" in head["description"]
    assert files == {path.name: path.read_bytes() for path in (run.folder / "out").iterdir()}
    assert set(files) == WRITTEN
    assert "sb.load('owner/prompts', base=base)" in files["README.md"].decode()


def test_no_main_branch_is_touched(run: Run) -> None:
    assert run.hub.repositories == {**run.before, "owner/missing": {".gitattributes": b""}}
    assert len(run.hub.pull_requests) == 2


def test_what_was_merged_is_not_proposed_again(run: Run) -> None:
    assert run.found["again"] == {"url": None, "replaces": sorted(WRITTEN)}


def test_a_repository_is_made_if_that_is_asked_for(run: Run) -> None:
    refused = run.found["missing"]
    assert refused["kind"] == "PublishError"
    assert "--create-repo" in refused["said"][2]
    assert "the files stay in 'out1'" in refused["said"][2]
    assert run.written("missing") == WRITTEN
    assert run.found["made"]["url"] == f"{run.hub.endpoint}/owner/missing/discussions/2"
    assert list(run.hub.made) == ["owner/missing"]
    told = run.hub.made["owner/missing"]
    assert told.get("private") is True or told.get("visibility") == "private"


def test_what_the_hub_does_not_take_is_refused_with_what_to_do(run: Run) -> None:
    forbidden, stranger = run.found["forbidden"], run.found["stranger"]
    assert forbidden["kind"] == stranger["kind"] == "PublishError"
    assert "you may not propose anything here" in forbidden["said"][0]
    assert "HF_TOKEN" in forbidden["said"][2]
    assert "hf auth login" in stranger["said"][2]
    assert run.written("forbidden") == WRITTEN, "what was written stays"


def test_what_cannot_be_proposed_is_not_begun(run: Run) -> None:
    assert run.found["no id"]["kind"] == "PublishError"
    assert run.found["planned"] is None
    assert (run.written("no id"), run.written("planned")) == (None, None)


@pytest.mark.parametrize(
    ("offline", "target", "said"),
    [(True, "out", "HF_HUB_OFFLINE"), (False, "out", "no token for the hub"), (False, "one.safetensors", "one file")],
)
def test_without_a_hub_or_a_token_nothing_is_begun(
    offline: bool, target: str, said: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if target != "out":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    asked = list(run.hub.requests)
    with pytest.raises(sb.SoftbridgeError, match=said):
        sb.convert(run.folder / "source", tmp_path / target, "softbridge", push_to_hub="owner/prompts")
    assert not (tmp_path / target).exists()
    assert run.hub.requests == asked
