"""`python -m bip data prepare-imagenet`: steps to get ImageNet; class folders for its val/."""

import os
from pathlib import Path

from bip.data.layouts import find_splits
from bip.data.trees import FolderTree
from bip.errors import UserError

_STEPS = """\
ImageNet (ILSVRC 2012) may not be redistributed; every user downloads it for research use:

1. Either make an account on https://image-net.org, accept the terms and download
   ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB), or join the Kaggle
   competition "imagenet-object-localization-challenge" and download its archive (155 GB).
2. From image-net.org: ILSVRC2012_img_train.tar, whose members are a .tar for each class, is read
   as it is. Unpack the validation images into val/, and beside them their annotations (XML,
   ILSVRC2012_bbox_val_v3.tgz), or put a val.txt with "NAME CLASS" lines there, the class as
   n01440764. The development kit's ILSVRC2012_validation_ground_truth.txt does not help: it numbers
   the classes in an order of its own.
   Kaggle's archive unpacks to ILSVRC/Data/CLS-LOC/ and includes the annotations.
3. python -m bip data build-lmdb SRC OUT  reads a .tar or these folders as they are, also one after
   the other into the same OUT. Give --short-side 400 for stores of about a third of the size.

For programs that want the validation images in class folders:
   python -m bip data prepare-imagenet --src SRC --out OUT
makes OUT/train and OUT/val/CLASS/NAME of links and leaves SRC untouched.
"""


def prepare_imagenet(src: Path | None = None, out: Path | None = None) -> None:
    """Print how to download ImageNet; with --src and --out, arrange its validation images.

    OUT gets train, a link to SRC's training folder, and val/CLASS/NAME, a link for each image.
    SRC is never changed. Existing links are kept.

    Args:
        src: the unpacked download, with val/ and its annotations.
        out: folder to make.

    Raises:
        UserError: only one of the two is given; no labelled validation images in SRC; a file in
            OUT is in the way.
    """
    if src is None and out is None:
        print(_STEPS)
        return
    if src is None or out is None:
        raise UserError("prepare-imagenet: give both --src and --out, or neither for the steps")
    if not src.is_dir():
        raise UserError(f"{src}: is not a folder; unpack the download first")
    splits = find_splits(FolderTree(src))
    if "val" not in splits:
        raise UserError(f"{src}: no val/ with images in it or below")
    links = {
        out / "val" / splits["val"].classes[label] / Path(name).name: src / name
        for name, label in splits["val"].members
    }
    if "train" in splits:
        first, label = splits["train"].members[0]
        folder = first[: first.index(f"train/{splits['train'].classes[label]}/")]
        links[out / "train"] = src / folder / "train"
    made = 0
    try:
        for link, target in links.items():
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink() and os.readlink(link) == str(target.resolve()):
                continue
            link.symlink_to(target.resolve())
            made += 1
    except OSError as error:
        raise UserError(f"{error.filename2 or error.filename}: {error.strerror}") from error
    print(f"{out}: {made} links made, {len(links) - made} there already; {src} is as it was")
