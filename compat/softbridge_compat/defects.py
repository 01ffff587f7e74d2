"""Known defects of the toolkits, as data: what is wrong, and in which installed versions.

Code that has to step around a defect asks its record, so that the step disappears with the defect. Each record has a
test that shows the defect exactly where the record says that it applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        id: a short stable identifier.
        toolkit: the distribution that users see it in.
        summary: what goes wrong, in a sentence.
        applies: whether the installed versions have it. False if the toolkit is not installed.
    """

    id: str
    toolkit: str
    summary: str
    applies: Callable[[], bool]


def installed(distribution: str) -> Version | None:
    """The installed version of a distribution, or None."""
    try:
        return Version(version(distribution))
    except PackageNotFoundError:
        return None


def defects() -> tuple[Defect, ...]:
    """All known defects, toolkit by toolkit."""
    from softbridge_compat import adapterhub_defects, peft_defects

    return peft_defects.DEFECTS + adapterhub_defects.DEFECTS
