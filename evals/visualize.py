"""Pictures of what a backbone sees, for photos of any size and shape: one command, one PNG.

    python -m evals.visualize pca --against random:runs/laptop    # principal components as colours
    python -m evals.visualize pca a.jpg b.jpg --foreground        # the background greyed out first
    python -m evals.visualize attention a.jpg                     # of [CLS] and each register, by head
    python -m evals.visualize norms photos/                       # lengths of patch tokens, and outliers
    python -m evals.visualize sheet a.jpg                         # all of these for one image
    python -m evals.visualize training --weights runs/laptop      # checkpoint after checkpoint
    python -m evals.visualize registers --weights A --against B   # what registers do: compare 0 with 4

One colour means one thing in all images of a row (not from row to row), unless --per-image is given. The
numbers behind the pictures are those of evals/patch_maps.py, which also says how the foreground is found.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import checkpoint
import config
from config import Count, OptionalPixels, UserError, argument
from decode import BadImage
from evals.patch_maps import (
    first_component_iou,
    foreground_map,
    outliers,
    patch_attention,
    patch_norms,
    patch_tokens,
    pca_colors,
)
from evals.plot import Plot
from evals.tiles import COLORMAP, TILE_SIDE, attention_tile, contact_sheet, heatmap_tile, image_tile
from features import EvalImages, apply_reading_args, load_image, resize_to_patches, untrained_copy
from model import DINOv2, VisionTransformer
from runfolder import atomic_open
from sources import open_images, open_source, sample_name
from tools.weights import add_weights_args, open_backbone

DEFAULT_COUNT = dict(pca=8, attention=2, norms=4, sheet=1, training=8, registers=3)  # images in each picture
OPTIONS_OF = dict(pca=("against", "per_image", "foreground"), training=("per_image", "foreground"),
                  registers=("against",))  # fmt: skip
MAX_PATCHES = 4096  # of one image: a long one is shrunk, because its attention is a square of this side
MAX_MAPS_IN_ROW = 9
MAX_CHECKPOINTS = 10  # in one picture
HISTOGRAM_BINS = 60
BACKGROUND_GREY = 217
LIMIT_RED = (200, 50, 40)


class View(NamedTuple):
    """A backbone and the images it looks at."""

    title: str
    backbone: VisionTransformer
    images: list  # uint8 (3, H, W)


class SheetRow(NamedTuple):
    tiles: list
    title: str = ""
    captions: list | tuple = ()


def draw_rows(rows):
    """A list of SheetRow -> PIL image."""
    tiles, titles, captions = zip(*rows)
    return contact_sheet(tiles, titles, captions)


# ---------------------------------------------------------------- images


def shorten(name, length=22):
    """The end of a name, which tells files apart better than its beginning."""
    if len(name) <= length:
        return name
    return "..." + name[3 - length :]


def load_photos(dataset, count):
    """`count` photos, evenly spread -> their short names, and PIL images; prints what is left out."""
    total = len(dataset)
    indices = range(total)
    if count < total:
        indices = [i * total // count for i in range(count)]
    names = []
    photos = []
    unreadable = []
    for i in indices:
        try:
            photos.append(load_image(dataset, i)[0])
        except BadImage as e:
            unreadable.append(str(e))
            continue
        names.append(shorten(Path(sample_name(dataset, i)).stem))
    if not photos:
        raise UserError(f"there is nothing to draw: {unreadable[0]}")
    for reason in unreadable:
        print("left out:", reason)
    if count < total:
        print(f"{count} of {total} images, evenly spread: --count sets how many")
    return names, photos


def prepare_images(photos, backbone, cfg, size):
    """PIL images -> uint8 (3, H, W), both sides multiples of the patch size.

    The short side is `size`, or twice that of the evaluation (the native one, if larger); less for a long
    image, which would have more than MAX_PATCHES.
    """
    patch_size = backbone.patch_size
    if not size:
        size = max(2 * config.evaluation_size(cfg), backbone.arch["img_size"])
    images = []
    for photo in photos:
        most_rows = (MAX_PATCHES * min(photo.size) / max(photo.size)) ** 0.5  # of patches on the short side
        images.append(resize_to_patches(photo, patch_size, min(size, patch_size * most_rows)))
    return images


def large_sample(dataset, size, resize, count):
    """`count` images, evenly spread, at twice the size of an evaluation: uint8 (n, 3, 2 S, 2 S).

    With four times as many patches, there is something to recognise in the picture. Unreadable images are
    left out.
    """
    images = EvalImages(dataset, 2 * size, 2 * resize, limit=count)
    items = [images[i] for i in range(len(images))]
    sample = [item[0] for item in items if not isinstance(item, BadImage)]
    if count < 1 or not sample:
        raise UserError(f"there is nothing to draw: {count} images wanted, {len(sample)} readable")
    return torch.stack(sample)


# ---------------------------------------------------------------- principal components


def pca_row(backbone, images, side=TILE_SIDE, per_image=False, hide_background=False):
    """uint8 images (3, H, W) of any sizes -> their patch tokens as coloured tiles.

    per_image: the components of each image, instead of those of all. hide_background: it is grey, and the
    components are those of the foreground.
    """
    kept_tokens = []  # (m, D) of each image
    kept_masks = []  # bool (h, w) of each image
    for image in images:
        tokens = patch_tokens(backbone, image)
        kept = torch.ones(tokens.shape[:2], dtype=torch.bool)
        if hide_background:
            kept = foreground_map(backbone, image) >= 0
        kept_tokens.append(tokens[kept])
        kept_masks.append(kept)
    if per_image:
        colors = [pca_colors(tokens) for tokens in kept_tokens]
    else:
        counts = [len(tokens) for tokens in kept_tokens]
        colors = pca_colors(torch.cat(kept_tokens)).split(counts)
    tiles = []
    for image, kept, color in zip(images, kept_masks, colors):
        picture = np.full((*kept.shape, 3), BACKGROUND_GREY, np.uint8)
        picture[kept.numpy()] = (color * 255).to(torch.uint8)
        size = image_tile(image, side).size
        tiles.append(Image.fromarray(picture).resize(size, Image.NEAREST))
    return tiles


def draw_pca(views, names, per_image=False, hide_background=False):
    """Images with their names, and below them a row of components for each View -> PIL image."""
    rows = []
    for title, backbone, images in views:
        if not rows:
            rows.append(SheetRow([image_tile(image) for image in images], "", names))
        rows.append(SheetRow(pca_row(backbone, images, TILE_SIDE, per_image, hide_background), title))
    return draw_rows(rows)


def print_foreground_iou(views, scenes):
    """Print how well the first component of each View finds the objects of scenes, whose masks are known."""
    count = min(len(scenes), 200)
    shares = [(scenes.scene(i)[2] > 0).mean() for i in range(count)]
    print(f"first component against the true masks of {count} scenes, foreground IoU:")
    for title, backbone, images in views:
        size = images[0].shape[1]
        print(f"  {first_component_iou(backbone, scenes, size, count):.3f}  {title}")
    print(f"  {sum(shares) / count:.3f}  if everything were called foreground")


def teachers_through_training(run, backbone, cfg):
    """Yields (title, backbone): untrained, as this run began, and the teacher of each checkpoint.

    Untrained has the seed of the run; its own beginning differs only if it started from given weights. At
    most MAX_CHECKPOINTS checkpoints, evenly spread. All teachers are one network that is filled again and
    again: use each before the next. Raises UserError if there is no checkpoint.
    """
    folders = checkpoint.step_folders(Path(run) / "checkpoints")  # newest first
    if not folders:
        raise UserError(f"{run} has no checkpoints: train with train.checkpoint_every=50 train.keep_last=9")
    yield "untrained", untrained_copy(backbone, cfg, cfg.train.seed)
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        teacher = DINOv2(cfg)
    teacher = teacher.to_empty(device=backbone.norm.weight.device)
    stride = math.ceil(len(folders) / MAX_CHECKPOINTS)
    for folder in reversed(folders[::stride]):
        damage = checkpoint.find_damage(folder)
        if damage:
            print(f"left out: {folder}: {damage}")
            continue
        checkpoint.load_checkpoint(folder, {"teacher": teacher.state_dict()})
        step = int(folder.name.removeprefix("step_"))
        yield f"step {step}", teacher.backbone


# ---------------------------------------------------------------- attention, norms, registers


def token_name(t):
    """The name of token t, of those that come before the patches."""
    return f"register {t}" if t else "[CLS]"


def attention_rows(backbone, image):
    """A row of maps for [CLS] and each register (or more, if there are many heads): all heads, then each.

    The number is the share of the token's attention that patches get.
    """
    rows = []
    for t, maps in enumerate(patch_attention(backbone, image).unbind(1)):  # (H, h, w)
        maps = [maps.mean(0), *maps]
        captions = [f"all heads: {maps[0].sum():.0%}"]
        for head, attention in enumerate(maps[1:], start=1):
            captions.append(f"head {head}: {attention.sum():.0%}")
        tiles = [attention_tile(attention, image) for attention in maps]
        for first in range(0, len(maps), MAX_MAPS_IN_ROW):
            title = "" if first else token_name(t)
            part = slice(first, first + MAX_MAPS_IN_ROW)
            rows.append(SheetRow(tiles[part], title, captions[part]))
    return rows


def draw_attention(backbone, images, names):
    rows = []
    for image, name in zip(images, names):
        rows.append(SheetRow([image_tile(image)], name))
        rows += attention_rows(backbone, image)
    return draw_rows(rows)


def norm_tiles(norms, images):
    """Norms (h, w) of each image -> maps on one scale of colours, and their ranges as captions."""
    low = min(values.min() for values in norms)
    high = max(values.max() for values in norms)
    tiles = []
    captions = []
    for values, image in zip(norms, images):
        tiles.append(heatmap_tile((values - low) / (high - low + 1e-9), image))
        captions.append(f"norms {values.min():.3g} to {values.max():.3g}")
    return tiles, captions


def norm_histogram(norms, limit):
    """norms (n,) of patch tokens, and the limit beyond which one is an outlier -> PIL image.

    Outliers are few: the axis of counts is logarithmic (log1p, so that empty bins stand at 0).
    """
    end = 1.1 * max(norms.max().item(), limit)
    counts = torch.histc(norms, HISTOGRAM_BINS, 0, end).tolist()
    largest = max(counts)
    plot = Plot((460, 210), (76, 26, 440, 172), x_range=(0, end), y_range=(0, math.log1p(largest)))
    for i, count in enumerate(counts):
        if count:
            low = end * i / HISTOGRAM_BINS
            high = end * (i + 1) / HISTOGRAM_BINS
            plot.draw_bar(low, high, math.log1p(count), tuple(COLORMAP[1]))
    norm_ticks = [(end * k / 4, f"{end * k / 4:.3g}") for k in range(5)]
    powers = [10**k for k in range(len(str(int(largest))))]
    count_ticks = [(math.log1p(power), f"{power:,}") for power in powers]
    plot.draw_axes(norm_ticks, count_ticks, x_label="norm before the final norm", y_label="tokens")
    plot.draw_limit(limit, f"limit {limit:.3g}", LIMIT_RED)
    return plot.image


def norm_summary(norms, arch):
    """Norms (h, w) of each image -> a histogram of all, and a sentence about the outliers."""
    norms = torch.cat([values.flatten() for values in norms])
    share, limit = outliers(norms, arch)
    summary = (f"{share:.2%} of {len(norms):,} patch tokens are longer than {limit:.3g} "
               f"(median {norms.median():.3g}, largest {norms.max():.3g})")  # fmt: skip
    return norm_histogram(norms, limit), summary


def draw_norms(backbone, images, names):
    norms = [patch_norms(backbone, image) for image in images]
    maps, ranges = norm_tiles(norms, images)
    histogram, summary = norm_summary(norms, backbone.arch)
    print(summary)
    rows = [
        SheetRow([image_tile(image) for image in images], captions=names),
        SheetRow(maps, captions=ranges),
        SheetRow([histogram], captions=[summary]),
    ]
    return draw_rows(rows)


def draw_sheet(backbone, images, names):
    """For each image by itself: components, norms, attention, histogram."""
    rows = []
    for image, name in zip(images, names):
        norms = [patch_norms(backbone, image)]
        maps, ranges = norm_tiles(norms, [image])
        histogram, summary = norm_summary(norms, backbone.arch)
        tiles = [image_tile(image), *pca_row(backbone, [image]), *maps]
        rows.append(SheetRow(tiles, name, ["image", "components", *ranges]))
        rows += attention_rows(backbone, image)
        rows.append(SheetRow([histogram], "norms", [summary]))
    return draw_rows(rows)


REGISTERS_NOTE = """
What to expect: small models have no outliers, with registers or without. In DINOv2 they appear in ViT-L and
larger, after about a third of the training; of ViT-g's patch tokens 2.4 % are longer than 150, and with
registers none stand out (Darcet et al. 2023, section 2). To see that, take released weights of L or g:
    python -m evals.visualize registers PHOTOS --download \\
        --weights dinov2_vitg14 --against dinov2_vitg14_reg4"""


def draw_registers(views, names):
    """Two Views: their histograms, then for each image a row of norms and attention for each backbone."""
    all_norms = []
    histograms = []
    summaries = []
    for title, backbone, images in views:
        norms = [patch_norms(backbone, image) for image in images]
        histogram, summary = norm_summary(norms, backbone.arch)
        all_norms.append(norms)
        histograms.append(histogram)
        summaries.append(f"{title}, {backbone.num_register_tokens} registers:\n{summary}")
    rows = [SheetRow(histograms, captions=summaries)]
    for i, name in enumerate(names):
        for norms, (title, backbone, images) in zip(all_norms, views):
            maps, ranges = norm_tiles(norms, images)
            tiles = [image_tile(images[i]), maps[i]]
            captions = [name, ranges[i]]
            mean_attention = patch_attention(backbone, images[i]).mean(0)  # (1 + R, h, w)
            for t, attention in enumerate(mean_attention):
                tiles.append(attention_tile(attention, images[i]))
                captions.append(f"{token_name(t)}: {attention.sum():.0%}")
            rows.append(SheetRow(tiles, title, captions))
    print("\n".join([*summaries, REGISTERS_NOTE]))
    return draw_rows(rows)


# ---------------------------------------------------------------- the command


def add_photo_args(parser, count):
    """--size and --count, as here and in evals/explore.py."""
    parser.add_argument("--size", type=argument(OptionalPixels), default=0, help="short side of what the "
                        "network sees, in pixels (default: twice the evaluation's, or the native one if "
                        "larger)")  # fmt: skip
    parser.add_argument("--count", type=argument(Count), default=count, help="how many images, evenly spread")


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.visualize", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("what", choices=DEFAULT_COUNT)
    add("photos", nargs="*", help="images, folders, .tar shards, .jsonl lists; or one URI such as scenes:9 "
        "(default: the run's evaluation images)")  # fmt: skip
    add_weights_args(parser)
    add("--against", metavar="WEIGHTS", help="pca, registers: a second backbone, named as in --weights")
    add("--out", type=argument(Path), help="a .png (default: WHAT.png)")
    add_photo_args(parser, count=0)
    add("--per-image", action="store_true", help="pca, training: components of each image by itself")
    add("--foreground", action="store_true", help="pca, training: grey out the background")
    args = parser.parse_intermixed_args()
    for option in ("against", "per_image", "foreground"):
        if getattr(args, option) and option not in OPTIONS_OF.get(args.what, ()):
            raise UserError(f"--{option.replace('_', '-')} has no effect on {args.what}: leave it out")
    if args.what == "registers" and not args.against:
        raise UserError("registers compares two backbones: name the other with --against")
    args.out = args.out or Path(f"{args.what}.png")
    args.count = args.count or DEFAULT_COUNT[args.what]
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: it must end in .png")
    return args


def draw_picture(args, views, names, cfg):
    """The picture `args` ask for -> PIL image."""
    _, backbone, images = views[0]
    if args.what == "pca":
        return draw_pca(views, names, args.per_image, args.foreground)
    if args.what == "training":
        teachers = teachers_through_training(args.weights, backbone, cfg)
        views = (View(title, teacher, images) for title, teacher in teachers)
        return draw_pca(views, names, args.per_image, args.foreground)
    if args.what == "registers":
        return draw_registers(views, names)
    draw = dict(attention=draw_attention, norms=draw_norms, sheet=draw_sheet)[args.what]
    return draw(backbone, images, names)


def main():
    args = parse_args()
    names = [name for name in (args.weights, args.against) if name]
    loaded = [(name, *open_backbone(name, args.download, args.dtype)) for name in names]
    _, _, cfg = loaded[0]
    reading = apply_reading_args(args, cfg)
    if not args.photos and not cfg.evaluation.test_path:
        raise UserError(f"{args.weights} has no evaluation images: name photos to draw")
    if args.photos:
        dataset = open_images(args.photos, reading)
    else:
        dataset = open_source(cfg.evaluation.test_path, reading)
    names, photos = load_photos(dataset, args.count)
    views = []
    for name, backbone, own_cfg in loaded:
        images = prepare_images(photos, backbone, own_cfg, args.size)
        views.append(View(shorten(name, 30), backbone, images))
    if args.what == "pca" and args.foreground and hasattr(dataset, "scene"):
        print_foreground_iou(views, dataset)
    picture = draw_picture(args, views, names, cfg)
    try:
        with atomic_open(args.out) as f:
            picture.save(f, "PNG")
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): name another --out") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    config.run(main)
