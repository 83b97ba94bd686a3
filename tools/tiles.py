"""Cut large pictures, slides and maps, into tiles that the other scripts read.

    python -m tools.tiles slide.tif tiles/ --size 512     # tiles/slide_r0003_c0012.png: row 3, column 12
    python -m tools.tiles folder:/data/maps tiles/ --size 1024 --keep-blank

Tiles without contrast (glass, sea) are left out, unless --keep-blank. What is left over at the right and at
the bottom is no tile. A picture is decoded as a whole, in 3 bytes a pixel: up to a gigapixel. Beyond that,
take the tiler of its format, such as OpenSlide's or GDAL's.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import config
import decode
from config import Pixels, UserError, argument
from decode import BadImage
from features import add_reading_args, apply_reading_args
from runfolder import atomic_open
from sources import open_images
from survey import FLAT

MAX_PIXELS = 1_000_000_000  # of one picture, 3 GB
MAX_BYTES = 1 << 33  # of its file


def cut(image, size, keep_blank=False):
    """PIL RGB -> (row, column, PIL tile) of each whole tile, those without contrast left out."""
    for row in range(image.height // size):
        for column in range(image.width // size):
            left = column * size
            top = row * size
            tile = image.crop((left, top, left + size, top + size))
            if keep_blank or np.asarray(tile.convert("L")).std() >= FLAT:
                yield row, column, tile


def write_tiles(image, stem, out, size, keep_blank=False):
    """-> how many tiles were written to the folder `out`, as out/STEM_rROW_cCOLUMN.png."""
    count = 0
    for row, column, tile in cut(image, size, keep_blank):
        with atomic_open(out / f"{stem}_r{row:04d}_c{column:04d}.png") as file:
            tile.save(file, "PNG")
        count += 1
    return count


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.tiles", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders, or a data URI; the last argument is the folder for tiles")
    add("--size", type=argument(Pixels), default=512, help="side of a tile, in pixels")
    add_reading_args(parser)
    add("--keep-blank", action="store_true", help="write tiles without contrast, too")
    args = parser.parse_args()
    if len(args.images) < 2:
        raise UserError("name the pictures, and last the folder for the tiles")
    *args.images, args.out = args.images
    return args


def main():
    args = parse_args()
    decode.MAX_PIXELS = MAX_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    decode.MAX_FILE_BYTES = MAX_BYTES
    images = open_images(args.images, apply_reading_args(args, config.load()))
    out = Path(args.out)
    total = 0
    used = set()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(len(images)), disable=None):
            name = images.name(i)
            try:
                image, _ = images[i]
            except BadImage as error:
                print(f"left out: {error}")
                continue
            stem = Path(name.partition("::")[2] or name).stem
            stem = f"{stem}-{i}" if stem in used else stem
            used.add(stem)
            count = write_tiles(image, stem, out, args.size, args.keep_blank)
            print(f"{name}: {image.width} x {image.height} pixels, {count} tiles")
            total += count
    except OSError as e:
        raise UserError(f"{out} cannot be written ({e}): name another folder") from None
    if not total:
        raise UserError(f"no tile was written: no picture has {args.size} x {args.size} pixels with contrast")
    print(f"wrote {total} tiles to {out}")


if __name__ == "__main__":
    config.run(main, "cut the picture with the tools of its format first")
