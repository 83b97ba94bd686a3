"""Does curation find what was hidden in a pile, and how fast is it? The tables of README and LOG.

    python results/curation.py truth WORK --seed 1 --photos folder:/photos --weights runs/laptop
    python results/curation.py truth WORK --seed 0 --images 4000 --sweep dedup.radius=2,4,6
    python results/curation.py near
    python results/curation.py speed --hashes 1000000 --vectors 200000 --pile 10000,100000

`truth` renders a pile of scenes (and photos, if a folder is given) with planted copies, rejects, leaks of an
evaluation set, blocked content and over-represented domains, curates it, and compares the manifest with what
was planted. Thresholds are chosen on one seed (--sweep) and scored on another. Scenes, photos and frames of
videos are counted apart: frames have natural duplicates, which count as false merges here.
`near` shows how far the hashes of copies, and of strangers, lie apart.
`speed` measures side by side, A B A B, on one core.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
import config
from config import Count, Whole, argument
from curation.balance import normalized_entropy
from curation.dedup import hamming_pairs, near_duplicate_groups
from curation.ingest import dhash, measure, phash  # noqa: E402
from curation.page import read_manifest  # noqa: E402
from curation.settings import load
from curation.vectors import kmeans, nearest, unit_rows
from data import stable_hash
from decode import decode_image
from runfolder import environment
from scenes import CLASSES, render
from sources import open_source

ROOT = Path(__file__).parent.parent
SHARES = np.array([30, 20, 10, 10, 8, 6, 4, 4, 4, 4]) / 100  # of the ten kinds in the pile: uneven on purpose
BLOCKED = 8  # the kind that must not stay: dots
SIZES = (256, 288, 320)


# ---------------------------------------------------------------- the files that are planted


def jpeg(image, quality=90, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scaled(image, factor):
    return image.resize([round(side * factor) for side in image.size], Image.BICUBIC)


def lying(image):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = (
        6  # to be turned by 90 degrees to the right: so the pixels are turned to the left
    )
    return jpeg(image.transpose(Image.ROTATE_90), exif=exif)


def cropped(image, rng):
    width, height = image.size
    left = rng.integers(0, round(0.05 * width) + 1)
    top = rng.integers(0, round(0.05 * height) + 1)
    return image.crop((left, top, left + round(0.95 * width), top + round(0.95 * height)))


def top_strip(image):
    return image.crop((0, 0, image.width, image.height // 4)).resize((900, 225))


def plain_colour(image, rng):
    return Image.new("RGB", image.size, tuple(rng.integers(90, 200, 3).tolist()))


def brightness(image, factor):
    return ImageEnhance.Brightness(image).enhance(factor)


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 50))


def nearly_white(image):
    return Image.blend(image, Image.new("RGB", image.size, "white"), 0.96)


def noise(rng, size):
    return rng.integers(0, 256, size, dtype=np.uint8).tobytes()


# {kind: (original image, its file, random numbers) -> the planted file}
COPIES = {
    "exact": lambda image, data, rng: data,
    "re-encoded": lambda image, data, rng: jpeg(image, int(rng.integers(35, 80))),
    "png": lambda image, data, rng: png(image),
    "resized": lambda image, data, rng: jpeg(scaled(image, rng.uniform(0.82, 1.6)), 85),
    "lying (EXIF)": lambda image, data, rng: lying(image),
    "brighter": lambda image, data, rng: jpeg(brightness(image, rng.uniform(0.85, 1.15))),
}
CHANGED = {  # copies that hashes need not find
    "cropped 5 %": lambda image, data, rng: jpeg(cropped(image, rng)),
    "mirrored": lambda image, data, rng: jpeg(ImageOps.mirror(image)),
}
REJECTS = {
    "blurred": lambda image, data, rng: jpeg(blurred(image)),
    "small": lambda image, data, rng: jpeg(scaled(image, 120 / min(image.size))),
    "long": lambda image, data, rng: jpeg(top_strip(image)),
    "flat": lambda image, data, rng: jpeg(plain_colour(image, rng)),
    "dark": lambda image, data, rng: jpeg(brightness(image, 0.15)),
    "bright": lambda image, data, rng: jpeg(nearly_white(image)),
    "truncated": lambda image, data, rng: data[: len(data) // 2],
    "no image": lambda image, data, rng: noise(rng, 2000),
}
MAKE = dict(original=lambda image, data, rng: data) | COPIES | CHANGED | REJECTS
LEAKS = {name: COPIES[name] for name in ("exact", "re-encoded", "resized")}


# ---------------------------------------------------------------- planting


class Plan(NamedTuple):
    """One original image and all that is planted of it."""

    name: str  # its first letter: scene, photo, video, evaluation, x (an example)
    origin: tuple | str  # (world, number) of a scene, or a path
    domain: str  # a kind of scene, or photo, or video
    files: list  # of (folder, kind of copy)


def draw_scenes(seed, count, shares):
    """`count` scenes of world `seed` whose kinds are as frequent as `shares` says -> [(number, kind)]."""
    wanted = np.round(shares * count).astype(int)
    found = []
    number = 0
    while wanted.sum():
        kind = int(np.random.default_rng([seed, number]).integers(len(CLASSES)))  # as scenes.render draws it
        if wanted[kind]:
            wanted[kind] -= 1
            found.append((number, kind))
        number += 1
    return found


def plan_pile(seed, count, photos):
    """-> [Plan]: 3/4 of the pile are originals, the rest is planted. photos: {"photo" or "video": paths}"""
    rng = np.random.default_rng(seed)
    world = 1000 + seed
    plans = []
    for number, kind in draw_scenes(world, round(0.7 * count), SHARES):
        plans.append(Plan(f"s{number}", (world, number), CLASSES[kind], [("pile", "original")]))
    for domain, paths in photos.items():
        for number, path in enumerate(paths):
            plans.append(Plan(f"{domain[0]}{number}", path, domain, [("pile", "original")]))
    chosen = rng.permutation(len(plans))
    weights = np.array([3.0] * len(COPIES) + [2.0] * len(CHANGED) + [1.0] * len(REJECTS))
    kinds = rng.choice([*COPIES, *CHANGED, *REJECTS], round(0.3 * count), p=weights / weights.sum())
    for number, kind in zip(chosen, kinds):
        if plans[number].domain != CLASSES[BLOCKED]:
            plans[number].files.append(("pile", str(kind)))
    return plans + plan_evaluation(seed, count) + plan_examples(seed, count)


def plan_evaluation(seed, count):
    """Scenes of an evaluation set; copies of every second one leak into the pile."""
    world = 2000 + seed
    plans = []
    for number, kind in draw_scenes(world, max(count // 100, 10), np.full(10, 0.1)):
        files = [("evaluation", "original")]
        if number % 2:
            files += [("pile", copy) for copy in (*LEAKS, *CHANGED)]
        plans.append(Plan(f"e{number}", (world, number), CLASSES[kind], files))
    return plans


def plan_examples(seed, count):
    """Examples of blocked and of allowed content, half of each."""
    world = 3000 + seed
    shares = np.full(10, 0.5 / 9)
    shares[BLOCKED] = 0.5
    plans = []
    for number, kind in draw_scenes(world, max(count // 33, 60), shares):
        folder = "block" if kind == BLOCKED else "allow"
        plans.append(Plan(f"x{number}", (world, number), CLASSES[kind], [(folder, "original")]))
    return plans


def plant_one(job):
    """(folder, Plan) -> its files, if they are missing, and its lines of truth."""
    root, plan = job
    files = []
    for folder, kind in plan.files:
        number = stable_hash(plan.name, folder, kind) % 10**12
        files.append(root / folder / f"{number:012d}.jpg")
    if not all(file.exists() for file in files):
        rng = np.random.default_rng(stable_hash(plan.name) % 2**63)
        if isinstance(plan.origin, tuple):
            pixels = render(*plan.origin, int(rng.choice(SIZES)))[0]
            image = Image.fromarray(pixels)
            data = jpeg(image, 92)
        else:
            data = Path(plan.origin).read_bytes()
            image = decode_image(data, plan.name)
        for file, (_, kind) in zip(files, plan.files):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(MAKE[kind](image, data, rng))
            partial.replace(file)
    lines = []
    for file, (folder, kind) in zip(files, plan.files):
        place = dict(path=str(file.absolute()), family=plan.name, kind=kind, where=folder)
        lines.append(dict(place, domain=plan.domain))
    return lines


def plant_pile(root, seed, count, photos, workers):
    """The pile, its evaluation set and the examples as folders under `root` -> lines of truth."""
    jobs = [(root, plan) for plan in plan_pile(seed, count, photos)]
    truth = []
    with multiprocessing.Pool(workers) as pool:
        for lines in pool.imap(plant_one, jobs, 32):
            truth += lines
    return truth


# ---------------------------------------------------------------- scoring

DUPLICATE = ("exact duplicate", "near duplicate", "feature duplicate")
QUALITY = ("unreadable", "small", "long", "dark", "bright", "flat", "blurred")
EXPECTED = {"truncated": "unreadable", "no image": "unreadable"}  # other rejects: the kind is the reason
GROUPS = ("scene", "photo", "video")  # by the first letter of a family


def score(truth, manifest, evaluation):
    """Planted truth against the manifest -> {table: {row: {column: value}}}, [(line of truth, row)].

    manifest: its rows. evaluation: {path: row}.
    """
    rows = {row["path"]: row for row in manifest}
    families = defaultdict(set)  # of a SHA-256: exact copies share it
    for line in truth:
        row = rows.get(line["path"]) or evaluation.get(line["path"])
        if row and "sha256" in row:
            families[row["sha256"]].add(line["family"])
    pile = [(line, rows[line["path"]]) for line in truth if line["where"] == "pile"]
    tables = dict(quality=score_rejects(pile), duplicates=score_duplicates(pile, families),
                  leaks=score_leaks(pile), content=score_blocked(pile),
                  domains=score_domains(pile))  # fmt: skip
    return tables, pile


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths) if truths else float("nan")


def score_rejects(pile):
    table = {}
    for kind in REJECTS:
        wanted = EXPECTED.get(kind, kind)
        planted = [row for line, row in pile if line["kind"] == kind]
        found = [line["kind"] for line, row in pile if row["why"] == wanted]
        right = [EXPECTED.get(found_kind, found_kind) == wanted for found_kind in found]
        table[kind] = {
            "planted": len(planted),
            "recall": share(row["why"] in QUALITY for row in planted),
            "precision of the reason": sum(right) / max(len(right), 1),
        }
    planted = [row for line, row in pile if line["kind"] in REJECTS]
    dropped = [line for line, row in pile if row["why"] in QUALITY]
    table["all"] = {
        "planted": len(planted),
        "recall": share(row["why"] in QUALITY for row in planted),
        "precision of the reason": share(line["kind"] in REJECTS for line in dropped),
    }
    return table


def score_duplicates(pile, families):
    """Recall: copies that ended in one component with their original, of those that reached the stage."""
    resembles = {row["sha256"]: row["of"] for _, row in pile if row["why"] in DUPLICATE[1:]}

    def root(row):
        sha = row["sha256"]
        while sha in resembles:
            sha = resembles[sha]
        return sha

    reached = [(line, row) for line, row in pile if row["why"] not in (*QUALITY, "leak")]
    originals = {line["family"]: row for line, row in reached if line["kind"] == "original"}
    table = {}
    for group in GROUPS:
        mine = [(line, row) for line, row in reached if line["family"][0] == group[0]]
        for kind in (*COPIES, *CHANGED):
            found = []
            for line, row in mine:
                if line["kind"] == kind and line["family"] in originals:
                    found.append(root(row) == root(originals[line["family"]]))
            if found:
                table[f"{kind}, {group}"] = {"planted": len(found), "recall": share(found)}
        for reason in DUPLICATE:
            right = [line["family"] in families[row["of"]] for line, row in mine if row["why"] == reason]
            if right:
                false = len(right) - sum(right)
                table[f"{reason}, {group}"] = {
                    "dropped": len(right),
                    "precision": share(right),
                    "false": false,
                    "false per 10,000 images": 1e4 * false / len(mine),
                }
    return table


def score_leaks(pile):
    table = {}
    for kind in (*LEAKS, *CHANGED):
        planted = [row for line, row in pile if line["family"][0] == "e" and line["kind"] == kind]
        reached = [row for row in planted if row["why"] not in QUALITY]
        table[kind] = {"planted": len(planted), "recall": share(row["why"] == "leak" for row in reached)}
    dropped = [line["family"][0] == "e" for line, row in pile if row["why"] == "leak"]
    table["all"] = {"dropped": len(dropped), "precision": share(dropped)}
    return table


def score_blocked(pile):
    wanted = []
    found = []
    for line, row in pile:
        if "blocked" in row:
            wanted.append(line["domain"] == CLASSES[BLOCKED])
            found.append(row["why"] == "blocked")
    if not wanted:
        return {}
    recall = share(hit for hit, truth in zip(found, wanted) if truth)
    precision = share(truth for hit, truth in zip(found, wanted) if hit)
    return {CLASSES[BLOCKED]: {"reached": sum(wanted), "recall": recall, "precision": precision}}


def score_domains(pile):
    """Entropy of the true kinds of scenes before and after, of the largest possible."""
    early = (*QUALITY, *DUPLICATE, "leak", "blocked", "ugly")
    before = []
    after = []
    for line, row in pile:
        kind = line["domain"]
        if kind in CLASSES and kind != CLASSES[BLOCKED]:
            if row["why"] not in early:
                before.append(kind)
            if row["keep"]:
                after.append(kind)
    cells = {"before": normalized_entropy(before), "after": normalized_entropy(after), "images": len(after)}
    return {"kinds of scenes": cells}


def score_features(out, pile):
    """What features find among the images that passed the hashes, by threshold: copies, and false pairs.

    The file of features holds the images that were in after the hashes, in the manifest's order.
    """
    file = max((out / "work").glob("features-*.npy"), key=lambda path: path.stat().st_mtime)
    early = (*QUALITY, "exact duplicate", "near duplicate", "leak")
    line_of = {row["path"]: line for line, row in pile}
    lines = [line_of[row["path"]] for row in read_manifest(out) if row["why"] not in early]
    features = np.load(file)[: len(lines)].astype(np.float32)
    groups = np.array([line["family"][0] for line in lines])
    families = np.array([line["family"] for line in lines])
    kinds = np.array([line["kind"] for line in lines])
    table = {}
    for group in GROUPS:
        mine = np.flatnonzero(groups == group[0])
        cosines = features[mine] @ features[mine].T
        same = families[mine][:, None] == families[mine]
        originals = same & (kinds[mine] == "original")
        to_original = np.where(originals, cosines, -1).max(1, initial=-1)
        to_stranger = np.where(same, -1, cosines).max(1, initial=-1)  # the nearest image of another family
        has_original = originals.any(1)
        for cut in (0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9):
            cells = {}
            for kind in CHANGED:
                copies = (kinds[mine] == kind) & has_original
                cells[kind] = share(to_original[copies] > cut)
            cells["images with a stranger so near"] = share(to_stranger > cut)
            table[f"cosine above {cut}, {group}"] = cells
    return table


def show(tables):
    for name, table in tables.items():
        print(f"\n{name}")
        for row, cells in table.items():
            shown = [f"{column} {value:.4g}" for column, value in cells.items()]
            print(f"  {row:34s}" + "   ".join(shown))


def truth(args):
    root = Path(args.work).absolute() / f"{args.seed}-{args.images}"
    photos = {}
    for domain, uri in (("photo", args.photos), ("video", args.video)):
        if uri:
            source = open_source(uri)
            photos[domain] = [source.name(i) for i in range(len(source))]
    start = time.perf_counter()
    planted = plant_pile(root, args.seed, args.images, photos, args.workers)
    seconds = time.perf_counter() - start
    print(Counter(line["where"] for line in planted), f"planted in {seconds:.0f} s")
    settings = [f"dedup.evaluation=folder:{root}/evaluation", "quality.min_side=160", *args.settings]
    if args.weights:
        settings += [f"features.weights={args.weights}", f"content.allow=folder:{root}/allow",
                     f"content.block=folder:{root}/block"]  # fmt: skip
    name, _, values = args.sweep.partition("=")
    for value in values.split(","):
        swept = [f"{name}={value}"] if value else []
        tables, num_images = curate_and_score(root, planted, [*settings, *swept], args)
        show(tables)
        if args.json:
            about = dict(seed=args.seed, images=num_images, settings=args.settings)
            write_json(args.json, dict(about=about, tables=tables))


def curate_and_score(root, planted, settings, args):
    """Curate the planted pile with these settings -> tables, number of images in the pile."""
    out = root / "out"
    command = [sys.executable, "-m", "curation", "run", f"folder:{root}/pile", str(out), *settings]
    start = time.perf_counter()
    subprocess.run([*command, "--workers", str(args.workers - 1)], check=True, cwd=ROOT)
    swept = settings[-1] if args.sweep else ""
    print(f"curated in {time.perf_counter() - start:.0f} s", swept)
    evaluation = {row["path"]: row for row in read_manifest(out, "evaluation")}
    tables, pile = score(planted, read_manifest(out), evaluation)
    if args.weights:
        tables["by features, hashes having found nothing"] = score_features(out, pile)
    return tables, len(pile)


# ---------------------------------------------------------------- speed


def alternate(ways, rounds=3):
    """{name: function} run A B A B ... -> {name: its fewest seconds on a core}: others can only add some."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return best


def photo_like(seed, size=(500, 375)):
    """A JPEG of a scene with noise of all scales: 50-70 KB, as photos of this size have."""
    rng = np.random.default_rng(seed)
    pixels = render(7, seed, 512)[0]
    image = np.asarray(Image.fromarray(pixels).resize(size), float)
    for side in (8, 32, 128, 400):
        grain = Image.fromarray(rng.normal(0, 9, (side, side)).astype(np.float32))
        image = image + np.asarray(grain.resize(size, Image.BICUBIC))[..., None]
    return jpeg(Image.fromarray(image.clip(0, 255).astype(np.uint8)), 88)


def score_naively(data):
    """What one writes first: decode, then each measure on its own with a library."""
    import imagehash

    image = Image.open(io.BytesIO(data))
    imagehash.phash(image)
    imagehash.dhash(image)
    grey = np.asarray(image.convert("L"), float)
    neighbours = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    laplacian = 4 * grey[1:-1, 1:-1] - neighbours
    counts = np.bincount(np.asarray(image.convert("L")).ravel(), minlength=256)
    p = counts[counts > 0] / grey.size
    return laplacian.var(), -(p * np.log2(p)).sum()


def time_scoring(args):
    files = [photo_like(i) for i in range(args.files)]

    def in_one_pass():
        return [decode_image(data, "", measure) for data in files]

    def naively():
        return [score_naively(data) for data in files]

    seconds = alternate({"one pass": in_one_pass, "naive": naively}, 5)
    cells = {f"{name}, images/s": len(files) / best for name, best in seconds.items()}
    cells["ratio"] = seconds["naive"] / seconds["one pass"]
    cells["KB"] = np.mean([len(data) for data in files]) / 1000
    return {"scoring, 500 x 375": cells}


def measure_drift(args):
    """Bits by which hashes of the drafted, reduced picture differ from those of the whole, grey picture."""
    drifts = []
    for i in range(args.files):
        data = photo_like(i)
        row = decode_image(data, "", measure)
        grey = Image.open(io.BytesIO(data)).convert("L")
        pairs = ((row["phash"], phash(grey)), (row["dhash"], dhash(grey)))
        drifts.append([(int(drafted, 16) ^ exact).bit_count() for drafted, exact in pairs])
    cells = {}
    for name, bits in zip(("pHash", "dHash"), np.array(drifts).T):
        cells |= {f"{name} mean": bits.mean(), f"{name} most": bits.max()}
    return {"drift of the draft, bits of 64": cells}


def time_hamming_pairs(args):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, args.hashes, dtype=np.uint64)
    num_twins = args.hashes // 10
    flips = np.uint64(1) << rng.integers(0, 64, (6, num_twins), dtype=np.uint64)
    hashes[-num_twins:] = hashes[:num_twins] ^ np.bitwise_xor.reduce(flips)
    few = hashes[: min(args.hashes, 16_384)]  # brute force on a part: its time grows with the square

    def by_bands():
        return list(hamming_pairs(hashes, 6))

    def by_brute_force():
        for rows in np.split(few, range(64, len(few), 64)):  # blocks that stay in a core's cache
            for columns in np.split(few, range(2048, len(few), 2048)):
                near = np.bitwise_count(rows[:, None] ^ columns) <= 6
                near.sum()

    seconds = alternate({"banded": by_bands, "brute": by_brute_force}, 2)
    found = set()
    for pairs in hamming_pairs(hashes, 6):
        found |= {(min(pair), max(pair)) for pair in pairs.tolist()}
    whole = seconds["brute"] * (len(hashes) / len(few)) ** 2 / 2  # each pair once
    cells = {
        "banded, s": seconds["banded"],
        "brute force, s (extrapolated)": whole,
        "ratio": whole / seconds["banded"],
        "found of the twins": len(found) / num_twins,
    }
    return {f"join of {args.hashes:,d} hashes, radius 6": cells}


def time_vectors(args):
    rng = np.random.default_rng(0)
    count = args.vectors
    num_twins = count // 100
    centers = rng.normal(size=(count // 100, 384)).astype(np.float32)
    x = centers[rng.integers(0, len(centers), count)] + rng.normal(size=(count, 384)).astype(np.float32)
    x[-num_twins:] = x[:num_twins] + 0.05 * rng.normal(size=(num_twins, 384))
    x = unit_rows(torch.from_numpy(x))
    cells = {}
    start = time.process_time()
    kmeans(x, args.centroids)
    cells["k-means, s of one core"] = time.process_time() - start
    start = time.process_time()
    nearest(x, x[: args.centroids])
    cells["a pass of it, s of one core"] = time.process_time() - start
    start = time.process_time()
    roots = near_duplicate_groups(x, np.zeros(count, bool), 0.95, 2.0)
    cells["feature dedup, s of one core"] = time.process_time() - start
    cells["recall of its 1 %"] = float((roots[-num_twins:] < count - num_twins).mean())
    cells["threads"] = torch.get_num_threads()
    return {f"{count:,d} x 384 vectors, {args.centroids} centroids": cells}


MEASURE_PEAK = """
import resource, runpy
try:
    runpy.run_module("curation", run_name="__main__", alter_sys=True)
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_small_images(folder, count):
    for i in range(count):
        file = folder / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            grain = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
            file.write_bytes(jpeg(Image.fromarray(grain).resize((64, 64), Image.BICUBIC), 60))


def measure_memory(args):
    """Peak memory of `python -m curation run` on piles of small images, with the same size of a piece.

    The first of all parts: Linux counts what the parent had before a child begins.
    """
    cells = {}
    for count in args.pile:
        folder = Path(args.work).absolute() / f"small{count}"
        write_small_images(folder / "pile", count)
        shutil.rmtree(folder / "out", ignore_errors=True)
        command = [sys.executable, "-c", MEASURE_PEAK, "run", f"folder:{folder}/pile", f"{folder}/out",
                   "quality.min_side=10", "quality.min_sharpness=0"]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        cells[f"{count:,d} images, MB"] = int(done.stdout.split("peak")[1]) / 1024
        cells[f"{count:,d} images, s"] = time.perf_counter() - start
    return {"memory of a run": cells}


def extrapolate(args, tables, images=500_000_000, centroids=50_000):
    """What a crawl would take at these rates, in hours of one core: scoring grows with the images, a pass of
    k-means with images times centroids."""
    rate = tables["scoring, 500 x 375"]["one pass, images/s"]
    vectors = tables[f"{args.vectors:,d} x 384 vectors, {args.centroids} centroids"]
    larger = images / args.vectors * centroids / args.centroids
    cells = {"scoring": images / rate / 3600}
    one_pass = vectors["a pass of it, s of one core"]
    cells[f"a pass of k-means, {centroids:,d} centroids"] = one_pass * larger / 3600
    return {f"{images:,d} images, hours of one core": cells}


PARTS = {
    "memory": measure_memory,
    "scoring": time_scoring,
    "drift": measure_drift,
    "join": time_hamming_pairs,
    "vectors": time_vectors,
}


def speed(args):
    parts = args.parts.split(",")
    if not set(parts) <= PARTS.keys():
        raise config.UserError(f"--parts {args.parts}: choose from {', '.join(PARTS)}")
    tables = {}
    for part in parts:
        table = PARTS[part](args)
        show({part: table})
        tables |= table
    if "scoring" in parts and "vectors" in parts:
        table = extrapolate(args, tables)
        show({"hours": table})
        tables |= table
    if args.json:
        write_json(args.json, tables)


# ---------------------------------------------------------------- how near hashes are


def near(args):
    """How far copies lie from their originals, and strangers from each other: dedup.radius is chosen by this.

    Each scene (of a world that no pile has) is copied as re-encoded, three times resized, and brighter.
    """
    originals = []
    distances = defaultdict(list)  # {kind: [(pHash, dHash) bits between a copy and its original]}
    for i in range(args.images):
        rng = np.random.default_rng([77, i])
        pixels = render(5000, i, int(rng.choice(SIZES)))[0]
        image = Image.fromarray(pixels)
        data = jpeg(image, 92)
        for kind in ("original", "re-encoded", "resized", "resized", "resized", "brighter"):
            row = decode_image(MAKE[kind](image, data, rng), "", measure)
            hashes = np.array([int(row[name], 16) for name in ("phash", "dhash")], np.uint64)
            if kind == "original":
                originals.append(hashes)
            else:
                distances[kind].append(np.bitwise_count(hashes ^ originals[-1]))
    strangers = []
    for hashes in np.stack(originals).T:
        between = np.bitwise_count(hashes[:, None] ^ hashes)
        strangers.append(between[np.triu_indices(len(hashes), 1)])
    strangers = np.stack(strangers, 1)
    other_radius = load().dedup.other_radius
    table = {}
    for radius in range(0, 9, 2):
        cells = {}
        for kind, bits in distances.items():
            found = are_alike(np.stack(bits), radius, other_radius)
            cells[f"{kind}, of {len(bits)} missed"] = (~found).sum()
        cells["false pairs"] = are_alike(strangers, radius, other_radius).sum()
        table[f"radius {radius}"] = cells
    show({"near": table})


def are_alike(bits, radius, other_radius):
    """Differing bits of the two hashes (n, 2) -> bool (n,), as dedup.filter_hashes decides."""
    return (bits.min(1) <= radius) & (bits.max(1) <= other_radius)


# ---------------------------------------------------------------- commands


def write_json(file, tables):
    """Numbers, with hardware and versions, as a file of results/. What is not a number becomes null."""
    about = {key: value for key, value in environment().items() if key not in ("git_diff", "command")}
    text = json.dumps(dict(tables, environment=about), default=float)
    plain = json.loads(text, parse_constant=lambda name: None)  # JSON knows no NaN
    Path(file).write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")


def read_counts(text):
    """'10000,100000' -> [10000, 100000]"""
    return [argument(Count)(count) for count in text.split(",")]


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("truth")
    command.set_defaults(command=truth)
    command.add_argument("work", help="a folder for the pile; what was rendered there is used again")
    command.add_argument("--images", type=argument(Count), default=20_000)
    command.add_argument("--seed", type=argument(Whole), default=1)
    command.add_argument("--photos", default="", help="a data URI of photos that join the pile")
    command.add_argument("--video", default="", help="a data URI of frames, which have natural duplicates")
    command.add_argument("--weights", default="", help="a backbone: features and content are scored too")
    command.add_argument("--sweep", default="", help="a setting and its values: section.key=a,b,c")
    command.add_argument("--workers", type=argument(Count), default=1)
    command.add_argument("--json", default="")

    command = commands.add_parser("speed")
    command.set_defaults(command=speed)
    command.add_argument("--parts", default=",".join(PARTS))
    command.add_argument("--files", type=argument(Count), default=60, help="JPEGs that are scored")
    command.add_argument("--hashes", type=argument(Count), default=1_000_000)
    command.add_argument("--vectors", type=argument(Count), default=200_000)
    command.add_argument("--centroids", type=argument(Count), default=1000)
    command.add_argument("--pile", type=read_counts, default="10000,100000", help="images of the piles")
    command.add_argument("--work", default="runs/curation", help="a folder for them")
    command.add_argument("--json", default="")

    command = commands.add_parser("near")
    command.set_defaults(command=near)
    command.add_argument("--images", type=argument(Count), default=2500)

    args, settings = parser.parse_known_args()
    wrong = [text for text in settings if "=" not in text or text.startswith("-")]
    if settings and args.command is not truth:
        wrong = settings
    if wrong:
        parser.error(f"unknown: {wrong}")
    args.settings = settings
    return args


def main():
    args = parse_args()
    args.command(args)


if __name__ == "__main__":
    config.run(main)
