"""What a run will cost, before it runs: parameters, memory, FLOPs, traffic and hours, from the config alone.

    python plan.py --model vitg14 gpus=256
    python plan.py --model vitl14 gpus=8 train.batch_size_per_gpu=32 speed.checkpointing=full mfu=0.45

Besides the settings of train.py: `gpus`, `mfu` (the share of the peak that one expects to reach), `tflops`
(the peak of one GPU for 16-bit products, 989 for an H100 or H200) and `memory` (of one GPU, in GB).

What is unusual: nothing is allocated. FLOPs are those of the matrix products that the method needs (a
backward pass counts twice its forward pass; what checkpointing computes again does not count, though it takes
time). tests/test_plan.py holds FLOPs and bytes against what PyTorch counts in a real step. Hours are as good
as the MFU that you believe in: none is measured yet.
"""

import argparse
import math
from pathlib import Path

import torch

import config
from config import UserError
from model import DINOv2
from optim import total_steps

EXTRA = dict(gpus=1, mfu=0.4, tflops=989.0, memory=80.0)


class Shape:
    """The numbers of one micro-batch on one GPU that everything else follows from."""

    def __init__(self, cfg):
        with torch.device("meta"):
            self.model = DINOv2(cfg)
        arch, c, t = self.model.backbone.arch, cfg.crops, cfg.train
        self.D, self.depth, self.R = arch["embed_dim"], arch["depth"], arch["num_register_tokens"]
        self.p, self.B, self.L = cfg.student.patch_size, t.batch_size_per_gpu, c.local_crops_number
        self.keep = 1 - cfg.student.drop_path_rate
        patches = [(size // self.p) ** 2 for size in (c.global_crops_size, c.local_crops_size)]
        self.crops = [(2 * self.B, patches[0]), (self.L * self.B, patches[1])]  # (count, patches)
        low, high = cfg.ibot.mask_ratio_min_max
        self.M = round(2 * self.B * cfg.ibot.mask_sample_probability * (low + high) / 2 * patches[0])
        mlp = self.model.backbone.blocks[0].mlp
        self.hidden = sum(x.weight.numel() for x in mlp.children()) // self.D  # rows of all its matrices

    def size(self):
        return sum(x.numel() for x in self.model.parameters())

    def tokens(self, crops):
        return sum(count * (1 + self.R + n) for count, n in crops)

    def backbone_flops(self, crops, keep=1.0):
        """Forward: a product of (a, b) and (b, c) matrices is 2 a b c."""
        linear = self.tokens(crops) * 2 * self.D * (4 * self.D + self.hidden)
        attention = sum(4 * count * (1 + self.R + n) ** 2 * self.D for count, n in crops)
        embedding = sum(2 * count * n * 3 * self.p**2 * self.D for count, n in crops)
        return embedding, self.depth * keep * (linear + attention)

    def head_flops(self, cls, patches):
        def size(head):
            matrices = ("weight", "weight_v")
            return sum(x.numel() for name, x in head.named_parameters() if name.endswith(matrices))

        dino, ibot = self.model.dino_head, getattr(self.model, "ibot_head", self.model.dino_head)
        return 2 * (cls * size(dino) + patches * size(ibot))


def flops(shape, teacher=None):
    """-> FLOPs of one micro-batch on one GPU: {teacher, student, heads}; `teacher` when it is distilled."""
    s, t, (globals_, _) = shape, teacher or shape, shape.crops
    embedding, blocks = s.backbone_flops(s.crops, s.keep)
    heads = 3 * s.head_flops((2 + s.L) * s.B, s.M) + t.head_flops(2 * s.B, s.M)
    return dict(
        teacher=sum(t.backbone_flops([globals_])), student=2 * embedding + 3 * blocks, heads=heads
    )  # images need no gradient


def activations(shape, half, checkpointing):
    """Bytes that the student's forward pass keeps for its backward pass, all blocks together."""
    s, tokens = shape, shape.tokens(shape.crops)
    two, four = (2, 4) if half else (4, 4)
    # What a token leaves behind in a block: of D numbers two inputs of norms in fp32; in the compute type two
    # inputs of linears, q, k, v, the attention's output, two of LayerScale and, with drop path, two of its
    # scaling; and what is inside the MLP: 4 D twice, or with SwiGLU four times its width.
    swiglu = hasattr(s.model.backbone.blocks[0].mlp, "w12")
    inner = (s.hidden * 4 // 3 if swiglu else s.hidden) * two
    block = s.D * (2 * four + (2 + 3 + 1 + 2 + 2 * (s.keep < 1)) * two) + inner
    kept = dict(off=block, full=s.D * four, selective=s.D * (four + 5 * two) + inner // 2)[checkpointing]
    return int(
        tokens * (s.keep * s.depth * kept if checkpointing == "off" else s.depth * kept + s.keep * block)
    )


def memory(shape, cfg, gpus, half, teacher=None):
    """-> bytes on one GPU, by what they hold. In distillation the student's average is there besides."""
    s, P = shape, shape.size()
    frozen = {"frozen teacher, fp32 shard": 4 * teacher.size() / gpus} if teacher else {}
    K, wide = cfg.dino.head_n_prototypes, 2 if half else 4
    Ki = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else K
    largest = max(
        sum(x.numel() for x in u.parameters()) for u in (*s.model.backbone.blocks, s.model.dino_head)
    )
    # [CLS]: logits, fp32 copy and log-probabilities of the student; logits and targets of the teacher.
    # Patches: with our kernels only the logits of both, since the gradient takes the student's place.
    cls = (2 + s.L) * s.B * K * (wide + 4 + 4) + 2 * s.B * K * (wide + 4)
    patches = s.M * Ki * (2 * wide if half else 6 * wide)
    return {
        "student, fp32 shard": 4 * P / gpus, "teacher, fp32 shard": 4 * P / gpus, "gradients": 4 * P / gpus,
        "AdamW": 8 * P / gpus, "gathered layers": 2 * wide * largest if gpus > 1 else wide * P * half,
        "activations": activations(s, half, cfg.speed.checkpointing), "logits and targets": cls + patches,
        "images": sum(count * n * 3 * s.p**2 * 4 for count, n in s.crops), **frozen,
    }  # fmt: skip


def plan(cfg, gpus, mfu, tflops, memory_gb):
    """-> the lines to print."""
    s, half, run = Shape(cfg), cfg.compute_precision.dtype != "fp32", Path(cfg.train.distill_from)
    teacher = Shape(config.load(run / "config.yaml")) if cfg.train.distill_from else None
    P, work = s.size(), flops(s, teacher)
    parts, total = memory(s, cfg, gpus, half, teacher), 0
    steps = total_steps(cfg)
    images = s.B * gpus * cfg.train.accumulate
    step = cfg.train.accumulate * sum(work.values())
    seconds = step / (mfu * tflops * 1e12)
    backbone = sum(x.numel() for x in s.model.backbone.parameters())
    lines = [f"{P:,} parameters: backbone {backbone:,}, heads {P - backbone:,}"]
    lines += [f"{images:,} images per step on {gpus} GPUs"]
    lines += [f"on each {s.tokens(s.crops):,} tokens of the student, and about {s.M:,} masked patches"]
    lines += ["", "memory of one GPU, GB"]
    for name, size in parts.items():
        lines.append(f"  {name:26s}{size / 1e9:8.2f}")
        total += size
    lines += [
        f"  {'together':26s}{total / 1e9:8.2f}   of {memory_gb:g}",
        "",
        "work of one GPU in a step, TFLOP",
    ]
    lines += [f"  {name:26s}{cfg.train.accumulate * w / 1e12:8.2f}" for name, w in work.items()]
    lines += [f"  per image {step / (s.B * cfg.train.accumulate) / 1e9:,.1f} GFLOP"]
    if gpus > 1:  # gathered twice for the student and once for the teacher, then the gradients in fp32
        gathered = 2 * P + (teacher or s).size()
        traffic = cfg.train.accumulate * (gpus - 1) / gpus * (gathered * (2 if half else 4) + 4 * P)
        lines += [f"  traffic {traffic / 1e9:.1f} GB: {traffic / seconds / 1e9:.0f} GB/s at that speed"]
    hours = steps * seconds / 3600
    lines += ["", f"at {mfu:.0%} of {tflops:g} TFLOP/s: {seconds:.2f} s per step, {images / seconds:,.0f} "
              f"images/s, {hours:,.1f} hours for {steps:,} steps, {hours * gpus:,.0f} GPU-hours"]  # fmt: skip
    if total > 0.9 * memory_gb * 1e9:
        lines += ["", "warning: this will not fit (allocator and NCCL need a tenth): try more gpus, a smaller"
                  " train.batch_size_per_gpu with train.accumulate, or speed.checkpointing=full"]  # fmt: skip
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="laptop", help="a preset: configs/NAME.yaml")
    parser.add_argument("--config", default=None, help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings; gpus=, mfu=, tflops=, memory="
    )
    args = parser.parse_intermixed_args(argv)
    extra, rest = dict(EXTRA), []
    for text in args.overrides:
        name, _, value = text.partition("=")
        if name not in EXTRA:
            rest.append(text)
            continue
        try:
            extra[name] = type(EXTRA[name])(value)
        except ValueError:
            extra[name] = 0
        if not (extra[name] > 0 and math.isfinite(extra[name])):
            raise UserError(f"{name} is {value!r}, but must be a number above 0")
    cfg = config.load(args.config, args.model if not args.config else None, rest)
    print("\n".join(plan(cfg, extra["gpus"], extra["mfu"], extra["tflops"], extra["memory"])))


if __name__ == "__main__":
    config.run(main)
