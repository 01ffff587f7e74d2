"""A certificate is run again, and says whether it still holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli.console import app
from softbridge.errors import CheckpointError
from softbridge.testing import random_prefix, tiny_config
from softbridge.verification.recheck import verify_again

pytestmark = pytest.mark.usefixtures("remembered_runs")


@pytest.fixture
def certified(tmp_path: Path) -> Path:
    """A folder with a base, a prompt and its converted copy with a certificate."""
    config = tiny_config("gpt2")
    config.save_pretrained(tmp_path / "base")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "a", format="softbridge", base=config)
    sb.convert(tmp_path / "a", tmp_path / "b", "peft", base=str(tmp_path / "base"), verify=True)
    return tmp_path


def test_it_holds_and_the_command_says_so(certified: Path) -> None:
    again = verify_again(certified / "b" / "certificate.json")
    assert again.holds
    assert again.changes == ()
    assert again.recorded == again.certificate.verdict == "bitwise"
    done = CliRunner().invoke(app, ["verify", str(certified / "b" / "certificate.json")])
    assert done.exit_code == 0, done.output
    assert "the certificate holds" in done.output


def test_another_prompt_in_its_place_is_noticed(certified: Path) -> None:
    config = tiny_config("gpt2")
    shutil.rmtree(certified / "a")
    sb.save(random_prefix(BaseModel(config).geometry, seed=5), certified / "a", format="softbridge", base=config)
    again = verify_again(certified / "b" / "certificate.json")
    assert not again.holds
    assert "the source is another prompt" in again.changes
    assert "the verdict was bitwise, and is different" in again.changes
    done = CliRunner().invoke(app, ["verify", str(certified / "b" / "certificate.json"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.output)["holds"] is False


def test_the_same_other_prompt_on_both_sides_is_not_what_was_certified(certified: Path) -> None:
    config = tiny_config("gpt2")
    for name, form in (("a", "softbridge"), ("b", "peft")):
        kept = (certified / "b" / "certificate.json").read_bytes()
        shutil.rmtree(certified / name)
        sb.save(random_prefix(BaseModel(config).geometry, seed=5), certified / name, format=form, base=config)
        if name == "b":
            (certified / "b" / "certificate.json").write_bytes(kept)
        else:
            (certified / "kept.json").write_bytes(kept)
    shutil.copy(certified / "kept.json", certified / "b" / "certificate.json")
    again = verify_again(certified / "b" / "certificate.json")
    assert again.certificate.same
    assert not again.holds
    assert {"the source is another prompt", "the target is another prompt"} <= set(again.changes)


def test_it_is_found_where_it_was_moved_to(certified: Path) -> None:
    (certified / "moved").mkdir()
    for name in ("a", "b"):
        shutil.move(certified / name, certified / "moved" / name)
    assert verify_again(certified / "moved" / "b" / "certificate.json").holds


def test_what_is_no_certificate_is_refused(certified: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no certificate"):
        verify_again(certified / "base" / "config.json")
    recorded = json.loads((certified / "b" / "certificate.json").read_text())
    for change, message in (({"source": None}, "damaged"), ({"base": None}, "does not name the base")):
        (tmp_path / "c.json").write_text(json.dumps({**recorded, **change}))
        with pytest.raises(CheckpointError, match=message):
            verify_again(tmp_path / "c.json")
    shutil.rmtree(certified / "a")
    with pytest.raises(CheckpointError, match="there is no"):
        verify_again(certified / "b" / "certificate.json")
    assert CliRunner().invoke(app, ["verify", str(certified / "b"), str(certified / "b")]).exit_code == 2
