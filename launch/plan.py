"""The k series, and the plan of a sweep: series x seeds x networks x layer types x trainers."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from bip.checkpoint_path import BEST, LIBRARIES
from bip.config import (
    RunConfig,
    build_config,
    check_inputs,
    expand_paths,
    input_files,
    k_of_pattern,
    merge,
    with_source_facts,
)
from bip.errors import UserError
from bip.methods import acts_in, find
from bip.methods.base import Method, Mode
from bip.shipped import given_or_shipped
from launch.grid import AXES, Grid, check, read_series

# The published sparsity ladder (BiP, figures 4-6), as written there.
# fmt: off
UNSTRUCTURED = (
    "0.8000", "0.6400", "0.5120", "0.4100", "0.3280", "0.2620", "0.2097", "0.1678", "0.1342",
    "0.1074", "0.0859", "0.0687", "0.0550", "0.0440", "0.0350", "0.0280", "0.0225", "0.0180",
    "0.0144", "0.0115", "0.0092",
)
STRUCTURED = ("0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2", "0.1")
# fmt: on
NAMED_SERIES = {"unstructured": UNSTRUCTURED, "structured": STRUCTURED}

STAGES: tuple[Mode, ...] = ("pretrain", "prune", "finetune")


class SeriesOptions(BaseModel):
    """The flags of `python -m launch series` in addition to those of `bip train`."""

    series: str | None = Field(
        None,
        description="unstructured, structured, a comma list of k, or a file of configs/series/",
    )
    seeds: str | None = Field(None, description="comma list or 1-5; multiplies the series")
    archs: str | None = Field(None, description="comma list of networks; multiplies the series")
    layer_types: str | None = Field(None, description="comma list; multiplies the series")
    trainers: str | None = Field(
        None,
        description="comma list of methods; the settings of each from METHOD.yml beside --configs",
    )
    stages: str | None = Field(
        None, description="of pretrain,prune,finetune (default: the exp_mode of --configs)"
    )
    pretrain_configs: Path | None = Field(
        None, description="file of the pretrain stage (default: pretrain.yml beside --configs)"
    )
    finetune_configs: Path | None = Field(
        None, description="file of the finetune stage (default: finetune.yml beside --configs)"
    )
    profile: Path | None = Field(
        None, description="the cluster's facts (default: slurm/profiles/local.yml)"
    )
    parallelism: int | None = Field(
        None, description="runs at once, under SLURM of each stage (default: the profile's)"
    )
    runs_per_task: int | None = Field(
        None, description="SLURM: runs of one array task (default: the profile's)"
    )
    runs_at_once: int | None = Field(
        None,
        description="runs that share the CPUs and GPU of one array task, or of this machine "
        "(default: the profile's)",
    )
    wait: bool = Field(True, description="stay and show the progress")
    dry_run: bool = Field(
        False, description="check all, show the runs, scripts and cost, and submit nothing"
    )
    fail_fast: bool = Field(False, description="cancel all runs when one has failed")
    snapshot: bool = Field(
        True, description="SLURM: queued tasks run a copy of the code as it is now"
    )


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    stage: Mode
    trainer: str  # of the pruning method, in finetune runs too
    config: RunConfig
    needs: tuple[str, ...]  # run IDs
    swept: dict[str, str] = field(default_factory=dict)  # settings beside the axes that vary

    @cached_property
    def run_id(self) -> str:
        return self.config.run_id


@dataclass
class Plan:
    """The runs, each after those that it needs, and lines for the user."""

    runs: list[PlannedRun]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The sweep folder, RESULT_DIR/EXP_NAME."""
        config = self.runs[0].config
        return config.result_dir / config.exp_name


def parse_series(text: str) -> tuple[Decimal, ...]:
    """The k values of a named series or a comma list, as written.

    Raises UserError for a value that is not a number, outside (0, 1], or given twice.
    """
    values: list[Decimal] = []
    for part in NAMED_SERIES.get(text) or _parts("series", text):
        try:
            k = Decimal(part)
        except InvalidOperation:
            names = ", ".join(NAMED_SERIES)
            raise UserError(f"series: {part!r} is not a number; give {names} or 0.5,0.1") from None
        if not (k.is_finite() and 0 < k <= 1):
            raise UserError(f"series: {part} lies outside (0, 1]; k is the fraction kept")
        if k in values:
            raise UserError(f"series: {part} is given twice")
        values.append(k)
    return tuple(values)


def _parts(name: str, text: str) -> list[str]:
    """A comma list's values. Raises UserError for an empty or repeated one."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part:
            raise UserError(f"{name}: an empty value in {text!r}; give a list such as A,B")
        if parts.count(part) > 1:
            raise UserError(f"{name}: {part} is given twice")
    return parts


def _range(part: Any) -> list[Any]:
    """`1-5` as its numbers; anything else as it is."""
    if not isinstance(part, str) or not (match := re.fullmatch(r"(\d+)-(\d+)", part)):
        return [part]
    first, last = map(int, match.groups())
    if not first <= last < first + 10_000:
        raise UserError(f"seeds: {part} is no range; give the smaller seed first, such as 1-5")
    return [*range(first, last + 1)]


def _parse_stages(text: str) -> list[Mode]:
    stages = _parts("stages", text)
    if unknown := [stage for stage in stages if stage not in STAGES]:
        raise UserError(f"stages: unknown stage {unknown[0]!r}; choose from {','.join(STAGES)}")
    ordered = [stage for stage in STAGES if stage in stages]
    if stages != ordered:
        raise UserError(f"stages: {text} is out of order; give {','.join(ordered)}")
    if ordered == ["pretrain", "finetune"]:
        raise UserError("stages: finetune takes a pruned network; give pretrain,prune,finetune")
    return ordered


def _method(trainer: str, stage: Mode) -> type[Method]:
    try:
        return find(trainer, stage)
    except ValueError as error:
        raise UserError(f"trainer: {error}") from None


def check_same_source(run_id: str, one: Path | None, other: Path | None) -> None:
    """Raise UserError if a run would start from two different networks.

    The RUN_ID in a checkpoint's path identifies it even where the folders were moved.
    """
    parts = len(BEST.parts)
    names = [
        Path(*path.parts[-parts - 1 :]) if path and path.parts[-parts:] == BEST.parts else path
        for path in (one, other)
    ]
    if names[0] != names[1]:
        raise UserError(
            f"source_net: {run_id} would start from {one} and from {other}; "
            "give the second its own --exp-name"
        )


def make_plan(
    flags: dict[str, Any], ranks: int = 1, lists: Mapping[str, list[Any]] | None = None
) -> Plan:
    """Every run of the sweep that `flags` describe, validated; nothing is created.

    `flags` are those given on the command line (`SeriesOptions` and `RunConfig` by field name),
    `ranks` the processes of one run, `lists` the values of settings that vary beside the axes.
    Raises UserError for any value that cannot work.
    """
    options = SeriesOptions(**{k: v for k, v in flags.items() if k in SeriesOptions.model_fields})
    run_flags = {k: v for k, v in flags.items() if k in RunConfig.model_fields}
    run_flags = {key: value for key, value in run_flags.items() if key not in (lists or {})}
    options, grid = _merge(options, Grid({**(lists or {})}))
    return _Planner(options, run_flags, ranks, grid).plan()


def _merge(options: SeriesOptions, grid: Grid) -> tuple[SeriesOptions, Grid]:
    """The options with the axes that a file of --series gives, and all other lists."""
    found = read_series(options.series) if options.series is not None else None
    if found is None:
        check(grid)
        return options, grid
    axes: dict[str, Any] = {"series": None}
    for key, values in found.lists.items():
        if key in AXES:
            if getattr(options, AXES[key]) is not None and key != "k":
                raise UserError(f"{key}: --{AXES[key].replace('_', '-')} gives it too")
            axes[AXES[key]] = ",".join(map(str, values))
        elif key in grid.lists:
            raise UserError(f"{key}: {options.series} gives it too; keep one of the two")
    lists = grid.lists | {k: v for k, v in found.lists.items() if k not in AXES}
    grid = Grid(lists, found.pairs)
    check(grid)
    return options.model_copy(update=axes), grid


class _Planner:
    def __init__(
        self, options: SeriesOptions, run_flags: dict[str, Any], ranks: int, grid: Grid
    ) -> None:
        self.options, self.grid = options, grid
        self.ranks = ranks
        run_flags = expand_paths(run_flags)  # no shell does it in --result-dir=~/runs
        main_file = run_flags.pop("configs", None)
        self.main_file = given_or_shipped(main_file) if main_file else None
        self.flags = run_flags
        self.notes: list[str] = []
        self.runs: dict[str, PlannedRun] = {}
        self.files: dict[tuple[Mode, str], tuple[Path | None, dict[str, Any]]] = {}
        for name in ("resume", "evaluate"):
            if name in run_flags:
                raise UserError(f"{name}: a series starts and resumes its own runs; leave it out")
        for single, plural in AXES.items():
            if getattr(options, plural) is not None and single in {*run_flags, *grid.keys}:
                raise UserError(
                    f"{single}: --{plural.replace('_', '-')} gives it too; keep one of the two"
                )
        if twice := [key for key in grid.keys if key in run_flags]:
            raise UserError(f"{twice[0]}: --series gives it too; keep one of the two")
        self.main = merge({"configs": self.main_file} if self.main_file else {}) | run_flags
        self.stages = self._stages()
        self.budget = self._whole_budget()
        self.axes = self._axes()
        self._check_sources()

    def _whole_budget(self) -> int | None:
        if (written := self.main.get("budget")) is None:
            return None
        try:
            return int(written)
        except ValueError:
            raise UserError(f"budget: must be a whole number, not {written!r}") from None

    def _stages(self) -> list[Mode]:
        own_mode = self.main.get("exp_mode")
        if self.options.stages is None:
            if own_mode is None:
                raise UserError("stages: missing; give --stages, or exp_mode in the --configs file")
            return _parse_stages(str(own_mode))
        stages = _parse_stages(self.options.stages)
        own_stage = "prune" if "prune" in stages else stages[0]
        if "exp_mode" in self.flags and stages != [self.flags["exp_mode"]]:
            raise UserError("exp_mode: --stages gives it too; keep one of the two")
        if own_mode is not None and own_mode != own_stage:
            raise UserError(
                f"{self.main_file}: exp_mode is {own_mode}, but --configs must name the file of "
                f"stage {own_stage}"
            )
        return stages

    def _axes(self) -> list[dict[str, Any]]:
        """The settings that vary, of every run: k varies fastest."""
        given, grid = self.options, self.grid
        layer_types = given.layer_types or str(self.main.get("layer_type"))
        all_give_k = all(
            k_of_pattern({"layer_type": part}) is not None
            for part in _parts("layer_types", layer_types)
        )
        gives_k = given.series is not None or "k" in grid.keys or all_give_k
        if not gives_k and not grid.keys and self.stages != ["pretrain"]:
            raise UserError("series: missing; give --series unstructured, structured or 0.5,0.1")
        if given.trainers is not None and "prune" not in self.stages:
            raise UserError("trainers: only the prune stage has a choice of trainers")

        def axis(key: str) -> list[Any]:
            listed = getattr(given, AXES[key])
            return [self.main.get(key)] if listed is None else _parts(AXES[key], listed)

        seeds = [self._seed(seed) for part in axis("seed") for seed in _range(part)]
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds: a value is given twice in {given.seeds!r}")
        trainers = axis("trainer")
        if given.trainers is not None:
            trainers = [_method(name, "prune").trainer for name in trainers]
            if len(set(trainers)) < len(trainers):
                raise UserError(f"trainers: a method is given twice in {given.trainers!r}")
        values = {"seed": seeds, "arch": axis("arch"), "layer_type": axis("layer_type")}
        values |= {"trainer": trainers} | grid.lists
        series = [self.main.get("k")] if given.series is None else parse_series(given.series)
        found = [
            dict(zip(values, combination, strict=True)) | {"k": k} | pair
            for *combination, pair, k in itertools.product(
                *values.values(), grid.pairs or [{}], series
            )
        ]
        if given.series is None and "k" not in self.flags:
            for axes in found:  # in place of the file's
                axes["k"] = (None if "k" in grid.keys else k_of_pattern(axes)) or axes["k"]
        return found

    @staticmethod
    def _seed(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return int(value)
        except ValueError:
            raise UserError(f"seeds: {value!r} is not a whole number") from None

    def _check_sources(self) -> None:
        """Raise UserError if runs that need different networks share a --source-net."""
        if "source_net" not in self.main:
            return
        if self.stages[0] == "pretrain":
            reason = "has no effect" if len(self.stages) == 1 else "comes from the pretrain stage"
            raise UserError(f"source_net: {reason}; leave it out or leave out the stage")
        archs, layer_types, series = (
            {str(axes[key]) for axes in self.axes} for key in ("arch", "layer_type", "k")
        )
        if len(archs) > 1:
            raise UserError("source_net: one checkpoint is of one network; give one --archs value")
        if self.stages[0] == "finetune" and len(layer_types) * len(series) > 1:
            raise UserError(
                "source_net: one pruned network has one k and layer type; give --stages "
                "prune,finetune (finished prune runs are not run again)"
            )

    def plan(self) -> Plan:
        settings = [key for key in self.grid.keys if key not in AXES]
        for fixed, runs_of_series in itertools.groupby(
            self.axes, key=lambda axes: {key: axes[key] for key in axes if key != "k"}
        ):
            series = [axes["k"] for axes in runs_of_series]
            trainer = fixed["trainer"]
            method = _method(trainer or "base", "prune") if "prune" in self.stages else None
            if in_rounds := method is not None and method.in_rounds:
                series.sort(reverse=True)
            before: PlannedRun | None = None  # the round before
            for number, k in enumerate(series):
                axes = {key: fixed[key] for key in ("seed", "arch", *settings)}
                source = dense = self._add("pretrain", trainer, axes) if self.makes_dense else None
                axes |= {"layer_type": fixed["layer_type"], "k": k}
                for stage in self.stages:
                    if stage == "pretrain" or (stage == "finetune" and not self._tunes(method)):
                        continue
                    source = (before if stage == "prune" else None) or source
                    source = self._add(stage, trainer, axes, source, dense, number, len(series))
                    if stage == "prune" and in_rounds:
                        before = source
        runs = sorted(self.runs.values(), key=lambda run: STAGES.index(run.stage))
        for key in settings:
            if not any(key in run.swept for run in runs):
                raise UserError(f"{key}: no effect in any run of this sweep; leave it out")
        return Plan(runs, self.notes, list(self._warnings(runs)))

    @property
    def makes_dense(self) -> bool:
        return "pretrain" in self.stages

    def _tunes(self, method: type[Method] | None) -> bool:
        """Whether its networks are fine-tuned. A method that trains what it keeps spends a budget
        on that."""
        return self.budget is None or method is None or method.needs_finetuning

    def _budget(self, stage: Mode, method: type[Method], number: int, rounds: int) -> int | None:
        """Of one run: fine-tuning shares the pruning's, as rounds do, here round `number` of so
        many, and neither pays for the dense network."""
        if self.budget is None or (stage == "pretrain" and len(self.stages) > 1):
            return None
        if {"prune", "finetune"} <= {*self.stages} and (
            stage == "finetune" or method.needs_finetuning
        ):
            return self.budget // 2
        if not method.in_rounds:
            return self.budget
        if self.budget < rounds:
            raise UserError(
                f"budget: {self.budget} is for all {rounds} rounds of {method.name}; give at least "
                f"{rounds}"
            )
        return self.budget * (number + 1) // rounds - self.budget * number // rounds

    def _add(
        self,
        stage: Mode,
        trainer: str | None,
        axes: dict[str, Any],
        source: PlannedRun | None = None,
        dense: PlannedRun | None = None,
        number: int = 0,
        rounds: int = 1,
    ) -> PlannedRun:
        path, values = self._file(stage, trainer or "base")
        method = _method(values.get("trainer", "base"), stage)
        settings = {*self.grid.keys} - {*AXES}
        axes = {
            name: value for name, value in axes.items()
            if value is not None and (name not in settings or acts_in(method, name))
        }  # fmt: skip
        values = values | axes
        if (budget := self._budget(stage, method, number, rounds)) is not None:
            values["budget"] = budget
        starts_fresh = method.starts_from == "fresh"
        if starts_fresh:
            source = None
            values.pop("source_net", None)
        if source is not None:
            values["source_net"] = source.config.run_folder / BEST
        if dense is not None:
            values = method.from_dense(values, dense.config)
        config = build_config(values, str(path or ""), {*self.flags, *axes})
        if source is None:
            if not starts_fresh and config.source_net is None:
                before = STAGES[: STAGES.index(stage)]
                raise UserError(
                    f"source_net: missing; give --source-net PATH, or --stages "
                    f"{','.join([*before, *self.stages])} to make it"
                )
            check_inputs(config)
        elif config.dataset != source.config.dataset:
            raise UserError(
                f"{path}: dataset is {config.dataset}, but stage {source.stage} trains on "
                f"{source.config.dataset}"
            )
        config.batch_per_rank(self.ranks)
        pruned_by = config.trainer if source is None or stage != "finetune" else source.trainer
        needs = (source.run_id,) if source else ()
        plain = config.to_plain()
        acting = [key for key in self.grid.keys if key in settings & {*axes} - {*config.idle()}]
        swept = {key: str(plain.get(key)) for key in acting}
        run = PlannedRun(stage, pruned_by, config, needs, swept)
        known = self.runs.setdefault(run.run_id, run)
        check_same_source(run.run_id, known.config.source_net, config.source_net)
        return known

    def _file(self, stage: Mode, trainer: str) -> tuple[Path | None, dict[str, Any]]:
        """The stage's settings: its file, overridden by the flags that act in it."""
        key = (stage, trainer if stage == "prune" else "")
        if key not in self.files:
            path = self._path(stage, trainer)
            values = merge({"configs": path} if path else {})
            if values.get("exp_mode", stage) != stage:
                raise UserError(f"{path}: exp_mode is {values['exp_mode']}, not {stage}")
            if stage == "prune" and self.options.trainers is not None:
                values["trainer"] = trainer
            # The published files name an experiment per stage; a sweep has one name and folder.
            for name in ("exp_name", "result_dir"):
                if name in self.main:
                    values[name] = self.main[name]
            values |= self._acting(stage, values)
            values["exp_mode"] = stage
            values = with_source_facts(values)
            # Tasks may start in another folder than this command.
            for name in ("result_dir", "data_dir", *input_files()):
                default = RunConfig.model_fields[name].default
                folder = values.get(name, default)
                if folder not in (None, "") and not str(folder).startswith(LIBRARIES):
                    values[name] = Path(folder).absolute()
            self.files[key] = path, values
        return self.files[key]

    def _path(self, stage: Mode, trainer: str) -> Path | None:
        main_stage = "prune" if "prune" in self.stages else self.stages[0]
        if stage == main_stage:
            if self.options.trainers is None or self.main_file is None:
                return self.main_file
            path = self.main_file
            sibling = path.with_name(f"{_method(trainer, 'prune').name}.yml")
            if self.main.get("trainer", "base") != trainer and sibling.is_file():
                path = sibling
            self.notes.append(f"{_method(trainer, 'prune').name}: settings from {path}")
            return path
        named: Path | None = getattr(self.options, f"{stage}_configs")
        if named is not None:
            return given_or_shipped(named)
        if self.main_file is None:
            raise UserError(f"{stage}_configs: missing; give --{stage}-configs FILE")
        path = self.main_file.with_name(f"{stage}.yml")
        if not path.is_file():
            raise UserError(f"{stage}_configs: no such file: {path}; give --{stage}-configs FILE")
        return path

    def _acting(self, stage: Mode, values: dict[str, Any]) -> dict[str, Any]:
        trainer = "base"
        if stage == "prune":
            trainer = self.flags.get("trainer", values.get("trainer", "base"))
        method = _method(trainer, stage)
        # A sweep over --mask-lr shares its dense network.
        dropped = {name for name in self.flags if not acts_in(method, name)} | {"budget"}
        if not method.has_mask:
            dropped |= {"k"}  # all k share one dense network
        if stage != "prune":
            dropped |= {"trainer"}
        if stage != self.stages[0]:
            dropped |= {"source_net"}
        return {name: value for name, value in self.flags.items() if name not in dropped}

    def _warnings(self, runs: list[PlannedRun]) -> Iterable[str]:
        if self.stages == ["pretrain"] and self.options.series is not None:
            yield "series: no effect, as only a dense network is trained"
        for stage in ("pretrain", "finetune"):
            name = f"{stage}_configs"
            if getattr(self.options, name) is not None and (
                stage not in self.stages or self.stages == [stage]
            ):
                yield f"{name}: no effect; the file of the only other stages is --configs"
        methods = {run.config.method for run in runs}
        for name in self.flags:
            if not any(acts_in(method, name) for method in methods):
                yield f"{name}: no effect in any stage of this sweep"
        if self.flags.get("scale_rand_init") and "prune" in self.stages:
            yield "scale_rand_init: all k share one dense network, which is scaled for its own k"
        seen = {f"{run.stage}: {line}" for run in runs for line in run.config.warnings()}
        yield from sorted(seen)
        if "prune" in self.stages and "finetune" not in self.stages:
            smallest = min(run.config.k for run in runs if run.stage == "prune")
            if smallest < Decimal("0.01"):
                yield (
                    f"series: k = {smallest} keeps under 1%; the published advice is to fine-tune "
                    "there: add finetune to --stages"
                )
