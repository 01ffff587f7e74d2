"""An engine proves itself where it runs: on a small copy of the very architecture that it was attached to.

The tests of this project hold its engines to their contract on the versions and architectures that they know. A user
has others. So before the first call of an attached model its engine runs a prompt of the same kind on a `Miniature` of
the model, and what it computes is compared, in float64, with what can be had without it. The `Verdict` is kept, so that
this costs nothing the next time.

To read it, in this order: `miniature` (the copy), `promises` (what is compared), `proof` (how a verdict comes about)
and `verdict` (what it says and where it is kept).
"""

from __future__ import annotations

from softbridge.plugin.optional import SWITCH

__all__ = ["SWITCH", "UnprovenWarning"]


class UnprovenWarning(UserWarning):
    """An engine could not check itself on the architecture that it runs."""
