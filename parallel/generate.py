"""Sampling on the training weights: prompts in, responses and their log-probs out, in any layout.

Prompts are prefilled as one packed batch; then every row takes one token a step through a
key-value cache, and leaves the batch when it ends. Random numbers belong to (seed, row, step): the
layout does not change a sample, nor do the rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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
    limit = engine.core.architecture.max_length
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
    tokens = torch.zeros(R, max_new, dtype=torch.float64, device=where)
    logprobs = torch.zeros_like(tokens)
    lengths = torch.zeros(R, dtype=torch.float64, device=where)
    mine = range(engine.topology.dp_rank, R, engine.topology.dp)
    for i in range(0, len(mine), rows_at_once):
        rows = list(mine[i : i + rows_at_once])
        decoder = _Decoder(engine, [list(prompts[r]) for r in rows], max_new, eos_id, temperature)
        decoder.run(uniform[rows])
        if engine.topology.speaks:
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
        self.engine.core.eval()
        uniform = uniform.to(where)
        active = torch.arange(len(self.prompts), device=where)
        feed = torch.tensor([t for p in self.prompts for t in p], device=where)
        fed = torch.tensor([len(p) for p in self.prompts], device=where)
        held = torch.zeros_like(fed)  # tokens of each active row in the cache
        for step in range(self.max_new):
            bounds = torch.nn.functional.pad(fed.cumsum(0), (1, 0))
            packing = Packing(bounds, bounds[1:] - 1, self.cache, held)
            chosen, logprobs = self._broadcast(self._forward(feed, packing), uniform[active, step])
            self.tokens[active, step], self.logprobs[active, step] = chosen, logprobs
            self.lengths[active] += 1
            going = chosen != self.eos_id
            active, feed = active[going], chosen[going].long()
            held, fed = (held + fed)[going], torch.ones_like(fed)[going]
            if not len(active):
                break
            if len(active) < len(going):
                self.cache.keep(going)

    def _forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Through the pipeline; the logits (R, V / tp) on the last stage."""
        engine, t = self.engine, self.engine.topology
        shape = (len(tokens), 1, engine.core.config.hidden_size)
        engine.core.set_input_tensor(engine.p2p.recv_forward(shape, t.is_first_stage))
        output = engine.model(tokens, packing)
        engine.p2p.send_forward(output, t.is_last_stage)
        return output

    def _broadcast(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Sample on the last stage and tell all ranks of this replica: tokens, log-probs (R,)."""
        t = self.engine.topology
        both = torch.zeros(2, len(uniform), dtype=torch.float64, device=uniform.device)
        if t.is_last_stage:
            chosen = self._sample(logits, uniform)
            both[0] = chosen
            both[1] = self.engine.logprobs_of(logits, chosen, self.temperature or 1.0)
        if t.tp * t.pp > 1:
            speaker = dist.get_global_rank(t.groups.mp, (t.pp - 1) * t.tp)
            dist.broadcast(both, speaker, group=t.groups.mp)
        return both[0], both[1]

    def _sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """(R,) tokens by inverting the cumulative distribution at `uniform`."""
        t = self.engine.topology
        if t.tp > 1:
            shards = [torch.empty_like(logits) for _ in range(t.tp)]
            dist.all_gather(shards, logits.contiguous(), group=t.groups.tp)
            logits = torch.cat(shards, dim=-1)
        logits = logits[:, : self.engine.core.architecture.vocab_size].double()
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = (logits / self.temperature).softmax(-1).cumsum(-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(
            max=logits.shape[-1] - 1
        )
