"""What is installed, what importing it costs, and that nothing of the house's rooms leaks out."""

from __future__ import annotations

import ast
import configparser
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import softbridge as sb
import softbridge_archive
from softbridge.plugin.registry import engines, formats, owners, servers

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "peft", "adapters", "mlx", "mlx_lm", "vllm")


#: Bytes. What comes near has files in it that nobody needs.
MOST_IN_WHEEL, MOST_IN_SDIST = 1_000_000, 5_000_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def sources() -> set[str]:
    """The files of the packages, as a wheel has them."""
    packages = [ROOT / "bridge" / "softbridge", ROOT / "compat" / "softbridge_compat"]
    packages += [path for path in (ROOT / "plugins").glob("softbridge_*") if path.is_dir()]
    files = (path for package in packages for path in package.rglob("*") if path.is_file())
    return {str(Path(*path.relative_to(ROOT).parts[1:])) for path in files if "__pycache__" not in path.parts}


def test_the_source_distribution_is_whole_and_small(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    for name in ("README.md", "LICENSE", "Makefile", "pyproject.toml", "compat/transformers5.txt", "tests/README.md"):
        assert name in names
    assert all(str(path.relative_to(ROOT)) in names for path in (ROOT / "tests").rglob("*.py"))
    assert not {name.split("/")[0] for name in names} & {".envs", "dist", "build", ".git", ".mypy_cache", "shared"}
    assert built[0].stat().st_size < MOST_IN_SDIST


def test_the_wheel_holds_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    wheel = built[1]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
        entries = next(archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert wheel.stat().st_size < MOST_IN_WHEEL
    assert {name for name in names if ".dist-info/" not in name} == sources()
    assert len(names) == len(set(names)) == len(sources()) + 5, "and METADATA, WHEEL, RECORD, LICENSE, entry_points.txt"
    top = {name.split("/")[0] for name in names}
    packages = {name for name in top if not name.endswith(".dist-info")}
    assert packages == {
        "softbridge",
        "softbridge_adapterhub",
        "softbridge_archive",
        "softbridge_compat",
        "softbridge_llamacpp",
        "softbridge_mlx",
        "softbridge_native",
        "softbridge_peft",
        "softbridge_vllm",
    }
    assert len(top) == len(packages) + 1
    assert not any(name.endswith(".md") for name in names), "the READMEs stay where their links lead"
    assert {name.removesuffix("/py.typed") for name in names if name.endswith("py.typed")} == packages
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    listed = configparser.ConfigParser()
    listed.read_string(entries)
    assert dict(listed["console_scripts"]) == {"softbridge": "softbridge.__main__:main"}
    plugins = packages - {"softbridge", "softbridge_compat"}
    assert dict(listed["softbridge"]) == {name.removeprefix("softbridge_"): name for name in plugins}


def test_the_version_is_stated_once(built: tuple[Path, Path]) -> None:
    """And the change log has an entry for it."""
    version = built[1].name.split("-")[1]
    assert built[0].name == f"softbridge-{version}.tar.gz"
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("arguments", [["--help"], ["formats"], ["engines"], ["plugins"]], ids=" ".join)
def test_listing_imports_no_framework_and_no_toolkit(arguments: list[str]) -> None:
    assert heavy_after(f"from softbridge.cli import app; app({arguments!r}, standalone_mode=False)") == []


def test_help_imports_the_command_line_alone() -> None:
    """What it lists stands apart from all that it names, so that nobody waits for help."""
    run = "from softbridge.cli import app; app(['--help'], standalone_mode=False)"
    report = "import sys, json; print(json.dumps([name for name in sys.modules if name.startswith('softbridge')]))"
    done = subprocess.run([sys.executable, "-c", f"{run}\n{report}"], capture_output=True, text=True, check=True)
    ours = {name for name in json.loads(done.stdout.splitlines()[-1]) if not name.startswith("softbridge.cli")}
    light = {"softbridge.choices", "softbridge.errors", "softbridge.geometry", "softbridge_compat"}
    assert ours == {"softbridge", *light}
    assert loaded_after(run, ("numpy", "safetensors", "rich")) == ["rich"]


def test_inspecting_a_safetensors_file_imports_no_framework() -> None:
    golden = Path(__file__).parent / "golden" / "container_v1.safetensors"
    run = f"from softbridge.cli import app; app(['inspect', {str(golden)!r}], standalone_mode=False)"
    assert heavy_after(run) == []


def test_importing_the_package_imports_next_to_nothing() -> None:
    assert heavy_after("import softbridge") == []


def test_looking_at_the_public_face_imports_no_framework() -> None:
    whole = "import softbridge as sb; sb.methods, sb.initialisation, sb.tools, sb.parts, sb.explain, sb.inspect"
    assert heavy_after(whole) == []


def test_the_public_face_is_what_type_checkers_see() -> None:
    source = (ROOT / "bridge" / "softbridge" / "__init__.py").read_text()
    seen: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softbridge"):
            for one in node.names:
                assert one.asname == one.name, "a type checker takes the name for a private one"
                seen[one.name] = (node.module or "", one.name)
    assert set(seen) == set(sb.__all__) == set(dir(sb))
    for name, (module, attribute) in seen.items():
        home = import_module(f"{module}.{attribute}" if module == "softbridge" else module)
        assert getattr(sb, name) is (home if module == "softbridge" else getattr(home, attribute)), name
    assert {"methods", "initialisation", "tools", "parts", "explain", "inspect", "reference"} <= set(seen)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sb.nothing


def test_no_module_imports_itself_in_a_circle() -> None:
    """Counted are imports inside functions, and those for type checkers alone, too; not the lazy public face."""
    modules: dict[str, Path] = {}
    for room in ("bridge", "plugins", "compat"):
        for path in (ROOT / room).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT / room).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = path
    del modules["softbridge"]
    imported: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                whole = {f"{node.module}.{one.name}" for one in node.names}
                names |= whole & modules.keys() or {node.module or ""}
            elif isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
        imported[module] = names & modules.keys()
    assert "softbridge.plugin.hookspecs" in imported["softbridge.plugin.registry"]
    tuple(TopologicalSorter(imported).static_order())  # a CycleError names the circle


def heavy_after(code: str) -> list[str]:
    """Which heavy modules a fresh interpreter has loaded after running `code`."""
    return loaded_after(code, HEAVY)


def loaded_after(code: str, names: Sequence[str]) -> list[str]:
    """Which of these modules a fresh interpreter has loaded after running `code`."""
    report = f"import sys, json; print(json.dumps([name for name in {tuple(names)!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_the_guard_sees_a_heavy_import() -> None:
    assert heavy_after("import torch") == ["torch"]


def test_what_is_installed_comes_in_by_entry_point() -> None:
    archived = {form.name for form in softbridge_archive.FORMATS}
    assert set(formats()) == {"adapterhub", "llamacpp", "mlx", "peft", "softbridge", "vllm", *archived}
    assert set(engines()) == {"adapterhub", "native", "peft"}
    assert set(servers()) == {"llamacpp", "mlx", "vllm"}
    assert owners()["softbridge_formats"]["google"] == "archive"
