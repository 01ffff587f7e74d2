"""Manners of the command line: what goes where, how much is said, colours, completion, and leaving when interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import shellingham
import torch
import typer.main
from typer.testing import CliRunner, Result

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app, console, display
from softbridge.lowering.examples import METHODS
from softbridge.lowering.planner import CONDITIONS
from softbridge.plugin.registry import engines, formats
from softbridge.progress import stage, watching
from softbridge.testing import random_input_prompt, random_prefix, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("remembered_runs")
GROUP: Any = typer.main.get_command(app)


def call(*words: object, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env=environment)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a prompt and a base model's configuration, and nothing else in it or in the temporary folder."""
    config = tiny_config("llama")
    config.save_pretrained(tmp_path / "place" / "base")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "place" / "prefix", format="peft", base=config)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path


def left(place: Path) -> set[str]:
    """What lies where the command ran and in its temporary folder, where torch keeps a cache of its own."""
    found = {path.name for folder in ("place", "temporary") for path in (place / folder).iterdir()}
    return {name for name in found if not name.startswith("torchinductor_")}


CONVERT = ["convert", "prefix", "out", "--to", "adapterhub", "--base", "base", "--verify"]


# --- how much is said ------------------------------------------------------------------------------------------------


def test_every_command_can_be_quiet_or_verbose() -> None:
    for name, command in GROUP.commands.items():
        flags = {flag for parameter in command.params for flag in parameter.opts}
        assert {"-q", "--quiet", "-v", "--verbose"} <= flags, name
    assert {"-q", "-v"} <= {flag for parameter in GROUP.params for flag in parameter.opts}


@pytest.mark.parametrize("words", [["-q", *CONVERT], [*CONVERT, "--quiet"]], ids=["before", "after"])
def test_quiet_says_nothing_of_what_was_done(words: list[str], place: Path) -> None:
    done = call(*words)
    assert (done.exit_code, done.output) == (0, "")
    assert left(place) == {"prefix", "base", "out"}
    assert json.loads(call("-q", "formats", "--json").stdout) == json.loads(call("formats", "--json").stdout)
    assert call("-q", "formats").stdout == call("formats").stdout, "a list is what was asked for"
    again = call(*words)
    assert again.exit_code == 2
    assert again.stdout == ""
    assert "--overwrite" in again.stderr
    assert call("formats").stdout, "it does not outlive its command"


def test_verbose_says_how_long_each_stage_took(place: Path) -> None:
    words = ["convert", "prefix", "out", "--to", "softbridge", "--base", "base", "--json"]
    done = call(*words, "--verbose")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["written"]
    said = re.findall(r"^(.*): \d+\.\d\d s$", done.stderr, re.MULTILINE)
    assert said == ["reading the base model base", "reading prefix", "lowering", "writing out"]
    assert call(*words, "--overwrite").stderr == ""


def test_quiet_and_verbose_are_not_both() -> None:
    for words in (["-q", "-v", "formats"], ["formats", "-qv"]):
        done = call(*words)
        assert done.exit_code == 2
        assert "one of --quiet and --verbose" in done.stderr


def test_what_toolkits_print_never_reaches_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    for loudness, seen in {"quiet": "", "normal": "", "verbose": "printed by a toolkit\n"}.items():
        token = console._loudness.set(loudness)  # type: ignore[arg-type]
        with console.quiet():
            print("printed by a toolkit")
        console._loudness.reset(token)
        assert capsys.readouterr() == ("", seen)


# --- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("patience", "terminal_is", "shows"), [(0.0, "xterm", True), (60.0, "xterm", False), (0.0, "dumb", False)]
)
def test_a_line_says_what_is_done_on_a_terminal_after_a_while(
    patience: float, terminal_is: str, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(display, "PATIENCE", patience)
    monkeypatch.setenv("TERM", terminal_is)
    monkeypatch.setenv("COLUMNS", "80")
    with console.quiet(), stage("loading \x1b[31ma base"), stage("half of it"):
        until = time.monotonic() + 20
        while shows and "half of it" not in terminal.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert ("half of it" in terminal.getvalue()) == shows
    assert bool(terminal.getvalue()) == shows
    assert "\x1b[31ma base" not in terminal.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(display, "PATIENCE", 0.0)
    with console.quiet(), stage("loading"):
        time.sleep(0.1)
    assert stream.getvalue() == ""


def test_stages_within_stages_are_told_in_their_order() -> None:
    said: list[str] = []
    ended: list[str] = []
    with watching(said.append, lambda what, seconds: ended.append(what)):
        with stage("a"), stage("b"):
            pass
        with pytest.raises(ValueError, match="x"), stage("c"):
            raise ValueError("x")
    assert said == ["a", "b", "a", "c"]
    assert ended == ["b", "a", "c"]
    with stage("nobody listens"):
        pass


# --- colours ---------------------------------------------------------------------------------------------------------

COLOUR = re.compile(r"\x1b\[([0-9]+;)*(3[0-8]|4[0-8]|9[0-7])[;m]")


@pytest.mark.parametrize("words", [["inspect", "no/such/place/here"], ["verify", "--help"]], ids=" ".join)
def test_no_color_is_honoured(words: list[str]) -> None:
    """A subprocess: typer looks at the environment when it is imported."""
    code = "from softbridge.cli import main; main()"
    forced = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    forced.pop("NO_COLOR", None)
    for wanted, environment in ((True, forced), (False, {**forced, "NO_COLOR": "1"})):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
        assert bool(COLOUR.search(done.stdout + done.stderr)) == wanted


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_made(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CliRunner().invoke(app, [], env={"_SOFTBRIDGE_COMPLETE": f"source_{shell}"}, prog_name="softbridge")
    assert made.exit_code == 0
    assert "_SOFTBRIDGE_COMPLETE=complete_" + shell in made.stdout
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, shell))
    shown = CliRunner().invoke(app, ["--show-completion"], prog_name="softbridge")
    assert (shown.exit_code, shown.stdout.strip()) == (0, made.stdout.strip())


def test_a_shell_that_cannot_be_told_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fail)
    assert call("formats").exit_code == 0
    assert call("--help").exit_code == 0
    assert "--install-completion" in call("--help").stdout
    done = call("--show-completion")
    assert done.exit_code == 1
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("convert a b --to ", set(formats())),
        ("convert a b --to so", {"softbridge"}),
        ("convert a b --from pe", {"peft"}),
        ("convert a b --accept ", set(CONDITIONS)),
        ("convert a b --accept po", {"positions"}),
        ("demo --from ", set(engines())),
        ("verify a b --python ", {f"{name}=" for name in engines()}),
        ("explain --method pre", {name for name in METHODS if name.startswith("pre")}),
        ("explain --from goo", {name for name in formats() if name.startswith("goo")}),
        ("verify a b --level r", {"rounding"}),
        ("conv", {"convert"}),
    ],
)
def test_names_are_completed(typed: str, offered: set[str]) -> None:
    words = f"softbridge {typed}"
    environment = {
        "_SOFTBRIDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - (not words.endswith(" "))),
    }
    done = CliRunner().invoke(app, [], env=environment, prog_name="softbridge")
    assert done.exit_code == 0, done.output
    assert set(done.stdout.split()) == offered
    assert offered


# --- interruption ----------------------------------------------------------------------------------------------------


@contextmanager
def interrupted(moment: int) -> Iterator[list[str]]:
    """Send this process a SIGINT at the moment at which that many stages have begun or gone on."""
    said: list[str] = []

    def report(what: str) -> None:
        said.append(what)
        if len(said) == moment:
            signal.raise_signal(signal.SIGINT)

    with watching(report):
        yield said


def test_an_interruption_leaves_nothing_behind_at_whatever_stage(place: Path) -> None:
    before = left(place)
    with interrupted(10**6) as stages:
        assert call(*CONVERT, "--dry-run").exit_code == 0
    assert len(set(stages)) >= 6
    assert left(place) == before
    for moment in range(1, len(stages) + 1):
        with interrupted(moment) as said:
            done = call(*CONVERT)
        assert done.exit_code == 130, (said, done.output)
        assert done.output == "", said
        assert left(place) == before, said
    with interrupted(len(stages) + 1) as said:
        assert call(*CONVERT).exit_code == 130
    assert said[-1] == "writing out"
    assert left(place) == before


def test_what_is_there_stays_when_its_replacement_is_interrupted(place: Path) -> None:
    words = ["convert", "prefix", "out", "--to", "softbridge"]
    assert call(*words).exit_code == 0
    kept = (place / "place" / "out" / "prompt.safetensors").read_bytes()
    with interrupted(3) as said:
        done = call(*words[:4], "peft", "--overwrite")
    assert (done.exit_code, said[-1]) == (130, "writing out")
    assert left(place) == {"base", "prefix", "out"}
    assert (place / "place" / "out" / "prompt.safetensors").read_bytes() == kept


#: What a program has said when it is interrupted: while modules are imported or, in the long profile, at work.
MOMENTS: dict[str, tuple[list[str], str]] = {"importing": (["-X", "importtime"], " softbridge.errors")}
if os.environ.get("SOFTBRIDGE_PROFILE") == "long":
    for said in (
        "reading the base model base",
        "reading prefix",
        "measuring the base model's",
        "running prefix in peft",
    ):
        MOMENTS[said] = ([], said)


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
@pytest.mark.parametrize(("flags", "moment"), MOMENTS.values(), ids=list(MOMENTS))
def test_a_program_that_is_interrupted_ends_with_130_and_no_traceback(
    flags: list[str], moment: str, place: Path
) -> None:
    before = left(place)
    command = [sys.executable, *flags, "-m", "softbridge", "-v", *CONVERT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stderr is not None
        said = []
        for line in program.stderr:
            said.append(line)
            if moment in line:
                break
        program.send_signal(signal.SIGINT)
        out, more = program.communicate()
    text = "".join(said) + more
    # Python sends itself the signal, of which a shell says 130, too, where it interrupted the text of an exec.
    assert program.returncode in (130, -signal.SIGINT), text
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    assert out == ""
    assert left(place) == before


# --- replacing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["convert", "prefix", "out", "--to", "softbridge"], "out/prompt.safetensors"),
        (["bake", "vectors", "out", "--base", "base"], "out/model.safetensors"),
        (["probe", "prefix", "--base", "base", "--output", "out"], "out"),
        (["verify", "prefix", "prefix", "--base", "base", "--html", "out"], "out"),
        (["compare", "recording", "recording", "--html", "out"], "out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_nothing_is_replaced_unless_that_is_asked_for(words: list[str], written: str, place: Path) -> None:
    model = tiny_model("llama", torch.float32)
    model.save_pretrained("base")
    sb.save(random_input_prompt(BaseModel(model.config).geometry), "vectors", format="peft", base=model)
    if words[0] == "compare":
        assert call("probe", "prefix", "--base", "base", "--output", "recording").exit_code == 0
    theirs = Path(written)
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("somebody else's")
    if words[0] == "convert":
        assert "would delete prompt.safetensors" in call(*words, "--overwrite").stderr, "that is no prompt of ours"
        (theirs.parent / "softbridge.json").write_text("{}")
    refused = call(*words)
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert theirs.read_text() == "somebody else's"
    assert call(*words, "--overwrite").exit_code == 0
    assert b"somebody else's" not in theirs.read_bytes()
