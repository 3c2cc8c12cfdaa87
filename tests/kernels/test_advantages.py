from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.forked_world import run_world
from tests.kernels.traffic import Traffic
from tetrad.kernels import advantages, reference
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
    lengths = (mask * torch.arange(1, T + 1, device=mask.device)).amax(1)
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
    monkeypatch.setattr(advantages, "MAX_PROGRAMS", 2)
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


@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
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


# 13 bytes of inputs and 16 of outputs; whitening reads advantages and mask and writes; whitening
# rewards reads the mask, and writes and reads the rewards, once more each.
@pytest.mark.parametrize("whitened, floor", [((False, False), 29), ((False, True), 38),
                                             ((True, True), 47)])  # fmt: skip
def test_bytes_per_token(whitened, floor, device) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    inputs = experience(device, B=2, T=4096)
    with Traffic() as traffic:
        ppo_advantages(
            *inputs, kl_coef=0.1, whiten_rewards=whitened[0], whiten_advantages=whitened[1]
        )
    bytes_per_token = (traffic.bytes_read + traffic.bytes_written) / inputs[-1].numel()
    assert floor <= bytes_per_token < floor + 0.2  # partial moments, scores

    with Traffic() as traffic:
        gae(*inputs[1:3], inputs[-1])
    assert traffic.bytes_read + traffic.bytes_written == 17 * inputs[-1].numel()


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
    refused(r"values has shape \(3, 2\)", ops.gae, x, x.T, mask)
    refused(r"without cu_seqlens: \(B, T\)", ops.gae, x[0], x[0], mask[0])
    refused(r"bootstrap has shape \(3,\)", ops.gae, x, x, mask, bootstrap=x[0])
    bounds = torch.tensor([0, 2, 1, 3], device=device)
    if device == "cpu":  # on a GPU the content of the bounds is trusted
        refused("must rise from 0 to 3", ops.gae, x[0], x[0], mask[0], cu_seqlens=bounds)
    refused("int32 or int64", ops.gae, x[0], x[0], mask[0], cu_seqlens=bounds.float())
    refused(r"scores has shape \(3,\)", ops.ppo_advantages, x[0], x, x, x, mask, kl_coef=0.1)


def test_advantages_are_constants(device) -> None:
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    refused("values requires grad", gae, x.detach(), x, torch.ones_like(x))
    refused("x requires grad", whiten, x, torch.ones_like(x))
    with torch.no_grad():
        assert not whiten(x, torch.ones_like(x)).requires_grad
