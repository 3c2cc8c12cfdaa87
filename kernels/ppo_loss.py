"""PPO's clipped losses of the policy and of the value function, with their statistics.

    policy   ratio = exp(clamp(log p - log p_old, -20, 20)),  plain = -A ratio,
             clipped = -A clip(ratio, 1 - c, 1 + c),          loss = max(plain, clipped)
             dlog p = share * plain
    value    plain = (V - R)^2,  clipped = (clip(V, V_old - c, V_old + c) - R)^2,
             loss = max(plain, clipped) / 2,                  dV = share * (V - R)

The gradient of a token is known while its loss is computed, up to one number for the whole batch:
upstream gradient / normaliser. One launch writes it beside the partial sums of each program, a
second one adds these up in fixed order (no atomics, the same bits in every run), and backward is
one multiplication. Where plain == clipped, each takes half of the gradient, as torch.maximum does:
at ratio 1, where clip passes its gradient on, that is all of it.
Bytes per token with fp32 inputs and a bool mask: 13 read and 4 written forward (a second read of
the mask for sequence-mean), 8 backward. Saved: the gradient.
Meaning: `reference.policy_loss`, `reference.value_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetrad.kernels import reference
from tetrad.kernels.advantages import _bounds, _programs, _refuse_gradients
from tetrad.kernels.kl import _MAX_LOG_RATIO, _expm1_minus, _real_dtype
from tetrad.kernels.launch import runs_kernel

BLOCK = 512  # tokens: 4 a thread fill a 128-bit load; 8 would spill the six running sums
ALL = tl.constexpr(tl.PropagateNan.ALL)  # a NaN among valid tokens must reach the loss


@triton.jit
def _weight(mask_ptr, start, end, PER_SEQUENCE: tl.constexpr, BLOCK: tl.constexpr, REAL):
    """Weight of the valid tokens of a row: 1, or the inverse of their number."""
    weight = tl.cast(1.0, REAL)
    if PER_SEQUENCE:
        count = tl.zeros([BLOCK], tl.int32)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            count += (tl.load(mask_ptr + at, mask=at < end, other=0) != 0).to(tl.int32)
        weight = 1 / tl.maximum(tl.sum(count, 0), 1).to(REAL)
    return weight


@triton.jit
def _part(a, b):
    """How much of the gradient of max(a, b) is a's."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _policy(
    logprobs_ptr,  # (n,) float
    old_ptr,  # (n,) float
    advantages_ptr,  # (n,) float
    mask_ptr,  # (n,)
    cu_ptr,  # (rows + 1,) int, or None when every row has `length` tokens
    gradient_ptr,  # (n,) fp32, out: d (sum of weighted losses) / d logprobs; or None
    parts_ptr,  # (6, programs) fp32, out: sums of loss, clipped, k3, ratio; max; sum of weights
    rows,
    length,
    n,
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    DUAL_CLIP: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    low, high, dual_clip = tl.cast(low, REAL), tl.cast(high, REAL), tl.cast(dual_clip, REAL)
    zeros = tl.zeros([BLOCK], REAL)
    losses, clips, kl, ratios, top, weights = zeros, zeros, zeros, zeros, zeros, zeros
    program, programs = tl.program_id(0), tl.num_programs(0)
    for row in range(program, rows, programs):
        start, end = _bounds(row, cu_ptr, length, n)
        weight = _weight(mask_ptr, start, end, PER_SEQUENCE, BLOCK, REAL)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < end
            valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
            d = tl.load(logprobs_ptr + at, mask=inside, other=0).to(REAL)
            d = tl.where(valid, d - tl.load(old_ptr + at, mask=inside, other=0).to(REAL), 0)
            A = tl.load(advantages_ptr + at, mask=inside, other=0).to(REAL)
            A = tl.where(valid, A, 0)
            w = tl.where(valid, weight, 0)

            moves = tl.abs(d) <= _MAX_LOG_RATIO
            d = tl.clamp(d, -_MAX_LOG_RATIO, _MAX_LOG_RATIO, ALL)
            ratio = tl.exp(d)
            within = tl.clamp(ratio, low, high, ALL)
            plain, clipped = -A * ratio, -A * within
            loss = tl.maximum(plain, clipped, ALL)
            share = _part(plain, clipped) + tl.where(within == ratio, _part(clipped, plain), 0.0)
            if DUAL_CLIP:
                bound = -A * dual_clip
                share = tl.where(A < 0, share * _part(bound, loss), share)
                loss = tl.where(A < 0, tl.minimum(loss, bound, ALL), loss)

            losses += w * loss
            clips += tl.where(clipped > plain, w, 0)
            kl += w * _expm1_minus(d)
            ratios += w * ratio
            top = tl.maximum(top, tl.where(valid, ratio, 0), ALL)
            weights += w
            if gradient_ptr is not None:
                gradient = tl.where(valid & moves, w * share * plain, 0)
                tl.store(gradient_ptr + at, gradient, mask=inside)
    tl.store(parts_ptr + program, tl.sum(losses, 0))
    tl.store(parts_ptr + programs + program, tl.sum(clips, 0))
    tl.store(parts_ptr + 2 * programs + program, tl.sum(kl, 0))
    tl.store(parts_ptr + 3 * programs + program, tl.sum(ratios, 0))
    tl.store(parts_ptr + 4 * programs + program, tl.max(top, 0))
    tl.store(parts_ptr + 5 * programs + program, tl.sum(weights, 0))


@triton.jit
def _value(
    values_ptr,  # (n,) float
    old_ptr,  # (n,) float
    returns_ptr,  # (n,) float
    mask_ptr,  # (n,)
    cu_ptr,  # (rows + 1,) int, or None when every row has `length` tokens
    gradient_ptr,  # (n,) fp32, out: d (sum of weighted losses) / d values; or None
    parts_ptr,  # (6, programs) fp32, out: sums of loss, clipped, V, R, (V - R)^2, weights
    rows,
    length,
    n,
    clip_range: tl.float64,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    clip_range = tl.cast(clip_range, REAL)
    zeros = tl.zeros([BLOCK], REAL)
    losses, clips, values, returns, errors, weights = zeros, zeros, zeros, zeros, zeros, zeros
    program, programs = tl.program_id(0), tl.num_programs(0)
    for row in range(program, rows, programs):
        start, end = _bounds(row, cu_ptr, length, n)
        weight = _weight(mask_ptr, start, end, PER_SEQUENCE, BLOCK, REAL)
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            inside = at < end
            valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
            V = tl.where(valid, tl.load(values_ptr + at, mask=inside, other=0).to(REAL), 0)
            old = tl.where(valid, tl.load(old_ptr + at, mask=inside, other=0).to(REAL), 0)
            R = tl.where(valid, tl.load(returns_ptr + at, mask=inside, other=0).to(REAL), 0)
            w = tl.where(valid, weight, 0)

            within = tl.clamp(V, old - clip_range, old + clip_range, ALL)
            plain, clipped = (V - R) * (V - R), (within - R) * (within - R)
            share = _part(plain, clipped) + tl.where(within == V, _part(clipped, plain), 0.0)

            losses += w * 0.5 * tl.maximum(plain, clipped, ALL)
            clips += tl.where(clipped > plain, w, 0)
            values += w * V
            returns += w * R
            errors += w * plain
            weights += w
            if gradient_ptr is not None:
                tl.store(gradient_ptr + at, w * share * (V - R), mask=inside)
    tl.store(parts_ptr + program, tl.sum(losses, 0))
    tl.store(parts_ptr + programs + program, tl.sum(clips, 0))
    tl.store(parts_ptr + 2 * programs + program, tl.sum(values, 0))
    tl.store(parts_ptr + 3 * programs + program, tl.sum(returns, 0))
    tl.store(parts_ptr + 4 * programs + program, tl.sum(errors, 0))
    tl.store(parts_ptr + 5 * programs + program, tl.sum(weights, 0))


@triton.jit
def _finish(
    parts_ptr,  # (1 + STATS + 1, programs) fp32: of the loss, of the statistics, of the weights
    denominator_ptr,  # () number, or None
    loss_ptr,  # () fp32, out
    stats_ptr,  # (STATS,) fp32, out
    scale_ptr,  # () fp32, out: 1 / normaliser
    programs,
    denominator: tl.float64,  # 0 means: the sum of the weights
    STATS: tl.constexpr,
    LAST_IS_MAX: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    i = tl.arange(0, PROGRAMS)
    inside = i < programs
    if denominator_ptr is not None:
        normaliser = tl.load(denominator_ptr).to(REAL)
    else:
        weights = tl.load(parts_ptr + (STATS + 1) * programs + i, mask=inside, other=0)
        normaliser = tl.maximum(tl.sum(weights, 0), 1)
        normaliser = tl.where(denominator > 0, tl.cast(denominator, REAL), normaliser)
    tl.store(scale_ptr, 1 / normaliser)
    tl.store(loss_ptr, tl.sum(tl.load(parts_ptr + i, mask=inside, other=0), 0) / normaliser)
    for k in tl.static_range(STATS):
        part = tl.load(parts_ptr + (k + 1) * programs + i, mask=inside, other=0)
        if LAST_IS_MAX and k == STATS - 1:
            tl.store(stats_ptr + k, tl.max(part, 0))
        else:
            tl.store(stats_ptr + k, tl.sum(part, 0) / normaliser)


def _finished(
    parts: Tensor, denominator: float | Tensor | None, last_is_max: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), statistics (STATS,), 1 / normaliser ()) from the partial sums of all programs."""
    n_stats, programs = parts.shape[0] - 2, parts.shape[1]
    loss, stats, scale = parts.new_empty(()), parts.new_empty(n_stats), parts.new_empty(())
    on_device = isinstance(denominator, Tensor)
    _finish[(1,)](
        parts, denominator.to(parts.device) if on_device else None, loss, stats, scale, programs,
        0.0 if on_device or denominator is None else float(denominator), STATS=n_stats,
        LAST_IS_MAX=last_is_max, PROGRAMS=triton.next_power_of_2(programs),
    )  # fmt: skip
    return loss, stats, scale


class _ClippedLoss(torch.autograd.Function):
    """What the two losses share: `kernel` takes x, the constants, the mask and the numbers."""

    @staticmethod
    def forward(
        ctx, x: Tensor, constants: tuple[Tensor, Tensor], mask: Tensor, cu_seqlens: Tensor | None,
        kernel: triton.JITFunction, numbers: dict[str, float | bool], aggregation: str,
        denominator: float | Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        real = _real_dtype(x, *constants)
        x, first, second, mask = (y.contiguous() for y in (x, *constants, mask))
        n = x.numel()
        per_sequence = aggregation == "sequence-mean"
        if not per_sequence:
            cu_seqlens, rows, length = None, triton.cdiv(n, BLOCK), BLOCK
        elif cu_seqlens is None:
            rows, length = mask.shape
        else:
            cu_seqlens, rows, length = cu_seqlens.contiguous(), len(cu_seqlens) - 1, 0
        grid = _programs(rows)
        gradient = torch.empty_like(x, dtype=real) if ctx.needs_input_grad[0] else None
        parts = torch.empty(6, *grid, dtype=real, device=x.device)
        kernel[grid](
            x, first, second, mask, cu_seqlens, gradient, parts, rows, length, n, **numbers,
            PER_SEQUENCE=per_sequence, BLOCK=BLOCK,
            maxnreg=96,  # left to itself, ptxas spills to come down to 64
        )  # fmt: skip
        loss, stats, scale = _finished(parts, denominator, last_is_max=kernel is _policy)
        ctx.save_for_backward(gradient, scale)
        ctx.dtype = x.dtype
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
        gradient, scale = ctx.saved_tensors
        return (gradient * (dloss * scale)).to(ctx.dtype), *(None,) * 7


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, a scalar to minimise, and statistics as 0-d tensors on the device.

        ratio = exp(logprobs - old_logprobs)
        loss = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))

    (Schulman et al. 2017, arXiv:1707.06347, equation 7). dual_clip > 1 bounds the loss of a token
    of negative advantage by -A * dual_clip (Ye et al. 2020, arXiv:1912.09729). The log of the ratio
    is clamped to 20 nats; beyond, there is no gradient.
    Per-token inputs of one shape; differentiable in logprobs alone.
    aggregation: mean over tokens, or over sequences of token means ((B, T), or cu_seqlens).
    denominator: the token (or sequence) count of the global batch when this is a part of it: parts
    then add up to the whole, the statistics too (ratio_max by max).
    Statistics: clip_fraction, approx_kl (k3, nats), ratio_mean, ratio_max.
    Raises ValueError when shapes or options do not fit, and when a constant requires grad.
    """
    reference._check_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range, dual_clip, aggregation, denominator,
        cu_seqlens,
    )  # fmt: skip
    _refuse_gradients(old_logprobs=old_logprobs, advantages=advantages)
    if not runs_kernel(logprobs):
        return reference.policy_loss(
            logprobs, old_logprobs, advantages, mask, clip_range=clip_range, dual_clip=dual_clip,
            aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    numbers = {
        "low": 1.0 - clip_range,
        "high": 1.0 + clip_range,
        "dual_clip": float(dual_clip or 0),
        "DUAL_CLIP": dual_clip is not None,
    }
    loss, stats = _ClippedLoss.apply(
        logprobs, (old_logprobs, advantages), mask, cu_seqlens, _policy, numbers, aggregation,
        denominator,
    )  # fmt: skip
    names = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")
    return loss, dict(zip(names, stats, strict=True))


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), a scalar, and statistics.

    Per-token inputs of one shape; differentiable in values alone. aggregation, denominator,
    cu_seqlens and errors as in `policy_loss`. Statistics: clip_fraction, value_mean, return_mean,
    error (mean squared V - R).
    """
    reference._same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    reference._check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    _refuse_gradients(old_values=old_values, returns=returns)
    if not runs_kernel(values):
        return reference.value_loss(
            values, old_values, returns, mask, clip_range=clip_range, aggregation=aggregation,
            denominator=denominator, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    loss, stats = _ClippedLoss.apply(
        values, (old_values, returns), mask, cu_seqlens, _value, {"clip_range": float(clip_range)},
        aggregation, denominator,
    )  # fmt: skip
    names = ("clip_fraction", "value_mean", "return_mean", "error")
    return loss, dict(zip(names, stats, strict=True))
