"""Many checkpoints at once: found, converted as each alone, recorded, and taken over by the next run."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from collected import CHECKPOINTS, LEFT, MANIFEST, convert, make_collection, record_of, verdicts, written

import softbridge as sb
from softbridge import conversion, untrusted
from softbridge.base import BaseModel
from softbridge.collection.find import find
from softbridge.collection.run import Outcome
from softbridge.errors import CheckpointError, OutputError
from softbridge.testing import apart, random_input_prompt, random_prefix, tiny_config, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("collection") / "made")


@pytest.fixture
def source(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(made, tmp_path / "in")
    return tmp_path / "in"


def test_what_is_found_is_converted_as_each_alone_and_all_else_is_listed_with_its_reason(
    made: Path, tmp_path: Path
) -> None:
    before = written(made)
    outcome = convert(made, tmp_path / "out")
    assert verdicts(outcome) == dict.fromkeys(CHECKPOINTS, "converted") | LEFT
    assert outcome.exit_status == 2
    assert all(record.reason is not None for record in outcome.records if record.verdict != "converted")
    for path in CHECKPOINTS:
        sb.convert(made / path, tmp_path / "alone" / path.partition(".")[0], to="softbridge")
    out = written(tmp_path / "out")
    assert out.pop(MANIFEST) == outcome.manifest.pack()
    assert out == written(tmp_path / "alone")
    for record in outcome.records:
        files = {**record.source.get("files", {}), **record.target.get("files", {})}
        assert bool(files) is (record.verdict == "converted")
        for root, side in ((made, record.source), (tmp_path / "out", record.target)):
            folder = root / side.get("path", record.path)
            for name, digest in side.get("files", {}).items():
                assert untrusted.Files(folder).digest(name) == digest
    assert written(made) == before, "no source is modified"
    reason = record_of(outcome, "broken").reason
    assert reason is not None
    assert reason.kind == "CheckpointError"
    assert reason.expected
    assert reason.remedy


def test_links_hidden_and_unreadable_folders_and_the_output_are_told_by_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "peft" / "round").symlink_to(source)
    (source / "self").symlink_to("self")
    (source / "locked").mkdir()
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if path == Path(os.path.realpath(source)) / "locked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    out = source / "out"
    found = verdicts(convert(source, out))
    assert found["peft/round"] == "left out"
    assert found["locked"] == "refused"
    assert "self" not in found, "a link to nothing"
    again = convert(source, out)
    assert verdicts(again) == {**found, "out": "left out"}
    assert again.taken_over == len(CHECKPOINTS)


def test_targets_that_would_meet_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("a/b.npy", "a/f.npy", "a.npy", "c.npy", "d/e.npy", "d/f.npy"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / name, np.ones((4, 16), np.float32))
    shutil.copyfile(tmp_path / "in" / "c.npy", tmp_path / "in" / "c.bin")
    found = {one.path: one for one in find(tmp_path / "in", tmp_path / "out")}
    assert {path for path, one in found.items() if one.verdict == "refused"} == {
        "a.npy",
        "a/b.npy",
        "a/f.npy",
        "c.bin",
        "c.npy",
    }
    assert found["d/e.npy"].target == "d/e"
    for one, other in (("a.npy", "a/b.npy"), ("a/b.npy", "a.npy"), ("c.npy", "c.bin")):
        reason = found[one].reason
        assert reason is not None
        assert other in reason.found


def test_a_folder_of_which_nothing_can_be_converted_is_refused(made: Path, tmp_path: Path) -> None:
    for folder, out, kind in (
        (made / "peft" / "prefix", tmp_path / "out", CheckpointError),
        (made / "sst2.npy", tmp_path / "out", CheckpointError),
        (made / "model", tmp_path / "out", CheckpointError),
        (made / "notes", tmp_path / "out", CheckpointError),
        (made, made, OutputError),
        (made, made.parent, OutputError),
    ):
        with pytest.raises(kind):
            convert(folder, out)
    assert not (tmp_path / "out").exists()
    assert not (made.parent / MANIFEST).exists()
    with pytest.raises(TypeError, match="quality"):
        convert(made, tmp_path / "out", quality=1)
    with pytest.raises(OutputError, match="does not store"):
        convert(made, tmp_path / "out", encoding="bin")


def test_a_format_that_is_named_is_read_where_nothing_tells_it_from_others(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    torch.save(torch.ones(4, 16), tmp_path / "in" / "a.pt")
    torch.save({"x": torch.ones(4)}, tmp_path / "in" / "b.pt")
    outcome = convert(tmp_path / "in", tmp_path / "out", format="attempt")
    assert verdicts(outcome) == {"a.pt": "converted", "b.pt": "refused"}


def test_what_is_done_is_taken_over_and_what_changed_is_not(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = convert(source, out)
    before = written(out)
    again = convert(source, out)
    assert again.taken_over == len(CHECKPOINTS)
    assert written(out) == before

    def refused(path: str, what: str) -> Outcome:
        outcome = convert(source, out)
        reason = record_of(outcome, path).reason
        assert reason is not None
        assert what in reason.found
        assert "--overwrite" in reason.remedy
        assert outcome.taken_over == len(CHECKPOINTS) - 1
        return outcome

    card = out / "sst2" / "README.md"
    card.write_text("edited\n")
    assert convert(source, out).taken_over == len(CHECKPOINTS), "a card is there to be edited"
    card.write_bytes(before["sst2/README.md"])

    array = np.load(source / "sst2.npy")
    np.save(source / "sst2.npy", array + 1)
    refused("sst2.npy", "from other files")
    assert written(out / "sst2") == {
        name: before[f"sst2/{name}"] for name in ("README.md", "prompt.safetensors", "softbridge.json")
    }
    np.save(source / "sst2.npy", array)
    assert convert(source, out).taken_over == len(CHECKPOINTS), "what stands there is not forgotten"
    assert written(out) == before

    prompt = out / "own" / "prompt.safetensors"
    prompt.write_bytes(prompt.read_bytes()[:-1])
    refused("own.safetensors", "no longer what was written")
    assert convert(source, out, overwrite=True).taken_over == len(CHECKPOINTS) - 1
    assert written(out) == before

    shutil.rmtree(out / "run")
    assert convert(source, out).taken_over == len(CHECKPOINTS) - 1, "what is gone is written anew"
    assert written(out) == before
    assert convert(source, out).manifest == first.manifest


def test_other_options_are_another_conversion(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out)
    before = written(out)
    other = convert(source, out, dtype="bfloat16")
    assert Counter(verdicts(other).values())["refused"] == len(CHECKPOINTS) + 1
    assert convert(source, out).taken_over == len(CHECKPOINTS)
    assert written(out) == before
    replaced = convert(source, out, dtype="bfloat16", overwrite=True)
    assert replaced.taken_over == 0
    assert record_of(replaced, "run").options == {"to": "softbridge", "dtype": "bfloat16"}
    assert convert(source, out, dtype="bfloat16").taken_over == len(CHECKPOINTS)
    assert convert(source, tmp_path / "task", task=0).manifest.options == {"to": "softbridge", "task": 0}


def test_the_base_models_configuration_is_an_option(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "base")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "in" / "a", format="peft", base=config)
    assert convert(tmp_path / "in", tmp_path / "out", base=tmp_path / "base").exit_status == 0
    assert convert(tmp_path / "in", tmp_path / "out", base=tmp_path / "base").taken_over == 1
    config.rope_parameters = None
    config.vocab_size += 1
    config.save_pretrained(tmp_path / "base")
    assert convert(tmp_path / "in", tmp_path / "out", base=tmp_path / "base").taken_over == 0


def test_a_dry_run_writes_nothing(made: Path, tmp_path: Path) -> None:
    outcome = convert(made, tmp_path / "out", dry_run=True)
    assert verdicts(outcome) == dict.fromkeys(CHECKPOINTS, "planned") | LEFT
    assert outcome.path is None
    assert not (tmp_path / "out").exists()


def test_a_target_that_somebody_else_wrote_is_not_taken_for_ours(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sb.convert(made / "run", out / "run", to="softbridge", dtype="bfloat16")
    outcome = convert(made, out)
    assert record_of(outcome, "run").verdict == "refused"
    assert convert(made, out).taken_over == len(CHECKPOINTS) - 1


@pytest.fixture
def prompts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Three input prompts, and the weights of their base model."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    geometry = BaseModel.resolve(model).geometry
    for seed in range(3):
        prompt = random_input_prompt(geometry, seed=seed)
        sb.save(prompt, tmp_path / "in" / str(seed), format="peft", base=model)
    return tmp_path / "in", tmp_path / "base"


def test_a_base_model_that_many_need_is_read_once_and_left_as_it_was(
    prompts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = prompts
    for name in "012":
        sb.convert(source / name, tmp_path / "alone" / name, to="adapterhub", base=base)
    read = BaseModel._read
    times: list[Any] = []

    def counted(self: BaseModel, dtype: Any) -> Any:
        times.append(dtype)
        return read(self, dtype)

    monkeypatch.setattr(BaseModel, "_read", counted)
    outcome = sb.convert_all(source, tmp_path / "out", "adapterhub", base=base)
    assert times == [torch.float32]
    assert record_of(outcome, "0").steps[0]["name"] == "prefill"
    keys = {
        (place, name): sb.load(tmp_path / place / name, base=base).prefixes[0].layers[1].keys
        for place in ("alone", "out")
        for name in "012"
    }
    for name in "012":  # the last bit of a product depends on where its numbers lie in memory
        assert apart(keys["out", name], keys["alone", name]) < 1e-5
    assert apart(keys["out", "0"], keys["alone", "1"]) > 0.1


def test_one_file_beside_folders_is_one_of_many(tmp_path: Path) -> None:
    geometry = BaseModel(tiny_config("llama")).geometry
    sb.save(random_prefix(geometry), tmp_path / "in" / "folder", format="peft", base=tiny_config("llama"))
    sb.save(random_input_prompt(geometry), tmp_path / "in" / "file.safetensors", format="softbridge")
    (tmp_path / "in" / "README.md").write_text("of a team\n")
    outcome = sb.convert_all(tmp_path / "in", tmp_path / "out", "softbridge")
    assert verdicts(outcome) == {"file.safetensors": "converted", "folder": "converted"}


def test_what_verification_says_is_in_the_record(
    prompts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, base = prompts
    shutil.rmtree(source / "2")
    prepare = conversion.prepare

    def prepared(prompt: sb.SoftPrompt, form: Any, *rest: Any) -> Any:
        """One of the two gets other numbers on its way."""
        lowering, content = prepare(prompt, form, *rest)
        if prompt.origin is not None and prompt.origin.digests == sb.load(source / "1").origin.digests:  # type: ignore[union-attr]
            other = sb.load(source / "0")
            lowering = prepare(other, form, *rest)[0]
            content = form.write(lowering.prompt, lowering.prompt.base.geometry)
        return lowering, content

    monkeypatch.setattr(conversion, "prepare", prepared)
    outcome = sb.convert_all(source, tmp_path / "out", "softbridge", base=base, verify=True)
    assert verdicts(outcome) == {"0": "converted", "1": "differs"}
    assert outcome.exit_status == 1
    assert record_of(outcome, "0").certificate == "bitwise"
    assert not (tmp_path / "out" / "1").exists()
    monkeypatch.undo()
    again = sb.convert_all(source, tmp_path / "out", "softbridge", base=base, verify=True)
    assert again.exit_status == 0
    assert again.taken_over == 1
