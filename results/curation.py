"""Does curate.py find what was hidden in the pile, and how fast? The tables of README and LOG.

    python results/curation.py truth WORK --seed 1 --photos folder:/photos --weights runs/laptop
    python results/curation.py truth WORK --seed 0 --images 4000 --sweep dedup.radius=2,4,6
    python results/curation.py near
    python results/curation.py speed --hashes 1000000 --vectors 200000 --pile 10000,100000

`truth` renders a pile of scenes (and photos, if a folder is given) with planted copies, rejects, leaks of an
evaluation set, blocked content and over-represented domains, curates it, and compares the manifest with what
was planted. Thresholds are chosen on one seed (--sweep) and scored on another. Scenes, photos and frames of
videos are told apart: frames have natural duplicates, which count as false merges here.
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

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))
from curation import __main__ as curate  # noqa: E402
from curation import vectors
from data import stable_hash
from runfolder import environment
from scenes import CLASSES, render
from sources import decode_image, open_source

SHARES = np.array([30, 20, 10, 10, 8, 6, 4, 4, 4, 4]) / 100  # of the ten kinds in the pile: uneven on purpose
BLOCKED = 8  # the kind that must not stay: dots
SIZES = (256, 288, 320)
PASS = "a pass of it, s of one core"


def jpeg(image, quality=90, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scaled(image, by):
    return image.resize([round(side * by) for side in image.size], Image.BICUBIC)


def lying(image):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right: so the pixels are turned to the left
    return jpeg(image.transpose(Image.ROTATE_90), exif=exif)


def cropped(image, rng):
    w, h = image.size
    x, y = rng.integers(0, round(0.05 * w) + 1), rng.integers(0, round(0.05 * h) + 1)
    return image.crop((x, y, x + round(0.95 * w), y + round(0.95 * h)))


def noise(rng, size):
    return rng.integers(0, 256, size, dtype=np.uint8).tobytes()


# (original image, its file, random numbers) -> the planted file. The group says which stage must find it.
COPIES = {
    "exact": lambda image, data, rng: data,
    "re-encoded": lambda image, data, rng: jpeg(image, int(rng.integers(35, 80))),
    "png": lambda image, data, rng: png(image),
    "resized": lambda image, data, rng: jpeg(scaled(image, rng.uniform(0.82, 1.6)), 85),
    "lying (EXIF)": lambda image, data, rng: lying(image),
    "brighter": lambda image, data, rng: jpeg(
        ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
    ),
}
CHANGED = {
    "cropped 5 %": lambda image, data, rng: jpeg(cropped(image, rng)),
    "mirrored": lambda image, data, rng: jpeg(ImageOps.mirror(image)),
}
REJECTS = {
    "blurred": lambda image, data, rng: jpeg(image.filter(ImageFilter.GaussianBlur(min(image.size) / 50))),
    "small": lambda image, data, rng: jpeg(scaled(image, 120 / min(image.size))),
    "long": lambda image, data, rng: jpeg(
        image.crop((0, 0, image.width, image.height // 4)).resize((900, 225))
    ),
    "flat": lambda image, data, rng: jpeg(
        Image.new("RGB", image.size, tuple(rng.integers(90, 200, 3).tolist()))
    ),
    "dark": lambda image, data, rng: jpeg(ImageEnhance.Brightness(image).enhance(0.15)),
    "bright": lambda image, data, rng: jpeg(Image.blend(image, Image.new("RGB", image.size, "white"), 0.96)),
    "truncated": lambda image, data, rng: data[: len(data) // 2],
    "no image": lambda image, data, rng: noise(rng, 2000),
}
MAKE = dict(original=lambda image, data, rng: data) | COPIES | CHANGED | REJECTS
LEAKS = {name: COPIES[name] for name in ("exact", "re-encoded", "resized")}


# ---------------------------------------------------------------- planting


def kinds(seed, count, shares):
    """Numbers of `count` scenes of world `seed` whose kinds are as frequent as `shares` says."""
    wanted, found, i = np.round(shares * count).astype(int), [], 0
    while wanted.sum():
        kind = int(np.random.default_rng([seed, i]).integers(len(CLASSES)))  # as scenes.render draws it
        if wanted[kind]:
            wanted[kind] -= 1
            found.append((i, kind))
        i += 1
    return found


def plant_one(job):
    """One original and all that is planted of it -> files (if they are missing), lines of truth."""
    folder, name, origin, plans = job
    files = [folder / where / f"{stable_hash(name, where, kind) % 10**12:012d}.jpg" for where, kind in plans]
    if not all(file.exists() for file in files):
        rng = np.random.default_rng(stable_hash(name) % 2**63)
        if isinstance(origin, tuple):
            image = Image.fromarray(render(*origin, int(rng.choice(SIZES)))[0])
            data = jpeg(image, 92)
        else:
            data = Path(origin).read_bytes()
            image = decode_image(data, name)
        for file, (_, kind) in zip(files, plans):
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(MAKE[kind](image, data, rng))
            partial.replace(file)
    rows = zip(files, plans)
    return [dict(path=str(f.absolute()), family=name, kind=kind, where=where) for f, (where, kind) in rows]


def plan(seed, count, photos):
    """-> [(name, origin, domain, [(folder, kind)])]: 3/4 of the pile are originals, the rest is planted."""
    rng = np.random.default_rng(seed)
    originals = kinds(1000 + seed, round(0.7 * count), SHARES)
    held = kinds(2000 + seed, max(count // 100, 10), np.full(10, 0.1))
    examples = kinds(3000 + seed, max(count // 33, 60), np.where(np.arange(10) == BLOCKED, 0.5, 0.5 / 9))
    jobs = [(f"s{i}", (1000 + seed, i), CLASSES[k], [("pile", "original")]) for i, k in originals]
    jobs += [
        (f"{d[0]}{i}", path, d, [("pile", "original")]) for d in photos for i, path in enumerate(photos[d])
    ]
    names = [*COPIES, *CHANGED, *REJECTS]
    weights = np.array([3.0] * 6 + [2.0] * 2 + [1.0] * 8)
    for job, kind in zip(
        rng.permutation(len(jobs)), rng.choice(names, round(0.3 * count), p=weights / weights.sum())
    ):
        if jobs[job][2] != CLASSES[BLOCKED]:
            jobs[job][3].append(("pile", str(kind)))
    for i, k in held:
        leaks = [("pile", kind) for kind in (*LEAKS, *CHANGED)] if i % 2 else []
        jobs.append((f"e{i}", (2000 + seed, i), CLASSES[k], [("evaluation", "original"), *leaks]))
    for i, k in examples:
        folder = "block" if k == BLOCKED else "allow"
        jobs.append((f"x{i}", (3000 + seed, i), CLASSES[k], [(folder, "original")]))
    return jobs


def plant(folder, seed, count, photos, workers):
    """The pile, its evaluation set and the examples under `folder` -> lines of truth."""
    jobs = plan(seed, count, photos)
    domain = {name: kind for name, _, kind, _ in jobs}
    work = [(folder, name, origin, plans) for name, origin, _, plans in jobs]
    with multiprocessing.Pool(workers) as pool:
        lines = [line for lines in pool.imap(plant_one, work, 32) for line in lines]
    return [dict(line, domain=domain[line["family"]]) for line in lines]


# ---------------------------------------------------------------- scoring

DUPLICATE = ("exact duplicate", "near duplicate", "feature duplicate")
QUALITY = ("unreadable", "small", "long", "dark", "bright", "flat", "blurred")
EXPECTED = {"truncated": "unreadable", "no image": "unreadable"}


def score(truth, manifest, evaluation):
    """Planted truth against the manifest -> {table: {row: {column: value}}}, [(line of truth, row)]."""
    rows = {row["path"]: row for row in manifest}
    family = defaultdict(set)  # of a SHA-256: exact copies share it
    for line in truth:
        row = rows.get(line["path"]) or evaluation.get(line["path"])
        if row and "sha256" in row:
            family[row["sha256"]].add(line["family"])
    pile = [(line, rows[line["path"]]) for line in truth if line["where"] == "pile"]
    tables = {"quality": rejects(pile), "duplicates": duplicates(pile, family), "leaks": leaks(pile)}
    tables["content"] = blocked(pile)
    tables["domains"] = domains(pile)
    return tables, pile


def rejects(pile):
    table = {}
    for kind in REJECTS:
        wanted = EXPECTED.get(kind, kind)
        planted = [row for line, row in pile if line["kind"] == kind]
        by_reason = [line for line, row in pile if row["why"] == wanted]
        right = sum(EXPECTED.get(line["kind"], line["kind"]) == wanted for line in by_reason)
        table[kind] = {"planted": len(planted), "recall": share(row["why"] in QUALITY for row in planted),
                       "precision of the reason": right / max(len(by_reason), 1)}  # fmt: skip
    dropped = [line for line, row in pile if row["why"] in QUALITY]
    table["all"] = {"planted": sum(line["kind"] in REJECTS for line, _ in pile),
                    "recall": share(row["why"] in QUALITY for line, row in pile if line["kind"] in REJECTS),
                    "precision of the reason": share(x["kind"] in REJECTS for x in dropped)}  # fmt: skip
    return table


def share(truths):
    truths = list(truths)
    return sum(truths) / len(truths) if truths else float("nan")


def duplicates(pile, family):
    """Recall: copies that ended in one component with their original, of those that reached the stage."""
    heads = {row["sha256"]: row["of"] for _, row in pile if row["why"] in DUPLICATE[1:]}

    def head(row):
        sha = row["sha256"]
        while sha in heads:
            sha = heads[sha]
        return sha

    reached = [(line, row) for line, row in pile if row["why"] not in (*QUALITY, "leak")]
    original, table = {line["family"]: row for line, row in reached if line["kind"] == "original"}, {}
    for name in ("scene", "photo", "video"):
        mine = [(line, row) for line, row in reached if line["family"][0] == name[0]]
        for kind in (*COPIES, *CHANGED):
            found = [head(row) == head(original[line["family"]]) for line, row in mine
                     if line["kind"] == kind and line["family"] in original]  # fmt: skip
            if found:
                table[f"{kind}, {name}"] = {"planted": len(found), "recall": share(found)}
        for reason in DUPLICATE:
            merges = [line["family"] in family[row["of"]] for line, row in mine if row["why"] == reason]
            if merges:
                false = len(merges) - sum(merges)
                table[f"{reason}, {name}"] = {"dropped": len(merges), "precision": share(merges),
                        "false": false, "false per 10,000 images": 1e4 * false / len(mine)}  # fmt: skip
    return table


def leaks(pile):
    table = {}
    for kind in (*LEAKS, *CHANGED):
        planted = [row for line, row in pile if line["family"][0] == "e" and line["kind"] == kind]
        reached = [row for row in planted if row["why"] not in QUALITY]
        table[kind] = {"planted": len(planted), "recall": share(row["why"] == "leak" for row in reached)}
    dropped = [line["family"][0] == "e" for line, row in pile if row["why"] == "leak"]
    table["all"] = {"dropped": len(dropped), "precision": share(dropped)}
    return table


def curve(out, pile):
    """What features find among those whom hashes let pass, by threshold: recall of copies, false pairs.

    The file of features holds the images that were in after the hashes, in the manifest's order.
    """
    file = max((out / "work").glob("features-*.npy"), key=lambda f: f.stat().st_mtime)
    early = (*QUALITY, "exact duplicate", "near duplicate", "leak")
    place = {row["path"]: (line, row) for line, row in pile}
    rows = [json.loads(line) for line in (out / "manifest.jsonl").open()]
    lines = [place[row["path"]][0] for row in rows if row["why"] not in early]
    x = np.load(file)[: len(lines)].astype(np.float32)
    group = np.array([line["family"][0] for line in lines])
    family = np.unique([line["family"] for line in lines], return_inverse=True)[1]
    kind, table = np.array([line["kind"] for line in lines]), {}
    for name in ("scene", "photo", "video"):
        mine = np.flatnonzero(group == name[0])
        s = x[mine] @ x[mine].T
        same = family[mine][:, None] == family[mine]
        origin = same & (kind[mine] == "original")
        near = np.where(origin, s, -1).max(1, initial=-1)  # cosine of each to its own original
        apart = np.where(same, -1, s).max(1, initial=-1)  # and to the nearest image of another family
        for cut in (0.999, 0.998, 0.995, 0.99, 0.98, 0.95, 0.9):
            cells = {k: share(near[(kind[mine] == k) & origin.any(1)] > cut) for k in CHANGED}
            table[f"cosine above {cut}, {name}"] = cells | {
                "images with a stranger so near": share(apart > cut)
            }
    return table


def blocked(pile):
    seen = [
        (line["domain"] == CLASSES[BLOCKED], row["why"] == "blocked")
        for line, row in pile
        if "blocked" in row
    ]
    seen = [(truth, found) for truth, found in seen]
    return {CLASSES[BLOCKED]: {"reached": sum(t for t, _ in seen), "recall": share(f for t, f in seen if t),
                               "precision": share(t for t, f in seen if f)}} if seen else {}  # fmt: skip


def domains(pile):
    """Entropy of the true kinds of scenes before and after, of the largest possible."""
    scenes = [
        (line["domain"], row)
        for line, row in pile
        if line["domain"] in CLASSES and line["domain"] != CLASSES[BLOCKED]
    ]
    labels = lambda keep: np.array([d for d, row in scenes if keep(row)])  # noqa: E731
    early = (*QUALITY, *DUPLICATE, "leak", "blocked", "ugly")
    before, after = labels(lambda row: row["why"] not in early), labels(lambda row: row["keep"])
    return {"kinds of scenes": {"before": vectors.entropy(before), "after": vectors.entropy(after),
                                "images": len(after)}}  # fmt: skip


def show(tables):
    for name, table in tables.items():
        print(f"\n{name}")
        for row, cells in table.items():
            print(f"  {row:34s}" + "   ".join(f"{k} {v:.4g}" for k, v in cells.items()))


def truth(args):
    folder, photos = Path(args.work) / f"{args.seed}-{args.images}", {}
    for domain, uri in ("photo", args.photos), ("video", args.video):
        if uri:
            source = open_source(uri)
            photos[domain] = [source.name(i) for i in range(len(source))]
    start = time.perf_counter()
    planted = plant(folder, args.seed, args.images, photos, args.workers)
    print(Counter(line["where"] for line in planted), f"planted in {time.perf_counter() - start:.0f} s")
    settings = [f"dedup.evaluation=folder:{folder}/evaluation", "quality.min_side=160", *args.settings]
    if args.weights:
        settings += [f"features.weights={args.weights}", f"content.allow=folder:{folder}/allow",
                     f"content.block=folder:{folder}/block"]  # fmt: skip
    name, _, values = args.sweep.partition("=")
    for value in values.split(",") if values else [None]:
        some = [*settings, f"{name}={value}"] if value else settings
        out = folder / "out"
        command = [sys.executable, "curate.py", "run", f"folder:{folder}/pile", str(out), *some]
        start = time.perf_counter()
        command += ["--workers", str(args.workers - 1)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
        print(f"curated in {time.perf_counter() - start:.0f} s", f"{name}={value}" if value else "")
        read = lambda x: [json.loads(line) for line in (out / f"{x}.jsonl").open()]  # noqa: B023, E731
        tables, rows = score(planted, read("manifest"), {row["path"]: row for row in read("evaluation")})
        if args.weights:
            tables["by features, hashes having found nothing"] = curve(out, rows)
        show(tables)
        if args.json:
            about = dict(seed=args.seed, images=len(rows), settings=args.settings)
            keep(args.json, dict(about=about, tables=tables))


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
    rng, image = (
        np.random.default_rng(seed),
        np.asarray(Image.fromarray(render(7, seed, 512)[0]).resize(size), float),
    )
    for side in (8, 32, 128, 400):
        grain = rng.normal(0, 9, (side, side)).astype(np.float32)
        image = image + np.asarray(Image.fromarray(grain).resize(size, Image.BICUBIC))[..., None]
    return jpeg(Image.fromarray(image.clip(0, 255).astype(np.uint8)), 88)


def naive(data):
    """What one writes first: decode, then each measure on its own with a library."""
    import imagehash

    image = Image.open(io.BytesIO(data))
    imagehash.phash(image), imagehash.dhash(image)
    x = np.asarray(image.convert("L"), float)
    y = 4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]
    p = np.bincount(np.asarray(image.convert("L")).ravel(), minlength=256) / x.size
    return y.var(), -(p[p > 0] * np.log2(p[p > 0])).sum()


def scoring(args):
    files = [photo_like(i) for i in range(args.files)]
    ways = {"one pass": lambda: [decode_image(x, "", curate.measure) for x in files],
            "naive": lambda: [naive(x) for x in files]}  # fmt: skip
    seconds = alternate(ways, 5)
    rates = {f"{k}, images/s": len(files) / v for k, v in seconds.items()}
    return {"scoring, 500 x 375": rates | {"ratio": seconds["naive"] / seconds["one pass"],
                                           "KB": np.mean([len(x) for x in files]) / 1000}}  # fmt: skip


def drift(args):
    """Bits by which hashes of the drafted, reduced picture differ from those of the whole, grey picture."""
    rows = []
    for i in range(args.files):
        data = photo_like(i)
        row, grey = decode_image(data, "", curate.measure), Image.open(io.BytesIO(data)).convert("L")
        pairs = (row["phash"], curate.phash(grey)), (row["dhash"], curate.dhash(grey))
        rows.append([(int(a, 16) ^ b).bit_count() for a, b in pairs])
    p, d = np.array(rows).T
    return {"drift of the draft, bits of 64": {"pHash mean": p.mean(), "pHash most": p.max(),
                                               "dHash mean": d.mean(), "dHash most": d.max()}}  # fmt: skip


def joining(args):
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, args.hashes, dtype=np.uint64)
    twins = args.hashes // 10
    flips = np.uint64(1) << rng.integers(0, 64, (6, twins), dtype=np.uint64)
    hashes[-twins:] = hashes[:twins] ^ np.bitwise_xor.reduce(flips)
    few = hashes[: min(args.hashes, 16_384)]  # brute force on a part: its time grows with the square

    def brute():  # blocks that stay in a core's cache
        return [(np.bitwise_count(few[i : i + 64, None] ^ few[j : j + 2048]) <= 6).sum()
                for i in range(0, len(few), 64) for j in range(0, len(few), 2048)]  # fmt: skip

    seconds = alternate({"banded": lambda: [len(x) for x in curate.join(hashes, 6)], "brute": brute}, 2)
    found = len({(min(p), max(p)) for pairs in curate.join(hashes, 6) for p in pairs.tolist()})
    whole = seconds["brute"] * (len(hashes) / len(few)) ** 2 / 2  # each pair once
    return {f"join of {args.hashes:,d} hashes, radius 6": {"banded, s": seconds["banded"],
            "brute force, s (extrapolated)": whole, "ratio": whole / seconds["banded"],
            "found of the twins": found / twins}}  # fmt: skip


def vector_work(args):
    rng, n = np.random.default_rng(0), args.vectors
    centres = rng.normal(size=(n // 100, 384)).astype(np.float32)
    x = centres[rng.integers(0, len(centres), n)] + rng.normal(size=(n, 384)).astype(np.float32)
    x[-n // 100 :] = x[: n // 100] + 0.05 * rng.normal(size=(n // 100, 384))
    x, table = vectors.unit(torch.from_numpy(x)), {}
    start = time.process_time()
    vectors.kmeans(x, args.centroids)
    table["k-means, s of one core"] = time.process_time() - start
    start = time.process_time()
    vectors.nearest(x, x[: args.centroids])
    table[PASS] = time.process_time() - start
    start = time.process_time()
    roots = vectors.families(x, np.zeros(n, bool), 0.95, 2.0)
    table["feature dedup, s of one core"] = time.process_time() - start
    table["recall of its 1 %"] = float((roots[-n // 100 :] < n - n // 100).mean())
    table["threads"] = torch.get_num_threads()
    return {f"{n:,d} x 384 vectors, {args.centroids} centroids": table}


def memory(args):
    """Peak memory of `curate.py run` on piles of small images, with the same size of a piece. First of all
    parts: Linux counts what the parent had before a child begins."""
    table, root = {}, Path(__file__).parent.parent
    tiny = "import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.')\n"
    tiny += "try: runpy.run_path('curate.py', run_name='__main__')\n"
    tiny += "finally: print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    for count in map(int, args.pile.split(",")):
        folder = Path(args.work) / f"small{count}"
        for i in range(count):
            file = folder / "pile" / f"{i // 1000:04d}" / f"{i:07d}.jpg"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                grain = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
                file.write_bytes(jpeg(Image.fromarray(grain).resize((64, 64), Image.BICUBIC), 60))
        shutil.rmtree(folder / "out", ignore_errors=True)
        command = [sys.executable, "-c", tiny, "curate.py", "run", f"folder:{folder}/pile", f"{folder}/out",
                   "quality.min_side=10", "quality.min_sharpness=0"]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
        table[f"{count:,d} images, MB"] = int(done.stdout.split("peak")[1]) / 1024
        table[f"{count:,d} images, s"] = time.perf_counter() - start
    return {"memory of a run": table}


def hours(args, tables, images=500_000_000, centroids=50_000):
    """What a crawl would take at these rates, in hours of one core: scoring grows with the images, a pass of
    k-means with images times centroids."""
    rate = tables["scoring, 500 x 375"]["one pass, images/s"]
    one_pass = next(x for x in tables.values() if PASS in x)[PASS]
    larger = images / args.vectors * centroids / args.centroids
    return {f"{images:,d} images, hours of one core": {"scoring": images / rate / 3600,
            f"a pass of k-means, {centroids:,d} centroids": one_pass * larger / 3600}}  # fmt: skip


def speed(args):
    tables = {}
    for part in args.parts.split(","):
        table = dict(scoring=scoring, drift=drift, join=joining, vectors=vector_work, memory=memory)[part](
            args
        )
        show({part: table})
        tables |= table
    if {"scoring", "vectors"} <= set(args.parts.split(",")):
        tables |= (table := hours(args, tables))
        show({"hours": table})
    if args.json:
        keep(args.json, tables)


def near(args):
    """How far copies lie from their originals, and strangers from each other: what dedup.radius is chosen by.

    Each scene (of a world that no pile has) is copied as re-encoded, three times resized, and brighter.
    """
    hashes, apart = [], defaultdict(list)
    for i in range(args.images):
        rng = np.random.default_rng([77, i])
        image = Image.fromarray(render(5000, i, int(rng.choice(SIZES)))[0])
        data = jpeg(image, 92)
        for kind in ("original", "re-encoded", "resized", "resized", "resized", "brighter"):
            row = decode_image(MAKE[kind](image, data, rng), "", curate.measure)
            own = np.array([int(row[k], 16) for k in ("phash", "dhash")], np.uint64)
            if kind == "original":
                hashes.append(own)
            else:
                apart[kind].append(np.bitwise_count(own ^ hashes[-1]))
    every = np.stack(hashes)
    strangers = np.stack([np.bitwise_count(h[:, None] ^ h)[np.triu_indices(len(h), 1)] for h in every.T], 1)
    table, other = {}, curate.load().dedup.other_radius
    for radius in range(0, 9, 2):
        same = lambda bits: (bits.min(1) <= radius) & (bits.max(1) <= other)  # noqa: B023, E731
        cells = {f"{kind}, of {len(x)} missed": (~same(np.stack(x))).sum() for kind, x in apart.items()}
        table[f"radius {radius}"] = cells | {"false pairs": same(strangers).sum()}
    show({"near": table})


def keep(file, tables):
    """Numbers, with hardware and versions, as a file of results/. What is not a number becomes null."""
    here = {k: v for k, v in environment().items() if k not in ("git_diff", "command")}
    text = json.dumps(dict(tables, environment=here), default=float)
    plain = json.loads(text, parse_constant=lambda name: None)  # JSON knows no NaN
    Path(file).write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(required=True)
    add = (one := commands.add_parser("truth")).add_argument
    one.set_defaults(command=truth)
    add("work", help="a folder for the pile; what was rendered there is used again")
    add("--images", type=int, default=20_000)
    add("--seed", type=int, default=1)
    add("--photos", default="", help="a data URI of photos that join the pile")
    add("--video", default="", help="a data URI of frames, among which there are natural duplicates")
    add("--weights", default="", help="a backbone: with it, features, content and so on are judged too")
    add("--sweep", default="", help="a setting and its values: section.key=a,b,c")
    add("--workers", type=int, default=1)
    add("--json", default="")
    add = (two := commands.add_parser("speed")).add_argument
    two.set_defaults(command=speed)
    add("--parts", default="memory,scoring,drift,join,vectors")
    add("--files", type=int, default=60, help="JPEGs that are scored")
    add("--hashes", type=int, default=1_000_000)
    add("--vectors", type=int, default=200_000)
    add("--centroids", type=int, default=1000)
    add("--pile", default="10000,100000", help="images of the piles whose memory is measured")
    add("--work", default="runs/curation", help="a folder for them")
    add("--json", default="")
    add = (three := commands.add_parser("near")).add_argument
    three.set_defaults(command=near)
    add("--images", type=int, default=2500)
    args, rest = parser.parse_known_args()
    if strange := [x for x in rest if "=" not in x or x.startswith("-")] or (
        rest and args.command is not truth
    ):
        parser.error(f"unknown: {strange}")
    args.settings = rest
    args.command(args)


if __name__ == "__main__":
    main()
