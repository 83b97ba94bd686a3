"""DINOv2 pre-training: from its crops, a student learns to match an EMA teacher that sees the whole image.

    python train.py                                          # five minutes on two CPU cores, data included
    python train.py --model vits14 train.dataset_path=folder:/data/images
    torchrun --nproc-per-node 8 train.py --model vitg14 train.dataset_path='tar:/data/{000..999}.tar'

The method is `train_step`, one screen; the parity test against the authors' code calls this very function,
and so do the labs. The loop around it holds no random state: sample i and its crops are a pure function of
(seed, i), masks of (seed, step), schedules of the step, so a resumed run repeats nothing.

Expect a run folder runs/<name>/ (config.yaml, metrics.jsonl, teacher.pth, result.json) and a table of
results; `python -m tools.report runs/<name>` turns it into a page with curves and pictures.
"""

import argparse
import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import config
import distributed as dist
from config import UserError
from data import make_loader
from eval_knn import KNNEvaluator
from features import init_from_weights
from kernels import attention, prototypes
from kernels.prototypes import SoftTargets
from losses import Centering, collapse_metrics, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from model import DINOv2, compute_dtype, describe_backbone, init_weights
from optim import (
    Deadline,
    apply_schedules,
    clip_gradients,
    compute_schedules,
    make_optimizer,
    total_steps,
    update_teacher,
)
from runfolder import RunFolder, StepProfile, TrainLogger, profile_section, results_table
from sources import open_dataset
from survey import report_data

# ==========================================================================================================
# THE METHOD. Put your hands here.
# ==========================================================================================================


class TrainState:
    """Student, teacher, centres, optimizer: what a step reads and writes, and what a checkpoint holds.

    `ema` is the moving average of the student, and what the run is for. It is the teacher, except in
    distillation (DINOv2 section 5), where a larger model from another run teaches and never changes.
    """

    def __init__(self, cfg, device="cpu"):
        device = torch.device(device)
        self.dtype = compute_dtype(cfg.compute_precision.dtype, device)
        with torch.device("meta"):  # no memory and no numbers, until each rank knows its part
            self.student = DINOv2(cfg, cfg.student.drop_path_rate).train()
            self.ema = DINOv2(cfg).eval().requires_grad_(False)
        if cfg.train.distill_from or not cfg.ibot.mask_sample_probability:
            self.student.backbone.mask_token.requires_grad_(False)  # nothing is masked: it gets no gradient
        dist.apply_activation_checkpointing(self.student.backbone.blocks, cfg.speed.checkpointing)
        for model in (self.student, self.ema):
            dist.compile_blocks(model.backbone.blocks, device, cfg.speed.compile)
            dist.shard(model, device, self.dtype)
        init_weights(self.student, cfg.student.init_std, cfg.train.seed)
        self.origin = ""
        if cfg.train.init_from:
            self.origin, _ = init_from_weights(self.student, cfg.train.init_from)
        self.ema.load_state_dict(self.student.state_dict())  # an exact copy, in memory of its own
        self.teacher = self.ema
        if cfg.train.distill_from:
            self.teacher = load_frozen_teacher(cfg, device, self.dtype)
        dino_prototypes = cfg.dino.head_n_prototypes
        separate_head = hasattr(self.student, "ibot_head")
        ibot_prototypes = cfg.ibot.head_n_prototypes if separate_head else dino_prototypes
        self.dino_center = Centering(dino_prototypes).to(device)
        self.ibot_center = Centering(ibot_prototypes).to(device)
        self.optimizer = make_optimizer(self.student, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step = 0


class Logits(NamedTuple):
    """Scores of the K prototypes, for teacher (turned into targets) or student."""

    globals: torch.Tensor  # (2, B, K) [CLS] of the global crops, in their natural order
    locals: torch.Tensor | None  # (L, B, K) [CLS] of the local crops (student only)
    patches: torch.Tensor | SoftTargets  # (M, K) the masked patches
    features: torch.Tensor  # (2, B, D) [CLS] of the global crops before the head


def train_step(state, batch, schedules, cfg, log_diagnostics=False):
    """One optimizer step over a list of micro-batches (gradient accumulation) -> {name: scalar tensor}.

    The loss_* entries are the weighted terms that are optimised: they sum to `loss`. If the loss or a
    gradient is not finite, nothing moves, and "skipped" is 1. `log_diagnostics` adds the collapse metrics.
    """
    apply_schedules(state.optimizer, schedules)
    state.optimizer.zero_grad(set_to_none=True)
    micro_terms = []
    for micro in batch:
        with autocast(state):
            targets = teacher_targets(state, micro, schedules["teacher_temp"], cfg)
            student = student_logits(state, micro)
        terms = compute_losses(student, targets, micro, cfg)
        with profile_section("backward"):
            state.scaler.scale(sum(terms.values()) / len(batch)).backward()
        micro_terms.append({name: term.detach() for name, term in terms.items()})
    metrics = {name: torch.stack([terms[name] for terms in micro_terms]).mean() for name in micro_terms[0]}
    metrics["loss"] = sum(metrics.values())
    state.scaler.unscale_(state.optimizer)
    norms = clip_gradients(state.student, cfg.optim.clip_grad)
    norms = {name: norm.to(metrics["loss"]) for name, norm in norms.items()}
    finite = torch.isfinite(torch.stack([metrics["loss"], *norms.values()])).all()
    # A flag that stays on the device, agreed on by all ranks: the host never waits to read it.
    found_inf = dist.all_reduce(1 - finite.float(), "max")
    with profile_section("optimizer"):
        state.optimizer.found_inf = found_inf  # the fused AdamW reads it on the device: 1 = change nothing
        state.optimizer.step()
        state.scaler.update()
    with profile_section("EMA"):
        update_teacher(state.ema, state.student, schedules["momentum"], found_inf)
        if cfg.train.centering == "centering":  # the new centres are used from the next step on
            state.dino_center.update(found_inf)
            state.ibot_center.update(found_inf)
    metrics.update(norms, skipped=found_inf)
    if log_diagnostics:
        crossed = targets.globals.flip(0).flatten(0, 1)  # (2B, K): the targets of crop 2, then of crop 1,
        answers = student.globals.flatten(0, 1)  # beside the student's logits of crop 1, then of crop 2
        metrics.update(collapse_metrics(crossed, answers, targets.features[0], cfg.dino.student_temp))
    return metrics


@profile_section("teacher forward")
@torch.no_grad()
def teacher_targets(state, batch, tau, cfg):
    """The teacher sees both global crops, unmasked -> Logits turned into probabilities (no locals)."""
    tokens = state.teacher.backbone(batch["globals"])
    masked = tokens.patches.flatten(0, 1)[batch["mask_indices"]]  # (M, D)
    cls, patches = state.teacher.heads(tokens.cls, masked)
    fused = prototypes.uses_kernels(patches)  # on a GPU the probabilities of patches are never written out
    if cfg.train.centering == "sinkhorn_knopp":
        cls = sinkhorn_knopp(cls, tau)
        patches = sinkhorn_knopp(patches, tau, fused=fused)
    else:
        cls = state.dino_center.targets(cls, tau)
        patches = state.ibot_center.targets(patches, tau, fused=fused)
    return Logits(cls.unflatten(0, (2, -1)), None, patches, tokens.cls.unflatten(0, (2, -1)))


@profile_section("student forward")
def student_logits(state, batch):
    """The student sees the global crops with masked patches, and the local crops, in one pass -> Logits."""
    # With a frozen teacher the student sees all patches, and answers for all of them.
    crops = [batch["globals"]]
    masks = [batch["masks"] if state.teacher is state.ema else None]
    if batch["locals"] is not None:
        crops.append(batch["locals"])
        masks.append(None)
    tokens = state.student.backbone.forward_crops(crops, masks)
    masked = tokens[0].patches.flatten(0, 1)[batch["mask_indices"]]  # (M, D)
    cls, patches = state.student.heads(torch.cat([group.cls for group in tokens]), masked)
    num_global = len(batch["globals"])
    B = num_global // 2
    local_logits = None
    if len(tokens) > 1:
        local_logits = cls[num_global:].unflatten(0, (-1, B))  # (L, B, K)
    # The [CLS] of a masked crop is used as it is: there is no second, unmasked pass for the DINO term.
    global_logits = cls[:num_global].unflatten(0, (2, B))
    return Logits(global_logits, local_logits, patches, tokens[0].cls.unflatten(0, (2, B)))


@profile_section("losses")
def compute_losses(student, targets, batch, cfg):
    """The weighted terms of the objective; their sum is what is optimised. All in fp32."""
    temp = cfg.dino.student_temp
    dino_local, dino_global = dino_loss(student.globals, student.locals, targets.globals, temp)
    terms = {
        "loss_dino_local": cfg.dino.loss_weight * dino_local,
        "loss_dino_global": cfg.dino.loss_weight * dino_global,
    }
    if batch["masks"] is not None:
        images = len(batch["globals"])  # all 2B crops, masked or not
        ibot = ibot_loss(student.patches, targets.patches, batch["mask_weights"], images, temp)
        terms["loss_ibot"] = cfg.ibot.loss_weight * ibot
    if cfg.dino.koleo_loss_weight:
        koleo = sum(koleo_loss(crop, cfg.dino.koleo_group) for crop in student.features)  # both global crops
        terms["loss_koleo"] = cfg.dino.koleo_loss_weight * koleo
    return terms


def autocast(state):
    device = next(state.student.parameters()).device.type
    return nullcontext() if state.dtype == torch.float32 else torch.autocast(device, state.dtype)


def load_frozen_teacher(cfg, device, dtype):
    """The teacher of another run, for distillation. Raises UserError if its outputs do not fit this run."""
    folder = Path(cfg.train.distill_from)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"train.distill_from: there is no run at {folder}, no {folder}/config.yaml")
    their_cfg = config.load(folder / "config.yaml")
    theirs = output_sizes(their_cfg)
    ours = output_sizes(cfg)
    differ = [f"{key} is {theirs[key]} there, {ours[key]} here" for key in ours if ours[key] != theirs[key]]
    if differ:
        raise UserError(f"train.distill_from {folder} does not fit this run: {'; '.join(differ)}")
    with torch.device("meta"):
        teacher = DINOv2(their_cfg).eval().requires_grad_(False)
    dist.compile_blocks(teacher.backbone.blocks, device, cfg.speed.compile)
    dist.shard(teacher, device, dtype)
    _, heads_taken = init_from_weights(teacher, folder)
    if not heads_taken:
        raise UserError(f"{folder}/teacher.pth lacks heads: distillation needs one that a run has written")
    return teacher


def output_sizes(cfg):
    """The settings in which a student and a frozen teacher must agree, by name."""
    separate_head = cfg.ibot.separate_head and cfg.ibot.mask_sample_probability > 0
    return {
        "dino.head_n_prototypes": cfg.dino.head_n_prototypes,
        "ibot.separate_head": separate_head,
        "ibot.head_n_prototypes": separate_head and cfg.ibot.head_n_prototypes,
        "student.patch_size": cfg.student.patch_size,
    }


# ==========================================================================================================
# THE PLUMBING. It feeds the method and records what comes out; all it decides is the seed of drop path.
# ==========================================================================================================


def parse_args(argv):
    """The command line -> (arguments, config)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", default="", help="a preset: configs/NAME.yaml (default: laptop)")
    add("--config", default="", help="a YAML file of your own, or the authors'")
    add("--output-dir", default="", help="the run folder (default: runs/NAME, or NAME-2, ...)")
    add("--init-from", default="", help="a run or released weights to start from (train.init_from)")
    add("--resume", action="store_true", help="continue the run in the folder, if there is one")
    add("--max-minutes", type=config.argument(config.Number), default=0, help="fit the run into this time")
    add("--profile", action="store_true", help="where the time of a step goes: a table and a trace")
    add("overrides", nargs="*", metavar="key=value", help="e.g. optim.base_lr=1e-3 train.seed=1")
    args = parser.parse_intermixed_args(argv)
    preset = args.model
    if not args.model and not args.config:
        preset = "laptop"
    if args.init_from:
        args.overrides.append(f"train.init_from={args.init_from}")
    cfg = config.load(args.config or None, preset or None, args.overrides)
    if not cfg.train.dataset_path:
        cfg.train.dataset_path = f"scenes:20000:size={max(64, cfg.crops.global_crops_size)}"
        if os.environ.get("RANK", "0") == "0":
            print(f"no train.dataset_path: training on the embedded data, {cfg.train.dataset_path}")
    args.output_dir = args.output_dir or cfg.train.output_dir
    if not args.output_dir:
        args.output_dir = free_folder(Path("runs") / (preset or Path(args.config).stem), args.resume)
    saved = Path(args.output_dir) / "config.yaml"
    if args.resume and cfg.data.range == "auto":
        with suppress(UserError):  # RunFolder will say what is wrong with it
            cfg.data.range = config.load(saved).data.range
    return args, cfg


def free_folder(path, resume):
    """runs/name, or runs/name-2, -3, ... so that a second run never writes into the first."""
    numbered = [path] + [path.with_name(f"{path.name}-{i}") for i in range(2, 1000)]
    used = [folder for folder in numbered if folder.exists()]
    if resume and used:
        return used[-1]
    return next(folder for folder in numbered if folder not in used)


def print_start(state, cfg, run, dataset, device, kernels, reason):
    size = sum(parameter.numel() for parameter in state.student.parameters())
    print(f"{run.path}: {describe_backbone(state.student.backbone)}; {size:,} parameters with heads")
    if state.origin and not state.step:
        print(f"start: {state.origin}")
    report_data(dataset, cfg.train.dataset_path, run.path)
    where = f"{dist.world_size()} x {device} in {str(state.dtype).removeprefix('torch.')}"
    print(f"{total_steps(cfg)} steps on {where}, kernels of {kernels}: {reason}", flush=True)
    if device.type == "cpu" and state.dtype == torch.float32 and cfg.compute_precision.dtype == "auto":
        print("this processor has no bf16, and fp32 takes nearly twice as long: --max-minutes fits the run "
              "into the time that you have", flush=True)  # fmt: skip


def main(argv=None):
    # ---- the settings, the data, the networks, the run folder
    args, cfg = parse_args(argv)
    device = dist.setup(cfg.speed.device)
    rank = dist.rank()
    world = dist.world_size()
    if cfg.speed.kernels != "auto":
        attention.CHOICE = cfg.speed.kernels
    all_threads = torch.get_num_threads()
    torch.set_num_threads(cfg.speed.threads or all_threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(cfg.train.seed)  # the same start on every rank
    dataset = open_dataset(cfg.train.dataset_path, cfg.data)
    state = TrainState(cfg, device)
    evaluator = KNNEvaluator(cfg)
    attn = state.student.backbone.blocks[0].attn
    kernels, reason = attention.backend(device, state.dtype, attn.proj.in_features // attn.num_heads)
    run = RunFolder(args.output_dir, cfg.to_yaml(), args.resume, dict(kernels=kernels, kernels_why=reason))
    run.install_signal_handlers()
    resumed = checkpoint.resume(state, run.path / "checkpoints") if args.resume else {}
    run.start(state.step, trains=state.step < total_steps(cfg))
    first_step = state.step
    steps = total_steps(cfg)
    micro_batches = make_loader(cfg, dataset, device, first_step, rank, world)
    if rank == 0:
        print_start(state, cfg, run, dataset, device, kernels, reason)
    writer = checkpoint.CheckpointWriter()
    logger = TrainLogger(run, cfg, state, steps, resumed, writer)
    profile = StepProfile(run.path, device, enabled=args.profile and rank == 0)
    deadline = Deadline(cfg, args.max_minutes, first_step)
    signalled = False

    # ---- the loop
    while state.step < steps:
        with profile_section("data wait"):
            batch = [next(micro_batches) for _ in range(cfg.train.accumulate)]
        bad_images = [bad for micro in batch for bad in micro["bad"]]
        # The one exchange between the hosts: all ranks draw the same conclusions at the same step.
        num_bad, signalled, out_of_time, save_failed, save_due = dist.all_reduce_ints(
            len(bad_images), bool(run.stop_requested), deadline.passed(state.step), writer.failed(),
            writer.is_overdue(cfg.train.checkpoint_minutes))  # fmt: skip
        if save_failed:
            writer.wait()  # raises
        if signalled or out_of_time:
            break
        logger.count_images(bad_images, num_bad, state.step)

        # Drop path draws from a seed of the step: nothing to save, nothing to replay.
        torch.manual_seed(hash((cfg.train.seed, state.step, rank)) % 2**63)
        number = state.step + 1  # of this step, counted from 1
        evaluate_now = is_due(number, evaluator.period, steps)
        save_now = is_due(number, cfg.train.checkpoint_every, steps) or (save_due and number < steps)
        log_now = number in (1, steps) or number % cfg.train.log_every == 0 or evaluate_now or save_now
        schedules = compute_schedules(cfg, state.step, world)
        metrics = train_step(state, batch, schedules, cfg, log_diagnostics=log_now)
        state.step += 1
        logger.step_done(metrics["skipped"])
        if deadline.refit(state.step, device):
            steps = total_steps(cfg)
            logger.set_total(steps)
            run.write_config(cfg.to_yaml())

        # once in a while: log, evaluate, save
        if log_now:
            logger.log(metrics, schedules, state)
        if evaluate_now:
            with profile_section("evaluation"):
                writer.wait()  # loading images forks, and no thread should be at work then
                teacher = checkpoint.gather_teacher(state)
                logger.log_knn(evaluator.accuracy(teacher, evaluator.online_sets), state.step)
        if save_now:
            with profile_section("checkpoint"):  # the copy; it is written beside the next steps
                checkpoint.save_checkpoint(writer, state, run.path, cfg, logger)
        if evaluate_now or save_now:
            logger.restart_clock()
        profile.step_done()

    # ---- the end
    profile.close()
    logger.close(state, trained=state.step > first_step)
    if state.step > first_step and writer.step != state.step:
        checkpoint.save_checkpoint(writer, state, run.path, cfg, logger)
    elif state.step == first_step > 0:  # nothing to do; but teacher.pth may be damaged, or of an older step
        teacher = checkpoint.teacher_file(state, run.path)
        if rank == 0:
            checkpoint.save_teacher(*teacher)
    writer.wait()
    torch.set_num_threads(all_threads)  # no loader is at work any more
    run.allow_ctrl_c()  # the evaluation may take long
    if signalled:
        if rank == 0:
            print(f"stopped at step {state.step} of {steps}; continue with --resume --output-dir {run.path}")
    else:
        teacher = checkpoint.gather_teacher(state) if evaluator.wanted else None
        if rank == 0:
            result = evaluator.final_results(teacher) | logger.totals(state)
            run.write_result(result)
            print(results_table(result))
    run.close()
    dist.cleanup()
    if signalled:
        return 130 if run.stop_requested == "SIGINT" else 75
    return 0


def is_due(number, period, steps):
    """Whether something that is done every `period` steps (0: never) is due, the end of the run apart."""
    return period > 0 and number % period == 0 and number < steps


IF_OUT_OF_MEMORY = (
    "lower train.batch_size_per_gpu (and raise train.accumulate), evaluation.batch_size, or the size or "
    "number of crops, layers or prototypes; or take speed.checkpointing=full"
)

if __name__ == "__main__":
    config.run(main, IF_OUT_OF_MEMORY)
