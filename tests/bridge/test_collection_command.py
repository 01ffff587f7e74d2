"""`softbridge convert --recursive` and `merge-manifests`: what they print, and their exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from collected import CHECKPOINTS, LEFT, MANIFEST, make_collection
from typer.testing import CliRunner, Result

from softbridge.cli.console import app
from softbridge.cli.tables import collection_table
from softbridge.collection.record import Reason, Record, exit_status, unpack


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("collection") / "made")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_folder_is_converted_and_the_summary_says_what_became_of_it(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("convert", made, out, "--to", "softbridge", "--recursive", "--jobs", 2)
    first = call(*arguments)
    assert first.exit_code == 2, first.output
    words = " ".join(first.stdout.split())
    assert f"converted {len(CHECKPOINTS)} " in words
    assert "refused 1 " in words
    assert re.search(r"\bbroken\b.*\brefused: ", words)
    assert f"the manifest: {out / MANIFEST}" in words
    again = json.loads(call(*arguments, "--json").stdout)
    assert again["schema"] == "softbridge/collection-summary/1"
    assert again["taken_over"] == len(CHECKPOINTS)
    assert again["counts"] == {"converted": len(CHECKPOINTS), "refused": 1, "not a prompt": 3, "left out": 2}
    assert again["exit_status"] == 2
    assert again["manifest"] == str(out / MANIFEST)
    (failure,) = again["failures"]
    assert (failure["path"], failure["verdict"]) == ("broken", "refused")
    assert failure["reason"].keys() == {"kind", "found", "expected", "remedy"}


def test_the_options_of_a_conversion_are_those_of_each(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "peft", tmp_path / "in")
    arguments = ("convert", tmp_path / "in", tmp_path / "out", "--to", "peft", "--recursive", "--dtype", "bfloat16")
    planned = json.loads(call(*arguments, "--dry-run", "--json").stdout)
    assert planned["counts"] == {"planned": 2}
    assert planned["manifest"] is None
    assert not (tmp_path / "out").exists()
    done = call(*arguments, "--encoding", "bin")
    assert done.exit_code == 0, done.output
    manifest = unpack(tmp_path / "out" / MANIFEST)
    assert manifest.options == {"to": "peft", "dtype": "bfloat16", "encoding": "bin"}
    assert {step["name"] for record in manifest.records for step in record.steps} == {"narrow"}
    assert (tmp_path / "out" / "prompt" / "adapter_model.bin").is_file()


def test_shards_are_written_and_merged(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard in ("1/2", "2/2"):
        call("convert", made, out, "--to", "softbridge", "--recursive", "--shard", shard)
    part = json.loads(
        call(
            "merge-manifests", out / "softbridge-collection.1-of-2.jsonl", "--output", out / "part.jsonl", "--json"
        ).stdout
    )
    assert part["missing"] == ["shard 2/2"]
    assert part["exit_status"] == 2
    merged = call("merge-manifests", out, "--output", out / MANIFEST)
    assert merged.exit_code == 2, "one was refused"
    assert f"converted {len(CHECKPOINTS)} " in " ".join(merged.stdout.split())
    assert {record.path for record in unpack(out / MANIFEST).records} == {*CHECKPOINTS, *LEFT}
    again = call("merge-manifests", out, "--output", out / MANIFEST, "--json")
    assert again.exit_code == 2
    assert json.loads(again.stdout)["refused"]["kind"] == "OutputError"


def test_what_does_not_go_together_is_refused(made: Path, tmp_path: Path) -> None:
    for more in (("--jobs", 2), ("--shard", "1/2"), ("--recursive", "--shard", "3/2"), ("--recursive", "--shard", "x")):
        refused = call("convert", made, tmp_path / "out", "--to", "softbridge", *more)
        assert refused.exit_code == 2
        assert "refused:" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_the_exit_status_is_that_of_the_worst() -> None:
    assert exit_status(["converted", "planned", "not a prompt", "left out"]) == 0
    assert exit_status(["converted", "refused"]) == exit_status(["pending"]) == 2
    assert exit_status(["refused", "differs", "converted"]) == 1
    assert exit_status(["refused", "differs", "defect"]) == 3


def test_the_summary_is_readable_in_eighty_columns() -> None:
    from rich.console import Console

    reason = Reason("CheckpointError", "a file that is much longer than any line of any terminal " * 2, "x", "mend it")
    defect = Reason("MemoryError", "Traceback:\n  somewhere\nMemoryError: no room\n", "a refusal", "report it")
    records = [Record(f"prompts/of/a/long/name/{n}", "refused", reason) for n in range(22)]
    records += [Record("x", "converted")] * 3
    console = Console(width=80, record=True)
    console.print(collection_table([Record("d", "defect", defect), *records], taken_over=2))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "2 of them by an earlier run" in text
    assert "and 3 more, in the manifest" in text
    assert "defect: MemoryError: no room" in text
    assert "somewhere" not in text


RUN = "from softbridge.cli import main; main()"


def test_an_interrupted_command_says_where_it_goes_on_and_draws_on_a_terminal_only(made: Path, tmp_path: Path) -> None:
    """On a terminal of its own, whose bar is waited for; Ctrl-C goes to all of its processes."""
    out = tmp_path / "out"
    many = tmp_path / "in"
    for n in range(60):
        shutil.copytree(made / "peft", many / str(n))
    arguments = [sys.executable, "-c", RUN, "convert", str(many), str(out), "--to", "softbridge", "--recursive"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(arguments, stderr=theirs, stdout=subprocess.PIPE, start_new_session=True) as process:
        os.close(theirs)
        said = b""
        while b"/120" not in said:
            said += os.read(ours, 1024)
        os.killpg(process.pid, signal.SIGINT)
        try:
            while more := os.read(ours, 1024):
                said += more
        except OSError:  # the other end was closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert process.returncode == 130
    assert b"goes on from there" in said
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    done = sum(record.verdict == "converted" for record in unpack(out / MANIFEST).records)
    resumed = call(*arguments[3:], "--json")
    assert resumed.exit_code == 0
    assert resumed.stderr == ""
    assert json.loads(resumed.stdout)["taken_over"] >= done
    assert len(list(out.rglob("prompt.safetensors"))) == 120
