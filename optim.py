"""Everything that moves weights: parameter groups, the five schedules, gradient clipping, the teacher's
moving average.

What is unusual here: a schedule is a pure function of the step (no state to save, nothing to replay on
resume), and "epoch" is the published convention of OFFICIAL_EPOCH_LENGTH steps, whatever the size of the data
set. With --max-minutes the schedules are fitted into the time, so that they end before it does.
"""

import math
import sys
import time

import torch
from tqdm import tqdm

from distributed import broadcast_object, rank, to_full, to_local


def param_group_multipliers(name, depth, layerwise_decay, patch_embed_lr_mult):
    """(lr multiplier, weight-decay multiplier, which schedule its lr follows) of one parameter, by its name.

    Early layers learn more slowly: tokens and patch embedding d^(n+1), block i d^(n-i), final norm and heads
    1. The patch embedding gets another factor of 0.2. No decay on biases, norms and LayerScale, and on
    nothing else is it left out: position embedding, tokens and prototypes do decay (facts of the published
    code, not of the paper).
    """
    lr, wd = 1.0, 1.0
    tokens = ("pos_embed", "cls_token", "mask_token", "register_tokens", "patch_embed")
    if any(t in name for t in tokens):
        lr = layerwise_decay ** (depth + 1)
    elif "blocks." in name:
        i = int(name.split("blocks.")[1].split(".")[0])
        lr = layerwise_decay ** (depth - i)
    if "patch_embed" in name:
        lr *= patch_embed_lr_mult
    if name.endswith(".bias") or "norm" in name or "gamma" in name:
        wd = 0.0
    part = "last_layer_lr" if "last_layer" in name else "backbone_lr" if "backbone." in name else "lr"
    return lr, wd, part


def make_optimizer(student, cfg):
    """AdamW over the student's parameters, grouped by equal multipliers; `set_rates` sets lr and decay."""
    o, depth, groups = cfg.optim, len(student.backbone.blocks), {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            key = param_group_multipliers(name, depth, o.layerwise_decay, o.patch_embed_lr_mult)
            groups.setdefault(key, []).append(parameter)
    groups = [dict(params=p, lr_mult=lr, wd_mult=wd, rate=part) for (lr, wd, part), p in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=(o.adamw_beta1, o.adamw_beta2), fused=True)


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
    o, t, epoch = cfg.optim, cfg.teacher, cfg.train.OFFICIAL_EPOCH_LENGTH
    total = total_steps(cfg)
    batch = cfg.train.batch_size_per_gpu * cfg.train.accumulate * world_size  # images of one step, not crops
    peak = o.base_lr * math.sqrt(batch / 1024)  # the one published scaling_rule
    lr = cosine_schedule(step, peak, o.min_lr, total, round(o.warmup_epochs * epoch))
    warm = round(t.warmup_teacher_temp_epochs * epoch)
    progress = min(step / max(warm - 1, 1), 1.0) if step < warm else 1.0
    return dict(
        lr=lr,
        last_layer_lr=0.0 if step < o.freeze_last_layer_epochs * epoch else lr,
        backbone_lr=0.0 if step < o.freeze_backbone_epochs * epoch else lr,
        weight_decay=cosine_schedule(step, o.weight_decay, o.weight_decay_end, total),
        momentum=cosine_schedule(step, t.momentum_teacher, t.final_momentum_teacher, total),
        teacher_temp=t.warmup_teacher_temp + (t.teacher_temp - t.warmup_teacher_temp) * progress,
    )


class Deadline:
    """Fits the schedules into the minutes that a run may take: one that is cut off never anneals.

    The pace of the latest steps says how many more will fit; then all spans of the schedules (the run, its
    warm-ups, what is frozen) change in proportion. Looked at again whenever a quarter more steps are done.
    Without minutes (0) it does nothing. A run that turns slow near its end is cut off all the same.
    """

    SETTLE = 4  # steps that compile, and find full queues: their pace is not the run's
    FIRST = 16  # steps until the first look
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
        """Whether the time is over (never before the first step)."""
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
    return {f"grad_{name}": to_full(torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm or math.inf))
            for name, module in student.named_children()}  # fmt: skip


@torch.no_grad()
def update_teacher(teacher, student, momentum, found_inf):
    """teacher <- m teacher + (1 - m) student, backbone and heads: one call over all tensors, on each rank its
    shards. `found_inf` (0-dim tensor): 1 leaves the teacher as it is. That the host need not know it costs a GPU
    one small kernel per tensor; with plain numbers as weights they would be fused."""
    mine = [[to_local(p) for p in model.parameters()] for model in (teacher, student)]
    torch._foreach_lerp_(*mine, [(1 - momentum) * (1 - found_inf)] * len(mine[0]))
