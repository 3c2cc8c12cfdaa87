"""python -m bench.bench_iteration: iterations of PPO, whole and by phase, of models of three sizes.

What runs is the program's own `iteration`, on roles in the memory that it plans for them. Weights
and prompts are random, no response ends early, there is no pretraining text (ptx). Milliseconds are
the host's, and a phase ends when the GPU is done with it.

FLOPs of the rollout: the policy, but for the layers at the last token; score: all four models;
learn: forward and backward of policy and critic. `of_gemm` is their rate over that of one large
product in bf16 by cuBLAS, in this process. Rates of tokens: those sampled, in the rollout;
elsewhere those of prompts and responses.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch

from bench.case import CUDA
from bench.harness import Results
from bench.models import MODELS, NO_EOS, PRECISION, TINY, draw, forward, main, random_prompts
from bench.rows import Row
from bench.timing import spread
from tetrad.parallel.settings import Architecture

WARM_UP = 1  # iteration
CALLS = 3  # iterations that are timed
PHASES = ("iteration", "rollout", "score", "judge", "learn")


@dataclass(frozen=True)
class Phase:
    """One phase, or all of it, of an iteration on one model."""

    providers: ClassVar = ("ours",)
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


def cases(tiny: bool) -> Iterator[Phase]:
    sizes = (4, 5, 8, 2) if tiny else (64, 128, 256, 32)
    for model, shape in (TINY if tiny else MODELS).items():
        for phase in PHASES:
            yield Phase(model, shape, phase, *sizes)


def measure(cases: Sequence[Phase], results: Results) -> Iterator[Row]:
    """What was measured of each case, all of one model."""
    from tetrad.parallel.engine import Engine
    from tetrad.parallel.estimate import GIB
    from tetrad.parallel.topology import Topology, initialize
    from tetrad.trainer import config, ppo
    from tetrad.trainer.loop import build_engine

    size = 8192 if CUDA else 256
    gemm = results.rates.gemm(size, size, size, torch.bfloat16)
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
                times[phase].append(1e3 * stats[f"seconds/{phase}"])
            if time.time() + stats["seconds/iteration"] > results.until:
                break  # another would not come to its end
    predicted, measured = (x * GIB / 1e6 for x in memory_used().values())
    for phase in cases:
        row = spread(times[phase.phase])
        row |= {"tokens": phase.tokens, "tokens_s": 1e3 * phase.tokens / row["ms"]}
        if phase.flops:
            row["tflop_s"] = 1e-9 * phase.flops / row["ms"]
            row["of_gemm"] = row["tflop_s"] / gemm
        if phase.phase == "iteration":
            row |= {"predicted_mb": predicted, "peak_mb": measured}
        yield row

    prompts = random_prompts(case.shape, case.episodes, case.prompt)

    def without_rollout() -> None:
        """An iteration on answers that nobody sampled: its hundred thousand launches would bury
        those of the other phases."""
        with mock.patch.object(ppo, "rollout", lambda *_, **__: at_random(case, prompts)):
            ppo.iteration(roles, prompts, None, cfg, NO_EOS, WARM_UP + CALLS)

    results.profile(f"iteration_{case.model}", without_rollout)


def at_random(case: Phase, prompts: list[list[int]]) -> Any:
    """Episodes of random responses."""
    from tetrad.parallel.packed import pack
    from tetrad.trainer.rollout import Episodes

    responses = random_prompts(case.shape, case.episodes, case.response)
    batch = pack(prompts, responses)
    batch.per_token["sampled_logprobs"] = torch.zeros(len(batch.tokens))
    return Episodes(batch, responses, torch.zeros(len(responses), dtype=torch.bool))


if __name__ == "__main__":
    main("iteration", cases, measure)
