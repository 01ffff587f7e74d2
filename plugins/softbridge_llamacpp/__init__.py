"""Serving in llama.cpp: files of a sequence's state that hold a prefix, and llama.cpp itself to answer with them."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Format, hookimpl
from softbridge.plugin.serving import Server
from softbridge_llamacpp.format import FORMAT
from softbridge_llamacpp.server import SERVER


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """The format of this plugin."""
    return [FORMAT]


@hookimpl
def softbridge_servers() -> Sequence[Server]:
    """The server of this plugin."""
    return [SERVER]
