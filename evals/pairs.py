"""Pairs for dense evaluation: images with a mask or a depth map.

`pairs:IMAGES_DIR:TRUTH_DIR` matches files by name: images/a/1.jpg belongs to masks/a/1.png. `scenes:COUNT`
are the embedded scenes, whose masks and depth are exact. A pair that cannot be used is left out and named;
many of them point to wrong settings rather than bad files, and are an error.

Masks are grey (8 or 16 bits) or palette images of class numbers; the colours of a palette do not count. With
two classes, 0 and 255 stand for them. In RGB masks each colour is a class, in the order of red, then green,
then blue, if there are as many colours as classes; with --ignore 0 black is void. JPEG is refused: it invents
values at edges. Depth maps are 16-bit images, or .npy files in metres.

Images are turned upright as their EXIF orientation says, and so are masks with one of their own. A mask that
fits only the image as it is stored is turned with it. One that fits both ways, as on a square image, counts
as drawn on the upright image, unless the others of its folder fit only as stored. A note says which.
"""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from decode import (
    EXTENSIONS,
    MAX_PIXELS,
    PILLOW_FORMATS,
    BadImage,
    Reading,
    decode_image,
    open_regular,
    read_orientation,
    upright,
)
from features import load_image
from sources import open_source
from survey import print_warnings

COLOR = 1 << 32  # added to 0xRRGGBB, so that no colour is mistaken for a number in a mask
BINARY = ({0, 255}, {0, 65535})  # black and white, in 8 and 16 bits
UNKNOWN = -2  # a value of a mask that is neither a class nor void
WRONG_VALUE_REMEDY = (
    "set --classes and --ignore, or, if masks number instances or have soft edges, write class numbers"
)
ALL_VOID = "no pixel of {} has a class, all are void: see --classes and --ignore"
MAX_VALUES = 1000  # of a set of masks in colours; more are no classes


# ---------------------------------------------------------------- files


def read_plane(path, colors=False):
    """An .npy file or a grey or palette image -> array (h, w). Raises BadImage, whatever is wrong with it.

    With `colors` RGB images are read, too: a grey pixel is its grey value, others are COLOR + 0xRRGGBB.
    """
    try:
        with open_regular(path) as file:
            if is_npy(path):
                plane = np.load(file, allow_pickle=False)
            else:
                plane = read_pixels(file)
        if colors and plane.ndim == 3 and plane.shape[2] == 3 and plane.dtype == np.uint8:
            plane = pack_colors(plane)
        if plane.ndim != 2 or plane.dtype.kind not in "buif":
            raise ValueError(f"an array {plane.shape} of {plane.dtype}, not one number per pixel")
        return plane
    except Exception as e:  # Pillow and NumPy may raise anything for a damaged file
        raise BadImage(path, str(e) if type(e) is ValueError else repr(e)) from e


def read_pixels(file):
    """An open image -> array, upright: (h, w) for grey and palette images, (h, w, 3) for RGB."""
    with Image.open(file, formats=PILLOW_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        if image.format == "JPEG":
            raise ValueError("it is a JPEG, whose values are not exact at edges: save it as PNG")
        pixels = np.asarray(upright(image))
        if image.mode not in ("LA", "RGBA"):
            return pixels
    if (pixels[..., -1] < 255).any():
        raise ValueError("some of its pixels are transparent: save it without an alpha channel")
    return pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]


def pack_colors(pixels):
    """RGB (h, w, 3) -> int64 (h, w): the value of a grey pixel, COLOR + 0xRRGGBB of any other."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    grey = (red == green) & (green == blue)
    return np.where(grey, red, COLOR + (red << 16) + (green << 8) + blue)


def color_name(value):
    """A value in a mask with colours -> "#rrggbb"."""
    return f"#{rgb_order(value):06x}"


def rgb_order(value):
    """A value in a mask with colours -> 0xRRGGBB."""
    return value - COLOR if value >= COLOR else int(value) * 0x010101


def is_npy(path):
    return path.suffix.lower() == ".npy"


def read_mask(path, settings):
    """-> int16 (h, w), the class of each pixel, -1 for void. Raises BadImage for a value that is neither."""
    plane = read_plane(path, colors=True)
    labels = value_labels(plane, settings)
    wrong = labels == UNKNOWN
    if wrong.any():
        found = f"{value_name(plane[wrong].max())}, on {wrong.mean():.2%} of the pixels,"
        raise BadImage(path, f"{found} is {wrong_value(settings)}")
    return torch.from_numpy(labels)


def value_labels(values, settings):
    """Values of masks, an array -> int16 of the same shape: the class of each, -1 for void, or UNKNOWN."""
    if settings.class_values:
        labels = np.full(values.shape, UNKNOWN, np.int16)
        for number, value in enumerate(settings.class_values):
            labels[values == value] = number
        if settings.ignore == 0:
            labels[values == 0] = -1
        return labels
    first = 1 if settings.ignore == 0 else 0  # as in ADE20k, where the first class is 1
    known = (values >= first) & (values < first + len(settings.names)) & (values % 1 == 0)
    labels = np.where(known, values, first).astype(np.int64) - first
    labels[~known] = UNKNOWN
    labels[values == settings.ignore] = -1
    return labels.astype(np.int16)


def value_name(value):
    return f"colour {color_name(value)}" if value >= COLOR else f"value {value:g}"


def wrong_value(settings):
    """What a value that stands for nothing is not, and what to do about it, in words."""
    if settings.class_values:
        names = map(color_name if max(settings.class_values) >= COLOR else str, settings.class_values)
        return f"none of {', '.join(names)}, the classes in the other masks: change those pixels"
    first = 1 if settings.ignore == 0 else 0
    known = f"neither a class ({first} to {first + len(settings.names) - 1}) nor void ({settings.ignore})"
    return f"{known}: {WRONG_VALUE_REMEDY}"


def read_depth(path, settings):
    """-> fp32 (h, w), metres, 0 for unknown or out of range."""
    plane = read_plane(path)
    scale = 1 if is_npy(path) else settings.depth_scale
    if not is_npy(path) and plane.dtype.itemsize == 1:
        raise BadImage(path, "8 bits are too few for depth: write a 16-bit PNG, or .npy in metres")
    metres = plane.astype(np.float32) / scale
    nearest, farthest = settings.depth_range
    known = (metres >= nearest) & (metres <= farthest)  # False for nan and inf
    if not known.any():
        wanted = f"{nearest:g} to {farthest:g} m"
        raise BadImage(path, f"no depth in {wanted}: see --depth-scale and --depth-range")
    return torch.from_numpy(np.where(known, metres, np.float32(0)))


def match_truth_files(images, images_dir, truth_dir):
    """For each image, the file in truth_dir with the same name but for the extension, or None."""
    files = [path for path in Path(truth_dir).rglob("*") if path.suffix.lower() in (*EXTENSIONS, ".npy")]
    files.sort()
    by_name = {relative_stem(path, truth_dir): path for path in files}
    matched = [by_name.get(relative_stem(images.name(i), images_dir)) for i in range(len(images))]
    if not any(matched):
        found = f"files such as {files[0].name}" if files else "no images and no .npy files"
        raise UserError(f"{truth_dir} holds {found}, none with the name of an image in {images_dir}")
    return matched


def relative_stem(path, folder):
    return os.path.splitext(os.path.relpath(path, folder))[0]


# ---------------------------------------------------------------- EXIF orientation


def image_frame(image):
    """An open image -> its EXIF orientation, 1 to 8, and its size (width, height) when it is upright."""
    orientation = read_orientation(image)
    return orientation, image.size[::-1] if orientation >= 5 else image.size


def turn_upright(truth, orientation):
    """A tensor (h, w) in the frame of an image as stored -> the same in the frame of the upright image."""
    if orientation >= 5:
        truth = truth.T
    flipped = ((), (1,), (0, 1), (0,))[(orientation - 1) % 4]
    return truth.flip(flipped)


def fitting_frames(truth_size, image_size, orientation):
    """The frames, of "upright" and "stored", in which a mask can belong to an image.

    Sizes are (width, height), that of the image when it is upright.
    """
    stored_size = image_size[::-1] if orientation >= 5 else image_size
    frames = {"upright"} if truth_size == image_size else set()
    if orientation > 1 and truth_size == stored_size:
        frames.add("stored")
    return frames


# ---------------------------------------------------------------- pairs


def fill_reading(settings, cfg, about):
    """--range and --bands, where not given, are those of a head's file, or the run's; or []. UserError."""
    given = {key: getattr(settings, key) or about.get(key) for key in ("range", "bands")}
    config.assign(cfg, {f"data.{key}": value for key, value in given.items() if value})
    config.check(cfg)
    for key in given:
        value = getattr(cfg.data, key)
        setattr(settings, key, [] if value == "auto" else list(value))


def reading_of(settings):
    """The decode.Reading of --range and --bands."""
    return Reading(tuple(settings.range or ()) or None, tuple(settings.bands or ()) or None)


class Pairs:
    """`self[i]` is (PIL RGB, truth (h, w)), or None for a pair that cannot be used, with the reason in `bad`.

    The truth is what `read_mask` or `read_depth` returns. Raises UserError for a source without masks or
    depth, and when too many pairs cannot be used.
    """

    def __init__(self, uri, settings):
        self.uri = uri
        self.settings = settings
        self.truth_files = None  # scenes come with their truth
        self.ambiguous_frame = "upright"  # of masks that fit both ways; see survey_frames
        self.bad = {}  # {number: path and reason}
        kind, *folders = uri.split(":")
        if kind == "scenes":
            self.images = open_source(uri)
        elif kind == "pairs" and len(folders) == 2:
            images_dir, truth_dir = map(os.path.expanduser, folders)
            self.images = open_source(f"folder:{images_dir}", reading_of(settings))
            settings.range = list(self.images.reading.range or ())  # one for all pairs
            print_warnings(self.images, uri)
            self.truth_files = match_truth_files(self.images, images_dir, truth_dir)
        else:
            raise UserError(f"{uri} has no masks or depth: write scenes:600 or pairs:IMAGES_DIR:MASKS_DIR")

    def __len__(self):
        return len(self.images)

    def files(self):
        """(data set, index) of each image."""
        return [(self.images, i) for i in range(len(self))]

    def read_scene(self, i):
        image, _, mask, depth = self.images.scene(i)
        truth = depth if self.settings.task == "depth" else mask.astype(np.int16)
        return Image.fromarray(image), torch.from_numpy(truth)

    def read_files(self, i):
        image, _ = load_image(self.images, i)
        path = self.truth_files[i]
        if path is None:
            raise BadImage(self.images.name(i), "there is no mask or depth of that name")
        read_truth = read_depth if self.settings.task == "depth" else read_mask
        truth = read_truth(path, self.settings)
        orientation, size = self.frame(i)
        height, width = truth.shape
        frames = fitting_frames((width, height), size, orientation)
        if not frames:
            sizes = f"{width} x {height} pixels, but its image has {image.width} x {image.height}"
            raise BadImage(path, f"{sizes}: make them equal")
        if frames == {"stored"} or (len(frames) == 2 and self.ambiguous_frame == "stored"):
            truth = turn_upright(truth, orientation)
        return image, truth

    def frame(self, i):
        """The EXIF orientation of image i and its size when it is upright. Raises BadImage."""
        name = self.images.name(i)
        return decode_image(name, name, image_frame, self.images.reading)

    def __getitem__(self, i):
        if i in self.bad:
            return None
        try:
            return self.read_files(i) if self.truth_files else self.read_scene(i)
        except BadImage as e:
            self.bad[i] = str(e)
        tolerated = max(len(self) // 10, min(len(self) - 1, 3))
        if len(self.bad) > tolerated:
            raise UserError(f"{len(self.bad)} pairs of {self.uri} cannot be used, the last: {self.bad[i]}")
        return None


# ---------------------------------------------------------------- what all masks of a run have in common


def survey_masks(sets, settings):
    """Look through all masks for how they must be read, and print what is not plain.

    sets: Pairs, the training set first, if there is one. Changes `settings.class_values`, unless a head
    came with them, and `ambiguous_frame` of each set. Returns the values in the masks of each set; empty for
    scenes and depth. Raises UserError for masks that cannot be told apart into classes.
    """
    values = []
    for pairs in sets:
        found = set()
        if pairs.truth_files:
            survey_frames(pairs)
        if pairs.truth_files and settings.task == "seg":
            found = survey_values(pairs)
        values.append(found)
    if any(values) and not settings.class_values:
        settings.class_values = find_class_values(sets, values, settings)
    if settings.class_values:
        print_class_values(settings)
    return values


def survey_frames(pairs):
    """Find out in which frame masks lie whose images carry an EXIF orientation, and print it."""
    counts = dict(upright=0, stored=0, both=0)
    for i, path in enumerate(tqdm(pairs.truth_files, "surveying images", disable=None, leave=False)):
        with suppress(BadImage):  # it is named when the pair is read
            orientation, size = pairs.frame(i)
            if path is None or orientation == 1:
                continue
            height, width = read_plane(path, colors=True).shape
            frames = fitting_frames((width, height), size, orientation)
            if frames:
                counts["both" if len(frames) == 2 else frames.pop()] += 1
    if counts["stored"] and not counts["upright"]:
        pairs.ambiguous_frame = "stored"
    if any(counts.values()):
        print_frames(pairs, counts)


def print_frames(pairs, counts):
    """counts: how many masks fit the upright image alone, the stored one alone, and both."""
    print(f"note: {sum(counts.values())} of {len(pairs)} images of {pairs.uri} carry an EXIF orientation")
    if counts["upright"]:
        print(f"      {counts['upright']} of their masks fit the upright image alone, and stay as they are")
    if counts["stored"]:
        print(f"      {counts['stored']} of their masks fit the stored image alone, and are turned with it")
    if counts["both"] and pairs.ambiguous_frame == "stored":
        print(f"      {counts['both']} fit both, and are turned like those")
    elif counts["both"]:
        rule = "count as drawn on the upright image, as viewers show it"
        remedy = "if they were drawn on the stored one, remove the orientation from the images"
        print(f"      {counts['both']} fit both, and {rule}; {remedy}")


def survey_values(pairs):
    """-> {value} of all masks of a set.

    Raises UserError if none of them can be read, all are void, or palettes contradict each other.
    """
    values = set()
    known_colors = {}
    last_error = None
    for path in tqdm(pairs.truth_files, "surveying masks", disable=None, leave=False):
        if path is None:
            continue
        try:
            values |= set(distinct(read_plane(path, colors=True)))
            check_palette(path, known_colors)
        except BadImage as error:  # named again when the pair is read
            last_error = error
        if len(values) > MAX_VALUES and max(values) >= COLOR:
            break
    if not values:
        raise UserError(f"no mask of {pairs.uri} can be read: {last_error}")
    if values == {pairs.settings.ignore} and not pairs.settings.class_values:
        raise UserError(ALL_VOID.format(pairs.uri))
    return values


def check_palette(path, known_colors):
    """Raise UserError if a colour has another index in this palette image than in those before.

    Some tools number the colours of each file anew. known_colors: {colour: (index, path)}, which grows.
    """
    for color, index in color_indices(path).items():
        known_index, known_path = known_colors.setdefault(color, (index, path))
        if index != known_index:
            found = f"colour {color} has index {index} in {path}, but {known_index} in {known_path}"
            raise UserError(f"{found}: palettes differ, so save class numbers as grey PNG")


def color_indices(path):
    """The colours in a palette image -> {(red, green, blue): index}, without those that its palette repeats.

    {} for any other readable file.
    """
    if is_npy(path):
        return {}
    with open_regular(path) as file, Image.open(file, formats=PILLOW_FORMATS) as image:
        if image.mode != "P":
            return {}
        palette = list(map(tuple, np.reshape(image.getpalette(), (-1, 3)).tolist()))
        used = distinct(np.asarray(image))
    return {palette[k]: k for k in used if k < len(palette) and palette.count(palette[k]) == 1}


def distinct(plane):
    """The values of an array, each once."""
    if plane.dtype.kind in "bu" and plane.itemsize <= 2:
        return np.bincount(plane.flatten()).nonzero()[0].tolist()  # faster than to sort them
    return np.unique(plane).tolist()


def find_class_values(sets, values, settings):
    """The values of the classes in order, or [] where they are the numbers of the classes.

    values: those in the masks of each set. Raises UserError where neither can be said.
    """
    together = set().union(*values)
    count = len(settings.names)
    if max(together) >= COLOR:
        if settings.ignore == 0:
            together.discard(0)
        numbers = {value for value in together if value < COLOR and value not in range(256)}
        if numbers or len(together) != count or settings.head:
            refuse_colors(sets, together, settings)
        return [int(value) for value in sorted(together, key=rgb_order)]
    binary = [pairs.uri for pairs, found in zip(sets, values) if found in BINARY]
    if count != 2 or settings.ignore == 0 or not binary:
        return []
    if together not in BINARY:
        found = ", ".join(f"{value:g}" for value in sorted(together)[:8])
        white = f"{binary[0]} has masks of black and white, yet together with the others they hold {found}"
        raise UserError(f"{white}: write class 1 as 1 in all of them")
    return [int(value) for value in sorted(together)]


def refuse_colors(sets, values, settings):
    """Raise UserError for masks whose colours are not one for each class."""
    uris = " and ".join(pairs.uri for pairs in sets)
    names = [color_name(value) for value in sorted(values) if value >= COLOR or value in range(256)]
    shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
    count = "more than a thousand" if len(values) > MAX_VALUES else len(names)
    found = f"the masks of {uris} are RGB of {count} colours ({shown})"
    if settings.head:
        raise UserError(f"{found}, and this head knows classes by number: save class numbers as grey PNG")
    remedy = "save class numbers as grey PNG, or count each colour as a class (black is void with --ignore 0)"
    raise UserError(f"{found}, not of {len(settings.names)}, one for each class: {remedy}")


def print_class_values(settings):
    """Say in one line which value or colour is which class."""
    values = settings.class_values
    kind = "colours" if max(values) >= COLOR else "values"
    name = color_name if kind == "colours" else str
    listed = [f"{name(value)} is class {number}" for number, value in enumerate(values)]
    if settings.ignore == 0:
        listed.append(f"{name(0)} is void")
    print(f"{kind} in the masks: {', '.join(listed)}")


def untrained_classes(values, settings):
    """The values in the training masks, {} if unknown -> [number of each class without a pixel there].

    Raises UserError if they hold a single class.
    """
    if not values:
        return []
    found = set(value_labels(np.array(sorted(values)), settings).tolist())
    absent = [number for number in range(len(settings.names)) if number not in found]
    if len(absent) == len(settings.names) - 1:
        listed = ", ".join(f"{value:g}" for value in sorted(values)[:8])
        remedy = "see --classes (2 reads 0 and 255 as two classes) and --ignore"
        raise UserError(f"the training masks hold a single class (values {listed}): {remedy}")
    return absent
