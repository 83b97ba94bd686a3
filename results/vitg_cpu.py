"""The real ViT-g/14 on a CPU, as far as memory goes: how long, and how many gigabytes.

    python results/vitg_cpu.py [blocks]

Prints one line each for: the model built and counted; the forward pass of one 224-pixel image through all 40
blocks in bf16; forward and backward pass in fp32, at full width, through a few of its blocks (default 4), its
head of 131,072 prototypes included. Each in a process of its own, so that peak memory is its own.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import config  # noqa: E402
import model
import train
from optim import compute_schedules


def build(cfg):
    with torch.device("meta"):
        return model.DINOv2(cfg)


def forward(cfg):
    g = build(cfg).backbone.to(torch.bfloat16).to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in g.parameters():  # any numbers will do
            parameter.normal_(std=0.02)
        tokens = g(torch.randn(1, 3, 224, 224, dtype=torch.bfloat16))
    assert torch.isfinite(tokens.cls).all()
    shapes = tuple(tokens.cls.shape), tuple(tokens.patches.shape)
    return f"{len(g.blocks)} blocks, bf16, one image: [CLS] {shapes[0]}, patches {shapes[1]}"


def backward(cfg, blocks):
    model.SIZES["vit_giant2"]["depth"] = blocks
    cfg.train.batch_size_per_gpu, cfg.train.num_workers, cfg.compute_precision.dtype = 1, 0, "fp32"
    cfg.train.dataset_path = "scenes:10:size=224"
    t = train.TrainState(cfg)
    batch = next(train.make_loader(cfg, train.open_source(cfg.train.dataset_path), "cpu"))
    metrics = train.train_step(t, [batch], compute_schedules(cfg, 0), cfg)
    size = sum(p.numel() for p in t.student.parameters())
    loss, norm = metrics["loss"].item(), metrics["grad_backbone"].item()
    return (f"a train_step of one image through {blocks} blocks ({size:,} parameters with heads), fp32: "
            f"loss {loss:.3f}, gradient {norm:.3f}")  # fmt: skip


def main(task, blocks):
    cfg, began = config.load(model="vitg14"), time.monotonic()
    if task == "count":
        g = build(cfg)
        counts = [sum(p.numel() for p in m.parameters()) for m in (g, g.backbone)]
        said = f"{counts[0]:,} parameters, {counts[1]:,} of them in the backbone (224-pixel positions)"
    else:
        said = forward(cfg) if task == "forward" else backward(cfg, blocks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{said}; {time.monotonic() - began:.0f} s, peak {peak:.1f} GiB", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        main(sys.argv[2], int(sys.argv[3]))
    else:
        threads = torch.get_num_threads()
        print(f"torch {torch.__version__}, {threads} threads, {os.cpu_count()} cores", flush=True)
        for task in ("count", "forward", "backward"):
            subprocess.run([sys.executable, __file__, "--task", task, (sys.argv[1:] or ["4"])[0]], check=True)
