"""Shared by all tests: the device they run on and what "as exact as PyTorch" means."""

import os
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # before any kernel is imported: what Triton is, is settled at its import
    from tests.kernels import interpreter

    interpreter.install()

if not torch.cuda.is_available():
    # Autograd's first backward starts a thread for each device, and forked ranks would miss them.
    # Where there is no GPU a PyTorch built for CUDA counts none, but one after torch.compile.
    torch.ones((), requires_grad=True).backward()


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU under Triton's interpreter."""
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("kernels need a GPU, or TRITON_INTERPRET=1")
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> None:
    """A seed of its own for each test, and `torch.empty` filled with NaN: no result by luck."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(scope="session")
def assert_as_exact() -> Callable[..., None]:
    """Compare a kernel to float64 truth, allowing twice what plain PyTorch errs in the same dtype.

    The rule of flash-attention's tests: it needs no tolerance per dtype, and it tightens by itself
    where PyTorch is exact.
    """

    def check(kernel: Tensor, plain: Tensor, truth: Tensor, floor: float = 2e-6) -> None:
        assert truth.dtype == torch.float64 and kernel.dtype == plain.dtype
        assert kernel.shape == truth.shape and torch.isfinite(kernel).all()
        if truth.numel() == 0:
            return
        error = (kernel.double() - truth).abs().max().item()
        allowed = 2 * (plain.double() - truth).abs().max().item() + floor
        assert error <= allowed, f"kernel errs by {error:.2e}, allowed are {allowed:.2e}"

    return check
