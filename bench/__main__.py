"""python -m bench: on a GPU, the kernels' tests, every bench and the report, in nine minutes.

What `make gpu` runs. Each bench is a process of its own, so that none can take another one along,
and has a share of the time that is left; what it cannot measure in it says so in its file. Exits 1
if a test or something of ours failed, 2 on a machine without a GPU.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time

from bench.rows import ROOT, SHARES, benches

LIMIT = 500  # seconds in all
FOR_TESTS = 240  # seconds at most
GRACE = 40  # seconds that a bench may overrun its share, to end the row that it is at


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="benches alone, small, on any machine")
    parser.add_argument("--out", help="folder of the results [bench/results]")
    options = parser.parse_args()
    began = time.monotonic()
    failed = []
    if not options.tiny:
        require_gpu()
        if not tests_pass():
            failed.append("tests/kernels")
    names = benches()
    flags = ["--tiny"] * options.tiny + (["--out", options.out] if options.out else [])
    for i, name in enumerate(names):
        left = LIMIT - (time.monotonic() - began)
        seconds = max(0, left) * share(name) / sum(map(share, names[i:]))
        print(f"\n== {name}: {seconds:.0f} s of {left:.0f} s", flush=True)
        command = ["-m", f"bench.bench_{name}", "--seconds", f"{seconds:.0f}", *flags]
        if python(command, seconds + GRACE):
            failed.append(name)
    if not options.tiny and python(["-m", "bench.report"], GRACE):
        failed.append("report")
    print(
        f"\n{time.monotonic() - began:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'ok'}"
    )
    sys.exit(bool(failed))


def share(name: str) -> float:
    """Of the time that is left, relative to the other benches."""
    return SHARES.get(name, 1)


def require_gpu() -> None:
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        what = "PyTorch is not installed" if torch is None else "PyTorch sees none"
        print(f"make gpu: no GPU on this machine ({what})", file=sys.stderr)
        sys.exit(2)


def tests_pass() -> bool:
    """The kernels' tests on the GPU; several at a time where pytest-xdist is installed, for most of
    their time is the compiler's."""
    workers = min(8, (os.cpu_count() or 2) // 2)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    return python(["-m", "pytest", "-q", "tests/kernels", *parallel], FOR_TESTS) == 0


def python(arguments: list[str], seconds: float) -> int:
    """Exit status of this Python on the arguments; 1 when it took too long."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, timeout=seconds
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: python {' '.join(arguments)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
