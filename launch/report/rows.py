"""What a report shows, as plain tables: the types of their rows, and what is computed from them.

A curve is what one line of a figure shows: a method on one network, data set and layer type, in one
folder, under one set of other settings. Accuracies are in percent, sparsity and keep ratios are
fractions, times are in seconds unless the name has another unit.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any


@dataclass(frozen=True, order=True)
class Curve:
    """The names of one curve. `settings`: those that differ between runs of this method."""

    folder: str
    dataset: str
    arch: str
    layer_type: str
    method: str
    settings: str


@dataclass(frozen=True)
class RunRow(Curve):
    """One finished run, or one published figure."""

    k: float
    seed: int | None
    run_id: str
    kept: int | None
    total: int | None
    sparsity: float
    top1: float
    top5: float | None
    epochs: int | None
    forward_backwards: int | None  # from the dense network on
    seconds: float | None
    ranks: int | None
    device: str
    attempts: int | None
    source: str

    @property
    def curve(self) -> Curve:
        return curve_of(self)


@dataclass(frozen=True)
class CurveRow(Curve):
    """The runs of a curve at one k. `top1_std` is the sample deviation; None for one seed."""

    k: float
    sparsity: float
    seeds: int
    top1_mean: float
    top1_std: float | None
    dense_top1: float | None


@dataclass(frozen=True)
class TicketRow(Curve):
    """A curve's winning ticket: its sparsest k whose mean accuracy is at least the dense one.

    `k`, `sparsity` and `top1` are None where no k matches the dense accuracy.
    """

    dense_top1: float
    dense_std: float | None
    dense_seeds: int
    k: float | None
    sparsity: float | None
    top1: float | None


@dataclass(frozen=True)
class TrainingRow(Curve):
    """An epoch of a run: test accuracy and loss, and the mean loss of its logged batches."""

    k: float
    seed: int
    run_id: str
    epoch: int
    test_top1: float
    test_loss: float | None
    train_loss: float | None


@dataclass(frozen=True)
class AttemptRow:
    """An attempt of any run of a sweep. Times are UTC; `end` is None where none was recorded."""

    folder: str
    run_id: str
    number: int
    start: datetime
    end: datetime | None
    waited: float | None  # seconds since the end of the attempt before
    cause: str
    host: str


@dataclass(frozen=True)
class LayerRow(Curve):
    """What a run keeps of a layer."""

    k: float
    seed: int
    run_id: str
    position: int
    layer: str
    kept: int
    total: int
    keep_ratio: float


@dataclass(frozen=True)
class CostRow(Curve):
    """What a curve cost. Means are over runs; `device_hours` (ranks x time) is the sum of all."""

    runs: int
    epochs_mean: float | None
    forward_backwards_mean: float | None
    seconds_mean: float | None
    device_hours: float | None
    device: str


@dataclass(frozen=True)
class OverlapRow:
    """IoU of two masks of one seed: `kind` is "methods" (one k) or "neighbours" (one curve)."""

    kind: str
    a: str
    b: str
    k_a: float
    k_b: float
    seed: int
    iou: float


Row = RunRow | CurveRow | TicketRow | TrainingRow | AttemptRow | LayerRow | CostRow | OverlapRow


@dataclass
class Facts:
    """All tables of a report, and what could not be read or is not finished."""

    runs: list[RunRow] = field(default_factory=list)
    dense: list[RunRow] = field(default_factory=list)
    training: list[TrainingRow] = field(default_factory=list)
    attempts: list[AttemptRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    overlaps: list[OverlapRow] = field(default_factory=list)
    published_dense: dict[tuple[str, str, str], float] = field(default_factory=dict)
    published_costs: list[CostRow] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unfinished: dict[str, int] = field(default_factory=dict)  # by folder

    def labels(self, without: tuple[str, ...] = ()) -> dict[Curve, str]:
        """A short name of each curve: the method, and what else differs, but for `without`."""
        curves = sorted({*map(curve_of, self.runs), *map(curve_of, self.published_costs)})
        axes = ("method", "settings", "arch", "dataset", "layer_type", "folder")
        names = [name for name in axes if name not in without]
        varying = [n for n in names if n == "method" or len({getattr(c, n) for c in curves}) > 1]
        return {c: ", ".join(filter(None, (getattr(c, n) for n in varying))) for c in curves}

    def tables(self) -> dict[str, tuple[type[Row], list[Row]]]:
        """Every table by its name: the type of its rows, and the rows."""
        return {
            "runs": (RunRow, [*self.dense, *self.runs]),
            "curves": (CurveRow, [*self.curves()]),
            "tickets": (TicketRow, [*self.tickets()]),
            "training": (TrainingRow, [*self.training]),
            "attempts": (AttemptRow, [*self.attempts]),
            "layers": (LayerRow, [*self.layers]),
            "costs": (CostRow, [*self.costs()]),
            "overlaps": (OverlapRow, [*self.overlaps]),
        }

    def dense_top1(self, curve: Curve) -> list[float]:
        """Accuracies of the dense networks beside a curve: its folder's, else those of others."""
        same = [r for r in self.dense if (r.dataset, r.arch) == (curve.dataset, curve.arch)]
        own = [r.top1 for r in same if r.folder == curve.folder]
        published = self.published_dense.get((curve.folder, curve.dataset, curve.arch))
        if published is not None:
            return [published]
        return own or [r.top1 for r in same]

    def curves(self) -> list[CurveRow]:
        rows = []
        for (curve, k), runs in grouped(self.runs, lambda r: (r.curve, r.k)):
            mean, std = mean_std([run.top1 for run in runs])
            dense = self.dense_top1(curve)
            sparsity = statistics.fmean(run.sparsity for run in runs)
            base = statistics.fmean(dense) if dense else None
            rows.append(CurveRow(*names_of(curve), k, sparsity, len(runs), mean, std, base))
        return sorted(rows, key=lambda row: (curve_of(row), -row.k))

    def tickets(self) -> list[TicketRow]:
        rows = []
        for curve, points in grouped(self.curves(), curve_of):
            if not (dense := self.dense_top1(curve)):
                continue
            mean, std = mean_std(dense)
            won = [row for row in points if row.top1_mean >= mean]
            best = min(won, key=lambda row: row.k, default=None)
            found = (best.k, best.sparsity, best.top1_mean) if best else (None, None, None)
            rows.append(TicketRow(*names_of(curve), mean, std, len(dense), *found))
        return rows

    def costs(self) -> list[CostRow]:
        rows = []
        for curve, runs in grouped([*self.dense, *self.runs], curve_of):
            timed = [run for run in runs if run.seconds is not None and run.ranks is not None]
            if not timed:
                continue
            hours = sum((r.seconds or 0) * (r.ranks or 0) for r in timed) / 3600
            devices = ", ".join(sorted({run.device for run in timed}))
            epochs = known_mean(run.epochs for run in timed)
            spent = known_mean(run.forward_backwards for run in timed)
            seconds = known_mean(run.seconds for run in timed)
            row = CostRow(*names_of(curve), len(timed), epochs, spent, seconds, hours, devices)
            rows.append(row)
        return rows + self.published_costs


def curve_of(row: Curve) -> Curve:
    """The curve that a row belongs to."""
    return Curve(*names_of(row))


def names_of(row: Curve) -> tuple[str, str, str, str, str, str]:
    """The values of the fields of `Curve`."""
    return (row.folder, row.dataset, row.arch, row.layer_type, row.method, row.settings)


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def known_mean(values: Iterable[Any]) -> float | None:
    """The mean of those that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def grouped(rows: Iterable[Any], key: Any) -> list[tuple[Any, list[Any]]]:
    """The rows by key, in the order in which the keys come."""
    found: dict[Any, list[Any]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return [*found.items()]
