"""Photos in, one web page out: point at a patch and see where the network finds something like it.

    python -m evals.explore scenes:4:seed=1 --weights runs/laptop      # explore.html; no photos needed
    python -m evals.explore photo.jpg other.jpg --weights dinov2_vits14_reg4 --download --out photos.html

The page works with a mouse, a finger or the arrow keys. It shows the cosine similarity of the chosen patch to
all patches of all photos; what [CLS] and each register attend to (last block, by head); and principal
components as colours. It is one file that opens from the disk and loads nothing, so it can be mailed, or put
on a school's server. Its HTML, style and script are assets/explore.html.

The page holds the patch tokens themselves and computes the cosines from them. A token is stored as a unit
vector in steps of 1/127, one byte per number, and zlib removes what such bytes leave unused. The error of a
cosine then has a standard deviation of about sqrt(2/12)/127 = 0.003, whatever the weights and the width. The
largest error, of some 500 patches with all, is measured each time, printed, and stated on the page.

    python -m evals.explore scenes:2 --weights random:dinov2_vits14_reg4

gives 0.016, and 0.9 MB for these two squares of 37 x 37 patches; two photos of 37 x 56 stay below 2 MB (a
slow test). The size grows with photos, patches and width alike.
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

import config
from config import UserError
from evals.patch_maps import patch_attention, patch_tokens, pca_colors
from evals.tiles import COLORMAP, to_pil
from evals.visualize import MAX_PATCHES, add_photo_args, load_photos, prepare_images, token_name
from features import apply_reading_args
from model import describe_backbone
from runfolder import atomic_write_text
from sources import open_images
from tools.weights import add_weights_args, open_backbone

TEMPLATE = Path(__file__).parents[1] / "assets" / "explore.html"
MAX_CODE = 127  # of a number of a unit vector, as a signed byte
CHECKED_PATCHES = 500  # whose cosines are compared with exact ones


def compress_bytes(x):
    """A tensor of bytes -> text: zlib, then base64. Browsers undo both by themselves (since 2023)."""
    return base64.b64encode(zlib.compress(x.contiguous().numpy().tobytes(), 9)).decode()


def quantize_tokens(tokens):
    """Patch tokens (N, D) -> int8 (N, D): their directions.

    The page divides by the lengths that rounding leaves, so a token has cosine 1 with itself.
    """
    return (F.normalize(tokens, dim=-1) * MAX_CODE).round().to(torch.int8)


def largest_cosine_error(tokens, codes):
    """tokens, codes (N, D) -> the largest error of a cosine on the page, and how many pairs were compared:
    about CHECKED_PATCHES of them, evenly spread, with all."""
    exact = F.normalize(tokens, dim=-1)
    coded = F.normalize(codes.float(), dim=-1)
    stride = 1 + len(tokens) // CHECKED_PATCHES
    errors = exact[::stride] @ exact.T - coded[::stride] @ coded.T
    return errors.abs().max().item(), errors.numel()


def quantize_attention(maps):
    """(H, 1 + R, h, w), as patch_attention gives -> uint8 (1 + R, 1 + H, N), and what the strongest patch and
    all patches together get, (1 + R, 1 + H) each. The mean of all heads comes first.

    255 is the strongest patch. Square roots are kept, because a few patches get nearly all of it.
    """
    maps = torch.cat([maps.mean(0, keepdim=True), maps]).transpose(0, 1).flatten(2)  # (1 + R, 1 + H, N)
    strongest = maps.amax(-1)
    codes = (maps / strongest[..., None].clamp(min=1e-12)).sqrt() * 255
    return codes.round().to(torch.uint8), strongest, maps.sum(-1)


def jpeg_url(pixels):
    """uint8 (3, H, W) -> a data: URL."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def encode_photos(backbone, images, names):
    """uint8 images (3, H, W) -> what the page knows of each (a list of dicts), the largest error of its
    cosines, and over how many pairs. Raises UserError if a token is not finite."""
    token_maps = [patch_tokens(backbone, image) for image in images]  # (h, w, D) each
    tokens = torch.cat([token_map.flatten(0, 1) for token_map in token_maps])
    if not tokens.isfinite().all():
        raise UserError("the tokens of this network are not finite: its weights are damaged")
    counts = [token_map.shape[0] * token_map.shape[1] for token_map in token_maps]
    codes = quantize_tokens(tokens)
    colors = (pca_colors(tokens) * 255).round().to(torch.uint8)  # one colour means one thing in all photos
    photos = []
    for i, (own_codes, own_colors) in enumerate(zip(codes.split(counts), colors.split(counts))):
        attention, strongest, total = quantize_attention(patch_attention(backbone, images[i]))
        height, width, _ = token_maps[i].shape
        photo = dict(name=names[i], photo=jpeg_url(images[i]), h=height, w=width)
        photo["code"] = compress_bytes(own_codes)
        photo["rgb"] = compress_bytes(own_colors)
        photo["attention"] = compress_bytes(attention)
        photo["top"] = strongest.tolist()
        photo["total"] = total.tolist()
        photos.append(photo)
    return photos, *largest_cosine_error(tokens, codes)


def render_page(photos, about, backbone):
    """-> the HTML. Names are those of files: as JSON without "<" they cannot become markup."""
    heads = range(1, 1 + backbone.arch["num_heads"])
    known = dict(
        photos=photos,
        about=about,
        tokens=[token_name(t) for t in range(1 + backbone.num_register_tokens)],
        heads=["mean of all heads", *[f"head {head}" for head in heads]],
        ramp=COLORMAP.tolist(),
        D=backbone.arch["embed_dim"],
    )
    data = json.dumps(known).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{known}}", data)


def parse_args():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evals.explore", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("photos", nargs="+", help="images, folders, .tar shards, .jsonl lists; or one URI such as scenes:4")
    add_weights_args(parser)
    add("--out", type=config.argument(Path), default="explore.html", help="the page")
    add_photo_args(parser, count=8)
    args = parser.parse_intermixed_args()
    if args.out.suffix.lower() != ".html":
        raise UserError(f"--out {args.out}: it must end in .html")
    return args


def main():
    args = parse_args()
    backbone, cfg = open_backbone(args.weights, args.download, args.dtype)
    dataset = open_images(args.photos, apply_reading_args(args, cfg))
    names, pictures = load_photos(dataset, args.count)
    images = prepare_images(pictures, backbone, cfg, args.size)
    photos, error, pairs = encode_photos(backbone, images, names)
    for photo in photos:
        near_limit = photo["w"] * photo["h"] > 0.8 * MAX_PATCHES  # both sides are rounded to whole patches
        limit = f", near the {MAX_PATCHES:,} that a photo may have" if near_limit else ""
        print(f"{photo['name']}: {photo['w']} x {photo['h']} patches{limit}")
    bound = math.ceil(error * 1000) / 1000
    accuracy = f"Cosines are within {bound} of exact ones ({pairs:,} pairs compared)."
    text = render_page(photos, f"{args.weights}: {describe_backbone(backbone)}. {accuracy}", backbone)
    try:
        atomic_write_text(args.out, text)
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): name another --out") from None
    print(accuracy)
    print(f"wrote {args.out}: {len(text) / 1e6:.1f} MB")


if __name__ == "__main__":
    config.run(main)
