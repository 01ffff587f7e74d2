"""A warning, once, where softbridge runs on releases that it was not proven on."""

from __future__ import annotations

import warnings

from softbridge.errors import UntestedVersionWarning
from softbridge_compat.untested import untested

_warned = False


def warn_of_untested(stacklevel: int = 2) -> None:
    """Warn once in a process if something is installed that is newer than what the tests ran with.

    Args:
        stacklevel: as of `warnings.warn`, counted from the caller: 2 is the caller's caller.
    """
    global _warned
    if _warned:
        return
    _warned = True
    found = untested()
    if found:
        warnings.warn(
            f"softbridge was not tested with {', '.join(map(str, found))}, which may compute something else. What to "
            "do: install a tested version, or check a prompt with 'softbridge verify'; 'softbridge doctor' shows what "
            "is installed. To silence this, filter softbridge.errors.UntestedVersionWarning",
            UntestedVersionWarning,
            stacklevel=stacklevel + 1,
        )
