"""Weights in foreign layouts: files of timm and Hugging Face, and training checkpoints of other programs.

features.py reads run folders and Meta's released files. What is read here besides ends up under the same
names, DINOv2's own, in the same strict load_backbone. Checkpoints may be those of DINO, iBOT, DINOv2 or
Lightning: of student and teacher, the teacher is taken. No code from a file is ever run, and nothing is
fetched unless `download` is called.

One table of names serves reading and writing (export.py). safetensors files need no package: 8 bytes hold the
length of the header; the header is JSON with the type, shape and place of every tensor; then come the bytes.
The file is mapped into memory, and whatever its header claims is checked before it is used.
"""

import math
import os
import re
from pathlib import Path

import numpy as np
import torch

import features
from config import UserError, parse_json
from hubconf import _download as download

WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
SIZE_OF_WIDTH = {width: size for size, width in WIDTHS.items()}
RELEASED_NAMES = (  # of the released models at Meta, timm and Hugging Face
    r"dinov2_vit(?P<size>[sblg])14(?P<reg>_reg4)?_pretrain",
    r"vit_(?P<size>small|base|large|giant)_patch14(?P<reg>_reg4)?_dinov2",
    r"dinov2(?P<reg>-with-registers)?-(?P<size>small|base|large|giant)$",
)
DTYPES = dict(zip(("F64", "F32", "F16", "BF16"), features.WEIGHT_DTYPES))
MAX_HEADER = 100_000_000  # bytes of a safetensors header

# Where a checkpoint keeps its network; the first of them counts.
NETWORK_KEYS = ("teacher", "model", "state_dict", "model_state_dict", "student")
WRAPPERS = r"(^|\.)(?:(?:module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.)+"
FIRST_LAYER = r"(|.*\.)(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight"
OTHER_NETWORKS = {  # what a file holds: how one of its names, or the rest of it after a dot, begins
    features.RANK_SHARD: r"_?flat_param",
    "a DINOv3 model: another architecture (rotary positions), not read here; take a DINOv2 file":
        r"storage_tokens|rope_embed\.|attn\.qkv\.bias_mask|layer\.\d+\.attention\.o_proj\.",
    "a BEiT, EVA or DINOv3 model of timm: other architectures, not read here; take a DINOv2 file":
        r"blocks\.\d+\.gamma_1$|relative_position_bias_table$",
    "a ViT in the names of Hugging Face's ViTModel: not DINOv2's; take a DINOv2 file, or DINOv1's original":
        r"layernorm_before\.",
    "the image encoder of CLIP or SigLIP, another architecture, not read here; take a DINOv2 file":
        r"visual\.|vision_model\.|norm_pre\.|attn_pool\.",
    "a masked autoencoder with its decoder, not DINOv2; take a DINOv2 file": r"decoder_(?:embed|blocks)\.",
    "a convolutional network or a Swin transformer, not read here; take a DINOv2 file":
        r"layer1\.0\.|stages\.0\.|layers\.0\.blocks\.|downsample_layers\.",
}  # fmt: skip

LAYOUT_COLUMNS = {"hf": 0, "timm": 1}
QKV = "encoder.layer.#.attention.attention."
PARAMETER_NAMES = {  # ours (and Meta's), without .weight and .bias: (transformers', timm's)
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


# ---------------------------------------------------------------- weights of any layout


def add_weights_args(parser):
    """--weights, --download and those of add_image_args, which every script for frozen features takes."""
    parser.add_argument("--weights", default="runs/laptop", help="a run folder, a file of weights "
                        "(teacher.pth, Meta's, timm's, Hugging Face's, a training checkpoint of DINO, iBOT, "
                        "DINOv2 or Lightning) or a released name such as "
                        "dinov2_vits14_reg4; with random: before it, the same network untrained")  # fmt: skip
    parser.add_argument("--download", action="store_true",
                        help="fetch Meta's file of that name if it is not in the cache")  # fmt: skip
    features.add_image_args(parser)


def open_backbone(source, fetch=False, dtype="fp32"):
    """--weights, --download and --dtype -> a frozen VisionTransformer and its config.

    As features.open_backbone, for weights of any known layout.
    """
    if fetch and not str(source).startswith("random:"):
        source = download(source)
    return features.open_backbone(source, load_backbone, dtype)


def loaded_weights(backbone):
    """The weights as `open_backbone` found them, whatever --dtype made of them; they tell backbones apart."""
    return getattr(backbone, "loaded_weights", None) or backbone.state_dict()


def load_backbone(source):
    """A frozen backbone in eval mode, from weights of any known layout (always strict). Raises UserError."""
    tensors, _, arch = read_weights(source)
    return features.build_backbone(tensors, arch, source)


def read_weights(source):
    """As features.read_weights, for any known layout: backbone and head tensors, architecture (or {}).

    A backbone of DINOv1, iBOT or timm has no mask token: it gets zeros (1, D), which only masking would use.
    Raises UserError that names what a file holds instead of a DINOv2 backbone.
    """
    path = Path(source)
    if os.path.isdir(path) and not os.path.isfile(path / "teacher.pth"):
        path = path / "model.safetensors"
    if path.suffix == ".safetensors" and os.path.isfile(path):
        tensors, arch = read_safetensors(path)
    else:
        path = features.find_weights(source, ", or a .safetensors file, alone or in a folder")
        tensors, arch = read_checkpoint(path)
    tensors = unwrap_names(tensors, path)
    backbone, heads = select_network(tensors, path)
    refuse_other_networks(backbone | heads, path)
    features.check_tensors(backbone, path)
    arch = stated_arch(arch, path, backbone)
    return to_dinov2_names(backbone, path), heads, arch


def read_checkpoint(path):
    """A file that torch.save wrote -> the tensors of its network (or two), architecture (or {})."""
    content = features.load_plain_data(path)
    key = next((key for key in NETWORK_KEYS if isinstance(content.get(key), dict)), None)
    if key is None and content.keys() & {"optimizer", "optimizer_states", "param_groups"}:
        raise UserError(f"{path} holds the state of an optimizer and no network: take the file of the "
                        f"network, which lies beside it in most programs")  # fmt: skip
    tensors = content if key is None else content[key]
    arch = {}
    if key in ("teacher", "model", None):  # elsewhere, "arch" is the name of a model
        arch = content.get("arch") or {}
    features.check_named(tensors, arch, path)
    return tensors, arch


# ---------------------------------------------------------------- one network of a checkpoint


def unwrap_names(tensors, path):
    """Names without the words of data parallelism, FSDP, checkpointing and torch.compile."""
    unwrapped = {re.sub(WRAPPERS, r"\1", name): x for name, x in tensors.items()}
    if len(unwrapped) < len(tensors):
        raise UserError(f"{path} holds a network both with and without a wrapper: save one of them alone")
    return unwrapped


def refuse_other_networks(tensors, path):
    """Raise UserError that says what the file holds, if the names of its tensors tell."""
    for network, pattern in OTHER_NETWORKS.items():
        if any(re.search(rf"(^|\.)(?:{pattern})", name) for name in tensors):
            raise UserError(f"{path} holds {network}")
    if "head.weight" in tensors and not any(".ls1." in name for name in tensors):
        raise UserError(f"{path} holds a ViT trained as a classifier (head.weight), not DINOv2: take a "
                        f"DINOv2 file")  # fmt: skip


def select_network(tensors, path):
    """-> the teacher's backbone and heads; those of the only network if there is no other."""
    prefix = backbone_prefix(tensors, path)
    network = prefix.removesuffix("backbone.")
    selected = {}
    for name, x in tensors.items():
        if name.startswith(prefix) or (name.startswith(network) and "head." in name):
            selected[name.removeprefix(network)] = x
    return features.split_heads(selected)


def backbone_prefix(names, path):
    """What precedes the names of the teacher's backbone: "", "backbone.", "teacher_backbone.", "dinov2."."""
    matches = [re.fullmatch(FIRST_LAYER, name) for name in names]
    prefixes = [match[1] for match in matches if match] or [""]
    teachers = [prefix for prefix in prefixes if "teacher" in prefix]
    if len(prefixes) == 1:
        return prefixes[0]
    if len(teachers) == 1:
        return teachers[0]
    listed = ", ".join(prefix or "no prefix" for prefix in prefixes[:4])
    raise UserError(f"{path} holds {len(prefixes)} backbones ({listed}) and does not say which is the "
                    f"teacher: save one of them alone")  # fmt: skip


# ---------------------------------------------------------------- names


def names_in_layout(layout, swiglu):
    """{our name: tuple of theirs} in the layout "hf" or "timm". timm calls both kinds of MLP fc1 and fc2."""
    absent = ("fc1", "fc2") if swiglu else ("w12", "w3")
    names = {}
    for ours, row in PARAMETER_NAMES.items():
        theirs = row[LAYOUT_COLUMNS[layout]]
        if theirs is not None and not ours.endswith(absent):
            names[ours] = (theirs,) if isinstance(theirs, str) else theirs
    return names


def split_name(name):
    """'blocks.3.norm1.bias' -> 'blocks.#.norm1', '3', '.bias'"""
    stem, suffix = re.fullmatch(r"(.*?)(\.weight|\.bias)?", name, re.S).groups("")
    numbered = re.match(r"(?:blocks|encoder\.layer)\.(\d+)\.", stem)
    if numbered is None:
        return stem, "", suffix
    return stem.replace(numbered[1], "#", 1), numbered[1], suffix


def rename_to(layout, tensors):
    """Our names -> those of the layout; tensors that have no place there are left out."""
    names = names_in_layout(layout, swiglu="blocks.0.mlp.w12.weight" in tensors)
    renamed = {}
    for name, x in tensors.items():
        stem, block, suffix = split_name(name)
        theirs = names.get(stem)
        if theirs:
            for their_stem, piece in zip(theirs, x.chunk(len(theirs))):
                renamed[their_stem.replace("#", block) + suffix] = piece
    return renamed


def rename_from(layout, tensors):
    """The names of the layout -> ours. Unknown names stay, for the strict loading to find."""
    parents = {}  # their stem -> our stem, and all their stems that are joined in it
    for ours, theirs in names_in_layout(layout, has_swiglu(tensors)).items():
        parents.update(dict.fromkeys(theirs, (ours, theirs)))
    renamed = {}
    for name, x in tensors.items():
        stem, block, suffix = split_name(name)
        ours, theirs = parents.get(stem, (stem, (stem,)))
        pieces = [tensors.get(their_stem.replace("#", block) + suffix) for their_stem in theirs]
        new_name = ours.replace("#", block) + suffix
        if any(piece is None for piece in pieces):  # a query without its key
            new_name = name
        elif stem != theirs[0]:  # a key or a value: joined with its query
            continue
        elif len(pieces) > 1:
            x = torch.cat(pieces)
        if new_name in renamed:
            raise KeyError(f"two tensors for {new_name}")
        renamed[new_name] = x
    return renamed


def has_swiglu(tensors):
    """Whether tensors under foreign names have SwiGLU MLPs. In timm's, fc1 holds both of its halves."""
    fc1, fc2 = (tensors.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if fc1 is not None and fc2 is not None and fc1.shape[0] != fc2.shape[-1]:
        return True
    return "encoder.layer.0.mlp.weights_in.weight" in tensors


def flatten_chunks(tensors, path):
    """blocks.CHUNK.INDEX -> blocks.INDEX. In the authors' checkpoints, INDEX goes on from chunk to chunk."""
    flat = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): x for name, x in tensors.items()}
    if len(flat) < len(tensors):
        raise UserError(f"{path} numbers its blocks anew in every chunk: their order is unknown")
    return flat


def to_dinov2_names(tensors, path):
    """Backbone tensors of any known layout -> under DINOv2's own names, and with a mask token.

    The name of the file must agree with them. Raises UserError.
    """
    tensors = flatten_chunks(tensors, path)
    try:
        if "embeddings.cls_token" in tensors:
            tensors = rename_from("hf", tensors)
        elif "cls_token" in tensors and "mask_token" not in tensors:
            tensors = from_timm(tensors)
        if "cls_token" in tensors and "mask_token" not in tensors:  # iBOT's own, or none: see read_weights
            tensors["mask_token"] = tensors.pop("masked_embed", torch.zeros_like(tensors["cls_token"][0]))
    except (RuntimeError, IndexError, KeyError) as e:
        raise UserError(f"{path} holds tensors that fit no DINOv2 model ({type(e).__name__}: {e})") from None
    if lacks_cls_position(tensors):
        count = tensors["pos_embed"].shape[1]
        raise UserError(f"{path} has a pos_embed without [CLS] position ({count} are a square of patches): "
                        f"prepend it, or zeros if cls_token includes it")  # fmt: skip
    check_file_name(tensors, path)
    return tensors


def lacks_cls_position(tensors):
    """Whether pos_embed (1, n, D) has a square of patches alone: n n + 1 is no square."""
    positions = tensors.get("pos_embed")
    if positions is None or positions.dim() != 3:
        return False
    return positions.shape[1] > 1 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]


def from_timm(tensors):
    """timm's tensors, or DINOv1's, under our names.

    timm's models with registers have added the position of [CLS] to its token: it gets zeros.
    """
    tensors = rename_from("timm", tensors)
    if lacks_cls_position(tensors):
        no_position = torch.zeros_like(tensors["cls_token"])
        tensors["pos_embed"] = torch.cat([no_position, tensors["pos_embed"]], dim=1)
    return tensors


def check_file_name(tensors, path):
    """Refuse a file that is named after one released model and holds another."""
    name = path.parent.name if path.stem in ("model", "pytorch_model") else path.name
    matches = [re.search(pattern, name) for pattern in RELEASED_NAMES]
    match = next((match for match in matches if match), None)
    cls_token = tensors.get("cls_token")
    if match is None or cls_token is None or not cls_token.dim():
        return
    width = next(width for size, width in WIDTHS.items() if size[0] == match["size"][0])
    named = (width, bool(match["reg"]))
    held = (cls_token.shape[-1], any("register_tokens" in name for name in tensors))
    if named != held:
        raise UserError(f"{path} is named after a ViT-{describe_released(*named)} but holds a "
                        f"ViT-{describe_released(*held)}: give it its right name")  # fmt: skip


def describe_released(width, has_registers):
    """'small (width 384) with registers'"""
    size = SIZE_OF_WIDTH.get(width, "of another size")
    return f"{size} (width {width}) {'with' if has_registers else 'without'} registers"


# ---------------------------------------------------------------- safetensors


def read_safetensors(path):
    """-> {name: tensor in the mapped file}, and the architecture as far as its metadata state it.

    Raises UserError if the header contradicts itself or the size of the file.
    """
    try:
        header, data_start, file_size = read_header(path)
        metadata = header.pop("__metadata__", {})
        spans = {name: tensor_span(name, entry) for name, entry in header.items()}
        check_spans(spans, file_size - data_start)
        arch = dict(parse_json(metadata.get("nanodino", "{}")))
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is no intact safetensors file ({e}): download or export it again") from None
    data = torch.from_numpy(np.memmap(path, np.uint8, "c"))[data_start:]
    tensors = {}
    for name in sorted(spans, key=spans.get):
        start, end = spans[name]
        dtype = DTYPES[header[name]["dtype"]]
        x = data[start:end]
        if (data_start + start) % dtype.itemsize:  # not aligned: view would refuse it
            x = x.clone()
        tensors[name] = x.view(dtype).view(header[name]["shape"])
    return tensors, arch


def read_header(path):
    """-> the header, where the bytes after it begin, and the size of the file."""
    with open(path, "rb") as f:
        file_size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        if file_size < 8 or length > min(file_size - 8, MAX_HEADER):
            raise ValueError(f"its header claims {length} bytes, the file has {file_size}")
        return parse_json(f.read(length)), 8 + length, file_size


def tensor_span(name, entry):
    """(first byte, last + 1) of a tensor, after checking that its shape needs exactly that many bytes."""
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if not name.isprintable():
        raise ValueError(f"it has a tensor called {name!r}")
    if dtype not in DTYPES:
        raise ValueError(f"{name} is of type {dtype}, weights are of {', '.join(DTYPES)}")
    numbers = [*shape, *offsets]
    whole = all(type(n) is int and 0 <= n < 2**48 for n in numbers)
    if not whole or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"{name} has a shape {shape} at {offsets}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} of shape {shape} can't lie at {offsets}")
    return tuple(offsets)


def check_spans(spans, size):
    """ValueError unless the spans, one after the other, fill the `size` bytes after the header."""
    end = 0
    for (start, stop), name in sorted((span, name) for name, span in spans.items()):
        if start != end:
            raise ValueError(f"the bytes of {name} overlap others or leave a gap")
        end = stop
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, the file has {size} for them")


def stated_arch(arch, path, tensors):
    """What shapes don't show: `arch` as our own file states it, or what Hugging Face's config.json says."""
    config_file = path.parent / "config.json"
    if "embeddings.cls_token" in tensors and config_file.is_file():
        width = tensors["embeddings.cls_token"].shape[-1:].numel()
        arch = {"num_heads": read_num_heads(config_file, path, width)} | arch
    return arch


def read_num_heads(config_file, path, width):
    """The number of heads in Hugging Face's config.json, which must describe a network of our kind."""
    try:
        hf_config = parse_json(config_file.read_text(encoding="utf-8"))
        num_heads = hf_config["num_attention_heads"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{config_file} is no config of a DINOv2 model ({type(e).__name__}: {e})") from None
    fixed = dict(hidden_size=width, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True, mlp_ratio=4)
    for key, value in fixed.items():
        if hf_config.get(key, value) != value:
            found = hf_config[key]
            raise UserError(f"{config_file} says {key} {found}: the model of {path.name} has {value}")
    return num_heads
