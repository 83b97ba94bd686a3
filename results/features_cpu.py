"""What reading, cropping and storing add to a bare network, and whether memory grows with the images.

    python results/features_cpu.py          # prints two tables; five minutes on two CPU cores

The first is images/s of a ViT-S/14 at 224 pixels: the network alone on pixels in memory, and features.py from
JPEG files of 500 x 375 into an .npz, in turn. The second is the peak memory of features.py for 1,000 and for
10,000 scenes (a small network, all tokens kept).
"""

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import normalize  # noqa: E402
from evals.extract import extract_to_npz  # noqa: E402
from features import EvalImages, iterate_batches, open_backbone  # noqa: E402
from model import SIZES, VisionTransformer  # noqa: E402
from sources import open_images  # noqa: E402

COUNT, BATCH, ROUNDS = 64, 16, 5
MEASURED = "import resource as r, features; features.main(); print(r.getrusage(r.RUSAGE_SELF).ru_maxrss)"


def photographs(folder):
    """JPEG files of a usual size, smooth with some grain, about 45 KB each."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        grain = rng.normal(0, 4, (375, 500, 3))
        pixels = np.asarray(small.resize((500, 375), Image.BICUBIC)) + grain
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.jpg", quality=90)


@torch.no_grad()
def speed(folder):
    backbone, cfg = open_backbone("random:dinov2_vits14_reg4")
    (folder / "photos").mkdir()
    photographs(folder / "photos")
    photos = open_images([str(folder / "photos")])
    loaded = [x for x, *_ in iterate_batches(EvalImages(photos, 224, 256), BATCH)]
    backbone(normalize(loaded[0]))
    rates = {"network alone": [], "features.py": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for x in loaded:
            backbone(normalize(x))
        middle = time.perf_counter()
        extract_to_npz(folder / "f.npz", backbone, EvalImages(photos, 224, 256), batch_size=BATCH)
        rates["network alone"].append(COUNT / (middle - start))
        rates["features.py"].append(COUNT / (time.perf_counter() - middle))
    ratios = [b / a for a, b in zip(*rates.values())]
    for name, rate in rates.items():
        print(f"{name:16s} {median(rate):6.2f} images/s")
    print(
        f"ratio            {median(ratios):6.2f} (of {ROUNDS} pairs: {min(ratios):.2f} to {max(ratios):.2f})"
    )


def memory(folder):
    arch = SIZES["vit_laptop"] | dict(patch_size=4, img_size=32, num_register_tokens=4)
    torch.save({"teacher": VisionTransformer(**arch).state_dict(), "arch": arch}, folder / "t.pth")
    for count in (1_000, 10_000):
        command = [sys.executable, "-c", MEASURED, f"scenes:{count}", "--size", "32"]
        command += ["--weights", str(folder / "t.pth"), "--out", str(folder / f"{count}.npz")]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        written = (folder / f"{count}.npz").stat().st_size / 2**20
        print(
            f"{count:6d} images    peak {int(said.split()[-1]) / 1024:5.0f} MiB, {written:4.0f} MiB written"
        )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as scratch:
        speed(Path(scratch))
        memory(Path(scratch))
