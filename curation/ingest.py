"""Ingest: each image is read once, decoded, measured and hashed -> one row of JSON.

A row holds the image's place (`path`, or `shard` and `key`; `at`: offset and size there), its label, SHA-256,
size and format, four scores from 0 on, and two perceptual hashes; or why it cannot be read.
A damaged shard has a row of its own, after those of its images.
"""

import hashlib
import json
import os

import numpy as np
from PIL import Image

from curation.manifest import load_bytes
from curation.pieces import list_entries, run_jobs
from decode import LYING, BadImage, decode_image, find_turn, to_rgb
from runfolder import atomic_write_text
from sources import LOOSE_FILE, NO_IMAGE

THUMBNAIL = 128  # pixels, at least, of the short side of the grey picture on which everything is measured


def ingest(state):
    """Each piece -> a file of rows, unless it is there; then read them as columns."""

    def job(index):
        piece = state.pieces[index]
        entries, damage = list_entries(piece)
        rows = [examine(entry, state.reading) for entry in entries]
        if damage:  # a row of the shard itself, without a place in it
            rows.append(dict(path=os.path.abspath(piece), label=None, why="unreadable", detail=damage))
        lines = [json.dumps(row) + "\n" for row in rows]
        atomic_write_text(state.row_files[index], "".join(lines))

    todo = [index for index, file in enumerate(state.row_files) if not file.exists()]
    run_jobs(job, todo, state.workers)
    state.read_columns()


def examine(entry, reading=None):
    """One image -> its row. reading: how numbers become colours (decode.Reading)."""
    name, label, offset, size = entry
    shard, _, member = name.partition("::")
    if offset == LOOSE_FILE:
        row = dict(path=os.path.abspath(name))
    else:
        folder, base = os.path.split(member)
        row = dict(shard=os.path.abspath(shard), key=os.path.join(folder, base.split(".")[0]))
    row |= dict(label=label, at=[offset, size])
    try:
        if offset == NO_IMAGE:
            raise BadImage(name, "the shard has no whole image of this key")
        data = load_bytes(row)
        row |= dict(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        row |= decode_image(data, name, measure, reading)
        if not row["format"]:  # of numbers that became an image: as the file is called
            row["format"] = Image.registered_extensions().get(os.path.splitext(name)[1].lower(), "TIFF")
        return row
    except (BadImage, OSError) as error:
        return row | dict(why="unreadable", detail=str(error.args[-1]))


def measure(image):
    """An image just opened -> its size, format, scores and hashes, from one small grey version of it.

    libjpeg decodes a JPEG at half, a quarter or an eighth of its size straight from the coefficients
    ("draft"), brightness only.
    """
    width, height = image.size
    image_format = (image.format or "").replace("MPO", "JPEG")  # a camera's JPEG that holds several pictures
    image.draft("L", (THUMBNAIL, THUMBNAIL))
    turn = find_turn(image)
    if turn in LYING:
        width, height = height, width
    grey = image
    if image.mode != "L" or "transparency" in image.info:
        grey = to_rgb(image).convert("L")
    grey = grey.reduce(max(min(grey.size) // THUMBNAIL, 1))
    if turn is not None:
        grey = grey.transpose(turn)
    share_below = np.cumsum(grey.histogram()) / (grey.width * grey.height)  # (256,) of the pixels
    small = grey.reduce(2) if min(grey.size) >= 64 else grey  # enough for the hashes, in half the time
    return dict(width=width, height=height, format=image_format,
                sharpness=sharpness(grey),
                entropy=abs(grey.entropy()),
                dark=np.searchsorted(share_below, 0.99) / 255,
                bright=np.searchsorted(share_below, 0.05) / 255,
                phash=f"{phash(small):016x}",
                dhash=f"{dhash(small):016x}")  # fmt: skip


def sharpness(grey):
    """Variance of the Laplacian (4 times a pixel minus its four neighbours) over that of the picture itself.

    Without the division, a sharp picture of low contrast would pass for a blurred one.
    """
    pixels = np.asarray(grey, np.int16)
    neighbours = [pixels[:-2, 1:-1], pixels[2:, 1:-1], pixels[1:-1, :-2], pixels[1:-1, 2:]]
    laplacian = 4 * pixels[1:-1, 1:-1] - neighbours[0] - neighbours[1] - neighbours[2] - neighbours[3]
    if not laplacian.size:
        return 0.0
    return float(laplacian.var(dtype=np.float32) / (pixels.var(dtype=np.float32) + 1))


DCT = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))  # (8, 32): the 8 slowest waves


def phash(grey):
    """64 bits: which of the 8 x 8 slowest cosine waves of the picture are above their median."""
    pixels = np.asarray(grey.resize((32, 32), Image.LANCZOS), np.float64)
    waves = DCT @ pixels @ DCT.T
    return to_integer(waves > np.median(waves))


def dhash(grey):
    """64 bits: where a picture of 8 rows of 9 pixels grows brighter to the right."""
    pixels = np.asarray(grey.resize((9, 8), Image.LANCZOS))
    return to_integer(pixels[:, 1:] > pixels[:, :-1])


def to_integer(bits):
    """bool (8, 8) -> an integer of 64 bits, the first one highest."""
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
