"""The recipes on real text: instructions, preferences, web text, grade-school mathematics."""

import math
from pathlib import Path

import pytest

from tests.trainer.stages import TINY, run, summary

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the real data sets are not here")

INSTRUCT = DATA / "instruct-demo"
GSM8K = DATA / "gsm8k"
LONG = [a if "max_length" not in a else "model.max_length=2048" for a in TINY]


def finite(rows: list[dict], *names: str) -> None:
    assert rows and all(math.isfinite(row[name]) for row in rows for name in names)


def short(data: str, rows: int) -> list[str]:
    return [f"data.path={data}", f"data.limit={rows}"]


def ppo_arguments(folder, prompts: Path, rows: int, *more: str) -> list[str]:
    return [
        f"model.init={folder}/sft", f"reward={folder}/rm", f"out={folder}/ppo",
        f"prompts.path={prompts}", f"prompts.limit={rows}", "steps=3", "batch_size=4",
        "minibatch_size=2", "sampling.max_new=16", *more,
    ]  # fmt: skip


def test_instructions_preferences_and_web_text(tmp_path) -> None:
    rows = run(
        "sft", "alpaca_sft.yaml", f"out={tmp_path}/sft", *LONG, "batch_size=16",
        *short(f"{INSTRUCT}/alpaca_en_demo.json.gz", 160),
    )  # fmt: skip
    finite(rows, "loss", "grad_norm")
    assert rows[-1]["loss"] < rows[0]["loss"]
    rows = run(
        "rm", "preference_rm.yaml", f"out={tmp_path}/rm", f"model.init={tmp_path}/sft",
        "batch_size=8", *short(f"{INSTRUCT}/dpo_en_demo.json.gz", 100),
    )  # fmt: skip
    finite(rows, "loss", "accuracy")
    assert 0 <= summary(tmp_path / "rm")["heldout_accuracy"] <= 1
    rows = run(
        "ppo", "alpaca_ppo_ptx.yaml",
        *ppo_arguments(tmp_path, INSTRUCT / "alpaca_en_demo.json.gz", 60),
        f"text.path={INSTRUCT}/c4_demo.jsonl.gz", "text.limit=40",
    )  # fmt: skip
    finite(rows, "score", "kl", "policy/loss", "critic/loss", "ptx/loss")


def test_mathematics_with_four_graded_solutions(tmp_path) -> None:
    rows = run(
        "sft", "gsm8k_sft.yaml", f"out={tmp_path}/sft", *LONG, "batch_size=16",
        *short(f"{GSM8K}/train.jsonl.gz", 160),
    )  # fmt: skip
    assert rows[-1]["loss"] < rows[0]["loss"]
    rows = run(
        "rm", "gsm8k_rm.yaml", f"out={tmp_path}/rm", f"model.init={tmp_path}/sft",
        "batch_size=8", *short(f"{GSM8K}/example_model_solutions.jsonl.gz", 60),
    )  # fmt: skip
    finite(rows, "loss", "accuracy")
    rows = run(
        "ppo", "gsm8k_ppo.yaml", *ppo_arguments(tmp_path, GSM8K / "train.jsonl.gz", 60),
    )  # fmt: skip
    finite(rows, "score", "kl", "policy/loss", "critic/loss")
