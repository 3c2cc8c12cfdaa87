import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.kernels.callers import LAYOUTS, compiled, laid_out, launches, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tetrad.kernels import launch, ppo_loss, reference
from tetrad.kernels.ppo_loss import policy_loss, value_loss

BOTH = pytest.mark.parametrize("ops", [ppo_loss, reference], ids=["kernel", "reference"])
LOSSES = pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
AGGREGATIONS = pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])


def run(loss_of: Callable, x: Tensor, *inputs: Tensor, **options) -> dict[str, Tensor]:
    """The loss, its statistics, and the gradient of three times the loss."""
    x = x.detach().requires_grad_()
    loss, stats = loss_of(x, *inputs, **options)
    (3 * loss).backward()
    assert not any(y.requires_grad for y in stats.values())
    return {"loss": loss.detach(), "gradient": x.grad, **stats}


def batch(B: int, T: int, device: str) -> list[Tensor]:
    """Log-probs or values, old ones within and beyond the clip range, advantages or returns, mask:
    the first sequence whole, the last one all masked."""
    x, noise, targets = torch.randn(3, B, T, device=device).unbind()
    mask = torch.rand(B, T, device=device) > 0.3
    mask[:1], mask[1:][-1:] = True, False
    return [x, x + 0.3 * noise, targets, mask]


@BOTH
def test_policy_loss_by_hand(ops, device) -> None:
    """clip 0.2. Ratios 1 (a tie of both branches), 1.5 and 0.5 with either sign of advantage."""
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 99.0], device=device)
    A = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 99.0], device=device)
    mask = torch.tensor([1, 1, 1, 1, 1, 0], device=device)
    got = run(ops.policy_loss, ratio.log(), torch.zeros_like(A), A, mask)
    losses = [-2.0, -1.2, 1.5, -0.5, 0.8]
    assert got["loss"].item() == pytest.approx(sum(losses) / 5)
    slopes = [-2.0, 0.0, 1.5, -0.5, 0.0, 0.0]  # -A ratio where the plain branch is the larger one
    assert got["gradient"].tolist() == pytest.approx([3 * x / 5 for x in slopes])
    assert got["clip_fraction"].item() == pytest.approx(2 / 5)
    assert got["ratio_mean"].item() == pytest.approx(1.0)
    assert got["ratio_max"].item() == pytest.approx(1.5)
    k3 = [0.0] + 2 * [0.5 - math.log(1.5)] + 2 * [-0.5 - math.log(0.5)]
    assert got["approx_kl"].item() == pytest.approx(sum(k3) / 5, rel=1e-5)

    A = torch.tensor([-1.0, 1.0], device=device)  # a ratio of 4 is bounded where A < 0 alone
    x, mask = torch.full_like(A, 4.0).log(), torch.ones_like(A)
    got = run(ops.policy_loss, x, torch.zeros_like(A), A, mask, dual_clip=3.0)
    assert got["loss"].item() == pytest.approx((3.0 - 1.2) / 2)
    assert got["gradient"].tolist() == [0.0, 0.0]


@BOTH
def test_value_loss_by_hand(ops, device) -> None:
    """Old value 0, clip 0.2: V = 1 moved too far towards R = 2, too far away from R = -1; 0.1."""
    V, R = torch.tensor([[1.0, 1.0, 0.1]]).to(device), torch.tensor([[2.0, -1.0, 1.1]]).to(device)
    mask = torch.ones_like(V)
    got = run(ops.value_loss, V, torch.zeros_like(V), R, mask)
    assert got["loss"].item() == pytest.approx(0.5 * (1.8**2 + 2.0**2 + 1.0) / 3)
    assert got["gradient"].tolist()[0] == pytest.approx([0.0, 2.0, -1.0])
    assert got["clip_fraction"].item() == pytest.approx(1 / 3)
    assert got["value_mean"].item() == pytest.approx(0.7)
    assert got["return_mean"].item() == pytest.approx(0.7)
    assert got["error"].item() == pytest.approx(2.0)


@BOTH
def test_means_by_hand(ops, device) -> None:
    """Losses (1, 2, 3) and (4): the mean of tokens is 2.5, of sequence means 3."""
    A = -torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]], device=device)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], device=device)
    x = torch.zeros_like(A)
    for aggregation, mean, n in ("token-mean", 2.5, 4), ("sequence-mean", 3.0, 2):
        options = {"aggregation": aggregation}
        assert ops.policy_loss(x, x, A, mask, **options)[0].item() == pytest.approx(mean)
        for half in 2 * n, torch.tensor(2.0 * n, device=device), torch.tensor(2 * n):
            loss, _ = ops.policy_loss(x, x, A, mask, denominator=half, **options)
            assert loss.item() == pytest.approx(mean / 2)


# Nothing, one token, less than a block, and 1300: three blocks a sequence, the last one ragged.
@pytest.mark.parametrize("B, T", [(0, 3), (2, 0), (2, 1), (4, 37), (3, 1300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@AGGREGATIONS
@LOSSES
def test_matches_reference(name, aggregation, dtype, B, T, device, assert_as_exact) -> None:
    *inputs, mask = batch(B, T, device)
    inputs = [x.to(dtype) for x in inputs]
    options = {"aggregation": aggregation}
    if name == "policy_loss":
        options["dual_clip"] = 1.5
    kernel = run(getattr(ppo_loss, name), *inputs, mask, **options)
    plain = run(getattr(reference, name), *inputs, mask, **options)
    doubles = [x.double() for x in inputs]
    truth = run(getattr(reference, name), *doubles, mask, **options)
    assert kernel["gradient"].dtype == dtype
    for key in truth:
        assert_as_exact(kernel[key], plain[key], truth[key])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=strategies.data())
@LOSSES
def test_any_call(data, name, device, assert_as_exact) -> None:
    """Shapes, masks, types, layouts and options as they come; what is masked is poison, programs
    run in any order, nothing but the inputs is touched, and the two halves add up."""
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 99)))
    B, T = draw(strategies.integers(0, 4)), draw(strategies.sampled_from([0, 1, 9, 600]))
    types = strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    layouts = strategies.sampled_from(LAYOUTS)
    mask = torch.rand(B, T, device=device) < draw(strategies.sampled_from([0.0, 0.5, 0.9, 1.0]))
    clean = [x.to(draw(types)) for x in batch(B, T, device)[:3]]
    poison = draw(strategies.sampled_from([torch.nan, torch.inf, -torch.inf]))
    inputs = [laid_out(torch.where(mask, x, poison), draw(layouts)) for x in clean]
    typed = laid_out(mask.to(draw(strategies.sampled_from([torch.bool, torch.int64]))), "sliced")
    n = draw(strategies.sampled_from([None, 7, 0.5, torch.tensor(3, device=device)]))
    options = {
        "aggregation": draw(strategies.sampled_from(["token-mean", "sequence-mean"])),
        "clip_range": draw(strategies.sampled_from([0.1, 0.3])),
        "denominator": n,
    }
    if name == "policy_loss":
        options["dual_clip"] = draw(strategies.sampled_from([None, 1.5]))
    kernel, plain_of = getattr(ppo_loss, name), getattr(reference, name)
    got = run(kernel, *inputs, typed, **options)
    plain = run(plain_of, *clean, mask, **options)
    truth = run(plain_of, *(x.double() for x in clean), mask, **options)
    fp64 = got["loss"].dtype == torch.float64
    for key in truth:
        floor = 4e-6 * max(1.0, truth[key].abs().max().item() if truth[key].numel() else 0)
        if fp64 and key != "gradient":
            floor = 1e-13
        assert_as_exact(got[key], plain[key], truth[key], floor=floor)
    if device == "cpu":
        with Traffic(order=np.random.default_rng(0).permutation) as traffic:
            shuffled = run(kernel, *inputs, typed, **options)
        assert all(torch.equal(shuffled[key], got[key]) for key in got)
        assert traffic.launches == [f"_{name.removesuffix('_loss')}", "_scale"][: 1 + (B * T > 0)]

    if n is not None:
        halves = [
            run(kernel, *(x[rows] for x in (*inputs, typed)), **options)
            for rows in (slice(0, B // 2), slice(B // 2, B))
        ]
        for key in set(got) - {"gradient", "ratio_max"}:
            total = halves[0][key] + halves[1][key]
            torch.testing.assert_close(total, got[key], atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.cat([half["gradient"] for half in halves]), got["gradient"])


@BOTH
@LOSSES
def test_gradients_in_fp64(ops, name, device) -> None:
    *inputs, mask = batch(2, 5, device)
    x, *constants = [y.double() for y in inputs]
    for aggregation in "token-mean", "sequence-mean":
        assert torch.autograd.gradcheck(
            lambda x, a=aggregation: getattr(ops, name)(x, *constants, mask, aggregation=a)[0],
            x.requires_grad_(),
        )


@pytest.mark.parametrize("order", [lambda n: range(n)[::-1], np.random.default_rng(0).permutation],
                         ids=["reverse", "random"])  # fmt: skip
@LOSSES
def test_the_order_of_programs_does_not_show(name, order, device) -> None:
    """Nine programs; whichever is the last adds up the same numbers in the same order."""
    if device != "cpu":
        pytest.skip("the order is the interpreter's")
    inputs = batch(3, 1500, device)
    expected = run(getattr(ppo_loss, name), *inputs)
    with Traffic(order=order):
        got = run(getattr(ppo_loss, name), *inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@BOTH
def test_ratios_beyond_e20_are_held(ops, device) -> None:
    """30 nats from the old policy: no overflow, and no gradient to follow."""
    x = torch.tensor([30.0, -30.0, 20.0], device=device)
    A = torch.tensor([-1.0, 1.0, -1.0], device=device)
    got = run(ops.policy_loss, x, torch.zeros_like(x), A, torch.ones_like(x))
    assert got["ratio_max"].item() == pytest.approx(math.exp(20))
    assert got["gradient"].tolist() == pytest.approx([0.0, 0.0, math.exp(20)])


@pytest.mark.parametrize("bounds_type", [torch.int32, torch.int64], ids=str)
@BOTH
@LOSSES
def test_packed_is_padded(ops, name, bounds_type, device) -> None:
    """The last sequence packs to nothing."""
    *inputs, mask = batch(4, 700, device)
    mask[1, 1:] = False
    padded = run(getattr(ops, name), *inputs, mask, aggregation="sequence-mean")
    bounds = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(bounds_type)
    flat = [x[mask] for x in (*inputs, mask)]
    got = run(getattr(ops, name), *flat, aggregation="sequence-mean", cu_seqlens=bounds)
    padded["gradient"] = padded["gradient"][mask]
    for key in padded:
        torch.testing.assert_close(got[key], padded[key], atol=2e-6, rtol=1e-5)


@AGGREGATIONS
@LOSSES
def test_nothing_masked_is_read_and_runs_repeat(name, aggregation, device) -> None:
    *inputs, mask = batch(3, 600, device)
    loss_of = getattr(ppo_loss, name)
    expected = run(loss_of, *inputs, mask, aggregation=aggregation)
    assert (expected["gradient"][~mask] == 0).all()
    for poison in torch.nan, torch.inf, -torch.inf:
        dirty = [torch.where(mask, x, poison) for x in inputs]
        got = run(loss_of, *dirty, mask, aggregation=aggregation)
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@BOTH
@LOSSES
def test_a_valid_nan_shows(ops, name, device) -> None:
    """Also where a clip, a clamp or a maximum would swallow it: in the old values, in the ratio."""
    for i in range(3):
        *inputs, mask = batch(2, 5, device)
        inputs[i][0, 2] = torch.nan
        got = run(getattr(ops, name), *inputs, mask)
        assert got["loss"].isnan() and got["gradient"][0, 2].isnan()
        assert got["gradient"].isnan().sum() == 1
        if name == "policy_loss":
            assert got["ratio_max"].isnan() == (i < 2)


@BOTH
def test_log_probs_of_minus_infinity_are_held_like_any_other(ops, device) -> None:
    """20 nats from the old policy: approx_kl is e^d - 1 - d of that, no gradient."""
    x = torch.tensor([-math.inf, -1.0, 0.0], device=device)
    old = torch.tensor([-1.0, -math.inf, 1e10], device=device)
    for i, d in (0, -20), (1, 20), (2, -20):
        A, mask = -torch.ones(1, device=device), torch.ones(1, device=device)
        got = run(ops.policy_loss, x[i : i + 1], old[i : i + 1], A, mask)
        assert got["approx_kl"].item() == pytest.approx(math.expm1(d) - d)
        assert got["loss"].item() == pytest.approx(max(math.exp(d), 0.8)) and got["gradient"] == 0


@AGGREGATIONS
@LOSSES
def test_parts_add_up_to_the_whole(name, aggregation, device) -> None:
    """As micro-batches of 1, 2 and 2 sequences, the last of which has no valid token."""
    inputs = batch(5, 40, device)
    loss_of, mask = getattr(ppo_loss, name), inputs[-1]
    whole = run(loss_of, *inputs, aggregation=aggregation)
    n = mask.sum() if aggregation == "token-mean" else mask.any(1).sum()
    parts = [
        run(loss_of, *(x[rows] for x in inputs), aggregation=aggregation, denominator=n)
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    for key in whole:
        values = [part[key] for part in parts]
        if key == "gradient":
            total = torch.cat(values)
        else:
            total = torch.stack(values)
            total = total.max() if key == "ratio_max" else total.sum()
        torch.testing.assert_close(total, whole[key], atol=2e-6, rtol=1e-5)


@LOSSES
def test_when_a_program_has_several_rows(name, device, monkeypatch) -> None:
    inputs = batch(9, 700, device)
    expected = run(getattr(ppo_loss, name), *inputs)
    monkeypatch.setattr("tetrad.kernels.launch.MAX_PROGRAMS", 3)
    got = run(getattr(ppo_loss, name), *inputs)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=2e-6, rtol=1e-5)


@LOSSES
@pytest.mark.parametrize("aggregation, least", [("token-mean", 17), ("sequence-mean", 18)])
def test_bytes_per_token_in_one_launch(name, aggregation, least, device) -> None:
    if device != "cpu":
        pytest.skip("bytes are counted in the interpreter")
    *inputs, mask = batch(4, 1024, device)
    x = inputs[0].requires_grad_()
    loss_of = getattr(ppo_loss, name)
    with Traffic() as traffic:
        loss_of(x, *inputs[1:], mask, aggregation=aggregation)
    per_token = (traffic.bytes_read + traffic.bytes_written) / mask.numel()
    assert least <= per_token < least + 0.2 and len(traffic.launches) == 1
    with Traffic() as traffic, torch.no_grad():
        loss_of(x, *inputs[1:], mask, aggregation=aggregation)
    per_token = (traffic.bytes_read + traffic.bytes_written) / mask.numel()
    assert least - 4 <= per_token < least - 4 + 0.2  # without the gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@LOSSES
def test_two_launches_forward_and_backward_together(name, dtype, device) -> None:
    """No fill of the counter, which the last program resets, and no product by PyTorch."""
    if device != "cpu":
        pytest.skip("launches are counted in the interpreter")
    x, *inputs = (y.to(dtype) for y in batch(3, 600, device)[:3])
    mask, upstream = torch.ones(3, 600), torch.tensor(3.0, dtype=launch.real_dtype(x))
    x.requires_grad_()
    loss_of = getattr(ppo_loss, name)
    loss_of(x, *inputs, mask)  # the first call on a stream makes its counter
    with launches() as seen:
        loss, _ = loss_of(x, *inputs, mask)
        torch.autograd.grad(loss, x, upstream)
    assert seen == [f"_{name.removesuffix('_loss')}", "_scale"]


def test_a_call_by_the_dispatcher_fills_a_counter_of_its_own(device) -> None:
    """A graph's memory may hold something else between two replays."""
    if device != "cpu":
        pytest.skip("launches are counted in the interpreter")
    inputs = batch(3, 60, device)
    f = compiled(lambda *inputs: policy_loss(*inputs)[0])
    expected = f(*inputs)
    with launches() as seen:
        got = f(*inputs)
    assert torch.equal(got, expected)
    assert seen[0] == "_policy" and "zeros" in seen
    with launches() as seen:
        got, _ = policy_loss(*inputs)
    assert torch.equal(got, expected)
    assert seen == ["_policy"]


@LOSSES
def test_an_interrupted_launch_leaves_nothing_behind(name, device) -> None:
    if device != "cpu":
        pytest.skip("a launch is interrupted in the interpreter")
    inputs = batch(3, 1500, device)
    loss_of = getattr(ppo_loss, name)
    expected = run(loss_of, *inputs)

    class Interrupted(list):
        def __getitem__(self, place):
            if place == 4:  # of nine programs
                raise KeyboardInterrupt
            return super().__getitem__(place)

    with pytest.raises(KeyboardInterrupt), Traffic(order=lambda n: Interrupted(range(n))):
        loss_of(*inputs)
    got = run(loss_of, *inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_counter_is_used_by_one_launch_at_a_time(device) -> None:
    device = torch.empty(0, device=device).device
    with launch.ticket(device) as first, launch.ticket(device) as second:
        assert first is not second and first == 0 and second == 0
    with launch.ticket(device) as again:
        assert again is first


def calls(x: Tensor, old: Tensor, target: Tensor, mask: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """Both losses, padded and packed, with the gradient of their sum."""
    bounds = torch.tensor([0, 40, 40, x.numel()], device=x.device).int()
    flat = [y.reshape(-1) for y in (2 * x, old, target, mask)]
    per_sequence = {"aggregation": "sequence-mean", "cu_seqlens": bounds}
    results = (
        policy_loss(x, old, target, mask, dual_clip=2.0, denominator=n),
        policy_loss(*flat, **per_sequence),
        value_loss(x, old, target, mask, denominator=70),
        value_loss(*flat, denominator=2.5, **per_sequence),
    )
    total = sum((i + 1) * loss for i, (loss, _) in enumerate(results))
    return total, *(y for _, stats in results for y in stats.values())


def with_gradient(f: Callable, x: Tensor, *inputs: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    total, *stats = f(x, *inputs)
    assert not any(y.requires_grad for y in stats)
    return [total.detach(), *stats, *torch.autograd.grad(total, x)]


def test_compiles_into_one_graph(device) -> None:
    inputs = [*batch(3, 30, device), torch.tensor(50.0, device=device)]
    expected = with_gradient(calls, *inputs)
    for x, y in zip(with_gradient(compiled(calls), *inputs), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)  # the sum of gradients is ordered


@LOSSES
def test_compiled_gradients_are_the_same_bits(name, device) -> None:
    inputs = batch(3, 30, device)
    loss_of = getattr(ppo_loss, name)
    expected = run(loss_of, *inputs)
    got = run(compiled(loss_of, dynamic=True), *inputs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@LOSSES
def test_registered_as_pytorch_asks(name, device) -> None:
    x, old, target, mask = batch(3, 7, device)
    clip = (0.2, 2.0) if name == "policy_loss" else (0.2,)
    for n, wanted, aggregation in (None, True, "token-mean"), (mask.sum(), False, "sequence-mean"):
        torch.library.opcheck(
            getattr(ppo_loss, f"{name}_and_gradient").registered,
            (x.requires_grad_(wanted), old, target, wanted, mask.mT.contiguous().mT, None, 0.0, n,
             aggregation, *clip),
        )  # fmt: skip


def test_autocast_changes_nothing_and_the_host_does_not_wait(device) -> None:
    inputs = [*batch(3, 30, device), torch.tensor(50.0, device=device)]
    expected = with_gradient(calls, *inputs)
    with torch.autocast(device, dtype=torch.bfloat16), no_host_sync():
        got = with_gradient(calls, *inputs)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_in_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    x, old, target, mask = batch(8, 500, device)

    def outputs(x: Tensor, old: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, stats = policy_loss(x, old, target, mask)
        error, _ = value_loss(x, old, target, mask, aggregation="sequence-mean", denominator=8)
        return loss, error, *stats.values(), *torch.autograd.grad(loss + error, x)

    x.requires_grad_()
    for got, y in zip(replayed(outputs, x, old, target), outputs(x, old, target), strict=True):
        assert torch.equal(got, y)


@LOSSES
def test_counters_of_streams_and_graphs_are_their_own(name, device) -> None:
    """Replayed and called on two streams at once: a counter that two shared would lose its last
    program, and with it the loss."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    x, old, target, mask = batch(64, 4096, device)

    def loss_of(x: Tensor, old: Tensor, target: Tensor) -> tuple[Tensor]:
        return (getattr(ppo_loss, name)(x, old, target, mask)[0],)

    (expected,) = loss_of(x, old, target)
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.graph(graph):
        (replay,) = loss_of(x, old, target)
    torch.cuda.synchronize()
    eager = []
    for _ in range(200):
        replay.fill_(torch.nan)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                eager += loss_of(x, old, target)
        graph.replay()
        eager += [*loss_of(x, old, target), replay.clone()]
    torch.cuda.synchronize()
    assert (torch.stack(eager) == expected).all()


def test_statistics_may_change_in_place_before_backward(device) -> None:
    *inputs, mask = batch(2, 5, device)
    expected = run(policy_loss, *inputs, mask)["gradient"]
    x = inputs[0].clone().requires_grad_()
    loss, stats = policy_loss(x, *inputs[1:], mask)
    for y in stats.values():
        y.mul_(2)  # as an all-reduce over ranks would
    loss *= 3
    loss.backward()
    assert torch.equal(x.grad, expected)


@BOTH
def test_refusals(ops, device) -> None:
    x = torch.zeros(2, 3, device=device)

    def refused(message: str, loss_of: Callable, *inputs, **options) -> None:
        with pytest.raises(ValueError, match=message):
            loss_of(*inputs, **options)

    refused("clip_range is 0", ops.policy_loss, x, x, x, x, clip_range=0)
    refused("dual_clip is 1", ops.policy_loss, x, x, x, x, dual_clip=1)
    refused("aggregation is 'mean'", ops.value_loss, x, x, x, x, aggregation="mean")
    refused("denominator is 0", ops.value_loss, x, x, x, x, denominator=0)
    for n in 0.0, -1.0, torch.nan:  # read on the CPU alone
        message = f"denominator holds {n}; it must be positive"
        refused(message, ops.value_loss, x, x, x, x, denominator=torch.tensor(n))
    refused(r"returns has shape \(3,\)", ops.value_loss, x, x, x[0], x)
    flat = x[0]
    refused("without cu_seqlens", ops.policy_loss, flat, flat, flat, flat,
            aggregation="sequence-mean")  # fmt: skip


@LOSSES
def test_constants_must_not_ask_for_gradients(name, device) -> None:
    x = torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="requires grad"):
        {"policy_loss": policy_loss, "value_loss": value_loss}[name](
            x, x, x.clone().requires_grad_(), x
        )
