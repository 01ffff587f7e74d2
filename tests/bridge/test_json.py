"""What ``--json`` prints is of the type that is documented, on standard output alone, of every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np
import pytest
import torch
import typer.main
from typer.testing import CliRunner, Result

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app
from softbridge.cli.schema import SCHEMAS, Certificate, Refused, markdown
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification import certificate

pytestmark = pytest.mark.usefixtures("remembered_runs")
GROUP: Any = typer.main.get_command(app)
README = Path(__file__).parents[2] / "bridge" / "README.md"
CERTIFICATE = {
    "schema",
    "verdict",
    "parted",
    "level",
    "conditions",
    "rounded",
    *(field.name for field in fields(certificate.Certificate)),
}


def faults(value: Any, kind: Any, where: str = "") -> Iterator[str]:
    """Where a value is not of a type, exactly: no key is missing, and none is there that nobody documented."""
    if kind is Certificate:
        if not isinstance(value, dict) or set(value) != CERTIFICATE or value["schema"] != certificate.SCHEMA:
            yield f"{where}: no certificate"
        return
    if get_origin(kind) is Annotated:
        yield from faults(value, get_args(kind)[0], where)
    elif is_typeddict(kind):
        if not isinstance(value, dict):
            yield f"{where}: {value!r:.40}, no object"
            return
        known = get_type_hints(kind, include_extras=True)
        yield from (f"{where}.{key}: missing" for key in sorted(kind.__required_keys__ - value.keys()))
        yield from (f"{where}.{key}: not documented" for key in sorted(value.keys() - known.keys()))
        for key in value.keys() & known.keys():
            yield from faults(value[key], known[key], f"{where}.{key}")
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            yield f"{where}: {value!r:.40}, no list"
            return
        for number, one in enumerate(value):
            yield from faults(one, get_args(kind)[0], f"{where}[{number}]")
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield f"{where}: {value!r:.40}, no object"
            return
        for key, one in value.items():
            yield from faults(one, get_args(kind)[1], f"{where}[{key}]")
    elif get_origin(kind) in (Union, UnionType):
        each = [list(faults(value, one, where)) for one in get_args(kind)]
        yield from [] if [] in each else min(each, key=len)
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            yield f"{where}: {value!r:.40}, not one of {get_args(kind)}"
    elif kind is not Any:
        plain = (float, int) if kind is float else (kind,)
        if type(value) not in plain:
            yield f"{where}: {value!r:.40}, not {kind.__name__}"


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ({"measure": "average", "prompts": ["a"], "similarity": [[1.0]]}, []),
        ({"measure": "average", "prompts": ["a"]}, [".similarity: missing"]),
        ({"measure": "average", "prompts": ["a"], "similarity": [["1"]]}, [".similarity[0][0]: '1', not float"]),
        ({"measure": None, "prompts": "a", "similarity": [], "more": 1}, [".more", ".measure", ".prompts"]),
        ([], [": [], no object"]),
    ],
)
def test_the_check_finds_what_is_wrong(value: Any, wrong: list[str]) -> None:
    found = list(faults(value, SCHEMAS["similar"]))
    assert len(found) == len(wrong)
    assert all(any(one.startswith(start) for one in found) for start in wrong)
    assert list(faults({}, Certificate))
    assert list(faults({"holds": 1}, SCHEMAS["verify"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with weights, prompts for it, and what stands in the way of some of the commands."""
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(folder / "base")
    geometry = BaseModel(model.config).geometry
    sb.save(random_prefix(geometry), folder / "prefix", format="peft", base=model)
    sb.save(random_input_prompt(geometry), folder / "vectors", format="peft", base=model)
    sb.save(random_input_prompt(geometry, seed=1), folder / "more", format="peft", base=model)
    sb.save(random_prefix(geometry), folder / "several" / "one", format="peft", base=model)
    np.save(folder / "several" / "ids.npy", np.zeros(9, np.int64))
    bert = tiny_config("bert")
    sb.save(random_prefix(BaseModel(bert).geometry), folder / "bert", format="peft", base=bert)
    (folder / "bert" / "softbridge.json").unlink()
    np.save(folder / "ids.npy", np.zeros(9, np.int64))
    return folder


BASE = ["--base", "base"]
#: What is called -> (exit status, words). In this order: some read what earlier ones wrote.
CALLS: list[tuple[int, list[str]]] = [
    (0, ["inspect", "prefix"]),
    (0, ["inspect", "vectors", *BASE]),
    (0, ["inspect", "bert"]),
    (0, ["convert", "prefix", "out", "--to", "softbridge", *BASE, "--verify"]),
    (0, ["convert", "prefix", "dry", "--to", "softbridge", "--dry-run"]),
    (0, ["convert", "several", "each", "--to", "softbridge", "--recursive"]),
    (0, ["merge-manifests", "each/softbridge-collection.jsonl", "--output", "all.jsonl"]),
    (0, ["verify", "prefix", "out", *BASE]),
    (1, ["verify", "vectors", "more", *BASE]),
    (0, ["verify", "out/certificate.json", *BASE]),
    (0, ["probe", "prefix", *BASE, "--output", "a.safetensors"]),
    (0, ["compare", "a.safetensors", "a.safetensors"]),
    (0, ["explain", "--from", "peft", "--to", "adapterhub", "--method", "prefix-tuning"]),
    (0, ["matrix"]),
    (0, ["doctor"]),
    (0, ["doctor", "prefix", *BASE]),
    (0, ["formats"]),
    (0, ["engines"]),
    (0, ["plugins"]),
    (0, ["demo"]),
    (0, ["words", "vectors", *BASE]),
    (0, ["similar", "vectors", "more"]),
    (0, ["bake", "vectors", "baked", *BASE]),
]
#: What is refused, of each command that can be.
REFUSED = [
    ["inspect", "no/such/place/at-all"],
    ["inspect", "ids.npy"],
    ["convert", "prefix", "out", "--to", "softbridge"],
    ["convert", "prefix", "elsewhere", "--to", "google"],
    ["verify", "prefix", "prefix"],
    ["verify", "ids.npy"],
    ["probe", "ids.npy", *BASE, "--output", "b.safetensors"],
    ["compare", "ids.npy", "ids.npy"],
    ["explain", "--from", "peft", "--to", "peff"],
    ["doctor", "ids.npy"],
    ["demo", "--from", "nothing"],
    ["words", "prefix", *BASE],
    ["similar", "vectors"],
    ["bake", "prefix", "baked2", *BASE],
    ["convert", "nowhere", "elsewhere", "--to", "softbridge", "--recursive"],
    ["merge-manifests", "prefix", "--output", "all2.jsonl"],
]


def call(words: list[str]) -> Result:
    return CliRunner().invoke(app, words)


def test_every_command_prints_what_is_documented(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert {words[0] for _, words in CALLS} == set(SCHEMAS)
    for status, words in CALLS:
        done = call([*words, "--json"])
        assert done.exit_code == status, (words, done.output)
        assert list(faults(json.loads(done.stdout), SCHEMAS[words[0]])) == [], words
        assert done.stderr == "", words


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_a_refusal_is_documented_too(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "out").mkdir(exist_ok=True)
    (place / "out" / "there").touch()
    done = call([*words, "--json"])
    assert done.exit_code == 2, done.output
    found = json.loads(done.stdout)
    assert list(faults(found, Refused)) == []
    assert found["refused"]["found"].split("\n")[0] in done.stderr
    spoken = call(words)
    assert (spoken.exit_code, spoken.stdout, spoken.stderr) == (2, "", done.stderr), "without --json, on stderr alone"


def test_every_command_takes_json_and_has_a_schema() -> None:
    assert set(GROUP.commands) == set(SCHEMAS)
    for name, command in GROUP.commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name
    assert {words[0] for words in REFUSED} >= set(SCHEMAS) - {"matrix", "formats", "engines", "plugins"}


def test_the_documents_table_is_generated() -> None:
    told = re.search(r"<!-- json -->\n(.*?)<!-- end -->", README.read_text(), re.DOTALL)
    assert told is not None
    assert told.group(1) == markdown(), "put softbridge.cli.schema.markdown() between the two comments"
