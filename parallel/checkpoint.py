"""Checkpoints that another layout can load, and that a crash never leaves half written.

    FOLDER/step_000040/            published by renaming a finished temporary folder
        state.json                 step, roles, whatever the trainer adds
        policy/ critic/ …          one Megatron distributed checkpoint a role, and model.json
    FOLDER/latest                  the name of the newest

No generator state is stored: all random numbers of a run are functions of seed, step and place.
"""

import json
import os
import queue
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import nn

from tetrad.parallel.engine import Engine
from tetrad.parallel.model import Model, unwrap
from tetrad.parallel.settings import Architecture
from tetrad.parallel.topology import Topology


def save(
    folder: Path, step: int, engines: Mapping[str, Engine], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write model and optimizer of each role; keep the newest `keep` checkpoints of the folder."""
    final, draft = folder / f"step_{step:06d}", folder / f".step_{step:06d}.writing"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        for role in engines:
            (draft / role).mkdir(parents=True)
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()  # we save in this process: no manager process
    for role, engine in engines.items():
        tree = _sharded(engine.core, engine.topology)
        if engine.optimizer:
            tree |= _sharded_optimizer(engine, tree, is_loading=False)
        dist_checkpointing.save(tree, str(draft / role), validate_access_integrity=False)
    if dist.get_rank() == 0:
        for role, engine in engines.items():
            model = {"head": engine.core.head, "architecture": asdict(engine.core.architecture)}
            _write_json(draft / role / "model.json", {**state.get("model", {}), **model})
        _write_json(draft / "state.json", {"step": step, "roles": list(engines), **state})
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _write_json(folder / "latest", final.name)
        older = [p for p in sorted(folder.glob("step_*")) if p != final]
        for old in older[: len(older) - (keep - 1)]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    pointer = folder / "latest"
    return folder / json.loads(pointer.read_text()) if pointer.exists() else None


def find(path: str, head: str | None = None) -> Path:
    """The folder of a model: `path` is that folder, a checkpoint, or a run's folder.

    Of several roles the first that has this head ("language" or "scalar"; None: any). Raises
    ValueError when there is none.
    """
    place = Path(path)
    if (place / "model.json").exists():
        candidates = [place]
    else:
        for folder in (place / "checkpoints", place):
            place = latest(folder) or place
        if not (place / "state.json").exists():
            raise ValueError(f"no checkpoint in {path}")
        candidates = [place / role for role in read_state(place)["roles"]]
    for candidate in candidates:
        if head in (None, read_model(candidate)[1]["head"]):
            return candidate
    raise ValueError(f"no model with a {head} head in {path}")


def read_state(checkpoint: Path) -> dict:
    """What the trainer stored with a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def read_model(folder: Path) -> tuple[Architecture, dict]:
    """The architecture of one role's model, and the rest of its model.json (head, tokenizer)."""
    model = json.loads((folder / "model.json").read_text())
    return Architecture(**model.pop("architecture")), model


def load_weights(model: nn.Module, topology: Topology, folder: Path) -> None:
    """Weights into a model that may have another layout than the one that saved them.

    A scalar model loaded from a language model takes the trunk and keeps its own fresh head; the
    caller decides whether that is meant, by what it asks `find` for.
    """
    core = unwrap(model)
    tree = _sharded(core, topology)
    if core.head != read_model(folder)[1]["head"]:
        tree["model"] = {k: v for k, v in tree["model"].items() if not k.startswith("output_layer")}
    loaded = dist_checkpointing.load(tree, str(folder))["model"]
    missing, unexpected = core.load_state_dict(loaded, strict=False)
    wrong = [k for k in (*missing, *unexpected) if not k.startswith("output_layer")]
    assert not wrong, f"{folder} does not fit the model: {wrong[:3]}"


def load(engine: Engine, folder: Path) -> None:
    """Weights, optimizer and schedule of one role, as they were saved."""
    assert engine.optimizer is not None
    tree = _sharded(engine.core, engine.topology)
    tree |= _sharded_optimizer(engine, tree, is_loading=True)
    loaded = dist_checkpointing.load(tree, str(folder))
    engine.core.load_state_dict(loaded["model"])
    engine.optimizer.adam.load_state_dict(loaded["optimizer"])
    engine.optimizer.schedule.load_state_dict(loaded["schedule"])


def _sharded(core: Model, topology: Topology) -> dict[str, Any]:
    return {"model": core.sharded_state_dict(metadata={"dp_cp_group": topology.groups.dp_cp})}


def _sharded_optimizer(engine: Engine, tree: dict, is_loading: bool) -> dict[str, Any]:
    assert engine.optimizer is not None
    state = engine.optimizer.adam.sharded_state_dict(tree, is_loading=is_loading)
    schedule = {} if is_loading else {"schedule": engine.optimizer.schedule.state_dict()}
    return {"optimizer": state, **schedule}


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all, even if the machine stops."""
    draft = path.with_name(f".{path.name}.writing")
    with open(draft, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
