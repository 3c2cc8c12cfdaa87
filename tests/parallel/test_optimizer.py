import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer

from tests.forked_world import run_world
from tests.parallel.tiny import (
    ALONE,
    LAYOUTS,
    average_weights,
    memory,
    ragged_batch,
    tiny_engine,
    train_step,
)
from tetrad.parallel import optimizer
from tetrad.parallel.settings import Layout, Schedule
from tetrad.parallel.topology import arrange, initialize

STEEP = Schedule(lr=1e-2, decay="constant", clip_norm=0.0, weight_decay=0.1)


def by_hand(head, steps):
    """Steps of AdamW (Loshchilov and Hutter 2019, algorithm 2), in plain PyTorch: the norms, the
    weights and their average by name, from the gradients that a model has alone."""
    engine = tiny_engine(head, schedule=STEEP)
    names = dict(engine.cores[0].named_parameters())
    weights = {n: p.detach().clone() for n, p in names.items()}
    average = {n: p.clone() for n, p in weights.items()}
    m, v = ({n: torch.zeros_like(p) for n, p in weights.items()} for _ in range(2))
    norms = []
    for t in range(1, steps + 1):
        engine.optimizer.zero_grad()
        with torch.no_grad():
            for n, p in names.items():
                p.copy_(weights[n])
        accumulate(engine)
        norms.append(math.sqrt(sum(float(p.main_grad.square().sum()) for p in names.values())))
        for n, p in names.items():
            g, decay = p.main_grad, STEEP.weight_decay if p.ndim > 1 else 0.0
            m[n] = STEEP.beta1 * m[n] + (1 - STEEP.beta1) * g
            v[n] = STEEP.beta2 * v[n] + (1 - STEEP.beta2) * g * g
            size = (m[n] / (1 - STEEP.beta1**t)) / ((v[n] / (1 - STEEP.beta2**t)).sqrt() + 1e-8)
            weights[n] = weights[n] * (1 - STEEP.lr * decay) - STEEP.lr * size
            average[n] = 0.75 * average[n] + 0.25 * weights[n]
    return norms, weights, average


def accumulate(engine, more=False):
    batch = ragged_batch()
    if engine.head == "language":
        denominator = batch.counted
        return engine.accumulate_cross_entropy(batch, denominator=denominator, more=more)["loss"]

    def loss(scores, part):
        return (scores - part.per_sequence["target"]).square().sum() / 5, {}

    return engine.accumulate_scores(batch, loss)["loss"]


def alone(head):
    engine = tiny_engine(head, schedule=STEEP, ema_decay=0.75)
    norms = [train_step(engine, ragged_batch())["grad_norm"] for _ in range(3)]
    names = dict(engine.cores[0].named_parameters())
    weights = {n: p.detach().clone() for n, p in names.items()}
    with average_weights(engine):
        average = {n: p.detach().clone() for n, p in names.items()}
    assert all(torch.equal(p, weights[n]) for n, p in names.items())
    for ours, truth in zip((weights, average), by_hand(head, 3)[1:]):
        for n, tensor in ours.items():
            torch.testing.assert_close(tensor, truth[n], atol=2e-5, rtol=1e-4)
    return norms, by_hand(head, 3)[0]


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_one_rank_takes_the_steps_of_adamw(head) -> None:
    norms, truth = run_world(1, alone, head)[0]
    assert norms == pytest.approx(truth, rel=1e-4)


def spread(head, layout, second, precision, overlap):
    """Three steps; norms, and answers with the average and with the weights themselves."""
    topology = initialize(ALONE if second else layout)
    engine = tiny_engine(
        head, layout, schedule=STEEP, precision=precision, ema_decay=0.75, overlap=overlap,
        topology=arrange(layout) if second else topology,
    )  # fmt: skip
    norms = [train_step(engine, ragged_batch())["grad_norm"] for _ in range(3)]
    read = engine.logprobs if head == "language" else engine.scores
    own = read(ragged_batch())
    with average_weights(engine):
        average = read(ragged_batch())
    assert torch.equal(read(ragged_batch()), own)
    return torch.tensor(norms), average, own


@pytest.mark.parametrize("head", ["language", "scalar"])  # tied to the embedding, and not
def test_norm_weights_and_average_are_the_same_in_all_layouts(head) -> None:
    expected = run_world(1, spread, head, ALONE, False, "fp32", False)[0]
    for world, layout in LAYOUTS[1:]:
        for ours in run_world(world, spread, head, layout, False, "fp32", True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_an_arranged_layout_is_as_good_as_the_first() -> None:
    layout = Layout(tp=2, pp=2, sequence_parallel=True)
    first = run_world(8, spread, "language", layout, False, "bf16", True)
    second = run_world(8, spread, "language", layout, True, "bf16", True)
    torch.testing.assert_close(second, first, atol=0, rtol=0)


def passes(overlap, layout, precision, budget):
    """Steps of one pass and of two, some with a batch read after them, in small buckets."""
    optimizer.DistributedDataParallelConfig = partial(
        optimizer.DistributedDataParallelConfig, bucket_size=4000
    )
    engine = tiny_engine(
        "language", layout, overlap=overlap, precision=precision, microbatch_tokens=budget,
        schedule=STEEP,
    )  # fmt: skip
    if overlap and engine.topology.pp_rank == 0:
        assert len(engine.optimizer.ddp[0].bucket_groups) > 3
    seen, norms = [], []
    for extra in (0, 0, 1, 1, 0):
        seen += [accumulate(engine, more=True) for _ in range(extra)]
        seen += [accumulate(engine)]
        norms += [engine.step()["grad_norm"]]
        if extra:
            seen += engine.logprobs(ragged_batch()).tolist()
    engine.optimizer.sync()
    weights = [p.detach().clone() for core in engine.cores for p in core.parameters()]
    return norms, torch.tensor(seen), weights


@pytest.mark.parametrize(
    "world, layout, budget",
    [
        (2, Layout(), 25),  # sequences of 6, 18, 10, 24, 14 tokens: 2 micro-batches here, 3 there
        (4, Layout(pp=2), 25),
        (4, Layout(pp=2, vpp=2), 25),
        (4, Layout(tp=2, sequence_parallel=True), 25),
        (8, Layout(), 40),  # three ranks have nothing
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlap_changes_nothing(world, layout, budget, precision) -> None:
    expected = run_world(world, passes, False, layout, precision, budget)
    for ours, truth in zip(run_world(world, passes, True, layout, precision, budget), expected):
        assert ours[0] == pytest.approx(truth[0], rel=1e-6)  # the same squares in another order
        exact = 0.0 if world < 8 else 1e-5  # two ranks' sum has no order, that of eight has
        torch.testing.assert_close(ours[1:], truth[1:], atol=exact, rtol=exact)


def held(precision, ema_decay):
    engine = tiny_engine("language", Layout(), precision=precision, ema_decay=ema_decay)
    flat = memory(engine.optimizer)
    before = {k: [t.data_ptr() for t in ts] for k, ts in flat.items()}
    weights = list(engine.cores[0].parameters())
    states = engine.optimizer.adam.optimizer.state
    train_step(engine, ragged_batch())
    after = memory(engine.optimizer)
    assert before == {k: [t.data_ptr() for t in ts] for k, ts in after.items()}

    def inside(tensor, kind):
        begins = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in flat[kind]]
        return any(a <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= b
                   for a, b in begins)  # fmt: skip

    assert all(inside(w.data, "parameters") and inside(w.main_grad, "gradients") for w in weights)
    for main, state in states.items():
        assert inside(main, "optimizer" if precision == "bf16" else "parameters")
        assert inside(state["exp_avg"], "optimizer") and inside(state["exp_avg_sq"], "optimizer")
    return {k: sum(t.nbytes for t in ts) for k, ts in flat.items()}, sum(
        -(-w.numel() // 64) * 64 for w in weights
    )


@pytest.mark.parametrize("precision, weight, kinds", [("fp32", 4, 2), ("bf16", 2, 3)])
def test_all_memory_is_flat_and_stays_where_it_is(precision, weight, kinds) -> None:
    for ema_decay in (None, 0.9):
        bytes_, padded = run_world(2, held, precision, ema_decay)[0]
        n = -(-padded // 128) * 128  # each weight starts at a multiple of 64, a buffer ends at 128
        more = kinds + (ema_decay is not None)
        assert bytes_ == {"parameters": weight * n, "gradients": 4 * n, "optimizer": 2 * more * n}


def not_a_number():
    engine = tiny_engine("language", Layout(tp=2))
    before = [p.detach().clone() for p in engine.cores[0].parameters()]
    accumulate(engine)
    if dist.get_rank() == 3:
        engine.optimizer.buffers[0].grad_data[100] = math.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        engine.step()
    assert all(torch.equal(p, old) for p, old in zip(engine.cores[0].parameters(), before))


def test_a_gradient_that_is_no_number_stops_all_ranks_before_the_step() -> None:
    run_world(4, not_a_number)


def no_average():
    with pytest.raises(ValueError, match="ema_decay is 1.5; it must be at least 0"):
        tiny_engine("language", ema_decay=1.5)
    assert "ema" not in tiny_engine("language").optimizer.flat


def test_there_is_an_average_only_when_asked_for() -> None:
    run_world(1, no_average)


def begun():
    group, rank = initialize(Layout()).groups.dp_cp, dist.get_rank()
    own = torch.full((1,), float(rank))
    gathered, numbers, total = torch.full((2,), -1.0), torch.tensor([1.0, 2.0]), torch.zeros(1)
    with param_and_grad_buffer._coalescing_manager(group, async_ops=True) as gathering:
        dist.all_gather_into_tensor(gathered, own, group)
    with param_and_grad_buffer._coalescing_manager(group, async_ops=True) as summing:
        dist.reduce_scatter_tensor(total, numbers, group=group)
    early = gathered.tolist(), total.item()
    numbers.zero_()  # what is sent may be overwritten
    for handle in (gathering, summing, summing):
        handle.wait()
    return early, (gathered.tolist(), total.item())


def test_what_gloo_receives_is_seen_after_waiting() -> None:
    for rank, seen in enumerate(run_world(2, begun)):
        assert seen == (([-1.0, -1.0], 0.0), ([0.0, 1.0], 2.0 * (rank + 1)))
