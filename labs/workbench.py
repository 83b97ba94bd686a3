"""The workbench of the labs: short trainings, holes to fill, and checks that nothing passes by accident.

    python labs/lab1_collapse.py                       # your own code in the holes
    python labs/lab1_collapse.py --solution            # ours, from labs/solutions/
    python labs/lab1_collapse.py --solution --short    # a few steps: does everything run?

A trial is `train.train_step` in a loop: the laptop preset, but with patches of 8 pixels, a quarter as many.
It leaves nothing out of a training step and saves nothing. A check has a control: the same number from a run
without the effect. It passes only if the number lies within the bounds and the control does not.
"""

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import config  # noqa: E402
import train  # noqa: E402
from config import UserError  # noqa: E402
from data import make_loader  # noqa: E402
from eval_knn import knn_backbone, open_eval_sets  # noqa: E402
from evals.plot import Plot  # noqa: E402
from optim import compute_schedules  # noqa: E402
from runfolder import atomic_open  # noqa: E402
from scenes import Scenes  # noqa: E402
from sources import open_source  # noqa: E402

SETTINGS = (  # over configs/laptop.yaml: what the tables of the labs were made with, on any processor
    "train.dataset_path=scenes:6000:seed=10", "compute_precision.dtype=fp32", "student.patch_size=8",
    "train.OFFICIAL_EPOCH_LENGTH=85", "crops.jitter=[0.4,0.4,0.2,0.5]", "crops.jitter_prob=0.8")  # fmt: skip
# The colour-blind can tell these apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# ---------------------------------------------------------------- trials

draw_scene = Scenes.__getitem__


@functools.cache
def cached_scene(count, seed, size, i):
    """Each scene is drawn once for all trials of a lab; it takes 12 KB."""
    return draw_scene(Scenes(count, seed, size), i)


def get_cached_scene(self, i):
    return cached_scene(self.count, self.seed, self.size, i)


Scenes.__getitem__ = get_cached_scene


class Trial(NamedTuple):
    """What a short training leaves behind."""

    rows: list  # per step a dict of floats: loss, loss_*, entropy, entropy_mean, kl, rank, schedules
    state: train.TrainState  # student, teacher (state.ema), centres and optimizer after the last step
    cfg: config.Config

    @property
    def backbone(self):
        """The teacher's."""
        return self.state.ema.backbone


def run_trial(args, *overrides, steps, name="training"):
    """Train from scratch for `steps` steps, with key=value `overrides` -> Trial.

    args: the flags of the lab. Equal --seed means equal weights, crops and masks; --short means at most two
    steps of eight images. The schedules are those of a run that ends after `steps`.
    """
    settings = [*SETTINGS, f"train.seed={args.seed}"]
    if args.short:
        settings.append("train.batch_size_per_gpu=8")
        steps = min(steps, 2)
    cfg = config.load(model="laptop", overrides=[*settings, *overrides])
    cfg.optim.epochs = steps / cfg.train.OFFICIAL_EPOCH_LENGTH
    torch.manual_seed(args.seed)
    state = train.TrainState(cfg)
    batches = make_loader(cfg, open_source(cfg.train.dataset_path), "cpu")
    rows = []
    for step in tqdm(range(steps), desc=name, leave=False, disable=None):
        schedules = compute_schedules(cfg, step)
        torch.manual_seed(hash((args.seed, step)) % 2**63)
        metrics = train.train_step(state, [next(batches)], schedules, cfg, log_diagnostics=True)
        state.step += 1
        row = {metric: float(value) for metric, value in metrics.items()} | schedules
        row["loss_dino"] = row["loss_dino_local"] + row["loss_dino_global"]
        rows.append(row)
    return Trial(rows, state, cfg)


def final_metrics(trial):
    """Means over the last ten steps of the columns in a table of trials: {column: number}."""
    columns = {"DINO loss": "loss_dino", "entropy": "entropy", "entropy_mean": "entropy_mean", "rank": "rank"}
    means = {}
    for column, metric in columns.items():
        values = [row[metric] for row in trial.rows[-10:]]
        means[column] = sum(values) / len(values)
    return means


def knn_top1(trial, args):
    """k-NN accuracy (k = 20) of the teacher on the labelled scenes of the preset, in 0...1."""
    limit = 40 if args.short else 0  # images of each set; 0: all
    bank, queries = open_eval_sets(trial.cfg, limit=limit)
    return knn_backbone(trial.backbone, bank, queries, ks=(20,))[20]


# ---------------------------------------------------------------- what a lab shows


def curves(title, runs, key, unit=1.0):
    """{name: Trial} -> PIL image: a logged number by step, divided by `unit`; a grey line lies at 1."""
    lines = {name: [row[key] / unit for row in run.rows] for name, run in runs.items()}
    top_value = 1.05 * max(1.0, *map(max, lines.values()))
    steps = len(next(iter(lines.values())))
    last_step = max(steps - 1, 1)
    plot = Plot((460, 230), (40, 26, 310, 208), (0, last_step), (0, top_value))
    plot.draw_title(title)
    plot.draw_axes([(last_step, f"step {steps}")], [(0, "0"), (top_value, f"{top_value:.2g}")])
    plot.draw_line([(0, 1.0), (last_step, 1.0)], "#999999", width=1)
    legend = list(zip(lines, itertools.cycle(COLOURS)))
    for name, color in legend:
        plot.draw_line(enumerate(lines[name]), color)
    plot.draw_legend(legend)
    return plot.image


def print_table(corner, results):
    """Print {row: {column: number}} as a Markdown table.

    The page of a lab shows the same table with `mean (lowest-highest)` in its cells and a last row
    `tolerance`: how far outside that range a number may lie on another machine (tests/labs/test_labs.py).
    """
    columns = next(iter(results.values()))
    lines = [[corner, *columns]]
    for name, numbers in results.items():
        lines.append([name, *map("{:.3f}".format, numbers.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths)]
        print("| " + " | ".join(cells) + " |")


def save_png(picture, name):
    """Write a PIL image to runs/labs/`name`, and print where it is."""
    path = Path("runs", "labs", name)
    with atomic_open(path, mark=os.getpid()) as file:  # two seeds may run side by side
        picture.save(file, "PNG")
    print(f"wrote {path}")


# ---------------------------------------------------------------- checks


def max_error(a, b):
    return (a - b).abs().max().item()


class Checker:
    """The checks of one lab: prints each, and remembers which failed."""

    def __init__(self, short):
        self.short = short
        self.failed = []

    def check(self, claim, value, control, low=-math.inf, high=math.inf, instant=False):
        """Passes if `value` lies within low...high and `control`, from a run without the effect, does not.

        instant: needs no training, and stops the lab if it is wrong. All other checks are skipped by --short,
        which trains too little for them. Raises UserError.
        """
        if self.short and not instant:
            return
        right = low <= value <= high and not low <= control <= high
        bounds = []
        if low > -math.inf:
            bounds.append(f"at least {low:g}")
        if high < math.inf:
            bounds.append(f"at most {high:g}")
        verdict = "right" if right else "WRONG"
        print(f"{verdict}  {claim}: {value:.4g} ({' and '.join(bounds)}; without the effect {control:.4g})")
        if not right:
            self.failed.append(claim)
            if instant:
                raise UserError(f"not right yet: {claim}")


# ---------------------------------------------------------------- the end of every lab script


def run_lab(main, doc, holes, lab, flags=()):
    """Parse the command line, fill the holes if --solution is given, and call main(checker, args).

    doc: the text of --help. holes: names of the functions that a student writes. lab: globals() of the
    script. flags: pairs (flag, help) that only this lab has. Exits with 1 if a check failed.
    """

    def run():
        args = parse_args(doc, flags)
        if args.solution:
            fill_holes(lab, holes)
        checker = Checker(args.short)
        try:
            main(checker, args)
        except NotImplementedError as hole:
            script = Path(lab["__file__"]).name
            raise UserError(f"{script} has a hole: {hole}; or run it with --solution") from None
        if checker.failed:
            raise UserError(f"{len(checker.failed)} of the checks failed: {'; '.join(checker.failed)}")

    config.run(run)


def parse_args(doc, flags):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    add = parser.add_argument
    add("--solution", action="store_true", help="fill the holes with our functions, from labs/solutions/")
    add("--short", action="store_true", help="train a few steps only, to see whether everything runs")
    add("--seed", type=int, default=0, help="of weights, crops and masks (default: 0)")
    for flag, meaning in flags:
        add(flag, default="", help=meaning)
    return parser.parse_args()


def fill_holes(lab, holes):
    solutions = importlib.import_module(f"solutions.{Path(lab['__file__']).stem}")
    for name in holes:
        lab[name] = getattr(solutions, name)
