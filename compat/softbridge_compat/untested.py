"""Which installed versions are newer than any that the tests ran with."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from softbridge_compat.defects import installed
from softbridge_compat.newest import NEWEST


@dataclass(frozen=True)
class Untested:
    """A distribution of which nobody has shown that softbridge is right on it.

    Attributes:
        distribution: its name.
        installed: its installed version.
        newest: the newest version that the tests ran with.
    """

    distribution: str
    installed: str
    newest: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.installed} (newest tested: {self.newest})"


def untested() -> tuple[Untested, ...]:
    """The installed distributions that are newer than the newest tested version, a patch release included.

    What a build adds to a version (``+cu128``) makes it no newer.
    """
    found = []
    for distribution, newest in NEWEST.items():
        here = installed(distribution)
        if here is not None and Version(here.public) > Version(newest):
            found.append(Untested(distribution, str(here), newest))
    return tuple(found)
