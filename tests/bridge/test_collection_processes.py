"""Many checkpoints at once: what is left of a run that is killed or interrupted, whole or in part."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from collected import CHECKPOINTS, LEFT, MANIFEST, convert, make_collection, record_of, verdicts, written

from softbridge import conversion, untrusted
from softbridge.collection.pool import Pool
from softbridge.collection.record import lines, unpack
from softbridge.collection.run import JOURNAL
from softbridge.errors import ArgumentError, EngineError, OutputError, SoftbridgeError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("collection") / "made")


KILLED = """
import os, signal, sys
import softbridge as sb
from softbridge import untrusted

add = untrusted.Log.add

def adding(log, line):
    global left
    if b'"verdict":"converted"' in line:
        left -= 1
        if left < 0:  # the target is there, and nothing says so yet
            os.killpg(0, signal.SIGKILL)
    add(log, line)

if __name__ == "__main__":
    left = int(sys.argv[4])
    untrusted.Log.add = adding
    sb.convert_all(sys.argv[1], sys.argv[2], "softbridge", jobs=int(sys.argv[3]))
"""


def wait_for(group: int) -> None:
    """Until its processes are gone: some die a moment after the others."""
    for _ in range(500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)  # for ever in a container whose first process lets the dead lie


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_run_whose_processes_are_all_killed_is_resumed_and_its_manifest_is_that_of_one_that_was_not(
    made: Path, tmp_path: Path, jobs: int
) -> None:
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = [sys.executable, str(tmp_path / "killed.py"), str(made), str(out), str(jobs), "2"]
    with subprocess.Popen(arguments, start_new_session=True, stderr=subprocess.PIPE, text=True) as killed:
        told = killed.communicate()[1]
    assert killed.returncode == -signal.SIGKILL, told
    wait_for(killed.pid)
    assert not (out / MANIFEST).exists()
    journal = lines(out / (MANIFEST + JOURNAL))
    assert sum(one.get("verdict") == "converted" for one in journal) == 2
    (tmp_path / "killed.py").unlink()
    resumed = convert(made, out)
    # With two workers another may have been at work; with none nothing but what was begun can be there.
    assert resumed.taken_over == 3 if jobs == 0 else resumed.taken_over >= 3
    assert not (out / (MANIFEST + JOURNAL)).exists()
    assert not [path for path in out.rglob("*") if path.name.startswith(".")], "nothing half written is left"
    whole = convert(made, tmp_path / "whole")
    assert resumed.manifest == whole.manifest
    assert written(out) == written(tmp_path / "whole")


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a":1}\n{"b":')
    assert lines(path) == [{"a": 1}]
    log = untrusted.Log(path)
    with pytest.raises(OutputError, match="another process"):
        untrusted.Log(path)
    log.add(b'{"c":3}\n')
    log.close()
    assert lines(path) == [{"a": 1}, {"c": 3}]


def test_two_runs_do_not_write_one_manifest(made: Path, tmp_path: Path) -> None:
    log = untrusted.Log(tmp_path / "out" / (MANIFEST + JOURNAL))
    with pytest.raises(OutputError, match="another process"):
        convert(made, tmp_path / "out")
    log.close()
    assert convert(made, tmp_path / "out").exit_status == 2


def test_a_worker_that_is_killed_fails_its_checkpoint_and_no_other(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = untrusted.Log.add

    def kill_the_worker(log: untrusted.Log, line: bytes) -> None:
        add(log, line)
        if json.loads(line).get("begun") == "peft/prompt":
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

    monkeypatch.setattr(untrusted.Log, "add", kill_the_worker)
    outcome = convert(made, tmp_path / "out", jobs=1)
    assert verdicts(outcome) == dict.fromkeys(CHECKPOINTS, "converted") | LEFT | {"peft/prompt": "defect"}
    reason = record_of(outcome, "peft/prompt").reason
    assert reason is not None
    assert "SIGKILL" in reason.found
    assert "--jobs" in reason.remedy
    assert outcome.exit_status == 3
    monkeypatch.undo()
    again = convert(made, tmp_path / "out", jobs=1)
    assert again.taken_over == len(CHECKPOINTS) - 1
    assert verdicts(again)["peft/prompt"] == "converted"
    assert again.manifest == convert(made, tmp_path / "whole").manifest, "whoever converted it, the record is the same"
    assert not multiprocessing.active_children()


def test_an_interruption_leaves_nothing_half_written_and_the_manifest_says_what_was_done(
    made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        assert total == len(CHECKPOINTS) + 2  # LoRA, and the broken one
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        convert(made, out, jobs=2, watch=interrupt)
    assert not multiprocessing.active_children()
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]
    manifest = unpack(out / MANIFEST)
    counts = Counter(record.verdict for record in manifest.records)
    assert counts["pending"] >= 1
    done = [record for record in manifest.records if record.verdict == "converted"]
    assert all((out / record.target["path"]).is_dir() for record in done)
    resumed = convert(made, out)
    assert resumed.taken_over >= len(done) >= 1
    assert resumed.manifest == convert(made, tmp_path / "whole").manifest


def test_what_cannot_begin_is_said_once(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SoftbridgeError, match="there is no"):
        convert(made, tmp_path / "out", base="/no/such/base")
    with pytest.raises(ValueError, match="invalid literal"):
        list(Pool(int, ("x",), 2).results(["x"], print))
    with pytest.raises(EngineError, match="status 3"):
        list(Pool(os._exit, (3,), 1).results(["x"], print))
    with pytest.raises(ArgumentError):
        convert(made, tmp_path / "out", jobs=-1)


def test_a_script_that_begins_when_it_is_imported_is_told_so(made: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    told = {}
    for jobs in (0, 1):
        script.write_text(
            f"import softbridge as sb\nsb.convert_all({str(made)!r}, 'out{jobs}', 'softbridge', jobs={jobs})"
        )
        arguments = [sys.executable, str(script)]
        told[jobs] = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told[0].returncode == 0, told[0].stderr
    assert told[1].returncode == 1
    assert "if __name__ == '__main__'" in told[1].stderr.splitlines()[-1]


def test_what_raises_where_nothing_should_is_a_defect_of_one_checkpoint(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversion.convert

    def fail(source: Path, *rest: Any, **more: Any) -> Any:
        if source.name == "run":
            raise MemoryError("no room")
        return real(source, *rest, **more)

    monkeypatch.setattr(conversion, "convert", fail)
    outcome = convert(made, tmp_path / "out")
    assert verdicts(outcome) == dict.fromkeys(CHECKPOINTS, "converted") | LEFT | {"run": "defect"}
    assert outcome.exit_status == 3
    reason = record_of(outcome, "run").reason
    assert reason is not None
    assert reason.found.endswith("MemoryError: no room\n")
