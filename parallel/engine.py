"""One role's model, whatever the layout: `logprobs`, `values` and `scores` read it, accumulate_…
add a gradient, `step` applies it. All take the whole batch; the result is whole on every rank.

Within, each data-parallel rank works through its share in micro-batches by Megatron's pipeline
schedule; context-parallel ranks split each micro-batch, and answer for the tokens they hold. The
last stage's results come back by one all-reduce in which every number has one owner.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from tetrad.kernels.linear_logprob import linear_token_logprobs
from tetrad.kernels.linear_loss import linear_cross_entropy, linear_policy_loss
from tetrad.parallel import device
from tetrad.parallel.attention import Packing
from tetrad.parallel.colocate import Memory, Weights
from tetrad.parallel.model import unwrap
from tetrad.parallel.optimizer import Optimizer
from tetrad.parallel.packed import Batch, pack
from tetrad.parallel.topology import Topology

Loss = Callable[[Tensor, Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Part:
    """A micro-batch as this rank sees it."""

    groups: list[int]  # of the whole batch; none: a dummy, so that this rank joins every collective
    batch: Batch
    packing: Packing
    owned: Tensor  # (N,) bool the response tokens, or (S,) the sequences, this rank answers for
    stats: dict[str, Tensor] = field(default_factory=dict)  # of a loss made within the model

    @property
    def tokens(self) -> Tensor:
        """(R,) the response tokens this rank answers for."""
        return self.rows(self.batch.tokens)

    def rows(self, x: Tensor) -> Tensor:
        """(R,) of x (N,): its values at the response tokens this rank answers for."""
        return x[self.owned.to(x.device)].to(device.device())

    def spread(self, answers: Tensor) -> Tensor:
        """(R,) what a scalar head answers for -> (N,) or (S,), 0 elsewhere."""
        zeros = answers.new_zeros(len(self.owned), dtype=torch.float32)
        return zeros.masked_scatter(self.owned.to(answers.device), answers.float())


class Engine:
    """A model in one or several chunks, its place in the topology, and, when it is trained, its
    optimizer."""

    def __init__(
        self,
        chunks: list[nn.Module],
        topology: Topology,
        *,
        microbatch_tokens: int,
        optimizer: Optimizer | None = None,
        memory: Memory | None = None,
    ) -> None:
        # of each chunk: the module, what runs (when trained, a wrapper that sums gradients), the
        # Model inside
        self.modules = chunks
        self.chunks: list[nn.Module] = [*optimizer.ddp] if optimizer else chunks
        self.cores = [unwrap(chunk) for chunk in chunks]
        self.head, self.architecture = self.cores[0].head, self.cores[0].architecture
        self.config = self.cores[0].config
        self.topology = topology
        self.microbatch_tokens = microbatch_tokens
        self.optimizer, self.memory = optimizer, memory
        # a trained model's weights are in its memory already: the optimizer put them there
        self.weights = Weights(chunks, memory.weights if memory and not optimizer else None)
        self.p2p = P2PCommunicator(topology.groups.pp, self.config)
        vpp = topology.layout.vpp
        self.schedule = get_forward_backward_func(topology.pp, vpp if vpp > 1 else None)

    def twin(self, memory: Memory) -> "Engine":
        """Another model with the same modules and, for now, the same weights, not to be trained."""
        self.bring()
        return Engine(
            self.modules, self.topology, microbatch_tokens=self.microbatch_tokens, memory=memory
        )

    def logprobs(self, batch: Batch, temperature: float = 1.0) -> Tensor:
        """(N,) fp32 log p(token | all before it) of the response tokens, in nats; 0 elsewhere."""

        def read(hidden: Tensor, weight: Tensor, part: Part) -> Tensor:
            return linear_token_logprobs(  # type: ignore[return-value]
                hidden, weight, part.tokens, temperature=temperature, **self.vocabulary(weight)
            )

        return self._read(batch, read)

    def values(self, batch: Batch) -> Tensor:
        """(N,) fp32 value of the state before each response token; 0 elsewhere."""
        return self._read(batch)

    def scores(self, batch: Batch) -> Tensor:
        """(S,) fp32 score of each sequence, read at its last token."""
        return self._read(batch, per_sequence=True)

    def accumulate_policy_loss(
        self, batch: Batch, *, denominator: int, clip_range: float, temperature: float = 1.0,
        more: bool = False,
    ) -> dict:  # fmt: skip
        """Add the gradient of `linear_policy_loss` over the response tokens, given
        batch.per_token["old_logprobs"] and ["advantages"]; its statistics.

        more: another gradient is added before the next step."""

        def loss(hidden: Tensor, weight: Tensor, part: Part) -> Tensor:
            old_logprobs, advantages = (
                part.rows(part.batch.per_token[name]) for name in ("old_logprobs", "advantages")
            )
            mask = torch.ones_like(part.tokens, dtype=torch.bool)
            value, part.stats = linear_policy_loss(
                hidden, weight, part.tokens, old_logprobs, advantages, mask,
                temperature=temperature, clip_range=clip_range, denominator=denominator,
                **self.vocabulary(weight), **self._options_for_main_grad(hidden, weight, part),
            )  # fmt: skip
            return value

        return self._accumulate(batch, lambda value, part: (value, part.stats), loss, more=more)

    def accumulate_cross_entropy(
        self, batch: Batch, *, denominator: int, coef: float = 1.0, more: bool = False
    ) -> dict:
        """Add the gradient of coef * sum over the response tokens of -log p / denominator."""

        def loss(hidden: Tensor, unembedding: Tensor, part: Part) -> Tensor:
            nats = linear_cross_entropy(
                hidden, unembedding, part.tokens, denominator=denominator,
                **self.vocabulary(unembedding),
                **self._options_for_main_grad(hidden, unembedding, part, coef),
            )  # fmt: skip
            part.stats = {"nats_per_token": nats}
            return coef * nats

        return self._accumulate(batch, lambda value, part: (value, part.stats), loss, more=more)

    def accumulate_values(self, batch: Batch, loss: Loss) -> dict:
        """Add the gradient of loss(values (N,), part of batch), summed over the parts."""

        def finish(values: Tensor, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
            mine = part.batch.to(values.device)
            mine.response_mask = part.owned.to(values.device)
            return loss(part.spread(values), mine)

        return self._accumulate(batch, finish)

    def accumulate_scores(self, batch: Batch, loss: Loss) -> dict:
        """Add the gradient of loss(scores (S,), part of batch), summed over the parts."""

        def finish(scores: Tensor, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
            scores = part.spread(scores)
            if self.topology.cp > 1:  # a loss may compare sequences: each rank needs all of them
                group = self.topology.groups.cp
                scores = reduce_from_tensor_model_parallel_region(scores, group)
            return loss(scores, part.batch.to(scores.device))

        return self._accumulate(batch, finish, per_sequence=True)

    def step(self) -> dict[str, float]:
        """Update the weights with what was accumulated. Returns grad_norm and lr."""
        assert self.optimizer is not None, "this role is not trained"
        self.bring(with_optimizer=True)
        stats = self.optimizer.step()
        if self.memory:
            self.memory.gradients.changed = False
            if self.memory.next:  # weights may leave any time: let none be on their way
                self.optimizer.sync()
        return stats

    def bring(self, *, with_optimizer: bool = False, reading: bool = False) -> None:
        """Have the weights on the device and in the modules. with_optimizer: to change them and
        the optimizer's state. reading: have the weights follow that are read next."""
        if self.memory:
            self.memory.weights.bring()
            if with_optimizer:
                self.memory.optimizer.bring()
                self.memory.weights.changed = self.memory.optimizer.changed = True
            if reading and self.memory.next:
                self.memory.next.weights.prefetch()
        self.weights.show()

    def vocabulary(self, weight: Tensor) -> dict:
        """Which part of the vocabulary this rank's rows (V / tp, d) of the unembedding are, as the
        ops take it."""
        t = self.topology
        return {
            "vocab_start": t.tp_rank * len(weight),
            "vocab_size": self.architecture.vocab_size,
            "group": t.groups.tp if t.tp > 1 else None,
        }

    def _options_for_main_grad(
        self, hidden: Tensor, weight: Tensor, part: Part, coef: float = 1.0
    ) -> dict:
        """Options that make a loss add the unembedding's gradient to weight.main_grad, where
        Megatron sums gradients: a sum of its own would be written, rounded and added to that.
        coef: what the loss is multiplied by afterwards."""
        assert self.optimizer is not None
        last = self.cores[-1]
        looked_up = last.pre_process and last.share_embeddings_and_output_weights
        if not looked_up:  # autograd, for which the unembedding is a constant here, will not say so
            hidden.register_hook(lambda _: self.optimizer.announce(weight))
        main_grad = weight.main_grad  # type: ignore[attr-defined]
        return {"weight_grad": main_grad, "upstream": coef if part.groups else 0.0}

    @torch.no_grad()
    def _read(
        self, batch: Batch, read: Callable | None = None, per_sequence: bool = False
    ) -> Tensor:
        self.bring(reading=True)
        for core in self.cores:
            core.eval()
        parts = self._parts(batch, per_sequence)
        outputs = self._run(parts, read, lambda output, part, **_: output, forward_only=True)
        size = len(batch.lengths) if per_sequence else len(batch.tokens)
        result = torch.zeros(size, device=device.device())
        if self.topology.answers:
            for part, output in zip(parts, outputs):
                if part.groups:
                    index = batch.token_index(part.groups)[per_sequence][part.owned]
                    result[index.to(result.device)] = output
        dist.all_reduce(result)
        return result

    def _accumulate(
        self, batch: Batch, finish: Callable, read: Callable | None = None, *,
        per_sequence: bool = False, more: bool = False,
    ) -> dict:  # fmt: skip
        """finish(output of the last stage, part) -> the part's loss and statistics."""
        assert self.optimizer is not None, "this role is not trained"
        self.bring()
        if self.memory:
            self.memory.gradients.bring()
            self.memory.gradients.changed = True
            self.memory.optimizer.prefetch()
        for core in self.cores:
            core.train()
        parts = self._parts(batch, per_sequence)
        repeats = per_sequence and self.topology.cp_rank > 0  # what another rank says already

        def total(output: Tensor, part: Part) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value, stats = finish(output, part)
            share = 1.0 if part.groups else 0.0
            count = 0.0 if repeats else share
            stats = {name: count * x.detach() for name, x in {"loss": value, **stats}.items()}
            return share * value, torch.ones((), dtype=torch.int, device=output.device), stats

        with self.optimizer.accumulating(last=not more):
            outputs = self._run(parts, read, total, forward_only=False)
        return self._sum_stats(outputs)

    def _parts(self, batch: Batch, per_sequence: bool) -> list[Part]:
        """This data-parallel rank's micro-batches; never none, for even an empty share takes part
        in every collective, and as many as an interleaved pipeline asks for."""
        t = self.topology
        mine = batch.share(t.dp, self.microbatch_tokens)[t.dp_rank]
        parts = [self._part(groups, batch.select(groups), per_sequence) for groups in mine]
        blank = pack([[0]], [[]])
        blank.per_token = {k: x.new_zeros(1) for k, x in batch.per_token.items()}
        blank.per_sequence = {k: x.new_zeros(1) for k, x in batch.per_sequence.items()}
        multiple = t.pp if t.layout.vpp > 1 else 1
        while not parts or len(parts) % multiple:
            parts.append(self._part([], blank, per_sequence))
        return parts

    def _part(self, groups: list[int], batch: Batch, per_sequence: bool) -> Part:
        if per_sequence:
            owned = torch.ones(len(batch.lengths), dtype=torch.bool)
            rows = batch.cu_seqlens[1:] - 1
        else:
            owned = batch.response_mask.clone()
            rows = owned.nonzero()[:, 0] - 1  # the token before predicts
        layout, group = self.topology.layout, self.topology.groups.cp
        packing = Packing(
            batch.lengths.tolist(), rows, where=device.device(),
            multiple=layout.token_multiple, group=group,
        )  # fmt: skip
        if packing.is_here is not None:
            owned[owned.nonzero()[:, 0]] = packing.is_here
        return Part(groups, batch, packing, owned)

    def _run(
        self, parts: list[Part], read: Callable | None, finish: Callable, forward_only: bool
    ) -> list:
        """Megatron's schedule over the parts; what `finish` returned, on the last stage."""

        def step(iterator, model):
            part = next(iterator)
            reader = partial(read, part=part) if read else None
            output = model(part.packing.take(part.batch.tokens), part.packing, reader)
            return output, partial(finish, part=part)

        iterators = [iter(parts) for _ in self.chunks]
        return self.schedule(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
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
        if self.topology.answers:
            table = torch.stack([torch.stack([o[n].double() for n in names[0]]) for o in outputs])
            sums, tops = table.sum(0), table.max(0).values
        dist.all_reduce(sums)
        dist.all_reduce(tops, dist.ReduceOp.MAX)
        pairs = zip(names[0], sums.tolist(), tops.tolist())
        return {name: top if name.endswith("_max") else s for name, s, top in pairs}
