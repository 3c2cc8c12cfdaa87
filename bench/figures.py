"""Two figures of a GPU's results: its roofline, and fractions of the same-run rates.

The same files give the same bytes: no date, and no random ids in the SVG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.rows import Row, Tables, firsts, others, ours

# Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#d55e00", "#0072b2", "#00876a", "#e69f00", "#a8558a", "#56b4e9", "#6b7280", "#1f2937")
STYLE = {"svg.hashsalt": "bench", "font.size": 8}
Bars = list[tuple[str, list[tuple[str, float]]]]  # of each case, the fraction of each provider


def names(tables: Tables) -> dict[str, str]:
    """The files that `draw` writes, with what each shows; none of what nobody measured."""
    found = {}
    if points(tables):
        found["roofline.svg"] = "Roofline: FLOP/s over arithmetic intensity, ours and the best peer"
    if bars(tables):
        found["fractions.svg"] = "Fraction of the same-run rate, by case and provider"
    return found


def draw(folder: Path, tables: Tables, rates: Sequence[Mapping[str, float]]) -> None:
    if not names(tables):
        return
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib, so no figures: python -m bench.report draws them elsewhere")
        return
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        for name in names(tables):
            figure = Figure(layout="constrained")  # without pyplot: draws on no screen
            if name == "roofline.svg":
                _roofline(figure, tables, rates)
            else:
                _fractions(figure, bars(tables))
            figure.savefig(folder / name, metadata={"Date": None, "Creator": None})


def points(tables: Tables) -> dict[str, list[tuple[float, float, float | None]]]:
    """Of each bench with products: FLOPs per byte, and TFLOP/s of ours and of the fastest other."""

    def tflop_s(row: Row) -> float:
        return 1e-9 * row["flops"] / row["ms"]

    found: dict[str, list] = {}
    for bench, groups in tables.items():
        for group in groups:
            base = ours(group)
            if "ms" in base and base.get("flops") and base.get("bytes"):
                best = tflop_s(others(group)[0]) if others(group) else None
                found.setdefault(bench, []).append(
                    (base["flops"] / base["bytes"], tflop_s(base), best)
                )
    return found


def bars(tables: Tables) -> Bars:
    """Of the first cases of each bench: all of them would be no figure but the table again."""
    found = []
    for bench, groups in tables.items():
        for group in firsts(groups):
            rows = [(row["provider"], row.get("of_gemm", row.get("of_copy"))) for row in group]
            of = "cuBLAS" if any("of_gemm" in row for row in group) else "copy"
            label = f"{bench}, {group[0]['case']}\n(of {of})"
            if known := [(provider, x) for provider, x in rows if x is not None]:
                found.append((label, known))
    return found


def _roofline(figure, tables: Tables, rates: Sequence[Mapping[str, float]]) -> None:
    figure.set_size_inches(7, 4.5)
    axes = figure.add_subplot(xscale="log", yscale="log")
    found = points(tables)
    for i, (bench, dots) in enumerate(found.items()):
        colour = COLOURS[i % len(COLOURS)]
        for x, mine, best in dots:
            axes.plot(x, mine, "o", color=colour)
            if best is not None:
                axes.plot([x, x], [mine, best], "-", color=colour, linewidth=0.5)
                axes.plot(x, best, "o", color=colour, fillstyle="none")
        axes.plot([], [], "o", color=colour, label=bench)
    axes.plot([], [], "ok", fillstyle="none", label="fastest other")
    xs = [x for dots in found.values() for x, *_ in dots]
    ends = [min(xs) / 8, max(xs) * 4]
    copy = max((r["copy_gb_s"] for r in rates if "copy_gb_s" in r), default=None)
    gemm = max((x for r in rates for key, x in r.items() if key.startswith("gemm_")), default=None)
    if copy:
        label = f"copy of the same run, {copy:.0f} GB/s"
        axes.plot(ends, [1e-3 * copy * x for x in ends], "--", color="gray", label=label)
    if gemm:
        label = f"fastest cuBLAS of the same run, {gemm:.0f} TFLOP/s"
        axes.axhline(gemm, color="gray", label=label)
        axes.set_ylim(top=3 * gemm)
    axes.set(xlabel="arithmetic intensity, FLOP per byte at the least", ylabel="TFLOP/s")
    axes.legend(frameon=False)


def _fractions(figure, groups: Bars) -> None:
    providers = list(dict.fromkeys(provider for _, rows in groups for provider, _ in rows))
    figure.set_size_inches(8, 0.8 + 0.16 * sum(len(rows) + 1.5 for _, rows in groups))
    axes = figure.add_subplot()
    y, ticks, seen = 0.0, [], set()
    for _, rows in groups:
        ticks.append(y + (len(rows) - 1) / 2)
        for provider, fraction in rows:
            i = providers.index(provider)
            axes.barh(
                y, fraction, color=COLOURS[i % len(COLOURS)], hatch="//" * (i // len(COLOURS)),
                label=None if provider in seen else provider,
            )  # fmt: skip
            seen.add(provider)
            y += 1
        y += 1.5
    axes.set_yticks(ticks, [label for label, _ in groups])
    axes.set_ylim(y - 1.5, -1)
    axes.axvline(1, color="gray")
    axes.set_xlabel("fraction of the same-run rate")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
