"""`tetrad plan`: the memory, traffic and time of a run of PPO, printed.

Imports neither torch nor Megatron, unless a checkpoint or a tokenizer has to be read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tetrad.parallel.estimate import EFFICIENCY, GPU, GPUS, LATENCY, NODE, TRAFFIC, costs
from tetrad.parallel.plan import Role, Run, elements
from tetrad.parallel.settings import PRESETS, Architecture, Layout
from tetrad.trainer import config
from tetrad.trainer.planning import available, choose, gib, largest, layouts, number, run_of

KINDS = ("parameters", "gradients", "optimizer", "ema")
NEEDS = ("activations", "KV cache", "workspaces", "batch")


def plan(cfg: config.Plan) -> None:
    """Print the plan. Raises ValueError when it does not fit."""
    name = _gpu(cfg.gpu)
    for section, layout in layouts(cfg).items():
        if cfg.gpus % layout.ranks:  # run_of would speak of processes, of which there are none
            raise ValueError(
                f"{section}: tp {layout.tp} x pp {layout.pp} x cp {layout.cp} "
                f"does not divide gpus={cfg.gpus}"
            )
    gpu, run = GPUS[name], run_of(cfg, shapes(cfg), cfg.gpus)
    room = available(gpu.memory)
    print(f"{cfg.gpus} x {name}: {gib(gpu.memory)} GiB each, {gib(room)} to plan with")
    for role_name, role in run.roles.items():
        print(f"  {role_name:10} {_described(role, run.world)}")
    swap = choose(cfg, run, gpu.memory)
    print("\n".join([*_memory(run, gpu, swap), *_time(run, gpu, swap)]))


def _gpu(name: str) -> str:
    """A GPU of the table, from its name or the beginning of no other."""
    found = [known for known in GPUS if known.startswith(name.lower())]
    if len(found) != 1:
        raise ValueError(
            f"gpu={name} is neither one of {', '.join(GPUS)} nor the beginning of just one"
        )
    return found[0]


def shapes(cfg: config.Plan) -> dict[str, Architecture]:
    """Of each role: from its checkpoint, else from the config."""
    policy = _shape(cfg.model, cfg.model.init, None)
    alone = cfg.reward_shape == config.Model()  # nothing said: of the policy's shape
    reward = policy if alone and not cfg.reward else _shape(cfg.reward_shape, cfg.reward, policy)
    return {
        "policy": policy,
        "reference": _shape(cfg.model, cfg.reference, policy) if cfg.reference else policy,
        "critic": _shape(cfg.reward_shape, cfg.critic, policy) if cfg.critic else reward,
        "reward": reward,
    }


def _shape(model: config.Model, init: str | None, policy: Architecture | None) -> Architecture:
    if init:
        from tetrad.parallel import device

        device.install()  # before anything imports megatron.core
        from tetrad.parallel.checkpoint import find, read_model

        return read_model(find(init))[0]
    if policy is not None:
        vocabulary = policy.vocab_size
    elif model.preset is not None and model.tokenizer == config.Model.tokenizer:
        vocabulary = PRESETS[model.preset]["vocab_size"]
    else:
        from tetrad.trainer.tokenizer import load_tokenizer

        vocabulary = load_tokenizer(model.tokenizer).vocab_size
    return model.architecture(vocabulary)


def _described(role: Role, world: int) -> str:
    a, layout = role.architecture, role.layout
    count = elements(replace(role, layout=Layout()), 0)
    more = [f"x {k} {getattr(layout, k)}" for k in ("cp", "vpp") if getattr(layout, k) > 1]
    more += ["sequence parallel"] * (layout.sequence_parallel and layout.tp > 1)
    more += ["recompute"] * role.recompute
    return " ".join(
        [
            f"{a.family} {a.num_layers} x {a.hidden_size}, {count:.2e} weights,",
            f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp(world)}", *more, role.precision,
        ]
    )  # fmt: skip


def _memory(run: Run, gpu: GPU, swap: bool) -> Iterator[str]:
    rank, room, w = run.worst(swap), available(gpu.memory), run.work
    always, (total, worst) = run.always(rank, swap), run.peak(rank, swap)
    yield f"\nGiB on the worst rank, {rank}; each role as if alone"
    yield _row("", KINDS)
    for name, x in run.states(rank).items():
        yield _row(name, [gib(x[k]) if k in x else "" for k in KINDS])
    yield f"\non the GPU at all times ({'swap' if swap else 'resident'})"
    for name, x in run.held(rank, swap).items():
        yield _row(name, [gib(x[k]) if k in x else "" for k in KINDS])
    if swap:
        yield f"  pinned on the host: {gib(run.pinned(rank))} a GPU"
    yield f"\nand at work, with {gib(always)} of that"
    yield _row("", [*NEEDS, "in all"])
    for m in run.moments(rank, swap):
        cells = [gib(m.needs.get(k, 0)) for k in NEEDS]
        yield _row(f"{m.phase} {m.role}", [*cells, gib(always + m.total)])
    used = f"{gib(total)} of {gib(room)} GiB ({total / room:.0%})"
    yield f"peak: {worst.phase} {worst.role}, {used}"
    replicas = min(role.layout.dp(run.world) for role in run.roles.values())
    limit = -(-w.episodes // replicas) * w.longest  # all that a replica has, in one micro-batch
    tokens = largest(run, "microbatch_tokens", w.longest, limit, gpu.memory, swap)
    limit = -(-w.episodes // run.roles["policy"].shards(run.world))
    rows = largest(run, "rows_at_once", 1, limit, gpu.memory, swap)
    yield f"largest that fits: parallel.microbatch_tokens {tokens}, or sampling.rows_at_once {rows}"


def _time(run: Run, gpu: GPU, swap: bool) -> Iterator[str]:
    w = run.work
    yield f"\nESTIMATE of an iteration, all responses of {w.response} tokens, from stated rates:"
    yield (
        f"  {gpu.flops / 1e12:.0f} TFLOP/s, HBM {gpu.hbm / 1e12:.2f} TB/s; GB/s each way: "
        f"{gpu.link / 1e9:.0f} within {NODE} GPUs, {gpu.network / 1e9:.0f} between nodes, "
        f"{gpu.pcie / 1e9:.0f} PCIe"
    )
    stated = ", ".join(f"{k} {v:.0%}" for k, v in EFFICIENCY.items())
    yield f"  of which are reached: {stated}; a collective takes {LATENCY * 1e6:.0f} us at least"
    yield "  GB that a rank sends in all"
    yield _row("", [*TRAFFIC, "seconds"])
    seconds = 0.0
    for cost in costs(run, swap):
        time = cost.seconds(run, gpu)
        seconds += time
        sent = [number(getattr(cost, k) / 1e9) for k in TRAFFIC]
        yield _row(f"{cost.phase} {cost.role}", [*sent, number(time)])
    rate = f"{w.episodes * w.longest / seconds:.0f} tokens/s"
    yield f"  {number(seconds)} s an iteration of {w.episodes} episodes, {rate}"


def _row(name: str, cells: Iterable[str]) -> str:
    return (f"  {name:20}" + "".join(f"{cell:>13}" for cell in cells)).rstrip()
