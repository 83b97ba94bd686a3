"""The embedded scenes, looked at and measured: a contact sheet, and what can be had without learning.

    python -m tools.audit_scenes --sheet scenes.png     # a row per kind, some with mask and depth beside them
    python -m tools.audit_scenes --audit                # 10 seconds

Raw pixels, mean colour and covered area must stay far below a trained network.
"""

import argparse
import time

import numpy as np
from PIL import Image, ImageDraw

from config import UserError, run
from scenes import CLASSES, FAR, NEAR, render

GAP = 4  # pixels between the pictures of a sheet
LEFT = 56  # pixels for the name of a kind


def scene_pictures(image, label, mask, depth):
    """A scene as three pictures (S, S, 3) uint8: the image, the mask, the depth (near is bright)."""
    colour = Image.new("HSV", (1, 1), (25 * label, 190, 230)).convert("RGB")
    mask_picture = np.where(mask[..., None] > 0, np.asarray(colour), np.uint8(24))
    near = 1 / depth - 1 / FAR
    near = near / (1 / NEAR - 1 / FAR)
    grey = (255 * near.clip(0, 1)).astype(np.uint8)
    return [image, mask_picture, np.stack([grey] * 3, -1)]


def write_sheet(path, seed=0, size=96, columns=13):
    """Write the contact sheet: a row per kind; the first two scenes have mask and depth beside them."""
    rows = [[] for _ in CLASSES]
    for i in range(30 * columns):
        scene = render(seed, i, size)
        row = rows[scene[1]]
        pictures = scene_pictures(*scene)
        row += pictures if len(row) < 6 else pictures[:1]
    step = size + GAP
    sheet = Image.new("RGB", (LEFT + columns * step, len(rows) * step + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for k, row in enumerate(rows):
        draw.text((8, k * step + size // 2), CLASSES[k], fill="black")
        for j, picture in enumerate(row[:columns]):
            sheet.paste(Image.fromarray(picture), (LEFT + j * step, k * step + GAP))
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"can't write {path} ({error}); name a .png in an existing folder.") from None


def nearest_neighbours(bank, labels, query, k=20):
    """Labels for `query` (m, d): majority of the k nearest in `bank` (n, d) by cosine, mean subtracted."""
    mean = bank.mean(0)
    bank = bank - mean
    query = query - mean
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    nearest = np.argpartition(-(query @ bank.T), k, axis=1)[:, :k]
    votes = labels[nearest][..., None] == np.arange(len(CLASSES))  # (m, k, classes)
    counts = votes.sum(1)
    return counts.argmax(1)


def linear_probe(bank, labels, query):
    """Labels for `query` (m, d) by least squares on the features and their squares."""
    targets = np.eye(len(CLASSES))[labels]
    weights = np.linalg.lstsq(with_squares(bank), targets, rcond=None)[0]
    return (with_squares(query) @ weights).argmax(1)


def with_squares(x):
    return np.concatenate([np.ones((len(x), 1)), x, x * x], axis=1)


def audit(seed=0, bank=4000, query=1000):
    """What can be had without learning: {name: value}; scenes 0 to `bank` against the next `query`."""
    total = bank + query
    start = time.perf_counter()
    images, labels, masks, _ = map(np.stack, zip(*(render(seed, i) for i in range(total))))
    table = {"images/s, one core": total / (time.perf_counter() - start)}
    images = images.reshape(-1, 32, 2, 32, 2, 3).mean((2, 4), dtype=np.float32)  # as a crop sees them
    images = images / 255
    rows = (
        ("raw pixels at 32 x 32, k-NN", nearest_neighbours, images.reshape(total, -1)),
        ("mean colour, linear probe", linear_probe, images.mean((1, 2))),
        ("covered area, linear probe", linear_probe, (masks > 0).mean((1, 2))[:, None]),
    )
    for name, classify, features in rows:
        predicted = classify(features[:bank], labels[:bank], features[bank:])
        table[name] = float((predicted == labels[bank:]).mean())
    return table | {"chance": 1 / len(CLASSES)}


def main():
    parser = argparse.ArgumentParser(
        "python -m tools.audit_scenes", description="Procedural scenes: look at them, measure them."
    )
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet")
    parser.add_argument("--audit", action="store_true", help="print what can be had without learning")
    args = parser.parse_args()
    if args.sheet:
        write_sheet(args.sheet)
        print(f"wrote {args.sheet}")
    if args.audit:
        for name, value in audit().items():
            digits = 0 if value > 1 else 3
            print(f"{name:28s} {value:8.{digits}f}")


if __name__ == "__main__":
    run(main)
