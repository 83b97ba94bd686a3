"""Lab 2: Sinkhorn-Knopp gives every prototype the same share of the batch, by nothing but divisions.

    python labs/lab2_sinkhorn.py               # with your code in the two holes
    python labs/lab2_sinkhorn.py --solution    # with ours

What is unusual here: your division takes the place of `train.sinkhorn_knopp`, and the training that uses it
must log what the real one logs. Expect two tables, as in labs/lab2_sinkhorn.md, and a picture of the matrix
Q, runs/labs/lab2.png. The first table and the picture take a moment, the second five trainings of 60 steps.
"""

from functools import partial

import torch
from PIL import Image
from workbench import last, run, save, table, trial

import losses
import train
from data import make_loader
from evals.visualize import page
from sources import open_source

TAU, K = 0.02, 64  # the laptop preset's teacher temperature; fewer prototypes than its 256, to be seen


def balanced(Q):
    """One iteration: divide each column of Q by its sum, then each row of the result by its own sum.

    Q (n, K), all above 0 -> (n, K): Q_ik <- Q_ik / sum_i Q_ik, then Q_ik <- Q_ik / sum_k Q_ik.
    """
    raise NotImplementedError("hole 1 in balanced(): divide each column by its sum, then each row by its sum")


def in_use(Q):
    """How many prototypes are in use? targets Q (n, K) -> a number in 1...K: exp(S(q)), q the mean row of Q.

    S(q) = -sum_k q_k ln q_k, the entropy; torch.special.entr(q) is -q ln q.
    """
    raise NotImplementedError("hole 2 in in_use(): return exp(S(q)) of the mean row q")


def mine(logits, tau, iterations=3, lazy=False):
    """The signature of losses.sinkhorn_knopp. Without the largest logit of each column, exp may overflow."""
    z = logits.float() / tau
    Q = torch.exp(z - z.amax(dim=0, keepdim=True))
    for _ in range(iterations):
        Q = balanced(Q)
    return Q


def only_rows(logits, tau, iterations=3, lazy=False):
    """What is left without the columns: a softmax, which makes targets but balances nothing."""
    return (logits.float() / tau).softmax(dim=-1)


# ---------------------------------------------------------------- the matrix, seen


def teacher_logits(seed, B):
    """What an untrained teacher says of B images' two global crops: (2B, K)."""
    small = [f"dino.head_n_prototypes={K}", f"train.batch_size_per_gpu={B}"]
    _, t, cfg = trial(*small, steps=0, seed=seed)
    crops = next(make_loader(cfg, open_source(cfg.train.dataset_path), "cpu"))["globals"]
    with torch.no_grad():
        cls = t.ema.backbone(crops).cls
        return t.ema.heads(cls, cls[:0])[0]


def draw(Q, scale=3, high=40):
    """Q (n, K) as a picture: a line per crop, a column per prototype, dark is large (square roots, or one
    would see little). Below, what each column sums to; the red line is the equal share n / K."""
    sums = Q.sum(dim=0) * K / len(Q) * high / 4  # an equal share is a quarter of the bars' room
    bars = torch.arange(high, 0, -1)[:, None] <= sums
    grey = torch.cat([1 - Q.clamp(0, 1).sqrt(), torch.ones(4, K), 1 - 0.6 * bars])
    rgb = (255 * grey).byte()[..., None].repeat(1, 1, 3)
    rgb[-high // 4] = torch.tensor([200, 50, 40], dtype=torch.uint8)
    return Image.fromarray(rgb.numpy()).resize((scale * K, scale * len(rgb)), Image.NEAREST)


def look(desk, seed, B):
    """The matrix of 2B crops, balanced in several ways: a table, a picture, the checks of both holes."""
    z = teacher_logits(seed, B)
    ways = {f"{i} iteration{'s' * (i != 1)}": mine(z, TAU, i) for i in (0, 1, 2, 3, 10)}
    ways = {"softmax": only_rows(z, TAU), "centering": only_rows(z - z.mean(dim=0), TAU)} | ways
    print(f"{2 * B} crops, {K} prototypes, tau {TAU}: an equal share is {2 * B / K:g} crops per prototype")
    rows = [["targets", "smallest row", "largest row", "busiest / equal share", "in use"]]
    for name, Q in ways.items():
        sums, busiest = Q.sum(dim=1), Q.sum(dim=0).max() * K / len(Q)
        rows.append([name, sums.min(), sums.max(), busiest, in_use(Q / sums[:, None])])
    table(*rows)
    save(page([[draw(Q) for Q in ways.values()]], captions=[list(ways)]), "lab2.png")
    Q, plain = ways["3 iterations"], ways["softmax"]
    off = [(x - losses.sinkhorn_knopp(z, TAU)).abs().max().item() for x in (Q, plain)]
    desk.check("hole 1 differs from losses.sinkhorn_knopp by", *off, high=1e-5, instant=True)
    each, same = torch.eye(K), torch.eye(K)[:1].repeat(K, 1)  # a prototype for each crop, one for all
    used = [float(in_use(x)) for x in (each, same)]
    desk.check("hole 2 where each crop has its own prototype", *used, 63.9, 64.1, instant=True)
    desk.check("prototypes in use", *map(float, map(in_use, (Q, plain))), low=50)


def main(desk, seed, short):
    steps, small, B = (2, ["train.batch_size_per_gpu=8"], 4) if short else (60, [], 64)
    look(desk, seed, B)
    real, none = losses.sinkhorn_knopp, partial(mine, iterations=0)
    names = "the real one", "yours", "0 iterations", "softmax", "centering"
    runs, rows = {}, [["run", "DINO loss", "entropy", "entropy_mean", "rank", "largest difference"]]
    for name, balance in zip(names, (real, mine, none, only_rows, real)):
        train.sinkhorn_knopp = balance
        how = ["train.centering=centering"] * (name == "centering")
        x = runs[name] = trial(*how, *small, steps=steps, seed=seed, name=name)
        off = max(abs(a["loss"] - b["loss"]) for a, b in zip(x.rows, runs["the real one"].rows))
        rows.append([name, *(last(x, key) for key in ("loss_dino", "entropy", "entropy_mean", "rank")), off])
    table(*rows)
    _, _, yours, _, softmax, _ = rows
    desk.check("yours: largest difference in the loss of a step", yours[-1], softmax[-1], high=0.1)
    desk.check("yours: entropy_mean, all prototypes are in use", yours[3], softmax[3], low=0.9)


if __name__ == "__main__":
    run(main, __doc__, ["balanced", "in_use"], globals())
