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
    from softbridge.attachment import reference as reference
    from softbridge.bank import PromptBank as PromptBank
    from softbridge.base import BaseModel as BaseModel
    from softbridge.conversion import convert as convert
    from softbridge.conversion import load as load
    from softbridge.conversion import read as read
    from softbridge.conversion import save as save
    from softbridge.errors import SoftbridgeError as SoftbridgeError
    from softbridge.geometry import Geometry as Geometry
    from softbridge.methods import MLP as MLP
    from softbridge.methods import Cartridge as Cartridge
    from softbridge.methods import ContextAwarePromptTuning as ContextAwarePromptTuning
    from softbridge.methods import MultitaskPromptTuning as MultitaskPromptTuning
    from softbridge.methods import PrefixTuning as PrefixTuning
    from softbridge.methods import PromptTuning as PromptTuning
    from softbridge.methods import PTuning as PTuning
    from softbridge.methods import PTuningV2 as PTuningV2
    from softbridge.methods import TaskHead as TaskHead
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
    "reference": "attachment",
    "PromptBank": "bank",
    "BaseModel": "base",
    "convert": "conversion",
    "load": "conversion",
    "read": "conversion",
    "save": "conversion",
    "SoftbridgeError": "errors",
    "Geometry": "geometry",
    "Cartridge": "methods",
    "ContextAwarePromptTuning": "methods",
    "MLP": "methods",
    "MultitaskPromptTuning": "methods",
    "PTuning": "methods",
    "PTuningV2": "methods",
    "PrefixTuning": "methods",
    "PromptTuning": "methods",
    "TaskHead": "methods",
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
