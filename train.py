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
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

import checkpoint
import config
import distributed as dist
from config import UserError
from data import make_loader, open_source
from eval_knn import chance, eval_sets, knn_backbone, knn_pixels, pixels
from features import foreground_miou
from kernels import attention, prototypes
from kernels.prototypes import SoftTargets
from losses import Centering, collapse, diagnose, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from model import DINOv2, VisionTransformer, describe
from optim import clip_gradients, make_optimizer, schedule, set_rates, update_teacher
from runfolder import RunFolder
from visualize import large_sample, pca_sheet

# ==========================================================================================================
# THE METHOD. Put your hands here.
# ==========================================================================================================


class Trainee:
    """Student, teacher, centres, optimizer: what a step reads and writes, and what a checkpoint holds."""

    def __init__(self, cfg, device="cpu"):
        self.dtype = compute_dtype(cfg, device)
        # Every rank draws the whole model on its CPU, from the same seed, and keeps a part.
        self.student = DINOv2(cfg, cfg.student.drop_path_rate).train()
        if not cfg.ibot.mask_sample_probability:  # nothing is masked: this token would never see a gradient
            self.student.backbone.mask_token.requires_grad_(False)
        self.teacher = DINOv2(cfg).eval().requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())  # an exact copy, in memory of its own
        dist.lighten(self.student.backbone.blocks, cfg.speed.checkpointing, cfg.speed.compile)
        dist.lighten(self.teacher.backbone.blocks, compiled=cfg.speed.compile)
        for model in (self.student, self.teacher):
            dist.shard(model, torch.device(device), self.dtype)
        self.dino_center = Centering(cfg.dino.head_n_prototypes).to(device)
        own_head = hasattr(self.student, "ibot_head")
        K = cfg.ibot.head_n_prototypes if own_head else cfg.dino.head_n_prototypes
        self.ibot_center = Centering(K).to(device)
        self.optimizer = make_optimizer(self.student, cfg)
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=self.dtype == torch.float16)
        self.step = 0


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
        t.scaler.scale(sum(terms.values()) / len(batch)).backward()
        seen.append({k: v.detach() for k, v in terms.items()})
    t.scaler.unscale_(t.optimizer)
    metrics = {k: torch.stack([s[k] for s in seen]).mean() for k in seen[0]}
    metrics["loss"] = sum(metrics.values())
    norms = {k: v.to(metrics["loss"]) for k, v in clip_gradients(t.student, cfg.optim.clip_grad).items()}
    finite = torch.isfinite(torch.stack([metrics["loss"], *norms.values()])).all()
    lost = dist.agree(not finite)  # the one place where the host waits for the device
    if lost:
        t.dino_center.reset(), t.ibot_center.reset()
    else:
        t.scaler.step(t.optimizer)
        update_teacher(t.teacher, t.student, now["momentum"])
        if cfg.train.centering == "centering":
            t.dino_center.update(), t.ibot_center.update()  # used from the next step on
    t.scaler.update()
    metrics.update(norms, skipped=torch.tensor(float(lost)))
    if look:  # targets of one view (2B, K) beside the student's answers to the other
        crossed, answers = targets.globals.flip(0).flatten(0, 1), student.globals.flatten(0, 1)
        metrics.update(diagnose(crossed, answers, targets.features[0], cfg.dino.student_temp))
    return metrics


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


def student_logits(t, batch):
    """The student sees the global crops with masked patches, and the local crops, in one pass -> Logits."""
    crops, masks = [batch["globals"]], [batch["masks"]]
    if batch["locals"] is not None:
        crops, masks = crops + [batch["locals"]], masks + [None]
    tokens = t.student.backbone.forward_crops(crops, masks)
    masked = tokens[0].patches.flatten(0, 1)[batch["mask_indices"]]  # (M, D)
    cls, patches = t.student.heads(torch.cat([x.cls for x in tokens]), masked)
    n, B = len(batch["globals"]), len(batch["globals"]) // 2
    local_logits = cls[n:].unflatten(0, (-1, B)) if len(tokens) > 1 else None  # (L, B, K)
    # The [CLS] of a masked crop is used as it is: there is no second, unmasked pass for the DINO term.
    return Logits(cls[:n].unflatten(0, (2, B)), local_logits, patches, tokens[0].cls.unflatten(0, (2, B)))


def compute_losses(student, targets, batch, cfg):
    """The weighted terms of the objective; their sum is what is optimised. All in fp32."""
    temp = cfg.dino.student_temp
    local, across = dino_loss(student.globals, student.locals, targets.globals, temp)
    terms = {
        "loss_dino_local": cfg.dino.loss_weight * local,
        "loss_dino_global": cfg.dino.loss_weight * across,
    }
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
        has_bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        wish = "bf16" if has_bf16 else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wish]


def autocast(t):
    device = next(t.student.parameters()).device.type
    return nullcontext() if t.dtype == torch.float32 else torch.autocast(device, t.dtype)


def checkpoint_state(t):
    """Everything that the next step depends on, as named tensors."""
    return {"student": t.student.state_dict(), "teacher": t.teacher.state_dict(),
            "dino_center": t.dino_center.state_dict(), "ibot_center": t.ibot_center.state_dict(),
            "optimizer": get_optimizer_state_dict(t.student, t.optimizer), "scaler": t.scaler.state_dict(),
            "step": t.step}  # fmt: skip


def resume(t, folder):
    """Continue from the newest intact checkpoint, if there is one -> its meta.json, or {}."""
    path = checkpoint.newest(folder)
    if path is None:
        return {}
    state = checkpoint_state(t)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in t.optimizer.param_groups]
    meta = checkpoint.restore(path, state)
    set_optimizer_state_dict(t.student, t.optimizer, state["optimizer"])
    for group, own in zip(
        t.optimizer.param_groups, settings
    ):  # moments from the file, settings from the config
        group.update(own)
    t.scaler.load_state_dict(state["scaler"])
    t.step = state["step"]
    return meta


def save(t, run, cfg, watch):
    """A checkpoint to resume from, and the teacher as a plain file to use."""
    meta = dict(seconds=watch.seconds, images=watch.images, bad=watch.bad)
    keep = cfg.train.keep_last, cfg.train.keep_every
    checkpoint.save(run.path / "checkpoints", t.step, checkpoint_state(t), meta, *keep)
    tensors = in_one_piece(t.teacher)
    if dist.rank() == 0:
        checkpoint.save_teacher(run.path / "teacher.pth", tensors, t.teacher.backbone.arch)


def in_one_piece(module):
    """The state dict of a sharded module: whole tensors on the CPU of rank 0, nothing on the other ranks."""
    pieces = ((k, dist.whole(v)) for k, v in module.state_dict().items())  # one at a time
    return {k: v.cpu() for k, v in pieces if dist.rank() == 0}


def plain_teacher(t):
    """The teacher's backbone in one piece on rank 0, None on the other ranks; alone, itself."""
    if dist.world_size() == 1:
        return t.teacher.backbone
    tensors, device = in_one_piece(t.teacher.backbone), dist.local(t.teacher.backbone.norm.weight).device
    if dist.rank() > 0:
        return None
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        backbone = VisionTransformer(**t.teacher.backbone.arch)
    backbone.load_state_dict(tensors, assign=True)
    return backbone.to(device).eval().requires_grad_(False)


def arguments(argv):
    """The command line -> (arguments, config)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a preset: configs/NAME.yaml (default: laptop)")
    parser.add_argument("--config", default="", help="a YAML file of your own, or the authors'")
    parser.add_argument(
        "--output-dir", default="", help="the run folder (default: runs/NAME, or NAME-2, ...)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the folder, if there is one"
    )
    parser.add_argument(
        "--max-minutes", type=float, default=0, help="stop early, with checkpoint and evaluation"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. optim.base_lr=1e-3 train.seed=1"
    )
    args = parser.parse_intermixed_args(argv)
    preset = args.model or ("" if args.config else "laptop")
    cfg = config.load(args.config or None, preset or None, args.overrides)
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

    def __init__(self, run, cfg, t, steps, before):
        self.run, self.cfg, self.steps = run, cfg, steps
        self.lost, self.suspicion, self.warned, self.knn = 0, 0, False, None
        # Seconds and images of training alone, bad images of all ranks: they go on where the run was left.
        self.seconds, self.images, self.bad = (before.get(k, 0) for k in ("seconds", "images", "bad"))
        first, tty = dist.rank() == 0, sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=t.step, disable=not (first and tty), dynamic_ncols=True)
        self.lines = first and not tty

    def images_seen(self, batch, step):
        """Count the images that did not decode, write them down, and stop when they are too many."""
        bad = [b for micro in batch for b in micro["bad"]]
        if bad:
            with open(self.run.path / f"bad_images_rank{dist.rank()}.jsonl", "a") as f:
                f.writelines(json.dumps(dict(step=step, path=str(p), reason=r)) + "\n" for p, r in bad)
        self.bad += int(dist.all_reduce(torch.tensor(len(bad))))
        self.images += dist.world_size() * sum(len(micro["samples"]) for micro in batch)
        limit, file = self.cfg.train.max_bad_images, self.run.path / "bad_images_rank*.jsonl"
        if self.bad > limit * max(self.images, 1000):
            raise UserError(f"{self.bad} of {self.images} images are unreadable, over train.max_bad_images "
                            f"({limit:.2%}): mend or remove those in {file}, or raise the limit")  # fmt: skip

    def step_done(self, metrics, now, t):
        """A line in metrics.jsonl, the numbers on the bar. Reading the metrics waits for the device."""
        mean = {k: dist.all_reduce(v.float().clone()).item() / dist.world_size() for k, v in metrics.items()}
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

    def step_lost(self, metrics, batch, t):
        """Name the images of a step that was not taken. In fp16 a few are the loss scale finding its size."""
        self.lost = self.lost + 1 if metrics["skipped"] else 0
        if self.lost:
            n = len(batch) * len(batch[0]["samples"]) * dist.world_size()  # the global batch, in one piece
            self.run.log(dict(step=t.step, skipped_samples=[n * (t.step - 1), n * t.step - 1]))
        if self.lost > self.cfg.train.max_nan + 20 * t.scaler.is_enabled():
            print(f"error: no finite loss and gradient in {self.lost} steps in a row (see metrics.jsonl): "
                  "try a lower optim.base_lr or compute_precision.dtype=fp32", file=sys.stderr)  # fmt: skip
            sys.exit(70)


class Judge:
    """k-NN of the teacher, on the way and at the end with baselines; silent without labelled images."""

    def __init__(self, cfg, t):
        self.cfg, self.sets, self.online, e = cfg, None, None, cfg.evaluation
        self.wanted = bool(e.train_path and e.test_path)  # known to all ranks; the images only to rank 0
        if self.wanted and dist.rank() == 0:
            self.sets = self.online = eval_sets(cfg)
            if e.online_limit:
                self.online = eval_sets(cfg, limit=e.online_limit)

    def knn(self, backbone, sets):
        """-> top-1 accuracy, or None on the ranks (and in the runs) that do not evaluate."""
        if sets is None:
            return None
        e = self.cfg.evaluation
        how = dict(ks=(e.knn_k,), batch_size=e.batch_size, num_workers=self.cfg.train.num_workers)
        return max(knn_backbone(backbone, *sets, **how).values())

    def final(self, teacher):
        """The numbers of result.json."""
        if self.sets is None:
            return {}
        (bank, queries), e = self.sets, self.cfg.evaluation
        torch.manual_seed(self.cfg.train.seed)  # the baseline: the same network, untrained
        self.random = VisionTransformer(**teacher.arch, init_std=self.cfg.student.init_std)
        self.random.to(teacher.norm.weight.device)
        result = dict(knn_top1=self.knn(teacher, self.sets), knn_random_init=self.knn(self.random, self.sets),
                      knn_pixels=max(knn_pixels(bank, queries, ks=(e.knn_k,)).values()),
                      chance=chance(pixels(queries, side=1)[1]))  # fmt: skip
        if hasattr(queries.dataset, "scene"):  # the embedded data knows what is object and what is background
            result["fg_miou"] = foreground_miou(teacher, queries.dataset, queries.size)
            result["fg_miou_random_init"] = foreground_miou(self.random, queries.dataset, queries.size)
        return result

    def picture(self, teacher, path):
        """pca.png: some of the query images, as the teacher and a random network see them."""
        if self.sets is not None:
            queries = self.sets[1]
            sample = large_sample(queries.dataset, queries.size, queries.resize, 8)
            pca_sheet([teacher, self.random], sample).save(path)


def table(result):
    """The last lines on the console."""
    rows = [("k-NN top-1", "knn_top1", "knn_random_init", "knn_pixels", "chance"),
            ("foreground mIoU", "fg_miou", "fg_miou_random_init")]  # fmt: skip
    rows = [(name, [f"{result[k]:.3f}" for k in keys]) for name, *keys in rows if keys[0] in result]
    head = [("", ["trained", "random init", "raw pixels", "chance"])] if rows else []
    lines = [f"{name:16s}" + "".join(f"{cell:>13s}" for cell in cells) for name, cells in head + rows]
    rate = result["images_per_second"]
    return "\n".join(
        [*lines, f"{result['steps']} steps in {result['train_seconds']:.0f} s, {rate:.0f} images/s"]
    )


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
    before = resume(t, run.path / "checkpoints") if args.resume else {}
    run.rewind(t.step)
    rank, world = dist.rank(), dist.world_size()
    micro_batches = make_loader(cfg, dataset, device, t.step, rank, world)
    steps = round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
    if rank == 0:
        size = sum(p.numel() for p in t.student.parameters())
        print(f"{run.path}: {describe(t.student.backbone)}; {size:,} parameters with heads")
        print(f"{len(dataset):,} images of {cfg.train.dataset_path}")
        print(
            f"{steps} steps on {world} x {device} in {str(t.dtype)[6:]}, kernels of {kernels}: {why}",
            flush=True,
        )

    # ---- the loop: a straight line
    watch, first = Watch(run, cfg, t, steps, before), t.step
    began, signalled, out_of_time = time.monotonic(), False, False
    while t.step < steps and not signalled and not out_of_time:
        clock = time.monotonic()
        batch = [next(micro_batches) for _ in range(cfg.train.accumulate)]
        watch.images_seen(batch, t.step)
        now = schedule(cfg, t.step, world)
        # Drop path draws from a seed of the step: nothing to save, nothing to replay.
        torch.manual_seed(hash((cfg.train.seed, t.step, rank)) % 2**63)
        look = t.step + 1 in (1, steps) or (t.step + 1) % cfg.train.log_every == 0
        metrics = train_step(t, batch, now, cfg, look)
        t.step += 1
        watch.seconds += time.monotonic() - clock
        watch.step_lost(metrics, batch, t)
        watch.bar.update()
        # once in a while: log, look at the features, save, stop
        if look:
            watch.step_done(metrics, now, t)
        every = cfg.evaluation.eval_period_iterations
        if judge.wanted and every and t.step % every == 0 and t.step < steps:
            watch.knn = judge.knn(plain_teacher(t), judge.online)
            if watch.knn is not None:
                run.log(dict(step=t.step, knn_top1=watch.knn))
        if cfg.train.checkpoint_every and t.step % cfg.train.checkpoint_every == 0 and t.step < steps:
            save(t, run, cfg, watch)
        late = bool(args.max_minutes) and time.monotonic() - began > 60 * args.max_minutes
        signalled, out_of_time = dist.agree(run.stop_requested), dist.agree(late)  # all ranks stop together
    watch.bar.close()

    # ---- the end
    if t.step > first:
        save(t, run, cfg, watch)
    teacher = plain_teacher(t) if judge.wanted and not signalled else None
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
