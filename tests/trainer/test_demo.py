"""The demo from end to end, short: what it writes, not how much it learns."""

import math

from tests.trainer.stages import run, summary


def test_demo_runs_every_stage_and_reports(tmp_path) -> None:
    out = tmp_path / "demo"
    run_demo(out, ranks=1)
    found = summary(out)
    assert found["world_size"] == 1 and found["seconds"] > 0
    assert set(found["gold"]) == set(found["pretrain_loss"]) == {"base", "sft", "ppo", "ppo_ptx"}
    assert set(found["win_rate_vs_sft"]) == {"base", "ppo", "ppo_ptx"}
    assert 0 <= found["rm"]["heldout_accuracy"] <= 1
    assert all(math.isfinite(kl) for kl in found["kl"].values())
    for stage in ("base", "sft", "rm", "ppo", "ppo_ptx"):
        assert {p.name for p in (out / stage).iterdir()} >= {
            "config.yaml", "metrics.jsonl", "summary.json", "checkpoints",
        }  # fmt: skip
        assert list((out / stage).glob("events.out.tfevents*"))
    assert (out / "report.html").stat().st_size > 50_000
    # a finished demo that is started again finds every stage done
    before = {s: (out / s / "metrics.jsonl").read_text() for s in ("base", "sft", "rm", "ppo")}
    run_demo(out, ranks=1)
    assert summary(out)["gold"] == found["gold"]
    assert before == {s: (out / s / "metrics.jsonl").read_text() for s in before}


def test_demo_runs_at_tp_2_pp_2(tmp_path) -> None:
    run_demo(tmp_path / "demo", "parallel.tp=2", "parallel.pp=2", ranks=4)
    assert summary(tmp_path / "demo")["world_size"] == 4


def run_demo(out, *more: str, ranks: int) -> None:
    run("demo", f"out={out}", "scale=0.01", *more, ranks=ranks)
