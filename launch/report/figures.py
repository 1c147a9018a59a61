"""The figures of a report, by matplotlib: one PNG and one PDF each.

A function of a figure returns it, or None if there is nothing to draw.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bip.errors import UserError
from launch.report.rows import Curve, Facts, curve_of, mean_std

# Okabe and Ito's colours, then some of Tol's, which readers with any colour vision distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933",
           "#882255", "#44AA99", "#661100", "#6699CC")  # fmt: skip
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}  # plotly's names: matplotlib's
MARKERS = "osD^vP*X"
MOST_RUNS = 60  # lines of the time line that stay legible; the table and the page have all
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # text stays text, as journals ask
    "figure.constrained_layout.use": True,
}


def looks(facts: Facts) -> dict[Curve, tuple[str, str, str]]:
    """(colour, marker, dash) of each curve: a method's colour is the same in all figures.

    Curves of one method in one panel differ in marker and dash.
    """
    methods = sorted({curve.method for curve in facts.labels()})
    found = {}
    same: dict[tuple[str, str, str], int] = defaultdict(int)
    for curve in facts.labels():
        colour = COLOURS[methods.index(curve.method) % len(COLOURS)]
        at = same[curve.method, curve.dataset, curve.arch]
        found[curve] = (colour, MARKERS[at % len(MARKERS)], [*DASHES][at % len(DASHES)])
        same[curve.method, curve.dataset, curve.arch] += 1
    return found


def _labels(facts: Facts, without: tuple[str, ...] = ()) -> dict[Curve, str]:
    """The curves' names, in which a dollar sign starts no formula."""
    return {curve: label.replace("$", r"\$") for curve, label in facts.labels(without).items()}


def draw(facts: Facts, out: Path) -> list[str]:
    """Write every figure that has data to `out`; their names without ending."""
    import matplotlib

    matplotlib.use("agg")  # no display is needed
    from matplotlib import pyplot

    figures: dict[str, Callable[[Facts], Any]] = {
        "accuracy": accuracy,
        "training": training,
        "timeline": timeline,
        "layers": layers,
        "costs": costs,
        "overlaps": overlaps,
    }
    written = []
    for name, make in figures.items():
        with matplotlib.rc_context(_STYLE):
            if (figure := make(facts)) is None:
                continue
            for ending in ("png", "pdf"):
                try:
                    figure.savefig(out / f"{name}.{ending}", dpi=150)
                except OSError as error:
                    raise UserError(f"out: {out}: {error.strerror}") from None
            pyplot.close(figure)
            written.append(name)
    return written


def _panels(names: Iterable[Any], width: float = 5.6, height: float = 3.8) -> tuple[Any, list[Any]]:
    """A figure with a panel for each name, at most three in a row."""
    from matplotlib import pyplot

    count = len([*names])
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False
    )
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, [*axes.flat[:count]]


def _sparsity_axis(axes: Any, sparsities: Iterable[float]) -> None:
    """What is kept, on a log axis that falls to the right, with the sparsity as labels."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept = sorted(1 - sparsity for sparsity in sparsities)
    axes.set_xscale("log")
    axes.set_xlim(min(1.0, kept[-1] * 1.25), kept[0] / 1.25)
    ticks = (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    inside = [tick for tick in ticks if kept[0] / 1.25 <= tick <= kept[-1] * 1.25]
    axes.xaxis.set_major_locator(FixedLocator(inside or kept))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{100 * (1 - k):.4g}"))
    axes.set_xlabel("sparsity, % (log of what is kept)")


def accuracy(facts: Facts) -> Any:
    """Mean and deviation over seeds, the dense networks, and a star at each winning ticket."""
    rows = facts.curves()
    if not rows:
        return None
    labels, look = _labels(facts, without=("dataset", "arch")), looks(facts)
    places = sorted({(row.dataset, row.arch) for row in rows})
    tickets = {curve_of(row): row for row in facts.tickets()}
    figure, panels = _panels(places)
    for axes, place in zip(panels, places, strict=True):
        mine = [row for row in rows if (row.dataset, row.arch) == place]
        for curve in sorted({curve_of(row) for row in mine}):
            points = [row for row in mine if curve_of(row) == curve]
            colour, marker, dash = look[curve]
            kept = [1 - row.sparsity for row in points]
            mean = [row.top1_mean for row in points]
            deviation = [row.top1_std or 0.0 for row in points]
            line = DASHES[dash]
            axes.plot(kept, mean, line, color=colour, marker=marker, ms=4, label=labels[curve])
            low = [m - d for m, d in zip(mean, deviation, strict=True)]
            high = [m + d for m, d in zip(mean, deviation, strict=True)]
            axes.fill_between(kept, low, high, color=colour, alpha=0.15, lw=0)
            ticket = tickets.get(curve)
            if ticket and ticket.sparsity is not None:
                axes.plot(1 - ticket.sparsity, ticket.top1, "*", color=colour, ms=14, mec="black")
        dense = {(t.dense_top1, t.dense_std or 0.0) for c, t in tickets.items() if c in
                 {curve_of(row) for row in mine}}  # fmt: skip
        for number, (mean_dense, std) in enumerate(sorted(dense)):
            name = "dense" if number == 0 else None
            axes.axhline(mean_dense, color="black", ls="--", lw=1, label=name)
            axes.axhspan(mean_dense - std, mean_dense + std, color="black", alpha=0.08, lw=0)
        _sparsity_axis(axes, [row.sparsity for row in mine])
        axes.set_ylabel("test accuracy, %")
        axes.set_title(" ".join(place))
        if any(t.sparsity is not None for c, t in tickets.items() if (c.dataset, c.arch) == place):
            axes.plot([], [], "*", color="white", mec="black", ms=11, label="winning ticket")
        axes.legend()
    return figure


def training(facts: Facts) -> Any:
    """Test accuracy by epoch, the mean over seeds, one panel a curve and one colour a k."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    values: dict[Curve, dict[float, dict[int, list[float]]]] = {}
    for row in facts.training:
        by_k = values.setdefault(curve_of(row), {}).setdefault(row.k, {})
        by_k.setdefault(row.epoch, []).append(row.test_top1)
    if not values:
        return None
    labels = _labels(facts)
    figure, panels = _panels(values, 4.6, 3.4)
    for axes, (curve, epochs_by_k) in zip(panels, values.items(), strict=True):
        ks = sorted(epochs_by_k, reverse=True)
        for at, k in enumerate(ks):
            epochs = sorted(epochs_by_k[k])
            means = [statistics.fmean(epochs_by_k[k][epoch]) for epoch in epochs]
            colour = colormaps["viridis"](at / max(1, len(ks) - 1) * 0.9)
            axes.plot(epochs, means, color=colour, lw=1.2, label=f"{k:g}")
        axes.set(xlabel="epoch", ylabel="test accuracy, %", title=labels.get(curve, curve.method))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(title="k", ncols=1 + len(ks) // 8, loc="lower right")
    return figure


def timeline(facts: Facts) -> Any:
    """Each attempt as a bar, by how it ended, and the waiting between attempts."""
    from matplotlib import pyplot
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.patches import Patch

    if not facts.attempts:
        return None
    runs: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for row in facts.attempts:
        runs[row.folder, row.run_id].append(row)
    often = sorted(runs.values(), key=lambda rows: (-len(rows), rows[0].start))[:MOST_RUNS]
    often.sort(key=lambda rows: rows[0].start)
    many = len({row.folder for row in facts.attempts}) > 1
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(often)))
    causes = sorted({row.cause for row in facts.attempts})
    look = {cause: COLOURS[at % len(COLOURS)] for at, cause in enumerate(causes)}
    for at, rows in enumerate(often):
        for row in rows:
            start, end = date2num(row.start), date2num(row.end or row.start)
            if row.end is None:  # killed, or still running: how long is not recorded
                axes.plot(start, at, "x", color=look[row.cause], ms=5)
            else:
                axes.barh(at, end - start, left=start, color=look[row.cause], height=0.7)
            if row.waited:
                axes.plot([start - row.waited / 86400, start], [at, at], color="grey", lw=1, ls=":")
    names = [rows[0].run_id if not many else f"{rows[0].folder}/{rows[0].run_id}" for rows in often]
    axes.set_yticks(range(len(often)), names, fontsize=6)
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_xlabel("time, UTC")
    left_out = len(runs) - len(often)
    title = "attempts; dotted: waiting; cross: no end recorded"
    axes.set_title(title + (f"; {left_out} runs with fewer attempts not shown" * bool(left_out)))
    handles = [Patch(color=look[cause], label=cause) for cause in causes]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    return figure


def layers(facts: Facts) -> Any:
    """Keep ratio by layer and k, the mean over seeds, one panel a curve."""
    found: dict[Curve, dict[tuple[str, float], list[float]]] = {}
    order: dict[Curve, dict[str, int]] = defaultdict(dict)
    for row in facts.layers:
        cells = found.setdefault(curve_of(row), {})
        cells.setdefault((row.layer, row.k), []).append(row.keep_ratio)
        order[curve_of(row)][row.layer] = row.position
    if not found:
        return None
    from matplotlib.colors import LogNorm

    labels = _labels(facts)
    deepest = max(len(names) for names in order.values())
    figure, panels = _panels(found, 5.2, 1.6 + 0.16 * max(8, deepest))
    floor = min((c.keep_ratio for c in facts.layers if c.keep_ratio > 0), default=1e-3)
    for axes, (curve, cells) in zip(panels, found.items(), strict=True):
        names = sorted(order[curve], key=order[curve].__getitem__)
        ks = sorted({k for _, k in cells}, reverse=True)
        grid = [[mean_std(cells[name, k])[0] for k in ks] for name in names]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=LogNorm(min(floor, 0.5), 1))
        axes.set_xticks(range(len(ks)), [f"{k:g}" for k in ks], rotation=90)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.grid(visible=False)
        axes.set(xlabel="k", title=labels.get(curve, curve.method))
        figure.colorbar(image, ax=axes, label="kept in the layer (white: nothing)")
    return figure


def costs(facts: Facts) -> Any:
    """Epochs and forward-backwards of a run, and device-hours of the curve."""
    rows, labels = facts.costs(), _labels(facts)
    if not any(row.device_hours for row in rows):
        return None
    names = [labels.get(curve_of(row), row.method) for row in rows]
    titles = {
        "epochs_mean": "epochs of a run",
        "forward_backwards_mean": "forward-backwards of a run",
        "device_hours": "device-hours of the curve",
    }
    titles = {key: title for key, title in titles.items() if any(getattr(r, key) for r in rows)}
    figure, panels = _panels(titles, 12 / (1 + len(titles)), 1.4 + 0.28 * len(rows))
    for at, (axes, (key, title)) in enumerate(zip(panels, titles.items(), strict=True)):
        values = [getattr(row, key) or 0.0 for row in rows]
        bars = axes.barh(range(len(rows)), values, color=COLOURS[0])
        axes.bar_label(bars, [f"{v:.3g}" if v else "" for v in values], padding=2, fontsize=8)
        axes.set_yticks(range(len(rows)), names if at == 0 else [""] * len(rows), fontsize=8)
        axes.set(xlabel=title, xmargin=0.2)
        axes.invert_yaxis()
    return figure


def overlaps(facts: Facts) -> Any:
    """IoU of masks: of two methods at one k, and of neighbouring k of one curve."""
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for row in facts.overlaps:
        name = row.a if row.kind == "neighbours" else f"{row.a} and {row.b}"
        by_k = found.setdefault(row.kind, {}).setdefault(name, {})
        by_k.setdefault(row.k_b, []).append(row.iou)
    if not found:
        return None
    titles = {"neighbours": "k and the next larger one", "methods": "two methods"}
    figure, panels = _panels(found)
    for axes, (kind, lines) in zip(panels, found.items(), strict=True):
        for at, (name, by_k) in enumerate(lines.items()):
            ks = sorted(by_k, reverse=True)
            means = [statistics.fmean(by_k[k]) for k in ks]
            look = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}
            axes.plot(ks, means, ms=4, label=name, **look)
        _sparsity_axis(axes, [1 - k for by_k in lines.values() for k in by_k])
        axes.set(ylabel="IoU of the masks", title=titles[kind], ylim=(0, 1))
        axes.legend()
    return figure
