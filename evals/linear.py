"""Linear probe: how well does one linear map classify frozen features?

    python -m evals.linear --weights runs/laptop                        # train one, on the run's own images
    python -m evals.linear --weights runs/laptop --predict photo.jpg    # use it
    python -m evals.linear --weights dinov2_vits14_reg4 --head dinov2_vits14_reg4_linear_head.pth \\
        --test folder:/data/val                                         # test one of Meta's heads instead

Trains the published grid (DINOv2, appendix B.3) all at once: {last block, last 4} x {[CLS], [CLS] + mean
patch} x 13 learning rates. Prints the accuracy of each probe, then linear and k-NN accuracy beside those of
an untrained network, and chance. Writes head.pth, in Meta's layout, and head.json: which features the head
reads, and the names of its classes.

The 13 probes of one input are a single matrix and need no autograd: the gradient of softmax regression is
p - y. Features are computed once and kept: 20 D bytes per image, 10 GB for ImageNet and ViT-S. `--augment`
recomputes them for a fresh crop in every epoch, as published. The best of the 52 probes is chosen on a tenth
of the *training* images; the published protocol chooses it on the same images that it reports.
"""

import argparse
import json
import math
import time
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import config
from config import Count, UserError, argument, parse_json
from data import crop_and_resize, normalize, sample_crop_params, stable_hash
from decode import Reading, to_tensor
from eval_knn import (
    add_eval_args,
    apply_eval_args,
    keep_labelled,
    knn_accuracy,
    majority_accuracy,
    open_eval_sets,
    open_labelled,
    print_recall,
)
from evals.extract import job_fingerprint
from features import EvalImages, iterate_batches, load_image, read_tensors, untrained_copy
from model import SIZES, describe_backbone
from runfolder import atomic_open, atomic_write_text
from sources import open_images, sample_name
from tools.weights import add_weights_args, loaded_weights, open_backbone

LEARNING_RATES = (  # for a batch of 256
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)  # fmt: skip
KEPT_SETTINGS = ("evaluation.fit", "data.range", "data.bands")  # beside a head, which depends on them
SAVE_EVERY = 20  # seconds of training that a killed job may have to repeat


# ---------------------------------------------------------------- the features that a probe reads


@torch.no_grad()
def probe_features(backbone, pixels):
    """uint8 (b, 3, S, S) -> fp32 (b, 5 D): [CLS] of the last 4 blocks in order, then the last's mean patch.

    All come after the final norm. A network of fewer than 4 blocks gives (b, 2 D), from its last block.
    """
    depth = len(backbone.blocks)
    first_block = depth - 4 if depth >= 4 else depth - 1
    images = normalize(pixels.to(backbone.norm.weight.device))
    blocks = backbone.intermediate(images, range(first_block, depth))
    parts = [tokens.cls for tokens in blocks]
    parts.append(blocks[-1].patches.mean(1))
    return torch.cat(parts, dim=1).float()


def input_slices(backbone):
    """{name of an input: its columns in `probe_features`}.

    Meta's heads of 1 layer read "1 block, CLS + mean", those of 4 layers "4 blocks, CLS + mean".
    """
    D = backbone.embed_dim
    if len(backbone.blocks) < 4:
        return {"1 block, CLS": slice(0, D), "1 block, CLS + mean": slice(0, 2 * D)}
    return {
        "1 block, CLS": slice(3 * D, 4 * D),
        "1 block, CLS + mean": slice(3 * D, 5 * D),
        "4 blocks, CLS": slice(0, 4 * D),
        "4 blocks, CLS + mean": slice(0, 5 * D),
    }


def slice_width(columns):
    return columns.stop - columns.start


def labelled_features(backbone, images, batch_size=256, num_workers=0):
    """EvalImages -> features (n, 5 D), labels (n,), numbers (n,) of the readable images that have a label."""
    features = []
    labels = []
    numbers = []
    for pixels, batch_labels, batch_numbers in iterate_batches(images, batch_size, num_workers):
        if len(pixels):
            features.append(probe_features(backbone, pixels).cpu())
            labels.append(batch_labels)
            numbers.append(torch.tensor(batch_numbers))
    if not features:
        raise UserError("none of these images can be read")
    labels = torch.cat(labels)
    features, known_labels = keep_labelled(torch.cat(features), labels)
    return features, known_labels, torch.cat(numbers)[labels >= 0]


class RandomCrops(Dataset):
    """self[epoch, i] -> a random crop of image i, uint8 (3, S, S), and its label.

    It covers 8 to 100 % of the image, and may be mirrored. The same two numbers always give the same crop.
    """

    def __init__(self, images):
        published = ["crops.global_crops_scale=[0.08, 1]", "crops.local_crops_number=0"]
        self.images = images
        self.crops = config.load(overrides=published).crops

    def __getitem__(self, key):
        epoch, i = key
        image, label = load_image(self.images.dataset, self.images.indices[i])
        rng = np.random.default_rng(stable_hash("probe", epoch, i))
        boxes, flips, _ = sample_crop_params(rng, self.crops, *image.size)
        return crop_and_resize(to_tensor(image), boxes[0], self.images.size, flips[0]), label


# ---------------------------------------------------------------- all probes at once


def init_probes(slices, classes, device="cpu"):
    """{input: [weight (r, C, d), bias (r, C), momentum of weight, momentum of bias]}, for r learning rates.

    Weights are drawn from N(0, 0.01), the same for every rate; the rest is zero.
    """
    probes = {}
    for name, columns in slices.items():
        generator = torch.Generator().manual_seed(0)
        initial = 0.01 * torch.randn(classes, slice_width(columns), generator=generator)
        weight = initial.expand(len(LEARNING_RATES), -1, -1).clone().to(device)
        bias = torch.zeros(weight.shape[:2], device=device)
        probes[name] = [weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)]
    return probes


def sgd_step(features, labels, probes, rates):
    """One step of r softmax regressions, in place: features (b, d), labels (b,), rates (r,); momentum 0.9."""
    weight, bias, weight_momentum, bias_momentum = probes
    logits = (features @ weight.flatten(0, 1).T).unflatten(1, bias.shape) + bias  # (b, r, C)
    error = logits.softmax(-1)
    rows = torch.arange(len(features), device=features.device)
    error[rows, :, labels] -= 1  # p - y: the gradient of the cross-entropy
    error /= len(features)
    weight_momentum.mul_(0.9).add_((error.flatten(1).T @ features).view_as(weight))
    bias_momentum.mul_(0.9).add_(error.sum(0))
    weight.sub_(rates[:, None, None] * weight_momentum)
    bias.sub_(rates[:, None] * bias_momentum)


def cosine_decay(step, iterations):
    """From 1 at the first step to 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / iterations))


def shuffled_batches(n, batch_size, first, last):
    """For each of the steps first...last - 1: its epoch, and its batch, (batch_size,) row numbers below n.

    The order within an epoch depends on its number alone, so a resumed job gets the batches that it would
    have had without the interruption.
    """
    for step in range(first, last):
        epoch, position = divmod(step, n // batch_size)
        if position == 0 or step == first:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        yield epoch, order[position * batch_size :][:batch_size]


def augmented_batches(backbone, images, numbers, schedule, num_workers=0):
    """Features and labels of fresh crops, for a schedule of epochs and rows of `numbers` (n,)."""

    def crop_keys():
        for epoch, rows in schedule:
            yield [(epoch, i) for i in numbers[rows].tolist()]

    loader = DataLoader(RandomCrops(images), batch_sampler=crop_keys(), num_workers=num_workers)
    for pixels, labels in loader:
        yield probe_features(backbone, pixels), labels


def resume_probes(probes, file, job):
    """-> probes and the number of steps they were trained for: from `file` if it exists, else these and 0."""
    if not file.exists():
        return probes, 0
    device = next(iter(probes.values()))[0].device
    try:
        saved = torch.load(file, map_location=device, weights_only=True)
        if saved["job"] == job:
            return saved["grid"], saved["step"]
    except Exception:  # a damaged file may raise anything
        pass
    raise UserError(f"{file} holds a half-trained probe of other images, weights or options: delete it")


def train_probes(probes, slices, batches_from, iterations, batch_size, file, job):
    """Train all probes by SGD and return them.

    `batches_from(step)` yields features (b, 5 D) and labels (b,) from that step on. Progress is saved in
    `file`; a call with the same `job` resumes there, with the same bits in the end, and one with another job
    raises UserError.
    """
    device = next(iter(probes.values()))[0].device
    probes, first = resume_probes(probes, file, job)
    rates = torch.tensor(LEARNING_RATES, device=device) * batch_size / 256
    last_save = time.monotonic()
    progress = tqdm(batches_from(first), total=iterations, initial=first, disable=None)
    for step, (features, labels) in enumerate(progress, first):
        features = features.to(device)
        labels = labels.to(device)
        current_rates = rates * cosine_decay(step, iterations)
        for name, columns in slices.items():
            sgd_step(features[:, columns], labels, probes[name], current_rates)
        if step + 1 == iterations or time.monotonic() - last_save > SAVE_EVERY:
            with atomic_open(file) as f:
                torch.save(dict(job=job, step=step + 1, grid=probes), f)
            last_save = time.monotonic()
    return probes


def probe_accuracies(features, labels, weight, bias):
    """features (n, d), labels (n,), weight (r, C, d), bias (r, C) -> list of r accuracies in 0...1."""
    accuracies = []
    for probe_weight, probe_bias in zip(weight, bias):
        predicted = (features @ probe_weight.T + probe_bias).argmax(-1)
        accuracies.append((predicted == labels).float().mean().item())
    return accuracies


def select_probe(probes, slices, features, labels):
    """Print the accuracy of every probe -> input and number of the best; of equals, the first."""
    print(f"accuracy on {len(labels)} held-out training images, by learning rate (for a batch of 256)")
    print(" " * 20 + "".join(f"{rate:>7g}" for rate in LEARNING_RATES))
    table = {}
    for name, columns in slices.items():
        weight, bias, *_ = probes[name]
        table[name] = probe_accuracies(features[:, columns], labels, weight, bias)
        print(f"{name:20s}" + "".join(f"{accuracy:7.3f}" for accuracy in table[name]))
    best = max(table, key=lambda name: max(table[name]))
    number = table[best].index(max(table[best]))
    at_the_edge = number + 1 == len(LEARNING_RATES)
    hint = ", the highest: more --iterations may help" if at_the_edge else ""
    print(f"best: {best}, rate {LEARNING_RATES[number]:g}{hint}")
    return best, number


def fit_and_test(backbone, bank, queries, file, iterations, batch_size, augment=False, num_workers=0, k=20):
    """Train the grid on nine tenths of the bank, choose on the rest, test on the queries.

    -> dict of `head` (weight, bias), `answers` (predicted classes, labels), `input`, `rate`, and the
    accuracies `chance`, `linear`, `knn`.
    """
    features, labels, numbers = labelled_features(backbone, bank, num_workers=num_workers)
    test_features, test_labels, _ = labelled_features(backbone, queries, num_workers=num_workers)
    seen = len(labels.unique())
    if len(labels) < 10 or seen < 2:
        raise UserError(f"{len(labels)} training images of {seen} classes: it takes at least 10 of 2 classes")
    classes = len(bank.dataset.classes)
    slices = input_slices(backbone)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    held_out = order[: len(features) // 10]
    training = order[len(features) // 10 :]
    batch_size = min(batch_size, len(training))

    def batches_from(step):
        schedule = shuffled_batches(len(training), batch_size, step, iterations)
        if augment:
            return augmented_batches(backbone, bank, numbers[training], schedule, num_workers)
        return ((features[training[rows]], labels[training[rows]]) for _, rows in schedule)

    job = job_fingerprint(backbone.state_dict(), bank, (iterations, batch_size, augment, labels.tolist()))
    probes = init_probes(slices, classes, backbone.norm.weight.device)
    probes = train_probes(probes, slices, batches_from, iterations, batch_size, file, job)
    for name, (weight, bias, *_) in probes.items():
        probes[name] = [weight.cpu(), bias.cpu()]
    best, number = select_probe(probes, slices, features[held_out], labels[held_out])
    weight, bias = (x[number] for x in probes[best])
    columns = slices[best]
    cls = slices["1 block, CLS"]
    predicted = (test_features[:, columns] @ weight.T + bias).argmax(-1)
    return dict(
        head=dict(weight=weight, bias=bias),
        answers=(predicted, test_labels),
        input=best,
        rate=LEARNING_RATES[number],
        chance=majority_accuracy(test_labels),
        linear=probe_accuracies(test_features[:, columns], test_labels, weight[None], bias[None])[0],
        knn=max(knn_accuracy(features[:, cls], labels, test_features[:, cls], test_labels, ks=(k,)).values()),
    )


# ---------------------------------------------------------------- heads in files


def write_linear_head(file, head, about):
    """Write head.pth, of weight (C, d) and bias (C,), as Meta's, and head.json: its input and its classes."""
    with atomic_open(file) as f:
        torch.save({name: x.clone() for name, x in head.items()}, f)
    atomic_write_text(file.with_suffix(".json"), json.dumps(about, indent=1))


def backbone_fingerprint(backbone):
    return job_fingerprint(loaded_weights(backbone), EvalImages([], 0), ())  # of the weights alone


def read_linear_head(file, backbone):
    """-> weight (C, d), bias (C,), the columns of `probe_features` that it reads, the content of its .json.

    A head without a .json is one of Meta's, for 1 block (2 D inputs) or 4 (5 D). Raises UserError if the file
    is not a head, or not one of this backbone.
    """
    if not file.is_file():
        raise UserError(f"there is no head at {file}: train one first, or name it with --head")
    head, _ = read_tensors(file)
    shapes = {name: list(x.shape) for name, x in head.items()}
    weight_shape = shapes.get("weight", [])
    if len(weight_shape) != 2 or shapes != dict(weight=weight_shape, bias=weight_shape[:1]):
        found = config.short_repr(shapes)
        raise UserError(f"{file} is not a head of weight (C, d) and bias (C,): it holds {found}")
    about = read_about(file.with_suffix(".json"), weight_shape[0])
    columns = head_columns(file, backbone, about.get("input"), weight_shape[1])
    fingerprint = backbone_fingerprint(backbone)
    if about.get("backbone", fingerprint) != fingerprint:
        raise UserError(f"{file} belongs to other weights, {about.get('weights')}: use those, or train anew")
    return head["weight"].float(), head["bias"].float(), columns, about


def read_about(file, num_classes):
    """The .json beside a head of so many classes, {} if there is none. UserError if it is of another kind."""
    if not file.is_file():
        return {}
    try:
        about = parse_json(file.read_bytes())
        size, resize = about.get("pixels", (1, 1))
        classes = about.get("classes") or [""] * num_classes
        fits = len(classes) == num_classes and all(isinstance(name, str) for name in classes)
        fits = fits and type(size) is type(resize) is int
        if fits and 1 <= size <= resize and isinstance(about.get("input", ""), str):
            return about
    except (ValueError, TypeError, AttributeError):
        pass
    raise UserError(f"{file} does not describe a head of {num_classes} classes: delete it, or train anew")


def head_columns(file, backbone, name, width):
    """The columns of `probe_features` that a head of `width` inputs reads. name: of its input, or None."""
    slices = input_slices(backbone)
    meta_inputs = {slice_width(columns): key for key, columns in slices.items() if key.endswith("mean")}
    columns = slices.get(name or meta_inputs.get(width))
    if columns is None or slice_width(columns) != width:
        fitting = [size["embed_dim"] for size in SIZES.values() if width / size["embed_dim"] in (2, 5)]
        hint = f" (as from a width of {fitting[0]})" if fitting else ""
        available = f"a {describe_backbone(backbone)} gives {' or '.join(map(str, meta_inputs))}"
        raise UserError(f"{file} needs {width} inputs{hint}, but {available}: it belongs to another backbone")
    return columns


# ---------------------------------------------------------------- the command


def print_top_classes(backbone, images, weight, bias, columns, class_names):
    """Print the three likeliest classes of each image and their probabilities."""
    readable = 0
    for pixels, _, numbers in iterate_batches(images, 16):
        if not len(pixels):
            continue
        readable += len(pixels)
        logits = probe_features(backbone, pixels)[:, columns].cpu() @ weight.T + bias
        top = logits.softmax(-1).topk(min(3, len(bias)))
        for i, classes, probs in zip(numbers, top.indices.tolist(), top.values.tolist()):
            names = [class_names[c] for c in classes] if class_names else classes
            answers = ", ".join(f"{name} {prob:.1%}" for name, prob in zip(names, probs))
            print(f"{sample_name(images.dataset, i)}: {answers}")
    for reason in images.bad.values():
        print("left out:", reason)
    if not readable:
        raise UserError("none of these images can be read")


def head_accuracy(backbone, images, weight, bias, columns):
    """Top-1 accuracy of a head on EvalImages. Raises UserError if these have not as many classes."""
    if len(images.dataset.classes) != len(bias):
        count = len(images.dataset.classes)
        raise UserError(f"the head has {len(bias)} classes, the test images {count}: not the same ones")
    features, labels, _ = labelled_features(backbone, images)
    return probe_accuracies(features[:, columns], labels, weight[None], bias[None])[0]


def compare_with_untrained(args, backbone, cfg, out):
    """Train a head, write it, and print its accuracy beside k-NN, an untrained network and chance."""
    bank, queries = open_eval_sets(cfg, args.limit)
    described = describe_backbone(backbone)
    count = f"{len(bank)} training images, {len(queries)} test images"
    print(f"{args.weights}: {described}; {count}, {bank.protocol}")
    out.mkdir(parents=True, exist_ok=True)
    options = dict(iterations=args.iterations, batch_size=args.batch_size, augment=args.augment,
                   num_workers=cfg.train.num_workers, k=cfg.evaluation.knn_k)  # fmt: skip
    result = fit_and_test(backbone, bank, queries, out / "grid.pth", **options)
    head = result.pop("head")
    answers = result.pop("answers")
    about = dict(weights=args.weights, backbone=backbone_fingerprint(backbone),
                 pixels=[bank.size, bank.resize], classes=bank.dataset.classes,
                 train=cfg.evaluation.train_path)  # fmt: skip
    about |= {key: attrgetter(key)(cfg) for key in KEPT_SETTINGS}
    write_linear_head(out / "head.pth", head, about | result)
    rows = {"this backbone": result}
    if not args.no_baseline and not args.weights.startswith("random:"):
        print("\nthe same network with random weights:")
        untrained = untrained_copy(backbone, cfg)
        file = out / "grid_random.pth"
        rows["random initialisation"] = fit_and_test(untrained, bank, queries, file, **options)
    print(f"\n{'top-1 accuracy':22s}  linear  k-NN (k = {options['k']})")
    for name, row in rows.items():
        print(f"{name:22s}  {row['linear']:.3f}   {row['knn']:.3f}")
    print(f"{'chance':22s}  {result['chance']:.3f}")
    print_recall(*answers, bank.dataset.classes)
    print(f"wrote {out}/head.pth")
    for reason in [*bank.bad.values(), *queries.bad.values()]:
        print("left out:", reason)
    for half_trained in ("grid.pth", "grid_random.pth"):
        (out / half_trained).unlink(missing_ok=True)


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.linear", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add_weights_args(parser)
    add_eval_args(parser)
    add("--iterations", type=argument(Count), default=2500, help="SGD steps (published: 12500)")
    add("--batch-size", type=argument(Count), default=128,
        help="images per step (published: 128 on each of 8 GPUs)")  # fmt: skip
    add("--augment", action="store_true", help="a fresh crop of each image in each epoch: slow, as published")
    add("--no-baseline", action="store_true", help="skip the untrained network")
    add("--out", type=argument(Path), help="folder for head.pth (default: linear/ in the run, or here)")
    add("--head", type=Path, help="test or predict with this head instead of training one")
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or shards to classify")
    return parser.parse_args()


def main():
    args = parse_args()
    backbone, cfg = open_backbone(args.weights, args.download, args.dtype)
    run = Path(args.weights)
    out = args.out or (run / "linear" if run.is_dir() else Path("linear"))
    evaluation = cfg.evaluation
    if args.predict or args.head:
        *head, about = read_linear_head(args.head or out / "head.pth", backbone)
        class_names = about.get("classes")
        if "pixels" in about:  # the size that it was trained at
            evaluation.image_size, evaluation.resize_size = about["pixels"]
        config.assign(cfg, {key: about[key] for key in KEPT_SETTINGS if key in about})
    apply_eval_args(args, cfg)
    if args.predict:
        size = config.evaluation_size(cfg)
        photos = open_images(args.predict, Reading.from_config(cfg.data))
        images = EvalImages(photos, size, evaluation.resize_size, fit=evaluation.fit)
        print_top_classes(backbone, images, *head, class_names)
    elif args.head:
        path = cfg.evaluation.test_path
        if not path:
            raise UserError("a head is tested on other labelled images: give --test, or evaluation.test_path")
        if path == about.get("train"):
            raise UserError(f"{path} holds the images that the head was trained on: give others")
        queries = open_labelled(cfg, path, args.limit, class_names)
        accuracy = head_accuracy(backbone, queries, *head)
        print(f"{args.head}: top-1 accuracy {accuracy:.3f} on {len(queries)} images, {queries.protocol}")
        if "train" in about:
            print(f"it was trained on {about['train']}")
    else:
        try:
            compare_with_untrained(args, backbone, cfg, out)
        except OSError as e:
            raise UserError(f"{out} cannot be written ({e}): make room, or name another --out") from None


if __name__ == "__main__":
    config.run(main)
