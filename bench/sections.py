"""python -m bench.sections NAME [--tiny]: the process of one section of bench.first.

It imports what it needs, waits for a line with the time by which it should end, and measures. It
tells bench.first on its output, in lines that begin with MARK and go on in JSON,

    {"plan": [{"bench", "case"}, …], "gpu", "where"}     once, before anything is measured
    {"bench", "row", "rates"}                            as each row is done
    {"page", "text"}                                     a file to be kept: profiles

and other lines are for the reader.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TextIO

import torch
import torch.distributed as dist
from triton import knobs

from bench import bench_decode, bench_iteration, suspicions
from bench.case import CUDA, DEVICE, Case
from bench.harness import Results, gpu_name, measured, where
from bench.models import attempted
from bench.rows import MARK, READY, ROOT, Row, benches, is_ours
from bench.timing import Rates, profiled, timed
from tetrad.parallel import device

MODEL = "gpt3-1.3b"
BATCHES = (64, 256)  # rows that decode together
TRAINER = "tetrad.trainer.ppo"  # Megatron, and all that stands on it
Told = tuple[str, Row]  # a bench, and a row of it


@dataclass
class Turn:
    """What a section may take: its time, and what this process knows of the machine."""

    tiny: bool
    until: float  # seconds since 1970
    rates: Rates

    def results(self, bench: str) -> Results:
        """As `python -m bench.bench_NAME` has them; it writes no file."""
        flags = ["--tiny"] * self.tiny
        results = Results(bench, [*flags, "--until", str(self.until)], self.rates)
        results.path = None
        results.page = lambda name, text: tell(page=name, text=text)
        return results


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.sections")
    parser.add_argument("name", choices=SECTIONS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
    options = parser.parse_args()
    section, cache = SECTIONS[options.name], Cache()
    began = time.perf_counter()
    device.install()  # before megatron.core is imported
    if section.imports:
        with suppress(ModuleNotFoundError):  # who needs it says so in its rows
            importlib.import_module(section.imports)
    imported = time.perf_counter() - began
    print(READY, end="", flush=True)
    word = sys.stdin.readline()
    if not word:  # whoever asked is gone
        return
    plan = [{"bench": bench, "case": case} for bench, case in section.plan(options.tiny)]
    about = where() | {"command": f"python -m bench.first, section {options.name}"}
    tell(plan=plan, gpu=gpu_name().lower().replace(" ", "-"), where=about)
    if section.imports:
        print(f"imported {section.imports} in {imported:.1f} s")
    rates = Rates(1 << 20 if options.tiny else 1 << 28)
    turn = Turn(options.tiny, float(word), rates)
    if CUDA:
        profiled(lambda: None)  # the profiler's own start, before anything is timed
    for bench, row in section.rows(turn):
        tell(bench=bench, row=row, rates=rates.known)
    print(cache)
    if dist.is_initialized():
        importlib.import_module("tetrad.parallel.topology").shutdown()


def tell(**record: Any) -> None:
    print(MARK + json.dumps(record), flush=True)


class Cache:
    """Counts the kernels that Triton compiled, and those that it found in its cache."""

    def __init__(self) -> None:
        self.found = self.compiled = 0
        self.seconds = 0.0
        knobs.compilation.listener = self.count

    def count(self, *, cache_hit: bool, times: Any, **_: Any) -> None:
        self.found += cache_hit
        self.compiled += not cache_hit
        self.seconds += 0.0 if cache_hit else times.total / 1e6

    def __str__(self) -> str:
        return (
            f"Triton compiled {self.compiled} kernels in {self.seconds:.1f} s "
            f"and found {self.found} in its cache"
        )


# What each section plans, as (bench, case), and what it measures.


def plan_rates(tiny: bool) -> list[tuple[str, str]]:
    return [("first", name) for name in RATES]


def rates(turn: Turn) -> Iterator[Told]:
    size = 256 if turn.tiny else 8192
    for name, measure in RATES.items():
        row: Row = {"case": name, "provider": "this machine"}
        if time.time() > turn.until:
            yield "first", row | {"not_measured": LATE}
            continue
        began = time.perf_counter()
        seen = measure(turn.rates, size)
        yield "first", row | {"seen": seen, "ms": 1e3 * (time.perf_counter() - began)}


def product_rate(rates: Rates, size: int) -> str:
    return f"{rates.gemm(size, size, size, torch.bfloat16):.0f} TFLOP/s"


def launch_rate(rates: Rates, size: int) -> str:
    """Of a hundred small kernels."""
    x = torch.zeros(256, device=DEVICE)

    def hundred() -> None:
        for _ in range(100):
            x.add_(1)

    row = timed(hundred)
    host = f", {row['host_us'] / 100:.1f} us of the host" if CUDA else ""
    return f"{10 * row['ms']:.1f} us{host}"


RATES: dict[str, Callable[[Rates, int], str]] = {
    "device copy, read + written": lambda rates, size: f"{rates.copy:.0f} GB/s",
    "sum": lambda rates, size: f"{rates.read:.0f} GB/s",
    "large bf16 product": product_rate,
    "launch of a small kernel": launch_rate,
}
LATE = "out of time"


def plan_suspicions(tiny: bool) -> list[tuple[str, str]]:
    return [("first", name) for name in suspicions.SUSPICIONS]


def ask(turn: Turn) -> Iterator[Told]:
    for name, question in suspicions.SUSPICIONS.items():
        row: Row = {"case": name, "provider": "ours"}
        began = time.perf_counter()
        if time.time() > turn.until:
            row["not_measured"] = LATE
        elif (finding := suspicions.answer(question)) is None:
            row["not_measured"] = "needs a GPU"
        else:
            row |= {"passed": finding.passed, "seen": finding.seen}
            row["ms"] = 1e3 * (time.perf_counter() - began)
        yield "first", row
        if CUDA:
            torch.cuda.empty_cache()


def first_cases(tiny: bool) -> Iterator[tuple[str, Case]]:
    """Of every op the first case, and the first that goes on to the gradients; ours and plain
    PyTorch."""
    for bench in benches():
        found: dict[bool, Any] = {}
        for case in importlib.import_module(f"bench.bench_{bench}").cases(tiny):
            if isinstance(case, Case):
                found.setdefault(case.backward, case)
        for _, case in sorted(found.items()):
            keep = {k: v for k, v in case.providers.items() if is_ours(k) or k == "torch"}
            yield bench, replace(case, op="", providers=keep)  # no op: without the peers


def plan_ops(tiny: bool) -> list[tuple[str, str]]:
    return [(bench, case.name) for bench, case in first_cases(tiny)]


def ops(turn: Turn) -> Iterator[Told]:
    for bench, case in first_cases(turn.tiny):
        for row in measured(case, turn.results(bench)):
            yield bench, row


def decode_cases(tiny: bool) -> list[Any]:
    cases = list(bench_decode.cases(tiny))
    return cases if tiny else [c for c in cases if c.model == MODEL and c.rows in BATCHES]


def iteration_cases(tiny: bool) -> list[Any]:
    return [c for c in bench_iteration.cases(tiny) if tiny or c.model == MODEL]


def plan_cases(bench: str, cases: Callable, tiny: bool) -> list[tuple[str, str]]:
    return [(bench, case.name) for case in cases(tiny)]


def measure_cases(bench: str, cases: Callable, measure: Callable, turn: Turn) -> Iterator[Told]:
    for row in attempted(cases(turn.tiny), measure, turn.results(bench)):
        yield bench, row


SPLIT = "tp 2 on one GPU beside tp 1"
SPLIT_ERROR = 1e-4  # of fp32 sums in another order; without a shard it is 0.1 or more


def plan_split(tiny: bool) -> list[tuple[str, str]]:
    return [("first", SPLIT)]


def split(turn: Turn) -> Iterator[Told]:
    """Log-probs, gradients' norm and a sample of a small model: one rank, then two, over gloo,
    whose messages may lie on the GPU."""
    row: Row = {"case": SPLIT, "provider": "ours"}
    began = time.perf_counter()
    alone = ranks(1, turn.until)
    both = ranks(2, turn.until) if isinstance(alone, dict) else {}
    if isinstance(alone, str) or isinstance(both, str):
        yield "first", row | {"not_measured": alone if isinstance(alone, str) else both}
        return
    gaps = {name: abs(alone[name] - both[name]) / max(1.0, abs(alone[name])) for name in alone}
    passed = alone["sampled tokens"] == both["sampled tokens"]
    passed = passed and all(gap < SPLIT_ERROR for gap in gaps.values())  # NaN is not below
    seen = ", ".join(f"{name} {gap:.0e}" for name, gap in gaps.items())
    row |= {"passed": passed, "seen": f"differences: {seen}"}
    yield "first", row | {"ms": 1e3 * (time.perf_counter() - began)}


def ranks(size: int, until: float) -> dict[str, float] | str:
    """What the first of so many ranks found, or why it found nothing: the last line of the first
    that failed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.on_one_gpu", str(size)]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0",
        "WORLD_SIZE": str(size),
    }  # fmt: skip
    outputs = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(size)]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env=environment | {"RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip

    def failure() -> str | None:
        for rank, (process, output) in enumerate(zip(processes, outputs)):
            if process.poll():
                return f"rank {rank} ended with {process.returncode}: {last_line(output)}"
        return None

    try:
        while not (why := failure()) and any(p.poll() is None for p in processes):
            if time.time() > until:
                return LATE
            time.sleep(0.05)
        return why or failure() or json.loads(last_line(outputs[0]))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def last_line(file: TextIO) -> str:
    file.seek(0)
    return (file.read().strip().splitlines() or ["no message"])[-1]


@dataclass
class Section:
    plan: Callable[[bool], list[tuple[str, str]]]  # tiny -> bench and case of every row
    rows: Callable[[Turn], Iterable[Told]]
    imports: str = ""  # what takes long to import, before its turn


SECTIONS = {
    "rates": Section(plan_rates, rates),
    "suspicions": Section(plan_suspicions, ask, TRAINER),
    "ops": Section(plan_ops, ops),
    "decode": Section(
        partial(plan_cases, "decode", decode_cases),
        partial(measure_cases, "decode", decode_cases, bench_decode.measure),
        TRAINER,
    ),
    "iteration": Section(
        partial(plan_cases, "iteration", iteration_cases),
        partial(measure_cases, "iteration", iteration_cases, bench_iteration.measure),
        TRAINER,
    ),
    "split": Section(plan_split, split),
}


if __name__ == "__main__":
    main()
