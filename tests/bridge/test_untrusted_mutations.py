"""Every reader, given a valid file with a few changes, reads it or refuses it with a typed error; nothing else.

Where a digest covers a file, what is read is the prompt that was there before. In the long profile a thousand changes
of each format: 33,000 in all.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import altered, hold
from specimens import specimens

from softbridge.plugin.registry import formats

FORMATS = sorted(formats())
EACH = max(12, settings().max_examples // 10)
OUTCOMES: dict[str, dict[str, int]] = {}


def test_every_format_has_a_specimen() -> None:
    assert {one.format for one in specimens().values()} == set(FORMATS)


def test_specimens_are_read_as_they_are() -> None:
    for one in specimens().values():
        assert hold(one, one.files) == ("read" if one.prompt is not None else "BaseModelError"), one.name


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=EACH)
@given(data=st.data())
def test_changed_files(form: str, data: st.DataObject) -> None:
    mine = [one for one in specimens().values() if one.format == form]

    def pick(count: int) -> int:
        return data.draw(st.integers(0, count - 1))

    one = mine[pick(len(mine))]
    files = altered(one, pick, specimens())
    outcome = hold(one, files)
    found = OUTCOMES.setdefault(form, {})
    found[outcome] = found.get(outcome, 0) + 1


def test_some_changes_are_read_and_some_refused() -> None:
    """Else the changes would be too large, or too small, to show anything."""
    total = {
        outcome: sum(found.get(outcome, 0) for found in OUTCOMES.values()) for outcome in ("read", "CheckpointError")
    }
    if sum(total.values()) < 50:
        pytest.skip("the changes were made in another process")
    assert min(total.values()) > sum(total.values()) / 20, OUTCOMES
