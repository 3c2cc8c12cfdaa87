"""python -m bench.bench_ppo_loss: clipped policy and value losses, forward with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import ppo_loss, reference

CUDA = torch.cuda.is_available()
LOSSES = ("policy_loss", "value_loss")
PROVIDERS = {"ours": [getattr(ppo_loss, x) for x in LOSSES]}
PROVIDERS["torch"] = [getattr(reference, x) for x in LOSSES]
if CUDA:
    PROVIDERS["torch.compile"] = [torch.compile(f) for f in PROVIDERS["torch"]]
SHAPES = [(64, 1024), (512, 4096)] if CUDA else [(4, 64)]


def cases() -> Iterator[Case]:
    device = "cuda" if CUDA else "cpu"
    for B, T in SHAPES:
        x, old, targets = torch.randn(3, B, T, device=device)
        x.requires_grad_()
        mask = torch.arange(T, device=device) < torch.randint(1, T + 1, (B, 1), device=device)
        for provider, losses in PROVIDERS.items():
            for name, loss_of in zip(LOSSES, losses, strict=True):
                for aggregation in "token-mean", "sequence-mean":

                    def forward_backward(
                        f=loss_of, x=x, constants=(old, targets, mask), aggregation=aggregation
                    ) -> None:
                        x.grad = None
                        f(x, *constants, aggregation=aggregation)[0].backward()

                    least = 17 * B * T  # three inputs and a mask in, a gradient out
                    yield Case(
                        f"B={B} T={T} {name} {aggregation}", provider, forward_backward, least
                    )


if __name__ == "__main__":
    publish("ppo_loss", cases())
