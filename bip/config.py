"""One run's configuration: a YAML file and flags become a frozen `RunConfig`.

A field is the only place that knows a setting (`bip.settings`). Those of single methods stand in
their files, below `bip/methods/`.
"""

import hashlib
import inspect
import json
import math
import os
import re
import unicodedata
from collections.abc import Container
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from bip import trackers
from bip.checkpoint_path import BEST, LIBRARIES, NEWEST, checkpoint_of, k_in_name
from bip.cli import nearest, one_line, parse_flags
from bip.data import loaders, sets
from bip.errors import UserError
from bip.machine import expanded
from bip.methods import acts_in, find, methods, own_settings, spellings
from bip.methods.base import Method, Mode
from bip.pruning.choices import PATTERNS, LayerType, Scope, ScoreInit
from bip.settings import (
    DATA,
    NETWORK,
    OPTIMIZATION,
    PRUNING,
    REPORTS,
    RUN,
    SPEED,
    Fraction,
    InputFile,
    MethodSettings,
    Positive,
    Rate,
    Schedule,
    Setting,
    is_true,
    setting,
)
from bip.shipped import given_or_shipped
from bip.yaml_file import read_yaml, refuse_leading_zeros

# The published names that torchvision has weights for (`bip.models.resnet_imagenet`).
_OF_TORCHVISION = ("ResNet18", "ResNet34", "ResNet50")
_LONGEST_NAME = 255  # bytes, of a file or folder on every file system in use


def _networks() -> list[str]:
    from bip import models  # imports torch, so only --help lists them

    return [*models.names(), *models.OTHERS]


def _unless_global_groups(config: "RunConfig") -> str | None:
    groups = config.layer_type != "unstructured" and config.ranking_scope == "global"
    return None if groups else "it is for --scope global on filters or channels"


def _unless_pattern(config: "RunConfig") -> str | None:
    of = config.layer_type
    return f"{of} ranks within each group" if of in PATTERNS else None


def _unless_budgeted(config: "RunConfig") -> str | None:
    return "--budget gives the length" if config.budget is not None else None


def _unless_scaled(config: "RunConfig") -> str | None:
    scales = config.method.has_mask or config.scale_rand_init
    return None if scales else "the network is dense"


def _unless_drawn(config: "RunConfig") -> str | None:
    return "--scaled-score-init sets the scores" if config.scaled_score_init else None


def _unless_warm(config: "RunConfig") -> str | None:
    return None if config.warmup_epochs else "--warmup-epochs is 0"


def _unless_constant(config: "RunConfig") -> str | None:
    linear = "--warmup linear starts near 0" if config.warmup == "linear" else None
    return _unless_warm(config) or linear


def _unless_trained(config: "RunConfig") -> str | None:
    return "--freeze-bn trains no batch-norm" if config.freeze_bn else None


def _unless_steps(config: "RunConfig") -> str | None:
    schedules = [name for name in of_type(Schedule) if acts_in(config.method, name)]
    steps = "step" in [getattr(config, name) for name in schedules]
    return None if steps else "no schedule is step"


def _unless_later_stage(config: "RunConfig") -> str | None:
    return "pretrain is the first stage" if config.exp_mode == "pretrain" else None


def _unless_adam(config: "RunConfig") -> str | None:
    return "adam has none" if config.optimizer == "adam" else None


Class = TypeVar("Class", bound=BaseModel)


def _with_settings_of_methods(own: type[Class]) -> type[Class]:
    """The class with the fields of every method's settings after its own."""
    found = sorted({m.settings for m in methods().values()}, key=lambda c: c.__name__)
    classes = {c for settings in found for c in settings.__mro__ if issubclass(c, MethodSettings)}
    declared = [name for c in (own, *classes) for name in inspect.get_annotations(c)]
    twice = {name for name in declared if declared.count(name) > 1}
    assert not twice, f"settings that are declared twice: {twice}"
    # What inherits from another comes before it, as Python wants its bases.
    found.sort(key=lambda settings: -len(settings.__mro__))
    bases: Any = (*found, own)
    made: type[Class] = create_model(own.__name__, __base__=bases, __module__=own.__module__)
    return made


@_with_settings_of_methods
class RunConfig(BaseModel):
    """Everything that defines one run. Names are the published flags.

    `lr2` (alias `inv_gamma`) is 1/gamma, so 1e-4 means gamma = 1e4.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    configs: Path | None = setting(
        RUN, None, "YAML file of settings; flags override it", numbers=False
    )
    exp_name: str = setting(
        RUN, ..., "folder of this run or sweep below result_dir", numbers=False, min_length=1
    )
    exp_mode: Mode = setting(RUN, ..., "pretrain, prune or finetune")
    result_dir: Path = setting(RUN, Path("trained_models"), "folder of all results", numbers=False)
    seed: int = setting(RUN, 1234, "seed of all random numbers", ge=0, lt=2**63)
    resume: InputFile | None = setting(RUN, None, "checkpoint to resume from", numbers=False)
    source_net: InputFile | None = setting(
        RUN, None,
        "checkpoint or run folder to prune or fine-tune, or torchvision:WEIGHTS, timm:TAG",
        numbers=False,
    )  # fmt: skip
    source_key: str | None = setting(
        RUN, None, "where the source's state_dict is, such as model_ema, or its entries' prefix",
        before=None, min_length=1,
    )  # fmt: skip
    skip_objects: bool = setting(
        RUN, False,
        "of a source that holds more than tensors and plain types (a Namespace, arrays): leave "
        "these objects out; no code of the file runs",
        numbers=False, before=False,
    )  # fmt: skip
    pretrained: bool = setting(
        RUN, False, "start from the weights that torchvision or timm has for --arch",
        numbers=False, before=False,
    )  # fmt: skip
    reset_head: bool = setting(
        RUN, False, "the last layer starts with fresh weights, for other classes", before=False
    )
    evaluate: bool = setting(RUN, False, "only evaluate --source-net or --resume", numbers=False)

    arch: str = setting(NETWORK, ..., "network", choices=_networks)
    num_classes: int | None = setting(
        NETWORK, None, "output classes (default: the data set's)", ge=1
    )
    freeze_bn: bool = setting(NETWORK, False, "freeze batch-norm affine and running statistics")
    sync_bn: bool = setting(NETWORK, False, "batch-norm statistics over all ranks")
    scale_rand_init: bool = setting(
        NETWORK, False, "scale initial weights for the keep ratio k (pretrain)",
    )  # fmt: skip

    trainer: str = setting(
        PRUNING, "base",
        "method; published names: base (dense, hydra or finetune, by exp_mode), bilevel (bip)",
        choices=spellings,
    )  # fmt: skip
    layer_type: Literal["dense", LayerType] = setting(
        PRUNING, "dense", "what is pruned; 2:4 keeps 2 of each 4 inputs, so it gives k too"
    )
    scope: Scope | None = setting(
        PRUNING, None,
        "one ranking over the network, k per layer, or more of small layers by Erdos-Renyi-Kernel "
        "(default global, RigL erk, structured layer)",
        idle=_unless_pattern,
    )  # fmt: skip
    ranking: Literal["balanced", "plain"] = setting(
        PRUNING, "balanced",
        "global ranking of filters or channels: by size, each layer keeps one; or plain norms",
        idle=_unless_global_groups, before="plain",
    )  # fmt: skip
    k: Fraction = setting(PRUNING, Decimal("1.0"), "keep ratio, in (0, 1]", idle=_unless_scaled)
    scaled_score_init: bool = setting(PRUNING, False, "scores start as the weights")
    scores_init_type: ScoreInit | None = setting(
        PRUNING, None, "initialisation of the scores (default kaiming_uniform)",
        idle=_unless_drawn,
    )  # fmt: skip
    dead_filters: Literal["scaled", "full"] = setting(
        PRUNING, "scaled",
        "score gradient of wholly pruned filters: scaled to the others', or full as published",
        before="full",
    )  # fmt: skip
    score_gain: Literal["published", "torch"] = setting(
        PRUNING, "published", "deviation of drawn scores: the published code's, or torch's layers'",
        idle=_unless_drawn, before="torch",
    )  # fmt: skip
    recalibrate_bn: int = setting(
        PRUNING, 0, "training batches to re-estimate batch-norm statistics for the final mask",
        ge=0,
    )  # fmt: skip
    rewind_epoch: int | None = setting(
        PRUNING, None, "pretrain: keep the network as it is after this epoch, for --rewind weights",
        numbers=False, ge=0,
    )  # fmt: skip

    dataset: str = setting(DATA, ..., "data set", choices=sets.names)
    data_dir: Path = setting(DATA, Path("data"), "folder of the data set", numbers=False)
    batch_size: Positive = setting(DATA, 128, "images of a training step over all ranks")
    test_batch_size: Positive = setting(
        DATA, 128, "images of an evaluation batch over all ranks", numbers=False
    )
    num_workers: int = setting(DATA, 2, "data workers per rank", numbers=False, ge=0)
    loader: str = setting(DATA, "auto", "data loader", numbers=False, choices=loaders.names)
    stage_to: Path | None = setting(
        DATA, None, "folder on the node's own disk to copy LMDB stores to", numbers=False
    )
    skip_bad: bool = setting(
        DATA, False, "replace training images that cannot be read, instead of stopping"
    )
    normalize: bool = setting(DATA, False, "normalise by the data set's mean and deviation")
    image_dim: int | None = setting(DATA, None, "image side in pixels", ge=1)
    stage_order: Literal["own", "replayed"] = setting(
        DATA, "own", "order and crops of pruning and fine-tuning: own, or those of pretraining",
        idle=_unless_later_stage, before="replayed",
    )  # fmt: skip
    holdout: int = setting(DATA, 0, "training images held out to choose the best epoch", ge=0)
    data_fraction: float = setting(
        DATA, 1.0, "accepted from published files", numbers=False, gt=0, le=1
    )

    epochs: Positive = setting(
        OPTIMIZATION, 100, "epochs, those of warm-up among them", idle=_unless_budgeted
    )
    budget: int | None = setting(
        OPTIMIZATION, None,
        "train for so many forward-backwards, what is scored at the start included",
        ge=1, before=None,
    )  # fmt: skip
    max_steps: int | None = setting(
        OPTIMIZATION, None, "stop after this many steps; schedules end there too", ge=1
    )
    optimizer: Literal["sgd", "adam", "rmsprop"] = setting(
        OPTIMIZATION, "sgd", "optimizer of both levels"
    )
    lr: Rate = setting(OPTIMIZATION, 0.1, "learning rate (of the scores in HYDRA)")
    lr_schedule: Schedule = setting(OPTIMIZATION, "cosine", "schedule of lr")
    step_drops: str = setting(
        OPTIMIZATION, "0.75,0.9",
        "parts of training from which a step schedule divides the rate by ten (what the published "
        "code really ran: 0.5,0.75)",
        idle=_unless_steps, before="0.75,0.9",
    )  # fmt: skip
    wd: Rate = setting(OPTIMIZATION, 5e-4, "weight decay")
    bn_wd: bool = setting(
        OPTIMIZATION, True, "weight decay on batch-norm affine", idle=_unless_trained
    )
    momentum: float = setting(
        OPTIMIZATION, 0.9, "momentum of sgd and rmsprop", idle=_unless_adam, ge=0, lt=1
    )
    warmup_epochs: int = setting(OPTIMIZATION, 0, "epochs of warm-up", ge=0)
    warmup: Literal["constant", "linear"] = setting(
        OPTIMIZATION, "constant", "warm up at warmup_lr, or linearly up to lr", idle=_unless_warm
    )
    warmup_lr: Rate = setting(
        OPTIMIZATION, 0.1, "learning rate of a constant warm-up", idle=_unless_constant
    )
    label_smoothing: float = setting(OPTIMIZATION, 0.0, "label smoothing in training", ge=0, lt=1)
    accumulate: Positive = setting(
        OPTIMIZATION, 1, "micro-batches per step on each rank (gradient accumulation)"
    )

    precision: Literal["fp32", "bf16"] = setting(SPEED, "fp32", "arithmetic; bf16 is by autocast")
    compile: bool = setting(SPEED, False, "torch.compile the network")
    deterministic: bool = setting(SPEED, False, "only deterministic GPU kernels")
    check_ranks: int = setting(
        SPEED, 0, "steps between comparisons of all ranks' state; 0: none", numbers=False, ge=0
    )
    rank_timeout: float = setting(
        SPEED, 120.0,
        "seconds without an answer from a rank after which the run fails; without progress it "
        "fails after ten times that, at least 10 minutes",
        numbers=False, ge=1, le=86_400, allow_inf_nan=False,
    )  # fmt: skip

    print_freq: Positive = setting(REPORTS, 10, "steps between log lines", numbers=False)
    eval_every: Positive = setting(REPORTS, 1, "epochs between evaluations")
    checkpoint_minutes: float = setting(
        REPORTS, 10.0, "minutes between checkpoints", numbers=False, gt=0, allow_inf_nan=False
    )
    tracker: str | None = setting(
        REPORTS, None, "also send metrics to these: a comma list", numbers=False,
        choices=trackers.names,
    )  # fmt: skip
    save_dense: bool = setting(
        REPORTS, False, "also save the masked weights as a plain network", numbers=False
    )
    val_method: Literal["base"] = setting(
        REPORTS, "base", "accepted from published files", numbers=False
    )

    @field_validator("source_net", "resume", "rewind_net", mode="before", check_fields=False)
    @classmethod
    def _empty_is_none(cls, path: Any) -> Any:
        return None if path == "" else path  # as published files have it

    @model_validator(mode="before")
    @classmethod
    def _pretrained_names_a_source(cls, values: Any) -> Any:
        if not is_true(values.get("pretrained")):
            return values
        arch = str(values.get("arch"))
        library = "timm" if arch.startswith("timm/") else "torchvision"
        weights = f"{library}:DEFAULT"
        if not (arch.startswith(("timm/", "torchvision/")) or arch in _OF_TORCHVISION):
            raise ValueError(f"pretrained: no library has weights for {arch}; give --source-net")
        if str(values.get("source_net") or weights) != weights:
            raise ValueError("pretrained: --source-net gives the weights too; keep one of the two")
        return values | {"source_net": weights}

    @model_validator(mode="before")
    @classmethod
    def _name_the_method(cls, values: Any) -> Any:
        """Replace `trainer` by the method's name in RUN_IDs."""
        refuse_leading_zeros(cls, values)
        trainer, mode = values.get("trainer", "base"), values.get("exp_mode")
        dense = values.get("layer_type", "dense") == "dense"
        if mode == "finetune" and dense and trainer in ("base", "finetune"):
            trainer = "transfer"
        if mode not in get_args(Mode):
            return values  # the field exp_mode reports it
        try:
            return values | {"trainer": find(str(trainer), mode).trainer}
        except ValueError as error:
            raise ValueError(f"trainer: {error}") from None

    @model_validator(mode="before")
    @classmethod
    def _pattern_gives_k(cls, values: Any) -> Any:
        if (ratio := k_of_pattern(values)) is None:
            return values
        try:
            agrees = Decimal(str(values.get("k", ratio))) == ratio
        except InvalidOperation:
            return values  # the field k reports it
        if not agrees:
            raise ValueError(
                f"k: layer_type {values['layer_type']} keeps {ratio}, not {values['k']}; "
                "leave k out"
            )
        return values | {"k": ratio}

    @field_validator("tracker")
    @classmethod
    def _trackers_are_known(cls, text: str | None) -> str | None:
        trackers.parse(text)
        return text

    @field_validator("dataset", "loader")
    @classmethod
    def _is_known(cls, value: str, info: ValidationInfo) -> str:
        choices = about(str(info.field_name)).choices
        if choices and value not in (known := list(choices())):
            raise ValueError(f"must be one of {', '.join(known)}{nearest(value, known)}")
        return value

    @field_validator("k")
    @classmethod
    def _k_is_a_ratio(cls, k: Decimal) -> Decimal:
        if not (k.is_finite() and 0 < k <= 1):
            raise ValueError("the keep ratio must lie in (0, 1]")
        if int(k.normalize().as_tuple().exponent) < -12:  # it is part of the run folder's name
            raise ValueError("the keep ratio may have at most 12 decimal places")
        return k

    @field_validator("exp_name")
    @classmethod
    def _exp_name_is_a_folder(cls, name: str) -> str:
        broken = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        if name in (".", "..") or "/" in name or broken:
            raise ValueError("must be a plain folder name, without '/' and control characters")
        if (size := len(os.fsencode(name))) > _LONGEST_NAME:
            raise ValueError(f"has {size} bytes; file systems take at most {_LONGEST_NAME}")
        return name

    @field_validator("step_drops")
    @classmethod
    def _drops_are_fractions(cls, text: str) -> str:
        try:
            drops = [float(part) for part in text.split(",")]
        except ValueError:
            drops = []
        if not drops or drops != sorted({*drops}) or not 0 < drops[0] <= drops[-1] < 1:
            raise ValueError("must be rising fractions between 0 and 1, such as 0.5,0.75")
        return text

    @field_validator("data_fraction")
    @classmethod
    def _all_data(cls, fraction: float) -> float:
        if fraction != 1:
            raise ValueError("training on a fraction of the data is not offered; use 1.0")
        return fraction

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        self.method.check(self)
        if self.method.has_mask and self.layer_type == "dense":
            raise ValueError(
                f"layer_type: dense cannot be used with exp_mode {self.exp_mode}; "
                "give --layer-type unstructured, filter, channel or 2:4"
            )
        if self.exp_mode == "pretrain" and self.layer_type in PATTERNS and not self.evaluate:
            raise ValueError(
                f"layer_type: pretrain trains all weights, not {self.layer_type}; leave "
                "--layer-type out, or to train sparse from scratch give --exp-mode prune --trainer "
                "random (or snip, grasp, synflow)"
            )
        sparse = self.layer_type != "dense" and self.k < 1
        if self.exp_mode == "pretrain" and sparse and not self.evaluate:
            raise ValueError(
                f"layer_type: pretrain trains all weights, but k is {self.k_text}; to train sparse "
                "from scratch give --exp-mode prune --trainer random (or snip, grasp, synflow)"
            )
        if self.reset_head and self.source_net is None and self.resume is None:
            raise ValueError("reset_head: there is no --source-net whose head to leave out")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size: {self.batch_size} does not divide by --accumulate "
                f"{self.accumulate}; nearest: {nearest_multiple(self.batch_size, self.accumulate)}"
            )
        if self.freeze_bn and self.recalibrate_bn:
            raise ValueError(
                f"recalibrate_bn: {self.recalibrate_bn} would re-estimate the statistics that "
                "--freeze-bn keeps; leave one of them out"
            )
        if self.budget is not None:
            if self.max_steps is not None:
                raise ValueError("max_steps: --budget gives the length too; keep one of the two")
            least = self.method.start_cost(self) + self.method.forward_backwards(self)
            if self.budget < least:
                raise ValueError(
                    f"budget: {self.budget} forward-backwards are no iteration of "
                    f"{self.method.name}; give at least {least}"
                )
        if (self.rewind_epoch or 0) > self.epochs and self.budget is None:
            raise ValueError(
                f"rewind_epoch: {self.rewind_epoch} lies after the last of {self.epochs} epochs"
            )
        if self.warmup_epochs >= self.epochs and self.warmup_epochs and self.budget is None:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs} leaves none of the {self.epochs} epochs"
            )
        return self

    @property
    def ranking_scope(self) -> Scope:
        """The scope in force: the method's for unstructured, layer for structured, unless given."""
        if self.layer_type in PATTERNS:
            return "layer"
        usual = self.method.default_scope if self.layer_type == "unstructured" else "layer"
        return self.scope or usual

    @property
    def method(self) -> type[Method]:
        """What trains or prunes in this run."""
        return find(self.trainer, self.exp_mode)

    @property
    def score_init(self) -> ScoreInit | Literal["scaled"]:
        """How the scores start; --scaled-score-init beats --scores-init-type, as published."""
        return "scaled" if self.scaled_score_init else self.scores_init_type or "kaiming_uniform"

    @property
    def drops(self) -> list[float]:
        """The fractions of training at which a step schedule drops."""
        return [float(part) for part in self.step_drops.split(",")]

    @property
    def order_seed(self) -> int:
        """Seed of the data's order and crops, another one in each stage."""
        if self.exp_mode == "pretrain" or self.stage_order == "replayed":
            return self.seed
        digest = hashlib.sha256(f"{self.exp_mode} {self.seed}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def dataset_name(self) -> str:
        """The data set without the published aliases of ImageNet, which named its layout."""
        return sets.canonical(self.dataset)

    @property
    def k_text(self) -> str:
        """k in its shortest decimal form: 0.8000 and 0.8 are the same run."""
        return format(self.k.normalize(), "f")

    def identity(self) -> dict[str, Any]:
        """All settings that change this run's numbers, as plain types."""
        idle = self.idle()
        values = self.model_dump(mode="json") | {"k": self.k_text}
        values["dataset"] = self.dataset_name
        found = {
            name: value
            for name, value in values.items()
            if about(name).numbers and name not in idle and value != about(name).before
        }
        return found | self.method.identity(self) | {"source_run": self.source_run}

    def fingerprint(self) -> str:
        """SHA-256 (hex) of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    @property
    def source_run(self) -> str | None:
        """RUN_ID of the run that wrote `source_net`; None if it does not lie in a run folder."""
        return self.run_of(self.source_net)

    @staticmethod
    def run_of(path: Path | None) -> str | None:
        """RUN_ID of the run that wrote a checkpoint, or the library's name of its weights.

        None if it does not lie in a run folder.
        """
        if path is not None and str(path).startswith(LIBRARIES):
            return str(path)
        if path is None or path.parent.name != "checkpoint":
            return None
        return path.absolute().parent.parent.name

    @property
    def rewind_model(self) -> Path:
        """Where a dense run keeps the network of its `rewind_epoch`."""
        return self.run_folder / "checkpoint" / f"model_rewind-{self.rewind_epoch}.pth.tar"

    @property
    def run_id(self) -> str:
        parts = [re.sub("[/:]", ".", self.arch), self.trainer, self.layer_type.replace(":", ".")]
        return "-".join([*parts, f"k{self.k_text}", f"s{self.seed}", self.fingerprint()[:8]])

    @property
    def run_folder(self) -> Path:
        """RESULT_DIR/EXP_NAME/MODE/RUN_ID, a function of the configuration alone."""
        return self.result_dir / self.exp_name / self.exp_mode / self.run_id

    def idle(self) -> dict[str, str]:
        """The settings without effect in this run, each with the reason."""
        found = {}
        method = self.method
        for name in RunConfig.model_fields:
            if not acts_in(method, name):
                found[name] = f"{method.name} does not use it"
            elif reason := about(name).idle(self):
                found[name] = reason
        return found

    def warnings(self) -> list[str]:
        """A line for each reason why given settings have no effect in this run."""
        lines: dict[str, list[str]] = {}
        for name, reason in sorted(self.idle().items()):
            default = RunConfig.model_fields[name].default
            if name in self.model_fields_set and getattr(self, name) != default:
                lines.setdefault(reason, []).append(name)
        return [
            f"no effect in this run ({why}): {', '.join(names)}" for why, names in lines.items()
        ]

    def batch_per_rank(self, world: int) -> int:
        """Training images of one step on one rank. Raises UserError if it does not divide."""
        parts = world * self.accumulate
        if self.batch_size % parts:
            raise UserError(
                f"batch_size: {self.batch_size} does not divide by {world} ranks x "
                f"{self.accumulate} accumulated micro-batches; nearest that does: "
                f"{nearest_multiple(self.batch_size, parts)}"
            )
        return self.batch_size // world

    def trains_on_one_image(self, world: int) -> bool:
        """Whether batch-norm in training sees single images."""
        alone = self.batch_size // (world * self.accumulate) == 1 and not self.evaluate
        return alone and not self.freeze_bn and not (self.sync_bn and world > 1)

    def to_plain(self) -> dict[str, Any]:
        """All settings as plain types, k as text; None left out."""
        return self.model_dump(mode="json", exclude_none=True) | {"k": self.k_text}

    def to_yaml(self) -> str:
        """The whole configuration, for `load_config` to read back."""
        # libyaml is ten times faster, which matters in a sweep of a thousand runs.
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        return str(yaml.dump(self.to_plain(), Dumper=dumper, sort_keys=False))


def about(name: str) -> Setting:
    """What a field of RunConfig declares."""
    return RunConfig.model_fields[name].json_schema_extra["setting"]  # type: ignore


def of_type(*types: Any) -> list[str]:
    """The settings of these types."""
    return [name for name, field in RunConfig.model_fields.items() if field.annotation in types]


def input_files() -> list[str]:
    """The settings that name a file which the run reads."""
    return of_type(InputFile | None)


def paths() -> list[str]:
    """The settings that are files or folders, which may differ between nodes."""
    return of_type(Path, Path | None, InputFile | None)


def nearest_multiple(value: int, factor: int) -> int:
    """The positive multiple of `factor` closest to `value`."""
    return max(1, math.floor(value / factor + 0.5)) * factor


def k_of_pattern(values: dict[str, Any]) -> Decimal | None:
    """The keep ratio that an n:m layer type among settings gives; None for other layer types."""
    pattern = PATTERNS.get(str(values.get("layer_type")))
    return Decimal(pattern[0]) / pattern[1] if pattern else None


def known_keys() -> list[str]:
    return [*RunConfig.model_fields, "inv_gamma"]


def build_config(values: dict[str, Any], where: str = "", flags: Container[Any] = ()) -> RunConfig:
    """A RunConfig from merged values. Raises UserError, one line, naming the key.

    `where` is the file of the values that are not in `flags`.
    """
    by_flag = "budget" in flags and values.get("budget") is not None
    if by_flag and "epochs" not in flags:  # the flag replaces what the file says
        values = {key: value for key, value in values.items() if key != "epochs"}
    try:
        return RunConfig(**_recorded_before(values) | values)
    except ValidationError as error:
        key = next(iter(error.errors()[0]["loc"]), None)
        raise one_line(error, known_keys(), "" if key in flags else where) from None


def _recorded_before(values: dict[str, Any]) -> dict[str, Any]:
    """What version 0.1 worked by in place of keys that came later, if it recorded `values`.

    Only a record holds every key that always has a value.
    """
    fields = RunConfig.model_fields
    old = [
        name
        for name, field in fields.items()
        if about(name).before is ... and field.default is not None and name not in own_settings()
    ]
    if not values.keys() >= {*old}:
        return {}
    return {name: about(name).before for name in fields if about(name).before not in (..., None)}


def merge(flags: dict[str, Any]) -> dict[str, Any]:
    """The values of the YAML file in `flags["configs"]`, overridden by `flags`."""
    path = flags.get("configs")
    from_file = read_yaml(given_or_shipped(Path(expanded(str(path), "configs")))) if path else {}
    if "inv_gamma" in from_file:
        if "lr2" in from_file:
            raise UserError(f"{path}: lr2 and inv_gamma are the same setting; keep one")
        from_file["lr2"] = from_file.pop("inv_gamma")
    if unknown := [key for key in from_file if key not in RunConfig.model_fields]:
        raise UserError(f"{path}: unknown key {unknown[0]!r}{nearest(unknown[0], known_keys())}")
    if k_of_pattern(flags) is not None:  # the flag replaces the file's k too
        from_file.pop("k", None)
    values = {key: value for key, value in from_file.items() if value is not None} | flags
    return expand_paths(values)


def expand_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The values with ~ and variables in paths replaced, but for the folder of the run's node.

    Raises UserError naming the key of a variable that is not set.
    """
    values = dict(values)
    for name in paths():
        if (value := values.get(name)) is not None and name != "stage_to":
            text = expanded(str(value), name)
            values[name] = Path(text) if isinstance(value, Path) else text
    return values


def check_inputs(config: RunConfig) -> None:
    """The files that the run reads must be given and there. Raises UserError."""
    for name in input_files():
        path = getattr(config, name)
        if path is None or (name == "source_net" and str(path).startswith(LIBRARIES)):
            continue
        if not path.is_file() and name not in config.idle():
            raise UserError(f"{name}: no such file: {path}")
    if config.tracker and not config.evaluate:
        trackers.check_installed(config.tracker)
    needs_source = config.method.starts_from != "fresh" or config.evaluate
    if needs_source and config.source_net is None and config.resume is None:
        if config.evaluate:
            raise UserError("source_net: missing; --evaluate needs --source-net or --resume")
        raise UserError(
            f"source_net: missing; exp_mode {config.exp_mode} starts from a checkpoint: "
            "give --source-net PATH (or --resume PATH)"
        )


def load_config(argv: list[str], prog: str = "python -m bip train") -> RunConfig:
    """The configuration of a command: flags, then the YAML file of --configs, then defaults.

    Raises UserError for an invalid, unknown or missing value or file. Creates nothing.
    """
    flags = parse_flags([RunConfig], argv, prog, "Train, prune or fine-tune one network.")
    values = with_source_facts(merge(flags))
    config = build_config(values, str(flags.get("configs") or ""), flags)
    check_inputs(config)
    return config


def with_source_facts(values: dict[str, Any]) -> dict[str, Any]:
    """The values with files in place of run folders, and k of fine-tuning by its source's name.

    Raises UserError for a folder in which it is not clear which checkpoint is meant.
    """
    values = dict(values)
    for name, within in (("source_net", BEST), ("rewind_net", BEST), ("resume", NEWEST)):
        path = values.get(name)
        if path and not str(path).startswith(LIBRARIES):
            try:
                values[name] = checkpoint_of(Path(path), within)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    source = values.get("source_net")
    named = k_in_name(Path(source)) if source else None
    if values.get("exp_mode") == "finetune" and named is not None:
        values.setdefault("k", named)
    return values
