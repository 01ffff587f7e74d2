"""The only code that mentions versions of torch, transformers or the toolkits."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

#: Distributions whose version can change what a model computes.
NUMERICS = ("torch", "transformers", "peft", "adapters", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Name -> installed version, of Python, of softbridge and of whatever can change what a model computes."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """The same, found once: what is installed meanwhile is not what this process has imported."""
    found = {"python": platform.python_version()}
    for name in ("softbridge", *NUMERICS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
