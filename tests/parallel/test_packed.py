import pytest
import torch

from tetrad.parallel.packed import pack


def test_pack_marks_responses_and_never_a_first_token() -> None:
    batch = pack([[1, 2], [], [3]], [[4], [5, 6], []])
    assert batch.tokens.tolist() == [1, 2, 4, 5, 6, 3]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6]
    assert batch.response_mask.tolist() == [False, False, True, False, True, False]


def test_select_takes_whole_groups_with_their_fields() -> None:
    batch = pack([[1]] * 5, [[2], [3, 4], [5], [6], [7]], torch.tensor([0, 2, 3, 5]))
    batch.per_token["x"] = torch.arange(11.0)
    batch.per_sequence["y"] = torch.arange(5.0)
    part = batch.select([2, 0])
    assert part.tokens.tolist() == [1, 6, 1, 7, 1, 2, 1, 3, 4]
    assert part.per_token["x"].tolist() == [7, 8, 9, 10, 0, 1, 2, 3, 4]
    assert part.per_sequence["y"].tolist() == [3, 4, 0, 1]
    assert part.cu_groups.tolist() == [0, 2, 4]


@pytest.mark.parametrize("n_ranks, budget", [(1, 1), (1, 20), (2, 20), (3, 7), (8, 1000)])
def test_share_gives_every_group_once_within_the_budget(n_ranks, budget) -> None:
    lengths = [3, 9, 5, 12, 7]
    batch = pack([[0]] * 5, [[1] * (n - 1) for n in lengths])
    shares = batch.share(n_ranks, budget)
    assert len(shares) == n_ranks
    assert sorted(g for share in shares for piece in share for g in piece) == list(range(5))
    for piece in (piece for share in shares for piece in share):
        assert sum(lengths[g] for g in piece) <= budget or len(piece) == 1
    loads = [sum(lengths[g] for piece in share for g in piece) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_micro_batches_are_few_and_alike() -> None:
    batch = pack([[0]] * 8, [[1] * (n - 1) for n in (9, 9, 8, 8, 3, 3, 2, 2)])
    (pieces,) = batch.share(1, 22)
    assert [int(batch.lengths[p].sum()) for p in pieces] == [22, 22]


def test_a_sequence_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        pack([[1], []], [[2], []])
