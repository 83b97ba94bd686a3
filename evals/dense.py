"""What frozen patch tokens know of every pixel: a linear head on them names classes, or metres.

    python eval_dense.py --task seg                       # the laptop run, on scenes: their masks are exact
    python eval_dense.py --task depth --layers 4
    python eval_dense.py --task seg --train pairs:train/images:train/masks --test pairs:test/images:test/masks
        --classes 11 --ignore 11 --size 96 --out runs/camvid     # one line: your own folders; here CamVid
    python eval_dense.py --task seg --head runs/camvid/head.pth --predict photo.jpg --out mask.png

Prints mIoU, or RMSE and delta1 (the share of pixels less than a factor of 1.25 off), beside the same head on
an untrained network and on raw pixels. The heads are DINOv2's, and so is their file format: released ones go
into --head. Classes: BatchNorm and a linear map of the last block, or of the last four side by side. Metres:
a weighted mean of 256 distances, the weights linear in [patch, CLS] of blocks without the final norm.

What is unusual here: nothing is augmented, so a frozen network looks at each training image once; what it saw
is kept, in half precision, as far as KEEP_BYTES allow, and computed again beyond. Depth, which has no norm,
is learned from standardised features (else the scale of a network would be its learning rate), and that is
folded into the weights at the end. The loss is taken at the size that the network sees, the score at that of
the truth. An image larger than --window is seen in windows, of which a third overlaps.
"""

import argparse
import colorsys
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import config
from config import UserError
from data import normalize, permuted_index
from features import load_image, resize_to_patches, untrained_copy
from model import Tokens, describe_backbone
from runfolder import atomic_open
from scenes import CLASSES
from sources import EXTENSIONS, MAX_PIXELS, PILLOW_FORMATS, BadImage, open_images, open_source
from tools.weights import add_weights_args, open_backbone

KEEP_BYTES, BINS, SAVE_EVERY = 2**30, 256, 200  # of all training images; distances; steps
RATE = dict(seg=1, depth=2)  # over the width of the features: for a ViT-L about DINOv3's 1e-3 and 3e-4
DECAY, STEPS = dict(seg=1e-3, depth=1e-4), dict(seg=1000, depth=600)
JOB = ("task", "names", "ignore", "depth_range", "depth_scale", "size", "window", "layers", "train",
       "iterations", "batch_size", "lr", "seed")  # fmt: skip


# ---------------------------------------------------------------- images, and what is true of their pixels


def read_plane(path):
    """.npy, or an image of grey or palette -> array (h, w). BadImage for whatever is wrong with it."""
    try:
        if path.suffix.lower() == ".npy":
            plane = np.load(path, allow_pickle=False)
        else:
            with Image.open(path, formats=PILLOW_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError("{} x {} pixels are too many".format(*image.size))
                plane = np.asarray(image)
        if plane.ndim != 2 or plane.dtype.kind not in "buif":
            raise ValueError(f"an array {plane.shape} of {plane.dtype}, not one number per pixel")
        return plane
    except (OSError, ValueError, SyntaxError, EOFError, AttributeError, Image.DecompressionBombError) as e:
        raise BadImage(path, repr(e)) from e


def read_truth(path, job):
    """-> int16 (h, w), classes with -1 for void; or float32 (h, w), metres with 0 for unknown."""
    plane, npy = read_plane(path), path.suffix.lower() == ".npy"
    if job.task == "depth":
        if not npy and plane.dtype.itemsize == 1:
            raise BadImage(path, "8 bits are too few for depth: write a 16-bit PNG, or .npy in metres")
        plane, (low, high) = plane.astype(np.float32) / (1 if npy else job.depth_scale), job.depth_range
        known = (plane >= low) & (plane <= high)  # nan and inf are neither
        if not known.any():
            raise BadImage(path, f"no depth in {low:g} to {high:g} m: see --depth-scale and --depth-range")
        return torch.from_numpy(np.where(known, plane, np.float32(0)))
    void, C = plane == job.ignore, len(job.names)
    label = plane.astype(np.int64) - (job.ignore == 0)  # ADE20k: 0 is void, the first class is 1
    if (wrong := ~void & ((label < 0) | (label >= C) | (plane % 1 > 0))).any():
        known = f"neither of the {C} classes nor void, {job.ignore}: see --classes and --ignore"
        raise BadImage(path, f"label {plane[wrong].max()}, on {wrong.mean():.2%} of the pixels, is {known}")
    return torch.from_numpy(np.where(void, -1, label).astype(np.int16))


class Pairs:
    """Images with a mask or depth: `self[i] -> (PIL RGB, truth (h, w))`, or None, and in `bad` the reason."""

    def __init__(self, uri, job):
        self.uri, self.job, self.bad, self.truths = uri, job, {}, None
        kind, *folders = uri.split(":")
        if kind == "scenes":
            self.images = open_source(uri)
            return
        if kind != "pairs" or len(folders) != 2:
            raise UserError(f"{uri} has no masks or depth: write scenes:600 or pairs:IMAGES_DIR:MASKS_DIR")
        here, root = map(os.path.expanduser, folders)
        self.images = open_source(f"folder:{here}")
        stem = lambda path, start: os.path.splitext(os.path.relpath(path, start))[0]  # noqa: E731
        files = sorted(p for p in Path(root).rglob("*") if p.suffix.lower() in (*EXTENSIONS, ".npy"))
        there = {stem(p, root): p for p in files}
        self.truths = [there.get(stem(self.images.name(i), here)) for i in range(len(self.images))]
        if not any(self.truths):
            held = f"holds {files[0].name} and the like" if files else "holds no images and no .npy files"
            raise UserError(f"{root} {held}, nothing with the name of an image in {here}")

    def __len__(self):
        return len(self.images)

    def read(self, i):
        if self.truths is None:
            image, _, mask, depth = self.images.scene(i)
            truth = depth if self.job.task == "depth" else mask.astype(np.int16)
            return Image.fromarray(image), torch.from_numpy(truth)
        (image, _), path = load_image(self.images, i), self.truths[i]
        if path is None:
            raise BadImage(self.images.name(i), "no mask or depth has its name")
        truth = read_truth(path, self.job)
        if truth.shape[::-1] != image.size:
            sizes = "{} x {} pixels, its image {} x {}".format(*truth.shape[::-1], *image.size)
            raise BadImage(path, f"{sizes}: make them equal")
        return image, truth

    def __getitem__(self, i):
        if i in self.bad:
            return None
        try:
            return self.read(i)
        except BadImage as e:
            self.bad[i] = str(e)
        if len(self.bad) > max(len(self) // 10, min(len(self) - 1, 3)):  # then it isn't the files
            raise UserError(f"{len(self.bad)} pairs of {self.uri} cannot be used, the last: {self.bad[i]}")


# ---------------------------------------------------------------- what a backbone says


class Pixels(nn.Module):
    """No network at all: a token is the pixels of its patch, [CLS] is their mean."""

    def __init__(self, arch):
        super().__init__()
        self.patch_size, self.arch = arch["patch_size"], arch | dict(embed_dim=3 * arch["patch_size"] ** 2)

    def intermediate(self, images, layers, norm=True):
        x = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, 3 p p)
        return [Tokens(x.mean(1), x[:, :0], x)] * len(layers)


def block_ids(depth, task, layers):
    """The blocks that the published heads read, 0-based."""
    if depth < layers:
        raise UserError(f"--layers {layers}: this network has only {depth} blocks, so take --layers 1")
    if layers == 1 or task == "seg":
        return list(range(depth - layers, depth))
    return [4, 11, 17, 23] if depth == 24 else [(k + 1) * depth // 4 - 1 for k in range(4)]


class Features:
    """The tokens of a frozen backbone as a head wants them; those of training images are remembered."""

    def __init__(self, backbone, job):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.backbone, self.job, self.patch = backbone.to(self.device).eval(), job, backbone.patch_size
        self.blocks = block_ids(backbone.arch["depth"], job.task, job.layers)
        self.width = backbone.arch["embed_dim"] * len(self.blocks) * (2 if job.task == "depth" else 1)
        self.kept, self.room = {}, KEEP_BYTES

    @torch.no_grad()
    def look(self, images):
        """uint8 (b, 3, h, w) -> (b, N, width), half precision."""
        depth, images = self.job.task == "depth", normalize(images.to(self.device))
        parts = []
        for tokens in self.backbone.intermediate(images, self.blocks, norm=not depth):
            parts += [tokens.patches, tokens.cls[:, None].expand_as(tokens.patches)][: 1 + depth]
        return torch.cat(parts, -1).half()

    def pair(self, pairs, i):
        """Training image i -> features (1, N, width), truth (1, h, w) at the size that is seen; or None."""
        if i in self.kept or (item := pairs[i]) is None:
            return self.kept.get(i)
        image = resize_to_patches(item[0], self.patch, self.job.size)
        truth = F.interpolate(item[1][None, None].float(), image.shape[1:], mode="nearest-exact")[0]
        views = self.look(image[None]).cpu(), truth.to(item[1].dtype)
        if (size := sum(x.nbytes for x in views)) <= self.room:
            self.kept[i], self.room = views, self.room - size
        return views

    def batch(self, pairs, step):
        """The images of a step, those of one size together -> [(x (b, N, width), y (b, h, w)), ...]."""
        b, n, groups = self.job.batch_size, len(pairs), {}
        for k in range(step * b, step * b + b):
            i = permuted_index((self.job.seed, k // n), k % n, n)  # every epoch has its own order
            while (views := self.pair(pairs, i)) is None:
                i = (i + 1) % n
            groups.setdefault(views[1].shape, []).append(views)
        return [[torch.cat(x).to(self.device) for x in zip(*views)] for views in groups.values()]

    def digest(self):
        """Sixteen hexadecimal digits for these weights."""
        some = [x.flatten()[:: max(x.numel() // 64, 1)].float() for x in self.backbone.state_dict().values()]
        return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in some)).hexdigest()[:16]


# ---------------------------------------------------------------- heads


def new_head(task, width, outputs):
    """The published head, under the published names and shapes."""
    parts = dict(bn=nn.BatchNorm1d(width)) if task == "seg" else {}
    parts[f"conv_{task}"] = conv = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return nn.ModuleDict(dict(decode_head=nn.ModuleDict(parts)))


def apply(head, x):
    """Features (T, width) -> (T, outputs): a 1 x 1 convolution is a linear map of each token."""
    *norm, conv = head["decode_head"].values()
    return F.linear(norm[0](x) if norm else x, conv.weight.flatten(1), conv.bias)


def read_head(path, job, backbone):
    """A head's file, ours or a released one -> the head, and what ours says of itself (else {})."""
    name, what = f"decode_head.conv_{job.task}.weight", f"{path} is no linear head for --task {job.task}"
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        tensors, about = file.get("state_dict", file), file.get("about", {})
        outputs, width = tensors[name].shape[:2]
        there = {k: list(v.shape) for k, v in tensors.items()}
    except Exception as e:  # no such file, a web page, a pickle that wants to run code, another head ...
        raise UserError(f"{what} ({type(e).__name__}: {e})") from None
    one = backbone.arch["embed_dim"] * (2 if job.task == "depth" else 1)
    if width not in (one, 4 * one):
        has = f"{describe_backbone(backbone)} has {one}, or {4 * one} with 4 layers"
        raise UserError(f"{path} wants features of width {width}, but this {has}: name its own --weights")
    head = new_head(job.task, width, outputs).eval()
    here = {k: list(v.shape) for k, v in head.state_dict().items()}
    there |= {k: [] for k in here if k.endswith("num_batches_tracked")}
    if wrong := [k for k in here | there if here.get(k) != there.get(k)]:
        raise UserError(f"{what}: {wrong[0]} is {there.get(wrong[0])} there, not {here.get(wrong[0])}")
    head.load_state_dict(head.state_dict() | tensors)
    job.layers = width // one
    features = Features(backbone, job)
    if about.get("backbone") not in (None, features.digest()):
        raise UserError(f"{path} was trained on other weights than {job.weights}: name those with --weights")
    if file.get("step", 0) < about.get("iterations", 0):
        raise UserError(f"{path} is only half trained: give the command that trained it once more")
    return head.to(features.device), about


def metres(logits, low, high):
    """(b, bins, h, w) -> (b, h, w): the mean of distances from low to high, weighted by relu(logit) + 0.1."""
    distances = torch.linspace(low, high, logits.shape[1], device=logits.device)
    weights = F.relu(logits) + 0.1
    return torch.einsum("bkhw,k->bhw", weights, distances) / weights.sum(1)


def answer(logits, job, height, width, patch):
    """A head's (b, N, outputs) -> class logits (b, C, height, width), or metres (b, 1, height, width)."""
    planes = logits.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    if job.task == "depth":  # published: features four times finer, then the linear map; the same, but dearer
        planes = metres(F.interpolate(planes, scale_factor=4, mode="bilinear"), *job.depth_range)[:, None]
    return F.interpolate(planes, size=(height, width), mode="bilinear")


def loss(answers, truth, task):
    """answers (P, C or 1) and truth (P,) of pixels -> cross-entropy, or the scale-invariant log error of
    Eigen et al. 2014 (the root of equation 4, lambda 0.85). What is void does not count."""
    known = truth >= 0 if task == "seg" else truth > 0
    answers, truth, n = answers[known], truth[known], max(int(known.sum()), 1)
    if task == "seg":
        return F.cross_entropy(answers, truth.long(), reduction="sum") / n
    g = answers[:, 0].log() - truth.log()
    return (g.square().sum() / n - 0.85 * (g.sum() / n) ** 2 + 1e-8).sqrt()


def step_loss(features, head, views, mean=0.0, std=1.0):
    """The loss of what Features.batch gives."""
    pixels, truths = [], []
    for x, y in views:
        logits = apply(head, (x.flatten(0, 1).float() - mean) / std).unflatten(0, x.shape[:2])
        planes = answer(logits, features.job, *y.shape[1:], features.patch)
        pixels.append(planes.movedim(1, -1).flatten(0, 2))  # (b h w, C or 1)
        truths.append(y.flatten())
    return loss(torch.cat(pixels), torch.cat(truths), features.job.task)


def begin(features, about, path):
    """-> head, optimizer, learning rate and steps done: anew, or as `path` has them."""
    job, outputs = features.job, BINS if features.job.task == "depth" else len(features.job.names)
    torch.manual_seed(job.seed)
    head, rate = new_head(job.task, features.width, outputs), job.lr or RATE[job.task] / features.width
    optimizer = torch.optim.AdamW(head.to(features.device).parameters(), rate, weight_decay=DECAY[job.task])
    if not path.exists():
        return head, optimizer, rate, 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there, done = saved["about"], saved["step"]
    except Exception as e:
        raise UserError(f"{path} was not written by this script ({e!r}): move it, or change --out") from None
    if differ := [f"{k} {there.get(k)}, not {v}" for k, v in about.items() if there.get(k) != v]:
        raise UserError(f"{path} was made with {differ[0]}: delete it, or choose another --out")
    head.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    return head, optimizer, rate, done


def train_head(features, pairs, path):
    """A head for these features, learned from `pairs`, in the file `path`. What was begun there goes on."""
    job, mean, std = features.job, 0.0, 1.0
    about = {k: getattr(job, k) for k in JOB} | dict(backbone=features.digest())
    head, optimizer, rate, start = begin(features, about, path)
    if job.task == "depth" and start < job.iterations:  # as the first images have it
        x = torch.cat([x.flatten(0, 1) for x, _ in features.batch(pairs, 0)]).float()
        mean, std = x.mean(0), x.std(0) + 1e-6
    for step in tqdm(range(start, job.iterations), path.stem, job.iterations, initial=start, disable=None):
        done = (step + 1) / job.iterations
        optimizer.param_groups[0]["lr"] = rate * min(1, done / 0.04) * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        step_loss(features, head, features.batch(pairs, step), mean, std).backward()
        optimizer.step()
        if job.task == "depth" and done == 1:  # W (x - mean) / std + b becomes one linear map of x
            conv = head["decode_head"]["conv_depth"]
            conv.weight.data.div_(std[:, None, None])
            conv.bias.data.sub_(conv.weight.data.flatten(1) @ mean)
        if (step + 1) % SAVE_EVERY == 0 or done == 1:
            parts = dict(state_dict=head.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            with atomic_open(path) as f:
                torch.save(parts | dict(about=about), f)
    return head.eval()


# ---------------------------------------------------------------- using a head, and how good it is


@torch.no_grad()
def see(features, head, image):
    """uint8 (3, H, W) -> class logits (C, H, W), or metres (1, H, W): where windows overlap, their mean."""
    job, p, (H, W) = features.job, features.patch, image.shape[1:]
    side, stride = max(job.window // p, 1) * p, max(job.window * 2 // 3 // p, 1) * p  # published: 512 and 341
    starts = lambda n: [*range(0, max(n - side, 0), stride), max(n - side, 0)]  # noqa: E731
    total = torch.zeros(1 if job.task == "depth" else len(job.names), H, W, device=features.device)
    count = torch.zeros(H, W, device=features.device)
    for top in starts(H):
        for left in starts(W):
            place = (..., slice(top, top + side), slice(left, left + side))
            tokens = features.look(image[place][None])[0].float()  # (N, width)
            total[place] += answer(apply(head, tokens)[None], job, *image[place].shape[1:], p)[0]
            count[place] += 1
    return total / count


def enlarge(planes, size):
    """(C, H, W) -> the largest plane (h, w) and which it is (h, w); one at a time: images may be large."""
    best, which = torch.full(size, -math.inf), torch.zeros(size, dtype=torch.long)
    for k, plane in enumerate(planes.cpu()):
        plane = F.interpolate(plane[None, None], size=size, mode="bilinear")[0, 0]
        which[plane > best] = k
        best = torch.maximum(best, plane)
    return best, which


def iou(table):
    """Pixels by (truth, answer) (C, C) -> IoU of each class (C,), nan where it is in neither."""
    hit = table.diag().double()
    return hit / (table.sum(0) + table.sum(1) - hit)


def score(features, head, pairs):
    """{"mIoU", "classes"} over the pixels of all images, or {"RMSE", "delta1"}, the means over images, as
    published; void does not count."""
    job, errors, C = features.job, [], len(features.job.names)
    table = torch.zeros(C, C, dtype=torch.long)
    for i in tqdm(range(len(pairs)), "scoring", disable=None):
        if (item := pairs[i]) is None:
            continue
        image, truth = item
        depth, label = enlarge(see(features, head, resize_to_patches(image, features.patch, job.size)), truth.shape)
        if job.task == "seg":
            known = truth >= 0
            table += (truth[known].long() * C + label[known]).bincount(minlength=C * C).view(C, C)
        else:
            d, t = depth[truth > 0], truth[truth > 0]
            near = torch.maximum(d / t, t / d) < 1.25
            errors.append([(d - t).square().mean().sqrt(), near.float().mean()])
    if job.task == "seg":
        return dict(mIoU=iou(table).nanmean().item(), classes=iou(table).tolist())
    return dict(zip(("RMSE", "delta1"), torch.tensor(errors).mean(0).tolist()))


def predict(features, head, image, out):
    """Writes a picture of what the head says of a PIL image to `out`, and the exact numbers beside it."""
    job, beside = features.job, out.with_name(f"{out.stem}_values.png")
    depth, label = enlarge(see(features, head, resize_to_patches(image, features.patch, job.size)), image.size[::-1])
    if job.task == "seg":
        wheel = [colorsys.hsv_to_rgb(0.618 * k % 1, 0.8, 1 - 0.2 * (k % 3)) for k in range(1, len(job.names))]
        colours = np.array([(0.1, 0.1, 0.1), *wheel]) * 255  # the first class is often background: dark
        picture = 0.4 * np.asarray(image.convert("L"))[..., None] + 0.6 * colours[label]
        values = (label + (job.ignore == 0)).numpy().astype(np.uint8 if len(job.names) < 256 else np.uint16)
        shares = sorted(zip(label.flatten().bincount() / label.numel(), job.names), reverse=True)
        said = ", ".join(f"{name} {share:.0%}" for share, name in shares[:8] if share > 0.005)
    else:
        near = (1 / depth - 1 / depth.max()) / (1 / depth.min() - 1 / depth.max() + 1e-9)
        stops = np.array([[30, 20, 70], [110, 30, 120], [215, 65, 75], [250, 150, 50], [250, 250, 165]])
        picture = np.stack([np.interp(near, np.linspace(0, 1, 5), colour) for colour in stops.T], -1)
        values = (depth * job.depth_scale).round().clamp(max=65535).numpy().astype(np.uint16)
        said = f"{depth.min():.2f} m (bright) to {depth.max():.2f} m"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(out)
        Image.fromarray(values).save(beside)
    except (OSError, ValueError) as e:
        raise UserError(f"{out} cannot be written ({e}): name a .png") from None
    what = "the numbers of the classes" if job.task == "seg" else f"16 bits, {job.depth_scale:g} is one metre"
    print(f"{said}\nwrote {out}, and {beside} ({what})")


# ---------------------------------------------------------------- the command


def arguments(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--task", choices=("seg", "depth"), required=True)
    add_weights_args(parser)
    add("--train", default="scenes:600:seed=20", help="scenes:COUNT, or pairs:IMAGES_DIR:MASKS_OR_DEPTH_DIR")
    add("--test", default="scenes:200:seed=21", help="the same, for the score")
    add("--classes", type=int, default=0, help="how many the masks have")
    add("--ignore", type=int, default=255, help="the label that is void; if it is 0, the first class is 1")
    add("--depth-range", type=float, nargs=2, default=[0.001, 10.0], help="metres (KITTI: 0.001 80)")
    add("--depth-scale", type=float, default=1000.0, help="what one metre is in a 16-bit PNG (KITTI: 256)")
    add("--layers", type=int, choices=(1, 4), default=1, help="features of how many blocks")
    add("--size", type=int, default=0, help="short side that is seen, in pixels (default: the run's, or 224)")
    add("--window", type=int, default=0, help="of longer images, side in pixels (default: twice --size)")
    add("--iterations", type=int, default=0, help="of training (default: 1000, for depth 600)")
    add("--batch-size", type=int, default=16, help="images of an iteration")
    add("--lr", type=float, default=0.0, help="of AdamW (default: 1, depth 2, over the features' width)")
    add("--seed", type=int, default=0, help="of the head, the order of images and the random network")
    add("--head", type=Path, help="use this one (default for --predict: runs/dense_TASK/head.pth)")
    add("--predict", metavar="IMAGE", help="write what the head says of it as a picture")
    add("--out", type=Path, help="folder of heads (default: runs/dense_TASK), or --predict's picture")
    return parser.parse_args(argv)


def settle(job, cfg, about=None, outputs=0):
    """Defaults that hang on the run, the task and the data; a head is used as it was trained (`about`)."""
    about = about or {}
    for key in ("ignore", "depth_range", "depth_scale"):
        setattr(job, key, about.get(key, getattr(job, key)))
    job.size = job.size or about.get("size") or cfg.evaluation.image_size or cfg.crops.global_crops_size
    job.window = job.window or about.get("window") or 2 * job.size
    job.iterations = job.iterations or STEPS[job.task]
    if min(job.size, job.window, job.iterations, job.batch_size, job.depth_scale) <= 0:
        raise UserError("--size, --window, --iterations, --batch-size and --depth-scale must be above 0")
    if not 0 < job.depth_range[0] < job.depth_range[1]:
        raise UserError(f"--depth-range {job.depth_range}: two distances above 0, the smaller one first")
    scenes = [uri.startswith("scenes") for uri in (job.train, job.test)]
    if not outputs and scenes[0] != scenes[1]:
        raise UserError(f"--train {job.train} and --test {job.test} do not belong together: give both")
    job.names = ["background", *CLASSES] if all(scenes) and not outputs else about.get("names")
    job.names = job.names or [f"class {k}" for k in range(outputs or job.classes)]
    if not job.names and job.task == "seg":
        raise UserError("how many classes do the masks have? Say --classes 11, and --ignore 11 if 11 is void")


def report(rows, job, sets):
    """The table, a row per network; each class of the first; what was left out."""
    keys = [k for k in next(iter(rows.values())) if k != "classes"]
    print(f"{'':24s}" + "".join(f"{k:>10s}" for k in keys))
    for name, row in rows.items():
        print(f"{name:24s}" + "".join(f"{row[k]:10.3f}" for k in keys))
    if job.task == "seg":
        ious = zip(job.names, next(iter(rows.values()))["classes"])
        print("IoU:", ", ".join(f"{name} {x:.2f}" for name, x in ious))
    for why in [why for pairs in sets for why in pairs.bad.values()]:
        print("left out:", why)


def main(argv=None):
    job, head, about, outputs = arguments(argv), None, None, 0
    photos = open_images([job.predict]) if job.predict else None
    if photos and len(photos) > 1:
        raise UserError(f"--predict wants one image, and {job.predict} holds {len(photos)}")
    backbone, cfg = open_backbone(job.weights, job.download)
    folder = Path("runs") / f"dense_{job.task}"
    if job.head or photos:
        head, about = read_head(job.head or folder / "head.pth", job, backbone)
        outputs = len(head.state_dict()[f"decode_head.conv_{job.task}.bias"])
    settle(job, cfg, about, outputs)
    features = Features(backbone, job)
    print(f"{job.weights}: {describe_backbone(backbone)}; blocks {features.blocks}, short side seen {job.size}")
    if photos:
        try:
            return predict(features, head, load_image(photos, 0)[0], job.out or Path(f"{job.task}.png"))
        except BadImage as e:
            raise UserError(f"{e}") from None
    test, rows = Pairs(job.test, job), {}
    if head:
        return report({"this head": score(features, head, test)}, job, [test])
    train, folder = Pairs(job.train, job), job.out or folder
    print(f"learning from {len(train)} images of {job.train}, scoring on {len(test)} of {job.test}")
    networks = {"this backbone": (backbone, "head.pth"), "raw pixels": (Pixels(backbone.arch), "pixels.pth"),
                "random initialisation": (untrained_copy(backbone, cfg, job.seed), "random.pth")}  # fmt: skip
    for name, (network, file) in networks.items():
        features = Features(network, job)
        rows[name] = score(features, train_head(features, train, folder / file), test)
    report(rows, job, [train, test])
    print(f"the first head is {folder / 'head.pth'}: see --head and --predict")


if __name__ == "__main__":
    config.run(main)
