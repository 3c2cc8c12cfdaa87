"""Rewards, advantages and returns of PPO, whitened over the global batch.

    gae             A_t = r_t + W_{t+1} - v_t           W_t = gamma v_t + gamma lam A_t
    whiten          (x - mean) / sqrt(variance + eps)
    ppo_advantages  r_t = -kl_coef kl_t (+ score at the last valid token), gae, whiten

W_t is all that step t hands to the step before it, and it is affine in W_{t+1}:

    W_t = gamma lam W_{t+1} + gamma (1 - lam) v_t + gamma lam r_t        valid
    W_t = gamma lam W_{t+1}                                              masked, "decay"
    W_t = W_{t+1}                                                        masked, "carry"

so one associative scan over blocks of tokens serves both modes, the value of the next *valid* token
comes along for free, and W crosses from block to block in a register. A program owns whole
sequences and walks each from its end; it also accumulates (count, mean, sum of squared deviations)
of what is to be whitened (Chan et al. 1979). Whoever whitens combines these partial moments, at
most 1024 of them and always in the same order: no atomics, the same bits in every run.

Launches: gae 1, whiten 2, ppo_advantages 2 (3 with whiten_rewards); over a process group one more
each time something is whitened, and one collective of 3 numbers a rank. No host sync.
Bytes per token with fp32 inputs and a bool mask: gae 17, whiten 14, ppo_advantages 29 (13 read and
16 written, the floor of four outputs), 38 with whiten_advantages, 47 with whiten_rewards too; and
12 for each of the partial moments in each program that whitens, and 4 per sequence for a gamma or
lam of its own.
Meaning: `reference.gae`, `reference.whiten`, `reference.ppo_advantages`.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_gae,
    check_ppo_advantages,
    check_same_shape,
)
from tetrad.kernels.kl import kl_estimate
from tetrad.kernels.launch import (
    all_gather,
    group_name,
    group_of,
    number_or_tensor,
    op,
    programs,
    real_dtype,
    refuse_gradients,
    runs_kernel,
)
from tetrad.kernels.reference import PPOAdvantages

MAX_BLOCK = 1024  # tokens of one scan: 8 a thread, whose four scanned numbers stay in registers


@triton.jit
def row_bounds(row, cu_ptr, length, n):
    """First token of a row and the one after its last: packed, or `length` tokens a row."""
    row = tl.cast(row, tl.int64)  # row * length can pass 2**31
    if cu_ptr is None:
        start = row * length
        end = tl.minimum(start + length, n)
    else:
        start = tl.load(cu_ptr + row).to(tl.int64)
        end = tl.load(cu_ptr + row + 1).to(tl.int64)
    return start, end


@triton.jit
def _with_block(count, mean, squares, x, valid):
    """Moments so far, joined by those of a block x, which is 0 where it is not valid."""
    more = tl.sum(valid.to(x.dtype), 0)
    rough = tl.sum(x, 0) / tl.maximum(more, 1)
    # a GPU divides to two units in the last place, and the sum has rounded: at a mean of 100 that
    # is 2e-5, which the deviations from it still know
    rest = tl.sum(tl.where(valid, x - rough, 0), 0) / tl.maximum(more, 1)
    block_mean = rough + rest
    deviation = tl.where(valid, x - block_mean, 0)
    shift = block_mean - mean
    total = count + more
    share = more / tl.maximum(total, 1)
    squares += tl.sum(deviation * deviation, 0) + shift * shift * count * share
    return total, mean + shift * share, squares


@triton.jit
def _joined(parts_ptr, parts, PARTS: tl.constexpr):
    """Moments of everything from those of its parts (parts, 3)."""
    i = tl.arange(0, PARTS)
    count = tl.load(parts_ptr + 3 * i, mask=i < parts, other=0)
    mean = tl.load(parts_ptr + 3 * i + 1, mask=i < parts, other=0)
    squares = tl.load(parts_ptr + 3 * i + 2, mask=i < parts, other=0)
    total = tl.sum(count, 0)
    rough = tl.sum(count * mean, 0) / tl.maximum(total, 1)
    total_mean = rough + tl.sum(count * (mean - rough), 0) / tl.maximum(total, 1)
    shift = mean - total_mean
    return total, total_mean, tl.sum(squares + count * shift * shift, 0)


@triton.jit
def _mean_and_scale(parts_ptr, parts, eps, UNBIASED: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps)."""
    count, mean, squares = _joined(parts_ptr, parts, PARTS)
    if UNBIASED:
        count -= 1
    variance = squares / tl.maximum(count, 1)
    return mean, 1 / tl.sqrt(variance + tl.cast(eps, mean.dtype))


@triton.jit
def _join(
    parts_ptr,  # (parts, 3) fp32
    moments_ptr,  # (3,) fp32, out
    parts,
    PARTS: tl.constexpr,
):
    count, mean, squares = _joined(parts_ptr, parts, PARTS)
    tl.store(moments_ptr, count)
    tl.store(moments_ptr + 1, mean)
    tl.store(moments_ptr + 2, squares)


@triton.jit
def _moments(
    x_ptr,  # (n,) float
    mask_ptr,  # (n,)
    parts_ptr,  # (programs, 3) fp32, out
    n,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    program = tl.program_id(0)
    count, mean, squares = tl.cast(0.0, REAL), tl.cast(0.0, REAL), tl.cast(0.0, REAL)
    for block in range(program, tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = tl.load(mask_ptr + at, mask=at < n, other=0) != 0
        x = tl.where(valid, tl.load(x_ptr + at, mask=at < n, other=0).to(REAL), 0)
        count, mean, squares = _with_block(count, mean, squares, x, valid)
    tl.store(parts_ptr + 3 * program, count)
    tl.store(parts_ptr + 3 * program + 1, mean)
    tl.store(parts_ptr + 3 * program + 2, squares)


@triton.jit
def _normalise(
    x_ptr,  # (n,) float
    mask_ptr,  # (n,)
    parts_ptr,  # (parts, 3) fp32
    white_ptr,  # (n,) fp32, out; may be x
    n,
    parts,
    eps: tl.float64,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = white_ptr.dtype.element_ty
    mean, scale = _mean_and_scale(parts_ptr, parts, eps, UNBIASED, PARTS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(mask_ptr + at, mask=at < n, other=0) != 0
    white = (tl.load(x_ptr + at, mask=at < n, other=0).to(REAL) - mean) * scale
    if not SHIFT_MEAN:
        white += mean
    tl.store(white_ptr + at, tl.where(valid, white, 0), mask=at < n)


@triton.jit
def _shaped(logprobs_ptr, ref_ptr, at, inside, valid, score, last, kl_coef, ESTIMATOR, REAL):
    """KL and reward of a block of tokens; `last` is where the score goes."""
    logprobs = tl.load(logprobs_ptr + at, mask=inside, other=0).to(REAL)
    ref = tl.load(ref_ptr + at, mask=inside, other=0).to(REAL)
    kl = tl.where(valid, kl_estimate(logprobs - ref, ESTIMATOR), 0)
    charge = tl.where(kl_coef == 0, 0, kl_coef * kl)  # no charge, also where kl is inf
    return kl, tl.where(at == last, score - charge, -charge)


@triton.jit
def _rewards(
    scores_ptr,  # (rows,) float
    logprobs_ptr,  # (n,) float
    ref_ptr,  # (n,) float
    mask_ptr,  # (n,)
    cu_ptr,  # (rows + 1,) int, or None when every row has `length` tokens
    kl_ptr,  # (n,) fp32, out
    rewards_ptr,  # (n,) fp32, out
    parts_ptr,  # (programs, 3) fp32, out: moments of the rewards
    rows,
    length,
    n,
    kl_coef: tl.float64,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = rewards_ptr.dtype.element_ty
    program = tl.program_id(0)
    kl_coef = tl.cast(kl_coef, REAL)
    count, mean, squares = tl.cast(0.0, REAL), tl.cast(0.0, REAL), tl.cast(0.0, REAL)
    for row in range(program, rows, tl.num_programs(0)):
        start, end = row_bounds(row, cu_ptr, length, n)
        score = tl.load(scores_ptr + row).to(REAL)
        last = tl.cast(-1, tl.int64)
        blocks = tl.cdiv(end - start, BLOCK)
        for i in range(0, blocks):
            at = start + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = at < end
            valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
            last = tl.maximum(last, tl.max(tl.where(valid, at, -1), 0))
            kl, rewards = _shaped(
                logprobs_ptr, ref_ptr, at, inside, valid, score, last, kl_coef, ESTIMATOR, REAL
            )
            tl.store(kl_ptr + at, kl, mask=inside)
            tl.store(rewards_ptr + at, rewards, mask=inside)
            count, mean, squares = _with_block(count, mean, squares, rewards, valid)
    tl.store(parts_ptr + 3 * program, count)
    tl.store(parts_ptr + 3 * program + 1, mean)
    tl.store(parts_ptr + 3 * program + 2, squares)


@triton.jit
def _then(c1, w1, p1, q1, c2, w2, p2, q2):
    """Later tokens (1), then earlier ones (2), as maps of W: W -> c W + w, and A = p W + q."""
    return c1 * c2, w1 * c2 + w2, c1 * p2, w1 * p2 + q2


@triton.jit
def _scan(rewards, values, counts, inflow, gamma, lam, BLOCK: tl.constexpr):
    """Advantages of a block whose last token gets `inflow`, and what its first one hands on."""
    lane = tl.arange(0, BLOCK)
    is_last = lane == BLOCK - 1
    c = tl.where(counts, gamma * lam, 1)
    w = tl.where(counts, gamma * lam * rewards + gamma * (1 - lam) * values, 0)
    q = rewards - values
    w = tl.where(is_last, c * inflow + w, w)
    q = tl.where(is_last, inflow + q, q)
    p = tl.full([BLOCK], 1, c.dtype)
    c, w, p, q = tl.associative_scan((c, w, p, q), 0, _then, reverse=True)
    return q, tl.sum(tl.where(lane == 0, w, 0), 0)


@triton.jit
def _of_row(number, numbers_ptr, row, REAL):
    """What holds for a row: the number, or its own one."""
    if numbers_ptr is not None:
        number = tl.load(numbers_ptr + row)
    return tl.cast(number, REAL)


@triton.jit
def _recursion(
    rewards_ptr,  # (n,): in, unless logprobs are given; out, if they are or if rewards are whitened
    scores_ptr,  # (rows,) float, with logprobs
    logprobs_ptr,  # (n,) float, or None
    ref_ptr,  # (n,) float, with logprobs
    kl_ptr,  # (n,) fp32, out, with logprobs
    values_ptr,  # (n,) float
    mask_ptr,  # (n,)
    cu_ptr,  # (rows + 1,) int, or None when every row has `length` tokens
    bootstrap_ptr,  # (rows,) float, or None
    gamma_ptr,  # (rows,) float, in the place of gamma; or None
    lam_ptr,  # (rows,) float, in the place of lam; or None
    reward_parts_ptr,  # (reward_parts, 3) fp32, or None when rewards are not whitened
    advantages_ptr,  # (n,) fp32, out
    returns_ptr,  # (n,) fp32, out
    parts_ptr,  # (programs, 3) fp32, out: moments of the advantages; or None
    rows,
    length,
    n,
    reward_parts,
    kl_coef: tl.float64,
    gamma: tl.float64,
    lam: tl.float64,
    eps: tl.float64,
    ESTIMATOR: tl.constexpr,
    DECAY: tl.constexpr,
    REWARD_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = advantages_ptr.dtype.element_ty
    program = tl.program_id(0)
    kl_coef = tl.cast(kl_coef, REAL)
    count, mean, squares = tl.cast(0.0, REAL), tl.cast(0.0, REAL), tl.cast(0.0, REAL)
    if reward_parts_ptr is not None:
        shift, scale = _mean_and_scale(reward_parts_ptr, reward_parts, eps, False, REWARD_PARTS)
    for row in range(program, rows, tl.num_programs(0)):
        start, end = row_bounds(row, cu_ptr, length, n)
        discount = _of_row(gamma, gamma_ptr, row, REAL)
        trace = _of_row(lam, lam_ptr, row, REAL)
        inflow = tl.cast(0.0, REAL)
        if bootstrap_ptr is not None:
            inflow = discount * tl.load(bootstrap_ptr + row).to(REAL)
        last = tl.cast(-1, tl.int64)
        blocks = tl.cdiv(end - start, BLOCK)
        for i in range(0, blocks):
            at = start + (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = at < end
            valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
            last = tl.maximum(last, tl.max(tl.where(valid, at, -1), 0))
            values = tl.where(valid, tl.load(values_ptr + at, mask=inside, other=0).to(REAL), 0)
            if logprobs_ptr is not None:
                score = tl.load(scores_ptr + row).to(REAL)
                kl, rewards = _shaped(
                    logprobs_ptr, ref_ptr, at, inside, valid, score, last, kl_coef, ESTIMATOR, REAL
                )
                tl.store(kl_ptr + at, kl, mask=inside)
                tl.store(rewards_ptr + at, rewards, mask=inside)
            else:
                rewards = tl.load(rewards_ptr + at, mask=inside, other=0).to(REAL)
                rewards = tl.where(valid, rewards, 0)
            if reward_parts_ptr is not None:
                rewards = tl.where(valid, (rewards - shift) * scale + shift, 0)
                tl.store(rewards_ptr + at, rewards, mask=inside)
            if DECAY:
                counts = at <= last
            else:
                counts = valid
            advantages, inflow = _scan(rewards, values, counts, inflow, discount, trace, BLOCK)
            advantages = tl.where(valid, advantages, 0)
            tl.store(advantages_ptr + at, advantages, mask=inside)
            tl.store(returns_ptr + at, advantages + values, mask=inside)
            if parts_ptr is not None:
                count, mean, squares = _with_block(count, mean, squares, advantages, valid)
    if parts_ptr is not None:
        tl.store(parts_ptr + 3 * program, count)
        tl.store(parts_ptr + 3 * program + 1, mean)
        tl.store(parts_ptr + 3 * program + 2, squares)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _hides_a_length(cu_seqlens: Tensor | None) -> bool:
    """Whether torch.compile cannot trace the reference, which loops over the longest sequence.

    It can have the registered op as one node, which runs the reference inside.
    """
    return cu_seqlens is not None and torch.compiler.is_compiling()


def _sequences(mask: Tensor, cu_seqlens: Tensor | None, real: torch.dtype) -> tuple[int, int]:
    """How many there are, and the tokens of one scan: MAX_BLOCK, or what holds a short row."""
    most = MAX_BLOCK * 4 // real.itemsize  # fp64 takes two registers a number
    if cu_seqlens is not None:
        return len(cu_seqlens) - 1, most
    S, T = mask.shape
    return S, min(max(triton.next_power_of_2(T), 128), most)


def _over_group(parts: Tensor, group: str | None) -> Tensor:
    """Partial moments of the whole: ours (programs, 3), or one of each rank (ranks, 3)."""
    if group is None:
        return parts
    moments = parts.new_empty(3)
    _join[(1,)](parts, moments, len(parts), PARTS=triton.next_power_of_2(len(parts)))
    return all_gather(moments, group)


def _write_white(
    x: Tensor, mask: Tensor, parts: Tensor, white: Tensor, shift_mean: bool, unbiased: bool,
    eps: float,
) -> None:  # fmt: skip
    """x, whitened by the moments of its parts, into `white`, which may be x itself."""
    n = x.numel()
    if n:
        _normalise[(triton.cdiv(n, MAX_BLOCK),)](
            x, mask, parts, white, n, len(parts), eps, SHIFT_MEAN=shift_mean,
            UNBIASED=unbiased, PARTS=triton.next_power_of_2(len(parts)), BLOCK=MAX_BLOCK,
        )  # fmt: skip


def _gae_outputs(rewards: Tensor, values: Tensor, mask: Tensor, *_) -> tuple[Tensor, Tensor]:
    real = real_dtype(rewards, values)
    return mask.new_empty(mask.shape, dtype=real), mask.new_empty(mask.shape, dtype=real)


@op(_gae_outputs)
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    bootstrap: Tensor | None, gamma: float, gammas: Tensor | None, lam: float, lams: Tensor | None,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not runs_kernel(rewards):
        return reference.gae(
            rewards, values, mask, gamma=gamma if gammas is None else gammas,
            lam=lam if lams is None else lams, cu_seqlens=cu_seqlens, mask_mode=mask_mode,
            bootstrap=bootstrap,
        )  # fmt: skip
    advantages, returns = _gae_outputs(rewards, values, mask)
    S, block = _sequences(mask, cu_seqlens, advantages.dtype)
    rewards, values, mask = (x.contiguous() for x in (rewards, values, mask))
    per_sequence = _contiguous(cu_seqlens, bootstrap, gammas, lams)
    _recursion[programs(S)](
        rewards, None, None, None, None, values, mask, *per_sequence, None, advantages, returns,
        None, S, mask.shape[-1], mask.numel(), 0, 0.0, gamma, lam, 0.0, ESTIMATOR="k1",
        DECAY=mask_mode == "decay", REWARD_PARTS=1, BLOCK=block,
    )  # fmt: skip
    return advantages, returns


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, fp32 and 0 where mask is 0, of padded (B, T) or packed (N,) steps.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    (Schulman et al. 2016, arXiv:1506.02438, equation 16); returns = A + V. fp64 in fp64.
    gamma, lam: numbers in [0, 1], or tensors (B,) or (S,) of one for each sequence.
    cu_seqlens (S + 1,) int32 or int64: bounds of the packed sequences; on a GPU its content is
    trusted. bootstrap (B,) or (S,): the value after the last valid token of each, default 0.
    mask_mode: a masked step between valid ones (tool output, say) hands V_{t+1} and A_{t+1} on
    unchanged ("carry": verl, NeMo-RL), or is a step of reward 0 and value 0 that the recursion
    runs through, discounting ("decay": OpenRLHF). Steps after the last valid one never count.
    Not differentiable: advantages are constants of the loss. Raises ValueError when shapes or
    options do not fit, and when an input requires grad (call it under no_grad, or detach).
    """
    check_gae(rewards, values, mask, gamma, lam, cu_seqlens, mask_mode, bootstrap)
    numbers = (*number_or_tensor(gamma), *number_or_tensor(lam))
    refuse_gradients(
        rewards=rewards, values=values, bootstrap=bootstrap, gamma=numbers[1], lam=numbers[3]
    )
    if not runs_kernel(rewards) and not _hides_a_length(cu_seqlens):
        return reference.gae(
            rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens,
            mask_mode=mask_mode, bootstrap=bootstrap,
        )  # fmt: skip
    return _gae(rewards, values, mask, cu_seqlens, bootstrap, *numbers, mask_mode)


def _white(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape, dtype=real_dtype(x))


@op(_white)
def _whiten(
    x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float, group: str | None
) -> Tensor:
    white = _white(x)
    x, mask = x.contiguous(), mask.contiguous()
    grid = programs(triton.cdiv(x.numel(), MAX_BLOCK))
    parts = white.new_empty(*grid, 3)
    _moments[grid](x, mask, parts, x.numel(), BLOCK=MAX_BLOCK)
    _write_white(x, mask, _over_group(parts, group), white, shift_mean, unbiased, eps)
    return white


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the valid elements of all ranks of group; 0 elsewhere.

    Any shape -> the same, fp32 (fp64 in fp64). Without shift_mean the mean is added back. Variance
    is the population's, or with `unbiased` (n - 1) the sample's (at n = 1 the population's).
    Not differentiable. Raises ValueError when the shapes differ, and when x requires grad.
    """
    check_same_shape(x=x, mask=mask)
    refuse_gradients(x=x)
    if not runs_kernel(x):
        return reference.whiten(
            x, mask, shift_mean=shift_mean, unbiased=unbiased, eps=eps, group=group
        )
    return _whiten(x, mask, shift_mean, unbiased, float(eps), group_name(group))


def _ppo_outputs(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = real_dtype(scores, logprobs, ref_logprobs, values)
    rewards, advantages, returns, kl = (mask.new_empty(mask.shape, dtype=real) for _ in range(4))
    return rewards, advantages, returns, kl


@op(_ppo_outputs)
def _ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor,
    cu_seqlens: Tensor | None, kl_coef: float, estimator: str, gamma: float, gammas: Tensor | None,
    lam: float, lams: Tensor | None, whiten_rewards: bool, whiten_advantages: bool, mask_mode: str,
    group: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not runs_kernel(logprobs):
        return reference.ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask, kl_coef=kl_coef, estimator=estimator,
            gamma=gamma if gammas is None else gammas, lam=lam if lams is None else lams,
            whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages,
            cu_seqlens=cu_seqlens, mask_mode=mask_mode,
            group=None if group is None else group_of(group),
        )  # fmt: skip
    outputs = _ppo_outputs(scores, logprobs, ref_logprobs, values, mask)
    rewards, advantages, returns, kl = outputs
    S, block = _sequences(mask, cu_seqlens, advantages.dtype)
    scores, logprobs, ref_logprobs, values, mask = (
        x.contiguous() for x in (scores, logprobs, ref_logprobs, values, mask)
    )
    cu_seqlens, gammas, lams = _contiguous(cu_seqlens, gammas, lams)
    shape = (S, mask.shape[-1], mask.numel())
    grid = programs(S)
    parts = kl.new_empty(*grid, 3)
    reward_parts, n_reward_parts = None, 1
    if whiten_rewards:
        _rewards[grid](
            scores, logprobs, ref_logprobs, mask, cu_seqlens, kl, rewards, parts, *shape, kl_coef,
            ESTIMATOR=estimator, BLOCK=block,
        )  # fmt: skip
        reward_parts = _over_group(parts, group)
        n_reward_parts = len(reward_parts)
        parts = torch.empty_like(parts)
    _recursion[grid](
        rewards, scores, None if whiten_rewards else logprobs, ref_logprobs, kl,
        values, mask, cu_seqlens, None, gammas, lams, reward_parts, advantages, returns,
        parts if whiten_advantages else None, *shape, n_reward_parts, kl_coef, gamma, lam, 1e-8,
        ESTIMATOR=estimator, DECAY=mask_mode == "decay",
        REWARD_PARTS=triton.next_power_of_2(n_reward_parts), BLOCK=block,
    )  # fmt: skip
    if whiten_advantages:
        _write_white(advantages, mask, _over_group(parts, group), advantages, True, False, 1e-8)
    return outputs


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    cu_seqlens: Tensor | None = None,
    mask_mode: str = "carry",
    group: dist.ProcessGroup | None = None,
) -> PPOAdvantages:
    """From scores (B,) to whitened advantages (B, T); packed: (S,) and (N,) with cu_seqlens.

    The reward of a token is -kl_coef times its KL estimate (`token_kl`); the score is added at the
    last valid token of its sequence (a sequence without one gets none); then `gae`, then `whiten`
    over all ranks of group. whiten_rewards keeps the mean (lm-human-preferences).
    gamma, lam, cu_seqlens, mask_mode as in `gae`.
    Returns (rewards, advantages, returns, kl), all fp32 (fp64 in fp64), shaped like the mask and 0
    where it is 0. Not differentiable; errors as in `gae`. All ranks of group must call it, also
    one without a valid token.
    """
    check_ppo_advantages(
        scores, logprobs, ref_logprobs, values, mask, estimator, gamma, lam, cu_seqlens, mask_mode
    )
    numbers = (*number_or_tensor(gamma), *number_or_tensor(lam))
    refuse_gradients(
        scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
        gamma=numbers[1], lam=numbers[3],
    )  # fmt: skip
    if not runs_kernel(logprobs) and not _hides_a_length(cu_seqlens):
        return reference.ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask, kl_coef=kl_coef, estimator=estimator,
            gamma=gamma, lam=lam, whiten_rewards=whiten_rewards,
            whiten_advantages=whiten_advantages, cu_seqlens=cu_seqlens, mask_mode=mask_mode,
            group=group,
        )  # fmt: skip
    return PPOAdvantages(
        *_ppo_advantages(
            scores, logprobs, ref_logprobs, values, mask, cu_seqlens, float(kl_coef), estimator,
            *numbers, whiten_rewards, whiten_advantages, mask_mode, group_name(group),
        )
    )  # fmt: skip
