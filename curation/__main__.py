"""From a pile of images to a training set that one can defend: one manifest, one funnel.

    python curate.py run folder:/pile out --config configs/curation/web.yaml --workers 8
    python curate.py dedup folder:/pile out ...     # up to this stage; what is done is not done again
    torchrun --nproc-per-node 8 curate.py run 'tar:/pile/{00000..00099}.tar' out ...    # on many machines too

ingest: each image is read once: decoded, measured, hashed. quality: rules over those scores. dedup: same
bytes, looks or features; what hangs together with an evaluation set goes altogether. content: linear heads
on features, for what must not and what should be there. balance: an equal share for each domain, or the
neighbours of a seed set. write: tar shards, manifest.jsonl, funnel.html. Pixels are never changed or
deleted. No head is shipped and no backbone named: until you do, the stages that need one are off, and say
so. Downloading is img2dataset's job (`img2dataset --url_list urls.parquet --input_format parquet
--output_format webdataset --output_folder pile`).

What is unusual here: any number of processes, killed any number of times, write the same bytes. Work is cut
into pieces (a shard, or 1,000 files). What comes of a piece, and the verdict of a stage, is a file that is
there as a whole or not at all, named by a hash of all it depends on. Memory: one piece, under 800 bytes
for each image and, where features are balanced, two for each number of theirs (vectors.py).
"""

import argparse
import hashlib
import json
import os
import re
import tarfile
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from glob import glob
from io import BytesIO
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

import config
from config import Count, Positive, Share, UserError, Whole
from curation import page as funnel
from curation import vectors
from distributed import all_reduce_ints, broadcast_object, cleanup, rank, setup, world_size
from runfolder import acquire_lock, atomic_open, atomic_write_text
from sources import BadImage, ImageFiles, decode_image, index_tar, open_source, to_rgb

VERSION = 1  # of what the stages compute: raise it, and nothing old is taken for done
THUMB = 128  # pixels, at least, of the short side of the grey picture on which everything is measured
REASONS = ("kept", "unreadable", "small", "long", "dark", "bright", "flat", "blurred", "exact duplicate",
           "near duplicate", "feature duplicate", "leak", "ugly", "blocked", "not retrieved",
           "over quota")  # fmt: skip
SCORES = ("sharpness", "entropy", "dark", "bright")

Cut = Annotated[float, -1e15, 1e15, "a number, or a percentile of the pile such as 2%"]
Cosine = Annotated[float, -1, 2, "a cosine, or 2 for off"]


# fmt: off
class Settings:
    """Every threshold, as in `cfg.quality.min_side`. A Cut "2%" lies where 2 % of the pile are below it."""
    class ingest:
        piece: Count = 1000  # files that are one piece of work; a tar shard is one, whatever it holds
    class quality:
        min_side: Whole = 200  # pixels of the shorter side (DataComp)
        max_aspect: Positive = 3.0  # longer side over shorter (DataComp)
        min_dark: Cut = 0.32  # brightness (0 to 1) that the lightest 1 % of pixels reach; below: black
        max_bright: Cut = 0.95  # brightness that all but the darkest 5 % exceed; above: white
        min_entropy: Cut = 3.0  # bits of the grey histogram, 8 at most; below: flat
        min_sharpness: Cut = 0.03  # variance of the Laplacian over that of the grey picture; below: blurred
    class dedup:
        radius: Whole = 6  # bits of 64 that may differ in pHash or in dHash; radius + 2 bands find them all
        other_radius: Whole = 10  # and in the other one: two so different hashes seldom err together
        evaluation: str = ""  # data URIs with ";" between: nothing that resembles their images may stay
    class features:
        weights: str = ""  # as --weights of features.py; empty: no features, no stage that needs them
        embeddings: str = ""  # or made elsewhere: .npz (cls, paths), .npy (a row per image in ingest's order)
        size: Whole = 0  # pixels that the backbone sees; 0 = its own
        batch: Count = 64
    class similar:
        min_cosine: Cosine = 2.0  # of features that makes duplicates; depends on the backbone
        leak_cosine: Cosine = 2.0  # of features to an evaluation image; below min_cosine is the safe side
    class content:
        allow: str = ""  # data URI of examples that are fine
        block: str = ""  # of examples that are not: from both, a head is trained and cross-validated
        recall: Share = 0.99  # of blocked examples in cross-validation: sets the threshold
        head: str = ""  # or a head from a file: .npz of weight (D,), bias, threshold
        ratings: str = ""  # CSV of path,rating (paths relative to it): trains the aesthetics score
        min_aesthetics: Cut = -1e15  # in the units of the ratings
        files = lambda self: [x for x in (self.ratings, self.head, self.allow, self.block) if x]  # noqa: E731
    class balance:
        seeds: str = ""  # data URI: keep the k nearest of each of its images, and nothing else
        k: Count = 4  # LVD-142M: 4 for large seed sets, 32 for small ones
        target: Whole = 0  # images to stay, spread evenly over domains; 0 = all
        clusters: str = "1000 100 10"  # of hierarchical k-means, finest first; the last are the domains
        rounds: Whole = 3  # of resampling, against clusters that sit where images are many
        seed: Whole = 0  # of the first centroids
    class write:
        images: Count = 10_000  # of a shard
    # fmt: on

    def __init__(self):
        for name in SECTIONS:
            setattr(self, name, dataclass(getattr(Settings, name))())


SECTIONS = [name for name, section in vars(Settings).items() if isinstance(section, type)]
KINDS = {f"{s}.{key}": kind for s in SECTIONS for key, kind in vars(Settings)[s].__annotations__.items()}


def load(file=None, overrides=()):
    """Settings: the defaults, then a YAML file, then texts "section.key=value". UserError for the unknown."""
    cfg = Settings()
    for source in filter(None, (file and Path(file), *overrides)):
        for name, value in config.read(source).items():
            if name not in KINDS:
                near = get_close_matches(name, KINDS, 1, 0)[0]
                raise UserError(f"there is no setting {name}; the nearest is {near}")
            section, key = name.split(".")
            try:
                if KINDS[name] is not Cut or not re.fullmatch(r"\d+(\.\d+)?%", str(value)):
                    value = config.convert(KINDS[name], value)
                setattr(getattr(cfg, section), key, value)
            except ValueError as e:
                raise UserError(f"{name} is {value!r}, but must be {e}") from None
    return cfg


def pieces(uri, size):
    """A data URI -> its pieces: paths of tar shards, or (Images, first, end) of at most `size` files."""
    kind, _, rest = uri.partition(":")
    if kind == "tar":
        return shards(os.path.expanduser(rest))
    images = open_source(uri)
    if not isinstance(images, ImageFiles):
        raise UserError(f"{uri} is no pile of files: write folder:, list: or tar: and a path")
    return [(images, i, min(i + size, len(images))) for i in range(0, len(images), size)]


def shards(pattern):
    """A folder, or a path with * or {000..010} -> its tar shards, in order."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = [str(k).zfill(len(braces[1])) for k in range(int(braces[1]), int(braces[2]) + 1)]
        return [path for x in numbers for path in shards(pattern.replace(braces[0], x, 1))]
    paths = sorted(glob(f"{pattern}/*.tar" if os.path.isdir(pattern) else pattern))
    if not paths:
        raise UserError(f"tar:{pattern} names no shard: give a folder, a pattern or {{000..010}}.tar")
    return paths


def entries(piece):
    """-> [(name, label or None, offset, size)] as in data.py; offset -1: a file, -2: no image there."""
    if isinstance(piece, str):  # one pass over the headers: a shard is never unpacked
        items = index_tar(piece).items()
        return [(x[0] or f"{piece}::{key}", x[1], x[2] if x[0] else -2, x[3]) for key, x in items]
    images, first, end = piece
    labels = [y if y >= 0 else None for y in images.labels[first:end].tolist()]
    if images.classes:
        labels = [y if y is None else images.classes[y] for y in labels]
    return [(images.name(i), y, *images.where[i].tolist()) for i, y in enumerate(labels, first)]


def version(piece):
    """A text that changes when a file of the piece does."""
    names = [piece] if isinstance(piece, str) else [piece[0].name(i) for i in range(*piece[1:])]
    return vectors.digest(VERSION, names, vectors.stamp(*dict.fromkeys(x.partition("::")[0] for x in names)))


def each(job, todo, workers):
    """job(x) for this process's share of the list `todo`, in `workers` processes of its own."""

    def work(batch):
        try:
            job(batch[0])
        except UserError as e:  # goes home as a text; anything else is a bug and comes with its traceback
            return str(e)

    mine = todo[rank() :: world_size()]
    loader = DataLoader(mine, 1, collate_fn=work, num_workers=min(workers, len(mine))) if mine else ()
    for problem in tqdm(loader, disable=None if rank() == 0 else True, leave=False):
        if problem:
            raise UserError(problem)
    all_reduce_ints(0)  # wait for the others


class Pile:
    """A source on its way to `out`: its pieces, and columns (n,) of what is known about each image.

    Images of evaluation sets come last, from number `own` on. `why` is an index of REASONS, `of` the number
    of the image that a duplicate or leak resembles.
    """

    def __init__(self, source, out, cfg, workers=0):
        self.cfg, self.out, self.workers, self.eye = cfg, Path(out), workers, None
        self.work, self.trail, self.notes, self.stages = self.out / "work", "", [], []
        uris = source, *filter(None, cfg.dedup.evaluation.split(";"))
        sources = [pieces(uri.strip(), cfg.ingest.piece) for uri in uris]
        self.pieces, self.owned = sum(sources, []), len(sources[0])
        self.parts = [self.work / "ingest" / f"{k:06d}-{version(p)}.jsonl" for k, p in enumerate(self.pieces)]

    def rows(self, k):
        """The rows of piece k, as ingest wrote them: dicts."""
        with open(self.parts[k], encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def some(self, numbers):
        """Ascending numbers of images -> (number, row) of each; one piece at a time in memory."""
        ends = np.searchsorted(numbers, self.first)
        for k, (a, b) in enumerate(zip(ends, ends[1:])):
            rows = self.rows(k) if b > a else ()
            yield from ((i, rows[i - self.first[k]]) for i in numbers[a:b].tolist())

    def read(self):
        """What ingest wrote -> the columns that the stages start from."""
        columns = [columns_of(self.rows(k)) for k in range(len(self.parts))]
        self.first = np.cumsum([0, *(len(c["why"]) for c in columns)])
        self.n, self.own = int(self.first[-1]), int(self.first[self.owned])
        vars(self).update({name: np.concatenate([c[name] for c in columns]) for name in columns[0]})
        self.of = self.cluster = self.domain = np.full(self.n, -1)
        self.blocked = self.aesthetics = np.full(self.n, np.nan, np.float32)
        self.trail = vectors.digest(self.trail, [part.name for part in self.parts])
        self.count("ingest")

    def decide(self, stage, judge, settings, files=()):
        """A stage's verdict: columns, from its file, or from judge(pile) -> dict of columns and `notes`.

        All processes judge (they share the work inside) and find the same; the first one writes it down.
        It depends on what came before, on the settings, and on files (or data URIs) that they name.
        """
        known = [version(p) for uri in files if ":" in uri for p in pieces(uri, 1000)]
        known += [vectors.stamp(file) for file in files if ":" not in file]
        self.trail = vectors.digest(self.trail, stage, asdict(settings), known)
        path = self.work / f"{stage}-{self.trail}.npz"
        if not broadcast_object(path.exists()):
            save(path, judge(self))
        with np.load(path) as file:
            columns = dict(file)
        self.why = np.where(self.why, self.why, columns.pop("why"))
        self.notes += columns.pop("notes", np.array([])).tolist()
        vars(self).update(columns)
        self.count(stage)

    def count(self, stage):
        counts = np.bincount(self.why[: self.own], minlength=len(REASONS)).tolist()
        self.stages.append([stage, counts[0], dict(x for x in zip(REASONS, counts) if x[1])])
        if not counts[0]:
            raise UserError(f"after {stage} no image is left: {self.stages[-1][2]}; look at the settings")

    def left(self):
        """Numbers of the source's images that are still in."""
        return np.flatnonzero(self.why[: self.own] == 0)


def save(path, columns):
    """A dict as .npz, by the first process; the others wait until it is there."""
    if rank() == 0:
        with atomic_open(path) as f:
            np.savez(f, **columns)
    all_reduce_ints(0)


def columns_of(rows):
    """Rows of a piece -> arrays (n,)."""
    take = lambda name, kind, no: np.array([r.get(name, no) for r in rows], kind)  # noqa: E731
    columns = dict(sha=take("sha256", "S64", ""), why=np.array(["why" in r for r in rows], np.uint8))
    columns |= {k: np.array([int(r.get(k, "0"), 16) for r in rows], np.uint64) for k in ("phash", "dhash")}
    columns |= {k: take(k, np.int64, 0) for k in ("width", "height", "bytes")}
    return columns | {k: take(k, np.float32, np.nan) for k in SCORES}


def ingest(pile):
    """Each piece -> a file of rows: place, SHA-256, size, scores and hashes; or why it can't be read."""

    def job(k):
        try:
            rows = [examine(*entry) for entry in entries(pile.pieces[k])]
        except UserError as e:  # no tar: costs this shard, not the run
            rows = [dict(path=os.path.abspath(pile.pieces[k]), label=None, why="unreadable", detail=str(e))]
        atomic_write_text(pile.parts[k], "".join(json.dumps(row) + "\n" for row in rows))

    each(job, [k for k, part in enumerate(pile.parts) if not part.exists()], pile.workers)
    pile.read()


def examine(name, label, offset, size):
    """One image -> its row."""
    shard, _, member = name.partition("::") if offset != -1 else (name, "", "")
    folder, base = os.path.split(member)
    place = dict(shard=os.path.abspath(shard), key=os.path.join(folder, base.split(".")[0]))
    row = dict(place if member else dict(path=os.path.abspath(name)), label=label, at=[offset, size])
    try:
        if offset == -2:
            raise BadImage(name, "the shard has no whole image of this key")
        data = load_bytes(row)
        row |= dict(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        return row | decode_image(data, name, measure)
    except (BadImage, OSError) as e:
        return row | dict(why="unreadable", detail=str(e.args[-1]))


def load_bytes(row):
    """The file of an image as it was, read in place."""
    with open(row.get("path") or row["shard"], "rb") as f:
        f.seek(max(row["at"][0], 0))
        return f.read(row["at"][1] if row["at"][0] >= 0 else -1)


def measure(image):
    """An image just opened -> size, scores and hashes, from one small grey picture of it.

    libjpeg makes a JPEG's half, quarter or eighth straight from its coefficients ("draft"), brightness only.
    """
    width, height = image.size[:: -1 if image.getexif().get(0x0112, 1) > 4 else 1]  # EXIF: lies on its side
    form = image.format.replace("MPO", "JPEG")  # a camera's JPEG of several pictures
    image.draft("L", (THUMB, THUMB))
    grey = image if image.mode == "L" and "transparency" not in image.info else to_rgb(image).convert("L")
    grey = ImageOps.exif_transpose(grey.reduce(max(min(grey.size) // THUMB, 1)))
    share = np.cumsum(grey.histogram()) / (grey.width * grey.height)
    small = grey.reduce(2) if min(grey.size) >= 64 else grey  # all that hashes need, in half the time
    return dict(width=width, height=height, format=form, sharpness=sharpness(grey),
                entropy=abs(grey.entropy()), dark=np.searchsorted(share, 0.99) / 255,
                bright=np.searchsorted(share, 0.05) / 255, phash=f"{phash(small):016x}",
                dhash=f"{dhash(small):016x}")  # fmt: skip


def sharpness(grey):
    """Variance of the Laplacian (4 times a pixel less its four neighbours), over that of the picture itself.

    Without the division, a sharp picture of low contrast passes for a blurred one.
    """
    x = np.asarray(grey, np.int16)
    y = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
    return float(y.var(dtype=np.float32) / (x.var(dtype=np.float32) + 1)) if y.size else 0.0


DCT = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))  # (8, 32): the 8 slowest waves


def phash(grey):
    """64 bits: which of the 8 x 8 slowest cosine waves of the picture are above their median."""
    low = DCT @ np.asarray(grey.resize((32, 32), Image.LANCZOS), np.float64) @ DCT.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def dhash(grey):
    """64 bits: where an 8 x 9 version of the picture grows brighter to the right."""
    x = np.asarray(grey.resize((9, 8), Image.LANCZOS))
    return int.from_bytes(np.packbits(x[:, 1:] > x[:, :-1]).tobytes(), "big")


def limit(cut, scores):
    """A Cut -> a number."""
    return float(np.percentile(scores, float(cut[:-1]))) if isinstance(cut, str) else float(cut)


def judge_quality(pile):
    q, good, why = pile.cfg.quality, pile.left(), np.zeros(pile.n, np.uint8)
    short, long = np.sort([pile.width, pile.height], axis=0)
    cut = {k: limit(getattr(q, k), getattr(pile, k[4:])[good]) for k in vars(q) if k[4:] in SCORES}
    rules = dict(small=short < q.min_side, long=long > q.max_aspect * short, dark=pile.dark < cut["min_dark"],
                 bright=pile.bright > cut["max_bright"], flat=pile.entropy < cut["min_entropy"],
                 blurred=pile.sharpness < cut["min_sharpness"])  # fmt: skip
    for name, fails in rules.items():  # the first that fails is the reason
        why[: pile.own][(why == 0)[: pile.own] & fails[: pile.own]] = REASONS.index(name)
    return dict(why=why)


def join(hashes, radius):
    """uint64 (n,) -> arrays (m, 2): all pairs of numbers whose hashes differ in at most `radius` bits.

    Exact, for of radius + 2 bands at least two are untouched: sort by every two, and slide the sorted list
    along itself for as long as they agree. 16 bits spare all but one in 65,536 comparisons."""
    edges = [64 * k // (radius + 2) for k in range(radius + 3)]
    bands = [np.uint64(2**high - 2**low) for low, high in pairwise(edges)]
    for one, other in combinations(bands, 2):
        order = np.argsort(hashes & (one | other), kind="stable")
        ranked, i, lag = hashes[order], np.arange(len(hashes)), 1
        key = ranked & (one | other)
        while len(i := i[: np.searchsorted(i, len(key) - lag)]):
            i = i[key[i] == key[i + lag]]
            near = i[np.bitwise_count(ranked[i] ^ ranked[i + lag]) <= radius]
            yield np.stack([order[near], order[near + lag]], 1)
            lag += 1


def settle(pile, rows, roots, reason):
    """The largest image of a component stays; with one of an evaluation set in it, none of the pile's does.

    rows (m,) numbers of images, roots (m,) of `components`, reason (m,) -> columns why and of.
    """
    area, why, of = pile.width[rows] * pile.height[rows], np.zeros(pile.n, np.uint8), pile.of.copy()
    order = np.lexsort((rows, -pile.bytes[rows], -area, rows < pile.own, roots))  # evaluation images first
    first = order[np.diff(roots[order], prepend=-1) > 0]
    head = np.empty(len(rows), np.int64)
    head[roots[first]] = first  # of each component: the one that stays, or the evaluation image
    head = head[roots]
    leak = rows[head] >= pile.own
    out = (rows < pile.own) & (leak | (head != np.arange(len(rows))))
    why[rows[out]] = np.where(leak, REASONS.index("leak"), reason)[out]
    of[rows[out]] = rows[head[out]]
    return dict(why=why, of=of)


def judge_hashes(pile):
    rows, d = np.flatnonzero(pile.why == 0), pile.cfg.dedup
    _, same, sha = np.unique(pile.sha[rows], return_index=True, return_inverse=True)
    both = np.stack([pile.phash, pile.dhash], 1)[rows]
    hashes, alike, kind = np.unique(both, axis=0, return_index=True, return_inverse=True)
    first_of = same[sha], alike[kind.ravel()]  # copies are many: the join compares distinct hashes only
    copies = [np.flatnonzero(first != np.arange(len(rows))) for first in first_of]
    pairs = [np.stack([some, first[some]], 1) for some, first in zip(copies, first_of)]
    for one, other in ((0, 1), (1, 0)):
        for pair in join(hashes[:, one].copy(), d.radius):
            apart = np.bitwise_count(hashes[pair[:, 0], other] ^ hashes[pair[:, 1], other])
            pairs.append(alike[pair[apart <= d.other_radius]])
    roots = vectors.components(len(rows), np.concatenate(pairs).tolist())
    exact, near = map(REASONS.index, ("exact duplicate", "near duplicate"))
    return settle(pile, rows, roots, np.where(first_of[0] != np.arange(len(rows)), exact, near))


def judge_features(pile):
    s, own = pile.cfg.similar, pile.seen < pile.own
    roots = vectors.families(pile.x, own, s.min_cosine, s.leak_cosine)
    return settle(pile, pile.seen, roots, np.full(len(own), REASONS.index("feature duplicate")))


def dedup(pile):
    cfg = pile.cfg
    pile.decide("hashes", judge_hashes, cfg.dedup)
    if cfg.features.weights or cfg.features.embeddings:
        look(pile)
        if min(cfg.similar.min_cosine, cfg.similar.leak_cosine) < 1:
            pile.decide("similar", judge_features, cfg.similar)
            pile.x, pile.seen = pile.x[keep := pile.why[pile.seen] == 0], pile.seen[keep]
    elif cfg.balance.seeds or cfg.balance.target or cfg.content.files():
        raise UserError("content and balance need features: name features.weights or features.embeddings")
    else:
        pile.notes.append("no features.weights or features.embeddings: what needs features is off")


def look(pile):
    """Features of the images still in: pile.x (m, D) float16, on the disk; pile.seen (m,) their numbers."""
    pile.eye = eye = vectors.Eye(pile.cfg.features)
    pile.trail, pile.seen = vectors.digest(pile.trail, eye.mark), np.flatnonzero(pile.why == 0)
    folder, ends = pile.work / f"features-{pile.trail}", np.searchsorted(pile.seen, pile.first)
    whole = folder.with_suffix(".npy")

    def job(k):
        numbers = pile.seen[ends[k] : ends[k + 1]]
        rows = [row for _, row in pile.some(numbers)]
        names = [(row.get("path") or "{shard}::{key}".format(**row), None, *row["at"]) for row in rows]
        with atomic_open(folder / f"{k}.npy") as f:
            np.save(f, eye(ImageFiles(names), numbers) if names else np.zeros((0, eye.width), np.float16))

    if not broadcast_object(whole.exists()):
        todo = [k for k in range(len(pile.parts)) if not (folder / f"{k}.npy").exists()]
        each(job, todo, 0 if torch.cuda.is_available() else pile.workers)
        if rank() == 0:
            vectors.chain(whole, [folder / f"{k}.npy" for k in range(len(pile.parts))], eye.width)
        all_reduce_ints(0)
    pile.x = np.load(whole, mmap_mode="r")


def judge_content(pile):
    c, mine, notes, columns = pile.cfg.content, pile.left(), [], dict(why=np.zeros(pile.n, np.uint8))
    for name, head, note in vectors.heads(pile.eye, c):
        columns[name] = np.full(pile.n, np.nan, np.float32)
        columns[name][pile.seen] = vectors.apply(head, pile.x)
        score, ugly = columns[name][mine], name == "aesthetics"
        fails = score < limit(c.min_aesthetics, score) if ugly else score >= head["threshold"]
        columns["why"][mine[fails]] = REASONS.index("ugly" if ugly else "blocked")
        notes.append(note)
        save(pile.out / "heads" / f"{name}.npz", head)  # may serve as content.head of another pile
    return dict(columns, notes=np.array(notes))


def content(pile):
    if files := pile.cfg.content.files():
        return pile.decide("content", judge_content, pile.cfg.content, files)
    pile.notes.append("no content head: none is shipped; content.allow and content.block train one")


def judge_clusters(pile):
    b, mine, tree = pile.cfg.balance, pile.left(), []
    points = x = pile.x[np.isin(pile.seen, mine)]
    for k in map(int, b.clusters.split()):
        points, index = vectors.kmeans(points, min(k, len(points)), b.seed, b.rounds)
        tree.insert(0, index[tree[0]] if tree else index)  # (n,) clusters of this level
    order = np.argsort(pile.sha[mine], kind="stable")  # a hash is as good as a draw
    kept = vectors.pour(tree, order, b.target)
    why, cluster, domain = np.zeros(pile.n, np.uint8), np.full(pile.n, -1), np.full(pile.n, -1)
    why[np.delete(mine, kept)], cluster[mine], domain[mine] = REASONS.index("over quota"), tree[-1], tree[0]
    before, after = vectors.entropy(tree[0]), vectors.entropy(tree[0][kept])
    note = f"{len(x)} images to {len(kept)}; entropy of the domains {before:.3f} before, {after:.3f} after"
    return dict(why=why, cluster=cluster, domain=domain, notes=np.array([note]))


def judge_neighbours(pile):
    b, mine, why = pile.cfg.balance, pile.left(), np.zeros(pile.n, np.uint8)
    seeds = pile.eye(open_source(b.seeds))
    near = np.unique(vectors.nearest(seeds, pile.x[np.isin(pile.seen, mine)], b.k)[1])
    why[np.delete(mine, near)] = REASONS.index("not retrieved")
    note = f"the {b.k} nearest of each of {len(seeds)} seed images: {len(near)} of {len(mine)} images"
    return dict(why=why, notes=np.array([note]))


def balance(pile):
    b = pile.cfg.balance
    if b.seeds:
        pile.decide("retrieval", judge_neighbours, b, [b.seeds])
    if b.target:
        pile.decide("balance", judge_clusters, b)


def write(pile):
    """OUT/shards/*.tar, manifest.jsonl, evaluation.jsonl (the evaluation sets' rows) and the funnel."""
    kept, size = pile.left(), pile.cfg.write.images
    trail, marks = vectors.digest(pile.trail, size), pile.work / "shards"

    def job(s):
        (marks / str(s)).unlink(missing_ok=True)  # from now on the shard is nobody's
        with atomic_open(pile.out / "shards" / f"{s:05d}.tar") as f:
            write_shard(f, pile.some(kept[s * size : (s + 1) * size]))
        atomic_write_text(marks / str(s), trail)

    done = lambda s: (marks / str(s)).exists() and (marks / str(s)).read_text() == trail  # noqa: E731
    count = -(-len(kept) // size)
    each(job, [s for s in range(count) if not done(s)], pile.workers)
    if rank() == 0:
        for old in sorted((pile.out / "shards").glob("*.tar"))[count:]:  # of a run of ours that kept more
            old.unlink()
        for name, first, last in ("manifest", 0, pile.owned), ("evaluation", pile.owned, len(pile.parts)):
            with atomic_open(pile.out / f"{name}.jsonl") as f:
                for k in range(first, last):
                    f.writelines(manifest_line(pile, *x) for x in enumerate(pile.rows(k), pile.first[k]))
        settings = {s: asdict(getattr(pile.cfg, s)) for s in SECTIONS}
        facts = dict(stages=pile.stages, reasons=REASONS, notes=pile.notes, settings=settings)
        atomic_write_text(pile.out / "funnel.json", json.dumps(facts, indent=1))
        funnel.draw(pile.out)
    all_reduce_ints(0)


def write_shard(file, rows):
    """Samples as data.py and webdataset know them: key.jpg (the bytes as they were), key.cls, key.json."""
    with tarfile.open(None, "w", file, format=tarfile.USTAR_FORMAT) as tar:
        for i, row in rows:
            data, about = load_bytes(row), {k: v for k, v in row.items() if k != "at"}
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise UserError(f"{row.get('path') or row} has changed since ingest: take a new OUT")
            files = {row["format"].lower().replace("jpeg", "jpg"): data, "json": json.dumps(about).encode()}
            if row["label"] is not None:
                files["cls"] = str(row["label"]).encode()
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{i:09d}.{extension}")  # its time, owner and mode are constants
                member.size = len(data)
                tar.addfile(member, BytesIO(data))


def manifest_line(pile, i, row):
    """One image -> a line of JSON: its place, scores, clusters, keep, why, and whom it resembles."""
    line = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    for name in "cluster", "domain":
        line[name] = int(getattr(pile, name)[i])
    line |= {k: round(float(v), 4) for k in ("aesthetics", "blocked") if (v := getattr(pile, k)[i]) == v}
    line |= dict(keep=bool(pile.why[i] == 0 and i < pile.own), why=REASONS[pile.why[i]])
    if pile.of[i] >= 0:
        line["of"] = pile.sha[pile.of[i]].decode()
    return (json.dumps(line) + "\n").encode()


STAGES = dict(ingest=ingest, quality=lambda pile: pile.decide("quality", judge_quality, pile.cfg.quality),
              dedup=dedup, content=content, balance=balance, write=write)  # fmt: skip


def main():
    form = argparse.RawDescriptionHelpFormatter
    add = (parser := argparse.ArgumentParser(description=__doc__, formatter_class=form)).add_argument
    add("stage", choices=[*STAGES, "run"], help="up to where; run: all of it")
    add("source", help="folder:PATH, list:FILE.jsonl, or tar:PATH, a folder or {000..010}.tar")
    add("out", help="a folder, on a file system that all processes see")
    add("settings", nargs="*", help="section.key=value")
    add("--config", help="YAML file of settings; the defaults are in curate.py")
    add("--workers", type=int, default=0, help="processes that read images, for each torchrun process")
    args = parser.parse_intermixed_args()
    setup()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    pile = Pile(args.source, args.out, load(args.config, args.settings), args.workers)
    pile.lock = acquire_lock(pile.out) if rank() == 0 else None  # it holds as long as it exists
    for name, stage in STAGES.items():
        stage(pile)
        if name == args.stage:
            break
    if rank() == 0:
        print(*funnel.lines(pile.stages), *pile.notes, sep="\n")
    cleanup()


if __name__ == "__main__":
    config.run(main)
