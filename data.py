"""Images in, crops and masks out: sources, decoding, the sampler, multi-crop, block masks, the loader.

What is unusual here: nothing has a state. Sample i of a run (its image, its crops, every colour factor) is a
pure function of (seed, i); its block mask is one of (seed, step, position in the global batch). So resuming,
and any number of workers or ranks, give the very same data, and there is no sampler to save. Workers only
decode, cut and resize; colour, blur and solarize run in batches where the model runs (`photometric`).

    python data.py --bench     # images/s of one core, beside the same arithmetic in Pillow, image by image
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import sys
import tarfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from config import UserError, run
from scenes import Scenes

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
# Pillow reads fifty formats, and most of its security holes were in the rare ones: name those we want.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_PIXELS = 64_000_000  # 192 MB as RGB; Pillow merely warns at 144 million
MEAN, STD = torch.tensor([[[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]])  # ImageNet's
# Blur probability of crop 1, crop 2, local crops. The authors' code applies 1 - p: the first line ran.
BLUR = {"as_executed": (0.0, 0.9, 0.5), "as_written": (1.0, 0.1, 0.5)}
TIMEOUT = 300  # seconds the loop waits for a micro-batch before it says which image is stuck


class BadImage(Exception):
    """One image that cannot be used: BadImage(path, reason). Training replaces it and counts it."""

    def __str__(self):
        return "{}: {}".format(*self.args)


class Images:
    """Image files, loose or in tar shards: `self[i] -> (PIL RGB, label or -1)`, or BadImage.

    `classes` is a list of names or None; `dropped` counts the samples left out of the index. The name
    "shard.tar::member" is read in place; nothing is ever unpacked, so ../../etc/passwd is just a name.
    Made of (name, label: int, str or None, offset, size) for each; offset -1: a file; name None: dropped.
    """

    def __init__(self, entries):
        names, labels, *where = zip(*(x for x in entries if x[0]))
        self.classes = sorted({x for x in labels if isinstance(x, str)}) or None
        number = {x: k for k, x in enumerate(self.classes or ())}
        labels = [number[x] if isinstance(x, str) else x if type(x) is int else -1 for x in labels]
        self.labels, self.where, self.dropped = np.array(labels), np.array(where).T, len(entries) - len(names)
        self.names = np.array([os.fsencode(x) for x in names])  # a list would end up copied in every worker

    def __len__(self):
        return len(self.names)

    def name(self, i):
        return os.fsdecode(self.names[i])

    def __getitem__(self, i):
        name, source, (offset, size) = self.name(i), self.name(i), self.where[i]
        if offset >= 0:
            with open(name.partition("::")[0], "rb") as shard:  # opened anew: workers can't share a position
                shard.seek(offset)
                source = shard.read(size)
        return decode(source, name), int(self.labels[i])


def open_source(uri):
    """The data set a URI names: `dataset[i] -> (PIL RGB, label or -1)`, `len(dataset)`, `.classes` or None.

    scenes:COUNT:seed=S:size=P (each part optional), folder:/path, tar:/path/{000..010}.tar, list:/x.jsonl, or
    the published ImageNet:split=TRAIN:root=/path:extra=... UserError when there is nothing to read.
    """
    kind, _, rest = uri.partition(":")
    options = dict(re.findall(r"(\w+)=([^:]*)", rest))
    if kind == "scenes" and (found := re.fullmatch(r"(\d*)(:?(seed|size)=\d+)*", rest)):
        return Scenes(int(found[1] or 100_000), **{k: int(v) for k, v in options.items()})
    if kind.startswith("ImageNet"):  # `extra` holds the authors' index files, which are not needed here
        if "root" not in options:
            raise UserError(f"dataset_path {uri!r} names no root; write {uri}:root=/path or folder:/path")
        kind, rest = "folder", os.path.join(options["root"], options.get("split", "train").lower())
    read = {"folder": from_folder, "tar": from_tar, "list": from_list}.get(kind)
    if not read or not rest:
        known = "scenes:10000, folder:/path, tar:/path/{000..010}.tar or list:/path/manifest.jsonl"
        raise UserError(f"dataset_path {uri!r} cannot be read; write {known}")
    entries = read(os.path.expanduser(rest))
    if dropped := sum(x[0] is None for x in entries):
        print(f"{uri}: {dropped} of {len(entries)} samples have no whole image: left out", file=sys.stderr)
    if dropped == len(entries):
        raise UserError(f"{uri} holds no images; what is read are {' '.join(EXTENSIONS)}")
    return Images(entries)


def from_folder(root):
    """Images at any depth, sorted. The first folder level is the label, unless images lie beside folders."""
    paths, visited = [], set()
    for here, folders, names in os.walk(root, followlinks=True):
        new = os.path.realpath(here) not in visited  # a link that leads back up would never end
        visited.add(os.path.realpath(here))
        folders[:] = [x for x in folders if x[0] != "." and new]
        paths += [os.path.relpath(f"{here}/{x}", root) for x in names if x[0] != "." and new]
    files = sorted(x for x in paths if x.lower().endswith(EXTENSIONS))
    if not files:
        found = " ".join(sorted({os.path.splitext(x)[1].lower() or x for x in paths})[:8])
        found = f"holds only {found}" if found else "is empty" if visited else "does not exist"
        raise UserError(f"folder {root} {found}; what is read are images in {' '.join(EXTENSIONS)}")
    labelled = all(os.sep in x for x in files)
    return [(f"{root}/{x}", x.split(os.sep)[0] if labelled else None, -1, 0) for x in files]


def from_tar(pattern):
    """WebDataset shards: key.jpg with key.cls or key.json is one sample; {000..010} stands for 11 shards."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        numbers = [str(k).zfill(len(braces[1])) for k in range(int(braces[1]), int(braces[2]) + 1)]
        return [entry for x in numbers for entry in from_tar(pattern.replace(braces[0], x, 1))]
    return list(index_tar(pattern).values())


def index_tar(path):
    """One pass over the headers, 20 us each -> {key: [name, label, offset, size]}; name None: no image."""
    samples, size = {}, os.path.getsize(path) if os.path.exists(path) else 0
    try:
        with tarfile.open(path, "r:") as shard:  # uncompressed: nothing else can be read at random
            for member in shard:
                if not member.isreg() or member.issparse():
                    continue  # folders, links, devices
                folder, base = os.path.split(member.name)
                key, extension = os.path.join(folder, base.split(".")[0]), os.path.splitext(base)[1].lower()
                sample = samples.setdefault(key, [None, None, -1, 0])
                whole = member.offset_data + member.size <= size  # not cut off by the end of the shard
                if whole and extension in EXTENSIONS and not sample[0]:  # the first image of a key counts
                    sample[0], sample[2:] = f"{path}::{member.name}", (member.offset_data, member.size)
                elif whole and extension in (".cls", ".json") and member.size < 1 << 20:
                    text = shard.extractfile(member).read().decode(errors="replace").strip()
                    try:
                        value = json.loads(text)
                    except ValueError:  # key.cls may hold the name of a class
                        value = text if extension == ".cls" else {}
                    value = value if isinstance(value, dict) else {"label": value}
                    sample[1] = value.get("label", value.get("cls", sample[1]))
    except (OSError, tarfile.TarError) as error:
        if not samples or isinstance(error, OSError):  # else truncated: it serves as far as it goes
            raise UserError(f"{path} is no readable tar; gunzip it if it is packed ({error})") from error
    return samples


def from_list(manifest):
    """curate.py's manifest: lines of JSON with `path`, or `shard` and `key`; `keep: false` is skipped."""
    entries, shards, place = [], {}, manifest
    try:
        with open(manifest, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                place, row = f"{manifest} line {number}", json.loads(line.strip() or '{"keep": false}')
                if row.get("keep") is False:
                    continue
                path, entry = os.path.join(os.path.dirname(manifest), row.get("path") or row["shard"]), None
                if not row.get("path"):
                    shards[path] = shards.get(path) or index_tar(path)
                    entry = shards[path].get(row["key"], [None] * 4)
                name, label, *where = entry or (path, None, -1, 0)
                entries.append((name, row.get("label", label), *where))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: JSON with path, or shard and key, is needed ({error!r})") from error
    return entries


def decode(source, name, look=None):
    """File path or bytes -> PIL RGB, upright, or what `look` makes of the image just opened. BadImage(name,
    reason) for whatever is wrong with it."""
    head = b""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            head = file.read(12)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:  # from the header, before any memory is spent
                    raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS:,}")
                if look:
                    return look(image)
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)  # loads the pixels: verify() would pass half a JPEG
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = f"no known format: {head}" if isinstance(error, UnidentifiedImageError) else repr(error)
        raise BadImage(name, reason) from error


def to_rgb(image):
    """Any Pillow mode -> RGB. What is transparent becomes white, as on a web page."""
    if image.mode[0] in "IF":  # 16-bit grey: Pillow's own convert cuts at 255, which leaves a white picture
        grey = np.asarray(image).astype(np.float64)
        grey *= 1 / 257 if grey.max() > 255 or "16" in image.mode else 255 if grey.max() <= 1 else 1
        image = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image):
    """PIL RGB -> uint8 (3, H, W), stored pixel by pixel (channels last)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def hash64(*parts):
    """64 bits from integers and words, the same in every process (Python's own hash() of a word is not)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(secret, x, n):
    """Where x goes in the permutation of range(n) that `secret` names; no table, a few us for any x and n."""
    # Four Feistel rounds permute a power of four >= n; walking on until the result is below n keeps it 1:1.
    half = ((n - 1).bit_length() + 1) // 2
    while True:
        left, right = x >> half, x & ((1 << half) - 1)
        for turn in range(4):
            left, right = right, left ^ (hash64(secret, turn, right) & ((1 << half) - 1))
        x = left << half | right
        if x < n:
            return x


def draw(rng, crops, width, height):
    """All random numbers of one image's V = 2 + L crops -> boxes (V, 4), flips (V,), params (V, 11) float32.

    A box is left, top, width, height, as of torchvision's RandomResizedCrop: ten tries at an area and an
    aspect in 3/4..4/3 that fit, else the largest centred box in shape. A row of params: brightness, contrast,
    saturation factor, hue shift; the turn (0-3) of each, -1 = no jitter; grayscale; blur sigma; solarize.
    """
    L, V = crops.local_crops_number, 2 + crops.local_crops_number
    low, high = np.array([crops.global_crops_scale] * 2 + [crops.local_crops_scale] * L).T[:, :, None]
    area = width * height * rng.uniform(low, high, (V, 10))
    aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (V, 10)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    w, h, fits = (x[np.arange(V), fits.argmax(1)] for x in (w, h, fits))  # the first try that fits
    across, down, flips, jittered, gray, blurred, solarized = rng.random((7, V))
    boxes = np.stack([across * (width - w + 1) // 1, down * (height - h + 1) // 1, w, h], axis=1)
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    boxes = np.where(fits[:, None], boxes, ((width - wide) // 2, (height - high) // 2, wide, high))
    jitter, neutral = np.array(crops.jitter), np.array([1, 1, 1, 0])
    factors = rng.uniform(np.maximum(neutral - jitter, [0, 0, 0, -1]), neutral + jitter, (V, 4))
    turns = rng.random((V, 4)).argsort(1)
    turns[jittered >= crops.jitter_prob] = -1
    first, second, local = BLUR[crops.blur] if isinstance(crops.blur, str) else crops.blur
    sigma = rng.uniform(0.1, 2.0, V) * (blurred < [first, second, *[local] * L])
    solarized, gray = solarized < [0, crops.solarize_prob, *[0] * L], gray < crops.gray_prob
    params = np.column_stack([factors, turns, gray, sigma, solarized])
    return boxes.astype(int), flips < 0.5, params.astype(np.float32)


def cut(image, box, size, flip):
    """uint8 (3, H, W) -> uint8 (3, size, size): bicubic, antialiased, within 2/255 of Pillow's."""
    # 0.11 ms for a crop of 224, Pillow's 0.83: PyTorch has vector code for bytes stored channels last.
    left, top, w, h = box.tolist()
    part = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    part = F.interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0]
    return part.flip(-1) if flip else part


class Crops(torch.utils.data.Dataset):
    """`self[step, micro]` -> the micro-batch of this rank, crops still uint8; a function of the numbers."""

    def __init__(self, dataset, cfg, rank=0, world=1):
        self.dataset, self.cfg, self.rank, self.world = dataset, cfg, rank, world
        self.name = getattr(dataset, "name", "image {}".format)
        self.at = torch.full((max(1, cfg.train.num_workers),), -1).share_memory_()  # what each worker reads
        self.cache, self.room = {}, 2**28  # images up to 64 KB stay decoded, 256 MB of them in each process

    def fetch(self, i, bad):
        """Sample number -> uint8 (3, H, W). An unreadable image goes to `bad`, another takes its place."""
        seed, n, worker = self.cfg.train.seed, len(self.dataset), torch.utils.data.get_worker_info()
        for attempt in range(10):
            index = hash64(seed, i, attempt) % n if attempt else permute(hash64(seed, i // n), i % n, n)
            if index in self.cache:
                return self.cache[index]
            self.at[worker.id if worker else 0] = index
            try:
                image = to_tensor(self.dataset[index][0])
            except BadImage as error:
                bad.append(error.args)
                continue
            except Exception as error:  # a bug: say where, since this worker's next images hide it from `at`
                raise RuntimeError(f"{self.name(index)}: {error!r}") from error
            if image.numel() <= min(self.room, 1 << 16):
                self.cache[index], self.room = image, self.room - image.numel()
            return image
        raise UserError(f"ten images in a row cannot be read, the last was {bad[-1][0]} ({bad[-1][1]})")

    def __getitem__(self, where):
        """(step, micro) -> dict: views and params (globals, locals), masks, samples, bad; see make_loader."""
        (step, micro), cfg, crops, B = where, self.cfg, self.cfg.crops, self.cfg.train.batch_size_per_gpu
        G, first = B * self.world * cfg.train.accumulate, (micro * self.world + self.rank) * B
        groups = (2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)
        views = [torch.empty(B * n, 3, s, s, dtype=torch.uint8) for n, s in groups]
        params, bad, samples = [], [], [step * G + first + j for j in range(B)]
        for j, i in enumerate(samples):
            image, rng = self.fetch(i, bad), np.random.default_rng(hash64(cfg.train.seed, "crops", i))
            boxes, flips, drawn = draw(rng, crops, image.shape[2], image.shape[1])
            params.append(torch.from_numpy(drawn))
            for v, (box, flip) in enumerate(zip(boxes, flips)):
                local = int(v >= 2)
                views[local][(v - 2 * local) * B + j] = cut(image, box, groups[local][1], flip)
        masks = step_masks(cfg, step, [c * G + first + j for c in (0, 1) for j in range(B)], 2 * G)
        params = [x.flatten(0, 1) for x in torch.stack(params, 1).split([2, groups[1][0]])]  # crop-major
        return dict(masks, views=views, params=params, samples=torch.tensor(samples), bad=bad)


# Colour operations on float images in 0..255 (n, 3, h, w), which they may overwrite; `by` is a number for
# all, or one for each image, (n, 1, 1, 1).
def gray(x):
    r, g, b = x.chunk(3, dim=1)
    return torch.lerp(torch.lerp(g, b, 0.114 / 0.701), r, 0.299)  # .299 r + .587 g + .114 b, as Pillow


def contrast(x, by):
    grey = gray(x.mean((2, 3), keepdim=True))  # of the mean colour: the same as the mean grey, in one pass
    return torch.lerp(grey, x, by, out=x).clamp_(0, 255)


def hue(x, by):
    """Turns the hue by `by` (1 = once round) without leaving RGB: a channel is a wave of the hue, cut off."""
    r, g, b = x.chunk(3, dim=1)
    low, top = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    base = low - (chroma := top - low)
    # The hue, -3 to 3 (0 red, 2 green, -2 blue), has the sign of g - b: no sectors. Here it is times chroma.
    turn = (g + b).sub_(r).sub_(base).copysign_(g - b)
    further = turn + chroma
    for channel, opposite in (r, 3), (g, 1), (b, 5):
        torch.lerp(turn, further, (opposite + 6 * by) % 6 - 3, out=channel)
    return x.abs_().sub_(chroma, alpha=3).abs_().add_(base).clamp_(low, top)


def blur(x, by):
    """Gaussian of 9 taps, `by` its sigma in pixels, mirrored at the edges: running mean of shifted images."""
    # Four sigmas away a tap weighs less than 1/1000: left out. The middle comes first, it always has weight.
    exp, r = (torch.exp, 4) if torch.is_tensor(by) else (math.exp, min(4, int(4 * by)))
    order = sorted(range(-r, r + 1), key=abs)
    taps = [exp(-0.5 * (k / by) ** 2) for k in order]
    shares = [tap / total for tap, total in zip(taps, itertools.accumulate(taps))][1:]
    x = F.pad(x, (r, r, r, r), mode="reflect")
    for dim in (3, 2):
        x, *parts = [x.narrow(dim, r + k, x.shape[dim] - 2 * r) for k in order]
        mean = torch.empty_like(x)
        for part, share in zip(parts, shares):
            x = torch.lerp(x, part, share, out=mean)
    return x


OPERATIONS = (  # in the order of the columns of params
    lambda x, by: x.mul_(by).clamp_(0, 255),  # brightness
    contrast,
    lambda x, by: torch.lerp(gray(x), x, by, out=x).clamp_(0, 255),  # saturation
    hue,
    lambda x, _: gray(x),  # one channel: the rest is a third of the work
    blur,
    lambda x, _: x + (255 - 2 * x) * x.clone().ge_(128),  # solarize
)
# Freeing 31 MB teaches glibc to keep blocks up to that size: no pages to clear anew, a fifth faster on a CPU.
torch.empty(31 << 20, dtype=torch.uint8)


def normalize(x):
    """uint8, or float in 0..1, (n, 3, h, w) -> float32 less ImageNet's mean, over its standard deviation."""
    mean, std = statistics(x.device)
    return ((x / 255 if x.dtype == torch.uint8 else x) - mean).div_(std)


@functools.cache
def statistics(device):  # they travel once: a small blocking copy per batch would stop the host
    return MEAN.to(device), STD.to(device)


def photometric(crops, params):
    """uint8 (n, 3, h, w) on any device, params (n, 11) of `draw` on the CPU -> normalised float32."""
    # A GPU, or small images, in one batch; a large image alone, which stays in a CPU's cache all the way.
    recolour = batched if crops.is_cuda or crops.shape[-1] < 64 else one_by_one
    mean, std = statistics(crops.device)
    out, offset, scale = torch.empty(crops.shape, device=crops.device), -mean / std, 1 / (255 * std)
    for here, x in recolour(crops, params):
        torch.mul(x, scale, out=out[here]).add_(offset)  # addcmul is slower
    return out


def one_by_one(crops, params):
    for i, row in enumerate(params.tolist()):
        x = crops[i : i + 1].to(torch.float32, memory_format=torch.contiguous_format)
        jitter = sorted(range(4), key=row[4:8].__getitem__) if row[4] >= 0 else []
        for k in jitter + [k for k in (4, 5, 6) if row[4 + k]]:
            x = OPERATIONS[k](x, row[k] if k < 4 else row[4 + k])
        yield slice(i, i + 1), x.expand(-1, 3, -1, -1)


def batched(crops, params):
    values, rows = params.to(crops.device, non_blocking=True), params.numpy()
    todo = [(rows[:, 4 + k] == turn, k, OPERATIONS[k]) for turn in range(4) for k in range(4)]
    todo += [(rows[:, k] > 0, k, OPERATIONS[k - 4]) for k in (8, 9, 10)]
    chunk = len(crops) if crops.is_cuda else 2**18 // crops[0].numel()  # 1 MB of floats: a CPU's cache again
    for here in (slice(start, start + chunk) for start in range(0, len(crops), chunk)):
        x = crops[here].to(torch.float32, memory_format=torch.contiguous_format)
        groups = [np.flatnonzero(needed[here]) for needed, _, _ in todo]
        index = torch.from_numpy(np.concatenate(groups))  # all in one copy, that the host does not wait for
        index = (index.pin_memory() if x.is_cuda else index).to(x.device, non_blocking=True)
        for who, (_, column, operation) in zip(index.split([len(group) for group in groups]), todo):
            if len(who):
                x[who] = operation(x[who], values[here][who, column, None, None, None])
        yield here, x


def block_mask(rng, n, wanted, cap):
    """About `wanted` of n x n patches, in blocks of 4 to `cap` patches that may overlap -> bool (n, n)."""
    # The published generator's random calls, in its order. It may stop a few patches short: see step_masks.
    mask, bound, tries = np.zeros((n, n), dtype=bool), math.log(1 / 0.3), 0
    while (left := wanted - int(mask.sum())) > 0 and tries < 10:
        area, aspect = rng.uniform(4, min(left, cap)), math.exp(rng.uniform(-bound, bound))
        h, w, tries = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)), tries + 1
        if h < n and w < n:
            y, x = rng.randint(0, n - h), rng.randint(0, n - w)
            block = mask[y : y + h, x : x + w]  # a view: filling it fills the mask
            if 0 < block.size - block.sum() <= min(left, cap):
                block[:], tries = True, 0
    return mask


def step_masks(cfg, step, places, crops):
    """The masks of some places among the `crops` = 2G global crops of a step -> a part of make_loader's dict.

    Published: floor(crops * probability) crops are masked, the k-th at a ratio from the k-th of equal slices
    of [low, high]; then all are shuffled. Here the slices lie over the *global* batch, each rank computes its
    rows, and masks are completed at random to the exact count, as DINOv3 does.
    """
    size, patch, ibot = cfg.crops.global_crops_size, cfg.student.patch_size, cfg.ibot
    n, masked = size // patch, int(crops * ibot.mask_sample_probability)
    cap = 0.5 * size // patch * size // patch  # half of the patches; evaluated left to right, as published
    edges = np.linspace(*ibot.mask_ratio_min_max, masked + 1).tolist()
    secret, masks = hash64(cfg.train.seed, "masks", step), np.zeros((len(places), n * n), dtype=bool)
    for mask, place in zip(masks, places):
        if (k := permute(secret, place, crops)) < masked:
            rng = random.Random(hash64(secret, k))
            wanted = int(n * n * rng.uniform(edges[k], edges[k + 1]))
            mask[:] = block_mask(rng, n, wanted, cap).ravel()
            mask[rng.sample(np.flatnonzero(~mask).tolist(), wanted - int(mask.sum()))] = True
    masks = torch.from_numpy(masks)
    weights = (1 / masks.sum(1, keepdim=True)).expand_as(masks)[masks]
    indices, masks = masks.flatten().nonzero()[:, 0], masks if ibot.mask_sample_probability else None
    return dict(masks=masks, mask_indices=indices, mask_weights=weights)


def make_loader(cfg, dataset, device, start_step=0, rank=0, world=1):
    """Micro-batches without end from `start_step` on, each from one worker, augmented on `device`: dicts.

    globals (2B, 3, S, S), locals (L*B, 3, s, s) or None: float32, crop-major; masks (2B, N) bool or None;
    mask_indices (M,) into the flat 2B * N; mask_weights (M,) = 1 / masked patches of that crop; samples (B,)
    their numbers; bad, a list of (path, reason). UserError with the image's name when a worker dies or hangs.
    """
    crops, workers = Crops(dataset, cfg, rank, world), cfg.train.num_workers
    order = ((step, micro) for step in itertools.count(start_step) for micro in range(cfg.train.accumulate))
    options = dict(num_workers=workers, timeout=TIMEOUT if workers else 0, pin_memory="cuda" in str(device))
    batches = iter(torch.utils.data.DataLoader(crops, batch_size=None, sampler=order, **options))
    # On a GPU the next batch travels, and is coloured, beside the step that uses this one. Each stream waits
    # for what the other was given before, so no memory is used again too early. On a CPU, streams do nothing.
    streams = torch.get_device_module(device)
    side, ahead = streams.Stream(), None
    while True:
        if isinstance(ahead, UserError):  # its turn has come; a loader that has failed is not asked again:
            raise ahead  # its living workers may wait for a message that was broken off
        streams.current_stream().wait_stream(side)
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            try:
                batch, ahead = ahead, on_device(read(batches, crops), device)
            except UserError as e:  # of a batch that may never be needed
                batch, ahead = ahead, e
        if batch:
            yield batch


def read(batches, crops):
    """The next batch of the workers; what goes wrong there is a UserError with the names of the images."""
    try:
        return next(batches)
    except Exception as error:  # also a worker's, with its traceback as message: the last line says what
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        at = ", ".join(crops.name(i) for i in crops.at.tolist() if i >= 0)
        raise UserError(f"reading images stopped: {reason}; last read: {at}") from error


def on_device(batch, device):
    """A batch of the workers on `device`, its crops coloured and normalised: what make_loader describes."""
    groups = zip(batch.pop("views"), batch.pop("params"))
    views = [photometric(x.to(device, non_blocking=True), p) if len(x) else None for x, p in groups]
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    return dict(batch, globals=views[0], locals=views[1])


def main():
    if "--bench" not in sys.argv:
        return print(__doc__)
    # The yardstick is what the tests compare the crops and colours with.
    runpy.run_path(os.path.join(os.path.dirname(__file__), "tests", "yardstick.py"), run_name="__main__")


if __name__ == "__main__":
    run(main)
