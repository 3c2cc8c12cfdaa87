"""A tiny model and a ragged batch, the same in every layout."""

from contextlib import contextmanager

import torch

from tetrad.parallel.engine import Engine
from tetrad.parallel.model import build
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.packed import Batch, pack
from tetrad.parallel.settings import Architecture, Layout, Schedule
from tetrad.parallel.topology import Topology, generator, initialize

# 4 layers and heads divide by every layout below; 257 tokens divide by none
SHAPE = {"vocab_size": 257, "num_layers": 4, "hidden_size": 32, "num_heads": 4, "max_length": 64}
LENGTHS = (3, 9, 5, 12, 7)
ALONE = Layout()
LAYOUTS = [  # world, layout
    (1, ALONE),
    (2, Layout(tp=2)),
    (2, Layout(pp=2)),
    (2, Layout()),
    (2, Layout(tp=2, sequence_parallel=True)),
    (2, Layout(cp=2)),
    (2, Layout(pp=2, vpp=2)),
    (4, Layout(tp=2, pp=2)),
    (4, Layout(tp=2, cp=2, sequence_parallel=True)),
    (8, Layout(tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True)),
]


def tiny_engine(
    head: str, layout: Layout = ALONE, *, microbatch_tokens: int = 40, precision: str = "fp32",
    schedule: Schedule | None = None, seed: int = 3, topology: Topology | None = None,
    overlap: bool = False, ema_decay: float | None = None, **shape,
) -> Engine:  # fmt: skip
    topology = topology or initialize(layout)
    architecture = Architecture(**(SHAPE | shape))
    chunks = build(architecture, head, topology, precision=precision, seed=seed)
    schedule = schedule or Schedule(lr=1e-3, warmup_steps=2, clip_norm=0.5, weight_decay=0.1)
    more = {"overlap": overlap, "ema_decay": ema_decay}
    optimizer = Optimizer(chunks, topology, schedule, 10, precision, **more)
    return Engine(chunks, topology, microbatch_tokens=microbatch_tokens, optimizer=optimizer)


def random_tokens(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    g = generator(seed)
    return [torch.randint(256, (n,), generator=g).tolist() for n in lengths]


def ragged_batch(response_lengths: tuple[int, ...] = LENGTHS) -> Batch:
    batch = pack(random_tokens(1), random_tokens(2, response_lengths))
    batch.per_sequence["target"] = torch.arange(float(len(LENGTHS)))
    return batch


def train_step(engine: Engine, batch: Batch) -> dict[str, float]:
    """Mean token loss for a language model, mean squared error for a scalar one."""
    if engine.head == "language":
        n = max(1, int(batch.response_mask.sum()))
        stats = engine.accumulate_cross_entropy(batch, denominator=n)
    else:
        n = len(batch.lengths)
        stats = engine.accumulate_scores(
            batch, lambda x, part: ((x - part.per_sequence["target"]).square().sum() / n, {})
        )
    return stats | engine.step()


def memory(optimizer: Optimizer) -> dict[str, list[torch.Tensor]]:
    """The flat tensors that hold this rank's weights, gradients and optimizer state."""
    return {
        "parameters": [buffer.param_data for buffer in optimizer.buffers],
        "gradients": [buffer.grad_data for buffer in optimizer.buffers],
        "optimizer": list(optimizer.flat.values()),
    }


@contextmanager
def average_weights(engine: Engine):
    """Within, the model has the moving average of its weights."""
    own = [(p, p.detach().clone()) for core in engine.cores for p in core.parameters()]
    for weight, average in engine.optimizer.whole("ema"):
        weight.data.copy_(average)
    yield
    for weight, before in own:
        weight.data.copy_(before)
