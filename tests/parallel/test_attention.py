"""Packed attention against the plain formula, one sequence at a time in float64."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tetrad.parallel import attention
from tetrad.parallel.attention import Attention, Packing

CPU = torch.device("cpu")
HEADS, GROUPS, WIDTH = 4, 2, 8
# 1 alone, 2 and 3 in one bucket with padding, 9 twice, 17 in a bucket of its own
RAGGED = [2, 1, 9, 3, 17, 9]


class Config:
    kv_channels = WIDTH


class Rank:
    """As much of a process group as a packing needs."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def inputs(n: int) -> list[torch.Tensor]:
    shapes = ((n, 1, HEADS, WIDTH), (n, 1, GROUPS, WIDTH), (n, 1, GROUPS, WIDTH))
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def plain(q, k, v, lengths, window) -> torch.Tensor:
    """softmax(q k / sqrt(width)) v, token by token, over what the token sees."""
    q, k, v = (x.double().squeeze(1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // GROUPS, 1) for x in (k, v))
    out, first = [], 0
    for n in lengths:
        for i in range(first, first + n):
            seen = slice(max(first, i - window + 1) if window else first, i + 1)
            scores = torch.einsum("hd,khd->hk", q[i], k[seen]) / WIDTH**0.5
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen]).flatten())
        first += n
    return torch.stack(out)[:, None]


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window):
    """What flash-attn and varlen_attn document: pieces of queries and keys that end together."""
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max() and window[1] == 0
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        places = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (places >= 0) & ((places <= window[0]) | (window[0] < 0))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[c:d]))
    return torch.cat(out)


def layer(window: int) -> Attention:
    return Attention(Config, layer_number=1, window_of=lambda _: window)


# every length alone is one bucket without padding; windows: all, itself only, less than a sequence
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("lengths", [RAGGED, [5, 5, 5], [7]])
def test_each_token_sees_what_came_before_it_in_its_sequence(lengths, window) -> None:
    q, k, v = inputs(sum(lengths))
    packing = Packing(lengths, torch.arange(0), where=CPU)
    ours = layer(window)(q, k, v, packed_seq_params=packing)
    truth = plain(q, k, v, lengths, window)
    torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for mine, exact in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(truth, (q, k, v), upstream.double()),
    ):
        torch.testing.assert_close(mine, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_context_parallel_ranks_make_the_same_rows(ranks, flash, window, monkeypatch) -> None:
    monkeypatch.setattr(attention, "flash", lambda: (varlen, ""))
    total = -(-sum(RAGGED) // (2 * ranks)) * 2 * ranks
    q, k, v = inputs(total)
    truth = plain(q, k, v, [*RAGGED, total - sum(RAGGED)], window)
    attend, seen = layer(window), []
    # a rank's keys among all ranks' keys, in the order of the ranks: its runs, one after the other
    runs = [torch.cat([torch.arange(*r) for r in attention._runs(total, i, ranks)])
            for i in range(ranks)]  # fmt: skip
    everyone = torch.cat(runs) if ranks > 1 else torch.arange(total)
    for rank in range(ranks):
        group = Rank(rank, ranks)
        p = Packing(RAGGED, torch.arange(0), where=CPU, multiple=2 * ranks, group=group)
        here = torch.arange(total) if p.here is None else p.here
        keys = everyone if p.key_index is None else everyone[p.key_index]
        rows = (x.squeeze(1) for x in (q[here], k[keys], v[keys]))
        out = (attend._flash if flash else attend._side_by_side)(*rows, p)
        torch.testing.assert_close(out.flatten(1)[:, None].double(), truth[here], atol=1e-5, rtol=0)
        seen += here.tolist()
    assert sorted(seen) == list(range(total))


def test_context_parallel_ranks_have_as_much_to_do() -> None:
    counts = []
    for rank in range(4):
        p = Packing([64], torch.arange(0), where=CPU, multiple=8, group=Rank(rank, 4))
        counts.append(sum(p.queries[i] * (2 * p.keys[i] - p.queries[i]) for i in range(2)))
    assert len(set(counts)) == 1


def test_flash_attn_is_taken_when_it_is_installed(monkeypatch) -> None:
    def flash_attn_varlen_func(*arguments, **options):
        return arguments, options

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(**locals()))
    attend, name = attention.flash.__wrapped__()
    assert name.startswith("flash-attn")
    arguments, options = attend(*range(7), 0.5, (3, 0))
    assert arguments == tuple(range(7))
    deterministic = torch.are_deterministic_algorithms_enabled()
    assert options == {
        "softmax_scale": 0.5, "causal": True, "window_size": (3, 0), "deterministic": deterministic,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attend, name = attention.flash.__wrapped__()
    assert attend is not None and name.startswith("varlen_attn of PyTorch")


def test_cudnn_is_not_asked() -> None:
    """It would plan anew for each length of the cache (see `device.install`)."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_pack_is_padded_by_a_sequence_of_its_own() -> None:
    p = Packing([3, 2], torch.tensor([2, 4]), where=CPU, multiple=4)
    assert p.queries == [3, 2, 3] and p.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert p.take(torch.arange(1, 6)).tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert p.output_rows.tolist() == [2, 4]
