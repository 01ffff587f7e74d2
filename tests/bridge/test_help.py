"""Help: every command has two examples that parse, and says where a hub id may stand."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import typer.main
from rich.text import Text
from typer.testing import CliRunner

from softbridge.cli import app
from softbridge.cli.console import PROMPT

GROUP: Any = typer.main.get_command(app)
#: Arguments and options that take a prompt, and those that take the path of something else.
PROMPTS = {"a", "b", "against", "path", "paths", "source"}
OTHERS = {"directory", "manifests", "html", "output", "target", "texts"}
#: What `softbridge probe` recorded is no prompt, and what --from names is a format or an engine.
EXCEPT = {("compare", "a"), ("compare", "b"), ("explain", "source"), ("demo", "source")}


def examples_of(command: str) -> list[str]:
    heading, *lines = Text.from_markup(GROUP.commands[command].epilog).plain.split("\n\n")
    assert heading == "Examples:"
    return lines


@pytest.mark.parametrize("command", GROUP.commands)
def test_a_command_has_two_examples_that_parse(command: str) -> None:
    lines = examples_of(command)
    assert len(set(lines)) == 2
    for line in lines:
        program, name, *words = shlex.split(line)
        assert (program, name) == ("softbridge", command)
        with GROUP.make_context("softbridge", [name]) as group:
            GROUP.commands[name].make_context(name, words, parent=group)


def test_an_example_that_is_wrong_does_not_parse() -> None:
    for words, wrong in ((["a", "out/"], "MissingParameter"), (["a", "out/", "--to", "peft", "--fro"], "NoSuchOption")):
        with pytest.raises(Exception) as error:  # noqa: PT011  # click's own or, in later releases, typer's copy of it
            GROUP.commands["convert"].make_context("convert", words)
        assert error.type.__name__ == wrong


@pytest.mark.parametrize("command", GROUP.commands)
def test_examples_fit_into_eighty_columns_and_nothing_is_cut_off(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"}).stdout
    assert "…" not in shown
    for line in examples_of(command):
        assert f" {line}" in (one.rstrip() for one in shown.splitlines())


def test_hub_ids_are_mentioned_where_they_are_taken() -> None:
    seen = 0
    for command, made in GROUP.commands.items():
        for parameter in made.params:
            if parameter.name == "base":
                assert "a hub id (owner/name)" in parameter.help
                seen += 1
            elif parameter.name in PROMPTS and (command, parameter.name) not in EXCEPT:
                assert PROMPT in parameter.help, (command, parameter.name)
                seen += 1
            elif parameter.param_type_name == "argument":
                assert parameter.name in OTHERS or (command, parameter.name) in EXCEPT, (command, parameter.name)
    assert seen >= 17


def test_help_is_one_idea_in_a_sentence() -> None:
    seen = 0
    for command in (GROUP, *GROUP.commands.values()):
        told = [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]
        for text in filter(None, told):
            assert text[0].isupper()
            assert text[-1] in ".?"
            assert ";" not in text
            seen += 1
    assert seen > 80
