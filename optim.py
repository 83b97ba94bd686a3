"""Everything that moves weights: parameter groups, schedules, gradient clipping, the EMA of the teacher.

A schedule is a pure function of the step: no state to save, nothing to replay on resume. An "epoch" is the
published convention of OFFICIAL_EPOCH_LENGTH steps, whatever the size of the data set. With --max-minutes the
schedules are fitted into the time, so that they end before it does.
"""

import math
import sys
import time

import torch
from tqdm import tqdm

from distributed import broadcast_object, rank, to_full, to_local

# Parameters below the first block.
FIRST_LAYER = ("pos_embed", "cls_token", "mask_token", "register_tokens", "patch_embed")


def param_group_multipliers(name, depth, layerwise_decay, patch_embed_lr_mult):
    """(lr multiplier, weight-decay multiplier, name of its lr schedule) of one parameter, by its name.

    Early layers learn more slowly: tokens and patch embedding d^(n+1), block i d^(n-i), final norm and heads
    1. The patch embedding gets another factor of 0.2. Biases, norms and LayerScale do not decay; position
    embedding, tokens and prototypes do (facts of the published code, not of the paper).
    """
    lr_mult = 1.0
    if any(token in name for token in FIRST_LAYER):
        lr_mult = layerwise_decay ** (depth + 1)
    elif "blocks." in name:
        block = int(name.split("blocks.")[1].split(".")[0])
        lr_mult = layerwise_decay ** (depth - block)
    if "patch_embed" in name:
        lr_mult *= patch_embed_lr_mult
    decays = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    schedule = "lr"
    if "last_layer" in name:
        schedule = "last_layer_lr"
    elif "backbone." in name:
        schedule = "backbone_lr"
    return lr_mult, 1.0 if decays else 0.0, schedule


def make_optimizer(student, cfg):
    """AdamW over the student's parameters, in groups of equal multipliers; see `apply_schedules`."""
    optim = cfg.optim
    depth = len(student.backbone.blocks)
    by_multipliers = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = param_group_multipliers(name, depth, optim.layerwise_decay, optim.patch_embed_lr_mult)
            by_multipliers.setdefault(key, []).append(parameter)
    groups = []
    for (lr_mult, wd_mult, schedule), parameters in by_multipliers.items():
        groups.append(dict(params=parameters, lr_mult=lr_mult, wd_mult=wd_mult, rate=schedule))
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)


def cosine_schedule(step, start, end, total, warmup=0):
    """Linear from 0 to `start` over `warmup` steps (both ends included), then half a cosine towards `end`.

    The published form, to the last digit: the warm-up holds its peak twice, and step `total` - 1 has not
    quite arrived.
    """
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    if step >= total:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def total_steps(cfg):
    """Optimizer steps of the whole run."""
    return round(cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)


def compute_schedules(cfg, step, world_size=1):
    """The numbers of a step: three learning rates, weight_decay, momentum, teacher_temp (Table 16)."""
    optim = cfg.optim
    teacher = cfg.teacher
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    total = total_steps(cfg)
    batch = cfg.train.batch_size_per_gpu * cfg.train.accumulate * world_size  # images of one step, not crops
    peak_lr = optim.base_lr * math.sqrt(batch / 1024)  # the one published scaling_rule
    lr = cosine_schedule(step, peak_lr, optim.min_lr, total, round(optim.warmup_epochs * epoch))
    temp_warmup = round(teacher.warmup_teacher_temp_epochs * epoch)
    progress = min(step / max(temp_warmup - 1, 1), 1.0) if step < temp_warmup else 1.0
    temp_change = teacher.teacher_temp - teacher.warmup_teacher_temp
    return dict(
        lr=lr,
        last_layer_lr=0.0 if step < optim.freeze_last_layer_epochs * epoch else lr,
        backbone_lr=0.0 if step < optim.freeze_backbone_epochs * epoch else lr,
        weight_decay=cosine_schedule(step, optim.weight_decay, optim.weight_decay_end, total),
        momentum=cosine_schedule(step, teacher.momentum_teacher, teacher.final_momentum_teacher, total),
        teacher_temp=teacher.warmup_teacher_temp + temp_change * progress,
    )


class Deadline:
    """Fits the schedules into the minutes that a run may take: a run that is cut off never anneals.

    The pace of the latest steps tells how many more will fit; then all spans of the schedules (the run, its
    warm-ups, the freezes) change in proportion. Checked again whenever a quarter more steps are done. Without
    minutes (0) it does nothing. A run that slows down near its end is still cut off.
    """

    SETTLE = 4  # steps that compile, and find full queues: their pace is not the run's
    FIRST = 16  # steps until the first check
    MARGIN = 0.97  # share of the time that is planned

    def __init__(self, cfg, minutes, start):
        self.cfg = cfg
        self.seconds = 60 * minutes
        self.start = start  # the step this process begins with
        self.most = total_steps(cfg)
        self.began = time.monotonic()
        self.last_look = start + self.SETTLE
        self.next_look = start + self.FIRST

    def passed(self, step):
        """Whether the time is up (never before the first step)."""
        over = self.seconds > 0 and step > self.start and time.monotonic() - self.began > self.seconds
        if over and rank() == 0:
            tqdm.write(f"the time is up: cut off at step {step} of {total_steps(self.cfg)}", file=sys.stderr)
        return over

    def refit(self, step, device):
        """After each step -> True if the schedules in cfg have changed: they then end within the time."""
        if not self.seconds or step not in (self.start + self.SETTLE, self.next_look):
            return False
        torch.get_device_module(device).synchronize()  # the host runs ahead of a GPU
        now = time.monotonic()
        if step == self.start + self.SETTLE:
            self.looked = now
            return False
        pace = max(now - self.looked, 1e-9) / (step - self.last_look)
        left = self.MARGIN * self.seconds - (now - self.began)
        fitting = min(step + max(int(left / pace), 1), self.most)
        fitting = broadcast_object(fitting)  # the clocks of the ranks differ
        self.looked = now
        self.last_look = step
        self.next_look = step + (step - self.start) // 4
        ratio = fitting / total_steps(self.cfg)
        if 0.99 < ratio < 1.01:
            return False
        for section in (self.cfg.optim, self.cfg.teacher):
            for name in [name for name in vars(section) if name.endswith("epochs")]:
                setattr(section, name, getattr(section, name) * ratio)
        if rank() == 0:
            tqdm.write(f"{fitting} steps fit into the time: the schedules end with them", file=sys.stderr)
        return True


def apply_schedules(optimizer, schedules):
    """Write this step's learning rates and weight decay into the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = schedules[group["rate"]] * group["lr_mult"]
        group["weight_decay"] = schedules["weight_decay"] * group["wd_mult"]


def clip_gradients(student, max_norm):
    """Clip the norm of backbone and heads separately (not jointly) -> {module: norm before clipping}."""
    norms = {}
    for name, module in student.named_children():
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm or math.inf)
        norms[f"grad_{name}"] = to_full(norm)
    return norms


@torch.no_grad()
def update_teacher(teacher, student, momentum, found_inf):
    """teacher <- m teacher + (1 - m) student, backbone and heads: one call over all tensors of this rank.

    found_inf: a 0-dim tensor; 1 leaves the teacher as it is. It stays on the device, so the host does not
    wait; the price on a GPU is one small kernel per tensor, where plain numbers as weights would be fused.
    """
    teacher_tensors = [to_local(parameter) for parameter in teacher.parameters()]
    student_tensors = [to_local(parameter) for parameter in student.parameters()]
    weight = (1 - momentum) * (1 - found_inf)
    torch._foreach_lerp_(teacher_tensors, student_tensors, [weight] * len(teacher_tensors))
