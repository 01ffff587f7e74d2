"""Which formats and engines are installed. Those of this repository come in like a stranger's, by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import pluggy

from softbridge.errors import EngineError, PluginError, UnknownFormatError, one_of
from softbridge.plugin import hookspecs
from softbridge.plugin.declared import faults
from softbridge.plugin.hookspecs import PROJECT, Engine, Format
from softbridge.plugin.serving import Server
from softbridge_compat.defects import Defect

Named = TypeVar("Named", bound=Any)

#: Hook -> the attribute by which its values are called.
HOOKS = {
    "softbridge_formats": "name",
    "softbridge_engines": "name",
    "softbridge_servers": "name",
    "softbridge_defects": "id",
}


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager with every installed plugin loaded.

    Raises:
        PluginError: a plugin cannot be imported, or implements a hook that does not exist.
    """
    plugins = pluggy.PluginManager(PROJECT)
    plugins.add_hookspecs(hookspecs)
    try:
        plugins.load_setuptools_entrypoints(PROJECT)
    except Exception as error:
        raise PluginError(
            f"a plugin in the entry-point group '{PROJECT}' cannot be loaded: {error!r}",
            "a module whose top level imports nothing that may be missing",
            "update or uninstall the package that brings it",
        ) from error
    check(plugins)
    return plugins


def check(plugins: pluggy.PluginManager) -> None:
    """Turn a misspelt hook into an error."""
    try:
        plugins.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error), f"the hooks {', '.join(HOOKS)}", "correct the name in that plugin") from error


def collect(plugins: pluggy.PluginManager, hook: str) -> dict[str, tuple[Any, str]]:
    """Name -> (value, plugin that brought it), for one hook, sorted by name.

    Raises:
        PluginError: a plugin's hook fails, a value is not what its protocol says, or two plugins claim one name; they
            are named.
    """
    found: dict[str, tuple[Any, str]] = {}
    for implementation in getattr(plugins.hook, hook).get_hookimpls():
        owner = implementation.plugin_name
        try:
            values = [
                (str(getattr(value, HOOKS[hook])), value, faults(hook, value)) for value in implementation.function()
            ]
        except Exception as error:
            raise PluginError(
                f"{hook} of the plugin '{owner}' failed: {error!r}",
                "a list of things with a name; imports that may be missing belong below the hook",
                "update or uninstall the package that brings the plugin",
            ) from error
        for name, value, wrong in values:
            if wrong:
                raise PluginError(
                    f"'{name}', which {hook} of the plugin '{owner}' returns, is not what it should be: "
                    f"{'; '.join(wrong)}",
                    "what softbridge.plugin.hookspecs says",
                    "update or uninstall the package that brings the plugin",
                )
            if name in found:
                raise PluginError(
                    f"the name '{name}' is claimed by two plugins, '{found[name][1]}' and '{owner}'",
                    f"one owner for each name that {hook} returns",
                    "uninstall one of the two",
                )
            found[name] = (value, owner)
    return dict(sorted(found.items()))


@cache
def _collected(hook: str) -> dict[str, tuple[Any, str]]:
    return collect(manager(), hook)


def formats() -> Mapping[str, Format]:
    """Every installed format, by name."""
    return {name: value for name, (value, _) in _collected("softbridge_formats").items()}


def engines() -> Mapping[str, Engine]:
    """Every installed engine, by name, whether or not its toolkit is installed too."""
    return {name: value for name, (value, _) in _collected("softbridge_engines").items()}


def servers() -> Mapping[str, Server]:
    """Every installed server, by name, whether or not it can be used here."""
    return {name: value for name, (value, _) in _collected("softbridge_servers").items()}


def defects() -> Mapping[str, Defect]:
    """Every defect that a plugin knows of, by id, whether or not it applies here.

    Raises:
        PluginError: a defect is of an engine that no plugin brings; it would never be told.
    """
    found = _collected("softbridge_defects")
    for defect, owner in found.values():
        if defect.engine not in engines():
            raise PluginError(
                f"the defect '{defect.id}' of the plugin '{owner}' is of the engine '{defect.engine}'",
                f"one of {', '.join(engines())}",
                "update or uninstall the package that brings the plugin",
            )
    return {name: defect for name, (defect, _) in found.items()}


def owners() -> Mapping[str, Mapping[str, str]]:
    """Hook -> (name -> the plugin that brought it)."""
    return {hook: {name: owner for name, (_, owner) in _collected(hook).items()} for hook in HOOKS}


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownFormatError: no installed plugin brings a format of that name.
    """
    return _named(
        name,
        formats(),
        lambda known: UnknownFormatError(f"no format is called '{name}'", known, "see 'softbridge formats'"),
    )


def engine_named(name: str) -> Engine:
    """The engine of that name.

    Raises:
        EngineError: no installed plugin brings an engine of that name, or it cannot be used in this environment.
    """
    engine: Engine = _named(
        name,
        engines(),
        lambda known: EngineError(f"no engine is called '{name}'", known, "see 'softbridge engines'"),
    )
    reason = engine.unavailable()
    if reason is not None:
        raise EngineError(
            f"engine '{name}' cannot be used here: {reason}",
            "an environment that holds its toolkit",
            "install the extra that brings it",
        )
    return engine


def _named(name: str, known: Mapping[str, Named], error: Callable[[str], Exception]) -> Named:
    if name not in known:
        raise error(one_of(known, name) if known else "a plugin that brings one: none is installed")
    return known[name]
