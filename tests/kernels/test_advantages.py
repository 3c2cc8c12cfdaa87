from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.forked_world import run_world
from tests.kernels.callers import LAYOUTS, compiled, laid_out, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tetrad.kernels import advantages, check, launch, reference
from tetrad.kernels.advantages import gae, ppo_advantages, whiten

BOTH = pytest.mark.parametrize("ops", [advantages, reference], ids=["kernel", "reference"])
MODES = pytest.mark.parametrize("mask_mode", ["carry", "decay"])
POISONS = (torch.nan, torch.inf, -torch.inf)


def batch(B: int, T: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values, and a mask with holes: the first sequence whole, the last one all masked."""
    rewards, values = torch.randn(2, B, T, device=device).unbind()
    mask = torch.rand(B, T, device=device) > 0.3
    mask[0] = True
    mask[-1] = False
    return rewards, values, mask


def poisoned(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask, x, value)


def packed(mask: Tensor, *padded: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Bounds of the sequences without what follows their last valid token, and the tensors so."""
    T = mask.shape[1]
    places = mask * torch.arange(1, T + 1, device=mask.device)
    lengths = torch.nn.functional.pad(places, (1, 0)).amax(1)
    kept = torch.arange(T, device=mask.device) < lengths[:, None]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return bounds.int(), [x[kept] for x in (mask, *padded)]


@BOTH
def test_gae_by_hand(ops, device) -> None:
    """NeMo-Aligner's case, and one that tells the two mask modes apart."""
    r = torch.tensor([[0.0, 0.0, 1.0, 0.0]], device=device)
    v = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    whole = torch.ones_like(r)
    A, returns = ops.gae(r, v, whole, gamma=0.5, lam=0.0)
    assert A.tolist() == [[0.5, 0.0, 0.5, -3.0]]
    assert returns.tolist() == [[0.5, 1.0, 2.5, 0.0]]
    A, _ = ops.gae(r, v, whole, gamma=0.5, lam=0.0, bootstrap=torch.tensor([2.0], device=device))
    assert A.tolist() == [[0.5, 0.0, 0.5, -2.0]]

    # gamma = lam = 1/2; the last valid step: 1 - 2 = -1. carry: 0 + 2/2 - 1 - 1/4 = -1/4 before
    # it. decay: the masked step has A = 2/2 - 1/4 = 3/4, the one before 0 + 0 - 1 + 3/16.
    mask = torch.tensor([[1, 0, 1, 0]], device=device)
    r, v = torch.tensor([[0, 7, 1, 7.0]], device=device), torch.tensor([[1, 7, 2, 7.0]]).to(r)
    A, _ = ops.gae(r, v, mask, gamma=0.5, lam=0.5)
    assert A.tolist() == [[-0.25, 0.0, -1.0, 0.0]]
    A, _ = ops.gae(r, v, mask, gamma=0.5, lam=0.5, mask_mode="decay")
    assert A.tolist() == [[-0.8125, 0.0, -1.0, 0.0]]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gae_with_a_gamma_and_lam_for_each_sequence(ops, dtype, device) -> None:
    """NeMo-Aligner's case; gamma = lam = 1, where A is the rewards to come less the value; and
    gamma 1/2, lam 1: A = 0 - 3, 1 - 2 + (3 - 3) / 2, 0 - 1 + (2 - 1) / 2, 0 - 0 + (1 - 1/2) / 2."""
    r = torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 3, device=device)
    v = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3, device=device)
    gamma = torch.tensor([0.5, 1.0, 0.5], device=device).to(dtype)
    lam = torch.tensor([0.0, 1.0, 1.0], device=device).to(dtype)
    expected = [[0.5, 0.0, 0.5, -3.0], [1.0, 0.0, -1.0, -3.0], [0.25, -0.5, -1.0, -3.0]]
    whole = torch.ones_like(r)
    assert ops.gae(r, v, whole, gamma=gamma, lam=lam)[0].tolist() == expected
    bounds = 4 * torch.arange(4, device=device)
    flat = [x.view(-1) for x in (r, v, whole)]
    A, _ = ops.gae(*flat, gamma=gamma, lam=lam, cu_seqlens=bounds)
    assert A.view(3, 4).tolist() == expected
    A, _ = ops.gae(r, v, whole, gamma=gamma, lam=lam, bootstrap=torch.full_like(v[:3, 0], 2.0))
    assert A[:, 3].tolist() == [-2.0, -1.0, -2.0]
    for one in (0, 1, 2):  # a number for the other
        A, _ = ops.gae(r, v, whole, gamma=gamma, lam=lam[one].item())
        assert A[one].tolist() == expected[one]
        A, _ = ops.gae(r, v, whole, gamma=gamma[one].item(), lam=lam)
        assert A[one].tolist() == expected[one]
    got = ops.ppo_advantages(
        r[:, 2], v, v, v, whole, kl_coef=1.0, gamma=gamma, lam=lam, whiten_advantages=False
    )
    A, _ = ops.gae(r.roll(1, 1), v, whole, gamma=gamma, lam=lam)
    assert torch.equal(got.advantages, A)


def test_equal_gammas_are_the_number(device) -> None:
    r, v, mask = batch(3, 1500, device)
    numbers = gae(r, v, mask, gamma=0.97, lam=0.9)
    tensors = (torch.full((3,), x, device=device) for x in (0.97, 0.9))
    for x, y in zip(gae(r, v, mask, **dict(zip(("gamma", "lam"), tensors))), numbers):
        assert torch.equal(x, y)


def verl(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """compute_gae_advantage_return of verl, without its whitening."""
    next_value, last, out = torch.zeros_like(r[:, 0]), torch.zeros_like(r[:, 0]), []
    for t in reversed(range(r.shape[1])):
        m = mask[:, t].to(r)
        A = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * last
        next_value = v[:, t] * m + (1 - m) * next_value
        last = A * m + (1 - m) * last
        out.insert(0, last)
    return torch.stack(out, 1)


def openrlhf(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """get_advantages_and_returns of OpenRLHF: values and rewards times the mask, then plain GAE."""
    r, v = r * mask, v * mask
    last, out = torch.zeros_like(r[:, 0]), []
    for t in reversed(range(r.shape[1])):
        next_value = v[:, t + 1] if t + 1 < r.shape[1] else 0.0
        last = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * last
        out.insert(0, last)
    return torch.stack(out, 1)


@BOTH
@pytest.mark.parametrize("mask_mode, peer", [("carry", verl), ("decay", openrlhf)])
def test_gae_is_what_the_peers_compute(ops, mask_mode, peer, device) -> None:
    r, v, mask = batch(5, 40, device)
    A, returns = ops.gae(r, v, mask, gamma=0.9, lam=0.8, mask_mode=mask_mode)
    expected = peer(r, v, mask, 0.9, 0.8) * mask
    torch.testing.assert_close(A, expected)
    torch.testing.assert_close(returns, (expected + v) * mask)


# No sequence, no step, one step, less than a block, one block exactly, and 2500: three blocks whose
# last is ragged, so that W crosses two borders.
@pytest.mark.parametrize("B, T", [(0, 5), (3, 0), (3, 1), (4, 37), (2, 1024), (3, 2500)])
@MODES
def test_gae_matches_reference(B, T, mask_mode, device, assert_as_exact) -> None:
    r, v, mask = batch(B, T, device) if B else torch.zeros(3, 0, T, device=device).unbind()
    bootstrap = torch.randn(B, device=device)
    options = {"gamma": 0.97, "lam": 0.9, "mask_mode": mask_mode}
    kernel = gae(r, v, mask, bootstrap=bootstrap, **options)
    plain = reference.gae(r, v, mask, bootstrap=bootstrap, **options)
    truth = reference.gae(r.double(), v.double(), mask, bootstrap=bootstrap.double(), **options)
    for outputs in zip(kernel, plain, truth, strict=True):
        assert_as_exact(*outputs)


def test_undiscounted_returns_of_a_long_sequence(device, assert_as_exact) -> None:
    """gamma = lam = 1, as InstructGPT: returns are sums of rewards, whatever the values are."""
    r, v, mask = batch(2, 3000, device)
    A, returns = gae(r, v, mask, lam=1.0)
    plain = reference.gae(r, v, mask, lam=1.0)[1]
    kept = torch.where(mask, r.double(), 0.0)
    truth = torch.where(mask, kept.flip(1).cumsum(1).flip(1), 0.0)
    assert_as_exact(returns, plain, truth)


@BOTH
@MODES
@pytest.mark.parametrize("bounds_type", [torch.int32, torch.int64], ids=str)
def test_packed_is_padded(ops, mask_mode, bounds_type, device) -> None:
    """Also with empty sequences: the last one has no valid token, so it packs to nothing."""
    r, v, mask = batch(4, 1500, device)
    mask[1, 5:] = False  # 5 steps at most
    bootstrap = torch.randn(4, device=device)
    padded = ops.gae(r, v, mask, mask_mode=mask_mode, bootstrap=bootstrap)
    bounds, (flat, *inputs) = packed(mask, r, v)
    outputs = ops.gae(
        *inputs, flat, mask_mode=mask_mode, bootstrap=bootstrap, cu_seqlens=bounds.to(bounds_type)
    )
    for x, y in zip(outputs, packed(mask, *padded)[1][1:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@BOTH
@MODES
def test_gae_reads_nothing_masked(ops, mask_mode, device) -> None:
    r, v, mask = batch(3, 200, device)
    expected = ops.gae(r, v, mask, mask_mode=mask_mode)
    for poison in POISONS:
        got = ops.gae(
            poisoned(r, mask, poison), poisoned(v, mask, poison), mask, mask_mode=mask_mode
        )
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert all((x[~mask] == 0).all() for x in expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_masks_of_any_type_and_strided_inputs(dtype, device) -> None:
    r, v, mask = batch(3, 20, device)
    expected = gae(r, v, mask)
    strided = gae(r.T.contiguous().T, v.T.contiguous().T, mask.to(dtype).T.contiguous().T)
    assert all(torch.equal(x, y) for x, y in zip(strided, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_types_of_results(dtype, device) -> None:
    r, v, mask = batch(3, 20, device)
    r, v = r.to(dtype), v.to(dtype)
    for x, y in zip(
        gae(r, v, mask, gamma=0.5, lam=0.75),
        reference.gae(r.double(), v.double(), mask, gamma=0.5, lam=0.75),
        strict=True,
    ):
        assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-14 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


@BOTH
def test_whiten_by_hand(ops, device) -> None:
    """The vector of lm-human-preferences' test, made by the TensorFlow original."""
    x = torch.arange(12.0, 21.0, device=device).view(3, 3) / 10
    expected = [
        [0.05080712, 0.4381051, 0.8254035],
        [1.2127019, 1.6000004, 1.9872988],
        [2.3745968, 2.7618952, 3.1491938],
    ]
    white = ops.whiten(x, torch.ones_like(x), shift_mean=False)
    torch.testing.assert_close(white.tolist(), expected, rtol=1e-6, atol=1e-6)


# Nothing; one element, whose variance is 0; one block; two programs, the second one ragged.
@pytest.mark.parametrize("n", [0, 1, 1024, 1500])
@pytest.mark.parametrize("shift_mean, unbiased", [(True, False), (False, True)])
def test_whiten_matches_reference(n, shift_mean, unbiased, device, assert_as_exact) -> None:
    x, mask = 100 + torch.randn(n, device=device), torch.rand(n, device=device) > 0.3
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    kernel, plain, truth = (
        f(y, mask, **options)
        for f, y in ((whiten, x), (reference.whiten, x), (reference.whiten, x.double()))
    )
    assert_as_exact(kernel, plain, truth)
    for poison in POISONS:
        assert torch.equal(whiten(poisoned(x, mask, poison), mask, **options), kernel)


def test_whiten_when_each_program_has_several_blocks(device, monkeypatch) -> None:
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 2)
    x, mask = torch.randn(5000, device=device), torch.rand(5000, device=device) > 0.3
    torch.testing.assert_close(whiten(x, mask), reference.whiten(x, mask), atol=2e-6, rtol=1e-6)


@BOTH
def test_all_masked_is_all_zero(ops, device) -> None:
    x, mask = torch.randn(3, 5, device=device), torch.zeros(3, 5, dtype=torch.bool, device=device)
    assert (ops.whiten(x, mask) == 0).all()
    results = ops.ppo_advantages(x[:, 0], x, x, x, mask, kl_coef=1.0, whiten_rewards=True)
    assert all((y == 0).all() for y in results)


WHITENED = pytest.mark.parametrize("whitened", [(False, False), (False, True), (True, True)])


def experience(device: str, B: int = 5, T: int = 300) -> tuple[Tensor, ...]:
    logprobs, values, mask = batch(B, T, device)
    scores = torch.randn(B, device=device)
    return scores, logprobs, logprobs + 0.3 * torch.randn_like(logprobs), values, mask


@BOTH
def test_rewards_by_hand(ops, device) -> None:
    """KL 1 and 2 nats at half a reward each; the score on the last valid token, not one past it."""
    logprobs = torch.tensor([[0.0, 9.0, 0.0, 9.0], [9.0] * 4], device=device)
    ref = torch.tensor([[-1.0, 9.0, -2.0, 5.0], [9.0] * 4], device=device)
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], device=device)
    scores = torch.tensor([10.0, torch.nan], device=device)
    got = ops.ppo_advantages(
        scores, logprobs, ref, torch.zeros_like(ref), mask, kl_coef=0.5, lam=1.0,
        whiten_advantages=False,
    )  # fmt: skip
    assert got.kl.tolist() == [[1.0, 0.0, 2.0, 0.0], [0.0] * 4]
    assert got.rewards.tolist() == [[-0.5, 0.0, 9.0, 0.0], [0.0] * 4]
    assert got.returns.tolist() == got.advantages.tolist() == [[8.5, 0.0, 9.0, 0.0], [0.0] * 4]


@BOTH
def test_a_coefficient_of_0_charges_nothing_for_an_infinite_kl(ops, device) -> None:
    """The reference gives a token no chance at all: kl is inf, and 0 * inf must not be a reward."""
    logprobs = torch.tensor([[-1.0, -1.0, -1.0]], device=device)
    ref = torch.tensor([[-torch.inf, -2.0, torch.nan]], device=device)
    got = ops.ppo_advantages(
        torch.tensor([3.0], device=device), logprobs, ref, torch.zeros_like(ref),
        torch.ones_like(ref), kl_coef=0.0, lam=1.0, whiten_advantages=False,
    )  # fmt: skip
    assert got.kl[0, :2].tolist() == [torch.inf, 1.0] and got.kl[0, 2].isnan()
    assert got.rewards.tolist() == [[0.0, 0.0, 3.0]] and got.returns.tolist() == [[3.0] * 3]


@pytest.mark.parametrize("estimator", check.ESTIMATORS)
@WHITENED
def test_ppo_advantages_matches_reference(estimator, whitened, device, assert_as_exact) -> None:
    inputs = experience(device)
    options = {
        "kl_coef": 0.1, "estimator": estimator, "gamma": 0.99, "mask_mode": "decay",
        "whiten_rewards": whitened[0], "whiten_advantages": whitened[1],
    }  # fmt: skip
    doubled = [x.double() for x in inputs[:-1]]
    kernel = ppo_advantages(*inputs, **options)
    plain = reference.ppo_advantages(*inputs, **options)
    truth = reference.ppo_advantages(*doubled, inputs[-1], **options)
    for outputs in zip(kernel, plain, truth, strict=True):
        assert_as_exact(*outputs)


@WHITENED
def test_ppo_advantages_packed_is_padded(whitened, device) -> None:
    scores, *inputs, mask = experience(device)
    options = {"kl_coef": 0.1, "whiten_rewards": whitened[0], "whiten_advantages": whitened[1]}
    padded = ppo_advantages(scores, *inputs, mask, **options)
    bounds, (flat, *flat_inputs) = packed(mask, *inputs)
    got = ppo_advantages(scores, *flat_inputs, flat, cu_seqlens=bounds, **options)
    for x, y in zip(got, packed(mask, *padded)[1][1:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@WHITENED
def test_ppo_advantages_reads_nothing_masked_and_repeats_itself(whitened, device) -> None:
    scores, *inputs, mask = experience(device)
    options = {"kl_coef": 0.1, "whiten_rewards": whitened[0], "whiten_advantages": whitened[1]}
    expected = ppo_advantages(scores, *inputs, mask, estimator="k3", **options)
    scores[-1] = torch.nan  # of the sequence without a valid token
    for poison in POISONS:
        dirty = [poisoned(x, mask, poison) for x in inputs]
        got = ppo_advantages(scores, *dirty, mask, estimator="k3", **options)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def outcome(f: Callable, device: str) -> list[Tensor]:
    """What f gives while nothing but its inputs can be touched, in a random order of programs."""
    if device != "cpu":
        return list(f())
    with Traffic(order=np.random.default_rng(0).permutation):
        shuffled = f()
    assert all(torch.equal(x, y) for x, y in zip(shuffled, f(), strict=True))
    return list(shuffled)


def as_exact(got: list[Tensor], plain: list[Tensor], truth: list[Tensor], check: Callable) -> None:
    for x, y, exact in zip(got, plain, truth, strict=True):
        check(x, y, exact, floor=1e-13 if x.dtype == torch.float64 else 4e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_gae(data, device, assert_as_exact) -> None:
    """Shapes, masks, types, layouts and options as they come; what is masked is poison."""
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 99)))
    B, T = draw(strategies.integers(0, 4)), draw(strategies.sampled_from([0, 1, 5, 130, 1030]))
    types = strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    masks = strategies.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32])
    layouts = strategies.sampled_from(LAYOUTS)

    def number(lowest: float) -> float | Tensor:
        per_sequence = lowest + (1 - lowest) * torch.rand(B, device=device)
        kinds = [0.0, 1.0, 0.97, per_sequence, per_sequence.double()]
        return draw(strategies.sampled_from(kinds))

    mask = torch.rand(B, T, device=device) < draw(strategies.sampled_from([0.0, 0.5, 0.9, 1.0]))
    r, v = (torch.randn(B, T, device=device).to(draw(types)) for _ in range(2))
    poison = draw(strategies.sampled_from(POISONS))
    r, v = (laid_out(poisoned(x, mask, poison), draw(layouts)) for x in (r, v))
    options = {"gamma": number(0.9), "lam": number(0.0)}
    options["mask_mode"] = draw(strategies.sampled_from(["carry", "decay"]))
    if draw(strategies.booleans()):
        options["bootstrap"] = torch.randn(B, device=device)
    typed = laid_out(mask.to(draw(masks)), draw(layouts))
    got = outcome(lambda: gae(r, v, typed, **options), device)
    doubles = {k: x.double() if isinstance(x, Tensor) else x for k, x in options.items()}
    truth = reference.gae(r.double(), v.double(), mask, **doubles)
    as_exact(got, reference.gae(r, v, mask, **options), truth, assert_as_exact)
    assert all((x[~mask] == 0).all() for x in got)

    bounds, (flat, *inputs) = packed(mask, r, v)
    again = outcome(lambda: gae(*inputs, flat, cu_seqlens=bounds, **options), device)
    for x, y in zip(again, packed(mask, *got)[1][1:], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_ppo_advantages(data, device, assert_as_exact) -> None:
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 99)))
    B, T = draw(strategies.integers(0, 4)), draw(strategies.sampled_from([0, 1, 9, 300]))
    types = strategies.sampled_from([torch.float32, torch.bfloat16, torch.float64])
    layouts = strategies.sampled_from(LAYOUTS)
    mask = torch.rand(B, T, device=device) < draw(strategies.sampled_from([0.0, 0.5, 0.9, 1.0]))
    poison = draw(strategies.sampled_from(POISONS))
    inputs = [
        laid_out(poisoned(torch.randn(B, T, device=device).to(draw(types)), mask, poison), layout)
        for layout in (draw(layouts) for _ in range(3))
    ]
    scores = torch.randn(B, device=device)
    options = {
        "kl_coef": draw(strategies.sampled_from([0.0, 0.1])),
        "estimator": draw(strategies.sampled_from(check.ESTIMATORS)),
        "gamma": draw(strategies.sampled_from([0.99, torch.rand(B, device=device)])),
        "whiten_rewards": draw(strategies.booleans()),
        "whiten_advantages": draw(strategies.booleans()),
        "mask_mode": draw(strategies.sampled_from(["carry", "decay"])),
    }
    got = outcome(lambda: ppo_advantages(scores, *inputs, mask, **options), device)
    plain = reference.ppo_advantages(scores, *inputs, mask, **options)
    bounds, (flat, *flat_inputs) = packed(mask, *inputs)
    again = ppo_advantages(scores, *flat_inputs, flat, cu_seqlens=bounds, **options)
    for x, y in zip(got, plain, strict=True):
        assert x.dtype == y.dtype and (x[~mask] == 0).all()
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)
    for x, y in zip(again, packed(mask, *got)[1][1:], strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


@WHITENED
def test_the_score_is_given_once_to_a_sequence_of_many_blocks(whitened, device) -> None:
    inputs = experience(device, B=3, T=2500)
    inputs[-1][1, 1500:] = False  # the last block has no valid token
    options = {"kl_coef": 0.1, "whiten_rewards": whitened[0], "whiten_advantages": whitened[1]}
    expected = reference.ppo_advantages(*inputs, **options)
    for x, y in zip(ppo_advantages(*inputs, **options), expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


# 13 bytes of inputs and 16 of outputs; whitening reads advantages and mask and writes; whitening
# rewards reads the mask, and writes and reads the rewards, once more each.
@pytest.mark.parametrize("whitened, floor", [((False, False), 29), ((False, True), 38),
                                             ((True, True), 47)])  # fmt: skip
def test_bytes_per_token_and_launches(whitened, floor, device) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    inputs = experience(device, B=2, T=4096)
    mask = inputs[-1]
    with Traffic() as traffic:
        ppo_advantages(
            *inputs, kl_coef=0.1, whiten_rewards=whitened[0], whiten_advantages=whitened[1]
        )
    bytes_per_token = (traffic.bytes_read + traffic.bytes_written) / mask.numel()
    assert floor <= bytes_per_token < floor + 0.2  # partial moments, scores
    assert len(traffic.launches) == 1 + sum(whitened)

    with Traffic() as traffic:
        gae(*inputs[1:3], mask)
    assert traffic.bytes_read + traffic.bytes_written == 17 * mask.numel()
    with Traffic() as traffic:
        gae(*inputs[1:3], mask, gamma=torch.ones(2), lam=torch.ones(2))
    assert traffic.bytes_read + traffic.bytes_written == 17 * mask.numel() + 2 * 8
    assert len(traffic.launches) == 1

    with Traffic() as traffic:
        whiten(inputs[1], mask)
    bytes_per_token = (traffic.bytes_read + traffic.bytes_written) / mask.numel()
    assert 14 <= bytes_per_token < 14.2 and len(traffic.launches) == 2


def calls(scores: Tensor, x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Every op, padded and packed."""
    bounds = torch.tensor([0, 40, 40, x.numel()], device=x.device).int()
    flat = [t.reshape(-1) for t in (x, y, z, mask)]
    return (
        *gae(x, y, mask, gamma=scores.sigmoid(), bootstrap=scores),
        *gae(*flat[:2], flat[3], cu_seqlens=bounds, mask_mode="decay"),
        whiten(x, mask, unbiased=True),
        *ppo_advantages(scores, x, y, z, mask, kl_coef=0.1, whiten_rewards=True),
        *ppo_advantages(scores[:3], *flat, kl_coef=0.1, estimator="k3", cu_seqlens=bounds),
    )


def test_compiles_into_one_graph(device) -> None:
    inputs = experience(device, B=3, T=30)
    traced = compiled(calls)(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(traced, calls(*inputs), strict=True))


def test_the_reference_compiles_into_one_graph(monkeypatch) -> None:
    """Where a CPU's tensors are not interpreted. Packed, the longest length is the bounds' to say:
    there the op is one node, which runs the reference inside."""
    inputs = experience("cpu", B=3, T=30)
    expected = calls(*inputs)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for x, y in zip(compiled(calls)(*inputs), expected, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=2e-5)


def test_compiles_once_for_all_lengths(device) -> None:
    f = compiled(lambda *inputs: ppo_advantages(*inputs, kl_coef=0.1), dynamic=True)
    for T in 30, 17:
        inputs = experience(device, B=3, T=T)
        with torch.compiler.set_stance("default" if T == 30 else "fail_on_recompile"):
            got = f(*inputs)
        expected = ppo_advantages(*inputs, kl_coef=0.1)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_registered_as_pytorch_asks(device) -> None:
    scores, x, y, z, mask = experience(device, B=3, T=7)
    check = torch.library.opcheck
    numbers = (0.9, None, 0.5, scores)
    check(
        advantages._gae.registered, (x, y, mask.T.contiguous().T, None, scores, *numbers, "carry")
    )
    check(advantages._whiten.registered, (x, mask, True, False, 1e-8, None))
    options = (True, True, "decay", None)
    inputs = (scores, x, y, z, mask, None, 0.1, "k1", *numbers, *options)
    check(advantages._ppo_advantages.registered, inputs)


def test_autocast_changes_nothing_and_the_host_does_not_wait(device) -> None:
    inputs = experience(device, B=3, T=30)
    expected = calls(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16), no_host_sync():
        got = calls(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_in_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    scores, *inputs, mask = experience(device)
    bounds = torch.tensor([0, 700, 700, 900, 1500, 1500], device=device)

    def outputs(scores: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        packed = [x.view(-1) for x in (*inputs, mask)]
        return (
            *ppo_advantages(scores, *inputs, mask, kl_coef=0.1, whiten_rewards=True),
            *ppo_advantages(scores, *packed, kl_coef=0.1, cu_seqlens=bounds, gamma=scores),
        )

    for x, y in zip(replayed(outputs, scores, *inputs), outputs(scores, *inputs), strict=True):
        assert torch.equal(x, y)


def parts_of(x: Tensor, cut: int) -> Tensor:
    """This rank's sequences: the first `cut`, or the rest."""
    return x[:cut] if dist.get_rank() == 0 else x[cut:]


# 2 and 3 sequences; everything on rank 0 and nothing on rank 1.
@pytest.mark.parametrize("cut", [2, 5])
@BOTH
def test_two_ranks_whiten_as_one(cut, ops, device) -> None:
    if device != "cpu":
        pytest.skip("ranks are forked, which CUDA does not survive")
    inputs = experience(device, T=40)
    options = {"kl_coef": 0.1, "whiten_rewards": True}
    expected = reference.ppo_advantages(*inputs, **options)
    white = reference.whiten(inputs[1], inputs[-1], unbiased=True)

    def rank() -> list:
        mine = [parts_of(x, cut) for x in inputs]
        group = dist.group.WORLD
        results = ops.ppo_advantages(*mine, group=group, **options)
        own = ops.whiten(mine[1], mine[-1], unbiased=True, group=group)
        return [x.tolist() for x in (*results, own)]

    for parts, whole in zip(zip(*run_world(2, rank), strict=True), (*expected, white), strict=True):
        got = torch.tensor(parts[0] + parts[1])
        torch.testing.assert_close(got, whole, atol=2e-6, rtol=1e-5)


def refused(message: str, f: Callable, *args, **options) -> None:
    with pytest.raises(ValueError, match=message):
        f(*args, **options)


@BOTH
def test_refusals(ops, device) -> None:
    x, mask = torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device)
    refused("mask_mode is 'skip'", ops.gae, x, x, mask, mask_mode="skip")
    refused("gamma is 1.5", ops.gae, x, x, mask, gamma=1.5)
    refused("lam is nan", ops.gae, x, x, mask, lam=torch.nan)
    refused(r"values has shape \(3, 2\)", ops.gae, x, x.T, mask)
    refused(r"without cu_seqlens: \(B, T\)", ops.gae, x[0], x[0], mask[0])
    refused(r"bootstrap has shape \(3,\)", ops.gae, x, x, mask, bootstrap=x[0])
    refused(r"gamma has shape \(3,\)", ops.gae, x, x, mask, gamma=x[0])
    refused(r"lam has shape \(\)", ops.ppo_advantages, x[:, 0], x, x, x, mask, kl_coef=0.1,
            lam=x[0, 0])  # fmt: skip
    refused("lam is -0.1", ops.ppo_advantages, x[:, 0], x, x, x, mask, kl_coef=0.1, lam=-0.1)
    bounds = torch.tensor([0, 2, 1, 3], device=device)
    if device == "cpu":  # on a GPU the content of tensors is trusted
        one = torch.ones(2)
        for wrong in 1.5, -0.5, torch.nan:
            message = f"holds {wrong}; it must lie in"
            refused(f"gamma {message}", ops.gae, x, x, mask, gamma=torch.tensor([1.0, wrong]))
            refused(f"lam {message}", ops.ppo_advantages, one, x, x, x, mask, kl_coef=0.1,
                    lam=torch.tensor([wrong, 1.0]).double())  # fmt: skip
        refused("must rise from 0 to 3", ops.gae, x[0], x[0], mask[0], cu_seqlens=bounds)
    refused("int32 or int64", ops.gae, x[0], x[0], mask[0], cu_seqlens=bounds.float())
    refused(r"scores has shape \(3,\)", ops.ppo_advantages, x[0], x, x, x, mask, kl_coef=0.1)


def test_advantages_are_constants(device) -> None:
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    refused("values requires grad", gae, x.detach(), x, torch.ones_like(x))
    refused("gamma requires grad", gae, *[x.detach()] * 3, gamma=x[:, 0])
    refused("x requires grad", whiten, x, torch.ones_like(x))
    with torch.no_grad():
        assert not whiten(x, torch.ones_like(x)).requires_grad
