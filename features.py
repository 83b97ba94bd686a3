"""Frozen features: a backbone from a file, images of one size, and its tokens for all of them.

The run at its end, k-NN and everything in evals/ share this file. It reads run folders and files with
DINOv2's own parameter names, Meta's released ones among them; any other layout is converted first:
`python -m tools.export WEIGHTS --to meta --out weights.pth`. Nothing is ever downloaded here.
"""

import argparse
import math
import os
import re
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

import config
from config import UserError
from data import normalize
from decode import BadImage, Reading, to_tensor
from distributed import copy_to_sharded
from model import SIZES, VisionTransformer, compute_dtype, describe_backbone
from sources import sample_name

CACHE_BYTES = 512 * 2**20  # evaluation images up to this total are decoded once and kept
MAX_ELONGATION = 32  # of an image: longer ones show nothing to a patch
IMAGENET_GREY = (124, 116, 104)  # ImageNet's mean colour: zero for the network
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
RANK_SHARD = (
    "one rank's FSDP shard of the parameters: gather it first (save the full state dict from rank 0, in the "
    "program that trained it)"
)

# ---------------------------------------------------------------- weights from files


def read_weights(source):
    """A run folder, a .pth file or a released name -> backbone tensors, head tensors, architecture (or {}).

    Names are DINOv2's own, without "backbone.". Raises UserError for anything else.
    """
    hint = convert_hint(source)
    tensors, arch = read_tensors(find_weights(source, hint), hint)
    return *split_heads(tensors), arch


def read_tensors(path, hint=""):
    """A file that torch.save wrote -> named tensors, architecture (or {}). Never runs code from the file."""
    content = load_plain_data(path)
    tensors = content.get("teacher", content.get("model", content))
    arch = content.get("arch") or {}
    check_named(tensors, arch, path, hint)
    check_tensors(tensors, path, hint)
    return tensors, arch


def load_plain_data(path):
    """The dict in a file that torch.save wrote: of tensors, plain values and argparse.Namespaces at most.

    Code in the file is never run. Raises UserError, which names a class that is not allowed.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings of many a checkpoint
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a pickle that wants to run code, a truncated zip, an HTML page saved as .pth ...
        raise UserError(f"{path} {describe_load_error(e, path)}") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors: it is no weights file")
    return content


def describe_load_error(error, path):
    """What torch.load refused, and the remedy: the rest of a sentence that begins with the path."""
    not_allowed = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
    if not_allowed and not_allowed[1].startswith("torch.distributed."):
        return f"holds {RANK_SHARD}"
    if not_allowed:
        return (f"holds a {not_allowed[1]} besides its tensors, and reading that could run code: in the "
                f"program that wrote it, save the state_dict() of the network alone")  # fmt: skip
    if "TorchScript" in str(error):
        return "is a TorchScript program: save the state_dict() of the network instead"
    problem = "is not a file of plain tensors"
    if zipfile.is_zipfile(path):
        problem = "is damaged, incomplete or a zip file of another program"
    return f"{problem} ({type(error).__name__}): download or export it again"


def check_named(tensors, arch, path, hint=""):
    """Raise UserError unless tensors is {printable name: tensor} and arch is a dict."""
    named = isinstance(tensors, dict) and all(map(torch.is_tensor, tensors.values()))
    named = named and all(isinstance(name, str) and name.isprintable() for name in tensors)
    if not named or not isinstance(arch, dict):
        raise UserError(f"{path} holds other things than named tensors: it is no weights file{hint}")


def check_tensors(tensors, path, hint=""):
    """Raise UserError for a tensor that can't be a weight: not plain numbers, or not finite as fp32."""
    for name, x in tensors.items():
        if type(x) not in (torch.Tensor, torch.nn.Parameter):  # a DTensor
            raise UserError(f"{path} holds {RANK_SHARD} ({name} is a {type(x).__name__})")
        plain = x.dtype in WEIGHT_DTYPES and x.layout == torch.strided and not (x.is_meta or x.is_nested)
        if not plain or not 0 < x.nbytes <= x.untyped_storage().nbytes():  # a few bytes may claim terabytes
            found = f"{x.dtype}, {x.layout}"
            raise UserError(f"{path}: {name} ({found}) is no plain tensor of floats: export it again{hint}")
        if not x.float().isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity: take an earlier file, or fetch it again")


def split_heads(tensors):
    """Named tensors -> those of the backbone, without "backbone.", and those of the heads."""
    heads = {name: x for name, x in tensors.items() if "head." in name}
    backbone = {name.removeprefix("backbone."): x for name, x in tensors.items() if name not in heads}
    return backbone, heads


def find_weights(source, hint=""):
    """The file behind a run folder, a path or a released name that was downloaded earlier."""
    path = Path(source)
    if os.path.isfile(path / "teacher.pth"):  # unlike Path.is_file, False for a name that is too long
        return path / "teacher.pth"
    if os.path.isfile(path) and path.suffix != ".safetensors":
        return path
    stem = released_name(source)
    if stem is None:
        raise UserError(f"no weights at {path}: give a run folder that has a teacher.pth, a .pth file, or a "
                        f"released name{hint}")  # fmt: skip
    file = released_file(stem)
    if not os.path.isfile(file):
        raise UserError(f"no weights at {path}: put Meta's file at {file}, or fetch it with "
                        f"`python -m tools.export {stem} --download`")  # fmt: skip
    return file


def convert_hint(source):
    return (f"; weights of timm, Hugging Face or a training checkpoint are converted first: "
            f"python -m tools.export {source} --to meta --out weights.pth")  # fmt: skip


def released_name(name):
    """dinov2_vits14_reg4, vits14_reg, dinov2_vits14_reg4_pretrain.pth -> the first of these, or None."""
    found = re.fullmatch(r"(?:dinov2_)?vit([sblg])14(_reg4?)?(?:_pretrain)?(?:\.pth)?", str(name))
    return found and f"dinov2_vit{found[1]}14{'_reg4' if found[2] else ''}"


def released_file(stem):
    """Where Meta's file of that name lies, once it is downloaded."""
    folder = os.environ.get("NANODINO_CACHE") or Path.home() / ".cache" / "nanodino"
    return Path(folder) / f"{stem}_pretrain.pth"


def released_arch(stem):
    """'dinov2_vits14_reg4' -> the constructor arguments of that backbone."""
    letter = stem.removeprefix("dinov2_vit")[0]
    size = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}[letter]
    arch = dict(SIZES[size], ffn_layer="swiglu" if letter == "g" else "mlp")
    if stem.endswith("_reg4"):
        arch |= dict(num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0)
    return arch


def infer_arch(tensors, arch, path, hint=""):
    """Constructor arguments of the backbone that these tensors belong to, from their names and shapes.

    arch: the arguments that shapes don't show, if the file states them. Raises UserError.
    """
    try:
        D, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
        grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
        if not grid:
            raise ValueError("pos_embed has no patch")
        R = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
        heads_of_width = {size["embed_dim"]: size["num_heads"] for size in SIZES.values()}
        inferred = dict(
            embed_dim=D,
            depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            num_heads=heads_of_width.get(D, max(D // 64, 1)),
            patch_size=patch_size,
            img_size=patch_size * grid,
            num_register_tokens=R,
            ffn_layer="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
            layerscale=1.0 if "blocks.0.ls1.gamma" in tensors else 0,
            interpolate_antialias=R > 0,
            interpolate_offset=0.0 if R else 0.1,
        )
    except KeyError as e:
        names = ", ".join(list(tensors)[:3])
        raise UserError(f"{path} holds no DINOv2 backbone: it lacks {e}; its first names are "
                        f"{names}{hint}") from e  # fmt: skip
    except (IndexError, ValueError) as e:
        raise UserError(f"{path} holds no DINOv2 backbone: no such network has its shapes ({e})") from e
    heads = arch.get("num_heads", inferred["num_heads"])
    if type(heads) is not int or heads < 1 or D % heads:
        heads = config.short_repr(heads)
        raise UserError(f"num_heads is {heads} in {path}, of width {D}: no network is like that")
    inferred["num_heads"] = heads
    for key in {"layerscale", "interpolate_antialias", "interpolate_offset"} & arch.keys():
        try:
            inferred[key] = config.convert(config.KINDS[f"student.{key}"], arch[key])
        except ValueError as e:
            raise UserError(f"{key} is {config.short_repr(arch[key])} in {path}, but must be {e}") from None
    return inferred


def build_backbone(tensors, arch, source, hint=""):
    """A frozen backbone in eval mode around these tensors. Raises UserError that names what differs."""
    with torch.device("meta"):  # no numbers are drawn, only to be overwritten
        backbone = VisionTransformer(**infer_arch(tensors, arch, source, hint))
    expected = {name: list(x.shape) for name, x in backbone.state_dict().items()}
    found = {name: list(x.shape) for name, x in tensors.items()}
    wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        names = "; ".join(f"{k} is {found.get(k)} there, not {expected.get(k)}" for k in wrong[:3])
        raise UserError(f"{source} is not the {describe_backbone(backbone)} that it looks like: "
                        f"{names}{hint}")  # fmt: skip
    check_released_name(backbone, source)
    backbone.load_state_dict({name: x.float() for name, x in tensors.items()}, strict=True, assign=True)
    return backbone.eval().requires_grad_(False)


def check_released_name(backbone, source):
    """Refuse a file that has the name of one of Meta's and holds another model.

    A run folder or an export may well be called vits14: only dinov2_*_pretrain.pth claims to be Meta's.
    """
    path = Path(source)
    stem = released_name(path.name)
    metas = path.name.startswith("dinov2_") and path.name.endswith("_pretrain.pth")
    if stem is None or (path.exists() and not metas):
        return
    named = released_arch(stem)
    if named["embed_dim"] != backbone.embed_dim or ("_reg4" in stem) != bool(backbone.num_register_tokens):
        raise UserError(f"{source} has the name of {stem} but holds a {describe_backbone(backbone)}: "
                        f"give it its right name")  # fmt: skip


def load_backbone(source):
    """A frozen backbone in eval mode from a run folder, a .pth file or a released name (always strict)."""
    tensors, _, arch = read_weights(source)
    return build_backbone(tensors, arch, source, convert_hint(source))


@torch.no_grad()
def init_from_weights(model, source):
    """Fill a DINOv2 (sharded or not) from a run or weights file -> a sentence, and whether heads were taken.

    The backbone must be the same; its position embedding is resized to the native grid of `model`, as its own
    `interpolate_pos_embed` would. Heads are taken if all have the same sizes. Raises UserError.
    """
    tensors, heads, arch = read_weights(source)
    loaded = build_backbone(tensors, arch, source, convert_hint(source))
    old_grid, new_grid = (b.arch["img_size"] // b.patch_size for b in (loaded, model.backbone))
    differ = different_settings(loaded.arch, model.backbone.arch)
    if differ:
        raise UserError(f"{source} holds another backbone ({'; '.join(differ)}): change student.* or --model")
    tensors = {f"backbone.{name}": x for name, x in loaded.state_dict().items()}
    tensors["backbone.pos_embed"] = loaded.interpolate_pos_embed(new_grid, new_grid)
    head_shapes = {name: p.shape for name, p in model.named_parameters() if "head." in name}
    heads_fit = head_shapes == {name: x.shape for name, x in heads.items()}
    if heads_fit:
        tensors |= heads
    for name, parameter in model.named_parameters():
        if heads_fit or "head." not in name:
            copy_to_sharded(parameter, tensors[name])
    resized = ""
    if old_grid != new_grid:
        resized = f", its positions resized from {old_grid} x {old_grid} to {new_grid} x {new_grid}"
    return f"backbone of {source}{resized}; heads {'of the same' if heads_fit else 'drawn anew'}", heads_fit


def different_settings(theirs, ours):
    """['depth is 12 there, 24 here', ...] for all but the native image size and the scale of LayerScale."""
    differ = []
    for key in theirs:
        there, here = theirs[key], ours[key]
        if key == "layerscale":  # only whether there is one; its values come with the weights
            there, here = there > 0, here > 0
        if key != "img_size" and there != here:
            differ.append(f"{key} is {there} there, {here} here")
    return differ


def open_backbone(source, load=load_backbone, dtype="fp32"):
    """--weights -> a frozen VisionTransformer, on the GPU if there is one, and its config.

    "random:" before the source gives the same network untrained. The config is that of the run around the
    weights; a file on its own gets the published evaluation (224 pixels out of 256). The weights are
    converted to `dtype` (see model.compute_dtype), and so tokens come out in it. Raises UserError.
    """
    name = str(source).removeprefix("random:")
    untrained = name != str(source)
    folder = Path(name) if os.path.isdir(name) else Path(name).parent
    if os.path.isfile(folder / "config.yaml"):
        cfg = config.load(file=folder / "config.yaml")
    else:
        cfg = config.load()
        cfg.evaluation.image_size = 224
        cfg.evaluation.resize_size = 256
        cfg.train.num_workers = min(cfg.train.num_workers, (os.cpu_count() or 1) // 2)
    stem = released_name(name)
    if untrained and stem:  # nothing needs to be on the disk
        torch.manual_seed(0)
        backbone = VisionTransformer(**released_arch(stem)).eval()
    elif untrained:
        backbone = untrained_copy(load(name), cfg)
    else:
        backbone = load(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone.loaded_weights = backbone.state_dict()  # which keeps its tensors when the backbone is converted
    return backbone.to(device, compute_dtype(dtype, device)).requires_grad_(False), cfg


def add_image_args(parser):
    """--dtype, and those of add_reading_args, of every script that sends images through a frozen backbone."""
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="numbers of the network; auto: bf16 where the hardware has it")  # fmt: skip
    add_reading_args(parser)


def add_reading_args(parser):
    """--range and --bands: how the numbers in files become colours."""
    add = parser.add_argument
    add("--range", type=config.argument(config.Real), nargs=2, metavar=("BLACK", "WHITE"),
        help="of numbers that are not 8-bit (default: the run's, or measured)")  # fmt: skip
    add("--bands", type=config.argument(config.Count), nargs="+", metavar="BAND",
        help="one or three channels of the files, counted from 1")  # fmt: skip


def add_fit_arg(parser):
    """--fit, of the scripts whose backbone sees squares."""
    parser.add_argument("--fit", choices=("crop", "resize", "pad"), help="how an image becomes square: crop "
                        "the centre, squeeze all of it, or keep its proportions and pad (default: the run's, "
                        "or crop)")  # fmt: skip


def apply_reading_args(args, cfg):
    """--range and --bands, where given, replace the run's -> the Reading of its images. Raises UserError."""
    given = {f"data.{key}": getattr(args, key) for key in ("range", "bands") if getattr(args, key)}
    config.assign(cfg, given)
    config.check(cfg)
    return Reading.from_config(cfg.data)


def untrained_copy(backbone, cfg, seed=0):
    """The same network with random weights: the floor that every number must be compared with."""
    torch.manual_seed(seed)
    untrained = VisionTransformer(**backbone.arch, init_std=cfg.student.init_std)
    return untrained.to(backbone.norm.weight).eval()


# ---------------------------------------------------------------- images of one size


def load_image(dataset, i):
    """Image i of a data set and its label. Raises BadImage if it does not decode or is too elongated."""
    image, label = dataset[i]
    if max(image.size) > MAX_ELONGATION * min(image.size):
        size = "{} x {} pixels".format(*image.size)
        reason = f"{size}, more than {MAX_ELONGATION} times as long as wide: cut it up"
        raise BadImage(sample_name(dataset, i), reason)
    return image, label


def preprocess(image, size, resize, fit="crop"):
    """PIL RGB -> uint8 (3, size, size).

    "crop": short side to `resize` (bicubic), then the centre; DINOv2's k-NN protocol is 256, then 224.
    "resize": the whole image, squeezed. "pad": the whole image in its proportions, with a grey border at the
    right or the bottom.
    """
    if fit == "resize":
        return to_tensor(image.resize((size, size), Image.BICUBIC))
    if fit == "pad":
        scale = size / max(image.size)
        canvas = Image.new("RGB", (size, size), IMAGENET_GREY)
        canvas.paste(image.resize([max(round(side * scale), 1) for side in image.size], Image.BICUBIC))
        return to_tensor(canvas)
    short = min(image.size)
    if short != resize:  # int and round are torchvision's: the same pixels
        image = image.resize([int(resize * side / short) for side in image.size], Image.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def resize_to_patches(image, patch_size, side=0):
    """PIL RGB of any size -> uint8 (3, H, W): short side about `side` pixels (0: as it is), both multiples of
    `patch_size`. The whole image stays; each side is stretched by half a patch at most."""
    scale = side / min(image.size) if side else 1
    size = tuple(max(round(s * scale / patch_size), 1) * patch_size for s in image.size)
    return to_tensor(image if image.size == size else image.resize(size, Image.BICUBIC))


class EvalImages(Dataset):
    """Images ready for a backbone: item i is (uint8 (3, size, size), label), or a BadImage."""

    def __init__(self, dataset, size, resize=0, limit=0, fit="crop", indices=None):
        self.dataset = dataset
        self.size = size
        self.resize = resize or size
        self.fit = fit
        shown = {
            "crop": f"{size} pixels out of {self.resize}",
            "resize": f"the whole image squeezed to {size} x {size} pixels",
            "pad": f"the whole image padded to {size} x {size} pixels",
        }
        self.protocol = shown[fit]  # for header lines
        self.indices = list(range(len(dataset)) if indices is None else indices)
        n = len(self.indices)
        if 0 < limit < n:  # every n/limit-th: folders are sorted by class, the first ones would be one class
            self.indices = [self.indices[i * n // limit] for i in range(limit)]
        self.keep = len(self.indices) * 3 * size * size <= CACHE_BYTES
        self.cache = {}
        self.bad = {}  # {number: path and reason}, as far as `iterate_batches` has read

    def files(self):
        """(data set, index) of each image."""
        return [(self.dataset, i) for i in self.indices]

    def subset(self, indices, limit=0):
        """EvalImages of some images of the same data set, given by their numbers there."""
        return EvalImages(self.dataset, self.size, self.resize, limit, self.fit, indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if i in self.cache:
            return self.cache[i]
        try:
            image, label = load_image(self.dataset, self.indices[i])
            item = preprocess(image, self.size, self.resize, self.fit), label
        except BadImage as e:
            item = e
        if self.keep:
            self.cache[i] = item
        return item


def iterate_batches(images, batch_size=256, num_workers=0, start=0):
    """EvalImages from number `start` on -> uint8 (b, 3, S, S), labels (b,), numbers (b,).

    Images that do not decode are left out; images.bad says why.
    """

    def collate(items):  # in the workers
        good = [item for item in items if not isinstance(item, BadImage)]
        pixels = torch.empty((0, 3, images.size, images.size), dtype=torch.uint8)
        if good:
            pixels = torch.stack([image for image, _ in good])
        labels = torch.tensor([label for _, label in good], dtype=torch.long)
        return pixels, labels, [str(item) if isinstance(item, BadImage) else None for item in items]

    rest = Subset(images, range(start, len(images)))
    for pixels, labels, reasons in DataLoader(rest, batch_size, collate_fn=collate, num_workers=num_workers):
        numbers = []
        for number, reason in enumerate(reasons, start):
            if reason:
                images.bad[number] = reason
            else:
                numbers.append(number)
        start += len(reasons)
        yield pixels, labels, numbers


# ---------------------------------------------------------------- tokens


@torch.no_grad()
def extract_features(backbone, images, batch_size=256, num_workers=0, patches=False):
    """All EvalImages through a backbone -> cls (n, D) fp32, labels (n,), patches (n, N, D) if asked for."""
    device = next(backbone.parameters()).device
    was_training = backbone.training
    backbone.eval()
    all_cls = []
    all_labels = []
    all_patches = []
    for pixels, labels, _ in iterate_batches(images, batch_size, num_workers):
        tokens = backbone(normalize(pixels.to(device)))
        all_cls.append(tokens.cls.float().cpu())
        all_labels.append(labels)
        if patches:
            all_patches.append(tokens.patches.float().cpu())
    backbone.train(was_training)
    return torch.cat(all_cls), torch.cat(all_labels), torch.cat(all_patches) if patches else None
