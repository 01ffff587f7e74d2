"""The model that a prompt is for."""

from __future__ import annotations

from softbridge.base.build import (
    Task,
    auto_class,
    build,
    draw_weights,
    fresh,
    has_classifier,
    shrink,
)
from softbridge.base.model import BaseModel

__all__ = [
    "BaseModel",
    "Task",
    "auto_class",
    "build",
    "draw_weights",
    "fresh",
    "has_classifier",
    "shrink",
]
