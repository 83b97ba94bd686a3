"""Files of weights, of whatever layout, never running code from them: tensors under DINOv2's own names.

Read are a run's teacher.pth, Meta's released files, training checkpoints of the authors' code (blocks in
chunks), and the files of timm and Hugging Face. features.load_backbone makes a network of what comes out.

What is unusual here: one table of names serves reading and writing (export.py); safetensors files are read
without a package: 8 bytes that say how long the header is, the header (JSON: type, shape and place of every
tensor), then the bytes. The file is mapped into memory, and nothing in it is believed before it is checked.
Nothing is fetched unless `download` is called.
"""

import json
import math
import os
import re
from pathlib import Path

import torch

import features
from config import UserError
from hubconf import _download as download

WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
SIZE = {width: size for size, width in WIDTHS.items()}
NAMES = (  # how Meta, timm and Hugging Face call the released models
    r"dinov2_vit(?P<size>[sblg])14(?P<reg>_reg4)?_pretrain",
    r"vit_(?P<size>small|base|large|giant)_patch14(?P<reg>_reg4)?_dinov2",
    r"dinov2(?P<reg>-with-registers)?-(?P<size>small|base|large|giant)$",
)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

QKV = "encoder.layer.#.attention.attention."
LAYOUTS = {  # our (and Meta's) name: the same in files of transformers and of timm, without .weight and .bias
    "cls_token": ("embeddings.cls_token", "cls_token"),
    "pos_embed": ("embeddings.position_embeddings", "pos_embed"),
    "register_tokens": ("embeddings.register_tokens", "reg_token"),
    "mask_token": ("embeddings.mask_token", None),  # timm has no use for it
    "patch_embed.proj": ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "blocks.#.norm1": ("encoder.layer.#.norm1", "blocks.#.norm1"),
    "blocks.#.attn.qkv": ((QKV + "query", QKV + "key", QKV + "value"), "blocks.#.attn.qkv"),  # rows in thirds
    "blocks.#.attn.proj": ("encoder.layer.#.attention.output.dense", "blocks.#.attn.proj"),
    "blocks.#.ls1.gamma": ("encoder.layer.#.layer_scale1.lambda1", "blocks.#.ls1.gamma"),
    "blocks.#.norm2": ("encoder.layer.#.norm2", "blocks.#.norm2"),
    "blocks.#.mlp.fc1": ("encoder.layer.#.mlp.fc1", "blocks.#.mlp.fc1"),
    "blocks.#.mlp.fc2": ("encoder.layer.#.mlp.fc2", "blocks.#.mlp.fc2"),
    "blocks.#.mlp.w12": ("encoder.layer.#.mlp.weights_in", "blocks.#.mlp.fc1"),
    "blocks.#.mlp.w3": ("encoder.layer.#.mlp.weights_out", "blocks.#.mlp.fc2"),
    "blocks.#.ls2.gamma": ("encoder.layer.#.layer_scale2.lambda1", "blocks.#.ls2.gamma"),
    "norm": ("layernorm", "norm"),
}


# ---------------------------------------------------------------- names


def name_table(layout, swiglu):
    """{our name: tuple of theirs} of one layout; timm calls both kinds of MLP fc1 and fc2."""
    other = ("fc1", "fc2") if swiglu else ("w12", "w3")
    theirs = {k: v[layout == "timm"] for k, v in LAYOUTS.items() if not k.endswith(other)}
    return {k: (v,) if isinstance(v, str) else v for k, v in theirs.items() if v}


def split_name(name):
    """'blocks.3.norm1.bias' -> 'blocks.#.norm1', '3', '.bias'"""
    stem, end = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.S).groups()
    number = re.search(r"^(?:blocks|encoder\.layer)\.(\d+)\.", stem)
    return (stem.replace(number[1], "#", 1), number[1], end or "") if number else (stem, "", end or "")


def rename(tensors, layout):
    """Our names -> theirs."""
    names, renamed = name_table(layout, "blocks.0.mlp.w12.weight" in tensors), {}
    for name, x in tensors.items():
        stem, number, end = split_name(name)
        theirs = names.get(stem, ())
        for new, piece in zip(theirs, x.chunk(max(len(theirs), 1))):
            renamed[new.replace("#", number) + end] = piece
    return renamed


def rename_back(tensors, layout):
    """Their names -> ours. Names that are unknown stay, for the strict loading to find."""
    first, second = (tensors.get(f"blocks.0.mlp.{k}.weight") for k in ("fc1", "fc2"))
    packed = None not in (first, second) and first.shape[0] != second.shape[-1]  # both halves of a SwiGLU
    swiglu = packed or "encoder.layer.0.mlp.weights_in.weight" in tensors
    inverse = {new: (ours, theirs) for ours, theirs in name_table(layout, swiglu).items() for new in theirs}
    renamed = {}
    for name, x in tensors.items():
        stem, number, end = split_name(name)
        ours, theirs = inverse.get(stem, (stem, (stem,)))
        pieces = [tensors.get(t.replace("#", number) + end) for t in theirs]
        if any(p is None for p in pieces):  # a query without its key
            new = name
        elif stem == theirs[0]:  # and the others with it
            new, x = ours.replace("#", number) + end, torch.cat(pieces) if len(pieces) > 1 else x
        else:
            continue
        if new in renamed:
            raise KeyError(f"two tensors for {new}")
        renamed[new] = x
    return renamed


def unchunk(tensors, path):
    """Names of the authors' training checkpoints -> released ones.

    FSDP and torch.compile add words of their own; blocks.CHUNK.INDEX counts INDEX through all chunks. Where
    both networks are in the file, the teacher's tensors are taken.
    """
    words = r"(^|\.)(?:(?:module|_fsdp_wrapped_module|_orig_mod)\.)+"
    tensors = {re.sub(words, r"\1", k): v for k, v in tensors.items()}
    if any(k.startswith("teacher.") for k in tensors):
        tensors = {k.removeprefix("teacher."): v for k, v in tensors.items() if k.startswith("teacher.")}
    flat = {re.sub(r"\bblocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in tensors.items()}
    if len(flat) < len(tensors):
        raise UserError(f"{path} counts its blocks anew in every chunk: which comes first can't be told")
    return flat


def to_dinov2_names(tensors, path):
    """Tensors of any known layout under DINOv2's own names; the file's name must agree with them."""
    tensors = unchunk(tensors, path)
    try:
        if "embeddings.cls_token" in tensors:
            tensors = rename_back(tensors, "hf")
        elif "cls_token" in tensors and "mask_token" not in tensors:
            tensors = from_timm(tensors)
    except (RuntimeError, IndexError, KeyError) as e:
        raise UserError(f"{path} holds tensors that fit no DINOv2 model ({type(e).__name__}: {e})") from None
    check_name(tensors, path)
    return tensors


def from_timm(tensors):
    """timm's tensors under our names. With registers, the position of [CLS] is in the token already."""
    tensors = rename_back(tensors, "timm")
    cls, positions = tensors["cls_token"], tensors["pos_embed"]
    if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # patches alone: n n + 1 is no square
        tensors["pos_embed"] = torch.cat([torch.zeros_like(cls), positions], dim=1)
    tensors["mask_token"] = torch.zeros_like(cls[0])  # they don't keep it; whole images never meet it
    return tensors


def check_name(tensors, path):
    """Refuse a file that is called after one released model and holds another."""
    name = path.parent.name if path.stem in ("model", "pytorch_model") else path.name
    found = next((m for m in (re.search(p, name) for p in NAMES) if m), None)
    cls = next((tensors[k] for k in ("cls_token", "backbone.cls_token") if k in tensors), None)
    if found is None or cls is None or not cls.dim():
        return
    width = next(w for size, w in WIDTHS.items() if size[0] == found["size"][0])
    called, held = (width, bool(found["reg"])), (cls.shape[-1], any("register_tokens" in k for k in tensors))
    if called != held:
        a, b = (f"{SIZE.get(w, 'of another size')} (width {w}) {'with' if reg else 'without'} registers"
                for w, reg in (called, held))  # fmt: skip
        raise UserError(f"{path} is called after a ViT-{a} but holds a ViT-{b}: give it its right name")



# ---------------------------------------------------------------- safetensors


def read_safetensors(path):
    """-> tensors by name, lying in the mapped file, and what it or its folder says of the network."""
    try:
        with open(path, "rb") as f:
            size, length = os.fstat(f.fileno()).st_size, int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, 100_000_000):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(f.read(length))
        metadata = header.pop("__metadata__", {})
        spans = sorted((tensor_span(name, entry), name) for name, entry in header.items())
        end = 0
        for (start, stop), name in spans:
            if start != end:
                raise ValueError(f"the bytes of {name} overlap others or leave a gap")
            end = stop
        if end != size - 8 - length:
            raise ValueError(f"its tensors take {end} bytes, the file has {size - 8 - length} for them")
        arch = json.loads(metadata.get("nanodino", "{}"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is no intact safetensors file ({e}): download or export it again") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for (start, stop), name in spans:
        dtype, x = DTYPES[header[name]["dtype"]], data[start:stop]
        aligned = (8 + length + start) % dtype.itemsize == 0
        tensors[name] = (x if aligned else x.clone()).view(dtype).view(header[name]["shape"])
    return tensors, arch_from_metadata(arch, path, tensors)


def tensor_span(name, entry):
    """Where a tensor lies, (first byte, last + 1), after checking that its shape needs just so many bytes."""
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not name.isprintable():
        raise ValueError(f"it has a tensor called {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype}, weights are of {', '.join(DTYPES)}")
    if not all(type(n) is int and 0 <= n < 2**48 for n in [*shape, *place]) or len(place) != 2:
        raise ValueError(f"{name} has a shape {shape} at {place}")
    if place[1] - place[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} of shape {shape} can't lie at {place}")
    return tuple(place)


def arch_from_metadata(arch, path, tensors):
    """What shapes don't show: from `arch`, as our own files hold it, or Hugging Face's config.json."""
    free = ("num_heads", "layerscale", "interpolate_antialias", "interpolate_offset")
    said = {k: v for k, v in arch.items() if k in free} if isinstance(arch, dict) else {}
    width = next((x.shape[-1] for k, x in tensors.items() if k.endswith("cls_token") and x.dim()), 1)
    beside = path.parent / "config.json"
    if "embeddings.cls_token" in tensors and beside.is_file():
        try:
            there = json.loads(beside.read_text(encoding="utf-8"))
            said.setdefault("num_heads", there["num_attention_heads"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{beside} is no config of a DINOv2 model ({type(e).__name__}: {e})") from None
        fixed = dict(hidden_size=width, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True, mlp_ratio=4)
        for key, value in fixed.items():
            if there.get(key, value) != value:
                raise UserError(f"{beside} says {key} {there[key]}: the model of {path.name} has {value}")
    kinds = dict(zip(free, (int, float, bool, float)))
    for key, value in said.items():
        fits = type(value) in (kinds[key], int) and 0 <= value < 1e4
        if not fits or (key == "num_heads" and (value < 1 or width % value)):
            raise UserError(f"{path} says that {key} is {value!r}: no network is like that")
    return said


# ---------------------------------------------------------------- the --weights of every script


def add_weights_args(parser):
    """The arguments of every script for frozen features."""
    add = parser.add_argument
    add("--weights", default="runs/laptop", help="a run folder, a file of weights (teacher.pth, Meta's, "
        "timm's, Hugging Face's) or a released name such as dinov2_vits14_reg4; `random:` before it: the "
        "same network, untrained")  # fmt: skip
    add("--download", action="store_true", help="fetch Meta's file of that name, if it is not in the cache")


def open_backbone(source, fetch=False):
    """--weights and --download -> a frozen VisionTransformer and its config, as features.open_backbone."""
    if fetch and not str(source).startswith("random:"):
        source = download(source)
    return features.open_backbone(source, load_backbone)


def load_backbone(source):
    """A frozen backbone in eval mode, from weights of any known layout (always strict)."""
    tensors, _, arch = read_weights(source)
    return features.build_backbone(tensors, arch, source)


def read_weights(source):
    """As features.read_weights, for any known layout: backbone tensors, head tensors, architecture (or {})."""
    path = Path(source)
    safetensors = path / "model.safetensors" if path.is_dir() else path
    if safetensors.suffix == ".safetensors" and safetensors.is_file():
        path = safetensors
        tensors, arch = read_safetensors(path)
    else:
        path = features.find_weights(source)
        tensors, arch = features.read_tensors(path)
    own = any({p + "mask_token", p + "blocks.0.norm1.weight"} <= tensors.keys() for p in ("", "backbone."))
    if not own or "dinov2" in path.name:
        tensors = to_dinov2_names(tensors, path)
    return *features.split_heads(tensors), arch
