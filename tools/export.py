"""Weights for others: written for Hugging Face, timm and Meta's own code.

    python export.py runs/laptop --to hf --out laptop-hf                       # a folder for transformers
    python export.py runs/laptop --to timm --out laptop.safetensors
    python export.py runs/laptop --to meta --out laptop.pth
    python export.py dinov2_vits14_reg4 --download                             # Meta's file, into the cache

What is unusual here: the names come from the table in weights.py that reading uses too, and safetensors files
are written by hand, which is ten lines. What is written is read again at once and must see an image as its
origin does (the last line: about 1e-6 or less). That holds at the native size: at others, every library
interpolates the positions in its own way.
"""

import argparse
import json
from pathlib import Path

import torch

import config
from config import UserError
from features import infer_arch
from runfolder import atomic_open, atomic_write_text
from tools.weights import DTYPES, download, load_backbone, rename


def write_safetensors(path, tensors, arch):
    header, end = {"__metadata__": {"format": "pt", "nanodino": json.dumps(arch)}}, 0
    names = {v: k for k, v in DTYPES.items()}
    for name, x in tensors.items():
        place, end = [end, end + x.nbytes], end + x.nbytes
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with atomic_open(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.contiguous().flatten().view(torch.uint8).numpy())


def write_hf(backbone, out):
    """A folder that Dinov2Model or Dinov2WithRegistersModel .from_pretrained reads."""
    a, tensors, R = dict(backbone.arch), backbone.state_dict(), backbone.num_register_tokens
    if not a["layerscale"]:  # theirs always multiplies: by one
        a["layerscale"] = 1.0
        one = torch.ones(a["embed_dim"])
        tensors |= {f"blocks.{i}.ls{j}.gamma": one for i in range(a["depth"]) for j in (1, 2)}
    side = a["img_size"] // a["patch_size"] * a["patch_size"]
    about = dict(
        architectures=["Dinov2WithRegistersModel" if R else "Dinov2Model"],
        model_type="dinov2_with_registers" if R else "dinov2", hidden_size=a["embed_dim"],
        num_hidden_layers=a["depth"], num_attention_heads=a["num_heads"], mlp_ratio=4, hidden_act="gelu",
        layer_norm_eps=1e-6, image_size=side, patch_size=a["patch_size"], num_channels=3, qkv_bias=True,
        layerscale_value=float(a["layerscale"]), drop_path_rate=0.0, torch_dtype="float32",
        use_swiglu_ffn=a["ffn_layer"] != "mlp", **({"num_register_tokens": R} if R else {}))  # fmt: skip
    resize, crop = (256, 224) if side == 518 else (side, side)  # 256 and 224 are the published protocol
    images = dict(
        image_processor_type="BitImageProcessor", do_convert_rgb=True, do_resize=True, resample=3,
        size={"shortest_edge": resize}, do_center_crop=True, crop_size={"height": crop, "width": crop},
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])  # fmt: skip
    write_safetensors(out / "model.safetensors", rename(tensors, "hf"), a)
    atomic_write_text(out / "config.json", json.dumps(about, indent=2))
    atomic_write_text(out / "preprocessor_config.json", json.dumps(images, indent=2))
    return f"transformers.{about['architectures'][0]}.from_pretrained({str(out)!r})"


def write_timm(backbone, out):
    """timm's names in a safetensors file -> how to make the model that loads it."""
    a, tensors = backbone.arch, rename(backbone.state_dict(), "timm")
    model = dict(img_size=a["img_size"] // a["patch_size"] * a["patch_size"], patch_size=a["patch_size"],
                 embed_dim=a["embed_dim"], depth=a["depth"], num_heads=a["num_heads"],
                 init_values=a["layerscale"])  # fmt: skip
    if a["num_register_tokens"]:  # theirs have no place for the position of [CLS]: it goes into the token
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
        model |= dict(reg_tokens=a["num_register_tokens"], no_embed_class=True)
    write_safetensors(out, tensors, a)
    name = "vit_giant_patch14_dinov2" if a["ffn_layer"] != "mlp" else "vit_small_patch14_dinov2"
    if a["ffn_layer"] != "mlp":
        model["mlp_ratio"] = (tensors["blocks.0.mlp.fc1.bias"].numel() + 0.5) / a["embed_dim"]  # cut off
    given = ", ".join(f"{k}={v}" for k, v in model.items())
    return f"timm.create_model('{name}', checkpoint_path={str(out)!r}, {given})"


def write_meta(backbone, out):
    """Bare tensors under the official names, as released; refused where they would not say enough."""
    tensors, a = backbone.state_dict(), backbone.arch
    shown = infer_arch(tensors, {}, out)
    if a["num_heads"] != shown["num_heads"]:
        raise UserError(f"bare tensors can't say that a ViT of width {a['embed_dim']} has {a['num_heads']} "
                        f"heads, readers expect {shown['num_heads']}: use --to hf")  # fmt: skip
    with atomic_open(out) as f:
        torch.save(tensors, f)
    return f"model.load_state_dict(torch.load({str(out)!r}, weights_only=True))"


def note(backbone, to):
    """What differs away from the native size, if anything."""
    a = backbone.arch
    ours = a["interpolate_antialias"], a["interpolate_offset"]
    meta = (True, 0.0) if a["num_register_tokens"] else (False, 0.1)  # what one takes the file for
    theirs = {"hf": (meta[0], 0.0), "timm": (True, 0.0), "meta": meta}[to]
    if ours == theirs:
        return "positions are interpolated there as here"
    there, here = ("antialias {} and offset {}".format(*how) for how in (theirs, ours))
    return (f"at other sizes than {a['img_size']} features differ by some percent: positions are "
            f"interpolated with {there} there, with {here} here")  # fmt: skip


@torch.no_grad()
def difference(a, b):
    """Largest difference of two backbones' tokens for one image of noise at the native size."""
    side = a.arch["img_size"] // a.patch_size * a.patch_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return max((x - y).abs().max().item() for x, y in zip(a(image), b(image)) if x.numel())


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("weights", help="a run folder, a weights file, or a released name such as dinov2_vits14_reg4")
    add("--to", choices=["hf", "timm", "meta"], help="the layout to write")
    add("--out", type=Path, help="a folder (hf), a .safetensors file (timm) or a .pth file (meta)")
    add("--download", action="store_true", help="fetch Meta's file of that name, if it is not in the cache")
    args = parser.parse_args()
    weights = download(args.weights) if args.download else args.weights
    if args.to is None and args.download:
        return print(f"{weights} is there")
    suffix = {"hf": "", "timm": ".safetensors", "meta": ".pth", None: None}[args.to]
    if args.out is None or args.out.suffix != suffix and args.to != "hf":
        what = f"a {suffix} file" if suffix else "a folder"
        raise UserError(f"give --to (hf, timm or meta) and --out, {what}")
    backbone = load_backbone(weights)
    try:
        how = {"hf": write_hf, "timm": write_timm, "meta": write_meta}[args.to](backbone, args.out)
    except (OSError, RuntimeError) as e:  # torch.save knows the second
        raise UserError(f"{args.out} cannot be written ({e}): name another place") from None
    print(f"wrote {args.out}: {how}\n{note(backbone, args.to)}")
    print(f"largest difference of features, read again: {difference(backbone, load_backbone(args.out)):.1e}")


if __name__ == "__main__":
    config.run(main)
