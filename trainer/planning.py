"""Whether a run of PPO fits the memory of its GPUs, and which settings would make it fit.

What is refused here would run out of memory later. Imports neither torch nor Megatron.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any

from tetrad.parallel.estimate import GIB
from tetrad.parallel.plan import Bytes, Role, Run, Work
from tetrad.parallel.settings import Architecture, Layout
from tetrad.trainer import config

RESERVED, FRAGMENTED = 2 * GIB, 0.05  # CUDA, NCCL, cuBLAS; share of the memory lost in gaps


def longest_prompt(cfg: config.PPO, max_length: int) -> int:
    """Tokens of the longest prompt that is used with a policy of so many tokens at most.

    Raises ValueError when sizes of the config contradict each other or exceed max_length."""
    if cfg.batch_size % cfg.minibatch_size:
        raise ValueError(
            f"minibatch_size {cfg.minibatch_size} does not divide batch_size {cfg.batch_size}"
        )
    room = {"sampling.max_new + 1": cfg.sampling.max_new + 1}
    if cfg.ptx_coef:
        room["ptx_length"] = cfg.ptx_length
    for name, length in room.items():
        if length > max_length:
            raise ValueError(f"{name} {length} exceeds the model's max_length {max_length}")
    return min(cfg.max_prompt, max_length - cfg.sampling.max_new)


def run_of(cfg: config.PPO, shapes: Mapping[str, Architecture], world: int) -> Run:
    """The run of a config on `world` processes, given the architecture of each role.

    Raises ValueError when sizes contradict each other, or a layout does not divide the model or the
    processes."""
    p, known = cfg.parallel, layouts(cfg)
    prompt = longest_prompt(cfg, shapes["policy"].max_length)
    longest = prompt + cfg.sampling.max_new
    for name, shape in shapes.items():
        if shape.max_length < longest:
            raise ValueError(
                f"{name} reads {shape.max_length} tokens at most; prompt and response have up to "
                f"{longest}"
            )

    def role(name: str, head: str, trained: bool = False) -> Role:
        section = "parallel" if head == "language" else "critic_parallel"
        with _naming(section):
            known[section].check(shapes[name])
            known[section].dp(world)
        return Role(
            shapes[name], head, known[section], p.precision, trained,
            ema=name == "policy" and cfg.ema_decay is not None,
            recompute=p.recompute, overlap=p.overlap,
        )  # fmt: skip

    work = Work(
        episodes=cfg.batch_size,
        minibatch=cfg.minibatch_size,
        epochs=cfg.ppo_epochs,
        prompt=prompt,
        response=cfg.sampling.max_new,
        microbatch_tokens=p.microbatch_tokens,
        rows_at_once=cfg.sampling.rows_at_once,
        ptx=max(1, round(cfg.ptx_ratio * cfg.minibatch_size)) if cfg.ptx_coef else 0,
        ptx_length=cfg.ptx_length,
    )
    roles = {
        "policy": role("policy", "language", trained=True),
        "reference": role("reference", "language"),
        "reward": role("reward", "scalar"),
        "critic": role("critic", "scalar", trained=True),
    }
    return Run(roles, work, world)


def layouts(cfg: config.PPO) -> dict[str, Layout]:
    """By the section of the config: that of policy and reference, that of reward and critic."""
    parallel = cfg.parallel.layout()
    with _naming("critic_parallel"):
        return {"parallel": parallel, "critic_parallel": cfg.critic_parallel.layout(cfg.parallel)}


@contextmanager
def _naming(section: str) -> Iterator[None]:
    """Puts the section of the config before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


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


def choose(cfg: config.PPO, run: Run, memory: float) -> bool:
    """Whether roles are swapped with host memory. Raises ValueError, with the arithmetic, when the
    run of this config does not fit GPUs of so many bytes."""
    swap = fits(run, memory, cfg.colocate)
    if swap is not None:
        return swap
    swap = cfg.colocate != "resident"
    remedy = _remedy(cfg, run, memory)
    advice = f"It would fit with {remedy}" if remedy else "Nor does it on 32 times as many GPUs"
    raise ValueError(
        f"this does not fit: {forecast(run, run.worst(swap), swap)}; "
        f"{gib(available(memory))} GiB available "
        f"({gib(memory)} less {gib(RESERVED)} and {FRAGMENTED:.0%}). {advice}"
    )


def forecast(run: Run, rank: int, swap: bool) -> str:
    """One line for the log of a run: a rank's peak, and what it is made of, in GiB."""
    total, moment = run.peak(rank, swap)
    held = "; ".join(f"{name} {_listed(x)}" for name, x in run.held(rank, swap).items())
    return (
        f"rank {rank} needs {gib(total)} GiB in {moment.phase} ({moment.role}), "
        f"{'swap' if swap else 'resident'}: {held}; at work {_listed(moment.needs)}"
    )


def _listed(x: Bytes) -> str:
    return ", ".join(f"{k} {gib(n)}" for k, n in x.items() if n)


def gib(n: float) -> str:
    """Bytes, in GiB."""
    return number(n / GIB)


def number(x: float) -> str:
    """Two decimals, or two digits of what would vanish among them."""
    return f"{x:.1e}" if 0 < x < 0.01 else f"{x:.2f}"


def _remedy(cfg: config.PPO, run: Run, memory: float) -> str | None:
    """Settings with which the run fits, as they are typed: the first that are found to do."""
    shapes = {name: role.architecture for name, role in run.roles.items()}
    for world, settings in _settings(cfg, run, memory):
        changed, typed = copy.deepcopy(cfg), [f"gpus={world}"] if world != run.world else []
        for key, value in settings.items():
            *sections, name = key.split(".")
            section = reduce(getattr, sections, changed)
            # what is so already need not be said; None in critic_parallel: as in parallel
            if getattr(section, name) not in (value, None):
                setattr(section, name, value)
                typed.append(f"{key}={str(value).lower()}")
        try:
            remedied = run_of(changed, shapes, world)
        except ValueError:  # a layout that does not divide the models
            continue
        if fits(remedied, memory, changed.colocate) is not None:
            return " ".join(typed)
    return None


def _settings(cfg: config.PPO, run: Run, memory: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """What to try on how many GPUs, the smallest change first."""
    w = run.work
    if cfg.colocate == "resident":
        yield run.world, {"colocate": "swap"}
    for key, unit, name in (
        ("microbatch_tokens", w.longest, "parallel.microbatch_tokens"),
        ("rows_at_once", 1, "sampling.rows_at_once"),
    ):
        if size := largest(run, key, unit, w.episodes * unit, memory, cfg.colocate != "resident"):
            yield run.world, {name: size}
    yield run.world, {"parallel.recompute": True}
    small = {
        "parallel.microbatch_tokens": w.longest,
        "sampling.rows_at_once": min(8, w.rows_at_once),
        "parallel.recompute": True,
    }
    yield run.world, small
    layers = run.roles["policy"].architecture.num_layers
    for world in (run.world * 2**i for i in range(6)):
        for pp in (n for n in range(1, layers + 1) if layers % n == 0):
            for tp in (1, 2, 4, 8):
                layout = vars(Layout(tp, pp, sequence_parallel=tp > 1))
                both = {f"{s}.{k}": v for s in layouts(cfg) for k, v in layout.items()}
                yield world, both
                yield world, both | small


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
