import pytest
import torch

from tests.forked_world import run_world
from tests.parallel.tiny import LAYOUTS, LENGTHS, ragged_batch, tiny_engine, train_step
from tetrad.parallel.packed import pack
from tetrad.parallel.settings import Architecture

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def read_and_train(tp, pp, head, shape, batch=None, microbatch_tokens=40):
    """What the engine reads before training, three steps of losses and norms, and after."""
    engine = tiny_engine(head, tp, pp, microbatch_tokens=microbatch_tokens, **shape)
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
    "llama": {"family": "llama", "num_kv_heads": 2},
    "gpt2": {"family": "gpt2", "tie_embeddings": False},
}


@pytest.mark.parametrize(
    "head, shape", [("language", "llama"), ("language", "gpt2"), ("scalar", "llama")]
)
@pytest.mark.parametrize("world, tp, pp", LAYOUTS[1:])
def test_every_layout_gives_the_numbers_of_one_rank(world, tp, pp, head, shape, alone) -> None:
    if (head, shape) not in alone:
        alone[head, shape] = run_world(1, read_and_train, 1, 1, head, SHAPES[shape])[0]
    for result in run_world(world, read_and_train, tp, pp, head, SHAPES[shape]):
        for ours, one in zip(result, alone[head, shape]):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(one), **CLOSE)


@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_micro_batches_do_not_change_the_result(tokens) -> None:
    whole = run_world(1, read_and_train, 1, 1, "language", {}, None, 10**6)[0]
    split = run_world(1, read_and_train, 1, 1, "language", {}, None, tokens)[0]
    for ours, one in zip(split, whole):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(one), **CLOSE)


def sequences_one_by_one():
    engine = tiny_engine("language", 1, 1, microbatch_tokens=10**6)
    batch = ragged_batch()
    packed = engine.logprobs(batch)
    single = torch.cat([engine.logprobs(batch.select([i])) for i in range(len(LENGTHS))])
    return packed, single


def test_a_packed_sequence_does_not_see_its_neighbours() -> None:
    packed, single = run_world(1, sequences_one_by_one)[0]
    torch.testing.assert_close(packed, single, atol=1e-6, rtol=1e-6)


def plain_forward():
    """The same log-probs from the whole matrix of logits, sequence by sequence."""
    engine = tiny_engine("language", 1, 1)
    batch = ragged_batch()
    ours = engine.logprobs(batch, temperature=0.7)
    from tetrad.parallel.attention import Packing

    expected = []
    for tokens in batch.tokens.split(batch.lengths.tolist()):
        n = len(tokens)
        logits = engine.core(tokens, Packing(torch.tensor([0, n]), torch.arange(n)))
        logits = logits[:, :257].detach() / 0.7
        picked = logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
        expected.append(torch.cat([torch.zeros(1), picked]))
    return ours, torch.cat(expected) * batch.response_mask


def test_logprobs_belong_to_the_token_they_predict() -> None:
    torch.testing.assert_close(*run_world(1, plain_forward)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("responses", [(0, 0, 0, 0, 0), (0, 3, 0, 0, 1)])
def test_empty_responses_and_idle_ranks_do_not_hang(responses) -> None:
    batch = ragged_batch(responses)
    one = run_world(1, read_and_train, 1, 1, "language", {}, batch)[0]
    two = run_world(4, read_and_train, 2, 1, "language", {}, batch.select([0, 1, 2, 3, 4]))[0]
    for ours, expected in zip(two, one):
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), **CLOSE)


def lone_sequence(tp, pp):
    batch = pack([[1, 2, 3]], [[4, 5]])
    batch.per_sequence["target"] = torch.ones(1)
    return train_step(tiny_engine("scalar", tp, pp), batch)["loss"]


def test_fewer_sequences_than_ranks() -> None:
    (one,) = run_world(1, lone_sequence, 1, 1)
    assert run_world(4, lone_sequence, 1, 2) == pytest.approx([one] * 4, rel=1e-5)


def bf16_loss(tp):
    engine = tiny_engine("language", tp, 1, precision="bf16")
    return [train_step(engine, ragged_batch())["loss"] for _ in range(3)]


def test_bf16_follows_fp32_within_its_precision() -> None:
    exact = [h[0] for h in run_world(1, read_and_train, 1, 1, "language", {})[0][1]]
    for losses in (*run_world(1, bf16_loss, 1), *run_world(2, bf16_loss, 2)):
        assert losses == pytest.approx(exact, rel=0.01)


def refused(tp, pp, shape):
    with pytest.raises(ValueError) as error:
        tiny_engine("language", tp, pp, **shape)
    return str(error.value)


@pytest.mark.parametrize(
    "world, tp, pp, shape, message",
    [
        (1, 3, 1, {}, "tp 3 x pp 1 does not divide the 1 processes"),
        (3, 3, 1, {}, "tp 3 does not divide num_heads 4"),
        (2, 2, 1, {"num_kv_heads": 1}, "tp 2 does not divide num_kv_heads 1"),
        (3, 1, 3, {}, "pp 3 does not divide num_layers 4"),
        (1, 0, 1, {}, "tp is 0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(world, tp, pp, shape, message) -> None:
    for said in run_world(world, refused, tp, pp, shape):
        assert message in said


def test_architecture_refuses_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="num_heads 3 does not divide hidden_size 32"):
        Architecture(vocab_size=257, num_layers=1, hidden_size=32, num_heads=3, max_length=8)
    with pytest.raises(ValueError, match="family is 'bert'"):
        Architecture(257, 1, 32, 4, 8, family="bert")


def poisoned():
    engine = tiny_engine("language", 1, 1)
    engine.accumulate_logprobs(ragged_batch(), lambda x, part: (x.sum() * torch.nan, {}))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        engine.step()


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    run_world(1, poisoned)
