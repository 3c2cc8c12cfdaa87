"""SFT, reward model and PPO as whole runs: the same in every layout, resumable, exact at lr 0."""

import math
import re
import shutil

import pytest
import torch

from tests.forked_world import run_world
from tests.trainer.stages import TINY, metrics, run, stage, summary, write_world
from tetrad.parallel import checkpoint
from tetrad.parallel.model import build
from tetrad.parallel.packed import pack
from tetrad.parallel.settings import Layout
from tetrad.parallel.topology import initialize
from tetrad.trainer import config, data
from tetrad.trainer.loop import build_role
from tetrad.trainer.tokenizer import ByteTokenizer

STEPS = 20
LAYOUTS = [(2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 2)]  # ranks, tp, pp
LR = ["schedule.lr=1e-3", "schedule.decay=constant"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with data, and an SFT and a reward-model run of one rank to start from."""
    folder = tmp_path_factory.mktemp("runs")
    write_world(folder)
    run("pretrain", *arguments("pretrain", folder, folder / "pretrain"))
    run("sft", *arguments("sft", folder, folder / "sft"))
    run("rm", *arguments("rm", folder, folder / "rm"))
    run("ppo", *arguments("ppo", folder, folder / "ppo"))
    shutil.copytree(folder / "rm", folder / "short")
    for model in folder.glob("short/checkpoints/step_*/reward/model.json"):
        model.write_text(model.read_text().replace('"max_length": 128', '"max_length": 24'))
    return folder


def arguments(command, folder, out, *more) -> list[str]:
    """Twenty steps of each stage on the tiny data."""
    data = {
        "pretrain": [f"text.path={folder}/text.jsonl", *TINY, "batch_size=8", "length=64"]
        + ["epochs=0.6", "schedule.warmup_steps=0"],
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
    "pretrain": ["loss", "grad_norm"],
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
            # Adam turns the rounding of tiny gradients into whole steps: norms drift before losses
            close = 1e-3 if name == "grad_norm" else 1e-4
            assert ours[name] == pytest.approx(one[name], abs=close, rel=close), (
                ours["step"],
                name,
            )


# at full speed from the first step: weights move by about 1e-3
ONE = ["steps=1", "schedule.warmup_steps=0", "critic_schedule.warmup_steps=0"]
SWAPPED = ["colocate=swap", "save_in_background=true", "parallel.overlap=true"]
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]


def weights(run) -> dict:
    """What one rank reads from a run's newest checkpoints, by role and name."""
    topology = initialize(Layout())
    found = {}
    for role, head in (("policy", "language"), ("critic", "scalar")):
        folder = checkpoint.find(str(run), head)
        chunks = build(checkpoint.read_model(folder)[0], head, topology)
        checkpoint.load_weights(chunks, topology, folder)
        found |= {f"{role}.{name}": p.detach() for name, p in chunks[0].named_parameters()}
    return found


@pytest.fixture(scope="module")
def one_iteration(runs):
    """Two optimizer steps of one PPO-ptx iteration on one rank."""
    row, *_ = run("ppo", *arguments("ppo", runs, runs / "iteration", *ONE))
    return row, run_world(1, weights, runs / "iteration")[0]


@pytest.mark.parametrize(
    "tp, pp, dp, more",
    [(*sizes, []) for sizes in SIZES[1:]]
    + [(*sizes, ["parallel.sequence_parallel=true"]) for sizes in SIZES if sizes[0] > 1]
    # critic and reward model in another layout; context parallel; interleaved
    + [
        (2, 1, 1, ["critic_parallel.tp=1", "critic_parallel.pp=2"]),
        (1, 2, 2, ["critic_parallel.tp=4", "critic_parallel.pp=1"]),
        (2, 1, 1, ["parallel.cp=2", "parallel.sequence_parallel=true"]),
        (1, 2, 1, ["parallel.vpp=1", "parallel.cp=2", "critic_parallel.cp=1"]),
        (2, 1, 2, SWAPPED),
    ],
)
def test_a_ppo_iteration_is_the_same_in_every_layout(
    tp, pp, dp, more, runs, one_iteration, tmp_path
) -> None:
    ranks = tp * pp * dp * (2 if "parallel.cp=2" in more else 1)
    layout = [f"parallel.tp={tp}", f"parallel.pp={pp}", *ONE, *more]
    (row,) = run("ppo", *arguments("ppo", runs, tmp_path / "run", *layout), ranks=ranks)
    expected, expected_weights = one_iteration
    for name in (*LOSSES["ppo"], "policy/grad_norm", "critic/grad_norm"):
        assert row[name] == pytest.approx(expected[name], abs=1e-4, rel=1e-4), name
    updated = run_world(1, weights, tmp_path / "run")[0]
    assert updated.keys() == expected_weights.keys()
    for name, weight in updated.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-4, rtol=1e-4)


def comparable(row: dict) -> dict:
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "memory"))}


@pytest.mark.parametrize(
    "command, more", [*((command, []) for command in LOSSES), ("ppo", [*SWAPPED, "ema_decay=0.9"])]
)
def test_a_stopped_run_continues_as_if_never_stopped(command, more, runs, tmp_path) -> None:
    out = tmp_path / "run"
    run(command, *arguments(command, runs, out, "stop_after=7", "save_every=5", *more))
    # a kill between two checkpoints: steps 5 and 6 were logged, but the newest checkpoint has 5
    (out / "checkpoints" / "latest").write_text('"step_000005"')
    rows = run(command, *arguments(command, runs, out, "save_every=5", *more))
    expected = metrics(runs / command)
    assert [r["step"] for r in rows] == list(range(STEPS))
    for ours, one in zip(rows, expected):
        assert comparable(ours) == pytest.approx(comparable(one), rel=1e-6, abs=1e-7)
    assert comparable(summary(out)) == pytest.approx(comparable(summary(runs / command)))


def test_another_config_is_not_continued(runs, tmp_path) -> None:
    out = tmp_path / "run"
    shutil.copytree(runs / "sft", out)
    with pytest.raises(AssertionError, match="holds a run with another seed"):
        run("sft", *arguments("sft", runs, out, "seed=5"))
    assert len(run("sft", *arguments("sft", runs, out, "seed=5", "resume=false"))) == STEPS


def test_training_learns(runs) -> None:
    for command in ("pretrain", "sft", "rm"):
        losses = [row["loss"] for row in metrics(runs / command)]
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    accuracy = [row["accuracy"] for row in metrics(runs / "rm")]
    assert sum(accuracy[-4:]) / 4 > 0.6


def test_at_lr_zero_the_ratio_is_one_and_the_kl_zero(runs, tmp_path) -> None:
    frozen = ["schedule.lr=0", "critic_schedule.lr=0", "ptx_coef=0", "sampling.temperature=0.7"]
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


def test_the_phases_make_up_the_time_of_an_iteration(runs) -> None:
    for row in metrics(runs / "ppo"):
        phases = [row[f"seconds/{name}"] for name in ("rollout", "score", "judge", "learn")]
        assert min(phases) > 0
        assert 0.9 * row["seconds"] < sum(phases) < row["seconds"]


def test_a_response_without_eos_can_have_a_fixed_score(runs, tmp_path) -> None:
    fixed = ["no_eos_score=-1", "sampling.max_new=1", "steps=1"]
    # one token, and a model that has learned to begin its answers with a letter: no eos
    (row,) = run("ppo", *arguments("ppo", runs, tmp_path / "run", *fixed))
    assert row["ended"] == 0 and row["score"] == -1


def demonstrations_score(runs):
    cfg = config.parse(config.RM, arguments("rm", runs, runs / "rm"))
    topology = initialize(Layout())
    model = build_role(cfg, topology, "scalar", config.Model(init=str(runs / "rm")), "bytes")
    rows = data.read("demonstrations", f"{runs}/demonstrations.jsonl")
    good = data.tokenize_demonstrations(rows, ByteTokenizer(), 128)
    return float(model.scores(pack([d.prompt for d in good], [d.response for d in good])).mean())


def test_demonstrations_score_zero_on_average(runs) -> None:
    assert run_world(1, demonstrations_score, runs)[0] == pytest.approx(0, abs=1e-4)
    assert metrics(runs / "rm")[-1]["bias_shift"] != 0


@pytest.mark.parametrize(
    "command, slip, message",
    [
        ("ppo", "reward={runs}/sft", "no model with a scalar head in"),
        ("ppo", "model.init={runs}/rm", "no model with a language head in"),
        ("ppo", "ptx_length=500", "ptx_length 500 exceeds the model's max_length 128"),
        ("ppo", "sampling.max_new=128", "sampling.max_new + 1 129 exceeds"),
        ("ppo", "sampling.temperature=0", "sampling.temperature is 0"),
        ("ppo", "minibatch_size=3", "minibatch_size 3 does not divide batch_size 8"),
        ("ppo", "reward={runs}/short", "reward reads 24 tokens at most; prompt and response have"),
        ("sft", "model.init={runs}/sft", "model.num_layers is given beside model.init"),
        ("pretrain", "length=500", "length 500 exceeds the model's max_length 128"),
        ("sft", "data.path=null", "the path of the demonstrations is missing"),
    ],
)
def test_slips_are_refused(command, slip, message, runs, tmp_path) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(command, *arguments(command, runs, tmp_path / "run", slip.format(runs=runs)))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_grown_data_is_not_mistaken_for_the_same_run(runs, tmp_path) -> None:
    out, grown = tmp_path / "run", tmp_path / "demonstrations.jsonl"
    shutil.copy(runs / "demonstrations.jsonl", grown)
    run("sft", *arguments("sft", runs, out, f"data.path={grown}", "stop_after=3"))
    with grown.open("a") as file:
        file.write('{"prompt": "a\\n", "response": "b"}\n')
    with pytest.raises(AssertionError, match="was begun on 40 examples, now there are 41"):
        run("sft", *arguments("sft", runs, out, f"data.path={grown}"))


def test_reading_commands_leave_a_training_run_alone(runs) -> None:
    before = (runs / "sft" / "config.yaml").read_text()
    with pytest.raises(AssertionError, match="holds a training run"):
        run_world(1, stage, "generate", [f"out={runs}/sft", f"model={runs}/sft", "prompt=a"])
    assert (runs / "sft" / "config.yaml").read_text() == before


def test_generate_and_evaluate(runs, tmp_path, capfd) -> None:
    prompts = f"prompts.path={runs}/prompts.jsonl"
    run("sft", *arguments("sft", runs, tmp_path / "other", "seed=1", "stop_after=1"))

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
