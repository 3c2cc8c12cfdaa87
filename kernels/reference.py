"""Every op in plain PyTorch: the specification, the CPU path, the oracle and the baseline.

Same names and signatures as the Triton ops. Arithmetic is fp32, or fp64 when the input is fp64.
What `mask` hides is unreadable: it is selected away, never multiplied by zero, so a NaN stored
there changes neither results nor gradients, and the result there is 0.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats; exp is clamped here, where its gradient becomes 0 (e^20 = 4.9e8)
IGNORED = -(2**31)  # the token of a position that a mask hides: -100 might be one by mistake
ESTIMATORS = ("k1", "k2", "k3", "abs")  # of the KL, see token_kl


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reals(*tensors: Tensor) -> list[Tensor]:
    """All of them in fp64 when one is, else in fp32."""
    double = any(x.dtype == torch.float64 for x in tensors)
    return [x.double() if double else x.float() for x in tensors]


def _same_shape(**tensors: Tensor) -> None:
    (first, x), *others = tensors.items()
    for name, y in others:
        if x.shape != y.shape:
            raise ValueError(
                f"{name} has shape {tuple(y.shape)}, {first} has shape {tuple(x.shape)}"
            )
        if x.device != y.device:
            raise ValueError(f"{name} is on {y.device}, {first} on {x.device}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


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


def _check_token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float | Tensor, vocab_start: int,
    vocab_size: int | None, inplace_backward: bool,
) -> None:  # fmt: skip
    if logits.dim() == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, logits has shape {tuple(logits.shape)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: no column of the vocabulary")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    _check_tokens(tokens, logits)
    _check_vocabulary(logits[..., 0], temperature, vocab_start, vocab_size)
    if inplace_backward and logits.requires_grad:
        if torch.compiler.is_compiling():
            raise ValueError("inplace_backward is True; torch.compile does not see such writes")
        if logits.is_leaf:
            raise ValueError("inplace_backward is True; the gradient of a leaf would be the leaf")
        extent = 1
        for s, n in sorted((s, n) for s, n in zip(logits.stride(), logits.shape) if n > 1):
            if s < extent:
                raise ValueError(f"inplace_backward is True; strides {logits.stride()} overlap")
            extent += s * (n - 1)


def _check_tokens(tokens: Tensor, like: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be int32 or int64, not {tokens.dtype}")
    if tokens.device != like.device:
        raise ValueError(f"tokens are on {tokens.device}, logits on {like.device}")


def _check_vocabulary(
    rows: Tensor, temperature: float | Tensor, vocab_start: int, vocab_size: int | None
) -> None:
    """What all ops on a vocabulary ask of these; `rows` (...) is shaped like the result."""
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}; it must not be negative")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be positive")
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < torch.inf:
            raise ValueError(f"temperature is {temperature}; it must be positive and finite")
        return
    if temperature.device != rows.device:
        raise ValueError(f"temperature is on {temperature.device}, logits on {rows.device}")
    if temperature.requires_grad:
        raise ValueError("temperature requires a gradient; there is one for logits only")
    try:
        temperature.broadcast_to(rows.shape)
    except RuntimeError:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)}, the rows {tuple(rows.shape)}"
        ) from None


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
    A token outside the vocabulary has log-prob -inf.
    temperature: a positive number, or a tensor that broadcasts to `tokens`.
    group: the process group over which the vocabulary is split; this rank holds the columns
    [vocab_start, vocab_start + V). Columns at or beyond `vocab_size` are padding.
    inplace_backward, the leave to overwrite the logits in backward, is not taken here.
    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    _check_token_logprobs(logits, tokens, temperature, vocab_start, vocab_size, inplace_backward)
    V = logits.shape[-1]
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
    x = x - torch.where(top.isfinite(), top, 0.0)[..., None]  # an all -inf shard stays -inf
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


def _check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor | None, name: str = ""
) -> None:
    """What the ops on hidden @ weight.T + bias ask of these; `name` is a prefix like "ref_"."""
    if not hidden.is_floating_point():
        raise ValueError(f"{name}hidden must be floating point, not {hidden.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"{name}weight has shape {tuple(weight.shape)}: it is empty")
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}hidden has shape {tuple(hidden.shape)}, {name}weight {tuple(weight.shape)}; "
            "they must be (..., d) and (V, d)"
        )
    if tokens is not None and hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}, hidden has shape {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")
    for other, x in (f"{name}weight", weight), ("bias", bias):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise ValueError(
                f"{other} is {x.dtype} on {x.device}, {name}hidden {hidden.dtype} on "
                f"{hidden.device}"
            )


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


def _as_linear(*tensors: Tensor | None) -> list[Any]:
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
    hidden, weight, bias = _as_linear(hidden, weight, bias)
    _check_linear(hidden, weight, bias, tokens)
    weight, bias = _without_padding(vocab_start, vocab_size, weight, bias)
    logits = _logits(hidden, weight, bias, tokens != ignore_index, group)
    return token_logprobs(
        logits, tokens, temperature=temperature, entropy=entropy, ignore_index=ignore_index,
        vocab_start=vocab_start, vocab_size=vocab_size, group=group,
    )  # fmt: skip


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
) -> Tensor:
    """-sum of `linear_token_logprobs` over the tokens that count, over their number: a scalar.

    denominator: the token count of the global batch when this is a part of it.
    """
    _check_denominator(denominator)
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
    as a loss only k2 has the gradient of the KL. exp(-d) is clamped at d = -20: no gradient there.
    """
    _one_of("estimator", estimator, ESTIMATORS)
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    d = _real(logprobs) - _real(ref_logprobs)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "abs":
        return d.abs()
    return torch.expm1((-d).clamp(max=MAX_LOG_RATIO)) + d


def _check_rows(
    rows: Tensor, mask: Tensor | None, temperature: float | Tensor, vocab_start: int,
    vocab_size: int | None,
) -> None:  # fmt: skip
    """What `exact_kl` asks of what goes by rows (...)."""
    _check_vocabulary(rows, temperature, vocab_start, vocab_size)
    if mask is not None and mask.shape != rows.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the KL {tuple(rows.shape)}")


def _check_exact_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float | Tensor,
    vocab_start: int, vocab_size: int | None,
) -> None:  # fmt: skip
    _same_shape(logits=logits, ref_logits=ref_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: no column of the vocabulary")
    for name, x in ("logits", logits), ("ref_logits", ref_logits):
        if not x.is_floating_point() or x.device != logits.device:
            raise ValueError(f"{name} must be floating point on {logits.device}, not {x.dtype}")
    _check_rows(logits[..., 0], mask, temperature, vocab_start, vocab_size)


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
    _check_exact_kl(logits, ref_logits, mask, temperature, vocab_start, vocab_size)
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
        return x - torch.where(top.isfinite(), top, 0.0)

    z, u = shifted(logits), shifted(ref_logits.detach())
    weights = z.exp()
    possible = weights > 0
    difference = torch.where(possible, z, 0.0) - torch.where(possible, u, 0.0)
    S, U = total(weights.sum(-1)), total(u.exp().sum(-1))
    kl = total((weights * difference).sum(-1)) / S - S.log() + U.log()
    return torch.where(counted, kl, 0.0)


def _check_linear_exact_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> None:
    _check_linear(hidden, weight, None, None)
    _check_linear(ref_hidden, ref_weight, None, None, "ref_")
    if hidden.shape[:-1] != ref_hidden.shape[:-1] or len(weight) != len(ref_weight):
        raise ValueError(
            f"ref_hidden @ ref_weight.T has shape {(*ref_hidden.shape[:-1], len(ref_weight))}, "
            f"hidden @ weight.T {(*hidden.shape[:-1], len(weight))}"
        )


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
    hidden, weight = _as_linear(hidden, weight)
    ref_hidden, ref_weight = _as_linear(ref_hidden, ref_weight)
    _check_linear_exact_kl(hidden, weight, ref_hidden, ref_weight)
    _check_rows(hidden[..., 0], mask, temperature, vocab_start, vocab_size)
    weight, ref_weight = _without_padding(vocab_start, vocab_size, weight, ref_weight)
    counted = None if mask is None else mask != 0
    return exact_kl(
        _logits(hidden, weight, None, counted, group),
        _logits(ref_hidden.detach(), ref_weight.detach(), None, counted, None),
        temperature=temperature, vocab_size=vocab_size, vocab_start=vocab_start, group=group,
        mask=mask,
    )  # fmt: skip


def _check_bounds(name: str, bounds: Tensor, n: int) -> None:
    """Refuse bounds that do not rise from 0 to n; trusted, unread, on a GPU and when compiled."""
    if bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, not {bounds.dtype}")
    if bounds.dim() != 1 or len(bounds) < 1:
        raise ValueError(f"{name} has shape {tuple(bounds.shape)}; it must be (sequences + 1,)")
    if bounds.is_cuda or torch.compiler.is_compiling():
        return
    if int(bounds[0]) != 0 or int(bounds[-1]) != n or (bounds.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to {n}, not {bounds.tolist()}")


def _sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    """How many sequences a padded (B, T) or packed (N,) shape holds, after checking it."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"mask has shape {tuple(shape)}; without cu_seqlens: (B, T)")
        return shape[0]
    if len(shape) != 1:
        raise ValueError(f"mask has shape {tuple(shape)}; with cu_seqlens: (N,)")
    _check_bounds("cu_seqlens", cu_seqlens, shape[0])
    return len(cu_seqlens) - 1


def _rows(bounds: Tensor, n_tokens: int) -> tuple[Tensor, Tensor, int]:
    """For packed tokens: the sequence of each (N,), its place in it (N,), the longest length."""
    lengths = bounds.long().diff()
    sequence = torch.repeat_interleave(lengths)
    place = torch.arange(n_tokens, device=bounds.device) - bounds.long()[sequence]
    return sequence, place, int(lengths.max()) if len(lengths) else 0


def _last_valid(mask: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """(N,) true at the last valid token of each sequence, from packed mask and sequence numbers."""
    position = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    last = position.new_full((n_sequences,), -1).scatter_reduce(0, sequence, position, "amax")
    return mask & (position == last[sequence])


def _check_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float | Tensor, lam: float | Tensor,
    cu_seqlens: Tensor | None, mask_mode: str, bootstrap: Tensor | None,
) -> int:  # fmt: skip
    """The number of sequences, once the arguments of `gae` fit each other."""
    _one_of("mask_mode", mask_mode, ("carry", "decay"))
    _same_shape(rewards=rewards, values=values, mask=mask)
    S = _sequences(mask.shape, cu_seqlens)
    if bootstrap is not None and not isinstance(bootstrap, Tensor):
        raise ValueError(f"bootstrap is {bootstrap}; it must be a tensor, a value per sequence")
    for name, x in ("gamma", gamma), ("lam", lam), ("bootstrap", bootstrap):
        if isinstance(x, Tensor):
            if x.shape != (S,):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be ({S},)")
        elif x is not None and not 0 <= x <= 1:
            raise ValueError(f"{name} is {x}; it must lie in [0, 1]")
    return S


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
    B = _check_gae(rewards, values, mask, gamma, lam, cu_seqlens, mask_mode, bootstrap)
    if cu_seqlens is not None:
        sequence, place, T = _rows(cu_seqlens, len(rewards))

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
    _same_shape(x=x, mask=mask)
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


def _check_ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor,
    estimator: str, gamma: float | Tensor, lam: float | Tensor, cu_seqlens: Tensor | None,
    mask_mode: str,
) -> int:  # fmt: skip
    """The number of sequences, once the arguments of `ppo_advantages` fit each other."""
    _one_of("estimator", estimator, ESTIMATORS)
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    S = _check_gae(logprobs, values, mask, gamma, lam, cu_seqlens, mask_mode, None)
    if scores.shape != (S,):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be ({S},)")
    return S


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
    S = _check_ppo_advantages(
        scores, logprobs, ref_logprobs, values, mask, estimator, gamma, lam, cu_seqlens, mask_mode
    )
    scores, logprobs, ref_logprobs, values = _reals(scores, logprobs, ref_logprobs, values)
    valid = mask != 0
    kl = torch.where(valid, token_kl(logprobs, ref_logprobs, estimator=estimator), 0.0)
    if cu_seqlens is None:
        sequence = torch.arange(S, device=mask.device).repeat_interleave(mask.shape[1])
    else:
        sequence, _, _ = _rows(cu_seqlens, len(mask))
    last = _last_valid(valid.flatten(), sequence, S).view_as(valid)
    rewards = -kl_coef * kl + torch.where(last, scores[sequence].view_as(kl), 0.0)
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False, group=group)
    advantages, returns = gae(
        rewards, values, mask, gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, mask_mode=mask_mode
    )
    if whiten_advantages:
        advantages = whiten(advantages, mask, group=group)
    return PPOAdvantages(rewards, advantages, returns, kl)


def _check_loss(
    mask: Tensor, clip_range: float, aggregation: str, denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """What `policy_loss` and `value_loss` both ask of their arguments."""
    _one_of("aggregation", aggregation, ("token-mean", "sequence-mean"))
    if not isinstance(clip_range, (int, float)) or not clip_range > 0:
        raise ValueError(f"clip_range is {clip_range}; it must be positive")
    _check_denominator(denominator)
    if aggregation == "sequence-mean":
        _sequences(mask.shape, cu_seqlens)


def _check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; it must be 0-d")
        if denominator.requires_grad:
            raise ValueError("denominator requires grad, and is a constant here: detach it")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; it must be positive")


def _check_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
    dual_clip: float | None, aggregation: str, denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    _same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    _check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must exceed 1")


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
        sequence, _, _ = _rows(cu_seqlens, len(x))
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
    _check_policy_loss(
        logprobs, old_logprobs, advantages, mask, clip_range, dual_clip, aggregation, denominator,
        cu_seqlens,
    )  # fmt: skip
    valid = mask != 0
    logprobs, old_logprobs, advantages = _reals(logprobs, old_logprobs, advantages)
    d = torch.where(valid, logprobs - old_logprobs, 0.0)
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_token_logprobs`: (..., d), (V, d), and per token inputs (...)."""
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
    _same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    _check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    valid = mask != 0
    tensors = _reals(values, old_values, returns)
    v, old, target = (torch.where(valid, x, 0.0) for x in tensors)
    plain = (v - target).square()
    clipped = (v.clamp(old - clip_range, old + clip_range) - target).square()

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


def _check_ranking(
    scores: Tensor, ranks: Tensor, cu_prompts: Tensor, denominator: float | Tensor | None
) -> None:
    _same_shape(scores=scores, ranks=ranks)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be (M,)")
    _check_bounds("cu_prompts", cu_prompts, scores.shape[0])
    _check_denominator(denominator)


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
    _check_ranking(scores, ranks, cu_prompts, denominator)
    prompt, _, _ = _rows(cu_prompts, len(scores))
    s = _real(scores)
    better = (prompt[:, None] == prompt[None]) & (ranks[:, None] < ranks[None])
    winner, loser = better.nonzero(as_tuple=True)
    margin = s[winner] - s[loser]
    zeros = s.new_zeros(len(cu_prompts) - 1)
    pairs = zeros.index_add(0, prompt[winner], torch.ones_like(margin))
    n = (pairs > 0).sum().clamp(min=1) if denominator is None else denominator

    def mean(x: Tensor) -> Tensor:
        return (zeros.index_add(0, prompt[winner], x) / pairs.clamp(min=1)).sum() / n

    loss = mean(-torch.nn.functional.logsigmoid(margin))
    return loss, mean((margin > 0).to(s.dtype)).detach()
