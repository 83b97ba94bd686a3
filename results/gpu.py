"""A quarter of an hour on a GPU: what should be measured first, in the order of its value.

    python results/gpu.py --budget 540 --out runs/gpu --cifar cifar10_jpeg.tar.xz --commit HASH
    python results/gpu.py --budget 300 --out runs/gpu-2 --done runs/gpu/gpu.jsonl    # what was left out
    python results/gpu.py --write results/gpu/*.jsonl                                # into the documents

Each part has an estimate and a limit in seconds, and starts only if its estimate fits into what is left of
the budget. It is a process of its own: one that raises, hangs or takes the GPU down costs one part. Each
number is a line of JSON in OUT/gpu.jsonl as soon as it is there; everything that is printed is in
OUT/gpu.log, and the trace of a step in OUT/gpu.tar.gz. `--only` and `--skip` take names of parts, or their
first words: "step", "without", "memory".

Every headline number was predicted before it could be measured (PREDICTIONS), most of them from a roofline,
and is printed beside its prediction. A prediction that fails teaches more than one that holds, so they stay
as they were written. The parent imports everything once and never touches CUDA, because a process that has
done so cannot fork.

Expect a short table at the end. Without a GPU all of it runs in miniature, and its numbers mean nothing.
"""

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from contextlib import suppress  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

ROOT = Path(__file__).parents[1]
CACHE = Path(tempfile.gettempdir(), "nanodino-gpu")  # parts share what they have compiled
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import config  # noqa: E402
import distributed as dist  # noqa: E402
import train  # noqa: E402
from config import Positive, UserError, argument  # noqa: E402
from optim import compute_schedules  # noqa: E402
from runfolder import StepProfile  # noqa: E402
from tools import bench, bench_kernels  # noqa: E402
from tools.bench_kernels import DRY, machine_line, row_writer  # noqa: E402
from tools.isolation import run_isolated  # noqa: E402

PRESET = "debug" if DRY else "vitl16_short"
SETTINGS = ["train.batch_size_per_gpu=2", "train.num_workers=0"] if DRY else []
STEPS = 1 if DRY else 10
# Off in a plain stand-in of the published step, which packs crops and drops images from the computation too.
PUBLISHED = ("kernels", "compile", "16-bit stream", "fused losses")
MAX_FILE_BYTES = 15 * 2**20  # bytes of each file in OUT


# ---------------------------------------------------------------- what we expect


class Prediction(NamedTuple):
    """A number that was expected before it was measured, and why."""

    where: str  # a part, and after a slash its row
    key: str  # a number of that row; dots lead into a dict
    form: str
    h100: float
    h200: float
    why: str


PREDICTIONS = {
    "bf16 product of 8192, TFLOP/s": Prediction(
        "ceilings", "tflops", "{:.0f}", 780, 780, "four fifths of 989: random data lower the clock"),
    "copy, TB/s": Prediction(
        "ceilings", "tb_per_s", "{:.2f}", 3.0, 4.3, "nine tenths of the data sheets' 3.35 and 4.8"),
    "attention, 16 bit, worst error in eps": Prediction(
        "correct", "worst_error_in_eps", "{:.2f}", 2.0, 2.0,
        "fp32 sums; P and dS are rounded once before their product"),
    "iBOT loss, share of the allowed 1e-4": Prediction(
        "correct/losses", "shares_of_allowed_error.loss", "{:.3f}", 0.05, 0.05, "fp32 sums over 131,072"),
    "ViT-L/16 step, images/s": Prediction(
        "step on", "images_per_second", "{:.0f}", 365, 405,
        "74 TFLOP at 600 are 123 ms; norms, GELU, residuals in 16 bit 40 (28), the rest 12 (8)"),
    "the same, all measures off, images/s": Prediction(
        "step off", "images_per_second", "{:.0f}", 165, 190,
        "eager 275 ms, and a third more work without the drop-path subset"),
    "the same, a stand-in of the published step, images/s": Prediction(
        "step published", "images_per_second", "{:.0f}", 225, 250, "roofline of eager PyTorch: 215 to 255"),
    "ViT-L multi-crop, forward, ms": Prediction(
        "attention/ViT-L multi-crop", "forward_ms.ours", "{:.3f}", 0.215, 0.195,
        "0.130 at 261 tokens by issue slots; 54 tokens are bound by memory: 0.085 (0.065)"),
    "ViT-L multi-crop, forward + backward, ms": Prediction(
        "attention/ViT-L multi-crop", "both_ms.ours", "{:.3f}", 0.83, 0.755,
        "backward 0.430 at 261, 0.180 (0.130) at 54"),
    "ViT-L multi-crop, best peer / ours, forward": Prediction(
        "attention/ViT-L multi-crop", "ratio_forward", "{:.2f}", 1.7, 1.6,
        "tiles of 128 are half empty at 261, five sixths at 54; and the peer's copy of the output"),
    "ViT-L multi-crop, best peer / ours, both": Prediction(
        "attention/ViT-L multi-crop", "ratio_both", "{:.2f}", 1.6, 1.5,
        "the same, and copies of the gradient"),
    "teacher forward, ms": Prediction("profile", "parts_ms.teacher forward", "{:.1f}", 33, 31, "15.8 TFLOP"),
    "student forward, ms": Prediction("profile", "parts_ms.student forward", "{:.1f}", 44, 40, "19.2 TFLOP"),
    "backward, ms": Prediction("profile", "parts_ms.backward", "{:.1f}", 90, 80, "38.7 TFLOP"),
    "losses, ms": Prediction(
        "profile", "parts_ms.losses", "{:.1f}", 3, 2.5, "forward: one pass over 2 x 0.5 GB; [CLS] in fp32"),
    "optimizer, ms": Prediction("profile", "parts_ms.optimizer", "{:.1f}", 3.5, 2.5, "327 M x 28 bytes"),
    "EMA, ms": Prediction("profile", "parts_ms.EMA", "{:.1f}", 1.5, 1.1, "327 M x 12 bytes"),
    "without kernels, times as long": Prediction(
        "without kernels", "times_as_long", "{:.2f}", 1.10, 1.10, "attention 12 ms more, losses 6"),
    "without compile, times as long": Prediction(
        "without compile", "times_as_long", "{:.2f}", 1.40, 1.35, "40 passes over the stream for 14"),
    "without 16-bit stream, times as long": Prediction(
        "without 16-bit stream", "times_as_long", "{:.2f}", 1.18, 1.13,
        "twice the bytes of the largest tensors"),
    "without packing, times as long": Prediction(
        "without packing", "times_as_long", "{:.2f}", 1.04, 1.04, "smaller products for the local crops"),
    "without drop-path subset, times as long": Prediction(
        "without drop-path subset", "times_as_long", "{:.2f}", 1.33, 1.33, "the student's work / 0.7"),
    "without fused losses, times as long": Prediction(
        "without fused losses", "times_as_long", "{:.2f}", 1.04, 1.03, "18 GB more are moved"),
    "iBOT loss, ours, ms": Prediction(
        "prototypes/iBOT loss", "ms.ours", "{:.2f}", 2.3, 1.6,
        "6.4 GB: two reads, then two reads and a write"),
    "iBOT loss, eager / ours": Prediction(
        "prototypes/iBOT loss", "ratio.eager", "{:.1f}", 7, 7, "48 GB, in fp32"),
    "Sinkhorn-Knopp, ours, ms": Prediction(
        "prototypes/Sinkhorn-Knopp", "ms.ours", "{:.2f}", 2.8, 2.0, "six reads of 1.3 GB"),
    "Sinkhorn-Knopp, eager / ours": Prediction(
        "prototypes/Sinkhorn-Knopp", "ratio.eager", "{:.1f}", 12, 12, "104 GB, in fp32"),
    "ViT-S/14, batch 128, images/s": Prediction(
        "memory vits14", "images_per_second", "{:.0f}", 1900, 2200,
        "30 % of the peak: narrow, so bound by memory"),
    "ViT-B/14, batch 64, images/s": Prediction(
        "memory vitb14", "images_per_second", "{:.0f}", 720, 800, "37 %"),
    "ViT-L/14, batch 32, images/s": Prediction(
        "memory vitl14", "images_per_second", "{:.0f}", 285, 310, "41 %"),
    "ViT-g/14, batch 12, images/s": Prediction(
        "memory vitg14", "images_per_second", "{:.0f}", 70, 76, "37 %: 17 ms of 170 are optimizer and EMA"),
    "ViT-L/14, peak memory / tools/plan.py's": Prediction(
        "memory vitl14", "peak_by_plan", "{:.2f}", 1.10, 1.10, "the allocator's tenth"),
    "1374 tokens, forward, TFLOP/s": Prediction(
        "1374/ViT-L 518 px, 1374, batch 128", "tflops_forward", "{:.0f}", 345, 345,
        "Triton's tutorial at these lengths: 382 to 396, 0.95 of each tile used"),
    "1374 tokens, best peer / ours, both": Prediction(
        "1374/ViT-L 518 px, 1374, batch 128", "ratio_both", "{:.2f}", 0.90, 0.90,
        "seven products for five, against cuDNN, which pays for a copy of the gradient"),
    "1k tokens, best peer / ours, forward": Prediction(
        "1374/1k", "ratio_forward", "{:.2f}", 1.0, 1.0,
        "published, TFLOP/s: Triton's tutorial 382, cuDNN 373, FlashAttention-3 392"),
    "CIFAR-10 in 150 s, k-NN top-1": Prediction(
        "cifar10", "knn_top1", "{:.3f}", 0.70, 0.70,
        "12 cores cut 12,000 images/s: 30 passes; 0.85 is the goal of ten minutes"),
    "fastest tile at 1374 / the shipped one": Prediction(
        "tiles", "best_by_shipped", "{:.2f}", 0.97, 0.97, "the sizes were chosen by instruction counts"),
}  # fmt: skip

# ---------------------------------------------------------------- the parts
# Functions of write_row(part, **row), each in a fresh process. They may raise.


def measure_ceilings(write_row):
    """What this card can do at best: the denominators of everything else."""
    n, size = (64, 2**16) if DRY else (8192, 2**30)
    a = torch.randn(n, n, device=bench_kernels.DEVICE).bfloat16()
    b = torch.randn(n, n, device=bench_kernels.DEVICE).bfloat16()
    source = torch.randn(size // 2, device=bench_kernels.DEVICE)  # 2 GB are read and 2 written
    target = torch.empty_like(source)
    product, _ = bench_kernels.time_calls([partial(torch.mm, a, b)])
    copy, _ = bench_kernels.time_calls([partial(target.copy_, source)])
    write_row("ceilings", tflops=2 * n**3 / product / 1e12, tb_per_s=8 * len(source) / copy / 1e12)


def measure_step(part, off, write_row, preset=PRESET):
    """Train steps on noise under real masks: a row of tools/bench.py, without the optimisations in `off`."""
    row = dict(part="ablation", model=preset, off=list(off), settings=SETTINGS, steps=STEPS, tflops=0.0)
    numbers = bench.measure_row(row)
    if numbers.get("peak_gb"):
        numbers["peak_by_plan"] = numbers["peak_gb"] / numbers["planned_gb"]
    write_row(part, model=preset, off=list(off), **numbers)
    if "failed" in numbers:
        raise RuntimeError(numbers["failed"])


def profile_step(folder, write_row):
    """Where a step goes: its sections by marks in the GPU's queue, its kernels, and a trace in `folder`."""
    cfg = config.load(model=PRESET, overrides=SETTINGS)
    device = dist.setup(cfg.speed.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    state = train.TrainState(cfg, device)
    batch = [next(bench.noise_batches(cfg, device))]
    step_profile = StepProfile(folder, device)
    for number in range(StepProfile.WARM_UP + StepProfile.TIMED):
        if number == StepProfile.WARM_UP:
            step_profile.begin()
        train.train_step(state, batch, compute_schedules(cfg, state.step), cfg)
        state.step += 1
    sections, whole = step_profile.end()
    with torch.profiler.profile() as trace:
        train.train_step(state, batch, compute_schedules(cfg, state.step), cfg)
        if device.type == "cuda":
            torch.cuda.synchronize()
    kernels = slowest_kernels(trace, device.type)
    write_row("profile", step_ms=whole, parts_ms=sections, kernels=kernels[:25], kernels_in_all=len(kernels),
              kernel_ms=sum(ms for _, _, ms in kernels))  # fmt: skip
    trace.export_chrome_trace(str(folder / "step.json.gz"))


def slowest_kernels(trace, device):
    """-> [name, how often, milliseconds] of every kernel (without a GPU: operator), the slowest first."""
    kernels = []
    for event in trace.key_averages():
        if device == "cuda":
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            counts = on_device and not event.is_user_annotation
            spent = event.self_device_time_total  # microseconds
        else:
            counts = True
            spent = event.self_cpu_time_total
        if counts and spent:
            kernels.append((event.key[:100], event.count, spent / 1e3))
    return sorted(kernels, key=lambda kernel: -kernel[2])


def train_cifar10(source, write_row):
    """150 seconds of training on photographs, and the k-NN accuracy of the features."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = cifar_folder(source, Path(temporary))
        run = Path(temporary, "run")
        sets = [f"train.dataset_path=folder:{folder}/train", f"evaluation.train_path=folder:{folder}/train",
                f"evaluation.test_path=folder:{folder}/test"]  # fmt: skip
        length = ["--model", "cifar10_gpu", "--max-minutes", "2.5"]
        if DRY:
            length = ["--model", "debug", "optim.epochs=0.5", "optim.warmup_epochs=0.25",
                      "optim.freeze_last_layer_epochs=0", "evaluation.eval_period_iterations=0",
                      "evaluation.knn_k=2"]  # fmt: skip
        train.main([*length, "--output-dir", str(run), *sets])
        result = json.loads((run / "result.json").read_text())
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        write_row("cifar10", **result, last_metrics=json.loads(metrics[-1]))


def cifar_folder(source, temporary):
    """-> the folder that holds train/ and test/, unpacked if it is an archive. Dry: a few drawings."""
    if DRY:
        for seed, name in enumerate(("train/a", "train/b", "test/a", "test/b")):
            (temporary / name).mkdir(parents=True)
            bench.write_jpegs(temporary / name, 8, seed)
        return temporary
    if Path(source).is_dir():
        root = Path(source)
    else:
        root = temporary / "images"
        with tarfile.open(source) as archive:
            archive.extractall(root, filter="data")
    found = [path.parent for path in (root / "train", *root.glob("*/train")) if path.is_dir()]
    if not found:
        raise UserError(f"{source} holds no folder train/")
    return found[0]


class Part(NamedTuple):
    """Something to measure."""

    run: Callable  # function of write_row(part, **row)
    estimate: float  # seconds
    limit: float  # seconds after which it is stopped


def all_parts(extras, cifar=""):
    """Every part, the most valuable first. Estimates are guesses for an H100 with nothing compiled before."""
    published = [name for name in PUBLISHED if name in bench.OPTIMIZATIONS]
    parts = {
        "ceilings": Part(measure_ceilings, 10, 60),
        "correct": Part(bench_kernels.run_correct, 65, 180),
        "step on": Part(partial(measure_step, "step on", ()), 60, 180),
        "step off": Part(partial(measure_step, "step off", bench.OPTIMIZATIONS), 25, 90),
        "step published": Part(partial(measure_step, "step published", published), 25, 90),
        "attention": Part(partial(bench_kernels.run_attention, cases=bench_kernels.MULTI_CROP), 70, 240),
        "profile": Part(partial(profile_step, extras), 40, 120),
    }
    for name in bench.OPTIMIZATIONS:
        parts[f"without {name}"] = Part(partial(measure_step, f"without {name}", (name,)), 40, 120)
    parts["prototypes"] = Part(bench_kernels.run_prototypes, 40, 120)
    for name, estimate in (("vits14", 35), ("vitb14", 40), ("vitl14", 45), ("vitg14", 75)):
        run = partial(measure_step, f"memory {name}", (), preset="debug" if DRY else name)
        parts[f"memory {name}"] = Part(run, estimate, 150)
    long_attention = partial(bench_kernels.run_attention, cases=bench_kernels.LONG, part="1374")
    parts["1374"] = Part(long_attention, 90, 300)
    parts["cifar10"] = Part(partial(train_cifar10, cifar), 200, 280)
    parts["tiles"] = Part(bench_kernels.run_tiles, 60, 200)
    return parts


# ---------------------------------------------------------------- running them


def with_output_in(log, function):
    """Call it with all output, that of its children too, appended to the file `log`."""
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(target, number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    function()


def run_parts(parts, rows, log, deadline, done=()):
    """One after the other -> {name: why it is missing}. Rows go to the file `rows`, the rest to `log`."""
    missing = {}
    write_row = row_writer(rows, aloud=False)
    for name, part in parts.items():
        left = deadline - time.monotonic()
        if part.estimate > left:
            missing[name] = "out of time"
            continue
        function = partial(with_output_in, log, partial(part.run, row_writer(rows)))
        outcome = run_isolated({name: function}, limit=min(part.limit, left), own_group=True)[name]
        if outcome.failure:
            missing[name] = outcome.failure
            write_row(name, failed=outcome.failure, seconds=outcome.seconds)
        else:
            write_row(name, finished=True, seconds=outcome.seconds, estimate=part.estimate)
        print(f"{name:28s}{outcome.seconds:6.1f} s   {outcome.failure}", flush=True)
        use_measured_limits([*done, *read_rows([rows])])
    return missing


def use_measured_limits(rows):
    """The floors of later parts are those that were measured on this card."""
    for row in rows:
        if "tb_per_s" in row and card_name(row["machine"]) == card_name(rows[-1]["machine"]):
            limits = dict(flops=row["tflops"] * 1e12, bytes=row["tb_per_s"] * 1e12)
            bench_kernels.MEASURED_LIMITS.update(limits)


def read_rows(files):
    """Rows of several files, each with the row of its machine under "machine"."""
    rows = []
    for file in files:
        machine = {}
        for row in bench_kernels.read_rows(file):
            if "gpus" in row:
                machine = row
            rows.append(row | dict(machine=machine))
    return rows


def select_parts(parts, only, skip, done):
    """Parts by their names, or first words, without those that `done` has finished."""

    def named(name, words):
        return any(name == word or name.startswith(word + " ") for word in words)

    for word in (*only, *skip):
        if not any(named(name, [word]) for name in parts):
            raise UserError(f"there is no part {word}: take {', '.join(parts)}")
    finished = {row["part"] for row in done if row.get("finished")}
    selected = {}
    for name, part in parts.items():
        asked_for = not only or named(name, only)
        if asked_for and not named(name, skip) and name not in finished:
            selected[name] = part
    return selected


def pack(folder, archive):
    """Put the extras into one file, without those that would make it too large."""
    if not any(folder.iterdir()):
        return
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_size):
            if archive.stat().st_size + path.stat().st_size < MAX_FILE_BYTES:
                tar.add(path, path.name)


def shorten(file):
    """Keep the end of a log that has become too long."""
    if file.exists() and file.stat().st_size > MAX_FILE_BYTES:
        file.write_bytes(file.read_bytes()[-MAX_FILE_BYTES:])


# ---------------------------------------------------------------- predicted and measured


def card_name(machine):
    """H100, H200, or the full name of the card."""
    gpus = machine.get("gpus")
    name = gpus[0] if gpus else "no GPU"
    return next((short for short in ("H200", "H100") if short in name), name)


def rows_of_card(rows, card):
    return [row for row in rows if card_name(row["machine"]) == card]


def with_derived(rows):
    """The rows of one card, steps with their times_as_long, and the numbers that follow from several rows."""
    steps = [row["step_ms"] for row in rows if row["part"] == "step on" and "step_ms" in row]
    errors = [row["worst_error_in_eps"] for row in rows if "worst_error_in_eps" in row]
    tiles = [row for row in rows if row["part"] == "tiles" and "both_ms" in row]
    shipped = [row["both_ms"] for row in tiles if row["shipped"]]
    derived = []
    for row in rows:
        if steps and "step_ms" in row:
            row = row | dict(times_as_long=row["step_ms"] / steps[-1])
        derived.append(row)
    if errors:
        derived.append(dict(part="correct", worst_error_in_eps=max(errors)))
    if shipped:
        fastest = min(row["both_ms"] for row in tiles)
        derived.append(dict(part="tiles", best_by_shipped=fastest / min(shipped)))
    return derived


def measured_value(prediction, rows):
    """The number that a prediction is about, the newest if there are several; or None."""
    part, _, name = prediction.where.partition("/")
    for row in reversed(rows):
        if row["part"] == part and row.get("row", "") == name and "failed" not in row:
            value = row
            for key in prediction.key.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                return value
    return None


def current_predictions():
    """Those whose part exists: an optimisation that tools/bench.py has dropped needs none."""
    parts = all_parts(None)
    return {name: p for name, p in PREDICTIONS.items() if p.where.partition("/")[0] in parts}


def summary(rows, missing):
    """The short table: predicted, measured, and what is missing."""
    card = card_name(rows[-1]["machine"]) if rows else "no GPU"
    predicted_card = "H200" if card == "H200" else "H100"
    rows = rows_of_card(rows, card)
    lines = [*machine_lines(rows), ""]
    lines.append(f"| what | predicted for {predicted_card} | measured | |")
    lines.append("|---|--:|--:|--:|")
    rows = with_derived(rows)
    for name, prediction in current_predictions().items():
        predicted = prediction.h200 if card == "H200" else prediction.h100
        value = measured_value(prediction, rows)
        measured = "not measured"
        ratio = ""
        if value is not None:
            measured = prediction.form.format(value)
            ratio = f"x {value / predicted:.2f}"
        lines.append(f"| {name} | {prediction.form.format(predicted)} | {measured} | {ratio} |")
    lines += ["", *(f"{name}: not measured: {reason[:120]}" for name, reason in missing.items())]
    if DRY:
        lines.append("No GPU here: this was a miniature, and its numbers mean nothing.")
    return "\n".join(lines)


# ---------------------------------------------------------------- into the documents


def newest_rows(rows):
    """The last number of each row on each kind of card; what failed is left out."""
    newest = {}
    for row in rows:
        if "failed" not in row and "finished" not in row and "gpus" not in row:
            newest[card_name(row["machine"]), row["part"], row.get("row")] = row
    return list(newest.values())


def machine_lines(rows):
    """One line for each machine that a table comes from."""
    return list(dict.fromkeys(machine_line(row["machine"]) + "." for row in rows if row["machine"]))


def log_text(rows):
    """LOG.md: predicted beside measured, for each kind of card."""
    cards = list(dict.fromkeys(["H100", "H200"] + [card_name(row["machine"]) for row in rows]))
    rows_by_card = {card: with_derived(rows_of_card(rows, card)) for card in cards}
    head = [f"{card}: predicted | measured" for card in cards]
    lines = [f"| what | {' | '.join(head)} | why |", "|---" + "|--:" * 2 * len(cards) + "|---|"]
    for name, prediction in current_predictions().items():
        predicted = dict(H100=prediction.h100, H200=prediction.h200)
        cells = [name]
        for card in cards:
            cells.append(format_cell(prediction.form, predicted.get(card)))
            cells.append(format_cell(prediction.form, measured_value(prediction, rows_by_card[card])))
        lines.append(f"| {' | '.join(cells)} | {prediction.why} |")
    return "\n".join([*(machine_lines(rows) or ["Not measured."]), "", *lines])


def kernel_text(rows):
    """kernels/README.md: the tables of attention and of the losses, for each card."""
    texts = []
    for card in dict.fromkeys(card_name(row["machine"]) for row in rows):
        here = rows_of_card(rows, card)
        tables = bench_kernels.kernel_tables(here).strip()
        if tables:
            texts += [*machine_lines(here), "", tables, ""]
    return "\n".join(texts).strip() or "On a GPU: **not measured** yet."


def readme_text(rows):
    """README.md: how fast each model trains."""
    steps = [row for row in rows if row["part"] == "step on" or row["part"].startswith("memory")]
    if not steps:
        return "How fast a GPU really trains is not measured yet."
    lines = ["| one GPU | preset | images per step | images/s | MFU | peak memory, GB |"]
    lines.append("|---|---" + "|--:" * 4 + "|")
    for row in steps:
        rate = format_cell("{:.0f}", row["images_per_second"])
        mfu = format_cell("{:.0%}", row["mfu"])
        peak = format_cell("{:.0f}", row["peak_gb"])
        card = card_name(row["machine"])
        lines.append(f"| {card} | {row['model']} | {row['batch']} | {rate} | {mfu} | {peak} |")
    return "\n".join(
        ["How fast a GPU trains, on noise under real masks:", "", *lines, "", *machine_lines(steps)]
    )


def format_cell(form, value):
    """A number for a table, empty if there is none."""
    return "" if value is None else form.format(value)


DOCUMENTS = {"LOG.md": log_text, "README.md": readme_text, "kernels/README.md": kernel_text}
MARKS = re.compile(r"(<!-- gpu: \w+ -->\n).*?(<!-- end gpu -->)", re.S)


def updated_documents(files):
    """-> {path: its text with the tables of these files between the marks}."""
    for file in files:
        if not Path(file).exists() and "*" not in str(file):
            raise UserError(f"there is no {file}")
    rows = newest_rows(read_rows(files))
    if any(row["machine"].get("dry") for row in rows):
        raise UserError("these are numbers of a dry run: they are not for documents")
    texts = {}
    for name, make_text in DOCUMENTS.items():
        text = (ROOT / name).read_text()
        if len(MARKS.findall(text)) != 1:
            raise UserError(f"{name} needs one pair of marks <!-- gpu: ... --> and <!-- end gpu -->")
        before, begin_mark, end_mark, after = MARKS.split(text)
        texts[ROOT / name] = before + begin_mark + make_text(rows) + "\n" + end_mark + after
    return texts


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=argument(Positive), default=540, help="seconds in all")
    add("--out", default="runs/gpu", help="the folder of gpu.jsonl, gpu.log and gpu.tar.gz")
    add("--only", default="", help="parts, with commas")
    add("--skip", default="", help="parts, with commas")
    add("--done", default="", help="rows of an earlier call (default: those in --out): no part is run twice")
    add("--cifar", default="", help="CIFAR-10 as a folder of train/CLASS/*.jpg and test/, or as a .tar.xz")
    add("--commit", default="", help="the commit that is measured, where there is no git to ask")
    add("--write", nargs="*", metavar="FILE", help="put the rows of these files into the documents")
    return parser.parse_args(argv)


def split_words(text):
    return [word for word in text.split(",") if word]


def main(argv=None):
    args = parse_args(argv)
    if args.write is not None:
        for path, text in updated_documents(args.write).items():
            path.write_text(text)
        return 0
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = out / "gpu.jsonl"
    log = out / "gpu.log"
    extras = Path(tempfile.mkdtemp())
    done = read_rows([args.done or rows])
    parts = select_parts(all_parts(extras, args.cifar), split_words(args.only), split_words(args.skip), done)
    finished = list(dict.fromkeys(row["part"] for row in done if row.get("finished")))
    if parts.keys() != all_parts(None).keys() and done:
        print("done before: " + ", ".join(finished))
    missing = {}
    if not (args.cifar or DRY) and parts.pop("cifar10", None):
        missing["cifar10"] = "it needs --cifar"
    machine = {"machine": Part(partial(bench_kernels.write_machine, commit=args.commit), 0, 60)}
    deadline = BEGAN + args.budget
    missing |= run_parts(machine, rows, log, deadline)
    if not DRY and any(row.get("gpus") == [] for row in read_rows([rows])):
        raise UserError(f"nvidia-smi sees a GPU, PyTorch does not: {log} may say why")
    missing |= run_parts(parts, rows, log, deadline, done)
    with suppress(OSError, tarfile.TarError):  # nothing may keep the table from being printed
        pack(extras, out / "gpu.tar.gz")
        shorten(log)
    shutil.rmtree(extras, ignore_errors=True)
    earlier = done if args.done else []
    print("\n" + summary(earlier + read_rows([rows]), missing), flush=True)
    return 0 if all(reason == "out of time" for reason in missing.values()) else 1


if __name__ == "__main__":
    config.run(main)
