"""Loss of a reward model on K ranked completions of each prompt, for any K.

    over pairs with rank_i < rank_j:    m = s_i - s_j,    loss = softplus(-m)
                                        ds_i = -sigmoid(-m) = -ds_j

A program owns prompts. It walks the K x K pairs of a prompt in tiles, first to count the pairs that
are no ties, then for loss and gradient. A completion gathers its gradient from its row of tiles, as
winner and as loser. The last program to finish adds up the partial sums of all, and backward is
one launch that multiplies, as in ppo_loss.
Bytes per completion with fp32 scores and int32 ranks: 24 read (again for every further 16
completions of its prompt) and 4 written.
Meaning: `reference.ranking_loss`.
"""

import triton
import triton.language as tl
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.check import (
    check_ranking_loss,
)
from tetrad.kernels.launch import (
    MAX_PROGRAMS,
    number_or_tensor,
    op,
    programs,
    real_dtype,
    runs_kernel,
    ticket,
    wants_gradient,
)
from tetrad.kernels.logprob import log1p
from tetrad.kernels.ppo_loss import finish, keep_gradient, scaled_gradient

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
    gradient_ptr,  # (M,) fp32, out: d (sum of the prompts' losses) / d scores; or None
    parts_ptr,  # (3, programs) fp32, scratch: sums of loss, accuracy, prompts with a comparison
    ticket_ptr,  # () int32, 0, before and after
    denominator_ptr,  # () number, in the place of denominator; or None
    loss_ptr,  # () fp32, out
    accuracy_ptr,  # () fp32, out
    scale_ptr,  # () fp32, out: the gradient's factor, 1 / normaliser
    prompts,
    denominator: tl.float64,  # 0: the number of prompts with a comparison
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = parts_ptr.dtype.element_ty
    losses, hits = tl.zeros([BLOCK], REAL), tl.zeros([BLOCK], REAL)
    compared = tl.cast(0.0, REAL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    for prompt in range(program, prompts, programs):
        start = tl.load(cu_ptr + prompt).to(tl.int64)
        end = tl.load(cu_ptr + prompt + 1).to(tl.int64)
        count = tl.zeros([BLOCK], REAL)
        for i in range(start, end, BLOCK):
            for j in range(start, end, BLOCK):
                at, other = i + tl.arange(0, BLOCK), j + tl.arange(0, BLOCK)
                wins, _ = _better(ranks_ptr, at, other, end)
                count += tl.sum(wins.to(REAL), 1)
        pairs = tl.sum(count, 0)
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
                loss = tl.where(wins, log1p(e) - tl.minimum(margin, 0), 0)
                losses += weight * tl.sum(loss, 1)
                hits += weight * tl.sum((wins & (margin > 0)).to(REAL), 1)
                small, large = e / (1 + e), 1 / (1 + e)  # sigmoid(-|margin|), sigmoid(|margin|)
                wrong = tl.where(margin > 0, small, large)  # sigmoid(-margin)
                right = tl.where(margin > 0, large, small)
                slope = tl.where(wins, -wrong, tl.where(loses, right, 0.0))
                gradient += tl.sum(slope, 1)
            if gradient_ptr is not None:
                tl.store(gradient_ptr + at, weight * gradient, mask=at < end)
    tl.store(parts_ptr + program, tl.sum(losses, 0))
    tl.store(parts_ptr + programs + program, tl.sum(hits, 0))
    tl.store(parts_ptr + 2 * programs + program, compared)
    finish(
        parts_ptr, ticket_ptr, denominator_ptr, loss_ptr, accuracy_ptr, scale_ptr, denominator, 1,
        False, PROGRAMS,
    )  # fmt: skip


def _outputs(scores: Tensor, wanted: bool, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), accuracy (), gradient up to a factor (empty unless wanted), that factor ()."""
    shapes = (), (), scores.shape if wanted else (0,), ()
    loss, accuracy, gradient, scale = (
        scores.new_empty(shape, dtype=real_dtype(scores)) for shape in shapes
    )
    return loss, accuracy, gradient, scale


@op(_outputs)
def _ranking_loss(
    scores: Tensor, wanted: bool, ranks: Tensor, cu_prompts: Tensor, denominator: float,
    denominators: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, accuracy, gradient, scale = outputs = _outputs(scores, wanted)
    prompts = len(cu_prompts) - 1
    grid = programs(prompts)
    with ticket(scores.device) as counter:
        _ranking[grid](
            scores.contiguous(), ranks.contiguous(), cu_prompts.contiguous(),
            gradient if wanted else None, scale.new_empty(3, *grid), counter,
            None if denominators is None else denominators.to(scores.device), loss, accuracy,
            scale, prompts, denominator, PROGRAMS=MAX_PROGRAMS, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return outputs


_ranking_loss.differentiate(keep_gradient, scaled_gradient)


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
    check_ranking_loss(scores, ranks, cu_prompts, denominator)
    if not runs_kernel(scores):
        return reference.ranking_loss(scores, ranks, cu_prompts, denominator=denominator)
    loss, accuracy, _, _ = _ranking_loss(
        scores, wants_gradient(scores), ranks, cu_prompts,
        *number_or_tensor(denominator),
    )  # fmt: skip
    return loss, accuracy
