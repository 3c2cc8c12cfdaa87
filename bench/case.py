"""One op on inputs of one shape: who computes it, and whether the result is right."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LAST = ("torch.compile", "python loop", "reference")  # providers that take seconds of their own
SAMPLE = 256  # rows that are checked of an op that treats each row alone
# ||result - truth|| / ||truth|| at most: of ours, and of others; beyond it is another function
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
COARSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
ROW = 0.3  # the same for a row, with half of what rows usually are added to the truth's norm


@dataclass(frozen=True)
class Case:
    """One op on inputs of one shape; enumerating cases allocates nothing."""

    name: str  # "N=8192 V=128256 bf16 forward"
    op: str  # of `peers`, whose providers join these; or ""
    draw: Callable[[], Sequence[Any]]  # random inputs on DEVICE; leaves that want gradients say so
    providers: Mapping[str, Callable]  # each called with the inputs; a tensor, or tensors first
    truth: Callable  # the same op, exact on float64 inputs
    bytes: int  # the least that any implementation reads and writes
    flops: int = 0  # the least of matrix products
    gemm: tuple[int, int, int] | None = None  # N, V, d of these products, for cuBLAS's rate in bf16
    work: Mapping[str, int] = field(default_factory=dict)  # FLOPs of providers that do more
    backward: bool = False  # the timed call goes on to the gradients
    by_row: bool = False  # row i of each result depends on row i of the inputs: a sample is checked
    dtype: torch.dtype = torch.float32  # of the coarsest input, for the tolerance


def baselines(op: Callable, tiny: bool) -> dict[str, Callable]:
    """Plain PyTorch as it is and, for what is timed in earnest, compiled: the first shape by itself
    and from the second on for any, as PyTorch does when nobody tells it otherwise."""
    if tiny:
        return {"torch": op}
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than run uncompiled
    return {"torch": op, "torch.compile": torch.compile(op)}


def precision(tiny: bool) -> tuple[torch.dtype, int, str]:
    """The type of large inputs, its bytes, its name in a case."""
    return (torch.float32, 4, "fp32") if tiny else (torch.bfloat16, 2, "bf16")


class Wrong(Exception):
    """A result that is not the float64 truth."""


def tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def some(x: Tensor) -> Tensor:
    """Indices of some rows of x: the first and the last few, where tiles end, and others at random,
    the same for every x of that length."""
    n = len(x)
    if n <= SAMPLE:
        return torch.arange(n, device=x.device)
    within = torch.randperm(n - 32, generator=torch.Generator().manual_seed(0))[: SAMPLE - 32] + 16
    ends = torch.arange(-16, 16) % n
    return torch.cat([ends, within]).sort().values.to(x.device)


def forward(case: Case, call: Callable, inputs: Sequence[Any]) -> list[Tensor]:
    """The outputs of a call."""
    with torch.set_grad_enabled(case.backward):
        result = call(*inputs)
    return [result] if isinstance(result, Tensor) else tensors(result)


def gradients(
    outputs: Iterable[Tensor], inputs: Sequence[Any], above: Sequence[Tensor]
) -> list[Tensor]:
    """Of the leaves among the inputs, given those of the differentiable outputs."""
    torch.autograd.backward([y for y in outputs if y.requires_grad], above)
    leaves = [x for x in tensors(inputs) if x.requires_grad]
    found = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    return found


def upstream(outputs: Iterable[Tensor], n: int | None = None) -> list[Tensor]:
    """Random gradients of the differentiable outputs, or of all n rows of which these are some; the
    same for every provider."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn((n, *y.shape[1:]) if n else y.shape, generator=generator, device=DEVICE)
        .to(y.dtype)
        for y in outputs if y.requires_grad
    ]  # fmt: skip


def true_results(case: Case, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs and gradients of the truth on the same inputs in float64, of some rows if `by_row`.

    Where the truth is NaN, nobody is to look.
    """
    n, rows = len(inputs[0]), some(inputs[0])

    def exact(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wanted, x = x.requires_grad, x.detach()
        x = x[rows] if case.by_row and len(x) == n else x
        return (x.double() if x.is_floating_point() else x).requires_grad_(wanted)

    exactly = [exact(x) for x in inputs]
    outputs = forward(case, case.truth, exactly)
    if not case.backward:
        return outputs
    above = [x[rows] for x in upstream(outputs, n)] if case.by_row else upstream(outputs)
    return [*(y.detach() for y in outputs), *gradients(outputs, exactly, above)]


def error_of(case: Case, call: Callable, inputs: Sequence[Any], truth: Sequence[Tensor]) -> float:
    """The largest of ||result - truth|| / ||truth|| over the results, or NaN.

    Raises Wrong when results are missing or of another shape, and when a row is another row: a tile
    that was forgotten is a small part of the norm.
    """
    found = forward(case, call, inputs)
    if case.backward:
        found += gradients(found, inputs, upstream(found))
    if len(found) != len(truth):
        raise Wrong(f"wrong: {len(found)} results where {len(truth)} are due")
    errors = []
    for i, (y, t) in enumerate(zip(found, truth)):
        if y is None:
            raise Wrong(f"wrong: result {i}, a gradient, is missing")
        y = (y[some(y)] if case.by_row else y).detach().double()
        if y.shape != t.shape:
            raise Wrong(f"wrong: a result of shape {tuple(y.shape)} where {tuple(t.shape)} is due")
        counts = ~t.isnan()
        gap, t = (torch.where(counts, x, 0.0) for x in (y - t, t))
        errors.append(float(gap.norm() / t.norm().clamp(min=1e-30)))
        if t.dim():
            gaps, norms = (x.reshape(len(t), -1).norm(dim=1) for x in (gap, t))
            usual = norms.square().mean().sqrt()
            off = gaps > ROW * (norms + usual / 2)
            if off.any():
                row = int(off.nonzero()[0])
                raise Wrong(f"wrong: row {row} of those compared, of result {i}, is another one")
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def chunked(op: Callable, by_row: Sequence[Any], shared: Sequence[Any], rows: int = 512) -> Tensor:
    """op(*by_row, *shared) a few rows at a time, made again in backward: for a truth that would not
    fit the memory in float64."""
    parts = [
        checkpoint(op, *(x[i : i + rows] for x in by_row), *shared, use_reentrant=False)
        for i in range(0, len(by_row[0]), rows)
    ]
    return torch.cat(parts)
