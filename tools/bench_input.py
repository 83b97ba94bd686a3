"""The yardstick: the published augmentation, image by image in Pillow, and the race of data.py against it.

    python -m tools.bench_input

The tests compare data.py with these functions, operation by operation and on whole crops.
"""

import os
import tempfile
import time

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

import config
from data import IMAGENET_MEAN, IMAGENET_STD, MultiCropDataset, photometric, sample_crop_params
from sources import ImageFiles, decode_image


def photo(width=500, height=375, seed=0):
    """Noise whose spectrum falls as a photo's does, with some fine grain: a picture of natural smoothness."""
    rng, image = np.random.default_rng(seed), np.zeros((height, width, 3))
    for k in (2, 4, 8, 16, 32, 64, 128, 256, width):
        for channels in (slice(0, 3), 0, 1, 2):  # what the channels share, then what they don't
            noise = Image.fromarray(
                rng.normal(0, k**-0.6, (max(2, k * height // width), k)).astype(np.float32)
            )
            noise = np.asarray(noise.resize((width, height), Image.BICUBIC))
            image[..., channels] += noise[..., None] * 1.5 if channels == slice(0, 3) else noise
    image -= np.percentile(image, 1)
    return Image.fromarray((255 * image / np.percentile(image, 99)).clip(0, 255).astype(np.uint8))


def pillow_hue(image, shift):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.int32(shift * 255).astype(np.uint8))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


PILLOW_JITTER = (
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    pillow_hue,
)
PILLOW_AFTER = (
    lambda image, _: ImageOps.grayscale(image).convert("RGB"),
    lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    lambda image, _: ImageOps.solarize(image, 128),
)


def pillow_crop(image, box, size, flip, row):
    """One crop as the published pipeline makes it -> float32 (3, size, size)."""
    left, top, w, h = map(int, box)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.BICUBIC)
    image = ImageOps.mirror(image) if flip else image
    for k in np.argsort(row[4:8]) if row[4] >= 0 else ():
        image = PILLOW_JITTER[k](image, float(row[k]))
    for k in range(3):
        image = PILLOW_AFTER[k](image, float(row[8 + k])) if row[8 + k] else image
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return image.sub_(IMAGENET_MEAN).div_(IMAGENET_STD)


def bench(rounds=30):
    """A 500 x 375 JPEG to 2 x 224 + 8 x 98 float crops, ours and Pillow's in turn, on one thread.

    Prints images/s of one core: the best of the rounds, since other programs can only make a round slower.
    """
    torch.set_num_threads(1)
    sizes = ["student.patch_size=14", "crops.local_crops_size=98", "train.batch_size_per_gpu=8"]
    cfg, seconds = config.load(overrides=sizes), dict(ours=[], worker=[], pillow=[])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "photo.jpg")
        photo().save(path, quality=90)
        print(f"500 x 375 JPEG of {os.path.getsize(path) / 1000:.0f} KB")
        crops = MultiCropDataset(ImageFiles([(path, None, -1, 0)]), cfg)
        for step in range(rounds):
            start = time.perf_counter()
            batch = crops[step, 0]
            seconds["worker"].append((time.perf_counter() - start) / 8)
            views = [photometric(x, params) for x, params in zip(batch["views"], batch["colors"])]
            seconds["ours"].append((time.perf_counter() - start) / 8)
            start = time.perf_counter()
            for i in range(8):
                image, rng = decode_image(path, path), np.random.default_rng([step, i])
                boxes, flips, rows = sample_crop_params(rng, cfg.crops, *image.size)
                views = [
                    pillow_crop(image, boxes[v], 224 if v < 2 else 98, flips[v], rows[v]) for v in range(10)
                ]
            seconds["pillow"].append((time.perf_counter() - start) / 8)
            del views
    speed = {k: 1 / min(v) for k, v in seconds.items()}
    print(
        ", ".join(f"{k} {v:.0f}" for k, v in speed.items()), "images/s/core (worker: decode and crops alone)"
    )
    print(f"ours / pillow {speed['ours'] / speed['pillow']:.2f}")


if __name__ == "__main__":
    bench()
