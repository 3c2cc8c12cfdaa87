"""Causal attention over packed sequences: windows, grouped queries, context parallelism, a cache.

Everything is pieces: a run of queries of one sequence, and the run of keys that ends where the
piece ends. Without context parallelism a piece is a sequence. With it a rank holds two runs of the
pack, one from the front and one from the back, so that all ranks have as many keys to look at.

A GPU in half precision runs flash-attn, if installed, or PyTorch's own FlashAttention
(varlen_attn); otherwise scaled_dot_product_attention takes pieces of like length side by side,
padded.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

Run = tuple[int, int]  # tokens [begin, end) of a pack
Piece = tuple[int, int, int]  # tokens [begin, end) of a sequence, and the sequence's first


class KVCache:
    """Keys and values of a batch of sequences of at most `max_length` tokens, for every layer."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.longest = 0  # no sequence has more tokens so far
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, p: "Packing") -> tuple[Tensor, Tensor]:
        """Store k, v (T, heads, d) behind what is there; (S, longest, heads, d) of all."""
        if layer not in self.layers:
            shape = (len(p.queries), self.max_length, *k.shape[1:])
            self.layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        keys, values = (x[:, : self.longest] for x in self.layers[layer])
        keys[p.sequence, p.positions] = k
        values[p.sequence, p.positions] = v
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Forget all but these rows (indices), one layer after the other: a second copy of all
        would not fit."""
        for layer, (k, v) in self.layers.items():
            self.layers[layer] = (k[rows], v[rows])


class Packing:
    """How this rank's T tokens lie in sequences; what a model needs to know of a micro-batch.

    lengths: tokens of each sequence; one more pads the pack to a multiple of `multiple`.
    output_rows: tokens of the whole pack whose final hidden state goes into the head.
    group: ranks among which the pack is split (context parallelism); multiple is 2 * their number
    or a multiple of it.
    cache, start (S,): the tokens continue sequences of which `start` tokens are in the cache.
    Megatron hands this object down to attention as `packed_seq_params`.
    """

    qkv_format = "packed"  # not "thd": Megatron then leaves query, key, value (T, 1, n, d)

    def __init__(
        self,
        lengths: Sequence[int],
        output_rows: Tensor,
        *,
        where: torch.device,
        multiple: int = 1,
        group: dist.ProcessGroup | None = None,
        cache: KVCache | None = None,
        start: Tensor | None = None,
    ) -> None:
        total = sum(lengths)
        self.padding = -total % multiple
        lengths = [*lengths, self.padding] if self.padding else list(lengths)
        bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self.group = group if group and group.size() > 1 else None
        runs = [(0, bounds[-1])]
        if self.group:
            runs = _runs(bounds[-1], self.group.rank(), self.group.size())
        pieces = _pieces(bounds, runs)
        self.queries = [end - begin for begin, end, _ in pieces]  # tokens of each piece
        self.keys = [end - first for _, end, first in pieces]
        places = [torch.arange(begin - first, end - first) for begin, end, first in pieces]
        self.positions = torch.cat(places).to(where)  # (T,) place of each token in its sequence
        self.here: Tensor | None = None  # (T,) which tokens of the pack are here; None: all
        self.is_here: Tensor | None = None  # (rows,) which output rows are here; None: all
        self.key_index: Tensor | None = None  # keys of the pieces among those of all ranks
        if self.group:
            self._split(runs, pieces, bounds[-1], output_rows, where)
        else:
            self.output_rows = output_rows.to(where)  # (R,)
        self.cache = cache
        if cache is not None:
            assert start is not None
            counts = torch.tensor(self.queries, device=where)
            self.sequence = torch.repeat_interleave(counts, output_size=bounds[-1])
            self.positions = self.positions + start[self.sequence]
            cache.longest += max(self.queries)
        self._where = where

    def _split(
        self, runs: list[Run], pieces: list[Piece], total: int, output_rows: Tensor,
        where: torch.device,
    ) -> None:  # fmt: skip
        """What this rank holds of `total` tokens and of the output rows, and where the keys of its
        pieces lie when the ranks' keys are gathered."""
        size = self.group.size()
        here = torch.cat([torch.arange(*run) for run in runs])
        everyone = [torch.arange(*run) for r in range(size) for run in _runs(total, r, size)]
        gathered = torch.empty(total, dtype=torch.long)  # place of each token among all ranks'
        gathered[torch.cat(everyone)] = torch.arange(total)
        local = torch.full((total,), -1)
        local[here] = torch.arange(len(here))
        rows = local[output_rows]
        self.here, self.is_here = here, rows >= 0
        self.output_rows = rows[rows >= 0].to(where)
        index = [gathered[first:end] for _, end, first in pieces]
        self.key_index = torch.cat(index).to(where)

    def take(self, tokens: Tensor) -> Tensor:
        """(T,) of the pack's tokens those that are here, with the padding."""
        padded = F.pad(tokens, (0, self.padding))
        return (padded if self.here is None else padded[self.here]).to(self._where)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Cumulated lengths (P + 1,) int32 of the pieces' queries and keys."""
        pair = (torch.tensor([0, *x]).cumsum(0).int() for x in (self.queries, self.keys))
        queries, keys = (x.to(self._where) for x in pair)
        return queries, keys

    @cached_property
    def side_by_side(self) -> tuple[list["_Bucket"], Tensor | None]:
        """The pieces in buckets of like length, and for each token its place in what they make;
        no place when everything is in one bucket, in order and without padding."""
        buckets: dict[int, list[int]] = {}
        for piece, n in enumerate(self.keys):
            buckets.setdefault(n.bit_length(), []).append(piece)
        q_bounds, k_bounds = (x.tolist() for x in self.bounds)
        is_plain = len({*self.queries}) == len({*self.keys}) == 1
        made, place, offset = [], torch.empty(q_bounds[-1], dtype=torch.long), 0
        for chosen in buckets.values():
            q = [self.queries[i] for i in chosen]
            k = [self.keys[i] for i in chosen]
            made.append(
                _Bucket(
                    _index([q_bounds[i] for i in chosen], q, self._where),
                    _index([k_bounds[i] for i in chosen], k, self._where),
                    torch.tensor(q, device=self._where),
                    torch.tensor(k, device=self._where),
                    is_square=q == k,
                    is_plain=is_plain,
                )
            )
            for i, n in zip(chosen, q):
                place[q_bounds[i] : q_bounds[i] + n] = torch.arange(offset, offset + n)
                offset += max(q)
        return made, None if is_plain else place.to(self._where)


class _Bucket:
    """Pieces laid side by side: P rows, as wide as the longest."""

    def __init__(
        self, q_index: Tensor, k_index: Tensor, q_lengths: Tensor, k_lengths: Tensor, *,
        is_square: bool, is_plain: bool,
    ) -> None:  # fmt: skip
        self.q_index, self.k_index = q_index, k_index  # (P, longest) into queries, keys
        self.q_lengths, self.k_lengths = q_lengths, k_lengths  # (P,)
        self.is_square = is_square  # each piece has as many queries as keys
        self.is_plain = is_plain  # these are all pieces, of one length: nothing moves

    def take(self, x: Tensor, index: Tensor) -> Tensor:
        """x (T, …) as (P, longest, …)."""
        picked = x if self.is_plain else x.index_select(0, index.flatten())
        return picked.view(*index.shape, *x.shape[1:])

    def mask(self, window: int) -> Tensor | None:
        """(P or 1, 1, longest queries, longest keys), true where a query sees a key; None when
        causal is all there is to it."""
        if self.is_square and not window:
            return None
        q = torch.arange(self.q_index.shape[1], device=self.q_index.device)
        k = torch.arange(self.k_index.shape[1], device=self.q_index.device)
        if self.is_square:
            return visible(q[None], k, window)[:, None]
        # beyond a piece's queries there is padding, which must see something: 0 * NaN is NaN
        place = (self.k_lengths - self.q_lengths)[:, None] + q
        return visible(place.minimum(self.k_lengths[:, None] - 1), k, window)[:, None]


def visible(query: Tensor, key: Tensor, window: int) -> Tensor:
    """(S, Q, K) which of the places `key` (K,) the queries at `query` (S, Q) see."""
    seen = key <= query[..., None]
    return seen & (key > query[..., None] - window) if window else seen


def _runs(total: int, rank: int, size: int) -> list[Run]:
    """The two runs of tokens that a rank of a context-parallel group holds."""
    chunk = total // (2 * size)
    return [(i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank)]


def _pieces(bounds: list[int], runs: list[Run]) -> list[Piece]:
    """Each sequence's part in each run."""
    return [
        (max(begin, first), min(end, last), first)
        for begin, end in runs
        for first, last in zip(bounds, bounds[1:])
        if max(begin, first) < min(end, last)
    ]


def _index(begins: list[int], lengths: list[int], where: torch.device) -> Tensor:
    """(P, longest) indices begin, begin + 1, …; behind a piece its last one again."""
    steps = torch.arange(max(lengths))
    last = torch.tensor(lengths)[:, None] - 1
    return (torch.tensor(begins)[:, None] + steps.minimum(last)).to(where)


class Attention(nn.Module):
    """Megatron's core attention. window_of(layer 0, 1, …): tokens that a query sees, 0 for all."""

    def __init__(
        self, config, layer_number: int, window_of: Callable[[int], int],
        softmax_scale: float | None = None, **_,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer_number = layer_number
        self.window = window_of(layer_number - 1)
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query, key, value, attention_mask=None, *, packed_seq_params: Packing, **_):
        """query (T, 1, heads, d), key and value (T, 1, groups, d) -> (T, 1, heads * d)."""
        p = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        cached = None
        if p.cache is not None:
            is_first = self.layer_number not in p.cache.layers
            cached = p.cache.extend(self.layer_number, k, v, p)
            cached = None if is_first else cached
        if p.group is not None:
            k, v = (gather_from_sequence_parallel_region(x, group=p.group) for x in (k, v))
            k, v = k[p.key_index], v[p.key_index]
        if cached is not None:
            out = self._continued(q, *cached, p)
        elif q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and flash()[0]:
            out = self._flash(q, k, v, p)
        else:
            out = self._side_by_side(q, k, v, p)
        return out.flatten(1)[:, None]

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, p: Packing) -> Tensor:
        attend, _ = flash()
        assert attend is not None
        window = (self.window - 1 if self.window else -1, 0)
        return attend(q, k, v, *p.bounds, max(p.queries), max(p.keys), self.scale, window)

    def _side_by_side(self, q: Tensor, k: Tensor, v: Tensor, p: Packing) -> Tensor:
        buckets, place = p.side_by_side
        outs = []
        for b in buckets:
            rows = b.take(q, b.q_index), b.take(k, b.k_index), b.take(v, b.k_index)
            outs.append(self._dense(*rows, b.mask(self.window)).flatten(0, 1))
        out = torch.cat(outs)
        return out if place is None else out.index_select(0, place)

    def _continued(self, q: Tensor, keys: Tensor, values: Tensor, p: Packing) -> Tensor:
        """One token of each sequence against its cache."""
        places = torch.arange(keys.shape[1], device=q.device)
        mask = visible(p.positions[:, None], places, self.window)[:, None]
        # the heads of a group side by side as queries: PyTorch has no fast kernel for a mask with
        # grouped queries, it would repeat the whole cache for all heads
        grouped = q.unflatten(1, (keys.shape[2], -1)).transpose(1, 2)
        return self._dense(grouped, keys, values, mask).transpose(1, 2).flatten(1, 2)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(S, Q, heads, d) from q, and from k, v (S, K, groups, d)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2)


@lru_cache
def flash() -> tuple[Callable | None, str]:
    """Variable-length attention for GPUs in half precision, and what it is or why there is none.

    It is called with q, k, v, cumulated lengths of queries and keys, the longest of each, scale,
    window (left, right); a window of (-1, 0) is plain causal attention.
    """
    if not torch.cuda.is_available():
        return None, "scaled_dot_product_attention over padded sequences: there is no GPU"
    try:
        from flash_attn import flash_attn_varlen_func

        def installed(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
            return flash_attn_varlen_func(
                q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True,
                window_size=window, deterministic=torch.are_deterministic_algorithms_enabled(),
            )  # fmt: skip

        return installed, "flash-attn in half precision, scaled_dot_product_attention in fp32"
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn
    groups = "enable_gqa" in inspect.signature(varlen_attn).parameters  # absent in PyTorch 2.11

    def of_torch(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
        more = {}
        if q.shape[1] != k.shape[1]:
            if groups:
                more["enable_gqa"] = True
            else:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **more
        )

    return of_torch, "varlen_attn of PyTorch: flash-attn is not installed; in fp32 SDPA"
