import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.forked_world import run_world
from tests.kernels.callers import SHARDS, no_host_sync, replayed
from tests.kernels.test_linear_logprob import inputs
from tests.products import Products, assert_aligned, of_size
from tetrad.kernels import launch, linear_loss, reference
from tetrad.kernels.linear_loss import linear_cross_entropy, linear_policy_loss

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
IMPLEMENTATIONS = pytest.mark.parametrize("module", [linear_loss, reference], ids=["kernel", "ref"])


def episodes(
    shape: tuple[int, ...], V: int, d: int, device: str, dtype=torch.float32
) -> dict[str, Tensor]:
    """Inputs of linear_policy_loss: ratios around 1, a third of them clipped; ragged masks."""
    N = torch.Size(shape).numel()
    hidden, weight, bias, tokens = inputs(N, V, d, device, dtype)
    tokens = tokens.clamp(min=0).view(shape)
    mask = torch.rand(shape, device=device) < 0.7
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    logprobs = reference.token_logprobs(logits.view(*shape, V), tokens).float()
    return {
        "hidden": hidden.view(*shape, d),
        "weight": weight,
        "bias": bias,
        "tokens": tokens,
        "old_logprobs": logprobs + 0.3 * torch.randn(shape, device=device),
        "advantages": torch.randn(shape, device=device),
        "mask": mask,
    }


def run(f: Callable, arguments: dict[str, Tensor], **options) -> tuple[list[Tensor], dict]:
    """Loss and gradients of hidden, weight and bias under an upstream gradient of 3; statistics."""
    names = [name for name in ("hidden", "weight", "bias") if name in arguments]
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    result = f(**arguments | leaves, **options)
    loss, statistics = result if isinstance(result, tuple) else (result, {})
    (3 * loss).backward()
    return [loss.detach(), *(x.grad for x in leaves.values())], statistics


def plain(hidden, weight, tokens, old_logprobs, advantages, mask, bias=None, **options):
    """What a trainer writes: logits in the inputs' type."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    temperature = options.pop("temperature", 1.0)
    logprobs = reference.token_logprobs(
        logits, torch.where(mask, tokens, -100), temperature=temperature
    )
    return reference.policy_loss(logprobs, old_logprobs, advantages, mask, **options)


def plain_cross_entropy(hidden, weight, tokens, bias=None):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return torch.nn.functional.cross_entropy(logits.float(), tokens.long())


PLAIN = SimpleNamespace(  # a module of them
    linear_policy_loss=plain,
    linear_cross_entropy=lambda denominator, **text: (
        plain_cross_entropy(**text) * text["tokens"].numel() / denominator
    ),
)


def wide(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}


@pytest.fixture(params=["whole", "pieces"])
def pieces(request, monkeypatch) -> Iterator[None]:
    if request.param == "pieces":
        monkeypatch.setattr(linear_loss, "ROWS", 5)
    yield


OPTIONS = {
    "tokens": {},
    "dual clip, temperature": {"dual_clip": 1.5, "temperature": 0.8, "clip_range": 0.1},
    "sequences": {"aggregation": "sequence-mean"},
    "sequences of a larger batch": {"aggregation": "sequence-mean", "denominator": 7.0},
    "tokens of a larger batch": {"denominator": torch.tensor(50)},
    "packed sequences": {
        "aggregation": "sequence-mean",
        "cu_seqlens": torch.tensor([0, 4, 4, 9, 12]),
    },
}


@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
def test_policy_loss_as_exact_as_pytorch(options, dtype, pieces, device, assert_as_exact) -> None:
    shape = (12,) if "packed" in options else (3, 4)
    arguments = episodes(shape, 130, 16, device, dtype)
    numbers = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in OPTIONS[options].items()}
    ours, statistics = run(linear_policy_loss, arguments, **numbers)
    theirs, _ = run(plain, arguments, **numbers)
    truth, expected = run(plain, wide(arguments), **numbers)
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert_as_exact(x, y.to(x.dtype), z)
    assert statistics.keys() == expected.keys()
    for name, value in statistics.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=1e-6)


@DTYPES
def test_cross_entropy_as_exact_as_pytorch(dtype, pieces, device, assert_as_exact) -> None:
    hidden, weight, bias, tokens = inputs(13, 300, 24, device, dtype)
    arguments = {"hidden": hidden, "weight": weight, "bias": bias, "tokens": tokens}
    ours, _ = run(linear_cross_entropy, arguments)
    theirs, _ = run(plain_cross_entropy, arguments)
    with torch.no_grad():
        without = linear_cross_entropy(**arguments)
    truth = {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}
    truth, _ = run(
        lambda hidden, weight, tokens, bias: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(hidden, weight, bias), tokens
        ),
        truth,
    )
    for x, y, z in zip([without, *ours], [theirs[0], *theirs], [truth[0], *truth], strict=True):
        assert_as_exact(x, y, z)


@IMPLEMENTATIONS
def test_by_hand(module, device) -> None:
    """p = (1, 2, 5) / 8. Token 2 of ratio 1 and A = 2: dloss/dlogits = -A (e_2 - p) = A (p - e_2).

    The second token is clipped (ratio 2, A = 1): loss -1.2 A, no gradient. Mean over two tokens.
    """
    logits = torch.tensor([1.0, 2.0, 5.0], device=device).log()
    weight = logits[:, None].clone().requires_grad_()
    hidden = torch.ones(2, 1, device=device, requires_grad=True)
    logprob = (5 / 8 * torch.ones((), device=device)).log()
    tensors = (
        torch.tensor([2, 2], device=device),
        torch.stack([logprob, logprob - torch.tensor(2.0).log()]),
        torch.tensor([2.0, 1.0], device=device),
        torch.ones(2, dtype=torch.bool, device=device),
    )
    loss, statistics = module.linear_policy_loss(hidden, weight, *tensors)
    torch.testing.assert_close(loss.item(), -(2.0 + 1.2) / 2)
    torch.testing.assert_close(statistics["clip_fraction"].item(), 0.5)
    loss.backward()
    expected = 2.0 / 2 * torch.tensor([1 / 8, 2 / 8, -3 / 8], device=device)
    torch.testing.assert_close(weight.grad[:, 0], expected)
    torch.testing.assert_close(hidden.grad[:, 0], torch.stack([expected @ logits, expected[0] * 0]))

    weight.grad = None
    loss = module.linear_cross_entropy(hidden, weight, tensors[0])
    torch.testing.assert_close(loss, -logprob)
    loss.backward()
    expected = torch.tensor([1 / 8, 2 / 8, -3 / 8], device=device)
    torch.testing.assert_close(weight.grad[:, 0], expected)


@IMPLEMENTATIONS
def test_what_is_masked_is_not_read(module, pieces, device) -> None:
    arguments = episodes((3, 4), 40, 8, device)
    mask = arguments["mask"]
    poisoned = {k: x.clone() for k, x in arguments.items()}
    for name in "hidden", "old_logprobs", "advantages":
        poisoned[name][~mask] = torch.nan
    for name in "weight", "bias":
        arguments[name][33:], poisoned[name][33:] = 0.0, torch.nan
    poisoned["tokens"][~mask] = 10**6
    for x in arguments, poisoned:
        x["tokens"][mask] = x["tokens"][mask].clamp(max=32)
    clean, statistics = run(module.linear_policy_loss, arguments, vocab_size=33)
    dirty, poisoned_statistics = run(module.linear_policy_loss, poisoned, vocab_size=33)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert all(torch.equal(x, poisoned_statistics[name]) for name, x in statistics.items())

    ignored = {k: x[k] for x in [poisoned] for k in ("hidden", "weight", "bias")}
    ignored["tokens"] = torch.where(mask, poisoned["tokens"], -100)
    outputs, _ = run(module.linear_cross_entropy, ignored, vocab_size=33)
    assert all(x.isfinite().all() for x in outputs)
    assert (outputs[1][~mask] == 0).all() and (outputs[2][33:] == 0).all()


@IMPLEMENTATIONS
def test_nothing_counts(module, device) -> None:
    arguments = episodes((2, 3), 40, 8, device)
    arguments["mask"] = torch.zeros_like(arguments["mask"])
    outputs, statistics = run(module.linear_policy_loss, arguments)
    assert all((x == 0).all() for x in [*outputs, *statistics.values()])
    names = ("hidden", "weight", "bias")
    tokens = torch.full((2, 3), -100, device=device)
    arguments = {k: arguments[k] for k in names} | {"tokens": tokens}
    outputs, _ = run(module.linear_cross_entropy, arguments)
    assert all((x == 0).all() for x in outputs)
    empty = {"hidden": torch.zeros(0, 8, device=device), "weight": arguments["weight"]}
    outputs, _ = run(module.linear_cross_entropy, empty | {"tokens": tokens[:0, 0]})
    assert all((x == 0).all() for x in outputs)


def test_parts_of_a_batch_add_up(device) -> None:
    arguments = episodes((12,), 40, 8, device)
    n = arguments["mask"].sum()
    whole, _ = run(linear_policy_loss, arguments)
    per_token = ("hidden", "tokens", "old_logprobs", "advantages", "mask")
    halves = [
        run(
            linear_policy_loss,
            {k: x[rows] if k in per_token else x for k, x in arguments.items()},
            denominator=n,
        )[0]
        for rows in (slice(0, 5), slice(5, 12))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
    torch.testing.assert_close(torch.cat([x[1] for x in halves]), whole[1])
    torch.testing.assert_close(halves[0][2] + halves[1][2], whole[2], rtol=1e-5, atol=1e-6)


def of_both_losses(
    module, arguments: dict[str, Tensor], buffer: Tensor | None, coef: float
) -> list[Tensor]:
    """Both losses and the gradients of loss + coef * cross-entropy, of which that of weight is
    added to the buffer, if there is one."""
    leaves = {k: arguments[k].detach().clone().requires_grad_() for k in ("hidden", "weight")}
    shared = arguments | leaves
    into = {} if buffer is None else {"weight_grad": buffer}
    loss, _ = module.linear_policy_loss(**shared, denominator=9, **into)
    into = into and into | {"upstream": coef}
    names = ("hidden", "weight", "bias", "tokens")
    text = {k: shared[k] for k in names if k in shared}
    nats = module.linear_cross_entropy(**text, denominator=7, **into)
    (loss + coef * nats).backward()
    if buffer is not None:
        assert leaves["weight"].grad is None
    made = leaves["weight"].grad if buffer is None else buffer
    return [loss.detach(), nats.detach(), leaves["hidden"].grad, made]


@DTYPES
@IMPLEMENTATIONS
def test_two_losses_add_the_gradient_of_weight_to_one_buffer(
    module, dtype, pieces, device, assert_as_exact
) -> None:
    """To what is there, in rows that the weight has; those beyond it are not touched."""
    arguments = episodes((12,), 130, 16, device, dtype)
    held = torch.randn(140, 16, device=device)
    held[130:] = torch.nan
    buffer = held.clone()
    *ours, made = of_both_losses(module, arguments, buffer, 0.3)
    theirs = of_both_losses(PLAIN, arguments, None, 0.3)
    truth = of_both_losses(reference, wide(arguments), None, 0.3)
    assert made[130:].isnan().all()
    ours.append((made - held)[:130].to(dtype))
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert_as_exact(x, y.to(x.dtype), z)


def test_a_broken_promise_of_the_upstream_gradient_leaves_no_gradient(device) -> None:
    arguments = episodes((12,), 40, 8, device)
    for upstream, broken in (0.3, False), (0.25, True):
        hidden = arguments["hidden"].clone().requires_grad_()
        loss, _ = linear_policy_loss(
            **arguments | {"hidden": hidden}, denominator=9, upstream=upstream,
            weight_grad=torch.zeros(40, 8, device=device),
        )  # fmt: skip
        (0.3 * loss).backward()
        assert hidden.grad.isnan().all() == broken and hidden.grad.isfinite().all() != broken


def test_without_a_gradient_nothing_is_added(device) -> None:
    arguments = episodes((12,), 40, 8, device)
    buffer = torch.zeros(40, 8, device=device)
    with torch.no_grad():
        for module in linear_loss, reference:
            module.linear_policy_loss(**arguments, denominator=9, weight_grad=buffer)
    assert (buffer == 0).all()


class Touched(TorchDispatchMode):
    """Names of the operators that read or write n bytes or more, but for those of `constant`."""

    MOVE_NOTHING = {"empty", "empty_like", "new_empty", "detach", "t", "view", "slice", "transpose"}

    def __init__(self, n: int, constant: Tensor) -> None:
        super().__init__()
        self.n, self.constant, self.names = n, constant, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in (*args, *(kwargs or {}).values(), out) if isinstance(x, Tensor)]
        large = [x for x in tensors if x.nbytes >= self.n]
        if any(x.data_ptr() != self.constant.data_ptr() for x in large):
            self.names += [] if name in self.MOVE_NOTHING else [name]
        return out


@pytest.mark.parametrize("f", [linear_policy_loss, linear_cross_entropy])
@pytest.mark.parametrize("into_buffer", [False, True])
def test_the_gradient_of_weight_is_touched_once_a_piece(
    f, into_buffer, device, monkeypatch
) -> None:
    """Written by the first product, or added to the buffer; no zeros, and no pass over it after the
    last product but the one that makes the gradient that autograd asks for."""
    monkeypatch.setattr(linear_loss, "ROWS", 5)
    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    arguments = episodes((12,), 40, 16, device)
    del arguments["bias"]
    if f is linear_cross_entropy:
        arguments = {k: arguments[k] for k in ("hidden", "weight", "tokens")}
    leaves = {k: arguments[k].requires_grad_() for k in ("hidden", "weight")}
    into = {"weight_grad": torch.zeros(40, 16, device=device)} if into_buffer else {}
    with Touched(4 * 40 * 16, leaves["weight"]) as touched:
        loss = f(**arguments, denominator=9, **into)
        (loss[0] if isinstance(loss, tuple) else loss).backward()
    assert touched.names == (["addmm_"] * 3 if into_buffer else ["mm", "addmm_", "addmm_", "mul"])


@pytest.mark.parametrize("f", [linear_policy_loss, linear_cross_entropy])
def test_a_loss_scale_does_not_meet_the_range_of_fp16(f, device) -> None:
    """2^31 / 4096 is no fp16, nor is a probability over 4096; their product with a sum is."""
    arguments = episodes((50,), 2000, 16, device, torch.float16)
    arguments |= {k: arguments[k] / 1000 for k in ("hidden", "weight")}
    arguments["old_logprobs"] = torch.full((50,), -math.log(2000), device=device)
    del arguments["bias"]
    names = ("hidden", "weight", "tokens")
    if f is linear_cross_entropy:
        arguments = {k: arguments[k] for k in names}
    scaled, exact = [], []
    for given, out in (arguments, scaled), (wide(arguments), exact):
        leaves = {k: given[k].detach().clone().requires_grad_() for k in names[:2]}
        loss = f(**given | leaves, denominator=4096)
        (2.0**31 * (loss[0] if isinstance(loss, tuple) else loss)).backward()
        out += [x.grad.double() for x in leaves.values()]
    for x, y in zip(scaled, exact):
        assert x.isfinite().all() and (x - y).abs().max() < 1e-3 * y.abs().max()


def test_never_waits_for_the_device(device) -> None:
    arguments = episodes((12,), 40, 8, device)
    bounds = torch.tensor([0, 4, 4, 9, 12], device=device)
    names = ("hidden", "weight", "bias", "tokens")
    with no_host_sync():
        run(linear_policy_loss, arguments, aggregation="sequence-mean", cu_seqlens=bounds)
        run(linear_cross_entropy, {k: arguments[k] for k in names})
        of_both_losses(linear_loss, arguments, torch.zeros(40, 8, device=device), 0.3)


def test_replays_from_a_cuda_graph(device) -> None:
    if device != "cuda":
        pytest.skip("needs a GPU")
    arguments = episodes((50,), 5000, 64, device, torch.bfloat16)
    constants = [arguments[k] for k in ("tokens", "old_logprobs", "advantages", "mask")]

    def both(hidden: Tensor, weight: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
        loss, _ = linear_policy_loss(hidden, weight, *constants)
        loss = loss + linear_cross_entropy(hidden, weight, constants[0])
        return loss, *torch.autograd.grad(loss, (hidden, weight))

    leaves = [arguments[k].requires_grad_() for k in ("hidden", "weight")]
    outputs = replayed(both, *leaves, *constants)
    for x, y in zip(outputs, both(*leaves, *constants), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("f", [linear_policy_loss, linear_cross_entropy])
def test_three_products_with_aligned_rows(f, pieces, device) -> None:
    """For each piece, forward and backward together; 301 columns are a multiple of nothing."""
    arguments = episodes((12,), 301, 8, device)
    if f is linear_cross_entropy:
        arguments = {k: arguments[k] for k in ("hidden", "weight", "bias", "tokens")}
    with Products() as products:
        run(f, arguments)
    assert len(of_size(products.seen, 296)) == 3 * -(-12 // linear_loss.ROWS)
    assert_aligned(products.seen)


@pytest.mark.filterwarnings("ignore:.*aot_eager.*")
def test_compiles_into_one_graph(device) -> None:
    arguments = episodes((3, 4), 40, 8, device)

    def total(**arguments: Tensor) -> Tensor:
        loss, statistics = linear_policy_loss(**arguments)
        names = ("hidden", "weight", "bias", "tokens")
        return (
            loss
            + statistics["ratio_mean"]
            + linear_cross_entropy(**{k: arguments[k] for k in names})
        )

    compiled, _ = run(torch.compile(total, backend="aot_eager", fullgraph=True), arguments)
    assert all(torch.equal(x, y) for x, y in zip(compiled, run(total, arguments)[0], strict=True))


@pytest.mark.parametrize("ranks", SHARDS)
def test_vocabulary_split_over_ranks(ranks, device, assert_as_exact) -> None:
    if device != "cpu":
        pytest.skip("the ranks are processes that share one CPU")
    arguments = episodes((11,), 50, 8, device)
    arguments["tokens"].clamp_(max=44)
    theirs, _ = run(linear_policy_loss, arguments, vocab_size=45)
    truth, _ = run(reference.linear_policy_loss, wide(arguments), vocab_size=45)

    def rank() -> list:
        start = sum(SHARDS[ranks][: dist.get_rank()])
        rows = slice(start, start + SHARDS[ranks][dist.get_rank()])
        mine = arguments | {"weight": arguments["weight"][rows], "bias": arguments["bias"][rows]}
        with mock.patch.object(linear_loss, "ROWS", 5):  # of unequal shards, three pieces each
            outputs, _ = run(
                linear_policy_loss, mine, vocab_start=start, vocab_size=45, group=dist.group.WORLD
            )
            hidden, buffer = mine["hidden"].requires_grad_(), torch.zeros_like(mine["weight"])
            loss, _ = linear_policy_loss(
                **mine, vocab_start=start, vocab_size=45, group=dist.group.WORLD,
                denominator=float(mine["mask"].sum()), weight_grad=buffer, upstream=3.0,
            )  # fmt: skip
            (3 * loss).backward()
        torch.testing.assert_close([hidden.grad, buffer], outputs[1:3], rtol=1e-5, atol=1e-6)
        return [x.tolist() for x in outputs]

    results = [[torch.tensor(y) for y in outputs] for outputs in run_world(ranks, rank)]
    for result in results:
        assert all(torch.equal(x, y) for x, y in zip(result[:2], results[0][:2]))
    shards = [torch.cat([result[i] for result in results]) for i in (2, 3)]
    for outputs in zip([*results[0][:2], *shards], theirs, truth, strict=True):
        assert_as_exact(*outputs)


BAD = {
    "upstream is inf": {"upstream": math.inf},
    "upstream is 2; it has a meaning only with weight_grad": {"upstream": 2, "weight_grad": None},
    r"weight_grad has shape \(4, 4\)": {"weight_grad": torch.zeros(4, 4)},
    r"weight_grad has shape \(6, 4\), strides \(1, 6\)": {"weight_grad": torch.zeros(4, 6).t()},
    "weight_grad is torch.float64": {"weight_grad": torch.zeros(5, 4, dtype=torch.float64)},
    "denominator is None; with weight_grad": {"denominator": None},
    "hidden requires no gradient": {"hidden": torch.zeros(2, 4)},
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("message", BAD)
def test_bad_buffers_are_refused(module, message) -> None:
    good = {
        "hidden": torch.zeros(2, 4, requires_grad=True),
        "weight": torch.zeros(5, 4),
        "tokens": torch.zeros(2, dtype=torch.long),
        "denominator": 2,
        "weight_grad": torch.zeros(5, 4),
    }
    with pytest.raises(ValueError, match=message):
        module.linear_cross_entropy(**good | BAD[message])


def test_a_compiled_call_refuses_a_buffer(device) -> None:
    hidden, weight, _, tokens = inputs(5, 40, 8, device)
    arguments = {"denominator": 9, "weight_grad": torch.zeros(40, 8, device=device)}
    loss = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="torch.compile does not see that it changes"):
        loss(hidden.requires_grad_(), weight, tokens, **arguments)
