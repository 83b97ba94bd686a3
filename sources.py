"""Where images come from: folders, tar shards, manifests, the embedded scenes.

A URI, `train.dataset_path`, names a source, and becomes a data set: `dataset[i] -> (PIL RGB, label or -1)`.

    scenes:10000:seed=0:size=64      procedural images (scenes.py)
    folder:/data/images              images at any depth; sub-folders of the root are the classes
    tar:/data/{000..010}.tar         WebDataset shards, read in place; also tar:/data/*.tar and tar:/data
    list:/data/manifest.jsonl        one JSON object per line, as curation writes it

Only an index is kept in memory: names, labels, and where in a shard the bytes lie. A label is the name of a
class, a text, wherever it comes from: folder cat/, a file key.cls, {"label": "cat"} in JSON. A number is the
text of its digits, so 3 and "3" are one class.
"""

import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from config import UserError, parse_json
from decode import (
    EXTENSIONS,
    MAX_FILE_BYTES,
    BadImage,
    Reading,
    decode_image,
    measure_range,
    open_picture,
    open_regular,
)
from scenes import Scenes

MAX_TEXT_BYTES = 1 << 20  # of a .cls or .json file, a line of a manifest, the extension of a tar header
MAX_NAME_BYTES = 4096  # of a path; Linux allows no more
SEARCH_BYTES = 1 << 28  # how far to look for the next header behind a damaged one
MAX_SHARDS = 1_000_000  # of one pattern
MAX_DAMAGE = 100  # damaged places in a shard; the rest of it is not read
LOOSE_FILE = -1  # offset of an image that is a file of its own
NO_IMAGE = -2  # offset of a sample whose shard holds no complete image
NOT_READ = -3  # offset of a file of a kind that is not read


class Entry(NamedTuple):
    """One sample of an index."""

    name: str  # a path, or "shard.tar::member"
    label: str | None = None
    offset: int = LOOSE_FILE  # of the first byte in the shard, or one of the two constants above
    size: int = 0  # in bytes


class ImageFiles:
    """Image files, loose or in tar shards: `self[i] -> (PIL RGB, label or -1)`. Raises BadImage.

    `classes` are the names of the classes in order, or None; a label is a number of this list. `dropped` are
    the entries without an image, `not_read` counts files of other kinds. `reading` says how numbers become
    colours (decode.py). The name "shard.tar::member" is read in place; nothing is ever unpacked, so
    ../../etc/passwd is just a name.
    """

    def __init__(self, entries, reading=None):
        self.reading = reading or Reading()
        kept = [entry for entry in entries if entry.offset not in (NO_IMAGE, NOT_READ)]
        self.dropped = [entry for entry in entries if entry.offset == NO_IMAGE]
        self.not_read = Counter(extension_of(entry.name) for entry in entries if entry.offset == NOT_READ)
        self.classes = sort_classes({entry.label for entry in kept} - {None}) or None
        number_of = {name: number for number, name in enumerate(self.classes or ())}
        self.labels = np.array([number_of.get(entry.label, -1) for entry in kept])
        self.offsets = np.array([entry.offset for entry in kept])
        self.sizes = np.array([entry.size for entry in kept])
        # All names in one piece: a list of texts would end up copied in every worker.
        names = [os.fsencode(entry.name) for entry in kept]
        self.joined_names = b"".join(names)
        self.name_ends = np.cumsum([0, *map(len, names)])

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        first, end = self.name_ends[[index, index + 1]]
        return os.fsdecode(self.joined_names[first:end])

    def renumber(self, classes):
        """Take over the classes of another data set, which has all of these."""
        new_labels = [classes.index(name) for name in self.classes]
        self.labels = np.array([*new_labels, -1])[self.labels]  # -1 stays -1
        self.classes = classes

    def file_size(self, index):
        """Bytes of an image file; -1 if it is not there."""
        if self.offsets[index] >= 0:
            return int(self.sizes[index])
        path = self.name(index)
        return os.path.getsize(path) if os.path.exists(path) else -1

    def digest(self, index):
        """SHA-256 of an image file; its name if it is empty or cannot be read."""
        with suppress(OSError):
            content = self.read_bytes(index)
            if content:
                return hashlib.sha256(content).hexdigest()
        return self.name(index)

    def __getitem__(self, index):
        image = decode_image(self.source(index), self.name(index), reading=self.reading)
        return image, int(self.labels[index])

    def source(self, index):
        """Where `decode` finds an image: its path, or its bytes in a shard. Raises BadImage."""
        name = self.name(index)
        try:
            return self.read_bytes(index) if self.offsets[index] >= 0 else name
        except OSError as error:
            raise BadImage(name, repr(error)) from error

    def open_picture(self, index):
        """An image before its numbers become colours: the context manager decode.open_picture."""
        return open_picture(self.source(index), self.name(index), self.reading.bands)

    def read_bytes(self, index):
        """The bytes of an image file as they are. Raises OSError."""
        name = self.name(index)
        offset = self.offsets[index]
        if offset == LOOSE_FILE:
            with open_regular(name) as file:
                return file.read()
        with open_regular(name.partition("::")[0], limit=math.inf) as shard:  # workers can't share a position
            shard.seek(offset)
            return shard.read(self.sizes[index])


def sort_classes(names):
    """Names of classes in order: by value if all are whole numbers, so that class "10" comes after "2"."""
    by_value = all(re.fullmatch(r"\d{1,18}", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if by_value else 0, name))


def extension_of(name):
    """'a/B.HEIC' -> '.heic'; a name without one -> 'no extension'."""
    return os.path.splitext(name)[1].lower() or "no extension"


def sample_name(dataset, index):
    """What to call sample `index` in a message: its path, if the data set knows one."""
    return dataset.name(index) if hasattr(dataset, "name") else f"image {index}"


# ---------------------------------------------------------------- from a URI to a data set


def open_source(uri, reading=None):
    """The data set of a URI: `dataset[i] -> (PIL RGB, label or -1)`, `len(dataset)`, `.classes` or None.

    reading: a decode.Reading; a range that it lacks is measured, if there are numbers of other than 8 bits.
    Reads the URIs at the top of this file, and the published ImageNet:split=TRAIN:root=/path:extra=...
    Raises UserError when there is nothing to read.
    """
    kind, _, rest = uri.partition(":")
    options = dict(re.findall(r"(\w+)=([^:]*)", rest))
    scenes = re.fullmatch(r"(\d*)(:?(seed|size)=\d+)*", rest)
    if kind == "scenes" and scenes:
        count = int(scenes[1] or 100_000)
        return Scenes(count, **{key: int(value) for key, value in options.items()})
    if kind in ("ImageNet", "ImageNet22k"):  # `extra` holds the authors' index files, not needed here
        if "root" not in options:
            raise UserError(f"dataset_path {uri!r} names no root; write {uri}:root=/path or folder:/path")
        rest = options["root"]
        if kind == "ImageNet":  # the other one has no splits
            rest = os.path.join(rest, options.get("split", "train").lower())
        kind = "folder"
    try:
        check_name(rest)
    except ValueError as error:
        raise UserError(f"dataset_path cannot be read: {error}") from None
    listing = {"folder": list_folder, "tar": list_tar, "list": list_manifest}.get(kind)
    if not listing or not rest:
        known = "scenes:10000, folder:/path, tar:/path/{000..010}.tar or list:/path/manifest.jsonl"
        raise UserError(f"dataset_path {uri!r} cannot be read; write {known}")
    return index_images(listing(os.path.expanduser(rest)), uri, reading)


def open_dataset(uri, section):
    """The data set of a URI, read as cfg.data has it, which keeps a range that is measured here."""
    dataset = open_source(uri, Reading.from_config(section))
    if isinstance(dataset, ImageFiles) and dataset.reading.range:
        section.range = dataset.reading.range
    return dataset


def open_images(paths, reading=None):
    """The arguments of a command -> one data set: images, folders, .tar shards, .jsonl manifests; or one URI.

    Raises UserError for a path that does not exist, or when there is no image at all.
    """
    if len(paths) == 1 and ":" in paths[0] and not os.path.exists(paths[0]):
        return open_source(paths[0], reading)
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
            remedy = "give images, folders, .tar files or one data URI"
            raise UserError(f"{path} does not exist or is no regular file: {remedy}")
    return index_images(entries, ", ".join(map(str, paths)), reading)


def index_images(entries, source, reading=None):
    """[Entry] -> ImageFiles; says how many samples of the source have no image. UserError if none has one."""
    images = ImageFiles(entries, reading)
    if images.dropped:
        count = f"{len(images.dropped)} of {len(images.dropped) + len(images)}"
        print(f"{source}: {count} samples have no complete image: left out", file=sys.stderr)
    if not len(images):
        raise UserError(f"{source} holds no images; the formats read are {' '.join(EXTENSIONS)}")
    if not images.reading.range:
        images.reading = images.reading._replace(range=measure_range(images))
    return images


def list_folder(root):
    """Images at any depth, sorted -> [Entry]. The first folder is the label, unless images lie beside it."""
    paths = []
    visited = set()

    def tell(error):
        if not visited:
            raise UserError(f"folder {root} cannot be read: {error.strerror}")
        print(f"warning: {error.filename} is left out: {error.strerror}", file=sys.stderr)

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=tell):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up would never end
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        paths += [os.path.relpath(f"{folder}/{name}", root) for name in names if name[0] != "."]
    images = sorted(path for path in paths if path.lower().endswith(tuple(EXTENSIONS)))
    if not images:
        found = "is empty"
        if paths:
            extensions = {os.path.splitext(path)[1].lower() or path for path in paths}
            found = f"holds only {' '.join(sorted(extensions)[:8])}"
        raise UserError(f"folder {root} {found}; images are read from {' '.join(EXTENSIONS)}")
    labelled = all(os.sep in path for path in images)
    entries = [Entry(f"{root}/{path}", path.split(os.sep)[0] if labelled else None) for path in images]
    others = [path for path in paths if not path.lower().endswith(tuple(EXTENSIONS))]
    return entries + [Entry(f"{root}/{path}", offset=NOT_READ) for path in others]


def expand_braces(pattern):
    """'part-{000..010}.tar' -> the 11 paths that it stands for; a path without braces -> itself alone.

    So is a path that exists as it stands, braces and all.
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not braces or os.path.exists(pattern):
        return [pattern]
    first, last = braces.groups()
    if int(last) - int(first) >= MAX_SHARDS:
        raise UserError(f"{pattern} stands for more than {MAX_SHARDS:,} shards")
    paths = []
    for number in range(int(first), int(last) + 1):
        paths += expand_braces(pattern.replace(braces[0], str(number).zfill(len(first)), 1))
    return paths


def list_shards(pattern):
    """A folder, or a path with * or {000..010} -> its tar shards, in order. UserError if there are none."""
    shards = []
    for path in expand_braces(pattern):
        wanted = f"{glob.escape(path)}/*.tar" if os.path.isdir(path) else path
        found = [path] if os.path.isfile(path) else sorted(glob.glob(wanted))
        if not found:
            raise UserError(f"tar:{path} names no shard: give a folder, a pattern or {{000..010}}.tar")
        shards += found
    return shards


def list_tar(pattern):
    """WebDataset shards -> [Entry]: key.jpg with key.cls or key.json is one sample. Warns of damage."""
    entries = []
    for path in list_shards(pattern):
        samples, damage = index_tar(path)
        entries += samples.values()
        if damage:
            print(f"warning: {path} is damaged: {damage}", file=sys.stderr)
    return entries


def index_tar(path):
    """One pass over the headers of a shard -> {key: Entry}, and its damage in words, or "".

    Behind a damaged header it goes on with the next one, so that costs one member; a shard that is cut off
    serves as far as it goes. Raises UserError for a file that is no tar.
    """
    if "::" in path:
        raise UserError(f"{path} holds '::', which divides a shard from its members: rename it")
    samples = {}
    damage = []
    try:
        with HeaderReader(open_regular(path, limit=math.inf).detach()) as file:
            for member in tar_members(file, damage):
                try:
                    add_member(samples, path, member, file)
                except ValueError as error:
                    damage.append(f"{member.name[-60:]!a}: {error}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable tar: {error}") from error
    if damage and not samples:
        raise UserError(f"{path} is not a readable tar; gunzip it if it is packed ({damage[0]})")
    if not samples:
        damage.append("it has no members")
    more = f" (and {len(damage) - 3} more)" if len(damage) > 3 else ""
    return samples, "; ".join(damage[:3]) + more


class HeaderReader(io.BufferedReader):
    """Reads headers and labels, never much at once: a header that lies about a size costs no memory."""

    def read(self, size=-1):
        if not 0 <= size <= MAX_TEXT_BYTES:
            raise ValueError(f"{size:,} bytes, the limit is {MAX_TEXT_BYTES:,}")
        return super().read(size)

    def total_bytes(self):
        return os.fstat(self.fileno()).st_size

    def read_at(self, offset, size):
        self.seek(offset)  # and not back: tarfile itself seeks before it reads a header
        return self.read(size)


def add_member(samples, path, member, file):
    """What a member of the shard `path` adds to its sample. Raises ValueError where it is unusable."""
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise ValueError("it is no plain file, but a link, a device or sparse")
    folder, base = os.path.split(member.name)
    key = os.path.join(folder, base.split(".")[0])
    extension = os.path.splitext(base)[1].lower()
    name = check_name(f"{path}::{member.name}")
    sample = samples.setdefault(key, Entry(f"{path}::{key}", offset=NO_IMAGE))
    if member.offset_data + member.size > file.total_bytes():
        raise ValueError("cut off by the end of the shard")
    if member.size > MAX_FILE_BYTES:
        raise ValueError(f"{member.size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
    if extension in EXTENSIONS and sample.offset == NO_IMAGE:  # the first image of a key counts
        sample = sample._replace(name=name, offset=member.offset_data, size=member.size)
    elif extension == ".json":  # before .cls, since its text is exact
        content = file.read_at(member.offset_data, member.size)
        value = parse_json(content.decode("utf-8-sig", "surrogateescape"))
        if isinstance(value, dict):
            value = value.get("cls") if value.get("label") is None else value["label"]
        sample = sample._replace(label=check_label(value) or sample.label)
    elif extension == ".cls" and not sample.label:
        text = os.fsdecode(file.read_at(member.offset_data, member.size))
        sample = sample._replace(label=check_label(text.strip()))
    samples[key] = sample


def tar_members(file, damage):
    """Yields the TarInfo of each member; adds to the list `damage` where a header cannot be read.

    tarfile itself takes a damaged header for the end of the archive, and says nothing.
    """
    position = 0  # of the next header
    complete = False
    for _ in range(MAX_DAMAGE):
        file.seek(position)
        reason = ""
        try:
            archive = tarfile.TarFile(fileobj=file)
            member = archive.next()
            while member and member.size >= 0 and archive.offset > position:  # a hostile size may lead back
                position = min(archive.offset, file.total_bytes())
                complete = False
                yield member
                member = archive.next()
        except Exception as error:  # the parser does not expect hostile headers: IndexError, RecursionError
            reason = f" ({error})"
        block = file.read_at(position, tarfile.BLOCKSIZE)
        next_header, only_zeros = find_header(file, position + tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            damage.append(f"the header at byte {position:,} is damaged{reason}")
        elif not block and not complete:
            damage.append("it has no end, as if cut off")
        elif next_header is not None or not only_zeros:
            damage.append(f"more follows the zeros at byte {position:,}: a hole, or a second archive")
        if next_header is None:
            if file.total_bytes() - position > SEARCH_BYTES:
                damage.insert(0, f"nothing from byte {position:,} on is read")
            return
        complete = bool(block)
        position = next_header
    damage.insert(0, f"too many damaged places: nothing from byte {position:,} on is read")


def find_header(file, start):
    """The position of the first header from `start` on, or None; and whether only zeros lie before it.

    It is looked for within SEARCH_BYTES.
    """
    only_zeros = True
    file.seek(start)
    for position in range(start, min(start + SEARCH_BYTES, file.total_bytes()), tarfile.BLOCKSIZE):
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return position, only_zeros
            only_zeros = False
    return None, only_zeros


def check_label(value):
    """The label of a file -> the name of a class, or None for no label. Raises ValueError.

    A number becomes the text of its digits, so it means the same as a folder of that name.
    """
    if isinstance(value, (dict, list)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"the label {value!r:.60} is neither a text nor a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables write whole numbers where some are missing
    label = value if isinstance(value, str) else json.dumps(value)
    os.fsencode(label)  # half of a surrogate pair is no text: UnicodeEncodeError is a ValueError
    return label if value not in (None, "") else None


def check_name(name):
    """A path, if there can be a file of that name. Raises ValueError."""
    if "\0" in name or len(os.fsencode(name)) > MAX_NAME_BYTES:
        raise ValueError(f"there can be no file {name!r:.60}")
    return name


def list_manifest(manifest):
    """Curation's manifest, JSON lines with `path`, or `shard` and `key` -> [Entry]; skips `keep: false`."""
    entries = []
    problems = []
    shards = {}
    try:
        with open_regular(manifest, limit=math.inf) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES), b""), 1):
                if len(line) == MAX_TEXT_BYTES:
                    raise UserError(f"{manifest} line {number} has no end: it is no manifest")
                try:
                    entries += list_line(line, manifest, shards)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    problems.append(f"{manifest} line {number}: {error!r:.100}")
                    entries.append(Entry(problems[-1], offset=NO_IMAGE))
    except OSError as error:
        raise UserError(f"{manifest} cannot be read: {error}") from error
    if problems:
        found = f"{len(problems)} lines lack JSON with path, or shard and key: {problems[0]}"
        if len(problems) == len(entries):
            raise UserError(found)
        print(f"warning: {found}", file=sys.stderr)
    return entries


def list_line(line, manifest, shards):
    """A line of a manifest -> [Entry], or []. `shards` keeps the samples of each shard, by path."""
    if not line.strip():
        return []
    row = parse_json(line.decode())
    if row.get("keep") is False:
        return []
    path = check_name(os.path.join(os.path.dirname(manifest), row.get("path") or row["shard"]))
    entry = Entry(path)
    if not row.get("path"):
        if path not in shards:
            shards[path] = index_listed_tar(path)
        missing = Entry(check_name(f"{path}::{row['key']}"), offset=NO_IMAGE)
        entry = shards[path].get(row["key"], missing)
    return [entry._replace(label=check_label(row.get("label", entry.label)))]


def index_listed_tar(path):
    """{key: Entry} of a shard that a manifest names. One that cannot be read costs its own images alone."""
    try:
        samples, damage = index_tar(path)
    except UserError as error:
        samples = {}
        damage = str(error)
    if damage:
        print(f"warning: {path} is damaged: {damage}", file=sys.stderr)
    return samples
