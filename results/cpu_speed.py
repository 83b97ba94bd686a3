"""What bf16 gains on a CPU: training steps and frozen features in fp32 and in bf16, in turn (A B A B).

    python results/cpu_speed.py                                # prints the table
    python results/cpu_speed.py --out results/cpu_speed.json   # and keeps it

Rows: a step of the laptop preset with its data; a step of ViT-S/16, 8 images, 2 x 224 + 8 x 96 pixels; images
per second of a frozen ViT-S/14 at 224 pixels. A ratio is the median over the rounds, of numbers measured one
after the other, since a shared machine changes its speed from minute to minute. Expect five minutes.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import config  # noqa: E402
from data import make_loader, normalize  # noqa: E402
from features import open_backbone  # noqa: E402
from model import compute_dtype  # noqa: E402
from optim import compute_schedules  # noqa: E402
from runfolder import environment  # noqa: E402
from sources import open_source  # noqa: E402
from tools.bench import noise_batches  # noqa: E402
from train import TrainState, train_step  # noqa: E402

DTYPES = ("fp32", "bf16")
VITS16 = (
    "student.arch=vit_small", "train.batch_size_per_gpu=8", "speed.compile=off", "student.drop_path_rate=0.1",
    "dino.head_n_prototypes=65536", "train.num_workers=0")  # fmt: skip


def laptop_step(dtype):
    """-> a function that makes a batch of the laptop preset and takes one step."""
    few = "train.dataset_path=scenes:192:seed=10"  # all of them are drawn after three steps
    cfg = config.load(model="laptop", overrides=[few, f"compute_precision.dtype={dtype}"])
    batches = make_loader(cfg, open_source(cfg.train.dataset_path), torch.device("cpu"))
    return step_of(cfg, batches)


def vits16_step(dtype):
    """-> a function that takes one step of ViT-S/16 on noise."""
    cfg = config.load(overrides=[*VITS16, f"compute_precision.dtype={dtype}"])
    return step_of(cfg, noise_batches(cfg, torch.device("cpu")))


def step_of(cfg, batches):
    torch.manual_seed(0)
    state = TrainState(cfg)
    schedules = compute_schedules(cfg, 0)
    return lambda: train_step(state, [next(batches)], schedules, cfg)


def frozen_features(dtype):
    """-> a function that sends sixteen images of 224 pixels through ViT-S/14."""
    backbone, _ = open_backbone("random:dinov2_vits14_reg4", dtype=dtype)
    pixels = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8)

    @torch.no_grad()
    def extract():
        backbone(normalize(pixels))

    return extract


ROWS = {  # {name: (how to make the function, calls before the clock starts, calls that are timed)}
    "step of the laptop preset": (laptop_step, 4, 8),
    "step of ViT-S/16, 8 images": (vits16_step, 1, 1),
    "16 images through ViT-S/14": (frozen_features, 1, 2),
}


def seconds_per_call(function, calls):
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def measure(make, warm_up, calls, rounds):
    """-> {"fp32": median seconds of a call, "bf16": the same, "ratio": median of the rounds' ratios}."""
    functions = {dtype: make(dtype) for dtype in DTYPES}
    for function, _ in itertools.product(functions.values(), range(warm_up)):
        function()
    times = {dtype: [] for dtype in DTYPES}
    for _ in range(rounds):
        for dtype, function in functions.items():
            times[dtype].append(seconds_per_call(function, calls))
    ratios = [slow / fast for slow, fast in zip(times["fp32"], times["bf16"])]
    medians = {dtype: statistics.median(seconds) for dtype, seconds in times.items()}
    return dict(medians, ratio=statistics.median(ratios), lowest=min(ratios), highest=max(ratios))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=config.argument(Path), help="a JSON file for the numbers")
    parser.add_argument("--rounds", type=config.argument(config.Count), default=5)
    args = parser.parse_args()
    print(f"auto is {compute_dtype('auto', 'cpu')} on this processor, {torch.get_num_threads()} threads")
    rows = {}
    for name, (make, warm_up, calls) in ROWS.items():
        row = measure(make, warm_up, calls, args.rounds)
        rows[name] = row
        seconds = "  ".join(f"{dtype} {row[dtype]:7.3f} s" for dtype in DTYPES)
        print(f"{name:28s} {seconds}  {row['ratio']:.2f}x ({row['lowest']:.2f}-{row['highest']:.2f})")
    if args.out:
        machine = environment()
        facts = {name: machine[name] for name in ("cpu", "cpu_cores", "threads", "torch", "git_commit")}
        args.out.write_text(json.dumps(dict(rows=rows, environment=facts), indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
