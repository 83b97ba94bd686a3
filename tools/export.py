"""Export weights to Hugging Face, timm and Meta's own code; convert theirs to ours.

    python -m tools.export runs/laptop --to hf --out laptop-hf                 # a folder for transformers
    python -m tools.export runs/laptop --to timm --out laptop.safetensors
    python -m tools.export runs/laptop --to meta --out laptop.pth
    python -m tools.export timm.safetensors --to meta --out weights.pth        # for train.init_from, eval_knn
    python -m tools.export dinov2_vits14_reg4 --download                       # Meta's file, into the cache

Whatever weights.py reads can be exported. What is written is read back at once, and the last line says by how
much its features differ for one image: about 1e-6 or less. That holds at the native size; at others, every
library interpolates the positions in its own way. safetensors files are written by hand, which takes ten
lines.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Annotated

import torch

import config
from config import Pattern, UserError, argument
from features import infer_arch
from runfolder import atomic_open, atomic_write_text
from tools.weights import DTYPES, download, load_backbone, rename_to

Sha256 = Annotated[str, Pattern("[0-9a-fA-F]{64}", "64 hexadecimal digits")]


def write_safetensors(path, tensors, arch):
    """Named tensors into a file, with `arch` (what constructs the backbone) as its metadata."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt", "nanodino": json.dumps(arch)}}
    end = 0
    for name, x in tensors.items():
        start = end
        end = start + x.nbytes
        dtype = dtype_names[x.dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with atomic_open(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.contiguous().flatten().view(torch.uint8).numpy())


def native_size(arch):
    """Side in pixels of the images whose positions are not interpolated."""
    return arch["img_size"] // arch["patch_size"] * arch["patch_size"]


# ---------------------------------------------------------------- one writer per layout
# Each returns the line of Python that loads what it has written.


def write_hf(backbone, out):
    """A folder that Dinov2Model or Dinov2WithRegistersModel .from_pretrained reads."""
    arch = dict(backbone.arch)
    tensors = backbone.state_dict()
    if not arch["layerscale"]:  # theirs always multiplies: by one
        arch["layerscale"] = 1.0
        for i in range(arch["depth"]):
            tensors[f"blocks.{i}.ls1.gamma"] = torch.ones(arch["embed_dim"])
            tensors[f"blocks.{i}.ls2.gamma"] = torch.ones(arch["embed_dim"])
    model_config = hf_model_config(arch)
    write_safetensors(out / "model.safetensors", rename_to("hf", tensors), arch)
    atomic_write_text(out / "config.json", json.dumps(model_config, indent=2))
    processor_config = hf_processor_config(native_size(arch))
    atomic_write_text(out / "preprocessor_config.json", json.dumps(processor_config, indent=2))
    return f"transformers.{model_config['architectures'][0]}.from_pretrained({str(out)!r})"


def hf_model_config(arch):
    """The config.json of transformers for a backbone of ours."""
    R = arch["num_register_tokens"]
    model_config = dict(
        architectures=["Dinov2WithRegistersModel" if R else "Dinov2Model"],
        model_type="dinov2_with_registers" if R else "dinov2",
        hidden_size=arch["embed_dim"], num_hidden_layers=arch["depth"],
        num_attention_heads=arch["num_heads"], mlp_ratio=4, hidden_act="gelu", layer_norm_eps=1e-6,
        image_size=native_size(arch), patch_size=arch["patch_size"], num_channels=3, qkv_bias=True,
        layerscale_value=float(arch["layerscale"]), drop_path_rate=0.0, torch_dtype="float32",
        use_swiglu_ffn=arch["ffn_layer"] != "mlp")  # fmt: skip
    if R:
        model_config["num_register_tokens"] = R
    return model_config


def hf_processor_config(side):
    """The preprocessor_config.json of transformers for images of `side` pixels."""
    resize, crop = (256, 224) if side == 518 else (side, side)  # 256 and 224 are the published protocol
    return dict(
        image_processor_type="BitImageProcessor", do_convert_rgb=True, do_resize=True, resample=3,
        size={"shortest_edge": resize}, do_center_crop=True, crop_size={"height": crop, "width": crop},
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])  # fmt: skip


def write_timm(backbone, out):
    """A safetensors file with timm's names."""
    arch = backbone.arch
    tensors = rename_to("timm", backbone.state_dict())
    arguments = dict(
        img_size=native_size(arch), patch_size=arch["patch_size"], embed_dim=arch["embed_dim"],
        depth=arch["depth"], num_heads=arch["num_heads"], init_values=arch["layerscale"])  # fmt: skip
    if arch["num_register_tokens"]:  # theirs has no place for the position of [CLS]: add it to the token
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
        arguments |= dict(reg_tokens=arch["num_register_tokens"], no_embed_class=True)
    write_safetensors(out, tensors, arch)
    name = "vit_small_patch14_dinov2"
    if arch["ffn_layer"] != "mlp":
        name = "vit_giant_patch14_dinov2"
        width = tensors["blocks.0.mlp.fc1.bias"].numel()
        arguments["mlp_ratio"] = (width + 0.5) / arch["embed_dim"]  # timm cuts the product off
    listed = ", ".join(f"{key}={value}" for key, value in arguments.items())
    return f"timm.create_model('{name}', checkpoint_path={str(out)!r}, {listed})"


def write_meta(backbone, out):
    """Bare tensors under DINOv2's names, as released. UserError if shapes alone don't say how many heads."""
    tensors = backbone.state_dict()
    num_heads = backbone.arch["num_heads"]
    inferred = infer_arch(tensors, {}, out)["num_heads"]
    if num_heads != inferred:
        width = backbone.arch["embed_dim"]
        raise UserError(f"bare tensors can't say that a ViT of width {width} has {num_heads} heads, readers "
                        f"expect {inferred}: use --to hf")  # fmt: skip
    with atomic_open(out) as f:
        torch.save(tensors, f)
    return f"model.load_state_dict(torch.load({str(out)!r}, weights_only=True))"


WRITERS = {"hf": write_hf, "timm": write_timm, "meta": write_meta}
SUFFIXES = {"timm": ".safetensors", "meta": ".pth"}  # hf: a folder, whatever its name

# ---------------------------------------------------------------- the comparison


def describe_interpolation(backbone, layout):
    """Whether the readers of the layout interpolate positions as this backbone does, in a sentence."""
    arch = backbone.arch
    ours = (arch["interpolate_antialias"], arch["interpolate_offset"])
    released = (True, 0.0) if arch["num_register_tokens"] else (False, 0.1)  # of Meta's models of this kind
    theirs = {"hf": (released[0], 0.0), "timm": (True, 0.0), "meta": released}[layout]
    if ours == theirs:
        return "positions are interpolated there as here"
    here = "antialias {} and offset {}".format(*ours)
    there = "antialias {} and offset {}".format(*theirs)
    return (f"at other sizes than {arch['img_size']} features differ by some percent: positions are "
            f"interpolated with {there} there, with {here} here")  # fmt: skip


@torch.no_grad()
def largest_difference(a, b):
    """Between the tokens of two backbones, for one image of noise at the native size."""
    side = native_size(a.arch)
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return max((x - y).abs().max().item() for x, y in zip(a(image), b(image)) if x.numel())


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", help="a run folder, a file or folder of weights, or a released name such "
                        "as dinov2_vits14_reg4")  # fmt: skip
    parser.add_argument("--to", choices=WRITERS, help="the layout to write")
    parser.add_argument(
        "--out", type=argument(Path), help="a folder (hf), a .safetensors (timm), a .pth (meta)"
    )
    parser.add_argument("--download", action="store_true",
                        help="fetch Meta's file of that name if it is not in the cache")  # fmt: skip
    parser.add_argument("--sha256", metavar="HEX", type=argument(Sha256),
                        help="with --download: the sum that its file must have")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.sha256 and not args.download:
        raise UserError("--sha256 goes with --download: it is the sum of the file that is fetched")
    weights = download(args.weights, args.sha256) if args.download else args.weights
    if args.to is None and args.download:
        print(f"{weights} is there")
        return
    suffix = SUFFIXES.get(args.to)
    if args.to is None or args.out is None or (suffix and args.out.suffix != suffix):
        expected = f"a {suffix} file" if suffix else "a folder"
        raise UserError(f"give --to (hf, timm or meta) and --out, {expected}")
    backbone = load_backbone(weights)
    for source in (Path(weights), Path(weights) / "teacher.pth"):
        if os.path.exists(source) and args.out.exists() and args.out.samefile(source):
            raise UserError(f"--out {args.out} is what is exported: name another")
    try:
        loading = WRITERS[args.to](backbone, args.out)
    except (OSError, RuntimeError) as e:  # torch.save raises the second
        raise UserError(f"{args.out} cannot be written ({e}): name another place") from None
    print(f"wrote {args.out}: {loading}")
    print(describe_interpolation(backbone, args.to))
    difference = largest_difference(backbone, load_backbone(args.out))
    print(f"largest difference of features, read back: {difference:.1e}")


if __name__ == "__main__":
    config.run(main)
