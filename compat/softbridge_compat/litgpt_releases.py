"""What a LLaMA-Adapter of litgpt means, by the release that trained it.

Measured with the releases' own modules: tests/golden/make_litgpt.py. Read in those of 0.5.3 to 0.5.7 and 0.5.13.
"""

from __future__ import annotations

#: Why a file whose release is not known is not the same function for certain.
OTHER_ROWS = (
    "nothing says which release of litgpt trained it, and from 0.5.5 on litgpt makes the adapter's keys and values by "
    "other rows of its fused projection, the queries' among them: what is read is what releases up to 0.5.4 compute"
)
