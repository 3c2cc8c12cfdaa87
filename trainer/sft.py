"""Stage 1, supervised fine-tuning (InstructGPT, section 3.5), and the pretraining before it.

Both minimise the mean loss per token of sequences; SFT counts the response tokens alone.
"""

from collections.abc import Sequence
from pathlib import Path

from tetrad.parallel.engine import Engine
from tetrad.parallel.packed import Batch, pack
from tetrad.parallel.topology import Topology
from tetrad.trainer import config
from tetrad.trainer.data import read, tokenize_demonstrations, tokenize_text
from tetrad.trainer.loop import batches, build_role, held_out, source_of, start, train
from tetrad.trainer.metrics import write_summary


def sft(cfg: config.SFT) -> dict[str, float]:
    """Fine-tune on demonstrations; the summary (losses in nats per response token)."""
    topology = start(cfg)
    source = source_of(cfg.model)
    rows = read("demonstrations", **vars(cfg.data))
    length = min(cfg.max_length, source.max_length)
    examples = tokenize_demonstrations(rows, source.tokenizer, length)
    prompts, responses = zip(*examples)
    return _fit(cfg, topology, "sft", source.tokenizer_name, prompts, responses)


def pretrain(cfg: config.Pretrain) -> dict[str, float]:
    """Train on plain text; the summary (losses in nats per token)."""
    topology = start(cfg)
    source = source_of(cfg.model)
    length = source.fits(cfg.length, "length")
    blocks = tokenize_text(read("text", **vars(cfg.text)), source.tokenizer, length)
    return _fit(cfg, topology, "pretrain", source.tokenizer_name, [[]] * len(blocks), blocks)


def _fit(
    cfg: config.SFT | config.Pretrain, topology: Topology, stage: str, tokenizer: str,
    prompts: Sequence[list[int]], responses: Sequence[list[int]],
) -> dict[str, float]:  # fmt: skip
    training, validation = held_out(len(prompts), cfg.validation, cfg.seed)
    steps, chosen = batches(len(training), cfg.batch_size, cfg.epochs, cfg.seed)
    model = build_role(
        cfg, topology, "language", cfg.model, tokenizer,
        schedule=cfg.schedule, steps=steps, dropout=cfg.dropout,
    )  # fmt: skip

    def sequences(examples: list[int]) -> Batch:
        return pack([prompts[i] for i in examples], [responses[i] for i in examples])

    def step(i: int) -> dict[str, float]:
        batch = sequences([training[j] for j in chosen(i)])
        stats = model.accumulate_cross_entropy(batch, denominator=batch.counted)
        return stats | model.step() | {"tokens": len(batch.tokens)}

    complete = train(
        cfg, {"policy": model}, steps, step, name=stage, tokenizer=tokenizer,
        examples=len(prompts), shown=("loss", "lr"),
    )  # fmt: skip
    summary: dict[str, float] = {"complete": complete, "steps": steps, "examples": len(training)}
    if validation:
        summary["validation_loss"] = mean_loss(model, sequences(validation))
    write_summary(Path(cfg.out), summary)
    return summary


def mean_loss(model: Engine, batch: Batch) -> float:
    """Mean negative log-prob of the batch's counted tokens, nats."""
    return float(-model.logprobs(batch).sum() / batch.counted)
