"""Curation: hashes as imagehash's, a join without misses, exact sums, restarts; what was planted is found."""

import csv
import io
import json
import os
import re
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
from curation import __main__ as curate
from curation import vectors
from scenes import render
from sources import decode_image, open_source

ROOT = Path(__file__).parents[2]
PIPES = dict(cwd=ROOT, capture_output=True, text=True)


def scene(i, size=224, seed=5):
    return Image.fromarray(render(seed, i, size)[0])


def jpeg(image, quality=92, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def images():
    return [scene(i) for i in range(24)]


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
    put("c0.jpg", jpeg(images[5].filter(ImageFilter.GaussianBlur(6))), "blurred")
    put("c1.jpg", jpeg(images[6].resize((120, 120))), "small")
    put("c2.jpg", jpeg(images[7].crop((0, 0, 224, 60)).resize((900, 220))), "long")
    put("c3.png", png(Image.new("RGB", (224, 224), (120, 130, 140))), "flat")
    put("c4.jpg", jpeg(images[8].point(lambda v: v // 8)), "dark")
    put("c5.jpg", jpeg(images[9].point(lambda v: 250 + v // 64)), "bright")
    put("d0.jpg", files[10][: len(files[10]) // 2], "unreadable")
    put("d1.jpg", b"<html>404</html>", "unreadable")
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for i, pixels in enumerate(noise):
        put(f"n{i}.png", png(Image.fromarray(pixels)), folder="block")
    put("e20.png", png(images[20]), folder="evaluation")
    put("e21.jpg", jpeg(images[21].resize((300, 300), Image.BICUBIC)), folder="evaluation")
    return truth


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def pile(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("pile")
    return root, build(root, images)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A teacher.pth of a small random network, its LayerScale open, so that features differ."""
    from model import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(32, 2, 2, patch_size=8, img_size=32, num_register_tokens=2, init_std=0.1)
    for name, p in net.named_parameters():
        if name.endswith("gamma"):
            p.data.fill_(1.0)
    file = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save({"teacher": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, file)
    return file


def settings(root, *more):
    return [f"dedup.evaluation=folder:{root}/evaluation", "ingest.piece=8", "write.images=10", *more]


def run(source, out, chosen, stage="run", workers=0):
    """curate.py's main, in this process -> its manifest's rows by name of file."""
    pile = curate.Pile(source, out, curate.load(None, chosen), workers)
    for name, step in curate.STAGES.items():
        step(pile)
        if name == stage:
            break
    return pile


def manifest(out):
    return [json.loads(line) for line in (Path(out) / "manifest.jsonl").read_text().splitlines()]


def reasons(out):
    return {Path(row["path"]).name: row["why"] for row in manifest(out)}


def result(out):
    """All that a run leaves for its user: {path: bytes}."""
    files = [p for p in Path(out).rglob("*") if p.is_file() and "work" not in p.parts and p.name != "lock"]
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


# ---------------------------------------------------------------- what was planted is found


@pytest.fixture(scope="session")
def done(pile, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run(f"folder:{pile[0]}/pile", out, settings(pile[0]))
    return out


def test_every_planted_image_gets_its_reason(pile, done):
    assert reasons(done) == pile[1]


def test_a_duplicate_names_the_one_that_stayed(pile, done):
    rows = {Path(row["path"]).name: row for row in manifest(done)}
    for name, twin in ("b00", "a00"), ("b01", "a01"), ("b04", "a04"):
        assert rows[f"{name}.jpg"]["of"] == rows[f"{twin}.jpg"]["sha256"] and rows[f"{twin}.jpg"]["keep"]


def test_no_pixel_is_changed_and_the_shards_are_read_back(pile, done):
    before = sorted(p.name for p in (pile[0] / "pile").iterdir())
    kept = [row for row in manifest(done) if row["keep"]]
    assert before == sorted(pile[1]) and len(kept) == 22
    data = open_source(f"tar:{done}/shards/{{00000..00002}}.tar")
    assert len(data) == len(kept)
    for i in (0, 9, 10, 21):
        assert data[i][0].tobytes() == decode_image(kept[i]["path"], "").tobytes()
    assert len(open_source(f"list:{done}/manifest.jsonl")) == len(kept)


def test_webdataset_reads_the_shards(done):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, (done / "shards").glob("*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    kept = [row for row in manifest(done) if row["keep"]]
    assert [s["json"]["sha256"] for s in samples] == [row["sha256"] for row in kept]
    assert samples[0]["jpg"].size == (224, 224)


def test_the_funnel_shows_each_reason_and_nothing_from_outside(pile, done):
    page = (done / "funnel.html").read_text()
    for reason in set(pile[1].values()):
        assert f"<h3>{reason}</h3>" in page
    assert (
        page.count("data:image/jpeg;base64,") == len(set(pile[1].values())) - 1
    )  # unreadable ones are listed
    assert "404" in page and "<svg" in page
    for outside in ("http://", "https://", 'src="/', "<script"):
        assert outside not in page


def test_shards_give_the_same_as_files(pile, done, tmp_path):
    """The pile as img2dataset would leave it: key.jpg, key.json, key.txt; and failures without an image."""
    for part in (0, 1):
        with tarfile.open(tmp_path / f"{part:05d}.tar", "w") as tar:
            for i, path in enumerate(sorted((pile[0] / "pile").iterdir())):
                if i % 2 == part:
                    for extension, data in (path.suffix, path.read_bytes()), (".json", b"{}"), (".txt", b"a"):
                        member = tarfile.TarInfo(f"{path.stem}{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            tar.addfile(tarfile.TarInfo("gone.json"))
    (tmp_path / "00002.tar").write_bytes(b"no tar at all" * 100)
    run(f"tar:{tmp_path}/{{00000..00002}}.tar", tmp_path / "out", settings(pile[0]))
    rows = manifest(tmp_path / "out")
    why = {row["key"] if "key" in row else Path(row["path"]).name: row["why"] for row in rows}
    assert why.pop("gone") == "unreadable" and why.pop("00002.tar") == "unreadable"
    assert why == {Path(name).stem: reason for name, reason in pile[1].items()}
    assert len(open_source(f"list:{tmp_path}/out/manifest.jsonl")) == 22


def test_labels_travel(tmp_path, images):
    for name in ("cat", "dog"):
        (tmp_path / "pile" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "pile" / name / f"{i}.jpg").write_bytes(jpeg(images[i + 3 * (name == "dog")]))
    run(f"folder:{tmp_path}/pile", tmp_path / "out", [])
    data = open_source(f"tar:{tmp_path}/out/shards/00000.tar")
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_sideways_photo_is_measured_upright(images):
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = images[0].crop((0, 0, 160, 224))
    lying = decode_image(jpeg(tall.transpose(Image.ROTATE_90), exif=exif), "x", curate.measure)
    upright = decode_image(jpeg(tall), "x", curate.measure)
    assert (lying["width"], lying["height"]) == (160, 224) == (upright["width"], upright["height"])
    assert (int(lying["phash"], 16) ^ int(upright["phash"], 16)).bit_count() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_mode_is_measured(images, mode):
    buffer, image = io.BytesIO(), images[0].convert("L").convert("I") if mode == "I;16" else images[0]
    image.convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    row = decode_image(buffer.getvalue(), "x", curate.measure)
    assert row["width"] == 224 and row["entropy"] > 0.5


def test_what_is_far_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    import data

    monkeypatch.setattr(data, "MAX_PIXELS", 10_000)
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "bomb.png").write_bytes(png(Image.new("L", (101, 100))))
    row = curate.examine(str(tmp_path / "pile" / "bomb.png"), None, -1, 0)
    assert row["why"] == "unreadable" and "101 x 100" in row["detail"]


# ---------------------------------------------------------------- settings


def test_thresholds_may_be_percentiles(pile, tmp_path):
    done = run(f"folder:{pile[0]}/pile", tmp_path, ["quality.min_sharpness=50%"], "quality")
    assert (done.why == curate.REASONS.index("blurred")).sum() >= 10
    assert curate.limit("25%", np.arange(101)) == 25 and curate.limit(3, None) == 3


@pytest.mark.parametrize("text,word", [("quality.min_sid=3", "min_side"), ("quality.min_side=x", "whole"),
                                       ("quality.min_entropy=2%%", "percentile"),
                                       ("nothing", "setting")])  # fmt: skip
def test_a_mistyped_setting_is_one_sentence(text, word):
    with pytest.raises(UserError, match=word):
        curate.load(None, [text])


def test_the_example_config_loads():
    for file in (ROOT / "configs" / "curation").glob("*.yaml"):
        assert vars(curate.load(file))


@pytest.mark.parametrize(
    "source,word", [("scenes:10", "no pile of files"), ("tar:/nowhere/*.tar", "no shard")]
)
def test_what_is_no_pile_is_refused(source, word, tmp_path):
    with pytest.raises(UserError, match=word):
        curate.Pile(source, tmp_path, curate.load())


def test_balance_without_features_says_what_to_do(pile, tmp_path):
    with pytest.raises(UserError, match="features.weights"):
        run(f"folder:{pile[0]}/pile", tmp_path, ["balance.target=3"])


def test_a_file_that_changed_after_ingest_is_refused(tmp_path, images):
    (tmp_path / "pile").mkdir()
    file = tmp_path / "pile" / "a.jpg"
    file.write_bytes(jpeg(images[0]))
    done = run(f"folder:{tmp_path}/pile", tmp_path / "out", [], "balance")
    file.write_bytes(jpeg(images[1]))
    with pytest.raises(UserError, match="changed"):
        curate.write(done)


# ---------------------------------------------------------------- hashes and their join


def test_hashes_are_imagehash_s_bit_for_bit(images):
    imagehash = pytest.importorskip("imagehash")
    rng = np.random.default_rng(0)
    for i in range(300):
        grey = images[i % 24].convert("L")
        x, y, s = *rng.integers(0, 60, 2).tolist(), int(rng.integers(40, 160))
        grey = grey.crop((x, y, x + s, y + s)).rotate(90 * (i % 4))
        assert f"{curate.phash(grey):016x}" == str(imagehash.phash(grey))
        assert f"{curate.dhash(grey):016x}" == str(imagehash.dhash(grey))


@pytest.mark.parametrize("radius", [0, 1, 3, 4, 7])
def test_the_join_finds_what_brute_force_finds(radius):
    rng = np.random.default_rng(radius)
    centres = rng.integers(0, 2**64, 60, dtype=np.uint64)
    hashes = [c ^ np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, n, replace=False).astype(np.uint64))
              for c in centres for n in rng.integers(1, 7, 12)]  # fmt: skip
    # The worst case: the differing bits are spread over the bands as evenly as can be.
    spread = [sum(1 << (64 * k // (radius + 2)) for k in range(n)) for n in range(1, radius + 2)]
    hashes = np.array([*hashes, *centres, *(centres[0] ^ np.uint64(s) for s in spread)], np.uint64)
    found = {tuple(sorted(pair)) for pairs in curate.join(hashes, radius) for pair in pairs.tolist()}
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = {(i, j) for i, j in zip(*np.nonzero(distance <= radius)) if i < j}
    assert found == expected and len(expected) > (20 if radius else -1)


def test_components_hang_together_in_any_order():
    pairs = [(7, 3), (3, 5), (1, 2), (9, 7)]
    for order in (pairs, pairs[::-1]):
        assert vectors.components(10, order).tolist() == [0, 1, 1, 3, 4, 3, 6, 3, 8, 3]


# ---------------------------------------------------------------- features


def clouds(rng, sizes, width=16, spread=0.15):
    """Unit vectors around len(sizes) random directions, half precision -> x (n, width), group (n,)."""
    centres, group = rng.normal(size=(len(sizes), width)), np.repeat(np.arange(len(sizes)), sizes)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    x = torch.from_numpy(centres[group] + rng.normal(size=(len(group), width)) * spread)
    order = rng.permutation(len(group))
    return vectors.unit(x)[order], group[order]


def test_sums_of_half_precision_are_exact_in_any_order():
    x, _ = clouds(np.random.default_rng(0), [5000])
    rows = torch.from_numpy(x).double()
    once, again = rows.sum(0), rows[torch.randperm(len(x))].sum(0)
    assert torch.equal(once, again)
    whole = [sum(int(v * 2**24) for v in column) for column in x.astype(float).T]
    assert [int(v * 2**24) for v in once.tolist()] == whole
    assert not torch.equal(rows.float().sum(0).double(), once)  # float32 would not do


def test_kmeans_finds_the_clouds_and_nearest_is_brute_force():
    x, group = clouds(np.random.default_rng(1), [400] * 6)
    bank, index = vectors.kmeans(x, 6)
    for g in range(6):
        assert np.bincount(index[group == g]).max() > 0.97 * 400
    cosine, near = vectors.nearest(x[:50], x, 3)
    full = x[:50].astype(np.float64) @ x.T.astype(np.float64)
    assert np.allclose(cosine, np.sort(full, 1)[:, :-4:-1]) and (near[:, 0] == np.arange(50)).all()


def test_nearest_over_several_blocks(monkeypatch):
    x, _ = clouds(np.random.default_rng(1), [40] * 6)
    once = vectors.nearest(x, x, 5)
    monkeypatch.setattr(vectors, "BANK", 37)
    monkeypatch.setattr(vectors, "BLOCK", 13)
    assert np.allclose(once[0], vectors.nearest(x, x, 5)[0])


def test_resampling_spreads_centroids_over_rare_groups():
    """A crowd of 4,000 and seven groups of 40: with resampling more centroids go to the rare ones."""
    x, group = clouds(np.random.default_rng(2), [4000] + [40] * 7, spread=0.25)

    def inside_crowd(rounds):
        bank, index = vectors.kmeans(x, 24, rounds=rounds)
        return sum(
            np.bincount(group[index == c], minlength=8).argmax() == 0 for c in range(24) if (index == c).any()
        )

    assert inside_crowd(4) < inside_crowd(0)


@pytest.mark.skipif(vectors.faiss is None, reason="faiss is an extra")
def test_faiss_finds_nearly_the_same():
    x, _ = clouds(np.random.default_rng(3), [300] * 8)
    exact = vectors.nearest(x[:100], x, 4)[1]
    found = vectors.faiss_search(x)(x[:100], 4)[1].numpy()
    assert np.mean([len(set(a) & set(b)) / 4 for a, b in zip(exact, found)]) > 0.9


def test_near_duplicates_of_features_are_found_and_others_are_not(monkeypatch):
    monkeypatch.setattr(vectors, "PARTITION", 100)
    rng = np.random.default_rng(4)
    x, _ = clouds(rng, [30] * 40, width=64, spread=1.0)
    twins = vectors.unit(torch.from_numpy(x[:100].astype(np.float64) + rng.normal(size=(100, 64)) * 0.01))
    both, side = np.concatenate([x, twins]), np.zeros(len(x) + 100, bool)
    roots = vectors.families(both, side, 0.97, 2.0)
    assert (roots[len(x) :] == np.arange(100)).mean() >= 0.98  # a border of partitions may cost one
    assert (roots[: len(x)] == np.arange(len(x))).all()
    side[len(x) :] = True  # of the evaluation set: a lower bar, for pairs across only
    assert (vectors.families(both, side, 2.0, 0.97)[len(x) :] == np.arange(100)).mean() >= 0.98
    assert (vectors.families(both, np.ones(len(both), bool), 2.0, 0.97) == np.arange(len(both))).all()


def test_water_filling():
    assert vectors.fill([5, 100, 1], 30).tolist() == [5, 24, 1]
    assert vectors.fill([5, 100, 1], 1000).tolist() == [5, 100, 1]
    assert vectors.fill([10, 10, 10], 11).sum() == 11
    domain, cluster = np.repeat([0, 1, 2], [800, 150, 50]), np.arange(1000) % 50
    cluster = cluster + 50 * domain
    kept = vectors.pour([domain, cluster], np.random.default_rng(0).permutation(1000), 150)
    assert np.bincount(domain[kept]).tolist() == [50, 50, 50] and len(set(kept)) == 150
    assert np.bincount(cluster[kept][domain[kept] == 0]).max() == 1
    assert vectors.entropy(domain[kept]) == pytest.approx(1) and vectors.entropy(domain) < 0.7


def test_linear_heads_are_scikit_learn_s():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(300, 8)) * rng.uniform(0.1, 5, 8)
    y = (x @ rng.normal(size=8) / 5 + rng.logistic(size=300) > 0.3).astype(float)
    weight, bias = vectors.fit(x, y, logistic=True)
    theirs = linear_model.LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000)
    theirs.fit((x - x.mean(0)) / x.std(0), y)
    assert np.allclose(weight * x.std(0), theirs.coef_[0], atol=1e-3)
    assert np.allclose(bias + x.mean(0) @ weight, theirs.intercept_, atol=1e-3)
    weight, bias = vectors.fit(x, y, logistic=False)
    ridge = linear_model.Ridge(alpha=10).fit((x - x.mean(0)) / x.std(0), y)
    assert np.allclose(weight * x.std(0), ridge.coef_, atol=1e-4)


def test_scores_are_held_out():
    """Noise cannot be learned: a head that had seen its examples would seem to know them."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(60, 40)), np.repeat([0.0, 1.0], 30)
    p = vectors.held_out(x, y, logistic=True)
    assert abs(((p > 0.5) == y).mean() - 0.5) < 0.2
    weight, bias = vectors.fit(x, y, logistic=True)
    assert (((x @ weight + bias) > 0) == y).mean() > 0.8


class Known:
    """Stands in for a backbone: the mean colour of an image, as a direction."""

    width, mark = 3, "colours"

    def __call__(self, images, numbers=None):
        x = np.array([np.asarray(images[i][0], float).mean((0, 1)) for i in range(len(images))])
        return vectors.unit(torch.from_numpy(x - 100))


def coloured(folder, count, tint, rng):
    """Sharp noise whose mean colour is `tint`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        x = np.clip(rng.normal(np.array(tint) + rng.normal(0, 8, 3), 60, (208, 208, 3)), 0, 255)
        Image.fromarray(x.astype(np.uint8)).save(folder / f"{'-'.join(map(str, tint))}-{i:02d}.png")


RED, GREEN, BLUE = (170, 80, 80), (80, 170, 80), (80, 80, 170)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(7)
    for tint, count in (RED, 30), (GREEN, 8), (BLUE, 6):
        coloured(root / "pile", count, tint, rng)
    coloured(root / "allow", 15, RED, rng)
    coloured(root / "allow", 15, GREEN, rng)
    coloured(root / "block", 20, BLUE, rng)
    coloured(root / "seeds", 2, GREEN, rng)
    with open(root / "ratings.csv", "w", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(["path", "rating"])
        for path in sorted((root / "allow").iterdir()):
            lines.writerow([f"allow/{path.name}", 8 if path.name.startswith("80-170") else 2])
    return root


@pytest.fixture
def eye(monkeypatch):
    monkeypatch.setattr(vectors, "Eye", lambda f: Known())
    return ["features.weights=known"]


def colours_kept(out):
    return [Path(row["path"]).name.rpartition("-")[0] for row in manifest(out) if row["keep"]]


def test_content_filter_from_two_folders(colours, eye, tmp_path):
    chosen = [*eye, f"content.allow=folder:{colours}/allow", f"content.block=folder:{colours}/block"]
    done = run(f"folder:{colours}/pile", tmp_path / "a", chosen)
    assert set(colours_kept(tmp_path / "a")) == {"170-80-80", "80-170-80"}
    assert (done.why == curate.REASONS.index("blocked")).sum() == 6
    assert "precision 1.000, recall 1.000" in (tmp_path / "a" / "funnel.html").read_text()
    run(f"folder:{colours}/pile", tmp_path / "b", [*eye, f"content.head={tmp_path}/a/heads/blocked.npz"])
    assert colours_kept(tmp_path / "b") == colours_kept(tmp_path / "a")


def test_aesthetics_from_ratings(colours, eye, tmp_path):
    chosen = [*eye, f"content.ratings={colours}/ratings.csv", "content.min_aesthetics=5"]
    run(f"folder:{colours}/pile", tmp_path, chosen)
    assert "80-170-80" in colours_kept(tmp_path) and "170-80-80" not in colours_kept(tmp_path)


def test_new_examples_are_looked_at(colours, eye, tmp_path):
    """A stage also depends on the files that its settings name."""
    ratings = tmp_path / "ratings.csv"
    lines = (colours / "ratings.csv").read_text().replace("allow/", f"{colours}/allow/")
    ratings.write_text(lines)
    chosen = [*eye, f"content.ratings={ratings}", "content.min_aesthetics=5"]
    run(f"folder:{colours}/pile", tmp_path / "out", chosen)
    before = colours_kept(tmp_path / "out")
    ratings.write_text(lines.replace(",8", ",1"))
    run(f"folder:{colours}/pile", tmp_path / "out", [*chosen[:-1], "content.min_aesthetics=1.5"])
    assert before and colours_kept(tmp_path / "out") != before


def test_balance_evens_the_domains(colours, eye, tmp_path):
    done = run(f"folder:{colours}/pile", tmp_path, [*eye, "balance.target=18", "balance.clusters=9 3"])
    kept = colours_kept(tmp_path)
    assert sorted(kept.count(c) for c in set(kept)) == [6, 6, 6]
    assert "after" in done.notes[-1] and {row["domain"] for row in manifest(tmp_path)} == {0, 1, 2}


def test_retrieval_keeps_neighbours_of_the_seeds(colours, eye, tmp_path):
    run(f"folder:{colours}/pile", tmp_path, [*eye, f"balance.seeds=folder:{colours}/seeds", "balance.k=4"])
    assert set(colours_kept(tmp_path)) == {"80-170-80"} and 4 <= len(colours_kept(tmp_path)) <= 8


def test_embeddings_made_elsewhere(colours, tmp_path):
    images = open_source(f"folder:{colours}/pile")
    x, names = Known()(images), [images.name(i) for i in range(len(images))]
    np.save(tmp_path / "x.npy", x)
    order = np.random.default_rng(0).permutation(len(x))
    np.savez(tmp_path / "x.npz", cls=x[order], paths=np.array(names)[order])
    for file in ("x.npy", "x.npz"):
        done = run(f"folder:{colours}/pile", tmp_path / file[-3:], [f"features.embeddings={tmp_path}/{file}"])
        assert np.allclose(done.x, x, atol=1e-3)
    broken = x.copy()
    broken[3] = np.nan
    for word, rows in ("no row for", x[1:]), ("not finite", broken), ("must hold rows", x[0, 0]):
        np.savez(tmp_path / "x.npz", cls=rows, paths=np.array(names)[-len(np.atleast_1d(rows)) :])
        with pytest.raises(UserError, match=word):
            run(f"folder:{colours}/pile", tmp_path / "z", [f"features.embeddings={tmp_path}/x.npz"])


def test_embeddings_of_a_shard_are_found_by_its_members(colours, tmp_path):
    run(f"folder:{colours}/pile", tmp_path / "a", [])
    shards = f"tar:{tmp_path}/a/shards/00000.tar"
    images = open_source(shards)
    x, names = Known()(images), [images.name(i) for i in range(len(images))]
    np.savez(tmp_path / "x.npz", cls=x[::-1], paths=np.array(names)[::-1])
    done = run(shards, tmp_path / "b", [f"features.embeddings={tmp_path}/x.npz"])
    assert names[0].endswith(".png") and np.allclose(done.x, x, atol=1e-3)


# ---------------------------------------------------------------- restarts, processes


def everything(root, weights):
    """Settings under which every stage has something to do."""
    return settings(root, f"features.weights={weights}", "features.size=32", "similar.min_cosine=0.97",
                    "similar.leak_cosine=0.96", "balance.target=15", "balance.clusters=6 2",
                    f"content.allow=folder:{root}/pile", f"content.block=folder:{root}/block",
                    "content.recall=0.8")  # fmt: skip


@pytest.fixture(scope="module")
def whole(pile, weights, tmp_path_factory):
    """The result of one process that nobody disturbs: {path: bytes}."""
    out = tmp_path_factory.mktemp("whole")
    done = run(f"folder:{pile[0]}/pile", out, everything(pile[0], weights))
    assert [name for name, *_ in done.stages] == [
        "ingest",
        "quality",
        "hashes",
        "similar",
        "content",
        "balance",
    ]
    files = result(out)
    assert {"manifest.jsonl", "funnel.html", "shards/00000.tar", "shards/00001.tar"} <= set(files)
    return files


def test_workers_change_nothing(pile, weights, whole, tmp_path):
    run(f"folder:{pile[0]}/pile", tmp_path, everything(pile[0], weights), workers=2)
    assert result(tmp_path) == whole


def test_two_processes_are_one(pile, weights, whole, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "curate.py", "run", f"folder:{pile[0]}/pile", str(tmp_path)]
    command += everything(pile[0], weights)
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **PIPES)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path) == whole and done.stdout.count("quality ") == 1


# One process imports everything, then forks a child for each life; a child dies at its n-th finished file.
LIVES = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from curation import __main__ as curate
source, out, points, *settings = sys.argv[1:]
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
    pile = curate.Pile(source, out, curate.load(None, settings))
    for stage in curate.STAGES.values():
        stage(pile)
for point in [*map(int, points.split()), 0]:
    if not (pid := os.fork()):
        live(point)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]))
"""


def killed(pile, weights, out, points):
    """Runs that die at the given files (negative: just after its name appears), then one that lives."""
    command = [sys.executable, "-c", LIVES, f"folder:{pile[0]}/pile", str(out), " ".join(map(str, points)),
               *everything(pile[0], weights)]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **PIPES)
    signals = [int(line) for line in done.stdout.split() if line.isdigit()]
    assert signals == [signal.SIGKILL] * len(points) + [0], done.stderr


def test_killed_at_three_points(pile, weights, whole, tmp_path):
    """In the middle of ingest, among the features, and between two shards."""
    killed(pile, weights, tmp_path, [3, -9, 9])
    assert result(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_ten_points(pile, weights, whole, tmp_path, seed):
    rng = np.random.default_rng(seed)
    killed(pile, weights, tmp_path, (rng.integers(1, 4, 10) * rng.choice([-1, 1], 10)).tolist())
    assert result(tmp_path) == whole


@pytest.mark.slow
def test_killed_at_ten_moments(pile, weights, whole, tmp_path):
    """The real command with its workers, all killed when some number of files is there; then run again."""
    rng, kills = np.random.default_rng(0), 0
    for i, count in enumerate(rng.permutation(np.arange(1, 20, 2))):
        out = tmp_path / str(i)
        command = [sys.executable, "curate.py", "run", f"folder:{pile[0]}/pile", str(out), "--workers", "2"]
        command += everything(pile[0], weights)
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        while process.poll() is None and sum(p.is_file() for p in out.rglob("*")) <= count:
            time.sleep(rng.uniform(0, 0.01))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        subprocess.run(command, cwd=ROOT, check=True)
        assert result(out) == whole
    assert kills >= 8


def test_what_is_done_is_not_done_again(pile, tmp_path, monkeypatch):
    source, chosen = f"folder:{pile[0]}/pile", settings(pile[0])
    run(source, tmp_path, chosen)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}
    monkeypatch.setattr(curate, "examine", None)  # nothing is measured twice
    monkeypatch.setattr(curate, "judge_hashes", None)
    run(source, tmp_path, chosen)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*") if p.is_file()}


def test_other_settings_leave_nothing_of_the_old(pile, done, tmp_path):
    """Stricter and back again: shards of one never pass for those of the other."""
    source, chosen = f"folder:{pile[0]}/pile", settings(pile[0])
    run(source, tmp_path, [*chosen, "quality.min_sharpness=60%"])
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    run(source, tmp_path, chosen)
    assert result(tmp_path) == result(done)
    run(source, tmp_path, [*chosen, "quality.min_sharpness=60%"])
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2


def test_one_run_at_a_time(pile, tmp_path, monkeypatch):
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print(1, flush=True); "
    holder += "time.sleep(60)"
    command = [sys.executable, "-c", holder, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        monkeypatch.setattr(sys, "argv", ["curate.py", "run", f"folder:{pile[0]}/pile", str(tmp_path)])
        with pytest.raises(UserError, match="in use"):
            curate.main()
        other.kill()
    curate.main()
    assert (tmp_path / "manifest.jsonl").exists()


# ---------------------------------------------------------------- results/curation.py


@pytest.fixture(scope="module")
def curation():
    sys.path.insert(0, str(ROOT / "results"))
    import curation

    return curation


def test_planted_truth_in_small(curation, tmp_path, monkeypatch, capsys):
    """The experiment of the README on 100 images: whatever may be found, is found; and the score can fall."""
    command = [
        "curation.py",
        "truth",
        str(tmp_path),
        "--images",
        "100",
        "--json",
        str(tmp_path / "result.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    curation.main()
    tables = json.loads((tmp_path / "result.json").read_text())["tables"]
    assert tables["quality"]["all"]["recall"] == 1 and tables["leaks"]["all"]["precision"] == 1
    copies = {name: row for name, row in tables["duplicates"].items() if "recall" in row}
    assert len(copies) >= 4
    assert all(row["recall"] == 1 for name, row in copies.items() if name.split(",")[0] in curation.COPIES)
    planted = curation.plant(tmp_path / "1-100", 1, 100, {}, 1)
    nothing = [dict(path=line["path"], why="kept", keep=True, sha256=line["path"]) for line in planted]
    tables, _ = curation.score(planted, nothing, {})
    assert tables["quality"]["all"]["recall"] == tables["leaks"]["exact"]["recall"] == 0


def test_near_in_small(curation, monkeypatch, capsys):
    """No copy is missed within 6 bits of eight scenes, some within none, and no two scenes are alike."""
    monkeypatch.setattr(sys, "argv", ["curation.py", "near", "--images", "8"])
    curation.main()
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if "radius" in line}
    missed = {radius: [int(x) for x in re.findall(r"missed (\d+)", line)] for radius, line in lines.items()}
    assert sum(missed["radius 6"]) == 0 < sum(missed["radius 0"])
    assert all(line.endswith("false pairs 0") for line in lines.values())


def test_speed_in_small(curation, monkeypatch, capsys):
    pytest.importorskip("imagehash")
    small = ["--files", "4", "--hashes", "20000", "--vectors", "2000", "--centroids", "10"]
    monkeypatch.setattr(
        sys, "argv", ["curation.py", "speed", "--parts", "scoring,drift,join,vectors", *small]
    )
    curation.main()
    said = capsys.readouterr().out
    assert "ratio" in said and "found of the twins 1" in said and "recall of its 1 % 1" in said
