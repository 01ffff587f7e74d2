"""Many checkpoints on several machines: each has its part of them, and their manifests become one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collected import CHECKPOINTS, convert, make_collection, written

from softbridge.collection.merge import merge_manifests
from softbridge.collection.record import Shard, lines, unpack
from softbridge.errors import ArgumentError, CheckpointError, OutputError, SoftbridgeError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_collection(tmp_path_factory.mktemp("collection") / "made")


def test_a_shard_does_not_depend_on_what_else_there_is() -> None:
    paths = [f"a/{n}" for n in range(200)]
    parts = [{path for path in paths if Shard(i, 3).holds(path)} for i in (1, 2, 3)]
    assert set().union(*parts) == set(paths)
    assert sum(map(len, parts)) == len(paths)
    assert min(map(len, parts)) > 40
    assert Shard.parse("2/3") == Shard(2, 3)
    assert Shard(2, 3).holds("a/1") is ("a/1" in parts[1])
    for wrong in ("0/3", "4/3", "a/3", "2", "-1/3", "1/3/5"):
        with pytest.raises(ArgumentError):
            Shard.parse(wrong)


@pytest.fixture(scope="module")
def shards(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two machines write."""
    out = tmp_path_factory.mktemp("shards") / "out"
    for shard in ("1/2", "2/2"):
        convert(made, out, shard=shard)
    return out


def manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("softbridge-collection.*-of-*.jsonl"))


def test_manifests_of_shards_are_joined_to_that_of_one_run(made: Path, shards: Path, tmp_path: Path) -> None:
    assert [path.name for path in manifests(shards)] == [f"softbridge-collection.{n}-of-2.jsonl" for n in (1, 2)]
    assert all(unpack(path).records for path in manifests(shards)), "both have something to do"
    merged = merge_manifests([shards], tmp_path / "whole.jsonl")
    assert merged.missing == merged.double == ()
    assert merged.exit_status == 2
    assert unpack(tmp_path / "whole.jsonl") == merged.manifest == convert(made, tmp_path / "out").manifest
    with pytest.raises(OutputError, match="is there already"):
        merge_manifests(manifests(shards), tmp_path / "whole.jsonl")
    assert not {*written(shards)} - {*written(tmp_path / "out")} - {path.name for path in manifests(shards)}
    shutil.copytree(shards, tmp_path / "copy")
    assert convert(made, tmp_path / "copy", shard="1/3").exit_status in (0, 2)
    assert convert(made, tmp_path / "copy").taken_over == len(CHECKPOINTS), "shared out another way, it is known, too"


def test_what_is_missing_is_named_and_what_is_double_and_alike_does_no_harm(shards: Path, tmp_path: Path) -> None:
    first, second = manifests(shards)
    part = merge_manifests([first, first], tmp_path / "part.jsonl")
    assert part.missing == ("shard 2/2",)
    assert part.double == ()
    assert part.exit_status == 2
    assert unpack(tmp_path / "part.jsonl").paths["missing"] == ["shard 2/2"]
    shutil.copyfile(first, tmp_path / "again.jsonl")
    double = merge_manifests([first, tmp_path / "again.jsonl", second], tmp_path / "double.jsonl")
    assert double.double == tuple(record.path for record in unpack(first).records)
    assert double.missing == ()
    with pytest.raises(CheckpointError, match="without a manifest"):
        merge_manifests([tmp_path], tmp_path / "none.jsonl")


def changed(path: Path, change: Callable[[list[Any]], None], output: Path) -> Path:
    told = lines(path)
    change(told)
    output.write_text("".join(json.dumps(one) + "\n" for one in told))
    return output


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the option dtype", lambda told: told[0]["options"].update(dtype="float16")),
        ("the source", lambda told: told[0].update(source="elsewhere")),
        ("the number of shards", lambda told: told[0].update(shard=[2, 3])),
        ("the list of checkpoints", lambda told: told[0]["paths"].update(count=99)),
        ("of another shard", lambda told: told[1].update(path=next(p for p in "abcdef" if Shard(1, 2).holds(p)))),
        ("other ones than the", lambda told: told.pop()),
        ("with other options", lambda told: told[1].update(options={"to": "peft"})),
    ],
)
def test_manifests_that_contradict_each_other_are_refused(
    shards: Path, tmp_path: Path, what: str, change: Callable[[list[Any]], None]
) -> None:
    first, second = manifests(shards)
    with pytest.raises(SoftbridgeError, match=what):
        merge_manifests([first, changed(second, change, tmp_path / "changed.jsonl")], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_two_manifests_that_say_two_things_of_one_checkpoint_are_refused(shards: Path, tmp_path: Path) -> None:
    first, second = manifests(shards)
    other = changed(first, lambda told: told[1].update(verdict="defect"), tmp_path / "changed.jsonl")
    with pytest.raises(SoftbridgeError, match="differ in"):
        merge_manifests([first, second, other], tmp_path / "out.jsonl")


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b'{"schema":"softbridge/collection/1"}\n', b"no json\n"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError):
        merge_manifests([tmp_path / "x.jsonl"], tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    "wrong", [{"verdict": "fine"}, {"path": 3}, {"more": 1}, {"reason": "x"}, {"target": {"files": 3}}]
)
def test_a_record_is_checked_when_it_is_read(shards: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = changed(manifests(shards)[0], lambda told: told[1].update(wrong), tmp_path / "x.jsonl")
    with pytest.raises(CheckpointError, match="not the manifest"):
        unpack(path)
