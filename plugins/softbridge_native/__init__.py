"""The native engine, which is softbridge's own way to run a prompt, and softbridge's own file format."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Engine, Format, hookimpl


@hookimpl
def softbridge_engines() -> Sequence[Engine]:
    """Return the native engine."""
    from softbridge_native.engine import ENGINE

    return [ENGINE]


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """Return the format ``softbridge``."""
    from softbridge_native.format import FORMAT

    return [FORMAT]
