import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as hf
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file, save_file

from tests.forked_world import run_world
from tests.parallel.tiny import ragged_batch, tiny_engine, train_step
from tetrad.parallel import checkpoint
from tetrad.parallel.attention import Packing
from tetrad.parallel.engine import Engine
from tetrad.parallel.hf import export_model, import_model
from tetrad.parallel.model import build, shift_scores, unwrap
from tetrad.parallel.settings import Layout
from tetrad.parallel.topology import initialize

# 4 layers and heads divide by every layout below, 97 words by none; MLPs of no usual width
_GPT = {"vocab_size": 97, "n_positions": 40, "n_embd": 32, "n_layer": 4, "n_head": 4}
_ROPED = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 56, "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
CONFIGS = {
    "gpt1": hf.OpenAIGPTConfig(**_GPT, layer_norm_epsilon=1e-3),
    "gpt2": hf.GPT2Config(**_GPT, n_inner=72, layer_norm_epsilon=1e-3),
    "llama": hf.LlamaConfig(**_ROPED, rope_parameters=_LLAMA3),
    "llama_wide_heads": hf.LlamaConfig(**_ROPED, head_dim=12, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(
        **_ROPED, tie_word_embeddings=True, use_sliding_window=True, sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": hf.Qwen3Config(**_ROPED, head_dim=16),
}  # fmt: skip
LAYOUTS = {
    "1": Layout(),
    "tp2": Layout(2),
    "pp2": Layout(1, 2),
    "tp2 pp2": Layout(2, 2),
    "pp2 vpp2": Layout(1, 2, vpp=2),
}
LENGTHS = (3, 17, 9)  # one is longer than the window of 5


@pytest.fixture
def saved(tmp_path):
    """Saves a random model whose every weight matters, biases and norms too."""

    def save(name: str, head: str = "language", **more) -> Path:
        folder = tmp_path / f"{name} {head}"
        kind = hf.AutoModelForCausalLM
        config = CONFIGS[name]
        if head == "scalar":
            kind, more = hf.AutoModelForSequenceClassification, {"num_labels": 1, **more}
        config = type(config).from_dict(config.to_dict() | more)
        torch.manual_seed(0)
        model = kind.from_config(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(weight.mean().item(), 0.2)
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if name == "llama" else {}))
        return folder

    return save


def sequences() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(97, (n,), generator=g) for n in LENGTHS]


def theirs(folder: Path, head: str = "language") -> torch.Tensor:
    """Logits of all tokens, (29, 97), or a score of each sequence, (3,), by transformers."""
    kind = hf.AutoModelForCausalLM if head == "language" else hf.AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = [model(tokens[None]).logits[0] for tokens in sequences()]
    return torch.cat(outputs)


def ours(folder: Path, layout: Layout) -> torch.Tensor:
    """The same by our fp32 model in this layout, on the last stage."""
    topology = initialize(layout)
    a, description = checkpoint.read_model(folder)
    head = description["head"]
    chunks = build(a, head, topology, seed=5)
    checkpoint.load_weights(chunks, topology, folder)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    rows = torch.arange(sum(LENGTHS)) if head == "language" else last
    packing = Packing(LENGTHS, rows, where=torch.device("cpu"))
    tokens = torch.cat(sequences())
    groups, stage = topology.groups, topology.pp_rank

    def read(hidden, weight):
        return gather_from_tensor_model_parallel_region(hidden @ weight.T, groups.tp)[:, :97]

    def neighbour(step: int) -> int:
        return dist.get_global_rank(groups.pp, (stage + step) % topology.pp)

    for chunk in chunks:  # one after the other, as the pipeline would
        model = unwrap(chunk).eval()
        if not model.pre_process:
            hidden = torch.empty(len(tokens), 1, a.hidden_size)
            dist.recv(hidden, neighbour(-1))
            model.set_input_tensor(hidden)
        with torch.no_grad():
            out = model(tokens, packing, read)
        if not model.post_process:
            dist.send(out, neighbour(1))
    return out


def imported(source: Path) -> Path:
    out = source.with_name(source.name + " imported")
    out.mkdir()
    import_model(source, out, "bytes")
    return out


def exported(source: Path, **more) -> Path:
    out = source.with_name(source.name + " exported")
    out.mkdir()
    export_model(source, out, **{"ids": {}, "shard_bytes": 5e9, **more})
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_imported_model_has_the_logits_of_the_original(name, layout, saved) -> None:
    source = saved(name)
    results = run_world(LAYOUTS[layout].ranks, ours, imported(source), LAYOUTS[layout])
    torch.testing.assert_close(results[-1], theirs(source), atol=1e-4, rtol=1e-4)


def test_a_bf16_model_can_be_continued_in_fp32(saved) -> None:
    source = saved("llama", dtype=torch.bfloat16)
    (logits,) = run_world(1, ours, imported(source), Layout())
    torch.testing.assert_close(logits, theirs(source), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_goes_in_comes_out_bit_for_bit(name, dtype, saved) -> None:
    source = saved(name, dtype=dtype)
    out = exported(imported(source))
    assert_same_bits(tensors(out), tensors(source))
    assert all(x.dtype == dtype for x in tensors(out).values())
    assert torch.equal(theirs(out), theirs(source))


def trained(folder: Path, out: Path, layout: Layout) -> None:
    """Save a run's checkpoint of an imported model in another layout, with a moved scalar bias."""
    topology = initialize(layout)
    a, description = checkpoint.read_model(folder)
    chunks = build(a, description["head"], topology, seed=5)
    checkpoint.load_weights(chunks, topology, folder)
    engine = Engine(chunks, topology, microbatch_tokens=100)
    if description["head"] == "scalar":
        shift_scores(engine.cores, 0.375)
    checkpoint.save(out, 1, {"policy": engine}, {"model": {"tokenizer": "bytes"}})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_of_any_layout_is_exported(name, saved, tmp_path) -> None:
    source = saved(name)
    run_world(4, trained, imported(source), tmp_path / "run", LAYOUTS["tp2 pp2"])
    out = exported(checkpoint.find(str(tmp_path / "run")))
    assert_same_bits(tensors(out), tensors(source))


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_theirs_and_our_bias_is_beside_them(name, saved, tmp_path) -> None:
    source = saved(name, "scalar")
    ckpt = imported(source)
    wanted = theirs(source, "scalar").flatten()
    (scores,) = run_world(1, ours, ckpt, Layout())
    torch.testing.assert_close(scores, wanted, atol=1e-4, rtol=1e-4)
    assert_same_bits(tensors(exported(ckpt)), tensors(source))  # no bias where there was none
    run_world(4, trained, ckpt, tmp_path / "run", LAYOUTS["tp2 pp2"])
    shifted = checkpoint.find(str(tmp_path / "run"), "scalar")
    out = exported(shifted)
    assert torch.equal(theirs(out, "scalar"), theirs(source, "scalar"))
    bias = tensors(out)["score.bias"]
    assert_same_bits(tensors(out), tensors(source) | {"score.bias": torch.tensor([0.375])})
    (scores,) = run_world(1, ours, imported(out), Layout())
    torch.testing.assert_close(scores, wanted + bias, atol=1e-4, rtol=1e-4)


def test_sliding_layers_become_windows(saved) -> None:
    a, _ = checkpoint.read_model(imported(saved("qwen2")))
    assert [a.window(i) for i in range(4)] == [0, 5, 5, 5]


def test_files_are_split_at_the_limit(saved) -> None:
    source = saved("llama")
    assert len(list(source.glob("*.safetensors"))) > 1
    out = exported(imported(source), shard_bytes=20_000)
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 22_000  # 20,000 and a header
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(source).values())
    assert torch.equal(theirs(out), theirs(source))


def test_old_spellings_are_read(saved) -> None:
    """GPT-2's own files have no prefix and have buffers; before version 5, rope had other names."""
    source = saved("gpt2")
    wanted = tensors(source)
    old = {name.removeprefix("transformer."): x for name, x in wanted.items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 40, 40)}, source / "model.safetensors")
    assert_same_bits(tensors(exported(imported(source))), wanted)
    source = saved("llama")
    a, _ = checkpoint.read_model(imported(source))
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(config))
    source = source.rename(source.with_name("old"))
    assert checkpoint.read_model(imported(source))[0] == a
    assert a.rope_base == 500 and list(a.rope_scaling) == [8, 1, 4, 16]


def test_a_token_classifier_is_a_critic_with_its_bias(saved) -> None:
    source = saved("llama", "scalar")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["LlamaForTokenClassification"]
    (source / "config.json").write_text(json.dumps(config))
    model = hf.AutoModelForTokenClassification.from_pretrained(source)
    model.score.bias.data.fill_(0.7)
    model.save_pretrained(source)
    (scores,) = run_world(1, ours, imported(source), Layout())
    with torch.no_grad():
        wanted = [model.eval()(tokens[None]).logits[0, -1, 0] for tokens in sequences()]
    torch.testing.assert_close(scores, torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_a_score_is_not_read_before_the_end_of_text(saved) -> None:
    ckpt = imported(saved("llama", "scalar"))
    for eos in (2, [2, 3]):
        out = exported(ckpt, ids={"eos_token_id": eos, "pad_token_id": 2})
        assert json.loads((out / "config.json").read_text())["pad_token_id"] is None
        out.rename(out.with_name(f"{eos}"))
    out = exported(ckpt, ids={"eos_token_id": 2, "pad_token_id": 4})
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 4


def refusal(work, *arguments, **more) -> str:
    with pytest.raises(ValueError) as error:
        work(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name, option, said",
    [
        ("gpt1", {"afn": "relu"}, "afn is relu; only gelu"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is relu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True; only F"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
        ("llama", {"attention_bias": True}, "attention_bias is True; only False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu; only silu"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}},
         "rope_type is 'yarn'; only default and llama3"),
        ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, "num_labels is 2; only 1"),
        ("qwen2", {"model_type": "bloom"}, "model_type is 'bloom'; it must be one of openai-gpt"),
    ],
)  # fmt: skip
def test_what_our_models_lack_is_refused_by_name(name, option, said, saved) -> None:
    source = saved(name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | option))
    assert said in refusal(imported, source)


def test_files_that_do_not_fit_are_refused(saved, tmp_path) -> None:
    source = saved("qwen3")
    weights = tensors(source)
    first = "model.layers.0.self_attn.q_norm.weight"

    def said_of(changed) -> str:
        save_file(changed, source / "model.safetensors")
        return refusal(import_model, source, tmp_path, "bytes")

    assert f"lacks the tensor {first}" in said_of({k: v for k, v in weights.items() if k != first})
    assert "(8,), by config.json it is (16,)" in said_of(weights | {first: torch.ones(8)})
    assert f"{first} is F64" in said_of(weights | {first: torch.ones(16).double()})
    half = weights | {first.replace("0", "1"): torch.ones(16).half()}
    assert "is F16, others of its kind are F32" in said_of(half)
    extra = weights | {first.replace("weight", "bias"): torch.ones(16)}
    assert "has tensors that our model lacks: model.layers.0.self_attn.q_norm.bias" in said_of(
        extra
    )
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "only pytorch_model.bin" in refusal(import_model, source, tmp_path, "bytes")
    assert "no config.json" in refusal(import_model, tmp_path, tmp_path, "bytes")


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("gpt2", {"windows": [0, 8]}, "GPT2LMHeadModel cannot have windows (0, 8, 0, 8)"),
        ("qwen2", {"windows": [4, 8]}, "Qwen2ForCausalLM cannot have windows (4, 8, 4, 8)"),
        ("llama", {"windows": [8]}, "LlamaForCausalLM cannot have windows (8, 8, 8, 8)"),
        ("gpt2", {"num_kv_heads": 2}, "cannot have num_kv_heads 2"),
    ],
)
def test_what_their_models_lack_is_refused_by_name(name, change, said, saved) -> None:
    ckpt = imported(saved(name))
    model = json.loads((ckpt / "model.json").read_text())
    model["architecture"] |= change
    (ckpt / "model.json").write_text(json.dumps(model))
    assert said in refusal(exported, ckpt)


def peak_growth(work, *arguments) -> int:
    """Bytes by which the most memory ever used exceeds that before."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(*arguments)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_and_out(small: Path, large: Path) -> tuple[int, int]:
    exported(imported(small))  # what these modules need in any case
    growth = peak_growth(imported, large)
    return growth, peak_growth(exported, large.with_name(large.name + " imported"))


def test_a_model_is_never_in_memory(saved) -> None:
    """12 layers of 16 MB and two matrices of 10 MB; two in flight are a few times 10 MB."""
    large = saved(
        "llama", vocab_size=5000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 200e6
    ((into, out),) = run_world(1, in_and_out, saved("gpt2"), large)
    assert into < size / 4 and out < size / 4, (size, into, out)


def averaged(folder, ema_decay):
    engine = tiny_engine("language", ema_decay=ema_decay, tie_embeddings=False)
    for _ in range(3):
        train_step(engine, ragged_batch())
    checkpoint.save(folder, 3, {"policy": engine}, {"model": {"tokenizer": "bytes"}})
    whole = engine.optimizer.whole("ema") if ema_decay else ()
    names = {p: name for name, p in engine.cores[0].named_parameters()}
    return {names[p]: x.clone() for p, x in whole}


def test_the_moving_average_is_exported_when_asked_for(tmp_path) -> None:
    average = run_world(1, averaged, tmp_path, 0.5)[0]
    policy = tmp_path / "step_000003" / "policy"
    ours = {}
    for kind in (False, True):
        out = tmp_path / f"out{kind}"
        out.mkdir()
        export_model(policy, out, {}, 1e9, average=kind)
        ours[kind] = load_file(out / "model.safetensors")
    last = average["decoder.final_layernorm.weight"]
    assert torch.equal(ours[True]["model.norm.weight"], last)
    assert not torch.equal(ours[False]["model.norm.weight"], last)
    run_world(1, averaged, tmp_path / "none", None)
    with pytest.raises(ValueError, match="no moving average of the weights"):
        export_model(tmp_path / "none/step_000003/policy", tmp_path, {}, 1e9, average=True)
