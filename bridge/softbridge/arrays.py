"""Between NumPy and torch, bit for bit, bfloat16 included. The only place where the two meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

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


#: Arrays are compared in pieces of so many bytes: a piece that is no window on one stretch of memory is copied.
_CHUNK = 2**20


def same_array(a: Array, b: Array) -> bool:
    """Equality of dtype, shape and every bit (so NaN equals NaN, and 0.0 differs from -0.0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.nbytes <= _CHUNK or a.ndim == 0:
        return a.tobytes() == b.tobytes()
    if len(a) == 1:
        return same_array(a[0], b[0])
    rows = max(1, len(a) * _CHUNK // a.nbytes)
    return all(same_array(a[at : at + rows], b[at : at + rows]) for at in range(0, len(a), rows))


def same_arrays(a: Mapping[Any, Array], b: Mapping[Any, Array]) -> bool:
    """Equality of names and of every bit; see `same_array`."""
    return a.keys() == b.keys() and all(same_array(a[name], b[name]) for name in a)


def shapes_of(arrays: Mapping[str, Array]) -> str:
    """Names and shapes, as text."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
