"""python -m bench.bench_kl: per-token KL estimates, forward, and forward with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.kl import token_kl

CUDA = torch.cuda.is_available()
PROVIDERS = {"ours": token_kl, "torch": reference.token_kl}
if CUDA:
    PROVIDERS["torch.compile"] = torch.compile(reference.token_kl)
SIZES = [512 * 1024, 512 * 4096] if CUDA else [4096]


def cases() -> Iterator[Case]:
    device = "cuda" if CUDA else "cpu"
    for n in SIZES:
        logprobs, ref = -torch.rand(2, n, device=device)
        logprobs.requires_grad_()
        ones = torch.ones(n, device=device)
        for provider, kl_of in PROVIDERS.items():

            def forward(f=kl_of, p=logprobs, q=ref) -> torch.Tensor:
                return f(p, q, estimator="k3")

            def forward_backward(forward=forward, p=logprobs, ones=ones) -> None:
                p.grad = None
                forward().backward(ones)

            yield Case(f"N={n} k3 forward", provider, torch.no_grad()(forward), 12 * n)
            yield Case(f"N={n} k3 both", provider, forward_backward, 28 * n)


if __name__ == "__main__":
    publish("kl", cases())
