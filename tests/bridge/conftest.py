"""What the tests of foreign bytes share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softbridge.errors import CheckpointError
from softbridge.untrusted import Files


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], Files]:
    """opened(content): the content as a file named 'file'."""

    def opened(content: bytes) -> Files:
        (tmp_path / "file").write_bytes(content)
        return Files(tmp_path / "file")

    return opened


@pytest.fixture
def refused() -> Callable[..., CheckpointError]:
    """refused(call, words): the call raises a CheckpointError that has all its parts, with these words."""

    def refused(call: Callable[[], Any], words: str = "") -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            call()
        error = caught.value
        assert all(isinstance(part, str) and part for part in (error.found, error.expected, error.remedy))
        assert words in error.found, error.found
        assert len(str(error)) < 2000
        return error

    return refused
