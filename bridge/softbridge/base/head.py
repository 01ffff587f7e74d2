"""Heads that ride along with a prompt: a classifier that was trained together with it, under the model's own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softbridge.arrays import Array, to_torch
from softbridge.errors import BaseModelError

if TYPE_CHECKING:
    import torch


def load_head(model: Any, head: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Copy the head's tensors into the model's parameters of the same names, in place.

    Returns:
        Copies of what was there before; `restore_head` puts them back.

    Raises:
        BaseModelError: the model lacks parameters of the head, or has them in other shapes. The error names all of
            them, and nothing is changed.
    """
    import torch

    parameters = dict(model.named_parameters())
    problems = [
        f"{name} {list(array.shape)}"
        + (f" (the model's is {list(parameters[name].shape)})" if name in parameters else " (the model has none)")
        for name, array in head.items()
        if name not in parameters or tuple(parameters[name].shape) != array.shape
    ]
    if problems:
        raise BaseModelError(
            f"the prompt's head does not fit this {type(model).__name__}: {', '.join(problems)}",
            "a model with the head that the prompt was trained with",
            "load the class with that head and number of labels, or leave the head out: replace(prompt, head={})",
        )
    before = {}
    with torch.no_grad():
        for name, array in head.items():
            before[name] = parameters[name].detach().clone()
            parameters[name].copy_(to_torch(array))
    return before


def restore_head(model: Any, before: Mapping[str, torch.Tensor]) -> None:
    """Undo `load_head`, bit for bit."""
    import torch

    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in before.items():
            parameters[name].copy_(tensor)
