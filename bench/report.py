"""python -m bench.report [--check]: the tables of bench/results/README.md and of README.md, and the
figures, from the result files and the cases of the benches alone.

So no number stands there without its file; `--check` exits 1 where a page says anything else. A
case that no file holds is "not measured". Each GPU has a section, the newest first: that with the
latest `date` in a file, and of equals the first by name. README.md shows the newest, one row a
bench: its first case that goes on to the gradients, as training does, or else its first.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import figures
from bench.rows import (
    ROOT,
    Benches,
    Files,
    Group,
    Row,
    Tables,
    all_cases,
    faster,
    firsts,
    newest_first,
    others,
    ours,
    tables_of,
    verdict,
)

MARKED = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
COPY_TB_S, GEMM_TFLOP_S = 4.3, 790  # assumed of an H200, where nothing is measured


def main(
    arguments: Sequence[str] | None = None, root: Path = ROOT, benches: Benches | None = None
) -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.report", description="Tables and figures from the result files."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    check = parser.parse_args(arguments).check
    results, readme = root / "bench/results", root / "README.md"
    benches = all_cases() if benches is None else benches
    try:
        gpus = newest_first(results)
        section = readme_section(gpus, benches)
        pages = {
            results / "README.md": results_page(gpus, benches),
            readme: with_marked(readme, section),
        }
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    if check:
        stale = [p for p, text in pages.items() if not p.exists() or p.read_text() != text]
        if stale:
            names = " and ".join(str(p.relative_to(root)) for p in stale)
            print(f"{names}: not what the files and cases give; run python -m bench.report")
        return int(bool(stale))
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for gpu, files in gpus.items():
        figures.draw(results / gpu, tables_of(files, benches), [x["rates"] for x in files.values()])
    print(section)
    return 0


# Cells and tables.


def number(x: float | None) -> str:
    """Three digits that count; no exponent where a reader can do without."""
    return "-" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def ms(row: Row) -> str:
    if "ms" not in row:
        return f"not measured: {row['not_measured']}"
    spread = [number(row[key]) for key in ("ms_p20", "ms_p80") if key in row]
    if row.get("calls") == 1:
        spread = ["one call"]
    return number(row["ms"]) + (f" ({'–'.join(spread)})" if spread else "")


def rate(row: Row) -> str:
    """Of what the machine did in the same process."""
    names = {"of_copy": "copy", "of_read": "read", "of_gemm": "cuBLAS"}
    parts = [f"{row[key]:.0%} {name}" for key, name in names.items() if key in row]
    if row.get("of_gemm_done", 0) > 1.001 * row.get("of_gemm", 0):
        parts.append(f"{row['of_gemm_done']:.0%} with what it repeats")
    return ", ".join(parts) or "-"


def floor_ms(row: Row) -> str:
    """An estimate: neither faster than a copy of the bytes nor than the products alone."""
    seconds = max(row.get("bytes", 0) / COPY_TB_S, row.get("flops", 0) / GEMM_TFLOP_S) / 1e12
    return "-" if not seconds else "< 0.001" if seconds < 1e-6 else number(1e3 * seconds)


def cells(row: Row, base: Row) -> dict[str, str]:
    both = "ms" in row and "ms" in base
    return {
        "provider": row["provider"],
        "ms (p20–p80)": ms(row),
        "x of ours": f"{row['ms'] / base['ms']:.2f}x" if both else "-",
        "of the same-run rate": rate(row),
        "error": f"{row['error']:.1e}" if "error" in row else "-",
        "MB": number(row.get("peak_mb")),
        "MB predicted": number(row.get("predicted_mb")),
        "tokens/s": number(row.get("tokens_s")),
        "launches": number(row.get("launches")),
        "GPU µs in them": number(row.get("gpu_us")),
        "host µs": number(row.get("host_us")),
        "in place": {True: "yes", False: "no", None: "-"}[row.get("in_place")],
    }


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """In Markdown; the keys of the first row are its head."""
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *([row[key] for key in head] for row in rows)]
    safe = [[x.replace("|", r"\|").replace("<", "&lt;") for x in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in safe)


def measured_table(groups: Sequence[Group]) -> str:
    """One case a group, named in its first row; bold is what is faster than ours."""
    rows = []
    for group in groups:
        for row in group:
            found = cells(row, ours(group))
            if row in faster(group):
                found |= {key: f"**{found[key]}**" for key in list(found)[:3]}
            rows.append({"case": row["case"] if row is group[0] else ""} | found)
    for rare in ("MB predicted", "tokens/s"):
        if all(row[rare] == "-" for row in rows):
            rows = [{key: x for key, x in row.items() if key != rare} for row in rows]
    return table(rows)


def findings_table(findings: Sequence[Row]) -> str:
    """Of bench.first: rates of the machine, and what was suspected of our code."""
    return table([
        {
            "": verdict(row), "question": row["case"],
            "seen": row.get("seen") or f"not measured: {row['not_measured']}",
        }
        for row in findings
    ])  # fmt: skip


def estimated_table(groups: Sequence[Group]) -> str:
    return table([
        {
            "case": row["case"] if row is group[0] else "", "provider": row["provider"],
            "ms": "not measured", "MB, at least": number(row["bytes"] / 1e6 or None),
            "GFLOP, at least": number(row["flops"] / 1e9 or None),
            "estimate of the least, ms": floor_ms(row),
        }
        for group in groups for row in group
    ])  # fmt: skip


# Pages.

NOTHING = "No speed has been measured on a GPU yet."
ESTIMATE = f"""The estimate is arithmetic for an H200, not a result: the least bytes that the case
must move at an assumed {COPY_TB_S} TB/s, or its least FLOPs at {GEMM_TFLOP_S} TFLOP/s,
whichever takes longer."""
LEGEND = """
A row is a provider of a case. *ms* is the median of calls that follow one another on the GPU, with
the 20th and 80th percentile. *x of ours* is its time over ours: below 1 it is **faster**. *Of the
same-run rate*: the least bytes of the case per second over those of a device copy, and of a sum,
which only reads; or its least FLOPs per second over those of cuBLAS in the same shape, all in one
process. "With what it repeats" counts the FLOPs that the provider does. *Error* is the largest
||result - truth|| / ||truth|| against float64. *MB* is the peak beyond the inputs, *launches* are
kernels, fills and copies, *host µs* is what a call keeps the host, *in place* that it overwrites an
input. A dash: no figure. More: [docs/bench.md](../../docs/bench.md).
"""


def results_page(gpus: Mapping[str, Files], benches: Benches) -> str:
    page = (
        "# Speed\n\nWritten by `python -m bench.report` from the files beside it, which come from"
    )
    page += " the commands that it names; no number is typed.\n"
    if gpus:
        sections = (gpu_section(gpu, x, tables_of(x, benches)) for gpu, x in gpus.items())
        return "".join([page, LEGEND, *sections])
    page += f"\n{NOTHING} {ESTIMATE}\n"
    for bench, groups in tables_of({}, benches).items():
        page += f"\n## {bench}\n\n{estimated_table(groups)}"
    return page


def gpu_section(gpu: str, files: Files, tables: Tables) -> str:
    made: dict[str, list[str]] = {}  # the files of each origin
    for bench, content in files.items():
        command = content["where"].get("command", "command unknown")
        link = f"- [{bench}.json]({gpu}/{bench}.json): `{command}`\n"
        made.setdefault(origin(content["where"]), []).append(link)
    absent = {f"{peer} ({why})" for x in files.values() for peer, why in x["absent"].items()}
    section = f"\n## {gpu_of(files)}\n\n{faster_others(tables)}"
    section += "".join(f"\n![{alt}]({gpu}/{name})\n" for name, alt in figures.names(tables).items())
    section += "".join(f"\n{what}:\n\n{''.join(links)}" for what, links in made.items())
    section += f"\nAbsent: {'; '.join(sorted(absent)) or 'nothing'}.\n"
    for bench, groups in tables.items():
        section += f"\n### {bench}\n\n"
        if bench in files:
            section += f"Same-run rates: {same_run(files[bench]['rates'])}.\n\n"
        section += measured_table(groups)
        if findings := files.get(bench, {}).get("findings"):
            section += findings_table(findings)
    return section


def gpu_of(files: Files) -> str:
    return next(iter(files.values()))["where"]["gpu"]


def origin(where: Mapping[str, Any]) -> str:
    """What made the numbers, but for the command."""
    names = ("driver", "cuda", "commit", "sources", "date", "python")
    parts = [f"{name} {where[name]}" for name in names if where.get(name)]
    parts += [f"{package} {version}" for package, version in where.get("versions", {}).items()]
    return ", ".join([where["gpu"], *parts])


def same_run(rates: Mapping[str, float]) -> str:
    names = {"copy_gb_s": "copy {} GB/s", "read_gb_s": "read {} GB/s"}
    names |= {key: f"cuBLAS {key[13:]} {{}} TFLOP/s" for key in rates if key.startswith("gemm_")}
    parts = [names.get(key, key + " {}").format(number(x)) for key, x in rates.items()]
    return ", ".join(parts) or "none"


def faster_others(tables: Tables) -> str:
    """Every case in which somebody was faster than ours, or ours did not run and somebody did."""
    lines, both = [], 0
    for bench, groups in tables.items():
        for group in groups:
            base = ours(group)
            both += "ms" in base and bool(others(group))
            for row in faster(group) if "ms" in base else others(group)[:1]:
                line = f"- {bench}, {row['case']}: {row['provider']} takes {number(row['ms'])} ms"
                how = f"{base['ms'] / row['ms']:.2f}x as fast as ours" if "ms" in base else ""
                lines.append(f"{line}, {how or f'ours is {ms(base)}'}")
    body = "\n".join(lines) or "Nowhere."
    return f"Where peers are faster, of {both} cases in which ours and another ran:\n\n{body}\n"


def readme_section(gpus: Mapping[str, Files], benches: Benches) -> str:
    gpu, files = next(iter(gpus.items()), ("", {}))
    rows = table([
        headline(bench, group, files, f"bench/results/{gpu}/{bench}.json")
        for bench, groups in tables_of(files, benches).items() for group in firsts(groups)[-1:]
    ])  # fmt: skip
    if not files:
        return f"""{NOTHING} `make gpu` on a machine with one runs the
kernel tests, checks every op and its peers against float64, times them, and writes the files,
tables and figures of [bench/results](bench/results/README.md).

{rows}
{ESTIMATE}
"""
    commits, dates = (
        ", ".join(sorted({x["where"].get(key) or "unknown" for x in files.values()}))
        for key in ("commit", "date")
    )
    return f"""{rows}
{gpu_of(files)}, commit {commits}, {dates}, by `make first` or `make gpu`, as each
file says. Bold is faster than ours; rates are of the same process. Every case and provider, errors
and memory: [bench/results](bench/results/README.md).
"""


def headline(bench: str, group: Group, files: Files, path: str) -> dict[str, str]:
    base, best = ours(group), next(iter(others(group)), None)
    missing = "" if "ms" in base else "not measured"
    other = f"{best['provider']} {number(best['ms'])}" if best else missing or "-"
    case = f"[{bench}](bench/bench_{bench}.py), {group[0]['case']}"
    if not files:
        floor = floor_ms(base)
        return {"op and case": case, "ours, ms": missing, "estimate of the least, ms": floor}
    return {
        "op and case": case,
        "ours, ms": missing or number(base["ms"]),
        "of the same-run rate": missing or rate(base),
        "fastest other, ms": f"**{other}**" if faster(group) else other,
        "file": f"[{bench}.json]({path})" if bench in files else "-",
    }


def with_marked(page: Path, text: str) -> str:
    """The page with the text between its marks."""
    whole, n = MARKED.subn(lambda _: text, page.read_text())
    if n != 1:
        raise ValueError(f"{page} has {n} places between <!-- bench --> and <!-- /bench -->, not 1")
    return whole


if __name__ == "__main__":
    sys.exit(main())
