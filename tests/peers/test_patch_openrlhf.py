"""OpenRLHF's own functions, before and after `patch.openrlhf()`.

OpenRLHF imports deepspeed, flash_attn and vllm at its top. Those are built for GPUs and are stubs
here (conftest.py); what is replaced uses none but flash_attn's cross-entropy, without which
PyTorch's runs.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tetrad.kernels import patch

if find_spec("openrlhf") is None:
    pytest.skip("make peers installs OpenRLHF", allow_module_level=True)

from openrlhf.models import actor, utils  # noqa: E402
from openrlhf.trainer.ppo_utils.experience import Experience  # noqa: E402
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # noqa: E402

V = 1000
DTYPES = {t: t for t in (torch.float32, torch.bfloat16, torch.float64)}


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Their entropy is compiled; here it runs as written, which needs no C++ compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return 4 * torch.randn(3, 7, V), torch.randint(V, (3, 7))


@pytest.fixture
def mask() -> Tensor:
    """Responses: full, one with tool output inside, one that starts late, one token, none."""
    return torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    ).bool()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs(temperature, batch, check_logits) -> None:
    """bf16 in, bf16 out: the last rounding is all that errs, in theirs as in ours."""
    logits, labels = batch
    check_logits(
        lambda: utils.log_probs_from_logits, patch.openrlhf, logits, labels, temperature,
        dtypes=DTYPES, gain=0.98,
    )  # fmt: skip


def test_temperature_is_applied_to_the_callers_logits(batch) -> None:
    """As theirs does: its callers may take the entropy from the same tensor."""
    logits, labels = batch
    patch.openrlhf()
    scaled = logits.clone()
    utils.log_probs_from_logits(scaled, labels, 0.5)
    assert torch.equal(scaled, 2 * logits)


def test_entropy(batch, check_logits) -> None:
    check_logits(lambda: utils.compute_entropy, patch.openrlhf, batch[0], dtypes=DTYPES, gain=2)


class Output(dict):
    """As a model of transformers returns it: by key, and by attribute."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


class Bigram(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Embedding(50, 50)

    def forward(self, sequences: Tensor, **_) -> Output:
        return Output(logits=self.logits(sequences))


def test_the_actor_takes_ours(called) -> None:
    """Its forward pass: log-probs of the actions, entropy, and the gradient."""
    model = actor.Actor(Bigram(), temperature=0.7)
    model.packing_samples = False  # which it sets only on a model that it has loaded itself
    tokens, attention = torch.randint(50, (2, 8)), torch.ones(2, 8).long()
    actions = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def outputs() -> list[Tensor]:
        model.zero_grad()
        logprobs, output = model(
            tokens, actions, attention, return_output=True, return_entropy=True
        )
        (logprobs.sum() + output.entropy.sum()).backward()
        return [logprobs.detach(), output.entropy.detach(), model.model.logits.weight.grad]

    theirs = outputs()
    assert called.token_logprobs.call_count == 0
    patch.openrlhf()
    ours = outputs()
    assert called.token_logprobs.call_count == 2
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [True, False])
def test_gae(dtype, masked, mask, called) -> None:
    values, rewards = torch.randn(2, *mask.shape).to(dtype)
    values.requires_grad_()  # theirs cuts the graph
    action_mask = mask if masked else None

    def outputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
        return maker.get_advantages_and_returns(
            values.to(dtype), rewards.to(dtype), action_mask, 0.97, 0.9
        )

    theirs, truth = outputs(dtype), outputs(torch.float64)
    patch.openrlhf()
    ours = outputs(dtype)
    assert called.gae.call_count == 1
    seen = mask if masked else torch.ones_like(mask)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == their.dtype == dtype and not our.requires_grad
        assert not our[~seen].any()
        our, their, true = our[seen], their[seen], true[seen]
        if dtype == torch.bfloat16:
            assert (our - true).abs().mean() < (their - true).abs().mean()
        else:
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_gae_does_not_read_what_the_mask_hides(mask) -> None:
    values, rewards = torch.randn(2, *mask.shape)
    maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
    patch.openrlhf()
    clean = maker.get_advantages_and_returns(values, rewards, mask, 1.0, 0.95)
    values, rewards = (x.masked_fill(~mask, torch.nan) for x in (values, rewards))
    poisoned = maker.get_advantages_and_returns(values, rewards, mask, 1.0, 0.95)
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned))


def test_experience_is_made_the_same_way(mask, called) -> None:
    """Scores to whitened advantages by their experience maker, on all rows with an action."""
    mask = mask[:4]
    advantage = SimpleNamespace(estimator="gae", gamma=0.97, lambd=0.9, no_std_norm=False)
    values, kl, scores = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)

    def outputs() -> tuple[Tensor, Tensor]:
        maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
        maker.advantage_estimator, maker.kl_ctl = "gae", SimpleNamespace(value=0.1)
        maker.strategy = mock.MagicMock()
        maker.strategy.args.algo.advantage = advantage
        maker.strategy.args.rollout.n_samples_per_prompt = 1
        maker.strategy.args.reward = SimpleNamespace(
            clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None
        )
        experience = Experience(
            index=[0, 1, 2, 3], rewards=scores, action_mask=mask, kl=kl, values=values, info={}
        )
        (made,) = maker.compute_advantages_and_returns([experience])
        return made.advantages[mask], made.returns[mask]

    theirs = outputs()
    patch.openrlhf()
    ours = outputs()
    assert called.gae.call_count == 1
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_the_names() -> None:
    maker = "openrlhf.trainer.ppo_utils.experience_maker.RemoteExperienceMaker"
    names = patch.openrlhf()
    assert f"{maker}.get_advantages_and_returns" in names
    assert {f"openrlhf.models.{m}.compute_entropy" for m in ("utils", "actor")} < set(names)
    assert patch.openrlhf() == names
