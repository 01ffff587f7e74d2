"""What of a source is converted: all of it, one task, one part, without files that no longer belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from softbridge import parts
from softbridge.choices import DROPPED as DROPPED
from softbridge.errors import SoftbridgeError
from softbridge.methods import rematerialise
from softbridge.prompt.soft_prompt import SoftPrompt


@dataclass(frozen=True)
class Choice:
    """What the arguments of `softbridge.convert` say of its source.

    Attributes:
        format: the name of its format; None: recognised by content.
        drop: names in `DROPPED`.
        trained_on: the release of transformers that trained it.
        task: which task of a multitask prompt.
        part: which part, by its name (`softbridge.parts.name_of`).

    Raises:
        ValueError: a value of another kind.
    """

    format: str | None = None
    drop: tuple[str, ...] = ()
    trained_on: str | None = None
    task: int | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop", tuple(dict.fromkeys(self.drop)))
        for name in ("format", "trained_on", "part"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name}: {getattr(self, name)!r:.40}, not a text")
        if self.task is not None and type(self.task) is not int:
            raise ValueError(f"task: {self.task!r:.40}, not a number")
        if not set(self.drop) <= DROPPED.keys():
            raise ValueError(f"drop: {self.drop!r:.80}, not some of {', '.join(DROPPED)}")

    @property
    def reading(self) -> Mapping[str, Any]:
        """The arguments for `softbridge.checkpoint.read.read`."""
        return {"format": self.format, "drop": self.drop, "trained_on": self.trained_on}

    def of(self, prompt: SoftPrompt) -> SoftPrompt:
        """What was chosen of a prompt that was read so; the prompt itself if that is all of it.

        Raises:
            SoftbridgeError: the prompt does not have the task or part that was chosen.
        """
        if self.task is not None:
            prompt = of_task(prompt, self.task)
        if self.part is not None:
            prompt = parts.choose(prompt, self.part)
        if "training" in self.drop and prompt.training is not None:
            prompt = replace(prompt, training=None)
        return prompt

    @classmethod
    def from_json(cls, value: Any) -> Choice:
        """The choice of which this is what `dataclasses.asdict` makes.

        Raises:
            ValueError: `value` is not a choice as JSON.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(value, dict) or not value.keys() <= known or not isinstance(value.get("drop", []), list):
            raise ValueError(f"{value!r:.80}, not an object with some of {', '.join(sorted(known))}")
        try:
            return cls(**value)
        except TypeError as error:  # something that cannot be a name
            raise ValueError(f"{value!r:.80}: {error}") from error


#: A source as it is.
ALL = Choice()


def of_task(prompt: SoftPrompt, task: int) -> SoftPrompt:
    """The prompt of one task of a multitask prompt, alone.

    Raises:
        SoftbridgeError: the prompt does not have this task.
    """
    try:
        return replace(rematerialise(prompt, task), training=None)
    except ValueError as error:
        raise SoftbridgeError(
            str(error), "a task of a multitask prompt", "correct the task, or leave it out"
        ) from error
