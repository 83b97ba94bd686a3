"""What several test files share: golden numbers, tiny networks, steps and runs, images, child processes."""

import json
import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import config
import train
from model import VisionTransformer
from optim import compute_schedules

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------- the authors' numbers

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # largest error over largest value; LayerNorm eps 1e-5 is off by 9e-5, tanh GELU by 2e-4
# Each released file: the names and shapes of its tensors, block 0 standing for all `depth` blocks.
RELEASED_CHECKPOINTS = json.loads((GOLDEN / "i_hub_state_dict_keys.json").read_text())


def load_golden(name):
    """The arrays of golden/NAME.npz as {key: tensor}; texts are left out."""
    file = np.load(GOLDEN / f"{name}.npz")
    return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind != "U"}


def assert_close(ours, theirs, tolerance=TOLERANCE):
    """Equal shapes, and a largest error of at most `tolerance` times the largest value."""
    ours = ours.detach().double()
    theirs = torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def same_tensors(ours, theirs):
    """Whether two state dicts agree in names and in every bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- networks and steps


def tiny_backbone(**options):
    """A ViT of width 32 and depth 2, always the same; its weights are large enough to matter."""
    torch.manual_seed(0)
    arch = dict(embed_dim=32, depth=2, num_heads=2, patch_size=8, img_size=32, num_register_tokens=2)
    return VisionTransformer(**{**arch, "init_std": 0.1, **options}).eval()


def debug_config(*overrides):
    """configs/debug.yaml without drop path, in fp32: equal batches give equal steps, on any machine."""
    exact = ["student.drop_path_rate=0", "compute_precision.dtype=fp32"]
    return config.load(model="debug", overrides=[*exact, *overrides])


def random_batch(cfg, B=8, seed=0):
    """Noise in place of crops; every other global crop has its first quarter of patches masked."""
    rng = torch.Generator().manual_seed(seed)
    size = cfg.crops.global_crops_size
    local_size = cfg.crops.local_crops_size
    N = (size // cfg.student.patch_size) ** 2
    masks = torch.zeros(2 * B, N, dtype=torch.bool)
    masks[::2, : N // 4] = True
    return dict(
        globals=torch.randn(2 * B, 3, size, size, generator=rng),
        locals=torch.randn(cfg.crops.local_crops_number * B, 3, local_size, local_size, generator=rng),
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=torch.full((int(masks.sum()),), 1 / (N // 4)),
    )


def take_steps(cfg, steps=1, batch=None):
    """A new TrainState after some steps, on `batch` or on noise -> (state, metrics of the last step)."""
    torch.manual_seed(0)
    state = train.TrainState(cfg)
    schedules = compute_schedules(cfg, 150)
    for step in range(steps):
        micro_batches = batch or [random_batch(cfg, seed=step)]
        metrics = train.train_step(state, micro_batches, schedules, cfg, log_diagnostics=True)
    return state, metrics


# ---------------------------------------------------------------- whole runs

# Ten steps of eight scenes, none of them for k-NN: about a second.
TINY_RUN = ["--model", "debug", "compute_precision.dtype=fp32", "train.dataset_path=scenes:60:seed=3",
            "train.batch_size_per_gpu=8",
            "train.OFFICIAL_EPOCH_LENGTH=10", "train.log_every=1", "optim.epochs=1",
            "optim.warmup_epochs=0.2", "teacher.warmup_teacher_temp_epochs=0.5", "student.drop_path_rate=0.3",
            "evaluation.train_path=", "evaluation.test_path="]  # fmt: skip


def run_tiny(folder, *arguments):
    """Train TINY_RUN, changed by `arguments`, into `folder` -> the rows of its log."""
    train.main([*TINY_RUN, "--output-dir", str(folder), *map(str, arguments)])
    return read_log(folder)


def read_log(folder):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def logged_losses(rows):
    """(step, loss, gradient norm of the backbone) of every logged step."""
    return [(row["step"], row["loss"], row["grad_backbone"]) for row in rows if "loss" in row]


def load_teacher(folder):
    """The tensors of a run's teacher.pth."""
    return torch.load(Path(folder) / "teacher.pth", weights_only=True)["teacher"]


# ---------------------------------------------------------------- images


def write_noise_images(folder, good, bad=0):
    """PNGs of 48 x 48 pixels that all differ, and some that cannot be read -> `folder`."""
    folder.mkdir()
    for i in range(good):
        Image.effect_noise((48, 48), 60 + i).convert("RGB").save(folder / f"{i}.png")
    for i in range(bad):
        (folder / f"bad{i}.png").write_bytes(b"\x89PNG not really")
    return folder


def write_flat_images(folder, good, bad=0, size=(40, 30), green=0):
    """PNGs of one colour each, and some that cannot be read."""
    folder.mkdir(parents=True)
    for i in range(good):
        Image.new("RGB", size, (40 * i % 256, green, 90)).save(folder / f"{i}.png")
    for i in range(bad):
        (folder / f"bad{i}.png").write_bytes(b"no image")


def fake_png(width, height, *chunks):
    """The bytes of a PNG that claims a size; what it holds is up to the chunks, (type, content) each."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


# ---------------------------------------------------------------- predictions by nearest neighbours


def make_color_sets(folder):
    """Images of two flat colours, a network that tells them apart, and two photos, one of them broken.

    -> the arguments that name network and sets, and the paths of the photos.
    """
    for split in ("train", "test"):
        for kind, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (folder / split / kind).mkdir(parents=True)
            for i in range(6):
                shade = tuple(channel + 4 * i + 2 * (split == "test") for channel in color)
                Image.new("RGB", (40, 30), shade).save(folder / split / kind / f"{i}.png")
    (folder / "train" / "red" / "0.png").write_bytes(b"broken")
    Image.new("RGB", (33, 60), (35, 33, 210)).save(folder / "new.png")
    (folder / "bad.png").write_bytes(b"broken")
    torch.manual_seed(0)
    backbone = VisionTransformer(32, 2, 2, patch_size=8, img_size=32, layerscale=1.0).requires_grad_(False)
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.1)  # the same in every PyTorch: trunc_normal_'s numbers have changed
    backbone.cls_token.zero_()  # [CLS] then depends on the image alone
    torch.save({"teacher": backbone.state_dict(), "arch": {"num_heads": 2}}, folder / "t.pth")
    sets = ["--train", f"folder:{folder}/train", "--test", f"folder:{folder}/test", "--image-size", "32"]
    photos = [str(folder / "new.png"), str(folder / "bad.png")]
    return ["--weights", str(folder / "t.pth"), *sets, "--k", "4"], photos


def check_printed_predictions(printed):
    assert "left out: " in printed
    assert "bad.png" in printed
    assert re.search(r"new.png: blue, \d+% of the votes \(right in \d+% of \d+ queries", printed)
    assert re.search(r"expected calibration error on 12 queries: 0\.\d{3}", printed)


# ---------------------------------------------------------------- hostile files and child processes


class Bomb:
    """Unpickling it, which no reader may do, makes `file`."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def child_environment(**more):
    """For a process that imports the repository, on one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def torchrun(*options):
    """The start of a command line; options and a script follow."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


TWO_RANKS = ("--standalone", "--nproc-per-node=2")
