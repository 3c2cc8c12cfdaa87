"""TP x PP x DP: process groups, this rank's place in them, and the seeds that follow from it."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tetrad.parallel import device


@dataclass(frozen=True)
class Topology:
    """Process groups of tensor (tp), pipeline (pp) and data parallelism (dp); tp varies fastest."""

    groups: ProcessGroupCollection
    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank reports the results of its model replica: one rank of each does."""
        return self.is_last_stage and self.tp_rank == 0


def initialize(tp: int = 1, pp: int = 1) -> Topology:
    """Join the processes that torchrun started (or be alone) and split them into groups.

    Raises ValueError when tp * pp does not divide the number of processes.
    """
    if not device.installed():
        raise RuntimeError("call tetrad.parallel.device.install() before importing this module")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, size in (("tp", tp), ("pp", pp)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")
    if world % (tp * pp):
        raise ValueError(f"tp {tp} x pp {pp} does not divide the {world} processes of this run")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(device.backend())
        else:
            store = dist.HashStore()
            dist.init_process_group(device.backend(), store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if (groups.tp.size(), groups.pp.size()) != (tp, pp):
        raise ValueError(
            f"this process already runs at tp {groups.tp.size()} x pp {groups.pp.size()}, "
            f"not tp {tp} x pp {pp}"
        )
    seed_dropout(0, 0)
    return Topology(
        groups, tp, pp, groups.dp.size(), groups.tp.rank(), groups.pp.rank(), groups.dp.rank()
    )


def seed_dropout(seed: int, step: int) -> None:
    """Make dropout a function of (seed, step) and this rank's stage and replica (tp ranks share
    what is not split): no generator state outlives a step."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank()
    state = mixed_seed(seed, step, stage, replica) % 2**31
    model_parallel_cuda_manual_seed(state, force_reset_rng=True)


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers (a polynomial hash, the same on every machine)."""
    h = 0
    for n in numbers:
        h = (h * 6364136223846793005 + n + 1442695040888963407) % 2**63
        h ^= h >> 29
    return h


def generator(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on these numbers alone: (seed, step, …)."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


def shutdown() -> None:
    """Leave the process groups."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
