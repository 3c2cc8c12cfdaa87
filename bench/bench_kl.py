"""python -m bench.bench_kl: the per-token KL estimate k3, forward, and forward with backward."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines
from bench.harness import main
from tetrad.kernels import reference
from tetrad.kernels.kl import token_kl

SIZES = [512 * 4096, 512 * 1024]


def draw(n: int):
    logprobs, ref = -torch.rand(2, n, device=DEVICE)
    return logprobs.requires_grad_(), ref


def cases(tiny: bool) -> Iterator[Case]:
    providers = {
        "ours": partial(token_kl, estimator="k3"),
        **baselines(plain.token_kl, tiny),
    }
    truth = partial(reference.token_kl, estimator="k3")
    for n in [4096] if tiny else SIZES:
        for backward in False, True:
            passes = "forward + backward" if backward else "forward"
            yield Case(
                f"N={n} k3 fp32 {passes}", "token_kl", partial(draw, n), providers, truth,
                bytes=(28 if backward else 12) * n, backward=backward,
            )  # fmt: skip


if __name__ == "__main__":
    main("kl", cases)
