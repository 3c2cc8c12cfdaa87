"""Stage 3, PPO-ptx: optimise the policy against the reward model (InstructGPT, section 3.5).

`iteration` is the whole algorithm; everything else here prepares or repeats it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tetrad.kernels.advantages import ppo_advantages
from tetrad.kernels.ppo_loss import value_loss
from tetrad.kernels.reference import PPOAdvantages
from tetrad.parallel import checkpoint, device
from tetrad.parallel.colocate import colocate, held
from tetrad.parallel.engine import Engine, Loss
from tetrad.parallel.estimate import GIB
from tetrad.parallel.packed import Batch, pack_text
from tetrad.parallel.settings import Architecture
from tetrad.parallel.topology import Topology, arrange, generator
from tetrad.trainer import config
from tetrad.trainer.data import read, tokenize_prompts, tokenize_text
from tetrad.trainer.loop import Clock, Source, batches, build_role, log, source_of, start, train
from tetrad.trainer.metrics import read_metrics, write_summary
from tetrad.trainer.planning import choose, forecast, longest_prompt, run_of
from tetrad.trainer.rollout import Episodes, rollout

Text = Callable[[int], Batch]  # optimizer step -> pretraining sequences


@dataclass
class Roles:
    policy: Engine
    reference: Engine
    reward: Engine
    critic: Engine


def iteration(
    roles: Roles, prompts: list[list[int]], text: Text | None, cfg: config.PPO, eos_id: int, i: int
) -> dict[str, float]:
    """Iteration i of PPO-ptx: sample, score, judge, learn."""
    temperature, clock = cfg.sampling.temperature, Clock()

    clock.enter("rollout")  # one response per prompt, on the training weights
    episodes = rollout(roles.policy, prompts, cfg.sampling, eos_id, seed=(cfg.seed, i))
    batch = episodes.batch

    clock.enter("score")  # what must stay fixed while the policy moves
    old_logprobs = roles.policy.logprobs(batch, temperature)
    ref_logprobs = roles.reference.logprobs(batch, temperature)
    scores = roles.reward.scores(batch)
    if cfg.no_eos_score is not None:
        scores = torch.where(episodes.ended.to(scores.device), scores, cfg.no_eos_score)
    old_values = roles.critic.values(batch)

    clock.enter("judge")  # advantages, of the score less what KL to the reference costs
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

    clock.enter("learn")  # PPO and pretraining gradient in one buffer; policy and critic step
    seen = Log()
    for k, minibatch in minibatches(batch, cfg, i):
        stats = roles.policy.accumulate_policy_loss(
            minibatch, denominator=minibatch.counted, clip_range=cfg.clip_range,
            temperature=temperature, more=text is not None,
        )  # fmt: skip
        seen.add("policy", stats)
        if text is not None:
            pretraining = text(k)
            stats = roles.policy.accumulate_cross_entropy(
                pretraining, denominator=pretraining.counted, coef=cfg.ptx_coef
            )
            seen.add("ptx", stats)
        seen.add("policy", roles.policy.step())
        loss = clipped_value_loss(minibatch, cfg.value_clip_range)
        seen.add("critic", roles.critic.accumulate_values(minibatch, loss))
        seen.add("critic", roles.critic.step())
    return seen.means() | described(episodes, scores, judged) | clock.seconds()


def clipped_value_loss(minibatch: Batch, clip_range: float) -> Loss:
    """`value_loss` over all tokens of a minibatch, for the engine, which passes it in parts."""
    n = minibatch.counted

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
    if cfg.sampling.temperature == 0:
        raise ValueError("sampling.temperature is 0; PPO needs samples of the policy")
    source = source_of(cfg.model)
    length = longest_prompt(cfg, source.max_length)
    rows = read("prompts", **vars(cfg.prompts))
    prompts = tokenize_prompts(rows, source.tokenizer, length)
    _, chosen = batches(len(prompts), cfg.batch_size, math.inf, cfg.seed)
    text = _pretraining_text(cfg, source) if cfg.ptx_coef else None

    updates = cfg.steps * cfg.ppo_epochs * cfg.batch_size // cfg.minibatch_size
    roles, memory_used = build_roles(cfg, topology, source.tokenizer_name, updates)

    def step(i: int) -> dict[str, float]:
        batch = [prompts[j] for j in chosen(i)]
        return iteration(roles, batch, text, cfg, source.tokenizer.eos_id, i) | memory_used()

    complete = train(
        cfg, {"policy": roles.policy, "critic": roles.critic}, cfg.steps, step,
        name="ppo-ptx" if text else "ppo", tokenizer=source.tokenizer_name,
        examples=len(prompts), shown=("score", "kl", "reward", "policy/clip_fraction"),
    )  # fmt: skip
    predicted, measured = (x * GIB / 2**20 for x in memory_used().values())
    log.info(f"memory: {predicted:.1f} MiB predicted, {measured:.1f} MiB measured on this rank")
    last = read_metrics(Path(cfg.out))[-1]
    summary: dict[str, float] = {
        "complete": complete,
        "steps": cfg.steps,
        "episodes": cfg.steps * cfg.batch_size,
        **{name: last[name] for name in ("score", "kl", "reward")},
        **memory_used(),
    }
    write_summary(Path(cfg.out), summary)
    return summary


def build_roles(
    cfg: config.PPO, topology: Topology, tokenizer: str, updates: int
) -> tuple[Roles, Callable[[], dict[str, float]]]:
    """The four models from their checkpoints, placed by `place_roles`."""
    inits: dict[str, tuple[str, str]] = {
        "policy": ("language", cfg.model.init or ""),
        "reference": ("language", cfg.reference or cfg.model.init or ""),
        "reward": ("scalar", cfg.reward),
        "critic": ("scalar", cfg.critic or cfg.reward),
    }
    shapes = {
        name: checkpoint.read_model(checkpoint.find(init, head))[0]
        for name, (head, init) in inits.items()
    }

    def build(name: str, topology: Topology, **training) -> Engine:
        head, init = inits[name]
        return build_role(cfg, topology, head, config.Model(init=init), tokenizer, **training)

    return place_roles(cfg, topology, shapes, build, updates)


def place_roles(
    cfg: config.PPO, topology: Topology, shapes: Mapping[str, Architecture],
    build: Callable[..., Engine], updates: int,
) -> tuple[Roles, Callable[[], dict[str, float]]]:  # fmt: skip
    """The four models in memory that was planned for them, and what to log of it.

    build(name, topology, **training) builds one of them, with what `build_engine` takes of training
    and memory. Raises ValueError before anything is allocated when they will not fit."""
    run, rank = run_of(cfg, shapes, dist.get_world_size()), dist.get_rank()
    swap = choose(cfg, run, device.total_memory())
    log.info(forecast(run, rank, swap))
    memory = colocate(run.needs(rank), swap)
    layout = run.roles["critic"].layout
    beside = topology if layout == topology.layout else arrange(layout)

    def role(name: str, **training) -> Engine:
        where = topology if run.roles[name].head == "language" else beside
        return build(name, where, memory=memory[name], **training)

    # those that are trained come first: building them takes the most room beside their own
    policy = role("policy", schedule=cfg.schedule, steps=updates, ema_decay=cfg.ema_decay)
    critic = role("critic", schedule=cfg.critic_schedule, steps=updates)
    reference = role("reference") if cfg.reference else policy.twin(memory["reference"])
    roles = Roles(policy, reference, role("reward"), critic)

    def memory_used() -> dict[str, float]:
        """GiB: on a GPU the highest so far, on a CPU what lies there at all times."""
        predicted = run.peak(rank, swap)[0] if device.peak_memory() else run.always(rank, swap)
        measured = device.peak_memory() or held(memory)
        return {"memory_predicted_gib": predicted / GIB, "memory_gib": measured / GIB}

    return roles, memory_used


def _pretraining_text(cfg: config.PPO, source: Source) -> Text:
    blocks = tokenize_text(read("text", **vars(cfg.text)), source.tokenizer, cfg.ptx_length)
    size = max(1, round(cfg.ptx_ratio * cfg.minibatch_size))
    _, chosen = batches(len(blocks), size, math.inf, cfg.seed)
    return lambda k: pack_text([blocks[j] for j in chosen(k)])
