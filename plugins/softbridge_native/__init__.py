"""The native engine, which is softbridge's own way to run a prompt, and softbridge's own file format."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge_native.engine import ENGINE
from softbridge_native.format import FORMAT


@hookimpl
def softbridge_engines() -> Sequence[Engine]:
    """Return the native engine."""
    return [ENGINE]


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """Return the format ``softbridge``."""
    return [FORMAT]
