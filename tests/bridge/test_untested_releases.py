"""Whoever runs softbridge on releases that it was not tested with is told so, once."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from typer.testing import CliRunner

import softbridge as sb
from softbridge import untested as told
from softbridge.cli.console import app
from softbridge.doctor import diagnose
from softbridge.errors import UntestedVersionWarning
from softbridge.geometry import read_geometry
from softbridge.testing import random_prefix, tiny_config, tiny_model
from softbridge_compat import untested as compat
from softbridge_compat.newest import NEWEST

Installed = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Pretend that these versions are installed, besides the newest that were tested, and that nobody was told yet."""

    def pretend(**versions: str | None) -> None:
        found = {**NEWEST, **versions}
        monkeypatch.setattr(compat, "installed", lambda name: None if found[name] is None else Version(found[name]))
        monkeypatch.setattr(told, "_warned", False)

    pretend()
    return pretend


@pytest.fixture
def files(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "base")
    sb.save(random_prefix(read_geometry(config)), tmp_path / "prompt", format="softbridge", base=config)
    return tmp_path


def test_what_is_newer(installed: Installed) -> None:
    def found(**versions: str | None) -> list[str]:
        installed(**versions)
        return [one.distribution for one in compat.untested()]

    assert found() == []
    assert found(transformers="99.0") == ["transformers"]
    assert found(torch=f"{NEWEST['torch']}+cu128") == [], "another build of the same release"
    assert found(torch=f"{NEWEST['torch']}.1+cu128") == ["torch"], "a patch release was not tested either"
    assert found(transformers="5.0.0", peft=None, adapters=None) == []
    assert found(transformers="99.0", peft="99.0") == ["transformers", "peft"]


def uses(files: Path) -> dict[str, Callable[[], Any]]:
    prompt = files / "prompt"
    return {
        "attach": lambda: sb.attach(tiny_model("llama"), prompt),
        "convert": lambda: sb.convert(prompt, files / "out", "softbridge"),
        "verify": lambda: sb.verify(prompt, prompt, base=files / "base"),
    }


@pytest.mark.parametrize("first", ["attach", "convert", "verify"])
def test_one_warning_in_a_process(first: str, installed: Installed, files: Path) -> None:
    installed(transformers="99.0", peft="98.7")
    calls = uses(files)
    with pytest.warns(UntestedVersionWarning) as caught:
        calls.pop(first)()
    (warning,) = caught
    assert warning.filename == __file__, "shown at the line of the user's that called"
    for word in ("transformers 99.0", NEWEST["transformers"], "peft 98.7", NEWEST["peft"], "softbridge doctor"):
        assert word in str(warning.message)
    assert "torch" not in str(warning.message)
    for call in calls.values():  # warnings are errors
        call()


def test_it_can_be_filtered_and_tested_versions_say_nothing(installed: Installed, files: Path) -> None:
    uses(files)["attach"]()
    installed(transformers="99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntestedVersionWarning)
        uses(files)["attach"]()


def test_doctor_names_it(installed: Installed) -> None:
    installed(torch="99.0")
    expected = [{"distribution": "torch", "installed": "99.0", "newest": NEWEST["torch"]}]
    assert diagnose().to_json()["untested"] == expected
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["untested"] == expected
    said = f"newer than the newest tested, {NEWEST['torch']}"
    assert said in CliRunner().invoke(app, ["doctor"]).stdout
    installed()
    assert diagnose().untested == ()
    assert said not in CliRunner().invoke(app, ["doctor"]).stdout


def test_a_command_says_it_on_standard_error(files: Path) -> None:
    code = (
        "from softbridge_compat.newest import NEWEST; NEWEST['transformers'] = '4.0'; NEWEST['torch'] = '2.0'\n"
        "from softbridge.cli import app; app()"
    )
    arguments = ["convert", str(files / "prompt"), str(files / "out"), "--to", "softbridge", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["certificate"] is None
    assert done.stderr.count("UntestedVersionWarning: softbridge was not tested with") == 1
    assert "(newest tested: 4.0)" in done.stderr
