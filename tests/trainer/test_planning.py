"""What `tetrad plan` answers: fits, swaps, or refuses and says what would help."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tetrad.parallel.estimate import GIB, GPUS, costs
from tetrad.parallel.plan import Layout, Role, Run, Work, elements
from tetrad.parallel.settings import PRESETS, Architecture
from tetrad.trainer import planning
from tetrad.trainer.config import Plan, parse

ROOT = Path(__file__).parents[2]
SMALL = ["model.preset=gpt2-1542m", "gpu=a100-40gb", "parallel.precision=bf16", "max_prompt=512",
         "sampling.max_new=512", "sampling.rows_at_once=8"]  # fmt: skip


def run_of(*arguments: str) -> tuple[Plan, Run]:
    cfg = parse(Plan, list(arguments))
    return cfg, planning.run_of(cfg, planning._shapes(cfg), cfg.gpus)


@pytest.mark.parametrize(
    "recipe, gpus, gpu, peak",
    [
        ("plan_175b.yaml", 1024, "h200-141gb", "learn"),
        ("plan_70b.yaml", 64, "h100-80gb", "rollout"),
    ],
)
def test_recipes_fit(recipe, gpus, gpu, peak, capsys) -> None:
    planning.plan(parse(Plan, [recipe, f"gpus={gpus}", f"gpu={gpu}"]))
    printed = capsys.readouterr().out
    assert (percent := re.search(r"peak: .*\((\d+)%\)", printed))
    assert int(percent[1]) <= 100
    for phase in ("rollout policy", "score reference", "score reward", "learn critic"):
        assert len(re.findall(rf"^  {phase} ", printed, re.MULTILINE)) == 2  # memory, traffic


@pytest.mark.parametrize("layout", ["tp=8 pp=2", "tp=8 pp=1", "tp=4 pp=4", "tp=2 pp=8"])
def test_four_models_of_70b_do_not_fit_16_gpus(layout) -> None:
    settings = [f"parallel.{x}" for x in layout.split()]
    cfg, run = run_of("plan_70b.yaml", "gpus=16", "gpu=h100-80gb", *settings)
    with pytest.raises(ValueError) as refusal:
        planning.choose(run, GPUS[cfg.gpu].memory, "auto")
    said = str(refusal.value)
    assert re.search(r"rank \d+ needs [\d.]+ GiB in start .* 73.14 GiB available", said)
    # what it would fit with is no promise of the message alone
    found = re.search(r"It would fit with gpus=(\d+), for all roles (.*)", said)
    assert found and int(found[1]) > 16
    more = found[2].replace(",", "").split()
    more = [x if "." in x else f"parallel.{x}" for x in more]
    cfg, run = run_of("plan_70b.yaml", f"gpus={found[1]}", "gpu=h100-80gb", *more)
    planning.choose(run, GPUS[cfg.gpu].memory, "auto")


def test_the_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "tetrad.trainer.cli", "plan", "plan_70b.yaml", "gpus=16"]
    command += ["gpu=h100-80gb", "parallel.pp=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("tetrad plan: this does not fit")


def test_auto_swaps_only_where_it_must() -> None:
    _, run = run_of(*SMALL, "gpus=1")
    resident, swapped = (planning.peak(run, swap) for swap in (False, True))
    assert swapped < resident

    def memory(room: int) -> float:  # of which `room` is left to plan with
        return (room + planning.RESERVED) / (1 - planning.FRAGMENTED) + 1

    assert planning.choose(run, memory(resident), "auto") is False
    assert planning.choose(run, memory(resident), "swap") is True
    assert planning.choose(run, memory(resident - 2**20), "auto") is True
    with pytest.raises(ValueError, match="resident: .*fit with parallel.colocate=swap"):
        planning.choose(run, memory(resident - 2**20), "resident")
    assert planning.choose(run, memory(swapped), "auto") is True
    with pytest.raises(
        ValueError, match="this does not fit.*It would fit with parallel.microbatch_tokens=15360$"
    ):
        planning.choose(run, memory(swapped - 2**20), "auto")


def test_the_largest_that_fits_is_the_largest(capsys) -> None:
    arguments = [*SMALL, "gpus=4", "parallel.microbatch_tokens=2048", "parallel.colocate=swap"]
    planning.plan(parse(Plan, arguments))
    found = re.search(r"microbatch_tokens (\d+), or sampling.rows_at_once (\d+)", _out(capsys))
    assert found
    tokens, rows = int(found[1]), int(found[2])
    for key, value, unit in (
        ("parallel.microbatch_tokens", tokens, 1024), ("sampling.rows_at_once", rows, 1),
    ):  # fmt: skip
        cfg, run = run_of(*arguments, f"{key}={value}")
        planning.choose(run, GPUS[cfg.gpu].memory, cfg.parallel.colocate)
        cfg, run = run_of(*arguments, f"{key}={value + unit}")
        with pytest.raises(ValueError, match="does not fit"):
            planning.choose(run, GPUS[cfg.gpu].memory, cfg.parallel.colocate)


def test_critic_and_reward_have_a_shape_and_a_layout_of_their_own() -> None:
    shape = ["reward_shape.preset=gpt2-345m", "reward_shape.num_layers=6"]
    _, run = run_of(*SMALL, *shape, "gpus=8", "parallel.pp=4", "critic_parallel.pp=2")
    expected = Architecture(**PRESETS["gpt2-345m"] | {"vocab_size": 50257, "num_layers": 6})
    for name in ("critic", "reward"):
        assert run.roles[name].architecture == replace(expected, windows=())
        assert (run.roles[name].layout.pp, run.roles["policy"].layout.pp) == (2, 4)
    with pytest.raises(ValueError, match="pp 4 does not divide num_layers 6"):
        run_of(*SMALL, *shape, "gpus=8", "parallel.pp=4")


def test_a_checkpoint_brings_its_shape(tmp_path) -> None:
    a = Architecture(257, 2, 32, 4, 64)
    model = {"head": "language", "tokenizer": "bytes", "architecture": asdict(a)}
    (tmp_path / "model.json").write_text(json.dumps(model))
    _, run = run_of(f"model.init={tmp_path}", "gpus=1")
    assert {role.architecture for role in run.roles.values()} == {a}


def test_an_unknown_gpu_is_taken_for_the_nearest(capsys) -> None:
    planning.plan(parse(Plan, [*SMALL, "gpus=8", "gpu=H200"]))
    assert "gpu=H200 is not in the table" in (out := _out(capsys))
    assert "8 x h200-141gb" in out


def _out(capsys) -> str:
    return capsys.readouterr().out


def test_arithmetic_and_traffic_by_hand() -> None:
    """6 flops a weight and token in training, 2 in scoring, and what a ring sends."""
    a = Architecture(64 * 8, 4, 64, 4, 512, tie_embeddings=False, windows=(1,))
    role = Role(a, "language", Layout(tp=2, pp=2), trained=True)
    frozen = replace(role, trained=False)
    roles = {"policy": role, "reference": frozen, "critic": frozen, "reward": frozen}
    run = Run(roles, Work(8, 4, 1, 1, 1, 10**6, 4), 8)
    rollout, score, reference, _, _, learn = costs(run, swap=True)
    tokens = 8 * 2 / 2  # dp 2
    # the last stage: two layers of tp's half, final norm, unembedding; a window of one token
    weights = elements(role, 1)
    attention = 4 * 2 * 64 / 2 * 1
    assert score.flops == pytest.approx(tokens * (2 * weights + attention))
    assert learn.flops == pytest.approx(3 * score.flops)
    ring = 2 * (2 - 1) / 2 * tokens * 64 * 2  # an all-reduce of the hidden states in bf16
    assert score.tp == pytest.approx(2 * 2 * ring) and learn.tp == pytest.approx(2 * score.tp)
    assert learn.pp == 2 * score.pp == 2 * tokens * 64 * 2
    held = run.states(run.worst(True))["policy"]
    assert rollout.waiting == 2  # one stage after the other
    each = (held["gradients"] + held["parameters"]) * (2 - 1) / 2  # one there, one back
    assert learn.dp == pytest.approx(2 * each)  # two optimizer steps
    assert learn.swap == 2 * held["parameters"] + 2 * 2 * held["optimizer"]
    assert (score.swap, rollout.swap) == (0, 0)  # the policy is there already
    assert reference.swap == run.states(run.worst(True))["reference"]["parameters"]
    for cost in (rollout, score, learn):
        assert 0 < cost.seconds(run, GPUS["h100-80gb"]) < cost.seconds(run, GPUS["a100-40gb"])


def test_the_page_shows_what_is_printed(capsys) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    shown = re.search(r"```\n\$ tetrad plan (.*)\n((?:.*\n)*?)```", page)
    assert shown
    planning.plan(parse(Plan, shown[1].split()))
    assert _out(capsys).strip() == shown[2].strip()


def test_gpus_leave_something_to_plan_with() -> None:
    for gpu in GPUS.values():
        assert 0.85 * gpu.memory < planning.available(gpu.memory) < gpu.memory - 2 * GIB
