"""The family of errors that softbridge raises on purpose.

Every message answers three questions: what was found, what was expected, what to do. The constructor asks for all
three, so that none can be forgotten. Nothing below the command line prints or exits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any


def few(items: Collection[Any]) -> str:
    """The first few of a list, in words."""
    shown = ", ".join(str(item) for item in list(items)[:4]) or "none"
    return shown + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def one_of(known: Collection[str], given: str) -> str:
    """What was expected in the place of a name that nothing has, and which was probably meant."""
    near = "".join(f"did you mean '{one}'? It is " for one in get_close_matches(given, known, 1))
    return f"{near}one of {', '.join(known)}"


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ... ({len(text) - longest} more characters)"


class SoftbridgeError(Exception):
    """Base of all errors that softbridge raises on purpose.

    Args:
        found: what was met, in one phrase.
        expected: what would have been right.
        remedy: what the user can do.
    """

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        # A name of a file need not be UTF-8, and a message has to be: it is printed, logged and written as JSON.
        texts = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in (found, expected, remedy)]
        # A file may hold a number of thousands of digits, which nobody wants to see.
        texts = [re.sub(r"\d{80,}", lambda found: f"(a number of {len(found[0])} digits)", text) for text in texts]
        super().__init__(*texts)
        self.found, self.expected, self.remedy = texts

    def __str__(self) -> str:
        return f"{self.found}\n  expected: {self.expected}\n  to do:    {self.remedy}"


class ArgumentError(SoftbridgeError, ValueError):
    """Arguments of a function do not fit each other, or the prompt."""


def refusal(found: str, expected: str, remedy: str) -> ArgumentError:
    """The error for arguments that do not fit."""
    return ArgumentError(found, expected, remedy)


class CheckpointError(SoftbridgeError):
    """A file is malformed, incomplete, hostile, or not what it says it is.

    What a file says is shown, and may be as long as the file: each part of the message ends after `LONGEST` characters.
    """

    LONGEST = 1200

    def __init__(self, found: str, expected: str, remedy: str) -> None:
        super().__init__(*(_cut(part, self.LONGEST) for part in (found, expected, remedy)))


class UnknownFormatError(CheckpointError):
    """No installed format recognises the file, or none has the name that was asked for."""


class NotAPromptError(CheckpointError):
    """The files are sound, and they are not a soft prompt: a LoRA adapter, say."""


class BaseModelError(SoftbridgeError):
    """The base model is missing, cannot be read, or does not fit the prompt."""


class EngineError(SoftbridgeError):
    """An engine is not installed, or cannot run this prompt on this model."""


class PluginError(SoftbridgeError):
    """A plugin is broken, or two plugins claim one name."""


class OutputError(SoftbridgeError):
    """The output cannot be written, or would overwrite something."""


class DifferentError(OutputError):
    """Verification found that the output would be another function than the source. Nothing was written."""


class PublishError(SoftbridgeError):
    """Files cannot be proposed to a repository on the hub. What was written on this machine stays."""


class UntestedVersionWarning(UserWarning):
    """A library is newer than the newest release that softbridge was tested with."""


@dataclass(frozen=True)
class Obstacle:
    """One reason why a prompt cannot be expressed exactly by a target.

    Attributes:
        name: a short stable identifier, such as ``positions`` or ``relative-bias``.
        reason: a sentence for a person.
        acceptable: whether a caller may accept the consequences by name; such an obstacle is a *condition*.
        remedy: the way out.
        accidental: whether it depends on the prompt's own numbers, so that another of the same kind need not meet it.
    """

    name: str
    reason: str
    remedy: str
    acceptable: bool = False
    accidental: bool = False


class LoweringError(SoftbridgeError):
    """A prompt cannot be expressed exactly by the target. Carries *every* obstacle, not the first one met.

    Attributes:
        obstacles: all obstacles, in the order in which the parts of the prompt were looked at.
    """

    def __init__(self, target: str, obstacles: Sequence[Obstacle]) -> None:
        self.target = target
        self.obstacles = tuple(obstacles)
        conditions = [obstacle.name for obstacle in obstacles if obstacle.acceptable]
        remedy = "; ".join(dict.fromkeys(obstacle.remedy for obstacle in obstacles))
        if conditions and len(conditions) == len(self.obstacles):
            remedy += " (" + " ".join(f"--accept {name}" for name in dict.fromkeys(conditions)) + ")"
        super().__init__(
            found=f"this prompt cannot be written for '{target}' as the same function: "
            + "; ".join(f"[{obstacle.name}] {obstacle.reason}" for obstacle in obstacles),
            expected="a target that computes the same function",
            remedy=remedy,
        )

    def __reduce__(self) -> tuple[type[LoweringError], tuple[str, tuple[Obstacle, ...]]]:
        return type(self), (self.target, self.obstacles)
