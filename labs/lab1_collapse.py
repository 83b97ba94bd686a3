"""Lab 1: break the balance of centering and sharpening on purpose, and watch what the loss says about it.

    python labs/lab1_collapse.py               # with your code in the three holes
    python labs/lab1_collapse.py --solution    # with ours

What is unusual here: your functions are the ones that train. They take the place of `losses.Centering` and of
the entropies that `train.py` logs. Expect six trainings of 100 steps, the table of labs/lab1_collapse.md, and
a picture, runs/labs/lab1.png.
"""

import math
from functools import partial

import torch
from workbench import curves, knn, last, run, save, table, trial

import losses
import train
from evals.visualize import page


def centred(logits, center, tau):
    """Targets by centering and sharpening: p = softmax((z - c) / tau) of each row.

    logits z (n, K), center c (1, K), tau a number -> probabilities (n, K).
    """
    raise NotImplementedError("hole 1 in centred(): return softmax((z - c) / tau), row by row")


def moved(center, mean, momentum):
    """The centre after a step, given the mean logit of that step: c <- m c + (1 - m) mean. All are (1, K)."""
    raise NotImplementedError("hole 2 in moved(): return m c + (1 - m) mean")


def entropies(targets):
    """How sure is a target, and how many prototypes are in use? targets p (n, K) -> two numbers in 0...1.

    With S(q) = -sum_k q_k ln q_k: the mean of S(p_i) over the rows, and S of the mean row; both over ln K.
    Beware of 0 ln 0, which is 0: torch.special.entr(q) is -q ln q.
    """
    raise NotImplementedError("hole 3 in entropies(): return mean(S(p)) / ln K and S(mean(p)) / ln K")


class Mine(losses.Centering):
    """The real one adds up logits for the centre; what is done with them is yours."""

    def targets(self, logits, tau, lazy=False):
        super().targets(logits, tau)  # for its sums only
        return centred(logits.float(), self.center, tau)

    def update(self, lost=0.0):
        self.center.copy_(moved(self.center, self.total / self.count, self.momentum))
        self.total, self.count = 0, 0


def instruments(targets, *rest):
    entropy, entropy_mean = entropies(targets)
    return losses.collapse_metrics(targets, *rest) | dict(entropy=entropy, entropy_mean=entropy_mean)


def check_holes(desk):
    """Each function against the real one, on random logits. The control: the same without its effect."""
    z, real = torch.randn(64, 256), losses.Centering(256)
    c = real.center.normal_().clone()
    p = real.targets(z, 0.1)
    off = [(centred(z, x, 0.1) - p).abs().max().item() for x in (c, 0 * c)]
    desk.check("hole 1 differs from losses.Centering by", *off, high=1e-5, instant=True)
    real.update()
    off = [(moved(c, z.mean(0, keepdim=True), m) - real.center).abs().max().item() for m in (0.9, 1)]
    desk.check("hole 2 differs from losses.Centering by", *off, high=1e-5, instant=True)
    truth = torch.stack([losses.collapse_metrics(p, z, z)[key] for key in ("entropy", "entropy_mean")])
    off = [(torch.tensor(entropies(q)) - truth).abs().max().item() for q in (p, z.softmax(-1))]
    desk.check("hole 3 differs from losses.diagnose by", *off, high=1e-5, instant=True)


# ---------------------------------------------------------------- six trainings

NO_KOLEO = "dino.koleo_loss_weight=0"
RUNS = {  # temperature of the teacher, momentum of the centre (1: it stays at zero), further settings
    "healthy": (0.04, 0.9),
    "no centering": (0.04, 1.0),
    "no sharpening": (1.0, 0.9),
    "no EMA": (0.04, 0.9, "teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0"),
    "healthy, no KoLeo": (0.04, 0.9, NO_KOLEO),
    "no centering, no KoLeo": (0.04, 1.0, NO_KOLEO),
}


def main(desk, seed, short):
    train.collapse_metrics = instruments
    check_holes(desk)
    steps, small, limit = (2, ["train.batch_size_per_gpu=8"], 40) if short else (100, [], 0)
    runs, rows = {}, [["run", "DINO loss", "entropy", "entropy_mean", "rank", "k-NN"]]
    for name, (tau, momentum, *settings) in RUNS.items():
        train.Centering = partial(Mine, momentum=momentum)
        settings += [f"teacher.{key}={tau}" for key in ("warmup_teacher_temp", "teacher_temp")]
        settings += ["train.centering=centering", *small]
        x = runs[name] = trial(*settings, steps=steps, seed=seed, name=name)
        seen = [last(x, key) for key in ("loss_dino", "entropy", "entropy_mean", "rank")]
        rows.append([name, *seen, knn(x, limit)])
    below = [[curves(key, runs, key)] for key in ("entropy", "entropy_mean")]
    save(page([[curves("DINO loss / ln K", runs, "loss_dino", math.log(256))], *below]), "lab1.png")
    table(*rows)
    got = {name: dict(zip(rows[0][1:], numbers)) for name, *numbers in rows[1:]}

    def check(name, what, control, **bounds):
        desk.check(f"{name}: {what}", got[name][what], got[control][what], **bounds)

    check("no centering", "entropy_mean", "healthy", high=0.1)
    check("no centering", "DINO loss", "healthy", high=1)
    check("no sharpening", "entropy", "healthy", low=0.97)
    check("no EMA", "entropy", "healthy", high=0.6)
    check("no centering", "k-NN", "no centering, no KoLeo", low=0.22)


if __name__ == "__main__":
    run(main, __doc__, ["centred", "moved", "entropies"], globals())
