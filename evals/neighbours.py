"""The nearest neighbours of images: their class, how sure, and two pictures.

    python -m evals.neighbours cat.jpg dog.jpg --weights runs/laptop --out predictions

Prints what `python eval_knn.py --predict` prints, and writes neighbours.png (each image, and beside it the
labelled images that voted) and reliability.png (how often a share of the votes was right).
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import config
from config import UserError
from eval_knn import add_eval_args, open_eval_sets, print_predictions
from evals import visualize
from model import describe_backbone
from sources import open_images
from tools.weights import add_weights_args, open_backbone

SHOWN = 8  # neighbours


def reliability_plot(error, table, side=360):
    """The bins of `calibration` as bars under the diagonal of perfect honesty -> PIL image."""
    left, top, gap = 62, 34, 2
    picture = Image.new("RGB", (left + side + 20, top + side + 60), "white")
    draw, width, cases = ImageDraw.Draw(picture), side / len(table), sum(n for *_, n in table)
    for b, (_, hit, count) in enumerate(table):
        x, tall = left + b * width, top + side * (1 - hit)
        shade = round(225 - 150 * (count / cases) ** 0.5)  # dark where most cases are
        if count:
            draw.rectangle([x + gap, tall, x + width - gap, top + side], fill=(shade, shade, 235))
            draw.text((x + width / 2, tall - 2), str(count), "black", anchor="mb", font_size=11)
    draw.rectangle([left, top, left + side, top + side], outline="black")
    draw.line([left, top + side, left + side, top], fill=(200, 60, 40), width=2)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.text((left + tick * side, top + side + 4), f"{tick:g}", "black", anchor="mt", font_size=12)
        draw.text((left - 6, top + side * (1 - tick)), f"{tick:g}", "black", anchor="rm", font_size=12)
    draw.text((left + side / 2, top + side + 24), "share of the votes", "black", anchor="mt", font_size=14)
    upright = Image.new("RGB", (side, 20), "white")
    ImageDraw.Draw(upright).text((side / 2, 2), "share that is right", "black", anchor="mt", font_size=14)
    picture.paste(upright.rotate(90, expand=True), (4, top))
    title = f"expected calibration error {error:.3f}, {cases} queries (numbers: cases per bar)"
    draw.text((left + side / 2, 8), title, "black", anchor="mt", font_size=12)
    return picture


def draw_neighbours(bank, images, predicted, share, neighbours):
    """Each readable image, and beside it its nearest in the bank, with class and share of the votes -> PIL image."""
    in_bank = [i for i in range(len(bank)) if i not in bank.bad and bank[i][1] >= 0]  # the rows of the features
    names = bank.dataset.classes
    readable = [i for i in range(len(images)) if i not in images.bad]
    rows = []
    captions = []
    for i, label, votes, nearest in zip(readable, predicted.tolist(), share.tolist(), neighbours.tolist()):
        shown = [bank[in_bank[j]] for j in nearest[:SHOWN]]
        rows.append([tile(images[i][0]), *(tile(pixels) for pixels, _ in shown)])
        labels = [label, *(bank_label for _, bank_label in shown)]
        texts = [str(names[x]) if names else str(x) for x in labels]
        texts[0] += f" {votes:.0%}"
        captions.append(texts)
    return visualize.page(rows, captions=captions)


def tile(pixels, side=96):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders or shards to classify")
    add_weights_args(parser)
    add_eval_args(parser)
    add("--out", type=Path, default="predictions", help="folder for the two pictures")
    add("--k", type=int, default=20, help="how many neighbours vote")
    args = parser.parse_args()
    photos = open_images(args.images)
    backbone, cfg = open_backbone(args.weights, args.download)
    if args.image_size:
        cfg.evaluation.image_size = args.image_size
        cfg.evaluation.resize_size = args.image_size
    bank, queries = open_eval_sets(cfg, args.train, args.test, args.limit)
    described = describe_backbone(backbone)
    print(f"{args.weights}: {described}; {len(bank)} images in the bank, {len(queries)} queries")
    images, predicted, share, neighbours, calibrated = print_predictions(backbone, bank, queries, photos, args.k)
    out = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_neighbours(bank, images, predicted, share, neighbours).save(out / "neighbours.png")
        reliability_plot(*calibrated).save(out / "reliability.png")
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}/neighbours.png (each image, and beside it its nearest) and {out}/reliability.png")


if __name__ == "__main__":
    config.run(main)
