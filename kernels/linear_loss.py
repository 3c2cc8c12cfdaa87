"""Losses on hidden @ weight.T whose gradient is made in the forward pass: three products, not four.

The gradient of a token's log-prob is known as soon as its log-prob is, up to the upstream gradient
over n: -1 for cross-entropy, the slope of the clipped surrogate for PPO. So, for ROWS rows at a
time,

    x = hidden @ weight.T + bias; log p of the rows; dx, from x and the slope
    dhidden += dx @ weight,  dweight += dx.T @ hidden

with x and the sums in fp32, and backward multiplies by upstream / n and rounds once: neither a
small 1 / n nor a large loss scale meets the range of fp16.
With weight_grad, an fp32 buffer of the caller's, there is no sum for weight, nor anything to do
backward: weight_grad += upstream / n * dx.T @ hidden, upstream and n being numbers of the host.
Memory: 4 bytes for ROWS x V logits and those of dx in the inputs' type; the sums, 4 V d and 4 N d,
which are kept for backward. Moved of them, for P pieces: 4 V d (2 P - 1) bytes, and once more, with
the gradient, backward; with weight_grad 8 V d P, and no more.
Over a group: one all-gather of 3 numbers per row for each piece, one all-reduce of dhidden; every
rank must ask for the same gradients.
Meaning: `reference.linear_cross_entropy`, `reference.linear_policy_loss`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_denominator,
    check_linear,
    check_policy_loss,
    check_temperature,
    check_tokens,
    check_vocabulary,
    check_weight_grad,
)
from tetrad.kernels.launch import (
    all_reduce,
    group_name,
    number_or_tensor,
    op,
    refuse_gradients,
    runs_kernel,
    wants_gradient,
)
from tetrad.kernels.linear_logprob import (
    chunk_parts,
    gradients_like,
    linear_token_logprobs,
    row_contiguous,
)
from tetrad.kernels.logprob import columns_that_count, finish_parts, per_token, write_dlogits
from tetrad.kernels.ppo_loss import POLICY_STATISTICS, policy_loss, policy_loss_and_gradient
from tetrad.kernels.products import add_product, aligned, write_product
from tetrad.kernels.reference import IGNORED

ROWS = 4096  # at a time, on every rank of a group, however wide its shard of the vocabulary


def _sums_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of hidden, weight and bias in fp32; (0,) where not needed."""
    gradients = gradients_like(hidden, weight, bias, need_hidden, need_weight)
    dhidden, dweight, dbias = (torch.empty_like(x, dtype=torch.float32) for x in gradients)
    return dhidden, dweight, dbias


def _with_gradients(
    slope: Callable[[slice, Tensor], Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None,
    tokens: Tensor, temperature: float, temperatures: Tensor | None, ignore_index: int,
    vocab_start: int, V: int, group: str | None, weight_grad: Tensor | None, factor: float,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probs (N,) and the gradients of hidden, weight and bias, in fp32.

    slope(rows, logprobs) is the gradient of the loss by the log-probs of some rows. `factor` times
    the gradient of weight is added to weight_grad, if it is given.
    """
    N = len(hidden)
    t = temperature if temperatures is None else temperatures
    logprobs = hidden.new_empty(N, dtype=torch.float32)
    dhidden, dweight, dbias = _sums_like(hidden, weight, bias, need_hidden, need_weight)
    summed = slice(V if N else 0, None)  # rows that no piece writes
    dweight[summed].zero_()
    dbias[summed].zero_()
    for start in range(0, N, ROWS):
        rows = slice(start, min(start + ROWS, N))
        t_rows = t[rows] if isinstance(t, Tensor) else t
        joined, x = chunk_parts(
            hidden[rows], weight, bias, tokens[rows], t_rows, False, ignore_index, vocab_start, V
        )
        logprobs[rows], entropies, saved = finish_parts(
            joined[None], tokens[rows], t_rows, ignore_index, group
        )
        dx = aligned(x.shape[1], x.shape[2], hidden.dtype, x.device)[None]
        write_dlogits(
            dx, slope(rows, logprobs[rows]), None, x, tokens[rows], t_rows, saved, entropies,
            ignore_index, vocab_start, V,
        )  # fmt: skip
        if need_hidden:
            write_product(dhidden[rows], dx[0], weight[:V])
        if need_weight or weight_grad is not None:  # 0 * NaN in a matrix product would be NaN
            counted = torch.where((tokens[rows] != ignore_index)[:, None], hidden[rows], 0)
            if weight_grad is not None:
                add_product(weight_grad[:V], dx[0].t(), counted, factor)
            elif start == 0:
                write_product(dweight[:V], dx[0].t(), counted)
            else:
                add_product(dweight[:V], dx[0].t(), counted)
        if bias is not None:
            total = dx[0].sum(0, dtype=torch.float32)
            dbias[:V] = total if start == 0 else dbias[:V] + total
        del x, dx  # before the next piece is made
    if need_hidden and group is not None:
        all_reduce(dhidden, group)
    return logprobs, dhidden, dweight, dbias


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    scale, dhidden, dweight, dbias = output[-4:]
    *_, weight_grad, upstream, _, _ = inputs
    ctx.save_for_backward(dhidden, dweight, dbias, scale)
    ctx.promised = None if weight_grad is None else upstream
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.constants = (None,) * (len(inputs) - 3)


def _gradient(ctx, dloss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    *sums, scale = ctx.saved_tensors
    gradients: list[Tensor | None] = [None, None, None]
    if dloss is not None:
        if ctx.promised is not None:  # to raise, the host would have to wait for the device
            dloss = torch.where(dloss == ctx.promised, dloss, torch.nan)
        for i, needed in enumerate(ctx.needs_input_grad[:3]):
            if needed:  # multiplied in fp32, rounded on the way to memory
                gradients[i] = torch.empty_like(sums[i], dtype=ctx.dtype)
                torch.mul(sums[i], dloss * scale, out=gradients[i])
    return *gradients, *ctx.constants


def _scale(like: Tensor, denominator: float, denominators: Tensor | None, count: Tensor) -> Tensor:
    """1 / n, () fp32: of the tensor, else of the number, else, where this is 0, of the count."""
    if denominators is not None:
        n = denominators.to(like.device, torch.float32)
    elif denominator:
        n = torch.full((), denominator, dtype=torch.float32, device=like.device)
    else:
        n = count.clamp(min=1).float()
    return 1 / n


@op(
    lambda hidden, weight, bias, *rest:
    (*hidden.new_empty(2, dtype=torch.float32), *_sums_like(hidden, weight, bias, *rest[-2:]))
)  # fmt: skip
def _linear_cross_entropy(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V or more, d)
    bias: Tensor | None,
    tokens: Tensor,  # (N,)
    denominator: float,  # 0: the number of tokens that count
    denominators: Tensor | None,  # (), in its place
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    ignore_index: int,
    vocab_start: int,
    V: int,
    group: str | None,
    weight_grad: Tensor | None,  # (V or more, d) fp32: changed in place; not when registered
    upstream: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = _scale(hidden, denominator, denominators, (tokens != ignore_index).sum())
    logprobs, dhidden, dweight, dbias = _with_gradients(
        lambda rows, logprobs: torch.full_like(logprobs, -1.0), hidden, weight, bias, tokens,
        temperature, temperatures, ignore_index, vocab_start, V, group, weight_grad,
        upstream / (denominator or 1), need_hidden, need_weight,
    )  # fmt: skip
    return -logprobs.sum() * scale, scale, dhidden, dweight, dbias


_linear_cross_entropy.differentiate(_setup_context, _gradient)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    denominator: float | Tensor | None = None,
    weight_grad: Tensor | None = None,
    upstream: float = 1.0,
) -> Tensor:
    """Mean of -log p over the tokens that are not ignore_index: (..., d), (V, d), (...) -> scalar.

    In nats, fp32, for SFT and pretraining; the arguments are those of `linear_token_logprobs`.
    denominator: the token count of the global batch when this is a part of it; parts then add up.
    Differentiable in hidden, weight and bias; the gradients are made here and kept, in fp32, for
    backward. In a group every rank must ask for the same gradients.
    weight_grad (V or more, d) fp32: what the gradient of weight is added to, here and now, in place
    of weight.grad; autograd sees a constant weight. denominator must then be a number, and so must
    be upstream, the gradient of this loss that backward will be given: a coefficient or a loss
    scale. If it is given another, the gradients that it makes are NaN. Without a gradient to make
    (torch.no_grad) nothing is added.
    fp64 runs the reference. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    hidden, weight, bias = reference.cast_as_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, tokens)
    check_denominator(denominator)
    check_weight_grad(weight_grad, upstream, hidden, weight, denominator)
    if not runs_kernel(hidden) or hidden.dtype == torch.float64:
        return reference.linear_cross_entropy(
            hidden, weight, tokens, bias=bias, temperature=temperature, ignore_index=ignore_index,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group, denominator=denominator,
            weight_grad=weight_grad, upstream=upstream,
        )  # fmt: skip
    if not wants_gradient(hidden, weight, bias):
        logprobs = linear_token_logprobs(
            hidden, weight, tokens, bias=bias, temperature=temperature, ignore_index=ignore_index,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group,
        )  # fmt: skip
        n = (tokens != ignore_index).sum().clamp(min=1) if denominator is None else denominator
        return -logprobs.sum() / n
    check_tokens(tokens, hidden)
    check_vocabulary(tokens, temperature, vocab_start, vocab_size)
    check_temperature(temperature, tokens, ignore_index)
    run: Callable = _linear_cross_entropy
    if weight_grad is not None:  # a registered op would have to say that it changes it
        run, weight = _linear_cross_entropy.eager, weight.detach()
    loss, *_ = run(
        row_contiguous(hidden), row_contiguous(weight), bias, tokens.reshape(-1).contiguous(),
        *number_or_tensor(denominator), *per_token(temperature, tokens), ignore_index, vocab_start,
        columns_that_count(len(weight), vocab_start, vocab_size), group_name(group), weight_grad,
        float(upstream), hidden.requires_grad, weight.requires_grad,
    )  # fmt: skip
    return loss


def _weights(mask: Tensor, cu_seqlens: Tensor | None, aggregation: str) -> tuple[Tensor, Tensor]:
    """(N,) fp32: what a token counts, up to 1 / n; and how many tokens, or sequences, there are."""
    valid = mask != 0
    if aggregation == "token-mean":
        return valid.flatten().float(), valid.sum()
    if cu_seqlens is None:
        counts = valid.sum(1)
        each = counts[:, None].expand_as(valid)
    else:
        bounds = cu_seqlens.long()
        before = torch.cat([bounds.new_zeros(1), valid.long().cumsum(0)])
        counts = before[bounds].diff()
        each = torch.repeat_interleave(counts, bounds.diff(), output_size=len(valid))
    return (valid / each.clamp(min=1)).flatten().float(), (counts > 0).sum()


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (), statistics, 1 / n (), and the gradients of hidden, weight and bias, up to 1 / n."""
    shapes = (), (len(POLICY_STATISTICS),), ()
    loss, statistics, scale = (hidden.new_empty(x, dtype=torch.float32) for x in shapes)
    return loss, statistics, scale, *_sums_like(hidden, weight, bias, *rest[-2:])


@op(_outputs)
def _linear_policy_loss(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V or more, d)
    bias: Tensor | None,
    tokens: Tensor,  # (N,), IGNORED where the mask is 0
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    denominator: float,  # 0: the number of tokens or sequences that count
    denominators: Tensor | None,  # (), in its place
    aggregation: str,
    clip_range: float,
    dual_clip: float | None,
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    vocab_start: int,
    V: int,
    group: str | None,
    weight_grad: Tensor | None,  # (V or more, d) fp32: changed in place; not when registered
    upstream: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights, count = _weights(mask, cu_seqlens, aggregation)
    old, flat_advantages, valid = (x.reshape(-1) for x in (old_logprobs, advantages, mask))

    def slope(rows: slice, logprobs: Tensor) -> Tensor:
        _, _, gradient, _ = policy_loss_and_gradient(
            logprobs, old[rows], flat_advantages[rows], True, valid[rows], None, 1.0, None,
            "token-mean", clip_range, dual_clip,
        )  # fmt: skip
        return (gradient * weights[rows]).float()

    logprobs, dhidden, dweight, dbias = _with_gradients(
        slope, hidden, weight, bias, tokens, temperature, temperatures, IGNORED, vocab_start, V,
        group, weight_grad, upstream / (denominator or 1), need_hidden, need_weight,
    )  # fmt: skip
    loss, statistics, _, _ = policy_loss_and_gradient(
        logprobs.view(mask.shape), old_logprobs, advantages, False, mask, cu_seqlens, denominator,
        denominators, aggregation, clip_range, dual_clip,
    )  # fmt: skip
    scale = _scale(hidden, denominator, denominators, count)
    return loss.float(), statistics.float(), scale, dhidden, dweight, dbias


_linear_policy_loss.differentiate(_setup_context, _gradient)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    weight_grad: Tensor | None = None,
    upstream: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_token_logprobs`: (..., d), (V, d), (...) … -> scalar, statistics.

    The arguments are those of the two; weight_grad and upstream are those of
    `linear_cross_entropy`. Differentiable in hidden, weight and bias; their gradients are made
    here, with three vocabulary-sized products, and kept, in fp32, for backward. Rows of hidden that
    the mask hides may hold anything. In a group every rank must ask for the same gradients. fp64
    runs the reference.
    Raises ValueError when shapes, dtypes or devices do not fit, and when a constant requires grad.
    """
    hidden, weight, bias = reference.cast_as_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, tokens)
    check_policy_loss(
        tokens, old_logprobs, advantages, mask, clip_range, dual_clip, aggregation, denominator,
        cu_seqlens,
    )  # fmt: skip
    check_weight_grad(weight_grad, upstream, hidden, weight, denominator)
    refuse_gradients(old_logprobs=old_logprobs, advantages=advantages)
    if not runs_kernel(hidden) or hidden.dtype == torch.float64:
        return reference.linear_policy_loss(
            hidden, weight, tokens, old_logprobs, advantages, mask, bias=bias,
            temperature=temperature, clip_range=clip_range, dual_clip=dual_clip,
            aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group, weight_grad=weight_grad,
            upstream=upstream,
        )  # fmt: skip
    check_tokens(tokens, hidden)
    check_vocabulary(tokens, temperature, vocab_start, vocab_size)
    check_temperature(temperature, mask)
    tokens = torch.where(mask != 0, tokens, IGNORED)
    if not wants_gradient(hidden, weight, bias):
        logprobs: Any = linear_token_logprobs(
            hidden, weight, tokens, bias=bias, temperature=temperature, ignore_index=IGNORED,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group,
        )  # fmt: skip
        return policy_loss(
            logprobs, old_logprobs, advantages, mask, clip_range=clip_range, dual_clip=dual_clip,
            aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    run: Callable = _linear_policy_loss
    if weight_grad is not None:  # a registered op would have to say that it changes it
        run, weight = _linear_policy_loss.eager, weight.detach()
    loss, statistics, *_ = run(
        row_contiguous(hidden), row_contiguous(weight), bias, tokens.reshape(-1).contiguous(),
        old_logprobs, advantages, mask, cu_seqlens, *number_or_tensor(denominator), aggregation,
        float(clip_range), None if dual_clip is None else float(dual_clip),
        *per_token(temperature, tokens), vocab_start,
        columns_that_count(len(weight), vocab_start, vocab_size), group_name(group), weight_grad,
        float(upstream), hidden.requires_grad, weight.requires_grad,
    )  # fmt: skip
    return loss, dict(zip(POLICY_STATISTICS, statistics, strict=True))
