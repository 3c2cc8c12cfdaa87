"""`tetrad demo`: the three steps of InstructGPT in a world small enough for a laptop.

A base model is pretrained on sheets of instructions, so that it continues an instruction instead
of answering it; then the same `pretrain`, `sft`, `rm` and `ppo` that a cluster runs make an
assistant of it. The gold judge labels comparisons and grades held-out answers; no model sees it.
"""

import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tetrad.parallel.engine import Engine
from tetrad.parallel.settings import Schedule
from tetrad.parallel.topology import Topology
from tetrad.trainer import config, report, world
from tetrad.trainer.config import Data
from tetrad.trainer.data import write_jsonl
from tetrad.trainer.evaluate import sampled_kl, text_batch, win_rate
from tetrad.trainer.loop import build_role, start
from tetrad.trainer.metrics import write_summary
from tetrad.trainer.ppo import ppo
from tetrad.trainer.rm import rm
from tetrad.trainer.rollout import Episodes, rollout
from tetrad.trainer.sft import mean_loss, pretrain, sft
from tetrad.trainer.tokenizer import ByteTokenizer

log = logging.getLogger("tetrad")

TOKENIZER = ByteTokenizer()
SAMPLING = config.Sampling(max_new=32)
LENGTH = 256  # tokens of a pretraining sequence: about two documents
MODEL = config.Model(num_layers=4, hidden_size=128, num_heads=4, max_length=LENGTH)
SIZES = {"documents": 11000, "demonstrations": 2400, "prompts": 4000, "compared": 1000}


def demo(cfg: config.Demo) -> dict:
    """Run every stage into its own folder under cfg.out; then summary.json and report.html."""
    began = time.perf_counter()
    topology = start(cfg)
    out = Path(cfg.out)
    log.info(f"demo: writing the miniature world to {out / 'data'}")
    files = _write_data(out / "data", cfg)
    common: dict[str, Any] = {"seed": cfg.seed, "parallel": cfg.parallel, "save_every": 1000}

    pretrain(
        config.Pretrain(
            out=str(out / "base"), model=MODEL, text=Data(files["text"]), length=LENGTH,
            batch_size=8, epochs=1, validation=0.01,
            schedule=Schedule(lr=3e-3, warmup_steps=20, warmup_from=0.0), **common,
        )
    )  # fmt: skip
    sft(
        config.SFT(
            out=str(out / "sft"), model=config.Model(init=str(out / "base")),
            data=Data(files["demonstrations"]), max_length=LENGTH,
            epochs=3, batch_size=32, validation=0.05, dropout=0.0,
            schedule=Schedule(lr=1.5e-3, warmup_steps=8), **common,
        )
    )  # fmt: skip
    _collect_comparisons(cfg, topology, files["comparisons"])
    reward = rm(
        config.RM(
            out=str(out / "rm"), model=config.Model(init=str(out / "sft")),
            data=Data(files["comparisons"]),
            demonstrations=Data(files["demonstrations"], limit=256),
            max_length=LENGTH, epochs=1, batch_size=16, validation=0.1,
            schedule=Schedule(lr=5e-4, warmup_steps=4), **common,
        )
    )  # fmt: skip
    for name, ptx_coef in (("ppo", 0.0), ("ppo_ptx", 0.1)):
        ppo(
            config.PPO(
                out=str(out / name), model=config.Model(init=str(out / "sft")),
                reward=str(out / "rm"), prompts=Data(files["prompts"]), text=Data(files["text"]),
                max_prompt=LENGTH, sampling=SAMPLING, steps=max(2, round(45 * cfg.scale)),
                batch_size=64, minibatch_size=32, kl_coef=0.15,
                ptx_coef=ptx_coef, ptx_ratio=0.25, ptx_length=LENGTH,
                schedule=Schedule(lr=1.5e-4, decay="constant", warmup_steps=20, warmup_from=0.0),
                critic_schedule=Schedule(lr=1e-3, decay="constant"), **common,
            )
        )  # fmt: skip
    summary = _graded(cfg, topology, files)
    summary = {
        "seconds": time.perf_counter() - began,
        "world_size": dist.get_world_size(),
        "rm": {"heldout_accuracy": reward["heldout_accuracy"]},
        **summary,
    }
    write_summary(out, summary)
    if dist.get_rank() == 0:
        log.info(f"demo: {json.dumps({k: summary[k] for k in ('gold', 'win_rate_vs_sft')})}")
        log.info(f"demo: report in {report.write(out)}")
    dist.barrier()
    return summary


def _write_data(folder: Path, cfg: config.Demo) -> dict[str, str]:
    """The miniature world as files in the formats of any run."""
    names = ("text", "heldout_text", "demonstrations", "prompts", "comparisons")
    files = {name: str(folder / f"{name}.jsonl") for name in names}
    if dist.get_rank() == 0:
        rng = random.Random(f"labelers {cfg.seed}")
        size = {name: max(100, round(n * cfg.scale)) for name, n in SIZES.items()}
        texts = world.documents(size["documents"] + 200, cfg.seed)
        write_jsonl(files["text"], ({"text": t} for t in texts[200:]))
        write_jsonl(files["heldout_text"], ({"text": t} for t in texts[:200]))
        tasks = world.tasks(size["demonstrations"], cfg.seed, "train")
        write_jsonl(
            files["demonstrations"],
            ({"prompt": t.prompt, "response": world.demonstration(t, rng)} for t in tasks),
        )
        tasks = world.tasks(size["prompts"], cfg.seed + 1, "train")
        write_jsonl(files["prompts"], ({"prompt": t.prompt, "kind": t.kind} for t in tasks))
    dist.barrier()
    return files


def _policy(cfg: config.Demo, topology: Topology, name: str) -> Engine:
    source = config.Model(init=str(Path(cfg.out) / name))
    return build_role(cfg, topology, "language", source, MODEL.tokenizer)


def _answers(policy: Engine, tasks: list[world.Task], seed: int) -> tuple[list[str], Episodes]:
    prompts = [TOKENIZER.encode(t.prompt) for t in tasks]
    episodes = rollout(policy, prompts, SAMPLING, TOKENIZER.eos_id, seed=(seed, -1))
    return [TOKENIZER.decode(r) for r in episodes.responses], episodes


def _collect_comparisons(cfg: config.Demo, topology: Topology, path: str) -> None:
    """K = 4..9 answers of the SFT model to each prompt, ranked by the simulated labeler."""
    rng = random.Random(f"comparisons {cfg.seed}")
    tasks = world.tasks(max(60, round(SIZES["compared"] * cfg.scale)), cfg.seed + 2, "train")
    repeated = [task for task in tasks for _ in range(rng.randint(4, 9))]
    log.info(f"demo: the SFT model writes {len(repeated)} answers for the labeler to rank")
    answers, _ = _answers(_policy(cfg, topology, "sft"), repeated, cfg.seed)
    groups: dict[str, list[str]] = {}
    for task, answer in zip(repeated, answers):
        if answer.strip():
            groups.setdefault(task.prompt, []).append(answer)
    rows = [
        {"prompt": t.prompt, "responses": r, "ranks": world.rank(t, r, rng)}
        for t in tasks
        if len(r := groups.get(t.prompt, [])) > 1
    ]
    if dist.get_rank() == 0:
        write_jsonl(path, rows)
    dist.barrier()


def _graded(cfg: config.Demo, topology: Topology, files: dict[str, str]) -> dict:
    """All policies on the held-out prompts and text, by the gold judge."""
    tasks = world.tasks(max(60, round(300 * min(1, cfg.scale))), cfg.seed, "heldout")
    text = text_batch(Data(files["heldout_text"]), TOKENIZER, LENGTH)
    gold: dict[str, list[float]] = {}
    answers: dict[str, list[str]] = {}
    kl, loss = {}, {}
    sft_policy = _policy(cfg, topology, "sft")
    for name in report.POLICIES:
        log.info(f"demo: the judge grades {name} on {len(tasks)} held-out prompts")
        policy = _policy(cfg, topology, name)
        answers[name], episodes = _answers(policy, tasks, cfg.seed)
        gold[name] = [world.judge(t, a) for t, a in zip(tasks, answers[name])]
        loss[name] = mean_loss(policy, text)
        if name.startswith("ppo"):
            kl[name] = sampled_kl(policy, sft_policy, episodes, SAMPLING.temperature)
    if dist.get_rank() == 0:
        rows = [
            {"prompt": t.prompt, "kind": t.kind, "answer": t.answer}
            | {
                name: {"response": answers[name][i], "gold": gold[name][i]}
                for name in report.POLICIES
            }
            for i, t in enumerate(tasks)
        ]
        write_jsonl(Path(cfg.out) / "answers.jsonl", rows)
    return {
        "gold": {name: sum(g) / len(g) for name, g in gold.items()},
        "win_rate_vs_sft": {
            n: win_rate(gold[n], gold["sft"]) for n in report.POLICIES if n != "sft"
        },
        "kl": kl,
        "pretrain_loss": loss,
    }
