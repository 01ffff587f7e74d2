"""The only code that mentions versions of torch, transformers or the toolkits."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

#: Distributions whose version can change what a model computes.
NUMERICS = ("torch", "transformers", "peft", "adapters", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Name -> installed version, of Python, of softbridge and of whatever can change what a model computes."""
    found = {"python": platform.python_version()}
    for name in ("softbridge", *NUMERICS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
