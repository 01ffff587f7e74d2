"""Tables on a narrow terminal: no word is broken, whatever the width, and nothing is left out."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

import softbridge as sb
from softbridge.base import BaseModel
from softbridge.cli import app
from softbridge.cli.grid import Grid
from softbridge.lowering import matrix
from softbridge.lowering.examples import METHODS
from softbridge.lowering.matrix import rows
from softbridge.plugin.registry import defects, engines, formats, owners, servers
from softbridge.testing import random_prefix, tiny_config

#: Made once: it is the same at every width.
MATRIX = cache(matrix.matrix)


def words(arguments: list[str], width: int, terminal: bool = False) -> set[str]:
    """What is printed, word by word; no line is wider."""
    environment = {"COLUMNS": str(width), "NO_COLOR": "1", **({"FORCE_COLOR": "1"} if terminal else {})}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 0, done.output
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert all(len(line) <= width for line in plain.splitlines())
    return set(re.sub("─+", " ", plain).split())


@pytest.fixture
def peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(BaseModel(config).geometry), tmp_path / "prefix", format="peft", base=config)
    monkeypatch.setattr(matrix, "matrix", MATRIX)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["formats"], {*formats()}),
        (["engines"], {*engines(), *servers()}),
        (["plugins"], {name for brought in owners().values() for name in brought}),
        (["doctor"], {*engines(), *(name for name, one in defects().items() if one.applies())}),
        (["inspect", "prefix"], {"peft", "adapter_config.json", "adapter_model.safetensors", "key/value"}),
        (["matrix"], {*METHODS, *rows()}),
        (
            ["explain", "--from", "peft", "--to", "adapterhub", "--method", "context-aware-prompt-tuning"],
            {"context-aware-prompt-tuning", "(gpt2)", "(llama)"},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_name_is_broken(arguments: list[str], names: set[str], width: int, peft: None) -> None:
    terminal = arguments == ["matrix"]  # elsewhere it is Markdown
    narrow, wide = (words(arguments, columns, terminal) for columns in (width, 1000))
    assert {name.strip(",") for name in narrow} >= names
    assert narrow - {"-"} == wide - {"-"}, "an empty cell is left out of a list"


def rendered(grid: Grid, width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()


def test_a_table_is_a_table_while_its_columns_fit_and_lists_below() -> None:
    sentence = "a sentence that is longer than forty columns, of which it wants most"
    grid = Grid(Text("name"), Text("what"), Text("more"))
    grid.add_row(Text("a" * 20), Text(sentence), Text("-"))
    grid.add_row(Text("b"), Text("short"), Text("there"))
    side_by_side = 20 + 24 + 5 + 8
    table = rendered(grid, side_by_side)
    assert "─" in table
    assert "a" * 20 in table
    lists = rendered(grid, side_by_side - 1)
    assert "─" not in lists
    assert [line.rstrip() for line in lists.splitlines()] == [
        "name",
        "a" * 20,
        "    what  a sentence that is longer than forty columns,",
        "          of which it wants most",
        "b",
        "    what  short",
        "    more  there",
    ]
    assert rendered(grid, 200).count("\n") == 6, "a row is a line where there is room"
