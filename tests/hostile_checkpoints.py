"""Hostile checkpoints, base models, certificates and recordings, one by one: each found something once, or might."""

from __future__ import annotations

import base64
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_rows import (
    HUGE,
    MOST,
    Evil,
    Make,
    Row,
    at,
    folder_of,
    folder_of_later,
    json_of,
    saved,
    sparse,
)
from specimens import HERE, loaded, specimens

from softbridge.checkpoint.manifest import signed
from softbridge.testing import tiny_config
from softbridge.untrusted import safetensors_bytes

# --- our own form, and what lies beside a toolkit's -------------------------------------------------------------------


def of_our_own() -> Iterator[Row]:
    container = loaded(HERE / "bridge" / "test_container.py")

    def unsound(changes: Any) -> Make:
        def made(folder: Path) -> Path:
            description, arrays = container.taken_apart(container.pack(container.FULL))
            for change in changes:
                change(description, arrays)
            return at("prompt.safetensors", lambda: container.put_together(description, arrays))(folder)

        return made

    for changes, words in container.UNSOUND:
        yield Row("softbridge", words[-1][:60], unsound(changes), "load")
    edit = container.edit
    for name, change in {
        "layers that nobody can count": edit("parts/1/layers", [2, HUGE]),
        "a layer of 4,000 digits": edit("parts/1/layers", [2, 10**4000]),
        "a start of 10**300": edit("positions/start", {"encoder": 10**300, "decoder": 0}),
        "a start that is a list": edit("positions/start", {"encoder": [1], "decoder": 0}),
        "a kind that is a list": edit("parts/1/kind", ["prefix"]),
        "notes that are a number": edit("origin/details/notes", 10**4000),
        "details that nest": edit("origin/details", json.loads("[" * 70 + "]" * 70)),
        "details 100 deep": edit("origin/details", json.loads('{"a":' * 100 + "0" + "}" * 100)),
        "10**12 layers in its base model": edit("base/geometry/decoder/layers", HUGE),
        "shapes without end": edit("base/geometry/encoder/shapes", [[1, 1]] * 100_000),
    }.items():
        yield Row("softbridge", name, unsound([change]), "load")


def of_the_manifest() -> Iterator[Row]:
    one = specimens()["peft prefix"]
    whole = json.loads(one.files["softbridge.json"])

    def with_manifest(**changes: Any) -> Make:
        return folder_of({**one.files, "softbridge.json": json_of(signed({**whole, **changes}))})

    for name, make in {
        "a dtype that is a list": with_manifest(dtype=[1]),
        "a start of 10**300": with_manifest(positions={**whole["positions"], "start": {"decoder": 10**300}}),
        "a start that is a text": with_manifest(positions={**whole["positions"], "start": {"decoder": "5"}}),
        "no files": with_manifest(files={}),
        "files that are a list": with_manifest(files=["adapter_model.safetensors"]),
        "a file of another folder": with_manifest(files={**whole["files"], "../../etc/passwd": "0" * 64}),
        "digests that are numbers": with_manifest(files=dict.fromkeys(whole["files"], 1)),
        "a scale of 0 digits": with_manifest(scale={"decoder": "x"}),
        "a scale of a stack that is none": with_manifest(scale={"middle": 1.0}),
        "steps that are texts": with_manifest(steps=["positions"]),
        "a step with a list for a name": with_manifest(steps=[{"name": [], "exactness": "exact", "note": ""}]),
        "a choice of a list": with_manifest(choice=[1]),
        "a source of a list": with_manifest(source=[1]),
        "another format": with_manifest(format="softbridge"),
        "a format of a list": with_manifest(format=["peft"]),
        "version 2": with_manifest(softbridge=2),
        "a version of 4,000 digits": with_manifest(softbridge=10**4000),
        "8 MB of lists": folder_of({**one.files, "softbridge.json": b'{"a": [' + b"[]," * (MOST // 3 - 10) + b"0]}"}),
        "nested lists": folder_of({**one.files, "softbridge.json": b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"}),
        "a list": folder_of({**one.files, "softbridge.json": b"[]"}),
        "nothing": folder_of({**one.files, "softbridge.json": b""}),
        "a terabyte": folder_of({**one.files, "softbridge.json": None}),
    }.items():
        yield Row("manifest", name, make, one)


# --- descriptions of toolkits -----------------------------------------------------------------------------------------

PEFT: dict[str, dict[str, Any]] = {
    "10**12 virtual tokens": {"num_virtual_tokens": HUGE},
    "-1 virtual tokens": {"num_virtual_tokens": -1},
    "10**12 layers": {"num_layers": HUGE},
    "0 heads": {"num_attention_heads": 0},
    "10**12 heads": {"num_attention_heads": HUGE},
    "a width of 10**12": {"token_dim": HUGE},
    "a number of 4,000 digits": {"num_layers": 10**4000},
    "half a layer": {"num_layers": 2.5},
    "a method that is a list": {"peft_type": ["PREFIX_TUNING"]},
    "a method that is a dictionary": {"peft_type": {"a": 1}},
    "another method": {"peft_type": "LORA"},
    "10**12 transformers": {"num_transformer_submodules": HUGE},
}
ADAPTERHUB: dict[str, dict[str, Any]] = {
    "10**12 virtual tokens": {"prefix_length": HUGE},
    "a perceptron that is not there": {"flat": False, "bottleneck_size": HUGE},
    "a perceptron of -1": {"flat": False, "bottleneck_size": -1},
    "an architecture that is a list": {"architecture": ["prefix_tuning"]},
    "layers left out without end": {"leave_out": list(range(10**5))},
    "layers left out that are texts": {"leave_out": ["a"]},
    "another architecture": {"architecture": "lora"},
    "a length that is a text": {"prefix_length": "5"},
}


def of_descriptions() -> Iterator[Row]:
    peft, hub = specimens()["peft prefix"], specimens()["adapterhub prefix"]
    config = json.loads(peft.files["adapter_config.json"])
    bare = {name: content for name, content in peft.files.items() if name != "softbridge.json"}
    for name, changes in PEFT.items():
        yield Row("peft", name, folder_of({**bare, "adapter_config.json": json_of({**config, **changes})}), peft)
    outer = json.loads(hub.files["adapter_config.json"])
    alone = {name: content for name, content in hub.files.items() if name != "softbridge.json"}
    for name, changes in ADAPTERHUB.items():
        changed = {**outer, "config": {**outer["config"], **changes}}
        expected = "accepted" if name == "a perceptron that is not there" else "CheckpointError"
        yield Row("adapterhub", name, folder_of({**alone, "adapter_config.json": json_of(changed)}), hub, expected)
    for name, other in {
        "a name that is a list": {"name": ["a"]},
        "a type that is a list": {"model_type": ["gpt2"]},
    }.items():
        yield Row("adapterhub", name, folder_of({**alone, "adapter_config.json": json_of({**outer, **other})}), hub)
    long_name = ".".join(["prefix_tuning"] * 3000)
    tensors = folder_of_later(alone, "pytorch_adapter.bin", lambda: saved({long_name: torch.ones(2)}))
    yield Row("adapterhub", "a tensor's name of 40,000 letters", tensors, hub)
    word = folder_of_later(alone, "pytorch_adapter.bin", lambda: saved({"a" * 40_000: torch.ones(2)}))
    yield Row("adapterhub", "a tensor's name that is one long word", word, hub)
    single = {"type": "single", "children": ["softbridge"]}

    def nested(kind: str, depth: int, width: int) -> Any:
        value: Any = single
        for _ in range(depth):
            value = {"type": kind, "children": [value] * width}
        return value

    def setup(value: Any) -> Make:
        named = {f"softbridge/{name}": content for name, content in alone.items()}
        return folder_of({"adapter_setup.json": json_of({"adapter_setup": value}), **named})

    for name, value in {
        "a stack of 2**12, nested": nested("Stack", 12, 2),
        "parallel in parallel": nested("Parallel", 16, 2),
        "a stack of 800 equal names": nested("Stack", 1, 800),
        "a stack that is a list": [single],
        "a stack of nothing": {"type": "Stack", "children": []},
        "a name that climbs": {"type": "single", "children": ["../softbridge"]},
        "a split of -1 rows": {"type": "BatchSplit", "children": [single], "kwargs": {"batch_sizes": [-1]}},
    }.items():
        yield Row("adapterhub", f"setup: {name}", setup(value), hub)
    mkultra = specimens()["mkultra"]
    evil = base64.b64encode(pickle.dumps(Evil())).decode()
    for name, tensor in {
        "a pickle that calls": evil,
        "no base64": "?" * 100,
        "a number": 3,
        "8 MB of base64": base64.b64encode(b"\x80\x04](" + b"}" * (5 * 2**20) + b"e.").decode(),
    }.items():
        yield Row(
            "mkultra", name, at("tale.json", lambda tensor=tensor: json_of({"metadata": {}, "tensor": tensor})), mkultra
        )


# --- folders ----------------------------------------------------------------------------------------------------------


def of_folders() -> Iterator[Row]:
    one = specimens()["peft prefix"]

    def with_more(change: Callable[[Path], Any]) -> Make:
        def made(folder: Path) -> Path:
            one.laid(folder)
            change(folder)
            return folder

        return made

    def many(folder: Path) -> None:
        for number in range(5000):
            (folder / str(number)).mkdir()
            (folder / str(number) / "adapter_config.json").write_bytes(b"{}")

    def linked(folder: Path) -> None:
        weights = folder / "adapter_model.safetensors"
        weights.rename(folder.parent / "outside")
        weights.symlink_to("../outside")

    for name, change, expected in (
        ("5,000 sub-folders", many, "accepted"),
        ("a pipe beside it", lambda folder: os.mkfifo(folder / "pipe"), "accepted"),
        ("a loop of links beside it", lambda folder: (folder / "loop").symlink_to("loop"), "accepted"),
        ("a terabyte beside it", lambda folder: sparse(folder / "notes", b""), "accepted"),
        (
            "a name that is no UTF-8",
            lambda folder: Path(os.fsdecode(bytes(folder) + b"/a\xff.txt")).touch(),
            "accepted",
        ),
        ("a card of a terabyte", lambda folder: sparse(folder / "README.md", b"# a"), "accepted"),
        ("a certificate of a terabyte", lambda folder: sparse(folder / "certificate.json", b"{"), "accepted"),
        ("weights that are a link out of it", linked, "CheckpointError"),
    ):
        yield Row("folder", name, with_more(change), one, expected)
    for name, path in (("a NUL in its name", "a\0b"), ("a name of 300 letters", "a" * 300), ("nothing there", "none")):
        yield Row("folder", name, lambda folder, path=path: folder / path, "load")
    yield Row("folder", "no user of that name", lambda folder: Path("~nosuchuser/prompt"), "load")
    yield Row("folder", "an empty folder", lambda folder: folder, "load")
    huge = safetensors_bytes({f"{n:05}": np.ones(0, np.float32) for n in range(80_000)} | {"a": np.ones(1, np.float32)})
    yield Row("safetensors", "80,000 empty tensors", at("file", lambda: huge), "tensors", "accepted")


# --- base models, certificates and recordings -------------------------------------------------------------------------

#: What is asked here is what shape the attention has. Whether a model can be built so is asked when one is built.
BASES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "accepted"),
    ("llama", {"num_hidden_layers": HUGE}, "BaseModelError"),
    ("gpt2", {"n_layer": 10**5}, "BaseModelError"),
    ("gpt2", {"num_labels": 10**8}, "BaseModelError"),
    ("gpt2", {"num_labels": -1}, "accepted"),
    ("t5", {"d_kv": 10**6}, "accepted"),
    ("t5", {"num_layers": HUGE}, "BaseModelError"),
    ("llama", {"num_key_value_heads": 3}, "accepted"),
    ("llama", {"num_attention_heads": 0}, "BaseModelError"),
    ("llama", {"head_dim": 10**400}, "accepted"),
    ("llama", {"hidden_size": -1}, "BaseModelError"),
    ("llama", {"hidden_size": "32"}, "BaseModelError"),
    ("llama", {"rope_scaling": {"rope_type": "nosuch", "factor": 2.0}}, "accepted"),
    ("llama", {"_attn_implementation": "user/kernel"}, "BaseModelError"),
    ("llama", {"model_type": "nosuch"}, "BaseModelError"),
    ("llama", {"model_type": ["llama"]}, "BaseModelError"),
    ("llama", {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}, "BaseModelError"),
]


def of_bases() -> Iterator[Row]:
    for family, changes, expected in BASES:
        whole = {**tiny_config(family).to_dict(), **changes}
        said = (
            ", ".join(f"{name} = {value!r:.30}" for name, value in changes.items())
            if "head_dim" not in changes
            else "a size of 401 digits"
        )
        yield Row(
            "base model", f"{family}: {said}", at("config.json", lambda whole=whole: json_of(whole)), "base", expected
        )
    for name, content in {
        "a list": b"[]",
        "cut off": b'{"model_type": "llama"',
        "nested": b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        "8 MB of keys": json_of({"model_type": "gpt2"} | {f"{n:06x}": 0 for n in range(MOST // 13)}),
        "a number of 5,000 digits": b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
        "nothing": b"",
        "no UTF-8": b'{"model_type": "\xff"}',
    }.items():
        expected = "accepted" if name == "8 MB of keys" else "BaseModelError"
        yield Row("base model", name, at("config.json", lambda content=content: content), "base", expected)
    side = {"path": "prompt", "engine": "native", "digest": "0", "files": {}}
    good = {
        "schema": 1,
        "source": side,
        "target": side,
        "dtype": "float32",
        "seed": 0,
        "weights": "x",
        "verdict": "exact",
    }
    for name, value in {
        "no schema": {},
        "a schema that is a list": {"schema": []},
        "sides without a path": {**good, "source": {}},
        "a path with NUL": {**good, "source": {**side, "path": "a\0b"}},
        "a path of /etc": {**good, "source": {**side, "path": "/etc/passwd"}},
        "a level that is a list": {**good, "level": []},
        "sides that are lists": {**good, "source": [], "target": []},
        "a base on a hub": {**good, "base": "owner/name"},
    }.items():
        yield Row(
            "certificate",
            name,
            at("certificate.json", lambda value=value: json_of(value)),
            "certificate",
            "SoftbridgeError",
        )
    for name, content in {
        "nothing": b"",
        "a prompt": specimens()["softbridge prefix"].files["prompt.safetensors"],
        "no description": safetensors_bytes({"a": np.ones(2, np.float32)}),
        "a description that is a list": recorded([]),
        "a version that is a list": recorded({"version": [1]}),
        "no captures": recorded({"version": 1, "captures": None}),
        "captures that are numbers": recorded({"version": 1, "side": {"engine": "native"}, "captures": [3]}),
        "an order of lists": recorded(
            {"version": 1, "side": {"engine": "a"}, "captures": [{"order": {"exact": [[]]}}]}
        ),
    }.items():
        yield Row("recording", name, at("a.safetensors", lambda content=content: content), "recording")


def recorded(description: Any) -> bytes:
    from softbridge.verification.recording import KEY, VERSION

    if isinstance(description, dict) and description.get("version") == 1:
        description["version"] = VERSION
    return safetensors_bytes({"0.exact.a": np.ones(2, np.float32)}, {KEY: json.dumps(description)})


ALL = (of_our_own, of_the_manifest, of_descriptions, of_folders, of_bases)
