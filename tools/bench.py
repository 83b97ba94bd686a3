"""How fast nanodino trains on this machine, and which optimisations make it fast.

    python -m tools.bench                 # one GPU, at most nine minutes; without a GPU: a dry run
    python -m tools.bench --resume        # measures what nine minutes left out
    python -m tools.bench --resume --only presets --models vitg14 train.batch_size_per_gpu=32

Three parts: `presets` times train.py's own step for each model, at its published batch per GPU; `ablation`
switches off one optimisation at a time, then all six ("plain eager PyTorch"); `data` reads JPEG files and
shows how long the loop waits for them. Settings of train.py go to every row; `tflops=` is the peak of a chip
that PEAK_TFLOPS lacks. results/bench.json is written after every row, the tables beside it as markdown;
without --resume it starts anew.

On a GPU every row is a process of its own, so that none inherits another's memory, and a crash costs one row.
Section 1 holds the plain ways of doing things, patched over the shipped ones; tests/tools/test_bench.py shows
that they compute the same. MFU counts what the method needs (plan.py): work that is thrown away lowers it.
Only `data` reads images: the other batches are noise under real masks.

Expect three tables. Without a GPU they show that everything runs, and nothing else.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import config
import distributed as dist
import model
from config import Count, Number, UserError, argument, parse_json
from data import make_loader, sample_masks
from kernels import attention, prototypes
from optim import compute_schedules
from runfolder import environment
from scenes import Scenes
from sources import open_source
from tools import plan
from tools.isolation import TOO_LATE, run_isolated
from train import TrainState, train_step

ROOT = Path(__file__).parents[1]
PRESETS = "vits14,vitb14,vitl14,vitl16_short,vitg14"
ABLATED_PRESET = "vitl16_short"
OPTIMIZATIONS = ("kernels", "compile", "16-bit stream", "packing", "drop-path subset", "fused losses")
WARM_UP = 3  # the first step compiles and makes the optimizer's moments, the second may compile again
NO_TIME = "not measured: out of time"
# Dense 16-bit products of one chip in TFLOP/s, from the makers' data sheets; the first name found counts.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


# ---------------------------------------------------------------- 1. the plain ways, without optimizations


def forward_crops_separately(self, images, masks=None):
    """Without packing: the backbone runs once for the global crops and once for the local ones.

    Twice the launches, each over a smaller matrix; with FSDP every weight would also be gathered twice.
    """
    masks = masks or [None] * len(images)
    return [self(crops, mask) for crops, mask in zip(images, masks, strict=True)]


def drop_path_by_mask(x, groups, branch, rate):
    """Without the batch subset, as in most code: every image is computed, then the dropped ones times 0.

    The same random draws as model.drop_path, so the same images are dropped, and the same result is due.
    """
    gains = []
    for b, length in groups:
        num_kept = max(int(b * (1 - rate)), 1)
        kept = torch.randperm(b, device=x.device)[:num_kept]
        gain = x.new_zeros(b, 1).index_fill(0, kept, b / num_kept)
        gains.append(gain.expand(b, length).reshape(-1, 1))  # (b * length, 1), one for each token
    return x + (branch(x, groups) * torch.cat(gains)).to(x.dtype)


@contextmanager
def disabled(optimizations, cfg):
    """The shipped code, with these optimisations replaced by the plain way."""
    plain_ways = {
        "kernels": (attention, "CHOICE", "pytorch"),  # speed.kernels=pytorch: attention and losses
        "compile": (cfg.speed, "compile", "off"),
        # What flows from block to block is fp32 then, as autocast alone has it.
        "16-bit stream": (model, "to_autocast_dtype", lambda x: x),
        "packing": (model.VisionTransformer, "forward_crops", forward_crops_separately),
        "drop-path subset": (model, "drop_path", drop_path_by_mask),
        # The losses alone: iBOT's targets and softmaxes, M x K, are written to memory in fp32.
        "fused losses": (prototypes, "uses_kernels", lambda logits: False),
    }
    with ExitStack() as stack:
        for name in optimizations:
            stack.enter_context(patch.object(*plain_ways[name]))
        yield


# ---------------------------------------------------------------- 2. batches


def noise_batches(cfg, device):
    """Micro-batches without end, as make_loader's: crops of noise, but masks and numbers as in training."""
    B = cfg.train.batch_size_per_gpu
    L = cfg.crops.local_crops_number

    def crops(n, size):
        return torch.randn(n * B, 3, size, size, device=device) if n else None

    for i in count():
        batch = {}
        for name, mask in sample_masks(cfg, i, range(2 * B), 2 * B).items():
            batch[name] = None if mask is None else mask.to(device)
        batch["samples"] = torch.arange(i * B, (i + 1) * B, device=device)
        batch["bad"] = []
        batch["globals"] = crops(2, cfg.crops.global_crops_size)
        batch["locals"] = crops(L, cfg.crops.local_crops_size)
        yield batch


def write_jpegs(folder, number, seed=0):
    """JPEG files of 500 x 375 and 100 KB, as ImageNet's: enlarged scenes, with grain for the decoder."""
    scenes = Scenes(number, seed, size=64)
    rng = np.random.default_rng(0)
    for i in range(number):
        enlarged = np.asarray(scenes[i][0].resize((500, 375), Image.BICUBIC))
        pixels = enlarged + rng.normal(0, 15, (375, 500, 1))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{i}.jpg"), quality=90)


# ---------------------------------------------------------------- 3. one row


class StepTime(NamedTuple):
    """Seconds of a step."""

    wait: float  # until its batch was there
    whole: float


def time_steps(state, cfg, batches, steps, warm_up):
    """-> of every step, warm-up included: its StepTime, and (loss, skipped)."""
    device = state.dino_center.center.device
    times = []
    results = []
    for step in range(warm_up + steps):
        if step == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait_for(device)
        begin = time.perf_counter()
        batch = [next(batches) for _ in range(cfg.train.accumulate)]
        ready = time.perf_counter()
        metrics = train_step(state, batch, compute_schedules(cfg, step), cfg)
        wait_for(device)
        times.append(StepTime(ready - begin, time.perf_counter() - begin))
        results.append((metrics["loss"], metrics["skipped"]))
        state.step += 1
    return times, [(float(loss), float(skipped)) for loss, skipped in results]  # read when all is over


def wait_for(device):
    """Until all that was asked of the device is done."""
    torch.get_device_module(device).synchronize()


def peak_tflops(chip, dtype):
    """The peak of the chip, or 0 if it is not known, as for fp32."""
    if dtype == torch.float32:
        return 0
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in chip), 0)


def summarize_row(state, cfg, times, results, steps, tflops):
    """The numbers of a row, from what time_steps found in its last `steps` steps. GB are 1e9 bytes."""
    device = state.dino_center.center.device
    gpu = device.type == "cuda"
    images = cfg.train.batch_size_per_gpu * cfg.train.accumulate
    if not tflops and gpu:
        tflops = peak_tflops(torch.cuda.get_device_name(), state.dtype)
    spent = [step.whole - step.wait for step in times[-steps:]]
    seconds = statistics.median(spent)
    workload = plan.Workload(cfg)
    flops = cfg.train.accumulate * sum(plan.step_flops(workload).values())
    planned_memory = plan.memory_bytes(workload, cfg, 1, half=state.dtype != torch.float32)
    attn = state.student.backbone.blocks[0].attn
    kernels, why = attention.backend(device, state.dtype, attn.proj.in_features // attn.num_heads)
    losses = [loss if math.isfinite(loss) else None for loss, _ in results]
    row = dict(
        batch=cfg.train.batch_size_per_gpu, dtype=str(state.dtype).removeprefix("torch."), kernels=kernels,
        kernels_why=why, step_ms=1e3 * seconds, fastest_ms=1e3 * min(spent), slowest_ms=1e3 * max(spent),
        first_step_s=times[0].whole, images_per_second=images / seconds, tflop_per_step=flops / 1e12,
        mfu=flops / seconds / (tflops * 1e12) if tflops else None,
        planned_gb=sum(planned_memory.values()) / 1e9,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        losses=losses, skipped=sum(skipped for _, skipped in results))  # fmt: skip
    if None in losses:
        row["failed"] = "a loss is not finite"
    return row


def summarize_waits(cfg, times):
    """What the loop with the loader adds: images/s with the waiting in, and its share of the time."""
    waits = sum(step.wait for step in times)
    seconds = sum(step.whole for step in times)
    images = len(times) * cfg.train.batch_size_per_gpu * cfg.train.accumulate
    return dict(images_per_second=images / seconds, wait_share=waits / seconds, workers=cfg.train.num_workers)


def measure_row(row):
    """One row: {part, model, off, settings, steps, tflops} -> the numbers, or why there are none."""
    cfg = config.load(model=row["model"], overrides=row["settings"])
    device = dist.setup(cfg.speed.device)
    torch.backends.cuda.matmul.allow_tf32 = True  # this and the next two as train.py's main
    torch.manual_seed(cfg.train.seed)
    if cfg.speed.kernels != "auto":
        attention.CHOICE = cfg.speed.kernels
    with disabled(row["off"], cfg), tempfile.TemporaryDirectory() as folder:
        try:
            return time_row(row, cfg, device, folder)
        except torch.OutOfMemoryError:
            return dict(failed="out of memory", batch=cfg.train.batch_size_per_gpu)


def time_row(row, cfg, device, folder):
    """The numbers of a row, with JPEG files in `folder` if its part is `data`."""
    state = TrainState(cfg, device)
    steps = row["steps"]
    if row["part"] != "data":
        times, results = time_steps(state, cfg, noise_batches(cfg, device), steps, WARM_UP)
        return summarize_row(state, cfg, times, results, steps, row["tflops"])
    write_jpegs(folder, 32 if device.type == "cpu" else 256)
    batches = make_loader(cfg, open_source(f"folder:{folder}"), device)
    # Each worker has two batches ready when the first step is compiled: a full queue hides a slow loader, so
    # it is emptied before the clock starts, and the clock runs until every worker's turn has come.
    queue = 2 * cfg.train.num_workers
    steps = max(steps, queue)
    times, results = time_steps(state, cfg, batches, steps, WARM_UP + queue)
    numbers = summarize_row(state, cfg, times, results, steps, row["tflops"])
    return numbers | summarize_waits(cfg, times[-steps:])


def measure_isolated(row, seconds):
    """`measure_row` in a process of its own: it leaves no memory behind, and a crash costs this row alone."""
    outcome = run_isolated({"row": partial(measure_row, row)}, limit=seconds, own_group=True)["row"]
    if outcome.failure == TOO_LATE:
        return dict(failed=NO_TIME)
    if outcome.failure:
        return dict(failed=outcome.failure)
    return outcome.value


# ---------------------------------------------------------------- 4. the tables

COLUMNS = dict(  # of the three tables, named as in the JSON
    presets="batch images_per_second step_ms mfu peak_gb planned_gb planned_by_peak first_loss last_loss",
    ablation="images_per_second mfu peak_gb times_as_long times_the_memory",
    data="workers images_per_second wait_share",
)
FORMS = dict(batch="{}", workers="{}", images_per_second="{:.1f}", step_ms="{:.1f}", mfu="{:.1%}",
             peak_gb="{:.1f}", planned_gb="{:.1f}", wait_share="{:.1%}")  # fmt: skip


def ratio(a, b):
    return a / b if a is not None and b else None


def ablation_label(off):
    if not off:
        return "everything on"
    if len(off) == 1:
        return f"without {off[0]}"
    return "without all: plain eager PyTorch"


def with_ratios(row, baseline):
    """The row with what its table shows besides; `baseline`: the same model with every optimisation on."""
    name = row["model"]
    if row["part"] == "ablation":
        name += f", {ablation_label(row['off'])}"
    losses = row.get("losses", [None])
    return row | dict(name=name, first_loss=losses[0], last_loss=losses[-1],
                      planned_by_peak=ratio(row.get("planned_gb"), row.get("peak_gb")),
                      times_as_long=ratio(row.get("step_ms"), baseline.get("step_ms")),
                      times_the_memory=ratio(row.get("peak_gb"), baseline.get("peak_gb")))  # fmt: skip


def bench_tables(found):
    """Markdown, from the rows of one run. "-" is what is not known; a row that failed says why."""
    machine = found["environment"]
    rows = found["rows"]
    gpu = machine["gpus"][0] if machine["gpus"] else "no GPU"
    lines = [f"{gpu}, torch {machine['torch']}, commit {machine['git_commit'][:10]}"]
    baselines = {row["model"]: row for row in rows if row["part"] == "ablation" and not row["off"]}
    for part, columns in COLUMNS.items():
        columns = columns.split()
        rows_of_part = [row for row in rows if row["part"] == part]
        if rows_of_part:
            head = f"| {part} | {' | '.join(columns)} |".replace("_", " ")
            lines += ["", head, "|---" + "|--:" * len(columns) + "|"]
        for row in rows_of_part:
            lines.append(table_line(with_ratios(row, baselines.get(row["model"], {})), columns))
    return "\n".join(lines) + "\n"


def table_line(row, columns):
    cells = ["-"] * len(columns)
    if "failed" in row:
        cells[0] = row["failed"]
    else:
        for i, column in enumerate(columns):
            if row.get(column) is not None:
                cells[i] = FORMS.get(column, "{:.2f}").format(row[column])
    return f"| {row['name']} | {' | '.join(cells)} |"


# ---------------------------------------------------------------- 5. all rows


def rows_to_measure(args, settings, tflops):
    """The rows, in the order of their value."""
    rows = [("presets", name, ()) for name in args.models.split(",")]
    rows += [("ablation", args.ablate, ()), ("ablation", args.ablate, OPTIMIZATIONS)]
    rows += [("ablation", args.ablate, (name,)) for name in OPTIMIZATIONS]
    rows += [("data", args.ablate, ())]
    shared = dict(settings=settings, steps=args.steps, tflops=tflops)
    return [dict(part=part, model=preset, off=list(off), **shared) for part, preset, off in rows
            if args.only in (None, part)]  # fmt: skip


def rows_measured_before(path, machine):
    """For --resume: the rows of `path` that have numbers, if this commit and this GPU measured them."""
    if not path.is_file():
        return []
    try:
        found = parse_json(path.read_bytes())
        facts = {key: found["environment"][key] for key in ("git_commit", "gpus", "torch")}
        rows = [row for row in found["rows"] if {"part", "model", "off"} <= row.keys()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"{path} was not written by this bench ({e!r}): leave out --resume") from None
    for key, value in facts.items():
        if value != machine[key]:
            raise UserError(f"{path} was measured with another {key}: leave out --resume to measure it anew")
    return [row for row in rows if "failed" not in row]


def describe_machine(dry):
    """environment() of the run folder. Like a row it is isolated: it asks CUDA for the name of the GPU."""
    if dry:
        machine = environment()
    else:
        outcome = run_isolated({"machine": environment})["machine"]
        if outcome.failure:
            raise UserError(f"the GPU does not answer: {outcome.failure}")
        machine = outcome.value
    machine["command"] = " ".join(["python -m tools.bench", *sys.argv[1:]])
    machine["git_diff"] = "some" if machine["git_diff"] else "none"
    return machine


def parse_args(argv, dry):
    """-> argparse's namespace, the settings of train.py, the peak of the chip or 0."""
    parser = argparse.ArgumentParser(
        "python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=COLUMNS, help="one part")
    parser.add_argument("--models", default="debug" if dry else PRESETS, help="of presets, with commas")
    parser.add_argument("--ablate", default="debug" if dry else ABLATED_PRESET, help="of ablation and data")
    parser.add_argument("--steps", type=argument(Count), default=2 if dry else 10,
                        help="timed steps of a row")  # fmt: skip
    parser.add_argument("--minutes", type=argument(Number), default=9,
                        help="rows beyond are listed as not measured")  # fmt: skip
    parser.add_argument("--out", default="" if dry else ROOT / "results" / "bench.json", help="the JSON file")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file holds")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py; tflops=")
    args = parser.parse_intermixed_args(argv)
    settings = []
    tflops = "0"
    for text in args.overrides:
        if text.startswith("tflops="):
            tflops = text.removeprefix("tflops=")
        else:
            settings.append(text)
    try:
        return args, settings, config.convert(Number, tflops)
    except ValueError as e:
        raise UserError(f"tflops is {tflops!r}, but must be {e}") from None


def main(argv=None):
    # In a child: where NVML does not answer, the question itself starts CUDA, and this process has to fork.
    dry = not run_isolated({"gpu": torch.cuda.is_available})["gpu"].value
    args, settings, tflops = parse_args(argv, dry)
    rows = rows_to_measure(args, settings, tflops)
    deadline = time.monotonic() + 60 * args.minutes
    for row in rows:
        config.load(model=row["model"], overrides=settings)  # a mistake is told now, and once
    machine = describe_machine(dry)
    if dry:
        print("No GPU here: a miniature of the bench. Its numbers say nothing about a GPU.\n")
    out = Path(args.out) if args.out else None
    found = dict(environment=machine, rows=[])
    if args.resume and out:
        found["rows"] = rows_measured_before(out, machine)
    for row in rows:
        if any(row.items() <= earlier.items() for earlier in found["rows"]):
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            numbers = dict(failed=NO_TIME)
        else:
            numbers = measure_row(row) if dry else measure_isolated(row, left)
        found["rows"].append(row | numbers)
        print(json.dumps(found["rows"][-1]), flush=True)
        if out:
            out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + bench_tables(found))
    if out:
        out.with_suffix(".md").write_text(bench_tables(found))


if __name__ == "__main__":
    config.run(main)
