"""The network against the authors' (tests/golden), its published sizes, and its answers to bad input."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN, RELEASED_CHECKPOINTS, Bomb, assert_close, load_golden
from torch.nn import functional as F

import features
import model
from config import UserError
from features import load_backbone
from model import SIZES, DINOHead, VisionTransformer

# ---------------------------------------------------------------- against the authors


def with_prefix(tensors, prefix):
    """The entries of a dict whose keys start with `prefix`, under the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load_golden_vit(name):
    """-> the network with the authors' weights, and all tensors of the file."""
    golden = load_golden(name)
    cfg = json.loads(str(np.load(GOLDEN / f"{name}.npz")["cfg"]))
    cfg.pop("mlp_ratio")
    backbone = VisionTransformer(**cfg, layerscale=1.0).eval()
    backbone.load_state_dict(with_prefix(golden, "sd."), strict=True)
    return backbone, golden


@pytest.mark.parametrize("resolution", ["56", "70", "42", "56x84", "42x70"])
@pytest.mark.parametrize("name", ["e_vit_mlp", "e_vit_swiglu", "e_vit_mlp_offset01"])
def test_forward_at_five_resolutions(name, resolution):
    backbone, golden = load_golden_vit(name)
    expected = with_prefix(golden, f"{resolution}.")
    images = expected["x"]
    rows, columns = images.shape[2] // 14, images.shape[3] // 14
    assert_close(backbone.interpolate_pos_embed(rows, columns), expected["pos_embed"])
    tokens = backbone(images)
    assert_close(tokens.cls, expected["cls"])
    assert_close(tokens.patches, expected["patch"])
    if backbone.num_register_tokens:
        assert_close(tokens.registers, expected["reg"])
    raw = backbone.intermediate(images, [2], norm=False)[0]
    assert_close(torch.cat([raw.cls[:, None], raw.registers, raw.patches], 1), expected["prenorm"])


@pytest.mark.parametrize("name", ["e_vit_mlp", "e_vit_swiglu"])
def test_masked_tokens_and_intermediate_layers(name):
    backbone, golden = load_golden_vit(name)
    expected = with_prefix(golden, "56.")
    tokens = backbone(expected["x"], expected["mask"].bool())
    assert_close(tokens.cls, expected["masked_cls"])
    assert_close(tokens.patches, expected["masked_patch"])
    for i, layer in enumerate(backbone.intermediate(expected["x"], [1, 2])):
        assert_close(layer.cls, expected[f"inter_last2_{i}_cls"])
        patch_map = layer.patches.transpose(1, 2).unflatten(2, (4, 4))
        assert_close(patch_map, expected[f"inter_last2_{i}_patch_bchw"])
    for i, layer in enumerate(backbone.intermediate(expected["x"], [0, 2], norm=False)):
        assert_close(layer.cls, expected[f"inter_0_2_{i}_cls_nonorm"])
        assert_close(layer.patches, expected[f"inter_0_2_{i}_patch_nonorm"])


def test_crops_in_one_pass_are_crops_one_by_one():
    backbone, golden = load_golden_vit("e_vit_mlp")
    crops = [golden["56.x"], golden["42.x"], golden["56x84.x"]]
    masks = [golden["56.mask"].bool(), None, None]
    for together, images, mask in zip(backbone.forward_crops(crops, masks), crops, masks, strict=True):
        alone = backbone(images, mask)
        for ours, theirs in zip(together, alone, strict=True):
            assert_close(ours, theirs.detach(), 1e-6)


def test_drop_path_by_subset(monkeypatch):
    golden = load_golden("e2_drop_path_subset")
    x = golden["x"]
    calls = []

    def branch(tokens, groups):
        calls.append((tokens, groups))
        return tokens @ golden["W"]

    monkeypatch.setattr(torch, "randperm", lambda n, **_: golden["permutation"])
    out = model.drop_path(x.flatten(0, 1), [(10, 4)], branch, 0.4)
    assert_close(out.view(10, 4, 6), golden["out"])
    tokens, groups = calls[0]
    assert groups == [(6, 4)]
    assert torch.equal(tokens.view(6, 4, 6), x[golden["kept"]])


def test_drop_path_keeps_groups_apart_and_one_image_at_least():
    x = torch.randn(2 * 3 + 5 * 2, 4)
    change = model.drop_path(x, [(2, 3), (5, 2)], lambda tokens, groups: torch.ones_like(tokens), 0.99) - x
    first, second = change.split([2 * 3, 5 * 2])
    for group, images in ((first, 2), (second, 5)):
        changed = (group != 0).any(-1).view(images, -1)
        assert changed.all(1).sum() == 1
        assert group.max() == pytest.approx(images)  # scaled by images / kept images


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head(layers):
    expected = with_prefix(load_golden("f_dino_head"), f"n{layers}.")
    head = DINOHead(48, 96, layers, 64, 32)
    head.load_state_dict(with_prefix(expected, "sd."), strict=True)
    x = expected["x"].requires_grad_()
    y = head(x)
    y.backward(expected["cot"])
    assert_close(y, expected["y"])
    assert_close(x.grad, expected["grad_x"])
    assert_close(head.last_layer.weight_v.grad, expected["grad_weight_v"])
    assert_close(head.last_layer.weight_g.grad, expected["grad_weight_g"])


# ---------------------------------------------------------------- sizes and initialisation

COUNTS = {  # parameters without registers, with four
    "vit_small": (22_056_576, 22_058_112),
    "vit_base": (86_580_480, 86_583_552),
    "vit_large": (304_368_640, 304_372_736),
    "vit_giant2": (1_136_480_768, 1_136_486_912),
}


@pytest.mark.parametrize("arch", COUNTS)
@pytest.mark.parametrize("registers", [0, 4])
def test_published_parameter_counts(arch, registers):
    ffn = "swiglufused" if arch == "vit_giant2" else "mlp"
    with torch.device("meta"):
        backbone = VisionTransformer(**SIZES[arch], num_register_tokens=registers, ffn_layer=ffn)
    assert sum(p.numel() for p in backbone.parameters()) == COUNTS[arch][registers > 0]


@pytest.mark.parametrize(
    "rows, columns, batch", [(14, 1, 1), (16, 1, 3), (7, 1, 2), (1, 14, 1), (1, 1, 1), (5, 3, 2)]
)
def test_bf16_on_a_cpu_writes_every_patch(rows, columns, batch):
    """The convolution of torch 2.13.0 does not, for one column of patches: it returns what lay in memory."""
    torch.manual_seed(0)
    arch = dict(embed_dim=96, depth=2, num_heads=3, patch_size=8, img_size=32, init_std=0.05, layerscale=1.0)
    exact = VisionTransformer(**arch).eval().requires_grad_(False)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    image = torch.randn(batch, 3, 8 * rows, 8 * columns)
    expected = exact(image)
    for _ in range(3):
        poison = [
            torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in (96 * rows, 96 * rows * batch)
        ]
        del poison  # the next blocks of this size hold NaN
        with torch.autocast("cpu", torch.bfloat16):
            as_in_training = exact(image)
        for found in (rounded(image), as_in_training):
            for ours, theirs in ((found.patches, expected.patches), (found.cls, expected.cls)):
                assert F.cosine_similarity(ours.float(), theirs, dim=-1).min() > 0.999


def test_dimension_table_of_vitb16():
    with torch.device("meta"):
        backbone = VisionTransformer(**SIZES["vit_base"], patch_size=16, img_size=224, num_register_tokens=4)
        image = torch.empty(1, 3, 224, 224)
        assert backbone.patch_embed(image).shape == (1, 196, 768)
        assert backbone.embed(image).shape == (1, 201, 768)
        tokens = backbone(image)
        assert tokens.cls.shape == (1, 768)
        assert tokens.registers.shape == (1, 4, 768)
        assert tokens.patches.shape == (1, 196, 768)
        assert DINOHead(768, 65536)(tokens.cls).shape == (1, 65536)


@pytest.mark.parametrize("dim, hidden", [(384, 1024), (768, 2048), (1024, 2736), (1536, 4096)])
def test_swiglu_widths(dim, hidden):
    assert model.SwiGLU(dim, 4 * dim).w3.in_features == hidden


def test_registers_come_after_cls_and_have_no_position():
    backbone, golden = load_golden_vit("e_vit_mlp")
    tokens = backbone.embed(golden["56.x"])
    cls = (backbone.cls_token + backbone.pos_embed[:, :1])[:, 0]
    assert torch.equal(tokens[:, 0], cls.expand(2, -1))
    assert torch.equal(tokens[:, 1:5], backbone.register_tokens.expand(2, -1, -1))


def test_init_statistics():
    torch.manual_seed(0)
    backbone = VisionTransformer(**SIZES["vit_small"], num_register_tokens=4)
    head = DINOHead(384, 4096)
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert backbone.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert backbone.cls_token.abs().max() < 1e-5
    assert backbone.register_tokens.abs().max() < 1e-5
    assert not backbone.mask_token.any()
    assert (backbone.blocks[0].ls1.gamma == 1e-5).all()
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)


# ---------------------------------------------------------------- weights


def meta_backbone(**options):
    """A ViT as Meta's with registers, but narrow: for images of 56 pixels in patches of 14."""
    arch = dict(embed_dim=64, depth=2, num_heads=1, patch_size=14, img_size=56, num_register_tokens=4,
                layerscale=1.0, interpolate_antialias=True, interpolate_offset=0.0)  # fmt: skip
    return VisionTransformer(**{**arch, **options}).eval()


NO_REGISTERS = dict(num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1)
LAYOUTS = [{}, NO_REGISTERS, dict(ffn_layer="swiglu"), dict(patch_size=16, img_size=64)]


@pytest.mark.parametrize("options", LAYOUTS)
def test_weights_load_and_describe_themselves(tmp_path, options):
    """As in a released file: bare tensors, the architecture is read from the shapes."""
    backbone = meta_backbone(**options)
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    loaded = load_backbone(tmp_path / "w.pth")
    images = torch.randn(2, 3, 3 * backbone.patch_size, 5 * backbone.patch_size)
    for ours, theirs in zip(backbone(images), loaded(images), strict=True):
        assert torch.equal(ours, theirs)


def released_shapes(name):
    """{name: shape} of all tensors of a released file."""
    shapes = {}
    for key, shape in RELEASED_CHECKPOINTS[name]["keys"].items():
        if "blocks.0." in key:
            for block in range(RELEASED_CHECKPOINTS[name]["depth"]):
                shapes[key.replace(".0.", f".{block}.", 1)] = shape
        elif "blocks." not in key:
            shapes[key] = shape
    return shapes


@pytest.mark.parametrize("name", RELEASED_CHECKPOINTS)
def test_layout_of_the_released_files(name):
    """A file of exactly the published names and shapes loads strict, and tells its architecture."""
    shapes = released_shapes(name)
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
        backbone = VisionTransformer(**features.infer_arch(tensors, {}, name))
    assert {key: list(value.shape) for key, value in backbone.state_dict().items()} == shapes
    assert sum(p.numel() for p in backbone.parameters()) == RELEASED_CHECKPOINTS[name]["n_params"]
    has_registers = "reg4" in name
    assert backbone.interpolate_antialias == has_registers
    assert backbone.interpolate_offset == (0.0 if has_registers else 0.1)
    assert backbone.num_register_tokens == (4 if has_registers else 0)
    assert backbone.blocks[0].attn.num_heads == backbone.embed_dim // 64


# Of the eight, those small enough to write.
@pytest.mark.parametrize("name", [name for name in RELEASED_CHECKPOINTS if "vits14" in name])
def test_released_files_load(name, tmp_path):
    tensors = {key: torch.randn(shape) for key, shape in released_shapes(name).items()}
    torch.save(tensors, tmp_path / f"{name}_pretrain.pth")
    backbone = load_backbone(tmp_path / f"{name}_pretrain.pth")
    assert backbone(torch.randn(1, 3, 28, 42)).patches.shape == (1, 6, 384)


def refusal(path):
    """The sentence with which load_backbone refuses a file, which it must name."""
    with pytest.raises(UserError) as error:
        load_backbone(path)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert path.name in sentence
    return sentence


def test_bad_weights_are_one_sentence(tmp_path):
    good = meta_backbone().state_dict()
    bomb = Bomb(tmp_path / "exploded")
    torch.save(good, tmp_path / "good.pth")
    cut_short = (tmp_path / "good.pth").read_bytes()[:-3000]
    incomplete = {key: value for key, value in good.items() if key != "blocks.1.mlp.fc2.bias"}
    contents = {
        "plain tensors": b"<html>not found</html>",
        "damaged|plain tensors": cut_short,
        "could run code": {"x": bomb},
        "list": [1, 2],
        "lacks": {"fc.weight": torch.zeros(2, 2)},
        "blocks.1.mlp.fc2.bias": incomplete,
        "surplus": {**good, "surplus": torch.zeros(1)},
    }
    for i, (words, content) in enumerate(contents.items()):
        path = tmp_path / f"file{i}.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        sentence = refusal(path)
        assert any(word in sentence for word in words.split("|")), (words, sentence)
    assert "no weights at" in refusal(tmp_path / "missing.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_folder_without_weights_is_one_sentence(tmp_path):
    sentence = refusal(tmp_path)
    assert "no run folder" in sentence or "teacher.pth" in sentence


# ---------------------------------------------------------------- images of any size


def test_image_that_does_not_divide():
    with pytest.raises(UserError, match="56 x 60.*14 x 14.*56 x 56"):
        meta_backbone()(torch.zeros(1, 3, 60, 56))


@pytest.mark.parametrize("options", [{}, dict(interpolate_offset=0.1, interpolate_antialias=False)])
@pytest.mark.parametrize("side", [14, 42, 546, 602])
def test_odd_grids_give_the_right_number_of_patches(side, options):
    backbone = meta_backbone(embed_dim=8, **options)
    assert backbone(torch.zeros(1, 3, side, 14)).patches.shape == (1, side // 14, 8)


def test_final_norm_is_applied_once():
    backbone = meta_backbone()
    image = torch.randn(1, 3, 56, 56)
    raw = backbone.intermediate(image, [1], norm=False)[0].cls
    normalized = F.layer_norm(raw, (64,), backbone.norm.weight, backbone.norm.bias, 1e-6)
    assert_close(normalized, backbone(image).cls.detach())


def test_attention_maps_are_what_the_block_computes(monkeypatch):
    """The explicit softmax, applied to the values, is what attention gives; and its rows sum to one."""
    torch.manual_seed(0)
    size = dict(patch_size=4, img_size=16, num_register_tokens=2, init_std=0.3)
    backbone = VisionTransformer(32, 3, 2, **size).eval()
    calls = []
    real = model.attention

    def recorded(qkv, groups):
        out = real(qkv, groups)
        calls.append((qkv, out))
        return out

    monkeypatch.setattr(model, "attention", recorded)
    images = torch.randn(2, 3, 16, 12)
    backbone(images)
    layers = calls[:]
    for layer in (0, 2, -1):
        maps = backbone.attention_maps(images, layer)
        assert maps.shape == (2, 2, 15, 15)
        assert torch.allclose(maps.sum(-1), torch.ones(()))
        qkv, out = layers[layer]
        values = qkv[:, 2].view(2, 15, 2, 16).transpose(1, 2)
        assert_close((maps @ values).transpose(1, 2).reshape(30, 2, 16), out, 5e-6)
