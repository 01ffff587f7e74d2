"""Attention in two parts: the prefix, once for all rows that share it, and each row's own keys.

Concatenation copies the prefix into every row, at every layer and step. Here the queries of all rows are one long
query to the prefix, and the two results are merged by their log-sum-exps, so that the sum is the softmax over both
(Juravsky et al. 2024, "Hydragen: High-Throughput LLM Inference with Shared Prefixes"). No mask is made for the prefix,
and where a row's own part is causal none is made at all.

Backwards, the kernel of each part is given the merged output and log-sum-exp instead of its own: then the
probabilities that it computes again are those of the whole, and so are its gradients (as in ring attention, Liu et al.
2023).

On a CPU both parts run in torch's flash kernel, which returns the log-sum-exp. Elsewhere only a single query a row
does, with the scores of both parts in one softmax: there the time goes into reading keys, and scores are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Prefixes that are shorter gain nothing: in inference with two rows each or more, with fewer, and in training.
SHARED, ALONE, TRAINED = 32, 448, 256
#: And what there is to gain with fewer is this much less for a whole call, in virtual tokens.
ONCE = 1024
SHORTEST = min(SHARED, ALONE, TRAINED)
#: But texts of so many tokens, or more, have a causal mask for what is joined, which the rows' own part does without.
TEXT = 768


@dataclass(frozen=True, eq=False)
class Group:
    """The rows that share a prefix.

    Attributes:
        keys: [K, P, D].
        values: [K, P, D].
        rows: their numbers, or None: all rows.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None


def pays(groups: Sequence[Group], query: Tensor, key: Tensor, unmasked: bool = False) -> bool:
    """Whether two parts are worth it for queries [B, heads, Q, D] and the rows' own keys [B, K, N, D].

    Where not, or not known how, they are joined.

    Args:
        groups: of rows.
        query: of all rows.
        key: of all rows.
        unmasked: whether the rows' own part is causal, and needs no mask.
    """
    if query.device.type != "cpu" and query.shape[2] > 1:
        return False
    virtual = sum(group.keys.shape[1] for group in groups)
    long = unmasked and query.shape[2] >= TEXT
    if torch.is_grad_enabled() and any(t.requires_grad for g in groups for t in (query, key, g.keys, g.values)):
        alone = len(groups) == 1 and groups[0].rows is None and query.device.type == "cpu"
        return alone and (long or virtual >= TRAINED)
    if long:
        return True
    least = SHARED * len(groups) if query.shape[0] >= 2 * len(groups) else ALONE * len(groups) + ONCE
    return virtual >= least


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    groups: Sequence[Group],
    gates: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention to each row's own keys, and to the prefixes of the groups.

    Args:
        query: [B, heads, Q, D].
        key: [B, K, N, D].
        value: [B, K, N, D].
        mask: additive, [B or 1, 1, Q or 1, N], finite.
        causal: without a mask, whether query i sees the keys up to i.
        scale: of the scores.
        groups: with no row in two of them.
        gates: what multiplies the prefix's keys and its values in each row, [B] each, where no gradient is wanted.

    Returns:
        [B, heads, Q, D].
    """
    if query.device.type != "cpu":
        return _in_one_softmax(query, key, value, mask, scale, groups, gates)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, groups[0].keys, groups[0].values)):
        times = query.shape[1] // key.shape[1]
        own = (part.repeat_interleave(times, 1) for part in (key, value))
        shared = (groups[0].keys, groups[0].values)
        merged: Tensor = _Merged.apply(query, *own, *shared, mask, causal, scale)  # type: ignore[no-untyped-call]
        return merged
    out: Tensor
    out, log = _own(query, key, value, mask, causal, scale)
    of_keys, of_values = (None, None) if gates is None else (gate[:, None, None, None] for gate in gates)
    gated = query if of_keys is None else query * of_keys  # as good as keys that are
    for group in groups:
        rows = slice(None) if group.rows is None else group.rows
        more, more_log = _shared(gated[rows], group, scale)
        more = more if of_values is None else more * of_values[rows]
        out[rows], log[rows] = _merge(out[rows], log[rows], more, more_log)
    return out


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Any:
    """Output [B, heads, Q, D] and log-sum-exp [B, heads, Q]."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return operator(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)


def _own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Any:
    rows, heads, length, width = query.shape
    if length > 1:
        return _flash(query, key, value, mask, causal, scale)
    # One query a row: the heads that share keys are queries of one head.
    folded = query.reshape(rows, key.shape[1], -1, width)
    out, log = _flash(folded, key, value, mask, False, scale)
    return out.reshape(query.shape), log.reshape(rows, heads, length)


def _fold(each: Tensor, heads: int) -> Tensor:
    """[1, K, B·(heads/K)·Q, ...] of [B, heads, Q, ...]: all rows in one."""
    rows, _, length, *rest = each.shape
    grouped = each.reshape(rows, heads, -1, length, *rest).transpose(0, 1)
    return grouped.reshape(1, heads, -1, *rest)


def _unfold(folded: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold` for queries like these [B, heads, Q, D]."""
    rows, all_heads, length, _ = like.shape
    heads, rest = folded.shape[1], folded.shape[3:]
    grouped = folded.reshape(heads, rows, all_heads // heads, length, *rest).transpose(0, 1)
    return grouped.reshape(rows, all_heads, length, *rest)


def _shared(query: Tensor, group: Group, scale: float) -> tuple[Tensor, Tensor]:
    folded = _fold(query, group.keys.shape[0])
    out, log = _flash(folded, group.keys[None], group.values[None], None, False, scale)
    return _unfold(out, query), _unfold(log, query)


def _merge(out: Tensor, log: Tensor, more: Tensor, more_log: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of both parts."""
    merged = torch.logaddexp(log, more_log)
    ours, theirs = ((part - merged).exp()[..., None] for part in (log, more_log))
    return (out * ours + more * theirs).to(out.dtype), merged


class _Merged(torch.autograd.Function):
    """`attend` for one group of all rows, with a gradient; keys and values as many as heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        own, own_log = _flash(query, key, value, mask, causal, scale)
        out, log = _merge(own, own_log, *_shared(query, Group(keys, values), scale))
        ctx.save_for_backward(query, key, value, keys, values, out, log, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, keys, values, out, log, mask = ctx.saved_tensors
        operator, heads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, keys.shape[0]
        gradient = gradient.contiguous()
        own = operator(gradient, query, key, value, out, log, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        folded = [_fold(each, heads).contiguous() for each in (gradient, query, out, log)]
        more = operator(
            folded[0], folded[1], keys[None], values[None], folded[2], folded[3], 0.0, False, scale=ctx.scale
        )
        return own[0] + _unfold(more[0], query), own[1], own[2], more[1][0], more[2][0], None, None, None


def _in_one_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    groups: Sequence[Group],
    gates: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """`attend` for one query a row, with nothing but matrix products."""
    rows, all_heads, _, width = query.shape
    heads = key.shape[1]
    each = all_heads // heads
    folded = query.reshape(rows, heads, each, width) * scale
    own = folded @ key.transpose(-1, -2)
    own = own if mask is None else own + mask
    out = torch.empty_like(query)
    for group in [*groups, *_rest(groups, rows, query.device)]:
        mine = slice(None) if group.rows is None else group.rows
        queries = folded[mine] if gates is None else folded[mine] * gates[0][mine, None, None, None]
        flat = queries.transpose(0, 1).reshape(heads, -1, width)
        scores = (flat @ group.keys.transpose(-1, -2)).reshape(heads, len(queries), each, group.keys.shape[1])
        both = torch.cat([scores.transpose(0, 1), own[mine]], dim=-1)
        probabilities = both.softmax(-1, dtype=torch.promote_types(both.dtype, torch.float32)).to(query.dtype)
        theirs, ours = torch.split(probabilities, [group.keys.shape[1], own.shape[-1]], dim=-1)
        shared = theirs.transpose(0, 1).reshape(heads, len(queries) * each, group.keys.shape[1]) @ group.values
        theirs = shared.reshape(heads, len(queries), each, width).transpose(0, 1)
        theirs = theirs if gates is None else theirs * gates[1][mine, None, None, None]
        merged = theirs + ours @ value[mine]
        out[mine] = merged.reshape(len(queries), all_heads, 1, width)
    return out


def _rest(groups: Sequence[Group], rows: int, device: torch.device) -> list[Group]:
    """The rows that are in no group, with a prefix of no tokens."""
    if any(group.rows is None for group in groups):
        return []
    mine = {row for group in groups if group.rows is not None for row in group.rows.tolist()}
    rest = torch.tensor([row for row in range(rows) if row not in mine], dtype=torch.long, device=device)
    nothing = groups[0].keys[:, :0]
    return [Group(nothing, nothing, rest)] if len(rest) else []
