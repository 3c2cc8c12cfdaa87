"""python -m bench.compare OLD NEW [--tolerance 0.05]: what changed between two runs on one GPU.

OLD and NEW are result files of one bench, or folders of them, as bench/results/<gpu>. Exits 1 when
a row of ours became slower, by more than the tolerance and beyond both spreads, needs more memory
or launches, errs more, or was measured in OLD and is not in NEW (unless NEW's time was out); 2 when
the two cannot be compared. Rows of others never fail: they show what the machine does by itself.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.rows import Row, is_ours, load

SMALL_MB = 0.01  # the allocator rounds up to 512 bytes: growth below this is no growth
SMALL_ERROR = 1e-6  # a few roundings of fp32: errors below this are the same error
Rows = dict[tuple[str, str, str], Row]  # by bench, case and provider


def main(arguments: Sequence[str] | None = None) -> int:
    about = "What changed between two runs on one GPU. Exits 1 when something of ours became worse."
    parser = argparse.ArgumentParser("python -m bench.compare", description=about)
    parser.add_argument(
        "old", type=Path, help="a result file, or a folder such as bench/results/GPU"
    )
    parser.add_argument("new", type=Path, help="the same of a later run")
    parser.add_argument("--tolerance", type=float, default=0.05, help="relative [%(default)s]")
    options = parser.parse_args(arguments)
    try:
        before, after = files(options.old), files(options.new)
        check_alike(before, after)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    old, new = rows(before), rows(after)
    lines, failed = [], 0
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, {}), new.get(key, {})
        worse = worsened(a, b, options.tolerance)
        failed += bool(worse and is_ours(key[2]))
        if changed := worse or changes(a, b, options.tolerance):
            mark = "WORSE: " if worse and is_ours(key[2]) else ""
            lines.append((", ".join(key), *figures(a, b), mark + ", ".join(changed)))
    show([("case", "ms", "MB", "error", ""), *lines] if lines else [])
    added = len(set(new) - set(old))
    print(f"{len(old) - len(lines)} rows are as before, {len(lines)} changed, {added} are new")
    print(others_moved(before, after), end="")
    print(f"{failed} of ours became worse" if failed else "none of ours became worse")
    return int(bool(failed))


def files(path: Path) -> dict[str, dict[str, Any]]:
    """Contents by bench. Raises ValueError with what is wrong in one line."""
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"{path} holds no result files; a folder is that of one GPU")
    return {bench_of(p, content): content for p in paths for content in [load(p)]}


def bench_of(path: Path, content: Mapping[str, Any]) -> str:
    """The bench that wrote the file, which may have been renamed since."""
    command = re.search(r"\bbench_(\w+)", content["where"].get("command", ""))
    return command[1] if command else path.stem


def check_alike(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises ValueError unless both come from one GPU and NEW has every bench of OLD."""
    gpus = [{x["where"]["gpu"] for x in run.values()} for run in (before, after)]
    if len(gpus[0] | gpus[1]) > 1:
        names = [" and ".join(sorted(x)) for x in gpus]
        raise ValueError(f"different GPUs: {names[0]} before, {names[1]} after")
    if missing := set(before) - set(after):
        found = ", ".join(sorted(after))
        raise ValueError(f"different benches: no {', '.join(sorted(missing))} after, but {found}")


def rows(run: Mapping[str, dict[str, Any]]) -> Rows:
    return {
        (bench, row["case"], row["provider"]): row
        for bench, content in run.items() for row in content["rows"]
    }  # fmt: skip


def worsened(a: Row, b: Row, tolerance: float) -> list[str]:
    """What is worse in row b than it was in row a."""
    if "ms" not in a:
        return []
    if "ms" not in b:
        reason = b.get("not_measured", "not in the file")
        return [] if reason == "out of time" else [f"not measured now: {reason}"]
    more = 1 + tolerance
    slower = b["ms"] > more * a["ms"]
    beyond_spreads = b.get("ms_p20", b["ms"]) > a.get("ms_p80", a["ms"])
    tests = {
        "slower": slower and beyond_spreads,
        "more memory": grew(a, b, "peak_mb", more, SMALL_MB),
        "more launches": grew(a, b, "launches", 1, 0),
        "larger error": grew(a, b, "error", 2, SMALL_ERROR),
    }
    return [what for what, is_so in tests.items() if is_so]


def grew(a: Row, b: Row, key: str, times: float, small: float) -> bool:
    """Where both have the figure; nothing `small` has grown."""
    return key in a and key in b and b[key] > max(times * a[key], small)


def changes(a: Row, b: Row, tolerance: float) -> list[str]:
    """What else is to be shown: what became better, what is within the spreads, what is new."""
    if "ms" not in a:
        return ["measured now"] if a and "ms" in b else []
    if "ms" not in b:
        return [b["not_measured"]]
    more = 1 + tolerance
    if b["ms"] > more * a["ms"]:
        return ["slower within the spreads"]
    tests = {
        "faster": a["ms"] > more * b["ms"],
        "less memory": grew(b, a, "peak_mb", more, SMALL_MB),
        "smaller error": grew(b, a, "error", 2, SMALL_ERROR),
    }
    return [what for what, is_so in tests.items() if is_so]


def figures(a: Row, b: Row) -> list[str]:
    """Before -> after of the time with its factor, the memory and the error."""

    def pair(key: str) -> str:
        return " -> ".join(f"{row[key]:.4g}" if key in row else "-" for row in (a, b))

    factor = f" ({b['ms'] / a['ms']:.2f}x)" if "ms" in a and "ms" in b else ""
    return [pair("ms") + factor, pair("peak_mb"), pair("error")]


def show(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(x.ljust(width) for x, width in zip(line, widths)).rstrip())


def others_moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """A line when all who are the same as before became slower, or all faster: the machine did.

    Whoever has a package of another version is not the same, and with another torch or triton
    nobody is.
    """
    ratios = []
    for bench in set(before) & set(after):
        versions = [run[bench]["where"].get("versions", {}) for run in (before, after)]
        other = {name for name, _ in versions[0].items() ^ versions[1].items()}
        old, new = (rows({bench: run[bench]}) for run in (before, after))
        for key in set(old) & set(new):
            name = re.split(r"\W", key[2])[0]  # "liger" of "liger, chunked", of liger-kernel
            same = not any(p in ("torch", "triton") or p.startswith(name) for p in other)
            if same and name != "ours" and "ms" in old[key] and "ms" in new[key]:
                ratios.append(new[key]["ms"] / old[key]["ms"])
    if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios):
        return ""
    how = "slower" if min(ratios) > 1 else "faster"
    return (
        f"all {len(ratios)} rows of others, whose versions did not change, became {how}"
        f" (median {statistics.median(ratios):.2f}x): the machine, not our code\n"
    )


if __name__ == "__main__":
    sys.exit(main())
