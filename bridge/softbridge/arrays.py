"""Between NumPy and torch, bit for bit, bfloat16 included. The only place where the two meet."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from softbridge.mapped import let_go

if TYPE_CHECKING:
    import torch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_torch(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on the CPU with the array's values, in its own memory; converted to `dtype` if one is given.

    That memory is torch's, which is aligned, as numpy's is not: the order in which a product is summed, and so the last
    bit of what a parameterisation makes, may depend on that.
    """
    import torch

    plain = array.view(np.uint16) if array.dtype == BFLOAT16 else array
    tensor = torch.empty(plain.shape, dtype=torch.from_numpy(np.empty(0, plain.dtype)).dtype)
    np.copyto(tensor.numpy(), plain)
    tensor = tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor
    return tensor if dtype is None else tensor.to(dtype)


def torch_window(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor on the array's own memory if it lies there in row order, to be saved and not to be written to."""
    import torch

    plain = np.ascontiguousarray(array).reshape(array.shape)
    plain = plain.view(np.uint16) if array.dtype == BFLOAT16 else plain
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # as nobody will
        tensor = torch.from_numpy(plain)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def from_torch(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """An array with the tensor's values, in its own memory."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.array(tensor.view(torch.uint16).numpy()).view(BFLOAT16)
    return np.array(tensor.numpy())


Array: TypeAlias = npt.NDArray[Any]


def frozen(array: npt.ArrayLike) -> Array:
    """A read-only view of `array` (which itself is not touched)."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


#: Passes over numbers go by windows of so many bytes where they lie (what is made of one stays in the processor's
#: cache, and of a mapped file little counts as memory), and by pieces of so many where they are put in order.
_BLOCK, PIECE = 2**18, 2**21


def _blocks(array: Array, most: int) -> Iterator[Array]:
    """Windows on an array that are at most so large, along its axes in turn."""
    if array.nbytes <= most or array.ndim == 0:
        if array.size:
            yield array
            let_go(array)
    elif len(array) == 1:
        yield from _blocks(array[0], most)
    else:
        rows = max(1, len(array) * most // array.nbytes)
        for at in range(0, len(array), rows):
            yield from _blocks(array[at : at + rows], most)


def pieces(array: Array) -> Iterator[memoryview]:
    """The bytes of an array in row order, some at a time: a window where they lie in that order, or else a copy."""
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    for block in _blocks(array, PIECE):
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data


def blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Windows on arrays of one shape, the same of each, that cover them in the order in which the last lies in memory.

    Whoever wants all numbers, in whatever order, so reads each stretch of memory once.
    """
    strides = arrays[-1].strides
    order = sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))
    yield from zip(*(_blocks(array.transpose(order), _BLOCK) for array in arrays), strict=True)


def same_array(a: Array, b: Array) -> bool:
    """Equality of dtype, shape and every bit (so NaN equals NaN, and 0.0 differs from -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(_same_bits(*both) for both in blocks(a, b))


def _same_bits(a: Array, b: Array) -> bool:
    if a.itemsize not in (1, 2, 4, 8):
        return a.tobytes() == b.tobytes()
    bits = np.dtype(f"u{a.itemsize}")
    return bool((a.view(bits) == b.view(bits)).all())


def same_arrays(a: Mapping[Any, Array], b: Mapping[Any, Array]) -> bool:
    """Equality of names and of every bit; see `same_array`."""
    return a.keys() == b.keys() and all(same_array(a[name], b[name]) for name in a)


def shapes_of(arrays: Mapping[str, Array]) -> str:
    """Names and shapes, as text."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
