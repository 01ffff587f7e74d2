"""The corpus of hostile files: each gets its answer, in memory and processor time by its bytes (`corpus.py`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import corpus
import hostile
import pytest

from softbridge.plugin.registry import formats

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space, and /proc")


def test_every_file_gets_its_answer(tmp_path: Path) -> None:
    """The quick ones; all of them in the long profile."""
    if os.environ.get("SOFTBRIDGE_PROFILE") == "long":
        results = corpus.run()
        assert len(results) >= 800
    else:
        results = corpus.read_all(tmp_path, hostile.make(tmp_path, hostile.is_quick))
        assert len(results) >= 150
    assert [f"{one.kind}: {one.name}: {one.wrong}" for one in results if one.wrong] == []
    kinds = {one.kind for one in results}
    assert kinds >= {*formats(), "pickle", "manifest", "folder", "base model", "certificate", "recording"}
    assert sum(one.outcome == "accepted" for one in results) >= 25, "the limits are too narrow for valid files"


def test_the_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too much memory or time, raises another error, runs code or gets another answer is noticed."""
    (tmp_path / "file").write_bytes(b"a")
    monkeypatch.chdir(tmp_path)

    def spins(path: Path) -> None:
        while True:
            pass

    readers = {
        "allocates": lambda path: bytearray(2**28),
        "spins": spins,
        "raises": lambda path: {}["a"],
        "accepts": lambda path: None,
        "executes": lambda path: (path.parent / corpus.MARKER).touch(),
    }
    monkeypatch.setattr(corpus, "READERS", readers)
    monkeypatch.setattr(corpus, "SECONDS_MORE", 0.1)
    found = {
        name: corpus.tried(corpus.Result("a", name, "CheckpointError"), tmp_path / "file", name).wrong
        for name in readers
    }
    assert "MemoryError" in found["allocates"]
    assert "processor time" in found["spins"]
    assert "KeyError" in found["raises"]
    assert found["accepts"] == "it was accepted"
    assert found["executes"] == "its code was executed"
