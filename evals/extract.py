"""Extract frozen features: any weights, any images, their tokens in one file.

    python -m evals.extract photos/ one.jpg --weights runs/laptop --out features.npz
    python -m evals.extract tar:/data/{000..010}.tar --weights dinov2_vits14_reg4 --out features.npz

The .npz holds `cls` (n, D), `registers` (n, R, D), `patches` (n, N, D), `paths` (n,), and `labels` (n,):
numbers of the names in `classes`, -1 for none. Images that do not decode are reported, listed under `bad`,
and left out. Interrupt it at any time: the same command resumes.

Rows are appended to plain files beside the .npz, so memory does not grow with the number of images, and a
killed run loses only its last seconds.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

import config
from config import Count, OptionalPixels, UserError, Workers, argument, parse_json
from data import normalize
from features import EvalImages, add_fit_arg, apply_reading_args, iterate_batches
from model import describe_backbone
from runfolder import atomic_open, atomic_write_text
from sources import open_images, sample_name
from survey import print_warnings
from tools.weights import add_weights_args, open_backbone

SAVE_EVERY = 10  # seconds of work that a killed job may have to repeat
PARTS = ("cls", "registers", "patches")


def extract_to_npz(out, backbone, images, parts=PARTS, dtype="float32", batch_size=64, num_workers=0):
    """Run EvalImages through a backbone into `out` (.npz), resumable -> dict with `rows` and `bad`.

    Raises UserError if the half-done job beside `out` has other images, weights or options, or if no image
    can be read.
    """
    work = out.with_name(out.name + ".partial")
    columns = column_types(backbone, images, parts, dtype)
    progress = dict(job=job_fingerprint(backbone.state_dict(), images, columns), read=0, rows=0, bad=[])
    if (work / "state.json").is_file():
        progress = read_progress(work, columns, progress)
    work.mkdir(parents=True, exist_ok=True)
    append_rows(work, columns, progress, backbone, images, batch_size, num_workers)
    if not progress["rows"]:
        shutil.rmtree(work)
        raise UserError(f"none of these {len(images)} images can be read: {progress['bad'][0]}")
    write_npz(out, work, columns, progress, images)
    shutil.rmtree(work)
    return progress


def column_types(backbone, images, parts, dtype):
    """{column: (dtype, shape of one row)} of the tokens wanted, the labels, and the numbers of the images."""
    D = backbone.arch["embed_dim"]
    R = backbone.arch["num_register_tokens"]
    N = (images.size // backbone.arch["patch_size"]) ** 2
    shapes = dict(cls=(D,), registers=(R, D), patches=(N, D))
    columns = {name: (np.dtype(dtype), shapes[name]) for name in parts}
    columns["labels"] = (np.dtype("int64"), ())
    columns["numbers"] = (np.dtype("int64"), ())
    return columns


def row_bytes(column):
    kind, shape = column
    return kind.itemsize * math.prod(shape)


def read_progress(work, columns, fresh):
    """The progress of the half-done job in `work`. UserError unless it is this job's and its files are whole.

    fresh: the progress of this job before its first image.
    """
    try:
        saved = parse_json((work / "state.json").read_bytes())
        whole = [type(value) for value in saved.values()] == [type(value) for value in fresh.values()]
        for name, column in columns.items():
            whole = whole and 0 <= saved["rows"] * row_bytes(column) <= (work / name).stat().st_size
        if whole and saved["job"] == fresh["job"] and saved["read"] >= 0:
            return saved
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    others = "other images, weights or options, or is damaged"
    raise UserError(f"{work} was begun with {others}: delete it or change --out")


def job_fingerprint(weights, images, options):
    """A hash of all that a job must share with a half-done one to resume it: weights, images and options.

    weights: {name: tensor}.
    """
    about = (images.size, images.resize, images.fit, len(images), options)
    reading = getattr(images.dataset, "reading", None)
    if reading and any(reading):
        about += (reading,)
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in weights.items():
        some = tensor.flatten()[:: max(tensor.numel() // 512, 1)]  # 512 numbers of each tensor are enough
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    for i in images.indices:
        digest.update(os.fsencode(sample_name(images.dataset, i)))
    return digest.hexdigest()


@torch.no_grad()
def append_rows(work, columns, progress, backbone, images, batch_size, num_workers):
    """Append the rows of all unread images to `work`, a plain file per column, and update `progress`."""
    device = next(backbone.parameters()).device
    images.keep = False  # each image is read only once
    with ExitStack() as stack, tqdm(total=len(images), initial=progress["read"], disable=None) as bar:
        files = {name: stack.enter_context(open(work / name, "ab")) for name in columns}
        for name, column in columns.items():  # a torn batch is cut off and done again
            files[name].truncate(progress["rows"] * row_bytes(column))
        last_save = time.monotonic()
        for pixels, labels, numbers in iterate_batches(images, batch_size, num_workers, progress["read"]):
            rows = dict(labels=labels, numbers=torch.tensor(numbers, dtype=torch.int64))
            if len(pixels):
                tokens = backbone(normalize(pixels.to(device)))
                rows |= {name: x.float() for name, x in tokens._asdict().items()}
            for name, (kind, _) in columns.items():
                if name in rows:
                    files[name].write(np.ascontiguousarray(rows[name].cpu().numpy(), kind))
            already_read = progress["read"]
            progress["read"] = min(already_read + batch_size, len(images))
            progress["rows"] += len(labels)
            progress["bad"] += [reason for i, reason in images.bad.items() if i >= already_read]
            bar.update(progress["read"] - already_read)
            if progress["read"] == len(images) or time.monotonic() - last_save > SAVE_EVERY:
                save_progress(work, files, progress)
                last_save = time.monotonic()


def save_progress(work, files, progress):
    """Write rows and state to the disk: the rows first, since the state counts them."""
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
    atomic_write_text(work / "state.json", json.dumps(progress))


def write_npz(out, work, columns, progress, images):
    """Copy the columns into one .npz, a zip of .npy files; only the paths are ever whole in memory."""
    numbers = np.fromfile(work / "numbers", dtype=np.int64)
    paths = [sample_name(images.dataset, images.indices[i]) for i in numbers]
    with atomic_open(out) as f, zipfile.ZipFile(f, "w") as archive:
        for name, (kind, shape) in columns.items():
            if name == "numbers":
                continue
            shape = (progress["rows"], *shape)
            header = dict(descr=npy.dtype_to_descr(kind), fortran_order=False, shape=shape)
            with open(work / name, "rb") as rows:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    npy.write_array_header_1_0(member, header)
                    shutil.copyfileobj(rows, member, 1 << 20)
        classes = images.dataset.classes or []
        for name, texts in (("paths", paths), ("classes", classes), ("bad", progress["bad"])):
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, np.array(texts, dtype=np.str_))


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.extract", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders, .tar shards, .jsonl lists; or a URI such as scenes:1000")
    add_weights_args(parser)
    add("--out", type=argument(Path), default="features.npz")
    add("--size", type=argument(OptionalPixels), default=0,
        help="side of the square input (default: the run's, or 224)")  # fmt: skip
    add_fit_arg(parser)
    add("--parts", default=",".join(PARTS), help="which tokens: some of cls,registers,patches")
    add("--save-dtype", choices=("float32", "float16"), default="float32", help="numbers in the file")
    add("--batch-size", type=argument(Count), default=64)
    add("--workers", type=argument(Workers), default=0, help="processes that decode images meanwhile")
    return parser.parse_args()


def main():
    args = parse_args()
    parts = args.parts.split(",")
    if args.out.suffix != ".npz":
        raise UserError(f"--out {args.out}: it must end in .npz")
    if not set(parts) <= set(PARTS):
        raise UserError(f"--parts {args.parts}: choose from {', '.join(PARTS)}")
    backbone, cfg = open_backbone(args.weights, args.download, args.dtype)
    size = args.size or config.evaluation_size(cfg)
    resize = size
    if not args.size and cfg.evaluation.resize_size:
        resize = cfg.evaluation.resize_size
    if size % backbone.patch_size:
        raise UserError(f"--size {size} is not a multiple of the patch size, {backbone.patch_size} pixels")
    dataset = open_images(args.images, apply_reading_args(args, cfg))
    images = EvalImages(dataset, size, resize, fit=args.fit or cfg.evaluation.fit)
    print_warnings(dataset, ", ".join(args.images), images.fit)
    print(f"{args.weights}: {describe_backbone(backbone)}; {len(images)} images, {images.protocol}")
    try:
        options = parts, args.save_dtype, args.batch_size, args.workers
        done = extract_to_npz(args.out, backbone, images, *options)
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): make room, or name another --out") from None
    for reason in done["bad"]:
        print("left out:", reason)
    print(f"wrote {args.out}: {done['rows']} rows of {', '.join([*parts, 'labels', 'paths'])}")


if __name__ == "__main__":
    config.run(main)
