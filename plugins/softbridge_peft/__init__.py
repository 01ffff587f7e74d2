"""Soft prompts of Hugging Face PEFT: its files, and PEFT itself as an engine."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge_compat.defects import Defect
from softbridge_compat.peft_defects import DEFECTS
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


@hookimpl
def softbridge_defects() -> Sequence[Defect]:
    """Those of PEFT."""
    return DEFECTS
