"""What is claimed of versions is what the Makefile installs and the tests run on, and follows from one file."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from softbridge.plugin.registry import engines
from softbridge_compat import versions
from softbridge_compat.newest import NEWEST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent.parent
MATRIX = tomllib.loads((ROOT / "compat" / "matrix.toml").read_text())
STACKS, MORE = MATRIX["stacks"], MATRIX["more"]
MAKEFILE = (ROOT / "Makefile").read_text()
CLAIMED = ("transformers", "torch", "peft", "adapters")


def pins(stack: str) -> dict[str, str]:
    if stack in MORE:
        return {**pins(MORE[stack]["like"]), **MORE[stack]["pins"]}
    text = (ROOT / "compat" / STACKS[stack]["constraints"]).read_text()
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE))


def installed(stack: str) -> dict[str, str]:
    """What of the claimed distributions a stack has."""
    facts = {**STACKS, **MORE}[stack]
    return {name: pins(stack)[name] for name in CLAIMED if name != "adapters" or "adapterhub" in facts["extras"]}


def claimed_versions(name: str) -> list[Version]:
    return sorted({Version(found[name]) for stack in {**STACKS, **MORE} if name in (found := installed(stack))})


def script(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "compat" / "stacks.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_stack_pins_what_can_change_a_result() -> None:
    for stack, facts in STACKS.items():
        pinned = pins(stack)
        wanted = {"torch", "transformers", "numpy", "safetensors", "peft"} | ({"adapters"} & set(pinned))
        assert wanted <= set(pinned)
        assert pinned["torch"] == "2.13.0"
        assert ("adapters" in pinned) == ("adapterhub" in facts["extras"])
        heading = (ROOT / "compat" / facts["constraints"]).read_text().splitlines()[0]
        for name, version in installed(stack).items():
            assert name == "torch" or f"{name} {version}" in heading
    for facts in MORE.values():
        assert set(facts["pins"]) <= set(pins(facts["like"])), "a pin of what the stack has anyway"


def test_the_makefile_builds_these_stacks() -> None:
    def said(name: str) -> list[str]:
        found = re.search(rf"^{name} := (.*)$", MAKEFILE, re.MULTILINE)
        assert found is not None
        return found.group(1).split()

    assert said("STACKS") == list(STACKS)
    assert said("MORE") == list(MORE)
    for stack, facts in {**STACKS, **MORE}.items():
        told = re.search(rf"^\$\(ENV{stack[-1]}\)/ready: EXTRAS := (\S+)$", MAKEFILE, re.MULTILINE)
        extras = told.group(1).split(",") if told and stack in STACKS else said("EXTRAS")[0].split(",")
        assert extras == facts["extras"], stack


@pytest.mark.parametrize("stack", [*STACKS, *MORE])
def test_an_environment_is_given_the_pins_of_its_stack(stack: str) -> None:
    lines = script("constraints", stack).splitlines()
    assert dict(line.split("==") for line in lines) == pins(stack)
    assert len(lines) == len(pins(stack))


def test_the_tests_of_every_stack_are_there() -> None:
    found = script("tests").split()
    assert found == MATRIX["contract"]["tests"]
    assert all((ROOT / name).exists() for name in found)
    assert {"tests/plugins/test_contract.py", "tests/test_trainer.py", "tests/test_conversions.py"} <= set(found)


def test_the_lower_bounds_are_the_oldest_versions_that_were_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    asked = [Requirement(one) for one in named]
    bounds: dict[str, Any] = {one.name: one.specifier for one in asked if one.name in CLAIMED}
    assert {name: str(bound) for name, bound in bounds.items()} == {
        name: f">={claimed_versions(name)[0]}" for name in CLAIMED
    }


def test_the_newest_tested_versions_are_known_where_the_matrix_is_not() -> None:
    assert {name: Version(version) for name, version in NEWEST.items()} == {
        name: claimed_versions(name)[-1] for name in CLAIMED
    }


def test_the_table_in_the_readme_is_what_the_matrix_generates() -> None:
    sys.path.insert(0, str(ROOT / "compat"))
    try:
        import stacks
    finally:
        sys.path.pop(0)
    for path, content in stacks.claims():
        assert content == path.read_text(), "run 'python compat/stacks.py write'"
    readme = (ROOT / "README.md").read_text()
    assert stacks.table() in readme
    for stack in {**STACKS, **MORE}:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{stack}` |"))
        assert {cell.strip() for cell in row.split("|")} >= set(installed(stack).values())
        assert ("make test-stacks" in row) == (stack in MORE)


def test_this_environment_is_one_of_them_and_has_its_engines() -> None:
    here = versions()
    # Another build of a release, which its version names behind a plus, is the same release.
    claimed = {name: here[name].split("+")[0] for name in CLAIMED if name in here}
    matching = [stack for stack in {**STACKS, **MORE} if installed(stack) == claimed]
    assert len(matching) == 1, here
    usable = [name for name, engine in engines().items() if engine.unavailable() is None]
    assert usable == {**STACKS, **MORE}[matching[0]]["engines"]


def test_what_one_stack_leaves_out_the_other_runs() -> None:
    """And what a list names is there: make ignores the name of a file that is not."""
    lists = []
    for stack in ("4", "5"):
        match = re.search(rf"^ONCE{stack} := ((?:.*\\\n)*.*)$", MAKEFILE, re.MULTILINE)
        assert match is not None
        names = match[1].replace("\\\n", " ").split()
        found = {name: sorted(ROOT.glob(name)) for name in names}
        assert all(found.values()), [name for name, paths in found.items() if not paths]
        lists.append(set(chain.from_iterable(found.values())))
        other = {"4": "5", "5": "4"}[stack]
        assert f"$(ENV{other})/bin/python $(PYTEST) $(addprefix --ignore=,$(wildcard $(ONCE{stack})))" in MAKEFILE
    assert not lists[0] & lists[1]
