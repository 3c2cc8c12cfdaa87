"""Stage 2, the reward model, from K-way rankings (InstructGPT, section 3.5).

All completions of a prompt are in one batch element: one forward pass each, all pairs from it.
"""

from pathlib import Path

import torch
from torch import Tensor

from tetrad.kernels.ranking import ranking_loss
from tetrad.parallel.engine import Engine
from tetrad.parallel.model import shift_scores
from tetrad.parallel.packed import Batch, pack
from tetrad.trainer import config
from tetrad.trainer.data import (
    Comparison,
    read,
    tokenize_comparisons,
    tokenize_demonstrations,
)
from tetrad.trainer.loop import batches, build_role, held_out, source_of, start, train
from tetrad.trainer.metrics import write_summary


def rm(cfg: config.RM) -> dict[str, float]:
    """Train on comparisons; the summary (accuracy: agreement with the labelers on pairs)."""
    topology = start(cfg)
    source = source_of(cfg.model)
    length = min(cfg.max_length, source.max_length)
    rows = read("comparisons", **vars(cfg.data))
    comparisons = tokenize_comparisons(rows, source.tokenizer, length)
    training, validation = held_out(len(comparisons), cfg.validation, cfg.seed)
    steps, chosen = batches(len(training), cfg.batch_size, cfg.epochs, cfg.seed)
    model = build_role(
        cfg, topology, "scalar", cfg.model, source.tokenizer_name, new_head=True,
        schedule=cfg.schedule, steps=steps, dropout=cfg.dropout,
    )  # fmt: skip
    demonstrations = None
    if cfg.demonstrations.path:
        rows = read("demonstrations", **vars(cfg.demonstrations))
        good = tokenize_demonstrations(rows, source.tokenizer, length)
        demonstrations = pack([d.prompt for d in good], [d.response for d in good])

    def step(i: int) -> dict[str, float]:
        batch = ranked([comparisons[training[j]] for j in chosen(i)])
        n = prompts_with_a_comparison(batch)

        def loss(scores: Tensor, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            value, accuracy = ranking_loss(
                scores, part.per_sequence["ranks"], part.cu_groups, denominator=n
            )
            return value, {"accuracy": accuracy}

        stats = model.accumulate_scores(batch, loss) | model.step()
        if demonstrations and i + 1 == steps:
            stats["bias_shift"] = centre(model, demonstrations)
        return stats | {"tokens": len(batch.tokens)}

    complete = train(
        cfg, {"reward": model}, steps, step, name="rm", tokenizer=source.tokenizer_name,
        examples=len(comparisons), shown=("loss", "accuracy"),
    )  # fmt: skip
    summary: dict[str, float] = {"complete": complete, "steps": steps, "prompts": len(training)}
    if validation:
        batch = ranked([comparisons[i] for i in validation])
        scores = model.scores(batch).cpu()
        loss, accuracy = ranking_loss(scores, batch.per_sequence["ranks"], batch.cu_groups)
        summary |= {"heldout_loss": float(loss), "heldout_accuracy": float(accuracy)}
    write_summary(Path(cfg.out), summary)
    return summary


def ranked(comparisons: list[Comparison]) -> Batch:
    """All completions, grouped by prompt, with their ranks (1 = best)."""
    sizes = torch.tensor([len(c.responses) for c in comparisons])
    groups = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    batch = pack(
        [c.prompt for c in comparisons for _ in c.responses],
        [r for c in comparisons for r in c.responses],
        groups,
    )
    batch.per_sequence["ranks"] = torch.tensor([r for c in comparisons for r in c.ranks])
    return batch


def prompts_with_a_comparison(batch: Batch) -> int:
    """Prompts whose completions are not all tied."""
    bounds = batch.cu_groups.tolist()
    ranks = batch.per_sequence["ranks"]
    return max(1, sum(len(ranks[a:b].unique()) > 1 for a, b in zip(bounds, bounds[1:])))


def centre(model: Engine, demonstrations: Batch) -> float:
    """Shift the bias so that the demonstrations score 0 on average; the shift that did it."""
    mean = float(model.scores(demonstrations).mean())
    shift_scores(model.cores, -mean)
    return -mean
