"""A few training steps on random tokens: enough to leave the initialisation, too few to mean anything."""

from __future__ import annotations

from typing import Any

import torch

from softbridge.base import BaseModel

BATCH, LENGTH = 2, 8


def train(model: Any, *, steps: int, seed: int) -> None:
    """Train whatever of the model is trainable, with Adam, on one seeded random batch."""
    base = BaseModel.resolve(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, base.geometry.vocabulary, (BATCH, LENGTH), generator=generator)
    classes = getattr(model.config, "num_labels", 2)
    labels = torch.randint(classes, (BATCH,), generator=generator) if base.task == "sequence-classification" else tokens
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens.to(model.device), labels=labels.to(model.device)).loss.backward()
        optimizer.step()
