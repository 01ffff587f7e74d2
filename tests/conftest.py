"""Two profiles for hypothesis: a quick one that is the same every time, and SOFTBRIDGE_PROFILE=long to go looking."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No clock decides: the machine may be busy.
settings.register_profile(
    "default", max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "long", max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile(os.environ.get("SOFTBRIDGE_PROFILE", "default"))
