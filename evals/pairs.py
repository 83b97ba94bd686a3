"""Pairs for dense evaluation: images with a mask or a depth map.

`pairs:IMAGES_DIR:TRUTH_DIR` matches files by name: images/a/1.jpg belongs to masks/a/1.png. `scenes:COUNT`
are the embedded scenes, whose masks and depth are exact. Masks are grey or palette images of class numbers,
depth maps are 16-bit images, or .npy files in metres. A pair that cannot be used is left out and named; many
of them point to wrong settings rather than bad files, and are an error.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import UserError
from features import load_image
from sources import EXTENSIONS, MAX_PIXELS, PILLOW_FORMATS, BadImage, open_regular, open_source


def read_plane(path):
    """An .npy file or a grey or palette image -> array (h, w). Raises BadImage, whatever is wrong with it."""
    try:
        with open_regular(path) as file:
            if is_npy(path):
                plane = np.load(file, allow_pickle=False)
            else:
                plane = read_pixels(file)
        if plane.ndim != 2 or plane.dtype.kind not in "buif":
            raise ValueError(f"an array {plane.shape} of {plane.dtype}, not one number per pixel")
        return plane
    except Exception as e:  # Pillow and NumPy may raise anything for a damaged file
        raise BadImage(path, repr(e)) from e


def read_pixels(file):
    """An open grey or palette image -> array (h, w)."""
    with Image.open(file, formats=PILLOW_FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        return np.asarray(image)


def is_npy(path):
    return path.suffix.lower() == ".npy"


def read_mask(path, settings):
    """-> int16 (h, w), the class of each pixel, -1 for void."""
    plane = read_plane(path)
    C = len(settings.names)
    void = plane == settings.ignore
    labels = plane.astype(np.int64)
    if settings.ignore == 0:  # as in ADE20k, where the first class is 1
        labels -= 1
    wrong = ~void & ((labels < 0) | (labels >= C) | (plane % 1 > 0))
    if wrong.any():
        found = f"label {plane[wrong].max()}, on {wrong.mean():.2%} of the pixels,"
        known = f"one of the {C} classes nor void ({settings.ignore})"
        raise BadImage(path, f"{found} is neither {known}: see --classes and --ignore")
    return torch.from_numpy(np.where(void, -1, labels).astype(np.int16))


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


class Pairs:
    """`self[i]` is (PIL RGB, truth (h, w)), or None for a pair that cannot be used, with the reason in `bad`.

    The truth is what `read_mask` or `read_depth` returns. Raises UserError for a source without masks or
    depth, and when too many pairs cannot be used.
    """

    def __init__(self, uri, settings):
        self.uri = uri
        self.settings = settings
        self.truth_files = None  # scenes come with their truth
        self.bad = {}  # {number: path and reason}
        kind, *folders = uri.split(":")
        if kind == "scenes":
            self.images = open_source(uri)
        elif kind == "pairs" and len(folders) == 2:
            images_dir, truth_dir = map(os.path.expanduser, folders)
            self.images = open_source(f"folder:{images_dir}")
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
        height, width = truth.shape
        if (width, height) != image.size:
            sizes = f"{width} x {height} pixels, but its image has {image.width} x {image.height}"
            raise BadImage(path, f"{sizes}: make them equal")
        return image, truth

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
