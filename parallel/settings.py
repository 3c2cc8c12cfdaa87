"""What a model and its training are described by, without anything heavy imported."""

import math
from dataclasses import dataclass

VOCAB_MULTIPLE = 64  # rows of the embedding are padded to a multiple of this and of tp


@dataclass(frozen=True)
class Architecture:
    """The shape of a transformer: what a checkpoint must remember to be built again."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    max_length: int  # tokens
    family: str = "llama"  # "llama": RoPE, RMSNorm, SwiGLU, no bias; "gpt2": learned positions, …
    num_kv_heads: int | None = None  # default num_heads
    ffn_hidden_size: int | None = None  # default 4 hidden, or for llama 8/3 hidden up to 32s
    tie_embeddings: bool = True
    rope_base: int = 10000

    def __post_init__(self) -> None:
        if self.family not in ("llama", "gpt2"):
            raise ValueError(f"family is {self.family!r}; it must be 'llama' or 'gpt2'")
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )

        kv_heads = self.num_kv_heads or self.num_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads {kv_heads} does not divide num_heads {self.num_heads}")

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding over all tp ranks."""
        multiple = math.lcm(VOCAB_MULTIPLE, tp)
        return -(-self.vocab_size // multiple) * multiple


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
