"""Dense evaluation: a linear head on frozen patch tokens predicts the class, or the depth, of every pixel.

    python -m evals.dense --task seg                       # the laptop run, on scenes: their masks are exact
    python -m evals.dense --task depth --layers 4
    python -m evals.dense --task seg --classes 11 --ignore 11 --size 96 --out runs/camvid \\
        --train pairs:train/images:train/masks --test pairs:test/images:test/masks   # your own: here CamVid
    python -m evals.dense --task seg --head runs/camvid/head.pth --predict photo.jpg --out mask.png

Masks are PNG files of class numbers, or of two values or one colour per class: see evals/pairs.py.

Prints mIoU, or RMSE and delta1 (the share of pixels whose depth is less than a factor of 1.25 off), beside
the same head on an untrained network and on raw pixels. A class without a pixel in the test or the training
masks is named and does not count in mIoU. Heads and their files are DINOv2's, and --head takes the released
ones. Segmentation: BatchNorm and a linear map of the last block, or of the last four side by side. Depth: a
weighted mean of 256 distances, the weights linear in [patch, CLS] of blocks without the final norm.

Nothing is augmented, so a frozen network sees each training image once: its tokens are cached in half
precision, up to TOKEN_CACHE_BYTES, and recomputed beyond. The depth head has no norm and is trained on
standardised features (else the scale of a network would set its learning rate); the standardisation is
folded into the weights at the end. The loss is computed at the size that the network sees, the score at the
size of the ground truth. An image larger than --window is processed in windows that overlap by a third.
"""

import argparse
import colorsys
import hashlib
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import config
from config import Count, Number, OptionalPixels, Positive, Range, UserError, Whole, argument
from data import normalize, permuted_index
from decode import BadImage, open_regular
from eval_knn import check_overlap
from evals.pairs import ALL_VOID, Pairs, fill_reading, reading_of, survey_masks, untrained_classes
from features import check_tensors, load_image, resize_to_patches, untrained_copy
from model import Tokens, describe_backbone
from runfolder import atomic_open
from scenes import CLASSES
from sources import open_images
from tools.weights import add_weights_args, loaded_weights, open_backbone

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKEN_CACHE_BYTES = 2**30  # for the tokens of all training images
DEPTH_BINS = 256
NumClasses = Annotated[int, Range(0, 32767, "a number of classes, 32767 at most")]  # masks are int16
SAVE_EVERY = 200  # steps
BASE_LEARNING_RATE = dict(seg=1, depth=2)  # over the features' width: for ViT-L about DINOv3's 1e-3, 3e-4
WEIGHT_DECAY = dict(seg=1e-3, depth=1e-4)
ITERATIONS = dict(seg=1000, depth=600)
STATED_KINDS = dict(ignore=int, depth_range=tuple[Positive, Positive], depth_scale=Positive, size=Count,
                    window=Count, iterations=Whole, names=list, class_values=list,
                    untrained=list, range=list, bands=list)  # in the file of a head  # fmt: skip
SAVED_SETTINGS = (  # in the file of a head
    "task", "names", "ignore", "depth_range", "depth_scale", "size", "window", "layers", "train",
    "iterations", "batch_size", "lr", "seed", "class_values", "untrained",
    "range", "bands")  # fmt: skip
MAX_LISTED = 12  # classes in a note


# ---------------------------------------------------------------- features of a frozen backbone


class RawPixels(nn.Module):
    """A baseline without a network: a token is the pixels of its patch, [CLS] is their mean."""

    def __init__(self, arch):
        super().__init__()
        self.patch_size = arch["patch_size"]
        self.arch = arch | dict(embed_dim=3 * self.patch_size**2)

    def intermediate(self, images, layers, norm=True):
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)  # (B, N, 3 p p)
        return [Tokens(patches.mean(1), patches[:, :0], patches)] * len(layers)


def head_blocks(depth, task, layers):
    """The blocks, counted from 0, that a published head of 1 or 4 layers reads. Raises UserError."""
    if depth < layers:
        raise UserError(f"--layers {layers}: this network has only {depth} blocks, so take --layers 1")
    if layers == 1 or task == "seg":
        return list(range(depth - layers, depth))
    if depth == 24:
        return [4, 11, 17, 23]
    return [quarter * depth // 4 - 1 for quarter in (1, 2, 3, 4)]


def block_width(backbone, task):
    """How many features a head reads of each patch and block: D, for depth 2 D, [patch, CLS]."""
    return backbone.arch["embed_dim"] * (2 if task == "depth" else 1)


def weights_digest(backbone):
    """Sixteen hexadecimal digits that identify the weights: a hash of 64 numbers of each tensor."""
    digest = hashlib.sha256()
    for tensor in loaded_weights(backbone).values():
        some = tensor.flatten()[:: max(tensor.numel() // 64, 1)]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class DenseFeatures:
    """The features that a head reads from a frozen backbone; those of training images are cached."""

    def __init__(self, backbone, settings):
        self.backbone = backbone.to(DEVICE).eval()
        self.settings = settings
        self.patch_size = backbone.patch_size
        self.blocks = head_blocks(backbone.arch["depth"], settings.task, settings.layers)
        self.width = block_width(backbone, settings.task) * len(self.blocks)
        self.cache = {}  # {number of a training image: its features and truth}
        self.free_bytes = TOKEN_CACHE_BYTES

    @torch.no_grad()
    def extract(self, images):
        """uint8 (b, 3, h, w) -> half precision (b, N, width)."""
        with_cls = self.settings.task == "depth"
        images = normalize(images.to(DEVICE))
        parts = []
        for tokens in self.backbone.intermediate(images, self.blocks, norm=not with_cls):
            parts.append(tokens.patches)
            if with_cls:
                parts.append(tokens.cls[:, None].expand_as(tokens.patches))
        return torch.cat(parts, -1).half()

    def training_pair(self, pairs, i):
        """-> features (1, N, width), truth (1, h, w) at the size the network sees; or None for a bad pair."""
        if i in self.cache:
            return self.cache[i]
        item = pairs[i]
        if item is None:
            return None
        image, truth = item
        pixels = resize_to_patches(image, self.patch_size, self.settings.size)
        resized = F.interpolate(truth[None, None].float(), pixels.shape[1:], mode="nearest-exact")[0]
        pair = (self.extract(pixels[None]).cpu(), resized.to(truth.dtype))
        nbytes = sum(x.nbytes for x in pair)
        if nbytes <= self.free_bytes:
            self.cache[i] = pair
            self.free_bytes -= nbytes
        return pair

    def batch(self, pairs, step):
        """A step's images, grouped by size -> [(features (b, N, width), truth (b, h, w)), ...]."""
        n = len(pairs)
        batch_size = self.settings.batch_size
        by_size = {}
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, k = divmod(position, n)
            i = permuted_index((self.settings.seed, epoch), k, n)  # every epoch has its own order
            pair = self.training_pair(pairs, i)
            while pair is None:  # take the next one instead
                i = (i + 1) % n
                pair = self.training_pair(pairs, i)
            by_size.setdefault(pair[1].shape, []).append(pair)
        groups = []
        for same_size in by_size.values():
            features, truths = zip(*same_size)
            groups.append((torch.cat(features).to(DEVICE), torch.cat(truths).to(DEVICE)))
        return groups


# ---------------------------------------------------------------- heads


def build_head(task, width, outputs):
    """The published head, with the published names and shapes."""
    layers = {}
    if task == "seg":
        layers["bn"] = nn.BatchNorm1d(width)
    conv = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    layers[f"conv_{task}"] = conv
    return nn.ModuleDict(dict(decode_head=nn.ModuleDict(layers)))


def head_logits(head, tokens):
    """Features (T, width) -> (T, outputs): a 1 x 1 convolution is a linear map of each token."""
    *norms, conv = head["decode_head"].values()
    for norm in norms:
        tokens = norm(tokens)
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def read_dense_head(path, settings, backbone):
    """A head's file, ours or a released one -> the head, how many blocks it reads, and `about`.

    `about` holds our settings of the training, {} for released heads. Raises UserError for a file that is not
    a head for this task and backbone, or is only half trained.
    """
    wrong_file = f"{path} is not a linear head for --task {settings.task}"
    try:
        with open_regular(path, limit=math.inf) as f:
            file = torch.load(f, map_location="cpu", weights_only=True)
        tensors = file.get("state_dict", file)
        about = dict(file.get("about", {}))
        outputs, width = tensors[f"decode_head.conv_{settings.task}.weight"].shape[:2]
        for key in STATED_KINDS.keys() & about.keys():
            about[key] = config.convert(STATED_KINDS[key], about[key])
        if settings.task == "seg" and len(about.get("names", range(outputs))) != outputs:
            raise ValueError(f"{len(about['names'])} names for {outputs} classes")
        check_class_lists(about, outputs)
        half_trained = file.get("step", 0) < about.get("iterations", 0)
        found = {name: list(x.shape) for name, x in tensors.items()}
    except Exception as e:  # no such file, a web page, a pickle that wants to run code, another head ...
        raise UserError(f"{wrong_file} ({type(e).__name__}: {e})") from None
    one_block = block_width(backbone, settings.task)
    check_tensors({name: x for name, x in tensors.items() if "num_batches" not in name}, path)
    if width not in (one_block, 4 * one_block):
        available = f"{describe_backbone(backbone)} has {one_block}, or {4 * one_block} with 4 layers"
        raise UserError(f"{path} needs features of width {width}, but this {available}: name its --weights")
    head = build_head(settings.task, width, outputs).eval()
    expected = {name: list(x.shape) for name, x in head.state_dict().items()}
    found |= {name: [] for name in expected if name.endswith("num_batches_tracked")}  # may be missing
    wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        name = wrong[0]
        raise UserError(f"{wrong_file}: {name} is {found.get(name)} there, not {expected.get(name)}")
    head.load_state_dict(head.state_dict() | tensors)
    if about.get("backbone") not in (None, weights_digest(backbone)):
        raise UserError(f"{path} was trained on weights other than {settings.weights}: name its --weights")
    if half_trained:
        raise UserError(f"{path} is only half trained: run the same training command again")
    return head.to(DEVICE), width // one_block, about


def check_class_lists(about, count):
    """Raise ValueError unless a head's value of each class, and its untrained classes, are such lists."""
    values = about.get("class_values") or [0] * count
    numbers = about.get("untrained") or []
    if len(values) != count or not all(isinstance(x, int) for x in values):
        raise ValueError(f"class_values {values!r:.60} are not numbers for {count} classes")
    if not all(isinstance(x, int) and 0 <= x < count for x in numbers):
        raise ValueError(f"untrained {numbers!r:.60} are not among {count} classes")


def depth_from_logits(logits, nearest, farthest):
    """(b, bins, h, w) -> metres (b, h, w): mean of evenly spaced distances, weighted by relu(logit) + 0.1."""
    distances = torch.linspace(nearest, farthest, logits.shape[1], device=logits.device)
    weights = F.relu(logits) + 0.1
    return torch.einsum("bkhw,k->bhw", weights, distances) / weights.sum(1)


def upsample_logits(logits, settings, height, width, patch_size):
    """A head's (b, N, outputs) -> class logits (b, C, height, width), or metres (b, 1, height, width)."""
    grid = (height // patch_size, width // patch_size)
    planes = logits.transpose(1, 2).unflatten(2, grid)  # (b, outputs, rows, columns)
    if settings.task == "depth":
        # Published: features enlarged four times, then the linear map; the same result, at a higher cost.
        planes = F.interpolate(planes, scale_factor=4, mode="bilinear")
        planes = depth_from_logits(planes, *settings.depth_range)[:, None]
    return F.interpolate(planes, size=(height, width), mode="bilinear")


# ---------------------------------------------------------------- training a head


def dense_loss(predicted, truth, task):
    """predicted (P, C or 1), truth (P,) of P pixels -> cross-entropy, or the scale-invariant log error.

    The latter is the root of equation 4 of Eigen et al. 2014, with lambda 0.85. Void pixels do not count.
    """
    known = truth >= 0 if task == "seg" else truth > 0
    predicted = predicted[known]
    truth = truth[known]
    count = max(int(known.sum()), 1)
    if task == "seg":
        return F.cross_entropy(predicted, truth.long(), reduction="sum") / count
    log_ratio = predicted[:, 0].log() - truth.log()
    return (log_ratio.square().sum() / count - 0.85 * (log_ratio.sum() / count) ** 2 + 1e-8).sqrt()


def batch_loss(features, head, groups, mean=0.0, std=1.0):
    """The loss on what `DenseFeatures.batch` returns; its features are standardised by mean, std (width,)."""
    predicted = []
    truths = []
    for tokens, truth in groups:
        standardised = (tokens.flatten(0, 1).float() - mean) / std
        logits = head_logits(head, standardised).unflatten(0, tokens.shape[:2])
        planes = upsample_logits(logits, features.settings, *truth.shape[1:], features.patch_size)
        predicted.append(planes.movedim(1, -1).flatten(0, 2))  # (b h w, C or 1)
        truths.append(truth.flatten())
    return dense_loss(torch.cat(predicted), torch.cat(truths), features.settings.task)


def learning_rate(peak, progress):
    """Linear warm-up for the first 4 %, times half a cosine; progress from above 0 to 1."""
    return peak * min(1, progress / 0.04) * (1 + math.cos(math.pi * progress)) / 2


def feature_statistics(groups):
    """Mean and standard deviation (width,) of a batch's features."""
    tokens = torch.cat([tokens.flatten(0, 1) for tokens, _ in groups]).float()
    return tokens.mean(0), tokens.std(0) + 1e-6


def fold_standardisation(head, mean, std):
    """Change W and b so that the head maps x as it mapped (x - mean) / std."""
    conv = head["decode_head"]["conv_depth"]
    conv.weight.data.div_(std[:, None, None])
    conv.bias.data.sub_(conv.weight.data.flatten(1) @ mean)


def start_or_resume(features, about, path):
    """-> head, optimizer and the number of steps done: new, or from `path`. UserError if it does not fit."""
    settings = features.settings
    outputs = DEPTH_BINS if settings.task == "depth" else len(settings.names)
    torch.manual_seed(settings.seed)
    head = build_head(settings.task, features.width, outputs).to(DEVICE)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=WEIGHT_DECAY[settings.task])
    if not path.exists():
        return head, optimizer, 0
    try:
        with open_regular(path, limit=math.inf) as f:
            saved = torch.load(f, map_location="cpu", weights_only=True)
        not_in_older_files = dict(class_values=[], untrained=[], range=[], bands=[])
        saved_about = not_in_older_files | dict(saved["about"])
        step = int(saved["step"])
    except Exception as e:
        raise UserError(f"{path} was not written by this script ({e!r}): move it, or change --out") from None
    for key, value in about.items():
        if saved_about.get(key) != value:
            trained_with = f"{key} {saved_about.get(key)}, not {value}"
            raise UserError(f"{path} was trained with {trained_with}: delete it, or choose another --out")
    head.load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    return head, optimizer, step


def train_dense_head(features, pairs, path):
    """Train a head on `pairs` and keep it in the file `path`; a half-trained one there is continued."""
    settings = features.settings
    about = {key: getattr(settings, key) for key in SAVED_SETTINGS}
    about["backbone"] = weights_digest(features.backbone)
    head, optimizer, start = start_or_resume(features, about, path)
    peak = settings.lr or BASE_LEARNING_RATE[settings.task] / features.width
    iterations = settings.iterations
    mean = 0.0
    std = 1.0
    if settings.task == "depth" and start < iterations:
        mean, std = feature_statistics(features.batch(pairs, 0))
    for step in tqdm(range(start, iterations), path.stem, iterations, initial=start, disable=None):
        optimizer.param_groups[0]["lr"] = learning_rate(peak, (step + 1) / iterations)
        optimizer.zero_grad()
        batch_loss(features, head, features.batch(pairs, step), mean, std).backward()
        optimizer.step()
        last = step + 1 == iterations
        if last and settings.task == "depth":
            fold_standardisation(head, mean, std)
        if last or (step + 1) % SAVE_EVERY == 0:
            saved = dict(state_dict=head.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
            with atomic_open(path) as f:
                torch.save(saved | dict(about=about), f)
    return head.eval()


# ---------------------------------------------------------------- predictions and their score


def window_starts(length, side, stride):
    """Where windows of `side` begin, so that they cover `length`: the last one ends at the edge."""
    last = max(length - side, 0)
    return [*range(0, last, stride), last]


@torch.no_grad()
def predict_sliding(features, head, image):
    """uint8 (3, H, W) -> class logits (C, H, W), or metres (1, H, W): where windows overlap, their mean."""
    settings = features.settings
    patch_size = features.patch_size
    side = max(settings.window // patch_size, 1) * patch_size
    stride = max(settings.window * 2 // 3 // patch_size, 1) * patch_size  # published: 341 for windows of 512
    H, W = image.shape[1:]
    planes = 1 if settings.task == "depth" else len(settings.names)
    total = torch.zeros(planes, H, W, device=DEVICE)
    count = torch.zeros(H, W, device=DEVICE)
    for top in window_starts(H, side, stride):
        for left in window_starts(W, side, stride):
            window = (..., slice(top, top + side), slice(left, left + side))
            crop = image[window]
            tokens = features.extract(crop[None])[0].float()  # (N, width)
            logits = head_logits(head, tokens)[None]
            total[window] += upsample_logits(logits, settings, *crop.shape[1:], patch_size)[0]
            count[window] += 1
    return total / count


def resized_max(planes, size):
    """(C, H, W) -> the largest plane (h, w) at each pixel, and its number (h, w).

    The planes are enlarged one at a time, since images may be large.
    """
    largest = torch.full(size, -math.inf)
    number = torch.zeros(size, dtype=torch.long)
    for k, plane in enumerate(planes.cpu()):
        plane = F.interpolate(plane[None, None], size=size, mode="bilinear")[0, 0]
        number[plane > largest] = k
        largest = torch.maximum(largest, plane)
    return largest, number


def predict_image(features, head, image):
    """A PIL image -> the class (h, w) of each of its pixels, or their depth in metres."""
    pixels = resize_to_patches(image, features.patch_size, features.settings.size)
    planes = predict_sliding(features, head, pixels)
    largest, number = resized_max(planes, (image.height, image.width))
    return largest if features.settings.task == "depth" else number


def class_ious(confusion):
    """Pixels by (truth, prediction) (C, C) -> IoU of each class (C,), nan for one that has no true pixel."""
    intersection = confusion.diag().double()
    ious = intersection / (confusion.sum(0) + confusion.sum(1) - intersection)
    return ious.masked_fill(confusion.sum(1) == 0, math.nan)


def depth_errors(predicted, truth):
    """RMSE in metres and delta1 of one image, over the pixels whose depth is known."""
    predicted = predicted[truth > 0]
    truth = truth[truth > 0]
    close = torch.maximum(predicted / truth, truth / predicted) < 1.25
    return (predicted - truth).square().mean().sqrt(), close.float().mean()


def score_head(features, head, pairs):
    """{"mIoU", "classes"} over the pixels of all images, or {"RMSE", "delta1"}, means over images.

    Both are the published definitions. Void pixels do not count. A class that has no pixel in these masks, or
    had none in the training masks, has IoU nan and does not count in mIoU. Raises UserError if all is void.
    """
    settings = features.settings
    C = len(settings.names)
    confusion = torch.zeros(C, C, dtype=torch.long)
    errors = []
    for i in tqdm(range(len(pairs)), "scoring", disable=None):
        item = pairs[i]
        if item is None:
            continue
        image, truth = item
        predicted = predict_image(features, head, image)
        if settings.task == "seg":
            known = truth >= 0
            cells = truth[known].long() * C + predicted[known]
            confusion += cells.bincount(minlength=C * C).view(C, C)
        else:
            errors.append(depth_errors(predicted, truth))
    if settings.task == "seg":
        if not confusion.any():
            raise UserError(ALL_VOID.format(pairs.uri))
        ious = class_ious(confusion)
        ious[settings.untrained] = math.nan
        return dict(mIoU=ious.nanmean().item(), classes=ious.tolist())
    rmse, delta1 = torch.tensor(errors).mean(0).tolist()
    return dict(RMSE=rmse, delta1=delta1)


# ---------------------------------------------------------------- a picture of a prediction


def class_colors(count):
    """RGB (count, 3) in 0...255: hues a golden angle apart; the first class is often background, and dark."""
    colors = [(0.1, 0.1, 0.1)]
    for k in range(1, count):
        colors.append(colorsys.hsv_to_rgb(0.618 * k % 1, 0.8, 1 - 0.2 * (k % 3)))
    return np.array(colors) * 255


def draw_classes(image, classes, settings):
    """-> a picture (h, w, 3), the labels (h, w) as in the masks, and the largest classes in words."""
    grey = np.asarray(image.convert("L"))[..., None]
    picture = 0.4 * grey + 0.6 * class_colors(len(settings.names))[classes.numpy()]
    first_label = 1 if settings.ignore == 0 else 0
    labels = (classes + first_label).numpy()
    labels = labels.astype(np.uint8 if len(settings.names) < 256 else np.uint16)
    shares = classes.flatten().bincount() / classes.numel()
    largest = sorted(zip(shares, settings.names), reverse=True)[:8]
    summary = ", ".join(f"{name} {share:.0%}" for share, name in largest if share > 0.005)
    return picture, labels, summary


def draw_depth(depth, settings):
    """-> a picture (h, w, 3), bright where it is near, 16-bit depth (h, w), and the range in words."""
    nearness = (1 / depth - 1 / depth.max()) / (1 / depth.min() - 1 / depth.max() + 1e-9)  # 0...1
    colors = np.array([[30, 20, 70], [110, 30, 120], [215, 65, 75], [250, 150, 50], [250, 250, 165]])
    stops = np.linspace(0, 1, len(colors))
    picture = np.stack([np.interp(nearness, stops, channel) for channel in colors.T], -1)
    values = (depth * settings.depth_scale).round().clamp(max=65535).numpy().astype(np.uint16)
    return picture, values, f"{depth.min():.2f} m (bright) to {depth.max():.2f} m"


def write_prediction(features, head, image, out):
    """Write a picture of the prediction for a PIL image to `out`, and the exact numbers beside it."""
    settings = features.settings
    values_file = out.with_name(f"{out.stem}_values.png")
    predicted = predict_image(features, head, image)
    if settings.task == "seg":
        picture, values, summary = draw_classes(image, predicted, settings)
        unit = "the labels of the classes"
    else:
        picture, values, summary = draw_depth(predicted, settings)
        unit = f"16 bits, {settings.depth_scale:g} is one metre"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(np.uint8)).save(out)
        Image.fromarray(values).save(values_file)
    except (OSError, ValueError) as e:
        raise UserError(f"{out} cannot be written ({e}): name a .png") from None
    print(f"{summary}\nwrote {out}, and {values_file} ({unit})")


# ---------------------------------------------------------------- the command


def add_pair_args(parser):
    """Labelled images and how the network sees them: of this command and of evals/transfer.py."""
    add = parser.add_argument
    add("--train", default="scenes:600:seed=20", help="scenes:COUNT, or pairs:IMAGES_DIR:MASKS_OR_DEPTH_DIR")
    add("--test", default="scenes:200:seed=21", help="the same, for the score")
    add("--classes", type=argument(NumClasses), default=0, help="number of classes in the masks")
    add("--ignore", type=int, default=255, help="value for void; if it is 0, the first class is 1")
    add("--size", type=argument(OptionalPixels), default=0,
        help="short side of the input in pixels (default: the run's, or 224)")  # fmt: skip
    parser.set_defaults(class_values=[], untrained=[])  # found in the masks


def parse_settings(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.dense", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--task", choices=("seg", "depth"), required=True)
    add_weights_args(parser)
    add_pair_args(parser)
    add("--depth-range", type=argument(Positive), nargs=2, default=[0.001, 10.0],
        help="metres (KITTI: 0.001 80)")  # fmt: skip
    add("--depth-scale", type=argument(Positive), default=1000.0,
        help="value of one metre in a 16-bit PNG (KITTI: 256)")  # fmt: skip
    add("--layers", type=int, choices=(1, 4), default=1, help="number of blocks that the head reads")
    add("--window", type=argument(OptionalPixels), default=0,
        help="side of the windows for longer images (default: 2 * --size)")  # fmt: skip
    add("--iterations", type=argument(Whole), default=0, help="training steps (default: 1000, for depth 600)")
    add("--batch-size", type=argument(Count), default=16, help="images per step")
    add("--lr", type=argument(Number), default=0.0,
        help="of AdamW (default: 1, for depth 2, over the features' width)")  # fmt: skip
    add("--seed", type=argument(Whole), default=0,
        help="of the head, the order of images and the random network")  # fmt: skip
    add("--head", type=Path, help="use this head (default for --predict: runs/dense_TASK/head.pth)")
    add("--predict", metavar="IMAGE", help="write a picture of the head's prediction for this image")
    add("--out", type=argument(Path), help="folder for heads (default: runs/dense_TASK), or the picture")
    return parser.parse_args(argv)


def resolve_settings(settings, cfg, about=None, outputs=0):
    """Fill in the defaults that depend on the run, the task and the data; UserError if they make no sense.

    A head from a file (`about`, and its number of outputs) is used with the settings of its training.
    """
    about = about or {}
    for key in ("ignore", "depth_range", "depth_scale", "class_values", "untrained"):
        if key in about:
            setattr(settings, key, about[key])
    fill_reading(settings, cfg, about)
    default_size = config.evaluation_size(cfg)
    if not settings.size:
        settings.size = about.get("size", default_size)
    if not settings.window:
        settings.window = about.get("window", 2 * settings.size)
    if not settings.iterations:
        settings.iterations = ITERATIONS[settings.task]
    nearest, farthest = settings.depth_range
    if nearest >= farthest:
        raise UserError(f"--depth-range {settings.depth_range}: two distances above 0, the smaller one first")
    if outputs:
        settings.names = about.get("names") or [f"class {k}" for k in range(outputs)]
    else:
        settings.names = class_names(settings)


def class_names(settings):
    """Names for the classes of the data, [] for depth in files. UserError if that is not known."""
    on_scenes = settings.train.startswith("scenes")
    if settings.test.startswith("scenes") != on_scenes:
        sets = f"--train {settings.train} and --test {settings.test}"
        raise UserError(f"{sets} do not belong together: give both")
    if on_scenes:
        return ["background", *CLASSES]
    if not settings.classes and settings.task == "seg":
        raise UserError("how many classes do the masks have? Add --classes 11, and --ignore 11 if 11 is void")
    if settings.classes == 1 and settings.task == "seg":
        raise UserError("--classes 1 leaves nothing to tell apart: count the background, too, as --classes 2")
    return [f"class {k}" for k in range(settings.classes)]


def print_results(rows, settings, sets):
    """Print a row per network, the IoU of each class for the first one, and the pairs that were left out."""
    first = next(iter(rows.values()))
    metrics = [key for key in first if key != "classes"]
    print(f"{'':24s}" + "".join(f"{metric:>10s}" for metric in metrics))
    for name, row in rows.items():
        print(f"{name:24s}" + "".join(f"{row[metric]:10.3f}" for metric in metrics))
    if settings.task == "seg":
        ious = zip(settings.names, first["classes"])
        print("IoU:", ", ".join(f"{name} {iou:.2f}" for name, iou in ious if not math.isnan(iou)))
        print_absent_classes(first["classes"], settings, "pixel")
    for pairs in sets:
        for reason in pairs.bad.values():
            print("left out:", reason)


def print_absent_classes(ious, settings, unit):
    """Name the classes whose IoU is nan, and why: "no pixel of class 7 in the test masks".

    ious: C numbers; unit: "pixel" or "patch".
    """
    absent = [number for number, iou in enumerate(ious) if math.isnan(iou)]
    untrained = [settings.names[number] for number in absent if number in settings.untrained]
    untested = [settings.names[number] for number in absent if number not in settings.untrained]
    reasons = []
    for names, masks in ((untested, "test"), (untrained, "training")):
        if names:
            more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
            reasons.append(f"no {unit} of {', '.join(names[:MAX_LISTED])}{more} in the {masks} masks")
    if reasons:
        print(f"mIoU over {len(ious) - len(absent)} of {len(ious)} classes; {'; '.join(reasons)}")


def with_baselines(backbone, cfg, seed):
    """-> {name: network}: the backbone, and what its numbers must be compared with."""
    return {
        "this backbone": backbone,
        "raw pixels": RawPixels(backbone.arch),
        "random initialisation": untrained_copy(backbone, cfg, seed),
    }


def compare_networks(settings, backbone, cfg, folder):
    """Train and score a head on the backbone, on raw pixels and on an untrained network."""
    train = Pairs(settings.train, settings)
    test = Pairs(settings.test, settings)
    check_overlap(train.files(), test.files(), "give other pairs to --test")
    print(f"training on {len(train)} images of {settings.train}, testing on {len(test)} of {settings.test}")
    values, _ = survey_masks([train, test], settings)
    settings.untrained = untrained_classes(values, settings)
    files = ("head.pth", "pixels.pth", "random.pth")
    rows = {}
    for (name, network), file in zip(with_baselines(backbone, cfg, settings.seed).items(), files):
        features = DenseFeatures(network, settings)
        head = train_dense_head(features, train, folder / file)
        rows[name] = score_head(features, head, test)
    print_results(rows, settings, [train, test])
    print(f"wrote {folder / 'head.pth'}, the head of this backbone: use it with --head or --predict")


def main(argv=None):
    settings = parse_settings(argv)
    backbone, cfg = open_backbone(settings.weights, settings.download, settings.dtype)
    folder = Path("runs") / f"dense_{settings.task}"
    head = None
    if settings.head or settings.predict:
        file = settings.head or folder / "head.pth"
        head, settings.layers, about = read_dense_head(file, settings, backbone)
        outputs = head["decode_head"][f"conv_{settings.task}"].out_channels
        resolve_settings(settings, cfg, about, outputs)
    else:
        resolve_settings(settings, cfg)
    features = DenseFeatures(backbone, settings)
    described = f"{describe_backbone(backbone)}; blocks {features.blocks}"
    print(f"{settings.weights}: {described}, short side {settings.size} pixels")
    if settings.predict:
        photos = open_images([settings.predict], reading_of(settings))
        if len(photos) > 1:
            raise UserError(f"--predict takes one image, and {settings.predict} holds {len(photos)}")
        try:
            image, _ = load_image(photos, 0)
        except BadImage as e:
            raise UserError(str(e)) from None
        write_prediction(features, head, image, settings.out or Path(f"{settings.task}.png"))
    elif head is not None:
        test = Pairs(settings.test, settings)
        survey_masks([test], settings)
        print_results({"this head": score_head(features, head, test)}, settings, [test])
    else:
        compare_networks(settings, backbone, cfg, settings.out or folder)


if __name__ == "__main__":
    config.run(main)
