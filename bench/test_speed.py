"""pytest bench: every op of the benches at small sizes, on a machine of any kind.

`make bench` keeps the times in .benchmarks/ and shows them beside the last ones. On a CPU ours is
its reference, and what is seen is what a call costs the host. On a quiet machine
--benchmark-compare-fail=min:20% makes it a judge.
"""

import importlib

import pytest

from bench.case import TOLERANCE, Case, error_of, forward, gradients, true_results, upstream
from bench.rows import benches

CASES = [
    pytest.param(case, provider, id=f"{name} {case.name}, {provider}")
    for name in benches()
    for case in importlib.import_module(f"bench.bench_{name}").cases(tiny=True)
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
