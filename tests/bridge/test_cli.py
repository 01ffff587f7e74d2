"""The command line: every command, its exit status, and refusals that write nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import softbridge as sb
from softbridge import conversion
from softbridge.base import BaseModel
from softbridge.checkpoint.choice import DROPPED
from softbridge.cli import main, show
from softbridge.cli.console import app
from softbridge.cli.tables import certificate_table, shown
from softbridge.errors import PluginError
from softbridge.lowering.precision import DTYPES
from softbridge.methods import MultitaskPromptTuning, rematerialise
from softbridge.plugin.registry import formats, servers
from softbridge.prompt import Origin, pack
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model
from softbridge.verification.claim import LEVELS, WORKING


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_config("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "peft", format="peft", base=config)
    return tmp_path / "peft"


def test_formats_engines_and_plugins_are_listed() -> None:
    names = [row["name"] for row in json.loads(call("formats", "--json").output)]
    assert names == sorted(formats())
    assert {"adapterhub", "google", "peft", "softbridge"} < set(names)
    engines = {row["name"]: row["unavailable"] for row in json.loads(call("engines", "--json").output)}
    assert set(engines) == {"adapterhub", "native", "peft", *servers()}
    assert engines["native"] is None
    for command in ("formats", "engines", "plugins"):
        result = call(command)
        assert result.exit_code == 0
        assert "peft" in result.output


def test_inspect_says_what_a_file_is(peft: Path, base: Path) -> None:
    found = json.loads(call("inspect", peft, "--base", base, "--json").output)
    assert found["format"] == "peft"
    assert found["parts"][0]["site"] == "self"
    assert found["parts"][0]["length"] == 5
    assert found["parts"][0]["shape"] == [2, 5, 8]
    assert found["positions"]["start"] == {"decoder": 5}
    assert 0.7 < found["parts"][0]["std"] < 0.9
    assert "key/value prefix" in call("inspect", peft).output
    assert sb.inspect(peft, base=base) == found, "the same as a verb of Python"


def test_inspect_shows_what_the_reader_had_to_say(peft: Path, tmp_path: Path) -> None:
    assert json.loads(call("inspect", peft, "--json").output)["notes"] == []
    config = tiny_config("t5", num_layers=4, num_decoder_layers=4)
    sb.save(
        random_prefix(BaseModel(config).geometry, sites=("self",)), tmp_path / "ours", format="softbridge", base=config
    )
    prompt = sb.load(tmp_path / "ours")
    (part,) = prompt.prefixes
    layers = {n: part.layers[2 * n % 4] for n in part.layers}  # as PEFT repeats them
    sb.save(replace(prompt, parts=(replace(part, layers=layers),)), tmp_path / "t5", format="peft", base=config)
    (note,) = json.loads(call("inspect", tmp_path / "t5", "--json").output)["notes"]
    assert "blocks of odd number, which PEFT never uses" in note
    assert "PEFT never uses" in " ".join(call("inspect", tmp_path / "t5").output.split())

    config = tiny_config("gpt2")
    tasks = MultitaskPromptTuning(3, length=4).initialise(BaseModel(config).geometry, 0)
    sb.save(rematerialise(tasks, 1), tmp_path / "tasks", format="peft", base=config)
    found = json.loads(call("inspect", tmp_path / "tasks", "--json").output)
    assert found["task"] == {"number": 1, "of": 3}
    shown_ = " ".join(call("inspect", tmp_path / "tasks").output.split())
    assert "task 1 of 3, counted from 0" in shown_
    assert "--task" in shown_


def test_inspect_says_when_it_needs_the_base_model(tmp_path: Path) -> None:
    config = tiny_config("bert")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "peft", format="peft", base=config)
    (tmp_path / "peft" / "softbridge.json").unlink()
    result = call("inspect", tmp_path / "peft")
    assert result.exit_code == 0
    assert "give --base" in result.output


def test_convert_verifies_and_says_what_it_did(peft: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("convert", peft, out, "--to", "adapterhub", "--base", base / "config.json", "--verify")
    assert result.exit_code == 0, result.output
    assert "rotate" in result.output
    assert "copied as it is" in result.output
    assert "verdict: the same function" in result.output
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["verdict"] == "exact"
    manifest = json.loads((out / "softbridge.json").read_text())
    assert manifest["positions"]["start"] == {"decoder": 0}
    assert set(manifest["files"]) >= {"adapter_config.json", "pytorch_adapter.bin", "certificate.json"}


def test_a_conversion_that_comes_out_different_has_the_status_of_a_difference(
    peft: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, prepare = random_prefix(BaseModel(tiny_config("llama")).geometry, seed=1), conversion.prepare
    monkeypatch.setattr(conversion, "prepare", lambda prompt, *rest: prepare(other, *rest))
    result = call("convert", peft, tmp_path / "out", "--to", "softbridge", "--base", base, "--verify")
    assert result.exit_code == 1, result.output
    assert "verification found the converted prompt different" in result.stderr
    assert not (tmp_path / "out").exists()


def test_verify_has_three_exit_statuses(peft: Path, base: Path, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry, seed=1), tmp_path / "other", format="peft", base=config)
    assert call("verify", peft, peft, "--base", base).exit_code == 0
    result = call("verify", peft, tmp_path / "other", "--base", base)
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output
    sb.save(random_input_prompt(BaseModel(tiny_config("gpt2", n_embd=64)).geometry), tmp_path / "wide", format="peft")
    result = call("verify", peft, tmp_path / "wide", "--base", base)
    assert result.exit_code == 2
    assert "width 64, the model's is 32" in result.stderr


def test_a_target_is_not_overwritten_unless_told(peft: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("convert", peft, out, "--to", "softbridge").exit_code == 0
    before = (out / "prompt.safetensors").read_bytes()
    result = call("convert", peft, out, "--to", "softbridge")
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert (out / "prompt.safetensors").read_bytes() == before
    assert call("convert", peft, out, "--to", "softbridge", "--overwrite").exit_code == 0


def test_a_dry_run_does_all_but_write(peft: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["convert", peft, out, "--to", "softbridge", "--base", base]
    result = call(*arguments, "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written; it would have been prompt.safetensors (" in result.output
    planned = json.loads(call(*arguments, "--verify", "--dry-run", "--json").output)
    assert not out.exists()
    assert (planned["written"], planned["certificate"]["verdict"]) == (False, "bitwise")
    done = json.loads(call(*arguments, "--json").output)
    assert done["written"]
    sizes = {name: (out / name).stat().st_size for name in done["target"]["files"]}
    assert done["target"]["files"] == sizes
    assert sizes.pop("README.md") < planned["target"]["files"]["README.md"], "which says what verification found"
    assert planned["target"]["files"].items() >= sizes.items()
    assert call(*arguments, "--dry-run").exit_code == 2, "what stands against writing stands against planning it"


def test_words_and_similar_say_what_a_prompt_is_near_to(tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained(tmp_path / "base")
    table = model.get_input_embeddings().weight.detach().numpy()
    prompt = random_input_prompt(BaseModel(model.config).geometry)
    part = replace(prompt.inputs[0], vectors=2 * table[[7, 11, 13, 17, 19]])
    for name, vectors in {"a": part.vectors, "b": -part.vectors, "c": part.vectors[::-1]}.items():
        one = replace(prompt, parts=(replace(part, vectors=np.ascontiguousarray(vectors)),))
        sb.save(one, tmp_path / name, format="peft", base=model)
    found = json.loads(call("words", tmp_path / "a", "--base", tmp_path / "base", "--top", 2, "--json").output)
    assert [row["ids"][0] for row in found] == [7, 11, 13, 17, 19]
    assert all(row["cosines"][0] > 0.9999 > row["cosines"][1] for row in found)
    assert "11 1.00" in call("words", tmp_path / "a", "--base", tmp_path / "base").output
    paths = [str(tmp_path / name) for name in "abc"]
    near = np.array(json.loads(call("similar", *paths, "--json").output)["similarity"])
    assert np.allclose(near, [[1, -1, 1], [-1, 1, -1], [1, -1, 1]], atol=1e-6)
    assert "-1.000" in call("similar", *paths).output
    sb.save(random_prefix(BaseModel(model.config).geometry), tmp_path / "prefix", format="peft", base=model)
    for arguments, said in {
        ("words", tmp_path / "prefix", "--base", tmp_path / "base"): "no neighbours among words",
        ("similar", paths[0], tmp_path / "prefix"): "parts",
        ("similar", paths[0]): "two or more",
    }.items():
        result = call(*arguments)
        assert result.exit_code == 2
        assert said in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "peff"], "did you mean 'peft'?"),
        (["--to", "onnx"], "no format is called 'onnx'"),
        (["--to", "adapterhub"], "give it with --base"),
        (["--to", "google"], "google cannot express a key/value prefix at the site 'self'"),
        (["--to", "softbridge", "--verify"], "verification was asked for without a base model"),
        (["--to", "softbridge", "--base", "no/such"], "'no/such' cannot be read as a base model"),
        (["--to", "softbridge", "--from", "google"], "one NumPy file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals_say_what_to_do_and_write_nothing(arguments: list[str], said: str, peft: Path, tmp_path: Path) -> None:
    result = call("convert", peft, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "expected:" in result.stderr
    assert "to do:" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_manifest_of_other_files_is_not_believed(peft: Path, tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry, seed=1), tmp_path / "other", format="peft", base=config)
    (peft / "softbridge.json").write_bytes((tmp_path / "other" / "softbridge.json").read_bytes())
    result = call("inspect", peft)
    assert result.exit_code == 2
    assert "describes other files than those beside it: adapter_model.safetensors" in result.stderr


def test_one_file_targets(tmp_path: Path) -> None:
    config = tiny_config("t5")
    prompt = random_input_prompt(BaseModel(config).geometry)
    sb.save(prompt, tmp_path / "prompt.npy", format="google", base=config)
    assert call("convert", tmp_path / "prompt.npy", tmp_path / "p.safetensors", "--to", "softbridge").exit_code == 0
    again = sb.load(tmp_path / "p.safetensors")
    assert again.inputs == prompt.inputs


@pytest.mark.parametrize("target", ["softbridge", "peft"])
def test_the_demo_runs_with_the_engines_at_hand(target: str, tmp_path: Path) -> None:
    result = call("demo", "--from", "peft", "--to", target, "--directory", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert "verdict: the same" in result.output
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"trained", "converted"}


def test_the_demo_prints_the_certificate_for_a_program() -> None:
    result = call("demo", "--to", "softbridge", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verdict"] == "bitwise"


def test_every_command_takes_json() -> None:
    for command in (
        "inspect",
        "convert",
        "verify",
        "explain",
        "formats",
        "engines",
        "plugins",
        "demo",
        "words",
        "similar",
    ):
        assert "--json" in call(command, "--help").output


def test_the_demo_shows_the_trap_and_the_way_out() -> None:
    engines = {row["name"]: row["unavailable"] for row in json.loads(call("engines", "--json").output)}
    result = call("demo", "--from", "peft", "--to", "adapterhub")
    assert result.exit_code == 0, result.output
    assert "the prompt's effect" in result.output
    assert "another function" in result.output
    assert "verdict: the same function" in result.output
    ran = "adapterhub" if engines["adapterhub"] is None else "native (adapterhub: "
    assert ran in result.output


# Bad arguments and defects


@pytest.mark.parametrize(
    ("command", "option", "known"),
    [
        ("convert", "--dtype", tuple(DTYPES)),
        ("convert", "--drop", tuple(DROPPED)),
        ("verify", "--dtype", WORKING),
        ("probe", "--dtype", WORKING),
        ("verify", "--level", LEVELS),
        ("compare", "--level", LEVELS),
    ],
)
def test_choices_are_the_cores_own_lists(command: str, option: str, known: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).stdout
    assert f"One of: {', '.join(known)}." in shown
    more = {"convert": ["--to", "peft"], "probe": ["--base", "c", "--output", "d"]}.get(command, [])
    sides = ["a"] if command == "probe" else ["a", "b"]
    result = call(command, *sides, *more, option, "nothing")
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert f"'nothing' is not one of {', '.join(map(repr, known))}" in said


@pytest.mark.parametrize("option", [("--dtype", "foo"), ("--dtype", "int8"), ("--dtype", "[/x]"), ("--seed", "-1")])
def test_bad_options_are_usage_errors(option: tuple[str, str], peft: Path, base: Path) -> None:
    result = call("verify", peft, peft, "--base", base, *option)
    assert result.exit_code == 2
    assert "Invalid value" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_working_precision_is_reported(dtype: str, peft: Path, base: Path) -> None:
    found = json.loads(call("verify", peft, peft, "--base", base, "--dtype", dtype, "--json").stdout)
    assert (found["dtype"], found["verdict"]) == (dtype, "bitwise")


def test_the_largest_seed_can_be_used(peft: Path, base: Path) -> None:
    assert call("verify", peft, peft, "--base", base, "--seed", 2**32 - 1).exit_code == 0


@pytest.mark.parametrize(
    "error",
    [
        ValueError("odd \x1b[31m[/x]"),
        EOFError("cut"),
        BrokenPipeError(32, "pipe"),
        OSError(5, "disk"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_defect_has_a_status_of_its_own(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **more: object) -> None:
        raise error

    monkeypatch.setattr("softbridge.checkpoint.inspect.inspect", fail)
    monkeypatch.setattr(sys, "argv", ["softbridge", "inspect", "x"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets its own
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 3
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert type(error).__name__ in said
    assert "please report" in said
    assert "\x1b" not in said


def test_an_interruption_that_became_another_error_is_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(**given: object) -> None:
        """What a module of C makes of Ctrl-C while it is imported."""
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("a module failed to import") from None

    monkeypatch.setattr("softbridge.cli.app", importing)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_refusal_keeps_its_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["inspect", "no/such"], 2), (["inspect"], 2), (["formats"], 0)):
        monkeypatch.setattr(sys, "argv", ["softbridge", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == status
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
@pytest.mark.parametrize("arguments", [["formats"], ["formats", "--json"]])
def test_a_closed_pipe_is_not_a_difference(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "from softbridge.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code, *arguments], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert ran.returncode == 141
    assert b"Traceback" not in ran.stderr


def test_a_terminal_that_lacks_characters_is_no_reason_to_fail(tmp_path: Path) -> None:
    np.save(tmp_path / "prompt \u4e2d.npy", np.ones((2, 8), np.float32))
    code = "from softbridge.cli import main; main()"
    arguments = [sys.executable, "-c", code, "inspect", str(tmp_path / "prompt \u4e2d.npy")]
    ran = subprocess.run(arguments, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ran.returncode == 0, ran.stderr
    assert rb"prompt \u4e2d.npy" in ran.stdout


def test_a_broken_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise PluginError("softbridge_formats of the plugin '[/x]' failed", "a list", "uninstall it")

    monkeypatch.setattr(show, "formats_table", fail)
    result = call("formats")
    assert result.exit_code == 2
    assert "the plugin '[/x]' failed" in result.stderr


# What is shown


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("plain [/x] [bold]x[/] :smile: \\", "plain [/x] [bold]x[/] :smile: \\"),
        ("a\x1b[31mRED\x1b]0;title\x07", "a\\x1b[31mRED\\x1b]0;title\\x07"),
        ("a\nb\rc\td\x00\x7f\x9b\u2028", "a\\nb\\rc\\td\\x00\\x7f\\x9b\\u2028"),
        ("\u202egnp", "\\u202egnp"),
        ("\udc80", "\\udc80"),
        ("Größe \u4e2d", "Größe \u4e2d"),
    ],
)
def test_shown_text_is_literal(text: str, seen: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(text).plain == seen
    Console(width=120).print(shown(text))
    assert capsys.readouterr().out == seen + "\n"


EVIL = "a\x1b[31mRED\x1b]0;title [/x]"


def evil(folder: Path, peft: Path) -> Path:
    """A checkpoint as a stranger may name it, in a directory that reads like markup."""
    (folder / "[").mkdir(parents=True)  # "[/x]" is a folder in a folder
    path = folder / "[" / "x]"
    peft.rename(path)
    (path / "softbridge.json").unlink()
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = EVIL
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_names_from_files_and_paths_are_shown_as_they_are(
    peft: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil(tmp_path, peft)
    monkeypatch.chdir(tmp_path)
    path = "[/x]"
    calls: list[tuple[list[object], int, str]] = [
        (["inspect", path], 0, r"a\x1b[31mRED\x1b]0;title [/x]"),
        (["inspect", path, "--base", base], 0, r"a\x1b[31mRED\x1b]0;title [/x]"),
        (["inspect", "[/y]\x1b[31m"], 2, r"'[/y]\x1b[31m'"),
        (["convert", path, "[/o\x1b]", "--to", "peft"], 0, r"peft [/x] -> peft [/o\x1b]"),
        (["convert", path, "[/o]", "--to", "[/onnx]"], 2, "no format is called '[/onnx]'"),
        (["convert", path, "[/p]", "--to", "peft", "--base", base, "--verify"], 0, "[/p]"),
        (["convert", path, "[/q]", "--to", "peft", "--from", "[/f]"], 2, "called '[/f]'"),
        (["convert", path, "[/q]", "--to", "peft", "--accept", "[/x]"], 2, "'[/x]' is not one of 'positions'"),
        (["verify", path, path, "--base", base], 0, "[/x]"),
        (["verify", path, path, "--base", "[/b]"], 2, "'[/b]'"),
        (["explain", "--from", "peft", "--to", "peft", "--method", "[/m]"], 2, "'[/m]'"),
        (["demo", "--from", "[/e]"], 2, "no engine is called '[/e]'"),
    ]
    for arguments, status, said in calls:
        result = call(*arguments)
        assert result.exit_code == status, (arguments, result.output)
        assert said in result.output, (arguments, result.output)
        assert "\x1b" not in result.output
        assert "Traceback" not in result.output


def table_of(**changes: object) -> str:
    """A certificate as it is shown; only what the table reads."""
    side = SimpleNamespace(path="[/a]", engine="native", instead_of="", loaded=True)
    facts = {
        "source": side,
        "target": SimpleNamespace(path="b\x1b", engine="peft", instead_of="[/why]", loaded=False),
        "base": "[/base]",
        "weights": "random",
        "dtype": "float32",
        "islands": (),
        "rounded": (),
        "bound": 1e-12,
        "figures": (SimpleNamespace(probe="alone", float64=0.0, working=1e-6, judged=True, note=""),),
        "faults": (SimpleNamespace(name="dropped", moved=1.0, noticed=True),),
        "untried": {"two layers swapped": "[/reason]"},
        "naive": None,
        "verdict": "exact",
        "same": True,
        "level": "exact",
        "yardstick": 2e-6,
        "unit": 1e-6,
        "parted": None,
        "longest": 23,
        "conditions": (),
        "independent": True,
    }
    console = Console(width=160)
    with console.capture() as capture:
        console.print(certificate_table(SimpleNamespace(**{**facts, **changes})))  # type: ignore[arg-type]
    return capture.get()


def test_a_certificate_says_what_it_does_not_show() -> None:
    shown = table_of()
    for words in (
        "[/a]",
        r"b\x1b",
        "peft ([/why])",
        "base: [/base]",
        "texts of up to 23 tokens",
        "(1 units)",
        "[/reason]",
    ):
        assert words in shown
    source, target = (next(line for line in shown.splitlines() if side in line) for side in ("source", "target"))
    assert "by its own loader" in source
    assert "from what softbridge read" in target
    assert "one engine" not in shown
    assert "under the conditions" not in shown
    assert "one engine ran both sides: it shows that both files hold the same prompt, not that two toolkits agree" in (
        table_of(independent=False)
    )
    assert "under the conditions: positions, window\n" in table_of(conditions=("positions", "window"))


@pytest.mark.parametrize("notes", [5, "abc"])
def test_notes_that_are_none_are_refused_and_not_shown(notes: object, tmp_path: Path) -> None:
    """Whoever wrote such a file is told so: it is no defect of softbridge, and three letters are no three steps."""
    prompt = random_prefix(BaseModel(tiny_config("gpt2")).geometry)
    origin = Origin("peft")
    object.__setattr__(origin, "details", {"notes": notes})
    (tmp_path / "p.safetensors").write_bytes(pack(replace(prompt, origin=origin)))
    path = tmp_path / "p.safetensors"
    for words in (["convert", path, tmp_path / "out", "--to", "peft"], ["inspect", path]):
        result = call(*words)
        assert result.exit_code == 2, result.output
        assert f"notes: {notes!r}, not a list of texts" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
