"""What the plan says of bytes, against what a model, its optimizer and autograd really hold."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import accumulate, product

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests.forked_world import run_world
from tests.parallel.tiny import SHAPE, memory
from tetrad.parallel.packed import pack
from tetrad.parallel.plan import (
    CHUNK_BYTES,
    LOSS_ROWS,
    Role,
    Run,
    Work,
    buffer_size,
    elements,
    in_flight,
    layer_of,
    state,
)
from tetrad.parallel.settings import FAMILIES, PRESETS, Architecture, Layout, Schedule

LAYOUTS = [  # world, layout
    (1, Layout()),
    (3, Layout()),  # 3 divides no bucket
    (4, Layout(tp=2, pp=2)),
    (4, Layout(pp=2, vpp=2)),
    (4, Layout(tp=2, cp=2, sequence_parallel=True)),
    (8, Layout(tp=2, pp=2, vpp=2)),
]
# grouped queries, and heads wider than hidden / heads, where the family has them
MORE = {"llama": {"num_kv_heads": 2}, "qwen3": {"num_kv_heads": 2, "head_dim": 16}}


def architecture(family: str, **more) -> Architecture:
    return Architecture(**(SHAPE | {"family": family} | MORE.get(family, {}) | more))


@pytest.mark.parametrize(
    "preset, published",
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        # 12 L d^2 + 13 L d + (V + positions + 2) d; the vocabulary is padded to 50304
        ("gpt3-175b", 96 * (12 * 12288**2 + 13 * 12288) + (50304 + 2048 + 2) * 12288),
    ],
)
def test_known_models_have_their_known_number_of_weights(preset, published) -> None:
    assert elements(Role(Architecture(**PRESETS[preset]), "language", Layout()), 0) == published


def test_buffer_by_hand() -> None:
    sizes = ((100, True), (10, False), (200, False), (70, False))
    # 70 | 128 … 328 | 384 … 394 -> 512 | 512 … 612 -> 640
    assert buffer_size(sizes, 1, None) == 640
    # lcm(3, 128) = 384: the first bucket takes 70 … 394 -> 768, the tied 100 -> 1152
    assert buffer_size(sizes, 3, None) == 1152
    # closed at 70 and at 200 elements: 128, 128 … 328 -> 384, 384 … 394 -> 512, 612 -> 640
    assert buffer_size(sizes, 1, 64) == 640
    assert buffer_size(((65, False), (63, False)), 2, 50) == 128 + 128


def measured_states(layout):
    """(case, bytes measured, bytes planned) of this rank for all kinds of models."""
    from tetrad.parallel.colocate import Weights, colocate
    from tetrad.parallel.model import build
    from tetrad.parallel.optimizer import Optimizer
    from tetrad.parallel.topology import initialize

    topology, rank, world = initialize(layout), dist.get_rank(), dist.get_world_size()
    room = {"role": {"parameters": 2**21, "gradients": 0, "optimizer": 0}}
    found = []
    for family, tied, head, precision in product(
        FAMILIES, (True, False), ("language", "scalar"), ("fp32", "bf16")
    ):
        a = architecture(family, tie_embeddings=tied)
        role = Role(a, head, layout, precision)
        chunks = build(a, head, topology, precision=precision)
        tenant = colocate(room, swap=False)["role"].weights
        Weights(chunks, tenant)
        found.append((role, {"parameters": tenant.used}, state(role, world, rank)))
        overlap = head == "scalar"
        optimizer = Optimizer(
            chunks, topology, Schedule(), 10, precision, overlap=overlap, ema_decay=0.9
        )
        held = {k: sum(x.nbytes for x in v) for k, v in memory(optimizer).items()}
        optimizer.sync()
        trained = replace(role, trained=True, ema=True, overlap=overlap)
        planned = state(trained, world, rank)
        planned["optimizer"] += planned.pop("ema")
        found.append((trained, held, planned))
    return found


@pytest.mark.parametrize("world, layout", LAYOUTS)
def test_parameters_gradients_and_optimizer_are_exact(world, layout) -> None:
    for found in run_world(world, measured_states, layout, timeout=240):
        for role, measured, planned in found:
            assert measured == planned, role


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what PyTorch's kernel for GPUs keeps; on CPU F.rms_norm keeps a copy in fp32 too."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy):
        return dy, torch.zeros_like(ctx.saved_tensors[1]), None  # only bytes matter here


class Saved:
    """Counts the bytes of storages that autograd keeps, parameters left out."""

    def __init__(self, modules) -> None:
        self.owned = {p.untyped_storage().data_ptr() for m in modules for p in m.parameters()}
        self.users: dict[int, int] = {}
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: _Kept(x, self), lambda kept: kept.x
        )
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)


class _Kept:
    def __init__(self, x, saved) -> None:
        self.x, self.saved, storage = x, saved, x.untyped_storage()
        self.key, self.bytes = storage.data_ptr(), storage.nbytes()
        if self.key in saved.owned:
            self.bytes = 0
        saved.users[self.key] = saved.users.get(self.key, 0) + 1
        saved.now += self.bytes * (saved.users[self.key] == 1)
        saved.peak = max(saved.peak, saved.now)

    def __del__(self) -> None:
        self.saved.users[self.key] -= 1
        self.saved.now -= self.bytes * (self.saved.users[self.key] == 0)


def kept_by_a_layer(layout, roles, T):
    """Bytes a token that a layer adds, for each role: those of 4 layers less those of 2."""
    from tetrad.parallel.attention import Packing
    from tetrad.parallel.model import build
    from tetrad.parallel.topology import initialize

    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps)
    topology = initialize(layout)
    found = []
    for role in roles:
        peaks = []
        for n in (2, 4):
            a = replace(role.architecture, num_layers=n)
            (model,) = build(a, "language", topology, precision=role.precision)
            p = Packing(
                [T], torch.arange(T), where=torch.device("cpu"), multiple=layout.token_multiple,
                group=topology.groups.cp,
            )  # fmt: skip
            with Saved([model]) as saved:
                out = model.train()(p.take(torch.arange(T)), p, lambda h, w: h.float().sum())
            peaks.append(saved.now)
            del out
        found.append((peaks[1] - peaks[0]) / 2 / (T / layout.cp))
    return found


@pytest.mark.parametrize(
    "layout, error",
    [
        (Layout(), 0.02),
        (Layout(tp=2), 0.02),
        (Layout(tp=2, sequence_parallel=True), 0.02),
        (Layout(cp=2), 0.15),  # on CPU the pieces of queries are copied side by side
    ],
)
def test_activations_of_a_layer(layout, error) -> None:
    """The CPU's attention puts its output together by a copy, which a GPU's has no need of."""
    roles = [
        Role(architecture(family, hidden_size=64), "language", layout, precision)
        for family in FAMILIES
        for precision in ("fp32", "bf16")
    ]
    for role, measured in zip(
        roles, run_world(layout.ranks, kept_by_a_layer, layout, roles, 64)[0]
    ):
        a = role.architecture
        copy = a.num_heads * a.channels // layout.tp * (4 if role.precision == "fp32" else 2)
        assert layer_of(role).saved == pytest.approx(measured - copy, rel=error), role


def kept_by_a_step(layout, recompute, microbatches):
    """This rank's peak of saved bytes while a critic's gradient is made."""
    from tetrad.parallel.engine import Engine
    from tetrad.parallel.model import build
    from tetrad.parallel.optimizer import Optimizer
    from tetrad.parallel.topology import initialize

    topology = initialize(layout)
    chunks = build(architecture("gpt2"), "scalar", topology, recompute=recompute)
    optimizer = Optimizer(chunks, topology, Schedule(), 10, "fp32")
    engine = Engine(chunks, topology, microbatch_tokens=32, optimizer=optimizer)
    batch = pack([[1] * 16] * microbatches, [[2] * 16] * microbatches)
    with Saved(engine.cores) as saved:
        engine.accumulate_values(batch, lambda values, part: (values.sum(), {}))
    return saved.peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "layout, microbatches",
    [
        (Layout(), 3),
        (Layout(pp=2), 1),
        (Layout(pp=2), 4),
        (Layout(pp=4), 8),
        (Layout(pp=2, vpp=2), 4),
    ],
)
def test_activations_of_a_training_step(layout, microbatches, recompute) -> None:
    """All micro-batches in flight, on every stage, within 10 %."""
    role = Role(architecture("gpt2"), "scalar", layout, "fp32", trained=True, recompute=recompute)
    work = Work(microbatches, microbatches, 1, 16, 16, 32, 1)
    roles = {"policy": role, "critic": role}
    run = Run(roles, work, layout.ranks)
    hidden = 4 * 32 * 32  # fp32, 32 tokens of a micro-batch
    for rank, peak in enumerate(
        run_world(layout.ranks, kept_by_a_step, layout, recompute, microbatches)
    ):
        planned = next(
            m for m in run.moments(rank, False) if m.phase == "learn" and m.role == "critic"
        )
        count, last = in_flight(layout, rank, microbatches), rank == layout.pp - 1
        peak -= hidden * (1 if recompute else count * role.layers())  # attention's copy, on CPU
        peak -= hidden // 2 * last  # of the response tokens, for the head: a workspace
        if not last or layout.vpp > 1:  # what chunks handed on: autograd does not have it
            peak += hidden * count
        assert planned.needs["activations"] == pytest.approx(peak, rel=0.1), rank


def peaks(layout, a):
    """(bytes allocated at most while a gradient is made, while values are read), without and with
    recompute."""
    from tetrad.parallel.engine import Engine
    from tetrad.parallel.model import build
    from tetrad.parallel.optimizer import Optimizer
    from tetrad.parallel.topology import initialize

    torch.nn.functional.rms_norm = lambda x, shape, weight, eps: FusedRMSNorm.apply(x, weight, eps)
    topology = initialize(layout)
    batch = pack([[1] * 256] * 3, [[2] * 256] * 3)
    found = []
    for recompute in (False, True):
        chunks = build(a, "scalar", topology, recompute=recompute)
        optimizer = Optimizer(chunks, topology, Schedule(), 10, "fp32")
        engine = Engine(chunks, topology, microbatch_tokens=512, optimizer=optimizer)
        train = partial(engine.accumulate_values, batch, lambda values, part: (values.sum(), {}))
        found.append((allocated(train), allocated(partial(engine.values, batch))))
    return found


def allocated(work) -> int:
    """Bytes at most, above those at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(n for _, n in moves))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)])
def test_the_peak_of_a_phase(layout, family) -> None:
    """With all that comes and goes: activations, gradients, workspaces. Without tp: gloo frees its
    copies when it likes. A last stage is planned to answer for all tokens, here half of them do."""
    a = architecture(family, hidden_size=256, num_heads=8, num_kv_heads=8, max_length=512)
    for rank, found in enumerate(run_world(layout.ranks, peaks, layout, a)):
        for recompute, (train, read) in zip((False, True), found):
            role = Role(a, "scalar", layout, "fp32", trained=True, recompute=recompute)
            run = Run(
                {"policy": role, "critic": role}, Work(3, 3, 1, 256, 256, 512, 1), layout.ranks
            )
            planned = {m.phase: m.total - m.needs["batch"] for m in run.moments(rank, False)}
            assert planned["learn"] == pytest.approx(train, rel=0.06)
            assert 0.97 * read < planned["score"] < 1.25 * read


def test_swapping_keeps_the_larger_of_two_in_each_slot() -> None:
    small, large = architecture("gpt2"), architecture("gpt2", hidden_size=64)
    layout = Layout(tp=2, pp=2)
    roles = {
        "policy": Role(large, "language", layout, trained=True, ema=True),
        "reference": Role(large, "language", layout),
        "reward": Role(small, "scalar", layout),
        "critic": Role(small, "scalar", layout, trained=True),
    }
    run = Run(roles, Work(8, 4, 1, 16, 16, 64, 4), 8)
    for rank in range(8):
        s = run.states(rank)
        resident, swapped = run.held(rank, swap=False), run.held(rank, swap=True)
        arena = {"gradients": s["policy"]["gradients"]}
        assert resident["policy | critic"] == arena
        assert resident["critic"].keys() == {"parameters", "optimizer"}
        assert swapped["policy | reward"] == {"parameters": s["policy"]["parameters"]}
        assert swapped["reference | critic"] == {"parameters": s["reference"]["parameters"]}
        both = s["policy"]["optimizer"] + s["policy"]["ema"]
        assert swapped["policy | critic"] == arena | {"optimizer": both}
        # nothing is forgotten: the host has all but the gradients
        everything = sum(sum(x.values()) for x in s.values())
        assert run.pinned(rank) == everything - sum(x.get("gradients", 0) for x in s.values())
        assert run.peak(rank, True)[0] < run.peak(rank, False)[0]


def test_key_value_cache_by_hand() -> None:
    """2 x 2 layers x 2 of 2 heads / tp x 16 channels x 2 bytes x 3 rows x (10 + 6) places."""
    role = Role(architecture("qwen3"), "language", Layout(tp=2, pp=2), trained=True)
    run = Run({"policy": role}, Work(6, 6, 1, 10, 6, 64, 3), 8)
    (rollout,) = (m for m in run.moments(0, False) if m.phase == "rollout")
    assert rollout.needs["KV cache"] == 2 * 2 * 1 * 16 * 2 * 3 * 16


def test_a_plan_needs_neither_torch_nor_megatron() -> None:
    code = """if True:
        import sys
        import tetrad.parallel.plan, tetrad.parallel.estimate, tetrad.trainer.plan
        assert not {"torch", "megatron", "transformers"} & {*sys.modules}
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pieces_are_those_of_the_kernels() -> None:
    from tetrad.kernels import linear_logprob, linear_loss

    assert LOSS_ROWS == linear_loss.ROWS and CHUNK_BYTES == linear_logprob.CHUNK_BYTES


def test_colocation_allocates_what_was_planned() -> None:
    from tetrad.parallel.colocate import colocate

    a = architecture("llama")
    roles = {
        name: Role(a, "language", Layout(), trained=name in ("policy", "critic"))
        for name in ("policy", "reference", "reward", "critic")
    }
    run = Run(roles, Work(8, 4, 1, 16, 16, 64, 4), 1)
    for swap in (False, True):
        memory = colocate(run.needs(0), swap).values()
        slots = {t.slot for m in memory for t in (m.weights, m.gradients, m.optimizer)}
        held = sum(sum(x.values()) for x in run.held(0, swap).values())
        assert sum(len(slot.bytes) for slot in slots) == held
