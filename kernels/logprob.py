"""Log-probability of given tokens, and the entropy, without storing the softmax.

Over the columns j of a row x at temperature t, with M = max x_j and z_j = (x_j - M) / t:

    S = sum e^z_j        log p_j = z_j - log S        H = log S - (1 / S) sum e^z_j z_j

    forward     log p_y and H
    backward    dx_j = (dlogprob ([j = y] - p_j) - dentropy p_j (log p_j + H)) / t

Moved, for N rows of V columns that count: forward N V logits read, backward N V read and N V
written. A row to be ignored, or without upstream gradient, is not read. Saved: the caller's logits
and tokens, and M, S, H per row in fp32.

A program of `_forward` takes SPLIT columns of a row, with a maximum and sum per thread, and leaves
one part: (max, sum, target logit, sum of e^z z). `_combine` joins the parts of a row in order.
Splits depend on V alone, so a row's result does not depend on its batch, nor on the run. When the
vocabulary is split over ranks, one all-gather of each rank's joined part feeds `_combine` again;
backward needs no communication. Meaning: `reference.token_logprobs`.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetrad.kernels import reference
from tetrad.kernels.launch import row_block, runs_kernel

BLOCKS_PER_SPLIT = 4
ROWS_PER_COMBINE = 128
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _finite(top):
    """`top`, or 0 where nothing was seen yet: -inf - -inf would be NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _decay(top, new_top, scale):
    """log2 of the factor that moves sums relative to `top` to `new_top`; empty sums need none."""
    return tl.where(top == -float("inf"), 0.0, (top - new_top) * scale)


@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "inner", "N"])
def _forward(
    parts_ptr,  # (splits, 3 or 4, N) fp32, out
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    ignore_index,
    vocab_start,
    inner,
    outer_stride,
    inner_stride,
    column_stride,
    V,  # columns that count; the others are padding
    N,
    PER_TOKEN: tl.constexpr,  # temperature is a tensor
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a block that a thread holds side by side
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # 32k rows of a 128k vocabulary pass 2**31
    first = tl.program_id(1) * SPLIT
    token = tl.load(tokens_ptr + row).to(tl.int64)
    t = tl.load(temperature + row) if PER_TOKEN else temperature
    scale = LOG2E / t
    logits_ptr += row // inner * outer_stride + row % inner * inner_stride
    end = tl.where(token == ignore_index, first, tl.minimum(first + SPLIT, V))

    # One maximum per thread and GROUP columns: a maximum per column would cost two exp2 for each.
    tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(first, end, BLOCK):
        columns = start + tile
        x = tl.load(
            logits_ptr + columns.to(tl.int64) * column_stride,
            mask=columns < V,
            other=-float("inf"),
        ).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        z = (x - _finite(new_top)[:, None]) * scale  # in units of log 2
        weights = tl.exp2(z)
        decay = _decay(top, new_top, scale)
        if ENTROPY:
            z = tl.where(x == -float("inf"), 0.0, z)
            weighted = tl.exp2(decay) * (weighted + total * decay) + tl.sum(weights * z, 1)
        total = tl.exp2(decay) * total + tl.sum(weights, 1)
        top = new_top

    new_top = tl.max(top, 0)
    decay = _decay(top, new_top, scale)
    column = token - vocab_start
    here = (column >= first) & (column < end)
    target = tl.load(logits_ptr + column * column_stride, mask=here, other=-float("inf"))
    parts_ptr += tl.program_id(1).to(tl.int64) * (4 if ENTROPY else 3) * N + row
    tl.store(parts_ptr, new_top)
    tl.store(parts_ptr + N, tl.sum(tl.exp2(decay) * total, 0))
    tl.store(parts_ptr + 2 * N, target.to(tl.float32))
    if ENTROPY:
        tl.store(parts_ptr + 3 * N, tl.sum(tl.exp2(decay) * (weighted + total * decay), 0))


@triton.jit(do_not_specialize=["ignore_index", "n_parts", "N"])
def _combine(
    joined_ptr,  # (3 or 4, N) fp32, out
    logprobs_ptr,  # (N,) fp32, out
    entropy_ptr,  # (N,) fp32, out
    parts_ptr,  # (n_parts, 3 or 4, N) fp32
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    ignore_index,
    n_parts,
    N,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    t = tl.load(temperature + rows, mask=inside, other=1.0) if PER_TOKEN else temperature
    scale = LOG2E / t
    size = (4 if ENTROPY else 3) * N.to(tl.int64)
    parts_ptr += rows
    joined_ptr += rows

    top = tl.full([ROWS], -float("inf"), tl.float32)
    for i in range(n_parts):
        top = tl.maximum(top, tl.load(parts_ptr + i * size, mask=inside, other=-float("inf")))
    total = tl.zeros([ROWS], tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for i in range(n_parts):
        part = parts_ptr + i * size
        decay = _decay(tl.load(part, mask=inside, other=-float("inf")), top, scale)
        part_total = tl.load(part + N, mask=inside, other=0.0)
        total += tl.exp2(decay) * part_total
        target = tl.maximum(target, tl.load(part + 2 * N, mask=inside, other=-float("inf")))
        if ENTROPY:
            part_weighted = tl.load(part + 3 * N, mask=inside, other=0.0)
            weighted += tl.exp2(decay) * (part_weighted + part_total * decay)

    counted = tl.load(tokens_ptr + rows, mask=inside, other=0) != ignore_index
    # max first: at logits near 1e4, x - (max + log sum) would lose four digits to cancellation
    logprobs = (target - _finite(top)) / t - tl.log(total)
    tl.store(logprobs_ptr + rows, tl.where(counted, logprobs, 0.0), mask=inside)
    tl.store(joined_ptr, top, mask=inside)
    tl.store(joined_ptr + N, total, mask=inside)
    tl.store(joined_ptr + 2 * N, target, mask=inside)
    if ENTROPY:
        entropy = tl.log(total) - LN2 * weighted / total
        tl.store(entropy_ptr + rows, tl.where(counted, entropy, 0.0), mask=inside)
        tl.store(joined_ptr + 3 * N, weighted, mask=inside)


@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "inner", "N"])
def _backward(
    dlogits_ptr,  # (N // inner, inner, columns) float, out, any strides
    dlogprobs_ptr,  # (N,) fp32
    dentropy_ptr,  # (N,) fp32
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    joined_ptr,  # (3 or 4, N) fp32
    entropy_ptr,  # (N,) fp32
    ignore_index,
    vocab_start,
    inner,
    d_outer_stride,
    d_inner_stride,
    d_column_stride,
    outer_stride,
    inner_stride,
    column_stride,
    V,  # columns that count
    n_columns,
    N,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = columns.to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    t = tl.load(temperature + row) if PER_TOKEN else temperature
    dlogprob = tl.load(dlogprobs_ptr + row)
    live = dlogprob != 0
    if ENTROPY:
        dentropy = tl.load(dentropy_ptr + row)
        live = live | (dentropy != 0)
    live = live & (token != ignore_index)

    logits_ptr += row // inner * outer_stride + row % inner * inner_stride
    mask = (columns < V) & live
    x = tl.load(logits_ptr + wide * column_stride, mask=mask, other=-float("inf")).to(tl.float32)
    top, total = tl.load(joined_ptr + row), tl.load(joined_ptr + N + row)
    log2_p = (x - _finite(top)) * (LOG2E / t) - tl.log2(total)
    p = tl.exp2(log2_p)
    hit = (columns == token - vocab_start) & (columns < V)
    dx = dlogprob * (hit.to(tl.float32) - p)
    if ENTROPY:
        log_p = tl.where(x == -float("inf"), 0.0, log2_p * LN2)  # 0 * -inf would be NaN
        dx -= dentropy * p * (log_p + tl.load(entropy_ptr + row))
    dlogits_ptr += row // inner * d_outer_stride + row % inner * d_inner_stride
    tl.store(
        dlogits_ptr + wide * d_column_stride,
        tl.where(live, dx / t, 0.0),
        mask=columns < n_columns,
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits: Tensor,  # (outer, inner, columns)
        tokens: Tensor,  # (N,)
        temperature: float | Tensor,
        entropy: bool,
        ignore_index: int,
        vocab_start: int,
        V: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        N, inner = len(tokens), logits.shape[1]
        flags = {"PER_TOKEN": isinstance(temperature, Tensor), "ENTROPY": entropy}
        block = row_block(V)
        split = BLOCKS_PER_SPLIT * block
        n_splits = max(triton.cdiv(V, split), 1)
        parts = logits.new_empty(n_splits, 3 + entropy, N, dtype=torch.float32)
        _forward[(N, n_splits)](
            parts, logits, tokens, temperature, ignore_index, vocab_start, inner, *logits.stride(),
            V, N, **flags, BLOCK=block, GROUP=16 // logits.element_size(), SPLIT=split, num_warps=4,
        )  # fmt: skip

        joined = torch.empty_like(parts[0])
        logprobs = torch.empty_like(parts[0, 0])
        entropies = torch.empty_like(logprobs) if entropy else None

        def combine(parts: Tensor) -> None:
            _combine[(triton.cdiv(N, ROWS_PER_COMBINE),)](
                joined, logprobs, entropies, parts, tokens, temperature, ignore_index, len(parts),
                N, **flags, ROWS=ROWS_PER_COMBINE, num_warps=4,
            )  # fmt: skip

        combine(parts)
        if group is not None:
            parts = joined.new_empty(group.size() * len(joined), N)
            dist.all_gather_into_tensor(parts, joined, group=group)
            combine(parts.view(group.size(), *joined.shape))
        ctx.save_for_backward(logits, tokens, joined, entropies)
        ctx.settings = temperature, ignore_index, vocab_start, V, flags
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs: Tensor, dentropy: Tensor | None):
        logits, tokens, joined, entropies = ctx.saved_tensors
        temperature, ignore_index, vocab_start, V, flags = ctx.settings
        n_columns = logits.shape[2]
        dlogits = torch.empty_like(logits)
        block = row_block(n_columns)
        _backward[(len(tokens), triton.cdiv(n_columns, block))](
            dlogits, dlogprobs.contiguous(), dentropy.contiguous() if flags["ENTROPY"] else None,
            logits, tokens, temperature, joined, entropies, ignore_index, vocab_start,
            logits.shape[1], *dlogits.stride(), *logits.stride(), V, n_columns, len(tokens),
            **flags, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return dlogits, None, None, None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(token) under softmax(logits / temperature), in nats: (..., V), (...) -> (...) fp32.

    With `entropy`, also the entropy of that softmax (...); both are differentiable in `logits`,
    which may have any strides and are left untouched. Where tokens == ignore_index the results and
    gradients are 0 and the logits are not read. A token outside the vocabulary has log-prob -inf.
    temperature: a positive number, or a tensor that broadcasts to `tokens`.
    group: the process group over which the vocabulary is split; this rank holds the columns
    [vocab_start, vocab_start + V), as many as it likes. Columns at or beyond `vocab_size` are
    padding: not read, gradient 0. Every rank must hand back the same upstream gradient.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    reference._check_token_logprobs(logits, tokens, temperature, vocab_start, vocab_size)
    if not runs_kernel(logits) or logits.dtype == torch.float64:  # Triton's scalars are fp32
        return reference.token_logprobs(
            logits, tokens, temperature=temperature, entropy=entropy, ignore_index=ignore_index,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group,
        )  # fmt: skip
    # Two leading dimensions reach the kernel as they are, a slice [:, :-1] included; flattening
    # more of them copies only when their strides do not line up.
    rows = logits.flatten(0, -3) if logits.dim() > 3 else logits[(None,) * (3 - logits.dim())]
    if isinstance(temperature, Tensor):
        temperature = temperature.float().broadcast_to(tokens.shape).reshape(-1).contiguous()
    else:
        temperature = float(temperature)
    V = logits.shape[-1]
    V = V if vocab_size is None else min(max(vocab_size - vocab_start, 0), V)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        logprobs, entropies = _TokenLogprobs.apply(
            rows, tokens.reshape(-1).contiguous(), temperature, entropy, ignore_index, vocab_start,
            V, group,
        )  # fmt: skip
    logprobs = logprobs.view(tokens.shape)
    return (logprobs, entropies.view(tokens.shape)) if entropy else logprobs
