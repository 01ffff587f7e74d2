"""The README's specification, table and commands are those of the code."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import typer.main

from softbridge import container
from softbridge.cli import app
from softbridge.registry import engines, formats
from softbridge.verification import Certificate

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_container_format_is_specified_in_the_words_of_its_module() -> None:
    specification = inspect.cleandoc(container.__doc__ or "").split("\n", 2)[2]
    assert section("The container format").strip() == specification.strip()
    assert len(specification.splitlines()) < 50, "under a page"


def test_every_command_format_and_engine_is_named() -> None:
    group = typer.main.get_command(app)
    for command in group.commands:  # type: ignore[attr-defined]
        assert f"softbridge {command}" in README
    for name in formats():
        assert f"| `{name}` |" in section("What is the same, and what is not")
    for name in engines():
        assert f"| `{name}` |" in section("Engines")


def test_every_field_of_the_certificate_is_documented() -> None:
    text = section("The certificate")
    for field in fields(Certificate):
        assert f"`{field.name}`" in text, field.name


def test_the_stacks_are_the_ones_that_are_built() -> None:
    for stack in ("transformers4", "transformers5"):
        pins = (Path(__file__).resolve().parent.parent / "compat" / f"{stack}.txt").read_text()
        version = re.search(r"^transformers==(.*)$", pins, re.MULTILINE)
        assert version is not None
        assert f"transformers {version.group(1)}" in section("Develop")


def test_the_example_of_methods_and_tools_runs() -> None:
    import torch

    from softbridge.base import BaseModel
    from softbridge.testing import tiny_model

    model = tiny_model("llama", torch.float32)
    given = {"model": model, "geometry": BaseModel.resolve(model).geometry, "token_ids": list(range(5, 25))}
    code = section("Methods, starts and tools").split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), given)
    assert given["a"].training is not None
    assert given["b"].parts[0].length == 20
