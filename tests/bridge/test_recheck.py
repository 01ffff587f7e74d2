"""A certificate is run again, and says whether it still holds."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge import untrusted
from softbridge.base import BaseModel
from softbridge.checkpoint.manifest import MANIFEST, signed
from softbridge.cli.console import app
from softbridge.errors import CheckpointError
from softbridge.testing import random_prefix, tiny_config
from softbridge.verification.recheck import verify_again

pytestmark = pytest.mark.usefixtures("remembered_runs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a prompt and its converted copy with a certificate."""
    folder, config = tmp_path_factory.mktemp("made"), tiny_config("gpt2")
    config.save_pretrained(folder / "base")
    sb.save(random_prefix(BaseModel(config).geometry), folder / "a", format="softbridge", base=config)
    sb.convert(folder / "a", folder / "b", "peft", base=str(folder / "base"), verify=True)
    return folder


@pytest.fixture
def certified(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder. What the certificate names is beside it here, too."""
    return Path(shutil.copytree(made, tmp_path / "certified"))


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
    moved = certified / "moved" / "b" / "certificate.json"
    with pytest.raises(CheckpointError, match=r"base(.|\n)*--base"):
        verify_again(moved)
    assert verify_again(moved, certified / "base").holds
    shutil.move(certified / "moved" / "b", certified / "moved" / "renamed")
    assert verify_again(certified / "moved" / "renamed" / "certificate.json", certified / "base").holds


def test_what_is_no_certificate_is_refused(certified: Path) -> None:
    with pytest.raises(CheckpointError, match="no certificate"):
        verify_again(certified / "base" / "config.json")
    recorded = json.loads((certified / "b" / "certificate.json").read_text())
    for change, message in (({"source": None}, "damaged"), ({"base": None}, "does not name the base")):
        (certified / "c.json").write_text(json.dumps({**recorded, **change}))
        with pytest.raises(CheckpointError, match=message):
            verify_again(certified / "c.json")
    shutil.rmtree(certified / "a")
    with pytest.raises(CheckpointError, match=r"names the source .*, which is not beside it(.|\n)*--source"):
        verify_again(certified / "b" / "certificate.json")
    assert CliRunner().invoke(app, ["verify", str(certified / "b"), str(certified / "b")]).exit_code == 2


def edited(certified: Path, **change: object) -> Path:
    """The certificate, as a stranger may have written it; a dictionary changes what is within."""
    path = certified / "b" / "certificate.json"
    recorded = json.loads(path.read_text())
    for name, value in change.items():
        recorded[name] = {**recorded[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(recorded))
    manifest = json.loads((certified / "b" / MANIFEST).read_text())
    manifest["files"]["certificate.json"] = untrusted.sha256_of(path.read_bytes())
    (certified / "b" / MANIFEST).write_text(json.dumps(signed(manifest)))
    return path


@pytest.mark.parametrize("named", ["absolute", "../elsewhere/gone", "linked", ".hidden", "", "..", "owner/name"])
@pytest.mark.parametrize("name", ["source", "base"])
def test_what_a_stranger_names_is_neither_read_nor_fetched(
    name: str, named: str, certified: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Unless the caller gives it: there is a sound prompt, and a sound base, at each of these places."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    moved = "a" if name == "source" else "base"
    shutil.move(certified / moved, elsewhere / moved)
    (certified / "linked").symlink_to(elsewhere / moved)
    shutil.copytree(elsewhere / moved, certified / ".hidden")
    said = str(elsewhere / moved) if named == "absolute" else named
    path = edited(certified, **{name: said if name == "base" else {"path": said}})
    opened: list[object] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir", "socket.connect") and opened is not None:
            opened.append(arguments[0])

    sys.addaudithook(watch)
    with pytest.raises(CheckpointError, match=rf"names the {name} (.|\n)*--{name}"):
        verify_again(path)
    seen, opened = [str(one) for one in opened], None  # type: ignore[assignment]
    assert [one for one in seen if "elsewhere" in one or ".hidden" in one] == []
    given = {name: elsewhere / moved}
    assert verify_again(path, **given).holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"files": {}}}, "damaged certificate: source"),
        ({"target": {"files": ["x"]}}, "damaged certificate: target"),
        ({"target": {"files": None}}, "damaged certificate: target"),
        ({"source": {"digest": 5}}, "damaged certificate: source"),
        ({"source": {"path": 5}}, "damaged certificate: source"),
        ({"dtype": "Tensor"}, "damaged certificate: dtype"),
        ({"dtype": ["float32"]}, "damaged certificate: dtype"),
        ({"seed": -1}, "damaged certificate: seed"),
        ({"seed": 10**30}, "damaged certificate: seed"),
        ({"seed": True}, "damaged certificate: seed"),
        ({"verdict": ["bitwise"]}, "damaged certificate: verdict"),
        ({"level": ["exact"]}, "damaged certificate: level"),
        ({"weights": 1}, "damaged certificate: weights"),
        ({"base": 5}, "damaged certificate: base"),
    ],
)
def test_a_certificate_of_other_kinds_is_damaged(change: dict[str, object], message: str, certified: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        verify_again(edited(certified, **change))


def test_digests_of_files_are_compared_all_of_them(certified: Path) -> None:
    recorded = json.loads((certified / "b" / "certificate.json").read_text())
    weights = "adapter_model.safetensors"
    path = edited(
        certified, target={"files": {"adapter_config.json": recorded["target"]["files"]["adapter_config.json"]}}
    )
    assert verify_again(path).changes == (f"the target's file {weights} is new",)
    path = edited(certified, target={"files": {**recorded["target"]["files"], "notes": "0" * 64}})
    assert verify_again(path).changes == ("the target's file notes is gone",)
    path = edited(certified, target={"files": {**recorded["target"]["files"], weights: "0" * 64}})
    assert verify_again(path).changes == (f"the target's file {weights} has changed",)


def test_what_counts_as_the_same_is_the_callers_word(certified: Path) -> None:
    """A rounded copy that passes for the same by the level that its certificate names, and by no other."""
    base, rounded = certified / "base", certified / "rounded"
    sb.convert(certified / "a", rounded, "softbridge", base=str(base), dtype="bfloat16")
    (rounded / "softbridge.json").unlink()
    found = sb.verify(certified / "a", rounded, base=str(base), dtype="bfloat16", level="rounding")
    path = certified / "certificate.json"
    path.write_text(json.dumps(found.to_json()))
    again = verify_again(path)
    assert not again.holds
    if found.same:
        assert again.changes == ("it holds by the level that it names itself alone: --level rounding",)
        assert verify_again(path, level="rounding").holds
        assert CliRunner().invoke(app, ["verify", str(path)]).exit_code == 1
        assert CliRunner().invoke(app, ["verify", str(path), "--level", "rounding"]).exit_code == 0
    else:
        assert not verify_again(path, level="rounding").holds


@pytest.mark.parametrize(
    "words", [["--weights"], ["--dtype", "float32"], ["--seed", "0"], ["--memory", "9"], ["--python", "peft=x"]]
)
def test_options_that_mean_nothing_there_are_refused(words: list[str], certified: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(certified / "b" / "certificate.json"), *words])
    assert done.exit_code == 2
    assert f"{words[0]} with a certificate" in done.output
    both = ["verify", str(certified / "a"), str(certified / "b"), "--base", str(certified / "base"), "--source", "x"]
    assert CliRunner().invoke(app, both).exit_code == 2
