"""The manifest: what is known about each image of a source, in rows on the disk and in columns in memory.

`ingest` writes a row of JSON for each image. `Curation` reads of these rows what the filters need, as arrays;
each filter adds its decision (`Curation.apply`), and at the end `write` combines both into manifest.jsonl.
Memory: the rows of one piece, and under 800 bytes for each image.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import UserError
from curation.pieces import (
    FileRange,
    cache_key,
    files_key,
    measure_reading,
    piece_files,
    piece_key,
    split_source,
)
from decode import MAX_FILE_BYTES, Reading, open_regular
from distributed import all_reduce_ints, broadcast_object, rank
from runfolder import atomic_open
from sources import LOOSE_FILE
from survey import survey_dataset

REASONS = ("kept", "unreadable", "small", "long", "dark", "bright", "flat", "blurred", "exact duplicate",
           "near duplicate", "feature duplicate", "leak", "ugly", "blocked", "not retrieved",
           "over quota")  # fmt: skip
SCORES = ("sharpness", "entropy", "dark", "bright")


class Stage(NamedTuple):
    """A line of the funnel."""

    name: str
    left: int  # images of the source that are still in
    reasons: dict  # {reason: images so far}, those still in as "kept"


class Curation:
    """A source on its way to the folder `out`: its pieces, and columns (n,) of what is known of each image.

    Images of evaluation sets come last, from number `num_source` on. Columns from ingest: sha, phash, dhash,
    width, height, bytes and SCORES. From the filters: `why`, an index of REASONS; `of`, the number of the
    image that a duplicate or leak resembles, or -1; `cluster` and `domain`, or -1; `blocked` and
    `aesthetics`, or nan.
    """

    def __init__(self, source, out, cfg, workers=0):
        self.cfg = cfg
        self.out = Path(out)
        self.work = self.out / "work"
        self.workers = workers
        self.key = ""  # changes with everything that was done so far
        self.notes = []  # for the reader of the funnel
        self.stages = []
        asked = Reading.from_config(cfg.ingest)
        self.pieces = split_source(source.strip(), cfg.ingest.piece, asked)
        self.reading = measure_reading(self.pieces[0], asked)
        cfg.ingest.range = self.reading.range or "auto"
        self.num_source_pieces = len(self.pieces)
        for uri in filter(None, cfg.dedup.evaluation.split(";")):
            self.pieces += split_source(uri.strip(), cfg.ingest.piece, self.reading)
        self.refuse_own_results(source)
        if isinstance(self.pieces[0], FileRange):
            self.notes += survey_dataset(self.pieces[0].images, source).warnings
        keys = [piece_key(piece, self.reading) for piece in self.pieces]
        names = [f"{index:06d}-{key}.jsonl" for index, key in enumerate(keys)]
        self.row_files = [self.work / "ingest" / name for name in names]
        self.embedder = None  # set by embed(), with the two below
        self.embedded = None  # (m,) numbers of the images that have features
        self.features = None  # (m, D) float16, on the disk

    def refuse_own_results(self, source):
        """UserError if an image, or the list of them, is what this curation would overwrite."""
        places = {os.path.expanduser(source.strip().partition(":")[2])}
        for piece in self.pieces:
            places |= set(map(os.path.dirname, piece_files(piece)))
        places = set(map(os.path.realpath, places))
        for name in ("shards", "manifest.jsonl"):
            if os.path.realpath(self.out / name) in places:
                raise UserError(f"{self.out / name} is read, and would be overwritten: take another OUT")

    def read_rows(self, index):
        """The rows of piece number `index`, as ingest wrote them: dicts."""
        with open(self.row_files[index], encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def iter_rows(self, numbers):
        """Ascending numbers of images -> (number, row) of each; one piece at a time in memory."""
        ends = np.searchsorted(numbers, self.piece_starts)
        for index in range(len(self.pieces)):
            wanted = numbers[ends[index] : ends[index + 1]].tolist()
            rows = self.read_rows(index) if wanted else []
            for number in wanted:
                yield number, rows[number - self.piece_starts[index]]

    def read_columns(self):
        """Fill the columns from the rows that ingest wrote."""
        columns = []
        damaged = []
        for index in range(len(self.pieces)):
            rows = self.read_rows(index)
            columns.append(columns_of(rows))
            damaged += [f"{row['path']}: {row['detail']}" for row in rows if "at" not in row]
        self.piece_starts = np.cumsum([0, *(len(piece["why"]) for piece in columns)])
        self.num_images = int(self.piece_starts[-1])
        self.num_source = int(self.piece_starts[self.num_source_pieces])
        for name in columns[0]:
            setattr(self, name, np.concatenate([piece[name] for piece in columns]))
        self.of = np.full(self.num_images, -1)
        self.cluster = np.full(self.num_images, -1)
        self.domain = np.full(self.num_images, -1)
        self.blocked = np.full(self.num_images, np.nan, np.float32)
        self.aesthetics = np.full(self.num_images, np.nan, np.float32)
        if damaged:
            self.notes.append(f"{len(damaged)} shards are damaged: {'; '.join(damaged[:10])}")
        lost = np.count_nonzero(self.why[self.num_source :])
        if lost:
            self.notes.append(f"{lost} evaluation images are unreadable: what resembles them is not found")
        self.key = cache_key(self.key, [file.name for file in self.row_files])
        self.record("ingest")

    def apply(self, name, decide, settings, files=()):
        """Add a filter's columns: from its file, or from decide(self) -> {column: array, "notes": texts}.

        All processes decide (they share the work inside) and get the same; the first one writes it down. The
        file is named by what came before, the settings, and the files (or data URIs) that these name.
        """
        keys = []
        for uri in files:
            if os.path.exists(uri) or ":" not in uri:
                keys.append(files_key(uri))
            else:
                keys += [piece_key(piece) for piece in split_source(uri, 1000)]
        self.key = cache_key(self.key, name, asdict(settings), keys)
        path = self.work / f"{name}-{self.key}.npz"
        if not broadcast_object(path.exists()):
            save_arrays(path, decide(self))
        with np.load(path) as file:
            columns = dict(file)
        self.why = np.where(self.why, self.why, columns.pop("why"))  # the first reason is final
        self.notes += columns.pop("notes", np.array([])).tolist()
        for column, values in columns.items():
            setattr(self, column, values)
        self.record(name)

    def record(self, name):
        """Add a line to the funnel. UserError if no image is left."""
        counts = np.bincount(self.why[: self.num_source], minlength=len(REASONS)).tolist()
        reasons = {reason: count for reason, count in zip(REASONS, counts) if count}
        self.stages.append(Stage(name, counts[0], reasons))
        if not counts[0]:
            raise UserError(f"after {name} no image is left: {reasons}; check the settings")

    def kept(self):
        """Numbers of the source's images that are still in."""
        return np.flatnonzero(self.why[: self.num_source] == 0)


def columns_of(rows):
    """The rows of a piece -> {column: array (n,)}."""

    def column(name, kind, default):
        return np.array([row.get(name, default) for row in rows], kind)

    columns = dict(sha=column("sha256", "S64", ""), why=np.array(["why" in row for row in rows], np.uint8))
    for name in ("phash", "dhash"):
        columns[name] = np.array([int(row.get(name, "0"), 16) for row in rows], np.uint64)
    for name in ("width", "height", "bytes"):
        columns[name] = column(name, np.int64, 0)
    for name in SCORES:
        columns[name] = column(name, np.float32, np.nan)
    return columns


def save_arrays(path, arrays):
    """A dict as .npz, by the first process; the others wait until it is there."""
    if rank() == 0:
        with atomic_open(path) as file:
            np.savez(file, **arrays)
    all_reduce_ints(0)


def load_arrays(path, kinds, wanted, alone=None):
    """An .npz of such arrays, or, memory-mapped, an .npy of the one called `alone` -> {name: array}.

    kinds: {name: (letters of NumPy's kinds, number of dimensions)}. Raises UserError: "`path` `wanted`".
    """
    try:
        open_regular(path, limit=math.inf).close()  # NumPy would wait for a pipe
        arrays = np.load(path, mmap_mode="r")
        if isinstance(arrays, np.ndarray):
            arrays = {alone: arrays}
        else:
            unpacked = sum(info.file_size for info in arrays.zip.infolist())
            if unpacked > 20 * os.path.getsize(path) + 1_000_000:
                raise ValueError(f"it unpacks to {unpacked:,} bytes")
            with arrays:
                arrays = {name: arrays[name] for name in kinds}
        for name, array in arrays.items():
            letters, dimensions = kinds[name]
            if array.dtype.kind not in letters or array.ndim != dimensions or 0 in array.shape:
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}")
    except Exception as error:  # NumPy's readers raise almost anything when a file is damaged
        raise UserError(f"{path} {wanted} ({error!r:.200})") from None
    return arrays


def load_bytes(row):
    """The file of an image as it was, read in place. Raises OSError."""
    offset, size = row["at"]
    if offset == LOOSE_FILE:
        with open_regular(row["path"]) as file:
            return file.read()
    if not 0 <= size <= MAX_FILE_BYTES:
        raise OSError(f"it has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
    with open_regular(row["shard"], limit=math.inf) as file:
        file.seek(offset)
        return file.read(size)
