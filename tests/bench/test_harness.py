"""A number is only as good as its harness: what it refuses, what it counts, what it never loses."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as program
from bench import harness, timing
from bench.case import Case
from bench.harness import Results, measured
from bench.rows import benches

ROOT = Path(__file__).parents[2]
N = 1000  # rows; more than the 256 that are checked of an op that treats rows alone


def results_in(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Results:
    arguments = ("--tiny", "--out", str(folder), *arguments)
    monkeypatch.setattr(sys, "argv", ["bench_doubling", *arguments])
    return Results("doubling")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setattr(harness.peers, "absent", lambda ops: {"peer": "No module named 'peer'"})
    return results_in(tmp_path, monkeypatch)


def doubling(**providers) -> Case:
    """2 x of x (N, 8), and its gradient."""

    def draw():
        return (torch.randn(N, 8).requires_grad_(),)

    return Case(
        "doubling", "", draw, providers, lambda x: 2 * x, bytes=64 * N, backward=True, by_row=True
    )


def rows(case: Case, log: Results) -> dict[str, dict]:
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
    assert seen["last"]["not_measured"].startswith("wrong: off by ")
    assert seen["gradient"]["not_measured"].startswith(
        "wrong: row 0 of those compared, of result 1"
    )
    assert seen["nan"]["not_measured"] == "wrong: off by nan of the truth's norm"
    reason = "wrong: a result of shape (8, 1000) where (256, 8) is due"
    assert seen["shape"]["not_measured"] == reason


@pytest.mark.parametrize("row", [0, N - 1, N - 16])
def test_a_row_that_was_forgotten_is_seen_in_bf16(row, log) -> None:
    """Its part of the norm is 3 %, which rounding alone may be."""

    def all_but_one(x):
        return torch.where(torch.arange(N)[:, None] == row, 0.0, 2 * x)

    case = Case(
        "", "", lambda: (torch.randn(N, 8),), {"ours": all_but_one}, lambda x: 2 * x, bytes=1,
        by_row=True, dtype=torch.bfloat16,
    )  # fmt: skip
    assert "is another one" in rows(case, log)["ours"]["not_measured"]


def test_what_is_coarse_passes_of_others_and_not_of_ours(log) -> None:
    coarse = {"ours": lambda x: 2.1 * x, "peer": lambda x: 2.1 * x, "wrong": lambda x: 2.3 * x}
    case = Case(
        "", "", lambda: (torch.randn(N, 8),), coarse, lambda x: 2 * x, bytes=1, dtype=torch.bfloat16
    )
    seen = rows(case, log)
    assert seen["peer"]["error"] == pytest.approx(0.05, rel=1e-3) and "ms" in seen["peer"]
    for provider in "ours", "wrong":
        assert seen[provider]["not_measured"].startswith("wrong: off by")


def test_a_gradient_that_is_missing(log) -> None:
    case = doubling(ours=lambda x: (2 * x.detach()).requires_grad_())
    assert rows(case, log)["ours"]["not_measured"] == "wrong: result 1, a gradient, is missing"


def test_where_the_truth_is_nan_nobody_looks(log) -> None:
    def unread(x):
        return torch.where(torch.arange(8) < 4, 2 * x, torch.nan)

    case = Case(
        "half", "", lambda: (torch.randn(N, 8),), {"ours": lambda x: 2 * x}, unread, bytes=1
    )
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


def test_what_a_failure_leaves_behind_reaches_no_other(log) -> None:
    """A peer that is right once, and then runs out of memory with half a gradient made."""
    calls = []

    def greedy(x):
        calls.append(1)
        if len(calls) > 1:
            x.grad = torch.ones_like(x)
            raise torch.OutOfMemoryError
        return 2 * x

    seen = rows(doubling(greedy=greedy, ours=lambda x: 2 * x), log)
    assert seen["greedy"]["not_measured"] == "out of memory" and "ms" in seen["ours"]


def test_what_a_lost_gpu_leaves_is_not_blamed_on_ours(log, monkeypatch) -> None:
    """After an illegal access of a peer every call fails."""

    def broken(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(harness, "lost_to", lambda provider: f"lost the GPU to {provider}")
    for row in measured(doubling(peer=broken, ours=lambda x: 2 * x), log):
        log.add(row)
    peer, ours = log.content["rows"]
    assert ours["not_measured"] == "lost the GPU to peer"
    log.close()


def test_memory_has_many_ways_to_run_out() -> None:
    for text in "CUBLAS_STATUS_ALLOC_FAILED when calling", "Triton Error [CUDA]: out of memory":
        assert harness.reason_of(RuntimeError(text)) == "out of memory"


def test_what_time_does_not_allow_is_said(tmp_path, monkeypatch) -> None:
    log = results_in(tmp_path, monkeypatch, "--until", str(time.time() - 1))
    seen = rows(doubling(ours=lambda x: 2 * x), log)
    assert seen["ours"]["not_measured"] == "out of time" and seen["ours"]["bytes"] == 64 * N
    log.add(seen["ours"])
    log.close()
    assert not list(tmp_path.iterdir()), "a file without a figure would cover an older one"


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


def test_what_is_not_there_fails_nothing(log) -> None:
    for reason in "out of time", "out of memory", "No module named 'megatron'":
        log.add({"case": "", "provider": "ours", "not_measured": reason})
    log.close()
    log.add({"case": "", "provider": "ours", "not_measured": "OSError: no such kernel"})
    with pytest.raises(SystemExit):
        log.close()


def test_tiny_results_are_not_published(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kl", "--tiny", "--out", "bench/results"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        Results("kl")
    assert stop.value.code == 2 and "not for bench/results" in capsys.readouterr().err


def test_rates_by_hand(monkeypatch) -> None:
    """Everything takes a millisecond: 250e3 fp32 are copied at 2 GB/s, counting both ways, and read
    at 1; a product of 1000 x 1000 x 1000 is 2 GFLOP, and with its gradients 6."""
    monkeypatch.setattr(timing, "timed", lambda once: [once()] and {"ms": 1.0})
    rates = timing.Rates(250_000)
    assert rates.copy == pytest.approx(2) and rates.read == pytest.approx(1)
    assert rates.gemm(1000, 1000, 1000, torch.float32) == pytest.approx(2)
    assert rates.gemm(1000, 1000, 1000, torch.float32, backward=True) == pytest.approx(6)
    case = Case("", "", tuple, {}, tuple, bytes=500_000)
    half = {"gb_s": 0.5, "of_copy": 0.25, "of_read": 0.5}
    assert timing.fractions(case, "ours", 1.0, rates) == pytest.approx(half)


def test_fractions_of_products() -> None:
    """3 products are due and this provider does 4: 12 TFLOP/s of 20 asked for, 16 done."""
    rates = timing.Rates(1)
    rates.known["gemm_tflop_s 10x20x30 forward + backward"] = 20.0
    case = Case(
        "", "", tuple, {}, tuple, bytes=1, flops=3 * 10**9, gemm=(10, 20, 30),
        work={"ours": 4 * 10**9}, backward=True,
    )  # fmt: skip
    ours = timing.fractions(case, "ours", 0.25, rates)
    assert ours == pytest.approx({"tflop_s": 12.0, "of_gemm": 0.6, "of_gemm_done": 0.8})
    assert timing.fractions(case, "peer", 0.25, rates)["of_gemm_done"] == pytest.approx(0.6)


def test_the_commit_is_the_one_that_was_said(monkeypatch) -> None:
    """In a copy without git; and the first bench's files do not make the second one's dirty."""
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    assert harness.where()["commit"] == "1a2b3c4"
    monkeypatch.delenv("COMMIT")
    assert harness.commit() == harness._output("git", "describe", "--always", "--dirty")


def test_the_digest_is_of_the_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    seen = set()
    for text in "a", "b":
        (tmp_path / "kernels" / "kl.py").write_text(text)
        seen.add(harness._digest())
    assert len(seen) == 2


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
        assert 1e6 < cycles <= 2e6 * timing.LONGEST_SLEEP
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
    for module in harness, timing:
        monkeypatch.setattr(module, "CUDA", True)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * clock.ms)
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
        def __init__(self, activities, acc_events) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_) -> None: ...
        def events(self):
            return [kernel, host, note, kernel]

    monkeypatch.setattr(torch.profiler, "profile", profile)
    return clock


def test_times_of_a_gpu(cuda) -> None:
    """Calls take 1, 2, … 10 ms by turns. Warm-up ends at 28 ms, after seven; ten more are timed:
    8, 9, 10, 1, … 7. The sleeps lie before the first event of a batch."""
    calls = 0

    def once() -> None:
        nonlocal calls
        cuda.ms += 1 + calls % 10
        calls += 1

    row = timing.timed(once)
    assert row["calls"] == round(timing.PATIENCE / 1) == 60 and calls == 67
    assert cuda.slept * timing.QUEUED == row["calls"]
    assert 5 <= row["ms"] <= 6 and 2 <= row["ms_p20"] <= 3 and 8 <= row["ms_p80"] <= 9
    assert row["host_us"] == pytest.approx(1e3 * row["ms"])


def test_of_slow_calls_few_are_timed(cuda) -> None:
    calls = []

    def once() -> None:
        cuda.ms += 80
        calls.append(1)

    assert timing.timed(once)["calls"] == 3 and len(calls) == 4


def test_launches_and_memory_of_a_gpu(cuda) -> None:
    row = timing.profiled(lambda: None)
    assert row == {"peak_mb": 2.0, "launches": 2, "gpu_us": 6.0}


def test_without_a_profiler_there_are_times_and_memory(cuda, monkeypatch) -> None:
    def broken(activities, acc_events):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    assert timing.profiled(lambda: None) == {"peak_mb": 2.0}


def test_inputs_and_results_rotate_through_four_times_the_cache(cuda) -> None:
    seen, made = [], []

    def ours(x):
        cuda.ms += 1
        seen.append(x.data_ptr())
        y = 2 * x
        made.append(y.data_ptr())
        return y

    case = Case("", "", lambda: (torch.randn(10_000),), {}, ours, bytes=1)  # 40 kB of 400
    timing.speed(case, ours, case.draw())
    assert len(set(seen)) == 10 and seen[-20:-10] == seen[-10:]
    assert len(set(made[-10:])) == 10


def test_the_timed_call_goes_on_to_the_gradients(cuda) -> None:
    passes = []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append("forward")
            cuda.ms += 1
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            passes.append("backward")
            return 2 * dy

    case = doubling(ours=Op.apply)
    (x,) = inputs = case.draw()
    timing.speed(case, Op.apply, inputs)
    assert passes.count("backward") > 60 and x.grad is None
    passes.clear()
    timing.speed(Case("", "", case.draw, {}, Op.apply, bytes=1), Op.apply, inputs)
    assert "backward" not in passes


def test_without_a_gpu_the_commands_say_so(tmp_path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"]}
    for command in "bench", "bench.bench_kl":
        done = subprocess.run(
            [sys.executable, "-m", command], cwd=ROOT, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 2 and "no GPU on this machine" in done.stderr
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    done = subprocess.run(
        [sys.executable, "-m", "bench"], cwd=ROOT, env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "No module named 'torch'" in done.stderr and "make setup" in done.stderr


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """What `python -m bench` starts, and with how much time; all of it takes that and succeeds."""
    seen: list[tuple[str, float]] = []
    now = [1000.0]

    def python(arguments: list[str], seconds: float) -> int:
        seen.append((arguments[1], seconds))
        until = [float(y) for x, y in zip(arguments, arguments[1:]) if x == "--until"]
        now[0] = min(now[0] + seconds, *until, 1e9) if until else now[0] + seconds
        return fails.get(arguments[1], 0)

    fails: dict[str, int] = {}
    monkeypatch.setattr(program, "python", python)
    monkeypatch.setattr(program, "require_gpu", lambda: None)
    monkeypatch.setattr(program.time, "time", lambda: now[0])
    monkeypatch.setenv("COMMIT", "1a2b3c4")
    monkeypatch.setattr(program, "fails", fails, raising=False)
    return seen


def test_one_command_ends_in_time_with_tests_every_bench_and_the_report(started) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main([])
    assert stop.value.code == 0
    names = [name.removeprefix("bench.bench_") for name, _ in started]
    assert {*names[: -len(benches()) - 1]} == {"pytest"}
    assert names[-len(benches()) - 1 :] == [*benches(), "bench.report"]
    assert benches()[:2] == ["logprob", "linear_logprob"]
    assert program.time.time() - 1000 <= program.BUDGET == 420


def test_without_xdist_the_tests_run_a_process_each(started, monkeypatch, capsys) -> None:
    monkeypatch.setattr(program.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(program.os, "cpu_count", lambda: 3)
    assert program.tests_pass(100)
    files = [path.name for path in (ROOT / "tests/kernels").glob("test_*.py")]
    assert len(started) == len(files) and "pytest-xdist is not installed" in capsys.readouterr().out
    program.fails["pytest"] = 1
    assert not program.tests_pass(100)


def test_what_takes_long_to_compile_comes_last(tmp_path, monkeypatch) -> None:
    order = []

    def provider(name):
        return lambda x: (order.append(name), 2 * x)[1]

    providers = {name: provider(name) for name in ("ours", "torch.compile", "python loop", "torch")}

    def cases(tiny):
        yield from (replace(doubling(**providers), name=name) for name in "ab")

    monkeypatch.setattr(sys, "argv", ["bench_doubling", "--tiny", "--out", str(tmp_path)])
    harness.main("doubling", cases)
    runs = list(dict.fromkeys(order))
    assert runs == ["ours", "torch", "torch.compile", "python loop"]
    late = order.index("torch.compile")
    assert not {"ours", "torch"} & {*order[late:]}
    (path,) = tmp_path.glob("*/doubling.json")
    assert len(json.loads(path.read_text())["rows"]) == 8


@pytest.mark.parametrize("what", ["pytest", "bench.bench_kl", "bench.report"])
def test_what_fails_fails_the_command_and_stops_nothing(what, started) -> None:
    program.fails[what] = 1
    with pytest.raises(SystemExit) as stop:
        program.main([])
    assert stop.value.code == 1 and started[-1][0] == "bench.report"


def test_what_takes_too_long_is_stopped_with_all_that_it_started(tmp_path) -> None:
    """A test run has workers; left behind they would share the GPU with the benches."""
    note = tmp_path / "note"
    child = f"import time; time.sleep(3); open({str(note)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    assert program.python(["-c", code], 1) == 1
    assert time.monotonic() - began < 2.5
    time.sleep(3)
    assert not note.exists()


def test_kernels_are_not_interpreted_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os, sys; sys.exit('TRITON_INTERPRET' in os.environ)"
    assert program.python(["-c", code], 60) == 0
