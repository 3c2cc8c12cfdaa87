import json

import pytest
import torch

from tests.forked_world import run_world
from tests.parallel.tiny import LAYOUTS, ragged_batch, tiny_engine, train_step
from tetrad.parallel import checkpoint
from tetrad.parallel.model import shift_scores
from tetrad.parallel.topology import initialize


def train(tp, pp, head, folder, first, last, precision="fp32"):
    """Steps first … last - 1, from a checkpoint unless first is 0, saved at the end."""
    engine = tiny_engine(head, tp, pp, precision=precision, seed=first)
    if first:
        checkpoint.load(engine, checkpoint.find(str(folder)))
    history = []
    for _ in range(first, last):
        stats = train_step(engine, ragged_batch())
        history.append([stats["loss"], stats["grad_norm"], stats["lr"]])
    checkpoint.save(folder, last, {"policy": engine}, {"model": {"tokenizer": "bytes"}})
    return history


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_a_resumed_run_continues_as_if_never_stopped(head, tmp_path) -> None:
    whole = run_world(1, train, 1, 1, head, tmp_path / "a", 0, 6)[0]
    begun = run_world(4, train, 2, 2, head, tmp_path / "b", 0, 3)[0]
    torch.testing.assert_close(torch.tensor(begun), torch.tensor(whole[:3]), atol=1e-4, rtol=1e-4)
    for world, tp, pp in LAYOUTS:
        rest = run_world(world, train, tp, pp, head, tmp_path / "b", 3, 6)[0]
        torch.testing.assert_close(
            torch.tensor(rest), torch.tensor(whole[3:]), atol=1e-4, rtol=1e-4
        )
        (tmp_path / "b" / "latest").write_text(json.dumps("step_000003"))


def test_bf16_resumes_from_its_fp32_weights(tmp_path) -> None:
    for head in ("language", "scalar"):
        whole = run_world(1, train, 1, 1, head, tmp_path / f"a{head}", 0, 6, "bf16")[0]
        run_world(1, train, 1, 1, head, tmp_path / f"b{head}", 0, 3, "bf16")
        rest = run_world(1, train, 1, 1, head, tmp_path / f"b{head}", 3, 6, "bf16")[0]
        assert rest == whole[3:]


def interrupted(folder):
    engine = tiny_engine("language", 1, 1)
    checkpoint.save(folder, 1, {"policy": engine}, {})
    save = checkpoint.dist_checkpointing.save

    def dies(*args, **kwargs):
        save(*args, **kwargs)
        raise KeyboardInterrupt

    checkpoint.dist_checkpointing.save = dies
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, 2, {"policy": engine}, {})
    return str(checkpoint.find(str(folder)))


def test_a_crash_while_saving_leaves_the_previous_checkpoint(tmp_path) -> None:
    (found,) = run_world(1, interrupted, tmp_path)
    assert found == str(tmp_path / "step_000001" / "policy")


def several(folder):
    engine = tiny_engine("language", 1, 1)
    for step in (1, 2, 3):
        checkpoint.save(folder, step, {"policy": engine}, {}, keep=2)


def test_the_newest_are_kept(tmp_path) -> None:
    run_world(1, several, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_000002", "step_000003"]


def early(folder):
    checkpoint.save(folder, 1, {"policy": tiny_engine("language", 1, 1)}, {}, keep=2)


def test_a_checkpoint_just_written_is_never_pruned(tmp_path) -> None:
    run_world(1, several, tmp_path)
    run_world(1, early, tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_000001"
    assert (tmp_path / "step_000001" / "policy" / "model.json").exists()


def trunk(folder, tp, pp):
    topology = initialize(tp, pp)
    source = checkpoint.find(str(folder))
    engine = tiny_engine("scalar", tp, pp, seed=9, topology=topology)
    checkpoint.load_weights(engine.model, topology, source)
    batch = ragged_batch()
    before = engine.scores(batch)
    shift_scores(engine.core, 0.5)
    return before, engine.scores(batch) - before


def test_a_reward_model_starts_from_a_language_model(tmp_path) -> None:
    run_world(2, train, 2, 1, "language", tmp_path, 0, 2)
    (expected, shift), *_ = run_world(1, trunk, tmp_path, 1, 1)
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5))
    assert expected.std() > 0.01
    for before, shift in run_world(4, trunk, tmp_path, 2, 2):
        torch.testing.assert_close(before, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(shift, torch.full_like(shift, 0.5))


def test_what_is_not_there_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"no checkpoint in {tmp_path}"):
        checkpoint.find(str(tmp_path))
    run_world(1, several, tmp_path)
    found = checkpoint.find(str(tmp_path), "language")
    assert checkpoint.find(str(found), "language") == found
    with pytest.raises(ValueError, match="no model with a scalar head"):
        checkpoint.find(str(tmp_path), "scalar")
