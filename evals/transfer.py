"""Label transfer: each patch takes the class of the most similar patch of labelled images, without training.

    python -m evals.transfer --weights runs/laptop                # on scenes, whose masks are exact
    python -m evals.transfer --classes 11 --ignore 11 --size 96 \\
        --train pairs:train/images:train/masks --test pairs:test/images:test/masks   # your own: here CamVid

Prints the share of patches that take the right class (of all, and of those that are not in the first class,
often the background) and the mIoU of patches, beside raw pixels and the same network untrained. Writes
transfer.png: the first test images, their true classes, and what each network makes of them.

Patches are compared by the cosine of their tokens, after the final norm; a patch belongs to the class that
covers most of it. It is the retrieval of Balazevic et al. 2023 (Towards in-context scene understanding), with
one neighbour and without interpolation. The labelled images give at most BANK_PATCHES patches, evenly spread.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import config
from config import UserError, Whole, argument
from eval_knn import check_overlap
from evals.dense import (
    DEVICE,
    DenseFeatures,
    add_pair_args,
    class_ious,
    class_names,
    draw_classes,
    print_absent_classes,
    with_baselines,
)
from evals.pairs import Pairs, fill_reading, survey_masks, untrained_classes
from evals.tiles import contact_sheet, image_tile, to_pil
from features import resize_to_patches
from model import describe_backbone
from tools.weights import add_weights_args, open_backbone

SHOWN_IMAGES = 5
BANK_PATCHES = 200_000  # of more, evenly spread ones
ALL_VOID = "no patch of {} has a class, all are void: see --classes and --ignore"
CHUNK = 256  # patches that are compared with the bank at once


def patch_classes(truth, pixels, patch_size, count):
    """truth (h, w) int16 -> (rows, columns): the class that covers most of each patch of pixels (3, H, W).

    -1 where that is void.
    """
    truth = F.interpolate(truth[None, None].float(), pixels.shape[1:], mode="nearest-exact")[0, 0]
    planes = F.one_hot(truth.long() + 1, count + 1).movedim(-1, 0)  # (1 + count, H, W), void first
    return F.avg_pool2d(planes.float(), patch_size).argmax(0) - 1


def labelled_patches(features, pairs):
    """Yield pixels (3, H, W), unit tokens (N, D) and classes (rows, columns) of each usable pair."""
    settings = features.settings
    for i in tqdm(range(len(pairs)), "reading", disable=None, leave=False):
        item = pairs[i]
        if item is None:
            continue
        image, truth = item
        pixels = resize_to_patches(image, features.patch_size, settings.size)
        tokens = F.normalize(features.extract(pixels[None])[0].float(), dim=1)
        yield pixels, tokens, patch_classes(truth, pixels, features.patch_size, len(settings.names))


def labelled_bank(features, pairs):
    """-> tokens (M, D) and classes (M,) of the patches that are not void, BANK_PATCHES at most."""
    all_tokens = []
    all_classes = []
    for _, tokens, classes in labelled_patches(features, pairs):
        every = math.ceil(len(tokens) * len(pairs) / BANK_PATCHES)
        kept = (classes.flatten() >= 0).nonzero()[::every, 0]
        all_tokens.append(tokens[kept.to(DEVICE)])
        all_classes.append(classes.flatten()[kept])
    classes = torch.cat(all_classes)
    if not len(classes):
        raise UserError(ALL_VOID.format(pairs.uri))
    return torch.cat(all_tokens), classes


def transfer(features, train, test):
    """-> [(pixels (3, H, W), true classes (rows, columns), transferred classes), ...] of the test pairs."""
    bank, bank_classes = labelled_bank(features, train)
    results = []
    for pixels, tokens, classes in labelled_patches(features, test):
        nearest = torch.cat([(chunk @ bank.T).argmax(1) for chunk in tokens.split(CHUNK)]).cpu()
        results.append((pixels, classes, bank_classes[nearest].view(classes.shape)))
    if not any((classes >= 0).any() for _, classes, _ in results):
        raise UserError(ALL_VOID.format(test.uri))
    return results


def compare(backbone, cfg, settings):
    """-> {name: results of `transfer`} of the backbone and its baselines, why pairs were left out."""
    train = Pairs(settings.train, settings)
    test = Pairs(settings.test, settings)
    check_overlap(train.files(), test.files(), "give other pairs to --test")
    values, _ = survey_masks([train, test], settings)
    settings.untrained = untrained_classes(values, settings)
    results = {}
    for name, network in with_baselines(backbone, cfg, settings.seed).items():
        results[name] = transfer(DenseFeatures(network, settings), train, test)
    return results, [*train.bad.values(), *test.bad.values()]


def score(results, settings):
    """-> {"patches", "not first", "mIoU"}: right of all patches, of those not in the first class; mIoU.

    "classes" are the IoUs, nan for a class without a true patch, or without a pixel in the training masks.
    """
    count = len(settings.names)
    truth = torch.cat([classes.flatten() for _, classes, _ in results])
    found = torch.cat([transferred.flatten() for _, _, transferred in results])
    known = truth >= 0
    truth = truth[known]
    found = found[known]
    right = (truth == found).float()
    confusion = (truth * count + found).bincount(minlength=count * count).view(count, count)
    ious = class_ious(confusion)
    ious[settings.untrained] = math.nan
    row = {"patches": right.mean(), "not first": right[truth > 0].mean(), "mIoU": ious.nanmean()}
    return {name: value.item() for name, value in row.items()} | {"classes": ious.tolist()}


def classes_tile(pixels, classes, settings):
    """Classes (rows, columns) of patches in colours over their image (3, H, W), void black -> PIL image."""
    height, width = pixels.shape[1:]
    enlarged = F.interpolate(classes[None, None].float(), (height, width))[0, 0].long()
    picture, _, _ = draw_classes(to_pil(pixels), enlarged.clamp(min=0), settings)
    picture[enlarged.numpy() < 0] = 0
    return Image.fromarray(picture.astype("uint8")).resize(image_tile(pixels).size, Image.NEAREST)


def draw_transfer(results, settings):
    """{title: results of `transfer`} -> PIL image: a row for each of the first images."""
    rows = []
    captions = []
    for images in zip(*[shown[:SHOWN_IMAGES] for shown in results.values()]):
        pixels, truth, _ = images[0]
        tiles = [image_tile(pixels), classes_tile(pixels, truth, settings)]
        texts = ["image", "truth"]
        for title, (_, _, transferred) in zip(results, images):
            right = (transferred == truth)[truth >= 0].float().mean()
            tiles.append(classes_tile(pixels, transferred, settings))
            texts.append(f"{title}, {right:.0%} right")
        rows.append(tiles)
        captions.append(texts)
    return contact_sheet(rows, captions=captions)


def make_parser():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.transfer", description=__doc__, formatter_class=form)
    add_weights_args(parser)
    add_pair_args(parser)
    parser.add_argument("--seed", type=argument(Whole), default=0, help="of the random network")
    parser.add_argument("--out", type=argument(Path), default="runs/transfer", help="folder for transfer.png")
    parser.set_defaults(task="seg", layers=1, head=None)
    return parser


def main(argv=None):
    settings = make_parser().parse_args(argv)
    backbone, cfg = open_backbone(settings.weights, settings.download, settings.dtype)
    fill_reading(settings, cfg, {})
    settings.size = settings.size or config.evaluation_size(cfg)
    settings.names = class_names(settings)
    print(f"{settings.weights}: {describe_backbone(backbone)}, short side {settings.size} pixels")
    print(f"classes from {settings.train}, for {settings.test}")
    results, left_out = compare(backbone, cfg, settings)
    print(f"{'':24s}{'patches':>10s}{'not first':>10s}{'mIoU':>10s}")
    for name, transferred in results.items():
        row = score(transferred, settings)
        ious = row.pop("classes")  # nan for the same classes, whatever the network
        print(f"{name:24s}" + "".join(f"{value:10.3f}" for value in row.values()))
    print_absent_classes(ious, settings, "patch")
    for reason in left_out:
        print("left out:", reason)
    out = settings.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_transfer(results, settings).save(out / "transfer.png")
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}/transfer.png")


if __name__ == "__main__":
    config.run(main)
