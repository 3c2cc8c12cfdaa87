"""From a config of PPO to the plan of its memory, traffic and time; `tetrad plan` prints it.

What is refused here would run out of memory later. Imports neither torch nor Megatron, unless a
checkpoint or a tokenizer has to be read.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from tetrad.parallel.estimate import EFFICIENCY, GIB, GPU, GPUS, LATENCY, NODE, TRAFFIC, costs
from tetrad.parallel.plan import Bytes, Role, Run, Work, elements
from tetrad.parallel.settings import PRESETS, Architecture, Layout
from tetrad.trainer import config

RESERVED, FRAGMENTED = 2 * GIB, 0.05  # CUDA, NCCL, cuBLAS; share of the memory lost in gaps
KINDS = ("parameters", "gradients", "optimizer", "ema")
NEEDS = ("activations", "KV cache", "workspaces", "batch")


def run_of(cfg: config.PPO, shapes: Mapping[str, Architecture], world: int) -> Run:
    """The run of a config on `world` processes, given the architecture of each role.

    Raises ValueError when a layout divides neither the model nor the processes."""
    p = cfg.parallel
    layouts = {"language": p.layout(), "scalar": cfg.critic_parallel.layout(p)}

    def role(name: str, head: str, trained: bool = False) -> Role:
        shape = replace(shapes[name], windows=tuple(shapes[name].windows), rope_scaling=None)
        layouts[head].check(shape)
        layouts[head].dp(world)
        return Role(
            shape, head, layouts[head], p.precision, trained,
            ema=name == "policy" and cfg.ema_decay is not None,
            recompute=p.recompute, overlap=p.overlap,
        )  # fmt: skip

    roles = {
        "policy": role("policy", "language", trained=True),
        "reference": role("reference", "language"),
        "reward": role("reward", "scalar"),
        "critic": role("critic", "scalar", trained=True),
    }
    longest = shapes["policy"].max_length
    response = min(cfg.sampling.max_new, longest - 1)
    work = Work(
        episodes=cfg.batch_size,
        minibatch=cfg.minibatch_size,
        epochs=cfg.ppo_epochs,
        prompt=min(cfg.max_prompt, longest - response),
        response=response,
        microbatch_tokens=p.microbatch_tokens,
        rows_at_once=cfg.sampling.rows_at_once,
        ptx=max(1, round(cfg.ptx_ratio * cfg.minibatch_size)) if cfg.ptx_coef else 0,
        ptx_length=cfg.ptx_length,
    )
    return Run(roles, work, world)


def available(memory: float) -> float:
    """Bytes to plan with, of a GPU's memory."""
    return memory * (1 - FRAGMENTED) - RESERVED


def peak(run: Run, swap: bool) -> int:
    """Bytes at the worst moment of the worst rank."""
    return run.peak(run.worst(swap), swap)[0]


def fits(run: Run, memory: float, colocate: str) -> bool | None:
    """Whether to swap, where `colocate` leaves the choice; None when nothing fits."""
    for swap in {"resident": [False], "swap": [True], "auto": [False, True]}[colocate]:
        if peak(run, swap) <= available(memory):
            return swap
    return None


def choose(run: Run, memory: float, colocate: str) -> bool:
    """Whether roles are swapped with host memory. Raises ValueError, with the arithmetic, when the
    run does not fit GPUs of so many bytes."""
    swap = fits(run, memory, colocate)
    if swap is not None:
        return swap
    swap = colocate != "resident"
    remedy = next(_remedies(run, memory, colocate), None)
    advice = f"It would fit with {remedy}" if remedy else "Nor does it on 32 times as many GPUs"
    raise ValueError(
        f"this does not fit: {forecast(run, run.worst(swap), swap)}; "
        f"{_gib(available(memory))} GiB available "
        f"({_gib(memory)} less {_gib(RESERVED)} and {FRAGMENTED:.0%}). {advice}"
    )


def forecast(run: Run, rank: int, swap: bool) -> str:
    """One line for the log of a run: a rank's peak, and what it is made of, in GiB."""
    total, moment = run.peak(rank, swap)
    held = "; ".join(f"{name} {_listed(x)}" for name, x in run.held(rank, swap).items())
    return (
        f"rank {rank} needs {_gib(total)} GiB in {moment.phase} ({moment.role}), "
        f"{'swap' if swap else 'resident'}: {held}; at work {_listed(moment.needs)}"
    )


def _remedies(run: Run, memory: float, colocate: str) -> Iterator[str]:
    """Settings with which the run fits, the smallest change first."""
    w = run.work
    if colocate == "resident" and fits(run, memory, "swap") is not None:
        yield "parallel.colocate=swap"
    swap = colocate != "resident"
    share = w.episodes * w.longest
    for key, unit, name in (
        ("microbatch_tokens", w.longest, "parallel.microbatch_tokens"),
        ("rows_at_once", 1, "sampling.rows_at_once"),
    ):
        if size := largest(run, key, unit, share // w.longest * unit, memory, swap):
            yield f"{name}={size}"
    if fits(_with(run, recompute=True), memory, colocate) is not None:
        yield "parallel.recompute=true"
    rows = min(8, w.rows_at_once)
    least = replace(run, work=replace(w, microbatch_tokens=w.longest, rows_at_once=rows))
    least = _with(least, recompute=True)
    small = (
        f"parallel.microbatch_tokens={w.longest} sampling.rows_at_once={rows} "
        "parallel.recompute=true"
    )
    if fits(least, memory, colocate) is not None:
        yield small
    layers = run.roles["policy"].architecture.num_layers
    for world in (run.world * 2**i for i in range(6)):
        for pp in (n for n in range(1, layers + 1) if layers % n == 0):
            for tp in (1, 2, 4, 8):
                layout = Layout(tp, pp, sequence_parallel=tp > 1)
                changed = _with(replace(least, world=world), layout=layout)
                if _divides(changed) and fits(changed, memory, colocate) is not None:
                    yield (
                        f"gpus={world}, for all roles tp={tp} pp={pp} "
                        f"sequence_parallel={str(tp > 1).lower()}, {small}"
                    )


def _divides(run: Run) -> bool:
    try:
        for role in run.roles.values():
            role.layout.check(role.architecture)
            role.layout.dp(run.world)
    except ValueError:
        return False
    return True


def _with(run: Run, **changes) -> Run:
    return replace(run, roles={k: replace(role, **changes) for k, role in run.roles.items()})


def largest(run: Run, key: str, unit: int, limit: int, memory: float, swap: bool) -> int:
    """The largest multiple of `unit`, up to `limit` or a unit, of a field of the work that fits."""
    low, high = 0, max(1, limit // unit)
    while low < high:
        middle = (low + high + 1) // 2
        work = replace(run.work, **{key: middle * unit})
        if peak(replace(run, work=work), swap) <= available(memory):
            low = middle
        else:
            high = middle - 1
    return low * unit


def plan(cfg: config.Plan) -> None:
    """Print the plan. Raises ValueError when it does not fit."""
    gpu, name = _gpu(cfg.gpu)
    run = run_of(cfg, _shapes(cfg), cfg.gpus)
    room = available(gpu.memory)
    print(f"{cfg.gpus} x {name}: {_gib(gpu.memory)} GiB each, {_gib(room)} to plan with")
    for role_name, role in run.roles.items():
        print(f"  {role_name:10} {_described(role, run.world)}")
    swap = choose(run, gpu.memory, cfg.parallel.colocate)
    print("\n".join(_report(run, gpu, swap)))


def _report(run: Run, gpu: GPU, swap: bool) -> Iterator[str]:
    rank = run.worst(swap)
    total, worst = run.peak(rank, swap)
    held, w = run.held(rank, swap), run.work
    yield f"\nGiB on the worst rank, {rank}; each role as if alone"
    yield _row("", KINDS)
    for name, x in run.states(rank).items():
        yield _row(name, [_gib(x[k]) if k in x else "" for k in KINDS])
    yield f"\non the GPU at all times ({'swap' if swap else 'resident'})"
    for name, x in held.items():
        yield _row(name, [_gib(x[k]) if k in x else "" for k in KINDS])
    if swap:
        yield f"  pinned on the host: {_gib(run.pinned(rank))} a GPU"
    always = sum(sum(x.values()) for x in held.values())
    yield f"\nand at work, with {_gib(always)} of that"
    yield _row("", [*NEEDS, "in all"])
    for m in run.moments(rank, swap):
        cells = [_gib(m.needs.get(k, 0)) for k in NEEDS]
        yield _row(f"{m.phase} {m.role}", [*cells, _gib(always + m.total)])
    room = available(gpu.memory)
    used = f"{_gib(total)} of {_gib(room)} GiB ({total / room:.0%})"
    yield f"peak: {worst.phase} {worst.role}, {used}"
    share = max(-(-w.episodes // r.layout.dp(run.world)) for r in run.roles.values()) * w.longest
    tokens = largest(run, "microbatch_tokens", w.longest, share, gpu.memory, swap)
    share = -(-w.episodes // run.roles["policy"].shards(run.world))
    rows = largest(run, "rows_at_once", 1, share, gpu.memory, swap)
    yield f"largest that fits: parallel.microbatch_tokens {tokens}, or sampling.rows_at_once {rows}"

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
        sent = [f"{getattr(cost, k) / 1e9:.1f}" for k in TRAFFIC]
        yield _row(f"{cost.phase} {cost.role}", [*sent, f"{time:.1f}"])
    rate = f"{w.episodes * w.longest / seconds:.0f} tokens/s"
    yield f"  {seconds:.0f} s an iteration of {w.episodes} episodes, {rate}"


def _shapes(cfg: config.Plan) -> dict[str, Architecture]:
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


def _gpu(name: str) -> tuple[GPU, str]:
    """A GPU of the table, by its name or the nearest to it."""
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.0)[0]
    if name.lower() not in GPUS:
        print(f"gpu={name} is not in the table ({', '.join(GPUS)}); taken for {near}")
    return GPUS[near], near


def _described(role: Role, world: int) -> str:
    a, layout = role.architecture, role.layout
    count = elements(replace(role, layout=Layout()), 0)
    more = [f"x {k} {getattr(layout, k)}" for k in ("cp", "vpp") if getattr(layout, k) > 1]
    more += ["sequence parallel"] * layout.sequence_parallel + ["recompute"] * role.recompute
    return " ".join(
        [
            f"{a.family} {a.num_layers} x {a.hidden_size}, {count / 1e9:.2f}e9 weights,",
            f"tp {layout.tp} x pp {layout.pp} x dp {layout.dp(world)}", *more, role.precision,
        ]
    )  # fmt: skip


def _row(name: str, cells: Iterable[str]) -> str:
    return (f"  {name:20}" + "".join(f"{cell:>13}" for cell in cells)).rstrip()


def _listed(x: Bytes) -> str:
    return ", ".join(f"{k} {_gib(n)}" for k, n in x.items() if n)


def _gib(n: float) -> str:
    return f"{n / GIB:.2f}"
