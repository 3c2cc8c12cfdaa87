"""What each command can be told, with defaults; and how a command line becomes such an object.

The defaults are InstructGPT's (Ouyang et al. 2022, appendix C) where the paper gives a number.
"""

import difflib
import re
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from tetrad.parallel.settings import BYTES, PRESETS, Architecture, Layout, Schedule

RECIPES = Path(__file__).parent / "recipes"


@dataclass
class Parallel:
    tp: int = 1  # tensor parallel ranks
    pp: int = 1  # pipeline stages; what remains of the processes is data parallel
    cp: int = 1  # context parallel ranks: each works on a part of every sequence
    vpp: int = 1  # model chunks of each stage: an interleaved pipeline
    sequence_parallel: bool = False  # between tp ranks, split tokens where weights are not split
    precision: str = "fp32"  # "fp32" or "bf16" (with fp32 main weights)
    microbatch_tokens: int = 16384  # of a micro-batch on one rank
    recompute: bool = False  # run each layer again in the backward pass, to keep its input only
    overlap: bool = False  # data-parallel communication while computing

    def layout(self) -> Layout:
        return Layout(self.tp, self.pp, self.cp, self.vpp, self.sequence_parallel)


@dataclass
class CriticParallel:
    """The layout of critic and reward model; what is not given is as in `parallel`."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    vpp: int | None = None
    sequence_parallel: bool | None = None

    def layout(self, parallel: Parallel) -> Layout:
        return replace(parallel.layout(), **{k: v for k, v in vars(self).items() if v is not None})


@dataclass
class Model:
    """Where a model comes from: a checkpoint, or a fresh one of this shape."""

    init: str | None = None  # a run's folder, a checkpoint or one role's folder in it
    tokenizer: str = "bytes"  # or a local folder or hub name; a checkpoint brings its own
    preset: str | None = None  # a known shape, such as gpt2-117m; other keys given here override it
    family: str = "llama"  # gpt1, gpt2, llama, qwen2 or qwen3
    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None  # default hidden_size / num_heads
    ffn_hidden_size: int | None = None
    max_length: int = 2048  # tokens
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    rope_scaling: list[float] | None = None  # Llama 3's: factor, low, high, original max_length
    norm_eps: float = 1e-5
    windows: list[int] = field(default_factory=list)  # tokens a layer's query sees, cyclic; 0: all

    def architecture(self, vocab_size: int) -> Architecture:
        shape = {k: v for k, v in vars(self).items() if k not in ("init", "tokenizer", "preset")}
        return Architecture(vocab_size=vocab_size, **shape)


@dataclass
class Data:
    path: str | None = None  # .jsonl, .json, .txt (or .gz of these), .parquet, or a hub name
    fields: dict[str, Any] = field(default_factory=dict)  # our fields from the file's, as templates
    split: str = "train"  # of a hub data set
    limit: int | None = None  # rows to read


@dataclass
class Run:
    """What every command has."""

    out: str = MISSING  # folder of this run
    seed: int = 0
    parallel: Parallel = field(default_factory=Parallel)


@dataclass
class Training(Run):
    """What every training command has."""

    model: Model = field(default_factory=Model)
    save_every: int = 100  # steps between checkpoints; the last step is always saved
    save_in_background: bool = False  # write them while training goes on, from copies on the host
    keep: int = 2  # checkpoints kept
    resume: bool = True  # continue the run in `out`, if there is one; False starts it afresh
    stop_after: int | None = None  # end this process after so many steps; the run stays resumable


@dataclass
class Pretrain(Training):
    text: Data = field(default_factory=Data)
    length: int = 512  # tokens of a training sequence
    epochs: float = 1
    batch_size: int = 32  # sequences
    validation: float = 0.02  # fraction of the sequences held out
    dropout: float = 0.0
    schedule: Schedule = field(default_factory=lambda: Schedule(lr=3e-4, warmup_steps=100))


@dataclass
class SFT(Training):
    data: Data = field(default_factory=Data)
    max_length: int = 2048  # tokens of prompt + response
    epochs: float = 16
    batch_size: int = 32  # demonstrations
    validation: float = 0.02  # fraction of the demonstrations held out
    dropout: float = 0.2  # on the residual branches
    schedule: Schedule = field(default_factory=Schedule)


@dataclass
class RM(Training):
    data: Data = field(default_factory=Data)
    max_length: int = 2048  # tokens of prompt + completion
    epochs: float = 1  # more over-fits
    batch_size: int = 64  # prompts, each with all its completions
    validation: float = 0.05  # fraction of the prompts held out
    dropout: float = 0.0
    demonstrations: Data = field(default_factory=Data)  # the bias is shifted: these average 0
    schedule: Schedule = field(default_factory=lambda: Schedule(lr=9e-6))


@dataclass
class Sampling:
    max_new: int = 1024  # tokens of a response
    temperature: float = 1.0
    rows_at_once: int = 256  # responses that one rank samples together (the key-value cache)


@dataclass
class PPO(Training):
    """model.init is the policy to start from, and the reference unless `reference` names one."""

    reward: str = MISSING  # the reward model's run or checkpoint
    critic: str | None = None  # default: starts from the reward model
    critic_parallel: CriticParallel = field(default_factory=CriticParallel)
    colocate: str = (
        "auto"  # models stay on the GPU: "resident"; take turns with host memory: "swap"
    )
    reference: str | None = None  # default: model.init
    prompts: Data = field(default_factory=Data)
    max_prompt: int = 1024  # tokens; longer prompts are left out
    text: Data = field(default_factory=Data)  # pretraining text, for ptx_coef > 0
    steps: int = 500  # iterations: 256k episodes at a batch of 512
    batch_size: int = 512  # episodes of one iteration
    minibatch_size: int = 64  # episodes of one optimizer step
    ppo_epochs: int = 1  # passes over the episodes of one iteration
    sampling: Sampling = field(default_factory=Sampling)
    no_eos_score: float | None = None  # replaces the score of a response cut at max_new
    kl_coef: float = 0.02  # reward per nat of KL to the reference
    kl_estimator: str = "k1"
    gamma: float = 1.0  # no discount
    lam: float = 0.95  # of GAE; not in the paper
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    ema_decay: float | None = None  # of the average of policy weights; InstructGPT: 0.992
    ptx_coef: float = 0.0  # weight of the pretraining loss; InstructGPT: 27.8
    ptx_ratio: float = 8.0  # pretraining sequences per episode
    ptx_length: int = 512  # tokens of a pretraining sequence
    schedule: Schedule = field(default_factory=lambda: _ppo_schedule(9e-6))  # lr not in the paper
    critic_schedule: Schedule = field(default_factory=lambda: _ppo_schedule(9e-6))


def _ppo_schedule(lr: float) -> Schedule:
    return Schedule(lr=lr, decay="constant", warmup_steps=10)


@dataclass
class Plan(PPO):
    """A run of PPO on a machine that need not be there: checkpoints are read if they are given."""

    gpus: int = 8
    gpu: str = "h200-141gb"  # parallel/estimate.py has the others
    out: str = ""  # nothing is written
    reward: str = ""
    reward_shape: Model = field(default_factory=Model)  # critic's too; default: the policy's


@dataclass
class Generate(Run):
    model: str = MISSING  # a run or checkpoint
    prompt: str | None = None  # one prompt, or
    prompts: Data = field(default_factory=Data)  # many
    max_prompt: int = 1024
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Evaluate(Run):
    model: str = MISSING  # a run or checkpoint of a language model
    text: Data = field(default_factory=Data)  # -> loss in nats per token
    length: int = 512
    prompts: Data = field(default_factory=Data)  # with `reward` -> score of sampled responses
    max_prompt: int = 1024
    reward: str | None = None
    baseline: str | None = None  # another policy -> win rate by the reward model, and KL to it
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Import:
    source: str = MISSING  # folder of a Hugging Face model: config.json and safetensors
    out: str = MISSING  # folder of the checkpoint
    tokenizer: str | None = None  # "bytes", a folder or hub name; default: a copy of the source's


@dataclass
class Export:
    source: str = MISSING  # a run's folder, a checkpoint or one role's folder in it
    out: str = MISSING  # folder of the Hugging Face model
    shard_size: float = 5e9  # bytes of one file at most
    ema: bool = False  # the moving average of the weights, of a run with ema_decay


@dataclass
class Demo(Run):
    out: str = "runs/demo"
    scale: float = 1.0  # of all numbers of steps; small ones only show that everything runs
    parallel: Parallel = field(default_factory=lambda: Parallel(microbatch_tokens=8192))


class ConfigError(ValueError):
    """A command line or YAML file that does not fit; the message is one line."""


def parse(schema: type, arguments: list[str]) -> Any:
    """[CONFIG.yaml] [a.b=value …] -> an object of the schema. Later arguments win.

    Of a schema with a source, an argument that is no a.b=value is the source.
    """
    config = OmegaConf.structured(schema)
    layers = []
    for argument in arguments:
        if "=" not in argument and hasattr(schema, "source"):
            argument = f"source={argument}"
        if "=" in argument:
            key, _, text = argument.partition("=")
            _check_key(key, config, argument)
            layer = _override(key, text, config)
        else:
            layer = _load(argument)
            for key in _leaves(layer):
                _check_key(key, config, argument)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or argument
            raise ConfigError(f"{argument}: {key}: {str(error).splitlines()[0]}") from None
        layers.append(layer)
    if issubclass(schema, Training):
        presets = {key: config[key].preset for key in ("model", "reward_shape") if key in config}
        shapes = {key: _preset(key, name) for key, name in presets.items() if name is not None}
        config = OmegaConf.merge(OmegaConf.structured(schema), shapes, *layers)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"missing {', '.join(missing)}; give {missing[0]}=…")
    cfg = OmegaConf.to_object(config)
    _check_ranges(cfg)
    return cfg


def _preset(key: str, name: str) -> dict[str, Any]:
    """The keys of `model` that a preset means; the vocabulary is the tokenizer's."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ConfigError(f"{key}.preset={name}: unknown preset; the nearest is {near[0]}")
    return {key: value for key, value in PRESETS[name].items() if key != "vocab_size"}


def _override(key: str, text: str, config: DictConfig) -> DictConfig:
    """The config that `key=text` means. What is to be a string is taken as it stands, a prompt or
    a template with braces, colons or dollars too; anything else is YAML, as in a file."""
    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    literal = parent.endswith("fields") and not text.startswith("[")
    if literal or isinstance(section._get_node(leaf), StringNode) and text != "null":
        layer = OmegaConf.create({})
        OmegaConf.update(layer, key, text.replace("${", "\\${"))
        return layer
    try:
        return OmegaConf.from_dotlist([f"{key}={text}"])
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text}: {text} is no value in YAML") from None


_AT_LEAST_ONE = (
    "microbatch_tokens", "save_every", "keep", "length", "max_length", "batch_size", "max_prompt",
    "minibatch_size", "steps", "ppo_epochs", "max_new", "rows_at_once", "ptx_length", "gpus",
)  # fmt: skip
_WITHIN = {
    "ema_decay": (0, 0.999999), "validation": (0, 0.9), "gamma": (0, 1), "lam": (0, 1),
    "dropout": (0, 0.9),
}  # fmt: skip
_POSITIVE = ("shard_size", "epochs", "clip_range", "value_clip_range", "ptx_ratio", "scale")
_NOT_NEGATIVE = ("temperature", "kl_coef", "ptx_coef")


def _check_ranges(cfg: Any, prefix: str = "") -> None:
    for name, value in vars(cfg).items():
        if is_dataclass(value):
            _check_ranges(value, f"{prefix}{name}.")
        elif value is None:
            continue
        elif name in _AT_LEAST_ONE and value < 1:
            raise ConfigError(f"{prefix}{name} is {value}; it must be at least 1")
        elif name in _WITHIN and not _WITHIN[name][0] <= value <= _WITHIN[name][1]:
            low, high = _WITHIN[name]
            raise ConfigError(f"{prefix}{name} is {value}; it must be in [{low}, {high}]")
        elif name in _POSITIVE and not value > 0:
            raise ConfigError(f"{prefix}{name} is {value}; it must be positive")
        elif name in _NOT_NEGATIVE and value < 0:
            raise ConfigError(f"{prefix}{name} is {value}; it must not be negative")
        elif name == "kl_estimator" and value not in ("k1", "k2", "k3", "abs"):
            raise ConfigError(f"{prefix}{name} is {value}; it must be k1, k2, k3 or abs")
        elif name == "precision" and value not in BYTES:
            raise ConfigError(f"{prefix}{name} is {value}; it must be {' or '.join(BYTES)}")
        elif name == "colocate" and value not in ("resident", "swap", "auto"):
            raise ConfigError(f"{prefix}{name} is {value}; it must be resident, swap or auto")


def as_yaml(config: Any) -> str:
    """A config, or a schema with its defaults, as `parse` would read it."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def completed(config: Any, path: Path) -> str:
    """The YAML of an older run, with defaults for what could not be said then."""
    return OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.structured(type(config)), _load(str(path))))


def _load(name: str) -> DictConfig:
    path = Path(name)
    if not path.exists():
        path = RECIPES / name
    if not path.is_file():
        raise ConfigError(f"no config file {name}, here or among the recipes")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors have no common class
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{name}: not a mapping of keys to values")
    return layer


def _leaves(layer: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, layer):
        child = layer._get_node(key)
        if isinstance(child, DictConfig) and key != "fields" and not child._is_none():
            keys += _leaves(child, f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _check_key(key: str, config: DictConfig, argument: str) -> None:
    """Raise when `key` is not in the schema, naming the nearest that is."""
    known = set(_leaves(config))
    if key in known or any(key.startswith(f"{k}.") for k in known if k.endswith("fields")):
        return
    sections = {k[: m.start()] for k in known for m in re.finditer(r"\.", k)}
    if key in sections:
        raise ConfigError(f"{argument}: {key} is a section; set one of its keys, {key}.…")
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
    raise ConfigError(f"{argument}: unknown key {key}; the nearest is {near[0]}")
