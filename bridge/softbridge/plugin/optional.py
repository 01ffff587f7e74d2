"""What a format or an engine can do besides what it must: asked here, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar, cast

from softbridge.plugin.hookspecs import Engine, Format

Extra = TypeVar("Extra")

#: The environment variable that switches self-checks off: 0, or false, no, off.
SWITCH = "SOFTBRIDGE_SELF_CHECK"


def able(value: Format | Engine, extra: Callable[..., Extra]) -> Extra | None:
    """The format or engine as one that follows an optional protocol, or None if it does not.

    Args:
        extra: one of `softbridge.plugin.hookspecs.FORMAT_EXTRAS` or `ENGINE_EXTRAS`. (The type is that of any class:
            ``type[Extra]`` would exclude protocols.)
    """
    return cast("Extra", value) if isinstance(value, cast("type", extra)) else None


def self_checks_wanted() -> bool:
    """Whether the environment leaves self-checks on."""
    return os.environ.get(SWITCH, "1").strip().lower() not in ("0", "false", "no", "off")
