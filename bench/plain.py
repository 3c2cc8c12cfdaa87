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


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    return policy_loss(linear_token_logprobs(hidden, weight, tokens), old, advantages, mask)


def token_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = ref_logprobs - logprobs
    return d.exp() - d - 1


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    p, q = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def linear_exact_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    return exact_kl(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight))


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loop over time that TRL and verl run, at gamma 1 and lambda 0.95."""
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + 0.95 * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages.append(advantage)
    result = torch.stack(advantages[::-1], 1)
    return result * mask, (result + values) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    n = mask.sum()
    mean = (x * mask).sum() / n
    variance = ((x - mean).square() * mask).sum() / n
    return (x - mean) * (variance + 1e-8).rsqrt() * mask


def gae_whitened(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    advantages, returns = gae(rewards, values, mask)
    return whiten(advantages, mask), returns


def ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, with 0.02 of reward per nat of KL; masks are prefixes of the rows."""
    rewards = -0.02 * (logprobs - ref_logprobs) * mask
    last = (mask.sum(1) - 1)[:, None]
    rewards = rewards.scatter_add(1, last, scores[:, None])
    return gae_whitened(rewards, values, mask)


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (logprobs - old).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (losses * mask).sum() / mask.sum()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = values.clamp(old - 0.2, old + 0.2)
    losses = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (losses * mask).sum() / mask.sum()


def ranking_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Mean over prompts of the mean over their pairs, of scores and ranks (P, K) without ties."""
    better = ranks[:, :, None] < ranks[:, None]
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None])
    return ((losses * better).sum((1, 2)) / better.sum((1, 2))).mean()
