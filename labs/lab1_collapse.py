"""Lab 1: break the balance of centering and sharpening on purpose, and see whether the loss notices.

    python labs/lab1_collapse.py               # with your code in the three holes
    python labs/lab1_collapse.py --solution    # with ours

Your functions do the training: they replace those of `losses.Centering`, and the entropies that `train.py`
logs. Expect six trainings of 100 steps, the table of labs/lab1_collapse.md, and runs/labs/lab1.png.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from workbench import curves, final_metrics, knn_top1, max_error, print_table, run_lab, run_trial, save_png

import losses
import train
from evals.tiles import contact_sheet


def center_and_sharpen(logits, center, tau):
    """Targets p = softmax((z - c) / tau) of each row.

    logits z (n, K), center c (1, K), temperature tau, a number -> probabilities (n, K).
    """
    raise NotImplementedError("hole 1 in center_and_sharpen(): return softmax((z - c) / tau), row by row")


def move_center(center, mean, momentum):
    """The centre after a step, given the mean logit of that step: c <- m c + (1 - m) mean. All are (1, K)."""
    raise NotImplementedError("hole 2 in move_center(): return m c + (1 - m) mean")


def entropies(targets):
    """How sure is a target, and how many prototypes are in use? targets p (n, K) -> two numbers in 0...1.

    With S(q) = -sum_k q_k ln q_k: the mean of S(p_i) over the rows, and S of the mean row; both over ln K.
    Beware of 0 ln 0, which is 0: torch.special.entr(q) is -q ln q.
    """
    raise NotImplementedError("hole 3 in entropies(): return mean(S(p)) / ln K and S(mean(p)) / ln K")


# ---------------------------------------------------------------- your functions, put to work


class YourCentering(losses.Centering):
    """The parent adds up the logits of a step; your functions make targets and a centre of them."""

    def targets(self, logits, tau, fused=False):
        super().targets(logits, tau)  # for its sums only
        return center_and_sharpen(logits.float(), self.center, tau)

    def update(self, found_inf=0.0):
        self.center.copy_(move_center(self.center, self.total / self.count, self.momentum))
        self.total = 0
        self.count = 0


def your_metrics(targets, *rest):
    metrics = losses.collapse_metrics(targets, *rest)
    metrics["entropy"], metrics["entropy_mean"] = entropies(targets)
    return metrics


def check_holes(checker):
    """Each function against the real one, on random logits. The control is the same without its effect."""
    logits = torch.randn(64, 256)
    centering = losses.Centering(256)
    center = centering.center.normal_().clone()

    targets = centering.targets(logits, 0.1)
    error = max_error(center_and_sharpen(logits, center, 0.1), targets)
    uncentered = max_error(center_and_sharpen(logits, 0 * center, 0.1), targets)
    checker.check("hole 1 differs from losses.Centering by", error, uncentered, high=1e-5, instant=True)

    centering.update()
    mean = logits.mean(0, keepdim=True)
    error = max_error(move_center(center, mean, 0.9), centering.center)
    unmoved = max_error(move_center(center, mean, 1), centering.center)
    checker.check("hole 2 differs from losses.Centering by", error, unmoved, high=1e-5, instant=True)

    metrics = losses.collapse_metrics(targets, logits, logits)
    truth = torch.stack([metrics["entropy"], metrics["entropy_mean"]])
    error = max_error(torch.tensor(entropies(targets)), truth)
    unsharpened = max_error(torch.tensor(entropies(logits.softmax(-1))), truth)
    claim = "hole 3 differs from losses.collapse_metrics by"
    checker.check(claim, error, unsharpened, high=1e-5, instant=True)


# ---------------------------------------------------------------- six trainings


class Run(NamedTuple):
    teacher_temp: float  # tau
    momentum: float  # of the centre; 1: it stays at zero
    settings: tuple = ()


NO_EMA = ("teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0")
NO_KOLEO = ("dino.koleo_loss_weight=0",)
RUNS = {
    "healthy": Run(0.04, 0.9),
    "no centering": Run(0.04, 1.0),
    "no sharpening": Run(1.0, 0.9),
    "no EMA": Run(0.04, 0.9, NO_EMA),
    "healthy, no KoLeo": Run(0.04, 0.9, NO_KOLEO),
    "no centering, no KoLeo": Run(0.04, 1.0, NO_KOLEO),
}


def train_one(args, name, run):
    train.Centering = partial(YourCentering, momentum=run.momentum)
    temps = [f"teacher.{key}={run.teacher_temp}" for key in ("warmup_teacher_temp", "teacher_temp")]
    return run_trial(args, "train.centering=centering", *temps, *run.settings, steps=100, name=name)


def main(checker, args):
    train.collapse_metrics = your_metrics
    check_holes(checker)
    trials = {name: train_one(args, name, run) for name, run in RUNS.items()}
    results = {name: final_metrics(trial) for name, trial in trials.items()}
    for name, trial in trials.items():
        results[name]["k-NN"] = knn_top1(trial, args)

    plots = [[curves(metric, trials, metric)] for metric in ("entropy", "entropy_mean")]
    plots.insert(0, [curves("DINO loss / ln K", trials, "loss_dino", math.log(256))])
    save_png(contact_sheet(plots), "lab1.png")
    print_table("run", results)

    def check(name, metric, control, **bounds):
        checker.check(f"{name}: {metric}", results[name][metric], results[control][metric], **bounds)

    check("no centering", "entropy_mean", "healthy", high=0.1)
    check("no centering", "DINO loss", "healthy", high=1)
    check("no sharpening", "entropy", "healthy", low=0.97)
    check("no EMA", "entropy", "healthy", high=0.6)
    check("no centering", "k-NN", "no centering, no KoLeo", low=0.22)


if __name__ == "__main__":
    run_lab(main, __doc__, ["center_and_sharpen", "move_center", "entropies"], globals())
