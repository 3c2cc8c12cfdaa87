"""Per-token estimates of the KL divergence, from the log-probabilities of the sampled tokens.

    forward     d = log p - log q;  k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d|
    backward    slope = 1, d, 1 - exp(-d), sign(d);  dlog p = g * slope = -dlog q

In k3, exp(-d) is held beyond d = -20, where the slope is 1, and d itself beyond -1e8, where it is
0: k3 never becomes negative, though -d outgrows any constant.
One launch each way, no block talks to another. Bytes per token with fp32 inputs: 12 forward (two
reads, one write), 16 or 20 backward. Nothing is saved but the inputs.
Meaning: `reference.token_kl`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    ESTIMATORS,
    check_one_of,
    check_same_shape,
)
from tetrad.kernels.launch import op, real_dtype, runs_kernel

BLOCK = 1024  # tokens a program
MAX_LOG_RATIO = tl.constexpr(reference.MAX_LOG_RATIO)
MAX_RATIO_MINUS_1 = tl.constexpr(math.expm1(reference.MAX_LOG_RATIO))
MAX_DIFFERENCE = tl.constexpr(reference.MAX_DIFFERENCE)


@triton.jit
def expm1_minus(x):
    """exp(x) - 1 - x. Its two leading terms cancel near 0, where the series is exact."""
    series = 1 / 5040 + x * (1 / 40320)
    series = 1 / 120 + x * (1 / 720 + x * series)
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1 - x)


@triton.jit
def kl_estimate(d, ESTIMATOR: tl.constexpr):
    """The estimate from d = log p - log q."""
    if ESTIMATOR == "k2":
        d = 0.5 * d * d
    elif ESTIMATOR == "abs":
        d = tl.abs(d)
    elif ESTIMATOR == "k3":
        held = MAX_RATIO_MINUS_1 + tl.maximum(d, -MAX_DIFFERENCE)
        d = tl.where(d < -MAX_LOG_RATIO, held, expm1_minus(-d))
    return d


@triton.jit
def _slope(d, ESTIMATOR: tl.constexpr):
    """Derivative of the estimate by d."""
    if ESTIMATOR == "k1":
        d = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == "abs":
        d = (d > 0).to(d.dtype) - (d < 0).to(d.dtype)
    elif ESTIMATOR == "k3":
        slope = tl.where(tl.abs(d) < 0.1, d - expm1_minus(-d), 1 - tl.exp(-d))  # exact near 0
        slope = tl.where(d < -MAX_LOG_RATIO, 1.0, slope)
        d = tl.where(d < -MAX_DIFFERENCE, 0.0, slope)
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
    tl.store(kl_ptr + at, kl_estimate(logprobs - ref, ESTIMATOR), mask=at < n)


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


def _outputs(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=real_dtype(logprobs, ref_logprobs))


@op(_outputs)
def _token_kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    kl = _outputs(logprobs, ref_logprobs, estimator)
    n = kl.numel()
    if n:
        _forward[(triton.cdiv(n, BLOCK),)](
            logprobs.contiguous(), ref_logprobs.contiguous(), kl, n, ESTIMATOR=estimator,
            BLOCK=BLOCK,
        )  # fmt: skip
    return kl


def _gradients(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str, wanted: bool,
    ref_wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        logprobs.new_empty(logprobs.shape if wanted else 0),
        ref_logprobs.new_empty(ref_logprobs.shape if ref_wanted else 0),
    )


@op(_gradients)
def _token_kl_backward(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: str, wanted: bool,
    ref_wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = _gradients(dkl, logprobs, ref_logprobs, estimator, wanted, ref_wanted)
    n = dkl.numel()
    if n:
        _backward[(triton.cdiv(n, BLOCK),)](
            dkl.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(),
            gradients[0] if wanted else None, gradients[1] if ref_wanted else None, n,
            ESTIMATOR=estimator, BLOCK=BLOCK,
        )  # fmt: skip
    return gradients


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    *tensors, ctx.estimator = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dkl: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    wanted = ctx.needs_input_grad[:2]
    gradients = _token_kl_backward(dkl, *ctx.saved_tensors, ctx.estimator, *wanted)
    dlogprobs, dref = (x if w else None for x, w in zip(gradients, wanted, strict=True))
    return dlogprobs, dref, None


_token_kl.differentiate(_setup_context, _gradient)


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimates of KL(p || q) at each sampled token, in nats, from log p and log q of that token.

    With d = log p - log q: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d, "abs" |d|
    (Schulman 2020, joschu.net/blog/kl-approx.html). Any shape and float type -> the same shape,
    fp32 (fp64 when an input is); differentiable in both. k1 and k3 are unbiased; k3 is never
    negative; as a loss only k2 has the gradient of the KL. exp(-d) is clamped at d = -20 nats,
    beyond which it has no gradient, and the d beside it at -1e8. A log q of -inf makes k1, k2, k3
    and abs inf. Raises ValueError when the shapes differ.
    """
    check_one_of("estimator", estimator, ESTIMATORS)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    if not runs_kernel(logprobs):
        return reference.token_kl(logprobs, ref_logprobs, estimator=estimator)
    return _token_kl(logprobs, ref_logprobs, estimator)
