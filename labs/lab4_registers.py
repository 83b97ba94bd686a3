"""Lab 4: what registers are for, and why a small model cannot show it.

    python labs/lab4_registers.py               # two holes: outliers, who_looks
    python labs/lab4_registers.py --solution    # ours
    python labs/lab4_registers.py --weights dinov2_vitl14,dinov2_vitl14_reg4 --photos photos/

What is unusual here: the artifacts are not there, and the lab says so. It plants some, to see that the rule
would find them. Expect two trainings of 100 steps, five checks, two tables and runs/labs/lab4.png.
"""

from unittest.mock import patch

import torch
import torch.nn.functional as F
from workbench import knn, run, save, table, trial

import model
from data import normalize
from evals import visualize
from evals.visualize import attention_of, attention_tile, norm_tiles, page, patch_norms, ready, sample, tile
from features import open_backbone
from kernels.attention import split
from sources import open_images

R = 4  # registers


def outliers(norms, arch):
    """Norms (n,) -> the share of tokens that are longer than a limit, and the limit: two floats.

    limit = max(median + 10 * 1.4826 * MAD, 2 * median); MAD is the median of |norm - median|. In a bell curve
    1.4826 MAD is the standard deviation; a few outliers do not move it. You will not need arch.
    """
    raise NotImplementedError("hole 1 in outliers(): limit = max(median + 10 * 1.4826 * MAD, 2 * median)")


def who_looks(maps, r):
    """Attention maps (B, H, T, T), rows sum to 1, tokens in the order [CLS], r registers, patches -> (3, 3).

    Entry (a, b): of the attention that a token of kind a gives (on average), all tokens of kind b together
    get this share. Kinds are [CLS], registers, patches. With r = 0, row 1 is NaN and column 1 is 0.
    """
    raise NotImplementedError("hole 2 in who_looks(): per kind, sum over its columns, mean over its rows")


def cut(qkv, groups, scale=None):
    """The real attention, but nobody sees the registers: their keys and values are left out."""
    outs = []
    for q, k, v in split(qkv, groups):
        seen = [0, *range(1 + R, k.shape[2])]
        out = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def plant(block, inputs, x):
    """A hook for the last block: x (T, D) of one image; two of its patch tokens become ten times as long."""
    x = x.clone()
    x[torch.randperm(len(x) - 1 - R)[:2] + 1 + R] *= 10
    return x


def measure(title, backbone, images):
    """-> norms of the patch tokens before the final norm (n,), their maps in three images, a histogram."""
    norms = [patch_norms(backbone, x) for x in images]
    chart, said = visualize.norm_summary(norms, backbone.arch)  # it asks your outliers()
    print(f"{title}: {said}")
    return torch.cat([n.flatten() for n in norms]), norm_tiles(norms[:3], images)[0], chart


def main(desk, seed, short):
    rng = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(970, generator=rng) + 7, torch.full((30,), 70.0)])
    usual = (x > x.mean() + 10 * x.std()).float().mean().item()  # outliers move a mean and a deviation
    desk.check("hole 1 finds 3 %", outliers(x, None)[0], usual, 0.0299, 0.0301, instant=True)
    maps = torch.rand(2, 3, 21, 21, generator=rng).mul(5).softmax(-1)
    truth = maps[:, :, 1 + R :, 1 : 1 + R].mean() * R  # how patches look at registers
    off = [abs(who_looks(m, R)[2, 1] - truth).item() for m in (maps, maps.transpose(2, 3))]
    desk.check("hole 2 is off by", *off, high=1e-5, instant=True)
    steps, count, limit, small = (2, 3, 30, ["train.batch_size_per_gpu=8"]) if short else (100, 64, 0, [])
    runs = [trial(f"student.num_register_tokens={r}", *small, steps=steps, seed=seed) for r in (0, R)]
    none, four = (one.t.ema.backbone for one in runs)
    images = ready(sample(open_images([f"scenes:{count}:seed=12"]), count)[1], four, runs[1].cfg, 64)
    with patch.object(visualize, "outliers", outliers):
        found = [measure("0 registers", none, images), measure(f"{R} registers", four, images)]
        torch.manual_seed(seed)
        hook = four.blocks[-1].register_forward_hook(plant)
        norms, maps, charts = zip(*found, measure(f"{R} registers, planted", four, images))
        hook.remove()
        for name in filter(None, desk.args.weights.split(",")):
            (b, cfg), photos = open_backbone(name), open_images([desk.args.photos or "scenes:16:size=256"])
            measure(name, b, ready(sample(photos, 16)[1], b, cfg, 0))
    shares = [outliers(n, none.arch)[0] for n in norms]
    desk.check("share of outliers, none planted", max(shares[:2]), shares[2], high=0.001)
    with torch.no_grad():
        pixels = normalize(torch.stack(images))
        looks = [who_looks(b.attention_maps(pixels), r)[2, 1].item() for b, r in ((none, 0), (four, R))]
    desk.check("attention of patches to registers", *looks[::-1], low=0.02)
    score, setting = [knn(one, limit) for one in runs], f"student.num_register_tokens={R}"
    first = [trial(setting, *small, steps=1, seed=seed)]
    with patch.object(model, "attention", cut):
        score.append(knn(runs[1], limit))
        first.append(trial(setting, *small, steps=1, seed=seed))
    students = [one.t.student.backbone for one in first]  # after one step
    grads = [(s.register_tokens.grad.norm() / s.cls_token.grad.norm()).item() for s in students]
    desk.check("gradient of registers over that of [CLS]", *grads, low=0.5)
    names, longest = ["0 registers", f"{R} registers", f"{R}, planted"], [n.max() / n.median() for n in norms]
    table(["norms", "longest / median", "outliers"], *zip(names, longest, shares))
    sheet = [charts]
    for x, *own in zip(images, *maps):
        a, b = (attention_of(y, x).mean(0) for y in (none, four))  # (1, h, w), (1 + R, h, w)
        sheet.append([tile(x), *own, *(attention_tile(m, x) for m in (a[0], *b[[0, 1, R]]))])
    texts = ["", "norms, 0", f"norms, {R}", "planted", "[CLS], 0", f"[CLS], {R}", "register 1", "the last"]
    save(page(sheet, None, [names, texts, texts, texts]), "lab4.png")
    rows = zip([*names[:2], f"{R}, cut off"], [*looks, 0.0], [0.0, *grads], score)
    table(["use", "attention", "gradient", "k-NN"], *rows)


if __name__ == "__main__":
    flags = [("--weights", "released ones, with commas between"), ("--photos", "what they look at")]
    run(main, __doc__, ["outliers", "who_looks"], globals(), flags)
