"""The bytes that a bench holds an op to are those that its kernels move, counted one by one."""

import importlib

import pytest

from bench.case import Case, forward, gradients, upstream
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counting needs TRITON_INTERPRET=1")

# Where our kernels move more than the floor, per token: whitening reads twice what it writes once;
# the gradient of a loss is kept and then multiplied by the upstream one, 8 bytes more.
# What remains, up to 5 %, are results per row and partial sums, which sizes in earnest do not show.
MORE = {
    "ppo_advantages": 38 / 21, "whiten": 14 / 9, "gae, whitened": 31 / 17,
    "policy_loss": 25 / 17, "value_loss": 25 / 17,
}  # fmt: skip
BENCHES = ("advantages", "exact_kl", "kl", "logprob", "ppo_loss")  # without matrix products
CASES = [
    pytest.param(case, id=case.name)
    for name in BENCHES
    for case in importlib.import_module(f"bench.bench_{name}").cases(tiny=True)
    if isinstance(case, Case) and case.gemm is None
]


@pytest.mark.parametrize("case", CASES)
def test_kernels_move_the_floor(case) -> None:
    from tests.kernels.traffic import Traffic

    inputs = case.draw()
    with Traffic() as traffic:
        outputs = forward(case, case.providers["ours"], inputs)
        if case.backward:
            gradients(outputs, inputs, upstream(outputs))
    moved = traffic.bytes_read + traffic.bytes_written
    more = max([x for name, x in MORE.items() if case.name.startswith(name)], default=1.0)
    assert case.bytes <= moved <= 1.05 * more * case.bytes
