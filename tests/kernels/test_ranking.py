import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.kernels.callers import LAYOUTS, compiled, laid_out, launches, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tetrad.kernels import check, ranking, reference
from tetrad.kernels.ranking import ranking_loss

BOTH = pytest.mark.parametrize("ops", [ranking, reference], ids=["kernel", "reference"])


def bounds(*K: int, device: str) -> Tensor:
    return torch.tensor([0, *K], device=device).cumsum(0).int()


def run(loss_of, scores: Tensor, *args, **options) -> list[Tensor]:
    scores = scores.detach().requires_grad_()
    loss, accuracy = loss_of(scores, *args, **options)
    (3 * loss).backward()
    assert not accuracy.requires_grad
    return [loss.detach(), accuracy, scores.grad]


@BOTH
def test_by_hand(ops, device) -> None:
    """Two prompts: a pair with margin log 3 that is ranked right, sigmoid(-m) = 1/4; and three
    completions, two of them tied, whose two pairs have margins 0 and -log 3."""
    a = math.log(3)
    scores = torch.tensor([a, 0.0, 0.0, 0.0, a], device=device)
    ranks = torch.tensor([1, 2, 1, 2, 2], device=device)
    loss, accuracy, gradient = run(ops.ranking_loss, scores, ranks, bounds(2, 3, device=device))
    first, second = math.log(4 / 3), (math.log(2) + math.log(4)) / 2
    assert loss.item() == pytest.approx((first + second) / 2)
    assert accuracy.item() == pytest.approx((1 + 0) / 2)
    expected = [-1 / 4, 1 / 4, -(1 / 2 + 3 / 4) / 2, 1 / 4, 3 / 8]
    assert gradient.tolist() == pytest.approx([3 * x / 2 for x in expected])


# No prompt; prompts without a pair; one pair; the paper's 4 to 9; and prompts of more than one and
# of exactly one and two tiles of 16.
@pytest.mark.parametrize("K", [(), (0,), (1, 0), (2,), (4, 9, 7), (3, 0, 40, 1, 16, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_reference(K, dtype, device, assert_as_exact) -> None:
    scores = (4 * torch.randn(sum(K), device=device)).to(dtype)
    ranks = torch.randint(1, 5, (sum(K),), device=device)  # ties from four completions on
    args = ranks, bounds(*K, device=device)
    kernel = run(ranking_loss, scores, *args)
    plain = run(reference.ranking_loss, scores, *args)
    truth = run(reference.ranking_loss, scores.double(), *args)
    for outputs in zip(kernel, plain, truth, strict=True):
        assert_as_exact(*outputs)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_call(data, device, assert_as_exact) -> None:
    """Prompts, types, layouts and denominators as they come; programs run in any order, nothing
    but the inputs is touched, and two parts add up."""
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 99)))
    K = draw(strategies.lists(strategies.integers(0, 20), max_size=5))
    types = strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layouts = strategies.sampled_from(LAYOUTS)
    ints = strategies.sampled_from([torch.int32, torch.int64])
    scores = laid_out((2 * torch.randn(sum(K), device=device)).to(draw(types)), draw(layouts))
    ranks = torch.randint(1, draw(strategies.integers(2, 9)), (sum(K),), device=device)
    ranks = laid_out(ranks.to(draw(ints)), draw(layouts))
    cu = laid_out(bounds(*K, device=device).to(draw(ints)), draw(layouts))
    n = draw(strategies.sampled_from([None, 3, 0.5, torch.tensor(2.0, device=device)]))
    got = run(ranking_loss, scores, ranks, cu, denominator=n)
    plain = run(reference.ranking_loss, scores, ranks, cu, denominator=n)
    truth = run(reference.ranking_loss, scores.double(), ranks, cu, denominator=n)
    for x, y, exact in zip(got, plain, truth, strict=True):
        assert_as_exact(x, y, exact, floor=1e-13 if x.dtype == torch.float64 else 4e-6)
    if device == "cpu":
        with Traffic(order=np.random.default_rng(0).permutation) as traffic:
            shuffled = run(ranking_loss, scores, ranks, cu, denominator=n)
        assert all(torch.equal(x, y) for x, y in zip(shuffled, got, strict=True))
        assert traffic.launches == ["_ranking", "_scale"][: 1 + (sum(K) > 0)]
    if n is not None:
        cut = sum(K[:2])
        parts = [
            run(ranking_loss, scores[:cut], ranks[:cut], cu[:3], denominator=n),
            run(ranking_loss, scores[cut:], ranks[cut:], cu[2:] - cut, denominator=n)
            if len(K) > 1 else [0, 0, scores[:0]],
        ]  # fmt: skip
        assert torch.equal(torch.cat([part[2] for part in parts]), got[2])
        for i in range(2):
            torch.testing.assert_close(parts[0][i] + parts[1][i], got[i], atol=1e-5, rtol=1e-5)


@BOTH
def test_gradients_in_fp64(ops, device) -> None:
    scores = torch.randn(20, dtype=torch.float64, device=device, requires_grad=True)
    ranks, cu = torch.randint(1, 4, (20,), device=device), bounds(3, 17, device=device)
    assert torch.autograd.gradcheck(
        lambda s: ops.ranking_loss(s, ranks, cu)[0], scores, fast_mode=True
    )


def test_bytes_per_completion_in_one_launch(device) -> None:
    """Ranks in both roles to count the pairs, and both again with the scores; the gradient."""
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    K = 16 * [9]
    scores, ranks = torch.randn(sum(K), requires_grad=True), torch.randint(1, 5, (sum(K),)).int()
    cu = bounds(*K, device=device)
    with Traffic() as traffic:
        ranking_loss(scores, ranks, cu)
    least = 28 * sum(K) + 16 * (8 + 24)  # a program each: its bounds, its parts there and back
    assert least <= traffic.bytes_read + traffic.bytes_written <= least + 16 * 8 + 16
    assert len(traffic.launches) == 1
    with Traffic() as without_gradient, torch.no_grad():
        ranking_loss(scores, ranks, cu)
    assert without_gradient.bytes_written == traffic.bytes_written - 4 * sum(K)


def test_two_launches_forward_and_backward_together(device) -> None:
    if device != "cpu":
        pytest.skip("launches are counted in the interpreter")
    scores, ranks = torch.randn(12, requires_grad=True), torch.randint(1, 5, (12,))
    cu, upstream = bounds(4, 8, device=device), torch.tensor(3.0)
    ranking_loss(scores, ranks, cu)  # the first call on a stream makes its counter
    with launches() as seen, mock.patch.object(check, "check_bounds"):  # reads them, on the CPU
        loss, _ = ranking_loss(scores, ranks, cu)
        torch.autograd.grad(loss, scores, upstream)
    assert seen == ["_ranking", "_scale"]


def test_compiles_into_one_graph(device) -> None:
    """With either kind of denominator; and the host does not wait, autocast changes nothing."""
    ranks, cu = torch.randint(1, 5, (12,), device=device), bounds(4, 8, device=device)
    for n in None, 3.0, torch.tensor(3, device=device):

        def loss_of(scores: Tensor, n=n) -> tuple[Tensor, Tensor]:
            return ranking_loss(2 * scores, ranks, cu, denominator=n)

        scores = torch.randn(12, device=device)
        expected = run(loss_of, scores)
        with torch.autocast(device, dtype=torch.bfloat16), no_host_sync():
            again = run(loss_of, scores)
        traced = run(compiled(loss_of), scores)
        for x, y, z in zip(expected, again, traced, strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("K", [(4, 0, 8), (1,), ()], ids=str)
def test_the_reference_compiles_into_one_graph(K, monkeypatch) -> None:
    """Where a CPU's tensors are not interpreted. Its pairs are filled up to as many as can be."""
    monkeypatch.setattr("tetrad.kernels.launch.INTERPRETED", False)
    scores, ranks = torch.randn(sum(K)), torch.randint(1, 4, (sum(K),))
    cu = bounds(*K, device="cpu")
    for n in None, 3.0, torch.tensor(3):
        expected = run(ranking_loss, scores, ranks, cu, denominator=n)
        traced = run(compiled(ranking_loss), scores, ranks, cu, denominator=n)
        for x, y in zip(traced, expected, strict=True):
            assert torch.equal(x, y)


def test_registered_as_pytorch_asks(device) -> None:
    scores, ranks = torch.randn(7, device=device), torch.randint(1, 5, (7,), device=device)
    for n, wanted in (None, True), (torch.tensor(2, device=device), False):
        inputs = (scores.requires_grad_(wanted), wanted, ranks, bounds(3, 4, device=device), 0.0, n)
        torch.library.opcheck(ranking._ranking_loss.registered, inputs)


def test_in_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    ranks, cu = torch.randint(1, 5, (24,), device=device), bounds(4, 0, 20, device=device)
    scores = torch.randn(24, device=device, requires_grad=True)

    def outputs(scores: Tensor) -> tuple[Tensor, ...]:
        loss, accuracy = ranking_loss(scores, ranks, cu)
        return loss, accuracy, *torch.autograd.grad(loss, scores)

    for x, y in zip(replayed(outputs, scores), outputs(scores), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_all_ties_are_no_comparison(ops, device) -> None:
    scores, ranks = torch.randn(3, device=device), torch.ones(3, device=device)
    scores[0] = torch.nan  # takes part in no pair
    loss, accuracy, gradient = run(ops.ranking_loss, scores, ranks, bounds(3, device=device))
    assert loss == 0 and accuracy == 0 and (gradient == 0).all()


def test_confident_scores(device) -> None:
    """Margins of +-200: the loss neither overflows nor vanishes before exp(-m) does."""
    scores = torch.tensor([200.0, 0.0, 0.0, 200.0, 20.0, 0.0], device=device)
    ranks = torch.tensor([1, 2, 1, 2, 1, 2], device=device)
    losses = [
        run(ranking_loss, scores[i : i + 2], ranks[i : i + 2], bounds(2, device=device))
        for i in (0, 2, 4)
    ]
    assert [x[0].item() for x in losses] == pytest.approx([0.0, 200.0, math.exp(-20)], rel=1e-5)
    assert losses[1][2].tolist() == pytest.approx([-3.0, 3.0])
    assert losses[2][2].tolist() == pytest.approx([-3 * math.exp(-20), 3 * math.exp(-20)], rel=1e-5)


def test_parts_add_up_to_the_whole(device) -> None:
    """Two prompts of three have a comparison; the parts are told so."""
    scores, ranks = torch.randn(10, device=device), torch.tensor([1, 2, 3, 2, 1, 1, 1, 2, 3, 4])
    ranks = ranks.to(device)
    whole = run(ranking_loss, scores, ranks, bounds(4, 1, 5, device=device))
    n = torch.tensor(2, device=device)
    first = run(ranking_loss, scores[:5], ranks[:5], bounds(4, 1, device=device), denominator=n)
    second = run(ranking_loss, scores[5:], ranks[5:], bounds(5, device=device), denominator=2)
    for i in range(2):
        torch.testing.assert_close(first[i] + second[i], whole[i])
    torch.testing.assert_close(torch.cat([first[2], second[2]]), whole[2])


def test_a_prompt_does_not_feel_its_neighbours_and_runs_repeat(device, monkeypatch) -> None:
    scores, ranks = torch.randn(29, device=device), torch.randint(1, 9, (29,), device=device)
    together = run(ranking_loss, scores, ranks, bounds(9, 20, device=device), denominator=1)
    again = run(ranking_loss, scores, ranks, bounds(9, 20, device=device), denominator=1)
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
    alone = run(ranking_loss, scores[9:], ranks[9:], bounds(20, device=device), denominator=1)
    assert torch.equal(together[2][9:], alone[2])
    monkeypatch.setattr("tetrad.kernels.launch.MAX_PROGRAMS", 1)
    single = run(ranking_loss, scores, ranks, bounds(9, 20, device=device), denominator=1)
    torch.testing.assert_close(single, together)


@BOTH
def test_refusals(ops, device) -> None:
    scores, ranks = torch.zeros(3, device=device), torch.ones(3, device=device)
    for message, args in [
        (r"ranks has shape \(2,\)", (scores, ranks[:2], bounds(3, device=device))),
        (r"scores has shape \(1, 3\)", (scores[None], ranks[None], bounds(3, device=device))),
        ("cu_prompts must be int32", (scores, ranks, bounds(3, device=device).float())),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.ranking_loss(*args)
    cu = bounds(3, device=device)
    with pytest.raises(ValueError, match="denominator holds 0; it must be positive"):
        ops.ranking_loss(scores, ranks, cu, denominator=torch.tensor(0))
    if device == "cpu":  # on a GPU the content of the bounds is trusted
        with pytest.raises(ValueError, match="cu_prompts must rise from 0 to 3"):
            ops.ranking_loss(scores, ranks, bounds(2, device=device))
