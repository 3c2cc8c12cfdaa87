"""Every kernel compiles for the GPUs we name, and fits their registers. No GPU is needed."""

import os
import re
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from tests.fakegpu import ARCHITECTURES, FakeGPU
from tetrad.kernels import check, linear_logprob
from tetrad.kernels.advantages import gae, ppo_advantages, whiten
from tetrad.kernels.exact_kl import exact_kl, linear_exact_kl
from tetrad.kernels.kl import token_kl
from tetrad.kernels.linear_logprob import linear_token_logprobs
from tetrad.kernels.linear_loss import linear_cross_entropy, linear_policy_loss
from tetrad.kernels.logprob import token_logprobs
from tetrad.kernels.ppo_loss import policy_loss, value_loss
from tetrad.kernels.ranking import ranking_loss

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled"
    ),
    pytest.mark.parametrize("architecture", ARCHITECTURES),
]
PATIENCE = 20  # seconds for a kernel that takes one; what spills can take minutes
half, single = torch.bfloat16, torch.float32


def real(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def tokens(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def padded(n: int) -> Iterable[Tensor]:
    return (torch.zeros(8, 4096) for _ in range(n))


def packed(n: int) -> Iterable[Tensor]:
    return (torch.zeros(8 * 4096) for _ in range(n))


def bounds() -> Tensor:
    return torch.arange(9) * 4096


def mask() -> Tensor:
    return torch.zeros(8, 4096, dtype=torch.bool)


@pytest.fixture(autouse=True)
def many_rows_too(monkeypatch) -> None:
    """The fused product compiles whether or not it is the one that is chosen."""
    monkeypatch.setattr(linear_logprob, "FUSED_ROWS", 10**6)


# A call per op and per way through it that compiles differently. 128256 columns are aligned for
# loads of 128 bits, 50257 are not.
CALLS: dict[str, Callable[[], object]] = {
    "token_logprobs": lambda: token_logprobs(real(8, 128256, dtype=half), tokens(8)),
    "token_logprobs-entropy": lambda: token_logprobs(
        real(8, 50257, dtype=single), tokens(8), entropy=True, temperature=torch.ones(8)
    ),
    "token_logprobs-5000": lambda: token_logprobs(
        real(8, 5000, dtype=half), tokens(8), entropy=True
    ),
    "token_logprobs-fp32": lambda: token_logprobs(real(8, 32000), tokens(8)),
    "token_logprobs-strided": lambda: token_logprobs(
        real(4, 6, 7, dtype=half).mT, tokens(28).view(4, 7)
    ),
    "linear_token_logprobs": lambda: linear_token_logprobs(
        real(8, 64, dtype=half), real(1024, 64, dtype=half), tokens(8), entropy=True
    ),
    "linear_token_logprobs-save_logits": lambda: linear_token_logprobs(
        real(8, 64), real(1000, 64), tokens(8), bias=real(1000), save_logits=True
    ),
    "linear_cross_entropy": lambda: linear_cross_entropy(
        real(8, 64, dtype=half), real(1024, 64, dtype=half), tokens(8)
    ),
    "linear_policy_loss": lambda: linear_policy_loss(
        real(8, 64, dtype=half), real(1024, 64, dtype=half), tokens(8), *(torch.zeros(2, 8)),
        mask=mask()[0, :8],
    ),
    **{
        f"linear_token_logprobs-{dtype}-{d}{suffix}": lambda dtype=dtype, d=d, options=options: (
            linear_token_logprobs(
                torch.zeros(300, d, dtype=dtype), torch.zeros(5000, d, dtype=dtype),
                tokens(300), **options,
            )
        )
        for dtype, d in ((half, 4096), (half, 100), (single, 4096), (single, 100))
        for suffix, options in {
            "": {},
            "-entropy": {
                "entropy": True, "temperature": torch.ones(300),
                "bias": torch.zeros(5000, dtype=dtype),
            },
        }.items()
    },
    "exact_kl": lambda: exact_kl(real(8, 5000, dtype=half), torch.zeros(8, 5000, dtype=half)),
    "exact_kl-strided": lambda: exact_kl(
        real(8, 50257), torch.zeros(8, 2 * 50257)[:, ::2], mask=mask()[0, :8],
        temperature=torch.ones(8),
    ),
    "linear_exact_kl": lambda: linear_exact_kl(
        real(8, 64, dtype=half), real(1024, 64, dtype=half), torch.zeros(8, 32),
        torch.zeros(1024, 32),
    ),
    **{
        f"token_kl-{estimator}": lambda estimator=estimator: token_kl(
            real(4096), real(4096, dtype=half), estimator=estimator
        )
        for estimator in check.ESTIMATORS
    },
    "gae": lambda: gae(*padded(2), mask()),
    "gae-packed": lambda: gae(
        *packed(2), mask().view(-1), cu_seqlens=bounds(), bootstrap=torch.zeros(8),
        mask_mode="decay",
    ),
    "gae-gammas": lambda: gae(
        *padded(2), mask(), gamma=torch.zeros(8), lam=torch.zeros(8, dtype=half)
    ),
    "whiten": lambda: whiten(torch.zeros(100), mask().view(-1)[:100], unbiased=True),
    "ppo_advantages": lambda: ppo_advantages(torch.zeros(8), *padded(3), mask(), kl_coef=0.1),
    "ppo_advantages-packed": lambda: ppo_advantages(
        torch.zeros(8), *packed(3), mask().view(-1), kl_coef=0.1, estimator="k3",
        whiten_rewards=True, cu_seqlens=bounds().int(),
    ),
    "policy_loss": lambda: policy_loss(real(8, 4096), *padded(2), mask(), dual_clip=3.0),
    "policy_loss-sequences": lambda: policy_loss(
        real(8, 4096), *padded(2), mask(), aggregation="sequence-mean", denominator=tokens(1)[0] + 1
    ),
    "value_loss": lambda: value_loss(real(8, 4096, dtype=half), *padded(2), mask()),
    "value_loss-packed": lambda: value_loss(
        real(8 * 4096), *packed(2), mask().view(-1), aggregation="sequence-mean",
        cu_seqlens=bounds(),
    ),
    "policy_loss-fp64": lambda: policy_loss(
        real(8, 64, dtype=torch.float64), *(torch.zeros(2, 8, 64)), mask()[:, :64], dual_clip=3.0
    ),
    "value_loss-fp64": lambda: value_loss(
        real(8, 64, dtype=torch.float64), *(torch.zeros(2, 8, 64)), mask()[:, :64]
    ),
    "token_kl-fp64": lambda: token_kl(
        real(64, dtype=torch.float64), torch.zeros(64), estimator="k3"
    ),
    "ppo_advantages-fp64": lambda: ppo_advantages(
        torch.zeros(8).double(), *padded(3), mask(), kl_coef=0.1, whiten_rewards=True
    ),
    "ranking_loss-fp64": lambda: ranking_loss(
        real(64, dtype=torch.float64), tokens(64), torch.arange(9) * 8
    ),
    "ranking_loss": lambda: ranking_loss(real(8 * 4096), tokens(8 * 4096), bounds()),
    "ranking_loss-denominator": lambda: ranking_loss(
        real(8 * 4096, dtype=half), tokens(8 * 4096).int(), bounds().int(),
        denominator=torch.ones(()),
    ),
}  # fmt: skip


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
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert gpu.kernels
    for kernel in gpu.kernels:
        assert kernel.usage["STACK"] == 0, f"{kernel.name} spills: {kernel.usage}"
        assert kernel.registers <= gpu.architecture.registers, f"{kernel.name}: {kernel.usage}"
        assert kernel.seconds < PATIENCE, f"{kernel.name} compiles for {kernel.seconds:.0f} s"


@pytest.mark.parametrize("call", ["token_logprobs", "token_logprobs-5000", "exact_kl"])
def test_logits_are_loaded_128_bits_at_a_time(call, architecture) -> None:
    """Also where V is a multiple of 8 and not of 16, as 5000 is."""
    with FakeGPU(architecture) as gpu:
        outputs = list(differentiable(CALLS[call]()))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for name in "_forward", "_backward":
        (kernel,) = [kernel for kernel in gpu.kernels if kernel.name == name]
        assert kernel.wide_loads > 0


@pytest.mark.parametrize("dtype", [half, single], ids=str)
def test_an_odd_vocabulary_in_padded_rows_is_moved_128_bits_at_a_time(dtype, architecture) -> None:
    """All but the last block of 50257 columns: rows are 50304 apart, and begin where loads do."""
    with FakeGPU(architecture) as gpu:
        logits = (1 * real(8, 50304, dtype=dtype))[:, :50257]
        token_logprobs(logits, tokens(8), inplace_backward=True).sum().backward()
    (forward,) = [kernel for kernel in gpu.kernels if kernel.name == "_forward"]
    (backward,) = [kernel for kernel in gpu.kernels if kernel.name == "_backward"]
    assert forward.wide_loads > 0
    assert backward.wide_loads > 0 and backward.wide_stores > 0


def test_the_fused_product_uses_tensor_cores_and_wide_loads(architecture) -> None:
    with FakeGPU(architecture) as gpu:
        CALLS[f"linear_token_logprobs-{half}-4096"]()
    (kernel,) = [kernel for kernel in gpu.kernels if kernel.name == "_fused"]
    assert re.search("HMMA|HGMMA|UTC.?MMA|mfma", kernel.listing)
    assert re.search(r"LDGSTS.*128|UTMALDG|dwordx4", kernel.listing)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_row_kernels_take_few_instructions(entropy, architecture) -> None:
    """Per element of bf16 rows of a multiple of 8 columns; what a predicate guards is counted.

    A block of 4096 columns is walked by 4 warps, so a lane has 32 elements, and what a warp issues
    for its block, over 32, is instructions an element. An H200 reads an element for forward in the
    time of 16 of them, for backward, which also writes one, in that of 31.

    Forward has two loops: over blocks that are whole and without the token, and over the others,
    two of a row at most. The bar stands for the first, and for all that a program of 16 whole
    blocks, one with the token, issues. Backward has none: the bar stands for all that a program
    issues whose block is whole, without the token, and wanted: the shortest way that meets a load
    of logits. With the entropy there is no bar but that of the hardware.
    """
    if "sm" not in architecture:
        pytest.skip("NVIDIA's listings are read")
    with FakeGPU(architecture) as gpu:
        outputs = token_logprobs(real(8, 128256, dtype=half), tokens(8), entropy=entropy)
        outputs = list(differentiable(outputs))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (forward,) = [kernel for kernel in gpu.kernels if kernel.name == "_forward"]
    (backward,) = [kernel for kernel in gpu.kernels if kernel.name == "_backward"]
    plain, special = forward.loops
    outside = len(forward.instructions) - plain - special
    whole = 15 * plain + special + outside
    way = backward.shortest_way("LDG.E.128")
    assert plain <= 32 * (16 if entropy else 10)
    assert whole <= 16 * 32 * (16 if entropy else 10)
    assert way <= 32 * (31 if entropy else 15)


@pytest.mark.parametrize("dtype", [half, torch.float16], ids=str)
@pytest.mark.parametrize("V", [50257, 128256])
def test_256_columns_of_the_fused_product_fit_a_hopper(V, dtype, architecture) -> None:
    """They take all 255 registers of a thread: with a bias, with temperatures, masked or not."""
    if architecture != "sm_90":
        pytest.skip("of sm_90 alone")
    hidden, weight = torch.zeros(300, 4096, dtype=dtype), torch.zeros(V, 4096, dtype=dtype)
    with FakeGPU(architecture) as gpu:
        for bias in None, torch.zeros(V, dtype=dtype):
            for temperature in 1.0, torch.ones(300):
                linear_token_logprobs(
                    hidden, weight, tokens(300), bias=bias, temperature=temperature
                )
    kernels = [kernel for kernel in gpu.kernels if kernel.name == "_fused"]
    assert len(kernels) == 4
    for kernel in kernels:
        assert kernel.usage["STACK"] == 0
        assert kernel.registers <= gpu.architecture.registers
        assert "HGMMA.64x256x16" in kernel.listing
