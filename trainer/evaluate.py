"""What a language model is worth: loss on text, reward of its answers, wins against another."""

import json
from pathlib import Path

import torch.distributed as dist

from tetrad.parallel.engine import Engine
from tetrad.parallel.packed import Batch, pack
from tetrad.trainer import config
from tetrad.trainer.data import read, tokenize_prompts, tokenize_text, write_jsonl
from tetrad.trainer.loop import build_role, start, tokenizer_of
from tetrad.trainer.metrics import write_summary
from tetrad.trainer.rollout import Episodes, rollout
from tetrad.trainer.sft import mean_loss


def evaluate(cfg: config.Evaluate) -> dict[str, float]:
    """Whatever the config gives data for; the summary (losses and KL in nats)."""
    if not (cfg.text.path or cfg.prompts.path):
        raise ValueError("nothing to evaluate on: give text.path, or prompts.path with reward")
    if cfg.prompts.path and not cfg.reward:
        raise ValueError("prompts.path needs reward: the reward model that scores the answers")
    topology = start(cfg)
    source = config.Model(init=cfg.model)
    _, tokenizer = tokenizer_of(source)
    model = build_role(cfg, topology, "language", source)
    summary: dict[str, float] = {}
    if cfg.text.path:
        summary["loss"] = mean_loss(model, text_batch(cfg.text, tokenizer, cfg.length))
    if cfg.prompts.path:
        reward = build_role(cfg, topology, "scalar", config.Model(init=cfg.reward))
        rows = read("prompts", **vars(cfg.prompts))
        prompts = tokenize_prompts(rows, tokenizer, cfg.max_prompt)
        episodes = rollout(model, prompts, cfg.sampling, tokenizer.eos_id, seed=(cfg.seed,))
        scores = reward.scores(episodes.batch)
        summary |= {
            "score": float(scores.mean()),
            "response_tokens": float(episodes.batch.response_mask.sum() / len(prompts)),
            "ended": float(episodes.ended.float().mean()),
        }
        if cfg.baseline:
            baseline = build_role(cfg, topology, "language", config.Model(init=cfg.baseline))
            others = rollout(baseline, prompts, cfg.sampling, tokenizer.eos_id, seed=(cfg.seed,))
            theirs = reward.scores(others.batch)
            summary["win_rate"] = win_rate(scores.tolist(), theirs.tolist())
            summary["kl"] = sampled_kl(model, baseline, episodes, cfg.sampling.temperature)
    write_summary(Path(cfg.out), summary)
    return summary


def generate(cfg: config.Generate) -> list[str]:
    """Sample answers; prints them and writes OUT/generations.jsonl."""
    if (cfg.prompt is None) == (cfg.prompts.path is None):
        raise ValueError("give either prompt, or prompts.path")
    topology = start(cfg)
    source = config.Model(init=cfg.model)
    _, tokenizer = tokenizer_of(source)
    rows = [{"prompt": cfg.prompt}] if cfg.prompt else read("prompts", **vars(cfg.prompts))
    model = build_role(cfg, topology, "language", source)
    prompts = tokenize_prompts(rows, tokenizer, cfg.max_prompt)
    episodes = rollout(model, prompts, cfg.sampling, tokenizer.eos_id, seed=(cfg.seed,))
    logprobs = episodes.batch.per_token["sampled_logprobs"][episodes.batch.response_mask]
    pieces = logprobs.split([len(r) for r in episodes.responses])
    texts = [tokenizer.decode(r) for r in episodes.responses]
    if dist.get_rank() == 0:
        answers = [
            {"prompt": tokenizer.decode(p), "response": t, "logprobs": lp.tolist()}
            for p, t, lp in zip(prompts, texts, pieces)
        ]
        write_jsonl(Path(cfg.out) / "generations.jsonl", answers)
        for answer in answers:
            print(json.dumps(answer["prompt"]), "->", json.dumps(answer["response"]))
    return texts


def text_batch(data: config.Data, tokenizer, length: int) -> Batch:
    """A text file as sequences of `length` tokens, all of which count."""
    blocks = tokenize_text(read("text", **vars(data)), tokenizer, length)
    return pack([[]] * len(blocks), blocks)


def win_rate(ours: list[float], theirs: list[float]) -> float:
    """The share of decided pairs in which ours is better; 0.5 when none is decided."""
    wins = sum(a > b for a, b in zip(ours, theirs))
    losses = sum(a < b for a, b in zip(ours, theirs))
    return wins / (wins + losses) if wins + losses else 0.5


def sampled_kl(model: Engine, other: Engine, episodes: Episodes, temperature: float) -> float:
    """Mean over the model's own responses of log p_model - log p_other, nats per response."""
    batch = episodes.batch
    difference = model.logprobs(batch, temperature or 1.0) - other.logprobs(
        batch, temperature or 1.0
    )
    return float(difference.sum() / len(batch))
