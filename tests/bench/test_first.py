"""The first run on a GPU: every suspicion fails on its fault, and what hangs costs its own time."""

import contextlib
import json
import math
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench import first, sections, suspicions
from bench.rows import MARK, READY
from bench.suspicions import SUSPICIONS, answer
from tests.forked_world import run_world
from tetrad.kernels import linear_loss, ppo_loss, products
from tetrad.parallel import device

device.install()  # before anything imports megatron.core

from tetrad.parallel import attention, colocate, engine  # noqa: E402

ROOT = Path(__file__).parents[2]
Patch = pytest.MonkeyPatch


def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.bfloat16() @ b.bfloat16()).float()


def as_on_a_gpu(patch: Patch, milliseconds: Callable[[Callable], float]) -> None:
    """The question is asked, and a clock says what it is told to."""
    patch.setattr(suspicions, "CUDA", True)
    patch.setattr(suspicions, "milliseconds", milliseconds)


def forgetful(op: Callable) -> Callable:
    """An op whose sums come in another order at each call."""

    def noisy(*args, **kwargs):
        loss, stats = op(*args, **kwargs)
        return loss * (1 + 1e-6 * torch.rand(())), stats

    return noisy


def slow_where_odd(patch: Patch) -> None:
    times = iter([2.0, 1.0])
    as_on_a_gpu(patch, lambda call: next(times, 1.0))


def graph_that_forgets(patch: Patch) -> None:
    """A replay that computes nothing."""

    class Graph:
        def replay(self) -> None:
            pass

    patch.setattr(suspicions, "CUDA", True)
    for name, stand_in in {
        "Stream": lambda: None, "synchronize": lambda: None, "CUDAGraph": Graph,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, stand_in)


def another_score(patch: Patch) -> None:
    logprobs = engine.Engine.logprobs
    patch.setattr(engine.Engine, "logprobs", lambda *args: 1.1 * logprobs(*args))


def blind_to_windows(patch: Patch) -> None:
    patch.setattr(attention, "visible", lambda query, key, window: key <= query[..., None])


def taken_for_cuda(patch: Patch) -> None:
    patch.delattr(sys.modules["megatron.core.tensor_parallel.layers"], "_cpu_cuda")


FAULTS: dict[str, Callable[[Patch], object]] = {
    "product is added in place": lambda patch: patch.setattr(
        products, "add_product", lambda total, a, b: total.copy_(a.float() @ b.float())
    ),
    "product of no rows": lambda patch: patch.setattr(products, "matmul", torch.mm),
    "logits keep fp32": lambda patch: patch.setattr(products, "matmul", rounded),
    "fp32 is fp32": lambda patch: patch.setattr(products, "matmul", rounded),
    "packed attention": blind_to_windows,
    # on a CPU there is no such kernel: PyTorch refuses, as it would where the mask is not taken
    "cached attention has a fast kernel": lambda patch: as_on_a_gpu(patch, lambda call: 1.0),
    "losses repeat to the bit": lambda patch: patch.setattr(
        ppo_loss, "policy_loss", forgetful(ppo_loss.policy_loss)
    ),
    "ops replay in a graph": graph_that_forgets,
    "one rank talks to itself": lambda patch: patch.setattr(
        dist, "all_reduce", lambda x, *_, **__: x.mul_(2)
    ),
    "megatron is untouched": taken_for_cuda,
    "samples agree with scores": another_score,
    "sampling is cheap": lambda patch: as_on_a_gpu(patch, lambda call: 1.0),
    "odd vocabulary is not slow": slow_where_odd,
    "gradients repeat to the bit": lambda patch: patch.setattr(
        linear_loss, "linear_policy_loss", forgetful(linear_loss.linear_policy_loss)
    ),
    "roles take turns": lambda patch: patch.setattr(colocate.Tenant, "_swap", lambda *_: None),
}


def asked(name: str, with_fault: bool) -> suspicions.Finding | None:
    if with_fault:
        FAULTS[name](pytest.MonkeyPatch())
    return answer(SUSPICIONS[name])


@pytest.mark.parametrize("name", SUSPICIONS)
def test_a_suspicion_fails_on_its_fault(name) -> None:
    """Each in a process of its own: what trains a model here has threads that a later fork, of
    another test's ranks, would wait for."""
    (finding,) = run_world(1, asked, name, False)
    assert finding is None or finding.passed, finding
    (finding,) = run_world(1, asked, name, True)
    assert finding is not None and not finding.passed, finding


class Stand_in:
    """A section on a clock of its own."""

    def __init__(self, name: str, tiny: bool) -> None:
        self.name = name

    def wait(self, seconds: float) -> bool:
        NOW[0] += seconds if BEHAVIOUR.get(self.name) == "never imports" else min(3, seconds)
        return BEHAVIOUR.get(self.name) != "never imports"

    def run(self, seconds: float, take: Callable[[str], None]) -> str:
        record = {
            "plan": [{"bench": self.name, "case": f"{self.name} {i}"} for i in "ab"],
            "gpu": "a-gpu", "where": {"gpu": "A GPU"},
        }  # fmt: skip
        take(MARK + json.dumps(record))
        take("what it prints besides")
        row = {"case": f"{self.name} a", "provider": "ours", "ms": 1.0}
        take(MARK + json.dumps({"bench": self.name, "row": row, "rates": {"copy_gb_s": 1.0}}))
        if BEHAVIOUR.get(self.name) == "hangs":
            NOW[0] += seconds + first.GRACE
            return "out of time: ended"
        if BEHAVIOUR.get(self.name) == "dies":
            return "the process ended with -11"
        NOW[0] += seconds
        row = row | {"case": f"{self.name} b"}
        # a library may leave its line without an end
        take("a remark" + MARK + json.dumps({"bench": self.name, "row": row, "rates": {}}))
        return "the process ended with -11" if BEHAVIOUR.get(self.name) == "dies late" else ""

    def kill(self) -> None:
        pass


NOW = [0.0]
BEHAVIOUR: dict[str, str] = {}


@pytest.mark.parametrize("behaviour", ["", "hangs", "dies", "dies late", "never imports"])
@pytest.mark.parametrize("cores", [2, 16])
def test_the_schedule_fits_whatever_a_section_does(
    behaviour, cores, tmp_path, monkeypatch, capsys
) -> None:
    NOW[0] = 1000.0
    BEHAVIOUR.clear()
    BEHAVIOUR.update({"suspicions": behaviour, "decode": behaviour} if behaviour else {})
    monkeypatch.setattr(first, "Process", Stand_in)
    monkeypatch.setattr(first.time, "time", lambda: NOW[0])
    monkeypatch.setattr(first.os, "cpu_count", lambda: cores)
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    with pytest.raises(SystemExit) as stop:
        first.main(["--tiny", "--out", str(tmp_path)])
    assert NOW[0] - 1000 <= first.LIMIT + first.GRACE
    assert stop.value.code == behaviour.startswith("dies")  # time is an excuse, a crash is none
    seen = capsys.readouterr().out
    assert ("the process ended with -11" in seen) == behaviour.startswith("dies")
    for name in first.SECTIONS:
        if behaviour == "never imports" and name in BEHAVIOUR:
            assert f"not measured: {name}: out of time to begin" in seen
            continue
        content = json.loads((tmp_path / f"a-gpu/{name}.json").read_text())
        assert content["where"] == {"gpu": "A GPU"} and content["rates"] == {"copy_gb_s": 1.0}
        done, other = content["rows"]
        assert done["ms"] == 1.0
        missing = behaviour in ("hangs", "dies") and name in ("suspicions", "decode")
        assert ("not_measured" in other) == bool(missing)
        assert (f"not measured: {name} b" in seen) == bool(missing)
    with tarfile.open(tmp_path / "first.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    told = {name for name in first.SECTIONS if BEHAVIOUR.get(name) != "never imports"}
    assert names == {*(f"{name}.json" for name in told), "first.log"}


def test_a_file_that_holds_more_is_left_alone(tmp_path, monkeypatch) -> None:
    """What `make gpu` measured of an op is more than a first case."""
    BEHAVIOUR.clear()
    monkeypatch.setattr(first, "Process", Stand_in)
    row = {"provider": "ours", "ms": 2.0}
    full = {
        "where": {"gpu": "A GPU"}, "rates": {}, "absent": {},
        "rows": [row | {"case": f"case {i}"} for i in range(3)],
    }  # fmt: skip
    (tmp_path / "a-gpu").mkdir()
    path = tmp_path / "a-gpu/ops.json"
    for rows, ours in (full["rows"], "first/ops.json"), (full["rows"][:1], "ops.json"):
        path.write_text(json.dumps(full | {"rows": rows}))
        with pytest.raises(SystemExit):
            first.main(["--tiny", "--out", str(tmp_path), "--only", "ops"])
        assert len(json.loads((tmp_path / "a-gpu" / ours).read_text())["rows"]) == 2
        assert len(json.loads(path.read_text())["rows"]) == (3 if len(rows) == 3 else 2)


def test_a_rank_that_fails_is_named_and_the_others_do_not_wait(monkeypatch) -> None:
    code = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("lost a shard")
time.sleep(60)
"""
    popen = subprocess.Popen
    monkeypatch.setattr(
        sections.subprocess, "Popen",
        lambda command, **options: popen([sys.executable, "-c", code], **options),
    )  # fmt: skip
    began = time.monotonic()
    assert sections.ranks(2, time.time() + 30) == "rank 1 ended with 1: lost a shard"
    assert sections.ranks(2, time.time() - 1) == "out of time"
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("other", [{"log-probs": math.nan}, {"sampled tokens": 8.0}, {"loss": 2.1}])
def test_two_ranks_must_find_what_one_finds(other, monkeypatch) -> None:
    alone = {"sampled tokens": 7.0, "log-probs": -3.0, "loss": 2.0}
    turn = sections.Turn(True, math.inf, None)
    for both, passed in (alone, True), (alone | other, False):
        found = {1: alone, 2: both}
        monkeypatch.setattr(sections, "ranks", lambda size, until, found=found: found[size])
        ((_, row),) = sections.split(turn)
        assert row["passed"] == passed


def test_a_process_that_hangs_is_ended_and_one_that_fails_says_how(monkeypatch) -> None:
    popen = subprocess.Popen

    def process(code: str) -> first.Process:
        monkeypatch.setattr(
            first.subprocess, "Popen",
            lambda command, **options: popen([sys.executable, "-u", "-c", code], **options),
        )  # fmt: skip
        return first.Process("rates", True)

    monkeypatch.setattr(first, "GRACE", 0.5)
    lines: list[str] = []
    hangs = process(f"print({READY!r}, end=''); print(input()); import time; time.sleep(60)")
    assert hangs.wait(10)
    began = time.monotonic()
    assert hangs.run(1, lines.append).startswith("out of time")
    assert time.monotonic() - began < 5 and hangs.process.poll() is not None
    assert float(lines[0]) > 0  # the time by which it should have ended
    dies = process("raise SystemExit('no such thing')")
    assert dies.wait(10)
    assert dies.run(5, lines.append) == "the process ended with 1"
    assert lines[1] == "no such thing"


def test_a_section_tells_its_plan_and_every_row_of_it(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.first", "--tiny", "--out", str(tmp_path), "--only", "rates"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (path,) = tmp_path.glob("*/first.json")
    content = json.loads(path.read_text())
    found = content["findings"]
    assert not content["rows"] and len(found) == 4 and all(row["seen"] for row in found)
    assert all(row["case"] in done.stdout for row in found)
    assert content["rates"].keys() >= {"copy_gb_s", "read_gb_s"}


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.first"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no GPU on this machine" in done.stderr
