"""What counts as worse between two runs, and how the comparison ends."""

import json
from pathlib import Path

import pytest

from bench.compare import main

ROW = {
    "case": "N=8 forward", "provider": "ours", "ms": 1.0, "ms_p20": 0.98, "ms_p80": 1.02,
    "peak_mb": 100.0, "error": 1e-3, "launches": 3,
}  # fmt: skip
WHERE = {
    "gpu": "NVIDIA H200", "command": "python -m bench.bench_gather",
    "versions": {"torch": "2.11.0", "liger-kernel": "0.6"},
}  # fmt: skip


def slower(times: float, **rest) -> dict:
    return {key: times * ROW[key] for key in ("ms", "ms_p20", "ms_p80")} | rest


def write(path: Path, *rows: dict, **where) -> Path:
    """A result file of rows that differ from ROW in what is given."""
    content = {"where": WHERE | where, "rates": {}, "absent": {}, "rows": [ROW | x for x in rows]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def compared(tmp_path, capsys):
    """Exit status and output for rows before and after."""

    def compare(old: list[dict], new: list[dict], *flags: str, **where) -> tuple[int, str]:
        paths = write(tmp_path / "old.json", *old), write(tmp_path / "new.json", *new, **where)
        return main([*map(str, paths), *flags]), capsys.readouterr().out

    return compare


def test_what_is_as_before_is_not_shown(compared) -> None:
    assert compared([{}], [slower(1.04)]) == (
        0, "1 rows are as before, 0 changed, 0 are new\nnone of ours became worse\n"
    )  # fmt: skip


WORSE = [
    # p20 1.029 > p80 1.02
    (slower(1.06), "1 -> 1.06 (1.06x)  100 -> 100  0.001 -> 0.001  WORSE: slower"),
    ({"peak_mb": 106.0}, "WORSE: more memory"),
    ({"error": 2.1e-3}, "WORSE: larger error"),
    ({"launches": 4}, "WORSE: more launches"),
]


@pytest.mark.parametrize("change, said", WORSE)
def test_ours_may_not_become_worse(compared, change, said) -> None:
    status, output = compared([{}], [change])
    assert status == 1 and said in output and output.endswith("\n1 of ours became worse\n")


@pytest.mark.parametrize("change, said", WORSE)
def test_others_may(compared, change, said) -> None:
    other = {"provider": "trl"}
    status, output = compared([{}, other], [{}, change | other])
    assert status == 0 and said.replace("WORSE: ", "") in output and "WORSE" not in output


@pytest.mark.parametrize(
    "old, new, said",
    [
        ({}, slower(1.06, ms_p20=1.01), "slower within the spreads"),  # p20 1.01 < p80 1.02
        ({"peak_mb": 0.001}, {"peak_mb": 0.009}, ""),  # the allocator's rounding
        ({"error": 1e-7}, {"error": 9e-7}, ""),  # fp32's rounding
        ({}, slower(0.9), "faster"),
        ({}, {"peak_mb": 90.0}, "less memory"),
        ({}, {"error": 4e-4}, "smaller error"),
    ],
)
def test_noise_and_gains_do_not_fail(compared, old, new, said) -> None:
    status, output = compared([old], [new])
    assert status == 0 and said in output and ("0 changed" in output) == (not said)


def test_the_tolerance_is_an_option(compared) -> None:
    assert compared([{}], [slower(1.06)], "--tolerance", "0.1")[0] == 0
    assert compared([{}], [slower(1.05)], "--tolerance", "0.01")[0] == 1


def test_a_row_without_spread_or_memory_is_judged_by_its_time(compared) -> None:
    bare = {"ms_p20": None, "ms_p80": None, "peak_mb": None, "error": None}
    assert compared([bare], [bare | {"ms": 1.06}])[0] == 1
    assert compared([bare], [bare | {"ms": 1.04}])[0] == 0


def test_ours_may_not_vanish(compared) -> None:
    failed = {"ms": None, "not_measured": "out of memory"}
    status, output = compared([{}], [failed])
    assert status == 1 and "WORSE: not measured now: out of memory" in output
    late = {"ms": None, "not_measured": "out of time"}
    status, output = compared([{}], [late])
    assert status == 0 and "out of time" in output
    status, output = compared([{}], [])
    assert status == 1 and "WORSE: not measured now: not in the file" in output
    assert compared([{}, {"provider": "trl"}], [{}, failed | {"provider": "trl"}])[0] == 0


def test_a_megabyte_counts(compared) -> None:
    """And less than a block of the allocator does not."""
    assert compared([{"peak_mb": 1.0}], [{"peak_mb": 2.0}])[0] == 1
    assert compared([{"peak_mb": 0.001}], [{"peak_mb": 0.009}])[0] == 0


def test_what_was_not_measured_before_cannot_be_worse(compared) -> None:
    failed = {"ms": None, "not_measured": "out of memory"}
    status, output = compared([failed], [{}])
    assert status == 0 and "measured now" in output
    assert compared([failed], [failed])[0] == 0
    status, output = compared([{}], [{}, {"case": "N=9 forward"}])
    assert status == 0 and output.startswith("1 rows are as before, 0 changed, 1 are new\n")


def test_others_that_all_moved_alike_are_the_machine(compared) -> None:
    """Two of 1.1 and 1.2: the median is 1.15. One alone, or two ways, say nothing."""
    names = [{"provider": "liger"}, {"provider": "torch.compile"}]

    def said(*times: float, **where) -> bool:
        new = [slower(x, **name) for x, name in zip(times, names)]
        return compared([{}, *names], [{}, *new], **where)[1]

    line = "all 2 rows of others, whose versions did not change, became slower (median 1.15x)"
    assert line in said(1.1, 1.2)
    assert "became faster (median 0.85x)" in said(0.8, 0.9)
    assert "all" not in said(1.1, 0.9) and "all" not in said(1.1)
    newer_triton = {"torch": "2.11.0", "liger-kernel": "0.6", "triton": "3.7"}
    assert "all" not in said(1.1, 1.2, versions=newer_triton)  # nobody is who he was
    newer_liger = {"torch": "2.11.0", "liger-kernel": "0.7"}
    assert "all" not in said(1.1, 1.2, versions=newer_liger)  # one row is left
    assert "all" not in said(1.1, 1.2, versions=WHERE["versions"] | {"torch": "2.12.0"})


def test_folders_are_joined_by_bench(tmp_path, capsys) -> None:
    for run, ms in ("old", 1.0), ("new", 2.0):
        write(tmp_path / run / "gather.json", {})
        write(tmp_path / run / "linear.json", slower(ms), command="python -m bench.bench_linear")
    write(tmp_path / "new/later.json", {}, command="")
    assert main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    output = capsys.readouterr().out
    assert "linear, N=8 forward, ours  1 -> 2 (2.00x)" in output
    assert "1 rows are as before, 1 changed, 1 are new" in output and "gather," not in output


def test_what_cannot_be_compared_is_2_and_one_line(tmp_path, capsys) -> None:
    old = write(tmp_path / "old.json", {})
    (tmp_path / "broken.json").write_text('{"rows": ')
    (tmp_path / "empty").mkdir()
    others = {
        tmp_path / "none.json": "no such file",
        tmp_path / "broken.json": "JSONDecodeError",
        tmp_path / "empty": "holds no result files",
        write(tmp_path / "a100.json", {}, gpu="NVIDIA A100"): "different GPUs: NVIDIA H200 before,",
        write(tmp_path / "kl.json", {}, command="python -m bench.bench_kl"): "different benches",
    }
    for new, reason in others.items():
        assert main([str(old), str(new)]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert reason in said
