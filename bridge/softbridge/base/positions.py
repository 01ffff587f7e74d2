"""How a base model knows where its tokens stand, measured on a small model of the same structure.

No formula is written down for any architecture. The question that lowering asks is a linear one: stored prefix keys
enter the dot product as they are, so moving the real tokens by s positions is undone by applying to every prefix key
the map which the model itself applies to a key when its token moves by s. That map is read off the model's own key
cache. Many random single tokens are run once at position 0 and once at position s; a single token attends only to
itself, so whatever its position its values do not change (unless positions are added to the hidden states), and the
keys of each layer are related by one linear map, k_s = k_0 · M. Least squares gives M [D, D]; it must fit exactly and
be orthogonal, or the model is refused.

This covers full, partial and interleaved rotary positions, layers without any, key norms, and scaling variants whose
attention factor multiplies both sides. The families are told apart by what they do, never by name.
"""

from __future__ import annotations

import copy
import inspect
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from softbridge.arrays import Array
from softbridge.base import cache as caches
from softbridge.base.build import build, shrink, usual_task
from softbridge.errors import BaseModelError
from softbridge.geometry import read_geometry, text_part

if TYPE_CHECKING:
    import torch

#: absolute: positions are added to the hidden states. rotary: keys rotate with the position, in at least one layer.
#: relative: a bias that the model computes for itself. none: the outputs do not depend on a caller's positions.
#: unknown: it could not be measured.
Kind = Literal["absolute", "rotary", "relative", "none", "unknown"]

#: A map that fits worse than this, or is this far from orthogonal, is not believed. Rotary tables are float32: 1e-7.
TOLERANCE = 1e-5

#: Layers that turn alike differ by the rounding of float64 alone.
ROUNDING = 1e-9

#: Angles at position 10^5 are rounded to 10^-2 in float32; a changed frequency moves the map by about 1.
REGIME_TOLERANCE = 0.05

#: How many tokens show whether a map is the one that was expected.
FEW = 8

#: Prompts of a collection are of few lengths, and a large model's maps take megabytes.
MOVES = 8

#: Rows at the start of a table of positions that may be reserved; the padding token's index is the last of them.
RESERVED = 512


class PositionScheme:
    """How a model knows where its tokens stand.

    Attributes:
        kind: see `Kind`.
        reason: for ``unknown``, why.
        tellable: whether the caller of the model can say where tokens stand (`position_ids`).
        first: what a caller says for a token that stands at 0, who says no more than the model would by itself: 0, or
            where the rows of a table are reserved (RoBERTa's for padding), the number of these.
    """

    def __init__(
        self, kind: Kind, *, tellable: bool, reason: str = "", keys: _Keys | None = None, first: int = 0
    ) -> None:
        self.kind = kind
        self.tellable = tellable
        self.reason = reason
        self.first = first
        self._keys = keys

    def rotation(self, shift: int) -> dict[int, Array]:
        """Layer -> M [D, D], float64, so that a key row k at position p becomes k · M at position p + shift.

        Layers without rotary positions have the identity.

        Raises:
            BaseModelError: the keys do not rotate: no orthogonal linear map takes them from one position to another.
        """
        if self._keys is None:
            raise BaseModelError(
                f"the base model's positions are {self.kind}, not rotary",
                "a model whose keys rotate with the position",
                "convert to a target that keeps the positions as they are",
            )
        maps = self._keys.maps(abs(shift))
        return maps if shift >= 0 else {layer: matrix.T for layer, matrix in maps.items()}

    @cached_property
    def depends_on_length(self) -> bool:
        """Whether the rotary frequencies change with the sequence length (dynamic NTK, longrope), so that a rotation
        is exact only while prompt and text stay within one regime."""
        if self.kind != "rotary" or self._keys is None:
            return False
        position, maps = 16, self._keys.maps(16)
        while position <= 2 * self._keys.longest:  # doubling meets every regime on the way
            position *= 2
            maps = {layer: matrix @ matrix for layer, matrix in maps.items()}
            try:
                moved = self._keys.misfit(position, maps)
            except (IndexError, RuntimeError):  # a table of positions that ends here, as GPT-J's: no other regime
                return False
            if moved > REGIME_TOLERANCE:
                return True
        return False


class _Keys:
    """The key cache of a small model, for many single tokens at one position."""

    def __init__(self, model: Any, head_dim: int, longest: int) -> None:
        import torch

        self.model = model
        self.longest = longest
        generator = torch.Generator().manual_seed(0)
        # Twice as many samples as unknowns per row: the system is then well conditioned.
        size = (2 * head_dim, 1, model.get_input_embeddings().embedding_dim)
        self.tokens = torch.randn(size, generator=generator, dtype=torch.float64)
        self.origin, self.values = self.at(0)
        self.maps = lru_cache(MOVES)(self._maps)

    def misfit(self, position: int, maps: dict[int, Array]) -> float:
        """How far keys at `position` are from what the maps make of those at 0, relative to the largest.

        A few tokens show it, which cost less than to measure the maps there.
        """
        import torch

        keys, _ = self.at(position, FEW)
        return max(_misfit(self.origin[n][:FEW], torch.from_numpy(maps[n]), keys[n]) for n in maps)

    def at(self, position: int, most: int | None = None) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Keys and values of all layers that have some, each [N, D], with every token, or so many, at `position`."""
        import torch

        tokens = self.tokens[:most]
        positions = torch.full((tokens.shape[0], 1), position)
        with torch.no_grad():
            cache = caches.of(self.model(inputs_embeds=tokens, position_ids=positions, use_cache=True))
        cache = getattr(cache, "self_attention_cache", cache)
        held = caches.pairs(cache)
        return {n: keys[:, 0, 0] for n, (keys, _) in held.items()}, {n: v[:, 0, 0] for n, (_, v) in held.items()}

    def _maps(self, position: int) -> dict[int, Array]:
        """Layer -> the map that takes its keys from 0 to `position`: `maps` measures the latest few once."""
        import torch

        keys, _ = self.at(position)
        maps: dict[int, Array] = {}
        found: torch.Tensor | None = None
        for layer, before in self.origin.items():
            after = keys[layer]
            # Nearly always each layer's keys turn as those of the layer before: then they are not solved for again.
            if found is not None and found.shape[0] == after.shape[1] and _misfit(before, found, after) <= ROUNDING:
                maps[layer] = found.numpy()
                continue
            found = matrix = torch.linalg.lstsq(before, after).solution
            misfit = _misfit(before, matrix, after)
            skew = float((matrix.T @ matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype)).abs().max())
            if max(misfit, skew) > TOLERANCE:
                raise BaseModelError(
                    f"keys of layer {layer} do not rotate when their token moves by {position} positions "
                    f"(misfit {misfit:.1e}, distance from orthogonal {skew:.1e})",
                    f"an orthogonal linear map, to {TOLERANCE}",
                    "convert to a target that keeps the positions as they are",
                )
            maps[layer] = matrix.numpy()
        return maps


def _misfit(before: torch.Tensor, matrix: torch.Tensor, after: torch.Tensor) -> float:
    return float((before @ matrix - after).abs().max() / after.abs().max())


def probe(config: Any) -> PositionScheme:
    """Measure the position scheme of a transformers configuration on a text model with one head per layer.

    Rotary tables depend on the head size and on the layer's number, not on the number of heads or the hidden size, so
    that the small model stays small for any base.
    """
    config = text_part(config)
    task, geometry = usual_task(config), read_geometry(config)
    try:
        model = build(_smallest(config), task, _float64(), seed=0)
    except Exception as error:  # whatever a modelling file raises, the answer is that it cannot be measured
        return PositionScheme("unknown", tellable=False, reason=f"a small model cannot be built: {error!r}")
    tellable = "position_ids" in inspect.signature(model.forward).parameters
    if any(hasattr(module, "relative_attention_bias") for module in model.modules()):
        return PositionScheme("relative", tellable=tellable)
    if not tellable:
        return PositionScheme("unknown", tellable=False, reason="the model takes no position_ids")
    try:
        if geometry.decoder is None:
            return _probe_encoder(model)
        longest = max(
            int(getattr(config, name, None) or 0)
            for name in ("max_position_embeddings", "original_max_position_embeddings", "n_positions")
        )
        keys = _Keys(model, geometry.decoder.head_dim, longest or 2048)
        return _probe_decoder(keys)
    except BaseModelError as error:
        return PositionScheme("unknown", tellable=tellable, reason=error.found)
    except Exception as error:  # as above
        return PositionScheme("unknown", tellable=tellable, reason=f"a small model cannot be run: {error!r}")


def _probe_decoder(keys: _Keys) -> PositionScheme:
    import torch

    _, values = keys.at(3)
    moved = max(
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(keys.values.values(), values.values(), strict=True)
    )
    if moved > TOLERANCE:
        return _absolute(keys.model, keys.tokens[:4, 0][None])
    maps = keys.maps(3)
    rotates = any(not np.allclose(matrix, torch.eye(len(matrix)).numpy(), atol=TOLERANCE) for matrix in maps.values())
    return PositionScheme("rotary" if rotates else "none", tellable=True, keys=keys)


def _probe_encoder(model: Any) -> PositionScheme:
    """An encoder keeps no keys to look at: absolute positions show, others cannot be told apart further."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn((1, 4, model.get_input_embeddings().embedding_dim), generator=generator, dtype=torch.float64)
    here = torch.arange(4)[None]
    with torch.no_grad():
        origin, shifted, spread = (
            model(inputs_embeds=tokens, position_ids=positions)[0] for positions in (here + 2, here + 3, 2 * here + 2)
        )
    if not torch.allclose(origin, shifted, rtol=0, atol=TOLERANCE):
        return _absolute(model, tokens)
    if torch.allclose(origin, spread, rtol=0, atol=TOLERANCE):
        return PositionScheme("none", tellable=True)
    return PositionScheme("unknown", tellable=True, reason="an encoder keeps no keys from which to read a rotation")


def _absolute(model: Any, tokens: torch.Tensor) -> PositionScheme:
    """A model of absolute positions, and its first position: position_ids that count from there mean the same as none.

    Args:
        model: a small one.
        tokens: [1, T, H], in its input.
    """
    import torch

    here = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        own = model(inputs_embeds=tokens)[0]
        for first in range(RESERVED):
            try:
                passed = model(inputs_embeds=tokens, position_ids=here + first)[0]
            except (IndexError, RuntimeError):  # the end of the table
                break
            if torch.allclose(own, passed, rtol=0, atol=TOLERANCE):
                return PositionScheme("absolute", tellable=True, first=first)
    reason = "where it counts its tokens from by itself was not found"
    return PositionScheme("absolute", tellable=False, reason=reason)


def _float64() -> Any:
    import torch

    return torch.float64


def _smallest(config: Any) -> Any:
    """The configuration with one head per layer and everything shrunk that rotary tables do not depend on."""
    config = copy.deepcopy(config)
    geometry_head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    heads = config.num_attention_heads
    head_dim = geometry_head or config.hidden_size // heads
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 1)
    config.hidden_size = head_dim
    pad = getattr(config, "pad_token_id", None)
    rows = 64 if not isinstance(pad, int) or pad >= RESERVED else max(64, pad + 1)  # it may say where positions begin
    shrink(config, vocab_size=rows, intermediate_size=32, n_inner=32, d_ff=32)
    return config
