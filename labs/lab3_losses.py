"""Lab 3: three losses and one kind of mask; take them away one at a time and see what each was for.

    python labs/lab3_losses.py               # with your code in the two holes
    python labs/lab3_losses.py --solution    # with ours

Your KoLeo replaces `train.koleo_loss` in every run, and your masks replace `data.sample_block_mask` in one.
Expect five trainings of 240 steps, the table of labs/lab3_losses.md, and two pictures: runs/labs/lab3.png
(what the patch tokens see) and runs/labs/lab3_masks.png.
"""

import math
import random

import numpy as np
import torch
from PIL import Image
from workbench import final_metrics, knn_top1, print_table, run_lab, run_trial, save_png

import data
import losses
import train
from eval_knn import foreground_miou
from evals.tiles import contact_sheet, image_tile
from evals.visualize import large_sample, pca_row
from sources import open_source

block_mask = data.sample_block_mask  # the published masks


def koleo(features, group=0):
    """-mean_i ln(distance from i to its nearest neighbour): highest for a batch that lies on one point.

    features (B, D), the student's [CLS] -> scalar with a gradient; `group` is not used here. In four steps:
    x = features / |features|; similarity (B, B) = x x^T, its diagonal set to -2 (nobody is their own
    neighbour); nearest (B,) = argmax of each row; the loss -mean ln(|x_i - x_nearest(i) + 1e-8| + 1e-8).
    """
    raise NotImplementedError("hole 1 in koleo(): return -mean(ln |x_i - x_nearest(i)|), x of length 1")


def scattered_mask(rng, side, count, largest_block):
    """`count` of side x side patches, drawn at random -> numpy bool (side, side).

    Draw with rng.sample; rng is a random.Random. `largest_block` is not used here.
    """
    raise NotImplementedError(
        "hole 2 in scattered_mask(): return a bool array (side, side), `count` of it True"
    )


# ---------------------------------------------------------------- the holes, checked


def check_koleo(checker):
    x = torch.randn(64, 96, requires_grad=True)
    real = losses.koleo_loss(x)
    yours = koleo(x)
    own_neighbour = -math.log(1e-8)  # the loss if everybody is their own neighbour
    errors = [abs(loss - real.item()) for loss in (yours.item(), own_neighbour)]
    checker.check("hole 1 differs from losses.koleo_loss by", *errors, high=1e-4, instant=True)
    (real_grad,) = torch.autograd.grad(real, x)
    (your_grad,) = torch.autograd.grad(yours + 0 * x.sum(), x)  # 0, not an error, if yours is detached
    errors = [((grad - real_grad).norm() / real_grad.norm()).item() for grad in (your_grad, 0 * real_grad)]
    checker.check("hole 1: its gradient differs by (share of its length)", *errors, high=1e-3, instant=True)


def masked_neighbours(mask):
    """How many pairs of masked patches lie side by side? Many in blocks, few among scattered ones."""
    vertical = mask[1:] & mask[:-1]
    horizontal = mask[:, 1:] & mask[:, :-1]
    return int(vertical.sum() + horizontal.sum())


def draw_mask(mask):
    return Image.fromarray(np.uint8(220 - 180 * mask)).resize((96, 96), Image.NEAREST)


def check_masks(checker):
    blocks = [block_mask(random.Random(i), 16, 64, 128) for i in range(8)]
    scattered = [scattered_mask(random.Random(i), 16, 64, 128) for i in range(8)]
    pairs = [sum(map(masked_neighbours, masks)) / 8 for masks in (scattered, blocks)]
    checker.check("hole 2: pairs of masked neighbours per mask", *pairs, low=15, high=45, instant=True)
    checker.check("hole 2: masked patches", float(scattered[0].sum()), 0.0, 64, 64, instant=True)
    rows = [list(map(draw_mask, blocks)), list(map(draw_mask, scattered))]
    save_png(contact_sheet(rows, ["blocks", "scattered"]), "lab3_masks.png")


# ---------------------------------------------------------------- five trainings

RUNS = {
    "everything": [],
    "no KoLeo": ["dino.koleo_loss_weight=0"],
    "no iBOT": ["ibot.loss_weight=0"],
    "no DINO": ["dino.loss_weight=0"],
    "scattered masks": [],
}


def train_all(args):
    trials = {"untrained": run_trial(args, steps=1)}  # the first step has a learning rate of 0
    for name, settings in RUNS.items():
        data.sample_block_mask = scattered_mask if name == "scattered masks" else block_mask
        trials[name] = run_trial(args, *settings, steps=240, name=name)
    return trials


def draw_components(trials):
    """Scenes, and below them a row for each run: principal components of its patch tokens as colours."""
    images = large_sample(open_source("scenes:1000:seed=12"), 32, 32, count=8)
    rows = [[image_tile(image, 96) for image in images]]
    for trial in trials.values():
        rows.append(pca_row(trial.backbone, images, 96))
    return contact_sheet(rows, ["scenes", *trials])


def main(checker, args):
    check_koleo(checker)
    check_masks(checker)
    train.koleo_loss = koleo
    trials = train_all(args)
    scenes = open_source(f"scenes:{6 if args.short else 1000}:seed=12")
    results = {}
    for name, trial in trials.items():
        metrics = final_metrics(trial)
        results[name] = {
            "k-NN": knn_top1(trial, args),
            "foreground mIoU": foreground_miou(trial.backbone, scenes, 32),
            "rank": metrics["rank"],
            "entropy": metrics["entropy"],
        }
    save_png(draw_components(trials), "lab3.png")
    print_table("run", results)

    def check(loss, metric, low):
        without = results[f"no {loss}"]
        checker.check(f"{loss}: {metric}", results["everything"][metric], without[metric], low=low)

    check("KoLeo", "k-NN", low=0.4)
    check("KoLeo", "foreground mIoU", low=0.45)
    check("KoLeo", "rank", low=22)
    check("DINO", "k-NN", low=0.4)


if __name__ == "__main__":
    run_lab(main, __doc__, ["koleo", "scattered_mask"], globals())
