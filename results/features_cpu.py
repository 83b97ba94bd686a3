"""The cost of reading, cropping and storing beside the bare network, and the memory for many images.

    python results/features_cpu.py          # prints two tables; five minutes on two CPU cores

The first is images/s of a ViT-S/14 at 224 pixels: the network alone on pixels in memory, and evals/extract.py
from JPEG files of 500 x 375 into an .npz, in turn. The second is the peak memory of evals/extract.py for
1,000 and for 10,000 scenes (a small network, all tokens kept).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
from data import normalize  # noqa: E402
from evals.extract import extract_to_npz  # noqa: E402
from features import EvalImages, iterate_batches, open_backbone  # noqa: E402
from model import SIZES, VisionTransformer  # noqa: E402
from sources import open_images  # noqa: E402

NUM_IMAGES, BATCH_SIZE, ROUNDS = 64, 16, 5
MEASURED_EXTRACT = (
    "import resource; from evals import extract; extract.main(); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # KiB
)


def write_smooth_jpegs(folder):
    """JPEG files of a usual size, smooth with some grain, about 45 KB each."""
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        grain = rng.normal(0, 4, (375, 500, 3))
        pixels = np.asarray(small.resize((500, 375), Image.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)


@torch.no_grad()
def measure_speed(folder):
    """Images/s of the network alone and of the whole extraction, in turn; the median of the rounds."""
    backbone, _ = open_backbone("random:dinov2_vits14_reg4")
    (folder / "photos").mkdir()
    write_smooth_jpegs(folder / "photos")
    photos = open_images([str(folder / "photos")])
    loaded = [pixels for pixels, *_ in iterate_batches(EvalImages(photos, 224, 256), BATCH_SIZE)]
    backbone(normalize(loaded[0]))
    network_rates = []
    extract_rates = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for pixels in loaded:
            backbone(normalize(pixels))
        middle = time.perf_counter()
        images = EvalImages(photos, 224, 256)
        extract_to_npz(folder / "f.npz", backbone, images, batch_size=BATCH_SIZE)
        network_rates.append(NUM_IMAGES / (middle - start))
        extract_rates.append(NUM_IMAGES / (time.perf_counter() - middle))
    ratios = [extract / network for network, extract in zip(network_rates, extract_rates)]
    print(f"network alone    {median(network_rates):6.2f} images/s")
    print(f"evals.extract    {median(extract_rates):6.2f} images/s")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio            {median(ratios):6.2f} (of {ROUNDS} pairs: {spread})")


def measure_memory(folder):
    """Peak memory of the command for few and for many images."""
    arch = SIZES["vit_laptop"] | dict(patch_size=4, img_size=32, num_register_tokens=4)
    torch.save({"teacher": VisionTransformer(**arch).state_dict(), "arch": arch}, folder / "t.pth")
    for num_images in (1_000, 10_000):
        out = folder / f"{num_images}.npz"
        command = [sys.executable, "-c", MEASURED_EXTRACT, f"scenes:{num_images}", "--size", "32",
                   "--weights", str(folder / "t.pth"), "--out", str(out)]  # fmt: skip
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        peak = int(printed.split()[-1]) / 1024
        written = out.stat().st_size / 2**20
        print(f"{num_images:6d} images    peak {peak:5.0f} MiB, {written:4.0f} MiB written")


def main():
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=form).parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        measure_speed(Path(scratch))
        measure_memory(Path(scratch))


if __name__ == "__main__":
    config.run(main)
