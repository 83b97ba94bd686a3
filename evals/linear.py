"""The linear probe: how much of the classes can one linear map read off frozen features?

    python eval_linear.py --weights runs/laptop                        # trains it, on the run's own images
    python eval_linear.py --weights runs/laptop --predict photo.jpg    # uses it
    python eval_linear.py --weights dinov2_vits14_reg4 --head dinov2_vits14_reg4_linear_head.pth \\
        --test folder:/data/val                                        # one of Meta's heads instead

The published grid (DINOv2, appendix B.3): {last block, last 4} x {[CLS], [CLS] + mean patch} x 13 learning
rates, all trained at once. Prints the grid, and linear and k-NN accuracy beside those of an untrained
network. Kept are head.pth, in Meta's layout, and head.json, which says what it sees and what it names.

What is unusual here: the 13 probes of one input are one matrix, and need no autograd (the gradient of softmax
regression is p - y). Features are computed once and kept: 20 D bytes per image, 10 GB for ImageNet and ViT-S;
`--augment` computes them anew for a fresh crop in each epoch, as published. The best of the 52 is chosen on a
tenth of the *training* images; the published protocol chooses it on the very images it reports.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import config
from config import UserError
from data import crop_and_resize, normalize, sample_crop_params, stable_hash
from eval_knn import add_eval_args, keep_labelled, knn_accuracy, majority_accuracy, open_eval_sets
from evals.extract import job_fingerprint
from features import EvalImages, iterate_batches, load_image, read_tensors, untrained_copy
from model import SIZES, describe_backbone
from runfolder import atomic_open, atomic_write_text
from sources import open_images, sample_name, to_tensor
from tools.weights import add_weights_args, open_backbone

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # for a batch of 256
SAVE_EVERY = 20  # seconds of training that a killed job may have to do again
MOST = 100_000  # classes: beyond that a label is no number of a class


# ---------------------------------------------------------------- what a probe sees


@torch.no_grad()
def inputs(backbone, pixels):
    """uint8 (b, 3, S, S) -> (b, 5 D): [CLS] of the last 4 blocks in order, then the mean patch of the last,
    all after the final norm. A network of less than 4 blocks: (b, 2 D), of its last."""
    depth = len(backbone.blocks)
    layers = range(depth - (4 if depth >= 4 else 1), depth)
    tokens = backbone.intermediate(normalize(pixels.to(backbone.norm.weight.device)), layers)
    return torch.cat([*(t.cls for t in tokens), tokens[-1].patches.mean(1)], dim=1).float()


def columns(backbone):
    """{name: its columns of `inputs`}. Meta's heads of 1 and of 4 layers see the second and the fourth."""
    D = backbone.embed_dim
    end = 5 * D if len(backbone.blocks) >= 4 else 2 * D
    one = {"1 block, CLS": slice(end - 2 * D, end - D), "1 block, CLS + mean": slice(end - 2 * D, end)}
    four = {"4 blocks, CLS": slice(0, 4 * D), "4 blocks, CLS + mean": slice(0, 5 * D)}
    return one | four if end == 5 * D else one


def width(part):
    return part.stop - part.start


def read_out(backbone, images, batch_size=256, num_workers=0):
    """EvalImages -> inputs (n, 5 D), labels (n,), numbers (n,) of what is readable and has a label."""
    found = iterate_batches(images, batch_size, num_workers)
    parts = [(inputs(backbone, x).cpu(), y, torch.tensor(numbers)) for x, y, numbers in found if len(x)]
    if not parts:
        raise UserError("none of these images can be read")
    x, y, numbers = (torch.cat(p) for p in zip(*parts))
    return *keep_labelled(x, y), numbers[y >= 0]


class RandomCrops(Dataset):
    """self[epoch, i] -> a crop of 8 to 100 % of image i, perhaps mirrored, uint8 (3, S, S), and its label: a
    function of the two numbers."""

    def __init__(self, images):
        published = ["crops.global_crops_scale=[0.08, 1]", "crops.local_crops_number=0"]
        self.images, self.crops = images, config.load(overrides=published).crops

    def __getitem__(self, at):
        epoch, i = at
        image, label = load_image(self.images.dataset, self.images.indices[i])
        rng = np.random.default_rng(stable_hash("probe", epoch, i))
        boxes, flips, _ = sample_crop_params(rng, self.crops, *image.size)
        return crop_and_resize(to_tensor(image), boxes[0], self.images.size, flips[0]), label


# ---------------------------------------------------------------- all probes at once


def new_grid(parts, classes, device="cpu"):
    """{kind: [weight (R, C, d), bias (R, C), their momenta]}: N(0, 0.01), alike for all R rates; zeros."""
    grid = {}
    for kind, part in parts.items():
        first = torch.randn(classes, width(part), generator=torch.Generator().manual_seed(0))
        weight = (0.01 * first).expand(len(RATES), -1, -1).clone().to(device)
        bias = torch.zeros(weight.shape[:2], device=device)
        grid[kind] = [weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)]
    return grid


def sgd_step(x, y, state, rates):
    """One step of R softmax regressions, in place: x (b, d), y (b,), rates (R,); momentum 0.9."""
    weight, bias, weight_momentum, bias_momentum = state
    logits = (x @ weight.flatten(0, 1).T).unflatten(1, bias.shape) + bias  # (b, R, C)
    error = logits.softmax(-1)
    error[torch.arange(len(x), device=x.device), :, y] -= 1  # p - y: the gradient of the cross-entropy
    error /= len(x)
    weight_momentum.mul_(0.9).add_((error.flatten(1).T @ x).view_as(weight))
    bias_momentum.mul_(0.9).add_(error.sum(0))
    weight.sub_(rates[:, None, None] * weight_momentum)
    bias.sub_(rates[:, None] * bias_momentum)


def cosine(step, iterations):
    """From 1 at the first step to 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / iterations))


def plan(n, batch_size, first, last):
    """Steps first...last - 1 -> epoch, rows (batch_size,) out of n. The order in an epoch is a function of
    its number, so a killed job goes on with the very batches it would have had."""
    for step in range(first, last):
        epoch, k = divmod(step, n // batch_size)
        if k == 0 or step == first:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        yield epoch, order[k * batch_size :][:batch_size]


def train(grid, parts, stream, iterations, batch_size, file, job):
    """SGD on all probes; `stream(step)` gives batches x (b, 5 D), y (b,) from that step on -> the grid.

    Saved in `file` on the way; goes on from there, bit by bit the same, if it is of the same `job`.
    """
    device, saved = next(iter(grid.values()))[0].device, dict(job=job, step=0, grid=grid)
    if file.exists():
        try:
            saved = torch.load(file, map_location=device, weights_only=True)
        except Exception:  # whatever a damaged file leads to
            saved = dict(job="damaged")
        if saved["job"] != job:
            raise UserError(f"{file} is half a probe of other images, weights or options: delete it")
    grid, first, since = saved["grid"], saved["step"], time.monotonic()
    rates = torch.tensor(RATES, device=device) * batch_size / 256
    for step, (x, y) in enumerate(tqdm(stream(first), total=iterations, initial=first, disable=None), first):
        x, y, now = x.to(device), y.to(device), rates * cosine(step, iterations)
        for kind, part in parts.items():
            sgd_step(x[:, part], y, grid[kind], now)
        if step + 1 == iterations or time.monotonic() - since > SAVE_EVERY:
            with atomic_open(file) as f:
                torch.save(dict(job=job, step=step + 1, grid=grid), f)
            since = time.monotonic()
    return grid


def accuracies(x, y, weight, bias):
    """x (n, d), y (n,), weight (R, C, d), bias (R, C) -> R numbers in 0...1."""
    return [((x @ w.T + b).argmax(-1) == y).float().mean().item() for w, b in zip(weight, bias)]


def choose(grid, parts, x, y):
    """Prints how often each probe is right -> kind and number of the best; of equals, the first."""
    print(f"right on {len(y)} training images held out, by learning rate (for a batch of 256)")
    print(" " * 20 + "".join(f"{r:>7g}" for r in RATES))
    rows = {kind: accuracies(x[:, part], y, *grid[kind][:2]) for kind, part in parts.items()}
    for kind, row in rows.items():
        print(f"{kind:20s}" + "".join(f"{a:7.3f}" for a in row))
    best = max(rows, key=lambda kind: max(rows[kind]))
    r = rows[best].index(max(rows[best]))
    hint = ", the highest: more --iterations may help" if r + 1 == len(RATES) else ""
    print(f"best: {best}, rate {RATES[r]:g}{hint}")
    return best, r


def count_classes(images, y, truth):
    """C, or a UserError if these labels (n,), (m,) of the two sets cannot be learned and tested."""
    names, top = images.dataset.classes, int(max(y.max(), truth.max()))
    C = len(names) if names else int(y.max()) + 1
    if top >= C:
        raise UserError(f"there is a label {top}, but the training images have {C} classes, 0 to {C - 1}")
    if C > MOST:
        raise UserError(f"there is a label {top}: number the classes from 0 on, {MOST:,} at most")
    if len(y) < 10 or len(y.unique()) < 2:
        raise UserError(f"{len(y)} training images of {len(y.unique())} classes: 10 of 2 are the least")
    return C


def fit(backbone, bank, queries, file, iterations, batch_size, augment=False, num_workers=0, k=20):
    """Train the grid on nine tenths of the bank, choose on the rest, test on the queries.

    -> dict of `head` (weight, bias), `input`, `rate`, and the accuracies `linear`, `knn`, `chance`.
    """
    x, y, numbers = read_out(backbone, bank, num_workers=num_workers)
    q, truth, _ = read_out(backbone, queries, num_workers=num_workers)
    C, parts = count_classes(bank, y, truth), columns(backbone)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, used = order[: len(x) // 10], order[len(x) // 10 :]
    batch_size = min(batch_size, len(used))

    def stream(first):
        todo = ((epoch, used[rows]) for epoch, rows in plan(len(used), batch_size, first, iterations))
        if not augment:
            return ((x[rows], y[rows]) for _, rows in todo)
        crops = ([(epoch, i) for i in numbers[rows].tolist()] for epoch, rows in todo)
        loader = DataLoader(RandomCrops(bank), batch_sampler=crops, num_workers=num_workers)
        return ((inputs(backbone, pixels), labels) for pixels, labels in loader)

    job = job_fingerprint(backbone, bank, (iterations, batch_size, augment, y.tolist()))
    grid = new_grid(parts, C, backbone.norm.weight.device)
    grid = train(grid, parts, stream, iterations, batch_size, file, job)
    grid = {kind: [v.cpu() for v in state[:2]] for kind, state in grid.items()}
    kind, r = choose(grid, parts, x[held], y[held])
    weight, bias = (v[r] for v in grid[kind])
    cls = parts["1 block, CLS"]
    return dict(head=dict(weight=weight, bias=bias), input=kind, rate=RATES[r], chance=majority_accuracy(truth),
                linear=accuracies(q[:, parts[kind]], truth, weight[None], bias[None])[0],
                knn=max(knn_accuracy(x[:, cls], y, q[:, cls], truth, ks=(k,)).values()))  # fmt: skip


# ---------------------------------------------------------------- heads in files


def write_head(file, head, about):
    """head.pth: {weight (C, d), bias (C,)}, as Meta's; head.json: what it sees and what it names."""
    with atomic_open(file) as f:
        torch.save({k: v.clone() for k, v in head.items()}, f)
    atomic_write_text(file.with_suffix(".json"), json.dumps(about, indent=1))


def identity(backbone):
    return job_fingerprint(backbone, EvalImages([], 0), ())  # of the weights alone


def read_head(file, backbone):
    """-> weight (C, d), bias (C,), the columns of `inputs` that it sees, and what its .json says.

    A head without .json is one of Meta's: of 2 D (1 block) or 5 D (4 blocks). UserError if it does not fit.
    """
    if not file.is_file():
        raise UserError(f"there is no head at {file}: train one first, or name it with --head")
    head, _ = read_tensors(file)
    match sorted((k, *v.shape) for k, v in head.items()):
        case [("bias", n), ("weight", C, d)] if n == C:
            beside = file.with_suffix(".json")
        case shapes:
            raise UserError(f"{file} is no head of weight (C, d) and bias (C,): it holds {shapes}")
    about = json.loads(beside.read_text()) if beside.is_file() else {}
    parts = columns(backbone)
    meta = {width(part): kind for kind, part in parts.items() if kind.endswith("mean")}
    part = parts.get(about.get("input", meta.get(d)), slice(0, 0))
    if width(part) != d:
        whose = [s["embed_dim"] for s in SIZES.values() if d in (2 * s["embed_dim"], 5 * s["embed_dim"])]
        whose = f" (as for a width of {whose[0]})" if whose else ""
        raise UserError(f"{file} is for inputs of {d} numbers{whose}, but a {describe_backbone(backbone)} gives "
                        f"{' or '.join(map(str, meta))}: this is the head of another backbone")  # fmt: skip
    if about.get("backbone", identity(backbone)) != identity(backbone):
        raise UserError(f"{file} belongs to other weights, {about['weights']}: give those, or train anew")
    return head["weight"].float(), head["bias"].float(), part, about


def predict(backbone, images, weight, bias, part, names):
    """Prints the likeliest classes of each image and their probabilities."""
    said = 0
    for x, _, numbers in iterate_batches(images, 16):
        logits = inputs(backbone, x)[:, part].cpu() @ weight.T + bias if len(x) else ()
        for i, row in zip(numbers, logits):
            likely, which = (v.tolist() for v in row.softmax(-1).topk(min(3, len(row))))
            answers = ", ".join(f"{names[c] if names else c} {p:.1%}" for p, c in zip(likely, which))
            print(f"{sample_name(images.dataset, i)}: {answers}")
        said += len(x)
    for why in images.bad.values():
        print("left out:", why)
    if not said:
        raise UserError("none of these images can be read")


def judge(backbone, images, weight, bias, part, names):
    """Top-1 accuracy of a head, not trained here, on EvalImages; its class c must be their label c."""
    x, y, _ = read_out(backbone, images)
    there, C = images.dataset.classes, len(bias)
    if int(y.max()) >= C or (there and names and there != names) or (there and len(there) != C):
        raise UserError(f"the head names {C} classes, the test images {len(there or y.unique())} with labels "
                        f"up to {int(y.max())}: they are not the same classes")  # fmt: skip
    return accuracies(x[:, part], y, weight[None], bias[None])[0]


def compare(args, backbone, cfg, out):
    """Train, keep the head, and print how it does beside k-NN, an untrained network and chance."""
    bank, queries = open_eval_sets(cfg, args.train, args.test, args.limit)
    print(f"{args.weights}: {describe_backbone(backbone)}; {len(bank)} training images, {len(queries)} test images")
    out.mkdir(parents=True, exist_ok=True)
    how = dict(iterations=args.iterations, batch_size=args.batch_size, augment=args.augment,
               num_workers=cfg.train.num_workers, k=cfg.evaluation.knn_k)  # fmt: skip
    rows = {"this backbone": fit(backbone, bank, queries, out / "grid.pth", **how)}
    about = dict(weights=args.weights, backbone=identity(backbone), pixels=[bank.size, bank.resize],
                 classes=bank.dataset.classes, **rows["this backbone"])  # fmt: skip
    write_head(out / "head.pth", about.pop("head"), about)
    if not (args.no_baseline or args.weights.startswith("random:")):
        print("\nthe same network at random initialisation:")
        twin = untrained_copy(backbone, cfg)
        rows["random initialisation"] = fit(twin, bank, queries, out / "grid_random.pth", **how)
    print(f"\n{'top-1 accuracy':22s}  linear  k-NN (k = {how['k']})")
    for name, row in rows.items():
        print(f"{name:22s}  {row['linear']:.3f}   {row['knn']:.3f}")
    print(f"{'chance':22s}  {about['chance']:.3f}\nwrote {out}/head.pth")
    for why in [*bank.bad.values(), *queries.bad.values()]:
        print("left out:", why)
    for half_done in ("grid.pth", "grid_random.pth"):
        (out / half_done).unlink(missing_ok=True)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add_weights_args(parser)
    add_eval_args(parser)
    add("--iterations", type=int, default=2500, help="steps of SGD (published: 12500)")
    add("--batch-size", type=int, default=128, help="images of a step (published: 128 on each of 8 GPUs)")
    add("--augment", action="store_true", help="a fresh crop of each image in each epoch: slow, as published")
    add("--no-baseline", action="store_true", help="leave out the untrained network")
    add("--out", type=Path, help="folder of head.pth (default: linear/ in the run, or here)")
    add("--head", type=Path, help="a head to test or to predict with, instead of training one")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or shards to classify")
    args = parser.parse_args()
    photos = open_images(args.predict) if args.predict else None
    backbone, cfg = open_backbone(args.weights, args.download)
    e, run = cfg.evaluation, Path(args.weights)
    out = args.out or (run / "linear" if run.is_dir() else Path("linear"))
    if photos or args.head:
        *head, about = read_head(args.head or out / "head.pth", backbone)
        e.image_size, e.resize_size = about.get("pixels", (e.image_size, e.resize_size))
    if args.image_size:
        e.image_size = e.resize_size = args.image_size
    if photos:
        images = EvalImages(photos, e.image_size or cfg.crops.global_crops_size, e.resize_size)
        return predict(backbone, images, *head, about.get("classes"))
    if args.head:
        queries = open_eval_sets(cfg, args.test, args.test, args.limit)[1]
        accuracy = judge(backbone, queries, *head, about.get("classes"))
        print(f"{args.head}: top-1 accuracy {accuracy:.3f} on {len(queries)} images")
        return None
    try:
        return compare(args, backbone, cfg, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}): make room, or name another --out") from None


if __name__ == "__main__":
    config.run(main)
