"""Four models in planned memory: the same numbers as apart, at addresses that never change."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.forked_world import run_world
from tests.parallel.tiny import SHAPE, memory, ragged_batch
from tetrad.parallel import checkpoint
from tetrad.parallel.colocate import colocate, held
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import build
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.plan import Role, Run, Work
from tetrad.parallel.settings import Architecture, Layout, Schedule
from tetrad.parallel.topology import arrange, initialize

SMALL, LARGE = SHAPE, SHAPE | {"hidden_size": 48, "family": "gpt2"}
HEADS = {"policy": "language", "reference": "language", "reward": "scalar", "critic": "scalar"}
SHAPES = {"policy": SMALL, "reference": SMALL, "reward": LARGE, "critic": LARGE}
TRAINED = ("policy", "critic")
WORK = Work(4, 2, 1, 8, 8, 64, 4)


def engines(layout, beside, precision, colocation, overlap=False):
    """The four roles: apart, "resident" or with "swap"; and their memory."""
    topologies = {"language": initialize(layout)}
    topologies["scalar"] = arrange(beside) if beside != layout else topologies["language"]
    roles, memories = {}, {}
    if colocation:
        plan = {
            name: Role(
                Architecture(**SHAPES[name]), head, topologies[head].layout, precision,
                trained=name in TRAINED, ema=name == "policy", overlap=overlap,
            )
            for name, head in HEADS.items()
        }  # fmt: skip
        rank = torch.distributed.get_rank()
        run = Run(plan, WORK, torch.distributed.get_world_size())
        memories = colocate(run.needs(rank), colocation == "swap")
        assert held(memories) == run.always(rank, colocation == "swap")
    for name, head in HEADS.items():
        memory, topology = memories.get(name), topologies[head]
        if memory and name == "reference":
            roles[name] = roles["policy"].twin(memory)
            continue
        seed = {"reward": 2}.get(name, 1)
        chunks = build(Architecture(**SHAPES[name]), head, topology, precision=precision, seed=seed)
        optimizer = None
        if name in TRAINED:
            schedule, ema = Schedule(lr=1e-2), 0.9 if name == "policy" else None
            optimizer = Optimizer(
                chunks, topology, schedule, 10, precision,
                overlap=overlap, ema_decay=ema, memory=memory,
            )  # fmt: skip
        roles[name] = Engine(
            chunks, topology, microbatch_tokens=40, optimizer=optimizer, memory=memory
        )
    for memory in memories.values():
        for tenant in (memory.weights, memory.gradients, memory.optimizer):
            assert tenant.used == tenant.size  # the plan was exact
    return roles, memories


def iterate(roles) -> list[float]:
    """As an iteration of PPO uses the roles: all read, then two steps of policy and critic."""
    batch = ragged_batch()
    seen = [roles["policy"].logprobs(batch), roles["reference"].logprobs(batch)]
    seen += [roles["reward"].scores(batch), roles["critic"].values(batch)]
    numbers = [float(x.double().square().sum()) for x in seen]
    for _ in range(2):
        stats = roles["policy"].accumulate_cross_entropy(batch, denominator=batch.counted)
        numbers += [stats["loss"], roles["policy"].step()["grad_norm"]]
        stats = roles["critic"].accumulate_values(
            batch, lambda values, part: ((values - 1).square()[part.response_mask].sum() / 9, {})
        )
        numbers += [stats["loss"], roles["critic"].step()["grad_norm"]]
    return numbers


def train(layout, beside, precision, colocation, overlap, folder):
    """Two iterations, a checkpoint, and a third after loading it; what the average then reads."""
    roles, memories = engines(layout, beside, precision, colocation, overlap)
    numbers = iterate(roles) + iterate(roles)
    trained = {name: roles[name] for name in TRAINED}
    checkpoint.save(folder, 1, trained, {})
    numbers += iterate(roles)
    for name, engine in trained.items():
        checkpoint.load(engine, folder / "step_000001" / name)
    numbers += iterate(roles)
    roles["policy"].bring(with_optimizer=True)
    numbers += [float(x.double().sum()) for _, x in roles["policy"].optimizer.whole("ema")]
    return numbers, held(memories) if memories else 0


@pytest.mark.parametrize(
    "world, layout, beside, precision, overlap",
    [
        (1, Layout(), Layout(), "fp32", False),
        (1, Layout(), Layout(), "bf16", False),
        (4, Layout(tp=2), Layout(pp=2), "bf16", False),
        (2, Layout(), Layout(tp=2, sequence_parallel=True), "fp32", True),
        (4, Layout(pp=2, vpp=2), Layout(cp=2), "fp32", False),
    ],
)
def test_co_located_roles_say_what_they_say_apart(
    world, layout, beside, precision, overlap, tmp_path
) -> None:
    arguments = layout, beside, precision
    apart = run_world(world, train, *arguments, None, overlap, tmp_path / "apart")
    used = []
    for colocation in ("resident", "swap"):
        together = run_world(world, train, *arguments, colocation, overlap, tmp_path / colocation)
        for (ours, _), (numbers, _) in zip(together, apart):
            assert ours == numbers
        used.append(together[0][1])
    assert used[1] < 0.8 * used[0]


class Counted(TorchDispatchMode):
    """Counts tensors that get memory of their own, by what made them."""

    def __init__(self, floor: int) -> None:
        super().__init__()
        self.floor, self.made = floor, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        owned = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.numel() >= self.floor:
            if out.untyped_storage().data_ptr() not in owned:
                self.made.append(str(function))
        return out


def addresses(roles) -> list[int]:
    """Of all weights and of what the optimizers keep."""
    found = []
    for engine in roles.values():
        engine.bring(with_optimizer=engine.optimizer is not None)
        found += [p.data_ptr() for core in engine.cores for p in core.parameters()]
        if engine.optimizer:
            found += [x.data_ptr() for held in memory(engine.optimizer).values() for x in held]
    return found


def moved(colocation):
    roles, _ = engines(Layout(), Layout(), "bf16", colocation)
    iterate(roles)
    before = addresses(roles)
    iterate(roles)
    with Counted(floor=1) as counted:
        for name in ("policy", "reference", "reward", "critic", "policy"):
            roles[name].bring(with_optimizer=name in TRAINED, reading=True)
    return before == addresses(roles), counted.made


@pytest.mark.parametrize("colocation", ["resident", "swap"])
def test_no_role_moves_and_coming_and_going_allocates_nothing(colocation) -> None:
    stayed, made = run_world(1, moved, colocation)[0]
    assert stayed and made == []


def greedy():
    """More than was planned; and a second gradient in the memory of one that was not used."""
    roles, memories = engines(Layout(), Layout(), "fp32", "resident")
    with pytest.raises(AssertionError, match="bytes asked for, .* were planned"):
        memories["policy"].weights.allocate(1, torch.float32)
    batch = ragged_batch()
    roles["policy"].accumulate_cross_entropy(batch, denominator=1)
    with pytest.raises(AssertionError, match="a gradient that no step has used"):
        roles["critic"].accumulate_values(batch, lambda values, part: (values.sum(), {}))


def test_memory_is_not_taken_from_others() -> None:
    run_world(1, greedy)
