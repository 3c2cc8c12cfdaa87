"""Hugging Face models in and out, tensor by tensor: neither way holds a model in memory.

A checkpoint orders rows so that tensor parallel ranks can each take a run of them; `_parts` says
which Hugging Face tensors a tensor of ours is made of:

    linear_qkv  each key-value group's queries, key, value    q_proj k_proj v_proj, or c_attn
    linear_fc1  of SwiGLU the gate, then up                   gate_proj up_proj, or c_fc
    linear_*    (out, in)                                     the same; of GPT (in, out)

Numbers are copied, never computed with: every tensor keeps its dtype and its bits.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tetrad.parallel.checkpoint import read_model, write_text
from tetrad.parallel.settings import FAMILIES, Architecture
from tetrad.parallel.streams import (
    DTYPES,
    Checkpoint,
    Place,
    SafeTensors,
    write_checkpoint,
    write_safetensors,
)

Parts = dict[Place, tuple[str, ...]]  # a tensor of ours: the names of those that it is made of

_CLASSES = {
    "gpt1": "OpenAIGPT", "gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3",
}  # fmt: skip
_GPT = {
    "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_heads",
    "n_positions": "max_length", "layer_norm_epsilon": "norm_eps",
}  # fmt: skip
_ROPED = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_length", "rms_norm_eps": "norm_eps",
}  # fmt: skip
_FIELDS = {  # of config.json, and what our Architecture calls them
    family: fields | {"vocab_size": "vocab_size", "tie_word_embeddings": "tie_embeddings"}
    for family, fields in {
        "gpt1": _GPT, "gpt2": _GPT | {"n_inner": "ffn_hidden_size"},
        "llama": _ROPED, "qwen2": _ROPED, "qwen3": _ROPED,
    }.items()
}  # fmt: skip
_ALLOWED: dict[str, dict[str, tuple]] = {  # options that our models lack: the values that mean ours
    "gpt1": {"afn": ("gelu",)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    "qwen2": {"hidden_act": ("silu",)},
    "qwen3": {"hidden_act": ("silu",), "attention_bias": (False,)},
}  # fmt: skip
_NEVER = {"quantization_config": (None,), "dual_chunk_attention_config": (None,)}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_BIAS = Place("output_layer.bias", (1,))  # of our scalar head; theirs have none, and ignore one
_SCALAR = ("ForSequenceClassification", "ForTokenClassification")
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old files; no weights


def import_model(source: Path, out: Path, tokenizer: str) -> None:
    """Write a Hugging Face folder's model (config.json, safetensors) as a checkpoint into `out`.

    tokenizer: the name that `checkpoint.read_model` gives it. Raises ValueError for a model that
    ours cannot be, naming the option or the tensor.
    """
    a, head = read_config(source)
    files, parts = SafeTensors(source), _parts(a, head)
    has_bias = "score.bias" in files.shapes
    if not has_bias:
        parts.pop(_BIAS, None)
    prefix = "model." if a.gated else "transformer."
    stored = {  # the base model's own files, as GPT-2's on the hub, lack the prefix
        name if name.startswith((prefix, "lm_head.", "score.")) else prefix + name: name
        for name in files.shapes
    }
    _check(source, files, stored, parts, a, head)

    def tensors() -> Iterator[tuple[Place, Tensor]]:
        for place, names in tqdm(parts.items(), "import", disable=None):
            yield place, _ours([files.read(stored[name]) for name in names], place, a)
        if head == "scalar" and not has_bias:
            yield _BIAS, torch.zeros(1, dtype=DTYPES[files.types["score.weight"]])

    write_checkpoint(out, tensors())
    model = {"head": head, "tokenizer": tokenizer, "architecture": asdict(a)}
    write_text(out / "model.json", json.dumps(model, indent=1))


def _check(
    source: Path, files: SafeTensors, stored: Mapping[str, str], parts: Parts, a: Architecture,
    head: str,
) -> None:  # fmt: skip
    """Raise ValueError unless these parts are all there is, each in its shape, and each key in one
    dtype. stored: the names in the files."""
    unused = {name for name in stored if not name.endswith(_BUFFERS)}
    if head == "scalar" or a.tie_embeddings:
        unused.discard("lm_head.weight")
    types: dict[str, str] = {}
    for place, names in parts.items():
        empty = torch.empty(place.shape, device="meta")
        for name, x in zip(names, _theirs(empty, place, a)):
            if name not in stored:
                raise ValueError(f"{source} lacks the tensor {name}")
            shape, kind = files.shapes[stored[name]], files.types[stored[name]]
            if shape != x.shape:
                wanted = tuple(x.shape)
                raise ValueError(f"{source}: {name} is {shape}, by config.json it is {wanted}")
            if kind not in DTYPES:
                raise ValueError(f"{source}: {name} is {kind}, not one of {', '.join(DTYPES)}")
            if types.setdefault(place.key, kind) != kind:
                others = types[place.key]
                raise ValueError(f"{source}: {name} is {kind}, others of its kind are {others}")
            unused.discard(name)
    if unused:
        few = ", ".join(sorted(unused)[:3])
        raise ValueError(f"{source} has tensors that our model lacks: {few}")


def export_model(
    source: Path, out: Path, ids: Mapping[str, Any], shard_bytes: float, average: bool = False
) -> None:
    """Write one role's checkpoint folder as a Hugging Face model into `out`: config.json and
    safetensors, in several files of at most shard_bytes (or one of our tensors) when it is larger.

    average: the moving average of the weights, in their place.
    ids: bos_token_id and the like, for config.json. Raises ValueError when Hugging Face's model of
    this family cannot be this one.
    """
    a, description = read_model(source)
    head = description["head"]
    stored, parts = Checkpoint(source, average), _parts(a, head)
    if head == "scalar" and not stored.read(_BIAS).any():
        parts.pop(_BIAS)
    config = _config(a, head, stored.dtype(next(iter(parts))), ids)
    write_text(out / "config.json", json.dumps(config, indent=2))
    _check_kept(a, read_config(out)[0], config["architectures"][0])
    shards: list[Parts] = [{}]
    size = total = 0
    for place, names in parts.items():
        n = math.prod(place.shape) * stored.dtype(place).itemsize
        if shards[-1] and size + n > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][place] = names
        size, total = size + n, total + n
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        tensors = {
            name: x
            for place, names in shard.items()
            for name, x in zip(names, _theirs(stored.empty(place), place, a))
        }
        places = tqdm(shard, f"export {i + 1} of {len(shards)}", disable=None)
        numbers = (x for place in places for x in _theirs(stored.read(place), place, a))
        many = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_safetensors(out / f"model{many}.safetensors", tensors, numbers)
        weight_map |= dict.fromkeys(tensors, f"model{many}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(out / "model.safetensors.index.json", json.dumps(index, indent=2))


def read_config(source: Path) -> tuple[Architecture, str]:
    """The shape of a Hugging Face model, and its head."""
    path = source / "config.json"
    if not path.is_file():
        raise ValueError(f"{source} is no folder of a Hugging Face model: no config.json in it")
    model_type = json.loads(path.read_text()).get("model_type")
    families = {theirs: ours for ours, theirs in FAMILIES.items()}
    if model_type not in families:
        raise ValueError(
            f"{path}: model_type is {model_type!r}; it must be one of {', '.join(families)}"
        )
    from transformers import AutoConfig  # seconds to import

    config: Any = AutoConfig.from_pretrained(source)  # knows the defaults, and old spellings
    family = families[model_type]
    rope = getattr(config, "rope_parameters", None) or {}
    for name, allowed in (_ALLOWED[family] | _NEVER).items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{path}: {name} is {value}; only {allowed[0]} is supported")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope_type is {kind!r}; only default and llama3 are supported")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        factor = rope["partial_rotary_factor"]
        raise ValueError(f"{path}: partial_rotary_factor is {factor}; only 1.0 is supported")
    head = "language"
    if any(c.endswith(_SCALAR) for c in config.architectures or ()):
        head = "scalar"
        if config.num_labels != 1:
            raise ValueError(f"{path}: num_labels is {config.num_labels}; only 1 is supported")
    slides = {"full_attention": 0, "sliding_attention": getattr(config, "sliding_window", 0) or 0}
    layers = config.layer_types if family in ("qwen2", "qwen3") else ()
    windows = tuple(slides[layer] for layer in layers)
    fields: dict[str, Any] = {
        ours: getattr(config, theirs, None) for theirs, ours in _FIELDS[family].items()
    }
    fields["rope_base"] = rope.get("rope_theta", Architecture.rope_base)
    if kind == "llama3":
        fields["rope_scaling"] = tuple(float(rope[name]) for name in _LLAMA3)
    return Architecture(family=family, windows=windows if any(windows) else (), **fields), head


def _config(a: Architecture, head: str, dtype: torch.dtype, ids: Mapping[str, Any]) -> dict:
    """config.json, in the spelling that transformers 4 understands too."""
    whole = _explicit(a)
    language = "ForCausalLM" if a.gated else "LMHeadModel"
    kind = language if head == "language" else "ForSequenceClassification"
    config = {
        "architectures": [_CLASSES[a.family] + kind],
        "model_type": FAMILIES[a.family],
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: getattr(whole, ours) for theirs, ours in _FIELDS[a.family].items()},
        **ids,
    }
    if a.gated:
        config["rope_theta"] = a.rope_base
    if a.rope_scaling is not None:
        *factors, length = a.rope_scaling
        config["rope_scaling"] = dict(
            zip(("rope_type", *_LLAMA3), ("llama3", *factors, int(length)))
        )
    if whole.windows:
        config |= {"use_sliding_window": True, "sliding_window": max(whole.windows)}
        config["layer_types"] = [f"{'sliding' if w else 'full'}_attention" for w in whole.windows]
    if head == "scalar":
        config["id2label"] = {"0": "LABEL_0"}  # how a config says num_labels=1
        ends = config.get("eos_token_id")
        if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
            config["pad_token_id"] = None  # they would read the score before the end-of-text token
    return config


def _explicit(a: Architecture) -> Architecture:
    """The same with what it implies written out, to compare it."""
    windows = tuple(a.window(i) for i in range(a.num_layers))
    return replace(
        a,
        num_kv_heads=a.kv_heads,
        head_dim=a.channels,
        ffn_hidden_size=a.ffn,
        windows=windows if any(windows) else (),
    )


def _check_kept(a: Architecture, read: Architecture, name: str) -> None:
    """Raise when `read`, that Hugging Face made of our config, is another model."""
    kept, wanted = asdict(_explicit(read)), asdict(_explicit(a))
    lost = [f"{key} {value}" for key, value in wanted.items() if kept[key] != value]
    if lost:
        raise ValueError(f"{name} cannot have {', '.join(lost)}")


def _parts(a: Architecture, head: str) -> Parts:
    """A whole model. A checkpoint's padded rows of the vocabulary are no part of it."""
    h, words = a.hidden_size, (a.vocab_size, a.hidden_size)
    parts: dict[str, tuple[tuple[int, ...], str]]
    if a.gated:
        parts = {"embedding.word_embeddings.weight": (words, "model.embed_tokens.weight")}
        block, last = "model.layers.{}.", {"weight": "model.norm.weight"}
    else:
        word, place = ("wte", "wpe") if a.family == "gpt2" else ("tokens_embed", "positions_embed")
        parts = {
            "embedding.word_embeddings.weight": (words, f"transformer.{word}.weight"),
            "embedding.position_embeddings.weight": (
                (a.max_length, h), f"transformer.{place}.weight",
            ),
        }  # fmt: skip
        block = "transformer.h.{}."
        kinds = ("weight", "bias") if a.family == "gpt2" else ()
        last = {kind: f"transformer.ln_f.{kind}" for kind in kinds}
    parts |= {f"decoder.final_layernorm.{kind}": ((h,), name) for kind, name in last.items()}
    if head == "scalar":
        parts["output_layer.weight"] = ((1, h), "score.weight")
        parts[_BIAS.key] = (_BIAS.shape, "score.bias")
    elif not a.tie_embeddings:
        parts["output_layer.weight"] = (words, "lm_head.weight")
    outer = {Place(key, shape): (name,) for key, (shape, name) in parts.items()}
    return outer | {
        Place(f"decoder.layers.{key}", shape, i, a.num_layers): tuple(
            block.format(i) + name for name in names
        )
        for i in range(a.num_layers)
        for key, (shape, names) in _block(a).items()
    }


def _block(a: Architecture) -> dict[str, tuple[tuple[int, ...], list[str]]]:
    """Of one layer, key: (shape, Hugging Face's names)."""
    h, ffn, heads = a.hidden_size, a.ffn, a.num_heads * a.channels
    qkv = heads + 2 * a.kv_heads * a.channels
    if not a.gated:
        first, second = ("input_layernorm", "pre_mlp_layernorm")
        if a.family == "gpt1":
            first, second = ("self_attn_bda.norm", "mlp_bda.norm")
        pairs = {
            first: ("ln_1", (h,)),
            "self_attention.linear_qkv": ("attn.c_attn", (qkv, h)),
            "self_attention.linear_proj": ("attn.c_proj", (h, heads)),
            second: ("ln_2", (h,)),
            "mlp.linear_fc1": ("mlp.c_fc", (ffn, h)),
            "mlp.linear_fc2": ("mlp.c_proj", (h, ffn)),
        }
        weights = {f"{k}.weight": (shape, [f"{n}.weight"]) for k, (n, shape) in pairs.items()}
        return weights | {f"{k}.bias": (s[:1], [f"{n}.bias"]) for k, (n, s) in pairs.items()}
    block = {
        "input_layernorm.weight": ((h,), ["input_layernorm.weight"]),
        "self_attention.linear_qkv.weight": (
            (qkv, h), [f"self_attn.{x}_proj.weight" for x in "qkv"],
        ),
        "self_attention.linear_proj.weight": ((h, heads), ["self_attn.o_proj.weight"]),
        "pre_mlp_layernorm.weight": ((h,), ["post_attention_layernorm.weight"]),
        "mlp.linear_fc1.weight": ((2 * ffn, h), ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
        "mlp.linear_fc2.weight": ((h, ffn), ["mlp.down_proj.weight"]),
    }  # fmt: skip
    if a.family == "qwen2":
        names = [f"self_attn.{x}_proj.bias" for x in "qkv"]
        block["self_attention.linear_qkv.bias"] = ((qkv,), names)
    if a.family == "qwen3":
        for x in "qk":
            name = f"self_attn.{x}_norm.weight"
            block[f"self_attention.{x}_layernorm.weight"] = ((a.channels,), [name])
    return block


def _ours(tensors: Sequence[Tensor], place: Place, a: Architecture) -> Tensor:
    """Hugging Face's tensors of a part -> ours."""
    if ".linear_" in place.key and not a.gated:
        tensors = [x.t() for x in tensors]
    if "linear_qkv" not in place.key:
        return torch.cat(tuple(tensors))  # one too: a view would be saved with all that it views
    q, k, v = tensors if a.gated else tensors[0].chunk(3)
    return torch.cat([x.unflatten(0, (a.kv_heads, -1)) for x in (q, k, v)], 1).flatten(0, 1)


def _theirs(tensor: Tensor, place: Place, a: Architecture) -> list[Tensor]:
    """Our tensor -> Hugging Face's, in the order of `_parts`."""
    tensors = [tensor]
    if "linear_qkv" in place.key:
        sizes = [a.num_heads // a.kv_heads * a.channels, a.channels, a.channels]
        groups = tensor.unflatten(0, (a.kv_heads, -1)).split(sizes, 1)
        tensors = [x.flatten(0, 1) for x in groups]
        tensors = tensors if a.gated else [torch.cat(tensors)]
    elif "linear_fc1" in place.key and a.gated:
        tensors = list(tensor.chunk(2))
    return [x.t() for x in tensors] if ".linear_" in place.key and not a.gated else tensors
