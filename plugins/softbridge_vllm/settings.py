"""What ``kv_connector_extra_config`` says to the connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from softbridge.errors import EngineError


@dataclass(frozen=True)
class Settings:
    """Its keys.

    Attributes:
        directory: of the prompts; see `softbridge_vllm.shelf`.
        marker: the token id with which every prompt's ids begin, and no text; None: the last of the vocabulary.
        rounded: whether a prompt's numbers may be rounded to the dtype of the cache.
    """

    directory: str
    marker: int | None = None
    rounded: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From JSON.

        Raises:
            EngineError: a key is missing or unknown, or a value is of another kind.
        """
        wrong = sorted(given.keys() - {"directory", "marker", "rounded"})
        kinds = {
            "directory": isinstance(given.get("directory"), str),
            "marker": given.get("marker") is None or type(given["marker"]) is int,
            "rounded": isinstance(given.get("rounded", False), bool),
        }
        wrong += [name for name, right in kinds.items() if not right]
        if wrong:
            raise EngineError(
                f"kv_connector_extra_config with {', '.join(wrong)} amiss: {dict(given)!r:.200}",
                '{"directory": text}, and perhaps "marker": token id or null, and "rounded": true or false',
                "correct it",
            )
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        return {"directory": self.directory, "marker": self.marker, "rounded": self.rounded}
