"""Megatron's gradient buffers and Adam, with a learning-rate schedule, as one `step`."""

import math

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from tetrad.parallel.model import PRECISIONS, unwrap
from tetrad.parallel.settings import Schedule
from tetrad.parallel.topology import Topology


class Optimizer:
    """The gradient buffer of one model, and the Adam that consumes it."""

    def __init__(
        self, model: nn.Module, topology: Topology, schedule: Schedule, steps: int, precision: str
    ) -> None:
        s = schedule
        config = unwrap(model).config
        self.groups = topology.groups
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            model,
            pg_collection=topology.groups,
        )
        self.adam = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=s.lr,
                min_lr=s.final_lr * s.lr,
                weight_decay=s.weight_decay,
                adam_beta1=s.beta1,
                adam_beta2=s.beta2,
                adam_eps=s.eps,
                clip_grad=s.clip_norm,
                bf16=precision == "bf16",
                params_dtype=PRECISIONS[precision],
            ),
            [self.ddp],
            use_gloo_process_groups=False,
            pg_collection=topology.groups,
        )
        config.grad_scale_func = self.adam.scale_loss
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
        self.zero_grad()

    def zero_grad(self) -> None:
        self.ddp.zero_grad_buffer()
        self.adam.zero_grad()

    def step(self) -> dict[str, float]:
        """Sum what was accumulated over all ranks, clip, update, and empty the gradient buffer.

        Raises FloatingPointError, on all ranks alike, when the gradient is not finite."""
        finalize_model_grads([self.ddp], pg_collection=self.groups)
        lr = self.adam.param_groups[0]["lr"]
        _, grad_norm, _ = self.adam.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"gradient norm is {grad_norm}; the newest checkpoint is good")
        self.zero_grad()
        self.schedule.step(1)
        return {"grad_norm": float(grad_norm), "lr": lr}
