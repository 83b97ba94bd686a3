"""Photos in, one web page out: point at a patch and see where the network finds something like it.

    python explore.py scenes:4:seed=1 --weights runs/laptop          # explore.html; no photos needed
    python explore.py a.jpg b.jpg --weights dinov2_vits14_reg4 --download --out ab.html

The page works by mouse, finger and arrow keys. It shows the cosine of the chosen patch to all patches of all
photos; what [CLS] and each register attend to (last block, by head); and principal components as colours. It
is one file that opens from the disk and loads nothing: it can be mailed, or lie on a school's server. Its
HTML, style and script are assets/explore.html.

What is unusual here: the patch tokens themselves are in the page, and it computes the cosines. A token is
stored as a unit vector in steps of 1/127, a byte for each number, and zlib takes out what such bytes leave
unused. So the error has a standard deviation of about sqrt(2/12)/127 = 0.003, whatever the weights and the
width; the largest, of some 500 patches with all, is measured each time, printed, and stands on the page.

    python explore.py scenes:2 --weights random:dinov2_vits14_reg4

says 0.016, and 0.9 MB for these two squares of 37 x 37 patches; two photos of 37 x 56 stay below 2 MB (a
slow test). Size grows by photos, patches and width alike.
"""

import argparse
import base64
import io
import json
import math
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import config
from config import UserError
from evals.visualize import MOST, RAMP, attention_of, patch_tokens, pca_colors, ready, sample, token_name
from model import describe_backbone
from runfolder import atomic_write_text
from sources import open_images
from tools.weights import add_weights_args, open_backbone

PAGE = Path(__file__).parents[1] / "assets" / "explore.html"
COUNT = 8  # photos, unless --count says


def packed(x):
    """A tensor of bytes -> text: zlib, then base64. Browsers undo both by themselves (since 2023)."""
    return base64.b64encode(zlib.compress(x.contiguous().numpy().tobytes(), 9)).decode()


def token_codes(tokens):
    """Patch tokens (N, D) -> int8 (N, D): their directions. The page divides by the lengths that rounding
    leaves, so a token has cosine 1 with itself."""
    return (F.normalize(tokens, dim=-1) * 127).round().to(torch.int8)


def largest_error(tokens, codes, some=500):
    """tokens, codes (N, D) -> the largest error of a cosine on the page, and how many pairs were compared:
    some patches, evenly spread, with all."""
    exact, coded = F.normalize(tokens, dim=-1), F.normalize(codes.float(), dim=-1)
    every = 1 + len(tokens) // some
    errors = exact[::every] @ exact.T - coded[::every] @ coded.T
    return errors.abs().max().item(), errors.numel()


def attention_codes(maps):
    """(heads, 1 + R, h, w) as of attention_of -> uint8 (1 + R, 1 + heads, N), and what the strongest patch
    and all patches get, (1 + R, 1 + heads) each. Before the heads comes their mean.

    255 is the strongest patch. Square roots are kept, because a few patches get nearly all of it.
    """
    maps = torch.cat([maps.mean(0, keepdim=True), maps]).transpose(0, 1).flatten(2)
    top = maps.amax(-1)
    codes = (maps / top[..., None].clamp(min=1e-12)).sqrt() * 255
    return codes.round().to(torch.uint8), top, maps.sum(-1)


def jpeg(x):
    """uint8 (3, H, W) -> a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def survey(backbone, images, names):
    """uint8 images (3, H, W) -> what the page knows of each (a list of dicts), the largest error of its
    cosines, and of how many pairs. Raises UserError if there are no finite tokens."""
    tokens = [patch_tokens(backbone, x) for x in images]  # (h, w, D) each
    every = torch.cat([t.flatten(0, 1) for t in tokens])
    if not every.isfinite().all():
        raise UserError("the tokens of this network are not finite: its weights are damaged")
    codes, lengths = token_codes(every), [t.shape[0] * t.shape[1] for t in tokens]
    colors = (pca_colors(every) * 255).round().to(torch.uint8)  # one colour means one thing in all photos
    photos = []
    for x, name, t, code, rgb in zip(images, names, tokens, codes.split(lengths), colors.split(lengths)):
        looks, top, total = attention_codes(attention_of(backbone, x))
        photos.append({
            "name": name, "photo": jpeg(x), "h": t.shape[0], "w": t.shape[1], "code": packed(code),
            "rgb": packed(rgb), "looks": packed(looks), "top": top.tolist(), "total": total.tolist(),
        })  # fmt: skip
    return photos, *largest_error(every, codes)


def page(photos, about, backbone):
    """-> the page as text. Names are those of files: as JSON without "<" they cannot become HTML."""
    tokens = [token_name(t) for t in range(1 + backbone.num_register_tokens)]
    heads = ["mean of all heads", *(f"head {i + 1}" for i in range(backbone.arch["num_heads"]))]
    known = dict(photos=photos, about=about, tokens=tokens, heads=heads, ramp=RAMP.tolist())
    known["D"] = backbone.arch["embed_dim"]
    return PAGE.read_text(encoding="utf-8").replace("{{known}}", json.dumps(known).replace("<", "\\u003c"))


def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("photos", nargs="+", help="images, folders, .tar shards, .jsonl lists; or one URI as scenes:4")
    add_weights_args(parser)
    add("--out", type=Path, default="explore.html", help="the page")
    add("--size", type=int, default=0, help="short side of what the network sees, in pixels (default: twice "
        "the evaluation's, or the native one if larger)")  # fmt: skip
    add("--count", type=int, default=COUNT, help="how many photos, evenly spread")
    args = parser.parse_intermixed_args()
    if args.out.suffix.lower() != ".html" or args.size < 0 or args.count < 1:
        raise UserError("--out must end in .html, and --size and --count must be positive")
    return args


def main():
    args = arguments()
    dataset = open_images(args.photos)
    backbone, cfg = open_backbone(args.weights, args.download)
    names, pictures = sample(dataset, args.count)
    photos, error, pairs = survey(backbone, ready(pictures, backbone, cfg, args.size), names)
    for photo in photos:
        full = photo["w"] * photo["h"] > 0.8 * MOST  # `fit` rounds both sides
        limit = f", near the {MOST:,} that a photo may have" if full else ""
        print(f"{photo['name']}: {photo['w']} x {photo['h']} patches{limit}")
    exact = f"Cosines are within {math.ceil(error * 1000) / 1000} of exact ones ({pairs:,} pairs compared)."
    text = page(photos, f"{args.weights}: {describe_backbone(backbone)}. {exact}", backbone)
    try:
        atomic_write_text(args.out, text)
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): name another --out") from None
    print(f"{exact}\nwrote {args.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    config.run(main)
