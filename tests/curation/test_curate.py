"""Curation from end to end: planted images are found, and runs killed at any time write the same bytes."""

import csv
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings
from PIL import ExifTags, Image, ImageFilter

import config
from config import UserError
from curation import dedup, embed, ingest, page, quality
from curation.__main__ import curate, main
from curation.manifest import REASONS, Curation
from curation.pieces import list_entries, split_source
from curation.quality import threshold
from curation.settings import levels_of, load
from curation.vectors import unit_rows
from curation.write import write
from decode import BadImage, Reading, decode_image
from model import VisionTransformer
from scenes import render
from sources import Entry, open_source

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
    num_groups = page.count(" images</figcaption>")
    assert num_groups == 5
    assert page.count("data:image/jpeg;base64,") == num_sheets + num_groups
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
            add_member(tar, "gone.json", b"{}")
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


# ---------------------------------------------------------------- films


def film(folder, num_frames, step):
    """Frames of a camera that looks at 160 of many pixels of a picture, each `step` pixels further."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (5, 16, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((512, 160), Image.BICUBIC), float)
    for i in range(num_frames):
        frame = picture[:, step * i : step * i + 160] + rng.normal(0, 3, (160, 160, 3))
        image = Image.fromarray(frame.clip(0, 255).astype(np.uint8))
        (folder / f"{i:03d}.jpg").write_bytes(jpeg(image, 88))


def bits_apart(one, other):
    """How many bits differ in pHash and in dHash of two rows, the smaller number first."""
    return sorted((int(one[name], 16) ^ int(other[name], 16)).bit_count() for name in ("phash", "dhash"))


ANY_QUALITY = ["quality.min_side=1", "quality.min_sharpness=-1", "quality.min_entropy=-1"]


def test_of_a_slow_pan_every_nth_frame_is_kept(tmp_path):
    """Neighbours are near duplicates all along, and the two ends show nothing in common."""
    film(tmp_path / "pile", 160, 2)
    run(f"folder:{tmp_path}/pile", tmp_path / "out", ANY_QUALITY)
    rows = manifest(tmp_path / "out")
    kept = [i for i, row in enumerate(rows) if row["keep"]]
    assert 12 <= len(kept) <= 60
    assert max(np.diff(kept)) <= 16
    stayed = {rows[i]["sha256"]: rows[i] for i in kept}
    for row in rows:
        if not row["keep"]:
            near, other = bits_apart(row, stayed[row["of"]])
            assert row["why"] == "near duplicate" and near <= 6 and other <= 10
    for i, row in enumerate(stayed.values()):
        for earlier in list(stayed.values())[:i]:
            near, other = bits_apart(row, earlier)
            assert near > 6 or other > 10


def test_of_a_still_camera_one_frame_is_kept_and_the_group_is_told(tmp_path):
    film(tmp_path / "pile", 20, 0)
    done = run(f"folder:{tmp_path}/pile", tmp_path / "out", ANY_QUALITY)
    kept = [row for row in manifest(tmp_path / "out") if row["keep"]]
    assert [row["bytes"] for row in kept] == [done.bytes.max()]
    assert "groups of duplicates by hashes: 1; the largest hold 20 images" in done.notes
    shown = (tmp_path / "out" / "funnel.html").read_text()
    assert "largest groups of duplicates" in shown and "<figcaption>20 images</figcaption>" in shown


# ---------------------------------------------------------------- labels

ANY_IMAGE = ["quality.min_side=1", "quality.min_dark=-1", "quality.max_bright=2", "quality.min_entropy=-1",
             "quality.min_sharpness=-1", "dedup.radius=0", "dedup.other_radius=0"]  # fmt: skip


def noise(seed):
    return png(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)))


def labels_of(uri):
    """SHA-256 of each image of a source -> the name of its class."""
    images = open_source(uri)
    labels = {}
    for i, label in enumerate(images.labels):
        labels[images.read_bytes(i)] = images.classes[label]
    return labels


def check_round_trip(root, classes):
    """Images in folders of these names -> curation -> tar and list -> curation: always the same labels."""
    for number, name in enumerate(classes):
        folder = os.path.join(os.fsencode(root), b"pile", os.fsencode(name))
        os.makedirs(folder)
        with open(os.path.join(folder, b"x.png"), "wb") as file:
            file.write(noise(number))
    source = f"folder:{root}/pile"
    truth = labels_of(source)
    assert set(truth.values()) == set(classes)
    for turn in range(2):
        run(source, root / f"out{turn}", ANY_IMAGE)
        assert labels_of(f"list:{root}/out{turn}/manifest.jsonl") == truth
        source = f"tar:{root}/out{turn}/shards/00000.tar"
        assert labels_of(source) == truth


def test_labels_travel(tmp_path):
    names = [
        "0",
        "1",
        "cat",
        "dog",
        "true",
        "null",
        "NaN",
        "1.5",
        "007",
        "7",
        " x ",
        "x",
        "[",
        '"',
        "caf\udce9",
    ]
    check_round_trip(tmp_path, names)


ANY_NAME = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@hypothesis_settings(max_examples=8, deadline=None, database=None)
@given(
    names=strategies.sets(ANY_NAME.filter(lambda name: not set(name) & {"/", "\0"}), min_size=1, max_size=4)
)
def test_any_labels_travel(tmp_path_factory, names):
    check_round_trip(tmp_path_factory.mktemp("labels"), [name.replace(".", "_") for name in names])


def test_new_labels_of_the_same_files_are_read(tmp_path):
    """Labels are no part of a file: a manifest may change them while size and time stay."""
    (tmp_path / "a.png").write_bytes(noise(0))
    for label in ("cat", "dog"):
        (tmp_path / "m.jsonl").write_text(json.dumps({"path": "a.png", "label": label}))
        run(f"list:{tmp_path}/m.jsonl", tmp_path / "out", ANY_IMAGE)
        assert [row["label"] for row in manifest(tmp_path / "out")] == [label]


# ---------------------------------------------------------------- hostile files


def header(name, size=0, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def write_hostile_tar(path):
    """Labels that are none, names that cannot be, a file that is no image, and headers that lie."""
    contents = [
        ("a.png", noise(0)),
        ("a.json", b"[" * 100_000),
        ("b.png", noise(1)),
        ("b.json", b'{"label": "\\ud800"}'),
        ("c.png", noise(2)),
        ("c.json", b'{"label": 1' + b"0" * 30 + b"}"),
        ("caf\udce9.png", b"no image"),
        ("<b>x.png", noise(3)),
        ("x" * 5000 + ".png", noise(4)),
        ("label_only.cls", b"cat"),
    ]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in contents:
            add_member(tar, name, data)
    first = path.read_bytes()[: tar.offset - 2 * tarfile.BLOCKSIZE]
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        add_member(tar, "last.png", noise(5))
    lies = header("s.png", -2048) + header("g.png", 0, tarfile.GNUTYPE_SPARSE)
    path.write_bytes(first + lies + path.read_bytes())


def test_a_hostile_shard_costs_itself_alone(tmp_path, monkeypatch, capsys):
    pile = tmp_path / "caf\udce9"
    pile.mkdir()
    write_hostile_tar(pile / "00000.tar")
    (pile / "00001.tar").write_bytes(b"no tar at all" * 100)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["curation", "run", f"tar:{pile}", str(out), *ANY_IMAGE])
    main()
    printed = capsys.readouterr().out
    rows = {}
    for row in manifest(out):
        name = row["key"] if "key" in row else Path(row["path"]).name
        rows[name] = row
    why = {name: row["why"] for name, row in rows.items()}
    lost = dict.fromkeys(["caf\udce9", "label_only", "00000.tar", "00001.tar"], "unreadable")
    assert {name: reason for name, reason in why.items() if reason != "kept"} == lost
    assert why.keys() - lost == {"a", "b", "c", "<b>x", "last"}
    assert rows["c"]["label"] == "1" + "0" * 30
    assert "a.json" in rows["00000.tar"]["detail"]
    assert "not a readable tar" in rows["00001.tar"]["detail"]
    notes = json.loads((out / "funnel.json").read_text())["notes"]
    assert "caf\\udce9/00000.tar: " in printed
    for text in (printed, notes[0], (out / "funnel.html").read_text()):
        assert "2 shards are damaged" in text
        assert "a.json" in text
        assert "00001.tar is not a readable tar" in text


def test_a_member_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(header("a.png", 600 << 20))
    os.truncate(path, (600 << 20) + 3 * tarfile.BLOCKSIZE)
    entries, damage = list_entries(str(path))
    row = ingest.examine(entries[0])
    assert "the limit is" in row["detail"] + damage


def test_a_folder_of_shards_may_have_any_name(tmp_path):
    folder = tmp_path / "part[1]"
    folder.mkdir()
    (folder / "0.tar").write_bytes(b"")
    for path in (folder, folder / "0.tar"):
        assert split_source(f"tar:{path}", 1) == [f"{folder}/0.tar"]


def test_unreadable_evaluation_images_are_told(tmp_path):
    """What cannot be read cannot be searched for: nobody must believe that it was."""
    for name in ("pile", "evaluation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(noise(len(name)))
    (tmp_path / "evaluation" / "b.png").write_bytes(b"no image")
    chosen = [*ANY_IMAGE, f"dedup.evaluation=folder:{tmp_path}/evaluation"]
    done = run(f"folder:{tmp_path}/pile", tmp_path / "out", chosen)
    assert done.notes[0].startswith("1 evaluation images are unreadable")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_what_is_no_image_file_has_its_reason(tmp_path):
    """A pipe and a device never end, a sparse file of 100 GB fills the memory; a name is bytes."""
    pile = tmp_path / "pile"
    pile.mkdir()
    os.mkfifo(pile / "pipe.png")
    (pile / "zero.png").symlink_to("/dev/zero")
    with open(pile / "sparse.png", "wb") as file:
        file.truncate(100 << 30)
    (pile / "good.png").write_bytes(noise(0))
    with open(os.fsencode(pile) + b"/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    (pile / "later.png").write_bytes(noise(1))
    run(f"folder:{pile}", tmp_path / "out", ANY_IMAGE)
    details = {Path(row["path"]).stem: row.get("detail", "") for row in manifest(tmp_path / "out")}
    assert details.pop("good") == details.pop("later") == ""
    assert "no regular file" in details.pop("pipe")
    assert "no regular file" in details.pop("zero")
    assert "107,374,182,400 bytes" in details.pop("sparse")
    assert "no known format" in details.pop("caf\udce9")
    assert not details
    assert "caf\\udce9.png: no known format" in (tmp_path / "out" / "funnel.html").read_text()


def test_samples_of_a_list_without_an_image_have_their_row(tmp_path):
    with tarfile.open(tmp_path / "good.tar", "w") as tar:
        add_member(tar, "a.png", noise(0))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    rows = [{"shard": f"{name}.tar", "key": key, "label": "cat"} for name in ("bad", "good") for key in "ab"]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(f"list:{tmp_path}/m.jsonl", tmp_path / "out", [*ANY_IMAGE, "ingest.piece=2"])
    why = {}
    for row in manifest(tmp_path / "out"):
        why[Path(row["shard"]).name, row["key"]] = row["why"]
    assert why.pop(("good.tar", "a")) == "kept"
    assert why == dict.fromkeys([("bad.tar", "a"), ("bad.tar", "b"), ("good.tar", "b")], "unreadable")


@pytest.mark.parametrize("kind", [1, 2, 7], ids=["byte", "text", "bytes"])
def test_an_orientation_of_any_type_is_read(kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 1
    data = jpeg(Image.new("RGB", (40, 20)), exif=exif)
    entry = struct.pack(">HHI", ExifTags.Base.Orientation, 3, 1)  # tag, type and number of values
    if entry not in data:
        entry = struct.pack("<HHI", ExifTags.Base.Orientation, 3, 1)
    assert data.count(entry) == 1
    data = data.replace(entry, entry.replace(b"\3", bytes([kind])))
    assert decode_image(data, "x", ingest.measure)["width"] == 40


def test_results_are_no_source(tmp_path):
    """To curate a curated pile in place would overwrite, and delete, what is being read."""
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.png").write_bytes(noise(0))
    out = tmp_path / "out"
    run(f"folder:{tmp_path}/pile", out, ANY_IMAGE)
    (out / "shards" / "mine.tar").write_bytes(b"")
    before = results(out)
    sources = [f"tar:{out}/shards", f"tar:{out}/shards/00000.tar", f"list:{out}/manifest.jsonl"]
    for source in sources:
        with pytest.raises(UserError, match="would be overwritten"):
            run(source, out, ANY_IMAGE)
    run(f"folder:{tmp_path}/pile", out, ANY_IMAGE)
    assert results(out) == before


# ---------------------------------------------------------------- one image


def test_a_sideways_photo_is_measured_upright(images):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    tall = images[0].crop((0, 0, 160, 224))
    lying = decode_image(jpeg(tall.transpose(Image.ROTATE_90), exif=exif), "x", ingest.measure)
    upright = decode_image(jpeg(tall), "x", ingest.measure)
    assert (lying["width"], lying["height"]) == (160, 224) == (upright["width"], upright["height"])
    assert (int(lying["phash"], 16) ^ int(upright["phash"], 16)).bit_count() <= 4


def test_every_orientation_is_that_of_the_decoder(images):
    """A JPEG lies as it was stored; a TIFF is turned by Pillow as it is loaded, so not twice."""
    tall = images[0].crop((0, 0, 160, 224))
    for value in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = value
        for image_format in ("JPEG", "PNG", "TIFF"):
            buffer = io.BytesIO()
            tall.save(buffer, image_format, exif=exif)
            data = buffer.getvalue()
            row = decode_image(data, "x", ingest.measure)
            upright = decode_image(data, "x")
            assert (row["width"], row["height"]) == upright.size
            expected = decode_image(png(upright), "x", ingest.measure)
            assert (int(row["phash"], 16) ^ int(expected["phash"], 16)).bit_count() <= 4


def test_broken_exif_never_decides_over_pixels(tmp_path):
    """An EXIF segment that ends after 4 bytes, and one with a byte order that does not exist."""
    broken = {7: b"Exif\0\0MM\0*", 8: b"Exif\0\0XX\0*\0\0\0\x08"}
    (tmp_path / "pile").mkdir()
    plain = {}
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        (tmp_path / "pile" / f"{i:02d}.jpg").write_bytes(jpeg(image, exif=broken.get(i, b"")))
        plain[i] = decode_image(jpeg(image), "x", ingest.measure)
    run(f"folder:{tmp_path}/pile", tmp_path / "out", ANY_IMAGE)
    rows = manifest(tmp_path / "out")
    assert [row["why"] for row in rows] == ["kept"] * 30
    for i in broken:
        assert rows[i]["phash"] == plain[i]["phash"]
        assert (rows[i]["width"], rows[i]["height"]) == (32, 48)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "1"])
def test_every_mode_is_measured(images, mode):
    image = images[0].convert("L").convert("I") if mode == "I;16" else images[0]
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    row = decode_image(buffer.getvalue(), "x", ingest.measure, Reading(range=(0, 255)))
    assert row["width"] == 224 and row["entropy"] > 0.5


def test_what_is_far_too_large_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("decode.MAX_PIXELS", 10_000)
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
                                        ("quality.min_dark=200%", "0% to 100%"),
                                        ("dedup.radius=1e9", "from 0 to 16"),
                                        ("features.size=1e15", "from 0 to 4096"),
                                        ("balance.rounds=1e15", "from 0 to 100"),
                                        ("balance.clusters=", "numbers of clusters"),
                                        ("balance.clusters=many", "numbers of clusters"),
                                        ("balance.clusters=10 0", "numbers of clusters"),
                                        ("balance.clusters=10 100", "largest number first"),
                                        ("nothing", "setting")])  # fmt: skip
def test_a_mistyped_setting_is_one_sentence(text, word):
    with pytest.raises(UserError, match=word):
        load(None, [text])


def test_one_level_of_clusters_is_a_number():
    assert levels_of(load(None, ["balance.clusters=100"])) == [100]
    assert levels_of(load(None, ["balance.clusters=90 9"])) == [90, 9]


def run_main(monkeypatch, *arguments):
    """-> the exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["curation", "run", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        config.run(main)
    return end.value.code


def test_arguments_that_cannot_be(tmp_path, monkeypatch, capsys):
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a.png").write_bytes(noise(0))
    source = f"folder:{tmp_path}/pile"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards").write_text("")
    for arguments, words in [([source, "new", "--workers", "-1"], "a whole number, 0 or more"),
                             ([source, ""], "OUT is empty"),
                             ([source, "file"], "take another OUT"),
                             ([source, "file/out"], "take another OUT"),
                             ([source, "x" * 300], "take another OUT"),
                             ([source, "out", *ANY_IMAGE], "take another OUT"),
                             ([source, "out", *ANY_IMAGE, "--workers=1"], "take another OUT")]:  # fmt: skip
        assert run_main(monkeypatch, *arguments) in (1, 2)
        assert words in capsys.readouterr().err
    assert sorted(os.listdir()) == ["file", "out", "pile"]


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
    with pytest.raises(UserError, match="a.jpg has changed"):
        write(done)
    file.unlink()
    with pytest.raises(UserError, match="a.jpg can no longer be read"):
        write(done)


# ---------------------------------------------------------------- features


class MeanColour:
    """Stands in for a backbone: the mean colour of an image, as a direction."""

    width = 3
    key = "colours"

    def __call__(self, images, numbers=None):
        colours = np.zeros((len(images), 3))
        for i in range(len(images)):
            with suppress(BadImage):
                colours[i] = np.asarray(images[i][0], float).mean((0, 1)) - 100
        return unit_rows(torch.from_numpy(colours))


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
    for words, rows in (("no row for", x[1:]), ("must hold rows", x[0, 0])):
        np.savez(tmp_path / "x.npz", cls=rows, paths=names[-len(np.atleast_1d(rows)) :])
        with pytest.raises(UserError, match=words):
            run(source, tmp_path / "z", [f"features.embeddings={tmp_path}/x.npz"])


@pytest.mark.parametrize("value, words", [(np.nan, "nan"), (np.inf, "inf"), (0, "0"), (1e-13, "4e-13")])
def test_an_embedding_without_direction_names_its_image(tmp_path, value, words):
    (tmp_path / "pile").mkdir()
    for i in range(12):
        (tmp_path / "pile" / f"{i:02d}.png").write_bytes(noise(i))
    (tmp_path / "pile" / "03.png").write_bytes(b"no image")  # so nobody needs its features
    source = f"folder:{tmp_path}/pile"
    names = [open_source(source).name(i) for i in range(12)]
    x = np.random.default_rng(0).normal(size=(12, 16))
    x[3] = np.nan
    np.save(tmp_path / "good.npy", np.float16(x))
    done = run(source, tmp_path / "good", [*ANY_IMAGE, f"features.embeddings={tmp_path}/good.npy"])
    assert done.features.shape == (11, 16)
    x[7] = value
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", cls=x[::-1], paths=names[::-1])
    for file, row in (("x.npy", 7), ("x.npz", 4)):
        expected = f"{file} row {row}, of {names[7]}, has length {words}, .* embed this image again"
        with pytest.raises(UserError, match=expected):
            run(source, tmp_path / file[-3:], [*ANY_IMAGE, f"features.embeddings={tmp_path}/{file}"])


def test_embeddings_of_a_shard_are_found_by_its_members(colours, tmp_path):
    run(f"folder:{colours}/pile", tmp_path / "a", [])
    shards = f"tar:{tmp_path}/a/shards/00000.tar"
    images = open_source(shards)
    x = MeanColour()(images)
    names = np.array([images.name(i) for i in range(len(images))])
    np.savez(tmp_path / "x.npz", cls=x[::-1], paths=names[::-1])
    done = run(shards, tmp_path / "b", [f"features.embeddings={tmp_path}/x.npz"])
    assert names[0].endswith(".png") and np.allclose(done.features, x, atol=1e-3)


def test_examples_that_cannot_be_read_teach_nothing(colours, by_colour, tmp_path):
    """They have no features; zeros in their place would be the mean of all directions."""
    for name in ("allow", "block", "seeds"):
        shutil.copytree(colours / name, tmp_path / name)
        (tmp_path / name / "0.png").write_bytes(b"no image")
    ratings = (colours / "ratings.csv").read_text() + "allow/0.png,5\n"
    (tmp_path / "ratings.csv").write_text(ratings)
    done = {}
    for root in (colours, tmp_path):
        chosen = [*by_colour, f"content.allow=folder:{root}/allow", f"content.block=folder:{root}/block",
                  f"content.ratings={root}/ratings.csv", f"balance.seeds=folder:{root}/seeds"]  # fmt: skip
        done[root] = run(f"folder:{colours}/pile", tmp_path / "out" / root.name, chosen)
    assert np.array_equal(done[colours].why, done[tmp_path].why)
    assert "1 more are unreadable" in done[tmp_path].notes[-1]
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "0.png").write_bytes(b"no image")
    for chosen in ([f"content.allow=folder:{tmp_path}/few", f"content.block=folder:{tmp_path}/block"],
                   [f"balance.seeds=folder:{tmp_path}/few"]):  # fmt: skip
        with pytest.raises(UserError, match="few has 0 images that can be read"):
            run(f"folder:{colours}/pile", tmp_path / "z", [*by_colour, *chosen])


HEAD = dict(weight=np.ones(3), bias=np.float32(0), threshold=np.float32(0.5))
BAD_HEADS = [
    ("must be an .npz", {"weight": np.ones(3)}),
    ("must be an .npz", HEAD | {"weight": np.float32(1)}),
    ("must be an .npz", HEAD | {"bias": np.ones(3)}),
    ("must be an .npz", HEAD | {"weight": np.array(["a", "b", "c"])}),
    ("not finite", HEAD | {"weight": np.full(3, np.nan)}),
    ("for 2 features, here are 3", HEAD | {"weight": np.ones(2)}),
]


@pytest.mark.parametrize("words, arrays", BAD_HEADS)
def test_a_bad_head_is_one_sentence(colours, by_colour, tmp_path, words, arrays):
    np.savez(tmp_path / "head.npz", **arrays)
    with pytest.raises(UserError, match=words):
        run(f"folder:{colours}/seeds", tmp_path / "out", [*by_colour, f"content.head={tmp_path}/head.npz"])


def test_a_head_must_be_a_whole_file(colours, by_colour, tmp_path):
    np.savez(tmp_path / "whole.npz", **HEAD)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "whole.npz").unlink()
    np.savez_compressed(tmp_path / "bomb.npz", **HEAD, weights=np.zeros(10_000_000))
    (tmp_path / "cut.npz").write_bytes(content[:-30])
    (tmp_path / "flipped.npz").write_bytes(content.replace(np.ones(3).tobytes(), np.zeros(3).tobytes()))
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "alone.npy", np.ones(3))
    os.mkfifo(tmp_path / "pipe.npz")
    for file in sorted(tmp_path.glob("*.np?")):
        with pytest.raises(UserError, match=f"{file.name} must be an .npz"):
            run(f"folder:{colours}/seeds", tmp_path / "out", [*by_colour, f"content.head={file}"])


def test_embeddings_of_another_pile_are_refused(colours, tmp_path):
    source = f"folder:{colours}/seeds"
    names = [open_source(source).name(i) for i in range(2)]
    np.save(tmp_path / "x.npy", np.eye(3))
    with pytest.raises(UserError, match="3 rows for 2 images: give each image .* a row, or take an .npz"):
        run(source, tmp_path / "out", [f"features.embeddings={tmp_path}/x.npy"])
    for words, paths in (("3 rows for 2 paths, 2 different", names),
                         ("3 rows for 3 paths, 2 different", [*names, names[0]]),
                         ("must hold rows", [1, 2, 3])):  # fmt: skip
        np.savez(tmp_path / "x.npz", cls=np.eye(3), paths=paths)
        with pytest.raises(UserError, match=words):
            run(source, tmp_path / "out", [f"features.embeddings={tmp_path}/x.npz"])
    np.savez(tmp_path / "x.npz", cls=np.eye(2), paths=np.array(list(map(os.fsencode, names))))
    done = run(source, tmp_path / "out", [f"features.embeddings={tmp_path}/x.npz"])
    assert np.array_equal(done.features, np.eye(2))


@pytest.mark.parametrize("rating", ["nan", "inf", "1e308"])
def test_ratings_that_are_no_numbers_are_refused(colours, by_colour, tmp_path, rating):
    lines = (colours / "ratings.csv").read_text().replace("allow/", f"{colours}/allow/")
    (tmp_path / "ratings.csv").write_text(lines.replace(",8", f",{rating}"))
    with pytest.raises(UserError, match="ratings.csv must be"):
        run(
            f"folder:{colours}/pile",
            tmp_path / "out",
            [*by_colour, f"content.ratings={tmp_path}/ratings.csv"],
        )


# ---------------------------------------------------------------- the page


@pytest.fixture
def drawn(tmp_path):
    """A small result of a curation, to be spoilt."""
    (tmp_path / "pile").mkdir()
    for i in range(3):
        (tmp_path / "pile" / f"{i}.png").write_bytes(noise(i))
    (tmp_path / "pile" / "bad.png").write_bytes(b"no image")
    run(f"folder:{tmp_path}/pile", tmp_path / "out", ANY_IMAGE)
    return tmp_path / "out"


def draw_page(monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["page", str(out)])
    page.main()


def test_nothing_of_a_result_is_html(drawn, monkeypatch):
    """Names of stages and reasons, notes, settings, paths, details: files that anyone may have written."""
    mark = "<script>&"
    facts = json.loads((drawn / "funnel.json").read_text())
    name, left, reasons = facts["stages"][0]
    facts["stages"] = [[mark + name, left, {mark + reason: count for reason, count in reasons.items()}]]
    facts["reasons"] = [mark + reason for reason in facts["reasons"]]
    facts["notes"] = [mark, "\udce9\ud800"]
    facts["settings"]["quality"]["min_dark"] = "0.5"
    facts["settings"][mark] = mark
    (drawn / "funnel.json").write_text(json.dumps(facts))
    rows = manifest(drawn)
    for row in rows:
        row["why"] = mark + row["why"]
    more = dict(rows[0], why="unreadable", detail=mark + "\ud800", path=mark)
    facts["reasons"].append("unreadable")
    facts["stages"][-1][2]["unreadable"] = 1
    (drawn / "funnel.json").write_text(json.dumps(facts))
    lines = [json.dumps(row) + "\n" for row in [*rows, more]]
    (drawn / "manifest.jsonl").write_text("".join(lines))
    draw_page(monkeypatch, drawn)
    text = (drawn / "funnel.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;&amp;") >= 8
    assert "\\udce9\\ud800" in text


WRONG = [b"", b"[]", b"null", b"3", b'"text"', b"[" * 100_000, b"{}", b"\xff", b'{"stages": [], "notes": 3}']


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("name", ["funnel.json", "manifest.jsonl"])
def test_a_page_of_wrong_files_is_one_sentence(drawn, monkeypatch, name, content):
    if name == "manifest.jsonl" and not content:
        return  # no rows: a page without sheets
    (drawn / name).write_bytes(content)
    with pytest.raises(UserError, match="run the curation again"):
        draw_page(monkeypatch, drawn)


@pytest.mark.parametrize("change", [dict(why=[1]), dict(cluster="x"), dict(dark="x"), dict(at=None),
                                    dict(at=[-1]), dict(path=None), dict(sha256=3), dict(entropy=[])],
                         ids=str)  # fmt: skip
def test_a_page_of_wrong_rows_is_one_sentence(drawn, monkeypatch, change):
    rows = manifest(drawn)
    rows[0] |= change
    (drawn / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="run the curation again"):
        draw_page(monkeypatch, drawn)


def test_a_page_of_nothing_is_one_sentence(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "funnel.json")
    for out in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="run the curation again"):
            draw_page(monkeypatch, out)


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


def test_a_pile_of_sensors_numbers_has_one_range(tmp_path):
    """Measured once, told in the settings of the funnel; what is read is measured by it."""
    rng = np.random.default_rng(0)
    (tmp_path / "pile").mkdir()
    for k in range(8):
        numbers = np.kron(rng.integers(0, 2000, (16, 16)), np.ones((16, 16))) + 1000
        Image.fromarray(numbers.astype(np.uint16)).save(tmp_path / "pile" / f"{k}.png")
    state = curate(f"folder:{tmp_path}/pile", tmp_path / "out", load(None, ["quality.min_side=0"]), "write")
    low, high = state.reading.range
    assert 0 < low < 1000 and 3000 < high < 4000
    rows = [row for index in range(len(state.pieces)) for row in state.read_rows(index)]
    assert [row.get("why") for row in rows] == [None] * 8
    assert all(row["entropy"] > 5 for row in rows)
    settings = json.loads((tmp_path / "out" / "funnel.json").read_text())["settings"]
    assert settings["ingest"]["range"] == [low, high]
    page.curation_report(tmp_path / "out")
    written = open_source(f"tar:{tmp_path}/out/shards")
    kept = int((state.why == 0).sum())
    assert len(written) == kept > 0 and written[0][0].size == (256, 256)
    wide = load(None, ["ingest.range=[0, 1000000]", "quality.min_side=0"])
    with pytest.raises(UserError, match="'dark': 8"):  # black, as it was told
        curate(f"folder:{tmp_path}/pile", tmp_path / "dark", wide, "quality")


def test_a_pile_of_bands(tmp_path):
    """Eight bands of 16 bits: without a choice nothing can be read, with one all of them; in folders too."""
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "pile").mkdir()
    for k in range(4):
        bands = np.random.default_rng(k).integers(0, 3000, (220, 220, 8)).astype(np.uint16)
        tifffile.imwrite(
            tmp_path / "pile" / f"{k}.tif", bands, photometric="minisblack", planarconfig="contig"
        )
    with pytest.raises(UserError, match="no image is left"):
        curate(f"folder:{tmp_path}/pile", tmp_path / "none", load(None, []), "ingest")
    chosen = load(None, ["ingest.bands=[4,3,2]"])
    state = curate(f"folder:{tmp_path}/pile", tmp_path / "out", chosen, "ingest")
    assert state.reading.bands == (4, 3, 2) and state.reading.range[1] > 3000
    assert not state.why.any() and not state.notes
