"""What every op owes to launch.py: one derivative, and Triton's interpreter as it is shipped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

import tetrad
from tests.kernels.callers import compiled

B, T, V, d = 2, 5, 7, 4


def scalars(device: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """A scalar function of one input for each op that has a gradient, and the input."""
    x, y, A = torch.randn(3, B, T, device=device)
    mask, tokens = torch.ones(B, T, device=device), torch.randint(V, (B, T), device=device)
    logits, ref_logits = torch.randn(2, B, T, V, device=device)
    hidden, ref_hidden = torch.randn(2, B, T, d, device=device)
    weight = torch.randn(V, d, device=device)
    ranks, bounds = torch.arange(T, device=device), torch.tensor([0, T], device=device)
    return {
        "token_kl": (lambda x: tetrad.token_kl(x, y, estimator="k3").sum(), x),
        "policy_loss": (lambda x: tetrad.policy_loss(x, y, A, mask)[0], x),
        "value_loss": (lambda x: tetrad.value_loss(x, y, A, mask)[0], x),
        "ranking_loss": (lambda x: tetrad.ranking_loss(x, ranks, bounds)[0], x[0]),
        "token_logprobs": (lambda x: tetrad.token_logprobs(x, tokens).sum(), logits),
        "linear_token_logprobs": (
            lambda x: tetrad.linear_token_logprobs(x, weight, tokens).sum(), hidden
        ),
        "linear_cross_entropy": (lambda x: tetrad.linear_cross_entropy(x, weight, tokens), hidden),
        "linear_policy_loss": (
            lambda x: tetrad.linear_policy_loss(x, weight, tokens, y, A, mask)[0], hidden
        ),
        "exact_kl": (lambda x: tetrad.exact_kl(x, ref_logits).sum(), logits),
        "linear_exact_kl": (
            lambda x: tetrad.linear_exact_kl(x, weight, ref_hidden, weight).sum(), hidden
        ),
    }  # fmt: skip


OPS = sorted(set(tetrad.__all__) - {"__version__", "gae", "whiten", "ppo_advantages"})


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_raises(op, traced, device) -> None:
    """Also where the upstream gradient, the 1 of a loss, has no graph; a first one does not raise,
    though asked for with create_graph=True."""
    if traced and torch.__version__ < "2.13":
        pytest.skip("PyTorch before 2.13 detaches the gradients of compiled code, its own too")
    f, x = scalars(device)[op]
    x.requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    loss = (compiled(f) if traced else f)(x)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="differentiate twice|double backward"):
        (loss + gradient.square().sum()).backward()


def test_a_second_derivative_raises_by_the_dispatcher_too(device) -> None:
    x = torch.randn(5, device=device, requires_grad=True)
    kl = torch.ops.tetrad.token_kl(x, torch.zeros_like(x), "k2").sum()
    (gradient,) = torch.autograd.grad(kl, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", [*OPS, "gae", "whiten"])
def test_transforms_of_a_kernel_are_refused(op, transform, device) -> None:
    x, mask = torch.randn(B, T, device=device), torch.ones(B, T, device=device)
    f, x = {
        **scalars(device),
        "gae": (lambda x: tetrad.gae(x, x, mask)[0].sum(), x),
        "whiten": (lambda x: tetrad.whiten(x, mask).sum(), x),
    }[op]
    with pytest.raises((RuntimeError, ValueError)):  # NotImplementedError is a RuntimeError
        TRANSFORMS[transform](f)(x)


# The interpreter without the changes of tests/kernels/interpreter.py: what a reader without a GPU
# tries first. In fp32, and without a gradient in bf16, of which it would multiply the bit patterns.
ON_SCORES = """if True:
    import torch
    import tetrad
    from tetrad.kernels import reference

    B, T = 2, 700
    x, y, A = torch.randn(3, B, T)
    mask, scores, bounds = torch.rand(B, T) > 0.3, torch.randn(B), torch.tensor([0, 40, B * T])
    flat = [z.reshape(-1) for z in (x, y, A, mask)]
    ranks, prompts = torch.randint(1, 5, (12,)), torch.tensor([0, 4, 12])
    options = {"aggregation": "sequence-mean", "cu_seqlens": bounds}
    calls = [
        lambda ops, x: ops.policy_loss(x, y, A, mask, dual_clip=3.0),
        lambda ops, x: ops.policy_loss(x.reshape(-1), *flat[1:], **options),
        lambda ops, x: ops.value_loss(x, y, A, mask, denominator=torch.tensor(7)),
        lambda ops, x: ops.ranking_loss(x[0, :12], ranks, prompts),
        lambda ops, x: ops.gae(x.detach(), y, mask, gamma=0.9),
        lambda ops, x: ops.gae(*flat[:2], flat[3], cu_seqlens=bounds, mask_mode="decay"),
        lambda ops, x: ops.whiten(x.detach(), mask, unbiased=True),
        lambda ops, x: ops.ppo_advantages(
            scores, x.detach(), y, A, mask, kl_coef=0.1, estimator="k3", whiten_rewards=True
        ),
        *(
            lambda ops, x, estimator=estimator: (ops.token_kl(x, y, estimator=estimator).sum(),)
            for estimator in ("k1", "k2", "k3", "abs")
        ),
    ]

    def results(f, ops):
        leaf = x.clone().requires_grad_()
        first, *rest = f(ops, leaf)
        if first.requires_grad:
            first.backward()
            rest.append(leaf.grad)
        rest = [z for y in rest for z in (y.values() if isinstance(y, dict) else [y])]
        return [first.detach(), *rest]

    for f in calls:
        for got, expected in zip(results(f, tetrad), results(f, reference), strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
"""


ON_LOGITS = """
import torch
from tetrad import exact_kl, linear_cross_entropy, linear_exact_kl, linear_policy_loss
from tetrad import linear_token_logprobs, token_logprobs
from tetrad.kernels import launch, reference

assert launch.INTERPRETED
torch.manual_seed(0)
tokens = torch.tensor([3, -100, 199])
for op in token_logprobs, linear_token_logprobs:
    inputs = [torch.randn(3, 200)]
    if op is linear_token_logprobs:
        inputs = [torch.randn(3, 16), torch.randn(200, 16)]
    for options in {}, {"entropy": True, "temperature": torch.tensor([0.5, 1.0, 2.0])}:
        results = []
        for f in op, getattr(reference, op.__name__):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = f(*leaves, tokens, **options)
            outputs = outputs if options else (outputs,)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            with torch.no_grad():
                again = f(*leaves, tokens, **options)
            results.append([*outputs, *(x.grad for x in leaves), again[0] if options else again])
        torch.testing.assert_close(*results)

hidden, weight = torch.randn(3, 16).bfloat16(), torch.randn(200, 16).bfloat16()
found = linear_token_logprobs(hidden, weight, tokens)  # whose product is PyTorch's: no bits of bf16
torch.testing.assert_close(found, reference.linear_token_logprobs(hidden, weight, tokens))

mask = tokens >= 0
for f, inputs, constants in (
    (exact_kl, [torch.randn(3, 200)], [torch.randn(3, 200)]),
    (linear_exact_kl, [torch.randn(3, 16), torch.randn(200, 16)], [hidden.float(), weight.float()]),
    (linear_cross_entropy, [torch.randn(3, 16), torch.randn(200, 16)], [tokens]),
    (linear_policy_loss, [torch.randn(3, 16), torch.randn(200, 16)],
     [tokens, torch.randn(3) - 5, torch.randn(3), mask]),
):
    results = []
    for g in f, getattr(reference, f.__name__):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = g(*leaves, *constants)
        y = y[0] if isinstance(y, tuple) else y
        y.sum().backward()
        results.append([y.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("calls", [ON_SCORES, ON_LOGITS], ids=["scores", "logits"])
def test_the_interpreter_as_triton_ships_it(calls) -> None:
    """Every op, forward and backward. Triton 3.6 asks for an older NumPy, and the error says so."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", calls], cwd=Path(__file__).parents[2], env=env,
        capture_output=True, text=True,
    )  # fmt: skip

    def version(package) -> tuple[int, ...]:
        return tuple(int(x) for x in package.__version__.split(".")[:2])

    if version(triton) < (3, 7) and version(np) >= (2, 4):
        assert done.returncode and "install triton>=3.7 or numpy<2.4" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
