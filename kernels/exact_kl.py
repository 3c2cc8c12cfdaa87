"""The KL divergence between two softmaxes, exactly: the sum over the vocabulary, not an estimate.

Over the columns j of a row x and a reference row y at temperature t, with M, K their maxima,
z_j = (x_j - M) / t, u_j = (y_j - K) / t, S = sum e^z_j, U = sum e^u_j:

    forward     KL = (1 / S) sum e^z_j (z_j - u_j) - log S + log U        (sum p (log p - log q))
    backward    dx_j = g p_j (log p_j - log q_j - KL) / t

The maxima drop out of log p - log q, so nothing large is subtracted where p is near q. A column of
probability 0 counts nothing, whatever q is; where q is 0 and p is not, KL is infinite.
Moved: forward 2 N V logits read; backward 2 N V read and N V written. Rows that the mask hides, or
without upstream gradient, are not read. Saved: the inputs, and M, S, K, U, KL per row in fp32.
Splits, joins and ranks are those of logprob.py; the pieces of linear_exact_kl those of
linear_logprob.py: two products forward, four backward, and no logits are kept.
Meaning: `reference.exact_kl`, `reference.linear_exact_kl`.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_exact_kl,
    check_linear_exact_kl,
    check_rows,
    check_temperature,
)
from tetrad.kernels.launch import (
    all_gather,
    group_name,
    op,
    refuse_gradients,
    row_block,
    runs_kernel,
)
from tetrad.kernels.linear_logprob import (
    gradients_like,
    input_gradients,
    logits_of,
    pieces,
    row_contiguous,
)
from tetrad.kernels.logprob import (
    LN2,
    LOG2E,
    ROWS_PER_COMBINE,
    as_rows,
    columns_that_count,
    decay,
    finite,
    in_units,
    per_token,
    unit_of,
)
from tetrad.kernels.products import aligned

BLOCK = 2048  # columns: two tiles of logits share the registers
BLOCKS_PER_SPLIT = 8


@triton.jit
def _scaled(factor, x):
    """factor * x, where a factor of 0 wins over an infinite x."""
    return tl.where(factor == 0, 0.0, factor * x)


@triton.jit(do_not_specialize=["inner", "N"])
def _forward(
    parts_ptr,  # (splits, 5, N) fp32, out: M, S, K, U, sum of e^z (z - u)
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    ref_ptr,  # (N // inner, inner, columns) float, any strides
    mask_ptr,  # (N,), or None
    temperature,  # a number, or (N,) fp32
    inner,
    outer_stride,  # in UNITs, as all that follow but the column strides
    inner_stride,
    column_stride,
    ref_outer_stride,
    ref_inner_stride,
    ref_column_stride,
    V,  # columns that count
    N,
    PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * SPLIT
    V = V * UNIT
    scale = LOG2E / (tl.load(temperature + row) if PER_TOKEN else temperature)
    logits_ptr += (row // inner * outer_stride + row % inner * inner_stride) * UNIT
    ref_ptr += (row // inner * ref_outer_stride + row % inner * ref_inner_stride) * UNIT
    end = tl.minimum(first + SPLIT, V)
    if mask_ptr is not None:
        end = tl.where(tl.load(mask_ptr + row) != 0, end, first)

    tile = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
    ref_top = tl.full([BLOCK // GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    ref_total = tl.zeros([BLOCK // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK // GROUP], tl.float32)
    for start in range(first, end, BLOCK):
        columns = start + tile
        wide, inside = columns.to(tl.int64), columns < V
        x = tl.load(logits_ptr + wide * column_stride, mask=inside, other=-float("inf"))
        y = tl.load(ref_ptr + wide * ref_column_stride, mask=inside, other=-float("inf"))
        x, y = x.to(tl.float32), y.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 1))
        new_ref_top = tl.maximum(ref_top, tl.max(y, 1))
        z = (x - finite(new_top)[:, None]) * scale
        u = (y - finite(new_ref_top)[:, None]) * scale
        weights = tl.exp2(z)
        moved, ref_moved = decay(top, new_top, scale), decay(ref_top, new_ref_top, scale)
        weighted = _scaled(tl.exp2(moved), weighted + total * (moved - ref_moved))
        weighted += tl.sum(_scaled(weights, z - u), 1)
        total = tl.exp2(moved) * total + tl.sum(weights, 1)
        ref_total = tl.exp2(ref_moved) * ref_total + tl.sum(tl.exp2(u), 1)
        top, ref_top = new_top, new_ref_top

    new_top, new_ref_top = tl.max(top, 0), tl.max(ref_top, 0)
    moved, ref_moved = decay(top, new_top, scale), decay(ref_top, new_ref_top, scale)
    weighted = _scaled(tl.exp2(moved), weighted + total * (moved - ref_moved))
    parts_ptr += tl.program_id(1).to(tl.int64) * 5 * N + row
    tl.store(parts_ptr, new_top)
    tl.store(parts_ptr + N, tl.sum(tl.exp2(moved) * total, 0))
    tl.store(parts_ptr + 2 * N, new_ref_top)
    tl.store(parts_ptr + 3 * N, tl.sum(tl.exp2(ref_moved) * ref_total, 0))
    tl.store(parts_ptr + 4 * N, tl.sum(weighted, 0))


@triton.jit(do_not_specialize=["n_parts", "N"])
def _combine(
    joined_ptr,  # (5, N) fp32, out; the last row holds KL when FINISH
    kl_ptr,  # (N,) fp32, out when FINISH
    parts_ptr,  # (n_parts, 5, N) fp32
    mask_ptr,  # (N,), or None
    temperature,  # a number, or (N,) fp32
    n_parts,
    N,
    PER_TOKEN: tl.constexpr,
    FINISH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    t = tl.load(temperature + rows, mask=inside, other=1.0) if PER_TOKEN else temperature
    scale = LOG2E / t
    wide = N.to(tl.int64)
    parts_ptr += rows
    joined_ptr += rows

    top = tl.full([ROWS], -float("inf"), tl.float32)
    ref_top = tl.full([ROWS], -float("inf"), tl.float32)
    for i in range(n_parts):
        part = parts_ptr + i * 5 * wide
        top = tl.maximum(top, tl.load(part, mask=inside, other=-float("inf")))
        ref_top = tl.maximum(ref_top, tl.load(part + 2 * wide, mask=inside, other=-float("inf")))
    total = tl.zeros([ROWS], tl.float32)
    ref_total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for i in range(n_parts):
        part = parts_ptr + i * 5 * wide
        moved = decay(tl.load(part, mask=inside, other=-float("inf")), top, scale)
        ref_moved = decay(
            tl.load(part + 2 * wide, mask=inside, other=-float("inf")), ref_top, scale
        )
        part_total = tl.load(part + wide, mask=inside, other=0.0)
        part_weighted = tl.load(part + 4 * wide, mask=inside, other=0.0)
        total += tl.exp2(moved) * part_total
        ref_total += tl.exp2(ref_moved) * tl.load(part + 3 * wide, mask=inside, other=0.0)
        weighted += _scaled(tl.exp2(moved), part_weighted + part_total * (moved - ref_moved))

    if FINISH:
        # rounded as IEEE asks: a GPU's own division errs by two units, 1e-6 at a KL of 8 nats
        mean = LN2 * tl.div_rn(weighted, total)
        weighted = mean - tl.log(total) + tl.log(ref_total)
        counted = inside
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + rows, mask=inside, other=0) != 0
        tl.store(kl_ptr + rows, tl.where(counted, weighted, 0.0), mask=inside)
    tl.store(joined_ptr, top, mask=inside)
    tl.store(joined_ptr + wide, total, mask=inside)
    tl.store(joined_ptr + 2 * wide, ref_top, mask=inside)
    tl.store(joined_ptr + 3 * wide, ref_total, mask=inside)
    tl.store(joined_ptr + 4 * wide, weighted, mask=inside)


@triton.jit(do_not_specialize=["inner", "N"])
def _backward(
    dlogits_ptr,  # (N // inner, inner, columns) float, out, any strides
    dkl_ptr,  # (N,) fp32
    logits_ptr,  # (N // inner, inner, columns) float, any strides
    ref_ptr,  # (N // inner, inner, columns) float, any strides
    mask_ptr,  # (N,), or None
    temperature,  # a number, or (N,) fp32
    saved_ptr,  # (5, N) fp32: M, S, K, U, KL
    inner,
    d_outer_stride,  # in UNITs, as all that follow but the column strides
    d_inner_stride,
    d_column_stride,
    outer_stride,
    inner_stride,
    column_stride,
    ref_outer_stride,
    ref_inner_stride,
    ref_column_stride,
    V,  # columns that count
    n_columns,
    N,
    PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    V = V * UNIT
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = columns.to(tl.int64)
    t = tl.load(temperature + row) if PER_TOKEN else temperature
    dkl = tl.load(dkl_ptr + row)
    if mask_ptr is not None:
        dkl = tl.where(tl.load(mask_ptr + row) != 0, dkl, 0.0)

    logits_ptr += (row // inner * outer_stride + row % inner * inner_stride) * UNIT
    ref_ptr += (row // inner * ref_outer_stride + row % inner * ref_inner_stride) * UNIT
    mask = columns < tl.where(dkl != 0, V, 0)  # a row without a gradient is not read
    x = tl.load(logits_ptr + wide * column_stride, mask=mask, other=-float("inf")).to(tl.float32)
    y = tl.load(ref_ptr + wide * ref_column_stride, mask=mask, other=-float("inf")).to(tl.float32)
    saved_ptr += row
    size = N.to(tl.int64)
    top, total = tl.load(saved_ptr), tl.load(saved_ptr + size)
    ref_top, ref_total = tl.load(saved_ptr + 2 * size), tl.load(saved_ptr + 3 * size)
    log2_p = (x - finite(top)) * (LOG2E / t) - tl.log2(total)
    log2_q = (y - finite(ref_top)) * (LOG2E / t) - tl.log2(ref_total)
    dx = _scaled(tl.exp2(log2_p), LN2 * (log2_p - log2_q) - tl.load(saved_ptr + 4 * size))
    dlogits_ptr += (row // inner * d_outer_stride + row % inner * d_inner_stride) * UNIT
    tl.store(
        dlogits_ptr + wide * d_column_stride,
        tl.where(mask, dkl * dx / t, 0.0),
        mask=columns < n_columns * UNIT,
    )


def _joined(parts: Tensor, t: float | Tensor) -> Tensor:
    """Parts (parts, 5, N) of the rows, joined into one (5, N)."""
    _, _, N = parts.shape
    joined = torch.empty_like(parts[0])
    if N:
        _combine[(triton.cdiv(N, ROWS_PER_COMBINE),)](
            joined, None, parts, None, t, len(parts), N, PER_TOKEN=isinstance(t, Tensor),
            FINISH=False, ROWS=ROWS_PER_COMBINE, num_warps=4,
        )  # fmt: skip
    return joined


def _row_parts(x: Tensor, y: Tensor, mask: Tensor | None, t: float | Tensor, V: int) -> Tensor:
    """Parts (splits, 5, N) of the rows of logits x and y (outer, inner, columns)."""
    N = x.shape[0] * x.shape[1]
    block = min(row_block(V), BLOCK)
    split = BLOCKS_PER_SPLIT * block
    parts = x.new_empty(max(triton.cdiv(V, split), 1), 5, N, dtype=torch.float32)
    unit = unit_of(x, y, V=V)
    if N:
        _forward[(N, len(parts))](
            parts, x, y, mask, t, x.shape[1], *in_units(x, unit), *in_units(y, unit),
            V // unit, N, PER_TOKEN=isinstance(t, Tensor), UNIT=unit,
            BLOCK=block, GROUP=min(16 // z.element_size() for z in (x, y)), SPLIT=split,
            num_warps=4,
        )  # fmt: skip
    return parts


def _finished(
    parts: Tensor, mask: Tensor | None, t: float | Tensor, group: str | None
) -> tuple[Tensor, Tensor]:
    """KL (N,), and M, S, K, U, KL (5, N), from the parts of this rank's columns."""
    if group is not None:
        parts = all_gather(_joined(parts, t), group)
    N = parts.shape[2]
    kl, saved = parts.new_empty(N), torch.empty_like(parts[0])
    if N:
        _combine[(triton.cdiv(N, ROWS_PER_COMBINE),)](
            saved, kl, parts, mask, t, len(parts), N, PER_TOKEN=isinstance(t, Tensor), FINISH=True,
            ROWS=ROWS_PER_COMBINE, num_warps=4,
        )  # fmt: skip
    return kl, saved


def _write_dlogits(
    dlogits: Tensor, dkl: Tensor, x: Tensor, y: Tensor, mask: Tensor | None, t: float | Tensor,
    saved: Tensor, V: int,
) -> None:  # fmt: skip
    N, n_columns = saved.shape[1], x.shape[2]
    block = min(row_block(n_columns), BLOCK)
    unit = unit_of(dlogits, x, y, V=V)
    if N:
        _backward[(N, triton.cdiv(n_columns, block))](
            dlogits, dkl.contiguous(), x, y, mask, t, saved, x.shape[1],
            *in_units(dlogits, unit), *in_units(x, unit), *in_units(y, unit),
            V // unit, n_columns // unit, N, PER_TOKEN=isinstance(t, Tensor), UNIT=unit,
            BLOCK=block, num_warps=4,
        )  # fmt: skip


def _outputs(like: Tensor, N: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(N, dtype=torch.float32), like.new_empty(5, N, dtype=torch.float32)


@op(lambda x, *_: _outputs(x, x.shape[0] * x.shape[1]))
def _exact_kl(
    logits: Tensor,  # (outer, inner, columns)
    ref_logits: Tensor,  # (outer, inner, columns)
    mask: Tensor | None,  # (N,)
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    V: int,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    t = temperature if temperatures is None else temperatures
    return _finished(_row_parts(logits, ref_logits, mask, t, V), mask, t, group)


@op(lambda dkl, logits, *_: torch.empty_like(logits))
def _exact_kl_backward(
    dkl: Tensor, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float,
    temperatures: Tensor | None, saved: Tensor, V: int,
) -> Tensor:  # fmt: skip
    t = temperature if temperatures is None else temperatures
    dlogits = torch.empty_like(logits)
    _write_dlogits(dlogits, dkl, logits, ref_logits, mask, t, saved, V)
    return dlogits


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    logits, ref_logits, mask, ctx.temperature, temperatures, ctx.V, _ = inputs
    ctx.save_for_backward(logits, ref_logits, mask, temperatures, output[1])


def _gradient(ctx, dkl: Tensor, _dsaved: Tensor) -> tuple:
    logits, ref_logits, mask, temperatures, saved = ctx.saved_tensors
    dlogits = _exact_kl_backward(
        dkl, logits, ref_logits, mask, ctx.temperature, temperatures, saved, ctx.V
    )
    return dlogits, *(None,) * 6


_exact_kl.differentiate(_setup_context, _gradient)


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(p || q) of p = softmax(logits / t), q = softmax(ref_logits / t), in nats.

    (..., V), (..., V) -> (...) fp32; differentiable in logits, which may have any strides.
    temperature, vocab_size, vocab_start and group as in `token_logprobs`. mask (...): where it is 0
    the result and the gradient are 0 and no logits are read; default all. A token of p = 0 counts
    nothing; KL is infinite where q is 0 and p is not. fp64 runs the reference. Raises ValueError
    when shapes, dtypes or devices do not fit, and when ref_logits requires grad.
    """
    check_exact_kl(logits, ref_logits, mask, temperature, vocab_start, vocab_size)
    refuse_gradients(ref_logits=ref_logits)
    if not runs_kernel(logits) or torch.float64 in (logits.dtype, ref_logits.dtype):
        return reference.exact_kl(
            logits, ref_logits, temperature=temperature, vocab_size=vocab_size,
            vocab_start=vocab_start, group=group, mask=mask,
        )  # fmt: skip
    check_temperature(temperature, mask)
    rows = logits[..., 0]
    kl, _ = _exact_kl(
        as_rows(logits), as_rows(ref_logits),
        None if mask is None else mask.reshape(-1).contiguous(), *per_token(temperature, rows),
        columns_that_count(logits.shape[-1], vocab_start, vocab_size), group_name(group),
    )  # fmt: skip
    return kl.view(rows.shape)


@op(lambda hidden, *_: _outputs(hidden, hidden.shape[0]))
def _linear_exact_kl(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V or more, d)
    ref_hidden: Tensor,  # (N, e)
    ref_weight: Tensor,  # (V or more, e)
    mask: Tensor | None,  # (N,)
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    V: int,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    t = temperature if temperatures is None else temperatures
    joined = hidden.new_empty(5, len(hidden), dtype=torch.float32)
    for rows in pieces(len(hidden), 2 * V, 128):
        x = logits_of(hidden[rows], weight[:V], None)
        y = logits_of(ref_hidden[rows], ref_weight[:V], None)
        rows_t = t[rows] if isinstance(t, Tensor) else t
        parts = _row_parts(x, y, None if mask is None else mask[rows], rows_t, V)
        joined[:, rows] = _joined(parts, rows_t)
        del x, y  # before the next piece is made
    return _finished(joined[None], mask, t, group)


@op(lambda dkl, hidden, weight, *rest: gradients_like(hidden, weight, None, *rest[-2:])[:2])
def _linear_exact_kl_backward(
    dkl: Tensor, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor,
    mask: Tensor | None, temperature: float, temperatures: Tensor | None, saved: Tensor, V: int,
    group: str | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    t = temperature if temperatures is None else temperatures

    def dlogits(columns: slice) -> Tensor:
        x = logits_of(hidden, weight[columns], None)
        y = logits_of(ref_hidden, ref_weight[columns], None)
        dx = aligned(x.shape[1], x.shape[2], hidden.dtype, x.device)[None]
        _write_dlogits(dx, dkl, x, y, mask, t, saved, x.shape[2])
        return dx[0]

    counted = None if mask is None else mask != 0
    dhidden, dweight, _ = input_gradients(
        dlogits, pieces(V, 2 * len(hidden), 1024), hidden, weight, None, counted, V, group,
        need_hidden, need_weight,
    )  # fmt: skip
    return dhidden, dweight


def _linear_setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.temperature, temperatures, ctx.V, ctx.group = inputs
    ctx.save_for_backward(*tensors, temperatures, output[1])


def _linear_gradient(ctx, dkl: Tensor, _dsaved: Tensor) -> tuple:
    *tensors, temperatures, saved = ctx.saved_tensors
    need = ctx.needs_input_grad[:2]
    gradients = _linear_exact_kl_backward(
        dkl, *tensors, ctx.temperature, temperatures, saved, ctx.V, ctx.group, *need
    )
    return *(x if wanted else None for x, wanted in zip(gradients, need)), *(None,) * 7


_linear_exact_kl.differentiate(_linear_setup_context, _linear_gradient)


def linear_exact_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`exact_kl` of hidden @ weight.T against ref_hidden @ ref_weight.T: (..., d), (V, d) -> (...).

    The reference may have another width and type. No logits are kept; they are made in fp32.
    Differentiable in hidden and weight; autocast, group and the gradient of hidden as in
    `linear_token_logprobs`. Raises ValueError when shapes, dtypes or devices do not fit, and when
    an input of the reference requires grad.
    """
    hidden, weight = reference.cast_as_linear(hidden, weight)
    ref_hidden, ref_weight = reference.cast_as_linear(ref_hidden, ref_weight)
    check_linear_exact_kl(hidden, weight, ref_hidden, ref_weight)
    refuse_gradients(ref_hidden=ref_hidden, ref_weight=ref_weight)
    if not runs_kernel(hidden) or torch.float64 in (hidden.dtype, ref_hidden.dtype):
        return reference.linear_exact_kl(
            hidden, weight, ref_hidden, ref_weight, temperature=temperature, vocab_size=vocab_size,
            vocab_start=vocab_start, group=group, mask=mask,
        )  # fmt: skip
    rows = hidden[..., 0]
    check_rows(rows, mask, temperature, vocab_start, vocab_size)
    check_temperature(temperature, mask)
    kl, _ = _linear_exact_kl(
        *(row_contiguous(x) for x in (hidden, weight, ref_hidden, ref_weight)),
        None if mask is None else mask.reshape(-1).contiguous(), *per_token(temperature, rows),
        columns_that_count(len(weight), vocab_start, vocab_size), group_name(group),
    )  # fmt: skip
    return kl.view(rows.shape)
