"""Where images come from: folders, tar shards, manifests, the embedded scenes; and how a file is decoded.

A URI, `train.dataset_path`, names a source, and becomes a data set: `dataset[i] -> (PIL RGB, label or -1)`.

    scenes:10000:seed=0:size=64      procedural images (scenes.py)
    folder:/data/images              images at any depth; sub-folders of the root are the classes
    tar:/data/{000..010}.tar         WebDataset shards, read in place
    list:/data/manifest.jsonl        one JSON object per line, as curation writes it

Only an index is kept in memory: names, labels, and where in a shard the bytes lie.
"""

import io
import json
import os
import re
import sys
import tarfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from config import UserError
from scenes import Scenes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
# Pillow reads fifty formats, and most of its security holes were in the rare ones: name those we want.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_PIXELS = 64_000_000  # 192 MB as RGB; Pillow merely warns at 144 million
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json file in a shard


class BadImage(Exception):
    """One image that cannot be used: BadImage(path, reason). Training replaces it and counts it."""

    def __str__(self):
        path, reason = self.args
        return f"{path}: {reason}"


class Entry(NamedTuple):
    """One sample of an index."""

    name: str | None  # a path, or "shard.tar::member"; None: a sample without a complete image
    label: int | str | None = None
    offset: int = -1  # of the first byte in the shard; -1: the name is a file of its own
    size: int = 0  # in bytes


class ImageFiles:
    """Image files, loose or in tar shards: `self[i] -> (PIL RGB, label or -1)`. Raises BadImage.

    `classes` is a sorted list of names or None; `dropped` counts the entries without an image. The name
    "shard.tar::member" is read in place; nothing is ever unpacked, so ../../etc/passwd is just a name.
    """

    def __init__(self, entries):
        kept = [Entry(*entry) for entry in entries if entry[0]]
        self.dropped = len(entries) - len(kept)
        self.classes = sorted({entry.label for entry in kept if isinstance(entry.label, str)}) or None
        index_of = {name: index for index, name in enumerate(self.classes or ())}

        def class_index(label):
            if isinstance(label, str):
                return index_of[label]
            return label if type(label) is int else -1

        self.labels = np.array([class_index(entry.label) for entry in kept])
        self.offsets = np.array([entry.offset for entry in kept])
        self.sizes = np.array([entry.size for entry in kept])
        # One array of bytes: a list of texts would end up copied in every worker.
        self.names = np.array([os.fsencode(entry.name) for entry in kept])

    def __len__(self):
        return len(self.names)

    def name(self, index):
        return os.fsdecode(self.names[index])

    def __getitem__(self, index):
        name = self.name(index)
        source = name
        if self.offsets[index] >= 0:
            shard_path = name.partition("::")[0]
            with open(shard_path, "rb") as shard:  # opened anew: workers can't share a file position
                shard.seek(self.offsets[index])
                source = shard.read(self.sizes[index])
        return decode_image(source, name), int(self.labels[index])


def sample_name(dataset, index):
    """What to call sample `index` in a message: its path, if the data set knows one."""
    return dataset.name(index) if hasattr(dataset, "name") else f"image {index}"


# ---------------------------------------------------------------- from a URI to a data set


def open_source(uri):
    """The data set of a URI: `dataset[i] -> (PIL RGB, label or -1)`, `len(dataset)`, `.classes` or None.

    Reads the URIs at the top of this file, and the published ImageNet:split=TRAIN:root=/path:extra=...
    Raises UserError when there is nothing to read.
    """
    kind, _, rest = uri.partition(":")
    options = dict(re.findall(r"(\w+)=([^:]*)", rest))
    scenes = re.fullmatch(r"(\d*)(:?(seed|size)=\d+)*", rest)
    if kind == "scenes" and scenes:
        count = int(scenes[1] or 100_000)
        return Scenes(count, **{key: int(value) for key, value in options.items()})
    if kind.startswith("ImageNet"):  # `extra` holds the authors' index files, which are not needed here
        if "root" not in options:
            raise UserError(f"dataset_path {uri!r} names no root; write {uri}:root=/path or folder:/path")
        kind = "folder"
        rest = os.path.join(options["root"], options.get("split", "train").lower())
    listing = {"folder": list_folder, "tar": list_tar, "list": list_manifest}.get(kind)
    if not listing or not rest:
        known = "scenes:10000, folder:/path, tar:/path/{000..010}.tar or list:/path/manifest.jsonl"
        raise UserError(f"dataset_path {uri!r} cannot be read; write {known}")
    entries = listing(os.path.expanduser(rest))
    dropped = sum(entry[0] is None for entry in entries)
    if dropped:
        print(f"{uri}: {dropped} of {len(entries)} samples have no complete image: left out", file=sys.stderr)
    if dropped == len(entries):
        raise UserError(f"{uri} holds no images; the formats read are {' '.join(EXTENSIONS)}")
    return ImageFiles(entries)


def open_images(paths):
    """The arguments of a command -> one data set: images, folders, .tar shards, .jsonl manifests; or one URI.

    Raises UserError for a path that does not exist, or when there is no image at all.
    """
    if len(paths) == 1 and ":" in paths[0] and not os.path.exists(paths[0]):
        return open_source(paths[0])
    entries = []
    for path in paths:
        if os.path.isdir(path):
            entries += list_folder(path)
        elif path.endswith(".tar"):
            entries += list_tar(path)
        elif path.endswith(".jsonl"):
            entries += list_manifest(path)
        elif os.path.isfile(path):
            entries.append(Entry(path))
        else:
            raise UserError(f"{path} does not exist: give images, folders, .tar files or one data URI")
    if not any(entry[0] for entry in entries):
        raise UserError(f"there are no images in {', '.join(map(str, paths)) or 'an empty list'}")
    return ImageFiles(entries)


def list_folder(root):
    """Images at any depth, sorted -> [Entry]. The first folder is the label, unless images lie beside it."""
    paths = []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up would never end
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        paths += [os.path.relpath(f"{folder}/{name}", root) for name in names if name[0] != "."]
    images = sorted(path for path in paths if path.lower().endswith(EXTENSIONS))
    if not images:
        raise UserError(f"folder {root} {no_images_because(paths, visited)}; "
                        f"images are read from {' '.join(EXTENSIONS)}")  # fmt: skip
    labelled = all(os.sep in path for path in images)
    return [Entry(f"{root}/{path}", path.split(os.sep)[0] if labelled else None) for path in images]


def no_images_because(paths, visited):
    extensions = {os.path.splitext(path)[1].lower() or path for path in paths}
    if extensions:
        return f"holds only {' '.join(sorted(extensions)[:8])}"
    return "is empty" if visited else "does not exist"


def expand_braces(pattern):
    """'part-{000..010}.tar' -> the 11 paths that it stands for; a path without braces -> itself alone."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces:
        return [pattern]
    first, last = braces.groups()
    paths = []
    for number in range(int(first), int(last) + 1):
        paths += expand_braces(pattern.replace(braces[0], str(number).zfill(len(first)), 1))
    return paths


def list_tar(pattern):
    """WebDataset shards -> [Entry]: key.jpg with key.cls or key.json is one sample."""
    entries = []
    for path in expand_braces(pattern):
        entries += index_tar(path).values()
    return entries


def index_tar(path):
    """One pass over the headers of a shard, 20 us each -> {key: Entry}; its name is None without an image.

    A shard that is cut off serves as far as it goes. Raises UserError for a file that is no tar.
    """
    samples = {}
    total_bytes = os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with tarfile.open(path, "r:") as shard:  # uncompressed: nothing else can be read at random
            for member in shard:
                if not member.isreg() or member.issparse():
                    continue  # folders, links, devices
                folder, base = os.path.split(member.name)
                key = os.path.join(folder, base.split(".")[0])
                extension = os.path.splitext(base)[1].lower()
                sample = samples.setdefault(key, Entry(None))
                if member.offset_data + member.size > total_bytes:
                    continue  # cut off by the end of the shard
                if extension in EXTENSIONS and not sample.name:  # the first image of a key counts
                    name = f"{path}::{member.name}"
                    sample = sample._replace(name=name, offset=member.offset_data, size=member.size)
                elif extension in (".cls", ".json") and member.size < MAX_LABEL_BYTES:
                    text = shard.extractfile(member).read().decode(errors="replace").strip()
                    sample = sample._replace(label=read_label(text, extension, sample.label))
                samples[key] = sample
    except (OSError, tarfile.TarError) as error:
        if not samples or isinstance(error, OSError):
            raise UserError(f"{path} is not a readable tar; gunzip it if it is packed ({error})") from error
    return samples


def read_label(text, extension, default):
    """The text of key.cls or key.json -> the label: a number, the name of a class, or `default`."""
    try:
        value = json.loads(text)
    except ValueError:  # key.cls may hold the name of a class
        value = text if extension == ".cls" else {}
    if not isinstance(value, dict):
        return value
    return value.get("label", value.get("cls", default))


def list_manifest(manifest):
    """Curation's manifest, JSON lines with `path`, or `shard` and `key` -> [Entry]; skips `keep: false`."""
    entries = []
    shards = {}
    place = manifest
    try:
        with open(manifest, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{manifest} line {number}"
                if not line.strip():
                    continue
                row = json.loads(line)
                if row.get("keep") is False:
                    continue
                path = os.path.join(os.path.dirname(manifest), row.get("path") or row["shard"])
                entry = Entry(path)
                if not row.get("path"):
                    if path not in shards:
                        shards[path] = index_tar(path)
                    entry = shards[path].get(row["key"], Entry(None))
                entries.append(entry._replace(label=row.get("label", entry.label)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: JSON with path, or shard and key, is needed ({error!r})") from error
    return entries


# ---------------------------------------------------------------- from bytes to pixels


def decode_image(source, name, inspect=None):
    """File path or bytes -> PIL RGB, upright; with `inspect`, its result for the image just opened.

    Raises BadImage(name, reason) for whatever is wrong with the file.
    """
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(12)
            with Image.open(file, formats=PILLOW_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:  # from the header, before any memory is spent
                    raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")
                if inspect:
                    return inspect(image)
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)  # loads the pixels: verify() would pass half a JPEG
    except UnidentifiedImageError as error:
        raise BadImage(name, f"no known format: {head}") from error
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise BadImage(name, repr(error)) from error


def to_rgb(image):
    """Any Pillow mode -> RGB. What is transparent becomes white, as on a web page."""
    if image.mode[0] in "IF":  # 16-bit grey: Pillow's own convert cuts at 255, which leaves a white picture
        image = to_8_bits(np.asarray(image).astype(np.float64), image.mode)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(grey, mode):
    """Grey values of mode I, I;16 or F -> PIL L. The range is guessed: 16 bits, 8 bits, or 0 to 1."""
    largest = grey.max()
    if largest > 255 or "16" in mode:
        grey *= 1 / 257
    elif largest <= 1:
        grey *= 255
    return Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W), stored pixel by pixel (channels last)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
