"""python -m bench.bench_iteration: iterations of PPO, whole and by phase, of models of three sizes.

What runs is the program's own `iteration`, on roles in the memory that it plans for them. Weights
and prompts are random, no response ends early, there is no pretraining text (ptx). Milliseconds are
the host's, and a phase ends when the GPU is done with it.

FLOPs are the least that the models ask for. A forward pass over n tokens of a sequence, r of which
are the response, takes

    2 n (weights in the layers' matrices) + 4 (width of the queries) (keys seen, by all queries of
    all layers) + 2 r (width of the model) (rows of the head: the vocabulary, or one)

and a backward pass twice that. Rollout: the policy, but for the layers at the last token; score:
all four models; learn: forward and backward of policy and critic. `of_gemm` is their rate over that
of one large product in bf16 by cuBLAS, in this process. Rates of tokens: those sampled, in the
rollout; elsewhere those of prompts and responses.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.harness import CUDA, Log, Row, arguments, reason_of
from tetrad.parallel.settings import PRESETS, Architecture

MODELS = {name: Architecture(**PRESETS[name]) for name in ("gpt2-117m", "gpt2-345m", "gpt3-1.3b")}
TINY = {"tiny": Architecture(211, 2, 32, 2, max_length=64, family="gpt2", windows=(0, 8))}
PRECISION = "bf16"
WARM_UP = 1  # iteration
CALLS = 3  # iterations that are timed
NO_EOS = -1  # a token that is never sampled
PHASES = ("iteration", "rollout", "score", "judge", "learn")


@dataclass(frozen=True)
class Case:
    """One phase, or all of it, of an iteration on one model."""

    model: str
    shape: Architecture
    phase: str  # of PHASES
    episodes: int
    prompt: int  # tokens
    response: int  # tokens
    minibatch: int  # episodes
    bytes: int = 0  # not what bounds it

    @property
    def name(self) -> str:
        sizes = f"{self.episodes}x({self.prompt}+{self.response})"
        return f"{self.model} {PRECISION} {sizes} no ptx, {self.phase}"

    @property
    def providers(self) -> Mapping[str, Callable]:
        return {"ours": measure}

    @property
    def tokens(self) -> int:
        prompt = 0 if self.phase == "rollout" else self.prompt
        return self.episodes * (prompt + self.response)

    @property
    def flops(self) -> int:
        a, r, n = self.shape, self.response, self.prompt + self.response
        policy, critic = forward(a, 0, n, r, a.vocab_size), forward(a, 0, n, r, 1)
        of = {
            "rollout": forward(a, 0, n - 1, r, a.vocab_size),
            "score": 2 * policy + critic + forward(a, 0, n, 1, 1),
            "judge": 0,
            "learn": 3 * (policy + critic),
        }
        return self.episodes * of.get(self.phase, sum(of.values()))


def cases(tiny: bool) -> Iterator[Case]:
    sizes = (4, 5, 8, 2) if tiny else (64, 128, 256, 32)
    for model, shape in (TINY if tiny else MODELS).items():
        for phase in PHASES:
            yield Case(model, shape, phase, *sizes)


def forward(a: Architecture, begin: int, end: int, answers: int, rows: int) -> int:
    """FLOPs of tokens begin … end - 1 of one sequence through the layers, and of so many answers
    through a head of so many rows."""
    attention = 4 * a.num_heads * a.channels * keys_seen(a, begin, end)
    return 2 * (end - begin) * weights(a) + attention + 2 * answers * a.hidden_size * rows


def weights(a: Architecture) -> int:
    """Elements of the matrices of all layers."""
    queries, keys = (n * a.channels for n in (a.num_heads, a.kv_heads))
    mlp = (2 + a.gated) * a.ffn
    return a.num_layers * a.hidden_size * (2 * queries + 2 * keys + mlp)


def keys_seen(a: Architecture, begin: int, end: int) -> int:
    """By the queries at begin … end - 1, summed over the layers."""
    windows = [a.window(layer) or end for layer in range(a.num_layers)]
    return sum(min(place + 1, window) for window in windows for place in range(begin, end))


def measure(cases: Sequence[Case], log: Log) -> Iterator[Row]:
    """What was measured of each case, all of one model."""
    if log.is_late:
        return
    from tetrad.parallel import device

    device.install()  # before anything imports megatron.core
    from tetrad.parallel.engine import Engine
    from tetrad.parallel.estimate import GIB
    from tetrad.parallel.topology import Topology, initialize
    from tetrad.trainer import config, ppo
    from tetrad.trainer.loop import build_engine

    size = 8192 if CUDA else 256
    gemm = log.rates.gemm(size, size, size, torch.bfloat16)
    case = cases[0]
    cfg = config.PPO(
        out="", reward="", batch_size=case.episodes, minibatch_size=case.minibatch,
        max_prompt=case.prompt, sampling=config.Sampling(max_new=case.response),
        parallel=config.Parallel(precision=PRECISION),
    )  # fmt: skip
    shapes = dict.fromkeys(("policy", "reference", "reward", "critic"), case.shape)
    heads = {"policy": "language", "reward": "scalar", "critic": "scalar"}

    def build(name: str, topology: Topology, **training: Any) -> Engine:
        return build_engine(cfg, topology, heads[name], case.shape, load=draw, **training)

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    topology = initialize(cfg.parallel.layout())
    updates = (WARM_UP + CALLS) * case.episodes // case.minibatch
    roles, memory_used = ppo.place_roles(cfg, topology, shapes, build, updates)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for i in range(WARM_UP + CALLS):
        prompts = random_prompts(case.shape, case.episodes, case.prompt)
        began = time.perf_counter()
        stats = ppo.iteration(roles, prompts, None, cfg, NO_EOS, i)
        stats["seconds/iteration"] = time.perf_counter() - began
        assert stats["response_tokens"] == case.response
        if i >= WARM_UP:
            for phase in PHASES:
                times[phase].append(stats[f"seconds/{phase}"])
            if log.is_late:
                break
    predicted, measured = (x * GIB / 1e6 for x in memory_used().values())
    for case in cases:
        row = spread(times[case.phase])
        row |= {"tokens": case.tokens, "tokens_s": 1e3 * case.tokens / row["ms"]}
        if case.flops:
            row["tflop_s"] = 1e-9 * case.flops / row["ms"]
            row["of_gemm"] = row["tflop_s"] / gemm
        if case.phase == "iteration":
            row |= {"predicted_mb": predicted, "peak_mb": measured}
        yield row


# What bench_decode does in the same way.


def main(cases: Iterable[Any], measure: Callable[..., Iterator[Row]], log: Log) -> None:
    """Log the rows of all cases, a model at a time."""
    for _, of_model in groupby(cases, key=lambda case: case.model):
        for row in attempted(list(of_model), measure, log):
            log.add(row)
    if dist.is_initialized():
        from tetrad.parallel.topology import shutdown

        shutdown()
    log.close()


def attempted(
    cases: Sequence[Any], measure: Callable[..., Iterator[Row]], log: Log
) -> Iterator[Row]:
    """The rows of the cases of one model: what `measure` yields for one after the other and, from
    where it stopped, why."""
    rows: list[Row] = [
        {"case": case.name, "provider": "ours", "bytes": case.bytes, "flops": case.flops}
        for case in cases
    ]
    done, reason = 0, "out of time"
    try:
        for found in measure(cases, log):
            yield rows[done] | found
            done += 1
    except Exception as problem:  # the other models are to be measured
        reason = reason_of(problem)
    yield from (row | {"not_measured": reason} for row in rows[done:])
    gc.collect()  # the hooks of a trained model refer to it
    if CUDA:
        torch.cuda.empty_cache()


def draw(chunks: Iterable[nn.Module]) -> None:
    """Random weights, drawn where they are."""
    for chunk in chunks:
        for weight in chunk.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)


def random_prompts(a: Architecture, n: int, length: int) -> list[list[int]]:
    return torch.randint(a.vocab_size, (n, length)).tolist()


def spread(seconds: Sequence[float]) -> Row:
    """Their median in milliseconds, and the 20th and 80th percentile."""
    several = [*seconds, *seconds]  # of one there are no quantiles
    p20, *_, p80 = statistics.quantiles(several, n=5, method="inclusive")
    return {
        "ms": 1e3 * statistics.median(seconds), "ms_p20": 1e3 * p20, "ms_p80": 1e3 * p80,
        "calls": len(seconds),
    }  # fmt: skip


if __name__ == "__main__":
    options = arguments("python -m bench.bench_iteration")
    main(cases(options.tiny), measure, Log("iteration", options))
