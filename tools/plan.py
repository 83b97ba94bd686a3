"""What a run will cost: parameters, memory, FLOPs, traffic and hours, from its config alone.

    python -m tools.plan --model vitg14 gpus=256
    python -m tools.plan --model vitl14 gpus=8 train.batch_size_per_gpu=32 speed.checkpointing=full mfu=0.45

Besides the settings of train.py: `gpus`, `mfu` (the share of the peak that you expect to reach), `tflops`
(the peak of one GPU for 16-bit products, 989 for an H100 or H200) and `memory` (of one GPU, in GB).

Nothing is allocated. FLOPs are those of the matrix products that the method needs: a backward pass counts
twice its forward pass, and what checkpointing computes again does not count, though it takes time.
tests/tools/test_plan.py compares FLOPs and bytes with what PyTorch counts in a real step. Hours are as good
as the MFU that you believe in: none is measured yet.
"""

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch

import config
from config import Count, Positive, UserError
from model import DINOv2
from optim import total_steps

PLAN_SETTINGS = dict(gpus=1, mfu=0.4, tflops=989.0, memory=80.0)  # and their defaults
PLAN_KINDS = dict(gpus=Count, mfu=Positive, tflops=Positive, memory=Positive)


class Crops(NamedTuple):
    """Crops of one size."""

    count: int
    patches: int  # of each


class Workload:
    """One micro-batch on one GPU: its tokens, and the matrix products that they go through."""

    def __init__(self, cfg):
        with torch.device("meta"):
            self.model = DINOv2(cfg)
        arch = self.model.backbone.arch
        self.D = arch["embed_dim"]
        self.R = arch["num_register_tokens"]
        self.depth = arch["depth"]
        self.patch_size = cfg.student.patch_size
        self.keep_rate = 1 - cfg.student.drop_path_rate
        self.B = cfg.train.batch_size_per_gpu
        self.L = cfg.crops.local_crops_number
        global_patches = (cfg.crops.global_crops_size // self.patch_size) ** 2
        local_patches = (cfg.crops.local_crops_size // self.patch_size) ** 2
        self.global_crops = Crops(2 * self.B, global_patches)
        self.crops = [self.global_crops, Crops(self.L * self.B, local_patches)]
        low, high = cfg.ibot.mask_ratio_min_max
        self.M = round(2 * self.B * cfg.ibot.mask_sample_probability * (low + high) / 2 * global_patches)
        mlp = self.model.backbone.blocks[0].mlp
        self.mlp_rows = sum(linear.weight.numel() for linear in mlp.children()) // self.D  # of all matrices
        self.swiglu = hasattr(mlp, "w12")

    def tokens(self, crops):
        return sum(count * (1 + self.R + patches) for count, patches in crops)

    def backbone_flops(self, crops, keep_rate=1.0):
        """-> FLOPs of a forward pass: the patch embedding, all blocks.

        A product of (a, b) and (b, c) matrices is 2 a b c.
        """
        linear = self.tokens(crops) * 2 * self.D * (4 * self.D + self.mlp_rows)
        attention = 0
        embedding = 0
        for count, patches in crops:
            attention += 4 * count * (1 + self.R + patches) ** 2 * self.D
            embedding += 2 * count * patches * 3 * self.patch_size**2 * self.D
        return embedding, self.depth * keep_rate * (linear + attention)

    def head_flops(self, num_cls, num_patches):
        """FLOPs of a forward pass of the heads over so many tokens."""
        dino = self.model.dino_head
        ibot = getattr(self.model, "ibot_head", dino)
        return 2 * (num_cls * count_matrix_weights(dino) + num_patches * count_matrix_weights(ibot))


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def count_matrix_weights(head):
    matrices = ("weight", "weight_v")
    return sum(x.numel() for name, x in head.named_parameters() if name.endswith(matrices))


def step_flops(student, teacher=None):
    """FLOPs of one micro-batch on one GPU: {teacher, student, heads}.

    student: its Workload; teacher: that of the frozen teacher in distillation.
    """
    teacher = teacher or student
    embedding, blocks = student.backbone_flops(student.crops, student.keep_rate)
    student_heads = student.head_flops((2 + student.L) * student.B, student.M)
    teacher_heads = teacher.head_flops(2 * student.B, student.M)
    return dict(
        teacher=sum(teacher.backbone_flops([student.global_crops])),
        student=2 * embedding + 3 * blocks,  # images need no gradient
        heads=3 * student_heads + teacher_heads,
    )


def activation_bytes(student, half, checkpointing):
    """Bytes that the student's forward pass keeps for its backward pass, all blocks together."""
    fp32 = 4
    compute = 2 if half else 4  # bytes of a number in the compute type
    # What a token leaves behind in a block: of D numbers two inputs of norms in fp32; in the compute type two
    # inputs of linears, q, k, v, the attention's output, two of LayerScale and, with drop path, two of its
    # scaling; and what is inside the MLP: 4 D twice, or with SwiGLU four times its width.
    drop_path = 2 if student.keep_rate < 1 else 0
    numbers_in_mlp = student.mlp_rows * 4 // 3 if student.swiglu else student.mlp_rows
    inside_mlp = numbers_in_mlp * compute
    whole_block = student.D * (2 * fp32 + (2 + 3 + 1 + 2 + drop_path) * compute) + inside_mlp
    tokens = student.tokens(student.crops)
    if checkpointing == "off":
        return int(tokens * (student.keep_rate * student.depth * whole_block))
    kept = student.D * fp32
    if checkpointing == "selective":
        kept = student.D * (fp32 + 5 * compute) + inside_mlp // 2
    return int(tokens * (student.depth * kept + student.keep_rate * whole_block))


def logits_bytes(student, cfg, half):
    """Bytes of logits and targets of both networks."""
    compute = 2 if half else 4
    K = cfg.dino.head_n_prototypes
    K_ibot = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    # [CLS]: logits, fp32 copy and log-probabilities of the student; logits and targets of the teacher.
    cls = (2 + student.L) * student.B * K * (compute + 4 + 4) + 2 * student.B * K * (compute + 4)
    # Patches: with our kernels only the logits of both, since the gradient takes the student's place.
    patches = student.M * K_ibot * (2 * compute if half else 6 * compute)
    return cls + patches


def memory_bytes(student, cfg, gpus, half, teacher=None):
    """-> {what it holds: bytes} on one GPU. A frozen teacher (distillation) comes on top of the average."""
    compute = 2 if half else 4
    size = count_parameters(student.model)
    units = [*student.model.backbone.blocks, student.model.dino_head]
    largest = max(count_parameters(unit) for unit in units)
    gathered = 0
    if gpus > 1:
        gathered = 2 * compute * largest
    elif half:  # autocast keeps a copy of every weight
        gathered = compute * size
    parts = {
        "student, fp32 shard": 4 * size / gpus,
        "teacher, fp32 shard": 4 * size / gpus,
        "gradients": 4 * size / gpus,
        "AdamW": 8 * size / gpus,
        "gathered layers": gathered,
        "activations": activation_bytes(student, half, cfg.speed.checkpointing),
        "logits and targets": logits_bytes(student, cfg, half),
        "images": sum(count * patches * 3 * student.patch_size**2 * 4 for count, patches in student.crops),
    }
    if teacher:
        parts["frozen teacher, fp32 shard"] = 4 * count_parameters(teacher.model) / gpus
    return parts


def plan_run(cfg, gpus, mfu, tflops, memory):
    """-> the lines to print."""
    student = Workload(cfg)
    teacher = None
    if cfg.train.distill_from:
        teacher = Workload(config.load(Path(cfg.train.distill_from) / "config.yaml"))
    half = cfg.compute_precision.dtype != "fp32"
    accumulate = cfg.train.accumulate
    flops = step_flops(student, teacher)
    parts = memory_bytes(student, cfg, gpus, half, teacher)
    size = count_parameters(student.model)
    backbone = count_parameters(student.model.backbone)
    images = student.B * gpus * accumulate
    total_flops = accumulate * sum(flops.values())
    seconds = total_flops / (mfu * tflops * 1e12)
    steps = total_steps(cfg)
    hours = steps * seconds / 3600
    lines = [
        f"{size:,} parameters: backbone {backbone:,}, heads {size - backbone:,}",
        f"{images:,} images per step on {gpus} GPUs",
        f"on each {student.tokens(student.crops):,} tokens of the student, "
        f"and about {student.M:,} masked patches",
        "",
        "memory of one GPU, GB",
        *(f"  {name:26s}{part / 1e9:8.2f}" for name, part in parts.items()),
        f"  {'together':26s}{sum(parts.values()) / 1e9:8.2f}   of {memory:g}",
        "",
        "work of one GPU in a step, TFLOP",
        *(f"  {name:26s}{accumulate * part / 1e12:8.2f}" for name, part in flops.items()),
        f"  per image {total_flops / (student.B * accumulate) / 1e9:,.1f} GFLOP",
    ]
    if gpus > 1:
        traffic = accumulate * traffic_bytes(student, teacher or student, gpus, half)
        lines.append(f"  traffic {traffic / 1e9:.1f} GB: {traffic / seconds / 1e9:.0f} GB/s at that speed")
    lines += [
        "",
        f"at {mfu:.0%} of {tflops:g} TFLOP/s: {seconds:.2f} s per step, {images / seconds:,.0f} images/s, "
        f"{hours:,.1f} hours for {steps:,} steps, {hours * gpus:,.0f} GPU-hours",
    ]
    if sum(parts.values()) > 0.9 * memory * 1e9:
        lines += ["", "warning: this will not fit (allocator and NCCL need a tenth): try more gpus, a smaller"
                  " train.batch_size_per_gpu with train.accumulate, or speed.checkpointing=full"]  # fmt: skip
    return lines


def traffic_bytes(student, teacher, gpus, half):
    """Bytes that one GPU receives in a micro-batch: weights, then gradients in fp32."""
    size = count_parameters(student.model)
    gathered = 2 * size + count_parameters(teacher.model)  # twice for the student, once for the teacher
    return (gpus - 1) / gpus * (gathered * (2 if half else 4) + 4 * size)


def parse_args(argv):
    """-> argparse's namespace, the settings of this script, those of train.py."""
    parser = argparse.ArgumentParser(
        "python -m tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="laptop", help="a preset: configs/NAME.yaml")
    parser.add_argument("--config", default=None, help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value",
                        help="settings of train.py, and gpus=, mfu=, tflops=, memory=")  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    settings = dict(PLAN_SETTINGS)
    overrides = []
    for text in args.overrides:
        name, _, value = text.partition("=")
        if "." not in name and name not in PLAN_SETTINGS:
            near = get_close_matches(name, PLAN_SETTINGS, n=1, cutoff=0)[0]
            raise UserError(f"there is no setting {name} of a plan; the nearest is {near}")
        if name in PLAN_SETTINGS:
            try:
                settings[name] = config.convert(PLAN_KINDS[name], value)
            except ValueError as e:
                raise UserError(f"{name} is {value!r}, but must be {e}") from None
        else:
            overrides.append(text)
    return args, settings, overrides


def main(argv=None):
    args, settings, overrides = parse_args(argv)
    cfg = config.load(args.config, args.model if not args.config else None, overrides)
    print("\n".join(plan_run(cfg, **settings)))


if __name__ == "__main__":
    config.run(main)
