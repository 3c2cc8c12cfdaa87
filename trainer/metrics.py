"""What a run reports: a progress bar, metrics.jsonl, TensorBoard. Only rank 0 writes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tetrad.parallel.checkpoint import write_text


class Metrics:
    """One JSON object a step in OUT/metrics.jsonl, the same numbers in TensorBoard and on screen.

    Rows at or after `start` are dropped: a killed run may have logged steps that its last
    checkpoint does not hold, and takes them again.
    """

    def __init__(
        self, out: Path, name: str, start: int, steps: int, shown: tuple[str, ...]
    ) -> None:
        self.on = dist.get_rank() == 0
        self.shown = shown
        if not self.on:
            return
        path = out / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] < start]
        write_text(path, "".join(f"{row}\n" for row in kept))
        self.file = open(path, "a", buffering=1)
        self.board = SummaryWriter(str(out), purge_step=start)
        self.bar = tqdm(total=steps, initial=start, desc=name, dynamic_ncols=True, smoothing=0.1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Report step `step` (from 0)."""
        if not self.on:
            return
        row = _plain({"step": step, **values})
        self.file.write(json.dumps(row) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.bar.set_postfix({k: f"{values[k]:.4g}" for k in self.shown if k in values})
        self.bar.update()

    def close(self) -> None:
        if self.on:
            self.bar.close()
            self.board.close()
            self.file.close()


def write_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """OUT/summary.json, from rank 0."""
    if dist.get_rank() == 0:
        write_text(out / "summary.json", json.dumps(_plain(summary), indent=1) + "\n")


def read_metrics(out: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity; they are kept as words."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
