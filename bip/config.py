"""One run's configuration: YAML, then flags, one frozen `RunConfig`; its fingerprint and folder."""

import hashlib
import json
import math
from collections.abc import Container
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bip.cli import one_line, parse_flags
from bip.errors import UserError
from bip.files import may_pass
from bip.shipped import given_or_shipped

Mode = Literal["pretrain", "prune", "finetune"]
LayerType = Literal["dense", "unstructured", "filter", "channel"]
Schedule = Literal["cosine", "step"]
ScoreInit = Literal["hydra", "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform"]
DatasetName = Literal[
    "CIFAR10", "CIFAR100", "TinyImageNet", "ImageNet", "ImageNetOrigin", "ImageNetLMDB", "Digits"
]


def _decimal_as_written(value: Any) -> Any:
    """k keeps its decimal digits: 0.8 is eight tenths, not the nearest binary float."""
    try:
        return Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a decimal number such as 0.05") from None


Fraction = Annotated[Decimal, BeforeValidator(_decimal_as_written)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RunConfig(BaseModel):
    """Everything that defines one run. Names are the published flags.

    `lr2` (alias `inv_gamma`) is 1/gamma, so 1e-4 means gamma = 1e4.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, populate_by_name=True
    )

    # Paths, speed and reporting: free to differ between two attempts of one run.
    UNFINGERPRINTED: ClassVar[set[str]] = {
        *("configs", "exp_name", "result_dir", "resume", "source_net", "evaluate", "data_dir"),
        *("num_workers", "loader", "stage_to", "print_freq", "checkpoint_minutes", "save_dense"),
        *("val_method", "data_fraction", "test_batch_size", "check_ranks", "rank_timeout"),
    }

    # What is run, and where it is written
    configs: Path | None = Field(None, description="YAML file of settings; flags beat it")
    exp_name: str = Field(min_length=1, description="name of the experiment, a folder name")
    exp_mode: Mode = Field(description="pretrain, prune or finetune")
    result_dir: Path = Field(Path("trained_models"), description="folder of all experiments")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of everything random")
    resume: Path | None = Field(None, description="checkpoint to go on from")
    source_net: Path | None = Field(None, description="checkpoint to prune or fine-tune")
    evaluate: bool = Field(False, description="only evaluate --source-net or --resume")

    # The network
    arch: str = Field(description="network name, or torchvision/NAME")
    num_classes: int | None = Field(None, ge=1, description="output classes (of the data set)")
    freeze_bn: bool = Field(False, description="freeze batch-norm affine and running statistics")
    sync_bn: bool = Field(False, description="batch statistics over all ranks")
    scale_rand_init: bool = Field(
        False, description="scale a fresh network's weights by the keep ratio k (pretrain)"
    )

    # Pruning
    trainer: Literal["base", "bilevel"] = Field(
        "base", description="base: plain training, or HYDRA when pruning; bilevel: BiP"
    )
    layer_type: LayerType = Field("dense", description="what is pruned")
    scope: Literal["global", "layer"] | None = Field(
        None, description="one ranking over the network, or k per layer (structured: layer)"
    )
    k: Fraction = Field(Decimal("1.0"), description="keep ratio, in (0, 1]")
    scaled_score_init: bool = Field(False, description="scores start as the weights")
    scores_init_type: ScoreInit | None = Field(
        None, description="other score initialisations (default kaiming_uniform)"
    )
    lr2: Rate = Field(
        1e-4,
        validation_alias=AliasChoices("lr2", "inv_gamma"),
        description="1/gamma, the weight of the implicit gradient",
    )
    accelerate: bool = Field(False, description="BiP without the implicit term, upper step first")
    lower_steps: Positive = Field(1, description="lower steps per upper step")
    recalibrate_bn: int = Field(
        0, ge=0, description="training batches that re-estimate batch-norm under the final mask"
    )

    # Data
    dataset: DatasetName = Field(description="data set")
    data_dir: Path = Field(Path("data"), description="folder of the data set")
    batch_size: Positive = Field(128, description="global batch, divided among the ranks")
    test_batch_size: Positive = Field(128, description="global batch of evaluation")
    num_workers: int = Field(2, ge=0, description="data workers per rank")
    loader: Literal["auto", "memory", "lmdb", "folder", "dali"] = Field(
        "auto", description="data loader"
    )
    stage_to: Path | None = Field(
        None, description="local folder that LMDB stores are copied to, once per node"
    )
    skip_bad: bool = Field(
        False, description="replace training images that cannot be read, instead of stopping"
    )
    normalize: bool = Field(False, description="normalise by the data set's mean and deviation")
    image_dim: int | None = Field(None, ge=1, description="image side in pixels")
    holdout: int = Field(0, ge=0, description="training images held out to choose the best epoch")

    # Optimization
    epochs: Positive = Field(100, description="epochs")
    max_steps: int | None = Field(
        None, ge=1, description="train for so many steps, the schedules too"
    )
    optimizer: Literal["sgd", "adam", "rmsprop"] = Field("sgd", description="both levels'")
    lr: Rate = Field(0.1, description="learning rate (of the scores in HYDRA)")
    lr_schedule: Schedule = Field("cosine", description="schedule of lr")
    wd: Rate = Field(5e-4, description="weight decay")
    bn_wd: bool = Field(True, description="weight decay on batch-norm affine")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and rmsprop")
    mask_lr: Rate = Field(0.1, description="learning rate of BiP's scores")
    mask_lr_schedule: Schedule = Field("cosine", description="schedule of mask_lr")
    mask_wd: Rate | None = Field(None, description="weight decay of BiP's scores (default wd)")
    warmup_epochs: int = Field(0, ge=0, description="epochs of warm-up")
    warmup: Literal["constant", "linear"] = Field(
        "constant", description="warm up at warmup_lr, or linearly up to lr"
    )
    warmup_lr: Rate = Field(0.1, description="learning rate of a constant warm-up")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing in training")
    accumulate: Positive = Field(1, description="micro-batches per step on each rank")

    # Speed
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast")
    check_ranks: int = Field(0, ge=0, description="compare all ranks' state every so many steps")
    rank_timeout: float = Field(
        120.0, ge=1, le=86_400, allow_inf_nan=False,
        description="seconds after which a rank that does not answer ends the run; one that "
        "answers but is stuck ends it after ten times that, at least 10 minutes",
    )  # fmt: skip
    compile: bool = Field(False, description="torch.compile the network")
    deterministic: bool = Field(False, description="only deterministic GPU kernels")

    # Reports
    print_freq: Positive = Field(10, description="steps between log lines")
    eval_every: Positive = Field(1, description="epochs between evaluations")
    checkpoint_minutes: float = Field(
        10.0, gt=0, allow_inf_nan=False, description="minutes between checkpoints"
    )
    save_dense: bool = Field(False, description="also save the masked weights as a plain network")
    val_method: Literal["base"] = Field("base", description="accepted from published files")
    data_fraction: float = Field(1.0, gt=0, le=1, description="accepted from published files")

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
        if name in (".", "..") or "/" in name or "\0" in name:
            raise ValueError("must be a plain folder name, without '/'")
        return name

    @field_validator("data_fraction")
    @classmethod
    def _all_data(cls, fraction: float) -> float:
        if fraction != 1:
            raise ValueError("training on a fraction of the data is not offered; use 1.0")
        return fraction

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.exp_mode != "pretrain" and self.layer_type == "dense":
            raise ValueError(
                f"layer_type: dense cannot be used with exp_mode {self.exp_mode}; "
                "give --layer-type unstructured, filter or channel"
            )
        if self.trainer == "bilevel" and self.exp_mode != "prune":
            raise ValueError(
                f"trainer: bilevel prunes, it cannot {self.exp_mode}; give --trainer base"
            )
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
        if self.warmup_epochs >= self.epochs and self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs: {self.warmup_epochs} leaves none of the {self.epochs} epochs"
            )
        return self

    @property
    def ranking_scope(self) -> Literal["global", "layer"]:
        """The scope in force: global for unstructured, layer for structured, unless given."""
        return self.scope or ("global" if self.layer_type == "unstructured" else "layer")

    @property
    def method(self) -> Literal["pretrain", "bip", "hydra", "finetune"]:
        """Which of the four kinds of training step this run takes."""
        if self.exp_mode == "pretrain":
            return "pretrain"
        if self.exp_mode == "finetune":
            return "finetune"
        return "bip" if self.trainer == "bilevel" else "hydra"

    @property
    def score_init(self) -> ScoreInit | Literal["scaled"]:
        """How the scores start; --scaled-score-init beats --scores-init-type, as published."""
        return "scaled" if self.scaled_score_init else self.scores_init_type or "kaiming_uniform"

    @property
    def lower_batches(self) -> int:
        """Lower-level batches that one iteration takes."""
        return self.lower_steps if self.method == "bip" else 1

    @property
    def dataset_name(self) -> str:
        """The data set without the published aliases of ImageNet, which named its layout."""
        return "ImageNet" if self.dataset.startswith("ImageNet") else self.dataset

    @property
    def k_text(self) -> str:
        """k in its shortest decimal form: 0.8000 and 0.8 are the same run."""
        return format(self.k.normalize(), "f")

    def identity(self) -> dict[str, Any]:
        """All settings that change this run's numbers, as plain types."""
        free = self.UNFINGERPRINTED.union(*self._idle().values())
        values = self.model_dump(mode="json") | {"k": self.k_text}
        values["dataset"] = self.dataset_name
        values["mask_wd"] = self.wd if self.mask_wd is None else self.mask_wd
        values = {name: value for name, value in values.items() if name not in free}
        return values | {"source_run": self.source_run}

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what makes the run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    @property
    def source_run(self) -> str | None:
        """RUN_ID of the run that wrote `source_net`; None if it does not lie in a run folder."""
        if self.source_net is None or self.source_net.parent.name != "checkpoint":
            return None
        return self.source_net.absolute().parent.parent.name

    @property
    def run_id(self) -> str:
        parts = [self.arch.replace("/", "."), self.trainer, self.layer_type]
        return "-".join([*parts, f"k{self.k_text}", f"s{self.seed}", self.fingerprint()[:8]])

    @property
    def run_folder(self) -> Path:
        """RESULT_DIR/EXP_NAME/MODE/RUN_ID, a function of the configuration alone."""
        return self.result_dir / self.exp_name / self.exp_mode / self.run_id

    def warnings(self) -> list[str]:
        """One line for each group of options that were given and have no effect in this run."""
        defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
        given = {name for name in self.model_fields_set if getattr(self, name) != defaults[name]}
        lines = []
        for reason, names in self._idle().items():
            if shown := sorted(names & given):
                lines.append(f"no effect in this run ({reason}): {', '.join(shown)}")
        return lines

    def _idle(self) -> dict[str, set[str]]:
        """Settings without effect in this run, by the reason."""
        idle: dict[str, set[str]] = {}
        if self.method != "bip":
            levels = "there is no second level"
            idle[levels] = {"lr2", "mask_lr", "mask_lr_schedule", "mask_wd", "accelerate"}
            idle[levels] |= {"lower_steps"}
        elif self.accelerate:
            idle["--accelerate leaves the implicit term out"] = {"lr2"}
        if self.exp_mode == "pretrain":
            idle["a dense network is trained"] = {"layer_type", "scope", "recalibrate_bn"}
            if not self.scale_rand_init:
                idle["a dense network is trained"] |= {"k"}
        else:
            idle["the weights come from --source-net"] = {"scale_rand_init"}
        if self.exp_mode != "prune":
            idle["scores are not trained"] = {"scaled_score_init", "scores_init_type"}
        elif self.scaled_score_init:
            idle["--scaled-score-init sets the scores"] = {"scores_init_type"}
        if not self.warmup_epochs:
            idle["--warmup-epochs is 0"] = {"warmup", "warmup_lr"}
        elif self.warmup == "linear":
            idle["--warmup linear starts near 0"] = {"warmup_lr"}
        if self.freeze_bn:
            idle["--freeze-bn trains no batch-norm"] = {"bn_wd"}
        if self.optimizer == "adam":
            idle["adam has none"] = {"momentum"}
        return idle

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

    def to_plain(self) -> dict[str, Any]:
        """All settings as plain types, k as text; None left out."""
        return self.model_dump(mode="json", exclude_none=True) | {"k": self.k_text}

    def to_yaml(self) -> str:
        """The whole configuration; `load_config` reads it back to an equal one."""
        # libyaml writes the same ten times faster, which shows in a sweep of a thousand runs.
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        return str(yaml.dump(self.to_plain(), Dumper=dumper, sort_keys=False))


def nearest_multiple(value: int, factor: int) -> int:
    """The positive multiple of `factor` closest to `value`."""
    return max(1, math.floor(value / factor + 0.5)) * factor


class UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"key {twice!r} is written twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, loader: type[yaml.SafeLoader] = UniqueKeyLoader) -> dict[str, Any]:
    """A YAML file's top-level mapping.

    Raises UserError naming the file, OSError if its file system is away.
    """
    try:
        values = yaml.load(path.read_text(), loader)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: must hold 'key: value' lines")
    return values


def known_keys() -> list[str]:
    return [*RunConfig.model_fields, "inv_gamma"]


def build_config(values: dict[str, Any], where: str = "", flags: Container[Any] = ()) -> RunConfig:
    """A RunConfig from merged values. Raises UserError, one line, naming the key.

    `where` is the file that they come from, but for those that are in `flags`.
    """
    try:
        return RunConfig(**values)
    except ValidationError as error:
        key = next(iter(error.errors()[0]["loc"]), None)
        raise one_line(error, known_keys(), "" if key in flags else where) from None


def merge(flags: dict[str, Any]) -> dict[str, Any]:
    """The YAML file that `flags` names in `configs`, beaten by the flags themselves."""
    path = flags.get("configs")
    from_file = read_yaml(given_or_shipped(Path(path))) if path else {}
    if "inv_gamma" in from_file:
        if "lr2" in from_file:
            raise UserError(f"{path}: lr2 and inv_gamma are the same setting; keep one")
        from_file["lr2"] = from_file.pop("inv_gamma")
    if unknown := [key for key in from_file if key not in RunConfig.model_fields]:
        from bip.cli import nearest

        raise UserError(f"{path}: unknown key {unknown[0]!r}{nearest(unknown[0], known_keys())}")
    return {key: value for key, value in from_file.items() if value is not None} | flags


def check_inputs(config: RunConfig) -> None:
    """The files that the run reads must be given and there. Raises UserError."""
    for name in ("source_net", "resume"):
        path = getattr(config, name)
        if path is not None and not path.is_file():
            raise UserError(f"{name}: no such file: {path}")
    needs_source = config.exp_mode != "pretrain" or config.evaluate
    if needs_source and config.source_net is None and config.resume is None:
        if config.evaluate:
            raise UserError("source_net: missing; --evaluate needs --source-net or --resume")
        raise UserError(
            f"source_net: missing; exp_mode {config.exp_mode} starts from a checkpoint: "
            "give --source-net PATH (or --resume PATH)"
        )


def load_config(argv: list[str], prog: str = "python -m bip train") -> RunConfig:
    """Flags beat the YAML file of --configs, which beats the defaults.

    Raises UserError for every invalid, unknown or missing value or file; nothing is created.
    """
    flags = parse_flags([RunConfig], argv, prog, "Train, prune or fine-tune one network.")
    config = build_config(merge(flags), str(flags.get("configs") or ""), flags)
    check_inputs(config)
    return config
