"""The network against the authors' (tests/golden), its published sizes, and what it says to bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

import features
import model
from config import UserError
from features import load_backbone
from model import SIZES, DINOHead, VisionTransformer

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # largest error over largest value; LayerNorm eps 1e-5 is off by 9e-5, tanh GELU by 2e-4


def close(ours, theirs, tolerance=TOLERANCE):
    ours, theirs = ours.detach().double(), torch.as_tensor(theirs).double()
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def golden_vit(name):
    f = np.load(GOLDEN / f"{name}.npz")
    cfg = json.loads(str(f["cfg"]))
    cfg.pop("mlp_ratio")
    m = VisionTransformer(**cfg, layerscale=1.0).eval()
    m.load_state_dict({k[3:]: torch.from_numpy(f[k]) for k in f.files if k.startswith("sd.")}, strict=True)
    return m, {k: torch.from_numpy(f[k]) for k in f.files if k != "cfg"}


@pytest.mark.parametrize("name", ["e_vit_mlp", "e_vit_swiglu", "e_vit_mlp_offset01"])
def test_forward_at_five_resolutions(name):
    m, f = golden_vit(name)
    for r in ("56", "70", "42", "56x84", "42x70"):
        x = f[f"{r}.x"]
        h, w = x.shape[2] // 14, x.shape[3] // 14
        close(m.interpolate_pos_embed(h, w), f[f"{r}.pos_embed"])
        tokens = m(x)
        close(tokens.cls, f[f"{r}.cls"])
        close(tokens.patches, f[f"{r}.patch"])
        if m.num_register_tokens:
            close(tokens.registers, f[f"{r}.reg"])
        raw = m.intermediate(x, [2], norm=False)[0]
        close(torch.cat([raw.cls[:, None], raw.registers, raw.patches], 1), f[f"{r}.prenorm"])


@pytest.mark.parametrize("name", ["e_vit_mlp", "e_vit_swiglu"])
def test_masked_tokens_and_intermediate_layers(name):
    m, f = golden_vit(name)
    tokens = m(f["56.x"], f["56.mask"].bool())
    close(tokens.cls, f["56.masked_cls"])
    close(tokens.patches, f["56.masked_patch"])
    for i, out in enumerate(m.intermediate(f["56.x"], [1, 2])):
        close(out.cls, f[f"56.inter_last2_{i}_cls"])
        close(out.patches.transpose(1, 2).unflatten(2, (4, 4)), f[f"56.inter_last2_{i}_patch_bchw"])
    for i, out in enumerate(m.intermediate(f["56.x"], [0, 2], norm=False)):
        close(out.cls, f[f"56.inter_0_2_{i}_cls_nonorm"])
        close(out.patches, f[f"56.inter_0_2_{i}_patch_nonorm"])


def test_crops_in_one_pass_are_crops_one_by_one():
    m, f = golden_vit("e_vit_mlp")
    crops, masks = [f["56.x"], f["42.x"], f["56x84.x"]], [f["56.mask"].bool(), None, None]
    for together, x, mask in zip(m.forward_crops(crops, masks), crops, masks, strict=True):
        for a, b in zip(together, m(x, mask), strict=True):
            close(a, b.detach(), 1e-6)


def test_drop_path_by_subset(monkeypatch):
    f = np.load(GOLDEN / "e2_drop_path_subset.npz")
    x, W = torch.from_numpy(f["x"]), torch.from_numpy(f["W"])
    seen = []

    def branch(z, groups):
        seen.append((z, groups))
        return z @ W

    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.from_numpy(f["permutation"]))
    out = model.drop_path(x.flatten(0, 1), [(10, 4)], branch, 0.4)
    close(out.view(10, 4, 6), f["out"])
    assert seen[0][1] == [(6, 4)] and torch.equal(seen[0][0].view(6, 4, 6), x[torch.from_numpy(f["kept"])])


def test_drop_path_keeps_groups_apart_and_one_image_at_least():
    x = torch.randn(2 * 3 + 5 * 2, 4)
    out = model.drop_path(x, [(2, 3), (5, 2)], lambda z, g: torch.ones_like(z), 0.99) - x
    changed = (out != 0).any(-1)
    assert changed[:6].view(2, 3).all(1).sum() == 1 and changed[6:].view(5, 2).all(1).sum() == 1
    assert out[:6].max() == pytest.approx(2) and out[6:].max() == pytest.approx(5)  # scaled by b / k


@pytest.mark.parametrize("n", [1, 2, 3])
def test_head(n):
    f = np.load(GOLDEN / "f_dino_head.npz")
    head = DINOHead(48, 96, n, 64, 32)
    prefix = f"n{n}.sd."
    head.load_state_dict(
        {k[len(prefix) :]: torch.from_numpy(f[k]) for k in f.files if k.startswith(prefix)}, strict=True
    )
    x = torch.from_numpy(f[f"n{n}.x"]).requires_grad_()
    y = head(x)
    y.backward(torch.from_numpy(f[f"n{n}.cot"]))
    close(y, f[f"n{n}.y"])
    close(x.grad, f[f"n{n}.grad_x"])
    close(head.last_layer.weight_v.grad, f[f"n{n}.grad_weight_v"])
    close(head.last_layer.weight_g.grad, f[f"n{n}.grad_weight_g"])


COUNTS = {"vit_small": (22_056_576, 22_058_112), "vit_base": (86_580_480, 86_583_552),
          "vit_large": (304_368_640, 304_372_736), "vit_giant2": (1_136_480_768, 1_136_486_912)}  # fmt: skip


@pytest.mark.parametrize("arch", COUNTS)
@pytest.mark.parametrize("registers", [0, 4])
def test_published_parameter_counts(arch, registers):
    ffn = "swiglufused" if arch == "vit_giant2" else "mlp"
    with torch.device("meta"):
        m = VisionTransformer(**SIZES[arch], num_register_tokens=registers, ffn_layer=ffn)
    assert sum(p.numel() for p in m.parameters()) == COUNTS[arch][registers > 0]


def test_dimension_table_of_vitb16():
    with torch.device("meta"):
        m = VisionTransformer(**SIZES["vit_base"], patch_size=16, img_size=224, num_register_tokens=4)
        image = torch.empty(1, 3, 224, 224)
        assert m.patch_embed(image).shape == (1, 196, 768) and m.embed(image).shape == (1, 201, 768)
        tokens = m(image)
        shapes = [tuple(x.shape[1:]) for x in tokens]
        assert shapes == [(768,), (4, 768), (196, 768)]
        assert DINOHead(768, 65536)(tokens.cls).shape == (1, 65536)


def test_swiglu_widths():
    widths = {d: model.SwiGLU(d, 4 * d).w3.in_features for d in (384, 768, 1024, 1536)}
    assert widths == {384: 1024, 768: 2048, 1024: 2736, 1536: 4096}


def test_registers_come_after_cls_and_have_no_position():
    m, f = golden_vit("e_vit_mlp")
    tokens = m.embed(f["56.x"])
    assert torch.equal(tokens[:, 0], (m.cls_token + m.pos_embed[:, :1])[:, 0].expand(2, -1))
    assert torch.equal(tokens[:, 1:5], m.register_tokens.expand(2, -1, -1))


def test_init_statistics():
    torch.manual_seed(0)
    m, head = VisionTransformer(**SIZES["vit_small"], num_register_tokens=4), DINOHead(384, 4096)
    assert m.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert m.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert m.cls_token.abs().max() < 1e-5 and m.register_tokens.abs().max() < 1e-5 and not m.mask_token.any()
    assert (m.blocks[0].ls1.gamma == 1e-5).all() and (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)


def tiny(**kw):
    args = dict(embed_dim=64, depth=2, num_heads=1, patch_size=14, img_size=56, num_register_tokens=4,
                layerscale=1.0, interpolate_antialias=True, interpolate_offset=0.0)  # fmt: skip
    return VisionTransformer(**{**args, **kw}).eval()


NO_REGISTERS = dict(num_register_tokens=0, interpolate_antialias=False, interpolate_offset=0.1)


@pytest.mark.parametrize("kw", [{}, NO_REGISTERS, dict(ffn_layer="swiglu"), dict(patch_size=16, img_size=64)])
def test_weights_load_and_describe_themselves(tmp_path, kw):
    m = tiny(**kw)
    torch.save(
        m.state_dict(), tmp_path / "w.pth"
    )  # a released file: bare tensors, architecture read from the shapes
    loaded = load_backbone(tmp_path / "w.pth")
    x = torch.randn(2, 3, 3 * m.patch_size, 5 * m.patch_size)
    assert all(torch.equal(a, b) for a, b in zip(m(x), loaded(x), strict=True))


RELEASED = json.loads((GOLDEN / "i_hub_state_dict_keys.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_layout_of_the_released_files(name, tmp_path):
    """A file of exactly the published names and shapes loads strict, and tells its architecture."""
    shapes, depth = RELEASED[name]["keys"], RELEASED[name]["depth"]
    blocks = {
        k.replace(".0.", f".{i}.", 1): v for k, v in shapes.items() for i in range(depth) if "blocks.0." in k
    }
    shapes = {k: v for k, v in shapes.items() if "blocks." not in k} | blocks
    with torch.device("meta"):
        m = VisionTransformer(**features.infer_arch({k: torch.empty(v) for k, v in shapes.items()}, {}, name))
    assert {k: list(v.shape) for k, v in m.state_dict().items()} == shapes
    assert sum(p.numel() for p in m.parameters()) == RELEASED[name]["n_params"]
    assert m.interpolate_antialias == ("reg4" in name) and m.interpolate_offset == (
        0.0 if "reg4" in name else 0.1
    )
    assert m.num_register_tokens == 4 * ("reg4" in name) and m.blocks[0].attn.num_heads == m.embed_dim // 64
    if "vits14" in name:  # small enough to write
        torch.save({k: torch.randn(v) for k, v in shapes.items()}, tmp_path / f"{name}_pretrain.pth")
        assert load_backbone(tmp_path / f"{name}_pretrain.pth")(torch.randn(1, 3, 28, 42)).patches.shape == (
            1,
            6,
            384,
        )


def bad_file(tmp_path, content, name="w.pth"):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    return tmp_path / name


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_bad_weights_are_one_sentence(tmp_path, capsys):
    good = tiny().state_dict()
    torch.save(good, tmp_path / "good.pth")
    cases = {
        "no weights at": tmp_path / "missing.pth",
        "no run folder|teacher.pth": tmp_path,
        "plain tensors": bad_file(tmp_path, b"<html>not found</html>", "a.pth"),
        "damaged|plain tensors": bad_file(tmp_path, (tmp_path / "good.pth").read_bytes()[:-3000], "b.pth"),
        "TypeError|Unpickling|plain|damaged": bad_file(tmp_path, {"x": Bomb()}, "c.pth"),
        "list": bad_file(tmp_path, [1, 2], "d.pth"),
        "lacks": bad_file(tmp_path, {"fc.weight": torch.zeros(2, 2)}, "e.pth"),
        "blocks.1.mlp.fc2.bias": bad_file(
            tmp_path, {k: v for k, v in good.items() if k != "blocks.1.mlp.fc2.bias"}, "f.pth"
        ),
        "surplus": bad_file(tmp_path, {**good, "surplus": torch.zeros(1)}, "g.pth"),
    }
    for words, path in cases.items():
        with pytest.raises(UserError, match=words) as e:
            load_backbone(path)
        assert "\n" not in str(e.value) and str(path.name) in str(e.value)
    assert "boom" not in capsys.readouterr().out


def test_image_that_does_not_divide():
    with pytest.raises(UserError, match="56 x 60.*14 x 14.*56 x 56"):
        tiny()(torch.zeros(1, 3, 60, 56))


@pytest.mark.parametrize("side", [14, 42, 546, 602])
def test_odd_grids_give_the_right_number_of_patches(side):
    for m in (tiny(embed_dim=8), tiny(embed_dim=8, interpolate_offset=0.1, interpolate_antialias=False)):
        assert m(torch.zeros(1, 3, side, 14)).patches.shape == (1, side // 14, 8)


def test_final_norm_is_applied_once():
    m, x = tiny(), torch.randn(1, 3, 56, 56)
    raw = m.intermediate(x, [1], norm=False)[0].cls
    close(layer_norm(raw, (64,), m.norm.weight, m.norm.bias, 1e-6), m(x).cls.detach())


def test_attention_maps_are_what_the_block_computes(monkeypatch):
    """The explicit softmax, applied to the values, is what attention gives; and its rows sum to one."""
    torch.manual_seed(0)
    m = VisionTransformer(32, 3, 2, patch_size=4, img_size=16, num_register_tokens=2, init_std=0.3).eval()
    seen, plain = [], model.attention
    monkeypatch.setattr(
        model, "attention", lambda qkv, groups: seen.append((qkv, plain(qkv, groups))) or seen[-1][1]
    )
    images = torch.randn(2, 3, 16, 12)
    m(images)
    first = seen[:]
    for layer in (0, 2, -1):
        maps = m.attention_maps(images, layer)
        assert maps.shape == (2, 2, 15, 15) and torch.allclose(maps.sum(-1), torch.ones(()))
        qkv, out = first[layer]
        v = qkv[:, 2].view(2, 15, 2, 16).transpose(1, 2)
        close((maps @ v).transpose(1, 2).reshape(30, 2, 16), out, 5e-6)
