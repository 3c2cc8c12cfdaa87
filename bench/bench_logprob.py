"""python -m bench.bench_logprob: token log-probabilities from logits, with and without entropy."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines, precision
from bench.harness import main
from tetrad.kernels import reference
from tetrad.kernels.logprob import token_logprobs

# N tokens, V columns: what tells most comes first, for time may be short
FIRST = [(8192, 128256), (8192, 32000), (1024, 32000), (32768, 151936)]
ALL = [(N, V) for N in (8192, 1024, 32768) for V in (128256, 32000, 50257, 151936)]
SHAPES = list(dict.fromkeys([*FIRST, *ALL]))


def draw(N: int, V: int, dtype: torch.dtype):
    logits = (3 * torch.randn(N, V, device=DEVICE, dtype=dtype)).requires_grad_()
    return logits, torch.randint(V, (N,), device=DEVICE)


def cases(tiny: bool) -> Iterator[Case]:
    dtype, size, bits = precision(tiny)
    plainly = (plain.token_logprobs, plain.token_logprobs_entropy)
    providers = [
        {"ours": partial(token_logprobs, entropy=entropy), **baselines(plainly[entropy], tiny)}
        for entropy in (False, True)
    ]
    for N, V in [(16, 1000)] if tiny else SHAPES:
        for entropy in False, True:
            for backward in False, True:
                yield Case(
                    f"N={N} V={V} {bits}{' entropy' * entropy} forward{' + backward' * backward}",
                    "token_logprobs" + "_entropy" * entropy, partial(draw, N, V, dtype),
                    providers[entropy], partial(reference.token_logprobs, entropy=entropy),
                    bytes=(3 if backward else 1) * N * V * size,
                    backward=backward, by_row=True, dtype=dtype,
                )  # fmt: skip


if __name__ == "__main__":
    main("logprob", cases)
