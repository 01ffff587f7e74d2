"""Nothing that lies beside a checkpoint, or in a base model's folder, is ever imported, downloaded or asked about."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from softbridge.base import BaseModel
from softbridge.errors import BaseModelError, CheckpointError, EngineError
from softbridge.geometry import text_part
from softbridge.testing import tiny_config, tiny_model
from softbridge.untrusted import safetensors_bytes
from softbridge.verification import recording
from softbridge.verification.texts import read_texts

MARK = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("somebody was asked on the terminal")

    monkeypatch.setattr(builtins, "input", asked)


def test_the_other_interpreter_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("softbridge", "typing_extensions", "torch", "typer"):
        (tmp_path / f"{name}.py").write_text(MARK)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="refused: 'missing'"):
        recording.record_elsewhere(sys.executable, "missing", ["--base", "missing"], tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    subprocess.run([sys.executable, "-c", "from softbridge.cli import main; main()"], check=False, capture_output=True)
    assert (tmp_path / "executed").exists(), "this test cannot fail"


def test_the_other_interpreter_gets_its_inputs_as_data(tmp_path: Path) -> None:
    """No shell sees them, a path that looks like an option is a path, and what comes back is a stranger's file."""
    seen, answer = tmp_path / "seen", tmp_path / "answer"
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys\n"
        f"pathlib.Path({str(seen)!r}).write_text(json.dumps(sys.argv[1:]))\n"
        f"answer = pathlib.Path({str(answer)!r})\n"
        "out = sys.argv[sys.argv.index('--output') + 1]\n"
        "pathlib.Path(out).write_bytes(answer.read_bytes())\n"
    )
    script.chmod(0o755)
    hostile = "--weights; touch $(echo executed) `touch executed` 'x' \n"
    for content in (b"nothing", b"\x80\x02cos\nsystem\n(S'touch executed'\ntR.", b"", safetensors_bytes({})):
        answer.write_bytes(content)
        with pytest.raises(CheckpointError, match="no recording"):
            recording.record_elsewhere(str(script), hostile, ["--base", hostile], tmp_path / "out")
        words = json.loads(seen.read_text())
        assert words[-2:] == ["--", hostile]
        assert words[words.index("--base") + 1] == hostile
    assert not list(tmp_path.rglob("executed"))
    base = saved(tmp_path / "base")
    with pytest.raises(EngineError, match=r"refused: '--weights' is neither a file nor a folder"):
        recording.record_elsewhere(sys.executable, "--weights", ["--base", str(base)], tmp_path / "out")


def saved(folder: Path, family: str = "llama", **facts: Any) -> Path:
    tiny_config(family).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | facts))
    return folder


@pytest.mark.parametrize("value", ["user/kernel", "paged|user/kernel@main:forward"])
def test_a_kernel_of_the_hub_is_refused(value: str, tmp_path: Path) -> None:
    BaseModel.resolve(saved(tmp_path / "plain", _attn_implementation="sdpa"))
    with pytest.raises(BaseModelError, match="user/kernel") as refused:
        BaseModel.resolve(saved(tmp_path / "base", _attn_implementation=value))
    assert "download" in str(refused.value)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("inner", [False, True], ids=["the model's", "a part's"])
def test_no_kernel_of_the_hub_gets_through(key: str, inner: bool, tmp_path: Path) -> None:
    """Some releases drop a key, or overwrite a part's by the whole's: then nothing is left to refuse."""
    folder = saved(tmp_path, **{key: "user/kernel"})
    if inner:
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    try:
        base = BaseModel.resolve(folder)
    except BaseModelError as error:
        assert "user/kernel" in str(error)  # noqa: PT017
        return
    for config in (base.config, text_part(base.config)):
        for name in ("_attn_implementation", "_experts_implementation"):
            assert getattr(config, name, None) in (None, "eager", "sdpa")


def test_a_base_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    base = saved(
        tmp_path, model_type="mine", auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}
    )
    (base / "code.py").write_text(MARK)
    with pytest.raises(BaseModelError, match="code"):
        BaseModel.resolve(base)
    assert not (base / "executed").exists()


def test_a_head_of_foreign_code_is_not_asked_for(tmp_path: Path) -> None:
    """transformers has the configuration, and the folder brings a class for a head that transformers has not."""
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForMaskedLM": "code.Model", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(MARK)
    base = BaseModel.resolve(tmp_path)
    assert base.bare() is not None
    assert base.structure(torch.float32) is not None
    assert base.weights(torch.float32) is not None
    assert not (tmp_path / "executed").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    (base / "code.py").write_text(MARK)
    (base / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    )
    (tmp_path / "texts.txt").write_text("a b c\n")
    with pytest.raises(BaseModelError, match="no tokenizer"):
        read_texts(tmp_path / "texts.txt", str(base))
    assert not list(tmp_path.rglob("executed"))
