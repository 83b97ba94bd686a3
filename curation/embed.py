"""Features: a unit vector in half precision for each image, from a backbone or from a file made elsewhere."""

import os

import numpy as np
import torch

import config
from config import UserError
from curation.manifest import load_arrays
from curation.pieces import cache_key, files_key, run_jobs
from curation.vectors import unit_rows
from data import normalize
from distributed import all_reduce_ints, broadcast_object, rank
from features import EvalImages, iterate_batches
from runfolder import atomic_open
from sources import Entry, ImageFiles
from tools.weights import open_backbone

SHORTEST = 1e-12  # below this length, `unit_rows` takes a vector for zero


def embed(state):
    """Features of the images still in: state.features (m, D) float16, memory-mapped, and the numbers of these
    images, state.embedded (m,). Without weights and embeddings, nothing, or UserError if they are needed.
    """
    if not state.cfg.features.weights and not state.cfg.features.embeddings:
        refuse_if_needed(state.cfg)
        state.notes.append("no features.weights or features.embeddings: what needs features is off")
        return
    state.embedder = open_embedder(state.cfg.features)
    state.embedder.reading = state.reading
    num_rows = getattr(state.embedder, "num_rows", None)
    if num_rows not in (None, state.num_source, state.num_images):
        file = state.cfg.features.embeddings
        remedy = "give each image of ingest's order a row, or take an .npz of cls and paths"
        raise UserError(f"{file} has {num_rows} rows for {state.num_source} images: {remedy}")
    state.key = cache_key(state.key, state.embedder.key)
    state.embedded = np.flatnonzero(state.why == 0)
    folder = state.work / f"features-{state.key}"
    whole = folder.with_suffix(".npy")
    if not broadcast_object(whole.exists()):
        embed_pieces(state, folder, whole)
    state.features = np.load(whole, mmap_mode="r")


def refuse_if_needed(cfg):
    content = cfg.content
    balance = cfg.balance
    if any((content.ratings, content.head, content.allow, content.block, balance.seeds, balance.target)):
        raise UserError("content and balance need features: name features.weights or features.embeddings")


def embed_pieces(state, folder, whole):
    """A file of features for each piece, in `folder`; then all of them as the file `whole`."""
    files = [folder / f"{index}.npy" for index in range(len(state.pieces))]
    ends = np.searchsorted(state.embedded, state.piece_starts)

    def job(index):
        numbers = state.embedded[ends[index] : ends[index + 1]]
        features = np.zeros((0, state.embedder.width), np.float16)
        if len(numbers):
            entries = [row_to_entry(row) for _, row in state.iter_rows(numbers)]
            features = state.embedder(ImageFiles(entries, state.reading), numbers)
        with atomic_open(files[index]) as file:
            np.save(file, features)

    todo = [index for index, file in enumerate(files) if not file.exists()]
    run_jobs(job, todo, 0 if torch.cuda.is_available() else state.workers)
    if rank() == 0:
        concatenate(files, whole, state.embedder.width)
    all_reduce_ints(0)  # the others wait until it is there


def row_to_entry(row):
    name = row.get("path") or "{shard}::{key}".format(**row)
    offset, size = row["at"]
    return Entry(name, None, offset, size)


def concatenate(files, whole, width):
    """Files of float16 rows (n, width) -> one file of all their rows, without holding them all in memory."""
    num_rows = sum(len(np.load(file, mmap_mode="r")) for file in files)
    with atomic_open(whole) as out:
        header = dict(descr="<f2", fortran_order=False, shape=(num_rows, width))
        np.lib.format.write_array_header_1_0(out, header)
        for file in files:
            out.write(np.load(file).tobytes())


def embed_examples(embedder, images, name, at_least=1):
    """A data set -> features (n, width) of what can be read, and whether each image can, bool (len(images),).

    UserError, which calls the data set `name`, if these are fewer than `at_least`.
    """
    if isinstance(images, ImageFiles) and embedder.reading:
        images.reading = embedder.reading  # as the pile is read
    x = embedder(images)
    readable = x.any(1)
    if readable.sum() < at_least:
        raise UserError(f"{name} has {readable.sum()} images that can be read, needed are {at_least}")
    return x[readable], readable


# ---------------------------------------------------------------- from images to vectors


def open_embedder(settings):
    """The settings `features` -> an object with `width`, `key` and a call (images, numbers) -> (n, width)."""
    return StoredEmbeddings(settings.embeddings) if settings.embeddings else Embedder(settings)


class Embedder:
    """A backbone. Called with a data set -> unit rows (n, width) float16, zeros for what cannot be read."""

    reading = None  # of the pile: a decode.Reading

    def __init__(self, settings):
        self.backbone, cfg = open_backbone(settings.weights)
        self.width = self.backbone.embed_dim
        self.batch_size = settings.batch
        self.size = settings.size or config.evaluation_size(cfg)
        self.resize = 0 if settings.size else cfg.evaluation.resize_size
        sums = [(name, x.double().sum().item()) for name, x in self.backbone.state_dict().items()]
        self.key = cache_key(sums, self.size, self.resize, self.batch_size)

    def __call__(self, images, numbers=None):
        features = np.zeros((len(images), self.width), np.float16)
        pixels_of = EvalImages(images, self.size, self.resize)
        pixels_of.keep = False  # each image is read only once
        device = next(self.backbone.parameters()).device
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more would round differently; several processes are as fast
        with torch.no_grad():
            for pixels, _, rows in iterate_batches(pixels_of, self.batch_size):
                tokens = self.backbone(normalize(pixels.to(device)))
                features[rows] = unit_rows(tokens.cls.float())
        torch.set_num_threads(threads)
        return features


class StoredEmbeddings:
    """A file of vectors: .npz of cls (n, D) and paths (n,), or .npy (n, D), a row an image in ingest's order.

    Called like Embedder. Raises UserError for a file of another kind, for images that are not in it, and for
    rows that have no direction: zeros, NaN, infinity.
    """

    reading = None  # as in Embedder

    def __init__(self, file):
        self.file = file
        self.key = files_key(file)
        kinds = dict(cls=("fiu", 2), paths=("SU", 1))
        arrays = load_arrays(file, kinds, "must hold rows: .npy, or .npz of cls and paths", "cls")
        self.vectors = arrays["cls"]
        self.width = self.vectors.shape[1]
        self.num_rows = None if "paths" in arrays else len(self.vectors)  # to be compared with the pile
        self.row_of = {canonical_name(name): row for row, name in enumerate(arrays.get("paths", ()))}
        if "paths" in arrays and not len(self.vectors) == len(arrays["paths"]) == len(self.row_of):
            found = f"{len(self.vectors)} rows for {len(arrays['paths'])} paths, {len(self.row_of)} different"
            raise UserError(f"{file} has {found}: write a row for each path, and each path once")

    def __call__(self, images, numbers=None):
        """numbers (n,) of the images in the pile; None for others, e.g. seeds."""
        rows = self.find_rows(images, numbers)
        vectors = np.asarray(self.vectors[rows], np.float64)
        with np.errstate(over="ignore"):
            lengths = np.linalg.norm(vectors, axis=1)
        usable = (lengths > SHORTEST) & np.isfinite(lengths)
        if not usable.all():
            first = np.argmin(usable)
            found = f"{self.file} row {rows[first]}, of {images.name(first)}, has length {lengths[first]:.3g}"
            raise UserError(f"{found}, so no direction: embed this image again, or take it out of the pile")
        return unit_rows(torch.from_numpy(vectors))

    def find_rows(self, images, numbers):
        if not self.row_of and numbers is not None and max(numbers) < len(self.vectors):
            return numbers
        names = [canonical_name(images.name(i)) for i in range(len(images))]
        missing = [name for name in names if name not in self.row_of]
        if missing:
            raise UserError(f"{self.file} has no row for {missing[0]}: embed it too, or name weights")
        return [self.row_of[name] for name in names]


def canonical_name(name):
    """One name for one image, however it is written: an absolute path; in a shard, without the extension."""
    file, separator, member = os.fsdecode(name).partition("::")
    folder, base = os.path.split(member)
    return os.path.abspath(file) + separator + os.path.join(folder, base.split(".")[0])
