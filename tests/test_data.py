"""Sources, decoding, sampler and loader: bad input of every kind, the same data however it is computed."""

import contextlib
import io
import itertools
import json
import os
import signal
import struct
import tarfile
import time
import traceback
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data
import sources
from config import UserError
from data import MultiCropDataset, make_loader, permuted_index
from sources import BadImage, decode_image, open_source, to_tensor

RED = (200, 30, 60)


pytestmark = pytest.mark.usefixtures("one_thread")


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(colour=RED, size=(20, 16), mode="RGB"):
    return Image.new(mode, size, colour)


def settings(*overrides):
    """Small and quick: 2 x 32 + 2 x 16 pixels."""
    small = ["student.patch_size=8", "crops.global_crops_size=32", "crops.local_crops_size=16"]
    small += ["crops.local_crops_number=2", "train.batch_size_per_gpu=4", "train.num_workers=0"]
    return config.load(overrides=[*small, *overrides])


def folder_of(path, count=10, size=(40, 30)):
    """A folder of images that differ."""
    rng = np.random.default_rng(0)
    for k in range(count):
        pixels = rng.integers(0, 256, (size[1] // 5, size[0] // 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size).save(path / f"{k:03d}.png")
    return open_source(f"folder:{path}")


# ---- sources ---------------------------------------------------------------------------------------------


def test_folder_with_labels_and_any_depth(tmp_path):
    for name in ("cat/b.JPG", "cat/deep/er/a.png", "ant/c.Jpeg", ".hidden/x.png", "cat/._b.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(plain()))
    os.symlink(tmp_path, tmp_path / "cat" / "loop")
    dataset = open_source(f"folder:{tmp_path}")
    names = [os.path.relpath(dataset.name(i), tmp_path) for i in range(len(dataset))]
    assert names == ["ant/c.Jpeg", "cat/b.JPG", "cat/deep/er/a.png"]
    assert dataset.classes == ["ant", "cat"] and [dataset[i][1] for i in range(3)] == [0, 1, 1]
    assert dataset[0][0].getpixel((3, 3)) == RED
    (tmp_path / "beside.png").write_bytes(encoded(plain()))
    flat = open_source(f"folder:{tmp_path}")
    assert len(flat) == 4 and flat.classes is None and flat[0][1] == -1


def test_empty_sources_are_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.TXT").write_text("x")
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b" + bytes(100))
    (tmp_path / "list.jsonl").write_text("{not json\n")
    (tmp_path / "none.jsonl").write_text('{"path": "a.png", "keep": false}\n')
    uris = {
        f"folder:{tmp_path}/nowhere": "does not exist",
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
    for uri, expected in uris.items():
        with pytest.raises(UserError, match=expected) as caught:
            open_source(uri)
        assert "\n" not in str(caught.value)


def test_published_imagenet_uri(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    (tmp_path / "train" / "n01" / "x.JPEG").write_bytes(encoded(plain(), "JPEG"))
    dataset = open_source(f"ImageNet:split=TRAIN:root={tmp_path}:extra=/elsewhere")
    assert len(dataset) == 1 and dataset.classes == ["n01"]


def test_scenes_uri():
    dataset = open_source("scenes:12:seed=3:size=32")
    image, label = dataset[5]
    assert len(dataset) == 12 and image.size == (32, 32) and image.mode == "RGB"
    assert 0 <= label < len(dataset.classes)
    assert len(open_source("scenes:")) > 1000 and len(open_source("scenes:seed=2")) > 1000


def write_tar(path, members):
    """members: (name, bytes) or (name, TarInfo type)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) > 1:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content, "/etc/passwd"
                tar.addfile(info)


def test_tar_shards(tmp_path):
    colours = [(k * 10, 0, 0) for k in range(6)]
    images = [encoded(plain(c)) for c in colours]
    write_tar(tmp_path / "s-008.tar", [("a/0.png", images[0]), ("a/0.cls", b"07"[1:] + b"\n")])
    write_tar(
        tmp_path / "s-009.tar", [("1.json", b'{"label": 3}'), ("1.png", images[1]), ("2.PNG", images[2])]
    )
    write_tar(tmp_path / "s-010.tar", [("3.x.png", images[3])])
    dataset = open_source(f"tar:{tmp_path}/s-{{008..010}}.tar")
    assert [dataset[i][1] for i in range(4)] == [7, 3, -1, -1]
    assert [dataset[i][0].getpixel((0, 0)) for i in (3, 1, 0, 2)] == [colours[i] for i in (3, 1, 0, 2)]
    assert dataset.name(0).endswith("s-008.tar::a/0.png") and dataset.dropped == 0
    with pytest.raises(UserError, match="s-007"):
        open_source(f"tar:{tmp_path}/s-{{007..010}}.tar")


def test_hostile_tar(tmp_path, capsys):
    """Nothing is written, links are no images, half samples are counted and left out, a key counts once."""
    folder = tmp_path / "only"
    folder.mkdir()
    good, other = encoded(plain()), encoded(plain((0, 0, 255)))
    members = [("../../escape.png", good), ("/abs/olute.png", good), ("link.png", tarfile.SYMTYPE)]
    members += [("device.png", tarfile.CHRTYPE), ("twice.png", good), ("twice.png", other)]
    members += [
        ("label_only.cls", b"42"),
        ("odd.png", good),
        ("odd.json", b"{broken"),
        ("last.png", good * 20),
    ]
    write_tar(folder / "t.tar", members)
    content = (folder / "t.tar").read_bytes()
    (folder / "t.tar").write_bytes(
        content[: content.index(good * 20) + len(good)]
    )  # ends inside the last image
    dataset = open_source(f"tar:{folder}/t.tar")
    names = [dataset.name(i).partition("::")[2] for i in range(len(dataset))]
    assert names == ["../../escape.png", "/abs/olute.png", "twice.png", "odd.png"]
    assert all(dataset[i][0].getpixel((0, 0)) == RED and dataset[i][1] == -1 for i in range(4))
    assert dataset.dropped == 2 and "2 of 6 samples" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["only"] and os.listdir(folder) == ["t.tar"]


def test_manifest(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(plain()))
    write_tar(tmp_path / "s.tar", [("k1.png", encoded(plain((1, 2, 3)))), ("k1.cls", b"5 ")])
    rows = [{"path": "pictures/a.png", "label": "cat"}, {"path": "gone.png", "keep": False}]
    rows += [{"shard": "s.tar", "key": "k1"}, {"shard": "s.tar", "key": "absent"}, {"path": "gone.png"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = open_source(f"list:{tmp_path}/m.jsonl")
    assert len(dataset) == 3 and dataset.dropped == 1 and dataset.classes == ["cat"]
    assert dataset[0][0].getpixel((0, 0)) == RED and dataset[0][1] == 0
    assert dataset[1][0].getpixel((0, 0)) == (1, 2, 3) and dataset[1][1] == 5
    with pytest.raises(BadImage, match=r"gone\.png"):
        dataset[2]


# ---- decoding --------------------------------------------------------------------------------------------


def rgba(pixels):
    return Image.fromarray(np.array(pixels, dtype=np.uint8), "RGBA")


def test_modes_have_the_right_colours():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    out = np.asarray(decode_image(encoded(Image.fromarray(ramp)), "16 bit"))
    assert np.abs(out[0, :, 0] - np.arange(256.0)).max() <= 1 and (out[..., 0] == out[..., 2]).all()
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))  # 200 of 65535 is nearly black
    assert decode_image(encoded(dark), "16 bit dark").getpixel((0, 0)) == (1, 1, 1)
    floats = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    assert decode_image(encoded(floats, "TIFF"), "float").getpixel((0, 0)) == (128, 128, 128)
    assert decode_image(encoded(plain(1, mode="1")), "1 bit").getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(plain((90, 128), mode="LA")), "LA").getpixel((0, 0)) == (172, 172, 172)
    half = rgba([[(200, 30, 60, 255), (200, 30, 60, 0), (200, 30, 60, 128)]])
    shown = decode_image(encoded(half), "RGBA")
    assert [shown.getpixel((x, 0)) for x in range(2)] == [RED, (255, 255, 255)]
    assert np.abs(np.array(shown.getpixel((2, 0))) - (227, 142, 157)).max() <= 1
    palette = plain(size=(4, 4)).convert("P", palette=Image.Palette.ADAPTIVE)
    index = palette.getpixel((0, 0))
    assert decode_image(encoded(palette), "P").getpixel((0, 0)) == RED
    assert decode_image(encoded(palette, transparency=index), "P + alpha").getpixel((0, 0)) == (255, 255, 255)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    red = decode_image(encoded(cmyk, "JPEG", quality=98), "CMYK").getpixel((8, 8))
    assert red[0] > 245 and max(red[1:]) < 12


def test_orientation_and_first_frame():
    image = plain((0, 0, 0), (20, 10))
    image.paste(RED, (0, 0, 5, 10))  # the left quarter
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise: left becomes top
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=98, subsampling=0), "exif")
    assert upright.size == (10, 20)
    assert np.abs(np.array(upright.getpixel((5, 1))) - RED).max() < 12 and max(upright.getpixel((5, 18))) < 12
    frames = [plain(), plain((0, 255, 0))]
    for kind in ("GIF", "WEBP"):
        options = dict(lossless=True) if kind == "WEBP" else {}
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_image(moving, kind).getpixel((2, 2)) == RED
    for kind in ("BMP", "PPM", "TIFF", "PNG"):
        assert decode_image(encoded(frames[0], kind), kind).getpixel((2, 2)) == RED


def png_header(width, height, *chunks):
    """A PNG that claims a size, and holds next to nothing."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    pack = lambda k, x: struct.pack(">I", len(x)) + k + x + struct.pack(">I", zlib.crc32(k + x))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack(k, x) for k, x in parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "JPEG")
    bomb = zlib.compress(bytes(12000 * 3 + 1) * 12000, 9)
    text = b"comment\0\0" + zlib.compress(bytes(80_000_000), 9)
    cases = {
        "b''": b"",
        "<!DOCTYPE": b"<!DOCTYPE html><html><body>404</body></html>",
        "known format": b"hello, I am text",
        "truncated": whole[: len(whole) // 2],
        "144000000|144,000,000|12000 x 12000": png_header(12000, 12000, (b"IDAT", bomb)),
        "pixels": png_header(60000, 60000, (b"IDAT", b"")),
        "too large|limit|size|large": png_header(
            20, 20, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(1220)))
        ),
        "known format ": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Ghostscript!
    }
    for reason, content in cases.items():
        with pytest.raises(BadImage) as caught:
            decode_image(content, "here.jpg")
        name, said = caught.value.args
        assert name == "here.jpg" and any(x.strip() in said for x in reason.split("|")), (reason, said)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadImage, match="No such file"):
        decode_image(str(tmp_path / "gone.png"), "gone.png")
    thin = decode_image(encoded(plain(size=(1, 20000))), "thin")
    assert thin.size == (1, 20000)


@pytest.mark.filterwarnings("ignore")  # Pillow comments on broken TIFF tags
def test_bytes_turned_at_random_never_escape():
    """Damaged files either decode or are BadImage: no other exception."""
    rng, colours = np.random.default_rng(1), np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        content = encoded(Image.fromarray(colours), kind)
        for _ in range(120):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 300), 3)] = rng.integers(0, 256, 3)
            try:
                assert decode_image(damaged.tobytes(), kind).mode == "RGB"
            except BadImage:
                pass


# ---- sampler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000])
def test_permutation_is_one_to_one(n):
    assert sorted(permuted_index(7, x, n) for x in range(n)) == list(range(n))


def test_permutation_depends_on_its_secret():
    first, second = ([permuted_index(s, x, 1000) for x in range(1000)] for s in (1, 2))
    assert sum(a == b for a, b in zip(first, second)) < 10
    assert abs(np.corrcoef(first, range(1000))[0, 1]) < 0.1
    assert permuted_index(1, 123_456_789, 10**9) < 10**9  # no table: large sets cost the same


def test_an_epoch_shows_every_image_once(tmp_path):
    """Also where the number of images is no multiple of the batch; the next epoch has another order."""
    crops, read = MultiCropDataset(folder_of(tmp_path), settings()), []
    crops.name = read.append
    for i in range(30):
        crops.cache.clear()
        crops.load_sample(i, [])
        read.append(int(crops.reading[0]))
    epochs = [read[k : k + 10] for k in (0, 10, 20)]
    assert all(sorted(x) == list(range(10)) for x in epochs) and epochs[0] != epochs[1]


# ---- loader ----------------------------------------------------------------------------------------------


def take(count, cfg, dataset, *args):
    return list(itertools.islice(make_loader(cfg, dataset, "cpu", *args), count))


def failure(*args):
    """The sentence with which a loader fails."""
    with pytest.raises(UserError) as caught:
        take(*args)
    for error in (caught.value, caught.value.__cause__):
        traceback.clear_frames(
            error.__traceback__
        )  # they hold the loader, which would take seconds to collect
    return str(caught.value)


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for k in a:
            assert torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k], k


def test_shapes(tmp_path):
    batch = take(1, settings(), folder_of(tmp_path))[0]
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if torch.is_tensor(v)}
    assert shapes["globals"] == ((8, 3, 32, 32), torch.float32)
    assert shapes["locals"] == ((8, 3, 16, 16), torch.float32)
    assert shapes["masks"] == ((8, 16), torch.bool) and shapes["samples"] == ((4,), torch.int64)
    assert batch["bad"] == [] and batch["samples"].tolist() == [0, 1, 2, 3]
    bare = settings("crops.local_crops_number=0", "ibot.mask_sample_probability=0")
    batch = take(1, bare, folder_of(tmp_path))[0]
    assert batch["locals"] is None and batch["masks"] is None and len(batch["mask_indices"]) == 0


def test_crop_major_order(tmp_path):
    """Row v * B + j is crop v of image j: images of one colour show who is where."""
    for k in range(4):
        plain((60 * k, 60 * k, 60 * k)).save(tmp_path / f"{k}.png")
    still = settings("crops.jitter_prob=0", "crops.solarize_prob=0", "crops.gray_prob=0")
    batch = take(1, still, open_source(f"folder:{tmp_path}"))[0]
    for x in (batch["globals"], batch["locals"]):
        level = x.mean((1, 2, 3))
        assert torch.allclose(level[:4], level[4:], atol=1e-4) and len(level[:4].unique()) == 4


def test_workers_change_nothing(tmp_path):
    dataset = folder_of(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    dataset = open_source(f"folder:{tmp_path}")
    assert_same(take(6, settings(), dataset), take(6, settings("train.num_workers=2"), dataset))


def test_resume_continues(tmp_path):
    dataset, cfg = folder_of(tmp_path), settings("train.accumulate=2")
    assert_same(take(10, cfg, dataset)[6:], take(4, cfg, dataset, 3))
    other = take(1, settings("train.accumulate=2", "train.seed=1"), dataset)
    assert not torch.equal(other[0]["globals"], take(1, cfg, dataset)[0]["globals"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_one_global_batch(tmp_path, accumulate):
    """Two ranks with half the batch see the images, crops and masks that one rank would see."""
    dataset, accumulation = folder_of(tmp_path, 20), f"train.accumulate={accumulate}"
    whole = take(2 * accumulate, settings("train.batch_size_per_gpu=4", accumulation), dataset)
    half = settings("train.batch_size_per_gpu=2", accumulation)
    ranks = zip(*(take(2 * accumulate, half, dataset, 0, r, 2) for r in (0, 1)))
    for alone, (first, second) in zip(whole, ranks):
        assert torch.equal(alone["samples"], torch.cat([first["samples"], second["samples"]]))
        for k in ("globals", "locals", "masks"):
            parts = [x[k].unflatten(0, (2, -1)) for x in (first, second)]
            assert torch.allclose(
                alone[k].unflatten(0, (2, -1)).float(), torch.cat(parts, 1).float(), atol=1e-5
            )


def test_bad_images_are_replaced_alike(tmp_path):
    """A substitute is a function of (seed, i) alone, and every failure is reported with its reason."""
    folder_of(tmp_path, 6)
    for k in range(3):
        (tmp_path / f"bad{k}.jpg").write_bytes(b"" if k else b"\xff\xd8\xff\xe0 torn")
    dataset = open_source(f"folder:{tmp_path}")
    first, second = take(6, settings(), dataset), take(6, settings(), dataset)
    assert_same(first, second)
    bad = [x for batch in first for x in batch["bad"]]
    assert {os.path.basename(path) for path, _ in bad} == {"bad0.jpg", "bad1.jpg", "bad2.jpg"}
    assert all(isinstance(reason, str) and reason for _, reason in bad)
    assert all(torch.isfinite(batch["globals"]).all() for batch in first)


def test_nothing_but_bad_images(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.jpg").write_bytes(b"<html>")
    for workers in (0, 1):
        said = failure(1, settings(f"train.num_workers={workers}"), open_source(f"folder:{tmp_path}"))
        assert "ten images in a row cannot be read" in said and "<html>" in said


def test_one_image_and_a_larger_batch(tmp_path):
    batch = take(2, settings("train.batch_size_per_gpu=8"), folder_of(tmp_path, 1))[1]
    assert batch["globals"].shape[0] == 16 and not torch.equal(batch["globals"][0], batch["globals"][1])


class Broken:
    """Reads images until image 3, then does what its name says."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def name(self, i):
        return f"/images/{i}.png"

    def __getitem__(self, i):
        if i == 3:
            self.how()
        return plain(size=(40, 40)), 0


def divide():
    return 1 / 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(4)


@pytest.mark.parametrize("how,workers", [(divide, 0), (divide, 2), (die, 2), (hang, 2)])
def test_errors_name_the_image(how, workers, monkeypatch):
    monkeypatch.setattr(data, "LOADER_TIMEOUT", 1)
    start = time.monotonic()
    said = failure(3, settings(f"train.num_workers={workers}"), Broken(how))
    cause = {divide: "ZeroDivisionError", die: "signal|exited", hang: "timed out"}[how]
    assert "/images/3.png" in said and any(x in said for x in cause.split("|")) and "\n" not in said
    assert time.monotonic() - start < 20


def test_small_images_stay_decoded(tmp_path):
    crops = MultiCropDataset(folder_of(tmp_path, 4), settings())
    first = crops[0, 0]
    assert len(crops.cache) == 4 and crops.cache_room == data.CACHE_BYTES - 4 * 40 * 30 * 3
    again = crops[0, 0]
    assert all(torch.equal(a, b) for a, b in zip(first["views"], again["views"]))


def test_to_tensor():
    image = plain(size=(5, 3))
    assert to_tensor(image).shape == (3, 3, 5) and to_tensor(image)[:, 1, 2].tolist() == list(RED)


class Streams:
    """Writes down what a GPU's streams would be told."""

    def __init__(self):
        self.said, self.on = [], "main"
        outer = self

        class Stream:
            def __init__(self, name="side"):
                self.name = name

            def wait_stream(self, other):
                outer.said.append(f"{self.name} waits for {other.name}")

        self.Stream, self.current_stream = Stream, lambda: Stream("main")

    @contextlib.contextmanager
    def stream(self, side):
        self.on = side.name
        yield
        self.on = "main"


def test_the_next_batch_travels_beside_the_step(monkeypatch):
    """Batch k + 1 is asked for in the side stream before batch k is used; the streams wait for each other."""
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device: streams)
    real = data.to_device
    monkeypatch.setattr(data, "to_device",
                        lambda *a: streams.said.append(f"load on {streams.on}") or real(*a))  # fmt: skip
    loader = data.make_loader(config.load(model="debug"), sources.open_source("scenes:20"), "cpu")
    waits = ["main waits for side", "side waits for main"]
    next(loader)
    assert streams.said == 2 * [*waits, "load on side"]
    next(loader)
    assert streams.said == 3 * [*waits, "load on side"] and streams.on == "main"


def test_a_loader_that_has_failed_is_not_asked_again(monkeypatch):
    """It reads ahead, so an error waits for its turn; after a kill, other workers may be in mid-message."""
    asked, real = itertools.count(1), data.batch_or_error

    def read(*args):
        n = next(asked)
        assert n < 4, "asked again"
        if n == 3:
            return UserError("a worker is dead")
        return real(*args)

    monkeypatch.setattr(data, "batch_or_error", read)
    loader = make_loader(config.load(model="debug"), open_source("scenes:20"), "cpu")
    assert len([next(loader), next(loader)]) == 2
    with pytest.raises(UserError, match="dead"):
        next(loader)
