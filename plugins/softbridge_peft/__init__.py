"""Soft prompts of Hugging Face PEFT: its files, and PEFT itself as an engine."""

from __future__ import annotations

from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge_peft.engine import ENGINE
from softbridge_peft.format import FORMAT


@hookimpl
def softbridge_formats() -> list[Format]:
    """All that PEFT counts as prompt learning."""
    return [FORMAT]


@hookimpl
def softbridge_engines() -> list[Engine]:
    """PEFT itself."""
    return [ENGINE]
