"""What every conversion with a base model imports. Where the system can fork, it is imported once, for all workers."""

from __future__ import annotations

import torch
import transformers.modeling_utils

from softbridge.collection import work
from softbridge.plugin.registry import formats

__all__ = ["formats", "torch", "transformers", "work"]
formats()
