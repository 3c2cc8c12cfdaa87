"""PPO's clipped losses of the policy and of the value function, with their statistics.

    policy   ratio = exp(clamp(log p - log p_old, -20, 20)),  plain = -A ratio,
             clipped = -A clip(ratio, 1 - c, 1 + c),          loss = max(plain, clipped)
             dlog p = share * plain
    value    plain = (V - R)^2,  clipped = (clip(V, V_old - c, V_old + c) - R)^2,
             loss = max(plain, clipped) / 2,                  dV = share * (V - R)

The gradient of a token is known while its loss is computed, up to one number for the whole batch:
upstream gradient / normaliser. One launch writes it, beside the partial sums of each program; a
counter of integers tells the program that ends last, and it adds the parts up, always in the same
order, and puts the counter back to 0: the same bits in every run, and no fill before one. Backward
is one launch, which multiplies in fp32 and rounds once. Where plain == clipped, each
takes half of the gradient, as torch.maximum does: at ratio 1, where clip passes its gradient on,
that is all of it.
Bytes per token with fp32 inputs and a bool mask: 13 read and 4 written forward (a second read of
the mask for sequence-mean; none written without a gradient), 8 backward; 48 and a ticket of 8 for
each program. Saved: the gradient.
Meaning: `reference.policy_loss`, `reference.value_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.advantages import row_bounds
from tetrad.kernels.check import (
    check_loss,
    check_policy_loss,
    check_same_shape,
)
from tetrad.kernels.kl import MAX_LOG_RATIO, expm1_minus
from tetrad.kernels.launch import (
    MAX_PROGRAMS,
    number_or_tensor,
    op,
    programs,
    real_dtype,
    refuse_gradients,
    runs_kernel,
    ticket,
    wants_gradient,
)

POLICY_STATISTICS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")
BLOCK = 512  # tokens: 4 a thread fill a 128-bit load
ALL = tl.constexpr(tl.PropagateNan.ALL)  # a NaN among valid tokens must reach the loss


@triton.jit
def finish(
    parts_ptr,  # (1 + STATS + 1, programs) fp32: of the loss, of the statistics, of the weights
    ticket_ptr,  # () int32, 0 at launch, and again after it
    denominator_ptr,  # () number, or None
    loss_ptr,  # () fp32, out
    stats_ptr,  # (STATS,) fp32, out
    scale_ptr,  # () fp32, out: 1 / normaliser
    denominator,  # 0 means: the sum of the weights
    STATS: tl.constexpr,
    LAST_IS_MAX: tl.constexpr,  # of what the one before it is the mean of
    PROGRAMS: tl.constexpr,
):
    """What every program calls once it has stored its parts: the last one adds them all up."""
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    programs = tl.num_programs(0)
    tl.debug_barrier()  # Triton 3.6 would let the ticket overtake the stores of other warps
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1:
        tl.store(ticket_ptr, 0)  # nobody else will come: ready for the next launch
        i = tl.arange(0, PROGRAMS)
        inside = i < programs
        if denominator_ptr is not None:
            normaliser = tl.load(denominator_ptr).to(REAL)
        else:
            at = parts_ptr + (STATS + 1) * programs + i
            # L1 is not told of what other multiprocessors wrote: .cg reads L2
            weights = tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            normaliser = tl.maximum(tl.sum(weights, 0), 1)
            normaliser = tl.where(denominator > 0, tl.cast(denominator, REAL), normaliser)
        tl.store(scale_ptr, 1 / normaliser)
        mean = normaliser
        for k in tl.static_range(STATS + 1):
            part = tl.load(parts_ptr + k * programs + i, mask=inside, other=0, cache_modifier=".cg")
            if k == 0:
                tl.store(loss_ptr, tl.sum(part, 0) / normaliser)
            elif LAST_IS_MAX and k == STATS:
                top = tl.max(part, 0)  # which drops a NaN, as a mean does not
                tl.store(stats_ptr + k - 1, tl.where(mean == mean, top, mean))
            else:
                mean = tl.sum(part, 0) / normaliser
                tl.store(stats_ptr + k - 1, mean)


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
def _by_fours(x, BLOCK: tl.constexpr):
    """Sums of the four neighbours that a thread holds: its running sums take a register each."""
    return tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)


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
    parts_ptr,  # (6, programs) fp32, scratch: sums of loss, clipped, k3, ratio; max; sum of weights
    ticket_ptr,  # () int32, 0, before and after
    denominator_ptr,  # () number, in the place of denominator; or None
    loss_ptr,  # () fp32, out
    stats_ptr,  # (4,) fp32, out
    scale_ptr,  # () fp32, out: the gradient's factor, 1 / normaliser
    rows,
    length,
    n,
    denominator: tl.float64,  # 0: the sum of the weights
    low: tl.float64,
    high: tl.float64,
    dual_clip: tl.float64,
    DUAL_CLIP: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    low, high, dual_clip = tl.cast(low, REAL), tl.cast(high, REAL), tl.cast(dual_clip, REAL)
    zeros = tl.zeros([BLOCK // 4], REAL)
    losses, clips, kl, ratios, top, weights = zeros, zeros, zeros, zeros, zeros, zeros
    program, programs = tl.program_id(0), tl.num_programs(0)
    for row in range(program, rows, programs):
        start, end = row_bounds(row, cu_ptr, length, n)
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

            held = tl.abs(d) > MAX_LOG_RATIO  # NaN is not: it must reach the gradient
            # no tl.clamp: between -c and c it compiles to an instruction that fp64 has not
            d = tl.maximum(tl.minimum(d, MAX_LOG_RATIO, ALL), -MAX_LOG_RATIO, ALL)
            ratio = tl.exp(d)
            within = tl.clamp(ratio, low, high, ALL)
            plain, clipped = -A * ratio, -A * within
            loss = tl.maximum(plain, clipped, ALL)
            share = _part(plain, clipped) + tl.where(within == ratio, _part(clipped, plain), 0.0)
            if DUAL_CLIP:
                bound = -A * dual_clip
                share = tl.where(A < 0, share * _part(bound, loss), share)
                loss = tl.where(A < 0, tl.minimum(loss, bound, ALL), loss)

            losses += _by_fours(w * loss, BLOCK)
            clips += _by_fours(tl.where(clipped > plain, w, 0), BLOCK)
            kl += _by_fours(w * expm1_minus(d), BLOCK)
            ratios += _by_fours(w * ratio, BLOCK)
            fours = tl.reshape(tl.where(valid, ratio, 0), [BLOCK // 4, 4])
            top = tl.maximum(top, tl.max(fours, 1))
            weights += _by_fours(w, BLOCK)
            if gradient_ptr is not None:
                gradient = tl.where(held, 0, w * share * plain)
                tl.store(gradient_ptr + at, gradient, mask=inside)
    tl.store(parts_ptr + program, tl.sum(losses, 0))
    tl.store(parts_ptr + programs + program, tl.sum(clips, 0))
    tl.store(parts_ptr + 2 * programs + program, tl.sum(kl, 0))
    tl.store(parts_ptr + 3 * programs + program, tl.sum(ratios, 0))
    tl.store(parts_ptr + 4 * programs + program, tl.max(top, 0))
    tl.store(parts_ptr + 5 * programs + program, tl.sum(weights, 0))
    finish(
        parts_ptr, ticket_ptr, denominator_ptr, loss_ptr, stats_ptr, scale_ptr, denominator, 4,
        True, PROGRAMS,
    )  # fmt: skip


@triton.jit
def _value(
    values_ptr,  # (n,) float
    old_ptr,  # (n,) float
    returns_ptr,  # (n,) float
    mask_ptr,  # (n,)
    cu_ptr,  # (rows + 1,) int, or None when every row has `length` tokens
    gradient_ptr,  # (n,) fp32, out: d (sum of weighted losses) / d values; or None
    parts_ptr,  # (6, programs) fp32, scratch: sums of loss, clipped, V, R, (V - R)^2, weights
    ticket_ptr,  # () int32, 0, before and after
    denominator_ptr,  # () number, in the place of denominator; or None
    loss_ptr,  # () fp32, out
    stats_ptr,  # (4,) fp32, out
    scale_ptr,  # () fp32, out: the gradient's factor, 1 / normaliser
    rows,
    length,
    n,
    denominator: tl.float64,  # 0: the sum of the weights
    clip_range: tl.float64,
    PER_SEQUENCE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    clip_range = tl.cast(clip_range, REAL)
    zeros = tl.zeros([BLOCK // 4], REAL)
    losses, clips, values, returns, errors, weights = zeros, zeros, zeros, zeros, zeros, zeros
    program, programs = tl.program_id(0), tl.num_programs(0)
    for row in range(program, rows, programs):
        start, end = row_bounds(row, cu_ptr, length, n)
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
            flat = 0 * clipped  # the slope where clip holds V: 0, but NaN where the old value is
            share = _part(plain, clipped) + tl.where(within == V, _part(clipped, plain), flat)

            losses += 0.5 * _by_fours(w * tl.maximum(plain, clipped, ALL), BLOCK)
            clips += _by_fours(tl.where(clipped > plain, w, 0), BLOCK)
            values += _by_fours(w * V, BLOCK)
            returns += _by_fours(w * R, BLOCK)
            errors += _by_fours(w * plain, BLOCK)
            weights += _by_fours(w, BLOCK)
            if gradient_ptr is not None:
                tl.store(gradient_ptr + at, w * share * (V - R), mask=inside)
    tl.store(parts_ptr + program, tl.sum(losses, 0))
    tl.store(parts_ptr + programs + program, tl.sum(clips, 0))
    tl.store(parts_ptr + 2 * programs + program, tl.sum(values, 0))
    tl.store(parts_ptr + 3 * programs + program, tl.sum(returns, 0))
    tl.store(parts_ptr + 4 * programs + program, tl.sum(errors, 0))
    tl.store(parts_ptr + 5 * programs + program, tl.sum(weights, 0))
    finish(
        parts_ptr, ticket_ptr, denominator_ptr, loss_ptr, stats_ptr, scale_ptr, denominator, 4,
        False, PROGRAMS,
    )  # fmt: skip


def _outputs(
    x: Tensor, first: Tensor, second: Tensor, wanted: bool, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), statistics (4,), gradient up to a factor (empty unless wanted), that factor ()."""
    real = real_dtype(x, first, second)
    shapes = (), (4,), x.shape if wanted else (0,), ()
    loss, stats, gradient, scale = (x.new_empty(shape, dtype=real) for shape in shapes)
    return loss, stats, gradient, scale


def _launch(
    kernel: triton.JITFunction, outputs: tuple[Tensor, Tensor, Tensor, Tensor], x: Tensor,
    first: Tensor, second: Tensor, wanted: bool, mask: Tensor, cu_seqlens: Tensor | None,
    denominator: float, denominators: Tensor | None, aggregation: str, **numbers: float | bool,
) -> None:  # fmt: skip
    """Fill the outputs. Which numbers there are besides, differs between the two kernels."""
    loss, stats, gradient, scale = outputs
    x, first, second, mask = (y.contiguous() for y in (x, first, second, mask))
    n = x.numel()
    per_sequence = aggregation == "sequence-mean"
    block = BLOCK * 4 // loss.element_size()  # fp64 takes two registers a number
    if not per_sequence:
        cu_seqlens, rows, length = None, triton.cdiv(n, block), block
    elif cu_seqlens is None:
        rows, length = mask.shape
    else:
        cu_seqlens, rows, length = cu_seqlens.contiguous(), len(cu_seqlens) - 1, 0
    grid = programs(rows)
    with ticket(x.device) as counter:
        kernel[grid](
            x, first, second, mask, cu_seqlens, gradient if wanted else None,
            scale.new_empty(6, *grid), counter,
            None if denominators is None else denominators.to(x.device), loss, stats, scale, rows,
            length, n, denominator, **numbers, PER_SEQUENCE=per_sequence, PROGRAMS=MAX_PROGRAMS,
            BLOCK=block,
        )  # fmt: skip


@triton.jit
def _scale(
    gradient_ptr,  # (n,) fp32
    scale_ptr,  # () fp32
    upstream_ptr,  # () fp32
    dx_ptr,  # (n,) float, out
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(upstream_ptr) * tl.load(scale_ptr)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dx_ptr + at, tl.load(gradient_ptr + at, mask=at < n, other=0) * factor, mask=at < n)


@op(lambda gradient, scale, upstream, dtype: torch.empty_like(gradient, dtype=dtype))
def _scaled(gradient: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * (upstream * scale), rounded once."""
    dx = torch.empty_like(gradient, dtype=dtype)
    n = gradient.numel()
    if n:
        _scale[(triton.cdiv(n, 2 * BLOCK),)](gradient, scale, upstream, dx, n, BLOCK=2 * BLOCK)
    return dx


def keep_gradient(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Of a loss, statistics, its gradient by the first input up to a factor, that factor."""
    ctx.dtype, ctx.constants = inputs[0].dtype, (None,) * (len(inputs) - 1)
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def scaled_gradient(ctx, dloss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    """The gradient that was kept, times its factor and the upstream gradient."""
    dx = None if dloss is None else _scaled(*ctx.saved_tensors, dloss, ctx.dtype)
    return dx, *ctx.constants


@op(_outputs, "policy_loss")
def policy_loss_and_gradient(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, wanted: bool, mask: Tensor,
    cu_seqlens: Tensor | None, denominator: float, denominators: Tensor | None, aggregation: str,
    clip_range: float, dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _outputs(logprobs, old_logprobs, advantages, wanted)
    _launch(
        _policy, outputs, logprobs, old_logprobs, advantages, wanted, mask, cu_seqlens,
        denominator, denominators, aggregation, low=1 - clip_range, high=1 + clip_range,
        dual_clip=dual_clip or 0.0, DUAL_CLIP=dual_clip is not None,
    )  # fmt: skip
    return outputs


@op(_outputs, "value_loss")
def value_loss_and_gradient(
    values: Tensor, old_values: Tensor, returns: Tensor, wanted: bool, mask: Tensor,
    cu_seqlens: Tensor | None, denominator: float, denominators: Tensor | None, aggregation: str,
    clip_range: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _outputs(values, old_values, returns, wanted)
    _launch(
        _value, outputs, values, old_values, returns, wanted, mask, cu_seqlens, denominator,
        denominators, aggregation, clip_range=clip_range,
    )  # fmt: skip
    return outputs


policy_loss_and_gradient.differentiate(keep_gradient, scaled_gradient)
value_loss_and_gradient.differentiate(keep_gradient, scaled_gradient)


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
    check_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range, dual_clip, aggregation, denominator,
        cu_seqlens,
    )  # fmt: skip
    refuse_gradients(old_logprobs=old_logprobs, advantages=advantages)
    if not runs_kernel(logprobs):
        return reference.policy_loss(
            logprobs, old_logprobs, advantages, mask, clip_range=clip_range, dual_clip=dual_clip,
            aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    loss, stats, _, _ = policy_loss_and_gradient(
        logprobs, old_logprobs, advantages, wants_gradient(logprobs),
        mask, cu_seqlens, *number_or_tensor(denominator), aggregation, float(clip_range),
        None if dual_clip is None else float(dual_clip),
    )  # fmt: skip
    return loss, dict(zip(POLICY_STATISTICS, stats, strict=True))


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
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    refuse_gradients(old_values=old_values, returns=returns)
    if not runs_kernel(values):
        return reference.value_loss(
            values, old_values, returns, mask, clip_range=clip_range, aggregation=aggregation,
            denominator=denominator, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    loss, stats, _, _ = value_loss_and_gradient(
        values, old_values, returns, wants_gradient(values), mask,
        cu_seqlens, *number_or_tensor(denominator), aggregation, float(clip_range),
    )  # fmt: skip
    names = ("clip_fraction", "value_mean", "return_mean", "error")
    return loss, dict(zip(names, stats, strict=True))
