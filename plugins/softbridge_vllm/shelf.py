"""A directory of prompts, by name: what a server and its clients both read, so that both know the same prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from softbridge.arrays import Array
from softbridge.checkpoint.manifest import same_attention
from softbridge.errors import BaseModelError, EngineError, few
from softbridge.geometry import Geometry
from softbridge.lowering.expressible import check_fits
from softbridge.lowering.precision import DTYPES
from softbridge.prompt import SoftPrompt
from softbridge.prompt.container import digest_of
from softbridge.untrusted import Files
from softbridge_vllm.format import FORMAT, check_servable
from softbridge_vllm.placeholders import placeholders

SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class Named:
    """One prompt.

    Attributes:
        name: of its file or its folder.
        digest: of what a model sees of it.
        tokens: the token ids [P] that stand for it in a request.
    """

    name: str
    prompt: SoftPrompt
    digest: str
    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        """P."""
        return len(self.tokens)

    @property
    def is_prefix(self) -> bool:
        """Whether it is a key/value prefix; else it is vectors in front of the text."""
        return bool(self.prompt.prefixes)


def read_shelf(directory: str | Path, geometry: Geometry | None = None, marker: int | None = None) -> dict[str, Named]:
    """The prompts of a directory: each ``NAME.safetensors``, and each folder ``NAME`` that was written for vLLM.

    Args:
        geometry: of the base model that serves them; None: what the files record, which is the same in all.
        marker: see `softbridge_vllm.placeholders`; None: the last token id.

    Raises:
        EngineError: there are none, two have one name, or ids that do not say which is meant, or one is not as vLLM
            computes it.
        CheckpointError: one is no prompt of softbridge's.
        BaseModelError: one is for another base model.
        LoweringError: vLLM cannot serve one.
    """
    found: dict[str, Named] = {}
    for name, path in _paths(Path(directory)).items():
        prompt = FORMAT.read(Files(path), geometry)
        recorded = prompt.base.geometry
        if recorded is None:
            raise BaseModelError(
                f"{path} does not say for which base model it is",
                "a prompt that was written for vLLM",
                "softbridge convert ... --to vllm --base ...",
            )
        known = geometry or recorded
        if not same_attention(recorded, known):
            raise BaseModelError(
                f"{path} is for another base model: {recorded}", f"{known}", "serve it with the model of its training"
            )
        if recorded.vocabulary > known.vocabulary:
            raise BaseModelError(
                f"{path} is for {recorded.vocabulary} token ids, and the base model has {known.vocabulary}",
                "the base model of its training, or one with more words",
                "serve it with the model of its training",
            )
        check_fits(prompt, known)
        check_servable(prompt, known, str(path))
        geometry, digest = known, digest_of(prompt)
        # Of the file's own vocabulary, which a client knows, too. The server's may have been resized.
        first = recorded.vocabulary - 1 if marker is None else marker
        ids = placeholders(digest, prompt.parts[0].length, recorded.vocabulary, first)
        found[name] = Named(name, prompt, digest, ids)
    if not found:
        raise EngineError(
            f"no prompts in {directory}", f"files NAME{SUFFIX}, or folders", "softbridge convert ... --to vllm"
        )
    check_apart(found.values())
    return found


def _paths(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise EngineError(f"{directory} is no directory", "a directory of prompts", "check the spelling of the path")
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == SUFFIX):
            continue
        name = path.name if path.is_dir() else path.stem
        if name in found:
            raise EngineError(f"two prompts are called '{name}' in {directory}", "one name each", "rename one")
        found[name] = path
    return found


def check_apart(prompts: Collection[Named], size: int | None = None) -> None:
    """Refuse prefixes of which one's ids begin with another's: nothing would say which of the two is meant.

    Args:
        size: of a block of the server's prefix cache, which takes two blocks for one if their ids are the same.

    Raises:
        EngineError: there are two such prefixes.
    """
    seen: list[Named] = []
    for one in prompts:
        for other in seen if one.is_prefix else ():
            both = min(one.length, other.length, *([] if size is None else [size]))
            if one.tokens[:both] == other.tokens[:both] and one.digest != other.digest:
                raise EngineError(
                    f"'{other.name}' and '{one.name}' begin with the same {both} token ids",
                    "prompts whose token ids say which of them is meant",
                    "remove one of the two, or train it with more virtual tokens",
                )
        seen += [one] if one.is_prefix else []


def numbers_of(named: Named, dtype: str, *, rounded: bool = False) -> Mapping[int, tuple[Array, Array]]:
    """Layer -> keys and values [P, K, D] of a prefix, in the dtype of the server's cache.

    Args:
        dtype: its name, as in ``bfloat16``.
        rounded: whether numbers may be rounded to it.

    Raises:
        EngineError: they would be, or the dtype is none that a prompt can have.
    """
    (part,) = named.prompt.prefixes
    return {
        layer: (
            _stored(named, pair.keys.transpose(1, 0, 2), dtype, rounded=rounded),
            _stored(named, pair.values.transpose(1, 0, 2), dtype, rounded=rounded),
        )
        for layer, pair in part.layers.items()
    }


def vectors_of(named: Named, dtype: str, *, rounded: bool = False) -> Array:
    """The vectors [P, H] of an input prompt, in the dtype in which a server computes; see `numbers_of`."""
    return _stored(named, named.prompt.inputs[0].vectors, dtype, rounded=rounded)


def _stored(named: Named, array: Array, dtype: str, *, rounded: bool) -> Array:
    if dtype not in DTYPES:
        raise EngineError(f"a server in {dtype}", f"one in {few(DTYPES)}", "serve with another --dtype")
    stored = np.ascontiguousarray(array).astype(DTYPES[dtype])
    wide = stored.astype(np.float64)
    if not np.isfinite(wide).all() or (not rounded and (wide != array.astype(np.float64)).any()):
        raise EngineError(
            f"'{named.name}' in {array.dtype}, and a server in {dtype}, which does not hold these numbers",
            f"a prompt in {dtype}",
            f'softbridge convert ... --dtype {dtype}; or accept the rounding: "rounded": true in '
            "kv_connector_extra_config, rounded=True in softbridge_vllm.client",
        )
    return stored
