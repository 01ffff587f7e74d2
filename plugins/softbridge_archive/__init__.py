"""Files of toolkits that are no longer developed: read, and written where that makes sense. One module each."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Format, hookimpl
from softbridge_archive.google import FORMAT


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """The formats of this plugin."""
    return [FORMAT]
