"""What surrounds a training step: building roles, data order, progress, checkpoints, resuming."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import nn

from tetrad.parallel import checkpoint, device
from tetrad.parallel.checkpoint import write_text
from tetrad.parallel.colocate import Memory
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import build
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.settings import Architecture, Schedule
from tetrad.parallel.topology import Topology, generator, initialize, seed_dropout
from tetrad.trainer import config
from tetrad.trainer.metrics import Metrics
from tetrad.trainer.tokenizer import Tokenizer, are_same, load_tokenizer

log = logging.getLogger("tetrad")


def start(cfg: config.Run) -> Topology:
    """Join the other processes; refuse an `out` that holds something else than this run."""
    topology = initialize(cfg.parallel.layout())
    out = Path(cfg.out)
    trained = checkpoint.latest(out / "checkpoints") is not None
    if isinstance(cfg, config.Training):
        if trained and cfg.resume:
            _check_same_run(cfg, out)
    elif trained:
        raise ValueError(f"{out} holds a training run; choose another out")
    elif isinstance(cfg, config.Demo) and (out / "config.yaml").exists():
        _check_same_run(cfg, out)
    dist.barrier()  # all have looked before one writes
    if not isinstance(cfg, config.Training):
        write_config(cfg)
    return topology


def write_config(cfg: config.Run) -> None:
    """OUT/config.yaml, as the command line would read it."""
    if dist.get_rank() == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(cfg.out) / "config.yaml", config.as_yaml(cfg))
    dist.barrier()


def _check_same_run(cfg: config.Run, out: Path) -> None:
    """Refuse to continue another run: its steps would be taken for this one's."""
    free = (
        "save_every", "save_in_background", "keep", "resume", "out", "stop_after",
        "critic_parallel",
    )  # fmt: skip
    old = yaml.safe_load(config.completed(cfg, out / "config.yaml"))
    new = yaml.safe_load(config.as_yaml(cfg))
    for settings in (old, new):  # the layout may change, the arithmetic may not
        settings["parallel.precision"] = settings.pop("parallel")["precision"]
    for key in new:
        if key not in free and old.get(key) != new[key]:
            advice = ", or resume=false to start it afresh" if "resume" in new else ""
            raise ValueError(f"{out} holds a run with another {key}; choose another out{advice}")


@dataclass(frozen=True)
class Source:
    """What a model brings along: its tokenizer, and how long a sequence it takes."""

    tokenizer_name: str
    tokenizer: Tokenizer
    max_length: int  # tokens

    def fits(self, length: int, name: str) -> int:
        """`length`, when sequences of so many tokens fit the model."""
        if length > self.max_length:
            raise ValueError(f"{name} {length} exceeds the model's max_length {self.max_length}")
        return length


def source_of(model: config.Model) -> Source:
    """Of the checkpoint that a model starts from, or as configured for a fresh one."""
    given = [k for k, v in vars(model).items() if k != "init" and v != getattr(config.Model(), k)]
    if model.init and given:
        raise ValueError(f"model.{given[0]} is given beside model.init, which brings its own")
    if not model.init:
        return Source(model.tokenizer, load_tokenizer(model.tokenizer), model.max_length)
    architecture, description = checkpoint.read_model(checkpoint.find(model.init))
    name = description["tokenizer"]
    return Source(name, load_tokenizer(name), architecture.max_length)


def build_role(
    cfg: config.Run,
    topology: Topology,
    head: str,
    model: config.Model,
    tokenizer: str,
    *,
    new_head: bool = False,
    **training,
) -> Engine:
    """A model with a "language" or "scalar" head, from its checkpoint or fresh. new_head: a scalar
    model may start from a language model. training: as `build_engine` takes it.

    Raises ValueError when the checkpoint has another head or another tokenizer than asked for.
    """
    folder = checkpoint.find(model.init, None if new_head else head) if model.init else None
    load = None
    if folder:
        architecture, description = checkpoint.read_model(folder)
        if not are_same(description["tokenizer"], tokenizer):
            raise ValueError(
                f"{model.init} reads {description['tokenizer']} tokens, "
                f"the other models of this run {tokenizer} tokens"
            )
        load = partial(checkpoint.load_weights, topology=topology, folder=folder)
    else:
        architecture = model.architecture(load_tokenizer(tokenizer).vocab_size)
    return build_engine(cfg, topology, head, architecture, load=load, **training)


def build_engine(
    cfg: config.Run,
    topology: Topology,
    head: str,
    architecture: Architecture,
    *,
    load: Callable[[list[nn.Module]], object] | None = None,
    schedule: Schedule | None = None,
    steps: int = 1,
    dropout: float = 0.0,
    ema_decay: float | None = None,
    memory: Memory | None = None,
) -> Engine:
    """A model of this shape; with a schedule it can be trained for so many steps. load: fills its
    weights, which are drawn otherwise. memory: where its tensors are to be, of `colocate`."""
    p = cfg.parallel
    chunks = build(
        architecture, head, topology, precision=p.precision, dropout=dropout,
        recompute=p.recompute, seed=cfg.seed, to_be_loaded=load is not None,
    )  # fmt: skip
    if load:
        load(chunks)
    optimizer = None
    if schedule:
        optimizer = Optimizer(
            chunks, topology, schedule, steps, p.precision,
            overlap=p.overlap, ema_decay=ema_decay, memory=memory,
        )  # fmt: skip
    return Engine(
        chunks, topology, microbatch_tokens=p.microbatch_tokens, optimizer=optimizer, memory=memory
    )


def batches(n: int, size: int, epochs: float, seed: int) -> tuple[int, Callable[[int], list[int]]]:
    """Shuffled passes over n examples: the number of steps, and the examples of each step.

    Each pass has its own order, a function of the seed. Batches run on from one pass into the
    next; only the very last may be smaller. epochs may be infinite: then there is no last step.
    """
    if size < 1 or n < 1:
        raise ValueError(f"cannot draw batches of {size} from {n} examples")
    total = math.inf if epochs == math.inf else math.ceil(epochs * n)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        return torch.randperm(n, generator=generator(seed, epoch)).tolist()

    def chosen(step: int) -> list[int]:
        places = range(step * size, int(min((step + 1) * size, total)))
        return [order(place // n)[place % n] for place in places]

    return 0 if total == math.inf else math.ceil(total / size), chosen


def held_out(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Examples to train on and examples held out (at least one when fraction > 0 and n > 1)."""
    order = torch.randperm(n, generator=generator(seed, -1)).tolist()
    k = min(max(1, round(fraction * n)), n - 1) if fraction > 0 else 0
    return sorted(order[k:]), sorted(order[:k])


def train(
    cfg: config.Training,
    engines: Mapping[str, Engine],
    steps: int,
    step: Callable[[int], dict[str, float]],
    *,
    name: str,
    tokenizer: str,
    examples: int,
    shown: tuple[str, ...],
) -> bool:
    """Take steps 0 … steps - 1, from where the latest checkpoint of this run stands.

    `step(i)` trains and returns what to log. Returns whether the run is complete. Raises ValueError
    when the checkpoint belongs to data with another number of examples.
    """
    out = Path(cfg.out)
    folder = out / "checkpoints"
    first = 0
    newest = checkpoint.latest(folder) if cfg.resume else None
    if newest:
        state = checkpoint.read_state(newest)
        first = state["step"]
        if state["examples"] != examples:
            raise ValueError(
                f"{out} was begun on {state['examples']} examples, now there are {examples}; "
                f"choose another out, or resume=false to start it afresh"
            )
        for role, engine in engines.items():
            checkpoint.load(engine, newest / role)
        if dist.get_rank() == 0:
            log.info(f"{name}: continuing {out} at step {first} of {steps}")
    elif dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    write_config(cfg)
    last = steps if cfg.stop_after is None else min(steps, first + cfg.stop_after)
    metrics = Metrics(out, name, first, steps, shown)
    for i in range(first, last):
        seed_dropout(cfg.seed, i)
        began = time.perf_counter()
        values = step(i)
        metrics.log(i, {**values, "seconds": time.perf_counter() - began})
        if i + 1 == last or (i + 1) % cfg.save_every == 0:
            state = {"model": {"tokenizer": tokenizer}, "examples": examples}
            checkpoint.save(
                folder, i + 1, engines, state, cfg.keep, wait=not cfg.save_in_background
            )
        checkpoint.finish(wait=False)
    checkpoint.finish()
    metrics.close()
    return last == steps


class Clock:
    """Seconds of the phases of a step, as this rank sees them. A phase ends where the next begins,
    when the GPU has done what was launched in it."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, float]] = []

    def enter(self, phase: str) -> None:
        device.synchronize()
        self.begun.append((phase, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """seconds/PHASE for each; the last one ends now."""
        self.enter("")
        return {
            f"seconds/{phase}": end - start
            for (phase, start), (_, end) in zip(self.begun, self.begun[1:])
        }
