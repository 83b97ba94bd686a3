"""Lab 4: what registers are for, and why a small model cannot show it.

    python labs/lab4_registers.py               # two holes: outliers, attention_shares
    python labs/lab4_registers.py --solution    # ours
    python labs/lab4_registers.py --weights dinov2_vitl14,dinov2_vitl14_reg4 --photos photos/

A small model has none of the artifacts that registers remove, and the lab says so. It plants some, to show
that the rule finds them. Expect two trainings of 100 steps, five checks, two tables and runs/labs/lab4.png.
"""

from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from workbench import knn_top1, print_table, run_lab, run_trial, save_png

import model
from data import normalize
from evals import visualize
from evals.patch_maps import patch_attention, patch_norms
from evals.tiles import attention_tile, contact_sheet, image_tile
from evals.visualize import load_photos, norm_tiles, prepare_images
from kernels.attention import split_groups
from sources import open_images
from tools.weights import open_backbone

R = 4  # registers
REGISTERS = 1  # row and column of attention_shares()
PATCHES = 2


def outliers(norms, arch):
    """Norms (n,) -> the share of tokens that are longer than a limit, and the limit: two floats.

    limit = max(median + 10 * 1.4826 * MAD, 2 * median); MAD is the median of |norm - median|. In a bell curve
    1.4826 MAD is the standard deviation; a few outliers do not move it. You will not need arch.
    """
    raise NotImplementedError("hole 1 in outliers(): limit = max(median + 10 * 1.4826 * MAD, 2 * median)")


def attention_shares(maps, registers):
    """Who looks at whom: attention maps (B, H, T, T), rows sum to 1 -> (3, 3).

    Tokens are [CLS], `registers` registers, patches, in this order. Entry (a, b): the share of its attention
    that a token of kind a gives, on average, to all tokens of kind b together; the kinds are [CLS],
    registers, patches. Without registers row 1 is NaN and column 1 is 0.
    """
    raise NotImplementedError("hole 2 in attention_shares(): per kind, sum the columns, average the rows")


def check_holes(checker, seed):
    rng = torch.Generator().manual_seed(seed)
    norms = torch.cat([torch.randn(970, generator=rng) + 7, torch.full((30,), 70.0)])
    share, _ = outliers(norms, None)
    limit = norms.mean() + 10 * norms.std()  # outliers move a mean and a standard deviation
    usual_share = (norms > limit).float().mean().item()
    checker.check("hole 1 finds 3 %", share, usual_share, 0.0299, 0.0301, instant=True)

    maps = torch.rand(2, 3, 21, 21, generator=rng).mul(5).softmax(-1)
    truth = maps[:, :, 1 + R :, 1 : 1 + R].mean() * R  # from patches to registers
    shares = [attention_shares(x, R)[PATCHES, REGISTERS] for x in (maps, maps.transpose(2, 3))]
    errors = [abs(share - truth).item() for share in shares]
    checker.check("hole 2 is off by", *errors, high=1e-5, instant=True)


# ---------------------------------------------------------------- are there outliers?


class Norms(NamedTuple):
    """Norms of the patch tokens of some images, before the final norm of the network."""

    values: torch.Tensor  # (n,) of all tokens
    tiles: list  # maps of the first three images
    histogram: Image.Image


def measure_norms(title, backbone, images):
    norms = [patch_norms(backbone, image) for image in images]
    histogram, summary = visualize.norm_summary(norms, backbone.arch)  # it calls your outliers()
    print(f"{title}: {summary}")
    tiles, _ = norm_tiles(norms[:3], images)
    return Norms(torch.cat([norm.flatten() for norm in norms]), tiles, histogram)


def plant_outliers(block, inputs, tokens):
    """A hook for the last block: of tokens (T, D) of one image, two patches become ten times as long."""
    tokens = tokens.clone()
    first_patch = 1 + R
    chosen = torch.randperm(len(tokens) - first_patch)[:2] + first_patch
    tokens[chosen] *= 10
    return tokens


def find_outliers(checker, args, without, with_registers, images):
    """Norms of both networks, and of the second one with planted outliers -> {row of the table: Norms}."""
    found = {
        "0 registers": measure_norms("0 registers", without, images),
        f"{R} registers": measure_norms(f"{R} registers", with_registers, images),
    }
    torch.manual_seed(args.seed)
    hook = with_registers.blocks[-1].register_forward_hook(plant_outliers)
    found[f"{R}, planted"] = measure_norms(f"{R} registers, planted", with_registers, images)
    hook.remove()
    for name in filter(None, args.weights.split(",")):
        backbone, cfg = open_backbone(name)
        photos = open_images([args.photos or "scenes:16:size=256"])
        measure_norms(name, backbone, prepare_images(load_photos(photos, 16)[1], backbone, cfg, 0))
    shares = [outliers(norms.values, without.arch)[0] for norms in found.values()]
    checker.check("share of outliers, none planted", max(shares[:2]), shares[2], high=0.001)
    results = {}
    for (name, norms), share in zip(found.items(), shares):
        results[name] = {"longest / median": norms.values.max() / norms.values.median(), "outliers": share}
    print_table("norms", results)
    return found


# ---------------------------------------------------------------- are registers used?


def hidden_registers(qkv, groups, scale=None):
    """The real attention, but nobody sees the registers: their keys and values are left out."""
    outputs = []
    for q, k, v in split_groups(qkv, groups):
        seen = [0, *range(1 + R, k.shape[2])]
        out = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def attention_to_registers(backbone, images):
    maps = backbone.attention_maps(normalize(torch.stack(images)))
    return attention_shares(maps, backbone.num_register_tokens)[PATCHES, REGISTERS].item()


def register_gradient(args):
    """After one step: the length of the registers' gradient over that of [CLS]."""
    trial = run_trial(args, f"student.num_register_tokens={R}", steps=1)
    student = trial.state.student.backbone
    return (student.register_tokens.grad.norm() / student.cls_token.grad.norm()).item()


def use_registers(checker, args, trials, images):
    without, with_registers = trials
    with torch.no_grad():
        attention = [attention_to_registers(trial.backbone, images) for trial in (with_registers, without)]
    checker.check("attention of patches to registers", *attention, low=0.02)
    gradient = register_gradient(args)
    with patch.object(model, "attention", hidden_registers):
        knn_hidden = knn_top1(with_registers, args)
        gradient_hidden = register_gradient(args)
    checker.check("gradient of registers over that of [CLS]", gradient, gradient_hidden, low=0.5)
    rows = {
        "0 registers": (attention[1], 0.0, knn_top1(without, args)),
        f"{R} registers": (attention[0], gradient, knn_top1(with_registers, args)),
        f"{R}, cut off": (0.0, gradient_hidden, knn_hidden),
    }
    columns = ("attention", "gradient", "k-NN")
    print_table("use", {name: dict(zip(columns, numbers)) for name, numbers in rows.items()})


def draw(found, without, with_registers, images):
    """Histograms; below them, for three images, maps of norms and of what [CLS] and registers look at."""
    rows = [[norms.histogram for norms in found.values()]]
    for image, *norm_maps in zip(images, *(norms.tiles for norms in found.values())):
        plain = patch_attention(without, image).mean(0)  # (1, h, w)
        maps = patch_attention(with_registers, image).mean(0)  # (1 + R, h, w)
        looks = [attention_tile(x, image) for x in (plain[0], maps[0], maps[1], maps[R])]
        rows.append([image_tile(image), *norm_maps, *looks])
    columns = ["", "norms, 0", f"norms, {R}", "planted", "[CLS], 0", f"[CLS], {R}", "register 1", "the last"]
    return contact_sheet(rows, captions=[list(found), columns, columns, columns])


def main(checker, args):
    check_holes(checker, args.seed)
    trials = [run_trial(args, f"student.num_register_tokens={r}", steps=100) for r in (0, R)]
    without, with_registers = (trial.backbone for trial in trials)
    count = 3 if args.short else 64
    _, pictures = load_photos(open_images([f"scenes:{count}:seed=12"]), count)
    images = prepare_images(pictures, with_registers, trials[1].cfg, 64)
    with patch.object(visualize, "outliers", outliers):
        found = find_outliers(checker, args, without, with_registers, images)
    use_registers(checker, args, trials, images)
    save_png(draw(found, without, with_registers, images), "lab4.png")


if __name__ == "__main__":
    flags = [
        ("--weights", "measure these networks, too: released names or files, with commas"),
        ("--photos", "on these photos instead of scenes: a folder"),
    ]
    run_lab(main, __doc__, ["outliers", "attention_shares"], globals(), flags)
