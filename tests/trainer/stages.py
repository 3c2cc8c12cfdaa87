"""Commands run as the command line runs them, on forked ranks, over a handful of tiny examples."""

import importlib
import json
import random
from pathlib import Path

from tests.forked_world import run_world
from tetrad.trainer import cli, config, world
from tetrad.trainer.data import write_jsonl

TINY = ["model.num_layers=2", "model.hidden_size=32", "model.max_length=128", "model.num_heads=4"]


def run(command: str, *arguments: str, ranks: int = 1) -> list[dict]:
    """The rows of metrics.jsonl after `tetrad command arguments` on so many ranks."""
    run_world(ranks, stage, command, list(arguments))
    out = next(a.split("=", 1)[1] for a in arguments if a.startswith("out="))
    return [] if command == "demo" else metrics(out)


def stage(command: str, arguments: list[str]) -> None:
    where, schema, _ = cli.COMMANDS[command]
    module, function = where.split(":")
    work = getattr(importlib.import_module(f"tetrad.trainer.{module}"), function)
    work(config.parse(getattr(config, schema), arguments))


def metrics(out: str) -> list[dict]:
    return [json.loads(row) for row in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def summary(out: str) -> dict:
    return json.loads((Path(out) / "summary.json").read_text())


def write_world(folder: Path, n: int = 40) -> None:
    """Text, demonstrations, comparisons and prompts of the miniature world."""
    rng = random.Random(0)
    tasks = world.tasks(n, 0, "train")
    write_jsonl(folder / "text.jsonl", ({"text": t} for t in world.documents(3 * n, 0)))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": t.prompt} for t in tasks))
    write_jsonl(
        folder / "demonstrations.jsonl",
        ({"prompt": t.prompt, "response": world.demonstration(t, rng)} for t in tasks),
    )
    rows = []
    for task in tasks:
        answers = list({world.demonstration(task, rng) for _ in range(6)} | {"no.", "a b c"})
        rows.append(
            {"prompt": task.prompt, "responses": answers, "ranks": world.rank(task, answers, rng)}
        )
    write_jsonl(folder / "comparisons.jsonl", rows)
