"""Matrix products summed in fp32, laid out and cut in the way that cuBLAS is fast.

With GPT-2's 50257 columns a product takes five to eight times as long as with 50304 (H200): cuBLAS
asks that rows begin at multiples of 16 bytes, and that what lies side by side in memory be so long.
So rows are kept apart by a multiple of ALIGNMENT numbers, and a length that is no multiple of EVEN
is taken in two: 50256 and 1.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

ALIGNMENT = 64  # numbers: a cache line of the 2-byte types, two of fp32
EVEN = 8  # numbers: 16 bytes of the 2-byte types


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (rows, columns), the first columns of a matrix whose rows are aligned.

    Rows of 50257 numbers start anywhere: cuBLAS then loads and stores them piecemeal.
    """
    width = -(-columns // ALIGNMENT) * ALIGNMENT
    return torch.empty(rows, width, dtype=dtype, device=device)[:, :columns]


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in fp32 and left in the type of out; out's rows may lie apart."""

    def put(out: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        elif a.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.float(), b.float(), out=out)

    _in_even_parts(put, _add, out, a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """total += factor * a @ b in fp32, in place: no product of total's size beside it."""
    put = partial(_add, factor=factor)
    _in_even_parts(put, put, total, a, b)


def _add(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    if a.dtype != total.dtype and a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=factor)


def _in_even_parts(put: Callable, add: Callable, out: Tensor, a: Tensor, b: Tensor) -> None:
    """put(out, a, b), in two if a dimension along which a matrix lies in memory is no multiple of
    EVEN: the second with what is left; `add` where that belongs to the same numbers."""
    (M, K), N = a.shape, b.shape[1]
    rows, columns, depth = (n - n % EVEN if n > EVEN else n for n in (M, N, K))
    if columns < N:  # rows of out are contiguous, or rows of b
        _in_even_parts(put, add, out[:, :columns], a, b[:, :columns])
        _in_even_parts(put, add, out[:, columns:], a, b[:, columns:])
    elif rows < M and a.stride(0) == 1:
        _in_even_parts(put, add, out[:rows], a[:rows], b)
        _in_even_parts(put, add, out[rows:], a[rows:], b)
    elif depth < K and out.dtype == torch.float32 and 1 in (a.stride(1), b.stride(0)):
        put(out, a[:, :depth], b[:depth])
        add(out, a[:, depth:], b[depth:])  # a coarser type would be rounded twice
    else:
        put(out, a, b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and left in fp32, in aligned rows. Not differentiable."""
    product = aligned(len(a), b.shape[1], torch.float32, a.device)
    write_product(product, a, b)
    return product
