"""The estimate of arithmetic, traffic and time, by hand."""

from dataclasses import replace

import pytest

from tests.parallel.tiny import ALONE
from tetrad.parallel.estimate import EFFICIENCY, GPU, LATENCY, Cost, costs
from tetrad.parallel.plan import Role, Run, Work, elements
from tetrad.parallel.settings import Architecture, Layout

# 4 layers of 64 channels; a window of one token, which makes attention 4 x 64 flops a layer
SHAPE = Architecture(512, 4, 64, 4, 512, tie_embeddings=False, windows=(1,))
WORK = Work(8, 4, 1, 1, 1, 10**6, 4)  # 8 episodes of 2 tokens, 2 optimizer steps


def run_of(layout: Layout, world: int, work: Work = WORK, **more) -> Run:
    role = Role(SHAPE, "language", layout, trained=True, **more)
    frozen = replace(role, trained=False)
    return Run(
        {"policy": role, "reference": frozen, "critic": frozen, "reward": frozen}, work, world
    )


def score_and_learn(*args, **more) -> tuple[Cost, Cost]:
    """Of the policy."""
    _, score, _, _, _, learn = costs(run_of(*args, **more), swap=False)
    return score, learn


def test_arithmetic_and_traffic_of_tensor_pipeline_and_data_parallelism() -> None:
    """6 flops a weight and token in training, 2 in scoring, and what a ring sends."""
    run = run_of(Layout(tp=2, pp=2), 8)
    rollout, score, reference, _, _, learn = costs(run, swap=True)
    tokens = 8 * 2 / 2  # dp 2
    # the last stage: two layers of tp's half, final norm, unembedding
    weights = elements(run.roles["policy"], 1)
    attention = 4 * 2 * 64 / 2 * 1
    assert score.flops == pytest.approx(tokens * (2 * weights + attention))
    assert learn.flops == pytest.approx(3 * score.flops)
    ring = 2 * (2 - 1) / 2 * tokens * 64 * 2  # an all-reduce of the hidden states in bf16
    assert score.tp == pytest.approx(2 * 2 * ring) and learn.tp == pytest.approx(2 * score.tp)
    assert learn.pp == 2 * score.pp == 2 * tokens * 64 * 2
    assert rollout.waiting == 2  # one stage after the other
    assert score.waiting == 2  # one micro-batch: as long again for the second stage
    held = run.states(run.worst(True))["policy"]
    each = (held["gradients"] + held["parameters"]) * (2 - 1) / 2  # one there, one back
    assert learn.dp == pytest.approx(2 * each)  # two optimizer steps
    assert learn.swap == 2 * held["parameters"] + 2 * 2 * held["optimizer"]
    assert (score.swap, rollout.swap) == (0, 0)  # the policy is there already
    assert reference.swap == run.states(run.worst(True))["reference"]["parameters"]


def test_recompute_is_a_third_pass_forward() -> None:
    score, learn = score_and_learn(Layout(tp=2), 2, recompute=True)
    assert learn.flops == pytest.approx(4 * score.flops)
    assert learn.tp == pytest.approx(3 * score.tp)


def test_context_parallel_ranks_send_their_keys_and_values_to_each_other() -> None:
    score, learn = score_and_learn(Layout(cp=2), 2)
    # 4 layers x keys and values of a rank's 8 tokens x 64 channels x 2 bytes, to one other
    assert (score.cp, learn.cp) == (4 * 2 * 8 * 64 * 2, 2 * 4 * 2 * 8 * 64 * 2)
    score, _ = score_and_learn(Layout(cp=4), 4)
    assert score.cp == 4 * 2 * 4 * 64 * 2 * 3


def test_sequence_parallelism_gathers_once_more_and_splits_what_stages_send() -> None:
    plain, plain_learn = score_and_learn(Layout(tp=2, pp=2), 4)
    split, split_learn = score_and_learn(Layout(tp=2, pp=2, sequence_parallel=True), 4)
    assert split.tp == plain.tp
    assert split_learn.tp == pytest.approx(plain.tp * 2.5) == pytest.approx(plain_learn.tp * 1.25)
    assert split.pp == plain.pp / 2


def test_sampling_reads_weights_and_cache_for_every_token() -> None:
    run = run_of(ALONE, 1, Work(6, 6, 1, 2, 4, 64, 3))
    rollout, *_ = costs(run, swap=False)
    weights = elements(run.roles["policy"], 0) - 512 * 64  # all but the embedding
    # keys and values of 4 layers, 6 rows and a context of 2 + 4 / 2 tokens
    cache = 2 * 4 * 64 * 2 * 6 * 4
    assert rollout.read == 2 * 4 * 2 * weights + 4 * cache  # 2 turns of 3 rows


def test_seconds() -> None:
    """On a GPU that does one of everything a second, and a tenth of it between nodes."""
    links = 1 / EFFICIENCY["links"]
    gpu = GPU(0, 1 / EFFICIENCY["matmul"], 1 / EFFICIENCY["HBM"], links, links / 10,
              1 / EFFICIENCY["PCIe"])  # fmt: skip

    def seconds(world=8, layout=ALONE, overlap=False, **cost):
        run = run_of(layout, world, overlap=overlap)
        return pytest.approx(Cost("learn", "policy", **cost).seconds(run, gpu))

    assert seconds(flops=5, read=7) == 7 and seconds(flops=7, read=5) == 7
    assert seconds(flops=5, swap=4) == 9
    assert seconds(flops=5, collectives=2 / LATENCY) == 7
    assert seconds(flops=5, dp=3) == 8
    assert seconds(16, flops=5, dp=3) == 5 + 30
    assert seconds(16, Layout(pp=2), flops=5, dp=3) == 8  # the 8 ranks of a stage
    assert seconds(flops=5, dp=3, overlap=True) == 5  # beside the arithmetic
    assert seconds(flops=2, dp=3, overlap=True) == 3
    assert seconds(flops=5, tp=1, cp=2, pp=3) == 11
    assert seconds(16, Layout(tp=8, cp=2), tp=1, cp=2, pp=3) == 1 + 20 + 30
    assert seconds(flops=5, dp=3, waiting=2.0) == 13
