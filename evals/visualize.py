"""Pictures of what a backbone sees, for photos of any size and shape: one command, one PNG.

    python visualize.py pca --against random:runs/laptop     # principal components of patch tokens as colours
    python visualize.py pca a.jpg b.jpg --foreground         # the background greyed out first
    python visualize.py attention a.jpg                      # what [CLS] and each register look at, by head
    python visualize.py norms photos/                        # lengths of the patch tokens, and the outliers
    python visualize.py sheet a.jpg                          # all of these for one image
    python visualize.py training --weights runs/laptop       # the same images, checkpoint after checkpoint
    python visualize.py registers --weights A --against B    # what registers do: compare 0 with 4 of them

What is unusual here: one colour means one thing in all images of a row (not from row to row), unless
--per-image is given. And the foreground is found in every image by itself: patch tokens are averaged with
their neighbours (else patterns as fine as the patches, as in our scenes, are all that the first component
sees), and of the two sides of the first component the foreground is the one that [CLS] looks at more. For
DINOv2's figure 1 the component was shared by images of one kind.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import checkpoint
import config
from config import UserError
from data import normalize
from features import EvalImages, load_image, resize_to_patches, untrained_copy
from model import DINOv2
from runfolder import atomic_open
from sources import BadImage, open_images, open_source, sample_name
from tools.weights import add_weights_args, open_backbone

COUNT = dict(pca=8, attention=2, norms=4, sheet=1, training=8, registers=3)  # images, unless --count says
FLAGS = dict(pca="against per_image foreground", training="per_image foreground", registers="against")
MOST = 4096  # patches of one image: a long one is shrunk, because its attention is a square of this side
SIDE, COLUMNS, ROWS = 160, 9, 10  # a tile covers SIDE x SIDE pixels; maps in a line; checkpoints in a picture
FONT, GREY, RED = 13, 217, (200, 50, 40)
RAMP = np.array([(11, 16, 60), (28, 67, 129), (30, 128, 133), (104, 178, 92), (253, 231, 76)])


# ---------------------------------------------------------------- tiles, and pages of them


def measure(text):
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font_size=FONT)
    return (round(box[2]) + 1, round(box[3]) + 3) if text else (0, 0)


def page(rows, titles=None, captions=None, gap=4):
    """Rows of PIL tiles -> one PIL image, in which nothing overlaps: texts make the room that they need.

    titles: a text for each row, at its left. captions: for each row a list of texts, under its tiles. Rows of
    equally many tiles share their columns; other rows flow by themselves.
    """
    titles, captions = titles or [""] * len(rows), captions or [()] * len(rows)
    captions = [[*texts, *[""] * (len(row) - len(texts))] for row, texts in zip(rows, captions)]
    left = max(measure(t)[0] + 2 * gap if t else 0 for t in titles)
    columns = {}  # number of tiles: the width of each
    for row, texts in zip(rows, captions):
        widths = [max(tile.width, measure(text)[0]) for tile, text in zip(row, texts)]
        columns[len(row)] = [max(pair) for pair in zip(widths, columns.get(len(row), widths))]
    tall = [max([measure(title)[1], *(tile.height for tile in row)]) for row, title in zip(rows, titles)]
    below = [max(measure(text)[1] for text in texts) for texts in captions]
    width = left + max(sum(c) + gap * (len(c) - 1) for c in columns.values())
    sheet = Image.new("RGB", (width, sum(tall) + sum(below) + gap * (len(rows) - 1)), "white")
    draw, y = ImageDraw.Draw(sheet), 0
    for row, title, texts, high, under in zip(rows, titles, captions, tall, below):
        x = left
        draw.multiline_text((0, y + (high - measure(title)[1]) // 2), title, "black", font_size=FONT)
        for tile, text, column in zip(row, texts, columns[len(row)]):
            sheet.paste(tile, (x + (column - tile.width) // 2, y + (high - tile.height) // 2))
            place = x + (column - measure(text)[0]) // 2, y + high
            draw.multiline_text(place, text, "black", font_size=FONT, align="center")
            x += column + gap
        y += high + under + gap
    return sheet


def tile(x, side=SIDE):
    """uint8 (3, H, W) -> PIL image with the area of side x side. Enlarged pixels stay sharp."""
    image = Image.fromarray(x.permute(1, 2, 0).contiguous().numpy())
    scale = side / (image.width * image.height) ** 0.5
    size = [max(round(s * scale), 1) for s in image.size]
    return image.resize(size, Image.NEAREST if scale > 1 else Image.LANCZOS)


def heat(values, like):
    """A map (h, w) of 0...1 in colours from dark blue to yellow, as large as the tile of `like` (3, H, W)."""
    at = np.linspace(0, 1, len(RAMP))
    colors = np.stack([np.interp(values.clamp(0, 1), at, channel) for channel in RAMP.T], -1)
    return Image.fromarray(colors.round().astype(np.uint8)).resize(tile(like).size, Image.NEAREST)


def histogram(values, limit, width=440, height=210):
    """How many patch tokens have which norm, and the limit of outliers -> PIL image. Outliers are few: the
    axis of counts is logarithmic."""
    picture, top_value = Image.new("RGB", (width, height), "white"), max(values.max().item(), limit) * 1.1
    counts = torch.histc(values, 60, 0, top_value).tolist()
    draw, left, right, top, bottom = ImageDraw.Draw(picture), 56, width - 20, 26, height - 38

    def x(value):
        return left + (right - left) * value / top_value

    def y(count):
        return bottom - (bottom - top) * np.log1p(count) / np.log1p(max(counts))

    def text(place, words, anchor, color="black"):
        draw.text(place, words, color, anchor=anchor, font_size=FONT)

    for i, count in enumerate(counts):
        a, b = (x(top_value * k / len(counts)) for k in (i, i + 1))
        draw.rectangle([a, y(count), b - 1, bottom], fill=tuple(RAMP[1]) if count else "white")
    for power in range(len(str(int(max(counts))))):
        text((left - 6, y(10**power)), f"{10**power:,}", "rm")
    for k in range(5):
        text((x(top_value * k / 4), bottom + 4), f"{top_value * k / 4:.3g}", "mt")
    draw.line([left, top, left, bottom, right, bottom], "black")
    draw.line([x(limit), top, x(limit), bottom], RED, 2)
    text((x(limit), 4), f"limit {limit:.3g}", "rt", RED)
    text((4, 4), "tokens", "lt")
    text(((left + right) / 2, height - 4), "norm before the final norm", "mb")
    return picture


# ---------------------------------------------------------------- what is read off a backbone


def look(backbone, x):
    """uint8 (3, H, W) -> what a network takes, (1, 3, H, W), and its grid of patches (h, w)."""
    p, device = backbone.patch_size, next(backbone.parameters()).device
    return normalize(x[None].to(device)), (x.shape[1] // p, x.shape[2] // p)


@torch.no_grad()
def patch_tokens(backbone, x):
    """uint8 (3, H, W) -> patch tokens (h, w, D) after the final norm, fp32 on the CPU."""
    pixels, grid = look(backbone, x)
    return backbone.eval()(pixels).patches[0].unflatten(0, grid).float().cpu()


@torch.no_grad()
def patch_norms(backbone, x):
    """uint8 (3, H, W) -> lengths (h, w) of the patch tokens before the final norm, which makes them alike."""
    (pixels, grid), last = look(backbone, x), len(backbone.blocks) - 1
    patches = backbone.eval().intermediate(pixels, [last], norm=False)[0].patches[0]
    return patches.norm(dim=-1).unflatten(0, grid).float().cpu()


@torch.no_grad()
def attention_of(backbone, x):
    """uint8 (3, H, W) -> (heads, 1 + R, h, w): the attention that [CLS] and each register give to the patches
    in the last block. What is missing to a sum of 1 goes to [CLS] and registers."""
    (pixels, grid), first = look(backbone, x), 1 + backbone.num_register_tokens
    maps = backbone.eval().attention_maps(pixels)[0, :, :first, first:]  # (heads, 1 + R, N)
    return maps.unflatten(-1, grid).float().cpu()


def principal(x, k):
    """x (m, D) -> its k strongest components (m, k), centred. A direction has no sign of its own: the sum of
    its numbers is made positive."""
    some = x[:: 1 + len(x) // 100_000].double()
    mean = some.mean(0)
    some = some - mean
    directions = torch.linalg.eigh(some.T @ some)[1].flip(1)[:, :k]  # (D, k), strongest first
    directions = directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)
    return ((x.double() - mean) @ directions).float()


def pca_colors(patches):
    """patches (..., D) -> (..., 3) in 0...1: the first three principal components, outliers clipped."""
    y = principal(patches.flatten(0, -2), 3)
    low, high = torch.quantile(y[:: 1 + len(y) // 100_000], torch.tensor([0.02, 0.98]), dim=0)
    return ((y - low) / (high - low + 1e-9)).clamp(0, 1).unflatten(0, patches.shape[:-1])


def first_component(tokens, attention):
    """tokens (h, w, D), attention (h, w) of [CLS] -> (h, w): the first component of one image, its tokens
    averaged over 3 x 3. Positive is the foreground, where [CLS] looks more."""
    smooth = F.avg_pool2d(tokens.permute(2, 0, 1)[None], 3, 1, 1, count_include_pad=False)
    y = principal(smooth[0].flatten(1).T, 1).view(attention.shape)
    return y if (y * attention).sum() >= 0 else -y


def foreground(backbone, x):
    return first_component(patch_tokens(backbone, x), attention_of(backbone, x)[:, 0].mean(0))


def first_component_iou(backbone, scenes, size, count):
    """How well the first component, cut at 0, finds the things in `count` scenes seen at `size` pixels: the
    foreground's IoU over all pixels. Nothing is fitted to the masks."""
    both = either = 0
    for i in range(count):
        mask = torch.from_numpy(scenes.scene(i)[2] > 0)
        y = foreground(backbone, resize_to_patches(scenes[i][0], backbone.patch_size, size))
        found = F.interpolate(y[None, None], size=mask.shape, mode="bilinear")[0, 0] >= 0
        both, either = both + (found & mask).sum().item(), either + (found | mask).sum().item()
    return both / max(either, 1)


def outliers(norms, arch):
    """norms (n,) -> the share of outliers, and the norm beyond which a token is one.

    For ViT-g 150, set by hand in the registers paper (Darcet et al. 2023, figure 3: 2.37 % lie beyond).
    Otherwise a rule of ours: median + 10 robust standard deviations (1.4826 MAD), at least twice the median.
    """
    median = norms.median()
    robust = median + 10 * 1.4826 * (norms - median).abs().median()
    giant = (arch["embed_dim"], arch["depth"]) == (1536, 40)
    limit = 150.0 if giant else max(robust, 2 * median).item()
    return (norms > limit).float().mean().item(), limit


# ---------------------------------------------------------------- principal components


def large_sample(dataset, size, resize, count):
    """`count` images, evenly spread, at twice the size of an evaluation: uint8 (n, 3, 2 S, 2 S).

    Four times the patches make a picture in which one recognises something.
    """
    images = EvalImages(dataset, 2 * size, 2 * resize, limit=count)
    items = (images[i] for i in range(len(images)))
    sample = [item[0] for item in items if not isinstance(item, BadImage)]
    if count < 1 or not sample:
        raise UserError(f"there is nothing to draw: {count} images wanted, {len(sample)} readable")
    return torch.stack(sample)


def pca_row(backbone, images, side=SIDE, per_image=False, cut_out=False):
    """uint8 images (3, H, W) of any sizes -> their patch tokens as coloured tiles. cut_out: the background is
    grey, and the components are those of the foreground."""
    tokens = [patch_tokens(backbone, x) for x in images]
    kept = [torch.ones(t.shape[:2], dtype=torch.bool) for t in tokens]
    if cut_out:
        kept = [foreground(backbone, x) >= 0 for x in images]
    chosen = [t[k] for t, k in zip(tokens, kept)]  # (m, D) each
    if per_image:
        colors = [pca_colors(c) for c in chosen]
    else:
        colors = pca_colors(torch.cat(chosen)).split([len(c) for c in chosen])
    row = []
    for x, k, c in zip(images, kept, colors):
        picture = np.full((*k.shape, 3), GREY, np.uint8)
        picture[k.numpy()] = (c * 255).to(torch.uint8)
        row.append(Image.fromarray(picture).resize(tile(x, side).size, Image.NEAREST))
    return row


def pca_sheet(backbones, images, side=128):
    """A sheet with one column per image: the image above, and below it one PCA picture for each backbone.

    backbones: list of VisionTransformer, images uint8 (n, 3, S, S) or a list of (3, H, W) -> PIL image.
    """
    return page([[tile(x, side) for x in images], *(pca_row(b, images, side) for b in backbones)])


def draw_pca(views, names, per_image=False, cut_out=False):
    """Images, and below them a row of components for each (title, backbone, images) of `views`."""
    rows, titles = [], [""]
    for title, backbone, images in views:
        rows += [] if rows else [[tile(x) for x in images]]
        rows.append(pca_row(backbone, images, SIDE, per_image, cut_out))
        titles.append(title)
    return page(rows, titles, [names, *[()] * (len(rows) - 1)])


def report_iou(views, scenes):
    count = min(len(scenes), 200)
    covered = sum((scenes.scene(i)[2] > 0).mean() for i in range(count)) / count
    print(f"first component against the true masks of {count} scenes, foreground IoU:")
    for title, backbone, images in views:
        print(f"  {first_component_iou(backbone, scenes, images[0].shape[1], count):.3f}  {title}")
    print(f"  {covered:.3f}  if everything were called foreground")


def through_training(run, backbone, images, cfg):
    """Yields (title, backbone, images): untrained (of the run's seed: as it began, unless given weights), and
    the teacher of each checkpoint, in one network that is filled again and again."""
    paths = checkpoint.step_folders(Path(run) / "checkpoints")  # newest first
    if not paths:
        raise UserError(f"{run} has no checkpoints: train with train.checkpoint_every=50 train.keep_last=9")
    yield "untrained", untrained_copy(backbone, cfg, cfg.train.seed), images
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        teacher = DINOv2(cfg)
    teacher = teacher.to_empty(device=backbone.norm.weight.device)
    for path in paths[:: -(-len(paths) // ROWS)][::-1]:
        if why := checkpoint.find_damage(path):
            print(f"left out: {path}: {why}")
            continue
        checkpoint.load_checkpoint(path, {"teacher": teacher.state_dict()})
        yield f"step {int(path.name[5:])}", teacher.backbone, images


# ---------------------------------------------------------------- attention, norms, registers


def token_name(t):
    return f"register {t}" if t else "[CLS]"


def attention_tile(m, x):
    """Attention (h, w) over the image; square roots, because a few patches get nearly all of it."""
    colors = heat((m / m.max().clamp(min=1e-12)).sqrt(), x)
    return Image.blend(colors, tile(x).convert("L").convert("RGB"), 0.25)


def attention_lines(backbone, x):
    """For [CLS] and each register a line (or more, if there are many heads): all heads, then each of them.
    The number is the share of its attention that patches get."""
    lines = []
    for t, maps in enumerate(attention_of(backbone, x).unbind(1)):  # (heads, h, w)
        maps = [maps.mean(0), *maps]
        texts = [f"{f'head {i}' if i else 'all heads'}: {m.sum():.0%}" for i, m in enumerate(maps)]
        for i in range(0, len(maps), COLUMNS):
            tiles = [attention_tile(m, x) for m in maps[i : i + COLUMNS]]
            lines.append((tiles, "" if i else token_name(t), texts[i : i + COLUMNS]))
    return lines


def draw_attention(backbone, images, names):
    lines = []
    for x, name in zip(images, names):
        lines += [([tile(x)], name, ()), *attention_lines(backbone, x)]
    return page(*zip(*lines))


def norm_tiles(norms, images):
    """Norms (h, w) of each image -> maps on one scale of colours, and their ranges as captions."""
    low, high = min(n.min() for n in norms), max(n.max() for n in norms)
    tiles = [heat((n - low) / (high - low + 1e-9), x) for n, x in zip(norms, images)]
    return tiles, [f"norms {n.min():.3g} to {n.max():.3g}" for n in norms]


def norm_summary(norms, arch):
    """Norms (h, w) of each image -> a histogram of all, and a sentence about the outliers."""
    norms = torch.cat([n.flatten() for n in norms])
    share, limit = outliers(norms, arch)
    said = f"{share:.2%} of {len(norms):,} patch tokens are longer than {limit:.3g}"
    return histogram(norms, limit), f"{said} (median {norms.median():.3g}, largest {norms.max():.3g})"


def draw_norms(backbone, images, names):
    norms = [patch_norms(backbone, x) for x in images]
    (maps, ranges), (chart, said) = norm_tiles(norms, images), norm_summary(norms, backbone.arch)
    print(said)
    return page([[tile(x) for x in images], maps, [chart]], captions=[names, ranges, [said]])


def draw_sheet(backbone, images, names):
    """For each image by itself: components, norms, attention, histogram."""
    lines = []
    for x, name in zip(images, names):
        norms = [patch_norms(backbone, x)]
        (maps, ranges), (chart, said) = norm_tiles(norms, [x]), norm_summary(norms, backbone.arch)
        lines.append(([tile(x), *pca_row(backbone, [x]), *maps], name, ["image", "components", *ranges]))
        lines += [*attention_lines(backbone, x), ([chart], "norms", [said])]
    return page(*zip(*lines))


EXPECT = """
What to expect: small models have no outliers, with registers or without. In DINOv2 they appear in ViT-L and
larger, after about a third of the training; of ViT-g's patch tokens 2.4 % are longer than 150, and with
registers none stand out (Darcet et al. 2023, section 2). To see that, take released weights of L or g:
    visualize.py registers PHOTOS --weights dinov2_vitg14 --against dinov2_vitg14_reg4 --download"""


def draw_registers(views, names):
    """Two (title, backbone, images): their histograms, then a line for each image and backbone."""
    norms, charts, said, lines = [], [], [], []
    for title, backbone, images in views:
        norms.append([patch_norms(backbone, x) for x in images])
        chart, sentence = norm_summary(norms[-1], backbone.arch)
        charts.append(chart)
        said.append(f"{title}, {backbone.num_register_tokens} registers:\n{sentence}")
    for i, name in enumerate(names):
        for own, (title, backbone, images) in zip(norms, views):
            (maps, ranges), x = norm_tiles(own, images), images[i]
            looks = attention_of(backbone, x).mean(0)  # (1 + R, h, w)
            tiles = [tile(x), maps[i], *(attention_tile(m, x) for m in looks)]
            texts = [f"{token_name(t)}: {m.sum():.0%}" for t, m in enumerate(looks)]
            lines.append((tiles, title, [name, ranges[i], *texts]))
    print("\n".join([*said, EXPECT]))
    return page(*zip((charts, "", said), *lines))


# ---------------------------------------------------------------- the command


def short(name, most=22):
    return name if len(name) <= most else "..." + name[3 - most :]


def sample(dataset, count):
    """`count` photos, evenly spread -> their short names, and PIL images; tells what it leaves out."""
    n, names, pictures, bad = len(dataset), [], [], []
    for i in [i * n // count for i in range(count)] if count < n else range(n):
        try:
            pictures.append(load_image(dataset, i)[0])
            names.append(short(Path(sample_name(dataset, i)).stem))
        except BadImage as e:
            bad.append(str(e))
    if not pictures:
        raise UserError(f"there is nothing to draw: {bad[0]}")
    for why in bad:
        print("left out:", why)
    if count < n:
        print(f"{count} of {n} images, evenly spread: --count says how many")
    return names, pictures


def ready(pictures, backbone, cfg, size):
    """PIL images -> uint8 (3, H, W), multiples of the patch. The short side is `size`, or twice that of the
    evaluation (or the native one, if larger); less for a long image, which would have more than MOST patches.
    """
    p, usual = backbone.patch_size, 2 * (cfg.evaluation.image_size or cfg.crops.global_crops_size)
    side = size or max(usual, backbone.arch["img_size"])
    return [resize_to_patches(x, p, min(side, p * (MOST * min(x.size) / max(x.size)) ** 0.5)) for x in pictures]


def arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("what", choices=COUNT)
    add("photos", nargs="*", help="images, folders, .tar shards, .jsonl lists; or one URI as scenes:9 "
        "(default: the run's evaluation images)")  # fmt: skip
    add_weights_args(parser)
    add("--against", metavar="WEIGHTS", help="pca, registers: a second backbone, as for --weights")
    add("--out", type=Path, help="a .png (default: WHAT.png)")
    add("--size", type=int, default=0, help="short side of what the network sees, in pixels (default: twice "
        "the evaluation's, or the native one if larger)")  # fmt: skip
    add("--count", type=int, default=0, help="how many images, evenly spread")
    add("--per-image", action="store_true", help="pca, training: components of each image by itself")
    add("--foreground", action="store_true", help="pca, training: grey out the background")
    args = parser.parse_intermixed_args()
    for flag in ("against", "per_image", "foreground"):
        if getattr(args, flag) and flag not in FLAGS.get(args.what, ""):
            raise UserError(f"--{flag.replace('_', '-')} is nothing for {args.what}: leave it out")
    if args.what == "registers" and not args.against:
        raise UserError("registers compares two backbones: name the other with --against")
    args.out, args.count = args.out or Path(f"{args.what}.png"), args.count or COUNT[args.what]
    if args.out.suffix.lower() != ".png" or min(args.size, args.count) < 0:
        raise UserError("--out must end in .png, and --size and --count must be positive")
    return args


def main():
    args = arguments()
    dataset = open_images(args.photos) if args.photos else None
    loaded = [(name, *open_backbone(name, args.download)) for name in (args.weights, args.against) if name]
    cfg = loaded[0][2]
    if not dataset and not cfg.evaluation.test_path:
        raise UserError(f"{args.weights} has no evaluation images: name photos to look at")
    dataset = dataset or open_source(cfg.evaluation.test_path)
    names, pictures = sample(dataset, args.count)
    views = [(short(name, 30), b, ready(pictures, b, c, args.size)) for name, b, c in loaded]
    if args.what == "training":
        views = through_training(args.weights, *views[0][1:], cfg)
    if args.foreground and args.what == "pca" and hasattr(dataset, "scene"):
        report_iou(views, dataset)
    if args.what in ("pca", "training"):
        picture = draw_pca(views, names, args.per_image, args.foreground)
    elif args.what == "registers":
        picture = draw_registers(views, names)
    else:
        draw_one = dict(attention=draw_attention, norms=draw_norms, sheet=draw_sheet)[args.what]
        picture = draw_one(*views[0][1:], names)
    try:
        with atomic_open(args.out) as f:
            picture.save(f, "PNG")
    except OSError as e:
        raise UserError(f"{args.out} cannot be written ({e}): name another --out") from None
    print(f"wrote {args.out}")


if __name__ == "__main__":
    config.run(main)
