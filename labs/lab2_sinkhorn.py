"""Lab 2: Sinkhorn-Knopp gives every prototype the same share of the batch, by nothing but divisions.

    python labs/lab2_sinkhorn.py               # with your code in the two holes
    python labs/lab2_sinkhorn.py --solution    # with ours

Your iteration replaces that of `train.sinkhorn_knopp`, and a training with it must log what one with the real
function logs. Expect two tables, as in labs/lab2_sinkhorn.md, and a picture of the matrix Q,
runs/labs/lab2.png. The first table and the picture take a moment, the second five trainings of 60 steps.
"""

from functools import partial

import torch
from PIL import Image
from workbench import final_metrics, max_error, print_table, run_lab, run_trial, save_png

import losses
import train
from data import make_loader
from evals.tiles import contact_sheet
from sources import open_source

TAU = 0.02  # the teacher temperature of the laptop preset
K = 64  # prototypes in the picture, where the 256 of the laptop preset would be too many to see


def sinkhorn_iteration(Q):
    """Divide each column of Q by its sum, then each row of the result by its own sum.

    Q (n, K), all above 0 -> (n, K): Q_ik <- Q_ik / sum_i Q_ik, then Q_ik <- Q_ik / sum_k Q_ik.
    """
    raise NotImplementedError("hole 1 in sinkhorn_iteration(): divide each column, then each row by its sum")


def prototypes_in_use(Q):
    """Targets Q (n, K) -> a number in 1...K: exp(S(q)), where q is the mean row of Q.

    S(q) = -sum_k q_k ln q_k, the entropy; torch.special.entr(q) is -q ln q.
    """
    raise NotImplementedError("hole 2 in prototypes_in_use(): return exp(S(q)) of the mean row q")


# ---------------------------------------------------------------- targets, made of logits (n, K)


def your_sinkhorn(logits, tau, iterations=3, fused=False):
    """losses.sinkhorn_knopp, with your iteration. exp overflows unless columns lose their largest logit."""
    logits = logits.float() / tau
    Q = torch.exp(logits - logits.amax(dim=0, keepdim=True))
    for _ in range(iterations):
        Q = sinkhorn_iteration(Q)
    return Q


def softmax_targets(logits, tau, fused=False):
    """Sinkhorn-Knopp without the columns: a softmax, which makes targets but balances nothing."""
    return (logits.float() / tau).softmax(dim=-1)


# ---------------------------------------------------------------- a look at the matrix


def teacher_logits(args, images):
    """The scores of an untrained teacher for the two global crops of each image: (2 images, K)."""
    settings = [f"dino.head_n_prototypes={K}", f"train.batch_size_per_gpu={images}"]
    trial = run_trial(args, *settings, steps=0)
    batch = next(make_loader(trial.cfg, open_source(trial.cfg.train.dataset_path), "cpu"))
    with torch.no_grad():
        cls = trial.backbone(batch["globals"]).cls
        logits, _ = trial.state.ema.heads(cls, cls[:0])  # no patches
    return logits


def draw_matrix(Q):
    """Q (n, K) as a picture: a line per crop, a column per prototype. Dark is large, on a square-root scale.

    The bars below are the sums of the columns; the red line is the equal share n / K.
    """
    scale = 3  # pixels of an entry
    bar_room = 40  # lines
    shares = Q.sum(dim=0) * K / len(Q)  # 1: an equal share, which takes a quarter of the room
    bars = torch.arange(bar_room, 0, -1)[:, None] <= shares * bar_room / 4
    grey = torch.cat([1 - Q.clamp(0, 1).sqrt(), torch.ones(4, K), 1 - 0.6 * bars])
    rgb = (255 * grey).byte()[..., None].repeat(1, 1, 3)
    rgb[-bar_room // 4] = torch.tensor([200, 50, 40], dtype=torch.uint8)
    return Image.fromarray(rgb.numpy()).resize((scale * K, scale * len(rgb)), Image.NEAREST)


def compare_targets(logits):
    """Targets made of logits (n, K) in seven ways: prints a table, draws a picture."""
    targets = {
        "softmax": softmax_targets(logits, TAU),
        "centering": softmax_targets(logits - logits.mean(dim=0), TAU),
        "0 iterations": your_sinkhorn(logits, TAU, 0),
        "1 iteration": your_sinkhorn(logits, TAU, 1),
        "2 iterations": your_sinkhorn(logits, TAU, 2),
        "3 iterations": your_sinkhorn(logits, TAU, 3),
        "10 iterations": your_sinkhorn(logits, TAU, 10),
    }
    n = len(logits)
    print(f"{n} crops, {K} prototypes, tau {TAU}: an equal share is {n / K:g} crops per prototype")
    results = {}
    for name, Q in targets.items():
        row_sums = Q.sum(dim=1)
        results[name] = {
            "smallest row": row_sums.min(),
            "largest row": row_sums.max(),
            "busiest / equal share": Q.sum(dim=0).max() * K / n,
            "in use": prototypes_in_use(Q / row_sums[:, None]),
        }
    print_table("targets", results)
    pictures = [draw_matrix(Q) for Q in targets.values()]
    save_png(contact_sheet([pictures], captions=[list(targets)]), "lab2.png")


def check_holes(checker, yours, softmax, truth):
    """Targets by your function, by a softmax (the control), and by the real function, of the same logits."""
    errors = [max_error(Q, truth) for Q in (yours, softmax)]
    checker.check("hole 1 differs from losses.sinkhorn_knopp by", *errors, high=1e-5, instant=True)
    one_each = torch.eye(K)
    one_for_all = one_each[:1].repeat(K, 1)
    in_use = [float(prototypes_in_use(Q)) for Q in (one_each, one_for_all)]
    checker.check("hole 2 where each crop has its own prototype", *in_use, 63.9, 64.1, instant=True)
    in_use = [float(prototypes_in_use(Q)) for Q in (yours, softmax)]
    checker.check("prototypes in use", *in_use, low=50)


# ---------------------------------------------------------------- five trainings

METHODS = {
    "the real one": losses.sinkhorn_knopp,
    "yours": your_sinkhorn,
    "0 iterations": partial(your_sinkhorn, iterations=0),
    "softmax": softmax_targets,
    "centering": None,  # a moving centre instead
}
DIFFERENCE = "largest difference"  # in the loss of a step, between a run and the real one


def train_one(args, name, method):
    centering = [] if method else ["train.centering=centering"]
    train.sinkhorn_knopp = method
    return run_trial(args, *centering, steps=60, name=name)


def main(checker, args):
    logits = teacher_logits(args, images=4 if args.short else 64)
    truth = losses.sinkhorn_knopp(logits, TAU)
    check_holes(checker, your_sinkhorn(logits, TAU), softmax_targets(logits, TAU), truth)
    compare_targets(logits)
    trials = {name: train_one(args, name, method) for name, method in METHODS.items()}
    results = {name: final_metrics(trial) for name, trial in trials.items()}
    real = trials["the real one"].rows
    for name, trial in trials.items():
        results[name][DIFFERENCE] = max(abs(a["loss"] - b["loss"]) for a, b in zip(trial.rows, real))
    print_table("run", results)

    def check(claim, metric, **bounds):
        checker.check(f"yours: {claim}", results["yours"][metric], results["softmax"][metric], **bounds)

    check("largest difference in the loss of a step", DIFFERENCE, high=0.1)
    check("entropy_mean, all prototypes are in use", "entropy_mean", low=0.9)


if __name__ == "__main__":
    run_lab(main, __doc__, ["sinkhorn_iteration", "prototypes_in_use"], globals())
