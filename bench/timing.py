"""How long a call takes, what it launches and allocates, and what the machine can do."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.case import CUDA, DEVICE, Case, forward, gradients, tensors, upstream
from bench.rows import Row

PATIENCE = 60  # ms that the timed calls of one row may take together, QUEUED calls at least
SLOW = 50  # ms; of calls that take longer three are timed, after one
WARM_UP = 25  # ms of calls, three at least, before any is timed: an idle GPU clocks down
QUEUED = 5  # calls that are queued while the GPU sleeps
LONGEST_SLEEP = 20  # ms; calls that take longer to queue show the host's gaps
MAX_SETS = 256  # of inputs, that rotate
FRACTIONS = ("of_copy", "of_read", "of_gemm", "of_gemm_done")


def speed(case: Case, call: Callable, inputs: Sequence[Any]) -> Row:
    """Times, launches and memory of one call."""
    sets = [inputs, *(case.draw() for _ in range(_rotation(inputs) - 1))]
    above: list[list[Tensor]] = []
    if case.backward:
        outputs = forward(case, call, inputs)
        above = [upstream(outputs) for _ in sets]
        del outputs  # and the graph behind them
    held: list[list[Tensor]] = [[] for _ in sets]  # so that results do not stay in the cache either
    place = 0

    def once() -> None:
        nonlocal place
        results = forward(case, call, sets[place])
        if case.backward:
            results = gradients(results, sets[place], above[place])
        if len(sets) > 1:
            held[place] = results
        place = (place + 1) % len(sets)

    row = timed(once)
    if not CUDA or row["host_us"] > 1e3 * SLOW:  # the profiler is slow with many launches
        return row
    return row | profiled(once)


def _rotation(inputs: Sequence[Any]) -> int:
    """Sets of inputs that hold four times what the L2 cache does."""
    if not CUDA:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(x.nbytes for x in tensors(inputs))
    return max(1, min(MAX_SETS, math.ceil(4 * cache / size)))


def timed(once: Callable[[], object]) -> Row:
    """Milliseconds of a call: median, 20th and 80th percentile; on a GPU also the microseconds
    until the host has it queued."""
    warm = [_wall(once)]
    while warm[-1] < SLOW and (len(warm) < 3 or sum(warm) < WARM_UP):
        warm.append(_wall(once))
    each = min(warm)
    if not CUDA:
        return spread([_wall(once) for _ in range(5)])
    calls = 3 if each > SLOW else max(QUEUED, min(200, round(PATIENCE / each)))
    times: list[float] = []
    host: list[float] = []
    while len(times) < calls:
        n = min(QUEUED, calls - len(times))
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(n)]
        torch.cuda._sleep(int(2e6 * min(4 * QUEUED * each, LONGEST_SLEEP)))  # cycles, of 2 GHz
        for before, after in events:
            before.record()
            began = time.perf_counter()
            once()
            host.append(1e6 * (time.perf_counter() - began))
            after.record()
        torch.cuda.synchronize()
        times += [before.elapsed_time(after) for before, after in events]
    return spread(times) | {"host_us": statistics.median(host)}


def _wall(once: Callable[[], object]) -> float:
    """Milliseconds until a call is done."""
    began = time.perf_counter()
    once()
    if CUDA:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def spread(times: Sequence[float]) -> Row:
    """Of times in milliseconds, the median and the 20th and 80th percentile."""
    several = [*times, *times]  # of one there are no quantiles
    p20, *_, p80 = statistics.quantiles(several, n=5, method="inclusive")
    return {"ms": statistics.median(times), "ms_p20": p20, "ms_p80": p80, "calls": len(times)}


def profiled(once: Callable[[], object]) -> Row:
    """Launches of a call (kernels, fills and copies), the GPU's microseconds in them, and the MB
    that it allocates beyond its inputs."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    row: Row = {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    return row | launches(once)


def launches(once: Callable[[], object]) -> Row:
    """Kernels, fills and copies of a call, and the GPU's microseconds in them; nothing where the
    profiler cannot see them."""
    seen = on_the_gpu(once) if CUDA else []
    gpu_us = sum(event.time_range.elapsed_us() for event in seen)
    return {"launches": len(seen), "gpu_us": gpu_us} if seen else {}


def on_the_gpu(once: Callable[[], object]) -> list[Any]:
    """The profiler's events of what the GPU did in a call; none where it cannot read the device,
    as in some containers: a dash in the table, and no reason to lose the times."""
    try:
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            once()
            torch.cuda.synchronize()
    except (AssertionError, RuntimeError):
        return []
    return [
        event for event in profile.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip


def profile_of(call: Callable[[], object], lines: int = 40) -> str:
    """The kernels, copies and fills of a call by the GPU's time in them: a page."""
    if not CUDA:  # called all the same: a rehearsal
        call()
        return "no GPU, no profile\n"
    began = time.perf_counter()
    seen = on_the_gpu(call)
    wall = 1e3 * (time.perf_counter() - began)
    sums: dict[str, list[float]] = {}
    for event in seen:
        n_and_ms = sums.setdefault(event.name[:150], [0, 0.0])
        n_and_ms[0] += 1
        n_and_ms[1] += 1e-3 * event.time_range.elapsed_us()
    busy = sum(ms for _, ms in sums.values())
    page = [
        f"{len(seen)} launches, {busy:.2f} ms on the GPU; {wall:.0f} ms with the profiler's own",
        "     ms   share  launches  kernel",
    ]
    for name, (n, ms) in sorted(sums.items(), key=lambda x: -x[1][1])[:lines]:
        page.append(f"{ms:9.3f}  {ms / max(busy, 1e-9):5.1%} {n:9.0f}  {name}")
    return "\n".join(page) + "\n"


def fractions(case: Case, provider: str, ms: float, rates: "Rates") -> Row:
    """What the call achieved, of what this machine does in this process."""
    if case.gemm is None:
        gb_s = 1e-6 * case.bytes / ms
        return {"gb_s": gb_s, "of_copy": gb_s / rates.copy, "of_read": gb_s / rates.read}
    tflop_s = 1e-9 * case.flops / ms
    of_gemm = tflop_s / rates.gemm(*case.gemm, case.dtype, case.backward)
    done = case.work.get(provider, case.flops) / case.flops
    return {"tflop_s": tflop_s, "of_gemm": of_gemm, "of_gemm_done": done * of_gemm}


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

    def gemm(self, N: int, V: int, d: int, dtype: torch.dtype, backward: bool = False) -> float:
        """TFLOP/s of (N, d) times the transpose of (V, d), or of this and its two gradients."""

        def rate() -> float:
            x, w = (torch.randn(n, d, device=DEVICE).to(dtype) for n in (N, V))
            y = torch.randn(N, V, device=DEVICE, dtype=dtype) if backward else None

            def products() -> None:
                torch.mm(x, w.t())
                if y is not None:
                    torch.mm(y, w)
                    torch.mm(y.t(), x)

            return (6e-9 if backward else 2e-9) * N * V * d / timed(products)["ms"]

        passes = " forward + backward" * backward
        return self._of(f"gemm_tflop_s {N}x{V}x{d}{passes}", rate)

    def _of(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.known:
            self.known[name] = measure()
        return self.known[name]
