"""python -m bench.bench_exact_kl: the KL of two softmaxes, from logits and from hidden states."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import bench_linear_logprob as logprob
from bench import plain
from bench.case import DEVICE, Case, baselines, chunked, precision
from bench.harness import main
from tetrad.kernels import reference
from tetrad.kernels.exact_kl import exact_kl, linear_exact_kl

SHAPES = [(8192, 128256, 4096), (8192, 32000, 2048)]  # N, V, d


def draw(N: int, V: int, d: int, dtype: torch.dtype):
    logits = 3 * torch.randn(N, V, device=DEVICE, dtype=dtype)
    return logits.clone().requires_grad_(), logits + torch.randn_like(logits)


def draw_linear(*shape):
    hidden, weight, _ = logprob.draw(*shape)
    ref_hidden, ref_weight, _ = logprob.draw(*shape)
    return hidden, weight, ref_hidden.detach(), ref_weight.detach()


def true_linear(hidden, weight, ref_hidden, ref_weight):
    return chunked(
        lambda h, r, w, v: reference.linear_exact_kl(h, w, r, v),
        (hidden, ref_hidden), (weight, ref_weight),
    )  # fmt: skip


def cases(tiny: bool) -> Iterator[Case]:
    dtype, size, bits = precision(tiny)
    from_logits = {"ours": exact_kl, **baselines(plain.exact_kl, tiny)}
    from_hidden = {"ours": linear_exact_kl, **baselines(plain.linear_exact_kl, tiny)}
    for backward in False, True:
        for N, V, d in [(16, 1000, 32)] if tiny else SHAPES:
            shape = (N, V, d, dtype)
            passes = "forward + backward" if backward else "forward"
            product = 2 * N * V * d
            yield Case(
                f"logits N={N} V={V} {bits} {passes}", "exact_kl", partial(draw, *shape),
                from_logits, reference.exact_kl, bytes=(5 if backward else 2) * N * V * size,
                backward=backward, by_row=True, dtype=dtype,
            )  # fmt: skip
            yield Case(
                f"hidden N={N} V={V} d={d} {bits} {passes}", "linear_exact_kl",
                partial(draw_linear, *shape), from_hidden, true_linear,
                bytes=(3 if backward else 2) * (N + V) * d * size,
                flops=(4 if backward else 2) * product, gemm=(N, V, d),
                work={"ours": 6 * product} if backward else {},
                backward=backward, by_row=not backward, dtype=dtype,
            )  # fmt: skip


if __name__ == "__main__":
    main("exact_kl", cases)
