import math

import pytest
import torch
from torch import Tensor

from tests.kernels.traffic import Traffic
from tetrad.kernels import reference
from tetrad.kernels.kl import token_kl

ESTIMATORS = pytest.mark.parametrize("estimator", reference.ESTIMATORS)
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


@ESTIMATORS
def test_gradients_in_fp64(estimator, device) -> None:
    p, q = torch.randn(2, 9, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda p, q: token_kl(p, q, estimator=estimator), (p.requires_grad_(), q.requires_grad_())
    )


def test_k3_is_exact_near_zero_and_clamped_far_from_it(device) -> None:
    """Near 0, exp(-d) - 1 + d is d^2 / 2 to first order; plain fp32 arithmetic loses all of it."""
    p = torch.tensor([1e-5, 0.0, -30.0, 30.0], device=device, requires_grad=True)
    kl = token_kl(p, torch.zeros(4, device=device), estimator="k3")
    expected = [0.5e-10, 0.0, math.expm1(20) - 30, 29.0 + math.exp(-30)]
    assert kl.tolist() == pytest.approx(expected, rel=1e-5)
    kl.sum().backward()
    assert p.grad.tolist() == pytest.approx([1e-5, 0.0, 1.0, 1.0], rel=1e-5)


def test_strided_inputs_and_upstream_gradients(device) -> None:
    p, q = torch.randn(2, 5, 7, device=device).unbind()
    expected = run(token_kl, p, q, torch.ones(5, 7, device=device), "k3")
    strided = run(token_kl, p.T.contiguous().T, q, torch.ones((), device=device).expand(5, 7), "k3")
    assert all(torch.equal(x, y) for x, y in zip(strided, expected, strict=True))


def test_moves_no_more_than_it_must(device) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    p, q = torch.randn(2, 1500).unbind()
    with Traffic() as traffic:
        token_kl(p, q, estimator="k3")
    assert (traffic.bytes_read, traffic.bytes_written) == (8 * 1500, 4 * 1500)


@IMPLEMENTATIONS
def test_refusals(kl_of, device) -> None:
    x = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="estimator is 'k4'"):
        kl_of(x, x, estimator="k4")
    with pytest.raises(ValueError, match="ref_logprobs has shape"):
        kl_of(x, x[:2])
