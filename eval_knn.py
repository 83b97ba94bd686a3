"""Weighted k-nearest-neighbour classification: how good are a backbone's features, without training anything?

    python eval_knn.py --weights runs/laptop             # a run folder: its own teacher, its own data
    python eval_knn.py --weights teacher.pth --train folder:/data/train --test folder:/data/test
    python eval_knn.py --weights teacher.pth --train folder:/photos    # a quarter of each class is classified
    python eval_knn.py --weights runs/laptop --predict cat.jpg dog.jpg

Prints top-1 accuracy for k = 10, 20, 100, 200, beside what any number must beat: chance, raw pixels, and the
same architecture with random weights. Protocol of DINOv2: cosine similarity of [CLS], votes weighted by
exp(similarity / 0.07). With --predict: the class of each image, its share of the votes, how often such a
share was right among the queries called so, and how far the image is from everything in the bank (`python -m
evals.neighbours` also draws the neighbours).
"""

import argparse
import math
import os
import sys
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

import config
from config import UserError
from decode import Reading
from distributed import rank
from features import (
    EvalImages,
    add_fit_arg,
    add_image_args,
    apply_reading_args,
    extract_features,
    iterate_batches,
    open_backbone,
    untrained_copy,
)
from model import describe_backbone
from sources import open_dataset, open_images, sample_name
from survey import print_warnings

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
UNLIKE = 0.99  # of the bank's images are nearer to it: then an image is called unlike all of them


def knn_scores(bank, bank_labels, queries, classes, ks=KS, chunk=1024):
    """Votes per class: bank (n, D), queries (m, D), both L2-normalised -> {k: (m, classes)}.

    The softmax runs over the largest k, and smaller k take the first of its weights (a fact of the published
    protocol). A bank smaller than k simply has fewer neighbours.
    """
    ks = sorted({min(k, len(bank)) for k in ks})
    scores = {k: [] for k in ks}
    for query_chunk in queries.split(chunk):
        similarity, neighbours = (query_chunk @ bank.T).topk(ks[-1])  # (chunk, largest k), nearest first
        weights = F.softmax(similarity / TEMPERATURE, dim=-1)
        neighbour_labels = bank_labels[neighbours]  # (chunk, largest k)
        for k in ks:
            votes = torch.zeros(len(query_chunk), classes)
            votes.scatter_add_(1, neighbour_labels[:, :k], weights[:, :k])
            scores[k].append(votes)
    return {k: torch.cat(votes) for k, votes in scores.items()}


def knn_accuracy(bank, bank_labels, queries, labels, ks=KS):
    """Top-1 accuracy in 0...1 for each k; features need not be normalised."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    bank = F.normalize(bank, dim=-1)
    queries = F.normalize(queries, dim=-1)
    scores = knn_scores(bank, bank_labels, queries, classes, ks)
    return {k: (votes.argmax(-1) == labels).float().mean().item() for k, votes in scores.items()}


def keep_labelled(features, labels):
    """The rows whose label is known (0 or more), which are what k-NN can use. UserError if there are none."""
    known = labels >= 0
    if not known.any():
        raise UserError("none of the evaluation images can be read and has a label, as k-NN needs")
    return features[known], labels[known]


def backbone_features(backbone, images, batch_size=256, num_workers=0):
    """The [CLS] features (n, D) and labels (n,) of the labelled EvalImages."""
    return keep_labelled(*extract_features(backbone, images, batch_size, num_workers)[:2])


def pixel_features(images, side=32):
    """Raw pixels as features (n, 3 side side) and labels (n,): what needs no network at all."""
    features = []
    labels = []
    for pixels, batch_labels, _ in iterate_batches(images):
        features.append(F.interpolate(pixels.float(), size=(side, side), mode="area").flatten(1))
        labels.append(batch_labels)
    return keep_labelled(torch.cat(features), torch.cat(labels))


def knn_backbone(backbone, bank, queries, ks=KS, batch_size=256, num_workers=0):
    """k-NN on a backbone's [CLS] over two EvalImages -> {k: accuracy}."""
    known = backbone_features(backbone, bank, batch_size, num_workers)
    unknown = backbone_features(backbone, queries, batch_size, num_workers)
    return knn_accuracy(*known, *unknown, ks)


def knn_pixels(bank, queries, ks=KS):
    """k-NN on raw pixels of two EvalImages, the bank's mean image taken off -> {k: accuracy}."""
    known, known_labels = pixel_features(bank)
    unknown, labels = pixel_features(queries)
    mean = known.mean(0)
    return knn_accuracy(known - mean, known_labels, unknown - mean, labels, ks)


def recall_per_class(predicted, labels, classes):
    """Which share of each class was found (classes,), nan without queries; and the number of its queries."""
    count = labels.bincount(minlength=classes)
    found = labels[predicted == labels].bincount(minlength=classes)
    return found / count, count


def print_recall(predicted, labels, names):
    """Recall of each class and their mean, if the classes are uneven: accuracy alone would hide a rare one.

    predicted, labels (m,). Classes without queries are named, and not averaged.
    """
    recall, count = recall_per_class(predicted, labels, len(names))
    present = count > 0
    absent = [name for name, there in zip(names, present.tolist()) if not there]
    if absent:
        print(f"no query is of class {', '.join(absent[:10])}{' ...' * (len(absent) > 10)}")
    if count.max() <= 2 * count[present].min():
        return
    balanced = recall[present].mean().item()
    print(f"balanced accuracy {balanced:.3f}, the mean recall of the classes, which are uneven:")
    worst = recall[present].argsort()[:20]
    for label in present.nonzero()[:, 0][worst].tolist():
        print(f"  {names[label]:20s}  {recall[label]:.3f} of {count[label]}")


def majority_accuracy(labels):
    """The accuracy of always naming the most frequent class."""
    return (labels.bincount().max() / len(labels)).item()


# ---------------------------------------------------------------- which labelled images


def add_eval_args(parser):
    """Which labelled images: the arguments of every script that evaluates a backbone on them."""
    add = parser.add_argument
    whole = config.argument(config.Whole)
    add("--train", default="", help="the labelled bank, e.g. folder:/data/train (default: the run's own)")
    add("--test", default="", help="the labelled queries (default: the run's own, or a part of --train)")
    add("--split", type=config.argument(config.Part), help="that part, of each class (default 0.25)")
    add("--split-seed", type=whole, help="another number is another split (default 0)")
    pixels = config.argument(config.OptionalPixels)
    add("--image-size", type=pixels, default=0, help="side of the square the network sees, in pixels")
    add_fit_arg(parser)
    add("--limit", type=whole, default=0, help="use only so many images of each set, evenly spread")


def apply_eval_args(args, cfg):
    """The arguments above and those of add_image_args, where given, replace the run's settings. UserError."""
    evaluation = cfg.evaluation
    apply_reading_args(args, cfg)
    evaluation.fit = args.fit or evaluation.fit
    if args.train or args.split is not None:
        evaluation.test_path = ""  # the run's own queries have nothing to do with it
    evaluation.train_path = args.train or evaluation.train_path
    evaluation.test_path = args.test or evaluation.test_path
    for key in ("split", "split_seed"):
        if getattr(args, key) is None:
            continue
        if evaluation.test_path:
            raise UserError("--split and --split-seed take the queries out of --train: leave out --test")
        setattr(evaluation, key, getattr(args, key))
    if args.image_size:
        evaluation.image_size = args.image_size
        evaluation.resize_size = args.image_size


def open_labelled(cfg, path, limit=0, classes=None):
    """A source as EvalImages of the config's size, labels numbered as in `classes` (default: its own).

    Raises UserError if no image has a label, or if there is a class that is not among these.
    """
    dataset = open_dataset(path, cfg.data)
    if not dataset.classes:
        raise UserError(f"{path} has no labels (sub-folders, .cls files): k-NN needs labelled images")
    if classes and dataset.classes != classes:
        odd = ", ".join(sorted(set(dataset.classes) - set(classes))[:3])
        if odd:
            raise UserError(f"{path} has classes that are unknown ({odd}): they are compared by name")
        dataset.renumber(classes)
    evaluation = cfg.evaluation
    size = config.evaluation_size(cfg)
    return EvalImages(dataset, size, evaluation.resize_size, limit, evaluation.fit)


def open_eval_sets(cfg, limit=0):
    """Bank and queries as the config names them: (EvalImages, EvalImages). Raises UserError.

    Without a test_path, the queries are a part of the bank. Labels are numbers of the bank's classes.
    """
    bank_path = cfg.evaluation.train_path
    query_path = cfg.evaluation.test_path
    if not bank_path:
        raise UserError("no labelled images: give --train, or evaluation.train_path")
    if not query_path:
        images = open_labelled(cfg, bank_path)
        print_warnings(images.dataset, bank_path, images.fit)
        return split_images(images, cfg, limit)
    bank = open_labelled(cfg, bank_path, limit)
    queries = open_labelled(cfg, query_path, limit, bank.dataset.classes)
    for images, path in ((bank, bank_path), (queries, query_path)):
        print_warnings(images.dataset, path, images.fit)
    remedy = "give others, or none (--test, evaluation.test_path) to split the training images"
    check_overlap(bank.files(), queries.files(), remedy)
    return bank, queries


def split_images(images, cfg, limit=0):
    """EvalImages cut in two, class by class -> [bank, queries]. Of copies, byte for byte, only one is used.

    The same for each seed and list of images. A class of one image stays in the bank.
    """
    evaluation = cfg.evaluation
    dataset = images.dataset
    labels = getattr(dataset, "labels", None)
    members = {}  # of each class
    seen = set()
    sizes = [content_key(dataset, i, whole=False) for i in images.indices]
    number_of_size = Counter(sizes)
    for i, key in zip(images.indices, sizes):
        if number_of_size[key] > 1:  # only then is it read
            key = content_key(dataset, i)
        label = dataset[i][1] if labels is None else labels[i]
        if key not in seen and label >= 0:
            members.setdefault(dataset.classes[label], []).append(i)
        seen.add(key)
    bank = []
    queries = []
    for name, numbers in members.items():
        rng = np.random.default_rng([evaluation.split_seed, *os.fsencode(name)])
        order = rng.permutation(numbers).tolist()
        num_queries = min(max(round(evaluation.split * len(order)), 1), len(order) - 1)
        queries += order[:num_queries]
        bank += order[num_queries:]
    if not queries:
        raise UserError(f"{evaluation.train_path} cannot be split: no class has two different images")
    copies = len(images) - len(seen)
    left_out = f"; {copies} copies of others are left out" if copies else ""
    counts = f"{len(queries)} queries, {len(bank)} images in the bank"
    print(f"{evaluation.train_path} is split, class by class: {counts}{left_out}")
    return [images.subset(sorted(part), limit) for part in (bank, queries)]


def check_overlap(train, test, remedy, most=2000):
    """Raise UserError if test images are training images too, byte for byte: the number would be too good.

    train, test: lists of (data set, index). One in a hundred is the fault of the data set, as in ImageNet: a
    note, and the number stays comparable. Of many test images only `most` are looked up, evenly spread.
    """
    test = test[:: math.ceil(len(test) / most)]
    sizes = {content_key(*file, whole=False) for file in test}
    same_size = [file for file in train if content_key(*file, whole=False) in sizes]  # only these are read
    known = {content_key(*file) for file in same_size}
    twice = [file for file in test if content_key(*file) in known]
    if twice:
        example = sample_name(*twice[0])
        found = f"{len(twice)} of {len(test)} test images are training images too, such as {example}"
        if len(twice) > len(test) / 100:
            raise UserError(f"{found}: {remedy}")
        print(f"note: {found}; they count", file=sys.stderr)


def content_key(dataset, i, whole=True):
    """The same for files that are the same, byte for byte; if not `whole`, for files of the same size."""
    if not hasattr(dataset, "digest"):
        return sample_name(dataset, i)
    return dataset.digest(i) if whole else dataset.file_size(i)


# ---------------------------------------------------------------- one image, its class, and how sure


def knn_predict(bank, bank_labels, queries, k):
    """-> class (m,), its share of the votes (m,) in 0...1, and who voted (m, k), nearest first."""
    bank = F.normalize(bank, dim=-1)
    queries = F.normalize(queries, dim=-1)
    k = min(k, len(bank))
    classes = int(bank_labels.max()) + 1
    share, predicted = knn_scores(bank, bank_labels, queries, classes, ks=(k,))[k].max(-1)
    return predicted, share, (queries @ bank.T).topk(k).indices


def calibration(share, right, bins=10):
    """Is a share of 0.8 right in 80 % of cases? share (m,) in 0...1, right (m,) bool.

    -> expected calibration error (Guo et al. 2017, equation 3), and for each bin of equal width its mean
    share, how often it was right, and the number of cases.
    """
    which = (share * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    mean_share = which.bincount(share.double(), bins) / count.clamp(min=1)
    hit_rate = which.bincount(right.double(), bins) / count.clamp(min=1)
    error = ((mean_share - hit_rate).abs() * count).sum() / len(share)
    return error.item(), list(zip(mean_share.tolist(), hit_rate.tolist(), count.tolist()))


def distance_rank(bank, queries, chunk=1024, most=4096):
    """How far each query is from its nearest neighbour: the share of the bank whose own is nearer, (m,).

    0.998: the query is farther from the bank than 99.8 % of its own images are from the rest of it. Of a
    larger bank only `most` images, evenly spread, are asked for their nearest.
    """
    bank = F.normalize(bank, dim=-1)
    asked = torch.arange(0, len(bank), math.ceil(len(bank) / most))
    nearest = []
    for rows in asked.split(chunk):
        similarity = bank[rows] @ bank.T
        similarity[torch.arange(len(rows)), rows] = -2  # not itself
        nearest.append(similarity.amax(1))
    nearest = torch.cat(nearest).sort().values
    of_queries = [(rows @ bank.T).amax(1) for rows in F.normalize(queries, dim=-1).split(chunk)]
    return 1 - torch.searchsorted(nearest, torch.cat(of_queries), right=True) / len(asked)


def hit_rate(share, right, votes):
    """How often queries with about such a share of the votes were right, and how many there were."""
    _, bins = calibration(share, right)
    _, rate, count = bins[min(int(votes * len(bins)), len(bins) - 1)]
    return rate, count


def print_predictions(backbone, bank, queries, photos, k):
    """Prints class and confidence of each of the `photos` (a data set).

    -> the EvalImages of the photos, their classes (m,), shares (m,) and neighbours (m, k) among the readable
    labelled images of the bank, and what `calibration` found on the queries.
    """
    known, known_labels = backbone_features(backbone, bank)
    unknown, labels = backbone_features(backbone, queries)
    of_queries, query_share, _ = knn_predict(known, known_labels, unknown, k)
    right = of_queries == labels
    error, bins = calibration(query_share, right)
    images = EvalImages(photos, bank.size, bank.resize, fit=bank.fit)
    features = extract_features(backbone, images)[0]
    for reason in images.bad.values():
        print("left out:", reason)
    if not len(features):
        raise UserError("none of these images can be read")
    predicted, share, neighbours = knn_predict(known, known_labels, features, k)
    names = bank.dataset.classes
    readable = [i for i in range(len(images)) if i not in images.bad]
    ranks = distance_rank(known, features)
    for i, label, votes, farther in zip(readable, predicted.tolist(), share.tolist(), ranks.tolist()):
        called = of_queries == label  # the class matters: a rare one may always be wrong
        rate, count = hit_rate(query_share[called], right[called], votes)
        often = f"no query was called {names[label]} with such a share"
        if count:
            often = f"right in {rate:.0%} of {count} queries called {names[label]} with such a share"
        far = f"farther from the bank than {farther:.1%} of its own images"
        if farther > UNLIKE:
            far = f"unlike anything in the bank: {far}"
        print(f"{sample_name(photos, i)}: {names[label]}, {votes:.0%} of the votes ({often}); {far}")
    print(f"expected calibration error on {len(labels)} queries: {error:.3f}")
    return images, predicted, share, neighbours, (error, bins)


# ---------------------------------------------------------------- while training, and at its end


def ridge_regression(x, y):
    """Linear regression in closed form, x (n, D) and y (n,) -> a function (m, D) -> (m,)."""
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column is the bias
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ y)
    return lambda new: F.pad((new - mean) / std, (0, 1), value=1.0) @ weights


def foreground_miou(backbone, scenes, size):
    """How well one linear map of patch tokens tells objects from background: mean IoU of the two, in pixels.

    The map is fitted on two thirds of (at most) 600 scenes, to the share of foreground in each patch, and
    scored on the others; its answer is enlarged (bilinear) and cut at one half. In closed form it has no
    learning rate to choose, and is good enough to compare backbones while they train.
    """
    total = min(600, len(scenes))
    test = total // 3
    train = total - test
    masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(total)]).float()
    masks = F.interpolate(masks[:, None], size=(size, size), mode="area")  # (n, 1, S, S)
    images = EvalImages(scenes, size, indices=range(total))
    patches = extract_features(backbone, images, patches=True)[2]  # (n, N, D)
    side = size // backbone.patch_size
    share = F.avg_pool2d(masks, backbone.patch_size)  # (n, 1, side, side)
    predict = ridge_regression(patches[:train].flatten(0, 1), share[:train].flatten())
    answer = predict(patches[train:].flatten(0, 1)).view(test, 1, side, side)
    found = F.interpolate(answer, size=(size, size), mode="bilinear") > 0.5
    truth = masks[train:] > 0.5
    foreground = (found & truth).sum() / (found | truth).sum()
    background = (~found & ~truth).sum() / (~found | ~truth).sum()
    return float((foreground + background) / 2)


class KNNEvaluator:
    """k-NN of the teacher, on the way and at the end with baselines; silent without labelled images."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.sets = None  # only rank 0 opens the images; `wanted` is known to all ranks
        self.online_sets = None
        evaluation = cfg.evaluation
        self.wanted = bool(evaluation.train_path)
        self.period = evaluation.eval_period_iterations if self.wanted else 0
        if self.wanted and rank() == 0:
            self.sets = open_eval_sets(cfg)
            self.online_sets = self.sets
            if evaluation.online_limit:
                limit = evaluation.online_limit
                self.online_sets = [images.subset(images.indices, limit) for images in self.sets]

    def accuracy(self, backbone, sets):
        """-> top-1 accuracy, or None on the ranks (and in the runs) that do not evaluate."""
        if sets is None:
            return None
        evaluation = self.cfg.evaluation
        workers = self.cfg.train.num_workers
        found = knn_backbone(backbone, *sets, (evaluation.knn_k,), evaluation.batch_size, workers)
        return max(found.values())

    def final_results(self, teacher):
        """The numbers of result.json, with their baselines."""
        if self.sets is None:
            return {}
        bank, queries = self.sets
        untrained = untrained_copy(teacher, self.cfg, self.cfg.train.seed)
        result = dict(
            knn_top1=self.accuracy(teacher, self.sets),
            knn_random_init=self.accuracy(untrained, self.sets),
            knn_pixels=max(knn_pixels(bank, queries, ks=(self.cfg.evaluation.knn_k,)).values()),
            chance=majority_accuracy(pixel_features(queries, side=1)[1]),
        )
        if hasattr(queries.dataset, "scene"):  # the embedded data knows what is object and what is background
            result["fg_miou"] = foreground_miou(teacher, queries.dataset, queries.size)
            result["fg_miou_random_init"] = foreground_miou(untrained, queries.dataset, queries.size)
        return result


def print_header(weights, backbone, bank, queries):
    count = f"{len(bank)} images in the bank, {len(queries)} queries"
    print(f"{weights}: {describe_backbone(backbone)}; {count}, {bank.protocol}")


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--weights", default="runs/laptop", help="a run folder, a .pth file of weights, or a released name "
        "such as dinov2_vits14_reg4; `random:` before it: the same network, untrained")  # fmt: skip
    add_image_args(parser)
    add_eval_args(parser)
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or shards to classify")
    add("--k", type=config.argument(config.Count), default=20, help="how many neighbours vote on --predict")
    return parser.parse_args()


def main():
    args = parse_args()
    backbone, cfg = open_backbone(args.weights, dtype=args.dtype)
    apply_eval_args(args, cfg)
    bank, queries = open_eval_sets(cfg, args.limit)
    print_header(args.weights, backbone, bank, queries)
    if args.predict:
        photos = open_images(args.predict, Reading.from_config(cfg.data))
        print_predictions(backbone, bank, queries, photos, args.k)
        return
    workers = cfg.train.num_workers
    untrained = untrained_copy(backbone, cfg)
    known = backbone_features(backbone, bank, num_workers=workers)
    unknown = backbone_features(backbone, queries, num_workers=workers)
    rows = {
        "this backbone": knn_accuracy(*known, *unknown),
        "random initialisation": knn_backbone(untrained, bank, queries, num_workers=workers),
        "raw pixels": knn_pixels(bank, queries),
    }
    print(f"{'top-1 accuracy':22s}" + "".join(f"  k={k:<5d}" for k in rows["raw pixels"]))
    for name, row in rows.items():
        print(f"{name:22s}" + "".join(f"  {accuracy:<7.3f}" for accuracy in row.values()))
    print(f"{'chance':22s}  {majority_accuracy(pixel_features(queries, 1)[1]):.3f}")
    predicted, _, _ = knn_predict(*known, unknown[0], k=20)
    print_recall(predicted, unknown[1], bank.dataset.classes)
    for image in [*bank.bad.values(), *queries.bad.values()]:
        print("skipped", image)


if __name__ == "__main__":
    config.run(main)
