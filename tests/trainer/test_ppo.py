"""One iteration of PPO-ptx by hand: models that say what they are told, two one-line episodes."""

import pytest
import torch

from tests.forked_world import run_world
from tetrad.kernels.ppo_loss import policy_loss
from tetrad.parallel import device
from tetrad.parallel.generate import Samples
from tetrad.parallel.packed import pack_text
from tetrad.trainer import config, loop, ppo, rollout

OLD = torch.tensor([-1.0, -2.0, -0.5])  # log-probs of the three response tokens
REF = torch.tensor([-1.5, -1.0, -0.5])
VALUES = torch.tensor([0.1, 0.2, 0.3])
SCORES = torch.tensor([1.0, -1.0])
MASK = torch.tensor([0, 1, 1, 0, 0, 1]).bool()  # prompts of one and two tokens


class Told:
    """An engine whose answers are given; it keeps the gradients of the losses it is handed."""

    def __init__(self, per_token=None, scores=None) -> None:
        self.per_token, self.told_scores = per_token, scores
        self.gradients, self.temperatures, self.more, self.steps = [], [], [], 0

    def _spread(self, batch) -> torch.Tensor:
        counted = batch.per_token.get("place", torch.arange(3))
        return torch.zeros(len(batch.tokens)).masked_scatter(
            batch.response_mask, self.per_token[counted]
        )

    def logprobs(self, batch, temperature):
        self.temperatures.append(temperature)
        return self._spread(batch)

    def values(self, batch):
        return self._spread(batch)

    def scores(self, batch):
        return self.told_scores

    def accumulate_values(self, batch, loss):
        return self._keep(loss, self._spread(batch).requires_grad_(), batch)

    def accumulate_policy_loss(self, batch, *, denominator, clip_range, temperature, more):
        self.more.append(more)

        def loss(logprobs, part):
            old, advantages = part.per_token["old_logprobs"], part.per_token["advantages"]
            return policy_loss(
                logprobs, old, advantages, part.response_mask, clip_range=clip_range,
                denominator=denominator,
            )  # fmt: skip

        return self._keep(loss, self._spread(batch).requires_grad_(), batch)

    def accumulate_cross_entropy(self, batch, *, denominator, coef):
        x = torch.full((len(batch.tokens),), -1.0, requires_grad=True)
        counted = batch.response_mask
        return self._keep(lambda x, _: (-coef * x[counted].sum() / denominator, {}), x, batch)

    def _keep(self, loss, x, batch) -> dict:
        value, stats = loss(x, batch)
        (gradient,) = torch.autograd.grad(value, x)
        self.gradients.append(gradient[batch.response_mask])
        return {"loss": float(value), **{k: float(v) for k, v in stats.items()}}

    def step(self):
        self.steps += 1
        return {"grad_norm": 0.0, "lr": 0.0}


def iterate(monkeypatch_text):
    samples = Samples([[7, 8], [9]], [OLD[:2], OLD[2:]], [True, False])
    rollout.generate = lambda *args, **kwargs: samples
    ppo.minibatches = lambda batch, cfg, i: [(0, batch)]
    roles = ppo.Roles(Told(OLD), Told(REF), Told(scores=SCORES), Told(VALUES))
    cfg = config.PPO(
        out="", reward="", batch_size=2, minibatch_size=2, kl_coef=0.1, gamma=1.0, lam=0.5,
        no_eos_score=-3.0, ptx_coef=2.0, sampling=config.Sampling(temperature=0.7),
    )  # fmt: skip
    text = (lambda k: pack_text([[1, 2, 3, 4, 5]])) if monkeypatch_text else None
    log = ppo.iteration(roles, [[1], [2, 3]], text, cfg, 9, 0)
    p, c = roles.policy, roles.critic
    return log, p.gradients, c.gradients, p.temperatures, p.more, p.steps, c.steps


def test_an_iteration_by_hand() -> None:
    log, policy, critic, temperatures, more, *steps = run_world(1, iterate, True)[0]
    # KL by k1: 0.5, -1, 0; the second response did not end: its score is -3
    rewards = torch.tensor([-0.1 * 0.5, 0.1 * 1 + 1.0, -3.0])
    second = rewards[1] - 0.2
    first = rewards[0] + 0.2 - 0.1 + 0.5 * second
    advantages = torch.stack([first, second, rewards[2] - 0.3])
    white = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    torch.testing.assert_close(policy[0], -white / 3)  # at ratio 1 the gradient is -A / n
    torch.testing.assert_close(policy[1], torch.full((4,), -2.0 / 4))  # ptx: same buffer, no step
    returns = advantages + VALUES
    torch.testing.assert_close(critic[0], (VALUES - returns) / 3)
    assert log["reward"] == pytest.approx(float(rewards.sum()) / 2)
    assert log["kl"] == pytest.approx((0.5 - 1) / 2) and log["score"] == pytest.approx(-1)
    assert log["ended"] == 0.5 and log["sampling_mismatch_max"] == pytest.approx(0, abs=1e-6)
    assert temperatures == [0.7] and more == [True] and steps == [1, 1]


def test_a_phase_ends_where_the_next_begins_and_the_device_is_done(monkeypatch) -> None:
    events = []
    times = iter([1.0, 3.0, 7.5])
    monkeypatch.setattr(device, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: events.append("look") or next(times))
    clock = loop.Clock()
    clock.enter("rollout")
    clock.enter("score")
    assert clock.seconds() == {"seconds/rollout": 2.0, "seconds/score": 4.5}
    assert events == ["wait", "look"] * 3


def test_without_text_there_is_no_pretraining_gradient() -> None:
    log, policy, *_ = run_world(1, iterate, False)[0]
    assert len(policy) == 1 and "ptx/loss" not in log
