import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from tests.forked_world import run_world
from tests.kernels import callers
from tests.kernels.callers import LAYOUTS as MEMORY
from tests.kernels.callers import laid_out, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tetrad.kernels import exact_kl, launch, linear_logprob, linear_loss, logprob, reference
from tetrad.kernels.logprob import token_logprobs

IMPLEMENTATIONS = pytest.mark.parametrize(
    "logprobs_of", [token_logprobs, reference.token_logprobs], ids=["kernel", "reference"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

# One column has probability 1; 7 is less than a block and 128 one block exactly; 1000 is no power
# of two; 70000 takes two splits, the second one of a whole block and a ragged one.
SHAPES = [((5,), 1), ((0,), 7), ((2, 0), 7), ((1, 2, 3, 1), 128), ((2, 3), 1000), ((2,), 70000)]
# 300 rows take three programs of _combine, the last one ragged.
SIZES = [(N, V) for N in (0, 1, 5, 300) for V in (1, 7, 128, 1000, 50257)]


def run(logprobs_of: Callable, logits: Tensor, tokens: Tensor, **options) -> list[Tensor]:
    """Log-probs, entropies, and the gradient of a sum of them with random weights."""
    weights = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(0))
    logits = logits.detach().requires_grad_()
    logprobs, entropy = logprobs_of(logits, tokens, entropy=True, **options)
    (weights[0].to(logprobs) * logprobs + weights[1].to(logprobs) * entropy).sum().backward()
    return [logprobs.detach(), entropy.detach(), logits.grad]


@pytest.fixture
def check(assert_as_exact) -> Callable[..., None]:
    def compare(logits: Tensor, tokens: Tensor, **options) -> None:
        kernel = run(token_logprobs, logits, tokens, **options)
        plain = run(reference.token_logprobs, logits, tokens, **options)
        truth = run(reference.token_logprobs, logits.double(), tokens, **options)
        for outputs in zip(kernel, plain, truth, strict=True):
            assert_as_exact(*outputs)

    return compare


@pytest.mark.parametrize("rows, V", SHAPES, ids=str)
@DTYPES
def test_matches_reference(rows, V, dtype, device, check) -> None:
    tokens = torch.randint(V, rows, device=device)
    check((4 * torch.randn(*rows, V, device=device)).to(dtype), tokens, temperature=1.3)


@pytest.mark.parametrize("N, V", SIZES, ids=str)
def test_any_size(N, V, device, assert_as_exact) -> None:
    logits = 3 * torch.randn(N, V, device=device)
    tokens = torch.randint(V, (N,), device=device)
    tokens[10:] = torch.where(torch.arange(N, device=device)[10:] % 8 == 0, tokens[10:], -100)

    def run(f, x) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = f(x, tokens)
        y.sum().backward()
        return y.detach(), x.grad

    outputs = (run(token_logprobs, logits), run(reference.token_logprobs, logits))
    for kernel, plain, truth in zip(*outputs, run(reference.token_logprobs, logits.double())):
        assert_as_exact(kernel, plain, truth)


@pytest.mark.parametrize("V", [3 * 4096, 3 * 4096 + 1, 17 * 4096 + 1], ids=str)
def test_the_token_in_any_block(V, device, check) -> None:
    """Its block comes after those that are whole, and before one that is not: none twice."""
    edges = [place for block in range(0, V, 4096) for place in (block - 1, block)]
    tokens = torch.tensor([place % V for place in edges], device=device)
    check(4 * torch.randn(len(tokens), V, device=device), tokens)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_call(data, device, assert_as_exact) -> None:
    """Shapes, strides, types, temperatures, padding and ignored tokens, as they come."""
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 9999)))
    batch = draw(strategies.lists(strategies.integers(0, 4), max_size=3))
    V = draw(strategies.integers(1, 300))
    dtype = draw(strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    base = 5 * torch.randn(*batch, V + 3, device=device)
    base[torch.rand_like(base) < draw(strategies.sampled_from([0.0, 0.3]))] = -torch.inf
    base[..., 1] = 0.5  # some column is possible
    logits = base.to(dtype)[..., 1 : V + 1]
    if len(batch) > 1 and draw(strategies.booleans()):
        logits = logits.transpose(0, 1)
    if draw(strategies.booleans()):
        logits = logits.flip(-1).mT.contiguous().mT if logits.dim() > 1 else logits
    vocab_size = draw(strategies.none() | strategies.integers(1, V))
    tokens = torch.randint(V if vocab_size is None else vocab_size, logits.shape[:-1])
    tokens = torch.where(torch.rand(tokens.shape) < 0.3, -100, tokens).to(device)
    if draw(strategies.booleans()):
        tokens = tokens.int()
    temperature = draw(strategies.floats(0.2, 5.0))
    if draw(strategies.booleans()):
        temperature = torch.rand(tokens.shape, device=device) + temperature
    if vocab_size is not None:  # and -inf for the rest
        logits = logits.clone()
        logits[..., 0] = 0.5
    chosen = logits.gather(-1, tokens.long().clamp(min=0)[..., None])[..., 0]
    tokens = torch.where(chosen.isfinite(), tokens, -100)
    options = {"temperature": temperature, "vocab_size": vocab_size}
    outputs = [
        run(f, x, tokens, **options)
        for f, x in (
            (token_logprobs, logits),
            (reference.token_logprobs, logits),
            (reference.token_logprobs, logits.double()),
        )
    ]
    for kernel, plain, truth in zip(*outputs):
        assert_as_exact(kernel, plain, truth)
    logprobs, entropy, _ = outputs[0]
    assert (logprobs <= 0).all()
    assert (entropy >= -1e-6).all() and (entropy <= math.log(V) + 1e-5).all()


@DTYPES
def test_without_entropy(dtype, device, assert_as_exact) -> None:
    logits = (4 * torch.randn(5, 1000, device=device)).to(dtype)
    tokens = torch.randint(1000, (5,), device=device, dtype=torch.int32)

    def run(f, x) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = f(x, tokens)
        y.sum().backward()  # an upstream gradient of stride 0
        return y.detach(), x.grad

    kernel = run(token_logprobs, logits)
    plain = run(reference.token_logprobs, logits)
    for outputs in zip(kernel, plain, run(reference.token_logprobs, logits.double()), strict=True):
        assert_as_exact(*outputs)


@IMPLEMENTATIONS
def test_by_hand(logprobs_of, device) -> None:
    """p = (1, 2, 5) / 8; at temperature 1/2 (1, 4, 25) / 30; without the last column (1, 2) / 3."""
    logits = torch.tensor([1.0, 2.0, 5.0], device=device).log().expand(4, 3)
    logits = logits.clone().requires_grad_()
    tokens = torch.tensor([2, 0, -100, 1], device=device)
    logprobs, entropy = logprobs_of(logits, tokens, entropy=True)
    H = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    expected = [math.log(5 / 8), math.log(1 / 8), 0.0, math.log(2 / 8)]
    torch.testing.assert_close(logprobs.tolist(), expected)
    torch.testing.assert_close(entropy.tolist(), [H, H, 0.0, H])

    (logprobs.sum() + entropy[3]).backward()
    rows = [
        [-1 / 8, -2 / 8, 3 / 8],
        [7 / 8, -2 / 8, -5 / 8],
        [0.0, 0.0, 0.0],
        [-1 / 8, 6 / 8, -5 / 8],
    ]
    for j, p in enumerate((1 / 8, 2 / 8, 5 / 8)):
        rows[3][j] -= p * (math.log(p) + H)
    torch.testing.assert_close(logits.grad, torch.tensor(rows, device=device))

    cooler = logprobs_of(logits, tokens, temperature=0.5)
    expected = [math.log(25 / 30), math.log(1 / 30), 0.0, math.log(4 / 30)]
    torch.testing.assert_close(cooler.tolist(), expected)
    logits.grad = None
    cooler[0].backward()
    expected = torch.tensor([-2 / 30, -8 / 30, 10 / 30], device=device)
    torch.testing.assert_close(logits.grad[0], expected)

    narrower = logprobs_of(logits, tokens, vocab_size=2)
    expected = [-math.inf, math.log(1 / 3), 0.0, math.log(2 / 3)]
    torch.testing.assert_close(narrower.tolist(), expected)


def test_gradients_of_the_reference() -> None:
    tokens = torch.tensor([[0, 4], [-100, 2]])
    logits = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    options = {"temperature": 0.7, "entropy": True, "vocab_size": 5}
    assert torch.autograd.gradcheck(
        lambda x: reference.token_logprobs(x, tokens, **options), logits
    )


@IMPLEMENTATIONS
def test_what_is_ignored_is_not_read(logprobs_of, device) -> None:
    """NaN in ignored rows, padding columns, their temperature and upstream gradient: no change."""
    clean = torch.randn(6, 40, device=device)
    tokens = torch.tensor([3, -1, 30, 0, -1, 32], device=device)
    ignored = tokens == -1
    temperature = torch.rand(6, device=device) + 0.5
    poisoned = clean.clone()
    poisoned[ignored] = torch.nan
    poisoned[:, 33:] = torch.nan
    nan_where_ignored = torch.where(ignored, torch.nan, 1.0)

    def run(x: Tensor, noise: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        outputs = logprobs_of(
            x, tokens, temperature=temperature * noise, entropy=True, ignore_index=-1, vocab_size=33
        )
        torch.autograd.backward(outputs, [2.0 * noise, -1.0 * noise])
        return [*(y.detach() for y in outputs), x.grad]

    expected = run(clean, torch.ones(6, device=device))
    for y, y_expected in zip(run(poisoned, nan_where_ignored), expected, strict=True):
        assert torch.equal(y, y_expected)
        assert (y[ignored] == 0).all() and (y[~ignored] != 0).any()
    assert (expected[2][:, 33:] == 0).all()


LAYOUTS = {
    "slice of columns": lambda x: x.view(6, 40)[:, 3:24],
    "slice of time": lambda x: x.view(2, 6, 20)[:, :-1],
    "transposed": lambda x: x.view(20, 12).t(),
    "every second column": lambda x: x.view(6, 40)[:, ::2],
    "rows that overlap": lambda x: x[:40].unfold(0, 8, 1),
    "expanded": lambda x: x[:20].expand(2, 3, 20),
    "four dimensions": lambda x: x.view(2, 3, 2, 20).transpose(0, 2)[:, :2],
    "logits (V,), one token": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, device, assert_as_exact) -> None:
    base = torch.randn(240, device=device)
    before = base.clone()
    logits = LAYOUTS[layout](base)
    tokens = torch.randint(logits.shape[-1], logits.shape[:-1], device=device)
    temperature = torch.tensor(0.8, device=device)  # broadcast

    def run(f, x) -> list[Tensor]:
        x = x.detach().requires_grad_()
        outputs = f(LAYOUTS[layout](x), tokens, temperature=temperature)
        outputs.sum().backward()
        return [outputs.detach(), x.grad]

    kernel, plain = run(token_logprobs, base), run(reference.token_logprobs, base)
    truth = run(reference.token_logprobs, base.double())
    for outputs in zip(kernel, plain, truth, strict=True):
        assert_as_exact(*outputs)
    assert torch.equal(base, before)


@pytest.mark.parametrize("apart, start, V", [(40, 0, 33), (45, 0, 40), (48, 3, 40)], ids=str)
def test_rows_that_only_seem_aligned(apart, start, V, device, check) -> None:
    """40 columns of which 33 count; rows 45 apart; rows that begin 3 elements into 48."""
    logits = torch.randn(4, apart, device=device)[:, start : start + 40]
    check(logits, torch.tensor([0, V - 1, 20, -100], device=device), vocab_size=V)


def test_offsets_beyond_32_bits(device) -> None:
    """Pages that are not touched cost nothing: the storage may be larger than the memory."""
    if device != "cpu":
        pytest.skip("a GPU would commit the memory")
    storage = torch.UntypedStorage(2 * (2**31 + 2**20))
    tokens = torch.tensor([1, 2, 0])
    for strides in (2**30 + 16, 1), (1, 2**30 + 16):
        logits = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (3, 3), strides).normal_()
        outputs = run(token_logprobs, logits, tokens)
        for y, expected in zip(outputs, run(token_logprobs, logits.clone(), tokens), strict=True):
            assert torch.equal(y, expected)


@DTYPES
def test_extreme_logits(dtype, device, check) -> None:
    """Rows whose exp overflows, far off 0, that are certain, that rule out most columns."""
    logits = torch.randn(5, 300, device=device).to(dtype)
    logits[0] *= 1e4
    logits[1] -= 3e4
    logits[2, 17] = 500.0
    logits[3, :200] = -torch.inf  # the first GROUPs of columns see nothing but -inf
    logits[4, 5:] = -torch.inf
    tokens = torch.tensor([int(logits[0].argmax()), 0, 17, 250, 2], device=device)
    check(logits, tokens)
    check(logits, tokens, temperature=0.1)


@IMPLEMENTATIONS
def test_confident_tokens_keep_their_digits(logprobs_of, device) -> None:
    """log p = -log1p(6 e^-m) and 1 - p, relatively exact though p rounds to 1 from m = 18 on."""
    margins = torch.tensor([1.0, 10.0, 18.0, 30.0, 60.0], device=device)
    logits = torch.zeros(5, 7, device=device)
    logits[:, 3] = margins
    logits.requires_grad_()
    logprobs = logprobs_of(logits, torch.full((5,), 3, device=device))
    rest = 6 * torch.exp(-margins.double())
    torch.testing.assert_close(logprobs.double(), -rest.log1p(), rtol=3e-6, atol=0)
    logprobs.sum().backward()
    expected = rest / (1 + rest)
    torch.testing.assert_close(logits.grad[:, 3].double(), expected, rtol=3e-6, atol=0)


def test_closer_to_the_truth_than_pytorch(device) -> None:
    """For bf16 logits: PyTorch rounds the log-softmax and its gradient's factors to bf16."""
    logits = (3 * torch.randn(64, 1000, device=device)).bfloat16()
    tokens = torch.randint(1000, (64,), device=device)

    def run(f, x) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = f(x)
        y.backward(torch.ones_like(y))
        return y.detach().double(), x.grad.double()

    ours = run(lambda x: token_logprobs(x, tokens), logits)
    plain = run(lambda x: x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], logits)
    truth = run(lambda x: x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], logits.double())
    for x, y, z in zip(ours, plain, truth):
        assert (x - z).abs().mean() < (y - z).abs().mean()
    errors = [(x - z).abs().max() for x, z in zip(ours, truth)]
    plainly = [(y - z).abs().max() for y, z in zip(plain, truth)]
    assert errors[0] < plainly[0]
    # the gradient is rounded to bf16 at the end: half a unit of its largest element errs alike
    assert errors[1] <= plainly[1]


def test_invariants(device) -> None:
    logits = 4 * torch.randn(20, 999, device=device)
    tokens = torch.randint(999, (20,), device=device)
    logprobs, entropy, _ = run(token_logprobs, logits, tokens)
    x = logits.clone().requires_grad_()
    token_logprobs(x, tokens).sum().backward()
    assert x.grad.double().sum(-1).abs().max() < 1e-6  # a shift of all logits changes nothing
    shifted = run(token_logprobs, logits + 100, tokens)
    torch.testing.assert_close(shifted[0], logprobs, rtol=0, atol=2e-5)  # 100 + x is rounded
    order = torch.randperm(999, device=device)
    moved = run(token_logprobs, logits[:, order], order.argsort()[tokens])
    torch.testing.assert_close(moved[0], logprobs, rtol=0, atol=4e-6)
    torch.testing.assert_close(moved[1], entropy, rtol=0, atol=4e-6)


@pytest.mark.parametrize("row", ["nothing possible", "+inf", "nan"])
def test_rows_without_a_softmax_are_nan_as_in_pytorch(row, device) -> None:
    logits = torch.randn(2, 300, device=device)
    if row == "nothing possible":
        logits[0] = -torch.inf
    else:
        logits[0, 5] = torch.inf if row == "+inf" else torch.nan
    tokens = torch.tensor([5, 5], device=device)
    ours = token_logprobs(logits, tokens)
    assert ours.isnan().tolist() == logits.log_softmax(-1)[:, 5].isnan().tolist() == [True, False]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("token", [5, 6])
@pytest.mark.parametrize("entropy", [False, True])
@IMPLEMENTATIONS
def test_what_is_no_logit_reaches_every_result_of_its_row(
    logprobs_of, entropy, token, bad, device
) -> None:
    """As the token's own logit or another's; not the padding, and not what is ignored."""
    logits = torch.randn(3, 45, device=device)
    logits[:, 5] = bad
    logits[1, 5] = 0.0
    logits.requires_grad_()
    tokens = torch.tensor([token, token, -100], device=device)
    outputs = logprobs_of(logits, tokens, entropy=entropy, vocab_size=40)
    outputs = outputs if entropy else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for y in outputs:
        assert y[0].isnan() and y[1].isfinite() and y[2] == 0
    assert logits.grad[0, :40].isnan().all() and (logits.grad[:, 40:] == 0).all()
    assert logits.grad[1].isfinite().all() and (logits.grad[2] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("room", [linear_logprob, reference], ids=["kernel", "reference"])
def test_what_is_no_logit_reaches_the_linear_op(room, bad, device) -> None:
    hidden = torch.randn(2, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    bias = torch.zeros(40, device=device)
    bias[5] = bad
    tokens = torch.tensor([6, -100], device=device)
    logprobs = room.linear_token_logprobs(hidden, weight, tokens, bias=bias)
    logprobs.sum().backward()
    with torch.no_grad():
        fused = room.linear_token_logprobs(hidden, weight, tokens, bias=bias)
    for y in logprobs, fused:
        assert y[0].isnan() and y[1] == 0
    assert hidden.grad[0].isnan().all() and (hidden.grad[1] == 0).all()
    assert weight.grad.isnan().all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("room", [linear_loss, reference], ids=["kernel", "reference"])
def test_what_is_no_logit_reaches_the_policy_loss(room, advantage, bad, device) -> None:
    """Neither side of the clip drops it."""
    hidden = torch.randn(2, 8, device=device, requires_grad=True)
    weight = torch.randn(40, 8, device=device, requires_grad=True)
    bias = torch.zeros(40, device=device)
    bias[5] = bad
    loss, _ = room.linear_policy_loss(
        hidden, weight, torch.tensor([6, 7], device=device), torch.zeros(2, device=device),
        torch.full((2,), advantage, device=device), torch.tensor([True, False], device=device),
        bias=bias,
    )  # fmt: skip
    loss.backward()
    assert loss.isnan() and hidden.grad[0].isnan().all() and weight.grad.isnan().all()
    assert (hidden.grad[1] == 0).all()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("side", [0, 1], ids=["logits", "ref_logits"])
@pytest.mark.parametrize("room", [exact_kl, reference], ids=["kernel", "reference"])
def test_what_is_no_logit_reaches_the_exact_kl(room, side, bad, device) -> None:
    pair = torch.randn(2, 3, 45, device=device)
    pair[side, ::2, 5] = bad
    logits = pair[0].clone().requires_grad_()
    mask = torch.tensor([1, 1, 0], device=device)
    kl = room.exact_kl(logits, pair[1], mask=mask, vocab_size=40)
    kl.sum().backward()
    assert kl[0].isnan() and kl[1].isfinite() and kl[2] == 0
    assert logits.grad[0, :40].isnan().all() and (logits.grad[:, 40:] == 0).all()
    assert logits.grad[1].isfinite().all() and (logits.grad[2] == 0).all()


def test_inplace_backward_writes_over_the_logits(device) -> None:
    base = torch.randn(3, 40, device=device)
    tokens = torch.tensor([1, -100, 39], device=device)
    expected = base.clone().requires_grad_()
    token_logprobs(expected, tokens).sum().backward()
    logits = base.clone().requires_grad_()
    computed = logits * 1.0
    token_logprobs(computed, tokens, inplace_backward=True).sum().backward()
    assert torch.equal(computed.detach(), expected.grad)
    assert torch.equal(logits.grad, expected.grad)
    for bad in logits, computed[:1].expand(3, 40), computed[0].unfold(0, 38, 1):
        with pytest.raises(ValueError, match="inplace_backward"):
            token_logprobs(bad, tokens, inplace_backward=True)


def test_logits_written_over_are_not_read_again(device) -> None:
    """PyTorch sees the write: neither a second backward nor a producer gets wrong numbers."""
    x = torch.randn(3, 40, device=device, requires_grad=True)
    tokens = torch.tensor([1, -100, 39], device=device)
    total = token_logprobs(x * 1.0, tokens, inplace_backward=True).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    total = token_logprobs(x.sigmoid(), tokens, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.filterwarnings("ignore:.*aot_eager.*")
def test_compiles_into_one_graph(device) -> None:
    tokens = torch.tensor([[1, -100, 3]], device=device)

    def loss(x: Tensor) -> Tensor:
        logprobs, entropy = token_logprobs(2 * x[:, :-1], tokens, entropy=True, temperature=0.7)
        return (logprobs + 0.1 * entropy).sum()

    x = torch.randn(1, 4, 40, device=device, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(x)
    compiled.backward()
    loss(y).backward()
    assert torch.equal(compiled, loss(y)) and torch.equal(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore:.*aot_eager.*")
def test_other_lengths_compile_once_more_at_most(device) -> None:
    """The first other length makes the number of rows dynamic; ragged batches stop there."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x, y: token_logprobs(x, y).sum(), backend=counter, fullgraph=True)
    for n in 5, 7, 9, 12:
        x = torch.randn(n, 40, device=device, requires_grad=True)
        f(x, torch.zeros(n, dtype=torch.long, device=device)).backward()
    assert counter.frame_count <= 2


def test_registered_as_pytorch_asks(device) -> None:
    x = torch.randn(1, 3, 8, device=device, requires_grad=True)
    tokens = torch.tensor([1, -100, 3], device=device)
    arguments = (x, tokens, 0.7, None, True, -100, 0, 8, None, False)
    torch.library.opcheck(logprob._token_logprobs.registered, arguments)


@pytest.mark.parametrize("memory", MEMORY)
def test_stays_inside_its_inputs(memory, device) -> None:
    """Up to the end of an allocation, not aligned, between NaN: Traffic stops any other access."""
    if device != "cpu":
        pytest.skip("accesses are watched in the interpreter")
    logits, tokens = torch.randn(5, 13), torch.tensor([1, 2, -100, 0, 12])
    temperature = torch.rand(5) + 0.5
    expected = run(token_logprobs, logits, tokens, temperature=temperature)
    with Traffic():
        outputs = run(
            token_logprobs, laid_out(logits, memory), laid_out(tokens, memory),
            temperature=laid_out(temperature, memory),
        )  # fmt: skip
    for y, y_expected in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, y_expected)


def test_never_waits_for_the_device(device) -> None:
    logits, tokens = torch.randn(5, 13, device=device), torch.tensor([1, 2, -100, 0, 12])
    logits.requires_grad_()
    with no_host_sync():
        logprobs, entropy = token_logprobs(logits, tokens.to(device), entropy=True)
        (logprobs + entropy).sum().backward()


def test_replays_from_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    logits = torch.randn(5, 5000, device=device, requires_grad=True)
    tokens = torch.randint(5000, (5,), device=device)

    def both(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logprobs, entropy = token_logprobs(logits, tokens, entropy=True)
        return logprobs, entropy, *torch.autograd.grad((logprobs + entropy).sum(), logits)

    for x, y in zip(replayed(both, logits, tokens), both(logits, tokens), strict=True):
        assert torch.equal(x, y)


def test_autocast_changes_nothing(device) -> None:
    logits, tokens = torch.randn(4, 40, device=device), torch.tensor([1, 2, -100, 3], device=device)
    expected = run(token_logprobs, logits, tokens)
    with torch.autocast(device, dtype=torch.bfloat16):
        outputs = run(token_logprobs, logits, tokens)
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected))


@IMPLEMENTATIONS
def test_tokens_outside_the_vocabulary_have_probability_zero(logprobs_of, device) -> None:
    tokens = torch.tensor([-1, 8, 9, 2**31 - 1, -100], device=device)
    logits = torch.randn(5, 9, device=device, requires_grad=True)
    logprobs = logprobs_of(logits, tokens, vocab_size=8)
    assert (logprobs[:4] == -torch.inf).all() and logprobs[4] == 0
    logprobs.sum().backward()
    p = logits.detach()[:4, :8].softmax(-1)
    torch.testing.assert_close(logits.grad[:4], torch.nn.functional.pad(-p, (0, 1)))


def test_nan_stays_in_its_row(device) -> None:
    logits = torch.randn(3, 300, device=device)
    tokens = torch.tensor([0, 1, 2], device=device)
    clean = run(token_logprobs, logits, tokens)
    logits[1, 7] = torch.nan
    for y, expected in zip(run(token_logprobs, logits, tokens), clean, strict=True):
        assert y[1].isnan().all() and torch.equal(y[0::2], expected[0::2])


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(device) -> None:
    logits = 6 * torch.randn(6, 20000, device=device).bfloat16()
    tokens = logits.argmax(-1)  # near log 1 the last bits of the sum show
    batch, again = (run(token_logprobs, logits, tokens) for _ in range(2))
    temperatures = torch.ones(6, device=device)
    per_token = run(token_logprobs, logits, tokens, temperature=temperatures)
    for y, y_again, y_per_token in zip(batch, again, per_token, strict=True):
        assert torch.equal(y, y_again) and torch.equal(y, y_per_token)
    for i in range(6):  # not the gradients: their random weights depend on the batch
        logprobs, entropy, _ = run(token_logprobs, logits[i : i + 1], tokens[i : i + 1])
        assert torch.equal(logprobs, batch[0][i : i + 1])
        assert torch.equal(entropy, batch[1][i : i + 1])


def test_moves_no_more_than_it_must(device) -> None:
    if device != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    n_padding, V = 24, 1000
    logits = torch.randn(2, 4, V + n_padding, dtype=torch.bfloat16)[:, :3].requires_grad_()
    tokens = torch.tensor([[5, -100, 999], [0, 7, 500]])
    counted = tokens != -100
    with Traffic() as forward:
        logprobs, entropy = token_logprobs(logits, tokens, entropy=True, vocab_size=V)
    expected = counted[..., None] & (torch.arange(V + n_padding) < V)
    expected = expected.int()
    expected[counted] += torch.nn.functional.one_hot(tokens[counted], V + n_padding).int()
    assert torch.equal(forward.reads(logits), expected)  # the target once more
    floor = counted.sum().item() * V * logits.element_size()
    assert floor < forward.bytes_read < 1.03 * floor and forward.bytes_written < 0.03 * floor

    with Traffic() as backward:
        (logprobs + entropy)[0].sum().backward()  # the second sequence gets no gradient
    reads = backward.reads(logits)
    assert (reads[0, 0::2, :V] == 1).all() and reads.sum() == 2 * V
    assert (backward.writes(logits.grad) == 1).all()
    assert backward.bytes_written == logits.numel() * logits.element_size()


def test_runs_the_reference_where_no_kernel_runs(device, monkeypatch) -> None:
    logits, tokens = torch.randn(3, 20, dtype=torch.float64), torch.tensor([1, 2, 3])
    with mock.patch.object(reference, "token_logprobs", return_value="reference"):
        assert token_logprobs(logits.to(device), tokens.to(device)) == "reference"
        monkeypatch.setattr(launch, "INTERPRETED", False)
        assert token_logprobs(logits.float(), tokens) == "reference"


BAD = {
    "tokens has shape": {"tokens": torch.zeros(3, dtype=torch.long)},
    "no column": {"logits": torch.zeros(2, 0)},
    "logits must be floating point": {"logits": torch.zeros(2, 5, dtype=torch.long)},
    "tokens must be int32 or int64": {"tokens": torch.zeros(2)},
    "tokens are on meta": {"tokens": torch.zeros(2, dtype=torch.long, device="meta")},
    "temperature is 0": {"temperature": 0},
    "temperature is nan": {"temperature": math.nan},
    "temperature is on meta": {"temperature": torch.ones(2, device="meta")},
    "temperature has shape": {"temperature": torch.ones(3)},
    "temperature requires a gradient": {"temperature": torch.ones(2, requires_grad=True)},
    "vocab_start is -1": {"vocab_start": -1},
    "vocab_size is 0": {"vocab_size": 0},
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(logprobs_of, message) -> None:
    good = {"logits": torch.zeros(2, 5), "tokens": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        logprobs_of(**good | BAD[message])


SHARDS = {1: [50]} | callers.SHARDS


@pytest.mark.parametrize("ranks", SHARDS)
@IMPLEMENTATIONS
def test_vocabulary_split_over_ranks(logprobs_of, ranks, device, assert_as_exact) -> None:
    if device != "cpu":
        pytest.skip("the ranks are processes that share one CPU")
    logits = 4 * torch.randn(2, 3, 50)
    logits[..., 45:] = torch.nan
    logits[1, 0, 20:] = -torch.inf  # nothing on the other shards
    tokens = torch.tensor([[0, 44, 21], [19, -100, 36]])
    options = {"vocab_size": 45, "temperature": 1.7}
    plain = run(reference.token_logprobs, logits, tokens, **options)
    truth = run(reference.token_logprobs, logits.double(), tokens, **options)

    def rank() -> list:
        starts = [sum(SHARDS[ranks][:i]) for i in range(ranks)]
        start, width = starts[dist.get_rank()], SHARDS[ranks][dist.get_rank()]
        shard = logits[..., start : start + width]
        group = dist.group.WORLD
        gather = mock.patch.object(
            dist, "all_gather_into_tensor", wraps=dist.all_gather_into_tensor
        )
        with gather as gather:
            outputs = run(logprobs_of, shard, tokens, **options, vocab_start=start, group=group)
        assert gather.call_count == (logprobs_of is token_logprobs)
        return [y.tolist() for y in outputs]

    results = [[torch.tensor(y) for y in outputs] for outputs in run_world(ranks, rank)]
    for result in results:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
    gradient = torch.cat([result[2] for result in results], -1)
    for outputs in zip([*results[0][:2], gradient], plain, truth, strict=True):
        assert_as_exact(*outputs)
