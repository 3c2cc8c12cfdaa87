"""The benches of the program itself: what they count, by hand; what they report, at tiny size."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from bench import bench_decode, bench_iteration, models
from bench.harness import Results
from bench.models import MODELS, attempted, forward, weights
from bench.timing import spread
from tests.forked_world import run_world
from tetrad.parallel import device
from tetrad.parallel.plan import Role, elements
from tetrad.parallel.settings import Architecture, Layout

device.install()  # before anything imports megatron.core

ROOT = Path(__file__).parents[2]
BENCHES = {"iteration": bench_iteration, "decode": bench_decode}
# 120 weights a layer: 4 x (4 + 2 + 2 + 4) of attention, 3 x 4 x 6 of the MLP; the first layer sees
# everything, the second two tokens
SHAPE = Architecture(10, 2, 4, 2, 8, num_kv_heads=1, ffn_hidden_size=6, windows=(0, 2))


def test_flops_of_a_forward_pass_by_hand() -> None:
    assert weights(SHAPE) == 240
    # three queries see 1 + 2 + 3 and 1 + 2 + 2 keys, at 4 FLOPs for each of 4 channels
    assert forward(SHAPE, 0, 3, 2, 10) == 2 * 3 * 240 + 16 * 11 + 2 * 2 * 4 * 10
    assert forward(SHAPE, 2, 3, 1, 10) == 2 * 240 + 16 * (3 + 2) + 2 * 4 * 10


def test_flops_of_the_phases_by_hand() -> None:
    """Two episodes of a prompt of one token and a response of two."""
    case = bench_iteration.Phase("model", SHAPE, "iteration", 2, 1, 2, 2)
    language, critic, reward = 1776, 1440 + 176 + 16, 1440 + 176 + 8
    flops = {
        "rollout": 2 * (2 * 2 * 240 + 16 * 6 + 160),  # the last token is not read
        "score": 2 * (2 * language + critic + reward),
        "judge": 0,
        "learn": 2 * 3 * (language + critic),
    }
    assert {phase: replace(case, phase=phase).flops for phase in flops} == flops
    assert case.flops == sum(flops.values())
    assert case.tokens == 6 and replace(case, phase="rollout").tokens == 4


def test_a_decoding_step_by_hand() -> None:
    """Two rows, two steps behind two tokens, of which one is in the cache when the first begins."""
    case = bench_decode.Step("model", SHAPE, rows=2, prompt=1, short=1, steps=2)
    seen = (2 + 3) + (2 + 2)  # by the two queries of a row, that is by a query of each row
    assert case.bytes == 2 * (240 + 10 * 4 + 2 * seen * 2)  # keys and values of 2 channels
    assert case.flops == 2 * 2 * 240 + 16 * seen + 2 * 2 * 4 * 10


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_the_matrices_of_the_plan(name) -> None:
    a = MODELS[name]
    planned = elements(Role(a, "language", Layout()), 0)
    planned -= (a.padded_vocab(1) + a.max_length) * a.hidden_size
    assert 0 <= planned - weights(a) < 0.002 * planned  # biases and norms


def test_cases_of_a_gpu() -> None:
    iteration = list(bench_iteration.cases(False))
    assert [case.phase for case in iteration[:5]] == list(bench_iteration.PHASES)
    assert {case.model for case in iteration} == {"gpt2-117m", "gpt2-345m", "gpt3-1.3b"}
    decode = list(bench_decode.cases(False))
    for case in (*iteration, *decode):
        assert list(case.providers) == ["ours"]
        tokens = case.prompt + (case.response if case in iteration else case.short + case.steps)
        assert tokens <= case.shape.max_length
    assert len({case.name for case in (*iteration, *decode)}) == len(iteration) + len(decode)


def results_of(name: str, *arguments: str) -> Results:
    with mock.patch.object(sys, "argv", [name, "--tiny", *arguments]):
        return Results(name)


def run(name: str, folder: Path, *arguments: str) -> list[dict]:
    """The rows of a bench, in a process that ends with it."""
    return run_world(1, tiny, name, folder, arguments)[0]


def tiny(name: str, folder: Path, arguments: tuple[str, ...]) -> list[dict]:
    from tetrad.parallel.engine import Engine

    bench = BENCHES[name]
    results = results_of(name, "--out", str(folder), *arguments)
    models.add_rows(bench.cases(True), bench.measure, results)
    assert not any(isinstance(x, Engine) for x in gc.get_objects())  # room for the next model
    return results.content["rows"]


COMMON = {"case", "provider", "bytes", "flops", "ms", "ms_p20", "ms_p80", "calls", "tokens"}


def test_an_iteration_and_its_phases_are_measured(tmp_path) -> None:
    rows = run("iteration", tmp_path)
    whole, *phases = rows
    assert [row["case"] for row in rows] == [case.name for case in bench_iteration.cases(True)]
    assert sum(row["ms"] for row in phases) == pytest.approx(whole["ms"], rel=0.3)
    assert whole["predicted_mb"] == whole["peak_mb"] > 0  # of a CPU: what the roles were given
    rates = {"tokens_s", "tflop_s", "of_gemm"}
    for row in rows:
        memory = {"predicted_mb", "peak_mb"} if row is whole else set()
        assert row.keys() == COMMON | memory | (rates if row["flops"] else {"tokens_s"})
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["calls"] == 3
    assert [row["flops"] == 0 for row in phases] == [False, False, True, False]
    assert whole["tflop_s"] == pytest.approx(1e-9 * whole["flops"] / whole["ms"])


def test_decoding_is_measured(tmp_path) -> None:
    rows = run("decode", tmp_path)
    assert [row["case"] for row in rows] == [case.name for case in bench_decode.cases(True)]
    for row, case in zip(rows, bench_decode.cases(True)):
        assert row.keys() == COMMON | {"tokens_s", "gb_s", "of_read"}
        assert row["ms"] > 0 and row["tokens"] == case.rows
        assert row["gb_s"] == pytest.approx(1e-6 * row["bytes"] / row["ms"])


@pytest.mark.parametrize("name", BENCHES)
def test_when_time_is_up_all_is_listed_and_nothing_failed(name, tmp_path) -> None:
    rows = run(name, tmp_path, "--until", "0")
    assert {row["not_measured"] for row in rows} == {"out of time"}
    assert len(rows) == len(list(BENCHES[name].cases(True)))


def test_what_fails_says_why_and_the_next_model_is_measured(tmp_path) -> None:
    cases = list(bench_decode.cases(True))
    cases += [replace(case, model="next") for case in cases]

    def measure(cases, log):
        yield spread([500.0])
        if cases[0].model != "next":
            raise RuntimeError("it broke\nin many lines")
        yield spread([1000.0, 3000.0, 2000.0])

    results = results_of("decode", "--out", str(tmp_path))
    models.add_rows(cases, measure, results)
    rows = results.content["rows"]
    found = [row.get("not_measured", row.get("ms")) for row in rows]
    assert found == [500, "RuntimeError: it broke", 500, 2000]
    assert [rows[3][key] for key in ("ms_p20", "ms_p80", "calls")] == [1000, 3000, 3]
    with pytest.raises(SystemExit) as ended:
        results.close()
    assert ended.value.code == 1
    assert len(list(attempted(cases[:2], lambda *_: iter(()), results))) == 2


def test_without_megatron_all_is_listed_and_nothing_failed() -> None:
    """Cases are found without it, nor the trainer."""
    code = """if True:
        import runpy, sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name == "megatron":
                    raise ModuleNotFoundError("No module named 'megatron'", name=name)

        sys.meta_path.insert(0, Absent())
        from bench import bench_decode, bench_iteration
        for bench in (bench_decode, bench_iteration):
            assert all(case.flops is not None and case.name for case in bench.cases(False))
        assert not any(m.startswith("tetrad.trainer") for m in sys.modules)
        for bench in (bench_decode, bench_iteration):
            runpy.run_module(bench.__name__, run_name="__main__", alter_sys=False)
    """
    command = [sys.executable, "-W", "ignore", "-c", code, "--tiny"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("not measured: No module named 'megatron'\n") == 7
