"""Sequences laid end to end, without padding, and their division into micro-batches.

Every rank holds the whole batch (tokens and a few floats per token are small beside a model); the
engine decides which rank computes which part. So the algorithms above read as if alone.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Batch:
    """S sequences of N tokens in all. Groups of sequences (the completions of one prompt, say)
    are never divided over micro-batches; by default each sequence is a group of its own.

    Tokens, mask and bounds are on the CPU, where micro-batches are planned; fields may be on a GPU.
    """

    tokens: Tensor  # (N,) int64
    cu_seqlens: Tensor  # (S + 1,) int64
    response_mask: Tensor  # (N,) bool, 1 = a response token that counts; never a first token
    per_token: dict[str, Tensor] = field(default_factory=dict)  # (N,) each
    per_sequence: dict[str, Tensor] = field(default_factory=dict)  # (S,) each
    cu_groups: Tensor = None  # type: ignore[assignment]  # (G + 1,) int64, in sequences

    def __post_init__(self) -> None:
        if self.cu_groups is None:
            self.cu_groups = torch.arange(len(self.cu_seqlens))

    def __len__(self) -> int:
        """The number of groups."""
        return len(self.cu_groups) - 1

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def counted(self) -> int:
        """The number of response tokens, at least 1: what a mean over them is divided by."""
        return max(1, int(self.response_mask.sum()))

    def token_index(self, groups: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Indices into the tokens and into the sequences of these groups, in this order."""
        sequences = _ranges(self.cu_groups, groups)
        return _ranges(self.cu_seqlens, sequences.tolist()), sequences

    def select(self, groups: Iterable[int]) -> "Batch":
        """The batch of these groups alone, in this order."""
        groups = list(groups)
        tokens, sequences = self.token_index(groups)
        return Batch(
            self.tokens[tokens],
            _cumulative(self.lengths[sequences]),
            self.response_mask[tokens],
            {name: x[tokens.to(x.device)] for name, x in self.per_token.items()},
            {name: x[sequences.to(x.device)] for name, x in self.per_sequence.items()},
            _cumulative(self.cu_groups.diff()[torch.tensor(groups, dtype=torch.long)]),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(
            self.tokens.to(device),
            self.cu_seqlens.to(device),
            self.response_mask.to(device),
            {name: x.to(device) for name, x in self.per_token.items()},
            {name: x.to(device) for name, x in self.per_sequence.items()},
            self.cu_groups.to(device),
        )

    def share(self, n_ranks: int, budget: int) -> list[list[list[int]]]:
        """For each rank, its micro-batches as lists of groups: at most `budget` tokens each (a
        group beyond it is a micro-batch of its own). Ranks, and the micro-batches of a rank, are
        loaded as evenly as lengths allow."""
        sizes = self.cu_seqlens[self.cu_groups].diff().tolist()
        owned = _balance(range(len(sizes)), sizes, n_ranks)
        return [self._cut(mine, sizes, budget) for mine in owned]

    @staticmethod
    def _cut(groups: list[int], sizes: list[int], budget: int) -> list[list[int]]:
        """As few balanced micro-batches as the budget allows."""
        for n in range(-(-sum(sizes[g] for g in groups) // budget), len(groups)):
            pieces = _balance(groups, sizes, n)
            if all(len(p) <= 1 or sum(sizes[g] for g in p) <= budget for p in pieces):
                return [piece for piece in pieces if piece]
        return [[group] for group in groups]


def _balance(groups: Iterable[int], sizes: list[int], n: int) -> list[list[int]]:
    """The groups in n parts: the largest first, each to the part that has least so far."""
    loads = [(0, i) for i in range(n)]
    parts: list[list[int]] = [[] for _ in range(n)]
    for group in sorted(groups, key=lambda g: (-sizes[g], g)):
        load, i = heapq.heappop(loads)
        parts[i].append(group)
        heapq.heappush(loads, (load + sizes[group], i))
    return [sorted(part) for part in parts]


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    cu_groups: Tensor = None,  # type: ignore[assignment]  # default as in Batch
) -> Batch:
    """A batch of prompt + response sequences; the responses count. An empty prompt gives its first
    response token away, since nothing precedes it that could predict it."""
    lengths = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses)])
    if (lengths == 0).any():
        raise ValueError(f"sequence {int((lengths == 0).nonzero()[0])} has no tokens")
    tokens = [t for p, r in zip(prompts, responses) for part in (p, r) for t in part]
    mask = [c for p, r in zip(prompts, responses) for c in [False] * len(p) + [True] * len(r)]
    batch = Batch(
        torch.tensor(tokens, dtype=torch.long),
        _cumulative(lengths),
        torch.tensor(mask, dtype=torch.bool),
        cu_groups=cu_groups,
    )
    batch.response_mask[batch.cu_seqlens[:-1]] = False
    return batch


def pack_text(blocks: Sequence[Sequence[int]]) -> Batch:
    """A batch of sequences in which every token counts but the first."""
    return pack([[]] * len(blocks), blocks)


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))


def _ranges(bounds: Tensor, chosen: Iterable[int]) -> Tensor:
    """Concatenated index ranges [bounds[i], bounds[i + 1]) of the chosen i."""
    ends = bounds.tolist()
    parts = [torch.arange(ends[i], ends[i + 1]) for i in chosen]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
