"""Megatron's gradient buffers and distributed Adam, with a learning-rate schedule, as one `step`.

The ranks that hold the same weights (dp x cp) divide every bucket of the flat gradient buffer: each
reduces one piece of it, and for that piece alone keeps the state of the optimizer, fp32, one flat
tensor a kind: "main" (the weights, unless the model itself is fp32), "exp_avg", "exp_avg_sq" and,
when asked for, "ema", their average over the steps. Addresses never change.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, USING_TE_OPTIMIZER
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tetrad.parallel import device
from tetrad.parallel.colocate import Memory
from tetrad.parallel.model import PRECISIONS, unwrap
from tetrad.parallel.settings import Schedule
from tetrad.parallel.topology import Topology

GATHERED_AT_ONCE = 2**25  # elements of each rank's piece that `whole` brings together on the device


class Optimizer:
    """The gradient buffers of one model, and the Adam that consumes them.

    overlap: sum the gradients while the last micro-batch computes them, and collect the new weights
    while the next forward pass runs.
    ema_decay: keep an average of the weights, of which each step keeps this share.
    memory: where weights, gradients and state are to be; default: wherever there is room.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        topology: Topology,
        schedule: Schedule,
        steps: int,
        precision: str,
        *,
        overlap: bool = False,
        ema_decay: float | None = None,
        memory: Memory | None = None,
    ) -> None:
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; it must be at least 0 and less than 1")
        s = schedule
        self.groups, self.overlap, self.ema_decay = topology.groups, overlap, ema_decay
        self.clip_norm = s.clip_norm
        self.config = unwrap(chunks[0]).config
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            # Megatron would collect weights when a forward pass first asks for them, but a rank
            # that has none to run must join in at the same place: we start it all in `step`
            align_param_gather=overlap,
        )
        self.ddp = [
            DistributedDataParallel(
                self.config, ddp_config, chunk, disable_bucketing=i > 0, pg_collection=self.groups
            )
            for i, chunk in enumerate(chunks)
        ]
        self.buffers = [buffer for ddp in self.ddp for buffer in ddp.buffers]
        if memory:
            self._move_into(memory)
        with torch.no_grad():  # its shards of fp32 weights are views: let them be leaves
            self.adam = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=s.lr,
                    min_lr=s.final_lr * s.lr,
                    weight_decay=s.weight_decay,
                    adam_beta1=s.beta1,
                    adam_beta2=s.beta2,
                    adam_eps=s.eps,
                    bf16=precision == "bf16",
                    params_dtype=PRECISIONS[precision],
                    use_distributed_optimizer=True,
                ),
                self.ddp,
                use_gloo_process_groups=False,
                pg_collection=self.groups,
            )
        self.schedule = OptimizerParamScheduler(
            self.adam,
            init_lr=s.warmup_from * s.lr,
            max_lr=s.lr,
            min_lr=s.final_lr * s.lr,
            lr_warmup_steps=min(s.warmup_steps, steps - 1),
            lr_decay_steps=max(steps, 1),
            lr_decay_style=s.decay,
            start_wd=s.weight_decay,
            end_wd=s.weight_decay,
            wd_incr_steps=max(steps, 1),
            wd_incr_style="constant",
        )
        self._allocate(memory)
        self.zero_grad()
        self._collect_weights()  # or the first forward pass would ask for it
        self.sync()

    @torch.no_grad()
    def _move_into(self, memory: Memory) -> None:
        """Have Megatron's flat buffers, and the views of them, in the memory of this role."""
        for buffer in self.buffers:
            weights = memory.weights.allocate(buffer.numel, buffer.param_dtype)
            buffer.param_data = weights.copy_(buffer.param_data)
            buffer.grad_data = memory.gradients.allocate(buffer.numel, buffer.grad_dtype)
            for bucket, (start, end) in zip(buffer.buckets, buffer.bucket_indices):
                bucket.param_data = weights[start:end]
                bucket.grad_data = buffer.grad_data[start:end]
            for weight, (start, end, _) in buffer.param_index_map.items():
                weight.data = weights[start:end].view(weight.shape)
                weight.main_grad = buffer.grad_data[start:end].view(weight.shape)
        for ddp in self.ddp:
            for group in ddp.bucket_groups:
                group.cached_param_buffer_shard_list = [None] * len(group.buckets)
                group.cached_grad_buffer_shard_list = [None] * len(group.buckets)

    @torch.no_grad()
    def _allocate(self, memory: Memory | None) -> None:
        """Flat state, of which Adam's tensors become views."""
        ranks, rank = self.groups.dp_cp.size(), self.groups.dp_cp.rank()
        adam = self.adam.optimizer
        fused = torch.cuda.is_available() and not HAVE_APEX_OR_TE
        for group in adam.param_groups if fused else ():
            group.update(fused=True, foreach=False)
        buckets = [(buffer, b) for buffer in self.buffers for b in buffer.buckets]
        mine = [b.param_data.chunk(ranks)[rank] for _, b in buckets]  # of the model's weights
        kinds = ["exp_avg", "exp_avg_sq"] + ["ema"] * (self.ema_decay is not None)
        in_place = mine[0].dtype == torch.float32
        if not in_place:
            kinds.insert(0, "main")
        sizes = [len(piece) for piece in mine]
        zeros = memory.optimizer.allocate if memory else _zeros
        self.flat = {kind: zeros(sum(sizes), torch.float32) for kind in kinds}
        self.pieces = {kind: list(flat.split(sizes)) for kind, flat in self.flat.items()}
        # where each weight lies in its bucket
        self.places = [
            {p: [x - b.offset for x in buffer.param_index_map[p][:2]] for p in b.params_list}
            for buffer, b in buckets
        ]
        # and what of it this rank holds: weight, bucket, where in the piece, where in the weight
        self.held = []
        for i, places in enumerate(self.places):
            begin, stop = rank * sizes[i], (rank + 1) * sizes[i]
            for weight, (start, end) in places.items():
                a, b = max(start, begin), min(end, stop)
                if a < b:
                    here, there = slice(a - begin, b - begin), slice(a - start, b - start)
                    self.held.append((weight, i, here, there))
        (distributed,) = self.adam.chained_optimizers
        for weight, i, here, _ in self.held:
            group, at = distributed.model_param_group_index_map[weight]
            main = adam.param_groups[group]["params"][at]
            if not in_place:
                main.data = self.pieces["main"][i][here].copy_(main)
            state = {kind: self.pieces[kind][i][here] for kind in ("exp_avg", "exp_avg_sq")}
            if not HAVE_APEX_OR_TE:  # torch counts the steps of each tensor
                state["step"] = torch.zeros((), device=main.device if fused else "cpu")
            adam.state[main] = state
        if in_place:
            self.pieces["main"] = mine
        for average, weights in zip(self.pieces.get("ema", ()), self.pieces["main"]):
            average.copy_(weights)

    def zero_grad(self) -> None:
        for ddp in self.ddp:
            ddp.zero_grad_buffer()
        self.adam.zero_grad()

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around one pass of micro-batches. With overlap the last micro-batch of the `last` pass
        before a step sums the gradients over the ranks; else `step` does."""
        self.config.no_sync_func = self._no_sync if last else nullcontext
        with nullcontext() if last else self._no_sync():
            yield

    def announce(self, weight: Tensor) -> None:
        """Say that this micro-batch has added to weight.main_grad all that it will, as Megatron's
        hook says of a gradient that autograd made: the sum over the ranks may begin."""
        for ddp in self.ddp if self.overlap else ():
            if weight in ddp.param_to_bucket_group:
                group = ddp.param_to_bucket_group[weight]
                group.register_grad_ready(weight, ddp.force_all_reduce)

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        with ExitStack() as stack:
            for ddp in self.ddp:
                stack.enter_context(ddp.no_sync())
            yield

    def step(self) -> dict[str, float]:
        """Sum what was accumulated over all ranks, clip, update, and empty the gradient buffer.

        Raises FloatingPointError, on all ranks alike and with the weights as they were, when the
        gradient is not finite."""
        self.sync()
        finalize_model_grads(self.ddp, pg_collection=self.groups)
        self.adam.prepare_grads()
        norm = self._grad_norm()
        grad_norm = norm.item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}; the newest checkpoint is good")
        if self.clip_norm:
            clip_grads_with_norm_(self.adam.get_parameters(), self.clip_norm, norm)
        lr = self.adam.param_groups[0]["lr"]
        self.adam.step_with_ready_grads()
        if self.ema_decay is not None:
            for average, weights in zip(self.pieces["ema"], self.pieces["main"]):
                average.lerp_(weights, 1 - self.ema_decay)
        self._collect_weights()
        self.zero_grad()
        self.schedule.step(1)
        return {"grad_norm": grad_norm, "lr": lr}

    def _grad_norm(self) -> Tensor:
        """Of all gradients, each element counted once: not the copies that tp ranks or a tied
        embedding hold."""
        (distributed,) = self.adam.chained_optimizers
        mine = get_total_norm(distributed.get_main_grads_for_grad_norm()).to(device.device())
        square = mine.double().square()
        dist.all_reduce(square)
        return square.sqrt().float()

    def _collect_weights(self) -> None:
        """With overlap: begin to bring the ranks' new weights together, in the order of use."""
        for ddp in self.ddp if self.overlap else ():
            for group in reversed(ddp.bucket_groups):
                group.start_param_sync()

    def sync(self) -> None:
        """Wait for the weights of the last step. A module waits for its own before it runs;
        whoever reads or moves weights otherwise calls this first."""
        for ddp in self.ddp if self.overlap else ():
            for group in ddp.bucket_groups:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    @torch.no_grad()
    def whole(self, kind: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each weight of this rank's model and its whole state of one kind, fp32 on the host and
        valid until the next; a collective of the ranks that share the weights."""
        group = self.groups.dp_cp
        for places, piece in zip(self.places, self.pieces[kind]):
            host = torch.empty(group.size(), len(piece))
            for part, mine in zip(host.split(GATHERED_AT_ONCE, 1), piece.split(GATHERED_AT_ONCE)):
                gathered = mine.new_empty(part.numel())
                dist.all_gather_into_tensor(gathered, mine, group)
                part.copy_(gathered.view(part.shape))
            for weight, (start, end) in places.items():
                yield weight, host.view(-1)[start:end].view(weight.shape)

    @torch.no_grad()
    def restore(self, kind: str, states: Mapping[nn.Parameter, Tensor]) -> None:
        """Take this rank's piece of each weight's whole state of one kind, in place."""
        for weight, i, here, there in self.held:
            self.pieces[kind][i][here].copy_(states[weight].flatten()[there])

    def restore_schedule(self, schedule: dict) -> None:
        """Go on from the step at which `self.schedule.state_dict()` was taken."""
        self.schedule.num_steps = 0  # what it loads, it adds
        self.schedule.load_state_dict(schedule)
        for state in self.adam.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self.schedule.num_steps)
        for group in self.adam.param_groups if HAVE_APEX_OR_TE else ():
            group["step"] = self.schedule.num_steps


def _zeros(n: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(n, dtype=dtype, device=device.device())


def adam_from() -> str:
    """Whose Adam takes the steps on this machine, and why."""
    if HAVE_APEX_OR_TE:
        return "Transformer Engine" if USING_TE_OPTIMIZER else "NVIDIA apex"
    kind = "PyTorch's fused" if torch.cuda.is_available() else "PyTorch's"
    return f"{kind}: neither Transformer Engine nor NVIDIA apex is installed"
