"""verl's own functions, before and after `patch.verl()`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tetrad.kernels import patch

functional = pytest.importorskip("verl.utils.torch_functional", reason="make peers installs verl")
from verl.trainer.ppo import core_algos  # noqa: E402

V = 1000
FP32 = {torch.float32: torch.float32, torch.float64: torch.float64}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return 4 * torch.randn(3, 7, V), torch.randint(V, (3, 7))


@pytest.fixture
def mask() -> Tensor:
    """Responses: full, one with tool output inside, one that ends early, one token, none."""
    return torch.tensor(
        [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]
    )


def test_logprobs(batch, check_logits) -> None:
    """With flash-attn verl gives fp32 for bf16 logits, without it bf16: ours gives fp32."""
    dtypes = {**FP32, torch.bfloat16: torch.float32}
    logits, labels = batch
    check_logits(
        lambda: functional.logprobs_from_logits, patch.verl, logits, labels, dtypes=dtypes, gain=100
    )
    check_logits(
        lambda: functional.logprobs_from_logits, patch.verl, logits[0], labels[0], False,
        dtypes=dtypes, gain=100,
    )  # fmt: skip


def test_logprobs_of_a_response(batch, called) -> None:
    """By way of a caller within the module; labels may be flat, as flash-attn takes them."""
    logits, labels = batch
    theirs = functional.log_probs_from_logits_response(labels, logits, 4)
    patch.verl()
    ours = functional.log_probs_from_logits_response(labels, logits, 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    flat = functional.logprobs_from_logits(logits[:, -5:-1], labels[:, -4:].flatten())
    assert torch.equal(flat, ours) and called.token_logprobs.call_count == 2


def test_entropy(batch, check_logits) -> None:
    dtypes = {**FP32, torch.bfloat16: torch.bfloat16}
    check_logits(
        lambda: functional.entropy_from_logits, patch.verl, batch[0], dtypes=dtypes, gain=2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_has_the_dtype_of_theirs_under_autocast(dtype, batch) -> None:
    """verl's engines run it there: fp32 comes out on a GPU, the logits' dtype on a CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        theirs = functional.entropy_from_logits(batch[0].to(dtype))
        patch.verl()
        assert functional.entropy_from_logits(batch[0].to(dtype)).dtype == theirs.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_entropy_with_chunking(dtype, batch) -> None:
    """Theirs reckons in fp32 too, and gives fp32 for every dtype."""
    logits, weights = batch[0].flatten(0, 1).to(dtype), torch.randn(21)

    def outputs() -> list[Tensor]:
        x = logits.detach().requires_grad_()
        y = functional.entropy_from_logits_with_chunking(x, chunk_size=4)
        (weights * y).sum().backward()
        return [y.detach(), x.grad]

    theirs = outputs()
    patch.verl()
    for our, their in zip(outputs(), theirs):
        assert our.dtype == their.dtype
        rtol = 1e-2 if our.dtype == torch.bfloat16 else 1e-5  # bf16 gradients are rounded once
        torch.testing.assert_close(our, their, rtol=rtol, atol=1e-5)


def test_entropy_compiles_as_the_engines_do(batch) -> None:
    theirs = functional.entropy_from_logits(batch[0])
    patch.verl()
    compiled = torch.compile(functional.entropy_from_logits, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch[0]), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_whitening(shift_mean, mask_dtype, mask) -> None:
    """Theirs is differentiable, and so is ours where a gradient is asked for."""
    mask = mask.to(mask_dtype)
    x, weights = 3 + 2 * torch.randn(mask.shape), torch.randn(mask.shape) * mask

    def outputs(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        white = functional.masked_whiten(x, mask, shift_mean=shift_mean)
        with torch.no_grad():
            same = functional.masked_whiten(x, mask, shift_mean)
        (weights * white).sum().backward()
        return [y.detach()[mask.bool()] for y in (white, same, x.grad)]

    dtypes = torch.float32, torch.float64, torch.bfloat16
    theirs = {dtype: outputs(x.to(dtype)) for dtype in dtypes}
    truth = outputs(x.bfloat16().double())
    patch.verl()
    for dtype in dtypes:
        for our, their, true in zip(outputs(x.to(dtype)), theirs[dtype], truth):
            assert our.dtype == their.dtype == dtype
            if dtype == torch.bfloat16:
                assert (our - true).abs().mean() < (their - true).abs().mean()
            else:
                torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_whitening_leaves_nothing_where_the_mask_is_0(mask) -> None:
    x = torch.randn(mask.shape).masked_fill(mask == 0, torch.nan)
    assert functional.masked_whiten(x, mask)[mask == 0].isnan().all()
    patch.verl()
    white = functional.masked_whiten(x, mask)
    assert torch.isfinite(white).all() and not white[mask == 0].any()


@pytest.mark.parametrize("n", [0, 1])
def test_whitening_refuses_fewer_than_two(n) -> None:
    mask = torch.arange(5) < n
    for patched in (False, True):
        if patched:
            patch.verl()
        with pytest.raises(ValueError, match="mask"):
            functional.masked_whiten(torch.randn(5), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gamma", [0.97, torch.tensor(0.97)], ids=["number", "tensor"])
def test_gae(dtype, gamma, mask, called) -> None:
    rewards, values = torch.randn(2, *mask.shape).to(dtype)
    values.requires_grad_()  # theirs cuts the graph
    arguments = rewards, values, mask, gamma, 0.9
    theirs = core_algos.compute_gae_advantage_return(*arguments)
    truth = core_algos.compute_gae_advantage_return(
        rewards.double(), values.double(), mask, float(gamma), 0.9
    )
    patch.verl()
    ours = core_algos.compute_gae_advantage_return(*arguments)
    assert called.gae.call_count == called.whiten.call_count == 1
    for our, their, true in zip(ours, theirs, truth, strict=True):
        assert our.dtype == their.dtype == dtype and not our.requires_grad
        assert not our[mask == 0].any()
        our, their, true = our[mask == 1], their[mask == 1], true[mask == 1]
        if dtype == torch.bfloat16:
            assert (our - true).abs().mean() < (their - true).abs().mean()
        else:
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_gae_of_mixed_dtypes(mask) -> None:
    rewards, values = torch.randn(2, *mask.shape)
    arguments = rewards.bfloat16(), values.half(), mask, 1.0, 0.95
    theirs = core_algos.compute_gae_advantage_return(*arguments)
    patch.verl()
    ours = core_algos.compute_gae_advantage_return(*arguments)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == [torch.float32] * 2


def test_gae_does_not_read_what_the_mask_hides(mask) -> None:
    rewards, values = torch.randn(2, *mask.shape)
    patch.verl()
    clean = core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
    rewards, values = (x.masked_fill(mask == 0, torch.nan) for x in (rewards, values))
    poisoned = core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
    assert all(torch.equal(x, y) for x, y in zip(clean, poisoned))


def test_advantages_by_the_registry_and_by_name(mask, called) -> None:
    """What the trainer calls: GAE by its registered name, whitening inside REINFORCE++."""
    names = patch.verl()
    assert "verl.trainer.ppo.core_algos.ADV_ESTIMATOR_REGISTRY['gae']" in names
    assert "verl.trainer.ppo.core_algos.compute_gae_advantage_return" in names
    rewards = torch.randn(mask.shape)
    core_algos.get_adv_estimator_fn("gae")(rewards, rewards, mask, 1.0, 0.95)
    assert called.gae.call_count == 1
    config = core_algos.AlgoConfig(gamma=0.9)
    estimate = core_algos.compute_reinforce_plus_plus_outcome_advantage
    ours = estimate(rewards, mask, config)
    assert called.whiten.call_count == 2
    patch.undo()
    for our, their in zip(ours, estimate(rewards, mask, config)):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)
    assert core_algos.get_adv_estimator_fn("gae") is core_algos.compute_gae_advantage_return


def test_every_process_can_patch_itself(tmp_path) -> None:
    """By the modules that verl imports at the end of its own import, in each of its workers."""
    (tmp_path / "use_tetrad.py").write_text("from tetrad.kernels import patch\npatch.verl()\n")
    code = """if True:
        from verl.trainer.ppo import core_algos
        from verl.utils.torch_functional import logprobs_from_logits
        for f in logprobs_from_logits, core_algos.compute_gae_advantage_return:
            assert f.__module__ == "tetrad.kernels.patch", f
    """
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    env = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "use_tetrad", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
