"""Tables and figures of results that are made up here; and the committed pages, of theirs."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import figures, report
from bench.rows import ROOT, all_cases

FORWARD, BACKWARD, PRODUCT = "N=8 forward", "N=8 forward + backward", "N=8 V=9 forward"
CASES = {  # 4.3 GB at 4.3 TB/s take 1 ms, three times as many 3 ms; 1.58 TFLOP at 790 TFLOP/s 2 ms
    "gather": [
        SimpleNamespace(name=FORWARD, bytes=4_300_000_000, flops=0, providers=["ours", "torch"]),
        SimpleNamespace(name=BACKWARD, bytes=12_900_000_000, flops=0, providers=["ours", "torch"]),
    ],
    "linear": [
        SimpleNamespace(name=PRODUCT, bytes=10**9, flops=1_580_000_000_000, providers=["ours"]),
    ],
}
HEAD = {
    "where": {
        "gpu": "NVIDIA H200", "driver": "570.1", "commit": "abc1234", "sources": "0123456789abcdef",
        "date": "2026-01-02", "python": "3.12.1", "versions": {"torch": "2.11.0", "liger": "0.6"},
        "command": "python -m bench.bench_gather",
    },
    "rates": {"copy_gb_s": 4200.4, "gemm_tflop_s 8x9x7": 741.6},
    "absent": {"verl": "not installed"},
}  # fmt: skip


def measured(case: str, provider: str, ms: float, **rest) -> dict:
    row = {"case": case, "provider": provider, "bytes": 10**9, "flops": 0, "error": 2.3e-3}
    row |= {"in_place": False, "ms": ms, "ms_p20": 0.9 * ms, "ms_p80": 1.2 * ms, "launches": 3}
    return (
        row
        | {"host_us": 41.7, "gpu_us": 1900.0, "peak_mb": 12.34, "of_copy": 0.62, "of_read": 0.58}
        | rest
    )


GATHER = [
    measured(BACKWARD, "ours", 2.0),
    measured(BACKWARD, "torch", 5.0, of_copy=0.248, in_place=True),
    measured(BACKWARD, "liger", 1.5),
]
LINEAR = [
    measured(
        PRODUCT,
        "ours",
        4.0,
        flops=1_580_000_000_000,
        of_gemm=0.4,
        of_gemm_done=0.53,
        of_copy=None,
        of_read=None,
    ),
]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(figures, "draw", lambda *_: None)  # slow, and one test is about it
    (tmp_path / "README.md").write_text("Before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    return tmp_path


def write(root: Path, bench: str, rows: list, gpu: str = "nvidia-h200", **where) -> None:
    content = HEAD | {"where": HEAD["where"] | where, "rows": rows}
    path = root / "bench/results" / gpu / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def pages(root: Path) -> tuple[str, str]:
    """The README and the results page, written anew."""
    assert report.main([], root, CASES) == 0
    return (root / "README.md").read_text(), (root / "bench/results/README.md").read_text()


def line(page: str, start: str) -> list[str]:
    """The cells of the one row of a table that starts so."""
    (found,) = [x for x in page.splitlines() if x.startswith(f"| {start}")]
    return [x.strip() for x in found.strip("|").split(" | ")]


def test_without_results_every_case_is_there_with_an_estimate(root) -> None:
    readme, page = pages(root)
    assert readme.startswith("Before\n<!-- bench -->\nNo speed has been measured on a GPU yet.")
    assert readme.endswith("<!-- /bench -->\nafter\n") and "old" not in readme
    assert "`make gpu`" in readme and "The estimate is arithmetic" in readme
    start = "[gather](bench/bench_gather.py), N=8 forward + backward"
    assert line(readme, start) == [start, "not measured", "3"]
    assert line(page, f"{FORWARD} | ") == [FORWARD, "ours", "not measured", "4300", "-", "1"]
    assert line(page, PRODUCT) == [PRODUCT, "ours", "not measured", "1000", "1580", "2"]
    assert "torch" not in page  # which others there are depends on the machine
    assert not list(root.rglob("*.svg"))


def test_a_group_compares_everyone_with_ours(root) -> None:
    write(root, "gather", GATHER)
    _, page = pages(root)
    rest = ["2.3e-03", "12.3", "3", "1900", "41.7"]
    mine = ["ours", "2 (1.8–2.4)", "1.00x", "62% copy, 58% read", *rest, "no"]
    torch = ["torch", "5 (4.5–6)", "2.50x", "25% copy, 58% read", *rest, "yes"]
    liger = ["**liger**", "**1.5 (1.35–1.8)**", "**0.75x**", "62% copy, 58% read", *rest, "no"]
    assert line(page, f"{BACKWARD} |") == [BACKWARD, *mine]
    assert line(page, " | torch") == ["", *torch]
    assert line(page, " | **liger**") == ["", *liger]


def test_who_is_faster_stands_at_the_top(root) -> None:
    """Also where ours did not run at all; and who is not faster does not."""
    failed = {"case": FORWARD, "provider": "ours", "not_measured": "out of memory"}
    write(
        root,
        "gather",
        [failed, *(measured(FORWARD, x, ms) for x, ms in (("trl", 4.0), ("torch", 3.0))), *GATHER],
    )
    _, page = pages(root)
    assert (
        f"""of 1 cases in which ours and another ran:

- gather, {FORWARD}: torch takes 3 ms, ours is not measured: out of memory
- gather, {BACKWARD}: liger takes 1.5 ms, 1.33x as fast as ours

"""
        in page
    )
    assert line(page, " | torch | 3 (2.7–3.6)")[3] == "-"  # of nothing it is no multiple


def test_nobody_faster_is_said_too(root) -> None:
    write(root, "gather", GATHER[:2])
    assert "of 1 cases in which ours and another ran:\n\nNowhere.\n" in pages(root)[1]


def test_the_source_of_the_numbers_is_named(root) -> None:
    write(root, "gather", GATHER)
    write(root, "linear", LINEAR, commit="def5678")
    readme, page = pages(root)
    for commit, bench in ("abc1234", "gather"), ("def5678", "linear"):
        assert (
            f"""
NVIDIA H200, driver 570.1, commit {commit}, sources 0123456789abcdef, date 2026-01-02, \
python 3.12.1, torch 2.11.0, liger 0.6:

- [{bench}.json](nvidia-h200/{bench}.json): `python -m bench.bench_gather`
"""
            in page
        )
    assert "Absent: verl (not installed).\n" in page
    assert "Same-run rates: copy 4200 GB/s, cuBLAS 8x9x7 742 TFLOP/s.\n" in page
    made = "by `make first` or `make gpu`, as each\nfile says."
    assert f"NVIDIA H200, commit abc1234, def5678, 2026-01-02, {made}" in readme


def test_the_readme_shows_the_step_with_gradients_of_each_bench(root) -> None:
    write(root, "gather", GATHER)
    readme, _ = pages(root)
    file = "[gather.json](bench/results/nvidia-h200/gather.json)"
    start = f"[gather](bench/bench_gather.py), {BACKWARD}"
    assert line(readme, start) == [start, "2", "62% copy, 58% read", "**liger 1.5**", file]
    start = f"[linear](bench/bench_linear.py), {PRODUCT}"
    assert line(readme, start) == [start, *3 * ["not measured"], "-"]
    assert FORWARD + " |" not in readme
    assert len(all_cases()) <= 12  # rows: more would be no summary


def test_what_is_missing_is_a_dash_or_a_reason(root) -> None:
    """A case without a row, rows with few figures, reasons that Markdown would take for its own."""
    bare = {"case": PRODUCT, "provider": "ours", "ms": 0.1234, "tokens_s": 51234.5, "ms_p20": None}
    odd = {"case": PRODUCT, "provider": "trl", "not_measured": "TypeError: int | <class>"}
    write(root, "linear", [bare, odd])
    _, page = pages(root)
    dashes = ["-"] * 3
    assert line(page, PRODUCT) == [
        PRODUCT,
        "ours",
        "0.123",
        "1.00x",
        *dashes,
        "51234",
        *dashes,
        "-",
    ]
    assert r" | trl | not measured: TypeError: int \| &lt;class> | - |" in page
    assert line(page, f"{FORWARD} |")[:4] == [FORWARD, "ours", "not measured: no run yet", "-"]


def test_work_that_a_provider_repeats_is_said(root) -> None:
    write(root, "linear", LINEAR)
    assert line(pages(root)[0], "[linear]")[2] == "40% cuBLAS, 53% with what it repeats"


def test_each_gpu_has_a_section_and_the_readme_the_newest(root) -> None:
    write(root, "gather", GATHER, gpu="a100", date="2026-01-01")
    write(root, "gather", [measured(BACKWARD, "ours", 7.5)], gpu="b200", date="2026-03-01")
    readme, page = pages(root)
    assert line(readme, "[gather]")[1] == "7.5" and "bench/results/b200/gather.json" in readme
    assert page.index("(b200/gather.json)") < page.index("(a100/gather.json)")


def test_figures_are_drawn_and_linked_and_are_the_same_again(root, monkeypatch) -> None:
    monkeypatch.undo()
    write(root, "gather", GATHER)
    write(root, "linear", LINEAR)
    folder = root / "bench/results/nvidia-h200"
    _, page = pages(root)
    drawn = {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    assert set(drawn) == {"roofline.svg", "fractions.svg"}
    links = set(re.findall(r"\]\(([^)]+)\)", page)) - {"../../docs/bench.md"}
    assert links and all((root / "bench/results" / link).exists() for link in links)
    pages(root)
    assert drawn == {path.name: path.read_bytes() for path in folder.glob("*.svg")}


def test_points_and_bars_are_of_ours_and_the_best_other() -> None:
    """1.58 TFLOP in 4 ms are 395 TFLOP/s, at 1580 FLOP per byte; in 5 ms 316."""
    slow, slower = (LINEAR[0] | {"provider": x, "ms": ms} for x, ms in (("a", 5.0), ("b", 9.0)))
    tables = {"gather": [GATHER], "linear": [[*LINEAR, slower, slow]]}
    assert figures.points(tables) == {"linear": [pytest.approx((1580.0, 395.0, 316.0))]}
    (label, rows), (of_gemm, _) = figures.bars(tables)
    assert rows == [("ours", 0.62), ("torch", 0.248), ("liger", 0.62)]
    assert label == f"gather, {BACKWARD}\n(of copy)" and of_gemm.endswith("(of cuBLAS)")


def test_check_finds_a_number_that_no_file_holds(root, capsys) -> None:
    write(root, "gather", GATHER)
    pages(root)
    capsys.readouterr()
    assert report.main(["--check"], root, CASES) == 0 and not capsys.readouterr().out
    for page in root / "README.md", root / "bench/results/README.md":
        true = page.read_text()
        page.write_text(true.replace("1.5", "2.5"))
        assert report.main(["--check"], root, CASES) == 1
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"{page.relative_to(root)}: not what")
        assert "2.5" in page.read_text()  # checking writes nothing
        page.write_text(true)
    write(root, "gather", GATHER[:2])
    assert report.main(["--check"], root, CASES) == 1


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "JSONDecodeError"), ('{"where": {}}', "KeyError"), ("[]", "TypeError"),
        (json.dumps(HEAD | {"rows": [{"case": "a", "provider": "b"}]}), "a, b: one of ms"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named(root, capsys, content, reason) -> None:
    write(root, "gather", [])
    (root / "bench/results/nvidia-h200/gather.json").write_text(content)
    assert report.main([], root, CASES) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "gather.json is no result file" in said and reason in said


def test_a_readme_without_marks_is_refused(root, capsys) -> None:
    (root / "README.md").write_text("<!-- bench -->\n")
    assert report.main([], root, CASES) == 1
    assert "0 places between" in capsys.readouterr().err
    assert not (root / "bench").exists()


def test_the_committed_pages_are_what_the_files_give(capsys) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out
    folder = ROOT / "bench/results"
    for link in re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text()):
        assert (folder / link).exists(), f"bench/results/README.md links to {link}"
