"""Plugins come in by entry point; a misspelt hook and a name claimed twice are errors."""

from __future__ import annotations

from types import SimpleNamespace

import pluggy
import pytest

from softbridge.errors import EngineError, PluginError, UnknownFormatError
from softbridge.plugin import hookspecs
from softbridge.plugin.hookspecs import PROJECT, hookimpl
from softbridge.plugin.registry import check, collect, engine_named, format_named


def manager(*plugins: tuple[str, object]) -> pluggy.PluginManager:
    made = pluggy.PluginManager(PROJECT)
    made.add_hookspecs(hookspecs)
    for name, plugin in plugins:
        made.register(plugin, name)
    return made


class Brings:
    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def softbridge_formats(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.names]


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
    with pytest.raises(UnknownFormatError, match=r"no format is called 'onnx'(.|\n)*adapterhub, google, peft"):
        format_named("onnx")
    with pytest.raises(EngineError, match=r"no engine is called 'vllm'(.|\n)*adapterhub, native, peft"):
        engine_named("vllm")
