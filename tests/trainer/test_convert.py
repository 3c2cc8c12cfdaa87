import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.forked_world import run_world
from tests.trainer.stages import stage
from tetrad.parallel.settings import PRESETS, Architecture
from tetrad.trainer import cli, config

TEXT = "Él dijo: 2 + 2 = 4."


@pytest.fixture
def source(tmp_path) -> Path:
    """A Hugging Face model whose special tokens are its own, and its byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = "{{ messages[0]['content'] }}"
    shape = transformers.Qwen2Config(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=56, max_position_embeddings=64,
        bos_token_id=fast.bos_token_id, eos_token_id=[fast.eos_token_id, 259], pad_token_id=258,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "source")
    fast.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def tetrad(*arguments) -> str:
    """What `tetrad arguments` prints on stderr, in a process of its own."""
    return run_world(1, _tetrad, [str(a) for a in arguments])[0]


def _tetrad(arguments: list[str]) -> str:
    sys.argv = ["tetrad", *arguments]
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(SystemExit):
        cli.main()
    return stderr.getvalue().strip()


def test_a_model_comes_back_with_its_tokenizer_and_special_tokens(source, tmp_path) -> None:
    tetrad("import", source, f"out={tmp_path}/in")
    tetrad("export", tmp_path / "in", f"out={tmp_path}/back")
    back = tmp_path / "back"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    old, new = (json.loads((x / "config.json").read_text()) for x in (source, back))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert new[key] == old[key] is not None
    mine, first = (load_file(x / "model.safetensors") for x in (back, source))
    assert mine.keys() == first.keys() and all(torch.equal(mine[k], first[k]) for k in first)


def test_an_imported_model_can_be_moved_and_trained_and_exported(source, tmp_path) -> None:
    tetrad("import", source, f"out={tmp_path}/in")
    (tmp_path / "in").rename(tmp_path / "moved")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    sft = [f"out={tmp_path}/sft", f"model.init={tmp_path}/moved", f"data.path={tmp_path}/a.jsonl"]
    sft += ["epochs=1", "batch_size=2", "validation=0", "schedule.lr=1e-2", "max_length=64"]
    run_world(1, stage, "sft", sft)
    tetrad("export", tmp_path / "sft", f"out={tmp_path}/back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    first = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert not torch.equal(model.lm_head.weight, first.lm_head.weight)
    assert model.generation_config.eos_token_id == first.generation_config.eos_token_id
    ours, theirs = map(transformers.AutoTokenizer.from_pretrained, (tmp_path / "back", source))
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids and ours.eos_token_id == 257


def test_a_fresh_model_of_bytes_is_exported_too(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    small = ["model.num_layers=1", "model.hidden_size=32", "model.family=gpt2", "length=16"]
    where = [f"out={tmp_path}/run", f"text.path={tmp_path}/a.txt", "batch_size=64"]
    run_world(1, stage, "pretrain", [*where, *small])
    tetrad("export", tmp_path / "run", f"out={tmp_path}/back")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.config.eos_token_id == 256 and model.config.vocab_size == 257


def test_bad_input_is_told_in_one_line_and_leaves_nothing(source, tmp_path) -> None:
    out, before = tmp_path / "in", {*tmp_path.iterdir()}

    def said(*arguments) -> str:
        line = tetrad(*arguments)
        assert len(line.splitlines()) == 1 and {*tmp_path.iterdir()} == before, line
        return line

    assert f"{tmp_path} exists" in said("import", source, f"out={tmp_path}")
    refused = said("export", source, f"out={out}")
    assert f"no checkpoint in {source}: a model of Hugging Face; `tetrad import` it" in refused
    assert "shard_size is 0" in said("export", source, f"out={out}", "shard_size=0")
    assert said("import", f"out={out}").endswith("missing source; give source=…")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    assert f"{source} has no tokenizer; name one" in said("import", source, f"out={out}")
    shape = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(shape | {"hidden_act": "gelu"}))
    assert "hidden_act is gelu" in said("import", source, f"out={out}", "tokenizer=bytes")


def test_a_tokenizer_must_fit_the_model(source, tmp_path) -> None:
    weights = transformers.AutoModelForCausalLM.from_pretrained(source)
    weights.resize_token_embeddings(256)
    weights.save_pretrained(source)
    said = tetrad("import", source, f"out={tmp_path}/in")
    assert said.endswith(f"tokenizer {source} has 259 tokens, {source} only 256")


def parsed(*arguments: str) -> Architecture:
    return config.parse(config.SFT, ["out=x", *arguments]).model.architecture(50257)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_its_shape(name) -> None:
    known = Architecture(**PRESETS[name] | {"vocab_size": 50257})
    for key in vars(known):
        ours, theirs = getattr(parsed(f"model.preset={name}"), key), getattr(known, key)
        assert (list(ours) if isinstance(theirs, tuple) else ours) == (
            list(theirs) if isinstance(theirs, tuple) else theirs
        ), key


def test_other_keys_override_a_preset_wherever_they_stand(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("model: {num_layers: 3, preset: gpt2-117m}\n")
    for arguments in (["model.hidden_size=60"], ["model.preset=gpt2-345m", "model.hidden_size=60"]):
        a = parsed("model.num_heads=6", str(tmp_path / "a.yaml"), *arguments)
        assert (a.family, a.num_layers, a.hidden_size, a.num_heads) == ("gpt2", 3, 60, 6)
    with pytest.raises(config.ConfigError, match="gpt2-117M: .*; the nearest is gpt2-117m"):
        parsed("model.preset=gpt2-117M")
