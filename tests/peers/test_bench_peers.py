"""The adaptors of bench/peers.py against float64 on the CPU, in each environment of `make peers`.

Triton kernels need TRITON_INTERPRET=1. Of what needs a GPU: it is found, and takes our call.
"""

import importlib.metadata
import inspect
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench import peers
from bench.case import Case, error_of, true_results
from tetrad.kernels import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = {"liger", "cut-cross-entropy", "fla"}  # Triton also for CPU tensors
REFUSED = {("cut-cross-entropy", torch.float32)}  # by its backward
BF16_TOO = "token_logprobs", "token_logprobs_entropy", "exact_kl"  # and all linear ops


def installed(provider: str) -> bool:
    try:
        return bool(importlib.metadata.version(peers.PACKAGES[provider.split(",")[0]]))
    except importlib.metadata.PackageNotFoundError:
        return False


HERE = [
    (op, provider, dtype)
    for op, adaptors in peers.ADAPTORS.items() for provider in adaptors
    for dtype in (torch.float32, torch.bfloat16)
    if installed(provider) and provider != "verl, triton" and (provider, dtype) not in REFUSED
    if dtype == torch.float32 or op in BF16_TOO or op.startswith("linear")
]  # fmt: skip
if not HERE:
    pytest.skip("make peers installs the peers", allow_module_level=True)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """What peers compile runs as written, which needs no C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@triton.jit
def log1p(x):
    return tl.log(1 + x)


@pytest.fixture(autouse=True)
def interpretable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter has no libdevice."""
    if INTERPRETED and installed("cut-cross-entropy"):
        from cut_cross_entropy import tl_utils

        monkeypatch.setattr(tl_utils, "tl_log1p", log1p)


N, V, D, B, T = 13, 300, 32, 5, 24  # three blocks of 128 columns, the last one not full
STEPS = torch.tensor([-0.4, -0.1, 0.1, 0.4])  # log-ratios on both sides of 1.2 and 0.8, not near


def logits(dtype: torch.dtype) -> Tensor:
    return (2 * torch.randn(N, V)).to(dtype).requires_grad_()


def tokens() -> Tensor:
    return torch.randint(V, (N,))


def head(dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and an unembedding."""
    weight = 2 / D**0.5 * torch.randn(V, D)
    return [x.to(dtype).requires_grad_() for x in (torch.randn(N, D), weight)]


def linear_policy(dtype: torch.dtype) -> list[Tensor]:
    hidden, weight = head(dtype)
    y = tokens()
    old = reference.linear_token_logprobs(hidden.detach(), weight.detach(), y)
    old += STEPS[torch.randint(4, (N,))]
    return [hidden, weight, y, old, torch.randn(N), torch.arange(N) % 4 > 0]


def rows(*apart: float) -> list[Tensor]:
    """Values (B, T) that take a gradient, then for each number others about so far from them, and
    the mask of responses: full, cut, one token."""
    x = torch.randn(B, T)
    mask = torch.arange(T) < torch.tensor([T, 17, 8, 2, 1])[:, None]
    return [x.clone().requires_grad_(), *(x + d * torch.randn(B, T) for d in apart), mask]


def policy() -> list[Tensor]:
    logprobs, advantages, mask = rows(1)
    return [logprobs, logprobs.detach() + STEPS[torch.randint(4, (B, T))], advantages, mask]


def constant(*tensors: Tensor) -> list[Tensor]:
    return [x.detach() for x in tensors]


DRAW: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
    "token_logprobs": lambda dtype: [logits(dtype), tokens()],
    "token_logprobs_entropy": lambda dtype: [logits(dtype), tokens()],
    "linear_token_logprobs": lambda dtype: [*head(dtype), tokens()],
    "linear_cross_entropy": lambda dtype: [*head(dtype), tokens()],
    "linear_policy_loss": linear_policy,
    "exact_kl": lambda dtype: [logits(dtype), *constant(logits(dtype))],
    "linear_exact_kl": lambda dtype: [*head(dtype), *constant(*head(dtype))],
    "token_kl": lambda _: rows(0.5)[:2],
    "gae": lambda _: constant(*rows(1)),
    "gae_whitened": lambda _: constant(*rows(1)),
    "ppo_advantages": lambda _: [torch.randn(B), *constant(*rows(0.5, 1))],
    "policy_loss": lambda _: policy(),
    "value_loss": lambda _: rows(0.3, 1),
    "ranking_loss": lambda _: [
        torch.randn(2 * B, requires_grad=True), torch.tensor([1, 2] * B),
        torch.arange(0, 2 * B + 1, 2),
    ],
}  # fmt: skip


def truth(op: str, provider: str) -> Callable:
    """Our op with the options that bench/ compares; NaN where a peer may leave anything."""

    def white(advantages: Tensor, returns: Tensor, mask: Tensor) -> list[Tensor]:
        white = reference.whiten(advantages, mask, unbiased=provider == "verl")
        return hidden([white, returns], mask)

    def hidden(outputs, mask: Tensor) -> list[Tensor]:
        return [x.masked_fill(~mask, torch.nan) for x in outputs]

    def ppo_advantages(*inputs: Tensor) -> list[Tensor]:
        plain = reference.ppo_advantages(*inputs, kl_coef=0.02, whiten_advantages=False)
        return white(plain.advantages, plain.returns, inputs[-1])

    with_options = {
        "token_logprobs_entropy": lambda *x: reference.token_logprobs(*x, entropy=True),
        "token_kl": lambda *x: reference.token_kl(*x, estimator="k3"),
        "gae": lambda *x: hidden(reference.gae(*x), x[-1]),
        "gae_whitened": lambda *x: white(*reference.gae(*x), x[-1]),
        "ppo_advantages": ppo_advantages,
        "ranking_loss": lambda *x: reference.ranking_loss(*x)[0],
    }
    return with_options[op] if op in with_options else getattr(reference, op)


def check(op: str, provider: str, dtype: torch.dtype, inputs: list[Tensor], backward: bool) -> None:
    """As the benchmarks do; `error_of` raises what is wrong, and lets what is coarse pass."""
    if provider in KERNELS and not INTERPRETED:
        pytest.skip("a kernel: TRITON_INTERPRET=1 runs it")
    case = Case(op, op, DRAW[op], {}, truth(op, provider), bytes=0, backward=backward, dtype=dtype)
    error = error_of(case, peers.providers(op)[provider], inputs, true_results(case, inputs))
    assert error <= (0.02 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("op, provider, dtype", HERE)
def test_values_and_gradients(op, provider, dtype) -> None:
    inputs = DRAW[op](dtype)
    check(op, provider, dtype, inputs, backward=any(x.requires_grad for x in inputs))


@pytest.mark.parametrize("op, provider, dtype", HERE)
def test_without_gradients_the_inputs_stay(op, provider, dtype) -> None:
    """Liger's cross-entropy overwrites logits that require a gradient, even where none is made."""
    inputs = DRAW[op](dtype)
    kept = [x.detach().clone() for x in inputs]
    check(op, provider, dtype, inputs, backward=False)
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept))


def test_all_of_what_is_installed_is_found() -> None:
    missing = {peer: why for peer, why in peers.absent(peers.ADAPTORS).items() if installed(peer)}
    assert not missing


def test_precision_is_left_as_it_was() -> None:
    """By the imports, and by torchrl's adaptor."""
    for op in peers.ADAPTORS:
        peers.providers(op)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(not installed("verl"), reason="verl is in another environment")
def test_verls_kernel_takes_our_call() -> None:
    from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

    def apply(*arguments):
        bound = inspect.signature(LinearCrossEntropy.forward).bind(None, *arguments)
        seen.update(bound.arguments)
        return "log-probs", "entropy"

    seen: dict[str, object] = {}
    assert peers._verl_triton_logprobs(apply, "hidden", "weight", "tokens") == "log-probs"
    assert seen == {
        "ctx": None, "hidden": "hidden", "weight": "weight", "labels": "tokens",
        "temperature": 1.0, "reduction": "none",
    }  # fmt: skip
