"""python -m bench.bench_advantages: GAE, whitening, and all from log-probs to advantages."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import plain
from bench.case import DEVICE, Case, baselines
from bench.harness import main
from tetrad.kernels import advantages, reference

SHAPES = [(512, 4096), (512, 1024), (8192, 2048)]  # B, T


def whitened(ops):
    """GAE, and its advantages whitened: what verl does in one function."""

    def gae_whitened(rewards, values, mask):
        advantages, returns = ops.gae(rewards, values, mask)
        return ops.whiten(advantages, mask), returns

    return gae_whitened


def ppo(ops, **options):
    """Advantages and returns."""
    return lambda *inputs: ops.ppo_advantages(*inputs, kl_coef=0.02, **options)[1:3]


def packed_gae(ops):
    return lambda rewards, values, mask, bounds: ops.gae(rewards, values, mask, cu_seqlens=bounds)


def packed_ppo(ops):
    return lambda *inputs: ppo(ops, cu_seqlens=inputs[-1])(*inputs[:-1])


def draw_gae(*shape: int):
    rewards, values = torch.randn(2, *shape, device=DEVICE)
    return rewards, values, torch.ones(shape, dtype=torch.bool, device=DEVICE)


def draw_ppo(B: int, *shape: int):
    scores = torch.randn(B, device=DEVICE)
    logprobs, values, mask = draw_gae(*shape)
    return scores, logprobs, logprobs + 0.1 * torch.randn_like(logprobs), values, mask


def bounds(B: int, T: int) -> torch.Tensor:
    """Of B sequences of 1 to T tokens."""
    lengths = torch.linspace(1, T, B).round().int()[torch.randperm(B)]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)


def draw_packed_gae(B: int, T: int):
    ends = bounds(B, T)
    return *draw_gae(int(ends[-1])), ends


def draw_packed_ppo(B: int, T: int):
    ends = bounds(B, T)
    return *draw_ppo(B, int(ends[-1])), ends


def cases(tiny: bool) -> Iterator[Case]:
    """Bytes: every token once, fp32, and its mask; every token counts, so none is skipped. Of
    ppo_advantages two results are compared, and its bytes are theirs."""
    for B, T in [(4, 64)] if tiny else SHAPES:
        shape = f"B={B} T={T} fp32"
        packed = f"B={B} T<={T} fp32 packed"
        n, n_packed = B * T, int(torch.linspace(1, T, B).round().sum())

        def looped(call, name="python loop", T=T) -> dict:
            """The loop, where it does not keep the rest waiting: it takes most of a second."""
            return {name: call} if T <= 1024 else {}

        yield Case(
            f"ppo_advantages {shape}", "ppo_advantages", partial(draw_ppo, B, B, T),
            {"ours": ppo(advantages), "python loop": plain.ppo_advantages},
            ppo(reference), bytes=21 * n,
        )  # fmt: skip
        yield Case(
            f"gae {shape}", "gae", partial(draw_gae, B, T),
            {"ours": advantages.gae, "python loop": plain.gae},
            reference.gae, bytes=17 * n,
        )  # fmt: skip
        yield Case(
            f"ppo_advantages {packed}", "", partial(draw_packed_ppo, B, T),
            {"ours": packed_ppo(advantages), **looped(packed_ppo(reference), "reference")},
            packed_ppo(reference), bytes=21 * n_packed,
        )  # fmt: skip
        yield Case(
            f"gae {packed}", "", partial(draw_packed_gae, B, T),
            {"ours": packed_gae(advantages), **looped(packed_gae(reference), "reference")},
            packed_gae(reference), bytes=17 * n_packed,
        )  # fmt: skip
        yield Case(
            f"gae, whitened {shape}", "gae_whitened", partial(draw_gae, B, T),
            {"ours": whitened(advantages), **looped(plain.gae_whitened)},
            whitened(reference), bytes=17 * n,
        )  # fmt: skip
        yield Case(
            f"whiten {shape}", "", lambda B=B, T=T: draw_gae(B, T)[1:],
            {"ours": advantages.whiten, **baselines(plain.whiten, tiny)},
            reference.whiten, bytes=9 * n,
        )  # fmt: skip


if __name__ == "__main__":
    main("advantages", cases)
