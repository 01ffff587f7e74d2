"""The newest versions that the tests ran with. Generated from matrix.toml by compat/stacks.py."""

from __future__ import annotations

#: Distribution -> version.
NEWEST = {
    "transformers": "5.24.0",
    "torch": "2.13.0",
    "peft": "0.21.2",
    "adapters": "1.3.0",
}
