"""What only a GPU can tell of this code: each a question with a number, that passes or fails.

    python -m bench.first       asks them all, after the rates of the machine

A question is a function without arguments that calls the program's own code on small inputs and
returns a Finding. On a machine without a GPU those that have a meaning there are asked too, of the
CPU path: a test plants a fault in each and sees it fail.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import CUDA, DEVICE
from bench.harness import reason_of
from bench.models import NO_EOS, PRECISION, TINY, draw, random_prompts
from bench.timing import timed
from tetrad.kernels import linear_logprob, linear_loss, logprob, ppo_loss, products

HALF = torch.bfloat16
SLOW_BY = 1.15  # what a vocabulary of 50257 may cost, of what 50304 does
SAMPLING_MS = 0.2  # of 64 rows of 50257: a fifth of a step of 1.3B that reads its weights once
HOST_GB_S = 10.0  # between pinned host memory and the GPU, at least
REGISTER_SECONDS = 30  # for 12 GiB of it; a start of 4 roles of 8B registers ten times as much
START_SECONDS = 20  # of the process groups; NCCL takes one or two
ATTENTION_ERROR = 0.02  # of bf16, which rounds to 0.004; a wrong mask errs by 0.3 and more
SAMPLED_NATS = 0.05  # between cached and whole sequences in bf16, where hidden states differ


@dataclass(frozen=True)
class Finding:
    """What was seen, and whether it is what the code relies on."""

    passed: bool
    seen: str


class NeedsGPU(Exception):
    """The question has no meaning on a CPU."""


def error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||, in float64."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm())


def milliseconds(call: Callable[[], object]) -> float:
    """The median of a call, on the device."""
    return timed(call)["ms"]


def product_is_added_in_place() -> Finding:
    """addmm into its own input, twice: an alias would lose the first sum."""
    a, b = torch.randn(2, 64, 64, device=DEVICE).to(HALF)
    total = torch.zeros(64, 64, device=DEVICE)
    for _ in range(2):
        products.add_product(total, a, b)
    off = error(total, 2 * (a.double() @ b.double()))
    return Finding(off < 1e-5, f"error {off:.1e} after two sums")


def product_of_no_rows() -> Finding:
    """A rank without tokens takes part in everything."""
    weight = torch.randn(64, 32, device=DEVICE).to(HALF)
    product = products.matmul(weight.new_empty(0, 64), weight)
    right = product.shape == (0, 32) and product.dtype == torch.float32
    return Finding(right, f"{tuple(product.shape)} {product.dtype}")


def logits_keep_fp32() -> Finding:
    """Logits of bf16 inputs are not rounded to bf16 on the way."""
    hidden, weight = torch.randn(2, 512, 1024, device=DEVICE).to(HALF)
    off = error(products.matmul(hidden, weight.t()), hidden.double() @ weight.t().double())
    return Finding(off < 1e-5, f"error {off:.1e}; rounded to bf16 it would be 2e-3")


def fp32_is_fp32() -> Finding:
    """No product of fp32 inputs runs in tf32."""
    a, b = torch.randn(2, 512, 512, device=DEVICE)
    off = error(products.matmul(a, b), a.double() @ b.double())
    return Finding(off < 1e-5, f"error {off:.1e}; in tf32 it would be 3e-4")


def odd_vocabulary_is_not_slow() -> Finding:
    """Forward and backward of the linear log-prob at 50257 columns, beside 50304."""
    if not CUDA:
        raise NeedsGPU
    N, d = 2048, 1024
    hidden = torch.randn(N, d, device=DEVICE).to(HALF).requires_grad_()
    whole = (0.02 * torch.randn(50304, d, device=DEVICE)).to(HALF).requires_grad_()
    tokens = torch.randint(50257, (N,), device=DEVICE)

    def both(V: int) -> None:
        logprobs = linear_logprob.linear_token_logprobs(hidden, whole[:V], tokens)
        torch.autograd.grad(logprobs.sum(), (hidden, whole))

    ours = milliseconds(lambda: both(50257)) / milliseconds(lambda: both(50304))
    odd = cublas(hidden.detach(), whole.detach()[:50257])
    even = cublas(hidden.detach(), whole.detach())
    plain = ", ".join(f"{name} x{odd[name] / even[name]:.2f}" for name in odd)
    room = torch.empty(N, 50304, device=DEVICE, dtype=HALF)[:, :50257]
    aligned = milliseconds(lambda: torch.mm(hidden.detach(), whole.detach()[:50257].t(), out=room))
    seen = f"ours x{ours:.2f}; products with rows of 50257: {plain}"
    return Finding(
        ours <= SLOW_BY, f"{seen}, logits in rows of 50304 x{aligned / even['logits']:.2f}"
    )


def cublas(hidden: Tensor, weight: Tensor) -> dict[str, float]:
    """Milliseconds of the three products with the logits' rows side by side."""
    dlogits = torch.randn(len(hidden), len(weight), device=DEVICE).to(hidden.dtype)
    return {
        "logits": milliseconds(lambda: hidden @ weight.t()),
        "dhidden": milliseconds(lambda: dlogits @ weight),
        "dweight": milliseconds(lambda: dlogits.t() @ hidden),
    }


def packed_attention() -> Finding:
    """Forward and backward with and without a window, on slices of a fused product."""
    from tetrad.parallel.attention import Attention, Packing

    lengths, heads, d = (37, 300, 8, 129), 4, 64
    n = sum(lengths)
    packing = Packing(lengths, torch.arange(n), where=torch.device(DEVICE))
    offs, host = [], []
    for window in 256, 16, 0:
        attend = Attention(SimpleNamespace(kv_channels=d), 1, lambda _, w=window: w)
        fused = torch.randn(n, 1, heads, 3 * d, device=DEVICE).to(HALF).requires_grad_()
        began = time.perf_counter()
        out = attend(*fused.split(d, dim=-1), packed_seq_params=packing)
        host.append(1e6 * (time.perf_counter() - began))
        above = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, fused, above)
        exact = fused.detach().double().requires_grad_()
        truth = plainly(exact, lengths, d, window)
        (due,) = torch.autograd.grad(truth, exact, above.double())
        offs += [error(out, truth), error(gradient, due)]
    seen = f"largest error {max(offs):.1e}, host {min(host):.0f} us"
    return Finding(all(off < ATTENTION_ERROR for off in offs), seen)  # NaN is not below


def plainly(fused: Tensor, lengths: tuple[int, ...], d: int, window: int) -> Tensor:
    """Causal attention of each sequence by itself, as it is defined."""
    outs = []
    for part in fused.split(list(lengths)):
        q, k, v = (x.transpose(0, 1) for x in part.squeeze(1).split(d, dim=-1))
        place = torch.arange(len(part), device=fused.device)
        behind = place[:, None] - place
        hidden = (behind < 0) | (behind >= (window or len(part)))
        scores = (q @ k.mT / d**0.5).masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1)[:, None])
    return torch.cat(outs)


def cached_attention_has_a_fast_kernel() -> Finding:
    """One token against a cache of 137: the boolean mask must not fall to the math path."""
    from tetrad.parallel.attention import Attention, KVCache, Packing

    if not CUDA:
        raise NeedsGPU
    rows, heads, d, held = 64, 16, 128, 136
    attend = Attention(SimpleNamespace(kv_channels=d), 1, lambda _: 0)
    cache = KVCache(held + 8)

    def step(lengths: list[int], start: Tensor) -> Tensor:
        last = torch.tensor(lengths).cumsum(0) - 1
        packing = Packing(lengths, last, where=torch.device(DEVICE), cache=cache, start=start)
        q, k, v = torch.randn(3, sum(lengths), 1, heads, d, device=DEVICE).to(HALF)
        return attend(q, k, v, packed_seq_params=packing)

    begun = torch.zeros(rows, dtype=torch.long, device=DEVICE)
    step([held] * rows, begun)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = step([1] * rows, begun + held)
    # the time of PyTorch's kernel alone, as Attention calls it
    q, k = (torch.randn(rows, heads, n, d, device=DEVICE).to(HALF) for n in (1, held + 1))
    mask = torch.ones(rows, 1, 1, held + 1, dtype=torch.bool, device=DEVICE)
    ms = milliseconds(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    gb_s = 4e-6 * k.numel() / ms
    return Finding(
        bool(out.isfinite().all()), f"{1e3 * ms:.0f} us for {rows} rows, {gb_s:.0f} GB/s"
    )


def losses_repeat_to_the_bit() -> Finding:
    """A thousand calls of the losses whose last program adds up what the others left."""
    logprobs, old, advantages = torch.randn(3, 512, 1024, device=DEVICE)
    mask = torch.rand_like(old) < 0.7
    n = 1000 if CUDA else 3

    def bits() -> Tensor:
        policy, stats = ppo_loss.policy_loss(logprobs, old, advantages, mask)
        value, more = ppo_loss.value_loss(logprobs, old, advantages, mask)
        return torch.stack([policy, value, *stats.values(), *more.values()])

    first = bits()
    differ = torch.zeros((), device=DEVICE)
    for _ in range(n):
        differ += (bits() != first).any()
    return Finding(not differ and bool(first.isfinite().all()), f"{int(differ)} of {n} differ")


def gradients_repeat_to_the_bit() -> Finding:
    """linear_policy_loss and its gradients, ten times."""
    N, V, d = (4096, 50257, 512) if CUDA else (64, 1000, 32)
    hidden = torch.randn(N, d, device=DEVICE).to(HALF).requires_grad_()
    weight = (0.1 * torch.randn(V, d, device=DEVICE)).to(HALF).requires_grad_()
    tokens = torch.randint(V, (N,), device=DEVICE)
    old, advantages = torch.randn(2, N, device=DEVICE)
    mask = torch.rand(N, device=DEVICE) < 0.9

    def bits() -> list[Tensor]:
        loss, _ = linear_loss.linear_policy_loss(hidden, weight, tokens, old - 10, advantages, mask)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    first = bits()
    differ = sum(not all(map(torch.equal, bits(), first)) for _ in range(10))
    return Finding(differ == 0, f"{differ} of 10 differ")


def ops_replay_in_a_graph() -> Finding:
    """Log-probs and losses, captured and replayed on new inputs, are what they are eagerly."""
    if not CUDA:
        raise NeedsGPU
    logits = torch.randn(64, 50257, device=DEVICE).to(HALF)
    tokens = torch.randint(50257, (64,), device=DEVICE)
    old, advantages = torch.randn(2, 64, device=DEVICE)
    mask = torch.ones(64, dtype=torch.bool, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        logprobs = logprob.token_logprobs(logits, tokens)
        assert isinstance(logprobs, Tensor)
        return logprobs, ppo_loss.policy_loss(logprobs, old, advantages, mask)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    equal = 0
    for _ in range(20):
        logits.normal_()
        graph.replay()
        equal += all(map(torch.equal, captured, step()))
    return Finding(equal == 20, f"{equal} of 20 replays equal the eager call")


def one_rank_talks_to_itself() -> Finding:
    """The process groups of one rank start, and sum in fp64."""
    from tetrad.parallel.settings import Layout
    from tetrad.parallel.topology import initialize

    began = time.perf_counter()
    initialize(Layout())
    x = torch.full((1000,), 1 / 3, dtype=torch.float64, device=DEVICE)
    before = x.clone()
    dist.all_reduce(x)
    right = torch.equal(x, before)
    seconds = time.perf_counter() - began
    us = 1e3 * milliseconds(lambda: dist.all_reduce(x))
    seen = f"{dist.get_backend()}: first in {seconds:.1f} s, then {us:.0f} us"
    return Finding(right and seconds < START_SECONDS, seen)


def roles_take_turns() -> Finding:
    """Two roles in one slot: registering the host's memory, moving there and back."""
    from tetrad.parallel.colocate import colocate

    size = 4 << 30 if CUDA else 1 << 20
    need = {"parameters": size, "gradients": 0, "optimizer": 0}
    began = time.perf_counter()
    memories = [m.weights for m in colocate({"a": need, "b": need, "c": need}, True).values()]
    registered = time.perf_counter() - began
    held = [m.allocate(size // 4, torch.float32).fill_(i) for i, m in enumerate(memories)]
    began = time.perf_counter()
    right = []
    for i in (0, 1, 2, 0):
        memories[i].bring()
        right.append(bool((held[i] == i).all()))  # waits for it
    gb_s = 1e-9 * 4 * size / (time.perf_counter() - began)
    seen = f"{registered:.1f} s for {3 * size >> 20} MiB of host memory, back at {gb_s:.0f} GB/s"
    fast = not CUDA or (gb_s >= HOST_GB_S and registered < REGISTER_SECONDS)
    return Finding(all(right) and fast, seen)


def megatron_is_untouched() -> Finding:
    """Where CUDA is, nothing of Megatron's source is rewritten; and a model trains a step."""
    from tetrad.parallel.packed import pack_text
    from tetrad.parallel.settings import Layout, Schedule
    from tetrad.parallel.topology import initialize
    from tetrad.trainer import config
    from tetrad.trainer.loop import build_engine

    layers = sys.modules["megatron.core.tensor_parallel.layers"]
    is_ours = hasattr(layers, "_cpu_cuda")
    (shape,) = TINY.values()
    cfg = config.Run(out="", parallel=config.Parallel(precision=PRECISION))
    engine = build_engine(
        cfg, initialize(Layout()), "language", shape, load=draw, schedule=Schedule()
    )
    batch = pack_text(random_prompts(shape, 4, 20))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        engine.accumulate_cross_entropy(batch, denominator=batch.counted)
        norm = engine.step()["grad_norm"]
        seconds.append(time.perf_counter() - began)
    right = is_ours != CUDA and norm > 0
    seen = f"first step {seconds[0]:.2f} s, second {seconds[1]:.3f} s"
    return Finding(right, ("rewritten; " if is_ours else "as it is; ") + seen)


def sampling_is_cheap() -> Finding:
    """Tokens of 64 rows of GPT-2's vocabulary, whose cumulated sums are in fp64."""
    from tetrad.parallel.generate import sample

    if not CUDA:
        raise NeedsGPU
    logits = torch.randn(64, 50257, device=DEVICE)
    uniform = torch.rand(64, device=DEVICE, dtype=torch.float64)
    ms = milliseconds(lambda: sample(logits, uniform, 1.0))
    return Finding(ms <= SAMPLING_MS, f"{1e3 * ms:.0f} us")


def samples_agree_with_scores() -> Finding:
    """Log-probs while sampling, step by step through the cache, and of the whole sequences."""
    from tetrad.parallel.generate import generate
    from tetrad.parallel.packed import pack
    from tetrad.parallel.settings import Layout
    from tetrad.parallel.topology import initialize
    from tetrad.trainer import config
    from tetrad.trainer.loop import build_engine

    (shape,) = TINY.values()
    cfg = config.Run(out="", parallel=config.Parallel(precision=PRECISION))
    engine = build_engine(cfg, initialize(Layout()), "language", shape, load=draw)
    prompts = random_prompts(shape, 8, 5)
    samples = generate(engine, prompts, max_new=16, eos_id=NO_EOS)
    scored = engine.logprobs(pack(prompts, samples.responses))
    sampled = torch.cat(samples.logprobs)
    scored = scored[scored != 0].cpu()
    gap = float((sampled - scored).abs().max()) if sampled.shape == scored.shape else torch.inf
    return Finding(gap < SAMPLED_NATS, f"at most {gap:.4f} nats apart, in bf16")


def answer(question: Callable[[], Finding]) -> Finding | None:
    """What was found; None where the question has no meaning on this machine."""
    try:
        return question()
    except NeedsGPU:
        return None
    except Exception as problem:  # a question that cannot even be asked
        return Finding(False, reason_of(problem))


SUSPICIONS: dict[str, Callable[[], Finding]] = {
    f.__name__.replace("_", " "): f
    for f in (
        product_is_added_in_place, product_of_no_rows, logits_keep_fp32, fp32_is_fp32,
        packed_attention, cached_attention_has_a_fast_kernel, losses_repeat_to_the_bit,
        ops_replay_in_a_graph, one_rank_talks_to_itself, megatron_is_untouched,
        samples_agree_with_scores, sampling_is_cheap, odd_vocabulary_is_not_slow,
        gradients_repeat_to_the_bit, roles_take_turns,
    )
}  # fmt: skip
