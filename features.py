"""A frozen backbone looks at images: any weights, any images, and what it saw in one file.

    python features.py photos/ one.jpg --weights runs/laptop --out features.npz
    python features.py tar:/data/{000..010}.tar --weights dinov2_vits14_reg4 --out features.npz

The .npz holds `cls` (n, D), `registers` (n, R, D), `patches` (n, N, D), `labels` (n,) and `paths` (n,). What
does not decode is named, listed under `bad`, and left out. Stop it and start it again: it goes on.

What is unusual here: rows are appended to plain files beside the .npz, so memory does not grow with the
number of images, and a killed run loses the last seconds. The read-out of foreground against background
is ridge regression in closed form (no learning rate to choose), good enough to compare backbones while they
train.
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
import torch.nn.functional as F
from numpy.lib import format as npy
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

import config
from config import UserError
from data import BadImage, Images, from_folder, from_list, from_tar, normalize, open_source, to_tensor
from model import VisionTransformer, describe, load_backbone
from runfolder import in_one_act, replace
from weights import download, released

CACHE_BYTES = 512 * 2**20  # evaluation images up to this total are decoded once and kept
SAVE_EVERY = 10  # seconds of work that a killed job may have to do again
NARROW = 32  # a picture longer than that many times its width shows nothing to a patch
GREY = (124, 116, 104)  # ImageNet's mean colour: zero for the network


# ---------------------------------------------------------------- weights


def weights_flags(parser):
    """The flags that every script for frozen features has."""
    add = parser.add_argument
    add("--weights", default="runs/laptop", help="a run folder, a file of weights (teacher.pth, Meta's, "
        "timm's, Hugging Face's) or a released name such as dinov2_vits14_reg4; `random:` before it: the "
        "same network, untrained")  # fmt: skip
    add("--download", action="store_true", help="fetch Meta's file of that name, if it is not in the cache")


def open_weights(source, fetch=False):
    """--weights and --download -> a frozen VisionTransformer on the GPU if there is one, and its config.

    The config is that of the run around the weights; a file on its own gets the published evaluation (224
    pixels out of 256). Raises UserError for what is no weights file (see weights.py).
    """
    name = str(source).removeprefix("random:")
    untrained, stem = name != str(source), released(name)
    if fetch and not untrained:
        name = download(name)
    own = (Path(name) if Path(name).is_dir() else Path(name).parent) / "config.yaml"
    if own.is_file():
        cfg = config.load(file=own)
    else:
        cfg = config.load()
        cfg.evaluation.image_size, cfg.evaluation.resize_size = 224, 256
        cfg.train.num_workers = min(cfg.train.num_workers, (os.cpu_count() or 1) // 2)
    if untrained and stem:  # nothing needs to be on the disk
        import hubconf

        torch.manual_seed(0)
        backbone = getattr(hubconf, stem.removeprefix("dinov2_").replace("reg4", "reg"))()
    elif untrained:
        backbone = random_twin(load_backbone(name), cfg)
    else:
        backbone = load_backbone(name)
    return backbone.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False), cfg


def random_twin(backbone, cfg, seed=0):
    """The same network, untrained: the floor that every number must be compared with."""
    torch.manual_seed(seed)
    twin = VisionTransformer(**backbone.arch, init_std=cfg.student.init_std)
    return twin.to(backbone.norm.weight.device).eval()


# ---------------------------------------------------------------- images


def open_photos(paths):
    """What stands on a command line -> one data set: images, folders, .tar shards, .jsonl manifests; or one
    data URI (scenes:..., folder:... as train.dataset_path). Raises UserError for what is not there."""
    if len(paths) == 1 and ":" in paths[0] and not Path(paths[0]).exists():
        return open_source(paths[0])
    entries = []
    for path in paths:
        if Path(path).is_dir():
            entries += from_folder(path)
        elif path.endswith((".tar", ".jsonl")):
            entries += from_tar(path) if path.endswith(".tar") else from_list(path)
        elif Path(path).is_file():
            entries.append((path, None, -1, 0))
        else:
            raise UserError(f"{path} does not exist: give images, folders, .tar files or one data URI")
    if not any(x[0] for x in entries):
        raise UserError(f"there are no images in {', '.join(map(str, paths)) or 'an empty list'}")
    return Images(entries)


def name_of(dataset, i):
    return dataset.name(i) if hasattr(dataset, "name") else f"scene {i}"


def photo(dataset, i):
    """Image i of a data set and its label; BadImage if it does not decode or is too narrow to look at."""
    image, label = dataset[i]
    if max(image.size) > NARROW * min(image.size):
        size = "{} x {} pixels".format(*image.size)
        raise BadImage(name_of(dataset, i), f"{size}, more than {NARROW} times as long as wide: cut it up")
    return image, label


def preprocess(image, size, resize, how="crop"):
    """PIL RGB -> uint8 (3, size, size).

    "crop": short side to `resize` (bicubic), then the centre; DINOv2's k-NN protocol is 256, then 224.
    "resize": all of the image, squeezed. "pad": all of it in its proportions, with a grey border at the right
    or the bottom.
    """
    if how == "resize":
        return to_tensor(image.resize((size, size), Image.BICUBIC))
    if how == "pad":
        scale, page = size / max(image.size), Image.new("RGB", (size, size), GREY)
        page.paste(image.resize([max(round(s * scale), 1) for s in image.size], Image.BICUBIC))
        return to_tensor(page)
    scale = resize / min(image.size)
    if min(image.size) != resize:
        image = image.resize([max(round(s * scale), size) for s in image.size], Image.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def fit(image, patch, side=0):
    """PIL RGB of any size -> uint8 (3, H, W): short side about `side` pixels (0: as it is), both multiples of
    `patch`. All of the image stays; each side is stretched by half a patch at most."""
    scale = side / min(image.size) if side else 1
    width, height = (max(round(s * scale / patch), 1) * patch for s in image.size)
    return to_tensor(image if image.size == (width, height) else image.resize((width, height), Image.BICUBIC))


class EvalImages(Dataset):
    """Images ready for a backbone: item i is (uint8 (3, size, size), label), or a BadImage."""

    def __init__(self, dataset, size, resize=0, limit=0, how="crop"):
        self.dataset, self.size, self.resize, self.how = dataset, size, resize or size, how
        n = len(dataset)
        # A limited set takes every n/limit-th image: folders are sorted by class, the first `limit` would be
        # one class.
        self.indices = list(range(n)) if not limit or limit >= n else [i * n // limit for i in range(limit)]
        self.keep = len(self.indices) * 3 * size * size <= CACHE_BYTES
        self.cache, self.bad = {}, {}  # bad: {number: path and reason}, as far as `batches` has looked

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if i not in self.cache:
            try:
                image, label = photo(self.dataset, self.indices[i])
                item = preprocess(image, self.size, self.resize, self.how), label
            except BadImage as e:
                item = e
            if not self.keep:
                return item
            self.cache[i] = item
        return self.cache[i]


def batches(images, batch_size=256, num_workers=0, start=0):
    """EvalImages from number `start` on -> uint8 (b, 3, S, S), labels (b,), numbers (b,).

    Images that do not decode are left out; images.bad says why.
    """

    def collate(items):  # in the workers
        good = [x for x in items if not isinstance(x, BadImage)]
        shape = (0, 3, images.size, images.size)
        pixels = torch.stack([x for x, _ in good]) if good else torch.empty(shape, dtype=torch.uint8)
        reasons = [str(x) if isinstance(x, BadImage) else None for x in items]
        return pixels, torch.tensor([y for _, y in good], dtype=torch.long), reasons

    rest = Subset(images, range(start, len(images)))
    for x, y, reasons in DataLoader(rest, batch_size, collate_fn=collate, num_workers=num_workers):
        numbers = range(start, start := start + len(reasons))
        images.bad.update((i, why) for i, why in zip(numbers, reasons) if why)
        yield x, y, [i for i, why in zip(numbers, reasons) if not why]


# ---------------------------------------------------------------- features


@torch.no_grad()
def extract(backbone, images, batch_size=256, num_workers=0, patches=False):
    """All EvalImages through a backbone -> cls (n, D) fp32, labels (n,), patches (n, N, D) if asked for."""
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    cls, labels, dense = [], [], []
    for x, y, _ in batches(images, batch_size, num_workers):
        tokens = backbone(normalize(x.to(device)))
        cls.append(tokens.cls.float().cpu())
        labels.append(y)
        if patches:
            dense.append(tokens.patches.float().cpu())
    backbone.train(was_training)
    return torch.cat(cls), torch.cat(labels), torch.cat(dense) if patches else None


PARTS = ("cls", "registers", "patches")


@torch.no_grad()
def extract_to(out, backbone, images, parts=PARTS, dtype="float32", batch_size=64, num_workers=0):
    """EvalImages through a backbone into `out` (.npz), resumable -> dict of `rows` and `bad`.

    Raises UserError if what lies half done beside `out` is of other images, weights or options.
    """
    device, work, a = next(backbone.parameters()).device, out.with_name(out.name + ".partial"), backbone.arch
    shapes = dict(cls=(), registers=(a["num_register_tokens"],),
                  patches=((images.size // a["patch_size"]) ** 2,))  # fmt: skip
    columns = {k: (np.dtype(dtype), (*shapes[k], a["embed_dim"])) for k in parts}
    columns |= dict(labels=(np.dtype("int64"), ()), numbers=(np.dtype("int64"), ()))
    state, job = work / "state.json", fingerprint(backbone, images, columns)
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
        for x, y, numbers in batches(images, batch_size, num_workers, done["read"]):
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
                replace(state, json.dumps(done))
                saved = time.monotonic()
    pack(out, work, columns, done, images)
    shutil.rmtree(work)
    return done


def fingerprint(backbone, images, options):
    """What a half-done job must agree in: a hash of weights, names of images, their size, and the options."""
    about = (images.size, images.resize, images.how, len(images), options)
    digest = hashlib.sha256(repr(about).encode())
    for name, x in backbone.state_dict().items():
        some = x.flatten()[:: max(x.numel() // 512, 1)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    for i in images.indices:
        digest.update(name_of(images.dataset, i).encode())
    return digest.hexdigest()


def pack(out, work, columns, done, images):
    """The columns become the members of one .npz (a zip of .npy), copied as they lie; only the paths are ever
    whole in memory."""
    places = [images.indices[i] for i in np.fromfile(work / "numbers", dtype=np.int64)]
    texts = dict(paths=[name_of(images.dataset, i) for i in places], bad=done["bad"])
    with in_one_act(out) as f, zipfile.ZipFile(f, "w") as archive:
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


# ---------------------------------------------------------------- a linear map in closed form


def ridge(x, y, strength=1e-3):
    """Linear regression in closed form, x (n, D) and y (n,) -> a function (m, D) -> (m,)."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = F.pad((x - mean) / std, (0, 1), value=1.0)  # the last column is the bias
    gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ y)
    return lambda new: F.pad((new - mean) / std, (0, 1), value=1.0) @ weights


def foreground_miou(backbone, scenes, size):
    """How well one linear map of patch tokens tells objects from background: mean IoU of the two, in pixels.

    The map is fitted on two thirds of (at most) 600 scenes, to the share of foreground in each patch, and
    scored on the others; its answer is enlarged (bilinear) and cut at one half.
    """
    n = min(600, len(scenes))
    train, test = n - n // 3, n // 3
    masks = torch.stack([torch.from_numpy(scenes.scene(i)[2] > 0) for i in range(train + test)]).float()
    masks = F.interpolate(masks[:, None], size=(size, size), mode="area")  # (n, 1, S, S)
    images = EvalImages(scenes, size)
    images.indices = images.indices[: train + test]
    patches = extract(backbone, images, patches=True)[2]  # (n, N, D)
    n = size // backbone.patch_size
    share = F.avg_pool2d(masks, backbone.patch_size)  # (n, 1, n, n)
    predict = ridge(patches[:train].flatten(0, 1), share[:train].flatten())
    answer = predict(patches[train:].flatten(0, 1)).view(test, 1, n, n)
    answer = F.interpolate(answer, size=(size, size), mode="bilinear") > 0.5
    truth = masks[train:] > 0.5
    ious = [(a & t).sum() / (a | t).sum() for a, t in ((answer, truth), (~answer, ~truth))]
    return float(sum(ious) / 2)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", help="images, folders, .tar shards, .jsonl lists; or one URI as scenes:1000")
    weights_flags(parser)
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
    backbone, cfg = open_weights(args.weights, args.download)
    size = args.size or cfg.evaluation.image_size or cfg.crops.global_crops_size
    resize = cfg.evaluation.resize_size if not args.size and cfg.evaluation.resize_size else size
    if size % backbone.patch_size:
        raise UserError(f"--size {size} is no multiple of the patch of {backbone.patch_size} pixels")
    images = EvalImages(open_photos(args.images), size, resize, how=args.fit)
    how = dict(crop=f"shrunk to {resize}, centre of {size} x {size}", resize=f"squeezed to {size} x {size}",
               pad=f"long side to {size}, padded to {size} x {size}")[args.fit]  # fmt: skip
    print(f"{args.weights}: {describe(backbone)}; {len(images)} images, each {how}")
    try:
        done = extract_to(args.out, backbone, images, parts, args.dtype, args.batch_size, args.workers)
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): make room; what is done is kept") from None
    for why in done["bad"]:
        print("left out:", why)
    print(f"wrote {args.out}: {done['rows']} rows of {', '.join([*parts, 'labels', 'paths'])}")


if __name__ == "__main__":
    config.run(main)
