"""python -m bench: on a GPU, the kernels' tests, every bench and the report, in seven minutes.

What `make gpu` runs. Each bench is a process of its own, so that none can take another one along,
and has a share of the time that is left; what it cannot measure in it says so in its file. Exits 1
if a test or something of ours failed, 2 on a machine without a GPU.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from bench.rows import ROOT, SHARES, benches, end_sections_too, require_gpu

BUDGET = 420  # seconds in all
FOR_TESTS = 0.3  # of the budget, at most
FOR_REPORT = 30  # seconds that are kept for it
GRACE = 25  # seconds that a bench may overrun its share, to end the row that it is at
START = 12  # seconds: what a process needs to begin


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m bench", description="What `make gpu` runs.")
    parser.add_argument("--tiny", action="store_true", help="benches alone, small, on any machine")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all [%(default)s]")
    parser.add_argument("--out", help="folder of the results [bench/results, and the report]")
    options = parser.parse_args(arguments)
    end_sections_too()
    began = time.time()
    end = began + options.budget - FOR_REPORT
    failed = []
    if not options.tiny:
        require_gpu()
        if not tests_pass(FOR_TESTS * options.budget):
            failed.append("tests/kernels")
    from bench.harness import commit

    os.environ["COMMIT"] = commit() or ""  # before the results make the tree a dirty one
    names = benches()
    flags = ["--tiny"] * options.tiny + (["--out", options.out] if options.out else [])
    for i, name in enumerate(names):
        left = end - time.time()
        rest = names[i:]
        seconds = START + (left - START * len(rest)) * share(name) / sum(map(share, rest))
        if left < START:
            print(f"\n== {name}: out of time")
            continue
        print(f"\n== {name}: {seconds:.0f} s of {left:.0f} s", flush=True)
        command = ["-m", f"bench.bench_{name}", "--until", f"{time.time() + seconds:.0f}", *flags]
        if python(command, min(seconds + GRACE, left)):
            failed.append(name)
    if not options.out and not options.tiny and python(["-m", "bench.report"], FOR_REPORT):
        failed.append("report")
    print(f"\n{time.time() - began:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'ok'}")
    sys.exit(bool(failed))


def share(name: str) -> float:
    """Of the time that is left, relative to the other benches."""
    return SHARES.get(name, 1)


def tests_pass(seconds: float) -> bool:
    """The kernels' tests on the GPU, in as many processes as there are cores: most of their time is
    the compiler's."""
    cores = max(1, min(14, (os.cpu_count() or 1) - 2))
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        return python([*command, "tests/kernels", "-n", str(cores)], seconds) == 0
    print("pytest-xdist is not installed: a process for each file of tests", flush=True)
    end = time.time() + seconds
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_*"))

    def status(path: str) -> int:
        return python([*command, path], max(1.0, end - time.time()))

    with ThreadPoolExecutor(cores) as pool:
        return not any(pool.map(status, files))


def python(arguments: Sequence[str], seconds: float) -> int:
    """Exit status of this Python on the arguments; 1 when it took too long, and then neither it nor
    what it started is left on the GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments], cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds:.0f} s: python {' '.join(arguments)}", file=sys.stderr)
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    main()
