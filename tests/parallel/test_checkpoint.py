import json
import os
import signal
import threading
from functools import partial, wraps

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.forked_world import run_world
from tests.parallel.tiny import (
    ALONE,
    average_weights,
    memory,
    ragged_batch,
    tiny_engine,
    train_step,
)
from tetrad.parallel import checkpoint, optimizer
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import build, shift_scores
from tetrad.parallel.settings import Architecture, Layout
from tetrad.parallel.topology import initialize

FOUR = Layout(tp=2, pp=2)
RESUMED = [  # world, layout
    (4, Layout()),
    (4, Layout(tp=4)),
    (2, Layout(pp=2, vpp=2)),
    (2, Layout(cp=2)),
    (4, Layout(tp=2, sequence_parallel=True)),
    (8, Layout(tp=2, pp=2, cp=2)),
]


def answers(engine):
    batch = ragged_batch()
    return engine.logprobs(batch) if engine.head == "language" else engine.scores(batch)


def train(layout, head, folder, first, last, precision="fp32", **more):
    """Steps first … last - 1, from a checkpoint unless first is 0, saved at the end. Returns loss,
    norm and rate of each step, and what the averaged weights answer."""
    if more:
        config = optimizer.DistributedDataParallelConfig
        optimizer.DistributedDataParallelConfig = partial(config, bucket_size=4000)
    engine = tiny_engine(head, layout, precision=precision, seed=first, ema_decay=0.8, **more)
    if first:
        checkpoint.load(engine, checkpoint.find(str(folder)))
    history = []
    for _ in range(first, last):
        stats = train_step(engine, ragged_batch())
        history.append([stats["loss"], stats["grad_norm"], stats["lr"]])
    checkpoint.save(folder, last, {"policy": engine}, {"model": {"tokenizer": "bytes"}})
    with average_weights(engine):
        return history, answers(engine)


def resumed_like(whole, folder, world, work):
    history, average = run_world(world, work, folder, 3, 8)[0]
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(torch.tensor(history), torch.tensor(whole[0][3:]), **close)
    torch.testing.assert_close(average, whole[1], **close)
    (folder / "latest").write_text(json.dumps("step_000003"))


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_a_resumed_run_continues_as_if_never_stopped(head, tmp_path) -> None:
    whole = run_world(1, train, ALONE, head, tmp_path / "a", 0, 8)[0]
    run_world(4, train, FOUR, head, tmp_path / "b", 0, 3)
    for world, layout in RESUMED:
        resumed_like(whole, tmp_path / "b", world, partial(train, layout, head))


@pytest.mark.parametrize("world, layout", RESUMED)
def test_any_layout_can_be_left(world, layout, tmp_path) -> None:
    whole = run_world(1, train, ALONE, "language", tmp_path / "a", 0, 8)[0]
    run_world(world, train, layout, "language", tmp_path / "b", 0, 3)
    resumed_like(whole, tmp_path / "b", 1, partial(train, ALONE, "language"))


def test_buckets_may_be_many_and_end_anywhere(tmp_path) -> None:
    # the biases are 36 long, so buckets end in padding, which a checkpoint must not have
    shape = {"family": "gpt2", "hidden_size": 36}
    alone = partial(train, ALONE, "language", **shape)
    bucketed = partial(train, Layout(pp=2), "language", overlap=True, **shape)
    whole = run_world(1, alone, tmp_path / "a", 0, 8)[0]
    run_world(4, bucketed, tmp_path / "b", 0, 3)
    for world, work in ((1, alone), (4, bucketed)):
        resumed_like(whole, tmp_path / "b", world, work)


def test_bf16_resumes_from_its_fp32_weights(tmp_path) -> None:
    for head in ("language", "scalar"):
        a, b = tmp_path / f"a{head}", tmp_path / f"b{head}"
        whole, average = run_world(4, train, Layout(tp=2), head, a, 0, 8, "bf16")[0]
        run_world(4, train, Layout(tp=2), head, b, 0, 3, "bf16")
        rest, resumed = run_world(4, train, Layout(tp=2), head, b, 3, 8, "bf16")[0]
        assert rest == whole[3:]
        assert torch.equal(resumed, average)


def addresses(folder):
    engine = tiny_engine("language", Layout(), precision="bf16", ema_decay=0.8)
    tensors = [*engine.cores[0].parameters(), *memory(engine.optimizer)["optimizer"]]
    for state in engine.optimizer.adam.optimizer.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    before = [t.data_ptr() for t in tensors]
    train_step(engine, ragged_batch())
    checkpoint.save(folder, 1, {"policy": engine}, {})
    saved = [t.clone() for t in tensors]
    train_step(engine, ragged_batch())
    assert not any(torch.equal(t, old) for t, old in zip(tensors[-2:], saved[-2:]))
    checkpoint.load(engine, folder / "step_000001" / "policy")
    assert all(torch.equal(t, old) for t, old in zip(tensors, saved))
    assert [t.data_ptr() for t in tensors] == before
    assert {float(s["step"]) for s in engine.optimizer.adam.optimizer.state.values()} == {1.0}


def test_loading_writes_in_place(tmp_path) -> None:
    run_world(2, addresses, tmp_path)


def lacking(folder):
    checkpoint.save(folder, 1, {"policy": tiny_engine("language")}, {})
    with pytest.raises(ValueError, match="step_000001/policy has no optimizer state ema"):
        checkpoint.load(tiny_engine("language", ema_decay=0.8), folder / "step_000001" / "policy")


def test_what_the_optimizer_needs_must_be_there(tmp_path) -> None:
    run_world(1, lacking, tmp_path)


def meanwhile(folder):
    engine = tiny_engine("language", Layout(tp=2), ema_decay=0.8)
    train_step(engine, ragged_batch())
    checkpoint.save(folder / "sync", 1, {"policy": engine}, {})
    gate = threading.Event()
    write = filesystem_async._write_item

    @wraps(write)
    def slow(*args, **kwargs):
        assert gate.wait(60)
        return write(*args, **kwargs)

    filesystem_async._write_item = slow
    optimizer.GATHERED_AT_ONCE = 1000  # several pieces of each weight
    checkpoint.save(folder / "async", 1, {"policy": engine}, {}, wait=False)
    for _ in range(2):
        train_step(engine, ragged_batch())
    assert not checkpoint.finish(wait=False)
    assert checkpoint.latest(folder / "async") is None
    gate.set()
    checkpoint.save(folder / "async", 3, {"policy": engine}, {}, wait=False)
    assert checkpoint.latest(folder / "async").name == "step_000001"
    assert checkpoint.finish() and checkpoint.finish()
    assert checkpoint.latest(folder / "async").name == "step_000003"


def test_training_goes_on_while_a_copy_is_written(tmp_path) -> None:
    run_world(4, meanwhile, tmp_path)
    files = {}
    for kind in ("sync", "async"):
        role = tmp_path / kind / "step_000001" / "policy"
        files[kind] = {p.name: p.read_bytes() for p in role.iterdir() if p.suffix == ".distcp"}
    assert files["sync"] == files["async"]
    assert {name.split("_")[2] for name in files["sync"]} == set("0123")  # all ranks write


def dies(folder, victim):
    engine = tiny_engine("language", Layout())
    checkpoint.save(folder, 1, {"policy": engine}, {})
    write, written = filesystem_async._write_item, []

    @wraps(write)
    def fatal(*args, **kwargs):
        written.append(write(*args, **kwargs))
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1]

    if dist.get_rank() == victim:
        filesystem_async._write_item = fatal
    checkpoint.save(folder, 2, {"policy": engine}, {})


def goes_on(folder):
    found = checkpoint.find(str(folder))
    engine = tiny_engine("language", Layout())
    checkpoint.load(engine, found)
    train_step(engine, ragged_batch())
    checkpoint.save(folder, 2, {"policy": engine}, {})
    return str(found)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(victim, tmp_path) -> None:
    with pytest.raises(AssertionError, match="Connection"):  # the other rank misses it
        run_world(2, dies, tmp_path, victim, timeout=20)
    names = [p.name for p in tmp_path.iterdir()]
    assert sorted(names) == [".step_000002.writing", "latest", "step_000001"]
    assert run_world(2, goes_on, tmp_path)[0] == str(tmp_path / "step_000001" / "policy")
    names = [p.name for p in tmp_path.iterdir()]
    assert sorted(names) == ["latest", "step_000001", "step_000002"]


def full_disk(folder):
    engine = tiny_engine("language", Layout())
    checkpoint.save(folder, 1, {"policy": engine}, {})
    write = filesystem_async._write_item

    @wraps(write)
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        filesystem_async._write_item = full
    with pytest.raises(OSError, match="step_000002 could not be written: .*No space left"):
        checkpoint.save(folder, 2, {"policy": engine}, {})
    assert checkpoint.latest(folder).name == "step_000001"
    filesystem_async._write_item = write
    checkpoint.save(folder, 3, {"policy": engine}, {})


def test_a_full_disk_is_told_on_all_ranks(tmp_path) -> None:
    run_world(2, full_disk, tmp_path)
    names = [p.name for p in tmp_path.iterdir()]
    assert sorted(names) == ["latest", "step_000001", "step_000003"]


def several(folder):
    engine = tiny_engine("language")
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {"policy": engine}, {}, keep=2)


def test_the_newest_are_kept(tmp_path) -> None:
    run_world(1, several, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000002", "step_000003"]


def early(folder):
    checkpoint.save(folder, 1, {"policy": tiny_engine("language")}, {}, keep=2)


def test_a_checkpoint_just_written_is_never_pruned(tmp_path) -> None:
    run_world(1, several, tmp_path)
    run_world(1, early, tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"
    assert (tmp_path / "step_000001" / "policy" / "model.json").exists()


def trunk(folder, layout):
    topology = initialize(layout)
    source = checkpoint.find(str(folder))
    engine = tiny_engine("scalar", layout, seed=9, topology=topology)
    checkpoint.load_weights(engine.chunks, topology, source)
    batch = ragged_batch()
    before = engine.scores(batch)
    shift_scores(engine.cores, 0.5)
    return before, engine.scores(batch) - before


def test_a_reward_model_starts_from_a_language_model(tmp_path) -> None:
    run_world(2, train, Layout(tp=2), "language", tmp_path, 0, 2)
    (expected, shift), *_ = run_world(1, trunk, tmp_path, ALONE)
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5))
    assert expected.std() > 0.01
    for before, shift in run_world(4, trunk, tmp_path, Layout(pp=2, vpp=2)):
        torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shift, torch.full_like(shift, 0.5))


def reader(folder, layout, precision):
    """Log-probs by a model that has only the weights."""
    source = checkpoint.find(str(folder))
    architecture: Architecture = checkpoint.read_model(source)[0]
    topology = initialize(layout)
    chunks = build(architecture, "language", topology, precision=precision)
    checkpoint.load_weights(chunks, topology, source)
    engine = Engine(chunks, topology, microbatch_tokens=40)
    checkpoint.save(folder / "again", 1, {"policy": engine}, {})
    return answers(engine)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_alone_load_in_either_precision(precision, tmp_path) -> None:
    run_world(2, train, Layout(tp=2), "language", tmp_path, 0, 2, precision)
    same, other = ("fp32", "bf16") if precision == "fp32" else ("bf16", "fp32")
    expected = run_world(1, reader, tmp_path, ALONE, same)[0]
    found = run_world(2, reader, tmp_path, Layout(pp=2), same)[0]
    exact = 1e-5 if same == "fp32" else 2e-2  # bf16 products are summed in another order
    torch.testing.assert_close(found, expected, atol=exact, rtol=exact)
    found = run_world(1, reader, tmp_path, ALONE, other)[0]
    torch.testing.assert_close(found, expected, atol=5e-2, rtol=5e-2)


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        checkpoint.find(str(tmp_path))
    run_world(1, several, tmp_path)
    found = checkpoint.find(str(tmp_path), "language")
    assert checkpoint.find(str(found), "language") == found
    with pytest.raises(ValueError, match="no model with a scalar head"):
        checkpoint.find(str(tmp_path), "scalar")


def nowhere(folder):
    with pytest.raises(OSError, match="Not a directory"):
        checkpoint.save(folder, 1, {"policy": tiny_engine("language")}, {})


def test_a_folder_that_cannot_be_made_is_told_on_all_ranks(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    run_world(2, nowhere, tmp_path / "file" / "checkpoints")


def test_a_newest_checkpoint_that_is_gone_is_named(tmp_path) -> None:
    (tmp_path / "latest").write_text('"step_000003"')
    with pytest.raises(ValueError, match="latest names step_000003, which is gone"):
        checkpoint.latest(tmp_path)


def test_a_model_of_another_version_is_refused(tmp_path) -> None:
    (tmp_path / "model.json").write_text('{"architecture": {"moe": 1}}')
    with pytest.raises(ValueError, match="model.json: .*unexpected keyword argument 'moe'"):
        checkpoint.read_model(tmp_path)
