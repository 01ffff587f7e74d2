"""The mask of a call with virtual tokens, made in the short way, against one put together column by column."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softbridge.prompt import InputPrompt, Placement
from softbridge_native.input_prompt import Vectors
from softbridge_native.layout import extended, layout

PLACEMENTS = [placement for placement in get_args(Placement) if placement != "template"]


def by_hand(row: list[int], length: int, placement: Placement) -> list[int]:
    """A row's pads on the left, its first token where that comes first, its virtual tokens, and the rest."""
    pads = row.index(1) if 1 in row else len(row)
    front = min(pads + (placement == "after-first-token"), len(row))
    return row[:front] + [1] * length + row[front:]


@pytest.mark.parametrize("placement", PLACEMENTS)
@given(
    rows=st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=1)),
    length=st.integers(1, 5),
    dtype=st.sampled_from([torch.long, torch.bool, torch.float32]),
)
def test_a_mask_with_virtual_tokens(
    placement: Placement, rows: list[list[int]], length: int, dtype: torch.dtype
) -> None:
    part = InputPrompt(torch.zeros(length, 2).numpy(), "decoder", placement=placement)
    vectors, mask = Vectors(part, torch.device("cpu"), made=False), torch.tensor(rows, dtype=dtype)
    found = extended(vectors, mask)
    expected = torch.tensor([by_hand(row, length, placement) for row in rows], dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(layout(vectors, mask).mask(mask), expected)
    other: Tensor = found.roll(1, -1)
    assert torch.equal(other, expected) == bool((expected == expected[:, :1]).all())
