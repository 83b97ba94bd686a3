"""The published augmentation, image by image in Pillow, and how much faster data.py is.

    python -m tools.bench_input

Prints images/s of one CPU core. tests/test_augment.py compares data.py with the functions here, operation by
operation and on whole crops.
"""

import argparse
import os
import tempfile
import time

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import config
from data import (
    BLUR_SIGMA,
    GRAYSCALE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ORDER,
    SOLARIZE,
    MultiCropDataset,
    photometric,
    sample_crop_params,
)
from decode import decode_image
from sources import Entry, ImageFiles

BATCH = 8  # images
GLOBAL_SIZE, LOCAL_SIZE = 224, 98  # pixels


def photo(width=500, height=375, seed=0):
    """Noise whose spectrum falls as a photo's does, with some fine grain: a picture of natural smoothness."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for scale in (2, 4, 8, 16, 32, 64, 128, 256, width):
        image += smooth_noise(rng, scale, width, height)[..., None] * 1.5  # shared by the channels
        for channel in range(3):
            image[..., channel] += smooth_noise(rng, scale, width, height)
    image -= np.percentile(image, 1)
    return Image.fromarray((255 * image / np.percentile(image, 99)).clip(0, 255).astype(np.uint8))


def smooth_noise(rng, scale, width, height):
    """Noise on a grid of `scale` columns, the weaker the finer it is, enlarged -> float32 (height, width)."""
    shape = (max(2, scale * height // width), scale)
    noise = Image.fromarray(rng.normal(0, scale**-0.6, shape).astype(np.float32))
    return np.asarray(noise.resize((width, height), Image.BICUBIC))


# ---------------------------------------------------------------- the reference


def pillow_hue(image, shift):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.int32(shift * 255).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


PILLOW_JITTER = (  # in the order of the columns BRIGHTNESS, CONTRAST, SATURATION, HUE
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    pillow_hue,
)
PILLOW_AFTER = (  # GRAYSCALE, BLUR_SIGMA, SOLARIZE
    lambda image, _: ImageOps.grayscale(image).convert("RGB"),
    lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    lambda image, _: ImageOps.solarize(image, 128),
)


def pillow_crop(image, box, size, flip, colors):
    """One crop as the published pipeline makes it -> float32 (3, size, size).

    box, flip, colors: one crop of `data.sample_crop_params`.
    """
    left, top, width, height = map(int, box)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.BICUBIC)
    if flip:
        image = ImageOps.mirror(image)
    if colors[ORDER][0] >= 0:
        for column in np.argsort(colors[ORDER]):
            image = PILLOW_JITTER[column](image, float(colors[column]))
    for column, operation in zip((GRAYSCALE, BLUR_SIGMA, SOLARIZE), PILLOW_AFTER):
        if colors[column]:
            image = operation(image, float(colors[column]))
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return image.sub_(IMAGENET_MEAN).div_(IMAGENET_STD)


# ---------------------------------------------------------------- the comparison


def run_ours(dataset, step):
    """One batch of crops by data.py -> seconds of a worker (decoding and crops), and in all."""
    start = time.perf_counter()
    batch = dataset[step, 0]
    cropped = time.perf_counter()
    for views, colors in zip(batch["views"], batch["colors"]):
        photometric(views, colors)
    return cropped - start, time.perf_counter() - start


def run_pillow(path, step, crops):
    """One batch of crops by Pillow -> seconds."""
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * crops.local_crops_number
    start = time.perf_counter()
    for i in range(BATCH):
        image = decode_image(path, path)
        params = sample_crop_params(np.random.default_rng([step, i]), crops, *image.size)
        for box, flip, colors, size in zip(*params, sizes):
            pillow_crop(image, box, size, flip, colors)
    return time.perf_counter() - start


def main(rounds=30):
    """A 500 x 375 JPEG to 2 x 224 + 8 x 98 float crops, by data.py and by Pillow in turn, on one thread.

    The best of the rounds counts, since other programs can only make a round slower.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tools.bench_input", description=__doc__, formatter_class=form)
    parser.parse_args()
    torch.set_num_threads(1)
    cfg = config.load(overrides=[f"train.batch_size_per_gpu={BATCH}", "student.patch_size=14",
                                 f"crops.local_crops_size={LOCAL_SIZE}"])  # fmt: skip
    seconds = dict(ours=[], worker=[], pillow=[])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "photo.jpg")
        photo().save(path, quality=90)
        print(f"500 x 375 JPEG of {os.path.getsize(path) / 1000:.0f} KB")
        dataset = MultiCropDataset(ImageFiles([Entry(path)]), cfg)
        for step in range(rounds):
            worker, ours = run_ours(dataset, step)
            seconds["worker"].append(worker)
            seconds["ours"].append(ours)
            seconds["pillow"].append(run_pillow(path, step, cfg.crops))
    rates = {name: BATCH / min(spent) for name, spent in seconds.items()}
    listed = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    print(f"{listed} images/s/core (worker: decode and crops alone)")
    print(f"ours / pillow {rates['ours'] / rates['pillow']:.2f}")


if __name__ == "__main__":
    config.run(main)
