"""What this environment can do, what in it is untested, and which known defects of toolkits are met."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from softbridge import parts
from softbridge.checkpoint.read import read
from softbridge.errors import PluginError
from softbridge.geometry import Geometry
from softbridge.plugin import registry
from softbridge.prompt.soft_prompt import SoftPrompt
from softbridge.selfcheck.verdict import Verdict, verdicts
from softbridge_compat import versions
from softbridge_compat.defects import Defect
from softbridge_compat.untested import Untested, untested


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        platform: of the machine.
        versions: distribution -> installed version, of whatever can change a result.
        untested: those that are newer than the newest version that softbridge was tested with.
        engines: name -> why it cannot be used here, or None.
        defects: known defects of the toolkits at hand: all, or those that concern the prompt.
        prompt: what was asked about, or None.
        self_checks: what engines found when they checked themselves with the installed versions; see
            `softbridge.selfcheck`.
    """

    platform: str
    versions: dict[str, str]
    untested: tuple[Untested, ...]
    engines: dict[str, str | None]
    defects: tuple[Defect, ...]
    prompt: SoftPrompt | None = None
    self_checks: tuple[Verdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values; the prompt as a line of text."""
        return {
            "platform": self.platform,
            "versions": self.versions,
            "untested": [asdict(one) for one in self.untested],
            "engines": self.engines,
            "defects": [named(defect) for defect in self.defects],
            "prompt": None if self.prompt is None else describe(self.prompt),
            "self_checks": [verdict.to_json() for verdict in self.self_checks],
        }


def defects(
    prompt: SoftPrompt | None = None, geometry: Geometry | None = None, engines: Collection[str] | None = None
) -> tuple[Defect, ...]:
    """The defects of which plugins know, and which the installed versions have, sorted by id.

    Depends on nothing but its arguments and what is installed; reads no file and imports no toolkit.

    Args:
        prompt: if given, only those that can be met with it.
        geometry: of its base model, if that is known; without it, those that can be met on any base model.
        engines: names of the engines that run it; all if None.

    Raises:
        PluginError: a plugin's defect cannot say whether it applies.
    """
    return tuple(
        defect
        for defect in registry.defects().values()
        if (engines is None or defect.engine in engines)
        and _says(defect, defect.applies)
        and (prompt is None or _says(defect, partial(defect.concerns, prompt, geometry)))
    )


def _says(defect: Defect, asked: Callable[[], bool]) -> bool:
    """What a defect answers. Its code is foreign: that it fails is no fault of this program."""
    try:
        return bool(asked())
    except Exception as error:
        owner = registry.owners()["softbridge_defects"][defect.id]
        raise PluginError(
            f"the defect '{defect.id}' of the plugin '{owner}' cannot say whether it applies: {error!r}",
            "true or false",
            "update or uninstall the package that brings the plugin",
        ) from error


def named(defect: Defect) -> dict[str, str]:
    """A defect as a certificate or a program names it."""
    return {"id": defect.id, "toolkit": defect.toolkit, "summary": defect.summary}


def diagnose(path: str | Path | None = None, base: Any = None) -> Diagnosis:
    """Look at this environment, and at one prompt if there is a path.

    Args:
        path: whatever `softbridge.load` takes.
        base: whatever `BaseModel.resolve` takes; with it, defects that other base models would meet are left out.

    Raises:
        SoftbridgeError: the prompt cannot be read; see `softbridge.read`.
    """
    prompt = None if path is None else read(path, base=base).prompt
    reasons = {name: engine.unavailable() for name, engine in registry.engines().items()}
    usable = [name for name, reason in reasons.items() if reason is None]
    found = defects(prompt, None if prompt is None else prompt.base.geometry, usable)
    return Diagnosis(platform.platform(), versions(), untested(), reasons, found, prompt, tuple(verdicts()))


def describe(prompt: SoftPrompt) -> str:
    """A prompt in a line, for a person."""
    return " and ".join(f"{part.length} virtual tokens ({parts.name_of(part)})" for part in prompt.parts)
