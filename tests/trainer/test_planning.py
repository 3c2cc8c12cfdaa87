"""What `tetrad plan` answers: fits, swaps, or refuses and says what would help."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tetrad.parallel.estimate import GPUS
from tetrad.parallel.plan import Run
from tetrad.parallel.settings import PRESETS, Architecture
from tetrad.trainer import planning
from tetrad.trainer.config import Plan, parse
from tetrad.trainer.plan import plan, shapes

ROOT = Path(__file__).parents[2]
SMALL = ["model.preset=gpt2-1542m", "gpu=a100-40gb", "parallel.precision=bf16", "max_prompt=512",
         "sampling.max_new=512", "sampling.rows_at_once=8"]  # fmt: skip


def run_of(*arguments: str) -> tuple[Plan, Run]:
    cfg = parse(Plan, list(arguments))
    return cfg, planning.run_of(cfg, shapes(cfg), cfg.gpus)


@pytest.mark.parametrize(
    "recipe, gpus, gpu",
    [("plan_175b.yaml", 1024, "h200-141gb"), ("plan_70b.yaml", 64, "h100-80gb")],
)
def test_recipes_fit(recipe, gpus, gpu, capsys) -> None:
    plan(parse(Plan, [recipe, f"gpus={gpus}", f"gpu={gpu}"]))
    printed = capsys.readouterr().out
    assert (percent := re.search(r"peak: .*\((\d+)%\)", printed))
    assert int(percent[1]) <= 100
    for phase in ("rollout policy", "score reference", "score reward", "learn critic"):
        assert len(re.findall(rf"^  {phase} ", printed, re.MULTILINE)) == 2  # memory, traffic


def refusal(cfg: Plan, run: Run, memory: float) -> str:
    with pytest.raises(ValueError, match="^this does not fit: ") as error:
        planning.choose(cfg, run, memory)
    return str(error.value)


@pytest.mark.parametrize(
    "start, more",
    [
        ("gpus=16 parallel.pp=2", "gpus=32 parallel.pp=4"),
        ("gpus=16 parallel.tp=2 parallel.pp=8", "gpus=32 parallel.tp=8 parallel.pp=4"),
        ("gpus=16 parallel.pp=1 parallel.cp=2", "gpus=32 parallel.pp=4 parallel.cp=1"),
        # what critic_parallel says goes on to hold: it has to be said anew
        (
            "gpus=16 parallel.pp=2 critic_parallel.pp=2",
            "gpus=32 parallel.pp=4 critic_parallel.pp=4",
        ),
        ("gpus=64 parallel.pp=2", "parallel.pp=4"),
        ("gpus=32 colocate=resident", "colocate=swap"),
    ],
)
def test_what_would_fit_fits_as_it_is_printed(start, more) -> None:
    arguments = ["plan_70b.yaml", "gpu=h100-80gb", *start.split()]
    cfg, run = run_of(*arguments)
    said = refusal(cfg, run, GPUS[cfg.gpu].memory)
    assert re.search(r"rank \d+ needs [\d.]+ GiB in \w+ .* [\d.]+ GiB available", said)
    settings = said.partition("It would fit with ")[2]
    assert settings == more
    cfg, run = run_of(*arguments, *settings.split())
    planning.choose(cfg, run, GPUS[cfg.gpu].memory)


def test_the_command_refuses_in_one_line() -> None:
    command = [sys.executable, "-m", "tetrad.trainer.cli", "plan", "plan_70b.yaml", "gpus=16"]
    command += ["gpu=h100-80gb", "parallel.pp=2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("tetrad plan: this does not fit")


def test_auto_swaps_only_where_it_must() -> None:
    cfg, run = run_of(*SMALL, "gpus=1")
    resident, swapped = (planning.peak(run, swap) for swap in (False, True))
    assert swapped < resident

    def memory(room: int) -> float:  # of which `room` is left to plan with
        return (room + planning.RESERVED) / (1 - planning.FRAGMENTED) + 1

    def choose(colocate: str, room: int) -> bool:
        return planning.choose(replace(cfg, colocate=colocate), run, memory(room))

    assert choose("auto", resident) is False
    assert choose("swap", resident) is True
    assert choose("auto", resident - 2**20) is True
    with pytest.raises(ValueError, match="resident: .*It would fit with colocate=swap$"):
        choose("resident", resident - 2**20)
    assert choose("auto", swapped) is True
    said = "this does not fit.*It would fit with parallel.microbatch_tokens=15360$"
    with pytest.raises(ValueError, match=said):
        choose("auto", swapped - 2**20)


def test_the_largest_that_fits_is_the_largest(capsys) -> None:
    arguments = [*SMALL, "gpus=4", "parallel.microbatch_tokens=2048", "colocate=swap"]
    plan(parse(Plan, arguments))
    found = re.search(r"microbatch_tokens (\d+), or sampling.rows_at_once (\d+)", _out(capsys))
    assert found
    tokens, rows = int(found[1]), int(found[2])
    for key, value, unit in (
        ("parallel.microbatch_tokens", tokens, 1024), ("sampling.rows_at_once", rows, 1),
    ):  # fmt: skip
        cfg, run = run_of(*arguments, f"{key}={value}")
        planning.choose(cfg, run, GPUS[cfg.gpu].memory)
        cfg, run = run_of(*arguments, f"{key}={value + unit}")
        refusal(cfg, run, GPUS[cfg.gpu].memory)


def test_critic_and_reward_have_a_shape_and_a_layout_of_their_own() -> None:
    shape = ["reward_shape.preset=gpt2-345m", "reward_shape.num_layers=6"]
    _, run = run_of(*SMALL, *shape, "gpus=8", "parallel.pp=4", "critic_parallel.pp=2")
    expected = Architecture(**PRESETS["gpt2-345m"] | {"vocab_size": 50257, "num_layers": 6})
    for name in ("critic", "reward"):
        assert run.roles[name].architecture == expected
        assert (run.roles[name].layout.pp, run.roles["policy"].layout.pp) == (2, 4)
    with pytest.raises(ValueError, match="^critic_parallel: pp 4 does not divide num_layers 6"):
        run_of(*SMALL, *shape, "gpus=8", "parallel.pp=4")


def test_a_checkpoint_brings_its_shape(tmp_path) -> None:
    a = Architecture(257, 2, 32, 4, 64)
    model = {"head": "language", "tokenizer": "bytes", "architecture": asdict(a)}
    (tmp_path / "model.json").write_text(json.dumps(model))
    _, run = run_of(f"model.init={tmp_path}", "gpus=1", "sampling.max_new=8")
    assert {role.architecture for role in run.roles.values()} == {a}


@pytest.mark.parametrize("typed", ["h200-141gb", "H200", "h2"])
def test_a_gpu_is_known_by_the_beginning_of_its_name(typed, capsys) -> None:
    plan(parse(Plan, [*SMALL, "gpus=8", f"gpu={typed}"]))
    assert _out(capsys).startswith("8 x h200-141gb: ")


@pytest.mark.parametrize(
    "setting, said",
    [
        # a100 is the beginning of two names
        ("gpu=rtx4090", "gpu=rtx4090 is neither one of a100-40gb, a100-80gb, h100-80gb, .* nor"),
        ("gpu=a100", "gpu=a100 is neither .* nor the beginning of just one"),
        ("parallel.tp=5", "^parallel: tp 5 x pp 1 x cp 1 does not divide gpus=6$"),
        ("critic_parallel.cp=4", "^critic_parallel: tp 1 x pp 1 x cp 4 does not divide gpus=6$"),
        ("critic_parallel.vpp=2", "^critic_parallel: vpp is 2; an interleaved pipeline needs pp"),
        ("parallel.tp=2", "^parallel: tp 2 does not divide num_heads 25"),
        # as of ppo
        ("minibatch_size=5", "minibatch_size 5 does not divide batch_size 512"),
        (
            "sampling.max_new=1024",
            r"sampling.max_new \+ 1 1025 exceeds the model's max_length 1024",
        ),
        ("ptx_coef=1 ptx_length=1025", "ptx_length 1025 exceeds the model's max_length 1024"),
    ],
)
def test_what_is_refused(setting, said) -> None:
    with pytest.raises(ValueError, match=said):
        plan(parse(Plan, [*SMALL, "gpus=6", *setting.split()]))


def test_prompts_leave_room_for_a_response() -> None:
    _, run = run_of(*SMALL, "gpus=6", "max_prompt=600")
    assert run.work.prompt == 512  # of gpt2's 1024, of which the response may take 512
    _, run = run_of(*SMALL, "gpus=6", "max_prompt=500")
    assert run.work.prompt == 500


def test_small_numbers_are_printed_with_their_digits(capsys) -> None:
    small = ["model.num_layers=2", "max_prompt=16", "sampling.max_new=16", "gpus=2"]
    plan(parse(Plan, [*small, "parallel.sequence_parallel=true"]))
    printed = _out(capsys)
    assert "llama 2 x 128, 4.43e+05 weights, tp 1 x pp 1 x dp 2 fp32\n" in printed
    assert re.search(r"^  policy +1\.7e-03 +1\.7e-03 +1\.7e-03$", printed, re.MULTILINE)


def _out(capsys) -> str:
    return capsys.readouterr().out


def test_the_page_shows_what_is_printed(capsys) -> None:
    page = (ROOT / "docs/plan.md").read_text()
    shown = re.search(r"```\n\$ tetrad plan (.*)\n((?:.*\n)*?)```", page)
    assert shown
    plan(parse(Plan, shown[1].split()))
    assert _out(capsys).strip() == shown[2].strip()
