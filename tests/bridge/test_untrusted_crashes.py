"""A conversion that is killed, runs out of disk or meets another one leaves the old target or the new one, whole.

What is written is killed before each of its system calls in `test_untrusted_output.py`; here whole conversions are
killed at random instants, 100 in the long profile.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.errors import OutputError
from softbridge.testing import random_prefix, tiny_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and exchanges folders in one step")

LONG = settings().max_examples > 1000
KILLS, RACES = (100, 48) if LONG else (12, 6)
DONE, REFUSED, FAILED = 0, 3, 4


def tree(folder: Path) -> dict[str, bytes] | None:
    """The files of a folder; None: there is none."""
    return {one.name: one.read_bytes() for one in folder.iterdir()} if folder.exists() else None


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prefixes in our own form, `a` and `b`, and what they are in PEFT's, `peft_a` and `peft_b`."""
    folder, config = tmp_path_factory.mktemp("sources"), tiny_config("llama")
    for seed, name in enumerate("ab"):
        prompt = random_prefix(BaseModel(config).geometry, length=64, seed=seed)
        sb.save(prompt, folder / name, format="softbridge", base=config)
        convert(folder / name, folder / f"peft_{name}")
    assert tree(folder / "peft_a") != tree(folder / "peft_b")
    return folder


def convert(source: Path, target: Path, overwrite: bool = False) -> None:
    sb.convert(source, target, "peft", base=tiny_config("llama"), overwrite=overwrite)


def started(call: Callable[[], Any]) -> int:
    """The number of a child that runs this: it ends with `DONE`, with `REFUSED` at an `OutputError`, else `FAILED`."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            call()
            code = DONE
        except OutputError as error:
            code = REFUSED if error.found and error.expected and error.remedy else FAILED
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "over an old one"])
def test_killed_at_random_instants(overwrite: bool, sources: Path, tmp_path: Path, record_property: Any) -> None:
    lengths = []
    for number in range(3):  # of which the first may be slow
        begun = time.monotonic()
        assert ended(started(lambda number=number: convert(sources / "a", tmp_path / f"whole{number}"))) == DONE
        lengths.append(time.monotonic() - begun)
    old, new = tree(sources / "peft_b") if overwrite else None, tree(sources / "peft_a")
    generator, counts = random.Random(overwrite), Counter[str]()
    for number in range(20 * KILLS):
        if counts["killed"] == KILLS:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        if overwrite:
            convert(sources / "b", folder / "target")
        child = started(lambda folder=folder: convert(sources / "a", folder / "target", overwrite))
        time.sleep(generator.uniform(0, min(lengths)))
        os.kill(child, signal.SIGKILL)
        counts["killed" if ended(child) == -signal.SIGKILL else "done"] += 1
        found = tree(folder / "target")
        assert found in (old, new)
        counts["new" if found == new else "old"] += 1
        counts["with strays"] += len(os.listdir(folder)) > (found is not None)
        convert(sources / "a", folder / "target", overwrite=True)
        assert os.listdir(folder) == ["target"], "what a killed process left is still there"
        assert tree(folder / "target") == new
    print(f"{'over an old one' if overwrite else 'fresh'}: {dict(counts)}")
    assert counts["killed"] == KILLS


@contextmanager
def mounted(folder: Path, size: str = "32k") -> Iterator[Path]:
    """A small file system of its own, where the test may mount one."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "over an old one"])
def test_files_that_may_not_grow(overwrite: bool, sources: Path, tmp_path: Path) -> None:
    """A limit on a file's size is met as a full disk is."""
    if overwrite:
        convert(sources / "b", tmp_path / "target")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        convert(sources / "a", tmp_path / "target", overwrite)

    assert ended(started(limited)) == REFUSED
    assert tree(tmp_path / "target") == (tree(sources / "peft_b") if overwrite else None)
    assert os.listdir(tmp_path) == ["target"] * overwrite


def test_a_full_disk(sources: Path, tmp_path: Path) -> None:
    size = sum(map(len, (tree(sources / "peft_b") or {}).values()))
    with mounted(tmp_path / "disk", f"{int(size * 1.6)}") as disk:
        convert(sources / "b", disk / "target")
        with pytest.raises(OutputError, match="No space left"):
            convert(sources / "a", disk / "target", overwrite=True)
        with pytest.raises(OutputError, match="No space left"):
            convert(sources / "a", disk / "other")
        assert tree(disk / "target") == tree(sources / "peft_b")
        assert os.listdir(disk) == ["target"]


def test_a_disk_that_is_read_only(sources: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "1m") as disk:
        convert(sources / "b", disk / "target")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for name, overwrite in (("target", True), ("other", False)):
            with pytest.raises(OutputError, match="Read-only"):
                convert(sources / "a", disk / name, overwrite)
        assert tree(disk / "target") == tree(sources / "peft_b")
        assert os.listdir(disk) == ["target"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        convert(sources / "a", tmp_path / "closed" / "target")


@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "over an old one"])
def test_two_at_once(overwrite: bool, sources: Path, tmp_path: Path) -> None:
    """One wins, whole; where nothing may be replaced, the other is refused."""
    results = [tree(sources / f"peft_{name}") for name in "ab"]
    for number in range(RACES):
        folder = tmp_path / str(number)
        folder.mkdir()
        if overwrite:
            convert(sources / "a", folder / "target")
        both = [
            started(lambda name=name, folder=folder: convert(sources / name, folder / "target", overwrite))
            for name in ("ab", "ba")[number % 2]
        ]
        codes = sorted(map(ended, both))
        assert codes == ([DONE, DONE] if overwrite else [DONE, REFUSED])
        assert tree(folder / "target") in results
        assert os.listdir(folder) == ["target"]
