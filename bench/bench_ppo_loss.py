"""python -m bench.bench_ppo_loss: clipped policy and value losses, with their gradients."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines
from bench.harness import main
from tetrad.kernels import ppo_loss, reference

SHAPES = [(512, 4096), (64, 1024), (512, 1024)]  # B, T


def draw(B: int, T: int):
    old, constants = torch.randn(2, B, T, device=DEVICE)
    x = (old + 0.2 * torch.randn_like(old)).requires_grad_()
    mask = torch.arange(T, device=DEVICE) < torch.randint(1, T + 1, (B, 1), device=DEVICE)
    return x, old, constants, mask


def cases(tiny: bool) -> Iterator[Case]:
    for B, T in [(4, 64)] if tiny else SHAPES:
        for name in "policy_loss", "value_loss":
            providers = {
                "ours": getattr(ppo_loss, name),
                **baselines(getattr(plain, name), tiny),
            }
            yield Case(
                f"{name} B={B} T={T} fp32 forward + backward", name, partial(draw, B, T), providers,
                getattr(reference, name), backward=True,
                bytes=17 * B * T,  # three inputs and a mask in, a gradient out
            )  # fmt: skip


if __name__ == "__main__":
    main("ppo_loss", cases)
