"""Shared by the tests against the real packages, each run in its own environment: `make peers`."""

import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tetrad.kernels import patch

if find_spec("openrlhf"):  # it imports at its top what is built for GPUs alone
    for name in (
        "deepspeed", "deepspeed.ops", "deepspeed.ops.adam", "deepspeed.runtime",
        "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters", "flash_attn",
        "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed", "vllm",
        "vllm.inputs", "vllm.utils",
    ):  # fmt: skip
        sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None), __path__=[])


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    patch.undo()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Our ops as the stand-ins see them, counting their calls."""
    ops = SimpleNamespace()
    for name in ("token_logprobs", "linear_token_logprobs", "gae", "whiten"):
        setattr(ops, name, mock.Mock(wraps=getattr(patch, name)))
        monkeypatch.setattr(patch, name, getattr(ops, name))
    return ops


def outputs_and_gradient(function: Callable, logits: Tensor, *args, **options) -> list[Tensor]:
    """What a function makes of logits, and the gradient of a random sum of it."""
    logits = logits.detach().requires_grad_()
    outputs = function(logits * 1, *args, **options)  # no leaf: OpenRLHF divides it in place
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in outputs]
    sum((w * x).sum() for w, x in zip(weights, outputs)).backward()
    return [*(x.detach() for x in outputs), logits.grad]


@pytest.fixture
def check_logits() -> Callable[..., None]:
    """Compare what `take` hands out before and after patching: outputs and gradient.

    `dtypes` maps each dtype of the logits to that of our outputs. Truth is their function in fp64.
    In bf16 ours must be as near to it as theirs, and in the first output `gain` times nearer.
    """

    def check(
        take: Callable[[], Callable], patch_it: Callable[[], list[str]], logits: Tensor, *args,
        dtypes: dict[torch.dtype, torch.dtype], gain: float, **options,
    ) -> None:  # fmt: skip
        for dtype, result in dtypes.items():
            x = logits.to(dtype)
            theirs = outputs_and_gradient(take(), x, *args, **options)
            truth = outputs_and_gradient(take(), x.double(), *args, **options)
            patch_it()
            assert take().__module__ == "tetrad.kernels.patch"
            ours = outputs_and_gradient(take(), x, *args, **options)
            patch.undo()
            assert [y.dtype for y in ours] == [result] * (len(ours) - 1) + [dtype]
            assert [y.shape for y in ours] == [y.shape for y in theirs]
            if dtype == torch.bfloat16:
                errors = [
                    [(y.double() - t).abs().mean().item() for y, t in zip(outputs, truth)]
                    for outputs in (ours, theirs)
                ]
                assert all(our <= 1.02 * their for our, their in zip(*errors)), errors
                assert gain * errors[0][0] <= errors[1][0], errors
            else:
                close = 1e-5 if dtype == torch.float32 else 1e-12
                for our, their in zip(ours, theirs):
                    torch.testing.assert_close(our.to(their), their, rtol=close, atol=close)

    return check
