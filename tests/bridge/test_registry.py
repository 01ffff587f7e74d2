"""Plugins come in by entry point; a misspelt hook, a name claimed twice and a value of another kind are errors."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pluggy
import pytest
from typer.testing import CliRunner

import softbridge as sb
from softbridge.cli.console import app
from softbridge.errors import EngineError, PluginError, UnknownFormatError
from softbridge.geometry import read_geometry
from softbridge.plugin import Capabilities, Defect, able, hookspecs, registry
from softbridge.plugin.hookspecs import ENGINE_EXTRAS, FORMAT_EXTRAS, PROJECT, Insertable, Listing, Loader, hookimpl
from softbridge.plugin.registry import check, collect, engine_named, engines, format_named, formats
from softbridge.testing import random_input_prompt, random_prefix, tiny_config

CORE = Path(sb.__file__).parent


def manager(*plugins: tuple[str, object]) -> pluggy.PluginManager:
    made = pluggy.PluginManager(PROJECT)
    made.add_hookspecs(hookspecs)
    for name, plugin in plugins:
        made.register(plugin, name)
    return made


class Form:
    """A format of nothing, or one in which something is other than it should be."""

    summary, engine, capabilities, encodings = "none", "native", Capabilities(), ("safetensors",)

    def __init__(self, name: str, **others: Any) -> None:
        self.name = name
        vars(self).update(others)

    def sniff(self, files: Any) -> bool:
        return False

    def read(self, files: Any, geometry: Any) -> Any:
        raise AssertionError("nothing is read")

    def obstacles(self, prompt: Any, geometry: Any) -> list[Any]:
        return []

    def write(self, prompt: Any, geometry: Any, encoding: str | None = None) -> dict[str, bytes]:
        return {}

    def advice(self, prompt: Any, geometry: Any, first: int = 0) -> list[str]:
        return []


class Machine:
    """An engine that runs nothing, or one in which something is other than it should be."""

    name, summary, capabilities = "strange", "none", Capabilities()

    def __init__(self, **others: Any) -> None:
        vars(self).update(others)

    def unavailable(self) -> str | None:
        return None

    def obstacles(self, prompt: Any, model: Any) -> list[Any]:
        return []

    def attach(self, model: Any, prompt: Any) -> Any:
        return model

    def extract(self, model: Any) -> Any:
        return None

    def detach(self, model: Any) -> Any:
        return model


class Brings:
    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def softbridge_formats(self) -> list[Form]:
        return [Form(name) for name in self.names]


class Fails:
    def __init__(self, values: object) -> None:
        self.values = values

    @hookimpl
    def softbridge_formats(self) -> object:
        if isinstance(self.values, Exception):
            raise self.values
        return self.values


class Misspelt:
    @hookimpl
    def softbridge_fromats(self) -> list[object]:
        return []


def test_values_are_collected_by_name() -> None:
    found = collect(manager(("one", Brings("b", "a")), ("two", Brings("c"))), "softbridge_formats")
    assert {name: owner for name, (_, owner) in found.items()} == {"a": "one", "b": "one", "c": "two"}
    assert list(found) == ["a", "b", "c"]


def test_a_name_claimed_twice_names_both_owners() -> None:
    with pytest.raises(PluginError, match=r"'a' is claimed by two plugins, '(one|two)' and '(one|two)'") as error:
        collect(manager(("one", Brings("a")), ("two", Brings("a"))), "softbridge_formats")
    assert "'one'" in str(error.value)
    assert "'two'" in str(error.value)


def test_one_plugin_cannot_claim_a_name_twice_either() -> None:
    with pytest.raises(PluginError, match="'a' is claimed by two plugins, 'one' and 'one'"):
        collect(manager(("one", Brings("a", "a"))), "softbridge_formats")


@pytest.mark.parametrize(
    "values",
    [ImportError("No module named 'toolkit'"), KeyError("x"), None, [object()]],
    ids=["import", "lookup", "nothing", "nameless"],
)
def test_a_hook_that_fails_is_an_error_that_names_the_plugin(values: object) -> None:
    with pytest.raises(PluginError, match="softbridge_formats of the plugin 'two' failed") as error:
        collect(manager(("one", Brings("a")), ("two", Fails(values))), "softbridge_formats")
    assert isinstance(error.value.__cause__, Exception)


def test_a_misspelt_hook_is_an_error() -> None:
    with pytest.raises(PluginError, match="softbridge_fromats"):
        check(manager(("one", Misspelt())))
    check(manager(("one", Brings("a"))))


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UnknownFormatError, match=r"no format is called 'onnx'(.|\n)*adapterhub, (.*, )?google, (.*, )?peft"
    ):
        format_named("onnx")
    with pytest.raises(EngineError, match=r"no engine is called 'vllm'(.|\n)*adapterhub, native, peft"):
        engine_named("vllm")


# --- what is declared ------------------------------------------------------------------------------------------------


class Strange:
    """A plugin with an engine, and whatever else it is given."""

    def __init__(self, *defects: object, engine: Any = None, form: Any = None) -> None:
        self.defects, self.engine, self.form = defects, engine or Machine(), form

    @hookimpl
    def softbridge_engines(self) -> list[Any]:
        return [self.engine]

    @hookimpl
    def softbridge_formats(self) -> list[Any]:
        return [] if self.form is None else [self.form]

    @hookimpl
    def softbridge_defects(self) -> tuple[object, ...]:
        return self.defects


@pytest.mark.parametrize(
    ("others", "fault"),
    [
        ({"sniff": None}, r"`sniff` cannot be called with \(files\)"),
        ({"write": lambda prompt: {}}, r"`write` cannot be called with \(prompt, geometry, encoding\)"),
        ({"encodings": "npy"}, "`encodings` is 'npy', not a sequence of texts"),
        ({"capabilities": {}}, "`capabilities` is {}, not Capabilities"),
        ({"files": "soft_prompt.bin"}, "`files` is 'soft_prompt.bin', not a sequence of texts"),
        ({"training_files": [1]}, r"`training_files` is \[1\], not a sequence of texts"),
    ],
    ids=lambda given: "" if isinstance(given, str) else "".join(given),
)
def test_a_format_that_is_not_as_declared_is_refused(others: dict[str, Any], fault: str) -> None:
    with pytest.raises(PluginError, match=rf"'odd', which softbridge_formats of the plugin 'two' (.|\n)*{fault}"):
        collect(manager(("two", Strange(form=Form("odd", **others)))), "softbridge_formats")


@pytest.mark.parametrize(
    ("others", "fault"),
    [
        ({"summary": 3}, "`summary` is 3, not str"),
        ({"attach": lambda model: model}, r"`attach` cannot be called with \(model, prompt\)"),
        ({"load": lambda model, prompt: model}, r"`load` cannot be called with \(model, prompt, directory\)"),
        ({"insert": True}, r"`insert` cannot be called with \(model, prompt\)"),
        ({"attach_bank": lambda model, bank: model}, r"`attach_bank` cannot be called with \(model, bank, fetch\)"),
        ({"generate_fault": lambda prompt: None}, r"`generate_fault` cannot be called with \(prompt, geometry\)"),
        ({"check_itself": lambda: None}, r"`check_itself` cannot be called with \(model\)"),
        (
            {"train_example": lambda model, method, directory, length: None},
            r"`train_example` cannot be called with \(model, method, directory, length, steps, seed\)",
        ),
    ],
    ids=lambda given: "" if isinstance(given, str) else "".join(given),
)
def test_an_engine_that_is_not_as_declared_is_refused(others: dict[str, Any], fault: str) -> None:
    with pytest.raises(PluginError, match=rf"softbridge_engines of the plugin 'two' (.|\n)*{fault}"):
        collect(manager(("two", Strange(engine=Machine(**others)))), "softbridge_engines")


def test_an_attribute_that_fails_is_a_fault_of_the_plugin() -> None:
    class Failing(Machine):
        @property
        def load(self) -> Any:
            raise ImportError("No module named 'toolkit'")

    with pytest.raises(PluginError, match="softbridge_engines of the plugin 'two' failed: ImportError"):
        collect(manager(("two", Strange(engine=Failing()))), "softbridge_engines")


def test_all_that_is_wrong_is_said_at_once() -> None:
    class Half:
        name, summary = "half", "an engine without most of what it needs"

    with pytest.raises(PluginError) as error:
        collect(manager(("two", Strange(engine=Half()))), "softbridge_engines")
    for name in ("capabilities", "unavailable", "obstacles", "attach", "extract", "detach"):
        assert f"it has no `{name}`" in str(error.value)
    assert "`load`" not in str(error.value), "an optional attribute may be missing"


def test_what_is_optional_is_there_or_not() -> None:
    form = Form("odd", files=["a.bin"])
    assert able(form, Listing) is form
    assert able(Form("odd"), Listing) is None
    assert able(engines()["native"], Insertable) is engines()["native"]
    assert able(engines()["native"], Loader) is None
    assert able(engines()["peft"], Loader) is not None
    assert able(formats()["peft"], Listing) is not None


def test_optional_attributes_are_asked_for_in_one_place() -> None:
    extras = (*FORMAT_EXTRAS, *ENGINE_EXTRAS)
    protocols = {name for name, value in vars(hookspecs).items() if getattr(value, "_is_protocol", False)}
    assert {extra.__name__ for extra in extras} == protocols - {"Format", "Engine", "Server", "Protocol"}
    members = {name for extra in extras for name in vars(extra) if not name.startswith("_")}
    assert {"files", "training_files", "load", "insert", "attach_bank", "train_example"} <= members
    asked = []
    for path in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name("hasattr" | "getattr"), args=[_, ast.Constant(name), *_]):
                    asked += [f"{path.name}: {name}"] if name in members else []
                case ast.Call(func=ast.Name("isinstance"), args=[_, kinds]):
                    named = {one.id for one in ast.walk(kinds) if isinstance(one, ast.Name)}
                    asked += [f"{path.name}: {name}" for name in named & protocols]
    assert asked == []


# --- known defects ---------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Puts a plugin beside the installed ones."""

    def register(plugin: object) -> None:
        made = manager(("stranger", plugin))
        made.load_setuptools_entrypoints(PROJECT)
        monkeypatch.setattr(registry, "manager", lambda: made)
        registry._collected.cache_clear()

    yield register
    registry._collected.cache_clear()


def defect(id: str, **others: Any) -> Defect:
    made = Defect(id, "odd-toolkit", "strange", f"what {id} does", lambda: True)
    return replace(made, **others)


def doctor(*arguments: object) -> set[str]:
    """The ids of the stranger's defects that are shown."""
    result = CliRunner().invoke(app, ["doctor", "--json", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    found = {one["id"]: one for one in json.loads(result.stdout)["defects"]}
    shown = CliRunner().invoke(app, ["doctor", *map(str, arguments)]).stdout
    for name, one in found.items():
        assert name in shown
        assert one["toolkit"] == "odd-toolkit" or not name.startswith("odd-")
    assert ("odd-" in shown) == any(name.startswith("odd-") for name in found)
    return {name for name in found if name.startswith("odd-")}


def test_a_strangers_defects_show_where_they_apply(beside: Callable[[object], None], tmp_path: Path) -> None:
    config = tiny_config("llama")
    geometry = read_geometry(config)
    sb.save(random_input_prompt(geometry), tmp_path / "vectors", format="peft", base=config)
    sb.save(random_prefix(geometry), tmp_path / "prefix", format="peft", base=config)
    config.save_pretrained(tmp_path / "base")
    assert doctor() == set()
    strange = (
        defect("odd-always"),
        defect("odd-mended", applies=lambda: False),
        defect("odd-vectors", concerns=lambda prompt, geometry: bool(prompt.inputs)),
        defect("odd-bert", concerns=lambda prompt, geometry: geometry is None or geometry.model_type == "bert"),
    )
    beside(Strange(*strange))
    assert doctor() == {"odd-always", "odd-vectors", "odd-bert"}
    assert doctor(tmp_path / "vectors", "--base", tmp_path / "base") == {"odd-always", "odd-vectors"}
    assert doctor(tmp_path / "prefix") == {"odd-always", "odd-bert"}, "the base may be a BERT"
    assert "odd-mended" in registry.owners()["softbridge_defects"]
    beside(Strange(*strange, engine=Machine(unavailable=lambda: "not installed")))
    assert doctor() == set(), "nobody meets them here"


def test_the_defects_of_the_toolkits_come_from_their_plugins() -> None:
    owners = registry.owners()["softbridge_defects"]
    assert {name.split("-")[0] for name in owners} == {"adapterhub", "peft"}
    for name, found in registry.defects().items():
        assert name.split("-")[0] == owners[name] == found.engine


def fail(*arguments: object) -> bool:
    raise KeyError("a fault of the stranger's own")


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ([object()], "softbridge_defects of the plugin 'stranger' failed"),
        ([Form("odd", id="odd")], "it is .*, no `softbridge.plugin.Defect`"),
        ([defect("")], "`id` is '', not a text"),
        ([defect("odd", summary=None)], "`summary` is None, not a text"),
        ([defect("odd", applies=True)], "`applies` cannot be called with 0 arguments"),
        ([defect("odd", concerns=lambda prompt: True)], "`concerns` cannot be called with 2 arguments"),
        ([defect("odd", engine="starnge")], "'odd' of the plugin 'stranger' is of the engine 'starnge'"),
        ([defect("odd", applies=fail)], "'odd' of the plugin 'stranger' cannot say whether it applies: KeyError"),
        ([defect("peft-static-cache")], "'peft-static-cache' is claimed by two plugins"),
    ],
    ids=["nameless", "another", "empty", "untold", "fixed", "one-argument", "misspelt", "failing", "claimed"],
)
def test_a_broken_defect_is_refused(beside: Callable[[object], None], broken: list[Any], found: str) -> None:
    beside(Strange(*broken))
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 2, result.output
    refused = json.loads(result.stdout)["refused"]
    assert refused["kind"] == "PluginError"
    assert re.search(found, refused["found"]), refused["found"]


def test_a_defect_that_fails_on_a_prompt_is_refused(beside: Callable[[object], None], tmp_path: Path) -> None:
    config = tiny_config("llama")
    sb.save(random_prefix(read_geometry(config)), tmp_path / "prefix", format="peft", base=config)
    beside(Strange(defect("odd", concerns=fail)))
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "prefix")])
    assert result.exit_code == 2
    assert "cannot say whether it applies" in " ".join(result.stderr.split())


def test_the_demo_needs_an_engine_that_trains(beside: Callable[[object], None]) -> None:
    beside(Strange())
    result = CliRunner().invoke(app, ["demo", "--from", "strange", "--json"])
    assert result.exit_code == 2
    refused = json.loads(result.stdout)["refused"]
    assert refused["found"] == "the engine 'strange' has no training of its own"
    assert refused["expected"] == "one of adapterhub, native, peft"
