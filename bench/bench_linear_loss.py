"""python -m bench.bench_linear_loss: policy loss and cross-entropy from hidden states, with their
gradients."""

from collections.abc import Iterator
from functools import partial

import torch

from bench import bench_linear_logprob as logprob
from bench import plain
from bench.case import DEVICE, Case, baselines, precision
from bench.harness import main
from tetrad.kernels import reference
from tetrad.kernels.linear_logprob import linear_token_logprobs
from tetrad.kernels.linear_loss import linear_cross_entropy, linear_policy_loss
from tetrad.kernels.ppo_loss import policy_loss

SHAPES = [(8192, 128256, 4096), (8192, 32000, 2048), (8192, 151936, 4096)]  # N, V, d


def in_two_ops(hidden, weight, tokens, *constants):
    return policy_loss(linear_token_logprobs(hidden, weight, tokens), *constants)


def draw_policy(*shape):
    hidden, weight, tokens = logprob.draw(*shape)
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, tokens)
    # ratios on both sides of the clip's edges and not near: none crosses one by its rounding
    old += torch.tensor([-0.4, -0.1, 0.1, 0.4], device=DEVICE)[torch.randint_like(tokens, 4)]
    mask = torch.rand_like(old) < 0.9
    return hidden, weight, tokens, old, torch.randn_like(old), mask


def true_policy_loss(hidden, weight, tokens, *constants):
    return reference.policy_loss(logprob.truth(hidden, weight, tokens), *constants)


def true_cross_entropy(hidden, weight, tokens):
    return -logprob.truth(hidden, weight, tokens).mean()


def cases(tiny: bool) -> Iterator[Case]:
    dtype, size, bits = precision(tiny)
    policy = {
        "ours": linear_policy_loss,
        "ours, two ops": in_two_ops,
        **baselines(plain.linear_policy_loss, tiny),
    }
    cross_entropy = {
        "ours": linear_cross_entropy,
        **baselines(plain.linear_cross_entropy, tiny),
    }
    for N, V, d in [(16, 1000, 32)] if tiny else SHAPES:
        product = 2 * N * V * d
        common = {
            "bytes": 2 * (N + V) * d * size, "flops": 3 * product, "gemm": (N, V, d),
            "backward": True, "dtype": dtype,
        }  # fmt: skip
        shape = (N, V, d, dtype)
        name = f"N={N} V={V} d={d} {bits} forward + backward"
        yield Case(
            f"policy {name}", "linear_policy_loss", partial(draw_policy, *shape), policy,
            true_policy_loss, work={"ours, two ops": 4 * product}, **common,
        )  # fmt: skip
        yield Case(
            f"cross-entropy {name}", "linear_cross_entropy", partial(logprob.draw, *shape),
            cross_entropy, true_cross_entropy, **common,
        )  # fmt: skip


if __name__ == "__main__":
    main("linear_loss", cases)
