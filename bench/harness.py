"""Check every provider of an op against float64, time it, and write one JSON file per bench.

    results/<gpu>/<bench>.json = {"where", "rates", "absent", "rows": [one per case and provider]}

What makes a row is in case.py (the check) and timing.py (the clock); docs/bench.md says what the
figures mean.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.case import (
    COARSE,
    CUDA,
    LAST,
    TOLERANCE,
    Case,
    Wrong,
    error_of,
    some,
    tensors,
    true_results,
)
from bench.rows import ROOT, Row, is_ours
from bench.timing import FRACTIONS, Rates, fractions, profile_of, profiled, speed

RESULTS = ROOT / "bench" / "results"


def main(name: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """The command line of the bench of ops `name`. Exits 1 if something of ours failed."""
    results = Results(name)
    for chosen in at_once, at_last:
        for case in cases(results.tiny):
            for row in measured(chosen(case), results):
                results.add(row)
    results.close()


def at_once(case: Case) -> Case:
    """Without the providers that take long to compile or to run."""
    keep = {name: call for name, call in case.providers.items() if name not in LAST}
    return replace(case, providers=keep)


def at_last(case: Case) -> Case:
    """The providers that nothing else is to wait for."""
    keep = {name: call for name, call in case.providers.items() if name in LAST}
    return replace(case, providers=keep, op="")  # the peers have had their turn


def require_gpu() -> None:
    """Exits 2 on a machine without one."""
    if not CUDA:
        print("no GPU on this machine; --tiny runs small sizes on the CPU", file=sys.stderr)
        sys.exit(2)


class Results:
    """What `python -m bench.bench_NAME` was asked for, and the rows of its file: printed as they
    come, written after each. arguments: in the place of the command line's; rates: what was
    measured of this machine in this process already."""

    def __init__(
        self, name: str, arguments: Sequence[str] | None = None, rates: Rates | None = None
    ) -> None:
        parser = argparse.ArgumentParser(f"python -m bench.bench_{name}")
        parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
        parser.add_argument(
            "--until", type=float, default=math.inf,
            help="begin no row after this time, in seconds since 1970 [no limit]",
        )  # fmt: skip
        parser.add_argument(
            "--out", type=Path, help="folder of the results [bench/results; with --tiny nowhere]"
        )
        options = parser.parse_args(arguments)
        self.tiny = options.tiny
        if not self.tiny:
            require_gpu()
        elif options.out and options.out.resolve() == RESULTS:
            parser.error("--tiny times no case in earnest: its results are not for bench/results")
        if rates is None and not CUDA:
            print("no GPU: ours is its reference on the CPU, which is written to be exact")
        if rates is None and CUDA:
            profiled(lambda: None)  # the profiler's own start, before anything is timed
        self.until = options.until
        self.lost = ""  # why nothing more can be measured: an error of the GPU stays in its process
        self.rates = rates or Rates(1 << 22 if self.tiny else 1 << 28)
        self.content: dict[str, Any] = {
            "where": where(), "rates": self.rates.known, "absent": {}, "rows": []
        }  # fmt: skip
        out = options.out or (None if self.tiny else RESULTS)
        self.path = out and out / gpu_name().lower().replace(" ", "-") / f"{name}.json"
        self.page: Callable[[str, str], None] | None = None  # takes a profile: its name, its text

    @property
    def is_late(self) -> bool:
        return time.time() > self.until

    def add(self, row: Row) -> None:
        self.content["rows"].append(row)
        print(line(row), flush=True)
        if self.path and any("ms" in row for row in self.content["rows"]):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def profile(self, name: str, call: Callable[[], object]) -> None:
        """Where the GPU's time of a call goes, for who asked for such pages."""
        if self.page and not self.is_late:
            self.page(f"{name}.txt", profile_of(call))

    def close(self) -> None:
        """Exit 1 if something of ours failed for another reason than that the machine has not the
        time, the memory or the packages."""
        ours = (row for row in self.content["rows"] if is_ours(row["provider"]))
        reasons = (row.get("not_measured", "") for row in ours)
        if any(x and not x.startswith(("out of", "No module named", "lost")) for x in reasons):
            sys.exit(1)


def line(row: Row) -> str:
    """A row for the screen."""
    start = f"{row['case']:44} {row['provider']:20}"
    if "not_measured" in row:
        return f"{start} not measured: {row['not_measured']}"
    rates = [f"{row[name]:4.0%} of {name[3:]}" for name in FRACTIONS if name in row]
    error = f"error {row['error']:.0e}" if "error" in row else ""
    return f"{start} {row['ms']:9.4f} ms {error:12} {' '.join(rates)}"


def gpu_name() -> str:
    return torch.cuda.get_device_name() if CUDA else platform.machine()


def where() -> dict[str, Any]:
    """What made the numbers: GPU, driver, commit, versions, command."""
    packages = ("torch", "triton", "transformers", "megatron-core", *peers.PACKAGES.values())
    found = {p: _version(p) for p in packages if _version(p)}
    about: dict[str, Any] = {
        "gpu": gpu_name(), "commit": commit(), "sources": _digest(),
        "date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "versions": found,
        "command": command(),
    }  # fmt: skip
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about |= {
            "driver": driver.split("\n")[0], "cuda": torch.version.cuda,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }  # fmt: skip
    return about


def command() -> str:
    """How to measure this again: without the limit of time and the folder of this once."""
    words = " ".join(["python", *sys.orig_argv[1:]])
    return re.sub(r" (--until|--out)[ =]\S+", "", words)


def commit() -> str | None:
    """As COMMIT says, where a copy of the tree has no git; else as git does."""
    return os.environ.get("COMMIT") or _output("git", "describe", "--always", "--dirty") or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _digest() -> str:
    """Of what is measured, and how: so much of the sources that the commit need not be believed."""
    digest = hashlib.sha256()
    for pattern in ("kernels/*.py", "parallel/*.py", "trainer/*.py", "bench/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def measured(case: Case, results: Results) -> Iterator[Row]:
    """A row for each provider: checked, then timed; or the reason why it was not."""
    inputs = truth = None
    results.content["absent"] |= peers.absent([case.op])
    for provider, call in {**case.providers, **peers.providers(case.op)}.items():
        row: Row = {
            "case": case.name, "provider": provider, "bytes": case.bytes, "flops": case.flops
        }  # fmt: skip
        if results.lost or results.is_late:
            yield row | {"not_measured": results.lost or "out of time"}
            continue
        try:
            if inputs is None:
                inputs = case.draw()
                truth = true_results(case, inputs)
            kept = [x.detach()[some(x)] for x in tensors(inputs)]
            row["error"] = error_of(case, call, inputs, truth)
            if not row["error"] <= (TOLERANCE if is_ours(provider) else COARSE)[case.dtype]:
                raise Wrong(f"wrong: off by {row['error']:.1e} of the truth's norm")
            now = [x.detach()[some(x)] for x in tensors(inputs)]
            row["in_place"] = not all(map(torch.equal, kept, now))
            row |= speed(case, call, inputs)
            row |= fractions(case, provider, row["ms"], results.rates)
        except Exception as problem:  # whatever a peer does, the rest is to be measured
            row["not_measured"] = reason_of(problem)
            results.lost = lost_to(provider)
        if row.get("in_place") or "not_measured" in row:
            inputs = truth = None  # drawn anew for the next provider
        if CUDA and not results.lost:
            torch.cuda.empty_cache()  # what one provider held in reserve, another may need whole
        yield row


def lost_to(provider: str) -> str:
    """Why nothing more can be measured in this process, or "": an illegal access is for good."""
    try:
        if CUDA:
            torch.cuda.synchronize()
    except RuntimeError:
        return f"lost the GPU to {provider}"
    return ""


def reason_of(problem: Exception) -> str:
    """In one line, why something was not measured."""
    text = str(problem).strip() or "no message"
    full = ("out of memory", "ALLOC_FAILED")  # as PyTorch, Triton and cuBLAS say it
    if isinstance(problem, torch.OutOfMemoryError) or any(x in text for x in full):
        return "out of memory"
    plain = isinstance(problem, (Wrong, ModuleNotFoundError))
    kind = "" if plain else f"{type(problem).__name__}: "
    return kind + text.splitlines()[0][:200]
