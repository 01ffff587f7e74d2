"""What a plugin brings, how it is found, and what it may say that it can do."""

from __future__ import annotations

from softbridge.plugin.capabilities import EVERYTHING, UP_TO_FLOAT32, Capabilities
from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge.plugin.prompt_bank import Entry, PromptBank

__all__ = ["EVERYTHING", "UP_TO_FLOAT32", "Capabilities", "Engine", "Entry", "Format", "PromptBank", "hookimpl"]
