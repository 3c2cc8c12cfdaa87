"""python -m bench.bench_linear_logprob: log-probs from hidden states; the logits need not exist."""

from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines, chunked, precision
from bench.harness import main
from tetrad.kernels import linear_logprob, reference
from tetrad.kernels.linear_logprob import linear_token_logprobs

SHAPES = [  # N tokens, V columns, d
    (8192, 128256, 4096), (8192, 32000, 2048), (8192, 151936, 4096), (8192, 50257, 2048),
    (8192, 128256, 2048), (8192, 32000, 4096), (8192, 151936, 2048), (8192, 50257, 4096),
]  # fmt: skip


def fused(hidden, weight, tokens):
    """The forward pass in one kernel of ours, which few rows take: many take cuBLAS and then the
    kernel of rows."""
    with mock.patch.object(linear_logprob, "FUSED_ROWS", len(hidden)):
        return linear_token_logprobs(hidden, weight, tokens)


def draw(N: int, V: int, d: int, dtype: torch.dtype):
    """Hidden states, a weight whose logits have a spread of about 3, and tokens."""
    hidden = torch.randn(N, d, device=DEVICE, dtype=dtype).requires_grad_()
    weight = (3 / d**0.5 * torch.randn(V, d, device=DEVICE, dtype=dtype)).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), device=DEVICE)


def truth(hidden, weight, tokens):
    return chunked(
        lambda h, t, w: reference.linear_token_logprobs(h, w, t), (hidden, tokens), (weight,)
    )


def cases(tiny: bool) -> Iterator[Case]:
    dtype, size, bits = precision(tiny)
    rest = baselines(plain.linear_token_logprobs, tiny)
    forward = {"ours": linear_token_logprobs, "ours, fused": fused, **rest}
    both = {
        "ours": linear_token_logprobs,
        "ours, save_logits": partial(linear_token_logprobs, save_logits=True),
        **rest,
    }
    op = "linear_token_logprobs"
    for N, V, d in [(16, 1000, 32)] if tiny else SHAPES:
        product, read = 2 * N * V * d, (N + V) * d * size
        shape = {"draw": partial(draw, N, V, d, dtype), "truth": truth, "dtype": dtype}
        name = f"N={N} V={V} d={d} {bits}"
        yield Case(
            f"{name} forward", op, providers=forward, bytes=read, flops=product, gemm=(N, V, d),
            by_row=True, **shape,
        )  # fmt: skip
        yield Case(
            f"{name} forward + backward", op, providers=both, bytes=2 * read, flops=3 * product,
            gemm=(N, V, d), work={"ours": 4 * product}, backward=True, **shape,
        )  # fmt: skip


if __name__ == "__main__":
    main("linear_logprob", cases)
