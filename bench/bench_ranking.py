"""python -m bench.bench_ranking: the K-way ranking loss, with its gradient."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import peers, plain
from bench.harness import DEVICE, Case, baselines, main
from tetrad.kernels import reference
from tetrad.kernels.ranking import ranking_loss

SHAPES = [(64, 9), (4096, 4), (16, 128), (4096, 2)]  # prompts, completions of each


def draw(P: int, K: int):
    scores = torch.randn(P * K, device=DEVICE, requires_grad=True)
    ranks = torch.rand(P, K, device=DEVICE).argsort(1).view(-1) + 1
    if K == 2:  # pairs as OpenRLHF takes them, the better first
        ranks = torch.arange(1, 3, device=DEVICE).repeat(P)
    return scores, ranks, torch.arange(0, P * K + 1, K, device=DEVICE)


def cases(tiny: bool) -> Iterator[Case]:
    for P, K in [(8, 9)] if tiny else SHAPES:

        def in_rows(scores, ranks, _, K=K):
            return plain.ranking_loss(scores.view(-1, K), ranks.view(-1, K))

        providers = {
            "ours": lambda *inputs: ranking_loss(*inputs)[0],
            **baselines(in_rows, tiny),
            **(peers.providers("ranking_loss") if K == 2 else {}),
        }
        yield Case(
            f"P={P} K={K} fp32 forward + backward", partial(draw, P, K), providers,
            lambda *inputs: reference.ranking_loss(*inputs)[0], bytes=16 * P * K, backward=True,
        )  # fmt: skip


if __name__ == "__main__":
    main("ranking", cases, ("ranking_loss",))
