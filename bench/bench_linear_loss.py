"""python -m bench.bench_linear_loss: losses from hidden states, forward with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.linear_logprob import linear_token_logprobs
from tetrad.kernels.linear_loss import linear_cross_entropy, linear_policy_loss
from tetrad.kernels.ppo_loss import policy_loss

CUDA = torch.cuda.is_available()
SHAPES = [(8192, 32000, 2048), (8192, 128256, 4096)] if CUDA else [(16, 1000, 32)]  # N, V, d


def cases() -> Iterator[Case]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    for N, V, d in SHAPES:
        hidden = torch.randn(N, d, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(V, d, device=device) / d**0.5).to(dtype).requires_grad_()
        tokens = torch.randint(V, (N,), device=device)
        with torch.no_grad():
            old = linear_token_logprobs(hidden, weight, tokens)
        constants = (old, torch.randn(N, device=device), torch.ones(N, device=device) > 0)

        def in_two_ops(hidden, weight, tokens, *constants):
            return policy_loss(linear_token_logprobs(hidden, weight, tokens), *constants)

        def logits_policy_loss(hidden, weight, tokens, *constants):
            logits = torch.nn.functional.linear(hidden, weight)
            return reference.policy_loss(reference.token_logprobs(logits, tokens), *constants)

        def logits_cross_entropy(hidden, weight, tokens):
            logits = torch.nn.functional.linear(hidden, weight)
            return torch.nn.functional.cross_entropy(logits.float(), tokens)

        calls = [
            ("policy", "ours", linear_policy_loss, constants),
            ("policy", "ours, two ops", in_two_ops, constants),
            ("policy", "torch", logits_policy_loss, constants),
            ("cross-entropy", "ours", linear_cross_entropy, ()),
            ("cross-entropy", "torch", logits_cross_entropy, ()),
        ]
        moved = 3 * (hidden.numel() + weight.numel()) * hidden.element_size()
        for loss, provider, f, rest in calls:

            def step(f=f, x=(hidden, weight, tokens, *rest)) -> None:
                for leaf in x[:2]:
                    leaf.grad = None
                result = f(*x)
                (result[0] if isinstance(result, tuple) else result).backward()

            yield Case(f"{loss} N={N} V={V} d={d} {dtype}", provider, step, moved)


if __name__ == "__main__":
    publish("linear_loss", cases())
