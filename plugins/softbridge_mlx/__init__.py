"""mlx-lm: its prompt caches as files, and mlx-lm itself as a server."""

from __future__ import annotations

from softbridge.plugin.hookspecs import Format, hookimpl
from softbridge.plugin.serving import Server
from softbridge_mlx.format import FORMAT
from softbridge_mlx.server import SERVER


@hookimpl
def softbridge_formats() -> list[Format]:
    """Its prompt caches."""
    return [FORMAT]


@hookimpl
def softbridge_servers() -> list[Server]:
    """mlx-lm itself."""
    return [SERVER]
