"""Pictures of what a backbone sees: the principal components of its patch tokens as colours.

    python visualize.py runs/laptop --out pca.png        # rows: image | trained | random initialisation

What is unusual here: the components are computed over all images of a sheet at once, so that one colour means
one thing everywhere. Look for: objects in one colour family and background in another, and the same parts in
the same colour.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from data import BadImage, normalize, open_source
from features import EvalImages
from model import VisionTransformer, load_backbone


def pca_colors(patches):
    """patches (n, N, D) -> (n, N, 3) in 0...1: the first three principal components, outliers clipped."""
    n, N, D = patches.shape
    x = patches.reshape(-1, D).float()
    x = x - x.mean(0)
    _, _, v = torch.linalg.svd(x, full_matrices=False)  # rows of v: directions, strongest first
    v = v[:3]
    v = v * torch.where(v.sum(1, keepdim=True) < 0, -1.0, 1.0)  # a direction has no sign of its own: fix one
    x = x @ v.T
    low, high = torch.quantile(x[:100_000], torch.tensor([0.02, 0.98]), dim=0)
    return ((x - low) / (high - low + 1e-9)).clamp(0, 1).view(n, N, 3)


def large_sample(dataset, size, resize, count):
    """`count` images, evenly spread, at twice the size of an evaluation: uint8 (n, 3, 2 S, 2 S).

    Four times the patches make a picture in which one recognises something.
    """
    images = EvalImages(dataset, 2 * size, 2 * resize, limit=count)
    items = (images[i] for i in range(len(images)))
    sample = [item[0] for item in items if not isinstance(item, BadImage)]
    if count < 1 or not sample:
        raise UserError(f"there is nothing to draw: {count} images wanted, {len(sample)} readable")
    return torch.stack(sample)


@torch.no_grad()
def pca_sheet(backbones, images, side=128):
    """A sheet with one column per image: the image above, and below it one PCA picture for each backbone.

    backbones: list of VisionTransformer, images uint8 (n, 3, S, S) -> PIL image.
    """
    rows = [images]
    n, _, S, _ = images.shape
    for backbone in backbones:
        device = next(backbone.parameters()).device
        tokens = backbone.eval()(normalize(images.to(device)))
        g = S // backbone.patch_size
        colors = pca_colors(tokens.patches.cpu()).view(n, g, g, 3).permute(0, 3, 1, 2)
        rows.append((colors * 255).to(torch.uint8))
    rows = [F.interpolate(row.float(), size=(side, side), mode="nearest").to(torch.uint8) for row in rows]
    gap = 4
    sheet = Image.new("RGB", (n * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(picture.permute(1, 2, 0).numpy())
            sheet.paste(tile, (x * (side + gap), y * (side + gap)))
    return sheet


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("run", help="a run folder")
    add("--data", default="", help="images, e.g. folder:/photos (default: the run's evaluation images)")
    add("--out", default="pca.png")
    add("--count", type=int, default=8, help="how many images, evenly spread")
    args = parser.parse_args()
    cfg = config.load(file=Path(args.run) / "config.yaml")
    size = cfg.evaluation.image_size or cfg.crops.global_crops_size
    resize = cfg.evaluation.resize_size or size
    sample = large_sample(open_source(args.data or cfg.evaluation.test_path), size, resize, args.count)
    trained = load_backbone(args.run)
    torch.manual_seed(0)
    untrained = VisionTransformer(**trained.arch, init_std=cfg.student.init_std)
    try:
        pca_sheet([trained, untrained], sample).save(args.out)
    except (OSError, ValueError) as e:
        raise UserError(f"{args.out} cannot be written ({e}): name a .png in an existing folder") from None
    print(f"wrote {args.out}: images, trained, random initialisation")


if __name__ == "__main__":
    config.run(main)
