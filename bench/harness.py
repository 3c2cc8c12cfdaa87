"""Time providers on cases and write one JSON file per benchmark and GPU.

    results/<gpu>/<bench>.json = {"where": provenance, "rows": [one per case and provider]}

Times are medians in milliseconds with the 20th and 80th percentile, after warm-up, L2 flushed
(triton.testing.do_bench). "fraction_of_peak" is bytes that must move over the GPU's bandwidth.
Without a GPU five calls are timed, enough to see that a benchmark runs, and nothing is written.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parent / "results"
PEAK_GB_S = {"NVIDIA H200": 4800.0}  # data-sheet memory bandwidth


@dataclass
class Case:
    name: str  # "N=8192 V=128256 bf16"
    provider: str  # "ours", "torch", "torch.compile", "liger"
    run: Callable[[], object]  # one timed call
    bytes_moved: int  # the least any implementation must read and write


def where() -> dict[str, str]:
    """What made the numbers: GPU, commit, versions, command."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=RESULTS.parent, capture_output=True, text=True,
    )  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "gpu": gpu, "commit": git.stdout.strip(), "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "command": " ".join(["python", *sys.orig_argv[1:]]),
    }  # fmt: skip


def measure(case: Case, gpu: str) -> dict[str, object]:
    peak_memory_mb = None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        p20, p50, p80 = triton.testing.do_bench(case.run, quantiles=[0.2, 0.5, 0.8])
        peak_memory_mb = torch.cuda.max_memory_allocated() / 2**20
    else:
        _, p20, p50, p80, _ = sorted(_clock(case.run) for _ in range(5))
    gb_s = case.bytes_moved / p50 / 1e6
    row = {k: v for k, v in asdict(case).items() if k != "run"}
    row |= {"ms": p50, "ms_p20": p20, "ms_p80": p80, "gb_s": gb_s, "peak_memory_mb": peak_memory_mb}
    return row | {"fraction_of_peak": gb_s / PEAK_GB_S[gpu] if gpu in PEAK_GB_S else None}


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def publish(name: str, cases: Iterator[Case]) -> None:
    """Measure `cases`, print a table, and on a GPU write results/<gpu>/<name>.json."""
    here = where()
    rows = []
    for case in cases:
        rows.append(measure(case, here["gpu"]))
        ms, gb_s = rows[-1]["ms"], rows[-1]["gb_s"]
        print(f"{case.name:40} {case.provider:14} {ms:9.3f} ms {gb_s:8.0f} GB/s")
    if not torch.cuda.is_available():
        return
    path = RESULTS / here["gpu"].lower().replace(" ", "-") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"where": here, "rows": rows}, indent=1) + "\n")
