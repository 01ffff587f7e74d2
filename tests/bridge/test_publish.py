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

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.testing import random_prefix, tiny_config

WRITTEN = {"README.md", "prompt.safetensors", "softbridge.json"}

#: All in one process, which a hub's client takes seconds to start: each case, and what it raised or returned.
CASES = """
import json, os, sys
import softbridge as sb

found = []
for number, case in enumerate(json.load(sys.stdin)):
    try:
        report = sb.convert("source", f"out{number}", "softbridge", **case)
        request = report.pull_request
        found.append({"url": request.url, "replaces": list(request.replaces)} if request else None)
    except sb.SoftbridgeError as error:
        found.append({"kind": type(error).__name__, "said": [error.found, error.expected, error.remedy]})
print(json.dumps(found))
"""


@dataclass
class Place:
    folder: Path
    hub: Hub

    def environment(self, **changes: str) -> dict[str, str]:
        """Of a process that asks our hub. Others have switched hubs off."""
        here = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {"HF_ENDPOINT": self.hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(self.folder / "home")}
        return here | ours | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | changes

    def run(self, *cases: dict[str, Any], **changes: str) -> list[Any]:
        done = subprocess.run(
            [sys.executable, "-c", CASES],
            input=json.dumps(cases),
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment(**changes),
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found: list[Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "source", format="softbridge", base=config)
    with running() as hub:
        yield Place(tmp_path, hub)


def test_a_pull_request_holds_what_was_written(place: Place) -> None:
    """By the command line; main stays as it was. Merged, there is nothing left to propose."""
    before = {name: dict(files) for name, files in place.hub.repositories.items()}
    (place.folder / "source" / "secret.txt").write_text("not for anybody")
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from softbridge.cli import main; main()"),
            *("convert", "source", "out", "--to", "softbridge", "--push-to-hub", "owner/prompts"),
        ],
        capture_output=True,
        text=True,
        cwd=place.folder,
        env=place.environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (request,) = place.hub.pull_requests
    name, head, files = request
    assert f"pull request: {place.hub.endpoint}/owner/prompts/discussions/1" in done.stdout
    assert "it replaces README.md" in done.stdout
    assert name == "owner/prompts"
    assert "README.md" in head["description"]
    assert files == {path.name: path.read_bytes() for path in (place.folder / "out").iterdir()}
    assert set(files) == WRITTEN
    assert "sb.load('owner/prompts', base=base)" in files["README.md"].decode()
    assert place.hub.repositories == before
    place.hub.repositories["owner/prompts"].update(files)
    (again,) = place.run({"push_to_hub": "owner/prompts"})
    assert again == {"url": None, "replaces": sorted(WRITTEN)}
    assert len(place.hub.pull_requests) == 1


def test_a_repository_is_made_if_that_is_asked_for(place: Place) -> None:
    refused, made = place.run({"push_to_hub": "owner/missing"}, {"push_to_hub": "owner/missing", "create_repo": True})
    assert refused["kind"] == "PublishError"
    assert "--create-repo" in refused["said"][2]
    assert "the files stay in 'out0'" in refused["said"][2]
    assert {path.name for path in (place.folder / "out0").iterdir()} == WRITTEN
    assert made["url"] == f"{place.hub.endpoint}/owner/missing/discussions/1"
    told = place.hub.made["owner/missing"]
    assert told.get("private") is True or told.get("visibility") == "private"
    assert list(place.hub.made) == ["owner/missing"]
    assert place.hub.repositories["owner/missing"] == {".gitattributes": b""}


def test_what_cannot_be_proposed_is_refused_with_what_to_do(place: Place) -> None:
    forbidden, no_id, one_file, planned = place.run(
        {"push_to_hub": "owner/forbidden"},
        {"push_to_hub": "owner/prompts/folder"},
        {"push_to_hub": "owner/prompts", "dry_run": True, "format": "nothing"},
        {"push_to_hub": "owner/prompts", "dry_run": True},
    )
    assert forbidden["kind"] == "PublishError"
    assert "you may not propose anything here" in forbidden["said"][0]
    assert "HF_TOKEN" in forbidden["said"][2]
    assert (place.folder / "out0").exists(), "what was written stays"
    assert no_id["kind"] == "PublishError"
    assert one_file["kind"] == "UnknownFormatError"
    assert planned is None
    assert not any((place.folder / f"out{number}").exists() for number in (1, 2, 3))
    (other,) = place.run({"push_to_hub": "owner/prompts", "overwrite": True}, HF_TOKEN="hf_" + "b" * 34)
    assert other["kind"] == "PublishError"
    assert "hf auth login" in other["said"][2]
    assert not place.hub.pull_requests


@pytest.mark.parametrize(
    ("changes", "said"), [({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"), ({"HF_TOKEN": ""}, "no token for the hub")]
)
def test_without_a_hub_or_a_token_nothing_is_begun(changes: dict[str, str], said: str, place: Place) -> None:
    (found,) = place.run({"push_to_hub": "owner/prompts"}, **changes)
    assert found["kind"] == "PublishError"
    assert said in found["said"][0]
    assert not (place.folder / "out0").exists()
    assert not place.hub.requests
