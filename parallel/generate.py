"""Sampling on the training weights: prompts in, responses and their log-probs out, in any layout.

Prompts are prefilled as one packed batch; then every row takes one token a step through a
key-value cache, and leaves the batch when it ends. Random numbers belong to (seed, row, step): the
layout does not change a sample, nor do the rows beside it.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tetrad.kernels.logprob import token_logprobs
from tetrad.kernels.products import matmul
from tetrad.parallel import device
from tetrad.parallel.attention import KVCache, Packing
from tetrad.parallel.engine import Engine
from tetrad.parallel.topology import generator


@dataclass
class Samples:
    """Responses to prompts, in the order of the prompts; the same on every rank."""

    responses: list[list[int]]  # with the final eos, if one was sampled
    logprobs: list[Tensor]  # fp32, nats, of each response token at the sampling temperature
    ended: list[bool]  # by eos; otherwise cut at max_new tokens


@torch.no_grad()
def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    eos_id: int,
    temperature: float = 1.0,
    seed: Sequence[int] = (0,),
    rows_at_once: int = 256,
) -> Samples:
    """Sample a response of at most max_new tokens to each prompt.

    temperature 0 takes the most likely token (its log-prob is then that at temperature 1).
    rows_at_once bounds the key-value cache of a rank. Raises ValueError when a prompt is empty or
    does not leave room for max_new tokens.
    """
    limit = engine.architecture.max_length
    for i, prompt in enumerate(prompts):
        if not prompt or len(prompt) + max_new > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; it needs at least 1, and with "
                f"max_new {max_new} at most the model's max_length {limit}"
            )
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must not be negative")
    R, where = len(prompts), device.device()
    uniform = torch.rand(R, max_new, generator=generator(*seed), dtype=torch.float64)
    # all in fp64, which holds token ids and log-probs: they travel together
    tokens = torch.zeros(R, max_new, dtype=torch.float64, device=where)
    logprobs = torch.zeros_like(tokens)
    lengths = torch.zeros(R, dtype=torch.float64, device=where)
    replicas = engine.topology.groups.dp_cp  # context-parallel ranks share the rows, not the tokens
    mine = range(replicas.rank(), R, replicas.size())
    engine.bring(reading=True)
    for i in range(0, len(mine), rows_at_once):
        rows = list(mine[i : i + rows_at_once])
        decoder = _Decoder(engine, [list(prompts[r]) for r in rows], max_new, eos_id, temperature)
        with _whole_sequences(engine):
            decoder.run(uniform[rows])
        if engine.topology.answers:
            tokens[rows], logprobs[rows] = decoder.tokens, decoder.logprobs
            lengths[rows] = decoder.lengths.double()
    for x in (tokens, logprobs, lengths):
        dist.all_reduce(x)  # every row has one owner
    counts = lengths.long().tolist()
    responses = [row[:n] for row, n in zip(tokens.long().tolist(), counts)]
    return Samples(
        responses,
        [row[:n].float() for row, n in zip(logprobs.cpu(), counts)],
        [bool(r) and r[-1] == eos_id for r in responses],
    )


class _Decoder:
    """The rows of one rank, one token a step."""

    def __init__(
        self,
        engine: Engine,
        prompts: list[list[int]],
        max_new: int,
        eos_id: int,
        temperature: float,
    ) -> None:
        self.engine, self.prompts, self.max_new = engine, prompts, max_new
        self.eos_id, self.temperature = eos_id, temperature
        where, R = device.device(), len(prompts)
        self.cache = KVCache(max(map(len, prompts)) + max_new)
        self.tokens = torch.zeros(R, max_new, dtype=torch.float64, device=where)
        self.logprobs = torch.zeros_like(self.tokens)
        self.lengths = torch.zeros(R, dtype=torch.long, device=where)

    def run(self, uniform: Tensor) -> None:
        """Fill tokens, logprobs (R, max_new) and lengths (R,), given uniform (R, max_new)."""
        where = device.device()
        uniform = uniform.to(where)
        active = torch.arange(len(self.prompts), device=where)
        feed = torch.tensor([t for p in self.prompts for t in p], device=where)
        lengths = [len(p) for p in self.prompts]
        held = torch.zeros_like(active)  # tokens of each active row in the cache
        for step in range(self.max_new):
            last = torch.tensor(lengths).cumsum(0) - 1
            packing = Packing(lengths, last, where=where, cache=self.cache, start=held)
            draw = partial(self._draw, uniform=uniform[active, step])
            chosen, logprobs = self._broadcast(self._forward(feed, packing, draw), len(active))
            self.tokens[active, step], self.logprobs[active, step] = chosen, logprobs
            self.lengths[active] += 1
            going = (chosen != self.eos_id).nonzero()[:, 0]
            held = (held + torch.tensor(lengths, device=where))[going]
            active, feed = active[going], chosen[going].long()
            lengths = [1] * len(active)
            if not lengths:
                break
            if len(lengths) < len(chosen):
                self.cache.keep(going)

    def _forward(self, tokens: Tensor, packing: Packing, draw: Callable) -> Tensor:
        """Through the chunks of the pipeline; what `draw` made on the last."""
        engine, t = self.engine, self.engine.topology
        shape = (len(tokens), 1, engine.config.hidden_size)
        for i, (core, chunk) in enumerate(zip(engine.cores, engine.chunks)):
            is_first = t.is_first_stage and i == 0
            is_last = t.is_last_stage and i == len(engine.cores) - 1
            core.set_input_tensor(engine.p2p.recv_forward(shape, is_first))
            output = chunk(tokens, packing, draw)
            engine.p2p.send_forward(output, is_last)
        return output

    def _draw(self, hidden: Tensor, weight: Tensor, uniform: Tensor) -> Tensor:
        """(2, R) fp64: sampled tokens and their log-probs, both from one product."""
        logits = matmul(hidden, weight.t())
        chosen = self._sample(logits, uniform)
        logprobs: Tensor = token_logprobs(  # type: ignore[assignment]
            logits, chosen, temperature=self.temperature or 1.0, **self.engine.vocabulary(weight)
        )
        return torch.stack([chosen.double(), logprobs.double()])

    def _broadcast(self, drawn: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """What the last stage has drawn, to all ranks of this replica: tokens, log-probs (R,)."""
        t = self.engine.topology
        if not t.is_last_stage:
            drawn = torch.empty(2, rows, dtype=torch.float64, device=drawn.device)
        if t.tp * t.pp > 1:
            speaker = dist.get_global_rank(t.groups.mp, (t.pp - 1) * t.tp)
            dist.broadcast(drawn, speaker, group=t.groups.mp)
        return drawn[0], drawn[1]

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(R,) tokens of the whole vocabulary, of which this rank has the logits of a part."""
        t = self.engine.topology
        if t.tp > 1:
            shards = [torch.empty_like(logits) for _ in range(t.tp)]
            dist.all_gather(shards, logits.contiguous(), group=t.groups.tp)
            logits = torch.cat(shards, dim=-1)
        return sample(logits[:, : self.engine.architecture.vocab_size], uniform, self.temperature)


def sample(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """(R,) tokens by inverting the cumulative distribution of logits (R, V) at `uniform` (R,), in
    fp64; the most likely ones at temperature 0."""
    logits = logits.double()
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).cumsum(-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return chosen.clamp(max=logits.shape[-1] - 1)


@contextmanager
def _whole_sequences(engine: Engine):
    """Switch sequence parallelism off, for steps of one token cannot be split; and the exchange of
    shapes between stages, which know them."""
    switched = []
    for core in engine.cores:
        core.eval()
        for module in (core.config, *core.modules()):
            for name in ("sequence_parallel", "reduce_scatter_embeddings", "variable_seq_lengths"):
                if getattr(module, name, False) is True:
                    setattr(module, name, False)
                    switched.append((module, name))
    try:
        yield
    finally:
        for module, name in switched:
            setattr(module, name, True)
