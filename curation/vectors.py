"""Vectors, one for each image: where they come from, their neighbours, their clusters, lines through them.

curate.py uses them; nothing here knows what an image is for. Vectors are unit rows in half precision, on the
disk (memory-mapped) if they are many, and everything is computed from blocks of rows, in float64.

What is unusual: several processes (torchrun) share the work and find the same to the last bit. A block is
computed by one process whatever their number; and sums are exact: half-precision numbers up to 1 are
multiples of 2**-24, of which float64 adds 2**29 without rounding, in any order.
"""

import csv
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError
from data import normalize
from distributed import all_reduce, rank, world_size
from features import EvalImages, iterate_batches
from runfolder import atomic_open
from sources import ImageFiles, open_source
from tools.weights import open_backbone

try:
    import faiss  # optional: approximate neighbours in large banks
except ImportError:
    faiss = None

BLOCK, BANK = 1024, 16_384  # rows that meet at a time
ITERATIONS, SAMPLE = 20, 20_000  # of k-means; rows among which its first centroids are drawn
PARTITION = 1000  # rows, on average, among which near-duplicates are sought
FAISS_FROM = 1_000_000  # vectors from which faiss takes over, where it is installed


def digest(*parts):
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def stamp(*files):
    """A text that changes when one of the files does; only their sizes and times are looked at."""
    facts = [os.stat(f) if os.path.exists(f) else None for f in files]
    return digest([f and (f.st_size, f.st_mtime_ns) for f in facts])


class Eye:
    """Data sets -> unit vectors in half precision, by a backbone or looked up in a file of embeddings."""

    def __init__(self, f):
        self.f = f
        if f.embeddings:
            try:
                file = np.load(f.embeddings, mmap_mode="r")
                self.x, names = (
                    (file["cls"], file["paths"]) if isinstance(file, np.lib.npyio.NpzFile) else (file, [])
                )
                self.width = self.x.shape[1]
            except (OSError, ValueError, KeyError, IndexError) as e:
                raise UserError(
                    f"{f.embeddings} must hold rows: .npy, or .npz of cls and paths ({e})"
                ) from None
            self.mark, self.number = stamp(f.embeddings), {place(name): i for i, name in enumerate(names)}
        else:
            self.backbone, cfg = open_backbone(f.weights)
            self.size = f.size or cfg.evaluation.image_size or cfg.crops.global_crops_size
            self.resize = 0 if f.size else cfg.evaluation.resize_size
            tensors = [(k, w.double().sum().item()) for k, w in self.backbone.state_dict().items()]
            self.mark, self.width = digest(tensors, self.size, self.resize, f.batch), self.backbone.embed_dim

    def __call__(self, images, numbers=None):
        """Images, their numbers in the pile -> float16 (n, D); zeros for what cannot be seen."""
        if self.f.embeddings:
            x = np.asarray(self.x[self.find(images, numbers)], np.float32)
            if not np.isfinite(x).all():
                raise UserError(f"{self.f.embeddings} holds numbers that are not finite: make it anew")
            return unit(torch.from_numpy(x))
        out = np.zeros((len(images), self.width), np.float16)
        sight, device = EvalImages(images, self.size, self.resize), next(self.backbone.parameters()).device
        sight.keep, threads = False, torch.get_num_threads()  # each is looked at once
        torch.set_num_threads(1)  # more would round otherwise; several processes are as fast
        with torch.no_grad():
            for x, _, where in iterate_batches(sight, self.f.batch):
                out[where] = unit(self.backbone(normalize(x.to(device))).cls.float())
        torch.set_num_threads(threads)
        return out

    def find(self, images, numbers):
        """Rows of the embeddings: by name in an .npz, by number in the pile in an .npy."""
        if not self.number and numbers is not None and max(numbers) < len(self.x):
            return numbers
        names = [place(images.name(i)) for i in range(len(images))]
        if missing := [name for name in names if name not in self.number]:
            raise UserError(f"{self.f.embeddings} has no row for {missing[0]}: embed it too, or name weights")
        return [self.number[name] for name in names]


def place(name):
    """One name for one image, however it is written: an absolute path, in a shard without its extension."""
    file, inside, member = str(name).partition("::")
    folder, base = os.path.split(member)
    return os.path.abspath(file) + inside + os.path.join(folder, base.split(".")[0])


def chain(whole, parts, width):
    """Files of float16 rows (n, width), one after the other, as one file."""
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    with atomic_open(whole) as f:
        head = dict(descr="<f2", fortran_order=False, shape=(sum(n for n, _ in shapes), width))
        np.lib.format.write_array_header_1_0(f, head)
        f.writelines(np.load(part).tobytes() for part in parts)


def unit(x):
    return F.normalize(x, dim=1).half().cpu().numpy()


# ---------------------------------------------------------------- neighbours, k-means


def block(x):
    """Rows of features -> float64, on the GPU if there is one."""
    x = torch.from_numpy(np.array(x))  # a copy: what is mapped cannot be written
    return x.to("cuda" if torch.cuda.is_available() else "cpu").double()


def nearest(x, bank, k=1):
    """The k rows of bank (m, D) nearest to each of x (n, D): cosines and numbers (n, k), nearest first."""
    k, n = min(k, len(bank)), len(x)
    best, which = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.int64)
    search = faiss_search(bank) if faiss and len(bank) >= FAISS_FROM else exact_search(bank)
    for start in range(rank() * BLOCK, n, world_size() * BLOCK):
        best[start : start + BLOCK], which[start : start + BLOCK] = search(x[start : start + BLOCK], k)
    return all_reduce(best).numpy(), all_reduce(which).numpy()


def exact_search(bank):
    def search(x, k):
        rows, found = block(x), []
        for first in range(0, len(bank), BANK):
            cosines, i = (rows @ block(bank[first : first + BANK]).T).topk(min(k, len(bank) - first, BANK))
            found = [torch.cat(pair, 1) for pair in zip(found, (cosines, i + first))] or [cosines, i + first]
            best = found[0].topk(min(k, found[0].shape[1]))
            found = [best.values, found[1].gather(1, best.indices)]
        return found[0].cpu(), found[1].cpu()

    return search


def faiss_search(bank):
    """The same, approximately: an inverted file of 4 sqrt(m) lists, of which 32 are looked through."""
    kind = f"IVF{int(4 * len(bank) ** 0.5)},Flat"
    index = faiss.index_factory(bank.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(np.asarray(bank[:: max(len(bank) // 500_000, 1)], np.float32))
    for first in range(0, len(bank), BANK):
        index.add(np.asarray(bank[first : first + BANK], np.float32))
    index.nprobe = 32
    return lambda x, k: tuple(map(torch.from_numpy, index.search(np.asarray(x, np.float32), k)))


def kmeans(x, k, seed=0, rounds=0):
    """Spherical k-means of unit rows x (n, D) float16 -> centroids (k, D) float16, each row's cluster (n,).

    A round of resampling does it anew on as many rows of each cluster as half a mean cluster has, the nearest
    to the centroid: so crowds weigh less, and centroids spread over what there is, not over how often (Vo et
    al., 2024).
    """
    use = np.ones(len(x), bool)
    for turn in range(rounds + 1):
        bank = plant(x, np.flatnonzero(use), k, seed + turn)
        for _ in range(ITERATIONS):
            cosine, index = (a[:, 0] for a in nearest(x, bank))
            old, bank = bank, means(x, index, use, bank)
            if np.array_equal(old, bank):
                break
        order, sizes = np.lexsort((-cosine, index)), np.bincount(index, minlength=k)
        place = np.arange(len(x)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within its cluster
        use[order] = place < max(len(x) // (2 * k), 1)
    return bank, nearest(x, bank)[1][:, 0]


def plant(x, numbers, k, seed):
    """k-means++ on a sample of some rows: a centroid is drawn by its distance from those before it."""
    sample = x[numbers[:: max(len(numbers) // max(SAMPLE, 4 * k), 1)]]
    rng = np.random.default_rng(seed)
    rows, chosen = block(sample), [int(rng.integers(len(sample)))]
    far = 1 - rows @ rows[chosen[0]]
    while len(chosen) < k:
        total = far.clamp_(min=0).cumsum(0)
        draw = int(torch.searchsorted(total, rng.random() * float(total[-1])))
        chosen.append(min(draw, len(rows) - 1))
        far = torch.minimum(far, 1 - rows @ rows[chosen[-1]])
    return np.asarray(sample[chosen])


def means(x, index, use, old):
    """The centroids of the rows in use; one without rows stays. The sums are exact: see the top."""
    sums = torch.zeros(len(old), x.shape[1] + 1, dtype=torch.float64)
    for start in range(rank() * BLOCK, len(x), world_size() * BLOCK):
        mine = start + np.flatnonzero(use[start : start + BLOCK])
        sums.index_add_(0, torch.from_numpy(index[mine]), F.pad(block(x[mine]).cpu(), (0, 1), value=1.0))
    sums = all_reduce(sums)  # the last column has counted the rows
    return np.where(sums[:, -1:].numpy() > 0, unit(sums[:, :-1]), old)


def families(x, side, within, across):
    """Near-duplicates: rows (n, D) hang together at a cosine above `within`, or above `across` if they differ
    in side (n,) bool -> the first row of each one's family (n,).

    They are sought in k-means partitions of PARTITION rows on average (SemDeDup, Abbas et al. 2023); each
    row looks into the two nearest ones, which finds most of the pairs that a border divides.
    """
    near = nearest(x, kmeans(x, max(len(x) // PARTITION, 1))[0], 2)[1]
    order, pairs = np.argsort(near.ravel(), kind="stable") // near.shape[1], [np.empty((0, 2), np.int64)]
    groups = np.split(order, np.cumsum(np.bincount(near.ravel()))[:-1])
    for members in groups[rank() :: world_size()]:
        for part in np.split(members, range(BLOCK, len(members), BLOCK)):
            cosine = (block(x[part]) @ block(x[members]).T).cpu().numpy()
            differ = side[part][:, None] != side[members]
            a, b = np.nonzero((cosine > within) | differ & (cosine > across))
            pairs.append(np.stack([part[a], members[b]], 1))
    found = torch.zeros(world_size(), len(x), dtype=torch.int64)
    found[rank()] = torch.from_numpy(components(len(x), np.concatenate(pairs).tolist()))
    links = [x for roots in all_reduce(found).tolist() for x in enumerate(roots) if x[0] != x[1]]
    return components(len(x), links)


def components(n, pairs):
    """Union-find: pairs of numbers below n -> (n,), for each the smallest that it hangs together with."""
    parent = list(range(n))

    def find(x):
        while parent[x] != x:
            parent[x] = x = parent[parent[x]]  # halve the way for those who come later
        return x

    for a, b in pairs:
        a, b = find(a), find(b)
        parent[max(a, b)] = min(a, b)
    return np.array([find(x) for x in range(n)], np.int64)


# ---------------------------------------------------------------- an equal share for each cluster


def fill(sizes, total):
    """Water-filling: how much to take of each group, min(size, water level), `total` in all."""
    quota, left = np.zeros(len(sizes), np.int64), min(int(total), int(np.sum(sizes)))
    for turn, i in enumerate(np.argsort(sizes, kind="stable")):  # what a small one leaves is for the others
        quota[i] = min(sizes[i], left // (len(sizes) - turn))
        left -= quota[i]
    return quota


def pour(levels, order, total):
    """levels: clusters (n,) at each level, coarsest first; order: numbers (n,) -> the `total` numbers taken.

    An equal share for each domain, in it for each cluster, down to the finest; there, the first in order.
    """
    groups = [(order, total)]
    for labels in levels:
        finer = []
        for members, amount in groups:
            clusters, sizes = np.unique(labels[members], return_counts=True)
            finer += [(members[labels[members] == c], q) for c, q in zip(clusters, fill(sizes, amount))]
        groups = finer
    return np.concatenate([members[:amount] for members, amount in groups])


def entropy(labels):
    """Of the frequencies of labels: 1 = all the same number of times, 0 = only one."""
    p = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(p * np.log(p)).sum() / np.log(len(p))) if len(p) > 1 else 0.0


# ---------------------------------------------------------------- linear heads


def fit(x, y, logistic):
    """Ridge (one step) or logistic regression by Newton's method: x (n, D), y (n,) -> weight (D,), bias."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = np.column_stack([(x - mean) / std, np.ones(len(x))])
    w, penalty = np.zeros(z.shape[1]), np.diag([10.0] * x.shape[1] + [1e-6])
    for _ in range(25 if logistic else 1):
        p = sigmoid(z @ w) if logistic else z @ w
        curvature = p * (1 - p) if logistic else np.ones(len(z))
        w += np.linalg.solve((z.T * curvature) @ z + penalty, z.T @ (y - p) - penalty @ w)
    return np.float32(w[:-1] / std), np.float32(w[-1] - (w[:-1] * mean / std).sum())


def sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -60, 60)))


def apply(head, x):
    """A head on rows x (n, D), block by block -> (n,): p if it has a threshold, else ratings."""
    z = [block(x[i : i + BLOCK]).cpu().numpy() @ head["weight"] for i in range(0, len(x), BLOCK)]
    z = np.concatenate(z) + head["bias"]
    return sigmoid(z) if "threshold" in head else z


def held_out(x, y, logistic, folds=5):
    """The score of each example (n,) by a head that was fitted without it."""
    scores, fold = np.empty(len(y)), np.random.default_rng(0).permutation(len(y)) % folds
    for f in range(folds):
        weight, bias = fit(x[fold != f], y[fold != f], logistic)
        scores[fold == f] = x[fold == f] @ weight + bias
    return sigmoid(scores) if logistic else scores


def heads(eye, c):
    """The heads that the settings `content` ask for -> [(column, head, note)]."""
    found = [("aesthetics", *train_aesthetics(eye, c.ratings))] if c.ratings else []
    if c.head:
        try:
            with np.load(c.head) as file:
                head = {k: file[k] for k in ("weight", "bias", "threshold")}
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{c.head} must be an .npz with weight, bias and threshold ({e})") from None
        found.append(("blocked", head, f"content head {c.head}"))
    elif c.block or c.allow:
        found.append(("blocked", *train_filter(eye, c)))
    for _, head, _ in found:
        if head["weight"].shape != (eye.width,):
            raise UserError(f"the head is for {len(head['weight'])} features, here are {eye.width}")
    return found


def train_filter(eye, c):
    """Allowed and blocked examples -> a head, and a note with its cross-validated precision and recall."""
    if not (c.allow and c.block):
        raise UserError("content.allow and content.block belong together: name examples of both")
    allowed, blocked = (eye(open_source(uri)).astype(np.float64) for uri in (c.allow, c.block))
    x, y = np.concatenate([allowed, blocked]), np.repeat([0.0, 1.0], [len(allowed), len(blocked)])
    p = held_out(x, y, logistic=True)
    cut = np.sort(p[y == 1])[min(int((1 - c.recall) * len(blocked)), len(blocked) - 1)]
    weight, bias = fit(x, y, logistic=True)
    precision, recall = y[p >= cut].mean(), (p >= cut)[y == 1].mean()
    note = (
        f"content head of {len(allowed)} allowed and {len(blocked)} blocked examples; cross-validated at its "
    )
    note += f"threshold {cut:.3f}: precision {precision:.3f}, recall {recall:.3f}"
    return dict(weight=weight, bias=bias, threshold=cut), note


def train_aesthetics(eye, ratings):
    """A CSV of path,rating -> a head, and a note with its rank correlation on held-out images."""
    try:
        with open(ratings, newline="", encoding="utf-8") as f:
            paths, y = zip(*((line["path"], float(line["rating"])) for line in csv.DictReader(f)))
    except (OSError, KeyError, ValueError) as e:
        raise UserError(f"{ratings} must be a CSV with columns path and rating ({e!r})") from None
    images = ImageFiles([(os.path.join(os.path.dirname(ratings), path), None, -1, 0) for path in paths])
    x, y = eye(images).astype(np.float64), np.array(y)
    ranks = [np.argsort(np.argsort(v)) for v in (held_out(x, y, logistic=False), y)]
    weight, bias = fit(x, y, logistic=False)
    agree = np.corrcoef(ranks)[0, 1]
    note = f"aesthetics head of {len(y)} ratings; rank correlation on held-out ones {agree:.3f}"
    return dict(weight=weight, bias=bias), note
