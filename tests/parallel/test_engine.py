import pytest
import torch

from tests.forked_world import run_world
from tests.parallel.tiny import (
    LAYOUTS,
    LENGTHS,
    ragged_batch,
    random_tokens,
    tiny_engine,
    train_step,
)
from tetrad.parallel.engine import Engine
from tetrad.parallel.packed import pack
from tetrad.parallel.settings import Architecture, Layout

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def read_and_train(layout, head, shape, batch=None, microbatch_tokens=40):
    """What the engine reads before training, three steps of losses and norms, and after."""
    engine = tiny_engine(head, layout, microbatch_tokens=microbatch_tokens, **shape)
    batch = batch or ragged_batch()
    read = engine.logprobs if head == "language" else engine.scores
    before = read(batch)
    history = [train_step(engine, batch) for _ in range(3)]
    return before, [[s["loss"], s["grad_norm"], s["lr"]] for s in history], read(batch)


@pytest.fixture(scope="module")
def alone() -> dict:
    """Results of one rank, by the arguments that do not concern the layout."""
    return {}


SHAPES = {
    "gpt1": {"family": "gpt1"},
    "gpt2": {"family": "gpt2", "tie_embeddings": False},
    "llama": {"family": "llama", "num_kv_heads": 2},
    # 4 tokens are less than most sequences, 0 sees all; heads wider than hidden / heads
    "qwen3": {"family": "qwen3", "windows": (4, 0, 9), "head_dim": 16, "tie_embeddings": False},
}


@pytest.mark.parametrize(
    "head, shape",
    [("language", "llama"), ("language", "gpt2"), ("language", "qwen3"), ("scalar", "gpt1")],
)
@pytest.mark.parametrize("world, layout", LAYOUTS[1:], ids=str)
def test_every_layout_gives_the_numbers_of_one_rank(world, layout, head, shape, alone) -> None:
    if shape not in alone:
        alone[shape] = run_world(1, read_and_train, Layout(), head, SHAPES[shape])[0]
    for result in run_world(world, read_and_train, layout, head, SHAPES[shape]):
        for ours, one in zip(result, alone[shape]):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(one), **CLOSE)


def gradients(batch, head, budget):
    """Loss and gradient of one pass over the batch, in micro-batches of at most `budget` tokens."""
    engine = tiny_engine(head, microbatch_tokens=budget)
    if head == "language":
        stats = engine.accumulate_cross_entropy(batch, denominator=batch.counted)
    else:
        stats = engine.accumulate_scores(
            batch, lambda x, part: ((x - part.per_sequence["target"]).square().sum() / 8, {})
        )
    pieces = [p.main_grad.flatten() for p in engine.cores[0].parameters()]
    return len(engine._parts(batch, False)), stats["loss"], torch.cat(pieces)


@pytest.mark.parametrize("head", ["language", "scalar"])
def test_neither_micro_batches_nor_their_order_change_loss_and_gradient(head) -> None:
    batch = pack(random_tokens(1, (4,) * 8), random_tokens(2, (3, 9, 5, 12, 7, 6, 11, 4)))
    batch.per_sequence["target"] = torch.arange(8.0)
    seen, (_, loss, gradient) = [], run_world(1, gradients, batch, head, 10**6)[0]
    for budget in (10**6, 50, 24, 1):
        for order in (range(8), (5, 2, 7, 0, 3, 6, 1, 4)):
            n, ours, pieces = run_world(1, gradients, batch.select(order), head, budget)[0]
            seen.append(n)
            assert ours == pytest.approx(loss, abs=1e-5)
            torch.testing.assert_close(pieces, gradient, atol=1e-5, rtol=1e-5)
    assert seen == [1, 1, 2, 2, 4, 4, 8, 8]


def sequences_one_by_one():
    engine = tiny_engine("language", microbatch_tokens=10**6)
    batch = ragged_batch()
    packed = engine.logprobs(batch)
    single = torch.cat([engine.logprobs(batch.select([i])) for i in range(len(LENGTHS))])
    return packed, single


def test_a_packed_sequence_does_not_see_its_neighbours() -> None:
    packed, single = run_world(1, sequences_one_by_one)[0]
    torch.testing.assert_close(packed, single, atol=1e-6, rtol=1e-6)


def plain_forward():
    """The same log-probs from the whole matrix of logits, sequence by sequence."""
    engine = tiny_engine("language")
    batch = ragged_batch()
    ours = engine.logprobs(batch, temperature=0.7)
    from tetrad.parallel.attention import Packing

    expected = []
    for tokens in batch.tokens.split(batch.lengths.tolist()):
        n = len(tokens)
        packing = Packing([n], torch.arange(n), where=torch.device("cpu"))
        logits = engine.cores[0](tokens, packing, lambda hidden, weight: hidden @ weight.T)
        logits = logits[:, :257].detach() / 0.7
        picked = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        expected.append(torch.cat([torch.zeros(1), picked]))
    return ours, torch.cat(expected) * batch.response_mask


def test_logprobs_belong_to_the_token_they_predict() -> None:
    torch.testing.assert_close(*run_world(1, plain_forward)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("responses", [(0, 0, 0, 0, 0), (0, 3, 0, 0, 1)])
def test_empty_responses_and_idle_ranks_do_not_hang(responses) -> None:
    batch = ragged_batch(responses)
    one = run_world(1, read_and_train, Layout(), "language", {}, batch)[0]
    two = run_world(4, read_and_train, Layout(tp=2), "language", {}, batch.select([0, 1, 2, 3, 4]))[
        0
    ]
    for ours, expected in zip(two, one):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), **CLOSE)


def lone_sequence(layout):
    batch = pack([[1, 2, 3]], [[4, 5]])
    batch.per_sequence["target"] = torch.ones(1)
    return train_step(tiny_engine("scalar", layout), batch)["loss"]


def test_fewer_sequences_than_ranks() -> None:
    (one,) = run_world(1, lone_sequence, Layout())
    assert run_world(4, lone_sequence, Layout(pp=2)) == pytest.approx([one] * 4, rel=1e-5)


def bf16_loss(layout):
    engine = tiny_engine("language", layout, precision="bf16")
    return [train_step(engine, ragged_batch())["loss"] for _ in range(3)]


def test_bf16_follows_fp32_within_its_precision() -> None:
    exact = [h[0] for h in run_world(1, read_and_train, Layout(), "language", {})[0][1]]
    for losses in (*run_world(1, bf16_loss, Layout()), *run_world(2, bf16_loss, Layout(tp=2))):
        assert losses == pytest.approx(exact, rel=0.01)


def two_losses(layout, shape, options, by_autograd):
    """Two steps on PPO's loss and a pretraining loss with a coefficient, in micro-batches: norms,
    statistics, weights. by_autograd: the unembedding's gradient made by backward, as any other."""
    if by_autograd:
        Engine._options_for_main_grad = lambda *_: {}
    engine = tiny_engine("language", layout, microbatch_tokens=25, **options, **shape)
    batch, text = ragged_batch(), pack(random_tokens(8, (4,) * 2), random_tokens(9, (6, 9)))
    seen = []
    for _ in range(2):
        old = engine.logprobs(batch)
        batch.per_token |= {"old_logprobs": old, "advantages": torch.linspace(-1, 1, len(old))}
        stats = engine.accumulate_policy_loss(
            batch, denominator=batch.counted, clip_range=0.2, more=True
        )
        more = engine.accumulate_cross_entropy(text, denominator=text.counted, coef=0.3)
        seen += [*stats.values(), *more.values(), engine.step()["grad_norm"]]
    engine.optimizer.sync()
    return torch.tensor(seen), [p.detach().clone() for c in engine.cores for p in c.parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "world, layout, options",
    [
        (1, Layout(), {}),
        (1, Layout(), {"precision": "bf16"}),
        (2, Layout(pp=2), {"overlap": True}),  # tied: the last stage has a copy of the embedding
        (2, Layout(pp=2, vpp=2), {"overlap": True}),
        (4, Layout(tp=2), {"overlap": True, "precision": "bf16"}),
        (8, Layout(), {"overlap": True}),  # most have but a dummy micro-batch of the text
    ],
    ids=str,
)
def test_a_head_that_adds_to_the_sum_itself_changes_nothing(world, layout, options, tied) -> None:
    """Neither does it lose the gradient of a tied embedding that comes from looking tokens up."""
    shape = {"tie_embeddings": tied}
    ours = run_world(world, two_losses, layout, shape, options, False)
    theirs = run_world(world, two_losses, layout, shape, options, True)
    # autograd would round the unembedding's gradient to bf16
    close = {"atol": 3e-3, "rtol": 3e-3} if "precision" in options else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours, theirs, **close)


def refused(layout, shape):
    with pytest.raises(ValueError) as error:
        tiny_engine("language", layout, **shape)
    return str(error.value)


@pytest.mark.parametrize(
    "world, layout, shape, message",
    [
        (1, Layout(tp=3), {}, "tp 3 x pp 1 does not divide the 1 processes"),
        (3, Layout(tp=3), {}, "tp 3 does not divide num_heads 4"),
        (2, Layout(tp=2), {"num_kv_heads": 1}, "tp 2 does not divide num_kv_heads 1"),
        (3, Layout(pp=3), {}, "pp 3 does not divide num_layers 4"),
        (2, Layout(pp=2, vpp=3), {}, "pp 2 x vpp 3 does not divide num_layers 4"),
        (3, Layout(cp=2), {}, "tp 1 x pp 1 x cp 2 does not divide the 3 processes"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit_are_refused(world, layout, shape, message) -> None:
    for said in run_world(world, refused, layout, shape):
        assert message in said


def test_a_layout_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tp is 0"):
        Layout(tp=0)
    with pytest.raises(ValueError, match="vpp is 2; an interleaved pipeline needs pp"):
        Layout(vpp=2)


def test_architecture_refuses_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide hidden_size 32"):
        Architecture(vocab_size=257, num_layers=1, hidden_size=32, num_heads=3, max_length=8)
    with pytest.raises(ValueError, match="family is 'bert'"):
        Architecture(257, 1, 32, 4, 8, family="bert")


def poisoned():
    engine = tiny_engine("scalar")
    engine.accumulate_scores(ragged_batch(), lambda x, part: (x.sum() * torch.nan, {}))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        engine.step()


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    run_world(1, poisoned)
