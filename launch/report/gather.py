"""Read sweep folders, and CSVs of published figures, into the tables of a report (`rows`)."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from bip.config import RunConfig, build_config
from bip.data import sets
from bip.errors import UserError
from bip.files import read_json, read_jsonl
from bip.methods import find
from bip.shipped import given_or_shipped
from bip.yaml_file import read_yaml
from launch.report.rows import (
    AttemptRow,
    CostRow,
    Curve,
    Facts,
    LayerRow,
    OverlapRow,
    RunRow,
    TrainingRow,
    grouped,
    known_mean,
    names_of,
)
from launch.sweep import Run, Sweep

if TYPE_CHECKING:
    import numpy as np

PUBLISHED = (
    "dataset", "arch", "layer_type", "method", "sparsity", "top1", "dense_top1", "minutes",
    "source",
)  # fmt: skip
# Settings along a curve, or those that name it in columns of their own.
_NOT_SETTINGS = {"k", "seed", "source_run", "rewind_net", "dataset", "arch", "layer_type"}
_NOT_SETTINGS |= {"trainer", "exp_mode"}


class _Result(BaseModel):
    """What a report needs of result.json."""

    model_config = ConfigDict(allow_inf_nan=False)
    dataset: str
    sparsity: float
    top1: float
    top5: float | None = None
    kept: int | None = None
    total: int | None = None
    epochs: int | None = None
    forward_backwards: int | None = None
    seconds: float | None = None
    attempts: int | None = None
    mask_sha256: str | None = None


def gather(sources: list[Path]) -> Facts:
    """Read sweep folders, and CSVs of published figures.

    Figures of networks and data sets that no sweep has are left out if there is a sweep. A run that
    cannot be read is skipped and named. Raises UserError for no sweep folder, a CSV without the
    right columns, or if there is nothing to show.
    """
    facts = Facts()
    given = list(dict.fromkeys(given_or_shipped(path).resolve() for path in sources))
    tables = [path for path in given if path.suffix.lower() == ".csv" and not path.is_dir()]
    folders = [path for path in given if path not in tables]
    for folder, name in zip(folders, _short_names(folders), strict=True):
        _Reader(Sweep(folder), name, facts).read()
    known = {(r.dataset, r.arch, r.layer_type) for r in facts.runs} if folders else None
    if folders and not facts.runs and not facts.dense:
        where = ", ".join(map(str, sources))
        raise UserError(
            f"{where}: no finished run to report"
            + (f" ({facts.skipped[0]})" if facts.skipped else "")
            + "; python -m launch status FOLDER shows the state of each run"
        )
    for path, name in zip(tables, _short_names(tables), strict=True):
        before = len(facts.runs) + len(facts.published_costs)
        _read_published(path, name.removesuffix(".csv"), facts, known)
        if len(facts.runs) + len(facts.published_costs) == before:
            facts.skipped.append(f"{path}: no figure of the sweeps' data sets and networks")
    if not (facts.runs or facts.dense or facts.published_costs):
        raise UserError(f"{sources[0]}: no figure to report; give a sweep folder or another CSV")
    return facts


def _short_names(folders: list[Path]) -> list[str]:
    """The last part of each path; more of it where two are alike."""
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1)):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len({*names}) == len(names):
            return names
    return [str(folder) for folder in folders]


class _Reader:
    """Reads one sweep into `facts`."""

    def __init__(self, sweep: Sweep, name: str, facts: Facts) -> None:
        self.sweep, self.name, self.facts = sweep, name, facts
        self.masks: dict[Curve, dict[tuple[float, int], _Mask]] = {}

    def read(self) -> None:
        runs = self.sweep.runs()
        configs = {run.run_id: found for run in runs if (found := self._config(run))}
        identities = {run_id: config.identity() for run_id, config in configs.items()}
        differing = _differing(runs, identities)
        outside: dict[Path, Curve] = {}
        for run in runs:
            self._read_attempts(run)
            if run.run_id not in identities:
                continue
            dataset = str(identities[run.run_id]["dataset"])
            values = [f"{n} {identities[run.run_id].get(n)}" for n in differing[_method(run)]]
            layer_type = run.layer_type
            method, settings = _method(run), ", ".join(values)
            curve = Curve(self.name, dataset, run.arch, layer_type, method, settings)
            source = self._source(run, configs[run.run_id])
            if run.stage == "prune" and source is not None:
                outside.setdefault(source, curve)
            if damage := self.sweep.damage(run):
                self._skip(run.run_id, damage)
                continue
            if not self.sweep.is_done(run):
                count = self.facts.unfinished.get(self.name, 0)
                self.facts.unfinished[self.name] = count + 1
                continue
            row = self._row(run, curve)
            if row is None:
                continue
            (self.facts.dense if run.stage == "pretrain" else self.facts.runs).append(row)
            self._read_training(row)
        for source, curve in outside.items():
            self._read_dense(source, curve)
        self.facts.overlaps += _overlaps(self.masks)

    def _skip(self, what: str, error: object) -> None:
        self.facts.skipped.append(f"{self.name}/{what}: {error}")

    def _config(self, run: Run) -> RunConfig | None:
        path = self.sweep.folder / run.config
        try:
            return build_config(read_yaml(path), str(path))
        except (UserError, OSError) as error:
            self._skip(run.run_id, error)
            return None

    def _source(self, run: Run, config: RunConfig) -> Path | None:
        """The run folder of the dense network, if another sweep has trained it."""
        if run.needs or config.source_net is None:
            return None
        folder = config.source_net.absolute().parent.parent
        return None if self.sweep.folder in folder.parents else folder

    def _row(self, run: Run, curve: Curve) -> RunRow | None:
        folder = self.sweep.folder / run.folder
        starts = [r for r in read_jsonl(folder / "attempts.jsonl") if r.get("event") == "start"]
        last = starts[-1] if starts else {}
        try:
            result = _read_result(folder)
        except (UserError, OSError) as error:
            self._skip(run.run_id, error)
            return None
        row = RunRow(
            *names_of(curve), float(run.k), run.seed, run.run_id, result.kept, result.total,
            result.sparsity, result.top1, result.top5, result.epochs, result.forward_backwards,
            result.seconds, _whole(last.get("world")), str(last.get("device", "")).split(":")[0],
            result.attempts, str(folder),
        )  # fmt: skip
        if result.mask_sha256 is not None:
            self._read_mask(row, folder, result.mask_sha256)
        return row

    def _read_dense(self, folder: Path, curve: Curve) -> None:
        """A dense network that this sweep did not train itself."""
        if not (folder / "result.json").is_file():
            return
        try:
            result = _read_result(folder)
        except (UserError, OSError) as error:
            self._skip(folder.name, error)
            return
        if result.mask_sha256 is None and result.sparsity == 0:
            names = (self.name, curve.dataset, curve.arch, "dense", "dense", "")
            row = RunRow(
                *names, 1.0, None, folder.name, result.kept, result.total, 0.0, result.top1,
                result.top5, result.epochs, result.forward_backwards, None, None, "",
                result.attempts, str(folder),
            )  # fmt: skip
            self.facts.dense.append(row)

    def _read_training(self, row: RunRow) -> None:
        losses: dict[int, list[float]] = defaultdict(list)
        records = [*read_jsonl(Path(row.source) / "metrics.jsonl")]
        for record in records:
            epoch, loss = _whole(record.get("epoch")), _number(record.get("loss"))
            if record.get("event") == "step" and epoch is not None and loss is not None:
                losses[epoch].append(loss)
        for record in records:
            epoch, top1 = _whole(record.get("epoch")), _number(record.get("top1"))
            if record.get("event") == "epoch" and epoch is not None and top1 is not None:
                self.facts.training.append(
                    TrainingRow(
                        *names_of(row), row.k, row.seed or 0, row.run_id, epoch, top1,
                        _number(record.get("loss")), known_mean(losses[epoch]),
                    )
                )  # fmt: skip

    def _read_attempts(self, run: Run) -> None:
        rows: list[AttemptRow] = []
        for record in read_jsonl(self.sweep.folder / run.folder / "attempts.jsonl"):
            try:
                time = datetime.fromisoformat(record["time"]).astimezone(UTC)
            except (KeyError, TypeError, ValueError):
                continue
            if record.get("event") == "start":
                before = rows[-1].end if rows else None
                waited = (time - before).total_seconds() if before else None
                host, number = str(record.get("host", "")), len(rows) + 1
                cause = "no end recorded"
                rows.append(
                    AttemptRow(self.name, run.run_id, number, time, None, waited, cause, host)
                )
            elif record.get("event") == "end" and rows and rows[-1].end is None:
                last = rows[-1]
                rows[-1] = AttemptRow(
                    self.name, run.run_id, last.number, last.start, time, last.waited,
                    str(record.get("cause", "")), last.host,
                )  # fmt: skip
        self.facts.attempts += rows

    def _read_mask(self, row: RunRow, folder: Path, digest: str) -> None:
        try:
            mask = _Mask.read(folder / "checkpoint" / "checkpoint.pth.tar", digest)
        except (UserError, OSError) as error:
            self._skip(row.run_id, error)
            return
        self.masks.setdefault(row.curve, {})[row.k, row.seed or 0] = mask
        for position, (layer, kept, total) in enumerate(mask.layers):
            self.facts.layers.append(
                LayerRow(
                    *names_of(row), row.k, row.seed or 0, row.run_id, position,
                    layer.removesuffix(".weight"), kept, total, kept / total,
                )
            )  # fmt: skip


@dataclass(frozen=True)
class _Mask:
    """A mask, packed to bits, and (name, kept, total) of each layer."""

    bits: "np.ndarray[Any, Any]"
    layers: list[tuple[str, int, int]]

    @classmethod
    def read(cls, path: Path, digest: str) -> "_Mask":
        """Read only the mask of a checkpoint, and check it by its digest in result.json."""
        import torch

        from bip.training.checkpoint import hash_tensors, layer_masks

        try:  # mapped: the weights are not read
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = hash_tensors({"mask": state["mask"]})
            parts = layer_masks(state)
        except Exception as error:  # an unpickler may raise anything on a damaged file
            if isinstance(error, OSError):
                raise
            raise UserError(f"{path}: not a readable checkpoint; its layers are left out") from None
        if found != digest:
            raise UserError(f"{path}: its mask is not that of result.json; left out")
        layers = [(name, int(m.sum()), m.numel()) for name, m in parts.items()]
        return cls(state["mask"].numpy().copy(), layers)

    def iou(self, other: "_Mask") -> float | None:
        """|both| / |either|; None for masks of other layers."""
        import numpy as np

        if [(n, t) for n, _, t in self.layers] != [(n, t) for n, _, t in other.layers]:
            return None
        either = int(np.bitwise_count(self.bits | other.bits).sum())
        return int(np.bitwise_count(self.bits & other.bits).sum()) / either if either else 1.0


def _overlaps(masks: dict[Curve, dict[tuple[float, int], _Mask]]) -> Iterator[OverlapRow]:
    named = {c: ", ".join(filter(None, (c.method, c.settings))) for c in masks}
    if len({*named.values()}) < len(named):
        named = {c: f"{named[c]}, {c.arch}, {c.dataset}, {c.layer_type}" for c in masks}
    curves = [*masks]
    for at, a in enumerate(curves):
        mine = masks[a]
        for seed in sorted({seed for _, seed in mine}):
            ks = sorted((k for k, s in mine if s == seed), reverse=True)
            for large, small in pairwise(ks):
                found = mine[large, seed].iou(mine[small, seed])
                if found is not None:
                    yield OverlapRow("neighbours", named[a], named[a], large, small, seed, found)
        for b in curves[at + 1 :]:
            if (a.dataset, a.arch, a.layer_type) != (b.dataset, b.arch, b.layer_type):
                continue
            for k, seed in sorted(mine.keys() & masks[b].keys(), reverse=True):
                found = mine[k, seed].iou(masks[b][k, seed])
                if found is not None:
                    yield OverlapRow("methods", named[a], named[b], k, k, seed, found)


def _method(run: Run) -> str:
    """The method's own name; a fine-tuned network is a curve of its own."""
    if run.stage == "pretrain":
        return "dense"
    try:
        name = find(run.trainer, "prune").name
    except ValueError:
        name = run.trainer
    return name if run.stage == "prune" else f"{name} + finetune"


def _differing(runs: list[Run], identities: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """By method, the settings in which runs of one network, k and seed differ.

    A setting that depends on k alone, such as the budget of a method's rounds, splits no curve.
    """
    found: dict[str, set[str]] = {_method(run): set() for run in runs}
    known = [(run, identities[run.run_id]) for run in runs if run.run_id in identities]
    alike = grouped(known, lambda r: (_method(r[0]), r[0].arch, r[0].layer_type, r[0].k, r[0].seed))
    for (method, *_), same in alike:
        names = {name for _, identity in same for name in identity} - _NOT_SETTINGS
        # Lists are not hashable, so values are compared as text.
        found[method] |= {n for n in names if len({repr(one.get(n)) for _, one in same}) > 1}
    return {method: sorted(names) for method, names in found.items()}


def _read_result(folder: Path) -> _Result:
    try:
        return _Result.model_validate(read_json(folder / "result.json"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "content"
        raise UserError(f"result.json: {key}: {first['msg']}") from None


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _read_published(
    path: Path, name: str, facts: Facts, known: set[tuple[str, str, str]] | None
) -> None:
    """Add a CSV's figures: of all networks, or of the (dataset, arch, layer_type) in `known`."""
    try:
        with open(path, newline="") as stream:
            rows = [*csv.DictReader(stream)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for line, row in enumerate(rows, 2):
        if lacking := [column for column in PUBLISHED if row.get(column) is None]:
            raise UserError(
                f"{path}: line {line}: no column {lacking[0]}; a CSV of published figures has the "
                f"columns {','.join(PUBLISHED)}"
            )
        numbers = {n: _cell(path, line, n, row[n]) for n in PUBLISHED[4:8]}
        if not row["source"]:
            raise UserError(f"{path}: line {line}: source: empty; name where the figure is from")
        dataset = sets.canonical(row["dataset"])
        where = (dataset, row["arch"], row["layer_type"])
        if known is not None and where not in known:
            continue
        curve = Curve(name, *where, row["method"], "")
        sparsity, top1, minutes = numbers["sparsity"], numbers["top1"], numbers["minutes"]
        if numbers["dense_top1"] is not None:
            facts.published_dense[name, dataset, row["arch"]] = numbers["dense_top1"]
        if minutes is not None:
            times = (1, None, None, 60 * minutes, minutes / 60, row["source"])
            facts.published_costs.append(CostRow(*names_of(curve), *times))
        if top1 is None:
            continue
        if sparsity is None or not 0 <= sparsity < 1:
            raise UserError(f"{path}: line {line}: sparsity: needs a fraction from 0 to below 1")
        k = round(1 - sparsity, 6)
        facts.runs.append(
            RunRow(
                *names_of(curve), k, None, "", None, None, sparsity, top1, None, None, None, None,
                None, "", None, row["source"],
            )
        )  # fmt: skip


def _cell(path: Path, line: int, name: str, text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UserError(f"{path}: line {line}: {name}: needs a number, not {text!r}")
    return value
