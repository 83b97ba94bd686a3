"""Pieces: a source cut into parts that are worked on one at a time, by any number of processes.

A piece is a tar shard, or up to `ingest.piece` files. The result of a piece is a file that is written
atomically and named by a hash of everything it depends on (`cache_key`). So a run that is killed goes on
where it stopped, and whatever changes is computed again.
"""

import hashlib
import os
from glob import glob
from typing import NamedTuple

from torch.utils.data import DataLoader
from tqdm import tqdm

from config import UserError
from distributed import all_reduce_ints, rank, world_size
from sources import Entry, ImageFiles, expand_braces, index_tar, open_source

VERSION = 1  # of what the stages compute: raise it, and no old result is used again
LOOSE_FILE = -1  # offset of an image that is a file of its own
NO_IMAGE = -2  # offset of a sample whose shard holds no complete image


class FileRange(NamedTuple):
    """A piece of files: numbers first to end - 1 of `images`. All other pieces are paths of shards."""

    images: ImageFiles
    first: int
    end: int


def split_source(uri, size):
    """A data URI -> its pieces: paths of tar shards, or FileRanges of at most `size` files. UserError."""
    kind, _, rest = uri.partition(":")
    if kind == "tar":
        return list_shards(os.path.expanduser(rest))
    images = open_source(uri)
    if not isinstance(images, ImageFiles):
        raise UserError(f"{uri} is no pile of files: write folder:, list: or tar: and a path")
    starts = range(0, len(images), size)
    return [FileRange(images, start, min(start + size, len(images))) for start in starts]


def list_shards(pattern):
    """A folder, or a path with * or {000..010} -> its tar shards, in order."""
    shards = []
    for path in expand_braces(pattern):
        found = sorted(glob(f"{path}/*.tar" if os.path.isdir(path) else path))
        if not found:
            raise UserError(f"tar:{path} names no shard: give a folder, a pattern or {{000..010}}.tar")
        shards += found
    return shards


def list_entries(piece):
    """A piece -> [Entry], whose offset is LOOSE_FILE, NO_IMAGE or a place in the shard. UserError: no tar."""
    entries = []
    if isinstance(piece, FileRange):
        images = piece.images
        for i in range(piece.first, piece.end):
            label = images.labels[i].item()
            if label < 0:
                label = None
            elif images.classes:
                label = images.classes[label]
            entries.append(Entry(images.name(i), label, images.offsets[i].item(), images.sizes[i].item()))
        return entries
    for key, entry in index_tar(piece).items():  # one pass over the headers: a shard is never unpacked
        if not entry.name:
            entry = entry._replace(name=f"{piece}::{key}", offset=NO_IMAGE)
        entries.append(entry)
    return entries


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


def piece_key(piece):
    names = [piece]
    if isinstance(piece, FileRange):
        names = [piece.images.name(i) for i in range(piece.first, piece.end)]
    files = dict.fromkeys(name.partition("::")[0] for name in names)  # each once, in order
    return cache_key(VERSION, names, files_key(*files))


def run_jobs(job, numbers, workers):
    """Call job(number) for this process's share of the list `numbers`, in `workers` processes of its own.

    Returns when all processes are done. Raises UserError if a job did.
    """

    def call(batch):
        try:
            job(batch[0])
        except UserError as error:  # returned as text; anything else is a bug and comes with its traceback
            return str(error)

    mine = numbers[rank() :: world_size()]
    loader = ()
    if mine:
        loader = DataLoader(mine, batch_size=1, collate_fn=call, num_workers=min(workers, len(mine)))
    for problem in tqdm(loader, disable=None if rank() == 0 else True, leave=False):
        if problem:
            raise UserError(problem)
    all_reduce_ints(0)  # wait for the other processes
