"""Lab 3: three losses and one kind of mask; take them away one at a time and see what each was for.

    python labs/lab3_losses.py               # with your code in the two holes
    python labs/lab3_losses.py --solution    # with ours

What is unusual here: your KoLeo takes the place of `train.koleo_loss` in every run, and your masks that of
`data.block_mask` in one. Expect five trainings of 240 steps, the table of labs/lab3_losses.md, and two
pictures, runs/labs/lab3.png (what the patch tokens see) and runs/labs/lab3_masks.png.
"""

import math
import random

import numpy as np
import torch
from PIL import Image
from workbench import knn, last, run, save, table, trial

import data
import losses
import train
from eval_knn import foreground_miou
from evals.visualize import large_sample, page, pca_row, tile
from sources import open_source

BLOCKS = data.sample_block_mask  # the published ones


def koleo(features, group=0):
    """-mean_i ln(distance from i to its nearest neighbour): a batch that lies on one point pays most.

    features (B, D), the student's [CLS] -> scalar with a gradient; `group` is not used here. In four steps:
    x = features / |features|; similarity (B, B) = x x^T, its diagonal set to -2 (nobody is his own
    neighbour); nearest (B,) = argmax of each row; the loss -mean ln(|x_i - x_nearest(i) + 1e-8| + 1e-8).
    """
    raise NotImplementedError("hole 1 in koleo(): return -mean(ln |x_i - x_nearest(i)|), x of length 1")


def scattered(rng, n, wanted, cap):
    """`wanted` of n x n patches, drawn by rng.sample (rng is a random.Random) -> numpy bool (n, n).

    `cap`, the largest block, is not used here.
    """
    raise NotImplementedError("hole 2 in scattered(): return a bool array (n, n), `wanted` of it True")


# ---------------------------------------------------------------- the holes, checked


def neighbours(mask):
    """How many pairs of masked patches lie side by side? Many in blocks, few among scattered ones."""
    return int((mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum())


def check_holes(desk):
    x = torch.randn(64, 96, requires_grad=True)
    real, itself = losses.koleo_loss(x), -math.log(1e-8)  # the loss if everybody is his own neighbour
    off = [abs(value - real.item()) for value in (koleo(x).item(), itself)]
    desk.check("hole 1 differs from losses.koleo_loss by", *off, high=1e-4, instant=True)
    (truth,), (slope,) = (torch.autograd.grad(loss + 0 * x.sum(), x) for loss in (real, koleo(x)))
    off = [((g - truth).norm() / truth.norm()).item() for g in (slope, 0 * truth)]
    desk.check("hole 1: its gradient differs by (share of its length)", *off, high=1e-3, instant=True)
    masks = [[draw(random.Random(i), 16, 64, 128) for i in range(8)] for draw in (BLOCKS, scattered)]
    pairs = [sum(map(neighbours, row)) / 8 for row in masks[::-1]]
    desk.check("hole 2: pairs of masked neighbours per mask", *pairs, low=15, high=45, instant=True)
    desk.check("hole 2: masked patches", float(masks[1][0].sum()), 0.0, 64, 64, instant=True)
    tiles = [[Image.fromarray(np.uint8(220 - 180 * m)).resize((96, 96), 0) for m in row] for row in masks]
    save(page(tiles, ["blocks", "scattered"]), "lab3_masks.png")


# ---------------------------------------------------------------- five trainings

RUNS = {
    "everything": [],
    "no KoLeo": ["dino.koleo_loss_weight=0"],
    "no iBOT": ["ibot.loss_weight=0"],
    "no DINO": ["dino.loss_weight=0"],
    "scattered masks": [],
}


def draw(runs, count=8):
    """Scenes, and below them a row for each run: principal components of its patch tokens as colours."""
    images = large_sample(open_source("scenes:1000:seed=12"), 32, 32, count)
    rows = [pca_row(x.t.ema.backbone, images, 96) for x in runs.values()]
    return page([[tile(image, 96) for image in images], *rows], ["scenes", *runs])


def main(desk, seed, short):
    steps, small, limit = (2, ["train.batch_size_per_gpu=8"], 40) if short else (240, [], 0)
    check_holes(desk)
    train.koleo_loss = koleo
    runs = {"untrained": trial(*small, steps=1, seed=seed)}  # the first step has a learning rate of 0
    for name, overrides in RUNS.items():
        data.sample_block_mask = scattered if name == "scattered masks" else BLOCKS
        runs[name] = trial(*overrides, *small, steps=steps, seed=seed, name=name)
    scenes = open_source(f"scenes:{6 if short else 1000}:seed=12")
    rows = [["run", "k-NN", "foreground mIoU", "rank", "entropy"]]
    for name, x in runs.items():
        miou = foreground_miou(x.t.ema.backbone, scenes, 32)
        rows.append([name, knn(x, limit), miou, last(x, "rank"), last(x, "entropy")])
    save(draw(runs), "lab3.png")
    table(*rows)
    got = {name: numbers for name, *numbers in rows}
    every, no_koleo, no_dino = (got[name] for name in ("everything", "no KoLeo", "no DINO"))
    desk.check("KoLeo: k-NN", every[0], no_koleo[0], low=0.4)
    desk.check("KoLeo: foreground mIoU", every[1], no_koleo[1], low=0.45)
    desk.check("KoLeo: rank", every[2], no_koleo[2], low=22)
    desk.check("DINO: k-NN", every[0], no_dino[0], low=0.4)


if __name__ == "__main__":
    run(main, __doc__, ["koleo", "scattered"], globals())
