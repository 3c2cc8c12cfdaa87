import pytest
import torch

from tests.forked_world import run_world
from tests.parallel.tiny import LAYOUTS, random_tokens, tiny_engine
from tests.products import Products, assert_aligned, of_size
from tetrad.parallel.generate import generate
from tetrad.parallel.packed import pack
from tetrad.parallel.settings import Layout

EOS = 256


def sample(layout, shape, temperature=0.8, rows_at_once=256):
    """Samples, and the largest difference between their log-probs and the re-scored ones."""
    engine = tiny_engine("language", layout, **shape)
    prompts = random_tokens(5)
    samples = generate(
        engine, prompts, max_new=8, eos_id=EOS, temperature=temperature, seed=(7,),
        rows_at_once=rows_at_once,
    )  # fmt: skip
    batch = pack(prompts, samples.responses)
    rescored = engine.logprobs(batch, temperature or 1.0)[batch.response_mask]
    return samples.responses, float((torch.cat(samples.logprobs) - rescored).abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt1", "qwen3"])
def test_every_layout_samples_the_same_and_agrees_with_rescoring(family) -> None:
    shape = {"family": family, "num_kv_heads": 2, "windows": (0, 4)}
    expected, _ = run_world(1, sample, Layout(), shape)[0]
    for world, layout in LAYOUTS:
        for responses, difference in run_world(world, sample, layout, shape):
            assert responses == expected
            assert difference < 1e-4


def test_rows_sampled_apart_are_the_same() -> None:
    assert (
        run_world(1, sample, Layout(), {}, 0.8, 2)[0][0] == run_world(1, sample, Layout(), {})[0][0]
    )


def decode_with_gpt2_vocabulary(layout):
    """Products of the size of the vocabulary, and the steps in which they were made."""
    engine = tiny_engine("language", layout, vocab_size=50257, num_layers=2)
    with Products() as products:
        samples = generate(engine, random_tokens(5), max_new=4, eos_id=50256)
    heads = of_size(products.seen, 50257 // layout.tp)
    assert_aligned(heads)
    return len(heads), max(map(len, samples.responses))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_multiplies_by_the_head_once_in_aligned_rows(tp) -> None:
    for products, steps in run_world(tp, decode_with_gpt2_vocabulary, Layout(tp=tp)):
        assert products == steps


def greedy():
    engine = tiny_engine("language")
    prompt = random_tokens(5)[0]
    answer = generate(engine, [prompt], max_new=5, eos_id=EOS, temperature=0).responses[0]
    best = []
    for i in range(len(answer)):
        candidates = pack([prompt + answer[:i]] * 257, [[t] for t in range(257)])
        best.append(int(engine.logprobs(candidates)[candidates.response_mask].argmax()))
    return answer, best


def test_temperature_zero_takes_the_most_likely_token() -> None:
    answer, best = run_world(1, greedy)[0]
    assert answer == best


def ending():
    """A model that always says EOS: its embedding of EOS is made the only large one."""
    engine = tiny_engine("language", tie_embeddings=False, num_layers=1)
    with torch.no_grad():
        engine.cores[0].output_layer.weight.zero_()
        engine.cores[0].decoder.final_layernorm.weight.fill_(0)
    uniform = generate(engine, [[1], [2, 3]], max_new=30, eos_id=EOS, seed=(1,))
    only = generate(engine, [[1], [2, 3]], max_new=30, eos_id=0, temperature=0)
    return uniform, only


def test_eos_stops_a_row_and_only_that_row() -> None:
    uniform, only = run_world(1, ending)[0]
    assert only.responses == [[0], [0]] and only.ended == [True, True]
    for response, ended in zip(uniform.responses, uniform.ended):
        assert ended == (response[-1] == EOS) and EOS not in response[:-1]
        assert ended or len(response) == 30
    logprobs = torch.cat(uniform.logprobs)
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -torch.tensor(257.0).log()))


def impossible():
    engine = tiny_engine("language")
    messages = []
    for prompts, max_new, temperature in (([[]], 1, 1), ([[1] * 60], 8, 1), ([[1]], 1, -1)):
        with pytest.raises(ValueError) as error:
            generate(engine, prompts, max_new=max_new, eos_id=EOS, temperature=temperature)
        messages.append(str(error.value))
    return messages


def test_prompts_without_room_are_refused() -> None:
    empty, long, cold = run_world(1, impossible)[0]
    assert "prompt 0 has 0 tokens" in empty
    assert "60 tokens" in long and "max_length 64" in long
    assert "temperature is -1" in cold
