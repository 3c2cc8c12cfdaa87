"""python -m bench.bench_ranking: the K-way ranking loss, with its gradient."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines
from bench.harness import main
from tetrad.kernels import reference
from tetrad.kernels.ranking import ranking_loss

SHAPES = [(64, 9), (4096, 4), (16, 128), (4096, 2)]  # prompts, completions of each


def draw(P: int, K: int):
    scores = torch.randn(P * K, device=DEVICE, requires_grad=True)
    ranks = torch.rand(P, K, device=DEVICE).argsort(1).view(-1) + 1
    if K == 2:  # pairs as OpenRLHF takes them, the better first
        ranks = torch.arange(1, 3, device=DEVICE).repeat(P)
    return scores, ranks, torch.arange(0, P * K + 1, K, device=DEVICE)


def loss_of(op):
    """Without the accuracy."""
    return lambda *inputs: op(*inputs)[0]


def cases(tiny: bool) -> Iterator[Case]:
    for P, K in [(8, 9)] if tiny else SHAPES:

        def in_rows(scores, ranks, _, K=K):
            return plain.ranking_loss(scores.view(-1, K), ranks.view(-1, K))

        yield Case(
            f"P={P} K={K} fp32 forward + backward", "ranking_loss" if K == 2 else "",
            partial(draw, P, K), {"ours": loss_of(ranking_loss), **baselines(in_rows, tiny)},
            loss_of(reference.ranking_loss), bytes=16 * P * K, backward=True,
        )  # fmt: skip


if __name__ == "__main__":
    main("ranking", cases)
