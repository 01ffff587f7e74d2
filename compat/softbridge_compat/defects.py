"""Known defects of the toolkits, as data: what is wrong, and in which installed versions.

Code that has to step around a defect asks its record, so that the step disappears with the defect. Each record has a
test that shows the defect exactly where the record says that it applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from packaging.version import Version

if TYPE_CHECKING:
    from softbridge.geometry import Geometry
    from softbridge.prompt import SoftPrompt

#: Distribution -> the engine that runs it, where they are not called alike.
_ENGINES = {"adapters": "adapterhub"}


def _every(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    return True


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        id: a short stable identifier.
        toolkit: the distribution that users see it in.
        summary: what goes wrong, in a sentence.
        applies: whether the installed versions have it. False if the toolkit is not installed.
        concerns: whether it can be met with this prompt on a base model of this geometry (None if that is not known:
            then, whether it can on any). Every prompt, unless said otherwise.
    """

    id: str
    toolkit: str
    summary: str
    applies: Callable[[], bool]
    concerns: Callable[[SoftPrompt, Geometry | None], bool] = _every

    @property
    def engine(self) -> str:
        """The name of the engine that runs the toolkit."""
        return _ENGINES.get(self.toolkit, self.toolkit)


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
