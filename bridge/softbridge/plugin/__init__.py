"""What a plugin brings, how it is found, and what it may say that it can do."""

from __future__ import annotations

from softbridge.plugin.capabilities import EVERYTHING, UP_TO_FLOAT32, Capabilities
from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge.plugin.optional import able
from softbridge.plugin.prompt_bank import Entry, PromptBank
from softbridge_compat.defects import Defect

__all__ = [
    "EVERYTHING",
    "UP_TO_FLOAT32",
    "Capabilities",
    "Defect",
    "Engine",
    "Entry",
    "Format",
    "PromptBank",
    "able",
    "hookimpl",
]
