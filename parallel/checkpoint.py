"""Checkpoints that another layout can load, and that a crash never leaves half written.

    FOLDER/step_000040/            published by renaming a finished temporary folder
        state.json                 step, roles, whatever the trainer adds
        policy/ critic/ …          one Megatron distributed checkpoint a role, and model.json
    FOLDER/latest                  the name of the newest

A role's tensors are whole weights under their global names and, in the same shapes, what the
optimizer keeps of each: "optimizer.exp_avg.NAME" and its like. Ranks that hold the same weights
take turns in writing them. No generator state is stored: all random numbers of a run are functions
of seed, step and place.
"""

import json
import os
import queue
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from tetrad.parallel import device
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import Model, unwrap
from tetrad.parallel.settings import Architecture
from tetrad.parallel.topology import Topology

EXTRA = "_extra_state"  # what Transformer Engine would keep beside weights; nothing in our layers


def save(
    folder: Path,
    step: int,
    engines: Mapping[str, Engine],
    state: Mapping[str, Any],
    keep: int = 2,
    wait: bool = True,
) -> Path:
    """Write model and optimizer of each role; keep the newest `keep` checkpoints of the folder.

    wait=False: return when everything is copied to the host, write while training goes on, and let
    `finish` publish it. Only one is written at a time: the one before is finished first.
    Raises OSError when it cannot be written; those before it stay.
    """
    global _unfinished
    finish()
    final, draft = folder / f"step_{step:06d}", folder / f".step_{step:06d}.writing"

    def begin() -> None:
        _remove_hidden(folder)  # what a run that was killed left behind
        for role in engines:
            (draft / role).mkdir(parents=True)

    def describe() -> None:
        for role, engine in engines.items():
            model = {"head": engine.head, "architecture": asdict(engine.architecture)}
            _write_json(draft / role / "model.json", {**state.get("model", {}), **model})
        _write_json(draft / "state.json", {"step": step, "roles": list(engines), **state})

    _on_first_rank(begin)
    requests = [_request(engine, draft / role) for role, engine in engines.items()]
    _on_first_rank(describe)  # only now: Megatron takes a folder with files for a broken checkpoint
    thread = Thread(target=_write, args=(requests,))
    thread.start()
    _unfinished = _Unfinished(final, thread, requests, lambda: _publish(draft, final, keep))
    if wait:
        finish()
    return final


def _on_first_rank(work: Callable[[], None]) -> None:
    """Raises on all ranks the OSError that it meets on the first."""
    problem = [""]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise OSError(problem[0])


class _Unfinished(NamedTuple):
    """A checkpoint on its way to the disk. The thread works on copies, without collectives."""

    final: Path
    thread: Thread
    requests: list[AsyncRequest]
    publish: Callable[[], None]


_unfinished: _Unfinished | None = None


def finish(wait: bool = True) -> bool:
    """Publish the checkpoint that `save` began, once all ranks have written it; returns whether
    none is left to publish. wait=False: look, and come back later. All ranks call it.

    Raises OSError, on all ranks, when the checkpoint could not be written."""
    global _unfinished
    if _unfinished is None:
        return True
    if not wait:
        written = torch.tensor(not _unfinished.thread.is_alive(), device=device.device()).int()
        dist.all_reduce(written, dist.ReduceOp.MIN)
        if not written.item():
            return False
    (final, thread, requests, publish), _unfinished = _unfinished, None
    thread.join()
    problem = [""]
    try:
        for request in requests:
            for finalize in request.finalize_fns:
                finalize()
        if dist.get_rank() == 0:
            publish()
    except CheckpointException as error:  # all ranks get it, the first knows why
        problem = [str(reason) for reason, _ in error.failures.values()] or problem
    except OSError as error:
        problem = [str(error)]
    problem = problem[:1]
    dist.broadcast_object_list(problem, 0)
    if problem[0]:
        raise OSError(f"checkpoint {final} could not be written: {problem[0]}")
    return True


def _request(engine: Engine, folder: Path) -> AsyncRequest:
    """Copy what this rank writes of a role, agree with the others, write the common part."""
    engine.bring(with_optimizer=True)
    places = _places(engine)
    optimizer, group = engine.optimizer, engine.topology.groups.dp_cp
    tensors: list[Any] = []

    def add(place: Any, value: Tensor, prefix: str = "") -> None:
        turn = (group.rank() - len(tensors)) % group.size()
        replica = (*place.replica_id[:-1], turn)  # the last is the rank among equals
        if is_main_replica(replica):
            data = value.detach().to("cpu", copy=True)
        else:
            data = torch.empty_like(value, device="meta")  # another rank writes it
        tensors.append(_filled(place, prefix + place.key, data, replica))

    common = {}
    if optimizer:
        optimizer.sync()
        common = {"kinds": list(optimizer.flat), "schedule": optimizer.schedule.state_dict()}
    for weight, place in places.items():
        add(place, weight)
    for kind in common.get("kinds", ()):
        for weight, value in optimizer.whole(kind):
            add(places[weight], value, f"optimizer.{kind}.")
    # one queue a role, in this process: Megatron's own is a process that answers for all
    filesystem_async._results_queue = queue.Queue()
    return dist_checkpointing.save(
        {"tensors": tensors, "optimizer": common},
        str(folder),
        validate_access_integrity=False,
        async_sharded_save=True,
    )


def _places(engine: Engine) -> dict[nn.Parameter, Any]:
    """Each weight, and how it lies in the whole model."""
    trees = [_sharded(core, engine.topology) for core in engine.cores]
    return {place.data: place for place in nested_values(trees)}


def _filled(place: Any, key: str, data: Tensor, replica: tuple[int, ...]) -> Any:
    """The same place in the model, for other data."""
    dtype = {} if isinstance(place, ShardedTensorFactory) else {"dtype": data.dtype}
    return replace(place, key=key, data=data, replica_id=replica, **dtype)


def _write(requests: list[AsyncRequest]) -> None:
    """This rank's files. Megatron would fork a process for each, which outlives a rank that is
    killed and writes on into a folder that the next run cleans."""
    for request in requests:
        if request.async_fn is None:
            continue  # nothing to write on this rank
        transforms, _ = request.async_fn.args
        _, buckets, results = request.async_fn_args
        done: queue.Queue = queue.Queue()
        running: queue.Queue = queue.Queue()
        for i, bucket in enumerate(buckets):
            running.put(i)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, i, bucket, done, running, use_fsync=True
            )
        outcomes = dict(done.get() for _ in buckets)
        problems = [x for x in outcomes.values() if isinstance(x, Exception)]
        results.put(problems[0] if problems else outcomes)


def _publish(draft: Path, final: Path, keep: int) -> None:
    folder = final.parent
    for place in (*draft.rglob("*"), draft):
        _to_disk(place)
    if final.exists():
        final.rename(folder / f".{final.name}.replaced")
    draft.rename(final)
    _to_disk(folder)
    _write_json(folder / "latest", final.name)
    _to_disk(folder)
    older = [p for p in sorted(folder.glob("step_*")) if p != final]
    for old in older[: len(older) - (keep - 1)]:
        old.rename(folder / f".{old.name}.old")  # first out of sight, for removing takes a while
    _remove_hidden(folder)


def _remove_hidden(folder: Path) -> None:
    for place in folder.glob(".step_*"):
        shutil.rmtree(place)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    newest = folder / json.loads(pointer.read_text())
    if not newest.is_dir():
        raise ValueError(f"{pointer} names {newest.name}, which is gone; let it name another")
    return newest


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
            theirs = (place / "config.json").exists()
            advice = ": a model of Hugging Face; `tetrad import` it first" if theirs else ""
            raise ValueError(f"no checkpoint in {path}{advice}")
        candidates = [place / role for role in read_state(place)["roles"]]
    for candidate in candidates:
        if head in (None, read_model(candidate)[1]["head"]):
            return candidate
    raise ValueError(f"no model with a {head} head in {path}")


def read_state(checkpoint: Path) -> dict:
    """What the trainer stored with a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text())


def read_model(folder: Path) -> tuple[Architecture, dict]:
    """The architecture of one role's model, and the rest of its model.json (head, tokenizer).

    A tokenizer ./NAME lies in the folder itself."""
    model = json.loads((folder / "model.json").read_text())
    if model.get("tokenizer", "").startswith("./"):
        model["tokenizer"] = str((folder / model["tokenizer"]).resolve())
    try:
        return Architecture(**model.pop("architecture")), model
    except TypeError as error:  # of another version
        raise ValueError(f"{folder / 'model.json'}: {error}") from None


def load_weights(chunks: list[nn.Module], topology: Topology, folder: Path) -> None:
    """Weights into a model that may have another layout than the one that saved them.

    A scalar model loaded from a language model takes the trunk and keeps its own fresh head; the
    caller decides whether that is meant, by what it asks `find` for.
    """
    cores = [unwrap(chunk) for chunk in chunks]
    trees = {str(i): _sharded(core, topology) for i, core in enumerate(cores)}
    if cores[0].head != read_model(folder)[1]["head"]:
        for name, tree in trees.items():
            trees[name] = {k: v for k, v in tree.items() if not k.startswith("output_layer")}
    loaded = dist_checkpointing.load(trees, str(folder))
    for i, core in enumerate(cores):
        missing, unexpected = core.load_state_dict(loaded[str(i)], strict=False)
        wrong = [k for k in (*missing, *unexpected) if not k.startswith("output_layer")]
        wrong = [k for k in wrong if not k.endswith(EXTRA)]
        assert not wrong, f"{folder} does not fit the model: {wrong[:3]}"


def load(engine: Engine, folder: Path) -> None:
    """Weights, optimizer and schedule of one role, as they were saved, in place.

    Raises ValueError when the checkpoint lacks what the optimizer keeps."""
    optimizer = engine.optimizer
    assert optimizer is not None
    saved = dist_checkpointing.load_common_state_dict(str(folder)).get("optimizer", {})
    for kind in optimizer.flat:
        if kind not in saved.get("kinds", ()):
            raise ValueError(f"{folder} has no optimizer state {kind}")
    engine.bring(with_optimizer=True)
    optimizer.sync()
    load_weights(engine.chunks, engine.topology, folder)
    places = _places(engine)
    for kind in optimizer.flat:  # one at a time, for each is as large as the model in fp32
        tree = {
            str(i): _filled(p, f"optimizer.{kind}.{p.key}", torch.empty(w.shape), p.replica_id)
            for i, (w, p) in enumerate(places.items())
        }
        loaded = dist_checkpointing.load(tree, str(folder))
        optimizer.restore(kind, {w: loaded[str(i)] for i, w in enumerate(places)})
    optimizer.restore_schedule(saved["schedule"])


def _sharded(core: Model, topology: Topology) -> dict[str, Any]:
    """Megatron's description of each weight by its name in this chunk."""
    places = core.sharded_state_dict(metadata={"dp_cp_group": topology.groups.dp_cp})
    return {name: place for name, place in places.items() if not name.endswith(EXTRA)}


def _to_disk(place: Path) -> None:
    """Have a file, or the list of a folder's files, survive a power cut."""
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
