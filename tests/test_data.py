"""Sources, decoding, sampler and loader: bad input of every kind, the same data however it is computed."""

import contextlib
import io
import itertools
import json
import os
import signal
import tarfile
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
from helpers import fake_png
from PIL import Image

import config
import data
import sources
from config import UserError
from data import MultiCropDataset, make_loader, permuted_index
from decode import BadImage, Reading, decode_image, to_tensor
from sources import open_source

RED = (200, 30, 60)
WHITE = (255, 255, 255)
pytestmark = pytest.mark.usefixtures("one_thread")


def encode(image, kind="PNG", **options):
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def flat_image(colour=RED, size=(20, 16), mode="RGB"):
    return Image.new(mode, size, colour)


SMALL = ["student.patch_size=8", "crops.global_crops_size=32", "crops.local_crops_size=16",
         "crops.local_crops_number=2", "train.batch_size_per_gpu=4", "train.num_workers=0"]  # fmt: skip


def small_config(*overrides):
    """Four images at a time, of each two crops of 32 x 32 pixels and two of 16 x 16."""
    return config.load(overrides=[*SMALL, *overrides])


def source_of_differing_images(path, count=10):
    """A folder of images of 40 x 30 pixels, as a source."""
    rng = np.random.default_rng(0)
    for k in range(count):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30)).save(path / f"{k:03d}.png")
    return open_source(f"folder:{path}")


# ---- sources ---------------------------------------------------------------------------------------------


def test_folder_with_labels_and_any_depth(tmp_path):
    for name in ("cat/b.JPG", "cat/deep/er/a.png", "ant/c.Jpeg", ".hidden/x.png", "cat/._b.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(flat_image()))
    os.symlink(tmp_path, tmp_path / "cat" / "loop")
    dataset = open_source(f"folder:{tmp_path}")
    names = [os.path.relpath(dataset.name(i), tmp_path) for i in range(len(dataset))]
    assert names == ["ant/c.Jpeg", "cat/b.JPG", "cat/deep/er/a.png"]
    assert dataset.classes == ["ant", "cat"]
    assert [dataset[i][1] for i in range(3)] == [0, 1, 1]
    assert dataset[0][0].getpixel((3, 3)) == RED
    (tmp_path / "beside.png").write_bytes(encode(flat_image()))
    flat = open_source(f"folder:{tmp_path}")
    assert len(flat) == 4
    assert flat.classes is None
    assert flat[0][1] == -1


def test_empty_sources_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.TXT").write_text("x")
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (tmp_path / "list.jsonl").write_text("{not json\n")
    (tmp_path / "none.jsonl").write_text('{"path": "a.png", "keep": false}\n')
    uris = {
        f"folder:{tmp_path}/nowhere": "No such file",
        f"folder:{tmp_path}/empty": "is empty",
        f"folder:{tmp_path}/texts": ".txt",
        f"tar:{tmp_path}/missing.tar": "missing.tar",
        f"tar:{tmp_path}/packed.tar": "gunzip",
        f"tar:{tmp_path}/empty": "empty",
        f"list:{tmp_path}/gone.jsonl": "gone.jsonl",
        f"list:{tmp_path}/list.jsonl": "line 1",
        f"list:{tmp_path}/none.jsonl": "no images",
        "ImageNet:split=TRAIN": "root=/path",
        str(tmp_path): "folder:",
        "scenes:many": "scenes:10000",
        "folder:": "folder:/path",
    }
    for uri, words in uris.items():
        with pytest.raises(UserError, match=words) as error:
            open_source(uri)
        assert "\n" not in str(error.value)


def test_published_imagenet_uri(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "train" / "n01" / "x.JPEG").write_bytes(encode(flat_image(), "JPEG"))
    dataset = open_source(f"ImageNet:split=TRAIN:root={tmp_path}:extra=/elsewhere")
    assert len(dataset) == 1
    assert dataset.classes == ["n01"]
    larger = open_source(f"ImageNet22k:root={tmp_path}/train:extra=/elsewhere")  # this one has no splits
    assert larger.classes == ["n01"]


def test_scenes_uri():
    dataset = open_source("scenes:12:seed=3:size=32")
    image, label = dataset[5]
    assert len(dataset) == 12
    assert image.size == (32, 32)
    assert image.mode == "RGB"
    assert 0 <= label < len(dataset.classes)
    assert len(open_source("scenes:")) > 1000
    assert len(open_source("scenes:seed=2")) > 1000


def write_tar(path, members):
    """members: (name, bytes) or (name, TarInfo type)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type = content
                info.linkname = "/etc/passwd"
                tar.addfile(info)


def test_tar_shards(tmp_path):
    colours = [(k * 10, 0, 0) for k in range(4)]
    images = [encode(flat_image(colour)) for colour in colours]
    write_tar(tmp_path / "s-008.tar", [("a/0.png", images[0]), ("a/0.cls", b"7\n")])
    labelled_by_json = [("1.json", b'{"label": 3}'), ("1.png", images[1])]
    write_tar(tmp_path / "s-009.tar", [*labelled_by_json, ("2.PNG", images[2])])
    write_tar(tmp_path / "s-010.tar", [("3.x.png", images[3])])
    dataset = open_source(f"tar:{tmp_path}/s-{{008..010}}.tar")
    for i in (3, 1, 0, 2):
        image, label = dataset[i]
        assert label == [1, 0, -1, -1][i]
        assert image.getpixel((0, 0)) == colours[i]
    assert dataset.name(0).endswith("s-008.tar::a/0.png")
    assert dataset.classes == ["3", "7"]
    assert dataset.dropped == []
    with pytest.raises(UserError, match="s-007"):
        open_source(f"tar:{tmp_path}/s-{{007..010}}.tar")


def test_hostile_tar(tmp_path, capsys):
    """Nothing is written, links are no images, half samples are counted and left out, a key counts once."""
    folder = tmp_path / "only"
    folder.mkdir()
    good = encode(flat_image())
    other = encode(flat_image((0, 0, 255)))
    members = [
        ("../../escape.png", good),
        ("/abs/olute.png", good),
        ("link.png", tarfile.SYMTYPE),
        ("device.png", tarfile.CHRTYPE),
        ("twice.png", good),
        ("twice.png", other),
        ("label_only.cls", b"42"),
        ("odd.png", good),
        ("odd.json", b"{broken"),
        ("last.png", good * 20),
    ]
    write_tar(folder / "t.tar", members)
    content = (folder / "t.tar").read_bytes()
    inside_the_last = content.index(good * 20) + len(good)
    (folder / "t.tar").write_bytes(content[:inside_the_last])
    dataset = open_source(f"tar:{folder}/t.tar")
    names = [dataset.name(i).partition("::")[2] for i in range(len(dataset))]
    assert names == ["../../escape.png", "/abs/olute.png", "twice.png", "odd.png"]
    for i in range(4):
        image, label = dataset[i]
        assert image.getpixel((0, 0)) == RED
        assert label == -1
    assert [entry.name.partition("::")[2] for entry in dataset.dropped] == ["label_only", "last"]
    warnings = capsys.readouterr().err
    assert "2 of 6 samples" in warnings
    assert "'odd.json': Expecting property name" in warnings
    assert "(and 2 more)" in warnings  # last.png is cut off, and so the shard has no end
    assert os.listdir(tmp_path) == ["only"]
    assert os.listdir(folder) == ["t.tar"]


def test_manifest(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encode(flat_image()))
    write_tar(tmp_path / "s.tar", [("k1.png", encode(flat_image((1, 2, 3)))), ("k1.cls", b"5 ")])
    rows = [
        {"path": "pictures/a.png", "label": "cat"},
        {"path": "gone.png", "keep": False},
        {"shard": "s.tar", "key": "k1"},
        {"shard": "s.tar", "key": "absent"},
        {"path": "gone.png"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = open_source(f"list:{tmp_path}/m.jsonl")
    assert len(dataset) == 3
    assert len(dataset.dropped) == 1
    assert dataset.classes == ["5", "cat"]
    for i, (colour, label) in enumerate([(RED, 1), ((1, 2, 3), 0)]):
        assert dataset[i][0].getpixel((0, 0)) == colour
        assert dataset[i][1] == label
    with pytest.raises(BadImage, match=r"gone\.png"):
        dataset[2]


def labels_of(uri):
    """The class of each image of a source, by name."""
    dataset = open_source(uri)
    return [dataset.classes[label] if label >= 0 else None for label in dataset.labels.tolist()]


def write_tar_of_labels(path, labels, extension, write=str.encode):
    """A shard of equal images, each with its label in a file of that extension."""
    members = []
    for number, label in enumerate(labels):
        members.append((f"{number:02d}.png", encode(flat_image())))
        members.append((f"{number:02d}.{extension}", write(label) + b"\n"))
    write_tar(path, members)


def test_a_label_is_the_same_text_from_everywhere(tmp_path):
    """Folder 0/, a file that says 0, the number 0 and the text "0" in JSON: one class, and never a number."""
    names = ["0", "1", "007", "10", "1.5", "true", "null", "NaN", "-1", "cat", "dog", "caf\udce9"]
    names.sort()
    for name in names:
        folder = tmp_path / "folder" / os.fsencode(name).decode("utf-8", "surrogateescape")
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(encode(flat_image()))
    rows = [{"path": f"folder/{name}/x.png", "label": name} for name in names]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_tar_of_labels(tmp_path / "cls.tar", names, "cls", os.fsencode)
    objects = [json.dumps({"label": name}) for name in names]
    write_tar_of_labels(tmp_path / "json.tar", objects, "json")
    for uri in ("folder:{}/folder", "list:{}/m.jsonl", "tar:{}/cls.tar", "tar:{}/json.tar"):
        assert open_source(uri.format(tmp_path)).classes == names, uri
        assert sorted(labels_of(uri.format(tmp_path))) == names, uri


def test_numbers_of_json_are_text(tmp_path, capsys):
    values = [3, "3", 3.0, 10, 1.5, True, 10**30, "cat", None, ""]
    rows = [{"path": f"{i}.png", "label": value} for i, value in enumerate(values)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = ["3", "3", "3", "10", "1.5", "true", "1" + 30 * "0", "cat", None, None]
    assert labels_of(f"list:{tmp_path}/m.jsonl") == expected
    write_tar_of_labels(tmp_path / "t.tar", values, "json", lambda value: json.dumps(value).encode())
    assert labels_of(f"tar:{tmp_path}/t.tar") == expected
    assert not capsys.readouterr().err
    write_tar_of_labels(tmp_path / "n.tar", ["10", "9", "0"], "cls")
    assert open_source(f"tar:{tmp_path}/n.tar").classes == ["0", "9", "10"]


NO_LABELS = [b'{"label": [1, 2]}', b'{"label": NaN}', b'{"label": "\\ud800"}', b'{"label": ' + b"[" * 100_000]


@pytest.mark.parametrize("content", NO_LABELS, ids=["a list", "NaN", "half a pair", "brackets"])
def test_what_is_no_label_is_told(tmp_path, capsys, content):
    good = [("a.png", encode(flat_image())), ("a.cls", b"cat")]
    write_tar(tmp_path / "t.tar", [*good, ("b.png", encode(flat_image())), ("b.json", content)])
    assert labels_of(f"tar:{tmp_path}/t.tar") == ["cat", None]
    assert "'b.json': " in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "a.png"}\n{"path": "b.png", ' + content[1:])
    dataset = open_source(f"list:{tmp_path}/m.jsonl")
    assert "m.jsonl line 2" in dataset.dropped[0].name
    warning = capsys.readouterr().err
    assert "1 lines lack JSON" in warning and "m.jsonl line 2" in warning
    assert len(warning) < 700


def test_a_damaged_header_costs_one_member(tmp_path, capsys):
    write_tar(tmp_path / "t.tar", [(f"{i}.png", encode(noise_image(20 + i))) for i in range(12)])
    content = bytearray((tmp_path / "t.tar").read_bytes())
    header = content.index(b"2.png")
    content[header] ^= 1
    (tmp_path / "t.tar").write_bytes(content)
    dataset = open_source(f"tar:{tmp_path}/t.tar")
    names = [dataset.name(i).partition("::")[2] for i in range(len(dataset))]
    assert names == [f"{i}.png" for i in range(12) if i != 2]
    assert all(dataset[i][0].size == (20 + int(name[:-4]),) * 2 for i, name in enumerate(names))
    assert f"t.tar is damaged: the header at byte {header:,} is damaged" in capsys.readouterr().err


def test_what_is_not_read_of_a_shard_is_told(tmp_path, capsys):
    """Behind a hundred damaged headers it gives up; a command says what is lost, as training does."""
    write_tar(tmp_path / "t.tar", [(f"{i:03d}.png", b"?" * 400) for i in range(300)])
    content = bytearray((tmp_path / "t.tar").read_bytes())
    for i in range(0, 300, 2):
        content[1024 * i] ^= 1
    (tmp_path / "t.tar").write_bytes(content)
    assert len(sources.open_images([str(tmp_path / "t.tar")])) == 99
    assert f"nothing from byte {1024 * 199:,} on is read" in capsys.readouterr().err
    write_tar(tmp_path / "half.tar", [("a.png", encode(flat_image())), ("b.txt", b"no image")])
    sources.open_images([str(tmp_path / "half.tar")])
    assert "1 of 2 samples have no complete image" in capsys.readouterr().err


def test_a_shard_cut_between_two_members_is_told(tmp_path, capsys):
    write_tar(tmp_path / "t.tar", [(f"{i}.png", encode(flat_image())) for i in range(4)])
    content = (tmp_path / "t.tar").read_bytes()
    assert len(open_source(f"tar:{tmp_path}/t.tar")) == 4
    assert not capsys.readouterr().err
    (tmp_path / "t.tar").write_bytes(content[: content.index(b"2.png")])
    assert len(open_source(f"tar:{tmp_path}/t.tar")) == 2
    assert "it has no end" in capsys.readouterr().err


@pytest.mark.parametrize("first, end", [(0, 512), (1, 512), (1, 3000), (2, 3072)])
def test_a_hole_of_zeros_is_told(tmp_path, capsys, first, end):
    """As a download that was cut and continued leaves it: it looks like the end of the archive."""
    write_tar(tmp_path / "t.tar", [(f"{i}.png", encode(noise_image(20))) for i in range(6)])
    content = bytearray((tmp_path / "t.tar").read_bytes())
    hole = content.index(b"%d.png" % first)
    content[hole : hole + end] = bytes(end)
    (tmp_path / "t.tar").write_bytes(content)
    assert 2 <= len(open_source(f"tar:{tmp_path}/t.tar")) < 6
    assert f"more follows the zeros at byte {hole:,}" in capsys.readouterr().err


def test_labels_that_are_no_names_do_not_end_a_shard(tmp_path):
    members = []
    for i in range(150):
        members += [(f"{i}.png", encode(flat_image())), (f"{i}.json", b'{"label": [1]}')]
    write_tar(tmp_path / "t.tar", members)
    assert len(open_source(f"tar:{tmp_path}/t.tar")) == 150


def test_a_gap_too_long_to_search_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sources, "SEARCH_BYTES", 1024)
    write_tar(tmp_path / "t.tar", [("a.png", encode(flat_image())), ("b.mp4", b"?" * 9000), ("c.png", b"?")])
    content = bytearray((tmp_path / "t.tar").read_bytes())
    header = content.index(b"b.mp4")
    content[header] ^= 1
    (tmp_path / "t.tar").write_bytes(content)
    assert len(open_source(f"tar:{tmp_path}/t.tar")) == 1
    assert f"nothing from byte {header:,} on is read" in capsys.readouterr().err


def test_two_archives_in_one_file_are_both_read(tmp_path):
    """As `cat a.tar b.tar` makes them."""
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encode(flat_image()))])
    both = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(both)
    assert len(open_source(f"tar:{tmp_path}/both.tar")) == 2


def forged_header(name, size, kind=tarfile.REGTYPE):
    """512 bytes with a true checksum around a size that may be a lie."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = kind
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


HOSTILE_HEADERS = {
    "size -1": forged_header("x.png", -1),
    "size -2048": forged_header("x.png", -2048),
    "a sparse file": forged_header("x.png", 0, tarfile.GNUTYPE_SPARSE),
    "a name of -512 bytes": forged_header("x", -512, tarfile.GNUTYPE_LONGNAME),
    "a name of 2 ^ 60 bytes": forged_header("x", 2**60, tarfile.GNUTYPE_LONGNAME),
    "an extension of 2 ^ 70 bytes": forged_header("x", 2**70, tarfile.XHDTYPE),
    "a name of a name": forged_header("x", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    "a name with 0": forged_header("x", 512, tarfile.XHDTYPE) + b"22 path=a\0b.png".ljust(512, b"\n"),
}


@pytest.mark.parametrize("header", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_a_hostile_header_costs_itself_alone(tmp_path, capsys, header):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.png", encode(flat_image()))])
    first = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(first[:1024] + header + (tmp_path / "b.tar").read_bytes())
    dataset = open_source(f"tar:{tmp_path}/t.tar")
    assert dataset.name(0).endswith("::a.png")
    assert all(dataset[i][0].size == (20, 16) for i in range(len(dataset)))
    assert "t.tar is damaged: " in capsys.readouterr().err


def test_a_member_that_claims_more_than_there_is(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", encode(flat_image()))])
    first = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(first[:1024] + forged_header("x.png", 2**80) + bytes(1024))
    assert len(open_source(f"tar:{tmp_path}/t.tar")) == 1
    assert "'x.png': cut off" in capsys.readouterr().err


def test_one_hostile_shard_costs_its_own_lines_of_a_manifest(tmp_path, capsys):
    write_tar(tmp_path / "good.tar", [("a.png", encode(flat_image()))])
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    rows = [{"shard": "bad.tar", "key": "a"}, {"shard": "good.tar", "key": "a"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = open_source(f"list:{tmp_path}/m.jsonl")
    assert len(dataset) == len(dataset.dropped) == 1
    assert "bad.tar" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "x" * 5000], ids=["0", "half a pair", "long"])
def test_what_cannot_be_a_path_is_one_sentence(tmp_path, path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": path}))
    with pytest.raises(UserError, match="m.jsonl line 1"):
        open_source(f"list:{tmp_path}/m.jsonl")


def test_patterns_and_names_that_cannot_be_shards(tmp_path):
    for rest in ("\ud800", "a\0b", "x" * 5000):
        with pytest.raises(UserError, match="dataset_path cannot be read: there can be no file|surrogates"):
            open_source(f"folder:{rest}")
    with pytest.raises(UserError, match="count must be a whole number from 1 to 1e15"):
        open_source("scenes:99999999999999999999")
    with pytest.raises(UserError, match="more than 1,000,000 shards"):
        open_source("tar:{0..999999999999}.tar")
    (tmp_path / "a::b").mkdir()
    write_tar(tmp_path / "a::b" / "t.tar", [("x.png", encode(flat_image()))])
    with pytest.raises(UserError, match="rename it"):
        open_source(f"tar:{tmp_path}/a::b/t.tar")


def test_one_long_name_costs_only_itself(tmp_path):
    """Names of one length would take 4 KB each here."""
    entries = [sources.Entry(f"{i}.png") for i in range(20_000)]
    images = sources.ImageFiles([*entries, sources.Entry("x" * 4000), sources.Entry("last")])
    assert [images.name(i) for i in (0, 19_999, 20_000, 20_001)] == ["0.png", "19999.png", "x" * 4000, "last"]
    assert len(images.joined_names) < 200_000


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encode(flat_image()))
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(open_source(f"folder:{tmp_path}")) == 1
    assert "closed is left out: Permission denied" in capsys.readouterr().err


# ---- decoding --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_what_is_no_regular_file_is_a_bad_image(tmp_path):
    """Reading a pipe or a device would never end, a sparse file of 100 GB would fill the memory."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(100 << 30)
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").symlink_to(tmp_path)
    dataset = sources.open_images([str(tmp_path)])
    reasons = {"pipe": "no regular file", "sparse": "107,374,182,400 bytes", "zero": "no regular file"}
    for i in range(len(dataset)):
        with pytest.raises(BadImage, match=reasons[os.path.basename(dataset.name(i))[:-4]]):
            dataset[i]
    assert len(dataset) == 3
    for uri in ("tar:{}/pipe.jpg", "list:{}/pipe.jpg", "tar:/dev/zero", "list:/dev/zero"):
        with pytest.raises(UserError, match="no regular file"):
            open_source(uri.format(tmp_path))
    with pytest.raises(UserError, match="is not a readable tar"):
        open_source(f"tar:{tmp_path}/sparse.jpg")
    with pytest.raises(UserError, match="line 1 has no end"):  # known after the first megabyte
        open_source(f"list:{tmp_path}/sparse.jpg")


def test_a_shard_that_is_gone_is_a_bad_image(tmp_path):
    write_tar(tmp_path / "t.tar", [("a.png", encode(flat_image()))])
    dataset = open_source(f"tar:{tmp_path}/t.tar")
    (tmp_path / "t.tar").unlink()
    with pytest.raises(BadImage, match=r"t\.tar::a\.png.*No such file"):
        dataset[0]


def test_pixels_that_are_no_numbers_are_no_picture():
    pixels = np.full((8, 8), np.nan, np.float32)
    with pytest.raises(BadImage, match="NaN"):
        decode_image(encode(Image.fromarray(pixels), "TIFF"), "x.tif")


def first_pixel(image, kind="PNG", **options):
    """What is decoded there after the image has been a file of that kind."""
    return decode_image(encode(image, kind, **options), f"{image.mode} {kind}").getpixel((0, 0))


def noise_image(side):
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def test_modes_have_the_right_colours():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    full = Reading(range=(0, 65535))
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp)), "16 bit", reading=full))
    assert np.abs(decoded[0, :, 0] - np.arange(256.0)).max() <= 1
    assert (decoded[..., 0] == decoded[..., 2]).all()
    assert first_pixel(flat_image(1, mode="1")) == WHITE
    palette = flat_image(size=(4, 4)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert first_pixel(palette) == RED
    red, green, blue = first_pixel(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=98)
    assert red > 245  # magenta and yellow ink
    assert max(green, blue) < 12


def test_transparency_is_white():
    assert first_pixel(flat_image((90, 128), mode="LA")) == (172, 172, 172)
    palette = flat_image(size=(4, 4)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert first_pixel(palette, transparency=palette.getpixel((0, 0))) == WHITE
    assert first_pixel(flat_image((*RED, 255), mode="RGBA")) == RED
    assert first_pixel(flat_image((*RED, 0), mode="RGBA")) == WHITE
    half = np.array(first_pixel(flat_image((*RED, 128), mode="RGBA")))
    assert np.abs(half - (227, 142, 157)).max() <= 1


def test_orientation_and_first_frame():
    image = flat_image((0, 0, 0), (20, 10))
    image.paste(RED, (0, 0, 5, 10))  # the left quarter
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise: left becomes top
    upright = decode_image(encode(image, "JPEG", exif=exif, quality=98, subsampling=0), "exif")
    assert upright.size == (10, 20)
    assert np.abs(np.array(upright.getpixel((5, 1))) - RED).max() < 12
    assert max(upright.getpixel((5, 18))) < 12
    frames = dict(save_all=True, append_images=[flat_image((0, 255, 0))])
    assert first_pixel(flat_image(), "GIF", **frames) == RED
    assert first_pixel(flat_image(), "WEBP", lossless=True, **frames) == RED


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "PNG"])
def test_kinds_of_files(kind):
    assert first_pixel(flat_image(), kind) == RED


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(tmp_path):
    jpeg = encode(noise_image(64), "JPEG")
    bomb = zlib.compress(bytes(12000 * 3 + 1) * 12000, 9)
    long_text = b"comment\0\0" + zlib.compress(bytes(80_000_000), 9)
    pixels = zlib.compress(bytes(1220))
    cases = {
        "b''": b"",
        "<!DOCTYPE": b"<!DOCTYPE html><html><body>404</body></html>",
        "known format": b"hello, I am text",
        "truncated": jpeg[: len(jpeg) // 2],
        "144000000|144,000,000|12000 x 12000": fake_png(12000, 12000, (b"IDAT", bomb)),
        "pixels": fake_png(60000, 60000, (b"IDAT", b"")),
        "too large|limit|size|large": fake_png(20, 20, (b"zTXt", long_text), (b"IDAT", pixels)),
        "known format ": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Ghostscript!
    }
    for words, content in cases.items():
        with pytest.raises(BadImage) as error:
            decode_image(content, "here.jpg")
        name, reason = error.value.args
        assert name == "here.jpg"
        assert any(word.strip() in reason for word in words.split("|")), (words, reason)
        assert "\n" not in str(error.value)
    with pytest.raises(BadImage, match="No such file"):
        decode_image(str(tmp_path / "gone.png"), "gone.png")
    thin = decode_image(encode(flat_image(size=(1, 20000))), "thin")
    assert thin.size == (1, 20000)


@pytest.mark.filterwarnings("ignore")  # Pillow comments on broken TIFF tags
def test_bytes_turned_at_random_never_escape():
    """Damaged files either decode or are BadImage: no other exception."""
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        content = encode(noise_image(24), kind)
        for _ in range(120):
            damaged = np.frombuffer(content, np.uint8).copy()
            places = rng.integers(0, min(len(damaged), 300), 3)
            damaged[places] = rng.integers(0, 256, 3)
            try:
                assert decode_image(damaged.tobytes(), kind).mode == "RGB"
            except BadImage:
                pass


# ---- sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_permutation_is_one_to_one(n):
    assert sorted(permuted_index(7, x, n) for x in range(n)) == list(range(n))


def test_permutation_depends_on_its_secret():
    first = np.array([permuted_index(1, x, 1000) for x in range(1000)])
    second = np.array([permuted_index(2, x, 1000) for x in range(1000)])
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, range(1000))[0, 1]) < 0.1
    assert permuted_index(1, 123_456_789, 10**9) < 10**9  # no table: large sets cost the same


def test_an_epoch_shows_every_image_once(tmp_path):
    """Also where the number of images is no multiple of the batch; the next epoch has another order."""
    crops = MultiCropDataset(source_of_differing_images(tmp_path), small_config())
    epochs = [[], [], []]
    for i in range(30):
        crops.cache.clear()
        crops.load_sample(i, [])
        epochs[i // 10].append(int(crops.reading[0]))
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


# ---- loader ----------------------------------------------------------------------------------------------


def first_batches(count, cfg, dataset, *args):
    return list(itertools.islice(make_loader(cfg, dataset, "cpu", *args), count))


def loader_failure(*args):
    """The sentence with which a loader fails."""
    with pytest.raises(UserError) as error:
        first_batches(*args)
    for exception in (error.value, error.value.__cause__):
        # The frames hold the loader, which would take seconds to collect.
        traceback.clear_frames(exception.__traceback__)
    return str(error.value)


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for our_batch, their_batch in zip(ours, theirs):
        assert our_batch.keys() == their_batch.keys()
        for name, value in our_batch.items():
            if torch.is_tensor(value):
                assert torch.equal(value, their_batch[name]), name
            else:
                assert value == their_batch[name], name


def test_shapes(tmp_path):
    batch = first_batches(1, small_config(), source_of_differing_images(tmp_path))[0]
    expected = {
        "globals": ((8, 3, 32, 32), torch.float32),
        "locals": ((8, 3, 16, 16), torch.float32),
        "masks": ((8, 16), torch.bool),
        "samples": ((4,), torch.int64),
    }
    for name, (shape, dtype) in expected.items():
        assert batch[name].shape == shape
        assert batch[name].dtype == dtype
    assert batch["bad"] == []
    assert batch["samples"].tolist() == [0, 1, 2, 3]
    bare = small_config("crops.local_crops_number=0", "ibot.mask_sample_probability=0")
    batch = first_batches(1, bare, source_of_differing_images(tmp_path))[0]
    assert batch["locals"] is None
    assert batch["masks"] is None
    assert len(batch["mask_indices"]) == 0


def test_crop_major_order(tmp_path):
    """Row v * B + j is crop v of image j: images of one colour show who is where."""
    for k in range(4):
        flat_image((60 * k, 60 * k, 60 * k)).save(tmp_path / f"{k}.png")
    still = small_config("crops.jitter_prob=0", "crops.solarize_prob=0", "crops.gray_prob=0")
    batch = first_batches(1, still, open_source(f"folder:{tmp_path}"))[0]
    for crops in (batch["globals"], batch["locals"]):
        first, second = crops.mean((1, 2, 3)).split(4)
        assert torch.allclose(first, second, atol=1e-4)
        assert len(first.unique()) == 4


def test_workers_change_nothing(tmp_path):
    source_of_differing_images(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    dataset = open_source(f"folder:{tmp_path}")
    workers = first_batches(6, small_config("train.num_workers=2"), dataset)
    assert_same_batches(workers, first_batches(6, small_config(), dataset))


def test_resume_continues(tmp_path):
    dataset = source_of_differing_images(tmp_path)
    cfg = small_config("train.accumulate=2")
    assert_same_batches(first_batches(10, cfg, dataset)[6:], first_batches(4, cfg, dataset, 3))
    other = first_batches(1, small_config("train.accumulate=2", "train.seed=1"), dataset)
    assert not torch.equal(other[0]["globals"], first_batches(1, cfg, dataset)[0]["globals"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_one_global_batch(tmp_path, accumulate):
    """Two ranks with half the batch see the images, crops and masks that one rank would see."""
    dataset = source_of_differing_images(tmp_path, 20)
    count = 2 * accumulate
    whole = small_config("train.batch_size_per_gpu=4", f"train.accumulate={accumulate}")
    half = small_config("train.batch_size_per_gpu=2", f"train.accumulate={accumulate}")
    alone = first_batches(count, whole, dataset)
    rank0 = first_batches(count, half, dataset, 0, 0, 2)
    rank1 = first_batches(count, half, dataset, 0, 1, 2)
    for batch, first, second in zip(alone, rank0, rank1):
        assert torch.equal(batch["samples"], torch.cat([first["samples"], second["samples"]]))
        for name in ("globals", "locals", "masks"):
            parts = [part[name].unflatten(0, (2, -1)) for part in (first, second)]  # crop-major: (2, B, ...)
            together = torch.cat(parts, 1).flatten(0, 1)
            assert torch.allclose(batch[name].float(), together.float(), atol=1e-5)


def test_bad_images_are_replaced_alike(tmp_path):
    """A substitute is a function of (seed, i) alone, and every failure is reported with its reason."""
    source_of_differing_images(tmp_path, 6)
    for k in range(3):
        (tmp_path / f"bad{k}.jpg").write_bytes(b"" if k else b"\xff\xd8\xff\xe0 torn")
    dataset = open_source(f"folder:{tmp_path}")
    batches = first_batches(6, small_config(), dataset)
    assert_same_batches(batches, first_batches(6, small_config(), dataset))
    names = set()
    for batch in batches:
        assert torch.isfinite(batch["globals"]).all()
        for path, reason in batch["bad"]:
            names.add(os.path.basename(path))
            assert isinstance(reason, str)
            assert reason
    assert names == {"bad0.jpg", "bad1.jpg", "bad2.jpg"}


def test_nothing_but_bad_images(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(b"<html>")
    for workers in (0, 1):
        cfg = small_config(f"train.num_workers={workers}")
        sentence = loader_failure(1, cfg, open_source(f"folder:{tmp_path}"))
        assert "ten images in a row cannot be read" in sentence
        assert "<html>" in sentence


def test_one_image_and_a_larger_batch(tmp_path):
    dataset = source_of_differing_images(tmp_path, 1)
    _, batch = first_batches(2, small_config("train.batch_size_per_gpu=8"), dataset)
    assert batch["globals"].shape[0] == 16
    assert not torch.equal(batch["globals"][0], batch["globals"][1])


class FailingSource:
    """Reads images until image 3, then calls `fail`."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def name(self, i):
        return f"/images/{i}.png"

    def __getitem__(self, i):
        if i == 3:
            self.fail()
        return flat_image(size=(40, 40)), 0


def divide():
    return 1 / 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(4)


CAUSES = {divide: "ZeroDivisionError", die: "signal|exited", hang: "timed out"}


@pytest.mark.parametrize("fail, workers", [(divide, 0), (divide, 2), (die, 2), (hang, 2)])
def test_errors_name_the_image(fail, workers, monkeypatch):
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 1)
    start = time.monotonic()
    sentence = loader_failure(3, small_config(f"train.num_workers={workers}"), FailingSource(fail))
    assert "/images/3.png" in sentence
    assert any(words in sentence for words in CAUSES[fail].split("|"))
    assert "\n" not in sentence
    assert time.monotonic() - start < 20


def test_small_images_stay_decoded(tmp_path):
    crops = MultiCropDataset(source_of_differing_images(tmp_path, 4), small_config())
    first = crops[0, 0]
    assert len(crops.cache) == 4
    assert crops.cache_room == data.CACHE_BYTES - 4 * 40 * 30 * 3
    again = crops[0, 0]
    for ours, theirs in zip(first["views"], again["views"]):
        assert torch.equal(ours, theirs)


def test_to_tensor():
    image = flat_image(size=(5, 3))
    assert to_tensor(image).shape == (3, 3, 5)
    assert to_tensor(image)[:, 1, 2].tolist() == list(RED)


class RecordedStream:
    def __init__(self, name, events):
        self.name = name
        self.events = events

    def wait_stream(self, other):
        self.events.append(f"{self.name} waits for {other.name}")


class RecordedDevice:
    """In the place of torch.cuda: writes down what a GPU's streams would be told."""

    def __init__(self):
        self.events = []
        self.main = self.current = RecordedStream("main", self.events)

    def Stream(self):
        return RecordedStream("side", self.events)

    def current_stream(self):
        return self.main

    @contextlib.contextmanager
    def stream(self, side):
        self.current = side
        yield
        self.current = self.main


def test_the_next_batch_travels_beside_the_step(monkeypatch):
    """Batch k + 1 is asked for in the side stream before batch k is used; the streams wait for each other."""
    device = RecordedDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    real = data.to_device

    def recorded(*args):
        device.events.append(f"load on {device.current.name}")
        return real(*args)

    monkeypatch.setattr(data, "to_device", recorded)
    loader = make_loader(config.load(model="debug"), open_source("scenes:20"), "cpu")
    one_batch = ["main waits for side", "side waits for main", "load on side"]
    next(loader)
    assert device.events == 2 * one_batch
    next(loader)
    assert device.events == 3 * one_batch
    assert device.current is device.main


def test_a_loader_that_has_failed_is_not_asked_again(monkeypatch):
    """It reads ahead, so an error waits for its turn; after a kill, other workers may be in mid-message."""
    calls = itertools.count(1)
    real = data.batch_or_error

    def failing_at_the_third(*args):
        call = next(calls)
        assert call < 4, "asked again"
        if call == 3:
            return UserError("a worker is dead")
        return real(*args)

    monkeypatch.setattr(data, "batch_or_error", failing_at_the_third)
    loader = make_loader(config.load(model="debug"), open_source("scenes:20"), "cpu")
    next(loader)
    next(loader)
    with pytest.raises(UserError, match="dead"):
        next(loader)
