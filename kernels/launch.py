"""Where an op runs (Triton on a GPU or interpreted, else the reference) and in what blocks."""

import os

import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton does: fixed at import
MAX_BLOCK = 4096  # columns: 32 per thread of 4 warps; wider blocks spill registers


def runs_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel can run on `x`: it is on a GPU, or Triton is interpreted."""
    return x.is_cuda or INTERPRETED


def row_block(n_columns: int) -> int:
    """Columns per block, a power of two, for 4 warps that walk rows of `n_columns`."""
    return min(max(triton.next_power_of_2(n_columns), 128), MAX_BLOCK)
