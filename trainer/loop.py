"""What surrounds a training step: building roles, data order, progress, checkpoints, resuming."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from tetrad.parallel import checkpoint
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import build
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.settings import Schedule
from tetrad.parallel.topology import Topology, generator, initialize, seed_dropout
from tetrad.trainer import config
from tetrad.trainer.metrics import Metrics, write_text
from tetrad.trainer.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("tetrad")


def start(cfg: config.Run) -> Topology:
    """Join the other processes and open the run's folder."""
    topology = initialize(cfg.parallel.tp, cfg.parallel.pp)
    out = Path(cfg.out)
    if isinstance(cfg, config.Training):
        _check_same_run(cfg, out)
    dist.barrier()  # all have read before one writes
    if dist.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.yaml", config.as_yaml(cfg))
    dist.barrier()
    return topology


def _check_same_run(cfg: config.Training, out: Path) -> None:
    """Refuse to continue another run: its steps would be taken for this one's."""
    if not cfg.resume or checkpoint.latest(out / "checkpoints") is None:
        return
    free = ("parallel", "save_every", "keep", "resume", "out", "stop_after")
    old = yaml.safe_load((out / "config.yaml").read_text())
    new = yaml.safe_load(config.as_yaml(cfg))
    for key in new:
        if key not in free and old.get(key) != new[key]:
            raise ValueError(
                f"{out} holds a run with another {key}; choose another out, "
                f"or resume=false to start it afresh"
            )


def tokenizer_of(cfg: config.Model) -> tuple[str, Tokenizer]:
    """The tokenizer of the checkpoint that a model starts from, or the configured one."""
    name = cfg.tokenizer
    if cfg.init:
        name = checkpoint.read_model(checkpoint.find(cfg.init))[1]["tokenizer"]
    return name, load_tokenizer(name)


def build_role(
    cfg: config.Run,
    topology: Topology,
    head: str,
    model: config.Model,
    *,
    schedule: Schedule | None = None,
    steps: int = 1,
    dropout: float = 0.0,
) -> Engine:
    """A model with a "language" or "scalar" head, from its checkpoint or fresh; with a schedule it
    can be trained for so many steps."""
    folder = checkpoint.find(model.init) if model.init else None
    if folder:
        architecture = checkpoint.read_model(folder)[0]
    else:
        architecture = model.architecture(load_tokenizer(model.tokenizer).vocab_size)
    precision = cfg.parallel.precision
    module = build(
        architecture, head, topology, precision=precision, dropout=dropout, seed=cfg.seed
    )
    if folder:
        checkpoint.load_weights(module, topology, folder)
    optimizer = None
    if schedule:
        optimizer = Optimizer(module, topology, schedule, steps, precision)
    return Engine(
        module,
        topology,
        microbatch_tokens=cfg.parallel.microbatch_tokens,
        optimizer=optimizer,
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
    """Examples to train on and examples held out (at least one of each when fraction > 0)."""
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
    shown: tuple[str, ...],
) -> bool:
    """Take steps 0 … steps - 1, from where the latest checkpoint of this run stands.

    `step(i)` trains and returns what to log. Returns whether the run is complete.
    """
    out = Path(cfg.out)
    folder = out / "checkpoints"
    first = 0
    if not cfg.resume:
        _forget(folder)
    newest = checkpoint.latest(folder)
    if newest:
        first = checkpoint.read_state(newest)["step"]
        for role, engine in engines.items():
            checkpoint.load(engine, newest / role)
        _say(f"{name}: continuing {out} at step {first} of {steps}")
    last = steps if cfg.stop_after is None else min(steps, first + cfg.stop_after)
    metrics = Metrics(out, name, first, steps, shown)
    for i in range(first, last):
        seed_dropout(cfg.seed, i)
        began = time.perf_counter()
        values = step(i)
        metrics.log(i, {**values, "seconds": time.perf_counter() - began})
        if i + 1 == last or (i + 1) % cfg.save_every == 0:
            checkpoint.save(folder, i + 1, engines, {"model": {"tokenizer": tokenizer}}, cfg.keep)
    metrics.close()
    return last == steps


def _forget(folder: Path) -> None:
    if dist.get_rank() == 0:
        (folder / "latest").unlink(missing_ok=True)
    dist.barrier()


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        log.info(message)
