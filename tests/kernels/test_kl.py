import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.kernels.callers import LAYOUTS, compiled, laid_out, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tetrad.kernels import check, reference
from tetrad.kernels.kl import _token_kl, _token_kl_backward, token_kl

ESTIMATORS = pytest.mark.parametrize("estimator", check.ESTIMATORS)
IMPLEMENTATIONS = pytest.mark.parametrize(
    "kl_of", [token_kl, reference.token_kl], ids=["kernel", "reference"]
)


@IMPLEMENTATIONS
def test_by_hand(kl_of, device) -> None:
    """p = 1/2, q = 1/4: d = log 2, q / p = 1/2."""
    p, q = (torch.tensor(x, device=device).log() for x in (0.5, 0.25))
    d = math.log(2)
    expected = {"k1": d, "k2": d * d / 2, "k3": 0.5 - 1 + d, "abs": d}
    for estimator, kl in expected.items():
        assert kl_of(p, q, estimator=estimator).item() == pytest.approx(kl, rel=1e-6)
        assert kl_of(q, p, estimator="abs").item() == pytest.approx(d, rel=1e-6)


def run(kl_of, p: Tensor, q: Tensor, dkl: Tensor, estimator: str) -> list[Tensor]:
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    kl = kl_of(p, q, estimator=estimator)
    kl.backward(dkl.to(kl.dtype))
    return [kl.detach(), p.grad, q.grad]


# Nothing, one token, and 2 x 700: two programs, the second one ragged.
@pytest.mark.parametrize("shape", [(0,), (), (2, 700)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ESTIMATORS
def test_matches_reference(shape, dtype, estimator, device, assert_as_exact) -> None:
    p, q = (-torch.rand(2, *shape, device=device)).to(dtype)
    dkl = torch.randn(shape, device=device).to(dtype).float()
    kernel = run(token_kl, p, q, dkl, estimator)
    plain = run(reference.token_kl, p, q, dkl, estimator)
    truth = run(reference.token_kl, p.double(), q.double(), dkl, estimator)
    for outputs in zip(kernel, plain, truth, strict=True):
        assert_as_exact(*outputs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_call(data, device, assert_as_exact) -> None:
    """Shapes, types and layouts as they come; on the CPU, nothing but the inputs is touched."""
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 99)))
    shape = draw(strategies.lists(strategies.integers(0, 40), max_size=3))
    types = strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layouts = strategies.sampled_from(LAYOUTS)
    estimator = draw(strategies.sampled_from(check.ESTIMATORS))
    p, q = (
        laid_out(torch.randn(shape, device=device).to(draw(types)), draw(layouts)) for _ in range(2)
    )
    dkl = laid_out(torch.randn(shape, device=device), draw(layouts))
    with Traffic() if device == "cpu" else nullcontext():
        kernel = run(token_kl, p, q, dkl, estimator)
    plain = run(reference.token_kl, p, q, dkl, estimator)
    truth = run(reference.token_kl, p.double(), q.double(), dkl, estimator)
    floor = 1e-14 if p.dtype == q.dtype == torch.float64 else 2e-6
    for x, y, exact in zip(kernel, plain, truth, strict=True):
        largest = exact.abs().max().item() if exact.numel() else 0  # exp(-d) may be hundreds
        assert_as_exact(x, y, exact, floor=floor * max(1, largest))


@ESTIMATORS
@IMPLEMENTATIONS
def test_gradients_in_fp64(kl_of, estimator, device) -> None:
    p, q = torch.randn(2, 9, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda p, q: kl_of(p, q, estimator=estimator), (p.requires_grad_(), q.requires_grad_())
    )


def test_k3_is_exact_near_zero_and_clamped_far_from_it(device) -> None:
    """Near 0, exp(-d) - 1 + d is d^2 / 2 to first order; plain fp32 arithmetic loses all of it."""
    p = torch.tensor([1e-5, 0.0, -30.0, 30.0], device=device, requires_grad=True)
    kl = token_kl(p, torch.zeros(4, device=device), estimator="k3")
    expected = [0.5e-10, 0.0, math.expm1(20) - 30, 29.0 + math.exp(-30)]
    assert kl.tolist() == pytest.approx(expected, rel=1e-5)
    kl.sum().backward()
    assert p.grad.tolist() == pytest.approx([1e-5, 0.0, 1.0, 1.0], rel=1e-5)


@IMPLEMENTATIONS
def test_k3_is_never_negative(kl_of, device) -> None:
    """Slope 1 - exp(-d), without exp(-d) beyond -20; and 0 where d itself is held, at -1e8."""
    d = torch.tensor([-math.inf, -1e30, -1e10, -1e9, -1e8, -30.0, -20.0], device=device)
    d = torch.cat([d, torch.logspace(-12, 1.3, 500, device=device) * -1])
    p = torch.cat([d, -d]).requires_grad_()
    kl = kl_of(p, torch.zeros_like(p), estimator="k3")
    assert (kl >= 0).all() and kl[:4].tolist() == pytest.approx(4 * [math.expm1(20) - 1e8])
    kl.sum().backward()
    assert p.grad[:7].tolist() == pytest.approx([0.0] * 4 + [1.0, 1.0, -math.expm1(20)])


@IMPLEMENTATIONS
def test_a_token_that_the_reference_excludes_is_infinitely_far(kl_of, device) -> None:
    p = torch.tensor([-1.0, torch.nan], device=device, requires_grad=True)
    q = torch.tensor([-math.inf, -1.0], device=device, requires_grad=True)
    for estimator in check.ESTIMATORS:
        kl = kl_of(p, q, estimator=estimator)
        assert kl[0] == math.inf and kl[1].isnan()
    kl_of(p, q, estimator="k3").sum().backward()
    assert p.grad[0] == 1 and q.grad[0] == -1 and p.grad[1].isnan()


def test_strided_inputs_and_upstream_gradients(device) -> None:
    p, q = torch.randn(2, 5, 7, device=device).unbind()
    expected = run(token_kl, p, q, torch.ones(5, 7, device=device), "k3")
    strided = run(token_kl, p.T.contiguous().T, q, torch.ones((), device=device).expand(5, 7), "k3")
    assert all(torch.equal(x, y) for x, y in zip(strided, expected, strict=True))


# Forward two reads and one write; backward three and one, or two for gradients on both sides.
@pytest.mark.parametrize("wanted, least", [((True, False), 16), ((True, True), 20)])
def test_moves_no_more_than_it_must(wanted, least, device) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    p, q = (x.requires_grad_(w) for x, w in zip(torch.randn(2, 1500), wanted, strict=True))
    with Traffic() as forward:
        kl = token_kl(p, q, estimator="k3")
    assert (forward.bytes_read, forward.bytes_written) == (8 * 1500, 4 * 1500)
    with Traffic() as backward:
        kl.backward(torch.ones(1500))
    assert backward.bytes_read + backward.bytes_written == least * 1500
    assert (q.grad is not None) == wanted[1]


def total(p: Tensor, q: Tensor) -> Tensor:
    return (token_kl(2 * p, q, estimator="k3") * token_kl(p, q)).sum()


def test_compiles_into_one_graph(device) -> None:
    p, q = torch.randn(2, 4, 50, device=device)
    for wanted in (True, True), (False, True):
        inputs = [x.requires_grad_(w) for x, w in zip((p, q), wanted, strict=True)]
        leaves = [x for x in inputs if x.requires_grad]
        loss, expected = compiled(total)(*inputs), total(*inputs)
        assert torch.equal(loss, expected)
        for x, y in zip(*(torch.autograd.grad(y, leaves) for y in (loss, expected)), strict=True):
            assert torch.equal(x, y)


def test_registered_as_pytorch_asks(device) -> None:
    p, q = torch.randn(2, 4, 5, device=device).requires_grad_()
    torch.library.opcheck(_token_kl.registered, (p, q.mT.contiguous().mT, "k3"))
    gradient = (torch.ones_like(p), p.detach(), q.detach(), "k3", False, True)
    torch.library.opcheck(_token_kl_backward.registered, gradient)


def test_autocast_changes_nothing_and_the_host_does_not_wait(device) -> None:
    p, q = torch.randn(2, 40, device=device)
    expected = run(token_kl, p, q, torch.ones_like(p), "k3")
    with torch.autocast(device, dtype=torch.bfloat16), no_host_sync():
        outputs = run(token_kl, p, q, torch.ones_like(p), "k3")
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))


def test_in_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    p, q = torch.randn(2, 2000, device=device).unbind()

    def outputs(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return total(p, q), *torch.autograd.grad(total(p, q), p)

    p.requires_grad_()
    for x, y in zip(replayed(outputs, p, q), outputs(p, q), strict=True):
        assert torch.equal(x, y)


@IMPLEMENTATIONS
def test_refusals(kl_of, device) -> None:
    x = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="estimator is 'k4'"):
        kl_of(x, x, estimator="k4")
    with pytest.raises(ValueError, match="ref_logprobs has shape"):
        kl_of(x, x[:2])
