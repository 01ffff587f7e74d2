"""Which formats and engines are installed. Those of this repository come in like a stranger's, by entry point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import pluggy

from softbridge.errors import EngineError, PluginError, UnknownFormatError
from softbridge.plugin import hookspecs
from softbridge.plugin.hookspecs import PROJECT, Engine, Format

Named = TypeVar("Named", bound=Any)


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
        raise PluginError(
            str(error), "the hooks softbridge_formats and softbridge_engines", "correct the name in that plugin"
        ) from error


def collect(plugins: pluggy.PluginManager, hook: str) -> dict[str, tuple[Any, str]]:
    """Name -> (value, plugin that brought it), for one hook, sorted by name.

    Raises:
        PluginError: a plugin's hook fails, or two plugins claim one name; they are named.
    """
    found: dict[str, tuple[Any, str]] = {}
    for implementation in getattr(plugins.hook, hook).get_hookimpls():
        owner = implementation.plugin_name
        try:
            values = [(str(value.name), value) for value in implementation.function()]
        except Exception as error:
            raise PluginError(
                f"{hook} of the plugin '{owner}' failed: {error!r}",
                "a list of things with a name; imports that may be missing belong below the hook",
                "update or uninstall the package that brings the plugin",
            ) from error
        for name, value in values:
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


def owners() -> Mapping[str, Mapping[str, str]]:
    """Hook -> (name -> the plugin that brought it)."""
    return {
        hook: {name: owner for name, (_, owner) in _collected(hook).items()}
        for hook in ("softbridge_formats", "softbridge_engines")
    }


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownFormatError: there is none.
    """
    return _named(
        name,
        formats(),
        lambda known: UnknownFormatError(
            f"no format is called '{name}'", f"one of {known}", "see 'softbridge formats'"
        ),
    )


def engine_named(name: str) -> Engine:
    """The engine of that name.

    Raises:
        EngineError: there is none, or it cannot be used in this environment.
    """
    engine: Engine = _named(
        name,
        engines(),
        lambda known: EngineError(f"no engine is called '{name}'", f"one of {known}", "see 'softbridge engines'"),
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
        raise error(", ".join(known) or "nothing (no plugin is installed)")
    return known[name]
