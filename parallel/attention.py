"""Causal attention over packed sequences, with or without a key-value cache."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KVCache:
    """Keys and values of a batch of sequences of at most `max_length` tokens, for every layer."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, p: "Packing") -> tuple[Tensor, Tensor]:
        """Store k, v (T, heads, d) behind what is there; (S, longest_context, heads, d) of all."""
        if layer not in self.layers:
            shape = (len(p.cu_seqlens) - 1, self.max_length, *k.shape[1:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = self.layers[layer]
        keys[p.sequence, p.positions] = k
        values[p.sequence, p.positions] = v
        return keys[:, : p.longest_context], values[:, : p.longest_context]

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows (a boolean mask)."""
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}


@dataclass
class Packing:
    """How T tokens form S sequences; what attention and positions need to know of a micro-batch.

    With a cache, the tokens continue sequences of which `start` tokens are in it already. Megatron
    hands this object down to attention as `packed_seq_params`.
    """

    cu_seqlens: Tensor  # (S + 1,)
    output_rows: Tensor  # (R,) tokens whose final hidden state goes into the head
    cache: KVCache | None = None
    start: Tensor | None = None  # (S,) tokens of each sequence in the cache already
    qkv_format: str = "packed"  # not "thd": Megatron then leaves query, key, value (T, 1, n, d)

    def __post_init__(self) -> None:
        lengths = self.cu_seqlens.diff()
        self.longest = int(lengths.max())
        self.uniform = bool((lengths == self.longest).all())
        self.sequence = torch.repeat_interleave(lengths)  # (T,)
        index = torch.arange(len(self.sequence), device=lengths.device)
        self.place = index - self.cu_seqlens[:-1][self.sequence]  # (T,)
        self.positions = self.place
        self.longest_context = self.longest
        if self.start is not None:
            self.positions = self.place + self.start[self.sequence]
            self.longest_context = int((self.start + lengths).max())

    def unpack(self, x: Tensor) -> Tensor:
        """(T, …) -> (S, longest, …), zeros behind each sequence."""
        S = len(self.cu_seqlens) - 1
        if self.uniform:
            return x.view(S, self.longest, *x.shape[1:])
        padded = x.new_zeros(S, self.longest, *x.shape[1:])
        return padded.index_put((self.sequence, self.place), x)

    def pack(self, x: Tensor) -> Tensor:
        """(S, longest, …) -> (T, …)."""
        return x.flatten(0, 1) if self.uniform else x[self.sequence, self.place]


class Attention(nn.Module):
    """Megatron's core attention by PyTorch's scaled_dot_product_attention.

    Sequences are laid side by side, padded on the right: a causal query never sees that padding.
    """

    def __init__(self, config, layer_number: int, softmax_scale: float | None = None, **_) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.dropout = config.attention_dropout

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: Packing, **_):
        """query (T, 1, heads, d), key and value (T, 1, groups, d) -> (T, 1, heads * d)."""
        p = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q = p.unpack(q)
        mask = None
        if p.cache is None:
            k, v = p.unpack(k), p.unpack(v)
        else:
            k, v = p.cache.extend(self.layer_number, k, v, p)
            assert p.start is not None
            last_visible = p.start[:, None] + torch.arange(p.longest, device=q.device)
            places = torch.arange(p.longest_context, device=q.device)
            mask = (places <= last_visible[..., None])[:, None]  # (S, 1, longest, longest_context)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return p.pack(out.transpose(1, 2)).flatten(1)[:, None]
