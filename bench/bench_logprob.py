"""python -m bench.bench_logprob: token log-probabilities from logits, with and without entropy."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import peers, plain
from bench.harness import DEVICE, Case, baselines, main
from tetrad.kernels import reference
from tetrad.kernels.logprob import token_logprobs

SHAPES = [  # N tokens, V columns; the first few are what the README shows
    (N, V)
    for N in (8192, 1024, 32768)
    for V in (128256, 32000, 50257, 151936)
]  # fmt: skip


def draw(N: int, V: int, dtype: torch.dtype):
    logits = (3 * torch.randn(N, V, device=DEVICE, dtype=dtype)).requires_grad_()
    return logits, torch.randint(V, (N,), device=DEVICE)


def cases(tiny: bool) -> Iterator[Case]:
    dtype, size = (torch.float32, 4) if tiny else (torch.bfloat16, 2)
    for entropy in False, True:
        name = "token_logprobs" + "_entropy" * entropy
        providers = {
            "ours": partial(token_logprobs, entropy=entropy),
            **baselines(getattr(plain, name), tiny),
            **peers.providers(name),
        }
        truth = partial(reference.token_logprobs, entropy=entropy)
        for N, V in [(16, 1000)] if tiny else SHAPES:
            shape = f"N={N} V={V} {'fp32' if tiny else 'bf16'}{' entropy' * entropy}"
            for backward in False, True:
                yield Case(
                    f"{shape} forward{' + backward' * backward}", partial(draw, N, V, dtype),
                    providers, truth, bytes=(3 if backward else 1) * N * V * size,
                    backward=backward, by_row=True, dtype=dtype,
                )  # fmt: skip


if __name__ == "__main__":
    main("logprob", cases, ("token_logprobs", "token_logprobs_entropy"))
