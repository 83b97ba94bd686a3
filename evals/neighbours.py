"""The nearest neighbours of images: their class, how sure it is, and two pictures.

    python -m evals.neighbours cat.jpg --weights runs/laptop --out predictions

Prints what `python eval_knn.py --predict` prints, and writes neighbours.png (each image, and beside it the
labelled images nearest to it) and reliability.png (how often a share of the votes was right).
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

import config
from config import Count, UserError, argument
from decode import BadImage, Reading
from eval_knn import (
    add_eval_args,
    apply_eval_args,
    backbone_features,
    knn_predict,
    open_eval_sets,
    print_header,
    print_predictions,
)
from evals.plot import FONT_SIZE, Plot
from evals.tiles import TILE_GAP, contact_sheet, text_size, to_pil
from sources import open_images
from tools.weights import add_weights_args, open_backbone

SHOWN_NEIGHBOURS = 8
SQUARE_SIDE = 96  # pixels of an image in neighbours.png
PLOT_SIDE = 360  # pixels of the axes in reliability.png
DIAGONAL_RED = (200, 60, 40)
COMPARED_QUERIES = 10  # at most, when networks are compared
COMPARED_NEIGHBOURS = 5
COMPARED_SIDE = 64  # pixels of an image there
FRAME_WIDTH = 3  # pixels
BLOCK_GAP = 24  # pixels between networks
MAX_LETTERS = 11  # of the name of a class
GREEN = (40, 160, 70)
RED = (215, 50, 45)


def reliability_plot(error, bins):
    """The bins of `calibration` as bars, under the diagonal where a share is right as often as it says.

    error: expected calibration error. bins: (mean share, how often right, number of cases) of each.
    -> PIL image; the more cases a bar has, the darker it is.
    """
    cases = sum(count for _, _, count in bins)
    left = 62
    top = 34
    area = (left, top, left + PLOT_SIDE, top + PLOT_SIDE)
    plot = Plot((left + PLOT_SIDE + 20, top + PLOT_SIDE + 46), area, x_range=(0, 1), y_range=(0, 1))
    for b, (_, hit_rate, count) in enumerate(bins):
        if count:
            shade = round(225 - 150 * (count / cases) ** 0.5)
            low = b / len(bins)
            high = (b + 1) / len(bins)
            plot.draw_bar(low, high, hit_rate, (shade, shade, 235), text=str(count))
    ticks = [(value, f"{value:g}") for value in (0, 0.25, 0.5, 0.75, 1)]
    plot.draw_axes(ticks, ticks, "share of the votes (numbers: cases per bar)", "share that is right")
    plot.draw_line([(0, 0), (1, 1)], DIAGONAL_RED)
    plot.draw_title(f"expected calibration error {error:.3f}, {cases} queries")
    return plot.image


def square_tile(pixels):
    """uint8 (3, S, S) -> PIL image."""
    return to_pil(pixels).resize((SQUARE_SIDE, SQUARE_SIDE), Image.BICUBIC)


def has_label(item):
    """Whether an item of EvalImages is readable and labelled."""
    return not isinstance(item, BadImage) and item[1] >= 0


def draw_neighbours(bank, images, predicted, share, neighbours):
    """Each readable image, and beside it its nearest in the bank, with class and share of the votes.

    bank, images: EvalImages; predicted (m,), share (m,), neighbours (m, k) as `print_predictions` returns
    them -> PIL image.
    """
    labelled = [i for i in range(len(bank)) if has_label(bank[i])]  # the rows of the features
    readable = [i for i in range(len(images)) if i not in images.bad]
    names = bank.dataset.classes
    rows = []
    captions = []
    for i, label, votes, nearest in zip(readable, predicted.tolist(), share.tolist(), neighbours.tolist()):
        tiles = [square_tile(images[i][0])]
        labels = [label]
        for j in nearest[:SHOWN_NEIGHBOURS]:
            pixels, neighbour_label = bank[labelled[j]]
            tiles.append(square_tile(pixels))
            labels.append(neighbour_label)
        texts = [names[label] for label in labels]
        texts[0] += f" {votes:.0%}"
        rows.append(tiles)
        captions.append(texts)
    return contact_sheet(rows, captions=captions)


# ---------------------------------------------------------------- two networks side by side


def framed_tile(pixels, color):
    """uint8 (3, S, S) -> PIL image, a small square with a frame around it."""
    tile = to_pil(pixels).resize((COMPARED_SIDE, COMPARED_SIDE), Image.BICUBIC)
    return ImageOps.expand(tile, FRAME_WIDTH, color)


def one_query_per_class(queries):
    """The first readable query of each class, in the order of the classes -> numbers of the EvalImages."""
    first = {}
    for i in range(len(queries)):
        if has_label(queries[i]):
            first.setdefault(queries[i][1], i)
        if len(first) == min(len(queries.dataset.classes), COMPARED_QUERIES):
            break
    return [first[label] for label in sorted(first)]


def nearest_images(backbone, bank, queries, count):
    """The `count` nearest of the bank for each query, by the cosine of [CLS] -> rows (m, count) of the bank.

    Both EvalImages; rows count only readable, labelled images.
    """
    known, labels = backbone_features(backbone, bank)
    unknown, _ = backbone_features(backbone, queries)
    return knn_predict(known, labels, unknown, count)[2]


def compare_networks(networks, bank, queries):
    """One query of each class, and beside it the images that each network finds nearest -> PIL image.

    networks: {title: backbone}; bank, queries: labelled EvalImages. A green frame: of the class of the query;
    red: of another. Nothing is chosen by hand: the queries are the first of their classes. Raises UserError
    if no query, or no image of the bank, is readable and labelled.
    """
    first = one_query_per_class(queries)
    if not first:
        raise UserError("there is nothing to draw: no query is readable and has a label")
    shown = queries.subset([queries.indices[i] for i in first])
    names = [name[:MAX_LETTERS] for name in bank.dataset.classes]
    items = [shown[i] for i in range(len(shown))]
    classes = [label for _, label in items]
    tiles = [[framed_tile(pixels, "white")] for pixels, _ in items]
    blocks = [("query", contact_sheet(tiles, captions=[[names[label]] for label in classes]))]
    labelled = [i for i in range(len(bank)) if has_label(bank[i])]  # the rows of the features
    for title, backbone in networks.items():
        nearest = nearest_images(backbone, bank, shown, COMPARED_NEIGHBOURS)
        tiles = []
        captions = []
        right = 0
        for label, row in zip(classes, nearest.tolist()):
            found = [bank[labelled[j]] for j in row]
            right += sum(other == label for _, other in found)
            tiles.append([framed_tile(pixels, GREEN if other == label else RED) for pixels, other in found])
            captions.append([names[other] for _, other in found])
        heading = f"nearest, {title}: {right} of {nearest.numel()} are of its class"
        blocks.append((heading, contact_sheet(tiles, captions=captions)))
    return place_beside(blocks)


def place_beside(blocks):
    """[(heading, PIL image), ...] from left to right, each heading above its image -> PIL image."""
    top = text_size("X")[1] + TILE_GAP
    widths = [max(image.width, text_size(heading)[0]) for heading, image in blocks]
    width = sum(widths) + BLOCK_GAP * (len(blocks) - 1)
    canvas = Image.new("RGB", (width, top + max(image.height for _, image in blocks)), "white")
    x = 0
    for (heading, image), block_width in zip(blocks, widths):
        ImageDraw.Draw(canvas).text((x, 0), heading, "black", font_size=FONT_SIZE)
        canvas.paste(image, (x, top))
        x += block_width + BLOCK_GAP
    return canvas


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.neighbours", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders or shards to classify")
    add_weights_args(parser)
    add_eval_args(parser)
    add("--out", type=argument(Path), default="predictions", help="folder for the two pictures")
    add("--k", type=argument(Count), default=20, help="how many neighbours vote")
    args = parser.parse_args()
    backbone, cfg = open_backbone(args.weights, args.download, args.dtype)
    apply_eval_args(args, cfg)
    bank, queries = open_eval_sets(cfg, args.limit)
    print_header(args.weights, backbone, bank, queries)
    photos = open_images(args.images, Reading.from_config(cfg.data))
    found = print_predictions(backbone, bank, queries, photos, args.k)
    images, predicted, share, neighbours, (error, bins) = found
    out = args.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw_neighbours(bank, images, predicted, share, neighbours).save(out / "neighbours.png")
        reliability_plot(error, bins).save(out / "reliability.png")
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}/neighbours.png (each image, and beside it its nearest) and {out}/reliability.png")


if __name__ == "__main__":
    config.run(main)
