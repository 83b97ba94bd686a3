"""Entries for torch.hub: a backbone, in eval mode, in any project.

    torch.hub.load("PATH/TO/nanodino", "vits14_reg", source="local", weights="runs/vits14")

Nothing is fetched unless `pretrained=True` asks for Meta's file. Without that, and without `weights`, the
backbone is untrained. `weights` is whatever features.load_backbone reads, and must be of this size. While it
loads, this folder comes first on Python's path: if your project has already imported a `model` or `config`
of its own, that one would be taken for ours.
"""

dependencies = ["torch", "yaml", "numpy", "PIL"]

# torch.hub lists every name without an underscore as an entry: everything else has one, or is imported late.
_BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"


def _download(name):
    """Fetch one of Meta's released files, unless it is in the cache -> its path. Raises UserError."""
    from http.client import HTTPException

    from config import UserError
    from features import released_file, released_name

    stem = released_name(name)
    if stem is None:
        names = "dinov2_vits14, vitb14, vitl14, vitg14, and each of them with _reg4"
        raise UserError(f"{name} is not a released model: those are {names}")
    path = released_file(stem)
    if path.is_file():
        return path
    url = f"{_BASE_URL}/{stem.removesuffix('_reg4')}/{path.name}"
    try:
        _fetch(url, path)
    except (OSError, HTTPException, ValueError) as e:
        raise UserError(f"{url} cannot be fetched ({e}): fetch it elsewhere and put it at {path}") from None
    return path


def _fetch(url, path):
    """Write what the URL holds to `path`, once all of it is there. OSError if it is no weights file."""
    import os
    from urllib.request import urlopen

    from tqdm import tqdm

    from runfolder import atomic_open

    with urlopen(url, timeout=30) as answer, atomic_open(path, f".{os.getpid()}") as f:
        size = answer.headers.get("Content-Length")
        size = int(size) if size else None
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
            for piece in iter(lambda: answer.read(1 << 20), b""):
                if f.tell() == 0 and piece[:1] not in (b"P", b"\x80"):  # neither a zip nor a pickle
                    raise OSError("a web page came instead")
                f.write(piece)
                bar.update(len(piece))
        if size and f.tell() != size:
            raise OSError(f"it ended after {f.tell()} of {size} bytes")


def _load(stem, pretrained=False, weights=None):
    """The backbone of a released name, with Meta's weights, with `weights`, or untrained."""
    from config import UserError
    from features import load_backbone, released_arch
    from model import VisionTransformer, describe_backbone

    arch = released_arch(stem)
    if weights is None and not pretrained:
        return VisionTransformer(**arch).eval()
    if weights is None:
        weights = _download(stem)
    backbone = load_backbone(weights)
    expected = {key: arch[key] for key in ("embed_dim", "depth", "num_heads")}
    expected["num_register_tokens"] = arch.get("num_register_tokens", 0)
    differ = any(backbone.arch[key] != value for key, value in expected.items())
    if differ or backbone.patch_size != 14:
        raise UserError(f"{weights} holds a {describe_backbone(backbone)}, not the {stem} of this entry")
    return backbone


def vits14(pretrained=False, weights=None):
    """ViT-S/14, width 384."""
    return _load("dinov2_vits14", pretrained, weights)


def vitb14(pretrained=False, weights=None):
    """ViT-B/14, width 768."""
    return _load("dinov2_vitb14", pretrained, weights)


def vitl14(pretrained=False, weights=None):
    """ViT-L/14, width 1024."""
    return _load("dinov2_vitl14", pretrained, weights)


def vitg14(pretrained=False, weights=None):
    """ViT-g/14, width 1536, SwiGLU."""
    return _load("dinov2_vitg14", pretrained, weights)


def vits14_reg(pretrained=False, weights=None):
    """ViT-S/14 with 4 registers."""
    return _load("dinov2_vits14_reg4", pretrained, weights)


def vitb14_reg(pretrained=False, weights=None):
    """ViT-B/14 with 4 registers."""
    return _load("dinov2_vitb14_reg4", pretrained, weights)


def vitl14_reg(pretrained=False, weights=None):
    """ViT-L/14 with 4 registers."""
    return _load("dinov2_vitl14_reg4", pretrained, weights)


def vitg14_reg(pretrained=False, weights=None):
    """ViT-g/14 with 4 registers."""
    return _load("dinov2_vitg14_reg4", pretrained, weights)
