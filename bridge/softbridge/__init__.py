"""softbridge translates soft prompts between toolkits and proves that the outputs are the same.

    >>> import softbridge as sb
    >>> prompt = sb.load("peft_prefix/")
    >>> report = sb.convert("peft_prefix/", "out/", to="adapterhub", base="path/to/base", verify=True)
    >>> model = sb.attach(model, prompt, engine="native")

Everything is imported when it is first used: ``import softbridge`` loads no deep-learning framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softbridge.attachment import attach as attach
    from softbridge.attachment import detach as detach
    from softbridge.attachment import extract as extract
    from softbridge.base import BaseModel as BaseModel
    from softbridge.conversion import convert as convert
    from softbridge.conversion import load as load
    from softbridge.conversion import read as read
    from softbridge.conversion import save as save
    from softbridge.errors import SoftbridgeError as SoftbridgeError
    from softbridge.geometry import Geometry as Geometry
    from softbridge.prompt import InputPrompt as InputPrompt
    from softbridge.prompt import KeyValuePrefix as KeyValuePrefix
    from softbridge.prompt import SoftPrompt as SoftPrompt
    from softbridge.registry import engines as engines
    from softbridge.registry import formats as formats
    from softbridge.trainer import SoftPromptCallback as SoftPromptCallback
    from softbridge.verification import Certificate as Certificate
    from softbridge.verification import verify as verify

_HOME = {
    "attach": "attachment",
    "detach": "attachment",
    "extract": "attachment",
    "BaseModel": "base",
    "convert": "conversion",
    "load": "conversion",
    "read": "conversion",
    "save": "conversion",
    "SoftbridgeError": "errors",
    "Geometry": "geometry",
    "InputPrompt": "prompt",
    "KeyValuePrefix": "prompt",
    "SoftPrompt": "prompt",
    "engines": "registry",
    "formats": "registry",
    "SoftPromptCallback": "trainer",
    "Certificate": "verification",
    "verify": "verification",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'softbridge' has no attribute '{name}'")
    return getattr(import_module(f"softbridge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
