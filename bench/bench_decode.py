"""python -m bench.bench_decode: sampling one token more for a batch, against the time of reading.

What runs is the program's own `generate` on random weights and prompts. A step is the difference of
two responses of different length, over the difference: the prompts' prefill is in both. A step
reads every weight but those of the embeddings that are looked up, and of the cache the keys and
values that the queries see; `of_read` is the rate at which that happened over that of a read-only
sum in this process.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from bench.harness import Results
from bench.models import (
    MODELS,
    NO_EOS,
    PRECISION,
    TINY,
    draw,
    forward,
    keys_seen,
    main,
    random_prompts,
    weights,
)
from bench.rows import Row
from bench.timing import launches, spread
from tetrad.parallel.settings import BYTES, Architecture

CALLS = 3  # timed, after one that warms up
PROFILED = 4  # steps whose launches are counted


@dataclass(frozen=True)
class Step:
    """Steps of one model on a batch of so many rows."""

    providers: ClassVar = ("ours",)
    model: str
    shape: Architecture
    rows: int
    prompt: int  # tokens
    short: int  # tokens of the shorter response
    steps: int  # that the longer response takes more

    @property
    def name(self) -> str:
        return f"{self.model} {PRECISION} decode B={self.rows} after {self.begin}"

    @property
    def begin(self) -> int:
        """Tokens in the cache before the first of the steps: a response's last is not read."""
        return self.prompt + self.short - 1

    @property
    def bytes(self) -> int:
        """Of a step, in the mean."""
        a = self.shape
        seen = self.rows * keys_seen(a, self.begin, self.begin + self.steps) // self.steps
        cache = 2 * seen * a.kv_heads * a.channels
        return BYTES[PRECISION] * (weights(a) + a.vocab_size * a.hidden_size + cache)

    @property
    def flops(self) -> int:
        """Of a step, in the mean."""
        a, end = self.shape, self.begin + self.steps
        return self.rows * forward(a, self.begin, end, self.steps, a.vocab_size) // self.steps


def cases(tiny: bool) -> Iterator[Step]:
    batches, sizes = ((1, 3), (5, 2, 8)) if tiny else ((64, 1, 16, 256), (128, 8, 32))
    for model, shape in (TINY if tiny else MODELS).items():
        for rows in batches:
            yield Step(model, shape, rows, *sizes)


def measure(cases: Sequence[Step], results: Results) -> Iterator[Row]:
    """What was measured of each case, all of one model, until time is up."""
    from tetrad.parallel.generate import generate
    from tetrad.parallel.topology import initialize
    from tetrad.trainer import config
    from tetrad.trainer.loop import build_engine

    cfg = config.Run(out="", parallel=config.Parallel(precision=PRECISION))
    topology = initialize(cfg.parallel.layout())
    engine = build_engine(cfg, topology, "language", cases[0].shape, load=draw)

    def seconds(prompts: list[list[int]], length: int) -> float:
        began = time.perf_counter()
        samples = generate(
            engine, prompts, max_new=length, eos_id=NO_EOS, rows_at_once=len(prompts)
        )
        assert all(len(response) == length for response in samples.responses)
        return time.perf_counter() - began

    for case in cases:
        if results.is_late:
            return
        times = []
        for _ in range(1 + CALLS):
            prompts = random_prompts(case.shape, case.rows, case.prompt)
            short = seconds(prompts, case.short)
            times.append(1e3 * (seconds(prompts, case.short + case.steps) - short) / case.steps)
        row = spread(times[1:])
        row |= {"tokens": case.rows, "tokens_s": 1e3 * case.rows / row["ms"]}
        row["gb_s"] = 1e-6 * case.bytes / row["ms"]
        row["of_read"] = row["gb_s"] / results.rates.read

        def steps(length: int, prompts=prompts) -> Row:
            return launches(lambda: seconds(prompts, length))

        if not results.is_late:
            before, after = steps(case.short), steps(case.short + PROFILED)
            row |= {name: (after[name] - before[name]) / PROFILED for name in before}
        yield row
        results.profile(f"decode_{case.model}_{case.rows}", partial(seconds, prompts, case.short))


if __name__ == "__main__":
    main("decode", cases, measure)
