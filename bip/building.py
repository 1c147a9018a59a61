"""What a run trains: the network and its pruned state, as its method starts them."""

import torch
from torch import nn

from bip import models
from bip.config import RunConfig
from bip.data.batches import Data
from bip.data.options import DataOptions
from bip.distributed.group import Group
from bip.identity import check_source
from bip.pruning.layout import find_followers, find_prunable
from bip.pruning.scores import among_kept, initialise_scores
from bip.pruning.state import PrunedParameters
from bip.training import sources
from bip.training.checkpoint import State, layer_masks, read_checkpoint, restore_model


def build_network(
    config: RunConfig, data: Data, group: Group, source: State | None
) -> tuple[nn.Module, State | None]:
    """The network with the source's weights, on the device, and the source as it fits to it.

    Raises UserError if the images, the batch or the source do not fit to the network.
    """
    torch.manual_seed(config.seed)
    network = models.build(config.arch, DataOptions.of(config).classes, data.channels)
    models.check_image_size(network, config.arch, data.channels, data.image_dim)
    if config.trains_on_one_image(group.world):
        models.check_batch_of_one(network, config.arch, data.channels, data.image_dim)
    if config.scale_rand_init and "scale_rand_init" not in config.idle():
        models.scale_initial_weights(network, float(config.k))
    if source is not None:
        source = sources.fit(source, network, str(config.source_net), config.reset_head)
        restore_model(network, None, source, str(config.source_net))
    if config.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if group.device.type == "cuda":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.to(group.device), source


def build_pruned(
    config: RunConfig, network: nn.Module, data: Data, group: Group, source: State | None
) -> PrunedParameters | None:
    """θ, scores and mask as the method starts them; None for a dense network.

    Every rank calls it with equal weights. Raises UserError if the source does not fit.
    """
    method = config.method
    if not method.has_mask:
        return None
    assert config.layer_type != "dense", "RunConfig refuses it"
    takes_mask = method.starts_from == "pruned" or config.evaluate
    stem = (
        source is not None
        and takes_mask
        and config.layer_type == "channel"
        and sources.prunes_stem(source, network)
    )
    layout = find_prunable(network, config.layer_type, stem)
    pruned = PrunedParameters(
        network, layout, config.k, config.ranking_scope, group,
        balanced=config.ranking == "balanced" and config.ranking_scope == "global",
    )  # fmt: skip
    sample = torch.zeros(2, data.channels, data.image_dim, data.image_dim, device=group.device)
    pruned.followers = find_followers(network, layout, sample)
    if not takes_mask:
        _draw_mask(config, pruned, group, source)
        _rewind(config, network, pruned, group)
        pruned.write_z()
    elif source is not None:
        restore_model(network, pruned, source, str(config.source_net))
        pruned.write_followers()
    return pruned


def _draw_mask(
    config: RunConfig, pruned: PrunedParameters, group: Group, source: State | None
) -> None:
    """The first scores and their mask, within the source's mask if it has one."""
    # Drawn on the CPU, so that the scores do not depend on the device.
    scores = torch.empty(pruned.layout.size)
    torch.manual_seed(config.seed + 1)
    initialise_scores(
        scores, pruned.weights.detach().cpu(), pruned.layout,
        config.method.score_init or config.score_init, config.score_gain,
    )  # fmt: skip
    if source is not None and (masks := layer_masks(source)):
        before = torch.cat([masks[t.name].flatten() for t in pruned.layout.tensors])
        scores = among_kept(scores, before)
    with torch.no_grad():
        pruned.scores.copy_(scores)
    group.broadcast_(pruned.scores.data)
    pruned.update_mask()


def _rewind(config: RunConfig, network: nn.Module, pruned: PrunedParameters, group: Group) -> None:
    """Weights, biases and batch-norm go back to a checkpoint, under the mask as it is."""
    path = config.method.rewinds_to(config)
    if path is None:
        return
    state = group.ask_first(lambda: read_checkpoint(path))
    check_source(config, state, "rewind_net")
    restore_model(network, None, state, str(path))
    with torch.no_grad():
        for view, z in zip(pruned.views(pruned.weights), pruned.z, strict=True):
            view.copy_(z)
