"""Another processor, as far as sums go: products whose order of summation hangs on shapes, strides and alignment.

Each library picks its order by the processor. Two runs that make the same calls on the same shapes agree bit for bit on
every one, and nothing else need do so on any. Here no two shapes are summed alike, so that a test which claims more
than that fails on every machine. `SOFTBRIDGE_PROCESSOR=another` asks for it (see conftest.py).
"""

from __future__ import annotations

import warnings
import zlib

import torch
from torch import Tensor

#: What replaces torch's own kernels for as long as the process lives.
_KERNELS = torch.library.Library("aten", "IMPL")


def _place(length: int, *told: object) -> int:
    """Where a sum of `length` terms is cut in two, 1 to length - 1."""
    return 1 + zlib.crc32(repr(told).encode()) % (length - 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] by [..., K, N], as two products."""
    multiply = torch.ops.aten.mm.out if a.ndim == 2 else torch.ops.aten.bmm.out

    def part(terms: slice) -> Tensor:
        made: Tensor = multiply(a[..., terms], b[..., terms, :], out=a.new_empty((*a.shape[:-1], b.shape[-1])))
        return made

    if a.shape[-1] < 2 or not a.is_floating_point():
        return part(slice(None))
    cut = _place(a.shape[-1], *((t.shape, t.stride(), t.data_ptr() % 64) for t in (a, b)))
    return part(slice(cut)).add_(part(slice(cut, None)))


def _added(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if c.dtype != a.dtype:  # which torch's own refuse
        raise RuntimeError(f"self and mat1 must have the same dtype, but got {c.dtype} and {a.dtype}")
    made = _product(a, b) * alpha
    return made if beta == 0 else made + c * beta


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    powers = (x - x.amax(dim, keepdim=True)).exp()
    length = x.shape[dim]
    if length < 2:
        return powers / powers.sum(dim, keepdim=True)
    cut = _place(length, x.shape)
    parts = powers.narrow(dim, 0, cut), powers.narrow(dim, cut, length - cut)
    return powers / (parts[0].sum(dim, keepdim=True) + parts[1].sum(dim, keepdim=True))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that they are replaced
    for _name, _kernel in {
        "mm": _product,
        "bmm": _product,
        "addmm": _added,
        "baddbmm": _added,
        "_softmax": _softmax,
    }.items():
        _KERNELS.impl(_name, _kernel, "CPU")
# Its kernel for CPUs multiplies inside.
torch.backends.cuda.enable_flash_sdp(False)
