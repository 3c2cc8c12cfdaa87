"""Log-probability of tokens from hidden states and the unembedding; the logits are never stored.

    x = hidden @ weight.T + bias, in fp32, and then as in logprob.py

With a gradient asked for, or more than FUSED_ROWS rows, the matrix products are cuBLAS's and work
goes in pieces of CHUNK_BYTES:

    forward     for some rows at a time: x, the parts of its rows               1 product (2 N V d)
    backward    for some columns at a time, over all rows: x again, dx in the type of the inputs,
                dweight = dx.T @ hidden, written once; dhidden += dx @ weight, in fp32
                                                                3 products; 2 with save_logits

The other order of the loops would need a (V, d) accumulator in fp32. Few rows without a gradient
are left to `_fused`, which keeps x in registers: one launch, no workspace, and a row's result does
not depend on its batch.
In both, x is not rounded to the inputs' type: a bf16 logit of 20 is off by up to 0.06, and so would
be the log of a PPO ratio. Saved: the inputs, M, S, R, H per row; with save_logits x too (N V fp32).

Moved for x and dx, in bytes: forward 8 N V (x written and read), backward 14 N V (x written and
read, dx written once and read by two products) with 2-byte inputs. Over a group: one all-gather of
3 or 4 numbers per row forward, one all-reduce of dhidden backward.
Meaning: `reference.linear_token_logprobs`.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_linear,
    check_temperature,
    check_tokens,
    check_vocabulary,
)
from tetrad.kernels.launch import (
    INTERPRETED,
    all_reduce,
    group_name,
    op,
    runs_kernel,
    wants_gradient,
)
from tetrad.kernels.logprob import (
    LOG2E,
    columns_that_count,
    finish_parts,
    join_parts,
    online,
    outputs,
    per_token,
    row_parts,
    write_dlogits,
)
from tetrad.kernels.products import add_product, aligned, matmul, write_product

CHUNK_BYTES = 2**30  # of fp32 logits at a time
# Without a gradient, `_fused` runs for so many rows at most. With one tile of rows either way reads
# the weight once, which takes longer than multiplying; `_fused` saves two launches and the logits.
# With more rows the two are alike: 8192 x 128256 x 4096 on an H200 took cuBLAS with the row kernel
# behind it 12.4 ms, 85 % of the product rate, and `_fused` 12.5 (14.1 in a hotter run); and cuBLAS
# gives the same bits as it does when a gradient is to follow, so that the first ratio of PPO is 1.
FUSED_ROWS = 128
SPLITS = 128  # of the vocabulary, at most: a few rows alone keep the multiprocessors of a GPU busy
# Tiles of rows: 132 programs at a time then work on 8 splits. Fewer than FUSED_ROWS are one tile.
TILES_TOGETHER = 16


@triton.jit(do_not_specialize=["ignore_index", "vocab_start", "N"])
def _fused(
    parts_ptr,  # (splits, 3 or 4, N) fp32, out
    hidden_ptr,  # (N, d) float
    weight_ptr,  # (V, d) float
    bias_ptr,  # (V,) float, or None
    tokens_ptr,  # (N,) int
    temperature,  # a number, or (N,) fp32
    ignore_index,
    vocab_start,
    hidden_stride,
    weight_stride,
    V,  # columns that count
    d,
    N,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE_DEPTHS: tl.constexpr,  # d is a multiple of DEPTH: no masks of it, which take registers
    SPLIT: tl.constexpr,
    TOGETHER: tl.constexpr,  # tiles of rows
):
    # TOGETHER tiles of rows take all splits before the next ones begin: the rows of hidden and of
    # weight that are in use at a time stay in the L2 cache, however many there are.
    tiles = tl.cdiv(N, ROWS)
    splits = tl.num_programs(0) // tiles
    before = tl.program_id(0) // (TOGETHER * splits) * TOGETHER
    place = tl.program_id(0) % (TOGETHER * splits)
    together = tl.minimum(tiles - before, TOGETHER)
    split = place // together
    rows = (before + place % together).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    first = split * SPLIT
    token = tl.load(tokens_ptr + rows, mask=inside, other=0).to(tl.int64)
    counted = inside & (token != ignore_index)
    t = tl.load(temperature + rows, mask=inside, other=1.0) if PER_TOKEN else temperature
    scale = tl.zeros([ROWS], tl.float32) + LOG2E / t
    column = token - vocab_start
    hit = tl.where((column >= first) & (column < V), column, -1).to(tl.int32)
    end = tl.minimum(first + SPLIT, V)
    end = tl.where(tl.max(counted.to(tl.int32), 0) == 0, first, end)

    depth = tl.arange(0, DEPTH)
    tile = tl.arange(0, COLUMNS)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    target = tl.full([ROWS], -float("inf"), tl.float32)
    for start in range(first, end, COLUMNS):
        columns = start + tile
        hidden_at = hidden_ptr + rows[:, None] * hidden_stride + depth[None, :]
        weight_at = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        x = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, d, DEPTH):
            hidden_mask, weight_mask = counted[:, None], (columns < V)[None, :]
            if not WHOLE_DEPTHS:
                hidden_mask &= (depth < d - k)[None, :]
                weight_mask &= (depth < d - k)[:, None]
            hidden = tl.load(hidden_at + k, mask=hidden_mask, other=0.0)
            weight = tl.load(weight_at + k, mask=weight_mask, other=0.0)
            x = tl.dot(hidden, weight, x, input_precision="ieee")
        if bias_ptr is not None:
            x += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        if start + COLUMNS > V:  # only here, as the mask takes registers too
            x = tl.where((columns < V)[None, :], x, -float("inf"))
        hit_at = hit - start
        own = tile[None, :] == hit_at[:, None]
        is_here = (hit_at >= 0) & (hit_at < COLUMNS)
        target = tl.where(is_here, tl.sum(tl.where(own, x, 0.0), 1), target)
        x = tl.where(own, -float("inf"), x)
        top, total, weighted = online(top, total, weighted, x, scale, ENTROPY)

    parts_ptr += split.to(tl.int64) * (4 if ENTROPY else 3) * N + rows
    tl.store(parts_ptr, top, mask=inside)
    tl.store(parts_ptr + N, total, mask=inside)
    tl.store(parts_ptr + 2 * N.to(tl.int64), target, mask=inside)
    if ENTROPY:
        tl.store(parts_ptr + 3 * N.to(tl.int64), weighted, mask=inside)


def _tile(hidden: Tensor, entropy: bool) -> dict[str, int]:
    """Rows, columns and depth of a product of `_fused`: as much as fits registers without spills.

    A depth that is no multiple of 16 takes more of them, for masks. 256 columns, which load the
    least for a product, fit those of sm_90 alone, whose product reads its operands from shared
    memory, and not beside the sums of the entropy.
    """
    d = hidden.shape[1]
    even = d % 16 == 0
    if hidden.dtype == torch.float32:  # no tensor cores without rounding to tf32
        return {"ROWS": 64, "COLUMNS": 64 if even else 32, "DEPTH": 16, "num_stages": 2}
    if not even:
        return {"ROWS": 128, "COLUMNS": 64, "DEPTH": 64, "num_stages": 3}
    # interpreted, there is no driver to ask
    if d % 64 == 0 and not INTERPRETED and driver.active.get_current_target().arch == 90:
        columns, stages = (128, 4) if entropy else (256, 3)
        return {"ROWS": 128, "COLUMNS": columns, "DEPTH": 64, "num_stages": stages}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 32, "num_stages": 3}


@triton.jit
def _sixteens(
    out_ptr,  # (16, 16) fp32, out
    DTYPE: tl.constexpr,
):
    ones = tl.full([16, 16], 1.0, tl.float32).to(DTYPE)
    place = tl.arange(0, 16)
    tl.store(out_ptr + place[:, None] * 16 + place[None, :], tl.dot(ones, ones))


@lru_cache
def multiplies_in_registers(dtype: torch.dtype) -> bool:
    """Whether `_fused` can multiply numbers of this type: Triton's own interpreter takes the bits
    of bf16 for integers."""
    if not INTERPRETED or dtype != torch.bfloat16:
        return True
    out = torch.empty(16, 16)
    _sixteens[(1,)](out, tl.bfloat16)
    return bool((out == 16).all())


def fused_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, t: float | Tensor,
    entropy: bool, ignore_index: int, vocab_start: int, V: int,
) -> Tensor:  # fmt: skip
    """Parts (splits, 3 or 4, N) of the rows of hidden @ weight.T + bias, made in registers."""
    N, d = hidden.shape
    tile = _tile(hidden, entropy)
    columns = tile["COLUMNS"]
    split = max(triton.cdiv(triton.cdiv(V, SPLITS), columns), 1) * columns
    parts = hidden.new_empty(max(triton.cdiv(V, split), 1), 3 + entropy, N, dtype=torch.float32)
    if N:
        _fused[(triton.cdiv(N, tile["ROWS"]) * len(parts),)](
            parts, hidden, weight, bias, tokens, t, ignore_index, vocab_start, hidden.stride(0),
            weight.stride(0), V, d, N, PER_TOKEN=isinstance(t, Tensor), ENTROPY=entropy,
            WHOLE_DEPTHS=d % tile["DEPTH"] == 0, SPLIT=split, TOGETHER=TILES_TOGETHER,
            num_warps=8, **tile,
        )  # fmt: skip
    return parts


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias in fp32, as (1, rows, columns) with aligned rows."""
    x = matmul(hidden, weight.t())
    if bias is not None:
        x += bias
    return x[None]


def pieces(n: int, width: int, multiple: int) -> list[slice]:
    """0 … n in slices of CHUNK_BYTES of fp32, where one step is `width` numbers wide."""
    step = max(CHUNK_BYTES // (4 * max(width, 1)), 1)
    step = step // multiple * multiple or step
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def chunk_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, t: float | Tensor,
    entropy: bool, ignore_index: int, vocab_start: int, V: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The joined part (3 or 4, rows) of every row of one chunk, and its logits (1, rows, V)."""
    x = logits_of(hidden, weight[:V], None if bias is None else bias[:V])
    parts = row_parts(x, tokens, t, entropy, ignore_index, vocab_start, V)
    joined = torch.empty_like(parts[0])
    join_parts(parts, joined, tokens, t)
    return joined, x


def input_gradients(
    dlogits: Callable[[slice], Tensor], slices: list[slice], hidden: Tensor, weight: Tensor,
    bias: Tensor | None, counted: Tensor | None, V: int, group: str | None, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, (0,) where not needed, from slices of columns.

    dlogits(columns) makes the gradient (N, columns) of some logits, 0 in rows that do not count.
    """
    dhidden, dweight, dbias = gradients_like(hidden, weight, bias, need_hidden, need_weight)
    dweight[V:].zero_()
    dbias[V:].zero_()
    if need_weight and counted is not None:  # 0 * NaN in a matrix product would be NaN
        counted_hidden = torch.where(counted[:, None], hidden, 0)
    else:
        counted_hidden = hidden
    total = torch.empty_like(dhidden, dtype=torch.float32)
    if not slices:
        total.zero_()
    for columns in slices:
        dx = dlogits(columns)
        if need_weight:
            write_product(dweight[columns], dx.t(), counted_hidden)
        if need_hidden:
            put = write_product if columns.start == 0 else add_product
            put(total, dx, weight[columns])
        if bias is not None:
            dbias[columns] = dx.sum(0, dtype=torch.float32)
        del dx  # before the next slice is made
    if need_hidden and group is not None:
        all_reduce(total, group)
    return dhidden.copy_(total), dweight, dbias


def gradients_like(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of hidden, weight and bias; (0,) where not needed."""
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(0 if bias is None else bias.shape),
    )


def _allocate(hidden: Tensor, tokens: Tensor, entropy: bool, columns: int) -> tuple[Tensor, ...]:
    x = aligned(hidden.shape[0], columns, torch.float32, hidden.device)
    return *outputs(hidden, tokens, entropy=entropy), x[None]


@op(
    lambda hidden, weight, bias, tokens, t, per_token, entropy, i, start, V, group, g, save_logits:
    _allocate(hidden, tokens, entropy, V if save_logits else 0)
)  # fmt: skip
def _linear_token_logprobs(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V or more, d)
    bias: Tensor | None,
    tokens: Tensor,  # (N,)
    temperature: float,
    temperatures: Tensor | None,  # (N,) fp32, in its place
    entropy: bool,
    ignore_index: int,
    vocab_start: int,
    V: int,
    group: str | None,
    with_gradient: bool,
    save_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = temperature if temperatures is None else temperatures
    vocabulary = (entropy, ignore_index, vocab_start, V)
    N = len(hidden)
    logits = aligned(N, 0, torch.float32, hidden.device)[None]
    if with_gradient or N > FUSED_ROWS or not multiplies_in_registers(hidden.dtype):
        parts = logits.new_empty(1, 3 + entropy, N)
        for rows in [slice(0, N)] if save_logits else pieces(N, V, 128):
            rows_t = t[rows] if isinstance(t, Tensor) else t
            joined, x = chunk_parts(hidden[rows], weight, bias, tokens[rows], rows_t, *vocabulary)
            parts[0, :, rows] = joined
            logits = x if save_logits else logits
            del x  # before the next piece is made
    else:
        parts = fused_parts(hidden, weight, bias, tokens, t, *vocabulary)
    return *finish_parts(parts, tokens, t, ignore_index, group), logits


@op(lambda dlogprobs, dentropy, hidden, weight, bias, *rest: gradients_like(
    hidden, weight, bias, *rest[-2:]
))  # fmt: skip
def _linear_token_logprobs_backward(
    dlogprobs: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    logits: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    saved: Tensor,
    entropies: Tensor,
    ignore_index: int,
    vocab_start: int,
    V: int,
    group: str | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    t = temperature if temperatures is None else temperatures

    def dlogits(columns: slice) -> Tensor:
        if logits.numel():
            x = logits[:, :, columns]
        else:
            x = logits_of(hidden, weight[columns], None if bias is None else bias[columns])
        dx = aligned(x.shape[1], x.shape[2], hidden.dtype, x.device)[None]
        write_dlogits(
            dx, dlogprobs, dentropy, x, tokens, t, saved, entropies, ignore_index,
            vocab_start + columns.start, x.shape[2],
        )  # fmt: skip
        return dx[0]

    return input_gradients(
        dlogits, pieces(V, len(hidden), 1024), hidden, weight, bias, tokens != ignore_index, V,
        group, need_hidden, need_weight,
    )  # fmt: skip


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, tokens, ctx.temperature, temperatures, _, *ctx.vocabulary, _, _ = inputs
    _, entropies, saved, logits = output
    ctx.save_for_backward(hidden, weight, bias, tokens, logits, temperatures, saved, entropies)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dlogprobs: Tensor | None, dentropy: Tensor | None, *_) -> tuple:
    hidden, weight, bias, tokens, logits, temperatures, *saved = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    gradients = (None, None, None)
    if dlogprobs is not None or dentropy is not None:
        gradients = _linear_token_logprobs_backward(
            dlogprobs, dentropy, hidden, weight, bias, tokens, logits, ctx.temperature,
            temperatures, *saved, *ctx.vocabulary, need_hidden, need_weight,
        )  # fmt: skip
    wanted = zip(gradients, ctx.needs_input_grad)
    return *(x if need else None for x, need in wanted), *(None,) * 10


_linear_token_logprobs.differentiate(_setup_context, _gradient)


def row_contiguous(x: Tensor) -> Tensor:
    """x (..., d) as a matrix whose rows are contiguous."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    save_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of hidden @ weight.T + bias: (..., d), (V, d), (...) -> (...) fp32, in nats.

    The logits are made in fp32, whatever the inputs' type, and not kept. Differentiable in hidden,
    weight and bias; the other arguments are those of `token_logprobs`. Rows of hidden whose token
    is ignore_index, and rows of weight at or beyond vocab_size, may hold anything. Under autocast
    hidden, weight and bias are cast as torch.nn.Linear casts them.
    group: this rank holds the rows [vocab_start, vocab_start + V) of the whole weight; hidden is
    the same on every rank, and so is its gradient: the sum over the group is made here, once.
    save_logits: keep the fp32 logits for backward: 4 N V bytes more, one product of four less.
    fp64 runs the reference. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    hidden, weight, bias = reference.cast_as_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, tokens)
    if not runs_kernel(hidden) or hidden.dtype == torch.float64:
        return reference.linear_token_logprobs(
            hidden, weight, tokens, bias=bias, temperature=temperature, entropy=entropy,
            ignore_index=ignore_index, vocab_start=vocab_start, vocab_size=vocab_size, group=group,
        )  # fmt: skip
    check_tokens(tokens, hidden)
    check_vocabulary(tokens, temperature, vocab_start, vocab_size)
    check_temperature(temperature, tokens, ignore_index)
    with_gradient = wants_gradient(hidden, weight, bias)
    logprobs, entropies, _, _ = _linear_token_logprobs(
        row_contiguous(hidden), row_contiguous(weight), bias, tokens.reshape(-1).contiguous(),
        *per_token(temperature, tokens), entropy, ignore_index, vocab_start,
        columns_that_count(len(weight), vocab_start, vocab_size), group_name(group), with_gradient,
        save_logits and with_gradient,
    )  # fmt: skip
    logprobs = logprobs.view(tokens.shape)
    return (logprobs, entropies.view(tokens.shape)) if entropy else logprobs
