"""python -m bench.bench_advantages: GAE, whitening, and all from log-probs to advantages."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import advantages, reference

CUDA = torch.cuda.is_available()
PROVIDERS = {"ours": advantages, "torch": reference}
SHAPES = [(64, 1024), (512, 1024), (512, 4096), (8, 32768)] if CUDA else [(4, 64)]


def cases() -> Iterator[Case]:
    device = "cuda" if CUDA else "cpu"
    for B, T in SHAPES:
        logprobs, ref, values = -torch.rand(3, B, T, device=device)
        scores = torch.randn(B, device=device)
        mask = torch.arange(T, device=device) < torch.randint(1, T + 1, (B, 1), device=device)
        flat = [x[mask] for x in (logprobs, ref, values, mask)]
        bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        for provider, ops in PROVIDERS.items():

            def gae(ops=ops, r=logprobs, v=values, mask=mask) -> None:
                ops.gae(r, v, mask)

            def whiten(ops=ops, x=values, mask=mask) -> None:
                ops.whiten(x, mask)

            def padded(ops=ops, inputs=(scores, logprobs, ref, values, mask)) -> None:
                ops.ppo_advantages(*inputs, kl_coef=0.02)

            def packed(ops=ops, inputs=(scores, *flat), bounds=bounds) -> None:
                ops.ppo_advantages(*inputs, kl_coef=0.02, cu_seqlens=bounds)

            name = f"B={B} T={T}"
            yield Case(f"{name} gae", provider, gae, 17 * B * T)
            yield Case(f"{name} whiten", provider, whiten, 9 * B * T)
            yield Case(f"{name} ppo_advantages", provider, padded, 29 * B * T)
            yield Case(f"{name} ppo_advantages packed", provider, packed, 29 * len(flat[0]))


if __name__ == "__main__":
    publish("advantages", cases())
