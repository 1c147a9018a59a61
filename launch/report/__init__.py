"""`launch report`: figures, tables and a page of sweeps. The packages are in the extra `report`."""

from importlib import import_module
from pathlib import Path

from bip.errors import UserError


def report(folders: list[Path], out: Path) -> None:
    """Write figures, tables and report.html to `out`, and print what is there.

    Raises UserError, with nothing written, if a package or all data are missing.
    """
    for package in ("matplotlib", "plotly", "pyarrow"):
        try:
            import_module(package)
        except ImportError:
            raise UserError(f"report: needs {package}; pip install 'bip-hpc[report]'") from None
    from launch.report.figures import draw
    from launch.report.gather import gather
    from launch.report.page import summary, write_page
    from launch.report.tables import write_tables

    facts = gather(folders)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_tables(facts, out)
        figures = draw(facts, out)
        write_page(facts, out / "report.html", ", ".join(path.stem for path in folders))
    except OSError as error:
        raise UserError(f"out: {out}: cannot be written ({error.strerror})") from None
    print(summary(facts))
    for line in facts.skipped:
        print(f"skipped {line}")
    print(f"figures (.png, .pdf): {', '.join(figures)}")
    print(f"tables (.csv, .parquet, .tex) and the page: {out / 'report.html'}")
