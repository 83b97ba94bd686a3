"""DINOv2 pre-training: a student learns to say of its crops what a slowly moving copy of itself says of the
whole image.

    python train.py                                          # five minutes on two CPU cores, data included
    python train.py --model vits14 train.dataset_path=folder:/data/images
    torchrun --nproc-per-node 8 train.py --model vitg14 train.dataset_path='tar:/data/{000..999}.tar'

What is unusual here: the method is `train_step`, one screen, and nothing around it touches the mathematics;
the parity test against the authors' code calls this very function, and so do the labs. Sample i and its crops
are a pure function of (seed, i), masks of (seed, step), schedules of the step: resuming needs no random state
and repeats nothing.

Expect a run folder runs/<name>/ (config.yaml, metrics.jsonl, teacher.pth, result.json, pca.png) and a table
of results.
"""

import argparse
import json
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import record_function
from tqdm import tqdm

import checkpoint
import config
import distributed as dist
from config import UserError
from data import make_loader, open_source
from eval_knn import Judge, table
from kernels import attention, prototypes
from kernels.prototypes import SoftTargets
from losses import Centering, collapse, diagnose, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from model import DINOv2, describe, init_weights, start_from
from optim import Deadline, clip_gradients, make_optimizer, schedule, set_rates, total_steps, update_teacher
from runfolder import RunFolder

# ==========================================================================================================
# THE METHOD. Put your hands here.
# ==========================================================================================================


class Trainee:
    """Student, teacher, centres, optimizer: what a step reads and writes, and what a checkpoint holds.

    `ema` is the slow copy of the student, and what the run is for. It is the teacher, except in distillation
    (DINOv2 section 5), where a larger model from another run teaches and never changes.
    """

    def __init__(self, cfg, device="cpu"):
        self.dtype = compute_dtype(cfg, device)
        with torch.device("meta"):  # no memory and no numbers, until each rank knows its part
            self.student = DINOv2(cfg, cfg.student.drop_path_rate).train()
            self.ema = DINOv2(cfg).eval().requires_grad_(False)
        if cfg.train.distill_from or not cfg.ibot.mask_sample_probability:  # a mask token without gradient
            self.student.backbone.mask_token.requires_grad_(False)
        dist.lighten(self.student.backbone.blocks, device, cfg.speed.compile, cfg.speed.checkpointing)
        dist.lighten(self.ema.backbone.blocks, device, cfg.speed.compile)
        for model in (self.student, self.ema):
            dist.shard(model, torch.device(device), self.dtype)
        init_weights(self.student, cfg.student.init_std, cfg.train.seed)
        self.origin = start_from(self.student, cfg.train.init_from)[0] if cfg.train.init_from else ""
        self.ema.load_state_dict(self.student.state_dict())  # an exact copy, in memory of its own
        self.teacher = frozen_teacher(cfg, device, self.dtype) if cfg.train.distill_from else self.ema
        self.dino_center = Centering(cfg.dino.head_n_prototypes).to(device)
        own_head = hasattr(self.student, "ibot_head")
        K = cfg.ibot.head_n_prototypes if own_head else cfg.dino.head_n_prototypes
        self.ibot_center = Centering(K).to(device)
        self.optimizer = make_optimizer(self.student, cfg)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=self.dtype == torch.float16)
        self.step = 0


PARTS = {}  # filled while --profile measures where a step goes (stopwatch.py)


@contextmanager
def part(name):
    """A named stretch of a step: in every trace, and in the table of --profile."""
    with record_function(name):
        begin = PARTS and PARTS["moment"]()
        yield
        if begin:
            PARTS["times"].setdefault(name, []).append((begin, PARTS["moment"]()))


class Logits(NamedTuple):
    """Scores of the K prototypes, for teacher (turned into targets) or student."""

    globals: torch.Tensor  # (2, B, K) [CLS] of the global crops, in their natural order
    locals: torch.Tensor | None  # (L, B, K) [CLS] of the local crops (student only)
    patches: torch.Tensor | SoftTargets  # (M, K) the masked patches
    features: torch.Tensor  # (2, B, D) [CLS] of the global crops before the head


def train_step(t, batch, now, cfg, look=False):
    """One optimizer step over a list of micro-batches (gradient accumulation) -> {name: scalar tensor}.

    `t` a Trainee, `now` the schedules of this step, `look` adds the instruments. The loss_* entries are the
    weighted terms that are optimised: they sum to `loss`. If anything is not finite, nothing moves: "skipped"
    is 1.
    """
    set_rates(t.optimizer, now)
    t.optimizer.zero_grad(set_to_none=True)
    seen = []
    for micro in batch:
        with autocast(t):
            targets = teacher_targets(t, micro, now["teacher_temp"], cfg)  # what should be said
            student = student_logits(t, micro)  # what is said
        terms = compute_losses(student, targets, micro, cfg)  # how far apart
        with part("backward"):
            t.scaler.scale(sum(terms.values()) / len(batch)).backward()
        seen.append({k: v.detach() for k, v in terms.items()})
    metrics = {k: torch.stack([s[k] for s in seen]).mean() for k in seen[0]}
    metrics["loss"] = sum(metrics.values())
    t.scaler.unscale_(t.optimizer)
    norms = {k: v.to(metrics["loss"]) for k, v in clip_gradients(t.student, cfg.optim.clip_grad).items()}
    finite = torch.isfinite(torch.stack([metrics["loss"], *norms.values()])).all()
    # The host never asks: it runs ahead of the GPU, where this flag stays. All ranks agree on it.
    lost = dist.all_reduce(1 - finite.float(), "max")
    with part("optimizer"):
        t.optimizer.found_inf = lost  # AdamW's kernel looks at it, and then moves nothing
        t.optimizer.step()
        t.scaler.update()
    with part("EMA"):
        update_teacher(t.ema, t.student, now["momentum"], lost)
        if cfg.train.centering == "centering":
            t.dino_center.update(lost), t.ibot_center.update(lost)  # used from the next step on
    metrics.update(norms, skipped=lost)
    if look:  # targets of one view (2B, K) beside the student's answers to the other
        crossed, answers = targets.globals.flip(0).flatten(0, 1), student.globals.flatten(0, 1)
        metrics.update(diagnose(crossed, answers, targets.features[0], cfg.dino.student_temp))
    return metrics


@part("teacher forward")
@torch.no_grad()
def teacher_targets(t, batch, tau, cfg):
    """The teacher sees both global crops, unmasked -> Logits turned into probabilities (no locals)."""
    tokens = t.teacher.backbone(batch["globals"])
    masked = tokens.patches.flatten(0, 1)[batch["mask_indices"]]  # (M, D)
    cls, patches = t.teacher.heads(tokens.cls, masked)
    lazy = prototypes.fused(patches)  # on a GPU the probabilities of patches are never written out
    if cfg.train.centering == "sinkhorn_knopp":
        cls, patches = sinkhorn_knopp(cls, tau), sinkhorn_knopp(patches, tau, lazy=lazy)
    else:
        cls, patches = t.dino_center.targets(cls, tau), t.ibot_center.targets(patches, tau, lazy)
    return Logits(cls.unflatten(0, (2, -1)), None, patches, tokens.cls.unflatten(0, (2, -1)))


@part("student forward")
def student_logits(t, batch):
    """The student sees the global crops with masked patches, and the local crops, in one pass -> Logits."""
    # A frozen teacher has no need of masks: its student then sees all patches, and answers for all of them.
    crops, masks = [batch["globals"]], [batch["masks"] if t.teacher is t.ema else None]
    if batch["locals"] is not None:
        crops, masks = crops + [batch["locals"]], masks + [None]
    tokens = t.student.backbone.forward_crops(crops, masks)
    masked = tokens[0].patches.flatten(0, 1)[batch["mask_indices"]]  # (M, D)
    cls, patches = t.student.heads(torch.cat([x.cls for x in tokens]), masked)
    n, B = len(batch["globals"]), len(batch["globals"]) // 2
    local_logits = cls[n:].unflatten(0, (-1, B)) if len(tokens) > 1 else None  # (L, B, K)
    # The [CLS] of a masked crop is used as it is: there is no second, unmasked pass for the DINO term.
    return Logits(cls[:n].unflatten(0, (2, B)), local_logits, patches, tokens[0].cls.unflatten(0, (2, B)))


@part("losses")
def compute_losses(student, targets, batch, cfg):
    """The weighted terms of the objective; their sum is what is optimised. All in fp32."""
    temp = cfg.dino.student_temp
    local, across = dino_loss(student.globals, student.locals, targets.globals, temp)
    weight = cfg.dino.loss_weight
    terms = {"loss_dino_local": weight * local, "loss_dino_global": weight * across}
    if batch["masks"] is not None:
        images = len(batch["globals"])  # all 2B crops, masked or not
        ibot = ibot_loss(student.patches, targets.patches, batch["mask_weights"], images, temp)
        terms["loss_ibot"] = cfg.ibot.loss_weight * ibot
    if cfg.dino.koleo_loss_weight:
        koleo = sum(koleo_loss(view, cfg.dino.koleo_group) for view in student.features)  # both global crops
        terms["loss_koleo"] = cfg.dino.koleo_loss_weight * koleo
    return terms


# ==========================================================================================================
# THE PLUMBING. Nothing below changes what is learned.
# ==========================================================================================================


def compute_dtype(cfg, device):
    """fp32, bf16 or fp16 for the matrix products; `auto` is bf16 on a GPU that has it, else fp32."""
    wish = cfg.compute_precision.dtype
    if wish == "auto":
        cuda = torch.device(device).type == "cuda"
        has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        wish = "bf16" if has_bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wish]


def frozen_teacher(cfg, device, dtype):
    """The teacher of another run, to be learned from as it is. Raises UserError if its answers do not fit."""
    folder = Path(cfg.train.distill_from)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"train.distill_from: there is no run at {folder}, no {folder}/config.yaml")
    theirs = config.load(folder / "config.yaml")
    own = [c.ibot.separate_head and c.ibot.mask_sample_probability > 0 for c in (theirs, cfg)]
    sizes = [{"dino.head_n_prototypes": c.dino.head_n_prototypes, "ibot.separate_head": head,
              "ibot.head_n_prototypes": head and c.ibot.head_n_prototypes,
              "student.patch_size": c.student.patch_size} for c, head in zip((theirs, cfg), own)]  # fmt: skip
    if differ := [f"{k} is {v} there, {sizes[1][k]} here" for k, v in sizes[0].items() if v != sizes[1][k]]:
        raise UserError(f"train.distill_from {folder} does not fit this run: {'; '.join(differ)}")
    with torch.device("meta"):
        teacher = DINOv2(theirs).eval().requires_grad_(False)
    dist.lighten(teacher.backbone.blocks, device, cfg.speed.compile)
    dist.shard(teacher, torch.device(device), dtype)
    if not start_from(teacher, folder)[1]:
        raise UserError(f"{folder}/teacher.pth lacks heads: distillation needs one that a run has written")
    return teacher


def autocast(t):
    device = next(t.student.parameters()).device.type
    return nullcontext() if t.dtype == torch.float32 else torch.autocast(device, t.dtype)


def arguments(argv):
    """The command line -> (arguments, config)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", default="", help="a preset: configs/NAME.yaml (default: laptop)")
    add("--config", default="", help="a YAML file of your own, or the authors'")
    add("--output-dir", default="", help="the run folder (default: runs/NAME, or NAME-2, ...)")
    add("--init-from", default="", help="a run or released weights to start from (train.init_from)")
    add("--resume", action="store_true", help="continue the run in the folder, if there is one")
    add("--max-minutes", type=float, default=0, help="of this process: its schedules are fitted into them")
    add("--profile", action="store_true", help="where the time of a step goes: a table and a trace")
    add("overrides", nargs="*", metavar="key=value", help="e.g. optim.base_lr=1e-3 train.seed=1")
    args = parser.parse_intermixed_args(argv)
    if not args.max_minutes >= 0:
        raise UserError(f"--max-minutes is {args.max_minutes:g}: give the minutes, or 0 for no limit")
    preset = args.model or ("" if args.config else "laptop")
    start = [f"train.init_from={args.init_from}"] if args.init_from else []
    cfg = config.load(args.config or None, preset or None, [*args.overrides, *start])
    if not cfg.train.dataset_path:
        cfg.train.dataset_path = f"scenes:20000:size={max(64, cfg.crops.global_crops_size)}"
        if os.environ.get("RANK", "0") == "0":
            print(f"no train.dataset_path: training on the embedded data, {cfg.train.dataset_path}")
    folder = args.output_dir or cfg.train.output_dir
    args.output_dir = folder or free_folder(Path("runs") / (preset or Path(args.config).stem), args.resume)
    return args, cfg


def free_folder(path, resume):
    """runs/name, or runs/name-2, -3, ... so that a second run never writes into the first."""
    numbered = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    used = [p for p in numbered if p.exists()]
    return used[-1] if resume and used else next(p for p in numbered if p not in used)


class Watch:
    """What the loop tells a person: a bar or lines; bad images, lost steps, collapse."""

    def __init__(self, run, cfg, t, steps, before, writer):
        self.run, self.cfg, self.steps, self.writer = run, cfg, steps, writer
        self.lost, self.suspicion, self.warned, self.knn = 0, 0, False, None
        self.per_step = cfg.train.batch_size_per_gpu * cfg.train.accumulate * dist.world_size()
        self.unread, self.since = [], time.monotonic()  # flags of steps since the last look, and its time
        # Seconds and images of training alone, bad images of all ranks: they go on where the run was left.
        self.seconds, self.images, self.bad = (before.get(k, 0) for k in ("seconds", "images", "bad"))
        first, tty = dist.rank() == 0, sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=t.step, disable=not (first and tty), dynamic_ncols=True)
        self.lines = first and not tty

    def images_seen(self, bad, total, step):
        """Write down the images that did not decode (`total` of all ranks); stop when they are too many."""
        if bad:
            with open(self.run.path / f"bad_images_rank{dist.rank()}.jsonl", "a") as f:
                f.writelines(json.dumps(dict(step=step + 1, path=str(p), reason=r)) + "\n" for p, r in bad)
        self.bad, self.images = self.bad + total, self.images + self.per_step
        limit, file = self.cfg.train.max_bad_images, self.run.path / "bad_images_rank*.jsonl"
        if self.bad > limit * max(self.images, 1000):
            self.writer.wait()  # what is being saved is still good
            raise UserError(f"{self.bad} of {self.images} images are unreadable, over train.max_bad_images "
                            f"({limit:.2%}): mend or remove those in {file}, or raise the limit")  # fmt: skip

    def step_done(self, metrics, now, t):
        """A line in metrics.jsonl, the numbers on the bar. Only here the host waits for the device."""
        self.lost_steps(t)
        mean = {k: dist.all_reduce(v.float().clone()).item() / dist.world_size() for k, v in metrics.items()}
        arrived = time.monotonic()
        self.seconds, self.since = self.seconds + arrived - self.since, arrived
        rate = self.images / max(self.seconds, 1e-9)
        row = dict(step=t.step, **mean, **now, images_per_second=round(rate, 1))
        if torch.cuda.is_available():
            row["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.run.log(row)
        knn = "-" if self.knn is None else f"{self.knn:.3f}"
        shown = dict(loss=f"{row['loss']:.3f}", H=f"{row['entropy']:.2f}", Hm=f"{row['entropy_mean']:.2f}",
                     rank=f"{row['rank']:.0f}", knn=knn, img_s=f"{rate:.0f}")  # fmt: skip
        self.bar.set_postfix(shown)
        if self.lines:
            print(f"step {t.step:6d}  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
        self.collapsed(row)

    def collapsed(self, row):
        """Say so once, after three looks in a row: a moment is no collapse, and every run starts uniform."""
        sentence = collapse(row["entropy"], row["entropy_mean"])
        if sentence and "uniform" in sentence and row["step"] < max(50, 0.05 * self.steps):
            sentence = None
        self.suspicion = self.suspicion + 1 if sentence else 0
        if self.suspicion == 3 and not self.warned:
            self.warned = True
            self.run.log(dict(step=row["step"], warning=sentence))
            if dist.rank() == 0:
                tqdm.write(f"warning: step {row['step']}: {sentence}", file=sys.stderr)

    def lost_steps(self, t):
        """Name the images of steps that were not taken. In fp16 a few are the loss scale finding its size."""
        flags, self.unread = [bool(x) for x in self.unread], []
        for step, lost in enumerate(flags, t.step - len(flags)):
            self.lost = self.lost + 1 if lost else 0
            if lost:
                samples = [self.per_step * step, self.per_step * (step + 1) - 1]
                self.run.log(dict(step=step + 1, skipped_samples=samples))
            if self.lost > self.cfg.train.max_nan + 20 * t.scaler.is_enabled():
                if dist.rank() == 0:
                    print(f"error: no finite loss and gradient in {self.lost} steps in a row (see "
                          f"metrics.jsonl): lower optim.base_lr, or take compute_precision.dtype=fp32",
                          file=sys.stderr)  # fmt: skip
                self.writer.wait()
                sys.exit(70)


def main(argv=None):
    args, cfg = arguments(argv)
    device = dist.init(cfg.speed.device)
    if cfg.speed.kernels != "auto":
        attention.CHOICE = cfg.speed.kernels
    if cfg.speed.threads:
        torch.set_num_threads(cfg.speed.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(cfg.train.seed)  # the same start on every rank

    # ---- the run folder, the data, the networks
    dataset = open_source(cfg.train.dataset_path)
    t = Trainee(cfg, device)
    judge = Judge(cfg, t)
    block = t.student.backbone.blocks[0].attn
    kernels, why = attention.backend(device, t.dtype, block.proj.in_features // block.num_heads)
    run = RunFolder(args.output_dir, cfg.to_yaml(), args.resume, dict(kernels=kernels, kernels_why=why))
    run.watch_signals()
    before = checkpoint.resume(t, run.path / "checkpoints") if args.resume else {}
    run.rewind(t.step)
    rank, world = dist.rank(), dist.world_size()
    micro_batches = make_loader(cfg, dataset, device, t.step, rank, world)
    steps = total_steps(cfg)
    if rank == 0:
        size = sum(p.numel() for p in t.student.parameters())
        print(f"{run.path}: {describe(t.student.backbone)}; {size:,} parameters with heads")
        if t.origin and not t.step:
            print(f"start: {t.origin}")
        print(f"{len(dataset):,} images of {cfg.train.dataset_path}")
        how = f"{world} x {device} in {str(t.dtype)[6:]}, kernels of {kernels}: {why}"
        print(f"{steps} steps on {how}", flush=True)

    # ---- the loop: a straight line
    writer, first = checkpoint.Writer(), t.step
    watch = Watch(run, cfg, t, steps, before, writer)
    profile = None
    if args.profile and rank == 0:
        from stopwatch import Profile

        profile = Profile(PARTS, run.path, device)
    deadline, signalled = Deadline(cfg, args.max_minutes, first), False
    while t.step < steps:
        with part("data wait"):
            batch = [next(micro_batches) for _ in range(cfg.train.accumulate)]
        bad = [b for micro in batch for b in micro["bad"]]
        # The one exchange between the hosts: all ranks draw the same conclusions at the same step.
        flags = len(bad), bool(run.stop_requested), deadline.passed(t.step), writer.failed()
        spoilt, signalled, late, failed = dist.tally(*flags)
        if failed:
            writer.wait()  # raises
        if signalled or late:
            break
        watch.images_seen(bad, spoilt, t.step)
        n, periods = t.step + 1, (judge.period, cfg.train.checkpoint_every)
        judge_now, save_now = (period > 0 and n % period == 0 and n < steps for period in periods)
        look = n in (1, steps) or n % cfg.train.log_every == 0 or judge_now or save_now
        now = schedule(cfg, t.step, world)
        # Drop path draws from a seed of the step: nothing to save, nothing to replay.
        torch.manual_seed(hash((cfg.train.seed, t.step, rank)) % 2**63)
        metrics = train_step(t, batch, now, cfg, look)
        t.step += 1
        if deadline.refit(t.step, device):
            steps = watch.steps = watch.bar.total = total_steps(cfg)
            run.write_config(cfg.to_yaml())
        watch.unread.append(metrics["skipped"])
        watch.bar.update()
        # once in a while: log, look at the features, save
        if look:
            watch.step_done(metrics, now, t)
        if judge_now:
            with part("evaluation"):
                writer.wait()  # loading images forks, and no thread should be at work then
                watch.knn = judge.knn(checkpoint.plain_teacher(t), judge.online)
            if watch.knn is not None:
                run.log(dict(step=t.step, knn_top1=watch.knn))
        if save_now:
            with part("checkpoint"):  # the copy; it is written beside the next steps
                checkpoint.save(writer, t, run.path, cfg, watch)
        if judge_now or save_now:
            watch.since = time.monotonic()
        if profile:
            profile.step_done()
    watch.bar.close()

    # ---- the end
    if profile:
        profile.close()
    if t.step > first:
        watch.lost_steps(t)
        watch.seconds += time.monotonic() - watch.since
        if writer.step != t.step:
            checkpoint.save(writer, t, run.path, cfg, watch)
    writer.wait()
    teacher = checkpoint.plain_teacher(t) if judge.wanted and not signalled else None
    if rank == 0 and not signalled:
        rate = round(watch.images / max(watch.seconds, 1e-9), 1)
        result = dict(judge.final(teacher), steps=t.step, train_seconds=round(watch.seconds, 1),
                      images_per_second=rate, bad_images=watch.bad)  # fmt: skip
        run.result(result)
        judge.picture(teacher, run.path / "pca.png")
        print(table(result))
    elif rank == 0:
        print(f"stopped at step {t.step} of {steps}; continue with --resume --output-dir {run.path}")
    run.close()
    dist.end()
    return 75 if signalled else 0


if __name__ == "__main__":
    config.run(main)
