"""Checks, before any run of a sweep starts, of what runs read: networks, images, sources."""

import sys
from collections.abc import Sequence
from typing import Any

from bip.checkpoint_path import LIBRARIES
from bip.config import RunConfig
from bip.data.options import DataOptions


def check_inputs(configs: Sequence[RunConfig], ranks: int) -> dict[str, int]:
    """Check all that the configurations name, for runs of so many ranks; return the parameter count
    of each network.

    Builds networks without memory. Does not look for a source that the sweep itself will make.
    Raises UserError for what would make a run fail at its start.
    """
    networks: dict[object, tuple[RunConfig, int]] = {}
    images: dict[object, list[RunConfig]] = {}
    for config in configs:
        classes = DataOptions.of(config).classes
        shape = (config.dataset, classes, config.image_dim)
        single = config.trains_on_one_image(ranks)
        networks.setdefault((config.arch, *shape, config.layer_type, single), (config, classes))
        images.setdefault((config.dataset, config.data_dir, config.loader, classes), []).append(
            config
        )
    sizes = {one.arch: _check_network(one, classes, ranks) for one, classes in networks.values()}
    _check_sources(configs)
    for alike in images.values():
        _check_images(alike)
    return sizes


def _check_network(config: RunConfig, classes: int, ranks: int) -> int:
    from bip import models
    from bip.pruning.layout import find_prunable

    options = DataOptions.of(config)
    spec = options.spec
    network = models.outline(config.arch, classes, spec.channels)
    if "torchvision" not in sys.modules:
        # A forward on the meta device would import for a second what torchvision imports too.
        # Weights that were never written take no memory when they are read.
        network.to_empty(device="cpu")
    models.check_image_size(network, config.arch, spec.channels, options.side)
    if config.trains_on_one_image(ranks):
        network = models.build(config.arch, classes, spec.channels)
        models.check_batch_of_one(network, config.arch, spec.channels, options.side)
    if config.layer_type != "dense":
        find_prunable(network, config.layer_type)
    return sum(weights.numel() for weights in network.parameters())


def _check_images(configs: Sequence[RunConfig]) -> None:
    """One set of images, opened once: a folder may hold a million."""
    from bip.data.order import Order, holdout_split
    from bip.data.splits import open_splits  # with torch, seconds to import

    one = configs[0]
    train, _ = open_splits(DataOptions.of(one))
    for holdout, batch_size in {(config.holdout, config.batch_size) for config in configs}:
        kept, _ = holdout_split(len(train), holdout)
        Order(len(kept), batch_size, one.seed)


def _check_sources(configs: Sequence[RunConfig]) -> None:
    from bip.identity import check_source
    from bip.training.checkpoint import State, read_checkpoint

    states: dict[object, State] = {}
    for config in configs:
        path, sweep = config.source_net, config.result_dir / config.exp_name
        if path is None or sweep.absolute() in path.absolute().parents:
            continue
        if str(path).startswith(LIBRARIES):
            continue
        if (path, config.source_key) not in states:
            state = read_checkpoint(path, config.source_key, config.skip_objects)
            if "foreign" in state:
                _check_fit(config, state)
            else:
                state = {name: state[name] for name in ("arch", "config")}
            states[path, config.source_key] = state
        check_source(config, states[path, config.source_key])


def _check_fit(config: RunConfig, state: dict[str, Any]) -> None:
    from bip import models
    from bip.training import sources

    options = DataOptions.of(config)
    network = models.outline(config.arch, options.classes, options.spec.channels)
    sources.fit(state, network, str(config.source_net), config.reset_head)
