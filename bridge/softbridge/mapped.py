"""Files of our own, looked at in memory without being there: what a check of written files is made on."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

#: Linux brings in up to this many bytes around the one that is looked at: as many as it keeps of a file together.
_AROUND = 2**21


class Mapped(mmap.mmap):
    """A file that this process has just written, as memory that cannot be written to.

    Only such a file: of somebody else's, another process could change the numbers behind an array's back, or cut the
    file off, which ends this process. Its pages count as this process's memory from when they are looked at until
    `let_go`.
    """

    address: int

    @classmethod
    def of(cls, descriptor: int, size: int) -> Mapped:
        """A map of an open file of `size` bytes, at least one. It outlives the descriptor."""
        made = cls(descriptor, size, access=mmap.ACCESS_READ)
        made.address = np.frombuffer(made, np.uint8).__array_interface__["data"][0]
        return made


def let_go(array: npt.NDArray[Any]) -> None:
    """Have the pages of an array no longer count as memory, if it lies in a `Mapped`; it stays as it is.

    They are brought back when somebody looks again. Of any other array, nothing is done.
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, Mapped):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    if owner is None or not array.size or not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = array.__array_interface__["data"][0] - owner.address
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    low = max(0, begin + sum(step for step in reach if step < 0) - _AROUND)
    high = begin + sum(step for step in reach if step > 0) + array.itemsize + _AROUND
    low -= low % mmap.PAGESIZE
    high = min(high, len(owner))
    owner.madvise(mmap.MADV_DONTNEED, low, high - low)
