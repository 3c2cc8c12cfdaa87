"""Every kernel compiles for the GPUs we name, and fits their registers. No GPU is needed."""

import os
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from tests.fakegpu import SHARED_MEMORY, FakeGPU
from tetrad.kernels.logprob import token_logprobs

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
    ),
    pytest.mark.parametrize("architecture", SHARED_MEMORY),
]
half, single = torch.bfloat16, torch.float32


def real(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def tokens(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


# A call per op and per way through it that compiles differently. 128256 columns are aligned for
# loads of 128 bits, 50257 are not.
CALLS: dict[str, Callable[[], object]] = {
    "token_logprobs": lambda: token_logprobs(real(8, 128256, dtype=half), tokens(8)),
    "token_logprobs-entropy": lambda: token_logprobs(
        real(8, 50257, dtype=single), tokens(8), entropy=True, temperature=torch.ones(8)
    ),
    "token_logprobs-strided": lambda: token_logprobs(
        real(4, 6, 7, dtype=half).mT, tokens(28).view(4, 7)
    ),
}


def differentiable(outputs: object) -> Iterable[Tensor]:
    if isinstance(outputs, Tensor) and outputs.requires_grad:
        yield outputs
    elif isinstance(outputs, (tuple, dict)):
        for output in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from differentiable(output)


@pytest.mark.parametrize("call", CALLS)
def test_compiles_without_spills(call, architecture) -> None:
    with FakeGPU(architecture) as gpu:
        outputs = list(differentiable(CALLS[call]()))
        forward = len(gpu.kernels)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert 0 < forward < len(gpu.kernels)
    for kernel in gpu.kernels:
        assert kernel.usage["STACK"] == 0, f"{kernel.name} spills: {kernel.usage}"


def test_logits_are_loaded_128_bits_at_a_time(architecture) -> None:
    with FakeGPU(architecture) as gpu:
        CALLS["token_logprobs"]().sum().backward()
    for name in "_forward", "_backward":
        (kernel,) = [kernel for kernel in gpu.kernels if kernel.name == name]
        assert ".128" in " ".join(line for line in kernel.sass.splitlines() if "LDG" in line)
