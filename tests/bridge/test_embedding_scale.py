"""Vectors that another release of transformers multiplies by another number: recorded, asked for, and made up for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import softbridge as sb
from softbridge import initialisation, methods, tools
from softbridge.base import BaseModel, build
from softbridge.checkpoint.manifest import MANIFEST, signed
from softbridge.cli.console import app
from softbridge.errors import BaseModelError, CheckpointError, LoweringError, SoftbridgeError
from softbridge.lowering.expressible import inexpressible
from softbridge.lowering.planner import lower
from softbridge.lowering.steps import Target
from softbridge.plugin.registry import engine_named
from softbridge.prompt import InputPrompt, Positions, SoftPrompt, digest_of, pack
from softbridge.testing import random_input_prompt, tiny_config, tiny_model
from softbridge.verification import verify

#: The interpreter of the other stack's environment, if this run was told.
OTHER = os.environ.get("SOFTBRIDGE_OTHER_PYTHON", sys.executable)
SIZES = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
CONFIG = AutoConfig.for_model("gemma", **SIZES, vocab_size=96, num_key_value_heads=1, max_position_embeddings=128)
BASE = BaseModel(CONFIG)
HERE = BASE.scale or 0.0
#: What the releases on the other side of the move multiply by, and one of them.
THERE, RELEASE = next((BASE.scale_on(r) or 0.0, r) for r in ("4.57", "5.4.0") if BASE.scale_on(r) != HERE)
IDS = torch.tensor([[5, 9, 17, 33, 21, 60]])


def prompt(scale: float | None = None, length: int = 5) -> SoftPrompt:
    """One that is as large as the model's word vectors, wherever it is for."""
    made = random_input_prompt(BASE.geometry, length, std=0.8 * (48**0.5 / (scale or HERE)))
    return replace(made, parts=(replace(made.inputs[0], scale=scale),))


def model() -> Any:
    return build(CONFIG, "causal-lm", torch.float64, 0)


def logits(given: SoftPrompt, engine: str = "native", **more: Any) -> torch.Tensor:
    """At the real tokens."""
    running = sb.attach(model(), given, engine, **more)
    with torch.no_grad():
        found: torch.Tensor = running(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found[:, -IDS.shape[1] :]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def vectors(given: SoftPrompt) -> np.ndarray:
    return given.inputs[0].vectors


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A prompt in both formats with what multiplies it, PEFT's files alone, and the base."""
    CONFIG.save_pretrained(tmp_path / "base")
    for name in ("peft", "softbridge"):
        sb.save(prompt(), tmp_path / name, format=name, base=CONFIG)
    shutil.copytree(tmp_path / "peft", tmp_path / "bare")
    (tmp_path / "bare" / MANIFEST).unlink()
    return tmp_path


def test_whoever_makes_vectors_on_a_model_records_what_multiplies_them(folders: Path) -> None:
    running = sb.attach(model(), methods.PromptTuning(5), seed=0)
    assert sb.extract(running).inputs[0].scale == HERE
    assert initialisation.text(model(), [5, 6, 7]).inputs[0].scale == HERE
    for name in ("peft", "softbridge"):
        assert sb.load(folders / name).inputs[0].scale == HERE
    assert json.loads((folders / "peft" / MANIFEST).read_text())["scale"] == {"decoder": HERE}
    assert sb.load(folders / "bare").inputs[0].scale == "untold"


def test_where_all_releases_agree_nothing_is_recorded_or_asked(tmp_path: Path) -> None:
    config = tiny_config("llama")
    assert BaseModel(config).scale is None
    assert BaseModel(config).scale_on("4.57") is None
    given = random_input_prompt(BaseModel(config).geometry)
    sb.save(given, tmp_path / "peft", format="peft", base=config)
    assert "scale" not in json.loads((tmp_path / "peft" / MANIFEST).read_text())
    (tmp_path / "peft" / MANIFEST).unlink()
    assert sb.load(tmp_path / "peft", base=config, trained_on="4.57") == replace(
        given, base=replace(given.base, name=None)
    )
    read = sb.extract(sb.attach(tiny_model("llama"), tmp_path / "peft"))
    assert b'"scale"' not in pack(read)
    assert read.inputs[0] == given.inputs[0]


def test_the_vectors_make_up_for_it() -> None:
    """The same function; and the numbers as they are, another one."""
    foreign = prompt(THERE)
    here = replace(foreign.inputs[0], vectors=vectors(foreign).astype(np.float64) * (THERE / HERE), scale=None)
    wanted = logits(replace(foreign, parts=(here,)))
    assert distance(logits(foreign), wanted) < 1e-6, "stored in float32"
    assert distance(logits(replace(foreign, parts=(replace(foreign.inputs[0], scale=None),))), wanted) > 0.1
    engine = engine_named("native")
    assert [o.name for o in inexpressible(foreign, engine.capabilities, BASE)] == ["scale"]
    steps = lower(foreign, Target("native", engine.capabilities, BASE)).steps
    assert [(step.name, step.exactness) for step in steps] == [("scale", "rounding")]
    assert lower(prompt(HERE), Target("native", engine.capabilities, BASE)).steps == ()


def test_a_network_behind_the_vectors_is_left_out_where_they_are_multiplied() -> None:
    trained = methods.PTuning(5).initialise(BASE.geometry, seed=0)
    foreign = replace(trained, parts=(replace(trained.inputs[0], scale=THERE),))
    found = lower(foreign, Target("native", engine_named("native").capabilities, BASE))
    assert [step.name for step in found.steps] == ["scale", "eject"]
    assert found.prompt.training is None
    np.testing.assert_allclose(vectors(found.prompt), vectors(trained) * (THERE / HERE), rtol=1e-6)


def test_files_that_do_not_say_it_are_asked_for(folders: Path) -> None:
    bare = folders / "bare"
    for refused in (
        lambda: logits(sb.load(bare)),
        lambda: sb.attach(model(), bare),
        lambda: sb.convert(bare, folders / "out", "softbridge", base=CONFIG),
        lambda: sb.save(tools.slice(sb.load(bare), 0, 3), folders / "out", format="peft", base=CONFIG),
        lambda: sb.attach(model(), initialisation.another(sb.load(bare), CONFIG)),
    ):
        with pytest.raises(LoweringError, match="nothing says which transformers") as caught:
            refused()
        assert [obstacle.name for obstacle in caught.value.obstacles] == ["scale"]
    assert not (folders / "out").exists()
    taken = sb.convert(bare, folders / "taken", "softbridge", base=CONFIG, accept=["scale"])
    assert [(step.name, step.exactness) for step in taken.steps] == [("scale", "conditional")]
    assert sb.load(folders / "taken") == sb.load(folders / "softbridge")
    assert distance(logits(sb.load(bare), accept=["scale"]), logits(prompt())) == 0
    # Without a base model the numbers go on as they are, and so does the question.
    sb.convert(bare, folders / "moved", "softbridge")
    assert sb.load(folders / "moved").inputs[0].scale == "untold"


def test_the_release_may_be_stated(folders: Path) -> None:
    bare = folders / "bare"
    stated = sb.load(bare, base=CONFIG, trained_on=RELEASE)
    assert stated.inputs[0].scale == pytest.approx(THERE)
    assert np.array_equal(vectors(stated), vectors(prompt()))
    assert distance(logits(stated), logits(prompt())) > 0.1
    words = ["convert", str(bare), str(folders / "out"), "--to", "peft", "--base", str(folders / "base")]
    result = CliRunner().invoke(app, [*words, "--trained-on", RELEASE, "--verify", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [step["name"] for step in report["steps"]] == ["scale"]
    assert report["certificate"]["naive"] > 0.1, "a plain copy is another function"
    again = sb.load(folders / "out")
    assert again.inputs[0].scale == HERE
    np.testing.assert_allclose(vectors(again), vectors(stated) * (THERE / HERE), rtol=1e-6)
    wide = sb.load(folders / "softbridge")
    foreign = replace(wide.inputs[0], vectors=vectors(wide).astype(np.float64) / 3, scale=THERE)
    sb.save(replace(wide, parts=(foreign,)), folders / "wide", format="softbridge")
    for name, more in {"float32": {"accept": ["dtype"]}, "bfloat16": {"dtype": "bfloat16"}}.items():
        narrowed = sb.convert(folders / "wide", folders / name, "peft", base=CONFIG, verify=True, **more)  # type: ignore[arg-type]
        assert [step.name for step in narrowed.steps] == ["scale", "narrow" if "dtype" in more else "dtype"]
    with pytest.raises(SoftbridgeError, match="no version of transformers"):
        sb.load(bare, base=CONFIG, trained_on="five")
    with pytest.raises(BaseModelError, match="without a base model"):
        sb.load(bare, trained_on=RELEASE)
    with pytest.raises(SoftbridgeError, match="files that say that their vectors are multiplied"):
        sb.load(folders / "peft", base=CONFIG, trained_on=RELEASE)


@pytest.mark.parametrize("scale", [{"decoder": 0}, {"decoder": "x"}, {"encoder": 1.0}, [1.0], {"decoder": None}, None])
def test_a_manifest_that_says_nonsense(folders: Path, scale: object) -> None:
    path = folders / "peft" / MANIFEST
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), "scale": scale})))
    with pytest.raises(CheckpointError, match="has the scale"):
        sb.load(folders / "peft")


def test_only_positive_numbers_of_vectors_before_the_block() -> None:
    rows = np.zeros((2, 3), np.float32)
    for wrong in (0, -1.0, float("inf"), float("nan"), True, "x"):
        with pytest.raises(ValueError, match=r"scale: .* not a positive number"):
            InputPrompt(rows, "decoder", scale=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before the embedding block"):
        InputPrompt(rows, "encoder", "after", scale=2.0)
    assert InputPrompt(rows, "decoder", scale="untold") == InputPrompt(rows, "decoder")
    assert InputPrompt(rows, "decoder", scale=2) != InputPrompt(rows, "decoder")


def test_the_record_in_our_own_file(tmp_path: Path) -> None:
    one = SoftPrompt((InputPrompt(np.ones((2, 3), np.float32), "decoder", scale=2.5),), Positions({"decoder": 2}))
    (tmp_path / "p.safetensors").write_bytes(pack(one))
    read = sb.load(tmp_path / "p.safetensors")
    assert read == one
    assert pack(replace(read, origin=None)) == pack(one)
    untold = replace(one, parts=(replace(one.inputs[0], scale="untold"),))
    plain = replace(one, parts=(replace(one.inputs[0], scale=None),))
    assert pack(untold) == pack(plain) != pack(one)
    assert digest_of(one) != digest_of(plain)


def test_prompts_for_different_releases_are_not_mixed(folders: Path) -> None:
    with pytest.raises(ValueError, match="multiplied by"):
        tools.average([prompt(HERE), prompt(THERE)])
    bare = sb.load(folders / "bare")
    for made in (tools.average([prompt(), bare]), tools.concatenate([prompt(), bare], base=CONFIG)):
        assert made.inputs[0].scale == "untold"


@pytest.mark.skipif(sys.executable == OTHER, reason="the other stack's environment was not named")
def test_one_prompt_is_one_function_on_both_stacks(folders: Path) -> None:
    """Our file here, and there PEFT itself with the files that softbridge wrote there; and, as a twin, their copy."""
    base = str(folders / "base")
    words = [str(folders / "softbridge"), str(folders / "there"), "--to", "peft", "--base", base]
    command = [OTHER, "-c", "from softbridge.cli import main; main()", "convert", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = sb.load(folders / "there")
    assert made.inputs[0].scale == pytest.approx(THERE)
    assert not np.allclose(vectors(made), vectors(prompt()), rtol=0.1)
    # Read back here with the record, they are what they were.
    back = verify(folders / "softbridge", folders / "there", base=base)
    assert back.same, back.summary()
    (folders / "there" / MANIFEST).unlink()  # so that PEFT's own loader runs them as it finds them
    across = verify(folders / "softbridge", folders / "there", base=base, python={"peft": OTHER})
    assert across.same, across.summary()
    assert across.target.loaded
    assert all(fault.noticed for fault in across.faults)
    copied = verify(folders / "softbridge", folders / "bare", base=base, python={"peft": OTHER})
    assert copied.verdict == "different"
    assert copied.worst > 0.1
