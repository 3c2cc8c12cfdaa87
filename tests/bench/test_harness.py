"""A number is only as good as its harness: what it refuses, what it counts, what it never loses."""

import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import harness
from bench.harness import Case, Log, measured

ROOT = Path(__file__).parents[2]
N = 1000  # rows; more than the 256 that are checked of an op that treats rows alone


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(harness.peers, "absent", lambda ops: {"peer": "No module named 'peer'"})
    return Log("doubling", Namespace(tiny=True, seconds=math.inf, out=tmp_path))


def doubling(**providers) -> Case:
    """2 x of x (N, 8), and its gradient."""

    def draw():
        return (torch.randn(N, 8).requires_grad_(),)

    return Case(
        "doubling", draw, providers, lambda x: 2 * x, bytes=64 * N, backward=True, by_row=True
    )


def rows(case: Case, log: Log) -> dict[str, dict]:
    return {row["provider"]: row for row in measured(case, log)}


def test_every_provider_is_checked_before_it_is_timed(log) -> None:
    def wrong_in_the_last_row(x):
        return torch.cat([2 * x[:-1], 2.1 * x[-1:]])

    def wrong_gradient(x):
        return 2 * x.detach() + 0 * x

    def not_a_number(x):
        return 2 * x * torch.where(torch.arange(N) == 0, torch.nan, 1.0)[:, None]

    seen = rows(
        doubling(
            ours=lambda x: x + x, last=wrong_in_the_last_row, gradient=wrong_gradient,
            nan=not_a_number, shape=lambda x: 2 * x.T,
        ),
        log,
    )  # fmt: skip
    assert seen["ours"]["ms"] > 0 and seen["ours"]["error"] < 1e-7
    for provider in "last", "gradient", "nan", "shape":
        assert "ms" not in seen[provider]
    assert seen["gradient"]["not_measured"] == "wrong: off by 1.0e+00 of the truth's norm"
    assert seen["nan"]["not_measured"] == "wrong: off by nan of the truth's norm"
    assert "(8, 1000)" in seen["shape"]["not_measured"] or "(8," in seen["shape"]["not_measured"]


def test_where_the_truth_is_nan_nobody_looks(log) -> None:
    def unread(x):
        return torch.where(torch.arange(8) < 4, 2 * x, torch.nan)

    case = Case("half", lambda: (torch.randn(N, 8),), {"ours": lambda x: 2 * x}, unread, bytes=1)
    assert rows(case, log)["ours"]["error"] < 1e-7


def test_one_provider_takes_no_other_along(log) -> None:
    def broken(x):
        raise OSError("no such kernel\nand a long story")

    def greedy(x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    seen = rows(doubling(broken=broken, greedy=greedy, ours=lambda x: 2 * x), log)
    assert seen["broken"]["not_measured"] == "OSError: no such kernel"
    assert seen["greedy"]["not_measured"] == "out of memory"
    assert "ms" in seen["ours"]


def test_who_overwrites_its_input_is_named_and_the_next_gets_a_fresh_one(log) -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = 2 * x
            x.data.fill_(7)  # behind autograd's back, as a kernel does
            return y

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    seen = rows(doubling(peer=InPlace.apply, ours=lambda x: 2 * x), log)
    assert seen["peer"]["in_place"] and not seen["ours"]["in_place"]
    assert seen["ours"]["error"] < 1e-7


def test_what_time_does_not_allow_is_said(log) -> None:
    log.deadline = time.monotonic() - 1
    seen = rows(doubling(ours=lambda x: 2 * x), log)
    assert seen["ours"]["not_measured"] == "out of time" and seen["ours"]["bytes"] == 64 * N


def test_the_file_holds_what_made_the_numbers(log, tmp_path) -> None:
    for row in measured(doubling(ours=lambda x: 2 * x, peer=lambda x: 3 * x), log):
        log.add(row)
    (path,) = tmp_path.glob("*/doubling.json")
    content = json.loads(path.read_text())
    assert content["absent"] == {"peer": "No module named 'peer'"}
    assert {"gpu", "commit", "sources", "date", "versions", "command"} <= set(content["where"])
    first, second = content["rows"]
    assert first["provider"] == "ours" and second["not_measured"].startswith("wrong")
    gb_s = 1e-6 * 64 * N / first["ms"]
    assert first["of_copy"] == pytest.approx(gb_s / content["rates"]["copy_gb_s"])
    assert first["ms_p20"] <= first["ms"] <= first["ms_p80"]


def test_ours_failing_fails_the_bench_and_a_peer_does_not(log) -> None:
    for row in measured(doubling(ours=lambda x: 2 * x, peer=lambda x: 3 * x), log):
        log.add(row)
    log.close()
    for row in measured(doubling(**{"ours, otherwise": lambda x: 3 * x}), log):
        log.add(row)
    with pytest.raises(SystemExit) as stop:
        log.close()
    assert stop.value.code == 1


def test_fractions_of_products() -> None:
    """3 products are due and this provider does 4: 12 TFLOP/s of 20 asked for, 16 done."""
    rates = harness.Rates(1)
    rates.known["gemm_tflop_s 10x20x30"] = 20.0
    case = Case(
        "", tuple, {}, tuple, bytes=1, flops=3 * 10**9, gemm=(10, 20, 30), work={"ours": 4 * 10**9}
    )
    ours = harness.fractions(case, "ours", 0.25, rates)
    assert ours == pytest.approx({"tflop_s": 12.0, "of_gemm": 0.6, "of_gemm_done": 0.8})
    assert harness.fractions(case, "peer", 0.25, rates)["of_gemm_done"] == pytest.approx(0.6)


class Clock:
    """Stands in for torch.cuda: events of a clock that calls advance by what they are to take."""

    def __init__(self) -> None:
        self.ms, self.slept, self.allocated, self.peak = 0.0, 0, 100, 0

    def Event(self, enable_timing):
        def record() -> None:
            event.ms = self.ms

        event = SimpleNamespace(record=record, elapsed_time=lambda later: later.ms - event.ms)
        return event

    def _sleep(self, cycles: int) -> None:
        assert 0 < cycles <= 2e9 * harness.LONGEST_SLEEP
        self.ms += 1000  # before the first event of a batch: it must not be seen
        self.slept += 1

    def get_device_properties(self, _) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=100_000)

    def synchronize(self) -> None: ...
    def reset_peak_memory_stats(self) -> None: ...
    def memory_allocated(self) -> int:
        return 100

    def max_memory_allocated(self) -> int:
        return 2_000_100


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The GPU's side of the harness, on a clock."""
    clock = Clock()
    monkeypatch.setattr(harness, "CUDA", True)
    for name in dir(Clock):
        if not name.startswith("__"):
            monkeypatch.setattr(torch.cuda, name, getattr(clock, name))
    kernel = SimpleNamespace(
        device_type=torch.autograd.DeviceType.CUDA,
        time_range=SimpleNamespace(elapsed_us=lambda: 3.0),
    )
    note = SimpleNamespace(**vars(kernel), is_user_annotation=True)
    host = SimpleNamespace(device_type=torch.autograd.DeviceType.CPU)

    class profile:
        def __init__(self, activities) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...
        def events(self):
            return [kernel, host, note, kernel]

    monkeypatch.setattr(torch.profiler, "profile", profile)
    return clock


def test_times_of_a_gpu(cuda) -> None:
    """Calls that take 1, 2, … 10 ms by turns: the median lies at 5.5, a fifth below 2.2 or so."""
    calls = 0

    def once() -> None:
        nonlocal calls
        cuda.ms += 1 + calls % 10
        calls += 1

    row = harness.timed(once)
    assert row["calls"] >= 6 and cuda.slept * 6 == row["calls"]
    assert 5 <= row["ms"] <= 6 and 2 <= row["ms_p20"] <= 3 and 8 <= row["ms_p80"] <= 9
    assert row["host_us"] > 0


def test_launches_and_memory_of_a_gpu(cuda) -> None:
    assert harness.profiled(lambda: None) == {"peak_mb": 2.0, "launches": 2, "kernel_us": 6.0}


def test_inputs_rotate_through_twice_the_cache(cuda) -> None:
    seen = []

    def ours(x):
        seen.append(x.data_ptr())
        return 2 * x

    case = Case("", lambda: (torch.randn(10_000),), {}, ours, bytes=1)  # 40 kB of 200
    harness.speed(case, ours, case.draw())
    assert len(set(seen)) == 5
    assert seen[-10:-5] == seen[-5:]  # by turns


def test_without_a_gpu_the_commands_say_so() -> None:
    for command in (["bench"], ["bench.bench_kl"]):
        environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "no GPU on this machine" in done.stderr


def test_a_run_of_all_benches_loses_nothing_to_one_that_fails(tmp_path, monkeypatch) -> None:
    from bench import __main__ as program

    started = []

    def python(arguments: list[str], seconds: float) -> int:
        started.append(arguments[1].removeprefix("bench.bench_"))
        assert 0 < float(arguments[3]) <= seconds - program.GRACE + 1
        return started[-1] == "linear_logprob"

    monkeypatch.setattr(program, "python", python)
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny"])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 1
    assert started[:2] == ["logprob", "linear_logprob"]
    assert set(started) == {x.stem[6:] for x in (ROOT / "bench").glob("bench_*.py")}
