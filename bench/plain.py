"""What a trainer writes in plain PyTorch: the baseline, and what torch.compile is given."""

import torch
from torch import Tensor
from torch.nn import functional as F


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def token_logprobs_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = logits.float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0], entropy


def linear_token_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return token_logprobs(F.linear(hidden, weight), tokens)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), tokens)
