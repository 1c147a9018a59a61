"""The end of a run: final mask, final accuracy, models and, last, the result."""

import copy
from typing import Any

from bip.identity import machine_facts
from bip.pruning.layout import find_prunable
from bip.training.checkpoint import hash_tensors, restore_model, split_state
from bip.training.evaluate import Accuracy
from bip.training.loop import Loop
from bip.training.macs import costs


def finish(loop: Loop) -> dict[str, Any]:
    """Finalise the trained network, write its models and its result, and return the result."""
    progress, folder = loop.progress, loop.folder
    network, pruned = loop.network, loop.pruned
    follow = pruned is not None and pruned.followers
    # Kept in the final checkpoint, as an attempt that starts there cannot measure it again.
    if follow and loop.config.exp_mode == "prune" and progress.top1_before_bn_mask is None:
        progress.top1_before_bn_mask = loop.evaluate("test").top1
    final = _finalise(loop)
    best = best_state = None
    if progress.best_epoch is not None:
        best_state = folder.read_best()
    if best_state is None:
        progress.best_epoch = None
        folder.save_best(loop.state)
    else:
        final_state = copy.deepcopy(loop.state())
        # On a GPU an epoch that is repeated after a resume may differ from the saved one.
        progress.best_epoch = best_state["progress"]["best_epoch"]
        restore_model(network, pruned, best_state, str(folder.checkpoints.best))
        best = _finalise(loop)
        folder.save_best(loop.state)
        restore_model(network, pruned, final_state, "final model")
    dense = None
    if loop.config.save_dense:
        dense = {"state_dict": network.state_dict(), "arch": loop.config.arch}
    return folder.finish(loop.state, progress.iteration, _result(loop, final, best), dense)


def _finalise(loop: Loop) -> Accuracy:
    """Zero what follows pruned filters, as the mask is final now; return the test accuracy."""
    if loop.pruned is not None:
        loop.pruned.write_followers()
        if loop.config.recalibrate_bn:
            loop.recalibrate(loop.config.recalibrate_bn)
    loop.agree()
    return loop.evaluate("test")


def _result(loop: Loop, final: Accuracy, best: Accuracy | None) -> dict[str, Any]:
    config, pruned, progress = loop.config, loop.pruned, loop.progress
    # The total of a dense network counts what unstructured pruning could prune.
    total = (pruned.layout if pruned else find_prunable(loop.network, "unstructured")).size
    kept = pruned.kept() if pruned else total
    weights, mask = split_state(loop.state())
    result: dict[str, Any] = {
        "k": float(config.k),
        "kept": kept,
        "total": total,
        "sparsity": 1 - kept / total,
        "top1": final.top1,
        "top5": final.top5,
        "best_top1": best.top1 if best else None,
        "best_epoch": progress.best_epoch,
        "epochs": loop.epochs,
        "forward_backwards": loop.forward_backwards,
        "seed": config.seed,
        "arch": config.arch,
        "dataset": config.dataset,
        "trainer": config.trainer,
        "layer_type": config.layer_type,
        "mask_sha256": hash_tensors({"mask": mask}) if mask is not None else None,
        "weights_sha256": hash_tensors(weights),
        "seconds": progress.seconds,
        **costs(loop.network, pruned, (loop.data.channels, *2 * (loop.data.image_dim,))),
        **machine_facts(loop.group.device),
    }
    if pruned is not None:
        result["empty_layers"] = pruned.empty_layers()
    if progress.top1_before_bn_mask is not None:
        result["top1_before_bn_mask"] = progress.top1_before_bn_mask
    return result
