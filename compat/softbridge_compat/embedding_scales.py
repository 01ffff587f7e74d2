"""Families of which one release of transformers multiplies given vectors by another number than the next.

Gemma multiplies the embeddings of words by the square root of their width. Up to transformers 5.3 the model does it,
and to vectors that a caller gives in the place of words (`inputs_embeds`) as well; since 5.4 the embedding module does
it, and given vectors are taken as they are. The same input prompt is therefore another function on the other side.

What the installed release does is measured (`softbridge.base.embedding_scale`); what another one did is known here.
Families that scale in the same place in all releases (Gemma 3, T5Gemma, Granite, BART) need no entry. The sources are
models/*/modeling_*.py of the releases 4.57.1, 4.57.6, 5.0.0 to 5.4.0, 5.23.0 and 5.24.0.
"""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

#: Family of the text model -> the first release whose embedding module scales, and the model no longer.
MOVED: Mapping[str, Version] = dict.fromkeys(("gemma", "gemma2", "vaultgemma"), Version("5.4.0"))


def scale_on(family: str, width: int, release: str) -> float:
    """By what a release multiplies vectors that are given in the place of words, in a family of `MOVED`.

    Args:
        family: the text model's `model_type`.
        width: of the embeddings.
        release: of transformers, as in ``4.57``.

    Raises:
        ValueError: the release is no version.
    """
    try:
        inside = Version(release) < MOVED[family]
    except InvalidVersion as error:
        raise ValueError(f"{release!r:.40} is no version of transformers") from error
    return float(width**0.5) if inside else 1.0
