"""What follows from matrix.toml: an environment's constraints, the claims of other files, and a run on all stacks.

python compat/stacks.py constraints NAME    # the pins of a stack, for pip
python compat/stacks.py tests               # the files of tests that run on every stack
python compat/stacks.py write               # bring the files that state versions up to date
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
#: Distribution -> the name under which users know it. Of these the tested versions are claimed.
CLAIMED = {"transformers": "transformers", "torch": "torch", "peft": "PEFT", "adapters": "AdapterHub"}
#: How a line of a constraints file pins a version.
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)$", re.MULTILINE)


def matrix() -> dict[str, Any]:
    """The content of matrix.toml."""
    return tomllib.loads((ROOT / "compat" / "matrix.toml").read_text())


def stacks() -> dict[str, dict[str, Any]]:
    """Name -> facts of every stack, those of `make test` first."""
    found = matrix()
    return {**found["stacks"], **found["more"]}


def pins(name: str) -> dict[str, str]:
    """Distribution -> the version that a stack has of it."""
    facts = stacks()[name]
    if "constraints" in facts:
        return dict(_PIN.findall((ROOT / "compat" / facts["constraints"]).read_text()))
    return {**pins(facts["like"]), **facts["pins"]}


def tested(distribution: str) -> list[Version]:
    """The versions of a distribution that some stack has installed, rising."""
    found = {Version(version) for _, versions in _installed() for name, version in versions if name == distribution}
    return sorted(found)


def table() -> str:
    """The stacks as the README shows them."""
    whole = matrix()["stacks"]
    lines = [
        "| stack | " + " | ".join(CLAIMED.values()) + " | what runs on it |",
        "|---|" + "---|" * (len(CLAIMED) + 1),
    ]
    for name, found in _installed():
        versions = dict(found)
        cells = [versions.get(distribution, "") for distribution in CLAIMED]
        runs = "`make test`: everything" if name in whole else "`make test-stacks`: the contracts"
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {runs} |")
    return "\n".join(lines) + "\n"


def newest() -> str:
    """The module from which an installed softbridge knows which versions were tested."""
    lines = [f'    "{distribution}": "{tested(distribution)[-1]}",' for distribution in CLAIMED]
    return "\n".join(
        [
            '"""The newest versions that the tests ran with. Generated from matrix.toml by compat/stacks.py."""',
            "",
            "from __future__ import annotations",
            "",
            "#: Distribution -> version.",
            "NEWEST = {",
            *lines,
            "}",
            "",
        ]
    )


def claims() -> Iterator[tuple[Path, str]]:
    """(file, its content) of all that states versions, as they follow from the matrix."""
    yield ROOT / "compat" / "softbridge_compat" / "newest.py", newest()
    readme = ROOT / "README.md"
    # A function, so that nothing in the table is taken for a group.
    yield readme, re.sub(r"(?m)^\| stack \|.*\n(?:\|.*\n)+", lambda _: table(), readme.read_text())
    project = ROOT / "pyproject.toml"
    text = project.read_text()
    for distribution in CLAIMED:
        text = re.sub(rf'"{distribution}>=[^"]*"', f'"{distribution}>={tested(distribution)[0]}"', text)
    yield project, text


def _installed() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(stack, its versions) without those that a constraints file pins and the stack's extras do not bring."""
    for name, facts in stacks().items():
        without = set() if "adapterhub" in facts["extras"] else {"adapters"}
        yield name, [(one, version) for one, version in pins(name).items() if one not in without]


def _constraints(versions: Mapping[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in versions.items())


def main(arguments: list[str]) -> None:
    """See the module."""
    match arguments:
        case ["constraints", name]:
            print(_constraints(pins(name)), end="")
        case ["tests"]:
            print(*matrix()["contract"]["tests"])
        case ["write"]:
            for path, content in claims():
                path.write_text(content)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
