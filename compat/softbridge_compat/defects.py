"""A known defect of a toolkit, as data: what is wrong, and in which installed versions.

A plugin brings those of its toolkit by the hook ``softbridge_defects``. Code that has to step around a defect asks its
record, so that the step disappears with the defect. Each record has a test that shows the defect exactly where the
record says that it applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from softbridge.geometry import Geometry
from softbridge.prompt.soft_prompt import SoftPrompt


def every_prompt(prompt: SoftPrompt, geometry: Geometry | None) -> bool:
    """Whether a defect that every prompt meets is met with this one."""
    return True


@dataclass(frozen=True)
class Defect:
    """One defect.

    Attributes:
        id: a short stable identifier, of which there is one among all plugins.
        toolkit: the distribution that users see it in.
        engine: the name of the engine that runs the toolkit.
        summary: what goes wrong, in a sentence.
        applies: whether the installed versions have it. False if the toolkit is not installed.
        concerns: whether it can be met with this prompt on a base model of this geometry (None if that is not known:
            then, whether it can on any). Every prompt, unless said otherwise.
    """

    id: str
    toolkit: str
    engine: str
    summary: str
    applies: Callable[[], bool]
    concerns: Callable[[SoftPrompt, Geometry | None], bool] = every_prompt


def installed(distribution: str) -> Version | None:
    """The installed version of a distribution, or None."""
    try:
        return Version(version(distribution))
    except PackageNotFoundError:
        return None
