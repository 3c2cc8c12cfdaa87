"""python -m bench.bench_exact_kl: the KL of two softmaxes, from logits and from hidden states."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.exact_kl import exact_kl, linear_exact_kl

CUDA = torch.cuda.is_available()
SHAPES = [(8192, 32000, 2048), (8192, 128256, 4096)] if CUDA else [(16, 1000, 32)]  # N, V, d


def cases() -> Iterator[Case]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    for N, V, d in SHAPES:
        logits = torch.randn(N, V, device=device, dtype=dtype, requires_grad=True)
        ref_logits = torch.randn(N, V, device=device, dtype=dtype)
        hidden = torch.randn(N, d, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(V, d, device=device) / d**0.5).to(dtype).requires_grad_()
        ref = (torch.randn_like(hidden).detach(), torch.randn_like(weight).detach() / d**0.5)
        calls = [
            ("logits", "ours", exact_kl, (logits, ref_logits)),
            ("logits", "torch", reference.exact_kl, (logits, ref_logits)),
            ("hidden", "ours", linear_exact_kl, (hidden, weight, *ref)),
            ("hidden", "torch", reference.linear_exact_kl, (hidden, weight, *ref)),
        ]
        for kind, provider, f, x in calls:

            def both(f=f, x=x) -> None:
                for leaf in x:
                    leaf.grad = None
                f(*x).sum().backward()

            read = sum(y.numel() * y.element_size() for y in x)
            name = f"{kind} N={N} V={V} d={d} {dtype}"
            yield Case(f"{name} forward", provider, torch.no_grad()(lambda f=f, x=x: f(*x)), read)
            moved = 5 * read // 2 if kind == "logits" else 2 * read
            yield Case(f"{name} both", provider, both, moved)


if __name__ == "__main__":
    publish("exact_kl", cases())
