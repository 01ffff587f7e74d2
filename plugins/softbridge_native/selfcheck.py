"""When the engine checks itself, and what it refuses afterwards. What is checked: see `softbridge.selfcheck`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from softbridge.base import cache as caches
from softbridge.errors import EngineError
from softbridge.prompt import SoftPrompt
from softbridge.selfcheck import SWITCH, UnprovenWarning
from softbridge.selfcheck.miniature import Architecture
from softbridge.selfcheck.proof import prove, unproven
from softbridge.selfcheck.verdict import PROMISES, Finding, Promise, Verdict
from softbridge_native.attention import underlying
from softbridge_native.layout import left_pads

#: These concern a way to use the model, and are refused there; the others concern every call.
_CACHED: Promise = "cache"
_SIDES: tuple[Promise, ...] = ("left", "right")
_ONE_LENGTH = "run rows of one length, or one by one, or "


class SelfCheck:
    """The check of one attached model: made at its first call, and its consequences at each.

    Args:
        engine: that attached.
        model: it was attached to, before its class is changed.
        prompt: that was attached; None: a bank, of which each prompt is checked when it is loaded.
    """

    def __init__(self, engine: Any, model: Any, prompt: SoftPrompt | None) -> None:
        named = underlying(model.config._attn_implementation)
        self.architecture: Architecture | None = None
        self.failed: Verdict | None = None
        try:
            self.architecture = Architecture.of(model, _runs(model, named), named)
        except Exception as error:  # foreign code: what cannot be described cannot be copied, and runs unchecked
            self.failed = unproven(type(model), f"its configuration or its layers cannot be read: {error!r:.200}")
        self.engine = engine
        self.prompt = prompt
        self.verdicts: list[Verdict] = []
        #: The promises of use that are broken.
        self.uses: dict[Promise, tuple[Verdict, Finding]] = {}

    def call(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A stack runs.

        Raises:
            EngineError: a promise is broken that concerns this call.
        """
        if torch.compiler.is_compiling():
            return
        if self.prompt is not None and not self.verdicts:
            self.learn(self.prompt)
        if self.uses:
            names = tuple(inspect.signature(stack.forward).parameters)
            self._refuse({**dict(zip(names, args, strict=False)), **kwargs})

    def learn(self, prompt: SoftPrompt) -> None:
        """Let the engine check itself on prompts of this kind.

        Raises:
            EngineError: a promise is broken that concerns every call.
        """
        verdict = self.failed
        if self.architecture is not None:
            verdict = prove(self.engine, self.architecture, prompt, bank=self.prompt is None)
        assert verdict is not None
        if verdict.status == "unproven":
            warnings.warn(
                f"softbridge could not check its engine '{self.engine.name}' on {verdict.model}: {verdict.reason}. It "
                f"runs unchecked (attach(..., self_check=False) or {SWITCH}=0 say that you know)",
                UnprovenWarning,
                stacklevel=2,
            )
        for finding in verdict.findings:
            if finding.broken and finding.promise not in (_CACHED, *_SIDES):
                raise self._error(verdict, finding)
        self.uses |= {found.promise: (verdict, found) for found in verdict.findings if found.broken}
        self.verdicts.append(verdict)

    def _refuse(self, given: Mapping[str, Any]) -> None:
        mask = given.get("attention_mask")
        plain = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if _CACHED in self.uses and caches.given(given) is not None:
            raise self._error(*self.uses[_CACHED], "run it without a cache (use_cache=False), or ")
        if plain is None:
            return
        if "left" in self.uses and bool(left_pads(plain).any()):
            raise self._error(*self.uses["left"], _ONE_LENGTH)
        if "right" in self.uses and bool((plain[:, -1:] == 0).any()):
            raise self._error(*self.uses["right"], _ONE_LENGTH)

    def _error(self, verdict: Verdict, finding: Finding, way_out: str = "") -> EngineError:
        figures = ", ".join(f"{one.name}: {one.value:.1e} (bound {one.bound:.0e})" for one in finding.broken)
        versions = ", ".join(f"{name} {version}" for name, version in verdict.versions.items())
        return EngineError(
            f"the engine '{self.engine.name}' breaks the promise '{finding.promise}' on a small copy of this "
            f"{verdict.model} ({verdict.note}): {figures}; with {versions}",
            PROMISES[finding.promise],
            f"{way_out}install other versions (`softbridge doctor` lists what was found), choose another engine, or "
            f"softbridge.detach(model); at your own risk: attach(..., self_check=False), or {SWITCH}=0",
        )


def _runs(model: Any, named: str) -> str:
    """The attention implementation of a model, or one that a copy of it can be run with in float64 on the CPU."""
    if named in ("eager", "sdpa"):
        return named
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
