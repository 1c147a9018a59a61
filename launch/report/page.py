"""The page of a report: one HTML file with its data and plotly inside, for any browser, offline."""

import json
from dataclasses import asdict, astuple
from datetime import datetime
from pathlib import Path
from typing import Any

from bip.files import atomic_write_bytes
from launch.report.figures import looks
from launch.report.rows import Curve, Facts, Row, curve_of
from launch.report.tables import columns

_TEMPLATE = Path(__file__).with_name("page.html")
_LOOK = ("colour", "marker", "dash")
_NAMES = len(columns(Curve))


def write_page(facts: Facts, path: Path, title: str) -> None:
    """Write the page. Raises OSError."""
    from plotly.offline import get_plotlyjs

    data = json.dumps(_data(facts, title), default=_iso, separators=(",", ":"), allow_nan=False)
    # A name with </script> must not end the element that holds the data.
    html = _TEMPLATE.read_text().replace("/*DATA*/", data.replace("<", r"\u003c"))
    atomic_write_bytes(path, html.replace("/*PLOTLY*/", get_plotlyjs()).encode())


def _iso(value: Any) -> str:
    assert isinstance(value, datetime)
    return value.isoformat(timespec="milliseconds")


def _data(facts: Facts, title: str) -> dict[str, Any]:
    tables = facts.tables()
    labels, look = facts.labels(), looks(facts)
    rows = [row for _, found in tables.values() for row in found if isinstance(row, Curve)]
    curves = [*dict.fromkeys([*labels, *map(curve_of, rows)])]
    numbers = {curve: at for at, curve in enumerate(curves)}
    described = [
        asdict(curve)
        | {"label": labels.get(curve, curve.method)}
        | dict(zip(_LOOK, look.get(curve, ("#777777", "o", "solid")), strict=True))
        for curve in curves
    ]
    return {
        "title": title,
        "summary": summary(facts),
        "skipped": facts.skipped,
        "curves": described,
        "tables": {name: _table(kind, found, numbers) for name, (kind, found) in tables.items()},
    }


def _table(kind: type[Row], rows: list[Row], numbers: dict[Curve, int]) -> dict[str, Any]:
    """Columns and rows; the six names of a curve as its number, for a smaller file."""
    if not issubclass(kind, Curve):
        return {"columns": columns(kind), "rows": [*map(astuple, rows)]}
    of_curves = [row for row in rows if isinstance(row, Curve)]
    lines = [(numbers[curve_of(row)], *astuple(row)[_NAMES:]) for row in of_curves]
    return {"columns": ["curve", *columns(kind)[_NAMES:]], "rows": lines}


def summary(facts: Facts) -> str:
    """One line: how many runs are in the report, and how many are not."""
    own = [run for run in [*facts.runs, *facts.dense] if run.run_id]
    published = sum(not run.run_id for run in facts.runs)
    parts = [f"{len(own)} finished runs"] if own else []
    parts += [f"{published} published figures"] if published else []
    parts += [f"{sum(facts.unfinished.values())} unfinished"] if facts.unfinished else []
    parts += [f"{len(facts.skipped)} skipped"] if facts.skipped else []
    return ", ".join(parts)
