"""One role's model, whatever the layout: `logprobs`, `values` and `scores` read it, accumulate_…
add a gradient, `step` applies it. All take the whole batch; the result is whole on every rank.

Within, each data-parallel rank works through its share in micro-batches by Megatron's pipeline
schedule; the last stage's results come back by one all-reduce in which every number has one owner.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from tetrad.kernels.logprob import token_logprobs
from tetrad.parallel import device
from tetrad.parallel.attention import Packing
from tetrad.parallel.model import unwrap
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.packed import Batch, pack
from tetrad.parallel.topology import Topology

Loss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]


class Engine:
    """A model, its place in the topology, and, when it is trained, its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        *,
        microbatch_tokens: int,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.model = optimizer.ddp if optimizer else model
        self.core = unwrap(model)
        self.topology = topology
        self.microbatch_tokens = microbatch_tokens
        self.optimizer = optimizer
        self.p2p = P2PCommunicator(topology.groups.pp, self.core.config)
        self.schedule = get_forward_backward_func(pp_size=topology.pp, vp_size=None)

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """(N,) fp32 log p(token | all before it) of the response tokens, in nats; 0 elsewhere."""
        return self._read(batch, self._logprobs(temperature), per_sequence=False)

    def values(self, batch: Batch) -> Tensor:
        """(N,) fp32 value of the state before each response token; 0 elsewhere."""
        return self._read(batch, _per_token, per_sequence=False)

    def scores(self, batch: Batch) -> Tensor:
        """(S,) fp32 score of each sequence, read at its last token."""
        return self._read(batch, _per_sequence, per_sequence=True)

    def accumulate_logprobs(self, batch: Batch, loss: Loss, temperature: float = 1.0) -> dict:
        """Add the gradient of loss(logprobs (N,), part of batch), summed over the parts."""
        return self._accumulate(batch, self._logprobs(temperature), loss, per_sequence=False)

    def accumulate_values(self, batch: Batch, loss: Loss) -> dict:
        """Add the gradient of loss(values (N,), part of batch), summed over the parts."""
        return self._accumulate(batch, _per_token, loss, per_sequence=False)

    def accumulate_scores(self, batch: Batch, loss: Loss) -> dict:
        """Add the gradient of loss(scores (S,), part of batch), summed over the parts."""
        return self._accumulate(batch, _per_sequence, loss, per_sequence=True)

    def step(self) -> dict[str, float]:
        """Update the weights with what was accumulated. Returns grad_norm and lr."""
        assert self.optimizer is not None, "this role is not trained"
        return self.optimizer.step()

    def logprobs_of(self, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """(R,) fp32 log-probs of tokens (R,), from this rank's columns (R, V / tp) of the logits:
        the one place that log-probs come from."""
        t = self.topology
        return token_logprobs(  # type: ignore[return-value]
            logits,
            tokens,
            temperature=temperature,
            vocab_start=t.tp_rank * logits.shape[-1],
            vocab_size=self.core.architecture.vocab_size,
            group=t.groups.tp if t.tp > 1 else None,
        )

    def _logprobs(self, temperature: float) -> Callable[[Tensor, Batch], Tensor]:
        def from_logits(logits: Tensor, part: Batch) -> Tensor:
            tokens = part.tokens[part.response_mask].to(logits.device)
            return _per_token(self.logprobs_of(logits, tokens, temperature), part)

        return from_logits

    @torch.no_grad()
    def _read(self, batch: Batch, read: Callable, per_sequence: bool) -> Tensor:
        self.core.eval()
        parts = self._parts(batch)

        def collect(output: Tensor, part: Batch, non_loss_data: bool = True) -> Tensor:
            return read(output, part)

        outputs = self._run([part for _, part in parts], collect, per_sequence, forward_only=True)
        size = len(batch.lengths) if per_sequence else len(batch.tokens)
        result = torch.zeros(size, device=device.device())
        if self.topology.speaks:
            for (groups, _), output in zip(parts, outputs):
                if groups:
                    result[batch.token_index(groups)[per_sequence].to(result.device)] = output
        dist.all_reduce(result)
        return result

    def _accumulate(self, batch: Batch, read: Callable, loss: Loss, per_sequence: bool) -> dict:
        assert self.optimizer is not None, "this role is not trained"
        self.core.train()
        parts = self._parts(batch)
        share = 1.0 if parts[0][0] else 0.0  # an idle rank's blank sequence counts for nothing

        def total(output: Tensor, part: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value, stats = loss(read(output, part), part.to(output.device))
            stats = {name: share * x.detach() for name, x in {"loss": value, **stats}.items()}
            return share * value, torch.ones((), dtype=torch.int, device=output.device), stats

        outputs = self._run([part for _, part in parts], total, per_sequence, forward_only=False)
        return self._sum_stats(outputs)

    def _parts(self, batch: Batch) -> list[tuple[list[int], Batch]]:
        """This data-parallel rank's micro-batches with the groups they hold; never none at all."""
        mine = batch.share(self.topology.dp, self.microbatch_tokens)[self.topology.dp_rank]
        if not mine:  # fewer groups than ranks: an empty share still takes part in every collective
            blank = pack([[0]], [[]])
            blank.per_token = {k: x.new_zeros(1) for k, x in batch.per_token.items()}
            blank.per_sequence = {k: x.new_zeros(1) for k, x in batch.per_sequence.items()}
            return [([], blank)]
        return [(groups, batch.select(groups)) for groups in mine]

    def _run(self, parts: list[Batch], finish: Callable, per_sequence: bool, forward_only: bool):
        """Megatron's schedule over the parts; what `finish` returned, on the last stage."""
        where = device.device()

        def step(iterator, model):
            part = next(iterator)
            if per_sequence:
                rows = part.cu_seqlens[1:] - 1
            else:
                rows = part.response_mask.nonzero()[:, 0] - 1
            packing = Packing(part.cu_seqlens.to(where), rows.to(where))
            output = model(part.tokens.to(where), packing)
            return output, lambda out, **kw: finish(out, part, **kw)

        return self.schedule(
            forward_step_func=step,
            data_iterator=iter(parts),
            model=[self.model],
            num_microbatches=len(parts),
            seq_length=1,  # unused: lengths vary
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            p2p_communicator=self.p2p,
            pg_collection=self.topology.groups,
        )

    def _sum_stats(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Statistics over all micro-batches and ranks: sums, or maxima of names in _max."""
        names: list = [sorted(outputs[0]) if outputs else None]
        if self.topology.pp > 1:
            last = dist.get_global_rank(self.topology.groups.pp, self.topology.pp - 1)
            dist.broadcast_object_list(names, last, group=self.topology.groups.pp)
        sums = torch.zeros(len(names[0]), dtype=torch.float64, device=device.device())
        tops = torch.full_like(sums, -torch.inf)
        if self.topology.speaks:
            table = torch.stack([torch.stack([o[n].double() for n in names[0]]) for o in outputs])
            sums, tops = table.sum(0), table.max(0).values
        dist.all_reduce(sums)
        dist.all_reduce(tops, dist.ReduceOp.MAX)
        pairs = zip(names[0], sums.tolist(), tops.tolist())
        return {name: top if name.endswith("_max") else s for name, s, top in pairs}


def _per_token(answers: Tensor, part: Batch) -> Tensor:
    """(R,) answers for the response tokens -> (T,), 0 elsewhere."""
    zeros = answers.new_zeros(len(part.tokens), dtype=torch.float32)
    return zeros.masked_scatter(part.response_mask.to(answers.device), answers.float())


def _per_sequence(answers: Tensor, part: Batch) -> Tensor:
    return answers
