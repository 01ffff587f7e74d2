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
    from softbridge import initialisation as initialisation
    from softbridge import methods as methods
    from softbridge import parts as parts
    from softbridge import tools as tools
    from softbridge.attachment.attach import attach as attach
    from softbridge.attachment.attach import detach as detach
    from softbridge.attachment.attach import reference as reference
    from softbridge.attachment.attached import extract as extract
    from softbridge.attachment.trainer_callback import SoftPromptCallback as SoftPromptCallback
    from softbridge.baking import bake as bake
    from softbridge.base.model import BaseModel as BaseModel
    from softbridge.checkpoint.inspect import inspect as inspect
    from softbridge.checkpoint.read import load as load
    from softbridge.checkpoint.read import read as read
    from softbridge.checkpoint.write import save as save
    from softbridge.collection.run import convert_all as convert_all
    from softbridge.conversion import convert as convert
    from softbridge.errors import SoftbridgeError as SoftbridgeError
    from softbridge.geometry import Geometry as Geometry
    from softbridge.lowering.explain import explain as explain
    from softbridge.methods import MLP as MLP
    from softbridge.methods import Cartridge as Cartridge
    from softbridge.methods import ContextAwarePromptTuning as ContextAwarePromptTuning
    from softbridge.methods import MultitaskPromptTuning as MultitaskPromptTuning
    from softbridge.methods import PrefixTuning as PrefixTuning
    from softbridge.methods import PromptTuning as PromptTuning
    from softbridge.methods import PTuning as PTuning
    from softbridge.methods import PTuningV2 as PTuningV2
    from softbridge.methods import TaskHead as TaskHead
    from softbridge.plugin.prompt_bank import PromptBank as PromptBank
    from softbridge.plugin.registry import engines as engines
    from softbridge.plugin.registry import formats as formats
    from softbridge.prompt.part import InputPrompt as InputPrompt
    from softbridge.prompt.part import KeyValuePrefix as KeyValuePrefix
    from softbridge.prompt.soft_prompt import SoftPrompt as SoftPrompt
    from softbridge.verification.certificate import Certificate as Certificate
    from softbridge.verification.proof import verify as verify

#: Modules that are names of the public face themselves.
_MODULES = ("initialisation", "methods", "parts", "tools")

#: Every other name -> the module that it stands in.
_HOME = {
    "attach": "attachment.attach",
    "detach": "attachment.attach",
    "extract": "attachment.attached",
    "reference": "attachment.attach",
    "PromptBank": "plugin.prompt_bank",
    "BaseModel": "base",
    "bake": "baking",
    "convert": "conversion",
    "convert_all": "collection.run",
    "explain": "lowering.explain",
    "inspect": "checkpoint.inspect",
    "load": "checkpoint.read",
    "read": "checkpoint.read",
    "save": "checkpoint.write",
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
    "engines": "plugin.registry",
    "formats": "plugin.registry",
    "SoftPromptCallback": "attachment.trainer_callback",
    "Certificate": "verification",
    "verify": "verification",
}

__all__ = sorted((*_HOME, *_MODULES))


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"softbridge.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'softbridge' has no attribute '{name}'")
    return getattr(import_module(f"softbridge.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
