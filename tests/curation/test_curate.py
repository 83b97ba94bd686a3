"""Curation from end to end: planted images are found, and runs killed at any time write the same bytes."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from config import UserError
from curation import dedup, embed, ingest, quality
from curation.__main__ import curate, main
from curation.manifest import REASONS, Curation
from curation.quality import threshold
from curation.settings import load
from curation.vectors import unit_rows
from curation.write import write
from model import VisionTransformer
from scenes import render
from sources import Entry, decode_image, open_source

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "curation", "run"]
PIPES = dict(cwd=ROOT, capture_output=True, text=True)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def scene(number, size=224, seed=5):
    return Image.fromarray(render(seed, number, size)[0])


def jpeg(image, quality=92, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def images():
    return [scene(i) for i in range(24)]


def plant_rejects(put, images, data):
    put("c0.jpg", jpeg(images[5].filter(ImageFilter.GaussianBlur(6))), "blurred")
    put("c1.jpg", jpeg(images[6].resize((120, 120))), "small")
    put("c2.jpg", jpeg(images[7].crop((0, 0, 224, 60)).resize((900, 220))), "long")
    put("c3.png", png(Image.new("RGB", (224, 224), (120, 130, 140))), "flat")
    put("c4.jpg", jpeg(images[8].point(lambda v: v // 8)), "dark")
    put("c5.jpg", jpeg(images[9].point(lambda v: 250 + v // 64)), "bright")
    put("d0.jpg", data[: len(data) // 2], "unreadable")
    put("d1.jpg", b"<html>404</html>", "unreadable")


def build(root, images):
    """24 scenes, copies of some, rejects; an evaluation set that has leaked. -> {name: reason}"""
    truth = {}

    def put(name, data, why="kept", folder="pile"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_bytes(data)
        if folder == "pile":
            truth[name] = why

    files = [jpeg(image) for image in images]
    for i, data in enumerate(files):
        put(f"a{i:02d}.jpg", data, "leak" if i in (20, 21) else "kept")
    put("b00.jpg", files[0], "exact duplicate")
    for i in (1, 2, 3):
        put(f"b{i:02d}.jpg", jpeg(images[i], 50), "near duplicate")
    put("b04.jpg", jpeg(images[4].resize((208, 208), Image.BICUBIC)), "near duplicate")
    put("b20.jpg", jpeg(images[20], 60), "leak")
    plant_rejects(put, images, files[10])
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        put(f"n{i}.png", png(Image.fromarray(pixels)), folder="block")
    put("e20.png", png(images[20]), folder="evaluation")
    put("e21.jpg", jpeg(images[21].resize((300, 300), Image.BICUBIC)), folder="evaluation")
    return truth


@pytest.fixture(scope="session")
def pile(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("pile")
    return root, build(root, images)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A teacher.pth of a small random network, its LayerScale open, so that features differ."""
    torch.manual_seed(0)
    net = VisionTransformer(32, 2, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1)
    for name, parameter in net.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1.0)
    file = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save({"teacher": {f"backbone.{name}": x for name, x in net.state_dict().items()}}, file)
    return file


def overrides(root, *more):
    return [f"dedup.evaluation=folder:{root}/evaluation", "ingest.piece=8", "write.images=10", *more]


def run(source, out, chosen, last_stage="write", workers=0):
    return curate(source, out, load(None, chosen), last_stage, workers)


def manifest(out):
    return [json.loads(line) for line in (Path(out) / "manifest.jsonl").read_text().splitlines()]


def reasons(out):
    return {Path(row["path"]).name: row["why"] for row in manifest(out)}


def results(out):
    """All that a run leaves for its user: {path: bytes}."""
    files = {}
    for path in Path(out).rglob("*"):
        if path.is_file() and "work" not in path.parts and path.name != "lock":
            files[str(path.relative_to(out))] = path.read_bytes()
    return files


# ---------------------------------------------------------------- what was planted is found


@pytest.fixture(scope="session")
def done(pile, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run(f"folder:{pile[0]}/pile", out, overrides(pile[0]))
    return out


def test_every_planted_image_gets_its_reason(pile, done):
    assert reasons(done) == pile[1]


def test_a_duplicate_names_the_one_that_stayed(pile, done):
    rows = {Path(row["path"]).name: row for row in manifest(done)}
    for copy, original in (("b00", "a00"), ("b01", "a01"), ("b04", "a04")):
        stayed = rows[f"{original}.jpg"]
        assert rows[f"{copy}.jpg"]["of"] == stayed["sha256"] and stayed["keep"]


def test_no_pixel_is_changed_and_the_shards_are_read_back(pile, done):
    assert sorted(path.name for path in (pile[0] / "pile").iterdir()) == sorted(pile[1])
    kept = [row for row in manifest(done) if row["keep"]]
    data = open_source(f"tar:{done}/shards/{{00000..00002}}.tar")
    assert len(data) == len(kept) == 22
    for i in (0, 9, 10, 21):
        assert data[i][0].tobytes() == decode_image(kept[i]["path"], "").tobytes()
    assert len(open_source(f"list:{done}/manifest.jsonl")) == len(kept)


def test_webdataset_reads_the_shards(done):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, (done / "shards").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    kept = [row["sha256"] for row in manifest(done) if row["keep"]]
    assert [sample["json"]["sha256"] for sample in samples] == kept
    assert samples[0]["jpg"].size == (224, 224)


def test_the_funnel_shows_each_reason_and_nothing_from_outside(pile, done):
    page = (done / "funnel.html").read_text()
    shown = set(pile[1].values())
    for reason in shown:
        assert f"<h3>{reason}</h3>" in page
    num_sheets = len(shown) - 1  # unreadable ones are listed
    assert page.count("data:image/jpeg;base64,") == num_sheets
    assert "404" in page and "<svg" in page
    for outside in ("http://", "https://", 'src="/', "<script"):
        assert outside not in page


def test_the_page_alone_is_drawn_again(done):
    before = results(done)
    (done / "funnel.html").unlink()
    subprocess.run([sys.executable, "-m", "curation.page", str(done)], cwd=ROOT, check=True)
    assert results(done) == before


def add_member(tar, name, data=b""):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_shards_give_the_same_as_files(pile, done, tmp_path):
    """The pile as img2dataset would leave it: key.jpg, key.json, key.txt; and failures without an image."""
    for part in (0, 1):
        with tarfile.open(tmp_path / f"{part:05d}.tar", "w") as tar:
            for path in sorted((pile[0] / "pile").iterdir())[part::2]:
                add_member(tar, path.name, path.read_bytes())
                add_member(tar, f"{path.stem}.json", b"{}")
                add_member(tar, f"{path.stem}.txt", b"a")
            add_member(tar, "gone.json")
    (tmp_path / "00002.tar").write_bytes(b"no tar at all" * 100)
    run(f"tar:{tmp_path}/{{00000..00002}}.tar", tmp_path / "out", overrides(pile[0]))
    why = {}
    for row in manifest(tmp_path / "out"):
        name = row["key"] if "key" in row else Path(row["path"]).name
        why[name] = row["why"]
    assert why.pop("gone") == "unreadable"
    assert why.pop("00002.tar") == "unreadable"
    assert why == {Path(name).stem: reason for name, reason in pile[1].items()}
    assert len(open_source(f"list:{tmp_path}/out/manifest.jsonl")) == 22


def test_labels_travel(tmp_path, images):
    for first, name in ((0, "cat"), (3, "dog")):
        (tmp_path / "pile" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pile" / name / f"{i}.jpg").write_bytes(jpeg(images[first + i]))
    run(f"folder:{tmp_path}/pile", tmp_path / "out", [])
    data = open_source(f"tar:{tmp_path}/out/shards/00000.tar")
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]


# ---------------------------------------------------------------- one image


def test_a_sideways_photo_is_measured_upright(images):
    exif = Image.Exif()
    exif[ingest.EXIF_ORIENTATION] = 6
    tall = images[0].crop((0, 0, 160, 224))
    lying = decode_image(jpeg(tall.transpose(Image.ROTATE_90), exif=exif), "x", ingest.measure)
    upright = decode_image(jpeg(tall), "x", ingest.measure)
    assert (lying["width"], lying["height"]) == (160, 224) == (upright["width"], upright["height"])
    assert (int(lying["phash"], 16) ^ int(upright["phash"], 16)).bit_count() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_mode_is_measured(images, mode):
    image = images[0].convert("L").convert("I") if mode == "I;16" else images[0]
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    row = decode_image(buffer.getvalue(), "x", ingest.measure)
    assert row["width"] == 224 and row["entropy"] > 0.5


def test_what_is_far_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("sources.MAX_PIXELS", 10_000)
    file = tmp_path / "bomb.png"
    file.write_bytes(png(Image.new("L", (101, 100))))
    row = ingest.examine(Entry(str(file)))
    assert row["why"] == "unreadable" and "101 x 100" in row["detail"]


def test_hashes_are_imagehash_s_bit_for_bit(images):
    imagehash = pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    for i in range(300):
        grey = images[i % 24].convert("L")
        x, y = rng.integers(0, 60, 2).tolist()
        side = int(rng.integers(40, 160))
        grey = grey.crop((x, y, x + side, y + side)).rotate(90 * (i % 4))
        assert f"{ingest.phash(grey):016x}" == str(imagehash.phash(grey))
        assert f"{ingest.dhash(grey):016x}" == str(imagehash.dhash(grey))


# ---------------------------------------------------------------- settings


def test_thresholds_may_be_percentiles(pile, tmp_path):
    done = run(f"folder:{pile[0]}/pile", tmp_path, ["quality.min_sharpness=50%"], "quality")
    assert (done.why == REASONS.index("blurred")).sum() >= 10
    assert threshold("25%", np.arange(101)) == 25 and threshold(3, None) == 3


STRICTER = [
    ("quality.min_side=225", "small"),
    ("quality.max_aspect=1.5", "long"),
    ("quality.min_dark=0.99", "dark"),
    ("quality.max_bright=0.01", "bright"),
    ("quality.min_entropy=7.99", "flat"),
    ("quality.min_sharpness=50%", "blurred"),
]


@pytest.mark.parametrize("text, reason", STRICTER)
def test_each_rule_has_its_threshold(images, tmp_path, text, reason):
    """Two images, one of them 2 : 1, pass by default; a stricter threshold drops one for its own reason."""
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.jpg").write_bytes(jpeg(images[0].resize((900, 450))))
    (tmp_path / "pile" / "b.jpg").write_bytes(jpeg(images[1]))
    source = f"folder:{tmp_path}/pile"
    assert run(source, tmp_path / "loose", [], "quality").why.tolist() == [0, 0]
    strict = Curation(source, tmp_path / "strict", load(None, [text]))
    ingest.ingest(strict)
    found = [REASONS[why] for why in quality.filter_quality(strict)["why"]]
    assert reason in found and set(found) <= {reason, "kept"}


@pytest.mark.parametrize("text, word", [("quality.min_sid=3", "min_side"), ("quality.min_side=x", "whole"),
                                        ("quality.min_entropy=2%%", "percentile"),
                                        ("nothing", "setting")])  # fmt: skip
def test_a_mistyped_setting_is_one_sentence(text, word):
    with pytest.raises(UserError, match=word):
        load(None, [text])


def test_the_example_config_loads():
    files = list((ROOT / "configs" / "curation").glob("*.yaml"))
    assert files
    for file in files:
        assert vars(load(file))


NO_PILES = [("scenes:10", "no pile of files"), ("tar:/nowhere/*.tar", "no shard")]


@pytest.mark.parametrize("source, word", NO_PILES)
def test_what_is_no_pile_is_refused(source, word, tmp_path):
    with pytest.raises(UserError, match=word):
        Curation(source, tmp_path, load())


@pytest.mark.parametrize("setting", ["balance.target=3", "balance.seeds=x", "content.head=x"])
def test_later_stages_without_features_say_what_to_do(pile, tmp_path, setting):
    with pytest.raises(UserError, match="features.weights"):
        run(f"folder:{pile[0]}/pile", tmp_path, [setting])


def test_a_file_that_changed_after_ingest_is_refused(tmp_path, images):
    (tmp_path / "pile").mkdir()
    file = tmp_path / "pile" / "a.jpg"
    file.write_bytes(jpeg(images[0]))
    done = run(f"folder:{tmp_path}/pile", tmp_path / "out", [], "balance")
    file.write_bytes(jpeg(images[1]))
    with pytest.raises(UserError, match="changed"):
        write(done)


# ---------------------------------------------------------------- features


class MeanColour:
    """Stands in for a backbone: the mean colour of an image, as a direction."""

    width = 3
    key = "colours"

    def __call__(self, images, numbers=None):
        colours = [np.asarray(images[i][0], float).mean((0, 1)) for i in range(len(images))]
        return unit_rows(torch.from_numpy(np.array(colours) - 100))


def coloured(folder, count, tint, rng):
    """Sharp noise whose mean colour is `tint`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        mean = np.array(tint) + rng.normal(0, 8, 3)
        pixels = np.clip(rng.normal(mean, 60, (208, 208, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{'-'.join(map(str, tint))}-{i:02d}.png")


RED, GREEN, BLUE = (170, 80, 80), (80, 170, 80), (80, 80, 170)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(7)
    for tint, count in ((RED, 30), (GREEN, 8), (BLUE, 6)):
        coloured(root / "pile", count, tint, rng)
    coloured(root / "allow", 15, RED, rng)
    coloured(root / "allow", 15, GREEN, rng)
    coloured(root / "block", 20, BLUE, rng)
    coloured(root / "seeds", 2, GREEN, rng)
    with open(root / "ratings.csv", "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "rating"])
        for path in sorted((root / "allow").iterdir()):
            lines.writerow([f"allow/{path.name}", 8 if path.name.startswith("80-170") else 2])
    return root


@pytest.fixture
def by_colour(monkeypatch):
    """Settings under which features are mean colours."""
    monkeypatch.setattr(embed, "open_embedder", lambda settings: MeanColour())
    return ["features.weights=known"]


def kept_colours(out):
    return [Path(row["path"]).name.rpartition("-")[0] for row in manifest(out) if row["keep"]]


def test_content_filter_from_two_folders(colours, by_colour, tmp_path):
    source = f"folder:{colours}/pile"
    examples = [f"content.allow=folder:{colours}/allow", f"content.block=folder:{colours}/block"]
    done = run(source, tmp_path / "a", [*by_colour, *examples])
    assert set(kept_colours(tmp_path / "a")) == {"170-80-80", "80-170-80"}
    assert (done.why == REASONS.index("blocked")).sum() == 6
    assert "precision 1.000, recall 1.000" in (tmp_path / "a" / "funnel.html").read_text()
    run(source, tmp_path / "b", [*by_colour, f"content.head={tmp_path}/a/heads/blocked.npz"])
    assert kept_colours(tmp_path / "b") == kept_colours(tmp_path / "a")


def test_aesthetics_from_ratings(colours, by_colour, tmp_path):
    chosen = [*by_colour, f"content.ratings={colours}/ratings.csv", "content.min_aesthetics=5"]
    run(f"folder:{colours}/pile", tmp_path, chosen)
    kept = kept_colours(tmp_path)
    assert "80-170-80" in kept and "170-80-80" not in kept


@pytest.mark.parametrize("text", ["path,rating\n", "path,stars\na.png,3\n", "path,rating\na.png,good\n"])
def test_ratings_that_are_none_are_refused(colours, by_colour, tmp_path, text):
    (tmp_path / "ratings.csv").write_text(text)
    chosen = [*by_colour, f"content.ratings={tmp_path}/ratings.csv"]
    with pytest.raises(UserError, match="columns path and rating"):
        run(f"folder:{colours}/pile", tmp_path / "out", chosen)


def test_changed_examples_are_read_again(colours, by_colour, tmp_path):
    """A stage also depends on the files that its settings name."""
    ratings = tmp_path / "ratings.csv"
    lines = (colours / "ratings.csv").read_text().replace("allow/", f"{colours}/allow/")
    ratings.write_text(lines)
    chosen = [*by_colour, f"content.ratings={ratings}"]
    run(f"folder:{colours}/pile", tmp_path / "out", [*chosen, "content.min_aesthetics=5"])
    before = kept_colours(tmp_path / "out")
    ratings.write_text(lines.replace(",8", ",1"))
    run(f"folder:{colours}/pile", tmp_path / "out", [*chosen, "content.min_aesthetics=1.5"])
    assert before and kept_colours(tmp_path / "out") != before


def test_balance_evens_the_domains(colours, by_colour, tmp_path):
    chosen = [*by_colour, "balance.target=18", "balance.clusters=9 3"]
    done = run(f"folder:{colours}/pile", tmp_path, chosen)
    kept = kept_colours(tmp_path)
    assert sorted(kept.count(colour) for colour in set(kept)) == [6, 6, 6]
    assert "after" in done.notes[-1] and {row["domain"] for row in manifest(tmp_path)} == {0, 1, 2}


def test_retrieval_keeps_neighbours_of_the_seeds(colours, by_colour, tmp_path):
    chosen = [*by_colour, f"balance.seeds=folder:{colours}/seeds", "balance.k=4"]
    run(f"folder:{colours}/pile", tmp_path, chosen)
    kept = kept_colours(tmp_path)
    assert set(kept) == {"80-170-80"} and 4 <= len(kept) <= 8


def test_embeddings_made_elsewhere(colours, tmp_path):
    source = f"folder:{colours}/pile"
    images = open_source(source)
    x = MeanColour()(images)
    names = np.array([images.name(i) for i in range(len(images))])
    np.save(tmp_path / "x.npy", x)
    order = np.random.default_rng(0).permutation(len(x))
    np.savez(tmp_path / "x.npz", cls=x[order], paths=names[order])
    for file in ("x.npy", "x.npz"):
        done = run(source, tmp_path / file[-3:], [f"features.embeddings={tmp_path}/{file}"])
        assert np.allclose(done.features, x, atol=1e-3)
    broken = x.copy()
    broken[3] = np.nan
    for words, rows in (("no row for", x[1:]), ("not finite", broken), ("must hold rows", x[0, 0])):
        np.savez(tmp_path / "x.npz", cls=rows, paths=names[-len(np.atleast_1d(rows)) :])
        with pytest.raises(UserError, match=words):
            run(source, tmp_path / "z", [f"features.embeddings={tmp_path}/x.npz"])


def test_embeddings_of_a_shard_are_found_by_its_members(colours, tmp_path):
    run(f"folder:{colours}/pile", tmp_path / "a", [])
    shards = f"tar:{tmp_path}/a/shards/00000.tar"
    images = open_source(shards)
    x = MeanColour()(images)
    names = np.array([images.name(i) for i in range(len(images))])
    np.savez(tmp_path / "x.npz", cls=x[::-1], paths=names[::-1])
    done = run(shards, tmp_path / "b", [f"features.embeddings={tmp_path}/x.npz"])
    assert names[0].endswith(".png") and np.allclose(done.features, x, atol=1e-3)


# ---------------------------------------------------------------- restarts, processes


def all_stages(root, weights):
    """Settings under which every stage has something to do."""
    return overrides(root, f"features.weights={weights}", "features.size=32", "similar.min_cosine=0.97",
                     "similar.leak_cosine=0.96", "balance.target=15", "balance.clusters=6 2",
                     f"content.allow=folder:{root}/pile", f"content.block=folder:{root}/block",
                     "content.recall=0.8")  # fmt: skip


@pytest.fixture(scope="module")
def whole(pile, weights, tmp_path_factory):
    """The results of one undisturbed process: {path: bytes}."""
    out = tmp_path_factory.mktemp("whole")
    done = run(f"folder:{pile[0]}/pile", out, all_stages(pile[0], weights))
    stages = [stage.name for stage in done.stages]
    assert stages == ["ingest", "quality", "hashes", "similar", "content", "balance"]
    files = results(out)
    assert {"manifest.jsonl", "funnel.html", "shards/00000.tar", "shards/00001.tar"} <= set(files)
    return files


def test_workers_change_nothing(pile, weights, whole, tmp_path):
    run(f"folder:{pile[0]}/pile", tmp_path, all_stages(pile[0], weights), workers=2)
    assert results(tmp_path) == whole


def test_two_processes_are_one(pile, weights, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *COMMAND[1:], f"folder:{pile[0]}/pile", str(tmp_path)]
    done = subprocess.run([*command, *all_stages(pile[0], weights)], env=ONE_THREAD, **PIPES)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path) == whole and done.stdout.count("quality ") == 1


# One process imports everything, then forks a child for each life; a child dies at its n-th finished file.
LIVES = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from curation.__main__ import curate
from curation.settings import load

source, out, points, *overrides = sys.argv[1:]

def live(point):
    real, count = os.replace, 0
    def replace(*names):
        nonlocal count
        count += 1
        if count == abs(point):
            if point < 0:
                real(*names)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*names)
    os.replace = replace
    curate(source, out, load(None, overrides))

for point in [*map(int, points.split()), 0]:
    pid = os.fork()
    if not pid:
        live(point)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


def run_killed(pile, weights, out, points):
    """Runs that die at the given files (negative: just after its name appears), then one that lives."""
    arguments = [f"folder:{pile[0]}/pile", str(out), " ".join(map(str, points))]
    command = [sys.executable, "-c", LIVES, *arguments, *all_stages(pile[0], weights)]
    done = subprocess.run(command, env=ONE_THREAD, **PIPES)
    signals = [int(line) for line in done.stdout.split() if line.isdigit()]
    assert signals == [signal.SIGKILL] * len(points) + [0], done.stderr


def test_killed_at_three_points(pile, weights, whole, tmp_path):
    """In the middle of ingest, among the features, and between two shards."""
    run_killed(pile, weights, tmp_path, [3, -9, 9])
    assert results(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_ten_points(pile, weights, whole, tmp_path, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(1, 4, 10) * rng.choice([-1, 1], 10)
    run_killed(pile, weights, tmp_path, points.tolist())
    assert results(tmp_path) == whole


@pytest.mark.slow
def test_killed_at_ten_moments(pile, weights, whole, tmp_path):
    """The real command with its workers, all killed when some number of files is there; then run again."""
    rng = np.random.default_rng(0)
    kills = 0
    for i, count in enumerate(rng.permutation(np.arange(1, 20, 2))):
        out = tmp_path / str(i)
        command = [*COMMAND, f"folder:{pile[0]}/pile", str(out), "--workers", "2"]
        command += all_stages(pile[0], weights)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while process.poll() is None and sum(path.is_file() for path in out.rglob("*")) <= count:
            time.sleep(rng.uniform(0, 0.01))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        subprocess.run(command, cwd=ROOT, check=True)
        assert results(out) == whole
    assert kills >= 8


def work_times(out):
    files = [path for path in (out / "work").rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def test_finished_work_is_not_repeated(pile, tmp_path, monkeypatch):
    source = f"folder:{pile[0]}/pile"
    run(source, tmp_path, overrides(pile[0]))
    times = work_times(tmp_path)
    monkeypatch.setattr(ingest, "examine", None)  # nothing is measured twice
    monkeypatch.setattr(dedup, "filter_hashes", None)
    run(source, tmp_path, overrides(pile[0]))
    assert times == work_times(tmp_path)


def test_other_settings_leave_nothing_of_the_old(pile, done, tmp_path):
    """Stricter and back again: shards of one never pass for those of the other."""
    source = f"folder:{pile[0]}/pile"
    loose = overrides(pile[0])
    strict = [*loose, "quality.min_sharpness=60%"]
    for chosen in (strict, loose, strict):
        run(source, tmp_path, chosen)
        if chosen is loose:
            assert results(tmp_path) == results(done)
        else:
            assert len(list((tmp_path / "shards").glob("*.tar"))) == 2


def test_one_run_at_a_time(pile, tmp_path, monkeypatch):
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(1, flush=True); "
    holder += "time.sleep(60)"
    command = [sys.executable, "-c", holder, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        monkeypatch.setattr(sys, "argv", ["curation", "run", f"folder:{pile[0]}/pile", str(tmp_path)])
        with pytest.raises(UserError, match="in use"):
            main()
        other.kill()
    main()
    assert (tmp_path / "manifest.jsonl").exists()
