"""Decoding: the bytes of a file -> an upright RGB image of 8 bits, whatever camera or sensor wrote it.

Pillow reads photographs. Sensors write other numbers: 12 bits in 16, Kelvin, Hounsfield units, counts, two to
hundreds of bands. Two settings say how these become colours, for all images of a data set alike (`Reading`):

    data.range=[0,4095]     what becomes black and white; measured once, over a sample, where it is not given
    data.bands=[3,2,1]      which channels are red, green and blue, counted from 1; or one, as grey

The range never touches files of 8 bits. What can't be read right is a BadImage that says what the file holds.
"""

import importlib
import io
import math
import os
import re
import stat
import struct
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff
from PIL.Image import Transpose

# Pillow reads fifty formats, and most of its security holes were in the rare ones: name those we want.
PILLOW_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"]
EXTENSIONS = [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"]
# Formats of phones, each read if its module is there: what adds it to Pillow, and what to install.
PHONE_FORMATS = {
    ".heic": ("HEIF", "pillow_heif", "pillow-heif"),
    ".heif": ("HEIF", "pillow_heif", "pillow-heif"),
    ".avif": ("AVIF", "PIL._avif", "'pillow>=11.3'"),
    ".jxl": ("JXL", "pillow_jxl", "pillow-jxl-plugin"),
}
PHONE_MARKS = {".heic": rb"....ftyp(he|mif1)", ".avif": rb"....ftypav", ".jxl": rb"\xff\x0a|....JXL "}
MAX_PIXELS = 64_000_000  # 192 MB as RGB; Pillow merely warns at 144 million
MAX_FILE_BYTES = 1 << 29  # of an image: the limit of pixels at 8 bytes each
SAMPLE = 64  # images of a data set that are looked at, evenly spread, to measure its range
SAMPLE_NUMBERS = 4096  # of each
DECODING_ERRORS = (OSError, ValueError, SyntaxError, MemoryError, struct.error, Image.DecompressionBombError)
PERCENTILES = (0.1, 99.9)  # of these numbers: single hot or dead pixels do not count
LARGEST = 1e15  # what is beyond is no measurement: "no data" is often written as -3.4e38
HEADROOM = 0.15  # of the span between them, left free at both ends: the sample does not hold the extremes


class BadImage(Exception):
    """One image that cannot be used: BadImage(path, reason). Training replaces it and counts it."""

    def __str__(self):
        path, reason = self.args
        return f"{path}: {reason}"


class Reading(NamedTuple):
    """How the numbers in the files of a data set become colours."""

    range: tuple[float, float] | None = None  # black and white, for files that do not have 8 bits
    bands: tuple[int, ...] | None = None  # one or three, counted from 1; None: as the file says

    @classmethod
    def from_config(cls, section):
        """As cfg.data, or curation's settings of ingest, have it."""
        return cls(*(None if value == "auto" else value for value in (section.range, section.bands)))


def add_phone_formats():
    """Register the formats of phones whose plugin is installed: they join the two lists above."""
    for extension, (name, module, _) in PHONE_FORMATS.items():
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
        PILLOW_FORMATS.append(name)
        EXTENSIONS.append(extension)


def open_regular(path, limit=None):
    """A file, opened for bytes. OSError unless it is a regular file (no pipe, no device) within the limit.

    limit: in bytes; None: that of an image.
    """
    limit = MAX_FILE_BYTES if limit is None else limit
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file")
    if not status.st_size and limit < math.inf:  # files of /proc say so, too, and may never end
        raise OSError("it is empty")
    if status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes, the limit is {limit:,}")
    return open(path, "rb")


def decode_image(source, name, inspect=None, reading=None):
    """File path or bytes -> PIL RGB, upright; with `inspect`, its result for the image just opened.

    Raises BadImage(name, reason) for whatever is wrong with the file.
    """
    reading = reading or Reading()
    with open_picture(source, name, reading.bands) as picture:
        if isinstance(picture, np.ndarray):
            picture = to_8_bits(picture, reading.range)
        if inspect:
            return inspect(picture)
        return to_rgb(upright(picture))


@contextmanager
def open_picture(source, name, bands=None):
    """File path or bytes -> Pillow's image, not loaded yet; or numbers (H, W, 1 or 3) of other than 8 bits.

    Whatever goes wrong, also in the body of the `with`, is a BadImage.
    """
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            head = file.read(12)
            numbers = None
            if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                try:
                    numbers = read_tiff(file, bands)
                except (TypeError, LookupError, AttributeError) as error:
                    raise ValueError(f"its tags are damaged: {error!r}") from error
            yield open_with_pillow(file, bands) if numbers is None else numbers
    except UnidentifiedImageError as error:
        raise BadImage(name, describe_unknown(head)) from error
    except DECODING_ERRORS as error:
        raise BadImage(name, str(error) if type(error) is ValueError else repr(error)) from error


def describe_unknown(head):
    """What the first 12 bytes of a file that Pillow does not know tell about it."""
    for extension, mark in PHONE_MARKS.items():
        if re.match(mark, head, re.DOTALL) and PHONE_FORMATS[extension][0] not in PILLOW_FORMATS:
            package = PHONE_FORMATS[extension][2]
            return f"a file of {extension[1:].upper()}, which needs an extra: pip install {package}"
    return f"no known format: {head}"


def open_with_pillow(file, bands):
    """-> Pillow's image, not loaded; or (H, W, C) numbers if it has more than 8 bits."""
    image = Image.open(file, formats=PILLOW_FORMATS)
    check_size(*image.size)
    numbers = None
    if image.mode[0] in "IF":  # grey of 16 or 32 bits, or floats
        numbers = np.asarray(upright(image))[..., None]
    elif image.format == "PNG" and image.tile and image.tile[0].args in ("RGB;16B", "RGBA;16B"):
        numbers = deep_png(file, image)
    elif bands:
        numbers = np.asarray(upright(image if image.mode in ("L", "LA", "RGB", "RGBA") else to_rgb(image)))
        numbers = numbers if numbers.ndim == 3 else numbers[..., None]
    return image if numbers is None else choose_bands(numbers, bands)


def deep_png(file, image):
    """The numbers of a PNG with 16 bits a channel, (H, W, 3) uint16.

    Pillow gives the upper byte of each, and would give the lower one if it took the file for little-endian.
    """
    upper = np.asarray(upright(image.convert("RGB")), np.uint16)
    again = Image.open(file, formats=["PNG"])
    again.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in again.tile]
    lower = np.asarray(upright(again.convert("RGB")), np.uint16)
    return upper << 8 | lower


def check_size(width, height):
    if width * height > MAX_PIXELS:  # from the header, before any memory is spent
        remedy = "cut it into tiles (python -m tools.tiles)"
        raise ValueError(f"{width} x {height} pixels, the limit is {MAX_PIXELS:,}: {remedy}")


# ---------------------------------------------------------------- TIFF, beyond photographs

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # photometric interpretations
OPACITY = (1, 2)  # meanings of an extra sample; 0 is "unspecified"
KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint"}  # sample formats
GREY_OF_PILLOW = ("uint8", "uint16", "int32", "float32")  # read right by itself; uint32 would wrap


def read_tiff(file, bands):
    """The first page of a TIFF -> (H, W, C) numbers, C 1 or 3; None for what Pillow reads right by itself.

    Raises ValueError, with the tags, for what has no meaning as a picture.
    """
    tags = tiff_tags(file)
    check_size(tags[tiff.IMAGEWIDTH], tags[tiff.IMAGELENGTH])
    samples = tags.get(tiff.SAMPLESPERPIXEL, 1)
    photometric = tags.get(tiff.PHOTOMETRIC_INTERPRETATION, BLACK_IS_ZERO)
    kind = KINDS.get(tags.get(tiff.SAMPLEFORMAT, (1,))[0], "complex")
    kind += str(tags.get(tiff.BITSPERSAMPLE, (1,))[0])
    extra = tags.get(tiff.EXTRASAMPLES, "none")
    found = f"{samples} samples of {kind}, PhotometricInterpretation {photometric}, ExtraSamples {extra}"
    if is_ordinary(tags, samples, photometric, kind):
        if tiff.EXTRASAMPLES in tags and not bands:
            check_opacity(file, samples)
        return None
    if photometric == RGB and not bands:
        bands = (1, 2, 3)  # so the standard has it: others are extra
    if samples not in (1, 3) and not bands:
        raise ValueError(f"{found}: choose three with data.bands=[3,2,1], or one")
    numbers = choose_bands(read_with_tifffile(file, found), bands)
    if photometric == WHITE_IS_ZERO and numbers.dtype.kind == "u":
        numbers = np.iinfo(numbers.dtype).max - numbers
    turn = TURNS.get(tags.get(ExifTags.Base.Orientation))
    return turn(numbers) if turn else numbers


def tiff_tags(file):
    """The tags of the first page of a TIFF. Raises ValueError if it has no size."""
    file.seek(0)
    header = file.read(8)
    if 43 in header[2:4]:  # BigTIFF
        header += file.read(8)
    tags = tiff.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    if tiff.IMAGEWIDTH not in tags or tiff.IMAGELENGTH not in tags:
        raise ValueError("a TIFF without width or height")
    return tags


def is_ordinary(tags, samples, photometric, kind):
    """Whether Pillow reads it right: grey, and what photographs hold, bytes of RGB, CMYK, a palette."""
    if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB) or max(tags.get(tiff.BITSPERSAMPLE, (1,))) < 8:
        return True
    if samples == 1:
        return kind == "uint8" or (kind in GREY_OF_PILLOW and photometric == BLACK_IS_ZERO)
    colours = 3 if photometric == RGB else 1
    extra = tags.get(tiff.EXTRASAMPLES, ())
    with_opacity = samples == colours + 1 and len(extra) == 1 and extra[0] in OPACITY
    chunky = tags.get(tiff.PLANAR_CONFIGURATION, 1) == 1
    return kind == "uint8" and chunky and (samples == colours or with_opacity)


def check_opacity(file, samples):
    """Raise ValueError if what a TIFF calls opacity looks like a measurement: GDAL may mark any 4th band."""
    file.seek(0)
    image = Image.open(file, formats=["TIFF"])
    opacity = np.asarray(image.getchannel(image.getbands()[-1]))
    if np.isin(opacity, (0, 255)).mean() < 0.5 and np.ptp(opacity) > 0:
        choice = [1] if samples == 2 else [1, 2, 3]
        found = f"band {samples} is marked as opacity, but looks like a measurement"
        raise ValueError(f"{found}: choose with data.bands={choice}")


def read_with_tifffile(file, found):
    """The numbers of the first page, (H, W, samples). Raises ValueError, also without tifffile."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(f"{found}, which needs an extra: pip install tifffile") from None
    file.seek(0)
    try:
        page = tifffile.TiffFile(file).pages[0]
        numbers = page.asarray()
    except Exception as error:  # its own errors have many types
        raise ValueError(f"{found}: {error}") from error
    if set(page.axes) - set("YXS") or numbers.dtype.kind not in "uif":
        raise ValueError(f"{found}: axes {page.axes} of {numbers.dtype} are no picture")
    return np.moveaxis(numbers, page.axes.index("S"), -1) if "S" in page.axes else numbers[..., None]


# Rows and columns of an array (H, W, C) -> upright, by the number of EXIF's and TIFF's orientation.
TURNS = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
}

TRANSPOSE = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}  # the same for Pillow
LYING = [TRANSPOSE[number] for number in (5, 6, 7, 8)]  # width and height are exchanged

# ---------------------------------------------------------------- from numbers to colours


def choose_bands(numbers, bands):
    """(H, W, samples) -> (H, W, 1 or 3): the bands asked for, counted from 1. Raises ValueError."""
    samples = numbers.shape[-1]
    if not bands:
        return numbers
    if max(bands) > samples:
        raise ValueError(f"it has {samples} bands: there is no band {max(bands)} (data.bands={list(bands)})")
    return numbers[..., [band - 1 for band in bands]]


def to_8_bits(numbers, limits):
    """(H, W, 1 or 3) numbers -> PIL RGB: `limits` become black and white; bytes stay as they are.

    NaN and "no data" become black. Raises ValueError if half of them are no numbers, or without limits.
    """
    if numbers.dtype != np.uint8:
        finite = np.abs(numbers.astype(np.float64)) <= LARGEST  # NaN is not, either
        if finite.mean() < 0.5:
            raise ValueError("most of its pixels are NaN or infinite")
        if not limits:
            raise ValueError(f"numbers of {numbers.dtype} without a range: give data.range=[black, white]")
        low, high = limits
        scaled = (np.where(finite, numbers, low) - low) * (255 / (high - low))
        numbers = scaled.clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(numbers, (*numbers.shape[:2], 3)).copy())


def measure_range(dataset):
    """The range of a data set of image files, (black, white); None if its files have 8 bits.

    Two percentiles over a sample, with some headroom: about what a camera's exposure leaves free.
    """
    sample = []
    for i in np.unique(np.linspace(0, max(len(dataset) - 1, 0), SAMPLE).astype(int))[: len(dataset)]:
        with suppress(BadImage), dataset.open_picture(i) as picture:
            if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
                somewhere = np.random.default_rng(0).integers(0, picture.size, SAMPLE_NUMBERS)
                numbers = picture.reshape(-1)[somewhere].astype(np.float64)
                sample.append(numbers[np.abs(numbers) <= LARGEST])
    if not any(map(len, sample)):
        return None
    low, high = np.percentile(np.concatenate(sample), PERCENTILES)
    margin = HEADROOM * (high - low) or 1
    digits = 5 - math.floor(math.log10(high - low + 2 * margin))
    return round(float(low - margin), digits), round(float(high + margin), digits)


def read_orientation(image):
    """The EXIF orientation of Pillow's image, 1 to 8; 1, as it is, also if that block is damaged.

    Metadata never decides over pixels.
    """
    try:
        number = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the parser raises almost anything: struct.error, SyntaxError, TypeError
        return 1
    return number if number in range(1, 9) else 1


def find_turn(image):
    """Loads an image -> the Transpose that makes it upright, or None.

    Pillow turns a TIFF itself when it loads it, and then forgets the orientation: so it is asked after that.
    (verify() would pass half a JPEG; loading it does not.)
    """
    image.load()
    return TRANSPOSE.get(read_orientation(image))


def upright(image):
    """Turned as its EXIF says."""
    turn = find_turn(image)
    return image if turn is None else image.transpose(turn)


def to_rgb(image):
    """Any Pillow mode of 8 bits -> RGB. What is transparent becomes white, as on a web page."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W), stored pixel by pixel (channels last)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


add_phone_formats()
