"""Loss of a reward model on K ranked completions of each prompt, for any K.

    over pairs with rank_i < rank_j:    m = s_i - s_j,    loss = softplus(-m)
                                        ds_i = -sigmoid(-m) = -ds_j

A program owns prompts. It walks the K x K pairs of a prompt in tiles, first to count the pairs that
are no ties, then for loss and gradient. A completion gathers its gradient from its row of tiles, as
winner and as loser: no atomics. A second launch adds up the partial sums of all programs in
fixed order; backward is one multiplication, as in ppo_loss.
Bytes: 8 read (again for every 16 completions of the prompt) and 4 written per completion.
Meaning: `reference.ranking_loss`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tetrad.kernels import reference
from tetrad.kernels.advantages import _programs
from tetrad.kernels.kl import _real_dtype
from tetrad.kernels.launch import runs_kernel
from tetrad.kernels.ppo_loss import _finished

BLOCK = 16  # completions in the side of a tile: K is 4 to 9 in Ouyang et al. 2022


@triton.jit
def _better(ranks_ptr, at, other, end):
    """(BLOCK, BLOCK): whether completion at[i] beats other[j], and whether it loses to it."""
    inside = (at < end)[:, None] & (other < end)[None, :]
    mine = tl.load(ranks_ptr + at, mask=at < end, other=0)[:, None]
    theirs = tl.load(ranks_ptr + other, mask=other < end, other=0)[None, :]
    return inside & (mine < theirs), inside & (mine > theirs)


@triton.jit
def _ranking(
    scores_ptr,  # (M,) float
    ranks_ptr,  # (M,)
    cu_ptr,  # (prompts + 1,) int
    gradient_ptr,  # (M,) fp32, out: d (sum of the prompts' losses) / d scores
    parts_ptr,  # (3, programs) fp32, out: sums of loss, accuracy, prompts with a comparison
    prompts,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    losses, hits = tl.zeros([BLOCK, BLOCK], REAL), tl.zeros([BLOCK, BLOCK], REAL)
    compared = tl.cast(0.0, REAL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for prompt in range(program, prompts, programs):
        start = tl.load(cu_ptr + prompt).to(tl.int64)
        end = tl.load(cu_ptr + prompt + 1).to(tl.int64)
        count = tl.zeros([BLOCK, BLOCK], REAL)
        for i in range(start, end, BLOCK):
            for j in range(start, end, BLOCK):
                at, other = i + tl.arange(0, BLOCK), j + tl.arange(0, BLOCK)
                wins, _ = _better(ranks_ptr, at, other, end)
                count += wins.to(REAL)
        pairs = tl.sum(tl.sum(count, 1), 0)
        weight = 1 / tl.maximum(pairs, 1)
        compared += tl.minimum(pairs, 1)
        for i in range(start, end, BLOCK):
            at = i + tl.arange(0, BLOCK)
            mine = tl.load(scores_ptr + at, mask=at < end, other=0).to(REAL)
            gradient = tl.zeros([BLOCK], REAL)
            for j in range(start, end, BLOCK):
                other = j + tl.arange(0, BLOCK)
                theirs = tl.load(scores_ptr + other, mask=other < end, other=0).to(REAL)
                wins, loses = _better(ranks_ptr, at, other, end)
                margin = mine[:, None] - theirs[None, :]
                e = tl.exp(-tl.abs(margin))
                u = 1 + e  # log1p(e) = log(u) e / (u - 1): exact also where u rounds (Kahan)
                log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
                losses += tl.where(wins, weight * (log1p - tl.minimum(margin, 0)), 0)
                hits += tl.where(wins & (margin > 0), weight, 0)
                small, large = e / u, 1 / u  # sigmoid(-|margin|), sigmoid(|margin|)
                wrong = tl.where(margin > 0, small, large)  # sigmoid(-margin)
                right = tl.where(margin > 0, large, small)
                slope = tl.where(wins, -wrong, tl.where(loses, right, 0.0))
                gradient += tl.sum(slope, 1)
            if gradient_ptr is not None:
                tl.store(gradient_ptr + at, weight * gradient, mask=at < end)
    tl.store(parts_ptr + program, tl.sum(tl.sum(losses, 1), 0))
    tl.store(parts_ptr + programs + program, tl.sum(tl.sum(hits, 1), 0))
    tl.store(parts_ptr + 2 * programs + program, compared)


class _RankingLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, scores: Tensor, ranks: Tensor, cu_prompts: Tensor, denominator: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        prompts = len(cu_prompts) - 1
        real = _real_dtype(scores)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty(len(scores), dtype=real, device=scores.device)
        grid = _programs(prompts)
        parts = torch.empty(3, *grid, dtype=real, device=scores.device)
        _ranking[grid](
            scores.contiguous(), ranks.contiguous(), cu_prompts.contiguous(), gradient, parts,
            prompts, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
        loss, stats, scale = _finished(parts, denominator)
        accuracy = stats[0]
        ctx.save_for_backward(gradient, scale)
        ctx.dtype = scores.dtype
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _daccuracy: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient, scale = ctx.saved_tensors
        return (gradient * (dloss * scale)).to(ctx.dtype), None, None, None


def ranking_loss(
    scores: Tensor, ranks: Tensor, cu_prompts: Tensor, *, denominator: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of a reward model on ranked completions, and how often it agrees with the ranking.

    scores (M,); ranks (M,) with 1 the best, equal ranks a tie; cu_prompts (P + 1,) int32 or int64
    bounds the completions of each prompt. Over the prompts that have a comparison, the mean of

        mean over pairs with rank_i < rank_j of -log sigmoid(s_i - s_j)

    (Ouyang et al. 2022, arXiv:2203.02155, equation 1); accuracy is the same mean of [s_i > s_j].
    Ties are dropped. denominator: the global number of prompts with a comparison when this is a
    part of the batch. Without any comparison both are 0. Two scalars, fp32 (fp64 in fp64); the
    loss is differentiable in scores. Raises ValueError when shapes or bounds do not fit.
    """
    reference._check_ranking(scores, ranks, cu_prompts, denominator)
    if not runs_kernel(scores):
        return reference.ranking_loss(scores, ranks, cu_prompts, denominator=denominator)
    return _RankingLoss.apply(scores, ranks, cu_prompts, denominator)
