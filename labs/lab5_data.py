"""Lab 5: curate a pile whose dirt is known, and take from a crowd without being crowded.

    python labs/lab5_data.py               # three holes: precision_recall, join, fill
    python labs/lab5_data.py --solution    # ours

What is unusual here: the dirt was planted, so the truth is known; and what is judged is `curate.py` itself,
with your functions in it. Expect six checks, two tables, runs/labs/lab5.png and lab5/out/funnel.html.
"""

import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from workbench import run, save, table

from curation import __main__ as curate
from curation import page as funnel
from curation import vectors
from evals.visualize import page
from results.curation import MAKE, jpeg
from scenes import render

HOME = Path("runs", "labs", "lab5")
RINGS = np.repeat(np.arange(5), (100, 200, 4000, 400, 100))  # of 4,800 points: ring 2 is crowded
REASON = {"exact": "exact duplicate", "blurred": "blurred", "small": "small", "truncated": "unreadable"}
REASON |= dict.fromkeys(("re-encoded", "cropped 5 %", "mirrored"), "near duplicate")
SPOIL = MAKE | {"blurred": lambda x, _, r: jpeg(x.filter(ImageFilter.GaussianBlur(r.uniform(0.5, 3.5))))}


def precision_recall(truth, found, reason):
    """truth, found: {name of an image: why it should be dropped, or was; "kept" if not} -> two shares.

    Precision: of those dropped for this reason, how many should be. Recall: of those that should be, how many
    were. Of none, the share is 1.
    """
    raise NotImplementedError("hole 1 in precision_recall(): return both / dropped, both / planted")


def join(hashes, radius):
    """Hashes uint64 (n,) -> yields arrays (m, 2): the numbers i < j of all that differ in <= radius bits."""
    raise NotImplementedError(
        "hole 2 in join(): yield the pairs i < j with np.bitwise_count(h_i ^ h_j) <= radius"
    )


def fill(sizes, total):
    """Water-filling: how much to take of groups of these sizes (k,), `total` in all -> whole numbers (k,).

    From the smallest on, each gives an equal share, wanted // groups not yet served, or all that it has.
    """
    raise NotImplementedError("hole 3 in fill(): smallest first: min(size, wanted // groups not yet served)")


def plant(folder, seed, count):
    """Scenes and, of every second one, a spoilt copy, as files -> {name: kind}, "kept" for the scenes."""
    rng, kinds = np.random.default_rng(seed), {}
    for i in range(count):
        image, kind = Image.fromarray(render(1000 + seed, i, 176)[0]), list(REASON)[i // 2 % len(REASON)]
        kinds[f"{i:04d}.jpg"], data = "kept", jpeg(image)
        (folder / f"{i:04d}.jpg").write_bytes(data)
        if i % 2:
            kinds[f"{i:04d}_{kind}.jpg"] = kind
            (folder / f"{i:04d}_{kind}.jpg").write_bytes(SPOIL[kind](image, data, rng))
    return kinds


def spread(seed, rounds):
    """Rings on a globe, 60 clusters, 300 points taken from them -> picture, ring 2's share of both."""
    rng = np.random.default_rng(seed)
    polar, turn = np.deg2rad(14 + 18 * RINGS + rng.normal(size=4800)), rng.uniform(0, 2 * np.pi, 4800)
    x = np.stack([np.sin(polar) * np.cos(turn), np.sin(polar) * np.sin(turn), np.cos(polar)], 1).astype("f2")
    centroids, cluster = vectors.kmeans(x, 60, seed, rounds)
    kept = vectors.pour([cluster], rng.permutation(4800), 300)  # it asks fill() for the share of each cluster
    picture = Image.new("RGB", (440, 440), "white")
    for points, size, color in ((x, 1, "#bbbbbb"), (x[kept], 2, "#0072b2"), (centroids, 5, "#d55e00")):
        for a, b, c in points.astype(float):  # the globe, seen from the pole, made flat
            a, b = (220 + 140 * y * (2 / (1 + c)) ** 0.5 for y in (a, b))
            ImageDraw.Draw(picture).circle((a, b), size, color)
    ring = np.rint((np.rad2deg(np.arccos(centroids[:, 2].astype(float))) - 14) / 18)
    return picture, (ring == 2).mean(), (RINGS[kept] == 2).mean()


def main(desk, seed, short):
    rng, truth = np.random.default_rng(seed), dict(zip("abcdef", "xxyyyy"))
    p, r = precision_recall(truth, dict(zip("abcdef", "xyxxxy")), "x")
    desk.check("hole 1 is right", (p, r) == (0.25, 0.5), (r, p) == (0.25, 0.5), low=1, instant=True)
    hashes = rng.integers(0, 2**64, 300, np.uint64)
    hashes = np.append(hashes, hashes ^ np.uint64(0b1011))  # and twins, 3 bits apart
    found = lambda f, radius: {tuple(sorted(p)) for part in f(hashes, radius) for p in part.tolist()}  # noqa: E731
    off = [len(found(curate.join, 4) ^ pairs) for pairs in (found(join, 4), found(curate.join, 2))]
    desk.check("hole 2 differs from curate.join in pairs", *off, high=0, instant=True)
    sizes = rng.integers(1, 100, 30)
    off = [abs(q - vectors.fill(sizes, 600)).sum() for q in (fill(sizes, 600), sizes * 600 // sizes.sum())]
    desk.check("hole 3 differs from vectors.fill in images", *off, high=0, instant=True)
    shutil.rmtree(HOME, ignore_errors=True)
    (HOME / "pile").mkdir(parents=True)
    kinds = plant(HOME / "pile", seed, 28 if short else 700)
    settings = curate.load(None, ["quality.min_side=160", *desk.args.set.split()])
    with patch.object(curate, "join", join), patch.object(vectors, "fill", fill):
        pile = curate.Pile(f"folder:{HOME}/pile", HOME / "out", settings)
        for stage in curate.STAGES.values():
            stage(pile)
        plain, even = spread(seed, 0), spread(seed, 3)
    why, rows = {Path(row["path"]).name: row["why"] for row in funnel.rows(HOME / "out")}, []
    for kind, reason in REASON.items():  # among this kind and the clean scenes
        truth = {x: reason if k == kind else k for x, k in kinds.items() if k in (kind, "kept")}
        rows.append([kind, *precision_recall(truth, {x: why[x] for x in truth}, reason)])
    table(["planted", "precision", "recall"], *rows)
    save(page([[plain[0], even[0]]], None, [["k-means", "k-means with resampling"]]), "lab5.png")
    table(["ring 2's share of", "centroids", "taken"], ["k-means", *plain[1:]], ["resampled", *even[1:]])
    recall = {kind: r for kind, _, r in rows}
    desk.check("recall of re-encoded copies", recall["re-encoded"], recall["mirrored"], low=0.9)
    desk.check("ring 2's share of the centroids", even[1], plain[1], high=0.4)
    desk.check("ring 2's share of what is taken", even[2], plain[2], high=0.4)


if __name__ == "__main__":
    run(main, __doc__, ["precision_recall", "join", "fill"], globals(), [("--set", "settings of curate.py")])
