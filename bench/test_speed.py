"""pytest bench: every op of the benches at small sizes, on a machine of any kind.

`make bench` keeps the times in .benchmarks/ and shows them beside the last ones. On a CPU ours is
its reference, and what is seen is what a call costs the host. On a quiet machine
--benchmark-compare-fail=min:20% makes it a judge.
"""

import importlib
from pathlib import Path

import pytest

from bench.case import TOLERANCE, Case, error_of, forward, gradients, true_results, upstream

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
CASES = [
    pytest.param(case, provider, id=f"{module.removeprefix('bench_')} {case.name}, {provider}")
    for module in MODULES
    for case in importlib.import_module(f"bench.{module}").cases(tiny=True)
    if isinstance(case, Case)
    for provider in case.providers
]


@pytest.mark.parametrize("case, provider", CASES)
def test_speed(case, provider, benchmark) -> None:
    call, inputs = case.providers[provider], case.draw()
    assert error_of(case, call, inputs, true_results(case, inputs)) <= TOLERANCE[case.dtype]
    above = upstream(forward(case, call, inputs)) if case.backward else []

    def once() -> None:
        outputs = forward(case, call, inputs)
        if case.backward:
            gradients(outputs, inputs, above)

    benchmark(once)
