"""The configuration of `bip evaluate CHECKPOINT`: what the file records, overridden by flags."""

from pathlib import Path
from typing import Any

from bip import run
from bip.checkpoint_path import LIBRARIES, k_in_name
from bip.cli import parse_flags
from bip.config import RunConfig, build_config, check_inputs, merge, with_source_facts
from bip.errors import UserError
from bip.exporting.smaller import evaluate_export, recorded_by
from bip.settings import is_true
from bip.training import sources
from bip.training.checkpoint import read_checkpoint
from bip.training.sources import State, recorded_facts

# Recorded settings that are of the run, not of the network and its images. A file may come from
# elsewhere, so it names no folder to write to.
_OF_THE_RUN = {
    "configs", "source_net", "source_key", "resume", "rewind_net", "rewind_epoch", "stage_to",
    "max_steps", "budget", "rewind", "warmup_epochs", "reset_head", "pretrained", "result_dir",
    "exp_name",
}  # fmt: skip

_OF_THE_IMAGES = ("dataset", "image_dim", "num_classes", "normalize")


def evaluate(argv: list[str], prog: str) -> dict[str, Any]:
    """Evaluate what `argv` names; returns top1, top5 and loss. Raises UserError."""
    config = evaluation_config(argv, prog)
    source = config.source_net
    exported = recorded_by(source) if source is not None and source.is_file() else None
    return run.train(config) if exported is None else evaluate_export(config, exported["format"])


def evaluation_config(argv: list[str], prog: str) -> RunConfig:
    """The configuration to evaluate what `argv` names: CHECKPOINT, or --source-net, or --resume.

    Flags override the YAML file of --configs, which overrides the checkpoint. Raises UserError for
    what neither states.
    """
    rest, path = argv, None
    if argv and not argv[0].startswith("-"):
        path, rest = Path(argv[0]), argv[1:]
    prog, about = f"{prog} [CHECKPOINT]", "Test accuracy of a checkpoint or run folder."
    flags = parse_flags([RunConfig], rest, prog, about)
    if path is not None and "source_net" in flags:
        raise UserError("source_net: CHECKPOINT gives it too; keep one of the two")
    given = merge(flags) | {"evaluate": True}
    if path is not None:
        given["source_net"] = path
    given = with_source_facts({"exp_name": "evaluate"} | given)
    source = given.get("source_net")
    recorded: dict[str, Any] = {}
    if str(source).startswith(LIBRARIES):
        recorded = {"exp_mode": "pretrain"}
    elif path is not None and not (source and source.is_file()):
        raise UserError(f"{path}: no such file; give a checkpoint or a run folder")
    elif source and source.is_file() and (exported := recorded_by(source)) is not None:
        recorded = {"arch": exported["format"], "exp_mode": "pretrain"}
        recorded |= _recorded_images(recorded_facts({}, exported))
    elif source and not given.get("resume") and source.is_file():
        state = read_checkpoint(source, given.get("source_key"), is_true(given.get("skip_objects")))
        recorded = _recorded(state, source, given)
    config = build_config(recorded | given, str(source or given.get("resume") or ""), flags)
    check_inputs(config)
    if recorded and "arch" not in given and ":" in config.arch:
        raise UserError(f"arch: {source} names your function; to run it give --arch {config.arch}")
    return config


def _recorded(state: State, path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint records. Raises UserError for a mask of an unknown kind."""
    if "foreign" not in state:
        known = RunConfig.model_fields.keys() - _OF_THE_RUN - given.keys()
        found = {n: v for n, v in state["config"].items() if n in known}
        if "trainer" in found and "exp_mode" in given:
            del found["trainer"]  # it is of the recorded mode
        return found
    facts = state["facts"]
    found = _recorded_images(facts)
    if not sources.all_scores(state) and not sources.has_masks(state):
        return found | {"exp_mode": "pretrain"}  # masked weights evaluate as they are
    if given.get("exp_mode") == "pretrain":
        if k_in_name(path) != 1:
            raise UserError(
                f"exp_mode: {path} has scores or a mask, so it is a pruned network; leave "
                "--exp-mode out (if it was pretrained with k = 1, put k-1.0 in its file name)"
            )
        return found
    found["exp_mode"] = "prune"
    kinds = sources.layer_types(state)
    if len(kinds) > 1 and "layer_type" not in given:
        raise UserError(f"layer_type: {path} does not record it; give one of {', '.join(kinds)}")
    found["layer_type"] = given.get("layer_type", kinds[0])
    k = facts.get("k") or k_in_name(path) or sources.k_of_scores(state, found["layer_type"])
    if k is None and "k" not in given:
        raise UserError(f"k: neither {path} nor its name states it; give --k")
    return found | ({"k": str(k)} if k is not None else {})


def _recorded_images(facts: dict[str, Any]) -> dict[str, Any]:
    """Of what a file of another kind records: the network, and the images that it takes."""
    settings = facts.get("config", {})
    found = {name: settings[name] for name in _OF_THE_IMAGES if name in settings}
    return found | {name: facts[name] for name in ("arch", "dataset") if name in facts}
