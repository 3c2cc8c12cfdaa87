"""TRL's own functions, before and after `patch.trl()`."""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from tetrad.kernels import patch

trl = pytest.importorskip("trl", reason="make peers installs TRL beside this")
from trl.experimental import orpo, tpo  # noqa: E402
from trl.trainer import utils  # noqa: E402

# TRL's Triton path, on GPUs, gives fp32 for bf16 logits, its PyTorch path bf16: ours gives fp32.
DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.float32, torch.float64: torch.float64}
V = 1000


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, tokens, and the mask of ragged rows: full, cut, one token, none."""
    mask = torch.arange(7) < torch.tensor([7, 4, 1, 0])[:, None]
    return 4 * torch.randn(4, 7, V), torch.randint(V, (4, 7)), mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_logprobs(temperature, masked, batch, check_logits) -> None:
    logits, tokens, mask = batch
    check_logits(
        lambda: utils.selective_log_softmax, patch.trl, logits, tokens, temperature=temperature,
        row_mask=mask.long() if masked else None, dtypes=DTYPES, gain=100,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 3), (4, 7, 3)])
def test_logprobs_of_several_tokens_a_row(shape, check_logits) -> None:
    logits, tokens = 4 * torch.randn(*shape[:-1], V), torch.randint(V, shape)
    check_logits(
        lambda: utils.selective_log_softmax, patch.trl, logits, tokens, dtypes=DTYPES, gain=100
    )


def test_entropy(batch, check_logits) -> None:
    check_logits(lambda: utils.entropy_from_logits, patch.trl, batch[0], 3, dtypes=DTYPES, gain=100)


@pytest.mark.parametrize("entropy_requires_grad", [True, False])
def test_logprobs_and_entropy(entropy_requires_grad, batch, check_logits) -> None:
    logits, tokens, mask = batch
    check_logits(
        lambda: utils.selective_log_softmax_and_entropy, patch.trl, logits, tokens,
        entropy_requires_grad=entropy_requires_grad, temperature=1.3, row_mask=mask, dtypes=DTYPES,
        gain=100,
    )  # fmt: skip


def test_masked_logits_are_not_looked_at(batch) -> None:
    logits, tokens, mask = batch
    patch.trl()
    poisoned = logits.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    logprobs, entropy = utils.selective_log_softmax_and_entropy(poisoned, tokens, row_mask=mask)
    (logprobs + entropy).sum().backward()
    assert not logprobs[~mask].any() and not entropy[~mask].any() and not poisoned.grad[~mask].any()
    assert torch.isfinite(logprobs).all() and torch.isfinite(poisoned.grad).all()


def test_a_label_of_minus_100_is_no_hidden_mask(batch) -> None:
    """Theirs knows no ignored label (on the CPU it raises): ours must not answer it with 0."""
    logits, tokens, _ = batch
    patch.trl()
    assert (utils.selective_log_softmax(logits, torch.full_like(tokens, -100)) == -torch.inf).all()


def test_bad_temperature_is_refused(batch) -> None:
    for patched in (False, True):
        if patched:
            patch.trl()
        with pytest.raises(ValueError, match="temperature"):
            utils.selective_log_softmax(batch[0], batch[1], temperature=0.0)


BOTH = ("log_probs", "entropy")
CHUNK = 300  # three whole ones and a rest of the vocabulary


class Head(NamedTuple):
    """Hidden states of the tokens of ragged responses, the unembedding, and the tokens."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    tokens: torch.Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, biased: bool = True) -> "Head":
        mask = torch.arange(7) < torch.tensor([7, 4, 1, 0])[:, None]
        weight = 4 / 32**0.5 * torch.randn(V, 32)  # logits of standard deviation 4
        bias = torch.randn(V) if biased else None
        hidden, tokens = torch.randn(4, 7, 32)[mask], torch.randint(V, (4, 7))[mask]
        return cls(hidden, weight, bias, tokens).to(dtype)

    def to(self, dtype: torch.dtype) -> "Head":
        return Head(*(None if x is None else x.to(dtype) for x in self[:3]), self.tokens)

    def outputs_and_gradients(self, function, outputs: tuple[str, ...]) -> list[torch.Tensor]:
        """Of a random sum of what is asked for, by hidden, weight and bias."""
        leaves = [None if x is None else x.detach().clone().requires_grad_() for x in self[:3]]
        results = function(*leaves, self.tokens)
        assert [x is not None for x in results] == [True, "entropy" in outputs, False, False, False]
        results = [x for x in results if x is not None]
        generator = torch.Generator().manual_seed(1)
        sum((torch.randn(x.shape, generator=generator) * x).sum() for x in results).backward()
        return [x.detach() for x in results] + [x.grad for x in leaves if x is not None]


@pytest.mark.parametrize("outputs", [BOTH[:1], BOTH])
@pytest.mark.parametrize("temperature, scale", [(1.0, 1.0), (1.3, 0.5)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logprobs_of_hidden_states(
    autocast, dtype, biased, temperature, scale, outputs, called
) -> None:
    """As theirs in fp32; in bf16, and under autocast to it, nearer to float64."""
    head = Head.random(dtype, biased)

    def chunked(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return utils._ChunkedLogProbFunction.apply(
                *arguments, temperature, CHUNK, None, scale, outputs
            )

    def exact(hidden, weight, bias, tokens):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        logprobs = (logits * scale / temperature).log_softmax(-1)
        entropy = -(logprobs * logprobs.exp()).sum(-1) if "entropy" in outputs else None
        return logprobs.gather(-1, tokens[:, None])[:, 0], entropy, None, None, None

    theirs = head.outputs_and_gradients(chunked, outputs)
    seen = torch.bfloat16 if autocast else dtype
    truth = head.to(seen).to(torch.float64).outputs_and_gradients(exact, outputs)
    patch.trl()
    assert called.linear_token_logprobs.call_count == 0
    ours = head.outputs_and_gradients(chunked, outputs)
    assert called.linear_token_logprobs.call_count == 1
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in theirs]
    if autocast or dtype == torch.bfloat16:
        # fp32 leaves under autocast: our gradients are rounded to bf16, as nn.Linear's, theirs not
        rounding = 2**-9 if autocast and dtype == torch.float32 else 0
        for i, (our, their, true) in enumerate(zip(ours, theirs, truth, strict=True)):
            error, allowed = ((x.double() - true).abs().mean() for x in (our, their))
            if i < len(outputs):
                assert 100 * error <= allowed
            else:
                assert error <= 1.02 * allowed + rounding * true.abs().mean()
    else:
        for our, their in zip(ours, theirs):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_no_token_of_a_microbatch_counts() -> None:
    """TRL scores it all the same on GPUs, for a gradient of zero."""
    head = Head.random(torch.float32)
    head = head._replace(hidden=head.hidden[:0], tokens=head.tokens[:0])
    patch.trl()
    logprobs, entropy, *gradients = head.outputs_and_gradients(
        lambda *arguments: utils._ChunkedLogProbFunction.apply(
            *arguments, 1.3, CHUNK, None, 1.0, BOTH
        ),
        BOTH,
    )
    assert logprobs.shape == entropy.shape == (0,) and not any(x.any() for x in gradients)


@pytest.mark.parametrize(
    "softcap, scale, outputs",
    [
        (30.0, 1.0, BOTH),
        (None, 0.0, BOTH),
        (None, -0.5, BOTH),
        (30.0, 1.0, (*BOTH, "is_top1")),
    ],
)
def test_what_ours_does_not_know_is_theirs(softcap, scale, outputs, called) -> None:
    head = Head.random(torch.bfloat16)

    def results() -> list[torch.Tensor | None]:
        return utils._ChunkedLogProbFunction.apply(*head, 1.3, CHUNK, softcap, scale, outputs)

    theirs = results()
    patch.trl()
    ours = results()
    assert called.linear_token_logprobs.call_count == 0
    for our, their in zip(ours, theirs, strict=True):
        assert our is their is None or our.dtype == their.dtype and torch.equal(our, their)


@pytest.mark.parametrize(
    "outputs",
    [(*BOTH, "is_top1"), (*BOTH, "mean_logits"), ("log_probs", "log_sum_sq_probs"), None],
)
def test_statistics_are_theirs_beside_our_logprobs(outputs, called) -> None:
    """Log-probs of all trainers are rounded alike: a policy that asks for more than its reference
    still has a ratio of 1. By default all outputs are asked for."""
    head = Head.random(torch.bfloat16)
    head.hidden.requires_grad_()

    def results() -> list[torch.Tensor | None]:
        asked = () if outputs is None else (outputs,)
        return utils._ChunkedLogProbFunction.apply(*head, 1.3, CHUNK, None, 0.5, *asked)

    theirs = results()
    patch.trl()
    ours = results()
    alone = utils._ChunkedLogProbFunction.apply(*head, 1.3, CHUNK, None, 0.5, BOTH[:1])
    assert called.linear_token_logprobs.call_count == 2 and torch.equal(ours[0], alone[0])
    assert [x is None for x in ours] == [x is None for x in theirs]
    for our, their in zip(ours[2:], theirs[2:]):
        assert our is their is None or our.dtype == their.dtype and torch.equal(our, their)
    assert ours[0].requires_grad and not any(x.requires_grad for x in ours[2:] if x is not None)


def test_a_partitioned_head_is_theirs(called) -> None:
    """DeepSpeed ZeRO-3 marks its parameters so; theirs gathers them again in backward."""
    head = Head.random(torch.float32)
    head.weight.ds_id = 0
    patch.trl()
    utils._ChunkedLogProbFunction.apply(*head, 1.0, CHUNK, None, 1.0, BOTH)
    assert called.linear_token_logprobs.call_count == 0


def test_a_head_of_another_type_is_theirs(called) -> None:
    """Ours refuses it; theirs casts piece by piece. Under autocast both cast."""
    head = Head.random(torch.float32)
    head = head._replace(weight=head.weight.bfloat16())
    patch.trl()
    utils._ChunkedLogProbFunction.apply(*head, 1.0, CHUNK, None, 1.0, BOTH)
    assert called.linear_token_logprobs.call_count == 0
    with torch.autocast("cpu", torch.bfloat16):
        utils._ChunkedLogProbFunction.apply(*head, 1.0, CHUNK, None, 1.0, BOTH)
    assert called.linear_token_logprobs.call_count == 1


def test_a_copy_made_while_patched_works_after_undo() -> None:
    head = Head.random(torch.float32)
    patch.trl()
    ours = utils._ChunkedLogProbFunction
    patch.undo()
    assert ours is not utils._ChunkedLogProbFunction
    assert ours.apply(*head, 1.0, CHUNK, None, 1.0, ("is_top1",))[4].dtype == torch.bool


def test_the_copies_of_trainers_are_replaced() -> None:
    theirs = utils._ChunkedLogProbFunction
    names = patch.trl()
    for name in (
        "trl.trainer.utils.selective_log_softmax",
        "trl.experimental.orpo.orpo_trainer.selective_log_softmax",
        "trl.experimental.tpo.tpo_trainer.selective_log_softmax_and_entropy",
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
        "trl.kernels.ChunkedLogProbFunction",
        "trl.trainer.utils._ChunkedLogProbFunction",
    ):
        assert name in names
    assert patch.trl() == names and utils._ChunkedLogProbFunction is not theirs
    patch.undo()
    assert utils._ChunkedLogProbFunction is theirs


WORDS = "<pad> <eos> a b c d e f g h".split()
TEXTS = {
    "prompt": ["a b", "c", "a c b", "e"] * 4,
    "chosen": [" c d e", " d", " d e f g", " f g"] * 4,
    "rejected": [" h", " a b c d", " h g", " a"] * 4,
    "reference": [" c d", " d e", " d e f", " f"] * 4,
    "completion": [" c d e", " h", " d e f g", " a"] * 4,
    "label": [True, False] * 8,
}
PAIRS = ("prompt", "chosen", "rejected")


class Kind(NamedTuple):
    """A trainer; how often it calls what, in five steps."""

    package: ModuleType
    name: str
    columns: tuple[str, ...]
    of_logits: int  # our token_logprobs
    of_hidden: int  # our linear_token_logprobs
    theirs: int  # their chunked function, for statistics
    options: dict = {}


# Two steps on each batch of completions: of these, the old log-probs and the reference's are taken.
ONLINE = dict(
    beta=0.1, temperature=1.3, num_generations=4, num_iterations=2, max_completion_length=6
)
KINDS = {
    "grpo": Kind(trl, "GRPO", PAIRS[:1], 0, 5 + 3 + 3, 0, {**ONLINE, "entropy_coef": 0.01}),
    "rloo": Kind(trl, "RLOO", PAIRS[:1], 0, 5 + 3 + 3, 0, ONLINE),
    "dpo": Kind(trl, "DPO", PAIRS, 0, 5 + 5, 5, {"max_length": 16}),  # and the reference model
    "kto": Kind(  # twice, as it also estimates the KL
        trl, "KTO", ("prompt", "completion", "label"), 0, 4 * 5, 2 * 5, {"max_length": 16}
    ),
    "sft": Kind(trl, "SFT", ("prompt", "completion"), 0, 5, 5, {"max_length": 16}),
    "orpo": Kind(orpo, "ORPO", PAIRS, 5, 0, 0, {"max_length": 16}),
    "tpo": Kind(tpo, "TPO", (*PAIRS, "reference"), 5, 0, 0, {"max_length": 16}),
}  # fmt: skip


def share_of_d(completions: list[str], **_) -> list[float]:
    return [(1 + text.split().count("d")) / (1 + len(text.split())) for text in completions]


def train(kind: Kind, out: Path) -> list[dict[str, float]]:
    """The log of five steps of a random two-layer Llama, in fp32."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(out / "model")  # trainers load two
    arguments = getattr(kind.package, f"{kind.name}Config")(
        output_dir=str(out), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, seed=0,
        disable_tqdm=True, **kind.options,
    )  # fmt: skip
    rewarded = {"reward_funcs": share_of_d} if "beta" in kind.options else {}
    trainer = getattr(kind.package, f"{kind.name}Trainer")(
        model=transformers.LlamaForCausalLM.from_pretrained(out / "model"), args=arguments,
        processing_class=fast, train_dataset=Dataset.from_dict({k: TEXTS[k] for k in kind.columns}),
        **rewarded,
    )  # fmt: skip
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_the_same_way(kind, called, monkeypatch, tmp_path) -> None:
    kind = KINDS[kind]
    chunked = utils._ChunkedLogProbFunction
    apply = mock.Mock(wraps=chunked.apply)
    monkeypatch.setattr(chunked, "apply", apply)
    theirs = train(kind, tmp_path)
    assert not called.token_logprobs.called and not called.linear_token_logprobs.called
    apply.reset_mock()
    patch.trl()
    ours = train(kind, tmp_path)
    assert called.token_logprobs.call_count == kind.of_logits
    assert called.linear_token_logprobs.call_count == kind.of_hidden
    assert apply.call_count == kind.theirs
    losses = [row["loss"] for row in theirs]
    assert len(losses) == len(ours) == 5 and max(losses) > min(losses) + 0.02  # the weights move
    if "beta" in kind.options:
        assert theirs[-1]["kl"] > 1e-3 and theirs[-1]["reward_std"] > 0
    for our, their in zip(ours, theirs):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            assert our.get(name) == pytest.approx(their.get(name), abs=1e-5), name
