"""Our ops in the place of TRL's, verl's and OpenRLHF's own functions, within this process.

    from tetrad.kernels import patch
    patch.trl()  # or verl(), openrlhf(): the names that are now ours
    patch.undo()

A stand-in has the signature and the meaning of the function it stands in for; docs/patch.md lists
them and where results differ. It goes wherever a loaded module of the package holds that very
function: under its own name, under a name made by `from x import f`, in a class or a registry.
Modules loaded later find ours. Out of reach are other processes, modules outside the package, and
copies that `torch.compile` or `partial` made: patch in each worker, before it builds its engine.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from tetrad.kernels import reference
from tetrad.kernels.advantages import gae, whiten
from tetrad.kernels.linear_logprob import linear_token_logprobs
from tetrad.kernels.logprob import token_logprobs

NO_TOKEN = -(2**31)  # TRL ignores rows by a mask, never by label: no label may mean "ignored"

_replaced: dict[str, list[tuple[Callable, Callable]]] = {}  # package -> (theirs, ours)
_theirs: dict[Callable, Any] = {}  # ours -> theirs, kept after undo: a copy of ours may be left


def trl() -> list[str]:
    """Patch TRL's log-probs and entropy, of logits and of hidden states: as `verl`."""
    return _replace(
        "trl",
        {
            "trl.trainer.utils:selective_log_softmax": _trl_selective_log_softmax,
            "trl.trainer.utils:entropy_from_logits": _trl_entropy_from_logits,
            "trl.trainer.utils:selective_log_softmax_and_entropy": _trl_logprobs_and_entropy,
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction": _TrlChunkedLogProbFunction,
        },
    )


def verl() -> list[str]:
    """Patch verl's log-probs and entropy of logits, whitening and GAE; the names that are now ours.

    A second call restores first, then patches what is loaded by now. Raises ImportError when the
    package or a module of it cannot be imported, AttributeError when a function is absent or takes
    other arguments than we know; then nothing is patched.
    """
    functional, algorithms = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    return _replace(
        "verl",
        {
            f"{functional}:logprobs_from_logits": _verl_logprobs_from_logits,
            f"{functional}:entropy_from_logits": _entropy_from_logits,
            f"{functional}:entropy_from_logits_with_chunking": _verl_entropy_chunked,
            f"{functional}:masked_whiten": _verl_masked_whiten,
            f"{algorithms}:compute_gae_advantage_return": _verl_gae,
        },
    )


def openrlhf() -> list[str]:
    """Patch OpenRLHF's log-probs and entropy of logits, and its GAE: as `verl`."""
    maker = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
    return _replace(
        "openrlhf",
        {
            "openrlhf.models.utils:log_probs_from_logits": _openrlhf_log_probs_from_logits,
            "openrlhf.models.utils:compute_entropy": _entropy_from_logits,
            f"{maker}.get_advantages_and_returns": _openrlhf_gae,
        },
    )


def undo() -> None:
    """Put back every function that was replaced, also into modules loaded since."""
    for package in list(_replaced):
        _restore(package)


def _replace(package: str, stand_ins: dict[str, Callable]) -> list[str]:
    _restore(package)
    if util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed")
    pairs = [(_find(package, name, ours), ours) for name, ours in stand_ins.items()]
    _replaced[package] = pairs  # all are found and fit: from here on nothing fails
    _theirs.update((ours, theirs) for theirs, ours in pairs)
    return [name for theirs, ours in pairs for name in _swap(package, theirs, ours)]


def _restore(package: str) -> None:
    for theirs, ours in _replaced.pop(package, []):
        _swap(package, ours, theirs)


def _find(package: str, name: str, ours: Callable) -> Callable:
    """The function "module:name" of the package, if it takes the same arguments as ours."""
    try:
        seen = f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        seen = f"{package} (version unknown)"
    module, path = name.split(":")
    name = f"{module}.{path}"
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{seen}: cannot import {module}: {error}") from error
    try:
        theirs = functools.reduce(getattr, path.split("."), home)
    except AttributeError:
        raise AttributeError(f"{seen} has no {name}") from None
    if _arguments(theirs) != _arguments(ours):
        raise AttributeError(f"{seen}: {name}{_arguments(theirs)}, expected {_arguments(ours)}")
    return theirs  # type: ignore[return-value]


def _arguments(function: Any) -> str:
    """What it takes; an autograd.Function, or a class in the place of one, is called by `apply`."""
    skip = 0
    if isinstance(function, type):
        skip = int(issubclass(function, torch.autograd.Function))  # the ctx of forward
        function = getattr(function, "forward" if skip else "apply", function)
    parameters = list(inspect.signature(function).parameters.values())[skip:]
    return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))


def _places(package: str) -> Iterator[tuple[str, Any]]:
    """The loaded modules of a package, and the classes and dicts that these define."""
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] != package:
            continue
        yield name, module
        for key, value in list(vars(module).items()):
            if isinstance(value, dict) or isinstance(value, type) and value.__module__ == name:
                yield f"{name}.{key}", value


def _swap(package: str, old: Callable, new: Callable) -> list[str]:
    """Put `new` wherever the package holds `old`; the names of these places."""
    names = []
    for name, place in _places(package):
        entries = place if isinstance(place, dict) else vars(place)
        for key in [key for key, value in entries.items() if value is old]:
            if isinstance(place, dict):
                place[key] = new
            else:
                setattr(place, key, new)
            names.append(f"{name}[{key!r}]" if isinstance(place, dict) else f"{name}.{key}")
    return names


def _entropy(logits: Tensor) -> Tensor:
    """(..., V) -> (...) fp32 (fp64 in fp64)."""
    any_token = logits.new_zeros(logits.shape[:-1], dtype=torch.int32)
    return token_logprobs(logits, any_token, entropy=True)[1]


def _as_softmax(x: Tensor, logits: Tensor) -> Tensor:
    """`x` in the dtype that theirs gets from softmax: that of the logits, or as autocast has it."""
    return x.to(logits.new_empty(0).softmax(-1).dtype)


def _entropy_from_logits(logits: Tensor) -> Tensor:
    return _as_softmax(_entropy(logits), logits)


def _trl_selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    if index.dim() == logits.dim():  # (..., K), the K tokens of a row
        logits = logits.unsqueeze(-2).expand(*index.shape, -1)
    return token_logprobs(  # type: ignore[return-value]
        logits, _counted(index, row_mask), temperature=temperature, ignore_index=NO_TOKEN
    )


def _trl_entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    return _entropy(logits)


def _trl_logprobs_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logprobs, entropy = token_logprobs(
        logits, _counted(index, row_mask), temperature=temperature, entropy=True,
        ignore_index=NO_TOKEN,
    )  # fmt: skip
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class _TrlChunkedLogProbFunction:
    """In the place of an autograd.Function, of which TRL uses `apply`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        theirs = _theirs[_TrlChunkedLogProbFunction]
        dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
        if (
            final_logit_softcapping is not None
            or logit_scale <= 0
            or hasattr(weight, "ds_id")  # DeepSpeed ZeRO-3: empty by the time of backward
            or (len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type))
        ):
            return theirs.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        entropy = "entropy" in outputs
        taken: Any = linear_token_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature / logit_scale,
            entropy=entropy, ignore_index=NO_TOKEN,
        )  # fmt: skip
        logprobs, entropies = taken if entropy else (taken, None)
        statistics: tuple[Tensor | None, ...] = (None, None, None)
        asked = tuple(x for x in outputs if x not in ("log_probs", "entropy"))
        if asked:  # without a gradient, as theirs are: one product more
            with torch.no_grad():
                _, _, *statistics = theirs.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, None, logit_scale, asked
                )
        return logprobs, entropies, *statistics


def _counted(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else torch.where(row_mask != 0, index, NO_TOKEN)


def _verl_logprobs_from_logits(
    logits: Tensor, labels: Tensor, inplace_backward: bool = True
) -> Tensor:
    return token_logprobs(  # type: ignore[return-value]
        logits, labels.reshape(logits.shape[:-1]), inplace_backward=inplace_backward
    )


def _verl_entropy_chunked(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return _entropy(logits).float()


def _verl_masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    if (n := mask.sum()) < 2:  # as verl does, at the price of a sync: it whitens on the CPU
        raise ValueError(f"the mask counts {int(n)} elements; an unbiased variance needs two")
    differentiable = torch.is_grad_enabled() and values.requires_grad  # so is verl's; ours refuses
    op = reference.whiten if differentiable else whiten
    return op(values, mask, shift_mean=shift_mean, unbiased=True).to(values.dtype)


@torch.no_grad()
def _verl_gae(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    advantages, returns = gae(
        token_level_rewards, values, response_mask, gamma=float(gamma), lam=float(lam)
    )
    white = _verl_masked_whiten(advantages, response_mask)
    dtype = _promoted(token_level_rewards, values, response_mask)
    return white.to(dtype), returns.to(dtype)


@torch.no_grad()
def _openrlhf_gae(
    self: object,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    if action_mask is None:
        action_mask = torch.ones_like(values, dtype=torch.bool)
    advantages, returns = gae(
        rewards, values, action_mask, gamma=gamma, lam=lambd, mask_mode="decay"
    )
    dtype = _promoted(rewards, values, action_mask)
    return advantages.to(dtype), returns.to(dtype)


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


def _openrlhf_log_probs_from_logits(
    logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    if temperature != 1.0:
        logits.div_(temperature)  # in place, as OpenRLHF: callers go on with the scaled logits
    logprobs = token_logprobs(logits, labels)
    return _as_softmax(logprobs, logits)  # type: ignore[arg-type]
