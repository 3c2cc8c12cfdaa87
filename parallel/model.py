"""Megatron's GPTModel with packed sequences and one of two heads: language or scalar."""

import hashlib
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
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
# along which dimension tp ranks split a weight
SPLIT = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
Read = Callable[[Tensor, Tensor], Tensor]  # (hidden, unembedding) -> what a caller wants


class Norm(nn.Module):
    """LayerNorm or RMSNorm, as the config says; by the kernels of NVIDIA apex, if installed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_) -> None:
        super().__init__()
        self.eps, self.rms = eps, config.normalization == "RMSNorm"
        where = {"dtype": config.params_dtype, "device": device.device()}
        self.weight = nn.Parameter(torch.ones(hidden_size, **where))
        self.bias = None if self.rms else nn.Parameter(torch.zeros(hidden_size, **where))
        for p in self.parameters():  # each tp rank has some tokens: Megatron sums the gradients
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        fused = device.apex_norms() if x.is_cuda else None
        if self.rms:
            if fused:
                return fused.fused_rms_norm_affine(x, self.weight, shape, self.eps)
            return F.rms_norm(x, shape, self.weight, self.eps)
        if fused:
            return fused.fused_layer_norm_affine(x, self.weight, self.bias, shape, self.eps)
        return F.layer_norm(x, shape, self.weight, self.bias, self.eps)


class NormAfterAdd(nn.Module):
    """GPT-1's residual: the sum is normalised, not the branch's input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable:
        add = get_bias_dropout_add(training, fused)
        return lambda branch, residual, dropout: self.norm(add(branch, residual, dropout))


class Unembedding(ColumnParallelLinear):
    """The output layer: hands this rank's rows of the weight to the op that reads them."""

    def forward(self, hidden: Tensor, read: Read, weight: Tensor | None = None) -> Tensor:
        return read(hidden, self.weight if weight is None else weight)


class ScalarHead(nn.Linear):
    """One number per token in the place of the unembedding, replicated over tp. The product is
    taken in fp32; in a bf16 model the weights are bf16, the bias too.

    Initialised as lm-human-preferences does: N(0, 1 / sqrt(hidden + 1)), bias 0.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, dtype=torch.float32, device=device.device())

    def forward(self, hidden: Tensor, *_) -> Tensor:
        return F.linear(hidden.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class Model(GPTModel):
    """One pipeline stage, or one chunk of it. The last answers for the rows that
    `Packing.output_rows` names: a language model with what `read` makes of their hidden states
    (R, hidden) and of the unembedding (V / tp, hidden), a scalar model with numbers (R,)."""

    head: str
    architecture: Architecture
    inverse_frequencies: Tensor | None  # (channels / 2,) of RoPE

    def forward(self, tokens: Tensor, packing: Packing, read: Read | None = None) -> Tensor:
        """tokens (T,), those of the packing -> this stage's output; see the class."""
        self.read = read
        return super().forward(
            tokens[None], packing.positions[None], None, packed_seq_params=packing
        )

    def _preprocess(self, input_ids, position_ids, **_):
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else None
        rope = None
        if self.inverse_frequencies is not None:
            angles = position_ids[0, :, None] * self.inverse_frequencies
            rope = torch.cat([angles, angles], -1)[:, None, None]  # (T, 1, 1, channels)
        return hidden, rope, None, None, None, None

    def _postprocess(self, hidden_states, packed_seq_params, **_):
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )  # what comes back is the whole gradient already
        hidden = hidden_states[packed_seq_params.output_rows, 0]
        shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if shared else None
        return self.output_layer(hidden, self.read, weight)


def build(
    architecture: Architecture,
    head: str,
    topology: Topology,
    *,
    precision: str = "fp32",
    dropout: float = 0.0,
    recompute: bool = False,
    seed: int = 0,
    to_be_loaded: bool = False,
) -> list[nn.Module]:
    """This rank's chunks of a model with a "language" or "scalar" head, freshly initialised: one,
    or layout.vpp of them.

    Every weight is a function of (seed, its name), so that all layouts start from the same model.
    dropout: on the residual branches (InstructGPT's SFT: 0.2).
    recompute: keep only each layer's input for the backward pass, and run the layer again there.
    to_be_loaded: draw nothing but a scalar head; drawing the rest would take long.
    Raises ValueError when the layout does not divide the architecture.
    """
    config = _config(architecture, topology, precision, dropout, recompute)
    chunks = []
    for i in range(topology.layout.vpp):
        model = _chunk(architecture, head, topology, config, i)
        _initialise(model, topology, seed, to_be_loaded)
        model.to(device.device())
        chunks.append(model if precision == "fp32" else Float16Module(config, model))
    return chunks


def _chunk(
    architecture: Architecture, head: str, topology: Topology, config: TransformerConfig,
    chunk: int,
) -> Model:  # fmt: skip
    vp_stage = chunk if topology.layout.vpp > 1 else None
    is_last = topology.is_last_stage and chunk == topology.layout.vpp - 1
    model = Model(
        config,
        _layers(architecture, config, topology.pp_rank, vp_stage),
        vocab_size=architecture.padded_vocab(topology.tp),
        max_sequence_length=architecture.max_length,
        pre_process=topology.is_first_stage and chunk == 0,
        post_process=is_last,
        share_embeddings_and_output_weights=head == "language" and architecture.tie_embeddings,
        position_embedding_type="none" if architecture.gated else "learned_absolute",
        pg_collection=topology.groups,
        vp_stage=vp_stage,
    )
    model.head, model.architecture = head, architecture
    model.inverse_frequencies = None
    if architecture.gated:
        model.inverse_frequencies = _inverse_frequencies(architecture).to(device.device())
    if is_last and head == "scalar":
        model.output_layer = ScalarHead(architecture.hidden_size)  # type: ignore[assignment]
    elif is_last:
        model.output_layer.__class__ = Unembedding  # GPTModel does not let us choose
    for module in model.modules():  # Megatron marks what it splits only when it initialises it
        for kind, dim in SPLIT.items():
            if isinstance(module, kind) and module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, True, dim, 1)
    return model


@torch.no_grad()
def shift_scores(chunks: list[Model], amount: float) -> None:
    """Add `amount` to every score of a scalar model (as exactly as its bias can hold it)."""
    if chunks[-1].post_process:
        chunks[-1].output_layer.bias += amount


def unwrap(model: nn.Module) -> Model:
    """The Model inside Megatron's wrappers."""
    while not isinstance(model, Model):
        model = model.module  # type: ignore[assignment]
    return model


def _config(
    a: Architecture, topology: Topology, precision: str, dropout: float, recompute: bool
) -> TransformerConfig:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    layout = topology.layout
    layout.check(a)
    dtype = PRECISIONS[precision]
    interleaved = layout.vpp > 1
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=a.kv_heads,
        kv_channels=a.channels,
        ffn_hidden_size=a.ffn,
        normalization="RMSNorm" if a.gated else "LayerNorm",
        layernorm_epsilon=a.norm_eps,
        qk_layernorm=a.family == "qwen3",
        activation_func=F.silu if a.gated else partial(F.gelu, approximate="tanh"),
        gated_linear_unit=a.gated,
        add_bias_linear=not a.gated,
        add_qkv_bias=a.family == "qwen2",
        hidden_dropout=dropout,
        attention_dropout=0.0,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if interleaved else None,
        overlap_p2p_comm=interleaved,  # the other way is silently wrong for two stages
        batch_p2p_comm=not interleaved,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,  # `_initialise` does
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths asks for it, dense or not
        calculate_per_token_loss=True,  # losses come normalised: Megatron must not divide them
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )


def _layers(
    a: Architecture, config: TransformerConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    head_norm = Norm if a.family == "qwen3" else IdentityOp
    if a.family == "gpt1":
        norm: type = IdentityOp
        add: Callable | ModuleSpec = ModuleSpec(module=NormAfterAdd, params={"config": config})
    else:
        norm, add = Norm, get_bias_dropout_add
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=ModuleSpec(module=Attention, params={"window_of": a.window}),
        linear_proj=RowParallelLinear,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    causal = {"attn_mask_type": AttnMaskType.causal}
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(module=SelfAttention, params=causal, submodules=attention),
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=add,
        ),
    )
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    last = None if a.family == "gpt1" else Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=last)


def _inverse_frequencies(a: Architecture) -> Tensor:
    """(channels / 2,) fp32 radians a position, of RoPE; Llama 3 slows down the low ones."""
    exponents = torch.arange(0, a.channels, 2, dtype=torch.float32) / a.channels
    frequencies = 1.0 / a.rope_base**exponents
    if a.rope_scaling is None:
        return frequencies
    factor, low, high, length = a.rope_scaling
    turns = length * frequencies / (2 * math.pi)  # over the length of the first training
    fast = ((turns - low) / (high - low)).clamp(0, 1)
    return fast * frequencies + (1 - fast) * frequencies / factor


@torch.no_grad()
def _initialise(model: Model, topology: Topology, seed: int, to_be_loaded: bool) -> None:
    """Draw each whole weight from (seed, name) and keep this rank's part."""
    offset = get_transformer_layer_offset(model.config, model.vp_stage, topology.pp_rank)
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
        if to_be_loaded and not scalar:
            continue
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
