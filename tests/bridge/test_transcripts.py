"""Every command as a person sees it: its help, what it says when it has done its work, and each way to be refused.

A file under ``tests/golden/transcripts/`` for each command holds what its lines in `CASES` print. They are of the stack
transformers5. After a change that is meant, write them anew, and read what changed:

    SOFTBRIDGE_TRANSCRIPTS=write python -m pytest tests/bridge/test_transcripts.py
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app
from softbridge.methods import MultitaskPromptTuning
from softbridge.plugin.registry import engines
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge_compat import versions

pytestmark = [
    pytest.mark.usefixtures("remembered_runs"),
    pytest.mark.skipif(
        engines()["adapterhub"].unavailable() is None, reason="the transcripts are of the stack without AdapterHub"
    ),
]
GROUP: Any = typer.main.get_command(app)
GOLDEN = Path(__file__).parents[1] / "golden" / "transcripts"
WRITE = os.environ.get("SOFTBRIDGE_TRANSCRIPTS") == "write"

#: Command -> its lines: in this order, in a folder of their own. What comes first is the exit status.
CASES: dict[str, list[tuple[int, str]]] = {
    "softbridge": [
        (0, "--help"),
        (2, ""),
        (0, "--version"),
        (2, "convrt"),
        (2, "-q -v formats"),
    ],
    "inspect": [
        (0, "inspect --help"),
        (0, "inspect prefix"),
        (0, "inspect vectors --base base"),
        (0, "inspect tasks"),
        (0, "inspect bert"),
        (2, "inspect"),
        (2, "inspect prefix --nothing"),
        (2, "inspect nowhere"),
        (2, "inspect ./no/such/place"),
        (2, "inspect empty"),
        (2, "inspect base"),
        (2, "inspect adapters"),
        (2, "inspect ids.npy"),
        (2, "inspect stale"),
        (2, "inspect prefix --from pefft"),
        (2, "inspect prefix --from google"),
        (2, "inspect prefix --base ./nothing"),
        (2, "inspect prefix --base bert-base"),
        (2, "inspect ids.npy --json"),
        (0, "inspect prefix --base base --html page.html"),
        (2, "inspect prefix --base base --html page.html"),
        (0, "inspect prefix --base base --html page.html --overwrite"),
    ],
    "convert": [
        (0, "convert --help"),
        (0, "convert prefix planned --to adapterhub --base base --dry-run"),
        (0, "convert prefix out --to adapterhub --base base --verify"),
        (2, "convert prefix out --to peft"),
        (0, "convert prefix out --to peft --overwrite"),
        (0, "convert prefix quiet --to softbridge -q"),
        (0, "convert tasks one --to softbridge --task 1"),
        (0, "convert prefix small --to softbridge --dtype bfloat16"),
        (2, "convert prefix"),
        (2, "convert prefix new"),
        (2, "convert prefix new --to pefft"),
        (2, "convert prefix new --to adapterhub"),
        (2, "convert prefix new --to google"),
        (2, "convert t5 new --to adapterhub --base t5-base"),
        (2, "convert bert new --to adapterhub --base bert-base"),
        (0, "convert bert new --to adapterhub --base bert-base --accept positions"),
        (2, "convert prefix new2 --to softbridge --verify"),
        (2, "convert prefix new2 --to softbridge --base ./nothing"),
        (2, "convert prefix new2 --to softbridge --base bert-base"),
        (2, "convert prefix new2 --to softbridge --encoding bin"),
        (2, "convert prefix new2 --to softbridge --task 1"),
        (2, "convert prefix new2 --to softbridge --task -1"),
        (2, "convert prefix new2 --to softbridge --part cross"),
        (2, "convert prefix new2 --to softbridge --dtype int8"),
        (2, "convert prefix new2 --to softbridge --drop head"),
        (2, "convert prefix new2 --to softbridge --accept nothing"),
        (2, "convert prefix new2 --to softbridge --trained-on 4.57"),
        (2, "convert prefix prefix/new2 --to softbridge"),
        (2, "convert base new2 --to softbridge"),
        (2, "convert prefix new2 --to tensor"),
        (0, "convert several each --to softbridge --recursive"),
        (0, "convert several each --to softbridge --recursive"),
        (2, "convert several shards --to adapterhub --recursive --shard 1/1"),
        (2, "convert several shards --to softbridge --recursive --shard 3/2"),
        (2, "convert several shards --to softbridge --recursive --shard half"),
        (0, "convert several several/out --to softbridge --recursive"),
        (2, "convert nowhere shards --to softbridge --recursive"),
        (2, "convert empty shards --to softbridge --recursive"),
        (2, "convert prefix new2 --to softbridge --jobs 2"),
        (2, "convert prefix new2 --to softbridge --push-to-hub prompts"),
        (2, "convert prefix new2 --to softbridge --push-to-hub owner/name"),
        (2, "convert prefix new2 --to softbridge --create-repo"),
        (2, "convert several new2 --to softbridge --recursive --push-to-hub owner/name"),
    ],
    "merge-manifests": [
        (0, "merge-manifests --help"),
        (0, "convert several each --to softbridge --recursive --shard 1/2 -q"),
        (2, "merge-manifests each --output all.jsonl"),
        (0, "convert several each --to softbridge --recursive --shard 2/2 -q"),
        (0, "merge-manifests each --output all.jsonl --overwrite"),
        (2, "merge-manifests each --output all.jsonl"),
        (2, "merge-manifests each"),
        (2, "merge-manifests prefix --output new.jsonl"),
        (2, "merge-manifests ids.npy --output new.jsonl"),
    ],
    "verify": [
        (0, "verify --help"),
        (0, "verify prefix same --base base"),
        (1, "verify prefix other --base base"),
        (1, "verify prefix other --base base -q"),
        (0, "verify claimed/certificate.json --base base"),
        (2, "verify"),
        (2, "verify prefix same"),
        (2, "verify prefix vectors --base bert-base"),
        (2, "verify prefix nowhere --base base"),
        (2, "verify prefix base --base base"),
        (2, "verify prefix"),
        (0, "verify prefix same --base base -q --html page.html"),
        (2, "verify prefix same --base base -q --html page.html"),
        (0, "verify prefix same --base base -q --html page.html --overwrite"),
        (0, "verify claimed/certificate.json --source prefix --base base"),
        (2, "verify claimed/certificate.json --base base --weights"),
        (2, "verify prefix same --base base --source other"),
        (2, "verify prefix same --base base --level close"),
        (2, "verify prefix same --base base --seed -1"),
        (2, "verify prefix same --base base --texts nothing.txt"),
        (2, "verify prefix same --base base --texts texts.txt"),
        (2, "verify prefix same --base base --python peft"),
        (2, "verify prefix same --base base --python mlx=python"),
        (2, "verify prefix same --base base --python peft=./no-python"),
    ],
    "probe": [
        (0, "probe --help"),
        (0, "probe prefix --base base --output a.safetensors"),
        (2, "probe prefix --base base --output a.safetensors"),
        (0, "probe prefix --base base --output a.safetensors --overwrite"),
        (2, "probe prefix --base base"),
        (2, "probe prefix --output b.safetensors"),
        (2, "probe ids.npy --base base --output b.safetensors"),
        (2, "probe prefix --base base --output b.safetensors --window 0"),
    ],
    "compare": [
        (0, "compare --help"),
        (0, "probe prefix --base base --output a.safetensors -q"),
        (0, "probe other --base base --output b.safetensors -q"),
        (0, "probe prefix --base base --seed 1 --output c.safetensors -q"),
        (0, "compare a.safetensors a.safetensors"),
        (1, "compare a.safetensors b.safetensors"),
        (0, "compare a.safetensors a.safetensors -q --html page.html"),
        (2, "compare a.safetensors a.safetensors -q --html page.html"),
        (0, "compare a.safetensors a.safetensors -q --html page.html --overwrite"),
        (2, "compare a.safetensors c.safetensors"),
        (2, "compare a.safetensors"),
        (2, "compare a.safetensors ids.npy"),
        (2, "compare a.safetensors nowhere"),
    ],
    "explain": [
        (0, "explain --help"),
        (0, "explain --from peft --to adapterhub --method prefix-tuning"),
        (0, "explain --from peft --to adapterhub --method prefix-tuning --base base"),
        (2, "explain --from peft"),
        (2, "explain --from peft --to adaptrhub"),
        (2, "explain --from peft --to adapterhub --method prefix-tunning"),
        (2, "explain --from peft --to tensor"),
        (2, "explain --from peft --to adapterhub --base ./nothing"),
    ],
    "matrix": [(0, "matrix --help"), (2, "matrix peft")],  # what it prints is tests/MATRIX.md
    "doctor": [
        (0, "doctor --help"),
        (0, "doctor"),
        (0, "doctor prefix --base base"),
        (2, "doctor nowhere"),
        (2, "doctor base"),
    ],
    "formats": [(0, "formats --help"), (0, "formats"), (2, "formats peft")],
    "engines": [(0, "engines --help"), (0, "engines"), (2, "engines peft")],
    "plugins": [(0, "plugins --help"), (0, "plugins"), (2, "plugins peft")],
    "demo": [
        (0, "demo --help"),
        (0, "demo --from peft --to adapterhub"),
        (2, "demo --from nothing"),
        (2, "demo --from adapterhub"),
        (2, "demo --to nothing"),
    ],
    "words": [
        (0, "words --help"),
        (0, "words near --base base"),
        (2, "words near"),
        (2, "words prefix --base base"),
        (2, "words near --base base/config.json"),
        (2, "words near --base base --top 0"),
        (2, "words near --base base --stack encoder"),
    ],
    "similar": [
        (0, "similar --help"),
        (0, "similar near vectors near"),
        (2, "similar"),
        (2, "similar near"),
        (2, "similar near prefix"),
        (2, "similar near nowhere"),
        (2, "similar near vectors --measure angle"),
    ],
    "bake": [
        (0, "bake --help"),
        (0, "bake near mood=vectors baked --base base --verify"),
        (2, "bake near baked --base base"),
        (0, "bake near baked --base base --overwrite -q"),
        (2, "bake near"),
        (2, "bake near baked2"),
        (2, "bake near --base base"),
        (2, "bake near near baked2 --base base"),
        (2, "bake prefix baked2 --base base"),
        (2, "bake near baked2 --base base/config.json"),
        (2, "bake near baked2 --base base --in-front mood"),
        (2, "bake a/b=near baked2 --base base"),
    ],
}
#: What shows a certificate is shown wide: where a line is broken depends on the length of its figures.
WIDE = re.compile(r"verify|compare|demo|bake")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command lines name."""
    folder = tmp_path_factory.mktemp("made")
    llama, bert, t5 = tiny_model("llama", torch.float32), tiny_config("bert"), tiny_config("t5")
    llama.save_pretrained(folder / "base")
    bert.save_pretrained(folder / "bert-base")
    t5.save_pretrained(folder / "t5-base")
    geometry = BaseModel(llama.config).geometry
    prefix, vectors = random_prefix(geometry), random_input_prompt(geometry)
    rows = llama.get_input_embeddings().weight.detach().numpy()[[7, 11, 13, 17, 19]]
    near = replace(vectors, parts=(replace(vectors.inputs[0], vectors=rows),))
    prompts = {"prefix": prefix, "vectors": vectors, "near": near, "other": random_prefix(geometry, seed=1)}
    prompts["tasks"] = MultitaskPromptTuning(2, length=4).initialise(geometry, 0)
    for name, prompt in prompts.items():
        sb.save(prompt, folder / name, format="peft", base=llama)
    sb.save(prefix, folder / "same", format="softbridge", base=llama)
    with pytest.MonkeyPatch.context() as here:  # the certificate names its sides by the paths that it was given
        here.chdir(folder)
        sb.convert("prefix", "claimed", "softbridge", base="base", verify=True)
    sb.save(random_prefix(BaseModel(bert).geometry), folder / "bert", format="peft", base=bert)
    sb.save(random_prefix(BaseModel(t5).geometry), folder / "t5", format="softbridge", base=t5)
    for name in ("bert", "tasks"):
        (folder / name / "softbridge.json").unlink()
    shutil.copytree(folder / "prefix", folder / "stale")
    shutil.copy(folder / "other" / "softbridge.json", folder / "stale")
    for name in ("a", "b"):
        shutil.copytree(folder / "vectors", folder / "adapters" / name)
    for name in ("one", "two"):
        shutil.copytree(folder / "vectors", folder / "several" / name)
    shutil.copytree(folder / "t5-base", folder / "several" / "model")
    (folder / "empty").mkdir()
    (folder / "texts.txt").write_text("a text\n")
    np.save(folder / "ids.npy", np.zeros(9, np.int64))
    return folder


def transcript(line: str, expected: int, place: Path) -> str:
    """What a command line prints, and where. Figures, versions and this machine are left out of it."""
    width = "80" if "--help" in line or not line else "1000" if WIDE.search(line) else "120"
    done = CliRunner().invoke(app, shlex.split(line), env={"COLUMNS": width}, prog_name="softbridge")
    assert done.exit_code == expected, f"{line}: {done.output}"
    lines = [f"$ softbridge {line}".rstrip(), *plain(done.stdout, place)]
    if done.stderr:
        lines += ["-- standard error:", *plain(done.stderr, place)]
    return "\n".join([*lines, f"-- exit status {done.exit_code}", ""])


def plain(text: str, place: Path) -> list[str]:
    text = text.replace(str(place), "PLACE").replace(platform.platform(), "PLATFORM")
    text = re.sub(r"\S*/tmp\w{8}\b", "TEMPORARY", text)
    for version in sorted(versions().values(), key=len, reverse=True):
        text = re.sub(rf"(?<![\d.]){re.escape(version)}(?![\d.])", "VERSION", text)
    text = re.sub(r"\d+(\.\d+)?e[+-]\d+ \([\d.e+]+ units\)", "FIGURE (N units)", text)
    text = re.sub(r"\d+(\.\d+)?e[+-]\d+", "FIGURE", text)
    text = re.sub(r"^(verdict: the same)(, bit for bit| function)$", r"\1 ...", text, flags=re.MULTILINE)
    text = re.sub("─{4,}", "────", text)
    return [re.sub(r"(?<=\S) {2,}", "  ", line).rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("command", CASES)
def test_a_command_says_what_it_said(command: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    said = "\n".join(transcript(line, status, place) for status, line in CASES[command])
    path = GOLDEN / f"{command}.txt"
    if WRITE:
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(said)
    assert said.splitlines() == path.read_text().splitlines()


def test_there_is_a_transcript_of_every_command() -> None:
    assert set(CASES) == {"softbridge", *GROUP.commands}
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)
    for command, lines in CASES.items():
        statuses = [status for status, _ in lines]
        assert lines[0][1].endswith("--help")
        assert statuses.count(2) >= 1
        assert command == "matrix" or any(status < 2 and "--help" not in line for status, line in lines)


def test_another_transcript_is_noticed(tmp_path: Path) -> None:
    assert plain("difference: alone  3.3e-07  9.5e-07 (11.5 units)", tmp_path) == plain(
        "difference: alone     1.0e-08      1e-07 (2 units)", tmp_path
    )
    assert plain("verdict: DIFFERENT", tmp_path) != plain("verdict: the same function", tmp_path)
    assert plain("keys rotated by 5", tmp_path) != plain("keys rotated by 6", tmp_path)
