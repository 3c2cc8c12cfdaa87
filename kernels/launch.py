"""Where an op runs: Triton on GPU tensors or under its interpreter, the reference on other tensors."""

import os

from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton does: fixed at import


def runs_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel can run on `x`: it is on a GPU, or Triton is interpreted."""
    return x.is_cuda or INTERPRETED
