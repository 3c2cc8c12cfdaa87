"""What no kernel may do is seen when one does it: on each vendor's GPU, for both read alike."""

import os

import pytest
import torch
import triton
import triton.language as tl

from tests.fakegpu import ARCHITECTURES, FakeGPU, Kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
)
VENDORS = "sm_90", "gfx942"


@triton.jit
def _softmax(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    x = tl.exp(x - tl.max(x, 0))
    tl.store(x_ptr + at, x / tl.sum(x, 0))


@triton.jit
def _and(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 0.0, mask=at > 0 and at < 100)


def softmax(architecture: str, n: int, first: int = 0, **options) -> Kernel:
    with FakeGPU(architecture) as gpu:
        _softmax[(1,)](torch.zeros(first + n)[first:], BLOCK=n, **options)
    (kernel,) = gpu.kernels
    return kernel


@pytest.mark.parametrize("architecture", VENDORS)
def test_spills_are_seen(architecture) -> None:
    # 256 numbers a thread, or 128 in the 64 registers that eight waves leave it
    options = {"waves_per_eu": 8} if architecture == "gfx942" else {}
    assert softmax(architecture, 32768, **options).usage["STACK"] > 0
    assert softmax(architecture, 1024).usage["STACK"] == 0


@pytest.mark.parametrize("architecture", VENDORS)
def test_narrow_loads_are_seen(architecture) -> None:
    assert softmax(architecture, 1024, first=1).wide_loads == 0
    assert softmax(architecture, 1024).wide_loads > 0


def test_a_block_with_too_many_registers_is_seen() -> None:
    # ptxas gives 512 threads the 189 registers they want, and a GPU would not launch them
    kernel = softmax("sm_90", 65536, num_warps=16, maxnreg=255)
    assert kernel.usage["STACK"] == 0
    assert kernel.registers > ARCHITECTURES["sm_90"].registers


@pytest.mark.parametrize("architecture", VENDORS)
def test_a_warning_is_an_error(architecture) -> None:
    with FakeGPU(architecture), pytest.raises(triton.CompilationError, match="'and' and 'or'"):
        _and[(1,)](torch.zeros(128), BLOCK=128)
