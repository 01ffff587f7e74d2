"""An engine proves itself where it runs: on a small copy of the very architecture that it was attached to.

The tests of this project hold its engines to their contract on the versions and architectures that they know. A user
has others. So before the first call of an attached model its engine runs a prompt of the same kind on a `Miniature` of
the model, and what it computes is compared, in float64, with what can be had without it. The `Verdict` is kept, so that
this costs nothing the next time.

To read it, in this order: `miniature` (the copy), `promises` (what is compared), `proof` (how a verdict comes about)
and `verdict` (what it says and where it is kept).
"""

from __future__ import annotations

from softbridge.selfcheck.miniature import Architecture
from softbridge.selfcheck.proof import SWITCH, UnprovenWarning, prove, wanted
from softbridge.selfcheck.verdict import FOLDER, PROMISES, Finding, Measured, Promise, Verdict, folder, verdicts

__all__ = [
    "FOLDER",
    "PROMISES",
    "SWITCH",
    "Architecture",
    "Finding",
    "Measured",
    "Promise",
    "UnprovenWarning",
    "Verdict",
    "folder",
    "prove",
    "verdicts",
    "wanted",
]
