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


@triton.jit
def _sum(x_ptr, n, scale, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n):
        total = 0.5 * total + tl.load(at)
    if scale > 0:
        total = tl.exp2(total)
    tl.store(at, total)


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
def test_narrow_loads_and_stores_are_seen(architecture) -> None:
    narrow, wide = softmax(architecture, 1024, first=1), softmax(architecture, 1024)
    assert narrow.wide_loads == narrow.wide_stores == 0
    assert wide.wide_loads > 0 and wide.wide_stores > 0


def test_a_block_with_too_many_registers_is_seen() -> None:
    # ptxas gives 512 threads the 189 registers they want, and a GPU would not launch them
    kernel = softmax("sm_90", 65536, num_warps=16, maxnreg=255)
    assert kernel.usage["STACK"] == 0
    assert kernel.registers > ARCHITECTURES["sm_90"].registers


@pytest.mark.parametrize("architecture", VENDORS)
def test_a_warning_is_an_error(architecture) -> None:
    with FakeGPU(architecture), pytest.raises(triton.CompilationError, match="'and' and 'or'"):
        _and[(1,)](torch.zeros(128), BLOCK=128)


def test_instructions_of_loops_and_ways_are_counted() -> None:
    """Of twice the numbers a thread a loop is about twice as long; a branch is seen."""
    with FakeGPU("sm_90") as gpu:
        for block in 4096, 8192:  # ptxas unrolls a shorter loop
            _sum[(1,)](torch.zeros(8192), 5, 1.0, BLOCK=block)
    narrow, wide = gpu.kernels
    assert len(narrow.loops) == len(wide.loops) == 1
    assert 1.6 < wide.loops[0] / narrow.loops[0] < 2.2
    skips, takes = narrow.shortest_way("STG.E.128"), narrow.shortest_way("MUFU.EX2")
    assert skips < takes <= len(narrow.instructions)
    with pytest.raises(ValueError, match="no way of _sum meets HGMMA"):
        narrow.shortest_way("HGMMA")
