"""How fast nanodino trains on this machine, and what makes it fast.

    python bench.py                       # one GPU, at most nine minutes; without a GPU: a dry run
    python bench.py --resume              # measures what nine minutes left out
    python bench.py --resume --only presets --models vitg14 train.batch_size_per_gpu=32

Three parts: `presets` times train.py's own step for each model, at its published batch per GPU; `ablation`
switches off one efficiency measure at a time, then all six ("plain eager PyTorch"); `data` reads JPEG files
and says how long the loop waits for them. Settings of train.py go to every row; `tflops=` is the peak of a
chip that PEAK lacks. results/bench.json is written after every row, the tables beside it as markdown; without
--resume it starts anew.

What is unusual here: on a GPU every row is a process of its own, so that none inherits another's memory, and
a crash costs one row. The plain ways of doing things are section 1, patched over the shipped ones;
tests/test_bench.py shows that they compute the same. MFU counts what the method needs (plan.py): work that
is thrown away lowers it. Only `data` looks at images: the other batches are noise under real masks.

Expect three tables. Without a GPU they show that everything runs, and nothing else.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import config
import distributed as dist
import model
from config import UserError
from data import make_loader, sample_masks
from kernels import attention, prototypes
from optim import compute_schedules
from runfolder import environment
from scenes import Scenes
from sources import open_source
from tools import plan
from train import TrainState, train_step

ROOT = Path(__file__).parents[1]
MODELS, ABLATED = "vits14,vitb14,vitl14,vitl16_short,vitg14", "vitl16_short"
MEASURES = ("kernels", "compile", "16-bit stream", "packing", "drop-path subset", "fused losses")
WARM_UP = 3  # the first step compiles and makes the optimizer's moments, the second may compile again
# Dense 16-bit products of one chip in TFLOP/s, from the makers' data sheets; the first name found counts.
PEAK = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}


# ---------------------------------------------------------------- 1. the measures, and the plain ways without


def one_size_at_a_time(self, images, masks=None):
    """Without packing: the backbone runs once for the global crops and once for the local ones.

    Twice the launches, each over a smaller matrix; with FSDP every weight would also be gathered twice.
    """
    return [self(x, m) for x, m in zip(images, masks or [None] * len(images), strict=True)]


def drop_path_by_mask(x, groups, branch, rate):
    """Without the batch subset, as in most code: every image is computed, then the dropped ones times 0.

    The same random draws as model.drop_path, so the same images are dropped, and the same result is due.
    """
    gains = []
    for b, length in groups:
        k = max(int(b * (1 - rate)), 1)
        kept = torch.randperm(b, device=x.device)[:k]
        gain = x.new_zeros(b, 1).index_fill(0, kept, b / k)
        gains.append(gain.expand(b, length).reshape(-1, 1))  # (b * length, 1), one for each token
    return x + (branch(x, groups) * torch.cat(gains)).to(x.dtype)


@contextmanager
def without(measures, cfg):
    """The shipped code, with some of its measures replaced by the plain way."""
    plain = {
        "kernels": (attention, "CHOICE", "pytorch"),  # speed.kernels=pytorch: attention and losses
        "compile": (cfg.speed, "compile", "off"),
        # What flows from block to block is fp32 then, as autocast alone has it.
        "16-bit stream": (model, "to_autocast_dtype", lambda x: x),
        "packing": (model.VisionTransformer, "forward_crops", one_size_at_a_time),
        "drop-path subset": (model, "drop_path", drop_path_by_mask),
        # The losses alone: iBOT's targets and softmaxes, M x K, are written to memory in fp32.
        "fused losses": (prototypes, "fused", lambda logits: False),
    }
    with ExitStack() as stack:
        for name in measures:
            stack.enter_context(patch.object(*plain[name]))
        yield


# ---------------------------------------------------------------- 2. batches


def noise(cfg, device):
    """Micro-batches without end, as make_loader's: crops of noise, but masks and numbers as in training."""
    B, c = cfg.train.batch_size_per_gpu, cfg.crops

    def crops(n, size):
        return torch.randn(n * B, 3, size, size, device=device) if n else None

    for i in count():
        masks = sample_masks(cfg, i, range(2 * B), 2 * B)
        masks = {k: v if v is None else v.to(device) for k, v in masks.items()}
        samples = torch.arange(i * B, (i + 1) * B, device=device)
        yield dict(masks, samples=samples, bad=[], globals=crops(2, c.global_crops_size),
                   locals=crops(c.local_crops_number, c.local_crops_size))  # fmt: skip


def photographs(folder, number):
    """JPEG files of 500 x 375 and 100 KB, as ImageNet's: enlarged scenes, with grain for the decoder."""
    scenes, rng = Scenes(number, size=64), np.random.default_rng(0)
    for i in range(number):
        large = np.asarray(scenes[i][0].resize((500, 375), Image.BICUBIC))
        grain = large + rng.normal(0, 15, (375, 500, 1))
        Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{i}.jpg"), quality=90)


# ---------------------------------------------------------------- 3. one row


def timed_steps(t, cfg, batches, steps, warm_up):
    """-> of every step, warm-up too: seconds until its batch was there, seconds in all; loss and skipped."""
    device, times, seen = t.dino_center.center.device, [], []
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None  # until the device is done
    for step in range(warm_up + steps):
        if step == warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        settle()
        begin = time.perf_counter()
        batch = [next(batches) for _ in range(cfg.train.accumulate)]
        ready = time.perf_counter()
        metrics = train_step(t, batch, compute_schedules(cfg, step), cfg, False)
        settle()
        times.append((ready - begin, time.perf_counter() - begin))
        seen.append((metrics["loss"], metrics["skipped"]))
        t.step += 1
    return times, [(float(loss), float(skipped)) for loss, skipped in seen]  # read when all is over


def peak_tflops(name, dtype):
    """The peak of the chip, or 0 if it is not known, as for fp32."""
    return next((p for chip, p in PEAK.items() if chip in name and dtype != torch.float32), 0)


def report(t, cfg, times, seen, steps, tflops):
    """The numbers of a row, from what timed_steps saw. GB are 1e9 bytes, as plan.py's."""
    device, images = t.dino_center.center.device, cfg.train.batch_size_per_gpu * cfg.train.accumulate
    gpu, timed = device.type == "cuda", times[-steps:]
    tflops = tflops or (peak_tflops(torch.cuda.get_device_name(), t.dtype) if gpu else 0)
    shape, spent = plan.Shape(cfg), [whole - waited for waited, whole in timed]
    work, seconds = cfg.train.accumulate * sum(plan.flops(shape).values()), statistics.median(spent)
    planned = sum(plan.memory(shape, cfg, 1, t.dtype != torch.float32).values())
    heads = t.student.backbone.blocks[0].attn
    kernels, why = attention.backend(device, t.dtype, heads.proj.in_features // heads.num_heads)
    found = dict(batch=cfg.train.batch_size_per_gpu, dtype=str(t.dtype)[6:], kernels=kernels, kernels_why=why,
                 step_ms=1e3 * seconds, fastest_ms=1e3 * min(spent), slowest_ms=1e3 * max(spent),
                 first_step_s=times[0][1], images_per_second=images / seconds, tflop_per_step=work / 1e12,
                 mfu=work / seconds / (tflops * 1e12) if tflops else None, planned_gb=planned / 1e9,
                 peak_gb=torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
                 losses=[x if math.isfinite(x) else None for x, _ in seen],
                 skipped=sum(skipped for _, skipped in seen))  # fmt: skip
    return found | (dict(failed="a loss is not finite") if None in found["losses"] else {})


def data_wait(cfg, timed):
    """What the loop with the loader adds: images/s with the waiting in, and its share of the time."""
    waited, whole = (sum(column) for column in zip(*timed))
    images = len(timed) * cfg.train.batch_size_per_gpu * cfg.train.accumulate
    return dict(images_per_second=images / whole, wait_share=waited / whole, workers=cfg.train.num_workers)


def measure(row):
    """One row: {part, model, off, settings, steps, tflops} -> the numbers, or why there are none."""
    cfg, steps, warm_up = config.load(model=row["model"], overrides=row["settings"]), row["steps"], WARM_UP
    device = dist.setup(cfg.speed.device)
    torch.backends.cuda.matmul.allow_tf32 = True  # these three as train.py's main
    torch.manual_seed(cfg.train.seed)
    if cfg.speed.kernels != "auto":
        attention.CHOICE = cfg.speed.kernels
    with without(row["off"], cfg), tempfile.TemporaryDirectory() as folder:
        try:
            t, batches = TrainState(cfg, device), noise(cfg, device)
            if row["part"] == "data":
                photographs(folder, 32 if device.type == "cpu" else 256)
                batches = make_loader(cfg, open_source(f"folder:{folder}"), device)
                # Each worker has two batches ready when the first step is compiled: a full queue hides a
                # slow loader, so it is emptied before, and every worker's turn comes within, the clock.
                warm_up, steps = warm_up + 2 * cfg.train.num_workers, max(steps, 2 * cfg.train.num_workers)
            times, seen = timed_steps(t, cfg, batches, steps, warm_up)
            found = report(t, cfg, times, seen, steps, row["tflops"])
            return found | (data_wait(cfg, times[-steps:]) if row["part"] == "data" else {})
        except torch.OutOfMemoryError:
            return dict(failed="out of memory", batch=cfg.train.batch_size_per_gpu)


def isolated(row, seconds):
    """`measure` in a process of its own: it leaves no memory behind, and a crash costs this row alone."""
    command = [sys.executable, "-m", "tools.bench", "--row", json.dumps(row)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return dict(failed="not measured: out of time")
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        said = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return dict(failed=f"exit code {done.returncode}: {said[:120]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- 4. the report

COLUMNS = dict(  # of the three tables, named as in the JSON
    presets="batch images_per_second step_ms mfu peak_gb planned_gb planned_by_peak first_loss last_loss",
    ablation="images_per_second mfu peak_gb times_as_long times_the_memory",
    data="workers images_per_second wait_share",
)
FORMS = dict(batch="{}", workers="{}", images_per_second="{:.1f}", step_ms="{:.1f}", mfu="{:.1%}",
             peak_gb="{:.1f}", planned_gb="{:.1f}", wait_share="{:.1%}")  # fmt: skip


def derived(row, on):
    """The row with what its table says besides; `on` is the row of the same model with everything on."""
    off, losses = row["off"], row.get("losses", [None])
    what = f"without {off[0]}" if off else "everything on"
    what = "without all: plain eager PyTorch" if len(off) > 1 else what
    name = row["model"] + (f", {what}" if row["part"] == "ablation" else "")
    ratio = lambda a, b: a / b if a is not None and b else None  # noqa: E731
    return row | dict(name=name, first_loss=losses[0], last_loss=losses[-1],
                      planned_by_peak=ratio(row.get("planned_gb"), row.get("peak_gb")),
                      times_as_long=ratio(row.get("step_ms"), on.get("step_ms")),
                      times_the_memory=ratio(row.get("peak_gb"), on.get("peak_gb")))  # fmt: skip


def markdown(found):
    """The tables, from the rows of one run. "-" is what is not known; a row that failed says why."""
    e, rows = found["environment"], found["rows"]
    lines = [f"{(e['gpus'] or ['no GPU'])[0]}, torch {e['torch']}, commit {e['git_commit'][:10]}"]
    on = {r["model"]: r for r in rows if r["part"] == "ablation" and not r["off"]}
    for part, columns in COLUMNS.items():
        columns, mine = columns.split(), [r for r in rows if r["part"] == part]
        if mine:
            head = f"| {part} | {' | '.join(columns)} |".replace("_", " ")
            lines += ["", head, "|---" + "|--:" * len(columns) + "|"]
        for r in (derived(r, on.get(r["model"], {})) for r in mine):
            cells = ["-" if r.get(c) is None else FORMS.get(c, "{:.2f}").format(r[c]) for c in columns]
            cells = [r["failed"]] + ["-"] * (len(columns) - 1) if "failed" in r else cells
            lines += [f"| {r['name']} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def wanted(args, settings, tflops):
    """The rows to be measured, in the order of their value."""
    rows = [("presets", name, ()) for name in args.models.split(",")]
    rows += [("ablation", args.ablate, off) for off in ((), MEASURES, *((name,) for name in MEASURES))]
    rows += [("data", args.ablate, ())]
    given = dict(settings=settings, steps=args.steps, tflops=tflops)
    return [dict(part=p, model=m, off=list(off), **given) for p, m, off in rows if args.only in (None, p)]


def earlier(path, here):
    """For --resume: the rows of `path` that were measured, if this commit and this GPU measured them."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    for key in ("git_commit", "gpus", "torch"):
        if found["environment"][key] != here[key]:
            raise UserError(f"{path} was measured with another {key}: leave out --resume to measure it anew")
    return [row for row in found["rows"] if "failed" not in row]


def arguments(argv, dry):
    """-> arguments, settings, the peak of the chip or 0."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", choices=("presets", "ablation", "data"), help="one part")
    parser.add_argument("--models", default="debug" if dry else MODELS, help="of presets: names with commas")
    parser.add_argument("--ablate", default="debug" if dry else ABLATED, help="of ablation and data")
    parser.add_argument("--steps", type=int, default=2 if dry else 10, help="timed steps of a row")
    parser.add_argument("--minutes", type=float, default=9, help="rows beyond are listed as not measured")
    parser.add_argument("--out", default="" if dry else ROOT / "results" / "bench.json", help="the JSON file")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file holds")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of train.py; tflops=")
    args = parser.parse_intermixed_args(argv)
    settings = [text for text in args.overrides if not text.startswith("tflops=")]
    tflops = [text.removeprefix("tflops=") for text in args.overrides if text.startswith("tflops=")] or ["0"]
    if not tflops[-1].replace(".", "", 1).isdigit() or args.steps < 1:
        raise UserError(f"tflops is {tflops[-1]!r} and --steps {args.steps}: both must be numbers above 0")
    return args, settings, float(tflops[-1])


def main(argv=None):
    dry = not torch.cuda.is_available()
    args, settings, tflops = arguments(argv, dry)
    if args.row:
        return print(json.dumps(measure(json.loads(args.row))))
    rows, end = wanted(args, settings, tflops), time.monotonic() + 60 * args.minutes
    here = environment() | dict(command=" ".join(["python bench.py", *sys.argv[1:]]))
    here["git_diff"] = "some" if here["git_diff"] else "none"
    for row in rows:
        config.load(model=row["model"], overrides=settings)  # a mistake is told now, and once
    if dry:
        print("No GPU here: a miniature of the bench. Its numbers say nothing about a GPU.\n")
    out = Path(args.out) if args.out else None
    found = dict(environment=here, rows=earlier(out, here) if args.resume and out else [])
    for row in rows:
        if any(row.items() <= r.items() for r in found["rows"]):
            continue
        left, result = end - time.monotonic(), dict(failed="not measured: out of time")
        if left > 0:
            result = measure(row) if dry else isolated(row, left)
        found["rows"].append(row | result)
        print(json.dumps(found["rows"][-1]), flush=True)
        if out:
            out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n" + markdown(found))
    if out:
        out.with_suffix(".md").write_text(markdown(found))


if __name__ == "__main__":
    config.run(main)
