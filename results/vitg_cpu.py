"""The real ViT-g/14 on a CPU, as far as memory goes: how long, and how many gigabytes.

    python results/vitg_cpu.py [blocks]

Prints one line each for: the model built and counted; the forward pass of one 224-pixel image through all 40
blocks in bf16; forward and backward pass in fp32, at full width, through a few of its blocks (default 4), its
head of 131,072 prototypes included. Each in a process of its own, so that peak memory is its own.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import config  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from optim import compute_schedules  # noqa: E402
from tools.plan import count_parameters  # noqa: E402

TASKS = ("count", "forward", "backward")


def meta_model(cfg):
    """Student-shaped, without memory for its parameters."""
    with torch.device("meta"):
        return model.DINOv2(cfg)


def count(cfg):
    vitg = meta_model(cfg)
    total = count_parameters(vitg)
    backbone = count_parameters(vitg.backbone)
    return f"{total:,} parameters, {backbone:,} of them in the backbone (224-pixel positions)"


def forward(cfg):
    backbone = meta_model(cfg).backbone.to(torch.bfloat16).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in backbone.parameters():  # any numbers will do
            parameter.normal_(std=0.02)
        tokens = backbone(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))
    assert torch.isfinite(tokens.cls).all()
    cls = tuple(tokens.cls.shape)
    patches = tuple(tokens.patches.shape)
    return f"{len(backbone.blocks)} blocks, bf16, one image: [CLS] {cls}, patches {patches}"


def backward(cfg, blocks):
    model.SIZES["vit_giant2"]["depth"] = blocks
    cfg.train.batch_size_per_gpu = 1
    cfg.train.num_workers = 0
    cfg.train.dataset_path = "scenes:10:size=224"
    cfg.compute_precision.dtype = "fp32"
    state = train.TrainState(cfg)
    batch = next(train.make_loader(cfg, train.open_dataset(cfg.train.dataset_path, cfg.data), "cpu"))
    metrics = train.train_step(state, [batch], compute_schedules(cfg, 0), cfg)
    size = count_parameters(state.student)
    loss = metrics["loss"].item()
    norm = metrics["grad_backbone"].item()
    return (f"a train_step of one image through {blocks} blocks ({size:,} parameters with heads), fp32: "
            f"loss {loss:.3f}, gradient {norm:.3f}")  # fmt: skip


def run_task(task, blocks):
    cfg = config.load(model="vitg14")
    began = time.monotonic()
    if task == "count":
        line = count(cfg)
    elif task == "forward":
        line = forward(cfg)
    else:
        line = backward(cfg, blocks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{line}; {time.monotonic() - began:.0f} s, peak {peak:.1f} GiB", flush=True)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("blocks", nargs="?", type=config.argument(config.Count), default=4)
    parser.add_argument("--task", choices=TASKS, help="one of the three, in this process")
    args = parser.parse_args()
    if args.task:
        run_task(args.task, args.blocks)
        return
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, {os.cpu_count()} cores", flush=True)
    for task in TASKS:
        subprocess.run([sys.executable, __file__, "--task", task, str(args.blocks)], check=True)


if __name__ == "__main__":
    config.run(main)
