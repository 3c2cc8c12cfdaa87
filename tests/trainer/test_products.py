"""Every matrix product of a PPO-ptx iteration with GPT-2's vocabulary, of 50257 entries.

It is the kernels that keep rows aligned, so it runs where they do: on a GPU, or interpreted. On a
CPU the reference runs, plain PyTorch, which lays logits out as PyTorch does.
"""

import pytest
import torch

from tests.forked_world import run_world
from tests.parallel.tiny import random_tokens, tiny_engine
from tests.products import Product, Products, assert_aligned, of_size
from tetrad.kernels import linear_logprob
from tetrad.parallel.packed import pack_text
from tetrad.parallel.settings import Layout
from tetrad.parallel.topology import initialize
from tetrad.trainer import config, ppo

VOCAB = 50257


def iterate(tied: bool, fused_rows: int) -> tuple[list[Product], list[Product], int, dict]:
    """Products of the size of the vocabulary in the rollout and after it, the steps of the rollout,
    and what the iteration logs."""
    linear_logprob.FUSED_ROWS = fused_rows
    topology = initialize(Layout())
    shape = {"vocab_size": VOCAB, "num_layers": 1, "hidden_size": 16, "num_heads": 2}
    shape |= {"topology": topology, "tie_embeddings": tied}
    roles = ppo.Roles(*(tiny_engine(h, **shape) for h in ("language",) * 2 + ("scalar",) * 2))
    cfg = config.PPO(
        out="", reward="", batch_size=2, minibatch_size=2, ptx_coef=0.5,
        sampling=config.Sampling(max_new=3),
    )  # fmt: skip
    prompts = random_tokens(5, (3, 2))
    rollout, after, longest = ppo.rollout, 0, 0

    def watched(*args, **kwargs):
        nonlocal after, longest
        episodes = rollout(*args, **kwargs)
        after = len(products.seen)
        longest = int((episodes.batch.lengths - torch.tensor([3, 2])).max())
        return episodes

    ppo.rollout = watched
    with Products() as products:
        text = pack_text(random_tokens(6, (4,)))
        log = ppo.iteration(roles, prompts, lambda k: text, cfg, VOCAB - 1, 0)
    parts = products.seen[:after], products.seen[after:]
    return *(of_size(part, VOCAB) for part in parts), longest, log


@pytest.mark.parametrize("tied, fused_rows", [(True, 0), (False, 10**6)])
def test_all_rows_of_the_size_of_the_vocabulary_are_aligned(tied, fused_rows, device) -> None:
    decoding, rest, steps, log = run_world(1, iterate, tied, fused_rows)[0]
    assert_aligned(decoding + rest)
    assert len(decoding) == steps  # the log-prob of a token takes no product of its own
    # policy and reference are scored, unless a kernel does it; both losses take three products
    assert len(rest) == (2 if fused_rows == 0 else 0) + 2 * 3
    assert log["kl"] == 0
