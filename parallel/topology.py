"""TP x PP x CP x DP: process groups, this rank's place in them, and the seeds that follow."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tetrad.parallel import device
from tetrad.parallel.settings import Layout


@dataclass(frozen=True)
class Topology:
    """One layout's process groups, and this rank's place in them; tp varies fastest, then cp, dp,
    pp."""

    groups: ProcessGroupCollection
    layout: Layout

    @property
    def tp(self) -> int:
        return self.layout.tp

    @property
    def pp(self) -> int:
        return self.layout.pp

    @property
    def cp(self) -> int:
        return self.layout.cp

    @property
    def dp(self) -> int:
        return self.groups.dp.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def answers(self) -> bool:
        """Whether this rank has results of its replica that no other rank has: one does, or with
        context parallelism one for each part of the tokens."""
        return self.is_last_stage and self.tp_rank == 0


def initialize(layout: Layout) -> Topology:
    """Join the processes that torchrun started (or be alone) and split them into groups.

    Raises ValueError when the layout does not divide the number of processes.
    """
    if not device.installed():
        raise RuntimeError("call tetrad.parallel.device.install() before importing this module")
    layout.dp(int(os.environ.get("WORLD_SIZE", 1)))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(device.backend())
        else:
            store = dist.HashStore()
            dist.init_process_group(device.backend(), store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tp, layout.pp, context_parallel_size=layout.cp, create_gloo_process_groups=False
        )
    topology = Topology(ProcessGroupCollection.use_mpu_process_groups(), layout)
    sizes = tuple(getattr(topology.groups, name).size() for name in ("tp", "pp", "cp"))
    if sizes != (layout.tp, layout.pp, layout.cp):
        raise ValueError(f"this process already runs at tp, pp, cp {sizes}, not at {layout}")
    seed_dropout(0, 0)
    return topology


def arrange(layout: Layout) -> Topology:
    """The groups of another layout on the same processes, for a model beside those of
    `initialize`. All ranks call it. Raises ValueError when it does not divide their number."""
    world = dist.get_world_size()
    ranks = RankGenerator(
        tp=layout.tp, ep=1, dp=layout.dp(world), pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp"
    )
    single = _group([[rank] for rank in range(world)])
    pipelines = ranks.get_ranks("pp")
    c = ProcessGroupCollection()
    c.tp, c.pp, c.cp, c.dp, c.mp, c.dp_cp, c.tp_cp, c.tp_dp_cp = (
        _group(ranks.get_ranks(name))
        for name in ("tp", "pp", "cp", "dp", "tp-pp", "dp-cp", "tp-cp", "tp-dp-cp")
    )
    # a stage without an embedding has a group of its own: None would mean parallel_state's
    c.embd = _group([sorted({p[0], p[-1]}) for p in pipelines]) or single
    c.pos_embd = _group([p[:1] for p in pipelines]) or single
    c.ep, c.expt_tp, c.expt_dp, c.tp_ep, c.tp_ep_pp = single, c.tp, c.dp_cp, c.tp, c.mp
    c.intra_dp_cp, c.intra_expt_dp, c.intra_dist_opt = c.dp_cp, c.dp_cp, dist.group.WORLD
    return Topology(c, layout)


def _group(all_ranks: list[list[int]]) -> dist.ProcessGroup | None:
    """Create these groups; the one that this rank is in."""
    groups = [(ranks, dist.new_group(ranks)) for ranks in all_ranks]
    return next((group for ranks, group in groups if dist.get_rank() in ranks), None)


def seed_dropout(seed: int, step: int) -> None:
    """Make dropout a function of (seed, step) and this rank's stage and replica (tp ranks share
    what is not split): no generator state outlives a step."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
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
