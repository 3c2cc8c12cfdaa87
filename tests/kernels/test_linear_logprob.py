from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies
from torch import Tensor

from tests.forked_world import run_world
from tests.kernels.callers import SHARDS, laid_out, no_host_sync, replayed
from tests.kernels.traffic import Traffic
from tests.products import Products, assert_aligned
from tetrad.kernels import linear_logprob, reference
from tetrad.kernels.linear_logprob import linear_token_logprobs

IMPLEMENTATIONS = pytest.mark.parametrize(
    "logprobs_of",
    [linear_token_logprobs, reference.linear_token_logprobs],
    ids=["kernel", "reference"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def inputs(N: int, V: int, d: int, device: str, dtype=torch.float32) -> list[Tensor]:
    """hidden, weight, bias whose logits have a deviation of about 3; tokens, some to be ignored."""
    hidden = torch.randn(N, d, device=device).to(dtype)
    weight = (3 / d**0.5 * torch.randn(V, d, device=device)).to(dtype)
    bias = torch.randn(V, device=device).to(dtype)
    tokens = torch.randint(V, (N,), device=device)
    tokens[2::5] = -100
    return [hidden, weight, bias, tokens]


def run(
    f: Callable, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, **options
):
    """Log-probs, entropies, and the gradients of a sum of them with random weights."""
    factors = torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(0))
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    options |= {"bias": leaves[2]} if bias is not None else {}
    logprobs, entropy = f(leaves[0], leaves[1], tokens, entropy=True, **options)
    (factors[0].to(logprobs) * logprobs + factors[1].to(logprobs) * entropy).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(x.grad for x in leaves)]


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor, *, bias=None, **options):
    """What a trainer writes: logits in the inputs' type."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return reference.token_logprobs(logits, tokens, **options)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch) -> None:
    """Without a gradient `_fused` runs, however many rows there are."""
    monkeypatch.setattr(linear_logprob, "FUSED_ROWS", 10**6)


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch) -> Iterator[None]:
    """At once, and in pieces that divide neither the rows nor the columns, then also without a
    gradient."""
    if request.param == "pieces":
        monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", 4 * 999)
        monkeypatch.setattr(linear_logprob, "FUSED_ROWS", 0)
    yield


@DTYPES
@pytest.mark.parametrize("save_logits", [False, True])
def test_as_exact_as_pytorch(dtype, save_logits, pieces, device, assert_as_exact) -> None:
    arguments = inputs(13, 300, 24, device, dtype)
    options = {"temperature": 1.3, "vocab_size": 290}
    arguments[3] = arguments[3].clamp(max=289)
    ours = run(linear_token_logprobs, *arguments, **options, save_logits=save_logits)
    theirs = run(plain, *arguments, **options)
    truth = run(plain, *(x.double() if x.is_floating_point() else x for x in arguments), **options)
    for outputs in zip(ours, theirs, truth, strict=True):
        assert_as_exact(*outputs, floor=4e-6)


@DTYPES
@pytest.mark.parametrize("N, V, d", [(1, 1, 1), (0, 7, 8), (5, 1000, 33), (130, 129, 64)], ids=str)
def test_without_a_gradient(N, V, d, dtype, pieces, device, assert_as_exact) -> None:
    """One column; no row; an odd depth; 130 rows and 129 columns reach into second tiles."""
    hidden, weight, bias, tokens = inputs(N, V, d, device, dtype)
    temperature = torch.rand(N, device=device) + 0.5

    def run(f, *tensors) -> tuple[Tensor, Tensor]:
        hidden, weight, bias = tensors
        return f(hidden, weight, tokens, bias=bias, entropy=True, temperature=temperature)

    ours = run(linear_token_logprobs, hidden, weight, bias)
    theirs = run(plain, hidden, weight, bias)
    for outputs in zip(ours, theirs, run(plain, hidden.double(), weight.double(), bias.double())):
        assert_as_exact(*outputs, floor=4e-6)


@pytest.mark.parametrize("splits", [3, 128], ids=str)  # of six tiles of 64 columns, and of one
def test_several_splits_of_the_vocabulary(splits, device, monkeypatch, assert_as_exact) -> None:
    monkeypatch.setattr(linear_logprob, "SPLITS", splits)
    hidden, weight, _, tokens = inputs(5, 1000, 16, device)
    ours = linear_token_logprobs(hidden, weight, tokens)
    truth = plain(hidden.double(), weight.double(), tokens)
    assert_as_exact(ours, plain(hidden, weight, tokens), truth)


def test_many_rows(device, assert_as_exact) -> None:
    """20 tiles of 64 rows: 16 that take the three splits together, and four that follow."""
    hidden, weight, _, tokens = inputs(1230, 130, 16, device)
    ours = linear_token_logprobs(hidden, weight, tokens)
    truth = plain(hidden.double(), weight.double(), tokens)
    assert_as_exact(ours, plain(hidden, weight, tokens), truth)


@IMPLEMENTATIONS
def test_by_hand(logprobs_of, device) -> None:
    """logits log(1, 2, 5): p = (1, 2, 5) / 8. d(log p_2) / dlogits = (-1, -2, 3) / 8."""
    hidden = torch.tensor([[1.0, 1.0]], device=device, requires_grad=True)
    logs = torch.tensor([1.0, 2.0, 5.0], device=device).log()
    weight = torch.stack([logs - 1, torch.ones_like(logs)], -1).requires_grad_()
    for options in {}, {"save_logits": True}:
        hidden.grad = weight.grad = None
        logprobs = logprobs_of(hidden, weight, torch.tensor([2], device=device), **options)
        torch.testing.assert_close(logprobs.exp().tolist(), [5 / 8])
        logprobs.backward()
        dlogits = torch.tensor([-1 / 8, -2 / 8, 3 / 8], device=device)
        torch.testing.assert_close(weight.grad, dlogits[:, None].expand(3, 2))
        torch.testing.assert_close(hidden.grad[0, 0], dlogits @ (logs - 1))
        torch.testing.assert_close(hidden.grad[0, 1].item(), 0.0, atol=1e-6, rtol=0)


def test_gradients_of_the_reference() -> None:
    hidden, weight, bias, tokens = (x[:6] for x in inputs(6, 6, 3, "cpu", torch.float64))
    tensors = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: reference.linear_token_logprobs(
            h, w, tokens, bias=b, entropy=True, temperature=0.7, vocab_size=6
        ),
        tensors,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=strategies.data())
def test_any_call(data, device, assert_as_exact) -> None:
    draw = data.draw
    torch.manual_seed(draw(strategies.integers(0, 9999)))
    batch = draw(strategies.lists(strategies.integers(0, 4), max_size=3))
    V, d = draw(strategies.integers(1, 200)), draw(strategies.integers(1, 40))
    dtype = draw(strategies.sampled_from([torch.float32, torch.bfloat16]))
    hidden = torch.randn(*batch, 2 * d, device=device).to(dtype)
    hidden = hidden[..., ::2] if draw(strategies.booleans()) else hidden[..., :d]
    if len(batch) > 1 and draw(strategies.booleans()):
        hidden = hidden.transpose(0, 1)
    weight = torch.randn(V, d, device=device).to(dtype)
    if draw(strategies.booleans()):
        weight = weight.t().contiguous().t()
    bias = torch.randn(V, device=device).to(dtype) if draw(strategies.booleans()) else None
    vocab_size = draw(strategies.none() | strategies.integers(1, V))
    tokens = torch.randint(V if vocab_size is None else vocab_size, hidden.shape[:-1])
    tokens = torch.where(torch.rand(tokens.shape) < 0.3, -7, tokens).to(device)
    temperature = draw(strategies.floats(0.3, 4.0))
    if draw(strategies.booleans()):
        temperature = torch.rand(tokens.shape, device=device) + temperature
    options = {"temperature": temperature, "vocab_size": vocab_size, "ignore_index": -7}
    save_logits = draw(strategies.booleans())
    chunk = draw(strategies.sampled_from([2**30, 4 * 333]))
    with mock.patch.object(linear_logprob, "CHUNK_BYTES", chunk):
        ours = run(
            linear_token_logprobs, hidden, weight, bias, tokens, **options, save_logits=save_logits
        )
    theirs = run(plain, hidden, weight, bias, tokens, **options)
    wide = (None if x is None else x.double() for x in (hidden, weight, bias))
    for outputs in zip(ours, theirs, run(plain, *wide, tokens, **options), strict=True):
        assert_as_exact(*outputs, floor=1e-5)
    with torch.no_grad():
        fused = linear_token_logprobs(hidden, weight, tokens, bias=bias, **options)
    torch.testing.assert_close(fused, ours[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("with_gradient", [False, True])
@IMPLEMENTATIONS
def test_what_is_ignored_is_not_read(logprobs_of, with_gradient, pieces, device) -> None:
    """NaN in hidden rows to be ignored, in weight and bias of padding: the same bits."""
    hidden, weight, bias, tokens = inputs(13, 40, 8, device)
    tokens.clamp_(max=32)

    def results(poison: float) -> list[Tensor]:
        h, w, b = hidden.clone(), weight.clone(), bias.clone()
        h[tokens == -100] = poison
        w[33:], b[33:] = poison, poison
        if with_gradient:
            return run(logprobs_of, h, w, b, tokens, vocab_size=33)
        with torch.no_grad():
            return [logprobs_of(h, w, tokens, bias=b, vocab_size=33)]

    clean, poisoned = results(1.0), results(torch.nan)
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned, strict=True))
    assert all(x.isfinite().all() for x in clean)


def test_closer_to_the_truth_than_pytorch(device) -> None:
    """bf16 inputs: logits of PyTorch are rounded, ours are not."""
    hidden, weight, bias, tokens = inputs(100, 500, 64, device, torch.bfloat16)
    wide = [x.double() for x in (hidden, weight, bias)]
    ours = run(linear_token_logprobs, hidden, weight, bias, tokens)
    theirs = run(plain, hidden, weight, bias, tokens)
    with torch.no_grad():
        fused = linear_token_logprobs(hidden, weight, tokens, bias=bias)
    truth = run(plain, *wide, tokens)
    for x, y, z in zip([*ours, fused], [*theirs, theirs[0]], [*truth, truth[0]]):
        assert (x - z).abs().mean() < (y - z).abs().mean()
    assert (ours[0] - truth[0]).abs().max() < 0.01 * (theirs[0] - truth[0]).abs().max()


def test_many_rows_have_the_same_bits_with_a_gradient_and_without(device, monkeypatch) -> None:
    """Log-probs that are scored and then learned from, in the same batch: a ratio of exactly 1."""
    hidden, weight, bias, tokens = inputs(9, 300, 16, device, torch.bfloat16)
    learned = linear_token_logprobs(hidden.requires_grad_(), weight, tokens, bias=bias)
    with torch.no_grad():
        few = linear_token_logprobs(hidden, weight, tokens, bias=bias)
        monkeypatch.setattr(linear_logprob, "FUSED_ROWS", 8)
        with Traffic() as traffic:
            many = linear_token_logprobs(hidden, weight, tokens, bias=bias)
    assert torch.equal(many, learned.detach()) and "_fused" not in traffic.launches
    torch.testing.assert_close(few, many, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(device) -> None:
    """Few rows without a gradient: one kernel, and no library that chooses tiles by the batch."""
    hidden, weight, _, tokens = inputs(150, 300, 32, device, torch.bfloat16)
    batch, again = (linear_token_logprobs(hidden, weight, tokens) for _ in range(2))
    assert torch.equal(batch, again)
    for i in 0, 140:
        assert torch.equal(
            linear_token_logprobs(hidden[i : i + 1], weight, tokens[i : i + 1])[0], batch[i]
        )


def test_moves_no_more_than_it_must(device) -> None:
    if device != "cpu":
        pytest.skip("traffic is counted in the interpreter")
    hidden, weight, _, tokens = inputs(200, 129, 48, device, torch.bfloat16)
    tokens[:128] = -100  # all rows of the first program
    with Traffic() as traffic:
        linear_token_logprobs(hidden, weight, tokens)
    reads = traffic.reads(hidden)
    assert (reads[tokens == -100] == 0).all()
    assert (reads[tokens != -100] == 2).all()  # once per tile of columns
    assert (traffic.reads(weight) == 1).all()  # once per program of rows


@pytest.mark.parametrize("memory", ["end", "transposed", "sliced"])
def test_stays_inside_its_inputs(memory, device) -> None:
    """Up to the end of an allocation, not aligned, between NaN: Traffic stops any other access."""
    if device != "cpu":
        pytest.skip("accesses are watched in the interpreter")
    hidden, weight, bias, tokens = inputs(5, 13, 7, device)
    expected = linear_token_logprobs(hidden, weight, tokens, bias=bias)
    with Traffic():
        hidden, weight, tokens = (laid_out(x, memory) for x in (hidden, weight, tokens))
        outputs = linear_token_logprobs(hidden, weight, tokens, bias=bias)
    assert torch.equal(outputs, expected)


def test_never_waits_for_the_device(device) -> None:
    hidden, weight, bias, tokens = inputs(5, 13, 7, device)
    with no_host_sync():
        run(linear_token_logprobs, hidden, weight, bias, tokens)
        linear_token_logprobs(hidden, weight, tokens)


def test_replays_from_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    hidden, weight, _, tokens = inputs(50, 5000, 64, device, torch.bfloat16)

    def both(hidden: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logprobs = linear_token_logprobs(hidden, weight, tokens)
        return logprobs, *torch.autograd.grad(logprobs.sum(), (hidden, weight))

    leaves = hidden.requires_grad_(), weight.requires_grad_(), tokens
    for x, y in zip(replayed(both, *leaves), both(*leaves), strict=True):
        assert torch.equal(x, y)


def test_only_the_gradients_that_are_asked_for(device) -> None:
    hidden, weight, _, tokens = inputs(5, 40, 8, device)
    hidden.requires_grad_()
    expected = run(linear_token_logprobs, hidden, weight, None, tokens)
    with Products() as products:
        linear_token_logprobs(hidden, weight, tokens).sum().backward()
    assert expected[2].shape == hidden.grad.shape and weight.grad is None
    assert not [p for p in products.seen if p.out.shape == weight.shape]


@pytest.mark.parametrize("save_logits", [False, True])
def test_rows_of_all_products_are_aligned(save_logits, pieces, device) -> None:
    """301 columns, a multiple of nothing, in pieces too, forward and backward. In fp32: to multiply
    bf16 into fp32 a CPU converts the operands, and so lays them out anew."""
    hidden, weight, bias, tokens = inputs(20, 301, 16, device)
    with Products() as products:
        run(linear_token_logprobs, hidden, weight, bias, tokens, save_logits=save_logits)
    assert_aligned(products.seen)
    assert len(products.seen) >= 4 - save_logits


@pytest.mark.filterwarnings("ignore:.*aot_eager.*")
@pytest.mark.parametrize("save_logits", [False, True])
def test_compiles_into_one_graph(save_logits, device) -> None:
    hidden, weight, bias, tokens = inputs(5, 40, 8, device)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        outputs = linear_token_logprobs(
            2 * h, w, tokens, bias=bias, entropy=True, save_logits=save_logits
        )
        return outputs[0].sum() + outputs[1].sum()

    def gradients(f) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        y = f(*leaves)
        y.backward()
        return [y.detach(), *(x.grad for x in leaves)]

    compiled = gradients(torch.compile(loss, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled, gradients(loss), strict=True))


def test_registered_as_pytorch_asks(device) -> None:
    hidden, weight, bias, tokens = inputs(5, 40, 8, device)
    hidden.requires_grad_()
    numbers = (0.7, None, True, -100, 0, 40, None)
    registered = linear_logprob._linear_token_logprobs.registered
    for save_logits in False, True:
        arguments = (hidden, weight, bias, tokens, *numbers, True, save_logits)
        torch.library.opcheck(registered, arguments)
    arguments = (hidden.detach(), weight, bias, tokens, *numbers, False, False)
    torch.library.opcheck(registered, arguments)


@IMPLEMENTATIONS
def test_autocast_casts_as_a_linear_layer_would(logprobs_of, device) -> None:
    *tensors, tokens = inputs(9, 40, 8, device)

    def run(leaves: list[Tensor], enabled: bool) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in leaves]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            logprobs = logprobs_of(*leaves[:2], tokens, bias=leaves[2])
        logprobs.sum().backward()
        return [logprobs.detach(), *(x.grad for x in leaves)]

    expected = run([x.bfloat16() for x in tensors], False)
    outputs = run(tensors, True)
    assert all(x.dtype == torch.float32 for x in outputs)  # the gradients of fp32 leaves
    assert all(torch.equal(x.to(y.dtype), y) for x, y in zip(outputs, expected, strict=True))


BAD = {
    r"hidden has shape \(2, 3\), weight \(5, 4\)": {"hidden": torch.zeros(2, 3)},
    "tokens has shape": {"tokens": torch.zeros(3, dtype=torch.long)},
    "bias has shape": {"bias": torch.zeros(4)},
    "weight is torch.bfloat16": {"weight": torch.zeros(5, 4, dtype=torch.bfloat16)},
    "temperature is -1": {"temperature": -1},
    "vocab_size is 0": {"vocab_size": 0},
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused(logprobs_of, message) -> None:
    good = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(5, 4),
        "tokens": torch.zeros(2, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        logprobs_of(**good | BAD[message])


@pytest.mark.parametrize("ranks", SHARDS)
@IMPLEMENTATIONS
def test_vocabulary_split_over_ranks(logprobs_of, ranks, device, assert_as_exact) -> None:
    """Each rank gets the whole gradient of hidden, and its own rows of that of weight."""
    if device != "cpu":
        pytest.skip("the ranks are processes that share one CPU")
    hidden, weight, bias, tokens = inputs(11, 50, 8, device)
    tokens.clamp_(max=44)
    options = {"vocab_size": 45, "temperature": 1.7}
    theirs = run(plain, hidden, weight, bias, tokens, **options)
    truth = run(plain, hidden.double(), weight.double(), bias.double(), tokens, **options)

    def rank() -> list:
        start = sum(SHARDS[ranks][: dist.get_rank()])
        rows = slice(start, start + SHARDS[ranks][dist.get_rank()])
        weight[45:], bias[45:] = torch.nan, torch.nan  # padding may hold anything
        reduce = mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce)
        options.update(vocab_start=start, group=dist.group.WORLD)
        with reduce as reduce:
            outputs = run(logprobs_of, hidden, weight[rows], bias[rows], tokens, **options)
        assert logprobs_of is not linear_token_logprobs or reduce.call_count == 1
        with torch.no_grad():
            fused = logprobs_of(hidden, weight[rows], tokens, bias=bias[rows], **options)
        return [y.tolist() for y in [*outputs, fused]]

    results = [[torch.tensor(y) for y in outputs] for outputs in run_world(ranks, rank)]
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result[:3], results[0][:3]))
        assert_as_exact(result[5], theirs[0], truth[0])
    shards = [torch.cat([result[i] for result in results]) for i in (3, 4)]
    for outputs in zip([*results[0][:3], *shards], theirs, truth, strict=True):
        assert_as_exact(*outputs, floor=4e-6)
