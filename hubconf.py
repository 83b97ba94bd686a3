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
# Meta publishes no sums: these are the SHA-256 that many projects have pinned. Of the others none is known.
_SHA256 = {
    "dinov2_vits14": "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    "dinov2_vitb14": "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    "dinov2_vitl14": "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
}


def _download(name, sha256=None):
    """Fetch one of Meta's released files, unless it is in the cache -> its path. Raises UserError.

    sha256: what the file must have, fetched or cached (default: what is known of a file just fetched).
    """
    import hashlib
    from http.client import HTTPException

    from config import UserError
    from features import released_file, released_name

    stem = released_name(name)
    if stem is None:
        names = "dinov2_vits14, vitb14, vitl14, vitg14, and each of them with _reg4"
        raise UserError(f"{name} is not a released model: those are {names}")
    path = released_file(stem)
    if path.is_file():
        if sha256:
            with open(path, "rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            if found != sha256.lower():
                raise UserError(f"{path} has the SHA-256 {found}, not {sha256}: delete it to fetch it again")
        return path
    url = f"{_BASE_URL}/{stem.removesuffix('_reg4')}/{path.name}"
    try:
        _fetch(url, path, (sha256 or _SHA256.get(stem, "")).lower())
    except (OSError, HTTPException, ValueError) as e:
        raise UserError(f"{url} cannot be fetched ({e}): fetch it elsewhere and put it at {path}") from None
    return path


def _fetch(url, path, sha256):
    """Write what the URL holds to `path`, once all of it is there and checked.

    OSError if it is no weights file, or has another SHA-256 than the one given ("": none is known).
    """
    import hashlib
    import os
    from urllib.request import urlopen

    from tqdm import tqdm

    from runfolder import atomic_open

    with urlopen(url, timeout=30) as answer, atomic_open(path, f".{os.getpid()}") as f:
        size = answer.headers.get("Content-Length")
        size = int(size) if size else None
        digest = hashlib.sha256()
        with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
            for piece in iter(lambda: answer.read(1 << 20), b""):
                if f.tell() == 0 and piece[:1] not in (b"P", b"\x80"):  # neither a zip nor a pickle
                    raise OSError("a web page came instead")
                f.write(piece)
                digest.update(piece)
                bar.update(len(piece))
        if not f.tell() or (size and f.tell() != size):
            raise OSError(f"it ended after {f.tell()} of {size} bytes")
        found = digest.hexdigest()
        if sha256 and found != sha256:
            raise OSError(f"its SHA-256 is {found}, not {sha256}")
    verified = "as expected"
    if not sha256:
        verified = "and no sum is known to compare it with; tools.export --sha256 pins one"
    print(f"{path.name}: SHA-256 {found}, {verified}")


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
