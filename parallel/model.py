"""Megatron's GPTModel with packed sequences and one of two heads: language or scalar."""

import hashlib
import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor, nn

from tetrad.parallel import device
from tetrad.parallel.attention import Attention, Packing
from tetrad.parallel.settings import Architecture
from tetrad.parallel.topology import Topology, mixed_seed

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
INIT_STD = 0.02


class Norm(nn.Module):
    """LayerNorm or RMSNorm, as the config says."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_) -> None:
        super().__init__()
        self.eps, self.rms = eps, config.normalization == "RMSNorm"
        where = {"dtype": config.params_dtype, "device": device.device()}
        self.weight = nn.Parameter(torch.ones(hidden_size, **where))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, **where))

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ScalarHead(nn.Linear):
    """One number per token in the place of the unembedding, replicated over tp. The product is
    taken in fp32; in a bf16 model the weights are bf16, the bias too.

    Initialised as lm-human-preferences does: N(0, 1 / sqrt(hidden + 1)), bias 0.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32, device=device.device())

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class Model(GPTModel):
    """One pipeline stage. The last stage answers for the rows that `Packing.output_rows` names:
    a language model with logits (R, V / tp), a scalar model with numbers (R,)."""

    head: str
    architecture: Architecture

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """tokens (T,) -> this stage's output; see the class."""
        return super().forward(
            tokens[None], packing.positions[None], None, packed_seq_params=packing
        )

    def _preprocess(self, input_ids, position_ids, **_):
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        rope = None
        if self.position_embedding_type == "rope":
            rope = self.rotary_pos_emb(self.max_sequence_length)[position_ids[0]]  # (T, 1, 1, d)
        return hidden, rope, None, None, None, None

    def _postprocess(self, hidden_states, packed_seq_params, **_):
        if not self.post_process:
            return hidden_states
        hidden = hidden_states[packed_seq_params.output_rows, 0]
        if self.head == "scalar":
            return self.output_layer(hidden)
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        return self.output_layer(hidden, weight=weight)[0]


def build(
    architecture: Architecture,
    head: str,
    topology: Topology,
    *,
    precision: str = "fp32",
    dropout: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """This rank's stage of a model with a "language" or "scalar" head, freshly initialised.

    Every weight is a function of (seed, its name), so that all layouts start from the same model.
    dropout: on the residual branches (InstructGPT's SFT: 0.2).
    Raises ValueError when the layout does not divide the architecture.
    """
    config = _config(architecture, topology, precision, dropout)
    model = Model(
        config,
        _layers(config, topology.pp_rank),
        vocab_size=architecture.padded_vocab(topology.tp),
        max_sequence_length=architecture.max_length,
        pre_process=topology.is_first_stage,
        post_process=topology.is_last_stage,
        share_embeddings_and_output_weights=head == "language" and architecture.tie_embeddings,
        position_embedding_type="rope" if architecture.family == "llama" else "learned_absolute",
        rotary_base=architecture.rope_base,
        pg_collection=topology.groups,
    )
    model.head, model.architecture = head, architecture
    if head == "scalar" and topology.is_last_stage:
        model.output_layer = ScalarHead(architecture.hidden_size)  # type: ignore[assignment]
    _initialise(model, topology, seed)
    model.to(device.device())
    return model if precision == "fp32" else Float16Module(config, model)


@torch.no_grad()
def shift_scores(model: Model, amount: float) -> None:
    """Add `amount` to every score of a scalar model (as exactly as its bias can hold it)."""
    if model.post_process:
        model.output_layer.bias += amount


def unwrap(model: nn.Module) -> Model:
    """The Model inside Megatron's wrappers."""
    while not isinstance(model, Model):
        model = model.module  # type: ignore[assignment]
    return model


def _config(a: Architecture, topology: Topology, precision: str, dropout: float):
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    kv_heads = a.num_kv_heads or a.num_heads
    for name, size in (("num_heads", a.num_heads), ("num_kv_heads", kv_heads)):
        if size % topology.tp:
            raise ValueError(f"tp {topology.tp} does not divide {name} {size}")
    if a.num_layers % topology.pp:
        raise ValueError(f"pp {topology.pp} does not divide num_layers {a.num_layers}")
    dtype = PRECISIONS[precision]
    llama = a.family == "llama"
    ffn = a.ffn_hidden_size or (-(-8 * a.hidden_size // 96) * 32 if llama else 4 * a.hidden_size)
    if ffn % topology.tp:
        raise ValueError(f"tp {topology.tp} does not divide ffn_hidden_size {ffn}")
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=kv_heads,
        ffn_hidden_size=ffn,
        normalization="RMSNorm" if llama else "LayerNorm",
        activation_func=F.silu if llama else partial(F.gelu, approximate="tanh"),
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        hidden_dropout=dropout,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, dense or not
        calculate_per_token_loss=True,  # losses come normalised: Megatron must not divide them
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _layers(config: TransformerConfig, pp_rank: int) -> TransformerBlockSubmodules:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=Attention, linear_proj=RowParallelLinear
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
    count = get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


@torch.no_grad()
def _initialise(model: Model, topology: Topology, seed: int) -> None:
    """Draw each whole weight from (seed, name) and keep this rank's part."""
    offset = get_transformer_layer_offset(model.config, pp_rank=topology.pp_rank)
    vocab, tp, tp_rank = model.architecture.vocab_size, topology.tp, topology.tp_rank
    for local_name, weight in model.named_parameters():
        name = _global_name(local_name, offset)
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
        if name.endswith("bias"):
            weight.zero_()
            continue
        if "norm" in name:
            continue  # ones already
        dim = weight.partition_dim if getattr(weight, "tensor_model_parallel", False) else None
        shape = list(weight.shape)
        if dim is not None:
            shape[dim] *= tp
        std = INIT_STD
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= math.sqrt(2 * model.config.num_layers)  # the residual branches (GPT-2)
        scalar = name == "output_layer.weight" and model.head == "scalar"
        if scalar:
            std = 1 / math.sqrt(shape[1] + 1)
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(mixed_seed(seed, digest))
        if name.startswith(("embedding.word", "output_layer")) and not scalar:
            whole = torch.zeros(shape)  # rows beyond the vocabulary stay 0, however many they are
            whole[:vocab] = torch.randn(vocab, shape[1], generator=generator) * std
        else:
            whole = torch.randn(shape, generator=generator) * std
        if dim is None:
            part = whole
        elif name.endswith("linear_fc1.weight") and model.config.gated_linear_unit:
            part = torch.cat([half.chunk(tp, dim)[tp_rank] for half in whole.chunk(2, dim)], dim)
        else:
            part = whole.chunk(tp, dim)[tp_rank]
        weight.copy_(part)


def _global_name(name: str, layer_offset: int) -> str:
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(int(parts[at]) + layer_offset)
    return ".".join(parts)
