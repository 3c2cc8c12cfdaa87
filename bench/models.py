"""Models that the program's own benches run: their sizes, their FLOPs, and what is logged of them.

FLOPs are the least that a model asks for. A forward pass over n tokens of a sequence, r of which
are answers, takes

    2 n (weights in the layers' matrices) + 4 (width of the queries) (keys seen, by all queries of
    all layers) + 2 r (width of the model) (rows of the head: the vocabulary, or one)

and a backward pass twice that.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.case import CUDA
from bench.harness import Results, reason_of
from bench.rows import Row
from tetrad.parallel.settings import PRESETS, Architecture

# what tells most comes first, for time may be short
MODELS = {name: Architecture(**PRESETS[name]) for name in ("gpt3-1.3b", "gpt2-345m", "gpt2-117m")}
TINY = {"tiny": Architecture(211, 2, 32, 2, max_length=64, family="gpt2", windows=(0, 8))}
PRECISION = "bf16"
NO_EOS = -1  # a token that is never sampled


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


def main(
    name: str, cases: Callable[[bool], Iterable[Any]], measure: Callable[..., Iterator[Row]]
) -> None:
    """The command line of a bench of models. Exits 1 if something failed."""
    results = Results(name)
    add_rows(cases(results.tiny), measure, results)
    results.close()


def add_rows(cases: Iterable[Any], measure: Callable[..., Iterator[Row]], results: Results) -> None:
    """Of all cases, a model at a time."""
    for _, of_model in groupby(cases, key=lambda case: case.model):
        for row in attempted(list(of_model), measure, results):
            results.add(row)
    if dist.is_initialized():
        from tetrad.parallel.topology import shutdown

        shutdown()


def attempted(
    cases: Sequence[Any], measure: Callable[..., Iterator[Row]], results: Results
) -> Iterator[Row]:
    """The rows of the cases of one model: what `measure` yields for one after the other and, from
    where it stopped, why."""
    rows: list[Row] = [
        {"case": case.name, "provider": "ours", "bytes": case.bytes, "flops": case.flops}
        for case in cases
    ]
    done, reason = 0, "out of time"
    try:
        if not results.is_late:
            from tetrad.parallel import device

            device.install()  # before anything imports megatron.core
            for found in measure(cases, results):
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
