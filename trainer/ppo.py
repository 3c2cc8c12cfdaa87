"""Stage 3, PPO-ptx: optimise the policy against the reward model (InstructGPT, section 3.5).

`iteration` is the whole algorithm; everything else here prepares or repeats it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tetrad.kernels.advantages import ppo_advantages
from tetrad.kernels.ppo_loss import policy_loss, value_loss
from tetrad.kernels.reference import PPOAdvantages
from tetrad.parallel.engine import Engine, Loss
from tetrad.parallel.packed import Batch, pack_text
from tetrad.parallel.topology import generator
from tetrad.trainer import config
from tetrad.trainer.data import read, tokenize_prompts, tokenize_text
from tetrad.trainer.loop import Source, batches, build_role, source_of, start, train
from tetrad.trainer.metrics import read_metrics, write_summary
from tetrad.trainer.rollout import Episodes, rollout
from tetrad.trainer.sft import language_loss

Text = Callable[[int], Batch]  # optimizer step -> pretraining sequences


@dataclass
class Roles:
    policy: Engine
    reference: Engine
    critic: Engine
    reward: Engine


def iteration(
    roles: Roles, prompts: list[list[int]], text: Text | None, cfg: config.PPO, eos_id: int, i: int
) -> dict[str, float]:
    """Iteration i of PPO-ptx: sample, score, judge, learn."""
    temperature = cfg.sampling.temperature

    # 1. Rollout: one response per prompt, on the training weights.
    episodes = rollout(roles.policy, prompts, cfg.sampling, eos_id, seed=(cfg.seed, i))
    batch = episodes.batch

    # 2. Score: what must stay fixed while the policy moves.
    old_logprobs = roles.policy.logprobs(batch, temperature)
    ref_logprobs = roles.reference.logprobs(batch, temperature)
    old_values = roles.critic.values(batch)
    scores = roles.reward.scores(batch)
    if cfg.no_eos_score is not None:
        scores = torch.where(episodes.ended.to(scores.device), scores, cfg.no_eos_score)

    # 3. Judge: charge for KL at every token, add the score at the last one; advantages.
    mask, cu_seqlens = (x.to(scores.device) for x in (batch.response_mask, batch.cu_seqlens))
    judged = ppo_advantages(
        scores, old_logprobs, ref_logprobs, old_values, mask,
        kl_coef=cfg.kl_coef, estimator=cfg.kl_estimator, gamma=cfg.gamma, lam=cfg.lam,
        whiten_rewards=cfg.whiten_rewards, whiten_advantages=cfg.whiten_advantages,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    batch.per_token |= {
        "old_logprobs": old_logprobs, "advantages": judged.advantages,
        "old_values": old_values, "returns": judged.returns,
    }  # fmt: skip

    # 4. Learn: the PPO and the pretraining gradient in one buffer, then policy and critic step.
    log = Log()
    for k, minibatch in minibatches(batch, cfg, i):
        loss = clipped_policy_loss(minibatch, cfg.clip_range)
        log.add("policy", roles.policy.accumulate_logprobs(minibatch, loss, temperature))
        if text is not None:
            pretraining = text(k)
            loss = language_loss(pretraining, cfg.ptx_coef)
            log.add("ptx", roles.policy.accumulate_logprobs(pretraining, loss))
        loss = clipped_value_loss(minibatch, cfg.value_clip_range)
        log.add("critic", roles.critic.accumulate_values(minibatch, loss))
        log.add("policy", roles.policy.step())
        log.add("critic", roles.critic.step())
    return log.means() | described(episodes, scores, judged)


def clipped_policy_loss(minibatch: Batch, clip_range: float) -> Loss:
    """`policy_loss` over all tokens of a minibatch, for the engine, which passes it in parts."""
    n = max(1, int(minibatch.response_mask.sum()))

    def loss(logprobs: Tensor, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        old, advantages = part.per_token["old_logprobs"], part.per_token["advantages"]
        return policy_loss(
            logprobs, old, advantages, part.response_mask, clip_range=clip_range, denominator=n
        )

    return loss


def clipped_value_loss(minibatch: Batch, clip_range: float) -> Loss:
    """`value_loss` over all tokens of a minibatch, for the engine, which passes it in parts."""
    n = max(1, int(minibatch.response_mask.sum()))

    def loss(values: Tensor, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        old, returns = part.per_token["old_values"], part.per_token["returns"]
        return value_loss(
            values, old, returns, part.response_mask, clip_range=clip_range, denominator=n
        )

    return loss


def minibatches(batch: Batch, cfg: config.PPO, i: int):
    """(optimizer step, its episodes): ppo_epochs shuffled passes over the episodes."""
    n = math.ceil(len(batch) / cfg.minibatch_size)
    for epoch in range(cfg.ppo_epochs):
        order = torch.randperm(len(batch), generator=generator(cfg.seed, i, epoch)).tolist()
        for k in range(n):
            chosen = order[k * cfg.minibatch_size : (k + 1) * cfg.minibatch_size]
            yield (i * cfg.ppo_epochs + epoch) * n + k, batch.select(chosen)


class Log:
    """Statistics of the minibatches of one iteration: policy/loss, critic/grad_norm, …"""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, role: str, stats: dict[str, float]) -> None:
        for name, value in stats.items():
            self.values.setdefault(f"{role}/{name}", []).append(value)

    def means(self) -> dict[str, float]:
        """The mean over minibatches, or the largest of names in _max; and the first of each loss
        statistic that tells whether old and new log-probs agree."""
        first = {
            f"{name}_first": self.values[name][0]
            for name in ("policy/loss", "policy/ratio_max", "policy/approx_kl", "critic/loss")
        }
        return first | {
            name: max(v) if name.endswith("_max") else sum(v) / len(v)
            for name, v in self.values.items()
        }


def described(episodes: Episodes, scores: Tensor, judged: PPOAdvantages) -> dict[str, float]:
    """Means over the episodes of an iteration; KL in nats per response."""
    batch = episodes.batch
    n = len(batch)
    sampled, old = batch.per_token["sampled_logprobs"], batch.per_token["old_logprobs"].cpu()
    return {
        "score": float(scores.mean()),
        "kl": float(judged.kl.sum() / n),
        "reward": float(judged.rewards.sum() / n),
        "response_tokens": float(batch.response_mask.sum() / n),
        "ended": float(episodes.ended.float().mean()),
        "sampling_mismatch_max": float((sampled - old).abs().max()),
        "tokens": len(batch.tokens),
    }


def ppo(cfg: config.PPO) -> dict[str, float]:
    """Run PPO-ptx; the summary."""
    topology = start(cfg)
    if cfg.model.init is None:
        raise ValueError("model.init is missing: the policy that PPO starts from (an SFT run)")
    if cfg.batch_size % cfg.minibatch_size:
        raise ValueError(
            f"minibatch_size {cfg.minibatch_size} does not divide batch_size {cfg.batch_size}"
        )
    if cfg.sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0; PPO needs samples of the policy")
    source = source_of(cfg.model)
    room = source.fits(cfg.sampling.max_new + 1, "sampling.max_new + 1")
    rows = read("prompts", **vars(cfg.prompts))
    length = min(cfg.max_prompt, source.max_length + 1 - room)
    prompts = tokenize_prompts(rows, source.tokenizer, length)
    _, chosen = batches(len(prompts), cfg.batch_size, math.inf, cfg.seed)
    text = _pretraining_text(cfg, source) if cfg.ptx_coef else None

    def role(head: str, init: str, **training) -> Engine:
        return build_role(
            cfg, topology, head, config.Model(init=init), source.tokenizer_name, **training
        )

    updates = cfg.steps * cfg.ppo_epochs * cfg.batch_size // cfg.minibatch_size
    roles = Roles(
        policy=role("language", cfg.model.init, schedule=cfg.schedule, steps=updates),
        reference=role("language", cfg.reference or cfg.model.init),
        critic=role(
            "scalar", cfg.critic or cfg.reward, schedule=cfg.critic_schedule, steps=updates
        ),
        reward=role("scalar", cfg.reward),
    )

    def step(i: int) -> dict[str, float]:
        batch = [prompts[j] for j in chosen(i)]
        return iteration(roles, batch, text, cfg, source.tokenizer.eos_id, i)

    complete = train(
        cfg, {"policy": roles.policy, "critic": roles.critic}, cfg.steps, step,
        name="ppo-ptx" if text else "ppo", tokenizer=source.tokenizer_name,
        examples=len(prompts), shown=("score", "kl", "reward", "policy/clip_fraction"),
    )  # fmt: skip
    last = read_metrics(Path(cfg.out))[-1]
    summary: dict[str, float] = {
        "complete": complete,
        "steps": cfg.steps,
        "episodes": cfg.steps * cfg.batch_size,
        **{name: last[name] for name in ("score", "kl", "reward")},
    }
    write_summary(Path(cfg.out), summary)
    return summary


def _pretraining_text(cfg: config.PPO, source: Source) -> Text:
    length = source.fits(cfg.ptx_length, "ptx_length")
    blocks = tokenize_text(read("text", **vars(cfg.text)), source.tokenizer, length)
    size = max(1, round(cfg.ptx_ratio * cfg.minibatch_size))
    _, chosen = batches(len(blocks), size, math.inf, cfg.seed)
    return lambda k: pack_text([blocks[j] for j in chosen(k)])
