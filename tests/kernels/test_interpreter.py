"""What the tests of the kernels rest on: the interpreter as we change it, and the traffic count."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.kernels.traffic import Traffic
from tetrad.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _bf16(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, tl.where(x > y, x + y, x.to(tl.float32) / 3))


def test_bf16_computes_in_fp32_and_rounds_to_nearest() -> None:
    x, y = torch.randn(2, 256).bfloat16()
    out = torch.empty_like(x)
    _bf16[(1,)](x, y, out, BLOCK=256)
    assert torch.equal(out, torch.where(x > y, x + y, (x.float() / 3).bfloat16()))


@triton.jit
def _bf16_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def test_bf16_is_not_accumulated() -> None:
    with pytest.raises(InterpreterError, match="accumulate in fp32"):
        _bf16_sum[(1,)](torch.ones(4).bfloat16(), torch.empty(1), BLOCK=4)


@triton.jit
def _affine(a, b, a_next, b_next):
    return a * a_next, b * a_next + b_next


@triton.jit
def _larger(a, i, b, j):
    return tl.maximum(a, b), tl.where(b > a, j, i)


@triton.jit
def _scan_and_reduce(a_ptr, b_ptr, scan_ptr, largest_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    _, scan = tl.associative_scan((a, b), 0, _affine, reverse=True)
    tl.store(scan_ptr + i, scan)
    square = tl.reshape(b, [BLOCK // 4, 4])
    _, place = tl.reduce((square, tl.reshape(i, [BLOCK // 4, 4])), 1, _larger)
    tl.store(largest_ptr + tl.arange(0, BLOCK // 4), place)


def test_generic_scan_and_reduce() -> None:
    a, b = torch.rand(64), torch.randn(64)
    scan, largest = torch.empty(64), torch.empty(16, dtype=torch.int32)
    _scan_and_reduce[(1,)](a, b, scan, largest, BLOCK=64)
    expected, carry = torch.empty(64), torch.tensor(0.0)
    for t in reversed(range(64)):
        carry = expected[t] = a[t] * carry + b[t]
    torch.testing.assert_close(scan, expected)
    assert (largest == b.view(16, 4).argmax(1) + 4 * torch.arange(16)).all()


@triton.jit
def _scalars(out_ptr, number, double: tl.float64, n):
    tl.store(out_ptr, number)
    tl.store(out_ptr + 1, double)
    tl.store(out_ptr + 2, n * n)


def test_python_floats_are_fp32_unless_annotated_and_int32_does_not_wrap() -> None:
    out = torch.empty(3, dtype=torch.float64)
    _scalars[(1,)](out, 0.1, 0.1, 5)
    assert out.tolist() == [torch.tensor(0.1).item(), 0.1, 25]
    _scalars[(1,)](out.zero_(), n=5, double=0.1, number=0.1)
    assert out.tolist() == [torch.tensor(0.1).item(), 0.1, 25]
    with pytest.raises(InterpreterError, match="overflow"):
        _scalars[(1,)](out, 0.1, 0.1, 50_000)


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_masked_load_without_other_is_undefined(dtype) -> None:
    x, out = torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    _copy[(1,)](x, out, 5, BLOCK=8)
    assert (out[:5] == 1).all() and ((out[5:] != out[5:]) | (out[5:] == 2**31 - 1)).all()


def test_traffic_is_counted_by_element() -> None:
    x, out = torch.ones(4, 8), torch.empty(16)
    with Traffic() as traffic:
        _copy[(2,)](x[1], out, 5, BLOCK=8)
    assert traffic.reads(x).tolist() == [[0] * 8, [1] * 5 + [0] * 3, [0] * 8, [0] * 8]
    assert (traffic.writes(out) == 1).all()
    assert (traffic.bytes_read, traffic.bytes_written) == (5 * 4, 16 * 4)


@pytest.mark.parametrize(
    "x, out",
    [
        (torch.ones(7), torch.empty(8)),  # past the end
        (torch.ones(20)[:7], torch.empty(8)),  # past the end of a view
        (torch.ones(20)[::2][:8], torch.empty(8)),  # between the elements of a view
        (torch.ones(8), torch.empty(7)),  # a store
    ],
    ids=["storage", "view", "gap", "store"],
)
def test_traffic_refuses_what_was_not_given(x, out) -> None:
    with Traffic(), pytest.raises(InterpreterError, match="outside the tensors of its launch"):
        _copy[(1,)](x, out, 8, BLOCK=8)


@triton.jit
def _sum(
    x_ptr, parts_ptr, ticket_ptr, out_ptr, TICKET: tl.constexpr, BARRIER: tl.constexpr,
    CACHE: tl.constexpr, SEMANTICS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(parts_ptr + program, 2 * tl.load(x_ptr + program))
    if BARRIER:
        tl.debug_barrier()
    last = program == programs - 1
    if TICKET:
        last = tl.atomic_add(ticket_ptr, 1, sem=SEMANTICS) == programs - 1
    if LATE:
        tl.store(parts_ptr + program, 0.0)
    if last:
        total = 0.0
        for i in range(programs):
            total += tl.load(parts_ptr + i, cache_modifier=CACHE)
        tl.store(out_ptr, total)


def total_of(order=range, **wrong) -> float:
    x, out = torch.arange(5.0), torch.zeros(())
    right = {"TICKET": True, "BARRIER": True, "CACHE": ".cg", "SEMANTICS": "acq_rel"}
    right["LATE"] = False
    with Traffic(order=order):
        _sum[(5,)](x, torch.empty(5), torch.zeros((), dtype=torch.int32), out, **{**right, **wrong})
    return out.item()


def test_programs_may_meet_by_a_ticket() -> None:
    assert total_of() == total_of(lambda n: range(n)[::-1]) == 20


@triton.jit
def _draw(ticket_ptr, drawn_ptr):
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(drawn_ptr + place, tl.atomic_add(ticket_ptr, 1))


def test_programs_run_in_the_order_asked_for() -> None:
    drawn = torch.empty(6, dtype=torch.int32)
    with Traffic(order=lambda n: [2, 0, 4, 1, 3, 5]):
        _draw[(3, 2)](torch.zeros((), dtype=torch.int32), drawn)
    assert drawn.tolist() == [1, 3, 0, 4, 2, 5]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"TICKET": False}, "no ticket drawn"),
        ({"BARRIER": False}, "no tl.debug_barrier"),
        ({"CACHE": ""}, "stale cache line"),
        ({"SEMANTICS": "relaxed"}, "neither acquires nor releases"),
        ({"LATE": True}, "no ticket drawn"),
    ],
    ids=str,
)
def test_a_ticket_that_would_fail_on_a_gpu_is_refused(wrong, message) -> None:
    with pytest.raises(InterpreterError, match=message):
        total_of(**wrong)


@triton.jit
def _shift(x_ptr):
    i = tl.program_id(0)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


@pytest.mark.parametrize("order", [range, lambda n: range(n)[::-1]], ids=["forward", "reverse"])
def test_programs_may_not_race(order) -> None:
    with Traffic(order=order), pytest.raises(InterpreterError, match="no ticket drawn"):
        _shift[(4,)](torch.zeros(5))


@triton.jit
def _accumulate(x_ptr):
    tl.atomic_add(x_ptr, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_float_atomics_are_refused(dtype) -> None:
    with Traffic(), pytest.raises(InterpreterError, match="depend on the order"):
        _accumulate[(4,)](torch.zeros(4, dtype=dtype))
