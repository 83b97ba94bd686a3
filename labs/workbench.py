"""The workbench of the labs: short trainings, holes to fill, and checks that no accident passes.

    python labs/lab1_collapse.py               # with your own code in the holes
    python labs/lab1_collapse.py --solution    # with ours, from labs/solutions/
    python labs/lab1_collapse.py --solution --short    # a few steps, to see that everything runs

A trial is `train.train_step` in a loop: the laptop preset with patches of 8 pixels, a quarter as many;
nothing is saved, nothing is left out. What is unusual here: a check has a control, the same number from a run
without the effect, and passes only if the number lies within the bounds and the control does not.
"""

import argparse
import functools
import importlib
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import config  # noqa: E402
import train  # noqa: E402
from config import UserError  # noqa: E402
from data import make_loader  # noqa: E402
from eval_knn import knn_backbone, open_eval_sets  # noqa: E402
from optim import compute_schedules  # noqa: E402
from runfolder import atomic_open  # noqa: E402
from scenes import Scenes  # noqa: E402
from sources import open_source  # noqa: E402


@functools.cache
def drawn(count, seed, size, i, draw=Scenes.__getitem__):
    """A scene is drawn once, for all trials of a lab; it takes 12 KB."""
    return draw(Scenes(count, seed, size), i)


Scenes.__getitem__ = lambda self, i: drawn(self.count, self.seed, self.size, i)
SETTINGS = ["student.patch_size=8", "train.dataset_path=scenes:6000:seed=10"]  # over configs/laptop.yaml


class Trial(NamedTuple):
    """What a short training leaves behind."""

    rows: list  # per step a dict of floats: loss, loss_*, entropy, entropy_mean, kl, rank, schedules
    t: train.TrainState  # student, teacher (t.ema), centres, optimizer, as the last step left them
    cfg: config.Config


def trial(*overrides, steps, seed=0, name="", prepare=lambda t: None):
    """Train for `steps` steps with key=value `overrides` -> Trial.

    `prepare` gets the TrainState before the first step: the place to break it on purpose. The schedules are
    those of a run that ends after `steps`. Equal seeds mean equal weights, crops and masks.
    """
    cfg = config.load(None, "laptop", [*SETTINGS, f"train.seed={seed}", *overrides])
    cfg.optim.epochs = steps / cfg.train.OFFICIAL_EPOCH_LENGTH
    torch.manual_seed(seed)
    t = train.TrainState(cfg)
    prepare(t)
    batches, rows = make_loader(cfg, open_source(cfg.train.dataset_path), "cpu"), []
    for step in tqdm(range(steps), desc=name or "training", leave=False, disable=None):
        now = compute_schedules(cfg, step)
        torch.manual_seed(hash((seed, step)) % 2**63)
        metrics = train.train_step(t, [next(batches)], now, cfg, look=True)
        t.step += 1
        rows.append({k: float(v) for k, v in metrics.items()} | now)
        rows[-1]["loss_dino"] = rows[-1]["loss_dino_local"] + rows[-1]["loss_dino_global"]
    return Trial(rows, t, cfg)


def last(trial, name, steps=10):
    """Mean of a logged number over the last steps."""
    values = [row[name] for row in trial.rows[-steps:]]
    return sum(values) / len(values)


def knn(trial, limit=0):
    """k-NN accuracy (k = 20) of the teacher, over the labelled scenes of the preset, in 0...1."""
    bank, queries = open_eval_sets(trial.cfg, limit=limit)
    return knn_backbone(trial.t.ema.backbone, bank, queries, ks=(20,))[20]


COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by all


def curves(title, runs, key, unit=1.0, width=460, height=230):
    """{name: Trial} -> PIL image: a logged number by step, divided by `unit`; a grey line lies at 1."""
    picture = Image.new("RGB", (width, height), "white")
    draw, left, right, top, bottom = ImageDraw.Draw(picture), 40, width - 150, 26, height - 22
    lines = {name: [row[key] / unit for row in x.rows] for name, x in runs.items()}
    most = 1.05 * max(1.0, *map(max, lines.values()))

    def points(numbers):
        step = (right - left) / max(len(numbers) - 1, 1)
        return [(left + i * step, bottom - (bottom - top) * v / most) for i, v in enumerate(numbers)]

    draw.text((left, 4), title, "black", font_size=13)
    draw.line([left, top, left, bottom, right, bottom], "black")
    draw.text((left - 4, top), f"{most:.2g}", "black", anchor="rt", font_size=12)
    draw.text((left - 4, bottom), "0", "black", anchor="rs", font_size=12)
    last_step = f"step {len(next(iter(lines.values())))}"
    draw.text((right, bottom + 4), last_step, "black", anchor="rt", font_size=12)
    draw.line(points([1.0, 1.0]), "#999999", 1)
    for k, (name, numbers) in enumerate(lines.items()):
        colour = COLOURS[k % len(COLOURS)]
        draw.line(points(numbers), colour, 2)
        draw.text((right + 8, top + 17 * k), name, colour, font_size=13)
    return picture


def table(*rows):
    """Print rows of texts and numbers as a table of Markdown; the first is the head.

    The page of a lab shows the same table with `mean (lowest-highest)` in its cells and a last row
    `tolerance`: how far beyond that a number may lie on another machine (tests/test_labs.py).
    """
    texts = [[x if isinstance(x, str) else f"{x:.3f}" for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    for row in [texts[0], ["-" * width for width in widths], *texts[1:]]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def save(picture, name):
    """Write a PIL image to runs/labs/`name` and say so."""
    path = Path("runs", "labs", name)
    with atomic_open(path, mark=os.getpid()) as f:  # two seeds may run side by side
        picture.save(f, "PNG")
    print(f"wrote {path}")


class Desk:
    """The checks of one lab: prints each, remembers what failed."""

    def __init__(self, short):
        self.short, self.failed = short, []

    def check(self, claim, value, control, low=-math.inf, high=math.inf, instant=False):
        """`value` lies within low...high and `control`, from the run without the effect, does not.

        In --short nothing is learned and nothing judged, unless `instant`: what needs no training is always
        judged, and if it is wrong nothing is trained with it.
        """
        verdict = "right" if low <= value <= high and not low <= control <= high else "WRONG"
        bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
        bounds = " and ".join(bounds)
        if instant or not self.short:
            self.failed += [claim] * (verdict == "WRONG")
            print(f"{verdict}  {claim}: {value:.4g} ({bounds}; without the effect {control:.4g})")
        if instant and verdict == "WRONG":
            raise UserError(f"not yet right: {claim}")


def run(main, doc, holes, lab, flags=()):
    """The end of every lab script: reads the flags, fills the holes, runs `main(desk, seed, short)`.

    holes: the names of the functions that a student writes. flags: pairs of a flag of this lab alone and its
    meaning; its text is in desk.args. Exits with 1 if a check failed.
    """

    def lesson():
        form = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=doc, formatter_class=form)
        parser.add_argument("--solution", action="store_true", help="our functions in the holes")
        parser.add_argument("--short", action="store_true", help="a few steps: does everything run?")
        parser.add_argument("--seed", type=int, default=0, help="of weights, crops and masks")
        for flag, meaning in flags:
            parser.add_argument(flag, default="", help=meaning)
        args = parser.parse_args()
        if args.solution:
            answers = importlib.import_module(f"solutions.{Path(lab['__file__']).stem}")
            lab.update({name: getattr(answers, name) for name in holes})
        desk = Desk(args.short)
        desk.args = args
        try:
            main(desk, args.seed, args.short)
        except NotImplementedError as hole:
            name = Path(lab["__file__"]).name
            raise UserError(f"{name} has a hole: {hole}; or look with --solution") from None
        if desk.failed:
            raise UserError(f"{len(desk.failed)} of the checks failed: {'; '.join(desk.failed)}")

    config.run(lesson)
