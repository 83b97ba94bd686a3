"""Weighted k-nearest-neighbour classification on frozen features: how good is a backbone, without training
anything.

    python eval_knn.py --weights runs/laptop             # a run folder: its own teacher, its own data
    python eval_knn.py --weights teacher.pth --train folder:/data/train --test folder:/data/test
    python eval_knn.py --weights runs/laptop --predict cat.jpg dog.jpg --out predictions

Prints top-1 accuracy for k = 10, 20, 100, 200, beside what any number must beat: chance, raw pixels, and the
same architecture at random initialisation. Protocol of DINOv2: cosine similarity of [CLS], votes weighted by
exp(sim / 0.07). With --predict, the class of each image, its share of the votes, how often a share like this
was right among the labelled queries, and two pictures: the neighbours that voted, and the reliability plot.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import config
import visualize
from config import UserError
from data import BadImage, open_source
from distributed import rank
from features import (
    EvalImages,
    batches,
    extract,
    foreground_miou,
    name_of,
    open_photos,
    open_weights,
    random_twin,
    weights_flags,
)
from model import describe

KS, TEMPERATURE = (10, 20, 100, 200), 0.07


def knn_scores(bank, bank_labels, queries, classes, ks=KS, temperature=TEMPERATURE, chunk=1024):
    """bank (n, D), queries (m, D), both L2-normalised; labels (n,) -> {k: (m, classes)}, the mass of votes
    per class.

    The softmax runs over the largest k, and smaller k take the first of its weights (a fact of the published
    protocol). A bank smaller than k simply has fewer neighbours.
    """
    ks = sorted({min(k, len(bank)) for k in ks})
    scores = {k: [] for k in ks}
    for q in queries.split(chunk):
        similarity, neighbours = (q @ bank.T).topk(ks[-1])  # (chunk, largest k), nearest first
        weights = F.softmax(similarity / temperature, dim=-1)
        classes_of = bank_labels[neighbours]  # (chunk, largest k)
        for k in ks:
            votes = torch.zeros(len(q), classes).scatter_add_(1, classes_of[:, :k], weights[:, :k])
            scores[k].append(votes)
    return {k: torch.cat(v) for k, v in scores.items()}


def knn_accuracy(bank, bank_labels, queries, labels, ks=KS):
    """Top-1 accuracy in 0...1 for each k; features need not be normalised."""
    classes = int(max(bank_labels.max(), labels.max())) + 1
    scores = knn_scores(F.normalize(bank, dim=-1), bank_labels, F.normalize(queries, dim=-1), classes, ks)
    return {k: (s.argmax(-1) == labels).float().mean().item() for k, s in scores.items()}


def labelled(features, labels):
    """Those rows whose label is known (0 or more); k-NN has no use for the others."""
    known = labels >= 0
    if not known.any():
        raise UserError("none of the evaluation images can be read and has a label, as k-NN needs")
    return features[known], labels[known]


def pixels(images, side=32):
    """Raw pixels as features (n, 3 side side) and labels (n,): what no network at all can see."""
    small = [
        (F.interpolate(x.float(), size=(side, side), mode="area").flatten(1), y)
        for x, y, _ in batches(images)
    ]
    return labelled(*(torch.cat(parts) for parts in zip(*small, strict=True)))


def knn_pixels(bank, queries, ks=KS):
    """k-NN on raw pixels of two EvalImages, the bank's mean image taken off -> {k: accuracy}."""
    (x, y), (q, labels) = pixels(bank), pixels(queries)
    mean = x.mean(0)
    return knn_accuracy(x - mean, y, q - mean, labels, ks)


def knn_backbone(backbone, bank, queries, ks=KS, batch_size=256, num_workers=0):
    """k-NN on a backbone's [CLS] over two EvalImages -> {k: accuracy}."""
    x, y = labelled(*extract(backbone, bank, batch_size, num_workers)[:2])
    return knn_accuracy(x, y, *labelled(*extract(backbone, queries, batch_size, num_workers)[:2]), ks)


def chance(labels):
    """The accuracy of always naming the most frequent class."""
    return (labels.bincount().max() / len(labels)).item()


def eval_flags(parser):
    """Which labelled images, for the scripts that judge a backbone by them."""
    add = parser.add_argument
    add("--train", default="", help="the labelled bank, e.g. folder:/data/train (default: the run's own)")
    add("--test", default="", help="the labelled queries (default: the run's own)")
    add("--image-size", type=int, default=0, help="side of the square the network sees, in pixels")
    add("--limit", type=int, default=0, help="use only so many images of each set, evenly spread")


def eval_sets(cfg, train_path="", test_path="", limit=0):
    """Bank and queries as the config says: (EvalImages, EvalImages)."""
    paths = train_path or cfg.evaluation.train_path, test_path or cfg.evaluation.test_path
    if not all(paths):
        raise UserError("no labelled images: give --train and --test, or evaluation.train_path and test_path")
    size = cfg.evaluation.image_size or cfg.crops.global_crops_size
    resize = cfg.evaluation.resize_size or size
    bank, queries = (EvalImages(open_source(p), size, resize, limit) for p in paths)
    for images, path in ((bank, paths[0]), (queries, paths[1])):
        if all(isinstance(images[i], BadImage) or images[i][1] < 0 for i in range(min(8, len(images)))):
            raise UserError(f"{path} has no labels (sub-folders, .cls files): k-NN needs labelled images")
    names = bank.dataset.classes, queries.dataset.classes
    if None not in names and names[0] != names[1]:  # labels are numbers in the order of the names
        odd = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:3])
        raise UserError(f"{paths[0]} and {paths[1]} do not have the same classes: {odd} is in one alone")
    return bank, queries


# ---------------------------------------------------------------- one image, its class, and how sure


def vote(bank, bank_labels, queries, k):
    """-> class (m,), its share of the votes (m,) in 0...1, and who voted (m, k), nearest first."""
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    k = min(k, len(bank))
    share, predicted = knn_scores(bank, bank_labels, queries, int(bank_labels.max()) + 1, ks=(k,))[k].max(-1)
    return predicted, share, (queries @ bank.T).topk(k).indices


def calibration(share, right, bins=10):
    """Is a share of 0.8 right in 80 % of cases? -> expected calibration error (Guo et al. 2017, equation 3),
    and per bin of equal width its mean share, how often it was right, and the number of cases.

    share (m,) in 0...1, right (m,) bool.
    """
    which = (share * bins).long().clamp(max=bins - 1)
    count = which.bincount(minlength=bins)
    mean, hit = (which.bincount(x.double(), bins) / count.clamp(min=1) for x in (share, right))
    error = ((mean - hit).abs() * count).sum() / len(share)
    return error.item(), list(zip(mean.tolist(), hit.tolist(), count.tolist()))


def reliability_plot(error, table, side=360):
    """The bins of `calibration` as bars under the diagonal of perfect honesty -> PIL image."""
    left, top, gap = 62, 34, 2
    picture = Image.new("RGB", (left + side + 20, top + side + 60), "white")
    draw, width, cases = ImageDraw.Draw(picture), side / len(table), sum(n for *_, n in table)
    for b, (_, hit, count) in enumerate(table):
        x, tall = left + b * width, top + side * (1 - hit)
        shade = round(225 - 150 * (count / cases) ** 0.5)  # dark where most cases are
        if count:
            draw.rectangle([x + gap, tall, x + width - gap, top + side], fill=(shade, shade, 235))
            draw.text((x + width / 2, tall - 2), str(count), "black", anchor="mb", font_size=11)
    draw.rectangle([left, top, left + side, top + side], outline="black")
    draw.line([left, top + side, left + side, top], fill=(200, 60, 40), width=2)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        draw.text((left + tick * side, top + side + 4), f"{tick:g}", "black", anchor="mt", font_size=12)
        draw.text((left - 6, top + side * (1 - tick)), f"{tick:g}", "black", anchor="rm", font_size=12)
    draw.text((left + side / 2, top + side + 24), "share of the votes", "black", anchor="mt", font_size=14)
    upright = Image.new("RGB", (side, 20), "white")
    ImageDraw.Draw(upright).text((side / 2, 2), "share that is right", "black", anchor="mt", font_size=14)
    picture.paste(upright.rotate(90, expand=True), (4, top))
    title = f"expected calibration error {error:.3f}, {cases} queries (numbers: cases per bar)"
    draw.text((left + side / 2, 8), title, "black", anchor="mt", font_size=12)
    return picture


@torch.no_grad()
def predict(backbone, bank, queries, photos, k, out):
    """Prints class and confidence of each of the `photos` (a data set) and writes two pictures into `out`."""
    x, y = labelled(*extract(backbone, bank)[:2])
    q, truth = labelled(*extract(backbone, queries)[:2])
    predicted, share, _ = vote(x, y, q, k)
    error, table = calibration(share, predicted == truth)
    images = EvalImages(photos, bank.size, bank.resize)
    features = extract(backbone, images)[0]
    for why in images.bad.values():
        print("left out:", why)
    if not len(features):
        raise UserError("none of these images can be read")
    readable = [i for i in range(len(images)) if i not in images.bad]
    in_bank = [i for i in range(len(bank)) if i not in bank.bad and bank[i][1] >= 0]  # the rows of x
    names = bank.dataset.classes or range(int(y.max()) + 1)
    rows, captions = [], []
    for i, c, s, near in zip(readable, *(v.tolist() for v in vote(x, y, features, k))):
        _, hit, count = table[min(int(s * len(table)), len(table) - 1)]
        often = f"right in {hit:.0%} of {count} queries with such a share" if count else "no query had one"
        print(f"{name_of(photos, i)}: {names[c]}, {s:.0%} of the votes ({often})")
        rows.append([tile(images[i][0]), *(tile(bank[in_bank[j]][0]) for j in near[:8])])
        captions.append([f"{names[c]} {s:.0%}", *(str(names[y[j]]) for j in near[:8])])
    print(f"expected calibration error on {len(q)} queries: {error:.3f}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        visualize.page(rows, captions=captions).save(out / "neighbours.png")
        reliability_plot(error, table).save(out / "reliability.png")
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another --out") from None
    print(f"wrote {out}/neighbours.png (each image, and beside it its nearest) and {out}/reliability.png")


def tile(pixels, side=96):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((side, side), Image.BICUBIC)


# ---------------------------------------------------------------- while training, and at its end


class Judge:
    """k-NN of the teacher, on the way and at the end with baselines; silent without labelled images."""

    def __init__(self, cfg, t):
        self.cfg, self.sets, self.online, e = cfg, None, None, cfg.evaluation
        self.wanted = bool(e.train_path and e.test_path)  # known to all ranks; the images only to rank 0
        self.period = e.eval_period_iterations if self.wanted else 0
        if self.wanted and rank() == 0:
            self.sets = self.online = eval_sets(cfg)
            if e.online_limit:
                self.online = eval_sets(cfg, limit=e.online_limit)

    def knn(self, backbone, sets):
        """-> top-1 accuracy, or None on the ranks (and in the runs) that do not evaluate."""
        if sets is None:
            return None
        e = self.cfg.evaluation
        how = dict(ks=(e.knn_k,), batch_size=e.batch_size, num_workers=self.cfg.train.num_workers)
        return max(knn_backbone(backbone, *sets, **how).values())

    def final(self, teacher):
        """The numbers of result.json."""
        if self.sets is None:
            return {}
        (bank, queries), e = self.sets, self.cfg.evaluation
        self.random = random_twin(teacher, self.cfg, self.cfg.train.seed)
        result = dict(knn_top1=self.knn(teacher, self.sets), knn_random_init=self.knn(self.random, self.sets),
                      knn_pixels=max(knn_pixels(bank, queries, ks=(e.knn_k,)).values()),
                      chance=chance(pixels(queries, side=1)[1]))  # fmt: skip
        if hasattr(queries.dataset, "scene"):  # the embedded data knows what is object and what is background
            result["fg_miou"] = foreground_miou(teacher, queries.dataset, queries.size)
            result["fg_miou_random_init"] = foreground_miou(self.random, queries.dataset, queries.size)
        return result

    def picture(self, teacher, path):
        """pca.png: some of the query images, as the teacher and a random network see them."""
        if self.sets is not None:
            queries = self.sets[1]
            sample = visualize.large_sample(queries.dataset, queries.size, queries.resize, 8)
            visualize.pca_sheet([teacher, self.random], sample).save(path)


def table(result):
    """The last lines on the console."""
    rows = [("k-NN top-1", "knn_top1", "knn_random_init", "knn_pixels", "chance"),
            ("foreground mIoU", "fg_miou", "fg_miou_random_init")]  # fmt: skip
    rows = [(name, [f"{result[k]:.3f}" for k in keys]) for name, *keys in rows if keys[0] in result]
    head = [("", ["trained", "random init", "raw pixels", "chance"])] if rows else []
    lines = [f"{name:16s}" + "".join(f"{cell:>13s}" for cell in cells) for name, cells in head + rows]
    steps, seconds, rate = (result[k] for k in ("steps", "train_seconds", "images_per_second"))
    return "\n".join([*lines, f"{steps} steps in {seconds:.0f} s, {rate:.0f} images/s"])


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    weights_flags(parser)
    eval_flags(parser)
    add("--predict", nargs="+", metavar="IMAGE", help="images, folders or shards to classify")
    add("--out", type=Path, default="predictions", help="folder for the two pictures of --predict")
    add("--k", type=int, default=20, help="how many neighbours vote on --predict")
    args = parser.parse_args()
    photos = open_photos(args.predict) if args.predict else None
    backbone, cfg = open_weights(args.weights, args.download)
    if args.image_size:
        cfg.evaluation.image_size = cfg.evaluation.resize_size = args.image_size
    bank, queries = eval_sets(cfg, args.train, args.test, args.limit)
    print(f"{args.weights}: {describe(backbone)}; {len(bank)} images in the bank, {len(queries)} queries")
    if photos:
        return predict(backbone, bank, queries, photos, args.k, args.out)
    how, random = dict(num_workers=cfg.train.num_workers), random_twin(backbone, cfg)
    rows = {"this backbone": knn_backbone(backbone, bank, queries, **how),
            "random initialisation": knn_backbone(random, bank, queries, **how),
            "raw pixels": knn_pixels(bank, queries)}  # fmt: skip
    print(f"{'top-1 accuracy':22s}" + "".join(f"  k={k:<5d}" for k in rows["raw pixels"]))
    for name, row in rows.items():
        print(f"{name:22s}" + "".join(f"  {a:<7.3f}" for a in row.values()))
    print(f"{'chance':22s}  {chance(pixels(queries, 1)[1]):.3f}")
    for image in [*bank.bad.values(), *queries.bad.values()]:
        print("skipped", image)


if __name__ == "__main__":
    config.run(main)
