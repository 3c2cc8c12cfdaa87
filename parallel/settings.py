"""What a model, its layout and its training are described by, without anything heavy imported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

VOCAB_MULTIPLE = 64  # rows of the embedding are padded to a multiple of this and of tp
BYTES = {"fp32": 4, "bf16": 2}  # of a weight and of an activation, by precision
ALIGNMENT = 64  # elements: a weight begins where matrix products and collectives are fastest
FAMILIES = {  # name: the Hugging Face model type, and what sets the blocks apart
    "gpt1": "openai-gpt",  # LayerNorm after each residual sum, learned positions, GELU, biases
    "gpt2": "gpt2",  # LayerNorm before each branch, learned positions, GELU, biases
    "llama": "llama",  # RMSNorm, RoPE, SwiGLU, no biases
    "qwen2": "qwen2",  # llama with biases on query, key and value
    "qwen3": "qwen3",  # llama with RMSNorm on the heads of query and key
}


@dataclass(frozen=True)
class Architecture:
    """The shape of a transformer: what a checkpoint must remember to be built again."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    max_length: int  # tokens
    family: str = "llama"  # one of FAMILIES
    num_kv_heads: int | None = None  # default num_heads
    head_dim: int | None = None  # default hidden_size / num_heads
    ffn_hidden_size: int | None = None  # default 4 hidden, or with SwiGLU 8/3 hidden up to 32s
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    rope_scaling: Sequence[float] | None = None  # Llama 3: factor, low, high, original max_length
    norm_eps: float = 1e-5
    windows: Sequence[int] = ()  # tokens a layer's query sees, itself included (0: all), cyclic

    def __post_init__(self) -> None:
        for name in ("windows", "rope_scaling"):  # lists, from JSON and YAML
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; it must be one of {', '.join(FAMILIES)}")
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.rope_scaling is not None and len(self.rope_scaling) != 4:
            raise ValueError(f"rope_scaling is {self.rope_scaling}; it must have four numbers")
        if any(w < 0 for w in self.windows):
            raise ValueError(f"windows are {self.windows}; they must not be negative")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def channels(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP is SwiGLU."""
        return self.family not in ("gpt1", "gpt2")

    @property
    def ffn(self) -> int:
        """Width of the MLP."""
        default = -(-8 * self.hidden_size // 96) * 32 if self.gated else 4 * self.hidden_size
        return self.ffn_hidden_size or default

    def window(self, layer: int) -> int:
        """Tokens that a query of layer 0, 1, … sees, itself included; 0 means all before it."""
        return self.windows[layer % len(self.windows)] if self.windows else 0

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding over all tp ranks."""
        multiple = math.lcm(VOCAB_MULTIPLE, tp)
        return -(-self.vocab_size // multiple) * multiple


def _shape(layers: int, hidden: int, heads: int, length: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50257, "num_layers": layers, "hidden_size": hidden, "num_heads": heads,
        "max_length": length, "family": "gpt2", **more,
    }  # fmt: skip


# GPT-3 alternates dense and locally banded layers; its paper does not say how wide the band is,
# 256 is GPT-Neo's.
_BANDED: dict[str, Any] = {"windows": (0, 256)}
_LLAMA3: dict[str, Any] = {
    "family": "llama", "vocab_size": 128256, "num_kv_heads": 8, "rope_base": 500000.0,
    "rope_scaling": (8.0, 1.0, 4.0, 8192.0), "tie_embeddings": False,
}  # fmt: skip

PRESETS: dict[str, dict] = {
    "gpt1-117m": _shape(12, 768, 12, 512, family="gpt1", vocab_size=40478),
    "gpt2-117m": _shape(12, 768, 12, 1024),
    "gpt2-345m": _shape(24, 1024, 16, 1024),
    "gpt2-762m": _shape(36, 1280, 20, 1024),
    "gpt2-1542m": _shape(48, 1600, 25, 1024),
    "gpt3-1.3b": _shape(24, 2048, 16, 2048, **_BANDED),  # the paper's 24 heads of 128 exceed 2048
    "gpt3-6.7b": _shape(32, 4096, 32, 2048, **_BANDED),
    "gpt3-175b": _shape(96, 12288, 96, 2048, **_BANDED),
    "llama3-8b": _shape(32, 4096, 32, 8192, ffn_hidden_size=14336, **_LLAMA3),
    "llama3-70b": _shape(80, 8192, 64, 8192, ffn_hidden_size=28672, **_LLAMA3),
}


@dataclass(frozen=True)
class Layout:
    """How one model is spread over the processes; what remains is data parallel (dp)."""

    tp: int = 1  # tensor parallel ranks
    pp: int = 1  # pipeline stages
    cp: int = 1  # context parallel ranks: each works on a part of every sequence
    vpp: int = 1  # model chunks of each stage: interleaved pipeline when above 1
    sequence_parallel: bool = False  # between tp ranks, split tokens where weights are not split

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "vpp"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp is {self.vpp}; an interleaved pipeline needs pp of at least 2")

    @property
    def ranks(self) -> int:
        """Processes of one replica of the model."""
        return self.tp * self.pp * self.cp

    @property
    def token_multiple(self) -> int:
        """Tokens of a micro-batch are padded to a multiple of this."""
        split = self.tp if self.sequence_parallel else 1
        return split * (2 * self.cp if self.cp > 1 else 1)

    def dp(self, world: int) -> int:
        """Replicas of the model among `world` processes."""
        if world % self.ranks:
            sizes = f"tp {self.tp} x pp {self.pp}" + (f" x cp {self.cp}" if self.cp > 1 else "")
            raise ValueError(f"{sizes} does not divide the {world} processes of this run")
        return world // self.ranks

    def check(self, a: Architecture) -> None:
        """Raise ValueError when this layout does not divide the architecture."""
        sizes = {"num_heads": a.num_heads, "num_kv_heads": a.kv_heads, "ffn_hidden_size": a.ffn}
        for name, size in sizes.items():
            if size % self.tp:
                raise ValueError(f"tp {self.tp} does not divide {name} {size}")
        if a.num_layers % (self.pp * self.vpp):
            chunks = f"pp {self.pp}" + (f" x vpp {self.vpp}" if self.vpp > 1 else "")
            raise ValueError(f"{chunks} does not divide num_layers {a.num_layers}")


@dataclass
class Schedule:
    """Adam and its learning rate over the steps of a run. The defaults are InstructGPT's."""

    lr: float = 9.65e-6  # peak
    final_lr: float = 0.1  # fraction of lr at the last step, when decaying
    decay: str = "cosine"  # "cosine" or "constant"
    warmup_steps: int = 0
    warmup_from: float = 0.1  # fraction of lr at step 0, when warming up
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping

    def __post_init__(self) -> None:
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"decay is {self.decay!r}; it must be 'cosine' or 'constant'")
        for name in ("lr", "weight_decay", "clip_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("final_lr", "warmup_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
