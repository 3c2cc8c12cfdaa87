import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.forked_world import run_world
from tests.kernels.callers import LAYOUTS, SHARDS, laid_out, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tests.products import Products, assert_aligned
from tetrad.kernels import exact_kl as module
from tetrad.kernels import linear_logprob, reference
from tetrad.kernels.exact_kl import exact_kl, linear_exact_kl

IMPLEMENTATIONS = pytest.mark.parametrize("ours", [module, reference], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def run(f: Callable, logits: Tensor, ref_logits: Tensor, **options) -> list[Tensor]:
    """KL, and the gradient of a sum of it with random weights."""
    logits = logits.detach().requires_grad_()
    kl = f(logits, ref_logits, **options)
    factors = torch.randn(kl.shape, generator=torch.Generator().manual_seed(0)).to(kl)
    (factors * kl).sum().backward()
    return [kl.detach(), logits.grad]


def run_linear(f: Callable, *tensors: Tensor, **options) -> list[Tensor]:
    hidden, weight, ref_hidden, ref_weight = tensors
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    kl = f(*leaves, ref_hidden, ref_weight, **options)
    factors = torch.randn(kl.shape, generator=torch.Generator().manual_seed(0)).to(kl)
    (factors * kl).sum().backward()
    return [kl.detach(), *(x.grad for x in leaves)]


def plain(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """What a trainer writes, in the inputs' type."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [x.double() for x in tensors]


# as in test_logprob.py; 20000 takes two splits
@pytest.mark.parametrize("N", [0, 1, 5])
@pytest.mark.parametrize("V", [1, 7, 128, 1000, 20000])
@DTYPES
def test_as_exact_as_pytorch(N, V, dtype, device, assert_as_exact) -> None:
    tensors = [3 * torch.randn(N, V, device=device).to(dtype) for _ in range(2)]
    truth = run(plain, *double(tensors))
    for outputs in zip(run(exact_kl, *tensors), run(reference.exact_kl, *tensors), truth):
        assert_as_exact(*outputs)


@IMPLEMENTATIONS
def test_by_hand(ours, device) -> None:
    """p = (1, 3) / 4, q = (1, 1) / 2: KL = log 2 + (1/4) log(1/4) + (3/4) log(3/4).

    dKL/dlogits_j = p_j (log(p_j / q_j) - KL); at temperature 1/2, p = (1, 9) / 10.
    """
    logits = torch.tensor([[1.0, 3.0]], device=device).log().requires_grad_()
    ref = torch.zeros(1, 2, device=device)
    expected = 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)
    kl = ours.exact_kl(logits, ref)
    torch.testing.assert_close(kl.tolist(), [expected])
    kl.backward()
    slope = [1 / 4 * (math.log(1 / 2) - expected), 3 / 4 * (math.log(3 / 2) - expected)]
    torch.testing.assert_close(logits.grad.tolist(), [slope])
    cooler = 1 / 10 * math.log(1 / 5) + 9 / 10 * math.log(9 / 5)
    torch.testing.assert_close(ours.exact_kl(logits, ref, temperature=0.5).tolist(), [cooler])
    hidden = torch.ones(1, 1, device=device)
    linear = ours.linear_exact_kl(hidden, logits.detach().t(), hidden, ref.t())
    torch.testing.assert_close(linear.tolist(), [expected])


def test_gradients_of_the_reference() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(
        lambda x: reference.exact_kl(x, ref, temperature=0.7, vocab_size=4, mask=mask), logits
    )
    hidden, weight = (
        torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3, 2), (5, 2))
    )
    assert torch.autograd.gradcheck(
        lambda h, w: reference.linear_exact_kl(h, w, ref[:, :3], ref[:1, :3].expand(5, 3)),
        (hidden, weight),
    )


@IMPLEMENTATIONS
def test_impossible_tokens(ours, device) -> None:
    """p = 0 counts nothing whatever q is; q = 0 where p > 0 is infinite."""
    logits = torch.randn(3, 300, device=device)
    ref = torch.randn(3, 300, device=device)
    logits[0, :200] = -torch.inf
    ref[1, 7] = -torch.inf
    logits[2, :200] = ref[2, :200] = -torch.inf
    kl = ours.exact_kl(logits.requires_grad_(), ref)
    with torch.no_grad():
        p, q = logits.double().softmax(-1), ref.double().softmax(-1)
        expected = torch.where(p == 0, 0, p * (p / q).log()).sum(-1)
    assert kl[1] == torch.inf and expected[1] == torch.inf
    torch.testing.assert_close(kl[::2].double(), expected[::2], rtol=1e-5, atol=1e-6)
    kl[::2].sum().backward()
    assert logits.grad[::2].isfinite().all() and (logits.grad[0, :200] == 0).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_call(data, device, assert_as_exact) -> None:
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 9999)))
    batch = draw(strategies.lists(strategies.integers(0, 4), max_size=3))
    V = draw(strategies.integers(1, 300))
    tensors = []
    for _ in range(2):
        dtype = draw(strategies.sampled_from([torch.float32, torch.bfloat16]))
        x = (3 * torch.randn(*batch, V + 3, device=device)).to(dtype)[..., 1 : V + 1]
        x = x.mT.contiguous().mT if x.dim() > 1 and draw(strategies.booleans()) else x
        tensors.append(x)
    mask = torch.rand(batch, device=device) < 0.6 if draw(strategies.booleans()) else None
    temperature = draw(strategies.floats(0.3, 4.0))
    if draw(strategies.booleans()):
        temperature = torch.rand(batch, device=device) + temperature
    vocab_size = draw(strategies.none() | strategies.integers(1, V))
    options = {"temperature": temperature, "mask": mask, "vocab_size": vocab_size}
    ours = run(exact_kl, *tensors, **options)
    theirs = run(reference.exact_kl, *tensors, **options)
    truth = run(reference.exact_kl, *double(tensors), **options)
    for outputs in zip(ours, theirs, truth, strict=True):
        assert_as_exact(*outputs)
    assert (ours[0] >= -3e-6).all()
    same = exact_kl(tensors[0], tensors[0], **options)
    assert (same.abs() < 3e-6).all()


@IMPLEMENTATIONS
def test_what_is_masked_is_not_read(ours, device) -> None:
    clean = torch.randn(2, 6, 40, device=device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    temperature = torch.rand(6, device=device) + 0.5

    def results(poison: float) -> list[Tensor]:
        x, y = clean.clone()
        for z in x, y:
            z[mask == 0], z[:, 33:] = poison, poison
        t = torch.where(mask == 0, poison, temperature)
        x.requires_grad_()
        kl = ours.exact_kl(x, y, mask=mask, vocab_size=33, temperature=t)
        kl.backward(torch.where(mask == 0, poison, 2.0))
        return [kl.detach(), x.grad]

    for x, y in zip(results(1.0), results(torch.nan), strict=True):
        assert torch.equal(x, y) and (x[mask == 0] == 0).all()


def test_moves_no_more_than_it_must(device) -> None:
    if device != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    logits = torch.randn(3, 1000, dtype=torch.bfloat16).requires_grad_()
    ref = torch.randn(3, 1000, dtype=torch.bfloat16)
    mask = torch.tensor([True, False, True])
    with Traffic() as forward:
        kl = exact_kl(logits, ref, mask=mask)
    with Traffic() as backward:
        kl[0].backward()
    for x in logits, ref:
        assert (forward.reads(x)[mask] == 1).all() and (forward.reads(x)[1] == 0).all()
        assert (backward.reads(x)[0] == 1).all() and (backward.reads(x)[1:] == 0).all()
    assert (backward.writes(logits.grad) == 1).all()
    floor = 2 * 2 * 1000 * 2
    assert floor <= forward.bytes_read < 1.06 * floor


@pytest.mark.parametrize("memory", LAYOUTS)
def test_stays_inside_its_inputs(memory, device) -> None:
    """Up to the end of an allocation, not aligned, between NaN: Traffic stops any other access."""
    if device != "cpu":
        pytest.skip("accesses are watched in the interpreter")
    x, y, mask = torch.randn(5, 13), torch.randn(5, 13), torch.tensor([1, 1, 0, 1, 1])
    expected = run(exact_kl, x, y, mask=mask)
    with Traffic():
        outputs = run(exact_kl, *(laid_out(z, memory) for z in (x, y)), mask=laid_out(mask, memory))
    for z, z_expected in zip(outputs, expected, strict=True):
        torch.testing.assert_close(z, z_expected)


def test_never_waits_for_the_device(device) -> None:
    tensors = [torch.randn(*s, device=device) for s in ((6, 8), (40, 8), (6, 5), (40, 5))]
    with no_host_sync():
        run(exact_kl, tensors[1], tensors[1] * 2)
        run_linear(linear_exact_kl, *tensors)


def test_replays_from_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    hidden, weight = torch.randn(50, 64, device=device), torch.randn(5000, 64, device=device)

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        linear = linear_exact_kl(hidden, weight, 2 * hidden.detach(), weight.detach())
        logits = hidden @ weight.t()
        exact = exact_kl(logits, 2 * logits.detach())
        return exact, linear, *torch.autograd.grad((exact + linear).sum(), (hidden, weight))

    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for x, y in zip(replayed(both, *leaves), both(*leaves), strict=True):
        assert torch.equal(x, y)


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(device) -> None:
    tensors = [6 * torch.randn(6, 20000, device=device).bfloat16() for _ in range(2)]
    batch = exact_kl(*tensors)
    assert torch.equal(batch, exact_kl(*tensors))
    for i in range(6):
        assert torch.equal(exact_kl(*(x[i : i + 1] for x in tensors)), batch[i : i + 1])


def test_closer_to_the_truth_than_pytorch(device) -> None:
    tensors = [(3 * torch.randn(50, 1000, device=device)).bfloat16() for _ in range(2)]
    outputs = run(exact_kl, *tensors), run(plain, *tensors), run(plain, *double(tensors))
    for x, y, z in zip(*outputs):
        assert (x - z).abs().mean() < (y - z).abs().mean()
        assert (x - z).abs().max() < (y - z).abs().max()


@DTYPES
@pytest.mark.parametrize("chunk", [2**30, 4 * 999])
def test_linear_as_exact_as_pytorch(chunk, dtype, device, assert_as_exact, monkeypatch) -> None:
    """At once and in pieces; a reference of another width.

    In pieces the logits of backward are rounded otherwise than those of forward, which shows in
    fp32: p times log p - log q - KL, of about 8, is off by some 1e-6 of itself.
    """
    monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", chunk)
    shapes = (2, 7, 24), (300, 24), (2, 7, 10), (300, 10)
    tensors = [(0.8 * torch.randn(*shape, device=device)).to(dtype) for shape in shapes]

    def plain_linear(hidden, weight, ref_hidden, ref_weight) -> Tensor:
        logits, ref_logits = hidden @ weight.t(), ref_hidden @ ref_weight.t()
        return reference.exact_kl(logits, ref_logits, temperature=1.3)

    ours = run_linear(linear_exact_kl, *tensors, temperature=1.3)
    theirs = run_linear(plain_linear, *tensors)
    for outputs in zip(ours, theirs, run_linear(plain_linear, *double(tensors)), strict=True):
        assert_as_exact(*outputs, floor=2e-5)


@pytest.mark.parametrize("chunk", [2**30, 4 * 999])
def test_linear_rows_of_all_products_are_aligned(chunk, device, monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", chunk)
    shapes = (14, 24), (301, 24), (14, 16), (301, 16)
    with Products() as products:
        run_linear(linear_exact_kl, *(torch.randn(*s, device=device) for s in shapes))
    assert_aligned(products.seen)


@IMPLEMENTATIONS
def test_linear_does_not_read_what_is_masked(ours, device, monkeypatch) -> None:
    monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", 4 * 300)
    tensors = [torch.randn(*s, device=device) for s in ((6, 8), (40, 8), (6, 5), (40, 5))]
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)

    def results(poison: float) -> list[Tensor]:
        poisoned = [x.clone() for x in tensors]
        for x in poisoned[::2]:
            x[mask == 0] = poison
        for x in poisoned[1::2]:
            x[33:] = poison
        return run_linear(ours.linear_exact_kl, *poisoned, mask=mask, vocab_size=33)

    for x, y in zip(results(1.0), results(torch.nan), strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:.*aot_eager.*")
def test_compiles_into_one_graph(device) -> None:
    tensors = [torch.randn(*s, device=device) for s in ((6, 8), (40, 8), (6, 5), (40, 5))]

    def both(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        logits, ref_logits = hidden @ weight.t(), ref_hidden @ ref_weight.t()
        linear = linear_exact_kl(hidden, weight, ref_hidden, ref_weight)
        return exact_kl(logits, ref_logits, temperature=0.7) + linear

    compiled = run_linear(torch.compile(both, backend="aot_eager", fullgraph=True), *tensors)
    eager = run_linear(both, *tensors)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_registered_as_pytorch_asks(device) -> None:
    x, y = (torch.randn(1, 3, 8, device=device) for _ in range(2))
    arguments = (x.requires_grad_(), y, None, 0.7, None, 8, None)
    torch.library.opcheck(module._exact_kl.registered, arguments)
    hidden, weight = torch.randn(3, 4, device=device), torch.randn(8, 4, device=device)
    arguments = (hidden.requires_grad_(), weight, hidden.detach(), weight, None, 0.7, None, 8, None)
    torch.library.opcheck(module._linear_exact_kl.registered, arguments)


def test_the_reference_is_a_constant(device) -> None:
    x, y = (torch.randn(3, 5, device=device, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="ref_logits requires grad"):
        exact_kl(x, y)


BAD = {
    "ref_logits has shape": {"ref_logits": torch.zeros(2, 6)},
    "mask has shape": {"mask": torch.zeros(3)},
    "temperature is 0": {"temperature": 0},
    "vocab_size is 0": {"vocab_size": 0},
    "logits has shape": {"logits": torch.zeros(2, 0), "ref_logits": torch.zeros(2, 0)},
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(ours, message) -> None:
    good = {"logits": torch.zeros(2, 5), "ref_logits": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=message):
        ours.exact_kl(**good | BAD[message])
    with pytest.raises(ValueError, match=r"ref_hidden @ ref_weight.T has shape \(2, 4\)"):
        zeros = torch.zeros
        ours.linear_exact_kl(zeros(2, 3), zeros(5, 3), zeros(2, 3), zeros(4, 3))


@pytest.mark.parametrize("ranks", SHARDS)
@IMPLEMENTATIONS
def test_vocabulary_split_over_ranks(ours, ranks, device, assert_as_exact) -> None:
    if device != "cpu":
        pytest.skip("the ranks are processes that share one CPU")
    hidden, weight, ref_hidden, ref_weight = tensors = [
        torch.randn(*s, device=device) for s in ((6, 8), (50, 8), (6, 5), (50, 5))
    ]
    options = {"vocab_size": 45, "temperature": 1.7}
    theirs = run_linear(reference.linear_exact_kl, *tensors, **options)
    truth = run_linear(reference.linear_exact_kl, *double(tensors), **options)
    logits, ref_logits = hidden @ weight.t(), ref_hidden @ ref_weight.t()
    whole = run(reference.exact_kl, logits, ref_logits, **options)
    exact = run(reference.exact_kl, logits.double(), ref_logits.double(), **options)

    def rank() -> list:
        start = sum(SHARDS[ranks][: dist.get_rank()])
        rows = slice(start, start + SHARDS[ranks][dist.get_rank()])
        split = {"vocab_start": start, "group": dist.group.WORLD, **options}
        weight[45:], ref_weight[45:] = torch.nan, torch.nan  # padding may hold anything
        gather = mock.patch.object(
            dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor
        )
        with gather as gather:
            outputs = run(ours.exact_kl, logits[:, rows], ref_logits[:, rows], **split)
        assert gather.call_count == (ours is module)
        outputs += run_linear(
            ours.linear_exact_kl, hidden, weight[rows], ref_hidden, ref_weight[rows], **split
        )
        return [x.tolist() for x in outputs]

    results = [[torch.tensor(y) for y in outputs] for outputs in run_world(ranks, rank)]
    for result in results:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[3], results[0][3])
    gradient = torch.cat([result[1] for result in results], -1)
    for outputs in zip([results[0][0], gradient], whole, exact, strict=True):
        assert_as_exact(*outputs)
    dweight = torch.cat([result[4] for result in results])
    for outputs in zip([*results[0][2:4], dweight], theirs, truth, strict=True):
        assert_as_exact(*outputs, floor=4e-6)
