"""What a language model is worth: loss on text, reward of its answers, wins against another."""

import json
from pathlib import Path

import torch.distributed as dist

from tetrad.parallel.engine import Engine
from tetrad.parallel.packed import Batch, pack_text
from tetrad.trainer import config
from tetrad.trainer.data import read, tokenize_prompts, tokenize_text, write_jsonl
from tetrad.trainer.loop import Source, build_role, source_of, start
from tetrad.trainer.metrics import write_summary
from tetrad.trainer.rollout import Episodes, rollout
from tetrad.trainer.sft import mean_loss
from tetrad.trainer.tokenizer import Tokenizer


def evaluate(cfg: config.Evaluate) -> dict[str, float]:
    """Whatever the config gives data for; the summary (losses and KL in nats)."""
    if not (cfg.text.path or cfg.prompts.path):
        raise ValueError("nothing to evaluate on: give text.path, or prompts.path with reward")
    if bool(cfg.prompts.path) != bool(cfg.reward):
        raise ValueError("prompts.path and reward go together: the answers and what scores them")
    if cfg.baseline and not cfg.prompts.path:
        raise ValueError("baseline needs prompts.path and reward")
    topology = start(cfg)
    source = source_of(config.Model(init=cfg.model))

    def role(head: str, init: str) -> Engine:
        return build_role(cfg, topology, head, config.Model(init=init), source.tokenizer_name)

    model = role("language", cfg.model)
    summary: dict[str, float] = {}
    if cfg.text.path:
        length = source.fits(cfg.length, "length")
        summary["loss"] = mean_loss(model, text_batch(cfg.text, source.tokenizer, length))
    if cfg.prompts.path and cfg.reward:
        prompts = _prompts(cfg, source, read("prompts", **vars(cfg.prompts)))
        eos_id, seed = source.tokenizer.eos_id, (cfg.seed,)
        episodes = rollout(model, prompts, cfg.sampling, eos_id, seed)
        reward = role("scalar", cfg.reward)
        longest = int(episodes.batch.lengths.max())
        if longest > reward.architecture.max_length:
            raise ValueError(
                f"reward {cfg.reward} reads {reward.architecture.max_length} tokens at most, an "
                f"answer with its prompt has {longest}"
            )
        scores = reward.scores(episodes.batch)
        summary |= {
            "score": float(scores.mean()),
            "response_tokens": float(episodes.batch.response_mask.sum() / len(prompts)),
            "ended": float(episodes.ended.float().mean()),
        }
        if cfg.baseline:
            baseline = role("language", cfg.baseline)
            others = rollout(baseline, prompts, cfg.sampling, eos_id, seed)
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
    init = config.Model(init=cfg.model)
    source = source_of(init)
    given = cfg.prompt is not None
    rows = [{"prompt": cfg.prompt}] if given else read("prompts", **vars(cfg.prompts))
    model = build_role(cfg, topology, "language", init, source.tokenizer_name)
    prompts = _prompts(cfg, source, rows)
    episodes = rollout(model, prompts, cfg.sampling, source.tokenizer.eos_id, (cfg.seed,))
    logprobs = episodes.batch.per_token["sampled_logprobs"][episodes.batch.response_mask]
    pieces = logprobs.split([len(r) for r in episodes.responses])
    texts = [source.tokenizer.decode(r) for r in episodes.responses]
    if dist.get_rank() == 0:
        answers = [
            {"prompt": source.tokenizer.decode(p), "response": t, "logprobs": lp.tolist()}
            for p, t, lp in zip(prompts, texts, pieces)
        ]
        write_jsonl(Path(cfg.out) / "generations.jsonl", answers)
        for answer in answers:
            print(json.dumps(answer["prompt"]), "->", json.dumps(answer["response"]))
    ended = float(episodes.ended.float().mean())
    write_summary(Path(cfg.out), {"responses": len(texts), "ended": ended})
    return texts


def _prompts(cfg: config.Evaluate | config.Generate, source: Source, rows) -> list[list[int]]:
    room = source.fits(cfg.sampling.max_new + 1, "sampling.max_new + 1")
    length = min(cfg.max_prompt, source.max_length + 1 - room)
    return tokenize_prompts(rows, source.tokenizer, length)


def text_batch(data: config.Data, tokenizer: Tokenizer, length: int) -> Batch:
    """A text file as sequences of `length` tokens, all of which count."""
    return pack_text(tokenize_text(read("text", **vars(data)), tokenizer, length))


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
