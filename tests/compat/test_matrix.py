"""The version sets that the README promises are those that the Makefile installs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from softbridge.registry import engines
from softbridge_compat import versions

ROOT = Path(__file__).resolve().parent.parent.parent
STACKS = tomllib.loads((ROOT / "compat" / "matrix.toml").read_text())["stacks"]


def pins(stack: str) -> dict[str, str]:
    text = (ROOT / "compat" / STACKS[stack]["constraints"]).read_text()
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", text, re.MULTILINE))


def test_every_stack_pins_what_can_change_a_result() -> None:
    for stack, facts in STACKS.items():
        pinned = pins(stack)
        wanted = {"torch", "transformers", "numpy", "safetensors", "peft"} | ({"adapters"} & set(pinned))
        assert wanted <= set(pinned)
        assert pinned["torch"] == "2.13.0"
        assert ("adapters" in pinned) == ("adapterhub" in facts["extras"])


def test_the_makefile_builds_these_stacks() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^STACKS := (.*)$", text, re.MULTILINE).group(1).split() == list(STACKS)  # type: ignore[union-attr]
    for number, facts in zip((4, 5), STACKS.values(), strict=True):
        assert f"$(ENV{number})/ready: EXTRAS := {','.join(facts['extras'])}\n" in text


def test_this_environment_is_one_of_them_and_has_its_engines() -> None:
    here = versions()
    matching = [
        stack for stack in STACKS if all(here.get(name) == pins(stack)[name] for name in ("transformers", "peft"))
    ]
    assert len(matching) == 1, here
    usable = [name for name, engine in engines().items() if engine.unavailable() is None]
    assert usable == STACKS[matching[0]]["engines"]
    assert here["torch"].split("+")[0] == pins(matching[0])["torch"]
