"""python -m bench.bench_logprob: token log-probabilities, forward, and forward with backward."""

from collections.abc import Iterator

import torch

from bench.harness import Case, publish
from tetrad.kernels import reference
from tetrad.kernels.logprob import token_logprobs

CUDA = torch.cuda.is_available()
PROVIDERS = {"ours": token_logprobs, "torch": reference.token_logprobs}
if CUDA:
    PROVIDERS["torch.compile"] = torch.compile(reference.token_logprobs)
SHAPES = [(8192, 32000), (8192, 50257), (8192, 128256), (32768, 128256)] if CUDA else [(16, 1000)]


def cases() -> Iterator[Case]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    for N, V in SHAPES:
        logits = torch.randn(N, V, device=device, dtype=dtype, requires_grad=True)
        tokens = torch.randint(V, (N,), device=device)
        read = logits.numel() * logits.element_size()
        for provider, logprobs_of in PROVIDERS.items():
            if provider != "ours" and N * V > 2**31:
                continue  # fp32 copies of these logits take more memory than there is
            for entropy in False, True:

                def forward(f=logprobs_of, x=logits, y=tokens, entropy=entropy):
                    outputs = f(x, y, entropy=entropy)
                    return outputs if entropy else (outputs,)

                def forward_backward(forward=forward, x=logits) -> None:
                    x.grad = None
                    outputs = forward()
                    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

                name = f"N={N} V={V} {dtype}" + " entropy" * entropy
                yield Case(f"{name} forward", provider, torch.no_grad()(forward), read)
                yield Case(f"{name} both", provider, forward_backward, 3 * read)


if __name__ == "__main__":
    publish("logprob", cases())
