"""The linear probe: how much of the classes can one linear map read off frozen features?

    python eval_linear.py --weights runs/laptop                 # compare it with --weights random:runs/laptop
    python eval_linear.py --weights runs/laptop --predict photo.jpg
    python eval_linear.py --weights dinov2_vits14_reg4 --head dinov2_vits14_reg4_linear_head.pth \\
        --train folder:/data/train --test folder:/data/val                  # one of Meta's heads, not trained

The published grid (DINOv2, appendix B.3): {last block, last 4} x {[CLS], [CLS] + mean patch} x 13 learning
rates. Prints the grid and the best probe's accuracy beside k-NN's, and keeps the probe for --predict.

What is unusual here: the 13 probes of one input are one matrix, trained by a gradient that needs no autograd
(for softmax regression it is p - y). Features are computed once, without augmentation, and kept. The best of
the 52 is chosen on a tenth of the *training* images; the published protocol chooses on those it reports.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import config
from config import UserError
from data import normalize
from eval_knn import chance, eval_flags, eval_sets, knn_accuracy, labelled
from features import EvalImages, batches, fingerprint, name_of, open_photos, open_weights, weights_flags
from model import describe
from runfolder import in_one_act, replace

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # for a batch of 256
SAVE_EVERY = 20  # seconds


# ---------------------------------------------------------------- what a probe sees


def inputs(backbone, pixels):
    """uint8 (b, 3, S, S) -> (b, 5 D): [CLS] of the last 4 blocks, in order, and the mean patch of the last.

    All after the final norm; each input of the grid is a slice. Networks of fewer than 4 blocks: (b, 2 D).
    """
    depth = len(backbone.blocks)
    layers = range(depth - 4 if depth >= 4 else depth - 1, depth)
    tokens = backbone.intermediate(normalize(pixels.to(backbone.norm.weight.device)), layers)
    return torch.cat([*(t.cls for t in tokens), tokens[-1].patches.mean(1)], dim=1).float().cpu()


def kinds(backbone):
    """{name: the columns of `inputs`}; Meta's heads of 1 and of 4 layers have the second and the last."""
    D = backbone.embed_dim
    end = 5 * D if len(backbone.blocks) >= 4 else 2 * D
    one = {"1 block, CLS": slice(end - 2 * D, end - D), "1 block, CLS + mean": slice(end - 2 * D, end)}
    four = {"4 blocks, CLS": slice(0, 4 * D), "4 blocks, CLS + mean": slice(0, 5 * D)}
    return one | (four if end == 5 * D else {})


@torch.no_grad()
def read_out(backbone, images, batch_size, num_workers):
    """EvalImages -> inputs (n, 5 D) and labels (n,) of those that have a label."""
    parts = [(inputs(backbone, x), y) for x, y, _ in batches(images, batch_size, num_workers) if len(x)]
    if not parts:
        raise UserError("none of these images can be read")
    return labelled(*(torch.cat(p) for p in zip(*parts)))


# ---------------------------------------------------------------- all probes at once


def new_grid(columns, classes, rates, seed=0):
    """{kind: weight (R, C, d), bias (R, C) and their momenta} for R learning rates: N(0, 0.01), zeros."""
    rng, grid = torch.Generator().manual_seed(seed), {}
    for kind, part in columns.items():
        shape = rates, classes, part.stop - part.start
        weight = (
            torch.randn(shape[1:], generator=rng).mul(0.01).expand(shape).clone()
        )  # all rates start alike
        grid[kind] = [weight, torch.zeros(shape[:2]), torch.zeros(shape), torch.zeros(shape[:2])]
    return grid


def sgd_step(x, y, state, rates):
    """One step of R softmax regressions on the same batch, x (b, d), y (b,), rates (R,): momentum 0.9."""
    weight, bias, weight_momentum, bias_momentum = state
    R, C, d = weight.shape
    logits = (x @ weight.view(R * C, d).T).view(-1, R, C) + bias
    error = (logits.softmax(-1) - F.one_hot(y, C)[:, None]) / len(x)  # (b, R, C), the gradient of the logits
    weight_momentum.mul_(0.9).add_((error.flatten(1).T @ x).view(R, C, d))
    bias_momentum.mul_(0.9).add_(error.sum(0))
    weight.sub_(rates[:, None, None] * weight_momentum)
    bias.sub_(rates[:, None] * bias_momentum)


def train(x, y, classes, columns, iterations, batch_size, out, job):
    """The whole grid -> {kind: (weight, bias)}; saved in `out` on the way, goes on there if `job` agrees."""
    batch_size = min(batch_size, len(x))
    rates, file, first = torch.tensor(RATES) * batch_size / 256, out / "grid.pth", 0
    grid = new_grid(columns, classes, len(rates))
    if file.exists():
        saved = torch.load(file, weights_only=True)
        if saved["job"] != job:
            raise UserError(f"{out} holds another probe, half trained: delete {file} or name another --out")
        first, grid = saved["step"], saved["grid"]
    per_epoch, since = len(x) // batch_size, time.monotonic()
    for step in range(first, iterations):
        rng = torch.Generator().manual_seed(
            step // per_epoch
        )  # the order of an epoch is a function of its number
        order = torch.randperm(len(x), generator=rng)
        batch = order[step % per_epoch * batch_size :][:batch_size]
        now = rates * 0.5 * (1 + math.cos(math.pi * step / iterations))
        for kind, part in columns.items():
            sgd_step(x[batch][:, part], y[batch], grid[kind], now)
        if time.monotonic() - since > SAVE_EVERY or step == iterations - 1:
            with in_one_act(file) as f:
                torch.save(dict(job=job, step=step + 1, grid=grid), f)
            since = time.monotonic()
    return {kind: state[:2] for kind, state in grid.items()}


def accuracies(x, y, weight, bias):
    """x (n, d), y (n,), weight (R, C, d), bias (R, C) -> (R,) in 0...1."""
    hits = [((x @ w.T + b).argmax(-1) == y).float().mean() for w, b in zip(weight, bias)]
    return torch.stack(hits)


# ---------------------------------------------------------------- heads in files


def read_head(path, backbone):
    """A head in Meta's layout, {weight (C, d), bias (C,)} -> weight, bias, the columns it sees, its classes.

    Raises UserError for what is no such file, or is of another width of backbone.
    """
    try:
        head = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = head["weight"].float(), head["bias"].float()
        classes, width = weight.shape
        assert bias.shape == (classes,)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train a probe first, or give --head") from None
    except Exception as e:
        raise UserError(f"{path} is no linear head with weight (C, d) and bias (C,): {e!r}") from None
    fits = {part.stop - part.start: part for part in kinds(backbone).values()}
    if width not in fits:
        known = ", ".join(map(str, fits))
        raise UserError(f"{path} sees {width} numbers, a {describe(backbone)} gives {known}: wrong head")
    about = Path(path).with_suffix(".json")
    names = json.loads(about.read_text())["classes"] if about.exists() else None
    return weight, bias, fits[width], names or list(range(classes))


def write_head(out, weight, bias, classes, about):
    """head.pth, bare as Meta's, and head.json beside it: what the columns mean."""
    with in_one_act(out / "head.pth") as f:
        torch.save({"weight": weight.clone(), "bias": bias.clone()}, f)
    replace(out / "head.json", json.dumps(about | dict(classes=[str(c) for c in classes]), indent=1))


# ---------------------------------------------------------------- the two things one does


def fit(bank, queries, columns, classes, iterations, batch_size, out, job):
    """Train the grid on nine tenths of the bank, choose on the rest, report on the queries, print, save.

    bank, queries: (inputs (n, 5 D), labels (n,)); classes: their names, in the order of the labels; job: what
    a half-trained grid must agree in -> {name: accuracy}. Raises UserError for labels without a class.
    """
    (x, y), (q, truth) = bank, queries
    if max(y.max(), truth.max()) >= len(classes):
        raise UserError(f"there is a label {int(max(y.max(), truth.max()))}, but only {len(classes)} classes")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, used = order[: max(len(x) // 10, 1)], order[max(len(x) // 10, 1) :]
    grid = train(x[used], y[used], len(classes), columns, iterations, batch_size, out, job)
    print("accuracy on held-out training images\n" + " " * 22 + "".join(f"{r:>8g}" for r in RATES))
    best = (-1.0, "", 0)
    for kind, part in columns.items():
        row = accuracies(x[held][:, part], y[held], *grid[kind])
        print(f"{kind:22s}" + "".join(f"{a:8.3f}" for a in row))
        best = max(best, (row.max().item(), kind, row.argmax().item()))
    _, kind, r = best
    weight, bias = (v[r] for v in grid[kind])
    cls = columns["1 block, CLS"]
    result = dict(linear_top1=accuracies(q[:, columns[kind]], truth, weight[None], bias[None]).item(),
                  knn_top1=knn_accuracy(x[:, cls], y, q[:, cls], truth, ks=(20,)).popitem()[1],
                  chance=chance(truth))  # fmt: skip
    write_head(out, weight, bias, classes, dict(result, input=kind, rate=RATES[r]))
    print(f"linear ({kind}, rate {RATES[r]:g})  {result['linear_top1']:.3f}   on the test images")
    print(f"k-NN (k = 20, CLS)  {result['knn_top1']:.3f}\nchance  {result['chance']:.3f}")
    print(f"wrote {out}/head.pth")
    return result


@torch.no_grad()
def predict(backbone, images, weight, bias, part, names):
    """Prints the three likeliest classes of each image."""
    for x, _, numbers in batches(images, 16):
        probabilities = (inputs(backbone, x)[:, part] @ weight.T + bias).softmax(-1) if len(x) else ()
        for i, p in zip(numbers, probabilities):
            best = p.topk(min(3, len(names)))
            said = ", ".join(f"{names[c]} {v:.0%}" for v, c in zip(best.values, best.indices))
            print(f"{name_of(images.dataset, i)}: {said}")
    for why in images.bad.values():
        print("left out:", why)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    weights_flags(parser)
    eval_flags(parser)
    add("--iterations", type=int, default=2500, help="steps of SGD (published: 12500)")
    add("--batch-size", type=int, default=256, help="the learning rates are for 256, and follow it")
    add("--out", type=Path, help="folder of the probe (default: linear/ in the run, or here)")
    add("--head", type=Path, help="evaluate this head instead of training one")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or shards to classify")
    args = parser.parse_args()
    photos = open_photos(args.predict) if args.predict else None
    backbone, cfg = open_weights(args.weights, args.download)
    e = cfg.evaluation
    if args.image_size:
        e.image_size = e.resize_size = args.image_size
    own = Path(args.weights)
    out = args.out or (own / "linear" if own.is_dir() else Path("linear"))
    if photos:
        size = e.image_size or cfg.crops.global_crops_size
        images = EvalImages(photos, size, e.resize_size)
        return predict(backbone, images, *read_head(args.head or out / "head.pth", backbone))
    bank, queries = eval_sets(cfg, args.train, args.test, args.limit)
    how = dict(batch_size=e.batch_size, num_workers=cfg.train.num_workers)
    q, truth = read_out(backbone, queries, **how)
    print(f"{args.weights}: {describe(backbone)}; {len(bank)} training images, {len(q)} test images")
    if args.head:
        weight, bias, part, _ = read_head(args.head, backbone)
        accuracy = accuracies(q[:, part], truth, weight[None], bias[None]).item()
        print(f"{args.head}: top-1 accuracy {accuracy:.3f}")
        return None
    x, y = read_out(backbone, bank, **how)
    for why in [*bank.bad.values(), *queries.bad.values()]:
        print("left out:", why)
    classes = bank.dataset.classes or range(int(max(y.max(), truth.max())) + 1)
    how = args.iterations, args.batch_size
    job = fingerprint(backbone, bank, how)
    fit((x, y), (q, truth), kinds(backbone), classes, *how, out, job)


if __name__ == "__main__":
    config.run(main)
