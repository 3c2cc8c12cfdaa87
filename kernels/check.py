"""What the ops ask of their arguments: one clear ValueError at the door, for both paths."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ESTIMATORS = ("k1", "k2", "k3", "abs")  # of the KL, see `token_kl`


def check_same_shape(**tensors: Tensor) -> None:
    (first, x), *others = tensors.items()
    for name, y in others:
        if x.shape != y.shape:
            raise ValueError(
                f"{name} has shape {tuple(y.shape)}, {first} has shape {tuple(x.shape)}"
            )
        if x.device != y.device:
            raise ValueError(f"{name} is on {y.device}, {first} on {x.device}")


def check_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def check_values(
    name: str, x: Tensor, good: Callable[[Tensor], Tensor], allowed: str,
    counted: Callable[[], Tensor | bool] = lambda: True,
) -> None:  # fmt: skip
    """Refuse what a tensor holds where it counts, unless it is good.

    Read on the CPU alone: on a GPU the host would wait, and when compiled there is nothing to read.
    """
    unread = x.device.type != "cpu" or torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    if not unread:
        wrong = ~good(x) & counted()
        if wrong.any():
            value = x.broadcast_to(wrong.shape)[wrong][0].item()
            raise ValueError(f"{name} holds {value}; {allowed}")


def check_temperature(temperature: float | Tensor, mask: Tensor | None, ignored: int = 0) -> None:
    """Refuse a temperature tensor that is not positive and finite where mask != ignored."""
    if isinstance(temperature, Tensor):
        check_values(
            "temperature", temperature, lambda t: (t > 0) & (t < torch.inf),
            "it must be positive and finite", lambda: True if mask is None else mask != ignored,
        )  # fmt: skip


def check_token_logprobs(
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
    check_tokens(tokens, logits)
    check_vocabulary(logits[..., 0], temperature, vocab_start, vocab_size)
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


def check_tokens(tokens: Tensor, like: Tensor) -> None:
    if tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be int32 or int64, not {tokens.dtype}")
    if tokens.device != like.device:
        raise ValueError(f"tokens are on {tokens.device}, logits on {like.device}")


def check_vocabulary(
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


def check_linear(
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


def check_rows(
    rows: Tensor, mask: Tensor | None, temperature: float | Tensor, vocab_start: int,
    vocab_size: int | None,
) -> None:  # fmt: skip
    """What `exact_kl` asks of what goes by rows (...)."""
    check_vocabulary(rows, temperature, vocab_start, vocab_size)
    if mask is not None and mask.shape != rows.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, the KL {tuple(rows.shape)}")


def check_exact_kl(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, temperature: float | Tensor,
    vocab_start: int, vocab_size: int | None,
) -> None:  # fmt: skip
    check_same_shape(logits=logits, ref_logits=ref_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: no column of the vocabulary")
    for name, x in ("logits", logits), ("ref_logits", ref_logits):
        if not x.is_floating_point() or x.device != logits.device:
            raise ValueError(f"{name} must be floating point on {logits.device}, not {x.dtype}")
    check_rows(logits[..., 0], mask, temperature, vocab_start, vocab_size)


def check_linear_exact_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> None:
    check_linear(hidden, weight, None, None)
    check_linear(ref_hidden, ref_weight, None, None, "ref_")
    if hidden.shape[:-1] != ref_hidden.shape[:-1] or len(weight) != len(ref_weight):
        raise ValueError(
            f"ref_hidden @ ref_weight.T has shape {(*ref_hidden.shape[:-1], len(ref_weight))}, "
            f"hidden @ weight.T {(*hidden.shape[:-1], len(weight))}"
        )


def check_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float | Tensor, lam: float | Tensor,
    cu_seqlens: Tensor | None, mask_mode: str, bootstrap: Tensor | None,
) -> int:  # fmt: skip
    """The number of sequences, once the arguments of `gae` fit each other."""
    check_one_of("mask_mode", mask_mode, ("carry", "decay"))
    check_same_shape(rewards=rewards, values=values, mask=mask)
    S = count_sequences(mask.shape, cu_seqlens)
    if bootstrap is not None and not isinstance(bootstrap, Tensor):
        raise ValueError(f"bootstrap is {bootstrap}; it must be a tensor, a value per sequence")
    for name, x in ("gamma", gamma), ("lam", lam), ("bootstrap", bootstrap):
        if isinstance(x, Tensor):
            if x.shape != (S,):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be ({S},)")
            if name != "bootstrap":
                check_values(name, x, lambda x: (x >= 0) & (x <= 1), "it must lie in [0, 1]")
        elif x is not None and not 0 <= x <= 1:
            raise ValueError(f"{name} is {x}; it must lie in [0, 1]")
    return S


def count_sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    """How many sequences a padded (B, T) or packed (N,) shape holds, after checking it."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(f"mask has shape {tuple(shape)}; without cu_seqlens: (B, T)")
        return shape[0]
    if len(shape) != 1:
        raise ValueError(f"mask has shape {tuple(shape)}; with cu_seqlens: (N,)")
    check_bounds("cu_seqlens", cu_seqlens, shape[0])
    return len(cu_seqlens) - 1


def check_bounds(name: str, bounds: Tensor, n: int) -> None:
    """Refuse bounds that do not rise from 0 to n; trusted, unread, on a GPU and when compiled."""
    if bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, not {bounds.dtype}")
    if bounds.dim() != 1 or len(bounds) < 1:
        raise ValueError(f"{name} has shape {tuple(bounds.shape)}; it must be (sequences + 1,)")
    if bounds.is_cuda or torch.compiler.is_compiling():
        return
    if int(bounds[0]) != 0 or int(bounds[-1]) != n or (bounds.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to {n}, not {bounds.tolist()}")


def check_ppo_advantages(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, mask: Tensor,
    estimator: str, gamma: float | Tensor, lam: float | Tensor, cu_seqlens: Tensor | None,
    mask_mode: str,
) -> int:  # fmt: skip
    """The number of sequences, once the arguments of `ppo_advantages` fit each other."""
    check_one_of("estimator", estimator, ESTIMATORS)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values, mask=mask)
    S = check_gae(logprobs, values, mask, gamma, lam, cu_seqlens, mask_mode, None)
    if scores.shape != (S,):
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be ({S},)")
    return S


def check_loss(
    mask: Tensor, clip_range: float, aggregation: str, denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    """What `policy_loss` and `value_loss` both ask of their arguments."""
    check_one_of("aggregation", aggregation, ("token-mean", "sequence-mean"))
    if not isinstance(clip_range, (int, float)) or not clip_range > 0:
        raise ValueError(f"clip_range is {clip_range}; it must be positive")
    check_denominator(denominator)
    if aggregation == "sequence-mean":
        count_sequences(mask.shape, cu_seqlens)


def check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; it must be 0-d")
        if denominator.requires_grad:
            raise ValueError("denominator requires grad, and is a constant here: detach it")
        check_values("denominator", denominator, lambda n: n > 0, "it must be positive")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator is {denominator}; it must be positive")


def check_weight_grad(
    weight_grad: Tensor | None, upstream: float, hidden: Tensor, weight: Tensor,
    denominator: float | Tensor | None,
) -> None:  # fmt: skip
    """What a gradient asks for that is added to the caller's buffer before backward."""
    if isinstance(upstream, Tensor) or not abs(upstream) < torch.inf:
        raise ValueError(f"upstream is {upstream}; it must be a finite number")
    if weight_grad is None:
        if upstream != 1:
            raise ValueError(f"upstream is {upstream}; it has a meaning only with weight_grad")
        return
    if torch.compiler.is_compiling():
        raise ValueError("weight_grad is given; torch.compile does not see that it changes")
    fits = weight_grad.shape[1:] == weight.shape[1:] and len(weight_grad) >= len(weight)
    if not fits or weight_grad.stride(1) != 1 or weight_grad.requires_grad:
        raise ValueError(
            f"weight_grad has shape {tuple(weight_grad.shape)}, strides {weight_grad.stride()}; it "
            f"must be a constant of shape {tuple(weight.shape)} with contiguous rows"
        )
    if weight_grad.dtype != torch.float32 or weight_grad.device != weight.device:
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} on {weight_grad.device}; it must be torch.float32 "
            f"on {weight.device}"
        )
    if denominator is None or isinstance(denominator, Tensor):
        raise ValueError(f"denominator is {denominator}; with weight_grad it must be a number")
    if torch.is_grad_enabled() and not hidden.requires_grad:
        raise ValueError("weight_grad is given, but hidden requires no gradient: detached, maybe")


def check_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float,
    dual_clip: float | None, aggregation: str, denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    check_loss(mask, clip_range, aggregation, denominator, cu_seqlens)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must exceed 1")


def check_ranking_loss(
    scores: Tensor, ranks: Tensor, cu_prompts: Tensor, denominator: float | Tensor | None
) -> None:
    check_same_shape(scores=scores, ranks=ranks)
    if scores.dim() != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be (M,)")
    check_bounds("cu_prompts", cu_prompts, scores.shape[0])
    check_denominator(denominator)
