"""Traffic and time of an iteration, estimated from shapes, layouts and stated rates.

Memory is plan.py's, and exact where it says so; this is not: it says which layout is in the right
range and what it waits for. The rates are the makers', the fractions of them that are reached are
guesses; docs/plan.md says so too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from tetrad.parallel.plan import Role, Run, elements, parameters
from tetrad.parallel.settings import BYTES

NODE = 8  # GPUs of a node: ranks that many apart talk over the network
LATENCY = 20e-6  # seconds before a collective moves its first byte
EFFICIENCY = {"matmul": 0.45, "HBM": 0.7, "links": 0.7, "PCIe": 0.8}  # fractions of the rates below


@dataclass(frozen=True)
class GPU:
    """What the makers state, but memory: what PyTorch finds there."""

    memory: float  # bytes
    flops: float  # bf16 a second, dense
    hbm: float  # bytes a second
    link: float  # bytes a second each way to the GPUs of the node
    network: float  # bytes a second each way to other nodes
    pcie: float  # bytes a second each way to the host


GIB = 2**30
GPUS = {
    "a100-40gb": GPU(39.4 * GIB, 312e12, 1.555e12, 300e9, 25e9, 32e9),
    "a100-80gb": GPU(79.1 * GIB, 312e12, 2.04e12, 300e9, 25e9, 32e9),
    "h100-80gb": GPU(79.1 * GIB, 989e12, 3.35e12, 450e9, 50e9, 64e9),
    "h200-141gb": GPU(139.8 * GIB, 989e12, 4.8e12, 450e9, 50e9, 64e9),
    "b200-192gb": GPU(178.3 * GIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9),
}


@dataclass(frozen=True)
class Cost:
    """What a rank of the busiest stage does for one role in one phase, and sends, in bytes."""

    phase: str
    role: str
    flops: float = 0.0
    read: float = 0.0  # bytes of HBM that hold the arithmetic up
    tp: float = 0.0
    cp: float = 0.0
    pp: float = 0.0
    dp: float = 0.0
    swap: float = 0.0
    collectives: float = 0.0  # small ones, each of which costs LATENCY
    waiting: float = 1.0  # time over time at work, of a pipeline

    def seconds(self, run: Run, gpu: GPU) -> float:
        role = run.roles[self.role]
        layout, e = role.layout, EFFICIENCY

        def link(ranks: int) -> float:
            return e["links"] * (gpu.link if ranks <= NODE else gpu.network)

        compute = max(self.flops / (e["matmul"] * gpu.flops), self.read / (e["HBM"] * gpu.hbm))
        work = compute + self.tp / link(layout.tp) + self.cp / link(layout.tp * layout.cp)
        work += self.pp / link(run.world) + LATENCY * self.collectives
        work *= self.waiting
        reduced = self.dp / link(run.world // layout.pp)
        if role.overlap:
            reduced = max(0.0, reduced - work)
        return work + reduced + self.swap / (e["PCIe"] * gpu.pcie)


TRAFFIC = [f.name for f in fields(Cost) if f.name in ("tp", "cp", "pp", "dp", "swap")]


def costs(run: Run, swap: bool) -> Iterator[Cost]:
    """The work of one iteration, by phase and role."""
    w, world = run.work, run.world
    held = run.needs(run.worst(swap))
    weights = {name: x["parameters"] for name, x in held.items()}
    yield _rollout(run)
    for name, role in run.roles.items():
        count, _ = w.parts(role, world, w.episodes)
        tokens = w.episodes * w.longest / role.layout.dp(world)
        moved = weights[name] if swap and name != "policy" else 0.0
        yield Cost("score", name, **_pass(role, w.longest, tokens, count, 1, 1), swap=moved)
    steps = w.epochs * math.ceil(w.episodes / w.minibatch)
    for name, role in run.roles.items():
        if not role.trained:
            continue
        passes = [w.minibatch]
        if name == "policy" and w.ptx:
            passes.append(math.ceil(w.ptx * w.ptx_length / w.longest))
        count = sum(w.parts(role, world, episodes)[0] for episodes in passes)
        tokens = steps * sum(passes) * w.longest / role.layout.dp(world)
        # backward is twice forward; with sequence parallelism it gathers its inputs once more
        again = int(role.recompute)
        sends = 2 + again + role.layout.sequence_parallel / 2
        learn = _pass(role, w.longest, tokens, count / len(passes), 3 + again, sends)
        shards, gradients = role.shards(world), held[name]["gradients"]
        reduced = steps * (gradients + weights[name]) * (shards - 1) / shards
        moved = 0.0
        if swap:  # weights back to the host, the policy's also in; the optimizer in and out
            moved = weights[name] * (2 if name == "policy" else 1)
            moved += 2 * steps * held[name]["optimizer"]
        yield Cost("learn", name, **learn, dp=reduced, swap=moved)


def _rollout(run: Run) -> Cost:
    """All prompts of a turn through the stages, then one token of every row at a time: the stages
    work one after the other."""
    w, role = run.work, run.roles["policy"]
    a, layout, e = role.architecture, role.layout, BYTES[role.precision]
    share = -(-w.episodes // role.shards(run.world))
    rows = w.rows(role, run.world)
    turns = -(-share // rows)
    layers = role.layers() * layout.vpp
    prefill = _pass(role, w.prompt, share * w.prompt * layout.cp, 1, 1, 1)
    steps = _pass(role, w.longest, share * w.response * layout.cp, 1, 1, 1)
    context = w.prompt + w.response / 2
    cache = 2 * layers * a.kv_heads * a.channels // layout.tp * e * context * share
    read = turns * w.response * e * _multiplied(role) + w.response * cache
    both = {k: prefill[k] + steps[k] for k in ("flops", "tp", "pp")}
    small = turns * w.response * 2 * layers * (layout.tp > 1)
    return Cost("rollout", "policy", **both, read=read, collectives=small, waiting=layout.pp)


def _multiplied(role: Role) -> int:
    """Weights of the busiest stage that tokens are multiplied with: all but an embedding."""
    tied = role.layout.pp == 1 and role.head == "language" and role.architecture.tie_embeddings
    embedding = 0 if tied else parameters(role, 0)[0][0]
    return max(
        elements(role, stage) - (embedding if stage == 0 else 0) for stage in range(role.layout.pp)
    )


def _pass(
    role: Role, context: int, tokens: float, count: float, computed: float, sent: float
) -> dict[str, float]:
    """Through the model with so many tokens of one replica: `computed` and `sent` times what a
    forward pass does, in `count` micro-batches at a time."""
    a, layout, e = role.architecture, role.layout, BYTES[role.precision]
    tp, layers, local = layout.tp, role.layers() * layout.vpp, tokens / layout.cp
    cycle = a.windows or (0,)
    seen = sum(min(x or context, context / 2) for x in cycle) / len(cycle)
    attention = 4 * layers * a.num_heads * a.channels / tp * seen
    hidden = local * a.hidden_size * e
    split = tp if layout.sequence_parallel else 1
    return {
        "flops": computed * local * (2 * _multiplied(role) + attention),
        "tp": sent * 2 * layers * hidden * 2 * (tp - 1) / tp,
        "cp": sent * layers * 2 * local * e * a.kv_heads * a.channels / tp * (layout.cp - 1),
        "pp": (2 if computed > 1 else 1) * layout.vpp * hidden / split * (layout.pp > 1),
        "waiting": (count + (layout.pp - 1) / layout.vpp) / count,
    }
