"""python -m bench.first: what a GPU should be asked first, in four minutes. What `make first` runs.

    rates       of this card: copy, sum, cuBLAS, a launch
    suspicions  what only a GPU can tell (bench/suspicions.py): PASS or FAIL, with its number
    ops         the first case of every op: time, share of the floor, launches, error
    decode      tokens a second of 1.3B at 64 and 256 rows, and what the GPU does in a step
    iteration   one warm and the timed PPO iterations of 1.3B, by phase; where the time of one goes
    split       the same model at tp 2, two gloo ranks on the one GPU, beside tp 1

Every section is a process, started before its turn, so that the GPU does not wait for imports: all
of them at once where there are cores enough, else one ahead. In its turn each has a share of the
time that is left.
What hangs is ended; what was not reached is named. A row is one flushed line. Rows are written as
the other benches write them, bench/results/<gpu>/<bench>.json, findings to first.json beside them,
and all of it goes into one tar after each section.
Exits 1 when a suspicion is confirmed or something of ours failed, 2 without a GPU.
"""

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.rows import (
    MARK,
    READY,
    ROOT,
    Row,
    end_sections_too,
    is_ours,
    load,
    require_gpu,
    verdict,
)

LIMIT = 240  # seconds in all
GRACE = 5  # seconds that a section may overrun its share, to end the row that it is at
IMPORTS = 45  # seconds that a section may import; on two busy cores Megatron takes 35
SECTIONS = {  # seconds that each would like; what one leaves, the others have
    "rates": 15, "suspicions": 40, "ops": 60, "decode": 50, "iteration": 60, "split": 15,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.first",
        description="Asks a GPU what matters most, in four minutes. Exits 1 when a suspicion is "
        "confirmed or something of ours failed, 2 without a GPU.",
    )
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any machine")
    parser.add_argument("--out", type=Path, help="folder of the results [bench/results]")
    parser.add_argument("--tar", type=Path, help="all files in one [first.tar.gz in OUT]")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds in all [%(default)s]")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS),
        help="sections to run [all]; docs/bench.md says what they are",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    end = time.time() + options.limit
    end_sections_too()
    if not options.tiny:
        require_gpu()
    from bench.harness import RESULTS, commit

    if options.tiny and (options.out is None or options.out.resolve() == RESULTS):
        parser.error("--tiny times nothing in earnest; give it an --out of its own")
    out = options.out or RESULTS
    os.environ["COMMIT"] = commit() or ""  # before the results make the tree a dirty one
    files = Files(out, options.tar or out / "first.tar.gz")
    try:
        ask(options.only, options.tiny, end, files)
    finally:
        files.pack()
    print("\n".join(["", *files.summary(), f"{time.time() - end + options.limit:.0f} s"]))
    sys.exit(bool(files.failures()))


def ask(names: Sequence[str], tiny: bool, end: float, files: "Files") -> None:
    """Give every section its turn, and its share of the time until `end`."""
    ahead = len(names) if (os.cpu_count() or 1) > len(names) else 2
    processes: list[Process] = []
    try:
        for i, name in enumerate(names):
            processes += [Process(other, tiny) for other in names[len(processes) : i + ahead]]
            ready = processes[i].wait(min(IMPORTS, end - time.time()))
            left = end - time.time()
            seconds = left * SECTIONS[name] / sum(SECTIONS[other] for other in names[i:])
            files.say(f"\n== {name}: {seconds:.0f} s of {left:.0f} s")
            files.begin(name)
            if not ready:
                processes[i].kill()
            files.end(processes[i].run(seconds, files.take) if ready else "out of time to begin")
            files.pack()
    finally:
        for process in processes:
            process.kill()


class Process:
    """A section's process: started, and waiting for its turn."""

    def __init__(self, name: str, tiny: bool) -> None:
        command = [sys.executable, "-u", "-m", "bench.sections", name]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [*command, *["--tiny"] * tiny], cwd=ROOT, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace",
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.ready = threading.Event()  # it waits for its turn, or has ended
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if READY in line:
                self.ready.set()
            else:
                self.lines.put(line.rstrip("\n"))
        self.lines.put(None)
        self.ready.set()

    def wait(self, seconds: float) -> bool:
        """Until it has imported what it needs; whether it has in so many seconds."""
        return self.ready.wait(max(0.0, seconds))

    def run(self, seconds: float, take: Callable[[str], None]) -> str:
        """Its turn. Hands over its lines; why it did not come to its end, or ""."""
        end = time.time() + seconds
        try:
            self.process.stdin.write(f"{end}\n")
            self.process.stdin.flush()
        except OSError:  # it died before; its lines say why
            pass
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end + GRACE - time.time()))
            except queue.Empty:
                self.kill()
                return f"out of time: ended after {seconds + GRACE:.0f} s"
            if line is None:
                status = self.process.wait()
                self.kill()  # what it may have left running
                return "" if status == 0 else f"the process ended with {status}"
            take(line)

    def kill(self) -> None:
        """It and what it started: nothing is left on the GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
            self.process.wait(GRACE)


class Files:
    """What the sections told, on the screen and in files."""

    def __init__(self, out: Path, tar: Path) -> None:
        self.out, self.tar = out, tar
        self.folder: Path | None = None  # of this GPU's results, once a section has named it
        self.contents: dict[str, dict[str, Any]] = {}  # by bench
        self.pages: dict[str, str] = {}  # by file name
        self.before: dict[str, int] = {}  # measured rows of the files that were there, by bench
        self.log: list[str] = []
        self.due: list[tuple[str, str]] = []  # bench and case of what a section has yet to tell
        self.where: dict[str, Any] = {}
        self.section = ""  # whose turn it is
        self.crashes: list[tuple[str, str]] = []  # sections that ended badly, and how

    def say(self, line: str) -> None:
        self.log.append(line)
        print(line, flush=True)

    def begin(self, section: str) -> None:
        """Until it tells its plan, a section is known by its name."""
        self.section = section
        self.due = [("first", section)]

    def take(self, line: str) -> None:
        """A line of a section: a record, and what it or a library prints besides or before."""
        text, mark, rest = line.partition(MARK)
        if text:
            self.say(f"     {text}")
        if not mark:
            return
        record = json.loads(rest)
        if "plan" in record:
            self.due = [(x["bench"], x["case"]) for x in record["plan"]]
            self.folder, self.where = self.out / record["gpu"], record["where"]
        elif "page" in record:
            self.pages[record["page"]] = record["text"]
        else:
            self.add(record["bench"], record["row"], record["rates"])

    def add(self, bench: str, row: Row, rates: dict[str, float]) -> None:
        from bench.harness import line

        self.due = [x for x in self.due if x != (bench, row["case"])]
        empty = {"where": self.where, "rates": {}, "absent": {}, "rows": [], "findings": []}
        content = self.contents.setdefault(bench, empty)
        content["rates"] |= rates
        content["findings" if bench == "first" else "rows"].append(row)
        self.say(line_of_finding(row) if "seen" in row else line(row) + more(row))

    def end(self, reason: str) -> None:
        """A section is over: what it has not told is named, and a crash in any case."""
        if reason and not self.due:
            self.say(f"     {reason}")
        if reason and not reason.startswith("out of time"):
            self.crashes.append((self.section, reason))
        for bench, case in self.due:
            why = reason or "its section ended without it"
            self.add(bench, {"case": case, "provider": "ours", "not_measured": why}, {})

    def pack(self) -> None:
        """Write the files, and the tar of all of them. A file that holds more, of `make gpu`,
        stays: ours goes into a folder beside it."""
        folder = self.folder or self.out
        texts = dict(self.pages)
        for bench, content in self.contents.items():
            if measured_rows(content):
                texts[f"{bench}.json"] = json.dumps(content, indent=1) + "\n"
        texts["first.log"] = "\n".join(self.log) + "\n"
        self.tar.parent.mkdir(parents=True, exist_ok=True)
        draft = self.tar.with_name(self.tar.name + ".draft")
        with tarfile.open(draft, "w:gz") as tar:
            for name, text in texts.items():
                path, bench = folder / name, name.removesuffix(".json")
                if bench in self.contents and self.is_fuller(bench, path):
                    path = folder / "first" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                tar.add(path, f"{folder.name}/{name}")
        draft.rename(self.tar)

    def is_fuller(self, bench: str, path: Path) -> bool:
        """Whether the file that was there before ours holds more measured rows than we have."""
        if bench not in self.before:
            self.before[bench] = 0
            if path.is_file():
                with suppress(ValueError):  # no result file at all
                    self.before[bench] = measured_rows(load(path))
        return self.before[bench] > measured_rows(self.contents[bench])

    def rows(self) -> Iterator[Row]:
        for content in self.contents.values():
            yield from [*content["rows"], *content["findings"]]

    def failures(self) -> list[Row]:
        """Suspicions confirmed, and rows of ours that are missing for another reason than time,
        memory or a package."""
        excuses = ("out of time", "out of memory", "No module named", "lost", "needs a GPU")
        crashed = [
            {"case": name, "provider": "ours", "not_measured": why} for name, why in self.crashes
        ]
        return crashed + [
            row for row in self.rows()
            if row.get("passed") is False
            or is_ours(row["provider"])
            and not row.get("not_measured", excuses[0]).startswith(excuses)
        ]  # fmt: skip

    def summary(self) -> list[str]:
        findings = [row for row in self.rows() if "passed" in row]
        missing = [row for row in self.rows() if "not_measured" in row]
        return [
            f"{sum(row['passed'] for row in findings)} of {len(findings)} suspicions unfounded",
            *(f"FAIL {row['case']}: {row['seen']}" for row in findings if not row["passed"]),
            *(f"not measured: {row['case']}: {row['not_measured']}" for row in missing),
            f"files in {self.folder or self.out}, all of them in {self.tar}",
        ]


def measured_rows(content: Mapping[str, Any]) -> int:
    return sum("ms" in row for row in [*content["rows"], *content.get("findings", ())])


def line_of_finding(row: Row) -> str:
    return f"{verdict(row):4} {row['case']:39} {row['seen']}"


def more(row: Row) -> str:
    """What the line of a row does not say, where it is known."""
    parts = {
        "launches": "{:.0f} launches", "host_us": "host {:.0f} us", "gpu_us": "GPU {:.0f} us",
        "tokens_s": "{:.0f} tokens/s", "tflop_s": "{:.0f} TFLOP/s", "gb_s": "{:.0f} GB/s",
        "peak_mb": "{:.0f} MB", "predicted_mb": "predicted {:.0f} MB",
    }  # fmt: skip
    return "".join(", " + text.format(row[key]) for key, text in parts.items() if key in row)


if __name__ == "__main__":
    main()
