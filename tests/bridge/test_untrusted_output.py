"""What is written: bytes that never change, and a target that is whole at any instant."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from softbridge.errors import CheckpointError, OutputError
from softbridge.untrusted import (
    Files,
    json_bytes,
    output,
    pickle_bytes,
    safetensors_bytes,
    write,
    write_file,
    write_into,
)

RANDOM = np.random.default_rng(0)
DTYPES = [*"?bBhHiIqQefd", ml_dtypes.bfloat16]
ARRAY = RANDOM.normal(0, 1, (3, 4)).astype(np.float32)


# --- bytes ------------------------------------------------------------------------------------------------------------


MADE = """
    import hashlib, numpy as np
    from softbridge.untrusted import json_bytes, npy_bytes, pickle_bytes, safetensors_bytes
    x = {"b": np.arange(6.0).reshape(2, 3), "a": np.arange(3, dtype=np.float32)}
    for content in (
        safetensors_bytes(x, {n: n for n in set("qwertyuiop")}), pickle_bytes(x), npy_bytes(x["a"]),
        json_bytes({n: {1.5, 2.5}.pop() for n in set("qwertyuiop")}),
    ):
        print(hashlib.sha256(content).hexdigest())
"""


def test_made_bytes_are_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    exec(textwrap.dedent(MADE), {})
    here = capsys.readouterr().out
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    elsewhere = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MADE)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert here == elsewhere
    assert len(set(here.split())) == 4


def test_safetensors_are_laid_out_as_the_library_does() -> None:
    tensors = {f"{i}{d}": np.ones(i + 1, d) for i, d in enumerate(DTYPES)} | {"ä": ARRAY, "b": ARRAY.astype(">f8")}
    native = {
        name: array.astype(array.dtype.newbyteorder("=")) if name == "b" else array for name, array in tensors.items()
    }
    for metadata in (None, {"only": 'one "key"'}):
        try:
            expected = safetensors.numpy.save(native, metadata)
        except (KeyError, safetensors.SafetensorError):  # releases that do not know bfloat16 in NumPy
            pytest.skip("this release of the library writes no bfloat16")
        assert safetensors_bytes(tensors, metadata) == expected


def test_json_bytes() -> None:
    assert json_bytes({"b": "ä", "a": [1]}) == '{\n  "a": [\n    1\n  ],\n  "b": "ä"\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON"):
        json_bytes({"a": float("nan")})


@pytest.mark.parametrize("make", [safetensors_bytes, pickle_bytes])
@pytest.mark.parametrize("tensors", [{"a": ARRAY.astype(complex)}, {"../a": ARRAY}, {"/a": ARRAY}, {"a\0": ARRAY}])
def test_what_cannot_be_read_is_not_written(make: Any, tensors: Any) -> None:
    with pytest.raises(OutputError):
        make(tensors)


# --- folders and files ------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_write(tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep"
    seen: list[Path] = []

    def check(files: Files) -> None:
        assert tree(files.path) == {"a": b"1", "sub/b": b"2"}
        assert files.path.parent == target.parent
        seen.append(files.path)

    write(target, {"a": b"1", "sub/b": b"2"}, check=check)
    assert tree(tmp_path) == {"new/deep/a": b"1", "new/deep/sub/b": b"2"}
    assert len(seen) == 1
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", {"a": b"1"})
    assert tree(tmp_path / "empty") == {"a": b"1"}


def test_write_keeps_what_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_bytes(b"0")
    with pytest.raises(OutputError, match="is there already"):
        write(target, {"a": b"1"})
    assert tree(tmp_path) == {"target/mine": b"0"}
    write(target, {"a": b"1"}, overwrite=True)
    assert tree(tmp_path) == {"target/a": b"1"}
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_check_leaves_nothing(overwrite: bool, tmp_path: Path) -> None:
    def check(files: Files) -> None:
        raise CheckpointError("a", "b", "c")

    with pytest.raises(CheckpointError):
        write(tmp_path / "a", {"a": b"1"}, overwrite=overwrite, check=check)
    with pytest.raises(CheckpointError):
        write_file(tmp_path / "a", b"1", overwrite=overwrite, check=check)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/b/c", "a//b", "a/", "a\0", "a\\b", "c:a", "a\n", "./a"]
)
def test_names_that_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a file named"):
        write(tmp_path / "out", {"fine": b"", name: b"1"})
    assert os.listdir(tmp_path) == []


def test_write_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0")
    (tmp_path / "folder").mkdir()
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            write(tmp_path / "file", {"a": b"1"}, overwrite=overwrite)
        with pytest.raises(OutputError, match="is a folder"):
            write_file(tmp_path / "folder", b"1", overwrite=overwrite)
        with pytest.raises(OutputError):  # a name both file and folder
            write(tmp_path / "out", {"a": b"1", "a/b": b"2"}, overwrite=overwrite)
        with pytest.raises(OutputError):  # below a file
            write(tmp_path / "file" / "out", {"a": b"1"}, overwrite=overwrite)
        monkeypatch.chdir(tmp_path / "folder")
        for target in (Path(), Path(".."), tmp_path):
            with pytest.raises(OutputError, match="folder of its own"):
                write(target, {"a": b"1"}, overwrite=overwrite)
    assert tree(tmp_path) == {"file": b"0"}


def test_write_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"

    def check(files: Files) -> None:
        assert (files.path.name, files.path.read_bytes()) == ("a.json", b"1")
        assert files.path != target

    write_file(target, b"1", check=check)
    with pytest.raises(OutputError, match="is there already"):
        write_file(target, b"2")
    assert tree(tmp_path) == {"a.json": b"1"}
    write_file(target, b"2", overwrite=True)
    assert tree(tmp_path) == {"a.json": b"2"}
    assert os.listdir(tmp_path) == ["a.json"]


def test_without_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two renames, and the old one is put back if the second fails."""
    monkeypatch.setattr(output, "_exchange", lambda staged, target: False)
    target = tmp_path / "target"
    write(target, {"a": b"1"})
    write(target, {"b": b"2"}, overwrite=True)
    assert tree(tmp_path) == {"target/b": b"2"}
    rename, calls = os.rename, []

    def failing(old: Any, new: Any) -> None:
        calls.append(old)
        if len(calls) == 2:
            raise OSError("no")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OutputError):
        write(target, {"c": b"3"}, overwrite=True)
    assert len(calls) == 3
    assert tree(tmp_path) == {"target/b": b"2"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from softbridge.untrusted import write, write_file, write_into

    what, overwrite = sys.argv[2], sys.argv[3] == "True"

    def run(target, point):
        met = 0

        def audit(event, arguments):
            nonlocal met
            if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.scandir",
                         "ctypes.call_function", "ctypes.dlopen", "ctypes.dlsym"
                         ) or event == "open" and str(target.parent) in str(arguments[0]):
                met += 1
                if met == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        if what == "folder":
            write(target, {"a": b"new" * 1000, "sub/b": b"new"}, overwrite=overwrite)
        elif what == "into":
            write_into(target, {"a": b"new" * 1000, "b": b"new"})
        else:
            write_file(target, b"new" * 1000, overwrite=overwrite)
        os._exit(0)

    for point in range(1, 100):
        child = os.fork()  # a process for every instant, but the interpreter is started once
        if child == 0:
            run(Path(sys.argv[1]) / str(point) / "target", point)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
        if code != -signal.SIGKILL:
            break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders in one step is Linux's")
@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_instant(what: str, overwrite: bool, tmp_path: Path) -> None:
    """Killed before every system call in turn, the target is the old one or the new one, whole."""
    old: object = {"old": b"old"} if what == "folder" else b"old"
    new: object = {"a": b"new" * 1000, "sub/b": b"new"} if what == "folder" else b"new" * 1000
    for point in range(1, 100):
        target = tmp_path / str(point) / "target"
        target.parent.mkdir()
        if overwrite and what == "folder":
            target.mkdir()
            (target / "old").write_bytes(b"old")
        elif overwrite:
            target.write_bytes(b"old")
    program = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), what, str(overwrite)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], done.stderr
    outcomes: list[str] = []
    for point in range(1, len(codes) + 1):
        target = tmp_path / str(point) / "target"
        found = tree(target) if target.is_dir() else target.read_bytes() if target.exists() else None
        outcomes.append("new" if found == new else "old" if found == (old if overwrite else None) else "broken")
    assert outcomes == sorted(outcomes, reverse=True), outcomes  # old, then new; nothing else and never back
    assert outcomes.count("old") >= 3
    assert outcomes.count("new") >= 2
    folders = [tmp_path / str(point) for point in range(1, len(codes) + 1)]
    left = [path for folder in folders for path in folder.glob(".target.*.tmp")]
    assert left, "a killed process leaves what it was writing"
    strangers = folders[0] / ".target.notes.tmp"
    strangers.mkdir()
    for folder in folders:  # and the next one to write there removes it, and nothing else
        (write if what == "folder" else write_file)(folder / "target", new, overwrite=True)  # type: ignore[operator]
        assert {path.name for path in folder.iterdir()} - {strangers.name} == {"target"}
    assert strangers.is_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="the audit of system calls was tried on Linux")
def test_killed_while_it_writes_into_a_folder(tmp_path: Path) -> None:
    """Each file is old or new, whole, the last one last; and other files stay."""
    for point in range(1, 100):
        target = tmp_path / str(point) / "target"
        target.mkdir(parents=True)
        for name in ("a", "b", "mine"):
            (target / name).write_bytes(b"old")
    program = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), "into", "True"]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0], done.stderr
    stages = [{"a": b"old", "b": b"old"}, {"a": b"new" * 1000, "b": b"old"}, {"a": b"new" * 1000, "b": b"new"}]
    seen: list[int] = []
    for point in range(1, len(codes) + 1):
        target = tmp_path / str(point) / "target"
        found = {name: (target / name).read_bytes() for name in ("a", "b", "mine")}
        assert found.pop("mine") == b"old"
        seen.append(stages.index(found))
        assert set(Files(target).names) == {"a", "b", "mine"}, "what is left of a killed writer is no part of it"
        write_into(target, stages[2])
        assert set(os.listdir(target)) == {"a", "b", "mine"}
    assert seen == sorted(seen)
    assert set(seen) == {0, 1, 2}


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc says that a process has ended")
def test_what_a_process_left_that_nobody_waits_for_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as ended:
        assert ended.stdout is not None
        ended.stdout.read()
        while Path(f"/proc/{ended.pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z":
            time.sleep(0.01)
        for number in (ended.pid, os.getpid()):
            (tmp_path / f".out.{output._MACHINE}-{number}-00.tmp").mkdir()
        write(tmp_path / "out", {"a": b"1"})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", f".out.{output._MACHINE}-{os.getpid()}-00.tmp"}
