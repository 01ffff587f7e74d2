"""Files within files, trees of a pickle and YAML: what is there comes out, nothing is executed, nothing grows."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softbridge.errors import CheckpointError
from softbridge.untrusted import Files, Foreign, Stored, npy_bytes, parse_yaml, pickled, safetensors_bytes

ARRAY = np.random.default_rng(0).normal(0, 1, (3, 4)).astype(np.float32)
Opened, Refused = Callable[..., Files], Callable[..., CheckpointError]  # the fixtures in conftest.py


def saved(obj: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(obj, stream, **options)
    return stream.getvalue()


# --- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [True, False])
def test_a_training_state_is_read_without_its_objects(new: bool, opened: Opened) -> None:
    """As P-tuning's LAMA, OpenPrompt and textual inversion save theirs: tensors among objects that nobody makes."""
    tensor = torch.from_numpy(ARRAY.copy())
    state = {
        "embedding": collections.OrderedDict(weight=tensor, bias=tensor[0]),
        "args": argparse.Namespace(rate=0.1, template=(3, 3)),
        "time": datetime.datetime(2021, 3, 1),
        "lists": [torch.nn.Parameter(tensor.bfloat16()), (tensor.T,)],
        "parameters": torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)}),
        "optimizer": {"state": {0: {"step": 3, "average": tensor}}, "lr": 0.5},
    }
    read = opened(saved(state, _use_new_zipfile_serialization=new))
    tree = read.tree("file")
    assert tree is read.tree("file")
    assert np.array_equal(tree["embedding"]["weight"].array(), ARRAY)
    assert np.array_equal(tree["embedding"]["bias"].array(), ARRAY[0])
    assert np.array_equal(tree["lists"][1][0].array(), ARRAY.T)
    assert np.array_equal(tree["lists"][0].array().astype(np.float32), tensor.bfloat16().float().numpy())
    assert (tree["args"].name, tree["args"].state) == ("argparse Namespace", {"rate": 0.1, "template": [3, 3]})
    assert isinstance(tree["time"], Foreign)
    inner = tree["parameters"].state["_parameters"]
    assert np.array_equal(inner["*"].array(), ARRAY)
    assert tree["optimizer"]["state"][0]["step"] == 3
    with pytest.raises(CheckpointError):
        read.tensors("file")


def test_tensors_of_one_storage_share_its_memory(opened: Opened) -> None:
    big = torch.arange(4.0 * 2**18)
    tree = opened(saved({str(n): big[n:] for n in range(2000)})).tree("file")
    arrays = [tree[str(n)].array() for n in range(20)]
    assert len({array.__array_interface__["data"][0] - 4 * n for n, array in enumerate(arrays)}) == 1
    assert np.array_equal(arrays[19], big[19:].numpy())
    with pytest.raises(CheckpointError, match="share storages"):  # somebody would copy them
        arrays += [tree[str(n)].array() for n in range(20, 2000)]


def test_numbers_that_were_changed_are_refused(opened: Opened, refused: Refused) -> None:
    content = bytearray(saved({"a": torch.from_numpy(ARRAY.copy())}))
    content[content.index(ARRAY.tobytes())] ^= 1
    tree = opened(bytes(content)).tree("file")
    refused(tree["a"].array, "damaged")


def test_a_tensor_that_was_pickled_by_itself() -> None:
    tensor = torch.from_numpy(ARRAY.copy())
    for protocol in (2, 3, 4, 5):
        for each in (tensor, torch.nn.Parameter(tensor), tensor.half()):
            found = pickled(pickle.dumps(each, protocol), "x")
            assert isinstance(found, Stored)
            assert np.array_equal(found.array(), each.detach().numpy())
            assert found.array().dtype == each.detach().numpy().dtype


class Evil:
    def __reduce__(self) -> Any:
        return open, ("executed", "w")


@pytest.mark.parametrize("make", [pickle.dumps, lambda obj: saved({"x": obj}), lambda obj: saved(obj)])
def test_no_call_is_made(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = make(Evil())
    if make is pickle.dumps:
        assert isinstance(pickled(content, "x"), Foreign)
    else:
        (tmp_path / "file").write_bytes(content)
        assert "open" in repr(Files(tmp_path / "file").tree("file"))
    assert not (tmp_path / "executed").exists()


def test_pickles_that_only_look_like_tensors(refused: Refused) -> None:
    good = pickle.dumps(torch.from_numpy(ARRAY.copy()), 4)
    refused(lambda: pickled(good[:-100], "x"), "pickle")
    nested = b"\x80\x04)" + b"".join(b"q\0h\0\x86" for _ in range(200)) + b"."
    refused(lambda: pickled(nested, "x"), "nested too deeply")
    itself: list[Any] = []
    itself.append(itself)
    refused(lambda: pickled(pickle.dumps(itself), "x"), "nested too deeply")


def test_trees_of_other_files(opened: Opened) -> None:
    tree = opened(safetensors_bytes({"a": ARRAY, "b": np.arange(3)})).tree("file")
    assert {name: (t.shape, t.dtype.name) for name, t in tree.items()} == {
        "a": ((3, 4), "float32"),
        "b": ((3,), "int64"),
    }
    assert np.array_equal(tree["a"].array(), ARRAY)
    assert np.array_equal(tree["b"].array(), np.arange(3))
    alone = opened(npy_bytes(ARRAY)).tree("file")
    assert alone.shape == (3, 4)
    assert np.array_equal(alone.array(), ARRAY)


# --- archives ---------------------------------------------------------------------------------------------------------


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


MEMBERS = {
    "meta.yaml": b"a: [1, 2]\n",
    "weights.npy": npy_bytes(ARRAY),
    "deep/er/state.pt": saved({"a": torch.ones(2)}),
}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (zipped(MEMBERS), "zip"),
        (zipped(MEMBERS, zipfile.ZIP_LZMA), "zip"),
        (zipped(MEMBERS, zipfile.ZIP_DEFLATED), "zip"),
        (tarred(MEMBERS), "tar"),
        (tarred({f"./{name}": content for name, content in MEMBERS.items()}), "tar"),
        (tarred(MEMBERS, "w:gz"), "gzip"),
    ],
    ids=["zip", "lzma", "deflated", "tar", "tar with dots", "tar.gz"],
)
def test_an_archive_is_a_folder(content: bytes, kind: str, opened: Opened, refused: Refused) -> None:
    read = opened(content)
    assert read.kind("file") == kind
    within = read.inside("file")
    assert within.names == tuple(sorted(MEMBERS))
    assert np.array_equal(within.array("weights.npy"), ARRAY)
    assert within.yaml("meta.yaml") == {"a": [1, 2]}
    assert np.array_equal(within.tree("deep/er/state.pt")["a"].array(), [1, 1])
    refused(lambda: within.array("../secret"), "no file")


def bomb(kind: str) -> bytes:
    zeros = bytes(2**26)
    if kind == "tar.gz":
        return tarred({"a": zeros}, "w:gz")
    return zipped({"a": zeros}, {"lzma": zipfile.ZIP_LZMA, "deflated": zipfile.ZIP_DEFLATED}[kind])


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "lzma bomb": (lambda: bomb("lzma"), "more than"),
    "deflated bomb": (lambda: bomb("deflated"), "more than"),
    "tar.gz bomb": (lambda: bomb("tar.gz"), "more than"),
    "a member that climbs": (lambda: zipped({"../a": b"x"}), "members"),
    "a tar member that climbs": (lambda: tarred({"../a": b"x"}), "members"),
    "an absolute member": (lambda: tarred({"/etc/passwd": b"x"}), "members"),
    "two of a name": (lambda: tarred({"a": b"x", "./a": b"y"}), "members"),
    "a tar that is cut off": (lambda: tarred({"a": bytes(5000)})[:2000], "reaches beyond the file"),
    "a tar.gz that is cut off": (lambda: tarred({"a": bytes(5000)}, "w:gz")[:-9], "cut off"),
    "no archive": (lambda: b"{}", "kind json"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_archives(name: str, opened: Opened, refused: Refused) -> None:
    make, words = HOSTILE[name]
    refused(lambda: opened(make()).inside("file"), words)


def test_a_member_that_is_damaged(opened: Opened, refused: Refused) -> None:
    content = bytearray(zipped({"a": lzma.compress(b"x" * 100)}))
    content[40] ^= 255
    refused(lambda: opened(bytes(content)).inside("file").text("a"), "not readable")


# --- YAML -------------------------------------------------------------------------------------------------------------


YAML: list[tuple[str, bytes, str]] = [
    ("list", b"- 1\n", "type list"),
    ("alias", b"a: &x [1]\nb: *x\n", "alias"),
    ("object", b"a: !!python/object/apply:os.system ['echo']\n", "not readable as YAML"),
    ("deep", b"a: " + b"[" * 70 + b"]" * 70, "deeply"),
    ("very deep", b"a: " + b"[" * 5000 + b"]" * 5000, "deeply"),
    ("large", b"a: '" + b"x" * 2**20 + b"'", "bytes of YAML"),
    ("no UTF-8", b"a: \xff", "YAML"),
]


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in YAML], ids=[case[0] for case in YAML])
def test_hostile_yaml(content: bytes, words: str, refused: Refused) -> None:
    refused(lambda: parse_yaml(content, "x"), words)


def test_yaml_comes_back() -> None:
    assert parse_yaml(b"a:\n  b: 1\nc: [x, 2.5, null]\n", "x") == {"a": {"b": 1}, "c": ["x", 2.5, None]}
