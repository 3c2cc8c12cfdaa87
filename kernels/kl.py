"""Per-token estimates of the KL divergence, from the log-probabilities of the sampled tokens.

    forward     d = log p - log q;  k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d|
    backward    slope = 1, d, 1 - exp(-d), sign(d);  dlog p = g * slope = -dlog q

One launch each way, no block talks to another. Bytes per token with fp32 inputs: 12 forward (two
reads, one write), 16 or 20 backward. Nothing is saved but the inputs.
Meaning: `reference.token_kl`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetrad.kernels import reference
from tetrad.kernels.launch import runs_kernel

BLOCK = 1024  # tokens a program
_MAX_LOG_RATIO = tl.constexpr(reference.MAX_LOG_RATIO)


def _real_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic: fp64 when any input is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


@triton.jit
def _expm1_minus(x):
    """exp(x) - 1 - x. Its two leading terms cancel near 0, where the series is exact."""
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 120 + x * (1 / 720 + x * series)
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1 - x)


@triton.jit
def _kl(d, ESTIMATOR: tl.constexpr):
    """The estimate from d = log p - log q."""
    if ESTIMATOR == "k2":
        d = 0.5 * d * d
    elif ESTIMATOR == "abs":
        d = tl.abs(d)
    elif ESTIMATOR == "k3":
        x = tl.minimum(-d, _MAX_LOG_RATIO, propagate_nan=tl.PropagateNan.ALL)
        d = _expm1_minus(x) + (x + d)  # x + d is 0 below the clamp
    return d


@triton.jit
def _slope(d, ESTIMATOR: tl.constexpr):
    """Derivative of the estimate by d."""
    if ESTIMATOR == "k1":
        d = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == "abs":
        d = (d > 0).to(d.dtype) - (d < 0).to(d.dtype)
    elif ESTIMATOR == "k3":
        d = tl.where(d < -_MAX_LOG_RATIO, 1.0, d - _expm1_minus(-d))
    return d


@triton.jit
def _forward(
    logprobs_ptr,  # (n,) float
    ref_ptr,  # (n,) float
    kl_ptr,  # (n,) fp32 or fp64, out
    n,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = kl_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logprobs = tl.load(logprobs_ptr + at, mask=at < n, other=0).to(REAL)
    ref = tl.load(ref_ptr + at, mask=at < n, other=0).to(REAL)
    tl.store(kl_ptr + at, _kl(logprobs - ref, ESTIMATOR), mask=at < n)


@triton.jit
def _backward(
    dkl_ptr,  # (n,) fp32 or fp64
    logprobs_ptr,  # (n,) float
    ref_ptr,  # (n,) float
    dlogprobs_ptr,  # (n,) as logprobs, out; None when not wanted
    dref_ptr,  # (n,) as ref, out; None when not wanted
    n,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = dkl_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    logprobs = tl.load(logprobs_ptr + at, mask=at < n, other=0).to(REAL)
    ref = tl.load(ref_ptr + at, mask=at < n, other=0).to(REAL)
    dkl = tl.load(dkl_ptr + at, mask=at < n, other=0)
    gradient = dkl * _slope(logprobs - ref, ESTIMATOR)
    if dlogprobs_ptr is not None:
        tl.store(dlogprobs_ptr + at, gradient, mask=at < n)
    if dref_ptr is not None:
        tl.store(dref_ptr + at, -gradient, mask=at < n)


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
        logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
        kl = torch.empty_like(logprobs, dtype=_real_dtype(logprobs, ref_logprobs))
        n = kl.numel()
        if n:
            grid = (triton.cdiv(n, BLOCK),)
            _forward[grid](logprobs, ref_logprobs, kl, n, ESTIMATOR=estimator, BLOCK=BLOCK)
        ctx.save_for_backward(logprobs, ref_logprobs)
        ctx.estimator = estimator
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, dkl: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs = ctx.saved_tensors
        dlogprobs, dref = (
            torch.empty_like(x) if wanted else None
            for x, wanted in zip(inputs, ctx.needs_input_grad[:2], strict=True)
        )
        n = dkl.numel()
        if n:
            grid = (triton.cdiv(n, BLOCK),)
            _backward[grid](
                dkl.contiguous(), *inputs, dlogprobs, dref, n, ESTIMATOR=ctx.estimator, BLOCK=BLOCK
            )
        return dlogprobs, dref, None


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimates of KL(p || q) at each sampled token, in nats, from log p and log q of that token.

    With d = log p - log q: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d, "abs" |d|
    (Schulman 2020, joschu.net/blog/kl-approx.html). Any shape and float type -> the same shape,
    fp32 (fp64 when an input is); differentiable in both. k1 and k3 are unbiased; k3 is never
    negative; as a loss only k2 has the gradient of the KL. exp(-d) is clamped at d = -20 nats,
    beyond which it has no gradient. Raises ValueError when the shapes differ.
    """
    reference._one_of("estimator", estimator, reference.ESTIMATORS)
    reference._same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if not runs_kernel(logprobs):
        return reference.token_kl(logprobs, ref_logprobs, estimator=estimator)
    return _TokenKL.apply(logprobs, ref_logprobs, estimator)
