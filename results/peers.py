"""One step, one batch of crops: nanodino beside lightly's DINOv2 modules and the authors' code, on a CPU.

    pip install lightly==1.6.0 timm==1.0.31 torchvision==0.28.0 omegaconf fvcore
    git clone https://github.com/facebookresearch/dinov2 dinov2-authors
    python results/peers.py --authors dinov2-authors --out results/peers.json

`step`: forward, backward, AdamW and EMA of a ViT-S/16 with 65,536 prototypes on 8 images, 2 x 224 + 8 x 96
pixels of noise. lightly's step is made of its modules as its example combines them. The authors' needs
xFormers, which needs a GPU: its five functions are replaced by PyTorch's attention and indexing. The peers
compute in fp32 as they come, and in bf16 under autocast. `input`: a JPEG of 500 x 375 pixels to the same
crops, images/s of one core.

Every number comes from a process of its own, all of them in turn (A B C A B C); a ratio is the median over
the rounds. Expect a quarter of an hour.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import config  # noqa: E402
from data import MultiCropDataset, photometric, sample_masks  # noqa: E402
from decode import decode_image  # noqa: E402
from results.cpu_speed import VITS16, vits16_step  # noqa: E402
from runfolder import environment  # noqa: E402
from sources import Entry, ImageFiles  # noqa: E402
from tools.bench_input import photo  # noqa: E402
from tools.isolation import run_isolated  # noqa: E402

BATCH = 8  # images
GLOBALS = 2  # crops of an image
GLOBAL_SIZE = 224  # pixels
LOCALS = 8
LOCAL_SIZE = 96
PROTOTYPES = 65_536
TIMED_STEPS = 2  # after one to warm up
TIMED_BATCHES = 10  # of crops
PEERS = ("lightly", "timm", "torchvision")


def noise(views, size):
    return torch.randn(views * BATCH, 3, size, size)


def autocast(dtype):
    """bf16 for a program that is written in fp32; for fp32 itself, nothing."""
    if dtype == "fp32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", torch.bfloat16)


# ---------------------------------------------------------------- one step of each


def lightly_step(dtype):
    """The modules of lightly's example examples/pytorch/dinov2.py, combined as there."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
    from timm.models.vision_transformer import vit_small_patch16_224

    def build():
        vit = vit_small_patch16_224(pos_embed="learn", dynamic_img_size=True, init_values=1e-5)
        backbone = MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")
        head = DINOv2ProjectionHead(input_dim=384, output_dim=PROTOTYPES)
        return torch.nn.ModuleDict(dict(backbone=backbone, head=head))

    student = build()
    teacher = build().requires_grad_(False).eval()
    teacher.load_state_dict(student.state_dict())
    update_drop_path_rate(student["backbone"].vit, drop_path_rate=0.1, mode="uniform")
    dino = DINOLoss(output_dim=PROTOTYPES)
    ibot = IBOTPatchLoss(output_dim=PROTOTYPES)
    koleo = KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    def loss_of(global_views, local_views):
        images = len(global_views)
        side = GLOBAL_SIZE // 16
        blocks = random_block_mask(size=(images, side, side))
        mask = torch.zeros(images, 1 + side * side, dtype=torch.bool)
        mask[:, 1:] = blocks.flatten(1)
        with torch.no_grad():
            tokens = teacher["backbone"].encode(global_views)
            target = teacher["head"](tokens[:, 0])
            patch_target = teacher["head"](tokens[mask])
        tokens = student["backbone"].encode(global_views, mask=mask)
        global_cls = tokens[:, 0]
        patch_logits = student["head"](tokens[mask])
        local_cls = student["backbone"].encode(local_views, mask=None)[:, 0]
        logits = torch.cat([student["head"](global_cls), student["head"](local_cls)])
        dino_loss = dino(target.chunk(GLOBALS), logits.chunk(GLOBALS + LOCALS), teacher_temp=0.04)
        ibot_loss = ibot(patch_target, patch_logits, mask=blocks, teacher_temp=0.04)
        spread = sum(koleo(part) for part in global_cls.chunk(GLOBALS))
        return dino_loss + ibot_loss + 0.1 * spread

    def step():
        with autocast(dtype):
            loss = loss_of(noise(GLOBALS, GLOBAL_SIZE), noise(LOCALS, LOCAL_SIZE))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_momentum(student, teacher, m=0.992)

    return step


def authors_step(folder, dtype):
    """SSLMetaArch of the authors' code with the loop around it, without FSDP."""
    install_xformers_stand_in()
    torch.Tensor.cuda = lambda self, **options: self  # forward_backward moves its inputs to a GPU
    sys.path.insert(0, str(folder))
    from dinov2.train.ssl_meta_arch import SSLMetaArch
    from omegaconf import OmegaConf

    cfg = OmegaConf.load(folder / "dinov2/configs/ssl_default_config.yaml")
    cfg.student.arch = "vit_small"
    cfg.student.drop_path_rate = 0.1
    cfg.compute_precision.grad_scaler = False
    model = SSLMetaArch(cfg)
    for name, module in model.student.items():
        model.teacher[name].load_state_dict(module.state_dict())
    model.need_to_synchronize_fsdp_streams = False  # there is neither FSDP nor a stream
    model.train()
    optimizer = torch.optim.AdamW(model.get_params_groups(), lr=1e-3)
    student = list(model.student.parameters())
    teacher = list(model.teacher.parameters())
    ours = config.load(overrides=VITS16)
    number = itertools.count()

    def step():
        masks = sample_masks(ours, next(number), range(GLOBALS * BATCH), GLOBALS * BATCH)
        images = dict(
            collated_global_crops=noise(GLOBALS, GLOBAL_SIZE),
            collated_local_crops=noise(LOCALS, LOCAL_SIZE),
            collated_masks=masks["masks"],
            mask_indices_list=masks["mask_indices"],
            masks_weight=masks["mask_weights"],
            n_masked_patches=torch.tensor([len(masks["mask_indices"])]),
            upperbound=len(masks["mask_indices"]),
        )
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype):
            model.forward_backward(images, teacher_temp=0.04)
        for module in model.student.values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(teacher, 0.992)
            torch._foreach_add_(teacher, student, alpha=1 - 0.992)

    return step


class BlockDiagonalMask:
    """Sequences of several lengths in one row, as xFormers' class of this name describes them."""

    def __init__(self, lengths):
        self.lengths = lengths
        self._batch_sizes = [1] * len(lengths)  # the authors' code overwrites it

    from_seqlens = classmethod(lambda cls, lengths: cls(lengths))

    @classmethod
    def from_tensor_list(cls, rows):
        return cls([row.shape[1] for row in rows]), torch.cat(rows, dim=1)

    def split(self, row):
        """(1, all tokens, ...) -> a list of (sequences, tokens of one, ...)."""
        parts = []
        start = 0
        first = 0
        for sequences in self._batch_sizes:
            tokens = self.lengths[first]
            stop = start + sequences * tokens
            parts.append(row[0, start:stop].unflatten(0, (sequences, tokens)))
            start = stop
            first += sequences
        return parts


def install_xformers_stand_in():
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def memory_efficient_attention(q, k, v, attn_bias=None):
        if attn_bias is None:
            return attend(q, k, v)
        parts = zip(*(attn_bias.split(x) for x in (q, k, v)))
        return torch.cat([attend(*part).flatten(0, 1) for part in parts])[None]

    def scaled_index_add(x, index, source, scaling, alpha):
        return x.index_add(0, index, (source * scaling).to(x.dtype), alpha=alpha)

    def index_select_cat(sources, indices):
        return torch.cat([source[index].flatten() for source, index in zip(sources, indices)])

    ops = types.ModuleType("xformers.ops")
    ops.fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops.memory_efficient_attention = memory_efficient_attention
    ops.scaled_index_add = scaled_index_add
    ops.index_select_cat = index_select_cat
    ops.unbind = torch.unbind
    sys.modules["xformers"] = types.ModuleType("xformers")
    sys.modules["xformers.ops"] = ops


# ---------------------------------------------------------------- one batch of crops of each


def our_crops(path):
    dataset = MultiCropDataset(ImageFiles([Entry(path)]), config.load(overrides=VITS16))
    number = itertools.count()

    def crops():
        batch = dataset[next(number), 0]
        for views, colors in zip(batch["views"], batch["colors"]):
            photometric(views, colors)

    return crops


def lightly_crops(path):
    from lightly.transforms.dino_transform import DINOTransform

    transform = DINOTransform(global_crop_scale=(0.32, 1), local_crop_scale=(0.05, 0.32))
    return lambda: [transform(decode_image(path, path)) for _ in range(BATCH)]


def authors_crops(folder, path):
    sys.path.insert(0, str(folder))
    from dinov2.data.augmentations import DataAugmentationDINO

    transform = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), LOCALS)
    return lambda: [transform(decode_image(path, path)) for _ in range(BATCH)]


# ---------------------------------------------------------------- the comparison


def measure(make, calls, threads):
    """In a process of its own: seconds of a call, and the peak memory of the process in GiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    function = make()
    function()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = (time.perf_counter() - start) / calls
    return dict(seconds=seconds, peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def contestants(authors, path):
    """-> {(part, who): a function that measures it}."""
    steps = {}
    for dtype in ("fp32", "bf16"):
        steps[f"nanodino, {dtype}"] = partial(vits16_step, dtype)
        steps[f"lightly, {dtype}"] = partial(lightly_step, dtype)
        steps[f"authors, {dtype}"] = partial(authors_step, authors, dtype)
    crops = {
        "nanodino": partial(our_crops, path),
        "lightly": partial(lightly_crops, path),
        "authors": partial(authors_crops, authors, path),
    }
    all_cores = torch.get_num_threads()
    functions = {("step", who): partial(measure, make, TIMED_STEPS, all_cores) for who, make in steps.items()}
    for who, make in crops.items():
        functions["input", who] = partial(measure, make, TIMED_BATCHES, 1)
    return functions


def summarize(rounds):
    """Rounds of {(part, who): measured} -> rows, with the median ratio of each to ours in fp32."""
    rows = {}
    for part, who in rounds[0]:
        ours = (part, "nanodino, fp32" if part == "step" else "nanodino")
        measured = [outcomes[part, who] for outcomes in rounds]
        ratios = [outcomes[part, who]["seconds"] / outcomes[ours]["seconds"] for outcomes in rounds]
        rows[f"{part}: {who}"] = dict(
            seconds=statistics.median(row["seconds"] for row in measured),
            peak_gib=max(row["peak_gib"] for row in measured),
            ratio=statistics.median(ratios),
            lowest=min(ratios),
            highest=max(ratios),
        )
    return rows


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--authors", type=config.argument(Path), required=True, help="a clone of their code")
    parser.add_argument("--rounds", type=config.argument(config.Count), default=3)
    parser.add_argument("--out", type=config.argument(Path), help="a JSON file for the numbers")
    args = parser.parse_args()
    authors = args.authors.resolve()
    if not (authors / "dinov2/train/ssl_meta_arch.py").is_file():
        hint = "--help says how to make one"
        raise config.UserError(f"{args.authors} is no clone of facebookresearch/dinov2: {hint}.")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "photo.jpg"))
        photo().save(path, quality=90)
        functions = contestants(authors, path)
        for _ in range(args.rounds):
            outcomes = run_isolated(functions)
            for (part, who), outcome in outcomes.items():
                if outcome.failure:
                    raise config.UserError(f"{part} of {who}: {outcome.failure}")
            rounds.append({name: outcome.value for name, outcome in outcomes.items()})
    rows = summarize(rounds)
    for name, row in rows.items():
        time_and_rate = f"{row['seconds']:7.2f} s  {BATCH / row['seconds']:6.1f} images/s"
        ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f}-{row['highest']:.2f})"
        print(f"{name:24s} {time_and_rate}  {row['peak_gib']:.1f} GiB  {ratio} times ours, fp32")
    if args.out:
        machine = environment()
        facts = {name: machine[name] for name in ("cpu", "cpu_cores", "threads", "torch", "git_commit")}
        facts.update({name: importlib.metadata.version(name) for name in PEERS})
        commit = subprocess.run(["git", "-C", authors, "rev-parse", "HEAD"], capture_output=True, text=True)
        facts["authors_commit"] = commit.stdout.strip()
        args.out.write_text(json.dumps(dict(rows=rows, environment=facts), indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
