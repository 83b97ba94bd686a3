"""Pieces: a source cut into parts that are worked on one at a time, by any number of processes.

A piece is a tar shard, or up to `ingest.piece` files. The result of a piece is a file that is written
atomically and named by a hash of everything it depends on (`cache_key`). So a run that is killed goes on
where it stopped, and whatever changes is computed again.
"""

import hashlib
import os
from typing import NamedTuple

from torch.utils.data import DataLoader
from tqdm import tqdm

from config import UserError
from decode import measure_range
from distributed import all_reduce_ints, broadcast_object, rank, world_size
from sources import LOOSE_FILE, Entry, ImageFiles, index_tar, list_shards, open_source

VERSION = 3  # of what the stages compute: raise it, and no old result is used again


class FileRange(NamedTuple):
    """A piece of files: numbers first to end - 1 of `images`, and those of `images.dropped` follow.

    All other pieces are paths of shards.
    """

    images: ImageFiles
    first: int
    end: int


def split_source(uri, size, reading=None):
    """A data URI -> its pieces: paths of tar shards, or FileRanges of at most `size` files. UserError."""
    kind, _, rest = uri.partition(":")
    if kind == "tar":
        return list_shards(os.path.expanduser(rest))
    images = open_source(uri, reading)
    if not isinstance(images, ImageFiles):
        raise UserError(f"{uri} is no pile of files: write folder:, list: or tar: and a path")
    total = len(images) + len(images.dropped)
    return [FileRange(images, start, min(start + size, total)) for start in range(0, total, size)]


def list_entries(piece):
    """A piece -> [Entry] and, if it is a shard, its damage in words, or ""."""
    if not isinstance(piece, FileRange):
        try:
            samples, damage = index_tar(piece)  # one pass over the headers: a shard is never unpacked
        except UserError as error:  # costs this shard, not the run
            return [], str(error)
        return list(samples.values()), damage
    images = piece.images
    entries = []
    for i in range(piece.first, min(piece.end, len(images))):
        label = images.classes[images.labels[i]] if images.labels[i] >= 0 else None
        entries.append(Entry(images.name(i), label, images.offsets[i].item(), images.sizes[i].item()))
    dropped = slice(max(piece.first - len(images), 0), max(piece.end - len(images), 0))
    return entries + images.dropped[dropped], ""


# ---------------------------------------------------------------- names of results


def cache_key(*parts):
    """12 hexadecimal digits that change when one of the parts does."""
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def files_key(*files):
    """The same for files that may be missing; only their sizes and modification times are read."""
    return cache_key([size_and_time(file) for file in files])


def size_and_time(file):
    if not os.path.exists(file):
        return None
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def piece_files(piece):
    """The files of a piece, each once, in order."""
    if not isinstance(piece, FileRange):
        return [piece]
    names = []
    for entry in list_entries(piece)[0]:
        names.append(entry.name if entry.offset == LOOSE_FILE else entry.name.partition("::")[0])
    return list(dict.fromkeys(names))


def measure_reading(piece, reading):
    """How the numbers of a source become colours: its decode.Reading, measured on the first piece."""
    if isinstance(piece, FileRange):
        return piece.images.reading
    if reading.range:
        return reading
    return reading._replace(range=measure_range(ImageFiles(list_entries(piece)[0], reading)))


def piece_key(piece, reading=None):
    content = list_entries(piece)[0] if isinstance(piece, FileRange) else piece
    return cache_key(VERSION, content, files_key(*piece_files(piece)), reading)


def run_jobs(job, numbers, workers):
    """Call job(number) for this process's share of the list `numbers`, in `workers` processes of its own.

    Returns when all processes are done. Raises UserError or OSError if a job did.
    """

    def call(batch):
        try:
            job(batch[0])
        except (UserError, OSError) as error:  # anything else is a bug and comes with its traceback
            return error

    numbers = broadcast_object(numbers)  # another process may have listed them later, when some were done
    mine = numbers[rank() :: world_size()]
    loader = ()
    if mine:
        loader = DataLoader(mine, batch_size=1, collate_fn=call, num_workers=min(workers, len(mine)))
    for problem in tqdm(loader, disable=None if rank() == 0 else True, leave=False):
        if problem:
            raise problem
    all_reduce_ints(0)  # wait for the other processes
