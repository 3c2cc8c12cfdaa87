"""What the result files and the benches say, for report.py, figures.py and compare.py.

A row is what bench/harness.py writes of one provider of one case: "ms" and more, or "not_measured".
"""

import importlib
import json
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# The benches in the order of their weight; of the time that one command has, so much each.
SHARES = {
    "logprob": 4, "linear_logprob": 4, "linear_loss": 3, "advantages": 2, "ppo_loss": 1,
    "iteration": 8, "decode": 3, "exact_kl": 2, "kl": 1, "ranking": 1,
}  # fmt: skip
NO_RUN = "no run yet"
MARK = "\x1e"  # begins a line of bench.sections that is a record in JSON
READY = f"{MARK}ready\n"  # what it says when it waits for its turn
Row = dict[str, Any]  # "case", "provider", and "ms" with more, or "not_measured"
Group = list[Row]  # the rows of one case, ours first
Tables = Mapping[str, Sequence[Group]]  # by bench
Benches = Mapping[str, Sequence[Any]]  # cases by bench
Files = Mapping[str, dict[str, Any]]  # the content of the result files by bench


def require_gpu() -> None:
    """Exits 2 on a machine without one, or when this Python cannot tell."""
    try:
        from bench import harness
    except ModuleNotFoundError as problem:
        print(
            f"no GPU that {sys.executable} can see: {problem}\n"
            "make setup installs what is needed; PYTHON=... names another Python",
            file=sys.stderr,
        )
        sys.exit(2)
    harness.require_gpu()


def end_sections_too() -> None:
    """Let SIGTERM, of `timeout` or a scheduler, end this program as an exception does: what it
    started has a session of its own, and would stay on the GPU."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def benches() -> list[str]:
    """The names of all bench/bench_*.py, in the order of SHARES."""
    names = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py"))
    return sorted(names, key=[*SHARES, *names].index)


def all_cases() -> Benches:
    """Of every bench, in the sizes of a GPU."""
    return {
        name: list(importlib.import_module(f"bench.bench_{name}").cases(False))
        for name in benches()
    }


def load(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError, which names it, when it is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text())
        where, rows = content["where"], content["rows"]
        content["rows"] = [{key: x for key, x in row.items() if x is not None} for row in rows]
        for part in where, content["rates"], content["absent"]:
            part.items()
        where["gpu"].lower()
        for row in content["rows"]:
            name = f"{row['case']}, {row['provider']}"
            if ("ms" in row) == ("not_measured" in row):
                raise ValueError(f"{name}: one of ms and not_measured is due")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is no result file: {problem!r}") from None
    return content


def newest_first(results: Path) -> dict[str, Files]:
    """The files of each GPU by the name of its folder."""
    gpus: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*/*.json")):
        gpus.setdefault(path.parent.name, {})[path.stem] = load(path)

    def date(gpu: str) -> str:
        return max(content["where"].get("date", "") for content in gpus[gpu].values())

    return {gpu: gpus[gpu] for gpu in sorted(gpus, key=date, reverse=True)}


def tables_of(files: Files, benches: Benches) -> Tables:
    """The groups of each bench in its own order; what no file holds is there, not measured."""
    tables = {}
    for bench in dict.fromkeys([*benches, *files]):
        groups: dict[str, dict[str, Row]] = {}
        for case in benches.get(bench, ()):
            groups[case.name] = {
                provider: {
                    "case": case.name, "provider": provider, "bytes": case.bytes,
                    "flops": case.flops, "not_measured": NO_RUN,
                }
                for provider in case.providers if is_ours(provider)
            }  # fmt: skip
        for row in files[bench]["rows"] if bench in files else ():
            groups.setdefault(row["case"], {})[row["provider"]] = row
        tables[bench] = [list(group.values()) for group in groups.values()]
    return tables


def verdict(finding: Row) -> str:
    """PASS, FAIL, or nothing where there is nothing to judge."""
    return {True: "PASS", False: "FAIL"}.get(finding.get("passed"), "")


def is_ours(provider: str) -> bool:
    """Our op as it comes, or a variant of it: "ours, save_logits"."""
    return provider.startswith("ours")


def ours(group: Group) -> Row:
    """What the others are compared with: our op as it comes, before variants of it."""
    mine = (row for row in group if is_ours(row["provider"]))
    return next(mine, {"not_measured": NO_RUN})


def others(group: Group) -> Group:
    """The measured rows that are not ours, the fastest first."""
    rows = [row for row in group if "ms" in row and not is_ours(row["provider"])]
    return sorted(rows, key=lambda row: row["ms"])


def faster(group: Group) -> Group:
    """The others that were faster than ours, by however little."""
    return [row for row in others(group) if row["ms"] < ours(group).get("ms", 0)]


def firsts(groups: Iterable[Group]) -> list[Group]:
    """The first case without gradients and the first with them, those that there are."""
    found: dict[bool, Group] = {}
    for group in groups:
        found.setdefault("backward" in group[0]["case"], group)
    return [found[key] for key in (False, True) if key in found]
