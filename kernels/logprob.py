"""Log-probability of given tokens, and the entropy, without storing the softmax.

Over the columns j of a row x at temperature t, with y the given token, M = max x_j and
z_j = (x_j - M) / t:

    R = sum over j != y of e^z_j      S = R + e^z_y
    log p_y = z_y - log S             (-log1p(R) where y is the most likely token)
    H = log S - (1 / S) sum e^z_j z_j

    forward     log p_y and H
    backward    dx_j = (dlogprob ([j = y] - p_j) - dentropy p_j (log p_j + H)) / t
                with 1 - p_y = R / S

R is summed without y, so that neither log p_y nor 1 - p_y cancels when the model is sure of y: a
log-prob of -1e-12 has all its digits.

Moved, for N rows of V columns that count: forward N V logits read, backward N V read and N V
written. A row to be ignored, or without upstream gradient, is not read. Saved: the caller's logits
and tokens, and M, S, R, H per row in fp32.

A program of `_forward` takes SPLIT columns of a row, with a maximum and sum per thread, and leaves
one part: (max and sum without y, logit of y, sum of e^z z without y). `_combine` joins the parts of
a row in order. Splits depend on V alone, so a row's result does not depend on its batch, nor on the
run. When the vocabulary is split over ranks, one all-gather of each rank's joined part feeds
`_combine` again; backward needs no communication. Meaning: `reference.token_logprobs`.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_temperature,
    check_token_logprobs,
)
from tetrad.kernels.launch import all_gather, group_name, op, row_block, runs_kernel

BLOCKS_PER_SPLIT = 16  # what a program does around its blocks is 5 % of its instructions
ROWS_PER_COMBINE = 128
PARTS_AT_ONCE = 16
LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two
LN2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-1000.0)  # stands for the log2 of a weight of 0: 0 * -inf would be NaN


@triton.jit
def finite(top):
    """`top`, or 0 where nothing was seen yet: -inf - -inf would be NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def decay(top, new_top, scale):
    """log2 of the factor that moves sums relative to `top` to `new_top`; empty sums need none."""
    return tl.where(top == -float("inf"), 0.0, (top - new_top) * scale)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact also where 1 + x rounds (Kahan)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def online(top, total, weighted, x, scale, ENTROPY: tl.constexpr):
    """Sums of e^z and e^z z of the columns seen so far, joined by x (rows, columns).

    top, total, weighted and scale (rows,): of a row each, or of a part of one.
    """
    new_top = tl.maximum(top, tl.max(x, 1))
    z = (x - finite(new_top)[:, None]) * scale[:, None]  # in units of log 2
    weights = tl.exp2(z)
    moved = decay(top, new_top, scale)
    if ENTROPY:
        z = tl.maximum(z, LEAST)
        weighted = tl.exp2(moved) * (weighted + total * moved) + tl.sum(weights * z, 1)
    total = tl.exp2(moved) * total + tl.sum(weights, 1)
    return new_top, total, weighted


@triton.jit
def _row_at(row, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """Where a row of (outer, inner, columns) starts: 32k rows of a 128k vocabulary pass 2**31."""
    # The division is done before widening: one of 64 bits takes a hundred instructions.
    outer, place = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    return (outer * outer_stride + place * inner_stride) * UNIT


@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "inner", "N"])
def _forward(
    parts_ptr,  # (splits, 3 or 4, N) fp32, out
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    ignore_index,
    vocab_start,
    inner,
    outer_stride,  # in UNITs, as all that follow but column_stride
    inner_stride,
    column_stride,
    V,  # columns that count; the others are padding
    N,
    PER_TOKEN: tl.constexpr,  # temperature is a tensor
    ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,  # elements in which rows are measured, so that loads of 128 bits are seen
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # columns of a block that a thread holds side by side
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * SPLIT
    V = V * UNIT
    token = tl.load(tokens_ptr + row).to(tl.int64)
    t = tl.load(temperature + row) if PER_TOKEN else temperature
    scale = LOG2E / t
    logits_ptr += _row_at(row, inner, outer_stride, inner_stride, UNIT)
    end = tl.where(token == ignore_index, first, tl.minimum(first + SPLIT, V))
    column = token - vocab_start
    here = (column >= first) & (column < end)
    # Blocks that are whole and without the token need neither mask nor comparison, which would be
    # a quarter of the instructions. So the token's own block comes after them, and then the rest.
    whole = (end - first) // BLOCK
    own = tl.where(here, (column - first) // BLOCK, whole).to(tl.int32)
    plain = tl.where(own < whole, whole - 1, whole)

    # One maximum per thread and GROUP columns: a maximum per column would cost two exp2 for each.
    tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK // GROUP], tl.float32)
    scales = tl.zeros([BLOCK // GROUP], tl.float32) + scale
    lanes = tile.to(tl.int64) * column_stride  # strides of columns may be large
    for i in range(plain):
        start = first + tl.where(i < own, i, i + 1) * BLOCK
        x = tl.load(logits_ptr + start.to(tl.int64) * column_stride + lanes).to(tl.float32)
        top, total, weighted = online(top, total, weighted, x, scales, ENTROPY)
    for i in range(plain, tl.cdiv(end - first, BLOCK)):
        start = first + tl.where(i < whole, own, i) * BLOCK
        x = tl.load(
            logits_ptr + start.to(tl.int64) * column_stride + lanes,
            mask=tile < end - start,
            other=-float("inf"),
        ).to(tl.float32)
        hit = tl.where(here, column - start, -1).to(tl.int32)
        x = tl.where(tile == hit, -float("inf"), x)
        top, total, weighted = online(top, total, weighted, x, scales, ENTROPY)

    new_top = tl.max(top, 0)
    moved = decay(top, new_top, scale)
    target = tl.load(logits_ptr + column * column_stride, mask=here, other=-float("inf"))
    parts_ptr += tl.program_id(1).to(tl.int64) * (4 if ENTROPY else 3) * N + row
    tl.store(parts_ptr, new_top)
    tl.store(parts_ptr + N, tl.sum(tl.exp2(moved) * total, 0))
    tl.store(parts_ptr + 2 * N, target.to(tl.float32))
    if ENTROPY:
        tl.store(parts_ptr + 3 * N, tl.sum(tl.exp2(moved) * (weighted + total * moved), 0))


@triton.jit(do_not_specialize=["ignore_index", "n_parts", "N", "joined_stride"])
def _combine(
    joined_ptr,  # (3 or 4, N) fp32, out: the joined part; None when this is the last join
    logprobs_ptr,  # (N,) fp32, out, with the last join, as all that follow
    entropy_ptr,  # (N,) fp32, out
    saved_ptr,  # (3, N) fp32, out: M, S, R
    parts_ptr,  # (n_parts, 3 or 4, N) fp32
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    ignore_index,
    n_parts,
    N,
    joined_stride,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    t = tl.load(temperature + rows, mask=inside, other=1.0) if PER_TOKEN else temperature
    scale = LOG2E / t
    wide = N.to(tl.int64)
    size = (4 if ENTROPY else 3) * wide
    parts_ptr += rows

    # Several parts at a time: a load waits as long as sixteen.
    some = tl.arange(0, PARTS)[:, None].to(tl.int64)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    for i in range(0, n_parts, PARTS):
        mask = inside[None, :] & (some < n_parts - i)
        part_top = tl.load(parts_ptr[None, :] + (i + some) * size, mask=mask, other=-float("inf"))
        top = tl.maximum(top, tl.max(part_top, 0))
    rest = tl.zeros([ROWS], tl.float32)
    target = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    weighted = tl.zeros([ROWS], tl.float32)
    scales = tl.zeros([ROWS], tl.float32) + scale
    for i in range(0, n_parts, PARTS):
        mask = inside[None, :] & (some < n_parts - i)
        part = parts_ptr[None, :] + (i + some) * size
        part_top = tl.load(part, mask=mask, other=-float("inf"))
        moved = decay(part_top, top[None, :], scales[None, :])
        part_rest = tl.load(part + wide, mask=mask, other=0.0)
        part_target = tl.load(part + 2 * wide, mask=mask, other=-float("inf"))
        rest += tl.sum(tl.exp2(moved) * part_rest, 0)
        own = part_target != -float("inf")  # in one part at most; NaN in no maximum
        target += tl.sum(tl.where(own, part_target, 0.0), 0)
        found += tl.sum(own.to(tl.int32), 0)
        if ENTROPY:
            part_weighted = tl.load(part + 3 * wide, mask=mask, other=0.0)
            weighted += tl.sum(tl.exp2(moved) * (part_weighted + part_rest * moved), 0)
    target = tl.where(found > 0, target, -float("inf"))

    if joined_ptr is not None:
        joined_ptr += rows
        stride = joined_stride.to(tl.int64)
        tl.store(joined_ptr, top, mask=inside)
        tl.store(joined_ptr + stride, rest, mask=inside)
        tl.store(joined_ptr + 2 * stride, target, mask=inside)
        if ENTROPY:
            tl.store(joined_ptr + 3 * stride, weighted, mask=inside)
    else:
        counted = tl.load(tokens_ptr + rows, mask=inside, other=0) != ignore_index
        new_top = tl.maximum(top, target)
        moved = decay(top, new_top, scale)
        # max first: at logits near 1e4, x - (max + log sum) would lose four digits to cancellation
        z = (target - finite(new_top)) * scale
        weight = tl.exp2(z)
        weighted = tl.exp2(moved) * (weighted + rest * moved)
        rest = tl.exp2(moved) * rest
        total = rest + weight
        log_total = tl.where(z == 0, log1p(rest), tl.log(total))
        logprobs = tl.where(z == 0, 0.0, (target - finite(new_top)) / t) - log_total
        tl.store(logprobs_ptr + rows, tl.where(counted, logprobs, 0.0), mask=inside)
        saved_ptr += rows
        tl.store(saved_ptr, new_top, mask=inside)
        tl.store(saved_ptr + wide, total, mask=inside)
        tl.store(saved_ptr + 2 * wide, rest, mask=inside)
        if ENTROPY:
            weighted += tl.where(weight == 0, 0.0, weight * z)  # 0 * -inf would be NaN
            entropy = log_total - LN2 * weighted / total
            tl.store(entropy_ptr + rows, tl.where(counted, entropy, 0.0), mask=inside)


@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "inner", "N"])
def _backward(
    dlogits_ptr,  # (N // inner, inner, columns) float, out, any strides; may be the logits
    dlogprobs_ptr,  # (N,) fp32, or None
    dentropy_ptr,  # (N,) fp32, or None
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    saved_ptr,  # (3, N) fp32: M, S, R
    entropy_ptr,  # (N,) fp32
    ignore_index,
    vocab_start,
    inner,
    d_outer_stride,  # in UNITs, as all that follow but the column strides
    d_inner_stride,
    d_column_stride,
    outer_stride,
    inner_stride,
    column_stride,
    V,  # columns that count
    n_columns,
    N,
    PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    tile = tl.arange(0, BLOCK)
    left = V * UNIT - first  # columns that count, of this block and those behind it
    token = tl.load(tokens_ptr + row).to(tl.int64)
    t = tl.load(temperature + row) if PER_TOKEN else temperature
    ignored = token == ignore_index
    upstream = 0.0
    if dlogprobs_ptr is not None:
        dlogprob = tl.where(ignored, 0.0, tl.load(dlogprobs_ptr + row))
        upstream += tl.abs(dlogprob)
    if dentropy_ptr is not None:
        dentropy = tl.where(ignored, 0.0, tl.load(dentropy_ptr + row))
        upstream += tl.abs(dentropy)

    dx = tl.zeros([BLOCK], tl.float32)
    if upstream != 0:
        wide = N.to(tl.int64)
        saved_ptr += row
        top, total = tl.load(saved_ptr), tl.load(saved_ptr + wide)
        logits_ptr += _row_at(row, inner, outer_stride, inner_stride, UNIT)
        logits_ptr += first.to(tl.int64) * column_stride
        lanes = tile.to(tl.int64) * column_stride
        if left >= BLOCK:
            x = tl.load(logits_ptr + lanes).to(tl.float32)
        else:
            x = tl.load(logits_ptr + lanes, mask=tile < left, other=-float("inf")).to(tl.float32)
        z = (x - finite(top)) * (LOG2E / t)
        weights = tl.exp2(z)
        if dlogprobs_ptr is not None:
            slope = dlogprob / t
            dx = weights * (-slope / total)
            hit = token - vocab_start - first
            if (hit >= 0) & (hit < tl.minimum(left, BLOCK)):  # no other block compares
                one_minus_p = tl.load(saved_ptr + 2 * wide) / total
                dx = tl.where(tile == hit.to(tl.int32), slope * one_minus_p, dx)
        if dentropy_ptr is not None:
            slope = dentropy / t / total
            offset = slope * (tl.log(total) - tl.load(entropy_ptr + row))
            dx += weights * (offset - (LN2 * slope) * tl.maximum(z, LEAST))
        if left < BLOCK:  # padding, whatever the row is: 0 * NaN would be NaN
            dx = tl.where(tile < left, dx, 0.0)
    dlogits_ptr += _row_at(row, inner, d_outer_stride, d_inner_stride, UNIT)
    dlogits_ptr += first.to(tl.int64) * d_column_stride
    lanes = tile.to(tl.int64) * d_column_stride
    room = n_columns * UNIT - first
    if room >= BLOCK:  # without a mask, stores of 128 bits also where n_columns is odd
        tl.store(dlogits_ptr + lanes, dx)
    else:
        tl.store(dlogits_ptr + lanes, dx, mask=tile < room)


def unit_of(*tensors: Tensor, V: int) -> int:
    """8 when every row of the tensors (outer, inner, columns) starts at, and V is, a multiple of 8.

    Triton alone sees multiples of 16, and would load V = 1000 element by element.
    """
    strides = [s for x in tensors for s, n in zip(x.stride()[:2], x.shape[:2]) if n > 1]
    aligned = all(x.stride(2) == 1 and x.shape[2] % 8 == 0 for x in tensors)
    return 8 if aligned and V % 8 == 0 and all(s % 8 == 0 for s in strides) else 1


def in_units(x: Tensor, unit: int) -> tuple[int, int, int]:
    """Strides of x (outer, inner, columns) as the kernels take them."""
    return x.stride(0) // unit, x.stride(1) // unit, x.stride(2)


def row_parts(
    logits: Tensor, tokens: Tensor, t: float | Tensor, entropy: bool, ignore_index: int,
    vocab_start: int, V: int,
) -> Tensor:  # fmt: skip
    """Parts (splits, 3 or 4, N) of the rows of logits (outer, inner, columns)."""
    N = len(tokens)
    block = row_block(V)
    split = BLOCKS_PER_SPLIT * block
    parts = logits.new_empty(max(triton.cdiv(V, split), 1), 3 + entropy, N, dtype=torch.float32)
    unit = unit_of(logits, V=V)
    if N:
        _forward[(N, len(parts))](
            parts, logits, tokens, t, ignore_index, vocab_start, logits.shape[1],
            *in_units(logits, unit), V // unit, N, PER_TOKEN=isinstance(t, Tensor),
            ENTROPY=entropy, UNIT=unit, BLOCK=block,
            GROUP=16 // logits.element_size(), SPLIT=split, num_warps=4,
        )  # fmt: skip
    return parts


def join_parts(parts: Tensor, joined: Tensor, tokens: Tensor, t: float | Tensor) -> None:
    """Join parts (parts, 3 or 4, N) into one (3 or 4, N), whose rows may lie apart."""
    N = len(tokens)
    if N:
        _combine[(triton.cdiv(N, ROWS_PER_COMBINE),)](
            joined, None, None, None, parts, tokens, t, 0, len(parts), N, joined.stride(0),
            PER_TOKEN=isinstance(t, Tensor), ENTROPY=len(joined) == 4, ROWS=ROWS_PER_COMBINE,
            PARTS=PARTS_AT_ONCE, num_warps=4,
        )  # fmt: skip


def finish_parts(
    parts: Tensor, tokens: Tensor, t: float | Tensor, ignore_index: int, group: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (N,), entropies (N,) or (0,), and M, S, R (3, N) from the parts of all ranks."""
    _, width, N = parts.shape
    if group is not None:
        joined = torch.empty_like(parts[0])
        join_parts(parts, joined, tokens, t)
        parts = all_gather(joined, group)
    logprobs, entropies, saved = outputs(parts[0], tokens, entropy=width == 4)
    if N:
        _combine[(triton.cdiv(N, ROWS_PER_COMBINE),)](
            None, logprobs, entropies, saved, parts, tokens, t, ignore_index, len(parts), N, 0,
            PER_TOKEN=isinstance(t, Tensor), ENTROPY=width == 4, ROWS=ROWS_PER_COMBINE,
            PARTS=PARTS_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return logprobs, entropies, saved


def write_dlogits(
    dlogits: Tensor, dlogprobs: Tensor | None, dentropy: Tensor | None, logits: Tensor,
    tokens: Tensor, t: float | Tensor, saved: Tensor, entropies: Tensor, ignore_index: int,
    vocab_start: int, V: int,
) -> None:  # fmt: skip
    """Gradient of the logits (outer, inner, columns) into dlogits, which may be the logits."""
    N, n_columns = len(tokens), logits.shape[2]
    block = row_block(n_columns)
    unit = unit_of(dlogits, logits, V=V)
    if N:
        _backward[(N, triton.cdiv(n_columns, block))](
            dlogits, None if dlogprobs is None else dlogprobs.contiguous(),
            None if dentropy is None else dentropy.contiguous(), logits, tokens, t, saved,
            entropies, ignore_index, vocab_start, logits.shape[1], *in_units(dlogits, unit),
            *in_units(logits, unit), V // unit,
            n_columns // unit, N, PER_TOKEN=isinstance(t, Tensor), UNIT=unit, BLOCK=block,
            num_warps=4,
        )  # fmt: skip


def outputs(like: Tensor, tokens: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for log-probs (N,), entropies (N,) or (0,), and M, S, R (3, N)."""
    N = tokens.shape[0]
    shapes = (N,), (N if entropy else 0,), (3, N)
    logprobs, entropies, saved = (like.new_empty(x, dtype=torch.float32) for x in shapes)
    return logprobs, entropies, saved


@op(lambda x, y, t, per_token, entropy, *_: outputs(x, y, entropy=entropy))
def _token_logprobs(
    logits: Tensor,  # (outer, inner, columns)
    tokens: Tensor,  # (N,)
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    entropy: bool,
    ignore_index: int,
    vocab_start: int,
    V: int,
    group: str | None,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    t = temperature if temperatures is None else temperatures
    parts = row_parts(logits, tokens, t, entropy, ignore_index, vocab_start, V)
    return finish_parts(parts, tokens, t, ignore_index, group)


@op(lambda dlogprobs, dentropy, logits, *_: torch.empty_like(logits))
def _token_logprobs_backward(
    dlogprobs: Tensor | None, dentropy: Tensor | None, logits: Tensor, tokens: Tensor,
    temperature: float, temperatures: Tensor | None, saved: Tensor, entropies: Tensor,
    ignore_index: int, vocab_start: int, V: int,
) -> Tensor:  # fmt: skip
    t = temperature if temperatures is None else temperatures
    dlogits = torch.empty_like(logits)
    write_dlogits(
        dlogits, dlogprobs, dentropy, logits, tokens, t, saved, entropies, ignore_index,
        vocab_start, V,
    )  # fmt: skip
    return dlogits


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, tokens, temperature, temperatures, _, *ctx.vocabulary, _, ctx.inplace = inputs
    _, entropies, saved = output
    ctx.save_for_backward(logits, tokens, temperatures, saved, entropies)
    ctx.temperature = temperature
    ctx.set_materialize_grads(False)


def _gradient(ctx, dlogprobs: Tensor | None, dentropy: Tensor | None, _dsaved) -> tuple:
    logits, tokens, temperatures, saved, entropies = ctx.saved_tensors
    numbers = (tokens, ctx.temperature, temperatures, saved, entropies, *ctx.vocabulary)
    if dlogprobs is None and dentropy is None:
        dlogits = None
    elif ctx.inplace:
        if type(logits) not in (Tensor, torch.nn.Parameter):
            raise ValueError(f"inplace_backward is True; a {type(logits).__name__} has no memory")
        t = ctx.temperature if temperatures is None else temperatures
        dlogits = logits.detach()
        with torch.cuda.device_of(logits):
            write_dlogits(dlogits, dlogprobs, dentropy, dlogits, tokens, t, *numbers[3:])
        torch.autograd.graph.increment_version(logits)  # whoever saved them must not use them
    else:
        dlogits = _token_logprobs_backward(dlogprobs, dentropy, logits, *numbers)
    return dlogits, *(None,) * 9


_token_logprobs.differentiate(_setup_context, _gradient)


def as_rows(x: Tensor) -> Tensor:
    """(outer, inner, columns) without a copy for up to three dimensions, a slice [:, :-1] too.

    Flattening more of them copies only when their strides do not line up.
    """
    return x.flatten(0, -3) if x.dim() > 3 else x[(None,) * (3 - x.dim())]


def per_token(temperature: float | Tensor, tokens: Tensor) -> tuple[float, Tensor | None]:
    """A temperature as a registered op takes it: a number, or the (N,) fp32 that replace it."""
    if not isinstance(temperature, Tensor):
        return float(temperature), None
    return 1.0, temperature.float().broadcast_to(tokens.shape).reshape(-1).contiguous()


def columns_that_count(V: int, vocab_start: int, vocab_size: int | None) -> int:
    """How many of V columns from vocab_start on are no padding."""
    return V if vocab_size is None else min(max(vocab_size - vocab_start, 0), V)


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
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(token) under softmax(logits / temperature), in nats: (..., V), (...) -> (...) fp32.

    With `entropy`, also the entropy of that softmax (...); both are differentiable in `logits`,
    which may have any strides and are left untouched. Where tokens == ignore_index the results and
    gradients are 0 and the logits are not read. A token outside the vocabulary has log-prob -inf.
    A logit of +inf or NaN makes all results and gradients of its row NaN, but those of padding.
    temperature: a positive number, or a tensor that broadcasts to `tokens`.
    group: the process group over which the vocabulary is split; this rank holds the columns
    [vocab_start, vocab_start + V), as many as it likes. Columns at or beyond `vocab_size` are
    padding: not read, gradient 0. Every rank must hand back the same upstream gradient.
    inplace_backward: let backward write the gradient over the logits, and save its memory. PyTorch
    refuses what reads them afterwards; not for leaves, nor under torch.compile.
    fp64 logits run the reference. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    check_token_logprobs(logits, tokens, temperature, vocab_start, vocab_size, inplace_backward)
    if not runs_kernel(logits) or logits.dtype == torch.float64:  # Triton's scalars are fp32
        return reference.token_logprobs(
            logits, tokens, temperature=temperature, entropy=entropy, ignore_index=ignore_index,
            vocab_start=vocab_start, vocab_size=vocab_size, group=group,
        )  # fmt: skip
    check_temperature(temperature, tokens, ignore_index)
    logprobs, entropies, _ = _token_logprobs(
        as_rows(logits), tokens.reshape(-1).contiguous(), *per_token(temperature, tokens), entropy,
        ignore_index, vocab_start, columns_that_count(logits.shape[-1], vocab_start, vocab_size),
        group_name(group), inplace_backward,
    )  # fmt: skip
    logprobs = logprobs.view(tokens.shape)
    return (logprobs, entropies.view(tokens.shape)) if entropy else logprobs
