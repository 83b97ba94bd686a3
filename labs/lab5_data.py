"""Lab 5: curate a pile whose dirt is known, and take from a crowd without being crowded.

    python labs/lab5_data.py               # three holes: precision_recall, hamming_pairs, water_fill
    python labs/lab5_data.py --solution    # ours

The dirt is planted, so the truth is known. What gets measured is `python -m curation` itself, with your
functions in it. Expect six checks, two tables, runs/labs/lab5.png and runs/labs/lab5/out/funnel.html.
"""

import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from workbench import print_table, run_lab, save_png

from curation import balance, dedup
from curation.__main__ import curate
from curation.page import read_manifest
from curation.settings import load
from curation.vectors import kmeans
from evals.tiles import contact_sheet
from results.curation import MAKE, jpeg
from scenes import render

HOME = Path("runs", "labs", "lab5")
REASONS = {  # why curation should drop a spoilt copy, by the kind of the copy
    "exact": "exact duplicate",
    "blurred": "blurred",
    "small": "small",
    "truncated": "unreadable",
    "re-encoded": "near duplicate",
    "cropped 5 %": "near duplicate",
    "mirrored": "near duplicate",
}
RING_SIZES = (100, 200, 4000, 400, 100)  # points on each ring of a globe
CROWDED = 2  # the ring of 4,000


def precision_recall(truth, found, reason):
    """truth, found: {name of an image: why it should be dropped, or was; "kept" if not} -> two shares.

    Precision: of those dropped for this reason, how many should be. Recall: of those that should be, how many
    were. A share of nothing is 1.
    """
    raise NotImplementedError("hole 1 in precision_recall(): return both / dropped, both / planted")


def hamming_pairs(hashes, radius):
    """Hashes uint64 (n,) -> yields arrays (m, 2): the numbers i < j of all that differ in <= radius bits.

    np.bitwise_count(h_i ^ h_j) counts the bits in which two hashes differ.
    """
    raise NotImplementedError("hole 2 in hamming_pairs(): yield all pairs i < j with at most `radius` bits")


def water_fill(sizes, total):
    """How much to take of groups of these sizes (k,), `total` in all -> whole numbers (k,).

    From the smallest on, each gives an equal share, wanted // groups not yet served, or all it has.
    """
    raise NotImplementedError(
        "hole 3 in water_fill(): smallest first, min(size, wanted // groups not served)"
    )


# ---------------------------------------------------------------- the holes, checked


def set_of_pairs(pairs_of, hashes, radius):
    pairs = set()
    for part in pairs_of(hashes, radius):
        pairs.update(tuple(sorted(pair)) for pair in part.tolist())
    return pairs


def check_holes(checker, seed):
    rng = np.random.default_rng(seed)
    truth = dict(zip("abcdef", "xxyyyy"))
    found = dict(zip("abcdef", "xyxxxy"))
    precision, recall = precision_recall(truth, found, "x")
    right = (precision, recall) == (0.25, 0.5)
    swapped = (recall, precision) == (0.25, 0.5)
    checker.check("hole 1 is right", right, swapped, low=1, instant=True)

    hashes = rng.integers(0, 2**64, 300, np.uint64)
    hashes = np.append(hashes, hashes ^ np.uint64(0b1011))  # and twins, 3 bits apart
    truth = set_of_pairs(dedup.hamming_pairs, hashes, 4)
    pairs = set_of_pairs(hamming_pairs, hashes, 4)
    too_few = set_of_pairs(dedup.hamming_pairs, hashes, 2)
    errors = [len(truth ^ pairs), len(truth ^ too_few)]
    checker.check("hole 2 differs from dedup.hamming_pairs in pairs", *errors, high=0, instant=True)

    sizes = 1 + rng.permutation(99)[:30]  # all differ: of equal groups, either may get the odd image
    truth = balance.water_fill(sizes, 600)
    in_proportion = sizes * 600 // sizes.sum()
    errors = [abs(quotas - truth).sum() for quotas in (water_fill(sizes, 600), in_proportion)]
    checker.check("hole 3 differs from balance.water_fill in images", *errors, high=0, instant=True)


# ---------------------------------------------------------------- a dirty pile


def spoil(kind, image, data, rng):
    """A spoilt copy of an image, whose JPEG is `data` -> the bytes of a file."""
    if kind == "blurred":
        return jpeg(image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.5))))
    return MAKE[kind](image, data, rng)


def plant(folder, seed, count):
    """Scenes and, of every second one, a spoilt copy, as files -> {name: kind}, "kept" for the scenes."""
    rng = np.random.default_rng(seed)
    kind_of = {}
    for i in range(count):
        image = Image.fromarray(render(1000 + seed, i, 176)[0])
        data = jpeg(image)
        (folder / f"{i:04d}.jpg").write_bytes(data)
        kind_of[f"{i:04d}.jpg"] = "kept"
        if i % 2:
            kind = list(REASONS)[i // 2 % len(REASONS)]
            name = f"{i:04d}_{kind}.jpg"
            (folder / name).write_bytes(spoil(kind, image, data, rng))
            kind_of[name] = kind
    return kind_of


def curate_pile(args):
    """Plant a pile and curate it -> {kind of dirt: its precision and recall}."""
    shutil.rmtree(HOME, ignore_errors=True)
    (HOME / "pile").mkdir(parents=True)
    kind_of = plant(HOME / "pile", args.seed, 28 if args.short else 700)
    cfg = load(overrides=["quality.min_side=160", *args.set.split()])
    curate(f"folder:{HOME}/pile", HOME / "out", cfg)
    why = {Path(row["path"]).name: row["why"] for row in read_manifest(HOME / "out")}
    results = {}
    for kind, reason in REASONS.items():
        names = [
            name for name in kind_of if kind_of[name] in (kind, "kept")
        ]  # this kind and the clean scenes
        truth = {name: reason if kind_of[name] == kind else "kept" for name in names}
        found = {name: why[name] for name in names}
        precision, recall = precision_recall(truth, found, reason)
        results[kind] = {"precision": precision, "recall": recall}
    return results


# ---------------------------------------------------------------- a crowd


def sample_rings(seed, rounds):
    """4,800 points on rings, k-means, 300 points taken -> a picture, the crowded ring's share of both.

    rounds: of resampling.
    """
    rng = np.random.default_rng(seed)
    ring = np.repeat(np.arange(5), RING_SIZES)  # (n,) of each point
    polar = np.deg2rad(14 + 18 * ring + rng.normal(size=4800))
    turn = rng.uniform(0, 2 * np.pi, 4800)
    coordinates = [np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar)]
    points = np.stack(coordinates, 1).astype(np.float16)
    centroids, clusters = kmeans(points, 60, seed, rounds)
    taken = balance.hierarchical_sample([clusters], rng.permutation(4800), 300)  # it calls your water_fill()
    centroid_polar = np.rad2deg(np.arccos(centroids[:, 2].astype(float)))
    centroid_ring = np.rint((centroid_polar - 14) / 18)
    shares = {"centroids": (centroid_ring == CROWDED).mean(), "taken": (ring[taken] == CROWDED).mean()}
    return draw_globe(points, points[taken], centroids), shares


def draw_globe(points, taken, centroids):
    """Points (n, 3) on a globe as a map, seen from the pole; Lambert's projection keeps areas equal."""
    picture = Image.new("RGB", (440, 440), "white")
    for dots, radius, color in ((points, 1, "#bbbbbb"), (taken, 2, "#0072b2"), (centroids, 5, "#d55e00")):
        for x, y, z in dots.astype(float):
            scale = 140 * (2 / (1 + z)) ** 0.5
            ImageDraw.Draw(picture).circle((220 + x * scale, 220 + y * scale), radius, color)
    return picture


def main(checker, args):
    check_holes(checker, args.seed)
    with patch.object(dedup, "hamming_pairs", hamming_pairs), patch.object(balance, "water_fill", water_fill):
        results = curate_pile(args)
        plain_picture, plain = sample_rings(args.seed, rounds=0)
        even_picture, even = sample_rings(args.seed, rounds=3)
    print_table("planted", results)
    captions = ["k-means", "k-means with resampling"]
    save_png(contact_sheet([[plain_picture, even_picture]], captions=[captions]), "lab5.png")
    print_table("ring 2's share of", {"k-means": plain, "resampled": even})
    recall = {kind: numbers["recall"] for kind, numbers in results.items()}
    checker.check("recall of re-encoded copies", recall["re-encoded"], recall["mirrored"], low=0.9)
    checker.check("ring 2's share of the centroids", even["centroids"], plain["centroids"], high=0.4)
    checker.check("ring 2's share of what is taken", even["taken"], plain["taken"], high=0.4)


if __name__ == "__main__":
    flags = [("--set", "settings of the curation: section.key=value, with spaces between")]
    run_lab(main, __doc__, ["precision_recall", "hamming_pairs", "water_fill"], globals(), flags)
