"""Which release of PEFT wrote a file, and what its numbers meant where today's release reads them otherwise.

Measured with the releases themselves, each on the transformers of its time: tests/golden/make_peft.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

#: The last release whose configurations have no `revision`, and which writes no model card.
_FIRST = Version("0.3.0")
#: A line of the model card, the newest release first.
_CARD = re.compile(r"^- PEFT (\d[\w.]*)", re.MULTILINE)

#: The note on a Bloom prefix whose files do not say which release wrote it.
UNKNOWN_BLOOM = (
    "nothing says which release of PEFT wrote it, and up to 0.12 the numbers of a Bloom prefix had another order: if "
    'it is so old, say so in adapter_config.json ("peft_version": "0.12.0")'
)


def release(config: Mapping[str, Any], card: str | None) -> Version | None:
    """The release that wrote a directory, or None if nothing in it says so.

    Args:
        config: of adapter_config.json, which names the release since 0.18.
        card: README.md, if it is there, which PEFT has written since 0.4.
    """
    stated = config.get("peft_version")
    if not isinstance(stated, str):
        found = _CARD.search(card or "")
        stated = found.group(1) if found else None
    if stated is not None:
        try:
            return Version(stated.partition("@")[0])
        except InvalidVersion:
            return None
    oldest = card is None and "inference_mode" in config and not {"revision", "auto_mapping"} & config.keys()
    return _FIRST if oldest else None


def prompts_decoder(written_by: Version | None) -> bool:
    """Whether an encoder-decoder model's second half of rows stands before the decoder's tokens.

    So `forward` has it up to 0.3; `generate` was not implemented there. Later releases never use that half.
    """
    return written_by is not None and written_by <= _FIRST


def scrambles_bloom(written_by: Version | None) -> bool:
    """Whether a Bloom prefix has the keys of all layers before the values of all layers, heads and tokens swapped.

    So up to 0.12. Since 0.13 that depends on the transformers at hand: not with 4.44 and later.
    """
    return written_by is not None and written_by < Version("0.13")
