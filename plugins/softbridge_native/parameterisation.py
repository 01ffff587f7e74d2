"""A parameterisation in training: the tensors that are trained, and the prompt that they make in every call.

Where no gradient is wanted nothing is evaluated: the parts hold the last numbers, and take new ones only when a tensor
changed. Where one is, each call of a stack evaluates its parts once, with dropout in training.

Gradient checkpointing runs the layers again in the backward pass, each for itself. A layer whose keys came out of a
parameterisation would run back through it, which can be done once. So a layer that runs again takes leaves, and
`_Gather`, which stands where the stack begins, hands what they gathered to the parameterisation: the gradient of a
stack's input is the last that a backward pass computes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from softbridge.arrays import Array, from_torch, to_torch
from softbridge.errors import EngineError
from softbridge.geometry import Site, Stack
from softbridge.methods import KINDS, evaluate, rematerialise, trained
from softbridge.prompt import SoftPrompt, Training
from softbridge_native.call import Own

log = logging.getLogger(__name__)

#: Of several threads, one evaluates.
_HOLDING = threading.Lock()

#: How far numbers of a file may be from what the parameterisation makes here, in roundings of the largest: where the
#: file was written, sums may have been taken in another order, through several layers.
ROUNDINGS = 64.0


class Made(Protocol):
    """A part of the prompt whose numbers a parameterisation makes."""

    stack: Stack
    site: Site | None

    def hold(self, flat: Tensor) -> None:
        """Keep the numbers [P, W] for calls without gradients; what `use` and `branch` gave is gone."""

    def use(self, flat: Tensor | None) -> Sequence[Tensor]:
        """Run with these numbers until it is called with others, and return them as they are used."""

    def branch(self) -> Sequence[Tensor]:
        """Leaves with the numbers in use, one for each, for layers that run again when `use` is over."""


class Parameterisation(nn.Module):
    """The tensors of a training state: parameters where training changes them, buffers where it does not.

    Args:
        training: the training state.
        parts: what it makes.
        device: where its tensors are to be.
    """

    def __init__(self, training: Training, parts: Sequence[Made], device: torch.device) -> None:
        super().__init__()
        self.state = training
        self.parts = tuple(parts)
        self.local = {name: name.replace(".", "_") for name in training.tensors}
        changed = trained(training)
        for name, array in training.tensors.items():
            tensor = to_torch(array).to(device)
            if name in changed:
                self.register_parameter(self.local[name], nn.Parameter(tensor))
            else:
                self.register_buffer(self.local[name], tensor)
        self._held: tuple[Any, ...] = ()

    def forward(self, site: Site | None) -> Tensor:
        """[P, H], or [P, W] of one site; with dropout in training."""
        return self._made(site, self.training)

    def _made(self, site: Site | None, train: bool) -> Tensor:
        tensors = {name: getattr(self, local) for name, local in self.local.items()}
        return evaluate(self.state.kind, self.state.settings, tensors, site, train=train)

    @property
    def wanted(self) -> bool:
        """Whether a gradient is."""
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def hold(self) -> None:
        """Let the parts hold what the tensors make now. Under torch.compile they hold what they held."""
        if torch.compiler.is_compiling():
            return
        now = tuple((tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in self.parameters())
        with _HOLDING:
            if now == self._held:
                return
            with torch.enable_grad():  # as the toolkits evaluate: see `softbridge.methods.parameterisations.eject`
                for part in self.parts:
                    part.hold(self._made(part.site, train=False).detach())
            self._held = now

    def changes(self) -> None:
        """A training step begins. Optimisers change tensors, and fused ones do not count it as a version."""
        self._held = ()

    def extract(self) -> Training:
        """The training state as it is now; the very one that was given, if nothing changed."""
        now = {name: from_torch(getattr(self, local)) for name, local in self.local.items()}
        training = Training(self.state.kind, self.state.settings, now)
        return self.state if training == self.state else training


class Call:
    """What a parameterisation made for the running call of a stack."""

    def __init__(self) -> None:
        self.used: tuple[Tensor, ...] = ()


class Making:
    """What a parameterisation makes for one stack.

    Args:
        parameterisation: of the whole prompt.
        parts: those of its parts that the stack runs with.
    """

    def __init__(self, parameterisation: Parameterisation, parts: Sequence[Made]) -> None:
        self.parameterisation = parameterisation
        self.parts = tuple(parts)
        self.call: Own[Call] = Own(Call)
        #: Of the last call, whichever thread it ran in: a backward pass may run layers again in another.
        self.leaves: tuple[Tensor, ...] = ()

    def enter(self, stack: nn.Module) -> None:
        """The stack runs."""
        self.leave()
        self.leaves = ()
        if not self.parameterisation.wanted:
            self.parameterisation.hold()
            return
        self.parameterisation.changes()
        used = (tensor for part in self.parts for tensor in part.use(self.parameterisation(part.site)))
        self.call.now.used = tuple(used)
        if stack.training and any(getattr(module, "gradient_checkpointing", False) for module in stack.modules()):
            self.leaves = tuple(leaf for part in self.parts for leaf in part.branch())

    def gather(self, entered: Tensor) -> Tensor:
        """What enters the layers, as it is, with a way back to the parameterisation."""
        used = self.call.now.used
        if not (used and self.leaves):
            return entered
        gathered: Tensor = _Gather.apply(entered, self, *used)  # type: ignore[no-untyped-call]
        return gathered

    def leave(self) -> None:
        """The stack has run."""
        self.call.now.used = ()
        for part in self.parts:
            part.use(None)


class _Gather(torch.autograd.Function):
    """Nothing, forwards. Backwards, what the leaves gathered is the gradient of what they were leaves of."""

    @staticmethod
    def forward(ctx: Any, entered: Tensor, making: Making, *used: Tensor) -> Tensor:
        ctx.making, ctx.leaves = making, making.leaves
        return entered.view_as(entered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if ctx.making.leaves is not ctx.leaves:
            ctx.making.leaves = ()  # they have gathered what is ours
            raise EngineError(
                "with gradient checkpointing, a backward pass began after the model had been called again",
                "the layers that run again to find the prompt of their own call",
                "call backward before the next forward, or train without gradient checkpointing, or train the prompt "
                "itself (softbridge.attach with replace(prompt, training=None))",
            )
        gathered = []
        for leaf in ctx.leaves:
            gathered.append(leaf.grad)
            leaf.grad = None
        return gradient, None, *gathered


def trainable(prompt: SoftPrompt) -> bool:
    """Whether the prompt's training state is one that can be trained, and makes the prompt's numbers."""
    training = prompt.training
    if training is None:
        return False
    if training.kind not in KINDS:
        log.warning("the parameterisation '%s' is not known: the prompt's own numbers are trained", training.kind)
        return False
    made = rematerialise(prompt)
    if all(_near(a, b) for (_, a), (_, b) in zip(made.arrays(), prompt.arrays(), strict=True)):
        return True
    log.warning(
        "the prompt is no longer what its parameterisation '%s' makes (it was converted since): "
        "its own numbers are trained",
        training.kind,
    )
    return False


def _near(made: Array, given: Array) -> bool:
    import ml_dtypes

    if made.shape != given.shape:
        return False
    size = max(float(ml_dtypes.finfo(array.dtype).eps) for array in (made, given))
    wide = given.astype(np.float64)
    bound = ROUNDINGS * size * float(np.abs(wide).max(initial=0.0))
    return bool((np.abs(made.astype(np.float64) - wide) <= bound).all())
