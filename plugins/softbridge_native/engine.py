"""The native engine: a soft prompt on an unmodified transformers model, in place. This module loads no framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softbridge.errors import EngineError, Obstacle
from softbridge.geometry import Geometry, read_geometry
from softbridge.lowering.examples import random_input_prompt, random_prefix
from softbridge.methods import float32_parameterisation
from softbridge.plugin.capabilities import EVERYTHING, Capabilities
from softbridge.plugin.prompt_bank import Entry, PromptBank
from softbridge.prompt import SoftPrompt, pack
from softbridge_native.format import FILE

_CAPABILITIES = replace(EVERYTHING, quantised=True)


@dataclass
class NativeEngine:
    """Hooks for the input sequence and the positions; transformers' attention interface for prefixes."""

    name: str = "native"
    summary: str = "softbridge's own, on any model whose attention dispatches through transformers' interface"
    capabilities: Capabilities = _CAPABILITIES

    def unavailable(self) -> str | None:
        """Nothing is needed beyond softbridge itself."""
        return None

    def obstacles(self, prompt: SoftPrompt, model: Any) -> Sequence[Obstacle]:
        """What stands against running this prompt on this model here."""
        from softbridge_native.obstacles import obstacles

        return obstacles(prompt, model)

    def attach(self, model: Any, prompt: SoftPrompt) -> Any:
        """Attach in place; the model keeps its class, its configuration and its methods.

        Raises:
            EngineError: a prompt is attached already, or `obstacles` are not empty.
        """
        from softbridge_native import injection as native

        return native.attach(model, prompt)

    def float32_regions(self, prompt: SoftPrompt, geometry: Geometry) -> Sequence[str]:
        """A parameterisation is evaluated in the dtype in which it is stored. See `Narrowing`."""
        return float32_parameterisation(prompt)

    def attach_bank(self, model: Any, bank: PromptBank, fetch: Callable[[Entry], SoftPrompt]) -> Any:
        """Attach a bank in place: each row of a call runs with the prompt that the bank names for it."""
        from softbridge_native import bank as native

        return native.attach(model, bank, fetch)

    def check_itself(self, model: Any) -> None:
        """Before the first call, on a small copy of the model. See `SelfChecking`."""
        from softbridge_native import injection as native
        from softbridge_native.selfcheck import SelfCheck

        injected = native.injection(model)
        injected.check = SelfCheck(self, model, injected.prompt if isinstance(injected, native.Single) else None)

    def extract(self, model: Any) -> SoftPrompt:
        """The prompt as it is now; the very one that was attached, if training did not change it."""
        from softbridge_native import injection as native

        return native.extract(model)

    def insert(self, model: Any, prompt: SoftPrompt) -> None:
        """Other numbers for the attached prompt. See `Insertable`."""
        from softbridge_native import injection as native
        from softbridge_native import insertion as drop_in

        drop_in.insert(native.injection(model), prompt)

    def detach(self, model: Any) -> Any:
        """Restore the model bit for bit."""
        from softbridge_native import injection as native

        return native.detach(model)

    def train_example(self, model: Any, method: str, directory: Path, *, length: int, steps: int, seed: int) -> None:
        """Train a random prompt on random tokens, and save it in softbridge's own format."""
        from softbridge_native import example as training

        methods: dict[str, Any] = {"prompt-tuning": random_input_prompt, "prefix-tuning": random_prefix}
        if method not in methods:
            raise EngineError(
                f"engine '{self.name}' does not train '{method}'",
                f"one of {', '.join(methods)}",
                "choose another method",
            )
        self.attach(model, methods[method](read_geometry(model.config), length, seed=seed))
        training.train(model, steps=steps, seed=seed)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_bytes(pack(self.extract(model)))


ENGINE = NativeEngine()
