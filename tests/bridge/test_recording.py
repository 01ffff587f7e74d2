"""Sides that are recorded by themselves and judged later, as when they run in two environments."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli.console import app
from softbridge.errors import CheckpointError, EngineError, SoftbridgeError
from softbridge.plugin.registry import engines
from softbridge.testing import random_prefix, tiny_config
from softbridge.verification import Certificate, compare, probe, proof, verify
from softbridge.verification.recorded import Recording
from softbridge.verification.recording import pack, unpack

pytestmark = pytest.mark.usefixtures("remembered_runs")

#: The interpreter of the other stack's environment, which `make test` names; else this one, in a process of its own.
OTHER = os.environ.get("SOFTBRIDGE_OTHER_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Llama prefix as PEFT's, as AdapterHub's (its keys rotated) and as our own, another prefix, and the base."""
    folder = tmp_path_factory.mktemp("files")
    config = tiny_config("llama")
    config.save_pretrained(folder / "base")
    geometry = BaseModel(config).geometry
    for name in ("peft", "adapterhub", "softbridge"):
        sb.save(random_prefix(geometry), folder / name, format=name, base=config)
    sb.save(random_prefix(geometry, seed=1), folder / "other", format="peft", base=config)
    return folder


def test_two_recordings_are_judged_as_a_verification_is(files: Path, tmp_path: Path) -> None:
    base = str(files / "base")
    recordings = []
    for name in ("peft", "adapterhub"):
        (tmp_path / name).write_bytes(pack(probe(files / name, base=base)))
        recordings.append(unpack(tmp_path / name))
    judged, direct = compare(*recordings), verify(files / "peft", files / "adapterhub", base=base)
    assert judged.same
    assert judged.rounded == direct.rounded == ("rotate",)
    for one, other in zip(judged.figures, direct.figures, strict=True):
        assert one.probe == other.probe
        assert one.float64 == pytest.approx(other.float64, rel=1e-6), "sums may round otherwise at another address"
    assert {fault.name for fault in judged.faults} == {fault.name for fault in direct.faults}
    assert (judged.source, judged.target) == (direct.source, direct.target)
    assert judged.scale == pytest.approx(direct.scale)


def test_another_prompt_is_different_and_other_probes_are_refused(files: Path) -> None:
    base = str(files / "base")
    here = probe(files / "peft", base=base)
    assert compare(here, probe(files / "other", base=base)).verdict == "different"
    with pytest.raises(SoftbridgeError, match="recordings of different model, seed"):
        compare(here, probe(files / "peft", base=base, seed=1))
    with pytest.raises(SoftbridgeError, match="recordings of different model"):
        compare(here, probe(files / "peft", base=base, texts=[[5, 6, 7], [8, 9]]))
    with pytest.raises(SoftbridgeError, match="recordings of different precision"):
        compare(here, probe(files / "peft", base=base, dtype="bfloat16"))


def test_one_side_in_another_environment(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdapterHub's side where AdapterHub is, if this run was told; our own where it is not."""
    base, recorded = files / "base" / "config.json", []
    elsewhere = proof.record_elsewhere

    def kept(*asked: Any) -> Recording:
        recorded.append(elsewhere(*asked))
        return recorded[-1]

    monkeypatch.setattr(proof, "record_elsewhere", kept)
    there = "adapterhub" if engines()["adapterhub"].unavailable() is not None and sys.executable != OTHER else "peft"
    other = "peft" if there == "adapterhub" else "softbridge"
    words = ["--base", str(base), "--python", f"{there}={OTHER}", "--json"]
    done = CliRunner().invoke(app, ["verify", str(files / other), str(files / there), *words])
    assert done.exit_code == 0, done.output
    certificate = json.loads(done.output)
    assert certificate["verdict"] in ("bitwise", "exact")
    assert certificate["target"]["engine"] == there
    assert all(fault["noticed"] for fault in certificate["faults"])
    (other_side,) = recorded
    assert compare(probe(files / "other", base=base, against=files / there), other_side).verdict == "different"


def test_the_commands(files: Path, tmp_path: Path) -> None:
    base = ["--base", str(files / "base" / "config.json")]
    for name in ("peft", "softbridge", "other"):
        done = CliRunner().invoke(
            app, ["probe", str(files / name), *base, "--output", str(tmp_path / f"{name}.safetensors")]
        )
        assert done.exit_code == 0, done.output
    names = [str(tmp_path / f"{name}.safetensors") for name in ("peft", "softbridge", "other")]
    assert CliRunner().invoke(app, ["compare", *names[:2]]).exit_code == 0
    assert CliRunner().invoke(app, ["compare", names[0], names[2]]).exit_code == 1
    assert (
        CliRunner().invoke(app, ["compare", names[0], str(files / "peft" / "adapter_model.safetensors")]).exit_code == 2
    )
    for words in (["--python", "native"], ["--python", "adapterhub=x"]):
        done = CliRunner().invoke(app, ["verify", str(files / "peft"), str(files / "softbridge"), *base, *words])
        assert done.exit_code == 2, done.output


def test_what_cannot_be_started_or_read_is_refused(files: Path, tmp_path: Path) -> None:
    base = str(files / "base")
    with pytest.raises(EngineError, match="cannot be started"):
        verify(files / "peft", files / "softbridge", base=base, python={"peft": str(tmp_path / "python")})
    with pytest.raises(EngineError, match="exit status 2"):
        verify(files / "peft", files / "softbridge", base=base, python={"peft": str(_refusing(tmp_path))})
    with pytest.raises(SoftbridgeError, match="handed to another interpreter"):
        verify(files / "peft", files / "softbridge", base=tiny_config("llama"), python={"peft": OTHER})
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        unpack(tmp_path / "x.safetensors")


def _refusing(folder: Path) -> Path:
    script = folder / "refuses"
    script.write_text("#!/bin/sh\necho refused: no >&2\nexit 2\n")
    script.chmod(0o755)
    return script


def test_own_texts(files: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps({"ids": [[5, 6, 7, 8], [9, 10], [600, 11, 12]]}))
    words = [
        "verify",
        str(files / "peft"),
        str(files / "softbridge"),
        "--base",
        str(files / "base"),
        "--texts",
        str(texts),
    ]
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["longest"] == 4
    texts.write_text("a text\nanother\n")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "no tokenizer" in refused.output


def test_a_tokenizer_of_the_base_is_used(files: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"unknown": 3, "one": 40, "two": 41, "three": 42}, unk_token="unknown"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "base")
    tiny_config("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "texts.txt").write_text("one two three\n\ntwo two four\n")
    from softbridge.verification.texts import read_texts

    expected = [[40, 41, 42], [41, 41, 3]]
    assert read_texts(tmp_path / "texts.txt", str(tmp_path / "base")) == expected
    assert read_texts(tmp_path / "texts.txt", str(tmp_path / "base" / "config.json")) == expected
    certificate = verify(files / "peft", files / "softbridge", base=str(files / "base"), texts=expected)
    assert isinstance(certificate, Certificate)
    assert certificate.longest == 3
