"""Entries for torch.hub: a backbone, in eval mode, in any project.

    torch.hub.load("PATH/TO/nanodino", "vits14_reg", source="local", weights="runs/vits14")

What is unusual here: nothing is fetched unless `pretrained=True` asks for Meta's file. Without that, and
without `weights`, the numbers are random. `weights` is whatever model.load_backbone reads, and must be of
this size. While it loads, this folder stands first on Python's path: a `model` or `config` of yours that is
imported already would be taken for ours.
"""

dependencies = ["torch", "yaml"]


def _load(size, registers, pretrained=False, weights=None):
    from config import UserError
    from model import SIZES, VisionTransformer, describe, load_backbone

    if pretrained and weights is None:
        from weights import download

        weights = download(f"vit{size[0]}14{'_reg4' if registers else ''}")
    if weights is not None:
        backbone, asked = load_backbone(weights), SIZES[f"vit_{size}"] | dict(num_register_tokens=registers)
        if any(backbone.arch[k] != v for k, v in asked.items()) or backbone.patch_size != 14:
            raise UserError(f"{weights} holds a {describe(backbone)}, not the vit_{size} of this entry")
        return backbone
    positions = dict(interpolate_antialias=True, interpolate_offset=0.0) if registers else {}
    ffn = "swiglu" if size == "giant2" else "mlp"
    how = dict(num_register_tokens=registers, ffn_layer=ffn, **positions)
    return VisionTransformer(**SIZES[f"vit_{size}"], **how).eval()


def vits14(pretrained=False, weights=None):
    """ViT-S/14, width 384."""
    return _load("small", 0, pretrained, weights)


def vitb14(pretrained=False, weights=None):
    """ViT-B/14, width 768."""
    return _load("base", 0, pretrained, weights)


def vitl14(pretrained=False, weights=None):
    """ViT-L/14, width 1024."""
    return _load("large", 0, pretrained, weights)


def vitg14(pretrained=False, weights=None):
    """ViT-g/14, width 1536, SwiGLU."""
    return _load("giant2", 0, pretrained, weights)


def vits14_reg(pretrained=False, weights=None):
    """ViT-S/14 with 4 registers."""
    return _load("small", 4, pretrained, weights)


def vitb14_reg(pretrained=False, weights=None):
    """ViT-B/14 with 4 registers."""
    return _load("base", 4, pretrained, weights)


def vitl14_reg(pretrained=False, weights=None):
    """ViT-L/14 with 4 registers."""
    return _load("large", 4, pretrained, weights)


def vitg14_reg(pretrained=False, weights=None):
    """ViT-g/14 with 4 registers."""
    return _load("giant2", 4, pretrained, weights)
