"""The page that `tetrad demo` ends with: OUT/report.html, one file, and OUT/figures/*.png.

Written for a reader who has never seen RLHF, from the files of the run alone. A number that the
run could not measure (null, NaN, infinity) is shown as n/a and left out of the figures.
"""

import base64
import json
import math
import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from tetrad.trainer.metrics import read_metrics, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"base": "base", "sft": "SFT", "rm": "RM", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
# Okabe and Ito's palette: told apart by colour-blind readers, and legible on white.
COLOURS = {
    "base": "#6b7280",
    "sft": "#0072b2",
    "rm": "#a8558a",
    "ppo": "#d55e00",
    "ppo_ptx": "#00876a",
}
POLICIES = ("base", "sft", "ppo", "ppo_ptx")
DASHES = {"ppo": "-", "ppo_ptx": (0, (4, 1.5))}
INK, MUTED, RULE, SHADE = "#1f2937", "#6b7280", "#d1d5db", "#f3f4f6"
SAMPLES_PER_KIND = 2


@dataclass(frozen=True)
class Run:
    """What a demo wrote: its final figures, the graded answers, and a folder for each stage."""

    config: Any
    summary: dict[str, Any]
    answers: list[dict[str, Any]]
    configs: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    metrics: dict[str, list[dict[str, Any]]]

    def gold(self, name: str, kind: str | None = None) -> list[float]:
        """The gold scores of a policy, of all prompts or of one kind."""
        rows = (row for row in self.answers if kind in (None, row["kind"]))
        return [_number(row[name]["gold"]) for row in rows]

    def series(self, stage: str, key: str) -> tuple[list[int], list[float]]:
        """Steps, from 1, and the values of one metric."""
        rows = self.metrics[stage]
        return [row["step"] + 1 for row in rows], [_number(row.get(key)) for row in rows]


def write(out: Path) -> Path:
    """Write the report of the demo run in `out`; the path of the page."""
    run = _read(out)
    images = _draw(run, out / "figures")
    page = out / "report.html"
    write_text(page, _page(run, images))
    return page


def _read(out: Path) -> Run:
    with open(out / "answers.jsonl", encoding="utf-8") as lines:
        answers = [json.loads(line) for line in lines]
    return Run(
        config=OmegaConf.load(out / "config.yaml"),
        summary=json.loads((out / "summary.json").read_text()),
        answers=answers,
        configs={stage: OmegaConf.load(out / stage / "config.yaml") for stage in LABELS},
        summaries={s: json.loads((out / s / "summary.json").read_text()) for s in LABELS},
        metrics={stage: read_metrics(out / stage) for stage in LABELS},
    )


def _number(value: float | str | None) -> float:
    """A measured number; NaN for whatever is none, in any of the ways JSON has to say so."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def _shown(value: float | str | None, spec: str = ".2f") -> str:
    """A number in words; `spec` ending in % makes it a percentage."""
    number = _number(value)
    if math.isnan(number):
        return "n/a"
    return f"{number:{spec}}".replace("%", "\u202f%").replace("-", "\u2212")


def _visible(text: str) -> str:
    """Newlines as ⏎ and what cannot be printed as �, for a model may write any byte."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else "\ufffd" for c in text)


# --- figures


def _draw(run: Run, folder: Path) -> dict[str, bytes]:
    """Draw every figure into `folder`; the PNGs by name."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    images = {}
    with matplotlib.rc_context(_LOOK):
        for name, (draw, size) in _FIGURES.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, run)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160)
            images[name] = path.read_bytes()
    return images


_LOOK: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#eceef1",
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.06,
    "text.color": INK,
    "text.parse_math": False,  # an answer may hold a dollar sign
    "text.hinting": "no_hinting",  # hinting gives bold digits serifs
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def _overview(figure: "Figure", run: Run) -> None:
    """For a README: one prompt with its answers, the gold scores, and the course of PPO."""
    widths = (1.05, 0.9, 1)
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=widths)[0]
    improved = (row for row in run.answers if _rises(row))
    _sample(left.subplots(), next(improved, run.answers[0]))
    _gold_bars(middle.subplots(), run)
    _course(right, run)


def _rises(row: dict[str, Any]) -> bool:
    """Whether the gold score of this prompt rises as the means do, from words by the base."""
    gold = [row[name]["gold"] for name in POLICIES[:3]]
    return bool(row["base"]["response"].strip()) and gold[0] < gold[1] < gold[2]


def _sample(axes: "Axes", row: dict[str, Any]) -> None:
    axes.set_title("A held-out prompt that improved" if _rises(row) else "A held-out prompt")
    axes.axis("off")
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "center"}
    prompt = textwrap.fill(_visible(row["prompt"]), 40)
    box = {"boxstyle": "round,pad=0.5,rounding_size=0.3", "facecolor": SHADE, "edgecolor": "none"}
    axes.text(0.025, 0.89, prompt, family="monospace", size=9, linespacing=1.4, bbox=box, **place)
    for i, name in enumerate(POLICIES):
        y = 0.7 - 0.2 * i
        gold = f"gold {_shown(row[name]['gold'])}"
        answer = _visible(row[name]["response"])
        axes.text(0, y, LABELS[name], color=COLOURS[name], weight="bold", **place)
        axes.text(1, y, gold, color=MUTED, size=9, ha="right", **place)
        axes.text(0, y - 0.09, answer, family="monospace", size=9, **place)


def _gold(figure: "Figure", run: Run) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    _gold_bars(left, run)
    right.set_title("Wins against SFT, of decided pairs")
    wins = run.summary["win_rate_vs_sft"]
    _bars(right, {name: wins.get(name) for name in POLICIES if name != "sft"}, ".0%")
    right.axhline(0.5, color=COLOURS["sft"], linewidth=1.2, linestyle=(0, (4, 3)))
    right.text(
        1.01, 0.5, "as good\nas SFT", color=COLOURS["sft"], va="center", size=9,
        transform=right.get_yaxis_transform(),
    )  # fmt: skip
    right.yaxis.set_major_formatter(_percent)


def _gold_bars(axes: "Axes", run: Run) -> None:
    axes.set_title("Gold score, held-out prompts")
    gold = run.summary["gold"]
    errors = {name: _margin(run.gold(name)) for name in POLICIES}
    _bars(axes, {name: gold[name] for name in POLICIES}, ".2f", errors)


def _margin(values: list[float]) -> float:
    """Half of the 95 % confidence interval of a mean."""
    known = [v for v in values if not math.isnan(v)]
    return 1.96 * statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def _bars(
    axes: "Axes",
    values: dict[str, float | str | None],
    spec: str,
    errors: dict[str, float] | None = None,
) -> None:
    """A bar for each policy, of a value from 0 to 1, with the number above it."""
    for i, (name, value) in enumerate(values.items()):
        known = not math.isnan(_number(value))
        height = _number(value) if known else 0.0
        error = (errors or {}).get(name, 0.0) if known else 0.0
        axes.bar(i, height, width=0.66, color=COLOURS[name])
        if error:
            axes.errorbar(i, height, error, color=INK, linewidth=1, capsize=3)
        axes.annotate(
            _shown(value, spec), (i, height + error), (0, 4), textcoords="offset points",
            ha="center", weight="bold", color=COLOURS[name],
        )  # fmt: skip
    axes.set_xticks(range(len(values)), [LABELS[name] for name in values])
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    axes.set_ylim(0, 1.12)


def _course(figure: "Figure", run: Run) -> None:
    """Reward-model score and KL over the iterations of PPO and PPO-ptx."""
    score, kl = figure.subplots(2, 1, sharex=True)
    for axes, key, title in (
        (score, "score", "Reward-model score"),
        (kl, "kl", "KL to SFT, nats per response"),
    ):
        axes.set_title(title)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        for name in ("ppo", "ppo_ptx"):
            steps, values = run.series(name, key)
            axes.plot(
                steps, values, color=COLOURS[name], linestyle=DASHES[name], label=LABELS[name],
                marker="o" if len(steps) < 10 else None, markersize=4,
            )  # fmt: skip
    score.legend(ncols=2, handlelength=1.8, columnspacing=1.2)
    _count_steps(kl, "iteration")


def _percent(value: float, position: int) -> str:
    return _shown(value, ".0%")


def _count_steps(axes: "Axes", label: str) -> None:
    axes.set_xlabel(label)
    axes.locator_params(axis="x", integer=True)


def _forgetting(figure: "Figure", run: Run) -> None:
    """Each policy's loss on pretraining text, as a distance from the base model's."""
    axes = figure.subplots()
    loss = {name: _number(run.summary["pretrain_loss"][name]) for name in POLICIES}
    bar: dict[str, Any] = {"linewidth": 6, "alpha": 0.35, "solid_capstyle": "butt"}
    for i, (name, value) in enumerate(loss.items()):
        axes.plot([loss["base"], value], [i, i], color=COLOURS[name], **bar)
        axes.plot(value, i, "o", color=COLOURS[name], markersize=10)
        change = "" if name == "base" else f"  ({_shown(value - loss['base'], '+.3f')})"
        axes.text(
            1.02, i, _shown(value, ".3f") + change, color=COLOURS[name], weight="bold",
            va="center", transform=axes.get_yaxis_transform(),
        )  # fmt: skip
    axes.axvline(loss["base"], color=COLOURS["base"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(POLICIES)), [LABELS[name] for name in POLICIES])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(len(POLICIES) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("nats per token, lower is better")
    axes.set_title("Loss on held-out pretraining text (and difference to base)")


def _stages(figure: "Figure", run: Run) -> None:
    """What the stages before PPO learned."""
    panels = figure.subplots(1, 4)
    for axes, (stage, key, title, heldout, chance) in zip(panels, _EARLY, strict=True):
        steps, values = run.series(stage, key)
        axes.plot(
            steps, values, color=COLOURS[stage], linewidth=1.4,
            marker="o" if len(steps) < 10 else None, markersize=3,
        )  # fmt: skip
        reached = _number(run.summaries[stage].get(heldout))
        axes.axhline(reached, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        if chance is not None:
            axes.axhline(chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        spec = ".0%" if key == "accuracy" else ".2f"
        axes.set_title(f"{title}\nheld out {_shown(reached, spec)}", weight="normal", size=9.5)
        if key == "accuracy":
            axes.yaxis.set_major_formatter(_percent)
        _count_steps(axes, "step")


# stage, metric, title, its held-out counterpart, what guessing gets
_EARLY = (
    ("base", "loss", "Pretraining loss", "validation_loss", None),
    ("sft", "loss", "SFT loss", "validation_loss", None),
    ("rm", "loss", "RM ranking loss", "heldout_loss", math.log(2)),
    ("rm", "accuracy", "RM accuracy", "heldout_accuracy", 0.5),
)

# what draws it, and its size in inches at 160 dots each
_FIGURES: dict[str, tuple[Callable[["Figure", Run], None], tuple[float, float]]] = {
    "overview": (_overview, (10, 3.125)),
    "gold": (_gold, (9.6, 3.3)),
    "ppo": (_course, (9.6, 4.4)),
    "pretraining": (_forgetting, (9.6, 2.5)),
    "stages": (_stages, (9.6, 2.6)),
}


# --- page


def _page(run: Run, images: dict[str, bytes]) -> str:
    image = {
        name: f'<img src="data:image/png;base64,{base64.b64encode(images[name]).decode()}" '
        f'alt="{escape(alt)}">'
        for name, alt in _descriptions(run).items()
    }
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light">
<title>tetrad demo: InstructGPT in miniature</title>
<style>{_CSS}</style>
</head>
<body>
<header>
<h1>InstructGPT in miniature</h1>
<p class="lead">A language model <em>continues</em> text. Give it an instruction, and it may well
write the next instruction. This run trained such a model from nothing, then took the three steps
by which InstructGPT (Ouyang et al., 2022) makes an assistant of it: show it answers that labelers
wrote, teach a second model which answers labelers prefer, and optimise the first for that.</p>
</header>
{_note(run)}
<section class="cards">{_cards(run)}</section>

<h2>The models</h2>
<dl class="models">{_STORY}</dl>
<p>All tables and figures below are about prompts and text that were held out from training,
unless they show training itself.</p>

<h2>Did it become an assistant?</h2>
<p>The <em>gold score</em> is the verdict of a judge that no model ever sees: 0 for a wrong answer
or another instruction, at least 0.5 for a right one, 1 when it is also one sentence of the right
length. Lines on the bars span the 95&#8239;% confidence interval. On the right, the same two
answers head to head: how often the judge prefers a model's answer to that of SFT.</p>
{image["gold"]}

<h2>What reinforcement learning did</h2>
<p>In each iteration the policy answers a batch of prompts, the reward model scores the answers,
and the policy is moved towards what scored well. The score has no unit; the labelers' own
demonstrations average 0. The <em>KL divergence</em> says how far the policy has moved from SFT,
and every nat of it is charged against the score, so that the policy does not leave the region
that the reward model knows.</p>
{image["ppo"]}

<h2>What it cost: the alignment tax</h2>
<p>A model that is optimised for answers may forget what it was pretrained on. PPO-ptx mixes
pretraining text into the updates of PPO against that. Bars show the distance from the base
model.</p>
{image["pretraining"]}

<h2>The steps before</h2>
<p>Losses in nats per token, of the ranking in nats per pair. RM accuracy is the share of pairs of
answers that the reward model orders as the labeler did. Dashed: the final value on held-out data.
Dotted: guessing.</p>
{image["stages"]}

<h2>Answers, side by side</h2>
<p>The first {SAMPLES_PER_KIND} held-out prompts of each kind, not selected further. ⏎ is a newline,
the number is the gold score, and an answer is cut after {run.configs["ppo"].sampling.max_new}
tokens.</p>
{_answers_table(run)}

<h2>Gold score by kind of prompt</h2>
{_kinds_table(run)}

<h2>Settings</h2>
<p>{_architecture(run)} An empty cell does not apply to that stage. The complete settings are in
<code>config.yaml</code> of each stage's folder.</p>
{_settings_table(run)}
<p>To repeat this run:</p>
<pre>{escape(_command(run))}</pre>
<footer>Run with PyTorch {torch.__version__}, Python {platform.python_version()},
{escape(_device())}.</footer>
</body>
</html>
"""


def _descriptions(run: Run) -> dict[str, str]:
    """What the figures of the page show, for those who cannot see them."""

    def each(values: dict[str, Any], spec: str) -> str:
        return ", ".join(f"{LABELS[n]} {_shown(v, spec)}" for n, v in values.items())

    summary = run.summary
    score = {name: run.series(name, "score")[1][-1] for name in DASHES}
    heldout = {stage: run.summaries[stage].get("validation_loss") for stage in ("base", "sft")}
    return {
        "gold": f"Bars of the gold score: {each(summary['gold'], '.2f')}. "
        f"Win rate against SFT: {each(summary['win_rate_vs_sft'], '.0%')}.",
        "ppo": "Curves of reward-model score and KL over the iterations. "
        f"Last score: {each(score, '.2f')}. KL at the end, nats: {each(summary['kl'], '.1f')}.",
        "pretraining": "Loss on held-out pretraining text, nats per token: "
        f"{each(summary['pretrain_loss'], '.3f')}.",
        "stages": f"Training curves. Held-out loss: {each(heldout, '.2f')}. Held-out accuracy "
        f"of the reward model: {_shown(summary['rm']['heldout_accuracy'], '.0%')}.",
    }


_STORY = "".join(
    f'<dt><i style="background:{COLOURS[name]}"></i>{LABELS[name]}</dt><dd>{text}</dd>'
    for name, text in {
        "base": "<b>Pretraining.</b> Learns to continue plain text, most of it sheets of "
        "instructions. So it continues an instruction instead of answering it.",
        "sft": "<b>Step 1, supervised fine-tuning.</b> The base model, trained on answers that "
        "(here: simulated) labelers wrote, not all of them good.",
        "rm": "<b>Step 2, reward model.</b> Labelers rank several SFT answers to the same prompt; "
        "the reward model learns to score answers so that the ranking comes out.",
        "ppo": "<b>Step 3, proximal policy optimisation.</b> The SFT model writes answers, the "
        "reward model scores them, and answers that score well become more likely.",
        "ppo_ptx": "<b>Step 3, with pretraining mixed in.</b> The same, while it keeps reading "
        "pretraining text, so as not to forget it.",
    }.items()
)


def _note(run: Run) -> str:
    if run.config.scale >= 1:
        return ""
    return (
        f'<p class="note">This run had <code>scale={run.config.scale:g}</code>: too short to '
        "learn much, it only shows that everything runs.</p>"
    )


def _cards(run: Run) -> str:
    summary = run.summary
    gold, wins, kl = summary["gold"], summary["win_rate_vs_sft"], summary["kl"]
    loss = {name: _number(value) for name, value in summary["pretrain_loss"].items()}
    processes = "1 process" if summary["world_size"] == 1 else f"{summary['world_size']} processes"
    arrow = '<span class="arrow">→</span>'
    cards = (
        (
            "Gold score, base → SFT → PPO",
            arrow.join(_shown(gold[name]) for name in ("base", "sft", "ppo")),
            f"PPO-ptx {_shown(gold['ppo_ptx'])}; best possible 1",
        ),
        (
            "PPO wins against SFT",
            _shown(wins.get("ppo"), ".0%"),
            f"PPO-ptx {_shown(wins.get('ppo_ptx'), '.0%')}; base {_shown(wins.get('base'), '.0%')}",
        ),
        (
            "Reward model agrees with labelers",
            _shown(summary["rm"]["heldout_accuracy"], ".0%"),
            "of held-out pairs; guessing gets 50\u202f%",
        ),
        (
            "KL from SFT to PPO",
            f"{_shown(kl['ppo'], '.1f')} <small>nats</small>",
            f"per response; PPO-ptx {_shown(kl['ppo_ptx'], '.1f')}",
        ),
        (
            "Alignment tax of PPO",
            f"{_shown(loss['ppo'] - loss['base'], '+.3f')} <small>nats</small>",
            f"per token of text; PPO-ptx {_shown(loss['ppo_ptx'] - loss['base'], '+.3f')}",
        ),
        ("Time", _duration(summary["seconds"]), f"all stages, on {processes}"),
    )
    return "".join(
        f"<div><h3>{title}</h3><p>{value}</p><p>{detail}</p></div>"
        for title, value, detail in cards
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _answers_table(run: Run) -> str:
    rows = []
    for kind in _kinds(run):
        chosen = [row for row in run.answers if row["kind"] == kind][:SAMPLES_PER_KIND]
        rows.append(f'<tr class="kind"><th colspan="5">{_words(kind)}</th></tr>')
        for row in chosen:
            answers = "".join(
                f"<td>{_literal(row[name]['response'])}"
                f'<span class="gold">{_shown(row[name]["gold"])}</span></td>'
                for name in POLICIES
            )
            ideal = f'<span class="ideal">ideal: {escape(_visible(row["answer"]))}</span>'
            rows.append(f"<tr><td>{_literal(row['prompt'])}{ideal}</td>{answers}</tr>")
    return _table("answers", ["prompt", *map(_name, POLICIES)], rows)


def _kinds_table(run: Run) -> str:
    rows = []
    for kind in (*_kinds(run), None):
        n = len(run.gold("base", kind))
        cells = "".join(
            _bar_cell(statistics.fmean(run.gold(name, kind)), COLOURS[name]) for name in POLICIES
        )
        title = "all" if kind is None else _words(kind)
        rows.append(f'<tr><th scope="row">{title}</th>{cells}<td class="number">{n}</td></tr>')
    return _table("kinds", ["kind", *map(_name, POLICIES), "prompts"], rows)


def _bar_cell(value: float, colour: str) -> str:
    share = 0.0 if math.isnan(value) else 100 * value
    bar = f'<div><i style="width:{share:.0f}%;background:{colour}"></i></div>'
    return f'<td class="number">{_shown(value)}{bar}</td>'


def _settings_table(run: Run) -> str:
    rows = []
    for key, meaning in _SETTINGS.items():
        cells = "".join(
            f'<td class="number">{_setting(OmegaConf.select(run.configs[stage], key))}</td>'
            for stage in LABELS
        )
        rows.append(f'<tr><th scope="row">{meaning}<code>{key}</code></th>{cells}</tr>')
    steps = "".join(f'<td class="number">{run.summaries[s]["steps"]:,}</td>' for s in LABELS)
    rows.insert(0, f'<tr><th scope="row">steps; iterations of PPO</th>{steps}</tr>')
    return _table("settings", ["", *map(_name, LABELS)], rows)


_SETTINGS = {
    "batch_size": "examples in a step, episodes in an iteration",
    "minibatch_size": "episodes in a PPO update",
    "epochs": "passes over the data",
    "schedule.lr": "peak learning rate",
    "critic_schedule.lr": "peak learning rate of the critic",
    "schedule.warmup_steps": "warm-up, in updates",
    "schedule.decay": "learning rate after it",
    "sampling.temperature": "temperature of sampling",
    "kl_coef": "reward charged for a nat of KL",
    "clip_range": "clipping of the policy ratio",
    "lam": "λ of the advantage estimate",
    "ptx_coef": "weight of the pretraining loss",
}


def _setting(value: Any) -> str:
    if value is None:
        return ""
    return escape(value) if isinstance(value, str) else f"{value:g}"


def _architecture(run: Run) -> str:
    base = run.configs["base"]
    return (
        f"Every model has {base.model.num_layers} layers of width {base.model.hidden_size} with "
        f"{base.model.num_heads} heads, reads {escape(base.model.tokenizer)} and computes in "
        f"{escape(base.parallel.precision)}."
    )


def _command(run: Run) -> str:
    """The command line of this run; what has its default is left out."""
    parts = ["tetrad demo out=runs/demo", f"seed={run.config.seed}"]
    for key, default in (("scale", 1), ("parallel.tp", 1), ("parallel.pp", 1)):
        if (value := OmegaConf.select(run.config, key)) != default:
            parts.append(f"{key}={value:g}")
    if (n := run.summary["world_size"]) > 1:
        parts.insert(0, f"torchrun --nproc-per-node {n} --no-python")
    return " ".join(parts)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def _kinds(run: Run) -> list[str]:
    return sorted({row["kind"] for row in run.answers})


def _words(kind: str) -> str:
    return escape(kind.replace("_", " "))


def _name(model: str) -> str:
    return f'<span style="color:{COLOURS[model]}">{LABELS[model]}</span>'


def _literal(text: str) -> str:
    """What a model read or wrote; a line breaks where its newline is shown."""
    shown = escape(_visible(text)).replace("⏎", '<span class="newline">⏎</span>\n')
    return f"<code>{shown.rstrip()}</code>"


def _table(name: str, heads: Iterable[str], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        f'<div class="scroll"><table class="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_CSS = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ max-width: 1008px; margin: 0 auto; padding: 40px 24px 64px; background: #fff; color: {INK};
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }}
h1 {{ font-size: 34px; line-height: 1.2; margin: 0 0 12px; letter-spacing: -0.02em; }}
h2 {{ font-size: 22px; line-height: 1.3; margin: 52px 0 8px; letter-spacing: -0.01em; }}
p {{ margin: 0 0 16px; max-width: 72ch; }}
.lead {{ font-size: 18px; color: #374151; }}
.note {{ padding: 10px 14px; border-left: 4px solid #e0a100; background: #fff8e1; }}
img {{ display: block; width: 100%; height: auto; margin: 8px 0; }}
code, pre {{ font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
pre {{ padding: 14px 16px; background: {SHADE}; border-radius: 8px; overflow-x: auto; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 14px;
  margin: 28px 0; }}
.cards div {{ padding: 16px 18px; border: 1px solid #e5e7eb; border-radius: 10px; }}
.cards h3 {{ margin: 0; font-size: 13.5px; font-weight: 600; color: #4b5563; }}
.cards p {{ margin: 0; font-size: 13.5px; color: {MUTED}; }}
.cards h3 + p {{ font-size: 24px; font-weight: 650; line-height: 1.5; color: {INK};
  white-space: nowrap; font-variant-numeric: tabular-nums; }}
.cards small {{ font-size: 16px; font-weight: 500; }}
.arrow {{ margin: 0 0.3em; color: #9ca3af; font-weight: 400; }}
.models {{ display: grid; grid-template-columns: max-content 1fr; gap: 10px 20px; margin: 16px 0; }}
.models dt {{ font-weight: 650; white-space: nowrap; }}
.models dt i {{ display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 9px; }}
.models dd {{ margin: 0; }}
.scroll {{ overflow-x: auto; margin: 12px 0 20px; }}
table {{ width: 100%; border-collapse: collapse; font-size: 14px; line-height: 1.45; }}
th {{ text-align: left; font-weight: 600; }}
th, td {{ padding: 8px 10px; border-bottom: 1px solid #e5e7eb; vertical-align: top; }}
thead th {{ border-bottom: 2px solid {RULE}; }}
.number {{ font-variant-numeric: tabular-nums; }}
.answers {{ table-layout: fixed; min-width: 860px; }}
.answers th:first-child {{ width: 26%; }}
.answers code {{ display: block; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 12.5px; }}
.answers .kind th {{ padding-top: 16px; font-size: 13px; color: {MUTED}; }}
.newline {{ color: #9ca3af; }}
.gold, .ideal {{ display: block; margin-top: 3px; font-size: 12.5px; color: {MUTED};
  font-variant-numeric: tabular-nums; }}
.kinds div {{ display: block; height: 5px; margin-top: 4px; border-radius: 3px; background: #eef0f2;
  overflow: hidden; }}
.kinds div i {{ display: block; height: 100%; }}
.kinds td:not(:last-child) {{ width: 17%; }}
.kinds tr:last-child > * {{ font-weight: 650; border-bottom: 0; }}
.settings tbody th {{ font-weight: 400; }}
.settings th code {{ margin-left: 8px; color: {MUTED}; }}
footer {{ margin-top: 36px; padding-top: 16px; border-top: 1px solid #e5e7eb; font-size: 13.5px;
  color: {MUTED}; }}
"""
