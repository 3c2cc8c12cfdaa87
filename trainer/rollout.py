"""Episodes: prompts, what the policy answered, and what the four models said about it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tetrad.parallel.engine import Engine
from tetrad.parallel.generate import generate
from tetrad.parallel.packed import Batch, pack
from tetrad.trainer.config import Sampling


@dataclass
class Episodes:
    """A batch with one response per prompt."""

    batch: Batch
    responses: list[list[int]]
    ended: Tensor  # (S,) bool, by eos


def rollout(
    policy: Engine, prompts: list[list[int]], sampling: Sampling, eos_id: int, seed: tuple[int, ...]
) -> Episodes:
    """Sample one response to each prompt from the policy as it is."""
    samples = generate(
        policy,
        prompts,
        max_new=sampling.max_new,
        eos_id=eos_id,
        temperature=sampling.temperature,
        seed=seed,
        rows_at_once=sampling.rows_at_once,
    )
    batch = pack(prompts, samples.responses)
    batch.per_token["sampled_logprobs"] = torch.zeros(len(batch.tokens))
    batch.per_token["sampled_logprobs"][batch.response_mask] = torch.cat(samples.logprobs)
    return Episodes(batch, samples.responses, torch.tensor(samples.ended))
