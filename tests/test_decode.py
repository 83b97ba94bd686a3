"""Decoding: sensors' numbers, bands, stacks, damaged metadata; photographs are in test_data.py."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import config
from config import UserError
from decode import BadImage, Reading, decode_image, describe_unknown
from sources import open_images, open_source

rng = np.random.default_rng(0)


def encode(image, kind, **options):
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def disc(side=96):
    """A bright disc with texture on a dark ground, (side, side) in 0..1."""
    y, x = np.mgrid[:side, :side] / side * 256
    inside = ((x - 128) ** 2 + (y - 110) ** 2) < 70**2
    scene = 0.15 + 0.7 * inside * (0.6 + 0.4 * np.sin(x / 5) * np.sin(y / 7))
    return (scene + rng.normal(0, 0.02, scene.shape)).clip(0, 1)


SCENE = disc()
YARDSTICK = (SCENE * 255).astype(np.uint8).astype(float)


def write_tiff(path, array, photometric=1, extra=(), planar=1, kind=1):
    """An array (h, w, samples) as an uncompressed TIFF of one strip a plane; kind: 1 unsigned, 3 float."""
    h, w, samples = array.shape
    planes = [array] if planar == 1 else [array[..., k] for k in range(samples)]
    planes = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    bits = [array.dtype.itemsize * 8] * samples
    starts = [8 + sum(map(len, planes[:k])) for k in range(len(planes))]
    tags = [(256, 4, [w]), (257, 4, [h]), (258, 3, bits), (259, 3, [1]), (262, 3, [photometric]),
            (273, 4, starts), (277, 3, [samples]), (278, 4, [h]), (279, 4, [*map(len, planes)]),
            (284, 3, [planar]), (338, 3, [*extra]), (339, 3, [kind] * samples)]  # fmt: skip
    tags = [tag for tag in tags if tag[2]]
    pixels = b"".join(planes)
    pixels += bytes(len(pixels) % 2)
    directory = 8 + len(pixels)
    behind = directory + 2 + 12 * len(tags) + 4  # long values
    entries = b""
    longs = b""
    for number, size, values in tags:
        packed = struct.pack(f"<{len(values)}{'HI'[size == 4]}", *values)
        if len(packed) > 4:
            place = struct.pack("<I", behind + len(longs))
            longs += packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", number, size, len(values)) + place
    count = struct.pack("<H", len(tags))
    path.write_bytes(struct.pack("<2sHI", b"II", 42, directory) + pixels + count + entries + bytes(4) + longs)


def agreement(image, wanted=YARDSTICK):
    """Contrast of an image over that of the wanted one, and their correlation."""
    got = np.asarray(image.convert("L") if wanted.ndim == 2 else image, float)
    return got.std() / wanted.std(), np.corrcoef(got.ravel(), wanted.ravel())[0, 1]


SENSORS = {
    "16 bits": (0, 65535, np.uint16, "png"),
    "12 bits": (0, 4095, np.uint16, "png"),
    "11 bits": (0, 2047, np.uint16, "tif"),
    "a dim microscope": (90, 420, np.uint16, "tif"),
    "centikelvin": (29000, 31500, np.uint16, "png"),
    "CT with an offset": (32568, 33068, np.uint16, "png"),
    "counts": (0, 2_000_000, np.int32, "tif"),
    "hounsfield": (-1000, 400, np.int32, "tif"),
    "decibels": (-30, 5, np.float32, "tif"),
    "a graymap": (0, 4095, np.uint16, "pgm"),
}


@pytest.mark.parametrize("low, high, dtype, ending", SENSORS.values(), ids=SENSORS)
def test_a_range_is_measured_over_the_data_set(tmp_path, low, high, dtype, ending):
    for k in range(3):
        numbers = (low + SCENE * (1, 1, 0.8)[k] * (high - low)).astype(dtype)
        numbers[0, 0] = high * 3 if dtype is not np.uint16 else 65535  # a hot pixel decides nothing
        if dtype is np.float32:
            numbers[0, 1:3] = np.nan, np.inf
        Image.fromarray(numbers).save(tmp_path / f"{k}.{ending}")
    dataset = open_source(f"folder:{tmp_path}")
    for image, _ in (dataset[0], dataset[1]):
        contrast, correlation = agreement(image)
        assert abs(contrast - 1) < 0.05
        assert correlation > 0.99
    darker = np.asarray(dataset[2][0]).mean()
    assert darker < 0.95 * np.asarray(dataset[0][0]).mean()  # one range for all
    exact = open_source(f"folder:{tmp_path}", Reading(range=(low, high)))
    contrast, correlation = agreement(exact[0][0])
    assert abs(contrast - 1) < 0.05
    assert correlation > 0.99


def test_a_range_never_touches_bytes(tmp_path):
    photo = Image.fromarray(YARDSTICK.astype(np.uint8))
    photo.save(tmp_path / "a.png")
    Image.fromarray((SCENE * 4095).astype(np.uint16)).save(tmp_path / "b.png")
    dataset = open_source(f"folder:{tmp_path}", Reading(range=(0, 1)))
    assert (np.asarray(dataset[0][0])[..., 0] == YARDSTICK).all()
    assert np.asarray(dataset[1][0]).min() == 255
    (tmp_path / "b.png").unlink()
    assert open_source(f"folder:{tmp_path}").reading.range is None


def test_colours_of_16_bits_keep_their_lower_bytes(tmp_path):
    numbers = (SCENE * 4095).astype(np.uint16)
    big_endian = np.stack([numbers, numbers // 2, numbers // 4], -1).astype(">u2")
    path = tmp_path / "a.png"
    path.write_bytes(png16(big_endian))
    image = open_source(f"folder:{tmp_path}", Reading(range=(0, 4095)))[0][0]
    red, _, blue = np.asarray(image, float).transpose(2, 0, 1)
    assert np.abs(red - numbers / 4095 * 255).max() < 1
    assert np.abs(blue - numbers // 4 / 4095 * 255).max() < 1


def png16(rgb):
    """(h, w, 3) big-endian uint16 -> the bytes of a PNG."""
    h, w, _ = rgb.shape
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks.items():
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return out


RGBN = np.stack([SCENE, 1 - SCENE, SCENE**2, 0.1 + 0.8 * SCENE], -1)  # red, green, blue, near infrared
RGB8 = (RGBN[..., :3] * 255).astype(np.uint8)
# What the file holds: (bands, type, photometric, extra samples, planes, format), and how it is read.
READ = {
    "bytes": ([0, 1, 2], np.uint8, 2, (), 1, 1),
    "planes": ([0, 1, 2], np.uint8, 2, (), 2, 1),
    "16 bits": ([0, 1, 2], np.uint16, 2, (), 1, 1),
    "floats": ([0, 1, 2], np.float32, 2, (), 1, 3),
    "an unspecified band": ([0, 1, 2, 3], np.uint8, 2, (0,), 1, 1),
    "16 bits and a band": ([0, 1, 2, 3], np.uint16, 2, (2,), 1, 1),
    "two bands more": ([0, 1, 2, 3, 3], np.uint8, 2, (0, 0), 1, 1),
    "uint32": ([0, 1, 2], np.uint32, 2, (), 1, 1),
}
SCALE = {np.uint8: 255, np.uint16: 10_000, np.uint32: 4_000_000_000, np.float32: 1}


def write_bands(path, bands, dtype, *tags):
    write_tiff(path, (RGBN[..., bands] * SCALE[dtype]).astype(dtype), *tags)


@pytest.mark.parametrize("bands, dtype, photometric, extra, planar, kind", READ.values(), ids=READ)
def test_bands_that_the_file_names(tmp_path, bands, dtype, photometric, extra, planar, kind):
    if dtype is not np.uint8 or planar == 2 or len(bands) > 3:
        pytest.importorskip("tifffile")
    write_bands(tmp_path / "a.tif", bands, dtype, photometric, extra, planar, kind)
    image, _ = open_source(f"folder:{tmp_path}", Reading(range=(0, SCALE[dtype])))[0]
    assert np.abs(np.asarray(image, float) - RGB8).max() <= 1


REFUSED = {
    "opacity that is none": (
        [0, 1, 2, 3],
        np.uint8,
        2,
        (2,),
        "band 4 is marked as opacity.*data.bands=.1, 2",
    ),
    "four of grey": ([0, 1, 2, 3], np.uint8, 1, (0, 0, 0), "4 samples of uint8.*choose three with data"),
    "two": ([3, 0], np.uint16, 1, (0,), "2 samples of uint16.*ExtraSamples .0,.*data.bands"),
    "eight": ([0, 1, 2, 3] * 2, np.uint16, 1, (0,) * 7, "8 samples of uint16.*data.bands=.3,2,1."),
}


@pytest.mark.parametrize("bands, dtype, photometric, extra, words", REFUSED.values(), ids=REFUSED)
def test_bands_without_a_meaning_are_asked_for(tmp_path, bands, dtype, photometric, extra, words):
    write_bands(tmp_path / "a.tif", bands, dtype, photometric, extra)
    with pytest.raises(BadImage, match=words):
        open_source(f"folder:{tmp_path}")[0]
    pytest.importorskip("tifffile")
    choice = (len(bands), 1, 1)
    image, _ = open_source(f"folder:{tmp_path}", Reading((0, SCALE[dtype]), choice))[0]
    wanted = RGBN[..., [bands[-1], bands[0], bands[0]]] * 255
    assert np.abs(np.asarray(image, float) - wanted).max() <= 1.1
    with pytest.raises(BadImage, match=f"it has {len(bands)} bands: there is no band 9"):
        open_source(f"folder:{tmp_path}", Reading((0, 1), (9,)))[0]


def test_without_tifffile_the_file_is_described(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    write_bands(tmp_path / "a.tif", [0, 1, 2], np.uint16, 2)
    with pytest.raises(BadImage, match="3 samples of uint16, .*pip install tifffile"):
        open_source(f"folder:{tmp_path}")[0]


def test_true_opacity_is_still_opacity(tmp_path):
    cut_out = np.dstack([RGB8, np.where(SCENE > 0.3, 255, 0).astype(np.uint8)])
    write_tiff(tmp_path / "a.tif", cut_out, 2, (2,))
    image = np.asarray(open_source(f"folder:{tmp_path}")[0][0])
    assert (image[SCENE <= 0.3] == 255).all()
    assert (image[SCENE > 0.3] == RGB8[SCENE > 0.3]).all()


def test_bands_of_a_palette_are_its_colours(tmp_path):
    photo = Image.fromarray(RGB8).quantize(16)
    photo.save(tmp_path / "a.png")
    image, _ = open_source(f"folder:{tmp_path}", Reading(bands=(3, 2, 1)))[0]
    assert (np.asarray(image) == np.asarray(photo.convert("RGB"))[..., ::-1]).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_costs_nothing():
    photo = Image.fromarray(RGB8)
    plain = decode_image(encode(photo, "JPEG"), "plain")
    for block in (b"MM\0*", b"XX\0*\0\0\0\x08", bytes(30), b"II*\0\xff\xff\xff\xff"):
        assert (
            decode_image(encode(photo, "JPEG", exif=b"Exif\0\0" + block), "cut").tobytes() == plain.tobytes()
        )


def test_formats_of_phones_are_named():
    assert "pip install pillow-heif" in describe_unknown(b"\0\0\0\x18ftypheic")
    assert "JXL, which needs an extra: pip install pillow-jxl" in describe_unknown(b"\xff\x0aW\x06\0\x13")
    assert "no known format" in describe_unknown(b"hello, world")


def test_an_avif_is_read(tmp_path):
    from PIL import features

    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.fromarray(RGB8).save(tmp_path / "a.avif", quality=95)
    image, _ = open_images([str(tmp_path)])[0]
    assert agreement(image, RGB8.astype(float))[1] > 0.98


def test_settings_of_the_run_reach_the_files():
    cfg = config.load(overrides=["data.range=[-1000, 400]", "data.bands=[3, 2, 1]"])
    assert Reading.from_config(cfg.data) == ((-1000, 400), (3, 2, 1))
    assert Reading.from_config(config.load().data) == (None, None)
    with pytest.raises(UserError, match="data.range .* must name the smaller number first"):
        config.load(overrides=["data.range=[5, 5]"])
    with pytest.raises(UserError, match="data.bands"):
        config.load(overrides=["data.bands=[0, 1, 2]"])


def test_no_data_is_no_measurement(tmp_path):
    """GDAL's -3.4e38 decides nothing and is black; large offsets keep their digits."""
    numbers = (SCENE * 100).astype(np.float32)
    numbers[:20] = -3.4e38
    Image.fromarray(numbers).save(tmp_path / "a.tif")
    dataset = open_source(f"folder:{tmp_path}")
    low, high = dataset.reading.range
    assert -50 < low < 10 and 80 < high < 150
    assert np.asarray(dataset[0][0])[:20].max() == 0
    config.load(overrides=[f"data.range={[low, high]}"])
    Image.fromarray((1e8 + SCENE * 50).astype(np.int32)).save(tmp_path / "a.tif")
    low, high = open_source(f"folder:{tmp_path}").reading.range
    assert 1e8 - 20 < low < 1e8 + 10 < 1e8 + 30 < high < 1e8 + 70


@pytest.mark.filterwarnings("ignore")  # Pillow comments on broken TIFF tags
def test_tags_turned_at_random_never_escape(tmp_path):
    write_bands(tmp_path / "a.tif", [0, 1, 2, 3], np.uint16, 2, (0,))
    content = np.frombuffer((tmp_path / "a.tif").read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(150):
        damaged = content.copy()
        damaged[generator.integers(len(content) - 220, len(content), 3)] = generator.integers(0, 256, 3)
        for bands in (None, (4, 1, 2)):
            try:
                image = decode_image(damaged.tobytes(), "damaged", reading=Reading((0, 10_000), bands))
                assert image.mode == "RGB"
            except BadImage as error:
                assert "\n" not in str(error)
