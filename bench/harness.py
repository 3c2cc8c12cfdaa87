"""Check every provider of an op against float64, time it, and write one JSON file per bench.

    results/<gpu>/<bench>.json = {"where", "rates", "absent", "rows": [one per case and provider]}

Times are medians in milliseconds with the 20th and 80th percentile, between CUDA events. The GPU is
held busy while calls are queued, so that they follow one another without gaps of the host; the
host's own time for a call is measured beside it. Inputs are random and rotate, so that the L2 cache
never holds them. What `rates` says was measured in the same process: fractions are of that, not of
a data sheet.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import peers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SAMPLE = 256  # rows that are checked of an op that treats each row alone
PATIENCE = 0.06  # seconds that the timed calls of one row may take together
MAX_SETS = 256  # of inputs, that rotate
LONGEST_SLEEP = 0.02  # seconds that the GPU waits for the host to queue eight calls
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative; what errs more is not timed
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One op on inputs of one shape; enumerating cases allocates nothing."""

    name: str  # "N=8192 V=128256 bf16 forward"
    draw: Callable[[], Sequence[Any]]  # random inputs on DEVICE; leaves that want gradients say so
    providers: Mapping[str, Callable]  # each called with the inputs; a tensor, or tensors first
    truth: Callable  # the same op, exact on float64 inputs
    bytes: int  # the least that any implementation reads and writes
    flops: int = 0  # the least of matrix products
    gemm: tuple[int, int, int] | None = None  # N, V, d of these products, for cuBLAS's rate
    work: Mapping[str, int] = field(default_factory=dict)  # FLOPs of providers that do more
    backward: bool = False  # the timed call goes on to the gradients
    by_row: bool = False  # row i of each result depends on row i of the inputs: a sample is checked
    dtype: torch.dtype = torch.float32  # of the coarsest input, for the tolerance


def baselines(op: Callable, tiny: bool) -> dict[str, Callable]:
    """Plain PyTorch as it is and, for what is timed in earnest, compiled."""
    return {"torch": op} if tiny else {"torch": op, "torch.compile": torch.compile(op)}


class Wrong(Exception):
    """A result that is not the float64 truth."""


def main(name: str, cases: Callable[[bool], Iterable[Case]], ops: Sequence[str]) -> None:
    """The command line of a bench, `python -m bench.bench_NAME`. ops: those it asks `peers` for.
    Exits 1 if ours failed."""
    options = arguments(f"python -m bench.bench_{name}")
    log = Log(name, options, ops)
    for case in cases(options.tiny):
        for row in measured(case, log):
            log.add(row)
    log.close()


def arguments(program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(program)
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, for a machine of any kind"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop measuring after them")
    parser.add_argument("--out", type=Path, help="folder of the results [bench/results]")
    options = parser.parse_args()
    if not CUDA and not options.tiny:
        print("no GPU on this machine; --tiny runs small sizes on the CPU", file=sys.stderr)
        sys.exit(2)
    return options


class Log:
    """The rows of one bench: printed as they come, written after each."""

    def __init__(self, name: str, options: argparse.Namespace, ops: Sequence[str] = ()) -> None:
        self.deadline = time.monotonic() + options.seconds
        self.rows: list[Row] = []
        self.rates = Rates(1 << 22 if options.tiny else 1 << 28)
        self.head = {"where": where(), "absent": peers.absent(ops)}
        out = options.out or (None if options.tiny else RESULTS)
        self.path = out and out / gpu_name().lower().replace(" ", "-") / f"{name}.json"
        for peer, reason in self.head["absent"].items():
            print(f"absent: {peer} ({reason})", flush=True)

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = self.head | {"rates": self.rates.known, "rows": self.rows}
            self.path.write_text(json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        """Exit 1 if something of ours failed for another reason than that the machine has not the
        time, the memory or the packages."""
        ours = (row for row in self.rows if row["provider"].startswith("ours"))
        reasons = (row.get("not_measured", "") for row in ours)
        if any(x and not x.startswith(("out of", "No module named")) for x in reasons):
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
        "gpu": gpu_name(),
        "commit": _output("git", "describe", "--always", "--dirty") or os.environ.get("COMMIT"),
        "sources": _digest(), "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(), "versions": found,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
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
    """Of what is measured and how: it names the code where a copy of it has no git."""
    digest = hashlib.sha256()
    measuring = ("bench/bench_*.py", "bench/harness.py", "bench/peers.py", "bench/plain.py")
    for pattern in ("kernels/*.py", "parallel/*.py", "trainer/*.py", *measuring):
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# What the same machine can do, in the same process.


class Rates:
    """GB/s of a device copy and of a read-only sum, TFLOP/s of cuBLAS by shape; each once."""

    def __init__(self, elements: int) -> None:
        self.elements = elements  # of the copied buffer, fp32
        self.known: dict[str, float] = {}

    @property
    def copy(self) -> float:
        """GB/s, read and written bytes together."""

        def rate() -> float:
            source, target = torch.randn(2, self.elements, device=DEVICE)
            return 8e-6 * self.elements / timed(lambda: target.copy_(source))["ms"]

        return self._of("copy_gb_s", rate)

    @property
    def read(self) -> float:
        """GB/s of a sum."""

        def rate() -> float:
            source = torch.randn(self.elements, device=DEVICE)
            return 4e-6 * self.elements / timed(source.sum)["ms"]

        return self._of("read_gb_s", rate)

    def gemm(self, N: int, V: int, d: int, dtype: torch.dtype) -> float:
        """TFLOP/s of (N, d) times the transpose of (V, d)."""

        def rate() -> float:
            x, w = (torch.randn(n, d, device=DEVICE).to(dtype) for n in (N, V))
            return 2e-9 * N * V * d / timed(lambda: torch.mm(x, w.t()))["ms"]

        return self._of(f"gemm_tflop_s {N}x{V}x{d}", rate)

    def _of(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]


# One case.

FRACTIONS = ("of_copy", "of_read", "of_gemm", "of_gemm_done")


def measured(case: Case, log: Log) -> Iterator[Row]:
    """A row for each provider: checked, then timed; or the reason why it was not."""
    inputs = truth = None
    for provider, call in case.providers.items():
        row: Row = {
            "case": case.name, "provider": provider, "bytes": case.bytes, "flops": case.flops
        }  # fmt: skip
        if log.is_late:
            yield row | {"not_measured": "out of time"}
            continue
        try:
            if inputs is None:
                drawn = case.draw()
                inputs, truth = drawn, true_results(case, drawn)
            kept = [x[_some(x)] for x in map(Tensor.detach, _tensors(inputs))]
            row["error"] = error_of(case, call, inputs, truth)
            row["in_place"] = not all(
                torch.equal(x, now.detach()[_some(now)]) for x, now in zip(kept, _tensors(inputs))
            )
            row |= speed(case, call, inputs)
            row |= fractions(case, provider, row["ms"], log.rates)
        except Exception as problem:  # whatever a peer does, the rest is to be measured
            row["not_measured"] = reason_of(problem)
        if row.get("in_place", True):
            inputs = None  # drawn anew for the next provider
        yield row
    if CUDA:
        torch.cuda.empty_cache()


def reason_of(problem: Exception) -> str:
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    text = str(problem).strip() or "no message"
    plain = isinstance(problem, (Wrong, ModuleNotFoundError))
    kind = "" if plain else f"{type(problem).__name__}: "
    return kind + text.splitlines()[0][:200]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [x for x in values if isinstance(x, Tensor)]


def _some(x: Tensor) -> Tensor:
    """Indices of some rows of x: the first, the last, and what lies evenly between."""
    n = len(x)
    return torch.linspace(0, n - 1, min(n, SAMPLE), dtype=torch.float64, device=x.device).long()


def forward(case: Case, call: Callable, inputs: Sequence[Any]) -> list[Tensor]:
    with torch.set_grad_enabled(case.backward):
        result = call(*inputs)
    return [result] if isinstance(result, Tensor) else _tensors(result)


def gradients(
    outputs: Iterable[Tensor], inputs: Sequence[Any], above: Sequence[Tensor]
) -> list[Tensor]:
    """Of the leaves among the inputs, given those of the differentiable outputs."""
    torch.autograd.backward([y for y in outputs if y.requires_grad], above)
    leaves = [x for x in _tensors(inputs) if x.requires_grad]
    found = [x.grad for x in leaves]
    for x in leaves:
        x.grad = None
    return found


def upstream(outputs: Iterable[Tensor], n: int | None = None) -> list[Tensor]:
    """Random gradients of the differentiable outputs, or of all n rows of which these are some; the
    same for every provider."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return [
        torch.randn((n, *y.shape[1:]) if n else y.shape, generator=generator, device=DEVICE)
        .to(y.dtype)
        for y in outputs if y.requires_grad
    ]  # fmt: skip


def true_results(case: Case, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs and gradients of the truth on the same inputs in float64, of some rows if `by_row`.

    Where the truth is NaN, nobody is to look.
    """
    n, rows = len(inputs[0]), _some(inputs[0])

    def exact(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wanted, x = x.requires_grad, x.detach()
        x = x[rows] if case.by_row and len(x) == n else x
        return (x.double() if x.is_floating_point() else x).requires_grad_(wanted)

    exactly = [exact(x) for x in inputs]
    outputs = forward(case, case.truth, exactly)
    if not case.backward:
        return outputs
    above = [x[rows] for x in upstream(outputs, n)] if case.by_row else upstream(outputs)
    return [*(y.detach() for y in outputs), *gradients(outputs, exactly, above)]


def error_of(case: Case, call: Callable, inputs: Sequence[Any], truth: Sequence[Tensor]) -> float:
    """The largest of ||result - truth|| / ||truth|| over the results. Raises Wrong."""
    found = forward(case, call, inputs)
    if case.backward:
        found += gradients(found, inputs, upstream(found))
    if len(found) != len(truth):
        raise Wrong(f"{len(found)} results where {len(truth)} are due")
    errors = []
    for y, t in zip(found, truth):
        y = (y[_some(y)] if case.by_row else y).detach().double()
        if y.shape != t.shape:
            raise Wrong(f"a result of shape {tuple(y.shape)} where {tuple(t.shape)} is due")
        counts = ~t.isnan()
        gap = torch.where(counts, y - t, 0.0).norm()
        errors.append(float(gap / torch.where(counts, t, 0.0).norm().clamp(min=1e-30)))
    error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not error <= TOLERANCE[case.dtype]:
        raise Wrong(f"wrong: off by {error:.1e} of the truth's norm")
    return error


def speed(case: Case, call: Callable, inputs: Sequence[Any]) -> Row:
    """Times, launches and memory of one call."""
    sets = [inputs, *(case.draw() for _ in range(_rotation(inputs) - 1))]
    above = [upstream(forward(case, call, inputs)) for _ in sets] if case.backward else []
    place = 0

    def once() -> None:
        nonlocal place
        outputs = forward(case, call, sets[place])
        if case.backward:
            gradients(outputs, sets[place], above[place])
        place = (place + 1) % len(sets)

    return timed(once) | (profiled(once) if CUDA else {})


def _rotation(inputs: Sequence[Any]) -> int:
    """Sets of inputs that hold twice what the L2 cache does."""
    if not CUDA:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(x.numel() * x.element_size() for x in _tensors(inputs))
    return max(1, min(MAX_SETS, math.ceil(2 * cache / size)))


def timed(once: Callable[[], object]) -> Row:
    """Milliseconds of a call: median, 20th and 80th percentile; and the host's microseconds."""
    for _ in range(3):  # warm-up, of one call when calls are slow
        if _wall(once) > 100:
            break
    if not CUDA:
        times = sorted(_wall(once) for _ in range(5))
        return {"ms": times[2], "ms_p20": times[1], "ms_p80": times[3], "calls": 5}
    began = time.perf_counter()
    for _ in range(3):
        once()
    host = (time.perf_counter() - began) / 3  # seconds to queue a call
    torch.cuda.synchronize()
    each = (time.perf_counter() - began) / 3
    times = []
    while len(times) < max(6, min(200, PATIENCE / each)):
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(6)]
        torch.cuda._sleep(int(2e9 * min(2 * len(events) * host, LONGEST_SLEEP)))  # cycles at 2 GHz
        for before, after in events:
            before.record()
            once()
            after.record()
        torch.cuda.synchronize()
        times += [before.elapsed_time(after) for before, after in events]
    p20, *_, p80 = statistics.quantiles(times, n=5)
    return {
        "ms": statistics.median(times), "ms_p20": p20, "ms_p80": p80, "calls": len(times),
        "host_us": 1e6 * host,
    }  # fmt: skip


def _wall(once: Callable[[], object]) -> float:
    began = time.perf_counter()
    once()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def profiled(once: Callable[[], object]) -> Row:
    """Launches of a call (kernels, fills and copies), the GPU's microseconds in them, and the MB
    that it allocates beyond its inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        once()
        torch.cuda.synchronize()
    seen = [
        event for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip
    row: Row = {"peak_mb": peak / 1e6}
    if seen:  # none where the profiler cannot read the device
        row |= {
            "launches": len(seen), "kernel_us": sum(e.time_range.elapsed_us() for e in seen)
        }  # fmt: skip
    return row


def fractions(case: Case, provider: str, ms: float, rates: Rates) -> Row:
    """What the call achieved, of what this machine does in this process."""
    gb_s, tflop_s = 1e-6 * case.bytes / ms, 1e-9 * case.flops / ms
    if case.gemm is None:
        return {"gb_s": gb_s, "of_copy": gb_s / rates.copy, "of_read": gb_s / rates.read}
    gemm = rates.gemm(*case.gemm, case.dtype)
    done = case.work.get(provider, case.flops) / case.flops
    return {
        "tflop_s": tflop_s, "of_gemm": tflop_s / gemm, "of_gemm_done": done * tflop_s / gemm
    }  # fmt: skip


def chunked(op: Callable, by_row: Sequence[Any], shared: Sequence[Any], rows: int = 512) -> Tensor:
    """op(*by_row, *shared) a few rows at a time, made again in backward: for a truth that would not
    fit the memory in float64."""
    parts = [
        checkpoint(op, *(x[i : i + rows] for x in by_row), *shared, use_reentrant=False)
        for i in range(0, len(by_row[0]), rows)
    ]
    return torch.cat(parts)
