"""Every op in plain PyTorch: the specification, the CPU path, the oracle and the baseline.

Same names and signatures as the Triton ops. Arithmetic is fp32, or fp64 when the input is fp64.
What `mask` hides is unreadable: it is selected away, never multiplied by zero, so a NaN stored
there changes neither results nor gradients, and the result there is 0.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tetrad.kernels.check import (
    ESTIMATORS,
    check_denominator,
    check_exact_kl,
    check_gae,
    check_linear,
    check_linear_exact_kl,
    check_loss,
    check_one_of,
    check_policy_loss,
    check_ppo_advantages,
    check_ranking_loss,
    check_rows,
    check_same_shape,
    check_temperature,
    check_token_logprobs,
    check_weight_grad,
)

MAX_LOG_RATIO = 20.0  # nats; exp is clamped here, where its gradient becomes 0 (e^20 = 4.9e8)
MAX_DIFFERENCE = 1e8  # nats: less than e^20, so that k3 stays positive however unlikely a token is
IGNORED = -(2**31)  # the token of a position that a mask hides: -100 might be one by mistake


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reals(*tensors: Tensor) -> list[Tensor]:
    """All of them in fp64 when one is, else in fp32."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return [x.double() if double else x.float() for x in tensors]


class _SumOverGroup(torch.autograd.Function):
    """All-reduce whose gradient is the identity: every rank computes the same loss from the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(token) under softmax(logits / temperature), in nats: (..., V), (...) -> (...) fp32.

    With `entropy`, also the entropy of that softmax (...); both are differentiable in `logits`.
    Where tokens == ignore_index the results and gradients are 0 and the logits are not looked at.
    A token outside the vocabulary has log-prob -inf. A logit of +inf or NaN makes its row NaN.
    temperature: a positive number, or a tensor that broadcasts to `tokens`.
    group: the process group over which the vocabulary is split; this rank holds the columns
    [vocab_start, vocab_start + V). Columns at or beyond `vocab_size` are padding.
    inplace_backward, the leave to overwrite the logits in backward, is not taken here.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    check_token_logprobs(logits, tokens, temperature, vocab_start, vocab_size, inplace_backward)
    V = logits.shape[-1]
    check_temperature(temperature, tokens, ignore_index)
    counted = tokens != ignore_index
    x = torch.where(counted[..., None], _real(logits), 0.0)
    if isinstance(temperature, Tensor):
        x = x / temperature.broadcast_to(tokens.shape)[..., None]
    else:
        x = x / temperature
    if vocab_size is not None and vocab_start + V > vocab_size:
        padding = torch.arange(vocab_start, vocab_start + V, device=x.device) >= vocab_size
        x = x.masked_fill(padding, -torch.inf)

    def total(y: Tensor) -> Tensor:
        return y if group is None else _SumOverGroup.apply(y, group)

    top = x.detach().max(-1).values
    if group is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    x = x - torch.where(top == -torch.inf, 0.0, top)[..., None]  # an all -inf shard stays -inf
    local = tokens.long() - vocab_start
    here = counted & (local >= 0) & (local < V)
    chosen = x.gather(-1, local.clamp(0, V - 1)[..., None])[..., 0]
    target = total(torch.where(here, chosen, 0.0))
    target = torch.where(total(here.to(x.dtype)) > 0, target, -torch.inf)
    weights = x.exp()
    # Summed without the token's own weight e^target, so that neither log p nor the 1 - p of its
    # gradient cancels when the token is nearly certain: p = 1 / (1 + rest / e^target).
    own = here[..., None] & (torch.arange(V, device=x.device) == local[..., None])
    rest = total(weights.masked_fill(own, 0.0).sum(-1))
    log_sum = (rest + target.expm1()).log1p()
    likely = -(rest * (-target.clamp(min=-10.0)).exp()).log1p()
    logprobs = torch.where(target > -10, likely, target - log_sum)
    logprobs = torch.where(counted, logprobs, 0.0)
    if not entropy:
        return logprobs
    mean = total((weights * torch.where(x == -torch.inf, 0.0, x)).sum(-1)) / log_sum.exp()
    return logprobs, torch.where(counted, log_sum - mean, 0.0)


class _SumGradientOverGroup(torch.autograd.Function):
    """The identity, whose gradient every rank holds a part of: its columns of the vocabulary."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, counted: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:  # fmt: skip
    """hidden @ weight.T + bias in fp32, from rows that count."""
    hidden = _real(hidden)
    if group is not None:
        hidden = _SumGradientOverGroup.apply(hidden, group)
    if counted is not None:
        hidden = torch.where(counted[..., None], hidden, 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.nn.functional.linear(
            hidden, _real(weight), None if bias is None else _real(bias)
        )


def _without_padding(vocab_start: int, vocab_size: int | None, *rows: Tensor | None) -> list[Any]:
    """rows (V, …), 0 at and beyond vocab_size, where they may hold anything."""
    if vocab_size is None:
        return list(rows)

    def cleared(x: Tensor) -> Tensor:
        counts = torch.arange(vocab_start, vocab_start + len(x), device=x.device) < vocab_size
        return torch.where(counts.view(-1, *[1] * (x.dim() - 1)), x, 0.0)

    return [x if x is None else cleared(x) for x in rows]


def cast_as_linear(*tensors: Tensor | None) -> list[Any]:
    """Under autocast, cast as torch.nn.Linear would."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    save_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of logits = hidden @ weight.T + bias, made in fp32: (..., d), (V, d), (...).

    Differentiable in hidden, weight and bias. Under autocast these are cast as torch.nn.Linear
    casts them. group: hidden is the same on every rank, and so is its gradient: the sum over the
    group is made here. save_logits, a choice of memory or time, has no meaning here.
    """
    hidden, weight, bias = cast_as_linear(hidden, weight, bias)
    check_linear(hidden, weight, bias, tokens)
    weight, bias = _without_padding(vocab_start, vocab_size, weight, bias)
    logits = _logits(hidden, weight, bias, tokens != ignore_index, group)
    return token_logprobs(
        logits, tokens, temperature=temperature, entropy=entropy, ignore_index=ignore_index,
        vocab_start=vocab_start, vocab_size=vocab_size, group=group,
    )  # fmt: skip


def _adding_to(weight_grad: Tensor | None, weight: Tensor) -> Tensor:
    """weight as a leaf of its own whose gradient is added to weight_grad, if it is given."""
    if weight_grad is None or not torch.is_grad_enabled():
        return weight
    leaf = weight.detach().requires_grad_()

    def add(leaf: Tensor) -> None:
        weight_grad[: len(leaf)].add_(leaf.grad)  # type: ignore[arg-type]
        leaf.grad = None

    leaf.register_post_accumulate_grad_hook(add)
    return leaf


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    denominator: float | Tensor | None = None,
    weight_grad: Tensor | None = None,
    upstream: float = 1.0,
) -> Tensor:
    """-sum of `linear_token_logprobs` over the tokens that count, over their number: a scalar.

    denominator: the token count of the global batch when this is a part of it.
    weight_grad: what backward adds the gradient of weight to, in place of weight.grad. upstream,
    what backward will be given, has no meaning here.
    """
    check_denominator(denominator)
    check_weight_grad(weight_grad, upstream, hidden, weight, denominator)
    weight = _adding_to(weight_grad, weight)
    logprobs = linear_token_logprobs(
        hidden, weight, tokens, bias=bias, temperature=temperature, ignore_index=ignore_index,
        vocab_start=vocab_start, vocab_size=vocab_size, group=group,
    )  # fmt: skip
    if denominator is None:
        denominator = (tokens != ignore_index).sum().clamp(min=1)
    return -logprobs.sum() / denominator


def token_kl(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k1") -> Tensor:
    """Estimates of KL(p || q) at each sampled token, in nats, from log p and log q of that token.

    With d = log p - log q: "k1" d, "k2" d^2 / 2, "k3" exp(-d) - 1 + d, "abs" |d|
    (Schulman 2020, joschu.net/blog/kl-approx.html). k1 and k3 are unbiased; k3 is never negative;
    as a loss only k2 has the gradient of the KL. exp(-d) is clamped at d = -20: no gradient there;
    and the d beside it at -1e8.
    """
    check_one_of("estimator", estimator, ESTIMATORS)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = _real(logprobs) - _real(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "abs":
        return d.abs()
    beyond = d < -MAX_LOG_RATIO
    x = torch.where(beyond, 0.0, -d)  # selected, not clamped: clamp hides a NaN from the gradient
    held = math.expm1(MAX_LOG_RATIO) + d.clamp(min=-MAX_DIFFERENCE)
    return torch.where(beyond, held, torch.expm1(x) - x)


def exact_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(p || q) of p = softmax(logits / t), q = softmax(ref_logits / t), in nats.

    Differentiable in logits. temperature, vocab_size, vocab_start and group as in
    `token_logprobs`. mask (...): where it is 0 the result and the gradient are 0; default all.
    """
    check_exact_kl(logits, ref_logits, mask, temperature, vocab_start, vocab_size)
    check_temperature(temperature, mask)
    V = logits.shape[-1]
    counted = torch.ones_like(logits[..., 0], dtype=torch.bool) if mask is None else mask != 0
    t = temperature
    if isinstance(t, Tensor):
        t = torch.where(counted, t, 1.0)[..., None]
    padding = torch.zeros(V, dtype=torch.bool, device=logits.device)
    if vocab_size is not None:
        padding = torch.arange(vocab_start, vocab_start + V, device=logits.device) >= vocab_size

    def total(y: Tensor) -> Tensor:
        return y if group is None else _SumOverGroup.apply(y, group)

    def shifted(x: Tensor) -> Tensor:
        x = torch.where(counted[..., None], _real(x), 0.0) / t
        x = x.masked_fill(padding, -torch.inf)
        top = x.detach().max(-1, keepdim=True).values
        if group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        return x - torch.where(top == -torch.inf, 0.0, top)

    z, u = shifted(logits), shifted(ref_logits.detach())
    weights = z.exp()
    possible = weights > 0
    difference = torch.where(possible, z, 0.0) - torch.where(possible, u, 0.0)
    S, U = total(weights.sum(-1)), total(u.exp().sum(-1))
    kl = total((weights * difference).sum(-1)) / S - S.log() + U.log()
    return torch.where(counted, kl, 0.0)


def linear_exact_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`exact_kl` of hidden @ weight.T against ref_hidden @ ref_weight.T: (..., d), (V, d) -> (...).

    Differentiable in hidden and weight; the gradient of hidden is summed over the group.
    """
    hidden, weight = cast_as_linear(hidden, weight)
    ref_hidden, ref_weight = cast_as_linear(ref_hidden, ref_weight)
    check_linear_exact_kl(hidden, weight, ref_hidden, ref_weight)
    check_rows(hidden[..., 0], mask, temperature, vocab_start, vocab_size)
    weight, ref_weight = _without_padding(vocab_start, vocab_size, weight, ref_weight)
    counted = None if mask is None else mask != 0
    return exact_kl(
        _logits(hidden, weight, None, counted, group),
        _logits(ref_hidden.detach(), ref_weight.detach(), None, counted, None),
        temperature=temperature, vocab_size=vocab_size, vocab_start=vocab_start, group=group,
        mask=mask,
    )  # fmt: skip


def _sequence_of(bounds: Tensor, n_tokens: int) -> Tensor:
    """(N,): the number of the sequence to which each packed token belongs."""
    return torch.repeat_interleave(bounds.long().diff(), output_size=n_tokens)


def _last_valid(mask: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """(N,) true at the last valid token of each sequence, from packed mask and sequence numbers."""
    position = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    last = position.new_full((n_sequences,), -1).scatter_reduce(0, sequence, position, "amax")
    return mask & (position == last[sequence])


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    cu_seqlens: Tensor | None = None,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, fp32 and 0 where mask is 0, of padded (B, T) or packed (N,) steps.

        delta_t = r_t + gamma * V_{t+1} - V_t        A_t = delta_t + gamma * lam * A_{t+1}

    (Schulman et al. 2016, arXiv:1506.02438, equation 16); returns = A + V.
    gamma, lam: numbers in [0, 1], or tensors (B,) or (S,) of one for each sequence.
    cu_seqlens (S + 1,): bounds of the packed sequences. bootstrap (B,) or (S,): the value after
    the last valid token of each sequence, default 0.
    mask_mode: a masked step between valid ones (tool output, say) hands V_{t+1} and A_{t+1} on
    unchanged ("carry": verl, NeMo-RL), or is a step of reward 0 and value 0 that the recursion
    runs through, discounting ("decay": OpenRLHF). Steps after the last valid one never count.
    """
    B = check_gae(rewards, values, mask, gamma, lam, cu_seqlens, mask_mode, bootstrap)
    if cu_seqlens is not None:
        sequence = _sequence_of(cu_seqlens, len(rewards))
        place = torch.arange(len(rewards), device=mask.device) - cu_seqlens.long()[sequence]
        T = int(cu_seqlens.diff().max()) if B else 0

        def unpack(x: Tensor) -> Tensor:
            return x.new_zeros(B, T).index_put((sequence, place), x)

        advantages, returns = gae(
            unpack(rewards), unpack(values), unpack(mask != 0),
            gamma=gamma, lam=lam, mask_mode=mask_mode, bootstrap=bootstrap,
        )  # fmt: skip
        return advantages[sequence, place], returns[sequence, place]

    valid = mask != 0
    r, v = (torch.where(valid, x, 0.0) for x in _reals(rewards, values))
    gamma, lam = (x.to(v.dtype) if isinstance(x, Tensor) else x for x in (gamma, lam))
    next_value = v.new_zeros(B) if bootstrap is None else bootstrap.to(v.dtype)
    advantage = v.new_zeros(B)
    advantages = torch.zeros_like(v)
    begun = valid.new_zeros(B)  # whether a valid step was met, walking backwards
    for t in reversed(range(r.shape[1])):
        begun = begun | valid[:, t]
        counts = valid[:, t] if mask_mode == "carry" else begun
        step = r[:, t] + gamma * next_value - v[:, t] + gamma * lam * advantage
        advantage = torch.where(counts, step, advantage)
        next_value = torch.where(counts, v[:, t], next_value)
        advantages[:, t] = torch.where(valid[:, t], advantage, 0.0)
    return advantages, torch.where(valid, advantages + v, 0.0)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the valid elements of all ranks of group; 0 elsewhere.

    Without shift_mean the mean is added back. Variance is the population's, or with `unbiased`
    (n - 1) the sample's (at n = 1 the population's).
    """
    check_same_shape(x=x, mask=mask)
    valid = mask != 0
    x = torch.where(valid, _real(x), 0.0)

    def total(y: Tensor) -> Tensor:
        return y if group is None else _SumOverGroup.apply(y, group)

    n = total(valid.sum().to(x.dtype))
    mean = total(x.sum()) / n.clamp(min=1)
    centred = torch.where(valid, x - mean, 0.0)
    variance = total(centred.square().sum()) / (n - int(unbiased)).clamp(min=1)
    white = centred * torch.rsqrt(variance + eps)
    return white if shift_mean else torch.where(valid, white + mean, 0.0)


class PPOAdvantages(NamedTuple):
    """Per token, fp32, shaped like the mask and 0 where it is 0."""

    rewards: Tensor  # -kl_coef * kl, plus the score at the last valid token
    advantages: Tensor  # whitened if asked
    returns: Tensor  # targets of the value function: unwhitened advantages + values
    kl: Tensor  # nats, the estimate that was charged for


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    whiten_rewards: bool = False,
    whiten_advantages: bool = True,
    cu_seqlens: Tensor | None = None,
    mask_mode: str = "carry",
    group: dist.ProcessGroup | None = None,
) -> PPOAdvantages:
    """From scores (B,) to whitened advantages (B, T); packed: (S,) and (N,) with cu_seqlens.

    The reward of a token is -kl_coef times its KL estimate (`token_kl`); the score is added at the
    last valid token of its sequence (a sequence without one gets none); then `gae`, then `whiten`
    over all ranks of group. whiten_rewards keeps the mean (lm-human-preferences).
    gamma, lam, cu_seqlens, mask_mode as in `gae`.
    """
    S = check_ppo_advantages(
        scores, logprobs, ref_logprobs, values, mask, estimator, gamma, lam, cu_seqlens, mask_mode
    )
    scores, logprobs, ref_logprobs, values = _reals(scores, logprobs, ref_logprobs, values)
    valid = mask != 0
    kl = torch.where(valid, token_kl(logprobs, ref_logprobs, estimator=estimator), 0.0)
    if cu_seqlens is None:
        sequence = torch.arange(S, device=mask.device).repeat_interleave(mask.shape[1])
    else:
        sequence = _sequence_of(cu_seqlens, len(mask))
    last = _last_valid(valid.flatten(), sequence, S).view_as(valid)
    charge = kl_coef * kl if kl_coef else torch.zeros_like(kl)  # 0 * inf would be NaN
    rewards = torch.where(last, scores[sequence].view_as(kl), 0.0) - charge
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, group=group)
    advantages, returns = gae(
        rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, mask_mode=mask_mode
    )
    if whiten_advantages:
        advantages = whiten(advantages, mask, group=group)
    return PPOAdvantages(rewards, advantages, returns, kl)


def _aggregate(
    x: Tensor, mask: Tensor, aggregation: str, denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """Mean of x over valid tokens, or over sequences of their token means."""
    valid = mask != 0
    x = torch.where(valid, x, 0.0)
    if aggregation == "token-mean":
        return x.sum() / (valid.sum().clamp(min=1) if denominator is None else denominator)
    if cu_seqlens is None:
        sums, counts = x.sum(1), valid.sum(1)
    else:
        sequence = _sequence_of(cu_seqlens, len(x))
        zeros = x.new_zeros(len(cu_seqlens) - 1)
        sums = zeros.index_add(0, sequence, x)
        counts = zeros.index_add(0, sequence, valid.to(x.dtype))
    n = (counts > 0).sum().clamp(min=1) if denominator is None else denominator
    return (sums / counts.clamp(min=1)).sum() / n


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, a scalar to minimise, and statistics as 0-d tensors on the device.

        ratio = exp(logprobs - old_logprobs)
        loss = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))

    (Schulman et al. 2017, arXiv:1707.06347, equation 7). dual_clip > 1 bounds the loss of a token
    of negative advantage by -A * dual_clip (Ye et al. 2020, arXiv:1912.09729).
    aggregation: mean over tokens, or over sequences of token means ((B, T), or cu_seqlens).
    denominator: the token (or sequence) count of the global batch when this is a part of it: parts
    then add up to the whole, the statistics too (ratio_max by max).
    Statistics: clip_fraction, approx_kl (k3, nats), ratio_mean, ratio_max.
    """
    check_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range, dual_clip, aggregation, denominator,
        cu_seqlens,
    )  # fmt: skip
    valid = mask != 0
    logprobs, old_logprobs, advantages = _reals(logprobs, old_logprobs, advantages)
    d = torch.where(valid, logprobs - old_logprobs, 0.0)
    held = d.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    d = torch.where(d.abs() > MAX_LOG_RATIO, held, d)  # clamp would hide a NaN from the gradient
    A = torch.where(valid, advantages, 0.0)
    ratio = d.exp()
    plain, clipped = -A * ratio, -A * ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = torch.maximum(plain, clipped)
    if dual_clip is not None:
        losses = torch.where(A < 0, torch.minimum(losses, -A * dual_clip), losses)

    def mean(x: Tensor) -> Tensor:
        return _aggregate(x, mask, aggregation, denominator, cu_seqlens)

    with torch.no_grad():
        stats = {
            "clip_fraction": mean((clipped > plain).to(ratio.dtype)),
            "approx_kl": mean(torch.expm1(d) - d),
            "ratio_mean": mean(ratio),
            "ratio_max": torch.where(valid, ratio, 0.0).max() if mask.numel() else ratio.sum(),
        }
    return mean(losses), stats


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_range: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    weight_grad: Tensor | None = None,
    upstream: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_token_logprobs`: (..., d), (V, d), and per token inputs (...).

    weight_grad and upstream as in `linear_cross_entropy`.
    """
    check_weight_grad(weight_grad, upstream, hidden, weight, denominator)
    weight = _adding_to(weight_grad, weight)
    logprobs: Any = linear_token_logprobs(
        hidden, weight, torch.where(mask != 0, tokens, IGNORED), bias=bias,
        temperature=temperature, ignore_index=IGNORED, vocab_start=vocab_start,
        vocab_size=vocab_size, group=group,
    )  # fmt: skip
    return policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range=clip_range, dual_clip=dual_clip,
        aggregation=aggregation, denominator=denominator, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float = 0.2,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), a scalar, and statistics.

    aggregation, denominator and cu_seqlens as in `policy_loss`. Statistics: clip_fraction,
    value_mean, return_mean, error (mean squared V - R).
    """
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    valid = mask != 0
    tensors = _reals(values, old_values, returns)
    v, old, target = (torch.where(valid, x, 0.0) for x in tensors)
    plain = (v - target).square()
    known = torch.where(old.isnan(), old, 1.0)  # a factor: clamp hides a NaN from the gradient
    clipped = ((v * known).clamp(old - clip_range, old + clip_range) - target).square()

    def mean(x: Tensor) -> Tensor:
        return _aggregate(x, mask, aggregation, denominator, cu_seqlens)

    with torch.no_grad():
        stats = {
            "clip_fraction": mean((clipped > plain).to(v.dtype)),
            "value_mean": mean(v),
            "return_mean": mean(target),
            "error": mean(plain),
        }
    return mean(0.5 * torch.maximum(plain, clipped)), stats


def _places(better: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and True of each pair (i, j) that is true, of which (j, i) is false.

    torch.compile needs to know their number: then they are as many as can be, the rest False.
    """
    if torch.compiler.is_compiling():
        most = len(better) * (len(better) - 1) // 2
        places = torch.nonzero_static(better, size=most, fill_value=-1)
    else:
        places = better.nonzero()
    row, column = places.unbind(1)
    return row, column, row >= 0


def ranking_loss(
    scores: Tensor, ranks: Tensor, cu_prompts: Tensor, *, denominator: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of a reward model on ranked completions, and how often it agrees with the ranking.

    scores (M,); ranks (M,) with 1 the best, equal ranks a tie; cu_prompts (P + 1,) bounds the
    completions of each prompt. Over the prompts that have a comparison, the mean of

        mean over pairs with rank_i < rank_j of -log sigmoid(s_i - s_j)

    (Ouyang et al. 2022, arXiv:2203.02155, equation 1); accuracy is the same mean of [s_i > s_j].
    Ties are dropped. denominator: the global number of prompts with a comparison when this is a
    part of the batch. Without any comparison both are 0.
    """
    check_ranking_loss(scores, ranks, cu_prompts, denominator)
    prompt = _sequence_of(cu_prompts, len(scores))
    s = _real(scores)
    better = (prompt[:, None] == prompt[None]) & (ranks[:, None] < ranks[None])
    winner, loser, real = _places(better)
    margin = torch.where(real, s[winner] - s[loser], 0.0)
    zeros = s.new_zeros(len(cu_prompts) - 1)
    pairs = zeros.index_add(0, prompt[winner], real.to(s.dtype))
    n = (pairs > 0).sum().clamp(min=1) if denominator is None else denominator

    def mean(x: Tensor) -> Tensor:
        x = torch.where(real, x, 0.0)
        return (zeros.index_add(0, prompt[winner], x) / pairs.clamp(min=1)).sum() / n

    loss = mean(-torch.nn.functional.logsigmoid(margin))
    return loss, mean((margin > 0).to(s.dtype)).detach()
