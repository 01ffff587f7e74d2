"""AdapterHub (https://adapterhub.ml, package `adapters`): its files, and an engine that drives the toolkit itself."""

from __future__ import annotations

from collections.abc import Sequence

from softbridge.plugin.hookspecs import Engine, Format, hookimpl
from softbridge_adapterhub.engine import ENGINE
from softbridge_adapterhub.format import FORMAT
from softbridge_compat.adapterhub_defects import DEFECTS
from softbridge_compat.defects import Defect


@hookimpl
def softbridge_formats() -> Sequence[Format]:
    """One format: a directory as `save_adapter` writes it."""
    return [FORMAT]


@hookimpl
def softbridge_engines() -> Sequence[Engine]:
    """One engine: the toolkit, unmodified."""
    return [ENGINE]


@hookimpl
def softbridge_defects() -> Sequence[Defect]:
    """Those of AdapterHub."""
    return DEFECTS
