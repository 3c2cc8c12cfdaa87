"""python -m bench.bench_linear_logprob: log-probs from hidden states, no-grad and with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.linear_logprob import linear_token_logprobs

CUDA = torch.cuda.is_available()
SHAPES = [(8192, 32000, 2048), (8192, 128256, 4096)] if CUDA else [(16, 1000, 32)]  # N, V, d


def with_logits(hidden, weight, tokens):
    """What a trainer writes: the logits of all tokens, in the inputs' type."""
    return reference.token_logprobs(torch.nn.functional.linear(hidden, weight), tokens)


def cases() -> Iterator[Case]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    providers = {
        "ours": linear_token_logprobs,
        "ours, save_logits": lambda *x: linear_token_logprobs(*x, save_logits=True),
        "torch": with_logits,
    }
    for N, V, d in SHAPES:
        hidden = torch.randn(N, d, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(V, d, device=device) / d**0.5).to(dtype).requires_grad_()
        tokens = torch.randint(V, (N,), device=device)
        read = (hidden.numel() + weight.numel()) * hidden.element_size()
        for provider, logprobs_of in providers.items():

            def forward(f=logprobs_of, x=(hidden, weight, tokens)):
                return f(*x)

            def forward_backward(forward=forward, leaves=(hidden, weight)) -> None:
                for x in leaves:
                    x.grad = None
                forward().sum().backward()

            name = f"N={N} V={V} d={d} {dtype}"
            yield Case(f"{name} no grad", provider, torch.no_grad()(forward), read)
            yield Case(f"{name} both", provider, forward_backward, 3 * read)


if __name__ == "__main__":
    publish("linear_logprob", cases())
