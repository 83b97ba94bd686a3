"""Extract frozen features: any weights, any images, their tokens in one file.

    python -m evals.extract photos/ one.jpg --weights runs/laptop --out features.npz
    python -m evals.extract tar:/data/{000..010}.tar --weights dinov2_vits14_reg4 --out features.npz

The .npz holds `cls` (n, D), `registers` (n, R, D), `patches` (n, N, D), `labels` (n,) and `paths` (n,). Images
that do not decode are named, listed under `bad`, and left out. Stop it and start it again: it continues.

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
from config import UserError
from data import normalize
from features import EvalImages, iterate_batches
from model import describe_backbone
from runfolder import atomic_open, atomic_write_text
from sources import open_images, sample_name
from tools.weights import add_weights_args, open_backbone

SAVE_EVERY = 10  # seconds of work that a killed job may have to do again
PARTS = ("cls", "registers", "patches")


@torch.no_grad()
def extract_to_npz(out, backbone, images, parts=PARTS, dtype="float32", batch_size=64, num_workers=0):
    """EvalImages through a backbone into `out` (.npz), resumable -> dict of `rows` and `bad`.

    Raises UserError if what lies half done beside `out` is of other images, weights or options.
    """
    device, work, a = next(backbone.parameters()).device, out.with_name(out.name + ".partial"), backbone.arch
    shapes = dict(cls=(), registers=(a["num_register_tokens"],),
                  patches=((images.size // a["patch_size"]) ** 2,))  # fmt: skip
    columns = {k: (np.dtype(dtype), (*shapes[k], a["embed_dim"])) for k in parts}
    columns |= dict(labels=(np.dtype("int64"), ()), numbers=(np.dtype("int64"), ()))
    state, job = work / "state.json", job_fingerprint(backbone, images, columns)
    images.keep = False  # each is looked at once
    work.mkdir(parents=True, exist_ok=True)
    done = json.loads(state.read_text()) if state.exists() else dict(job=job, read=0, rows=0, bad=[])
    if done["job"] != job:
        raise UserError(f"{work} was begun with other images, weights or options: delete it or change --out")
    with ExitStack() as stack, tqdm(total=len(images), initial=done["read"], disable=None) as bar:
        files = {k: stack.enter_context(open(work / k, "ab")) for k in columns}
        for k, (kind, shape) in columns.items():  # a torn batch is done again
            files[k].truncate(done["rows"] * kind.itemsize * math.prod(shape))
        saved = time.monotonic()
        for x, y, numbers in iterate_batches(images, batch_size, num_workers, done["read"]):
            rows = backbone(normalize(x.to(device)))._asdict() if len(x) else {}
            rows |= dict(labels=y, numbers=torch.tensor(numbers, dtype=torch.int64))
            for k, (kind, _) in columns.items():
                if k in rows:
                    files[k].write(np.ascontiguousarray(rows[k].cpu().numpy(), kind))
            read = min(done["read"] + batch_size, len(images))
            bar.update(read - done["read"])
            bad = [why for i, why in images.bad.items() if i >= done["read"]]
            done |= dict(read=read, rows=done["rows"] + len(y), bad=done["bad"] + bad)
            if read == len(images) or time.monotonic() - saved > SAVE_EVERY:
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                atomic_write_text(state, json.dumps(done))
                saved = time.monotonic()
    write_npz(out, work, columns, done, images)
    shutil.rmtree(work)
    return done


def job_fingerprint(backbone, images, options):
    """What a half-done job must agree in: a hash of weights, names of images, their size, and the options."""
    about = (images.size, images.resize, images.fit, len(images), options)
    digest = hashlib.sha256(repr(about).encode())
    for name, x in backbone.state_dict().items():
        some = x.flatten()[:: max(x.numel() // 512, 1)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    for i in images.indices:
        digest.update(sample_name(images.dataset, i).encode())
    return digest.hexdigest()


def write_npz(out, work, columns, done, images):
    """The columns become the members of one .npz (a zip of .npy), copied as they lie; only the paths are ever
    whole in memory."""
    places = [images.indices[i] for i in np.fromfile(work / "numbers", dtype=np.int64)]
    texts = dict(paths=[sample_name(images.dataset, i) for i in places], bad=done["bad"])
    with atomic_open(out) as f, zipfile.ZipFile(f, "w") as archive:
        for name, (kind, shape) in columns.items():
            if name == "numbers":
                continue
            head = dict(descr=npy.dtype_to_descr(kind), fortran_order=False, shape=(done["rows"], *shape))
            with (
                archive.open(f"{name}.npy", "w", force_zip64=True) as member,
                open(work / name, "rb") as rows,
            ):
                npy.write_array_header_1_0(member, head)
                shutil.copyfileobj(rows, member, 1 << 20)
        for name, lines in texts.items():
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, np.array(lines, dtype=np.str_))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders, .tar shards, .jsonl lists; or one URI as scenes:1000")
    add_weights_args(parser)
    add("--out", type=Path, default="features.npz")
    add("--size", type=int, default=0, help="side of the square that is seen (default: the run's, or 224)")
    add("--fit", choices=("crop", "resize", "pad"), default="crop", help="how it becomes a square: crop "
        "the centre, squeeze all of it, or keep its proportions and pad")  # fmt: skip
    add("--parts", default=",".join(PARTS), help="which tokens: some of cls,registers,patches")
    add("--dtype", choices=("float32", "float16"), default="float32")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0, help="processes that decode images beside the network")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        raise UserError(f"--parts {args.parts}: what there is, is {', '.join(PARTS)}")
    backbone, cfg = open_backbone(args.weights, args.download)
    size = args.size or cfg.evaluation.image_size or cfg.crops.global_crops_size
    resize = cfg.evaluation.resize_size if not args.size and cfg.evaluation.resize_size else size
    if size % backbone.patch_size:
        raise UserError(f"--size {size} is no multiple of the patch of {backbone.patch_size} pixels")
    images = EvalImages(open_images(args.images), size, resize, fit=args.fit)
    how = dict(crop=f"shrunk to {resize}, centre of {size} x {size}", resize=f"squeezed to {size} x {size}",
               pad=f"long side to {size}, padded to {size} x {size}")[args.fit]  # fmt: skip
    print(f"{args.weights}: {describe_backbone(backbone)}; {len(images)} images, each {how}")
    try:
        done = extract_to_npz(args.out, backbone, images, parts, args.dtype, args.batch_size, args.workers)
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): make room; what is done is kept") from None
    for why in done["bad"]:
        print("left out:", why)
    print(f"wrote {args.out}: {done['rows']} rows of {', '.join([*parts, 'labels', 'paths'])}")


if __name__ == "__main__":
    config.run(main)
