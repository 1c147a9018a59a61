"""The tables of a report: CSV, Parquet, and LaTeX for a paper."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from launch.report.rows import CostRow, Curve, CurveRow, Facts, Row, curve_of

_LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
_LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}


def write_tables(facts: Facts, out: Path) -> None:
    """Every table as CSV and Parquet, and accuracy, tickets and costs as LaTeX. Raises OSError."""
    for name, (kind, rows) in facts.tables().items():
        _write_csv(out / f"{name}.csv", kind, rows)
        _write_parquet(out / f"{name}.parquet", kind, rows)
    for name, make in (("accuracy", _accuracy), ("tickets", _tickets), ("costs", _costs)):
        (out / f"{name}.tex").write_text(make(facts))


def columns(kind: type[Row] | type[Curve]) -> list[str]:
    """The column names of a table."""
    return [field.name for field in fields(kind)]


def _write_csv(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns(kind))
        for row in rows:
            writer.writerow(["" if value is None else _plain(value) for value in astuple(row)])


def _plain(value: Any) -> Any:
    return value.isoformat(timespec="milliseconds") if isinstance(value, datetime) else value


def _write_parquet(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    types[datetime] = pyarrow.timestamp("ms", "UTC")
    hints = get_type_hints(kind)
    schema = pyarrow.schema([(name, types[_base(hints[name])]) for name in columns(kind)])
    values = [*zip(*map(astuple, rows), strict=True)] if rows else [()] * len(schema)
    arrays = [
        pyarrow.array(column, field.type) for column, field in zip(values, schema, strict=True)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), path)


def _base(hint: Any) -> type:
    """`float` of `float | None`."""
    found: type = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    return found


def escape(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _tabular(sides: str, head: Sequence[str], lines: Sequence[Sequence[str]], note: str) -> str:
    rows = [" & ".join(line) + r" \\" for line in lines]
    top = [f"% {note}; needs \\usepackage{{booktabs}}", rf"\begin{{tabular}}{{{sides}}}"]
    body = [r"\toprule", " & ".join(head) + r" \\", r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*top, *body, r"\end{tabular}", ""])


def pm(mean: float | None, std: float | None) -> str:
    """Mean and deviation in LaTeX: two decimals."""
    if mean is None:
        return "--"
    return f"${mean:.2f}" + (rf" \pm {std:.2f}$" if std is not None else "$")


def _accuracy(facts: Facts) -> str:
    """A line a sparsity, a column a curve; the best mean of a line is bold."""
    labels, rows = facts.labels(), facts.curves()
    curves = [curve for curve in labels if any(curve_of(row) == curve for row in rows)]
    cells: dict[tuple[float, Any], CurveRow] = {(row.k, curve_of(row)): row for row in rows}
    lines = []
    for k in sorted({row.k for row in rows}, reverse=True):
        found = [cells.get((k, curve)) for curve in curves]
        best = max(row.top1_mean for row in found if row)
        texts = [pm(row.top1_mean, row.top1_std) if row else "--" for row in found]
        for at, row in enumerate(found):
            if row and row.top1_mean == best and len(curves) > 1:
                texts[at] = rf"\boldmath{texts[at]}"
        lines.append([f"{100 * (1 - k):.4g}", *texts])
    head = [r"sparsity, \%", *(escape(labels[curve]) for curve in curves)]
    note = "test accuracy, %, mean and sample deviation over seeds"
    return _tabular("r" * len(head), head, lines, note)


def _tickets(facts: Facts) -> str:
    labels = facts.labels()
    lines = [
        [
            escape(labels[curve_of(row)]), pm(row.dense_top1, row.dense_std),
            "--" if row.sparsity is None else f"{100 * row.sparsity:.2f}", pm(row.top1, None),
        ]
        for row in facts.tickets()
    ]  # fmt: skip
    head = ["", r"dense, \%", r"sparsity, \%", r"accuracy, \%"]
    return _tabular("lrrr", head, lines, "the sparsest networks that match the dense accuracy")


def _costs(facts: Facts) -> str:
    labels = facts.labels()

    def cell(value: float | None) -> str:
        return "--" if value is None else f"{value:.4g}"

    numbers: Sequence[Callable[[CostRow], float | None]] = (
        lambda row: row.runs, lambda row: row.epochs_mean,
        lambda row: row.forward_backwards_mean, lambda row: row.device_hours,
    )  # fmt: skip
    lines = [
        [escape(labels.get(curve_of(row), row.method)), *(cell(number(row)) for number in numbers)]
        for row in facts.costs()
    ]
    head = ["", "runs", "epochs", "forward-backwards", "device-hours"]
    return _tabular("lrrrr", head, lines, "means over runs; device-hours of all runs")
