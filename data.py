"""Images in, crops and masks out: multi-crop augmentation, block masks, the sampler and the loader.

Each image gives 2 global crops (32-100 % of its area) and L local ones (5-32 %). The teacher sees the global
crops; the student sees all of them, and must match the teacher from a part of the image.

Nothing here has a state. Sample i of a run (its image, its crops, every colour factor) is a pure function of
(seed, i); its block mask is one of (seed, step, position in the global batch). So a resumed run, any number
of workers and any number of ranks see the same data, and there is no sampler to save. Workers only decode,
crop and resize; colours, blur and solarization run in batches where the model runs (`photometric`).
"""

import functools
import hashlib
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from config import UserError
from decode import BadImage, to_tensor
from sources import sample_name

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
# Blur probability of crop 1, crop 2, local crops. The authors' code applies 1 - p: `as_executed` is what ran.
BLUR_PROBS = {"as_executed": (0.0, 0.9, 0.5), "as_written": (1.0, 0.1, 0.5)}
LOADER_TIMEOUT = 300  # seconds the loop waits for a micro-batch before it says which image is stuck
CACHE_BYTES = 2**28  # decoded images that each worker keeps
CACHED_IMAGE_BYTES = 2**16  # only images up to this size are kept

# ---------------------------------------------------------------- multi-crop: where, and which colours

# Columns of the colour parameters: one row for each crop.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # factors, 1 = unchanged; of hue: a shift, 1 = once round
ORDER = slice(4, 8)  # when each of these four is applied, 0 to 3; -1 in all of them: no colour jitter
GRAYSCALE, BLUR_SIGMA, SOLARIZE = range(8, 11)  # 1 or 0; standard deviation in pixels, 0 = none; 1 or 0


def sample_crop_params(rng, crops, width, height):
    """Every random number of one image's V = 2 + L crops: where they lie, and what happens to their colours.

    rng: numpy Generator, crops: the config's section, width and height of the image in pixels. Returns boxes
    (V, 4) int (left, top, width, height), flips (V,) bool, colors (V, 11) float32 with the columns above.
    """
    L = crops.local_crops_number
    V = 2 + L
    w, h, fits = sample_crop_sizes(rng, crops, width, height)
    across, down, flip, jittered, gray, blurred, solarized = rng.random((7, V))
    boxes = np.stack([across * (width - w + 1) // 1, down * (height - h + 1) // 1, w, h], axis=1)
    widest = min(width, round(height * 4 / 3))
    highest = min(height, round(width * 4 / 3))
    centred = ((width - widest) // 2, (height - highest) // 2, widest, highest)
    boxes = np.where(fits[:, None], boxes, centred)

    neutral = np.array([1, 1, 1, 0])
    spread = np.array(crops.jitter)
    factors = rng.uniform(np.maximum(neutral - spread, [0, 0, 0, -1]), neutral + spread, (V, 4))
    order = rng.random((V, 4)).argsort(1)
    order[jittered >= crops.jitter_prob] = -1
    first, second, local = BLUR_PROBS[crops.blur] if isinstance(crops.blur, str) else crops.blur
    sigma = rng.uniform(0.1, 2.0, V) * (blurred < [first, second, *[local] * L])
    solarize = solarized < [0, crops.solarize_prob, *[0] * L]
    colors = np.column_stack([factors, order, gray < crops.gray_prob, sigma, solarize])
    return boxes.astype(int), flip < 0.5, colors.astype(np.float32)


def sample_crop_sizes(rng, crops, width, height):
    """Width (V,) and height (V,) of each crop, and whether it fits into the image (V,).

    As in torchvision's RandomResizedCrop: ten tries at an area and an aspect ratio in 3/4..4/3, of which the
    first that fits is taken. If none does, the caller takes the largest centred box of such a shape.
    """
    scales = [crops.global_crops_scale] * 2 + [crops.local_crops_scale] * crops.local_crops_number
    V = len(scales)
    smallest, largest = np.array(scales).T[:, :, None]  # (V, 1) each
    area = width * height * rng.uniform(smallest, largest, (V, 10))
    aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), (V, 10)))
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    chosen = np.arange(V), fits.argmax(1)
    return w[chosen], h[chosen], fits[chosen]


def crop_and_resize(image, box, size, flip):
    """uint8 (3, H, W) -> uint8 (3, size, size): bicubic, antialiased.

    As Pillow's within 2/255; in some shapes of boxes, up to 30/255 where black pixels meet white ones.
    """
    # 0.11 ms for a crop of 224, Pillow's 0.83: PyTorch has vector code for bytes stored channels last.
    left, top, w, h = box.tolist()
    crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop


# ---------------------------------------------------------------- colours, on the device of the model

# Operations on float images in 0..255, (n, 3, h, w), which they may overwrite. Their second argument is a
# number for all images, or one for each, (n, 1, 1, 1).


def grayscale(x, _=None):
    """(n, 3, h, w) -> (n, 1, h, w): .299 r + .587 g + .114 b, as Pillow. One channel: a third of the work."""
    r, g, b = x.chunk(3, dim=1)
    gb = torch.lerp(g, b, 0.114 / 0.701)
    return torch.lerp(gb, r, 0.299)


def brightness(x, factor):
    return x.mul_(factor).clamp_(0, 255)


def contrast(x, factor):
    # The gray of the mean colour is the mean of the gray, in one pass less.
    mean_gray = grayscale(x.mean((2, 3), keepdim=True))
    return torch.lerp(mean_gray, x, factor, out=x).clamp_(0, 255)


def saturation(x, factor):
    return torch.lerp(grayscale(x), x, factor, out=x).clamp_(0, 255)


def hue(x, shift):
    """Turns the hue by `shift` (1 = once round) without ever leaving RGB.

    As the hue goes round its six sectors, each channel is a triangle wave between the pixel's smallest and
    largest channel, cut off at both: r is largest around 0, g around 2, b around -2 (of 6). Shifting the hue
    shifts the three waves, so no pixel is sorted into a sector.
    """
    r, g, b = x.chunk(3, dim=1)
    smallest = x.amin(1, keepdim=True)
    largest = x.amax(1, keepdim=True)
    chroma = largest - smallest
    base = smallest - chroma
    # The hue times chroma, in -3..3: the size comes from g + b - r, the sign is that of g - b.
    angle = (g + b).sub_(r).sub_(base).copysign_(g - b)
    one_further = angle + chroma
    for channel, phase in ((r, 3), (g, 1), (b, 5)):
        torch.lerp(angle, one_further, (phase + 6 * shift) % 6 - 3, out=channel)
    # Fold twice with |x|: the straight line becomes the triangle wave around `base`.
    return x.abs_().sub_(chroma, alpha=3).abs_().add_(base).clamp_(smallest, largest)


def blur(x, sigma):
    """Gaussian blur, `sigma` in pixels, mirrored at the edges: 9 taps, first along rows, then along columns.

    The weighted sum is built as a running mean, mean += (shifted image - mean) * weight / weights so far:
    one fused lerp per tap instead of a product and a sum.
    """
    if torch.is_tensor(sigma):
        exp, reach = torch.exp, 4
    else:
        exp, reach = math.exp, min(4, int(4 * sigma))  # beyond 4 sigma a tap weighs less than 1/1000
    shifts = sorted(range(-reach, reach + 1), key=abs)  # the middle first: its weight is never 0
    weights = [exp(-0.5 * (shift / sigma) ** 2) for shift in shifts]
    shares = [weight / total for weight, total in zip(weights, itertools.accumulate(weights))]
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    for dim in (3, 2):
        length = x.shape[dim] - 2 * reach
        shifted = [x.narrow(dim, reach + shift, length) for shift in shifts]
        x = shifted[0]
        mean = torch.empty_like(x)
        for neighbour, share in zip(shifted[1:], shares[1:]):
            x = torch.lerp(x, neighbour, share, out=mean)
    return x


def solarize(x, _):
    """Inverts what is 128 or brighter."""
    return x + (255 - 2 * x) * x.clone().ge_(128)


JITTER = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}
AFTER_JITTER = {GRAYSCALE: grayscale, BLUR_SIGMA: blur, SOLARIZE: solarize}
# A trick for CPUs: glibc gives freed blocks back to the system and clears new ones, page by page. Freeing one
# block of 31 MB (glibc's limit is 32) teaches it to keep blocks up to that size: a fifth faster.
torch.empty(31 << 20, dtype=torch.uint8)


def normalize(x):
    """uint8, or float in 0..1, (n, 3, h, w) -> float32 less ImageNet's mean, over its standard deviation."""
    mean, std = imagenet_statistics(x.device)
    return ((x / 255 if x.dtype == torch.uint8 else x) - mean).div_(std)


@functools.cache
def imagenet_statistics(device):
    """Mean and standard deviation on a device: copied once, since a small blocking copy stops the host."""
    return IMAGENET_MEAN.to(device), IMAGENET_STD.to(device)


def photometric(crops, colors):
    """uint8 (n, 3, h, w) on any device, colors (n, 11) on the CPU -> normalised float32 (n, 3, h, w)."""
    # In one batch on a GPU, or if they are small; a large image alone, so that it stays in a CPU's cache.
    augment = augment_batched if crops.is_cuda or crops.shape[-1] < 64 else augment_one_by_one
    mean, std = imagenet_statistics(crops.device)
    offset = -mean / std
    scale = 1 / (255 * std)
    out = torch.empty(crops.shape, device=crops.device)
    for rows, x in augment(crops, colors):
        torch.mul(x, scale, out=out[rows]).add_(offset)  # addcmul is slower
    return out


def augment_one_by_one(crops, colors):
    """Yields (slice of rows, float images in 0..255)."""
    for i, row in enumerate(colors.tolist()):
        x = crops[i : i + 1].to(torch.float32, memory_format=torch.contiguous_format)
        order = row[ORDER]
        if order[0] >= 0:
            for column in sorted(JITTER, key=order.__getitem__):
                x = JITTER[column](x, row[column])
        for column, operation in AFTER_JITTER.items():
            if row[column]:
                x = operation(x, row[column])
        yield slice(i, i + 1), x.expand(-1, 3, -1, -1)


def augment_batched(crops, colors):
    """The same; each operation runs once over all images of a chunk that need it."""
    values = colors.to(crops.device, non_blocking=True)
    rows = colors.numpy()
    tasks = []  # (which images need it, column of its argument, operation)
    for turn in range(4):
        tasks += [(rows[:, ORDER][:, column] == turn, column, JITTER[column]) for column in JITTER]
    tasks += [(rows[:, column] > 0, column, operation) for column, operation in AFTER_JITTER.items()]
    chunk = len(crops) if crops.is_cuda else 2**18 // crops[0].numel()  # 1 MB of floats: a CPU's cache again
    for start in range(0, len(crops), chunk):
        here = slice(start, start + chunk)
        x = crops[here].to(torch.float32, memory_format=torch.contiguous_format)
        groups = [np.flatnonzero(needed[here]) for needed, _, _ in tasks]
        index = torch.from_numpy(np.concatenate(groups))
        if x.is_cuda:  # all in one copy, for which the host does not wait
            index = index.pin_memory()
        index = index.to(x.device, non_blocking=True)
        for images, (_, column, operation) in zip(index.split([len(group) for group in groups]), tasks):
            if len(images):
                x[images] = operation(x[images], values[here][images, column, None, None, None])
        yield here, x


# ---------------------------------------------------------------- block masks


def sample_masks(cfg, step, positions, crops):
    """The masks of some positions among the `crops` = 2G global crops of a step: a part of a loader's dict.

    Published: floor(crops * probability) crops are masked, the k-th at a ratio from the k-th of equal slices
    of [low, high]; then all are shuffled. Here the slices lie over the *global* batch, each rank computes its
    own rows, and masks are completed at random to the exact count, as in DINOv3.
    """
    size = cfg.crops.global_crops_size
    patch = cfg.student.patch_size
    side = size // patch
    probability = cfg.ibot.mask_sample_probability
    masked_crops = int(crops * probability)
    largest_block = 0.5 * size // patch * size // patch  # half of the patches; left to right, as published
    ratios = np.linspace(*cfg.ibot.mask_ratio_min_max, masked_crops + 1).tolist()
    secret = stable_hash(cfg.train.seed, "masks", step)
    masks = np.zeros((len(positions), side * side), dtype=bool)
    for mask, position in zip(masks, positions):
        k = permuted_index(secret, position, crops)
        if k < masked_crops:
            rng = random.Random(stable_hash(secret, k))
            count = int(side * side * rng.uniform(ratios[k], ratios[k + 1]))
            mask[:] = sample_block_mask(rng, side, count, largest_block).ravel()
            free = np.flatnonzero(~mask).tolist()
            mask[rng.sample(free, count - int(mask.sum()))] = True
    masks = torch.from_numpy(masks)
    weights = (1 / masks.sum(1, keepdim=True)).expand_as(masks)[masks]
    indices = masks.flatten().nonzero()[:, 0]
    return dict(masks=masks if probability else None, mask_indices=indices, mask_weights=weights)


def sample_block_mask(rng, side, count, largest_block):
    """About `count` of side x side patches, in blocks of 4 to `largest_block` -> bool (side, side).

    The published generator's random calls, in its order. It may stop a few patches short: see sample_masks.
    """
    mask = np.zeros((side, side), dtype=bool)
    bound = math.log(1 / 0.3)
    failures = 0
    while mask.sum() < count and failures < 10:
        missing = count - int(mask.sum())
        area = rng.uniform(4, min(missing, largest_block))
        aspect = math.exp(rng.uniform(-bound, bound))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        failures += 1
        if h < side and w < side:
            top = rng.randint(0, side - h)
            left = rng.randint(0, side - w)
            block = mask[top : top + h, left : left + w]  # a view: filling it fills the mask
            if 0 < block.size - block.sum() <= min(missing, largest_block):
                block[:] = True
                failures = 0
    return mask


# ---------------------------------------------------------------- the sampler, without a state


def stable_hash(*parts):
    """64 bits from integers and words, the same in every process (Python's own hash() of a word is not)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permuted_index(secret, index, n):
    """Where `index` goes in the permutation of range(n) that `secret` names.

    Not torch.randperm: a shuffled table of a billion samples takes 8 GB in every process, and a resumed run
    would have to make it again. A Feistel network computes one entry in a few microseconds, for any n: the
    number is cut into two halves, and each round adds (xor) a hash of one half to the other, which can be
    undone, so no two indices meet. It permutes a power of four >= n; results >= n are sent through again.
    """
    bits = ((n - 1).bit_length() + 1) // 2  # of one half
    half = (1 << bits) - 1
    while True:
        left = index >> bits
        right = index & half
        for turn in range(4):
            left, right = right, left ^ (stable_hash(secret, turn, right) & half)
        index = left << bits | right
        if index < n:
            return index


class MultiCropDataset(torch.utils.data.Dataset):
    """`self[step, micro]` -> this rank's micro-batch, crops still uint8; a function of the two numbers."""

    def __init__(self, dataset, cfg, rank=0, world=1):
        self.dataset = dataset
        self.cfg = cfg
        self.rank = rank
        self.world = world
        # The image that each worker is reading, in shared memory: a worker that hangs can't be asked.
        self.reading = torch.full((max(1, cfg.train.num_workers),), -1).share_memory_()
        self.cache = {}
        self.cache_room = CACHE_BYTES

    def load_sample(self, i, bad):
        """Sample i -> uint8 (3, H, W). An unreadable image goes to `bad`, and another takes its place."""
        seed = self.cfg.train.seed
        n = len(self.dataset)
        worker = torch.utils.data.get_worker_info()
        for attempt in range(10):
            if attempt:
                index = stable_hash(seed, i, attempt) % n
            else:  # each epoch i // n has a permutation of its own
                index = permuted_index(stable_hash(seed, i // n), i % n, n)
            if index in self.cache:
                return self.cache[index]
            self.reading[worker.id if worker else 0] = index
            try:
                image = to_tensor(self.dataset[index][0])
            except BadImage as error:
                bad.append(error.args)
                continue
            except Exception as error:  # a bug: name the image, since this worker goes on to others
                raise RuntimeError(f"{sample_name(self.dataset, index)}: {error!r}") from error
            if image.numel() <= min(self.cache_room, CACHED_IMAGE_BYTES):
                self.cache[index] = image
                self.cache_room -= image.numel()
            return image
        path, reason = bad[-1]
        raise UserError(f"ten images in a row cannot be read, the last was {path} ({reason})")

    def __getitem__(self, step_and_micro):
        """(step, micro) -> dict: views and colors (of global, of local crops), the rest as make_loader's."""
        step, micro = step_and_micro
        crops = self.cfg.crops
        B = self.cfg.train.batch_size_per_gpu
        global_batch = B * self.world * self.cfg.train.accumulate
        first = (micro * self.world + self.rank) * B  # our first position in the global batch
        counts = (2, crops.local_crops_number)
        sizes = (crops.global_crops_size, crops.local_crops_size)
        views = [torch.empty(B * count, 3, s, s, dtype=torch.uint8) for count, s in zip(counts, sizes)]
        first_sample = step * global_batch + first
        samples = range(first_sample, first_sample + B)
        colors = []
        bad = []
        for position, i in enumerate(samples):
            image = self.load_sample(i, bad)
            rng = np.random.default_rng(stable_hash(self.cfg.train.seed, "crops", i))
            boxes, flips, color = sample_crop_params(rng, crops, image.shape[2], image.shape[1])
            colors.append(torch.from_numpy(color))
            for v, (box, flip) in enumerate(zip(boxes, flips)):
                local = int(v >= 2)
                row = (v - 2 * local) * B + position  # crop-major: crop 1 of all images, then crop 2 of all
                views[local][row] = crop_and_resize(image, box, sizes[local], flip)
        colors = torch.stack(colors, 1).split(counts)  # (2, B, 11), (L, B, 11)
        colors = [x.flatten(0, 1) for x in colors]
        ours = range(first, first + B)
        positions = [*ours, *(global_batch + position for position in ours)]  # of crop 1, of crop 2
        masks = sample_masks(self.cfg, step, positions, 2 * global_batch)
        return dict(masks, views=views, colors=colors, samples=torch.tensor(samples), bad=bad)


# ---------------------------------------------------------------- the loader


def make_loader(cfg, dataset, device, start_step=0, rank=0, world=1):
    """Micro-batches without end from `start_step` on, each made by one worker, augmented on `device`: dicts.

    globals (2B, 3, S, S), locals (L*B, 3, s, s) or None: float32, crop-major; masks (2B, N) bool or None;
    mask_indices (M,) into the flat 2B * N; mask_weights (M,) = 1 / masked patches of that crop; samples (B,)
    their numbers; bad, a list of (path, reason). Raises UserError with the image's name when a worker dies or
    hangs.
    """
    crops = MultiCropDataset(dataset, cfg, rank, world)
    workers = cfg.train.num_workers
    loader = torch.utils.data.DataLoader(
        crops, batch_size=None, sampler=steps_from(start_step, cfg.train.accumulate), num_workers=workers,
        timeout=LOADER_TIMEOUT if workers else 0, pin_memory="cuda" in str(device))  # fmt: skip
    batches = iter(loader)
    # On a GPU the next batch is copied and coloured in a side stream, during the step that uses this one.
    # Each stream waits for the other's earlier work, so no memory is reused too early. A CPU's do nothing.
    streams = torch.get_device_module(device)
    side_stream = streams.Stream()
    upcoming = None
    while True:
        if isinstance(upcoming, UserError):  # only now is that batch due. A loader that has failed is not
            raise upcoming  # asked again: its living workers may wait for a message that never ends
        streams.current_stream().wait_stream(side_stream)
        side_stream.wait_stream(streams.current_stream())
        batch = upcoming
        with streams.stream(side_stream):
            upcoming = batch_or_error(batches, crops, device)
        if batch:
            yield batch


def steps_from(step, accumulate):
    """(step, micro) without end: what MultiCropDataset is asked for."""
    while True:
        for micro in range(accumulate):
            yield step, micro
        step += 1


def batch_or_error(batches, crops, device):
    """The next batch on `device`, or the UserError to raise in its place, with the names of the images."""
    try:
        batch = next(batches)
    except Exception as error:  # a worker's own comes with its traceback as message: the last line says why
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        names = ", ".join(sample_name(crops.dataset, i) for i in crops.reading.tolist() if i >= 0)
        failure = UserError(f"reading images stopped: {reason}; last read: {names}")
        failure.__cause__ = error
        return failure
    return to_device(batch, device)


def to_device(batch, device):
    """A batch of the workers on `device`, its crops coloured and normalised: the dict of make_loader."""
    views = []
    for crops, colors in zip(batch.pop("views"), batch.pop("colors")):
        crops = crops.to(device, non_blocking=True)
        views.append(photometric(crops, colors) if len(crops) else None)
    for key, value in batch.items():
        if torch.is_tensor(value):
            batch[key] = value.to(device, non_blocking=True)
    return dict(batch, globals=views[0], locals=views[1])
