"""SFT, reward model and PPO as whole runs: the same in every layout, resumable, exact at lr 0."""

import math
import shutil

import pytest

from tests.trainer.stages import TINY, metrics, run, summary, write_world

STEPS = 20
LAYOUTS = [(2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2)]  # ranks, tp, pp
LR = ["schedule.lr=1e-3", "schedule.decay=constant"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data, and an SFT and a reward-model run of one rank to start from."""
    folder = tmp_path_factory.mktemp("runs")
    write_world(folder)
    run("sft", *arguments("sft", folder, folder / "sft"))
    run("rm", *arguments("rm", folder, folder / "rm"))
    run("ppo", *arguments("ppo", folder, folder / "ppo"))
    return folder


def arguments(command, folder, out, *more) -> list[str]:
    """Twenty steps of each stage on the tiny data."""
    data = {
        "sft": [f"data.path={folder}/demonstrations.jsonl", *TINY, "batch_size=8", "epochs=4.2"]
        + ["max_length=128", "validation=0.05", "dropout=0"],
        "rm": [f"data.path={folder}/comparisons.jsonl", f"model.init={folder}/sft", "batch_size=8"]
        + ["epochs=4.2", "max_length=128", "validation=0.05"]
        + [f"demonstrations.path={folder}/demonstrations.jsonl"],
        "ppo": [f"prompts.path={folder}/prompts.jsonl", f"model.init={folder}/sft"]
        + [f"reward={folder}/rm", f"text.path={folder}/text.jsonl", "ptx_coef=0.5", "ptx_ratio=0.5"]
        + ["ptx_length=64", "sampling.max_new=12", f"steps={STEPS}", "batch_size=8"]
        + ["minibatch_size=4", "critic_schedule.lr=1e-3"],
    }
    return [f"out={out}", *data[command], *LR, "parallel.microbatch_tokens=300", *more]


LOSSES = {
    "sft": ["loss", "grad_norm"],
    "rm": ["loss", "grad_norm"],
    "ppo": ["policy/loss", "critic/loss", "ptx/loss", "score", "kl", "reward"],
}


@pytest.mark.parametrize("command", LOSSES)
@pytest.mark.parametrize("ranks, tp, pp", LAYOUTS)
def test_twenty_steps_are_the_same_in_every_layout(command, ranks, tp, pp, runs, tmp_path) -> None:
    layout = [f"parallel.tp={tp}", f"parallel.pp={pp}"]
    rows = run(command, *arguments(command, runs, tmp_path / "run", *layout), ranks=ranks)
    expected = metrics(runs / command)
    assert len(rows) == len(expected) == STEPS
    for ours, one in zip(rows, expected):
        for name in LOSSES[command]:
            assert ours[name] == pytest.approx(one[name], abs=1e-4, rel=1e-4), (ours["step"], name)


@pytest.mark.parametrize("command", LOSSES)
def test_a_stopped_run_continues_as_if_never_stopped(command, runs, tmp_path) -> None:
    out = tmp_path / "run"
    run(command, *arguments(command, runs, out, "stop_after=7", "save_every=5"))
    # a kill between two checkpoints: steps 5 and 6 were logged, but the newest checkpoint has 5
    (out / "checkpoints" / "latest").write_text('"step_000005"')
    rows = run(command, *arguments(command, runs, out, "save_every=5"))
    expected = metrics(runs / command)
    assert [r["step"] for r in rows] == list(range(STEPS))
    for ours, one in zip(rows, expected):
        assert {k: v for k, v in ours.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in one.items() if k != "seconds"}, rel=1e-6, abs=1e-7
        )
    assert summary(out) == pytest.approx(summary(runs / command))


def test_another_config_is_not_continued(runs, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs / "sft", out)
    with pytest.raises(AssertionError, match="holds a run with another seed"):
        run("sft", *arguments("sft", runs, out, "seed=5"))
    assert len(run("sft", *arguments("sft", runs, out, "seed=5", "resume=false"))) == STEPS


def test_training_learns(runs) -> None:
    for command, name in (("sft", "loss"), ("rm", "loss")):
        losses = [row[name] for row in metrics(runs / command)]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert abs(summary(runs / "rm")["heldout_accuracy"]) <= 1


def test_at_lr_zero_the_ratio_is_one_and_the_kl_zero(runs, tmp_path) -> None:
    frozen = ["schedule.lr=0", "critic_schedule.lr=0", "ptx_coef=0"]
    rows = run("ppo", *arguments("ppo", runs, tmp_path / "run", *frozen, "steps=2"))
    for row in rows:
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["policy/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert row["kl"] == pytest.approx(0, abs=1e-5)
        assert row["policy/approx_kl"] == pytest.approx(0, abs=1e-5)
        assert row["sampling_mismatch_max"] < 1e-4


def test_every_iteration_starts_on_policy(runs) -> None:
    """The first minibatch compares the policy with itself, whatever was learned before."""
    for row in metrics(runs / "ppo"):
        assert row["policy/ratio_max_first"] == pytest.approx(1, abs=1e-5)
        assert row["sampling_mismatch_max"] < 1e-4
        assert math.isfinite(row["kl"])
    assert metrics(runs / "ppo")[-1]["kl"] != 0


def test_a_response_without_eos_can_have_a_fixed_score(runs, tmp_path) -> None:
    fixed = ["no_eos_score=-1", "sampling.max_new=1", "steps=1"]
    (row,) = run("ppo", *arguments("ppo", runs, tmp_path / "run", *fixed))
    assert row["ended"] < 1 and row["score"] < 0
    if row["ended"] == 0:
        assert row["score"] == -1


def test_generate_and_evaluate(runs, tmp_path, capfd) -> None:
    prompts = f"prompts.path={runs}/prompts.jsonl"
    run("sft", *arguments("sft", runs, tmp_path / "other", "seed=1", "stop_after=1"))
    from tests.forked_world import run_world
    from tests.trainer.stages import stage

    out = tmp_path / "answers"
    run_world(
        2, stage, "generate", [f"out={out}", f"model={runs}/sft", prompts, "sampling.max_new=8"]
    )
    rows = [r for r in (out / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert "->" in capfd.readouterr().out
    out = tmp_path / "worth"
    run_world(
        1, stage, "evaluate",
        [f"out={out}", f"model={runs}/ppo", prompts, f"reward={runs}/rm", f"baseline={runs}/sft",
         f"text.path={runs}/text.jsonl", "length=64", "sampling.max_new=8"],
    )  # fmt: skip
    found = summary(out)
    assert 0 <= found["win_rate"] <= 1 and found["loss"] > 0 and math.isfinite(found["kl"])
