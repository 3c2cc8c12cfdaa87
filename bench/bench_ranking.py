"""python -m bench.bench_ranking: the K-way ranking loss, forward with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.ranking import ranking_loss

CUDA = torch.cuda.is_available()
PROVIDERS = {"ours": ranking_loss, "torch": reference.ranking_loss}
SHAPES = [(64, 9), (4096, 4), (16, 128)] if CUDA else [(8, 9)]  # prompts, completions of each


def cases() -> Iterator[Case]:
    device = "cuda" if CUDA else "cpu"
    for P, K in SHAPES:
        scores = torch.randn(P * K, device=device, requires_grad=True)
        ranks = torch.randint(1, K + 1, (P * K,), device=device)
        bounds = torch.arange(0, P * K + 1, K, device=device)
        for provider, loss_of in PROVIDERS.items():
            if provider == "torch" and P * K > 10_000:
                continue  # it compares all completions with all: a billion pairs in fp32

            def forward_backward(f=loss_of, x=scores, args=(ranks, bounds)) -> None:
                x.grad = None
                f(x, *args)[0].backward()

            yield Case(f"P={P} K={K}", provider, forward_backward, 16 * P * K)


if __name__ == "__main__":
    publish("ranking", cases())
